"""Augmentation of whole batches of series: every sample has its own draws, and no Python loop looks at samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix.data.views import MOVES, Grid
from hardmix.mixing.draw import cpu_generator, move, normal, uniform

#: standard deviation of the noise of "jitter", as a share of the channel's own
JITTER = 0.1
#: "scale" stretches a channel about its mean by 1 - s to 1 + s
SCALE = 0.2
#: longest span of "mask", as a share of the length
MASK_SHARE = 0.25


def _jitter(x: Tensor, generator: Generator | None) -> Tensor:
    """Add normal noise, a tenth of the channel's standard deviation in that sample; a constant channel stays."""
    noise = move(normal(tuple(x.shape), generator), x.device)
    std = x.float().std(2, correction=0, keepdim=True)
    return noise.mul_(JITTER * std).add_(x).to(x.dtype)


def _scale(x: Tensor, generator: Generator | None) -> Tensor:
    """Stretch every channel about its mean, whatever unit and zero it has."""
    factor = move(uniform(1.0 - SCALE, 1.0 + SCALE, (*x.shape[:2], 1), generator), x.device)
    mean = x.mean(2, dtype=torch.float32, keepdim=True)
    return (x - mean).mul_(factor).add_(mean).to(x.dtype)


def _crop(x: Tensor, generator: Generator | None) -> Tensor:
    """The crop of images, for pictures one row high."""
    grid = Grid(x.shape[0], 1, x.shape[2])
    MOVES["crop"](grid, generator)
    return grid.read(x[:, :, None])[:, :, 0]


def _mask(x: Tensor, generator: Generator | None) -> Tensor:
    """Put the mean of the channel into one span, the same in all channels of a sample."""
    n, _, length = x.shape
    most = max(1, int(MASK_SHARE * length))
    span = torch.randint(1, most + 1, (n, 1), generator=generator)
    start = (torch.rand(n, 1, generator=generator) * (length - span + 1)).long()
    at = torch.arange(length)
    inside = move(((at >= start) & (at < start + span))[:, None], x.device)  # (N, 1, L)
    return torch.where(inside, x.mean(2, dtype=torch.float32, keepdim=True).to(x.dtype), x)


SERIES_VIEWS: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {
    "crop": _crop,
    "jitter": _jitter,
    "scale": _scale,
    "mask": _mask,
}


class SeriesAugment:
    """Random views of a batch of series, applied in the order of their names.

    crop    shift by up to an eighth of the length, what comes in is reflected (the "crop" of images)
    jitter  add noise, a tenth of the channel's standard deviation in that sample
    scale   stretch each channel about its mean by 0.8 to 1.2
    mask    put the channel's mean into a span of up to a quarter of the length

    Every view measures the sample itself, so inputs may be in any unit. Where the position says what a value means, as
    in a spectrum or in a window before a forecast, "crop" changes what the label belongs to.

    Args:
        names: any of these, none is fine and changes nothing.

    >>> SeriesAugment(["crop", "jitter"])(torch.zeros(8, 3, 100)).shape
    torch.Size([8, 3, 100])
    """

    def __init__(self, names: Iterable[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"SeriesAugment: names is {names!r}; pass a list of names.")
        self.names = tuple(_check.choice("SeriesAugment", "names", name, SERIES_VIEWS) for name in names)

    def __repr__(self) -> str:
        return f"SeriesAugment({list(self.names)})"

    def __call__(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """A view of each sample of `x` (N, C, L). `x` is never written.

        Args:
            x: floats in any unit; dtype and device are kept.
            generator: CPU generator; draws happen on the CPU, so every device sees the same views.
        """
        x = _check.batch("SeriesAugment", "x", x, 3, 3)
        cpu_generator("SeriesAugment", generator)
        if not x.is_floating_point():
            raise TypeError(f"SeriesAugment: x has dtype {x.dtype}; pass floating-point series.")
        for name in self.names:
            x = SERIES_VIEWS[name](x, generator)
        return x
