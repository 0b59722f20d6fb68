"""Points on an arc: where they are, their slopes, both ends of the angle, and messages."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hardmix.mixing.geodesic import OPPOSITE, SERIES, slerp, slerp_coefficients

VECTORS = json.loads((Path(__file__).parents[1] / "losses" / "m2mix_vectors.json").read_text("utf-8"))
HALVES = [torch.float16, torch.bfloat16, torch.float32]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(angle: float, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two unit rows at an angle, in float64."""
    x, y = torch.linalg.qr(torch.randn(d, 2, dtype=torch.float64, generator=rng(seed))).Q.T
    return x[None], (math.cos(angle) * x + math.sin(angle) * y)[None]


def between(a: Tensor, b: Tensor) -> Tensor:
    """Angles of rows, without the cosine's loss of digits."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


@pytest.mark.parametrize("row", VECTORS["slerp_coefficients"]["rows"], ids=lambda row: f"{row['cos']:.17g}")
@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float64, 1e-15, 1e-11), (torch.float32, 1e-6, 5e-6)])
def test_coefficients_are_those_of_sixty_digits(row, dtype, value, slope) -> None:
    cos = torch.tensor(row["cos"], dtype=dtype, requires_grad=True)
    coefficients = slerp_coefficients(cos, row["lam"])
    for name, got in zip(("alpha", "beta"), coefficients, strict=True):
        assert got.dtype == dtype
        assert got.item() == pytest.approx(row[name], rel=value)
        (grad,) = torch.autograd.grad(got, cos, retain_graph=True)
        assert grad.item() == pytest.approx(row[f"d{name}_dcos"], rel=slope)


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.77])
def test_float32_slopes_keep_their_digits_on_either_side_of_the_switch(lam) -> None:
    gap = torch.logspace(-7, 0, 200, dtype=torch.float64)
    assert gap.min() < SERIES[torch.float32] < gap.max()
    slopes = []
    for dtype in (torch.float32, torch.float64):
        cos = (1 - gap).to(torch.float32).to(dtype).requires_grad_()
        slopes.append(torch.autograd.grad(slerp_coefficients(cos, lam)[0].sum(), cos)[0].double())
    assert ((slopes[0] - slopes[1]) / slopes[1]).abs().max() < 2e-5


def test_where_equal_rows_end() -> None:
    """A cosine of 1, or past it by rounding: lam, and the slope of the limit."""
    for dtype in (torch.float32, torch.float64):
        for past in (0.0, torch.finfo(dtype).eps):
            cos = torch.tensor(1.0 + past, dtype=dtype, requires_grad=True)
            alpha, beta = slerp_coefficients(cos, 0.3)
            assert alpha.item() == pytest.approx(0.3, rel=1e-6)
            assert beta.item() == pytest.approx(0.7, rel=1e-6)
            (slope,) = torch.autograd.grad(alpha, cos)
            assert slope.item() == pytest.approx(-0.3 * (1 - 0.3**2) / 3, rel=1e-6)


def test_where_opposite_rows_end() -> None:
    for dtype in (torch.float32, torch.float64):
        cos = torch.tensor([-1.0, -1.0 + OPPOSITE / 2, -1.1], dtype=dtype, requires_grad=True)
        for got in slerp_coefficients(cos, 0.5):
            assert got.max() < 1e3
            assert torch.equal(got, got[:1].expand(3))
            assert torch.equal(torch.autograd.grad(got.sum(), cos, retain_graph=True)[0], torch.zeros_like(cos))


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.02, 0.0245, 0.3, 1.0, math.pi / 2, 2.0, 3.0, 3.13])
@pytest.mark.parametrize("lam", [0.0, 0.05, 0.5, 0.8, 1.0])
def test_the_point_divides_the_arc(angle, lam) -> None:
    a, b = pair(angle)
    m = slerp(a, b, lam)
    loose = 1e-15 + 2e-15 / math.sin(angle) * (angle > 1)
    assert float(m.norm()) == pytest.approx(1.0, abs=loose)
    assert float(between(a, m)) == pytest.approx((1 - lam) * angle, abs=loose)
    assert float(between(b, m)) == pytest.approx(lam * angle, abs=loose)
    torch.testing.assert_close(slerp(b, a, 1 - lam), m, rtol=0, atol=loose)
    alpha, beta = slerp_coefficients((a * b).sum(1), lam)
    assert float(alpha + beta) == pytest.approx(math.cos((lam - 0.5) * angle) / math.cos(angle / 2), rel=1e-9)
    assert alpha + beta >= 1 - 1e-15
    # Equal concentrations: the divergence of two von Mises-Fisher densities grows with the angle alone.
    assert (a * m).sum() >= (a * b).sum() - 1e-15


def test_length_in_float32_up_to_opposite_rows() -> None:
    a, b = (torch.cat(rows) for rows in zip(*(pair(math.pi - 10.0**-k, seed=k) for k in (0, 1, 2)), strict=True))
    for lam in (0.2, 0.5):
        error = (slerp(a.float(), b.float(), lam).norm(dim=1) - 1).abs()
        assert (error < 2e-7 * torch.tensor([3.0, 20.0, 200.0])).all()


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.02, 0.0245, 0.025, 0.7, math.pi / 2, 2.5, 3.0])
def test_gradcheck(angle) -> None:
    a, b = (x.repeat(2, 1).requires_grad_() for x in pair(angle, 3))
    lam = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: slerp(3 * a, b, 0.3), (a, b), eps=1e-6, atol=1e-5, rtol=1e-3)
    assert torch.autograd.gradcheck(slerp, (a, b, lam), eps=1e-6, atol=1e-5, rtol=1e-3)
    assert torch.autograd.gradgradcheck(slerp, (a, b, lam), eps=1e-6, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("lam", [0.0, 1e-4, 0.3, 0.5, 1.0])
def test_equal_opposite_and_empty_rows_in_every_dtype(dtype, lam) -> None:
    top = torch.finfo(dtype).max
    a = torch.randn(7, 6, generator=rng()).to(dtype)
    a[3], a[4] = 0.0, top
    b = a.clone()
    b[1], b[2], b[5], b[6] = -a[1], 0.0, a[5] * 2, a[6] + a[6].abs().max() * torch.finfo(dtype).eps
    a.requires_grad_()
    b.requires_grad_()
    m = slerp(a, b, lam)
    grads = torch.autograd.grad(m.square().sum() + m[:, 0].sum(), (a, b))
    assert m.dtype == dtype
    assert m.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    tolerance = 4 * torch.finfo(dtype).eps
    unit = torch.nn.functional.normalize(a.detach()[[0, 5, 6]].double())
    torch.testing.assert_close(m[[0, 5, 6]].double(), unit, rtol=0, atol=tolerance)
    opposite = math.sin((lam - 0.5) * math.pi) * torch.nn.functional.normalize(a[1].detach().double(), dim=0)
    torch.testing.assert_close(m[1].double(), opposite, rtol=0, atol=tolerance + 2e-4 * (dtype != torch.float64) + 1e-3)
    assert not m[3].any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_float32_inside(dtype) -> None:
    a, b = (torch.randn(50, 8, generator=rng(seed)).to(dtype) for seed in (0, 1))
    want = slerp(a.double(), b.double(), 0.3)
    torch.testing.assert_close(slerp(a, b, 0.3).double(), want, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert slerp(a, b.float(), 0.3).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(slerp(a, b, 0.3), slerp(a, b, 0.3))


def test_shares_broadcast() -> None:
    a, b = (torch.randn(4, 3, 5, generator=rng(seed)) for seed in (0, 1))
    lam = torch.rand(4, 3, generator=rng(2))
    whole = slerp(a, b, lam)
    for i in range(4):
        for k in range(3):
            torch.testing.assert_close(whole[i, k], slerp(a[i, k], b[i, k], float(lam[i, k])))
    torch.testing.assert_close(slerp(a, b, lam[:, :1])[:, 1], slerp(a[:, 1], b[:, 1], lam[:, 0]))
    ends = torch.tensor([[0], [1], [1], [0]])
    assert torch.equal(slerp(a, b, ends.to(torch.uint16)), slerp(a, b, ends.float()))
    assert slerp(a[:0], b[:0], 0.5).shape == (0, 3, 5)
    assert slerp(a, torch.full_like(b, math.nan), 0.5).isnan().all()
    before = a.clone(), b.clone()
    slerp(a, b, 0.5)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


A = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], A, 0.5), TypeError, "a is a list; pass a torch.Tensor."),
        ((A, A.int(), 0.5), TypeError, "b has dtype torch.int32; pass floating-point values."),
        ((A, A[:2], 0.5), ValueError, "a has shape (3, 2) and b (2, 2); pass two of shape (..., D)."),
        ((A[0, 0], A[0, 0], 0.5), ValueError, "a has shape () and b (); pass two of shape (..., D)."),
        ((A, A.to("meta"), 0.5), ValueError, "b is on meta but a is on cpu; move both to one device with .to()."),
        ((A, A, 1.1), ValueError, "lam is 1.1; pass a number from 0 to 1."),
        ((A, A, math.nan), ValueError, "lam is nan; pass a number from 0 to 1."),
        ((A, A, "half"), ValueError, "lam is 'half'; pass a number from 0 to 1."),
        ((A, A, None), TypeError, "lam is None; pass a number from 0 to 1."),
        (
            (A, A, torch.tensor([0.5, -0.5, 0.1])),
            ValueError,
            "lam holds values from -0.5 to 0.5; pass numbers from 0 to 1.",
        ),
        ((A, A, torch.tensor(math.nan)), ValueError, "lam holds values from nan to nan; pass numbers from 0 to 1."),
        ((A, A, torch.tensor([True])), TypeError, "lam has dtype torch.bool; pass numbers from 0 to 1."),
        (
            (A, A, torch.zeros(2)),
            ValueError,
            "lam has shape (2,) but a has shape (3, 2); pass a number or one per row.",
        ),
        (
            (A, A, torch.zeros(3, 1)),
            ValueError,
            "lam has shape (3, 1) but a has shape (3, 2); pass a number or one per row.",
        ),
    ],
)
def test_messages(arguments: tuple[Any, Any, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^slerp: {re.escape(message)}$"):
        slerp(*arguments)
