"""What is promised of a GPU: the CPU's plans and numbers, no waiting, the same run twice. Skipped without one."""

from __future__ import annotations

import os
import signal
import warnings

import pytest
import torch

from hardmix.data.views import MOVES, PAINTS, Augment
from hardmix.losses import (
    SoftCrossEntropyLoss,
    decoupled_mixup_bce_loss,
    decoupled_mixup_loss,
    soft_bce_loss,
    soft_cross_entropy_loss,
)
from hardmix.mixing import MixedTarget
from mixing.cases import MODELLED, POLICIES, modelled, rng

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(8, 3, 32, 32), (7, 3, 17, 23)]
OBJECTIVES = {
    "dm": decoupled_mixup_loss,
    "dm-asymmetric": lambda z, t: decoupled_mixup_loss(z, t, asymmetric=True),
    "dm-smoothing": lambda z, t: decoupled_mixup_loss(z, t, label_smoothing=0.1),
    "dm-bce": lambda z, t: decoupled_mixup_bce_loss(z, t, xi=0.8),
    "soft-cross-entropy": soft_cross_entropy_loss,
    "soft-bce": soft_bce_loss,
}


def pair(n: int, classes: int, device: str = "cpu") -> MixedTarget:
    lam = torch.rand(n, generator=rng(1))
    labels = torch.randint(classes, (n, 2), generator=rng(2))
    return MixedTarget(labels.to(device), torch.stack([lam, 1 - lam], 1).to(device))


