"""From a name in a recipe to a model of pictures and texts, and what its towers take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from hardmix import _check
from hardmix.data.characters import CaptionTokenizer
from hardmix.models.clip_adapters import load_hf_clip, load_open_clip
from hardmix.models.multimodal_build import OWN as OF_MODALITIES
from hardmix.models.multimodal_build import tower_options
from hardmix.models.pair_captioner import BACKBONE, PairNet, build_captioner, captioner_options
from hardmix.models.pair_captioner import OWN as CAPTIONER_OWN
from hardmix.models.pair_model import MAX_SCALE, PairModel, Resized
from hardmix.models.towers import _pictures, image_tower, image_tower_options, text_tower, text_tower_options

#: models of pictures and texts
PAIR_MODELS = ("two-tower", "coca", "hf-clip", "open-clip", "multimodal")
#: of these, models of other packages from local files, and what finds them
ADAPTED = {"hf-clip": ("path",), "open-clip": ("architecture", "checkpoint")}
#: arguments of `PairModel` that a recipe says under `model`; the others follow from other sections
OWN = ("features", "projection", "dropout", "bias")
#: the towers where a recipe names none
IMAGE_TOWER, TEXT_TOWER = "small-resnet", "subwords"


class PairBuilt(NamedTuple):
    """The model, and what its towers take.

    Attributes:
        model: see `PairModel` and `PairCaptioner`.
        images: (N, 3, H, W) uint8 on the CPU -> one row per picture, on the CPU; done once for a set.
        texts: N texts -> one row per text.
        pictures: whether rows of images are still pictures, of which views can be drawn.
    """

    model: PairNet
    images: Callable[[Tensor], Tensor]
    texts: Callable[[list[str]], Tensor]
    pictures: bool


def pair_model_options(name: str) -> list[str]:
    """What a recipe may tell the model `name`."""
    _check.choice("pair_model_options", "name", name, PAIR_MODELS)
    if name in ADAPTED:
        return list(ADAPTED[name])
    if name == "multimodal":
        return [*OF_MODALITIES, "image", "text"]
    return captioner_options() if name == "coca" else [*OWN, "image", "text"]


def check_pair_options(model: str, options: Mapping[str, Any]) -> None:
    """That towers exist and take what they are told, as far as that is known before they are made."""
    if model == "multimodal":
        sides = [(side, *tower_options(side, options.get(side, {}))) for side in ("image", "text")]
        for side, name, own in sides:
            known = image_tower_options if side == "image" else text_tower_options
            for key in {} if name.startswith("timm/") else own:
                _check.choice(model, f"option of {side} encoder {name}", key, known(name))
        return
    if model in ADAPTED:
        for key in ADAPTED[model]:
            if not isinstance(options.get(key), str):
                raise ValueError(f"{model}: {key} is {options.get(key)!r:.80}; name it, as in model.options.{key}=...")
        return
    of_towers = [("image", BACKBONE if model == "coca" else IMAGE_TOWER, image_tower_options)]
    if model == "two-tower":
        of_towers.append(("text", TEXT_TOWER, text_tower_options))
    for side, default, known in of_towers:
        name, own = _tower(model, options, side, default)
        # What timm's models take is known when one is made.
        for key in {} if name.startswith("timm/") else own:
            _check.choice(model, f"option of {side} tower {name}", key, known(name))


def build_pair_model(
    name: str,
    options: Mapping[str, Any],
    *,
    image_size: int,
    pretrained: bool = True,
    tokenizer: CaptionTokenizer | None = None,
    **settings: Any,
) -> PairBuilt:
    """The model `name`, initialised from torch's global generator.

    Args:
        name: one of PAIR_MODELS.
        options: what a recipe tells it: arguments of `PairModel`, and `image` and `text`, each a table with the name of
            a tower and its options; for "coca" see `build_captioner`; for "hf-clip" the `path` of a folder, and for
            "open-clip" the `architecture` and the `checkpoint`, a file.
        image_size: side of the pictures in pixels.
        pretrained: False leaves out weights of towers that are tuned, for those that are loaded afterwards.
        tokenizer: what "coca" writes captions with.
        settings: further arguments of `PairModel`, such as temperature and classes.
    """
    for key in options:
        _check.choice("build_pair_model", f"option of {name}", key, pair_model_options(name))
    if name == "coca":
        assert tokenizer is not None
        backbone, of_backbone = _tower(name, options, "image", BACKBONE)
        decoder = {key: value for key, value in options.items() if key in CAPTIONER_OWN}
        settings.pop("classes", None)  # it has no classifier
        captioner, prepare = build_captioner(
            backbone, of_backbone, decoder, tokenizer, image_size=image_size, pretrained=pretrained, **settings
        )
        return PairBuilt(captioner, prepare, tokenizer.encode, True)
    if name in ADAPTED:
        return _adapted(name, options, image_size, settings)
    own = {key: value for key, value in options.items() if key in OWN}
    image_name, image_options = _tower(name, options, "image", IMAGE_TOWER)
    text_name, text_options = _tower(name, options, "text", TEXT_TOWER)
    image = image_tower(image_name, image_options, image_size=image_size, pretrained=pretrained)
    text = text_tower(text_name, text_options, pretrained=pretrained)
    own |= {"image_width": image.features, "text_width": text.features}
    model = PairModel(image.encoder, text.encoder, **own, **settings)
    return PairBuilt(model, image.prepare, text.prepare, image.pictures)


def _adapted(name: str, options: Mapping[str, Any], image_size: int, settings: dict[str, Any]) -> PairBuilt:
    """A pre-trained model of another package, with the temperature and the bias that it was trained with."""
    own = {key: options[key] for key in ADAPTED[name]}
    parts = load_hf_clip(own["path"]) if name == "hf-clip" else load_open_clip(own["architecture"], own["checkpoint"])
    widths = {"image_width": parts.features, "text_width": parts.features, "projection": "none"}
    # Rounding may have left a scale just above the largest one.
    trained = {"temperature": 1.0 / min(parts.logit_scale, MAX_SCALE), "bias": parts.logit_bias}
    image = Resized(parts.image, parts.image_size) if parts.image_size != image_size else parts.image
    model = PairModel(image, parts.text, **{**trained, **widths, **settings})
    return PairBuilt(model, partial(_pictures, image_size=image_size), parts.tokenize, True)


def _tower(model: str, options: Mapping[str, Any], side: str, default: str) -> tuple[str, dict[str, Any]]:
    """Name and options of one tower."""
    table = options.get(side, {})
    if not isinstance(table, Mapping) or not isinstance(table.get("name", default), str):
        raise ValueError(
            f'{model}: the model option {side} is {table!r:.80}; write a table such as {{ name = "{default}" }}.'
        )
    rest = {key: value for key, value in table.items() if key != "name"}
    return table.get("name", default), rest
