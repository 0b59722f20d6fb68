"""Data sets that come with an installed package: with hardmix itself, and with scikit-learn."""

from __future__ import annotations

import hashlib
import io
import json
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from hardmix.data.decode import UnreadableImageError, read_picture, shown

#: images of a sheet that stand side by side; a multiple of the number of classes, so every column of a sheet is one
#: class
SHEET_COLUMNS = 100
SIDE = 28
NUM_CLASSES = 10

#: every fifth sample of each class of the digits is a test sample
DIGITS_TEST_EVERY = 5


def read_fashion_mini() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels (12000, 1, 28, 28) uint8, training labels (12000,) long, test pixels (3000, ...), test labels.

    Row r of either split shows class r mod 10, so each run of ten rows is balanced. The pixels are checked against the
    hash that was recorded when the sheets were made.

    Raises:
        ValueError: a file of the installation is missing or damaged.
    """
    folder = files("hardmix.data") / "embedded"
    again = "reinstall hardmix."
    try:
        record: dict[str, Any] = json.loads((folder / "fashion-mini.json").read_text("utf-8"))
        splits = [record[split] for split in ("train", "test")]
        parts = [(str(split["file"]), int(split["images"]), str(split["sha256_of_pixels"])) for split in splits]
    except (OSError, ValueError, KeyError, TypeError):
        name = shown(str(folder / "fashion-mini.json"))
        raise ValueError(f"read_fashion_mini: {name} is missing or damaged; {again}") from None
    out = []
    for file, images, digest in parts:
        name = shown(str(folder / file))
        try:
            content = (folder / file).read_bytes()
            sheet = read_picture(io.BytesIO(content), name, size=None, channels=1)
        except OSError:
            raise ValueError(f"read_fashion_mini: {name} is missing; {again}") from None
        except UnreadableImageError as error:
            raise ValueError(f"read_fashion_mini: {error}; {again}") from None
        if sheet.shape[1:] != (images // SHEET_COLUMNS * SIDE, SHEET_COLUMNS * SIDE):
            raise ValueError(f"read_fashion_mini: {name} has the wrong size; {again}")
        pixels = from_sheet(sheet[0])
        if hashlib.sha256(pixels.numpy().tobytes()).hexdigest() != digest:
            raise ValueError(f"read_fashion_mini: {name} is damaged (its pixels have another hash); {again}")
        out += [pixels, torch.arange(images) % NUM_CLASSES]
    return out[0], out[1], out[2], out[3]


def read_emoji_groups() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noto's emoji, flags left out, as (N, 3, 40, 40) uint8, and which of eight groups each belongs to.

    1,225 for training and 385 for testing, by the split of `hardmix.data.emoji`, which keeps variants of one thing
    together; its validation pictures count as training pictures here.
    """
    from hardmix.data.emoji import load_emoji
    from hardmix.data.pairs import SPLIT_NAMES

    emoji = load_emoji(("noto",), flags=False)
    assert emoji.split is not None
    assert emoji.group is not None
    test = emoji.split == SPLIT_NAMES["test"]
    return emoji.images[~test], emoji.group[~test], emoji.images[test], emoji.group[test]


def to_sheet(pixels: Tensor) -> Tensor:
    """(N, 1, 28, 28) images as one picture, `SHEET_COLUMNS` in a row; N is a multiple of that."""
    grid = pixels.reshape(-1, SHEET_COLUMNS, SIDE, SIDE).transpose(1, 2)
    return grid.reshape(-1, SHEET_COLUMNS * SIDE)


def from_sheet(sheet: Tensor) -> Tensor:
    """The inverse of `to_sheet`."""
    grid = sheet.reshape(-1, SIDE, SHEET_COLUMNS, SIDE).transpose(1, 2)
    return grid.reshape(-1, 1, SIDE, SIDE)


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits as (N, 1, 8, 8) uint8, values 0..16 scaled to 0..255.

    Every fifth sample of each class is a test sample: 1,442 for training, 355 for testing. The file lists the digits
    writer by writer, so both splits hold the same writers: a smoke test, not a benchmark.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError('read_digits: scikit-learn is not installed; pip install "hardmix[train]".') from None
    bunch = load_digits()
    pixels = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    rank = (labels[:, None] == torch.arange(NUM_CLASSES)).long().cumsum(0).gather(1, labels[:, None])[:, 0]  # 1, 2, ...
    test = rank % DIGITS_TEST_EVERY == 0
    return pixels[~test], labels[~test], pixels[test], labels[test]
