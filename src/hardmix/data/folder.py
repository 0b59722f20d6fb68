"""A folder of image files with one sub-folder per class."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import OR_SKIP, UnreadableImageError, in_threads, read_header, read_picture, shown
from hardmix.data.images import FileImages, ImageData, channel_statistics, check_channels
from hardmix.data.splits import train_validation_split

R = TypeVar("R")

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
#: what the folder of a split may be called, in any case
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}

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

    Classes are the sub-folders, sorted by name. Splits are called train or training, test or testing, and val, valid or
    validation, in any case. Without `test`, `val` serves as the test split; without either, a stratified fifth is cut
    from the training files, always the same one. Hidden files and folders and files without an image suffix are passed
    over. Pixels are decoded when a batch asks for them, see `FileImages`.

    Args:
        image_size: height and width after scaling and centre-cropping; None takes the median shorter side, at most 224.
        channels: 3 for RGB, 1 for luma.
        on_error: "raise" stops with a list of all files that are empty, not images or too large (a file whose header is
            good but whose pixels are not is named when it is decoded); "skip" decodes every file once, leaves out the
            unreadable ones and records them in `ImageData.skipped`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, a class without readable images, a test class that training doesn't have, two
            folders of one split, test or validation folders without one for training, unreadable files, or too few
            images to cut a test split from.
    """
    who = "load_folder"
    path = from_home(path)
    if image_size is not None:
        _check.integer(who, "image_size", image_size, 1)
    check_channels(who, channels)
    _check.choice(who, "on_error", on_error, ("raise", "skip"))
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"{who}: path is {shown(path)} and there is no such folder; pass the folder of a data set."
        )
    roots = _split_roots(path)
    listings = {split: _list(root, taken_for="" if root == path else split) for split, root in roots.items()}
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
        whole, listings = listings, {split: _without(listing, bad) for split, listing in listings.items()}
        _check_kept(path, whole, listings)
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


def split_folders(who: str, path: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Which folders in `path` are those of `splits`, by their names.

    Raises:
        ValueError: two folders of one split, of which the second would be read as something else.
    """
    found = {}
    folders = _visible(path)
    for split in splits:
        roots = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES[split]]
        if len(roots) > 1:
            raise ValueError(
                f"{who}: {shown(path)} has {roots[0].name!r} and {roots[1].name!r}, which are both for {split}; keep "
                "one of them."
            )
        if roots:
            found[split] = roots[0]
    return found


def _split_roots(path: Path) -> dict[str, Path]:
    """Where the splits are: a folder with a `train` folder has splits, any other one is the training split itself."""
    found = split_folders("load_folder", path, tuple(SPLIT_NAMES))
    if "train" in found:
        return found
    if found and len(found) == len(_visible(path)):
        folders = " and ".join(repr(root.name) for root in found.values())
        raise ValueError(
            f"load_folder: {shown(path)} has {folders} but no folder 'train'; add it, or rename what is a class."
        )
    return {"train": path}


def images_below(who: str, root: Path, left_out: Iterable[Path] = ()) -> list[Path]:
    """All images in a folder and those below it, sorted, except those in the folders `left_out`.

    Links to folders are followed, and each folder is looked into once, however many lead there.

    Raises:
        ValueError: a folder that can't be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{who}: {shown(error.filename)} can't be read ({error.strerror}); let it be read or remove it."
        )

    seen = {os.path.realpath(folder) for folder in (root, *left_out)}
    found = []
    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        fresh: dict[str, str] = {}  # what a folder leads to, and the first that leads there
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if name[0] != "." and real not in seen:
                fresh.setdefault(real, name)
        seen |= fresh.keys()
        folders[:] = fresh.values()
        found += [Path(place) / name for name in files if name[0] != "." and is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file is called as images are."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list(root: Path, taken_for: str = "") -> Listing:
    """The classes in `root`, a split that was found by its name if `taken_for` says which."""
    paths: list[Path] = []
    classes: list[str] = []
    for folder in _visible(root):
        files = images_below("load_folder", folder)
        if not files:
            raise ValueError(f"load_folder: {shown(folder)} holds no images; add some or remove the folder.")
        paths += files
        classes += [folder.name] * len(files)
    if not paths:
        taken = f", taken for the {taken_for} split," if taken_for else ""
        raise ValueError(
            f"load_folder: {shown(root)}{taken} has no class folders; put the images of each class into its own."
        )
    return Listing(paths, classes)


def _without(listing: Listing, bad: dict[Path, str]) -> Listing:
    rows = [row for row, path in enumerate(listing.paths) if path not in bad]
    return Listing([listing.paths[row] for row in rows], [listing.classes[row] for row in rows])


def _check_kept(path: Path, whole: dict[str, Listing], kept: dict[str, Listing]) -> None:
    """Classes that had files must have kept some."""
    for split, listing in whole.items():
        lost = sorted(set(listing.classes) - set(kept[split].classes))
        if lost:
            raise ValueError(
                f"load_folder: {split} of {shown(path)} has no readable image of {len(lost)} of its classes, "
                f"{lost[0]!r} for one; add some or remove the folder."
            )


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
