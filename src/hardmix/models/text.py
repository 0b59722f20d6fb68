"""Encoders of texts, and of pairs of texts, that learn from the training split alone or start from word vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hardmix import _check
from hardmix.data.vocabulary import PADDING, UNKNOWN


def pair_features(z: Tensor) -> Tensor:
    """What a head sees of N samples of S texts with D features each: (N, S, D) -> (N, D) or (N, 4 D).

        S = 1: z_1        S = 2: [z_1, z_2, |z_1 - z_2|, z_1 z_2]

    Reference: Conneau et al. 2017, Supervised Learning of Universal Sentence Representations (arXiv:1705.02364).
    """
    if z.shape[1] == 1:
        return z[:, 0]
    first, second = z.unbind(1)
    return torch.cat([first, second, (first - second).abs(), first * second], 1)


def text_ids(who: str, ids: Tensor, pair: bool, vocabulary: int) -> Tensor:
    """Ids (N, S, L) with the S that the model was built for, below `vocabulary` (looked at on the CPU alone)."""
    ids = _check.batch(who, "ids", ids, 3, 3)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{who}: ids has dtype {ids.dtype}; pass the int64 ids of words.")
    if ids.shape[1] != 1 + pair:
        texts = "pairs of texts" if pair else "single texts"
        raise ValueError(f"{who}: ids has shape {tuple(ids.shape)}; pass (N, {1 + pair}, L), the model is for {texts}.")
    if ids.device.type == "cpu":
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{who}: ids holds {low if low < 0 else high}, but the model knows {vocabulary} ids; "
                "encode the texts with the vocabulary that it was built for."
            )
    return ids


class BiLSTM(nn.Module):
    """Word vectors, an LSTM in each direction, the maximum over the words of a text.

        h_t = [forward LSTM(w_1 .. w_t), backward LSTM(w_L .. w_t)],  z_d = max_t h_td

    Both texts of a pair go through the same weights in one pass, see `pair_features`. Padding on the right never
    reaches an LSTM nor the maximum. A text without a word counts as one word of which nothing is known.

    Args:
        vocabulary: V, ids that there are, padding (0) and unknown (1) included.
        embedding: E, size of a word vector that is learnt; `vectors` have their own.
        width: size of an LSTM in each direction.
        layers: LSTMs on top of each other.
        dropout: share of the numbers of word vectors, and of what is between two layers, that training sets to 0.
        pair: samples are pairs of texts, not single ones.
        vectors: (V, E) word vectors to start from.
        tune_vectors: train them too; otherwise they stay as they are.

    Shapes: ids (N, S, L) long -> features (N, D) with D = 2 width, or 8 width for pairs; `features` is D.
    Raises:
        ValueError: an id outside the vocabulary (looked for on the CPU alone), another S, or sizes out of range.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        embedding: int = 100,
        width: int = 128,
        layers: int = 1,
        dropout: float = 0.2,
        pair: bool = False,
        vectors: Tensor | None = None,
        tune_vectors: bool = False,
    ) -> None:
        super().__init__()
        who = "BiLSTM"
        _check.integer(who, "width", width, 1)
        _check.integer(who, "layers", layers, 1)
        self.words = _word_vectors(who, vocabulary, embedding, vectors, tune_vectors)
        self.dropout = nn.Dropout(_check.between(who, "dropout", dropout, 0.0, 1.0))
        self.lstm = nn.LSTM(
            self.words.embedding_dim,
            width,
            layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,
        )
        self.pair = pair
        self.features = 2 * width * (4 if pair else 1)

    def forward(self, ids: Tensor) -> Tensor:
        ids = text_ids("BiLSTM", ids, self.pair, self.words.num_embeddings)
        rows = ids.flatten(0, 1)  # (N S, L)
        length = (rows != PADDING).sum(1).clamp(min=1).cpu()
        words = self.dropout(self.words(rows))
        packed = self.lstm(pack_padded_sequence(words, length, batch_first=True, enforce_sorted=False))[0]
        # Padding comes back as -inf, which no word is below.
        hidden, _ = pad_packed_sequence(packed, batch_first=True, padding_value=-torch.inf)
        return pair_features(hidden.amax(1).view(*ids.shape[:2], -1))


class WordMean(nn.Module):
    """The mean of the word vectors of a text and one layer with ReLU: a baseline that knows no order of words.

        z = ReLU(W mean_t w_t + b)

    Args: as of `BiLSTM`; `width` is the size of the layer.
    Shapes: ids (N, S, L) long -> features (N, D) with D = width, or 4 width for pairs; `features` is D. The mean of a
        text without a word is 0.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        embedding: int = 100,
        width: int = 128,
        pair: bool = False,
        vectors: Tensor | None = None,
        tune_vectors: bool = False,
    ) -> None:
        super().__init__()
        _check.integer("WordMean", "width", width, 1)
        self.words = _word_vectors("WordMean", vocabulary, embedding, vectors, tune_vectors)
        self.layer = nn.Sequential(nn.Linear(self.words.embedding_dim, width), nn.ReLU())
        self.pair = pair
        self.features = width * (4 if pair else 1)

    def forward(self, ids: Tensor) -> Tensor:
        ids = text_ids("WordMean", ids, self.pair, self.words.num_embeddings)
        count = (ids != PADDING).sum(2, keepdim=True).clamp(min=1)
        return pair_features(self.layer(self.words(ids).sum(2) / count))  # the vector of padding is zero


def _word_vectors(who: str, vocabulary: int, size: int, vectors: Tensor | None, tune: bool) -> nn.Embedding:
    """A table of word vectors, in which padding is zero and stays so; unknown starts as zero unless it is given."""
    _check.integer(who, "vocabulary", vocabulary, 2)
    _check.integer(who, "embedding", size, 1)
    if vectors is None:
        table = nn.Embedding(vocabulary, size, padding_idx=PADDING)
        with torch.no_grad():
            table.weight[UNKNOWN] = 0.0
        return table
    vectors = _check.batch(who, "vectors", vectors, 2, 2)
    _check.finite(who, "vectors", vectors)
    _check.same_length(who, "vectors", vectors, "the vocabulary", vocabulary)
    own = vectors.detach().float().clone()
    own[PADDING] = 0.0
    return nn.Embedding.from_pretrained(own, freeze=not tune, padding_idx=PADDING)
