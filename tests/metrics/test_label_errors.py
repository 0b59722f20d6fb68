"""Errors along the label and principal components, against plain loops, NumPy and scikit-learn in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.metrics import ShotBins, error_by_label, principal_components, shot_bins, shot_errors, shot_metrics


def draw(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = 5 * torch.randn(n, generator=g, dtype=torch.float64) + 20
    return y + 2 * torch.randn(n, generator=g, dtype=torch.float64), y


def ages(count: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers from 0 to 101, most of them in the middle."""
    g = torch.Generator().manual_seed(seed)
    years = (45 + 16 * torch.randn(count, generator=g)).round().clamp(0, 101)
    years[0], years[1] = 0, 101
    return years.double()


# Errors by label


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), m=st.integers(1, 40), bins=st.integers(1, 15), seed=st.integers(0, 999))
def test_errors_equal_the_loop(n, m, bins, seed):
    (p, y), (_, train) = draw(n, seed), draw(m, seed + 1)
    got = error_by_label(p, y, train, bins=bins)
    low, high = min(*y.tolist(), *train.tolist()), max(*y.tolist(), *train.tolist())
    assert got["edges"] == pytest.approx(np.linspace(low, high, bins + 1).tolist() if low < high else got["edges"])
    assert got["edges"] == sorted(set(got["edges"]))
    for b, (left, right) in enumerate(zip(got["edges"], got["edges"][1:], strict=False)):
        inside = [left <= v < right or (b == bins - 1 and v == right) for v in y.tolist()]
        errors = [a - v for a, v, keep in zip(p.tolist(), y.tolist(), inside, strict=True) if keep]
        assert got["test"][b] == len(errors)
        assert got["train"][b] == sum(left <= v < right or (b == bins - 1 and v == right) for v in train.tolist())
        if errors:
            assert got["mae"][b] == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-12)
            assert got["bias"][b] == pytest.approx(sum(errors) / len(errors), rel=1e-9, abs=1e-12)
        else:
            assert got["mae"][b] is None
            assert got["bias"][b] is None
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_bins_cover_both_splits():
    got = error_by_label(torch.tensor([3.0]), torch.tensor([2]), torch.tensor([0, 10, 10]), bins=5)
    assert got == {
        "edges": [0.0, 2.0, 4.0, 6.0, 8.0, 10.0],
        "mae": [None, 1.0, None, None, None],
        "bias": [None, 1.0, None, None, None],
        "test": [0, 1, 0, 0, 0],
        "train": [1, 0, 0, 0, 2],
    }
    assert len(error_by_label(*draw(9, 0), draw(9, 1)[1])["mae"]) == 12


@pytest.mark.parametrize(("label", "edges"), [(4.0, [2.0, 6.0]), (-1e-9, [-1.5e-9, -0.5e-9]), (0.0, [-0.5, 0.5])])
def test_equal_labels_lie_in_the_middle(label, edges):
    same = torch.full((3,), label, dtype=torch.float64)
    got = error_by_label(same + 1, same, same, bins=3)
    assert [got["edges"][0], got["edges"][-1]] == pytest.approx(edges)
    assert got["train"] == got["test"] == [0, 3, 0]


def test_labels_near_the_end_of_float64_are_binned():
    y = torch.tensor([-1e308, 0.0, 1e308], dtype=torch.float64)
    got = error_by_label(y, y, y, bins=3)
    assert got["train"] == [1, 1, 1]
    assert got["mae"] == [0.0, 0.0, 0.0]
    assert got["edges"] == sorted(set(got["edges"]))


# Shots


