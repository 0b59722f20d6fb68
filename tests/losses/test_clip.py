"""CLIP and SigLIP against loops, in one tile and in many; the kernel's split over processes; edges and messages."""

from __future__ import annotations

import inspect
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import compiling
from hardmix.kernels import pair_contrast as kernel
from hardmix.losses.clip import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from hardmix.losses.m2mix import mixed_rows

from .slow_pairs import clip_rows, cloud, mean, sigmoid_rows

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, scale: float = 6.0, bias: float = -2.0) -> list[Tensor]:
    values = [*cloud(n, d, seed), torch.tensor(scale, dtype=DOUBLE), torch.tensor(bias, dtype=DOUBLE)]
    return [value.requires_grad_() for value in values]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


@pytest.fixture(params=["whole", "tiled"])
def tiles(request, monkeypatch):
    """One tile, and tiles of four rows, of which nine leave one alone."""
    if request.param == "tiled":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("scale", [0.1, 6.0, 100.0])
def test_value_and_gradient_are_those_of_the_loops(n, scale, tiles) -> None:
    a, b, s, bias = leaves(n, seed=n, scale=scale)
    for got, rows, inputs in (
        (clip_loss(a, b, s, reduction="none"), clip_rows(a, b, s), (a, b, s)),
        (siglip_loss(a, b, s, bias, reduction="none"), sigmoid_rows(a, b, s, bias, None), (a, b, s, bias)),
    ):
        want = torch.stack(rows)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        weight = torch.rand(n, dtype=DOUBLE, generator=rng(n))
        for x, y in zip(
            gradients((got * weight).sum(), *inputs), gradients((want * weight).sum(), *inputs), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.5, 20.0, 100.0]), st.booleans(), st.integers(0, 10**6))
def test_any_batch(n, d, scale, twins, seed) -> None:
    a, b, s, _ = leaves(n, d, seed, scale=scale)
    with torch.no_grad():
        if twins:
            a[-1] = a[0] * 2
            b[0] = a[0]
    want, got = mean(clip_rows(a, b, s)), clip_loss(a, b, s)
    assert got.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-12)
    for x, y in zip(gradients(got, a, b, s), gradients(want, a, b, s), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_the_plain_form_in_torch(tiles) -> None:
    a, b, s, bias = leaves(30, 8)
    z = s * F.normalize(a) @ F.normalize(b).T
    place = torch.arange(30)
    torch.testing.assert_close(clip_loss(a, b, s), (F.cross_entropy(z, place) + F.cross_entropy(z.T, place)) / 2)
    told = 2 * torch.eye(30) - 1
    torch.testing.assert_close(siglip_loss(a, b, s, bias), -F.logsigmoid(told * (z + bias)).sum() / 30)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction, tiles) -> None:
    a, b, s, bias = leaves(6, 3)
    options = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3}
    assert torch.autograd.gradcheck(lambda *x: clip_loss(*x, reduction=reduction), (a, b, s), **options)
    assert torch.autograd.gradcheck(lambda *x: siglip_loss(*x, reduction=reduction), (a, b, s, bias), **options)


def test_values_by_hand() -> None:
    eye = torch.eye(4)
    assert clip_loss(eye, eye, 2.0).item() == pytest.approx(math.log(math.exp(2) + 3) - 2)
    assert clip_loss(torch.ones(5, 3), torch.ones(5, 3), 9.0).item() == pytest.approx(math.log(5))
    assert siglip_loss(eye, eye, 1.0, -1.0).item() == pytest.approx(math.log(2) + 3 * math.log1p(math.exp(-1)))
    assert siglip_loss(eye, eye, 1.0) == siglip_loss(eye, eye, 1.0, 0.0)
    wrong = clip_loss(torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[-1.0, 0], [1, 0]]), 50.0)
    assert wrong.item() == pytest.approx(100.0)  # every text is opposite to its image


def test_a_single_pair_has_nothing_to_be_told_from() -> None:
    a, b, s, _ = leaves(1)
    loss = clip_loss(a, b, s)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(loss, a, b, s))
    assert siglip_loss(a, a, 3.0).item() == pytest.approx(math.log1p(math.exp(-3)))


def test_reductions_agree() -> None:
    a, b, s, bias = leaves(7)
    for loss in (lambda r: clip_loss(a, b, s, reduction=r), lambda r: siglip_loss(a, b, s, bias, reduction=r)):
        torch.testing.assert_close(loss("none").sum(), loss("sum"))
        torch.testing.assert_close(loss("none").mean(), loss("mean"))


