"""Optimal transport with an entropy term, by Sinkhorn's iterations, for a batch of small problems."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import wide

#: Share of the iterations in which the entropy comes down to its final weight, and in how many steps.
_COOLING, _STEPS = 0.6, 12
#: The least weight, in roundings of the largest cost: below that, exponents would be noise.
_DIGITS = 8
#: Iterations after which scaling factors go into the potentials at the latest, before they leave float32.
_LONGEST = 20


class Transport(NamedTuple):
    """Plans (N, R, S), and how far the worst column of each is from its marginal, relative to it (N,)."""

    plan: Tensor
    error: Tensor


@torch.no_grad()
def sinkhorn(cost: Tensor, *, entropy: float = 0.1, iterations: int = 100) -> Transport:
    """The transport plan of each cost matrix, between uniform marginals.

        P = argmin <P, cost> - entropy H(P),   P 1 = 1 / R,  P^T 1 = 1 / S,   H(P) = -sum P log P

    A fixed number of iterations on every device: nothing waits for a comparison, and a sample's plan does not depend on
    its batch. The weight of the entropy comes down from the largest difference of costs to `entropy` in the first 60 %
    of them; the solution is the same, and where costs are thousands of times `entropy` it is much nearer than after as
    many plain iterations. Potentials are kept as logarithms, into which the scaling factors go every few iterations:
    nothing underflows, and most iterations are two products instead of two sums of exponentials.

    Args:
        cost: (N, R, S), any floating-point dtype; float32 is computed with, or float64.
        entropy: weight of the entropy term, in the unit of the costs.
        iterations: pairs of half steps, columns first.
    Returns:
        The rows of the plan sum to 1 / R up to rounding, its columns to 1 / S up to `error`. No gradient. After 100
        iterations the largest error of 32 plans with R = S = 49 was 1e-6 where the mean cost is 10 times the entropy,
        0.01 at 100 times, 0.1 at 1,000 times and 0.3 at 10,000 times. Where costs differ by more than a million times
        `entropy`, it is raised to what float32 can tell. With costs all equal the plan is uniform. NaN or infinity in a
        matrix makes its plan NaN.
    Raises:
        ValueError, TypeError: not three axes, empty, not floats, or a setting out of range.
    Reference: Cuturi 2013 (arXiv:1306.0895).

    >>> plan, error = sinkhorn(torch.tensor([[[0.0, 90.0], [90.0, 0.0]]]))
    >>> plan[0, 0].tolist(), error.item() < 1e-6
    ([0.5, 0.0], True)
    """
    who = "sinkhorn"
    cost = _check.batch(who, "cost", cost, 3, 3)
    if not cost.is_floating_point():
        raise TypeError(f"{who}: cost has dtype {cost.dtype}; pass floating-point costs.")
    entropy = _check.positive(who, "entropy", entropy)
    iterations = _check.integer(who, "iterations", iterations, 1)
    with torch.autocast(cost.device.type, enabled=False):  # its products would be half types
        return _iterate(cost.to(wide(cost.dtype)), entropy, iterations)


def _iterate(cost: Tensor, entropy: float, iterations: int) -> Transport:
    rows, columns = cost.shape[1:]
    mass = rows / columns  # of a column, where a row has 1
    smallest = torch.finfo(cost.dtype).tiny
    # What is common to a row or a column changes no plan, and costs digits.
    cost = cost - cost.amin(2, keepdim=True)
    cost = cost - cost.amin(1, keepdim=True)
    most = cost.amax((1, 2), keepdim=True)  # (N, 1, 1)
    least = (most * (_DIGITS * torch.finfo(cost.dtype).eps)).clamp_(min=entropy)
    start = torch.maximum(most, least) / least
    row, column = torch.zeros_like(cost[:, :, :1]), torch.zeros_like(cost[:, :1, :])  # potentials
    kernel, left, right = cost, row, column
    last = None
    for share, count in _blocks(iterations):
        weight = least * start.pow(share)
        if share != last:  # with logarithms, after which no sum of exponentials is near 0
            column = weight * (math.log(mass) - torch.logsumexp((row - cost) / weight, 1, keepdim=True))
            row = -weight * torch.logsumexp((column - cost) / weight, 2, keepdim=True)
            last, count = share, count - 1
        kernel = (row + column - cost).div_(weight).clamp_(max=0.0).exp_()
        left, right = torch.ones_like(row), torch.ones_like(column)
        for _ in range(count):
            right = mass / (left.transpose(1, 2) @ kernel).clamp_(min=smallest)
            left = 1.0 / (kernel @ right.transpose(1, 2)).clamp_(min=smallest)
        row, column = row + weight * left.log(), column + weight * right.log()
    plan = kernel * right
    plan /= plan.sum(2, keepdim=True) * rows
    return Transport(plan, (plan.sum(1) * columns - 1.0).abs().amax(1))


def _blocks(iterations: int) -> list[tuple[float, int]]:
    """Powers of the starting weight, from 1 down to 0, and how many iterations are made with each."""
    cooling = int(_COOLING * iterations)
    steps = min(cooling, _STEPS)
    blocks = [(1.0 - k / steps, cooling * (k + 1) // steps - cooling * k // steps) for k in range(steps)]
    rest = iterations - cooling
    return blocks + [(0.0, min(_LONGEST, rest - done)) for done in range(0, rest, _LONGEST)]
