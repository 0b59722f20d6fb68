"""The samples of a regression run: read, split, and their numbers brought to one scale."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardmix._files import from_home
from hardmix.data.imbalance import balanced_rows, imbalanced_rows, split_imbalanced
from hardmix.data.number_sets import Options, load_numbers
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.splits import split_groups
from hardmix.data.tables import split_rows
from hardmix.train.errors import RunError
from hardmix.train.sections import DataSection
from hardmix.train.seeds import derive, generator

#: share of the label bins that may hold fewer training numbers than the law of an imbalance wants of them: labels are
#: often bell-shaped, and nearly empty bins at the ends would leave next to nothing of the others
SHORT = 0.2


class LabelScale(nn.Module):
    """Labels of the training split to mean 0 and standard deviation 1 and back; saved with the weights.

    It stays on the CPU, in float64: labels may be large and close, and not every device has that type.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", labels.double().mean())
        self.register_buffer("std", labels.double().std(correction=0))

    def forward(self, labels: Tensor) -> Tensor:
        return ((labels - self.mean) / self.std).float()

    def back(self, values: Tensor) -> Tensor:
        # A float64 scalar would leave float32 values as they are, in which seconds since 1970 are 128 apart.
        return values.double() * self.std + self.mean


class Samples(nn.Module):
    """Hashes of a set's samples and of their splits, which checkpoints keep; others are refused.

    With a row more or less all splits are drawn anew, and what was trained on would be tested. Pixels and voxels are
    not among it, since what resampling rounds differs from machine to machine; the names of their files are.
    """

    def __init__(self, numbers: Numbers, rows: Iterable[Tensor]) -> None:
        super().__init__()
        x = numbers.inputs
        content: Any = x
        if isinstance(x, Tensor):
            content = tuple(x.shape) if numbers.kind in ("images", "volumes") else x.contiguous().numpy()
        self.source = numbers.source
        self.hashes = {
            "features": _hash(numbers.feature_names),
            "samples": _hash(len(x), tuple(numbers.ids), content),
            # those that are means of something have last digits of their own on another machine
            "labels": _hash([f"{label:.12g}" for label in numbers.labels.tolist()]),
            "splits": _hash(*(part.numpy() for part in rows)),
        }

    @property
    def digest(self) -> str:
        """The same for all splits."""
        every = [self.hashes[name] for name in ("features", "samples", "labels")]
        return bytes(_hash(*(value.numpy() for value in every)).tolist()).hex()

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return dict(self.hashes)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        other = [name for name, own in self.hashes.items() if name in state_dict and not own.equal(state_dict[name])]
        if other:
            raise RunError(
                f"{self.source} gives other {' and '.join(other)} than the run began with, and what was trained on may "
                "be tested; restore the data, or train into another --out."
            )


def _hash(*parts: Any) -> Tensor:
    """(16,) uint8 of arrays, numbers and texts; the length goes first, so that no two lists look alike."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


class NumberData:
    """A set of numbers as one recipe sees it.

    Attributes:
        numbers: the set.
        rows: "train", "validation" and "test" -> (n,) long, ascending.
        scale: of the labels, fitted on the training rows.
        samples: what a checkpoint says of them, see `Samples`.
    """

    def __init__(self, section: DataSection, seed: int) -> None:
        self.section, self.numbers = section, read(section)
        train, validation, test = split(self.numbers, section, seed)
        if section.train_samples:
            chosen = torch.randperm(len(train), generator=generator(seed, "subset"))[: section.train_samples]
            train = train[chosen.sort().values]
        self.rows = {"train": train, "validation": validation, "test": test}
        self.samples = Samples(self.numbers, self.rows.values())
        if self.numbers.kind == "rows":
            self.numbers = self.numbers._replace(inputs=_filled(self.numbers, train))
        self.scale = self._fitted()

    def _fitted(self) -> LabelScale:
        labels = self.labels("train")
        if float(labels.min()) == float(labels.max()):
            raise ValueError(f"data: every training row has the {self.numbers.target} {float(labels[0]):g}; take more.")
        return LabelScale(labels)

    def leave_out(self, tested: NumberData) -> None:
        """Pre-train on no sample that another part of the same files is validated or tested on."""
        rows = [int(row) for part in ("validation", "test") for row in tested.rows[part]]
        held = {tested.place(row) for row in rows}
        groups = {tested.numbers.groups[row] for row in rows} if tested.numbers.groups else set()
        train, own = self.rows["train"], self.numbers.groups
        kept = torch.tensor(
            [self.place(row) not in held and not (own and own[row] in groups) for row in train.tolist()],
            dtype=torch.bool,
        )
        if bool(kept.all()):
            return
        count = f"{int((~kept).sum())} of {len(train)} samples"
        if int(kept.sum()) < 2:
            raise ValueError(
                f"contrast.data: {count} to pre-train on are validated or tested on afterwards, and too few are left; "
                "name another set, or say the split of both in a column."
            )
        warnings.warn(
            f"contrast.data: left out {count} to pre-train on, which are validated or tested on afterwards.",
            stacklevel=2,
        )
        self.rows["train"] = train[kept]
        self.scale = self._fitted()

    def place(self, row: int) -> str:
        """Which sample of which file this row of the set is, wherever else it is named."""
        name, numbers = self.numbers.sample_id(row), self.numbers
        if numbers.kind in ("images", "volumes") and numbers.ids:
            return os.path.realpath(os.path.join(from_home(self.section.path or numbers.source), name))
        return f"{os.path.realpath(numbers.source)} {name}"

    def labels(self, split: str) -> Tensor:
        """(n,) float64 labels in their own unit."""
        return self.numbers.labels[self.rows[split]]

    def names(self, rows: Tensor) -> list[str]:
        """What error messages call these rows of the set."""
        return [self.numbers.sample_id(int(row)) for row in rows]


def read(section: DataSection) -> Numbers:
    """The set of a recipe's data section."""
    options = Options(
        target=section.target,
        domain=section.domain,
        samples=section.samples,
        size=section.image_size,
        # the mean is that of the training rows, which are not known yet
        missing="keep" if section.missing == "mean" and section.name == "table" else section.missing,
        on_error=section.on_error,
        labels=section.labels,
        inputs=section.inputs,
        pair=section.pair,
        group=section.group,
    )
    return load_numbers(section.name, section.path or None, options)


