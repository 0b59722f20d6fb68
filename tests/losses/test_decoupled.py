"""Decoupled Mixup with cross entropy, and mixed cross entropy where both are the same code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.losses import decoupled_mixup_bce_loss, decoupled_mixup_loss, soft_bce_loss, soft_cross_entropy_loss
from hardmix.mixing import MixedTarget
from tests.losses import slow_classification as slow

Z = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
PAIR = MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]], dtype=torch.float64))


def draw(seed: int, *, spread: float = 3.0, max_labels: int = 4) -> tuple[torch.Tensor, MixedTarget, torch.Generator]:
    """Random logits (N, C) in float64 and labels (N, K), with many ties between the labels."""
    g = torch.Generator().manual_seed(seed)
    n, c, k = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 9), (2, 12), (1, max_labels + 1)))
    logits = torch.randn(n, c, generator=g, dtype=torch.float64) * spread
    labels = torch.randint(min(c, k + 1), (n, k), generator=g)
    weights = torch.rand(n, k, generator=g, dtype=torch.float64) + 0.01
    return logits, MixedTarget(labels, weights / weights.sum(1, keepdim=True)), g


def slow_rows(logits: torch.Tensor, target: MixedTarget, **settings: Any) -> np.ndarray:
    rows = zip(logits.double().numpy(), target.labels.tolist(), target.weights.double().tolist(), strict=True)
    return np.array([slow.mixed_row(z, y, w, **settings) for z, y, w in rows])


def grad_of(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, x)[0]


# Values


def test_the_reference_vectors() -> None:
    z = Z.clone().requires_grad_()
    mixed = soft_cross_entropy_loss(z, PAIR)
    assert mixed.item() == pytest.approx(1.195182, abs=1e-6)
    assert (decoupled_mixup_loss(z, PAIR, eta=1.0) - mixed).item() == pytest.approx(0.796268, abs=1e-6)
    assert (decoupled_mixup_loss(z, PAIR, eta=1.0, asymmetric=True) - mixed).item() == pytest.approx(0.241311, abs=1e-6)
    assert decoupled_mixup_loss(z, PAIR, eta=0.1).item() == pytest.approx(1.274809, abs=1e-6)
    assert decoupled_mixup_loss(z, PAIR, eta=0.1, asymmetric=True).item() == pytest.approx(1.219313, abs=1e-6)
    assert grad_of(mixed, z)[0].tolist() == pytest.approx([0.309460, -0.475792, 0.135989, 0.030343], abs=1e-6)
    pull = grad_of(decoupled_mixup_loss(z, PAIR, eta=1.0) - soft_cross_entropy_loss(z, PAIR), z)
    assert pull[0].tolist() == pytest.approx([-0.214403, -0.425903, 0.523498, 0.116808], abs=1e-6)


def test_the_reference_vector_of_three_labels() -> None:
    z = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]], dtype=torch.float64)
    target = MixedTarget(torch.tensor([[0, 1, 2]]), torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64))
    mixed = soft_cross_entropy_loss(z, target).item()
    assert mixed == pytest.approx(1.624438, abs=1e-6)
    assert decoupled_mixup_loss(z, target, eta=1.0).item() - mixed == pytest.approx(1.181583, abs=1e-6)
    first = MixedTarget(target.labels.roll(1, 1), target.weights.roll(1, 1))
    for order, value in ((target, 0.169846), (first, 0.604131)):
        got = decoupled_mixup_loss(z, order, eta=1.0, asymmetric=True).item() - mixed
        assert got == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_slow_loop(seed: int) -> None:
    logits, target, g = draw(seed)
    eta = float(torch.rand(1, generator=g)) * 2
    options: dict[str, Any] = {"asymmetric": seed % 3 == 0, "smoothing": 0.0}
    call: dict[str, Any] = {"eta": eta, "asymmetric": options["asymmetric"], "reduction": "none"}
    if seed % 2:
        options["class_weight"] = call["weight"] = torch.rand(logits.shape[1], generator=g, dtype=torch.float64)
    if seed % 5 < 2:
        options["smoothing"] = call["label_smoothing"] = 0.1
    want = slow_rows(logits, target, eta=eta, **options)
    np.testing.assert_allclose(decoupled_mixup_loss(logits, target, **call).numpy(), want, rtol=1e-12)
    # Rounding the logits is not the loss's error: the loop gets the rounded ones.
    single = logits.float()
    target = MixedTarget(target.labels, target.weights.float())
    if "weight" in call:
        options["class_weight"] = call["weight"] = call["weight"].float()
    want = slow_rows(single, target, eta=eta, **options)
    got = decoupled_mixup_loss(single, target, **call)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 10.0, 20.0, 50.0, 86.0, 90.0, 110.0, 1000.0])
def test_every_gap_keeps_its_digits(gap: float) -> None:
    """log p - log(1 - p) loses all of them from a gap of 16 on."""
    for z in ([gap, -gap, 0.0, 1.0], [-gap, -gap, 0.0, 1.0], [gap, gap, 0.0, 1.0], [0.0, -gap, 2.0, gap]):
        logits = torch.tensor([z])
        want = slow_rows(logits, PAIR, eta=1.0)
        got = decoupled_mixup_loss(logits, PAIR, eta=1.0, reduction="none").numpy()
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-37)


def test_a_shift_of_the_logits_costs_no_digits() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).mul_(8).round_().div_(8)
    logits[0, 0] = 200.0  # one row that the plain softmax can't express
    target = MixedTarget(torch.arange(6)[:, None] + torch.tensor([0, 2]), torch.full((6, 2), 0.5))
    for z in (logits, logits[1:]):
        rows = MixedTarget(*(part[-len(z) :] for part in target))
        for smoothing in (0.0, 0.1):
            here = decoupled_mixup_loss(z, rows, label_smoothing=smoothing)
            for learnt in (False, True):  # with a learnt target autograd goes through the formula
                rows.weights.requires_grad_(learnt)
                there = decoupled_mixup_loss(z + 65536.0, rows, label_smoothing=smoothing)
                assert there.item() == pytest.approx(here.item(), rel=1e-6)


# Gradients


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "case",
    [
        "pair",
        "same",
        "triple",
        "asymmetric",
        "weights",
        "smoothing",
        "smoothed weights",
        "ignore",
        "far",
        "far smoothing",
    ],
)
def test_gradcheck(case: str, reduction: str) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 6, generator=g, dtype=torch.float64)
    labels = torch.tensor([[0, 1], [2, 2], [5, 3], [1, 0], [4, 5]])
    weights = torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.9995, 0.0005]], dtype=torch.float64)
    options: dict[str, Any] = {"eta": 0.7, "reduction": reduction}
    if case == "same":
        labels = labels[:, :1].expand(-1, 2)
    elif case == "triple":
        labels = torch.tensor([[0, 1, 2], [2, 2, 2], [5, 3, 5], [1, 1, 0], [4, 5, 5]])
        weights = torch.rand(5, 3, generator=g, dtype=torch.float64)
    elif case == "asymmetric":
        options["asymmetric"] = True
    elif case == "weights" or case == "smoothed weights":
        options["weight"] = torch.rand(6, generator=g, dtype=torch.float64)
    elif case == "ignore":
        labels = torch.tensor([[0, -100], [-100, 2], [-100, -100], [1, 0], [4, 5]])
    elif case.startswith("far"):  # the batch does not fit into one softmax: the other way through the kernel
        logits[0, 0] += 200.0
        logits[2, 3] -= 300.0
    if "smooth" in case:
        options["label_smoothing"] = 0.2
    target = MixedTarget(labels, weights)
    logits.requires_grad_()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return decoupled_mixup_loss(z, target, **options)

    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-5, rtol=1e-3)
    if reduction != "sum" and not case.startswith("far"):
        assert torch.autograd.gradgradcheck(loss, (logits,), eps=1e-6, atol=1e-5, rtol=1e-3)


def test_gradcheck_of_pixels() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 4, (2, 2, 2, 3), generator=g)
    target = MixedTarget(labels, torch.rand(2, 2, 1, 3, generator=g, dtype=torch.float64).round(decimals=1))

    def loss(z: torch.Tensor) -> torch.Tensor:
        return decoupled_mixup_loss(z, target, eta=0.5, label_smoothing=0.1, ignore_index=-1, reduction="none")

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


def test_shares_weights_and_soft_labels_may_be_learnt() -> None:
    g = torch.Generator().manual_seed(3)
    logits, weights = (torch.rand(4, c, generator=g, dtype=torch.float64, requires_grad=True) for c in (5, 2))
    dense = torch.rand(4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1], [2, 2], [4, 3], [1, 0]])

    def of_pair(z: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return decoupled_mixup_loss(z, MixedTarget(labels, w), weight=v, label_smoothing=0.1)

    def of_dense(z: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return decoupled_mixup_loss(z, y, weight=v)

    assert torch.autograd.gradcheck(of_pair, (logits, weights, weight))
    assert torch.autograd.gradcheck(of_dense, (logits, dense, weight))


def test_a_certain_class_has_a_second_derivative() -> None:
    """What is not that class underflows to 0, and the slope of log at 0 is infinite."""
    z = torch.tensor([[150.0, 1.0, 0.0, -1.0], [-150.0, 0.0, 1.0, 150.0]], requires_grad=True)
    target = MixedTarget(torch.tensor([[0, 1], [3, 3]]), torch.tensor([[0.3, 0.7], [0.5, 0.5]]))
    (grad,) = torch.autograd.grad(decoupled_mixup_loss(z, target), z, create_graph=True)
    want = grad_of(decoupled_mixup_loss(z, target), z)
    torch.testing.assert_close(grad, want)
    assert torch.isfinite(grad_of(grad.square().sum(), z)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    rounded = torch.randn(8, 50, generator=g).mul_(4).to(dtype)
    target = MixedTarget(torch.randint(50, (8, 2), generator=g), torch.rand(8, 2, generator=g))
    low, high = rounded.clone().requires_grad_(), rounded.double().requires_grad_()
    choices: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}]
    for options in choices:
        got = decoupled_mixup_loss(low, target, **options)
        want = decoupled_mixup_loss(high, target, **options)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        grad = grad_of(got, low)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), grad_of(want, high), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_retained_graph_gives_the_same_gradient_twice() -> None:
    z = Z.clone().requires_grad_()
    loss = decoupled_mixup_loss(z, PAIR)
    first = torch.autograd.grad(loss, z, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, z)[0])


def test_inputs_are_not_written() -> None:
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 6, generator=g, requires_grad=True)
    target = MixedTarget(torch.randint(6, (4, 2), generator=g), torch.rand(4, 2, generator=g))
    parts = [logits, *target, target.dense(6)]
    before = [part.detach().clone() for part in parts]
    for y in (target, parts[-1]):
        decoupled_mixup_loss(logits, y, label_smoothing=0.1, ignore_index=3).backward()
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_memory_layout(layout: str) -> None:
    base = torch.randn(7, 7, generator=torch.Generator().manual_seed(6))
    logits = {"transposed": base.T, "strided": base[:, ::2], "expanded": base[:1].expand(7, 7)}[layout]
    target = MixedTarget(torch.randint(4, (2, 7)).T, torch.rand(2, 7).T)
    grads = []
    for z in (logits, logits.contiguous()):
        z = z.detach().requires_grad_()
        grads.append(grad_of(decoupled_mixup_loss(z, target), z))
    torch.testing.assert_close(grads[0], grads[1], rtol=0.0, atol=0.0)


# What the regulariser is, and where it is not


def test_lambda_does_not_enter_the_regulariser() -> None:
    """Also at one half, near 0 and 1, and at 0 and 1, where the released code leaves it out."""
    pulls = set()
    for lam in (0.0, 0.0005, 0.3, 0.5, 0.9995, 1.0):
        target = MixedTarget(PAIR.labels, torch.tensor([[lam, 1 - lam]], dtype=torch.float64))
        pull = decoupled_mixup_loss(Z, target, eta=1.0) - soft_cross_entropy_loss(Z, target)
        pulls.add(round(pull.item(), 12))
    assert len(pulls) == 1


def test_one_class_is_plain_cross_entropy() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, 3, 2, 2, 1])
    want = F.cross_entropy(logits, y)
    twice = MixedTarget(y[:, None].expand(-1, 2), torch.tensor([[0.4, 0.6]], dtype=torch.float64).expand(5, 2))
    for target in (y, y.int(), y.to(torch.uint8), twice, F.one_hot(y, 4).double()):
        torch.testing.assert_close(decoupled_mixup_loss(logits, target, eta=2.0), want, rtol=1e-12, atol=0)


def test_rows_do_not_see_each_other() -> None:
    """One lambda per row, and no row's order decides for the batch."""
    logits, target, _ = draw(17)
    whole = decoupled_mixup_loss(logits, target, reduction="none")
    for i in range(len(logits)):
        one = decoupled_mixup_loss(logits[i : i + 1], MixedTarget(*(part[i : i + 1] for part in target)))
        torch.testing.assert_close(one, whole[i], rtol=1e-12, atol=0)
    swapped = MixedTarget(target.labels.flip(1), target.weights.flip(1))
    torch.testing.assert_close(decoupled_mixup_loss(logits, swapped, reduction="none"), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_two_classes_leave_nothing_to_compare_with(asymmetric: bool) -> None:
    z = torch.tensor([[1.0, -2.0], [300.0, -300.0], [0.0, 0.0]], requires_grad=True)
    target = MixedTarget(torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.tensor([[0.3, 0.7]]).expand(3, 2))
    plain = soft_cross_entropy_loss(z, target)
    decoupled = decoupled_mixup_loss(z, target, eta=5.0, asymmetric=asymmetric)
    assert decoupled.item() == plain.item()
    grad = grad_of(decoupled, z)
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad, grad_of(plain, z), rtol=1e-6, atol=1e-7)


