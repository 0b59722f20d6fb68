"""The section of a recipe for few labels, and what has to fit together there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from hardmix import tables
from hardmix.data.kind_views import VIEWS
from hardmix.semi import SemiAlgorithm
from hardmix.train.components import Component, build_algorithm, check_algorithm, check_name, policy_names
from hardmix.train.sections import Float, Section

if TYPE_CHECKING:
    from hardmix.train.recipe import Recipe

#: how Co-Tuning finds which classes of the start a class is like, its option `relationship`
RELATIONSHIPS = ("direct", "learned")
#: algorithms whose option `threshold` is for mixed pairs alone
PAIR_THRESHOLDS = ("mixmatch", "fine-tuning", "co-tuning", "self-tuning")
PAIR_KEYS = ("pair_weight", "pair_ramp", "pair_share", "pair_confident")


class SemiSection(Section):
    algorithm: Component = Field(
        default_factory=lambda: Component(name="fixmatch"), description="how it learns from few labels; its settings"
    )
    per_class: int = Field(0, ge=0, description="labelled samples of each class; drawn by the seed")
    share: Float = Field(0.0, ge=0.0, le=1.0, description="instead, the share of each class's samples that is labelled")
    split: str = Field("", description="instead, a file that says which samples are labelled, split.json of a run")
    labelled: str = Field("", description="of data.name=folder: table of the labelled files and their classes")
    unlabelled: str = Field(
        "", description="of data.name=folder: folder of the unlabelled images, if not the usual one"
    )
    include_labelled: bool = Field(True, description="count the labelled samples among the unlabelled ones too")
    allow_overlap: bool = Field(
        False, description="let unlabelled files be the same as labelled or test ones, byte by byte"
    )
    mu: int = Field(7, ge=1, description="unlabelled samples of a step for each labelled one")
    steps_per_epoch: int = Field(
        0, ge=0, description="steps between two evaluations; 0: once through the unlabelled samples, or the labelled"
    )
    strong: list[str] = Field(
        default_factory=lambda: ["flip", "crop", "randaugment", "cutout"],
        description="random views that make a strong view; weak ones are data.augment",
    )
    pair_weight: Float = Field(1.0, ge=0.0, description="of pairs of labelled and unlabelled samples that policy mixes")
    pair_ramp: Float = Field(1.0, ge=0.0, le=1.0, description="share of the training over which that weight rises")
    pair_share: Literal["small", "large", "any"] = Field("small", description="share of the labelled sample in a pair")
    pair_confident: bool = Field(True, description="count pairs as much as their pseudo-class is trusted")
    head_rate: Float = Field(1.0, gt=0.0, description="factor on the learning rate of the classifier, for transfer")

    @field_validator("strong")
    @classmethod
    def _views_exist(cls, value: list[str]) -> list[str]:
        for name in value:
            check_name("view", name, VIEWS["images"])
        return value

    @field_validator("algorithm", mode="after")
    @classmethod
    def _known(cls, value: Component) -> Component:
        try:
            if value.name == "co-tuning":
                asked = value.options.get("relationship", RELATIONSHIPS[0])
                if not isinstance(asked, str):
                    raise TypeError(f"relationship is {asked!r}; name one of {', '.join(RELATIONSHIPS)}")
                check_name("relationship", asked, RELATIONSHIPS)
            check_algorithm(own_options(value))
            if not isinstance(value.options.get("head", ""), str):
                raise TypeError(f"head is {value.options['head']!r}; name a layer of the model")
            small_one(value)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return value


def own_options(algorithm: Component) -> Component:
    """An algorithm with what its class takes: the task looks at Co-Tuning's `relationship`, and hands over a matrix."""
    told = algorithm.name == "co-tuning"
    options = {key: value for key, value in algorithm.options.items() if not (told and key == "relationship")}
    return Component(name=algorithm.name, **options)


def small_one(algorithm: Component) -> SemiAlgorithm:
    """An algorithm with its settings, without pairs, for two classes and a model without storage."""
    options = {key: value for key, value in own_options(algorithm).options.items() if key != "head"}
    with torch.random.fork_rng(devices=[]):  # to read a recipe draws nothing
        built: SemiAlgorithm = build_algorithm(
            Component(name=algorithm.name, **options),
            model=nn.Linear(1, 2, device="meta"),
            num_classes=2,
            num_unlabelled=1,
            class_share=torch.full((2,), 0.5),
            steps=1,
            source_weight=torch.zeros(2, 1),
            relationship=torch.full((2, 2), 0.5),
        )
    return built