@pytest.mark.parametrize("unit", [1.0, 12.0, 0.1, 1e-200, 1e200])
@pytest.mark.parametrize("shift", [0.0, 7.25])
def test_ages_have_the_bins_and_bounds_of_the_paper(unit, shift):
    train, (p, y) = ages(12_208), draw(500, 3)
    y = (3 * y).round().clamp(0, 101)
    want = shot_metrics(p, y, train)  # bounds 100 and 20, one bin a year
    scaled = [v * unit + shift * unit for v in (p, y, train)]
    found = shot_bins(scaled[2])
    assert found[2:] == (100, 20)
    assert found.width == pytest.approx(unit)
    got = shot_errors(*scaled)
    assert {k: v / unit for k, v in got.items()} == pytest.approx(want, rel=1e-9, nan_ok=True)
    if unit in (1.0, 0.1):  # where float32 holds them
        assert shot_bins(scaled[2].float()) == pytest.approx(found, rel=1e-5)


def test_small_sets_have_fewer_bins_and_lower_bounds():
    assert shot_bins(ages(400)) == ShotBins(-0.5, 11.0, 33, 7)  # ten bins of eleven years
    assert shot_bins(ages(4080))[1:] == (1.0, 33, 7)
    assert shot_bins(ages(4079))[1] == 2.0
    g = torch.Generator().manual_seed(0)
    for count, bins in ((79, 1), (80, 2), (400, 10), (2000, 50), (50_000, 50)):
        labels = torch.rand(count, generator=g, dtype=torch.float64)
        found = shot_bins(labels)
        span = float(labels.max() - labels.min())
        assert found.start == labels.min()
        assert found.width == pytest.approx(span / bins)
        assert found[2:] == (round(5 / 6 * count / bins), round(count / bins / 6))
        at = ((labels - found.start) / found.width).floor()
        assert at.max() == bins - 1  # the highest label is not left alone


def test_what_is_a_grid():
    tenths = torch.arange(51).repeat(100) / 10  # float32
    assert shot_bins(tenths).width == pytest.approx(0.1)
    both = torch.cat([tenths.double(), tenths.double().mul(10).round() / 10])  # 0.1 in two roundings
    assert shot_bins(both)[:2] == pytest.approx((-0.05, 0.1))
    assert shot_bins(torch.tensor([0, 1]).repeat(50))[:2] == (-0.5, 1.0)
    assert shot_bins(torch.tensor([0.0, 2.0, 3.0]).repeat(60)).width == 1.0
    whole = torch.arange(200).repeat(40)
    assert shot_bins(whole).width == 1.0
    assert shot_bins(torch.cat([whole, torch.tensor([200])])).width == pytest.approx(4.0)  # 50 bins of 201 values
    odd = torch.tensor([0.0, 1.0, 2.5, 3.0, math.pi]).repeat(500)
    assert shot_bins(odd).width == pytest.approx(math.pi / 50)
    dense = torch.arange(1_200_000, dtype=torch.float64)  # all gaps below a millionth of the range
    assert shot_bins(dense).width == pytest.approx(dense[-1].item() / 50)


def test_shots_follow_the_distribution_not_the_size():
    groups = []
    for count in (400, 50_000):
        g = torch.Generator().manual_seed(1)
        train = torch.randn(count, generator=g, dtype=torch.float64)
        y = torch.tensor([0.0, 1.9, 6.0], dtype=torch.float64)
        got = shot_errors(y + torch.tensor([1.0, 2.0, 4.0]), y, train)
        groups.append(list(got.values()))
    for group in groups:
        assert group == pytest.approx([1.0, 2.0, 4.0])


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 30), m=st.integers(1, 200), seed=st.integers(0, 999), width=st.sampled_from([None, 0.5, 3.0]))
def test_shots_equal_the_loop(n, m, seed, width):
    (p, y), (_, train) = draw(n, seed), draw(m, seed + 1)
    start, step, many, few = shot_bins(train, bin_width=width)
    assert 1 <= few <= many
    errors: dict[str, list[float]] = {"mae_many": [], "mae_medium": [], "mae_few": []}
    for a, b in zip(p.tolist(), y.tolist(), strict=True):
        near = sum(math.floor((v - start) / step) == math.floor((b - start) / step) for v in train.tolist())
        errors["mae_many" if near > many else "mae_few" if near < few else "mae_medium"].append(abs(a - b))
    want = {name: sum(values) / len(values) if values else math.nan for name, values in errors.items()}
    assert shot_errors(p, y, train, bin_width=width) == pytest.approx(want, rel=1e-9, nan_ok=True)


