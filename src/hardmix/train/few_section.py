"""The section of a recipe for few labels, and what has to fit together there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from hardmix import tables
from hardmix.data.kind_views import VIEWS
from hardmix.train.components import Component, check_algorithm, check_name, policy_names
from hardmix.train.sections import Float, Section

if TYPE_CHECKING:
    from hardmix.train.recipe import Recipe


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
    def _known(cls, value: Component, info: ValidationInfo) -> Component:
        try:
            check_algorithm(value)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return value


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
