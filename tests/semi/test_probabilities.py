"""The pure functions on probabilities against slow readings in float64, and at the extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hardmix.semi import probabilities as P
from tests.semi.cases import rng, softmax

TEMPERATURES = [1e-3, 0.1, 0.5, 1.0, 2.0, 1e3]


def rows(seed: int = 0, n: int = 40, classes: int = 5, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(n, classes, generator=rng(seed), dtype=torch.float64) * spread).softmax(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_are_wide_and_without_a_gradient(dtype: torch.dtype) -> None:
    logits = (torch.randn(7, 3, generator=rng()) * 5).to(dtype).requires_grad_()
    probs = P.probabilities(logits)
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not probs.requires_grad
    np.testing.assert_allclose(probs.numpy(), softmax(logits.detach().double().numpy()), rtol=2e-6)


def test_confidence_takes_the_first_of_equal_classes() -> None:
    probs = torch.tensor([[0.2, 0.4, 0.4], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    highest, classes = P.confidence(probs)
    assert highest.tolist() == pytest.approx([0.4, 1.0, 1 / 3])
    assert classes.tolist() == [1, 0, 0]


def test_a_mask_includes_its_threshold() -> None:
    confidence = torch.tensor([0.94, 0.95, 1.0], dtype=torch.float64)
    assert P.confidence_mask(confidence, 0.95).tolist() == [0.0, 1.0, 1.0]
    assert P.confidence_mask(confidence, 1.0).tolist() == [0.0, 0.0, 1.0]
    each = torch.tensor([0.9, 0.99, 0.0], dtype=torch.float64)
    assert P.confidence_mask(confidence, each).tolist() == [1.0, 0.0, 1.0]
    assert P.confidence_mask(confidence, 0.5).dtype == torch.float64
    assert P.confidence_mask(torch.tensor([math.nan, 0.5]), 0.9).isnan().tolist() == [True, False]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sharpen(temperature: float) -> None:
    p = rows()
    want = []
    for row in p.numpy():
        logs = [math.log(v) / temperature for v in row]
        top = max(logs)
        total = sum(math.exp(v - top) for v in logs)
        want.append([math.exp(v - top) / total for v in logs])
    np.testing.assert_allclose(P.sharpen(p, temperature).numpy(), want, rtol=1e-9, atol=1e-300)
    if 0.1 <= temperature <= 2.0:  # the power itself
        power = p ** (1 / temperature)
        torch.testing.assert_close(P.sharpen(p, temperature), power / power.sum(1, keepdim=True))
    single = P.sharpen(p.float(), temperature)
    assert single.dtype == torch.float32
    assert torch.allclose(single.sum(1), torch.ones(40))
    np.testing.assert_allclose(single.numpy(), want, atol=2e-5 / min(1.0, temperature))


def test_sharpen_at_the_edges() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1e-38, 1.0, 1e-45], [1 / 3, 1 / 3, 1 / 3]])
    for temperature in TEMPERATURES:
        got = P.sharpen(p, temperature)
        assert bool(got.isfinite().all())
        assert got[0].tolist() == [1.0, 0.0, 0.0]
        assert got[1].tolist() == [0.5, 0.5, 0.0]
        assert got[3].tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(P.sharpen(p, 1.0), p)
    assert P.sharpen(torch.tensor([[0.6, 0.4]]), 1e-30).tolist() == [[1.0, 0.0]]
    assert P.sharpen(p.half(), 0.5).dtype == torch.float32
    with pytest.raises(ValueError, match=r"sharpen: temperature is 0; pass a finite number greater than 0\."):
        P.sharpen(p, 0)


def test_align_distribution() -> None:
    p = rows(1)
    predicted = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    wanted = torch.tensor([0.2, 0.2, 0.0, 0.5, 0.1], dtype=torch.float64)
    got = P.align_distribution(p, predicted, wanted)
    for row, source in zip(got.tolist(), p.tolist(), strict=True):
        parts = [v * w / m for v, w, m in zip(source, wanted.tolist(), predicted.tolist(), strict=True)]
        assert row == pytest.approx([part / sum(parts) for part in parts], rel=1e-12)
    # nothing to align
    torch.testing.assert_close(P.align_distribution(p, wanted, wanted)[:, 0] / p[:, 0], 1 / (1 - p[:, 2]))
    torch.testing.assert_close(P.align_distribution(p, predicted, predicted), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_align_distribution_at_the_edges(dtype: torch.dtype) -> None:
    uniform = torch.full((3,), 1 / 3)
    p = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype)
    # a class that was never predicted takes all that has a bit of it
    got = P.align_distribution(p, torch.tensor([0.0, 0.5, 0.5]), uniform)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got.sum(1), torch.ones(3, dtype=dtype))
    assert got[:, 0].tolist() == pytest.approx([1.0, 1.0, 0.0])
    # classes that are not wanted go, and a row that has no other stays as it was
    got = P.align_distribution(p, uniform, torch.tensor([0.0, 0.5, 0.5]))
    assert got[0].tolist() == pytest.approx([0.0, 0.375, 0.625])
    assert got[1].tolist() == [1.0, 0.0, 0.0]
    for predicted in (torch.zeros(3), torch.full((3,), 1e-38), torch.ones(3)):
        got = P.align_distribution(p, predicted, uniform)
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got.sum(1), torch.ones(3, dtype=dtype))
    assert P.align_distribution(p.half(), uniform, uniform).dtype == torch.float32


def test_moving_average() -> None:
    average, value = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -2.0], dtype=torch.float64)
    got = P.moving_average(average, value, 0.9)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([0.55, 1.6])
    assert P.moving_average(average, value, 1.0).tolist() == [0.5, 2.0]
    assert P.moving_average(average, value, 0.0).tolist() == [1.0, -2.0]


def test_class_mean() -> None:
    assert P.class_mean(torch.tensor([0, 2, 2, 1]), 4).tolist() == [0.25, 0.25, 0.5, 0.0]


@pytest.mark.parametrize("width", [1.0, 2.0, 3.0])
def test_truncated_gaussian(width: float) -> None:
    confidence = torch.linspace(0.1, 1.0, 19, dtype=torch.float64)
    mean, variance = torch.tensor(0.6), torch.tensor(0.02)
    got = P.truncated_gaussian(confidence, mean, variance, width)
    for c, weight in zip(confidence.tolist(), got.tolist(), strict=True):
        below = min(0.0, c - mean.item())
        assert weight == pytest.approx(math.exp(-(below**2) / (2 * variance.item() / width**2)), rel=1e-6)
    assert got[confidence > 0.61].tolist() == [1.0] * 8
    each = P.truncated_gaussian(confidence, mean.expand(19), variance.expand(19), width)
    assert torch.equal(each, got)


def test_truncated_gaussian_without_variance_is_a_threshold() -> None:
    confidence = torch.tensor([0.0, 0.4999, 0.5, 0.9, 1.0])
    for variance in (0.0, 1e-38):
        got = P.truncated_gaussian(confidence, torch.tensor(0.5), torch.tensor(variance))
        assert got.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
        # equal confidences that miss their mean by a rounding still count
        equal = torch.full((3,), 0.7)
        assert bool((P.truncated_gaussian(equal, torch.tensor(0.7 + 6e-8), torch.tensor(variance)) > 0.9).all())


def test_convex_map() -> None:
    x = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    got = P.convex_map(x)
    assert got.tolist() == pytest.approx([v / (2 - v) for v in x.tolist()])
    assert (got[0], got[-1]) == (0.0, 1.0)
    assert bool((got.diff() > 0).all())
    assert bool((got.diff().diff() > 0).all())


def test_signal_annealing() -> None:
    for classes in (2, 10, 1000):
        first = 1 / classes
        for progress in (0.0, 0.2, 0.5, 1.0):
            share = {
                "linear": progress,
                "log": 1 - math.exp(-5 * progress),
                "exp": math.exp(5 * (progress - 1)),
            }
            for schedule, a in share.items():
                got = P.signal_annealing(progress, classes, schedule)
                assert got == pytest.approx(a * (1 - first) + first)
                assert first <= got <= 1.0
            assert P.signal_annealing(progress, classes, "none") == 1.0
    middle = [P.signal_annealing(0.5, 10, name) for name in ("exp", "linear", "log")]
    assert middle == sorted(middle)
    with pytest.raises(
        ValueError, match=r"signal_annealing: schedule is 'cosine'; pass one of 'none', 'linear', 'log'"
    ):
        P.signal_annealing(0.5, 10, "cosine")


def test_ramps() -> None:
    for ramp in (P.linear_ramp, P.cosine_ramp, P.sigmoid_ramp):
        for length in (0.1, 0.4, 1.0):
            values = [ramp(step / 40, length) for step in range(41)]
            assert values == sorted(values)
            assert all(v == 1.0 for step, v in enumerate(values) if step / 40 >= length)
            assert all(v < 1.0 for step, v in enumerate(values) if step / 40 < length)
        assert ramp(0.0, 0.0) == ramp(1.0, 0.0) == ramp(1.0, 1.0) == 1.0
    assert P.linear_ramp(0.1, 0.4) == pytest.approx(0.25)
    assert P.cosine_ramp(0.1, 0.4) == pytest.approx(0.5 * (1 - math.cos(math.pi / 4)))
    assert P.sigmoid_ramp(0.1, 0.4) == pytest.approx(math.exp(-5 * 0.75**2))
    assert P.linear_ramp(0.0, 0.4) == P.cosine_ramp(0.0, 0.4) == 0.0
    assert P.sigmoid_ramp(0.0, 0.4) == pytest.approx(math.exp(-5))


@pytest.mark.parametrize("value", [1e-6, 0.5, 1, 1.0])
def test_thresholds(value: float) -> None:
    got = P.threshold_value("FixMatch", "threshold", value)
    assert isinstance(got, float)
    assert got == value


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.1, math.nan, math.inf, "0.5", None, True])
def test_what_is_no_threshold(value: object) -> None:
    error = TypeError if value is None or value is True else ValueError
    with pytest.raises(
        error, match=r"FixMatch: threshold is .*; pass a number (from 0 to 1\.|above 0 and at most 1, )"
    ):
        P.threshold_value("FixMatch", "threshold", value)
