"""Splits against counts worked out by hand and by exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data import stratified_subset, train_validation_split
from hardmix.data.splits import rows_to_split, split_groups

LABELS = torch.tensor([0] * 50 + [1] * 30 + [7] * 20)[torch.randperm(100, generator=torch.Generator().manual_seed(3))]


def counts(labels: torch.Tensor, index: torch.Tensor) -> dict[int, int]:
    chosen = labels[index].tolist()
    return {label: chosen.count(label) for label in sorted(set(labels.tolist()))}


def largest_remainder(sizes: list[int], samples: int) -> list[int]:
    """Exact shares in fractions, rounded down, the rest to the largest remainders, ties to the lower class."""
    exact = [Fraction(size * samples, sum(sizes)) for size in sizes]
    whole = [share.numerator // share.denominator for share in exact]
    order = sorted(range(len(sizes)), key=lambda k: (whole[k] - exact[k], k))
    for k in order[: samples - sum(whole)]:
        whole[k] += 1
    return whole


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (100, {0: 50, 1: 30, 7: 20}),
        (10, {0: 5, 1: 3, 7: 2}),
        (11, {0: 6, 1: 3, 7: 2}),  # 5.5, 3.3, 2.2
        (13, {0: 6, 1: 4, 7: 3}),  # 6.5, 3.9, 2.6
        (3, {0: 1, 1: 1, 7: 1}),  # 1.5, 0.9, 0.6: one of each
    ],
)
def test_the_subset_has_exactly_the_counts_of_the_largest_remainder(samples: int, expected: dict[int, int]) -> None:
    index = stratified_subset(LABELS, samples, seed=0)
    assert counts(LABELS, index) == expected
    assert index.dtype == torch.long
    assert index.tolist() == sorted(set(index.tolist()))


def test_few_labels_of_a_balanced_set_are_equally_many() -> None:
    labels = torch.arange(1000) % 10
    assert set(counts(labels, stratified_subset(labels, 40, seed=1)).values()) == {4}


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(20, 60), min_size=1, max_size=6), seed=st.integers(0, 2**40), data=st.data())
def test_counts_are_the_largest_remainders_where_no_bound_applies(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    labels = torch.cat([torch.full((size,), 3 * k) for k, size in enumerate(sizes)])
    samples = data.draw(st.integers(5 * len(sizes), len(labels)))
    index = stratified_subset(labels, samples, seed=seed)
    assert list(counts(labels, index).values()) == largest_remainder(sizes, samples)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), fraction=st.floats(0.01, 0.95))
def test_a_split_is_disjoint_complete_and_leaves_every_class_in_training(sizes: list[int], fraction: float) -> None:
    labels = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    samples = round(fraction * len(labels))
    if not 0 < samples <= len(labels) - len(sizes):
        with pytest.raises(ValueError, match=r"train_validation_split: fraction .* pass another fraction\."):
            train_validation_split(labels, fraction, seed=0)
        return
    train, validation = train_validation_split(labels, fraction, seed=0)
    assert len(validation) == samples
    assert sorted(train.tolist() + validation.tolist()) == list(range(len(labels)))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())
    assert min(counts(labels, train).values()) >= 1
    if samples >= sum(size > 1 for size in sizes):
        assert all(n >= 1 for (_, n), size in zip(counts(labels, validation).items(), sizes, strict=True) if size > 1)


@pytest.mark.parametrize(("classes", "fraction", "rows"), [(2, 0.1, 3), (10, 0.1, 2), (2, 0.5, 2), (3, 0.9, 9)])
def test_rows_to_split_is_the_least_that_can_be_split(classes: int, fraction: float, rows: int) -> None:
    assert rows_to_split(classes, fraction) == rows
    train_validation_split(torch.arange(classes * rows) % classes, fraction, seed=0)
    for fewer in range(1, rows):
        with pytest.raises(ValueError, match="pass another fraction"):
            train_validation_split(torch.arange(classes * fewer) % classes, fraction, seed=0)


def test_a_tenth_of_a_balanced_set_is_a_tenth_of_each_class() -> None:
    labels = torch.arange(12_000) % 10
    train, validation = train_validation_split(labels, 0.1, seed=0)
    assert set(counts(labels, train).values()) == {1080}
    assert set(counts(labels, validation).values()) == {120}


def test_the_seed_and_nothing_else_decides() -> None:
    torch.manual_seed(1)
    first = stratified_subset(LABELS, 30, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = stratified_subset(LABELS, 30, seed=5)
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, stratified_subset(LABELS, 30, seed=6))


def test_every_row_of_a_class_can_be_chosen() -> None:
    labels = torch.zeros(12, dtype=torch.long)
    seen = {int(i) for seed in range(60) for i in stratified_subset(labels, 2, seed=seed)}
    assert seen == set(range(12))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stratified_subset(LABELS, 2, seed=0), r"samples is 2, but there are 3 classes .* from 3 to 100"),
        (lambda: stratified_subset(LABELS, 101, seed=0), r"samples is 101, .* and 100 rows"),
        (lambda: stratified_subset(LABELS.float(), 5, seed=0), r"labels has shape \(100,\) and dtype torch.float32"),
        (lambda: stratified_subset(LABELS[:0], 5, seed=0), r"labels has shape \(0,\)"),
        (lambda: stratified_subset(LABELS, 5, seed=-1), r"stratified_subset: seed is -1"),
        (lambda: train_validation_split(LABELS, 1.5, seed=0), r"fraction is 1.5; pass a number from 0 to 1"),
        (lambda: train_validation_split(LABELS, float("nan"), seed=0), r"fraction is nan"),
        (lambda: train_validation_split(LABELS, 0.001, seed=0), r"fraction 0.001 of 100 rows is 0"),
        (lambda: train_validation_split(LABELS, 0.99, seed=0), r"is 99, but from 1 to 97 can be cut out"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@given(
    groups=st.lists(st.sampled_from("abcdefghijklmnop"), min_size=8, max_size=80).filter(lambda g: len(set(g)) > 5),
    test=st.floats(0.05, 0.3),
    validation=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_groups_stay_together(groups: list[str], test: float, validation: float, seed: int) -> None:
    parts = split_groups(groups, test, validation, seed=seed)
    assert torch.cat(parts).sort().values.equal(torch.arange(len(groups)))
    assert all(rows.equal(rows.sort().values) for rows in parts)
    held = [{groups[row] for row in rows.tolist()} for rows in parts]
    assert held[0].isdisjoint(held[1] | held[2])
    assert held[1].isdisjoint(held[2])
    assert bool(held[1]) == bool(validation)
    assert abs(len(parts[2]) - test * len(groups)) <= max(groups.count(group) for group in groups)
    assert parts[2].equal(split_groups(groups, test, 0.0, seed=seed)[2])


def test_groups_that_leave_nothing_to_train_on() -> None:
    with pytest.raises(
        ValueError, match=r"test 0.2 and validation 0.1 of 2 groups leave none for training; pass smaller"
    ):
        split_groups(["a", "b"] * 10, 0.2, 0.1, seed=0)
