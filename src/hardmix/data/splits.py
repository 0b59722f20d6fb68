"""Stratified splits: exact counts, seeded, sorted indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hardmix import _check


def stratified_subset(labels: Tensor, samples: int, *, seed: int) -> Tensor:
    """Rows of a subset in which the classes keep their shares.

        n_c = samples N_c / N, rounded by largest remainder (ties to the lower class), at least 1 of each class

    Args:
        labels: (N,) integer class ids; gaps between the ids are fine.
        samples: how many rows, from the number of classes to N.
        seed: which rows of each class.

    Returns:
        (samples,) long row numbers, ascending.

    Raises:
        ValueError: fewer samples than classes, or more than rows.
    """
    who = "stratified_subset"
    group, size = _classes(who, labels)
    samples = _check.integer(who, "samples", samples, 1)
    if not len(size) <= samples <= len(group):
        raise ValueError(
            f"{who}: samples is {samples}, but there are {len(size)} classes and {len(group)} rows; "
            f"pass a number from {len(size)} to {len(group)}."
        )
    return _draw(who, group, _shares(size, samples, torch.ones_like(size), size), seed)


def train_validation_split(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a validation split of round(fraction N) rows out of N, with the classes in their shares.

    Every class keeps at least one row for training; a class with two rows or more has at least one in each split as
    long as the validation split has room for all of them.

    Args:
        labels: (N,) integer class ids; gaps between the ids are fine.
        fraction: share of the validation split, between 0 and 1.
        seed: which rows of each class.

    Returns:
        (training rows, validation rows), long, ascending, disjoint, together all N.

    Raises:
        ValueError: a fraction that leaves one of the splits empty, or training without one row of each class.
    """
    who = "train_validation_split"
    group, size = _classes(who, labels)
    fraction = _check.between(who, "fraction", fraction, 0.0, 1.0)
    samples = round(fraction * len(group))
    room = len(group) - len(size)
    if not 0 < samples <= room:
        raise ValueError(
            f"{who}: fraction {fraction:g} of {len(group)} rows is {samples}, but from 1 to {room} can be cut out when "
            f"each of the {len(size)} classes keeps a row; pass another fraction."
        )
    low = (size > 1).long()
    if int(low.sum()) > samples:
        low = torch.zeros_like(size)
    held_out = _draw(who, group, _shares(size, samples, low, size - 1), seed)
    keep = torch.ones(len(group), dtype=torch.bool)
    keep[held_out] = False
    return keep.nonzero().flatten(), held_out


def split_groups(groups: Sequence[str], test: float, validation: float, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut about test N test rows and validation N validation rows out of N; rows of one group stay together.

    Groups are drawn one after another until as many rows as can be, from above or below, are nearest to the share; at
    least one group for each split with a share above 0. The test rows depend on the groups, `test` and `seed` alone.

    Args:
        groups: N names.
        test: share of the test split; 0 for none.
        validation: share of the validation split; 0 for none.
        seed: which groups.

    Returns:
        (training rows, validation rows, test rows), long, ascending, disjoint, together all N.

    Raises:
        ValueError: too few groups for a row of training.
    """
    who = "split_groups"
    names = sorted(set(groups))
    place = {name: k for k, name in enumerate(names)}
    of = torch.tensor([place[group] for group in groups])
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(_check.integer(who, "seed", seed, 0)))
    sizes = torch.bincount(of, minlength=len(names))[order]
    parts, left = [], order
    for name, share in (("test", test), ("validation", validation)):
        share, take = _check.between(who, name, share, 0.0, 1.0), 0
        if share > 0.0 and len(left):
            take = 1 + int((sizes.cumsum(0) - share * len(groups)).abs().argmin())
        parts.append(torch.isin(of, left[:take]))
        left, sizes = left[take:], sizes[take:]
    if not len(left):
        raise ValueError(
            f"{who}: test {test:g} and validation {validation:g} of {len(names)} groups leave none for training; pass "
            "smaller shares or more groups."
        )
    held, checked = parts
    return tuple(rows.nonzero().flatten() for rows in (~(held | checked), checked, held))  # type: ignore[return-value]


def rows_to_split(classes: int, fraction: float) -> int:
    """How many rows of each class, or more, `train_validation_split` can cut a `fraction` in (0, 1) from."""
    rows = 2
    while not 0 < round(fraction * rows * classes) <= (rows - 1) * classes:
        rows += 1
    return rows


def _classes(who: str, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) position of each row's class among the K classes present, and (K,) their sizes."""
    labels = _check.tensor(who, "labels", labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.numel() == 0:
        raise ValueError(
            f"{who}: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass (N,) integer class ids."
        )
    _, group, size = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    return group, size


def _shares(size: Tensor, samples: int, low: Tensor, high: Tensor) -> Tensor:
    """(K,) counts that sum to `samples`, proportional to `size` by largest remainder and kept in [low, high].

    The bounds come first; whatever they force is then given to, or taken from, the classes furthest from their exact
    share.
    """
    total = int(size.sum())
    exact = size * samples  # times total: in whole numbers equal remainders are equal
    count = torch.minimum(torch.maximum(exact // total, low), high)
    while (missing := samples - int(count.sum())) != 0:
        step = 1 if missing > 0 else -1
        lack = (exact - count * total) * step
        full = (count >= high) if step > 0 else (count <= low)
        lack[full] = torch.iinfo(torch.long).min
        # stable, so that ties go to the lower class
        take = torch.argsort(lack, descending=True, stable=True)[: min(abs(missing), int((~full).sum()))]
        count[take] += step
    return count


def _draw(who: str, group: Tensor, count: Tensor, seed: int) -> Tensor:
    """Ascending rows: `count[k]` random ones of each class k."""
    generator = torch.Generator().manual_seed(_check.integer(who, "seed", seed, 0))
    order = torch.randperm(len(group), generator=generator)
    order = order[torch.argsort(group[order], stable=True)]  # random within each class, classes one after another
    size = torch.bincount(group, minlength=len(count))
    rank = torch.arange(len(group)) - (size.cumsum(0) - size)[group[order]]
    return order[rank < count[group[order]]].sort().values
