"""RandomChoice and Scheduled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from hardmix.mixing import (
    AugMix,
    CutMix,
    FMix,
    GridMix,
    MixPlan,
    Mixup,
    RandomChoice,
    ResizeMix,
    SaliencyMix,
    Scheduled,
    SmoothMix,
)
from hardmix.mixing.choice import combine, more_than_plans
from mixing.cases import blend_by_hand, own_share, rng

X = torch.rand(6, 3, 12, 15, generator=rng())


def kind(plan: MixPlan) -> str:
    if plan.mask is not None:
        return "cutmix"
    return "none" if bool((plan.lam == 1).all()) else "mixup"


def test_probabilities_per_batch() -> None:
    mix = RandomChoice([Mixup(), CutMix(), None], p=[5, 3, 2])
    generator = rng(1)
    counts = {"mixup": 0, "cutmix": 0, "none": 0}
    for _ in range(2000):
        counts[kind(mix.plan(X, generator=generator))] += 1
    assert stats.chisquare(list(counts.values()), [1000, 600, 400]).pvalue > 1e-4


def test_probabilities_per_sample() -> None:
    mix = RandomChoice([Mixup(alpha=5.0), CutMix(alpha=5.0), "none"], p=[0.5, 0.3, 0.2], per="sample")
    plan = mix.plan(torch.zeros(6000, 1, 6, 6), generator=rng(2))
    assert plan.mask is not None
    mask = plan.mask.flatten(1)
    constant = (mask == mask[:, :1]).all(1)
    none = constant & (mask[:, 0] == 1) & (plan.partner == torch.arange(6000))
    mixup = constant & ~none
    counts = [int(mixup.sum()), int((~constant).sum()), int(none.sum())]
    # a CutMix box may be empty or full (seen as "mixup" by its constant mask), at 36 pixels in few rows
    assert stats.chisquare(counts, [3000, 1800, 1200]).pvalue > 1e-4


def test_all_alike_without_p() -> None:
    assert RandomChoice([Mixup(), CutMix()]).p == (0.5, 0.5)


def test_combined_rows_are_the_policies_rows() -> None:
    """Row i of the combined plan is row i of the plan that was chosen for it, in every kind of plan there is."""
    from hardmix.mixing.draw import draw_partner

    pairing = draw_partner(6, "permutation", rng(3))
    policies = [Mixup(), CutMix(), SmoothMix(), GridMix(), FMix(), ResizeMix(), SaliencyMix(), AugMix()]
    plans = [policy.draw(X, None, pairing, rng(k)) for k, policy in enumerate(policies)]
    plans.append(MixPlan.identity(6))
    blends = [plan.blend(X) for plan in plans]
    for seed in range(6):
        choice = torch.randint(0, len(plans), (6,), generator=rng(seed))
        plan = combine(plans, choice, X)
        mixed = plan.blend(X)
        for i, k in enumerate(choice.tolist()):
            assert torch.allclose(mixed[i], blends[k][i], atol=1e-5), (i, k)
            assert plan.lam[i] == pytest.approx(float(plans[k].lam[i]), abs=1e-6)
            assert int(plan.partner[i]) == int(plans[k].partner[i])
        assert plan.mask is not None
        bits = ((plan.mask == 0) | (plan.mask == 1)).flatten(1).all(1)  # a soft mask is rounded pixel by pixel
        assert ((plan.lam - own_share(plan.mask)).abs() <= torch.where(bits, 0.0, 1e-6)).all()
        np.testing.assert_allclose(mixed.double().numpy(), blend_by_hand(X, plan), atol=1e-5)


def test_only_shares_stay_shares() -> None:
    plan = RandomChoice([Mixup(), None], per="sample").plan(X, generator=rng())
    assert plan.mask is None
    assert torch.allclose(plan.blend(torch.rand(6, 4)), plan.blend(torch.rand(6, 4)), atol=1)


def test_shared_partner_per_sample() -> None:
    mix = RandomChoice([Mixup(per="pair"), CutMix()], per="sample")
    assert mix.pairing == "matching"
    plan = mix.plan(X, generator=rng(4))
    assert torch.equal(plan.partner[plan.partner], torch.arange(6))


def test_nested() -> None:
    inner = RandomChoice([Mixup(), None])
    mix = RandomChoice([inner, CutMix(), Scheduled(FMix(), stop=0.5)], per="sample")
    mixed, target = mix(X, torch.arange(6), generator=rng(5))
    assert mixed.shape == X.shape
    assert torch.allclose(target.weights.sum(1), torch.ones(6))


def test_forward_is_plan_of_the_same_draw() -> None:
    for per in ("batch", "sample"):
        mix = RandomChoice([Mixup(), CutMix(), ResizeMix()], per=per)
        for seed in range(8):
            plan = mix.plan(X, generator=rng(seed))
            assert torch.equal(mix(X, torch.arange(6), generator=rng(seed))[0], plan.blend(X))


class TestScheduled:
    @pytest.mark.parametrize("progress", [0.0, 0.24, 0.25, 0.74, 0.75, 1.0])
    def test_active_from_start_up_to_stop(self, progress: float) -> None:
        active = 0.25 <= progress < 0.75
        mix = Scheduled(Mixup(), start=0.25, stop=0.75)
        mix.set_progress(progress)
        mixed, target = mix(X, torch.arange(6), generator=rng())
        assert torch.equal(mixed, X) != active
        assert mixed.data_ptr() != X.data_ptr()
        plan = mix.plan(X, generator=rng())
        if not active:
            assert target.labels.tolist() == [[i, i] for i in range(6)]
            assert target.weights.tolist() == [[1.0, 0.0]] * 6
            assert torch.equal(plan.partner, torch.arange(6))
        else:
            assert torch.equal(mixed, plan.blend(X))

    def test_before_any_word_the_progress_is_zero(self) -> None:
        assert Scheduled(Mixup(), stop=0.5).active
        assert not Scheduled(Mixup(), start=0.5).active

    def test_word_travels_down(self) -> None:
        inner = Scheduled(CutMix(), start=0.5)
        outer = Scheduled(RandomChoice([inner, Mixup()]), stop=0.9)
        RandomChoice([outer, None]).set_progress(0.6)
        assert inner.active
        assert outer.active
        outer.set_progress(0.95)
        assert inner.active
        assert not outer.active

    def test_still_checks_its_input(self) -> None:
        mix = Scheduled(Mixup(), start=0.5)
        with pytest.raises(ValueError, match="Scheduled: y has 2 entries but x has 6 rows"):
            mix(X, torch.arange(2))

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match=r"Scheduled: start is 0\.5 and stop is 0\.5; pass start < stop\."):
            Scheduled(Mixup(), start=0.5, stop=0.5)
        with pytest.raises(ValueError, match=r"Scheduled: stop is 1\.5; pass a number from 0 to 1\."):
            Scheduled(Mixup(), stop=1.5)
        with pytest.raises(TypeError, match=r"Scheduled: policy is a NoneType; pass a mixing policy\."):
            Scheduled(None)
        for wrong in (1.01, -0.1, float("nan")):
            with pytest.raises(ValueError, match=r"Scheduled: fraction is .*; pass a number from 0 to 1"):
                Scheduled(Mixup()).set_progress(wrong)


def test_choice_settings() -> None:
    with pytest.raises(ValueError, match=r"RandomChoice: policies is empty; pass at least one policy\."):
        RandomChoice([])
    with pytest.raises(TypeError, match="RandomChoice: policies holds a str; pass mixing policies, or None"):
        RandomChoice(["mixup"])
    for wrong, name in ((Mixup(), "Mixup"), (None, "NoneType"), ("none", "str"), (3, "int")):
        with pytest.raises(TypeError, match=f"RandomChoice: policies is a {name}; pass a list of mixing policies"):
            RandomChoice(wrong)
    for p, name in ((1.0, "float"), ("1", "str"), (torch.tensor([0.5, 0.5]), "Tensor")):
        with pytest.raises(TypeError, match=f"RandomChoice: p is a {name}; pass a list of numbers, one for each"):
            RandomChoice([Mixup(), CutMix()], p=p)
    for p in ([1.0], [0.0, 0.0], [0.5, 0.2, 0.3]):
        with pytest.raises(ValueError, match="for 2 policies; pass one probability for each"):
            RandomChoice([Mixup(), CutMix()], p=p)
    for p in ([-0.5, 1.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match=r"RandomChoice: p is .*; pass a number from 0 to inf"):
            RandomChoice([Mixup(), CutMix()], p=p)
    with pytest.raises(ValueError, match="RandomChoice: per is 'pair'; pass one of 'batch', 'sample'"):
        RandomChoice([Mixup()], per="pair")
    with pytest.raises(ValueError, match=r"a policy has per=\"pair\" but pairing is 'shift'; pass \"matching\" or"):
        RandomChoice([Mixup(per="pair"), CutMix()], per="sample", pairing="shift")
    with pytest.raises(ValueError, match=r"RandomChoice: x has shape \(4, 5\); pass a batch with 3 to 5 axes"):
        RandomChoice([Mixup(), CutMix()], per="sample").plan(torch.rand(4, 5))


class Weighing(Mixup):
    """A policy that goes on after the draw, to see that combinations pass that on."""

    def __init__(self) -> None:
        super().__init__()
        self.stepped = 0

    def relabel(self, logits, target):
        return target._replace(weights=target.weights.flip(1))

    def loss(self, criterion):
        return torch.tensor(3.0)

    def after_step(self):
        self.stepped += 1


@pytest.mark.parametrize("combine", [lambda p: RandomChoice([p]), lambda p: Scheduled(p, stop=0.5)])
def test_combinations_pass_on_what_a_policy_does_after_the_draw(combine) -> None:
    inner = Weighing()
    policy = combine(inner)
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    _, target = policy(x, y, generator=rng())
    assert torch.equal(policy.relabel(torch.zeros(4, 4), target).weights, target.weights.flip(1))
    assert policy.loss(lambda *_: torch.zeros(())) == 3.0
    policy.after_step()
    assert inner.stepped == 1
    if isinstance(policy, Scheduled):
        policy.set_progress(0.9)
        _, target = policy(x, y, generator=rng())
        assert policy.relabel(torch.zeros(4, 4), target) is target
        assert policy.loss(lambda *_: torch.zeros(())) is None


def test_what_goes_on_after_the_draw_is_no_row_of_a_choice() -> None:
    with pytest.raises(ValueError, match='holds Weighing, which does more than a plan says; use per="batch"'):
        RandomChoice([Mixup(), Weighing()], per="sample")


def test_a_policy_that_does_more_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert more_than_plans(RandomChoice([CutMix(), Scheduled(RandomChoice([Mixup(), None]))])) is None
    weighing = Weighing()
    for policy in (weighing, Scheduled(weighing), RandomChoice([CutMix(), Scheduled(weighing)])):
        assert more_than_plans(policy) is weighing
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="RandomChoice: policies holds one that does more than a plan says"):
        RandomChoice([CutMix(), Scheduled(weighing)])(X, torch.arange(6))


@pytest.mark.parametrize("side", [30, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_a_pasted_row_beside_a_resized_one_keeps_its_pixels(side: int, dtype: torch.dtype) -> None:
    x = (torch.rand(8, 1, side, side, generator=rng()) * 30_000).to(dtype)
    plan = RandomChoice([CutMix(), ResizeMix()], per="sample").plan(x, generator=rng(1))
    assert plan.fit is not None
    assert plan.mask is not None
    pasted = (plan.fit == torch.tensor([[0, side], [0, side]])).flatten(1).all(1)
    assert 0 < int(pasted.sum()) < 8
    want = torch.where(plan.mask > 0, x, x[plan.partner])
    assert torch.equal(plan.blend(x)[pasted], want[pasted])
