"""Encoders of texts: against a loop over words, and blind to padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hardmix.models.text import BiLSTM, WordMean, pair_features

Make = Callable[..., nn.Module]
MAKES = [BiLSTM, WordMean]


def made(make: Make, *, pair: bool = True, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return make(vocabulary=20, width=3, pair=pair, **{"embedding": 5, **options}).eval()


def some_ids(samples: int, texts: int, length: int, seed: int = 0) -> Tensor:
    """Texts of 0 to `length` words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (samples, texts, length), generator=generator)
    lengths = torch.randint(0, length + 1, (samples, texts, 1), generator=generator)
    return ids * (torch.arange(length) < lengths)


def loop_over_words(model: nn.Module, text: list[int]) -> Tensor:
    """(D,) features of one text, word by word, from the weights alone."""
    words = [model.words.weight[word] for word in text]
    if isinstance(model, WordMean):
        mean = sum(words, torch.zeros(5)) / max(1, len(words))
        return (model.layer[0].weight @ mean + model.layer[0].bias).relu()
    words = words or [torch.zeros(5)]
    for layer in range(model.lstm.num_layers):
        states = []
        for end in ("", "_reverse"):
            w, u, b, c = (
                getattr(model.lstm, f"{name}_l{layer}{end}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            hidden, cell, row = torch.zeros(3), torch.zeros(3), []
            for word in reversed(words) if end else words:
                i, f, g, o = (w @ word + b + u @ hidden + c).chunk(4)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
                row.append(hidden)
            states.append(row[::-1] if end else row)
        words = [torch.cat(pair) for pair in zip(*states, strict=True)]
    return torch.stack(words).amax(0)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("make", "options"), [(BiLSTM, {}), (BiLSTM, {"layers": 2}), (WordMean, {})])
def test_features_equal_a_loop_over_words(make: Make, options: dict[str, int], pair: bool) -> None:
    model = made(make, pair=pair, **options)
    ids = some_ids(6, 1 + pair, 7)
    got = model(ids)
    assert got.shape == (6, model.features)
    for row, sample in zip(got, ids.tolist(), strict=True):
        texts = [loop_over_words(model, [word for word in text if word]) for text in sample]
        expected = texts[0]
        if pair:
            expected = torch.cat([*texts, (texts[0] - texts[1]).abs(), texts[0] * texts[1]])
        assert torch.allclose(row, expected, atol=1e-6)


@pytest.mark.parametrize("make", MAKES)
@settings(deadline=None, max_examples=20)
@given(more=st.integers(1, 9), seed=st.integers(0, 1000))
def test_padding_and_neighbours_never_influence_a_text(make: Make, more: int, seed: int) -> None:
    model = made(make)
    ids = some_ids(4, 2, 6, seed)
    padded = torch.cat([ids, torch.zeros(4, 2, more, dtype=torch.long)], 2)
    got = model(ids)
    assert torch.allclose(model(padded), got, atol=1e-6)
    for k in range(4):
        alone = ids[k : k + 1, :, : max(1, int((ids[k] > 0).sum(1).max()))]
        assert torch.allclose(model(alone), got[k : k + 1], atol=1e-6)


@pytest.mark.parametrize("make", MAKES)
def test_empty_texts_have_finite_features_and_gradients(make: Make) -> None:
    model = made(make)
    got = model(torch.zeros(2, 2, 4, dtype=torch.long))
    got.square().sum().backward()
    assert got.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", MAKES)
def test_texts_of_a_pair_share_their_weights(make: Make) -> None:
    model = made(make)
    ids = some_ids(5, 2, 6)
    size = model.features // 4
    one, two = model(ids), model(ids.flip(1))
    assert torch.allclose(one[:, :size], two[:, size : 2 * size])
    assert torch.allclose(one[:, 2 * size :], two[:, 2 * size :])
    same = model(ids[:, :1].expand(-1, 2, -1))
    assert same[:, 2 * size : 3 * size].abs().max() < 1e-6


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("tune", [False, True])
def test_given_vectors_are_used_and_trained_only_if_told(make: Make, tune: bool) -> None:
    vectors = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    before = vectors.clone()
    model = made(make, vectors=vectors, tune_vectors=tune).train()
    assert model.words.weight[1:].equal(vectors[1:])
    assert model.words.weight[0].abs().sum() == 0
    ids = torch.cat([torch.arange(2, 12).view(1, 2, 5), torch.zeros(1, 2, 5, dtype=torch.long)])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1.0)
    model(ids).square().sum().backward()
    optimizer.step()
    moved = (model.words.weight[1:] != before[1:]).any(1)
    assert moved.tolist() == [tune and 2 <= word < 12 for word in range(1, 20)]
    assert model.words.weight[0].abs().sum() == 0
    assert vectors.equal(before)


