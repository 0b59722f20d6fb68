"""Blending a batch with its partners: the inner loop of every mixing policy.

Each operation has one plain form: gather the partners, then lerp or select. Compiled regions, GPUs and autograd see it.
In eager mode on a CPU what counts is memory traffic and the number of calls, so a batch that needs no gradient takes
the first of these that fits. The numbers are those of the plain form.

    cyclic shift   two contiguous blocks are lerped straight into the output; nothing is gathered
    large rows     row by row; in place along the cycles of the pairing, which takes the memory of one saved row
    lines          a mask of a line for each axis is formed for the rows that are blended, some or one at a time
    narrow types   piece by piece, so that the float32 temporaries stay in the cache
    boxes          the batch is copied once, then only the pixels inside the boxes, as bits, through NumPy's slices
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import pairwise, repeat
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hardmix._math import is_transformed, settled

Row = TypeVar("Row")
_FULL = (torch.float32, torch.float64)
#: NumPy has no bfloat16 and no float8, so boxes are copied as integers of the same width.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: The largest int64 that float64 holds; what it rounds to beyond is no int64.
_LARGEST_INT64 = 2**63 - 1024
#: Rows from this size on are worth a call each: streaming that much memory takes as long as the call itself.
_LARGE_ROW_BYTES = 64 * 1024
#: Values that a narrower batch is turned into float32 at a time, and pixels of a mask that are formed at a time.
_PIECE = 128 * 1024


def box_mask(box: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, 1, *size) float32: 0 inside the half-open boxes (N, S, 2), 1 outside; exact up to 2^23 pixels an axis."""
    start, stop = box.to(torch.float32).unbind(2)  # (N, S)
    at = torch.arange(1.0, 2 * max(size), 2.0, dtype=torch.float32, device=box.device)
    # Twice the distance of a pixel from the middle of the box, less the box's side, is odd; the last one inside has -1.
    beyond = (at - (start + stop)[..., None]).abs_().sub_((stop - start)[..., None])  # (N, S, longest axis)
    outside = settled(beyond.clamp_(0.0, 1.0))
    return outside_mask([outside[:, axis, :length] for axis, length in enumerate(size)])


