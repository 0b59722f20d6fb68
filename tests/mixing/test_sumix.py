"""SUMix: its shares and its term against loops written from the equations, and what it must leave alone."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hardmix.losses import SoftCrossEntropyLoss
from hardmix.mixing import CutMix, FMix, ManifoldMixup, MixedTarget, Mixup, RandomChoice, Scheduled, SnapMix
from hardmix.mixing.sumix import SUMix
from mixing.cases import constant_rows, rng

CRITERION = SoftCrossEntropyLoss()


class Net(nn.Module):
    """A batch norm, dropout and a linear classifier on (N, 4) features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).tanh().mean((2, 3))))


def net(p: float = 0.0) -> Net:
    torch.manual_seed(0)
    model = Net()
    model.drop.p = p
    with torch.no_grad():
        model.head.weight.mul_(8.0)  # predictions that differ
    return model


def images(n: int = 5, size: tuple[int, int] = (6, 9)) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, *size, generator=rng()), torch.arange(n) % 3


def softmax(row: list[float]) -> list[float]:
    top = [math.exp(value - max(row)) for value in row]
    return [value / sum(top) for value in top]


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def step_by_hand(
    clean: Tensor,
    logits: Tensor,
    uncertain: Tensor,
    uncertain_mix: Tensor,
    target: MixedTarget,
    partner: Tensor,
    s: float,
) -> tuple[list[list[float]], float]:
    """Shares and term of one batch, one row at a time in double precision."""
    shares, total = [], 0.0
    for i in range(len(clean)):
        labels, weights = target.labels[i].tolist(), target.weights[i].double().tolist()
        p_mix, terms, left = softmax(logits[i].double().tolist()), 0.0, []
        u_mix = unit(softmax(uncertain_mix[i].double().tolist()))
        for k, row in enumerate((i, int(partner[i]))):
            p = softmax(clean[row].double().tolist())
            p[labels[1 - k]] = 0.0
            d = unit(softmax([a - b for a, b in zip(p_mix, p, strict=True)]))
            left.append(weights[k] * math.exp(-s * d[labels[k]]))
            u = unit(softmax(uncertain[row].double().tolist()))
            v = [math.exp(-(a + b + s * c)) for a, b, c in zip(u, u_mix, d, strict=True)]
            terms -= weights[k] * math.log(softmax(v)[labels[k]])
        shares.append([value / sum(left) for value in left])
        total += terms / len(clean)
    return shares, total


@pytest.mark.parametrize("scale", [1.0, 5.0, -2.0, 0.0])
@pytest.mark.parametrize("policy", [CutMix, Mixup, FMix])
def test_against_the_equations(policy: type, scale: float) -> None:
    model, (x, y) = net().double(), images()
    x = x.double()
    mix = SUMix(model, policy(), weight=0.3, scale=scale)
    assert mix.uncertainty is not None
    mix.uncertainty.double()
    with torch.no_grad():
        mix.uncertainty.weight.mul_(100.0)
    features: list[Tensor] = []
    model.head.register_forward_hook(lambda module, args, output: features.append(args[0]))
    for seed in range(3):
        features.clear()
        mixed, target = mix(x, y, generator=rng(seed))
        plan = policy().plan(x, y, generator=rng(seed))
        assert torch.equal(mixed, plan.blend(x))
        assert torch.equal(target.weights[:, 0], plan.lam)
        logits = model(mixed)
        clean = model.head(features[0])
        changed = mix.relabel(logits, target)
        term = mix.loss(CRITERION)
        shares, want = step_by_hand(
            clean, logits, mix.uncertainty(features[0]), mix.uncertainty(features[1]), target, plan.partner, scale
        )
        assert torch.equal(changed.labels, target.labels)
        assert changed.weights.dtype == torch.float32
        assert torch.allclose(changed.weights, torch.tensor(shares), atol=1e-6)
        assert term is not None
        assert term.item() == pytest.approx(0.3 * want, rel=1e-6)
        # the clean forward is what a training forward without dropout would give
        again = model(x)
        assert torch.allclose(again, clean, atol=1e-12)


