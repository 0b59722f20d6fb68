"""What the page of an image-text run shows besides its metrics: searches, pictures that were found, and plots."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from hardmix.report import pair_plots
from hardmix.report.folder import RunFolder
from hardmix.report.gallery import data_uri, picture
from hardmix.report.plots import Plot
from hardmix.report.robustness_plots import Cell, Head, Row, Table
from hardmix.report.text import (
    PAIR_GROUPS,
    count,
    dig,
    metric,
    number,
    pair_group,
    pair_place,
    plain,
    show,
    visible,
)

#: Searches, entries of a table, cut-offs and captions that are shown.
EXAMPLES, FOUND, ENTRIES, CUTS, CAPTIONS = 8, 5, 40, 5, 8
PARTS = {"unseen": "Unseen concepts", "seen": "Seen concepts"}
DIRECTIONS = {"image_to_text": "picture to text", "text_to_image": "text to picture"}
PLACES = ("1st", "2nd", "3rd", "4th", "5th")
GEOMETRY = ("gap", "alignment", "uniformity")
AGREEMENT = ("exact", "edit_distance", "bleu_4", "cider")


class Found(NamedTuple):
    """A picture that a text found; `right` where it has the text."""

    uri: Markup
    alt: str
    place: str
    right: bool


class View(NamedTuple):
    """The first pictures that were found, before or after fine-tuning."""

    name: str
    found: list[Found]


class Example(NamedTuple):
    """A text, its own picture, and what it found."""

    text: str
    own: Markup | None
    views: list[View]


class Caption(NamedTuple):
    """A picture, what was written for it, and its own text."""

    picture: Markup | None
    found: str
    right: str


class Captions(NamedTuple):
    """How well captions agree, and some of them."""

    about: str
    tables: list[Table]
    examples: list[Caption]


def section(run: RunFolder, notes: list[str]) -> dict[str, Any] | None:
    """What pairs.html.j2 asks for; None where the summary has nothing of it. What can't be shown becomes a note."""
    summary = run.summary
    shown = {
        "metrics": metrics(summary.get("test"), summary.get("before")),
        "tables": retrieval(summary.get("retrieval")),
        "examples": examples(run, notes),
        "captions": captions(run, notes),
        "calibration": pair_plots.calibration(summary.get("calibration")),
        "shots": pair_plots.few_labels(summary.get("test"), summary.get("before")),
        "arithmetic": pair_plots.arithmetic(summary.get("arithmetic")),
        "spheres": spheres(summary),
    }
    return shown if any(shown.values()) else None


def metrics(test: Any, before: Any) -> list[Table]:
    """The metrics by what they were measured on, and beside each what it was before fine-tuning where that is known."""
    stored = {str(key): number(value) for key, value in test.items()} if isinstance(test, dict) else {}
    started = isinstance(before, dict) and any(key in before for key in stored)
    heads = [Head("before"), Head("after")] if started else [Head("value")]
    tables = []
    for group, (title, about) in PAIR_GROUPS.items():
        rows = []
        for key, value in stored.items():
            if pair_group(key) == group:
                cells = [Cell(show(key, number(dig(before, key))))] if started else []
                rows.append(Row(*_told(key, group), [*cells, Cell(show(key, value))]))
        if rows:
            tables.append(Table(title, about, heads, rows))
    return tables


def _told(key: str, group: str) -> tuple[str, str]:
    """A metric's name and what it says; where it was measured and what the same one says are told by other lines."""
    known = metric(key)
    start, here = pair_place(key)
    label = metric(here).label if group in ("shift", "seen") else known.label
    lower = "lower is better" if known.lower_is_better else ""
    if start:
        return label, lower
    return label, f"{known.about} ({lower})" if lower else known.about


