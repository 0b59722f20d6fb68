"""Rank-N-Contrast against its equation, written as loops."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hardmix.kernels import rank_contrast as kernel
from hardmix.losses.rank_n_contrast import RankNContrastLoss, rank_n_contrast_loss

#: Sizes of the denominators of five labels in a row, when all distances are alike.
TIES = [(4, 3, 2, 1), (4, 4, 2, 1), (4, 4, 2, 2), (4, 4, 2, 1), (4, 3, 2, 1)]


def slow(z: Tensor, labels: list[list[float]], t: float) -> Tensor:
    """Losses (M,) of rows z (M, D), from the equation, each denominator on its own."""
    losses = []
    for i in range(len(z)):
        far = [sum(abs(a - b) for a, b in zip(labels[i], other, strict=True)) for other in labels]
        apart = [torch.linalg.vector_norm(z[i] - row) if bool((z[i] != row).any()) else 0.0 * z.sum() for row in z]
        s = [distance / -t for distance in apart]
        terms = []
        for j in range(len(z)):
            if j != i:
                others = [s[k] for k in range(len(z)) if k != i and far[k] >= far[j]]
                terms.append(torch.logsumexp(torch.stack(others), 0) - s[j])
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def slow_batch(embeddings: Tensor, labels: Tensor, t: float) -> Tensor:
    """In the shape of a value per anchor."""
    y = [row if isinstance(row, list) else [row] for row in labels.double().tolist()]
    if embeddings.ndim == 2:
        return slow(embeddings, y, t)
    views = embeddings.shape[1]
    rows = torch.cat([embeddings[:, v] for v in range(views)])
    return torch.stack(slow(rows, y * views, t).chunk(views), 1)


def gradient(
    embeddings: Tensor, labels: Tensor, weight: Tensor, t: float, *, loop: bool = False
) -> tuple[Tensor, Tensor]:
    """Per-anchor losses and the gradient of their weighted sum, in float64."""
    z = embeddings.detach().double().requires_grad_() if loop else embeddings.detach().clone().requires_grad_()
    loss = slow_batch(z, labels, t) if loop else rank_n_contrast_loss(z, labels, temperature=t, reduction="none")
    (loss * weight.to(loss.dtype)).sum().backward()
    assert z.grad is not None
    return loss.detach().double(), z.grad.double()


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Embeddings, labels, a weight per anchor and a temperature; labels with ties, continuous ones, and vectors."""
    g = torch.Generator().manual_seed(seed)
    n, d, views = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((2, 12), (1, 6), (1, 4)))
    shape = (n, d) if views == 1 else (n, views, d)
    z = torch.randn(shape, generator=g, dtype=torch.float64) * (0.1, 1.0, 10.0)[seed % 3] + (0.0, 50.0)[seed % 2]
    y = torch.randn((n, 1 + seed % 3)[: 1 + seed // 2 % 2], generator=g, dtype=torch.float64)
    y = ((2 * y).round(), y, y * 1e6 + 1e9)[seed // 4 % 3]
    return z, y, torch.rand(shape[:-1], generator=g, dtype=torch.float64), (2.0, 0.3, 0.01)[seed // 5 % 3]


@pytest.mark.parametrize("seed", range(40))
def test_values_and_gradients_are_those_of_the_loops(seed: int) -> None:
    z, y, weight, t = draw(seed)
    (loss, grad), (want, want_grad) = gradient(z, y, weight, t), gradient(z, y, weight, t, loop=True)
    assert loss.shape == want.shape == z.shape[:-1]
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=1e-11 / t)
    torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-10 / t)


@pytest.mark.parametrize("seed", range(12))
def test_tiles_do_not_change_the_result(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, y, weight, t = draw(seed + 100)
    whole = gradient(z, y, weight, t)
    for rows, pairs, values in ((0, 2**17, 2**20), (0, 40, 2**20), (1024, 40, 1), (0, 1, 1)):
        monkeypatch.setattr(kernel, "DENSE_ROWS", rows)
        monkeypatch.setattr(kernel, "TILE_PAIRS", pairs)
        monkeypatch.setattr(kernel, "CHUNK_VALUES", values)
        for got, want in zip(gradient(z, y, weight, t), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11 / t)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("t", [2.0, 0.005])
def test_gradcheck(dense: bool, t: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_PAIRS", 30)
    base = torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (base + torch.tensor([0.0, 0.05], dtype=torch.float64)[:, None]).requires_grad_()  # views that nearly coincide
    y = torch.tensor([1.0, 3.0, 1.0, 4.0, 2.0])
    for reduction in ("none", "mean"):
        # The slope of a distance of 0.09 over a temperature of 0.005 bends within the default step.
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: rank_n_contrast_loss(x, y, temperature=t, reduction=r), (z,), eps=1e-7, atol=1e-4
        )


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dense", [True, False])
def test_near_duplicates_in_float32(offset: float, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_PAIRS", 100)
    g = torch.Generator().manual_seed(1)
    z = torch.randn(14, 1, 32, generator=g) + 1e-3 * torch.randn(14, 2, 32, generator=g) + offset
    y, weight = torch.rand(14, generator=g), torch.rand(14, 2, generator=g, dtype=torch.float64)
    (loss, grad), (want, want_grad) = gradient(z, y, weight, 2.0), gradient(z, y, weight, 2.0, loop=True)
    assert error(loss, want) < 1e-6
    assert error(grad, want_grad) < 1e-5


def test_rows_along_a_curve_in_float32() -> None:
    """What the loss leads to: every row has neighbours at all distances."""
    g = torch.Generator().manual_seed(2)
    y = torch.rand(30, generator=g)
    z = 10 * y[:, None] * torch.randn(16, generator=g) + 0.02 * torch.randn(30, 16, generator=g)
    weight = torch.rand(30, generator=g, dtype=torch.float64)
    (loss, grad), (want, want_grad) = gradient(z, y, weight, 0.5), gradient(z, y, weight, 0.5, loop=True)
    assert error(loss, want) < 1e-5  # logits of 80 make a loss of 0.5; distances rounded to float32 alone make 2e-6
    assert error(grad, want_grad) < 1e-5


@pytest.mark.parametrize("t", [2.0, 1e-3])
def test_a_row_far_away_leaves_all_finite(t: float) -> None:
    """Alone in a denominator it is worth exp(-5000), which the released code rounds to 0."""
    z = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
    z[5] += 1e4
    y = torch.arange(12.0)
    y[5] = 40.0
    weight = torch.ones(12, dtype=torch.float64)
    (loss, grad), (want, want_grad) = gradient(z, y, weight, t), gradient(z, y, weight, t, loop=True)
    near = y < 40.0
    assert error(loss[near], want[near]) < 1e-6
    ulp = 2**-9  # of its distances in float32
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=ulp / t)
    assert error(grad, want_grad) < 2e-4


def test_all_rows_far_apart_are_finite() -> None:
    loss = rank_n_contrast_loss(1e4 * torch.eye(5), torch.arange(5.0), reduction="none")
    assert loss.tolist() == pytest.approx([sum(map(math.log, tie)) / 4 for tie in TIES])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    z = (3 * torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(4))).to(dtype)
    y = torch.arange(12) // 2
    assert rank_n_contrast_loss(z, y).dtype == torch.float32
    weight = torch.ones(12, 2, dtype=torch.float64)
    (loss, grad), (want, want_grad) = gradient(z, y, weight, 2.0), gradient(z, y, weight, 2.0, loop=True)
    assert error(loss, want) < 2e-6
    assert error(grad, want_grad) < (2e-3 if dtype == torch.float16 else 5e-3)  # the gradient itself is rounded


def test_rows_that_coincide_have_no_gradient_between_them() -> None:
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
    y, weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 5.0]), torch.ones(6, dtype=torch.float64)
    for got, want in zip(gradient(z, y, weight, 2.0), gradient(z, y, weight, 2.0, loop=True), strict=True):
        torch.testing.assert_close(got, want)
    loss, grad = gradient(torch.ones(5, 3), torch.arange(5.0), torch.ones(5, dtype=torch.float64), 2.0)
    assert loss.tolist() == pytest.approx([sum(map(math.log, tie)) / 4 for tie in TIES])
    assert not grad.any()


