"""The adapter against torchvision itself: at the same lambda and box, the same images and labels; tv_tensors and v2."""

from __future__ import annotations

import inspect

import pytest
import torch

from hardmix import mixing
from hardmix.integrations.torchvision import CutMix, Mix, MixUp
from hardmix.losses import DecoupledMixupLoss
from hardmix.mixing import MixedTarget


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def real_params(plan):
    """What torchvision would have to draw for this plan of one draw."""
    lam = float(plan.lam[0])
    if plan.box is None:
        return {"lam": lam}
    (top, bottom), (left, right) = plan.box[0].tolist()
    return {"box": (left, top, right, bottom), "lam_adjusted": lam}


@pytest.mark.parametrize("make", [MixUp, CutMix])
@pytest.mark.parametrize("labels", ["ids", "soft"])
def test_same_draws_same_results(v2, monkeypatch, make, labels):
    for seed in range(8):
        x = torch.rand(5, 3, 10, 14, generator=seeded(seed))
        y = torch.randint(4, (5,), generator=seeded(seed))
        if labels == "soft":
            y = torch.rand(5, 4, generator=seeded(seed))
        settings = {"alpha": 0.7, "num_classes": 4}
        ours = make(**settings, generator=seeded(seed))
        params = real_params(ours.plan(x, y))
        real = getattr(v2, make.__name__)(**settings)
        monkeypatch.setattr(real, "make_params", lambda flat, params=params: params)
        expected_x, expected_y = real(x, y)
        ours.generator.manual_seed(seed)
        mixed, dense = ours(x, y)
        assert torch.allclose(mixed, expected_x, atol=1e-6)
        assert torch.allclose(dense, expected_y, atol=1e-6)
        assert dense.dtype == expected_y.dtype


@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_names_and_defaults_are_torchvisions(v2, make):
    def arguments(cls):
        found = inspect.signature(cls).parameters.values()
        return [(p.name, p.default, p.kind) for p in found if p.name != "generator"]

    assert arguments(make) == arguments(getattr(v2, make.__name__))


def test_it_finds_labels_and_images_where_torchvision_does(v2, tv_tensors):
    x, y, extra = torch.rand(4, 3, 6, 6), torch.arange(4), torch.rand(4, 3, 6, 6)
    image = tv_tensors.Image(x)
    for batch in [
        (x, y),
        [x, y],
        {"image": x, "label": y},
        {"image": x, "other": extra, "LABELS": y, "label_of_something": None},
        (x, {"labels": y, "extra": extra}),
        (image, {"extra": extra, "labels": y}),
        (x, y, extra),
    ]:
        outs = []
        for make in (MixUp, v2.MixUp):
            mix = make(num_classes=4)
            if make is MixUp:
                mix.plan = lambda x, y: mixing.MixPlan(torch.tensor([3, 0, 1, 2]), torch.full((4,), 0.25))
            else:
                mix.make_params = lambda flat: {"lam": 0.25}
            leaves, spec = torch.utils._pytree.tree_flatten(mix(batch))
            outs.append((leaves, spec))
        (ours, our_spec), (theirs, their_spec) = outs
        assert our_spec == their_spec
        for a, b in zip(ours, theirs, strict=True):
            assert type(a) is type(b)
            assert a is b or torch.allclose(a, b)


def test_tv_tensors_are_wrapped_again(tv_tensors):
    x, y = torch.rand(4, 3, 8, 10), torch.arange(4)
    second = torch.rand(4, 1, 8, 10)
    mask = tv_tensors.Mask(torch.randint(9, (4, 8, 10)))
    batch = {
        "image": tv_tensors.Image(x),
        "depth": tv_tensors.Image(second),
        "plain": torch.rand(4, 3, 8, 10),
        "seg": mask,
        "label": y,
    }
    mix = CutMix(num_classes=4, generator=seeded(2))
    plan = mix.plan(x, y)
    mix.generator.manual_seed(2)
    out = mix(batch)
    assert {key: type(value) for key, value in out.items()} == {key: type(value) for key, value in batch.items()}
    assert torch.equal(out["image"], plan.blend(x))
    assert torch.equal(out["depth"], plan.blend(second))
    assert out["plain"] is batch["plain"]  # as in torchvision, where there is an Image, other tensors are no images
    assert torch.equal(out["seg"], torch.where(plan.mask[:, 0] == 1, mask, mask.roll(1, 0)))
    assert torch.equal(out["label"], plan.target(y).dense(4))


