"""The pictures and texts of an image-text run: read, split, and sorted by style and class."""

from __future__ import annotations

import hashlib
import warnings

import torch
from torch import Tensor

from hardmix.data.numbers import TRAIN, VALIDATION
from hardmix.data.pair_sets import PAIR_SETS, PairOptions, load_pairs
from hardmix.data.pairs import SPLIT_NAMES, Pairs, draw_split, same_text, text_groups
from hardmix.train.sections import DataSection
from hardmix.train.seeds import generator


class PairData:
    """A set of pairs as one recipe sees it.

    Attributes:
        pairs: the set.
        trained: styles to train on; the other ones, `shifted`, are the distribution shift. Both () without styles.
        concept: (N,) long; as the set has it, but pictures with the same first text are one, since that finds both.
        rows: "train", "validation" and "test" -> (n,) long, ascending, of the trained styles.
        class_names: classes of the pictures; () where the set has none.
        labels: (N,) long class of each picture, if there are classes.
    """

    def __init__(self, section: DataSection, seed: int, classes: str = "group") -> None:
        options = PairOptions(
            domain=section.domain,
            styles=section.styles,
            samples=section.samples,
            size=section.image_size,
            max_length=section.max_length,
            labels=section.labels,
            inputs=section.inputs,
            target=section.target,
            on_error=section.on_error,
        )
        pairs, self.trained = load_pairs(section.name, section.path or None, options)
        #: of one's own set, what tells copies of a picture; () for a set of ours
        marks = [picture_mark(picture) for picture in pairs.images] if PAIR_SETS[section.name].yours else []
        texts = list(pairs.captions)
        if marks:
            texts = [(*own, mark) for own, mark in zip(texts, marks, strict=True)]
        self.pairs: Pairs = pairs._replace(split=_splits(pairs, section, texts))
        holder: dict[str, int] = {}
        firsts = zip(pairs.captions, pairs.concept.tolist(), strict=True)
        self.concept = torch.tensor([holder.setdefault(same_text(texts[0]), number) for texts, number in firsts])
        self.shifted = self._shifted()
        self.rows = {split: self._rows(split, self.trained) for split in SPLIT_NAMES}
        if section.train_samples:
            train = self.rows["train"]
            chosen = torch.randperm(len(train), generator=generator(seed, "subset"))[: section.train_samples]
            self.rows["train"] = train[chosen.sort().values]
        for split, least in (("train", 2), ("test", 2)):
            if len(self.rows[split]) < least:
                raise ValueError(
                    f"data: {pairs.name} is left with {len(self.rows[split])} pictures for {split}; take more of them, "
                    "or another share."
                )
        self.class_names, self.labels = _classes(pairs, classes)
        if twice := self.seen_texts(self.rows["train"]) & self.seen_texts(self.rows["test"]):
            warnings.warn(
                f"data: {len(twice):,} of the texts of {pairs.name} belong to pictures to train on and to test on "
                f"({min(twice)!r:.60}); what finds them may know them by heart.",
                stacklevel=2,
            )
        if marks:
            self._tell_copies(marks)

    def _tell_copies(self, marks: list[str]) -> None:
        """Warns of pictures that are both trained on and tested on, as a table's own splits may have it."""
        train, test = ({marks[row]: row for row in self.rows[split].tolist()} for split in ("train", "test"))
        if both := [mark for mark in test if mark in train]:
            first, other = (self.pairs.ids[of[both[0]]] for of in (train, test))
            warnings.warn(
                f"data: {len(both):,} pictures of {self.pairs.name} to test on are also trained on ({other!r:.60}, as "
                f"{first!r:.60}); put a picture and its copies into one split.",
                stacklevel=3,
            )

    def seen_texts(self, rows: Tensor) -> set[str]:
        """All texts of these rows, as `same_text` has them."""
        return {same_text(text) for row in rows.tolist() for text in self.pairs.captions[row]}

    def _shifted(self) -> tuple[str, ...]:
        """The other styles, those without pictures to test on left out."""
        names = []
        for name in self.pairs.style_names:
            if name not in self.trained and len(self.style_rows("test", name)) >= 2:
                names.append(name)
            elif name not in self.trained:
                warnings.warn(f"data: style {name} has too few pictures to test on, and is left out.", stacklevel=2)
        return tuple(names)

    def style_rows(self, split: str, style: str) -> Tensor:
        """Rows of one split in one style, ascending; "" for a set without styles."""
        return self._rows(split, (style,) if style else ())

    def _rows(self, split: str, styles: tuple[str, ...]) -> Tensor:
        assert self.pairs.split is not None
        keep = self.pairs.split == SPLIT_NAMES[split]
        if styles and self.pairs.style is not None:
            numbers = torch.tensor([self.pairs.style_names.index(name) for name in styles])
            keep = keep & torch.isin(self.pairs.style, numbers)
        return keep.nonzero()[:, 0]

    def texts(self, concepts: Tensor) -> list[str]:
        """The first text of each of these concepts."""
        first: dict[int, str] = {}
        for number, captions in zip(self.concept.tolist(), self.pairs.captions, strict=True):
            first.setdefault(number, captions[0])
        return [first[number] for number in concepts.tolist()]

    def names(self, rows: Tensor) -> list[str]:
        """What error messages call these rows of the set."""
        return [self.pairs.ids[row] for row in rows.tolist()]


def picture_mark(picture: Tensor) -> str:
    """A text that copies of a picture have in common, after all others in the alphabet."""
    return "\U0010ffff" + hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _splits(pairs: Pairs, section: DataSection, texts: list[tuple[str, ...]]) -> Tensor:
    """(N,) uint8; those of the set, or drawn; a set that only says what is for testing gets validation drawn.

    What has one of the `texts` in common, the captions and what tells copies of a picture, stays together.

    Alike for all seeds: a run that starts from another one must not be tested on what that was trained on.
    """
    if pairs.split is None:
        return draw_split(texts, test=section.test, validation=section.validation)
    split = pairs.split.clone()
    if not bool((split == VALIDATION).any()) and section.validation:
        train = (split == TRAIN).nonzero()[:, 0]
        first = torch.tensor(text_groups([texts[row] for row in train.tolist()]), dtype=torch.long)
        of_row = pairs.concept[train[first]]  # pictures with a text in common go together
        groups = of_row.unique()
        order = torch.randperm(len(groups), generator=generator(0, "validation"))
        held = groups[order[: round(section.validation * len(groups))]]
        split[train[torch.isin(of_row, held)]] = VALIDATION
    return split


def _classes(pairs: Pairs, kind: str) -> tuple[tuple[str, ...], Tensor | None]:
    """Names of the classes that occur, and each picture's."""
    labels, names = (pairs.group, pairs.group_names) if kind == "group" else (pairs.subgroup, pairs.subgroup_names)
    if labels is None:
        return (), None
    present, place = labels.unique(return_inverse=True)
    return tuple(names[number] for number in present.tolist()), place
