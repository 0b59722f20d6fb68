"""How close are predicted numbers, also where training data was scarce, and do embeddings lie in the order of labels?

Values are read (a device is waited for) and summed in float64 on the CPU, since not every device has float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix._math import CPU
from hardmix.mixing.draw import cpu_generator

#: errors below this count as this, so that one exact prediction doesn't make the geometric mean 0
SMALLEST_ERROR = 1e-10


def regression_metrics(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Errors and correlations of predicted numbers.

        mae = mean_i |e_i|    rmse = sqrt(mean_i e_i^2)    gm = exp(mean_i log max(|e_i|, 1e-10)),   e_i = p_i - y_i
        r2 = 1 - sum_i e_i^2 / sum_i (y_i - mean y)^2      pearson, spearman: correlation of p and y, and of their ranks

    Args:
        predictions: (N,) numbers.
        labels: (N,) numbers.
    Returns:
        dict with mae, rmse, gm, r2, pearson and spearman, as Python floats. Constant labels leave r2, pearson and
        spearman undefined, constant predictions pearson and spearman: they are NaN then, and for N = 1. Equal values
        share the mean of their ranks.
    Raises:
        ValueError: sizes disagree, NaN or infinity.
    Reference: gm is the third measure of Yang et al. 2021 (arXiv:2102.09554). r2 is not taken from torchmetrics, which
    counts sums of squares below 1e-4 as 0 and so depends on the unit of the labels.

    >>> measured = regression_metrics(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 4.0, 6.0]))
    >>> {k: round(v, 4) for k, v in measured.items()}
    {'mae': 1.3333, 'rmse': 1.4142, 'gm': 1.2599, 'r2': 0.25, 'pearson': 0.9608, 'spearman': 1.0}
    """
    from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error

    who = "regression_metrics"
    p, y = _numbers(who, "predictions", predictions), _numbers(who, "labels", labels)
    _check.same_length(who, "labels", y, "predictions", p.shape[0])
    spread = (y - y.mean()).square().sum().item()
    r2 = math.nan if _constant(y) or spread == 0.0 else 1.0 - (p - y).square().sum().item() / spread
    return {
        "mae": mean_absolute_error(p, y).item(),
        "rmse": mean_squared_error(p, y, squared=False).item(),
        "gm": (p - y).abs().clamp(min=SMALLEST_ERROR).log().mean().exp().item(),
        "r2": r2,
        "pearson": _pearson(p, y),
        "spearman": _spearman(p, y),
    }


def shot_metrics(
    predictions: Tensor,
    labels: Tensor,
    train_labels: Tensor,
    *,
    bin_width: float = 1.0,
    many: int = 100,
    few: int = 20,
) -> dict[str, float]:
    """Mean absolute error where training labels were frequent, less so, and rare.

        n_i = number of training labels in the bin of y_i,   bin(y) = floor(y / bin_width + 1/2)
        many: n_i > many,    medium: few <= n_i <= many,    few: n_i < few (none at all included)

    Each mean is over the test samples of its group, not over bins. Bins are centred on the multiples of bin_width, so
    that labels written as such multiples (ages, tenths) stay together however they were rounded.

    Args:
        predictions: (N,) numbers for test samples.
        labels: (N,) their labels.
        train_labels: (M,) labels of the training split.
        bin_width: width of the bins, in the unit of the labels.
        many, few: the two bounds.
    Returns:
        dict with mae_many, mae_medium and mae_few; NaN where no test sample falls.
    Raises:
        ValueError: sizes disagree, NaN or infinity, few > many.
    Reference: Yang et al. 2021, section 4 (arXiv:2102.09554), whose code counts equal labels, which is the same for
    whole numbers.

    >>> shot_metrics(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 9.0]), torch.full((200,), 2.0))
    {'mae_many': 1.0, 'mae_medium': nan, 'mae_few': 4.0}
    """
    who = "shot_metrics"
    bin_width = _check.positive(who, "bin_width", bin_width)
    few = _check.integer(who, "few", few, 0)
    if _check.integer(who, "many", many, 0) < few:
        raise ValueError(f"{who}: many is {many} but few is {few}; pass few <= many.")
    p, y = _numbers(who, "predictions", predictions), _numbers(who, "labels", labels)
    _check.same_length(who, "labels", y, "predictions", p.shape[0])
    train = _numbers(who, "train_labels", train_labels)
    bins, size = torch.unique((train / bin_width + 0.5).floor(), return_counts=True)
    own = (y / bin_width + 0.5).floor()
    at = torch.searchsorted(bins, own).clamp(max=len(bins) - 1)
    count = torch.where(bins[at] == own, size[at], 0)
    error = (p - y).abs()
    groups = {"many": count > many, "medium": (count >= few) & (count <= many), "few": count < few}
    return {f"mae_{name}": error[group].mean().item() for name, group in groups.items()}


