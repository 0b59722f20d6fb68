"""From a name in a recipe to an encoder of rows, series, images, volumes or texts, and the inputs that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.numbers import Numbers, Texts
from hardmix.data.vocabulary import Vocabulary, load_vectors
from hardmix.models.build import build_model
from hardmix.models.language_model import LanguageModel
from hardmix.models.mlp import MLP
from hardmix.models.series import SeriesNet
from hardmix.models.text import BiLSTM, WordMean
from hardmix.models.volume import VolumeNet

#: words of a text that are read; what is longer loses its end
MAX_WORDS = 128


class Encoder(NamedTuple):
    """What it takes, its class, the arguments that follow from the data, and options that are not its class's."""

    kind: str
    make: Callable[..., nn.Module]
    supplied: tuple[str, ...]
    more: tuple[str, ...] = ()


#: what encoders of words are told, and what a recipe tells of them besides
WORDS, WORD_OPTIONS = ("vocabulary", "pair", "vectors"), ("vectors", "max_length", "min_count")

#: Encoders of what is no image; those of images are in `hardmix.models.build`.
ENCODERS: dict[str, Encoder] = {
    "mlp": Encoder("rows", MLP, ("inputs",)),
    "series-cnn": Encoder("series", SeriesNet, ("channels",)),
    "volume-cnn": Encoder("volumes", VolumeNet, ("channels",)),
    # `vectors` is a file here, not a tensor
    "bilstm": Encoder("texts", BiLSTM, WORDS, WORD_OPTIONS),
    "word-mean": Encoder("texts", WordMean, WORDS, WORD_OPTIONS),
    # untuned, an MLP of this width and depth learns from its features
    "language-model": Encoder("texts", LanguageModel, ("pair",), ("width", "depth")),
}


class Built(NamedTuple):
    """An encoder, the size of its features, and how a set's inputs become the tensor that batches are taken from."""

    encoder: nn.Module
    features: int
    inputs: Callable[[Numbers], Tensor]


def encoder_options(name: str) -> list[str]:
    """What a recipe may tell the encoder `name`."""
    encoder = ENCODERS[_check.choice("encoder_options", "name", name, ENCODERS)]
    own = [key for key in inspect.signature(encoder.make).parameters if key not in encoder.supplied]
    return [*own, *encoder.more]


def build_encoder(
    name: str,
    options: dict[str, Any],
    data: Numbers,
    train: Tensor,
    *,
    others: Sequence[Numbers] = (),
    pretrained: bool = True,
) -> Built:
    """The encoder `name`, initialised from torch's global generator.

    Args:
        name: a key of ENCODERS, or of an image model, see `build_model`.
        options: what a recipe tells it.
        data: what it is trained on first.
        train: rows of `data` for training, which a vocabulary is made of.
        others: further sets that it is used on.
        pretrained: False leaves out the option `checkpoint`, for weights that are loaded afterwards.
    """
    if name not in ENCODERS:
        kept = {key: value for key, value in options.items() if pretrained or key != "checkpoint"}
        channels, side = data.inputs.shape[1:3]  # type: ignore[union-attr]
        model = build_model(name, num_classes=0, in_channels=channels, image_size=side, **kept)
        return Built(model, _size(model.num_features), _as_they_are)
    encoder = ENCODERS[name]
    if encoder.kind == "texts":
        texts = [_texts(numbers) for numbers in (data, *others)]
        if len({len(sample[0]) for sample in texts}) > 1:
            raise ValueError("build_encoder: one set has pairs of texts and the other single ones; take the same kind.")
        training = [texts[0][int(row)] for row in train]
        every = [sample for of_set in texts for sample in of_set]
        if encoder.make is LanguageModel:
            return _language_model(options, training)
        return _of_words(encoder.make, options, training, every)
    size = data.inputs.shape[1]  # type: ignore[union-attr]
    made = encoder.make(**{encoder.supplied[0]: size}, **options)
    return Built(made, _size(made.features), _as_they_are)


def _of_words(make: Callable[..., nn.Module], options: dict[str, Any], training: Texts, every: Texts) -> Built:
    """The vocabulary is that of the training texts, and of words that the vectors know."""
    own = dict(options)
    path, longest, rare = own.pop("vectors", ""), own.pop("max_length", MAX_WORDS), own.pop("min_count", 1)
    if path:
        known = load_vectors(path, training, every, min_count=rare)
        vocabulary, vectors = known.vocabulary, known.vectors
    else:
        vocabulary, vectors = Vocabulary.build(training, min_count=rare), None
    pair = len(training[0]) == 2
    encoder = make(vocabulary=len(vocabulary), pair=pair, vectors=vectors, **own)
    return Built(
        encoder, _size(encoder.features), lambda numbers: vocabulary.encode(_texts(numbers), max_length=longest)
    )


def _language_model(options: dict[str, Any], training: Texts) -> Built:
    """Untuned, its features stay the same: they are computed once and are the rows that an MLP learns from."""
    own = dict(options)
    shape = {key: own.pop(key) for key in ("width", "depth") if key in own}
    model = LanguageModel(pair=len(training[0]) == 2, **own)
    if model.tune:
        if shape:
            raise ValueError(f"language-model: {', '.join(shape)} is set, but tune is true; leave it out.")
        return Built(model, model.features, lambda numbers: model.tokenize(_texts(numbers)))
    encoder = MLP(inputs=model.features, **shape)
    return Built(encoder, encoder.features, lambda numbers: model.frozen_features(_texts(numbers)))


def _texts(numbers: Numbers) -> Texts:
    assert not isinstance(numbers.inputs, torch.Tensor)
    return numbers.inputs


def _size(value: object) -> int:
    assert isinstance(value, int)
    return value


def _as_they_are(numbers: Numbers) -> Tensor:
    assert isinstance(numbers.inputs, torch.Tensor)
    return numbers.inputs
