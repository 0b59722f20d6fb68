"""Is it a difference, or the seeds? Intervals and paired tests over a few runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from hardmix import _check


class Interval(NamedTuple):
    """A mean with its confidence interval; `low` and `high` are None where there is none."""

    mean: float
    low: float | None
    high: float | None


class PairedTest(NamedTuple):
    """Mean of the paired differences, its confidence interval, and the two-sided p; None where there is none."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean and Student-t confidence interval.

        m -+ t_{(1 + level) / 2, n - 1} s / sqrt(n),   s with n - 1 in the denominator

    Args:
        values: n numbers, one per seed.
        level: coverage, between 0 and 1.
    Returns:
        Interval(mean, low, high). One value has no interval: low = high = None. A value that is not finite makes the
        mean NaN and leaves no interval. Equal values give an interval of width 0.
    Raises:
        ValueError: no values, or a level outside (0, 1).

    >>> [round(v, 3) for v in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    numbers = _numbers("mean_interval", "values", values)
    level = _level("mean_interval", level)
    if not all(map(math.isfinite, numbers)):
        return Interval(math.nan, None, None)
    scale = _scale(numbers)
    mean = math.fsum(x / scale for x in numbers) / len(numbers) * scale
    if len(numbers) == 1:
        return Interval(mean, None, None)
    half = _t_quantile(level, len(numbers) - 1) * _standard_error(numbers, mean)
    return Interval(mean, mean - half, mean + half)


def paired_test(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> PairedTest:
    """Paired t test of a - b: runs with one seed share their split and first weights, so they are compared in pairs.

        d_i = a_i - b_i,   t = mean(d) / (s_d / sqrt(n)),   p = 2 P(T_{n - 1} > |t|)

    Args:
        a, b: n numbers each, entry i of both from the same seed.
        level: coverage of the interval.
    Returns:
        PairedTest(difference, low, high, p). One pair can't be tested: low, high and p are None. All differences 0:
        p = 1. All differences equal (to their rounding) but not 0: nothing to estimate a spread from, so low, high and
        p are None. A value that is not finite: difference NaN, the rest None.
    Raises:
        ValueError: lengths disagree, no values, or a level outside (0, 1).

    >>> [round(v, 3) for v in paired_test([3.0, 4.0, 6.0], [2.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484, 0.074]
    """
    who = "paired_test"
    first, second = _numbers(who, "a", a), _numbers(who, "b", b)
    if len(first) != len(second):
        raise ValueError(f"{who}: a has {len(first)} values but b has {len(second)}; pass one of each per seed.")
    level = _level(who, level)
    differences = [x - y for x, y in zip(first, second, strict=True)]
    difference, low, high = mean_interval(differences, level=level)
    if low is None:
        return PairedTest(difference, None, None, None)
    if not any(differences):
        return PairedTest(0.0, 0.0, 0.0, 1.0)
    error = _standard_error(differences, difference)
    if error <= 4 * sys.float_info.epsilon * max(map(abs, first + second)):
        return PairedTest(difference, None, None, None)
    p = 2.0 * float(_special().stdtr(len(differences) - 1, -abs(difference) / error))
    return PairedTest(difference, low, high, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: p values adjusted for having asked several questions.

        sorted p_(1) <= ... <= p_(m):   adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))

    Args:
        p_values: one p per comparison; None (no test) stays None and is not counted.
    Returns:
        Adjusted values in the given order; compare them with the level that a single p would be compared with.
    Raises:
        ValueError: a p outside [0, 1].
    Reference: Holm 1979, A simple sequentially rejective multiple test procedure.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    given = _check.sequence("holm", "p_values", p_values, "numbers")
    known = [(_check.between("holm", "p_values", p, 0.0, 1.0), i) for i, p in enumerate(given) if p is not None]
    adjusted: list[float | None] = [None] * len(given)
    largest = 0.0
    for rank, (p, i) in enumerate(sorted(known)):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _numbers(who: str, name: str, values: Sequence[float]) -> list[float]:
    given = _check.sequence(who, name, values, "numbers")
    try:
        numbers = [float(v) for v in given]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{who}: {name} is {_check.shown(values)}; pass a sequence of numbers.") from None
    if not numbers:
        raise ValueError(f"{who}: {name} is empty; pass one number per seed.")
    return numbers


def _level(who: str, level: float) -> float:
    level = _check.between(who, "level", level, 0.0, 1.0)
    if level in (0.0, 1.0):
        raise ValueError(f"{who}: level is {level!r}; pass a number between 0 and 1, such as 0.95.")
    return level


def _standard_error(numbers: Sequence[float], mean: float) -> float:
    n = len(numbers)
    if n < 2 or min(numbers) == max(numbers):
        # Exactly 0: the rounded mean of equal numbers may differ from them.
        return 0.0
    deviations = [x - mean for x in numbers]
    scale = _scale(deviations)
    return math.sqrt(math.fsum((d / scale) ** 2 for d in deviations) / (n - 1) / n) * scale


def _scale(numbers: Sequence[float]) -> float:
    """The power of two below the largest size. Over it sums and squares neither overflow nor vanish, and it rounds
    nothing."""
    return 2.0 ** (math.frexp(max(map(abs, numbers)))[1] - 1)


def _t_quantile(level: float, freedom: int) -> float:
    return float(_special().stdtrit(freedom, (1.0 + level) / 2.0))


def _special() -> Any:
    try:
        from scipy import special
    except ImportError:
        raise ImportError("mean_interval, paired_test: SciPy is not installed; pip install scipy.") from None
    return special
