"""Folders of images: layouts, odd files, unreadable files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hardmix.data import load_folder, load_images


def save(path: Path, value: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


def single_root(root: Path, classes: tuple[str, ...] = ("cat", "dog", "emu"), each: int = 10) -> None:
    for number, name in enumerate(classes):
        for i in range(each):
            save(root / name / f"{i:02d}.png", 10 * number + i)


def names(images: Any) -> list[str]:
    return [images.sample_id(i) for i in range(len(images))]


def test_a_single_root_gets_a_stratified_test_split(tmp_path: Path) -> None:
    single_root(tmp_path)
    data = load_folder(tmp_path)
    assert data.name == "folder"
    assert data.train.class_names == data.test.class_names == ("cat", "dog", "emu")
    assert torch.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert set(names(data.train)) | set(names(data.test)) == {str(path) for path in tmp_path.rglob("*.png")}
    assert not set(names(data.train)) & set(names(data.test))
    assert names(load_folder(tmp_path).test) == names(data.test)
    assert data.source == str(tmp_path)
    assert data.validation is None
    assert data.skipped == ()


def test_pixels_labels_and_files_belong_together(tmp_path: Path) -> None:
    single_root(tmp_path)
    data = load_folder(tmp_path)
    for images in (data.train, data.test):
        pixels = images.batch(torch.arange(len(images)))
        for i, path in enumerate(map(Path, names(images))):
            number = ("cat", "dog", "emu").index(path.parent.name)
            assert images.labels[i] == number
            assert int(pixels[i, 0, 0, 0]) == 10 * number + int(path.stem)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    single_root(tmp_path / "photos")
    for i in range(5):
        save(tmp_path / "elsewhere" / f"{i}.png")
    (tmp_path / "photos" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "photos" / "cat")
    data = load_folder(tmp_path / "photos")
    assert len(data.train) + len(data.test) == 35
    assert sum("more" in name for name in names(data.train) + names(data.test)) == 5


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single_root(tmp_path)
    save(tmp_path / "cat" / "shut" / "1.png")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=r"^load_folder: '.*shut' can't be read \(Permission denied\); let it be read or"
    ):
        load_folder(tmp_path)


def test_the_size_is_the_median_shorter_side(tmp_path: Path) -> None:
    single_root(tmp_path)
    assert load_folder(tmp_path).train.shape == (3, 10, 10)
    assert load_folder(tmp_path, image_size=7, channels=1).train.shape == (1, 7, 7)
    assert load_images("folder", tmp_path, image_size=7, channels=1).train.shape == (1, 7, 7)
    big = tmp_path / "big"
    for name in ("a", "b"):
        for i in range(3):
            save(big / name / f"{i}.png", size=(300, 400))
    assert load_folder(big).train.shape == (3, 224, 224)


def test_statistics_are_those_of_the_training_files(tmp_path: Path) -> None:
    single_root(tmp_path)
    data = load_folder(tmp_path)
    values = data.train.batch(torch.arange(24)).double() / 255
    assert data.mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert data.std[0] == pytest.approx(float(values[:, 0].std(correction=0)))
    assert data.std[1] == 1 / 255


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_test_and_validation_folders(tmp_path: Path, val: str) -> None:
    for split, each in (("train", 4), ("test", 3), (val, 2)):
        single_root(tmp_path / split, each=each)
    data = load_folder(tmp_path)
    assert data.validation is not None
    assert [len(images) for images in (data.train, data.test, data.validation)] == [12, 9, 6]
    assert all(Path(name).parts[-3] == val for name in names(data.validation))


def test_splits_are_known_in_any_case(tmp_path: Path) -> None:
    for split, each in (("Training", 4), ("TESTING", 3), ("Val", 2)):
        single_root(tmp_path / split, each=each)
    data = load_folder(tmp_path)
    assert data.validation is not None
    assert [len(images) for images in (data.train, data.test, data.validation)] == [12, 9, 6]
    single_root(tmp_path / "test")
    with pytest.raises(ValueError, match=r"has 'TESTING' and 'test', which are both for test; keep one"):
        load_folder(tmp_path)


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    single_root(tmp_path, ("bus", "test"))
    assert load_folder(tmp_path).train.class_names == ("bus", "test")
    single_root(tmp_path, ("train",))
    with pytest.raises(ValueError, match=r"train', taken for the train split, has no class folders"):
        load_folder(tmp_path)


def test_splits_without_a_training_split_are_no_classes(tmp_path: Path) -> None:
    for split in ("test", "val"):
        single_root(tmp_path / split)
    with pytest.raises(ValueError, match=r"has 'test' and 'val' but no folder 'train'; add it, or rename"):
        load_folder(tmp_path)


def test_validation_serves_as_test_where_there_is_none(tmp_path: Path) -> None:
    single_root(tmp_path / "train", each=4)
    single_root(tmp_path / "val", each=2)
    data = load_folder(tmp_path)
    assert len(data.test) == 6
    assert data.validation is None


def test_train_alone_is_split(tmp_path: Path) -> None:
    single_root(tmp_path / "train")
    data = load_folder(tmp_path)
    assert (len(data.train), len(data.test)) == (24, 6)


@pytest.mark.parametrize(("each", "few"), [(1, True), (2, False)])
def test_a_folder_too_small_for_a_test_split_is_named(tmp_path: Path, each: int, few: bool) -> None:
    single_root(tmp_path, each=each)
    if not few:
        assert len(load_folder(tmp_path).test) == 1
        return
    with pytest.raises(ValueError, match=r"^load_folder: '.*' has 3 images of 3 classes, too few .* have 5 or more of"):
        load_folder(tmp_path)
    single_root(tmp_path / "new" / "train", each=each)
    single_root(tmp_path / "new" / "test", each=each)
    assert len(load_folder(tmp_path / "new").test) == 3


def test_a_test_split_may_lack_a_class_but_not_add_one(tmp_path: Path) -> None:
    single_root(tmp_path / "train")
    single_root(tmp_path / "test", ("dog",))
    assert load_folder(tmp_path).test.labels.unique().tolist() == [1]
    single_root(tmp_path / "test", ("dogs",))
    with pytest.raises(ValueError, match=r"test of '.*' has the class 'dogs', .* \(did you mean \"dog\"\?\); rename"):
        load_folder(tmp_path)


def test_what_is_passed_over(tmp_path: Path) -> None:
    single_root(tmp_path)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / ".DS_Store.png").write_text("x")
    (tmp_path / ".cache").mkdir()
    save(tmp_path / "cat" / ".ipynb_checkpoints" / "00-checkpoint.png")
    (tmp_path / "cat" / "deeper").mkdir()
    save(tmp_path / "cat" / "deeper" / "UPPER.PNG")
    data = load_folder(tmp_path)
    assert len(data.train) + len(data.test) == 31


def odd_files(root: Path) -> None:
    """Files that can be read, each in its own way."""
    gray = np.arange(144, dtype=np.uint8).reshape(12, 12)
    Image.fromarray(gray).save(root / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 400).save(root / "sixteen.png")
    Image.fromarray(gray).convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(gray).convert("P").save(root / "palette.png", transparency=3)
    Image.fromarray(gray).convert("RGBA").save(root / "alpha.webp")
    frames = [Image.new("RGB", (12, 12), (i * 80, 0, 0)) for i in range(3)]
    frames[0].save(root / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 12)).save(root / "rotated.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(root / "dot.png")


def test_odd_files_are_read(tmp_path: Path) -> None:
    single_root(tmp_path)
    odd_files(tmp_path / "cat")
    data = load_folder(tmp_path, image_size=12)
    for images in (data.train, data.test):
        assert images.batch(torch.arange(len(images))).shape[1:] == (3, 12, 12)
    assert len(data.train) + len(data.test) == 38


def damage(root: Path) -> dict[str, str]:
    """Break four files; the end of each one's path and the reason."""
    (root / "cat" / "00.png").write_bytes(b"")
    (root / "cat" / "text.jpg").write_text("not an image")
    (root / "dog" / "03.png").write_bytes((root / "dog" / "03.png").read_bytes()[:20])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "emu" / "cut.jpg")
    (root / "emu" / "cut.jpg").write_bytes((root / "emu" / "cut.jpg").read_bytes()[:3000])
    reasons = {"cat/00.png": "is empty", "cat/text.jpg": "is not an image", "dog/03.png": "", "emu/cut.jpg": "can't be"}
    return {str(Path(name)): reason for name, reason in reasons.items()}


