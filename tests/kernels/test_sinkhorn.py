"""Sinkhorn's plans against a loop in double precision, their marginals, and costs that leave float32's range."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hardmix.kernels.sinkhorn import sinkhorn
from mixing.cases import rng


def by_hand(cost: np.ndarray, entropy: float, iterations: int = 4000) -> np.ndarray:
    """The plan of one matrix, from Cuturi's matrix scaling as it stands, in float64."""
    rows, columns = cost.shape
    kernel = np.exp(-(cost - cost.min()) / entropy)
    u = np.ones(rows)
    for _ in range(iterations):
        v = 1.0 / columns / (kernel.T @ u)
        u = 1.0 / rows / (kernel @ v)
    return u[:, None] * kernel * v


def costs(n: int, rows: int, columns: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.rand(n, rows, columns, generator=rng(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 4, 9), (2, 9, 4), (1, 1, 6), (1, 6, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.3, 1.0])
def test_plans_are_those_of_the_loop(shape: tuple[int, int, int], scale: float) -> None:
    cost = costs(*shape, scale)
    plan, error = sinkhorn(cost, entropy=0.1, iterations=1000)
    assert plan.dtype == torch.float64
    assert error.shape == (shape[0],)
    for found, one, left in zip(plan, cost, error.tolist(), strict=True):
        assert left < 1e-5
        assert np.abs(found.numpy() - by_hand(one.numpy(), 0.1)).max() < 1e-8 + left
    single, _ = sinkhorn(cost.float(), entropy=0.1, iterations=1000)
    assert single.dtype == torch.float32
    assert (single - plan).abs().max() < 2e-5 * plan.max()


@pytest.mark.parametrize("iterations", [1, 2, 3, 7, 10, 33, 100])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4, 1e7, 1e30])
def test_marginals_whatever_the_costs(scale: float, iterations: int) -> None:
    """Rows are exact, and the error that is reported is that of the columns."""
    cost = costs(4, 12, 7, 1.0).mul(scale).float()
    plan, error = sinkhorn(cost, iterations=iterations)
    assert bool(plan.isfinite().all())
    assert bool((plan >= 0).all())
    assert torch.allclose(plan.sum(2), torch.full((4, 12), 1 / 12), rtol=1e-6)
    assert torch.allclose(error, (plan.sum(1) * 7 - 1).abs().amax(1), rtol=1e-4, atol=1e-6)


def test_errors_of_the_docstring() -> None:
    """32 pairs of maps with 49 places; costs a multiple of the entropy."""
    a, b = (torch.rand(32, 49, 64, generator=rng(seed)) for seed in (1, 2))
    cost = torch.cdist(a, b).square()
    cost = cost / cost.mean()
    for multiple, most in ((10, 2e-6), (100, 0.02), (1000, 0.2), (10_000, 0.6)):
        plan, error = sinkhorn(cost * (0.1 * multiple))
        assert error.max() < most, multiple
        if multiple > 10:
            # the same number of iterations without cooling
            scaled = cost.double() * multiple
            u, v = torch.zeros(32, 49, 1).double(), torch.zeros(32, 1, 49).double()
            for _ in range(100):
                v = -torch.logsumexp(u - scaled, 1, keepdim=True)
                u = -torch.logsumexp(v - scaled, 2, keepdim=True)
            plain = (u + v - scaled).exp().sum(1)
            assert error.max() < 1.2 * (plain - 1).abs().max(), multiple
    assert plan.dtype == torch.float32


def test_low_entropy_finds_the_assignment() -> None:
    """As the entropy goes to 0, the plan becomes the best permutation."""
    cost = costs(5, 6, 6, 1.0, seed=3)
    plan, error = sinkhorn(cost * 300.0, iterations=3000)
    assert error.max() < 1e-2
    for found, one in zip(plan, cost, strict=True):
        best = min(itertools.permutations(range(6)), key=lambda p: sum(one[i, j].item() for i, j in enumerate(p)))
        assert found.argmax(1).tolist() == list(best)


def test_what_all_costs_share_changes_nothing() -> None:
    cost = costs(3, 8, 8, 5.0).float()
    plan, _ = sinkhorn(cost)
    for offset in (1e3, 1e6):
        # float32 keeps fewer digits of the differences, the less the larger what they share
        moved, _ = sinkhorn(cost.double().add(offset))
        assert torch.allclose(moved.float(), plan, atol=2e-6)
    lifted, _ = sinkhorn(cost + 3.0 * torch.rand(3, 8, 1, generator=rng(1)) + 2.0 * torch.rand(3, 1, 8))
    assert torch.allclose(lifted, plan, atol=1e-4)


def test_a_plan_hangs_on_its_own_costs_only() -> None:
    cost = costs(6, 9, 9, 50.0).float()
    together, _ = sinkhorn(cost)
    for i in range(6):
        alone, _ = sinkhorn(cost[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_spoils_itself_only(bad: float) -> None:
    cost = costs(3, 4, 4, 1.0)
    want, _ = sinkhorn(cost)
    cost[1, 2, 3] = bad
    plan, error = sinkhorn(cost)
    assert bool(plan[1].isnan().all())
    assert bool(error[1].isnan())
    assert torch.equal(plan[::2], want[::2])


def test_half_types_autocast_and_gradients() -> None:
    cost = costs(2, 5, 5, 3.0).half()
    want, _ = sinkhorn(cost.float())
    got, error = sinkhorn(cost.requires_grad_())
    assert got.dtype == error.dtype == torch.float32
    assert torch.equal(got, want)
    assert not got.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn(cost)[0], want)


def test_refusals() -> None:
    cost = torch.rand(2, 3, 3)
    for bad, error, text in [
        ([[1.0]], TypeError, r"sinkhorn: cost is a list; pass a torch\.Tensor\."),
        (cost[0], ValueError, r"sinkhorn: cost has shape \(3, 3\); pass a batch with 3 axes"),
        (cost[:0], ValueError, "is empty"),
        (cost.long(), TypeError, r"sinkhorn: cost has dtype torch.int64; pass floating-point costs\."),
    ]:
        with pytest.raises(error, match=text):
            sinkhorn(bad)
    with pytest.raises(ValueError, match=r"sinkhorn: entropy is 0; pass a finite number greater than 0\."):
        sinkhorn(cost, entropy=0)
    with pytest.raises(ValueError, match=r"sinkhorn: iterations is 0; pass an integer of at least 1\."):
        sinkhorn(cost, iterations=0)
