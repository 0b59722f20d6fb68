"""Mixtures of rows with tied labels that keep their length: their sums of exponentials factorise.

For an anchor i and two labels h below and r above it, all mixtures of a row j of h and a row k of r have one share, so

    sum_jk exp((lam G_ij + (1 - lam) G_ik) / t) = (sum_j exp(lam G_ij / t)) (sum_k exp((1 - lam) G_ik / t))

and rows times labels are visited instead of rows times rows. Exact, not an approximation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Values of the exponentials that are held at a time, on a CPU and on other devices.
VALUES, DEVICE_VALUES = 2**18, 2**21


class Ties(NamedTuple):
    """The rows below (J,) and above (K,) an anchor by label: H labels below and R above."""

    lam: Tensor  # (H, R) share of the lower row
    below: Tensor  # (J,) label of each row
    above: Tensor  # (K,)
    number_below: Tensor  # (H,) rows of each label
    number_above: Tensor  # (R,)

    @property
    def visits(self) -> int:
        """How many exponentials an anchor takes."""
        labels_below, labels_above = self.lam.shape
        return len(self.below) * labels_above + labels_below * len(self.above)


def find_ties(label: Tensor, below: Tensor, above: Tensor, like: Tensor) -> Ties:
    """Ties of sorted labels `below` (J,) and `above` (K,) around `label` (), all float64, for cosines like `like`."""
    lower, place_below, number_below = below.unique_consecutive(return_inverse=True, return_counts=True)
    upper, place_above, number_above = above.unique_consecutive(return_inverse=True, return_counts=True)
    lam = ((upper - label) / (upper - lower[:, None])).to(like)
    places = place_below.to(like.device), place_above.to(like.device)
    return Ties(lam, *places, number_below.to(like), number_above.to(like))


def sums(below: Tensor, above: Tensor, ties: Ties, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum exp(s / t) and sum of s over all mixtures of each anchor, (B,), from its cosines with the rows below
    (B, J) and above (B, K)."""
    logs = []
    for part in torch.arange(len(below), device=below.device).split(_anchors(ties)):
        *_, lower, upper = _factors(below[part], above[part], ties, temperature)
        logs.append((lower * upper).sum((1, 2)).log_() + 1.0 / temperature)
    weight_below, weight_above = _weights(ties)
    return torch.cat(logs), below @ weight_below + above @ weight_above


def slopes(
    below: Tensor, above: Tensor, ties: Ties, temperature: float, total: Tensor, grad: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """sum over the mixtures of (grad exp(s / t - total) - share) d s / d G, for the rows below (B, J) and above (B, K);
    total, grad and share are (B, 1)."""
    parts = []
    scale = grad * (1.0 / temperature - total).exp()
    rest = 1.0 - ties.lam
    for part in torch.arange(len(below), device=below.device).split(_anchors(ties)):
        own, other, lower, upper = _factors(below[part], above[part], ties, temperature)
        upper, lower = upper * ties.lam, lower * rest
        parts.append(
            (
                scale[part] * own.mul_(upper.index_select(1, ties.below)).sum(2),
                scale[part] * other.mul_(lower.index_select(2, ties.above)).sum(1),
            )
        )
    (first, second), (weight_below, weight_above) = (
        (torch.cat(side) for side in zip(*parts, strict=True)),
        _weights(ties),
    )
    return first - share * weight_below, second - share * weight_above


def _anchors(ties: Ties) -> int:
    values = VALUES if ties.lam.device.type == "cpu" else DEVICE_VALUES
    return max(1, values // max(1, ties.visits))


def _factors(below: Tensor, above: Tensor, ties: Ties, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(lam (G_ij - 1) / t) (B, J, R), exp((1 - lam) (G_ik - 1) / t) (B, H, K), and their sums by label (B, H, R)."""
    lam, rest = ties.lam / temperature, (1.0 - ties.lam) / temperature
    own = ((below - 1.0)[:, :, None] * lam.index_select(0, ties.below)).exp_()
    other = ((above - 1.0)[:, None, :] * rest.index_select(1, ties.above)).exp_()
    lower = own.new_zeros(len(below), *lam.shape).index_add_(1, ties.below, own)
    upper = own.new_zeros(len(below), *lam.shape).index_add_(2, ties.above, other)
    return own, other, lower, upper


def _weights(ties: Ties) -> tuple[Tensor, Tensor]:
    """d (sum of s) / d G for each row below (J,) and above (K,)."""
    return (ties.lam @ ties.number_above)[ties.below], (ties.number_below @ (1.0 - ties.lam))[ties.above]
