"""Image sets: batches of uint8 pixels by index, from memory or from files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix.data.decode import UnreadableImageError, in_threads, read_picture, shown

Images = TypeVar("Images", bound="ImageSet")

#: FileImages keeps decoded pixels as long as the whole set fits into this many bytes.
CACHE_BYTES = 2**30


class ImageSet(ABC):
    """N labelled images of one shape. A set has no random state: the same index gives the same pixels.

    Attributes:
        labels: (N,) long class ids.
        class_names: C names; a label indexes them.
        shape: (channels, height, width) of a sample.
    """

    def __init__(self, labels: Tensor, class_names: Sequence[str], rows: int, shape: tuple[int, int, int]) -> None:
        self.class_names = tuple(class_names)
        self.labels = check_labels(type(self).__name__, labels, rows, len(self.class_names))
        self.shape = shape
        self._places = torch.arange(rows)  # row of this set -> row of the pixels that subsets share

    def __len__(self) -> int:
        return self.labels.shape[0]

    @abstractmethod
    def batch(self, index: Tensor) -> Tensor:
        """(B, C, H, W) uint8 pixels in the order of `index` (B,) long, on the CPU."""

    @abstractmethod
    def sample_id(self, i: int) -> str:
        """What messages and reports call sample `i`: "train/17" or its file."""

    def subset(self: Images, index: Tensor) -> Images:
        """The samples of `index` (M,) long, in that order. Pixels are shared and samples keep their ids."""
        rows = self._rows(index)
        part = copy(self)
        part.labels, part._places = self.labels[rows], self._places[rows]
        return part

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images {self.shape}, {len(self.class_names)} classes)"

    def _rows(self, index: Tensor) -> Tensor:
        """A checked index."""
        who = type(self).__name__
        index = _check.tensor(who, "index", index)
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"{who}: index has shape {tuple(index.shape)} and dtype {index.dtype}; pass (B,) integer rows."
            )
        index = index.to("cpu", torch.long)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            wrong = int(index[(index < 0) | (index >= len(self))][0])
            raise ValueError(f"{who}: index holds {wrong}; pass rows from 0 to {len(self) - 1}.")
        return index


class TensorImages(ImageSet):
    """Images that are in memory.

    Args:
        pixels: (N, C, H, W) uint8 on the CPU.
        labels: (N,) integer class ids, indices into `class_names`.
        split: the first part of the ids: sample 17 of the training split is "train/17".
        image_size: scale each batch to this height and width (bilinear, antialiased); None leaves the pixels alone.

    Raises:
        ValueError: another dtype, rank or number of labels, or a label without a class name.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        split: str = "train",
        image_size: int | None = None,
    ) -> None:
        who = type(self).__name__
        pixels = _check.batch(who, "pixels", pixels, 4, 4)
        if pixels.dtype != torch.uint8:
            raise TypeError(f"{who}: pixels has dtype {pixels.dtype}; pass uint8 values.")
        rows, channels, height, width = pixels.shape
        if image_size is not None:
            height = width = _check.integer(who, "image_size", image_size, 1)
        super().__init__(labels, class_names, rows, (channels, height, width))
        self.split = split
        self._pixels = pixels

    def batch(self, index: Tensor) -> Tensor:
        pixels = self._pixels.index_select(0, self._places[self._rows(index)])
        size = self.shape[1:]
        if pixels.shape[2:] == size or not pixels.shape[0]:
            return pixels.reshape(-1, *self.shape)
        scaled = F.interpolate(pixels.to(torch.float32), size=size, mode="bilinear", antialias=True)
        return scaled.round_().clamp_(0, 255).to(torch.uint8)

    def sample_id(self, i: int) -> str:
        return f"{self.split}/{int(self._places[i])}"


