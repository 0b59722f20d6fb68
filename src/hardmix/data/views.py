"""Augmentation of whole batches: every sample has its own draws, and no Python loop looks at samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix.data.strong_views import cutout, luma_weights, randaugment
from hardmix.kernels.blend import box_mask
from hardmix.mixing.draw import cpu_generator, move, uniform

#: "crop" pads each side by the length divided by this (4 pixels of 32) and cuts the original size out
CROP_PADDING_SHARE = 8
#: share of the area and aspect ratio of the box that "resized-crop" scales up
CROP_SCALE, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
#: "color" multiplies brightness, contrast and saturation by 1 - s to 1 + s
COLOR_STRENGTH = 0.2
#: chance of a box, its share of the area and its aspect ratio in "erase"
ERASE_CHANCE, ERASE_SCALE, ERASE_RATIO = 0.5, (0.02, 1 / 3), (0.3, 10 / 3)


class Grid:
    """Where each output pixel comes from: out[n, :, i, j] = x[n, :, rows[n, i], cols[n, j]], blank where either is
    negative.

    Flips and crops change only these small maps, so any run of them reads the pixels once.

    Attributes:
        rows, cols: (N, H) and (N, W) long on the CPU.
    """

    def __init__(self, n: int, height: int, width: int) -> None:
        self.rows = torch.arange(height).expand(n, height)
        self.cols = torch.arange(width).expand(n, width)

    def read(self, x: Tensor) -> Tensor:
        """The picture that the maps describe, from `x` (N, C, H, W)."""
        if bool((self.rows < 0).any() or (self.cols < 0).any()):
            # one zero row and column at the end, which is where -1 points
            x = F.pad(x, (0, 1, 0, 1))
        n, channels, height, width = x.shape
        rows, cols = move(self.rows % height, x.device), move(self.cols % width, x.device)
        index = (rows[:, :, None] * width + cols[:, None, :]).view(n, 1, -1)
        out = x.reshape(n, channels, -1).gather(2, index.expand(n, channels, -1))
        return out.view(n, channels, rows.shape[1], cols.shape[1])


def _flip(grid: Grid, generator: Generator | None) -> None:
    """Mirror half of the samples left to right."""
    mirrored = torch.rand(grid.cols.shape[0], 1, generator=generator) < 0.5
    grid.cols = torch.where(mirrored, grid.cols.flip(1), grid.cols)


def _crop(grid: Grid, generator: Generator | None) -> None:
    """Pad by reflection and cut out the original size."""
    grid.rows = _shifted(grid.rows, generator, blank=False)
    grid.cols = _shifted(grid.cols, generator, blank=False)


def _crop_zero(grid: Grid, generator: Generator | None) -> None:
    """Pad with zeros and cut out the original size."""
    grid.rows = _shifted(grid.rows, generator, blank=True)
    grid.cols = _shifted(grid.cols, generator, blank=True)


def _shifted(at: Tensor, generator: Generator | None, *, blank: bool) -> Tensor:
    """The map (N, L) moved by -pad to pad whole pixels; what comes in is reflected, or blank (-1)."""
    n, length = at.shape
    pad = min(length - 1, max(1, length // CROP_PADDING_SHARE))
    place = torch.arange(length) + torch.randint(-pad, pad + 1, (n, 1), generator=generator)  # (N, L)
    mirrored = (length - 1) - ((length - 1) - place.abs()).abs()  # one reflection at either end
    moved = at.gather(1, mirrored)
    return moved.masked_fill_(place != mirrored, -1) if blank else moved


def _resized_crop(x: Tensor, generator: Generator | None) -> Tensor:
    """Scale a random box up to the whole picture (bilinear; a box never needs shrinking, so nothing aliases)."""
    n, _, height, width = x.shape
    area = uniform(*CROP_SCALE, (n,), generator)
    ratio = uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), (n,), generator).exp() * height / width
    # shares of the width and the height; a box that would stick out is cut
    share = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1.0)  # (N, 2)
    centre = (1.0 - share) * (2.0 * torch.rand(n, 2, generator=generator) - 1.0)  # in -1..1, the box inside
    theta = move(torch.cat([torch.diag_embed(share), centre[:, :, None]], 2), x.device)  # (N, 2, 3)
    places = F.affine_grid(theta, list(x.shape), align_corners=False)
    out = F.grid_sample(x.to(torch.float32), places, padding_mode="border", align_corners=False)
    return _like(out, x)


def _color(x: Tensor, generator: Generator | None) -> Tensor:
    """Brightness, then contrast around the mean luma, then saturation (three channels only)."""
    n, channels, height, width = x.shape
    top = 1.0 if x.is_floating_point() else 255.0
    factor = move(uniform(1.0 - COLOR_STRENGTH, 1.0 + COLOR_STRENGTH, (3, n, 1, 1, 1), generator), x.device)
    weight = luma_weights(channels, x.device)
    # in place from here on: the batch is the only large allocation
    out = x.to(torch.float32, copy=True).mul_(factor[0]).clamp_(0.0, top)
    middle = (out.mean((2, 3)) @ weight).view(n, 1, 1, 1)
    out.sub_(middle).mul_(factor[1]).add_(middle).clamp_(0.0, top)
    if channels == 3:
        luma = torch.matmul(weight, out.flatten(2)).view(n, 1, height, width)
        out.sub_(luma).mul_(factor[2]).add_(luma).clamp_(0.0, top)
    return _like(out, x)


def _erase(x: Tensor, generator: Generator | None) -> Tensor:
    """Paint a box of half of the samples with the sample's mean color."""
    n, _, height, width = x.shape
    area = uniform(*ERASE_SCALE, (n,), generator) * height * width
    ratio = uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1]), (n,), generator).exp()
    lengths = torch.tensor([height, width])
    side = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).round().long()  # (N, 2)
    side = torch.minimum(side.clamp(min=1), lengths)
    side[torch.rand(n, generator=generator) >= ERASE_CHANCE] = 0
    start = (torch.rand(n, 2, generator=generator) * (lengths - side + 1)).long()
    outside = box_mask(move(torch.stack([start, start + side], 2), x.device), (height, width)) > 0
    fill = _like(x.mean((2, 3), dtype=torch.float32, keepdim=True), x)
    return torch.where(outside, x, fill)


