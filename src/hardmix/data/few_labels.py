"""A few labelled images among many: which ones, a file that says which ones, and the sets that they make."""

from __future__ import annotations

import hashlib
import json
import os
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home, write_text
from hardmix.data.cache import Part, _digest
from hardmix.data.decode import reason, shown
from hardmix.data.images import FileImages, ImageData, Images, ImageSet, TensorImages, check_labels
from hardmix.data.splits import _classes, _draw, train_validation_split

#: what a split file says that it is, and the version of its keys
FORMAT, VERSION = "hardmix label split", 1
KEYS = ("format", "version", "name", "samples", "seed", "fingerprint", "labelled", "validation", "unlabelled")
#: how many images of a set in memory the fingerprint looks at
FINGERPRINT_IMAGES = 64


class LabelSplit(NamedTuple):
    """Which samples of a training split keep their labels, which are for validation, and which count as unlabelled.

    Attributes:
        labelled: (L,) long row numbers, ascending, at least one.
        validation: (V,) the same, maybe none; in neither of the others.
        unlabelled: (U,) the same, at least one; usually with the labelled ones, whose labels it doesn't use.
        seed: what they were drawn with.
        name: the data set.
        samples: N, the samples of the training split.
        fingerprint: which data set it is, see `fingerprint`.
    """

    labelled: Tensor
    validation: Tensor
    unlabelled: Tensor
    seed: int
    name: str
    samples: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class FewLabelData(ImageData):
    """A data set of which only `train` has labels.

    Attributes:
        train: the labelled images.
        unlabelled: images of the same shape, each with the label -1.
        truth: (U,) the classes of `unlabelled`, to measure with and not to train on; -1 where they aren't known.
        overlap: what the splits have in common, as in "12 of 300 unlabelled files are also labelled", where that was
            allowed.
    """

    unlabelled: ImageSet
    truth: Tensor = field(repr=False)
    overlap: tuple[str, ...] = ()


def draw_labelled(labels: Tensor, *, per_class: int = 0, share: float = 0.0, seed: int) -> Tensor:
    """Rows that keep their labels: as many of each class, or the same share of each.

        n_c = per_class    or    n_c = max(1, round(share N_c))

    Nested: with the same labels and seed, fewer rows of a class are always among more of it, however they were counted.

    Args:
        labels: (N,) class ids from 0 to the largest one.
        per_class: how many of each class; 0 to pass `share`.
        share: of each class, above 0 and at most 1; 0 to pass `per_class`.
        seed: which rows.

    Returns:
        Row numbers, long, ascending.

    Raises:
        ValueError: both or neither of the two, labels that are no class ids, or a class with too few rows or none.

    >>> import torch
    >>> y = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> y[draw_labelled(y, per_class=2, seed=0)].tolist(), y[draw_labelled(y, share=0.5, seed=0)].tolist()
    ([0, 0, 1, 1], [0, 0, 1])
    """
    who = "draw_labelled"
    return _drawn(who, _ids(who, labels), 0, per_class, share, seed)


def draw_label_split(
    images_or_labels: ImageSet | Tensor,
    *,
    name: str,
    per_class: int = 0,
    share: float = 0.0,
    seed: int,
    validation: float = 0.0,
    include_labelled: bool = True,
) -> LabelSplit:
    """Cut out validation, draw the labelled samples from the rest, and take all of the rest as unlabelled.

    The validation rows depend on the labels, `validation` and `seed` only: they are the same for any number of labels.

    Args:
        images_or_labels: the training split, or its labels alone; the split can then be read with the same only.
        name: of the data set.
        per_class, share, seed: see `draw_labelled`.
        validation: share of the validation split, see `train_validation_split`; 0 for none.
        include_labelled: False leaves the labelled samples out of the unlabelled ones. With True, as in FixMatch, all
            training samples count as unlabelled.

    Raises:
        ValueError: as `draw_labelled`; a class of the images without samples; nothing left unlabelled.
    """
    who = "draw_label_split"
    labels, classes = _labels_of(who, images_or_labels)
    validation = _check.between(who, "validation", validation, 0.0, 1.0)
    pool, held_out = torch.arange(len(labels)), torch.arange(0)
    if validation:
        pool, held_out = train_validation_split(labels, validation, seed=seed)
    labelled = pool[_drawn(who, labels[pool], classes, per_class, share, seed)]
    unlabelled = pool if include_labelled else pool[~torch.isin(pool, labelled)]
    if not len(unlabelled):
        raise ValueError(
            f"{who}: all {len(pool)} samples are labelled, so none is left unlabelled; label fewer, or pass "
            "include_labelled=True."
        )
    return LabelSplit(labelled, held_out, unlabelled, seed, name, len(labels), fingerprint(images_or_labels))


