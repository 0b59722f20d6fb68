"""Policies that are a mask: SmoothMix (a soft disc), GridMix (holes on a grid), FMix (a thresholded random field)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import CPU, settled
from hardmix.kernels.blend import LineMask, outside_mask
from hardmix.mixing.draw import Pairing, move, uniform
from hardmix.mixing.field import SPECTRA, low_frequency_mask
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy
from hardmix.mixing.static import axis_lengths, cut_side


class SmoothMix(Policy):
    """SmoothMix: the partner shows through a soft Gaussian disc.

        G(p) = exp(-|p - mu|^2 / (2 s^2)),   x~_i = (1 - G_i) x_i + G_i x_{partner_i},   lam = 1 - mean G

    mu is uniform over the image and s uniform in `sigma`. Both are counted in sides of the image, so on an image that
    is not square the disc is an ellipse of the image's shape. There is no Beta: lam follows from s and mu alone, and
    for the default it lies between 0.27 and 0.90 (images).

    Args:
        sigma: range of s.
        per, pairing: see `Policy`.
    Shapes: (N, C, L), (N, C, H, W) or (N, C, D, H, W). Reference: Lee et al. 2020, CVPR Workshops. Public code labels
    with mean G, which swaps the two labels; here the label follows the pixels.
    """

    def __init__(
        self, *, sigma: tuple[float, float] = (0.25, 0.5), per: str = "sample", pairing: str | None = None
    ) -> None:
        super().__init__(per=per, pairing=pairing)
        self.sigma = _check.interval("SmoothMix", "sigma", sigma, 1e-3, 1e3)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, per={self.per!r}, pairing={self.pairing!r}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = tuple(x.shape[2:])
        count = self._count(x.shape[0])
        centre = uniform(0.0, 1.0, (count, len(size)), generator)
        sigma = uniform(*self.sigma, (count, 1), generator)
        bells = []
        for axis, length in enumerate(size):
            at = (torch.arange(length, dtype=torch.float32, device=CPU) + 0.5) / length
            bell = torch.exp(-0.5 * ((at - centre[:, axis, None]) / sigma) ** 2)
            bells.append(self._rows(pairing, bell)[:count])  # (count, length)
        # The mean of a product of lines is the product of their means, so only lines travel to the device.
        lam = 1.0 - torch.stack([bell.mean(1) for bell in bells]).prod(0)
        rows, lines = x.shape[0], [settled(move(bell, x.device)) for bell in bells]
        lam = lam.expand(rows).contiguous()
        if count == rows:
            return _masked_plan(pairing, lam, x.device, lines=LineMask(lines, _outside_discs))
        mask = _outside_discs(lines)
        return _masked_plan(pairing, lam, x.device, mask.expand(rows, *mask.shape[1:]))


class GridMix(Policy):
    """GridMix: the partner shows through square holes on a grid.

        hole at p  <=>  p in the window and (p - corner) mod cell < hole on each axis
        hole = round((1 - lam')^(1/S) cell)

    lam' ~ Beta(alpha, alpha) is the share that stays inside the window; the returned lam is counted from the mask, so
    it is larger. The window covers `area` of the image at an aspect ratio (height over width, relative to the image's)
    from `aspect`, at a uniform place; its last axis is cut into `cells` cells, and cells are as long on the other
    axes. For series there is no aspect; for volumes it is that of the last two axes.

    Args:
        cells: range of the whole number of cells across the window.
        area, aspect: ranges, drawn uniformly.
        alpha, per, pairing: see `Policy`.
    Shapes: (N, C, L), (N, C, H, W) or (N, C, D, H, W). Reference: Baek et al. 2021, Pattern Recognition 109. The
    patch-wise loss of the paper is not part of the policy.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        cells: tuple[int, int] = (2, 6),
        area: tuple[float, float] = (0.5, 1.0),
        aspect: tuple[float, float] = (0.5, 2.0),
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(alpha=alpha, per=per, pairing=pairing)
        _check.interval("GridMix", "cells", cells, 1, 10_000)
        self.cells = tuple(_check.integer("GridMix", "cells", count, 1) for count in cells)
        self.area = _check.interval("GridMix", "area", area, 1e-3, 1.0)
        self.aspect = _check.interval("GridMix", "aspect", aspect, 1e-2, 1e2)

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = tuple(x.shape[2:])
        axes, rows = len(size), x.shape[0]
        side = cut_side(self._lam(pairing, generator), axes)
        draws = self._rows(pairing, uniform(0.0, 1.0, (rows, 3 + axes), generator))
        low, high = self.cells
        cells = (draws[:, 0] * (high - low + 1)).floor_().clamp_(max=high - low).add_(low)
        area = _between(draws[:, 1], self.area) ** (1.0 / axes)
        if axes > 1:
            aspect = _between(draws[:, 2], self.aspect)
            sides = torch.stack([area] * (axes - 2) + [area * aspect**0.5, area * aspect**-0.5])  # (S, N)
        else:
            sides = area[None]
        # Whole numbers in float32, exact up to 2^24: bools and remainders of integers take several times as long.
        lengths = axis_lengths(size, sides.device)
        windows = torch.minimum((sides * lengths).round_().clamp_(min=1.0), lengths)
        cell = (windows[-1] / cells).ceil_()
        hole = (side * cell).round_()
        corner = (draws[:, 3:].T * (lengths - windows + 1.0)).floor_()
        at = torch.arange(max(size), dtype=torch.float32, device=CPU) - corner[..., None]  # (S, N, longest axis)
        place = (at / cell[:, None]).floor_().mul_(-cell[:, None]).add_(at)  # at mod cell
        # At least 1 beyond the hole, the window's end or its start, and at most 0 in a hole.
        beyond = torch.maximum(place.sub_(hole[:, None]), at - windows[..., None]).add_(1.0)
        outside = torch.maximum(beyond, at.neg_()).clamp_(0.0, 1.0)
        shown = (max(size) - outside.sum(2)).long().prod(0)
        lam = (math.prod(size) - shown).to(torch.float32) / math.prod(size)
        # A line for each axis travels to the device; the mask, of zeros and ones on any, is made there.
        outside = settled(move(outside, x.device))
        lines = [line[:, :length] for line, length in zip(outside, size, strict=True)]
        return _masked_plan(pairing, lam, x.device, lines=LineMask(lines, outside_mask))


class FMix(Policy):
    """FMix: the partner shows where a smooth random field is low.

        field = inverse Fourier transform of white noise / max(f, 1 / longest side)^decay
        mask = the lam H W largest pixels of the field

    lam ~ Beta(alpha, alpha), and exactly round(lam H W) pixels of each mask are 1; ties go to the first pixel in memory
    order. Frequencies that carry less than about 1e-5 of the field's energy are left out (above 12 cycles at decay 3).

    Args:
        decay: power of the spectrum; larger gives larger blobs.
        spectrum: "isotropic" (default), the field of the paper's text; or "released", the field of the authors' code,
            which takes two rows of the spectrum for its real and imaginary part: its masks vary along the height at all
            frequencies, but along the width with one cycle at most. Images only.
        alpha, per, pairing: see `Policy`.
    Shapes: (N, C, L), (N, C, H, W) or (N, C, D, H, W); frequencies are counted in pixels, so blobs stay round on an
    image that is not square. Reference: Harris et al. 2020 (arXiv:2002.12047).
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        decay: float = 3.0,
        spectrum: str = "isotropic",
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(alpha=alpha, per=per, pairing=pairing)
        self.decay = _check.positive("FMix", "decay", decay)
        self.spectrum = _check.choice("FMix", "spectrum", spectrum, SPECTRA)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay:g}, spectrum={self.spectrum!r}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = tuple(x.shape[2:])
        if self.spectrum == "released" and len(size) != 2:
            raise ValueError(
                f'FMix: x has shape {tuple(x.shape)} but spectrum="released" is defined for images; '
                'pass (N, C, H, W), or use spectrum="isotropic".'
            )
        count, pixels = self._count(x.shape[0]), math.prod(size)
        keep = (self._lam(pairing, generator).to(torch.float64) * pixels).round().long()
        kept = low_frequency_mask(self._rows(pairing, keep)[:count], size, self.decay, self.spectrum, generator)
        # Bits travel to the device; the floats are made there.
        mask = move(self._rows(pairing, kept[:, None]), x.device)
        return _masked_plan(pairing, keep.to(torch.float32) / pixels, x.device, mask.to(torch.float32))


def _masked_plan(
    pairing: Pairing, lam: Tensor, device: torch.device, mask: Tensor | None = None, lines: LineMask | None = None
) -> MixPlan:
    """The plan of a mask that is on the batch's device already; partners and shares are moved there."""
    plan = MixPlan(pairing.partner, lam, shift=pairing.shift).to(device)
    return MixPlan(plan.partner, plan.lam, mask, shift=plan.shift, lines=lines)


def _outside_discs(bells: Sequence[Tensor]) -> Tensor:
    """1 - the outer product of each row: (N, L1), (N, L2), ... -> (N, 1, L1, L2, ...)"""
    first, *others = bells
    out = -first
    for factor in others:
        out = out[..., None] * factor.view(factor.shape[0], *[1] * (out.ndim - 1), -1)
    # Not addcmul, which is several times slower where it broadcasts, and rounds once or twice by device.
    return out.add_(1.0)[:, None]


def _between(unit: Tensor, interval: tuple[float, float]) -> Tensor:
    low, high = interval
    return unit * (high - low) + low
