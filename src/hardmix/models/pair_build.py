"""From a name in a recipe to a model of pictures and texts, and what its towers take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from hardmix import _check
from hardmix.models.pair_model import PairModel
from hardmix.models.towers import image_tower, image_tower_options, text_tower, text_tower_options

#: models of pictures and texts
PAIR_MODELS = ("two-tower",)
#: arguments of `PairModel` that a recipe says under `model`; the others follow from other sections
OWN = ("features", "projection", "dropout", "bias")
#: the towers where a recipe names none
IMAGE_TOWER, TEXT_TOWER = "small-resnet", "subwords"


class PairBuilt(NamedTuple):
    """The model, and what its towers take.

    Attributes:
        model: see `PairModel`.
        images: (N, 3, H, W) uint8 on the CPU -> one row per picture, on the CPU; done once for a set.
        texts: N texts -> one row per text.
        pictures: whether rows of images are still pictures, of which views can be drawn.
    """

    model: PairModel
    images: Callable[[Tensor], Tensor]
    texts: Callable[[list[str]], Tensor]
    pictures: bool


def pair_model_options(name: str) -> list[str]:
    """What a recipe may tell the model `name`."""
    _check.choice("pair_model_options", "name", name, PAIR_MODELS)
    return [*OWN, "image", "text"]


def check_pair_options(options: Mapping[str, Any]) -> None:
    """That towers exist and take what they are told, as far as that is known before they are made."""
    for side, default, known in (
        ("image", IMAGE_TOWER, image_tower_options),
        ("text", TEXT_TOWER, text_tower_options),
    ):
        name, own = _tower(options, side, default)
        # What timm's models take is known when one is made.
        for key in {} if name.startswith("timm/") else own:
            _check.choice("two-tower", f"option of {side} tower {name}", key, known(name))


def build_pair_model(
    name: str, options: Mapping[str, Any], *, image_size: int, pretrained: bool = True, **settings: Any
) -> PairBuilt:
    """The model `name`, initialised from torch's global generator.

    Args:
        name: one of PAIR_MODELS.
        options: what a recipe tells it: arguments of `PairModel`, and `image` and `text`, each a table with the name of
            a tower and its options.
        image_size: side of the pictures in pixels.
        pretrained: False leaves out weights of towers that are tuned, for those that are loaded afterwards.
        settings: further arguments of `PairModel`, such as temperature and classes.
    """
    for key in options:
        _check.choice("build_pair_model", f"option of {name}", key, pair_model_options(name))
    own = {key: value for key, value in options.items() if key in OWN}
    image_name, image_options = _tower(options, "image", IMAGE_TOWER)
    text_name, text_options = _tower(options, "text", TEXT_TOWER)
    image = image_tower(image_name, image_options, image_size=image_size, pretrained=pretrained)
    text = text_tower(text_name, text_options, pretrained=pretrained)
    own |= {"image_width": image.features, "text_width": text.features}
    model = PairModel(image.encoder, text.encoder, **own, **settings)
    return PairBuilt(model, image.prepare, text.prepare, image.pictures)


def _tower(options: Mapping[str, Any], side: str, default: str) -> tuple[str, dict[str, Any]]:
    """Name and options of one tower."""
    table = options.get(side, {})
    if not isinstance(table, Mapping) or not isinstance(table.get("name", default), str):
        raise ValueError(f'two-tower: {side} is {table!r:.80}; write a table such as {{ name = "{default}" }}.')
    rest = {key: value for key, value in table.items() if key != "name"}
    return table.get("name", default), rest


def default_of(argument: str) -> Any:
    """What `PairModel` has where a recipe says nothing."""
    return inspect.signature(PairModel).parameters[argument].default