def test_labels_far_from_zero_stay_in_their_bins():
    train = 1.6e9 + torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lowest, highest = train.min().view(1), train.max().view(1)
    for label in (lowest, highest):
        got = shot_errors(label + 1, label, train, many=0, few=0)
        assert got["mae_many"] == pytest.approx(1.0)
        inside = ((train - lowest) / shot_bins(train).width).floor()
        own = ((label - lowest) / shot_bins(train).width).floor()
        near = int((inside == own).sum())
        assert math.isnan(shot_errors(label + 1, label, train, many=near, few=near)["mae_many"])
        assert shot_errors(label + 1, label, train, many=near - 1, few=1)["mae_many"] == pytest.approx(1.0)


def test_bins_and_bounds_of_ones_own():
    train, (p, y) = ages(3000), draw(300, 4)
    want = shot_metrics(p, y, train, bin_width=2.0, many=60, few=30)
    assert shot_errors(p, y, train, bin_width=2.0, many=60, few=30) == pytest.approx(want, rel=1e-12, nan_ok=True)
    found = shot_bins(train, bin_width=2.0)
    assert found == ShotBins(-1.0, 2.0, round(5 / 6 * 3000 / 52), round(3000 / 52 / 6))  # -1 to 1, ..., 101 to 103
    assert shot_errors(p, y, train, bin_width=2.0) == pytest.approx(
        shot_metrics(p, y, train, bin_width=2.0, many=found.many, few=found.few), rel=1e-12, nan_ok=True
    )


@pytest.mark.parametrize(("label", "width"), [(0.0, 1.0), (-4.0, 4.0)])
def test_equal_training_labels_make_one_bin(label, width):
    train = torch.full((120,), label)
    assert shot_bins(train) == ShotBins(label - width / 2, width, 100, 20)
    got = shot_errors(torch.zeros(2), torch.tensor([label, label + width]), train)
    assert got == pytest.approx(
        {"mae_many": abs(label), "mae_medium": math.nan, "mae_few": abs(label + width)}, nan_ok=True
    )
    assert shot_bins(torch.tensor([3.0]))[2:] == (1, 1)


# Principal components


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 30), d=st.integers(1, 40), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_components_equal_those_of_the_covariance(n, d, k, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(1, 5, d) + 3
    scores, shares = principal_components(x, components=k)
    assert scores.shape == (n, k)
    assert shares.shape == (k,)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True).reshape(d, d))
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    rank = min(n - 1, d)
    known = min(k, rank)
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    want = (x - x.mean(0)).numpy() @ vectors
    np.testing.assert_allclose(scores[:, :known].numpy(), want[:, :known], atol=1e-7)
    np.testing.assert_allclose(
        shares[:known].numpy(), (values / np.cov(x.numpy().T, bias=True).trace())[:known] if d > 1 else [1.0], atol=1e-9
    )
    assert not scores[:, rank:].any()
    assert not shares[rank:].any()


def test_a_rounded_mean_adds_no_component():
    scores, shares = principal_components(torch.tensor([[2.2944, 6.3706], [2.4546, 7.5536]], dtype=torch.float64))
    assert not scores[:, 1].any()
    assert shares.tolist() == [1.0, 0.0]


