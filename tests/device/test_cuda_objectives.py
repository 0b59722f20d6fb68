"""Objectives for numbers and for pairs, and learning from few labels, on a GPU against the CPU. Skipped without one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hardmix import losses, semi
from hardmix.semi import SemiBatch
from losses.test_pair_surface import EVERY, pairs
from semi.cases import draw, net, rng, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

#: of (N, D) rows and (N,) numbers
NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "supremix": lambda z, y: losses.supremix_loss(z, y, window=2.0, generator=rng()),
    "supremix, drawn mixtures": lambda z, y: losses.supremix_loss(z, y, window=2.0, max_mixtures=5, generator=rng()),
    "supcon": losses.supcon_loss,
    "adaptive-supcon": losses.adaptive_supcon_loss,
    "rank-n-contrast": losses.rank_n_contrast_loss,
    "kernel-contrast": losses.kernel_contrast_loss,
    "ordinal-entropy": losses.ordinal_entropy_loss,
    "ranksim": losses.ranksim_loss,
    "conr": lambda z, y: losses.conr_loss(z, y, z[:, 0]),
    "l1": lambda z, y: losses.regression_loss(z[:, 0], y),
    "huber": lambda z, y: losses.regression_loss(z[:, 0], y, kind="huber"),
    "focal-r": lambda z, y: losses.focal_r_loss(z[:, 0], y),
    "balanced-mse": lambda z, y: losses.bmc_loss(z[:, 0], y, noise_sigma=1.0),
}
ALGORITHMS: dict[str, Callable[[torch.nn.Module], semi.SemiAlgorithm]] = {
    "supervised": lambda _: semi.Supervised(),
    "pseudo-label": lambda _: semi.PseudoLabel(),
    "mean-teacher": semi.MeanTeacher,
    "mixmatch": lambda _: semi.MixMatch(),
    "uda": lambda _: semi.UDA(),
    "fixmatch": lambda _: semi.FixMatch(threshold=0.3),
    "flexmatch": lambda _: semi.FlexMatch(num_classes=4, num_unlabelled=20, threshold=0.3),
    "freematch": lambda _: semi.FreeMatch(num_classes=4),
    "softmatch": lambda _: semi.SoftMatch(num_classes=4),
    "self-tuning": lambda model: semi.SelfTuning(model=model, dim=5, queue=4),
    "bss": lambda model: semi.BSS(model=model),
}


def close(here: Tensor, there: Tensor, tolerance: float) -> bool:
    return torch.allclose(here.double(), there.cpu().double(), rtol=tolerance, atol=tolerance)


def check(loss: Callable[..., Tensor], inputs: list[Tensor], *rest: Tensor) -> None:
    """float64 to rounding; float32 to what sums in another order cost."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        here = [x.detach().to(dtype).requires_grad_() for x in inputs]
        there = [x.detach().cuda().requires_grad_() for x in here]
        mine, theirs = loss(*here, *rest), loss(*there, *(x.cuda() for x in rest))
        assert theirs.is_cuda
        assert close(mine, theirs, tolerance)
        mine.backward()
        theirs.backward()
        for a, b in zip(here, there, strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or close(a.grad, b.grad, tolerance)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    z = torch.randn(24, 6, generator=rng(), dtype=torch.float64)
    y = torch.randint(8, (24,), generator=rng(1)).double()
    check(NUMBERS[name], [z], y)


@pytest.mark.parametrize("name", EVERY)
def test_pairs(name: str) -> None:
    loss = EVERY[name]
    if name == "lipsum_loss":
        check(lambda a, b: losses.lipsum_loss(a, b, torch.eye(6, dtype=a.dtype, device=a.device), 5.0), pairs(7))
    else:
        check(loss, pairs(7))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_few_labels(name: str) -> None:
    """Six steps, plans drawn by generators of the CPU. What FreeMatch tracks is float32, whose sums have an order."""
    tolerance = 1e-5 if name == "freematch" else 1e-9
    results = []
    for device in ("cpu", "cuda"):
        model = net().to(device)
        torch.manual_seed(0)  # of a projection that an algorithm brings along
        algorithm = ALGORITHMS[name](model).to(device)
        batches = [draw(seed, views=len(algorithm.views)) for seed in range(6)]
        moved = [
            SemiBatch(b.x.to(device), b.y.to(device), tuple(v.to(device) for v in b.views), b.ids.to(device))
            for b in copy.deepcopy(batches)
        ]
        outputs = run(model, algorithm, moved)
        results.append(([o.loss.detach() for o in outputs], [o.pseudo for o in outputs]))
    (mine, own), (theirs, other) = results
    assert all(close(a, b, tolerance) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(own, other, strict=True))
