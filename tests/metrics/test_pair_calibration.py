"""Calibration of retrieval against loops written from the definition in NumPy, and temperatures against a grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hardmix.metrics.pair_calibration as module
from hardmix.metrics import fit_temperature, reliability
from hardmix.metrics.pair_calibration import fit_query_temperature, query_calibration, retrieval_calibration
from hardmix.report import plots


def slow_logits(queries: Tensor, candidates: Tensor, scale: float) -> list[list[float]]:
    q, c = queries.double().numpy(), candidates.double().numpy()
    return [[scale * float(np.dot(a, b)) / math.sqrt(np.dot(a, a)) / math.sqrt(np.dot(b, b)) for b in c] for a in q]


def slow_calibration(logits: list[list[float]], own: list[int], other: list[int], bins: int) -> dict[str, object]:
    """Each query's softmax, the candidate with the largest share, and bins (lower edge, upper edge]."""
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    nll = 0.0
    for row, mine in zip(logits, own, strict=True):
        top = max(row)
        total = sum(math.exp(v - top) for v in row)
        probs = [math.exp(v - top) / total for v in row]
        right = [c for c, theirs in enumerate(other) if theirs == mine]
        nll -= sum(row[c] - top - math.log(total) for c in right) / len(right)
        confidence = max(probs)
        (at,) = [b for b in range(bins) if b / bins < confidence <= (b + 1) / bins + 1e-15 * (b + 1 == bins)]
        members[at].append((confidence, float(other[probs.index(confidence)] == mine)))
    means = [[sum(v) / len(m) for v in zip(*m, strict=True)] if m else [None, None] for m in members]
    ece = sum(len(m) / len(own) * abs(a - c) for m, (c, a) in zip(members, means, strict=True) if m)
    return {
        "ece": ece, "nll": nll / len(own), "confidence": [m[0] for m in means], "accuracy": [m[1] for m in means],
        "count": [len(m) for m in members],
    }  # fmt: skip


def made(seed: int, n: int, m: int, concepts: int, d: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of several pictures and texts of a few concepts, each concept on both sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.cat([torch.arange(concepts), torch.randint(concepts, (size - concepts,), generator=generator)])
           for size in (n, m)]  # fmt: skip
    centres = torch.randn(concepts, d, generator=generator, dtype=torch.float64)
    x, y = (centres[i] + torch.randn(len(i), d, generator=generator, dtype=torch.float64) for i in ids)
    return x, y, ids[0], ids[1]


