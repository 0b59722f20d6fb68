"""Open Clip Art: drawings by many hands, each with a title, keywords and sometimes a description in its SVG file.

Nothing is downloaded. Titles come from strangers: a theme's name stands over hundreds of pictures, others are empty, in
Italian or in French; what can be told apart by rule is left out, the rest stays as it is.
"""

from __future__ import annotations

import html
import os
import re
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import OR_SKIP, in_threads, read_picture, reason, shown
from hardmix.data.pairs import Pairs
from hardmix.data.picture_folder import drawn, read_all, squared
from hardmix.data.places import usual_places
from hardmix.data.tables import _listed

#: how to get it
GET = (
    "apt-get download openclipart-svg openclipart-png, dpkg -x FILE openclipart for both, and "
    "mv openclipart/usr/share/openclipart data/"
)
#: where the folders `svg` and `png` are in a package that was unpacked
INSIDE = ("", "openclipart", "usr/share/openclipart")
INSTALLED = Path("/usr/share/openclipart")
#: the largest SVG file and picture that are read; some pictures of the packages have 20,990 x 29,700 pixels
MAX_SVG_BYTES, MAX_PIXELS = 8 << 20, 1 << 25
#: the longer side of the smallest picture that shows anything
LEAST_SIDE = 8
#: a title over more pictures than this is that of a theme
MOST_PICTURES = 10
#: letters of the shortest title, characters of the longest, of the longest description and keyword
LEAST_LETTERS, LONGEST_TITLE, LONGEST_DESCRIPTION, LONGEST_KEYWORD = 3, 80, 200, 30
#: titles and descriptions that say where a picture belongs, and not what it shows
THEME = re.compile(
    r"\b(theme|icon ?set|icons|collection|clip ?arts?|si?b?u?bmission|untitled|unnamed|unknown|public domain)\b"
    r"|^r\d+\b|hash\(|@|https?:|www\.",
    re.IGNORECASE,
)
#: keywords that say nothing about the picture
EMPTY_KEYWORDS = frozenset({"hash", "unsorted", "openclipart", "svg", "clipart", "clip art"})
FLAGS = frozenset({"flag", "flags", "signalflag"})


class Words(NamedTuple):
    """What an SVG file says of itself, as it stands there."""

    title: str
    description: str
    keywords: tuple[str, ...]


def load_clipart(
    path: str | os.PathLike[str] | None = None, *, size: int = 64, samples: int = 0, on_error: str = "raise"
) -> Pairs:
    """Open Clip Art as Debian packages it: pictures from PNG files, their texts from the SVG files of the same name.

    Left out, without a word:
    - links to another picture: the packages have one under every category that it belongs to;
    - flags, by keyword or folder: the name of a country that was never trained on can't be guessed;
    - titles of fewer than 3 letters or more than 80 characters, those that name a theme, a collection, an icon set or
      a person to write to, and titles over more than 10 pictures, or over more than one by "Clipart by NAME - ";
    - pictures of fewer than 8 or more than 2^25 pixels (longer side, in all), and SVG files that declare entities,
      since those may stand for gigabytes.

    A concept is a title, whatever its case; a running number at its end is not part of it ("Tree 02", "bee3").
    Pictures of one concept have the same texts: the title, "title: keyword, keyword" with the keywords that they have
    in common, and the description, where all have the same one of at least two words that says more than the title.
    Splits are not part of the set; draw them with `draw_split`, which keeps a concept together.

    Args:
        path: the folder with the folders `svg` and `png`, or one that a package was unpacked into. None looks in the
            folder openclipart of the usual places (the environment variable HARDMIX_DATA, `./data`,
            `~/.cache/hardmix`), then where the packages install it.
        size: side in pixels; pictures are kept whole, in the middle of a white square, 3 * size * size bytes each.
        samples: so many pictures, the same ones each time; 0 for all.
        on_error: "raise" stops with a list of the files that can't be read, "skip" leaves them out with a warning.

    Returns:
        Pairs: images (N, 3, size, size) in the order of the paths, which are the ids; the group is the folder below
        `svg`. Concepts keep their numbers when fewer pictures are drawn.

    Raises:
        FileNotFoundError: no such folder, or one without `svg` and `png`.
        ValueError: files that can't be read, fewer than two pictures, too many samples, more than 8 GiB of pixels.
    """
    who = "load_clipart"
    _check.integer(who, "size", size, 1)
    _check.choice(who, "on_error", on_error, ("raise", "skip"))
    root = _found(who, path)
    names, texts, concept = _usable(who, root, on_error)
    if len(names) < 2:
        raise ValueError(f"{who}: {shown(root)} gives {len(names)} pictures with a title; pass at least 2.")
    rows = drawn(who, len(names), samples)

    def read(file: Path) -> Tensor:
        return squared(read_picture(file, shown(file), size=None, channels=3), size, fill=255)

    pixels, kept = read_all(who, [_picture(root, names[row]) for row in rows], read, (3, size, size), on_error)
    rows = [rows[k] for k in kept]
    if len(rows) < 2:
        raise ValueError(f"{who}: {shown(root)} gives {len(rows)} readable pictures; pass at least 2.")
    groups = [_group(name) for name in names]
    known = sorted(set(groups))
    return Pairs(
        pixels,
        [texts[row] for row in rows],
        torch.tensor([concept[row] for row in rows]),
        "openclipart",
        "public domain",
        str(root),
        [names[row] for row in rows],
        group=torch.tensor([known.index(groups[row]) for row in rows]),
        group_names=tuple(known),
    )


