"""The torchvision adapter on its own: plain tensors in any structure. No torchvision is needed here."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from hardmix import mixing
from hardmix.integrations.torchvision import CutMix, Mix, MixUp
from hardmix.losses import DecoupledMixupLoss

Batch = namedtuple("Batch", "image label")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def slow(x, share):
    """Row i blended with row i - 1 by the share of its own pixels, in float64."""
    x = x.double().numpy()
    return np.stack([share[i] * x[i] + (1 - share[i]) * x[i - 1] for i in range(len(x))])


@settings(max_examples=40, deadline=None)
@given(
    make=st.sampled_from([MixUp, CutMix]),
    rows=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.uint8]),
    seed=st.integers(0, 1000),
)
def test_images_and_labels_follow_one_plan(make, rows, dtype, seed):
    x = (torch.rand(rows, 2, 6, 9, generator=seeded(seed)) * 255).to(dtype)
    y = torch.randint(5, (rows,), generator=seeded(seed))
    before = x.clone()
    mix = make(alpha=0.7, num_classes=5, generator=seeded(seed))
    plan = mix.plan(x, y)
    mix.generator.manual_seed(seed)
    mixed, dense = mix(x, y)
    assert torch.equal(x, before)
    assert mixed.dtype == dtype
    assert plan.lam.unique().numel() == 1
    lam = plan.lam[0].item()
    share = [
        np.full((1, 6, 9), lam) if plan.mask is None else row.double().numpy()
        for row in (plan.mask if plan.mask is not None else x)
    ]
    rounding = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.1, torch.uint8: 0.501}[dtype]
    assert np.abs(mixed.double().numpy() - slow(x, share)).max() <= rounding
    expected = slow(torch.eye(5)[y], [lam] * rows)
    assert np.abs(dense.double().numpy() - expected).max() < 1e-6
    assert share[0].mean() == pytest.approx(lam, abs=1e-6)


def test_every_structure_comes_back_as_it_was():
    x, y, ids = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 0]), torch.arange(4)

    def mixed(*inputs):
        return CutMix(num_classes=3, generator=seeded(1))(*inputs)

    images, labels = mixed(x, y)
    assert labels.shape == (4, 3)
    for batch in [(x, y), [x, y], {"image": x, "label": y}, OrderedDict(pixels=x, the_LABEL_ids=y), Batch(x, y)]:
        out = mixed(batch)
        assert type(out) is type(batch)
        first, second = out.values() if isinstance(out, dict) else out
        assert torch.equal(first, images)
        assert torch.equal(second, labels)
        if isinstance(out, dict):
            assert list(out) == list(batch)
    nested = mixed(x, {"id": ids, "name": ["a", "b", "c", "d"], "label_text": "x", "Labels": y, "weight": 0.5})
    assert torch.equal(nested[0], images)
    assert torch.equal(nested[1]["Labels"], labels)
    assert nested[1]["id"] is ids
    assert nested[1]["name"] == ["a", "b", "c", "d"]
    assert nested[1]["weight"] == 0.5
    labels_first = mixed({"labels": y, "ids": None, "image": x})
    assert torch.equal(labels_first["image"], images)
    assert torch.equal(labels_first["labels"], labels)
    getter = CutMix(num_classes=3, generator=seeded(1), labels_getter=lambda batch: batch["y"])
    assert torch.equal(getter({"x": x, "y": y})["y"], labels)


def test_rows_are_blended_as_they_are():
    x = torch.rand(3, 1, 4, 4)
    for y in (
        torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]),
        torch.tensor([[1, 1], [0, 1], [1, 0]]),
        torch.tensor([[12.5], [40.0], [3.0]], dtype=torch.float64),
        torch.tensor([[12.5], [40.0], [3.0]], dtype=torch.float16),
    ):
        mix = MixUp(generator=seeded(4))
        lam = mix.plan(x, y).lam[0].item()
        mix.generator.manual_seed(4)
        _, mixed = mix(x, y)
        assert mixed.dtype == (y.dtype if y.is_floating_point() else torch.float32)
        rounding = 0.02 if y.dtype == torch.float16 else 1e-5
        assert np.abs(mixed.double().numpy() - slow(y, [lam] * 3)).max() < rounding


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.long, torch.bool])
def test_masks_are_cut_with_their_images(shape, dtype):
    """Images and masks that hold the same numbers must still do so afterwards."""
    mask = torch.randint(2 if dtype == torch.bool else 200, shape, generator=seeded()).to(dtype)
    x, y = mask.view(4, 1, 8, 8).float(), torch.arange(4)
    mix = CutMix(num_classes=4, generator=seeded(3))
    as_labels = mix(x, mask)
    by_key = mix({"image": x, "labels": y, "seg_MASKS": mask})
    for images, masks in (as_labels, (by_key["image"], by_key["seg_MASKS"])):
        assert masks.dtype == dtype
        assert masks.shape == shape
        assert torch.equal(masks.view(4, 1, 8, 8).float(), images)
        assert not torch.equal(masks, mask)


@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_masks_of_something_else_than_pixels_pass(make):
    """By their shape: of tokens, of padding, of attention, and of another size than the image."""
    others = {
        "attention_mask": torch.ones(4, 5, dtype=torch.long),
        "pad_mask": torch.ones(4, dtype=torch.bool),
        "causal_mask": torch.ones(4, 5, 5, dtype=torch.bool),
        "square_mask": torch.ones(8, 8, dtype=torch.bool),
        "small_mask": torch.randint(5, (4, 2, 2)),
    }
    out = make(num_classes=4)({**others, "image": X, "label": torch.arange(4)})
    assert not torch.equal(out["image"], X)
    for name, value in others.items():
        assert out[name] is value, name


def test_a_mask_in_an_array_is_refused():
    """It would stay as it is beside an image that is cut; an array of something else passes."""
    batch = {"image": X, "label": torch.arange(4), "attention_mask": np.ones((4, 5))}
    assert CutMix(num_classes=4)(batch)["attention_mask"] is batch["attention_mask"]
    with pytest.raises(TypeError, match=r"CutMix: mask is a ndarray; pass a torch\.Tensor\.$"):
        CutMix(num_classes=4)({**batch, "seg_mask": np.zeros((4, 8, 8), dtype=np.int64)})


def test_a_blended_mask_is_refused():
    mask = torch.randint(5, (4, 8, 8))
    for batch in [(torch.rand(4, 3, 8, 8), mask), (torch.rand(4, 3, 8, 8), {"labels": torch.arange(4), "mask": mask})]:
        with pytest.raises(ValueError, match=r"MixUp: the policy blends, but a mask of dtype torch.int64 .*use CutMix"):
            MixUp(num_classes=4)(*batch)
    with pytest.raises(TypeError, match=r"y is a mask of dtype torch\.float32; pass integer class ids per pixel"):
        CutMix(num_classes=4)(torch.rand(4, 3, 8, 8), torch.rand(4, 8, 8))
    with pytest.raises(ValueError, match=r"y has spatial size \(4, 4\) but the plan's mask has \(8, 8\)"):
        CutMix(num_classes=4)(torch.rand(4, 3, 8, 8), mask[:, :4, :4])


def test_batches_without_labels():
    x, mask = torch.rand(4, 3, 8, 8), torch.randint(5, (4, 8, 8))
    out = CutMix(labels_getter=None, generator=seeded(2))({"image": x, "mask": mask})
    plan = CutMix(labels_getter=None, generator=seeded(2)).plan(x, None)
    assert torch.equal(out["image"], plan.blend(x))
    keep = plan.mask[:, 0] == 1
    assert torch.equal(out["mask"], torch.where(keep, mask, mask.roll(1, 0)))
    mixup = MixUp(labels_getter=None)
    plan = mixup.plan(x, None)
    mixup.plan = lambda images, labels: plan
    assert torch.equal(mixup(x), plan.blend(x))


X = torch.rand(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, torch.arange(4)), r"labels has shape \(4,\) and dtype torch.int64; pass class ids \(N,\) and num_classes"),
        ((X, torch.rand(4)), r"labels has shape \(4,\) and dtype torch.float32; pass numbers as rows \(N, 1\)"),
        ((X, torch.tensor(1)), r"labels has shape \(\) .*; pass class ids"),
        ((X,), "labels_getter found a NoneType, no tensor of the batch; pass \\(images, labels\\)"),
        ((X, [0, 1, 2, 3]), "labels_getter found a list, no tensor"),
        ((X, np.arange(4)), "labels_getter found a ndarray, no tensor"),
        ((X, {"target": torch.rand(4, 2)}), "labels_getter found a NoneType, no tensor"),
        ((X, torch.rand(3, 2)), "y has 3 entries but the plan has 4 rows"),
        ((torch.rand(4, 8), torch.rand(4, 2)), r"images has shape \(4, 8\); pass a batch with 4 axes"),
        ((torch.rand(4, 3, 8), torch.rand(4, 2)), r"images has shape \(4, 3, 8\); pass a batch with 4 axes"),
        (
            (torch.rand(4, 3, 8, 8, 8), torch.rand(4, 2)),
            r"images has shape \(4, 3, 8, 8, 8\); pass a batch with 4 axes",
        ),
        (("no", torch.rand(4, 2)), "the batch holds no image; pass a tensor"),
    ],
)
@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_what_it_can_not_mix_is_refused(make, inputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()(*inputs)
    assert "\n" not in str(caught.value)


def test_labels_that_disagree_with_num_classes_or_with_the_batch():
    with pytest.raises(ValueError, match="CutMix: labels has 2 columns but num_classes is 3; leave it out"):
        CutMix(num_classes=3)(X, torch.rand(4, 2))
    with pytest.raises(ValueError, match="the class 7"):
        CutMix(num_classes=3)(X, torch.tensor([0, 1, 2, 7]))
    with pytest.raises(ValueError, match="labels_getter found a Tensor, no tensor of the batch"):
        CutMix(labels_getter=lambda batch: batch[1] + 0)(X, torch.rand(4, 2))


def test_pictures_are_refused():
    image = pytest.importorskip("PIL.Image").new("RGB", (8, 8))
    with pytest.raises(ValueError, match="MixUp: the batch holds a PIL image, which can't be mixed; take it out"):
        MixUp(num_classes=4)([image, image], torch.arange(2))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha is 0.0"),
        ({"num_classes": 0}, ValueError, "CutMix: num_classes is 0"),
        (
            {"labels_getter": "second"},
            ValueError,
            "CutMix: labels_getter is 'second'; pass \"default\", None or a function",
        ),
        ({"generator": 3}, TypeError, "CutMix: generator is a int"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        CutMix(**settings)


def test_any_policy_that_mixes_the_input_takes_the_form():
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6) % 3
    for policy in (
        mixing.ResizeMix(),
        mixing.FMix(),
        mixing.SmoothMix(),
        mixing.RandomChoice([mixing.Mixup(), mixing.CutMix()], per="sample"),
    ):
        images, labels = Mix(policy, num_classes=3, generator=seeded(3))(x, y)
        plan = policy.plan(x, y, generator=seeded(3))
        assert torch.equal(images, plan.blend(x))
        assert torch.equal(labels, plan.target(y).dense(3))
    with pytest.raises(TypeError, match="Mix: policy is a str; pass a hardmix policy that mixes the input"):
        Mix("cutmix")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Mix: policy is a ManifoldMixup; pass a hardmix policy that mixes the input"):
        Mix(mixing.ManifoldMixup(model, ["0"]))


def test_masks_follow_a_policy_that_resizes():
    x = torch.randint(9, (6, 1, 16, 16), generator=seeded())
    images, masks = Mix(mixing.ResizeMix(), generator=seeded(1))(x.float(), x[:, 0])
    plan = mixing.ResizeMix().plan(x.float(), generator=seeded(1))
    target = plan.target(x[:, 0])
    assert torch.equal(masks, target.labels.gather(1, target.weights.argmax(1, keepdim=True))[:, 0])
    assert images.shape == x.shape


def test_a_second_image_of_another_size_is_not_taken_for_an_image():
    """Without tv_tensors only the first tensor is the image, as in torchvision."""
    x, view, y = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.arange(4)
    out = CutMix(num_classes=4, labels_getter=lambda batch: batch[2])(x, view, y)
    assert out[1] is view


def test_it_mixes_in_a_loader():
    data = [(torch.full((3, 4, 4), float(i)), i % 3) for i in range(10)]
    mix = CutMix(num_classes=3, generator=seeded())
    loader = DataLoader(data, batch_size=4, collate_fn=lambda batch: mix(*default_collate(batch)))
    shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in loader]
    assert shapes == [((4, 3, 4, 4), (4, 3))] * 2 + [((2, 3, 4, 4), (2, 3))]


@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_the_default_device_changes_nothing(make):
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    want = make(num_classes=4, generator=seeded())(x, y)
    mix = make(num_classes=4, generator=seeded())
    with torch.device("meta"):
        got = mix(x, y)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_its_soft_labels_go_into_the_decoupled_loss():
    x, y, logits = torch.rand(6, 1, 8, 8), torch.arange(6), torch.randn(6, 8, generator=seeded())
    mix = CutMix(num_classes=8, generator=seeded(9))
    expected = DecoupledMixupLoss()(logits, mix.plan(x, y).target(y))
    mix.generator.manual_seed(9)
    _, dense = mix(x, y)
    assert torch.allclose(DecoupledMixupLoss()(logits, dense), expected, atol=1e-5)


def test_policies_that_go_on_after_they_have_mixed_are_refused(v2):
    from hardmix.models import build_model

    model = build_model("small-cnn", num_classes=4, in_channels=3, image_size=16, width=4)
    for policy in (mixing.SUMix(model, mixing.CutMix()), mixing.AutoMix(model, input_shape=(3, 16, 16))):
        with pytest.raises(TypeError, match="mixes the input and is done then"):
            Mix(policy, num_classes=4)
