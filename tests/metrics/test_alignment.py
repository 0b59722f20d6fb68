"""Measures of where embeddings lie, against loops over pairs; edges, properties and messages."""

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

from hardmix.metrics import alignment as module
from hardmix.metrics.alignment import (
    alignment,
    alignment_metrics,
    embedding_shift,
    modality_gap,
    relative_alignment,
    uniformity,
)

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cones(n: int, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs of two modalities that lie apart."""
    own, image, text, one, other = (torch.randn(n, d, dtype=DOUBLE, generator=rng(seed * 7 + k)) for k in range(5))
    return own + image + 3 * one[0], own + text + 3 * other[0]


def lists(x: Tensor) -> list[list[float]]:
    rows = []
    for row in x.tolist():
        length = math.sqrt(sum(v * v for v in row))
        rows.append([v / length for v in row])
    return rows


def square(x: list[float], y: list[float]) -> float:
    return sum((v - w) ** 2 for v, w in zip(x, y, strict=True))


def slow_uniformity(z: list[list[float]], t: float) -> float:
    values = [math.exp(-t * square(z[i], z[j])) for i in range(len(z)) for j in range(i)]
    return math.log(sum(values) / len(values))


def slow_relative(a: list[list[float]], b: list[list[float]]) -> float:
    gains = []
    for i, text in enumerate(b):
        gains.append(min(square(text, a[k]) for k in range(len(a)) if k != i) - square(text, a[i]))
    return sum(gains) / len(gains)


def slow_gap(a: list[list[float]], b: list[list[float]]) -> float:
    middles = [[sum(row[k] for row in rows) / len(rows) for k in range(len(rows[0]))] for rows in (a, b)]
    return math.sqrt(square(*middles))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.1, 5), st.floats(0.5, 4), st.integers(0, 10**6))
def test_the_loops(n, d, t, alpha, seed) -> None:
    images, texts = cones(n, d, seed)
    a, b = lists(images), lists(texts)
    want = sum(square(x, y) ** (alpha / 2) for x, y in zip(a, b, strict=True)) / n
    assert alignment(images, texts, alpha=alpha) == pytest.approx(want, rel=1e-10, abs=1e-12)
    assert relative_alignment(images, texts) == pytest.approx(slow_relative(a, b), rel=1e-10, abs=1e-10)
    assert uniformity(images, t=t) == pytest.approx(slow_uniformity(a, t), rel=1e-10, abs=1e-10)
    assert modality_gap(images, texts) == pytest.approx(slow_gap(a, b), rel=1e-10, abs=1e-10)
    got = alignment_metrics(images, texts)
    assert list(got) == ["alignment", "uniformity", "gap"]
    assert got["alignment"] == relative_alignment(images, texts)
    assert got["uniformity"] == pytest.approx(-slow_uniformity(a + b, 2.0), rel=1e-10, abs=1e-10)
    assert got["gap"] == modality_gap(images, texts)


@pytest.mark.parametrize("n", [2, 7, 8, 9, 33])
def test_chunks_do_not_show(n, monkeypatch) -> None:
    images, texts = cones(n)
    want = alignment_metrics(images, texts)
    monkeypatch.setattr(module, "CHUNK", 4)
    got = alignment_metrics(images, texts)
    assert got == pytest.approx(want, rel=1e-13)


def test_the_usual_forms_in_torch() -> None:
    images, texts = cones(40)
    x, y = F.normalize(images), F.normalize(texts)
    assert alignment(images, texts) == pytest.approx((x - y).norm(dim=1).pow(2).mean().item())
    assert uniformity(images) == pytest.approx(torch.pdist(x).pow(2).mul(-2).exp().mean().log().item())
    cos = y @ x.T
    nearest = (cos - 9 * torch.eye(40)).amax(1)
    assert relative_alignment(images, texts) == pytest.approx(2 * (cos.diagonal() - nearest).mean().item())


def test_values_by_hand() -> None:
    eye, half = torch.eye(4), torch.ones(4, 4)
    assert alignment(eye, eye) == 0.0
    assert alignment(eye, -eye, alpha=1.0) == pytest.approx(2.0)
    assert relative_alignment(eye, eye.flip(0)) == pytest.approx(-2.0)
    assert relative_alignment(half, half) == pytest.approx(0.0, abs=1e-15)
    assert uniformity(half) == pytest.approx(0.0, abs=1e-15)
    assert uniformity(torch.tensor([[1.0], [-1.0]]), t=0.5) == pytest.approx(-2.0)
    assert modality_gap(half, -3 * half) == pytest.approx(2.0)
    assert modality_gap(eye, torch.ones(1, 4)) == pytest.approx(0.5)
    # A row of zeros has a distance of 1 from all others.
    assert uniformity(torch.tensor([[0.0, 0.0], [0.0, 5.0]])) == pytest.approx(-2.0)


def test_a_single_row_has_no_other() -> None:
    one = torch.tensor([[3.0, 4.0]])
    assert math.isnan(uniformity(one))
    assert math.isnan(relative_alignment(one, one))
    got = alignment_metrics(one, one)
    assert math.isnan(got["alignment"])
    assert got["uniformity"] == 0.0  # an image and a text, which are equal
    assert got["gap"] == 0.0
    assert alignment(one, one) == 0.0


def test_bounds_and_invariances() -> None:
    images, texts = cones(30)
    want = alignment_metrics(images, texts)
    assert 0.0 < want["uniformity"] < 8.0
    assert 0.0 < want["gap"] < 2.0
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE, generator=rng(1)))[0]
    order, size = torch.randperm(30, generator=rng(2)), torch.rand(30, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for a, b in ((images[order], texts[order]), (images @ turn, texts @ turn), (images * size, texts / size)):
        assert alignment_metrics(a, b) == pytest.approx(want, rel=1e-11)
    assert uniformity(torch.randn(1000, 512, generator=rng())) == pytest.approx(-4.0, abs=0.02)
    near, far = (uniformity(torch.ones(50, 6) + s * torch.randn(50, 6, generator=rng())) for s in (0.1, 1.0))
    assert near > far


def test_large_exponents_do_not_underflow() -> None:
    assert uniformity(torch.eye(3), t=1e4) == pytest.approx(-2e4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype) -> None:
    top = torch.finfo(dtype).max
    images, texts = (x.to(dtype) for x in cones(9))
    images[0], texts[1], images[2], texts[2], texts[3] = 0.0, 0.0, top, -top, images[3]
    images.requires_grad_()
    got = alignment_metrics(images, texts)
    assert all(math.isfinite(value) for value in got.values())
    assert got == alignment_metrics(images.double(), texts.double())


def test_the_shift_closes_the_gap() -> None:
    images, texts = cones(40)
    before = modality_gap(images, texts)
    gaps = [modality_gap(*embedding_shift(images, texts, amount)) for amount in (-0.5, 0.0, 0.25, 0.5)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[1] == pytest.approx(before)
    assert gaps[3] < 0.2 * before
    a, b = embedding_shift(images, texts, 0.3)
    x, y = F.normalize(images), F.normalize(texts)
    d = x.mean(0) - y.mean(0)
    torch.testing.assert_close(a, F.normalize(x - 0.3 * d))
    torch.testing.assert_close(b, F.normalize(y + 0.3 * d))


def test_the_shift_by_a_given_length() -> None:
    """As the authors' notebook has it: along a unit vector, here that of other data."""
    images, texts = cones(10)
    more = [F.normalize(x) for x in cones(50, seed=5)]
    d = more[0].mean(0) - more[1].mean(0)
    a, b = embedding_shift(images, texts[:4], 0.75 / (2 * d.norm().item()), gap=d)
    step = 0.5 * 0.75 * d / d.norm()
    torch.testing.assert_close(a, F.normalize(F.normalize(images) - step))
    torch.testing.assert_close(b, F.normalize(F.normalize(texts[:4]) + step))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_the_shift_of_other_dtypes(dtype) -> None:
    images, texts = (x.to(dtype) for x in cones(9))
    images[0], texts[1] = 0.0, torch.finfo(dtype).max
    kept = images.clone()
    a, b = embedding_shift(images, texts, 0.5)
    assert a.dtype == b.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    torch.testing.assert_close(b.norm(dim=1), torch.ones(9, dtype=b.dtype))
    assert torch.equal(images, kept)
    lonely = embedding_shift(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), 0.5)  # both onto the origin
    assert not torch.stack(lonely).any()


