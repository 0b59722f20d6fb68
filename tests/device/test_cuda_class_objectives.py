"""The GPU's kernels, through the objectives for classes. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import hardmix.kernels.mixed_bce as binary
import hardmix.kernels.mixed_cross_entropy as kernel
from hardmix.losses import decoupled_mixup_bce_loss, decoupled_mixup_loss, soft_cross_entropy_loss
from hardmix.mixing import MixedTarget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS = [
    {},
    {"asymmetric": True},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"ignore_index": 3},
    {"ignore_index": 3, "asymmetric": True, "label_smoothing": 0.1},
    {"weight": torch.linspace(0.1, 2.0, 50)},
    {"weight": torch.linspace(0.0, 2.0, 50), "label_smoothing": 0.1, "ignore_index": 3},
    {"eta": 1, "reduction": "sum"},
    {"eta": np.float64(0.0), "label_smoothing": np.float64(0.1)},
    {"reduction": "none"},
]


def targets(n: int, c: int) -> dict[str, Tensor | MixedTarget]:
    rng = torch.Generator().manual_seed(1)
    found: dict[str, Tensor | MixedTarget] = {}
    for k in (1, 2, 3, 17):
        labels, share = torch.randint(min(c, 6), (n, k), generator=rng), torch.rand(n, k, generator=rng)
        found[f"{k} labels"] = MixedTarget(labels, share / share.sum(1, keepdim=True))
    found["ids"] = torch.randint(c, (n,), generator=rng)
    found["dense"] = found["2 labels"].dense(c, smoothing=0.1)
    return found


def to_gpu(value: object) -> object:
    if isinstance(value, MixedTarget):
        return MixedTarget(*(part.cuda() for part in value))
    return value.cuda() if isinstance(value, Tensor) else value


def step(criterion: Callable[..., Tensor], z: Tensor, target: object, settings: dict) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    loss = criterion(z, target, **settings)
    (loss * torch.linspace(0.5, 1.5, len(z), device=z.device)).sum().backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", targets(1, 50))
def test_every_setting_is_what_the_cpu_computes_in_float64(name: str, settings: dict, dtype: torch.dtype) -> None:
    if name == "dense" and settings.get("asymmetric"):
        pytest.skip("refused: dense labels do not say which class is the labelled one")
    z = (torch.randn(33, 50, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    target = targets(33, 50)[name]
    there = {key: to_gpu(value) for key, value in settings.items()}
    loss, slope = step(decoupled_mixup_loss, z.double(), target, settings)
    got, grad = step(decoupled_mixup_loss, z.cuda(), to_gpu(target), there)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double().cpu(), loss, rtol=3e-6, atol=3e-6)
    eps = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    assert (grad.double().cpu() - slope).abs().max() <= eps * slope.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"xi": 0.8, "t": 0.5}, {"weight": torch.linspace(0.0, 2.0, 50)}], ids=str)
@pytest.mark.parametrize("name", targets(1, 50))
def test_the_binary_form_is_what_the_cpu_computes_in_float64(name: str, settings: dict, dtype: torch.dtype) -> None:
    z = (torch.randn(33, 50, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    target = targets(33, 50)[name]
    there = {key: to_gpu(value) for key, value in settings.items()}
    loss, slope = step(decoupled_mixup_bce_loss, z.double(), target, settings)
    got, grad = step(decoupled_mixup_bce_loss, z.cuda(), to_gpu(target), there)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double().cpu(), loss, rtol=3e-6, atol=3e-6)
    eps = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    assert (grad.double().cpu() - slope).abs().max() <= eps * slope.abs().max()


@pytest.mark.parametrize("shape", [(64, 1000), (5, 21843), (3, 2), (1, 4097)], ids=str)
def test_any_number_of_classes(shape: tuple[int, int]) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 8
    target = targets(*shape)["2 labels"]
    for criterion, settings in (
        (decoupled_mixup_loss, {}),
        (decoupled_mixup_loss, {"label_smoothing": 0.1}),
        (soft_cross_entropy_loss, {}),
        (lambda z, target: decoupled_mixup_loss(z, target.dense(z.shape[1], smoothing=0.1)), {}),
        (decoupled_mixup_bce_loss, {}),
    ):
        loss, slope = step(criterion, z.double(), target, settings)
        got, grad = step(criterion, z.cuda(), to_gpu(target), settings)
        assert torch.allclose(got.double().cpu(), loss, rtol=3e-6)
        assert (grad.double().cpu() - slope).abs().max() <= 4e-6 * slope.abs().max()


@pytest.mark.parametrize("settings", [{}, {"ignore_index": 3, "asymmetric": True}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("criterion", [decoupled_mixup_loss, decoupled_mixup_bce_loss], ids=["softmax", "binary"])
def test_second_derivatives_and_tensor_operations_agree(criterion, settings: dict, monkeypatch) -> None:
    if criterion is decoupled_mixup_bce_loss:
        settings = {"xi": 0.8}
    z = torch.randn(9, 12, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    target = to_gpu(targets(9, 12)["3 labels"])

    def both() -> tuple[Tensor, Tensor]:
        at = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(criterion(at, target, **settings), at, create_graph=True)
        slope.square().sum().backward()
        return slope.detach(), at.grad

    kernels = both()
    monkeypatch.setattr(binary, "fits_kernels", lambda *_: False)
    monkeypatch.setattr(kernel, "fits_kernels", lambda *_: False)
    for mine, theirs in zip(kernels, both(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_columns_apart_no_gradient_and_a_class_that_is_not_there() -> None:
    z = torch.randn(9, 24, device="cuda").T[:12]  # (12, 9), columns contiguous
    target = to_gpu(targets(12, 9)["2 labels"])
    with torch.no_grad():
        assert torch.equal(decoupled_mixup_loss(z, target), decoupled_mixup_loss(z.contiguous(), target))
        dense = target.dense(9, smoothing=0.1)
        apart = dense.T.contiguous().T
        assert torch.equal(decoupled_mixup_loss(z, apart), decoupled_mixup_loss(z, dense))
    wrong = torch.arange(12, device="cuda")
    losses = decoupled_mixup_loss(z, wrong, reduction="none")
    assert losses.isnan().tolist() == [label >= 9 for label in range(12)]


def test_a_loss_in_a_replayed_graph() -> None:
    z = torch.randn(8, 10, device="cuda", requires_grad=True)
    target = to_gpu(targets(8, 10)["2 labels"])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        decoupled_mixup_loss(z, target).backward()  # compiled, and the gradient has its memory
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z.grad.zero_()
        loss = decoupled_mixup_loss(z, target)
        loss.backward()
    with torch.no_grad():
        z.copy_(torch.randn(8, 10))
    graph.replay()
    got, grad = loss.clone(), z.grad.clone()
    wanted, slope = step(lambda a, b: decoupled_mixup_loss(a, b).expand(8) / 8, z, target, {})
    assert torch.allclose(got, wanted[0] * 8)
    assert torch.allclose(grad, slope, atol=1e-7)


def test_confident_predictions_keep_their_digits() -> None:
    """Of the loss and the gradient, where both are 1e-13."""
    z, tiny = torch.tensor([[30.0, -30.0]]), torch.tensor(-60.0).double().exp()
    loss, grad = step(soft_cross_entropy_loss, z.cuda(), torch.tensor([0], device="cuda"), {"reduction": "none"})
    assert torch.allclose(loss.double().cpu(), tiny, rtol=1e-4, atol=0)
    assert torch.allclose(grad.double().cpu(), torch.tensor([[-0.5, 0.5]]).double() * tiny, rtol=1e-4, atol=0)
    small = torch.tensor(-30.0).double().exp()
    loss, grad = step(decoupled_mixup_bce_loss, z.cuda(), torch.tensor([0], device="cuda"), {"reduction": "none"})
    assert torch.allclose(loss.double().cpu(), 2 * small, rtol=1e-4, atol=0)
    assert torch.allclose(grad.double().cpu(), torch.tensor([[-0.5, 0.5]]).double() * small, rtol=1e-4, atol=0)