def test_values_by_hand() -> None:
    assert rank_n_contrast_loss(torch.eye(3), torch.tensor([0, 1, 3])).item() == pytest.approx(math.log(2) / 2)
    assert rank_n_contrast_loss(torch.randn(2, 5), torch.tensor([0.0, 1.0])).item() == 0.0
    z = torch.randn(2, 5, requires_grad=True)
    rank_n_contrast_loss(z, torch.tensor([3.0, 3.0])).backward()
    assert z.grad is not None
    assert not z.grad.any()
    # One sample in two views; equal labels are a plain contrast.
    assert rank_n_contrast_loss(torch.randn(1, 2, 5), torch.ones(1)).item() == 0.0
    assert rank_n_contrast_loss(torch.eye(6), torch.ones(6)).item() == pytest.approx(math.log(5))
    # Vectors are compared in the sum of their differences: (0, 0), (1, 2), (3, 0) are 3, 3 and 4 apart.
    y = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]])
    got = rank_n_contrast_loss(torch.eye(3), y, reduction="none")
    assert got.tolist() == pytest.approx([math.log(2), math.log(2) / 2, math.log(2) / 2])
    assert rank_n_contrast_loss(torch.tensor([[0.0], [torch.nan], [1.0]]), torch.arange(3)).isnan()


def test_reductions_agree() -> None:
    z, y = torch.randn(7, 2, 3, dtype=torch.float64), torch.randn(7)
    none = rank_n_contrast_loss(z, y, reduction="none")
    torch.testing.assert_close(rank_n_contrast_loss(z, y, reduction="sum"), none.sum())
    torch.testing.assert_close(rank_n_contrast_loss(z, y), none.mean())


