"""What a few-labels run takes from the run that it starts from: a backbone, and for Co-Tuning its classifier too."""

from __future__ import annotations

from torch import Tensor, nn

from hardmix.data.catalog import CATALOG, load_images
from hardmix.models.build import build_model
from hardmix.semi.features import find_head
from hardmix.train.recipe import Recipe, start_recipe
from hardmix.train.start import start_tensors
from hardmix.train.state import match_shapes

#: the part of a few-labels run's tensors that is the backbone
INSIDE = "backbone."


def start_backbone(backbone: nn.Module, recipe: Recipe) -> None:
    """The weights of `tune.start`, its classifier left out."""
    weights, head, own = _weights(recipe), _head(backbone), backbone.state_dict()
    weights = {name: value for name, value in weights.items() if not name.startswith(head)}
    weights |= {name: value for name, value in own.items() if name.startswith(head)}
    match_shapes("tune.start", backbone, weights)
    backbone.load_state_dict(weights)


def source_model(backbone: nn.Module, recipe: Recipe, shape: tuple[int, int, int]) -> nn.Module:
    """The model of `tune.start` with its own classifier, for images (C, H, W) of the recipe."""
    weights = _weights(recipe)
    last = weights[f"{_head(backbone)}weight"]
    options = {key: value for key, value in recipe.model.options.items() if key != "checkpoint"}
    model = build_model(recipe.model.name, num_classes=len(last), in_channels=shape[0], image_size=shape[1], **options)
    match_shapes("tune.start", model, weights)
    model.load_state_dict(weights)
    return model


def source_classes(recipe: Recipe) -> int:
    """How many classes the start tells apart, by its recipe alone."""
    data = start_recipe(recipe.tune.start, recipe.task).data
    if names := CATALOG[data.name].class_names:
        return len(names)
    return len(load_images(data.name, data.path or None).train.class_names)


def _head(backbone: nn.Module) -> str:
    """The beginning of the names of the classifier's tensors."""
    head = find_head("tune.start", backbone)
    return next(f"{name}." for name, module in backbone.named_modules() if module is head)


def _weights(recipe: Recipe) -> dict[str, Tensor]:
    weights, _ = start_tensors(recipe)
    if any(name.startswith(INSIDE) for name in weights):
        return {name.removeprefix(INSIDE): value for name, value in weights.items() if name.startswith(INSIDE)}
    return weights
