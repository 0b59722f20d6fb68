"""Your own images of which a few are labelled: by their folders, or by a list of files."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import OR_SKIP, UnreadableImageError, in_threads, read_header, read_picture, shown
from hardmix.data.few_labels import FewLabelData, without_labels
from hardmix.data.folder import (
    LARGEST_DEFAULT,
    STATISTICS_SAMPLES,
    TEST_FRACTION,
    TEST_SEED,
    Listing,
    _list,
    _try_all,
    _unreadable,
    _without,
    images_below,
    is_image,
    split_folders,
)
from hardmix.data.images import FileImages, channel_statistics, check_channels
from hardmix.data.own_splits import find_split
from hardmix.data.picture_folder import inside
from hardmix.data.splits import train_validation_split
from hardmix.data.tables import _listed, _text

WHO = "load_few_labels"
#: what the column of classes may be called in a list with more than two columns
CLASS_COLUMNS = ("class", "label", "category")
#: which files must not be the same, and how messages put it
PAIRS = (
    ("unlabelled", "train", "unlabelled files are also labelled"),
    ("unlabelled", "test", "unlabelled files are also in the test split"),
    ("unlabelled", "validation", "unlabelled files are also in the validation split"),
    ("train", "test", "labelled files are also in the test split"),
    ("train", "validation", "labelled files are also in the validation split"),
    ("validation", "test", "validation files are also in the test split"),
)


def load_few_labels(
    path: str | os.PathLike[str],
    *,
    labelled: str | os.PathLike[str] = "labelled",
    unlabelled: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    channels: int = 3,
    on_error: str = "raise",
    allow_overlap: bool = False,
    include_labelled: bool = False,
    validation: float = 0.0,
    seed: int = 0,
) -> FewLabelData:
    """Read a folder in which few images are labelled, and a test split from `path/test/CLASS/...`.

    Labels come from folders, `path/labelled/CLASS/**/*.jpg` beside `path/unlabelled/**/*.jpg`; or from a list of files,
    and then all images in `path` that are not listed are unlabelled, those in `path/test` and `path/val` left out.
    Classes are sorted by name. Hidden files and folders and files without an image suffix are passed over.

    `path/val` (or valid, validation) is the validation split, or without `path/test` the test split. Without either, a
    fifth of the labelled images is cut out for testing, stratified, always the same one, and at least one of each
    class: with 4 labelled files of each class one is tested, and a class with a single one is refused.

    Args:
        labelled: the folder with one sub-folder per class; or a list, CSV, TSV or text with a file, relative to `path`,
            and its class in each row, with or without a header. Of more than two columns the classes are in the one
            called class, label or category. Looked for in `path` first.
        unlabelled: the folder of the unlabelled images, looked for in `path` first; None for the usual one.
        image_size: height and width after scaling and centre-cropping; None takes the median shorter side, at most 224.
        channels: 3 for RGB, 1 for luma.
        on_error: "raise" stops with all files that are missing, empty, not images or too large; "skip" decodes every
            file once, leaves out the unreadable ones and records them in `skipped`.
        allow_overlap: don't stop where unlabelled files are the same, byte by byte, as labelled, test or validation
            files, labelled files as test or validation files, or validation files as test files; it is recorded in
            `overlap`.
        include_labelled: count the labelled images as unlabelled, too, before the others.
        validation: where no folder makes the validation split, the share of the labelled images, those for testing
            taken off, that does, see `train_validation_split`; 0 for none.
        seed: which ones. Of labelled files that are the same byte by byte, cut apart, all stay for training.

    Returns:
        `train` holds the labelled images. Mean and deviation are those of labelled and unlabelled images together, with
        those that `validation` cuts out.

    Raises:
        FileNotFoundError: no such folder or list.
        ValueError: a class without labelled files, fewer than two classes, nothing unlabelled, too few files for a test
            or a validation split, unreadable files, the same files in two splits or labelled with two classes; a list
            that is damaged or empty, names files that aren't there or lead out of the folder, or names one with two
            classes.
    """
    if image_size is not None:
        _check.integer(WHO, "image_size", image_size, 1)
    check_channels(WHO, channels)
    _check.choice(WHO, "on_error", on_error, ("raise", "skip"))
    _check.between(WHO, "validation", validation, 0.0, 1.0)
    path = from_home(path)
    if not os.path.isdir(path):
        kind = "a file" if os.path.exists(path) else "not there"
        raise FileNotFoundError(f"{WHO}: path is {shown(path)}, which is {kind}; pass the folder of a data set.")
    held_out = _held_out(path)
    listings = {split: _classes_in(root) for split, root in held_out.items()}
    listings["train"], pool = _labelled_and_not(path, labelled, unlabelled, held_out, on_error)
    names = sorted(set(listings["train"].classes))
    every = [file for listing in listings.values() for file in listing.paths] + pool
    sizes, bad = _try_all(_header, every)
    if bad and on_error == "raise":
        raise ValueError(_ours(_unreadable(bad, len(every))))
    size = image_size or min(LARGEST_DEFAULT, statistics.median_low(min(s) for s in sizes.values()) if sizes else 1)
    if on_error == "skip":

        def shape(file: Path) -> tuple[int, ...]:
            return tuple(read_picture(file, shown(file), size=size, channels=channels).shape)

        _, damaged = _try_all(shape, list(sizes))
        bad |= damaged
        listings = {split: _without(listing, bad) for split, listing in listings.items()}
        pool = [file for file in pool if file not in bad]
    _check_classes(held_out, listings, names)
    _check_copies(listings["train"])
    if not pool:
        raise ValueError(f"{WHO}: no unlabelled image of {shown(path)} can be read; add some.")

    def images(paths: Sequence[Path], classes: Sequence[str]) -> FileImages:
        labels = torch.tensor([names.index(name) for name in classes])
        return FileImages(paths, labels, names, image_size=size, channels=channels)

    # one set of labelled and unlabelled files, so that a file is decoded once
    train = listings["train"]
    both = images(train.paths + pool, train.classes + [names[0]] * len(pool))
    kept, rest = torch.arange(len(train.paths)), torch.arange(len(train.paths), len(both))
    sets = {split: images(*listing) for split, listing in listings.items() if split != "train"}
    if "test" not in sets:
        kept, tested = _together(train.paths, *_cut_test(path, both.labels[kept], names))
        sets["test"] = both.subset(tested)
    measured = both.subset(torch.cat([kept, rest]))
    if validation and "validation" not in sets:
        kept, held = _together(train.paths, *_cut_validation(both.labels[kept], kept, validation, seed))
        sets["validation"] = both.subset(held)
    data = both.subset(kept)
    parts = {"unlabelled": pool, "train": data.paths} | {split: images.paths for split, images in sets.items()}
    overlap = _overlap(parts)
    if overlap and not allow_overlap:
        raise ValueError(
            f"{WHO}: {' and '.join(overlap)}, byte by byte; leave them in one place, or pass allow_overlap=True."
        )
    mean, std = channel_statistics(measured, samples=STATISTICS_SAMPLES)
    seen, truth = torch.cat([kept, rest]), torch.cat([data.labels, torch.full_like(rest, -1)])
    if not include_labelled:
        seen, truth = rest, truth[len(kept) :]
    return FewLabelData(
        "folder",
        data,
        sets["test"],
        mean,
        std,
        "not stated",
        str(path),
        sets.get("validation"),
        tuple(bad.values()),
        unlabelled=without_labels(both.subset(seen)),
        truth=truth,
        overlap=tuple(overlap),
    )


def _held_out(path: Path) -> dict[str, Path]:
    """Where the test and the validation split are; a validation split alone is for testing."""
    found = split_folders(WHO, path, ("test", "validation"))
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return found


def _labelled_and_not(
    path: Path,
    labelled: str | os.PathLike[str],
    unlabelled: str | os.PathLike[str] | None,
    held_out: dict[str, Path],
    on_error: str,
) -> tuple[Listing, list[Path]]:
    """The labelled files with their classes, and the unlabelled ones."""
    place = _place(path, "labelled", labelled)
    if place.is_dir():
        listing = _classes_in(place)
        root = _place(path, "unlabelled", "unlabelled" if unlabelled is None else unlabelled)
        pool = images_below(WHO, root)
    else:
        listing = _listed_files(path, place, on_error)
        root = path if unlabelled is None else _place(path, "unlabelled", unlabelled)
        named = set(map(_key, listing.paths))
        pool = [file for file in images_below(WHO, root, held_out.values()) if _key(file) not in named]
    if not pool:
        raise ValueError(
            f"{WHO}: {shown(root)} holds no unlabelled image; add some, or pass another folder as unlabelled."
        )
    return listing, pool


def _place(path: Path, argument: str, given: str | os.PathLike[str]) -> Path:
    """A folder in `path` or elsewhere, or for `labelled` a file."""
    file = argument == "labelled"
    kind = "folder with one sub-folder per class, or a list of files" if file else "folder of images"
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise TypeError(f"{WHO}: {argument} is {given!r}; pass a {kind}.")
    own = from_home(given)
    for place in (path / own, own):
        if os.path.isdir(place) or (file and os.path.isfile(place)):
            return place
        if os.path.exists(place):
            raise FileNotFoundError(f"{WHO}: {argument} is {shown(place)}, which is no folder; pass a {kind}.")
    near = _check.did_you_mean(str(given), sorted(os.listdir(path)))
    raise FileNotFoundError(
        f"{WHO}: {argument} is {shown(own)}, which is neither in {shown(path)} nor elsewhere{near}; pass a {kind}."
    )


def _ours(message: str) -> str:
    """A message of `load_folder` as one of `load_few_labels`."""
    return WHO + message.removeprefix("load_folder")


def _classes_in(root: Path) -> Listing:
    """The images of a folder with one sub-folder per class."""
    try:
        return _list(root)
    except ValueError as error:
        raise ValueError(_ours(str(error))) from None


def _key(path: str | os.PathLike[str]) -> str:
    """The same text for each spelling of a path."""
    return os.path.normcase(os.path.abspath(path))


def _header(file: Path) -> tuple[int, int]:
    if not os.path.isfile(file):  # a name that no file can have is none
        raise UnreadableImageError(f"{shown(file)} does not exist")
    return read_header(file)


def _listed_files(path: Path, table: Path, on_error: str) -> Listing:
    """The files of a list with their classes, sorted, so that the order of the rows doesn't matter."""
    where = f"{WHO}: {shown(table)}"
    rows = _rows(where, table)
    first: dict[str, tuple[int, Path, str]] = {}
    for number, name, label in rows:
        file = inside(path, name)
        if not name or not label:
            raise ValueError(f"{where} has no {'class' if name else 'file name'} in row {number}; fill or delete it.")
        if file is None:
            raise ValueError(
                f"{where} leads out of the folder in row {number} ({name!r:.60}); write paths relative to "
                f"{shown(path)}."
            )
        start, _, other = first.setdefault(_key(file), (number, file, label))
        if other != label:
            raise ValueError(
                f"{where} has {name!r:.60} as {other!r:.40} in row {start} and as {label!r:.40} in row {number}; keep "
                "one of them."
            )
    missing = [(number, file) for number, file, _ in first.values() if not os.path.isfile(file)]
    if missing and on_error == "raise":
        number, name = missing[0][0], missing[0][1].relative_to(path).as_posix()
        near = _check.did_you_mean(name, [file.relative_to(path).as_posix() for file in images_below(WHO, path)])
        raise ValueError(
            f"{where} names {len(missing)} of {len(first)} files that aren't in {shown(path)}, the first of them "
            f"{name!r:.60} in row {number}{near}; correct or add them, or {OR_SKIP}."
        )
    pairs = sorted((file, label) for _, file, label in first.values())
    return Listing([file for file, _ in pairs], [label for _, label in pairs])


