"""The GPU's kernels of the mixed cross entropy, run by Triton's interpreter on the CPU, against the plain formula."""

from __future__ import annotations

import contextlib
import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from hardmix.kernels import gpu, mixed_cross_entropy
from hardmix.kernels.mixed_cross_entropy import _formula_with_ignored
from hardmix.losses import decoupled_mixup_loss
from hardmix.mixing import MixedTarget
from integrations.conftest import peer

# The interpreter computes with NumPy, which speaks of each infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(5, 7, 1), (6, 10, 2), (4, 3, 2), (4, 2, 2), (5, 9, 3), (2, 5000, 2), (3, 4, 4)]
EPS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("tests/device runs the kernels where there is a GPU")
    if TorchVersion(peer("triton").__version__) < "3.4":
        pytest.skip("needs Triton 3.4, whose interpreter knows numbers of one bit")
    return peer("hardmix.kernels.mixed_cross_entropy_gpu")


def batch(n: int, c: int, k: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n * c + k)
    share = torch.rand(n, k, generator=rng)
    labels = torch.randint(c, (n, k), generator=rng)
    return torch.randn(n, c, generator=rng) * scale, labels, share / share.sum(1, keepdim=True)


def both(
    kernels: ModuleType,
    z: Tensor,
    labels: Tensor,
    share: Tensor,
    soft: Tensor | None = None,
    ignored: int | None = None,
    floor: float = 0.0,
    eta: float = 0.1,
    asymmetric: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """(loss of each row, gradient of their weighted sum) by the formula in float64 and by the kernels."""
    slope = torch.linspace(0.5, 1.5, len(z))
    exact = z.detach().double().requires_grad_()
    wide = None if soft is None else soft.double()
    loss = _formula_with_ignored(exact, labels, share.double(), wide, ignored, floor, eta, asymmetric)
    loss.backward(slope.double())
    got, kept = kernels.forward(z, labels, share, soft, ignored, floor, eta, asymmetric)
    grad = kernels.backward(slope, z, labels, soft, kept, ignored, floor)
    return [(loss.detach(), exact.grad), (got.double(), grad.double())]


def close(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32) -> None:
    (loss, slope), (got, grad) = pairs
    assert torch.allclose(got, loss, rtol=3e-6, atol=3e-6)
    assert (grad - slope).abs().max() <= EPS[dtype] * slope.abs().max()


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_are_the_formulas(kernels: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype):
    z, labels, share = batch(*shape, scale=8.0)
    z = z.to(dtype)
    for eta, floor, asymmetric in itertools.product((0.0, 0.1), (0.0, 0.1 / shape[1]), (False, True)):
        close(both(kernels, z, labels, share, eta=eta, floor=floor, asymmetric=asymmetric), dtype)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_soft_target(kernels: ModuleType, rows: int) -> None:
    z, labels, share = batch(6, 11, 2, scale=8.0)
    soft = torch.rand(rows, 11, generator=torch.Generator().manual_seed(1))
    close(both(kernels, z, labels, share, soft))
    close(both(kernels, z, labels, torch.zeros_like(share), soft))
    close(both(kernels, z, labels[:, :1], torch.zeros_like(share[:, :1]), soft, eta=0.0))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("ignored", [-100, 3])
def test_ignored_labels(kernels: ModuleType, ignored: int, asymmetric: bool) -> None:
    z, _, share = batch(6, 8, 3)
    i = ignored
    labels = torch.tensor([[1, 2, 5], [i, 2, 5], [1, i, 5], [1, i, i], [i, i, i], [2, i, 2]])
    pairs = both(kernels, z, labels, share, ignored=i, asymmetric=asymmetric, floor=0.01)
    close(pairs)
    assert pairs[1][0][4] == 0
    assert not pairs[1][1][4].any()
    _, kept = kernels.forward(z, labels, share, None, i, 0.0, 0.1, asymmetric)
    assert kept.counted.tolist() == [True, True, True, True, False, True]


def test_rows_of_an_ignored_batch_leave_no_nan_behind(kernels: ModuleType) -> None:
    z, labels = torch.full((2, 5), torch.nan), torch.full((2, 2), -100)
    (_, _), (loss, grad) = both(kernels, z, labels, torch.full((2, 2), 0.5), ignored=-100)
    assert not loss.any()
    assert not grad.any()


def test_a_column_apart_and_a_gradient_without_rows_of_its_own(kernels: ModuleType) -> None:
    """Logits that are part of wider rows, and the gradient of a mean, which is one number for all rows."""
    z, labels, share = batch(4, 12, 2)
    part = z[:, 2:9]
    labels = labels % 7
    close(both(kernels, part, labels, share))
    _, kept = kernels.forward(part, labels, share, None, None, 0.0, 0.1, False)
    slope = torch.tensor(0.25)
    grad = kernels.backward(slope.expand(4), part, labels, None, kept, None, 0.0)
    assert torch.equal(grad, kernels.backward(slope.repeat(4), part, labels, None, kept, None, 0.0))


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_extremes_are_what_tensor_operations_make_of_them(kernels: ModuleType, dtype: torch.dtype) -> None:
    top, inf, nan = torch.finfo(dtype).max, torch.inf, torch.nan
    rows = [
        [top, -top, 0.0, -top],
        [0.0] * 4,
        [top] * 4,
        [-top, -top, top, 0.0],
        [-top] * 4,
        [60.0, 60.0, -60.0, -90.0],
    ]
    rows += [[1.0, 0.0, -inf, -inf], [1.0, 0.0, 2.0, -inf], [1.0, 0.0, nan, 0.0], [nan, 0.0, 1.0, 0.0]]
    rows += [[0.0, nan, 0.0, 1.0], [inf, 0.0, 0.0, 1.0], [0.0, 0.0, inf, 1.0], [0.0, -inf, 1.0, 0.0]]
    z = torch.tensor(rows, dtype=dtype)
    labels, share = torch.tensor([[0, 1]]).repeat(len(z), 1), torch.tensor([[0.3, 0.7]]).repeat(len(z), 1)
    for floor, eta in ((0.0, 0.1), (0.0, 0.0), (0.02, 0.1)):
        (loss, slope), (got, grad) = both(kernels, z, labels, share, floor=floor, eta=eta)
        capped = loss.clamp(max=1e29)
        assert torch.allclose(got.clamp(max=1e29), capped, rtol=3e-6, equal_nan=True)
        finite = loss.isfinite()
        assert torch.allclose(grad[finite], slope[finite], rtol=0, atol=2 * EPS[dtype])
        assert torch.equal(grad.isnan().any(1), slope.isnan().any(1))


@pytest.mark.parametrize("classes", [2, 3, 10, 5000, 9000])
def test_two_largest_are_those_of_from_dense(kernels: ModuleType, classes: int) -> None:
    labels, lam = torch.randint(classes, (8, 2), generator=torch.Generator().manual_seed(classes)), torch.rand(8)
    labels[0, 1], labels[1] = labels[0, 0], torch.tensor([classes - 1, 0])
    lam[2], lam[3] = 0.0, 1.0
    for smoothing in (0.0, 0.1):
        target = MixedTarget(labels, torch.stack([lam, 1 - lam], 1))
        dense = target.dense(classes, smoothing=smoothing)
        found = kernels.two_largest(dense)
        assert torch.equal(found.sort(1).values, MixedTarget.from_dense(dense).labels.sort(1).values)
    flat = kernels.two_largest(torch.full((2, classes), 1 / classes))
    missing = kernels.two_largest(torch.full((2, classes), torch.nan))
    for rows in (flat if classes > 2 else flat[:0], missing):
        assert torch.equal(rows[:, 0], rows[:, 1])
        assert ((rows >= 0) & (rows < classes)).all()


@pytest.mark.parametrize("wrong", [-1, 8])
def test_a_class_that_is_not_there_gives_nan(kernels: ModuleType, wrong: int) -> None:
    z, labels, share = batch(3, 8, 2)
    labels[1, 1] = wrong
    loss, _ = kernels.forward(z, labels, share, None, None, 0.0, 0.1, False)
    assert loss.isnan().tolist() == [False, True, False]


WEIGHT = torch.linspace(0.0, 2.0, 9)
SETTINGS = [
    {},
    {"asymmetric": True, "ignore_index": 3},
    {"label_smoothing": 0.1, "ignore_index": -1},
    {"label_smoothing": 1.0, "ignore_index": 3},
    {"weight": WEIGHT, "ignore_index": 3, "reduction": "sum"},
    {"weight": WEIGHT, "label_smoothing": 0.1, "reduction": "none"},
]


def targets() -> dict[str, Tensor | MixedTarget]:
    _, labels, share = batch(12, 9, 3)
    labels[0], labels[1, 0], labels[2, 1:] = 3, 3, 3
    found: dict[str, Tensor | MixedTarget] = {
        f"{k} labels": MixedTarget(labels[:, :k], share[:, :k] / share[:, :k].sum(1, keepdim=True)) for k in (1, 2, 3)
    }
    dense = found["2 labels"].dense(9, smoothing=0.1)
    return {**found, "ids": labels[:, 0].int(), "dense": dense, "dense, columns apart": dense.T.contiguous().T}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", targets())
def test_an_objective_is_the_same_with_kernels_and_without(
    kernels: ModuleType, name: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, gradient and second derivative."""
    target = targets()[name]
    if name.startswith("dense") and settings.get("asymmetric"):
        pytest.skip("refused: dense labels do not say which class is the labelled one")
    logits, slope = batch(12, 9, 3)[0].T.contiguous().T, torch.linspace(0.5, 1.5, 12)
    found = []
    for fits in (False, True):
        monkeypatch.setattr(mixed_cross_entropy, "fits_kernels", lambda *_, fits=fits: fits)
        z = logits.clone().requires_grad_()
        loss = decoupled_mixup_loss(z, target, **settings)
        plain = torch.autograd.grad((loss * slope).sum(), z, retain_graph=True)[0]
        (grad,) = torch.autograd.grad((loss * slope).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), z)
        found.append((loss.detach(), plain, grad.detach(), second))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_where_nothing_compiles_a_warning_says_so_once(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease set CC.")

    device = torch.device("cpu")  # the interpreter's; what is asked is not which
    monkeypatch.setattr(gpu, "_compiles", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert gpu.has_kernels(device, torch.float32)
    monkeypatch.setattr(kernels, "forward", fails)
    assert gpu.has_kernels(device, torch.float32)  # known by now
    with pytest.warns(UserWarning, match=r"can't compile kernels here \(Failed to find C compiler\.\); losses take"):
        assert not gpu.has_kernels(device, torch.bfloat16)
    assert not gpu.has_kernels(device, torch.bfloat16)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), RuntimeError("CUDA error: an assert before")])
def test_an_error_of_the_device_is_not_taken_for_one_of_the_compiler(
    kernels: ModuleType, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(gpu, "_compiles", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "forward", fails)
    with pytest.raises(type(error), match=str(error)):
        gpu.has_kernels(torch.device("cpu"), torch.float32)
    assert not gpu._compiles
