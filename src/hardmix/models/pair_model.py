"""Two towers that bring pictures and texts into one space."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check

PROJECTIONS = ("linear", "mlp", "none")
#: the parts that can be held as they are
PARTS = ("image", "text", "image_projection", "text_projection")
#: the largest scale that is learnt, that of CLIP
MAX_SCALE = 100.0


class PairOutput(NamedTuple):
    """What a `PairModel` makes of pictures and texts; None for what it was not asked for."""

    image: Tensor | None
    text: Tensor | None
    scale: Tensor
    logits: Tensor | None


class PairModel(nn.Module):
    """An image tower, a text tower, a projection after each, and the scale of their cosines.

        a = P_v f_v(picture)        b = P_t f_t(text)        s = exp(logit_scale)

    Args:
        image, text: encoders (N, ...) -> (N, width).
        image_width, text_width: sizes of what they make.
        features: D, size of the common space.
        projection: "linear", without a bias as in CLIP; "mlp", a hidden layer of D with GELU and a linear shortcut; or
            "none" for encoders that end in one space already (their widths are D).
        dropout: share of the towers' features that training sets to 0.
        temperature: 1 / s at the start.
        learn_temperature: whether s is trained; it is held at 100 at most.
        bias: of the logits of SigLIP, at the start; None for losses that have none.
        classes: classes of a linear head on the picture's features of length 1; 0 for no head.

    `forward(images, texts)` gives a `PairOutput` (a, b, s, None), with None for a side that is not asked for;
    `forward(images, classify=True)` also the head's logits (N, C), z = s W a / |a| + c: with unit features of class
    prompts for the rows of W, and c = 0, that is zero-shot classification.

    Raises:
        ValueError: sizes, shares or names out of range; with "none", widths that disagree.
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        *,
        image_width: int,
        text_width: int,
        features: int = 128,
        projection: str = "linear",
        dropout: float = 0.0,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        bias: float | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        _check.integer(who, "features", features, 1)
        _check.choice(who, "projection", projection, PROJECTIONS)
        if projection == "none" and image_width != text_width:
            raise ValueError(
                f"{who}: the towers make {image_width} and {text_width} features; pass a projection into one space."
            )
        self.features = image_width if projection == "none" else features
        self.image, self.text = image, text
        self.image_projection = _projection(projection, image_width, features, dropout)
        self.text_projection = _projection(projection, text_width, features, dropout)
        scale = 1.0 / _check.positive(who, "temperature", temperature)
        if learn_temperature and scale > MAX_SCALE:
            raise ValueError(
                f"{who}: temperature is {temperature:g}, and one that is learnt is at least {1 / MAX_SCALE:g}; pass "
                "that, or learn_temperature=False."
            )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_temperature)
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.head = nn.Linear(self.features, classes) if classes else None
        self.frozen: tuple[str, ...] = ()

    def freeze(self, parts: tuple[str, ...]) -> None:
        """Hold these parts as they are: no gradient, and computing as in evaluation."""
        for name in PARTS:
            getattr(self, name).requires_grad_(name not in parts)
        self.frozen = tuple(_check.choice("PairModel.freeze", "parts", name, PARTS) for name in parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> PairModel:
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    @property
    def scale(self) -> Tensor:
        """s; where it is learnt, no larger than 100."""
        raw = self.logit_scale
        return (raw.clamp(max=math.log(MAX_SCALE)) if raw.requires_grad else raw).exp()

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None, classify: bool = False) -> PairOutput:
        a = None if images is None else self.image_projection(self.image(images))
        b = None if texts is None else self.text_projection(self.text(texts))
        scale, logits = self.scale, None
        if classify:
            if self.head is None or a is None:
                raise ValueError("PairModel: classify needs pictures and a model with classes.")
            logits = scale * nn.functional.linear(nn.functional.normalize(a.float(), dim=1), self.head.weight)
            logits = logits + self.head.bias
        return PairOutput(a, b, scale, logits)


class Resized(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1], scaled to the side that an encoder takes."""

    def __init__(self, encoder: nn.Module, side: int) -> None:
        super().__init__()
        self.encoder, self.side = encoder, _check.integer(type(self).__name__, "side", side, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.encoder(x.clamp(0.0, 1.0))


class _Residual(nn.Module):
    """x -> W x + V gelu(U x)."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.short = nn.Linear(width, features, bias=False)
        self.long = nn.Sequential(nn.Linear(width, features), nn.GELU(), nn.Linear(features, features))

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.long(x)


def _projection(kind: str, width: int, features: int, dropout: float) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    last = nn.Linear(width, features, bias=False) if kind == "linear" else _Residual(width, features)
    return nn.Sequential(nn.Dropout(_check.between("PairModel", "dropout", dropout, 0.0, 1.0)), last)


def layer_depths(model: nn.Module) -> dict[str, int]:
    """How many layers lie between each parameter of a `PairModel`'s towers and the end of its tower, counted from 1.

    A layer is a part of the tower that holds parameters, of those that its class names one after another; a list of
    blocks counts block by block. What a tower holds beside its layers, such as places of tokens, counts as the first
    one. Parameters that are in no tower are not listed.
    """
    depths: dict[str, int] = {}
    for tower in ("image", "text", "decoder"):  # the text tower of a captioner
        top = getattr(model, tower, None)
        if isinstance(top, nn.Module):
            layers = _layers(tower, top)
            for place, (prefix, layer) in enumerate(layers):
                for name, _ in layer.named_parameters():
                    depths[f"{prefix}.{name}"] = len(layers) - place
            for name, _ in top.named_parameters(tower):
                depths.setdefault(name, len(layers))
    return depths


def _layers(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the layers of a tower, the first one first."""
    parts = [(f"{prefix}.{name}", part) for name, part in module.named_children() if _learns(part)]
    if len(parts) == 1 and not list(module.parameters(recurse=False)):
        return _layers(*parts[0])
    found: list[tuple[str, nn.Module]] = []
    for name, part in parts:
        found += _layers(name, part) if isinstance(part, (nn.ModuleList, nn.Sequential)) else [(name, part)]
    return found or ([(prefix, module)] if _learns(module) else [])


def _learns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