def agrees(found: dict, expected: dict, rel: float) -> None:
    for key in ("ece", "nll"):
        assert found[key] == pytest.approx(expected[key], rel=rel, abs=rel)
    assert found["bins"]["count"] == expected["count"]
    for key in ("confidence", "accuracy"):
        for a, b in zip(found["bins"][key], expected[key], strict=True):
            assert (a is None) == (b is None)
            assert a is None or a == pytest.approx(b, rel=rel)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), concepts=st.integers(1, 9), more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    block=st.sampled_from([1, 7, 2**20]), scale=st.sampled_from([0.1, 3.0, 14.0, 100.0]), bins=st.integers(1, 12),
)  # fmt: skip
def test_both_directions_are_what_the_loop_finds(
    seed: int, concepts: int, more: tuple[int, int], block: int, scale: float, bins: int
) -> None:
    x, y, own, other = made(seed, concepts + more[0], concepts + more[1], concepts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = retrieval_calibration(x * 3, y * 1e-3, scale, image_ids=own, text_ids=other, bins=bins)
        one = query_calibration(
            x, y, torch.tensor(scale, dtype=torch.float64), query_ids=own, candidate_ids=other, bins=bins
        )
    logits = slow_logits(x, y, scale)
    there = slow_calibration(logits, own.tolist(), other.tolist(), bins)
    back = slow_calibration([list(c) for c in zip(*logits, strict=True)], other.tolist(), own.tolist(), bins)
    agrees(found["image_to_text"], there, 1e-11)
    agrees(found["text_to_image"], back, 1e-11)
    agrees(one, there, 1e-11)


def test_float32_is_near() -> None:
    x, y, _, _ = made(0, 150, 150, 150)
    exact = retrieval_calibration(x, y, 30.0)
    near = retrieval_calibration(x.float(), y.float(), 30.0)
    for name in ("image_to_text", "text_to_image"):
        assert near[name]["ece"] == pytest.approx(exact[name]["ece"], rel=1e-4)
        assert near[name]["nll"] == pytest.approx(exact[name]["nll"], rel=1e-5)
    cold = fit_query_temperature(x, y, 30.0)
    assert fit_query_temperature(x.float(), y.float(), 30.0) == pytest.approx(cold, rel=1e-4)


def test_bins_are_closed_above() -> None:
    """Four candidates and one: a confidence of exactly 1/4 and of exactly 1."""
    flat = query_calibration(torch.ones(4, 2), torch.ones(4, 2), 5.0, bins=4)
    assert flat["bins"]["count"] == [4, 0, 0, 0]
    sure = query_calibration(torch.ones(3, 2), torch.ones(1, 2), 5.0, query_ids=torch.zeros(3).long(),
                             candidate_ids=torch.zeros(1).long(), bins=4)  # fmt: skip
    assert sure["bins"]["count"] == [0, 0, 0, 3]
    assert (sure["ece"], sure["nll"]) == (0.0, 0.0)


def test_equal_features_are_as_right_as_they_are_sure() -> None:
    same = torch.ones(5, 3)
    found = query_calibration(same, same, 100.0)
    assert found["bins"]["confidence"][1] == pytest.approx(0.2)
    assert found["bins"]["accuracy"][1] == pytest.approx(0.2)
    assert found["ece"] == pytest.approx(0.0, abs=1e-6)
    assert found["nll"] == pytest.approx(math.log(5))
    assert fit_query_temperature(same.double(), same.double(), 100.0) == 1.0


def test_autocast_changes_nothing() -> None:
    x, y, own, other = (part.float() if part.is_floating_point() else part for part in made(0, 30, 30, 20))
    found = query_calibration(x, y, 100.0, query_ids=own, candidate_ids=other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert query_calibration(x, y, 100.0, query_ids=own, candidate_ids=other) == found


def test_a_small_nll_keeps_its_digits() -> None:
    """About e^-14, which the difference of two logits of 14 has not in float32."""
    x = torch.eye(2)
    assert query_calibration(x, x, 14.0)["nll"] == pytest.approx(math.log1p(math.exp(-14.0)), rel=0.1)  # 8e-7


def test_several_right_candidates_share_the_confidence() -> None:
    x, y = torch.eye(2).double(), torch.eye(2).double()[[0, 0, 1]]
    found = query_calibration(x, y, 1000.0, query_ids=torch.tensor([4, 9]), candidate_ids=torch.tensor([4, 4, 9]))
    assert found["bins"]["count"] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert found["ece"] == pytest.approx(0.25)
    assert found["nll"] == pytest.approx(math.log(2) / 2)


def test_a_diagram_can_be_drawn_and_looks_like_the_one_of_classification() -> None:
    x, y, own, _ = made(1, 60, 20, 20)
    found = query_calibration(x, y, 5.0, query_ids=own, candidate_ids=torch.arange(20).flip(0), bins=15)
    z = 5.0 * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
    expected = reliability(z.softmax(1), 19 - own)
    assert found["bins"]["count"] == expected["count"]
    for key in ("confidence", "accuracy"):
        assert found["bins"][key] == [None if v is None else pytest.approx(v) for v in expected[key]]
    assert plots.reliability(found["bins"], "a diagram") is not None


def slow_nll(logits: list[list[float]], own: list[int], other: list[int], temperature: float) -> float:
    return slow_calibration([[v / temperature for v in row] for row in logits], own, other, 1)["nll"]  # type: ignore[return-value]


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), block=st.sampled_from([1, 50, 2**20]), several=st.booleans())
def test_the_temperature_has_the_smallest_nll(seed: int, block: int, several: bool) -> None:
    x, y, own, other = made(seed, 14, 14, 7 if several else 14)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        fitted = fit_query_temperature(x, y, 20.0, query_ids=own, candidate_ids=other)
    logits = slow_logits(x, y, 20.0)
    best = slow_nll(logits, own.tolist(), other.tolist(), fitted)
    assert 0.01 <= fitted <= 100.0
    for other_temperature in np.geomspace(0.01, 100.0, 60):
        assert best <= slow_nll(logits, own.tolist(), other.tolist(), float(other_temperature)) + 1e-9
    if 0.02 < fitted < 50.0:  # not cut off: the scale alone matters
        for factor in (0.999, 1.001):
            assert best < slow_nll(logits, own.tolist(), other.tolist(), factor * fitted)
        again = fit_query_temperature(x, y, torch.tensor([40.0]).double(), query_ids=own, candidate_ids=other)
        assert again == pytest.approx(2 * fitted, rel=1e-8)


