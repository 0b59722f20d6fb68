"""CyCLIP: CLIP whose images and texts shall have the same geometry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import reduce
from hardmix.kernels.pair_contrast import Term, pair_contrast
from hardmix.losses.clip import REDUCTIONS, cross_entropy, one_number, unit_pairs, without_effect


def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    in_modal: float = 0.25,
    cross_modal: float = 0.25,
    reduction: str = "mean",
) -> Tensor:
    """CyCLIP: CLIP plus consistency within the modalities and across them.

        l_i = CLIP_i + in_modal sum_j (a_i . a_j - b_i . b_j)^2 + cross_modal sum_j (a_i . b_j - a_j . b_i)^2

    CLIP_i is that of `clip_loss`. The mean over i gives the paper's factor 1 / N before both double sums. Differences
    of cosines are never formed: both are halves of (a_i - b_i) . (a_j + b_j), its symmetric and its antisymmetric part,
    and keep their digits where the modalities agree. Memory grows with N alone.

    Args:
        image_features, text_features, logit_scale: as for `clip_loss`; the consistency is that of plain cosines.
        in_modal, cross_modal: the two weights, at least 0, not both 0.
        reduction: "mean" over the pairs, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1: 0, with a gradient of zeros, to rounding. All pairs equal:
        log N. Texts that are the images, or all of them in one mirror, are consistent: that leaves CLIP. First
        derivatives only.

    Raises:
        TypeError, ValueError: as for `clip_loss`; both weights 0.

    Reference: Goel et al. 2022 (arXiv:2205.14459); .25 for both weights is the authors' setting.

    >>> import torch
    >>> pair = torch.eye(2)
    >>> round((cyclip_loss(pair, pair.flip(0), 1.0) - cyclip_loss(pair, pair, 1.0)).item(), 4)  # consistent, but wrong
    1.0
    """
    who = "cyclip_loss"
    _check_weights(who, in_modal, cross_modal)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    contrastive, term = _parts(who, image_features, text_features, logit_scale, in_modal, cross_modal)
    return reduce(contrastive + term, reduction)


class CyClipLoss(nn.Module):
    """`cyclip_loss` in the place of open_clip's `ClipLoss`: same call. Nothing is learnt.

    `logit_bias` cancels in a softmax; it only gets its gradient of 0. `output_dict=True` gives {"contrastive_loss":
    CLIP, "cyclip_loss": both weighted terms}, whose sum is the loss.

    >>> import torch
    >>> CyClipLoss()(torch.randn(8, 16), torch.randn(8, 16), 100.0).shape
    torch.Size([])
    """

    def __init__(self, *, in_modal: float = 0.25, cross_modal: float = 0.25, reduction: str = "mean") -> None:
        super().__init__()
        who = type(self).__name__
        _check_weights(who, in_modal, cross_modal)
        self.in_modal, self.cross_modal = float(in_modal), float(cross_modal)
        self.reduction = _check.choice(who, "reduction", reduction, REDUCTIONS)

    def extra_repr(self) -> str:
        return f"in_modal={self.in_modal:g}, cross_modal={self.cross_modal:g}, reduction={self.reduction!r}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see `cyclip_loss`."""
        who = type(self).__name__
        parts = _parts(who, image_features, text_features, logit_scale, self.in_modal, self.cross_modal)
        contrastive, term = (reduce(part, self.reduction) for part in parts)
        contrastive = without_effect(contrastive, logit_bias)
        return {"contrastive_loss": contrastive, "cyclip_loss": term} if output_dict else contrastive + term


def _parts(
    who: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    in_modal: float,
    cross_modal: float,
) -> tuple[Tensor, Tensor]:
    """CLIP and the weighted consistency of each pair, (N,) and (N,)."""
    a, b = unit_pairs(who, image_features, text_features)
    scale = one_number(who, "logit_scale", logit_scale, a)
    others = pair_contrast(a, b, [Term(scale=scale)])[0]
    within, across = _consistency(a, b)
    return cross_entropy(others, scale * (a * b).sum(1)), in_modal * within + cross_modal * across


def _consistency(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's sum of squares, (N,), of the symmetric and of the antisymmetric part of (a_i - b_i) . (a_j + b_j)."""
    gap, both = a - b, a + b
    with torch.autocast(a.device.type, enabled=False):
        if len(a) <= a.shape[1]:
            product = gap @ both.T  # (N, N), the smaller matrix here
            within, across = ((product + sign * product.T).square().sum(1) for sign in (1.0, -1.0))
            return 0.25 * within, 0.25 * across
        squares = ((gap @ (both.T @ both)) * gap).sum(1) + ((both @ (gap.T @ gap)) * both).sum(1)
        mixed = 2.0 * ((gap @ (both.T @ gap)) * both).sum(1)
    return 0.25 * (squares + mixed), 0.25 * (squares - mixed)


def _check_weights(who: str, in_modal: float, cross_modal: float) -> None:
    weights = [_check.non_negative(who, "in_modal", in_modal), _check.non_negative(who, "cross_modal", cross_modal)]
    if not any(weights):
        raise ValueError(f"{who}: in_modal and cross_modal are 0; pass one that is greater, or use clip_loss.")
