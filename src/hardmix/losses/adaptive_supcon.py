"""AdaCon: supervised contrast with a margin that grows with how many labels lie between two samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import unit
from hardmix.losses._rows import labelled_rows, reduce_anchors, tied

REDUCTIONS = ("none", "mean", "sum")


def adaptive_supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    scale: float = 150.0,
    population: Tensor | None = None,
    label_tolerance: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """AdaCon's contrast: negatives are pushed as if they were nearer, by the share of labels in between.

        l_i = -1 / |P_i| sum_{a in P_i} log( exp(scale s_ia) / sum_{b != i} exp(scale (s_ib + m_ib)) ),     s = cosine
        m_ib = 2 |r_i - r_b| / n,     r = (number of labels of the population below y + number up to y) / 2

    P_i holds the other rows with y_a = y_i, for which m is 0. n is the size of the population: m_ib is twice the share
    of it that lies between two labels, and at most 2, with which the opposite of a row counts like the row itself.

    Args:
        embeddings: (N, D), or (N, V, D) with V views of each sample, which count as rows of their own. Any float dtype
            and length; rows are normalised, and sums are done in float32 or wider.
        labels: (N,) numbers, integers or floats. They are read on the host, where a GPU is waited for.
        scale: 1 / temperature.
        population: (n,) the labels of the training set, in ascending order, repeated as often as they occur, in the
            dtype of `labels`. None takes the distinct labels of the batch: m then depends on what else was drawn.
        label_tolerance: labels of the batch are rounded to multiples of this before anything else, so that continuous
            ones can be equal; 0 compares them as they are.
        reduction: "mean" over the anchors that have a positive, "sum", or "none".

    Returns:
        Scalar; for "none" (N,), or (N, V). An anchor without a positive has loss 0 and is not part of the mean, but
        stays a negative of the others; no anchor with one (N = 1, distinct labels and one view): 0, with a gradient of
        zeros. All labels equal: every other row is a positive, with no margins. Labels need not occur in the
        population; two distinct ones with none of it at or between them have no margin either. Rows of zeros have
        cosine 0 with all. NaN gives NaN.

    Raises:
        TypeError: integer embeddings, a population that is no tensor, a setting of another kind.
        ValueError: shapes or devices disagree, an empty batch, labels that are not finite, a population that is empty,
            not finite or not in ascending order, a setting out of its range.

    Reference: Dai et al. 2022, "Adaptive Contrast for Image Regression" (arXiv:2112.11700); loss = squared error + 0.75
    of this, two views. The authors' code puts labels into bins first, as `label_tolerance` does, and divides their mean
    ranks in the whole data set by a constant, the size of their training set, n = 7465; it clips m to [0, 2], which
    ranks over their own n cannot leave. An anchor without a positive is 0 / 0 there.

    >>> import torch
    >>> y = torch.tensor([1.0, 1.0, 5.0])   # the third lies 2 |1 - 0| / 2 = 1 away
    >>> round(adaptive_supcon_loss(torch.eye(3), y, scale=1.0).item(), 4)   # log(1 + e)
    1.3133
    """
    who = "adaptive_supcon_loss"
    _check_options(who, scale, label_tolerance, reduction)
    x = labelled_rows(who, embeddings, labels)
    y = tied(x.labels, label_tolerance)
    known = y.unique() if population is None else _check_population(who, population)
    below, up_to = torch.searchsorted(known, y), torch.searchsorted(known, y, right=True)
    place = ((below + up_to).double() / (2 * len(known))).to(x.z.device)
    y = y.to(x.z.device)
    with torch.autocast(x.z.device.type, enabled=False):
        z = unit(x.z)
        cosine = z @ z.T
        positive = (y[:, None] == y).fill_diagonal_(False)
        count = positive.sum(1)
        valid = count > 0
        margin = (2.0 * (place[:, None] - place).abs()).to(z.dtype)
        terms = (scale * (cosine + margin)).fill_diagonal_(-torch.inf)
        # logsumexp of nothing has no derivative: an anchor that is left out gets numbers instead.
        total = terms.masked_fill(~valid[:, None], 0.0).logsumexp(1)
        loss = total - scale * (cosine * positive).sum(1) / count.clamp(min=1)
    return reduce_anchors(loss.masked_fill(~valid, 0.0), valid, x.shape, reduction)


class AdaSupConLoss(nn.Module):
    """`adaptive_supcon_loss` with its settings remembered. `population` is a buffer; nothing is learnt.

    >>> import torch
    >>> ages = torch.randint(80, (1000,)).sort().values
    >>> AdaSupConLoss(population=ages)(torch.randn(16, 2, 8), ages[::63]).shape
    torch.Size([])
    """

    population: Tensor | None

    def __init__(
        self,
        *,
        scale: float = 150.0,
        population: Tensor | None = None,
        label_tolerance: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        _check_options(who, scale, label_tolerance, reduction)
        if population is not None:
            _check_population(who, population)
        self.scale = scale
        self.label_tolerance = label_tolerance
        self.reduction = reduction
        self.register_buffer("population", population)

    def extra_repr(self) -> str:
        known = "the batch" if self.population is None else f"{len(self.population)} labels"
        return f"scale={self.scale:g}, population={known}, label_tolerance={self.label_tolerance:g}"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) or (N, V, D) with labels (N,); see `adaptive_supcon_loss`."""
        return adaptive_supcon_loss(
            embeddings,
            labels,
            scale=self.scale,
            population=self.population,
            label_tolerance=self.label_tolerance,
            reduction=self.reduction,
        )


def _check_options(who: str, scale: float, label_tolerance: float, reduction: str) -> None:
    _check.positive(who, "scale", scale)
    _check.non_negative(who, "label_tolerance", label_tolerance)
    _check.choice(who, "reduction", reduction, REDUCTIONS)


def _check_population(who: str, population: Tensor) -> Tensor:
    """Sorted labels (n,), read on the host as float64 like those of the batch."""
    known = _check.tensor(who, "population", population)
    if known.ndim != 1 or len(known) == 0 or known.is_complex() or known.dtype == torch.bool:
        raise ValueError(
            f"{who}: population has shape {tuple(known.shape)} and dtype {known.dtype}; pass the labels of the "
            "training set, shape (n,)."
        )
    known = known.detach().to("cpu", torch.float64)
    if not bool(known.isfinite().all()):
        raise ValueError(f"{who}: population holds NaN or infinity; leave out these labels.")
    if not bool((known[1:] >= known[:-1]).all()):
        raise ValueError(f"{who}: population is not in ascending order; pass population.sort().values.")
    return known
