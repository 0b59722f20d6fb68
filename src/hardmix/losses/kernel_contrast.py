"""Kernel contrast: every other row is a positive, by as much as a kernel of the label distance says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import first_only, is_transformed, unit
from hardmix.losses._rows import labelled_rows, reduce_anchors

#: what is in the denominator
KINDS = ("y-aware", "exp", "threshold")
#: label distances in units of the bandwidth beyond this count as this, so that their squares are numbers
FARTHEST = 1e150
#: log K of the label distance in units of the bandwidth; 0 at 0, and falling
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda d: d.square() / -2.0,
    "cauchy": lambda d: -d.square().log1p(),
}
REDUCTIONS = ("none", "mean", "sum")


def kernel_contrast_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    kind: str = "y-aware",
    bandwidth: float = 1.0,
    kernel: str = "gaussian",
    temperature: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Contrast for numbers: how much a row is pulled, and in two of three kinds pushed, follows from its label.

        l_i = -sum_{j != i} K_ij / (sum_{k != i} K_ik) log( exp(s_ij) / D_ij ),     s = cosine / temperature

        "y-aware"     D_ij = sum_{k != i} exp(s_ik)                              everything is pushed alike
        "exp"         D_ij = sum_{k != i} exp(s_ik (1 - K_ik))                   equal labels are not pushed
        "threshold"   D_ij = sum_{k != i, K_ik < K_ij} exp(s_ik)                 only what is farther by label than j

        K_ij = exp(-d^2 / 2) "gaussian",     1 / (1 + d^2) "cauchy",     d = |y_i - y_j| / bandwidth

    In "threshold" the set is empty for the farthest rows; D_ij is exp(s_ij) there, so that they neither pull nor push,
    while K_ij still counts in the sum of the weights. Its cost is a sort of each row, M^2 log M for M = N V rows.

    Args:
        embeddings: (N, D), or (N, V, D) with V views of each sample, which count as rows of their own. Any float dtype
            and length; rows are normalised, and sums are done in float32 or wider.
        labels: (N,) numbers, integers or floats. They are read on the host, where a GPU is waited for.
        kind: "y-aware", "exp" or "threshold".
        bandwidth: unit of d, in that of the labels.
        kernel: "gaussian" or "cauchy".
        temperature: what cosines are divided by.
        reduction: "mean", "sum", or "none".

    Returns:
        Scalar; for "none" (N,), or (N, V). "exp" and "threshold" can be below 0. The weights of an anchor sum to 1
        however far all others are: where every K_ij is tiny the nearest labels have it all, but a d above 1e150 counts
        as 1e150. All labels equal: "y-aware" is supervised contrast, "exp" is log(M - 1) - mean s_ij, "threshold" 0.
        N = 1 with one view: 0, with a gradient of zeros. Rows of zeros have cosine 0 with all. NaN gives NaN.
        "threshold" has first derivatives only.

    Raises:
        TypeError: integer embeddings, a setting of another kind.
        ValueError: shapes or devices disagree, an empty batch, labels that are not finite, a setting out of its range.

    Reference: Barbano et al. 2023, "Contrastive learning for regression in multi-site brain age prediction"
    (arXiv:2211.08326), "exp" with a bandwidth of 2 years; "y-aware" is Dufumier et al. 2021 (arXiv:2106.08808). The
    authors' code subtracts the largest s_ik of a row before it multiplies by 1 - K_ik, which changes "exp"; its
    "threshold" has one denominator per anchor, in which exp(s_ik) counts as often as a row c has K_kc < K_ik. Its
    "rbf" is the Gaussian here, its "gaussian" has another factor, and its Cauchy kernel takes 1 / bandwidth^2.

    >>> import torch
    >>> y = torch.tensor([1.0, 1.0, 1.0])
    >>> round(kernel_contrast_loss(torch.eye(3), y).item(), 4)   # two equal cosines: log 2
    0.6931
    """
    who = "kernel_contrast_loss"
    _check_options(who, kind, bandwidth, kernel, temperature, reduction)
    x = labelled_rows(who, embeddings, labels)
    rows, device = len(x.z), x.z.device
    valid = torch.ones(rows, dtype=torch.bool, device=device)
    if rows == 1:
        return reduce_anchors((x.z * 0.0).sum(1), valid, x.shape, reduction)
    y = x.labels.to(device)
    own = torch.eye(rows, dtype=torch.bool, device=device)
    with torch.autocast(device.type, enabled=False):
        z = unit(x.z)
        s = z @ z.T / temperature
        distance = (y[:, None] - y).abs()  # in float64, since labels may be large and close
        log_k = KERNELS[kernel]((distance / bandwidth).clamp(max=FARTHEST))
        # K over its sum is a softmax of log K, which is a number where all of K underflow.
        share = log_k.masked_fill(own, -torch.inf).softmax(1).to(z.dtype)
        if kind == "threshold":
            total = _log_sum_of_farther(s, distance, own)
        else:
            terms = s * -log_k.expm1().to(z.dtype) if kind == "exp" else s
            total = terms.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
        loss = (share * (total - s)).sum(1)
    return reduce_anchors(loss, valid, x.shape, reduction)


class KernelContrastLoss(nn.Module):
    """`kernel_contrast_loss` with its settings remembered. Nothing is learnt.

    >>> import torch
    >>> KernelContrastLoss(kind="exp", bandwidth=2.0)(torch.randn(16, 2, 8), torch.arange(16.0)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        kind: str = "y-aware",
        bandwidth: float = 1.0,
        kernel: str = "gaussian",
        temperature: float = 0.1,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options(type(self).__name__, kind, bandwidth, kernel, temperature, reduction)
        self.kind = kind
        self.bandwidth = bandwidth
        self.kernel = kernel
        self.temperature = temperature
        self.reduction = reduction

    def extra_repr(self) -> str:
        parts = f"kind={self.kind!r}, bandwidth={self.bandwidth:g}, kernel={self.kernel!r}"
        return f"{parts}, temperature={self.temperature:g}"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) or (N, V, D) with labels (N,); see `kernel_contrast_loss`."""
        return kernel_contrast_loss(
            embeddings,
            labels,
            kind=self.kind,
            bandwidth=self.bandwidth,
            kernel=self.kernel,
            temperature=self.temperature,
            reduction=self.reduction,
        )


def _check_options(who: str, kind: str, bandwidth: float, kernel: str, temperature: float, reduction: str) -> None:
    _check.choice(who, "kind", kind, KINDS)
    _check.positive(who, "bandwidth", bandwidth)
    _check.choice(who, "kernel", kernel, KERNELS)
    _check.positive(who, "temperature", temperature)
    _check.choice(who, "reduction", reduction, REDUCTIONS)


def _log_sum_of_farther(s: Tensor, distance: Tensor, own: Tensor) -> Tensor:
    """log sum exp(s_ik) over the k with a larger distance than j, (M, M); s_ij where there are none.

    A kernel falls with the distance, so distances are compared, which do not underflow.
    """
    key = (-distance).masked_fill(own, 1.0)  # ascending: the farthest first, itself last
    ascending, order = key.sort(1)
    once = s if is_transformed() else _Once.apply(s)
    running = once.gather(1, order).logcumsumexp(1)
    farther = torch.searchsorted(ascending, key)
    return torch.where(farther > 0, running.gather(1, (farther - 1).clamp_(min=0)), s)


class _Once(torch.autograd.Function):
    """The values as they are. What torch has as the second derivative of logcumsumexp is NaN, which this refuses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.view_as(values)

    @staticmethod
    @first_only('kernel_contrast_loss: kind="threshold" has first derivatives only; leave out a penalty on gradients.')
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
