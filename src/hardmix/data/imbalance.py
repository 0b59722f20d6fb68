"""The imbalanced setting: training labels that follow a stated law, tested on labels that are spread evenly.

Labels are counted in K bins of equal width from the smallest label to the largest,

    b_i = min( floor(K (y_i - min y) / (max y - min y)), K - 1 ),      n_b = number of rows in bin b,

and rows are drawn within a bin. A bin without rows stays empty, whatever the law says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.splits import _draw

LAWS = ("exponential", "step", "normal")
#: far beyond what any data set can show
MAX_RATIO = 1e6


def imbalanced_rows(labels: Tensor, *, law: str, ratio: float, seed: int, bins: int = 10, short: float = 0.0) -> Tensor:
    """Rows to keep, so that the labels are distributed by a law.

        c_b = min( n_b, max(1, round(s w_b)) ),    s = q-th smallest of n_b / w_b over the P bins with rows
        exponential:  w_b = ratio^(-b / (K - 1))                       from the lowest to the highest bin
        step:         w_b = 1 for b < K / 2,  1 / ratio for the others
        normal:       w_b = ratio^(-((b - m) / max_d |d - m|)^2)       m is the bin of the median label

    With `short` = 0, q = 1: s is the largest scale at which no bin needs more rows than it has, so counts follow the
    law up to rounding. How many rows that leaves depends on how far the labels are from the law: one nearly empty bin
    where the law wants many makes all others small. `short` lets such bins run short, q = 1 + round(short P) (at most
    P): they give all they have, the others follow the law at a larger scale.

    The rows kept at a smaller scale in some bin are among those kept at a larger one with the same seed. To make the
    low labels rare instead of the high ones, pass -labels.

    Args:
        labels: (N,) finite numbers.
        law: "exponential", "step" or "normal".
        ratio: of the largest w_b to the smallest, 1 to a million; 1 keeps as many of each bin.
        seed: which rows of a bin.
        bins: K, at least 2.
        short: share of the bins that may have fewer rows than the law says, 0 to 1.

    Returns:
        Row numbers, long, ascending, at least one of each bin that has any.

    Raises:
        TypeError: labels that are not a tensor of numbers, a setting of another kind.
        ValueError: labels that are not (N,), empty, not finite or all the same; an unknown law (the nearest one is
            offered), or a setting out of its range.

    >>> import torch
    >>> y = torch.tensor([10, 11, 12]).repeat(16)
    >>> torch.bincount(y[imbalanced_rows(y, law="exponential", ratio=4, bins=3, seed=0)] - 10).tolist()
    [16, 8, 4]
    """
    who = "imbalanced_rows"
    place = _bins(who, labels, bins)
    weight = _weights(who, law, ratio, place, bins)
    return _draw(who, place, _follow(who, torch.bincount(place, minlength=bins), weight, short), seed)


def balanced_rows(labels: Tensor, *, rows: int, seed: int, bins: int = 10) -> Tensor:
    """Rows with labels that are spread as evenly as the data allow.

        c_b = min(n_b, level),    the level such that all c_b sum to `rows`

    Bins with fewer rows than the level give all they have and the others make up for them: strictly equal counts would
    cut every bin down to the emptiest one. What the level leaves over goes, a row each, to the lowest bins that have
    more.

    Args:
        labels: (N,) finite numbers.
        rows: how many, 1 to N.
        seed: which rows of a bin.
        bins: K, at least 2.

    Returns:
        (rows,) row numbers, long, ascending.

    Raises:
        TypeError: labels that are not a tensor of numbers, a setting of another kind.
        ValueError: labels that are not (N,), empty, not finite or all the same; more rows than labels, or a setting out
            of its range.

    >>> import torch
    >>> y = torch.tensor([0.0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    >>> y[balanced_rows(y, rows=6, bins=3, seed=0)].tolist()
    [0.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    """
    who = "balanced_rows"
    place = _bins(who, labels, bins)
    rows = _check.integer(who, "rows", rows, 1)
    if rows > len(place):
        raise ValueError(f"{who}: rows is {rows}, but there are {len(place)} labels; pass a number from 1 to that.")
    return _draw(who, place, _fill(torch.bincount(place, minlength=bins), rows), seed)


def split_imbalanced(
    labels: Tensor,
    *,
    law: str,
    ratio: float,
    test: float,
    validation: float,
    seed: int,
    bins: int = 10,
    short: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced test rows, then balanced validation rows, then imbalanced training rows out of the rest.

    round(test N) and round(validation N) rows are spread evenly over the bins (`balanced_rows`), but take at most half
    of what a bin still has, so that no bin is tested that training has no row of. The law (`imbalanced_rows`) then
    holds for the rows left; those that it doesn't keep are in none of the splits. The bins are those of all labels.

    The test rows depend on labels, `test`, `bins` and `seed` only, the validation rows on these and `validation`: both
    are the same under every law and ratio.

    Args:
        labels: (N,) finite numbers.
        law, ratio, bins, short: see `imbalanced_rows`.
        test: share of the test split.
        validation: share of the validation split; 0 for none.
        seed: which rows.

    Returns:
        (training rows, validation rows, test rows), long, ascending, disjoint.

    Raises:
        TypeError, ValueError: see `imbalanced_rows`; also fewer than two test rows, or more rows to hold out than half
            of each bin.
    """
    who = "split_imbalanced"
    place = _bins(who, labels, bins)
    weight = _weights(who, law, ratio, place, bins)
    size = torch.bincount(place, minlength=bins)
    parts = []
    for name, share, low in (("test", test, 2), ("validation", validation, 0)):
        rows, most = round(_check.between(who, name, share, 0.0, 1.0) * len(place)), int((size // 2).sum())
        if not low <= rows <= most:
            limit = f"at least {low}" if rows < low else f"at most {most}, half of what each of {bins} bins has left,"
            raise ValueError(
                f"{who}: {name} {share:g} of {len(place)} labels is {rows} rows, but {limit} can be held out; pass "
                "another share, other bins or more labels."
            )
        parts.append(_fill(size // 2, rows))
        size = size - parts[-1]
    parts.append(_follow(who, size, weight, short))
    drawn: list[Tensor] = []
    for count in parts:
        drawn.append(_draw(who, place, torch.cat([count, count.new_zeros(1)]), seed))
        place = place.index_fill(0, drawn[-1], bins)  # an extra bin, of which nothing is drawn
    return drawn[2], drawn[1], drawn[0]


def _bins(who: str, labels: Tensor, bins: int) -> Tensor:
    """(N,) bin of each label."""
    bins = _check.integer(who, "bins", bins, 2)
    y = _check.batch(who, "labels", labels, 1, 1).detach().to("cpu", torch.float64)
    _check.finite(who, "labels", y[:, None])
    low, high = (float(value) for value in y.aminmax())
    if low == high:
        raise ValueError(f"{who}: labels are all {low:g}; pass labels that differ.")
    width = high - low
    if not math.isfinite(width * bins):
        raise ValueError(f"{who}: labels go from {low:g} to {high:g}, too far for float64; pass them in another unit.")
    # multiplied first, so that an integer on an edge stays on it
    return ((y - low) * bins / width).long().clamp_(max=bins - 1)


def _weights(who: str, law: str, ratio: float, place: Tensor, bins: int) -> Tensor:
    """(K,) float64 w_b, the largest one 1."""
    _check.choice(who, "law", law, LAWS)
    ratio = _check.between(who, "ratio", ratio, 1.0, MAX_RATIO)
    b = torch.arange(bins, dtype=torch.float64)
    if law == "step":
        return torch.where(2 * b < bins, 1.0, 1.0 / ratio)
    if law == "normal":
        away = (b - place.median()).abs()
        return ratio ** -(away / away.max()).square()
    return ratio ** -(b / (bins - 1))


def _follow(who: str, size: Tensor, weight: Tensor, short: float) -> Tensor:
    """(K,) counts by the law, none above `size`."""
    short = _check.between(who, "short", short, 0.0, 1.0)
    scales = (size / weight)[size > 0].sort().values
    scale = scales[min(round(short * len(scales)), len(scales) - 1)]
    return torch.minimum((scale * weight).round().long().clamp(min=1), size)


def _fill(size: Tensor, rows: int) -> Tensor:
    """(K,) counts that sum to `rows`, which `size` has room for, as even as `size` allows."""
    count = torch.zeros_like(size)
    while (left := rows - int(count.sum())) > 0:
        open_ = (size > count).nonzero().flatten()
        if left < len(open_):
            open_ = open_[:left]
        count[open_] = torch.minimum(count[open_] + left // len(open_), size[open_])
    return count
