"""AutoMix and SAMix: what they draw, what trains their mask block, and what they leave alone."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hardmix.losses import DecoupledMixupLoss, SoftCrossEntropyLoss
from hardmix.mixing import MixedTarget, MixPlan, Mixup
from hardmix.mixing.learned import AutoMix, SAMix, as_map, mean_share
from hardmix.models.build import build_model
from mixing.cases import blend_by_hand, constant_rows, own_share, rng

KINDS = [AutoMix, SAMix]
CRITERION = SoftCrossEntropyLoss()
CLASSES = 5


class Net(nn.Module):
    """Two convolutions with batch normalisation and dropout, to whose map any image size leads."""

    def __init__(self, channels: int = 3, norm: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 3, 2, 1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, 2, 1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(inplace=True),
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x).mean((2, 3))))


class Twice(nn.Module):
    """A layer that is called again after another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.relu(self.conv(x))).mean((2, 3)))


def net(seed: int = 0, **options: object) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def make(kind: type[AutoMix], model: nn.Module | None = None, **options: object) -> AutoMix:
    model = net() if model is None else model
    torch.manual_seed(7)
    return kind(model, input_shape=(3, 16, 16), **{"clean": 0.0, **options})


def batch(n: int = 6, size: tuple[int, int] = (16, 16), seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, *size, generator=rng(seed)), torch.arange(n) % CLASSES


