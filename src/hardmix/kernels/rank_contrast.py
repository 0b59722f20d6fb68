"""Rank-N-Contrast of all pairs of a batch in O(M^2 log M): one sort of the label distances per anchor, then sums that
run along it.

The denominator of j holds the rows at least as far in label. Along the rows, sorted from the farthest label to the
nearest, it is a running sum, read at the end of j's ties; the sum of inverse denominators in a slope runs from the
other end and is read at the start of the ties. Both add positive numbers only. Anchors are taken in tiles, so that
nothing grows with M^2 but, for batches of usual size, one matrix of slopes kept for the gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix._math import first_only, refuse_transforms

#: Up to so many rows the slopes of all pairs are kept for the gradient; above, they are computed once more.
DENSE_ROWS = 1024
#: Pairs of a tile, a dozen arrays of which exist at a time.
TILE_PAIRS = 2**17
#: Values of the differences of near-duplicates that exist at a time.
CHUNK_VALUES = 2**20
#: |a - b|^2 / (|a|^2 + |b|^2) below which the Gram matrix has lost too many digits of the distance.
NEAR = 1e-2
#: exp(x - max) of a row that spans at most this, and sums of its inverse over a few million rows, neither underflow nor
#: overflow.
SPAN = {torch.float32: 60.0, torch.float64: 600.0}


def rank_contrast(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Loss of every row as an anchor, (M,).

        l_i = -1 / (M - 1) sum_{j != i} log( exp(s_ij / t) / sum_{k != i, d_ik >= d_ij} exp(s_ik / t) ),   s = -distance

    Args:
        z: (M, D) rows, M >= 2, float32 or float64, of any length.
        labels: (M, P) finite, float64, on the CPU; d is the sum of the absolute differences, taken column by column.
    Returns:
        (M,) in the dtype of z. First derivatives only.
    """
    refuse_transforms("rank_contrast: contrasts of ranked labels")
    distinct, group = labels.unique(dim=0, return_inverse=True)
    place = group.argsort(stable=True)
    batch = _Batch(distinct.to(z.device), group[place], place.to(z.device), temperature)
    keep = torch.is_grad_enabled() and z.requires_grad and len(z) <= DENSE_ROWS
    with _full_precision(z):
        return _RankContrast.apply(z, batch, keep)


def _full_precision(z: Tensor) -> torch.autocast:
    """Gram distances are differences of near numbers: the half types of an autocast region have no digits for them."""
    return torch.autocast(z.device.type, enabled=False)


class _Batch(NamedTuple):
    """Rows in the order of their labels: those with one label share their sorted distances.

    distinct: (U, P) the labels that occur. group: (M,) which of them a row has, ascending, on the CPU. place: (M,)
    where the row was.
    """

    distinct: Tensor
    group: Tensor
    place: Tensor
    temperature: float


class _Ranking(NamedTuple):
    """For each anchor of a tile all rows from the farthest label to the nearest, (T, M), and where the ties of each
    start and end. The anchor itself is among the last; the others are as many as there are places before the last."""

    order: Tensor
    start: Tensor
    end: Tensor


class _Pairs(NamedTuple):
    """Pairs of rows that all but coincide: anchor and row, both counted in the order of the labels."""

    anchor: Tensor
    row: Tensor


class _RankContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, batch: _Batch, keep: bool) -> Tensor:
        rows = _Rows(z, batch)
        loss = z.new_empty(len(z))
        weight = z.new_empty(len(z), len(z)) if keep else None
        near = []
        for first, last in rows.tiles():
            loss[first:last], slopes, pairs = rows.tile(first, last, weight is not None)
            if weight is not None and slopes is not None:
                weight[first:last] = slopes
                near.append(pairs)
        ctx.batch = batch
        anchor, row = (torch.cat(part) for part in zip(*near, strict=True)) if near else (None, None)
        ctx.save_for_backward(z, weight, anchor, row)
        return rows.scattered(loss)

    @staticmethod
    @first_only(
        "rank_contrast: contrasts of ranked labels have first derivatives only; leave out a penalty on gradients."
    )
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        z, weight, anchor, row = ctx.saved_tensors
        with _full_precision(z):
            rows = _Rows(z, ctx.batch)
            grad_loss = grad_loss.index_select(0, ctx.batch.place)[:, None]
            grad = torch.zeros_like(rows.centred)
            if weight is not None:
                rows.spread(grad, 0, len(z), weight * grad_loss, _Pairs(anchor, row))
            else:
                for first, last in rows.tiles():
                    _, slopes, pairs = rows.tile(first, last, True)
                    assert slopes is not None
                    rows.spread(grad, first, last, slopes.mul_(grad_loss[first:last]), pairs)
            return rows.scattered(grad), None, None


