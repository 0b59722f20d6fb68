"""Texts from pictures: a decoder that looks at image tokens, and CoCa, which also brings both sides into one space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.characters import PADDING, SPECIAL, caption_ids
from hardmix.models.pair_model import MAX_SCALE


class KeysValues(NamedTuple):
    """What is attended to: keys and values, both (N, heads, T, width / heads)."""

    keys: Tensor
    values: Tensor


class Cache(NamedTuple):
    """What a decoder remembers of M captions after t ids, and of the N images that they are of.

    M is N, or a multiple with the captions of one image side by side.

    Attributes:
        layers: each layer's keys and values of what was written, T = t; empty before the first id.
        images: those of the image, None for a layer that doesn't look at it.
        length: t.
    """

    layers: tuple[KeysValues, ...]
    images: tuple[KeysValues | None, ...]
    length: int

    def take(self, rows: Tensor) -> Cache:
        """That of the captions `rows` (M,) long; each stays among those of its image."""
        return self._replace(layers=tuple(KeysValues(*(x[rows] for x in layer)) for layer in self.layers))


class Captioner(nn.Module):
    """A transformer that writes a caption token by token, looking at the tokens of an image.

        h   = text layers(word + position)             causal self-attention
        z_t = W norm(layers(h, image))_t               causal self-attention, then attention to the image
        W the word vectors themselves

    Layers normalise what they read (pre-norm) and have a hidden layer of 4 width with GELU.

    Args:
        vocabulary: V, ids that there are, the four special ones of `CaptionTokenizer` included.
        image_width: size C of an image token.
        max_length: ids of the longest caption.
        width: size of a token in here, a multiple of 4 and of `heads`.
        heads: of the attention.
        text_layers: layers that don't see the image, in front of those that do; with some, `text_features` gives the
            text as a whole.
        layers: those that do, at least 1.
        dropout: share of the numbers that training sets to 0, of word vectors and of what each part of a layer adds.

    Shapes: images (N, T, C) tokens, (N, C, H, W) for a map, whose places are told by sines, or (N, C) for one token;
        ids (N, L) long, L from 2 to max_length -> logits (N, L - 1, V), the t-th of them from the image and the ids up
        to t. Padding on the right changes nothing to its left.
    Raises:
        ValueError: sizes out of range or that don't divide, images of another width, an id outside the vocabulary
            (looked for on the CPU alone), captions that are too long.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        image_width: int,
        max_length: int,
        width: int = 192,
        heads: int = 4,
        text_layers: int = 0,
        layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        _check.integer(who, "vocabulary", vocabulary, SPECIAL)
        _check.integer(who, "max_length", max_length, 2)
        _check.integer(who, "text_layers", text_layers, 0)
        _check.integer(who, "layers", layers, 1)
        _check.integer(who, "heads", heads, 1)
        if _check.integer(who, "width", width, 1) % 4 or width % heads:
            raise ValueError(f"{who}: width is {width} and heads is {heads}; pass a width that 4 and the heads divide.")
        self.max_length = max_length
        self.images = ImageTokens(image_width, width)
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(max_length, width))
        # the token that closes a text and sees all of it; it has no position, so padding does not move it
        self.summary = nn.Parameter(torch.empty(width)) if text_layers else None
        self.dropout = nn.Dropout(_check.between(who, "dropout", dropout, 0.0, 1.0))
        self.text = nn.ModuleList(Block(width, heads, dropout, looks=False) for _ in range(text_layers))
        self.write = nn.ModuleList(Block(width, heads, dropout, looks=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)
        for parameter in (self.positions, self.summary):
            if parameter is not None:
                nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        ids = self._ids(ids, 2)
        hidden = self._text(ids[:, :-1], summary=False)
        return self._write(images, hidden)

    def both(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(`text_features(ids)`, `forward(images, ids)`) in one pass through the text layers."""
        ids = self._ids(ids, 2)
        hidden = self._text(ids, summary=True)
        return hidden[:, -1], self._write(images, hidden[:, : ids.shape[1] - 1])

    def text_features(self, ids: Tensor) -> Tensor:
        """(N, width) of texts (N, L) as a whole: what the text layers make of a token after the last one.

        It sees the begin and the end, but no padding; a row of padding alone is like any other such row.
        """
        return self._text(self._ids(ids, 1), summary=True)[:, -1]

    def begin(self, images: Tensor) -> Cache:
        """What `step` starts from: the image tokens as each layer sees them, computed once."""
        tokens = self.images(images)
        return Cache((), tuple(block.look_at(tokens) for block in self._blocks()), 0)

    def step(self, last: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Logits (M, V) of what follows the ids `last` (M,), and the cache with them in it.

        The same as the last logits of `forward` for everything written so far, without computing it again.

        Raises:
            ValueError: max_length ids are in the cache already.
        """
        if cache.length >= self.max_length:
            raise ValueError(
                f"Captioner.step: {cache.length} ids are written, the most that the model was built for; stop there."
            )
        x = self.words(last)[:, None] + self.positions[cache.length]
        layers = []
        for number, (block, image) in enumerate(zip(self._blocks(), cache.images, strict=True)):
            x, known = block(x, image=image, past=cache.layers[number] if cache.layers else None)
            layers.append(known)
        return self._logits(x)[:, 0], Cache(tuple(layers), cache.images, cache.length + 1)

    def _text(self, ids: Tensor, *, summary: bool) -> Tensor:
        """(N, L, width) after the text layers, or (N, L + 1, width) with the summary at the end."""
        n, length = ids.shape
        x = self.words(ids) + self.positions[:length]
        mask = None
        if summary:
            if self.summary is None:
                raise ValueError("Captioner: text_layers is 0, so there is nothing that reads a text as a whole.")
            x = torch.cat([x, self.summary.to(x.dtype).expand(n, 1, -1)], 1)
            causal = torch.ones(length + 1, length + 1, dtype=torch.bool, device=ids.device).tril()
            mask = causal.repeat(n, 1, 1, 1)  # (N, 1, L + 1, L + 1)
            mask[:, 0, -1, :-1] = ids != PADDING
        x = self.dropout(x)
        for block in self.text:
            x, _ = block(x, mask=mask)
        return x

    def _write(self, images: Tensor, hidden: Tensor) -> Tensor:
        tokens = self.images(images)
        if len(tokens) != len(hidden):
            raise ValueError(
                f"Captioner: images has {len(tokens)} rows but ids has {len(hidden)}; pass one caption per image."
            )
        for block in self._blocks()[len(self.text) :]:
            hidden, _ = block(hidden, image=block.look_at(tokens))
        return self._logits(hidden)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", [*self.text, *self.write])

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self.norm(hidden), self.words.weight)

    def _ids(self, ids: Tensor, shortest: int) -> Tensor:
        who = type(self).__name__
        ids = caption_ids(who, ids, self.words.num_embeddings)
        if not shortest <= ids.shape[1] <= self.max_length:
            raise ValueError(
                f"{who}: ids has shape {tuple(ids.shape)}; pass (N, L) with L from {shortest} to the {self.max_length} "
                "that the model was built for."
            )
        return ids


class CoCa(nn.Module):
    """A contrastive captioner: an image encoder, a decoder of texts, and both sides as features of one space.

        tokens = pool_n(encoder(image))        n queries attend to the image
        a = P_v norm(pool_1(tokens))           one query attends to these
        b = P_t norm(summary of the text)      after the text layers, which don't see the image
        logits, from the text and the tokens   as in `Captioner`

    Args:
        image: makes maps (N, C, H, W), tokens (N, T, C) or features (N, C) of what it takes; if it has
            `forward_features`, as the backbones here and timm's have, that is called.
        vocabulary, max_length, width, heads, text_layers, layers, dropout: of the decoder, see `Captioner`; at least
            one text layer.
        image_width: C; None for the encoder's `num_features`.
        features: D, size of the common space.
        queries: n, tokens that an image is pooled to.
        temperature: 1 / s at the start; s = exp(logit_scale) is learnt and no larger than 100.

    Shapes: images as the encoder takes them, ids (N, L) -> (a (N, D), b (N, D), logits (N, L - 1, V), s). Neither a nor
        b has length 1.
    Raises:
        TypeError: an encoder that doesn't say how wide it is. ValueError: as `Captioner`.
    Reference: Yu et al. 2022 (arXiv:2205.01917), poolers in cascade. Here positions of maps are added in front of the
        poolers, and the summary has no position of its own.
    """

    def __init__(
        self,
        image: nn.Module,
        *,
        vocabulary: int,
        max_length: int,
        image_width: int | None = None,
        features: int = 128,
        width: int = 192,
        heads: int = 4,
        text_layers: int = 2,
        layers: int = 2,
        queries: int = 32,
        dropout: float = 0.1,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        found = getattr(image, "num_features", None) if image_width is None else image_width
        if found is None:
            raise TypeError(f"{who}: image is a {type(image).__name__} without num_features; pass image_width.")
        _check.integer(who, "features", features, 1)
        _check.integer(who, "queries", queries, 1)
        _check.integer(who, "text_layers", text_layers, 1)
        scale = 1.0 / _check.positive(who, "temperature", temperature)
        if scale > MAX_SCALE:
            raise ValueError(f"{who}: temperature is {temperature:g}; pass at least {1 / MAX_SCALE:g}.")
        self.image = image
        self.decoder = Captioner(
            vocabulary=vocabulary,
            image_width=width,
            max_length=max_length,
            width=width,
            heads=heads,
            text_layers=text_layers,
            layers=layers,
            dropout=dropout,
        )
        self.tokens = ImageTokens(found, width)
        self.pool = AttentionPool(width, heads, queries)
        self.pool_all = AttentionPool(width, heads, 1)
        self.image_projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, features, bias=False))
        self.text_projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, features, bias=False))
        for part in (self.tokens, self.pool, self.pool_all, self.image_projection, self.text_projection):
            part.apply(_initialise)
        self.features = features
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Tensor:
        """s, no larger than 100."""
        return self.logit_scale.clamp(max=math.log(MAX_SCALE)).exp()

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = self._tokens(images)
        text, logits = self.decoder.both(tokens, ids)
        return self.image_projection(self.pool_all(tokens)[:, 0]), self.text_projection(text), logits, self.scale

    def encode_image(self, images: Tensor) -> Tensor:
        """a (N, D) alone."""
        return self.image_projection(self.pool_all(self._tokens(images))[:, 0])

    def encode_text(self, ids: Tensor) -> Tensor:
        """b (N, D) alone."""
        return self.text_projection(self.decoder.text_features(ids))

    def begin(self, images: Tensor) -> Cache:
        """What writing captions of images starts from; see `Captioner.begin`."""
        return self.decoder.begin(self._tokens(images))

    def step(self, last: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One more id of each caption; see `Captioner.step`."""
        return self.decoder.step(last, cache)

    def _tokens(self, images: Tensor) -> Tensor:
        """(N, n, width)"""
        encode: Callable[[Tensor], Tensor] = getattr(self.image, "forward_features", self.image)
        return self.pool(self.tokens(encode(images)))


class Attention(nn.Module):
    """Queries (M, L, width) to keys and values of N, M a multiple of N: rows of one image are more queries to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, x: Tensor) -> KeysValues:
        n, tokens, width = x.shape
        split = self.key_value(x).view(n, tokens, 2, self.heads, width // self.heads)
        return KeysValues(*split.permute(2, 0, 3, 1, 4))

    def forward(self, x: Tensor, seen: KeysValues, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        m, length, width = x.shape
        n = len(seen.keys)
        q = self.query(x).view(n, m // n * length, self.heads, width // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, seen.keys, seen.values, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(m, length, width))


class Block(nn.Module):
    """x + attention to what was written, x + attention to the image where it looks at that, x + mlp."""

    def __init__(self, width: int, heads: int, dropout: float, *, looks: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width) if looks else None
        self.look = Attention(width, heads) if looks else None
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def look_at(self, tokens: Tensor) -> KeysValues | None:
        """The image's tokens (N, T, width) as this layer sees them, if it does."""
        return None if self.look is None else self.look.keys_values(tokens)

    def forward(
        self,
        x: Tensor,
        *,
        image: KeysValues | None = None,
        mask: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """(M, L, width), and the keys and values of everything written. After a `past`, or as the first, L is 1."""
        h = self.norm1(x)
        known = self.attention.keys_values(h)
        if past is not None:
            known = KeysValues(*(torch.cat(both, 2) for both in zip(past, known, strict=True)))
        x = x + self.dropout(self.attention(h, known, mask, causal=mask is None and past is None))
        if self.look is not None and self.norm2 is not None:
            assert image is not None
            x = x + self.dropout(self.look(self.norm2(x), image))
        return x + self.dropout(self.mlp(self.norm3(x))), known


class AttentionPool(nn.Module):
    """Learnt queries that attend to tokens: (N, T, width) -> (N, queries, width).

    Reference: Lee et al. 2019, Set Transformer (arXiv:1810.00825), as used by Yu et al. 2022.
    """

    def __init__(self, width: int, heads: int, queries: int) -> None:
        super().__init__()
        # of the size of normalised tokens: with small ones all queries would start with the same uniform attention
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.attention.keys_values(self.norm(tokens))
        return self.attention(self.queries.to(tokens.dtype).expand(len(tokens), -1, -1), seen)


class ImageTokens(nn.Module):
    """What an encoder makes of images, as tokens of one width: (N, C), (N, T, C) or (N, C, H, W) -> (N, T, width)."""

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_check.integer("ImageTokens", "image_width", image_width, 1))
        self.linear = nn.Linear(image_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = _check.batch("ImageTokens", "images", x, 2, 4)
        shape, wanted = x.shape, self.linear.in_features
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x.view(len(x), -1, shape[-1])
        if not x.is_floating_point() or tokens.shape[2] != wanted:
            raise ValueError(
                f"ImageTokens: images has shape {tuple(shape)} and dtype {x.dtype}; pass floats (N, T, {wanted}), "
                f"(N, {wanted}, H, W) or (N, {wanted})."
            )
        tokens = self.linear(self.norm(tokens))
        if x.ndim < 4:
            return tokens
        return tokens + grid_positions(shape[2], shape[3], tokens.shape[2]).to(tokens.device, tokens.dtype)


def grid_positions(height: int, width: int, size: int) -> Tensor:
    """(height width, size) sines and cosines of the row in the first half, of the column in the second.

        sin(y w_k), cos(y w_k), sin(x w_k), cos(x w_k),     w_k = 10000^(-4 k / size),  k < size / 4

    A map of another size has the same values at the same place. Reference: Vaswani et al. 2017, in two dimensions.
    """
    k = torch.arange(size // 4)
    rate = torch.exp(k * (-4.0 * math.log(10_000.0) / size))
    halves = []
    for length, shape in ((height, (height, 1, -1)), (width, (1, width, -1))):
        angle = torch.arange(length)[:, None] * rate
        halves.append(torch.cat([angle.sin(), angle.cos()], 1).view(shape).expand(height, width, -1))
    return torch.cat(halves, 2).flatten(0, 1)


def _initialise(module: nn.Module) -> None:
    """Xavier's weights, which keep attention from starting out uniform where tokens are narrow; word vectors whose
    products with normalised tokens are of the size of 1."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