class LineMask:
    """A mask (N, 1, *size) that is kept as a line for each axis; large batches never see the whole of it.

    Args:
        lines: (N, length) for each axis.
        form: of lines of some rows, the mask of these rows.
    """

    __slots__ = ("form", "lines")

    def __init__(self, lines: Sequence[Tensor], form: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.lines = tuple(lines)
        self.form = form

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(line.shape[1] for line in self.lines)

    def whole(self) -> Tensor:
        return self.form(self.lines)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.form([line[start:stop] for line in self.lines])

    def __getitem__(self, row: int) -> Tensor:
        """(1, *size)"""
        return self.rows(row, row + 1)[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> LineMask:
        """The same with other lines, as on another device."""
        return LineMask([change(line) for line in self.lines], self.form)


def outside_mask(lines: Sequence[Tensor]) -> Tensor:
    """(N, 1, *size): the largest of the (N, length) lines of its axes at each pixel, so 1 where any of them is 1."""
    axes = len(lines)
    return reduce(
        torch.maximum,
        [line.view(-1, 1, *[1] * axis, line.shape[1], *[1] * (axes - 1 - axis)) for axis, line in enumerate(lines)],
    )


def blend_rows(own: Tensor, other: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """weight * own + (1 - weight) * other, in `arithmetic` of the dtype, rounded once.

    weight is (N, ...) and broadcastable to `own`; `out` may be `own` itself.
    """
    if is_traced(own, other, weight):
        return _written(_blend(own, other, weight), out)
    if own.dtype in _FULL or not own.is_cpu:
        return _blend(own, other, weight, out)
    # In pieces: temporaries of a whole batch leave the cache, and their pages are taken from the system each time.
    out = torch.empty_like(own) if out is None else out
    rows = max(1, _PIECE * own.shape[0] // own.numel())
    for piece in zip(*(t.split(rows) for t in (own, other, weight, out)), strict=True):
        _blend(*piece)
    return out


def blend_partner(
    x: Tensor, partner: Tensor, weight: Tensor | LineMask, *, shift: int | None = None, out: Tensor | None = None
) -> Tensor:
    """weight * x + (1 - weight) * x[partner], rounded as in `blend_rows`; `out` may be `x` itself.

    `shift` says that partner[i] = (i + shift) mod N.
    """
    in_place = out is x
    if isinstance(weight, LineMask) and (is_traced(x) or not _has_large_rows(x)):
        weight = weight.whole()
    if isinstance(weight, Tensor) and is_traced(x, weight):
        return _written(_blend(x, _gather(x, partner), weight), out)
    if shift is not None and x.dtype in _FULL and x.is_cpu and not in_place:
        return _blend_blocks(x, weight, shift, torch.empty_like(x) if out is None else out)
    partners = partner.tolist() if _has_large_rows(x) else []
    cycles = cycles_of(partners) if in_place else []
    if not partners or cycles is None:
        whole = weight.whole() if isinstance(weight, LineMask) else weight
        return blend_rows(x, _gather(x, partner), whole, out=out)
    out = torch.empty_like(x) if out is None else out
    rows, outs = x.unbind(0), out.unbind(0)
    weights = weight if isinstance(weight, LineMask) else weight.unbind(0)
    if not in_place:
        for i, j in enumerate(partners):
            _blend(rows[i], rows[j], weights[i], outs[i])
    for i, other in along_cycles(rows, cycles, Tensor.clone):
        _blend(rows[i], other, weights[i], outs[i])
    return out


def _blend_blocks(x: Tensor, weight: Tensor | LineMask, shift: int, out: Tensor) -> Tensor:
    """`blend_partner` of a cyclic shift, not in place."""
    rows = x.shape[0]
    step = rows if isinstance(weight, Tensor) else max(1, _PIECE // math.prod(weight.size))
    for first, last, partner in ((0, rows - shift, shift), (rows - shift, rows, 0)):
        for start in range(first, last, step):
            stop = min(start + step, last)
            share = weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)
            other = x[partner + start - first : partner + stop - first]
            _blend(x[start:stop], other, share, out[start:stop])
    return out


def paste_boxes(x: Tensor, partner: Tensor, box: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x with the pixels inside each row's half-open box (N, S, 2) taken from the partner; `out` may be `x` itself.

    Bits are copied: exact in every dtype, and what lies under a box does not leak through, be it NaN.
    """
    if is_traced(x) or not x.is_cpu:
        return _paste_mask(x, partner, box, out)
    partners = partner.tolist()
    cycles = cycles_of(partners) if out is x else []
    if cycles is None:
        return _paste_mask(x, partner, box, out)
    # One thread writes a box while its row is in the cache; several copy the batch faster than one can.
    row_by_row = _has_large_rows(x) and torch.get_num_threads() == 1
    if out is not x:
        out = torch.empty_like(x) if out is None else out
        if not row_by_row:
            out.copy_(x)
    rows, mixed, places = as_array(x), as_array(out), _places(box)
    if out is not x:
        for own, row, j, place in zip(mixed, rows, partners, places, strict=True):
            if row_by_row:
                own[...] = row
            own[place] = rows[j][place]
    for cycle in cycles:
        first, last = cycle[0], cycle[-1]
        saved = rows[first][places[last]].copy()
        for i, j in pairwise(cycle):
            rows[i][places[i]] = rows[j][places[i]]
        rows[last][places[last]] = saved
    mark_written(out)
    return out


def cycles_of(partner: list[int]) -> list[list[int]] | None:
    """The cycles of a permutation: each row's partner follows it, the last one's is the first. None if rows repeat."""
    cycles = []
    seen = [False] * len(partner)
    for first in range(len(partner)):
        cycle, i = [], first
        while not seen[i]:
            seen[i] = True
            cycle.append(i)
            i = partner[i]
        if cycle and i != first:
            return None
        if cycle:
            cycles.append(cycle)
    return cycles


def along_cycles(rows: Sequence[Row], cycles: list[list[int]], save: Callable[[Row], Row]) -> Iterator[tuple[int, Row]]:
    """(i, the row that i is mixed with) in an order in which each row is read before it is written."""
    for cycle in cycles:
        saved = save(rows[cycle[0]])
        for i, j in pairwise(cycle):
            yield i, rows[j]
        yield cycle[-1], saved


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What values of a batch are blended and resampled in: float32, and float64 for what float32 can't hold."""
    return torch.float64 if dtype in (torch.float64, torch.int32, torch.int64) else torch.float32


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers that an integer dtype holds, still as floats; `values` may be written."""
    values = values.round_()
    return values.clamp_(max=_LARGEST_INT64) if dtype == torch.int64 else values


def is_traced(*tensors: Tensor) -> bool:
    """Something watches the operations: the compiler, autograd, a function transform, or a tensor subclass."""
    if torch.compiler.is_compiling() or is_transformed():
        return True
    grad = torch.is_grad_enabled()
    return any(type(t) is not Tensor or (grad and t.requires_grad) for t in tensors)


def as_array(x: Tensor) -> np.ndarray:
    """The memory of `x` as integers of the same width. Who writes to it calls `mark_written`."""
    return x.detach().view(_BITS[x.itemsize]).numpy()


def mark_written(x: Tensor) -> None:
    """Tell autograd of what NumPy wrote behind its back."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _blend(own: Tensor, other: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    if own.dtype in _FULL:
        return torch.lerp(other, own, weight if weight.dtype == own.dtype else weight.to(own.dtype), out=out)
    wide = arithmetic(own.dtype)
    mixed = torch.lerp(other.to(wide), own.to(wide), weight.to(wide))
    if not own.is_floating_point():
        mixed = nearest(mixed, own.dtype)
    if own.dtype == torch.uint8:
        mixed = mixed.to(torch.int32)  # float32 -> int32 -> uint8 is vectorised on a CPU, float32 -> uint8 is not
    return _written(mixed.to(own.dtype) if out is None else mixed, out)


def _paste_mask(x: Tensor, partner: Tensor, box: Tensor, out: Tensor | None) -> Tensor:
    mask = box_mask(box, tuple(x.shape[2:]))
    own, other = x, _gather(x, partner)
    if torch.compiler.is_compiling() and not x.is_floating_point() and x.itemsize < 4:
        own, other = own.int(), other.int()  # compiled for a CPU, narrow integers are selected one by one
    return _written(torch.where(mask > 0, own, other).to(x.dtype), out)


def _written(mixed: Tensor, out: Tensor | None) -> Tensor:
    return mixed if out is None else out.copy_(mixed)


def _gather(x: Tensor, partner: Tensor) -> Tensor:
    """x[partner] in the memory format of `x`, which `index_select` alone would not keep."""
    if not is_traced(x):
        return torch.index_select(x, 0, partner, out=torch.empty_like(x))
    return x.index_select(0, partner) if x.is_contiguous() else x[partner]


def _has_large_rows(x: Tensor) -> bool:
    return x.is_cpu and x.nbytes >= _LARGE_ROW_BYTES * x.shape[0]


def _places(box: Tensor) -> list[tuple[slice, ...]]:
    """Each row's box (S, 2) as an index into its (C, *spatial) pixels."""
    slices = [map(slice, *ends.tolist()) for ends in box.permute(1, 2, 0).unbind(0)]
    return list(zip(repeat(slice(None)), *slices))