def test_classes_may_be_masked_with_minus_infinity() -> None:
    z = torch.tensor([[2.0, 1.0, -torch.inf, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    target = MixedTarget(torch.tensor([[0, 1]]), PAIR.weights)
    loss = decoupled_mixup_loss(z, target)
    assert loss.item() == pytest.approx(1.274809, abs=1e-6)
    grad = grad_of(loss, z)
    assert grad[0, 2] == 0
    assert torch.isfinite(grad).all()
    everything_else = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf]], requires_grad=True)
    loss = decoupled_mixup_loss(everything_else, MixedTarget(PAIR.labels, PAIR.weights.float()), eta=3.0)
    assert loss.item() == pytest.approx(F.cross_entropy(torch.tensor([[2.0, 1.0]]), PAIR.weights.float()).item())
    assert torch.isfinite(grad_of(loss, everything_else)).all()
    assert decoupled_mixup_loss(torch.tensor([[-torch.inf, 1.0, 0.0]]), PAIR).item() == torch.inf


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(4))
def test_nan_and_infinity_are_never_a_number(bad: float, place: int) -> None:
    z = Z.clone()
    z[0, place] = bad
    for target in (PAIR, PAIR.labels[:, 0], PAIR.dense(4)):
        for eta in (0.0, 0.1):
            assert decoupled_mixup_loss(z, target, eta=eta).isnan()
    assert decoupled_mixup_loss(Z, MixedTarget(PAIR.labels, PAIR.weights * torch.nan)).isnan()


