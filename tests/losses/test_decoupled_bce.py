"""Decoupled Mixup with binary cross entropy, and the plain form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.losses import decoupled_mixup_bce_loss, soft_bce_loss
from hardmix.mixing import MixedTarget
from tests.losses import slow_classification as slow

Z = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
PAIR = MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]], dtype=torch.float64))


def wanted(target: MixedTarget, num_classes: int, xi: float, t: float) -> list[list[float]]:
    rows = []
    for labels, weights in zip(target.labels.tolist(), target.weights.tolist(), strict=True):
        row = [0.0] * num_classes
        for label, weight in zip(labels, weights, strict=True):
            row[label] += slow.rescale(weight, xi, t)
        rows.append([min(1.0, y) for y in row])
    return rows


@pytest.mark.parametrize(
    ("xi", "t", "value"), [(1.0, 1.0, 3.427528), (0.8, 1.0, 3.102528), (1.0, 0.5, 2.795423), (1.0, 0.0, 1.727528)]
)
def test_the_reference_vectors(xi: float, t: float, value: float) -> None:
    assert decoupled_mixup_bce_loss(Z, PAIR, xi=xi, t=t).item() == pytest.approx(value, abs=1e-6)
    if xi == t == 1.0:
        assert soft_bce_loss(Z, PAIR).item() == pytest.approx(value, abs=1e-6)


def test_the_reference_shares() -> None:
    """With z = 0 and one label the slope in the target is visible: l = C log 2, dl/dz = 1/2 - r."""
    shares = [0.1, 0.3, 0.5, 0.7, 0.9]
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({"xi": 0.8, "t": 1.0}, [0.125, 0.375, 0.625, 0.875, 1.0]),
        ({"xi": 1.0, "t": 0.5}, [0.3162, 0.5477, 0.7071, 0.8367, 0.9487]),
        ({"xi": 1.0, "t": 0.0}, [1.0] * 5),
    ]
    for settings_, want in cases:
        z = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
        target = MixedTarget(torch.ones(5, 1, dtype=torch.long), torch.tensor(shares, dtype=torch.float64)[:, None])
        decoupled_mixup_bce_loss(z, target, reduction="sum", **settings_).backward()
        assert z.grad is not None
        assert (0.5 - z.grad[:, 1]).tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_slow_loop(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, c, k = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 8), (1, 12), (1, 4)))
    xi = 0.2 + 0.8 * float(torch.rand(1, generator=g))
    t = (0.0, 0.3, 0.5, 1.0, 2.0)[seed % 5]
    logits = torch.randn(n, c, generator=g, dtype=torch.float64) * 6
    target = MixedTarget(
        torch.randint(c, (n, k), generator=g), torch.rand(n, k, generator=g, dtype=torch.float64).round(decimals=1)
    )
    weight = torch.rand(c, generator=g, dtype=torch.float64) if seed % 2 else None
    factor = None if weight is None else weight.numpy()
    rows = wanted(target, c, xi, t)
    want = np.array([slow.bce_row(z, y, factor) for z, y in zip(logits.numpy(), rows, strict=True)])
    multi_hot = MixedTarget(F.one_hot(target.labels, c), target.weights)
    for y in (target, multi_hot):
        got = decoupled_mixup_bce_loss(logits, y, xi=xi, t=t, weight=weight, reduction="none")
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14 if y is multi_hot else 0)
    single = logits.float()
    want = np.array([slow.bce_row(z, y, factor) for z, y in zip(single.numpy(), rows, strict=True)])
    got = decoupled_mixup_bce_loss(single, target, xi=xi, t=t, weight=weight, reduction="none")
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


def test_multi_hot_rows() -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(5, 6, generator=g, dtype=torch.float64)
    rows = torch.rand(5, 2, 6, generator=g) < 0.4
    lam = torch.rand(5, generator=g, dtype=torch.float64)
    target = MixedTarget(rows, torch.stack([lam, 1 - lam], 1))
    mixed = lam[:, None] * rows[:, 0] + (1 - lam)[:, None] * rows[:, 1]
    want = F.binary_cross_entropy_with_logits(z, mixed, reduction="none").sum(1)
    torch.testing.assert_close(soft_bce_loss(z, target, reduction="none"), want)
    torch.testing.assert_close(soft_bce_loss(z, mixed), want.mean())
    both = (rows[:, 0] | rows[:, 1]).double()
    got = decoupled_mixup_bce_loss(z, target, t=0.0)
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(z, both, reduction="none").sum(1).mean())


def test_two_shares_of_one_class_stop_at_one() -> None:
    target = MixedTarget(torch.tensor([[2, 2]]), torch.tensor([[0.4, 0.6]], dtype=torch.float64))
    want = soft_bce_loss(Z, torch.tensor([2]))
    for xi, t in ((0.8, 1.0), (1.0, 0.5), (1.0, 0.0), (1.0, 1.0)):
        torch.testing.assert_close(decoupled_mixup_bce_loss(Z, target, xi=xi, t=t), want)


def test_forms_of_the_target_agree() -> None:
    g = torch.Generator().manual_seed(2)
    z = torch.randn(4, 5, generator=g, dtype=torch.float64)
    y = torch.tensor([4, 0, 2, 2])
    want = F.binary_cross_entropy_with_logits(z, F.one_hot(y, 5).double(), reduction="none").sum(1).mean()
    for form in (y, y.int(), MixedTarget(y[:, None], torch.ones(4, 1)), F.one_hot(y, 5).double()):
        torch.testing.assert_close(decoupled_mixup_bce_loss(z, form, xi=0.7, t=0.5), want)
    pair = MixedTarget(torch.tensor([[0, 1], [3, 2], [4, 0], [1, 4]]), torch.rand(4, 2, generator=g).double())
    for xi, t in ((0.8, 1.0), (1.0, 0.5), (1.0, 0.0), (0.6, 2.0)):
        want = decoupled_mixup_bce_loss(z, pair, xi=xi, t=t)
        torch.testing.assert_close(decoupled_mixup_bce_loss(z, pair.dense(5), xi=xi, t=t), want)


def test_pixels_are_rows() -> None:
    g = torch.Generator().manual_seed(3)
    z = torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(5, (2, 2, 3, 4), generator=g)
    weights = torch.rand(2, 2, generator=g, dtype=torch.float64)
    full = weights[:, :, None, None].expand_as(labels)
    flat = [x.movedim(1, -1).flatten(0, -2) for x in (z, labels, full)]
    weight = torch.rand(5, generator=g)
    want = decoupled_mixup_bce_loss(flat[0], MixedTarget(*flat[1:]), xi=0.8, weight=weight, reduction="none")
    got = decoupled_mixup_bce_loss(z, MixedTarget(labels, weights), xi=0.8, weight=weight, reduction="none")
    assert got.shape == (2, 3, 4)
    torch.testing.assert_close(got.flatten(), want)
    torch.testing.assert_close(soft_bce_loss(z, labels[:, 0]), soft_bce_loss(flat[0], flat[1][:, 0]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["pair", "dense", "ids", "same", "weighted"])
def test_gradcheck(form: str, reduction: str) -> None:
    g = torch.Generator().manual_seed(4)
    z = torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1], [2, 2], [4, 0], [3, 1]])
    target: Any = MixedTarget(labels, torch.rand(4, 2, generator=g, dtype=torch.float64))
    weight = torch.rand(5, generator=g, dtype=torch.float64) if form == "weighted" else None
    if form == "dense":
        target = torch.rand(4, 5, generator=g, dtype=torch.float64)
    elif form == "ids":
        target = labels[:, 0]
    elif form == "same":
        target = MixedTarget(labels[:, :1].expand(4, 2), target.weights)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return decoupled_mixup_bce_loss(x, target, xi=0.8, t=0.5, weight=weight, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (z,))
    assert torch.autograd.gradgradcheck(loss, (z,))


def test_gradient_at_logits_of_zero() -> None:
    """Where a head starts: |z| has no slope there, the loss has one."""
    z = torch.zeros(2, 3, requires_grad=True)
    soft_bce_loss(z, torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.0, 1.0]]), reduction="sum").backward()
    torch.testing.assert_close(z.grad, torch.tensor([[-0.5, 0.2, 0.5], [0.5, 0.5, -0.5]]))


def test_shares_may_be_learnt() -> None:
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[0.2, 0.1], [0.3, 0.6], [0.0, 0.4]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1], [3, 2], [1, 2]])
    decoupled_mixup_bce_loss(z, MixedTarget(labels, weights), t=0.5).backward()
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    assert weights.grad[1].abs().min() > 0

    def loss(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return decoupled_mixup_bce_loss(x, MixedTarget(labels, w), t=2.0, weight=v)

    inside = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (z, inside, torch.rand(4, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    rounded = torch.randn(6, 300, generator=g).mul_(4).to(dtype)
    target = MixedTarget(torch.randint(300, (6, 2), generator=g), torch.rand(6, 2, generator=g))
    for y in (target, target.dense(300), target.dense(300).to(dtype)):
        low, high = rounded.clone().requires_grad_(), rounded.double().requires_grad_()
        got, want = (decoupled_mixup_bce_loss(z, y, xi=0.8, t=0.5) for z in (low, high))
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        (grad,) = torch.autograd.grad(got, low)
        (exact,) = torch.autograd.grad(want, high)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@settings(max_examples=500, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([1, 2, 30]),
    st.sampled_from([0.0, 1e-30, 1.0, 60.0, 6e4]),
)
def test_finite_at_the_extremes(seed: int, dtype: torch.dtype, c: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    n, k = 1 + seed % 4, 1 + seed % 3
    z = ((torch.randint(3, (n, c), generator=g) - 1.0) * size).to(dtype).requires_grad_()
    target = MixedTarget(torch.randint(c, (n, k), generator=g), torch.rand(n, k, generator=g).double())
    # the last of them is plain binary cross entropy
    xi, t = ((1.0, 0.0), (0.3, 0.5), (1e-3, 3.0), (1.0, 1.0))[seed // 3 % 4]
    loss = decoupled_mixup_bce_loss(z, target, xi=xi, t=t)
    (grad,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    rows = wanted(target, c, xi, t)
    want = np.mean([slow.bce_row(row, y) for row, y in zip(z.detach().double().numpy(), rows, strict=True)])
    # z (1 - y) with y near 1: the shares are held in float32, so 1 - y is right to their rounding, not to its own
    shares = 2 * k * torch.finfo(torch.float32).eps * z.detach().abs().max().item()
    assert loss.item() == pytest.approx(want, rel=2e-6, abs=1e-30 + shares)


@pytest.mark.parametrize("place", range(4))
def test_nan_is_never_a_number(place: int) -> None:
    z = Z.clone()
    z[0, place] = torch.nan
    for target in (PAIR, PAIR.labels[:, 0], PAIR.dense(4)):
        assert decoupled_mixup_bce_loss(z, target, xi=0.8).isnan()
    for xi, t in ((1.0, 1.0), (0.8, 1.0), (0.8, 0.5)):
        spoilt = MixedTarget(PAIR.labels, PAIR.weights * torch.nan)
        assert decoupled_mixup_bce_loss(Z, spoilt, xi=xi, t=t).isnan()


def test_inputs_are_not_written() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    target = MixedTarget(torch.randint(4, (3, 2)), torch.rand(3, 2))
    parts = [z, *target, target.dense(4)]
    before = [part.detach().clone() for part in parts]
    for y in (target, parts[-1]):
        decoupled_mixup_bce_loss(z, y, xi=0.8, weight=torch.rand(4)).backward()
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


@pytest.mark.parametrize("loss", [soft_bce_loss, lambda z, target: decoupled_mixup_bce_loss(z, target, xi=0.8)])
@pytest.mark.parametrize("labels", [[[1, 1]], [[1, 0, 1]], [[2, 2, 2]]])
def test_gradients_of_learnt_shares_of_one_class(loss: Any, labels: list[list[int]]) -> None:
    z = torch.tensor([[0.5, -1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([[0.2, 0.25, 0.15][: len(labels[0])]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z, w: loss(z, MixedTarget(torch.tensor(labels), w)), (z, shares))
    torch.autograd.gradgradcheck(lambda z, w: loss(z, MixedTarget(torch.tensor(labels), w)), (z, shares))


def test_a_class_that_is_out_of_the_question_costs_nothing_however_it_is_computed() -> None:
    z, y = torch.tensor([[2.0, -torch.inf, 0.5]]), torch.tensor([0])
    want = soft_bce_loss(z, y)
    assert want.isfinite()
    compiled = torch.compile(lambda z: soft_bce_loss(z, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), want)
    torch.testing.assert_close(torch.func.vmap(lambda z: soft_bce_loss(z, y))(z[None])[0], want)
    shares = torch.tensor([[0.3, 0.7]])
    for weight in (None, torch.tensor([1.0, 2.0, 3.0])):
        settled = soft_bce_loss(z, MixedTarget(torch.tensor([[0, 2]]), shares), weight=weight)
        learnt = soft_bce_loss(z, MixedTarget(torch.tensor([[0, 2]]), shares.clone().requires_grad_()), weight=weight)
        torch.testing.assert_close(learnt.detach(), settled)
