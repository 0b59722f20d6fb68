"""Picture files with a number each: your own folder with a table, and what every reader of such files needs."""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import OR_SKIP, UnreadableImageError, in_threads, read_header, read_picture, shown
from hardmix.data.folder import LARGEST_DEFAULT, SUFFIXES, _try_all
from hardmix.data.images import check_channels
from hardmix.data.numbers import Numbers
from hardmix.data.own_splits import check_groups, check_split
from hardmix.data.tables import (
    MIN_ROWS,
    _check_names,
    _labels,
    _listed,
    _parquet,
    _Sheet,
    _text,
    group_column,
    split_column,
)

#: seed of the subset that `samples` draws
SAMPLES_SEED = 0
#: more memory than this is not asked for
MAX_BYTES = 8 * 2**30


def read_picture_table(
    folder: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    target: str,
    file_column: str = "",
    group: str = "",
    size: int = 0,
    channels: int = 3,
    fit: str = "pad",
    samples: int = 0,
    on_error: str = "raise",
) -> Numbers:
    """Pictures in a folder, each with a number from a table: one row per picture, with its file and its number.

    Files of the folder that no row names are left alone, whatever they are: the folder may well hold masks, or
    pictures without a number. A column called "split", where there is one, says train, validation (or val, valid) or
    test in every row. Other columns aren't looked at.

    Args:
        folder: what the file names in the table are relative to; sub-folders are fine.
        table: a .parquet file, or text as for `load_table`; the path, or where there is none, the name in `folder`.
        target: the column of numbers.
        group: the column that says which pictures belong together, such as a patient; "" for none.
        file_column: the column of file names; by default the only one of which a cell names a picture in `folder`.
        size: side in pixels; by default the median of the pictures' longer sides ("crop": shorter), at most 224. All
            pictures are kept in memory, `channels * size * size` bytes each.
        channels: 3 for RGB, 1 for luma.
        fit: "pad" keeps the whole picture and makes it square with the median color of its edge, so that nothing that
            the number may depend on is lost; "crop" fills the square and cuts off what sticks out.
        samples: so many pictures, the same ones each time; 0 for all. A larger number only adds to a smaller one.
        on_error: "raise" stops with the files that are missing, or a list of those that can't be decoded; "skip" leaves
            them out with a warning.

    Returns:
        inputs (N, channels, size, size) uint8 in the order of the rows; ids are the file names of the table.

    Raises:
        ValueError: a damaged table, fewer than 10 rows, an unknown column (the nearest one is offered), a label that
            isn't a finite number, labels that are all the same, no column or several that name pictures, a path that
            leads out of the folder, a file in two rows, files that are missing or can't be decoded, another word in
            the split column, fewer than two rows for training or for testing in it, too many samples, or more than
            8 GiB of pixels.
        FileNotFoundError: no such folder or table.
        ImportError: pyarrow is needed and missing.
    """
    who = "read_picture_table"
    size = _check.integer(who, "size", size, 0)
    check_channels(who, channels)
    _check.choice(who, "fit", fit, ("pad", "crop"))
    _check.choice(who, "on_error", on_error, ("raise", "skip"))
    folder, file = folder_and_table(who, from_home(folder), from_home(table))
    where = f"{who}: {shown(file)}"
    sheet = _parquet(where, file) if file.suffix.lower() in (".parquet", ".pq") else _text(where, file)
    _check_names(where, sheet.names, target)
    labels = _labels(where, sheet, target)
    if len(labels) < MIN_ROWS:
        raise ValueError(f"{where} has {len(labels)} rows; pass a table with at least {MIN_ROWS}.")
    groups, split = group_column(where, sheet, group, target), split_column(where, sheet)
    check_groups(where, groups, split)
    names, paths = _files(where, folder, sheet, target, file_column)
    rows = drawn(who, len(paths), samples)
    check_split(where, None if split is None else split[rows])
    missing = [row for row in rows if not os.path.isfile(paths[row])]
    if missing and on_error == "raise":
        first = f"row {sheet.numbers[missing[0]]} ({names[missing[0]]!r:.60})"
        raise ValueError(
            f"{where} names {len(missing)} of {len(rows)} files that aren't in {shown(folder)}, the first of them in "
            f"{first}; add them, or {OR_SKIP}."
        )
    paths = [paths[row] for row in rows]
    if size == 0:
        headers, _ = _try_all(read_header, paths)
        sides = [max(header) if fit == "pad" else min(header) for header in headers.values()]
        size = min(LARGEST_DEFAULT, statistics.median_low(sides or [LARGEST_DEFAULT]))

    def read(path: Path) -> Tensor:
        if fit == "crop":
            return read_picture(path, shown(path), size=size, channels=channels)
        return squared(read_picture(path, shown(path), size=None, channels=channels), size)

    pixels, kept = read_all(who, paths, read, (channels, size, size), on_error)
    rows = [rows[row] for row in kept]
    check_split(where, None if split is None else split[rows])
    split = None if split is None else split[rows]
    ids = [names[row] for row in rows]
    kept_groups = [groups[row] for row in rows] if groups else []
    numbers = Numbers(pixels, labels[rows], "images", target, "pictures", "yours", str(file), ids, split)
    return checked(who, numbers._replace(groups=kept_groups))


