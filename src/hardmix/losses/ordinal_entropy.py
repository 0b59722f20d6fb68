"""Ordinal Entropy: the centres of the labels apart, in proportion to the labels, and the features close to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import unit
from hardmix.losses._rows import labelled_rows, tied


def ordinal_entropy_loss(
    features: Tensor,
    labels: Tensor,
    *,
    diversity_weight: float = 1.0,
    tightness_weight: float = 1.0,
    label_tolerance: float = 0.0,
) -> Tensor:
    """Ordinal Entropy: spread the centres of labels over the sphere, distant labels more, and draw features to theirs.

        L = tightness_weight mean_i | z_i / |z_i| - p_{y_i} |  -  diversity_weight mean_{c < c'} w_cc' | p_c - p_c' |
        p_c = mean of the z_i with y_i = c, over its length,     w_cc' = (|c - c'| - min) / max

    c and c' run over the distinct labels of the batch; min and max are those of |c - c'| over their pairs, so w lies in
    [0, 1) and does not depend on the unit of the labels. The nearest pair is not pushed at all.

    Args:
        features: (N, D), or (N, V, D) with V views of each sample, which count as rows of their own. Any float dtype
            and length; sums are done in float32 or wider, distances of centres in float64. A long feature moves its
            centre more than a short one.
        labels: (N,) numbers, integers or floats. They are read on the host, where a GPU is waited for.
        diversity_weight, tightness_weight: at least 0. The paper's experiments on operators use 0.001 for diversity.
        label_tolerance: labels are rounded to multiples of this before anything else, so that continuous ones can be
            equal; 0 compares them as they are. A feature alone with its label is its own centre and is not drawn.

    Returns:
        Scalar, possibly below 0. One distinct label: no pair, so tightness alone. Two: one pair, with w = 0, so
        tightness alone as well; three with equal spacing push only the outer ones. N = 1: 0. Rows of zeros have no
        direction, and a label whose features cancel, up to rounding, has no centre: whatever does is at distance 1 from
        them. At a distance of 0 the derivatives are taken as 0, the second too. NaN gives NaN.

    Raises:
        TypeError: integer features, a setting of another kind.
        ValueError: shapes or devices disagree, an empty batch, labels that are not finite, a setting out of its range.

    Reference: Zhang et al. 2023, "Improving Deep Regression with Ordinal Entropy" (arXiv:2301.08915). The authors' code
    for ages squares the distances of tightness and averages over those above 0; that for depth takes the norm of each
    channel over the samples; both fail where all labels are equal.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]])   # w = 0, 0.5, 0: neighbours are not pushed
    >>> round(ordinal_entropy_loss(x, torch.tensor([1, 2, 3])).item(), 4)   # -1 / 3 x 0.5 x sqrt(2)
    -0.2357
    """
    who = "ordinal_entropy_loss"
    _check_options(who, diversity_weight, tightness_weight, label_tolerance)
    x = labelled_rows(who, features, labels, name="features")
    y = tied(x.labels, label_tolerance)
    values, group, count = (part.to(x.z.device) for part in y.unique(return_inverse=True, return_counts=True))
    with torch.autocast(x.z.device.type, enabled=False):
        centres = _centres(x.z, group, count)
        away = unit(x.z) - centres[group]
        # A length has no second derivative at 0, where a feature alone with its label is.
        there = (away == 0).all(1)
        length = torch.linalg.vector_norm(away.masked_fill(there[:, None], 1.0), dim=1).masked_fill(there, 0.0)
        loss = tightness_weight * length.mean()
        if len(values) > 2:
            loss = loss - diversity_weight * _diversity(centres, values)
    return loss


class OrdinalEntropyLoss(nn.Module):
    """`ordinal_entropy_loss` with its settings remembered. Nothing is learnt.

    >>> import torch
    >>> OrdinalEntropyLoss(diversity_weight=0.001)(torch.randn(16, 8), torch.arange(16) // 2).shape
    torch.Size([])
    """

    def __init__(
        self, *, diversity_weight: float = 1.0, tightness_weight: float = 1.0, label_tolerance: float = 0.0
    ) -> None:
        super().__init__()
        _check_options(type(self).__name__, diversity_weight, tightness_weight, label_tolerance)
        self.diversity_weight = diversity_weight
        self.tightness_weight = tightness_weight
        self.label_tolerance = label_tolerance

    def extra_repr(self) -> str:
        return f"diversity_weight={self.diversity_weight:g}, tightness_weight={self.tightness_weight:g}"

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of features (N, D) or (N, V, D) with labels (N,); see `ordinal_entropy_loss`."""
        return ordinal_entropy_loss(
            features,
            labels,
            diversity_weight=self.diversity_weight,
            tightness_weight=self.tightness_weight,
            label_tolerance=self.label_tolerance,
        )


def _check_options(who: str, diversity_weight: float, tightness_weight: float, label_tolerance: float) -> None:
    _check.non_negative(who, "diversity_weight", diversity_weight)
    _check.non_negative(who, "tightness_weight", tightness_weight)
    _check.non_negative(who, "label_tolerance", label_tolerance)


def _centres(z: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Directions (groups, D) of the mean row of each group of `count` rows; zeros where there is none."""
    # In units of the group's largest entry a sum cannot overflow, and a direction has no unit.
    largest = z.detach().abs().amax(1)
    scale = z.new_zeros(len(count)).scatter_reduce(0, group, largest, "amax")
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    total = z.new_zeros(len(count), z.shape[1]).index_add(0, group, z / scale[group, None])
    # What rounding leaves of rows that cancel is no direction: a mean below eps of the largest entry.
    cancels = total.detach().abs().amax(1) <= torch.finfo(z.dtype).eps * count
    return unit(total.masked_fill(cancels[:, None], 0.0))


def _diversity(centres: Tensor, values: Tensor) -> Tensor:
    """Mean over pairs of labels, distinct and ascending, of their weight times the distance of their centres."""
    gap = values - values[:, None]
    weight = ((gap - values.diff().min()) / (values[-1] - values[0])).triu(1)
    # Distances from products, the form that needs no (C, C, D), lose half of the digits: in float64 enough are left.
    wide = centres.double()
    length = wide.square().sum(1)
    square = length[:, None] + length - 2.0 * (wide @ wide.T)
    # torch.cdist has no second derivative at a distance of 0, and every centre has that to itself.
    apart = (weight > 0) & ~(square <= 0)  # a NaN is taken in, and handed on
    distance = torch.where(apart, square, 1.0).sqrt() * apart
    return (weight * distance).sum().to(centres.dtype) / (len(values) * (len(values) - 1) // 2)
