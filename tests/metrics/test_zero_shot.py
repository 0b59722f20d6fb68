"""Zero-shot and few-shot classification against loops in NumPy; probes against their own optimality condition."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hardmix.metrics.zero_shot as module
from hardmix.metrics import classification_metrics
from hardmix.metrics.zero_shot import class_features, few_shot_metrics, zero_shot_metrics


def rows(x: Tensor) -> np.ndarray:
    v = x.double().numpy()
    return np.stack([row / math.sqrt(float(row @ row)) for row in v])


def slow_zero_shot(image: Tensor, text: Tensor, labels: list[int], scale: float) -> dict[str, float]:
    x, t = rows(image), rows(text)
    ranks, nll, binned = [], 0.0, {}
    for row, label in zip(x, labels, strict=True):
        cosines = [float(row @ c) for c in t]
        ranks.append(sum(c >= cosines[label] for c in cosines))
        weights = [math.exp(scale * (c - max(cosines))) for c in cosines]
        probs = [w / sum(weights) for w in weights]
        nll -= math.log(probs[label])
        sure = max(probs)
        binned.setdefault(math.ceil(10 * sure), []).append(sure - (probs.index(sure) == label))
    recalls = []
    for c in set(labels):
        own = [r for r, label in zip(ranks, labels, strict=True) if label == c]
        recalls.append(sum(r == 1 for r in own) / len(own))
    n = len(labels)
    return {
        "top1": sum(r <= 1 for r in ranks) / n,
        "top5": sum(r <= 5 for r in ranks) / n,
        "class_recall": sum(recalls) / len(recalls),
        "nll": nll / n,
        "ece": sum(abs(sum(gaps)) for gaps in binned.values()) / n,
        "majority": max(labels.count(c) for c in labels) / n,
    }


def made(seed: int, n: int, classes: int, d: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    return text[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64), text, labels


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 30),
    classes=st.integers(1, 9),
    scale=st.sampled_from([0.5, 5.0, 100.0]),
)
def test_zero_shot_is_what_the_loop_finds(seed: int, n: int, classes: int, scale: float) -> None:
    x, text, labels = made(seed, n, classes)
    found = zero_shot_metrics(x * 9, text * 1e-3, labels, torch.tensor(scale))
    expected = slow_zero_shot(x, text, labels.tolist(), scale)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-11, abs=1e-11), key
        assert type(found[key]) is float
    assert all(0.0 <= found[key] <= 1.0 for key in found if key != "nll")


def test_zero_shot_is_classification_with_the_probabilities() -> None:
    x, text, labels = made(0, 300, 20)
    found = zero_shot_metrics(x, text, labels, 7.0)
    probs = (7.0 * torch.from_numpy(rows(x) @ rows(text).T)).softmax(1)
    expected = classification_metrics(probs, labels, bins=10)
    assert {key: found[key] for key in expected} == {key: pytest.approx(v) for key, v in expected.items()}


def test_rare_classes_count_as_much_and_absent_ones_not_at_all() -> None:
    text = torch.eye(4)
    found = zero_shot_metrics(text[[0, 0, 0, 1, 2]], text, torch.tensor([0, 0, 0, 2, 2]), 10.0)
    assert found["top1"] == pytest.approx(0.8)
    assert found["class_recall"] == 0.75
    assert found["majority"] == 0.6
    assert found["top5"] == 1.0


def test_equal_features_recognise_nothing() -> None:
    found = zero_shot_metrics(torch.ones(8, 3), torch.ones(8, 3), torch.arange(8), 50.0)
    assert (found["top1"], found["top5"], found["class_recall"]) == (0.0, 0.0, 0.0)
    assert found["nll"] == pytest.approx(math.log(8))
    assert found["ece"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    x = (torch.eye(6) + 0.25).to(dtype).requires_grad_()
    found = zero_shot_metrics(x * torch.finfo(dtype).max ** 0.5, x.double(), torch.arange(6).int(), 1e4)
    assert found["top1"] == 1.0
    assert math.isfinite(found["nll"])
    few = few_shot_metrics(x, torch.arange(6), {"x": (x, torch.arange(6).short())}, ks=(1,), draws=1)
    assert few["x"][1]["accuracy"] == 1.0
    prompts = class_features(x[:, None])
    assert prompts.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not prompts.requires_grad


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), classes=st.integers(1, 5), prompts=st.integers(1, 4))
def test_class_features_are_unit_means_of_unit_rows(seed: int, classes: int, prompts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(classes, prompts, 7, generator=generator, dtype=torch.float64)
    x = x * torch.rand(classes, prompts, 1, generator=generator, dtype=torch.float64).add(0.1)
    found = class_features(x)
    for c in range(classes):
        mean = rows(x[c]).mean(0)
        assert np.allclose(found[c].numpy(), mean / np.linalg.norm(mean), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, class_features(list(x)))
    assert torch.equal(found, class_features(tuple(x * 4.0)))


def test_numbers_of_prompts_and_dtypes_may_differ() -> None:
    found = class_features([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]], dtype=torch.float64)])
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]]).double())


def few(seed: int, **more: object) -> dict[str, dict[int, dict[str, float]]]:
    """Ten samples of class 5, three of 8 and one of 2; two tests."""
    labels = torch.tensor([5] * 10 + [8] * 3 + [2])
    generator = torch.Generator().manual_seed(100)
    centres = torch.randn(9, 12, generator=generator)
    x = centres[labels] + 1.2 * torch.randn(14, 12, generator=generator)
    asked = torch.tensor([2, 5, 8]).repeat(40)
    tests = {
        "near": (centres[asked] + torch.randn(120, 12, generator=generator), asked),
        "far": (centres[asked] + 4 * torch.randn(120, 12, generator=generator), asked),
    }
    return few_shot_metrics(x, labels, tests, generator=torch.Generator().manual_seed(seed), **more)  # type: ignore[arg-type]


def test_shots_tests_and_draws() -> None:
    found = few(0)
    assert list(found) == ["near", "far"]
    assert list(found["near"]) == [1, 2, 4, 8, 16]
    assert [found["far"][k]["short"] for k in found["far"]] == [0, 1, 2, 2, 3]
    assert found["near"][16]["std"] == 0.0 < found["near"][1]["std"]  # every draw has all samples
    assert found["near"][4]["accuracy"] > found["far"][4]["accuracy"]
    assert found == few(0)
    assert found != few(1)


def test_other_shots_and_tests_do_not_change_the_draws() -> None:
    found, fewer = few(3), few(3, ks=(4, 1, 4))
    assert list(fewer["near"]) == [4, 1]
    assert all(fewer[name][k] == found[name][k] for name in fewer for k in (1, 4))
    once = few(3, draws=1, ks=(2,))["near"][2]
    assert once["std"] == 0.0
    assert 120 * once["accuracy"] == pytest.approx(round(120 * once["accuracy"]))


class Fits:
    """What the probe is fitted to, in place of the fit."""

    def __init__(self, who: str, features: Tensor, labels: Tensor) -> None:
        self.seen = (features, labels)
        FITS.append(self.seen)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        return len(self.seen[1]) / 100


FITS: list[tuple[Tensor, Tensor]] = []


def test_shots_are_drawn_evenly_class_by_class_and_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_Probe", Fits)
    FITS.clear()
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 7])
    x = torch.eye(7)
    draws = 600
    found = few_shot_metrics(x, labels, {"t": (x, labels)}, ks=(1, 3), draws=draws,
                             generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert len(FITS) == 2 * draws
    times = torch.zeros(7)
    for one, three in zip(FITS[::2], FITS[1::2], strict=True):
        assert one[1].bincount().tolist() == [1, 1, 0, 0, 0, 0, 0, 1]
        assert three[1].bincount().tolist() == [2, 3, 0, 0, 0, 0, 0, 1]
        samples = [set(features.argmax(1).tolist()) for features, _ in (one, three)]
        assert samples[0] < samples[1]
        for features, drawn in (one, three):
            assert torch.equal(labels[features.argmax(1)], drawn)
        times += one[0].sum(0)
    spread = 4 * math.sqrt(draws * 0.25)
    assert (times[labels == 1] - draws / 4).abs().max() < spread
    assert (times[labels == 0] - draws / 2).abs().max() < spread
    assert found["t"][1] == {"accuracy": pytest.approx(0.03), "std": 0.0, "short": 0}


def test_mean_and_deviation_are_over_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.7, 0.9])

    class Known(Fits):
        def accuracy(self, features: Tensor, labels: Tensor) -> float:
            return next(values)

    monkeypatch.setattr(module, "_Probe", Known)
    x, y = torch.eye(2), torch.arange(2)
    found = few_shot_metrics(x, y, {"t": (x, y)}, ks=(1,), draws=3)["t"][1]
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["std"] == pytest.approx(math.sqrt(2 / 3) * 0.2)


def test_the_probe_is_where_the_loss_is_least() -> None:
    """The gradient of |W|^2 / 2 + C sum_i -log p_i[y_i] is zero at the fitted weights and bias."""
    x, _, labels = made(5, 60, 4)
    x = torch.from_numpy(rows(x))
    model = module._Probe("test", x, labels).model
    w = torch.tensor(model.coef_, requires_grad=True)
    b = torch.tensor(model.intercept_, requires_grad=True)
    loss = w.square().sum() / 2 + 10.0 * torch.nn.functional.cross_entropy(x @ w.T + b, labels, reduction="sum")
    loss.backward()
    assert w.grad is not None
    assert b.grad is not None
    assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-3 * 10 * 60 / 4
    accuracy = module._Probe("test", x, labels).accuracy(x, labels)
    assert accuracy == ((x @ w.T + b).argmax(1) == labels).double().mean().item()


def test_many_classes_with_one_sample_each_and_hard_cases_warn_of_nothing() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30)
    assert few_shot_metrics(x, y, {"x": (x, y)}, ks=(1,), draws=1)["x"][1]["accuracy"] == 1.0
    same = few_shot_metrics(torch.ones(30, 8), y, {"x": (x, y)}, ks=(1,), draws=1)["x"][1]
    assert same["accuracy"] <= 1 / 30 + 1e-12
    two = few_shot_metrics(x * 1e-20, y % 2, {"x": (x * 1e20, y % 2)}, ks=(16,))["x"][16]
    assert two["accuracy"] > 0.5


def test_length_says_nothing_and_inputs_are_left_alone() -> None:
    x, _, labels = made(6, 40, 3)
    before = x.clone(), labels.clone()
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(0)).double() + 0.5
    call = [few_shot_metrics(v, labels, {"x": (v, labels)}, generator=torch.Generator().manual_seed(1))
            for v in (x, x * lengths)]  # fmt: skip
    for k in (1, 2, 4, 8, 16):
        assert call[0]["x"][k]["accuracy"] == pytest.approx(call[1]["x"][k]["accuracy"], abs=0.03)
    assert torch.equal(x, before[0])
    assert torch.equal(labels, before[1])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'^few_shot_metrics: scikit-learn is not installed; pip install "hardmix\['):
        few_shot_metrics(X, Y, {"x": (X, Y)})


X, Y = torch.eye(3), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: zero_shot_metrics(X, torch.ones(3, 2), Y, 1.0), ValueError, "class_features has 2 columns but image"),
        (lambda: zero_shot_metrics(X, X, Y[:2], 1.0), ValueError, "labels has 2 entries but image_features has 3 rows"),
        (
            lambda: zero_shot_metrics(X, X, Y.float(), 1.0),
            TypeError,
            r"labels has shape \(3,\) and dtype torch.float32",
        ),
        (
            lambda: zero_shot_metrics(X, X, Y[None], 1.0),
            TypeError,
            r"labels has shape \(1, 3\) and dtype torch.int64; p",
        ),
        (lambda: zero_shot_metrics(X, X, [0], 1.0), TypeError, "labels is a list; pass a torch.Tensor"),
        (lambda: zero_shot_metrics(X, X, Y + 1, 1.0), ValueError, "labels holds the class 3, but there are 3 classes"),
        (lambda: zero_shot_metrics(X, X, Y - 1, 1.0), ValueError, "labels holds the class -1, but there are 3 classes"),
        (lambda: zero_shot_metrics(X, X, Y, -1.0), ValueError, "logit_scale is -1.0; pass a finite number greater"),
        (lambda: zero_shot_metrics(X[0], X, Y, 1.0), ValueError, r"image_features has shape \(3,\); pass a batch with"),
        (
            lambda: zero_shot_metrics(X, X * math.nan, Y, 1.0),
            ValueError,
            "class_features holds NaN, infinity or nothing",
        ),
        (lambda: zero_shot_metrics(X, X.long(), Y, 1.0), TypeError, "class_features has dtype torch.int64; pass floa"),
    ],
)
def test_bad_arguments_of_zero_shot(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^zero_shot_metrics: {message}"):
        call()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (X, ValueError, r"prompt_features has shape \(3, 3\); pass a batch with 3 axes"),
        (X[None, :0], ValueError, r"prompt_features has shape \(1, 0, 3\) and is empty"),
        ([], ValueError, "prompt_features is empty; pass at least one class"),
        ("abc", TypeError, r"prompt_features is a str; pass a tensor \(C, P, D\), or a list of \(P, D\) tensors"),
        (None, TypeError, "prompt_features is a NoneType; pass a tensor"),
        ([X, X[:0]], ValueError, r"prompt_features\[1\] has shape \(0, 3\) and is empty; pass at least one sample"),
        ([X, [1.0]], TypeError, r"prompt_features\[1\] is a list; pass a torch.Tensor"),
        (
            [X, X[:, :2] + 1],
            ValueError,
            r"prompt_features\[1\] has 2 columns but prompt_features\[0\] has 3; pass feat",
        ),
        ([X, X * 0], ValueError, r"prompt_features\[1\] holds NaN, infinity or nothing but zeros in rows 0, 1, 2"),
        (
            torch.stack([X[:2], torch.stack([X[0], -X[0]])]),
            ValueError,
            "the mean of the prompts holds NaN, infinity or nothing but zeros in rows 1",
        ),
        (X[None].long(), TypeError, r"prompt_features\[0\] has dtype torch.int64; pass floating-point features"),
    ],
)
def test_bad_prompts(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^class_features: {message}"):
        class_features(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: few_shot_metrics(X, Y[:2], {}), ValueError, "support_labels has 2 entries but support_features has 3"),
        (
            lambda: few_shot_metrics(X, Y * 0, {}),
            ValueError,
            "support_labels holds one class alone; pass samples of tw",
        ),
        (
            lambda: few_shot_metrics(X * 0, Y, {}),
            ValueError,
            "support_features holds NaN, infinity or nothing but zero",
        ),
        (
            lambda: few_shot_metrics(X, Y.double(), {}),
            TypeError,
            r"support_labels has shape \(3,\) and dtype torch.flo",
        ),
        (lambda: few_shot_metrics(X, Y, {}, ks=(0,)), ValueError, "ks is 0; pass an integer of at least 1"),
        (lambda: few_shot_metrics(X, Y, {}, ks=2), TypeError, "ks is 2; pass a sequence of integers"),
        (lambda: few_shot_metrics(X, Y, None), TypeError, "tests is a NoneType; pass a dict of features and labels"),
        (lambda: few_shot_metrics(X, Y, {"a": 1}), TypeError, r"tests\['a'\] is a int; pass features and labels"),
        (lambda: few_shot_metrics(X, Y, {}, draws=0), ValueError, "draws is 0; pass an integer of at least 1"),
        (lambda: few_shot_metrics(X, Y, {}, generator=3), TypeError, "generator is a int; pass a torch.Generator"),
        (
            lambda: few_shot_metrics(X, Y, {"sketch": (X, Y + 1)}),
            ValueError,
            r"tests\['sketch'\] holds the class 3, but support_labels does not; leave it out",
        ),
        (
            lambda: few_shot_metrics(X, Y, {"sketch": (X, Y[:1])}),
            ValueError,
            r"the labels of tests\['sketch'\] has 1 entries but the features of tests\['sketch'\] has 3 rows",
        ),
        (
            lambda: few_shot_metrics(X, Y, {"sketch": (X[:, :2] + 1, Y)}),
            ValueError,
            r"tests\['sketch'\] has 2 columns but support_features has 3; pass features of one space",
        ),
    ],
)
def test_bad_arguments_of_few_shot(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^few_shot_metrics: {message}"):
        call()