@settings(max_examples=500, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([2, 3, 5, 40]),
    st.sampled_from([0.0, 1e-30, 1.0, 60.0, 1e4, 6e4]),
    st.booleans(),
    st.sampled_from([0.0, 2.0]),  # 0 is soft cross entropy
)
def test_finite_at_the_extremes(
    seed: int, dtype: torch.dtype, c: int, size: float, asymmetric: bool, eta: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    n, k = 1 + seed % 4, 1 + seed % 3
    levels = torch.tensor([-1.0, -1e-4, 0.0, 1e-4, 1.0]) * size
    z = levels[torch.randint(5, (n, c), generator=g)].to(dtype).requires_grad_()
    target = MixedTarget(torch.randint(c, (n, k), generator=g), torch.rand(n, k, generator=g))
    loss = decoupled_mixup_loss(z, target, eta=eta, asymmetric=asymmetric, label_smoothing=0.1 * (seed % 2))
    assert torch.isfinite(loss)
    assert torch.isfinite(grad_of(loss, z)).all()
    want = slow_rows(z.detach(), target, eta=eta, asymmetric=asymmetric, smoothing=0.1 * (seed % 2)).mean()
    assert loss.item() == pytest.approx(want, rel=2e-6, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_ends_of_a_dtype(dtype: torch.dtype) -> None:
    """Twice the largest float32 is no float32, yet loss and gradient are numbers."""
    end = torch.finfo(dtype).max
    z = torch.tensor([[end, -end, 0.0, 1.0], [-end, end, -end, -end], [-end] * 4, [end] * 4], dtype=dtype)
    z.requires_grad_()
    for labels in ([[0, 1]], [[1, 0]], [[0, 0]], [[2, 3]]):
        target = MixedTarget(torch.tensor(labels).expand(4, 2), torch.full((4, 2), 0.5))
        loss = decoupled_mixup_loss(z, target, eta=1.0)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad_of(loss, z)).all()
    two = decoupled_mixup_loss(z[:1, :2], MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]])))
    assert 0.0 <= two.item() < 1e-37
    assert 0.0 <= decoupled_mixup_loss(z[:1], torch.tensor([0])).item() < 1e-37