def test_order_turns_and_shifts_do_not_matter() -> None:
    g = torch.Generator().manual_seed(6)
    z, y = torch.randn(9, 2, 4, generator=g, dtype=torch.float64), torch.randn(9, generator=g).round(decimals=1)
    want = rank_n_contrast_loss(z, y, reduction="none")
    place, turn = torch.randperm(9, generator=g), torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    for got, expected in (
        (rank_n_contrast_loss(z[place], y[place], reduction="none"), want[place]),
        (rank_n_contrast_loss(z.flip(1), y, reduction="none"), want.flip(1)),
        (rank_n_contrast_loss(z @ turn + 3.0, 8 - y.double() * 4, reduction="none"), want),
        (rank_n_contrast_loss(z * 5, y, temperature=10.0, reduction="none"), want),
        (rank_n_contrast_loss(z.transpose(0, 1).flatten(0, 1), y.repeat(2), reduction="none"), want.T.flatten()),
    ):
        torch.testing.assert_close(got, expected)


def test_autocast_changes_nothing() -> None:
    z, y = torch.randn(8, 2, 6, requires_grad=True), torch.randn(8)
    plain = rank_n_contrast_loss(z, y)
    (want,) = torch.autograd.grad(plain, z)
    for rows in (1024, 0):
        with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "DENSE_ROWS", rows)
            loss = rank_n_contrast_loss(z, y)
            (grad,) = torch.autograd.grad(loss, z)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain, rtol=0, atol=0)
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)


def test_the_module_is_the_function() -> None:
    z, y = torch.randn(6, 3), torch.randn(6, 2)
    module = RankNContrastLoss(temperature=0.5, reduction="sum")
    assert repr(module) == "RankNContrastLoss(temperature=0.5, reduction='sum')"
    assert torch.equal(module(z, y), rank_n_contrast_loss(z, y, temperature=0.5, reduction="sum"))
    assert not module.state_dict()


Z, Y = torch.zeros(3, 2), torch.zeros(3)
HOLES = torch.tensor([[0.0, 1.0], [torch.inf, 0.0], [0.0, torch.nan]])
NUMBERS = "pass numbers, shape (N,) or (N, P)."
POSITIVE = "pass a finite number greater than 0."
ENTRIES = "labels has 2 entries but embeddings has 3 rows; pass one entry per row."


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], Y), TypeError, "embeddings is a list; pass a torch.Tensor."),
        ((Z, [1.0]), TypeError, "labels is a list; pass a torch.Tensor."),
        ((Z.long(), Y), TypeError, "embeddings has dtype torch.int64; pass floating-point values."),
        ((Z[:, 0], Y), ValueError, "embeddings has shape (3,); pass a batch with 2 to 3 axes, samples first."),
        ((Z[:0], Y[:0]), ValueError, "embeddings has shape (0, 2) and is empty; pass at least one sample."),
        ((Z, Y[:2]), ValueError, ENTRIES),
        ((Z, Z[:2]), ValueError, ENTRIES),
        ((Z, Y.bool()), ValueError, f"labels has shape (3,) and dtype torch.bool; {NUMBERS}"),
        ((Z, Z[None]), ValueError, f"labels has shape (1, 3, 2) and dtype torch.float32; {NUMBERS}"),
        ((Z, Z[:, :0]), ValueError, f"labels has shape (3, 0) and dtype torch.float32; {NUMBERS}"),
        ((Z, HOLES), ValueError, "labels holds NaN or infinity at 1, 2; leave out these samples."),
        ((Z, HOLES[:, 0]), ValueError, "labels holds NaN or infinity at 1; leave out these samples."),
        (
            (Z, Y.to("meta")),
            ValueError,
            "labels is on meta but embeddings is on cpu; move both to one device with .to().",
        ),
        (
            (Z[:1], Y[:1]),
            ValueError,
            "embeddings has shape (1, 2), a single row; pass two rows or more, an anchor is compared with the others.",
        ),
    ],
)
def test_errors_of_tensors(arguments: tuple[Any, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^rank_n_contrast_loss: {re.escape(message)}$"):
        rank_n_contrast_loss(*arguments)


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"temperature": 0.0}, ValueError, f"temperature is 0.0; {POSITIVE}"),
        ({"temperature": math.inf}, ValueError, f"temperature is inf; {POSITIVE}"),
        ({"temperature": None}, TypeError, f"temperature is None; {POSITIVE}"),
        (
            {"reduction": "means"},
            ValueError,
            "reduction is 'means'; pass one of 'none', 'mean', 'sum' (did you mean \"mean\"?).",
        ),
    ],
)
def test_errors_of_settings(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^rank_n_contrast_loss: {re.escape(message)}$"):
        rank_n_contrast_loss(Z, Y, **setting)
    with pytest.raises(kind, match=f"^RankNContrastLoss: {re.escape(message)}$"):
        RankNContrastLoss(**setting)
