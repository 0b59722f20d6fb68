"""Balanced MSE against loops, its learnt noise, extremes, edges and messages."""

from __future__ import annotations

import math

import pytest
import torch

from hardmix.losses import BalancedMSELoss, LabelMixture, bmc_loss, gai_loss
from hardmix.mixing import MixedTarget

MIXTURE = LabelMixture(*(torch.tensor(v).double() for v in ([0.2, 0.5, 0.3], [-1.0, 0.5, 4.0], [0.3, 1.0, 0.0])))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(n: int = 6, seed: int = 0, p: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    yhat, y = torch.randn(2, n, *[p] * (p > 0), generator=rng(seed), dtype=torch.float64) * 2
    return yhat, y.round()


def slow_bmc(yhat: list[list[float]], y: list[list[float]], s: float) -> list[float]:
    losses = []
    for i in range(len(y)):
        near = [math.exp(-sum((a - b) ** 2 for a, b in zip(yhat[i], label, strict=True)) / (2 * s * s)) for label in y]
        losses.append(-2 * s * s * math.log(near[i] / sum(near)))
    return losses


def slow_gai(yhat: float, y: float, s: float, mixture: LabelMixture) -> float:
    total = 0.0
    for p, mu, v in zip(*(part.tolist() for part in mixture), strict=True):
        total += p * math.exp(-((yhat - mu) ** 2) / (2 * (v + s * s))) / math.sqrt(v + s * s)
    return 2 * s * s * ((yhat - y) ** 2 / (2 * s * s) + math.log(s) + math.log(total))


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_slow_loop(seed: int) -> None:
    n, s = 1 + seed % 7, (0.7, 1.0, 3.0)[seed % 3]
    yhat, y = pair(n, seed)
    want = slow_bmc(yhat[:, None].tolist(), y[:, None].tolist(), s)
    assert bmc_loss(yhat, y, noise_sigma=s, reduction="none").tolist() == pytest.approx(want, rel=1e-11, abs=1e-14)
    assert bmc_loss(yhat[:, None], y[:, None], noise_sigma=s).item() == pytest.approx(sum(want) / n, abs=1e-12)
    want = [slow_gai(*row, s, MIXTURE) for row in zip(yhat.tolist(), y.tolist(), strict=True)]
    options = {"noise_sigma": torch.tensor([s], dtype=torch.float64), "mixture": MIXTURE}
    assert gai_loss(yhat, y, reduction="none", **options).tolist() == pytest.approx(want, rel=1e-11, abs=1e-13)
    assert gai_loss(yhat[:, None], y[:, None], reduction="sum", **options).item() == pytest.approx(sum(want), abs=1e-11)
    yhat, y = pair(n, seed, 2)
    want = slow_bmc(yhat.tolist(), y.tolist(), s)
    assert bmc_loss(yhat, y, noise_sigma=s, reduction="none").tolist() == pytest.approx(want, rel=1e-11, abs=1e-14)
    mixed = MixedTarget(torch.stack([y[:, 0], y[:, 1]], 1), torch.tensor([[0.3, 0.7]]).double().expand(n, 2))
    assert bmc_loss(yhat[:, 0], mixed, noise_sigma=s) == bmc_loss(yhat[:, 0], mixed.mean(), noise_sigma=s)


@pytest.mark.parametrize("kind", ["bmc", "gai"])
def test_gradcheck_with_the_noise(kind: str) -> None:
    def loss(yhat: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        args = {"noise_sigma": s, "reduction": "none"} | ({"mixture": MIXTURE} if kind == "gai" else {})
        return (bmc_loss if kind == "bmc" else gai_loss)(yhat, y, **args)

    yhat, y = (v.requires_grad_() for v in pair())
    s = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, s.detach()), (yhat, y))
    # The factor is a constant: divided by what it is, what remains has the true gradient.
    assert torch.autograd.gradcheck(lambda *args: loss(*args) / (2 * args[2].detach() ** 2), (yhat, y, s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e3])
def test_extremes_and_low_precision(dtype: torch.dtype, sigma: float) -> None:
    top = min(torch.finfo(dtype).max, 1e12)
    wild = torch.tensor([0.0, top, -top, 1e-7, 3.0, 3.0]), torch.tensor([0.0, -top, -top, 0.0, 2.5, top])
    calm = tuple(v.float() for v in pair(40))
    for values, close in ((wild, False), (calm, True)):
        yhat, y = (v.to(dtype) for v in values)
        for function, options in ((bmc_loss, {}), (gai_loss, {"mixture": MIXTURE})):
            yhat, s = yhat.detach().requires_grad_(), torch.tensor(sigma, requires_grad=True)
            loss = function(yhat, y, noise_sigma=s, **options)
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (yhat, s)))
            want = function(yhat.double(), y.double(), noise_sigma=s.double(), **options).item()
            assert not close or loss.item() == pytest.approx(want, rel=1e-5, abs=1e-6 * sigma**2)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(function(yhat, y, noise_sigma=s, **options), loss)


