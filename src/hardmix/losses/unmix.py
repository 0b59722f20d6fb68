"""Un-Mix: CLIP, and CLIP again for the batch mixed with its reverse, in either order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.losses._features import feature_rows
from hardmix.losses.clip import REDUCTIONS, clip_loss, one_number, unit_pairs
from hardmix.losses.m3mix import unimodal_mix_loss
from hardmix.mixing.geodesic import shares


def unmix_loss(
    image_features: Tensor,
    text_features: Tensor,
    mixed_features: Tensor,
    logit_scale: Tensor | float,
    *,
    lam: Tensor | float,
    reduction: str = "mean",
) -> Tensor:
    """Un-Mix: the unmixed loss, and the loss of the mixed batch with its texts in both orders.

        L = CLIP(a, b) + lam CLIP(m, b) + (1 - lam) CLIP(reversed m, b)

    m_i is what the encoder makes of image i mixed with image N - 1 - i, both orders of which are one pass. The last two
    terms are `unimodal_mix_loss` with mix="given", and computed so. The caller mixes: `Mixup(1.0, per="batch",
    pairing="reversal")`, or, every other time in the authors' code, `CutMix` with the same settings.

    Args:
        image_features, text_features, logit_scale: as for `clip_loss`, unmixed.
        mixed_features: (N, D) of the mixed images. To mix the texts, hand these over first and their mixtures third.
        lam: share of image i in mixture i: a number for all, or (N,) with the same for i and N - 1 - i, as a policy's
            plan has it.
        reduction: "mean" over the pairs, "sum", or "none"; then the reversed term of row i is that of mixture i.

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1: 0, with a gradient of zeros. With an odd N the middle row
        has nothing to be mixed with. lam = 1 with m = a is twice `clip_loss`. First derivatives only.

    Raises:
        TypeError, ValueError: as for `clip_loss`; mixed features of another shape; shares outside [0, 1] or, on the
            CPU, different ones for a row and its partner.

    Reference: Shen et al. 2022 (arXiv:2003.05438).

    >>> import torch
    >>> pair = torch.eye(2)
    >>> round(unmix_loss(pair, pair, torch.ones(2, 2), 1.0, lam=0.5).item(), 4)   # log(1 + 1/e) + log 2
    1.0064
    """
    who = "unmix_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    a, b = unit_pairs(who, image_features, text_features)
    mixed = feature_rows(who, "mixed_features", mixed_features, ("image_features", a))
    scale = one_number(who, "logit_scale", logit_scale, a)
    share = shares(who, lam, a.device, a.dtype)
    if share.ndim and share.shape != (len(a),):
        raise ValueError(f"{who}: lam has shape {tuple(share.shape)} for {len(a)} rows; pass a number, or one per row.")
    if share.ndim and share.device.type == "cpu" and not torch.equal(share, share.flip(0)):
        raise ValueError(f"{who}: lam differs between rows i and N - 1 - i; pass one share for the batch.")
    plain = clip_loss(a, b, scale, reduction=reduction)
    return plain + unimodal_mix_loss(mixed, b, scale, mix="given", lam=share, reduction=reduction)


class UnMixLoss(nn.Module):
    """`unmix_loss` with its setting remembered. Nothing is learnt.

    >>> import torch
    >>> images, texts, mixed = torch.randn(3, 8, 16)
    >>> UnMixLoss()(images, texts, mixed, 10.0, lam=0.7).shape
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
        mixed_features: Tensor,
        logit_scale: Tensor | float,
        *,
        lam: Tensor | float,
    ) -> Tensor:
        """The loss of features (N, D), three of them; see `unmix_loss`."""
        return unmix_loss(image_features, text_features, mixed_features, logit_scale, lam=lam, reduction=self.reduction)
