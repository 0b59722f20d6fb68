"""Emoji: small pictures in several styles, each with its name and keywords in Unicode's CLDR.

Two styles come with hardmix; others are read from folders of the user's. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import UnreadableImageError, read_picture, shown
from hardmix.data.pairs import SPLIT_NAMES, Pairs
from hardmix.data.picture_folder import read_all

#: side of the pictures that come with hardmix, and how many of them stand side by side in a sheet
SIDE, SHEET_COLUMNS = 40, 40
#: the styles that come with hardmix, and their licenses
STYLES = {"noto": "Apache-2.0", "twemoji": "CC BY 4.0"}
#: of names and keywords
TEXT_LICENSE = "Unicode-3.0"
SUFFIXES = (".png", ".webp")
FLAGS = "flags"


class Emoji(NamedTuple):
    """One emoji.

    Attributes:
        hexcode: its code points, "1F600" or "1F468-200D-1F692", without the variation selector FE0F.
        label: its name, "grinning face".
        tags: its keywords, at least one.
        group, subgroup: "smileys-emotion", "face-smiling".
        version: of Unicode's emoji list that it came with.
        family: a word that it shares with its variants of another gender, hair, colour, direction or hour.
        split: "train", "validation" or "test", the same for the whole family.
    """

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    version: float
    family: str
    split: str


class Relation(NamedTuple):
    """a is to b as c is to d: four concepts of `load_emoji`, and what kind of step leads from a to b."""

    kind: str
    a: int
    b: int
    c: int
    d: int


def load_emoji(
    styles: Sequence[str] = tuple(STYLES),
    *,
    size: int = SIDE,
    folders: Mapping[str, str | os.PathLike[str]] | None = None,
    flags: bool = True,
    on_error: str = "raise",
) -> Pairs:
    """Emoji in one or more styles, each with two texts: its name, and the name followed by the keywords.

    A concept is one emoji, whatever the style; its number is its row in `read_emoji`. Skin tones are left out, and so
    are emoji that a style draws exactly like another one (families of named members, flags of some islands). A quarter
    of the concepts is for testing, a ninth for validation, drawn once and for all within each of the nine groups. All
    variants of one concept (man, woman and plain firefighter; hearts of all colours; the hours of the clock) are in
    the same split.

    Args:
        styles: "noto" (Google) and "twemoji" (Twitter) come with hardmix; any other one has to be in `folders`.
        size: side in pixels. What comes with hardmix has 40 and is scaled from that.
        folders: further styles, or larger pictures of the two: the folder of an unpacked package, of which all PNG and
            WebP files are used that have code points for a name, such as 1f600.png, 1F468-200D-1F692.webp or
            emoji_u1f600.png. Emoji without a file are left out of that style.
        flags: False leaves out the flags: the name of a country that was never trained on can't be guessed.
        on_error: what to do about files in `folders` that can't be read: "raise", or "skip" them with a warning.

    Returns:
        Pairs: images (N, 3, size, size) on white, the emoji of the first style first; groups, subgroups and splits.

    Raises:
        ValueError: unknown style (the nearest one is offered) or one given twice, damaged files, a folder that holds no
            picture of an emoji, or two of the same one.
        FileNotFoundError: no such folder.
    """
    who = "load_emoji"
    size = _check.integer(who, "size", size, 1)
    _check.choice(who, "on_error", on_error, ("raise", "skip"))
    places = {name: from_home(folder) for name, folder in (folders or {}).items()}
    names = (styles,) if isinstance(styles, str) else tuple(styles)
    for name in names:
        _check.choice(who, "styles", name, {**STYLES, **places})
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{who}: styles is {styles!r}; pass one or more different names.")
    record = _record()
    emoji = _emoji(record)
    wanted = [number for number, entry in enumerate(emoji) if flags or entry.group != FLAGS]
    row_of = {entry.hexcode: row for row, entry in enumerate(emoji)}

    def read(path: Path) -> Tensor:
        return read_picture(path, shown(path), size=size, channels=3)

    images: list[Tensor] = []
    concepts: list[int] = []
    style: list[int] = []
    for number, name in enumerate(names):
        if name in places:
            held = find_pictures(who, places[name], (emoji[row].hexcode for row in wanted))
            pixels, kept = read_all(who, list(held.values()), read, (3, size, size), on_error)
            found = list(held)
            rows = [row_of[found[k]] for k in kept]
        else:
            pixels, rows = _shipped(record, name)[wanted], wanted
            if size != SIDE:
                pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        images.append(pixels)
        concepts += rows
        style += [number] * len(rows)
    shipped = "hardmix" if set(names) - set(places) else ""
    entries = [emoji[row] for row in concepts]
    group, group_names = _numbered([entry.group for entry in entries], [entry.group for entry in emoji])
    subgroup, subgroup_names = _numbered([entry.subgroup for entry in entries], [entry.subgroup for entry in emoji])
    return Pairs(
        torch.cat(images),
        [captions(entry) for entry in entries],
        torch.tensor(concepts),
        "emoji",
        "; ".join(f"{name}: {_license(name, places)}" for name in (*names, "texts")),
        ", ".join(filter(None, [shipped, *(str(places[name]) for name in names if name in places)])),
        [f"{names[k]}/{entry.hexcode}" for k, entry in zip(style, entries, strict=True)],
        torch.tensor([SPLIT_NAMES[entry.split] for entry in entries], dtype=torch.uint8),
        torch.tensor(style),
        names,
        group,
        group_names,
        subgroup,
        subgroup_names,
    )


def read_emoji() -> list[Emoji]:
    """Every emoji of the set, in Unicode's order: what the concepts of `load_emoji` are.

    Raises:
        ValueError: a file of the installation is missing or damaged.
    """
    return _emoji(_record())


def captions(emoji: Emoji) -> tuple[str, ...]:
    """The texts of an emoji.

    >>> captions(Emoji("1F600", "grinning face", ("cheerful", "smile"), "smileys-emotion", "face-smiling", 1.0, "", ""))
    ('grinning face', 'grinning face: cheerful, smile')
    """
    return emoji.label, f"{emoji.label}: {', '.join(emoji.tags)}"


def relations(*, split: str = "") -> list[Relation]:
    """Analogies among the emoji, by their names: a is to b as c is to d, "man cook" : "woman cook" = "man pilot" : d.

    Two pairs of names with the same step between them make one analogy, in either order; so a step with n pairs makes
    n (n - 1). Flags take no part. The kinds and their steps:

    gender     man, woman, person: each of the six steps between two of them (also boy, girl, child; merman ...)
    hair       person with red, curly, white, blond or no hair: each step between two of them
    colour     a heart, circle, square, book, apple ... in one colour and in another: each step between two colours
    clock      full hour and half past, and back
    moon       a phase of the moon and the same one with a face, and back
    animal     an animal's face and the whole animal, and back
    direction  a person on the way, and the same one facing right, and back
    cat        a face and the cat with that face, and back

    Args:
        split: "train", "validation" or "test": only analogies of which c and d are in that split; "" for all.

    Returns:
        In the order of the kinds above, the steps, and the emoji. The four are different emoji.
    """
    emoji = read_emoji()
    if split:
        _check.choice("relations", "split", split, SPLIT_NAMES)
    number = {entry.label: row for row, entry in enumerate(emoji) if entry.group != FLAGS}
    found = []
    for kind, pairs in _steps([entry for entry in emoji if entry.group != FLAGS]):
        rows = [(number[x], number[y]) for x, y in pairs]
        asked = [(c, d) for c, d in rows if not split or emoji[c].split == emoji[d].split == split]
        found += [Relation(kind, a, b, c, d) for a, b in rows for c, d in asked if (a, b) != (c, d)]
    return found


def to_sheet(pixels: Tensor) -> Tensor:
    """(N, 3, 40, 40) pictures as one, (rows * 40, 1600, 3), `SHEET_COLUMNS` in a row; what is left over is white."""
    blank = pixels.new_full((-len(pixels) % SHEET_COLUMNS, *pixels.shape[1:]), 255)
    grid = torch.cat([pixels, blank]).reshape(-1, SHEET_COLUMNS, 3, SIDE, SIDE)
    return grid.permute(0, 3, 1, 4, 2).reshape(-1, SHEET_COLUMNS * SIDE, 3)


def from_sheet(sheet: Tensor, count: int) -> Tensor:
    """The inverse of `to_sheet`, from channels first: (3, rows * 40, 1600) to (count, 3, 40, 40)."""
    grid = sheet.reshape(3, -1, SIDE, SHEET_COLUMNS, SIDE).permute(1, 3, 0, 2, 4)
    return grid.reshape(-1, 3, SIDE, SIDE)[:count].contiguous()


def plain(code: str) -> str:
    """A sequence of code points in one spelling: "emoji_u1f3f3_fe0f" and "1F3F3-FE0F" are both "1F3F3"."""
    points = re.split(r"[-_ ]", code.removeprefix("emoji_u").upper())
    return "-".join(point for point in points if point != "FE0F")


def find_pictures(who: str, folder: Path, codes: Iterable[str]) -> dict[str, Path]:
    """The picture of each emoji that has one at or below `folder`, by hexcode, in the order of `codes`."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise FileNotFoundError(f"{who}: {shown(folder)} is {kind}; pass the folder of an unpacked package of emoji.")
    codes = list(codes)
    wanted, found = set(codes), dict[str, Path]()
    for place, _, names in os.walk(folder):
        for name in names:
            stem, suffix = os.path.splitext(name)
            code = plain(stem)
            if code not in wanted or suffix.lower() not in SUFFIXES:
                continue
            path = Path(place) / name
            if code in found and found[code].parent == path.parent and found[code].suffix == path.suffix:
                # both spellings of one emoji side by side: the full one, with the variation selectors
                path = max(path, found[code], key=lambda path: (len(path.name), path.name))
            elif code in found:
                first, second = sorted((found[code], path))
                raise ValueError(
                    f"{who}: {shown(folder)} has two pictures of {code}, {shown(first.relative_to(folder))} and "
                    f"{shown(second.relative_to(folder))}; pass the folder that holds one of them."
                )
            found[code] = path
    if not found:
        raise ValueError(
            f"{who}: {shown(folder)} holds no PNG or WebP file with the code points of an emoji for a name, such as "
            "1f600.png; pass the folder of an unpacked package of emoji."
        )
    return {code: found[code] for code in codes if code in found}


