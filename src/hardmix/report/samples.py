"""Mixed samples for a page: four pictures, the parts of the label, the most likely classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from markupsafe import Markup

from hardmix.report.folder import Gallery
from hardmix.report.gallery import COLUMNS, MAX_SIDE, class_name, data_uri, picture, shares
from hardmix.report.text import number


class Picture(NamedTuple):
    """`exact` pictures are small and enlarged without smoothing."""

    uri: Markup
    alt: str
    column: str
    exact: bool


class Guess(NamedTuple):
    """A likely class; `mixed` where it is in the mix. `width` is the length of its bar in per cent."""

    name: str
    prob: str
    width: str
    mixed: bool


class Sample(NamedTuple):
    """One mixed sample; `parts` are (class, share)."""

    images: list[Picture]
    parts: list[tuple[str, str]]
    guesses: list[Guess]


def samples(gallery: Gallery, class_names: Sequence[Any], most: int) -> list[Sample]:
    """The first `most` samples of a gallery."""
    return [_sample(gallery, i, class_names) for i in range(min(len(gallery), most))]


def guesses(gallery: Gallery, i: int, class_names: Sequence[Any]) -> list[Guess]:
    """The most likely classes of sample i."""
    found = []
    for label, prob in zip(gallery.top[i], gallery.prob[i], strict=True):
        share = number(prob)
        width = f"{100 * min(1.0, max(0.0, share or 0.0)):.1f}"
        shown = "n/a" if share is None else f"{share:.2f}"
        found.append(Guess(class_name(int(label), class_names), shown, width, label in gallery.labels[i]))
    return found


def same_mixes(galleries: Sequence[Gallery]) -> bool:
    """Whether all galleries hold the same mixed images with the same labels, in the same order."""
    first = galleries[0]
    return all(
        g.labels == first.labels and g.mixed.shape == first.mixed.shape and bool(torch.equal(g.mixed, first.mixed))
        for g in galleries
    )


def _sample(gallery: Gallery, i: int, class_names: Sequence[Any]) -> Sample:
    parts = [(name, f"{share:.2f}") for name, share in shares(gallery.labels[i], gallery.weights[i], class_names)]
    names = [class_name(label, class_names) for label in gallery.labels[i][:2]]
    label = " + ".join(f"{name} {share}" for name, share in parts)
    # A policy without a mask takes one share for all pixels; so does its picture.
    height, width = gallery.mixed.shape[2:]
    mask = (
        torch.full((1, height, width), float(gallery.weights[i][0]))
        if gallery.mask is None
        else gallery.mask[i].float()
    )
    alts = [f"own image: {names[0]}", f"partner image: {names[-1]}", "mask", f"mixed image: {label}"]
    images = []
    for column, tensor, alt in zip(
        COLUMNS, (gallery.own[i], gallery.partner[i], mask, gallery.mixed[i]), alts, strict=True
    ):
        drawn = picture(tensor)
        images.append(Picture(data_uri(drawn), alt, column, max(drawn.size) < MAX_SIDE))
    return Sample(images, parts, guesses(gallery, i, class_names))
