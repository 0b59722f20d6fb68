"""Errors of predicted numbers and the order of embeddings, against scipy and plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hardmix.metrics import local_linearity, ordinality, regression_metrics, shot_metrics


def draw(n: int, seed: int, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = 5 * torch.randn(n, generator=g, dtype=torch.float64) + 20
    p = y + 2 * torch.randn(n, generator=g, dtype=torch.float64)
    return (p.round(), y.round()) if ties else (p, y)


def correlation(f: Callable[..., tuple[float, float]], a: list[float], b: list[float]) -> float:
    return float(f(a, b)[0]) if len(set(a)) > 1 and len(set(b)) > 1 else math.nan


def slow_metrics(p: list[float], y: list[float]) -> dict[str, float]:
    n = len(y)
    errors = [abs(a - b) for a, b in zip(p, y, strict=True)]
    square = math.fsum(e * e for e in errors)
    total = math.fsum((b - math.fsum(y) / n) ** 2 for b in y)
    return {
        "mae": math.fsum(errors) / n,
        "rmse": math.sqrt(square / n),
        "gm": math.exp(math.fsum(math.log(max(e, 1e-10)) for e in errors) / n),
        "r2": 1 - square / total if len(set(y)) > 1 else math.nan,
        "pearson": correlation(stats.pearsonr, p, y),
        "spearman": correlation(stats.spearmanr, p, y),
    }


def slow_linearity(z: np.ndarray, y: list[float], neighbours: int = 2) -> float:
    units = [row / np.linalg.norm(row) if row.any() else row for row in z]
    levels = sorted(set(y))
    centre = {u: np.mean([r for r, v in zip(units, y, strict=True) if v == u], axis=0) for u in levels}
    off, reach = [], []
    for row, v in zip(units, y, strict=True):
        for k in range(1, neighbours // 2 + 1):
            below, above = [u for u in levels if u < v][::-1], [u for u in levels if u > v]
            if min(len(below), len(above)) < k:
                continue
            low, high = below[k - 1], above[k - 1]
            t = (v - low) / (high - low)
            off.append(np.linalg.norm(row - (1 - t) * centre[low] - t * centre[high]))
            reach.append((np.linalg.norm(row - centre[low]) + np.linalg.norm(row - centre[high])) / 2)
    return float(np.mean(off) / np.mean(reach)) if off and np.mean(reach) > 0 else math.nan


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 50), seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_metrics_equal_the_loop_in_any_unit(n, seed, scale):
    p, y = draw(n, seed, ties=seed % 2 == 0)
    p, y = p * scale, y * scale
    got = regression_metrics(p, y)
    assert list(got) == ["mae", "rmse", "gm", "r2", "pearson", "spearman"]
    assert got == pytest.approx(slow_metrics(p.tolist(), y.tolist()), rel=1e-9, abs=1e-12, nan_ok=True)


def test_metrics_on_the_edge():
    y = torch.tensor([1.0, 2.0, 4.0])
    perfect = regression_metrics(y, y)
    assert perfect == pytest.approx({"mae": 0, "rmse": 0, "gm": 1e-10, "r2": 1, "pearson": 1, "spearman": 1})
    for p, labels, undefined in (
        (torch.full((3,), 0.1), y, {"pearson", "spearman"}),
        (y, torch.full((3,), 0.1), {"r2", "pearson", "spearman"}),
        (y[:1], y[1:2], {"r2", "pearson", "spearman"}),
    ):
        got = regression_metrics(p, labels)
        assert {key for key, value in got.items() if math.isnan(value)} == undefined
    whole = regression_metrics(torch.tensor([3, 2]), torch.tensor([1, 2]).to(torch.int16))
    assert whole["mae"] == 1.0
    assert regression_metrics(y.half(), y.bfloat16())["rmse"] == 0.0


def test_many_ties_do_not_overflow_the_ranks():
    y = (torch.arange(150_000) >= 70_000).double()
    p = y + (torch.arange(150_000) % 3)
    want = stats.spearmanr(p.numpy(), y.numpy())[0]
    assert regression_metrics(p, y)["spearman"] == pytest.approx(want, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), m=st.integers(1, 80), width=st.sampled_from([0.5, 1.0, 3.0]), seed=st.integers(0, 999))
def test_shots_equal_the_loop(n, m, width, seed):
    (p, y), (_, train) = draw(n, seed), draw(m, seed + 1)
    errors: dict[str, list[float]] = {"mae_many": [], "mae_medium": [], "mae_few": []}
    for a, b in zip(p.tolist(), y.tolist(), strict=True):
        near = sum(math.floor(v / width + 0.5) == math.floor(b / width + 0.5) for v in train.tolist())
        errors["mae_many" if near > 6 else "mae_few" if near < 3 else "mae_medium"].append(abs(a - b))
    want = {name: sum(values) / len(values) if values else math.nan for name, values in errors.items()}
    got = shot_metrics(p, y, train, bin_width=width, many=6, few=3)
    assert got == pytest.approx(want, rel=1e-12, nan_ok=True)


def test_bounds_of_the_shots_are_those_of_the_paper():
    train = torch.cat([torch.full((n,), v) for v, n in ((0.1, 101), (0.2, 100), (0.3, 20), (0.4, 19))])
    labels = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).double()  # rounded otherwise than in train
    off = labels + torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    got = shot_metrics(off, labels, train, bin_width=0.1)
    assert got == pytest.approx({"mae_many": 1, "mae_medium": 3, "mae_few": 12})
    whole = shot_metrics(torch.zeros(2), torch.tensor([3, -3]), torch.tensor([3] * 200))
    assert whole == pytest.approx({"mae_many": 3, "mae_medium": math.nan, "mae_few": 3}, nan_ok=True)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 25), d=st.integers(1, 4), seed=st.integers(0, 999))
def test_ordinality_equals_scipy_over_all_pairs(n, d, seed):
    _, y = draw(n, seed, ties=seed % 2 == 0)
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = list(combinations(range(n), 2))
    far = [float(np.linalg.norm(z[i] - z[j])) for i, j in pairs]
    apart = [abs(float(y[i] - y[j])) for i, j in pairs]
    want = correlation(stats.spearmanr, far, apart)
    assert ordinality(z, y) == pytest.approx(want, abs=1e-9, nan_ok=True)
    assert ordinality(z, y, pairs=len(pairs)) == pytest.approx(want, abs=1e-9, nan_ok=True)


def test_drawn_pairs_estimate_all_of_them():
    _, y = draw(300, 0)
    z = torch.stack([y, 8 * torch.randn(300, generator=torch.Generator().manual_seed(1)).double()], 1)
    full = ordinality(z, y)
    g = torch.Generator().manual_seed(5)
    some = [ordinality(z, y, pairs=2_000, generator=g) for _ in range(20)]
    assert len(set(some)) == 20
    assert np.mean(some) == pytest.approx(full, abs=0.02)
    again = ordinality(z, y, pairs=2_000, generator=torch.Generator().manual_seed(5))
    assert again == some[0]
    assert math.isnan(ordinality(torch.eye(30), torch.arange(30), pairs=200))  # no row with itself
    assert math.isnan(ordinality(torch.ones(5, 2), torch.arange(5)))
    assert math.isnan(ordinality(torch.eye(2), torch.arange(2)))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 20), neighbours=st.sampled_from([2, 4, 6]), seed=st.integers(0, 999))
def test_linearity_equals_the_loop_whatever_the_order_of_the_rows(n, neighbours, seed):
    _, y = draw(n, seed, ties=seed % 2 == 0)
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    z[0] *= seed % 3  # now and then a row of zeros
    want = slow_linearity(z.numpy(), y.tolist(), neighbours)
    assert local_linearity(z, y, neighbours=neighbours) == pytest.approx(want, rel=1e-9, nan_ok=True)
    shuffled = torch.randperm(n, generator=g)
    got = local_linearity(3 * z[shuffled], y[shuffled], neighbours=neighbours)
    assert got == pytest.approx(want, rel=1e-9, nan_ok=True)


def test_linearity_of_arcs_noise_and_collapse():
    y = torch.arange(200).double()

    def arc(step: float) -> torch.Tensor:
        return torch.stack([(step * y).cos(), (step * y).sin()], 1)

    for step in (0.3, 0.03):  # chord to arc: 2 sin^2(step / 2) off, 2 sin(step / 2) to a neighbour
        assert local_linearity(arc(step), y) == pytest.approx(math.sin(step / 2), rel=1e-6)
    noise = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    assert local_linearity(noise, y) == pytest.approx(math.sqrt(1.5 / 2), abs=0.01)
    assert math.isnan(local_linearity(torch.ones(5, 2), torch.arange(5)))
    equal = torch.tensor([[0.3255, 0.0581]]).repeat(18, 1)  # of which a rounded mean differs
    labels = torch.tensor([2, 4, 4, 2, 3, 2, 3, 2, 2, 4, 4, 4, 2, 2, 1, 2, 4, 2])
    assert math.isnan(local_linearity(equal, labels))
    assert math.isnan(local_linearity(torch.randn(4, 2), torch.tensor([0, 0, 1, 1])))


ONE, TWO = torch.zeros(3), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: regression_metrics(ONE, ONE[:2]), ValueError, "labels has 2 entries but predictions has 3 rows"),
        (lambda: regression_metrics(TWO, ONE), ValueError, r"predictions has shape \(3, 2\) and dtype torch.float32"),
        (lambda: regression_metrics(ONE[:0], ONE[:0]), ValueError, "pass .N,. numbers, at least one"),
        (lambda: regression_metrics(ONE, ONE.bool()), ValueError, "labels has shape .* dtype torch.bool"),
        (lambda: regression_metrics([0.0], ONE), TypeError, "predictions is a list"),
        (lambda: regression_metrics(ONE / 0, ONE), ValueError, "predictions holds NaN or infinity in rows 0, 1, 2"),
        (lambda: shot_metrics(ONE, ONE, ONE, bin_width=0.0), ValueError, "bin_width is 0.0"),
        (lambda: shot_metrics(ONE, ONE, ONE, many=3, few=4), ValueError, "many is 3 but few is 4; pass few <= many"),
        (lambda: shot_metrics(ONE, ONE, ONE[:0]), ValueError, r"train_labels has shape \(0,\)"),
        (lambda: ordinality(TWO[:1], ONE[:1]), ValueError, "embeddings has 1 row; pass at least two"),
        (lambda: ordinality(TWO, ONE, pairs=0), ValueError, "pairs is 0"),
        (lambda: ordinality(TWO, ONE, generator="x"), TypeError, "generator is a str; pass a torch.Generator or None"),
        (lambda: ordinality(TWO, ONE[:2]), ValueError, "labels has 2 entries but embeddings has 3 rows"),
        (lambda: local_linearity(TWO / 0, ONE), ValueError, "embeddings holds NaN or infinity in rows 0, 1, 2"),
        (lambda: local_linearity(TWO, ONE, neighbours=3), ValueError, "neighbours is 3; pass an even number"),
        (lambda: local_linearity(ONE, ONE), ValueError, r"embeddings has shape \(3,\)"),
    ],
)
def test_bad_inputs_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
