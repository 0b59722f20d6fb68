"""Counts against a slow derivation from the docstrings, and what the splits promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.data.imbalance import LAWS, balanced_rows, imbalanced_rows, split_imbalanced

LABELS = st.one_of(
    st.lists(st.integers(-20, 20), min_size=2, max_size=300),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=300),
).map(lambda values: torch.tensor(values, dtype=torch.float64))
SETTINGS = {
    "law": st.sampled_from(LAWS),
    "ratio": st.floats(1.0, 1000.0),
    "bins": st.integers(2, 12),
    "seed": st.integers(0, 2**40),
}


def bin_of(y: float, low: float, high: float, bins: int) -> int:
    return min(math.floor((y - low) * bins / (high - low)), bins - 1)


def counts(labels: Tensor, rows: Tensor, bins: int) -> list[int]:
    """Rows in each bin; the bins are those of all labels."""
    low, high = min(labels.tolist()), max(labels.tolist())
    out = [0] * bins
    for row in rows.tolist():
        out[bin_of(labels[row].item(), low, high, bins)] += 1
    return out


def shares(law: str, ratio: float, bins: int, middle: int) -> list[float]:
    if law == "exponential":
        return [1 / ratio ** (b / (bins - 1)) for b in range(bins)]
    if law == "step":
        return [1.0 if b < bins / 2 else 1 / ratio for b in range(bins)]
    far = max(middle, bins - 1 - middle)
    return [1 / ratio ** ((b - middle) ** 2 / far**2) for b in range(bins)]


def middle_bin(labels: Tensor, bins: int) -> int:
    y = sorted(labels.tolist())
    return bin_of(y[(len(y) - 1) // 2], y[0], y[-1], bins)


def is_row_set(rows: Tensor, n: int) -> bool:
    listed = rows.tolist()
    return rows.dtype == torch.long and listed == sorted(set(listed)) and all(0 <= row < n for row in listed)


@settings(deadline=None, max_examples=150)
@given(labels=LABELS, short=st.sampled_from([0.0, 0.2, 0.5, 1.0]), **SETTINGS)
def test_counts_follow_the_law_to_within_rounding(
    labels: Tensor, law: str, ratio: float, bins: int, short: float, seed: int
) -> None:
    assume(labels.min() < labels.max())
    rows = imbalanced_rows(labels, law=law, ratio=ratio, bins=bins, short=short, seed=seed)
    assert is_row_set(rows, len(labels))
    has, kept = counts(labels, torch.arange(len(labels)), bins), counts(labels, rows, bins)
    share = shares(law, ratio, bins, middle_bin(labels, bins))
    scales = sorted(n / w for n, w in zip(has, share, strict=True) if n)
    scale = scales[min(round(short * len(scales)), len(scales) - 1)]
    for n, c, w in zip(has, kept, share, strict=True):
        if c < n:
            assert c == 1 or abs(c - scale * w) <= 0.5 + 1e-6 * scale
        else:
            assert n <= max(1, scale * w + 0.5 + 1e-6 * scale)  # all of them only where the law asks for that many
        assert c >= min(n, 1)
    if short == 0:
        assert any(c == n for n, c in zip(has, kept, strict=True) if n)  # no larger scale would do


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("exponential", [1000, 316, 100, 32, 10]),
        ("step", [1000, 1000, 1000, 10, 10]),
        ("normal", [10, 316, 1000, 316, 10]),
    ],
)
def test_laws_on_even_labels(law: str, expected: list[int]) -> None:
    labels = torch.arange(5000)
    rows = imbalanced_rows(labels, law=law, ratio=100, bins=5, seed=0)
    assert counts(labels, rows, 5) == expected
    down = imbalanced_rows(-labels, law=law, ratio=100, bins=5, seed=0)
    assert counts(labels, down, 5) == expected[::-1]
    assert counts(labels, imbalanced_rows(labels, law=law, ratio=1, bins=5, seed=0), 5) == [1000] * 5


def test_a_nearly_empty_bin_may_run_short() -> None:
    labels = torch.cat([torch.zeros(4), torch.ones(1000), torch.full((1000,), 2.0), torch.full((1000,), 3.0)])
    exact = imbalanced_rows(labels, law="exponential", ratio=8, bins=4, seed=0)
    assert counts(labels, exact, 4) == [4, 2, 1, 1]  # 4, 2, 1 and a half, but at least 1
    loose = imbalanced_rows(labels, law="exponential", ratio=8, bins=4, seed=0, short=0.25)
    assert counts(labels, loose, 4) == [4, 1000, 500, 250]


def test_a_milder_law_keeps_the_rows_of_a_harder_one() -> None:
    labels = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    hard, mild = (set(imbalanced_rows(labels, law="step", ratio=r, seed=3).tolist()) for r in (50, 5))
    assert hard < mild


def test_integers_on_an_edge_are_in_the_upper_bin() -> None:
    for width in (1, 7, 49, 0.1):  # 0.1 and 0.7 are not exact
        labels = torch.arange(101, dtype=torch.float64) * width
        even = balanced_rows(labels, rows=101, bins=100, seed=0)
        assert even.tolist() == list(range(101))
        kept = imbalanced_rows(torch.arange(101) * 49, law="exponential", ratio=1, bins=100, seed=0)
        assert len(kept) == 100
        assert set(range(99)) <= set(kept.tolist())


@settings(deadline=None, max_examples=100)
@given(labels=LABELS, bins=SETTINGS["bins"], seed=SETTINGS["seed"], share=st.floats(0.0, 1.0))
def test_balanced_rows_fill_the_bins_like_water(labels: Tensor, bins: int, seed: int, share: float) -> None:
    assume(labels.min() < labels.max())
    wanted = max(1, round(share * len(labels)))
    rows = balanced_rows(labels, rows=wanted, bins=bins, seed=seed)
    assert is_row_set(rows, len(labels))
    has, kept = counts(labels, torch.arange(len(labels)), bins), counts(labels, rows, bins)
    level = max(level for level in range(len(labels) + 1) if sum(min(n, level) for n in has) <= wanted)
    left = wanted - sum(min(n, level) for n in has)
    expected = [min(n, level) for n in has]
    for b in [b for b, n in enumerate(has) if n > level][:left]:
        expected[b] += 1
    assert kept == expected


@settings(deadline=None, max_examples=150)
@given(labels=LABELS, test=st.floats(0.0, 0.4), validation=st.floats(0.0, 0.3), **SETTINGS)
def test_splits_are_disjoint_and_every_bin_is_trained_on(
    labels: Tensor, law: str, ratio: float, bins: int, test: float, validation: float, seed: int
) -> None:
    assume(labels.min() < labels.max())
    everything = torch.arange(len(labels))

    def split(**changed: object) -> tuple[Tensor, Tensor, Tensor]:
        given = {"law": law, "ratio": ratio, "bins": bins, "test": test, "validation": validation, "seed": seed}
        return split_imbalanced(labels, **(given | changed))  # type: ignore[arg-type]

    has = counts(labels, everything, bins)
    tested, validated = round(test * len(labels)), round(validation * len(labels))
    room = sum(n // 2 for n in has)
    if not 2 <= tested <= room:
        limit = "at least 2" if tested < 2 else f"at most {room}"
        with pytest.raises(ValueError, match=rf"test \S+ of {len(labels)} labels is {tested} rows, but {limit}"):
            split()
        return
    in_test = counts(labels, split(validation=0.0)[2], bins)
    room = sum((n - t) // 2 for n, t in zip(has, in_test, strict=True))
    if validated > room:
        with pytest.raises(ValueError, match=rf"validation \S+ of .* is {validated} rows, but at most {room}, half"):
            split()
        return
    parts = split()
    assert all(is_row_set(part, len(labels)) for part in parts)
    train, validation_rows, test_rows = parts
    assert (len(validation_rows), len(test_rows)) == (validated, tested)
    assert len(set(torch.cat(parts).tolist())) == sum(map(len, parts))
    in_train, in_validation, in_test = (counts(labels, part, bins) for part in parts)
    share = shares(law, ratio, bins, middle_bin(labels, bins))
    left = [n - v - t for n, v, t in zip(has, in_validation, in_test, strict=True)]
    scale = min(n / w for n, w in zip(left, share, strict=True) if n)
    for n, w, c, v, t, rest in zip(has, share, in_train, in_validation, in_test, left, strict=True):
        assert t <= n // 2
        assert v <= (n - t) // 2
        assert abs(c - min(rest, max(1, scale * w))) <= 0.5 + 1e-6 * scale
        assert c >= min(n, 1)
    assert split()[0].equal(train)
    other = split(law="step", ratio=7.0)
    assert other[1].equal(validation_rows)
    assert other[2].equal(test_rows)
    assert split(validation=0.0)[2].equal(test_rows)
    assert len(split(validation=0.0)[1]) == 0


def test_other_seeds_give_other_rows() -> None:
    labels = torch.randn(400, generator=torch.Generator().manual_seed(0))
    calls: list[Callable[[int], tuple[Tensor, ...]]] = [
        lambda seed: (imbalanced_rows(labels, law="normal", ratio=10, seed=seed),),
        lambda seed: (balanced_rows(labels, rows=80, seed=seed),),
        lambda seed: split_imbalanced(
            labels, law="normal", ratio=10, test=0.2, validation=0.1, seed=seed, bins=5, short=0.4
        ),
    ]
    for call in calls:
        for first, second, again in zip(call(0), call(1), call(0), strict=True):
            assert first.equal(again)
            assert len(first) == len(second)
            assert not first.equal(second)


Y = torch.arange(20.0)
CALL = {"law": "step", "ratio": 4.0, "seed": 0}
SPLIT = CALL | {"test": 0.2, "validation": 0.1}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: imbalanced_rows(Y, **CALL | {"law": "stepp"}),
            ValueError,
            r"law is 'stepp'; .* \(did you mean \"step\"",
        ),
        (lambda: imbalanced_rows(Y, **CALL | {"law": None}), TypeError, r"law is None; pass one of 'exponential'"),
        (
            lambda: imbalanced_rows(Y, **CALL | {"ratio": 0.5}),
            ValueError,
            r"ratio is 0.5; pass a number from 1 to 1e\+06",
        ),
        (lambda: imbalanced_rows(Y, **CALL | {"ratio": math.nan}), ValueError, "ratio is nan"),
        (lambda: imbalanced_rows(Y, **CALL | {"short": 1.5}), ValueError, "short is 1.5; pass a number from 0 to 1"),
        (lambda: imbalanced_rows(Y, **CALL | {"bins": 1}), ValueError, "bins is 1; pass an integer of at least 2"),
        (lambda: imbalanced_rows(Y, **CALL | {"seed": -1}), ValueError, "imbalanced_rows: seed is -1"),
        (lambda: imbalanced_rows(Y.tolist(), **CALL), TypeError, "imbalanced_rows: labels is a list"),
        (lambda: imbalanced_rows(Y[:, None], **CALL), ValueError, r"labels has shape \(20, 1\)"),
        (lambda: imbalanced_rows(Y[:0], **CALL), ValueError, r"labels has shape \(0,\) and is empty"),
        (lambda: imbalanced_rows(Y[:1], **CALL), ValueError, "labels are all 0; pass labels that differ"),
        (lambda: imbalanced_rows(Y * 0 + 3, **CALL), ValueError, "labels are all 3; pass labels that differ"),
        (lambda: imbalanced_rows(Y / Y, **CALL), ValueError, "labels holds NaN or infinity in rows 0; repair"),
        (lambda: imbalanced_rows(Y.double() * 5e306, **CALL), ValueError, "too far for float64; pass them in another"),
        (lambda: balanced_rows(Y, rows=21, seed=0), ValueError, "rows is 21, but there are 20 labels"),
        (lambda: balanced_rows(Y, rows=0, seed=0), ValueError, "balanced_rows: rows is 0"),
        (
            lambda: split_imbalanced(Y, **SPLIT | {"test": 0.05}),
            ValueError,
            "test 0.05 of 20 labels is 1 rows, but at least 2",
        ),
        (
            lambda: split_imbalanced(Y, **SPLIT | {"test": 0.6}),
            ValueError,
            "test 0.6 of 20 labels is 12 rows, but at most 10, half",
        ),
        (
            lambda: split_imbalanced(Y, **SPLIT | {"validation": 0.5}),
            ValueError,
            r"validation 0.5 of 20 .* 10 rows, but at most 6, half of",
        ),
        (lambda: split_imbalanced(Y, **SPLIT | {"test": 2}), ValueError, "test is 2; pass a number from 0 to 1"),
        (
            lambda: split_imbalanced(Y[:5], **SPLIT),
            ValueError,
            "test 0.2 of 5 labels is 1 rows, but at least 2 can be",
        ),
        (lambda: split_imbalanced(Y, **SPLIT | {"law": "exp"}), ValueError, r"split_imbalanced: law is 'exp'"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