def digest_now(section: DataSection) -> str | None:
    """What `Samples.digest` of a section's files is now; None where they are gone."""
    try:
        return Samples(read(section), ()).digest
    except FileNotFoundError:
        return None


def _filled(numbers: Numbers, train: Tensor) -> Tensor:
    """(N, P) rows, where cells are missing with the mean of their column over the training rows."""
    x = numbers.inputs
    assert isinstance(x, Tensor)
    gaps = x.isnan()
    if not bool(gaps.any()):
        return x
    known = x[train]
    empty = (known.isnan().all(0) & gaps.any(0)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"data: {numbers.source} has no value in {numbers.feature_names[empty[0]]!r} among the {len(train)} "
            "training rows; delete the column, or take more rows."
        )
    # Between the values: the rounded mean of equal ones may differ from them, and the column would not be constant.
    low, high = known.nan_to_num(nan=torch.inf).amin(0), known.nan_to_num(nan=-torch.inf).amax(0)
    return torch.where(gaps, known.nanmean(0).clamp(low, high), x)


def split(numbers: Numbers, section: DataSection, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows, drawn by the seed where the set does not say them itself.

    With `imbalance` above 1 validation and test are drawn balanced, and the rest for training is thinned out. The
    set's own test split then is thinned to a balanced one, and its validation split stays.
    """
    labels, count = numbers.labels, len(numbers.labels)
    law, ratio = section.imbalance_law, section.imbalance
    if numbers.split is None:
        if numbers.groups:
            return _large_enough(numbers, *split_groups(numbers.groups, section.test, section.validation, seed=seed))
        if ratio == 1.0:
            return split_rows(count, section.test, section.validation, seed)
        return split_imbalanced(
            labels, law=law, ratio=ratio, test=section.test, validation=section.validation, seed=seed, short=SHORT
        )
    train, validation, test = ((numbers.split == part).nonzero().flatten() for part in (TRAIN, VALIDATION, TEST))
    if len(validation) == 0 and section.validation and numbers.groups:
        together = [numbers.groups[row] for row in train.tolist()]
        kept, held_out, _ = split_groups(together, 0.0, section.validation, seed=derive(seed, "validation"))
        train, validation = train[kept], train[held_out]
    elif len(validation) == 0 and section.validation:
        order = torch.randperm(len(train), generator=generator(seed, "validation"))
        held = round(section.validation * len(train))
        validation, train = train[order[:held].sort().values], train[order[held:].sort().values]
    if ratio > 1.0:
        draw = derive(seed, "imbalance")
        train = train[imbalanced_rows(labels[train], law=law, ratio=ratio, seed=draw, short=SHORT)]
        test = test[balanced_rows(labels[test], rows=len(test) // 2, seed=draw)]
    return _large_enough(numbers, train, validation, test)


def _large_enough(numbers: Numbers, train: Tensor, validation: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if len(train) < 2 or len(test) < 2:
        raise ValueError(
            f"data: {numbers.name} is left with {len(train)} samples for training and {len(test)} for testing; "
            "take more samples or another share."
        )
    return train, validation, test