def _shipped(record: dict[str, Any], style: str) -> Tensor:
    """(N, 3, 40, 40) pictures of every emoji, checked against the hash of the pixels."""
    name = f"emoji-{style}.png"
    try:
        digest = record["styles"][style]["sha256_of_pixels"]
    except (KeyError, TypeError):
        raise _damaged("emoji.json") from None
    try:
        content = (files("hardmix.data") / "embedded" / name).read_bytes()
        sheet = read_picture(io.BytesIO(content), name, size=None, channels=3)
    except (OSError, UnreadableImageError):
        raise _damaged(name) from None
    count = len(record["emoji"])
    if sheet.shape[1:] != (-(-count // SHEET_COLUMNS) * SIDE, SHEET_COLUMNS * SIDE):
        raise _damaged(name)
    pixels = from_sheet(sheet, count)
    if hashlib.sha256(pixels.numpy().tobytes()).hexdigest() != digest:
        raise _damaged(name)
    return pixels


def _record() -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((files("hardmix.data") / "embedded" / "emoji.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise _damaged("emoji.json") from None
    return record


def _emoji(record: dict[str, Any]) -> list[Emoji]:
    try:
        found = [Emoji(*entry)._replace(tags=tuple(entry[2]), version=float(entry[5])) for entry in record["emoji"]]
        if {entry.split for entry in found} == set(SPLIT_NAMES):
            return found
    except (IndexError, KeyError, TypeError, ValueError):
        pass
    raise _damaged("emoji.json")


def _damaged(name: str) -> ValueError:
    path = files("hardmix.data") / "embedded" / name
    return ValueError(f"load_emoji: {shown(str(path))} is missing or damaged; reinstall hardmix.")


def _license(name: str, places: Mapping[str, Path]) -> str:
    return "see its package" if name in places else {**STYLES, "texts": TEXT_LICENSE}[name]


def _numbered(words: list[str], every: list[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Each word's number, and the names in the order in which they first occur in `every`."""
    names = tuple(dict.fromkeys(every))
    number = {name: k for k, name in enumerate(names)}
    return torch.tensor([number[word] for word in words]), names


COLOURS = (
    "red", "orange", "yellow", "green", "light blue", "blue", "purple", "pink", "brown", "black", "grey", "white",
)  # fmt: skip
HAIR = ("red hair", "curly hair", "white hair", "blond hair", "bald")
#: man, woman, person
GENDERS = (
    ("man", "woman", "person"),
    ("boy", "girl", "child"),
    ("old man", "old woman", "older person"),
    ("merman", "mermaid", "merperson"),
    ("prince", "princess", "person with crown"),
)
CATS = {
    "grinning face": "grinning cat",
    "grinning face with smiling eyes": "grinning cat with smiling eyes",
    "face with tears of joy": "cat with tears of joy",
    "smiling face with heart-eyes": "smiling cat with heart-eyes",
    "kissing face": "kissing cat",
    "weary face": "weary cat",
    "crying face": "crying cat",
}


def _steps(emoji: list[Emoji]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every kind of step, and the pairs of names that it leads from and to."""
    labels = [entry.label for entry in emoji]
    people = [entry.label for entry in emoji if entry.subgroup == "person"]
    things = [entry.label for entry in emoji if entry.subgroup != "person"]
    moons = [label for label in labels if re.search(r"\bmoon\b", label)]
    rows = [*GENDERS, *_genders(labels)]
    both_ways = {
        "clock": _replaced(labels, " o\u2019clock$", "-thirty"),
        "moon": _replaced(moons, "$", " face"),
        "animal": _replaced([entry.label for entry in emoji if entry.group == "animals-nature"], " face$", ""),
        "direction": _replaced(labels, "$", ": facing right"),
        "cat": list(CATS.items()),
    }
    found = [("gender", [(row[i], row[j]) for row in rows]) for i, j in permutations(range(3), 2)]
    found += [("hair", _replaced(people, f": {x}$", f": {y}")) for x, y in permutations(HAIR, 2)]
    found += [("colour", _replaced(things, rf"\b{x}\b", y)) for x, y in permutations(COLOURS, 2)]
    for kind, pairs in both_ways.items():
        found += [(kind, pairs), (kind, [(y, x) for x, y in pairs])]
    known = set(labels)
    return [(kind, [(x, y) for x, y in pairs if x in known and y in known]) for kind, pairs in found]


def _replaced(names: list[str], pattern: str, by: str) -> list[tuple[str, str]]:
    """The names that become another one of them by replacing what the pattern finds."""
    known = set(names)
    changed = [(name, re.sub(pattern, by, name)) for name in names]
    return [(x, y) for x, y in changed if x != y and y in known]


def _genders(labels: list[str]) -> list[tuple[str, str, str]]:
    """The same people as men, as women, and without a gender, where the names follow a rule; "" for no such name."""
    rows = []
    for man in labels:
        if re.search(r"\bman\b|^men ", man) and not re.search(r"^(old )?man$|\bwoman\b", man):
            woman = re.sub(r"\bm([ae])n\b", r"wom\1n", man)
            person = re.sub(r"\bman\b", "person", re.sub("^men ", "people ", man))
            if person not in labels:
                person = man.removeprefix("man ") if man.startswith("man ") else ""
            rows.append((man, woman, person))
    return rows
