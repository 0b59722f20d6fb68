"""Kernel contrast against its three denominators, one anchor and one row at a time, its edges and its messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.losses import KernelContrastLoss, kernel_contrast_loss, supcon_loss

TIED = [3.0, 1.0, 2.0, 2.0, 5.0, 3.0, 9.0, 2.0, 4.0]
KINDS = ["y-aware", "exp", "threshold"]


def batch(n: int = 9, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow(z: list[list[float]], y: list[float], kind: str, kernel: str, h: float, t: float) -> list[float]:
    def k(i: int, j: int) -> float:
        d = abs(y[i] - y[j]) / h
        return math.exp(-d * d / 2) if kernel == "gaussian" else 1 / (1 + d * d)

    def s(i: int, j: int) -> float:
        lengths = math.hypot(*z[i]) * math.hypot(*z[j])
        return sum(a * b for a, b in zip(z[i], z[j], strict=True)) / lengths / t if lengths else 0.0

    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        loss = 0.0
        for j in others:
            if kind == "y-aware":
                below = sum(math.exp(s(i, m)) for m in others)
            elif kind == "exp":
                below = sum(math.exp(s(i, m) * (1 - k(i, m))) for m in others)
            else:
                below = sum(math.exp(s(i, m)) for m in others if k(i, m) < k(i, j)) or math.exp(s(i, j))
            loss -= k(i, j) / sum(k(i, m) for m in others) * math.log(math.exp(s(i, j)) / below)
        losses.append(loss)
    return losses


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d, views = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 5)), data.draw(st.integers(1, 2))
    unit = data.draw(st.sampled_from([1.0, 0.25]))  # so coarse that unequal distances have unequal kernels in floats
    labels = [unit * k for k in data.draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n))]
    z = batch(n * views, d, data.draw(st.integers(0, 10**6)))
    if data.draw(st.booleans()):
        z[0] = 0.0
    kind, kernel = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["gaussian", "cauchy"]))
    h, t = data.draw(st.sampled_from([0.5, 1.0, 4.0])), data.draw(st.sampled_from([0.1, 1.0]))
    want = slow(z.tolist(), labels * views, kind, kernel, h, t)
    if views == 2:
        z = z.view(views, n, d).movedim(0, 1)
    options = {"kind": kind, "kernel": kernel, "bandwidth": h, "temperature": t}
    per = kernel_contrast_loss(z, numbers(labels), reduction="none", **options)
    assert per.shape == z.shape[:-1]
    assert (per.T.flatten() if views == 2 else per).tolist() == pytest.approx(want, rel=1e-10, abs=1e-11)
    mean = kernel_contrast_loss(z, numbers(labels), **options).item()
    assert mean == pytest.approx(sum(want) / len(want), rel=1e-10, abs=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [TIED[:7], [4.0] * 7, [0.31, 2.9, 1.17, -4.0, 1.9, 2.2, 0.5]], ids=str)
def test_gradcheck(kind, labels) -> None:
    z = batch(7, 3)
    options = {"kind": kind, "bandwidth": 1.5, "temperature": 0.3, "reduction": "none"}
    assert torch.autograd.gradcheck(lambda z: kernel_contrast_loss(z, numbers(labels), **options), z.requires_grad_())


def test_second_derivatives_are_right_or_refused() -> None:
    z, y = torch.randn(5, 3, dtype=torch.float64).requires_grad_(), numbers([1.0, 1.0, 2.0, 4.0, 7.0])
    for kind in ("y-aware", "exp"):
        assert torch.autograd.gradgradcheck(lambda z, kind=kind: kernel_contrast_loss(z, y, kind=kind), z)
    (grad,) = torch.autograd.grad(kernel_contrast_loss(z, y, kind="threshold"), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.square().sum(), z)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_zero_and_joined_to_the_graph(kind) -> None:
    z = batch(1).requires_grad_()
    loss = kernel_contrast_loss(z, numbers([3.0]), kind=kind)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


def test_equal_labels() -> None:
    z, y = batch(), torch.zeros(9)
    got = {kind: kernel_contrast_loss(z, y, kind=kind).item() for kind in KINDS}
    pull = torch.nn.functional.cosine_similarity(z[:, None], z, dim=-1).fill_diagonal_(0.0).sum().item() / 72
    want = {"y-aware": supcon_loss(z, y, temperature=0.1).item(), "exp": math.log(8) - 10 * pull, "threshold": 0.0}
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_so_far_apart_that_no_kernel_is_left_pull_their_nearest(kind) -> None:
    z, y = batch(3), numbers([0.0, 1e3, 3e3])
    s = torch.nn.functional.cosine_similarity(z[0], z, dim=-1) / 0.1
    total = torch.logaddexp(s[1], s[2]) if kind != "threshold" else s[2]
    loss = kernel_contrast_loss(z, y, kind=kind, reduction="none")
    assert loss[0].item() == pytest.approx((total - s[1]).item(), rel=1e-12)
    assert kernel_contrast_loss(z, y, kind=kind, bandwidth=1e-160).isfinite()  # d is, its square is not
    assert kernel_contrast_loss(z, 1e304 * y, kind=kind, kernel="cauchy").isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extremes_are_finite_and_autocast_changes_nothing(dtype, kind) -> None:
    z = batch(12, 6).to(dtype)
    z[0], z[1], z[2], z[5], z[6] = 0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, z[4], -z[4]
    for labels in (torch.arange(12.0), torch.zeros(12), torch.arange(12) // 3 * 1e-6, torch.arange(12) % 2 * 1e6):
        for temperature, kernel in ((1e-3, "gaussian"), (0.1, "cauchy"), (1e3, "gaussian")):
            z, options = z.detach().requires_grad_(), {"kind": kind, "kernel": kernel, "temperature": temperature}
            loss = kernel_contrast_loss(z, labels, **options)
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert torch.autograd.grad(loss, z)[0].isfinite().all()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(kernel_contrast_loss(z, labels, **options), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan(kind) -> None:
    assert kernel_contrast_loss(batch() * math.nan, numbers(TIED), kind=kind).isnan()


def test_module_remembers_and_equals_the_function() -> None:
    options = {"kind": "exp", "bandwidth": 2.0, "kernel": "cauchy", "temperature": 0.3, "reduction": "sum"}
    z, y, module = batch(), numbers(TIED), KernelContrastLoss(**options)
    assert module(z, y) == kernel_contrast_loss(z, y, **options)
    assert repr(module) == "KernelContrastLoss(kind='exp', bandwidth=2, kernel='cauchy', temperature=0.3)"


loss = kernel_contrast_loss
BAD = [
    (lambda z, y: loss(z, y, kind="treshold"), ValueError, r"kind is 'treshold'.*did you mean \"threshold\""),
    (lambda z, y: loss(z, y, kernel=None), TypeError, r"kernel is None; pass one of 'gaussian', 'cauchy'"),
    (lambda z, y: loss(z, y, bandwidth=0.0), ValueError, r"bandwidth is 0\.0; pass a finite number greater than 0"),
    (lambda z, y: KernelContrastLoss(temperature=-1.0), ValueError, r"Loss: temperature is -1\.0; pass a finite"),
    (lambda z, y: KernelContrastLoss(reduction="avg"), ValueError, r"reduction is 'avg'; pass one of 'none', 'mean'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(batch(), numbers(TIED))
