"""Focal-R against a loop with the sigmoid as it is written, its slope at no error, extremes, edges and messages."""

from __future__ import annotations

import math

import pytest
import torch

from hardmix.losses import FocalRLoss, focal_r_loss, regression_loss
from hardmix.mixing import MixedTarget


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(n: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    yhat, y = torch.randn(2, n, generator=rng(seed), dtype=torch.float64) * 3
    return yhat, y


def slow_row(yhat: float, y: float, beta: float, gamma: float, kind: str) -> float:
    e = abs(yhat - y)
    focus = (2 / (1 + math.exp(-beta * e)) - 1) ** gamma
    return (e if kind == "l1" else e * e) * focus


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_slow_loop(kind: str, gamma: float, seed: int) -> None:
    (yhat, y), n, beta = pair(1 + seed, seed), 1 + seed, (0.2, 1.7)[seed % 2]
    want = [slow_row(*row, beta, gamma, kind) for row in zip(yhat.tolist(), y.tolist(), strict=True)]
    options = {"beta": beta, "gamma": gamma, "kind": kind}
    assert focal_r_loss(yhat, y, reduction="none", **options).tolist() == pytest.approx(want, rel=1e-12)
    assert focal_r_loss(yhat, y, **options).item() == pytest.approx(sum(want) / n, rel=1e-12)
    weight = torch.rand(n, generator=rng(seed))
    want_sum = sum(float(w) * v for w, v in zip(weight, want, strict=True))
    assert focal_r_loss(yhat, y, weight=weight, reduction="sum", **options).item() == pytest.approx(want_sum, rel=1e-6)
    square = focal_r_loss(yhat.expand(3, n).T, y.expand(3, n).T, reduction="none", **options)
    assert square.T.tolist() == [pytest.approx(want)] * 3


def test_mixed_labels_and_no_focus() -> None:
    yhat, y = pair()
    lam = torch.rand(7, 1, generator=rng(), dtype=torch.float64)
    target = MixedTarget(torch.stack([y, y.flip(0)], 1), torch.cat([lam, 1 - lam], 1))
    torch.testing.assert_close(focal_r_loss(yhat, target), focal_r_loss(yhat, target.mean()))
    for kind in ("l1", "l2"):
        assert focal_r_loss(yhat, y, gamma=0.0, kind=kind) == regression_loss(yhat, y, kind=kind)


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.5])
def test_gradcheck(kind: str, gamma: float) -> None:
    yhat, y = (v.requires_grad_() for v in pair())
    assert torch.autograd.gradcheck(lambda a, b: focal_r_loss(a, b, gamma=gamma, kind=kind), (yhat, y))


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes_and_low_precision(gamma: float, dtype: torch.dtype) -> None:
    top = min(torch.finfo(dtype).max, 1e15)
    yhat = torch.tensor([0.0, top, -top, 1e-7, 1e-45, 2.5, 1e-30], dtype=dtype, requires_grad=True)
    y = torch.tensor([0.0, -top, -top, 0.0, 0.0, 3.0, 0.0], dtype=dtype)
    for kind in ("l1", "l2"):
        loss = focal_r_loss(yhat, y, gamma=gamma, kind=kind)
        (grad,) = torch.autograd.grad(loss, yhat)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert grad[0] == grad[2] == 0  # the power's own slope is infinite there
        want = focal_r_loss(yhat.double(), y.double(), gamma=gamma, kind=kind)
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(focal_r_loss(yhat, y, gamma=gamma, kind=kind), loss)


def test_edges() -> None:
    assert focal_r_loss(*(v.to("meta") for v in pair()), gamma=2.0).is_meta  # no value is read
    assert focal_r_loss(torch.tensor([4.0]), torch.tensor([4])).item() == 0.0
    assert focal_r_loss(torch.tensor([4.0, math.nan]), torch.tensor([4, 4])).isnan()
    tiny = focal_r_loss(torch.tensor([1e-12]), torch.tensor([0.0]))
    assert tiny.item() == pytest.approx(1e-25, rel=1e-5)  # 2 sigmoid - 1 would be 0 here
    half = focal_r_loss(torch.tensor([math.log(3) / 0.2]), torch.tensor([0.0])) / (math.log(3) / 0.2)
    assert half.item() == pytest.approx(0.5)


def test_module_remembers_and_equals_the_function() -> None:
    yhat, y = pair()
    options = {"beta": 0.7, "gamma": 1.5, "kind": "l2", "reduction": "none"}
    module, weight = FocalRLoss(**options), torch.rand(7, generator=rng())
    assert torch.equal(module(yhat, y, weight=weight), focal_r_loss(yhat, y, weight=weight, **options))
    module.load_state_dict(FocalRLoss().state_dict())
    assert module.state_dict() == {}
    assert repr(module) == "FocalRLoss(beta=0.7, gamma=1.5, kind='l2', reduction='none')"


BAD = [
    (lambda p, y: focal_r_loss(p[:, None], y), ValueError, r"focal_r_loss: labels has shape \(7,\) but predictions"),
    (lambda p, y: focal_r_loss(p.int(), y), TypeError, r"focal_r_loss: predictions has dtype torch\.int32; pass float"),
    (lambda p, y: focal_r_loss(p, y, weight=y[:2]), ValueError, r"focal_r_loss: weight has 2 entries but predictions"),
    (lambda p, y: focal_r_loss(p, y, beta=0.0), ValueError, r"beta is 0\.0; pass a finite number greater than 0"),
    (lambda p, y: focal_r_loss(p, y, beta="x"), ValueError, r"beta is 'x'; pass a finite number greater than 0"),
    (lambda p, y: focal_r_loss(p, y, gamma=-1.0), ValueError, r"gamma is -1\.0; pass a finite number of at least 0"),
    (lambda p, y: focal_r_loss(p, y, gamma=math.inf), ValueError, r"gamma is inf; pass a finite number of at least 0"),
    (lambda p, y: focal_r_loss(p, y, kind="huber"), ValueError, r"kind is 'huber'; pass one of 'l1', 'l2'"),
    (lambda p, y: focal_r_loss(p, y, reduction="avg"), ValueError, r"reduction is 'avg'; pass one of 'mean', 'sum'"),
    (lambda p, y: FocalRLoss(beta=-0.2), ValueError, r"FocalRLoss: beta is -0\.2; pass a finite number greater than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(*pair())
