"""Tables of numbers for regression: one that comes with scikit-learn, and your own CSV, TSV or Parquet file.

Row numbers in messages are those of a spreadsheet: the header is row 1, the first sample row 2.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import reason, shown
from hardmix.data.own_splits import (
    SPLIT_COLUMN,
    check_groups,
    check_split,
    find_split,
    is_split,
    read_groups,
    read_split,
)

TABLES = ("diabetes", "table")
#: what to do about missing cells
MISSING = ("error", "mean", "drop", "keep")

#: cells that say that there is no value; NaN counts in any spelling, since `float` would take it for a number
NO_VALUE = frozenset(("", "?", "na", "n/a", "#n/a", "#na", "<na>", "null", "none", "nan", "+nan", "-nan"))
#: of the values of a column, which share may be words before it can't be one of numbers with mistakes in it
FEW_WORDS = 0.1
#: more values than these make a column of words an id or a free text, not a feature
MAX_VALUES = 50
MIN_ROWS = 10
#: what pandas calls an index without a name in a parquet file
INDEX = re.compile(r"__index_level_\d+__")
NO_COMMA = "write decimals after a point, and thousands without a comma"


class Table(NamedTuple):
    """Numbers to predict a number from.

    Attributes:
        features: (N, P) float64, in the units of the file; `Standardize` is for the training split to fit.
        labels: (N,) float64: dates as seconds, say, are large and close.
        feature_names: P names; `name=value` for the 0/1 column of a word.
        target: the name of the labels.
        name: "diabetes" or "table".
        license: of the numbers.
        source: the path of the file, or the package that holds it.
        split: (N,) uint8 as in `Numbers`, from a column "split" of the file; None without one.
        rows: N numbers of the rows in the file; empty for diabetes.
        groups: N cells of the column `group`; empty without one.
    """

    features: Tensor
    labels: Tensor
    feature_names: tuple[str, ...]
    target: str
    name: str
    license: str
    source: str
    split: Tensor | None = None
    rows: Sequence[int] = ()
    groups: Sequence[str] = ()


class _Sheet(NamedTuple):
    """A file as text: R rows of stripped cells, and the number of each row in the file."""

    names: list[str]
    rows: list[list[str]]
    numbers: list[int]


def load_table(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    target: str = "",
    missing: str = "error",
    group: str = "",
) -> Table:
    """A table by name, or from a file with a header row.

    A column that holds a number in every row is a feature. Any other column is categorical and becomes one 0/1 column
    for each of its values, sorted and called `name=value`; one in which up to a tenth are no numbers is refused. A
    column "split", in any case, is no feature: it says train, validation (or val) or test in every row. Cells are
    missing if they are empty, NA, N/A, #N/A, NaN, None, null or ?, in any case.

    Args:
        name: "diabetes", the 442 patients of scikit-learn in their raw units, or "table", the file at `path`.
        path: for "table": a .parquet file (needs pyarrow), or UTF-8 text with the cells between commas, semicolons or
            tabs, whichever is most frequent in the header.
        target: for "table": the column to predict.
        missing: "error" lists the columns with missing cells; "mean" fills numbers with the mean of the column over all
            rows, those of a later test split included, and gives words the value "missing"; "drop" leaves out the
            rows with a warning; "keep" leaves NaN where a number is missing, for a mean over the training rows to go
            there, and treats words like "mean". A missing target is an error either way.
        group: for "table": the column that says which rows belong together, such as a patient; no feature.

    Raises:
        ValueError: unknown name or target (the nearest one is offered), a damaged file, rows of another length than
            the header, a label that isn't a finite number, labels that are all the same, a column of more than 50
            words, infinity, no feature, or fewer than 10 rows.
        FileNotFoundError: no such file.
        ImportError: scikit-learn or pyarrow is needed and missing.
    """
    who = "load_table"
    _check.choice(who, "name", name, TABLES)
    _check.choice(who, "missing", missing, MISSING)
    if name == "diabetes":
        for argument, value in (("path", path), ("target", target), ("group", group)):
            if value:
                raise ValueError(
                    f"{who}: {argument} is {str(value)!r}, but diabetes comes with scikit-learn; leave it out."
                )
        return _diabetes()
    if path is None:
        raise ValueError(f"{who}: path is None, but the table is a file of yours; pass its path.")
    file = from_home(path)
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "not there"
        raise FileNotFoundError(f"{who}: path is {shown(file)}, which is {kind}; pass a CSV, TSV or Parquet file.")
    where = f"{who}: {shown(file)}"
    sheet = _parquet(where, file) if file.suffix.lower() in (".parquet", ".pq") else _text(where, file)
    _check_names(where, sheet.names, target)
    labels = _labels(where, sheet, target)
    groups = group_column(where, sheet, group, target)
    keep = _complete(where, sheet, target, missing)
    if len(keep) < MIN_ROWS:
        left = f" {len(keep)} of {len(sheet.rows)} rows without missing cells" if missing == "drop" else ""
        raise ValueError(f"{where} has{left or f' {len(keep)} rows'}; pass a table with at least {MIN_ROWS}.")
    if len(keep) < len(sheet.rows):
        warnings.warn(
            f"{where} has missing cells in {_gaps(sheet)}; left out {len(sheet.rows) - len(keep)} of {len(sheet.rows)} "
            "rows.",
            stacklevel=2,
        )
    labels = labels[keep]
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"{where} has the same value ({labels[0].item():g}) in every row of the target {target!r}; "
            "pass another target."
        )
    rows = [sheet.numbers[row] for row in keep]
    split = None if is_split(target) else split_column(where, sheet)
    split = None if split is None else split[keep]
    check_split(where, split)
    groups = [groups[row] for row in keep] if groups else []
    check_groups(where, groups, split)
    names: list[str] = []
    columns: list[Tensor] = []
    for position, column in enumerate(sheet.names):
        if column not in (target, group) and not is_split(column):
            cells = [sheet.rows[row][position] for row in keep]
            more, values = _feature(where, column, cells, rows, fill=missing != "keep")
            names += more
            columns += values
    if not columns:
        raise ValueError(f"{where} has no column besides the target and {SPLIT_COLUMN!r}; add a feature.")
    return Table(torch.stack(columns, 1), labels, tuple(names), target, name, "yours", str(file), split, rows, groups)


def split_column(where: str, sheet: _Sheet) -> Tensor | None:
    """(R,) uint8 from the column "split" of a table, or None without one."""
    name = find_split(where, sheet.names)
    if name is None:
        return None
    position = sheet.names.index(name)
    return read_split(where, [row[position] for row in sheet.rows], sheet.numbers)


def group_column(where: str, sheet: _Sheet, group: str, target: str) -> list[str]:
    """R cells of the column that says which rows belong together; none where that is empty."""
    if not group:
        return []
    others = [name for name in sheet.names if name != target and not is_split(name)]
    if group not in others:
        near = _check.did_you_mean(group, others)
        raise ValueError(
            f"{where} has no column of groups {group!r}; pass one of {_listed(map(repr, others), 20)}{near}."
        )
    position = sheet.names.index(group)
    cells = (row[position] for row in sheet.rows)
    return read_groups(where, ["" if _is_missing(cell) else cell for cell in cells], group, sheet.numbers)


def split_rows(rows: int, test: float, validation: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut round(test N) test rows and round(validation N) validation rows out of N; the rest is for training.

    The test rows depend on `seed` and their number only, so another share for validation leaves them as they are.

    Args:
        rows: N.
        test: share of the test split.
        validation: share of the validation split; 0 for none.
        seed: which rows.

    Returns:
        (training rows, validation rows, test rows), long, ascending, disjoint, together all N.

    Raises:
        ValueError: shares that leave fewer than two rows for training or for testing.
    """
    who = "split_rows"
    rows = _check.integer(who, "rows", rows, 1)
    test = _check.between(who, "test", test, 0.0, 1.0)
    validation = _check.between(who, "validation", validation, 0.0, 1.0)
    tested, validated = round(test * rows), round(validation * rows)
    if tested < 2 or rows - tested - validated < 2:
        raise ValueError(
            f"{who}: test {test:g} and validation {validation:g} of {rows} rows leave "
            f"{max(rows - tested - validated, 0)} for training and {tested} for testing, but at least 2 of either are "
            "needed; pass other shares or more rows."
        )
    generator = torch.Generator().manual_seed(_check.integer(who, "seed", seed, 0))
    order = torch.randperm(rows, generator=generator)
    at = (tested, tested + validated)
    return order[at[1] :].sort().values, order[at[0] : at[1]].sort().values, order[: at[0]].sort().values


