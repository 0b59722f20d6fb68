"""The section of a page on how well a run, or the runs of a comparison, hold up: robustness.json drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hardmix.metrics.robustness import KINDS
from hardmix.report import plots
from hardmix.report.folder import read_json
from hardmix.report.plots import Line, Plot
from hardmix.report.text import dig, minus, number, p_value, plain, title_of, visible

FILE = "robustness.json"
#: what a caption calls each of `plots.COLORS`
COLOR_NAMES = ("Grey", "Blue", "Orange", "Green", "Purple", "Ochre", "Light blue", "Brown")
#: Entries of a list that are looked at; a file of ours has fewer.
MOST = 60


class Head(NamedTuple):
    """The head of a column; `color` where it is a method's."""

    name: str
    color: int | None = None


class Cell(NamedTuple):
    """A value and what stands below it in small."""

    value: str
    below: str = ""


class Row(NamedTuple):
    """A line of a table and what its name means."""

    name: str
    about: str
    cells: list[Cell]


class Table(NamedTuple):
    """A small table: its title and what it says."""

    title: str
    about: str
    heads: list[Head]
    rows: list[Row]


def section(folder: Path, runs: Sequence[tuple[str, Any]] | None = None) -> dict[str, Any] | None:
    """What robustness.html.j2 asks for, from `folder`/robustness.json; None where there is no such file.

    `runs` are the names and seeds that a comparison has now: a note tells where others were measured.

    A damaged file, or one with pieces missing, gives what can be shown and a note; it never stops a page.
    """
    if not (folder / FILE).is_file():
        return None
    notes: list[str] = []
    stored = read_json(folder / FILE, notes)
    shown = _comparison(stored) if isinstance(stored.get("table"), list) else _run(stored)
    if not notes and not shown["plots"] and not shown["tables"]:
        notes.append(f"{FILE} holds no measurement that can be shown.")
    measured = [(str(dig(run, "name")), dig(run, "seed")) for run in _items(stored.get("runs"))]
    if runs is not None and measured and measured != list(runs):
        notes.append(
            f"These are measurements of {len(measured)} runs, not of the {len(runs)} of the tables above; "
            "`hardmix eval FOLDER --robustness` measures what is missing."
        )
    return {"sentences": [], "diagrams": [], "key": [], **shown, "notes": notes}


def _run(stored: dict[str, Any]) -> dict[str, Any]:
    drawn = [
        _curve_plot([("accuracy", 1, _points(stored, "occlusion", "rates", "accuracy"))], OCCLUSION),
        _curve_plot(
            [
                (title_of(kind), place, _points(dig(stored, "mixed", kind), None, "lam", "both"))
                for place, kind in enumerate(KINDS, 1)
            ],
            BOTH,
        ),
    ]
    diagrams = []
    for key, words in CALIBRATION.items():
        diagram = dig(stored, "calibration", key, "reliability")
        error = _percent(number(dig(stored, "calibration", key, "ece")))
        if isinstance(diagram, dict):
            alt = f"Reliability diagram {words}; calibration error {error}."
            plot = plots.reliability({k: _items(v) for k, v in diagram.items()}, alt)
            diagrams.append(None if plot is None else (plot, f"Calibration {words}: ECE {error}."))
    tables = [_calibration(stored), _fgsm(stored), _corruptions(stored), _training(stored)]
    return {
        "sentences": _sentences(stored),
        "plots": [pair for pair in drawn if pair is not None],
        "diagrams": [pair for pair in diagrams if pair is not None],
        "tables": [table for table in tables if table is not None],
    }


class Words(NamedTuple):
    """How a kind of curve is labelled."""

    x_label: str
    y_label: str
    caption: str
    x_scale: float = 1.0


OCCLUSION = Words("patches painted over (%)", "accuracy", "Accuracy where random patches are painted over.", 100.0)
CALIBRATION = {"before": "as trained", "after": "after temperature scaling"}
BOTH = Words("lambda", "both in the top two", "How often the two best guesses are exactly the two mixed classes.")


