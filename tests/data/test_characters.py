"""Captions to ids and back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data.characters import BEGIN, END, PADDING, UNKNOWN, CaptionTokenizer
from hardmix.data.emoji import load_emoji

CAPTIONS = ["a red cat", "two cats", ""]


def test_characters_most_frequent_first_then_by_alphabet() -> None:
    tokenizer = CaptionTokenizer.build(CAPTIONS)
    assert tokenizer.tokens == (" ", "a", "t", "c", "d", "e", "o", "r", "s", "w")
    assert len(tokenizer) == 14
    assert tokenizer.max_length == 11
    assert CaptionTokenizer.build(CAPTIONS, min_count=3).tokens == (" ", "a", "t")


def test_words_are_those_of_the_vocabulary() -> None:
    tokenizer = CaptionTokenizer.build(["Isn't it a cat?", "It is."], unit="word")
    assert tokenizer.tokens == ("is", "it", ".", "?", "a", "cat", "n't")
    assert tokenizer.decode(tokenizer.encode(["It isn't a   Cat."])) == ["it is n't a cat ."]
    assert tokenizer.plain("It isn't a   Cat.") == "it is n't a cat ."
    assert tokenizer.encode(["a dog"]).tolist() == [[BEGIN, 8, UNKNOWN, END]]


def test_begin_tokens_end_padding() -> None:
    tokenizer = CaptionTokenizer("abc", max_length=5)
    ids = tokenizer.encode(["ab", "", "c"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[1, 4, 5, 2], [1, 2, 0, 0], [1, 6, 2, 0]]
    assert tokenizer.encode([""]).tolist() == [[1, 2]]
    assert tokenizer.decode(ids) == ["ab", "", "c"]


def test_what_is_too_long_loses_its_end() -> None:
    tokenizer = CaptionTokenizer("abc", max_length=5)
    ids = tokenizer.encode(["abcabc", "abc", "abca"])
    assert ids.tolist() == [[1, 4, 5, 6, 4], [1, 4, 5, 6, 2], [1, 4, 5, 6, 4]]
    assert tokenizer.decode(ids) == ["abca", "abc", "abca"]
    assert CaptionTokenizer.build(["abcdef"], max_length=4).max_length == 4
    assert CaptionTokenizer.build(["abcdef"], max_length=40).max_length == 8


def test_reading_stops_at_the_first_end() -> None:
    tokenizer = CaptionTokenizer("abc", max_length=9)
    ids = torch.tensor([[1, 4, 2, 5, 2], [4, 0, 1, 5, 6], [2, 4, 4, 4, 4], [1, 3, 4, 2, 0]])
    assert tokenizer.decode(ids) == ["a", "abc", "", "\ufffda"]
    assert tokenizer.decode(ids.int()) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=6), st.lists(st.text(), min_size=1, max_size=4))
def test_there_and_back(training: list[str], others: list[str]) -> None:
    tokenizer = CaptionTokenizer.build(training)
    assert tokenizer.decode(tokenizer.encode(training)) == training
    known = set(tokenizer.tokens)
    back = tokenizer.decode(tokenizer.encode(others))
    cut = [text if len(text) + 2 <= tokenizer.max_length else text[: tokenizer.max_length - 1] for text in others]
    assert back == ["".join(c if c in known else "\ufffd" for c in text) for text in cut]
    again = CaptionTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert torch.equal(again.encode(others), tokenizer.encode(others))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ab' .X9", min_size=1), min_size=1, max_size=6).filter(lambda x: any(t.strip() for t in x)))
def test_words_there_and_back(training: list[str]) -> None:
    tokenizer = CaptionTokenizer.build(training, unit="word")
    back = tokenizer.decode(tokenizer.encode(training))
    assert back == [tokenizer.plain(text) for text in training]
    assert PADDING not in [len(text.split()) for text in back if text]


def test_names_of_emoji_come_back() -> None:
    names = [texts[0] for texts in load_emoji(("noto",)).captions]
    tokenizer = CaptionTokenizer.build(names)
    ids = tokenizer.encode(names)
    assert tokenizer.decode(ids) == names
    assert ids.shape == (len(names), tokenizer.max_length)
    assert (ids[:, 0] == BEGIN).all()
    assert ((ids == END).sum(1) == 1).all()


def test_the_record_is_plain() -> None:
    tokenizer = CaptionTokenizer.build(["one cat"], unit="word")
    assert tokenizer.to_dict() == {"unit": "word", "max_length": 4, "tokens": ["cat", "one"]}


TOKENIZER = CaptionTokenizer("abc", max_length=9)
RECORD = TOKENIZER.to_dict()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: CaptionTokenizer("aba", max_length=9), ValueError, "CaptionTokenizer: tokens holds 'a' more than"),
        (lambda: CaptionTokenizer(["ab"], max_length=9), ValueError, "CaptionTokenizer: tokens holds 'ab', which is"),
        (lambda: CaptionTokenizer([""], unit="word", max_length=9), ValueError, "CaptionTokenizer: tokens holds '', w"),
        (lambda: CaptionTokenizer([["a"]], max_length=9), ValueError, "CaptionTokenizer: tokens holds ['a'], which"),
        (lambda: CaptionTokenizer("ab", unit="words", max_length=9), ValueError, "CaptionTokenizer: unit is 'words'; "),
        (lambda: CaptionTokenizer("ab", max_length=2), ValueError, "CaptionTokenizer: max_length is 2; pass an integ"),
        (lambda: CaptionTokenizer.build(["", ""]), ValueError, "CaptionTokenizer.build: 2 captions hold no character "),
        (lambda: CaptionTokenizer.build(["."], min_count=2, unit="word"), ValueError, "CaptionTokenizer.build: 1 capt"),
        (lambda: CaptionTokenizer.build("abc"), TypeError, "CaptionTokenizer.build: captions is a str; pass a list"),
        (lambda: CaptionTokenizer.build(["a"], min_count=0), ValueError, "CaptionTokenizer.build: min_count is 0; pa"),
        (lambda: CaptionTokenizer.build(["a"], max_length=2), ValueError, "CaptionTokenizer.build: max_length is 2; "),
        (lambda: TOKENIZER.encode("abc"), TypeError, "CaptionTokenizer.encode: captions is a str; pass a list of stri"),
        (lambda: TOKENIZER.encode(None), TypeError, "CaptionTokenizer.encode: captions is a NoneType; pass a list of "),
        (lambda: TOKENIZER.encode([("a",)]), TypeError, "CaptionTokenizer.encode: captions holds a tuple; pass strin"),
        (lambda: TOKENIZER.encode([]), ValueError, "CaptionTokenizer.encode: captions is empty; pass at least one."),
        (lambda: TOKENIZER.decode([[1]]), TypeError, "CaptionTokenizer.decode: ids is a list; pass a torch.Tensor."),
        (lambda: TOKENIZER.decode(torch.ones(1, 2)), TypeError, "CaptionTokenizer.decode: ids has dtype torch.float32"),
        (lambda: TOKENIZER.decode(torch.ones(2).long()), ValueError, "CaptionTokenizer.decode: ids has shape (2,); p"),
        (lambda: TOKENIZER.decode(torch.tensor([[1, 7]])), ValueError, "CaptionTokenizer.decode: ids holds 7, but th"),
        (lambda: TOKENIZER.decode(torch.tensor([[-1]])), ValueError, "CaptionTokenizer.decode: ids holds -1, but the"),
        (lambda: CaptionTokenizer.from_dict({}), ValueError, "CaptionTokenizer.from_dict: record is {}; pass what to"),
        (lambda: CaptionTokenizer.from_dict(RECORD | {"tokens": "abc"}), ValueError, "CaptionTokenizer.from_dict: re"),
        (lambda: CaptionTokenizer.from_dict(RECORD | {"unit": 3}), TypeError, "CaptionTokenizer: unit is 3; pass on"),
    ],
)  # fmt: skip
def test_messages(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        call()