def _rows(where: str, table: Path) -> list[tuple[int, str, str]]:
    """Number, file and class of each row of a list."""
    sheet = _text(where, table)
    cells, numbers = [sheet.names, *sheet.rows], [1, *sheet.numbers]
    if len(sheet.names) == 1:  # "cat 1.jpg cat"
        cells = [row[0].rsplit(None, 1) for row in cells]
        single = next((number for number, row in zip(numbers, cells, strict=True) if len(row) < 2), None)
        if single is not None:
            raise ValueError(
                f"{where} has one word in row {single} and needs a file and its class; separate them with a comma."
            )
    header: list[str] = []
    if not any(map(is_image, cells[0])):
        header = [name.lower() for name in cells.pop(0)]
        numbers.pop(0)
    if not cells:
        raise ValueError(f"{where} lists no file; write a file and its class in each row.")
    split = find_split(where, header)
    if split is not None:
        raise ValueError(
            f"{where} has a column {split!r}, which isn't read; put the files of other splits into test/CLASS "
            "and val/CLASS, and delete their rows and the column."
        )
    width = len(cells[0])
    images = [sum(is_image(row[column]) for row in cells) for column in range(width)]
    file = images.index(max(images))
    if width == 2:
        classes = [1 - file]
    else:
        classes = [column for column, name in enumerate(header) if column != file and name in CLASS_COLUMNS]
    if len(classes) != 1:
        named = f" ({_listed(map(repr, header), 20)})" if header else " and no header"
        raise ValueError(
            f"{where} has {width} columns{named}, and {len(classes)} of them are called "
            f"{', '.join(CLASS_COLUMNS[:-1])} or {CLASS_COLUMNS[-1]}; keep the files and one column of classes."
        )
    return [(number, row[file], row[classes[0]]) for number, row in zip(numbers, cells, strict=True)]