def _sentences(stored: dict[str, Any]) -> list[str]:
    """The findings in words, as far as the file has them."""
    found = []
    points = _points(stored, "occlusion", "rates", "accuracy")
    half = next((y for x, y in points if abs(x - 0.5) < 1e-9), None)
    if half is not None and points[0][0] == 0.0:
        found.append(
            f"With half of the image painted over, {_percent(half)} of the test images are still named rightly, "
            f"of {_percent(points[0][1])} unchanged."
        )
    temperature = number(dig(stored, "calibration", "temperature"))
    before, after = (number(dig(stored, "calibration", key, "ece")) for key in ("before", "after"))
    if temperature is not None and before is not None and after is not None:
        sure = "too sure of itself" if temperature > 1 else "not sure enough"
        found.append(
            f"The temperature that suits the validation split is {plain(temperature, 3)}: the model is {sure}. "
            f"With it the calibration error goes from {_percent(before)} to {_percent(after)}."
        )
    mixed, ceiling = (number(dig(stored, "training", key)) for key in ("mixed", "ceiling"))
    clean, validation = (number(dig(stored, "training", key)) for key in ("clean", "validation"))
    if ceiling is not None and ceiling < 1.0 and clean is not None:
        text = f"Training accuracy counts the share of the class that is named, so it can't pass {_percent(ceiling)}"
        text += "" if mixed is None else f"; the final weights reach {_percent(mixed)}"
        text += f". On training images as they are they reach {_percent(clean)}"
        found.append(text + ("." if validation is None else f", on validation images {_percent(validation)}."))
    return found


def _calibration(stored: dict[str, Any]) -> Table | None:
    rows = []
    for key, words in CALIBRATION.items():
        nll, *errors = (number(dig(stored, "calibration", key, name)) for name in ("nll", "ece", "adaptive_ece"))
        if nll is not None or any(error is not None for error in errors):
            rows.append(Row(words, "", [Cell(plain(nll)), *(Cell(_percent(error)) for error in errors)]))
    about = "On the test split; lower is better. ECE: over bins of equal width; adaptive ECE: of equal counts."
    return Table("Calibration", about, [Head("NLL"), Head("ECE"), Head("adaptive ECE")], rows) if rows else None


def _fgsm(stored: dict[str, Any]) -> Table | None:
    points = _points(stored, "fgsm", "epsilons", "accuracy")
    if not points:
        return None
    heads = [Head(f"{plain(255 * x, 3)}/255") for x, _ in points]
    about = "Accuracy after one step of so many levels along the sign of the gradient (FGSM)."
    return Table("Attacked", about, heads, [Row("accuracy", "", [Cell(_percent(y)) for _, y in points])])


def _corruptions(stored: dict[str, Any]) -> Table | None:
    kinds = dig(stored, "corruptions", "accuracy")
    heads = [Head(plain(v)) for v in map(number, _items(dig(stored, "corruptions", "severities"))) if v is not None]
    rows = []
    for name, values in list(kinds.items())[:MOST] if isinstance(kinds, dict) else []:
        known = [number(value) for value in _items(values)]
        if len(known) == len(heads) and heads:
            mean = None if None in known else sum(v for v in known if v is not None) / len(known)
            rows.append(Row(visible(name, 60), "", [Cell(_percent(v)) for v in (*known, mean)]))
    about = "Accuracy by severity, from 1, the mildest."
    return Table("Corrupted", about, [*heads, Head("mean")], rows) if rows else None


def _training(stored: dict[str, Any]) -> Table | None:
    names = {
        "logged": "mixed, as logged in the last epoch",
        "mixed": "mixed, final weights",
        "ceiling": "mixed, highest possible",
        "clean": "training images, unmixed",
        "validation": "validation images",
    }
    rows = [
        Row(text, "", [Cell(_percent(value))])
        for key, text in names.items()
        if (value := number(dig(stored, "training", key))) is not None
    ]
    about = "The same weights on training images, mixed and as they are."
    return Table("Training accuracy", about, [Head("accuracy")], rows) if rows else None


def _comparison(stored: dict[str, Any]) -> dict[str, Any]:
    methods = [row for row in _items(stored["table"]) if isinstance(row, dict)]
    names = [visible(row.get("name"), 60) for row in methods]
    drawn = []
    for key, words in (("occlusion", OCCLUSION), *((kind, BOTH) for kind in KINDS)):
        lines = [
            (name, place, _points(dig(row, "curves", key), None, "x", "mean"))
            for place, (name, row) in enumerate(zip(names, methods, strict=True))
        ]
        bands = [_band(dig(row, "curves", key)) for row in methods]
        prefix = "" if key == "occlusion" else f"{title_of(key)}: "
        drawn.append(_curve_plot(lines, words._replace(caption=prefix + words.caption), bands))
    table = _measures(stored, methods, names)
    pairs = [pair for pair in drawn if pair is not None]
    colors = [{"name": name, "color": place % len(plots.COLORS)} for place, name in enumerate(names)]
    return {"plots": pairs, "tables": [] if table is None else [table], "key": colors if pairs else []}