def test_the_shift_has_a_gradient() -> None:
    images, texts = (x.requires_grad_() for x in cones(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: embedding_shift(a, b, 0.4), (images, texts))


A = torch.ones(3, 2)
PAIRED = (alignment, relative_alignment, alignment_metrics)


@pytest.mark.parametrize("measure", [*PAIRED, modality_gap, lambda a, b: embedding_shift(a, b, 0.5)])
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], A), TypeError, "image_features is a list; pass a torch.Tensor."),
        ((A, A.long()), TypeError, "text_features has dtype torch.int64; pass floating-point values."),
        ((A, torch.ones(3, 4)), ValueError, "text_features has 4 columns but image_features has 2; pass "),
        ((A[:0], A[:0]), ValueError, "image_features has shape (0, 2) and is empty; pass at least one sample."),
        ((A, A / 0), ValueError, "text_features holds NaN or infinity in rows 0, 1, 2; repair or leave out these"),
        ((A[0], A), ValueError, "image_features has shape (2,); pass a batch with 2 axes, samples first."),
    ],
)
def test_messages(measure: Any, arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    who = "embedding_shift" if measure.__name__ == "<lambda>" else measure.__name__
    with pytest.raises(kind, match=f"^{who}: {re.escape(message)}"):
        measure(*arguments)


@pytest.mark.parametrize("measure", PAIRED)
def test_pairs_are_as_many(measure: Any) -> None:
    with pytest.raises(ValueError, match=f"^{measure.__name__}: text_features has 2 entries but image_features has 3 "):
        measure(A, A[:2])


def test_messages_of_settings() -> None:
    with pytest.raises(ValueError, match=r"^alignment: alpha is 0.0; pass a finite number greater than 0\.$"):
        alignment(A, A, alpha=0.0)
    with pytest.raises(ValueError, match=r"^uniformity: t is -1; pass a finite number greater than 0\.$"):
        uniformity(A, t=-1)
    with pytest.raises(TypeError, match=r"^uniformity: features has dtype torch\.int64; pass floating-point values\.$"):
        uniformity(A.long())
    with pytest.raises(ValueError, match=r"^embedding_shift: amount is inf; pass a finite number\.$"):
        embedding_shift(A, A, math.inf)
    with pytest.raises(
        ValueError, match=r"^embedding_shift: gap has shape \(3,\) and dtype torch\.float32; pass \(2,\)"
    ):
        embedding_shift(A, A, 0.5, gap=torch.ones(3))
    with pytest.raises(TypeError, match=r"^embedding_shift: gap is a list; pass a torch\.Tensor\.$"):
        embedding_shift(A, A, 0.5, gap=[1.0, 0.0])