def test_with_one_candidate_a_class_it_is_the_temperature_of_classification() -> None:
    x, y, own, _ = made(3, 80, 6, 6)
    z = 9.0 * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
    found = fit_query_temperature(x, y, 9.0, query_ids=own, candidate_ids=torch.arange(6))
    assert found == pytest.approx(fit_temperature(z, own), rel=1e-9)


def test_scaling_mends_a_model_that_is_too_sure() -> None:
    x, y, _, _ = made(4, 400, 400, 400, d=24)
    fit, rest = slice(0, 200), slice(200, 400)
    t = fit_query_temperature(x[fit], y[fit], 100.0)
    before, after = (query_calibration(x[rest], y[rest], 100.0 / k) for k in (1.0, t))
    assert t > 1.5
    assert after["ece"] < 0.5 * before["ece"]
    assert after["nll"] < before["nll"]


def test_temperatures_that_want_to_leave_the_range() -> None:
    x = torch.eye(5, dtype=torch.float64)
    assert fit_query_temperature(x, x, 10.0) == 0.01  # all found: ever colder
    assert fit_query_temperature(x, -x, 10.0) == 100.0  # the right one comes last: ever hotter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_every_dtype_and_extreme_scales(dtype: torch.dtype, scale: float) -> None:
    x = torch.eye(6, dtype=dtype) + 0.25
    found = query_calibration(x * torch.finfo(dtype).max ** 0.5, x.requires_grad_(), scale)
    assert 0.0 <= found["ece"] <= 1.0
    assert math.isfinite(found["nll"])
    assert 0.01 <= fit_query_temperature(x, x, scale) <= 100.0


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_all_logits_are_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 9000)
    x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    with Largest() as seen:
        retrieval_calibration(x, x + 1, 10.0)
        fit_query_temperature(x, x + 1, 10.0)
    assert seen.elements <= 9000  # of 360,000
    assert torch.equal(x, before)


X = torch.eye(3)


@pytest.mark.parametrize("function", [retrieval_calibration, query_calibration, fit_query_temperature])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(X, X[:2], 1.0), ValueError, r"s has 3 rows but \w+ has 2; pass ids"),
        (lambda f: f(X, torch.ones(3, 2), 1.0), ValueError, r"has 3 features a row but \w+ has 2; pass as many"),
        (lambda f: f(X[0], X, 1.0), ValueError, r"has shape \(3,\); pass a batch with 2 axes"),
        (lambda f: f(X, X / 0, 1.0), ValueError, "holds NaN, infinity or nothing but zeros in rows 0, 1, 2; repair"),
        (lambda f: f(X, X, 0.0), ValueError, "logit_scale is 0.0; pass a finite number greater than 0"),
        (lambda f: f(X, X, torch.tensor(-1.0)), ValueError, "logit_scale is -1; pass a number greater than 0"),
        (lambda f: f(X, X, torch.ones(2)), ValueError, r"logit_scale has shape \(2,\) and dtype torch.float32; pass a"),
        (lambda f: f(X, X, "big"), ValueError, "logit_scale is 'big'; pass a finite number"),
    ],
)
def test_bad_arguments_are_named(
    function: Callable[..., object], call: Callable[..., object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^{function.__name__}: .*{message}"):
        call(function)


def test_rows_without_a_right_one_are_named() -> None:
    ids = {"image_ids": torch.arange(3), "text_ids": torch.tensor([0, 1, 1])}
    with pytest.raises(ValueError, match=r"^retrieval_calibration: 1 of 3 rows .* \(image_to_text, row 2 first\)"):
        retrieval_calibration(X, X, 1.0, **ids)
    ids = {"image_ids": torch.tensor([0, 1, 1]), "text_ids": torch.arange(3)}
    with pytest.raises(ValueError, match=r"^retrieval_calibration: 1 of 3 rows .* \(text_to_image, row 2 first\)"):
        retrieval_calibration(X, X, 1.0, **ids)
    for function in (query_calibration, fit_query_temperature):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: 3 of 3 rows have nothing .* \(queries, row 0 f"):
            function(X, X, 1.0, query_ids=torch.arange(3), candidate_ids=torch.arange(3) + 7)
    with pytest.raises(ValueError, match=r"^query_calibration: bins is 0; pass an integer of at least 1"):
        query_calibration(X, X, 1.0, bins=0)
    with pytest.raises(ValueError, match=r"^retrieval_calibration: bins is 0; pass an integer of at least 1"):
        retrieval_calibration(X, X, 1.0, bins=0)
