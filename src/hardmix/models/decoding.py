"""Captions from a model that gives the probabilities of the next token: greedy and beam search, many images at once.

Padding and begin are never written: their probability is 0, and those of the rest sum to one. Among equally probable
tokens the one with the smaller id is taken, and of equally probable captions the one whose beam comes first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.characters import BEGIN, END, PADDING, CaptionTokenizer
from hardmix.models.captioner import Captioner, CoCa

#: the largest exponent of the length penalty; beyond that nothing but the length counts
MAX_PENALTY = 10.0


class Writer(Protocol):
    """What the searches ask of a model; `Captioner` and `CoCa` have it. `Cache.take` is asked for by beams alone."""

    def begin(self, images: Tensor) -> Any:
        """The cache of N captions without an id."""

    def step(self, last: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits (M, V) after M further ids `last`, and the cache that has them; M = N, or N times the beams."""


class Beams(NamedTuple):
    """K captions of each image, finished ones first, the best first.

    Attributes:
        ids: (N, K, L) long, begin first, padding after the end; no end where `max_length` cut a caption.
        scores: (N, K) float32 or wider, log-probabilities over the length penalty; -inf, with ids of padding, where
            fewer than K captions can be written.
    """

    ids: Tensor
    scores: Tensor


@torch.no_grad()
def greedy_search(model: Writer, images: Tensor, *, max_length: int) -> Tensor:
    """The most probable next token, again and again: ids (N, L) as a tokenizer would give them.

    Args:
        model: in evaluation mode, if it has one.
        images: what its `begin` takes, N of them, on its device.
        max_length: ids at most, begin and end included. A caption that is longer has no end.

    Raises:
        ValueError: logits that are NaN, or a length that the model was not built for.
    """
    who = "greedy_search"
    _check.integer(who, "max_length", max_length, 2)
    images = _check.batch(who, "images", images, 2, 5)
    last = torch.full((len(images),), BEGIN, device=images.device)
    done = torch.zeros_like(last, dtype=torch.bool)
    ids, cache = [last], model.begin(images)
    for _ in range(max_length - 1):
        logits, cache = model.step(last, cache)
        last = _log_probabilities(who, logits).argmax(1).masked_fill(done, PADDING)
        ids.append(last)
        done = done | (last == END)
        if bool(done.all()):
            break
    return torch.stack(ids, 1)