def test_many_classes_and_one_row() -> None:
    z = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(7))
    target = MixedTarget(torch.tensor([[3, 99_999]]), torch.tensor([[0.25, 0.75]]))
    np.testing.assert_allclose(decoupled_mixup_loss(z, target).item(), slow_rows(z, target, eta=0.1)[0], rtol=1e-6)


# Forms of the target


def test_dense_soft_labels_give_the_loss_of_their_pair() -> None:
    logits, _, g = draw(23)
    logits = torch.randn(6, 7, generator=g, dtype=torch.float64)
    labels = torch.tensor([[0, 1], [3, 2], [4, 4], [6, 0], [1, 2], [5, 5]])
    lam = torch.tensor([0.3, 0.5, 0.2, 0.9, 0.6, 1.0], dtype=torch.float64)
    target = MixedTarget(labels, torch.stack([lam, 1 - lam], 1))
    want = decoupled_mixup_loss(logits, target, eta=0.6, reduction="none")
    torch.testing.assert_close(
        decoupled_mixup_loss(logits, target.dense(7), eta=0.6, reduction="none"), want, rtol=1e-12, atol=0
    )
    smooth = decoupled_mixup_loss(logits, target, eta=0.6, label_smoothing=0.1, reduction="none")
    for y, inside in ((target.dense(7, 0.1), 0.0), (target.dense(7), 0.1)):
        got = decoupled_mixup_loss(logits, y, eta=0.6, label_smoothing=inside, reduction="none")
        torch.testing.assert_close(got, smooth, rtol=1e-12, atol=0)
    # float32 labels as timm makes them: the floor of the smoothing is no second class
    got = decoupled_mixup_loss(logits.float(), target.dense(7, 0.1).float(), eta=0.6, reduction="none")
    torch.testing.assert_close(got, smooth.float(), rtol=1e-5, atol=0)


