"""Un-Mix against three CLIP losses in loops; that it is CLIP plus the given mix; edges and messages."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hardmix.kernels import pair_contrast as kernel
from hardmix.losses.clip import clip_loss
from hardmix.losses.m3mix import unimodal_mix_loss
from hardmix.losses.unmix import UnMixLoss, unmix_loss
from hardmix.mixing import CutMix, Mixup

from .slow_pairs import clip_rows, cloud, mean

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, scale: float = 6.0) -> list[Tensor]:
    mixed = torch.randn(n, d, dtype=DOUBLE, generator=rng(seed + 77))
    return [x.requires_grad_() for x in (*cloud(n, d, seed), mixed, torch.tensor(scale, dtype=DOUBLE))]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


@pytest.fixture(params=["whole", "tiled"])
def tiles(request, monkeypatch):
    """One tile, and tiles of four rows, of which nine leave one alone."""
    if request.param == "tiled":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(("scale", "lam"), [(0.1, 0.3), (6.0, 0.9), (100.0, 0.0), (6.0, 1.0)])
def test_value_and_gradient_are_those_of_three_losses(n, scale, lam, tiles) -> None:
    a, b, m, s = leaves(n, seed=n, scale=scale)
    got = unmix_loss(a, b, m, s, lam=lam)
    reverse = mean(clip_rows(m.flip(0), b, s))
    want = mean(clip_rows(a, b, s)) + lam * mean(clip_rows(m, b, s)) + (1 - lam) * reverse
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for x, y in zip(gradients(got, a, b, m, s), gradients(want, a, b, m, s), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def test_it_is_clip_and_the_given_mix(tiles) -> None:
    a, b, m, s = leaves(9)
    for reduction in ("none", "sum", "mean"):
        plain = clip_loss(a, b, s, reduction=reduction)
        mixed = unimodal_mix_loss(m, b, s, mix="given", lam=0.4, reduction=reduction)
        got = unmix_loss(a, b, m, s, lam=0.4, reduction=reduction)
        torch.testing.assert_close(got, plain + mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction, tiles) -> None:
    a, b, m, s = leaves(5, 3)
    with torch.no_grad():
        m[1], b[4] = 3 * a[1], b[0]
    assert torch.autograd.gradcheck(
        lambda *x: unmix_loss(*x, lam=0.3, reduction=reduction), (a, b, m, s), eps=1e-6, atol=1e-5, rtol=1e-3
    )


def test_properties() -> None:
    a, b, m, s = leaves(9)
    want = unmix_loss(a, b, m, s, lam=0.3)
    torch.testing.assert_close(unmix_loss(a, b, m.flip(0), s, lam=0.7), want)
    torch.testing.assert_close(unmix_loss(a, b, a, s, lam=1.0), 2 * clip_loss(a, b, s))
    torch.testing.assert_close(unmix_loss(a, b, m, s, lam=torch.full((9,), 0.3, dtype=DOUBLE)), want)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=rng(1)))[0]
    torch.testing.assert_close(unmix_loss(a @ turn, b @ turn, m @ turn, s, lam=0.3), want)
    torch.testing.assert_close(unmix_loss(3 * a, b / 2, 0.1 * m, s, lam=0.3), want)


@pytest.mark.parametrize("policy", [Mixup, CutMix])
def test_a_policy_plans_it(policy) -> None:
    x, texts = torch.randn(8, 3, 4, 4, generator=rng()), torch.randn(8, 48, generator=rng(1))
    plan = policy(1.0, per="batch", pairing="reversal").plan(x, generator=rng(2))
    images, mixed = x.flatten(1), plan.blend(x).flatten(1)
    got = unmix_loss(images, texts, mixed, 5.0, lam=plan.lam)
    assert got.item() == pytest.approx(unmix_loss(images, texts, mixed, 5.0, lam=plan.lam[0].item()).item(), rel=1e-6)


def test_edges() -> None:
    a, b, m, s = leaves(1)
    loss = unmix_loss(a, b, m, s, lam=0.4)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(loss, a, b, m, s))
    same = torch.ones(5, 3)
    assert unmix_loss(same, same, same, 9.0, lam=0.4).item() == pytest.approx(2 * math.log(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_extremes_are_finite(dtype, scale, lam, tiles) -> None:
    top = torch.finfo(dtype).max
    a, b, m = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in (0, 1, 2))
    a[0], b[1], m[2], b[2], b[3], m[4] = 0.0, 0.0, top, -top, a[3], 1.0 if dtype == torch.float16 else 1e-30
    b[5], m[6], m[7], m[8] = -m[5], m[8], m[8], 0.0
    inputs = [x.requires_grad_() for x in (a, b, m)]
    loss = unmix_loss(*inputs, scale, lam=lam)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, *inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype) -> None:
    a, b, m = (x.detach().to(dtype) for x in leaves(24, 16)[:3])
    got = unmix_loss(a, b, m, 20.0, lam=0.3)
    assert got.item() == pytest.approx(unmix_loss(a.double(), b.double(), m.double(), 20.0, lam=0.3).item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(unmix_loss(a, b, m, 20.0, lam=0.3), got)


def test_the_module_is_the_function() -> None:
    a, b, m, s = leaves(6)
    module = UnMixLoss(reduction="sum")
    assert repr(module) == "UnMixLoss(reduction='sum')"
    assert torch.equal(module(a, b, m, s, lam=0.3), unmix_loss(a, b, m, s, lam=0.3, reduction="sum"))
    with pytest.raises(ValueError, match=r"^UnMixLoss: reduction is 'avg'; pass one of "):
        UnMixLoss(reduction="avg")


A = torch.ones(3, 2)
WRONG_LAM = "lam differs between rows i and N - 1 - i; pass one share for the batch."


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"lam": -0.1}, ValueError, "lam is -0.1; pass a number from 0 to 1."),
        ({"lam": torch.zeros(2)}, ValueError, "lam has shape (2,) for 3 rows; pass a number, or one per row."),
        ({"lam": torch.tensor([0.1, 0.2, 0.3])}, ValueError, WRONG_LAM),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; pass one of 'none', 'mean', 'sum'."),
        ({"mixed_features": None}, TypeError, "mixed_features is a NoneType; pass a torch.Tensor."),
        ({"mixed_features": A.long()}, TypeError, "mixed_features has dtype torch.int64; pass floating-point values."),
        (
            {"mixed_features": A[:2]},
            ValueError,
            "mixed_features has 2 entries but image_features has 3 rows; pass one entry per row.",
        ),
        (
            {"mixed_features": torch.ones(3, 4)},
            ValueError,
            "mixed_features has 4 columns but image_features has 2; pass features of one space.",
        ),
        ({"mixed_features": A.to("meta")}, ValueError, "mixed_features is on meta but image_features is on cpu; move "),
        (
            {"mixed_features": A / 0},
            ValueError,
            "mixed_features holds NaN or infinity in rows 0, 1, 2; repair or leave",
        ),
        ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0; pass a finite number greater than 0."),
    ],
)
def test_messages(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"image_features": A, "text_features": A, "mixed_features": A, "logit_scale": 1.0, "lam": 0.5}
    with pytest.raises(kind, match=f"^unmix_loss: {re.escape(message)}"):
        unmix_loss(**{**given, **setting})
