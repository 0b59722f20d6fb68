"""The energy gap of Lipsum-FT against its loops, its edges, its random texts and its messages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.losses.lipsum import LipsumLoss, lipsum_loss, random_tokens

from .slow_pairs import cloud, unit_rows

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(n: int, k: int, d: int = 5, seed: int = 0) -> list[Tensor]:
    texts = torch.randn(k, d, dtype=DOUBLE, generator=rng(seed + 99))
    return [x.requires_grad_() for x in (*cloud(n, d, seed), texts)]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


def slow_rows(images: Tensor, reference: Tensor, texts: Tensor, s: Tensor | float) -> list[Tensor]:
    a, a0, t = unit_rows(images), unit_rows(reference), unit_rows(texts)
    return [
        sum((s * (a[i] @ key) - s * (a0[i].detach() @ key.detach())) ** 2 for key in t) / (2 * len(t))
        for i in range(len(a))
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.floats(0.01, 100), st.integers(0, 10**6))
def test_value_and_gradient_are_those_of_the_loops(n, k, d, scale, seed) -> None:
    a, a0, t = features(n, k, d, seed)
    got, want = lipsum_loss(a, a0, t, scale, reduction="none"), torch.stack(slow_rows(a, a0, t, scale))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients(got.sum(), a), gradients(want.sum(), a), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(lipsum_loss(a, a0, t, scale), want.mean())
    torch.testing.assert_close(lipsum_loss(a, a0, t, scale, reduction="sum"), want.sum())


def test_gradcheck() -> None:
    a, a0, t = features(5, 4, 3)
    s = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda x, s, r=reduction: lipsum_loss(x, a0, t, s, reduction=r), (a, s), eps=1e-6, atol=1e-5, rtol=1e-3
        )


def test_properties() -> None:
    a, a0, t = features(7, 6)
    want = lipsum_loss(a, a0, t, 4.0)
    assert torch.autograd.grad(want, (a0, t), allow_unused=True) == (None, None)
    torch.testing.assert_close(lipsum_loss(a, a0, t, 8.0), 4 * want)
    torch.testing.assert_close(lipsum_loss(2 * a, a0 / 3, 5 * t, 4.0), want)
    torch.testing.assert_close(lipsum_loss(a, a0, t.repeat(3, 1), 4.0), want)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=rng(1)))[0]
    torch.testing.assert_close(lipsum_loss(a @ turn, a0 @ turn, t @ turn, 4.0), want)
    # What turns in the space that the texts leave out costs nothing.
    flat = torch.eye(5, dtype=DOUBLE)[:3]
    x, x0 = (torch.cat((torch.ones(2, 3), other), 1).double() for other in (torch.eye(2), torch.eye(2).flip(0)))
    assert lipsum_loss(x, x0, flat, 4.0).item() == pytest.approx(0.0, abs=1e-30)
    assert lipsum_loss(x, x0, torch.eye(5, dtype=DOUBLE), 4.0) > 0.1


def test_the_original_costs_nothing() -> None:
    a, _, t = features(7, 6)
    loss = lipsum_loss(a, a, t, 100.0)
    assert loss.item() == 0.0
    assert not gradients(loss, a)[0].any()


def test_a_small_gap_keeps_its_digits_in_float32() -> None:
    a0 = torch.randn(16, 32, generator=rng())
    a = (a0 + 1e-4 * torch.randn(16, 32, generator=rng(1))).requires_grad_()
    t = torch.randn(80, 32, generator=rng(2))
    want = lipsum_loss(a.double(), a0.double(), t.double(), 100.0)
    assert lipsum_loss(a, a0, t, 100.0).item() == pytest.approx(want.item(), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_extremes_are_finite(dtype, scale) -> None:
    top = torch.finfo(dtype).max
    a, a0, t = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in range(3))
    a[0], a0[1], a[2], a0[2], a0[3], a[4] = 0.0, 0.0, top, -top, a[3], 1.0 if dtype == torch.float16 else 1e-20
    a0[5], t[6], t[7] = -a[5], 0.0, top
    a.requires_grad_()
    loss = lipsum_loss(a, a0, t, scale)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert gradients(loss, a)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype) -> None:
    a, a0, t = (x.detach().to(dtype) for x in features(12, 20, 16))
    got = lipsum_loss(a, a0, t, 20.0)
    assert got.item() == pytest.approx(lipsum_loss(a.double(), a0.double(), t.double(), 20.0).item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lipsum_loss(a, a0, t, 20.0), got)


def test_the_module_is_the_function() -> None:
    a, a0, t = features(5, 4)
    assert repr(LipsumLoss(reduction="sum")) == "LipsumLoss(reduction='sum')"
    assert torch.equal(LipsumLoss(reduction="sum")(a, a0, t, 3.0), lipsum_loss(a, a0, t, 3.0, reduction="sum"))
    with pytest.raises(ValueError, match=r"^LipsumLoss: reduction is 'avg'; pass one of "):
        LipsumLoss(reduction="avg")


def test_random_tokens() -> None:
    ids = random_tokens(generator=rng())
    assert ids.shape == (80, 10)
    assert ids.dtype == torch.long
    assert (ids[:, 0] == 49406).all()
    assert (ids[:, -1] == 49407).all()
    assert torch.equal(ids, random_tokens(generator=rng()))
    assert not torch.equal(ids, random_tokens(generator=rng(1)))
    small = random_tokens(4000, 3, start=4, end=9, generator=rng())
    counts = small[:, 1:-1].flatten().bincount()
    assert len(counts) == 4
    assert (counts - 3000).abs().max() < 250
    torch.manual_seed(5)
    first = random_tokens(2, 2)
    torch.manual_seed(5)
    assert torch.equal(random_tokens(2, 2), first)


A = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"image_features": [1.0]}, TypeError, "image_features is a list; pass a torch.Tensor."),
        ({"image_features": A / 0}, ValueError, "image_features holds NaN or infinity in rows 0, 1, 2; repair"),
        (
            {"text_features": A[:0]},
            ValueError,
            "text_features has shape (0, 2) and is empty; pass at least one sample.",
        ),
        ({"text_features": A.long()}, TypeError, "text_features has dtype torch.int64; pass floating-point values."),
        (
            {"text_features": torch.ones(5, 4)},
            ValueError,
            "text_features has 4 columns but image_features has 2; pass features of one space.",
        ),
        (
            {"reference_features": A[:2]},
            ValueError,
            "reference_features has 2 entries but image_features has 3 rows; pass one entry per row.",
        ),
        (
            {"reference_features": A.to("meta")},
            ValueError,
            "reference_features is on meta but image_features is on cpu",
        ),
        ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0; pass a finite number greater than 0."),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; pass one of 'none', 'mean', 'sum'."),
    ],
)
def test_messages(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"image_features": A, "reference_features": A, "text_features": A, "logit_scale": 1.0}
    with pytest.raises(kind, match=f"^lipsum_loss: {re.escape(message)}"):
        lipsum_loss(**{**given, **setting})


def test_messages_of_the_tokens() -> None:
    for name, low in (("count", 1), ("length", 1), ("start", 1), ("end", 0)):
        with pytest.raises(ValueError, match=rf"^random_tokens: {name} is -1; pass an integer of at least {low}\.$"):
            random_tokens(**{name: -1})
    with pytest.raises(TypeError, match=r"^random_tokens: generator is a int; pass a torch\.Generator or None\.$"):
        random_tokens(generator=3)
