"""The data sets that come with a package."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

import hardmix.data.packaged as packaged
from hardmix.data import load_images

EMBEDDED = Path(str(files("hardmix.data"))) / "embedded"


def test_fashion_mini_is_balanced_in_every_run_of_ten() -> None:
    train, train_labels, test, test_labels = packaged.read_fashion_mini()
    assert train.shape == (12_000, 1, 28, 28)
    assert test.shape == (3_000, 1, 28, 28)
    assert train.dtype == test.dtype == torch.uint8
    for labels in (train_labels, test_labels):
        assert labels.dtype == torch.long
        assert (labels.view(-1, 10) == torch.arange(10)).all()


def test_fashion_mini_is_the_recorded_subset() -> None:
    record = json.loads((EMBEDDED / "fashion-mini.json").read_text())
    train, _, test, _ = packaged.read_fashion_mini()
    for split, pixels in (("train", train), ("test", test)):
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == record[split]["sha256_of_pixels"]
    assert len(record["source"]["files"]) == 4


def test_the_classes_look_like_themselves() -> None:
    """Labels and pixels belong together: the nearest class mean of the training images gets most test images right."""
    train, train_labels, test, test_labels = packaged.read_fashion_mini()
    means = torch.stack([train[train_labels == c].float().mean(0).flatten() for c in range(10)])
    guess = torch.cdist(test.flatten(1).float(), means).argmin(1)
    assert float((guess == test_labels).float().mean()) > 0.6
    trouser, boot = means[1].view(28, 28), means[9].view(28, 28)
    assert trouser[:, 10:18].mean() > 5 * trouser[:, :4].mean()
    assert boot[20:26].mean() > boot[:4].mean()


def test_no_image_stands_in_both_splits_of_fashion_mini() -> None:
    train, _, test, _ = packaged.read_fashion_mini()
    seen = {image.tobytes() for image in train.numpy()}
    assert sum(image.tobytes() in seen for image in test.numpy()) == 0


def test_what_is_shipped_is_small_and_licensed() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 15e6
    notice = (EMBEDDED / "NOTICE").read_text()
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in notice
    assert "Permission is hereby granted, free of charge" in notice


def test_a_sheet_is_its_images_side_by_side() -> None:
    pixels = torch.randint(0, 256, (200, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sheet = packaged.to_sheet(pixels)
    assert sheet.shape == (56, 2800)
    assert torch.equal(sheet[28:, 28 * 7 : 28 * 8], pixels[107, 0])
    assert torch.equal(packaged.from_sheet(sheet), pixels)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped files that may be damaged."""
    shutil.copytree(EMBEDDED, tmp_path / "embedded")
    monkeypatch.setattr(packaged, "files", lambda _: tmp_path)
    packaged.read_fashion_mini()
    return tmp_path / "embedded"


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "fashion-mini-test.png").unlink()
    with pytest.raises(
        ValueError, match=r"^read_fashion_mini: '.*fashion-mini-test.png' is missing; reinstall hardmix\.$"
    ):
        packaged.read_fashion_mini()


def test_a_truncated_sheet_is_named(copied: Path) -> None:
    path = copied / "fashion-mini-train.png"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"fashion-mini-train.png' can't be decoded .*; reinstall hardmix"):
        packaged.read_fashion_mini()


def test_one_changed_pixel_is_noticed(copied: Path) -> None:
    from PIL import Image

    path = copied / "fashion-mini-test.png"
    values = np.array(Image.open(path))
    values[400, 1000] ^= 1
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=r"fashion-mini-test.png' is damaged .*another hash"):
        packaged.read_fashion_mini()


def test_a_sheet_of_another_size_is_named(copied: Path) -> None:
    shutil.copy(copied / "fashion-mini-test.png", copied / "fashion-mini-train.png")
    with pytest.raises(ValueError, match=r"fashion-mini-train.png' has the wrong size"):
        packaged.read_fashion_mini()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train": {"file": "x"}}'])
def test_a_damaged_record_is_named(copied: Path, content: str) -> None:
    (copied / "fashion-mini.json").write_text(content)
    with pytest.raises(ValueError, match=r"fashion-mini.json' is missing or damaged; reinstall hardmix"):
        packaged.read_fashion_mini()


def test_digits_are_a_fixed_stratified_split() -> None:
    from sklearn.datasets import load_digits

    train, train_labels, test, test_labels = packaged.read_digits()
    assert train.shape == (1442, 1, 8, 8)
    assert test.shape == (355, 1, 8, 8)
    bunch = load_digits()
    seen = dict.fromkeys(range(10), 0)
    expected: dict[bool, list[int]] = {False: [], True: []}
    for row, label in enumerate(bunch.target.tolist()):
        seen[label] += 1
        expected[seen[label] % 5 == 0].append(row)
    for pixels, labels, rows in ((train, train_labels, expected[False]), (test, test_labels, expected[True])):
        assert labels.tolist() == bunch.target[rows].tolist()
        assert np.array_equal(pixels[:, 0].numpy(), np.rint(bunch.images[rows] * 255 / 16).astype(np.uint8))
    assert int(train.max()) == 255


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError, match=r'read_digits: scikit-learn is not installed; pip install "hardmix\[train\]"'
    ):
        packaged.read_digits()


@pytest.mark.parametrize("name", ["fashion-mini", "digits"])
def test_both_load_by_name(name: str) -> None:
    data = load_images(name)
    assert data.name == name
    assert len(data.train.class_names) == 10
    assert data.train.sample_id(3) == "train/3"
    assert data.test.sample_id(3) == "test/3"
    values = data.train.batch(torch.arange(len(data.train))).numpy().astype(np.float64) / 255
    assert data.mean == pytest.approx([values.mean()], rel=1e-12)
    assert data.std == pytest.approx([values.std()], rel=1e-12)
