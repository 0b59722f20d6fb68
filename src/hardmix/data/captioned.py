"""Your own pictures with captions: a folder with a table, or the .tar shards of WebDataset. Nothing is unpacked."""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import OR_SKIP, _opened, read_picture, shown
from hardmix.data.folder import LARGEST_DEFAULT, _try_all
from hardmix.data.folder import SUFFIXES as PICTURE_SUFFIXES
from hardmix.data.own_splits import is_split
from hardmix.data.pairs import Pairs, same_text
from hardmix.data.picture_folder import drawn, folder_and_table, inside, read_all, squared
from hardmix.data.tables import _check_names, _listed, _Sheet, _text, split_column
from hardmix.data.texts import JSON_LINES, _utf8

#: what a column or key of captions is called where nobody says it
CAPTION_NAMES = ("caption", "captions", "text")
#: what a message calls the column of file names
AS_COLUMN = "image_column (on the command line --set data.inputs=NAME)"
#: of a shard: suffixes of pictures, and the largest picture and text that are read
SHARD_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PICTURE_BYTES, MAX_TEXT_BYTES = 64 << 20, 1 << 20

Open = Callable[[Path], "Path | IO[bytes]"]


def read_captions(
    folder: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    image_column: str = "",
    caption_column: str = "",
    size: int = 0,
    fit: str = "crop",
    samples: int = 0,
    on_error: str = "raise",
) -> Pairs:
    """Pictures in a folder, each with one or more captions from a table.

    A picture in several rows has several captions, in the order of the rows; the same one twice counts once. Pictures
    with the same captions, whatever their case and white space, are one concept. Files of the folder that no row names
    are left alone. A column or key called "split", where there is one, says train, validation (or val, valid) or test
    in every row. Others aren't looked at.

    Args:
        folder: what the file names in the table are relative to; sub-folders are fine.
        table: .jsonl with one JSON object a line, in which the caption may also be a list of them; or CSV or TSV as for
            `load_table` (a caption with a comma is quoted there). UTF-8. The path, or the name in `folder`.
        image_column: column or key of the file names; by default the only one of which a cell names a picture in
            `folder`.
        caption_column: that of the captions; by default the only one of "caption", "captions" and "text" there is.
        size: side in pixels; by default the median of the pictures' shorter sides ("pad": longer), at most 224. All
            pictures are kept in memory, 3 * size * size bytes each.
        fit: "crop" fills the square and cuts off what sticks out, as CLIP's models do; "pad" keeps the whole picture.
        samples: so many pictures, the same ones each time; 0 for all.
        on_error: "raise" stops with the files that are missing, or a list of those that can't be decoded; "skip" leaves
            them out with a warning.

    Returns:
        Pairs: images (N, 3, size, size) in the order of their first rows; ids are the file names of the table.

    Raises:
        ValueError: a damaged table, an unknown column (the nearest one is offered), no column or several that could be
            meant, an empty caption, a path that leads out of the folder, a picture in two splits, files that are
            missing or can't be decoded, fewer than two pictures, too many samples, or more than 8 GiB of pixels.
        FileNotFoundError: no such folder or table.
    """
    who = "read_captions"
    _check_options(who, size, fit, on_error)
    folder, file = folder_and_table(who, from_home(folder), from_home(table), "CSV, TSV or JSONL")
    where = f"{who}: {shown(file)}"
    lines = file.suffix.lower() in JSON_LINES
    place = "line" if lines else "row"
    sheet, texts = _json_lines(where, file, caption_column) if lines else _cells(where, file, caption_column)
    column = image_column or _image_column(where, folder, sheet)
    names = _named(where, sheet, column)
    parts = split_column(where, sheet)
    first: dict[Path, int] = {}
    captions: dict[Path, dict[str, None]] = {}
    for row, (name, own) in enumerate(zip(names, texts, strict=True)):
        path = inside(folder, name)
        if path is None or not name:
            problem = "leads out of the folder" if name else "has no file name"
            raise ValueError(
                f"{where} {problem} in {place} {sheet.numbers[row]} ({name!r:.60}); write paths relative to the folder."
            )
        start = first.setdefault(path, row)
        if parts is not None and parts[start] != parts[row]:
            raise ValueError(
                f"{where} has {name!r:.60} in one split in {place} {sheet.numbers[start]} and in another in "
                f"{place} {sheet.numbers[row]}; put it into one."
            )
        captions.setdefault(path, {}).update(dict.fromkeys(own))
    paths = list(first)
    rows = drawn(who, len(paths), samples)
    missing = [path for path in (paths[row] for row in rows) if not os.path.isfile(path)]
    if missing and on_error == "raise":
        name = names[first[missing[0]]]
        raise ValueError(
            f"{where} names {len(missing)} of {len(rows)} files that aren't in {shown(folder)}, the first of them "
            f"{name!r:.60}; add them, or {OR_SKIP}."
        )
    paths = [paths[row] for row in rows]
    side, read = _reader(paths, lambda path: path, size, fit)
    pixels, kept = read_all(who, paths, read, (3, side, side), on_error)
    held = [paths[k] for k in kept]
    split = None if parts is None else parts[[first[path] for path in held]]
    ids = [names[first[path]] for path in held]
    return _pairs(who, pixels, [tuple(captions[path]) for path in held], "captions", file, ids, split)


