"""HCL against its sums as they read, where the correction leaves something and where not; edges and messages."""

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
from hardmix.kernels import pair_contrast as kernel
from hardmix.losses.clip import ClipLoss, clip_loss
from hardmix.losses.hcl import HCLLoss, hcl_loss

from .slow_pairs import cloud, unit_rows

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, scale: float = 2.0, pull: float = 1.0) -> list[Tensor]:
    return [x.requires_grad_() for x in (*cloud(n, d, seed, pull=pull), torch.tensor(scale, dtype=DOUBLE))]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


def slow_rows(images: Tensor, texts: Tensor, s: Tensor, beta: float, tau: float) -> list[Tensor]:
    a, b = unit_rows(images), unit_rows(texts)
    losses = []
    for i in range(len(a)):
        sides = []
        for anchors, keys in ((a, b), (b, a)):
            positive = (s * (anchors[i] @ keys[i])).exp()
            negatives = [(s * (anchors[i] @ keys[j])).exp() for j in range(len(a)) if j != i]
            importance = [x**beta for x in negatives]
            count, mean = len(negatives), sum(importance) / len(importance)
            total = sum(w / mean * x for w, x in zip(importance, negatives, strict=True))
            corrected = (total - tau * count * positive) / (1 - tau)
            sides.append(-(positive / (positive + torch.maximum(corrected, count * (-s).exp()))).log())
        losses.append(0.5 * (sides[0] + sides[1]))
    return losses


@pytest.fixture(params=["whole", "tiled"])
def tiles(request, monkeypatch):
    """One tile, and tiles of four rows, of which nine leave one alone."""
    if request.param == "tiled":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})


@pytest.mark.parametrize("n", [2, 3, 9])
@pytest.mark.parametrize(("scale", "pull"), [(2.0, 1.0), (2.0, 5.0), (6.0, 0.0)])
@pytest.mark.parametrize(("beta", "tau"), [(1.0, 0.1), (0.0, 0.0), (0.0, 0.3), (2.5, 0.0), (0.5, 0.9)])
def test_value_and_gradient_are_those_of_the_loops(n, scale, pull, beta, tau, tiles) -> None:
    a, b, s = leaves(n, seed=n, scale=scale, pull=pull)
    got = hcl_loss(a, b, s, beta=beta, tau_plus=tau, reduction="none")
    want = torch.stack(slow_rows(a, b, s, beta, tau))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    weight = torch.rand(n, dtype=DOUBLE, generator=rng(n))
    for x, y in zip(gradients((got * weight).sum(), a, b, s), gradients((want * weight).sum(), a, b, s), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 7),
    st.integers(1, 5),
    st.floats(0.2, 20),
    st.floats(0, 3),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99]),
    st.floats(0, 6),
    st.integers(0, 10**6),
)
def test_any_batch(n, d, scale, beta, tau, pull, seed) -> None:
    a, b, s = leaves(n, d, seed, scale=scale, pull=pull)
    got = hcl_loss(a, b, s, beta=beta, tau_plus=tau, reduction="none")
    # The sum less what is taken from it may have few digits left, in either form.
    want = torch.stack(slow_rows(a, b, s, beta, tau))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert all(grad.isfinite().all() for grad in gradients(got.sum(), a, b, s))


def test_both_sides_of_the_maximum_are_tested() -> None:
    """The rows of one of the batches above: of some nothing is left, of some there is."""
    a, b, s = leaves(9, 5, 9, pull=5.0)
    x, y = F.normalize(a), F.normalize(b)
    own = torch.exp(s * (x * y).sum(1))
    z = torch.exp(s * x @ y.T)
    nothing = z.sum(1) - own - 0.3 * 8 * own <= 0.7 * 8 * (-s).exp()
    assert 2 <= nothing.sum() <= 7