def find_clipart(folder: Path) -> Path | None:
    """The folder with `svg` and `png` in it: this one, or where a package has it. Nothing is read but names."""
    places = (folder / inside for inside in INSIDE)
    return next((place for place in places if (place / "svg").is_dir() and (place / "png").is_dir()), None)


def read_words(path: Path) -> Words:
    """Title, description and keywords of an SVG file, from its RDF (`cc:Work`, Dublin Core), up to the end of which it
    is read. No entity is ever replaced; empty where there is no RDF, or where the file declares entities.

    Raises:
        ValueError: the file is missing, larger than 8 MiB, or not XML up to there; the message names it.
    """
    found = _Metadata()
    try:
        if path.stat().st_size > MAX_SVG_BYTES:
            raise ValueError(f"{shown(path)} has {path.stat().st_size:,} bytes, and at most {MAX_SVG_BYTES:,} are read")
        with path.open("rb") as file:
            while not found.done:
                piece = file.read(1 << 16)
                found.parser.Parse(piece, not piece)
                if not piece:
                    break
    except _EntityError:
        return Words("", "", ())
    except OSError as error:
        raise ValueError(f"{shown(path)} can't be read ({reason(error)})") from None
    except (expat.ExpatError, LookupError, UnicodeError) as error:
        if not found.done:  # what comes after the RDF is none of ours
            raise ValueError(f"{shown(path)} is not XML ({reason(error)})") from None
    return Words(found.text("title"), found.text("description"), tuple(found.keywords))


class _EntityError(Exception):
    """A file that declares entities."""


class _Metadata:
    """Collects the direct children of the first `Work` and the items of its `subject`."""

    def __init__(self) -> None:
        self.done = False
        self.keywords: list[str] = []
        self._texts: dict[str, str] = {}
        self._open: list[str] = []
        self._work = 0  # how deep it lies; 0 where it is still to come
        self._words: list[str] = []
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._words.append
        self.parser.EntityDeclHandler = self._refuse

    def text(self, name: str) -> str:
        return self._texts.get(name, "")

    def _refuse(self, *declaration: object) -> None:
        raise _EntityError

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._open.append(name.rpartition(" ")[2])
        self._words.clear()
        if self._open[-1] == "Work" and not self._work:
            self._work = len(self._open)

    def _end(self, name: str) -> None:
        if self._work and not self.done:
            inside = self._open[self._work :]
            words = "".join(self._words)
            if len(inside) == 1:
                self._texts.setdefault(inside[0], words)
            elif inside and inside[0] == "subject" and inside[-1] == "li":
                self.keywords.append(words)
            self.done = not inside
        self._open.pop()
        self._words.clear()


def title_of(words: Words) -> str:
    """The title in one spelling, without what is no part of it; "" where it doesn't say what the picture shows.

    >>> title_of(Words("Clipart by Nicu Buculei - black_cat 02", "", ()))
    'black cat'
    >>> title_of(Words("Lemon SVG theme", "", ()))
    ''
    """
    title = re.sub(r"^clip ?art by [\w. ]+? - ", "", _plain(words.title), flags=re.IGNORECASE)
    title = re.sub(r"( (- )?(0\d+|\(\d+\))|(?<=[^\W\d]{3})\d+)$", "", title).strip(" -.,:;")
    letters = sum(letter.isalpha() for letter in title)
    if letters < LEAST_LETTERS or len(title) > LONGEST_TITLE or not title.isprintable() or THEME.search(title):
        return ""
    return title


def keywords_of(words: Words, title: str) -> list[str]:
    """The keywords that say something beside the title, each once."""
    found: dict[str, str] = {}
    for word in map(_plain, words.keywords):
        key = word.casefold()
        dull = key in EMPTY_KEYWORDS or key == title.casefold() or THEME.search(key) is not None
        if not dull and 1 < len(word) <= LONGEST_KEYWORD and not word.isdigit() and word.isprintable():
            found.setdefault(key, word)
    return list(found.values())


