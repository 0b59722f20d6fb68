"""Absolute, squared and Huber error: what a regression head is trained with by default, on plain or mixed labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check, _math
from hardmix.mixing.target import MixedTarget

KINDS = ("l1", "l2", "huber")
REDUCTIONS = ("mean", "sum", "none")


def regression_loss(
    predictions: Tensor,
    labels: Tensor | MixedTarget,
    *,
    kind: str = "l1",
    delta: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Error of predicted numbers.

        l1     |e|                                                          e = yhat - y,   y = sum_k w_k y_k if mixed
        l2     e^2
        huber  e^2 / 2 where |e| <= delta,   delta (|e| - delta / 2) beyond

    The values of `torch.nn.functional.l1_loss`, `mse_loss` and `huber_loss`, with weights, mixed labels, half types
    summed in float32, and no broadcasting: (N, 1) against (N,) is refused where those make N^2 errors of it.

    Args:
        predictions: (N,), or (N, P) with P numbers a sample. Half types are computed in float32, and the loss is
            float32.
        labels: numbers of the same shape, integers or floats; or a MixedTarget with float labels (N, K), or (N, K, P),
            and weights (N, K): the target is the weighted mean of the labels, as C-Mixup trains. (For l2 that is the
            mixture of the K losses but for a constant; for l1 and huber it is another loss: `MixedTarget.mixed_loss`.)
        kind: "l1", "l2" or "huber".
        delta: where "huber" turns from a square to a line, in the labels' own unit; the others ignore it.
        weight: (N,) factor of each sample, such as those of `lds_weights`.
        reduction: "mean" over all numbers, "sum", or "none". The mean divides by their count and not by the sum of the
            weights, so that a sample's weight does not depend on its batch.

    Returns:
        Scalar, or for "none" the shape of the predictions. The gradient of |e| at 0 is 0. NaN gives NaN; a square above
        3.4e38 is inf. Huber and l1 have no second derivative at their kinks.

    Raises:
        TypeError: integer predictions, boolean or complex labels, integer labels in a MixedTarget.
        ValueError: shapes or devices disagree, an empty batch, a setting out of its range.

    Reference: Yao et al. 2022, "C-Mixup" (arXiv:2210.05775) for mixed labels. The weighted Huber loss of Yang et al.'s
    code is divided by delta (torch's `smooth_l1_loss`); here, as in `huber_loss`, it is not.

    >>> import torch
    >>> from hardmix.mixing import MixedTarget
    >>> mixed = MixedTarget(torch.tensor([[10.0, 20.0]]), torch.tensor([[0.75, 0.25]]))   # 12.5
    >>> regression_loss(torch.tensor([12.0]), mixed, kind="l2").item()
    0.25
    """
    who = "regression_loss"
    _check_options(who, kind, delta, reduction)
    yhat, y = number_pair(who, predictions, labels)
    error = (yhat - y).abs()
    if kind == "l2":
        error = error.square()
    elif kind == "huber":
        # In one piece: a square in the branch not taken could overflow.
        near = error.clamp(max=delta)
        error = near * (error - near / 2)
    return reduce_weighted(who, error, weight, reduction)


class RegressionLoss(nn.Module):
    """`regression_loss` with its settings remembered. Nothing is learnt; weights are a sample's, so `forward` has them.

    >>> import torch
    >>> RegressionLoss(kind="huber")(torch.zeros(2), torch.tensor([0.5, 3.0])).item()
    1.3125
    """

    def __init__(self, *, kind: str = "l1", delta: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        _check_options(type(self).__name__, kind, delta, reduction)
        self.kind = kind
        self.delta = delta
        self.reduction = reduction

    def extra_repr(self) -> str:
        delta = f", delta={self.delta:g}" if self.kind == "huber" else ""
        return f"kind={self.kind!r}{delta}, reduction={self.reduction!r}"

    def forward(self, predictions: Tensor, labels: Tensor | MixedTarget, *, weight: Tensor | None = None) -> Tensor:
        """The loss of predictions (N,) or (N, P) for labels; see `regression_loss`."""
        return regression_loss(
            predictions, labels, kind=self.kind, delta=self.delta, weight=weight, reduction=self.reduction
        )


def number_pair(who: str, predictions: Tensor, labels: Tensor | MixedTarget) -> tuple[Tensor, Tensor]:
    """Predictions (N,) or (N, P) and labels of that very shape, checked, in float32 or wider; mixed labels averaged."""
    yhat = _check.batch(who, "predictions", predictions, 1, 2)
    if not yhat.is_floating_point():
        raise TypeError(f"{who}: predictions has dtype {yhat.dtype}; pass floating-point predictions.")
    dtype = _math.wide(yhat.dtype)
    if isinstance(labels, MixedTarget):
        y = _mixed_numbers(who, labels, yhat, dtype)
    else:
        y = _check.tensor(who, "labels", labels)
        if y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"{who}: labels has dtype {y.dtype}; pass integers or floats.")
        _check.same_length(who, "labels", y, "predictions", yhat.shape[0])
        _check.same_device(who, "labels", y, "predictions", yhat.device)
        y = y.to(dtype)
    if y.shape != yhat.shape:
        raise ValueError(
            f"{who}: labels has shape {tuple(y.shape)} but predictions has {tuple(yhat.shape)}; "
            f"pass both in one shape, for example {'predictions' if yhat.ndim > y.ndim else 'labels'}.squeeze(1)."
        )
    return yhat.to(dtype), y


def reduce_weighted(who: str, values: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Values (N,) or (N, P) times the samples' weights (N,), reduced over all."""
    if weight is not None:
        factor = _check.tensor(who, "weight", weight)
        _check.same_length(who, "weight", factor, "predictions", values.shape[0])
        _check.same_device(who, "weight", factor, "predictions", values.device)
        if factor.ndim != 1 or not factor.is_floating_point():
            raise ValueError(
                f"{who}: weight has shape {tuple(factor.shape)} and dtype {factor.dtype}; pass one float per sample, "
                "shape (N,)."
            )
        factor = factor.to(values.dtype)
        values = values * (factor if values.ndim == 1 else factor[:, None])
    return _math.reduce(values, reduction)


def _mixed_numbers(who: str, target: MixedTarget, yhat: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted mean (N,) or (N, P) of mixed labels."""
    labels = _check.tensor(who, "labels.labels", target.labels)
    weights = _check.tensor(who, "labels.weights", target.weights)
    for name, value in (("labels.labels", labels), ("labels.weights", weights)):
        _check.same_length(who, name, value, "predictions", yhat.shape[0])
        _check.same_device(who, name, value, "predictions", yhat.device)
        if not value.is_floating_point():
            raise TypeError(f"{who}: {name} has dtype {value.dtype}; pass floats, since class ids have no mean.")
    if labels.ndim not in (2, 3) or labels.shape[:2] != weights.shape:
        raise ValueError(
            f"{who}: labels.labels has shape {tuple(labels.shape)} and labels.weights {tuple(weights.shape)}; "
            "pass (N, K) or (N, K, P) labels and (N, K) weights."
        )
    shares = weights.to(dtype)
    return (labels.to(dtype) * (shares if labels.ndim == 2 else shares[..., None])).sum(1)


def _check_options(who: str, kind: str, delta: float, reduction: str) -> None:
    _check.choice(who, "kind", kind, KINDS)
    _check.positive(who, "delta", delta)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
