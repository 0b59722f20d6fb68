"""Points on the great circle between two directions: the mixture that stays on the sphere where embeddings live."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import is_transformed, unit, wide

#: 1 - cos below which the coefficients come from a series: there the quotient of sines loses its slope to cancellation,
#: percents of it in float32. Both forms err by less than 5e-6 (float32) or 1e-11 (float64) at the switch.
SERIES = {torch.float32: 3e-2, torch.float64: 3e-4}
#: 1 + cos is not let below this: the coefficients grow as 1 / sin of the angle, and opposite ends have no shortest way.
OPPOSITE = 1e-6


def slerp(a: Tensor, b: Tensor, lam: float | Tensor) -> Tensor:
    """Spherical interpolation, row by row: the point that divides the arc from a to b.

        m = alpha a + beta b,   alpha = sin(lam t) / sin t,   beta = sin((1 - lam) t) / sin t,   cos t = a . b

    `lam` is the share of the first argument: 1 gives a, 0 gives b. m has length 1, is at the angle (1 - lam) t from a
    and lam t from b, and swapping a with b and lam with 1 - lam changes nothing.

    Args:
        a, b: (..., D) directions, any float dtype; they are divided by their length, and angles are float32 or wider.
        lam: a number from 0 to 1, or a tensor of them that broadcasts to (...).

    Returns:
        (..., D) unit rows in the wider dtype of the two. Equal directions give that direction, with the gradient of the
        limit. Opposite ones (b = -a, to 1e-6 in the cosine) have no shortest arc: the result is sin((lam - 1/2) pi) a,
        both ends are kept, half way is 0, and slopes are bounded by 1e3. A row of zeros counts as perpendicular to
        everything. NaN gives NaN. Differentiable as often as asked, also in `lam`.

    Raises:
        TypeError: not tensors, or not of a floating-point dtype.
        ValueError: shapes or devices disagree, `lam` does not broadcast or, where it is on the CPU, leaves [0, 1].

    Reference: Shoemake 1985; Oh et al. 2023 (arXiv:2203.03897), whose released `sph_inter` divides by sin t = 0 where
    rows are equal and gives NaN.

    >>> import torch
    >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    who = "slerp"
    x, y = (_check.tensor(who, name, value) for name, value in (("a", a), ("b", b)))
    for name, value in (("a", x), ("b", y)):
        if not value.is_floating_point():
            raise TypeError(f"{who}: {name} has dtype {value.dtype}; pass floating-point values.")
    if x.ndim == 0 or x.shape != y.shape:
        raise ValueError(f"{who}: a has shape {tuple(x.shape)} and b {tuple(y.shape)}; pass two of shape (..., D).")
    _check.same_device(who, "b", y, "a", x.device)
    dtype = torch.promote_types(x.dtype, y.dtype)
    share = shares(who, lam, x.device, wide(dtype))
    try:
        fits = torch.broadcast_shapes(share.shape, x.shape[:-1]) == x.shape[:-1]
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{who}: lam has shape {tuple(share.shape)} but a has shape {tuple(x.shape)}; pass a number or one per row."
        )
    x, y = (unit(value.to(share.dtype)) for value in (x, y))
    far = (x * y).sum(-1) < 0
    # From the chord, not from the cosine: 1 + cos of nearly opposite rows has few digits left, and the length of the
    # result would be off by percents in float32.
    chord = x - torch.where(far[..., None], -y, y)
    alpha, beta = _coefficients(0.5 * chord.square().sum(-1), far, share)
    return (alpha[..., None] * x + beta[..., None] * y).to(dtype)


def slerp_coefficients(cos: Tensor, lam: Tensor | float) -> tuple[Tensor, Tensor]:
    """alpha and beta of `slerp` from the cosine of the angle.

    Args:
        cos: any shape. Values past 1 by rounding are fine; below -1 + 1e-6 it is held there and has no slope.
        lam: share of the first direction, a number or a tensor that broadcasts with `cos`.

    Returns:
        Two tensors of the broadcast shape, in float32 or wider. At cos = 1 they are lam and 1 - lam, with the slopes
        -lam (1 - lam^2) / 3 and the same of 1 - lam; at cos = -1 they are below 1e3. Always alpha + beta >= 1.
    """
    c = cos.to(wide(cos.dtype))
    far = c < 0
    return _coefficients(torch.where(far, 1.0 + c, 1.0 - c), far, lam)


def shares(who: str, lam: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`lam` as a tensor. Values are looked at where that waits for no device."""
    if not isinstance(lam, Tensor):
        return torch.full((), _check.between(who, "lam", lam, 0.0, 1.0), device=device, dtype=dtype)
    if lam.is_complex() or lam.dtype == torch.bool:
        raise TypeError(f"{who}: lam has dtype {lam.dtype}; pass numbers from 0 to 1.")
    share = lam.to(device, dtype)  # unsigned integers wider than a byte have no smallest value in torch
    if lam.device.type == "cpu" and lam.numel() and not torch.compiler.is_compiling() and not is_transformed():
        low, high = (float(v) for v in torch.aminmax(lam.detach().to(dtype)))
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"{who}: lam holds values from {low:g} to {high:g}; pass numbers from 0 to 1.")
    return share


def _coefficients(gap: Tensor, far: Tensor, lam: Tensor | float) -> tuple[Tensor, Tensor]:
    """alpha and beta from `gap`, 1 - cos, or 1 + cos where the angle is `far`, beyond a right one."""
    near = ~far & (gap < SERIES[gap.dtype])
    # Either form is given harmless values where the other holds: NaN would come through the gradient of where().
    x = torch.where(near, 1.0, gap.clamp(min=OPPOSITE))
    sine = (x * (2.0 - x)).sqrt()
    acute = 2.0 * (0.5 * x).sqrt().asin()
    angle = torch.where(far, math.pi - acute, acute)
    e = torch.where(near, gap, 0.0)
    square = e * (2.0 + e * (1.0 / 3.0 + e * (4.0 / 45.0 + e / 35.0)))  # of the angle
    alpha, beta = (
        torch.where(near, _series(square, share), (share * angle).sin() / sine) for share in (lam, 1.0 - lam)
    )
    return alpha, beta


def _series(square: Tensor, lam: Tensor | float) -> Tensor:
    """sin(lam t) / sin t from t^2."""
    s = lam * lam
    tail = (7.0 - 3.0 * s) / 360.0 + square * (31.0 - 18.0 * s + 3.0 * s * s) / 15120.0
    return lam * (1.0 + (1.0 - s) * square * (1.0 / 6.0 + square * tail))
