"""Intervals and paired tests against scipy.stats and against values worked out by hand."""

from __future__ import annotations

import math
import statistics
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.metrics import Interval, PairedTest, holm, mean_interval, paired_test

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False).map(lambda v: round(v, 4))


def test_hand_worked_interval() -> None:
    # n = 4: mean 3, s^2 = (4 + 1 + 1 + 4) / 3, t_{0.975, 3} = 3.182446305
    half = 3.182446305284263 * math.sqrt(10 / 3 / 4)
    got = mean_interval([1.0, 2.0, 4.0, 5.0])
    assert got.mean == 3.0
    assert got.low == pytest.approx(3 - half, rel=1e-12)
    assert got.high == pytest.approx(3 + half, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(NUMBERS, min_size=2, max_size=12), level=st.floats(0.5, 0.999))
def test_interval_equals_scipy(values: list[float], level: float) -> None:
    got = mean_interval(values, level=level)
    spread = statistics.stdev(values)
    if spread == 0:
        assert got == Interval(pytest.approx(values[0]), got.mean, got.mean)
        return
    low, high = scipy.stats.t.interval(
        level, len(values) - 1, loc=statistics.mean(values), scale=spread / math.sqrt(len(values))
    )
    assert got.low == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert got.high == pytest.approx(high, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12))
def test_paired_test_equals_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    got = paired_test(a, b)
    assert got.difference == pytest.approx(float(np.mean(np.subtract(a, b))), rel=1e-9, abs=1e-9)
    if np.ptp(np.subtract(a, b)) < 1e-9:
        return
    want = scipy.stats.ttest_rel(a, b)
    interval = want.confidence_interval(0.95)
    assert got.p == pytest.approx(want.pvalue, rel=1e-6, abs=1e-12)
    assert got.low == pytest.approx(interval.low, rel=1e-9, abs=1e-9)
    assert got.high == pytest.approx(interval.high, rel=1e-9, abs=1e-9)
    # Swapping the arguments turns the difference round.
    back = paired_test(b, a)
    assert back.difference == pytest.approx(-got.difference, abs=1e-12)
    assert back.p == pytest.approx(got.p)


def test_edges() -> None:
    assert mean_interval([0.25]) == Interval(0.25, None, None)
    assert mean_interval([0.1, 0.1, 0.1]) == Interval(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    assert paired_test([1.0], [3.0]) == PairedTest(-2.0, None, None, None)
    assert paired_test([1.0, 2.0], [1.0, 2.0]) == PairedTest(0.0, 0.0, 0.0, 1.0)
    assert paired_test([1.5, 2.5], [1.0, 2.0]) == PairedTest(0.5, None, None, None)
    assert paired_test([0.9, 0.7], [0.8, 0.6]) == PairedTest(pytest.approx(0.1), None, None, None)  # rounded apart
    for broken in (math.nan, math.inf):
        interval = mean_interval([1.0, broken])
        assert math.isnan(interval.mean)
        assert interval[1:] == (None, None)
        test = paired_test([1.0, broken], [1.0, 1.0])
        assert math.isnan(test.difference)
        assert test[1:] == (None, None, None)


@pytest.mark.parametrize("unit", [2.0**-664, 2.0**664])
def test_squares_that_float64_has_no_numbers_for(unit: float) -> None:
    values, others = [1.0, 2.0, 4.0, -3.0], [0.5, 3.0, 1.0, -2.0]
    for got, want in zip(mean_interval([v * unit for v in values]), mean_interval(values), strict=True):
        assert got == want * unit
    found = paired_test([v * unit for v in values], [v * unit for v in others])
    assert found.p == paired_test(values, others).p
    assert mean_interval([1e308, 1e308]) == (1e308, 1e308, 1e308)  # whose sum is none


def test_wider_level_wider_interval() -> None:
    narrow, wide = (mean_interval([1.0, 2.0, 4.0], level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04 -> made non-decreasing
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([None, 0.01, None, 0.02]) == [None, 0.02, None, 0.02]
    assert holm([]) == []


@settings(deadline=None, max_examples=50)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_the_plain_p_and_bonferroni(p_values: list[float]) -> None:
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1.0, p * len(p_values)) + 1e-15


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: mean_interval([]), ValueError, "mean_interval: values is empty"),
        (lambda: mean_interval(["a"]), TypeError, "pass a sequence of numbers"),
        (lambda: mean_interval(3.0), TypeError, "pass a sequence of numbers"),
        (lambda: mean_interval([1.0], level=1.0), ValueError, "level is 1.0"),
        (lambda: mean_interval([1.0], level=95), ValueError, "level is 95"),
        (lambda: paired_test([1.0], [1.0, 2.0]), ValueError, "paired_test: a has 1 values but b has 2"),
        (lambda: mean_interval("12"), TypeError, "values is '12'; pass a sequence of numbers"),
        (lambda: holm(0.1), TypeError, r"holm: p_values is 0\.1; pass a sequence of numbers"),
        (lambda: holm([0.5, 1.5]), ValueError, "p_values is 1.5"),
    ],
)
def test_bad_inputs_are_named(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_missing_scipy_is_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    for of in (lambda: mean_interval([1.0, 2.0]), lambda: paired_test([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])):
        with pytest.raises(ImportError, match=r"^mean_interval, paired_test: SciPy is not installed; pip install"):
            of()