def test_invariances() -> None:
    a, b, s, bias = leaves(9)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=rng(1)))[0]
    order, size = torch.randperm(9, generator=rng(2)), torch.rand(9, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for loss in (lambda a, b: clip_loss(a, b, s), lambda a, b: siglip_loss(a, b, s, bias)):
        want = loss(a, b)
        for x, y in ((b, a), (a[order], b[order]), (a @ turn, b @ turn), (a * size, b / size)):
            torch.testing.assert_close(loss(x, y), want, rtol=1e-12, atol=1e-12)


def test_a_small_loss_has_all_digits_in_float32(tiles) -> None:
    a, b = (x.float() for x in cloud(16, 64, 4, pull=3.0))
    results = []
    for dtype in (torch.float32, DOUBLE):
        x, y = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
        s = torch.tensor(26.0, dtype=dtype, requires_grad=True)
        loss = clip_loss(x, y, s)
        results.append([loss.detach().double(), *gradients(loss, x, y, s)])
    assert 1e-8 < results[1][0] < 1e-6
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 3e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype, tiles) -> None:
    a, b = (x.to(dtype) for x in cloud(24, 16, 5))
    for loss in (lambda x, y: clip_loss(x, y, 20.0), lambda x, y: siglip_loss(x, y, 20.0, -10.0)):
        got = loss(a, b)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(loss(a.double(), b.double()).item(), rel=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(a, b), got)
    assert clip_loss(a, b.double(), 20.0).dtype == DOUBLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def test_extremes_are_finite(dtype, scale, tiles) -> None:
    top = torch.finfo(dtype).max
    a = torch.randn(9, 6, generator=rng()).to(dtype)
    b = torch.randn(9, 6, generator=rng(1)).to(dtype)
    a[0], b[1], a[2], b[2], b[3], a[4] = 0.0, 0.0, top, -top, a[3], 1.0 if dtype == torch.float16 else 1e-30
    b[5], a[6], a[7] = -a[5], a[8], a[8]
    a.requires_grad_()
    b.requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    for loss in (clip_loss(a, b, s), siglip_loss(a, b, s, -10.0)):
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(loss, a, b, s))


def test_only_what_learns_gets_a_gradient(tiles) -> None:
    """A frozen tower, a fixed scale."""
    a, b, s, _ = leaves(9)
    want = gradients(clip_loss(a, b, s), a, b, s)
    for k, inputs in enumerate([(a, b.detach(), s.detach()), (a.detach(), b, 6.0), (a.detach(), b.detach(), s)]):
        torch.testing.assert_close(gradients(clip_loss(*inputs), (a, b, s)[k])[0], want[k])
    with torch.no_grad():
        assert not clip_loss(a, b, s).requires_grad


@pytest.mark.parametrize("cuts", [(), (4,), (2, 6, 10)])
@pytest.mark.parametrize("n", [12, 13])
def test_processes_share_the_anchors(cuts, n, monkeypatch) -> None:
    """Each asks for its part of the anchors of all rows; results lie side by side, gradients add up."""
    monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
    monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})
    tiles = kernel.tile_rows(n, torch.device("cpu"), cuts)
    order, partner = kernel.partner_order(tiles)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order[partner], n - 1 - order)
    a, b, s, _ = leaves(n, seed=n)
    shares = torch.rand(2, 2, n, dtype=DOUBLE, generator=rng(n)).requires_grad_()

    def part(first: int, last: int | None) -> Tensor:
        mixed = mixed_rows((a * b).sum(1), torch.full((1, 1), 0.3, dtype=DOUBLE), s)
        own = [kernel.Term(image=shares[0], partners=True), kernel.Term(image=shares[1], text=shares[0], partners=True)]
        terms = [kernel.Term(scale=s), *mixed.terms, *own]
        return kernel.pair_contrast(a, b, terms, tiles=tiles, first=first, last=last)

    weight = torch.rand(4, 2, n, dtype=DOUBLE, generator=rng(1))
    whole = part(0, None)
    want = gradients((whole * weight).sum(), a, b, s, shares)
    bounds = [0, *cuts, n]
    total = [torch.zeros_like(x) for x in want]
    for first, last in pairwise(bounds):
        mine = part(first, last)
        torch.testing.assert_close(mine, whole[..., first:last], rtol=1e-12, atol=1e-12)
        for sum_, grad in zip(total, gradients((mine * weight[..., first:last]).sum(), a, b, s, shares), strict=True):
            sum_ += grad
    for got, one in zip(total, want, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-11, atol=1e-11)


