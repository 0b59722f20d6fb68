"""`hardmix show`: a labelled picture of what a policy does to real images."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from hardmix.data.catalog import load_images
from hardmix.models.build import build_model
from hardmix.tables import REGRESSION_POLICIES
from hardmix.train.components import Component, build_policy
from hardmix.train.files import write_bytes
from hardmix.train.recipe import parse_options
from hardmix.train.seeds import generator


def show_policy(
    name: str, data: str, data_path: str, path: Path, *, rows: int, seed: int, sets: list[str] | None = None
) -> list[str]:
    """Write a PNG of `rows` mixed samples and return a line of text for each.

    A policy that mixes hidden states is shown at the input, where there is something to see.
    """
    from hardmix.report.gallery import caption, mixed_sheet

    if name in REGRESSION_POLICIES:
        raise ValueError(f"show: {name} pairs by labels that are numbers, which these images don't have; show another.")
    images = load_images(data, data_path or None)
    split = images.test
    draws = generator(seed, "show")
    index = torch.randperm(len(split), generator=draws)[:rows]
    x = split.batch(index).to(torch.float32) / 255.0
    labels = split.labels[index]
    model = build_model("small-cnn", num_classes=len(split.class_names), in_channels=x.shape[1], image_size=x.shape[2])
    policy = build_policy(Component(name=name, **parse_options(sets or [])), model)
    plan = policy.plan(x, labels, generator=draws)
    mixed = plan.blend(x)
    own = x if plan.own is None else plan.own
    other = x[plan.partner] if plan.other is None else plan.other
    target = plan.target(labels)
    texts = [
        caption(*row, split.class_names) for row in zip(target.labels.tolist(), target.weights.tolist(), strict=True)
    ]
    mask = plan.lam.view(-1, 1, 1, 1) if plan.mask is None else plan.mask
    picture = io.BytesIO()
    mixed_sheet(own, other, mask, mixed, texts).save(picture, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture.getvalue())
    return texts