def ordinality(
    embeddings: Tensor, labels: Tensor, *, pairs: int = 100_000, generator: torch.Generator | None = None
) -> float:
    """Are samples with distant labels distant? The rank correlation of both distances over pairs of samples.

        spearman_{i < j}( ||z_i - z_j||, |y_i - y_j| )

    Args:
        embeddings: (N, D), taken as they are: normalise them first if the model's loss does.
        labels: (N,) numbers.
        pairs: with at most as many pairs of samples all of them are taken, else so many are drawn, evenly and with
            replacement.
        generator: for the draw; a CPU one.
    Returns:
        Python float from -1 to 1, which distances that are equal share the mean of their ranks for. NaN where the
        embedding distances or the label distances are all the same, as for N = 2 and for a collapsed model.
    Raises:
        ValueError: sizes disagree, N < 2, NaN or infinity.

    >>> ordinality(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0.0, 2.0, 6.0]))
    1.0
    """
    who = "ordinality"
    pairs = _check.integer(who, "pairs", pairs, 1)
    cpu_generator(who, generator)
    z, y = _embeddings_and_labels(who, embeddings, labels)
    count = len(y)
    if count < 2:
        raise ValueError(f"{who}: embeddings has 1 row; pass at least two.")
    if count * (count - 1) // 2 <= pairs:
        i, j = torch.triu_indices(count, count, 1, device=CPU)
    else:
        i = torch.randint(count, (pairs,), generator=generator, device=CPU)
        j = torch.randint(count - 1, (pairs,), generator=generator, device=CPU)
        j = j + (j >= i)  # any row but i
    # A few thousand pairs at a time: all of them at once would hold pairs x D numbers.
    parts = zip(i.split(4096), j.split(4096), strict=True)
    distance = torch.cat([(z[a] - z[b]).norm(dim=1) for a, b in parts])
    return _spearman(distance, (y[i] - y[j]).abs())


