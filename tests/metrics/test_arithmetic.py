"""Arithmetic with pictures and texts against a loop over relations and candidates in NumPy."""

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

import hardmix.metrics.arithmetic as module
from hardmix.metrics.arithmetic import SCALES, arithmetic_metrics, arithmetic_queries, choose_scale


def slow_ranks(image: Tensor, text: Tensor, relations: Tensor, scale: float, candidates: list[int]) -> list[int]:
    """Sort every candidate but c by its cosine with the query, and look for d."""
    x, y = ([row / math.sqrt(float(row @ row)) for row in t.double().numpy()] for t in (image, text))
    ranks = []
    for a, b, c, d in relations.tolist():
        query = x[c] + scale * (y[b] - y[a])
        scored = [(-float(np.dot(query, x[j])), j == d) for j in candidates if j != c]
        ranks.append([right for _, right in sorted(scored)].index(True) + 1)
    return ranks


def made(seed: int, rows: int, relations: int, d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    x, y = (centres + 0.5 * torch.randn(rows, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y, torch.stack([torch.randperm(rows, generator=generator)[:4] for _ in range(relations)])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(4, 12), count=st.integers(1, 9),
    block=st.sampled_from([1, 20, 2**20]), scale=st.sampled_from([0.0, 0.5, 1.0, 3.0]), few=st.booleans(),
)  # fmt: skip
def test_recalls_are_those_of_a_sorted_list(
    seed: int, rows: int, count: int, block: int, scale: float, few: bool
) -> None:
    x, y, relations = made(seed, rows, count)
    generator = torch.Generator().manual_seed(seed)
    pool = (
        torch.cat([relations[:, 3], torch.randperm(rows, generator=generator)[: rows // 2]]).unique() if few else None
    )
    if pool is not None:
        pool = pool[torch.randperm(len(pool), generator=generator)]
    kinds = ["even" if row % 2 == 0 else "odd" for row in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = arithmetic_metrics(x * 7, y * 1e-3, relations, scale=scale, ks=(1, 2, 5), kinds=kinds, candidates=pool)
    candidates = list(range(rows)) if pool is None else pool.tolist()
    ranks = slow_ranks(x, y, relations, scale, candidates)
    left = [len(set(candidates) - {c}) for c in relations[:, 2].tolist()]
    assert list(found["kinds"]) == ["even", "odd"][: min(count, 2)]
    for part, chosen in (("", range(count)), ("even", range(0, count, 2)), ("odd", range(1, count, 2))):
        if not chosen:
            continue
        measured = found["kinds"][part] if part else found
        assert measured["queries"] == len(chosen)
        for k in (1, 2, 5):
            assert measured[f"recall_{k}"] == pytest.approx(sum(ranks[i] <= k for i in chosen) / len(chosen))
            chance = sum(min(k, left[i]) / left[i] for i in chosen) / len(chosen)
            assert measured[f"recall_{k}_chance"] == pytest.approx(chance, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.0, 4.0))
def test_queries_are_moved_pictures_of_length_1(seed: int, scale: float) -> None:
    x, y, relations = made(seed, 7, 3)
    found = arithmetic_queries(x * 5, y * 1e-3, relations, scale)
    for query, (a, b, c, _) in zip(found, relations.tolist(), strict=True):
        u, v = (t.numpy() / np.linalg.norm(t.numpy(), axis=1, keepdims=True) for t in (x, y))
        expected = u[c] + scale * (v[b] - v[a])
        assert np.allclose(query.numpy(), expected / np.linalg.norm(expected), rtol=1e-12, atol=1e-12)
    assert found.dtype == torch.float64
    assert arithmetic_queries(x.half(), y, relations.int(), scale).shape == (3, 5)


def test_the_scale_that_finds_most_is_chosen() -> None:
    for seed in range(40):
        x, y, relations = made(seed, 12, 8)
        ranks = {scale: slow_ranks(x, y, relations, scale, list(range(12))) for scale in SCALES}
        merits = {s: (sum(r == 1 for r in v), sum(r <= 5 for r in v)) for s, v in ranks.items()}
        best = min(scale for scale in SCALES if merits[scale] == max(merits.values()))
        assert choose_scale(x, y, relations) == best
        assert choose_scale(x, y, relations, scales=SCALES[::-1]) == best


def test_recall_5_decides_where_recall_1_does_not_and_then_the_smallest_scale() -> None:
    """Pictures at 0, 1 (b), 2 ... 8 times 10 degrees; c is at 20, and texts turn it towards d at 80."""
    angle = torch.arange(9) * math.pi / 18
    image = torch.stack([angle.cos(), angle.sin()], 1)
    text = torch.tensor([[0.0, -1.0], [0.0, 1.0]] + [[1.0, 0.0]] * 7)
    relations = torch.tensor([[0, 1, 2, 8]])
    recalls = {}
    for scale in (0.0, 0.3, 0.6, 0.8):
        found = arithmetic_metrics(image, text, relations, scale=scale)
        recalls[scale] = (found["recall_1"], found["recall_5"])
    assert recalls == {0.0: (0.0, 0.0), 0.3: (0.0, 0.0), 0.6: (0.0, 1.0), 0.8: (0.0, 1.0)}
    assert choose_scale(image, text, relations, scales=(0.8, 0.3, 0.6, 0.0)) == 0.6
    assert choose_scale(image, text, relations, scales=(0.3, 0.0)) == 0.0


def test_a_model_that_adds_attributes_is_nearly_always_right() -> None:
    """Features of subject and attribute side by side; at scale 0 the picture itself is all there is."""
    subjects, attributes = 30, 3
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(subjects, 32, generator=generator), 1.5 * torch.randn(attributes, 32, generator=generator)
    x = (s[:, None] + t).reshape(-1, 32)
    x = x / x.norm(dim=1, keepdim=True)
    relations = torch.tensor(
        [[3 * i, 3 * i + 1, 3 * j, 3 * j + 1] for i in range(subjects) for j in range(subjects) if i != j]
    )
    found = arithmetic_metrics(x, x, relations, kinds=["first"] * len(relations))
    assert found["recall_1"] > 0.95
    assert found["queries"] == 870
    assert found["recall_1_chance"] == pytest.approx(1 / 89)
    assert found["kinds"] == {"first": {k: v for k, v in found.items() if k != "kinds"}}
    assert arithmetic_metrics(x, x, relations, scale=0.0)["recall_1"] < 0.8
    assert arithmetic_metrics(x, x[:, torch.randperm(32, generator=generator)], relations)["recall_1"] < 0.6


def test_the_query_itself_is_left_out_and_b_is_not() -> None:
    x = torch.eye(4)
    x[3] = torch.tensor([0.0, 1.0, 1.0, 0.5])
    there = torch.tensor([[0, 1, 2, 3]])
    assert arithmetic_metrics(x, torch.ones(4, 4), there)["recall_1"] == 1.0  # c is nearer, but left out
    steep = arithmetic_metrics(x, x, there, scale=50.0, ks=(1, 2))
    assert (steep["recall_1"], steep["recall_2"]) == (0.0, 1.0)  # b comes first
    assert arithmetic_metrics(x, x, there, scale=50.0, candidates=torch.tensor([3, 0]))["recall_1"] == 1.0
    alone = arithmetic_metrics(x, x, there, scale=50.0, candidates=torch.tensor([2, 3]))
    assert (alone["recall_1"], alone["recall_1_chance"], alone["recall_5_chance"]) == (1.0, 1.0, 1.0)


def test_ties_and_queries_of_zero_find_nothing() -> None:
    relations = torch.tensor([[0, 1, 2, 3]])
    assert arithmetic_metrics(torch.ones(9, 2), torch.ones(9, 2), relations)["recall_5"] == 0.0
    image, text = torch.eye(2)[[0, 0, 0, 1, 1, 0, 1]], torch.tensor([[1.0, 0.0], [-1.0, 0.0]] + [[1.0, 0.0]] * 5)
    assert arithmetic_queries(image, text, relations, 0.5).tolist() == [[0.0, 0.0]]
    assert arithmetic_metrics(image, text, relations, scale=0.5)["recall_5"] == 0.0
    rows = torch.randn(1, 513, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(1001, 1)
    asked = torch.tensor([[0, 1, 2, row] for row in range(900, 1001)])
    assert arithmetic_metrics(rows, rows, asked, ks=(999,))["recall_999"] == 0.0  # however products are rounded


def test_autocast_changes_nothing() -> None:
    image, text, relations = made(0, 40, 60)
    image, text = image.float(), text.float()
    found = arithmetic_metrics(image, text, relations, ks=range(1, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert arithmetic_metrics(image, text, relations, ks=range(1, 30)) == found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_no_input_is_changed(dtype: torch.dtype) -> None:
    x = (torch.eye(6) + 0.25).to(dtype).requires_grad_()
    relations = torch.tensor([[0, 1, 2, 3], [1, 0, 4, 5]])
    before = x.detach().clone()
    query = arithmetic_queries(x, x, relations, 1e6)
    assert bool(query.isfinite().all())
    assert not query.requires_grad
    assert arithmetic_metrics(x, x.double(), relations)["queries"] == 2
    assert torch.equal(x.detach(), before)


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
    x, y, relations = made(0, 300, 900, d=4)
    with Largest() as seen:
        arithmetic_metrics(x, y, relations)
    assert seen.elements <= 4000  # of 270,000


X = torch.eye(5)
R = torch.tensor([[0, 1, 2, 3]])


@pytest.mark.parametrize("function", [arithmetic_metrics, choose_scale, lambda *a, **k: arithmetic_queries(*a, 1.0)])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:2], R), ValueError, "text_features has 2 entries but image_features has 5 rows"),
        ((X, torch.ones(5, 2), R), ValueError, "image_features has 5 features a row but text_features has 2; pass as"),
        ((X / 0, X, R), ValueError, "image_features holds NaN, infinity or nothing but zeros in rows 0, 1, 2, 3, 4; r"),
        ((X, [1], R), TypeError, "text_features is a list; pass a torch.Tensor"),
        ((X, X, [[0, 1, 2, 3]]), TypeError, "relations is a list; pass a torch.Tensor"),
        ((X, X, R.float()), TypeError, "relations has dtype torch.float32; pass integers"),
        ((X, X, R[0]), ValueError, r"relations has shape \(4,\); pass \(Q, 4\)"),
        ((X, X, R[:, :3]), ValueError, r"relations has shape \(1, 3\); pass \(Q, 4\)"),
        ((X, X, R[:0]), ValueError, r"relations has shape \(0, 4\); pass \(Q, 4\)"),
        ((X, X, R + 2), ValueError, "relations holds row 5; pass rows from 0 to 4"),
        ((X, X, R - 1), ValueError, "relations holds row -1; pass rows from 0 to 4"),
        ((X, X, torch.tensor([[0, 1, 2, 3], [0, 1, 4, 4]])), ValueError, r"relations\[1\] asks for row 4, the picture"),
    ],
)
def test_bad_arguments_are_named(
    function: Callable[..., object], arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^(arithmetic_metrics|arithmetic_queries|choose_scale): {message}"):
        function(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: arithmetic_metrics(X, X, R, scale=-1.0), ValueError, "arithmetic_metrics: scale is -1.0; pass a fini"),
        (lambda: arithmetic_queries(X, X, R, math.nan), ValueError, "arithmetic_queries: scale is nan; pass a finite"),
        (lambda: arithmetic_metrics(X, X, R, ks=(0,)), ValueError, "arithmetic_metrics: ks is 0; pass an integer of a"),
        (lambda: arithmetic_metrics(X, X, R, ks=1), TypeError, "arithmetic_metrics: ks is 1; pass a sequence of integ"),
        (
            lambda: arithmetic_metrics(X, X, R, kinds="a"),
            TypeError,
            "arithmetic_metrics: kinds is 'a'; pass a sequence",
        ),
        (lambda: choose_scale(X, X, R, scales=1.0), TypeError, r"choose_scale: scales is 1\.0; pass a sequence of num"),
        (lambda: arithmetic_metrics(X, X, R, kinds=["a", "b"]), ValueError, "arithmetic_metrics: kinds has 2 entries"),
        (
            lambda: arithmetic_metrics(X, X, R, candidates=R),
            ValueError,
            r"arithmetic_metrics: candidates has shape \(1",
        ),
        (
            lambda: arithmetic_metrics(X, X, R, candidates=torch.tensor([3, 3])),
            ValueError,
            r"arithmetic_metrics: candidates has shape \(2,\) and 1 different rows; pass \(M,\), each row once",
        ),
        (
            lambda: choose_scale(X, X, R, candidates=torch.tensor([0, 1])),
            ValueError,
            "choose_scale: candidates has no row 3, which a relation asks for; add it",
        ),
        (
            lambda: choose_scale(X, X, R, candidates=torch.tensor([9])),
            ValueError,
            "choose_scale: candidates holds row 9",
        ),
        (lambda: choose_scale(X, X, R, scales=()), ValueError, "choose_scale: scales is empty; pass at least one"),
        (lambda: choose_scale(X, X, R, scales=("a",)), ValueError, "choose_scale: scales is 'a'; pass a finite number"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{message}"):
        call()
