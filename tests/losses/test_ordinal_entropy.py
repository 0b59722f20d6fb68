"""Ordinal Entropy against its two sums, one row and one pair at a time, its edges and its messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.losses import OrdinalEntropyLoss, ordinal_entropy_loss

TIED = [3.0, 1.0, 2.0, 2.0, 5.0, 3.0, 9.0, 2.0, 4.0]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 9, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=rng(seed))


def slow(rows: list[list[float]], labels: list[float]) -> tuple[float, float]:
    """Tightness and diversity."""

    def unit(v: list[float]) -> list[float]:
        length = math.hypot(*v)
        return [a / length if length else 0.0 for a in v]

    centre = {}
    for c in set(labels):
        own = [row for row, label in zip(rows, labels, strict=True) if label == c]
        centre[c] = unit([sum(column) / len(own) for column in zip(*own, strict=True)])
    tight = sum(math.dist(unit(row), centre[c]) for row, c in zip(rows, labels, strict=True)) / len(rows)
    pairs = [(c, e) for c in centre for e in centre if c < e]
    if not pairs:
        return tight, 0.0
    low, high = min(e - c for c, e in pairs), max(e - c for c, e in pairs)
    return tight, sum((e - c - low) / high * math.dist(centre[c], centre[e]) for c, e in pairs) / len(pairs)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d, views = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5)), data.draw(st.integers(1, 2))
    ticks = st.integers(-4, 4).map(float) if data.draw(st.booleans()) else st.floats(-5, 5, width=16)
    labels = data.draw(st.lists(ticks, min_size=n, max_size=n))
    x = batch(n * views, d, data.draw(st.integers(0, 10**6)))
    if data.draw(st.booleans()):
        x[0] = 0.0
    tight, diverse = slow(x.tolist(), labels * views)
    y = torch.tensor(labels, dtype=torch.float64)
    given_x = x if views == 1 else x.view(views, n, d).movedim(0, 1)
    got = ordinal_entropy_loss(given_x, y, tightness_weight=0.7, diversity_weight=3.0)
    assert got.item() == pytest.approx(0.7 * tight - 3.0 * diverse, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("labels", [TIED[:6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 2.0] * 2, [4.0] * 6], ids=str)
def test_gradcheck(labels) -> None:
    x, y = batch(6, 3).requires_grad_(), torch.tensor(labels)
    assert torch.autograd.gradcheck(lambda x: ordinal_entropy_loss(x, y, diversity_weight=0.4), x)
    assert torch.autograd.gradgradcheck(lambda x: ordinal_entropy_loss(x, y, diversity_weight=0.4), x)


def test_few_labels_leave_tightness_alone() -> None:
    for labels in ([2.0] * 9, [2.0, 7.0, 7.0] * 3):
        x, y = batch().requires_grad_(), torch.tensor(labels)
        assert ordinal_entropy_loss(x, y) == ordinal_entropy_loss(x, y, diversity_weight=0.0)
        assert ordinal_entropy_loss(x, y).item() == pytest.approx(slow(x.tolist(), labels)[0])
    x = batch(1).requires_grad_()
    loss = ordinal_entropy_loss(x, torch.tensor([3]))
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


def test_features_that_cancel_have_no_centre() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = ordinal_entropy_loss(x, torch.tensor([1, 1, 2]))  # distances 1, 1 and 0
    assert loss.item() == pytest.approx(2 / 3)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
    a, b = torch.randn(2, 8, generator=rng())
    for rows in ([a, -a, b, -b], [a, b, -a, -b]):  # the second sum is off by a rounding
        assert ordinal_entropy_loss(1e3 * torch.stack(rows), torch.zeros(4)).item() == pytest.approx(1.0)


def test_invariances() -> None:
    x, y = batch(), torch.tensor(TIED, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=rng(1)))
    order = torch.randperm(9, generator=rng(2))
    value = ordinal_entropy_loss(x, y).item()
    for other in ((x @ turn, y), (x * 1e-3, y), (x[order], y[order]), (x, -y), (x, y * 8 + 2**20)):
        assert ordinal_entropy_loss(*other).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes_are_finite_and_autocast_changes_nothing(dtype) -> None:
    x = torch.randn(12, 6, generator=rng()).to(dtype)
    x[0], x[1], x[2], x[5], x[6] = 0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, x[4], -x[4]
    for labels in (torch.arange(12.0), torch.zeros(12), torch.arange(12) // 3 * 1e-6, torch.arange(12) % 2 * 1e6):
        x = x.detach().requires_grad_()
        loss = ordinal_entropy_loss(x, labels)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert torch.autograd.grad(loss, x)[0].isfinite().all()
        assert loss.item() == pytest.approx(ordinal_entropy_loss(x.double(), labels).item(), rel=1e-6, abs=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ordinal_entropy_loss(x, labels), loss)


def test_nan_stays_nan() -> None:
    x = batch()
    x[3, 1] = math.nan
    assert ordinal_entropy_loss(x, torch.tensor(TIED)).isnan()


def test_label_tolerance_makes_continuous_labels_equal() -> None:
    got = ordinal_entropy_loss(batch(4), torch.tensor([1.02, 0.98, 2.01, 4.04]), label_tolerance=0.5)
    assert got.item() == pytest.approx(ordinal_entropy_loss(batch(4), torch.tensor([1.0, 1.0, 2.0, 4.0])).item())


def test_module_remembers_and_equals_the_function() -> None:
    options = {"diversity_weight": 0.3, "tightness_weight": 2.0, "label_tolerance": 2.0}
    module, y = OrdinalEntropyLoss(**options), torch.tensor(TIED)
    assert module(batch(), y) == ordinal_entropy_loss(batch(), y, **options)
    assert repr(module) == "OrdinalEntropyLoss(diversity_weight=0.3, tightness_weight=2)"


loss = ordinal_entropy_loss
BAD = [
    (lambda x, y: loss(x.long(), y), TypeError, r"features has dtype torch\.int64; pass floating-point"),
    (lambda x, y: loss(x[0], y), ValueError, r"features has shape \(4,\); pass a batch with 2 to 3 axes"),
    (lambda x, y: loss(x[:0], y[:0]), ValueError, r"is empty; pass at least one sample"),
    (lambda x, y: loss(x, y[:4]), ValueError, r"labels has 4 entries but features has 9 rows; pass one entry per row"),
    (lambda x, y: loss(x, y.to("meta")), ValueError, r"labels is on meta but features is on cpu; move both"),
    (lambda x, y: loss(x, y * math.nan), ValueError, r"labels holds NaN or infinity at 0, 1, 2, 3, 4; leave out"),
    (lambda x, y: loss(x, y, diversity_weight=-1), ValueError, r"diversity_weight is -1; pass a finite number of at"),
    (lambda x, y: loss(x, y, tightness_weight=None), TypeError, r"tightness_weight is None; pass a finite number"),
    (lambda x, y: OrdinalEntropyLoss(label_tolerance=math.inf), ValueError, r"Loss: label_tolerance is inf; pass a"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(batch(), torch.tensor(TIED))
