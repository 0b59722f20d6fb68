"""The timm adapter on its own: what it mixes, what it refuses. No timm is needed here."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from hardmix.integrations.timm import Mixup, minmax_box
from hardmix.losses import DecoupledMixupLoss, SoftCrossEntropyLoss
from hardmix.mixing import MixedTarget

BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
X = torch.rand(4, 3, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixel_shares(plan, size):
    """(B, *size) float64 share of the own pixel, from the plan's mask or lambda."""
    if plan.mask is not None:
        return plan.mask[:, 0].double().numpy()
    return np.broadcast_to(plan.lam.double().numpy().reshape(-1, *[1] * len(size)), (len(plan), *size))


def slow_mix(x, share):
    """The reversed batch blended pixel by pixel in float64."""
    x, out = x.double().numpy(), np.empty(x.shape)
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[i, c] = share[i] * x[i, c] + (1 - share[i]) * x[x.shape[0] - 1 - i, c]
    return out


def slow_dense(y, lam, num_classes, smoothing):
    out = np.zeros((len(y), num_classes))
    for i in range(len(y)):
        for c in range(num_classes):
            hard = lam[i] * (y[i] == c) + (1 - lam[i]) * (y[len(y) - 1 - i] == c)
            out[i, c] = (1 - smoothing) * hard + smoothing / num_classes
    return out


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    mode=st.sampled_from(["batch", "pair", "elem"]),
    alphas=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.8, 1.0)]),
    minmax=st.sampled_from([None, (0.2, 0.8)]),
    prob=st.sampled_from([1.0, 0.6, 0.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8]),
    seed=st.integers(0, 1000),
)
def test_images_and_targets_follow_one_plan(rows, mode, alphas, minmax, prob, smoothing, dtype, seed):
    x = (torch.rand(rows, 2, 5, 7, generator=seeded(seed)) * 255).to(dtype)
    y = torch.randint(4, (rows,), generator=seeded(seed + 1))
    before = x.clone()
    mix = Mixup(*alphas, minmax, prob=prob, mode=mode, label_smoothing=smoothing, num_classes=4, generator=seeded(seed))
    plan = mix.policy.plan(x, generator=seeded(seed))
    mixed, dense = mix(x, y)
    assert torch.equal(x, before)
    assert mixed.dtype == dtype
    assert mixed.data_ptr() != x.data_ptr()
    share = pixel_shares(plan, (5, 7))
    rounding = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1.0, torch.uint8: 0.501}[dtype]
    # Half types and integers are rounded once, lambda itself is float32.
    assert np.abs(mixed.double().numpy() - slow_mix(x, share)).max() <= rounding
    lam = share.mean((1, 2))
    assert np.abs(dense.double().numpy() - slow_dense(y.tolist(), lam, 4, smoothing)).max() < 1e-6
    assert dense.dtype == torch.float32
    if mode == "batch":
        assert np.ptp(lam) < 1e-6
    if mode == "pair":
        assert np.allclose(lam, lam[::-1], atol=1e-6)
        assert np.array_equal(share, share[::-1])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_how_often_it_mixes_and_switches(mode):
    mix = Mixup(**BOTH, prob=0.75, switch_prob=0.2, mode=mode, generator=seeded())
    x = torch.zeros(32, 1, 64, 64)
    kinds = []
    for _ in range(1500 if mode == "batch" else 120):
        plan = mix.policy.plan(x, generator=mix.generator)
        rows = {"batch": 1, "pair": 16, "elem": 32}[mode]
        for share in pixel_shares(plan, (64, 64))[:rows]:
            kinds.append("neither" if share.min() == 1 else "mixup" if np.ptp(share) == 0 else "cutmix")
    counts = np.array([kinds.count(kind) for kind in ("mixup", "cutmix", "neither")])
    expected = np.array([0.6, 0.15, 0.25]) * len(kinds)
    # An empty or full box looks like "neither" or "mixup": a few in a hundred boxes. Five standard deviations besides.
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 0.01 * len(kinds)).all(), counts


def test_lambda_of_each_policy_is_its_own_beta():
    """Mean of 4 lam (1 - lam) over Beta(a, a) is 2a / (2a + 1), which tells the two alphas apart."""
    mix = Mixup(mixup_alpha=0.1, cutmix_alpha=5.0, mode="elem", correct_lam=False, generator=seeded())
    x = torch.zeros(2000, 1, 8, 8)
    plan = mix.policy.plan(x, generator=mix.generator)
    share = torch.from_numpy(pixel_shares(plan, (8, 8))).flatten(1)
    is_cut = ((share == 0) | (share == 1)).all(1) & (share != share[:, :1]).any(1)
    spread = 4 * plan.lam * (1 - plan.lam)
    assert 900 < is_cut.sum() < 1050
    assert abs(spread[is_cut].mean() - 10 / 11) < 0.02
    assert abs(spread[~is_cut].mean() - 0.2 / 1.2) < 0.05


