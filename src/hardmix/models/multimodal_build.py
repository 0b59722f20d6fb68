"""From a recipe to a model of several modalities: pictures in one or more styles, and a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hardmix import _check
from hardmix.models.multimodal import MultimodalNet
from hardmix.models.towers import Tower, image_tower, text_tower

#: the modality that is a text; the others are called by their style
TEXT = "text"
#: the encoders where a recipe names none
IMAGE_TOWER, TEXT_TOWER = "small-cnn", "subwords"
#: arguments of `MultimodalNet` that a recipe says under `model.options`
OWN = ("dim", "width", "dropout")


class MultimodalBuilt(NamedTuple):
    """The model, and what prepares its inputs.

    Attributes:
        model: takes a dict of `modalities`.
        modalities: names, the text last.
        prepare: name -> what makes one row per sample of uint8 pictures, or of texts.
        pictures: whether prepared rows of images are still pictures, of which views can be drawn.
    """

    model: MultimodalNet
    modalities: tuple[str, ...]
    prepare: dict[str, Callable[[Any], Tensor]]
    pictures: bool


def build_multimodal(
    options: Mapping[str, Any], styles: Sequence[str], *, num_classes: int, image_size: int, pretrained: bool = True
) -> MultimodalBuilt:
    """Encoders for each style and for the text, initialised from torch's global generator.

    Args:
        options: `dim`, `width` and `dropout` of `MultimodalNet`; `image` and `text`, each a table with the name of a
            tower and its options, see `hardmix.models.towers`. Styles have encoders of their own, unless frozen.
        styles: names of the styles.
        num_classes: C.
        image_size: side of the pictures in pixels.
        pretrained: False leaves out weights of towers that are tuned, for those that are loaded afterwards.
    """
    who = "build_multimodal"
    for key in options:
        _check.choice(who, "option", key, [*OWN, "image", "text"])
    towers: dict[str, Tower] = {}
    name, rest = tower_options("image", options.get("image", {}))
    for style in styles:
        towers[style] = image_tower(name, rest, image_size=image_size, pretrained=pretrained)
    name, rest = tower_options("text", options.get("text", {}))
    towers[TEXT] = text_tower(name, rest, pretrained=pretrained)
    encoders: dict[str, nn.Module] = {key: tower.encoder for key, tower in towers.items()}
    own = {key: options[key] for key in OWN if key in options}
    features = {key: tower.features for key, tower in towers.items()}
    model = MultimodalNet(encoders, features, num_classes=num_classes, **own)
    prepare = {key: tower.prepare for key, tower in towers.items()}
    return MultimodalBuilt(model, tuple(towers), prepare, towers[styles[0]].pictures)


def tower_options(side: str, table: object) -> tuple[str, dict[str, Any]]:
    """Name and options of the encoder of pictures or of texts."""
    default = IMAGE_TOWER if side == "image" else TEXT_TOWER
    if not isinstance(table, Mapping) or not isinstance(table.get("name", default), str):
        raise ValueError(
            f'multimodal: the model option {side} is {table!r:.80}; write a table such as {{ name = "{default}" }}.'
        )
    return table.get("name", default), {key: value for key, value in table.items() if key != "name"}
