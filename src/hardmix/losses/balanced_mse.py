"""Balanced MSE: squared error for a test set whose labels are spread evenly, trained on labels that are not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check, _math
from hardmix.losses.label_density import host_labels
from hardmix.losses.regression import REDUCTIONS, number_pair
from hardmix.mixing.target import MixedTarget

KINDS = ("bmc", "gai")
#: smallest variance of a component, as a share of the labels' own: a component on one repeated label has none
MIN_VARIANCE = 1e-6


class LabelMixture(NamedTuple):
    """A Gaussian mixture of the training labels: weights (K,) that sum to one, means (K,) and variances (K,)."""

    weights: Tensor
    means: Tensor
    variances: Tensor


def bmc_loss(
    predictions: Tensor, labels: Tensor | MixedTarget, *, noise_sigma: Tensor | float, reduction: str = "mean"
) -> Tensor:
    """Balanced MSE from the batch (BMC): which label of the batch is the prediction closest to?

        l_i = -2 s^2 log( exp(-|yhat_i - y_i|^2 / 2 s^2) / sum_j exp(-|yhat_i - y_j|^2 / 2 s^2) )

    The cross entropy of the N labels as classes, in the unit of a squared error. Exponents are formed as differences
    from that of the row's own label, g (2 e - g) / 2 s^2 with g = y_j - y_i and e = yhat_i - y_i, which keeps the
    digits of rows that are far from all labels.

    Args:
        predictions: (N,), or (N, P) with P numbers a sample and their noise alike. Half types are computed in float32,
            and the loss is float32.
        labels: numbers of the same shape, or a MixedTarget, which stands for its mean; as in `regression_loss`.
        noise_sigma: s, standard deviation of what is not predictable, in the labels' own unit; a positive number, or a
            tensor with one element, whose value is not looked at. Its gradient comes from the cross entropy alone: the
            factor 2 s^2 counts as a constant.
        reduction: "mean" over the samples, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none". N = 1: 0, with a gradient of zeros. All labels equal: 2 s^2 log N, and again no
        gradient, since no label is preferred. Memory grows with N^2 P. Processes do not exchange their labels.

    Raises:
        TypeError: integer predictions, boolean or complex labels, a `noise_sigma` that is no number.
        ValueError: shapes or devices disagree, an empty batch, a setting out of its range.

    Reference: Ren et al. 2022, "Balanced MSE for Imbalanced Visual Regression" (arXiv:2203.16427). The authors' code
    learns s itself, which may cross 0; `BalancedMSELoss` learns its logarithm.

    >>> import torch
    >>> y = torch.tensor([0.0, 2.0])
    >>> round(bmc_loss(y, y, noise_sigma=1.0).item(), 4)   # 2 log(1 + exp(-2))
    0.2539
    """
    who = "bmc_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    yhat, y = number_pair(who, predictions, labels)
    sigma = _sigma(who, noise_sigma, yhat)
    error, y = ((yhat - y).reshape(len(y), 1, -1), y.reshape(len(y), -1))  # (N, 1, P), (N, P)
    gap = y - y[:, None]  # (N, N, P)
    logits = (gap / sigma * ((2 * error - gap) / sigma)).sum(2) / 2  # 0 for the own label
    loss = 2 * sigma.detach().square() * logits.logsumexp(1)
    return _math.reduce(loss, reduction)


def gai_loss(
    predictions: Tensor,
    labels: Tensor | MixedTarget,
    *,
    noise_sigma: Tensor | float,
    mixture: tuple[Tensor, Tensor, Tensor],
    reduction: str = "mean",
) -> Tensor:
    """Balanced MSE from the density of the training labels (GAI), a Gaussian mixture.

        l = 2 s^2 [ (yhat - y)^2 / 2 s^2 + log s
                    + log sum_k p_k exp(-(yhat - mu_k)^2 / 2 (v_k + s^2)) / sqrt(v_k + s^2) ]

    The last term is, but for a constant, the log density of a training label with its noise at the prediction:
    predictions are pushed away from where labels are frequent, which undoes the pull that squared error has there.

    Args:
        predictions: (N,) or (N, 1). Half types are computed in float32, and the loss is float32.
        labels: numbers of the same shape, or a MixedTarget, which stands for its mean; as in `regression_loss`.
        noise_sigma: s, as in `bmc_loss`.
        mixture: weights (K,), means (K,) and variances (K,) of the training labels, as `label_mixture` fits them.
        reduction: "mean" over the samples, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none"; it may be negative. N = 1 is as any other. A component of weight 0 does not count.

    Raises:
        TypeError: integer predictions, boolean or complex labels, a mixture that is not three tensors.
        ValueError: shapes or devices disagree, an empty batch, more than one number a sample.

    Reference: Ren et al. 2022 (arXiv:2203.16427). The authors' code has a form for several numbers a sample too.

    >>> import torch
    >>> mixture = label_mixture(torch.tensor([0.0, 2.0]), 1)   # mean 1, variance 1
    >>> round(gai_loss(torch.tensor([1.0]), torch.tensor([1.0]), noise_sigma=1.0, mixture=mixture).item(), 4)
    -0.6931
    """
    who = "gai_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    yhat, y = number_pair(who, predictions, labels)
    if yhat.ndim == 2 and yhat.shape[1] != 1:
        raise ValueError(
            f"{who}: predictions has shape {tuple(yhat.shape)}; pass one number per sample, (N,) or (N, 1)."
        )
    yhat, y = yhat.reshape(-1), y.reshape(-1)
    sigma = _sigma(who, noise_sigma, yhat)
    _check_mixture(who, mixture)
    for value in mixture:
        _check.same_device(who, "mixture", value, "predictions", yhat.device)
    weights, means, variances = (value.to(yhat.dtype) for value in mixture)
    spread = variances + sigma.square()
    # log s - log(v + s^2) / 2 in one piece: for a large s the two cancel.
    density = weights.log() - (variances / sigma.square()).log1p() / 2
    density = density - (yhat[:, None] - means).square() / (2 * spread)  # (N, K)
    loss = ((yhat - y) / sigma).square() / 2 + density.logsumexp(1)
    return _math.reduce(2 * sigma.detach().square() * loss, reduction)


class BalancedMSELoss(nn.Module):
    """`bmc_loss` or `gai_loss` with a noise that is learnt.

    The parameter is `log_sigma`, so that s stays positive; give it to the optimiser, without weight decay, which would
    pull s towards 1. For ages the authors start at 10. With `learn_sigma=False` s is a setting. The mixture is three
    buffers; only "gai" has one.

    >>> import torch
    >>> criterion = BalancedMSELoss(noise_sigma=10.0)
    >>> [name for name, _ in criterion.named_parameters()]
    ['log_sigma']
    """

    log_sigma: nn.Parameter | None
    mixture_weights: Tensor
    mixture_means: Tensor
    mixture_variances: Tensor

    def __init__(
        self,
        *,
        kind: str = "bmc",
        noise_sigma: float = 1.0,
        learn_sigma: bool = True,
        mixture: tuple[Tensor, Tensor, Tensor] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.kind = _check.choice(who, "kind", kind, KINDS)
        self.reduction = _check.choice(who, "reduction", reduction, REDUCTIONS)
        self.initial_sigma = _check.positive(who, "noise_sigma", noise_sigma)
        _check.boolean(who, "learn_sigma", learn_sigma)
        if (mixture is None) == (kind == "gai"):
            got = "None" if mixture is None else "given"
            instead = "what label_mixture fits to the training labels" if mixture is None else "it only with kind='gai'"
            raise ValueError(f"{who}: mixture is {got} but kind is {kind!r}; pass {instead}.")
        if mixture is not None:
            _check_mixture(who, mixture)
            _check_mixture_values(who, *mixture)
            for name, value in zip(LabelMixture._fields, mixture, strict=True):
                self.register_buffer(f"mixture_{name}", value.detach().clone())
        start = nn.Parameter(torch.tensor(math.log(noise_sigma), dtype=torch.float32)) if learn_sigma else None
        self.register_parameter("log_sigma", start)

    @property
    def noise_sigma(self) -> Tensor | float:
        """s: a tensor if it is learnt, in float32 or wider, else the number that was given."""
        if self.log_sigma is None:
            return self.initial_sigma
        return self.log_sigma.to(_math.wide(self.log_sigma.dtype)).exp()

    def extra_repr(self) -> str:
        learnt = self.log_sigma is not None
        return f"kind={self.kind!r}, noise_sigma={float(self.noise_sigma):g}, learn_sigma={learnt}"

    def forward(self, predictions: Tensor, labels: Tensor | MixedTarget) -> Tensor:
        """The loss of predictions (N,), for "bmc" also (N, P), for labels; see `bmc_loss` and `gai_loss`."""
        sigma = self.noise_sigma
        if self.kind == "bmc":
            return bmc_loss(predictions, labels, noise_sigma=sigma, reduction=self.reduction)
        mixture = LabelMixture(self.mixture_weights, self.mixture_means, self.mixture_variances)
        return gai_loss(predictions, labels, noise_sigma=sigma, mixture=mixture, reduction=self.reduction)


def label_mixture(
    labels: Tensor, components: int, *, max_iterations: int = 200, tolerance: float = 1e-5
) -> LabelMixture:
    """Fit the Gaussian mixture of the training labels that `gai_loss` needs, by expectation maximisation.

        r_ik ~ w_k N(y_i; mu_k, v_k),  sum_k r_ik = 1;    w_k = mean_i r_ik,   mu_k, v_k = mean and variance under r_ik

    It starts, without a draw, from equal weights, means at the (k + 1/2) / K quantiles of the distinct labels (so that
    two components never start at one frequent label) and variances of 1 / K^2 of that of the labels.

    Args:
        labels: (N,) finite numbers, integers or floats. They are read on the host, where a GPU is waited for, and the
            fit is done there in float64, over distinct labels with their counts.
        components: K, at most the number of labels. 1 gives their mean and variance (that of the set, over N).
        max_iterations: steps at most.
        tolerance: it stops when a step gains no more than this in the mean log likelihood.

    Returns:
        LabelMixture with ascending means, on the device of the labels, in float32, or float64 for float64 labels. No
        variance is below 1e-6 of that of the labels. All labels equal: K components there with variance 0.

    Raises:
        TypeError: labels that are not a tensor of numbers, a setting of another kind.
        ValueError: labels that are not (N,), empty or not finite; more components than labels.

    >>> import torch
    >>> [part.tolist() for part in label_mixture(torch.tensor([1, 2, 3, 6]), 1)]
    [[1.0], [3.0], [3.5]]
    """
    who = "label_mixture"
    _check.integer(who, "components", components, 1)
    _check.integer(who, "max_iterations", max_iterations, 1)
    _check.non_negative(who, "tolerance", tolerance)
    y = host_labels(who, labels)
    if components > len(y):
        raise ValueError(f"{who}: components is {components} but labels has {len(y)} entries; pass at most that many.")
    values, counts = y.unique(return_counts=True)  # ascending
    share = counts / y.new_tensor(len(y))
    center = (share * values).sum()
    scale = (share * (values - center).square()).sum().sqrt()
    x = (values - center) / torch.where(scale > 0, scale, 1.0)
    place = (torch.arange(components, dtype=torch.float64, device=_math.CPU) + 0.5) / components * (len(x) - 1)
    below = place.floor().long()
    means = torch.lerp(x[below], x[(below + 1).clamp(max=len(x) - 1)], place - below)
    weights = torch.full_like(means, 1 / components)
    variances = torch.full_like(means, 1 / components**2)
    last = -math.inf
    for _ in range(max_iterations):
        joint = (weights.log() - variances.log() / 2)[:, None] - (x - means[:, None]).square() / (
            2 * variances[:, None]
        )
        total = joint.logsumexp(0)
        owned = (joint - total).exp() * share  # (K, distinct labels)
        weights = owned.sum(1)
        mass = weights.clamp(min=torch.finfo(torch.float64).tiny)  # a component may lose every label
        means = owned @ x / mass
        variances = ((owned * (x - means[:, None]).square()).sum(1) / mass).clamp(min=MIN_VARIANCE)
        likelihood = float(total @ share)
        if likelihood - last <= tolerance:
            break
        last = likelihood
    order = means.argsort(stable=True)
    dtype = _math.wide(labels.dtype)
    found = (weights, means * scale + center, variances * scale.square())
    return LabelMixture(*(part[order].to(labels.device, dtype) for part in found))


def _sigma(who: str, noise_sigma: Tensor | float, like: Tensor) -> Tensor:
    """The noise as a tensor without axes, of the dtype and on the device of the predictions."""
    if not isinstance(noise_sigma, Tensor):
        return like.new_full((), _check.positive(who, "noise_sigma", noise_sigma))
    if noise_sigma.numel() != 1 or not noise_sigma.is_floating_point():
        raise ValueError(
            f"{who}: noise_sigma has shape {tuple(noise_sigma.shape)} and dtype {noise_sigma.dtype}; pass one float."
        )
    _check.same_device(who, "noise_sigma", noise_sigma, "predictions", like.device)
    return noise_sigma.to(like.dtype).reshape(())


def _check_mixture(who: str, mixture: object) -> None:
    if not isinstance(mixture, tuple) or len(mixture) != 3:
        raise TypeError(
            f"{who}: mixture is a {type(mixture).__name__}; pass a tuple of weights, means and variances, (K,) each."
        )
    for name, value in zip(LabelMixture._fields, mixture, strict=True):
        part = _check.tensor(who, f"mixture {name}", value)
        if part.ndim != 1 or part.numel() == 0 or part.shape != mixture[0].shape or not part.is_floating_point():
            raise ValueError(
                f"{who}: mixture {name} has shape {tuple(part.shape)} and dtype {part.dtype}; pass floats (K,), "
                "as many as weights."
            )


def _check_mixture_values(who: str, weights: Tensor, means: Tensor, variances: Tensor) -> None:
    """Once, when the module is made: here values may be read on any device."""
    if not bool((weights >= 0).all()) or not abs(float(weights.sum()) - 1.0) <= 1e-3:
        raise ValueError(f"{who}: mixture weights are {weights.tolist()}; pass shares that sum to one.")
    if not bool(means.isfinite().all()) or not bool(((variances >= 0) & variances.isfinite()).all()):
        raise ValueError(f"{who}: mixture holds a mean or variance that is not finite, or is below 0; fit it again.")
