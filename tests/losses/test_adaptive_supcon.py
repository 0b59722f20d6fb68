"""AdaCon's contrast against its sums, one anchor at a time, with ranks that are counted; its edges and messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.losses import AdaSupConLoss, adaptive_supcon_loss

TIED = [3.0, 1.0, 2.0, 2.0, 5.0, 3.0, 9.0, 2.0, 4.0]
KNOWN = [1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.5, 7.0]


def batch(n: int = 9, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow(z: list[list[float]], y: list[float], scale: float, known: list[float]) -> list[float | None]:
    """Loss of every row as an anchor; None where there is no positive."""

    def rank(label: float) -> float:
        return sum((v < label) + (v == label) / 2 for v in known)

    losses: list[float | None] = []
    for i in range(len(z)):
        positives, logits = [], []
        for j in range(len(z)):
            if j == i:
                continue
            lengths = math.hypot(*z[i]) * math.hypot(*z[j])
            s = sum(a * b for a, b in zip(z[i], z[j], strict=True)) / lengths if lengths else 0.0
            margin = 0.0 if y[i] == y[j] else min(max(2 * abs(rank(y[i]) - rank(y[j])) / len(known), 0.0), 2.0)
            logits.append(scale * (s + margin))
            if y[i] == y[j]:
                positives.append(scale * s)
        top = max(logits, default=0.0)
        total = top + math.log(sum(math.exp(v - top) for v in logits)) if logits else 0.0
        losses.append(sum(total - v for v in positives) / len(positives) if positives else None)
    return losses


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d, views = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5)), data.draw(st.integers(1, 2))
    ticks = st.integers(-4, 4).map(float) if data.draw(st.booleans()) else st.floats(-5, 5, width=16)
    labels = data.draw(st.lists(ticks, min_size=n, max_size=n))
    population = data.draw(st.one_of(st.none(), st.lists(ticks, min_size=1, max_size=20).map(sorted)))
    z = batch(n * views, d, data.draw(st.integers(0, 10**6)))
    if data.draw(st.booleans()):
        z[0] = 0.0
    scale = data.draw(st.sampled_from([1.0, 150.0]))
    want = slow(z.tolist(), labels * views, scale, population or sorted(set(labels)))
    if views == 2:
        z = z.view(views, n, d).movedim(0, 1)
    options = {"scale": scale, "population": numbers(population) if population else None}
    per = adaptive_supcon_loss(z, numbers(labels), reduction="none", **options)
    assert per.shape == z.shape[:-1]
    assert (per.T.flatten() if views == 2 else per).tolist() == pytest.approx(
        [v or 0.0 for v in want], rel=1e-11, abs=1e-11
    )
    defined = [v for v in want if v is not None]
    mean = sum(defined) / len(defined) if defined else 0.0
    assert adaptive_supcon_loss(z, numbers(labels), **options).item() == pytest.approx(mean, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("labels", [TIED, [4.0] * 9, [1.0] + [2.0] * 8], ids=str)
def test_gradcheck(labels, reduction) -> None:
    z = batch(9, 3)
    z[3] = z[2] * 0.7
    assert torch.autograd.gradcheck(
        lambda z: adaptive_supcon_loss(z, numbers(labels), scale=6.0, reduction=reduction), z.requires_grad_()
    )


def test_no_positive_is_zero_and_joined_to_the_graph() -> None:
    for labels in ([3.0], [1.0, 2.0, 5.0]):
        z = batch(len(labels)).requires_grad_()
        loss = adaptive_supcon_loss(z, numbers(labels))
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


def test_only_the_order_of_labels_counts() -> None:
    z, y = batch(), numbers(TIED)
    value = adaptive_supcon_loss(z, y, scale=5.0)
    assert adaptive_supcon_loss(z, y.exp(), scale=5.0) == value
    assert adaptive_supcon_loss(z, -y, scale=5.0).item() == pytest.approx(value.item(), rel=1e-12)
    value = adaptive_supcon_loss(z, y, scale=5.0, population=numbers(KNOWN))
    assert adaptive_supcon_loss(z, y + 0.2, scale=5.0, population=numbers(KNOWN), label_tolerance=1.0) == value
    flipped = adaptive_supcon_loss(z, -y, scale=5.0, population=-numbers(KNOWN).flip(0))
    assert flipped.item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 150.0, 1e3])
def test_extremes_are_finite_and_autocast_changes_nothing(dtype, scale) -> None:
    z = batch(12, 6).to(dtype)
    z[0], z[1], z[2], z[5], z[6] = 0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, z[4], -z[4]
    for labels in (torch.arange(12.0), torch.zeros(12), torch.arange(12) // 3 * 1e-6, torch.arange(12) % 2 * 1e6):
        z = z.detach().requires_grad_()
        loss = adaptive_supcon_loss(z, labels, scale=scale)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(adaptive_supcon_loss(z, labels, scale=scale), loss)


def test_nan_stays_nan() -> None:
    assert adaptive_supcon_loss(batch() * math.nan, numbers(TIED)).isnan()


def test_module_remembers_and_equals_the_function() -> None:
    options = {"scale": 20.0, "population": numbers(KNOWN), "label_tolerance": 2.0, "reduction": "sum"}
    module = AdaSupConLoss(**options)
    assert module(batch(), numbers(TIED)) == adaptive_supcon_loss(batch(), numbers(TIED), **options)
    assert list(module.state_dict()) == ["population"]
    assert repr(module) == "AdaSupConLoss(scale=20, population=8 labels, label_tolerance=2)"
    assert not AdaSupConLoss().state_dict()


loss = adaptive_supcon_loss
BAD = [
    (lambda z, y: loss(z, y[:4]), ValueError, r"labels has 4 entries but embeddings has 9 rows; pass one entry"),
    (lambda z, y: loss(z, y, scale=0.0), ValueError, r"scale is 0\.0; pass a finite number greater than 0"),
    (lambda z, y: loss(z, y, population=KNOWN), TypeError, r"population is a list; pass a torch\.Tensor"),
    (lambda z, y: loss(z, y, population=y[:0]), ValueError, r"population has shape \(0,\) .*; pass the labels of"),
    (lambda z, y: loss(z, y, population=y * math.inf), ValueError, r"population holds NaN or infinity; leave out"),
    (lambda z, y: AdaSupConLoss(population=y), ValueError, r"Loss: population is not in ascending order; pass pop"),
    (lambda z, y: loss(z, y, label_tolerance=-1.0), ValueError, r"label_tolerance is -1\.0; pass a finite number"),
    (lambda z, y: AdaSupConLoss(reduction="avg"), ValueError, r"reduction is 'avg'; pass one of 'none', 'mean'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(batch(), numbers(TIED))
