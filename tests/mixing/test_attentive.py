"""AttentiveMix: the strongest cells of a network's map stay, the partner stands everywhere else."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hardmix.mixing import Scheduled
from hardmix.mixing.attentive import AttentiveMix
from mixing.cases import blend_by_hand, constant_rows, own_share, rng


class Brightness(nn.Module):
    """Its map is the image itself, averaged onto windows: the brightest cells are the strongest."""

    def __init__(self, stride: int = 4) -> None:
        super().__init__()
        self.body = nn.AvgPool2d(stride, ceil_mode=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.asked: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(self.training or torch.is_grad_enabled())
        return self.pool(self.body(x)).flatten(1)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def mask_by_hand(found: Tensor, count: list[int], grid: int, size: tuple[int, int]) -> np.ndarray:
    """One sample, one cell and one pixel at a time. Where the map doesn't divide, cells share its pixels."""
    values = found.double().numpy()
    h, w = values.shape[2:]
    rows, columns = (min(grid, *pair) for pair in zip((h, w), size, strict=True))
    out = np.zeros((len(values), *size))
    for i, maps in enumerate(values):
        strength = [
            -maps[:, r * h // rows : -(-(r + 1) * h // rows), c * w // columns : -(-(c + 1) * w // columns)].mean()
            for r in range(rows)
            for c in range(columns)
        ]
        kept = np.argsort(strength, kind="stable")[: count[i]]
        for r in range(size[0]):
            for c in range(size[1]):
                out[i, r, c] = (r * rows // size[0]) * columns + c * columns // size[1] in kept
    return out


@pytest.mark.parametrize(
    ("size", "stride", "grid"),
    [((28, 28), 4, 7), ((28, 56), 4, 7), ((33, 19), 4, 20), ((12, 30), 2, 3), ((9, 14), 1, 7), ((5, 40), 3, 4)],
    ids=str,
)
def test_against_the_definition(size: tuple[int, int], stride: int, grid: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, stride, stride=stride), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(5, 3, *size, generator=rng())
    with torch.no_grad():
        found = model[:2](x)
    plan = AttentiveMix(model, cells=3, grid=grid).plan(x, generator=rng(1))
    assert plan.mask is not None
    assert np.array_equal(plan.mask[:, 0].numpy(), mask_by_hand(found, [3] * 5, grid, size))
    assert torch.equal(plan.lam, own_share(plan.mask))
    assert np.abs(plan.blend(x).double().numpy() - blend_by_hand(x, plan)).max() < 1e-6


def test_plus_draws_the_number_of_cells() -> None:
    x = torch.rand(300, 1, 16, 16, generator=rng())
    policy = AttentiveMix(Brightness(), plus=True, alpha=1.0, grid=4)
    plan = policy.plan(x, generator=rng(3))
    count = (plan.lam * 16).round().int()
    assert torch.allclose(count / 16, plan.lam)
    with torch.no_grad():
        found = torch.nn.functional.avg_pool2d(x, 4)
    assert plan.mask is not None
    assert np.array_equal(plan.mask[:, 0].numpy(), mask_by_hand(found, count.tolist(), 4, (16, 16)))
    # floor(16 u) of a uniform u, but at least one
    seen = torch.bincount(count, minlength=17).float()
    assert seen[0] == seen[16] == 0
    assert 0.08 < seen[1] / 300 < 0.18
    assert seen[2:16].min() > 5
    plan = AttentiveMix(Brightness(), plus=True, per="batch", grid=4).plan(x, generator=rng(4))
    assert len(plan.lam.unique()) == 1


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("size", [(16, 16), (17, 31)], ids=str)
@pytest.mark.parametrize("plus", [False, True])
def test_own_share_of_constant_images_is_lam(n: int, size: tuple[int, int], plus: bool) -> None:
    values = 2.0 ** -torch.arange(n, dtype=torch.float64)
    x = constant_rows(values, (3, *size))
    policy = AttentiveMix(cnn(), plus=plus)
    for seed in range(3):
        mixed, target = policy(x, torch.arange(n), generator=rng(seed))
        plan = policy.plan(x, generator=rng(seed))
        assert torch.equal(target.labels, torch.stack([torch.arange(n), plan.partner], 1))
        assert torch.equal(target.weights, torch.stack([plan.lam, 1 - plan.lam], 1))
        want = (target.weights.double() * values[target.labels]).sum(1)
        assert torch.allclose(mixed.flatten(1).mean(1), want, atol=2e-7, rtol=0)


def test_lam_is_that_of_each_sample_where_cells_differ_in_size() -> None:
    """10 pixels make cells of 3, 3 and 4 (or so) pixels a side: rows that keep others have other shares."""
    x = torch.rand(12, 3, 10, 10, generator=rng())
    plan = AttentiveMix(Brightness(1), cells=2, grid=3).plan(x, generator=rng())
    assert len(plan.lam.unique()) > 1


def test_the_brightest_corner_stays() -> None:
    x = torch.zeros(2, 1, 28, 28)
    x[0, 0, :8, :8] = 1.0
    x[1, 0, 20:, 20:] = 0.5
    mixed, target = AttentiveMix(Brightness(), cells=4)(x, torch.tensor([3, 5]), generator=rng())
    assert torch.equal(mixed[0], torch.maximum(x[0], x[1]))
    assert torch.allclose(target.weights, torch.tensor([4 / 49, 45 / 49]).expand(2, 2))


def test_a_flat_map_keeps_the_first_cells_and_nan_wins() -> None:
    x = torch.ones(2, 1, 28, 28)
    plan = AttentiveMix(Brightness(), cells=8).plan(x, generator=rng())
    want = torch.zeros(7, 7)
    want[0] = want[1, 0] = 1
    assert plan.mask is not None
    assert torch.equal(plan.mask[:, 0, ::4, ::4], want.expand(2, 7, 7))
    x[0, 0, 9, 13] = torch.nan  # plans look at no values; the policy itself refuses such a batch
    plan = AttentiveMix(Brightness(), cells=1).plan(x, generator=rng())
    assert plan.mask is not None
    assert plan.mask[0, 0, 8:12, 12:16].sum() == 16 == plan.mask[0].sum()


def test_the_network_is_asked_once_and_keeps_nothing() -> None:
    model = Brightness()
    policy = AttentiveMix(model)
    x = torch.rand(4, 3, 28, 28, generator=rng())
    for _ in range(2):
        policy(x, torch.arange(4))
    assert model.asked == [False, False]  # in evaluation mode and without a gradient
    assert policy.layer == "body"
    assert not any(module._forward_hooks for module in model.modules())

    trained = cnn()
    trained[0].weight.grad = torch.ones_like(trained[0].weight)
    trained[6].weight.requires_grad_(False)
    state, chance = copy.deepcopy(trained.state_dict()), torch.get_rng_state()
    policy = AttentiveMix(trained)
    policy(x, torch.arange(4), generator=rng())
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert bool((trained[0].weight.grad == 1).all())
    assert [p.requires_grad for p in trained.parameters()] == [True, True, True, True, False, True]
    assert all(module.training for module in trained.modules())
    assert policy.state_dict() == {}
    assert list(policy.parameters()) == list(policy.children()) == []


def test_draws_come_from_the_generator_and_the_input_is_left_alone() -> None:
    policy, x, y = AttentiveMix(cnn(), plus=True), torch.rand(7, 3, 15, 22, generator=rng()), torch.arange(7)
    before = x.clone()
    mixed, target = policy(x, y, generator=rng(1))
    again, same = policy(x, y, generator=rng(1))
    assert torch.equal(mixed, again)
    assert torch.equal(target.weights, same.weights)
    assert any(not torch.equal(mixed, policy(x, y, generator=rng(seed))[0]) for seed in range(2, 6))
    assert torch.equal(x, before)
    twin = pickle.loads(pickle.dumps(policy))
    assert torch.equal(twin(x, y, generator=rng(1))[0], mixed)
    partner = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    assert torch.equal(policy.plan(x, partner=partner).partner, partner)
    for n in (1, 2):
        assert policy(x[:n], y[:n])[0].shape == (n, 3, 15, 22)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.rand(4, 3, 28, 28, generator=rng()).to(dtype)
    policy = AttentiveMix(cnn())
    mixed, target = policy(x, torch.arange(4), generator=rng())
    assert mixed.dtype == dtype
    assert target.weights.dtype == torch.float32
    mask = policy.plan(x, generator=rng()).mask
    assert mask is not None
    assert torch.equal(mixed, torch.where(mask > 0, x, x[target.labels[:, 1]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy(x, torch.arange(4), generator=rng())[0], mixed)


def test_dense_masks_and_schedules_follow() -> None:
    policy = AttentiveMix(Brightness(), plus=True)
    y = torch.arange(4).view(4, 1, 1).expand(4, 28, 28).contiguous()
    x = y[:, None].float()
    plan = policy.plan(x, generator=rng())
    target = plan.target(y)
    assert torch.allclose((target.labels * target.weights).sum(1), plan.blend(x)[:, 0])
    mix = Scheduled(policy, start=0.5)
    assert torch.equal(mix(x, torch.arange(4))[0], x)
    mix.set_progress(0.6)
    assert not torch.equal(mix(x, torch.arange(4))[0], x)


@pytest.mark.parametrize("plus", [False, True])
def test_nothing_is_read_on_the_host(plus: bool) -> None:
    """The meta device has no values to give."""
    x = torch.rand(5, 3, 20, 24, device="meta")
    mixed, target = AttentiveMix(cnn().to("meta"), plus=plus)(x, torch.zeros(5, device="meta").long())
    assert mixed.device.type == target.weights.device.type == "meta"


def test_refusals() -> None:
    model, x = cnn(), torch.rand(2, 3, 28, 28)
    with pytest.raises(TypeError, match=r"AttentiveMix: model is a str; pass a torch\.nn\.Module\."):
        AttentiveMix("resnet")
    with pytest.raises(ValueError, match=r"layer names '7', which the model does not have.*model\.named_modules\(\)"):
        AttentiveMix(model, layer="7")
    with pytest.raises(TypeError, match="layer is 3; pass the name of a submodule"):
        AttentiveMix(model, layer=3)
    for options, text in [
        ({"cells": 0}, "cells is 0; pass an integer of at least 1"),
        ({"grid": -1}, "grid is -1; pass an integer of at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; pass a finite number greater than 0"),
    ]:
        with pytest.raises(ValueError, match=f"AttentiveMix: {text}"):
            AttentiveMix(model, **options)
    with pytest.raises(TypeError, match="AttentiveMix: plus is 1; pass True or False"):
        AttentiveMix(model, plus=1)
    with pytest.raises(ValueError, match="cells is 49 but the map of layer '3' has 7 x 7 cells; keep fewer"):
        AttentiveMix(model, cells=49).plan(x)
    with pytest.raises(TypeError, match=r"AttentiveMix: x has dtype torch\.uint8"):
        AttentiveMix(model).plan((x * 255).byte())
    with pytest.raises(ValueError, match="AttentiveMix: layer '6' put out no map"):
        AttentiveMix(model, layer="6").plan(x)
    with pytest.raises(ValueError, match="pass a batch with 4 axes"):
        AttentiveMix(model).plan(x[:, :, 0])
    with pytest.raises(ValueError, match="x holds NaN or infinity in rows 1"):
        AttentiveMix(model)(torch.tensor([1.0, torch.nan]).view(2, 1, 1, 1).expand_as(x), torch.arange(2))
    assert "layer='', cells=6, grid=7" in repr(AttentiveMix(model))
    assert "plus=True" in repr(AttentiveMix(model, plus=True))
