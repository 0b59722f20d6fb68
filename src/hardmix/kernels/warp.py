"""Resampling whole images: a partner shrunk into a box, an affine map for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.kernels import blend

#: Rows of at least this many values are visited one by one on a CPU, so that only the pixels inside the box are
#: computed.
_LARGE_ROW = 1 << 14


def resize_into_boxes(x: Tensor, partner: Tensor, box: Tensor) -> Tensor:
    """Each row's partner, shown whole inside the row's box by (bi-, tri-)linear interpolation.

    Args:
        x: (N, C, *spatial) with 1 to 3 spatial axes.
        partner: (N,) rows.
        box: (N, S, 2) half-open [start, stop), whole or fractional pixels; not empty.

    Returns:
        Like `x`. What stands outside the boxes is finite where `x` is, and means nothing. Corners are not aligned: the
        outer edges of the partner's border pixels fall on the edges of the box, as in `F.interpolate`.
    """
    if _row_by_row(x, box):
        rows = blend.as_array(x)
        return _fill_windows(torch.zeros_like(x), box, ((i, rows[j]) for i, j in enumerate(partner.tolist())))
    other = x.index_select(0, partner)
    ends = [(box[:, axis, 0] == 0) & (box[:, axis, 1] == length) for axis, length in enumerate(x.shape[2:])]
    whole = reduce(torch.logical_and, ends)  # (N,) nothing is resized there, and nothing rounded
    out = torch.where(whole.view(-1, *[1] * (x.ndim - 1)), other, _resample(other, _positions(x, box)))
    return _as_laid_out(x, out)


def paste_resized(x: Tensor, partner: Tensor, box: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x with each row's partner shown whole inside the row's box of whole pixels; `out` may be `x` itself."""
    if _row_by_row(x, box):
        partners = partner.tolist()
        cycles = blend.cycles_of(partners) if out is x else None
        if cycles is not None:
            return _fill_windows(x, box, blend.along_cycles(list(blend.as_array(x)), cycles, np.copy))
        rows = blend.as_array(x.clone() if out is x else x)
        sources = ((i, rows[j]) for i, j in enumerate(partners))
        return _fill_windows(torch.empty_like(x) if out is None else out, box, sources, around=rows)
    if out is x:
        x = x.clone()  # a row may be its partner's partner
    other = _as_laid_out(x, _resample(x.index_select(0, partner), _positions(x, box)))
    return blend.blend_rows(x, other, blend.box_mask(box, tuple(x.shape[2:])), out=out)