def squared(picture: Tensor, size: int, *, fill: int | None = None) -> Tensor:
    """The whole picture (C, H, W) uint8 in the middle of a square, (C, size, size).

    Its longer side is scaled to `size` (antialiased bilinear) and the shorter one with it, rounded to whole pixels and
    at least 1. The rest of the square is `fill`, or for each channel the median of the scaled picture's edge.
    """
    longer = max(picture.shape[1:])
    # scaled first: the square around a picture of 1 x 1,000,000 pixels wouldn't fit into memory
    height, width = (max(1, round(side * size / longer)) for side in picture.shape[1:])
    picture = F.interpolate(picture[None], size=(height, width), mode="bilinear", antialias=True)[0]
    if fill is None:
        edge = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
        square = edge.median(1).values.view(-1, 1, 1).repeat(1, size, size)
    else:
        square = torch.full((picture.shape[0], size, size), fill, dtype=torch.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[:, top : top + height, left : left + width] = picture
    return square


def read_all(
    who: str, paths: Sequence[Path], read: Callable[[Path], Tensor], shape: tuple[int, int, int], on_error: str
) -> tuple[Tensor, list[int]]:
    """(M, *shape) uint8 pixels, and the M positions in `paths` that they are from. A few threads decode.

    Raises:
        ValueError: files that can't be decoded, all listed, unless `on_error` is "skip", which warns; none that can;
            or pixels that take more memory than `MAX_BYTES`.
    """
    _check.choice(who, "on_error", on_error, ("raise", "skip"))
    needed = len(paths) * math.prod(shape)
    if needed > MAX_BYTES:
        raise ValueError(
            f"{who}: {len(paths):,} pictures of {'x'.join(map(str, shape))} take {needed / 2**30:,.0f} GiB, more than "
            f"{MAX_BYTES / 2**30:g}; pass a smaller size, or fewer samples."
        )
    pixels = torch.empty((len(paths), *shape), dtype=torch.uint8)

    def store(position: int) -> str:
        try:
            pixels[position] = read(paths[position])
        except UnreadableImageError as error:
            return str(error)
        return ""

    reasons = list(in_threads(store, range(len(paths))))
    kept = [position for position, reason in enumerate(reasons) if not reason]
    if len(kept) == len(paths):
        return pixels, kept
    listed = f"({_listed(filter(None, reasons), 20)})"
    bad = f"{len(paths) - len(kept)} of {len(paths)} files"
    if on_error == "raise" or not kept:
        instead = f", or {OR_SKIP}" if kept else ""
        raise ValueError(f"{who}: {bad} can't be read {listed}; replace or remove them{instead}.")
    warnings.warn(f"{who}: left out {bad} that can't be read {listed}.", stacklevel=3)
    return pixels[kept], kept


def drawn(who: str, rows: int, samples: int) -> list[int]:
    """`samples` of `rows` rows, ascending, each as likely as any other, the same ones each time; 0 for all."""
    samples = _check.integer(who, "samples", samples, 0)
    if samples > rows:
        raise ValueError(f"{who}: samples is {samples:,}, but there are {rows:,}; pass at most that, or 0 for all.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(SAMPLES_SEED))
    chosen: list[int] = order[: samples or rows].sort().values.tolist()
    return chosen


def inside(folder: Path, name: str) -> Path | None:
    """The path of a file that a list names relative to `folder`, or None if it would lead out of it."""
    pure = PurePath(name)
    return None if pure.anchor or ".." in pure.parts else folder / pure


def checked(who: str, numbers: Numbers) -> Numbers:
    """The numbers, once there is something to learn: at least two samples, and labels that differ."""
    labels = numbers.labels
    if len(labels) < 2:
        raise ValueError(f"{who}: {shown(numbers.source)} gives {len(labels)} samples; pass at least 2.")
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"{who}: {shown(numbers.source)} has the same value ({labels[0].item():g}) in every sample as its target "
            f"{numbers.target!r}; pass another target, or more samples."
        )
    return numbers


def folder_and_table(who: str, folder: Path, table: Path, kinds: str = "CSV, TSV or Parquet") -> tuple[Path, Path]:
    """The folder, and the table beside it or in it."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise FileNotFoundError(f"{who}: folder is {shown(folder)}, which is {kind}; pass the folder of the files.")
    found = next((path for path in (table, folder / table) if path.is_file()), None)
    if found == table and (folder / table).is_file() and not table.samefile(folder / table):
        raise ValueError(
            f"{who}: table is {shown(table)}, which is there and in {shown(folder)}, too; pass the whole path of the "
            "one that is meant."
        )
    if found is None:
        kind = "a folder" if table.is_dir() else f"neither there nor in {shown(folder)}"
        raise FileNotFoundError(f"{who}: table is {shown(table)}, which is {kind}; pass a {kinds} file.")
    return folder, found


def _files(where: str, folder: Path, sheet: _Sheet, target: str, file_column: str) -> tuple[list[str], list[Path]]:
    """The cell and the path of each row's file, which need not be there."""
    column = file_column or _file_column(where, folder, sheet, target)
    if column not in sheet.names:
        near = _check.did_you_mean(str(column), sheet.names)
        raise ValueError(
            f"{where} has no column {column!r} with file names; pass one of "
            f"{_listed(map(repr, sheet.names), 20)}{near}."
        )
    names = _column(sheet, column)
    paths: list[Path] = []
    seen: dict[str, int] = {}
    for number, name in zip(sheet.numbers, names, strict=True):
        path = inside(folder, name)
        if path is None:
            raise ValueError(
                f"{where} leads out of the folder in row {number} ({name!r:.60}); write paths relative to the folder."
            )
        first = seen.setdefault(_real(path), number)
        if first != number:
            raise ValueError(f"{where} has the file {name!r:.60} in row {first} and in row {number}; keep one of them.")
        paths.append(path)
    return names, paths


def _real(path: Path) -> str:
    """Where links lead to: a picture with two names would be in two splits."""
    try:
        return os.path.normcase(os.path.realpath(path))
    except ValueError:  # NUL; that there is no such file is told later
        return str(path)


def _file_column(where: str, folder: Path, sheet: _Sheet, target: str) -> str:
    """The only column with a cell that names a picture in the folder."""

    def names_one(cells: Iterable[str]) -> bool:
        named = (inside(folder, cell) for cell in cells if os.path.splitext(cell)[1].lower() in SUFFIXES)
        return any(path is not None and os.path.isfile(path) for path in named)

    found = [column for column in sheet.names if column != target and names_one(_column(sheet, column))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{where} names pictures in the columns {_listed(map(repr, found), 20)}; pass one of them as file_column."
        )
    raise ValueError(
        f"{where} has no column that names pictures in {shown(folder)}; write paths relative to the folder with their "
        "suffix, or pass file_column."
    )


def _column(sheet: _Sheet, name: str) -> list[str]:
    position = sheet.names.index(name)
    return [row[position] for row in sheet.rows]
