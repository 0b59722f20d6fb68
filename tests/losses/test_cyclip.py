"""CyCLIP against double sums of differences of cosines, in both forms of its sums; properties, edges, messages."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiling
from hardmix.losses.clip import ClipLoss, clip_loss
from hardmix.losses.cyclip import CyClipLoss, cyclip_loss

from .slow_pairs import clip_rows, cloud, unit_rows

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, scale: float = 6.0) -> list[Tensor]:
    return [x.requires_grad_() for x in (*cloud(n, d, seed), torch.tensor(scale, dtype=DOUBLE))]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


def slow_rows(images: Tensor, texts: Tensor, scale: Tensor | float, within: float, across: float) -> list[Tensor]:
    a, b = unit_rows(images), unit_rows(texts)
    losses = clip_rows(images, texts, scale)
    for i in range(len(a)):
        for j in range(len(a)):
            losses[i] = losses[i] + within * (a[i] @ a[j] - b[i] @ b[j]) ** 2
            losses[i] = losses[i] + across * (a[i] @ b[j] - a[j] @ b[i]) ** 2
    return losses


#: with more columns than rows, and with fewer
SHAPES = [(1, 5), (2, 5), (5, 5), (9, 20), (1, 1), (6, 5), (9, 3)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("weights", [(0.25, 0.25), (0.7, 0.0), (0.0, 0.3), (1.0, 2.5)])
def test_value_and_gradient_are_those_of_the_loops(n, d, weights) -> None:
    a, b, s = leaves(n, d, seed=n)
    got = cyclip_loss(a, b, s, in_modal=weights[0], cross_modal=weights[1], reduction="none")
    want = torch.stack(slow_rows(a, b, s, *weights))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.rand(n, dtype=DOUBLE, generator=rng(n))
    for x, y in zip(gradients((got * weight).sum(), a, b, s), gradients((want * weight).sum(), a, b, s), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 9), st.floats(0.01, 3), st.floats(0.0, 3), st.booleans(), st.integers(0, 10**6)
)
def test_any_batch(n, d, within, across, twins, seed) -> None:
    a, b, s = leaves(n, d, seed)
    with torch.no_grad():
        if twins:
            a[-1] = a[0] * 2
            b[0] = a[0]
    got = cyclip_loss(a, b, s, in_modal=within, cross_modal=across, reduction="sum")
    want = torch.stack(slow_rows(a, b, s, within, across)).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-11, abs=1e-11)


def test_the_mean_is_the_papers_sum() -> None:
    """Whole matrices of cosines, as the authors' code has them: the mean of squares times the number of pairs."""
    a, b, s = leaves(7, 4)
    x, y = F.normalize(a), F.normalize(b)
    within = (x @ x.T - y @ y.T).square().mean() * 7
    across = (x @ y.T - y @ x.T).square().mean() * 7
    torch.testing.assert_close(cyclip_loss(a, b, s), clip_loss(a, b, s) + 0.25 * within + 0.25 * across)