def test_signs_do_not_hang_on_rounding():
    line = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    for direction in ([1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [1 - 1e-13, -1.0], [-1.0, 1 + 1e-13]):
        scores, _ = principal_components(line * torch.tensor(direction, dtype=torch.float64), components=1)
        assert scores[-1, 0] * direction[0] > 0  # the first of equally large loadings is positive
    scores, _ = principal_components(line * torch.tensor([1.0, -2.0], dtype=torch.float64), components=1)
    assert scores[-1, 0] < 0


def test_components_without_variance_are_zero():
    for x in (torch.randn(1, 5), torch.full((4, 3), 0.1), torch.full((3, 2), 7, dtype=torch.uint8)):
        scores, shares = principal_components(x)
        assert scores.shape == (len(x), 2)
        assert not scores.any()
        assert not shares.any()
    x = torch.arange(6.0)[:, None] * torch.tensor([1.0, 3.0, 0.5])
    scores, shares = principal_components(x)
    assert shares.tolist() == [1.0, 0.0]
    assert not scores[:, 1].any()
    assert scores[:, 0].diff().numpy() == pytest.approx([math.hypot(1, 3, 0.5)] * 5)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e200, 1e307])
def test_components_of_tiny_and_huge_features(scale):
    x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [8.0, 2.0]], dtype=torch.float64)
    want, shares = principal_components(x)
    got, same = principal_components(x * scale)
    assert same.numpy() == pytest.approx(shares.numpy(), rel=1e-3)
    assert (got / scale).numpy() == pytest.approx(want.numpy(), rel=1e-3, abs=1e-3)


ONE, TWO = torch.zeros(3), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: error_by_label(ONE, ONE[:2], ONE), ValueError, "error_by_label: labels has 2 entries but predictions"),
        (lambda: error_by_label(ONE, ONE, ONE[:0]), ValueError, r"train_labels has shape \(0,\)"),
        (lambda: error_by_label(ONE, ONE / 0, ONE), ValueError, "labels holds NaN or infinity in rows 0, 1, 2"),
        (lambda: error_by_label(ONE, ONE, ONE, bins=0), ValueError, "bins is 0; pass an integer of at least 1"),
        (lambda: error_by_label([0.0], ONE, ONE), TypeError, "predictions is a list"),
        (lambda: shot_errors(ONE / 0, ONE, ONE), ValueError, "shot_errors: predictions holds NaN or infinity"),
        (lambda: shot_errors(ONE, ONE, ONE / 0), ValueError, "shot_errors: train_labels holds NaN or infinity"),
        (lambda: shot_errors(ONE, TWO, ONE), ValueError, r"shot_errors: labels has shape \(3, 2\)"),
        (lambda: shot_errors(ONE, ONE, ONE, many=3, few=4), ValueError, "shot_errors: many is 3 but few is 4"),
        (lambda: shot_errors(ONE, ONE, ONE, few=9), ValueError, "many is 2 but few is 9; pass few <= many"),
        (lambda: shot_errors(ONE, ONE, ONE, many=1.5), ValueError, "many is 1.5; pass an integer"),
        (lambda: shot_bins(ONE, bin_width=0.0), ValueError, "shot_bins: bin_width is 0.0"),
        (lambda: shot_errors(ONE, ONE, ONE, bin_width=0.0), ValueError, "shot_errors: bin_width is 0.0"),
        (
            lambda: shot_bins(torch.arange(9), bin_width=1e-310),
            ValueError,
            "bin_width is 1e-310 but the labels' range is",
        ),
        (lambda: shot_bins(ONE[:0]), ValueError, r"train_labels has shape \(0,\)"),
        (
            lambda: shot_bins(torch.tensor([-1e308, 1e308], dtype=torch.float64)),
            ValueError,
            "range of inf; pass labels in a usual",
        ),
        (
            lambda: shot_bins(torch.tensor([0, 5e-324], dtype=torch.float64)),
            ValueError,
            "train_labels has a range of 4.94066e-324",
        ),
        (lambda: principal_components(ONE), ValueError, r"features has shape \(3,\)"),
        (lambda: principal_components(TWO[:, :0]), ValueError, "is empty; pass at least one sample"),
        (lambda: principal_components(TWO / 0), ValueError, "features holds NaN or infinity in rows 0, 1, 2"),
        (lambda: principal_components(TWO, components=0), ValueError, "components is 0"),
    ],
)
def test_bad_inputs_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