def test_direction() -> None:
    """As the authors' code has it, what vanishes from the image gains; a scale below 0 turns that round."""

    class Told(nn.Module):
        """Class of the first pixel."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2, bias=False)
            nn.init.eye_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            first = x[:, 0, 0, 0]
            return self.head(30.0 * torch.stack([1 - first, first], 1))

    x, y = constant_rows(torch.tensor([0.0, 1.0]), (1, 8, 8)), torch.tensor([0, 1])
    for scale, gains in ((1.0, True), (-1.0, False), (0.0, None)):
        mix = SUMix(Told(), CutMix(), scale=scale)
        _, target = mix(x, y, generator=rng(3))
        changed = mix.relabel(torch.tensor([[-30.0, 30.0], [-30.0, 30.0]]), target)  # only class 1 is seen
        before, after = target.weights[0, 0], changed.weights[0, 0]  # the share of class 0 in row 0
        assert bool(after > before) is (gains is True)
        assert bool(after < before) is (gains is False)


def test_constant_images_are_blended_by_the_share_of_the_policy() -> None:
    """The shares that training sees differ from those of the pixels; those of the draw do not."""
    values = 2.0 ** -torch.arange(5)
    x = constant_rows(values, (2, 7, 4))
    mixed, target = SUMix(net(), CutMix())(x, torch.arange(5) % 3, generator=rng(1))
    partner = CutMix().plan(x, generator=rng(1)).partner
    lam = target.weights[:, 0]
    assert torch.allclose(mixed.mean((1, 2, 3)), lam * values + (1 - lam) * values[partner], atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model, (x, y) = net(p=0.5), images()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model(x).sum().backward()
    for frozen in (True, False):
        model.norm.train(not frozen)
        before = copy.deepcopy(model.state_dict())
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        state, kept = torch.get_rng_state(), x.clone()
        modes = [module.training for module in model.modules()]
        mix = SUMix(model, CutMix())
        state = torch.get_rng_state()  # the layer was initialised
        mix(x, y, generator=rng(1))
        assert torch.equal(state, torch.get_rng_state())
        assert modes == [module.training for module in model.modules()]
        assert torch.equal(x, kept)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            assert (parameter.grad is None) == (grad is None)
            assert grad is None or torch.equal(parameter.grad, grad)
        assert not model.conv.weight.requires_grad
        assert model.norm.track_running_stats


def test_gradients() -> None:
    """The shares carry none; the term trains the policy's layer and the features of the mixed batch."""
    model, (x, y) = net(), images()
    mix = SUMix(model, CutMix())
    names = [name for name, _ in mix.named_parameters()]
    assert names == ["uncertainty.weight", "uncertainty.bias"]
    mixed, target = mix(x, y, generator=rng(1))
    logits = model(mixed)
    target = mix.relabel(logits, target)
    assert not target.weights.requires_grad
    term = mix.loss(CRITERION)
    assert term is not None
    term.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in mix.parameters())
    assert model.conv.weight.grad is not None
    assert bool(model.conv.weight.grad.abs().sum() > 0)
    assert model.head.weight.grad is None  # the classifier itself is no part of the term
    optimizer = torch.optim.SGD([*model.parameters(), *mix.parameters()], lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        mixed, target = mix(x, y, generator=rng(seed))
        logits = model(mixed)
        loss = CRITERION(logits, mix.relabel(logits, target)) + mix.loss(CRITERION)
        loss.backward()
        optimizer.step()
        mix.after_step()
        assert bool(loss.isfinite())


def test_checkpointing_does_not_take_the_gradient_away() -> None:
    """A checkpoint that reenters autograd runs the model without gradients first: the term would not reach it."""

    def train(**kwargs: bool) -> Net:
        model, (x, y) = net(), images()
        torch.manual_seed(1)
        mix = SUMix(model, CutMix())
        mixed, target = mix(x.requires_grad_(), y, generator=rng(1))
        logits = checkpoint(model, mixed, **kwargs) if kwargs else model(mixed)
        loss = CRITERION(logits, mix.relabel(logits, target)) + mix.loss(CRITERION)
        loss.backward()
        return model

    for got, want in zip(train(use_reentrant=False).parameters(), train().parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)
    with pytest.raises(RuntimeError, match=r"SUMix: the model ran on the mixed batch without gradients, .* weight=0"):
        train(use_reentrant=True)


def test_autocast_does_not_take_the_gradient_away() -> None:
    """A weight that autocast casts in the clean forward must not be what the training forward uses."""
    model, (x, y) = net(), images()
    mix = SUMix(model, CutMix())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, target = mix(x, y, generator=rng(1))
        logits = model(mixed)
        target = mix.relabel(logits, target)
        loss = CRITERION(logits, target) + mix.loss(CRITERION)
    loss.backward()
    assert all(p.grad is not None for p in [*model.parameters(), *mix.parameters()])
    assert target.weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_types_sizes_and_seeds(dtype: torch.dtype) -> None:
    for n in (1, 2, 3):
        outs = []
        for seed in (2, 2, 3):
            model, (x, y) = net().to(dtype), images(n, (5, 7))
            mix = SUMix(model, CutMix(), weight=0.1, scale=3.0)
            mixed, target = mix(x.to(dtype), y, generator=rng(seed))
            logits = model(mixed)
            target = mix.relabel(logits, target)
            term = mix.loss(CRITERION)
            assert mixed.dtype == dtype
            assert bool((target.weights.sum(1) - 1).abs().max() < 1e-6)
            assert term is not None
            assert bool(term.isfinite())
            outs.append((mixed, target.weights, term))
        assert all(torch.equal(a, b) for a, b in zip(outs[0], outs[1], strict=True))
        assert n == 1 or not torch.equal(outs[0][1], outs[2][1])


def test_shares_of_nought_and_one_and_the_same_class() -> None:
    model, (x, _) = net(), images(4)
    mix = SUMix(model, Scheduled(CutMix(), start=0.5), scale=50.0)
    mixed, target = mix(x, torch.arange(4) % 3, generator=rng())
    assert torch.equal(mixed, x)
    logits = model(mixed)
    assert torch.equal(mix.relabel(logits, target).weights, torch.tensor([[1.0, 0.0]]).expand(4, 2))
    assert bool(mix.loss(CRITERION).isfinite())
    mix.set_progress(0.6)
    mixed, target = mix(x, torch.ones(4, dtype=torch.long), generator=rng())
    logits = model(mixed)
    changed = mix.relabel(logits, target)
    assert torch.allclose(changed.dense(3), target.dense(3), atol=1e-6)


def test_without_a_term() -> None:
    model, (x, y) = net(), images()
    mix = SUMix(model, RandomChoice([CutMix(), Mixup(), None]), weight=0.0)
    assert list(mix.parameters()) == []
    assert mix.state_dict() == {}
    mixed, target = mix(x, y, generator=rng(1))
    mix.relabel(model(mixed), target)
    assert mix.loss(CRITERION) is None
    flat = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # has no nn.Linear, needs none
    SUMix(flat, CutMix(), weight=0.0)(x, y)


def test_nan_predictions_spoil_their_row_only() -> None:
    model, (x, y) = net(), images()
    mix = SUMix(model, CutMix())
    mixed, target = mix(x, y, generator=rng(1))
    logits = model(mixed).detach().clone()
    logits[2] = float("nan")
    weights = mix.relabel(logits, target).weights
    assert weights.isnan().any(1).tolist() == [False, False, True, False, False]
    assert not bool(mix.loss(CRITERION).isfinite())


def test_forwards_that_are_not_the_training_forward() -> None:
    model, (x, y) = net(), images()
    mix = SUMix(model, CutMix())
    mixed, target = mix(x, y, generator=rng(1))
    model.eval()(x)
    model.train()
    logits = model(mixed)
    seen = mix._state.seen
    model(x)  # a further one changes nothing
    assert mix._state.seen is seen
    twin = copy.deepcopy(model)
    mix(x, y, generator=rng(1))
    twin(x)
    pickle.loads(pickle.dumps(model))(x)
    assert mix._state.seen is None
    mix.relabel(logits, target)
    with pytest.raises(
        RuntimeError, match="SUMix: loss has no batch; call the policy, then the model in training mode"
    ):
        mix.loss(CRITERION)
    mix.detach()
    assert len(model.head._forward_hooks) == 0


def test_copies_go_without_the_model() -> None:
    model, (x, y) = net(), images()
    mix = SUMix(model, CutMix())
    mix(x, y)
    for twin in (copy.deepcopy(mix), pickle.loads(pickle.dumps(mix))):
        with pytest.raises(RuntimeError, match=r"SUMix: this policy is a copy without its model; call attach\(model\)"):
            twin(x, y)
        other = net()
        twin.attach(other)
        mixed, target = twin(x, y, generator=rng(1))
        twin.relabel(other(mixed), target)
        assert twin.loss(CRITERION) is not None
        assert torch.equal(twin.uncertainty.weight, mix.uncertainty.weight)
    assert [name for name, _ in mix.named_modules()] == ["", "policy", "uncertainty"]
    assert "weight=0.1, scale=1, classifier=''" in repr(mix)


def test_refusals() -> None:
    model, (x, y) = net(), images()
    for bad, error, text in [
        ((model, "cutmix"), TypeError, "SUMix: policy is a str; pass a mixing policy"),
        (("net", CutMix()), TypeError, r"SUMix: model is a str; pass a torch\.nn\.Module"),
        ((nn.Sequential(nn.ReLU()), CutMix()), ValueError, r"SUMix: the model has no nn\.Linear inside"),
    ]:
        with pytest.raises(error, match=text):
            SUMix(*bad)
    for options, error, text in [
        ({"weight": -1.0}, ValueError, "SUMix: weight is -1.0; pass a finite number of at least 0"),
        ({"scale": float("nan")}, ValueError, "SUMix: scale is nan; pass a finite number"),
        ({"classifier": 3}, TypeError, "SUMix: classifier is 3; pass the name of a submodule"),
        ({"classifier": "haed"}, ValueError, r"classifier names 'haed', .* \(did you mean \"head\"\?\)"),
        ({"classifier": "conv"}, TypeError, r"classifier names 'conv', a Conv2d; pass that of an nn\.Linear"),
    ]:
        with pytest.raises(error, match=text):
            SUMix(model, CutMix(), **options)
    for hidden in (ManifoldMixup(model, ["conv"]), RandomChoice([CutMix(), ManifoldMixup(model, ["conv"])])):
        with pytest.raises(
            ValueError, match="SUMix: policy holds ManifoldMixup, which does more than to plan and blend"
        ):
            SUMix(model, hidden)
    mix = SUMix(model, CutMix())
    with pytest.raises(RuntimeError, match="SUMix: relabel has no batch to relabel; call the policy on a batch first"):
        mix.relabel(torch.rand(5, 3), MixedTarget(torch.zeros(5, 2).long(), torch.rand(5, 2)))
    with pytest.raises(RuntimeError, match="SUMix: loss has no batch"):
        mix.loss(CRITERION)
    with pytest.raises(TypeError, match=r"SUMix: x has dtype torch\.uint8"):
        mix(x.to(torch.uint8), y)
    with pytest.raises(ValueError, match=r"SUMix: y has shape \(5, 3\) and dtype torch\.float32; pass one class id"):
        mix(x, torch.rand(5, 3))
    with pytest.raises(ValueError, match="SUMix: y holds the class 3, but there are 3 classes"):
        mix(x, torch.arange(5))
    _, target = mix(x, y)
    with pytest.raises(
        ValueError, match=r"logits have shape \(4, 3\) and the target \(5, 2\), but the clean batch had"
    ):
        mix.relabel(torch.rand(4, 3), target)
    with pytest.raises(TypeError, match=r"SUMix: logits is a list; pass a torch\.Tensor"):
        mix.relabel([1.0], target)
    maps = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(2), nn.Linear(54, 2))
    with pytest.raises(ValueError, match=r"the model returned \(5, 3, 2\) for 5 samples; it has to return logits"):
        SUMix(maps, CutMix())(x, y)
    twice = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Unflatten(1, (4, 1)), nn.Linear(1, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"the classifier got \(5, 4, 1\) and the logits have shape \(5, 4\)"):
        SUMix(twice, CutMix())(x, y)


def test_a_policy_whose_weights_are_not_those_of_its_pixels_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="policy holds SnapMix, which does more than to plan and blend"):
        SUMix(model, SnapMix(model))