def _measures(stored: dict[str, Any], methods: list[dict[str, Any]], names: list[str]) -> Table | None:
    """One line a measure, one column a method: mean and 95 % interval and, below, the difference from the first."""
    from hardmix.train.robustness import MEASURES

    keys = [key for key in map(str, _items(stored.get("measures"))) if key in MEASURES]
    if not keys or not methods:
        return None
    rows = []
    for key in keys:
        measure = MEASURES[key]
        cells = [
            Cell(
                _mean(dig(row, "measures", key), measure.percent),
                _difference(dig(row, "versus_first", key), measure.percent),
            )
            for row in methods
        ]
        about = measure.about + (" (lower is better)" if measure.lower_is_better else "")
        rows.append(Row(measure.label, about, cells))
    about = (
        "Mean over the seeds with its 95 % interval. Below: the difference from the first method, with p of the paired "
        "t test after Holm's correction for several methods. The training lines explain; they don't rank."
    )
    heads = [Head(name, place % len(plots.COLORS)) for place, name in enumerate(names)]
    return Table("All measures", about, heads, rows)


def _mean(stored: Any, percent: bool) -> str:
    mean, low, high = (number(dig(stored, key)) for key in ("mean", "low", "high"))
    shown = _percent(mean) if percent else plain(mean)
    if mean is None or low is None or high is None:
        return shown
    half = (high - low) / 2
    return f"{shown} \u00b1\u00a0{100 * half:.1f}" if percent else f"{shown} \u00b1\u00a0{plain(half, 2)}"


def _difference(stored: Any, percent: bool) -> str:
    value, p = (number(dig(stored, key)) for key in ("difference", "p_holm"))
    if value is None:
        return ""
    shown = f"{100 * value:+.1f}" if percent else f"{value:+.2g}"
    return minus(shown) + ("" if p is None else f" ({p_value(p)})")


def _curve_plot(
    lines: Sequence[tuple[str, int, list[tuple[float, float]]]],
    words: Words,
    bands: Sequence[tuple[list[float], list[float]] | None] = (),
) -> tuple[Plot, str] | None:
    """One plot of several (name, place, points), described in words; None where there is nothing to draw."""
    known = [(line, bands[i] if bands else None) for i, line in enumerate(lines) if line[2]]
    if not known:
        return None
    curves, told = [], []
    for (name, place, points), band in known:
        x, y = [words.x_scale * p[0] for p in points], [p[1] for p in points]
        low, high = band if band is not None and len(band[0]) == len(y) else (None, None)
        curves.append(Line(x, y, place, low, high, points=True))
        told.append(
            f"{visible(name, 60)} from {_percent(y[0])} at {plain(x[0], 2)} to {_percent(y[-1])} at {plain(x[-1], 2)}"
        )
    caption = words.caption
    if not bands and len(known) > 1:
        caption += f" {', '.join(f'{COLOR_NAMES[p % len(COLOR_NAMES)]}: {name}' for (name, p, _), _ in known)}."
    alt = f"{words.caption} {'; '.join(told)}."
    return plots.curves(curves, alt, x_label=words.x_label, y_label=words.y_label, percent=True, zero=True), caption


def _points(tree: Any, key: str | None, x: str, y: str) -> list[tuple[float, float]]:
    """Pairs of finite numbers from two lists."""
    node = tree if key is None else dig(tree, key)
    pairs = zip(_items(dig(node, x)), _items(dig(node, y)), strict=False)
    return [(a, b) for u, v in pairs if (a := number(u)) is not None and (b := number(v)) is not None]


def _band(tree: Any) -> tuple[list[float], list[float]] | None:
    """The interval around a curve, if it has one everywhere. Shares stay between 0 and 1."""
    sides = [[number(v) for v in _items(dig(tree, key))] for key in ("low", "high")]
    known = [[min(1.0, max(0.0, v)) for v in side if v is not None] for side in sides]
    return (known[0], known[1]) if known[0] and [len(s) for s in known] == [len(s) for s in sides] else None


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{minus(f'{100 * value:.1f}')}\u00a0%"


def _items(value: Any) -> list[Any]:
    return value[:MOST] if isinstance(value, list) else []
