"""Regression errors against a loop and torch's own losses; mixed labels, extremes, edges and messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hardmix.losses import RegressionLoss, regression_loss
from hardmix.mixing import MixedTarget

KINDS = ["l1", "l2", "huber"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(n: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    yhat, y = torch.randn(2, n, generator=rng(seed), dtype=torch.float64) * 2
    return yhat.to(dtype), y.to(dtype)


def slow_row(yhat: float, labels: list[float], weights: list[float], kind: str, delta: float) -> float:
    e = abs(yhat - sum(w * y for w, y in zip(weights, labels, strict=True)))
    if kind == "l1":
        return e
    if kind == "l2":
        return e * e
    return e * e / 2 if e <= delta else delta * (e - delta / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_equals_the_slow_loop(kind: str, seed: int) -> None:
    n, k = 1 + seed % 6, 1 + seed % 4
    yhat, _ = pair(n, seed)
    labels = torch.randn(n, k, generator=rng(seed), dtype=torch.float64) * 3
    weights = torch.rand(n, k, generator=rng(seed + 1), dtype=torch.float64).softmax(1)
    factor = torch.rand(n, generator=rng(seed + 2), dtype=torch.float64)
    rows = zip(yhat.tolist(), labels.tolist(), weights.tolist(), strict=True)
    want = [f * slow_row(*row, kind, 0.7) for f, row in zip(factor.tolist(), rows, strict=True)]
    options = {"kind": kind, "delta": 0.7, "weight": factor}
    target = MixedTarget(labels, weights)
    assert regression_loss(yhat, target, reduction="none", **options).tolist() == pytest.approx(want, rel=1e-12)
    assert regression_loss(yhat, target, **options).item() == pytest.approx(sum(want) / n, rel=1e-12)
    assert regression_loss(yhat, target, reduction="sum", **options).item() == pytest.approx(sum(want), rel=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_equals_torch(reduction: str, shape: tuple[int, ...]) -> None:
    yhat, y = torch.randn(2, *shape, generator=rng(), dtype=torch.float64) * 2
    torch.testing.assert_close(regression_loss(yhat, y, reduction=reduction), F.l1_loss(yhat, y, reduction=reduction))
    got = regression_loss(yhat, y, kind="l2", reduction=reduction)
    torch.testing.assert_close(got, F.mse_loss(yhat, y, reduction=reduction))
    got = regression_loss(yhat, y, kind="huber", delta=1.3, reduction=reduction)
    torch.testing.assert_close(got, F.huber_loss(yhat, y, delta=1.3, reduction=reduction))


def test_mixed_vectors_and_their_weights() -> None:
    yhat, labels = torch.randn(4, 3, generator=rng()), torch.randn(4, 2, 3, generator=rng(1))
    target = MixedTarget(labels, torch.tensor([[0.3, 0.7]]).expand(4, 2))
    factor = torch.tensor([0.0, 1.0, 2.0, 1.0])
    want = (yhat - target.mean()).abs() * factor[:, None]
    torch.testing.assert_close(regression_loss(yhat, target, weight=factor, reduction="none"), want)
    torch.testing.assert_close(regression_loss(yhat, target, weight=factor), want.sum() / 12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    yhat, y = (v.requires_grad_() for v in pair())
    weight = torch.rand(7, generator=rng(), dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda a, b, w, r=reduction: regression_loss(a, b, kind=kind, weight=w, reduction=r), (yhat, y, weight)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes_and_low_precision(kind: str, dtype: torch.dtype) -> None:
    top = min(torch.finfo(dtype).max, 1e15)
    yhat = torch.tensor([0.0, top, -top, 1e-7, 3.0, 1.0], dtype=dtype, requires_grad=True)
    y = torch.tensor([0.0, -top, -top, 0.0, 2.5, 1e-3], dtype=dtype)
    loss = regression_loss(yhat, y, kind=kind)
    (grad,) = torch.autograd.grad(loss, yhat)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad[0] == grad[2] == 0
    assert loss.item() == pytest.approx(regression_loss(yhat.double(), y.double(), kind=kind).item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(regression_loss(yhat, y, kind=kind), loss)


def test_no_value_is_read() -> None:
    yhat, y = (v.to("meta") for v in pair())  # has none: a host that waited for one would fail
    for kind in KINDS:
        assert regression_loss(yhat, MixedTarget(y[:, None], y[:, None]), kind=kind, weight=y).is_meta


def test_edges() -> None:
    for kind in KINDS:
        assert regression_loss(torch.tensor([2.0]), torch.tensor([2]), kind=kind).item() == 0.0
        assert regression_loss(torch.tensor([2.0, torch.nan]), torch.tensor([2, 2]), kind=kind).isnan()
    assert regression_loss(torch.tensor([0.5]), torch.tensor([3], dtype=torch.uint8)).item() == 2.5


def test_module_remembers_and_equals_the_function() -> None:
    yhat, y = pair()
    weight = torch.rand(7, generator=rng())
    options = {"kind": "huber", "delta": 0.5, "reduction": "sum"}
    module = RegressionLoss(**options)
    assert module(yhat, y, weight=weight) == regression_loss(yhat, y, weight=weight, **options)
    assert module.state_dict() == {}
    module.load_state_dict(RegressionLoss().state_dict())
    assert repr(module) == "RegressionLoss(kind='huber', delta=0.5, reduction='sum')"


ONES = torch.ones(7, 2)
BAD = [
    (lambda p, y: regression_loss(p[:, None], y), ValueError, r"labels has shape \(7,\) but predictions has \(7, 1\); "
     r"pass both in one shape, for example predictions\.squeeze\(1\)"),
    (lambda p, y: regression_loss(p, y[:, None]), ValueError, r"for example labels\.squeeze\(1\)"),
    (lambda p, y: regression_loss(p[:, None], MixedTarget(ONES, ONES)), ValueError, r"labels has shape \(7,\) but"),
    (lambda p, y: regression_loss(p, y[:3]), ValueError, r"labels has 3 entries but predictions has 7 rows"),
    (lambda p, y: regression_loss(p.long(), y), TypeError, r"predictions has dtype torch\.int64; pass floating-point"),
    (lambda p, y: regression_loss(p, y > 0), TypeError, r"labels has dtype torch\.bool; pass integers or floats"),
    (lambda p, y: regression_loss(p, y.tolist()), TypeError, r"labels is a list; pass a torch\.Tensor"),
    (lambda p, y: regression_loss(p[:0], y[:0]), ValueError, r"predictions has shape \(0,\) and is empty"),
    (lambda p, y: regression_loss(p[None, None], y), ValueError, r"predictions has shape \(1, 1, 7\); pass a batch"),
    (lambda p, y: regression_loss(p, y.to("meta")), ValueError, r"labels is on meta but predictions is on cpu"),
    (lambda p, y: regression_loss(p, MixedTarget(ONES.long(), ONES)), TypeError, r"labels\.labels has dtype torch\.int"
     r"64; pass floats, since class ids have no mean"),
    (lambda p, y: regression_loss(p, MixedTarget(ONES, ONES[:, :1])), ValueError, r"labels\.weights \(7, 1\); pass"),
    (lambda p, y: regression_loss(p, y, weight=ONES), ValueError, r"weight has shape \(7, 2\) .* one float per sample"),
    (lambda p, y: regression_loss(p, y, weight=y[:2]), ValueError, r"weight has 2 entries but predictions has 7 rows"),
    (lambda p, y: regression_loss(p, y, kind="hubber"), ValueError, r'kind is \'hubber\'; .*did you mean "huber"'),
    (lambda p, y: regression_loss(p, y, delta=0.0), ValueError, r"delta is 0\.0; pass a finite number greater than 0"),
    (lambda p, y: regression_loss(p, y, reduction="avg"), ValueError, r"regression_loss: reduction is 'avg'; pass one"),
    (lambda p, y: RegressionLoss(delta=float("nan")), ValueError, r"RegressionLoss: delta is nan; pass a finite"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(*pair())
