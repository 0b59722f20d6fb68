"""Retrieval against a slow reference that sorts every query's candidates in float64, and chance by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hardmix.metrics.retrieval as module
from hardmix.metrics.retrieval import retrieval_metrics, retrieval_ranks


def slow_ranks(queries: Tensor, candidates: Tensor, own: list[int], other: list[int]) -> list[int]:
    """Sort the candidates of each query, wrong ones first among equals, and walk to the first right one."""
    ranks = []
    for q, mine in zip(queries.double().numpy(), own, strict=True):
        scored = []
        for c, theirs in zip(candidates.double().numpy(), other, strict=True):
            cosine = float(np.dot(q, c) / math.sqrt(np.dot(q, q)) / math.sqrt(np.dot(c, c)))
            scored.append((-cosine, theirs == mine))
        ranks.append([right for _, right in sorted(scored)].index(True) + 1)
    return ranks


def slow_chance(right: list[int], candidates: int, k: int) -> float:
    """Every way to draw k of the candidates."""
    hits = []
    for r in right:
        drawn = list(itertools.combinations(range(candidates), min(k, candidates)))
        hits.append(Fraction(sum(min(way) < r for way in drawn), len(drawn)))
    return float(sum(hits) / len(hits))


def made(seed: int, n: int, m: int, concepts: int, d: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of several pictures and texts of a few concepts, each concept on both sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.cat([torch.arange(concepts), torch.randint(concepts, (size - concepts,), generator=generator)])
           for size in (n, m)]  # fmt: skip
    centres = torch.randn(concepts, d, generator=generator, dtype=torch.float64)
    x, y = (centres[i] + torch.randn(len(i), d, generator=generator, dtype=torch.float64) for i in ids)
    return x, y, ids[0], ids[1]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), concepts=st.integers(1, 9), more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    block=st.sampled_from([1, 7, 2**20]),
)  # fmt: skip
def test_ranks_are_those_of_a_sorted_list(seed: int, concepts: int, more: tuple[int, int], block: int) -> None:
    x, y, own, other = made(seed, concepts + more[0], concepts + more[1], concepts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        ranks = retrieval_ranks(x * 3, y, query_ids=own, candidate_ids=other)
        metrics = retrieval_metrics(x, y * 1e-3, image_ids=own, text_ids=other, ks=(1, 2, 3))
    expected = slow_ranks(x, y, own.tolist(), other.tolist())
    assert ranks.tolist() == expected
    assert (ranks.dtype, ranks.device.type) == (torch.long, "cpu")
    back = slow_ranks(y, x, other.tolist(), own.tolist())
    for name, values in (("image_to_text", expected), ("text_to_image", back)):
        for k in (1, 2, 3):
            assert metrics[f"{name}_recall_{k}"] == pytest.approx(sum(v <= k for v in values) / len(values), rel=1e-12)
        # the smallest rank that half of the queries reach
        median = next(v for v in sorted(values) if 2 * sum(w <= v for w in values) >= len(values))
        assert metrics[f"{name}_median_rank"] == median
        assert metrics[f"{name}_mrr"] == pytest.approx(sum(1 / v for v in values) / len(values), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 20])
@pytest.mark.parametrize("right", [[1, 1, 1], [1, 2, 5], [7, 7], [3, 3, 1, 1, 1], [6]])
def test_chance_is_the_share_of_all_draws(right: list[int], k: int) -> None:
    assert module._chance(torch.tensor(right), 7, k) == pytest.approx(slow_chance(right, 7, k), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("right", "candidates"), [([1], 1), ([1], 2), ([1], 9), ([1], 10), ([2, 2], 9), ([1, 4, 4], 9)]
)
def test_the_median_of_chance_is_the_first_rank_that_half_reach(right: list[int], candidates: int) -> None:
    first = next(k for k in range(1, candidates + 1) if slow_chance(right, candidates, k) >= 0.5)
    assert module._chance_median(torch.tensor(right), candidates) == first


def test_chance_is_what_random_features_reach() -> None:
    """600 pictures with three texts each, all drawn by chance."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 32, generator=generator) for n in (600, 1800))
    found = retrieval_metrics(x, y, image_ids=torch.arange(600), text_ids=torch.arange(1800) % 600, ks=(1, 10, 100))
    assert found["text_to_image_recall_10_chance"] == pytest.approx(10 / 600)
    assert found["image_to_text_recall_1_chance"] == pytest.approx(3 / 1800)
    assert found["text_to_image_median_rank_chance"] == 300
    for name in ("image_to_text", "text_to_image"):
        for k in (1, 10, 100):
            chance = found[f"{name}_recall_{k}_chance"]
            spread = math.sqrt(chance * (1 - chance) / 600)
            assert abs(found[f"{name}_recall_{k}"] - chance) < 4 * spread
        assert abs(found[f"{name}_median_rank"] / found[f"{name}_median_rank_chance"] - 1) < 0.15


