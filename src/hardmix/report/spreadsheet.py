"""comparison.csv: one row per run, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from hardmix.report.comparison import Method, Row, read_comparison
from hardmix.report.text import visible
from hardmix.train.files import write_text

#: What a spreadsheet takes for the start of a formula, in both widths.
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
#: Times of a run in the order of their columns; a column that no run fills is left out.
SECONDS = ("train", "test", "total", "per_step")


def write_csv(folder: Path) -> Path:
    """Write `folder`/comparison.csv from its comparison.json, and return its path.

    One row per run: name, seed, policy, objective, the metrics, seconds, memory, folder. Numbers are written with every
    digit; what is missing or not finite is an empty cell. A text that a spreadsheet would run as a formula (it starts
    with = + - @) gets an apostrophe in front, and invisible characters are spelled out as in the report.

    Raises:
        ValueError: there is no readable comparison.json.
    """
    folder = Path(folder)
    comparison = read_comparison(folder)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    times = [key for key in SECONDS if any(key in row.seconds for row in comparison.rows)]
    header = ["name", "seed", "policy", "objective", *comparison.metrics]
    writer.writerow([text_cell(h) for h in [*header, *(f"seconds_{key}" for key in times), "memory_mb", "folder"]])
    for method in comparison.methods:
        for row in method.rows:
            writer.writerow(_cells(row, method, comparison.metrics, times))
    path = folder / "comparison.csv"
    write_text(path, stream.getvalue())
    return path


def text_cell(value: Any) -> str:
    """A text that no spreadsheet runs. None is an empty cell."""
    if value is None:
        return ""
    text = visible(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def _cells(row: Row, method: Method, metrics: list[str], times: list[str]) -> list[str]:
    seed = str(row.seed) if isinstance(row.seed, int) else text_cell(row.seed)
    numbers = [row.test.get(key) for key in metrics] + [row.seconds.get(key) for key in times] + [row.memory_mb]
    return [
        text_cell(row.name),
        seed,
        text_cell(method.policy),
        text_cell(method.objective),
        *("" if value is None else repr(value) for value in numbers),
        text_cell(row.place),
    ]