def local_linearity(embeddings: Tensor, labels: Tensor, *, neighbours: int = 2) -> float:
    """How far are embeddings off the straight line between their neighbours in label order?

        u_1 < ... < u_G: the distinct labels        c_g: mean of z_i / ||z_i|| over the rows with label u_g
        s_ik = (1 - t) c_{g-k} + t c_{g+k},  t = (u_g - u_{g-k}) / (u_{g+k} - u_{g-k}),  g the place of y_i
        mean ||z_i / ||z_i|| - s_ik||  /  mean (||z_i / ||z_i|| - c_{g-k}|| + ||z_i / ||z_i|| - c_{g+k}||) / 2

    Both means are over all interior (i, k), k = 1 .. neighbours / 2, that is where g - k and g + k exist. Neighbours
    are strictly lower and strictly higher in label; rows that share a label are one neighbour, their mean, so that the
    order of the rows doesn't matter.

    Args:
        embeddings: (N, D); each row is scaled to length 1, a row of zeros stays.
        labels: (N,) numbers.
        neighbours: how many neighbours each row is compared with, half on either side; even.
    Returns:
        Python float of at least 0: 0 on the straight line, about 0.87 for independent random directions at even labels,
        never more than 2. An even walk along an arc is not 0, since the arc bends between neighbours, but goes to 0 as
        they come closer. NaN if no row has neighbours on both sides (fewer than three distinct labels) or all of them
        coincide with their neighbours.
    Raises:
        ValueError: sizes disagree, neighbours is odd, NaN or infinity.

    >>> quarter = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> round(local_linearity(quarter, torch.tensor([0.0, 1.0, 2.0])), 4)  # the sine of 22.5 degrees
    0.3827
    """
    who = "local_linearity"
    if _check.integer(who, "neighbours", neighbours, 2) % 2:
        raise ValueError(f"{who}: neighbours is {neighbours}; pass an even number, half for either side.")
    z, y = _embeddings_and_labels(who, embeddings, labels)
    z = F.normalize(z, dim=1, eps=torch.finfo(z.dtype).tiny)
    levels, group, size = torch.unique(y, return_inverse=True, return_counts=True)
    centre = z.new_zeros(len(levels), z.shape[1])  # (G, D)
    where = group[:, None].expand_as(z)
    low, high = (centre.scatter_reduce(0, where, z, end, include_self=False) for end in ("amin", "amax"))
    # Between the values: the rounded mean of equal ones may differ from them, and the rows would not coincide.
    centre = (centre.index_add(0, group, z) / size[:, None]).clamp(low, high)
    off, reach = 0.0, 0.0
    for k in range(1, min(neighbours // 2, (len(levels) - 1) // 2) + 1):
        inside = (group >= k) & (group < len(levels) - k)
        row, below, above = z[inside], group[inside] - k, group[inside] + k
        low, high = levels[below], levels[above]
        t = ((y[inside] - low) / (high - low))[:, None]
        off += (row - torch.lerp(centre[below], centre[above], t)).norm(dim=1).sum().item()
        reach += ((row - centre[below]).norm(dim=1) + (row - centre[above]).norm(dim=1)).sum().item() / 2
    return off / reach if reach > 0.0 else math.nan


def _numbers(who: str, name: str, value: Tensor) -> Tensor:
    """(N,) finite numbers, checked, in float64 on the CPU."""
    value = _check.tensor(who, name, value)
    if value.ndim != 1 or value.numel() == 0 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(
            f"{who}: {name} has shape {tuple(value.shape)} and dtype {value.dtype}; pass (N,) numbers, at least one."
        )
    value = value.detach().cpu().double()
    _check.finite(who, name, value[:, None])
    return value


def _embeddings_and_labels(who: str, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = _check.batch(who, "embeddings", embeddings, 2, 2).detach().cpu().double()
    _check.finite(who, "embeddings", z)
    y = _numbers(who, "labels", labels)
    _check.same_length(who, "labels", y, "embeddings", z.shape[0])
    return z, y


def _constant(x: Tensor) -> bool:
    """All equal, asked of the values: the rounded mean of equal values may leave a tiny deviation."""
    return bool((x == x[0]).all())


def _pearson(x: Tensor, y: Tensor) -> float:
    from torchmetrics.functional.regression import pearson_corrcoef

    # torchmetrics warns about constant values, which an untrained model may well give.
    return math.nan if _constant(x) or _constant(y) else pearson_corrcoef(x, y).item()


def _spearman(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of mid-ranks. torchmetrics ranks in float32, sums the ranks of ties in 32-bit integers, which
    overflow at some 65,000 equal values, and adds 1e-6 to the denominator."""
    return _pearson(_ranks(x), _ranks(y))


def _ranks(x: Tensor) -> Tensor:
    """(N,) ranks from 1 in float64; equal values have the mean of theirs."""
    _, at, size = torch.unique(x, return_inverse=True, return_counts=True)
    last = size.cumsum(0).double()
    return (last - (size.double() - 1) / 2)[at]
