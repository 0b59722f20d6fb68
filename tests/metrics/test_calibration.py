"""Equal-mass calibration error and temperature scaling against numpy loops, a grid, and models of known temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.metrics import adaptive_calibration_error, calibration_metrics, fit_temperature, reliability


def draw(n: int, classes: int, seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from their softmax: a model that is calibrated by construction."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]


def slow_adaptive(probs: np.ndarray, labels: np.ndarray, bins: int) -> float:
    confidence, n = probs.max(1), len(labels)
    members: dict[int, list[int]] = {}
    for i in range(n):
        rank = sum(1 for j in range(n) if confidence[j] < confidence[i])
        members.setdefault(math.floor(bins * rank / n), []).append(i)
    total = 0.0
    for rows in members.values():
        right = sum(float(probs[i].argmax() == labels[i]) for i in rows) / len(rows)
        total += len(rows) / n * abs(right - sum(confidence[i] for i in rows) / len(rows))
    return total


def slow_nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    total = 0.0
    for row, label in zip(logits / temperature, labels, strict=True):
        top = row.max()
        total += top + math.log(sum(math.exp(v - top) for v in row)) - row[label]
    return total / len(labels)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 60), classes=st.integers(2, 6), bins=st.integers(1, 20), seed=st.integers(0, 999))
def test_adaptive_error_equals_the_loop(n, classes, bins, seed):
    logits, labels = draw(n, classes, seed)
    if seed % 3 == 0:  # ties
        logits = logits.round()
    probs = logits.softmax(1)
    want = slow_adaptive(probs.numpy(), labels.numpy(), bins)
    assert adaptive_calibration_error(probs, labels, bins=bins) == pytest.approx(want, abs=1e-12)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    again = adaptive_calibration_error(probs[shuffled], labels[shuffled], bins=bins)
    assert again == pytest.approx(want, abs=1e-12)


def test_bins_hold_equal_counts_where_equal_width_ones_do_not():
    logits, labels = draw(3000, 10, 0, scale=4.0)
    probs = logits.softmax(1)
    confidence = probs.max(1).values
    rank = (confidence[:, None] > confidence).sum(1)
    assert torch.bincount(rank * 15 // 3000).tolist() == [200] * 15
    assert max(reliability(probs, labels)["count"]) > 400
    # One bin leaves |accuracy - mean confidence|, whatever the bins are made of.
    gap = abs((probs.argmax(1) == labels).double().mean() - confidence.mean()).item()
    assert adaptive_calibration_error(probs, labels, bins=1) == pytest.approx(gap, abs=1e-12)


def test_constant_confidence_has_the_gap_as_its_error():
    probs = torch.tensor([[0.7, 0.2, 0.1]]).repeat(40, 1).double()
    labels = torch.tensor([0] * 10 + [1] * 30)
    assert adaptive_calibration_error(probs, labels) == pytest.approx(0.45)
    assert calibration_metrics(probs.log(), labels)["ece"] == pytest.approx(0.45)
    assert calibration_metrics(probs.log(), labels)["adaptive_ece"] == pytest.approx(0.45)


@settings(deadline=None, max_examples=25)
@given(temperature=st.floats(0.2, 8.0), classes=st.integers(2, 8), seed=st.integers(0, 99))
def test_a_known_temperature_is_recovered(temperature, classes, seed):
    logits, labels = draw(4000, classes, seed)
    base = fit_temperature(logits, labels)
    assert base == pytest.approx(1.0, abs=0.15)
    # Scaling the logits scales the fitted temperature exactly.
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature * base, rel=1e-9)


def test_fit_is_the_minimum_of_the_likelihood():
    logits, labels = draw(200, 5, 3)
    logits = logits * 3 + 7.0  # too sure; a shift of all logits changes nothing
    fitted = fit_temperature(logits, labels)
    values, rows = logits.numpy(), labels.numpy()
    best = slow_nll(values, rows, fitted)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert slow_nll(values, rows, fitted * factor) > best
    grid = np.geomspace(0.05, 50, 2001)
    nearest = grid[np.argmin([slow_nll(values[:50], rows[:50], t) for t in grid])]
    assert fit_temperature(logits[:50], labels[:50]) == pytest.approx(nearest, rel=4e-3)


def test_scaling_mends_an_overconfident_model_and_keeps_its_accuracy():
    (fit, fit_labels), (test, test_labels) = draw(12_000, 10, 1), draw(12_000, 10, 2)
    temperature = fit_temperature(3.0 * fit, fit_labels)
    before = calibration_metrics(3.0 * test, test_labels)
    after = calibration_metrics(3.0 * test, test_labels, temperature)
    assert temperature == pytest.approx(3.0, rel=0.1)
    for key in ("nll", "ece", "adaptive_ece"):
        assert after[key] < before[key]
    assert after["ece"] < 0.03 < before["ece"]
    assert sum(after["reliability"]["count"]) == sum(before["reliability"]["count"]) == 12_000
    assert before["nll"] == pytest.approx(slow_nll(3.0 * test.numpy(), test_labels.numpy(), 1.0), rel=1e-10)
    assert after["nll"] == pytest.approx(slow_nll(3.0 * test.numpy(), test_labels.numpy(), temperature), rel=1e-10)


def test_temperature_at_its_edges():
    labels = torch.tensor([0, 1, 2])
    right = torch.eye(3)
    assert fit_temperature(right, labels) == 0.01  # nothing wrong: ever colder
    assert fit_temperature(-right, labels) == 100.0  # nothing right: ever hotter
    assert fit_temperature(torch.zeros(3, 3), labels) == 1.0
    assert fit_temperature(torch.full((3, 3), 5.0), labels) == 1.0
    huge = torch.tensor([[3e4, 0.0], [3e4, 0.0], [0.0, 3e4]])
    assert math.isfinite(fit_temperature(huge, torch.tensor([0, 1, 1])))
    assert fit_temperature(1e6 * right, labels) == 0.01  # even at the hottest nothing is left to gain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_agree(dtype):
    logits, labels = draw(500, 4, 5)
    exact = logits.to(dtype).double()
    assert fit_temperature(exact.to(dtype), labels) == pytest.approx(fit_temperature(exact, labels), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: fit_temperature(torch.zeros(3, 1), torch.zeros(3).long()), ValueError, "logits has 1 column"),
        (lambda: fit_temperature(torch.full((2, 2), math.nan), torch.zeros(2).long()), ValueError, "NaN or infinity"),
        (lambda: fit_temperature(torch.zeros(3, 2), torch.zeros(2).long()), ValueError, "labels has 2 entries"),
        (lambda: fit_temperature(torch.zeros(2, 2), torch.tensor([0, 2])), ValueError, "holds the class 2"),
        (lambda: fit_temperature(torch.zeros(2, 2), torch.zeros(2)), ValueError, "pass .N,. integer class ids"),
        (lambda: calibration_metrics(torch.zeros(2, 2), torch.zeros(2).long(), 0.0), ValueError, "temperature is 0.0"),
        (
            lambda: calibration_metrics(torch.zeros(2, 2), torch.zeros(2).long(), bins=10**30),
            ValueError,
            "^calibration_metrics: bins is an integer beyond 64 bits; pass an integer of at least 1",
        ),
        (lambda: adaptive_calibration_error(torch.ones(2, 2), torch.zeros(2).long()), ValueError, "not probabilities"),
        (lambda: adaptive_calibration_error(torch.eye(2), torch.zeros(2).long(), bins=0), ValueError, "bins is 0"),
        (lambda: fit_temperature([[0.0]], torch.zeros(1)), TypeError, "logits is a list"),
    ],
)
def test_bad_inputs_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
