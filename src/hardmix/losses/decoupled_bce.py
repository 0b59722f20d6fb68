"""Decoupled Mixup with binary cross entropy, DM(BCE), and the plain form that it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check, _math
from hardmix.kernels.mixed_bce import mixed_bce
from hardmix.losses._targets import check_logits, check_options, mixed_parts, plain_target
from hardmix.mixing.target import MixedTarget


def decoupled_mixup_bce_loss(
    logits: Tensor,
    target: MixedTarget | Tensor,
    *,
    xi: float = 1.0,
    t: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Decoupled Mixup for binary cross entropy: the share of each mixed class is rescaled on its own.

        l = -sum_c [y_c log sigmoid(z_c) + (1 - y_c) log sigmoid(-z_c)],   y = min(1, sum_k r(w_k) onehot(y_k))
        r(w) = 1 if w >= xi, else (w / xi)^t,   r(0) = 0

    t < 1 is concave and asks for more confidence, t > 1 convex. xi = t = 1 is mixed BCE (`soft_bce_loss`), t = 0 the
    two-hot target. The sum is clipped at 1: two shares of one class would give up to 1.41 (xi = 1, t = 0.5).

    Args:
        logits: (N, C) or (N, C, *spatial), C >= 1. Half types are computed in float32, and the loss is float32.
        target: one of

            - MixedTarget with labels (N, K) or (N, K, *spatial) and weights as in `decoupled_mixup_loss`;
            - MixedTarget with multi-hot rows (N, K, C) in [0, 1] and logits (N, C): y = min(1, sum_k r(w_k) row_k);
            - integer labels (N,) or (N, *spatial);
            - dense soft labels (N, C) or (N, C, *spatial): r is taken of every entry. A class drawn twice holds the
              whole share there, and a floor from label smoothing is rescaled too, so give it labels without smoothing.
        xi: share from which a class counts as fully present, in (0, 1].
        t: exponent, at least 0.
        weight: (C,) factor of each class.
        reduction: "mean" over the rows (pixels) of the sum over the classes, "sum", or "none".

    Returns:
        Scalar, or (N, *spatial) for "none". The sum over the classes is C times what the mean of
        `torch.nn.functional.binary_cross_entropy_with_logits` gives. NaN logits give NaN. Second derivatives are
        supported.

    Raises:
        TypeError: float (regression) labels, integer logits, another kind of target.
        ValueError: sizes or devices disagree, an empty batch, a class out of range (on the CPU; a GPU isn't waited
            for: there the loss is NaN, or the device asserts), xi outside (0, 1], a negative t.

    Reference: Liu et al. 2023, DM(BCE) (arXiv:2203.10761). The paper speaks of an eta shared by both forms, but no BCE
    formula contains it, so there is none here. Its settings for ImageNet: xi = 0.8, t = 1 for cutting policies and
    xi = 1, t = 0.5 for blending ones.

    >>> from hardmix.mixing import MixedTarget
    >>> target = MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]]))
    >>> round(decoupled_mixup_bce_loss(torch.tensor([[2.0, 1.0, 0.5, -1.0]]), target, xi=1.0, t=0.5).item(), 4)
    2.7954
    """
    return _bce("decoupled_mixup_bce_loss", logits, target, xi, t, weight, reduction)


def soft_bce_loss(
    logits: Tensor, target: MixedTarget | Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Binary cross entropy of mixed labels, summed over the classes.

        l = -sum_c [y_c log sigmoid(z_c) + (1 - y_c) log sigmoid(-z_c)],   y = min(1, sum_k w_k onehot(y_k))

    `decoupled_mixup_bce_loss` with xi = t = 1; shapes, targets, edges and errors are described there. Reference:
    Wightman et al. 2021 train mixed labels this way (arXiv:2110.00476).

    >>> round(soft_bce_loss(torch.zeros(2, 3), torch.tensor([0, 2])).item(), 4)   # three times log 2
    2.0794
    """
    return _bce("soft_bce_loss", logits, target, 1.0, 1.0, weight, reduction)


class DecoupledMixupBCELoss(nn.Module):
    """`decoupled_mixup_bce_loss` with its settings remembered. `weight` is a buffer; nothing is learnt."""

    weight: Tensor | None

    def __init__(
        self, *, xi: float = 1.0, t: float = 1.0, weight: Tensor | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        _check_settings(type(self).__name__, xi, t, weight, reduction)
        self.xi = xi
        self.t = t
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"xi={self.xi:g}, t={self.t:g}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, target: MixedTarget | Tensor) -> Tensor:
        """The loss of `logits` (N, C, *spatial) for `target`; see `decoupled_mixup_bce_loss`."""
        return decoupled_mixup_bce_loss(
            logits, target, xi=self.xi, t=self.t, weight=self.weight, reduction=self.reduction
        )


class SoftBCELoss(nn.Module):
    """`soft_bce_loss` with its settings remembered. `weight` is a buffer; nothing is learnt."""

    weight: Tensor | None

    def __init__(self, *, weight: Tensor | None = None, reduction: str = "mean") -> None:
        super().__init__()
        _check_settings(type(self).__name__, 1.0, 1.0, weight, reduction)
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"

    def forward(self, logits: Tensor, target: MixedTarget | Tensor) -> Tensor:
        """The loss of `logits` (N, C, *spatial) for `target`; see `soft_bce_loss`."""
        return soft_bce_loss(logits, target, weight=self.weight, reduction=self.reduction)


def _check_settings(who: str, xi: float, t: float, weight: Tensor | None, reduction: str) -> None:
    _check.between(who, "xi", _check.positive(who, "xi", xi), 0.0, 1.0)
    _check.non_negative(who, "t", t)
    check_options(who, weight=weight, reduction=reduction)


def _bce(
    who: str,
    logits: Tensor,
    target: MixedTarget | Tensor,
    xi: float,
    t: float,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    _check_settings(who, xi, t, weight, reduction)
    logits = check_logits(who, logits, weight, min_classes=1)
    if isinstance(target, MixedTarget):
        labels, weights = mixed_parts(who, logits, target)
        wanted = _rescale(weights, xi, t)
        if labels.ndim == logits.ndim + 1:
            dense = (labels * wanted[..., None]).sum(1).clamp(max=1.0)
            return _math.reduce(mixed_bce(logits, dense, weight=weight), reduction)
    else:
        y = plain_target(who, logits, target)
        if y.is_floating_point():
            return _math.reduce(mixed_bce(logits, _rescale(y, xi, t).clamp(max=1.0), weight=weight), reduction)
        labels = y[:, None]
        wanted = torch.ones_like(labels, dtype=_math.wide(logits.dtype))
    _check.classes_in_range(who, "target", labels, logits.shape[1])
    same = labels[:, :, None] == labels[:, None]  # (N, K, K, *spatial)
    wanted = (same * wanted[:, None]).sum(2).clamp(max=1.0)  # one class, one target, however often it is listed
    return _math.reduce(mixed_bce(logits, wanted, labels, weight), reduction)


def _rescale(share: Tensor, xi: float, t: float) -> Tensor:
    """r(w) = 1 if w >= xi, else (w / xi)^t, and 0 at 0 whatever t is."""
    if xi != 1.0:
        share = (share / xi).clamp(max=1.0)
    if t == 1.0:
        return share
    # 1 under the power keeps the infinite slope of t < 1 at 0 out of a learnt share's gradient.
    return torch.where(share == 0.0, 0.0, torch.where(share == 0.0, 1.0, share) ** t)
