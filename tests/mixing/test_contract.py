"""What every policy promises, whatever it does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hardmix.losses import SoftCrossEntropyLoss
from hardmix.mixing import CutMix, MixPlan, Mixup, Policy
from mixing.cases import (
    BLENDING,
    IMAGES_ONLY,
    MODELLED,
    POLICIES,
    blend_by_hand,
    constant_rows,
    modelled,
    own_share,
    rng,
)

SHAPES = [(3, 16, 16), (3, 17, 23), (1, 5, 40), (2, 31), (1, 6, 7, 9), (3, 1, 1)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]
#: how far the mean of a blended constant row may be from the exact blend: rounding of the dtype at values below 255
ROUNDING = {torch.float32: 2e-6, torch.float64: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.uint8: 0.502}


def fits(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 or name not in IMAGES_ONLY


@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
@pytest.mark.parametrize("name", BLENDING)
def test_own_share_of_constant_images_is_lam(name: str, per: str) -> None:
    """The one test that would have caught every mixed-up label of the public code: measure the share in the pixels."""
    policy = POLICIES[name](per)
    for shape in SHAPES:
        if not fits(name, shape):
            continue
        for n in (1, 2, 7):
            # Row i is 2^-i: the blend of any two rows tells the share and the partner apart.
            values = 2.0 ** -torch.arange(n, dtype=torch.float64)
            x = constant_rows(values, shape)
            for seed in range(3):
                plan = policy.plan(x, generator=rng(seed))
                got = plan.blend(x).flatten(1).mean(1)
                lam = plan.lam.double()
                want = lam * values + (1.0 - lam) * values[plan.partner]
                assert torch.allclose(got, want, atol=2e-7, rtol=0), (shape, n, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLENDING)
def test_constant_images_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    policy = POLICIES[name]("sample")
    values = torch.linspace(0.0, 1.0, 5) * (255 if dtype == torch.uint8 else 1)
    x = constant_rows(values.to(dtype), (3, 9, 14))
    values = x[:, 0, 0, 0].double()
    mixed, target = policy(x, torch.arange(5), generator=rng(4))
    want = (target.weights.double() * values[target.labels]).sum(1)
    assert mixed.dtype == dtype
    assert (mixed.double().flatten(1).mean(1) - want).abs().max() <= ROUNDING[dtype]


def test_augmix_keeps_the_label_and_never_shows_another_row() -> None:
    policy = POLICIES["augmix"]("sample")
    x = torch.rand(6, 3, 12, 10, generator=rng())
    mixed, target = policy(x, torch.arange(6), generator=rng(1))
    assert torch.equal(target.labels[:, 0], torch.arange(6))
    assert torch.equal(target.weights, torch.tensor([[1.0, 0.0]]).expand(6, 2))
    changed = x.clone()
    changed[3:] = 0.5
    again, _ = policy(changed, torch.arange(6), generator=rng(1))
    assert torch.equal(mixed[:3], again[:3])


@st.composite
def batches(draw: st.DrawFn, name: str) -> torch.Tensor:
    axes = 2 if name in IMAGES_ONLY else draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 7)), draw(st.integers(1, 4)), *(draw(st.integers(1, 12)) for _ in range(axes)))
    dtype = draw(st.sampled_from(DTYPES))
    x = torch.rand(shape, generator=rng(draw(st.integers(0, 2**31))))
    x = (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if axes == 2 and draw(st.booleans()) else x


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_invariants(name: str, data: st.DataObject) -> None:
    policy = POLICIES[name](data.draw(st.sampled_from(["batch", "pair", "sample"])))
    x = data.draw(batches(name))
    n, seed = x.shape[0], data.draw(st.integers(0, 2**31))
    before = x.clone()
    y = torch.arange(n)
    mixed, target = policy(x, y, generator=rng(seed))
    plan = policy.plan(x, y, generator=rng(seed))

    assert torch.equal(x, before)
    assert mixed.data_ptr() != x.data_ptr()
    assert mixed.dtype == x.dtype
    assert mixed.shape == x.shape
    if x.ndim == 4:
        for layout in (torch.contiguous_format, torch.channels_last):
            assert not x.is_contiguous(memory_format=layout) or mixed.is_contiguous(memory_format=layout)
    # the same generator draws the same plan, and forward is plan, blend, target
    assert torch.equal(mixed, plan.blend(x))
    assert torch.equal(target.labels, torch.stack([y, plan.partner], 1))
    assert torch.equal(target.weights, torch.stack([plan.lam, 1 - plan.lam], 1))

    assert plan.partner.dtype == torch.long
    if name != "choice-sample":  # there, rows that are left alone are their own partners
        assert torch.equal(plan.partner.sort().values, torch.arange(n))
    assert plan.lam.shape == (n,)
    assert plan.lam.dtype == torch.float32
    assert bool(((plan.lam >= 0) & (plan.lam <= 1)).all())
    assert (target.weights.sum(1) - 1).abs().max() <= 1e-6
    if plan.mask is not None:
        assert plan.mask.shape == (n, 1, *x.shape[2:])
        bits = bool(((plan.mask == 0) | (plan.mask == 1)).all())  # a soft mask is rounded pixel by pixel
        assert (plan.lam - own_share(plan.mask)).abs().max() <= (0.0 if bits else 1e-6)
    want = blend_by_hand(x, plan)
    got = mixed.double().numpy()
    if x.dtype == torch.uint8:
        assert np.abs(got - want).max() <= 0.5 + 1e-4
    else:
        assert np.abs(got - want).max() <= 2 * torch.finfo(x.dtype).eps + 1e-6
    own = (x if plan.own is None else plan.own).double()
    other = x[plan.partner].double() if plan.other is None else plan.other.double()
    slack = 1e-6
    assert bool((mixed.double() >= torch.minimum(own, other) - slack).all())
    assert bool((mixed.double() <= torch.maximum(own, other) + slack).all())


@pytest.mark.parametrize("name", POLICIES)
def test_different_seeds_differ_and_global_seed_counts(name: str) -> None:
    policy = POLICIES[name]("sample")
    x = torch.rand(8, 3, 16, 12, generator=rng())
    y = torch.arange(8)
    outs = [policy(x, y, generator=rng(seed))[0] for seed in range(6)]
    assert any(not torch.equal(outs[0], out) for out in outs[1:])
    torch.manual_seed(5)
    first = policy(x, y)[0]
    torch.manual_seed(5)
    assert torch.equal(first, policy(x, y)[0])


@pytest.mark.parametrize("name", [n for n in BLENDING if not n.startswith("choice")])
def test_per_batch_and_pair_share_draws(name: str) -> None:
    x = torch.rand(7, 3, 15, 11, generator=rng())
    for seed in range(4):
        plan = POLICIES[name]("batch").plan(x, generator=rng(seed))
        assert len(plan.lam.unique()) == 1 or name == "saliencymix"
        plan = POLICIES[name]("pair").plan(x, generator=rng(seed))
        assert torch.equal(plan.partner[plan.partner], torch.arange(7))
        if name == "saliencymix":  # shares lambda, but each box sits on its own partner and is clipped there
            continue
        assert torch.equal(plan.lam, plan.lam[plan.partner])
        if plan.mask is not None:
            assert torch.equal(plan.mask, plan.mask[plan.partner])
        assert len(plan.lam.unique()) > 2


@pytest.mark.parametrize("name", BLENDING)
def test_given_partner(name: str) -> None:
    policy = POLICIES[name]("sample")
    x = torch.rand(5, 3, 8, 8, generator=rng())
    partner = torch.tensor([4, 0, 3, 2, 1])
    plan = policy.plan(x, generator=rng(1), partner=partner)
    mixed_rows = plan.lam < 1  # an unmixed row is its own partner
    assert torch.equal(plan.partner[mixed_rows], partner[mixed_rows])
    assert np.abs(plan.blend(x).double().numpy() - blend_by_hand(x, plan)).max() < 1e-6
    # not a permutation: everybody with row 2
    plan = policy.plan(x, generator=rng(1), partner=torch.full((5,), 2))
    assert np.abs(plan.blend(x).double().numpy() - blend_by_hand(x, plan)).max() < 1e-6


@pytest.mark.parametrize("name", POLICIES)
def test_state_copies_and_repr(name: str) -> None:
    policy = POLICIES[name]("sample")
    assert policy.state_dict() == {}
    assert list(policy.parameters()) == []
    assert type(policy).__name__ in repr(policy)
    x = torch.rand(4, 3, 8, 8, generator=rng())
    want = policy(x, torch.arange(4), generator=rng(2))[0]
    if name != "saliencymix":
        for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            assert torch.equal(twin(x, torch.arange(4), generator=rng(2))[0], want)
    policy.set_progress(0.25)  # every policy takes it


@pytest.mark.parametrize("name", BLENDING)
def test_dense_masks_follow_the_pixels(name: str) -> None:
    """A segmentation mask equal to the image's values has to come out where the mixed pixels show those values."""
    policy = POLICIES[name]("sample")
    n = 4
    y = torch.arange(n).view(n, 1, 1).expand(n, 12, 10).contiguous()
    x = y[:, None].double()
    plan = policy.plan(x, generator=rng(3))
    target = plan.target(y)
    weights = target.weights.expand(n, 2, 12, 10)
    assert target.labels.shape == (n, 2, 12, 10)
    assert torch.allclose((target.labels * weights).sum(1).double(), plan.blend(x)[:, 0], atol=1e-5)
    dense = target.dense(n)
    assert dense.shape == (n, n, 12, 10)
    assert torch.allclose(dense.sum(1), torch.ones(n, 12, 10), atol=1e-6)
    assert torch.allclose(dense.mean((2, 3)), plan.target(torch.arange(n)).dense(n), atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_refusals(name: str) -> None:
    policy = POLICIES[name]("sample")
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    for bad, error, text in [
        ([1, 2], TypeError, "x is a list; pass a torch.Tensor"),
        (torch.rand(0, 3, 8, 8), ValueError, r"x has shape \(0, 3, 8, 8\) and is empty; pass at least one sample"),
        (torch.rand(8), ValueError, r"x has shape \(8,\); pass a batch with"),
        (torch.rand(2, 1, 1, 1, 1, 1), ValueError, "pass a batch with"),
        (
            torch.zeros(4, 3, 8, 8, dtype=torch.bool),
            TypeError,
            "x has dtype torch.bool; pass integers or floating-point",
        ),
        (torch.zeros(4, 3, 8, 8, dtype=torch.complex64), TypeError, "x has dtype torch.complex64"),
    ]:
        with pytest.raises(error, match=text):
            policy(bad, y)
        with pytest.raises(error, match=text):
            policy.plan(bad)
    with pytest.raises(ValueError, match=r"y has 3 entries but x has 4 rows; pass one entry per row\."):
        policy(x, y[:3])
    with pytest.raises(TypeError, match=r"y is a list; pass a torch\.Tensor\."):
        policy(x, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"y is on meta but x is on cpu; move both to one device with \.to\(\)\."):
        policy(x, y.to("meta"))
    with pytest.raises(TypeError, match=r"generator is a int; pass a torch\.Generator or None\."):
        policy(x, y, generator=3)
    for partner in (torch.arange(3), torch.rand(4), torch.zeros(4, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"partner has shape .* pass \(4,\) integer row numbers"):
            policy.plan(x, partner=partner)
    for partner in ([0, 1, 2, 4], [-1, 0, 1, 2]):
        with pytest.raises(ValueError, match=r"partner holds .*; pass row numbers from 0 to 3\."):
            policy.plan(x, partner=torch.tensor(partner))


@pytest.mark.parametrize(
    "name", [n for n in POLICIES if n not in ("resizemix", "smoothmix", "scheduled") and "ch" not in n]
)
@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_alpha_is_positive_and_finite(name: str, alpha: object) -> None:
    kind = type(POLICIES[name]("sample"))
    error = TypeError if alpha is None or alpha is True else ValueError
    with pytest.raises(error, match=rf"{kind.__name__}: alpha is .*; pass a finite number greater than 0\."):
        kind(alpha=alpha)


def test_per_and_pairing_settings() -> None:
    from hardmix.mixing import CutMix, Mixup

    with pytest.raises(ValueError, match=r"CutMix: per is 'samples'; pass one of .*\(did you mean \"sample\"\?\)\."):
        CutMix(per="samples")
    with pytest.raises(ValueError, match=r"Mixup: pairing is 'random'; pass one of"):
        Mixup(pairing="random")
    with pytest.raises(ValueError, match=r'per="pair" with pairing=\'shift\' has no pairs; pass pairing="matching"'):
        Mixup(per="pair", pairing="shift")
    with pytest.raises(ValueError, match=r'Mixup: partner has no pairs but per is "pair"; pass rows with partner'):
        Mixup(per="pair").plan(torch.rand(3, 4), partner=torch.tensor([1, 2, 0]))
    assert Mixup(per="pair").pairing == "matching"
    assert Mixup().pairing == "shift"


@pytest.mark.parametrize("name", IMAGES_ONLY)
def test_image_policies_refuse_series_and_volumes(name: str) -> None:
    for shape in ((4, 3, 20), (4, 3, 5, 6, 7)):
        with pytest.raises(ValueError, match=r"(pass a batch with 4 axes|pass \(N, C, H, W\))"):
            POLICIES[name]("sample").plan(torch.rand(shape))


def test_plans_are_moved_once() -> None:
    """On a device of its own (here meta, which can't compute) nothing of a plan may stay behind on the CPU."""
    plan = POLICIES["gridmix"]("sample").plan(torch.rand(4, 3, 8, 8), generator=rng()).to("meta")
    assert plan.partner.device.type == plan.lam.device.type == "meta"
    assert plan.mask is not None
    assert plan.mask.device.type == "meta"
    for name in sorted({*POLICIES} - {"saliencymix"}):
        plan = POLICIES[name]("sample").plan(torch.rand(4, 3, 8, 8, device="meta"), generator=rng())
        assert isinstance(plan, MixPlan)
        assert plan.partner.device.type == plan.lam.device.type == "meta"
        assert plan.mask is None or plan.mask.device.type == "meta"
        assert plan.blend(torch.rand(4, 3, 8, 8, device="meta")).device.type == "meta"


@pytest.mark.parametrize("name", POLICIES)
def test_autocast_changes_no_draw(name: str) -> None:
    """Half precision has too few digits for masks and places: a policy inside autocast draws what it draws outside."""
    policy, x, y = POLICIES[name]("sample"), torch.rand(16, 1, 40, 40, generator=rng()), torch.arange(16)
    mixed, target = policy(x, y, generator=rng(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = policy(x, y, generator=rng(1))
        plan = policy.plan(x, y, generator=rng(1))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(again, mixed)
    assert torch.equal(same.weights, target.weights)
    assert torch.equal(plan.lam, target.weights[:, 0])


@pytest.mark.parametrize("policy", [Mixup, CutMix])
def test_alpha_comes_first(policy: type[Policy]) -> None:
    assert policy(0.3).alpha == 0.3
    assert policy(0.3, per="pair", pairing="reversal").pairing == "reversal"
    with pytest.raises(TypeError, match="positional"):
        policy(0.3, "sample")


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_named(name: str, bad: float) -> None:
    x = torch.rand(6, 1, 12, 12, generator=rng())
    x[4, 0, 3, 3] = bad
    with pytest.raises(ValueError, match=r"x holds NaN or infinity in rows 4; repair or leave out these samples\."):
        POLICIES[name]("sample")(x, torch.arange(6))


def test_large_finite_values_are_fine() -> None:
    """Their sum overflows, they don't."""
    x = torch.full((2, 1, 4, 4), 3e38)
    mixed, _ = CutMix()(x, torch.arange(2))
    assert torch.equal(mixed, x)


# Policies that look at a model

PAIRS = [name for name, case in MODELLED.items() if case.pairs]


@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
@pytest.mark.parametrize("name", MODELLED)
def test_shares_of_constant_images_with_a_model(name: str, per: str) -> None:
    """What the labels get is what the pixels show; for labels by content, the plan's share is."""
    policy, _model = modelled(name, per)
    case = MODELLED[name]
    for n, size in [(1, (9, 14)), (2, (17, 23)), (7, (16, 16))]:
        values = 2.0 ** -torch.arange(n, dtype=torch.float64)
        x, y = constant_rows(values.float(), (3, *size)), torch.arange(n)
        if case.pairs:
            plan = policy.plan(x, y, generator=rng(n))
            lam = plan.lam.double()
            want = lam * values + (1.0 - lam) * values[plan.partner]
            assert torch.allclose(plan.blend(x).double().flatten(1).mean(1), want, atol=1e-6, rtol=0), (n, size)
        mixed, target = policy(x, y, generator=rng(n))
        policy.disarm()
        if not case.pixels:
            assert torch.equal(mixed, x)
        elif case.by_area:
            want = (target.weights.double() * values[target.labels]).sum(1)
            assert torch.allclose(mixed.double().flatten(1).mean(1), want, atol=1e-6, rtol=0), (n, size)


@pytest.mark.parametrize("name", MODELLED)
def test_invariants_with_a_model(name: str) -> None:
    policy, model = modelled(name)
    case, state = MODELLED[name], {key: value.clone() for key, value in model.state_dict().items()}
    for n, size in [(1, (16, 16)), (2, (9, 14)), (7, (17, 23))]:
        x = torch.rand(n, 3, *size, generator=rng(n))
        if n == 7:
            x = x.contiguous(memory_format=torch.channels_last)
        before, y, chance = x.clone(), torch.arange(n), torch.get_rng_state()
        mixed, target = policy(x, y, generator=rng(5))
        policy.disarm()
        again, same = policy(x, y, generator=rng(5))
        policy.disarm()
        assert torch.equal(torch.get_rng_state(), chance)
        assert torch.equal(x, before)
        assert mixed.data_ptr() != x.data_ptr() or not case.pixels
        assert (mixed.shape, mixed.dtype) == (x.shape, x.dtype)
        assert mixed.is_contiguous(memory_format=torch.channels_last) or n != 7
        assert torch.equal(mixed, again)
        assert torch.equal(target.labels, same.labels)
        assert torch.equal(target.weights, same.weights)
        assert not mixed.requires_grad
        assert not target.weights.requires_grad
        assert target.labels.shape == target.weights.shape
        assert target.labels.shape[0] == n
        assert target.weights.dtype == torch.float32
        if case.by_area:
            assert (target.weights.sum(1) - 1).abs().max() <= 1e-6
            assert bool(((target.weights >= 0) & (target.weights <= 1)).all())
        if not case.pairs:
            with pytest.raises(NotImplementedError, match=r"(rows|samples|images)"):
                policy.plan(x, y)
            continue
        plan = policy.plan(x, y, generator=rng(5))
        assert (plan.lam.shape, plan.lam.dtype, plan.partner.dtype) == ((n,), torch.float32, torch.long)
        assert bool(((plan.lam >= 0) & (plan.lam <= 1)).all())
        if plan.mask is not None:
            assert plan.mask.shape == (n, 1, *size)
            assert torch.equal(plan.lam, own_share(plan.mask)) or name in ("automix", "samix")
            assert (plan.lam - own_share(plan.mask)).abs().max() < 1e-6
        assert np.abs(plan.blend(x).double().numpy() - blend_by_hand(x, plan)).max() <= 2e-6
        if not case.pixels:  # the layer is drawn first
            continue
        assert torch.equal(target.labels, torch.stack([y, plan.partner], 1))
        if case.by_area:
            assert torch.equal(mixed, plan.blend(x))
            assert torch.equal(target.weights, torch.stack([plan.lam, 1 - plan.lam], 1))
    # The model was only asked.
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", MODELLED)
def test_every_dtype_with_a_model(name: str, dtype: torch.dtype) -> None:
    policy, _model = modelled(name)
    case, y = MODELLED[name], torch.arange(5)
    values = torch.linspace(0.0, 1.0, 5) * (255 if dtype == torch.uint8 else 1)
    x = constant_rows(values.to(dtype), (3, 9, 14))
    if dtype == torch.uint8 and not case.uint8:
        with pytest.raises(TypeError, match=r"x has dtype torch\.uint8"):
            policy(x, y, generator=rng(4))
        return
    mixed, target = policy(x, y, generator=rng(4))
    assert mixed.dtype == dtype
    if case.pixels and case.by_area:
        exact = x[:, 0, 0, 0].double()
        want = (target.weights.double() * exact[target.labels]).sum(1)
        assert (mixed.double().flatten(1).mean(1) - want).abs().max() <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("name", MODELLED)
def test_seeds_with_a_model(name: str) -> None:
    policy, _model = modelled(name)
    x, y = torch.rand(8, 3, 16, 12, generator=rng()), torch.arange(8)

    def draw(seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        mixed, target = policy(x, y, generator=None if seed is None else rng(seed))
        policy.disarm()
        return torch.cat([mixed.flatten(1), target.labels.float(), target.weights], 1), target.labels

    first = draw(0)[0]
    differ = any(first.shape != (other := draw(seed)[0]).shape or not torch.equal(first, other) for seed in range(1, 5))
    assert differ == MODELLED[name].draws
    torch.manual_seed(5)
    first = draw(None)[0]
    torch.manual_seed(5)
    assert torch.equal(first, draw(None)[0])


@pytest.mark.parametrize("name", PAIRS)
def test_a_given_partner_with_a_model(name: str) -> None:
    policy, _model = modelled(name)
    x, y = torch.rand(5, 3, 12, 12, generator=rng()), torch.arange(5)
    for partner in (torch.tensor([4, 0, 3, 2, 1]), torch.full((5,), 2)):
        plan = policy.plan(x, y, generator=rng(1), partner=partner)
        assert torch.equal(plan.partner, partner)
        assert np.abs(plan.blend(x).double().numpy() - blend_by_hand(x, plan)).max() < 2e-6


@pytest.mark.parametrize("name", MODELLED)
def test_steps_with_a_model(name: str) -> None:
    """Draw, forward, relabel, loss, backward, after_step; twice, the second under autocast."""
    policy, model = modelled(name)
    case, criterion = MODELLED[name], SoftCrossEntropyLoss()
    assert bool(list(policy.parameters())) == case.learns
    assert bool(policy.state_dict()) == case.learns
    assert all(part is not model for part in policy.modules())
    assert type(policy).__name__ in repr(policy)
    x, y = torch.rand(6, 3, 12, 16, generator=rng()), torch.arange(6)
    before = x.clone()
    for half in (False, True):
        policy.set_progress(0.25)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            mixed, target = policy(x, y, generator=rng(1))
            logits = model(mixed)
            after = policy.relabel(logits, target)
            loss, own = criterion(logits, after), policy.loss(criterion)
        assert torch.equal(after.labels, target.labels)
        assert (after.weights.shape, after.weights.dtype) == (target.weights.shape, torch.float32)
        (loss if own is None else loss + own).backward()
        assert loss.isfinite()
        assert own is None or bool(own.isfinite())
        if name == "sumix":
            with pytest.raises(RuntimeError, match="SUMix: loss has no batch"):
                policy.loss(criterion)
        else:
            assert policy.loss(criterion) is None
        policy.after_step()
        grown = [*model.parameters(), *(p for p in policy.parameters() if p.requires_grad)]
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in grown)
        for parameter in grown:
            parameter.grad = None
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", MODELLED)
def test_refusals_with_a_model(name: str) -> None:
    policy, model = modelled(name)
    x, y = torch.rand(4, 3, 12, 12, generator=rng()), torch.arange(4)
    who = type(policy).__name__
    with pytest.raises(ValueError, match=rf"{who}: y has 3 entries but x has 4 rows; pass one entry per row\."):
        policy(x, y[:3])
    with pytest.raises(TypeError, match=r"y is a list; pass a torch\.Tensor\."):
        policy(x, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"y is on meta but x is on cpu"):
        policy(x, y.to("meta"))
    with pytest.raises(TypeError, match=r"generator is a int; pass a torch\.Generator or None\."):
        policy(x, y, generator=3)
    with pytest.raises(ValueError, match=rf"{who}: x has shape \(0, 3, 12, 12\) and is empty"):
        policy(x[:0], y[:0])
    bad = x.clone()
    bad[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"x holds NaN or infinity in rows 2"):
        policy(bad, y)
    with pytest.raises(TypeError, match=r"model is a str; pass a torch\.nn\.Module"):
        MODELLED[name].make("net", "sample")
    with pytest.raises(TypeError, match=r"model is a str; pass a torch\.nn\.Module"):
        policy.attach("net")
    policy.attach(model)
    mixed, _ = policy(x, y, generator=rng(1))  # it works as before
    assert mixed.shape == x.shape


@contextmanager
def _defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual)


DEFAULTS = [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
@pytest.mark.parametrize("name", [*POLICIES, *MODELLED])
def test_defaults_of_torch_change_no_draw(name: str, dtype: torch.dtype, device: str) -> None:
    """Neither `torch.set_default_dtype` nor `torch.set_default_device`, which are about what the user makes."""
    x, y = torch.rand(6, 3, 16, 16, generator=rng()), torch.arange(6)

    def make() -> tuple[Policy, nn.Module]:
        return (POLICIES[name]("sample"), nn.Identity()) if name in POLICIES else modelled(name)

    (usual, _model), (policy, _other) = make(), make()
    want, target = usual(x, y, generator=rng(5))
    generator = rng(5)
    with _defaults(dtype, device):
        got, found = policy(x, y, generator=generator)
    assert torch.equal(got, want)
    assert torch.equal(found.labels, target.labels)
    assert found.weights.dtype == target.weights.dtype
    assert torch.equal(found.weights, target.weights)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of in-place operations that vmap runs one by one
@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("name", ["mixup", "cutmix", "smoothmix", "fmix", "gridmix", "resizemix", "saliencymix"])
def test_batches_of_batches_are_mixed_one_by_one(name: str, randomness: str) -> None:
    """torch.func.vmap maps over whole batches, with one draw for all of them or one for each."""
    policy, y = POLICIES[name]("sample"), torch.arange(4)
    x = torch.rand(1, 4, 3, 12, 12, generator=rng()).expand(3, -1, -1, -1, -1)
    mixed, target = torch.func.vmap(lambda batch: tuple(policy(batch, y)), randomness=randomness)(x)
    assert mixed.shape == x.shape
    assert target.weights.shape == (3, 4, 2)
    assert torch.equal(target.labels[:, :, 0], y.expand(3, 4))
    assert torch.equal(mixed[0], mixed[1]) == (randomness == "same")
