"""HCL: CLIP whose negatives count the more the harder they are, less the positives among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import reduce, softplus
from hardmix.kernels.pair_contrast import Term, pair_contrast
from hardmix.losses.clip import REDUCTIONS, one_number, unit_pairs, without_effect


def hcl_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Contrast with hard negatives: reweighted by importance and corrected for positives among them, both directions.

        z_ij = s a_i . b_j,   M = N - 1,   w_ij = exp(beta z_ij) / mean_{k != i} exp(beta z_ik)
        G_i  = max( (sum_{j != i} w_ij exp(z_ij) - tau_plus M exp(z_ii)) / (1 - tau_plus),  M exp(-s) )
        l_i  = 1/2 log(1 + G_i / exp(z_ii))  +  1/2 the same of texts against images

    Gradients go through the weights as well. Everything is computed from logarithms of sums, at any scale. Above 1,024
    pairs the N x N logits are formed in tiles, twice, and memory grows with N.

    Args:
        image_features, text_features, logit_scale: as for `clip_loss`. The authors have s = 2; the greater s, the fewer
            negatives count at a beta of 1 already.
        beta: how much harder negatives count for, at least 0; 0 for all alike.
        tau_plus: share of the negatives that are positives in truth, at least 0 and less than 1.
        reduction: "mean" over the pairs, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider. beta = 0 with tau_plus = 0 is `clip_loss`. N = 1 has no other
        pair: 0, with a gradient of zeros. All pairs equal: log N. Where the correction takes more than there is, G is
        the least that it can be, and does not depend on the negatives. First derivatives only.

    Raises:
        TypeError, ValueError: as for `clip_loss`; beta or tau_plus out of range.

    Reference: Robinson et al. 2021 (arXiv:2010.04592), whose anchors have the other views of all other samples as
    negatives; here, an image has the other texts and a text the other images. An early version of the code of m2-Mix
    has one direction of this at s = 2, with N in the place of M and without the maximum, so that the loss of a pair
    that is well aligned may be NaN.

    >>> import torch
    >>> round(hcl_loss(torch.eye(3), torch.eye(3), 1.0, tau_plus=0.0).item(), 4)   # log(e + 2) - 1, as for CLIP
    0.5514
    """
    who = "hcl_loss"
    _check_settings(who, beta, tau_plus)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    return reduce(_per_pair(who, image_features, text_features, logit_scale, beta, tau_plus), reduction)


class HCLLoss(nn.Module):
    """`hcl_loss` in the place of open_clip's `ClipLoss`: same call. Nothing is learnt.

    `logit_bias` cancels; it only gets its gradient of 0. `output_dict=True` gives {"contrastive_loss": .}.

    >>> import torch
    >>> HCLLoss()(torch.randn(8, 16), torch.randn(8, 16), 10.0).shape
    torch.Size([])
    """

    def __init__(self, *, beta: float = 1.0, tau_plus: float = 0.1, reduction: str = "mean") -> None:
        super().__init__()
        who = type(self).__name__
        _check_settings(who, beta, tau_plus)
        self.beta, self.tau_plus = float(beta), float(tau_plus)
        self.reduction = _check.choice(who, "reduction", reduction, REDUCTIONS)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, tau_plus={self.tau_plus:g}, reduction={self.reduction!r}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see `hcl_loss`."""
        who = type(self).__name__
        rows = _per_pair(who, image_features, text_features, logit_scale, self.beta, self.tau_plus)
        loss = without_effect(reduce(rows, self.reduction), logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def _per_pair(
    who: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    beta: float,
    tau_plus: float,
) -> Tensor:
    a, b = unit_pairs(who, image_features, text_features)
    scale = one_number(who, "logit_scale", logit_scale, a)
    own = scale * (a * b).sum(1)
    count = len(a) - 1
    if count == 0:
        return own - own
    hard, plain = pair_contrast(a, b, [Term(scale=(1.0 + beta) * scale), Term(scale=beta * scale)])  # (2, N) each
    gap = hard - plain + math.log(count) - own  # the weighted sum beside the positive; all in logarithms
    floor = math.log(count) - scale - own
    taken = math.log(tau_plus * count) if tau_plus else -math.inf
    left = taken - gap  # below 0 where the correction leaves something
    some = left < -torch.finfo(left.dtype).tiny
    # The branch that is not used sees a harmless value: NaN would come through the gradient of where().
    rest = gap + torch.log(-torch.expm1(torch.where(some, left, -1.0))) - math.log1p(-tau_plus)
    return softplus(torch.where(some, torch.maximum(rest, floor), floor)).mean(0)


def _check_settings(who: str, beta: float, tau_plus: float) -> None:
    _check.non_negative(who, "beta", beta)
    if _check.between(who, "tau_plus", tau_plus, 0.0, 1.0) == 1.0:
        raise ValueError(f"{who}: tau_plus is {tau_plus!r}; pass a number less than 1, a share of the negatives.")