def retrieval(stored: Any) -> list[Table]:
    """A table of each part: one line a style and direction, with what chance reaches below each number."""
    entries = [entry for entry in stored[:ENTRIES] if isinstance(entry, dict)] if isinstance(stored, list) else []
    tables = []
    for part in dict.fromkeys(str(entry.get("part")) for entry in entries):
        own = [entry for entry in entries if str(entry.get("part")) == part]
        cuts = _cuts(own)
        rows = [row for entry in own for row in _rows(entry, cuts)]
        if rows:
            heads = [*(Head(f"R@{k}") for k in cuts), Head("median rank")]
            about = "How often the right one is among the first that are found; in small what chance reaches."
            tables.append(Table(PARTS.get(part, visible(part)), about, heads, rows))
    return tables


def _cuts(entries: list[dict[str, Any]]) -> list[int]:
    """The k of all recalls, ascending."""
    names = (
        re.fullmatch(r"[a-z_]{1,20}_recall_([1-9][0-9]{0,5})", str(key)[:40]) for entry in entries for key in entry
    )
    return sorted({int(name[1]) for name in names if name is not None})[:CUTS]


def _rows(entry: dict[str, Any], cuts: list[int]) -> list[Row]:
    """Both directions of one style, as far as there are numbers."""
    rows = []
    style, size = entry.get("style"), number(entry.get("pairs"))
    about = "" if size is None else f"{count(size)} pairs"
    if entry.get("shift") is True:
        about += f"{', ' if about else ''}not a style of this training"
    for key, name in DIRECTIONS.items():
        cells = [_cell(entry, f"{key}_recall_{k}", "recall_1") for k in cuts]
        cells.append(_cell(entry, f"{key}_median_rank", "median_rank"))
        if any(cell.value != "n/a" for cell in cells):
            rows.append(Row(f"{visible(style, 60)}: {name}" if style else name, about, cells))
    return rows


def _cell(entry: dict[str, Any], key: str, like: str) -> Cell:
    value, chance = number(entry.get(key)), number(entry.get(f"{key}_chance"))
    shown, by_chance = (show(like, v, 1) if metric(like).percent else plain(v) for v in (value, chance))
    return Cell(shown, "" if value is None or chance is None else f"chance {by_chance}")


def examples(run: RunFolder, notes: list[str]) -> list[Example]:
    """The first searches with their pictures, which are read from the run's gallery."""
    stored = run.summary.get("examples")
    if stored is None:
        return []
    texts, right, alike, after, before = (_list(stored, key) for key in ("texts", "right", "alike", "after", "before"))
    asked = []
    for i, text in enumerate(texts[:EXAMPLES]):
        views = [(name, _picks(ranked, i)) for name, ranked in (("before", before), ("after", after))]
        own = _row(right[i]) if i < len(right) else None
        asked.append((text, own, {own, *_rows_of(alike, i)}, [view for view in views if view[1]]))
    rows = {row for _, own, _, views in asked for row in [own, *(row for _, picks in views for row in picks)]}
    pictures = _pictures(run.path / "gallery.safetensors", rows - {None}, notes)
    shown = []
    for text, own, answers, views in asked:
        found = [View(name if before else "found", _found(picks, answers, pictures)) for name, picks in views]
        if any(view.found for view in found):
            shown.append(Example(visible(text), None if own is None else pictures.get(own), found))
    return shown


def captions(run: RunFolder, notes: list[str]) -> Captions | None:
    """Agreement by style and by how captions were searched for, and pictures with theirs; None where there is none."""
    stored = run.summary.get("captions")
    beams, unit = number(dig(stored, "beams")), dig(stored, "unit")
    counted = {"word": "words", "character": "characters"}.get(unit if isinstance(unit, str) else "", "tokens")
    searches = {"greedy": "greedy", "beam": "beams" if beams is None else f"{count(beams)} beams"}
    lines = [line for line in _list(stored, "lines")[:ENTRIES] if isinstance(line, dict)]
    tables = []
    for part in dict.fromkeys(str(line.get("part")) for line in lines):
        own = [line for line in lines if str(line.get("part")) == part]
        rows = [row for line in own for row in _caption_rows(line, searches)]
        if rows:
            heads = [Head(metric(f"caption_{key}").label) for key in AGREEMENT]
            tables.append(Table(PARTS.get(part, visible(part)), "", heads, rows))
    found = [line for line in _list(stored, "examples")[:CAPTIONS] if isinstance(line, dict)]
    places = [_row(line.get("row")) for line in found]
    pictures = _pictures(run.path / "gallery.safetensors", set(places) - {None}, notes) if found else {}
    shown = [
        Caption(None if place is None else pictures.get(place), visible(line["found"]), visible(line["right"]))
        for place, line in zip(places, found, strict=True)
        if isinstance(line.get("found"), str) and isinstance(line.get("right"), str)
    ]
    about = f"Agreement is counted in {counted}. Greedy: the most probable next one, again and again."
    return Captions(about, tables, shown) if tables or shown else None