def read_shards(
    path: str | os.PathLike[str],
    *,
    caption_key: str = "",
    size: int = 0,
    fit: str = "crop",
    samples: int = 0,
    on_error: str = "raise",
) -> Pairs:
    """Pictures and captions in WebDataset's .tar files: KEY.jpg (.jpeg, .png, .webp) with KEY.txt or KEY.json.

    KEY is the path up to the first dot of the file's name. KEY.txt holds one caption, KEY.json a caption or a list of
    them under a key. Other files (KEY.cls ...), hidden files and folders are passed over. Files are read where they lie
    in the .tar; nothing is unpacked, and their names are never used as paths. Splits are not read: keep those of
    training and testing in folders of their own, or draw them with `draw_split`.

    Args:
        path: a .tar file (not compressed), or a folder of which all .tar files are read, by name.
        caption_key: key of the caption in KEY.json; by default KEY.txt counts, and where there is none the first of
            "caption", "captions" and "text" in KEY.json.
        size, fit, samples: as for `read_captions`.
        on_error: "raise" stops at samples without a picture or a caption, or with a list of pictures that can't be
            decoded; "skip" leaves them out with a warning.

    Returns:
        Pairs: images (N, 3, size, size) in the order of the shards; ids are "SHARD/KEY.jpg".

    Raises:
        ValueError: not a .tar, one that is cut off, compressed or damaged, a link in it, a picture above 64 MiB or a
            text above 1 MiB, two files for one thing, text that isn't UTF-8, damaged JSON, samples that lack something
            or can't be decoded, fewer than two pictures, too many samples, or more than 8 GiB of pixels.
        FileNotFoundError: no such file, or a folder without .tar files.
    """
    who = "read_shards"
    _check_options(who, size, fit, on_error)
    place = from_home(path)
    shards = sorted(place.glob("*.tar")) if place.is_dir() else [place]
    if not shards or not all(shard.is_file() for shard in shards):
        kind = "a folder without .tar files" if place.is_dir() else "not there"
        raise FileNotFoundError(
            f"{who}: path is {shown(place)}, which is {kind}; pass a .tar file, or a folder of them."
        )
    pictures: dict[Path, _Piece] = {}
    captions: dict[Path, tuple[str, ...]] = {}
    lacking: list[str] = []
    for shard in shards:
        where = f"{who}: {shown(shard)}"
        for key, pieces in _index(where, shard).items():
            suffix = next((suffix for suffix in SHARD_PICTURES if suffix in pieces), "")
            texts = _shard_captions(where, key, pieces, caption_key)
            if not suffix or not texts:
                lacking.append(f"{shard.name}/{key} without a {'caption' if suffix else 'picture'}")
                continue
            name = shard / f"{key}{suffix}"
            pictures[name], captions[name] = pieces[suffix], texts
    if not pictures and not lacking:
        raise ValueError(
            f"{who}: {shown(place)} holds no pictures with captions; call them 1.jpg and 1.txt, or 1.json: what is "
            "before the first dot tells which belong together."
        )
    if lacking:
        every = f"{len(lacking)} of {len(lacking) + len(pictures)} samples ({_listed(lacking, 5)})"
        if on_error == "raise":
            raise ValueError(f"{who}: {shown(place)} has {every}; add what they lack, or {OR_SKIP}.")
        warnings.warn(f"{who}: left out {every}.", stacklevel=2)
    paths = list(pictures)
    paths = [paths[row] for row in drawn(who, len(paths), samples)]
    side, read = _reader(paths, lambda name: io.BytesIO(pictures[name].content()), size, fit)
    pixels, kept = read_all(who, paths, read, (3, side, side), on_error)
    held = [paths[k] for k in kept]
    root = place if place.is_dir() else place.parent
    ids = [name.relative_to(root).as_posix() for name in held]
    return _pairs(who, pixels, [captions[name] for name in held], "shards", place, ids, None)