def check_few(recipe: Recipe) -> None:
    """Raises ValueError with the first thing of a few-labels recipe that does not fit."""
    semi = recipe.semi
    own = recipe.data.name == "folder"
    said = [key for key in ("per_class", "share", "split") if getattr(semi, key)]
    if len(said) > 1:
        raise ValueError(f"semi.{said[0]} and semi.{said[1]} both say which samples are labelled; leave one out")
    if own and said:
        raise ValueError(
            f"semi.{said[0]} draws labelled samples, but of a folder the files say which are labelled; leave it out, "
            "or list them in a table with semi.labelled"
        )
    if not own and not said:
        raise ValueError("semi says nothing about which samples are labelled; set semi.per_class, share or split")
    for key in ("labelled", "unlabelled"):
        if getattr(semi, key) and not own:
            raise ValueError(f'semi.{key} is for data.name="folder"; leave it out')
    if semi.split and recipe.data.train_samples:
        raise ValueError("semi.split is of a whole set, and data.train_samples takes a part of it; leave one out")
    if recipe.train.accumulate > 1:
        raise ValueError("train.accumulate would tear labelled samples from their unlabelled ones; set it to 1")
    algorithm = semi.algorithm.name
    if algorithm == "co-tuning" and not recipe.tune.start:
        raise ValueError('algorithm "co-tuning" keeps the classifier of a pre-trained model; name one with tune.start')
    if semi.algorithm.options.get("relationship") == "learned" and semi.per_class == 1:
        raise ValueError(
            "semi.algorithm.relationship=learned holds out a labelled sample of each class, and semi.per_class is 1; "
            "label two or more, or take relationship=direct"
        )
    if recipe.train.epochs == 0:
        raise ValueError(
            "train.epochs is 0, and the classifier starts at random, so it would measure chance; set 1 or more"
        )
    _check_pairs(recipe)
    # A recipe that was saved with its run has every default written out, those that a person leaves one out of too.
    if not semi.model_fields_set >= {"per_class", "share", "split", "labelled"}:
        from hardmix.train.few_start import check_start  # it reads recipes

        _check_effects(recipe)
        check_start(recipe)


def _check_effects(recipe: Recipe) -> None:
    """Nothing is set that changes nothing. `mu` may be, since the recipes of a comparison share it."""
    semi, said = recipe.semi, recipe.semi.model_fields_set
    algorithm = semi.algorithm
    if semi.allow_overlap and recipe.data.name != "folder":
        raise ValueError('semi.allow_overlap is for data.name="folder"; leave it out')
    if recipe.policy is None:
        for key in PAIR_KEYS:
            if key in said:
                raise ValueError(f"semi.{key} is of mixed pairs, and nothing is mixed; leave it out, or add a policy")
        if algorithm.name in PAIR_THRESHOLDS and "threshold" in algorithm.options:
            raise ValueError(
                f'semi.algorithm.threshold of "{algorithm.name}" is of mixed pairs, and nothing is mixed; leave it '
                "out, or add a policy"
            )
    if "strong" in said and "strong" not in small_one(algorithm).views:
        raise ValueError(f'semi.strong makes strong views, of which "{algorithm.name}" takes none; leave it out')
    if semi.split:
        if "include_labelled" in said and semi.include_labelled:
            raise ValueError("semi.split says which samples are unlabelled; leave semi.include_labelled out")
        if "validation" in recipe.data.model_fields_set and recipe.data.validation:
            raise ValueError(
                f"semi.split says which samples are for validation, so data.validation={recipe.data.validation:g} "
                "changes nothing; leave it out, or set it to 0"
            )


def _check_pairs(recipe: Recipe) -> None:
    """A policy and an objective that go with the algorithm, or neither."""
    algorithm = recipe.semi.algorithm.name
    if recipe.policy is None:
        if recipe.objective.name != "soft-cross-entropy" or recipe.objective.options:
            raise ValueError(
                f'objective "{recipe.objective.name}" is of mixed pairs here, and nothing is mixed; add a policy'
            )
        return
    if not tables.takes_pairs(algorithm):
        known = ", ".join(name for name in tables.ALGORITHMS if tables.takes_pairs(name))
        raise ValueError(f'algorithm "{algorithm}" mixes no pairs, so it takes no policy; {known} do')
    for name in {recipe.policy.name, *policy_names(recipe.policy.model_dump())}:
        if name not in tables.PAIR_POLICIES:
            raise ValueError(
                f'policy "{name}" can\'t mix a labelled with an unlabelled sample; take one of '
                f"{', '.join(tables.PAIR_POLICIES)}"
            )
    if recipe.objective.name not in tables.MIXED_PAIR_OBJECTIVES:
        raise ValueError(
            f'objective "{recipe.objective.name}" is not one of pairs; take {" or ".join(tables.MIXED_PAIR_OBJECTIVES)}'
        )
