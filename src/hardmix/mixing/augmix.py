"""AugMix: mix an image with differently distorted copies of itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import CPU, settled, wide
from hardmix.kernels import blend as kernel
from hardmix.kernels import warp
from hardmix.mixing.draw import Pairing, draw_beta, draw_gamma, move, uniform
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
        count = self._count(rows)
        draws = uniform(0.0, 1.0, (count, self.width, 1 + 3 * self.depth[1]), generator)
        shape = torch.full((count, self.width), self.alpha, dtype=torch.float64, device=CPU)
        # Gamma draws over their sum are a Dirichlet draw. The floor keeps a small alpha from giving 0 / 0.
        gamma = draw_gamma(shape, generator).clamp(min=1e-300)
        share = (gamma / gamma.sum(1, keepdim=True)).to(torch.float32)
        m = draw_beta(self.alpha, self.alpha, count, generator)
        draws, share, m = (self._rows(pairing, value) for value in (draws, share, m))

        # The chains work on floats in [0, 1] of at least single precision.
        clean = x.to(wide(x.dtype)) if x.is_floating_point() else x.to(torch.float32) / 255.0
        if torch.compiler.is_compiling():  # a graph with each chain by itself takes minutes to compile
            together = draws.transpose(0, 1).flatten(0, 1)
            images = iter(self._distorted(clean.repeat(self.width, 1, 1, 1), together).chunk(self.width))
        else:
            images = (self._distorted(clean.clone(), draws[:, chain]) for chain in range(self.width))
        mixture = torch.zeros_like(clean)
        for chain, image in enumerate(images):
            mixture.addcmul_(_beside(move(share[:, chain], device), image), image)
        own = kernel.blend_rows(mixture, clean, _beside(move(m, device), clean))
        if not x.is_floating_point():
            own = (own * 255.0).round_()
        plan = MixPlan.identity(rows, device)
        plan.own = torch.empty_like(x).copy_(own)  # in the dtype and the memory format of x
        return plan

    def _distorted(self, x: Tensor, draws: Tensor) -> Tensor:
        """The end of a chain of each row, made in `x` from its draws (N, 1 + 3 links)."""
        low, high = self.depth
        depth = (draws[:, 0] * (high - low + 1)).long().clamp(max=high - low) + low
        for link in range(high):
            which, level, sign = draws[:, 1 + 3 * link : 4 + 3 * link].unbind(1)
            operation = (which * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1)
            operation = torch.where(link < depth, operation, -1)  # a chain that is over stays as it is
            level = (level * (self.severity - 0.1) + 0.1) / 10.0
            x = distort_(x, operation, level, torch.where(sign < 0.5, -1.0, 1.0))
        return x


def distort_(x: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """One link of each row's chain, written into `x` (and returned, as a compiled region makes a new tensor instead).

    Args:
        x: (N, C, H, W) floats in [0, 1].
        operation: (N,) index into `OPERATIONS`, or -1 to leave the image as it is; on the CPU, like `level` and `sign`.
        level: (N,) strength from 0 to 1.
        sign: (N,) -1 or 1, the direction of the geometric operations.
    """
    # Rows that are moved are resampled together, each with a matrix of its own.
    matrix = _matrices(operation, sign * level, x)
    steps = [(operation == index, level, function) for index, function in enumerate(VALUES.values())]
    for chosen, parameter, function in (*steps, (operation >= len(VALUES), matrix, warp.affine)):
        if torch.compiler.is_compiling():  # which rows these are is not known there
            # What is read at places that are themselves computed has to be in memory, or it is computed at each.
            x = settled(x)
            changed = function(x, _beside(move(parameter, x.device), x))
            x = torch.where(move(chosen, x.device).view(-1, 1, 1, 1), changed, x)
            continue
        rows = chosen.nonzero()[:, 0]
        if rows.shape[0] > 0:
            there = move(rows, x.device)
            changed = function(x.index_select(0, there), _beside(move(parameter[rows], x.device), x))
            x.index_copy_(0, there, changed)
    return x


def _autocontrast(x: Tensor, level: Tensor) -> Tensor:
    """Each channel stretched to the whole range; a channel of one value stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = high <= low
    return (x - low.masked_fill(flat, 0.0)) / (high - low).masked_fill(flat, 1.0)


def _posterize(x: Tensor, level: Tensor) -> Tensor:
    """The top 4 - floor(4 level) of 8 bits, at least one."""
    step = 2.0 ** (4.0 + (4.0 * level).floor()).clamp(max=7.0)
    return (x * (255.0 / step)).floor() * (step / 255.0)


def _solarize(x: Tensor, level: Tensor) -> Tensor:
    """Values above 1 - level are inverted."""
    return torch.where(x > 1.0 - level, 1.0 - x, x)


def _matrices(operation: Tensor, amount: Tensor, x: Tensor) -> Tensor:
    """(N, 2, 3) where each output pixel is read, for `warp.affine`; other operations than the moves keep the place."""
    # Coordinates are counted in half sides, so the aspect ratio enters.
    aspect = x.shape[2] / x.shape[3]
    amount = amount.to(x.dtype)
    angle, shear_x, shear_y, across, down = (
        (operation == len(VALUES) + index) * amount * most
        for index, most in enumerate((math.pi / 6.0, 0.3 * aspect, 0.3 / aspect, 2.0 / 3.0, 2.0 / 3.0))
    )
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, shear_x - sin * aspect, across, shear_y + sin / aspect, cos, down], 1).view(-1, 2, 3)


#: What changes the values of an image: (x, level (N, 1, 1, 1)) -> x.
VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "posterize": _posterize,
    "solarize": _solarize,
}
#: What a link of a chain may do to an image; all are drawn alike. The moves are in the order of `_matrices`.
OPERATIONS = (*VALUES, "rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """One number per row as (N, 1, 1, 1), matrices as they are; in the dtype of x."""
    return (values.view(-1, 1, 1, 1) if values.ndim == 1 else values).to(x.dtype)


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
