"""Occlusion, FGSM, corruption and mixing measures against numpy loops and models whose answer is known."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hardmix.metrics import corruption_accuracy, fgsm_accuracy, mixed_accuracy_curve, occlusion_accuracy
from hardmix.metrics.corruptions import corrupt
from hardmix.metrics.robustness import (
    CHUNK,
    LAMS,
    RATES,
    accuracy,
    default_patch,
    fgsm_sign,
    occlude,
    other_class_partner,
    patch_order,
    plan_at,
    predict,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(count: int = 60, classes: int = 3, shape: tuple[int, ...] = (2, 12, 12), seed: int = 0):
    """uint8 images, brighter in a band of rows that tells the class, and their labels."""
    labels = torch.arange(count) % classes
    x = 60.0 * torch.rand((count, *shape), generator=gen(seed))
    band = shape[1] // classes
    for i, label in enumerate(labels.tolist()):
        x[i, :, label * band : (label + 1) * band] += 120.0
    return x.to(torch.uint8), labels


class Bands(nn.Module):
    """Mean brightness of each band of rows: right on all of `data`, and linear."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.mean((1, 3)).unflatten(1, (self.classes, -1))
        return self.scale * parts.mean(2)


def small_net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, classes)
    )


# predict and accuracy ------------------------------------------------------------------------------------------------


def test_prediction_is_in_evaluation_mode_and_leaves_the_model_as_it_was():
    model = small_net()
    model[1].eval()  # a frozen norm inside a training model stays what it is
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, labels = data()
    first = predict(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(first, model.eval()(x / 255.0).detach())
    assert accuracy(model, x, labels) == (first.argmax(1) == labels).double().mean().item()


def test_modes_come_back_after_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = nn.Sequential(Broken(), nn.Dropout()).train()
    with pytest.raises(RuntimeError, match="broken"):
        predict(model, data()[0])
    assert all(module.training for module in model.modules())


def test_chunks_join_up():
    x, labels = data(2 * CHUNK + 7)
    assert torch.equal(predict(Bands(), x), Bands()(x / 255.0).detach())
    seen = []

    def change(pixels, rows):
        seen.append((rows.start, rows.stop))
        return pixels

    assert accuracy(Bands(), x, labels, change=change) == 1.0
    assert seen == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK + 7)]


# occlusion -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    rate=st.floats(0, 1),
    patch=st.integers(1, 6),
    height=st.integers(3, 14),
    width=st.integers(3, 14),
    n=st.integers(1, 5),
)
def test_occlusion_paints_exactly_so_many_patches(rate, patch, height, width, n):
    x = torch.rand((n, 3, height, width), generator=gen(), dtype=torch.float64)
    before = x.clone()
    order, (rows, columns) = patch_order(n, (height, width), patch, generator=gen(1))
    assert (rows, columns) == (math.ceil(height / patch), math.ceil(width / patch))
    out = occlude(x, order, rate, patch=patch, fill=(2.0, 3.0, 4.0))
    assert torch.equal(x, before)
    painted = math.floor(rate * rows * columns + 0.5)
    for i in range(n):
        count = 0
        for p in range(rows * columns):
            top, left = p // columns * patch, p % columns * patch
            block = out[i, :, top : top + patch, left : left + patch]
            own = x[i, :, top : top + patch, left : left + patch]
            if torch.equal(block, torch.tensor([2.0, 3.0, 4.0]).double().view(3, 1, 1).expand_as(block)):
                count += 1
            else:
                assert torch.equal(block, own)
        assert count == painted


def test_higher_rates_paint_the_same_patches_and_more():
    x = torch.rand(5, 1, 28, 28, generator=gen()) + 1.0
    order, grid = patch_order(5, (28, 28), default_patch((28, 28)), generator=gen(1))
    assert grid == (7, 7)
    painted = [occlude(x, order, rate, patch=4) == 0 for rate in RATES]
    for less, more in itertools.pairwise(painted):
        assert bool((more | ~less).all())
        assert more.sum() > less.sum()
    assert [default_patch((side, side + 3)) for side in (8, 28, 32, 64, 96, 224)] == [4, 4, 4, 4, 6, 16]