def test_edges() -> None:
    for module in (BalancedMSELoss(), BalancedMSELoss(kind="gai", mixture=MIXTURE)):
        assert module.to("meta")(*(v.to("meta") for v in pair())).is_meta  # no value is read
    for yhat, y, want in ((torch.tensor([3.0]), torch.tensor([1]), 0.0), (torch.rand(4), torch.ones(4), math.log(4))):
        yhat.requires_grad_()
        loss = bmc_loss(yhat, y, noise_sigma=2.0)
        assert loss.item() == pytest.approx(8 * want)
        assert torch.equal(torch.autograd.grad(loss, yhat)[0], torch.zeros_like(yhat))
    assert bmc_loss(torch.tensor([0.0, math.nan]), torch.tensor([1, 2]), noise_sigma=1.0).isnan()
    far = torch.tensor([1e4, 1e4 + 1]), torch.tensor([0.0, 1.0])  # squares of 1e8 have no digit left for the gap of 1
    want = bmc_loss(far[0].double(), far[1], noise_sigma=99.0).item()
    assert bmc_loss(*far, noise_sigma=99.0).item() == pytest.approx(want, rel=1e-6)


def test_module_learns_and_saves_its_noise() -> None:
    yhat, y = pair()
    for kind, function, options in (("bmc", bmc_loss, {}), ("gai", gai_loss, {"mixture": MIXTURE})):
        module = BalancedMSELoss(kind=kind, noise_sigma=3.0, **options)
        before = function(yhat, y, noise_sigma=3.0, **options).item()
        assert module(yhat, y).item() == pytest.approx(before, rel=1e-5)
        module(yhat, y).backward()
        torch.optim.SGD(module.parameters(), 0.05).step()
        assert module.noise_sigma.item() != pytest.approx(3.0)
        other = BalancedMSELoss(kind=kind, **({"mixture": LabelMixture(*MIXTURE)} if options else {}))
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(yhat, y), module(yhat, y))
        fixed = BalancedMSELoss(kind=kind, noise_sigma=3.0, learn_sigma=False, reduction="sum", **options)
        assert torch.equal(fixed(yhat, y), function(yhat, y, noise_sigma=3.0, reduction="sum", **options))
        assert not list(fixed.parameters())
        assert repr(fixed) == f"BalancedMSELoss(kind={kind!r}, noise_sigma=3, learn_sigma=False)"


M = MIXTURE
BAD = [
    (lambda p, y: bmc_loss(p[:, None], y, noise_sigma=1.0), ValueError, r"bmc_loss: labels has shape \(6,\) but pred"),
    (lambda p, y: bmc_loss(p, y, noise_sigma=0.0), ValueError, r"noise_sigma is 0\.0; pass a finite number greater"),
    (lambda p, y: bmc_loss(p, y, noise_sigma=y), ValueError, r"noise_sigma has shape \(6,\) .*; pass one float"),
    (lambda p, y: bmc_loss(p, y, noise_sigma=1.0, reduction="avg"), ValueError, r"reduction is 'avg'; pass one of"),
    (lambda p, y: gai_loss(*pair(3, 0, 2), noise_sigma=1.0, mixture=M), ValueError, r"\(3, 2\); pass one number per"),
    (lambda p, y: gai_loss(p, y, noise_sigma=1.0, mixture=y), TypeError, r"mixture is a Tensor; pass a tuple of w"),
    (lambda p, y: gai_loss(p, y, noise_sigma=1.0, mixture=(y, y, y[:2])), ValueError, r"mixture variances has shape"),
    (lambda p, y: BalancedMSELoss(kind="bni"), ValueError, r"kind is 'bni'; pass one of 'bmc', 'gai'"),
    (lambda p, y: BalancedMSELoss(kind="gai"), ValueError, r"mixture is None but kind is 'gai'; pass what label_mix"),
    (lambda p, y: BalancedMSELoss(mixture=M), ValueError, r"mixture is given but kind is 'bmc'; pass it only with"),
    (lambda p, y: BalancedMSELoss(noise_sigma=math.nan), ValueError, r"BalancedMSELoss: noise_sigma is nan; pass"),
    (lambda p, y: BalancedMSELoss(learn_sigma=1), TypeError, r"learn_sigma is 1; pass True or False"),
    (lambda p, y: BalancedMSELoss(kind="gai", mixture=(y.abs() + 1, y, y)), ValueError, r"pass shares that sum to one"),
    (lambda p, y: BalancedMSELoss(kind="gai", mixture=(M[0], M[1], -M[2] - 1)), ValueError, r"or is below 0; fit it"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(*pair())
