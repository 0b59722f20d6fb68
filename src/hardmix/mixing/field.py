"""Smooth random fields and their largest pixels: the mask of FMix."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from hardmix._math import CPU, settled, wide
from hardmix.mixing.draw import normal

SPECTRA = ("isotropic", "released")
#: Share of the field's energy that may be left out, times what the sum over the lowest frequencies comes to. Two images
#: side by side of the field with and without the rest differ in about 0.1 % of the mask's pixels.
_NEGLIGIBLE = 1.2e-5
#: Rows longer than this are thresholded by looking closely only at the pixels near the threshold.
_LONG_ROW = 512
#: Pixels for each thread whose field is there at a time: few enough to keep their memory, enough to be worth sharing.
_PIECE = 1 << 20
#: As many threads are counted at least and at most. One thread alone takes the pieces of two.
_THREADS = (2, 16)


def low_frequency_mask(
    keep: Tensor, size: tuple[int, ...], decay: float, spectrum: str, generator: Generator | None
) -> Tensor:
    """(rows, *size) bool with exactly keep[r] True in row r: the largest pixels of a `low_frequency_field`."""
    rows, pixels = keep.shape[0], math.prod(size)
    weights, waves = _draw_weights(rows, size, decay, spectrum, generator)
    # In pieces: a field of the whole batch leaves the cache, and its pages are taken from the system each time. Not in
    # many: each is some dozen operations at whose ends all threads meet. The last bit of a field depends on the piece.
    piece = rows
    if not torch.compiler.is_compiling():
        piece = max(1, _PIECE * min(max(torch.get_num_threads(), _THREADS[0]), _THREADS[1]) // pixels)
    masks = [
        largest(_sum_waves(part, waves).flatten(1), kept)
        for part, kept in zip(weights.split(piece), keep.split(piece), strict=True)
    ]
    return torch.cat(masks).view(rows, *size)


def low_frequency_field(
    rows: int, size: tuple[int, ...], decay: float, spectrum: str, generator: Generator | None
) -> Tensor:
    """(rows, *size) float32 Gaussian fields of amplitude max(f, 1 / longest side)^-decay at the frequency f per pixel.

    The transform is a product of cosine and sine tables, one matrix product for each axis, over the low frequencies
    that carry the energy: at decay 3 these are 12 of 112 cycles of a 224-pixel side, a tenth of the work of an FFT.
    """
    return _sum_waves(*_draw_weights(rows, size, decay, spectrum, generator))


def _draw_weights(
    rows: int, size: tuple[int, ...], decay: float, spectrum: str, generator: Generator | None
) -> tuple[Tensor, list[Tensor]]:
    """The weight of each product of waves, (rows, frequencies, ...), and the waves of each axis."""
    axes, longest = len(size), max(size)
    tail = 2.0 * decay - axes  # energy above K cycles ~ K^-tail / tail
    exponent = math.log(_NEGLIGIBLE * tail) / -tail if tail > 0 else math.inf
    cycles = math.exp(exponent) if exponent < 20 else math.inf
    limits = [min(length // 2, math.ceil(min(cycles * length / longest, length))) for length in size]
    if spectrum == "released":
        limits = [min(limits[0], size[1] // 2), 1]
        weights = _released(rows, size, limits[0], decay, generator)
    else:
        weights = normal((rows, *(2 * limit + 1 for limit in limits)), generator)
        weights = weights * settled(_amplitude(size, limits, decay))
    return weights, [_waves(length, limit) for length, limit in zip(size, limits, strict=True)]


def _sum_waves(weights: Tensor, waves: list[Tensor]) -> Tensor:
    for along in waves:
        # Contracts the first frequency axis and appends the space axis, so that the order is right at the end.
        weights = torch.tensordot(weights, along, dims=([1], [0]))
    return weights


def _waves(length: int, limit: int) -> Tensor:
    """(2 limit + 1, length): cosines of 0..limit cycles, then sines of 1..limit cycles."""
    at = _whole(length) / length
    cosine = torch.cos(2.0 * math.pi * _whole(limit + 1)[:, None] * at)
    sine = torch.sin(2.0 * math.pi * _whole(limit + 1)[1:, None] * at)
    return torch.cat([cosine, sine])


def _whole(count: int) -> Tensor:
    """0 to count - 1 in float32."""
    return torch.arange(count, dtype=torch.float32, device=CPU)


def _frequencies(length: int, limit: int) -> Tensor:
    """The frequency per pixel of each row of `_waves`."""
    cycles = _whole(limit + 1)
    return torch.cat([cycles, cycles[1:]]) / length


def _amplitude(size: tuple[int, ...], limits: list[int], decay: float) -> Tensor:
    """Amplitude of each product of waves. A wave of no cycles has twice the energy of a cosine, hence the root of 2."""
    square = torch.zeros((), dtype=torch.float32, device=CPU)
    scale = torch.ones((), dtype=torch.float32, device=CPU)
    for length, limit in zip(size, limits, strict=True):
        along = _frequencies(length, limit)
        square = square[..., None] + along**2
        scale = scale[..., None] * torch.where(along > 0, torch.full_like(along, math.sqrt(2.0)), 1.0)
    longest = max(size)
    # In units of the lowest frequency: the power of a small number would leave float32 for a steep decay.
    return scale * (square.sqrt() * longest).clamp(min=1.0) ** -decay


def _released(rows: int, size: tuple[int, ...], limit: int, decay: float, generator: Generator | None) -> Tensor:
    """Weights of the authors' field, Re(B_0(y)) + 2 Re(B_1(y) exp(2 pi i x / W)) with B_c(y) = sum_k A_kc exp(2 pi i k
    y / H).

    A_kc = a_kc + i b_kc, where a takes its amplitude from the spectrum's row 0 (no cycle of height) and b from row 1
    (one cycle), both at k cycles of the *width*. Written out in products of cosines and sines. (rows, 2 limit + 1, 3)
    """
    height, width = size
    longest = max(size)
    across = _whole(limit + 1) / width
    noise = normal((2, rows, limit + 1, 2), generator)
    a, b = (
        noise[row] * ((across**2 + (row / height) ** 2).sqrt() * longest).clamp(min=1.0)[:, None] ** -decay
        for row in (0, 1)
    )
    one = torch.stack([a[..., 0], 2.0 * a[..., 1], -2.0 * b[..., 1]], -1)  # times cos k y: 1, cos x, sin x
    two = torch.stack([-b[..., 0], -2.0 * b[..., 1], -2.0 * a[..., 1]], -1)[:, 1:]  # times sin k y
    return torch.cat([one, two], 1)


def largest(values: Tensor, keep: Tensor) -> Tensor:
    """(rows, P) bool with exactly keep[r] True in row r: its largest values, ties to the first.

    Sorting 50,000 pixels costs more than all the rest of a mask. A long row is cut down first: quantiles of a sample of
    the row bound the threshold, pixels above are in and below are out, and only those between are sorted. NaN is never
    among the largest of a long row.
    """
    rows, pixels = values.shape
    if pixels <= _LONG_ROW or values.device.type != "cpu":
        return _largest_by_sorting(values, keep)
    if torch.compiler.is_compiling():
        return _largest_as_one(values, keep)
    step = math.isqrt(pixels) // 4 | 1  # odd: an even step would visit every other column only
    sample = _sorted(values[:, ::step])
    count = sample.shape[1]
    edge = values.new_full((rows, 1), math.inf)
    sample = torch.cat([-edge, sample, edge], 1)
    wanted, margin = count - keep * count // pixels, count // 64 + 2
    while True:
        high = sample.gather(1, (wanted + margin + 1).clamp(0, count + 1)[:, None])
        low = sample.gather(1, (wanted - margin + 1).clamp(0, count + 1)[:, None])
        chosen = values > high
        row, at = ((values >= low) ^ chosen).nonzero(as_tuple=True)
        number = row.bincount(minlength=rows)
        missing = keep - chosen.view(torch.uint8).sum(1, dtype=torch.int32)  # 3 times faster than a sum of bools
        if margin > count or not bool(((missing < 0) | (missing > number)).any()):
            break
        margin *= 4  # the sample misled
    between = values[row, at]
    place = torch.arange(row.shape[0], device=CPU) - (number.cumsum(0) - number)[row]
    padded = values.new_full((rows, int(number.max()) + 1), -math.inf)
    padded[row, place] = between
    padded[:, -1] = math.inf  # what is above all, where none is missing
    threshold = _sorted(padded).gather(1, (padded.shape[1] - 1 - missing).clamp_(min=0)[:, None])[row, 0]
    above = between >= threshold
    if int(above.sum()) > int(missing.sum()):  # ties: as many of them as are missing, the first ones
        padded[:, -1] = -math.inf
        above = _largest_by_sorting(padded, missing)[row, place]
    chosen[row, at] = above
    return chosen


@torch.library.custom_op("hardmix::largest", mutates_args=(), schema="(Tensor values, Tensor keep) -> Tensor")
def _largest_as_one(values: Tensor, keep: Tensor) -> Tensor:
    """`largest` as one operation of a compiled graph, which can't hold its loop and would have to sort whole rows."""
    return largest(values, keep)


@_largest_as_one.register_fake
def _(values: Tensor, keep: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.bool)


def _sorted(values: Tensor) -> Tensor:
    """Rows in ascending order, by NumPy, which is many times faster at it."""
    return torch.from_numpy(np.sort(values.detach().to(wide(values.dtype)).numpy(), axis=1)).to(values.dtype)


def _largest_by_sorting(values: Tensor, keep: Tensor) -> Tensor:
    order = values.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(values.shape[1], device=values.device) < keep[:, None]
    return torch.zeros_like(first).scatter_(1, order, first)
