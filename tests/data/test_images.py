"""Image sets: order, ids, subsets, statistics, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hardmix.data.images as module
from hardmix.data import FileImages, ImageSet, TensorImages, channel_statistics, check_finite

PIXELS = torch.randint(0, 256, (12, 3, 6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(12) % 4
NAMES = ("a", "b", "c", "d")


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    """The same images as files of 5 x 5 pixels."""
    paths = []
    for i, image in enumerate(PIXELS[:, :, :5]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(paths[-1])
    return FileImages(paths, LABELS, NAMES, image_size=5)


def in_memory() -> TensorImages:
    return TensorImages(PIXELS[:, :, :5].contiguous(), LABELS, NAMES, split="train")


@pytest.fixture(params=["memory", "files"])
def images(request: pytest.FixtureRequest) -> ImageSet:
    return in_memory() if request.param == "memory" else request.getfixturevalue("files")


def test_a_batch_has_the_order_of_its_index(images: ImageSet) -> None:
    index = torch.tensor([5, 0, 5, 11])
    batch = images.batch(index)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, PIXELS[index, :, :5])
    assert torch.equal(images.batch(index.int()), batch)
    assert images.shape == (3, 5, 5)
    assert len(images) == 12


def test_a_batch_is_a_copy(images: ImageSet) -> None:
    images.batch(torch.arange(3)).zero_()
    assert torch.equal(images.batch(torch.arange(3)), PIXELS[:3, :, :5])


def test_an_empty_index_gives_an_empty_batch(images: ImageSet) -> None:
    assert images.batch(torch.tensor([], dtype=torch.long)).shape == (0, 3, 5, 5)


def test_a_subset_of_a_subset_keeps_pixels_labels_and_ids(images: ImageSet) -> None:
    part = images.subset(torch.tensor([10, 3, 7])).subset(torch.tensor([2, 0]))
    assert type(part) is type(images)
    assert part.labels.tolist() == [LABELS[7], LABELS[10]]
    assert torch.equal(part.batch(torch.arange(2)), PIXELS[[7, 10], :, :5])
    assert [part.sample_id(0), part.sample_id(1)] == [images.sample_id(7), images.sample_id(10)]
    assert len(part) == 2
    assert len(images) == 12


def test_a_subset_shares_the_pixels() -> None:
    whole = in_memory()
    part = whole.subset(torch.arange(3))
    assert part._pixels.data_ptr() == whole._pixels.data_ptr()


def test_ids(files: FileImages) -> None:
    assert in_memory().sample_id(7) == "train/7"
    assert TensorImages(PIXELS, LABELS, NAMES, split="test").sample_id(0) == "test/0"
    assert files.sample_id(7) == str(files.paths[7])
    assert files.subset(torch.tensor([7])).paths == [files.paths[7]]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 12]), "index holds 12; pass rows from 0 to 11"),
        (torch.tensor([-1]), "index holds -1; pass rows"),
        (torch.tensor([0.0]), r"index has shape \(1,\) and dtype torch.float32"),
        (torch.tensor([True]), r"index has shape \(1,\) and dtype torch.bool"),
        (torch.tensor(3), r"index has shape \(\)"),
    ],
)
def test_a_bad_index_is_named(images: ImageSet, index: torch.Tensor, message: str) -> None:
    for call in (images.batch, images.subset):
        with pytest.raises(ValueError, match=f"{type(images).__name__}: {message}"):
            call(index)


def test_an_index_has_to_be_a_tensor(images: ImageSet) -> None:
    bad: Any = [0, 1]
    with pytest.raises(TypeError, match=r"index is a list; pass a torch\.Tensor"):
        images.batch(bad)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (PIXELS.float(), LABELS, "pixels has dtype torch.float32; pass uint8"),
        (PIXELS[0], LABELS, r"pixels has shape \(3, 6, 5\)"),
        (PIXELS[:0], LABELS[:0], r"pixels has shape \(0, 3, 6, 5\) and is empty"),
        (PIXELS, LABELS[:11], "there are 11 labels for 12 images"),
        (PIXELS, LABELS + 1, "labels holds 4; pass class ids from 0 to 3"),
        (PIXELS, LABELS - 1, "labels holds -1; pass class ids"),
        (PIXELS, LABELS.float(), r"labels has shape \(12,\) and dtype torch.float32"),
        (PIXELS, LABELS[:, None], r"labels has shape \(12, 1\)"),
    ],
)
def test_bad_arrays_are_named(pixels: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"TensorImages: {message}"):
        TensorImages(pixels, labels, NAMES)


def test_scaling_a_batch_up_is_bilinear() -> None:
    ramp = torch.tensor([0, 100, 200], dtype=torch.uint8).expand(1, 1, 3, 3)
    scaled = TensorImages(ramp, torch.zeros(1, dtype=torch.long), ["a"], image_size=6)
    assert scaled.shape == (1, 6, 6)
    # pixel centres at (j + 1/2) / 2 - 1/2 of the old grid
    expected = [round(100 * min(max((j + 0.5) / 2 - 0.5, 0), 2)) for j in range(6)]
    assert scaled.batch(torch.tensor([0])).tolist() == [[[expected] * 6]]


def test_scaling_a_batch_down_averages() -> None:
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = TensorImages(checks.to(torch.uint8)[None, None], torch.tensor([0]), ["a"], image_size=8)
    assert ((small.batch(torch.tensor([0])).float() - 127.5).abs() <= 2).all()


def test_each_file_is_decoded_once_while_the_set_is_small(files: FileImages) -> None:
    files.batch(torch.arange(6))
    for path in files.paths[:6]:
        path.unlink()
    assert torch.equal(files.subset(torch.tensor([2])).batch(torch.tensor([0])), PIXELS[2:3, :, :5])


def test_a_large_set_is_not_kept(files: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 12 * 75 - 1)
    large = FileImages(files.paths, LABELS, NAMES, image_size=5)
    large.batch(torch.arange(6))
    files.paths[0].unlink()
    with pytest.raises(ValueError, match=r"^FileImages: '.*0.png' does not exist; replace or remove it\.$"):
        large.batch(torch.tensor([0]))


def test_a_file_that_can_not_be_decoded_is_named(files: FileImages) -> None:
    content = files.paths[4].read_bytes()
    files.paths[4].write_bytes(content[:60])
    with pytest.raises(ValueError, match=r"^FileImages: '.*4.png' can't be decoded .*; replace or remove it\.$"):
        files.batch(torch.arange(12))


@pytest.mark.parametrize("channels", [0, 2, 4, True, "3", None])
def test_channels_are_one_or_three(channels: Any) -> None:
    with pytest.raises(ValueError, match=r"FileImages: channels is .*; pass 3 for RGB or 1 for gray"):
        FileImages([Path("a.png")], torch.tensor([0]), ["a"], image_size=4, channels=channels)


def test_statistics_are_those_of_numpy(images: ImageSet) -> None:
    mean, std = channel_statistics(images)
    values = PIXELS[:, :, :5].numpy().astype(np.float64) / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)), rel=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3)), rel=1e-12)


def test_statistics_of_more_than_one_chunk() -> None:
    pixels = torch.randint(0, 256, (1300, 1, 3, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    mean, std = channel_statistics(TensorImages(pixels, torch.zeros(1300, dtype=torch.long), ["a"]))
    values = pixels.numpy().astype(np.float64) / 255
    assert (mean[0], std[0]) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_statistics_of_some_evenly_spaced_images() -> None:
    mean, _ = channel_statistics(in_memory(), samples=4)
    assert mean == pytest.approx(PIXELS[[0, 3, 6, 9], :, :5].double().mean((0, 2, 3)).div(255).tolist(), rel=1e-12)
    assert channel_statistics(in_memory(), samples=500) == channel_statistics(in_memory())


def test_the_deviation_of_a_constant_channel_is_not_zero() -> None:
    flat = TensorImages(torch.full((2, 1, 2, 2), 51, dtype=torch.uint8), torch.tensor([0, 0]), ["a"])
    mean, std = channel_statistics(flat)
    assert mean == pytest.approx((0.2,))
    assert std == (1 / 255,)


def test_check_finite_names_the_samples() -> None:
    x = torch.zeros(8, 1, 2, 2)
    ids = [f"train/{i}" for i in range(8)]
    check_finite("step", x, ids)
    x[1, 0, 0, 0] = float("nan")
    x[6] = -float("inf")
    with pytest.raises(
        ValueError, match=r"^step: 2 of 8 samples hold NaN or infinity \(train/1, train/6\); repair or remove them\.$"
    ):
        check_finite("step", x, ids)
    x.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"8 of 8 .*train/4 and 3 more\)"):
        check_finite("step", x, ids)