def test_minmax_boxes_lie_inside_and_reach_every_border():
    mix = Mixup(cutmix_alpha=0.0, mixup_alpha=0.0, cutmix_minmax=(0.25, 0.75), mode="elem", generator=seeded())
    plan = mix.policy.plan(torch.zeros(4000, 1, 12, 20), generator=mix.generator)
    start, stop = plan.box[..., 0], plan.box[..., 1]
    side = stop - start
    for axis, length in enumerate((12, 20)):
        assert side[:, axis].unique().tolist() == list(range(length // 4, 3 * length // 4))
        assert start[:, axis].min() == 0
        assert stop[:, axis].max() == length
    assert torch.allclose(plan.lam, 1 - side.prod(1) / 240)


@pytest.mark.parametrize(("minmax", "side"), [((0.5, 0.5), 4), ((0.0, 0.0), 0), ((1.0, 1.0), 8), ((0.3, 0.31), 2)])
def test_an_empty_range_of_sides_is_its_lower_end(minmax, side):
    nearly_one = torch.full((3, 1), 1 - 2.0**-24)
    box = minmax_box(nearly_one, nearly_one, (8,), minmax)
    assert (box[..., 1] - box[..., 0] == side).all()
    assert (box[..., 1] <= 8).all()


def test_uncorrected_lambda_is_the_drawn_one():
    x, y = torch.rand(64, 1, 16, 16), torch.arange(64) % 8
    settings = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "mode": "elem", "label_smoothing": 0.0, "num_classes": 8}
    right = Mixup(**settings, generator=seeded())
    drawn = Mixup(**settings, correct_lam=False, generator=seeded())
    (x1, y1), (x2, y2) = right(x, y), drawn(x, y)
    assert torch.equal(x1, x2)
    assert not torch.allclose(y1, y2, atol=0.01)
    plan = drawn.policy.plan(x, generator=seeded())
    visible = pixel_shares(plan, (16, 16)).mean((1, 2))
    # A box is clipped at the border, so at least its own share is visible, but for rounding of its sides.
    assert (visible >= plan.lam.numpy() - 0.13).all()
    assert (visible - plan.lam.numpy()).max() > 0.2


@pytest.mark.parametrize("shape", [(6, 2, 9), (6, 1, 4, 10, 6), (5, 3, 3, 11)])
def test_series_volumes_and_oblong_images_are_cut_where_their_label_says(shape):
    """Each row has one value, so the share that is left of it can be counted."""
    x = torch.arange(shape[0], dtype=torch.float32).view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
    mix = Mixup(0.0, 1.0, mode="elem", label_smoothing=0.0, num_classes=shape[0], generator=seeded(3))
    mixed, dense = mix(x, torch.arange(shape[0]))
    for i, row in enumerate(mixed):
        for other in range(shape[0]):
            assert dense[i, other].item() == pytest.approx((row == other).float().mean().item(), abs=1e-6)


def test_features_are_mixed_without_cutmix_only():
    mixed, _ = Mixup(num_classes=3)(torch.rand(4, 7), torch.tensor([0, 1, 2, 0]))
    assert mixed.shape == (4, 7)
    with pytest.raises(ValueError, match=r"Mixup: x has shape \(4, 7\); pass a batch with 3 to 5 axes"):
        Mixup(**BOTH, num_classes=3)(torch.rand(4, 7), torch.tensor([0, 1, 2, 0]))


def test_channels_last_and_gradients_are_kept():
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    mixed, _ = Mixup(**BOTH, num_classes=2, generator=seeded())(x, torch.tensor([0, 1, 1, 0]))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    mixed.sum().backward()
    assert x.grad is not None


def test_disabled_mixing_leaves_smoothed_dense_labels():
    mix = Mixup(**BOTH, num_classes=5)
    mix.mixup_enabled = False
    x = torch.rand(3, 1, 4, 4)
    mixed, dense = mix(x, torch.tensor([0, 4, 2]))
    assert torch.equal(mixed, x)
    assert torch.allclose(dense, torch.eye(5)[[0, 4, 2]] * 0.9 + 0.02)


def test_settings_are_obeyed_when_they_are_set_afterwards():
    """Each against an adapter that had the setting from the start."""
    x, y = torch.rand(6, 1, 16, 16), torch.arange(6)
    start = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "elem", "num_classes": 6}
    for name, value in [
        ("mix_prob", 0.0),
        ("switch_prob", 1.0),
        ("mixup_alpha", 0.0),
        ("mixup_alpha", 30.0),
        ("cutmix_alpha", 0.0),
        ("cutmix_minmax", (0.1, 0.3)),
        ("mode", "batch"),
        ("correct_lam", False),
        ("label_smoothing", 0.4),
        ("num_classes", 9),
    ]:
        late, early = Mixup(**start), Mixup(**{**start, name.replace("mix_prob", "prob"): value})
        before = getattr(late, name)
        setattr(late, name, value)
        assert before != getattr(late, name) == getattr(early, name) == value
        for mix in (late, early):
            mix.generator = seeded(4)
        for a, b in zip(late(x, y), early(x, y), strict=True):
            assert torch.equal(a, b), name
        plans = [mix.policy.plan(x, generator=seeded(5)) for mix in (late, early)]
        assert torch.equal(plans[0].blend(x), plans[1].blend(x))
    late = Mixup(**start)
    late.mix_prob = 0.0
    assert torch.equal(late(x, y)[0], x)