def _caption_rows(line: dict[str, Any], searches: dict[str, str]) -> list[Row]:
    """Each search of one style, as far as there are numbers."""
    size, style, rows = number(line.get("pictures")), line.get("style"), []
    about = "" if size is None else f"{count(size)} pictures"
    if line.get("shift") is True:
        about += f"{', ' if about else ''}not a style of this training"
    for key, name in searches.items():
        values = {measure: number(dig(line, key, measure)) for measure in AGREEMENT}
        if any(value is not None for value in values.values()):
            cells = [Cell(show(f"caption_{measure}", value)) for measure, value in values.items()]
            rows.append(Row(f"{visible(style, 60)}: {name}" if style else name, about, cells))
    return rows


def _found(picks: list[int | None], answers: set[int | None], pictures: dict[int, Markup]) -> list[Found]:
    found = []
    for place, row in zip(PLACES, picks, strict=False):
        if row is not None and row in pictures:
            right = row in answers
            found.append(Found(pictures[row], f"{place}: {'the right' if right else 'another'} picture", place, right))
    return found


def _pictures(path: Path, rows: set[Any], notes: list[str]) -> dict[int, Markup]:
    """data: URIs of these rows of the gallery's pictures, as far as they are there."""

    def tell(problem: str) -> None:
        if problem not in notes:
            notes.append(problem)

    if not path.is_file():
        tell(f"{path.name} is missing: no examples are shown.")
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice("pictures")
            shape = stored.get_shape()
            if len(shape) != 4 or min(shape) == 0 or stored.get_dtype() != "U8":
                raise ValueError("no pictures")
            return {row: data_uri(picture(stored[row : row + 1][0])) for row in sorted(rows) if row < shape[0]}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        tell(f"{path.name} can't be read ({type(error).__name__}): no examples are shown.")
        return {}


def spheres(summary: dict[str, Any]) -> list[tuple[Plot, str]]:
    """(plot, caption) before and after fine-tuning."""
    drawn = []
    tuned = "before" in summary or "sphere_before" in summary
    for key, measured, when in (
        ("sphere_before", "before", "Before fine-tuning"),
        ("sphere", "test", "After fine-tuning" if tuned else "After training"),
    ):
        values = [(metric(name).label, number(dig(summary, measured, name))) for name in GEOMETRY]
        told = ", ".join(f"{label} {plain(value, 3)}" for label, value in values if value is not None)
        caption = f"{when}: {told}." if told else f"{when}."
        plot = pair_plots.sphere(summary.get(key), f"Pictures and texts as points on a unit sphere. {caption}")
        if plot is not None:
            drawn.append((plot, caption))
    return drawn


def _picks(ranked: list[Any], i: int) -> list[int | None]:
    """The first rows that text i found, None where one is no row."""
    return _rows_of(ranked, i)[:FOUND]


def _rows_of(stored: list[Any], i: int) -> list[int | None]:
    """The rows of text i, None where one is no row."""
    rows = stored[i] if i < len(stored) else None
    return [_row(row) for row in rows[:ENTRIES]] if isinstance(rows, list) else []


def _row(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _list(stored: Any, key: str) -> list[Any]:
    value = dig(stored, key)
    return value if isinstance(value, list) else []