def _check_classes(held_out: dict[str, Path], listings: dict[str, Listing], names: Sequence[str]) -> None:
    """At least two classes, each with a labelled file that can be read, and no others in the other splits."""
    if len(names) < 2:
        raise ValueError(f"{WHO}: there is one class, {names[0]!r:.60}; label files of at least two.")
    lost = sorted(set(names) - set(listings["train"].classes))
    if lost:
        raise ValueError(f"{WHO}: the class {lost[0]!r:.60} has no labelled file that can be read; label another one.")
    for split, root in held_out.items():
        classes = listings[split].classes
        extra = sorted(set(classes) - set(names))
        if extra:
            raise ValueError(
                f"{WHO}: {classes.count(extra[0])} of {len(classes)} files in {shown(root)} are of the class "
                f"{extra[0]!r:.60}, which has no labelled file{_check.did_you_mean(extra[0], names)}; label some, or "
                "rename or remove that folder."
            )
        if not classes:
            raise ValueError(f"{WHO}: {shown(root)} has no image that can be read; add some.")


def _check_copies(labelled: Listing) -> None:
    """No labelled files that are the same, byte by byte, but of two classes."""
    size = {file: file.stat().st_size for file in labelled.paths}
    often = Counter(size.values())
    suspects = [(file, name) for file, name in zip(*labelled, strict=True) if often[size[file]] > 1]
    first: dict[bytes, tuple[Path, str]] = {}
    for (file, name), content in zip(suspects, in_threads(_content, [file for file, _ in suspects]), strict=True):
        other, label = first.setdefault(content, (file, name))
        if label != name:
            raise ValueError(
                f"{WHO}: {shown(other)}, labelled {label!r:.40}, and {shown(file)}, labelled {name!r:.40}, are the "
                "same, byte by byte; keep one of them."
            )


