"""Metrics of captions: values by hand, slow references in fractions and dense vectors, the authors' code."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.metrics import caption_metrics, cider_scores

CAPTION = st.lists(st.sampled_from(["a", "cat", "dog", "on", "mat"]), max_size=7).map(" ".join)
SETS = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=3)), min_size=1, max_size=6)


def grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]


def slow_bleu(candidates: list[list[str]], references: list[list[list[str]]], order: int) -> float:
    """Every n-gram of every caption in turn, in whole numbers."""
    precisions = []
    for n in range(1, order + 1):
        right = whole = 0
        for c, targets in zip(candidates, references, strict=True):
            own = grams(c, n)
            whole += len(own)
            right += sum(min(own.count(g), max(grams(r, n).count(g) for r in targets)) for g in set(own))
        precisions.append(Fraction(right, whole) if whole else Fraction(0))
    if not all(precisions):
        return 0.0
    length = sum(map(len, candidates))
    nearest = sum(
        min((abs(len(r) - len(c)), len(r)) for r in targets)[1]
        for c, targets in zip(candidates, references, strict=True)
    )
    brevity = 1.0 if length > nearest else math.exp(1 - nearest / length)
    return brevity * float(math.prod(precisions)) ** (1 / order)


def slow_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """By recursion over the first tokens."""

    @cache
    def rest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        return min(rest(i + 1, j) + 1, rest(i, j + 1) + 1, rest(i + 1, j + 1) + (a[i] != b[j]))

    return rest(0, 0)


def slow_cider(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Dense vectors over all n-grams that occur anywhere."""
    count = len(candidates)
    scores = []
    for c, targets in zip(candidates, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            every = sorted({g for side in (candidates, *references) for text in side for g in grams(text, n)})
            seen = [sum(any(g in grams(r, n) for r in of_one) for of_one in references) for g in every]
            rarity = [math.log(count / max(1, images)) for images in seen]

            def vector(tokens: list[str], n: int = n, every: Any = every, rarity: Any = rarity) -> list[float]:
                return [grams(tokens, n).count(g) * weight for g, weight in zip(every, rarity, strict=True)]

            own = vector(c)
            for r in targets:
                theirs = vector(r)
                norms = math.hypot(*own) * math.hypot(*theirs)
                common = sum(min(x, y) * y for x, y in zip(own, theirs, strict=True))
                penalty = math.exp(-((len(c) - len(r)) ** 2) / 72)
                total += 10 * penalty * (common / norms if norms else 0.0) / 4 / len(targets)
        scores.append(total)
    return scores


@settings(deadline=None, max_examples=60)
@given(SETS)
def test_any_captions(pairs: list[tuple[str, list[str]]]) -> None:
    candidates, references = [c for c, _ in pairs], [r for _, r in pairs]
    split = [c.split() for c in candidates], [[t.split() for t in r] for r in references]
    found = caption_metrics(candidates, references)
    assert list(found) == ["exact_match", "edit_distance", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider"]
    for n in (1, 2, 3, 4):
        assert found[f"bleu_{n}"] == pytest.approx(slow_bleu(*split, n), rel=1e-5, abs=1e-6)
    want = slow_cider(*split)
    assert cider_scores(candidates, references) == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert found["cider"] == pytest.approx(sum(want) / len(want), rel=1e-12, abs=1e-12)
    distances = [
        min(slow_distance(tuple(c), tuple(t)) / max(len(c), len(t), 1) for t in r) for c, r in zip(*split, strict=True)
    ]
    assert found["edit_distance"] == pytest.approx(sum(distances) / len(pairs), rel=1e-12, abs=1e-12)
    assert found["exact_match"] == sum(c in r for c, r in pairs) / len(pairs)
    # the same with a character for each word, and the space as one of them
    letters = {"a": "A", "cat": "\u2603", "dog": " ", "on": "\n", "mat": "M"}
    as_letters = [["".join(letters[w] for w in text.split()) for text in side] for side in (candidates, *references)]
    assert caption_metrics(as_letters[0], as_letters[1:], unit="character") == found
    assert cider_scores(as_letters[0], as_letters[1:], unit="character") == pytest.approx(want, abs=1e-12)


def test_numbers_of_the_authors_cider() -> None:
    """From pycocoevalcap 1.2, CiderScorer(n=4, sigma=6.0)."""
    candidates = ["a man rides a horse", "two dogs play in the snow", "a plate of food on a table", "a red bus"]
    references = [
        ["a man riding a horse on a beach", "a man rides a brown horse"],
        ["two dogs in the snow", "dogs play in snow"],
        ["a plate of food on the table"],
        ["a bus on a street", "the red bus"],
    ]
    want = [4.2226485132168, 4.368378750609327, 6.980264433777112, 2.4523288942946326]
    assert cider_scores(candidates, references) == pytest.approx(want, rel=1e-12)


def test_the_authors_cider_where_it_is_installed() -> None:
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    words = ["a", "cat", "dog", "on", "the", "mat", "sits", "small", "big", "red"]
    candidates = [" ".join(words[(i * k) % 10] for k in range(1, 3 + i % 7)) for i in range(1, 40)]
    references = [
        [" ".join(words[(i * k + j) % 10] for k in range(1, 3 + i % 5)) for j in (0, 3)] for i in range(1, 40)
    ]
    theirs = scorer.CiderScorer(n=4, sigma=6.0)
    for candidate, targets in zip(candidates, references, strict=True):
        theirs += (candidate, targets)
    assert cider_scores(candidates, references) == pytest.approx(theirs.compute_score()[1].tolist(), rel=1e-12)


def test_values_by_hand() -> None:
    found = caption_metrics(["a cat sat", "dogs"], [["a cat sat"], ["two dogs", "dog"]])
    assert found["exact_match"] == 0.5
    assert found["edit_distance"] == pytest.approx(0.25)  # one of two words is missing
    assert found["bleu_1"] == pytest.approx(1.0)  # the nearest of two lengths is that of "dog"
    assert found["bleu_2"] == pytest.approx(1.0)
    assert found["bleu_4"] == 0.0  # there is none of four words
    assert caption_metrics(["kitten"], [["sitting"]], unit="character")["edit_distance"] == pytest.approx(3 / 7)
    short = caption_metrics(["a"], [["a b c d"]])
    assert short["bleu_1"] == pytest.approx(math.exp(-3))


def test_the_example_of_papineni() -> None:
    """Seven times the same word: clipped to the two that a reference has."""
    found = caption_metrics(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert found["bleu_1"] == pytest.approx(2 / 7)


def test_perfect_captions() -> None:
    captions = ["one two three four five", "six seven eight nine ten", "eleven twelve thirteen fourteen fifteen"]
    found = caption_metrics(captions, [[text] for text in captions])
    assert found == pytest.approx(
        {"exact_match": 1, "edit_distance": 0, "cider": 10} | {f"bleu_{n}": 1 for n in range(1, 5)}
    )
    # in another order nothing is left but the length
    turned = caption_metrics(captions[1:] + captions[:1], [[text] for text in captions])
    assert turned == pytest.approx(
        {"exact_match": 0, "edit_distance": 1, "cider": 0} | {f"bleu_{n}": 0 for n in range(1, 5)}
    )


def test_rare_words_count_more() -> None:
    references = [[f"a picture of {thing}"] for thing in ("cats", "dogs", "mice", "owls")]
    rare, common = (
        cider_scores(["cats"] + ["x"] * 3, references)[0],
        cider_scores(["picture"] + ["x"] * 3, references)[0],
    )
    assert rare > 1
    assert common == 0.0


def test_where_no_reference_is_rare_cider_is_zero() -> None:
    assert caption_metrics(["a cat", "a dog"], [["a cat"], ["a cat"]])["cider"] == 0.0
    assert caption_metrics(["a cat", "a cat"], [["a cat"], ["a dog"]])["cider"] > 0.0


def test_one_image_alone_and_empty_captions() -> None:
    assert cider_scores(["a cat"], [["a cat"]]) == [0.0]
    found = caption_metrics(["", "", "a"], [[""], ["a b"], [""]])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["edit_distance"] == pytest.approx(2 / 3)
    assert found["bleu_1"] == found["cider"] == 0.0


def test_white_space_is_nothing_between_words_and_a_character_else() -> None:
    assert caption_metrics(["a  cat "], [["a cat"]])["exact_match"] == 1.0
    found = caption_metrics(["a  cat"], [["a cat"]], unit="character")
    assert found["exact_match"] == 0.0
    assert found["edit_distance"] == pytest.approx(1 / 6)


def test_of_several_references_the_nearest_counts() -> None:
    found = caption_metrics(["a b c", "x"], [["q", "a b d", "a b c"], ["y", "z"]])
    assert found["exact_match"] == 0.5
    assert found["edit_distance"] == 0.5
    one = caption_metrics(["a b c", "x"], [["q"], ["y"]])
    assert one["edit_distance"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((["a"], [["a"]], "letter"), ValueError, "unit is 'letter'; pass one of 'word', 'character'"),
        (("a", [["a"]], "word"), TypeError, "candidates is a str; pass a list of strings."),
        ((None, [["a"]], "word"), TypeError, "candidates is a NoneType; pass a list of strings."),
        ((["a"], "a", "word"), TypeError, "references is a str; pass a list of lists of strings."),
        ((["a"], ["a"], "word"), TypeError, "references of row 0 are a str; pass a list of strings."),
        (([], [], "word"), ValueError, "there are 0 candidates and lists of references for 0; pass a list"),
        ((["a"], [["a"], ["b"]], "word"), ValueError, "there are 1 candidates and lists of references for 2; pass a"),
        ((["a", "b"], [["a"], []], "word"), ValueError, "row 1 has no reference; pass at least one, or leave the"),
        ((["a", 3], [["a"], ["b"]], "word"), TypeError, "row 1 holds a int; pass strings."),
        ((["a", "b"], [["a"], [b"b"]], "word"), TypeError, "row 1 holds a bytes; pass strings."),
    ],
)  # fmt: skip
def test_messages(arguments: tuple[Any, Any, str], kind: type[Exception], message: str) -> None:
    candidates, references, unit = arguments
    for call in (caption_metrics, cider_scores):
        with pytest.raises(kind, match=f"^{call.__name__}: {re.escape(message)}"):
            call(candidates, references, unit=unit)