@pytest.mark.parametrize(("n", "d"), [(4, 6), (6, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(n, d, reduction) -> None:
    a, b, s = leaves(n, d)
    with torch.no_grad():
        b[1] = 2 * a[1]

    def loss(*x: Tensor) -> Tensor:
        return cyclip_loss(*x, in_modal=0.4, cross_modal=0.9, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (a, b, s), eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("n", "d"), [(4, 6), (9, 4)])
def test_consistent_geometries_leave_clip(n, d) -> None:
    a, _, s = leaves(n, d)
    axis = F.normalize(torch.randn(d, dtype=DOUBLE, generator=rng(1)), dim=0)
    mirror = torch.eye(d, dtype=DOUBLE) - 2 * torch.outer(axis, axis)
    for b in (a, a @ mirror):
        torch.testing.assert_close(cyclip_loss(a, b, s), clip_loss(a, b, s), rtol=1e-12, atol=1e-12)
    turn = torch.linalg.qr(torch.randn(d, d, dtype=DOUBLE, generator=rng(2)))[0]  # keeps cosines within a modality only
    only = cyclip_loss(a, a @ turn, s, cross_modal=0.0)
    torch.testing.assert_close(only, clip_loss(a, a @ turn, s), rtol=1e-12, atol=1e-12)
    assert cyclip_loss(a, a @ turn, s) > only + 1e-3


def test_invariances_and_reductions() -> None:
    a, b, s = leaves(9, 4)
    want = cyclip_loss(a, b, s)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=DOUBLE, generator=rng(1)))[0]
    order, size = torch.randperm(9, generator=rng(2)), torch.rand(9, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for x, y in ((b, a), (a[order], b[order]), (a @ turn, b @ turn), (a * size, b / size)):
        torch.testing.assert_close(cyclip_loss(x, y, s), want, rtol=1e-12, atol=1e-12)
    none = cyclip_loss(a, b, s, reduction="none")
    torch.testing.assert_close(none.sum(), cyclip_loss(a, b, s, reduction="sum"))
    torch.testing.assert_close(none.mean(), want)


def test_edges() -> None:
    a, b, s = leaves(1)
    loss = cyclip_loss(a, b, s)
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
    assert all((grad.abs() < 1e-12).all() for grad in gradients(loss, a, b, s))
    assert cyclip_loss(torch.ones(5, 3), torch.ones(5, 3), 9.0).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("d", [16, 40])
def test_near_geometries_keep_their_digits_in_float32(d) -> None:
    a = torch.randn(24, d, generator=rng())
    b = a + 1e-4 * torch.randn(24, d, generator=rng(1))
    found = []
    for dtype in (torch.float32, DOUBLE):
        x, y = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
        term = CyClipLoss()(x, y, 1.0, output_dict=True)["cyclip_loss"]
        found.append([term.detach().double(), *gradients(term, x, y)])
    assert 1e-9 < found[1][0] < 1e-5
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 5e-3 * want.norm()  # the rows themselves have 7 digits, their difference 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [16, 40])
def test_low_precision_is_float64_of_the_same_input(dtype, d) -> None:
    a, b = (x.to(dtype) for x in cloud(24, d, 5))
    got = cyclip_loss(a, b, 20.0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(cyclip_loss(a.double(), b.double(), 20.0).item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cyclip_loss(a, b, 20.0), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
@pytest.mark.parametrize("d", [6, 12])
def test_extremes_are_finite(dtype, scale, d) -> None:
    top = torch.finfo(dtype).max
    a, b = (torch.randn(9, d, generator=rng(k)).to(dtype) for k in (0, 1))
    a[0], b[1], a[2], b[2], b[3], a[4] = 0.0, 0.0, top, -top, a[3], 1.0 if dtype == torch.float16 else 1e-30
    b[5], a[6], a[7] = -a[5], a[8], a[8]
    a.requires_grad_()
    b.requires_grad_()
    loss = cyclip_loss(a, b, scale)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, a, b))


def test_the_module_is_the_function() -> None:
    a, b, s = leaves(6)
    names = list(inspect.signature(ClipLoss.forward).parameters)
    assert list(inspect.signature(CyClipLoss.forward).parameters) == names
    module = CyClipLoss(in_modal=0.1, cross_modal=0.5, reduction="sum")
    assert repr(module) == "CyClipLoss(in_modal=0.1, cross_modal=0.5, reduction='sum')"
    want = cyclip_loss(a, b, s, in_modal=0.1, cross_modal=0.5, reduction="sum")
    torch.testing.assert_close(module(a, b, s), want)
    bias = torch.tensor(-3.0, requires_grad=True)
    found = module(image_features=a, text_features=b, logit_scale=s, logit_bias=bias, output_dict=True)
    assert list(found) == ["contrastive_loss", "cyclip_loss"]
    torch.testing.assert_close(found["contrastive_loss"], clip_loss(a, b, s, reduction="sum"))
    torch.testing.assert_close(sum(found.values()), want)
    assert gradients(module(a, b, s, bias), bias)[0] == 0.0


@compiling.supported
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_compiled_is_eager() -> None:
    a, b, s = leaves(9)
    compiled = torch.compile(CyClipLoss(), backend="aot_eager", fullgraph=True)
    loss, want = compiled(a, b, s), cyclip_loss(a, b, s)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, a, b, s), gradients(want, a, b, s))


A = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"in_modal": -1.0}, ValueError, "in_modal is -1.0; pass a finite number of at least 0."),
        ({"cross_modal": None}, TypeError, "cross_modal is None; pass a finite number of at least 0."),
        (
            {"in_modal": 0.0, "cross_modal": 0},
            ValueError,
            "in_modal and cross_modal are 0; pass one that is greater, or use clip_loss.",
        ),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; pass one of 'none', 'mean', 'sum'."),
    ],
)
def test_messages(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^cyclip_loss: {re.escape(message)}$"):
        cyclip_loss(A, A, 1.0, **setting)
    with pytest.raises(kind, match=f"^CyClipLoss: {re.escape(message)}$"):
        CyClipLoss(**setting)


def test_messages_of_the_features() -> None:
    for loss, who in ((cyclip_loss, "cyclip_loss"), (CyClipLoss(), "CyClipLoss")):
        with pytest.raises(ValueError, match=f"^{who}: text_features has 2 entries but image_features has 3 rows; "):
            loss(A, A[:2], 1.0)
        with pytest.raises(ValueError, match=f"^{who}: logit_scale is 0.0; pass a finite number greater than 0"):
            loss(A, A, 0.0)
        with pytest.raises(ValueError, match=f"^{who}: image_features holds NaN or infinity in rows 0, 1, 2; "):
            loss(A / 0, A, 1.0)