class _Piece(NamedTuple):
    """Where the content of a file lies in a .tar; each reader opens the .tar for itself, so threads don't meet."""

    shard: Path
    start: int
    size: int

    def content(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def _check_options(who: str, size: int, fit: str, on_error: str) -> None:
    _check.integer(who, "size", size, 0)
    _check.choice(who, "fit", fit, ("crop", "pad"))
    _check.choice(who, "on_error", on_error, ("raise", "skip"))


def _reader(paths: Sequence[Path], source: Open, size: int, fit: str) -> tuple[int, Callable[[Path], Tensor]]:
    """The side of the pictures, by default one that suits them, and what reads one of them."""
    if size == 0:
        headers, _ = _try_all(lambda path: _opened(source(path), shown(path), lambda image: image.size), paths)
        sides = [min(header) if fit == "crop" else max(header) for header in headers.values()]
        size = min(LARGEST_DEFAULT, statistics.median_low(sides or [LARGEST_DEFAULT]))

    def read(path: Path) -> Tensor:
        if fit == "crop":
            return read_picture(source(path), shown(path), size=size, channels=3)
        return squared(read_picture(source(path), shown(path), size=None, channels=3), size)

    return size, read


def _pairs(
    who: str,
    pixels: Tensor,
    captions: list[tuple[str, ...]],
    name: str,
    source: Path,
    ids: list[str],
    split: Tensor | None,
) -> Pairs:
    if len(captions) < 2:
        raise ValueError(f"{who}: {shown(source)} gives {len(captions)} pictures with captions; pass at least 2.")
    number: dict[tuple[str, ...], int] = {}
    keys = (tuple(map(same_text, texts)) for texts in captions)
    concept = torch.tensor([number.setdefault(key, len(number)) for key in keys])
    return Pairs(pixels, captions, concept, name, "yours", str(source), ids, split)


def _cells(where: str, file: Path, caption_column: str) -> tuple[_Sheet, list[tuple[str, ...]]]:
    """A table, and the caption of each row."""
    if file.suffix.lower() in (".parquet", ".pq"):
        raise ValueError(f"{where} is a Parquet file, of which captions are not read; save it as CSV or JSON Lines.")
    if file.suffix.lower() == ".json":  # an array, or annotations as of COCO
        raise ValueError(
            f'{where} is one piece of JSON; write one object a line, {{"file": "1.png", "caption": "a cat"}}, and call '
            "the file .jsonl."
        )
    sheet = _text(where, file)
    if len(sheet.names) < 2:
        raise ValueError(
            f"{where} has one column ({sheet.names[0]!r:.60}) and needs file names and captions; separate them with "
            "commas."
        )
    _check_names(where, sheet.names, sheet.names[0])
    column = caption_column or _caption_name(where, sheet.names)
    cells = _named(where, sheet, column)
    empty = [number for number, cell in zip(sheet.numbers, cells, strict=True) if not cell]
    if empty:
        raise ValueError(
            f"{where} has no caption in {len(empty)} of {len(cells)} rows ({_listed(map(str, empty), 5)}); fill or "
            "delete them."
        )
    return _without(sheet, column), [(cell,) for cell in cells]


def _json_lines(where: str, file: Path, caption_key: str) -> tuple[_Sheet, list[tuple[str, ...]]]:
    """The words of a JSONL file as a table, in which the rows are lines, and the captions of each line."""
    items: list[tuple[int, dict[str, object]]] = []
    for number, line in enumerate(_utf8(where, file).split("\n"), 1):
        if line.strip():
            items.append((number, _json_object(where, f"line {number}", line)))
    if not items:
        raise ValueError(f"{where} is empty; write one JSON object a line.")
    names = list(dict.fromkeys(name for _, item in items for name in item))
    key = caption_key or _caption_name(where, names)
    texts = []
    for number, item in items:
        if key not in item:
            near = _check.did_you_mean(key, item)
            raise ValueError(f"{where} has no key {key!r} in line {number}{near}; add it, or pass another name.")
        texts.append(_words(where, f"line {number}", key, item[key]))
    rows = [[value if isinstance(value := item.get(name), str) else "" for name in names] for _, item in items]
    return _without(_Sheet(names, rows, [number for number, _ in items]), key), texts


def _json_object(where: str, place: str, text: str) -> dict[str, object]:
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON in {place}; repair or delete it.") from None
    if not isinstance(item, dict):
        raise ValueError(f'{where} has no JSON object in {place}; write {{"caption": ..., ...}}.')
    return item


def _words(where: str, place: str, key: str, value: object) -> tuple[str, ...]:
    """The captions that a JSON value holds: a text, or a list of at least one."""
    texts: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where} has {text!r:.40} as its {key!r} in {place}; write a text in quotes.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} has half a surrogate pair in its {key!r} in {place}; repair it.") from None
        texts.append(text.strip())
    if not texts:
        raise ValueError(f"{where} has an empty list as its {key!r} in {place}; write at least one text.")
    return tuple(texts)