class Standardize(NamedTuple):
    """Features with mean 0 and standard deviation 1, as they were on the rows that it was fitted on.

        z_p = (x_p - mean_p) / std_p

    Attributes:
        mean: (P,).
        std: (P,), over N rather than N - 1; 1 for a column that was constant, which becomes 0.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Standardize:
        """Mean and standard deviation of (N, P) features, summed in float64; those of the training split, no others.

        Raises:
            ValueError: no rows, NaN or infinity. TypeError: not floating-point.
        """
        features = _floating("Standardize.fit", features)
        _check.finite("Standardize.fit", "features", features)
        std, mean = torch.std_mean(features.double(), 0, correction=0)
        low, high = features.aminmax(dim=0)
        # Asked of the values: the rounded mean of equal values may leave a tiny std, and a tiny std may round to 0.
        mean, std = torch.where(low == high, low, mean.to(low)), std.to(low)
        return cls(mean, torch.where((low == high) | (std == 0), torch.ones_like(std), std))

    def __call__(self, features: Tensor) -> Tensor:
        """(N, P) standardized features, in the dtype of `features`."""
        features = _floating("Standardize", features)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"Standardize: features has {features.shape[1]} columns but was fitted on {len(self.mean)}; "
                "pass the same columns."
            )
        return (features - self.mean.to(features)) / self.std.to(features)


def _floating(who: str, features: Tensor) -> Tensor:
    features = _check.batch(who, "features", features, 2, 2)
    if not features.is_floating_point():
        raise TypeError(f"{who}: features has dtype {features.dtype}; pass floating-point values.")
    return features


def _diabetes() -> Table:
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise ImportError('load_table: scikit-learn is not installed; pip install "hardmix[train]".') from None
    bunch = load_diabetes(scaled=False)
    features, labels = (torch.from_numpy(values).double() for values in (bunch.data, bunch.target))
    names = tuple(bunch.feature_names)
    return Table(features, labels, names, "progression", "diabetes", "BSD-3-Clause", "scikit-learn")


def _text(where: str, path: Path) -> _Sheet:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text; save it as CSV in UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); pass another file.") from None
    header = next((line for line in text.splitlines() if line.strip()), "")
    names: list[str] = []
    rows: list[list[str]] = []
    numbers: list[int] = []
    # strict, since a quote that is never closed would swallow the rest of the file
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=header.count), skipinitialspace=True, strict=True)
    number = 0
    try:
        for number, cells in enumerate(reader, 1):
            row = [cell.strip() for cell in cells]
            if len(row) <= 1 and not any(row):  # a blank line
                continue
            if not names:
                names = row
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"{where} has {len(row)} cells in row {number} but {len(names)} in its header; repair that row."
                )
            rows.append(row)
            numbers.append(number)
    except csv.Error as error:
        raise ValueError(f"{where} is damaged in row {number + 1} ({reason(error)}); repair that row.") from None
    if not names:
        raise ValueError(f"{where} is empty; pass a table with a header row.")
    return _Sheet(names, rows, numbers)


def _parquet(where: str, path: Path) -> _Sheet:
    """Values as text, so that both kinds of files go through the same checks; `str` of a float is exact."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(
            f"{where} can only be read with pyarrow, which is missing; pip install pyarrow, or save it as CSV."
        ) from None
    try:
        table = pq.ParquetFile(path).read()
        # an index without a name, which pandas saves beside the columns and `to_csv` leaves without one
        names = ["" if INDEX.fullmatch(str(column)) else str(column).strip() for column in table.column_names]
        columns = [  # damaged texts are found where they are decoded
            ["" if value is None else str(value).strip() for value in column.to_pylist()] for column in table.columns
        ]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}); fetch it again.") from None
    rows = [list(row) for row in zip(*columns, strict=True)]
    return _Sheet(names, rows, list(range(2, len(rows) + 2)))


