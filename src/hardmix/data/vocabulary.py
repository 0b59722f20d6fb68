"""Words to ids, and word vectors from a file of GloVe."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import reason, shown
from hardmix.data.numbers import Texts

PADDING, UNKNOWN = 0, 1
#: ids that belong to no word
SPECIAL = 2
#: standard deviation of the vectors of words that the file lacks; GloVe's own have 0.4 to 0.7
SMALL = 0.1

#: what is split from a word by English spelling (do|n't, it|'s), then words with digits, then single other characters
_WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case.

    >>> words_of("It's 3.5 km, isn't it?")
    ['it', "'s", '3', '.', '5', 'km', ',', 'is', "n't", 'it', '?']
    """
    return _WORD.findall(text.lower())


class Vocabulary:
    """Words to ids: 0 is padding, 1 any word that is not in it, the words follow from 2 on.

    `len` counts the two, so it is the number of rows V that a table of word vectors needs.

    Args:
        words: without repetition; keep them beside the weights of a model, which are of no use without.

    >>> vocabulary = Vocabulary.build([("A cat.",), ("A dog.",)])
    >>> vocabulary.words, vocabulary.encode([("A bird.",), ("Cat",)], max_length=8).tolist()
    (('.', 'a', 'cat', 'dog'), [[[3, 1, 2]], [[4, 0, 0]]])
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(self.words, SPECIAL)}
        if len(self._ids) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"Vocabulary: words holds {twice!r} more than once; pass each word once.")

    @classmethod
    def build(
        cls, texts: Texts, *, min_count: int = 1, others: Texts = (), vectors: Collection[str] = frozenset()
    ) -> Vocabulary:
        """The words of the training texts, most frequent first, ties in alphabetical order.

        Args:
            texts: of the training split, no others.
            min_count: words that occur less often become unknown, unless they have a vector.
            others: texts of the other splits. Their words join, at the end and sorted, only if they have a vector.
            vectors: the words that have one.

        Raises:
            ValueError: the texts hold no word.
        """
        _check.integer("Vocabulary.build", "min_count", min_count, 1)
        counts = Counter(_all_words(texts))
        kept = [word for word, count in counts.items() if count >= min_count or word in vectors]
        if not kept:
            raise ValueError(
                f"Vocabulary.build: {len(texts)} texts hold no word that occurs {min_count} times; pass more texts."
            )
        more = {word for word in _all_words(others) if word in vectors} - counts.keys()
        return cls(sorted(kept, key=lambda word: (-counts[word], word)) + sorted(more))

    def __len__(self) -> int:
        return SPECIAL + len(self.words)

    def encode(self, texts: Texts, max_length: int = 128) -> Tensor:
        """(N, S, L) long ids of N tuples of S = 1 or 2 texts, padded on the right.

        L is the number of words of the longest text, at most `max_length`, at least 1; what is longer loses its end. A
        text without a word is all padding.

        Raises:
            ValueError: no texts, or tuples of different sizes.
        """
        who = "Vocabulary.encode"
        _check.integer(who, "max_length", max_length, 1)
        sizes = {len(sample) for sample in texts}
        if len(sizes) != 1 or not sizes <= {1, 2}:
            raise ValueError(
                f"{who}: texts has {len(texts)} entries of {' and '.join(map(str, sorted(sizes))) or 'no'} texts; "
                "pass tuples of one text each, or of two each."
            )
        rows = [[self._ids.get(word, UNKNOWN) for word in words_of(text)[:max_length]] for s in texts for text in s]
        ids = torch.full((len(rows), max(1, *map(len, rows))), PADDING)
        for row, numbers in zip(ids, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return ids.view(len(texts), -1, ids.shape[1])


class WordVectors(NamedTuple):
    """A vocabulary with a vector for each word.

    Attributes:
        vocabulary: V words, the two special ones included.
        vectors: (V, D) float32. Padding and unknown are zero; a training word that the file lacks has small random
            numbers, so that two of them can be told apart.
        found: (V,) bool, the words that have their vector from the file.
        source: the path of the file.
    """

    vocabulary: Vocabulary
    vectors: Tensor
    found: Tensor
    source: str

    def coverage(self, ids: Tensor) -> float:
        """Share of the words in `ids` (any shape, padding left out) that have their vector from the file."""
        return self.found[ids[ids != PADDING]].double().mean().item()


def find_vectors(folder: Path) -> Path | None:
    """The file with word vectors at or below a folder: `glove*.txt`, or `*_emb.npy` with its `*_index.parquet`.

    Raises:
        ValueError: more than one, since they have different sizes.
    """
    if folder.is_file():
        return folder
    found = sorted(path for pattern in ("glove*.txt", "*_emb.npy") for path in folder.rglob(pattern) if path.is_file())
    if len(found) > 1:
        listed = ", ".join(shown(path.relative_to(folder)) for path in found[:5])
        raise ValueError(
            f"find_vectors: {shown(folder)} holds {len(found)} files of word vectors ({listed}); pass one."
        )
    return found[0] if found else None


def load_vectors(
    path: str | os.PathLike[str], training: Texts, others: Texts = (), *, min_count: int = 1
) -> WordVectors:
    """The vocabulary of some texts with vectors from a file.

    The vocabulary has every word of the training texts, and those words of the other texts that the file has a vector
    for. What a text becomes then depends on itself, the training texts and the file alone: it is what one gets by
    keeping all words of the file, without the rows that no text asks for. Frozen vectors thus serve words that training
    has never seen; where vectors are tuned, those of such words stay as they are in the file.

    Args:
        path: a file, or a folder with one, see `find_vectors`. `glove*.txt` has a word a line and its numbers, with
            spaces between; lines whose word holds a space are passed over. `*_emb.npy` is (W, D), and the first column
            of the `*_index.parquet` beside it has the W words (needs pyarrow).
        training: texts of the training split.
        others: texts of the other splits.
        min_count: see `Vocabulary.build`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, several files, or no vector for any word.
        ImportError: pyarrow is needed and missing.
    """
    who = "load_vectors"
    given = from_home(path)
    file = find_vectors(given) if given.exists() else None
    if file is None:
        kind = "holds no glove*.txt or *_emb.npy" if given.exists() else "is not there"
        raise FileNotFoundError(f"{who}: path is {shown(given)}, which {kind}; pass a file of GloVe's vectors.")
    where = f"{who}: {shown(file)}"
    wanted = {*_all_words(training), *_all_words(others)}
    read = (_array if file.suffix == ".npy" else _lines)(where, file, wanted)
    if not read:
        raise ValueError(f"{where} has no vector for any of the {len(wanted)} words; pass vectors of their language.")
    vocabulary = Vocabulary.build(training, min_count=min_count, others=others, vectors=read.keys())
    found = torch.tensor([False] * SPECIAL + [word in read for word in vocabulary.words])
    size = len(next(iter(read.values())))
    vectors = torch.zeros(len(vocabulary), size)
    # Drawn for training words alone, so that the other texts do not change them.
    lacking = (~found).nonzero()[SPECIAL:, 0]
    vectors[lacking] = SMALL * torch.randn((len(lacking), size), generator=torch.Generator().manual_seed(0))
    rows = np.stack([read[word] for word in vocabulary.words if word in read]).astype(np.float64)
    vectors[found] = torch.from_numpy(rows).float()
    if not bool(vectors.isfinite().all()):
        bad = int((~vectors.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{where} has NaN or infinity for {vocabulary.words[bad - SPECIAL]!r}; fetch it again.")
    return WordVectors(vocabulary, vectors, found, str(file))


def _all_words(texts: Texts) -> Iterator[str]:
    return (word for sample in texts for text in sample for word in words_of(text))


def _lines(where: str, path: Path, wanted: Collection[str]) -> dict[str, Sequence[float]]:
    """Vectors by word, from lines of text; the first one counts where a word comes twice."""
    vectors: dict[str, Sequence[float]] = {}
    size = 0
    try:
        # newline: some words hold characters that Python would end a line at
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                word, _, rest = line.partition(" ")
                size = size or len(rest.split())
                if word not in wanted or word in vectors:
                    continue
                cells = rest.split()
                if len(cells) > size:
                    continue
                try:
                    vectors[word] = [float(cell) for cell in cells]
                except ValueError:
                    cells = []
                if len(cells) < size or not cells:
                    raise ValueError(f"{where} has not {size} numbers after the word in line {number}; fetch it again.")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text; pass GloVe's file of words and numbers.") from None
    except OSError as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); pass another file.") from None
    return vectors


def _array(where: str, path: Path, wanted: Collection[str]) -> dict[str, Sequence[float]]:
    """Vectors by word, from an array and the list of its words."""
    index = path.with_name(f"{path.name.removesuffix('_emb.npy')}_index.parquet")
    if not index.is_file():
        # glove_6B_50d_emb.npy has its words in glove_6B_index.parquet
        beside = sorted(path.parent.glob("*_index.parquet"))
        if len(beside) != 1:
            raise ValueError(
                f"{where} has {len(beside)} files *_index.parquet beside it; put the one of its words there."
            )
        index = beside[0]
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(
            f"{where} has its words in {shown(index)}, which only pyarrow can read; pip install pyarrow, "
            "or pass a glove*.txt."
        ) from None
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        words = pq.ParquetFile(index).read().column(0).to_pylist()
    except (pa.ArrowException, OSError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"{where} or its words are damaged ({type(error).__name__}); fetch them again.") from None
    if values.ndim != 2 or values.dtype.kind != "f" or len(values) != len(words):
        raise ValueError(
            f"{where} is an array {values.shape} of {values.dtype} for {len(words)} words; fetch it again."
        )
    return {word: values[row] for row, word in enumerate(words) if word in wanted}