def test_a_segmentation_pair_of_tv_tensors(tv_tensors):
    image, mask = tv_tensors.Image(torch.rand(4, 3, 8, 10)), tv_tensors.Mask(torch.randint(9, (4, 1, 8, 10)))
    out_image, out_mask = CutMix(generator=seeded(2))(image, mask)
    assert (type(out_image), type(out_mask)) == (tv_tensors.Image, tv_tensors.Mask)
    assert out_mask.shape == mask.shape
    with pytest.raises(ValueError, match="the policy blends, but a mask"):
        MixUp()(image, mask)


@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_every_frame_of_a_video_is_mixed_alike(v2, tv_tensors, make):
    frames = torch.rand(4, 3, 2, 8, 10)
    mix = make(num_classes=4, generator=seeded(6))
    params = real_params(mix.plan(frames.flatten(1, 2), None))
    mix.generator.manual_seed(6)
    video, dense = mix(tv_tensors.Video(frames), torch.arange(4))
    real = getattr(v2, make.__name__)(num_classes=4)
    real.make_params = lambda flat: params
    expected, expected_dense = real(tv_tensors.Video(frames), torch.arange(4))
    assert type(video) is tv_tensors.Video
    assert torch.allclose(video, expected, atol=1e-6)
    assert torch.allclose(dense, expected_dense, atol=1e-6)


def test_boxes_and_keypoints_are_refused(tv_tensors):
    x, y = torch.rand(2, 3, 8, 8), torch.arange(2)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(2, 4), format="XYXY", canvas_size=(8, 8))
    with pytest.raises(ValueError, match="CutMix: the batch holds a BoundingBoxes, which can't be mixed; take it out"):
        CutMix(num_classes=2)(x, {"labels": y, "boxes": boxes})
    if hasattr(tv_tensors, "KeyPoints"):
        points = tv_tensors.KeyPoints(torch.zeros(2, 2), canvas_size=(8, 8))
        with pytest.raises(ValueError, match="CutMix: the batch holds a KeyPoints"):
            CutMix(num_classes=2)(x, {"labels": y, "points": points})


def test_inside_v2_transforms(v2):
    x, y = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6)
    choice = v2.RandomChoice([MixUp(num_classes=6), CutMix(num_classes=6), Mix(mixing.FMix(), num_classes=6)])
    for transform in (choice, v2.Compose([v2.RandomHorizontalFlip(), choice])):
        for _ in range(6):
            images, labels = transform(x, y)
            assert images.dtype == torch.uint8  # torchvision's MixUp raises on integers; here they are rounded
            assert images.shape == x.shape
            assert torch.allclose(labels.sum(1), torch.ones(6))


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_torchvisions_own_soft_labels_go_into_the_decoupled_loss(v2, name):
    torch.manual_seed(0)
    x = torch.arange(6.0).view(6, 1, 1, 1).repeat(1, 1, 16, 16)
    y, logits = torch.arange(6), torch.randn(6, 9, generator=seeded())
    mixed, dense = getattr(v2, name)(num_classes=9)(x, y)
    own, other = y.float(), y.roll(1, 0).float()
    lam = (mixed.mean((1, 2, 3)) - other) / (own - other)  # rows hold their own number, so the share can be read off
    target = MixedTarget(torch.stack([y, y.roll(1, 0)], 1), torch.stack([lam, 1 - lam], 1))
    pair = MixedTarget.from_dense(dense)
    assert torch.allclose(pair.dense(9), target.dense(9), atol=1e-5)
    loss = DecoupledMixupLoss(reduction="none")
    assert torch.allclose(loss(logits, dense), loss(logits, target), atol=1e-5)
