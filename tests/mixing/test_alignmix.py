"""AlignMix: against loops written from the equations, and what it must leave alone."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hardmix.mixing import RandomChoice
from hardmix.mixing.alignmix import AlignedPlan, AlignMix
from kernels.test_sinkhorn import by_hand
from mixing.cases import constant_rows, rng

Y = torch.arange(5)


class Net(nn.Module):
    """Maps, their mean, logits; `seen` is the map as the head gets it."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Dropout(0.5), nn.Tanh())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 10)
        self.recompute = recompute
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        def maps(x: Tensor) -> Tensor:
            return self.stage(self.stem(x))

        h = checkpoint(maps, x, use_reentrant=False) if self.recompute else maps(x)
        self.seen.append(h)
        return self.head(self.pool(h).flatten(1))


def net(**kwargs: bool) -> Net:
    torch.manual_seed(0)
    model = Net(**kwargs)
    model.stage[1].p = 0.0
    return model


def images(n: int = 5, size: tuple[int, int] = (6, 10)) -> Tensor:
    return torch.rand(n, 3, *size, generator=rng())


def aligned_by_hand(maps: np.ndarray, plan: AlignedPlan, entropy: float) -> np.ndarray:
    """float64, one row and one place at a time."""
    n, _, h, w = maps.shape
    flat = maps.reshape(n, -1, h * w)
    out = np.empty_like(flat)
    for i in range(n):
        lam, a, b = float(plan.lam[i]), flat[i], flat[int(plan.partner[i])]
        cost = np.array([[((a[:, j] - b[:, k]) ** 2).sum() for k in range(h * w)] for j in range(h * w)])
        q = by_hand(cost, entropy) * h * w
        for place in range(h * w):
            if plan.keep[i]:
                out[i, :, place] = lam * a[:, place] + (1 - lam) * (b @ q[place])
            else:
                out[i, :, place] = lam * (a @ q[:, place]) + (1 - lam) * b[:, place]
    return out.reshape(maps.shape)


def drawn(mix: AlignMix) -> AlignedPlan:
    assert isinstance(mix._last, AlignedPlan)
    return mix._last


@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
@pytest.mark.parametrize("size", [(6, 10), (5, 7)], ids=str)
def test_against_the_equations(per: str, size: tuple[int, int]) -> None:
    model = net().double()
    mix = AlignMix(model, "stage", entropy=0.3, iterations=500, include_input=False, per=per)
    x, directions = images(size=size).double(), set()
    for seed in range(4):
        with torch.no_grad():
            model(x)
        clean = model.seen[-1]
        _, target = mix(x, Y, generator=rng(seed))
        model(x)
        plan = drawn(mix)
        assert torch.equal(target.labels, torch.stack([Y, plan.partner], 1))
        assert torch.equal(target.weights, torch.stack([plan.lam, 1 - plan.lam], 1))
        assert plan.error is not None
        want = aligned_by_hand(clean.numpy(), plan, 0.3)
        assert np.abs(model.seen[-1].detach().numpy() - want).max() < 1e-8 + 2 * float(plan.error.max())
        assert mix.marginal_error is plan.error
        assert plan.error.max() < 1e-4
        directions.update(plan.keep.tolist())
        if per == "batch":
            assert len(plan.keep.unique()) == len(plan.lam.unique()) == 1
        if per == "pair":
            assert torch.equal(plan.keep, plan.keep[plan.partner])
    assert directions == {True, False}


def test_directions_are_even() -> None:
    mix = AlignMix(net(), "stage")
    keep = torch.cat([mix.plan(images(), generator=rng(seed)).keep for seed in range(400)])  # type: ignore[attr-defined]
    assert abs(float(keep.float().mean()) - 0.5) < 0.05


def test_constant_maps_are_blended_by_lam() -> None:
    """What holds for every policy: the own share in the mixture is the share in the label."""
    values = 2.0 ** -torch.arange(5, dtype=torch.float64)
    maps = constant_rows(values, (4, 3, 5))
    mix = AlignMix(net(), "stage")
    for seed in range(3):
        plan = mix.plan(images(), generator=rng(seed))
        assert isinstance(plan, AlignedPlan)
        lam = plan.lam.double()
        want = constant_rows(lam * values + (1 - lam) * values[plan.partner], (4, 3, 5))
        assert torch.allclose(plan.align(maps), want, atol=1e-12)
        assert torch.allclose(plan.align(maps.float()).double(), want, atol=1e-6)