def test_a_setting_is_checked_when_it_is_set_and_both_alphas_when_they_are_used():
    mix = Mixup(num_classes=4)
    for name, value, message in [
        ("mix_prob", 1.5, "mix_prob is 1.5"),
        ("mode", "half", "mode is 'half'; pass one of"),
        ("cutmix_minmax", (0.8, 0.2), "cutmix_minmax is"),
        ("label_smoothing", -1.0, "label_smoothing is -1.0"),
        ("num_classes", 0, "num_classes is 0"),
    ]:
        with pytest.raises(ValueError, match=f"Mixup: {message}"):
            setattr(mix, name, value)
    mix.mixup_alpha = 0.0
    with pytest.raises(ValueError, match="Mixup: mixup_alpha and cutmix_alpha are both 0; pass a positive one"):
        mix(X, torch.arange(4))
    mix.cutmix_alpha = 1.0
    assert mix(X, torch.arange(4))[1].shape == (4, 4)
    assert Mixup(num_classes=4)(torch.rand(4, 7), torch.arange(4))[0].shape == (4, 7)
    with pytest.raises(ValueError, match=r"Mixup: x has shape \(4, 7\); pass a batch with 3 to 5 axes"):
        mix(torch.rand(4, 7), torch.arange(4))


def test_a_copy_has_settings_of_its_own():
    mix = Mixup(**BOTH, num_classes=4)
    copies = copy.deepcopy(mix), pickle.loads(pickle.dumps(mix))
    mix.mix_prob = 0.0
    for one in copies:
        assert one.policy.mix is one
        assert one.mix_prob == 1.0


def test_class_ids_may_stand_in_a_column():
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([3, 0, 1, 2])
    results = [Mixup(**BOTH, num_classes=4, generator=seeded(7))(x, target) for target in (y, y[:, None])]
    for flat, column in zip(*results, strict=True):
        assert torch.equal(flat, column)


def test_draws_come_from_the_generator_alone():
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    mix = Mixup(**BOTH, mode="elem", num_classes=8, generator=seeded(5))
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second = mix(x, y), mix(x, y)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert not torch.equal(first[0], second[0])
    again = Mixup(**BOTH, mode="elem", num_classes=8, generator=seeded(5))(x, y)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_multi_hot_rows_are_mixed_and_smoothed_towards_a_half():
    y = torch.tensor([[1, 1, 0], [0, 0, 1]])
    mix = Mixup(num_classes=3, multi_label=True, label_smoothing=0.2, generator=seeded(1))
    lam = float(mix.policy.plan(torch.zeros(2, 1, 2, 2), generator=seeded(1)).lam[0])
    for target in (y, y.float(), y.bool()):
        mix.generator.manual_seed(1)
        _, dense = mix(torch.rand(2, 1, 2, 2), target)
        expected = [[lam, lam, 1 - lam], [1 - lam, 1 - lam, lam]]
        assert torch.allclose(dense, torch.tensor(expected) * 0.8 + 0.1)


