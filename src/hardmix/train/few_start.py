"""What a few-labels run takes from the run that it starts from: a backbone, and for Co-Tuning its classifier too."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hardmix.data.catalog import CATALOG, load_images
from hardmix.data.decode import shown
from hardmix.data.images import ImageData, ImageSet
from hardmix.data.splits import train_validation_split
from hardmix.data.views import Normalize
from hardmix.models.build import MODELS, build_model
from hardmix.semi.co_tuning import category_relationship, learned_relationship
from hardmix.semi.features import find_head
from hardmix.train.errors import CheckpointError
from hardmix.train.few_data import load_few
from hardmix.train.recipe import Recipe, start_recipe
from hardmix.train.seeds import derive
from hardmix.train.start import start_tensors
from hardmix.train.state import list_steps, load_checkpoint, match_shapes

#: the part of a few-labels run's tensors that is the backbone, and what Co-Tuning learns of the start's classifier
INSIDE, SOURCE = "backbone.", "algorithm.source.weight"
#: share of the labelled samples that a learned relationship is chosen by
HELD_OUT = 0.2


def check_start(recipe: Recipe) -> None:
    """That the model is that of the start, the classifier aside, before the start is trained for it.

    A start that isn't there or is no good is the run's matter, models of timm and images of unknown size are for when
    the weights are loaded.

    Raises:
        ValueError: a model that can't be built, whose weights have other shapes than the start's, or without the layer
            that the algorithm's `head` names.
    """
    if not recipe.tune.start or recipe.model.name not in MODELS or not (shape := _image_shape(recipe)):
        return
    own = _outline(recipe, shape)
    find_head("semi.algorithm", own, recipe.semi.algorithm.options.get("head", ""))
    try:
        before = start_recipe(recipe.tune.start, recipe.task)
        if before.model.name not in MODELS or not (its_shape := _image_shape(before)):
            return
        its = _outline(before, its_shape)
    except ValueError:
        return
    here, there = ({name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (own, its))
    for name in [*there, *here]:
        if here.get(name) != there.get(name) and not name.startswith((_head(own), _head(its))):
            raise ValueError(
                f"tune.start is {recipe.tune.start!r}, whose weights don't fit model {recipe.model.name!r}: {name} is "
                f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} here; take its model section "
                "and images of the same shape"
            )


def _image_shape(recipe: Recipe) -> tuple[int, int] | None:
    """Channels and height of the images as far as the recipe says; None where only the files know."""
    shape = CATALOG[recipe.data.name].shape or (3, 0, 0)
    size = recipe.data.image_size or shape[1]
    return (shape[0], size) if size else None


def _outline(recipe: Recipe, shape: tuple[int, int]) -> nn.Module:
    """The model of a recipe without storage."""
    options = {key: value for key, value in recipe.model.options.items() if key != "checkpoint"}
    with torch.device("meta"):
        return build_model(recipe.model.name, num_classes=2, in_channels=shape[0], image_size=shape[1], **options)


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


def source_probs(model: nn.Module, recipe: Recipe, images: ImageSet) -> Tensor:
    """(N, C_s) what the start's model predicts of `images`, normalised as that run normalised its own."""
    normalize, parts = _start_normalize(recipe), torch.arange(len(images)).split(recipe.eval.batch_size)
    with torch.no_grad():
        return torch.cat([model(normalize(images.batch(rows))).float().softmax(1) for rows in parts])


def source_relationship(recipe: Recipe, probs: Tensor, labelled: ImageSet) -> Tensor:
    """(C_t, C_s) relationship of the labelled samples' classes to those that the start predicts of them.

    Raises:
        ValueError: it is to be learned, which takes a held-out sample of each class, and a class has a single one.
    """
    labels, classes = labelled.labels, len(labelled.class_names)
    if recipe.semi.algorithm.options.get("relationship", "direct") == "direct":
        return category_relationship(probs, labels, classes)
    single = (labels.bincount(minlength=classes) < 2).nonzero().flatten().tolist()
    if single:
        raise ValueError(
            "semi.algorithm.relationship=learned holds out a labelled sample of each class, and "
            f"{labelled.class_names[single[0]]!r:.60} has 1; label another one, or take relationship=direct."
        )
    held = max(round(HELD_OUT * len(labels)), classes)
    rows, rest = train_validation_split(labels, held / len(labels), seed=derive(recipe.seed, "relationship"))
    return learned_relationship(probs[rows], labels[rows], probs[rest], labels[rest], classes)


def source_classes(backbone: nn.Module, recipe: Recipe) -> int:
    """How many classes the start tells apart, by its weights; 2 where it is gone, see `saved_classes`."""
    try:
        return len(_weights(recipe)[f"{_head(backbone)}weight"])
    except (ValueError, CheckpointError, KeyError):
        return 2


def saved_classes(folder: Path) -> int | None:
    """How many classes the start of a Co-Tuning run told apart, by the run's own checkpoints; None without one."""
    root = folder / "checkpoints"
    for step in reversed(list_steps(root)):
        try:
            return len(load_checkpoint(root, step).tensors["model"][SOURCE])
        except (CheckpointError, KeyError):  # damaged; another one may do
            continue
    return None


def _start_normalize(recipe: Recipe) -> Normalize:
    """Normalisation by the mean and deviation of the start's images, which a run does not keep."""
    before = start_recipe(recipe.tune.start, recipe.task)
    data = before.data
    try:
        if before.task == "few-labels" and data.name == "folder":
            found: ImageData = load_few(before)[0]
        else:
            found = load_images(
                data.name, data.path or None, image_size=data.image_size or None, on_error=data.on_error
            )
    except FileNotFoundError:
        get = f"get them ({CATALOG[data.name].get})"
        what, how = (shown(data.path), "put them back") if data.path else (data.name, get)
        raise FileNotFoundError(
            f"tune.start is {recipe.tune.start!r}, whose images ({what}) aren't there, and Co-Tuning shows the start's "
            f"classifier its samples normalised by them; {how}."
        ) from None
    return Normalize(found.mean, found.std)


def _head(backbone: nn.Module) -> str:
    """The beginning of the names of the classifier's tensors."""
    head = find_head("tune.start", backbone)
    return next(f"{name}." for name, module in backbone.named_modules() if module is head)


def _weights(recipe: Recipe) -> dict[str, Tensor]:
    weights, _ = start_tensors(recipe)
    if any(name.startswith(INSIDE) for name in weights):
        return {name.removeprefix(INSIDE): value for name, value in weights.items() if name.startswith(INSIDE)}
    return weights
