"""Searches against slow ones that keep lists of sentences and no cache, and against all sentences there are."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hardmix.data.characters import BEGIN, END, PADDING, CaptionTokenizer
from hardmix.models.build import build_model
from hardmix.models.captioner import Captioner, CoCa
from hardmix.models.decoding import beam_search, generate, greedy_search

DOUBLE = torch.float64
Found = list[tuple[float, list[int]]]


class Chain(NamedTuple):
    """A writer whose next token follows from the image, the last id and how many there are: logits (N, T, V, V)."""

    table: Tensor

    def begin(self, images: Tensor) -> Seen:
        return Seen(self.table[images[:, 0].long()], torch.empty(0), 0)

    def step(self, last: Tensor, cache: Seen) -> tuple[Tensor, Seen]:
        beams = len(last) // len(cache.tables)
        rows = cache.tables.repeat_interleave(beams, 0)[:, cache.length]
        written = torch.cat([cache.written, last[:, None]], 1) if cache.length else last[:, None]
        # what was written is remembered along with the caption it is of
        shift = written.double().sum(1, keepdim=True).sin() * 0.5
        logits = rows[torch.arange(len(last)), last] + shift * torch.arange(rows.shape[-1])
        return logits, Seen(cache.tables, written, cache.length + 1)


class Seen(NamedTuple):
    tables: Tensor
    written: Tensor
    length: int

    def take(self, rows: Tensor) -> Seen:
        return self._replace(written=self.written[rows])


def chain(
    n: int = 3, vocabulary: int = 6, longest: int = 6, seed: int = 0, spread: float = 2.0
) -> tuple[Chain, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(n, longest, vocabulary, vocabulary, dtype=DOUBLE, generator=generator) * spread
    return Chain(table), torch.arange(n)[:, None].double()


def captioner(**told: Any) -> tuple[Captioner, Tensor]:
    torch.manual_seed(0)
    sizes = {
        "vocabulary": 9,
        "image_width": 6,
        "max_length": 10,
        "width": 16,
        "heads": 2,
        "text_layers": 1,
        "layers": 2,
    }
    model = Captioner(**{**sizes, **told}).double().eval()
    with torch.no_grad():
        model.words.weight *= 4  # surer of what it writes than untrained models are
    return model, 3 * torch.randn(5, 4, 6, dtype=DOUBLE)


def next_log_probabilities(model: Any, image: Tensor, ids: list[int]) -> list[float]:
    """From everything written so far, anew; padding and begin left out."""
    if isinstance(model, Captioner):
        z = model(image, torch.tensor([[*ids, 0]]))[0, -1]
    else:
        cache = model.begin(image)
        for number in ids:
            z, cache = model.step(torch.tensor([number]), cache)
        z = z[0]
    values = z.tolist()
    total = math.log(sum(math.exp(value) for value in values[END:]))
    return [-math.inf, -math.inf, *(value - total for value in values[END:])]


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


@torch.no_grad()
def slow_greedy(model: Any, image: Tensor, longest: int) -> list[int]:
    ids = [BEGIN]
    while len(ids) < longest and ids[-1] != END:
        values = next_log_probabilities(model, image, ids)
        ids.append(values.index(max(values)))
    return ids


@torch.no_grad()
def slow_beams(model: Any, image: Tensor, beams: int, longest: int, alpha: float) -> Found:
    live: Found = [(0.0, [BEGIN])]
    finished: Found = []
    for length in range(1, longest):
        further = [
            (score + value, [*ids, token])
            for score, ids in live
            for token, value in enumerate(next_log_probabilities(model, image, ids))
            if value > -math.inf
        ]
        further.sort(key=lambda found: -found[0])  # stable: earlier beams and smaller ids first
        further = further[: 2 * beams]
        finished += [(score / penalty(length, alpha), ids) for score, ids in further[:beams] if ids[-1] == END]
        finished = sorted(finished, key=lambda found: -found[0])[:beams]
        live = [found for found in further if found[1][-1] != END][:beams]
        full = len(finished) == beams
        if not live or (full and live[0][0] / penalty(longest - 1, alpha) <= finished[-1][0]):
            return finished
    return (finished + [(score / penalty(longest - 1, alpha), ids) for score, ids in live])[:beams]


def check(model: Any, images: Tensor, beams: int, longest: int, alpha: float) -> None:
    found = beam_search(model, images, beams=beams, max_length=longest, length_penalty=alpha)
    assert found.ids.shape[:2] == found.scores.shape == (len(images), beams)
    for row in range(len(images)):
        want = slow_beams(model, images[row : row + 1], beams, longest, alpha)
        got = [[number for number in ids if number != PADDING] for ids in found.ids[row].tolist()]
        assert got == [ids for _, ids in want] + [[]] * (beams - len(want))
        assert found.scores[row, : len(want)].tolist() == pytest.approx([score for score, _ in want], abs=1e-9)
        assert bool((found.scores[row, len(want) :] == -math.inf).all())
    greedy = greedy_search(model, images, max_length=longest)
    for row in range(len(images)):
        want_ids = slow_greedy(model, images[row : row + 1], longest)
        assert greedy[row].tolist() == want_ids + [PADDING] * (greedy.shape[1] - len(want_ids))


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_with_a_cache_it_is_the_search_without(beams: int, alpha: float) -> None:
    check(*captioner(), beams, 10, alpha)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4), st.integers(3, 7), st.integers(1, 4), st.integers(2, 6), st.sampled_from([0.0, 0.6, 2.0]),
    st.sampled_from([0.3, 2.0, 8.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_any_writer(n, vocabulary, beams, longest, alpha, spread, seed) -> None:
    check(*chain(n, vocabulary, longest, seed, spread), beams, longest, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_with_enough_beams_it_is_the_best_of_all(alpha: float) -> None:
    """All 3 + 9 + ... sentences of the ids 3, 4, 5 that end in time."""
    model, images = chain(4, longest=5, spread=1.0)
    found = beam_search(model, images, beams=160, max_length=5, length_penalty=alpha)
    for row in range(4):
        scored: Found = []
        for length in range(4):
            for middle in itertools.product([3, 4, 5], repeat=length):
                ids = [BEGIN, *middle, END]
                total = sum(
                    next_log_probabilities(model, images[row : row + 1], ids[:k])[ids[k]] for k in range(1, len(ids))
                )
                scored.append((total / penalty(length + 1, alpha), ids))
        score, best = max(scored)
        got = [number for number in found.ids[row, 0].tolist() if number != PADDING]
        assert got == best
        assert found.scores[row, 0].item() == pytest.approx(score)


def test_images_do_not_mix() -> None:
    model, images = captioner()
    together = beam_search(model, images, beams=3, max_length=10)
    for row in range(5):
        alone = beam_search(model, images[row : row + 1], beams=3, max_length=10)
        width = alone.ids.shape[2]
        assert torch.equal(alone.ids[0], together.ids[row, :, :width])
        assert not together.ids[row, :, width:].any()
        torch.testing.assert_close(alone.scores[0], together.scores[row])
    turned = beam_search(model, images.flip(0), beams=3, max_length=10)
    assert torch.equal(turned.ids.flip(0), together.ids)


def test_padding_and_begin_are_never_written() -> None:
    model, images = chain(3)
    model.table[..., :END] += 100.0
    found = beam_search(model, images, beams=4, max_length=6)
    greedy = greedy_search(model, images, max_length=6)
    for ids in [*found.ids.flatten(0, 1).tolist(), *greedy.tolist()]:
        assert ids[0] == BEGIN
        written = ids[1 : ids.index(END)] if END in ids else ids[1:]
        assert min(written, default=3) > END
        rest = ids[ids.index(END) + 1 :] if END in ids else []
        assert not any(rest)
    plain, _ = chain(3)
    assert torch.equal(beam_search(plain, images, beams=4, max_length=6).ids, found.ids)


def test_ties_go_to_the_smaller_id_and_the_earlier_beam() -> None:
    model, images = chain(2, vocabulary=7)
    model.table.zero_()

    class Flat(NamedTuple):
        chain: Chain

        def begin(self, images: Tensor) -> Seen:
            return self.chain.begin(images)

        def step(self, last: Tensor, cache: Seen) -> tuple[Tensor, Seen]:
            logits, cache = self.chain.step(last, cache)
            return torch.zeros_like(logits), cache

    flat = Flat(model)
    assert greedy_search(flat, images, max_length=4).tolist() == [[BEGIN, END]] * 2
    found = beam_search(flat, images, beams=2, max_length=4, length_penalty=0.0)
    assert found.ids.tolist() == [[[1, 2, 0], [1, 3, 2]]] * 2
    assert found.scores[0].tolist() == pytest.approx([math.log(1 / 5), math.log(1 / 25)])
    for _ in range(3):
        assert torch.equal(beam_search(flat, images, beams=2, max_length=4, length_penalty=0.0).ids, found.ids)


def sentence(table: Tensor, ids: list[int], logit: float) -> None:
    for place, (last, following) in enumerate(itertools.pairwise(ids)):
        table[:, place, last, following] = logit


class Plain(NamedTuple):
    """`Chain` without memory."""

    table: Tensor

    def begin(self, images: Tensor) -> Seen:
        return Seen(self.table[images[:, 0].long()], torch.empty(len(images), 0), 0)

    def step(self, last: Tensor, cache: Seen) -> tuple[Tensor, Seen]:
        rows = cache.tables.repeat_interleave(len(last) // len(cache.tables), 0)[:, cache.length]
        return rows[torch.arange(len(last)), last], cache._replace(length=cache.length + 1)

    def take(self, rows: Tensor) -> Plain:
        return self


def test_a_sure_long_caption_is_not_lost_to_short_ones() -> None:
    table = torch.zeros(1, 12, 6, 6)
    table[..., END] = 2.0  # whoever leaves the sentence is likely to end soon
    right = [BEGIN, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3, END]
    sentence(table, right, 12.0)
    image = torch.zeros(1, 1)
    for beams in (1, 2, 4):
        found = beam_search(Plain(table), image, beams=beams, max_length=12)
        assert found.ids[0, 0].tolist() == right
        assert found.scores[0, 0] > -0.01


def test_the_penalty_favours_long_captions() -> None:
    table = torch.full((1, 8, 6, 6), -30.0)
    sentence(table, [BEGIN, 3, END], 0.0)
    sentence(table, [BEGIN, 4, 5, 4, 5, 4, END], -0.3)
    image = torch.zeros(1, 1)
    short, long = (
        beam_search(Plain(table), image, beams=2, max_length=8, length_penalty=alpha).ids[0, 0].tolist()
        for alpha in (0.0, 1.0)
    )
    assert short[:3] == [BEGIN, 3, END]
    assert long == [BEGIN, 4, 5, 4, 5, 4, END]


def test_what_is_too_long_is_cut() -> None:
    table = torch.zeros(2, 9, 6, 6)
    table[..., END] = -1e9
    table[1, 1, 3, END] = 1e9
    table[..., 3] = 1.0
    images = torch.arange(2)[:, None].double()
    assert greedy_search(Plain(table), images, max_length=5).tolist() == [[1, 3, 3, 3, 3], [1, 3, 2, 0, 0]]
    found = beam_search(Plain(table), images, beams=2, max_length=5)
    assert found.ids[0, 0].tolist() == [1, 3, 3, 3, 3]
    assert found.ids[1, 0].tolist() == [1, 3, 2, 0, 0]
    # the finished one comes first, though its score is worse
    table[1, 1, 3] = torch.tensor([0.0, 0.0, 0.9, 1.0, 0.0, 0.0])
    found = beam_search(Plain(table), images, beams=2, max_length=5, length_penalty=5.0)
    assert found.ids[1].tolist() == [[1, 3, 2, 0, 0], [1, 3, 3, 3, 3]]
    assert found.scores[1, 0] < found.scores[1, 1]


def test_fewer_captions_than_beams() -> None:
    model, images = chain(2, vocabulary=4, longest=3)
    found = beam_search(model, images, beams=5, max_length=3)
    assert found.scores.isfinite().sum(1).tolist() == [3, 3]  # nothing, one unknown, two and no end
    for ids in found.ids.tolist():
        assert {tuple(row) for row in ids[:2]} == {(1, 2, 0), (1, 3, 2)}
        assert ids[2:] == [[1, 3, 3], [0, 0, 0], [0, 0, 0]]


def test_nan_is_said() -> None:
    model, images = chain(2)
    model.table[1, 2] = torch.nan
    for search in (greedy_search, lambda *x, **told: beam_search(*x, beams=2, **told)):
        with pytest.raises(
            ValueError, match=r"_search: the model's logits hold NaN; its weights, or the images, are no"
        ):
            search(model, images, max_length=6)


def test_messages_of_settings() -> None:
    model, images = chain(2)
    for call, message in (
        (lambda: greedy_search(model, images, max_length=1), "greedy_search: max_length is 1; pass an integer of at "),
        (lambda: greedy_search(model, images[:0], max_length=4), "greedy_search: images has shape (0, 1) and is empty"),
        (lambda: beam_search(model, images, beams=0, max_length=4), "beam_search: beams is 0; pass an integer of at "),
        (lambda: beam_search(model, images, max_length=0), "beam_search: max_length is 0; pass an integer of at leas"),
        (
            lambda: beam_search(model, images, max_length=4, length_penalty=-1.0),
            "beam_search: length_penalty is -1.0; pass a number from 0 to 10.",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            call()
    long, pictures = captioner(max_length=3)
    with pytest.raises(ValueError, match=r"^Captioner\.step: 3 ids are written, the most that the model was built for"):
        beam_search(long, pictures, beams=2, max_length=20)


# From pictures to strings


def trained() -> tuple[CoCa, Tensor, list[str], CaptionTokenizer]:
    """Six pictures with names, learnt by heart."""
    torch.manual_seed(0)
    names = ["red cat", "cat", "blue dog", "owl", "red owl", "dog"]
    tokenizer = CaptionTokenizer.build(names)
    ids = tokenizer.encode(names)
    image = build_model("small-cnn", num_classes=0, in_channels=3, image_size=8, width=4, norm="group")
    model = CoCa(
        image, vocabulary=len(tokenizer), max_length=tokenizer.max_length, width=32, text_layers=1, layers=1, queries=4
    )
    pictures = torch.randn(6, 3, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        _, _, logits, _ = model(pictures, ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PADDING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, pictures, names, tokenizer


def test_captions_of_pictures() -> None:
    model, pictures, names, tokenizer = trained()
    for told in ({}, {"beams": 3}, {"batch": 4}, {"beams": 2, "batch": 1, "length_penalty": 0.0}):
        model.train()
        assert generate(model, pictures, tokenizer, **told) == names
        assert model.training
    assert generate(model.eval(), pictures[:2], tokenizer, max_length=4) == ["red", "cat"]
    assert not model.training
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    small = CaptionTokenizer("ab", max_length=9)
    with pytest.raises(
        ValueError, match=r"^CaptionTokenizer.decode: ids holds \d+, but there are 6 ids; use the tokeni"
    ):
        generate(model, pictures, small)
    for told, message in (
        ({"beams": 0}, "beams is 0; pass an integer of at least 1."),
        ({"batch": 0}, "batch is 0; pass an integer of at least 1."),
        ({"max_length": -1}, "max_length is -1; pass an integer of at least 0."),
        ({"max_length": 1}, "max_length is 1; pass an integer of at least 2."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            generate(model, pictures, tokenizer, **told)


def test_dropout_is_off_while_writing() -> None:
    model, images = captioner(dropout=0.9)
    tokenizer = CaptionTokenizer("abcde", max_length=10)
    want = generate(model, images, tokenizer)
    model.train()
    assert generate(model, images, tokenizer) == want
    assert generate(model, images.flip(0), tokenizer) == want[::-1]