def _cut_test(path: Path, labels: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Rows for training and for testing: a fifth, and one of each class at least."""
    single = (torch.bincount(labels, minlength=len(names)) < 2).nonzero()[:, 0].tolist()
    if single:
        raise ValueError(
            f"{WHO}: the class {names[single[0]]!r:.60} has 1 labelled file, but without {shown(path / 'test')} one of "
            "each class is kept for testing; label another one, or add test/CLASS."
        )
    samples = max(round(TEST_FRACTION * len(labels)), len(names))
    return train_validation_split(labels, samples / len(labels), seed=TEST_SEED)


def _cut_validation(labels: Tensor, rows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """`rows`, of these labels, for training and for validation."""
    size = labels.bincount()
    if len(rows) * share < 1 or int(size.min()) < 2:
        raise ValueError(
            f"{WHO}: validation={share:g} can't be cut from {len(rows)} labelled files, of which a class has "
            f"{int(size.min())}; set it to 0, or add files for validation."
        )
    train, held = train_validation_split(labels, share, seed=seed)
    return rows[train], rows[held]


def _together(paths: Sequence[Path], kept: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """A cut of rows, with what is held out but the same, byte by byte, as what is kept put back to it."""
    rows = kept.tolist() + held.tolist()
    content = dict(zip(rows, in_threads(_content, [paths[row] for row in rows]), strict=True))
    known = {content[row] for row in kept.tolist()}
    twice = torch.tensor([content[row] in known for row in held.tolist()], dtype=torch.bool)
    if not twice.any():
        return kept, held
    return torch.cat([kept, held[twice]]).sort().values, held[~twice]


def _overlap(parts: dict[str, list[Path]]) -> list[str]:
    """What the parts have in common, as in "12 of 300 unlabelled files are also labelled"."""
    size = {file: file.stat().st_size for file in chain(*parts.values())}
    pairs = [(parts[one], parts[other], text) for one, other, text in PAIRS if {one, other} <= parts.keys()]
    # only files of the same length can be the same, and most need not be read
    same = [{size[file] for file in one} & {size[file] for file in other} for one, other, _ in pairs]
    suspects = [file for file in size if size[file] in set().union(*same)]
    content = dict(zip(suspects, in_threads(_content, suspects), strict=True))
    found = []
    for one, other, text in pairs:
        contents = {content[file] for file in other if file in content}
        common = [file for file in one if content.get(file) in contents]
        if common:
            found.append(f"{len(common)} of {len(one)} {text} (the first is {shown(common[0])})")
    return found


def _content(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()
