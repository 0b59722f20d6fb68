"""The decoder against attention written out token by token; what it may see; CoCa around the backbones."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardmix.data.characters import PADDING
from hardmix.losses import CoCaLoss
from hardmix.models.build import build_model
from hardmix.models.captioner import Cache, Captioner, CoCa, grid_positions

DOUBLE = torch.float64
VOCABULARY, LONGEST = 11, 9


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def captioner(**told: Any) -> Captioner:
    torch.manual_seed(0)
    sizes = {"vocabulary": VOCABULARY, "image_width": 6, "max_length": LONGEST, "width": 8, "heads": 2, "layers": 2}
    return Captioner(**{**sizes, **told}).double().eval()


def coca(image: nn.Module | None = None, **told: Any) -> CoCa:
    torch.manual_seed(0)
    sizes = {"vocabulary": VOCABULARY, "max_length": LONGEST, "width": 16, "heads": 2, "text_layers": 1, "layers": 1}
    sizes |= {"queries": 3, "features": 5}
    if image is None:
        image, told = nn.Identity(), {"image_width": 6, **told}
    return CoCa(image, **{**sizes, **told}).double().eval()


def images(n: int = 3, tokens: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, tokens, 6, dtype=DOUBLE, generator=rng(seed))


def some_ids(n: int = 3, length: int = 7, seed: int = 1, *, full: bool = False) -> Tensor:
    """Captions of 1 to `length` ids, padded on the right."""
    ids = torch.randint(1, VOCABULARY, (n, length), generator=rng(seed))
    lengths = torch.randint(length if full else 1, length + 1, (n, 1), generator=rng(seed + 1))
    return ids * (torch.arange(length) < lengths)


def slow_attention(part: nn.Module, queries: list[Tensor], seen: list[list[Tensor]]) -> list[Tensor]:
    """Each query with the tokens that it sees, head after head, number after number."""
    width = len(queries[0])
    size = width // part.heads
    key_weight, value_weight = part.key_value.weight.split(width)
    key_bias, value_bias = part.key_value.bias.split(width)
    out = []
    for query, tokens in zip(queries, seen, strict=True):
        q = part.query.weight @ query + part.query.bias
        heads = []
        for head in range(part.heads):
            cut = slice(head * size, (head + 1) * size)
            keys = [(key_weight @ token + key_bias)[cut] for token in tokens]
            values = [(value_weight @ token + value_bias)[cut] for token in tokens]
            shares = torch.stack([q[cut] @ key / math.sqrt(size) for key in keys]).softmax(0)
            heads.append(sum((s * v for s, v in zip(shares, values, strict=True)), torch.zeros(size, dtype=DOUBLE)))
        out.append(part.out.weight @ torch.cat(heads) + part.out.bias)
    return out


def slow_caption(model: Captioner, image: Tensor, ids: list[int]) -> tuple[Tensor, Tensor | None]:
    """Logits (L - 1, V) and, with text layers, the summary, of one caption."""
    memory = [model.images.linear(model.images.norm(token)) for token in image]
    tokens = [model.words.weight[number] + model.positions[t] for t, number in enumerate(ids)]
    used = [t for t, number in enumerate(ids) if number != PADDING]
    sees = [list(range(t + 1)) for t in range(len(ids))]
    if model.summary is not None:
        tokens.append(model.summary)
        sees.append([*used, len(ids)])

    def through(block: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
        normed = [block.norm1(token) for token in tokens]
        more = slow_attention(block.attention, normed, [[normed[k] for k in sees[t]] for t in range(len(tokens))])
        tokens = [token + add for token, add in zip(tokens, more, strict=True)]
        if block.look is not None:
            more = slow_attention(block.look, [block.norm2(token) for token in tokens], [memory] * len(tokens))
            tokens = [token + add for token, add in zip(tokens, more, strict=True)]
        return [token + block.mlp(block.norm3(token)) for token in tokens]

    for block in model.text:
        tokens = through(block, tokens)
    summary = tokens[-1] if model.summary is not None else None
    tokens = tokens[: len(ids) - 1]
    for block in model.write:
        tokens = through(block, tokens)
    return torch.stack([model.words.weight @ model.norm(token) for token in tokens]), summary


@pytest.mark.parametrize(("text_layers", "layers"), [(0, 1), (2, 2)])
def test_logits_and_summary_are_those_of_loops(text_layers: int, layers: int) -> None:
    model = captioner(text_layers=text_layers, layers=layers)
    x, ids = images(), some_ids()
    logits = model(x, ids)
    assert logits.shape == (3, 6, VOCABULARY)
    for row in range(3):
        want, summary = slow_caption(model, x[row], ids[row].tolist())
        torch.testing.assert_close(logits[row], want, rtol=1e-11, atol=1e-11)
        if summary is not None:
            torch.testing.assert_close(model.text_features(ids)[row], summary, rtol=1e-11, atol=1e-11)


def test_both_in_one_pass() -> None:
    model = captioner(text_layers=2)
    x, ids = images(), some_ids()
    text, logits = model.both(x, ids)
    torch.testing.assert_close(text, model.text_features(ids))
    torch.testing.assert_close(logits, model(x, ids))


def test_nothing_comes_from_later_ids() -> None:
    model = captioner(text_layers=1)
    x, ids = images(), some_ids(full=True)
    logits = model(x, ids)
    for place in range(1, 7):
        other = ids.clone()
        other[:, place] = other[:, place] % (VOCABULARY - 1) + 1
        changed = (model(x, other) - logits).abs().amax((0, 2))
        assert changed[:place].max() == 0.0
        assert (changed[place:] > 1e-6).all()


def test_padding_on_the_right_changes_nothing() -> None:
    model = captioner(text_layers=1)
    x, ids = images(), some_ids()
    longer = nn.functional.pad(ids, (0, 2))
    torch.testing.assert_close(model.text_features(longer), model.text_features(ids), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x, longer)[:, :6], model(x, ids), rtol=1e-12, atol=1e-12)
    for row in range(3):
        length = max(2, int((ids[row] != PADDING).sum()))
        alone = ids[row : row + 1, :length]
        torch.testing.assert_close(model.text_features(alone), model.text_features(ids)[row : row + 1])


def test_texts_without_an_id_are_alike_and_finite() -> None:
    model = captioner(text_layers=1)
    ids = torch.zeros(2, 5, dtype=torch.long)
    features = model.text_features(ids)
    assert features.isfinite().all()
    assert torch.equal(features[0], features[1])
    torch.testing.assert_close(features, model.text_features(ids[:, :1]))
    assert model(images(2), ids).isfinite().all()


def test_kinds_of_images() -> None:
    model = captioner()
    ids = some_ids()
    one = torch.randn(3, 6, dtype=DOUBLE, generator=rng(3))
    torch.testing.assert_close(model(one, ids), model(one[:, None], ids))
    tokens = images(3, 12)
    torch.testing.assert_close(model(tokens[:, torch.randperm(12, generator=rng())], ids), model(tokens, ids))
    grid = tokens.transpose(1, 2).reshape(3, 6, 3, 4)
    assert (model(grid, ids) - model(tokens, ids)).abs().max() > 1e-3
    for axis in (2, 3):
        assert (model(grid.flip(axis), ids) - model(grid, ids)).abs().max() > 1e-3
    assert model(images(3, 1), ids).shape == model(grid, ids).shape


def test_places_of_a_map() -> None:
    found = grid_positions(3, 5, 12)
    assert found.shape == (15, 12)
    for y in range(3):
        for x in range(5):
            rates = [10_000 ** (-4 * k / 12) for k in range(3)]
            want = [f(place * rate) for place in (y, x) for f in (math.sin, math.cos) for rate in rates]
            assert found[5 * y + x].tolist() == pytest.approx(want, abs=1e-5)
    assert torch.equal(grid_positions(2, 5, 12), found[:10])
    assert len(grid_positions(6, 6, 8).unique(dim=0)) == 36


@pytest.mark.parametrize("text_layers", [0, 2])
def test_a_cached_step_is_the_last_of_the_whole(text_layers: int) -> None:
    model = captioner(text_layers=text_layers)
    x, ids = images(), some_ids(3, LONGEST, full=True)
    cache = model.begin(x)
    for length in range(LONGEST - 1):
        logits, cache = model.step(ids[:, length], cache)
        torch.testing.assert_close(logits, model(x, ids[:, : length + 2])[:, -1], rtol=1e-12, atol=1e-12)
    assert cache.length == LONGEST - 1


def test_several_captions_of_an_image_side_by_side() -> None:
    """Six captions of three images, two of which change places on the way."""
    model = captioner(text_layers=1)
    x, ids = images(), some_ids(6, 5, full=True)
    cache: Cache = model.begin(x)
    for length in range(3):
        logits, cache = model.step(ids[:, length], cache)
    order = torch.tensor([1, 0, 2, 2, 5, 4])
    logits, _ = model.step(ids[order, 3], cache.take(order))
    want = model(x.repeat_interleave(2, 0), ids[order])[:, 3]
    torch.testing.assert_close(logits, want, rtol=1e-12, atol=1e-12)
    assert cache.images[-1] is not None
    assert cache.images[-1].keys.shape[0] == 3  # the images are not repeated


def test_the_output_is_the_word_vectors() -> None:
    model = captioner(text_layers=1)
    shapes = [tuple(value.shape) for value in model.parameters()]
    assert shapes.count((VOCABULARY, 8)) == 1
    assert not [name for name in model.state_dict() if "output" in name]


def test_training_drops_and_evaluation_does_not() -> None:
    model = captioner(dropout=0.5)
    x, ids = images(), some_ids()
    assert torch.equal(model(x, ids), model(x, ids))
    model.train()
    assert not torch.equal(model(x, ids), model(x, ids))


# CoCa


@pytest.mark.parametrize("name", ["small-resnet", "small-cnn", "tiny-vit"])
def test_coca_around_a_backbone(name: str) -> None:
    image = build_model(name, num_classes=0, in_channels=3, image_size=16)
    model = coca(image)
    x, ids = torch.randn(4, 3, 16, 16, dtype=DOUBLE, generator=rng()), some_ids(4)
    a, b, logits, scale = model(x, ids)
    assert (a.shape, b.shape, logits.shape, scale.shape) == ((4, 5), (4, 5), (4, 6, VOCABULARY), ())
    assert scale.item() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(model.encode_image(x), a)
    torch.testing.assert_close(model.encode_text(ids), b)
    cache = model.begin(x)
    for length in range(6):
        step, cache = model.step(ids[:, length], cache)
        torch.testing.assert_close(step, logits[:, length], rtol=1e-11, atol=1e-11)
    one = model(x[:1], ids[:1])
    torch.testing.assert_close(one[0], a[:1])
    torch.testing.assert_close(one[2], logits[:1])


def test_features_of_a_frozen_tower() -> None:
    model = coca()
    x = torch.randn(3, 6, dtype=DOUBLE, generator=rng())
    a, b, logits, _ = model(x, some_ids())
    assert (a.shape, b.shape, logits.shape) == ((3, 5), (3, 5), (3, 6, VOCABULARY))


def test_one_feature_and_some_tokens_from_the_pooled_image() -> None:
    """One query attends to the pooled tokens, which attend to the image: written out for one image."""
    model = coca()
    x = images(1)
    memory = [model.tokens.linear(model.tokens.norm(token)) for token in x[0]]

    def pool(part: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
        return slow_attention(part.attention, list(part.queries), [[part.norm(t) for t in tokens]] * len(part.queries))

    tokens = pool(model.pool, memory)
    assert len(tokens) == 3
    a = model.image_projection(pool(model.pool_all, tokens)[0])
    torch.testing.assert_close(model.encode_image(x)[0], a, rtol=1e-11, atol=1e-11)
    ids = some_ids(1)
    want, summary = slow_caption(model.decoder, torch.stack(tokens), ids[0].tolist())
    _, b, logits, _ = model(x, ids)
    torch.testing.assert_close(logits[0], want, rtol=1e-11, atol=1e-11)
    assert summary is not None
    torch.testing.assert_close(b[0], model.text_projection(summary), rtol=1e-11, atol=1e-11)


def test_the_text_does_not_see_the_image_nor_the_image_the_text() -> None:
    model = coca()
    x, other = images(), images(seed=5)
    ids = some_ids()
    first, second = model(x, ids), model(other, ids)
    assert torch.equal(first[1], second[1])
    assert not torch.allclose(first[2], second[2])
    assert torch.equal(model(x, some_ids(seed=9))[0], first[0])


def test_every_parameter_learns() -> None:
    model = coca(build_model("small-resnet", num_classes=0, in_channels=3, image_size=16, width=4))
    x, ids = torch.randn(4, 3, 16, 16, dtype=DOUBLE, generator=rng()), some_ids(4, LONGEST, full=True)
    CoCaLoss()(*model(x, ids), ids).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    assert still == []


def test_the_scale_is_held_at_100() -> None:
    model = coca(temperature=0.01)
    assert model.scale.item() == pytest.approx(100)
    with torch.no_grad():
        model.logit_scale += 1
    assert model.scale.item() == pytest.approx(100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype: torch.dtype) -> None:
    """Throughout, and by autocast."""
    model = coca().float()
    x, ids = images().float(), some_ids()
    want = model(x, ids)
    with torch.autocast("cpu", dtype=dtype):
        found = model(x, ids)
    half = copy.deepcopy(model).to(dtype)(x.to(dtype), ids)
    for got in (found, half):
        for value, right in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(value.float(), right, rtol=0.1, atol=0.1)


def test_weights_come_back() -> None:
    model, other = coca(), coca(temperature=0.5)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01)
    other.load_state_dict(model.state_dict())
    x, ids = images(), some_ids()
    for value, want in zip(other(x, ids), model(x, ids), strict=True):
        assert torch.equal(value, want)


def test_it_learns_captions_by_heart() -> None:
    torch.manual_seed(0)
    model = coca(width=32, queries=4, dropout=0.0).float().train()
    x, ids = images(8).float(), some_ids(8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    criterion = CoCaLoss()
    for _ in range(60):
        loss = criterion(*model(x, ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    terms = criterion(*model.eval()(x, ids), ids, output_dict=True)
    assert terms["caption_loss"] < 0.1
    assert terms["contrastive_loss"] < 0.1


SIZES = {"vocabulary": VOCABULARY, "image_width": 6, "max_length": LONGEST}


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        ({"vocabulary": 3}, ValueError, "Captioner: vocabulary is 3; pass an integer of at least 4."),
        ({"max_length": 1}, ValueError, "Captioner: max_length is 1; pass an integer of at least 2."),
        ({"image_width": 0}, ValueError, "ImageTokens: image_width is 0; pass an integer of at least 1."),
        ({"layers": 0}, ValueError, "Captioner: layers is 0; pass an integer of at least 1."),
        ({"text_layers": -1}, ValueError, "Captioner: text_layers is -1; pass an integer of at least 0."),
        ({"heads": 0}, ValueError, "Captioner: heads is 0; pass an integer of at least 1."),
        ({"width": 10}, ValueError, "Captioner: width is 10 and heads is 4; pass a width that 4 and the heads divide."),
        ({"width": 8, "heads": 3}, ValueError, "Captioner: width is 8 and heads is 3; pass a width that 4 and the"),
        ({"dropout": 1.5}, ValueError, "Captioner: dropout is 1.5; pass a number from 0 to 1."),
    ],
)
def test_messages_of_sizes(told: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        Captioner(**{**SIZES, **told})


def test_messages_of_coca() -> None:
    for told, kind, message in (
        ({}, TypeError, "CoCa: image is a Identity without num_features; pass image_width."),
        ({"image_width": 6, "text_layers": 0}, ValueError, "CoCa: text_layers is 0; pass an integer of at least 1."),
        ({"image_width": 6, "queries": 0}, ValueError, "CoCa: queries is 0; pass an integer of at least 1."),
        ({"image_width": 6, "features": 0}, ValueError, "CoCa: features is 0; pass an integer of at least 1."),
        ({"image_width": 6, "temperature": 0.001}, ValueError, "CoCa: temperature is 0.001; pass at least 0.01."),
    ):
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            CoCa(nn.Identity(), vocabulary=VOCABULARY, max_length=LONGEST, **told)


X, Y = images(2), some_ids(2)


@pytest.mark.parametrize(
    ("x", "ids", "kind", "message"),
    [
        (X, [[1]], TypeError, "Captioner: ids is a list; pass a torch.Tensor."),
        (X, Y.float(), TypeError, "Captioner: ids has dtype torch.float32; pass the int64 ids of a tokenizer."),
        (X, Y[:, :1], ValueError, "Captioner: ids has shape (2, 1); pass (N, L) with L from 2 to the 9 that"),
        (X, some_ids(2, 10), ValueError, "Captioner: ids has shape (2, 10); pass (N, L) with L from 2 to the 9 that"),
        (X, Y + 20, ValueError, "Captioner: ids holds"),
        (X[:1], Y, ValueError, "Captioner: images has 1 rows but ids has 2; pass one caption per image."),
        (X[..., :5], Y, ValueError, "ImageTokens: images has shape (2, 4, 5) and dtype torch.float64; pass float"),
        (X.long(), Y, ValueError, "ImageTokens: images has shape (2, 4, 6) and dtype torch.int64; pass floats"),
        (X[0, 0], Y, ValueError, "ImageTokens: images has shape (6,); pass a batch with 2 to 4 axes, samples first."),
    ],
)  # fmt: skip
def test_messages(x: Any, ids: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        captioner()(x, ids)


def test_messages_of_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"^Captioner: text_layers is 0, so there is nothing that reads a text as a w"):
        captioner().text_features(Y)
    model = captioner(max_length=2)
    cache = model.begin(X)
    for _ in range(2):
        _, cache = model.step(torch.ones(2).long(), cache)
    with pytest.raises(ValueError, match=r"^Captioner.step: 2 ids are written, the most that the model was built for;"):
        model.step(torch.ones(2).long(), cache)