@pytest.mark.parametrize(("pull", "tau"), [(0.3, 0.1), (5.0, 0.5)])
def test_gradcheck(pull, tau, tiles) -> None:
    a, b, s = leaves(6, 3, pull=pull)
    with torch.no_grad():
        a[4] = 2 * a[0]
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda *x, r=reduction: hcl_loss(*x, tau_plus=tau, reduction=r), (a, b, s), eps=1e-6, atol=1e-5, rtol=1e-3
        )


def test_nothing_reweighted_and_nothing_taken_is_clip(tiles) -> None:
    for n in (2, 9):
        for scale in (0.1, 6.0, 100.0):
            a, b, s = leaves(n, scale=scale)
            loss, want = hcl_loss(a, b, s, beta=0.0, tau_plus=0.0), clip_loss(a, b, s)
            torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradients(loss, a, b, s), gradients(want, a, b, s), rtol=1e-10, atol=1e-12)


def test_the_authors_code_in_one_direction() -> None:
    """Their lines, with other texts in the place of other samples' views."""
    a, b, s = leaves(9, pull=0.3)
    tau, beta, t = 0.1, 1.0, 1 / s.item()
    sides = []
    for one, two in ((F.normalize(a), F.normalize(b)), (F.normalize(b), F.normalize(a))):
        neg = torch.exp(one @ two.T / t).masked_select(~torch.eye(9, dtype=torch.bool)).view(9, -1)
        pos = torch.exp((one * two).sum(-1) / t)
        imp = (beta * neg.log()).exp()
        ng = (-tau * 8 * pos + (imp * neg).sum(-1) / imp.mean(-1)) / (1 - tau)
        ng = torch.clamp(ng, min=8 * math.e ** (-1 / t))
        sides.append(-torch.log(pos / (pos + ng)))
    torch.testing.assert_close(hcl_loss(a, b, s, reduction="none"), sum(sides) / 2, rtol=1e-10, atol=1e-12)


def test_harder_negatives_count_more() -> None:
    a, b, s = leaves(12, pull=0.5)
    losses = [hcl_loss(a, b, s, beta=beta).item() for beta in (0.0, 0.5, 1.0, 2.0, 8.0)]
    assert losses == sorted(losses)
    # In the limit every negative is the hardest one.
    cos = F.normalize(a) @ F.normalize(b).T
    own, rest = cos.diagonal(), cos - 9 * torch.eye(12)
    limit = sum(torch.log1p(11 * torch.exp(s * (rest.amax(axis) - own))).mean() for axis in (0, 1)) / 2
    assert hcl_loss(a, b, s, beta=1e6, tau_plus=0.0).item() == pytest.approx(limit.item(), rel=1e-8)


def test_the_least_loss() -> None:
    """Nothing is left of the negatives: they have no gradient, and each is counted as an opposite row."""
    a, b, s = leaves(8, pull=50.0)
    own = (F.normalize(a) * F.normalize(b)).sum(1)
    loss = hcl_loss(a, b, s, tau_plus=0.9, reduction="none")
    torch.testing.assert_close(loss, torch.log1p(7 * torch.exp(-s * (1 + own))))
    assert not gradients(loss[0], a)[0][1:].any()


def test_invariances_and_reductions(tiles) -> None:
    a, b, s = leaves(9)
    want = hcl_loss(a, b, s)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=rng(1)))[0]
    order, size = torch.randperm(9, generator=rng(2)), torch.rand(9, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for x, y in ((b, a), (a[order], b[order]), (a @ turn, b @ turn), (a * size, b / size)):
        torch.testing.assert_close(hcl_loss(x, y, s), want, rtol=1e-12, atol=1e-12)
    none = hcl_loss(a, b, s, reduction="none")
    torch.testing.assert_close(none.sum(), hcl_loss(a, b, s, reduction="sum"))
    torch.testing.assert_close(none.mean(), want)


def test_edges() -> None:
    a, b, s = leaves(1)
    loss = hcl_loss(a, b, s)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(loss, a, b, s))
    for tau in (0.0, 0.1, 0.9):
        same = torch.ones(5, 3, dtype=DOUBLE)
        assert hcl_loss(same, same, 3.0, tau_plus=tau).item() == pytest.approx(math.log(5), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [2.0, 20.0])