def grown(policy: nn.Module) -> list[nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


# What is drawn


@pytest.mark.parametrize("label", ["mask", "drawn"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 40)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_plan_blend_target(kind: type[AutoMix], label: str, size: tuple[int, int], n: int) -> None:
    policy = make(kind, label=label)
    x, y = batch(n, size)
    before = x.clone()
    mixed, target = policy(x, y, generator=rng(3))
    plan = policy.plan(x, y, generator=rng(3))
    assert torch.equal(x, before)
    assert mixed.data_ptr() != x.data_ptr()
    assert torch.equal(mixed, plan.blend(x))
    assert torch.equal(target.labels, torch.stack([y, y[plan.partner]], 1))
    assert torch.equal(target.weights, torch.stack([plan.lam, 1 - plan.lam], 1))
    assert torch.equal(plan.partner.sort().values, torch.arange(n))
    assert plan.mask is not None
    assert plan.mask.shape == (n, 1, *size)
    assert plan.mask.dtype == plan.lam.dtype == torch.float32
    assert bool(((plan.mask >= 0) & (plan.mask <= 1)).all())
    assert np.abs(mixed.double().numpy() - blend_by_hand(x, plan)).max() < 1e-6
    assert not any(value.requires_grad for value in (mixed, plan.mask, target.weights))
    drawn = Mixup(alpha=2.0).plan(x, generator=rng(3))
    assert torch.equal(plan.partner, drawn.partner)
    assert torch.equal(plan.lam, own_share(plan.mask) if label == "mask" else drawn.lam)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_constant_images_show_their_share(kind: type[AutoMix], dtype: torch.dtype) -> None:
    policy = make(kind)
    values = 2.0 ** -torch.arange(5, dtype=torch.float64)
    x = constant_rows(values, (3, 12, 20)).to(dtype)
    mixed, target = policy(x, torch.arange(5), generator=rng(1))
    want = (target.weights.double() * values[target.labels]).sum(1)
    slack = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 2e-7)
    assert mixed.dtype == dtype
    assert (mixed.double().mean((1, 2, 3)) - want).abs().max() <= slack


@pytest.mark.parametrize("kind", KINDS)
def test_small_shares_are_mixed_as_a_whole(kind: type[AutoMix]) -> None:
    x, _ = batch(64)
    policy = make(kind, alpha=0.5, margin=0.08)
    plan, drawn = policy.plan(x, generator=rng(1)), Mixup(alpha=0.5).plan(x, generator=rng(1)).lam
    assert plan.mask is not None
    whole = torch.minimum(drawn, 1 - drawn) <= 0.08
    assert 5 < int(whole.sum()) < 60
    assert torch.equal(plan.mask[whole], drawn[whole].view(-1, 1, 1, 1).expand(-1, 1, 16, 16))
    assert torch.equal(plan.lam[whole], drawn[whole])
    assert plan.mask[~whole].std((1, 2, 3)).min() > 1e-3
    # all of them: Mixup
    mixed, target = make(kind, alpha=0.5, margin=0.5)(x, torch.arange(64), generator=rng(1))
    want, same = Mixup(alpha=0.5)(x, torch.arange(64), generator=rng(1))
    assert torch.equal(target.weights, same.weights)
    assert torch.allclose(mixed, want, atol=1e-6)
    none = make(kind, alpha=0.5, margin=0.0).plan(x, generator=rng(1)).mask
    assert none is not None
    assert none.std((1, 2, 3)).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_masks_come_from_both_images(kind: type[AutoMix]) -> None:
    """The plan's mask is the block's, on the maps of the row and of its partner."""
    policy, (x, _) = make(kind, net(norm=False), margin=0.0), batch(5)
    plan = policy.plan(x, generator=rng(2))
    lam = Mixup(alpha=2.0).plan(x, generator=rng(2)).lam
    maps = policy.teacher.model.body(x)
    for i, j in enumerate(plan.partner.tolist()):
        want = policy.block(maps[i : i + 1], maps[j : j + 1], lam[i : i + 1], (16, 16))
        assert plan.mask is not None
        assert torch.allclose(plan.mask[i : i + 1], want, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_generator_and_per(kind: type[AutoMix]) -> None:
    policy, (x, y) = make(kind), batch()
    first, again, other = (policy(x, y, generator=rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    policy(x, y, generator=rng(1))
    policy.loss(CRITERION)
    assert torch.equal(torch.get_rng_state(), state)
    # the mask block learns from another draw than the one that the model sees
    plan = policy.plan(x, generator=rng(1))
    policy(x, y, generator=rng(1))
    assert not torch.equal(policy._pending.lam, Mixup(alpha=2.0).plan(x, generator=rng(1)).lam)
    drawn = [make(kind, per="batch", label="drawn")]
    assert len(drawn[0].plan(x, generator=rng(1)).lam.unique()) == 1
    drawn[0](x, y, generator=rng(1))
    assert len(drawn[0]._pending.lam.unique()) == 1
    paired = make(kind, per="pair")
    plan = paired.plan(x, generator=rng(1))
    assert torch.equal(plan.partner[plan.partner], torch.arange(6))
    paired(x, y, generator=rng(1))
    partner, lam = paired._pending.partner, paired._pending.lam
    assert torch.equal(lam, lam[partner])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_draw(kind: type[AutoMix]) -> None:
    policy, (x, y) = make(kind), batch()
    mixed, target = policy(x, y, generator=rng(1))
    want = policy.loss(CRITERION)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = policy(x, y, generator=rng(1))
        loss = policy.loss(CRITERION)
    assert torch.equal(again, mixed)
    assert torch.equal(same.weights, target.weights)
    assert want is not None
    assert loss is not None
    assert loss.item() == pytest.approx(want.item(), abs=0.05)


def test_mean_share() -> None:
    masks = torch.rand(4, 3, 5, 7, generator=rng())
    assert torch.equal(mean_share(masks), masks.mean((2, 3)))
    assert mean_share(masks[:, :1]).shape == (4,)
    flat = torch.full((1, 1, 33, 77), 0.1)
    assert torch.equal(mean_share(flat), torch.tensor([0.1]))


# What trains the mask block


def loss_by_hand(policy: AutoMix, criterion: Callable[[Tensor, MixedTarget], Tensor], variance: bool) -> Tensor:
    """Row by row, from the definition, for a network without batch normalisation."""
    x, y, _, maps, partner, lam = policy._pending
    losses, areas = [], []
    for i, j in enumerate(partner.tolist()):
        mask = policy.block(maps[i : i + 1], maps[j : j + 1], lam[i : i + 1], tuple(x.shape[2:]))[0, 0]
        mixed = torch.stack([mask * x[i, c] + (1 - mask) * x[j, c] for c in range(3)])
        logits = policy.teacher.model(mixed[None])
        target = MixedTarget(torch.stack([y[i], y[j]])[None], torch.stack([lam[i], 1 - lam[i]])[None])
        losses.append(criterion(logits, target))
        mean = mask.sum() / mask.numel()
        area = max(abs(mean - lam[i]) - 0.1, 0 * mean)
        areas.append(area - 2 * ((mask - mean) ** 2).sum() / mask.numel() if variance else area)
    n = len(losses)
    return sum(losses) / n + policy.mask_weight * sum(areas) / n


@pytest.mark.parametrize("criterion", [CRITERION, DecoupledMixupLoss(eta=0.5)], ids=["mce", "dm"])
@pytest.mark.parametrize("weight", [0.1, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_its_gradient(kind: type[AutoMix], weight: float, criterion: nn.Module) -> None:
    policy = make(kind, net(norm=False).double(), mask_weight=weight).double()
    x, y = batch(7, (16, 20))
    x = 20 * (x.double() - 0.5)  # strong enough for masks with contrast
    policy(x, y, generator=rng(4))
    want = loss_by_hand(policy, criterion, kind is SAMix)
    by_hand = torch.autograd.grad(want, grown(policy))
    loss = policy.loss(criterion)
    assert loss is not None
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for mine, expected in zip(torch.autograd.grad(loss, grown(policy)), by_hand, strict=True):
        assert torch.allclose(mine, expected, atol=1e-7)
        assert mine.abs().max() > 0


def test_a_frozen_mask_block_goes_on_mixing() -> None:
    model, (x, y) = net(), batch()
    policy = make(SAMix, model)
    policy.requires_grad_(False)
    mixed, target = policy(x, y)
    loss = policy.loss(CRITERION)
    assert loss is not None
    (CRITERION(model(mixed), target) + loss).backward()
    assert all(p.grad is None for p in policy.parameters())


def test_loss_of_a_batch_is_given_once() -> None:
    policy, (x, y) = make(AutoMix), batch()
    assert policy.loss(CRITERION) is None
    policy.plan(x, y)
    assert policy.loss(CRITERION) is None
    policy(x, y)
    assert policy.loss(CRITERION) is not None
    assert policy.loss(CRITERION) is None


@pytest.mark.parametrize("kind", KINDS)
def test_who_gets_gradients(kind: type[AutoMix]) -> None:
    model, (x, y) = net(), batch()
    policy = make(kind, model)
    mixed, target = policy(x, y, generator=rng(1))
    CRITERION(model(mixed), target).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in policy.parameters())
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss = policy.loss(CRITERION)
    assert loss is not None
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.block.parameters())
    assert all(p.grad is None for p in policy.teacher.parameters())
    # what the model has accumulated is as it was
    for p, want in zip(model.parameters(), kept, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind: type[AutoMix]) -> None:
    model, (x, y) = net(), batch()
    model.head.bias.requires_grad_(False)
    model.body[1].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    policy = make(kind, model)
    slow = copy.deepcopy(policy.teacher.state_dict())
    policy(x, y)
    loss = policy.loss(CRITERION)
    assert loss is not None
    loss.backward()
    for found, want in ((model.state_dict(), state), (policy.teacher.state_dict(), slow)):
        assert all(torch.equal(found[key], want[key]) for key in want)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * (len(list(model.parameters())) - 1) + [False]
    assert not any(p.requires_grad for p in policy.teacher.parameters())
    assert all(not m._forward_hooks for m in [*model.modules(), *policy.modules()])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_block_learns_what_it_is_trained_for(kind: type[AutoMix]) -> None:
    """AutoMix's area follows lambda; SAMix's contrast grows besides."""
    policy, (x, y) = make(kind, momentum=1.0, mask_weight=20.0), batch(32)
    start = policy.plan(x, generator=rng(9))
    optimizer = torch.optim.Adam(grown(policy), lr=0.05)
    generator, losses = rng(1), []
    for _ in range(60):
        policy(x, y, generator=generator)
        loss = policy.loss(CRITERION)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    plan, drawn = policy.plan(x, generator=rng(9)), Mixup(alpha=2.0).plan(x, generator=rng(9)).lam
    assert plan.mask is not None
    assert start.mask is not None
    if kind is AutoMix:
        assert (plan.lam - drawn).abs().mean() < 0.12 < (start.lam - drawn).abs().mean()
    else:
        assert plan.mask.std((1, 2, 3)).mean() > 2 * start.mask.std((1, 2, 3)).mean()


def test_the_loss_and_the_step_never_wait_for_the_device() -> None:
    class NoValues(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def criterion(logits: Tensor, target: MixedTarget) -> Tensor:
        return -(logits.log_softmax(1).gather(1, target.labels) * target.weights).sum(1).mean()

    policy, (x, y) = make(SAMix), batch()
    policy(x, y)
    with NoValues():
        assert policy.loss(criterion) is not None
        policy.after_step()


# The teacher


def test_teacher_follows_the_model() -> None:
    model = net()
    policy = make(AutoMix, model, momentum=0.9)
    for progress, rate in ((0.0, 0.1), (0.5, 0.05), (1.0, 0.0), (0.25, 0.1 * (1 + math.cos(math.pi / 4)) / 2)):
        before = copy.deepcopy(policy.teacher.model.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
            model.body[1].running_mean += 2.0
            model.body[1].num_batches_tracked += 3
        policy.set_progress(progress)
        policy.after_step()
        theirs = model.state_dict()
        for key, value in policy.teacher.model.state_dict().items():
            want = before[key] + rate * (theirs[key] - before[key]) if value.is_floating_point() else theirs[key]
            assert torch.allclose(value, want, atol=1e-6), key
    frozen = make(AutoMix, model, momentum=1.0)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    before = frozen.teacher.model.head.weight.clone()
    frozen.after_step()
    assert torch.equal(frozen.teacher.model.head.weight, before)


def test_teacher_normalises_with_the_batch_and_drops_nothing() -> None:
    model, (x, _) = net(), batch()
    model.body[1].running_mean.fill_(0.7)
    policy = make(AutoMix, model)
    twin = copy.deepcopy(model).train()
    twin.drop.p = 0.0
    for _ in range(2):
        assert torch.allclose(policy.teacher(x), twin(x), atol=1e-6)
        assert torch.allclose(policy.teacher(x[:1]), copy.deepcopy(model).eval()(x[:1]), atol=1e-6)  # one has no batch
        policy.eval()
    policy.train()
    assert not policy.teacher.model.drop.training
    assert torch.equal(policy.teacher.model.body[1].running_mean, model.body[1].running_mean)
    policy.after_step()  # and its running averages serve whoever evaluates it
    evaluated = copy.deepcopy(policy.teacher.model).eval()
    assert torch.allclose(evaluated(x), model.eval()(x), atol=1e-5)


def test_maps_of_one_pixel_and_a_batch_of_one() -> None:
    policy = make(AutoMix)
    x, y = torch.rand(1, 3, 2, 2, generator=rng()), torch.tensor([1])
    mixed, target = policy(x, y, generator=rng())
    assert torch.allclose(mixed, x)  # mixed with itself
    assert target.labels.tolist() == [[1, 1]]
    loss = policy.loss(CRITERION)
    assert loss is not None
    assert bool(loss.isfinite())


# State


def test_state_and_parameters() -> None:
    model = net()
    policy = make(SAMix, model)
    assert {id(p) for p in grown(policy)} == {id(p) for p in policy.block.parameters()}
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in model.parameters()}
    assert {key.split(".")[0] for key in policy.state_dict()} == {"teacher", "block"}
    assert {key.removeprefix("teacher.model.") for key in policy.state_dict() if "teacher" in key} == set(
        model.state_dict()
    )
    assert "layer='body'" in repr(policy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_bit_for_bit(kind: type[AutoMix]) -> None:
    def start(seed: int) -> tuple[Net, AutoMix, torch.optim.Optimizer]:
        model = net(seed)
        policy = kind(model, input_shape=(3, 16, 16), momentum=0.9)
        return model, policy, torch.optim.SGD([*model.parameters(), *grown(policy)], lr=0.1, momentum=0.9)

    def step(model: Net, policy: AutoMix, optimizer: torch.optim.Optimizer, k: int) -> None:
        x, y = batch(8, seed=k)
        policy.set_progress(k / 10)
        torch.manual_seed(k)  # dropout
        mixed, target = policy(x, y, generator=rng(k))
        loss, extra = CRITERION(model(mixed), target), policy.loss(CRITERION)
        assert extra is not None
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
        policy.after_step()

    first = start(0)
    for k in range(3):
        step(*first, k)
    second = start(1)
    for mine, theirs in zip(second, first, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for k in (3, 4):
        step(*first, k)
        step(*second, k)
    for mine, theirs in zip(second[:2], first[:2], strict=True):
        found = mine.state_dict()
        assert all(torch.equal(found[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_follow_the_same_model_and_pickles_none(kind: type[AutoMix]) -> None:
    model, (x, y) = net(), batch()
    policy = make(kind, model, momentum=0.5)
    mixed, _ = policy(x, y, generator=rng(1))
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin.loss(CRITERION) is None
        assert torch.equal(twin(x, y, generator=rng(1))[0], mixed)
        if twin.asked is None:
            with pytest.raises(RuntimeError, match=rf"{kind.__name__}: this policy was unpickled without its model; c"):
                twin.after_step()
        else:
            assert twin.asked is model
        other = net(5)
        twin.attach(other)
        twin.after_step()
        want = (model.head.weight + other.head.weight) / 2
        assert torch.allclose(twin.teacher.model.head.weight, want, atol=1e-6)
        with pytest.raises(ValueError, match="model has other tensors than the one that the policy was made for; pass"):
            twin.attach(nn.Linear(3, 3))
    assert policy.loss(CRITERION) is not None


# The clean batch


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_clean_batch_is_the_models_own(kind: type[AutoMix]) -> None:
    model, (x, y) = net(), batch()
    model.drop = nn.Identity()
    assert (kind(model, input_shape=(3, 16, 16)).clean, make(kind).clean) == (1.0, 0.0)
    rest = make(kind, model)
    policy = make(kind, model, clean=0.3)
    policy.block.load_state_dict(rest.block.state_dict())
    for one in (policy, rest):
        one(x, y, generator=rng(1))
    loss, other = policy.loss(CRITERION), rest.loss(CRITERION)
    want = F.cross_entropy(model(x), y)
    assert torch.allclose(loss - other, 0.3 * want, atol=1e-6)
    loss.backward()
    mask_block = [p.grad.clone() for p in policy.block.parameters()]
    other.backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(mask_block, rest.block.parameters(), strict=True))
    (wanted,) = torch.autograd.grad(0.3 * want, model.head.weight)
    assert torch.allclose(model.head.weight.grad, wanted, atol=1e-6)
    assert policy.loss(CRITERION) is None


def test_the_clean_batch_is_given_in_the_models_dtype_and_kind_of_label() -> None:
    x, y = batch()
    model = net().double()
    policy = make(AutoMix, model, clean=1.0)
    rows = F.one_hot(y, CLASSES).float()
    policy(x.half(), rows, generator=rng(1))
    assert policy.loss(CRITERION).isfinite()
    policy(x, y)
    unpickled = pickle.loads(pickle.dumps(policy))
    unpickled(x, y)
    with pytest.raises(
        RuntimeError, match=r"AutoMix: this policy was unpickled without its model; call attach\(model\)"
    ):
        unpickled.loss(CRITERION)
    policy.disarm()
    assert policy.loss(CRITERION) is None
    with pytest.raises(ValueError, match=r"AutoMix: clean is -1"):
        make(AutoMix, clean=-1)


# Models and layers


@pytest.mark.parametrize(
    ("name", "options", "layer", "channels", "cells"),
    [
        ("small-cnn", {"width": 4}, "stage3", 16, (4, 4)),
        ("small-resnet", {"width": 4}, "stage3", 16, (4, 4)),
        ("resnet18", {"width": 4}, "stage4", 32, (4, 4)),
        ("tiny-vit", {"dim": 16}, "stage3", 16, (8, 8)),
        ("mobilenet-v2", {}, "features", 1280, None),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_this_package(
    kind: type[AutoMix], name: str, options: dict, layer: str, channels: int, cells: tuple | None
) -> None:
    torch.manual_seed(0)
    side = 64 if name == "mobilenet-v2" else 32
    model = build_model(name, num_classes=CLASSES, in_channels=3, image_size=side, **options)
    policy = kind(model, input_shape=(3, side, side))
    assert (policy.teacher.layer, policy.teacher.channels) == (layer, channels)
    x, y = batch(4, (side, side))
    mixed, target = policy(x, y, generator=rng())
    assert policy._pending.maps.shape[2:] == (cells or (2, 2))
    loss = policy.loss(CRITERION)
    assert loss is not None
    (CRITERION(model(mixed), target) + loss).backward()
    assert all(p.grad is not None for p in policy.block.parameters())
    policy.after_step()


def test_layer_by_name() -> None:
    model = build_model("resnet18", num_classes=3, in_channels=1, image_size=28, width=4)
    policy = AutoMix(model, layer="stage3", input_shape=[1, 28, 28])
    assert policy.teacher.channels == 16
    plan = policy.plan(torch.rand(3, 1, 28, 28))
    assert plan.mask is not None
    assert plan.mask[0].unique().numel() <= 49  # 7 x 7 cells
    # the last one is the one that is called last, also where it was called before
    assert AutoMix(Twice(), input_shape=(3, 16, 16)).teacher.layer == "conv"
    # a pooled map of one pixel is nobody's default, but can be named
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert make(AutoMix, pooled).teacher.layer == "0"
    assert make(AutoMix, pooled, layer="1").plan(torch.rand(2, 3, 16, 16)).mask is not None


def test_dense_labels() -> None:
    """A network that labels pixels: the mask mixes the labels, pixel by pixel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))
    policy, (x, _) = make(AutoMix, model, layer="1"), batch(4)
    y = torch.randint(CLASSES, (4, 16, 16), generator=rng())
    mixed, target = policy(x, y, generator=rng(1))
    plan = policy.plan(x, generator=rng(1))
    assert plan.mask is not None
    assert torch.equal(target.weights[:, 0], plan.mask[:, 0])

    def criterion(logits: Tensor, target: MixedTarget) -> Tensor:
        assert not target.weights.requires_grad  # or the mask block would learn to change the labels
        return CRITERION(logits, target)

    loss = policy.loss(criterion)
    assert loss is not None
    loss.backward()
    assert CRITERION(model(mixed), target).isfinite()


def test_as_map() -> None:
    image = (2, 3, 12, 24)
    tokens = torch.arange(2 * 18 * 5, dtype=torch.float32).view(2, 18, 5)
    found = as_map(tokens, image)
    assert found is not None
    assert found.shape == (2, 5, 3, 6)
    assert torch.equal(found[1, :, 2, 1], tokens[1, 13])  # row by row
    classed = as_map((torch.cat([torch.zeros(2, 1, 5), tokens], 1), "more"), image)
    assert classed is not None
    assert torch.equal(classed, found)
    maps = torch.rand(2, 5, 3, 3)
    assert as_map([maps], image) is maps
    for wrong in (tokens[:, :16], tokens[:, :1], torch.rand(2, 5), torch.rand(2, 5, 1, 1, 1), None, [], tokens.long()):
        assert as_map(wrong, image) is None
    assert as_map(torch.rand(2, 6, 5), (2, 3, 8, 8)) is None  # 2 x 3 cells would not be square ones


# Refusals


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind: type[AutoMix]) -> None:
    policy, (x, y) = make(kind), batch(4)
    who = kind.__name__
    with pytest.raises(TypeError, match=rf"{who}: x has dtype torch.uint8, through which the mask block can't be trai"):
        policy((x * 255).to(torch.uint8), y)
    for shape in ((4, 3, 16), (4, 3, 5, 6, 7), (4, 3)):
        with pytest.raises(ValueError, match=rf"{who}: x has shape .*; pass a batch with 4 axes"):
            policy(torch.rand(shape), y)
    with pytest.raises(ValueError, match=rf"{who}: x is on meta but the policy is on cpu; move both to one device"):
        policy.plan(x.to("meta"))
    with pytest.raises(ValueError, match=r"y has 3 entries but x has 4 rows"):
        policy(x, y[:3])
    with pytest.raises(TypeError, match=r"generator is a int; pass a torch\.Generator or None\."):
        policy(x, y, generator=3)
    bad = x.clone()
    bad[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"x holds NaN or infinity in rows 2"):
        policy(bad, y)
    with pytest.raises(ValueError, match=r"fraction is 1.5; pass a number from 0 to 1\."):
        policy.set_progress(1.5)
    vit = build_model("tiny-vit", num_classes=3, in_channels=3, image_size=16, dim=8, heads=2)
    odd = make(kind, vit, layer="stem.patches")
    odd.teacher.channels = 5
    with pytest.raises(ValueError, match=rf"{who}: layer 'stem.patches' returned shape \(4, 8, 4, 4\) for a batch of"):
        odd.plan(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"layer": "bodi"},
            ValueError,
            r"layer is 'bodi', which the model does not have \(did you mean \"body\"\?\); ",
        ),
        ({"layer": "head"}, ValueError, r"layer 'head' returned shape \(1, 5\); name one that returns a map"),
        ({"layer": 3}, TypeError, "layer is 3; pass the name of a submodule, or an empty string"),
        ({"input_shape": (3, 16)}, ValueError, r"input_shape is \(3, 16\); pass three whole numbers"),
        ({"input_shape": (3, 16, 0)}, ValueError, r"input_shape is \(3, 16, 0\); pass three whole numbers"),
        ({"input_shape": 16}, ValueError, "input_shape is 16; pass three whole numbers"),
        (
            {"input_shape": (1, 16, 16)},
            ValueError,
            r"the model does not take a batch of shape \(1, 1, 16, 16\) \(RuntimeError: .*\); pass input_shape=",
        ),
        ({"momentum": 1.5}, ValueError, "momentum is 1.5; pass a number from 0 to 1"),
        ({"margin": -0.1}, ValueError, "margin is -0.1; pass a number from 0 to 1"),
        ({"mask_weight": -1.0}, ValueError, "mask_weight is -1.0; pass a finite number of at least 0"),
        ({"alpha": 0.0}, ValueError, "alpha is 0.0; pass a finite number greater than 0"),
        ({"label": "lam"}, ValueError, "label is 'lam'; pass one of 'mask', 'drawn'"),
        ({"upsample": "cubic"}, ValueError, "upsample is 'cubic'; pass one of 'nearest', 'bilinear'"),
        ({"per": "rows"}, ValueError, "per is 'rows'; pass one of"),
    ],
    ids=str,
)
def test_bad_settings(kind: type[AutoMix], options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=rf"\w+: {text}"):
        kind(net(), **{"input_shape": (3, 16, 16), **options})


def test_bad_models() -> None:
    class Stuck(nn.Linear):
        def __deepcopy__(self, memo: dict) -> None:
            raise RuntimeError("no")

    with pytest.raises(TypeError, match=r"AutoMix: model is a str; pass a torch\.nn\.Module\."):
        AutoMix("resnet18")
    with pytest.raises(ValueError, match=r"AutoMix: model can't be copied \(RuntimeError: no\); pass one that copy"):
        AutoMix(Stuck(2, 2))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    with pytest.raises(ValueError, match=r"AutoMix: no layer of the model returns a map \(N, D, h, w\) or tokens"):
        make(AutoMix, flat)

    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Unused()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="AutoMix: layer 'spare' returned nothing; name one that returns a map"):
        make(AutoMix, model, layer="spare")


def test_a_plan_can_be_reused() -> None:
    """A plan of a learned policy is a plan: it mixes second views and hidden maps."""
    policy, (x, _) = make(AutoMix), batch(4)
    plan = policy.plan(x, generator=rng())
    assert isinstance(plan, MixPlan)
    assert plan.mask is not None
    hidden = plan.blend(F.avg_pool2d(x, 4))
    small = F.avg_pool2d(plan.mask, 4)
    want = small * F.avg_pool2d(x, 4) + (1 - small) * F.avg_pool2d(x, 4)[plan.partner]
    assert torch.allclose(hidden, want, atol=1e-6)
    given = policy.plan(x, partner=torch.tensor([3, 3, 3, 3]))
    assert given.partner.tolist() == [3, 3, 3, 3]
