"""Mixed pairs of labelled and unlabelled samples: whose share is small, what the pixels show, and the loss."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.losses import DecoupledMixupLoss, SoftBCELoss, SoftCrossEntropyLoss
from hardmix.mixing import (
    AugMix,
    CutMix,
    FMix,
    GridMix,
    ManifoldMixup,
    MixedTarget,
    Mixup,
    RandomChoice,
    ResizeMix,
    SaliencyMix,
    SmoothMix,
)
from hardmix.semi import FixMatch, FlexMatch, MixedPairs, MixMatch
from hardmix.semi.pairs import POLICIES, partners
from tests.losses import slow_classification as slow
from tests.semi.cases import CLASSES, draw, logits, net, rng

ALL = {
    "mixup": lambda: Mixup(0.2),
    "mixup-pair": lambda: Mixup(0.2, per="pair"),
    "mixup-batch": lambda: Mixup(1.0, per="batch"),
    "cutmix": lambda: CutMix(0.2),  # its boxes are cut at the border
    "cutmix-inside": lambda: CutMix(0.2, inside=True),
    "smoothmix": SmoothMix,
    "fmix": lambda: FMix(0.2),
    "gridmix": lambda: GridMix(0.2),
    "resizemix": ResizeMix,
    "resizemix-pair": lambda: ResizeMix(per="pair"),
}


def constant(values: list[float], shape: tuple[int, ...] = (2, 13, 10)) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()


def test_every_policy_that_is_allowed_is_tested() -> None:
    assert {type(make()) for make in ALL.values()} == set(POLICIES)


@pytest.mark.parametrize("share", ["small", "large", "any"])
@pytest.mark.parametrize("name", ALL)
def test_the_labelled_share_is_what_the_pixels_show_and_on_its_side(name: str, share: str) -> None:
    """Labelled images are white, the others black: the mean of a mixed one is the labelled share."""
    pairs = MixedPairs(ALL[name](), share=share)
    shares = []
    for n in (1, 2, 7):
        x, u = constant([1.0] * n), constant([0.0] * n)
        y, pseudo = torch.arange(n), torch.arange(n) + 20
        for seed in range(12):
            mixed, (labels, weights) = pairs.mix(x, y, u, pseudo, generator=rng(seed))
            seen = mixed.flatten(1).mean(1)
            torch.testing.assert_close(seen, weights[:, 0].double(), rtol=0, atol=2e-6)
            assert torch.equal(labels, torch.stack([y, pseudo], 1))
            torch.testing.assert_close(weights.sum(1), torch.ones(n))
            shares += weights[:, 0].tolist()
    assert len({round(s, 6) for s in shares}) > 10
    if share == "small":
        assert max(shares) <= 0.5
    elif share == "large":
        assert min(shares) >= 0.5
    elif name not in ("resizemix", "resizemix-pair"):
        assert min(shares) < 0.5 < max(shares)


@pytest.mark.parametrize("share", ["small", "large"])
def test_clipped_boxes_change_places(share: str) -> None:
    """Without a look after the mask most labelled samples of this policy would be on the wrong side."""
    policy = CutMix(0.2)
    n = 400
    plan = policy.plan(constant([0.0] * 2 * n, (1, 16, 16)), generator=rng(3), partner=torch.arange(2 * n).roll(n))
    small = float((plan.lam[:n] <= 0.5).float().mean())
    assert small < 0.45
    pairs = MixedPairs(policy, share=share)
    x, u, y = constant([1.0] * n, (1, 16, 16)), constant([0.0] * n, (1, 16, 16)), torch.zeros(n, dtype=torch.long)
    mixed, target = pairs.mix(x, y, u, y, generator=rng(3))
    want = torch.minimum(plan.lam[:n], 1 - plan.lam[:n])
    want = want if share == "small" else 1 - want
    torch.testing.assert_close(target.weights[:, 0], want)
    torch.testing.assert_close(mixed.flatten(1).mean(1).float(), want)


@pytest.mark.parametrize("name", ALL)
def test_pixels_are_of_the_two_samples_of_the_pair(name: str) -> None:
    pairs = MixedPairs(ALL[name]())
    x, u = constant([2.0, 4.0, 6.0]), constant([3.0, 5.0, 7.0])
    y = torch.arange(3)
    before = x.clone(), u.clone()
    mixed, target = pairs.mix(x, y, u, y, generator=rng(1))
    lam = target.weights[:, :1].double()
    want = lam[:, 0] * x[:, 0, 0, 0] + (1 - lam[:, 0]) * u[:, 0, 0, 0]
    torch.testing.assert_close(mixed.flatten(1).mean(1), want, rtol=1e-6, atol=0)
    assert bool((mixed >= x - 1e-6).all())
    assert bool((mixed <= u + 1e-6).all())
    assert torch.equal(x, before[0])
    assert torch.equal(u, before[1])
    again, same = pairs.mix(x, y, u, y, generator=rng(1))
    assert torch.equal(again, mixed)
    assert torch.equal(same.weights, target.weights)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "fmix"])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_the_loss_against_the_slow_one(name: str, asymmetric: bool) -> None:
    """Asymmetric: only the labelled class is decoupled, with the pseudo-class as the competitor that is taken out."""
    shape = (1, 2, 3)
    model = nn.Sequential(nn.Flatten(), net())
    pairs = MixedPairs(ALL[name](), DecoupledMixupLoss(eta=0.7, asymmetric=asymmetric), weight=1.5, ramp=0.5)
    for seed, (labelled, unlabelled) in enumerate([(4, 9), (4, 4), (5, 2), (1, 1)]):
        batch = draw(seed, labelled=labelled, unlabelled=unlabelled, shape=shape)
        u, g = batch.views[0], rng(seed)
        pseudo = torch.randint(CLASSES, (unlabelled,), generator=g)
        trust = torch.rand(unlabelled, generator=g).double().round(decimals=1)
        pairs.set_progress(0.2)
        got = pairs(model, batch.x, batch.y, u, pseudo, trust, generator=rng(seed + 50))
        g = rng(seed + 50)
        rows = partners(labelled, unlabelled, g)
        mixed, target = pairs.mix(batch.x, batch.y, u[rows], pseudo[rows], generator=g)
        losses = []
        for i, z in enumerate(logits(model, mixed)):
            classes = [batch.y[i].item(), pseudo[rows[i]].item()]
            row = slow.mixed_row(z, classes, target.weights[i].tolist(), eta=0.7, asymmetric=asymmetric)
            losses.append(trust[rows[i]].item() * row)
        ramp = 0.5 * (1 - math.cos(math.pi * 0.2 / 0.5))
        assert got.item() == pytest.approx(1.5 * ramp * np.mean(losses), rel=1e-6)


def test_the_default_is_the_papers() -> None:
    pairs = MixedPairs()
    assert isinstance(pairs.policy, Mixup)
    assert isinstance(pairs.objective, DecoupledMixupLoss)
    assert (pairs.objective.eta, pairs.objective.asymmetric) == (1.0, True)
    assert (pairs.weight, pairs.ramp, pairs.share, pairs.confident) == (1.0, 1.0, "small", True)
    z = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
    loss = pairs.objective(z, MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]])))
    assert loss.item() == pytest.approx(1.195182 + 0.241311, abs=1e-6)


def test_same_class_is_plain_cross_entropy() -> None:
    batch, model = draw(), net()
    classes = torch.full((6,), 2)
    trust = torch.ones(6, dtype=torch.float64)
    losses = [
        MixedPairs(Mixup(1.0), objective, ramp=0.0)(
            model, batch.x, classes[:3], batch.views[0], classes, trust, generator=rng()
        )
        for objective in (DecoupledMixupLoss(eta=5.0, asymmetric=True), SoftCrossEntropyLoss())
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_only_trusted_pairs_count() -> None:
    batch, model = draw(labelled=6), net()
    pseudo = torch.zeros(6, dtype=torch.long)

    def loss(trust: list[float], **options: object) -> float:
        pairs = MixedPairs(ramp=0.0, **options)
        weights = torch.tensor(trust, dtype=torch.float64)
        return pairs(model, batch.x, batch.y, batch.views[0], pseudo, weights, generator=rng(2)).item()

    everything, none = loss([1.0] * 6), loss([0.0] * 6)
    assert everything > 0.0
    assert none == 0.0
    assert loss([0.5] * 6) == pytest.approx(everything / 2)
    # the mean is over all pairs, those that don't count included
    each = [loss([float(i == k) for i in range(6)]) for k in range(6)]
    assert sum(each) == pytest.approx(everything)
    assert all(0.0 < value < everything for value in each)
    assert loss([0.0] * 6, confident=False) == pytest.approx(everything)


def test_an_untrusted_batch_leaves_the_weights_where_they_are() -> None:
    batch, model = draw(), net()
    pairs = MixedPairs(ramp=0.0)
    loss = pairs(model, batch.x, batch.y, batch.views[0], torch.zeros(6, dtype=torch.long), torch.zeros(6).double())
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_ramp() -> None:
    batch, model = draw(), net()
    pseudo, trust = torch.zeros(6, dtype=torch.long), torch.ones(6).double()

    def loss(progress: float, ramp: float) -> float:
        pairs = MixedPairs(ramp=ramp)
        pairs.set_progress(progress)
        return pairs(model, batch.x, batch.y, batch.views[0], pseudo, trust, generator=rng()).item()

    whole = loss(1.0, 1.0)
    assert loss(0.0, 1.0) == 0.0
    assert loss(0.0, 0.0) == whole
    assert loss(0.5, 1.0) == pytest.approx(whole / 2)
    assert loss(0.2, 0.4) == pytest.approx(whole / 2)
    assert loss(0.4, 0.4) == loss(0.9, 0.4) == whole
    with pytest.raises(ValueError, match=r"MixedPairs: fraction is 2; pass a number from 0 to 1\."):
        MixedPairs().set_progress(2)


def test_partners_are_drawn_without_repetition_where_there_are_enough() -> None:
    for count, rows in ((3, 8), (8, 8), (1, 5)):
        drawn = [partners(count, rows, rng(seed)) for seed in range(60)]
        assert all(len(set(row.tolist())) == len(row) == count for row in drawn)
        assert set(torch.cat(drawn).tolist()) == set(range(rows))
    for count, rows in ((8, 3), (7, 2), (5, 1)):
        drawn = partners(count, rows, rng())
        times = torch.bincount(drawn, minlength=rows)
        assert len(drawn) == count
        assert int(times.max() - times.min()) <= 1
    assert not torch.equal(partners(8, 8, rng(1)), partners(8, 8, rng(2)))


def test_gradient_flows_to_the_model_and_both_samples_but_not_to_the_weights() -> None:
    batch, model = draw(), net()
    x, u = batch.x.requires_grad_(), batch.views[0].requires_grad_()
    trust = torch.ones(6, dtype=torch.float64)
    loss = MixedPairs(ramp=0.0)(model, x, batch.y, u, torch.zeros(6, dtype=torch.long), trust, generator=rng())
    grads = torch.autograd.grad(loss, [x, u, *model.parameters()])
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert all(bool(grad.any()) for grad in grads)
    assert int(grads[1].any(1).sum()) == 3  # each labelled sample meets one


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_types(dtype: torch.dtype) -> None:
    batch, model = draw(shape=(1, 2, 3)), nn.Sequential(nn.Flatten(), net()).to(dtype)
    for name in ("mixup", "cutmix", "resizemix"):
        pairs = MixedPairs(ALL[name](), ramp=0.0)
        loss = pairs(
            model, batch.x.to(dtype), batch.y, batch.views[0].to(dtype), torch.zeros(6, dtype=torch.long), torch.ones(6)
        )
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())


def test_features_can_be_mixed_and_series_and_volumes() -> None:
    for shape in ((6,), (2, 3), (1, 2, 3), (1, 1, 2, 3)):
        for policy in (Mixup(1.0), CutMix(inside=True)):
            if len(shape) == 1 and isinstance(policy, CutMix):
                continue
            batch = draw(shape=shape)
            mixed, _ = MixedPairs(policy).mix(batch.x, batch.y, batch.views[0][:3], batch.y, generator=rng())
            assert mixed.shape == batch.x.shape


@pytest.mark.parametrize("kind", [FixMatch, FlexMatch, MixMatch])
def test_algorithms_take_them(kind: type) -> None:
    given = {"num_classes": CLASSES, "num_unlabelled": 20} if kind is FlexMatch else {}
    batch = draw()
    algorithm = kind(pairs=MixedPairs(confident=False), **given)
    algorithm.set_progress(0.5)
    output = algorithm(net(), batch, generator=rng())
    plain = kind(**given)
    plain.set_progress(0.5)
    alone = plain(net(), batch, generator=rng())
    assert "pair" not in alone.parts
    assert output.parts["pair"] > 0
    assert not output.parts["pair"].requires_grad
    torch.testing.assert_close(output.loss, alone.loss + output.parts["pair"])


def test_state_copies_and_settings() -> None:
    pairs = MixedPairs(CutMix(0.3, inside=True), SoftCrossEntropyLoss(), weight=2.0, share="any", confident=False)
    assert pairs.state_dict() == {}
    assert list(pairs.parameters()) == []
    assert copy.deepcopy(pairs).share == "any"
    assert "weight=2, ramp=1, share='any', confident=False" in repr(pairs)
    hidden = ManifoldMixup(nn.Sequential(nn.Linear(2, 2)), ["0"])
    for policy in (SaliencyMix(), AugMix(), RandomChoice([Mixup(), CutMix()]), hidden):
        with pytest.raises(
            ValueError, match=rf"MixedPairs: policy is {type(policy).__name__}, which looks at pixels or"
        ):
            MixedPairs(policy)
    for options, error, text in [
        (
            {"objective": SoftBCELoss()},
            TypeError,
            r"MixedPairs: objective is a SoftBCELoss; pass DecoupledMixupLoss or",
        ),
        ({"weight": -1}, ValueError, r"MixedPairs: weight is -1; pass a finite number of at least 0\."),
        ({"ramp": 1.5}, ValueError, r"MixedPairs: ramp is 1\.5; pass a number from 0 to 1\."),
        ({"share": "half"}, ValueError, r"MixedPairs: share is 'half'; pass one of 'small', 'large', 'any'"),
        ({"confident": 1}, TypeError, r"MixedPairs: confident is 1; pass True or False\."),
    ]:
        with pytest.raises(error, match=text):
            MixedPairs(**options)


def test_the_default_device_changes_no_draw() -> None:
    batch, model = draw(), net()
    want = FixMatch(pairs=MixedPairs())(model, batch, generator=rng(1)).loss
    algorithm, generator = FixMatch(pairs=MixedPairs()), rng(1)
    with torch.device("meta"):  # for any device that the samples are not on
        assert algorithm(model, batch, generator=generator).loss == want