def _check_names(where: str, names: list[str], target: str) -> None:
    if "" in names:
        raise ValueError(f"{where} has no name for column {names.index('') + 1}; name it in the header, or delete it.")
    twice = next((column for column in names if names.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"{where} has two columns called {twice!r}; rename one of them.")
    if len(names) < 2:
        raise ValueError(
            f"{where} has one column ({names[0]!r:.60}) and needs a feature and a target; separate them with commas."
        )
    if target not in names:
        near = _check.did_you_mean(str(target), names)
        raise ValueError(
            f"{where} has no column for the target {target!r}; pass one of {_listed(map(repr, names), 20)}{near}."
        )


def _labels(where: str, sheet: _Sheet, target: str) -> Tensor:
    """(R,) float64 labels, each a finite number."""
    position = sheet.names.index(target)
    cells = [row[position] for row in sheet.rows]
    numbers = [None if _is_missing(cell) else _number(cell) for cell in cells]
    labels = torch.tensor([math.nan if number is None else number for number in numbers], dtype=torch.float64)
    wrong = (~labels.isfinite()).nonzero().flatten().tolist()
    if wrong:
        rows = _listed((f"{sheet.numbers[row]} ({cells[row]!r:.20})" for row in wrong), 5)
        advice = f"repair or delete {'them' if len(wrong) > 1 else 'it'}"
        if all(_with_comma(cells[row]) for row in wrong):
            advice = NO_COMMA
        raise ValueError(f"{where} has no finite number as its target {target!r} in {_rows(wrong)} {rows}; {advice}.")
    return labels


def _complete(where: str, sheet: _Sheet, target: str, missing: str) -> list[int]:
    """Positions of the rows to keep."""
    if missing == "error" and (listed := _gaps(sheet)):
        raise ValueError(
            f"{where} has missing cells in {listed}; fill them with `--set data.missing=mean`, "
            "or leave out their rows with `--set data.missing=drop`."
        )
    return [number for number, row in enumerate(sheet.rows) if missing != "drop" or not any(map(_is_missing, row))]


def _gaps(sheet: _Sheet) -> str:
    """The columns with missing cells, and how many; empty without any."""
    count = [sum(map(_is_missing, column)) for column in zip(*sheet.rows, strict=True)]
    return _listed((f"{name!r} ({n})" for name, n in zip(sheet.names, count, strict=False) if n), 20)


def _feature(
    where: str, column: str, cells: list[str], rows: list[int], *, fill: bool
) -> tuple[list[str], list[Tensor]]:
    """Names and (N,) float64 values of the features that one column gives; `rows` are the numbers of its rows."""
    numbers = [None if _is_missing(cell) else _number(cell) for cell in cells]
    words = [i for i, (cell, number) in enumerate(zip(cells, numbers, strict=True)) if number is None]
    words = [i for i in words if not _is_missing(cells[i])]
    if words and all(_with_comma(cells[i]) for i in words):
        raise ValueError(
            f"{where} has numbers with a comma in {column!r}, row {rows[words[0]]} ({cells[words[0]]!r:.40}); "
            f"{NO_COMMA}."
        )
    present = [number for number in numbers if number is not None]
    few = len(words) <= FEW_WORDS * (len(words) + len(present))
    signs = not any(character.isalnum() for i in words for character in cells[i])  # such as "-" or "." for nothing
    if words and (few or signs) and len(set(present)) > 2:
        raise ValueError(
            f"{where} has {cells[words[0]]!r:.40} in {column!r}, row {rows[words[0]]}, where "
            f"{'nearly all' if few else 'other'} cells are numbers; write a number, leave the cell empty, or make "
            "words of all of them."
        )
    if words:
        filled = ["missing" if _is_missing(cell) else cell for cell in cells]
        values = sorted(set(filled))
        if len(values) > MAX_VALUES:
            raise ValueError(
                f"{where} has {len(values)} different values in {column!r}, which is no column of numbers (row "
                f"{rows[words[0]]} holds {cells[words[0]]!r:.40}), and at most {MAX_VALUES} become features; "
                "delete the column (an id is not a feature), or write it as numbers."
            )
        ids = torch.tensor([values.index(cell) for cell in filled])
        return [f"{column}={value}" for value in values], [(ids == k).double() for k in range(len(values))]
    if not present:
        raise ValueError(f"{where} has no value at all in {column!r}; delete the column.")
    exact = torch.tensor([math.nan if number is None else number for number in numbers], dtype=torch.float64)
    wrong = exact.float().isinf().nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where} has infinity or a number beyond float32 in {column!r}, {_rows(wrong)} "
            f"{_listed((str(rows[i]) for i in wrong), 5)}; repair or delete {'them' if len(wrong) > 1 else 'it'}."
        )
    return [column], [exact.nan_to_num(nan=math.fsum(present) / len(present)) if fill else exact]


def _is_missing(cell: str) -> bool:
    return cell.lower() in NO_VALUE


def _number(cell: str) -> float | None:
    """The number that a cell holds, or None. Python reads 1_000 as a number; in a table it is a word."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _with_comma(cell: str) -> bool:
    return "," in cell and _number(cell.replace(",", "")) is not None


def _rows(wrong: list[int]) -> str:
    return "row" if len(wrong) == 1 else "rows"


def _listed(words: Iterable[str], most: int) -> str:
    """'a, b and 3 more'."""
    every = list(words)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
