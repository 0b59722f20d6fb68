"""What has to fit together in a recipe for pictures with texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hardmix import tables
from hardmix.losses import IMixLoss, UnMixLoss
from hardmix.models.pair_build import check_pair_options
from hardmix.train.components import policy_names

if TYPE_CHECKING:
    from hardmix.train.recipe import Recipe

#: what a recipe of another task is told
OF_TUNE = "tune is a section of image-text recipes, of which few-labels take tune.start and modalities tune.classes"
#: objectives of pictures that a policy has mixed
OF_MIXTURES = (IMixLoss, UnMixLoss)


def check_pairs(recipe: Recipe) -> None:
    """Raises ValueError with the first thing that does not fit."""
    tune, name = recipe.tune, recipe.objective.name
    if recipe.model.name == "multimodal":
        raise ValueError('model "multimodal" is of task "modalities"; take another one, two-tower for one')
    check_pair_options(recipe.model.name, recipe.model.options)
    _check_objective(recipe)
    mixes = tables.PAIR_OBJECTIVES.get(name) in OF_MIXTURES
    if mixes and recipe.policy is None:
        raise ValueError(f'objective "{name}" is of mixed pictures; add a policy such as mixup')
    if recipe.policy is not None and not mixes:
        known = ", ".join(key for key, cls in tables.PAIR_OBJECTIVES.items() if cls in OF_MIXTURES)
        raise ValueError(f'a policy mixes pictures, which objective "{name}" knows nothing of; it goes with {known}')
    for inside in [] if recipe.policy is None else policy_names(recipe.policy.model_dump()):
        if inside in tables.NEEDS_MODEL or inside in tables.REGRESSION_POLICIES:
            raise ValueError(f'policy "{inside}" does not mix pictures with texts; take one that mixes inputs')
    if tune.probe_epochs > recipe.train.epochs:
        raise ValueError(f"tune.probe_epochs is {tune.probe_epochs}, more than train.epochs ({recipe.train.epochs})")
    if tune.probe_epochs and not tune.head:
        raise ValueError("tune.probe_epochs trains a head first, and there is none; set tune.head=true")
    stages = [epochs for epochs in (tune.probe_epochs, recipe.train.epochs - tune.probe_epochs) if epochs]
    if stages and (shortest := min(stages)) <= recipe.train.warmup_epochs:
        raise ValueError(
            f"train.warmup_epochs is {recipe.train.warmup_epochs:g} but the shorter stage has {shortest} epochs; "
            "its learning rate would never come down: set a smaller warm-up, 0 is fine"
        )
    if tune.after in ("wise-ft", "tpgm") and not tune.start:
        raise ValueError(f"tune.after={tune.after} goes back towards the start, and tune.start names none")
    if tune.lora:
        _check_lora(recipe)
    _check_sections(recipe)
    if tune.amount >= 0.0 and tune.after in ("nothing", "tpgm"):
        raise ValueError(
            f"tune.amount is {tune.amount:g}, which tune.after={tune.after} makes nothing of; leave it out"
        )
    if tune.head and tune.texts == "classes":
        raise ValueError("tune.head trains without texts, so tune.texts makes no difference; leave it out")
    if tune.after == "tpgm" and tune.head and tune.probe_epochs == recipe.train.epochs:
        raise ValueError("tune.after=tpgm goes back towards the start, from where a linear probe moves nothing")


def check_modalities(recipe: Recipe) -> None:
    """Raises ValueError with the first thing that does not fit."""
    if recipe.model.name != "multimodal":
        raise ValueError(f'model "{recipe.model.name}" is not one of several modalities; take multimodal')
    check_pair_options(recipe.model.name, recipe.model.options)
    if recipe.objective.name not in tables.MODALITY_OBJECTIVES:
        known = ", ".join(tables.MODALITY_OBJECTIVES)
        raise ValueError(f'objective "{recipe.objective.name}" is not one of task "modalities"; there are {known}')
    if recipe.policy is not None:
        raise ValueError("a policy mixes pictures, which has no meaning for several modalities; leave it out")
    if recipe.tune != type(recipe.tune)(classes=recipe.tune.classes):
        raise ValueError(f"{OF_TUNE}; leave out all but tune.classes")
    if recipe.eval.parts:
        raise ValueError("eval.parts is for image-text recipes; leave it out")
    if recipe.train.accumulate > 1:
        raise ValueError("train.accumulate splits the samples that are compared with each other; set it to 1")
    if recipe.data.styles:
        _check_styles(recipe)
    _check_sections(recipe)


def _check_styles(recipe: Recipe) -> None:
    for name in recipe.data.styles:
        if not name.isidentifier():
            raise ValueError(f"data.styles has {name!r}; call a modality by letters, digits and underscores")


def _check_sections(recipe: Recipe) -> None:
    """No section or key of other tasks."""
    if recipe.contrast is not None or recipe.density.lds or recipe.density.fds:
        raise ValueError("contrast and density are sections of regression recipes; leave them out")
    if recipe.semi != type(recipe.semi)():
        raise ValueError("semi is a section of few-labels recipes; leave it out")
    for key in ("pair", "missing", "imbalance", "imbalance_law"):
        if getattr(recipe.data, key) != type(recipe.data).model_fields[key].default:
            raise ValueError(f"data.{key} is for sets of numbers; leave it out")


def _check_lora(recipe: Recipe) -> None:
    tune = recipe.tune
    if recipe.model.name == "coca":
        raise ValueError('tune.lora adapts two towers, which model "coca" has not; set tune.lora=0')
    held = {*tune.freeze, *(["text"] if tune.head else [])}
    if tune.head and tune.probe_epochs == recipe.train.epochs:
        held.add("image")
    if {"image", "text"} <= held:
        raise ValueError("tune.lora adapts towers, and both are held by tune.freeze or tune.head; set tune.lora=0")


def _check_objective(recipe: Recipe) -> None:
    name, head = recipe.objective.name, recipe.tune.head
    if recipe.model.name == "coca" and name != "coca":
        raise ValueError(
            f'model "coca" learns captions, which objective "{name}" knows nothing of; set objective.name=coca, which '
            "contrasts pictures and texts too"
        )
    if name == "coca" and recipe.model.name != "coca":
        raise ValueError(
            f'objective "coca" is of captions, and model "{recipe.model.name}" writes none; set model.name=coca'
        )
    if head and name != "lipsum" and name not in tables.OBJECTIVES:
        known = ", ".join([*tables.OBJECTIVES, "lipsum"])
        raise ValueError(f'tune.head trains a classifier, and objective "{name}" is none of one; take {known}')
    if not head and name == "lipsum":
        raise ValueError('objective "lipsum" holds a classifier near its start; set tune.head=true')
    if not head and name not in tables.PAIR_OBJECTIVES:
        known = ", ".join(tables.PAIR_OBJECTIVES)
        raise ValueError(f'objective "{name}" is not one of task "image-text"; there are {known}')
    if name == "lipsum" and not recipe.tune.start:
        raise ValueError('objective "lipsum" holds a classifier near its start; name one with tune.start')
