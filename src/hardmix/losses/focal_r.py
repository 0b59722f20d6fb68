"""Focal-R: an error scaled by a smooth step of itself, so that samples that are fitted already count less."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.losses.regression import REDUCTIONS, number_pair, reduce_weighted
from hardmix.mixing.target import MixedTarget

KINDS = ("l1", "l2")


def focal_r_loss(
    predictions: Tensor,
    labels: Tensor | MixedTarget,
    *,
    beta: float = 0.2,
    gamma: float = 1.0,
    kind: str = "l1",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Focal-R: the error times a focus that is 0 at no error and 1 far away.

        l = |e| (2 sigmoid(beta |e|) - 1)^gamma     for l1,        e^2 (2 sigmoid(beta |e|) - 1)^gamma     for l2

    The focus is computed as tanh(beta |e| / 2), which is the same and keeps its digits where |e| is small.

    Args:
        predictions: (N,), or (N, P) with P numbers a sample. Half types are computed in float32, and the loss is
            float32.
        labels: numbers of the same shape, or a MixedTarget, which stands for its mean; as in `regression_loss`.
        beta: how steep the focus is, per unit of the labels: it is 1/2 at |e| = 1.1 / beta. 0.2 suits ages.
        gamma: exponent of the focus, at least 0; 0 gives `regression_loss`.
        kind: "l1" or "l2".
        weight: (N,) factor of each sample, such as those of `lds_weights`.
        reduction: "mean" over all numbers, also with weights, "sum", or "none".

    Returns:
        Scalar, or for "none" the shape of the predictions. No error: 0, with a gradient of 0, whatever gamma. NaN gives
        NaN; a square above 3.4e38 is inf. The focus is part of the gradient, as in the authors' code.

    Raises:
        TypeError: integer predictions, boolean or complex labels, integer labels in a MixedTarget.
        ValueError: shapes or devices disagree, an empty batch, a setting out of its range.

    Reference: Yang et al. 2021, "Delving into Deep Imbalanced Regression" (arXiv:2102.09554). The authors' code also
    has a focus tanh(beta |e|): that is twice the beta here. Its gradient is NaN at no error for gamma below 1.

    >>> import torch
    >>> round(focal_r_loss(torch.tensor([5.0]), torch.tensor([0.0])).item(), 4)   # 5 tanh(1/2)
    2.3106
    """
    who = "focal_r_loss"
    _check_options(who, beta, gamma, kind, reduction)
    yhat, y = number_pair(who, predictions, labels)
    error = (yhat - y).abs()
    focus = torch.tanh(error * (beta / 2))
    if gamma != 1.0:
        # The slope of a power below 1 is infinite at 0; this way it meets the factor that cancels it first.
        focus = (gamma * focus.clamp(min=torch.finfo(focus.dtype).tiny).log()).exp()
    return reduce_weighted(who, (error if kind == "l1" else error.square()) * focus, weight, reduction)


class FocalRLoss(nn.Module):
    """`focal_r_loss` with its settings remembered. Nothing is learnt; weights are a sample's, so `forward` has them."""

    def __init__(self, *, beta: float = 0.2, gamma: float = 1.0, kind: str = "l1", reduction: str = "mean") -> None:
        super().__init__()
        _check_options(type(self).__name__, beta, gamma, kind, reduction)
        self.beta = beta
        self.gamma = gamma
        self.kind = kind
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, gamma={self.gamma:g}, kind={self.kind!r}, reduction={self.reduction!r}"

    def forward(self, predictions: Tensor, labels: Tensor | MixedTarget, *, weight: Tensor | None = None) -> Tensor:
        """The loss of predictions (N,) or (N, P) for labels; see `focal_r_loss`."""
        return focal_r_loss(
            predictions,
            labels,
            beta=self.beta,
            gamma=self.gamma,
            kind=self.kind,
            weight=weight,
            reduction=self.reduction,
        )


def _check_options(who: str, beta: float, gamma: float, kind: str, reduction: str) -> None:
    _check.positive(who, "beta", beta)
    _check.non_negative(who, "gamma", gamma)
    _check.choice(who, "kind", kind, KINDS)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