def test_equal_features_find_each_other() -> None:
    """A shuffled map is put back into order, so that the mixture is the map whose places are kept."""
    base = 30.0 * torch.randn(8, 12, generator=rng(1))
    maps = torch.stack([base[:, torch.randperm(12, generator=rng(i))].view(8, 3, 4) for i in range(5)])
    plan = AlignMix(net(), "stage").plan(images(), generator=rng(2))
    assert isinstance(plan, AlignedPlan)
    got = plan.align(maps)
    for i in range(5):
        kept = maps[i] if plan.keep[i] else maps[plan.partner[i]]
        assert torch.allclose(got[i], kept, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_memory_format_and_scale(dtype: torch.dtype) -> None:
    plan = AlignMix(net(), "stage").plan(images(), generator=rng())
    assert isinstance(plan, AlignedPlan)
    for scale in (1e-3, 1.0, 30.0):
        maps = (scale * torch.randn(5, 7, 4, 3, generator=rng(1))).to(dtype)
        before = maps.clone()
        got = plan.align(maps)
        want = plan.align(maps.float())
        assert torch.equal(maps, before)
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))
        last = plan.align(maps.contiguous(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(last.float(), got.float(), atol=1e-2 * scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plan.align(maps), got)


def test_weights_sum_to_one_however_few_the_iterations() -> None:
    """A channel of ones stays one, so that features are averaged and not scaled."""
    maps = 10.0 * torch.randn(5, 6, 4, 4, generator=rng())
    maps[:, 0] = 1.0
    for iterations in (1, 2, 100):
        plan = AlignMix(net(), "stage", iterations=iterations).plan(images(), generator=rng(3))
        assert isinstance(plan, AlignedPlan)
        got = plan.align(maps)
        assert torch.allclose(got[:, 0], torch.ones(5, 4, 4), atol=1e-5)
        assert plan.error is not None
        assert bool(plan.error.isfinite().all())


def test_gradients_flow_through_both_maps_and_not_through_the_plan() -> None:
    plan = AlignMix(net(), "stage").plan(images(3, (6, 6)), generator=rng(1))
    assert isinstance(plan, AlignedPlan)
    maps = torch.randn(3, 2, 2, 2, generator=rng(), dtype=torch.float64, requires_grad=True)
    out = plan.align(maps)
    weight = torch.randn(out.shape, generator=rng(2), dtype=torch.float64)
    (out * weight).sum().backward()
    # The mixture is linear in the maps once Q is fixed: its gradient is what Q's own transpose gives.
    want = torch.zeros_like(maps).flatten(2)
    flat, weights = maps.detach().flatten(2), weight.flatten(2)
    for i in range(3):
        j, lam = int(plan.partner[i]), float(plan.lam[i])
        first, second, share = (i, j, lam) if plan.keep[i] else (j, i, 1 - lam)
        cost = ((flat[first][:, :, None] - flat[second][:, None, :]) ** 2).sum(0)
        q = torch.from_numpy(by_hand(cost.numpy(), 0.1, 20_000)) * 4
        want[first] += share * weights[i]
        want[second] += (1 - share) * weights[i] @ q
    assert maps.grad is not None
    assert torch.allclose(maps.grad.flatten(2), want, atol=1e-3)


def test_input_or_layer_at_even_odds() -> None:
    model, x, at_input = net(), images(), 0
    mix = AlignMix(model, ["stage"])
    generator = rng()
    for _ in range(200):
        mixed, target = mix(x, Y, generator=generator)
        if mixed is x:
            assert mix.marginal_error is None  # not aligned yet
            model(x)
            assert mix.marginal_error is not None
            continue
        at_input += 1
        lam = target.weights[:, :1, None, None]
        assert torch.allclose(mixed, lam * x + (1 - lam) * x[target.labels[:, 1]], atol=1e-6)
        assert mix.marginal_error is None
    assert 70 < at_input < 130


def test_the_last_map_is_found() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    mix = AlignMix(model, include_input=False)
    assert len(model.stage._forward_hooks) == 0
    x = images()
    mix(x, Y, generator=rng())
    assert mix._state.names == ("stage",)  # not the pool, whose map is one pixel
    assert mix.layers == ("",)
    assert len(model.stage._forward_hooks) == 1
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    clean = net()
    clean(x)
    model(x)
    assert not torch.allclose(model.seen[-1], clean.seen[-1])
    # one pixel is better than nothing, and a module that runs twice is passed over
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    mix = AlignMix(one)
    mix(images(5, (3, 3)), Y)
    assert mix._state.names == ("1",)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(self.act(x))).mean((2, 3))

    shared = Shared()
    mix = AlignMix(shared)
    mix(images(), Y)
    assert mix._state.names == ("conv",)


def test_a_half_precision_model_and_uint8_images() -> None:
    model = net().to(torch.bfloat16)
    mix = AlignMix(model, include_input=False)
    x, _ = mix(images(), Y, generator=rng())  # float32 images find the layer of a bfloat16 model
    assert model(x.to(torch.bfloat16)).dtype == torch.bfloat16
    whole = (images() * 255).to(torch.uint8)
    mixed, _ = AlignMix(net(), [], include_input=True)(whole, Y, generator=rng())
    assert mixed.dtype == torch.uint8


def test_evaluation_and_copies() -> None:
    model, x = net(), images()
    mix = AlignMix(model, include_input=False)
    mix(x, Y, generator=rng(1))
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(x), net().eval()(x))
    assert torch.equal(model.eval()(x), net().eval()(x))
    model.train()
    model(x)
    for copied in (copy.deepcopy(mix), pickle.loads(pickle.dumps(mix))):
        with pytest.raises(RuntimeError, match=r"AlignMix: this policy is a copy without hooks; call attach\(model\)"):
            copied(x, Y)
        other = net()
        copied.attach(other)
        copied(x, Y, generator=rng(1))
        assert copied._state.names == ("stage",)
        other(x)
        assert other.seen[-1].shape == model.seen[-1].shape
    assert mix.state_dict() == {}
    assert list(mix.parameters()) == []
    assert "layers=['']" in repr(mix)
    assert "entropy=0.1, iterations=100" in repr(mix)
    lost = AlignMix(net())
    with pytest.raises(RuntimeError, match=r"AlignMix: the model is gone; call attach\(model\)"):
        lost(x, Y)


