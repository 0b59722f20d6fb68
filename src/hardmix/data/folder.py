"""A folder of image files with one sub-folder per class."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.decode import OR_SKIP, UnreadableImageError, in_threads, read_header, read_picture, shown
from hardmix.data.images import FileImages, ImageData, channel_statistics, check_channels
from hardmix.data.splits import train_validation_split

R = TypeVar("R")

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
VALIDATION_NAMES = ("val", "valid", "validation")

#: share and seed of the test split that is cut from a folder without one
TEST_FRACTION, TEST_SEED = 0.2, 0
#: the largest image size that is chosen without being asked for
LARGEST_DEFAULT = 224
#: how many training images the channel statistics look at
STATISTICS_SAMPLES = 1024


class Listing(NamedTuple):
    """The image files of one split, sorted, with the name of each one's class."""

    paths: list[Path]
    classes: list[str]


def load_folder(
    path: str | os.PathLike[str], *, image_size: int | None = None, channels: int = 3, on_error: str = "raise"
) -> ImageData:
    """Read `path/CLASS/**/*.jpg`, or `path/train/CLASS/...` with `path/test` and `path/val` beside it.

    Classes are the sub-folders, sorted by name. Without `test`, `val` (or `valid`, `validation`) serves as the test
    split; without either, a stratified fifth is cut from the training files, always the same one. Hidden files and
    files without an image suffix are passed over. Pixels are decoded when a batch asks for them, see `FileImages`.

    Args:
        image_size: height and width after scaling and centre-cropping; None takes the median shorter side, at most 224.
        channels: 3 for RGB, 1 for luma.
        on_error: "raise" stops with a list of all files that are empty, not images or too large (a file whose header is
            good but whose pixels are not is named when it is decoded); "skip" decodes every file once, leaves out the
            unreadable ones and records them in `ImageData.skipped`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, a class without images, a test class that training doesn't have, unreadable files,
            or too few images to cut a test split from.
    """
    who = "load_folder"
    path = Path(path)
    if image_size is not None:
        _check.integer(who, "image_size", image_size, 1)
    check_channels(who, channels)
    _check.choice(who, "on_error", on_error, ("raise", "skip"))
    if not path.is_dir():
        raise FileNotFoundError(
            f"{who}: path is {shown(path)} and there is no such folder; pass the folder of a data set."
        )
    listings = {split: _list(root) for split, root in _split_roots(path).items()}
    every = [file for listing in listings.values() for file in listing.paths]
    sizes, bad = _try_all(read_header, every)
    if sizes and image_size is None:
        image_size = min(LARGEST_DEFAULT, statistics.median_low(min(size) for size in sizes.values()))
    if bad and on_error == "raise":
        raise ValueError(_unreadable(bad, len(every)))
    if on_error == "skip":

        def shape(file: Path) -> tuple[int, ...]:
            return tuple(read_picture(file, shown(file), size=image_size, channels=channels).shape)

        _, damaged = _try_all(shape, list(sizes))
        bad |= damaged
        listings = {split: _without(listing, bad) for split, listing in listings.items()}
    names = _class_names(path, listings)
    label = {name: number for number, name in enumerate(names)}
    assert image_size is not None, "a class has at least one image"

    def images(listing: Listing) -> FileImages:
        labels = torch.tensor([label[name] for name in listing.classes])
        return FileImages(listing.paths, labels, names, image_size=image_size, channels=channels)

    sets = {split: images(listing) for split, listing in listings.items()}
    train, test, validation = sets["train"], sets.get("test"), sets.get("validation")
    if test is None and validation is not None:
        test, validation = validation, None
    if test is None:
        kept, held_out = _cut_test(path, train)
        train, test = train.subset(kept), train.subset(held_out)
    mean, std = channel_statistics(train, samples=STATISTICS_SAMPLES)
    return ImageData("folder", train, test, mean, std, "not stated", str(path), validation, skipped=tuple(bad.values()))


def _cut_test(path: Path, images: FileImages) -> tuple[Tensor, Tensor]:
    """(training rows, test rows), always the same ones."""
    try:
        return train_validation_split(images.labels, TEST_FRACTION, seed=TEST_SEED)
    except ValueError:
        raise ValueError(
            f"load_folder: {shown(path)} has {len(images)} images of {len(images.class_names)} classes, too few to cut "
            f"a test split from; have {round(1 / TEST_FRACTION)} or more of each class, or folders train and test."
        ) from None


def _split_roots(path: Path) -> dict[str, Path]:
    """Where the splits are: a folder with a `train` folder has splits, any other one is the training split itself."""
    if not (path / "train").is_dir():
        return {"train": path}
    roots = {"train": path / "train"}
    for split, spellings in (("test", ("test",)), ("validation", VALIDATION_NAMES)):
        found = [path / name for name in spellings if (path / name).is_dir()]
        if found:
            roots[split] = found[0]
    return roots


def _list(root: Path) -> Listing:
    paths: list[Path] = []
    classes: list[str] = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        files = [
            Path(place) / name
            for place, _, names in os.walk(folder)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
        if not files:
            raise ValueError(f"load_folder: {shown(folder)} holds no images; add some or remove the folder.")
        paths += sorted(files)
        classes += [folder.name] * len(files)
    if not paths:
        raise ValueError(f"load_folder: {shown(root)} has no class folders; put the images of each class into its own.")
    return Listing(paths, classes)


def _without(listing: Listing, bad: dict[Path, str]) -> Listing:
    rows = [row for row, path in enumerate(listing.paths) if path not in bad]
    return Listing([listing.paths[row] for row in rows], [listing.classes[row] for row in rows])


def _class_names(path: Path, listings: dict[str, Listing]) -> tuple[str, ...]:
    """The classes of the training split, which the other splits must not go beyond."""
    names = sorted(set(listings["train"].classes))
    if len(names) < 2:
        raise ValueError(
            f"load_folder: {shown(path)} has {len(names)} readable classes; pass a folder with at least two."
        )
    for split, listing in listings.items():
        extra = sorted(set(listing.classes) - set(names))
        if extra:
            raise ValueError(
                f"load_folder: {split} of {shown(path)} has the class {extra[0]!r}, which train doesn't have"
                f"{_check.did_you_mean(extra[0], names)}; rename or remove its folder."
            )
        if not listing.paths:
            raise ValueError(f"load_folder: {split} of {shown(path)} has no readable image; add some.")
    return tuple(names)


def _try_all(read: Callable[[Path], R], paths: Sequence[Path]) -> tuple[dict[Path, R], dict[Path, str]]:
    """What `read` says of the files that it can read, and why it can't read the others."""

    def attempt(path: Path) -> R | UnreadableImageError:
        try:
            return read(path)
        except UnreadableImageError as error:
            return error

    good: dict[Path, R] = {}
    bad: dict[Path, str] = {}
    for path, result in zip(paths, in_threads(attempt, paths), strict=True):
        if isinstance(result, UnreadableImageError):
            bad[path] = str(result)
        else:
            good[path] = result
    return good, bad


def _unreadable(bad: dict[Path, str], files: int) -> str:
    reasons = list(bad.values())
    more = f"; and {len(reasons) - 20} more" if len(reasons) > 20 else ""
    return (
        f"load_folder: {len(reasons)} of {files} files can't be read ({'; '.join(reasons[:20])}{more}); "
        f"replace or remove them, or {OR_SKIP}."
    )