class FileImages(ImageSet):
    """Images that stay in their files and are decoded when a batch asks for them, by a few threads.

    While all decoded pixels fit into `CACHE_BYTES`, each file is decoded once and kept.

    Args:
        paths: N image files.
        labels: (N,) integer class ids, indices into `class_names`.
        image_size: height and width after scaling and centre-cropping; see `hardmix.data.decode.read_picture`.
        channels: 3 (RGB) or 1 (luma).

    Raises:
        ValueError: from the constructor as `TensorImages`; from `batch` for a file that can't be decoded, with its
            path.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        class_names: Sequence[str],
        *,
        image_size: int,
        channels: int = 3,
    ) -> None:
        who = type(self).__name__
        size = _check.integer(who, "image_size", image_size, 1)
        super().__init__(labels, class_names, len(paths), (check_channels(who, channels), size, size))
        self._store = _Files(tuple(paths), self.shape)

    @property
    def paths(self) -> list[Path]:
        """The files, in the order of the labels."""
        return [self._store.paths[i] for i in self._places.tolist()]

    def batch(self, index: Tensor) -> Tensor:
        return self._store.read(self._places[self._rows(index)])

    def sample_id(self, i: int) -> str:
        return str(self._store.paths[int(self._places[i])])


class _Files:
    """The files behind a FileImages and all its subsets, with the pixels decoded so far."""

    def __init__(self, paths: tuple[Path, ...], shape: tuple[int, int, int]) -> None:
        self.paths = paths
        self.shape = shape
        channels, height, width = shape
        fits = len(paths) * channels * height * width <= CACHE_BYTES
        self.kept: dict[int, Tensor] | None = {} if fits else None

    def read(self, places: Tensor) -> Tensor:
        rows = places.tolist()
        kept = {} if self.kept is None else self.kept
        missing = sorted(set(rows) - kept.keys())
        fresh = dict(zip(missing, in_threads(self._decode, missing), strict=True))
        if self.kept is not None:
            self.kept.update(fresh)
        pixels = [fresh[row] if row in fresh else kept[row] for row in rows]
        return torch.stack(pixels) if pixels else torch.empty((0, *self.shape), dtype=torch.uint8)

    def _decode(self, place: int) -> Tensor:
        path = self.paths[place]
        try:
            return read_picture(path, shown(path), size=self.shape[1], channels=self.shape[0])
        except UnreadableImageError as error:
            raise UnreadableImageError(f"FileImages: {error}; replace or remove it.") from None


@dataclass(frozen=True)
class ImageData:
    """A data set: its splits, the channel statistics of the training split, and where it came from.

    Attributes:
        train, test: the splits. A validation split is cut from `train` unless the set has one of its own.
        mean, std: per channel, of training pixels scaled to 0..1.
        license: the licence of the images, in a few words.
        source: the folder or package it was read from.
        validation: the set's own validation split, or None.
        skipped: "file: reason" for every file left out with `on_error="skip"`.
    """

    name: str
    train: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str
    source: str
    validation: ImageSet | None = None
    skipped: tuple[str, ...] = field(default=(), repr=False)


def check_labels(who: str, labels: Tensor, rows: int, num_classes: int) -> Tensor:
    """(N,) long labels, one per image, each of which has a class name."""
    labels = _check.tensor(who, "labels", labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{who}: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass (N,) integer class ids."
        )
    if labels.shape[0] != rows:
        raise ValueError(f"{who}: there are {labels.shape[0]} labels for {rows} images; pass one label per image.")
    labels = labels.to("cpu", torch.long)
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(f"{who}: labels holds {int(wrong[0])}; pass class ids from 0 to {num_classes - 1}.")
    return labels


def check_channels(who: str, channels: object) -> int:
    """1 or 3."""
    if isinstance(channels, bool) or channels not in (1, 3):
        raise ValueError(f"{who}: channels is {channels!r}; pass 3 for RGB or 1 for gray.")
    assert isinstance(channels, int)
    return channels


def check_finite(who: str, x: Tensor, ids: Sequence[str]) -> None:
    """Stop on a batch (N, ...) of floats with NaN or infinity, naming the samples. Waits for the device once."""
    good = torch.isfinite(x).flatten(1).all(1)
    if bool(good.all()):
        return
    bad = [ids[i] for i in (~good).nonzero().flatten().tolist()]
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise ValueError(
        f"{who}: {len(bad)} of {len(ids)} samples hold NaN or infinity ({', '.join(bad[:5])}{more}); "
        "repair or remove them."
    )


def channel_statistics(images: ImageSet, *, samples: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels scaled to 0..1.

    The sums are integers, so the result doesn't depend on their order. The deviation is at least 1/255, so that a
    constant channel can be normalised.

    Args:
        samples: look at this many evenly spaced images instead of all.
    """
    count = len(images) if samples is None else min(samples, len(images))
    rows = torch.arange(count) * len(images) // count
    total = torch.zeros(images.shape[0], dtype=torch.long)
    squares = torch.zeros_like(total)
    for chunk in rows.split(512):
        pixels = images.batch(chunk).transpose(0, 1).flatten(1).to(torch.int32)  # (C, B H W)
        total += pixels.sum(1)
        squares += pixels.square_().sum(1)
    number = count * images.shape[1] * images.shape[2]
    mean = total.double() / number
    variance = (squares.double() / number - mean.square()).clamp(min=0.0)
    std = variance.sqrt().clamp(min=1.0)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
