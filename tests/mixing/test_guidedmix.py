"""GuidedMix: pixels shared in proportion to saliency, and partners that are salient elsewhere."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hardmix.mixing import RandomChoice, Scheduled, spectral_residual
from hardmix.mixing.gradients import input_saliency
from hardmix.mixing.guidedmix import GuidedMix, greedy_cycle
from mixing.cases import blend_by_hand, constant_rows, own_share, rng


def first_channel(x: Tensor) -> Tensor:
    """The saliency that a test wants is painted into the image."""
    return x[:, 0].float()


def net(channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def blurred(image: np.ndarray, blur: int) -> np.ndarray:
    """Each pixel by itself: the Gaussian within `blur` pixels, what stands over the border left out."""
    out = np.zeros_like(image)
    for r, c in np.ndindex(*image.shape):
        total = weight = 0.0
        for i in range(max(0, r - blur), min(image.shape[0], r + blur + 1)):
            for j in range(max(0, c - blur), min(image.shape[1], c + blur + 1)):
                w = math.exp(-0.5 * ((i - r) ** 2 + (j - c) ** 2) / blur**2) if blur else 1.0
                total, weight = total + w * image[i, j], weight + w
        out[r, c] = total / weight
    return out


def cycle_by_hand(maps: np.ndarray) -> list[int]:
    """From row to row, to the farthest one that is left."""
    n = len(maps)
    distance = [[math.dist(a.ravel(), b.ravel()) for b in maps] for a in maps]
    first = max(((i, j) for i in range(n) for j in range(n) if i != j), key=lambda ij: distance[ij[0]][ij[1]])[0]
    partner, at, left = [0] * n, first, set(range(n)) - {first}
    while left:
        partner[at] = max(sorted(left), key=lambda j: distance[at][j])
        at = partner[at]
        left.remove(at)
    partner[at] = first
    return partner


@pytest.mark.parametrize("blur", [0, 1, 3])
@pytest.mark.parametrize(("n", "size"), [(2, (9, 9)), (5, (8, 13)), (6, (17, 6)), (3, (2, 3))], ids=str)
def test_against_the_definition(n: int, size: tuple[int, int], blur: int) -> None:
    x = torch.rand(n, 2, *size, generator=rng(7), dtype=torch.float64)
    plan = GuidedMix(saliency=lambda b: b[:, 0], blur=blur).plan(x)
    maps = np.stack([blurred(image, blur) for image in x[:, 0].numpy()])
    maps /= maps.sum((1, 2), keepdims=True)
    partner = cycle_by_hand(maps)
    assert plan.partner.tolist() == partner
    want = maps / (maps + maps[partner])
    assert plan.mask is not None
    assert np.abs(plan.mask[:, 0].double().numpy() - want).max() < 1e-6
    assert np.abs(plan.lam.double().numpy() - want.mean((1, 2))).max() < 1e-6
    assert torch.equal(plan.lam, own_share(plan.mask))
    assert np.abs(plan.blend(x).numpy() - blend_by_hand(x, plan)).max() < 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 8, 41])
def test_the_greedy_cycle(n: int) -> None:
    for seed in range(4):
        maps = torch.rand(n, 12, generator=rng(seed), dtype=torch.float64)
        partner = greedy_cycle(maps).tolist()
        assert partner == ([0] if n == 1 else cycle_by_hand(maps.numpy()))
        at, seen = 0, []
        for _ in range(n):
            seen.append(at)
            at = partner[at]
        assert sorted(seen) == list(range(n))  # one cycle through all
        assert at == 0


def test_the_cycle_sees_small_differences_of_large_maps() -> None:
    """Plain products of the maps would cancel: in float32 all distances were noise."""
    maps = torch.rand(9, 40, generator=rng(), dtype=torch.float64)
    assert greedy_cycle((1000.0 + maps / 64).float()).tolist() == cycle_by_hand(maps.numpy())


def test_equal_maps_make_a_cycle_all_the_same() -> None:
    for maps in (torch.zeros(5, 3), torch.ones(5, 3)):
        assert sorted(greedy_cycle(maps).tolist()) == list(range(5))
        assert bool((greedy_cycle(maps) != torch.arange(5)).all())


def test_partners_are_salient_elsewhere() -> None:
    """Two samples look at the left, two at the right: each gets one of the other kind, and both stay visible."""
    x = torch.zeros(4, 1, 16, 16)
    x[0, 0, 3:6, 2:5] = x[1, 0, 4:7, 2:5] = 1.0
    x[2, 0, 9:12, 11:14] = x[3, 0, 10:13, 11:14] = 1.0
    plan = GuidedMix(saliency=first_channel).plan(x)
    assert {frozenset((i, int(p))) for i, p in enumerate(plan.partner)} == {
        frozenset(pair) for pair in ((0, 2), (0, 3), (1, 2), (1, 3))
    }
    mixed = plan.blend(x)
    shown = torch.maximum(x, x[plan.partner])
    assert torch.allclose(mixed, shown, atol=1e-3)  # far from each other, each map has its pixels to itself


def test_where_nothing_is_salient_both_show_alike() -> None:
    x = torch.zeros(2, 1, 20, 20)
    x[0, 0, 2, 2] = x[1, 0, 10, 17] = 1.0
    plan = GuidedMix(saliency=first_channel).plan(x)
    assert plan.mask is not None
    assert plan.mask[0, 0, 10, 10] == 0.5
    assert plan.mask[0, 0, 3, 3] == 1.0
    assert plan.mask[0, 0, 10, 16] == 0.0
    # 7 x 7 taps around each place, less the row or column that lies outside
    assert plan.lam[0] == pytest.approx(0.5 + 0.5 * (6 * 6 - 7 * 6) / 400)


def test_maps_that_say_nothing_are_uniform() -> None:
    maps = torch.rand(6, 5, 5, generator=rng())
    maps[1] = 0.0
    maps[2] = torch.nan
    maps[3, 2, 2] = torch.inf
    maps[4] = 7.0
    maps[5] *= 3e38  # says something, though its sum overflows
    x = torch.rand(6, 3, 5, 5, generator=rng(1))
    plan = GuidedMix(saliency=lambda b: maps, blur=0).plan(x, partner=torch.tensor([1, 2, 3, 4, 1, 0]))
    assert plan.mask is not None
    assert torch.allclose(plan.mask[1:4], torch.tensor(0.5))
    assert torch.allclose(plan.mask[4], torch.tensor(0.5))
    uniform = torch.full((5, 5), 1 / 25)
    own = maps[0] / maps[0].sum()
    assert torch.allclose(plan.mask[0, 0], own / (own + uniform))
    other = maps[5].double() / maps[5].double().sum()
    assert torch.allclose(plan.mask[5, 0].double(), other / (other + own), atol=1e-4)
    constant = torch.full((3, 3, 12, 9), 0.3)
    mixed, target = GuidedMix()(constant, torch.arange(3))
    assert torch.allclose(mixed, constant)
    assert bool(target.weights.isfinite().all())


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 17, 70), (2, 31), (1, 6, 7, 9), (3, 1, 1)], ids=str)
def test_own_share_of_constant_images_is_lam(n: int, shape: tuple[int, ...]) -> None:
    values = 2.0 ** -torch.arange(n, dtype=torch.float64)
    x = constant_rows(values, shape)
    maps = torch.rand(n, *shape[1:], generator=rng(n))
    policy = GuidedMix(saliency=lambda b: maps)
    mixed, target = policy(x, torch.arange(n))
    plan = policy.plan(x)
    assert torch.equal(target.labels, torch.stack([torch.arange(n), plan.partner], 1))
    assert torch.equal(target.weights, torch.stack([plan.lam, 1 - plan.lam], 1))
    want = (target.weights.double() * values[target.labels]).sum(1)
    assert torch.allclose(mixed.flatten(1).mean(1), want, atol=3e-7, rtol=0)
    if n > 2 and len(maps[0].flatten()) > 1:
        assert len(plan.lam.unique()) > 2
    if n == 1:
        assert torch.equal(plan.lam, torch.tensor([0.5]))


def test_the_spectral_residual_is_the_default_and_is_enlarged() -> None:
    x = torch.rand(4, 3, 100, 80, generator=rng())
    plan = GuidedMix(blur=0).plan(x)
    maps = torch.nn.functional.interpolate(spectral_residual(x)[:, None], size=(100, 80), mode="bilinear")
    maps = maps / maps.sum((2, 3), keepdim=True)
    assert plan.mask is not None
    assert torch.allclose(plan.mask, maps / (maps + maps[plan.partner]), atol=1e-5)


def test_the_input_gradient_of_a_model() -> None:
    model, x, y = net(), torch.rand(6, 3, 11, 14, generator=rng()), torch.arange(6) % 5
    policy = GuidedMix(model, saliency="input-gradient", blur=0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    _, target = policy(x, y)
    plan = policy.plan(x, y)
    maps = input_saliency(model, x, y)
    maps = maps / maps.sum((1, 2), keepdim=True)
    assert plan.mask is not None
    assert torch.allclose(plan.mask[:, 0], maps / (maps + maps[plan.partner]), atol=1e-6)
    assert torch.equal(target.weights[:, 0], plan.lam)
    assert not plan.lam.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert bool((model[0].weight.grad == 1).all())
    assert all(module.training for module in model.modules())
    assert policy.state_dict() == {}
    assert list(policy.parameters()) == list(policy.children()) == []


def test_pairings_and_what_is_drawn() -> None:
    x, y = torch.rand(9, 3, 12, 12, generator=rng()), torch.arange(9)
    before = x.clone()
    greedy = GuidedMix()
    chance = rng(1)
    state = chance.get_state()
    mixed, target = greedy(x, y, generator=chance)
    assert torch.equal(chance.get_state(), state)  # nothing is drawn
    assert torch.equal(x, before)
    assert torch.equal(pickle.loads(pickle.dumps(greedy))(x, y)[0], mixed)
    order = torch.randperm(9, generator=rng(2))
    again, moved = greedy(x[order], y[order])
    assert torch.allclose(again, mixed[order], atol=1e-5)  # the same cycle, wherever the rows stand
    assert torch.equal(moved.labels, target.labels[order])
    drawn = GuidedMix(pairing="permutation")
    plans = [drawn.plan(x, generator=rng(seed)) for seed in (3, 3, 4)]
    assert torch.equal(plans[0].partner, plans[1].partner)
    assert not torch.equal(plans[0].partner, plans[2].partner)
    shifted = GuidedMix(pairing="shift").plan(x, generator=rng(3))
    assert np.abs(shifted.blend(x).double().numpy() - blend_by_hand(x, shifted)).max() < 1e-6
    partner = torch.tensor([3, 3, 0, 1, 8, 5, 2, 2, 4])
    assert torch.equal(greedy.plan(x, partner=partner).partner, partner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.rand(5, 3, 14, 14, generator=rng())
    x = (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    policy = GuidedMix()
    mixed, target = policy(x, torch.arange(5))
    plan = policy.plan(x)
    assert mixed.dtype == dtype
    assert target.weights.dtype == torch.float32
    rounding = 0.501 if dtype == torch.uint8 else torch.finfo(dtype).eps + 1e-6
    assert np.abs(mixed.double().numpy() - blend_by_hand(x, plan)).max() <= rounding
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy(x, torch.arange(5))[0], mixed)


def test_dense_masks_schedules_and_choices() -> None:
    policy = GuidedMix(saliency=lambda b: torch.rand(b.shape[0], 12, 10, generator=rng()))
    y = torch.arange(4).view(4, 1, 1).expand(4, 12, 10).contiguous()
    x = y[:, None].double()
    plan = policy.plan(x)
    target = plan.target(y)
    assert torch.allclose((target.labels * target.weights).sum(1).double(), plan.blend(x)[:, 0], atol=1e-5)
    mix = Scheduled(policy, start=0.5)
    assert torch.equal(mix(x, torch.arange(4))[0], x)
    mix.set_progress(0.6)
    assert torch.equal(mix(x, torch.arange(4))[0], plan.blend(x))
    for per in ("batch", "sample"):
        choice = RandomChoice([policy, None], per=per)
        mixed, _ = choice(x, torch.arange(4), generator=rng(1))
        assert mixed.shape == x.shape


@pytest.mark.parametrize("saliency", ["spectral-residual", "input-gradient"])
def test_nothing_is_read_on_the_host(saliency: str) -> None:
    """The meta device has no values to give, in no step of the cycle."""
    x = torch.rand(5, 3, 20, 24, device="meta")
    mixed, target = GuidedMix(net().to("meta"), saliency=saliency)(x, torch.zeros(5, device="meta").long())
    assert mixed.device.type == target.weights.device.type == "meta"


def test_refusals() -> None:
    model, x = net(), torch.rand(3, 3, 8, 8)
    for options, error, text in [
        ({"saliency": "gradient"}, ValueError, "saliency is 'gradient'; pass one of 'spectral-residual'"),
        ({"saliency": None}, TypeError, "saliency is None; pass a function of the batch, or the name of a map"),
        ({"saliency": 3}, TypeError, "saliency is a int; pass a function of the batch, or one of 'spectral-residual'"),
        ({"saliency": "input-gradient"}, ValueError, "saliency is 'input-gradient' but model is None; pass the model"),
        ({"model": "net"}, TypeError, r"model is a str; pass a torch\.nn\.Module"),
        ({"blur": -1}, ValueError, "blur is -1; pass an integer of at least 0"),
        ({"blur": 1.5}, ValueError, "blur is 1.5; pass an integer of at least 0"),
        ({"pairing": "greed"}, ValueError, "pairing is 'greed'; pass one of .*did you mean \"greedy\""),
    ]:
        with pytest.raises(error, match=f"GuidedMix: {text}"):
            GuidedMix(**options)
    asked = GuidedMix(model, saliency="input-gradient")
    with pytest.raises(ValueError, match="GuidedMix: y is None; pass the labels"):
        asked.plan(x)
    with pytest.raises(TypeError, match=r"GuidedMix: x has dtype torch\.uint8"):
        asked.plan((x * 255).byte(), torch.arange(3))
    with pytest.raises(ValueError, match=r"GuidedMix: saliency returned \(3, 3, 8, 8\) for a batch of shape"):
        GuidedMix(saliency=lambda b: b).plan(x)
    with pytest.raises(ValueError, match="pass a batch with 3 to 5 axes"):
        GuidedMix().plan(torch.rand(4, 3))
    with pytest.raises(TypeError, match="generator is a int"):
        GuidedMix().plan(x, generator=3)
    assert "saliency='spectral-residual', blur=3, pairing='greedy'" in repr(GuidedMix())
    assert "a function" in repr(GuidedMix(saliency=first_channel, pairing="shift"))
