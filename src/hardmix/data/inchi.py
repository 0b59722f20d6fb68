"""Drawings of molecules with the text that names the molecule, its InChI: captions that are either right or wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.decode import read_picture, shown
from hardmix.data.images import check_channels
from hardmix.data.numbers import TEST, TRAIN, VALIDATION
from hardmix.data.pairs import Pairs
from hardmix.data.picture_folder import drawn, read_all, squared
from hardmix.data.pictures import (
    MOLECULE_DOMAINS,
    SIZE,
    WHITE,
    _domains,
    _drawings,
    _trimmed,
    formula,
)

#: what the package says of itself, and what its sources leave open
LICENSE = 'unclear (the package says "apache 3.0"); don\'t redistribute'
#: shares of the molecules that are for testing and for validation
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1


def read_inchi(
    folder: Path,
    *,
    domain: str = "",
    size: int = 0,
    channels: int = 3,
    samples: int = 0,
    max_length: int = 0,
    on_error: str = "raise",
) -> Pairs:
    """Drawings of molecules, black on white, each with its InChI as the caption.

    The drawings are those of `read_molecules`, prepared as there. A concept is a molecule, the style is the source of
    the drawing. About a fifth of the molecules is for testing and a tenth for validation. The split follows from the
    formula and the connections of a molecule alone, so it is the same for every domain, size and number of samples, and
    isomers that differ in space alone stay together: no InChI of a test was trained on, in any source.

    Of the full set, 12,178 InChIs on 13,784 drawings, half have up to 112 characters, 19 of 20 up to 219, the longest
    896. They are written with 48 characters.

    Args:
        folder: from `find_molecules`.
        domain: the sources, joined by "+", say "uob+uspto"; all five by default.
        size: side in pixels, 64 by default.
        channels: 1, or 3 with the same in each, as encoders of photographs take it.
        samples: so many drawings, the same ones each time; 0 for all. A larger number only adds to a smaller one.
        max_length: leave out molecules whose InChI has more characters; 0 for none.
        on_error: "raise" stops with a list of the files that can't be decoded; "skip" leaves them out with a warning.

    Returns:
        Pairs: images (N, channels, size, size), one caption each; ids like "uob/maybridge-0001-1032051861.png".

    Raises:
        ValueError: unknown domain, too many samples, fewer than two drawings, files that can't be decoded, a damaged
            list, or an InChI without a formula.
        FileNotFoundError: the list of a source is missing.

    Reference: International Chemical Identifier, Heller et al. 2015 (doi 10.1186/s13321-015-0068-4).
    """
    who = "read_inchi"
    size = _check.integer(who, "size", size, 0) or SIZE
    check_channels(who, channels)
    _check.integer(who, "max_length", max_length, 0)
    names = _domains(who, domain, MOLECULE_DOMAINS)
    drawings = [(number, *row) for number, name in enumerate(names) for row in _drawings(who, folder, name)]
    if max_length:
        drawings = [row for row in drawings if len(row[3]) <= max_length]
    drawings = [drawings[row] for row in drawn(who, len(drawings), samples)]
    for _, name, _, inchi in drawings:
        formula(f"{who}: {name}", inchi)  # one without is refused
    if len(drawings) < 2:
        raise ValueError(f"{who}: {shown(folder)} gives {len(drawings)} drawings; pass at least 2.")
    pixels, kept = read_all(
        who,
        [path for _, _, path, _ in drawings],
        lambda path: squared(_trimmed(read_picture(path, shown(path), size=None, channels=1)), size, fill=WHITE),
        (1, size, size),
        on_error,
    )
    drawings = [drawings[row] for row in kept]
    texts = [inchi for *_, inchi in drawings]
    number_of = {inchi: number for number, inchi in enumerate(dict.fromkeys(texts))}
    return Pairs(
        images=pixels.expand(-1, channels, -1, -1),
        captions=[(text,) for text in texts],
        concept=torch.tensor([number_of[text] for text in texts]),
        name="molecules",
        license=LICENSE,
        source=str(folder),
        ids=[name for _, name, _, _ in drawings],
        split=_splits(texts),
        style=torch.tensor([number for number, *_ in drawings]),
        style_names=tuple(names),
    )


def _splits(texts: list[str]) -> Tensor:
    """(N,) uint8 from the formula and the connections: a hash of them is as good as a draw, and the same everywhere."""
    of_text = {}
    for text in set(texts):
        skeleton = "/".join(text.split("/")[1:3])
        draw = int.from_bytes(hashlib.sha256(skeleton.encode()).digest()[:8], "big") / 2**64
        of_text[text] = TEST if draw < TEST_SHARE else VALIDATION if draw < TEST_SHARE + VALIDATION_SHARE else TRAIN
    return torch.tensor([of_text[text] for text in texts], dtype=torch.uint8)