def with_few_labels(data: ImageData, split: LabelSplit) -> FewLabelData:
    """The sets of a split of `data.train`. Its mean and deviation stay: they are of pixels, which need no labels.

    Raises:
        ValueError: a split of another data set, indices that can't be, or two validation splits.
    """
    who = "with_few_labels"
    _check_split(f"{who}: split", split)
    _same_data(f"{who}: split", split, data.train)
    if data.validation is not None and len(split.validation):
        raise ValueError(
            f"{who}: split keeps {len(split.validation)} samples for validation, but {data.name} has a validation "
            "split of its own; draw it with validation=0."
        )
    train = data.train
    return FewLabelData(
        data.name,
        train.subset(split.labelled),
        data.test,
        data.mean,
        data.std,
        data.license,
        data.source,
        train.subset(split.validation) if len(split.validation) else data.validation,
        data.skipped,
        unlabelled=without_labels(train.subset(split.unlabelled)),
        truth=train.labels[split.unlabelled],
    )


def without_labels(images: Images) -> Images:
    """The same images, pixels shared, each with the label -1: no class, so that nobody trains on it unnoticed."""
    part = copy(images)
    part.labels = torch.full_like(images.labels, -1)
    return part


def fingerprint(images_or_labels: ImageSet | Tensor) -> str:
    """sha256 of what makes a data set this one: its labels, class names and sample ids, in their order.

    Files count by their paths below their common folder, so that the folder may be moved. Of a set in memory up to 64
    evenly spaced images count too, as they are before scaling. Labels alone count as they are.

    Raises:
        TypeError, ValueError: neither images nor (N,) class ids.
    """
    labels, _ = _labels_of("fingerprint", images_or_labels)
    if isinstance(images_or_labels, Tensor):
        return _digest(("labels", labels))
    images = images_or_labels
    names, ids = images.class_names, _ids_of(images)
    parts: list[Part] = ["images", labels, str(len(names)), *names, str(len(ids)), *ids]
    if isinstance(images, TensorImages):
        count = min(FINGERPRINT_IMAGES, len(images))
        rows = torch.arange(count) * len(images) // max(count, 1)
        parts.append(images._pixels[images._places[rows]])
    return _digest(tuple(parts))


def split_text(split: LabelSplit) -> str:
    """What `write_split` writes: JSON, one key a line, with a sha256 of the rest. The same split gives the same text.

    Raises:
        TypeError, ValueError: values that can't be, see `LabelSplit`.
    """
    return _text("split_text: split", split)


def write_split(split: LabelSplit, path: str | os.PathLike[str]) -> None:
    """Write a split to a file, see `split_text`. A killed process leaves the old file or the new one.

    Raises:
        TypeError, ValueError: values that can't be, see `LabelSplit`.
        OSError: the file can't be written.
    """
    who = "write_split"
    text = _text(f"{who}: split", split)
    file = from_home(path)
    try:
        write_text(file, text)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise OSError(f"{who}: {shown(file)} can't be written ({reason(error)}); pass another path.") from None


def read_split(path: str | os.PathLike[str], images_or_labels: ImageSet | Tensor) -> LabelSplit:
    """A split from its file, once it is sure that it is whole and belongs to this training split.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no split file, one of a newer version, damaged or edited, of another data set, or with indices that
            can't be.
    """
    who = "read_split"
    file = from_home(path)
    where = f"{who}: {shown(file)}"
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "not there"
        raise FileNotFoundError(f"{who}: path is {shown(file)}, which is {kind}; pass a file by write_split.")
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{where} is no split file, or a damaged one; draw the split again.")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{where} has version {found.get('version')!r:.20}, and {VERSION} is read; draw the split again."
        )
    whole = found.pop("sha256", None)
    if tuple(found) != KEYS or whole != hashlib.sha256(_body(found).encode()).hexdigest():
        raise ValueError(f"{where} was edited or damaged (its sha256 differs); restore it, or draw the split again.")
    split = _parsed(where, found)
    _same_data(where, split, images_or_labels)
    _check_split(where, split)
    return split


def _ids(who: str, labels: Tensor) -> Tensor:
    """(N,) long class ids, each of them at least 0."""
    _classes(who, labels)
    low, high = (int(value) for value in labels.aminmax())
    if low < 0:
        raise ValueError(f"{who}: labels holds {low}; pass class ids from 0.")
    return check_labels(who, labels, len(labels), high + 1)


def _labels_of(who: str, images_or_labels: ImageSet | Tensor) -> tuple[Tensor, int]:
    """Checked labels, and how many classes there must be; 0 where only the labels know."""
    if isinstance(images_or_labels, ImageSet):
        return _ids(who, images_or_labels.labels), len(images_or_labels.class_names)
    if not isinstance(images_or_labels, Tensor):
        raise TypeError(
            f"{who}: images_or_labels is a {type(images_or_labels).__name__}; pass an ImageSet, or a torch.Tensor of "
            "labels."
        )
    return _ids(who, images_or_labels), 0


