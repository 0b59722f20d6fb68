"""The samples of a regression run: read, split, and their numbers brought to one scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix.data.imbalance import balanced_rows, imbalanced_rows, split_imbalanced
from hardmix.data.number_sets import Options, load_numbers
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.tables import split_rows
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


class NumberData:
    """A set of numbers as one recipe sees it.

    Attributes:
        numbers: the set.
        rows: "train", "validation" and "test" -> (n,) long, ascending.
        scale: of the labels, fitted on the training rows.
    """

    def __init__(self, section: DataSection, seed: int) -> None:
        options = Options(
            target=section.target,
            domain=section.domain,
            samples=section.samples,
            size=section.image_size,
            missing=section.missing,
            on_error=section.on_error,
            labels=section.labels,
            inputs=section.inputs,
            pair=section.pair,
        )
        self.numbers = load_numbers(section.name, section.path or None, options)
        train, validation, test = split(self.numbers, section, seed)
        if section.train_samples:
            chosen = torch.randperm(len(train), generator=generator(seed, "subset"))[: section.train_samples]
            train = train[chosen.sort().values]
        self.rows = {"train": train, "validation": validation, "test": test}
        labels = self.numbers.labels[train]
        if float(labels.min()) == float(labels.max()):
            raise ValueError(f"data: every training row has the {self.numbers.target} {float(labels[0]):g}; take more.")
        self.scale = LabelScale(labels)

    def labels(self, split: str) -> Tensor:
        """(n,) float64 labels in their own unit."""
        return self.numbers.labels[self.rows[split]]

    def names(self, rows: Tensor) -> list[str]:
        """What error messages call these rows of the set."""
        return [self.numbers.sample_id(int(row)) for row in rows]


def split(numbers: Numbers, section: DataSection, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows, drawn by the seed where the set does not say them itself.

    With `imbalance` above 1 validation and test are drawn balanced, and the rest for training is thinned out. The
    set's own test split then is thinned to a balanced one, and its validation split stays.
    """
    labels, count = numbers.labels, len(numbers.labels)
    law, ratio = section.imbalance_law, section.imbalance
    if numbers.split is None:
        if ratio == 1.0:
            return split_rows(count, section.test, section.validation, seed)
        return split_imbalanced(
            labels, law=law, ratio=ratio, test=section.test, validation=section.validation, seed=seed, short=SHORT
        )
    train, validation, test = ((numbers.split == part).nonzero().flatten() for part in (TRAIN, VALIDATION, TEST))
    if len(validation) == 0 and section.validation:
        order = torch.randperm(len(train), generator=generator(seed, "validation"))
        held = round(section.validation * len(train))
        validation, train = train[order[:held].sort().values], train[order[held:].sort().values]
    if ratio > 1.0:
        draw = derive(seed, "imbalance")
        train = train[imbalanced_rows(labels[train], law=law, ratio=ratio, seed=draw, short=SHORT)]
        test = test[balanced_rows(labels[test], rows=len(test) // 2, seed=draw)]
    if len(train) < 2 or len(test) < 2:
        raise ValueError(
            f"data: {numbers.name} is left with {len(train)} samples for training and {len(test)} for testing; "
            "take more samples or another share."
        )
    return train, validation, test
