"""Classification metrics against slow loops in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.metrics import classification_metrics, mixed_accuracy, mixed_metrics, reliability
from hardmix.metrics.classification import certain
from hardmix.mixing import MixedTarget


def draw_probs(n: int, c: int, seed: int, dtype: torch.dtype = torch.float64, sharp: float = 3.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, c, generator=g, dtype=torch.float64) * sharp).softmax(1).to(dtype)


def draw_labels(n: int, c: int, seed: int) -> torch.Tensor:
    return torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed + 1))


def draw_pairs(n: int, c: int, seed: int) -> torch.Tensor:
    a = draw_labels(n, c, seed)
    step = torch.randint(1, c, (n,), generator=torch.Generator().manual_seed(seed + 2))
    return torch.stack([a, (a + step) % c], 1)


def slow_classification(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    n, c = probs.shape
    top1 = top5 = nll = 0.0
    bins: list[list[tuple[float, float]]] = [[] for _ in range(15)]
    for row, label in zip(probs, labels, strict=True):
        order = sorted(range(c), key=lambda j: -row[j])
        top1 += order[0] == label
        top5 += label in order[:5]
        nll -= math.log(row[label])
        confidence = row[order[0]]
        which = next((b for b in range(15) if confidence < (b + 1) / 15), 14)
        bins[which].append((confidence, float(order[0] == label)))
    ece = 0.0
    for members in bins:
        if members:
            gap = np.mean([m[1] for m in members]) - np.mean([m[0] for m in members])
            ece += len(members) / n * abs(float(gap))
    return {"top1": top1 / n, "top5": top5 / n, "nll": nll / n, "ece": ece}


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 60), c=st.integers(2, 12), seed=st.integers(0, 10_000))
def test_classification_metrics_equal_the_slow_loop(n: int, c: int, seed: int) -> None:
    probs, labels = draw_probs(n, c, seed), draw_labels(n, c, seed)
    want = slow_classification(probs.numpy(), labels.numpy())
    got = classification_metrics(probs, labels)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_classification_metrics_in_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    probs, labels = draw_probs(200, 7, 3, sharp=1.0), draw_labels(200, 7, 3)
    want = slow_classification(probs.numpy(), labels.numpy())
    got = classification_metrics(probs.to(dtype), labels.to(torch.int32))
    for key in ("nll", "ece") if dtype != torch.float32 else want:
        assert got[key] == pytest.approx(want[key], rel=tolerance, abs=tolerance / 10), key


def test_ece_agrees_with_torchmetrics_and_with_the_diagram() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    probs, labels = draw_probs(500, 5, 8, torch.float32), draw_labels(500, 5, 8)
    got = classification_metrics(probs, labels)["ece"]
    theirs = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=15, norm="l1").item()
    assert got == pytest.approx(theirs, abs=1e-6)
    diagram = reliability(probs, labels)
    assert len(diagram["count"]) == len(diagram["accuracy"]) == len(diagram["confidence"]) == 15
    assert sum(diagram["count"]) == 500
    rebuilt = sum(
        n / 500 * abs(a - c)
        for n, a, c in zip(diagram["count"], diagram["accuracy"], diagram["confidence"], strict=True)
        if n
    )
    assert got == pytest.approx(rebuilt, rel=1e-12)


def test_the_last_bin_includes_a_confidence_of_one() -> None:
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.96, 0.04], [0.94, 0.06]])
    diagram = reliability(probs, torch.tensor([0, 1, 0, 0]))
    assert diagram["count"] == [0] * 14 + [4]
    assert diagram["accuracy"] == [None] * 14 + [0.75]
    assert diagram["confidence"][14] == pytest.approx(0.975)
    assert classification_metrics(probs, torch.tensor([0, 1, 0, 0]))["ece"] == pytest.approx(0.225, abs=1e-7)


def test_a_right_class_of_probability_zero_leaves_nll_finite() -> None:
    got = classification_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert got["nll"] == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))
    assert got == {"top1": 0.0, "top5": 1.0, "nll": got["nll"], "ece": 1.0}


def slow_mixed(probs: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    both = top2 = either = 0.0
    for row, (a, b) in zip(probs, pairs, strict=True):
        order = sorted(range(len(row)), key=lambda j: -row[j])[:2]
        both += set(order) == {int(a), int(b)}
        top2 += ((a in order) + (b in order)) / 2
        either += order[0] in (a, b)
    return {"both": both / len(probs), "top2": top2 / len(probs), "either": either / len(probs)}


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 60), c=st.integers(2, 9), seed=st.integers(0, 10_000))
def test_mixed_metrics_equal_the_slow_loop(n: int, c: int, seed: int) -> None:
    probs, pairs = draw_probs(n, c, seed), draw_pairs(n, c, seed)
    got, want = mixed_metrics(probs, pairs), slow_mixed(probs.numpy(), pairs.numpy())
    assert got == pytest.approx(want, rel=1e-12)
    assert mixed_metrics(probs, pairs.flip(1)) == got
    if c == 2:
        assert got == {"both": 1.0, "top2": 1.0, "either": 1.0}


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 30), c=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_mixed_accuracy_equals_the_slow_loop(n: int, c: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(c, (n, k), generator=g)
    weights = torch.rand(n, k, generator=g, dtype=torch.float64).softmax(1)
    want = 0.0
    for i in range(n):
        best = int(np.argmax(logits[i].detach().numpy()))
        want += sum(float(weights[i, j]) for j in range(k) if int(labels[i, j]) == best) / n
    got = mixed_accuracy(logits, MixedTarget(labels, weights))
    assert got.ndim == 0
    assert not got.requires_grad
    assert got.item() == pytest.approx(want, rel=1e-12, abs=1e-15)
    rows = MixedTarget(torch.nn.functional.one_hot(labels, c), weights)
    assert mixed_accuracy(logits, rows).item() == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_mixed_accuracy_of_dense_masks_and_half_types() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0] = 1.0  # the upper row of pixels is class 1
    labels = torch.tensor([[[[1, 0], [0, 0]], [[1, 1], [0, 1]]]])
    weights = torch.tensor([[[[0.25]], [[0.75]]]])
    got = mixed_accuracy(logits.half(), MixedTarget(labels, weights))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx((1.0 + 0.75 + 1.0 + 0.25) / 4)


GOOD = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: classification_metrics(GOOD * 3, torch.tensor([0, 1])), ValueError, "not probabilities"),
        (lambda: classification_metrics(GOOD - 0.5, torch.tensor([0, 1])), ValueError, "pass softmax"),
        (lambda: classification_metrics(GOOD * math.nan, torch.tensor([0, 1])), ValueError, "not probabilities"),
        (
            lambda: classification_metrics(GOOD, torch.tensor([0, 3])),
            ValueError,
            "class 3, but probs has 3 columns",
        ),
        (lambda: reliability(GOOD, torch.tensor([0, -1])), ValueError, "reliability: labels holds the class -1"),
        (
            lambda: classification_metrics(GOOD, torch.tensor([0, 1]), bins=0),
            ValueError,
            "^classification_metrics: bins",
        ),
        (
            lambda: reliability(GOOD, torch.tensor([0, 9]).to(torch.uint16)),
            ValueError,
            "reliability: labels holds the class 9",
        ),
        (lambda: classification_metrics(GOOD, torch.tensor([0])), ValueError, r"labels has shape \(1,\).*2 rows"),
        (lambda: classification_metrics(GOOD, torch.tensor([0.0, 1.0])), TypeError, "pass integer class ids"),
        (lambda: classification_metrics([[0.5, 0.5]], torch.tensor([0])), TypeError, "probs is a list"),
        (lambda: classification_metrics(GOOD.long(), torch.tensor([0, 1])), TypeError, "floating-point"),
        (lambda: classification_metrics(torch.ones(2, 1), torch.tensor([0, 0])), ValueError, "at least two classes"),
        (lambda: classification_metrics(torch.ones(0, 2), torch.zeros(0).long()), ValueError, "is empty"),
        (lambda: reliability(GOOD, torch.tensor([0, 1]), bins=0), ValueError, "bins is 0"),
        (lambda: mixed_metrics(GOOD, torch.tensor([[0, 1], [2, 2]])), ValueError, "one class twice"),
        (lambda: mixed_metrics(GOOD, torch.tensor([0, 1])), ValueError, r"pass shape \(2, 2\)"),
        (
            lambda: mixed_accuracy(GOOD, MixedTarget(torch.zeros(2, 2), torch.ones(2, 2))),
            TypeError,
            "mixed_accuracy: target has labels of dtype torch.float32",
        ),
        (
            lambda: mixed_accuracy(GOOD, MixedTarget(torch.zeros(3, 2).long(), torch.ones(3, 2))),
            ValueError,
            "target has 3 entries but logits has 2 rows",
        ),
        (
            lambda: mixed_accuracy(GOOD, MixedTarget(torch.zeros(2).long(), torch.ones(2, 2))),
            ValueError,
            r"pass \(N, K\) labels",
        ),
        (
            lambda: mixed_accuracy(GOOD, MixedTarget(torch.zeros(2, 2, 5).long(), torch.ones(2, 2))),
            ValueError,
            "5 columns but logits have 3 classes",
        ),
    ],
)
def test_bad_inputs_are_named(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("classes", [2, 3, 5, 6])
def test_what_the_number_of_classes_decides_is_one_for_all_predictions(classes: int) -> None:
    probs, labels = draw_probs(200, classes, 1), draw_labels(200, classes, 2)
    mixed = mixed_metrics(probs, draw_pairs(200, classes, 3))
    measured = classification_metrics(probs, labels) | {f"cutmix_{key}": value for key, value in mixed.items()}
    assert {key for key in measured if certain(key, classes)} == {key for key, v in measured.items() if v == 1.0}
