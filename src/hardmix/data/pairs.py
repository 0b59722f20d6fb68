"""Pictures with texts that describe them: what image-text models are tuned and measured on."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.decode import shown
from hardmix.data.numbers import TEST, TRAIN, VALIDATION

SPLIT_NAMES = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


class Pairs(NamedTuple):
    """N pictures, in memory, each with one or more texts.

    Rows with the same `concept` have the same texts (see `same_text`): a picture of one in another style, or another
    picture with the same caption. Their texts are right for each of them. Splits of ours keep a concept together; a
    table of the user's may not.

    Attributes:
        images: (N, C, H, W) uint8.
        captions: N tuples of one or more texts, the one to use if only one is used first.
        concept: (N,) long.
        name: the data set.
        license: of pictures and texts.
        source: the path of the file or folder, or the package that holds it.
        ids: what messages call the pictures, N words.
        split: (N,) uint8 with TRAIN, VALIDATION or TEST; None to draw it, see `draw_split`.
        style, style_names: (N,) long, how or by whom the picture is drawn; None and () where there is one style.
        group, group_names: (N,) long, a few coarse classes of what is shown; None and () where none are known.
        subgroup, subgroup_names: the same, finer; each subgroup lies in one group.
    """

    images: Tensor
    captions: Sequence[tuple[str, ...]]
    concept: Tensor
    name: str
    license: str
    source: str
    ids: Sequence[str]
    split: Tensor | None = None
    style: Tensor | None = None
    style_names: tuple[str, ...] = ()
    group: Tensor | None = None
    group_names: tuple[str, ...] = ()
    subgroup: Tensor | None = None
    subgroup_names: tuple[str, ...] = ()

    def take(self, rows: Tensor) -> Pairs:
        """The pairs of `rows` (M,) long, in that order. Concepts, styles and classes keep their numbers.

        Raises:
            TypeError, ValueError: not a list of rows, or a row that isn't there.
        """
        rows = _check.tensor("Pairs.take", "rows", rows)
        if rows.ndim != 1 or rows.dtype != torch.long:
            raise TypeError(f"Pairs.take: rows has shape {tuple(rows.shape)} and dtype {rows.dtype}; pass (M,) long.")
        chosen = rows.tolist()
        wrong = [row for row in chosen if not 0 <= row < len(self.captions)]
        if wrong:
            raise ValueError(f"Pairs.take: rows holds {wrong[0]}; pass rows from 0 to {len(self.captions) - 1}.")
        return self._replace(
            images=self.images[rows],
            captions=[self.captions[row] for row in chosen],
            concept=self.concept[rows],
            ids=[self.ids[row] for row in chosen],
            split=None if self.split is None else self.split[rows],
            style=None if self.style is None else self.style[rows],
            group=None if self.group is None else self.group[rows],
            subgroup=None if self.subgroup is None else self.subgroup[rows],
        )

    def part(self, split: str, styles: Sequence[str] = ()) -> Pairs:
        """The pairs of one split: "train", "validation" or "test"; with `styles`, those of these styles only.

        Raises:
            ValueError: the set has no splits or no styles, an unknown name, or nothing is left.
        """
        who = "Pairs.part"
        _check.choice(who, "split", split, SPLIT_NAMES)
        if self.split is None:
            raise ValueError(f"{who}: {self.name} has no splits; give it some with `draw_split`.")
        keep = self.split == SPLIT_NAMES[split]
        if styles:
            if self.style is None:
                raise ValueError(f"{who}: styles is {styles!r}, but {self.name} has none; leave it out.")
            numbers = [self.style_names.index(_check.choice(who, "styles", name, self.style_names)) for name in styles]
            keep = keep & torch.isin(self.style, torch.tensor(numbers))
        if not bool(keep.any()):
            drawn = f" in the styles {', '.join(styles)}" if styles else ""
            raise ValueError(f"{who}: {shown(self.source)} has nothing for {split}{drawn}; take another part.")
        return self.take(keep.nonzero()[:, 0])


def draw_split(
    captions: Sequence[Sequence[str]], *, test: float = 0.2, validation: float = 0.1, seed: int = 0
) -> Tensor:
    """(N,) uint8 splits by the texts: a share `test` of the groups, more or less, for testing, `validation` of them for
    validation.

    Pictures that have a text in common (see `same_text`), directly or by way of others, are one group and go into one
    split together, so a text that was trained on never comes up in a test. Where a group goes is a hash of its first
    text by the alphabet and the seed alone: pictures that come along later leave the others where they are, unless they
    join two groups or bring a text that comes first.

    Args:
        captions: the texts of N pictures, one or more each.

    Raises:
        ValueError: shares out of range, a picture without a text, or fewer than two groups left for training or for
            testing.

    >>> draw_split([(f"number {k}",) for k in range(10)]).bincount().tolist()
    [6, 2, 2]
    """
    who = "draw_split"
    _check.between(who, "test", test, 0.0, 1.0)
    _check.between(who, "validation", validation, 0.0, 1.0)
    parts = []
    groups = _groups(who, captions)
    for first in groups.values():
        digest = hashlib.blake2b(f"{seed}/{first}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        parts.append(TEST if place < test else VALIDATION if place < test + validation else TRAIN)
    left = {"training": parts.count(TRAIN), "testing": parts.count(TEST)}
    for what, count in left.items():
        if count < 2:
            raise ValueError(
                f"{who}: {count} of {len(parts)} groups of pictures with common texts are left for {what}, and at "
                "least 2 are needed; take more pictures or another share, or say in a column `split` where each "
                "belongs."
            )
    of_group = dict(zip(groups, parts, strict=True))
    return torch.tensor([of_group[root] for root in text_groups(captions)], dtype=torch.uint8)


def same_text(text: str) -> str:
    """What texts have in common that say the same: case, white space and how Unicode composes letters don't count.

    Text towers see no such difference, most of them, so neither a split nor a search may count on it.

    >>> same_text("A  red Circle") == same_text("a red circle ")
    True
    """
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def text_groups(captions: Sequence[Sequence[str]]) -> list[int]:
    """Of each picture, the first one of the group that common texts put it into."""
    parent = list(range(len(captions)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    holder: dict[str, int] = {}
    for row, texts in enumerate(captions):
        for text in texts:
            one, other = sorted((root(row), root(holder.setdefault(same_text(text), row))))
            parent[other] = one
    return [root(row) for row in range(len(captions))]


def _groups(who: str, captions: Sequence[Sequence[str]]) -> dict[int, str]:
    """The first picture of each group -> the group's first text by the alphabet."""
    first: dict[int, str] = {}
    for row, (root, texts) in enumerate(zip(text_groups(captions), captions, strict=True)):
        if not texts:
            raise ValueError(f"{who}: picture {row} has no text; leave it out.")
        first[root] = min(first.get(root, texts[0]), *texts)
    return first
