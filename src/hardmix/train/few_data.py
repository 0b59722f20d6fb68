"""The samples of a few-labels run: which are labelled, which are not, and which it is validated and tested on."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hardmix.data.catalog import load_images
from hardmix.data.few_labels import (
    FewLabelData,
    LabelSplit,
    draw_label_split,
    read_split,
    split_text,
    with_few_labels,
)
from hardmix.data.few_labels_folder import load_few_labels
from hardmix.data.images import ImageSet
from hardmix.train.recipe import Recipe
from hardmix.train.subset import stratified_rows


def load_few(recipe: Recipe) -> tuple[FewLabelData, LabelSplit | None]:
    """The sets of a recipe, and the split that made them; None for a folder, whose files say which are labelled."""
    data, semi = recipe.data, recipe.semi
    if data.name == "folder":
        return _own(recipe), None
    found = load_images(data.name, data.path or None, image_size=data.image_size or None, on_error=data.on_error)
    if data.train_samples:
        found = replace(found, train=found.train.subset(stratified_rows(recipe, found.train)))
    if semi.split:
        split = read_split(semi.split, found.train)
    else:
        split = draw_label_split(
            found.train,
            name=found.name,
            per_class=semi.per_class,
            share=semi.share,
            seed=recipe.seed,
            validation=0.0 if found.validation is not None else data.validation,
            include_labelled=semi.include_labelled,
        )
    return with_few_labels(found, split), split


def on_own_split(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of a run that has begun, on the split in its folder: the file that it was given may be gone."""
    own = folder / "split.json"
    if not recipe.semi.split or not own.is_file():
        return recipe
    return recipe.model_copy(update={"semi": recipe.semi.model_copy(update={"split": str(own)})})


def _own(recipe: Recipe) -> FewLabelData:
    """The user's files; where they have no validation folder, `data.validation` of the labelled ones are kept."""
    data, semi = recipe.data, recipe.semi
    if not data.path:
        raise FileNotFoundError("data.path is empty, and one's own images have no usual place; name their folder.")
    found = load_few_labels(
        data.path,
        labelled=semi.labelled or "labelled",
        unlabelled=semi.unlabelled or None,
        image_size=data.image_size or None,
        on_error=data.on_error,
        allow_overlap=semi.allow_overlap,
        include_labelled=semi.include_labelled,
        validation=data.validation,
        seed=recipe.seed,
    )
    first: dict[str, str] = {}
    for name in found.train.class_names:
        if (other := first.setdefault(name.casefold(), name)) != name:
            warnings.warn(
                f"data: {found.source} has the classes {other!r:.60} and {name!r:.60}, which differ in case alone and "
                "count as two; call them alike if they are one.",
                stacklevel=2,
            )
    if found.overlap:
        warnings.warn(
            f"semi.allow_overlap: {' and '.join(found.overlap)}, byte by byte; what is measured on such files says "
            "nothing of others.",
            stacklevel=2,
        )
    unlabelled, truth = found.unlabelled, found.truth
    if data.train_samples and data.train_samples < len(unlabelled):
        draws = torch.Generator().manual_seed(recipe.seed)
        kept = torch.randperm(len(unlabelled), generator=draws)[: data.train_samples].sort().values
        unlabelled, truth = unlabelled.subset(kept), truth[kept]
    return replace(found, unlabelled=unlabelled, truth=truth)


def hidden_truth(few: FewLabelData, split: LabelSplit | None) -> Tensor:
    """(U,) the unlabelled samples' classes, -1 where they are not known or where training knows them."""
    if few.truth is None or split is None:  # of a folder, what is known is what is labelled
        return torch.full((len(few.unlabelled),), -1)
    return torch.where(torch.isin(split.unlabelled, split.labelled), -1, few.truth)


def all_samples(few: FewLabelData, split: LabelSplit | None) -> int:
    """How many samples there are to train on, each counted once."""
    if split is not None:
        return len(torch.cat([split.labelled, split.unlabelled]).unique())
    return len({images.sample_id(i) for images in (few.train, few.unlabelled) for i in range(len(images))})


def record(few: FewLabelData, split: LabelSplit | None) -> str:
    """What split.json says: which samples are for what."""
    return record_of_files(few) if split is None else split_text(split)


def record_now(recipe: Recipe) -> str | None:
    """What split.json of a run of this recipe would say now; None where its files are gone."""
    try:
        return record(*load_few(recipe))
    except FileNotFoundError:
        return None


def record_of_files(few: FewLabelData) -> str:
    """JSON: which files are labelled, as what, and which validate, test, and are not labelled."""
    parts = {"labelled": few.train, "validation": few.validation, "test": few.test}
    lines = {
        name: [[file, images.class_names[int(images.labels[i])]] for i, file in enumerate(_files(few, images))]
        for name, images in parts.items()
        if images is not None
    }
    others = _files(few, few.unlabelled)
    digest = hashlib.sha256("\n".join(others).encode()).hexdigest()
    return json.dumps({**lines, "unlabelled": len(others), "sha256 of the unlabelled": digest}, indent=1) + "\n"


def _files(few: FewLabelData, images: ImageSet) -> list[str]:
    """The files of a set; those in the data set's folder by their paths in there, so that it may be moved."""
    own = Path(few.source)
    paths = [Path(images.sample_id(i)) for i in range(len(images))]
    return [(path.relative_to(own) if path.is_relative_to(own) else path).as_posix() for path in paths]