def test_five_captions_are_five_queries_and_one_is_enough() -> None:
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.9, 1.0], [0.8, 1.0], [0.0, 1.0]])
    found = retrieval_metrics(image, text, image_ids=torch.tensor([7, 3]), text_ids=torch.tensor([7, 7, 7, 3]), ks=(1,))
    assert found["image_to_text_recall_1"] == 1.0
    assert found["text_to_image_recall_1"] == 0.5  # two of picture 7's three captions are nearer to picture 3
    assert found["text_to_image_median_rank"] == 1.0


def test_ties_count_against_the_query() -> None:
    same = torch.ones(5, 3)
    found = retrieval_metrics(same, same)
    assert found["image_to_text_recall_1"] == found["text_to_image_recall_1"] == 0.0
    assert retrieval_ranks(same, same).tolist() == [5] * 5
    assert found["image_to_text_recall_5"] == 1.0  # all five are among the first five
    several = retrieval_ranks(
        same, same, query_ids=torch.tensor([0, 0, 0, 1, 1]), candidate_ids=torch.tensor([0, 0, 0, 1, 1])
    )
    assert several.tolist() == [3, 3, 3, 4, 4]
    two = torch.eye(3)[[0, 0, 2]]
    assert retrieval_ranks(two, torch.eye(3)).tolist() == [1, 3, 1]  # the second one has only ties and itself left