def test_dense_gradient_is_that_of_the_pair() -> None:
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    target = MixedTarget(torch.tensor([[0, 1], [3, 2], [4, 4], [5, 0], [1, 2]]), torch.rand(5, 2, dtype=torch.float64))
    target = MixedTarget(target.labels, target.weights / target.weights.sum(1, keepdim=True))
    weight = torch.rand(6, dtype=torch.float64)
    choices: list[dict[str, Any]] = [{}, {"label_smoothing": 0.2, "weight": weight}]
    for options in choices:
        pair = grad_of(decoupled_mixup_loss(z, target, **options), z)
        dense = grad_of(decoupled_mixup_loss(z, target.dense(6), **options), z)
        torch.testing.assert_close(pair, dense, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("space", [(), (3, 2)], ids=str)
@pytest.mark.parametrize("piece", [1, 20, 10**6])
def test_dense_soft_labels_in_pieces(space: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient of many pieces are those of cross entropy, and far from 0 the logits keep their digits."""
    monkeypatch.setattr("hardmix.kernels.mixed_cross_entropy._PIECE", piece)
    g = torch.Generator().manual_seed(4)
    z = (torch.randn(5, 6, *space, generator=g) * 4 + 4096).round(decimals=2).requires_grad_()
    wide = z.detach().double().requires_grad_()
    soft = torch.rand(5, 6, *space, generator=g, dtype=torch.float64)  # masses other than 1
    for y in (soft, soft[:1].expand_as(soft)):
        want = F.cross_entropy(wide, y, reduction="none")
        got = soft_cross_entropy_loss(z, y.float(), reduction="none")
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
        torch.testing.assert_close(grad_of(got.sum(), z).double(), grad_of(want.sum(), wide), rtol=0, atol=3e-6)


def test_rows_of_one_hot_labels() -> None:
    g = torch.Generator().manual_seed(8)
    logits = torch.randn(5, 6, generator=g, dtype=torch.float64)
    labels = torch.randint(6, (5, 3), generator=g)
    weights = torch.rand(5, 3, generator=g, dtype=torch.float64)
    want = decoupled_mixup_loss(logits, MixedTarget(labels, weights), eta=0.4)
    rows = F.one_hot(labels, 6)
    for form in (rows, rows.double(), rows.bool()):
        got = decoupled_mixup_loss(logits, MixedTarget(form, weights), eta=0.4)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("space", [(4,), (3, 5), (2, 3, 2)])
def test_pixels_are_rows(space: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(9)
    logits = torch.randn(2, 5, *space, generator=g, dtype=torch.float64)
    labels = torch.randint(5, (2, 2, *space), generator=g)
    per_pixel = torch.rand(2, 2, *space, generator=g, dtype=torch.float64) + 0.1
    per_image = torch.rand(2, 2, generator=g, dtype=torch.float64) + 0.1
    choices: list[dict[str, Any]] = [{}, {"asymmetric": True, "label_smoothing": 0.1, "weight": torch.rand(5).double()}]
    for weights in (per_pixel, per_image, per_image.view(2, 2, *[1] * len(space))):
        full = weights.view(*weights.shape, *[1] * (logits.ndim - weights.ndim)).expand_as(labels)
        flat = [x.movedim(1, -1).flatten(0, -2) for x in (logits, labels, full)]
        for options in choices:
            want = decoupled_mixup_loss(flat[0], MixedTarget(*flat[1:]), reduction="none", **options)
            got = decoupled_mixup_loss(logits, MixedTarget(labels, weights), reduction="none", **options)
            assert got.shape == (2, *space)
            torch.testing.assert_close(got.flatten(), want, rtol=1e-12, atol=0)
    dense = torch.rand(2, 5, *space, generator=g, dtype=torch.float64)
    got = decoupled_mixup_loss(logits, dense, reduction="none").flatten()
    want = decoupled_mixup_loss(flat[0], dense.movedim(1, -1).flatten(0, -2), reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    got = decoupled_mixup_loss(logits, labels[:, 0])
    torch.testing.assert_close(got, F.cross_entropy(logits, labels[:, 0]), rtol=1e-12, atol=0)


def test_a_pixel_of_one_image_is_not_mixed() -> None:
    logits = torch.randn(1, 4, 1, 3, dtype=torch.float64)
    labels = torch.tensor([[[[0, 0, 0]], [[1, 1, 1]]]])
    target = MixedTarget(labels, torch.tensor([[[[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.5]]]], dtype=torch.float64))
    pull = decoupled_mixup_loss(logits, target, eta=1.0, reduction="none")
    pull = pull - soft_cross_entropy_loss(logits, target, reduction="none")
    assert pull[0, 0, :2].tolist() == [0.0, 0.0]
    assert pull[0, 0, 2] > 0.1


def test_channels_last_logits() -> None:
    logits = torch.randn(2, 5, 4, 3)
    target = MixedTarget(torch.randint(5, (2, 2, 4, 3)), torch.rand(2, 2))
    want = decoupled_mixup_loss(logits, target)
    z = logits.to(memory_format=torch.channels_last).requires_grad_()
    got = decoupled_mixup_loss(z, target)
    torch.testing.assert_close(got, want)
    y = logits.requires_grad_()
    torch.testing.assert_close(grad_of(got, z), grad_of(decoupled_mixup_loss(y, target), y))


# Ignored labels and reductions


def test_an_ignored_label_drops_out_with_its_share() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 9], [9, 3], [9, 9], [1, 2]])
    target = MixedTarget(labels, torch.tensor([[0.3, 0.7]], dtype=torch.float64).expand(4, 2))
    rows = decoupled_mixup_loss(logits, target, eta=0.5, ignore_index=9, reduction="none")
    single = F.cross_entropy(logits, torch.tensor([0, 3, 0, 0]), reduction="none")
    pair = decoupled_mixup_loss(logits[3:], MixedTarget(labels[3:], target.weights[3:]), eta=0.5)
    want = torch.stack([0.3 * single[0], 0.7 * single[1], single[2] * 0, pair])
    torch.testing.assert_close(rows, want, rtol=1e-12, atol=0)
    mean = decoupled_mixup_loss(logits, target, eta=0.5, ignore_index=9)
    torch.testing.assert_close(mean, want.sum() / 3, rtol=1e-12, atol=0)


def test_an_ignored_row_changes_no_other() -> None:
    """Lambda of 0 and 1 included: there a pair is regularised as well."""
    logits = torch.randn(3, 5, dtype=torch.float64)
    target = MixedTarget(torch.tensor([[0, 1], [2, 4], [-100, 3]]), torch.tensor([[0.0, 1.0]]).expand(3, 2).double())
    rows = decoupled_mixup_loss(logits, target, eta=0.5, reduction="none")
    alone = decoupled_mixup_loss(logits[:2], MixedTarget(*(part[:2] for part in target)), eta=0.5, reduction="none")
    torch.testing.assert_close(rows[:2], alone, rtol=1e-12, atol=0)


def test_of_three_labels_the_two_that_count_are_a_pair() -> None:
    logits = torch.randn(1, 6, dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    got = decoupled_mixup_loss(logits, MixedTarget(torch.tensor([[4, -100, 1]]), weights), eta=0.5)
    want = decoupled_mixup_loss(logits, MixedTarget(torch.tensor([[4, 1]]), weights[:, ::2]), eta=0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pixels", [False, True])
def test_without_the_own_label_nothing_is_regularised_asymmetrically(pixels: bool) -> None:
    logits = torch.randn(3, 6, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[-100, 0, 1, 2], [3, -100, 1, 2], [-100, 4, 4, -100]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).expand(3, 4)
    z, target = logits, MixedTarget(labels, weights)
    if pixels:
        z, target = logits[..., None], MixedTarget(labels[..., None], weights[..., None])
    options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
    got = decoupled_mixup_loss(z, target, eta=0.5, asymmetric=True, **options).flatten()
    plain = soft_cross_entropy_loss(z, target, **options).flatten()
    torch.testing.assert_close(got[[0, 2]], plain[[0, 2]], rtol=1e-12, atol=0)
    pull = slow.regulariser(logits[1].detach().numpy(), [3, 1, 2], asymmetric=True)
    assert (got - plain)[1].item() == pytest.approx(0.5 * pull)
    grads = [grad_of(loss[[0, 2]].sum(), logits) for loss in (got, plain)]
    torch.testing.assert_close(*grads)


def test_a_label_without_share_does_not_make_a_row_count() -> None:
    logits = torch.randn(2, 3, 2, dtype=torch.float64)
    labels = torch.tensor([[[0, 0], [255, 255]], [[255, 1], [1, 2]]])
    weights = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    rows = decoupled_mixup_loss(logits, MixedTarget(labels, weights), ignore_index=255, reduction="none")
    single = F.cross_entropy(logits, torch.tensor([[0, 0], [1, 1]]), reduction="none")
    torch.testing.assert_close(rows, single * torch.tensor([[0, 1], [0, 1]]), rtol=1e-12, atol=0)
    mean = decoupled_mixup_loss(logits, MixedTarget(labels, weights), ignore_index=255)
    torch.testing.assert_close(mean, rows.sum() / 2, rtol=1e-12, atol=0)


def test_a_batch_that_is_ignored_has_loss_zero_and_no_gradient() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    for target in (torch.full((3,), -100), MixedTarget(torch.full((3, 2), -100), torch.full((3, 2), 0.5))):
        loss = decoupled_mixup_loss(z, target, label_smoothing=0.1)
        assert loss.item() == 0.0
        assert not grad_of(loss, z).any()


def test_an_ignored_row_may_hold_anything() -> None:
    z = torch.tensor([[torch.nan, 1.0, 2.0], [0.0, 1.0, 2.0]])
    rows = decoupled_mixup_loss(z, torch.tensor([-100, 1]), reduction="none")
    assert rows[0] == 0.0
    assert decoupled_mixup_loss(z, torch.tensor([-100, 1])) == rows[1]


@pytest.mark.parametrize("index", [0, 2, -1])
def test_any_class_id_can_be_the_ignored_one(index: int) -> None:
    logits = torch.randn(6, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, index, 1, 0])
    got = decoupled_mixup_loss(logits, y, ignore_index=index)
    torch.testing.assert_close(got, F.cross_entropy(logits, y, ignore_index=index), rtol=1e-12, atol=0)


def test_class_weights_do_not_touch_the_regulariser() -> None:
    weight = torch.tensor([3.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    plain = decoupled_mixup_loss(Z, PAIR, eta=1.0) - soft_cross_entropy_loss(Z, PAIR)
    weighted = decoupled_mixup_loss(Z, PAIR, eta=1.0, weight=weight) - soft_cross_entropy_loss(Z, PAIR, weight=weight)
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=0)


def test_reductions() -> None:
    logits, target, _ = draw(40)
    rows = decoupled_mixup_loss(logits, target, reduction="none")
    assert rows.shape == logits.shape[:1]
    torch.testing.assert_close(decoupled_mixup_loss(logits, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(decoupled_mixup_loss(logits, target), rows.mean())


@pytest.mark.parametrize(
    "loss",
    [decoupled_mixup_loss, soft_cross_entropy_loss, decoupled_mixup_bce_loss, soft_bce_loss],
    ids=lambda f: f.__name__,
)
def test_gradients_of_one_sample_at_a_time(loss: Any) -> None:
    """`torch.func.vmap` over samples and their labels, as per-sample gradients are computed."""
    z, pairs = torch.randn(4, 5, dtype=torch.float64), torch.tensor([[0, 1], [2, 2], [4, 3], [1, 0]])
    shares = torch.rand(4, 2, dtype=torch.float64)

    def of_pair(z: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return loss(z[None], MixedTarget(y[None], w[None]))

    def of_id(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(z[None], y[None])

    for function, rest in ((of_pair, (pairs, shares)), (of_id, (pairs[:, 0],))):
        got = torch.func.vmap(torch.func.grad(function))(z, *rest)
        want = torch.stack([torch.func.grad(function)(*row) for row in zip(z, *rest, strict=True)])
        torch.testing.assert_close(got, want)


def test_a_row_of_zeros_is_no_class() -> None:
    rows = torch.zeros(3, 2, 4)
    rows[0, 1, 2] = rows[1, 0, 3] = 1.0  # the second, the first, and in the third sample none
    target, z = MixedTarget(rows, torch.full((3, 2), 0.5)), torch.randn(3, 4)
    plain = soft_cross_entropy_loss(z, target, reduction="none")
    assert torch.equal(decoupled_mixup_loss(z, target, eta=1.0, reduction="none"), plain)
