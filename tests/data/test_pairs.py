"""Picking parts of image-text pairs, and splits by concept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data.numbers import TEST, TRAIN, VALIDATION
from hardmix.data.pairs import Pairs, draw_split


def made(*, splits: bool = True, styles: bool = True) -> Pairs:
    """Six pictures, each filled with its number: three concepts in two styles."""
    return Pairs(
        torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 2, 2),
        [(f"c{k % 3}", f"more of c{k % 3}") for k in range(6)],
        torch.tensor([0, 1, 2, 0, 1, 2]),
        "made",
        "yours",
        "here",
        [f"picture {k}" for k in range(6)],
        torch.tensor([TRAIN, TEST, VALIDATION] * 2, dtype=torch.uint8) if splits else None,
        torch.tensor([0, 0, 0, 1, 1, 1]) if styles else None,
        ("pen", "ink") if styles else (),
        torch.tensor([0, 1, 0, 0, 1, 0]),
        ("g", "h"),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        ("s", "t", "u"),
    )


def test_rows_keep_all_that_belongs_to_them() -> None:
    got = made().take(torch.tensor([4, 0, 4]))
    assert got.images[:, 0, 0, 0].tolist() == [4, 0, 4]
    assert got.captions == [("c1", "more of c1"), ("c0", "more of c0"), ("c1", "more of c1")]
    assert got.ids == ["picture 4", "picture 0", "picture 4"]
    expected = {
        "concept": [1, 0, 1], "split": [TEST, TRAIN, TEST], "style": [1, 0, 1], "group": [1, 0, 1],
        "subgroup": [1, 0, 1],
    }  # fmt: skip
    assert {key: getattr(got, key).tolist() for key in expected} == expected
    assert got.style_names == ("pen", "ink")
    assert (got.name, got.license, got.source) == ("made", "yours", "here")
    bare = made(splits=False, styles=False).take(torch.tensor([5]))
    assert (bare.split, bare.style, bare.style_names) == (None, None, ())
    assert made().take(torch.tensor([], dtype=torch.long)).captions == []


def test_every_tensor_of_a_field_is_taken() -> None:
    """A field that `take` forgets would keep its six rows."""
    got = made().take(torch.tensor([1]))
    for key, value in got._asdict().items():
        if isinstance(value, (torch.Tensor, list)):
            assert len(value) == 1, key


def test_parts_by_split_and_style() -> None:
    assert made().part("test").ids == ["picture 1", "picture 4"]
    assert made().part("validation", ["ink"]).ids == ["picture 5"]
    assert made().part("train", ("ink", "pen")).ids == ["picture 0", "picture 3"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.part("dev"), ValueError, r"Pairs.part: split is 'dev'; pass one of 'train', 'validation', 'test'"),
        (lambda p: p.part("test", ["inc"]), ValueError, r"styles is 'inc'; .* \(did you mean \"ink\"\?\)"),
        (lambda p: p._replace(split=None).part("test"), ValueError, r"made has no splits; give it some with `draw_s"),
        (lambda p: p._replace(style=None).part("test", ["ink"]), ValueError, r"but made has none; leave it out\."),
        (
            lambda p: p.take(torch.tensor([0, 1])).part("validation", ["pen"]),
            ValueError,
            "nothing for validation in th",
        ),
        (lambda p: p.take([0]), TypeError, "Pairs.take: rows is a list; pass a torch.Tensor"),
        (lambda p: p.take(torch.tensor([True] * 6)), TypeError, r"shape \(6,\) and dtype torch.bool; pass \(M,\) long"),
        (lambda p: p.take(torch.tensor([0, 6])), ValueError, r"rows holds 6; pass rows from 0 to 5\."),
        (lambda p: p.take(torch.tensor([-1])), ValueError, "rows holds -1"),
        (
            lambda p: draw_split(p.concept.float()),
            TypeError,
            r"draw_split: concept has shape \(6,\) and dtype torch.fl",
        ),
        (lambda p: draw_split(p.concept[:0]), TypeError, r"concept has shape \(0,\)"),
        (lambda p: draw_split(p.concept), ValueError, "at least 2 of either are needed"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Pairs], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(made())


@settings(deadline=None, max_examples=50)
@given(concept=st.lists(st.integers(-5, 40), min_size=1, max_size=120), seed=st.integers(0, 2**31))
def test_a_concept_is_drawn_as_a_whole(concept: list[int], seed: int) -> None:
    known = sorted(set(concept))
    tested, validated = round(0.2 * len(known)), round(0.1 * len(known))
    if tested < 2:
        with pytest.raises(ValueError, match="at least 2 of either"):
            draw_split(torch.tensor(concept), seed=seed)
        return
    split = draw_split(torch.tensor(concept), seed=seed)
    assert split.dtype == torch.uint8
    of = dict(zip(concept, split.tolist(), strict=True))
    assert [of[c] for c in concept] == split.tolist()
    assert sum(part == TEST for part in of.values()) == tested
    assert sum(part == VALIDATION for part in of.values()) == validated
    assert torch.equal(split, draw_split(torch.tensor(concept), seed=seed))
    more = draw_split(torch.tensor(concept), validation=0.0, seed=seed)
    assert torch.equal(more == TEST, split == TEST)


def test_the_seed_decides() -> None:
    concept = torch.arange(100)
    assert not torch.equal(draw_split(concept, seed=0), draw_split(concept, seed=1))