@pytest.mark.parametrize("make", MAKES)
def test_learnt_vectors_start_with_zeros_for_padding_and_unknown(make: Make) -> None:
    model = made(make)
    assert model.words.weight[:2].abs().sum() == 0
    assert (model.words.weight[2:].abs().sum(1) > 0).all()
    model(torch.tensor([[[5, 1, 0], [6, 0, 0]]])).square().sum().backward()
    assert model.words.weight.grad[0].abs().sum() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_is_for_training_alone(layers: int) -> None:
    model = made(BiLSTM, layers=layers, dropout=0.5)
    assert model.lstm.dropout == (0.5 if layers == 2 else 0.0)
    ids = some_ids(4, 2, 6)
    assert model(ids).equal(model(ids))
    model.train()
    torch.manual_seed(1)
    one = model(ids)
    torch.manual_seed(1)
    assert model(ids).equal(one)
    assert not model(ids).equal(one)


def test_the_order_of_words_counts_for_the_lstm_alone() -> None:
    ids = torch.tensor([[[5, 6, 7]], [[7, 6, 5]]])
    mean, lstm = (made(make, pair=False)(ids) for make in (WordMean, BiLSTM))
    assert torch.allclose(mean[0], mean[1], atol=1e-6)
    assert not torch.allclose(lstm[0], lstm[1], atol=1e-3)


def test_pair_features_by_hand() -> None:
    z = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]])
    assert pair_features(z).tolist() == [[1, -2, 3, 4, 2, 6, 3, -8]]
    assert pair_features(z[:, :1]).tolist() == [[1, -2]]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda make: made(make)(torch.ones(2, 1, 3).long()),
            ValueError,
            r"\(2, 1, 3\); pass \(N, 2, L\), .* for pairs",
        ),
        (
            lambda make: made(make, pair=False)(torch.ones(2, 2, 3).long()),
            ValueError,
            r"pass \(N, 1, L\), .* for single",
        ),
        (
            lambda make: made(make)(torch.ones(2, 3).long()),
            ValueError,
            r"ids has shape \(2, 3\); pass a batch with 3 axes",
        ),
        (lambda make: made(make)(torch.ones(2, 2, 3)), TypeError, "ids has dtype torch.float32; pass the int64 ids of"),
        (
            lambda make: made(make)(torch.full((1, 2, 3), 20)),
            ValueError,
            "ids holds 20, but the model knows 20 ids; enc",
        ),
        (lambda make: made(make)(torch.full((1, 2, 3), -1)), ValueError, "ids holds -1, but the model knows 20 ids"),
        (lambda make: made(make)(torch.zeros(0, 2, 3).long()), ValueError, "is empty; pass at least one sample"),
        (
            lambda make: made(make, vectors=torch.ones(4, 2)),
            ValueError,
            "vectors has 4 entries but the vocabulary has 20",
        ),
        (lambda make: made(make, vectors=torch.ones(20)), ValueError, r"vectors has shape \(20,\)"),
        (lambda make: made(make, vectors=torch.full((20, 2), torch.nan)), ValueError, "vectors holds NaN or infinity"),
        (lambda make: made(make, embedding=0), ValueError, "embedding is 0; pass an integer of at least 1"),
        (lambda make: make(vocabulary=1), ValueError, "vocabulary is 1; pass an integer of at least 2"),
        (lambda make: make(vocabulary=9, width=0), ValueError, "width is 0"),
        (lambda make: BiLSTM(vocabulary=9, layers=0), ValueError, "BiLSTM: layers is 0"),
        (
            lambda make: BiLSTM(vocabulary=9, dropout=1.5),
            ValueError,
            "BiLSTM: dropout is 1.5; pass a number from 0 to 1",
        ),
    ],
)
def test_bad_arguments_are_named(
    make: Make, call: Callable[[Make], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(make)
