"""Strong views of whole batches, as semi-supervised learning wants them: RandAugment and cutout.

The operations are those of PIL on 8 bits: `x` is (n, C, H, W) uint8, one sub-batch of samples that drew the operation,
and `level` is (n, 1, 1, 1), uniform in [0, 1), which each maps to its own range. None writes into `x`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hardmix._math import wide
from hardmix.kernels.blend import box_mask
from hardmix.mixing.draw import move, uniform

#: operations that "randaugment" does to each sample, one after the other
ROUNDS = 2
#: longest side of the square of "cutout", as a share of the picture's shorter side
CUTOUT_SHARE = 0.5
#: what is painted where no pixel is: 0.5, rounded to 8 bits for uint8
GREY, GREY_LEVEL = 0.5, 128

#: luma of red, green, blue
LUMA = (0.299, 0.587, 0.114)


def luma_weights(channels: int, device: torch.device) -> Tensor:
    """(C,) weights of the channels in the luma; other than three count alike."""
    return move(torch.tensor(LUMA if channels == 3 else [1.0 / channels] * channels), device)


def randaugment(x: Tensor, generator: Generator | None) -> Tensor:
    """RandAugment: two operations of 14, drawn with replacement, each at a uniform strength (FixMatch's ranges).

    What moves pixels takes the nearest one and fills with mid-grey, which the second operation sees as any other pixel.
    Floats are rounded to 256 levels, which the operations are defined on, so no gradient flows back; a sample with a
    NaN comes out as NaN. Both operations are always done, as the paper has it; its code skips each half of the time.
    Reference: Sohn et al. 2020, appendix (arXiv:2001.07685); Cubuk et al. 2020 (arXiv:1909.13719).
    """
    n = x.shape[0]
    drawn = torch.randint(len(OPERATIONS), (ROUNDS, n), generator=generator)
    level = uniform(0.0, 1.0, (ROUNDS, n), generator)
    # Samples are laid out by operation, so that each operation sees one slice, and put back in their places after it.
    order = drawn.argsort(dim=1, stable=True)
    sizes = [torch.bincount(row, minlength=len(OPERATIONS)).tolist() for row in drawn]
    rows, level = move(torch.stack([order, order.argsort(dim=1)], 1), x.device), move(level.gather(1, order), x.device)
    pixels = x if x.dtype == torch.uint8 else (x.to(wide(x.dtype)) * 255.0).round_().clamp_(0, 255).to(torch.uint8)
    for (there, back), strength, size in zip(rows, level, sizes, strict=True):
        parts = zip(
            OPERATIONS.values(),
            pixels.index_select(0, there).contiguous().split(size),
            strength.view(-1, 1, 1, 1).split(size),
            strict=True,
        )
        done = [operation(part, by) for operation, part, by in parts if part.shape[0]]
        pixels = torch.cat(done).index_select(0, back)
    if x.dtype == torch.uint8:
        return pixels
    lost = x.sum((1, 2, 3), dtype=wide(x.dtype), keepdim=True).mul_(0.0)  # a NaN has no level and would become black
    return pixels.to(lost.dtype).div_(255.0).add_(lost).to(x.dtype)


def cutout(x: Tensor, generator: Generator | None) -> Tensor:
    """Paint a square mid-grey, its side up to half of the picture's shorter one, cut where it sticks out.

    The side is uniform and rounded to whole pixels, which may be none; the centre is uniform over the picture.
    Reference: DeVries and Taylor 2017 (arXiv:1708.04552), with the sides of Sohn et al. 2020 (arXiv:2001.07685).
    """
    n, _, height, width = x.shape
    side = uniform(0.0, CUTOUT_SHARE * min(height, width), (n, 1), generator).round()
    centre = torch.rand(n, 2, generator=generator) * torch.tensor([height, width])
    start = (centre - side / 2).round()
    outside = box_mask(move(torch.stack([start, start + side], 2), x.device), (height, width)) > 0
    return torch.where(outside, x, GREY if x.is_floating_point() else GREY_LEVEL)


def _autocontrast(x: Tensor, level: Tensor) -> Tensor:
    """Each channel stretched to the whole range; a channel of one value stays."""
    low, high = (end.to(torch.int32) for end in (x.amin((2, 3)), x.amax((2, 3))))
    low, span = low[:, :, None], (high - low)[:, :, None]
    values = torch.arange(256, dtype=torch.int32, device=x.device)
    stretched = (values - low).clamp_(min=0) * 255 // span.clamp(min=1)
    return _look_up(x, torch.where(span > 0, stretched, values))


def _brightness(x: Tensor, level: Tensor) -> Tensor:
    """Blended with black, 5 to 95 % of its own."""
    return _blend(0.0, x, level)


def _color(x: Tensor, level: Tensor) -> Tensor:
    """Blended with its luma, 5 to 95 % of its own; only three channels have colors, others stay."""
    if x.shape[1] != 3:
        return x
    return _blend(_luma(x), x, level)


def _contrast(x: Tensor, level: Tensor) -> Tensor:
    """Blended with its mean luma, 5 to 95 % of its own."""
    return _blend(_luma(x).mean((2, 3), keepdim=True).round_(), x, level)


def _equalize(x: Tensor, level: Tensor) -> Tensor:
    """Each channel's values spread evenly over the range. Too few pixels to tell (255 without the brightest) stay."""
    values = x.flatten(2).long()
    count = torch.zeros(*x.shape[:2], 256, dtype=torch.long, device=x.device)
    count.scatter_add_(2, values, count.new_ones(()).expand_as(values))
    # PIL's rule: the brightest value is left out of the step, and what then exceeds the range is cut
    step = (values.shape[2] - count.gather(2, values.amax(2, keepdim=True))) // 255
    spread = (step // 2 + count.cumsum(2) - count) // step.clamp(min=1)
    return _look_up(x, torch.where(step > 0, spread.clamp_(max=255), torch.arange(256, device=x.device)))


def _identity(x: Tensor, level: Tensor) -> Tensor:
    return x


def _posterize(x: Tensor, level: Tensor) -> Tensor:
    """The top 4 to 8 bits."""
    dropped = 4.0 - (5.0 * level).floor().clamp_(max=4.0)
    return x & (256.0 - 2.0**dropped).to(torch.int32).to(torch.uint8)


def _rotate(x: Tensor, level: Tensor) -> Tensor:
    """About the middle, by up to 30 degrees to either side; more than half a level turns counter-clockwise."""
    angle = _signed(level, math.pi / 6)
    columns, rows = _centres(x)
    across, down = columns - x.shape[3] / 2, rows - x.shape[2] / 2
    cos, sin = angle.cos(), angle.sin()
    return _read(x, cos * across - sin * down + x.shape[3] / 2, sin * across + cos * down + x.shape[2] / 2)


def _sharpness(x: Tensor, level: Tensor) -> Tensor:
    """Blended with its blurred self, 5 to 95 % of its own; the outermost pixels stay."""
    if min(x.shape[2:]) < 3:
        return x
    blurred = x.to(torch.float32)
    # PIL's kernel is 1 all over the 3 x 3, and 5 in the middle; slices are summed several times faster than pooled
    total = blurred[:, :, :-2] + blurred[:, :, 1:-1] + blurred[:, :, 2:]
    total = total[..., :-2] + total[..., 1:-1] + total[..., 2:]
    blurred[:, :, 1:-1, 1:-1].mul_(4.0).add_(total).div_(13.0).round_()
    return _blend(blurred, x, level)


def _shear_x(x: Tensor, level: Tensor) -> Tensor:
    """Rows moved by up to 0.3 of their distance from the top."""
    columns, rows = _centres(x)
    return _read(x, columns + _signed(level, 0.3) * rows, rows)


def _shear_y(x: Tensor, level: Tensor) -> Tensor:
    """Columns moved by up to 0.3 of their distance from the left."""
    columns, rows = _centres(x)
    return _read(x, columns, rows + _signed(level, 0.3) * columns)


def _solarize(x: Tensor, level: Tensor) -> Tensor:
    """Values from a threshold up are inverted: all of them at level 0, none at 1."""
    # a mask of bits, as where() on bytes branches at each
    return x ^ (x >= 256.0 * level).to(torch.uint8) * 255


def _translate_x(x: Tensor, level: Tensor) -> Tensor:
    """Up to 0.3 of the width to either side."""
    columns, rows = _centres(x)
    return _read(x, columns + _signed(level, 0.3 * x.shape[3]), rows)


def _translate_y(x: Tensor, level: Tensor) -> Tensor:
    """Up to 0.3 of the height to either side."""
    columns, rows = _centres(x)
    return _read(x, columns, rows + _signed(level, 0.3 * x.shape[2]))


#: What "randaugment" may do to a sample: (x, level) -> x. All are drawn alike.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "equalize": _equalize,
    "identity": _identity,
    "posterize": _posterize,
    "rotate": _rotate,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "solarize": _solarize,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


def _signed(level: Tensor, most: float) -> Tensor:
    """From -most to most."""
    return (2.0 * level - 1.0) * most


def _luma(x: Tensor) -> Tensor:
    """(n, 1, H, W) float32 whole numbers."""
    return (x * luma_weights(x.shape[1], x.device).view(1, -1, 1, 1)).sum(1, keepdim=True).round_()


def _blend(other: Tensor | float, x: Tensor, level: Tensor) -> Tensor:
    """other + f (x - other), f from 0.05 to 0.95, rounded down as PIL does."""
    mixed = (x - other) * (0.05 + 0.9 * level) + other
    return mixed.to(torch.int32).to(
        torch.uint8
    )  # float32 -> int32 -> uint8 is vectorised on a CPU, float32 -> uint8 not


def _look_up(x: Tensor, table: Tensor) -> Tensor:
    """Each value's entry in the table (n, C, 256) of its sample and channel."""
    return table.to(torch.uint8).gather(2, x.flatten(2).long()).view_as(x)


def _centres(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pixels are: columns (W,) and rows (H, 1), counted in pixels from the outer edge."""
    columns, rows = (torch.arange(length, device=x.device) + 0.5 for length in (x.shape[3], x.shape[2]))
    return columns, rows[:, None]


def _read(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """The nearest pixels to the places (n, 1, H, W), or smaller and broadcast; mid-grey outside of the picture."""
    n, channels, height, width = x.shape
    outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
    # one grey pixel at the end, which is where those outside point
    index = (down.long() * width + across.long()).masked_fill_(outside, height * width).view(n, 1, -1)
    return F.pad(x.flatten(2), (0, 1), value=GREY_LEVEL).gather(2, index.expand(n, channels, -1)).view_as(x)
