"""i-Mix: each mixed sample to its own partner in the batch and to that of what it was mixed with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import CPU, reduce, softplus
from hardmix.kernels.pair_contrast import Term, pair_contrast
from hardmix.losses.clip import REDUCTIONS, one_number, unit_pairs
from hardmix.mixing.draw import given_partner, move
from hardmix.mixing.geodesic import shares


def imix_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    partner: Tensor,
    lam: Tensor | float,
    reduction: str = "mean",
) -> Tensor:
    """i-Mix of contrastive pairs: mixed anchors, unmixed keys, and the pairs of the batch as soft labels.

        l_i = log sum_j exp(s a_i . b_j) - lam_i s a_i . b_i - (1 - lam_i) s a_i . b_{partner(i)}

    The caller has mixed: a_i is what the encoder makes of lam_i x_i + (1 - lam_i) x_{partner(i)}, or of hidden states
    that were mixed so. A policy draws and mixes: `plan = Mixup(1.0, pairing="permutation").plan(x)`, then
    `imix_loss(encoder(plan.blend(x)), text_features, scale, partner=plan.partner, lam=plan.lam)`. To mix the texts,
    hand these over first. There is one direction: keys are not contrasted with the mixed anchors. `unimodal_mix_loss`
    with mix="given" is the form with both, for the batch in reverse.

    Args:
        image_features, text_features, logit_scale: as for `clip_loss`; row i of the images is mixed.
        partner: (N,) row that each row was mixed with, integers.
        lam: share of the row itself: a number, or (N,). The authors mix by max(lam, 1 - lam), lam ~ Beta(1, 1), one
            for each row.
        reduction: "mean" over the rows, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1: 0, with a gradient of zeros. lam = 1, or a row that is its
        own partner, has the cross entropy of that row. First derivatives only.

    Raises:
        TypeError, ValueError: as for `clip_loss`; partners that are no rows of the batch, shares outside [0, 1] or not
            one per row.

    Reference: Lee et al. 2021 (arXiv:2010.08887), the N-pair form.

    >>> import torch
    >>> one, other = torch.eye(2), torch.tensor([1, 0])
    >>> round(imix_loss(one, one, 1.0, partner=other, lam=0.75).item(), 4)   # log(e + 1) - 3/4
    0.5633
    """
    who = "imix_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    a, b = unit_pairs(who, image_features, text_features)
    scale = one_number(who, "logit_scale", logit_scale, a)
    place = _places(who, partner, len(a), a.device)
    share = shares(who, lam, a.device, a.dtype).detach()
    if share.ndim and share.shape != (len(a),):
        raise ValueError(f"{who}: lam has shape {tuple(share.shape)} for {len(a)} rows; pass a number, or one per row.")
    own, across = (scale * (a * keys).sum(1) for keys in (b, b[place]))
    others = pair_contrast(a, b, [Term(scale=scale)])[0, 0]
    return reduce(softplus(others - own) + (1.0 - share) * (own - across), reduction)


class IMixLoss(nn.Module):
    """`imix_loss` with its setting remembered. Nothing is learnt.

    >>> import torch
    >>> rows = torch.arange(8)
    >>> IMixLoss()(torch.randn(8, 16), torch.randn(8, 16), 10.0, partner=rows.flip(0), lam=0.7).shape
    torch.Size([])
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = _check.choice(type(self).__name__, "reduction", reduction, REDUCTIONS)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        partner: Tensor,
        lam: Tensor | float,
    ) -> Tensor:
        """The loss of mixed features (N, D) and keys (N, D); see `imix_loss`."""
        return imix_loss(image_features, text_features, logit_scale, partner=partner, lam=lam, reduction=self.reduction)


def _places(who: str, partner: Tensor, rows: int, device: torch.device) -> Tensor:
    """Partners beside the features. Their values are looked at where that waits for no device."""
    place = _check.tensor(who, "partner", partner)
    if place.device.type == "cpu":
        return move(given_partner(who, place, rows).partner, device)
    given_partner(who, torch.zeros(place.shape, dtype=place.dtype, device=CPU), rows)  # for shape and dtype
    return place.to(device, torch.long)
