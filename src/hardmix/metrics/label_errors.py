"""Where along the label are the errors, how dense was the training data there, and what do the features look like?

Values are read (a device is waited for) and summed in float64 on the CPU, since not every device has float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import CPU
from hardmix.metrics.regression import _numbers, shot_metrics

#: Bins of labels without a grid, 0.1 for scores from 0 to 5, and the most labels that a grid may have, such as ages.
BINS, MAX_LEVELS = 50, 200
#: Bins are at least so wide that they hold this many training samples on average: fewer, and chance makes the groups.
MIN_MEAN = 40
#: The bounds of "few" and "many" in mean counts per bin.
FEW, MANY = 1 / 6, 5 / 6


class ShotBins(NamedTuple):
    """The bins that training labels are counted in, and the counts that bound the three groups.

    Attributes:
        start: lower edge of the first bin.
        width: of every bin, in the unit of the labels.
        many, few: more than `many` training samples in its bin make a label frequent, fewer than `few` rare.
    """

    start: float
    width: float
    many: int
    few: int


def error_by_label(predictions: Tensor, labels: Tensor, train_labels: Tensor, *, bins: int = 12) -> dict[str, Any]:
    """Errors in bins of the label, and how many samples each bin has.

        mae_b = mean_{i in b} |p_i - y_i|    bias_b = mean_{i in b} (p_i - y_i)    b = {i: edge_b <= y_i < edge_{b+1}}

    Bins are equally wide and cover the labels of both splits; the highest label is in the last bin.

    Args:
        predictions: (N,) numbers for test samples.
        labels: (N,) their labels.
        train_labels: (M,) labels of the training split.
        bins: B, how many.

    Returns:
        dict of lists for JSON: "edges" (B + 1), "mae" and "bias" (B; None where no test sample falls), in the unit of
        the labels, and the counts "test" and "train" (B). One test sample gives one bin with an error. If all labels
        of both splits are the same c, the bins go from c - |c| / 2 to c + |c| / 2, or from -1/2 to 1/2 for c = 0.

    Raises:
        ValueError: sizes disagree, nothing in one of them, NaN or infinity.

    >>> found = error_by_label(torch.tensor([1.0, 9.0]), torch.tensor([0.0, 10.0]), torch.tensor([0.0, 4.0]), bins=3)
    >>> found["mae"], found["bias"], found["train"]
    ([1.0, None, 1.0], [1.0, None, -1.0], [1, 1, 0])
    """
    who = "error_by_label"
    bins = _check.integer(who, "bins", bins, 1)
    p, y = _numbers(who, "predictions", predictions), _numbers(who, "labels", labels)
    _check.same_length(who, "labels", y, "predictions", len(p))
    train = _numbers(who, "train_labels", train_labels)
    low, high = (float(v) for v in torch.cat([y, train]).aminmax())
    if low == high:
        low, high = low - _size(low) / 2, high + _size(high) / 2
    step = torch.arange(bins + 1, dtype=torch.float64, device=CPU) / bins
    edges = low * (1 - step) + high * step  # both ends exact
    own, trained = (torch.bucketize(v, edges[1:-1], right=True) for v in (y, train))
    count = own.bincount(minlength=bins)
    absolute, signed = (own.bincount(weights=e, minlength=bins) / count for e in ((p - y).abs(), p - y))
    return {
        "edges": edges.tolist(),
        "mae": [value if n else None for value, n in zip(absolute.tolist(), count.tolist(), strict=True)],
        "bias": [value if n else None for value, n in zip(signed.tolist(), count.tolist(), strict=True)],
        "test": count.tolist(),
        "train": trained.bincount(minlength=bins).tolist(),
    }


def shot_bins(train_labels: Tensor, *, bin_width: float | None = None) -> ShotBins:
    """Bins and bounds for many-, medium- and few-shot errors that depend on neither unit nor size of a data set.

        few = max(1, round(m / 6))    many = max(few, round(5 m / 6))    m = M / bins from lowest to highest label

    Labels on an even grid of at most 200 values (ages, halves) get one bin a value, all others 50 bins over their
    range. Where that leaves fewer than 40 training samples a bin on average, bins are wider, in whole steps of the
    grid; there is one bin if M < 80 or all labels are the same (as wide as the label's size then, or 1 for 0).

    Args:
        train_labels: (M,) labels of the training split.
        bin_width: a width of one's own; bins are centred on the smallest label plus its multiples then.

    Raises:
        ValueError: no labels, NaN, infinity, or a range that float64 can't divide (beyond 1e300, below 1e-300).

    Reference: Yang et al. 2021, section 4 (arXiv:2102.09554), have bounds of 20 and 100 samples a bin whatever the data
    set has. The shares 1/6 and 5/6 are the same bounds for their AgeDB-DIR (12,208 samples, ages 0 to 101, so
    m = 119.7). For a larger set, such as IMDB-WIKI-DIR, ours are higher: pass `many=100, few=20` to `shot_errors`.

    >>> shot_bins(torch.arange(102).repeat(120)[:12_208])
    ShotBins(start=-0.5, width=1.0, many=100, few=20)
    """
    who = "shot_bins"
    return _shot_bins(who, _numbers(who, "train_labels", train_labels), bin_width)


def _shot_bins(who: str, train: Tensor, bin_width: float | None) -> ShotBins:
    low, high = (float(v) for v in train.aminmax())
    span = high - low
    if span and not 1e-300 < span < 1e300:
        raise ValueError(f"{who}: train_labels has a range of {span:g}; pass labels in a usual unit.")
    most = max(1, len(train) // MIN_MEAN)  # bins
    if bin_width is not None:
        width = _check.positive(who, "bin_width", bin_width)
        start = low - width / 2
    elif span == 0.0:
        width = _size(low)
        start = low - width / 2
    elif step := _grid(train):
        width = step * math.ceil((round(span / step) + 1) / most)
        start = low - step / 2  # edges between the grid's values, so that rounding moves none of them
    else:
        width = span / min(BINS, most) * (1 + 1e-9)  # keeps the highest label in the last bin
        start = low
    steps = (high - start) / width
    if not math.isfinite(steps):
        raise ValueError(f"{who}: bin_width is {width:g} but the labels' range is {span:g}; pass a larger width.")
    mean = len(train) / (math.floor(steps) + 1)
    few = max(1, round(FEW * mean))
    return ShotBins(start, width, max(few, round(MANY * mean)), few)


def shot_errors(
    predictions: Tensor,
    labels: Tensor,
    train_labels: Tensor,
    *,
    bin_width: float | None = None,
    many: int | None = None,
    few: int | None = None,
) -> dict[str, float]:
    """Mean absolute error where training labels were frequent, less so, and rare: `shot_metrics` for any data set.

        n_i = number of training labels in the bin of y_i
        many: n_i > many,    medium: few <= n_i <= many,    few: n_i < few (none at all included)

    Bins and bounds are those of `shot_bins` unless given. Each mean is over the test samples of its group. A test split
    with the labels' own distribution has few samples in the last group, a few per cent, so its error is the least
    certain.

    Args:
        predictions: (N,) numbers for test samples.
        labels: (N,) their labels.
        train_labels: (M,) labels of the training split.
        bin_width: width of the bins, in the unit of the labels; None for that of `shot_bins`.
        many, few: the two bounds; None for those of `shot_bins`, which follow a `bin_width` that is given.

    Returns:
        dict with mae_many, mae_medium and mae_few; NaN where no test sample falls.

    Raises:
        ValueError: sizes disagree, NaN or infinity, few > many.

    >>> train = torch.cat([torch.zeros(300), torch.ones(20), torch.full((100,), 2.0)])
    >>> shot_errors(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0.0, 1.0, 2.0]), train)  # bounds 117 and 23
    {'mae_many': 1.0, 'mae_medium': 5.0, 'mae_few': 2.0}
    """
    who = "shot_errors"
    p, y = _numbers(who, "predictions", predictions), _numbers(who, "labels", labels)
    _check.same_length(who, "labels", y, "predictions", len(p))
    train = _numbers(who, "train_labels", train_labels)
    found = _shot_bins(who, train, bin_width)
    upper = found.many if many is None else _check.integer(who, "many", many, 0)
    lower = found.few if few is None else _check.integer(who, "few", few, 0)
    if upper < lower:
        raise ValueError(f"{who}: many is {upper} but few is {lower}; pass few <= many.")
    # shot_metrics centres a bin on 0. The start goes first, which is exact: the lowest label may lie on its edge.
    p, y, train = (v - found.start - found.width / 2 for v in (p, y, train))
    return shot_metrics(p, y, train, bin_width=found.width, many=upper, few=lower)


def principal_components(features: Tensor, *, components: int = 2) -> tuple[Tensor, Tensor]:
    """Features in the few directions in which they vary most.

        X - mean X = U diag(s) V^T,    scores = U_k diag(s_k),    shares = s_k^2 / sum_j s_j^2

    The sign of a direction is free; its largest loading is made positive, the first one of several equally large ones.

    Args:
        features: (N, D); D may be larger than N.
        components: k; those beyond the rank of the centred features are 0.

    Returns:
        scores (N, k) and shares (k,) of the variance, both in float64 on the CPU. For N = 1, and for rows that are all
        the same, there is no variance and everything is 0.

    Raises:
        ValueError: no rows or columns, NaN or infinity.

    >>> scores, shares = principal_components(torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 8.0]]))
    >>> scores.round(decimals=4).tolist(), shares.tolist()
    ([[-3.0, 0.0], [-1.0, 0.0], [4.0, 0.0]], [1.0, 0.0])
    """
    who = "principal_components"
    components = _check.integer(who, "components", components, 1)
    x = _check.batch(who, "features", features, 2, 2).detach().cpu().double()
    _check.finite(who, "features", x)
    scores = x.new_zeros(len(x), components)
    shares = x.new_zeros(components)
    # Asked of the values: the rounded mean of equal values may leave a tiny deviation.
    x = x[:, x.amax(0) > x.amin(0)]
    if x.shape[1] == 0:
        return scores, shares
    # Squares of what is left neither overflow nor vanish; a power of two rounds nothing.
    scale = 2.0 ** math.floor(math.log2(float(x.abs().max())))
    x = x / scale
    u, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    s = torch.where(s > s[0] * max(x.shape) * torch.finfo(s.dtype).eps, s, 0.0)
    # Loadings that are equal but for rounding would leave the sign to chance.
    large = v.abs() >= v.abs().amax(1, keepdim=True) * (1 - 1e-6)
    sign = v.gather(1, large.int().argmax(1, keepdim=True))[:, 0].sign()
    kept = min(components, len(s), len(x) - 1)  # centred rows sum to 0; a rounded mean may make it look otherwise
    scores[:, :kept] = (u * s * sign)[:, :kept] * scale
    shares[:kept] = (s.square() / s.square().sum())[:kept]
    return scores, shares


def _grid(labels: Tensor) -> float:
    """The step of an even grid of at most MAX_LEVELS values that all labels, not all the same, lie on; 0 without one.

    Rounded labels count, such as tenths in float32.
    """
    levels = labels.unique()
    span = float(levels[-1] - levels[0])
    gaps = levels.diff()
    gaps = gaps[gaps > 1e-6 * span]
    count = round(span / float(gaps.min())) if len(gaps) else MAX_LEVELS
    place = (levels - levels[0]) / span * count
    return span / count if count < MAX_LEVELS and float((place - place.round()).abs().max()) < 1e-3 else 0.0


def _size(label: float) -> float:
    return abs(label) or 1.0