@pytest.mark.parametrize(
    ("target", "multi_label", "message"),
    [
        (torch.tensor([0.7, 3.2, 1.0, 2.0]), False, r"shape \(4,\) and dtype torch.float32; pass class ids .*numbers"),
        (torch.zeros(4, 10), False, r"shape \(4, 10\) .*multi_label=True for multi-hot rows"),
        (torch.zeros(4, 10, dtype=torch.long), False, r"multi_label=True for multi-hot rows"),
        (torch.zeros(4, 8, 8, dtype=torch.long), False, r"shape \(4, 8, 8\) .*mix masks with a plan of hardmix.mixing"),
        (torch.zeros(4, 1), False, r"shape \(4, 1\) .*numbers and soft labels with hardmix.mixing.Mixup"),
        (torch.zeros(4, dtype=torch.bool), False, r"dtype torch.bool; pass class ids"),
        (torch.zeros(4, dtype=torch.long), True, r"shape \(4,\) .*pass multi-hot rows \(B, 10\)"),
        (torch.zeros(4, 9), True, r"shape \(4, 9\) .*pass multi-hot rows \(B, 10\)"),
        (torch.zeros(3, dtype=torch.long), False, r"target has 3 entries but x has 4 rows"),
        (torch.tensor([0, 1, 2, 10]), False, r"the class 10"),
    ],
)
def test_targets_that_it_can_not_mix_are_refused(target, multi_label, message):
    mix = Mixup(**BOTH, num_classes=10, multi_label=multi_label)
    with pytest.raises(ValueError, match=message) as caught:
        mix(torch.rand(4, 3, 8, 8), target)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"Mixup: target is a list; pass a torch\.Tensor"):
        mix(torch.rand(4, 3, 8, 8), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": 0.0}, "mixup_alpha and cutmix_alpha are both 0; pass a positive one"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha is nan"),
        ({"cutmix_minmax": (0.8, 0.2)}, "cutmix_minmax is"),
        ({"prob": 1.5}, "prob is 1.5"),
        ({"switch_prob": -0.1}, "switch_prob is -0.1"),
        ({"mode": "half"}, "mode is 'half'; pass one of 'batch', 'pair', 'elem'"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"Mixup: {message}"):
        Mixup(**settings)


def test_a_generator_has_to_be_one():
    with pytest.raises(TypeError, match="Mixup: generator is a int"):
        Mixup(generator=0)


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "meta")])
def test_defaults_of_torch_change_nothing(mode, dtype, device):
    """Neither `torch.set_default_dtype` nor `torch.set_default_device`, which are about what the user makes."""
    usual, y = torch.get_default_dtype(), torch.arange(4)
    mixes = [Mixup(**BOTH, prob=0.8, mode=mode, num_classes=4, generator=seeded(1)) for _ in range(2)]
    want = mixes[0](X, y)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            got = mixes[1](X, y)
    finally:
        torch.set_default_dtype(usual)
    assert got[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_its_soft_labels_lead_back_to_the_mixed_pair(smoothing):
    """Smoothing lifts every class; the floor must not make all of them count as mixed."""
    x, y, logits = torch.rand(8, 1, 4, 4), torch.arange(8), torch.randn(8, 10, generator=seeded())
    mix = Mixup(mode="elem", label_smoothing=smoothing, num_classes=10, generator=seeded(2))
    plan = mix.policy.plan(x, generator=seeded(2))
    _, dense = mix(x, y)
    pair = MixedTarget.from_dense(dense)
    for i in range(8):
        shares = dict(zip(pair.labels[i].tolist(), pair.weights[i].tolist(), strict=True))
        assert shares[i] == pytest.approx(plan.lam[i].item(), abs=1e-5)
        assert shares[7 - i] == pytest.approx(1 - plan.lam[i].item(), abs=1e-5)
    expected = DecoupledMixupLoss(eta=0.1, label_smoothing=smoothing)(logits, plan.target(y))
    assert torch.allclose(DecoupledMixupLoss(eta=0.1)(logits, dense), expected, atol=1e-5)


def test_class_ids_do_not_broadcast_in_the_loss():
    """As many classes as samples: a target (B,) would spread over logits (B, C) without an error."""
    logits, y = torch.randn(5, 5, generator=seeded()), torch.tensor([0, 3, 1, 4, 2])
    expected = torch.nn.functional.cross_entropy(logits, y)
    assert torch.allclose(SoftCrossEntropyLoss()(logits, y), expected)
    with pytest.raises(TypeError, match="target holds floats"):
        SoftCrossEntropyLoss()(logits, y.float())


def test_it_mixes_in_a_collate_function():
    """NumPy uint8 images, as timm's loaders collate them."""
    samples = [(np.full((3, 4, 4), 10 * i, dtype=np.uint8), i) for i in range(5)]
    mix = Mixup(**BOTH, num_classes=5, generator=seeded())
    x, target = mix(*default_collate(samples))
    assert x.dtype == torch.uint8
    assert target.shape == (5, 5)
    assert torch.allclose(target.sum(1), torch.ones(5))