def _caption_name(where: str, names: Iterable[str]) -> str:
    """The only usual name among these."""
    every = list(names)
    found = [name for name in CAPTION_NAMES if name in every]
    if len(found) == 1:
        return found[0]
    problem = f"has both {' and '.join(map(repr, found))}"
    if not found:
        problem = f"has none of {', '.join(map(repr, CAPTION_NAMES))} but {_listed(map(repr, every), 20) or 'nothing'}"
    raise ValueError(
        f"{where} {problem}; pass the one that holds the captions as caption_column (on the command line --set "
        "data.target=NAME)."
    )


def _image_column(where: str, folder: Path, sheet: _Sheet) -> str:
    """The only column with a cell that names a picture in the folder."""

    def names_one(column: str) -> bool:
        cells = (cell for cell in _named(where, sheet, column) if os.path.splitext(cell)[1].lower() in PICTURE_SUFFIXES)
        return any((path := inside(folder, cell)) is not None and os.path.isfile(path) for cell in cells)

    found = [column for column in sheet.names if not is_split(column) and names_one(column)]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"names pictures in {_listed(map(repr, found), 20)}; pass one of them as {AS_COLUMN}."
    else:
        problem = (
            f"names no picture in {shown(folder)}; write paths relative to the folder with their suffix, or pass their "
            f"column as {AS_COLUMN}."
        )
    raise ValueError(f"{where} {problem}")


def _named(where: str, sheet: _Sheet, column: str) -> list[str]:
    """The cells of a column."""
    if column not in sheet.names:
        near = _check.did_you_mean(str(column), sheet.names)
        raise ValueError(
            f"{where} has no column {column!r}; pass one of {_listed(map(repr, sheet.names), 20) or 'nothing'}{near}."
        )
    position = sheet.names.index(column)
    return [row[position] for row in sheet.rows]


def _without(sheet: _Sheet, column: str) -> _Sheet:
    """The other columns: captions are looked at once."""
    position = sheet.names.index(column)
    rows = [row[:position] + row[position + 1 :] for row in sheet.rows]
    return _Sheet(sheet.names[:position] + sheet.names[position + 1 :], rows, sheet.numbers)


def _index(where: str, shard: Path) -> dict[str, dict[str, _Piece]]:
    """The pictures and texts of a .tar: key, suffix, where they lie."""
    found: dict[str, dict[str, _Piece]] = {}
    damaged = f"{where} is damaged, cut off or no plain .tar; fetch it again, or unpack it if it is compressed."
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, dot, rest = name.name.partition(".")
                suffix = f".{rest.lower()}"
                if member.isdir() or not stem or not dot or stem.startswith("__"):
                    continue
                if not member.isreg() or member.issparse():
                    raise _RefusedError(f"{where} holds {member.name!r:.60}, which is no plain file; leave it out.")
                if suffix not in (*SHARD_PICTURES, ".txt", ".json"):
                    continue
                most = MAX_PICTURE_BYTES if suffix in SHARD_PICTURES else MAX_TEXT_BYTES
                if not 0 <= member.size <= most:
                    raise _RefusedError(
                        f"{where} says that {member.name!r:.60} has {member.size:,} bytes, and at most {most:,} are "
                        "read; leave it out."
                    )
                pieces = found.setdefault(str(name.parent / stem).lstrip("/"), {})
                if suffix in pieces or (suffix in SHARD_PICTURES and any(kind in pieces for kind in SHARD_PICTURES)):
                    raise _RefusedError(f"{where} has two files for {member.name!r:.60}; leave one of them out.")
                pieces[suffix] = _Piece(shard, member.offset_data, member.size)
            end = tar.offset
        # tarfile takes a header that it can't read for the end of the file; the real end is a block of zeros
        ends = _Piece(shard, end, tarfile.BLOCKSIZE).content() == bytes(tarfile.BLOCKSIZE)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError):
        raise ValueError(damaged) from None
    if not ends:
        raise ValueError(damaged)
    return found


class _RefusedError(Exception):
    """A .tar that could be read but won't be; the message says why."""


def _shard_captions(where: str, key: str, pieces: dict[str, _Piece], caption_key: str) -> tuple[str, ...]:
    """The captions of a sample; none where it has no text."""
    if ".txt" in pieces and not caption_key:
        text = _decoded(where, f"{key}.txt", pieces[".txt"]).strip()
        return (text,) if text else ()
    if ".json" not in pieces:
        return ()
    place = f"{key}.json"
    item = _json_object(where, shown(place), _decoded(where, place, pieces[".json"]))
    name = caption_key or next((name for name in CAPTION_NAMES if name in item), "")
    return _words(where, shown(place), name, item[name]) if name in item else ()


def _decoded(where: str, name: str, piece: _Piece) -> str:
    try:
        return piece.content().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} holds {name!r:.60}, which is not UTF-8 text; save it in UTF-8.") from None
