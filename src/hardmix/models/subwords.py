"""Texts as pieces of words, hashed: no vocabulary, so any text can be read at any time."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.vocabulary import PADDING, words_of
from hardmix.models.text import text_ids

#: characters of a piece, the marks at both ends of a word included
SHORTEST, LONGEST = 3, 5
#: pieces that are read of a text, those of about 35 words; what is longer loses its end
MAX_PIECES = 512
#: standard deviation of a fresh vector; the mean of many is smaller, and layer norm brings it to 1
SMALL = 0.1


def pieces_of(word: str) -> list[str]:
    """The word between marks, then its pieces of 3 to 5 characters, the marks being characters.

    >>> pieces_of("cat")
    ['<cat>', '<ca', 'cat', 'at>', '<cat', 'cat>']
    """
    marked = f"<{word}>"
    sizes = range(SHORTEST, min(LONGEST, len(marked) - 1) + 1)
    return [marked, *(marked[at : at + size] for size in sizes for at in range(len(marked) - size + 1))]


def subword_ids(texts: Sequence[str], buckets: int) -> Tensor:
    """(N, L) long ids of the pieces of N texts, padded with 0 on the right to the longest.

        id = 1 + crc32(the piece as UTF-8) mod buckets

    Texts become words as in `words_of`, in lower case. The ids depend on the text and `buckets` alone. Pieces with the
    same hash share an id. A text without a word is padding alone; of a text with more than 512 pieces, the first count.

    Raises:
        TypeError, ValueError: not a list of texts, or an empty one.

    >>> subword_ids(["A cat", ""], 1000).tolist()
    [[516, 666, 525, 833, 277, 680, 240], [0, 0, 0, 0, 0, 0, 0]]
    """
    who = "subwords"
    _check.integer(who, "buckets", buckets, 1)
    known: dict[str, list[int]] = {}
    rows = []
    for text in plain_texts(who, texts):
        row: list[int] = []
        for word in words_of(text):
            if word not in known:
                known[word] = [1 + crc32(piece.encode("utf-8", "replace")) % buckets for piece in pieces_of(word)]
            row += known[word]
            if len(row) >= MAX_PIECES:
                break
        rows.append(row[:MAX_PIECES])
    ids = torch.full((len(rows), max(1, *map(len, rows))), PADDING, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids


class SubwordNet(nn.Module):
    """The mean of the vectors of all pieces of a text, then one residual layer.

        e = mean_k w_k,   h = norm(e),   z = h + V gelu(U h)

    Args:
        buckets: ids that pieces are hashed to; padding is one more.
        width: size of a vector, of the hidden layer, and of the features.
        dropout: share of the numbers of h and of the hidden layer that training sets to 0.

    Shapes: ids (N, L) from `subword_ids` with the same `buckets` -> features (N, width). The mean of a text without a
        word is 0.
    Raises:
        ValueError: an id outside the buckets (looked for on the CPU alone), or sizes out of range.
    Reference: Bojanowski et al. 2017, section 3.2 (arXiv:1607.04606), for pieces, marks and hashing. There they have 3
        to 6 characters and the hash is FNV-1a.
    """

    def __init__(self, *, buckets: int = 2**15, width: int = 128, dropout: float = 0.2) -> None:
        super().__init__()
        who = "subwords"
        _check.integer(who, "buckets", buckets, 1)
        _check.integer(who, "width", width, 1)
        _check.between(who, "dropout", dropout, 0.0, 1.0)
        self.pieces = nn.EmbeddingBag(buckets + 1, width, mode="mean", padding_idx=PADDING)
        nn.init.normal_(self.pieces.weight, std=SMALL)
        with torch.no_grad():
            self.pieces.weight[PADDING] = 0.0
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.features = width

    def forward(self, ids: Tensor) -> Tensor:
        ids = _check.batch("subwords", "ids", ids, 2, 2)
        ids = text_ids("subwords", ids.unsqueeze(1), False, self.pieces.num_embeddings).squeeze(1)
        h = self.dropout(self.norm(self.pieces(ids)))
        return h + self.hidden(h)


def plain_texts(who: str, texts: object) -> Sequence[str]:
    """One or more texts in a list or tuple."""
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"{who}: texts is a {type(texts).__name__}; pass a list of texts.")
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"{who}: texts has a {type(texts[wrong]).__name__} in entry {wrong}; pass texts alone.")
    if not texts:
        raise ValueError(f"{who}: texts has no entries; pass at least one.")
    return texts
