"""RankSim against ranks counted one by one, and its backward against the formula that stands in for a derivative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.losses import RankSimLoss, ranksim_loss

TIED = [3.0, 1.0, 2.0, 2.0, 5.0, 3.0, 9.0, 2.0, 4.0]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 9, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=rng(seed))


def ranks(values: list[float]) -> list[float]:
    return [(1 + sum(other > value for other in values)) / len(values) for value in values]


def slow(x: Tensor, labels: list[float], step: float, weight: float) -> tuple[list[float], Tensor]:
    """Loss of every row, 0 where its label came before, and the gradient of `weight` times their sum."""
    rows = [i for i in range(len(labels)) if labels[i] not in labels[:i]]
    n = len(rows)
    x = x.clone().requires_grad_()
    losses, linear = [0.0] * len(labels), x.sum() * 0.0
    for i in rows:
        s = [(x[i] @ x[j]) / (x[i].norm() * x[j].norm()) for j in rows]
        values = [v.item() for v in s]
        got, wanted = ranks(values), ranks([-abs(labels[i] - labels[j]) for j in rows])
        losses[i] = sum((a - b) ** 2 for a, b in zip(got, wanted, strict=True)) / n
        g = [weight * 2 * (a - b) / n for a, b in zip(got, wanted, strict=True)]
        moved = ranks([v + step * slope for v, slope in zip(values, g, strict=True)])
        for j in range(n):
            linear = linear - (got[j] - moved[j]) / step * s[j]
    return losses, torch.autograd.grad(linear, x)[0]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5))
    ticks = st.integers(-4, 4).map(float) if data.draw(st.booleans()) else st.floats(-5, 5, width=16)
    labels = data.draw(st.lists(ticks, min_size=n, max_size=n))
    x = batch(n, d, data.draw(st.integers(0, 10**6)))
    step, weight = data.draw(st.sampled_from([0.1, 2.0, 30.0])), data.draw(st.sampled_from([0.5, 1.0, 100.0]))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    number = len(set(labels)) if reduction == "mean" else 1
    want, slope = slow(x, labels, step, weight / number)
    x.requires_grad_()
    y = torch.tensor(labels, dtype=torch.float64)
    loss = ranksim_loss(x, y, step=step, reduction=reduction)
    (grad,) = torch.autograd.grad(weight * loss, x)
    assert loss.item() == pytest.approx(sum(want) / number, rel=1e-12, abs=1e-15)
    assert torch.allclose(grad, slope, rtol=1e-10, atol=1e-12)
    assert ranksim_loss(x, y, reduction="none").tolist() == pytest.approx(want, rel=1e-12)


def test_equal_values_share_the_best_rank() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # both neighbours have cosine 0 ...
    per = ranksim_loss(x, torch.tensor([5.0, 4.0, 6.0]), reduction="none")  # ... and label distance 1
    assert per[0] == 0.0
    per = ranksim_loss(x, torch.tensor([5.0, 4.0, 7.0]), reduction="none")  # ranks 1, 2, 2 but 1, 2, 3 by label
    assert per[0].item() == pytest.approx(1 / 27)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_rows_are_ties_however_their_products_are_rounded(dtype) -> None:
    labels = torch.arange(5.0)
    for seed in range(40):
        same = torch.randn(1, 513, generator=rng(seed), dtype=dtype).repeat(5, 1)
        assert ranksim_loss(same, labels).item() == pytest.approx(ranksim_loss(torch.ones(5, 2), labels).item())


def test_features_in_the_order_of_the_labels_are_at_rest_and_others_get_there() -> None:
    y = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    arc = torch.stack([(y / 6).cos(), (y / 6).sin()], 1).requires_grad_()
    assert ranksim_loss(arc, y) == 0
    assert not torch.autograd.grad(ranksim_loss(arc, y), arc)[0].any()
    x = batch(12, 8).requires_grad_()
    y = torch.randperm(12, generator=rng())
    start = ranksim_loss(x, y).item()
    for _ in range(200):
        (grad,) = torch.autograd.grad(100 * ranksim_loss(x, y, reduction="sum"), x)
        x = (x - 0.02 * grad).detach().requires_grad_()
    assert ranksim_loss(x, y).item() < 0.5 * start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes_are_finite_and_autocast_changes_nothing(dtype) -> None:
    x = torch.randn(12, 6, generator=rng()).to(dtype)
    x[0], x[1], x[2], x[5] = 0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, x[4]
    for labels in (torch.arange(12.0), torch.zeros(12), torch.arange(12) // 3 * 1e-6, torch.arange(12) % 2 * 1e6):
        x = x.detach().requires_grad_()
        loss = ranksim_loss(x, labels)
        (grad,) = torch.autograd.grad(1e4 * loss, x)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert grad.isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ranksim_loss(x, labels), loss)


def test_one_label_is_zero_and_joined_to_the_graph() -> None:
    for x, labels in ((batch(1), [3.0]), (batch(3), [2.0, 2.0, 2.0])):
        x.requires_grad_()
        loss = ranksim_loss(x, torch.tensor(labels))
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


def test_nan_stays_nan() -> None:
    x = batch()
    x[6, 1] = math.nan
    assert ranksim_loss(x, torch.tensor(TIED)).isnan()


def test_module_remembers_and_equals_the_function() -> None:
    module = RankSimLoss(step=0.5, reduction="none")
    assert torch.equal(module(batch(), torch.tensor(TIED)), ranksim_loss(batch(), torch.tensor(TIED), reduction="none"))
    assert repr(module) == "RankSimLoss(step=0.5, reduction='none')"


BAD = [
    (lambda x, y: ranksim_loss(x.long(), y), TypeError, r"features has dtype torch\.int64; pass floating-point"),
    (lambda x, y: ranksim_loss(x[:, None], y), ValueError, r"features has shape \(9, 1, 4\); pass a batch with 2 axes"),
    (lambda x, y: ranksim_loss(x[:0], y[:0]), ValueError, r"is empty; pass at least one sample"),
    (lambda x, y: ranksim_loss(x, y[:4]), ValueError, r"labels has 4 entries but features has 9 rows; pass one entry"),
    (lambda x, y: ranksim_loss(x, y.to("meta")), ValueError, r"labels is on meta but features is on cpu; move both"),
    (lambda x, y: ranksim_loss(x, y.tolist()), TypeError, r"labels is a list; pass a torch\.Tensor"),
    (lambda x, y: ranksim_loss(x, y + math.inf), ValueError, r"labels holds NaN or infinity at 0, 1, 2, 3, 4; leave"),
    (lambda x, y: ranksim_loss(x, y, step=0.0), ValueError, r"step is 0\.0; pass a finite number greater than 0"),
    (lambda x, y: RankSimLoss(step="2"), ValueError, r"RankSimLoss: step is '2'; pass a finite number greater than 0"),
    (lambda x, y: RankSimLoss(reduction="avg"), ValueError, r"reduction is 'avg'; pass one of 'none', 'mean', 'sum'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(batch(), torch.tensor(TIED))
