"""Mixed cross entropy says what torch's cross entropy says, in every form of the target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hardmix.losses import soft_cross_entropy_loss
from hardmix.mixing import CutMix, MixedTarget
from tests.losses import slow_classification as slow


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_slow_loop(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, c, k = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 8), (2, 12), (1, 5)))
    logits = torch.randn(n, c, generator=g, dtype=torch.float64) * 4
    target = MixedTarget(torch.randint(c, (n, k), generator=g), torch.rand(n, k, generator=g, dtype=torch.float64))
    rows = list(zip(target.labels.tolist(), target.weights.tolist(), strict=True))
    want = np.array([slow.mixed_row(z, *row) for z, row in zip(logits.numpy(), rows, strict=True)])
    got = soft_cross_entropy_loss(logits, target, reduction="none")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    # A dense target needs every log p_c, and torch's log_softmax forms log(1 + x) for a class that is nearly certain.
    got = soft_cross_entropy_loss(logits, target.dense(c), reduction="none")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-15)
    single = logits.float()
    want = np.array([slow.mixed_row(z, *row) for z, row in zip(single.numpy(), rows, strict=True)])
    got = soft_cross_entropy_loss(single, MixedTarget(target.labels, target.weights), reduction="none")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize(
    "row",
    [
        (-math.inf, 1.0, 2.0),
        (-math.inf, -math.inf, 2.0),
        (math.inf, 1.0, 2.0),
        (-math.inf, math.inf, 1.0),
        (math.nan, 1.0, 2.0),
        (-math.inf, math.nan, 1.0),
        (1e30, 1.0, 2.0),
        (-1e30, 1.0, 2.0),
        (65504.0, -65504.0, 65472.0),
        (30000.0, 30008.0, 29984.0),
    ],
)
def test_smoothing_at_the_ends_of_the_numbers(row: tuple[float, ...], label: int) -> None:
    """Smoothing is read off the mean of the logits, which an infinite one or a far one may not spoil."""
    z, y = torch.tensor([row], requires_grad=True), torch.tensor([label])
    got, want = (loss(z, y, label_smoothing=0.1) for loss in (soft_cross_entropy_loss, F.cross_entropy))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
    grads = [torch.autograd.grad(loss, z)[0] for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("far", [-1e31, torch.finfo(torch.float32).min])
def test_smoothing_beside_a_masked_class(far: float) -> None:
    """A label counts as no more than 1e30 below the highest logit; whatever stands for it, the slope is that of torch.
    A class without a share may be as far as it likes."""
    z, labels = torch.tensor([[far, 1.0, 2.0, 3.0]], requires_grad=True), torch.tensor([0])
    dense = torch.tensor([[0.0, 0.0, 0.3, 0.7]])
    learnt = dense.clone().requires_grad_()  # autograd goes through the formula
    assert soft_cross_entropy_loss(z, labels, label_smoothing=0.1) >= 9e29
    for ours, theirs in ((labels, labels), (dense, dense), (learnt, dense)):
        got, want = (
            soft_cross_entropy_loss(z, ours, label_smoothing=0.1),
            F.cross_entropy(z, theirs, label_smoothing=0.1),
        )
        if ours is not labels:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        grads = [torch.autograd.grad(loss, z)[0] for loss in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)

    def formula(z: torch.Tensor) -> torch.Tensor:
        return soft_cross_entropy_loss(z, labels, label_smoothing=0.1)

    want = torch.autograd.grad(F.cross_entropy(z, labels, label_smoothing=0.1), z)[0]
    torch.testing.assert_close(torch.func.grad(formula)(z.detach()), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("space", [(), (3,), (2, 3)])
def test_equals_torch_on_the_dense_target(
    reduction: str, smoothing: float, weighted: bool, space: tuple[int, ...]
) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 6, *space, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(6, (4, 2, *space), generator=g)
    lam = torch.rand(4, 1, *space, generator=g, dtype=torch.float64)
    target = MixedTarget(labels, torch.cat([lam, 1 - lam], 1))
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.rand(6, generator=g, dtype=torch.float64)
    want = F.cross_entropy(z, target.dense(6), **options)
    (want_grad,) = torch.autograd.grad(want.sum(), z)
    for y in (target, target.dense(6)):
        got = soft_cross_entropy_loss(z, y, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
        (grad,) = torch.autograd.grad(got.sum(), z)
        torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch_on_class_ids(reduction: str) -> None:
    z = torch.randn(7, 5, 3, dtype=torch.float64)
    y = torch.randint(5, (7, 3))
    y[0, 0] = y[3] = -100
    for smoothing in (0.0, 0.3):
        want = F.cross_entropy(z, y, reduction=reduction, label_smoothing=smoothing)
        got = soft_cross_entropy_loss(z, y, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_the_mean_is_over_rows_and_not_over_class_weights() -> None:
    z, y, weight = torch.randn(8, 4).double(), torch.randint(4, (8,)), torch.rand(4).double()
    got = soft_cross_entropy_loss(z, y, weight=weight)
    torch.testing.assert_close(got, F.cross_entropy(z, y, weight=weight, reduction="sum") / 8)
    torch.testing.assert_close(got, F.cross_entropy(z, F.one_hot(y, 4).double(), weight=weight))


def test_ignored_labels_are_those_of_the_mixed_losses() -> None:
    z = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    labels = torch.randint(5, (2, 2, 4, 3))
    labels[torch.rand(labels.shape) < 0.4] = 255
    target = MixedTarget(labels, torch.rand(2, 2, 4, 3, dtype=torch.float64))
    want = target.mixed_loss(lambda y: F.cross_entropy(z, y, ignore_index=255, reduction="none"))
    got = soft_cross_entropy_loss(z, target, ignore_index=255, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_takes_what_a_policy_makes() -> None:
    images, masks = torch.rand(4, 3, 8, 6), torch.randint(5, (4, 8, 6))
    policy, g = CutMix(), torch.Generator().manual_seed(0)
    plan = policy.plan(images, generator=g)
    logits = torch.randn(4, 5, 8, 6)
    assert plan.mask is not None
    pasted = torch.where(plan.mask[:, 0] > 0, masks, masks[plan.partner])
    got = soft_cross_entropy_loss(logits, plan.target(masks))
    torch.testing.assert_close(got, F.cross_entropy(logits, pasted))
    _, target = policy(images, torch.arange(4), generator=g)
    torch.testing.assert_close(
        soft_cross_entropy_loss(logits[:, :, 0, 0], target), F.cross_entropy(logits[:, :, 0, 0], target.dense(5))
    )


def test_gradcheck() -> None:
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    target = MixedTarget(torch.tensor([[0, 1], [2, 2], [4, 0], [3, 1]]), torch.rand(4, 2, dtype=torch.float64))
    dense = torch.rand(4, 5, dtype=torch.float64)
    for y in (target, dense, target.labels[:, 0]):
        for options in ({}, {"label_smoothing": 0.2, "reduction": "none"}):
            assert torch.autograd.gradcheck(lambda x, y=y, o=options: soft_cross_entropy_loss(x, y, **o), (z,))
            assert torch.autograd.gradgradcheck(lambda x, y=y, o=options: soft_cross_entropy_loss(x, y, **o), (z,))


def test_a_masked_class_without_a_share_costs_nothing() -> None:
    z = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert soft_cross_entropy_loss(z, torch.tensor([0])).item() == pytest.approx(
        F.cross_entropy(z, torch.tensor([0])).item()
    )
    assert soft_cross_entropy_loss(z, torch.tensor([1])).item() == torch.inf