def test_same_seed_same_mixture_and_one_and_odd_rows() -> None:
    for n in (1, 2, 3):
        outs = []
        for seed in (4, 4, 5):
            model = net()
            mix = AlignMix(model, include_input=False)
            x = images(n, (7, 9))
            before = x.clone()
            back, target = mix(x, torch.arange(n), generator=rng(seed))
            assert back is x
            assert torch.equal(x, before)
            model(x)
            outs.append(model.seen[-1])
            assert bool(outs[-1].isfinite().all())
            assert torch.allclose(target.weights.sum(1), torch.ones(n))
        assert torch.equal(outs[0], outs[1])
        assert n == 1 or not torch.equal(outs[0], outs[2])


def test_activation_checkpointing_mixes_again() -> None:
    plain, recomputed = net(), net(recompute=True)
    for model in (plain, recomputed):
        mix = AlignMix(model, "stage", include_input=False)
        mix(images(), Y, generator=rng(3))
        model(images()).square().sum().backward()
    for got, want in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-6)


def test_in_a_choice() -> None:
    model, x = net(), images()
    choice = RandomChoice([AlignMix(model, "stage"), None])
    for seed in range(6):
        mixed, _ = choice(x, Y, generator=rng(seed))
        model(mixed)
    with pytest.raises(ValueError, match='use per="batch"'):
        RandomChoice([AlignMix(model, "stage")], per="sample")


def test_refusals() -> None:
    model, x = net(), images()
    for bad, error, text in [
        ({"layers": "stages"}, ValueError, r"AlignMix: layers names 'stages', .*\(did you mean \"stage\"\?\)"),
        ({"layers": 3}, TypeError, "AlignMix: layers is 3; pass a list of submodule names"),
        ({"layers": ["stage", ""]}, ValueError, "AlignMix: layers names '', which the model does not have"),
        ({"layers": [], "include_input": False}, ValueError, "AlignMix: layers is empty and include_input is False"),
        ({"entropy": 0.0}, ValueError, "AlignMix: entropy is 0.0; pass a finite number greater than 0"),
        ({"iterations": 0}, ValueError, "AlignMix: iterations is 0; pass an integer of at least 1"),
        ({"alpha": -1.0}, ValueError, "AlignMix: alpha is -1.0"),
    ]:
        with pytest.raises(error, match=text):
            AlignMix(model, **bad)
    for wrong in ("resnet", None):
        with pytest.raises(TypeError, match=r"AlignMix: model is a .*; pass a torch\.nn\.Module\."):
            AlignMix(wrong)
    mix = AlignMix(model, "head", include_input=False)
    mix(x, Y)
    with pytest.raises(ValueError, match=r"a layer returned a tensor of shape \(5, 10\) and dtype torch.float32; name"):
        model(x)
    mix.detach()
    mix = AlignMix(model, "stage", include_input=False)
    mix(x, Y)
    with pytest.raises(RuntimeError, match="AlignMix: the draw for layer 'stage' was not used"):
        mix(x, Y)
    with pytest.raises(ValueError, match=r"AlignMix: x has shape \(5, 3\); pass a batch with 4 axes"):
        AlignMix(model)(torch.rand(5, 3), Y)
    with pytest.raises(ValueError, match=r"can't be run on a sample of shape \(1, 7, 6, 6\) .* name the layers"):
        AlignMix(model)(torch.rand(5, 7, 6, 6), Y)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"no part of the model returns maps \(N, C, H, W\)"):
        AlignMix(flat)(torch.rand(5, 3, 2, 2), Y)
    with pytest.raises(TypeError, match=r"AlignMix: x has dtype torch\.uint8"):
        AlignMix(model)((x * 255).to(torch.uint8), Y)


def test_nan_in_a_map_reaches_its_own_pairs_only() -> None:
    maps = torch.randn(5, 4, 3, 3, generator=rng())
    maps[2, 1, 0, 0] = float("nan")
    plan = AlignMix(net(), "stage").plan(images(), generator=rng(1))
    assert isinstance(plan, AlignedPlan)
    got = plan.align(maps).isnan().flatten(1)
    for i in range(5):
        assert bool(got[i].all()) == (2 in (i, int(plan.partner[i])))
        assert bool(got[i].any()) == (2 in (i, int(plan.partner[i])))


def test_plans_on_other_devices() -> None:
    plan = AlignMix(net(), "stage").plan(images(), generator=rng()).to("meta")
    assert isinstance(plan, AlignedPlan)
    assert plan.keep.device.type == plan.lam.device.type == plan.partner.device.type == "meta"
