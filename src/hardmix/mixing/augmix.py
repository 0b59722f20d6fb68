"""AugMix: mix an image with differently distorted copies of itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.kernels import blend as kernel
from hardmix.kernels import warp
from hardmix.mixing.draw import Pairing, draw_beta, move, uniform
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy


class AugMix(Policy):
    """AugMix: blend an image with a mixture of chains of distortions. The label stays.

        x~ = (1 - m) x + m sum_i w_i chain_i(x),   w ~ Dirichlet(alpha),  m ~ Beta(alpha, alpha),  1 to 3 links a chain

    The links, each with a level drawn uniformly between 0.1 and `severity`, of 10: autocontrast (each channel
    stretched to the whole range), posterize (4 bits down to 1), solarize (values above 1 - level / 10 inverted),
    rotate (up to 30 degrees), shear_x, shear_y (up to 0.3), translate_x, translate_y (up to a third of the side); to
    either side, bilinear, black outside. Of the paper's nine operations equalize is left out.
    The plan has each row as its own partner, lam = 1, and the distorted images in `own`, so it belongs to the batch
    that it was drawn for. Dense label masks are refused. The consistency loss of the paper is not part of the policy.

    Args:
        alpha: parameter of the Dirichlet and the Beta distribution.
        severity: 0.1 to 10.
        width: number of chains.
        depth: links of each chain, a whole number or a range to draw from.
        per: "sample" draws for each image; "batch" distorts all images alike. There are no pairs.
    Shapes: images (N, C, H, W), uint8 or floats in [0, 1], that is, before normalisation.
    Reference: Hendrycks et al. 2020, algorithm 1 (arXiv:1912.02781).
    """

    min_ndim = max_ndim = 4

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        severity: float = 3.0,
        width: int = 3,
        depth: int | tuple[int, int] = (1, 3),
        per: str = "sample",
    ) -> None:
        _check.choice("AugMix", "per", per, ("batch", "sample"))
        super().__init__(alpha=alpha, per=per)
        self.severity = _check.between("AugMix", "severity", severity, 0.1, 10.0)
        self.width = _check.integer("AugMix", "width", width, 1)
        _check.interval("AugMix", "depth", (depth, depth) if isinstance(depth, int) else depth, 1, 100)
        self.depth = (depth, depth) if isinstance(depth, int) else tuple(depth)
        for value in self.depth:
            _check.integer("AugMix", "depth", value, 1)

    def extra_repr(self) -> str:
        chains = f"severity={self.severity:g}, width={self.width}, depth={self.depth}"
        return f"alpha={self.alpha:g}, {chains}, per={self.per!r}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        _unit_range(x)
        rows, device = x.shape[0], x.device
        low, high = self.depth
        count = self._count(rows)
        draws = uniform(0.0, 1.0, (count, self.width, 1 + 3 * high), generator)
        shape = torch.full((count, self.width), self.alpha, dtype=torch.float64, device=CPU)
        # Gamma draws over their sum are a Dirichlet draw. The floor keeps a small alpha from giving 0 / 0.
        gamma = torch._standard_gamma(shape, generator=generator).clamp(min=1e-300)
        share = (gamma / gamma.sum(1, keepdim=True)).to(torch.float32)
        m = draw_beta(self.alpha, self.alpha, count, generator)
        draws, share, m = (self._rows(pairing, value) for value in (draws, share, m))

        # The chains work on floats in [0, 1] of at least single precision.
        clean = x.to(wide(x.dtype)) if x.is_floating_point() else x.to(torch.float32) / 255.0
        mixture = torch.zeros_like(clean)
        for chain in range(self.width):
            depth = (draws[:, chain, 0] * (high - low + 1)).long().clamp(max=high - low) + low
            image = clean.clone()
            for link in range(high):
                which, level, sign = draws[:, chain, 1 + 3 * link : 4 + 3 * link].unbind(1)
                operation = (which * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1)
                operation = torch.where(link < depth, operation, -1)  # a chain that is over stays as it is
                level = (level * (self.severity - 0.1) + 0.1) / 10.0
                image = distort_(image, operation, level, torch.where(sign < 0.5, -1.0, 1.0))
            mixture.addcmul_(_per_row(move(share[:, chain], device), image), image)
        own = kernel.blend_rows(mixture, clean, _per_row(move(m, device), clean))
        if not x.is_floating_point():
            own = (own * 255.0).round_()
        plan = MixPlan.identity(rows, device)
        plan.own = torch.empty_like(x).copy_(own)  # in the dtype and the memory format of x
        return plan


def distort_(x: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """One link of each row's chain, written into `x` (and returned, as a compiled region makes a new tensor instead).

    Args:
        x: (N, C, H, W) floats in [0, 1].
        operation: (N,) index into `OPERATIONS`, or -1 to leave the image as it is; on the CPU, like `level` and `sign`.
        level: (N,) strength from 0 to 1.
        sign: (N,) -1 or 1, the direction of the geometric operations.
    """
    for index, function in enumerate(OPERATIONS.values()):
        chosen = operation == index
        if torch.compiler.is_compiling():  # which rows these are is not known there
            changed = function(x, _per_row(move(level, x.device), x), _per_row(move(sign, x.device), x))
            x = torch.where(move(chosen, x.device).view(-1, 1, 1, 1), changed, x)
            continue
        rows = chosen.nonzero()[:, 0]
        if rows.shape[0] > 0:
            parameters = [_per_row(move(value[rows], x.device), x) for value in (level, sign)]
            there = move(rows, x.device)
            x.index_copy_(0, there, function(x.index_select(0, there), *parameters))
    return x


def _autocontrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Each channel stretched to the whole range; a channel of one value stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = high <= low
    return (x - low.masked_fill(flat, 0.0)) / (high - low).masked_fill(flat, 1.0)


def _posterize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """The top 4 - floor(4 level) of 8 bits, at least one."""
    step = 2.0 ** (4.0 + (4.0 * level).floor()).clamp(max=7.0)
    return (x * (255.0 / step)).floor() * (step / 255.0)


def _solarize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Values above 1 - level are inverted."""
    return torch.where(x > 1.0 - level, 1.0 - x, x)


