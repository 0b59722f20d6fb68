"""The part of a training split with classes that `data.train_samples` asks for."""

from __future__ import annotations

from torch import Tensor

from hardmix.data.images import ImageSet
from hardmix.data.splits import stratified_subset
from hardmix.train.recipe import Recipe


def stratified_rows(recipe: Recipe, images: ImageSet) -> Tensor:
    """Rows of data.train_samples training images, at most all."""
    samples, classes = recipe.data.train_samples, len(images.labels.unique())
    if samples < classes:
        raise ValueError(
            f"data.train_samples is {samples}, but {recipe.data.name} has {len(images):,} training images of {classes} "
            f"classes; set a number from {classes} to {len(images)}, or 0 for all."
        )
    return stratified_subset(images.labels, min(samples, len(images)), seed=recipe.seed)