def description_of(words: Words, title: str) -> str:
    """The description, or "" where it is too long, a single word, the title once more, or not about the picture."""
    text = _plain(words.description)
    said, known = (re.findall(r"\w+", value.casefold()) for value in (text, title))
    dull = len(said) < 2 or said == known or len(text) > LONGEST_DESCRIPTION or not text.isprintable()
    return "" if dull or THEME.search(text) else text


def _usable(who: str, root: Path, on_error: str) -> tuple[list[str], list[tuple[str, ...]], list[int]]:
    """Names of the pictures with a title, sorted; their texts; and their concepts."""
    every = sorted(_names(root / "svg"))
    words, bad = _all_words(root, every)
    if bad:
        listed = f"{len(bad)} of {len(every)} SVG files can't be read ({_listed(bad, 20)})"
        if on_error == "raise":
            raise ValueError(f"{who}: {listed}; replace or remove them, or {OR_SKIP}.")
        warnings.warn(f"{who}: left out {listed}.", stacklevel=3)
    pictures: set[Path] = set()
    titled: dict[str, list[str]] = {}
    titles: dict[str, str] = {}
    signed: set[str] = set()
    for name, said in words.items():
        title = title_of(said)
        if not title or _is_flag(name, said) or not _fits(_picture(root, name)):
            continue
        picture = _picture(root, name).resolve()
        if picture in pictures:
            continue
        pictures.add(picture)
        key = title.casefold()
        titles.setdefault(key, title)
        titled.setdefault(key, []).append(name)
        if re.match(r"\s*clip ?art by ", said.title, re.IGNORECASE):
            signed.add(key)
    chosen = [key for key, names in titled.items() if len(names) <= (1 if key in signed else MOST_PICTURES)]
    texts = [_texts(titles[key], [words[name] for name in titled[key]]) for key in chosen]
    concepts = {name: number for number, key in enumerate(chosen) for name in titled[key]}
    kept = sorted(concepts)
    return kept, [texts[concepts[name]] for name in kept], [concepts[name] for name in kept]


def _texts(title: str, words: Sequence[Words]) -> tuple[str, ...]:
    """What all pictures of a title have in common."""
    of_each = [keywords_of(said, title) for said in words]
    common = set.intersection(*({word.casefold() for word in each} for each in of_each))
    keywords = [word for word in of_each[0] if word.casefold() in common]
    descriptions = {description_of(said, title) for said in words}
    texts = [title, f"{title}: {', '.join(keywords)}" if keywords else ""]
    texts += descriptions if len(descriptions) == 1 else []
    return tuple(text for text in texts if text)


def _all_words(root: Path, names: Sequence[str]) -> tuple[dict[str, Words], list[str]]:
    """What each file says, and why the others can't be read."""

    def attempt(name: str) -> Words | str:
        try:
            return read_words(root / "svg" / f"{name}.svg")
        except ValueError as error:
            return str(error)

    results = list(zip(names, in_threads(attempt, names), strict=True))
    bad = [result for _, result in results if isinstance(result, str)]
    return {name: result for name, result in results if isinstance(result, Words)}, bad


def _names(folder: Path) -> Iterable[str]:
    """The SVG files below a folder that are files of their own, relative to it and without the suffix."""
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place) / name
            if name.endswith(".svg") and not name.startswith(".") and not file.is_symlink():
                yield file.relative_to(folder).with_suffix("").as_posix()


def _picture(root: Path, name: str) -> Path:
    return root / "png" / f"{name}.png"


def _group(name: str) -> str:
    """The folder that a picture is in, in words."""
    return name.split("/")[0].replace("_", " ") if "/" in name else "other"


def _is_flag(name: str, words: Words) -> bool:
    return not FLAGS.isdisjoint((*name.casefold().split("/"), *(_plain(word).casefold() for word in words.keywords)))


def _fits(picture: Path) -> bool:
    """Is a PNG neither a speck nor a bomb? From its header; what has none is for the decoder to complain about."""
    try:
        with picture.open("rb") as file:
            head = file.read(24)
    except OSError:
        return True
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n":
        return True
    width, height = struct.unpack(">II", head[16:24])
    return max(width, height) >= LEAST_SIDE and width * height <= MAX_PIXELS


def _plain(text: str) -> str:
    """In one line, with spaces for underscores; what was escaped once too often is what it stands for."""
    return re.sub(r"[\s_]+", " ", html.unescape(text)).strip()


def _found(who: str, path: str | os.PathLike[str] | None) -> Path:
    places = [*usual_places("openclipart"), INSTALLED] if path is None else [from_home(path)]
    for place in places:
        if (root := find_clipart(place)) is not None:
            return root
    looked = ", ".join(shown(place) for place in places)
    if path is None:
        raise FileNotFoundError(f"{who}: openclipart is not in {looked}; get it ({GET}), or pass its folder as path.")
    problem = "has no folders svg and png" if places[0].is_dir() else "is no folder"
    raise FileNotFoundError(f"{who}: path is {looked}, which {problem}; pass the folder that both packages lie in.")