@pytest.mark.parametrize(("dtype", "queries", "rows"), [(torch.float32, 1, 5), (torch.float64, 1001, 1001)])
def test_equal_features_are_ties_however_their_products_are_rounded(
    dtype: torch.dtype, queries: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(1, 513, dtype=dtype, generator=generator).repeat(rows, 1)
    ids = torch.arange(rows)
    for asked in (same[:queries], torch.randn(queries, 513, dtype=dtype, generator=generator)):
        assert (retrieval_ranks(asked, same, query_ids=ids[:queries], candidate_ids=ids) == rows).all()
    apart = torch.stack([torch.ones(2, dtype=dtype), torch.tensor([1.0, 1.01], dtype=dtype)])
    assert retrieval_ranks(apart, apart).tolist() == [1, 1]  # a hundredth of a radian is no tie


def test_autocast_changes_nothing() -> None:
    x, y, own, other = (part.float() if part.is_floating_point() else part for part in made(0, 60, 60, 40))
    found = retrieval_metrics(x, y, image_ids=own, text_ids=other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(x, y, image_ids=own, text_ids=other) == found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_the_extremes(dtype: torch.dtype) -> None:
    x = torch.eye(6, dtype=dtype) + 0.25
    lengths = torch.tensor([1, 1e-4, 1e4, 1, torch.finfo(dtype).max / 2, torch.finfo(dtype).tiny], dtype=torch.float64)
    scaled = (x.double() * lengths[:, None]).to(dtype)
    assert retrieval_ranks(scaled, x).tolist() == [1] * 6
    assert retrieval_ranks(x, scaled).tolist() == [1] * 6
    mixed = retrieval_metrics(x, x.double())
    assert mixed["image_to_text_recall_1"] == mixed["text_to_image_recall_1"] == 1.0


def test_one_pair() -> None:
    found = retrieval_metrics(torch.ones(1, 2), torch.tensor([[-1.0, -1.0]]))
    assert set(found.values()) == {1.0}
    assert len(found) == 2 * (2 * 3 + 3)


def test_inputs_are_left_alone_and_gradients_are_not_kept() -> None:
    x, y, own, other = made(0, 5, 7, 3)
    x.requires_grad_()
    before = [t.detach().clone() for t in (x, y, own, other)]
    assert not retrieval_ranks(x, y, query_ids=own, candidate_ids=other).requires_grad
    assert all(torch.equal(t, b) for t, b in zip((x.detach(), y, own, other), before, strict=True))
    assert retrieval_ranks(x, y, query_ids=own.int(), candidate_ids=other.short()).shape == (5,)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_all_cosines_are_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4000)
    x = torch.randn(900, 4, generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        retrieval_metrics(x, x + 1)
    assert seen.elements <= 4000  # of 810,000


X = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: retrieval_metrics(X, X[:2]),
            ValueError,
            r"image_features has 3 rows but text_features has 2; pass ids",
        ),
        (
            lambda: retrieval_metrics(X, torch.ones(3, 2)),
            ValueError,
            r"has 3 features a row but text_features has 2; pass as m",
        ),
        (lambda: retrieval_metrics(X[0], X), ValueError, r"image_features has shape \(3,\); pass a batch with 2 axes"),
        (lambda: retrieval_metrics(X[:0], X[:0]), ValueError, "is empty; pass at least one sample"),
        (lambda: retrieval_metrics(X.long(), X), TypeError, "image_features has dtype torch.int64; pass floating"),
        (lambda: retrieval_metrics([1], X), TypeError, "image_features is a list; pass a torch.Tensor"),
        (lambda: retrieval_metrics(X, X, ks=(0,)), ValueError, "ks is 0; pass an integer of at least 1"),
        (lambda: retrieval_metrics(X, X, ks=5), TypeError, "ks is 5; pass a sequence of integers"),
        (
            lambda: retrieval_metrics(X, X * torch.tensor([1, 0, 1])[:, None]),
            ValueError,
            r"but zeros in rows 1; repair",
        ),
        (
            lambda: retrieval_metrics(X / 0, X),
            ValueError,
            "image_features holds NaN, infinity or .* rows 0, 1, 2; repa",
        ),
        (lambda: retrieval_metrics(X, X, text_ids=torch.arange(3)), ValueError, "only one of .* has ids; pass both or"),
        (
            lambda: retrieval_metrics(X, X, image_ids=torch.arange(3), text_ids=torch.arange(2)),
            ValueError,
            "ids of text_features has 2 entries but text_features has 3 rows",
        ),
        (
            lambda: retrieval_metrics(X, X, image_ids=torch.arange(3.0), text_ids=torch.arange(3)),
            TypeError,
            r"ids of image_features have shape \(3,\) and dtype torch.float32; pass integers",
        ),
        (
            lambda: retrieval_metrics(X, X, image_ids=torch.arange(3), text_ids=torch.tensor([0, 1, 1])),
            ValueError,
            r"1 of 3 rows have nothing to find \(image_to_text, row 2 first\); leave them out, or repair the ids",
        ),
        (
            lambda: retrieval_metrics(X, X, image_ids=torch.tensor([0, 1, 1]), text_ids=torch.arange(3)),
            ValueError,
            r"1 of 3 rows have nothing to find \(text_to_image, row 2 first\)",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^retrieval_metrics: .*{message}"):
        call()


def test_ranks_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"^retrieval_ranks: queries has 3 rows but candidates has 2; pass ids"):
        retrieval_ranks(X, X[:2])