def _drawn(who: str, labels: Tensor, classes: int, per_class: int, share: float, seed: int) -> Tensor:
    """`draw_labelled` of checked labels, of at least `classes` classes."""
    per_class = _check.integer(who, "per_class", per_class, 0)
    share = _check.between(who, "share", share, 0.0, 1.0)
    if bool(per_class) == bool(share):
        raise ValueError(f"{who}: per_class is {per_class} and share is {share:g}; pass exactly one of them, above 0.")
    need, classes = max(per_class, 1), max(int(labels.max()) + 1, classes)
    # a class id of a million would make a million counts; with N rows there is a gap among the ids up to N already
    size = torch.bincount(labels.clamp(max=len(labels)), minlength=min(classes, len(labels) + 1))
    few = (size < need).nonzero()[:, 0].tolist()
    if few:
        listed = ", ".join(f"class {c} has {int(size[c])}" for c in few[:5])
        more = f" and {len(few) - 5} more have too few" if len(few) > 5 else ""
        raise ValueError(
            f"{who}: {listed}{more} of the {need} samples that each of {classes} classes needs; "
            "ask for fewer, add samples, or number the classes without gaps."
        )
    count = [max(1, round(share * n)) if share else per_class for n in size.tolist()]
    return _draw(who, labels, torch.tensor(count), seed)


def _ids_of(images: ImageSet) -> list[str]:
    """The sample ids; of files, their paths below the common folder."""
    if not isinstance(images, FileImages):
        return [images.sample_id(i) for i in range(len(images))]
    paths = [str(path) for path in images.paths]
    try:
        root = os.path.commonpath(paths)
    except ValueError:  # on two drives
        root = ""
    return [path[len(root) :].replace(os.sep, "/").lstrip("/") for path in paths]


def _check_split(where: str, split: LabelSplit) -> None:
    """Values of their types, and ascending indices of samples, none of them both trained on and for validation."""
    _check.integer(where, "samples", split.samples, 1)
    _check.integer(where, "seed", split.seed, 0)
    for part in ("name", "fingerprint"):
        if not isinstance(value := getattr(split, part), str):
            raise TypeError(f"{where}: {part} is a {type(value).__name__}; pass a text.")
    for part in ("labelled", "validation", "unlabelled"):
        index = _check.tensor(where, part, getattr(split, part))
        if index.ndim != 1 or index.dtype != torch.long:
            raise ValueError(
                f"{where} has {part} of shape {tuple(index.shape)} and dtype {index.dtype}; pass long row numbers."
            )
        if not len(index) and part != "validation":
            raise ValueError(f"{where} has no {part} sample; draw it with at least one.")
        outside = index[(index < 0) | (index >= split.samples)]
        if len(outside):
            raise ValueError(
                f"{where} has {int(outside[0])} among the {part} samples, but there are {split.samples:,}, from 0 to "
                f"{split.samples - 1}; draw the split again."
            )
        if bool((index[1:] <= index[:-1]).any()):
            raise ValueError(f"{where} has {part} samples twice or out of order; sort them and leave each in once.")
    for part in ("labelled", "unlabelled"):
        both = split.validation[torch.isin(split.validation, getattr(split, part))]
        if len(both):
            raise ValueError(
                f"{where} has {len(both)} of {len(split.validation)} validation samples among the {part} ones, the "
                f"first of them {int(both[0])}; draw the split again."
            )


def _same_data(where: str, split: LabelSplit, images_or_labels: ImageSet | Tensor) -> None:
    if split.fingerprint == fingerprint(images_or_labels):
        return
    there = len(images_or_labels)
    differs = f"this one has {there:,}"
    if there == split.samples:
        differs = "this one has as many but other labels, class names, ids or pixels"
    raise ValueError(
        f"{where} is for another data set ({split.name!r:.60} with {split.samples:,} samples; {differs}); pass what it "
        "was drawn from, or draw a new split."
    )


def _body(values: dict[str, object]) -> str:
    return ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())


def _text(where: str, split: LabelSplit) -> str:
    _check_split(where, split)
    values = split._asdict() | {"format": FORMAT, "version": VERSION}
    body = _body({key: value.tolist() if isinstance(value := values[key], Tensor) else value for key in KEYS})
    return f'{{\n{body},\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def _parsed(where: str, found: dict[str, object]) -> LabelSplit:
    """The values of a file, each of the right type and small enough for a tensor."""
    kinds = {"name": str, "samples": int, "seed": int, "fingerprint": str} | dict.fromkeys(KEYS[-3:], list)
    wrong = next((key for key, kind in kinds.items() if type(found[key]) is not kind), "")
    values = {key: found[key] for key in kinds}
    for key in KEYS[-3:]:
        items = found[key]
        if isinstance(items, list) and not all(type(item) is int and abs(item) < 2**63 for item in items):
            wrong = wrong or key
        elif isinstance(items, list):
            values[key] = torch.tensor(items, dtype=torch.long)
    if wrong:
        raise ValueError(f"{where} has something else than it should as its {wrong!r}; draw the split again.")
    return LabelSplit(**values)  # type: ignore[arg-type]