def test_all_unreadable_files_are_listed_at_once(tmp_path: Path) -> None:
    single_root(tmp_path)
    damaged = damage(tmp_path)
    with pytest.raises(
        ValueError, match=r"^load_folder: 3 of 32 files can't be read \(.*\); replace or remove"
    ) as caught:
        load_folder(tmp_path)
    for name, why in list(damaged.items())[:3]:
        assert f"{name}' {why}" in str(caught.value)


def decode_all(root: Path) -> None:
    data = load_folder(root)
    data.test.batch(torch.arange(len(data.test)))


def test_a_truncated_file_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    single_root(tmp_path)
    damage(tmp_path)
    for name in ("cat/00.png", "cat/text.jpg", "dog/03.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"^FileImages: '.*cut.jpg' can't be decoded .*; replace or remove it"):
        decode_all(tmp_path)


def test_unreadable_files_are_skipped_and_recorded(tmp_path: Path) -> None:
    single_root(tmp_path)
    damaged = damage(tmp_path)
    data = load_images("folder", tmp_path, on_error="skip")
    assert len(data.train) + len(data.test) == 28
    assert len(data.skipped) == 4
    for name, why in damaged.items():
        assert any(f"{name}' {why}" in line for line in data.skipped)
        assert not any(kept.endswith(name) for kept in names(data.train) + names(data.test))
    for images in (data.train, data.test):
        images.batch(torch.arange(len(images)))


def test_many_unreadable_files_are_counted(tmp_path: Path) -> None:
    single_root(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"30 of 30 files can't be read .*; and 10 more") as caught:
        load_folder(tmp_path)
    assert 'pass on_error="skip" (on the command line --set data.on_error=skip).' in str(caught.value)
    with pytest.raises(ValueError, match=r"train of '.*' has no readable image of 3 of its classes, 'cat' for one"):
        load_folder(tmp_path, on_error="skip")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_whose_files_are_all_skipped_is_an_error(tmp_path: Path, split: str) -> None:
    for part in ("train", "test"):
        single_root(tmp_path / part, each=3)
    for path in (tmp_path / split / "dog").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{split} of '.*' has no readable image of 1 of its classes, 'dog' for one"):
        load_folder(tmp_path, on_error="skip")


def add_empty_class(root: Path) -> None:
    single_root(root)
    (root / "fox").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "has no class folders"),
        (lambda root: save(root / "a.png"), "has no class folders"),
        (lambda root: single_root(root, ("cat",)), "has 1 readable classes; pass a folder with at least two"),
        (add_empty_class, r"fox' holds no images; add some or remove"),
    ],
)
def test_a_folder_that_is_no_data_set_is_explained(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=f"^load_folder: .*{message}"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0; pass an integer of at least 1"),
        ({"channels": 2}, "channels is 2; pass 3 for RGB or 1 for gray"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; pass one of 'raise', 'skip'"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"load_folder: {message}"):
        load_folder(tmp_path, **arguments)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_folder: path is '.*gone' and there is no such folder"):
        load_folder(tmp_path / "gone")
