"""Smoothed label densities: weights for rare labels (LDS), and features calibrated to those of near labels (FDS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check, _math

KERNELS = ("gaussian", "triangular", "laplace")
SCHEMES = ("inverse", "sqrt_inverse")
#: counts that "inverse" is bounded by: a label seen once is not weighted 1,000 times one seen 1,000 times
COUNTS = (5.0, 1000.0)
MAX_BINS = 10_000_000


def lds_weights(
    labels: Tensor,
    *,
    bins: int = 100,
    bin_width: float | None = None,
    kernel: str = "gaussian",
    kernel_size: int = 5,
    sigma: float = 2.0,
    scheme: str = "inverse",
) -> Tensor:
    """Label-distribution smoothing: weight a sample by one over how frequent labels like its own are.

        w_i = c / sum_d k(d) h(b_i + d),    h(b) = clip(n_b, 5, 1000) for "inverse",  sqrt(n_b) for "sqrt_inverse"

    n_b counts the labels of bin b, also of the empty bins between the smallest and the largest label; beyond them h is
    0. The constant c makes the mean weight 1. A kernel of size 1 is inverse frequency without smoothing.

    Args:
        labels: (N,) finite numbers, all of the training set. They are read on the host, where a GPU is waited for.
        bins: number of equal bins from the smallest label to the largest.
        bin_width: instead of `bins`, bins of this width of which one starts at 0, such as 1 for ages. A label that
            rounding puts just below an edge counts as on it.
        kernel: k(d), d in bins: "gaussian" exp(-d^2 / 2 sigma^2), "laplace" exp(-|d| / sigma), or "triangular"
            1 - |d| / (half + 1) with half = (kernel_size - 1) / 2; 0 for |d| > half.
        kernel_size: number of bins the kernel covers, odd.
        sigma: width of the kernel in bins; "triangular" has none.
        scheme: "inverse" or "sqrt_inverse". With fewer than 5 labels in every bin "inverse" tells none apart.

    Returns:
        (N,) weights on the device of the labels, in float32, or float64 for float64 labels. All labels equal, or
        N = 1: ones.

    Raises:
        TypeError: labels that are not a tensor of numbers, a setting of another kind.
        ValueError: labels that are not (N,), empty or not finite; an even kernel size, another setting out of its
            range, or a bin width that makes more than ten million bins.

    Reference: Yang et al. 2021, "Delving into Deep Imbalanced Regression" (arXiv:2102.09554). As in the authors' code
    the root and the clip come before smoothing. Their "gaussian" window is an impulse filtered within 5 bins, with its
    tails folded back: 1, 0.95, 0.86 where sigma 2 is 1, 0.88, 0.61; `sigma=3.3` is about theirs.

    >>> import torch
    >>> weights = lds_weights(torch.tensor([1, 1, 1, 2]), bin_width=1, kernel_size=1, scheme="sqrt_inverse")
    >>> [round(w, 4) for w in weights.tolist()]
    [0.8453, 0.8453, 0.8453, 1.4641]
    """
    who = "lds_weights"
    _check.integer(who, "bins", bins, 1)
    _check.choice(who, "scheme", scheme, SCHEMES)
    window = _kernel_window(who, kernel, kernel_size, sigma)
    if bin_width is not None:
        _check.positive(who, "bin_width", bin_width)
    y = host_labels(who, labels)
    low, high = (float(v) for v in torch.aminmax(y))
    if high == low:
        place, bins = torch.zeros_like(y), 1
    elif bin_width is None:
        place = _bins(y, low, bins / (high - low), labels.dtype).clamp(0, bins - 1)
    else:
        if (high - low) / bin_width > MAX_BINS:
            raise ValueError(
                f"{who}: bin_width is {bin_width!r} but labels go from {low:g} to {high:g}, which is more than "
                f"{MAX_BINS} bins; pass a wider one."
            )
        place = _bins(y, 0.0, 1.0 / bin_width, labels.dtype)
        place = place - place.min()
        bins = int(place.max()) + 1
    index = place.long()
    count = torch.bincount(index, minlength=bins).double()
    height = count.clamp(*COUNTS) if scheme == "inverse" else count.sqrt()
    density = nn.functional.conv1d(height[None, None], window[None, None], padding=len(window) // 2)[0, 0]
    weights = 1.0 / density[index]
    return (weights / weights.mean()).to(labels.device, _math.wide(labels.dtype))


class FeatureSmoothing(nn.Module):
    """Feature-distribution smoothing: give features the mean and variance that those of near labels have.

        z' = (z - mu_b) sqrt( clip(v'_b / v_b, 0.1, 10) ) + mu'_b,     mu'_b = sum_d k(d) mu_{b+d},  v'_b likewise

    b is the bin of the sample's label; mu and v are the mean and variance of each feature over the samples of a bin,
    averaged over epochs. It stands between encoder and head: `head(smoothing(encoder(x), y))`, and once an epoch
    `smoothing.update(features, labels)` with those of the training set as the encoder makes them, before smoothing.

    Only in training mode; in evaluation features pass as they are, without labels. They also pass as they are before
    the first `update`, where their label's bin has had no sample in any update, and, one by one, where the variance is
    0 (a bin of one sample). Smoothing goes over bins that have had samples, with the kernel's weights rescaled to sum
    to one, and reflects at both ends. A bin that has no sample in an update keeps what it has; its first samples are
    taken as they are, later ones with `1 - momentum`.

    Args:
        num_features: D.
        label_range: labels from which to which the bins lie; labels outside go to the first or last bin. For whole
            years up to 120: (0, 121) with 121 bins.
        bins: number of equal bins B.
        kernel, kernel_size, sigma: k(d) as in `lds_weights`, here made to sum to one.
        momentum: share of the past in an update, from 0 to 1.

    Everything tracked is a buffer: running_mean, running_var, smoothed_mean, smoothed_var (B, D), num_tracked (B,).
    Processes do not exchange theirs: update each with the features of all.

    Reference: Yang et al. 2021 (arXiv:2102.09554). The authors' code needs CUDA, writes into the features, starts a bin
    that comes late from mean 0 and variance 1, smooths over bins never seen as if they had these, and combines mu and v
    of the last update with mu' and v' of the one before; their wider window is told at `lds_weights`.

    >>> import torch
    >>> smoothing = FeatureSmoothing(1, label_range=(0, 2), bins=2, kernel_size=3, sigma=1e6)
    >>> smoothing.update(torch.tensor([[0.0], [2.0], [6.0], [8.0]]), torch.tensor([0, 0, 1, 1]))
    >>> smoothing(torch.tensor([[2.0]]), torch.tensor([0])).item()   # mean 1 becomes that of 1, 7 and the reflected 7
    6.0
    """

    running_mean: Tensor
    running_var: Tensor
    smoothed_mean: Tensor
    smoothed_var: Tensor
    num_tracked: Tensor
    window: Tensor
    neighbours: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        label_range: tuple[float, float],
        bins: int = 100,
        kernel: str = "gaussian",
        kernel_size: int = 5,
        sigma: float = 2.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.num_features = _check.integer(who, "num_features", num_features, 1)
        self.bins = _check.integer(who, "bins", bins, 1)
        self.momentum = _check.between(who, "momentum", momentum, 0.0, 1.0)
        limit = torch.finfo(torch.float32).max
        low, high = self.label_range = _check.interval(who, "label_range", label_range, -limit, limit)
        if low == high:
            raise ValueError(f"{who}: label_range is {label_range!r}; pass two different numbers.")
        window = _kernel_window(who, kernel, kernel_size, sigma)
        for name in ("running_mean", "running_var", "smoothed_mean", "smoothed_var"):
            self.register_buffer(name, torch.zeros(bins, num_features))
        self.register_buffer("num_tracked", torch.zeros(bins, dtype=torch.long))
        # These follow from the settings, so they are not saved.
        half, period = len(window) // 2, max(2 * (bins - 1), 1)
        near = (torch.arange(bins)[:, None] + torch.arange(-half, half + 1)) % period  # (B, kernel_size)
        near = torch.where(near >= bins, period - near, near).clamp(max=bins - 1)
        self.register_buffer("neighbours", near, persistent=False)
        self.register_buffer("window", (window / window.sum()).to(near.device, torch.float32), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.num_features}, label_range={self.label_range}, bins={self.bins}, momentum={self.momentum:g}"

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take the features (N, D) of an epoch with labels (N,) into the running statistics, and smooth these anew.

        Not finite values are refused, for which a GPU is waited for. The variance is that of a sample, over n - 1.
        """
        who = f"{type(self).__name__}.update"
        x = self._features(who, features)
        index = self._index(who, labels, x)
        # Once an epoch: worth a look on any device, since a NaN would stay.
        _check.finite(who, "features", features.cpu())
        _check.finite(who, "labels", labels.cpu()[:, None])
        tally = torch.zeros_like(self.num_tracked).index_add_(0, index, torch.ones_like(index))
        count = tally.to(x.dtype)
        mean = x.new_zeros(self.bins, x.shape[1]).index_add_(0, index, x) / count.clamp(min=1)[:, None]
        var = (
            torch.zeros_like(mean).index_add_(0, index, (x - mean[index]).square()) / (count - 1).clamp(min=1)[:, None]
        )
        past = torch.where(self.num_tracked > 0, self.momentum, 0.0).to(x.dtype)
        past = torch.where(count > 0, past, 1.0)[:, None]  # (B, 1)
        self.running_mean.copy_(past * self.running_mean + (1 - past) * mean)
        self.running_var.copy_(past * self.running_var + (1 - past) * var)
        self.num_tracked += tally
        share = self.window * (self.num_tracked > 0)[self.neighbours]  # (B, kernel_size)
        share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        self.smoothed_mean.copy_((share[..., None] * self.running_mean[self.neighbours]).sum(1))
        self.smoothed_var.copy_((share[..., None] * self.running_var[self.neighbours]).sum(1))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features (N, D), calibrated in training mode, where labels (N,) are needed; same dtype, never written into.

        Computed in float32 or wider. The gradient goes through features, the statistics are constants.
        """
        who = type(self).__name__
        x = self._features(who, features)
        if not self.training:
            return features
        if labels is None:
            raise ValueError(f"{who}: labels is None in training mode; pass (N,) labels, or call eval().")
        index = self._index(who, labels, x)
        mean, var = self.running_mean[index], self.running_var[index]
        known = (self.num_tracked[index] > 0)[:, None] & (var > 0)
        # A variance of 0 is kept out of the quotient too: 0 / 0 would make the gradient NaN.
        ratio = (self.smoothed_var[index] / torch.where(known, var, 1.0)).clamp(0.1, 10.0)
        moved = (x - mean) * ratio.sqrt() + self.smoothed_mean[index]
        return torch.where(known, moved, x).to(features.dtype)

    def _features(self, who: str, features: Tensor) -> Tensor:
        x = _check.batch(who, "features", features, 2, 2)
        if not x.is_floating_point():
            raise TypeError(f"{who}: features has dtype {x.dtype}; pass floating-point features.")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{who}: features has {x.shape[1]} columns; pass (N, {self.num_features}), as it was made for."
            )
        _check.same_device(who, "features", x, "the module", self.running_mean.device)
        return x.to(_math.wide(x.dtype))

    def _index(self, who: str, labels: Tensor, x: Tensor) -> Tensor:
        """The bin (N,) of every label. NaN goes to the first."""
        y = _check.batch(who, "labels", labels, 1, 1)
        _check.same_length(who, "labels", y, "features", len(x))
        _check.same_device(who, "labels", y, "features", x.device)
        low, high = self.label_range
        place = _bins(y, low, self.bins / (high - low), y.dtype)
        return place.clamp(0, self.bins - 1).nan_to_num(0.0).long()


def host_labels(who: str, labels: Tensor) -> Tensor:
    """The labels (N,) of a training set in float64 on the CPU, finite."""
    y = _check.batch(who, "labels", labels, 1, 1).detach().to("cpu", torch.float64)
    _check.finite(who, "labels", y[:, None])
    return y


def _kernel_window(who: str, kernel: str, kernel_size: int, sigma: float) -> Tensor:
    """(kernel_size,) float64 with 1 in the middle."""
    _check.choice(who, "kernel", kernel, KERNELS)
    _check.integer(who, "kernel_size", kernel_size, 1)
    _check.positive(who, "sigma", sigma)
    if kernel_size % 2 == 0:
        raise ValueError(f"{who}: kernel_size is {kernel_size}; pass an odd number, so that it has a middle.")
    half = kernel_size // 2
    distance = torch.arange(-half, half + 1, dtype=torch.float64, device=_math.CPU).abs()
    if kernel == "gaussian":
        return (-(distance / sigma).square() / 2).exp()
    return (-distance / sigma).exp() if kernel == "laplace" else 1 - distance / (half + 1)


def _bins(labels: Tensor, low: float, per_unit: float, dtype: torch.dtype) -> Tensor:
    """floor((labels - low) per_unit), but a label that its rounding in `dtype` puts just below an edge is on it:
    0.3 / 0.1 is 2.9999999999999996."""
    y = labels.to(torch.float32 if labels.device.type == "mps" else torch.float64)  # Apple's has no float64
    place = (y - low) * per_unit
    # Half a last digit, by which the label was rounded to its dtype, and three times that of the arithmetic here.
    own = torch.finfo(dtype).eps / 2 * y.abs() if dtype.is_floating_point else 0.0
    slack = (own + 1.5 * torch.finfo(y.dtype).eps * (y.abs() + abs(low))) * per_unit
    nearest = place.round()
    # A dtype that is as coarse as the bins does not say on which side of an edge a label was.
    return torch.where((place - nearest).abs() <= slack.clamp(max=0.2), nearest, place.floor())
