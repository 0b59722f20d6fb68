"""Splits that a table or a file of texts says itself, in a column or key of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.numbers import TEST, TRAIN, VALIDATION

#: the column that says which split a row belongs to, in any case, and what it may say
SPLIT_COLUMN = "split"
SPLITS = {"train": TRAIN, "test": TEST} | dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION)


def is_split(name: str) -> bool:
    """Whether a column, or a key, of this name says which split a row belongs to."""
    return name.strip().lower() == SPLIT_COLUMN


def find_split(where: str, names: Iterable[str]) -> str | None:
    """The name that `is_split`, if there is one.

    Raises:
        ValueError: there are two.
    """
    found = [name for name in names if is_split(name)]
    if len(found) > 1:
        raise ValueError(f"{where} has {found[0]!r} and {found[1]!r}, which both say the split; rename one of them.")
    return found[0] if found else None


def read_split(where: str, words: Sequence[str], numbers: Sequence[int], *, lines: bool = False) -> Tensor:
    """(N,) uint8 from a word for each sample, in any case.

    Args:
        where: the beginning of messages.
        numbers: row of each sample in its file, or line with `lines`.

    Raises:
        ValueError: another word.
    """
    words = [word.strip().lower() for word in words]
    wrong = next((row for row, word in enumerate(words) if word not in SPLITS), None)
    if wrong is not None:
        place, column = ("line", "key") if lines else ("row", "column")
        near = _check.did_you_mean(words[wrong], SPLITS)
        raise ValueError(
            f"{where} has {words[wrong]!r:.40} in {place} {numbers[wrong]} of its {column} {SPLIT_COLUMN!r}{near}; "
            f"write train, validation or test, or rename the {column}."
        )
    return torch.tensor([SPLITS[word] for word in words], dtype=torch.uint8)


def read_groups(where: str, words: Sequence[str], name: str, numbers: Sequence[int], unit: str = "row") -> list[str]:
    """What each sample belongs to, in the column, key or array `name`.

    Raises:
        ValueError: nothing is said of one.
    """
    empty = next((number for number, word in zip(numbers, words, strict=True) if not word.strip()), None)
    if empty is not None:
        raise ValueError(f"{where} has no group in {name!r}, {unit} {empty}; say what that sample belongs to.")
    return [word.strip() for word in words]


def groups_of_array(where: str, values: np.ndarray, rows: int, name: str) -> list[str]:
    """N groups from an array of whole numbers or words.

    Raises:
        ValueError: other values, or another shape.
    """
    if values.shape != (rows,) or values.dtype.kind not in "iuU":
        raise ValueError(
            f"{where} has {name!r} of shape {values.shape} and type {values.dtype} as groups of {rows} samples; save "
            "one whole number or word each."
        )
    return read_groups(where, [str(value) for value in values.tolist()], name, range(rows))


def check_groups(where: str, groups: Sequence[str], split: Tensor | None) -> None:
    """No group in two splits, where a file says both.

    Raises:
        ValueError: one is.
    """
    if split is None or not groups:
        return
    parts: dict[str, int] = {}
    for group, part in zip(groups, split.tolist(), strict=True):
        if parts.setdefault(group, part) != part:
            raise ValueError(
                f"{where} has the group {group!r:.60} in two splits; put its samples into one, or leave out data.group."
            )


def split_of_array(where: str, values: np.ndarray, rows: int, unit: str) -> Tensor:
    """(N,) uint8 from an array of 0 (training), 1 (validation) and 2 (testing).

    Raises:
        ValueError: other values, another shape, or too few for training or testing.
    """
    if values.shape != (rows,) or not np.isin(values, (TRAIN, VALIDATION, TEST)).all():
        raise ValueError(
            f"{where} has a {SPLIT_COLUMN!r} of shape {values.shape} with other values than 0 (training), 1 "
            f"(validation) and 2 (testing), or not one for each of {rows} {unit}; repair or delete it."
        )
    split = torch.from_numpy(values.astype(np.uint8))
    check_split(where, split)
    return split


def check_split(where: str, split: Tensor | None) -> None:
    """At least two samples for training and two for testing, where there are splits.

    Raises:
        ValueError: fewer.
    """
    if split is None:
        return
    training, testing = (int((split == part).sum()) for part in (TRAIN, TEST))
    if min(training, testing) < 2:
        raise ValueError(
            f"{where} has {training} samples for training and {testing} for testing in its {SPLIT_COLUMN!r}, "
            "but at least 2 of either are needed; add some, take more samples, or rename it."
        )