class Largest(TorchDispatchMode):
    """The most values of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.values = max(self.values, value.numel())
        return result


def test_no_matrix_of_all_pairs_is_ever_there(monkeypatch) -> None:
    a, b = (x.float().requires_grad_() for x in cloud(300, 16, 6))
    with Largest() as whole:
        clip_loss(a, b, 10.0).backward()
    assert whole.values == 300**2
    monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
    monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 64})
    with Largest() as tiled:
        clip_loss(a, b, 10.0).backward()
    assert tiled.values == 300 * 16  # the features


@compiling.supported
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_compiled_is_eager() -> None:
    a, b, s, _ = leaves(9)
    compiled = torch.compile(ClipLoss(), backend="aot_eager", fullgraph=True)
    loss, want = compiled(a, b, s), clip_loss(a, b, s)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, a, b, s), gradients(want, a, b, s))


def test_the_modules_are_the_functions() -> None:
    a, b, s, bias = leaves(6)
    assert list(inspect.signature(ClipLoss.forward).parameters) == [
        "self",
        "image_features",
        "text_features",
        "logit_scale",
        "logit_bias",
        "output_dict",
    ]
    assert repr(ClipLoss(reduction="sum")) == "ClipLoss(reduction='sum')"
    assert torch.equal(ClipLoss(reduction="sum")(a, b, s), clip_loss(a, b, s, reduction="sum"))
    assert torch.equal(SigLipLoss(reduction="none")(a, b, s, bias), siglip_loss(a, b, s, bias, reduction="none"))
    for module in (ClipLoss(), SigLipLoss()):
        found = module(image_features=a, text_features=b, logit_scale=s, logit_bias=bias, output_dict=True)
        assert list(found) == ["contrastive_loss"]
        assert torch.equal(found["contrastive_loss"], module(a, b, s, bias))
        assert not module.state_dict()
    loss = ClipLoss()(a, b, s, bias)
    assert torch.equal(loss, clip_loss(a, b, s))
    assert gradients(loss, bias)[0] == 0.0


A = torch.ones(3, 2)
HOLES = torch.tensor([[0.0, 1.0], [torch.inf, 0.0], [0.0, torch.nan]])
POSITIVE = "pass a finite number greater than 0."


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], A, 1.0), TypeError, "image_features is a list; pass a torch.Tensor."),
        ((A, None, 1.0), TypeError, "text_features is a NoneType; pass a torch.Tensor."),
        ((A, A.long(), 1.0), TypeError, "text_features has dtype torch.int64; pass floating-point values."),
        ((A[0], A, 1.0), ValueError, "image_features has shape (2,); pass a batch with 2 axes, samples first."),
        ((A[:0], A[:0], 1.0), ValueError, "image_features has shape (0, 2) and is empty; pass at least one sample."),
        (
            (A, A[:2], 1.0),
            ValueError,
            "text_features has 2 entries but image_features has 3 rows; pass one entry per row.",
        ),
        (
            (A, torch.ones(3, 4), 1.0),
            ValueError,
            "text_features has 4 columns but image_features has 2; pass projections into one space.",
        ),
        (
            (A, A.to("meta"), 1.0),
            ValueError,
            "text_features is on meta but image_features is on cpu; move both to one device with .to().",
        ),
        (
            (HOLES, A, 1.0),
            ValueError,
            "image_features holds NaN or infinity in rows 1, 2; repair or leave out these samples.",
        ),
        ((A, A, 0.0), ValueError, f"logit_scale is 0.0; {POSITIVE}"),
        ((A, A, math.inf), ValueError, f"logit_scale is inf; {POSITIVE}"),
        ((A, A, None), TypeError, f"logit_scale is None; {POSITIVE}"),
        (
            (A, A, torch.tensor(-2.0)),
            ValueError,
            "logit_scale is -2; pass a number greater than 0, the exponential of what the model learns.",
        ),
        (
            (A, A, torch.tensor(torch.nan)),
            ValueError,
            "logit_scale is nan; pass a number greater than 0, the exponential of what the model learns.",
        ),
        (
            (A, A, torch.ones(2)),
            ValueError,
            "logit_scale has shape (2,) and dtype torch.float32; pass a number greater than 0, or a floating-point "
            "tensor of one element.",
        ),
        (
            (A, A, torch.tensor(2)),
            ValueError,
            "logit_scale has shape () and dtype torch.int64; pass a number greater than 0, or a floating-point tensor "
            "of one element.",
        ),
    ],
)
def test_messages(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    for loss in (clip_loss, siglip_loss):
        with pytest.raises(kind, match=f"^{loss.__name__}: {re.escape(message)}$"):
            loss(*arguments)


def test_messages_of_settings() -> None:
    for call, who in (
        (lambda: clip_loss(A, A, 1.0, reduction="means"), "clip_loss"),
        (lambda: ClipLoss(reduction="means"), "ClipLoss"),
        (lambda: siglip_loss(A, A, 1.0, reduction="means"), "siglip_loss"),
        (lambda: SigLipLoss(reduction="means"), "SigLipLoss"),
    ):
        with pytest.raises(ValueError, match=f"^{who}: reduction is 'means'; pass one of 'none', 'mean', 'sum' "):
            call()
    with pytest.raises(ValueError, match=r"^siglip_loss: logit_bias is inf; pass a finite number\.$"):
        siglip_loss(A, A, 1.0, math.inf)
    with pytest.raises(ValueError, match=r"^siglip_loss: logit_bias is nan; pass a finite number\.$"):
        siglip_loss(A, A, 1.0, torch.tensor(torch.nan))
