"""`hardmix show`: labelled pictures of what policies do to real images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.catalog import CATALOG, load_images
from hardmix.data.images import ImageSet
from hardmix.mixing import Policy
from hardmix.models.build import build_model
from hardmix.tables import NEEDS_ATTENTION, POLICIES, REGRESSION_POLICIES, WRAPPERS
from hardmix.train.components import Component, build_policy, check_policy, policy_names
from hardmix.train.evaluate import load_run
from hardmix.train.files import new_file, write_bytes
from hardmix.train.recipe import parse_options
from hardmix.train.seeds import generator
from hardmix.train.tasks.classification import Classification

if TYPE_CHECKING:
    from PIL.Image import Image

#: what a policy is shown with where nothing is said
USUAL: dict[str, dict[str, object]] = {
    "random-choice": {"policies": [{"name": "mixup"}, {"name": "cutmix"}]},
    "manifold-mixup": {"layers": ["stage1"]},
    **{name: {"policy": {"name": "cutmix"}} for name in WRAPPERS},
}
#: policies whose labels follow from what the model makes of the mixed images
BY_LABEL = {*NEEDS_ATTENTION, "sumix"}
#: samples of each policy on the sheet of all
ROWS_OF_ALL = 2


class Drawn(NamedTuple):
    """Mixed samples: (G, C, H, W) images, the partner and the mask where there is one partner, and captions."""

    own: Tensor
    partner: Tensor | None
    mask: Tensor | None
    mixed: Tensor
    texts: list[str]


class Subject(NamedTuple):
    """Images to mix, and of a run its model, for policies that look at one, and the policy that it trained with."""

    x: Tensor
    labels: Tensor
    images: ImageSet
    model: nn.Module | None = None
    component: Component | None = None
    policy: Policy | None = None


def show_policy(
    name: str,
    data: str,
    data_path: str,
    path: Path,
    *,
    rows: int,
    seed: int,
    sets: list[str] | None = None,
    run: Path | None = None,
) -> list[str]:
    """Write a PNG of `rows` mixed samples and return a line of text for each.

    A policy that mixes hidden states is shown at the input, where there is something to see.

    Args:
        run: a trained run, whose test images are shown and whose model a policy looks at; without one, a small model
            that was never trained. The policy that the run trained with has the run's settings where `sets` says
            nothing else, and without `sets` what it has learnt.
    """
    from hardmix.report.gallery import mixed_sheet

    _check_png(path)
    if name in REGRESSION_POLICIES:
        raise ValueError(f"show: {name} pairs by labels that are numbers, which these images don't have; show another.")
    options = _options(name, sets or [])
    drawn = draw(name, _subject(data, data_path, rows, seed, run), seed, options)
    _save(mixed_sheet(drawn.own, drawn.partner, drawn.mask, drawn.mixed, drawn.texts), path)
    return drawn.texts


def show_all(data: str, data_path: str, path: Path, *, seed: int, run: Path | None = None) -> list[str]:
    """Write one PNG with a few samples of every policy, and return the policies that it shows.

    One that can't look at the model of `run` (attention where there is none) is left out then.
    """
    from hardmix.report.gallery import stacked_sheets

    _check_png(path)
    subject = _subject(data, data_path, ROWS_OF_ALL, seed, run)
    sheets: dict[str, Drawn] = {}
    for name in POLICIES:
        try:
            sheets[name] = draw(name, subject, seed, {})
        except (ValueError, TypeError):
            if run is None:
                raise
    _save(stacked_sheets({n: (d.own, d.partner, d.mask, d.mixed, d.texts) for n, d in sheets.items()}), path)
    return list(sheets)


def draw(name: str, subject: Subject, seed: int, options: dict[str, object]) -> Drawn:
    """What a policy makes of the subject's images."""
    from hardmix.report.gallery import caption

    x, labels, images = subject.x, subject.labels, subject.images
    ours = subject.component if subject.component is not None and subject.component.name == name else None
    usual = USUAL.get(name, {}) if ours is None else ours.model_dump()
    told = {"name": name, **usual, **options}
    check_policy(Component(**told))  # before its parts are looked into
    inside = policy_names(told)
    model = subject.model or _untrained(inside, x, len(images.class_names))
    model.train()  # in which policies see it; a run's is a copy of what its checkpoint holds
    torch.manual_seed(seed)  # for what a policy learns
    policy: Policy = build_policy(Component(**told), model, tuple(x.shape[1:]))
    if ours and subject.policy is not None and not options:
        policy.load_state_dict(subject.policy.state_dict())
    own, partner, mask = x, None, None
    try:
        plan = policy.plan(x, labels, generator=generator(seed, "show", 1))
    except NotImplementedError:  # of several partners
        mixed, target = policy(x, labels, generator=generator(seed, "show", 1))
    else:
        mixed, target = plan.blend(x), plan.target(labels)
        own = x if plan.own is None else plan.own
        partner = x[plan.partner] if plan.other is None else plan.other
        mask = plan.lam.view(-1, 1, 1, 1) if plan.mask is None else plan.mask
    if BY_LABEL & set(inside):
        mixed, target = policy(x, labels, generator=generator(seed, "show", 1))
        with torch.no_grad():
            target = policy.relabel(model(mixed), target)
    texts = [
        caption(*row, images.class_names) for row in zip(target.labels.tolist(), target.weights.tolist(), strict=True)
    ]
    return Drawn(own, partner, mask, mixed.detach(), texts)


def _options(name: str, sets: list[str]) -> dict[str, object]:
    """What --set says of the policy itself, not of a recipe."""
    options = parse_options(sets)
    if "name" in options:
        raise ValueError("show: --set name names another policy; name it in place of this one: hardmix show NAME.")
    inside = options.get("policy")
    if inside and isinstance(inside, dict) and name not in WRAPPERS:
        keys = " and ".join(f"policy.{key} is {key}" for key in inside)
        raise ValueError(f"show: --set has options of the policy alone, so {keys} here; leave out the section's name.")
    return options


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"show: --out is {str(path)!r}, but the picture is a PNG; name a file that ends in .png.")


def _save(sheet: Image, path: Path) -> None:
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    with new_file(path):
        write_bytes(path, picture.getvalue())


def _subject(data: str, data_path: str, rows: int, seed: int, run: Path | None) -> Subject:
    if run is not None:
        loaded = load_run(run, data_path=data_path)
        if not isinstance(loaded.task, Classification):
            raise ValueError(f"show: {run} is of task {loaded.task.recipe.task}; pass a run that tells images apart.")
        task, split = loaded.task, loaded.task.test_set
    else:
        task, split = None, load_images(_check.choice("show", "--data", data, CATALOG), data_path or None).test
    index = torch.randperm(len(split), generator=generator(seed, "show"))[:rows]
    images = Subject(split.batch(index).to(torch.float32) / 255.0, split.labels[index], split)
    if task is None:
        return images
    return images._replace(model=task.on_pixels, component=task.recipe.policy, policy=task.policy)


def _untrained(inside: list[str], x: Tensor, classes: int) -> nn.Module:
    kind = "tiny-vit" if set(inside) & set(NEEDS_ATTENTION) else "small-cnn"
    return build_model(kind, num_classes=classes, in_channels=x.shape[1], image_size=x.shape[2])