def test_low_precision_is_float64_of_the_same_input(dtype, scale) -> None:
    a, b = (x.to(dtype) for x in cloud(24, 16, 5, pull=0.3))
    got = hcl_loss(a, b, scale)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(hcl_loss(a.double(), b.double(), scale).item(), rel=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hcl_loss(a, b, scale), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 2.0, 100.0, 1e4])
@pytest.mark.parametrize(("beta", "tau"), [(0.0, 0.0), (1.0, 0.1), (1.0, 0.5), (1.0, 1e-30), (1.0, 1 / 8)])
def test_extremes_are_finite(dtype, scale, beta, tau, tiles) -> None:
    top = torch.finfo(dtype).max
    a, b = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in (0, 1))
    a[0], b[1], a[2], b[2], b[3], a[4] = 0.0, 0.0, top, -top, a[3], 1.0 if dtype == torch.float16 else 1e-30
    b[5], a[6], a[7] = -a[5], a[8], a[8]
    a.requires_grad_()
    b.requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    loss = hcl_loss(a, b, s, beta=beta, tau_plus=tau)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, a, b, s))


def test_the_module_is_the_function() -> None:
    a, b, s = leaves(6)
    names = list(inspect.signature(ClipLoss.forward).parameters)
    assert list(inspect.signature(HCLLoss.forward).parameters) == names
    module = HCLLoss(beta=0.5, tau_plus=0.2, reduction="sum")
    assert repr(module) == "HCLLoss(beta=0.5, tau_plus=0.2, reduction='sum')"
    want = hcl_loss(a, b, s, beta=0.5, tau_plus=0.2, reduction="sum")
    assert torch.equal(module(a, b, s), want)
    bias = torch.tensor(-3.0, requires_grad=True)
    found = module(image_features=a, text_features=b, logit_scale=s, logit_bias=bias, output_dict=True)
    assert list(found) == ["contrastive_loss"]
    assert torch.equal(found["contrastive_loss"], want)
    assert gradients(found["contrastive_loss"], bias)[0] == 0.0


@compiling.supported
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_compiled_is_eager() -> None:
    a, b, s = leaves(9)
    compiled = torch.compile(HCLLoss(), backend="aot_eager", fullgraph=True)
    loss, want = compiled(a, b, s), hcl_loss(a, b, s)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, a, b, s), gradients(want, a, b, s))


A = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"beta": -0.5}, ValueError, "beta is -0.5; pass a finite number of at least 0."),
        ({"beta": "1"}, ValueError, "beta is '1'; pass a finite number of at least 0."),
        ({"tau_plus": -0.1}, ValueError, "tau_plus is -0.1; pass a number from 0 to 1."),
        ({"tau_plus": math.nan}, ValueError, "tau_plus is nan; pass a number from 0 to 1."),
        ({"tau_plus": 1.0}, ValueError, "tau_plus is 1.0; pass a number less than 1, a share of the negatives."),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; pass one of 'none', 'mean', 'sum'."),
    ],
)
def test_messages(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^hcl_loss: {re.escape(message)}$"):
        hcl_loss(A, A, 1.0, **setting)
    with pytest.raises(kind, match=f"^HCLLoss: {re.escape(message)}$"):
        HCLLoss(**setting)


def test_messages_of_the_features() -> None:
    for loss, who in ((hcl_loss, "hcl_loss"), (HCLLoss(), "HCLLoss")):
        with pytest.raises(ValueError, match=f"^{who}: text_features has 2 entries but image_features has 3 rows; "):
            loss(A, A[:2], 1.0)
        with pytest.raises(ValueError, match=f"^{who}: logit_scale is -1; pass a number greater than 0, "):
            loss(A, A, torch.tensor(-1.0))
        with pytest.raises(
            TypeError, match=f"^{who}: image_features has dtype torch.int64; pass floating-point values"
        ):
            loss(A.long(), A, 1.0)