@torch.no_grad()
def beam_search(
    model: Writer, images: Tensor, *, beams: int = 4, max_length: int, length_penalty: float = 0.6
) -> Beams:
    """The best captions that are found by following the most probable K beginnings.

        score(y) = log P(y | image) / ((5 + |y|) / 6)^alpha,     |y| tokens with the end, without the begin

    In each step the K beginnings of an image give their 2 K most probable continuations. Those among the first K that
    are an end are finished; the first K of the others go on. Of the finished, the K with the best scores are kept. An
    image is done when nothing that goes on could still have a better score than the last of these, or at `max_length`,
    where what is unfinished fills up the places that are left. (Being done with K finished ones, as some libraries are,
    would lose a long caption to K short ones that are nearly impossible.)

    `beams` 1 is greedy search that goes on after an end, with the most probable other token, as long as that may pay.

    Args:
        model, images, max_length: see `greedy_search`.
        beams: K, captions that are followed and returned for each image.
        length_penalty: alpha, from 0 for none, which favours short captions, to 10.

    Raises:
        ValueError: logits that are NaN, or a length that the model was not built for.

    Reference: Wu et al. 2016, eq. 14 (arXiv:1609.08144), without its coverage and its pruning.
    """
    who = "beam_search"
    _check.integer(who, "beams", beams, 1)
    _check.integer(who, "max_length", max_length, 2)
    _check.between(who, "length_penalty", length_penalty, 0.0, MAX_PENALTY)
    images = _check.batch(who, "images", images, 2, 5)
    n, device = len(images), images.device
    first = (torch.arange(n, device=device) * beams)[:, None]
    live = torch.full((n, beams), -math.inf, device=device)
    live[:, 0] = 0.0  # all beams of an image begin alike, so only one may go on
    ids = torch.full((n, beams, max_length), PADDING, device=device)
    ids[..., 0] = BEGIN
    kept, finished = torch.full_like(ids, PADDING), torch.full_like(live, -math.inf)
    done = torch.zeros(n, dtype=torch.bool, device=device)
    largest_penalty = ((5 + max_length - 1) / 6) ** length_penalty
    cache = model.begin(images)
    for length in range(1, max_length):
        logits, cache = model.step(ids[..., length - 1].flatten(), cache)
        step = _log_probabilities(who, logits).view(n, beams, -1)
        score, place = _best((live[..., None] + step).flatten(1), 2 * beams)  # (N, 2 K)
        beam, token = place // step.shape[2], place % step.shape[2]
        written = _rows(ids, beam)
        written[..., length] = token
        ends = token == END
        penalty = ((5 + length) / 6) ** length_penalty
        over = torch.where(ends, score / penalty, -math.inf)[:, :beams]
        finished, chosen = _best(torch.cat([finished, over], 1), beams)
        kept = _rows(torch.cat([kept, written[:, :beams]], 1), chosen)
        # a beam has one end only, so K of the 2 K go on
        on = ends.byte().argsort(dim=1, stable=True)[:, :beams]
        live, ids = score.gather(1, on).masked_fill(ends.gather(1, on), -math.inf), _rows(written, on)
        # a log-probability only falls, and the penalty shrinks it the less the shorter the caption stays
        done = done | (live.amax(1) / largest_penalty <= finished[:, -1])
        if length == max_length - 1 or bool(done.all()):
            break
        cache = cache.take((first + beam.gather(1, on)).flatten())
    scores = torch.cat([finished, (live / penalty).masked_fill(done[:, None], -math.inf)], 1)
    # finished ones, then unfinished ones, then empty places
    order = torch.where(scores.isfinite(), torch.arange(2 * beams, device=device) // beams, 2)
    chosen = order.argsort(dim=1, stable=True)[:, :beams]
    scores = scores.gather(1, chosen)
    found = _rows(torch.cat([kept, ids], 1), chosen).masked_fill(~scores.isfinite()[..., None], PADDING)
    return Beams(found[..., : length + 1], scores)


def generate(
    model: Captioner | CoCa,
    images: Tensor,
    tokenizer: CaptionTokenizer,
    *,
    beams: int = 1,
    max_length: int = 0,
    length_penalty: float = 0.6,
    batch: int = 64,
) -> list[str]:
    """A caption for each image, by greedy search or the best of `beams`.

    Args:
        model: evaluated, and left in the mode that it was in.
        images: (N, ...) what it takes, on any device; `batch` of them go through it at a time.
        tokenizer: that of its training.
        beams, length_penalty: see `beam_search`; 1 for greedy search, which has no use for the penalty.
        max_length: ids at most; 0 for the tokenizer's.

    Raises:
        ValueError: an id that the tokenizer doesn't have, and as `greedy_search`.
    """
    who = "generate"
    _check.integer(who, "beams", beams, 1)
    _check.integer(who, "batch", batch, 1)
    images = _check.batch(who, "images", images, 2, 5)
    longest = _check.integer(who, "max_length", max_length, 0) or tokenizer.max_length
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    captions: list[str] = []
    try:
        for part in images.split(batch):
            given = part.to(device)
            if beams == 1:
                ids = greedy_search(model, given, max_length=longest)
            else:
                found = beam_search(model, given, beams=beams, max_length=longest, length_penalty=length_penalty)
                ids = found.ids[:, 0]
            captions += tokenizer.decode(ids)
    finally:
        model.train(training)
    return captions


def _log_probabilities(who: str, logits: Tensor) -> Tensor:
    """(M, V) in float32 or wider, -inf for what is never written."""
    if bool(logits.isnan().any()):
        raise ValueError(f"{who}: the model's logits hold NaN; its weights, or the images, are not finite.")
    z = logits if logits.dtype == torch.float64 else logits.float()
    never = torch.tensor([PADDING, BEGIN], device=z.device)
    return z.index_fill(1, never, -math.inf).log_softmax(1)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their places, (N, count), the first one first among equals.

    Not `topk`, which takes any of the equals. Rows without so many finite numbers are filled with -inf.
    """
    left = scores.clone()
    places = []
    for _ in range(count):
        place = left.argmax(1, keepdim=True)  # the first of the largest
        places.append(place)
        left.scatter_(1, place, -math.inf)
    found = torch.cat(places, 1)
    values = scores.gather(1, found)
    # where all is -inf the first place comes again and again, and may have been taken before
    again = torch.arange(count, device=scores.device) >= scores.isfinite().sum(1, keepdim=True)
    return values.masked_fill(again, -math.inf), found


def _rows(captions: Tensor, rows: Tensor) -> Tensor:
    """(N, K, L) captions of each image, in the order `rows` (N, R)."""
    return captions.gather(1, rows[..., None].expand(-1, -1, captions.shape[2]))
