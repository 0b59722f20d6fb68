"""i-Mix against its loops and, where they meet, against CLIP and the mixed objectives; edges and messages."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.kernels import pair_contrast as kernel
from hardmix.losses.clip import clip_loss
from hardmix.losses.imix import IMixLoss, imix_loss
from hardmix.losses.m3mix import unimodal_mix_loss
from hardmix.mixing import Mixup

from .slow_pairs import cloud, entropy, unit_rows

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, scale: float = 6.0) -> list[Tensor]:
    return [x.requires_grad_() for x in (*cloud(n, d, seed), torch.tensor(scale, dtype=DOUBLE))]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


def slow_rows(images: Tensor, texts: Tensor, s: Tensor | float, partner: list[int], lam: list[float]) -> list[Tensor]:
    a, b = unit_rows(images), unit_rows(texts)
    losses = []
    for i, p in enumerate(partner):
        target = {i: lam[i]}
        target[p] = target.get(p, 0.0) + 1 - lam[i]
        losses.append(entropy([s * (a[i] @ key) for key in b], target))
    return losses


@pytest.fixture(params=["whole", "tiled"])
def tiles(request, monkeypatch):
    """One tile, and tiles of four rows, of which nine leave one alone."""
    if request.param == "tiled":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("scale", [0.1, 6.0, 100.0])
def test_value_and_gradient_are_those_of_the_loops(n, scale, tiles) -> None:
    a, b, s = leaves(n, seed=n, scale=scale)
    partner, lam = torch.randperm(n, generator=rng(n)), torch.rand(n, dtype=DOUBLE, generator=rng(n + 1))
    got = imix_loss(a, b, s, partner=partner, lam=lam, reduction="none")
    want = torch.stack(slow_rows(a, b, s, partner.tolist(), lam.tolist()))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.rand(n, dtype=DOUBLE, generator=rng(n))
    for x, y in zip(gradients((got * weight).sum(), a, b, s), gradients((want * weight).sum(), a, b, s), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    """Partners need not be a permutation."""
    n, d, seed = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 10**6))
    scale = data.draw(st.sampled_from([0.5, 20.0, 100.0]))
    lam = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    partner = data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    a, b, s = leaves(n, d, seed, scale)
    options = {"partner": torch.tensor(partner), "lam": torch.tensor(lam, dtype=DOUBLE)}
    got, want = imix_loss(a, b, s, **options), torch.stack(slow_rows(a, b, s, partner, lam)).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-11, abs=1e-11)
    for x, y in zip(gradients(got, a, b, s), gradients(want, a, b, s), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_the_plain_form_in_torch() -> None:
    """As the authors' code has it: two cross entropies with the places of both as labels."""
    a, b, s = leaves(30, 8)
    z = s * F.normalize(a) @ F.normalize(b).T
    partner, lam = torch.randperm(30, generator=rng()), torch.rand(30, dtype=DOUBLE, generator=rng(1))
    own, other = (F.cross_entropy(z, place, reduction="none") for place in (torch.arange(30), partner))
    want = (lam * own + (1 - lam) * other).mean()
    torch.testing.assert_close(imix_loss(a, b, s, partner=partner, lam=lam), want)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction, tiles) -> None:
    a, b, s = leaves(6, 3)
    with torch.no_grad():
        a[4], b[5] = 2 * a[0], b[1]
    partner, lam = torch.tensor([0, 2, 1, 4, 5, 3]), torch.rand(6, dtype=DOUBLE, generator=rng())
    assert torch.autograd.gradcheck(
        lambda *x: imix_loss(*x, partner=partner, lam=lam, reduction=reduction),
        (a, b, s),
        eps=1e-6,
        atol=1e-5,
        rtol=1e-3,
    )


def test_both_directions_without_mixing_are_clip(tiles) -> None:
    a, b, s = leaves(9)
    partner = torch.randperm(9, generator=rng())
    both = (imix_loss(a, b, s, partner=partner, lam=1.0) + imix_loss(b, a, s, partner=partner, lam=1.0)) / 2
    torch.testing.assert_close(both, clip_loss(a, b, s), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        imix_loss(a, b, s, partner=torch.arange(9), lam=0.3), imix_loss(a, b, s, partner=partner, lam=1.0)
    )


def test_in_reverse_it_is_the_first_half_of_the_given_mix(tiles) -> None:
    """What `unimodal_mix_loss` adds is the other direction, keys against the mixed rows."""
    for n in (8, 9):
        a, b, s = leaves(n)
        place = torch.arange(n)
        for lam in (0.3, 0.8):
            whole = unimodal_mix_loss(a, b, s, mix="given", lam=lam)
            one = imix_loss(a, b, s, partner=place.flip(0), lam=lam)
            z = (s * F.normalize(a) @ F.normalize(b).T).T
            other = lam * F.cross_entropy(z, place) + (1 - lam) * F.cross_entropy(z, place.flip(0))
            torch.testing.assert_close(whole, (one + other) / 2, rtol=1e-12, atol=1e-12)


