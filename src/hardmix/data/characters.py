"""Captions to ids that a decoder writes, and back: characters, or words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.vocabulary import words_of

PADDING, BEGIN, END, UNKNOWN = 0, 1, 2, 3
#: ids that belong to no token
SPECIAL = 4
UNITS = ("character", "word")
#: begin, end, and one token
SHORTEST = 3
#: what an unknown token is read back as; no text holds it
REPLACEMENT = "\ufffd"


class CaptionTokenizer:
    """Captions to ids: 0 is padding, 1 the begin, 2 the end, 3 any token that is not in it, the tokens follow from 4.

    `len` counts the four, so it is the number of ids V that a decoder chooses among. `Vocabulary` is for texts that are
    only read: it knows no begin and no end, and there is no way back.

    Args:
        tokens: without repetition; keep them beside the weights of a model, which are of no use without.
        unit: "character", what names and formulas are written with, or "word", see `words_of`.
        max_length: ids of the longest caption, begin and end included, at least 3.

    Raises:
        ValueError: a token twice, an empty one, one of several characters among characters, an unknown unit.

    >>> tokenizer = CaptionTokenizer.build(["red cat", "cat"])
    >>> tokenizer.tokens, tokenizer.max_length
    (('a', 'c', 't', ' ', 'd', 'e', 'r'), 9)
    >>> ids = tokenizer.encode(["cat", "dot"])
    >>> ids.tolist(), tokenizer.decode(ids)
    ([[1, 5, 4, 6, 2], [1, 8, 3, 6, 2]], ['cat', 'd\ufffdt'])
    """

    def __init__(self, tokens: Iterable[str], *, unit: str = "character", max_length: int) -> None:
        who = "CaptionTokenizer"
        self.tokens = tuple(tokens)
        self.unit = _check.choice(who, "unit", unit, UNITS)
        self.max_length = _check.integer(who, "max_length", max_length, SHORTEST)
        longest = 1 if unit == "character" else None
        for token in self.tokens:
            if not isinstance(token, str) or not 0 < len(token) <= (longest or len(token)):
                raise ValueError(f"{who}: tokens holds {token!r:.60}, which is no {unit}; pass {unit}s.")
        self._ids = {token: number for number, token in enumerate(self.tokens, SPECIAL)}
        if len(self._ids) < len(self.tokens):
            twice = next(token for token, count in Counter(self.tokens).items() if count > 1)
            raise ValueError(f"{who}: tokens holds {twice!r:.60} more than once; pass each {unit} once.")

    @classmethod
    def build(
        cls, captions: Iterable[str], *, unit: str = "character", max_length: int = 0, min_count: int = 1
    ) -> CaptionTokenizer:
        """The tokens of the training captions, most frequent first, ties in alphabetical order.

        Args:
            captions: of the training split, no others.
            unit: see the class.
            max_length: a bound of the lengths; 0 for that of the longest caption.
            min_count: tokens that occur less often become unknown.

        Raises:
            ValueError: the captions hold no token that occurs so often.
        """
        who = "CaptionTokenizer.build"
        _check.choice(who, "unit", unit, UNITS)
        _check.integer(who, "min_count", min_count, 1)
        if max_length:
            _check.integer(who, "max_length", max_length, SHORTEST)
        split = [_split(caption, unit) for caption in _checked(who, captions)]
        counts = Counter(token for tokens in split for token in tokens)
        kept = sorted((token for token in counts if counts[token] >= min_count), key=lambda x: (-counts[x], x))
        if not kept:
            raise ValueError(
                f"{who}: {len(split)} captions hold no {unit} that occurs {min_count} times; pass more captions."
            )
        longest = max(map(len, split)) + 2
        return cls(kept, unit=unit, max_length=min(longest, max_length or longest))

    def __len__(self) -> int:
        return SPECIAL + len(self.tokens)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """(N, L) long ids of N captions: begin, tokens, end, then padding.

        L is the length of the longest of them, at most `max_length`; what is longer loses its last tokens and its end,
        since that is not where the caption ends. A caption without a token is begin and end.

        Raises:
            TypeError: one string, or something that is none. ValueError: no captions.
        """
        rows = []
        for caption in _checked("CaptionTokenizer.encode", captions):
            tokens = [self._ids.get(token, UNKNOWN) for token in _split(caption, self.unit)]
            rows.append([BEGIN, *tokens, END][: self.max_length])
        if not rows:
            raise ValueError("CaptionTokenizer.encode: captions is empty; pass at least one.")
        longest = max(map(len, rows))
        return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])

    def decode(self, ids: Tensor) -> list[str]:
        """The captions of ids (N, L): what stands before the first end, without begins and padding.

        Unknown tokens are read as U+FFFD. Words have a space between them, so "it's" comes back as "it 's".

        Raises:
            TypeError, ValueError: not (N, L) integers, or an id that there is not.
        """
        who = "CaptionTokenizer.decode"
        ids = caption_ids(who, _check.tensor(who, "ids", ids).cpu(), len(self))
        joined = "" if self.unit == "character" else " "
        names = ["", "", "", REPLACEMENT, *self.tokens]
        captions = []
        for row in ids.tolist():
            written = row[: row.index(END)] if END in row else row
            captions.append(joined.join(names[number] for number in written if number not in (PADDING, BEGIN)))
        return captions

    def plain(self, caption: str) -> str:
        """The caption as it would be read back if no token were unknown and nothing cut: what to compare captions with.

        >>> CaptionTokenizer(["it"], unit="word", max_length=9).plain("It's 3.5  km")
        "it 's 3 . 5 km"
        """
        return caption if self.unit == "character" else " ".join(words_of(caption))

    def to_dict(self) -> dict[str, Any]:
        """Everything there is, for a JSON file; `from_dict` takes it."""
        return {"unit": self.unit, "max_length": self.max_length, "tokens": list(self.tokens)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CaptionTokenizer:
        """The tokenizer that `to_dict` was called of.

        Raises:
            ValueError: the record lacks something, or holds something else.
        """
        keys = ("unit", "max_length", "tokens")
        if not isinstance(record, Mapping) or set(record) != set(keys) or not isinstance(record["tokens"], list):
            raise ValueError(
                f"CaptionTokenizer.from_dict: record is {record!r:.60}; pass what to_dict gave, {', '.join(keys)}."
            )
        return cls(record["tokens"], unit=record["unit"], max_length=record["max_length"])


def caption_ids(who: str, ids: Tensor, vocabulary: int) -> Tensor:
    """Ids (N, L) below `vocabulary` (looked at on the CPU alone)."""
    ids = _check.batch(who, "ids", ids, 2, 2)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{who}: ids has dtype {ids.dtype}; pass the int64 ids of a tokenizer.")
    if ids.device.type == "cpu":
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{who}: ids holds {low if low < 0 else high}, but there are {vocabulary} ids; use the tokenizer that "
                "the model was built for."
            )
    return ids


def _split(caption: str, unit: str) -> list[str]:
    return list(caption) if unit == "character" else words_of(caption)


def _checked(who: str, captions: Iterable[str]) -> list[str]:
    """The captions as a list of strings."""
    if isinstance(captions, str) or not isinstance(captions, Iterable):
        raise TypeError(f"{who}: captions is a {type(captions).__name__}; pass a list of strings.")
    listed = list(captions)
    wrong = next((caption for caption in listed if not isinstance(caption, str)), None)
    if wrong is not None:
        raise TypeError(f"{who}: captions holds a {type(wrong).__name__}; pass strings.")
    return listed
