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
        (lambda p: draw_split([("a",), ()]), ValueError, "draw_split: picture 1 has no text; leave it out"),
        (lambda p: draw_split([]), ValueError, "0 of 0 groups of pictures with common texts are left for training"),
        (lambda p: draw_split(p.captions, test=1.5), ValueError, "draw_split: test is 1.5"),
        (
            lambda p: draw_split([("a", str(k)) for k in range(99)]),
            ValueError,
            ". of 1 groups of pictures with common texts are left",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Pairs], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(made())


@settings(deadline=None, max_examples=50)
@given(
    captions=st.lists(st.lists(st.sampled_from([f"text {k}" for k in range(60)]), min_size=1, max_size=2), min_size=40),
    seed=st.integers(0, 2**31),
)
def test_no_text_is_in_two_splits(captions: list[list[str]], seed: int) -> None:
    try:
        split = draw_split(captions, test=0.4, validation=0.2, seed=seed)
    except ValueError:  # common texts have made too few groups
        return
    assert (len(split), split.dtype) == (len(captions), torch.uint8)
    where: dict[str, set[int]] = {}
    for texts, part in zip(captions, split.tolist(), strict=True):
        for text in texts:
            where.setdefault(text, set()).add(part)
    assert all(len(parts) == 1 for parts in where.values())
    assert {TRAIN, TEST} <= set(split.tolist())


def test_pictures_that_come_along_leave_the_others_where_they_are() -> None:
    captions = [(f"thing {k}", f"a drawing of thing {k}") for k in range(2000)]
    split = draw_split(captions)
    assert torch.equal(split, draw_split(captions + [(f"zebra {k}",) for k in range(500)])[:2000])
    shares = split.bincount() / 2000
    assert torch.allclose(shares[[TRAIN, VALIDATION, TEST]], torch.tensor([0.7, 0.1, 0.2]), atol=0.03)
    more = draw_split(captions, validation=0.0)
    assert torch.equal(more == TEST, split == TEST)
    assert not torch.equal(split, draw_split(captions, seed=1))


def test_case_and_spaces_make_no_other_text() -> None:
    texts = [f"the {k} caf\u00e9" for k in range(50)]
    spelled = [texts, [text.upper() for text in texts], [text.replace(" ", "  ") for text in texts]]
    spelled.append([text.replace("\u00e9", "e\u0301") for text in texts])
    split = draw_split([(text,) for of in spelled for text in of], test=0.4)
    assert (split.view(4, 50) == split[:50]).all()