def test_a_policy_plans_it() -> None:
    x, keys = torch.randn(8, 3, 4, 4, generator=rng()), torch.randn(8, 48, generator=rng(1))
    plan = Mixup(1.0, pairing="permutation").plan(x, generator=rng(2))
    mixed = plan.blend(x).flatten(1)
    got = imix_loss(mixed, keys, 5.0, partner=plan.partner, lam=plan.lam)
    want = torch.stack(slow_rows(mixed, keys, 5.0, plan.partner.tolist(), plan.lam.tolist())).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_invariances_and_reductions() -> None:
    a, b, s = leaves(9)
    partner, lam = torch.randperm(9, generator=rng()), torch.rand(9, dtype=DOUBLE, generator=rng(1))
    want = imix_loss(a, b, s, partner=partner, lam=lam, reduction="none")
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=rng(1)))[0]
    order, size = torch.randperm(9, generator=rng(2)), torch.rand(9, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for x, y in ((a @ turn, b @ turn), (a * size, b / size)):
        torch.testing.assert_close(imix_loss(x, y, s, partner=partner, lam=lam, reduction="none"), want)
    moved = imix_loss(a[order], b[order], s, partner=order.argsort()[partner[order]], lam=lam[order], reduction="none")
    torch.testing.assert_close(moved, want[order])
    torch.testing.assert_close(want.sum(), imix_loss(a, b, s, partner=partner, lam=lam, reduction="sum"))
    torch.testing.assert_close(want.mean(), imix_loss(a, b, s, partner=partner, lam=lam))


def test_edges() -> None:
    a, b, s = leaves(1)
    loss = imix_loss(a, b, s, partner=torch.zeros(1, dtype=torch.long), lam=0.4)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(loss, a, b, s))
    same, partner = torch.ones(5, 3), torch.arange(5).flip(0)
    assert imix_loss(same, same, 9.0, partner=partner, lam=0.4).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype) -> None:
    a, b = (x.to(dtype) for x in cloud(24, 16, 5))
    options = {"partner": torch.arange(24).roll(1), "lam": torch.rand(24, generator=rng())}
    got = imix_loss(a, b, 20.0, **options)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(imix_loss(a.double(), b.double(), 20.0, **options).item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(imix_loss(a, b, 20.0, **options), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_extremes_are_finite(dtype, scale, lam, tiles) -> None:
    top = torch.finfo(dtype).max
    a, b = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in (0, 1))
    a[0], b[1], a[2], b[2], b[3], a[4] = 0.0, 0.0, top, -top, a[3], 1.0 if dtype == torch.float16 else 1e-30
    b[5], a[6], a[7] = -a[5], a[8], a[8]
    a.requires_grad_()
    b.requires_grad_()
    loss = imix_loss(a, b, scale, partner=torch.arange(9).flip(0), lam=lam)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, a, b))


def test_the_module_is_the_function() -> None:
    a, b, s = leaves(6)
    options = {"partner": torch.arange(6).flip(0), "lam": 0.7}
    module = IMixLoss(reduction="sum")
    assert repr(module) == "IMixLoss(reduction='sum')"
    assert torch.equal(module(a, b, s, **options), imix_loss(a, b, s, reduction="sum", **options))


A = torch.ones(3, 2)
PARTNER = torch.tensor([1, 2, 0])


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"lam": 1.5}, ValueError, "lam is 1.5; pass a number from 0 to 1."),
        ({"lam": None}, TypeError, "lam is None; pass a number from 0 to 1."),
        ({"lam": torch.tensor([0.1, 2.0, 0.3])}, ValueError, "lam holds values from 0.1 to 2; pass numbers from 0 to"),
        ({"lam": torch.zeros(2)}, ValueError, "lam has shape (2,) for 3 rows; pass a number, or one per row."),
        ({"partner": [1, 2, 0]}, TypeError, "partner is a list; pass a torch.Tensor."),
        (
            {"partner": torch.zeros(2, dtype=torch.long)},
            ValueError,
            "partner has shape (2,) and dtype torch.int64; pass",
        ),
        (
            {"partner": torch.zeros(3, device="meta")},
            ValueError,
            "partner has shape (3,) and dtype torch.float32; pass",
        ),
        ({"partner": torch.tensor([0, 1, 3])}, ValueError, "partner holds [0, 1, 3]; pass row numbers from 0 to 2."),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; pass one of 'none', 'mean', 'sum'."),
    ],
)
def test_messages(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^imix_loss: {re.escape(message)}"):
        imix_loss(A, A, 1.0, **{"partner": PARTNER, "lam": 0.5, **setting})


def test_messages_of_the_rest() -> None:
    with pytest.raises(ValueError, match=r"^imix_loss: text_features has 4 columns but image_features has 2; pass "):
        imix_loss(A, torch.ones(3, 4), 1.0, partner=PARTNER, lam=0.5)
    with pytest.raises(ValueError, match=r"^imix_loss: logit_scale is 0.0; pass a finite number greater than 0"):
        imix_loss(A, A, 0.0, partner=PARTNER, lam=0.5)
    with pytest.raises(ValueError, match=r"^IMixLoss: reduction is 'avg'; pass one of "):
        IMixLoss(reduction="avg")