def nearest_into_boxes(y: Tensor, partner: Tensor, box: Tensor) -> Tensor:
    """`resize_into_boxes` for class ids (N, *spatial) and whole pixels: the nearest entry, so no new id appears."""
    index: list[Tensor] = [partner.view(-1, *[1] * (y.ndim - 1))]
    for axis, length in enumerate(y.shape[1:]):
        start, stop = box[:, axis, :1], box[:, axis, 1:]
        at = 2 * (torch.arange(length, device=box.device) - start) + 1
        near = (at * length // (2 * (stop - start))).clamp(0, length - 1)  # (N, length)
        index.append(near.view(-1, *[length if other == axis else 1 for other in range(y.ndim - 1)]))
    return y[tuple(index)]


def affine(x: Tensor, matrix: Tensor) -> Tensor:
    """Images (N, C, H, W) read at matrix @ (column, row, 1), bilinearly, black outside.

    matrix (N, 2, 3) maps coordinates from -1 to 1 along each axis (the outer edges of the border pixels) of the output
    to those of the input.
    """
    rows, columns = (_centres(0, length, length, x) for length in x.shape[2:])
    m = matrix[:, None, None].to(columns.dtype)
    # Only the last sum has the size of the image.
    grid = (m[..., 0] * columns[:, None] + m[..., 2]) + m[..., 1] * rows[:, None, None]  # (N, H, W, 2)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def _row_by_row(x: Tensor, box: Tensor) -> bool:
    if blend.is_traced(x) or not x.is_cpu:
        return False
    return not box.is_floating_point() and x[0].numel() >= _LARGE_ROW


def _as_laid_out(x: Tensor, out: Tensor) -> Tensor:
    """`out` in the memory format of `x`."""
    return out if out.stride() == x.stride() else torch.empty_like(x).copy_(out)


def _fill_windows(
    out: Tensor, box: Tensor, sources: Iterable[tuple[int, np.ndarray]], around: np.ndarray | None = None
) -> Tensor:
    """`out` with the source (C, *spatial) of each row resized into its box.

    Args:
        sources: (row, bits of what is shown in its box), as `blend.as_array` gives them.
        around: (N, C, *spatial) bits of what stands around the boxes; None leaves what is there.
    """
    grid_of = _grids_of_windows(_positions(out, box))
    # Sampling a row straight from memory jumps about in it, so it is streamed in first. NumPy copies what is copied: to
    # wake a second thread for one row takes longer than the row.
    near = torch.empty_like(out[:1])
    mixed, streamed = blend.as_array(out), blend.as_array(near)
    windows = [tuple(slice(start, stop) for start, stop in edges) for edges in box.tolist()]
    everything = tuple(slice(0, length) for length in out.shape[2:])
    for row, source in sources:
        if windows[row] == everything:  # nothing is resized, and nothing rounded
            mixed[row] = source
            continue
        streamed[0] = source
        if around is not None:
            mixed[row] = around[row]  # here, where the row stays in the cache for what follows
        place = (slice(None), *windows[row])
        mixed[row][place] = blend.as_array(_sample(near, grid_of(row, windows[row])))[0]
    blend.mark_written(out)
    return out


def _positions(x: Tensor, box: Tensor) -> list[Tensor]:
    """For each axis (N, length): where its pixels stand in each row's box, -1 at the start and 1 at the stop."""
    return [_centres(box[:, axis, :1], box[:, axis, 1:], length, x) for axis, length in enumerate(x.shape[2:])]


def _centres(start: Tensor | int, stop: Tensor | int, length: int, like: Tensor) -> Tensor:
    """The centres of `length` pixels, with -1 at `start` and 1 at `stop`. (length,) or (N, length)"""
    centre = torch.arange(length, device=like.device, dtype=blend.arithmetic(like.dtype)) + 0.5
    return (centre - start) * 2.0 / (stop - start) - 1.0


def _resample(x: Tensor, positions: list[Tensor]) -> Tensor:
    """x (N, C, *spatial) read at the product of the positions (N, length) of its axes, linearly, borders repeated."""
    return _sample(x, _grid(positions))


def _grid(positions: list[Tensor]) -> Tensor:
    """The product of positions (N, length) of up to three axes: (N, *lengths, axes), the last axis first."""
    count, lengths = len(positions), [at.shape[1] for at in positions]
    axes = [
        at.view(-1, *[lengths[axis] if other == axis else 1 for other in range(count)]).expand(-1, *lengths)
        for axis, at in enumerate(positions)
    ]
    return torch.stack(axes[::-1], -1)


def _grids_of_windows(positions: list[Tensor]) -> Callable[[int, tuple[slice, ...]], Tensor]:
    """grid_of(row, window): `_grid` of a window of one row."""
    if len(positions) != 2:
        return lambda row, window: _grid(
            [along[row : row + 1, part] for along, part in zip(positions, window, strict=True)]
        )
    # The sum of an imaginary column and a real row writes both coordinates in one pass; stacking takes two.
    zero = torch.zeros_like(positions[0][:1, :1])
    down = torch.complex(*torch.broadcast_tensors(zero, positions[0]))[:, :, None]
    along = torch.complex(*torch.broadcast_tensors(positions[1], zero))[:, None]
    return lambda row, window: torch.view_as_real(down[row : row + 1, window[0]] + along[row : row + 1, :, window[1]])


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    """x (N, C, *spatial) read at the (N, ..., axes) places of a grid."""
    if x.ndim == 3:  # grid_sample starts at two axes
        middle = torch.zeros_like(grid)
        return _sample(x[:, :, None], torch.cat([grid, middle], -1)[:, None])[:, :, 0]
    out = F.grid_sample(x.to(grid.dtype), grid, padding_mode="border", align_corners=False)
    return (out if x.is_floating_point() else blend.nearest(out, x.dtype)).to(x.dtype)