def _rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Up to 30 degrees. Coordinates are counted in half sides, so the aspect ratio enters."""
    angle = sign * level * (math.pi / 6.0)
    aspect = x.shape[2] / x.shape[3]
    return _affine(x, angle.cos(), -angle.sin() * aspect, 0.0, angle.sin() / aspect, angle.cos(), 0.0)


def _shear_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _affine(x, 1.0, sign * level * (0.3 * x.shape[2] / x.shape[3]), 0.0, 0.0, 1.0, 0.0)


def _shear_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _affine(x, 1.0, 0.0, 0.0, sign * level * (0.3 * x.shape[3] / x.shape[2]), 1.0, 0.0)


def _translate_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _affine(x, 1.0, 0.0, sign * level * (2.0 / 3.0), 0.0, 1.0, 0.0)


def _translate_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _affine(x, 1.0, 0.0, 0.0, 0.0, 1.0, sign * level * (2.0 / 3.0))


#: What a link of a chain may do to an image: (x, level (N, 1, 1, 1), sign (N, 1, 1, 1)) -> x. All are drawn alike.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "posterize": _posterize,
    "solarize": _solarize,
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


def _affine(x: Tensor, *entries: Tensor | float) -> Tensor:
    """`warp.affine` with the six entries of the matrix, row by row."""
    flat = [value.flatten() if isinstance(value, Tensor) else x.new_full((x.shape[0],), value) for value in entries]
    return warp.affine(x, torch.stack(flat, 1).view(-1, 2, 3))


def _per_row(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1).to(x.dtype)


def _unit_range(x: Tensor) -> None:
    """Refuse integers but uint8, and floats outside [0, 1]; looks at values on the CPU only, where nobody waits."""
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise TypeError(f"AugMix: x has dtype {x.dtype}; pass uint8 images or floats in [0, 1].")
    if not x.is_floating_point() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    if not (low >= 0.0 and high <= 1.0):  # NaN too
        raise ValueError(
            f"AugMix: x holds values from {low:.3g} to {high:.3g}; pass uint8 images or floats in [0, 1], "
            "before they are normalised."
        )
