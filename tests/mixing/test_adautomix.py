"""AdAutoMix: K images in one, a generator that works with the model and against it in turn."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hardmix.losses import DecoupledMixupLoss, SoftCrossEntropyLoss
from hardmix.mixing import MixedTarget
from hardmix.mixing.adautomix import AdAutoMix, Mixture
from hardmix.models.build import build_model
from mixing.cases import constant_rows, rng

CRITERION = SoftCrossEntropyLoss()
CLASSES = 5


def net(seed: int = 0, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = nn.BatchNorm2d(6) if norm else nn.Identity()
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), middle, nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, CLASSES),
    )


def make(model: nn.Module | None = None, **options: object) -> AdAutoMix:
    model = net() if model is None else model
    torch.manual_seed(7)
    return AdAutoMix(model, input_shape=(3, 16, 16), **{"clean": 0.0, "linear": 0.0, **options})


def batch(n: int = 6, size: tuple[int, int] = (16, 16), seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, *size, generator=rng(seed)), torch.arange(n) % CLASSES


def grown(policy: nn.Module) -> list[nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


# What is drawn


@pytest.mark.parametrize("label", ["mask", "drawn"])
@pytest.mark.parametrize("samples", [2, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (17, 23)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_mixture_blend_target(n: int, size: tuple[int, int], samples: int, label: str) -> None:
    policy = make(samples=samples, label=label)
    x, y = batch(n, size)
    before = x.clone()
    mixed, target = policy(x, y, generator=rng(3))
    mixture = policy.mixture(x, generator=rng(3))
    assert torch.equal(x, before)
    assert mixed.data_ptr() != x.data_ptr()
    assert torch.equal(mixed, mixture.blend(x))
    assert torch.equal(target.labels, y[mixture.partner])
    assert torch.equal(target.weights, mixture.share)
    assert not any(value.requires_grad for value in (mixed, *mixture))
    assert mixture.masks.shape == (n, samples, *size)
    assert mixture.partner.shape == mixture.share.shape == (n, samples)
    assert torch.allclose(mixture.masks.sum(1), torch.ones(n, *size), atol=1e-6)
    assert torch.allclose(mixture.share.sum(1), torch.ones(n), atol=1e-6)
    assert torch.equal(mixture.partner[:, 0], torch.arange(n))  # the row's own share comes first
    for column in mixture.partner.T:
        assert torch.equal(column.sort().values, torch.arange(n))
    if n >= samples:
        assert all(len(set(row)) == samples for row in mixture.partner.tolist())
    if label == "mask":
        assert torch.allclose(mixture.share, mixture.masks.mean((2, 3)), atol=1e-6)
    for i in range(n):
        by_hand = sum(
            mixture.masks[i, k].double() * x[mixture.partner[i, k]].double() for k in range(samples)
        )  # (3, H, W)
        assert np.abs(mixed[i].double().numpy() - by_hand.numpy()).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_constant_images_show_their_shares(dtype: torch.dtype) -> None:
    policy = make()
    values = 2.0 ** -torch.arange(5, dtype=torch.float64)
    x = constant_rows(values, (3, 12, 20)).to(dtype)
    mixed, target = policy(x, torch.arange(5), generator=rng(1))
    want = (target.weights.double() * values[target.labels]).sum(1)
    slack = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 3e-7)
    assert mixed.dtype == dtype
    assert (mixed.double().mean((1, 2, 3)) - want).abs().max() <= slack
    loss = policy.loss(CRITERION)
    assert loss is not None
    assert bool(loss.isfinite())


def test_shares_are_scaled_betas() -> None:
    policy = make(alpha=1.0, label="drawn", margin=0.0)
    x = torch.rand(400, 3, 4, 4)
    drawn = torch.cat([policy.mixture(x, generator=rng(seed)).share for seed in range(10)])
    assert torch.allclose(drawn.mean(0), torch.full((3,), 1 / 3), atol=0.01)
    numbers = np.random.default_rng(0).random((200_000, 3))
    expected = numbers[:, 0] / numbers.sum(1)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(drawn[:, 1].numpy(), q) == pytest.approx(np.quantile(expected, q), abs=0.02)
    tiny = make(alpha=1e-4, label="drawn").mixture(x, generator=rng(1)).share
    assert bool(tiny.isfinite().all())
    assert torch.allclose(tiny.sum(1), torch.ones(400), atol=1e-6)
    together = make(per="batch", label="drawn").mixture(x, generator=rng(1)).share
    assert len(together.unique(dim=0)) == 1


def test_small_shares_are_mixed_as_a_whole() -> None:
    x, _ = batch(64)
    drawn = make(label="drawn").mixture(x, generator=rng(1)).share
    mixture = make(margin=0.1).mixture(x, generator=rng(1))
    whole = drawn.amin(1) <= 0.1
    assert 5 < int(whole.sum()) < 60
    assert torch.equal(mixture.masks[whole], drawn[whole][..., None, None].expand(-1, -1, 16, 16))
    assert torch.equal(mixture.share[whole], drawn[whole])
    assert mixture.masks[~whole].std((2, 3)).min() > 1e-4


def test_masks_come_from_all_images() -> None:
    policy, (x, _) = make(net(norm=False), margin=0.0, label="drawn"), batch(5)
    mixture = policy.mixture(x, generator=rng(2))
    maps = policy.teacher.model[0](x)
    for i, rows in enumerate(mixture.partner):
        want = policy.block(maps[rows][None], mixture.share[i : i + 1], (16, 16))
        assert torch.allclose(mixture.masks[i : i + 1], want, atol=1e-6)


def test_draws_follow_the_generator() -> None:
    policy, (x, y) = make(), batch()
    first, again, other = (policy(x, y, generator=rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    mixed, target = policy(x, y, generator=rng(1))
    want = policy.loss(CRITERION)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same, labels = policy(x, y, generator=rng(1))
        loss = policy.loss(CRITERION)
    assert torch.equal(same, mixed)
    assert torch.equal(labels.weights, target.weights)
    assert loss is not None
    assert want is not None
    assert loss.item() == pytest.approx(want.item(), abs=0.05)


def test_labels_of_every_kind() -> None:
    mixture = Mixture(
        torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]]),
        torch.full((3, 3), 1 / 3),
        torch.rand(3, 3, 4, 6, generator=rng()).softmax(1),
    )
    ids = torch.tensor([4, 0, 2], dtype=torch.int32)
    assert mixture.target(ids).labels.tolist() == [[4, 0, 2], [0, 2, 4], [2, 4, 0]]
    assert mixture.target(ids).labels.dtype == torch.long
    soft = torch.rand(3, CLASSES)
    assert torch.equal(mixture.target(soft).labels[1, 2], soft[0])
    dense = torch.randint(CLASSES, (3, 4, 6))
    target = mixture.target(dense)
    assert torch.equal(target.labels[2, 1], dense[0])
    assert torch.equal(target.weights, mixture.masks)
    x = dense[:, None].double()
    assert torch.allclose((target.labels * target.weights).sum(1).double(), mixture.blend(x)[:, 0], atol=1e-5)
    assert target.dense(CLASSES).shape == (3, CLASSES, 4, 6)
    for wrong, kind in (
        (dense[:, :2], "auto"),
        (dense.float(), "auto"),
        (dense.float(), "mask"),
        (soft.long(), "mask"),
    ):
        with pytest.raises(ValueError, match=r"Mixture.target: y has shape .*; pass \(N,\) or \(N, C\) labels, or int"):
            mixture.target(wrong, kind=kind)
    with pytest.raises(ValueError, match=r"Mixture\.target: kind is 'masks'; pass one of"):
        mixture.target(ids, kind="masks")


# What trains the generator


def loss_by_hand(policy: AdAutoMix, criterion: nn.Module, hard: bool) -> Tensor:
    """Row by row, from the definition, for a network without batch normalisation."""
    x, y, _, maps, _, partner, lam, _ = policy._pending
    losses, similar = [], []
    for i, rows in enumerate(partner.tolist()):
        masks = policy.block(maps[rows][None], lam[i : i + 1], tuple(x.shape[2:]))[0]
        mixed = sum(masks[k] * x[j] for k, j in enumerate(rows))
        logits = policy.teacher.model(mixed[None])
        losses.append(criterion(logits, MixedTarget(y[rows][None], lam[i : i + 1])))
        for k, j in enumerate(rows):
            clean = policy.teacher.model(x[j : j + 1])[0]
            similar.append(lam[i, k] * (logits[0] @ clean) / (logits[0] @ logits[0]).sqrt() / (clean @ clean).sqrt())
    mce, cosine = sum(losses) / len(losses), sum(similar) / len(losses)
    return policy.cosine * cosine - policy.adversarial * mce if hard else mce


@pytest.mark.parametrize("criterion", [CRITERION, DecoupledMixupLoss(eta=0.5)], ids=["mce", "dm"])
@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_loss_and_its_gradient(interval: int, samples: int, criterion: nn.Module) -> None:
    options = {"samples": samples, "interval": interval, "adversarial": 0.4, "cosine": -0.6}
    policy = make(net(norm=False).double(), **options).double()
    x, y = batch(7, (16, 20))
    x = 20 * (x.double() - 0.5)  # strong enough for masks with contrast
    for step in range(2 * interval):
        policy(x, y, generator=rng(4))
        want = loss_by_hand(policy, criterion, step % interval == interval - 1)
        by_hand = torch.autograd.grad(want, grown(policy))
        loss = policy.loss(criterion)
        assert loss is not None
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)
        for mine, expected in zip(torch.autograd.grad(loss, grown(policy)), by_hand, strict=True):
            assert torch.allclose(mine, expected, atol=1e-7)
            # The bias of the key moves all of a place's scores alike, and the bias of the value all masks.
            assert mine.abs().max() > 0 or mine.ndim == 1
        policy.after_step()
    assert policy.step == 2 * interval


def test_parts_of_an_accumulated_batch_are_alike() -> None:
    """Steps are counted, not calls."""
    policy, (x, y) = make(adversarial=10.0, cosine=0.0), batch()
    signs = []
    for _ in range(4):
        for _ in range(2):
            policy(x, y)
            loss = policy.loss(CRITERION)
            assert loss is not None
            signs.append(loss.item() > 0)
        policy.after_step()
    assert signs == [True, True, False, False] * 2


def test_who_gets_gradients_and_who_is_left_alone() -> None:
    model, (x, y) = net(), batch()
    policy = make(model, interval=1)
    state, slow = copy.deepcopy(model.state_dict()), copy.deepcopy(policy.teacher.state_dict())
    mixed, target = policy(x, y, generator=rng(1))
    extra = policy.loss(CRITERION)
    assert policy.loss(CRITERION) is None
    for found, want in ((model.state_dict(), state), (policy.teacher.state_dict(), slow)):
        assert all(torch.equal(found[key], want[key]) for key in want)
    CRITERION(model(mixed), target).backward()
    assert all(p.grad is None for p in policy.parameters())
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(kept) == len(list(model.parameters()))
    assert extra is not None
    extra.backward()
    assert all(p.grad is not None for p in policy.block.parameters())
    assert all(p.grad is None for p in policy.teacher.parameters())
    for p, before in zip(model.parameters(), kept, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, before)


def test_the_signs_do_what_they_say() -> None:
    """Trained on one kind of step only, the mixtures of the same draws get easier, or harder."""
    x = torch.randn(24, 3, 16, 16, generator=rng()) * torch.linspace(0.2, 3, 24).view(-1, 1, 1, 1)
    y = torch.arange(24) % CLASSES
    model = net(1)
    with torch.no_grad():
        model[-1].weight *= 10
    ends = {}
    for name, options in {
        "easy": {"interval": 10**6},
        "hard": {"interval": 1, "adversarial": 1.0, "cosine": 0.0},
    }.items():
        policy = make(model, momentum=1.0, **options)
        optimizer = torch.optim.Adam(grown(policy), lr=0.03)
        for step in range(31):
            policy(x, y, generator=rng(step % 3))
            loss = policy.loss(CRITERION)
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 0:
                ends["start"] = abs(loss.item())
        ends[name] = abs(loss.item())
    assert ends["easy"] < ends["start"] - 0.01
    assert ends["hard"] > ends["start"] + 0.01


def test_the_loss_and_the_step_never_wait_for_the_device() -> None:
    class NoValues(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def criterion(logits: Tensor, target: MixedTarget) -> Tensor:
        return -(logits.log_softmax(1).gather(1, target.labels) * target.weights).sum(1).mean()

    policy, (x, y) = make(), batch()
    policy(x, y)
    with NoValues():
        assert policy.loss(criterion) is not None
        policy.after_step()


# State


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    def start(seed: int) -> tuple[nn.Module, AdAutoMix, torch.optim.Optimizer]:
        model = net(seed)
        policy = AdAutoMix(model, input_shape=(3, 16, 16), momentum=0.9)
        return model, policy, torch.optim.SGD([*model.parameters(), *grown(policy)], lr=0.1, momentum=0.9)

    def step(model: nn.Module, policy: AdAutoMix, optimizer: torch.optim.Optimizer, k: int) -> None:
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
    for k in range(3):  # the step after this one is adversarial
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


def test_state_copies_and_models() -> None:
    model, (x, y) = net(), batch()
    policy = make(model, momentum=0.5)
    assert {id(p) for p in grown(policy)} == {id(p) for p in policy.block.parameters()}
    assert {key.split(".")[0] for key in policy.state_dict()} == {"teacher", "block", "step"}
    assert "samples=3" in repr(policy)
    mixed, _ = policy(x, y, generator=rng(1))
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin.loss(CRITERION) is None
        assert torch.equal(twin(x, y, generator=rng(1))[0], mixed)
        if twin.asked is None:
            with pytest.raises(
                RuntimeError, match="AdAutoMix: this policy was unpickled without its model; call attach"
            ):
                twin.after_step()
            twin.attach(model)
        assert twin.asked is model
        twin.after_step()
        assert twin.step == 1
    assert policy.step == 0


def test_what_the_model_is_trained_with_besides() -> None:
    model, (x, y) = net(norm=False), batch()
    model.eval()  # no dropout
    rest = make(model)
    rest(x, y, generator=rng(1))
    others = rest.loss(CRITERION)
    partner, share, _ = make(model, label="drawn").mixture(x, generator=rng(1))
    whole = (x[partner] * share[..., None, None, None]).sum(1)
    clean, linear = CRITERION(model(x), y), CRITERION(model(whole), MixedTarget(y[partner], share))
    for weights in ((0.0, 0.7), (0.3, 0.0), (0.3, 0.7)):
        policy = make(model, clean=weights[0], linear=weights[1])
        policy(x, y, generator=rng(1))
        loss = policy.loss(CRITERION)
        assert torch.allclose(loss - others, weights[0] * clean + weights[1] * linear, atol=1e-5), weights
        got = torch.autograd.grad(loss, model[4].weight)[0]
        want = torch.autograd.grad(weights[0] * clean + weights[1] * linear, model[4].weight, retain_graph=True)[0]
        assert torch.allclose(got, want, atol=1e-6)
    policy = AdAutoMix(net().double(), input_shape=(3, 16, 16))
    assert (policy.clean, policy.linear) == (0.5, 0.5)
    masks = y[:, None, None].expand(-1, 16, 16)
    policy(x.half(), y, generator=rng(1))
    assert policy.loss(CRITERION).isfinite()
    policy(x, masks)
    policy.disarm()
    assert policy.loss(CRITERION) is None


@pytest.mark.parametrize("name", ["small-resnet", "tiny-vit"])
def test_models_of_this_package(name: str) -> None:
    torch.manual_seed(0)
    options = {"width": 4} if name == "small-resnet" else {"dim": 16}
    model = build_model(name, num_classes=CLASSES, in_channels=1, image_size=16, **options)
    policy = AdAutoMix(model, input_shape=(1, 16, 16))
    assert policy.teacher.layer == "stage3"
    x, y = torch.rand(4, 1, 16, 16, generator=rng()), torch.arange(4)
    for _ in range(2):
        mixed, target = policy(x, y, generator=rng())
        loss = policy.loss(CRITERION)
        assert loss is not None
        (DecoupledMixupLoss()(model(mixed), target) + loss).backward()
        policy.after_step()
    assert all(p.grad is not None for p in policy.block.parameters())


# Refusals


def test_bad_input() -> None:
    policy, (x, y) = make(), batch(4)
    with pytest.raises(
        NotImplementedError, match=r"AdAutoMix: a plan has one partner but 3 samples are mixed; call mix"
    ):
        policy.plan(x)
    with pytest.raises(TypeError, match=r"AdAutoMix: x has dtype torch.uint8, through which the mask block can't be"):
        policy((x * 255).to(torch.uint8), y)
    for shape in ((4, 3, 16), (4, 3, 5, 6, 7), (4, 3)):
        with pytest.raises(ValueError, match=r"AdAutoMix: x has shape .*; pass a batch with 4 axes"):
            policy(torch.rand(shape), y)
        with pytest.raises(ValueError, match=r"AdAutoMix: x has shape .*; pass a batch with 4 axes"):
            policy.mixture(torch.rand(shape))
    with pytest.raises(ValueError, match=r"y has 3 entries but x has 4 rows"):
        policy(x, y[:3])
    with pytest.raises(TypeError, match=r"y is a list; pass a torch\.Tensor\."):
        policy(x, [0, 1, 2, 3])
    with pytest.raises(TypeError, match=r"generator is a int; pass a torch\.Generator or None\."):
        policy(x, y, generator=3)
    bad = x.clone()
    bad[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"x holds NaN or infinity in rows 2"):
        policy(bad, y)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"samples": 1}, ValueError, "samples is 1; pass an integer of at least 2"),
        ({"samples": 2.5}, ValueError, "samples is 2.5; pass an integer of at least 2"),
        ({"interval": 0}, ValueError, "interval is 0; pass an integer of at least 1"),
        ({"adversarial": -0.3}, ValueError, "adversarial is -0.3; pass a finite number of at least 0"),
        ({"cosine": math.nan}, ValueError, "cosine is nan; pass a finite number"),
        ({"per": "pair"}, ValueError, "per is 'pair'; pass one of 'batch', 'sample'"),
        ({"alpha": 0.0}, ValueError, "alpha is 0.0; pass a finite number greater than 0"),
        ({"upsample": "cubic"}, ValueError, "upsample is 'cubic'; pass one of 'nearest', 'bilinear'"),
        ({"label": "lam"}, ValueError, "label is 'lam'; pass one of 'mask', 'drawn'"),
        ({"margin": 2.0}, ValueError, "margin is 2.0; pass a number from 0 to 1"),
    ],
    ids=str,
)
def test_bad_settings(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=rf"\w+: {text}"):
        make(**options)