@pytest.fixture
def no_waiting():
    """Any operation in here that makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the first call in a process: that the mode misses some waits
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
@pytest.mark.parametrize("name", POLICIES)
def test_same_generator_same_plan_on_both_devices(name: str, per: str) -> None:
    policy = POLICIES[name](per)
    for shape in SHAPES:
        x = torch.rand(shape, generator=rng())
        here, there = policy.plan(x, generator=rng(3)), policy.plan(x.cuda(), generator=rng(3))
        assert there.lam.is_cuda
        assert torch.equal(here.partner, there.partner.cpu())
        if name == "saliencymix":
            # Where two pixels are equally salient but for rounding, the devices may pick another one.
            assert (here.lam - there.lam.cpu()).abs().median() == 0
            continue
        assert torch.equal(here.lam, there.lam.cpu())
        assert (here.mask is None) == (there.mask is None)
        if here.mask is not None and there.mask is not None:
            assert torch.equal(here.mask, there.mask.cpu())
        assert torch.allclose(here.blend(x), there.blend(x.cuda()).cpu(), atol=1e-5)


@pytest.mark.parametrize("name", MODELLED)
def test_same_generator_same_draw_of_a_policy_with_a_model(name: str) -> None:
    """Partners and what is drawn are those of the CPU. Where a place hangs on what the model puts out, numbers that
    differ in their last digits may choose another one, so of the images most rows are compared."""
    case = MODELLED[name]
    for shape in SHAPES:
        x, y = torch.rand(shape, generator=rng()), torch.arange(shape[0])
        (here, mine), (there, theirs) = modelled(name), modelled(name, device="cuda")
        theirs.load_state_dict(mine.state_dict())
        if case.learns:
            there.load_state_dict(here.state_dict())
        mixed, target = here(x, y, generator=rng(3))
        other, moved = there(x.cuda(), y.cuda(), generator=rng(3))
        assert other.is_cuda
        assert moved.weights.is_cuda
        assert moved.labels.is_cuda
        if case.pairs and case.draws:
            assert torch.equal(target.labels, moved.labels.cpu())
        if case.pairs:
            rows = (mixed - other.cpu()).flatten(1).abs().amax(1)
            assert rows.median() < 1e-2


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELLED)
def test_a_step_of_a_policy_with_a_model(name: str, half: bool) -> None:
    policy, model = modelled(name, device="cuda")
    x, y = torch.rand(7, 3, 17, 23, device="cuda"), torch.arange(7, device="cuda")
    before, criterion = x.clone(), SoftCrossEntropyLoss()
    for seed in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            mixed, target = policy(x, y, generator=rng(seed))
            logits = model(mixed)
            target = policy.relabel(logits, target)
            loss, own = criterion(logits, target), policy.loss(criterion)
        (loss if own is None else loss + own).backward()
        policy.after_step()
        assert mixed.dtype == x.dtype
        assert loss.isfinite()
        assert own is None or bool(own.isfinite())
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["mixup", "cutmix", "fmix", "resizemix"])
def test_dtype_and_memory_format_are_kept(name: str, dtype: torch.dtype) -> None:
    x = (torch.rand(6, 3, 16, 16, generator=rng()) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    plan = POLICIES[name]("sample").plan(x, generator=rng(1))
    there = plan.to("cuda").blend(x.cuda())
    assert there.dtype == dtype
    assert there.is_contiguous(memory_format=torch.channels_last)
    step = {torch.uint8: 1, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-6}[dtype]
    assert (there.cpu().double() - plan.blend(x).double()).abs().max() <= step


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_cpu_in_float64(name: str) -> None:
    logits = torch.randn(64, 100, dtype=torch.float64, generator=rng()) * 10
    values = []
    for z, target in ((logits, pair(64, 100)), (logits.to("cuda", torch.float32), pair(64, 100, "cuda"))):
        z = z.detach().requires_grad_()
        loss = OBJECTIVES[name](z, target)
        loss.backward()
        values.append((loss.detach().cpu().double(), z.grad.cpu().double()))
    (wanted, slope), (got, grad) = values
    assert abs(got - wanted) <= 2e-6 * abs(wanted)
    assert (grad - slope).abs().max() <= 2e-6 * slope.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits_at_the_extremes_are_finite(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    z = torch.tensor([[top, -top, 0.0, 0.0], [0.0] * 4, [top] * 4, [-top, -top, top, 0.0]], dtype=dtype, device="cuda")
    z.requires_grad_()
    loss = decoupled_mixup_loss(z, pair(4, 4, "cuda"))
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted({*POLICIES} - {"saliencymix", "augmix", "choice-sample"}))
def test_a_step_never_waits_for_the_gpu(name: str, no_waiting: None) -> None:
    model = torch.nn.Linear(3 * 32 * 32, 10, device="cuda")
    x, y = torch.rand(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda")
    mixed, target = POLICIES[name]("sample")(x, y, generator=rng(1))
    with torch.autocast("cuda", torch.bfloat16):
        loss = decoupled_mixup_loss(model(mixed.flatten(1)), target)
    loss.backward()


@pytest.mark.parametrize("name", [*MOVES, *PAINTS])
def test_a_view_never_waits_for_the_gpu(name: str, no_waiting: None) -> None:
    Augment([name])(torch.rand(8, 3, 32, 32, device="cuda"), generator=rng(1))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("objective", ["decoupled-mixup", "soft-cross-entropy"])
def test_a_compiled_run_is_an_eager_one(objective: str, tmp_path) -> None:
    """Its passes are replayed CUDA graphs."""
    from torch._dynamo.utils import counters

    from hardmix.train.loop import run_recipe
    from hardmix.train.state import load_checkpoint
    from train.conftest import tiny

    saved = []
    counters.clear()
    for compiled in (False, True):
        train = {"device": "auto", "compile": compiled}
        run_recipe(tiny(train=train, objective={"name": objective}), tmp_path / str(compiled))
        saved.append(load_checkpoint(tmp_path / str(compiled) / "checkpoints", "last").tensors["model"])
    assert counters["stats"]["unique_graphs"] == 2
    assert counters["inductor"]["cudagraph_skips"] == 0
    # Rounded otherwise, single weights drift apart by more than a thousandth; a stale input would move all of them.
    for name, want in saved[0].items():
        apart = (saved[1][name].double() - want.double()).norm()
        assert apart <= 1e-2 * want.double().norm() + 1e-3
    assert set(saved[0]) == set(saved[1])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_repeats_and_resumes_bit_exactly(precision, compiled, tmp_path, monkeypatch) -> None:
    from hardmix.train.errors import Interrupted
    from hardmix.train.loop import run_recipe
    from train.conftest import fingerprint, tiny

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        recipe = tiny(train={"device": "auto", "precision": precision, "compile": compiled})
        run_recipe(recipe, tmp_path / "first")
        run_recipe(recipe, tmp_path / "second")
        ticks = iter(range(10**9))
        with monkeypatch.context() as patch:
            patch.setattr("hardmix.train.loop.time.perf_counter", lambda: float(next(ticks)))
            with pytest.raises(Interrupted):
                run_recipe(
                    recipe,
                    tmp_path / "third",
                    progress=lambda event: event["step"] >= 3 and os.kill(os.getpid(), signal.SIGTERM),
                )
        run_recipe(recipe, tmp_path / "third", resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert fingerprint(tmp_path / "first") == fingerprint(tmp_path / "second") == fingerprint(tmp_path / "third")