class _Rows:
    """The rows of one batch in the order of their labels, with what its tiles share."""

    def __init__(self, z: Tensor, batch: _Batch) -> None:
        self.z, self.batch = z, batch
        # Distances do not see a common offset, but it takes digits from |a|^2 + |b|^2 - 2 a b.
        self.centred = (z - z.mean(0)).index_select(0, batch.place)
        self.square = self.centred.square().sum(1)
        self.group = batch.group.to(z.device)
        self.labels = batch.distinct.index_select(0, self.group)
        self.position = torch.arange(len(z), device=z.device)

    def tiles(self) -> list[tuple[int, int]]:
        rows = len(self.z)
        size = max(1, TILE_PAIRS // rows)
        return [(first, min(first + size, rows)) for first in range(0, rows, size)]

    def scattered(self, values: Tensor) -> Tensor:
        """Back into the order in which the rows came."""
        return torch.empty_like(values).index_copy_(0, self.batch.place, values)

    def tile(self, first: int, last: int, slopes: bool) -> tuple[Tensor, Tensor | None, _Pairs]:
        """Losses (T,) of anchors [first, last); dl_i / d(distance) over the distance, (T, M), if asked for; near pairs.

        The slope over the distance is what a difference of rows is multiplied by. Coincident rows get 0.
        """
        distance, pairs = self._distances(first, last)
        loss, slope = self._losses(distance, self._ranking(first, last), first, slopes)
        if slope is not None:
            slope = slope.div_(distance).mul_(-1.0 / self.batch.temperature).masked_fill_(distance == 0, 0.0)
        return loss, slope, pairs

    def spread(self, grad: Tensor, first: int, last: int, weight: Tensor, near: _Pairs) -> None:
        """Add weight_ik (z_i - z_k) to the gradient of every anchor i of a tile, and its negative to that of k."""
        anchor, row = near
        pulls = weight[anchor - first, row]
        weight[anchor - first, row] = 0.0  # what is left when two nearly equal products are subtracted is rounding
        if len(weight) == len(grad):
            weight = weight + weight.T
            total = weight.sum(1)
            grad.addmm_(weight, self.centred, alpha=-1.0)
        else:
            total = weight.sum(0)
            total[first:last] += weight.sum(1)
            grad.addmm_(weight.T, self.centred[first:last], alpha=-1.0)
            grad[first:last].addmm_(weight, self.centred, alpha=-1.0)
        grad.addcmul_(self.centred, total[:, None])
        for part in self._chunks(near):
            pull = self._differences(anchor[part], row[part]).mul_(pulls[part, None])
            grad.index_add_(0, anchor[part], pull).index_add_(0, row[part], pull, alpha=-1.0)

    def _distances(self, first: int, last: int) -> tuple[Tensor, _Pairs]:
        """Distances of the anchors to all rows (T, M), and the pairs of which they were measured one by one."""
        size = self.square[first:last, None] + self.square
        square = torch.addmm(size, self.centred[first:last], self.centred.T, alpha=-2.0)
        close = square < size.mul_(NEAR)
        close.diagonal(first).fill_(False)
        anchor, row = close.nonzero(as_tuple=True)
        near = _Pairs(anchor + first, row)
        for part in self._chunks(near):
            square[anchor[part], row[part]] = self._differences(near.anchor[part], row[part]).square_().sum(1)
        square.diagonal(first).zero_()
        return square.sqrt_(), near

    def _chunks(self, near: _Pairs) -> list[slice]:
        size = max(1, CHUNK_VALUES // self.z.shape[1])
        return [slice(begin, begin + size) for begin in range(0, len(near.row), size)]

    def _differences(self, anchor: Tensor, row: Tensor) -> Tensor:
        """z_i - z_k of pairs, from the rows as they came: moving them to the centre has rounded them."""
        left, right = (self.z.index_select(0, self.batch.place.index_select(0, part)) for part in (anchor, row))
        return left.sub_(right)

    def _ranking(self, first: int, last: int) -> _Ranking:
        """Anchors of one label sort the same distances, which is done once. Equal means equal in float64."""
        low, high = int(self.batch.group[first]), int(self.batch.group[last - 1]) + 1
        distance = torch.zeros_like(self.labels[:, 0]).repeat(high - low, 1)
        for own, others in zip(self.batch.distinct[low:high].T, self.labels.T, strict=True):
            distance += (own[:, None] - others).abs_()
        distance, order = distance.sort(dim=1, descending=True)
        change = distance[:, 1:] != distance[:, :-1]
        start = F.pad(change * self.position[1:], (1, 0)).cummax(1).values
        # The same from the other end, in places counted from there.
        end = F.pad(change.flip(1) * self.position[1:], (1, 0)).cummax(1).values.flip(1).neg_().add_(len(self.z) - 1)
        which = self.group[first:last] - low
        return _Ranking(*(part.index_select(0, which) for part in (order, start, end)))

    def _losses(self, distance: Tensor, ranking: _Ranking, first: int, slopes: bool) -> tuple[Tensor, Tensor | None]:
        """Losses (T,) and, if asked for, dl_i / d(s_ik / t), (T, M)."""
        own = self.position[first : first + len(distance), None]
        scale = -1.0 / self.batch.temperature
        logits = distance * scale
        bottom = logits.amin(1)
        top = logits.scatter_(1, own, -math.inf).amax(1)
        loss, slope = _plain(logits.sub_(top[:, None]), ranking, own, slopes)
        # A row far from all others may be the whole of a denominator, however small its part of the row is. NaN is no
        # small span either.
        far = (~(top - bottom <= SPAN[logits.dtype])).nonzero().flatten()
        if len(far):
            logits = distance.index_select(0, far).double().mul_(scale)
            loss_far, slope_far = _logarithmic(
                logits, _Ranking(*(part.index_select(0, far) for part in ranking)), own.index_select(0, far), slopes
            )
            loss.index_copy_(0, far, loss_far.to(loss.dtype))
            if slope is not None and slope_far is not None:
                slope.index_copy_(0, far, slope_far.to(slope.dtype))
        others = len(self.z) - 1
        return loss.div_(others), slope if slope is None else slope.div_(others)


def _plain(logits: Tensor, ranking: _Ranking, own: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over j of log(denominator) - logit, (T,), and its slopes (T, M), from sums of exponentials.

    The logits are 0 at most. The anchor, in column `own` (T, 1), has no part in its own sums.
    """
    mass = logits.exp().scatter_(1, own, 0.0)
    total = mass.gather(1, ranking.order).cumsum_(1).gather(1, ranking.end)
    loss = total[:, :-1].log().sum(1) - logits.scatter_(1, own, 0.0).sum(1)
    if not slopes:
        return loss, None
    share = total.reciprocal_()
    share[:, -1] = 0.0
    share = share.flip(1).cumsum_(1).flip(1).gather(1, ranking.start)
    # Every column is written: an order is a permutation.
    slope = torch.empty_like(share).scatter_(1, ranking.order, share).mul_(mass).sub_(1.0)
    return loss, slope.scatter_(1, own, 0.0)


def _logarithmic(logits: Tensor, ranking: _Ranking, own: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """The same from logarithms of sums: slower, and right for logits of any size."""
    sorted_ = logits.scatter_(1, own, -math.inf).gather(1, ranking.order)
    total = sorted_.logcumsumexp(1).gather(1, ranking.end)
    loss = total[:, :-1].sum(1) - logits.scatter(1, own, 0.0).sum(1)
    if not slopes:
        return loss, None
    share = total.neg_()
    share[:, -1] = -math.inf
    share = share.flip(1).logcumsumexp(1).flip(1).gather(1, ranking.start)
    slope = torch.empty_like(share).scatter_(1, ranking.order, share).add_(logits).exp_().sub_(1.0)
    return loss, slope.scatter_(1, own, 0.0)