def test_every_patch_is_dropped_equally_often():
    order, grid = patch_order(20_000, (12, 8), 4, generator=gen())
    assert grid == (3, 2)
    share = (order < 2).double().mean(0)
    assert torch.allclose(share, torch.full((6,), 1 / 3, dtype=torch.float64), atol=0.015)


def test_occlusion_curve_of_a_known_model():
    x, labels = data(90)
    measured = occlusion_accuracy(Bands(), x, labels, rates=(0.0, 0.5, 1.0), patch=4, generator=gen())
    assert measured["rates"] == [0.0, 0.5, 1.0]
    assert (measured["patch"], measured["grid"]) == (4, [3, 3])
    assert measured["accuracy"][0] == accuracy(Bands(), x, labels) == 1.0
    assert measured["accuracy"][0] > measured["accuracy"][1] > measured["accuracy"][2]
    assert measured["accuracy"][2] == 1 / 3  # nothing left: equal logits, the first class
    again = occlusion_accuracy(Bands(), x, labels, rates=(0.0, 0.5, 1.0), patch=4, generator=gen())
    assert again == measured
    # The slow reading of one rate.
    order, _ = patch_order(90, (12, 12), 4, generator=gen())
    hits = 0
    for i in range(90):
        image = (x[i].numpy() / 255.0).astype(np.float64)
        for p in range(9):
            if order[i, p] < 5:  # 4.5 rounds up
                image[:, p // 3 * 4 : p // 3 * 4 + 4, p % 3 * 4 : p % 3 * 4 + 4] = 0.0
        hits += int(np.argmax([image[:, 4 * c : 4 * c + 4].mean() for c in range(3)]) == labels[i])
    assert measured["accuracy"][1] == hits / 90


# FGSM ----------------------------------------------------------------------------------------------------------------


def linear_model(classes: int, pixels: int, seed: int = 0) -> tuple[nn.Sequential, np.ndarray, np.ndarray]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()
    return model, model[1].weight.detach().numpy(), model[1].bias.detach().numpy()


def test_sign_of_a_linear_model_by_hand():
    model, w, b = linear_model(4, 2 * 3 * 3)
    x = torch.rand((6, 2, 3, 3), generator=gen(), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    sign = fgsm_sign(model, x, y)
    for i in range(6):
        z = w @ x[i].numpy().ravel() + b
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        gradient = (p - np.eye(4)[y[i]]) @ w  # of the cross entropy
        np.testing.assert_array_equal(sign[i].numpy().ravel(), np.sign(gradient))


def test_attack_on_two_classes_is_the_largest_change_of_the_margin():
    model, w, b = linear_model(2, 12, seed=1)
    x = 0.4 + 0.2 * torch.rand((200, 3, 2, 2), generator=gen(), dtype=torch.float64)
    flat = x.flatten(1).numpy()
    difference = w[1] - w[0]
    margin = flat @ difference + b[1] - b[0]
    y = torch.from_numpy((margin > 0).astype(np.int64))
    epsilons = (0.0, 0.01, 0.05, 0.2)  # nothing is clipped
    got = fgsm_accuracy(model, x, y, epsilons=epsilons)
    for epsilon, share in zip(epsilons, got["accuracy"], strict=True):
        assert share == np.mean(np.abs(margin) > epsilon * np.abs(difference).sum())
    assert got["epsilons"] == list(epsilons)
    assert got["accuracy"][0] == 1.0 > got["accuracy"][-1]


def test_attacked_pixels_stay_in_range_and_within_epsilon():
    seen = []

    class Spy(Bands):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    x, labels = data()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0, 255
    fgsm_accuracy(Spy(), x, labels, epsilons=(0.1,))
    clean, attacked = seen
    assert 0.0 <= float(attacked.min()) <= float(attacked.max()) <= 1.0
    moved = (attacked - clean).abs()
    assert float(moved.max()) <= 0.1 + 1e-6
    inside = (clean > 0.1) & (clean < 0.9)
    assert torch.allclose(moved[inside], torch.tensor(0.1), atol=1e-6)


def test_an_overconfident_model_hides_no_gradient():
    x, labels = data(30)
    sure = Bands()
    sure.scale.data.fill_(1e5)  # softmax is exactly one-hot in float32
    pixels = (x / 255.0).requires_grad_()
    plain = nn.functional.cross_entropy(sure(pixels), labels, reduction="sum")
    assert not torch.autograd.grad(plain, pixels)[0].any()
    sign = fgsm_sign(sure, x / 255.0, labels)
    # The own band is pulled down and another pulled up.
    for i, label in enumerate(labels.tolist()):
        assert bool((sign[i, :, 4 * label : 4 * label + 4] == -1).all())
        assert bool((sign[i] == 1).any())
    calm = Bands()
    calm.scale.data.fill_(1.0)
    attacked = [fgsm_accuracy(model, x, labels, epsilons=(0.1, 0.5))["accuracy"] for model in (sure, calm)]
    assert attacked[0][1] < 0.5  # a plain gradient would leave 1.0
    assert attacked[0][0] >= attacked[0][1]


def test_attack_touches_no_gradient_no_statistic_and_no_mode():
    model = small_net().train()
    x, labels = data()
    loss = nn.functional.cross_entropy(model(x / 255.0), labels)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = fgsm_accuracy(model, x, labels)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    with torch.no_grad():  # a caller's no_grad doesn't switch the attack off
        assert fgsm_accuracy(model, x, labels) == first
    model.requires_grad_(False)
    assert fgsm_accuracy(model, x, labels) == first


# corruptions ---------------------------------------------------------------------------------------------------------


def test_corruption_table_is_the_accuracy_of_corrupted_images():
    x, labels = data(CHUNK + 20, seed=3)
    model = Bands()
    got = corruption_accuracy(model, x, labels, names=("brightness", "contrast", "gaussian-noise"), seed=4)
    assert got["severities"] == [1, 2, 3, 4, 5]
    assert list(got["accuracy"]) == ["brightness", "contrast", "gaussian-noise"]
    for severity in (1, 5):
        want = accuracy(model, corrupt(x / 255.0, "contrast", severity), labels)
        assert got["accuracy"]["contrast"][severity - 1] == want
    noise = got["accuracy"]["gaussian-noise"]
    alone = corruption_accuracy(model, x, labels, names=("gaussian-noise",), seed=4)["accuracy"]["gaussian-noise"]
    assert alone == noise


# mixed images --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=30), seed=st.integers(0, 99))
def test_partners_are_of_another_class(labels, seed):
    tensor = torch.tensor(labels)
    if len(set(labels)) == 1:
        with pytest.raises(ValueError, match="holds one class only"):
            other_class_partner(tensor, generator=gen(seed))
        return
    partner = other_class_partner(tensor, generator=gen(seed))
    assert bool((tensor[partner] != tensor).all())
    assert torch.equal(partner, other_class_partner(tensor, generator=gen(seed)))


def test_partners_are_equally_likely():
    labels = torch.tensor([1, 0, 1, 2, 0])
    found = [Counter() for _ in labels]
    g = gen()
    for _ in range(3000):
        for i, j in enumerate(other_class_partner(labels, generator=g).tolist()):
            found[i][j] += 1
    for i, counts in enumerate(found):
        others = [j for j in range(5) if labels[j] != labels[i]]
        assert sorted(counts) == others
        assert all(abs(counts[j] / 3000 - 1 / len(others)) < 0.05 for j in others)


@settings(deadline=None, max_examples=60)
@given(lam=st.floats(0, 1), height=st.integers(4, 40), width=st.integers(4, 40), seed=st.integers(0, 99))
def test_plans_have_the_share_they_say_and_boxes_lie_inside(lam, height, width, seed):
    place = torch.rand((7, 2), generator=gen(seed))
    own, other = torch.zeros(7, 1, height, width), torch.ones(7, 1, height, width)
    for kind in ("mixup", "cutmix"):
        plan = plan_at(kind, lam, place, (height, width), other=other)
        shown = 1.0 - plan.blend(own).mean((1, 2, 3))
        assert torch.allclose(shown, plan.lam, atol=1e-6)
        if kind == "mixup":
            assert torch.allclose(plan.lam, torch.tensor(lam), atol=1e-6)
        else:
            assert bool((plan.box[..., 0] >= 0).all())
            assert bool((plan.box[..., 1] <= torch.tensor([height, width])).all())
            assert len(set(plan.lam.tolist())) == 1  # never cut at the border
            # Half a pixel of one side, over the whole.
            assert abs(float(plan.lam[0]) - lam) <= 0.5 / min(height, width) + 1e-6


def test_boxes_reach_every_corner():
    place = torch.tensor([[0.0, 0.0], [0.999999, 0.999999]])
    box = plan_at("cutmix", 0.75, place, (28, 28)).box
    assert box[0].tolist() == [[0, 14], [0, 14]]
    assert box[1].tolist() == [[14, 28], [14, 28]]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_curve_equals_the_loop(kind):
    x, labels = data(40, classes=3, seed=5)
    model = Bands()
    got = mixed_accuracy_curve(model, x, labels, kind, lams=(0.2, 0.5), generator=gen(2))
    g = gen(2)
    partner = other_class_partner(labels, generator=g)
    place = torch.rand((40, 2), generator=g)
    for k, lam in enumerate((0.2, 0.5)):
        plan = plan_at(kind, lam, place, (12, 12))
        both = either = own = 0.0
        for i in range(40):
            a, b = x[i].numpy() / 255.0, x[partner[i]].numpy() / 255.0
            if kind == "mixup":
                mixed = lam * a + (1 - lam) * b
            else:
                (top, bottom), (left, right) = plan.box[i].tolist()
                mixed = a.copy()
                mixed[:, top:bottom, left:right] = b[:, top:bottom, left:right]
            z = [20.0 * mixed[:, 4 * c : 4 * c + 4].mean() for c in range(3)]
            p = np.exp(z) / np.exp(z).sum()
            two = set(np.argsort(p)[-2:].tolist())
            both += two == {int(labels[i]), int(labels[partner[i]])}
            either += int(np.argmax(p)) in (int(labels[i]), int(labels[partner[i]]))
            own += p[labels[i]]
        assert got["both"][k] == both / 40
        assert got["either"][k] == either / 40
        assert got["own"][k] == pytest.approx(own / 40, rel=1e-5)
        assert got["lam"][k] == pytest.approx(float(plan.lam[0]))
    assert got["own"][0] < got["own"][1]
    assert got["partner"][0] > got["partner"][1]


def test_an_fmix_plan_shows_exactly_its_share_and_nests():
    """The field depends on the place alone, so a larger share keeps every pixel of a smaller one."""
    place = torch.rand((5, 2), generator=gen())
    own, other = torch.ones(5, 1, 12, 16), torch.zeros(5, 1, 12, 16)
    shown = [plan_at("fmix", lam, place, (12, 16), other=other).blend(own) for lam in (0.25, 0.5, 0.75)]
    for lam, mixed in zip((0.25, 0.5, 0.75), shown, strict=True):
        assert (mixed.mean((1, 2, 3)) == lam).all()
        assert torch.allclose(plan_at("fmix", lam, place, (12, 16)).lam, torch.tensor(lam))
    assert (shown[0] <= shown[1]).all()
    assert (shown[1] <= shown[2]).all()
    assert not torch.equal(shown[1][0], shown[1][1])


def test_a_resizemix_plan_shows_the_whole_partner_in_its_box():
    place = torch.tensor([[0.0, 0.0], [0.5, 0.999999]])
    ramp = torch.linspace(0, 1, 16).expand(2, 1, 16, 16)  # dark to bright along the width
    plan = plan_at("resizemix", 0.75, place, (16, 16), other=ramp)
    mixed = plan.blend(torch.full((2, 1, 16, 16), 2.0))
    assert plan.lam.tolist() == [0.75, 0.75]
    box = mixed[0, 0, :8, :8]
    assert (mixed[0] < 2).sum() == 64
    assert torch.allclose(box[:, 0], torch.tensor(1 / 30))
    assert torch.allclose(box[:, -1], torch.tensor(29 / 30))
    assert torch.equal(mixed[0, 0, 0, 8:], torch.full((8,), 2.0))
    assert plan_at("resizemix", 1.0, place, (16, 16), other=ramp).lam.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["fmix", "resizemix"])
def test_masks_of_every_policy_have_a_curve(kind):
    x, labels = data(40, classes=3, seed=5)
    got = mixed_accuracy_curve(Bands(), x, labels, kind, lams=(0.2, 0.5, 0.8), generator=gen(2))
    assert got["lam"] == pytest.approx([0.2, 0.5, 0.8], abs=0.05)
    assert got["own"][0] < got["own"][2]
    assert all(0.0 <= value <= 1.0 for value in got["both"])


def test_mixed_curve_is_the_same_for_every_model_and_number_of_lambdas():
    x, labels = data(30)
    full = mixed_accuracy_curve(Bands(), x, labels, "cutmix", generator=gen())
    part = mixed_accuracy_curve(Bands(), x, labels, "cutmix", lams=LAMS[4:5], generator=gen())
    assert {key: values[4:5] for key, values in full.items()} == part
    assert full["lam"] == pytest.approx(LAMS, abs=0.05)


# bad inputs ----------------------------------------------------------------------------------------------------------

X, Y = data(6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: accuracy(Bands(), X[0], Y), ValueError, r"accuracy: images has shape \(2, 12, 12\)"),
        (lambda: accuracy(Bands(), X.long(), Y), TypeError, "images has dtype torch.int64"),
        (lambda: accuracy(Bands(), X, Y[:5]), ValueError, "labels has 5 entries but images has 6 rows"),
        (lambda: accuracy(Bands(), X, Y.float()), ValueError, "pass .N,. integer class ids"),
        (lambda: accuracy(Bands(), X, Y + 7), ValueError, "labels holds the class 7"),
        (lambda: fgsm_accuracy(Bands(), X, Y - 1), ValueError, "labels holds the class -1"),
        (lambda: predict(lambda x: x, X), ValueError, r"model gave \(6, 2, 12, 12\) for 6 images"),
        (lambda: predict(lambda x: x.mean((1, 2)) / 0.0, X), ValueError, "logits that are NaN or infinite"),
        (lambda: fgsm_accuracy(lambda x: torch.zeros(6, 3), X, Y), ValueError, "logits without a gradient"),
        (lambda: fgsm_accuracy(Bands(), X, Y, epsilons=(-0.1,)), ValueError, "epsilons is -0.1"),
        (lambda: occlusion_accuracy(Bands(), X, Y, rates=(1.5,)), ValueError, "rate is 1.5; pass a number from 0 to 1"),
        (lambda: occlusion_accuracy(Bands(), X, Y, patch=0), ValueError, "patch is 0"),
        (lambda: occlude(X / 255.0, torch.zeros(6, 4), 0.5, patch=4), ValueError, r"pass \(6, 9\) from patch_order"),
        (lambda: occlude(X, torch.zeros(6, 9), 0.5, patch=4), TypeError, "pass floats in 0..1"),
        (lambda: corruption_accuracy(Bands(), X, Y, names=("fog",)), ValueError, "name is 'fog'"),
        (lambda: corruption_accuracy(Bands(), X, Y, seed=-1), ValueError, "seed is -1"),
        (lambda: mixed_accuracy_curve(Bands(), X, Y, "cutmx"), ValueError, 'did you mean "cutmix"'),
        (lambda: mixed_accuracy_curve(Bands(), X, Y, "mixup", lams=(2.0,)), ValueError, "lam is 2.0"),
        (lambda: mixed_accuracy_curve(Bands(), X, 0 * Y, "mixup"), ValueError, "one class only"),
    ],
)
def test_bad_inputs_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
