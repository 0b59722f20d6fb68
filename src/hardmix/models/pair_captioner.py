"""CoCa where the image-text task has two towers: the same pictures, its texts as ids, and the captions it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.characters import UNITS, CaptionTokenizer
from hardmix.models.captioner import CoCa
from hardmix.models.pair_model import PARTS, PairModel, PairOutput
from hardmix.models.towers import PictureEncoder, image_tower

#: arguments of `CoCa` that a recipe says under `model`, and how its captions are cut into tokens
OWN = ("features", "width", "heads", "text_layers", "layers", "queries", "dropout")
TOKENS = ("unit", "max_length")
#: the backbone where a recipe names none
BACKBONE = "small-resnet"


class PairCaptioner(CoCa):
    """A `CoCa` that is called, held and frozen as a `PairModel` is.

    `forward(images, texts)` gives a `PairOutput` (a, b, s, logits): features of both, the scale, and the logits
    (N, L - 1, V) of the captions; of one side alone its features, without logits. There is no classifier.

    Args:
        image: encoder of pictures (N, 3, H, W) in [0, 1], with `forward_features` and `num_features`.
        tokenizer: of the texts, which are ids (N, L).
        learn_temperature: whether s is trained.
        settings: of `CoCa`.

    Parts that can be held: "image" is the encoder, "image_projection" what pools and projects its map, "text" the
    decoder, which writes the captions too, "text_projection" the projection of a text.

    Raises:
        ValueError: as `CoCa`.
    """

    head: nn.Linear | None = None
    logit_bias: nn.Parameter | None = None

    def __init__(
        self, image: nn.Module, tokenizer: CaptionTokenizer, *, learn_temperature: bool = True, **settings: Any
    ) -> None:
        super().__init__(image, vocabulary=len(tokenizer), max_length=tokenizer.max_length, **settings)
        self.tokenizer = tokenizer
        self.logit_scale.requires_grad_(learn_temperature)
        self.frozen: tuple[str, ...] = ()

    def freeze(self, parts: tuple[str, ...]) -> None:
        """Hold these parts as they are: no gradient, and computing as in evaluation."""
        for name in PARTS:
            for module in self._part(name):
                module.requires_grad_(name not in parts)
        self.frozen = tuple(_check.choice("PairCaptioner.freeze", "parts", name, PARTS) for name in parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> PairCaptioner:
        super().train(mode)
        for name in self.frozen:
            for module in self._part(name):
                module.eval()
        return self

    def _part(self, name: str) -> tuple[nn.Module, ...]:
        if name == "image_projection":
            return self.tokens, self.pool, self.pool_all, self.image_projection
        return (self.decoder,) if name == "text" else (getattr(self, name),)

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None) -> PairOutput:  # type: ignore[override]
        if images is not None and texts is not None:
            a, b, logits, scale = super().forward(images, texts)
            return PairOutput(a, b, scale, logits)
        a_alone = None if images is None else self.encode_image(images)
        return PairOutput(a_alone, None if texts is None else self.encode_text(texts), self.scale, None)


#: what the image-text task trains
PairNet = PairModel | PairCaptioner


def captioner_options() -> list[str]:
    """What a recipe may tell the model."""
    return [*OWN, *TOKENS, "image"]


def caption_tokenizer(options: Mapping[str, Any], captions: list[str]) -> CaptionTokenizer:
    """The tokenizer of a run that begins with these training captions.

    Args:
        options: of the recipe's model: `unit`, "character" unless said otherwise, and `max_length`, the most tokens of
            a caption, begin and end included; 0 for those of the longest.
    """
    unit = _check.choice("coca", "unit", options.get("unit", UNITS[0]), UNITS)
    return CaptionTokenizer.build(captions, unit=unit, max_length=options.get("max_length", 0))


def build_captioner(
    name: str,
    image: Mapping[str, Any],
    options: Mapping[str, Any],
    tokenizer: CaptionTokenizer,
    *,
    image_size: int,
    pretrained: bool = True,
    **settings: Any,
) -> tuple[PairCaptioner, Callable[[Tensor], Tensor]]:
    """The model, initialised from torch's global generator, and what prepares its pictures once for a set.

    Args:
        name, image, image_size, pretrained: of the encoder, see `image_tower`.
        options: of a recipe, those in OWN.
        settings: further arguments of `PairCaptioner`.

    Raises:
        ValueError: a frozen encoder, whose features have no map to look at; and as `image_tower` and `CoCa`.
    """
    if image.get("frozen"):
        raise ValueError('coca: image is frozen, but captions need its map; take tune.freeze = ["image"] instead.')
    tower = image_tower(name, image, image_size=image_size, pretrained=pretrained)
    assert isinstance(tower.encoder, PictureEncoder)
    _end_at_the_map(tower.encoder, image_size)
    return PairCaptioner(tower.encoder, tokenizer, **options, **settings), tower.prepare


@torch.enable_grad()
def _end_at_the_map(encoder: PictureEncoder, image_size: int) -> None:
    """Take off what a backbone has behind its last map: without a gradient, processes would wait for it."""
    encoder.eval()
    names, values = zip(*encoder.model.named_parameters(), strict=True)
    found = encoder.forward_features(torch.zeros(1, 3, image_size, image_size))
    gradients = torch.autograd.grad(found.sum(), values, allow_unused=True)
    used = {name.partition(".")[0] for name, grad in zip(names, gradients, strict=True) if grad is not None}
    for name in {name.partition(".")[0] for name in names if "." in name} - used:
        setattr(encoder.model, name, nn.Identity())
    encoder.train()
