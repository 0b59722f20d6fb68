"""The GPU's kernels of the mixed binary cross entropy, run by Triton's interpreter, against the plain formula."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from hardmix.kernels import mixed_bce
from hardmix.kernels.mixed_bce import _formula
from hardmix.losses import decoupled_mixup_bce_loss
from hardmix.mixing import MixedTarget
from integrations.conftest import peer

# The interpreter computes with NumPy, which speaks of each infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("tests/device runs the kernels where there is a GPU")
    peer("triton")
    return peer("hardmix.kernels.mixed_bce_gpu")


def both(
    kernels: ModuleType, z: Tensor, target: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(loss of each row, gradient of their weighted sum) by the formula in float64 and by the kernels."""
    slope = torch.linspace(0.5, 1.5, len(z))
    exact = z.detach().double().requires_grad_()
    loss = _formula(exact, target.double(), labels, None if weight is None else weight.double())
    loss.backward(slope.double())
    got = kernels.forward(z, target, labels, weight)
    grad = kernels.backward(slope, z, target, labels, weight)
    return [(loss.detach(), exact.grad), (got.double(), grad.double())]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 1), (4, 3, 2), (5, 9, 3), (2, 5000, 2), (4, 1, 1)], ids=str)
def test_value_and_gradient_are_the_formulas(kernels: ModuleType, shape, weighted: bool, dtype: torch.dtype) -> None:
    n, c, k = shape
    rng = torch.Generator().manual_seed(n * c)
    z = (torch.randn(n, c, generator=rng) * 8).to(dtype)
    labels = torch.stack([torch.randperm(c, generator=rng)[:k] for _ in range(n)])
    weight = torch.linspace(0.1, 2.0, c) if weighted else None
    for pairs in (
        both(kernels, z, torch.rand(n, k, generator=rng), labels, weight),
        both(kernels, z, torch.ones(n, 1).expand(n, k).contiguous(), labels[:, :1].repeat(1, k), weight),
        both(kernels, z, torch.rand(n, c, generator=rng), None, weight),
    ):
        (loss, slope), (got, grad) = pairs
        assert torch.allclose(got, loss, rtol=3e-6)
        assert (grad - slope).abs().max() <= EPS[dtype] * slope.abs().max()


def test_a_confident_class_keeps_its_digits(kernels: ModuleType) -> None:
    z, one, tiny = torch.tensor([[30.0, -30.0]]), torch.tensor([[1.0]]), torch.tensor(-30.0).double().exp()
    loss = kernels.forward(z, one, torch.tensor([[0]]), None)
    assert torch.allclose(loss.double(), 2 * tiny, rtol=1e-5, atol=0)
    grad = kernels.backward(torch.ones(1), z, one, torch.tensor([[0]]), None)
    assert torch.allclose(grad.double(), torch.stack([-tiny, tiny]), rtol=1e-5, atol=0)


def test_infinite_and_missing_numbers(kernels: ModuleType) -> None:
    inf, nan = torch.inf, torch.nan
    z = torch.tensor([[0.0, -inf, 1.0], [-inf, 0.0, 1.0], [nan, 0.0, 1.0], [0.0, nan, 1.0], [0.0, inf, 1.0]])
    labels, target = torch.zeros(5, 1, dtype=torch.long), torch.full((5, 1), 0.5)
    _, (loss, grad) = both(kernels, z, target, labels)
    one = torch.nn.functional.softplus(torch.tensor(1.0)).item() + torch.log(torch.tensor(2.0)).item()
    assert torch.allclose(loss, torch.tensor([one, inf, nan, nan, inf]).double(), equal_nan=True)
    assert grad[:2].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_that_is_not_there_gives_nan(kernels: ModuleType, wrong: int) -> None:
    loss = kernels.forward(torch.zeros(2, 3), torch.ones(2, 1), torch.tensor([[1], [wrong]]), None)
    grad = kernels.backward(torch.ones(2), torch.zeros(2, 3), torch.ones(2, 1), torch.tensor([[1], [wrong]]), None)
    assert loss.isnan().tolist() == [False, True]
    assert grad.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("settings", [{}, {"xi": 0.8}, {"weight": torch.linspace(0.0, 2.0, 9)}], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_an_objective_is_the_same_with_kernels_and_without(
    kernels: ModuleType, dense: bool, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, gradient and second derivative."""
    rng = torch.Generator().manual_seed(0)
    pair = MixedTarget(torch.randint(9, (12, 2), generator=rng), torch.tensor([[0.3, 0.7]]).repeat(12, 1))
    target = pair.dense(9).T.contiguous().T if dense else pair
    logits, found = torch.randn(9, 12, generator=rng).T, []
    for fits in (False, True):
        monkeypatch.setattr(mixed_bce, "fits_kernels", lambda *_, fits=fits: fits)
        z = logits.clone().requires_grad_()
        loss = decoupled_mixup_bce_loss(z, target, **settings)
        plain = torch.autograd.grad(loss, z, retain_graph=True)[0]
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), z)
        found.append((loss.detach(), plain, grad.detach(), second))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