#: views that only move pixels, and views that compute new ones
MOVES: dict[str, Callable[[Grid, Generator | None], None]] = {"flip": _flip, "crop": _crop, "crop-zero": _crop_zero}
PAINTS: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {
    "resized-crop": _resized_crop,
    "color": _color,
    "erase": _erase,
    "randaugment": randaugment,
    "cutout": cutout,
}


class Augment:
    """Random views of a batch, applied in the order of their names.

    flip          mirror left to right, half of the samples
    crop          pad by an eighth of each side (reflection), cut out the original size
    crop-zero     the same with zeros around
    resized-crop  scale a box of 20 % to 100 % of the area up to the whole picture
    color         brightness, contrast, saturation, each times 0.8 to 1.2
    erase         paint a box of 2 % to 33 % of the area with the mean color, half of the samples
    randaugment   two operations of 14 (contrast, posterize, rotate ...) at random strengths; on 256 levels
    cutout        paint a square mid-grey, its side up to half of the shorter one

    Args:
        names: any of these, none is fine and changes nothing.

    >>> Augment(["flip", "crop"])(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([8, 3, 32, 32])
    """

    def __init__(self, names: Iterable[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"Augment: names is {names!r}; pass a list of names.")
        self.names = tuple(_check.choice("Augment", "names", name, [*MOVES, *PAINTS]) for name in names)

    def __repr__(self) -> str:
        return f"Augment({list(self.names)})"

    def __call__(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """A view of each sample of `x` (N, C, H, W), before normalisation. `x` is never written.

        Args:
            x: uint8, or floats in 0..1; dtype, device and memory format are kept.
            generator: CPU generator; draws happen on the CPU, so every device sees the same views.
        """
        x = _check.batch("Augment", "x", x, 4, 4)
        cpu_generator("Augment", generator)
        if not x.is_floating_point() and x.dtype != torch.uint8:
            raise TypeError(f"Augment: x has dtype {x.dtype}; pass uint8 values or floats in 0..1.")
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        out, grid = x, None
        for name in self.names:
            if name in MOVES:
                grid = grid or Grid(x.shape[0], *x.shape[2:])
                MOVES[name](grid, generator)
            else:
                out, grid = PAINTS[name](out if grid is None else grid.read(out), generator), None
        out = out if grid is None else grid.read(out)
        return out.contiguous(memory_format=torch.channels_last) if channels_last else out


class Normalize(nn.Module):
    """uint8 pixels to normalised floats: (x / 255 - mean) / std per channel.

    Floats are taken as 0..1 already. uint8 becomes float32; floats keep their dtype. `x` is never written.

    Args:
        mean, std: one number per channel, of pixels scaled to 0..1 (`ImageData.mean`, `ImageData.std`).

    >>> Normalize([0.5], [0.25])(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
    2.0
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise ValueError(f"Normalize: mean has {len(mean)} entries and std {len(std)}; pass one per channel.")
        self.mean = tuple(_check.number("Normalize", "mean", value) for value in mean)
        self.std = tuple(_check.positive("Normalize", "std", value) for value in std)
        # fixed by the data set, so they travel with .to() but don't belong into a checkpoint
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, -1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x` (N, C, H, W)."""
        x = _check.batch("Normalize", "x", x, 4, 4)
        if x.shape[1] != len(self.mean):
            raise ValueError(
                f"Normalize: x has {x.shape[1]} channels but mean has {len(self.mean)}; pass one per channel."
            )
        if x.dtype == torch.uint8:
            return x.to(torch.float32).sub_(self._mean * 255.0).div_(self._std * 255.0)
        if not x.is_floating_point():
            raise TypeError(f"Normalize: x has dtype {x.dtype}; pass uint8 values or floats in 0..1.")
        return (x - self._mean.to(x.dtype)).div_(self._std.to(x.dtype))


def _like(values: Tensor, x: Tensor) -> Tensor:
    """float32 results, which may be written, in the dtype of `x`."""
    return values.to(x.dtype) if x.is_floating_point() else values.round_().clamp_(0, 255).to(torch.uint8)
