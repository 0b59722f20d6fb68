"""Augmentation of batches of volumes: every sample has its own draws, and no Python loop looks at samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix.data.views import _like, _shifted
from hardmix.mixing.draw import cpu_generator, move, normal, uniform

#: most of "noise", and most of the offset of "intensity", in standard deviations of the sample
NOISE, OFFSET = 0.1, 0.2
#: gains of "intensity"
GAIN = (0.8, 1.2)


def _rotations() -> tuple[Tensor, Tensor]:
    """The 24 turns of a cube: new axis a is the old axis order[r, a], mirrored where mirror[r, a].

    Of the 48 ways to permute and mirror three axes, those with determinant +1.
    """
    orders, mirrors = [], []
    for order in itertools.permutations(range(3)):
        odd = sum(order[a] > order[b] for a in range(3) for b in range(a, 3)) % 2
        for mirror in itertools.product((False, True), repeat=3):
            if sum(mirror) % 2 == odd:
                orders.append(order)
                mirrors.append(mirror)
    return torch.tensor(orders), torch.tensor(mirrors)


ORDERS, MIRRORS = _rotations()  # (24, 3)


class Lattice:
    """Where each output voxel comes from: index at[a][n, i_a] along the axis order[n, a] of the sample.

    Flips, crops and turns change only these small maps, so any run of them reads the voxels once.

    Attributes:
        at: three (N, L_a) long on the CPU.
        order: (N, 3) long, a permutation of the axes for each sample; the identity unless the volumes are cubes.
    """

    def __init__(self, n: int, shape: Iterable[int]) -> None:
        self.at = [torch.arange(length).expand(n, length) for length in shape]
        self.order = torch.arange(3).expand(n, 3)

    def read(self, x: Tensor) -> Tensor:
        """The volumes that the maps describe, from `x` (N, C, D, H, W)."""
        n, channels, _, height, width = x.shape
        stride = torch.tensor([height * width, width, 1])[self.order]  # (N, 3)
        d, h, w = (move(at * stride[:, a : a + 1], x.device) for a, at in enumerate(self.at))
        index = d[:, :, None, None] + h[:, None, :, None] + w[:, None, None, :]
        flat = index.view(n, 1, -1).expand(n, channels, -1)
        return x.reshape(n, channels, -1).gather(2, flat).view(x.shape)


def _flip(lattice: Lattice, generator: Generator | None) -> None:
    """Mirror half of the samples along each axis."""
    mirrored = torch.rand(len(lattice.order), 3, generator=generator) < 0.5
    lattice.at = [torch.where(mirrored[:, a : a + 1], at.flip(1), at) for a, at in enumerate(lattice.at)]


def _flip_x(lattice: Lattice, generator: Generator | None) -> None:
    """Mirror half of the samples along the last axis."""
    mirrored = torch.rand(len(lattice.order), 1, generator=generator) < 0.5
    lattice.at[2] = torch.where(mirrored, lattice.at[2].flip(1), lattice.at[2])


def _crop(lattice: Lattice, generator: Generator | None) -> None:
    """Move along each axis and reflect what comes in."""
    lattice.at = [_shifted(at, generator, blank=False) for at in lattice.at]


def _rotate(lattice: Lattice, generator: Generator | None) -> None:
    """One of the 24 turns of a cube for each sample."""
    n = len(lattice.order)
    turn = torch.randint(len(ORDERS), (n,), generator=generator)
    order, mirror = ORDERS[turn], MIRRORS[turn]  # (N, 3)
    at = torch.stack(lattice.at, 1)  # (N, 3, L)
    at = at.gather(1, order[:, :, None].expand_as(at))
    at = torch.where(mirror[:, :, None], at.flip(2), at)
    lattice.at = list(at.unbind(1))
    lattice.order = lattice.order.gather(1, order)


def _noise(x: Tensor, generator: Generator | None) -> Tensor:
    """Normal noise; how much is drawn for each sample, in its own standard deviations."""
    scale = move(uniform(0.0, NOISE, (len(x), 1, 1, 1, 1), generator), x.device) * _spread(x)
    noise = move(normal(tuple(x.shape), generator), x.device)
    return _like(noise.mul_(scale).add_(x), x)


def _intensity(x: Tensor, generator: Generator | None) -> Tensor:
    """x times a gain plus an offset, one of each for a sample."""
    shape = (len(x), 1, 1, 1, 1)
    gain = move(uniform(*GAIN, shape, generator), x.device)
    offset = move(uniform(-OFFSET, OFFSET, shape, generator), x.device) * _spread(x)
    return _like(x.to(torch.float32, copy=True).mul_(gain).add_(offset), x)


def _spread(x: Tensor) -> Tensor:
    """(N, 1, 1, 1, 1) float32 standard deviation of each sample over its channels and voxels."""
    return x.to(torch.float32).flatten(1).std(1, correction=0).view(-1, 1, 1, 1, 1)


#: views that only move voxels, and views that compute new ones
MOVES: dict[str, Callable[[Lattice, Generator | None], None]] = {
    "flip": _flip,
    "flip-x": _flip_x,
    "crop": _crop,
    "rotate": _rotate,
}
PAINTS: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {"noise": _noise, "intensity": _intensity}

VOLUME_VIEWS = (*MOVES, *PAINTS)


class VolumeAugment:
    """Random views of a batch of volumes, applied in the order of their names.

    flip       mirror along each of the three axes, half of the samples each
    flip-x     mirror along the last axis only, half of the samples: left and right of upright brains
    crop       move by up to an eighth along each axis; what comes in is reflected
    rotate     one of the 24 turns of a cube; for cubes only
    noise      normal noise, its standard deviation 0 to 10 % of the sample's own
    intensity  times 0.8 to 1.2, plus -20 % to 20 % of the sample's standard deviation

    A view has to leave the label as it is, which depends on the label: none of the moves does where it says which way
    something points or lies ("flip-x" keeps heights), and "intensity" doesn't where it is a sum over the voxels.

    Args:
        names: any of these, none is fine and changes nothing.

    >>> VolumeAugment(["flip", "crop"])(torch.zeros(8, 1, 16, 16, 16, dtype=torch.uint8)).shape
    torch.Size([8, 1, 16, 16, 16])
    """

    def __init__(self, names: Iterable[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"VolumeAugment: names is {names!r}; pass a list of names.")
        self.names = tuple(_check.choice("VolumeAugment", "names", name, VOLUME_VIEWS) for name in names)

    def __repr__(self) -> str:
        return f"VolumeAugment({list(self.names)})"

    def __call__(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """A view of each sample of `x` (N, C, D, H, W), before normalisation. `x` is never written.

        Args:
            x: uint8, or floats of any range; dtype, device and memory format are kept.
            generator: CPU generator; draws happen on the CPU, so every device sees the same views.
        """
        x = _check.batch("VolumeAugment", "x", x, 5, 5)
        cpu_generator("VolumeAugment", generator)
        if not x.is_floating_point() and x.dtype != torch.uint8:
            raise TypeError(f"VolumeAugment: x has dtype {x.dtype}; pass uint8 or floating-point values.")
        if "rotate" in self.names and len(set(x.shape[2:])) > 1:
            raise ValueError(f"VolumeAugment: x has shape {tuple(x.shape)}, but rotate needs cubes; leave it out.")
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
        out, lattice = x, None
        for name in self.names:
            if name in MOVES:
                lattice = lattice or Lattice(x.shape[0], x.shape[2:])
                MOVES[name](lattice, generator)
            else:
                out, lattice = PAINTS[name](out if lattice is None else lattice.read(out), generator), None
        out = out if lattice is None else lattice.read(out)
        return out.contiguous(memory_format=torch.channels_last_3d) if channels_last else out
