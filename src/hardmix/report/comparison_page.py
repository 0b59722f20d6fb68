"""What the page of a comparison shows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from markupsafe import Markup

from hardmix.report import pair_plots, plots
from hardmix.report.comparison import Comparison, Method, Row, Twin, Versus
from hardmix.report.plots import Level, Line, Plot
from hardmix.report.robustness_plots import section
from hardmix.report.run_page import class_names, is_mixed, step_time, versions
from hardmix.report.samples import guesses, same_mixes, samples
from hardmix.report.text import (
    PAIR_GROUPS,
    count,
    dig,
    duration,
    method_title,
    metric,
    number,
    p_value,
    pair_group,
    plain,
    show,
    show_difference,
    show_range,
    things_of,
    title_of,
    visible,
)
from hardmix.report.verdict import comparison_verdict

#: Samples shown where every method is asked about the same mixes, and for each method where they differ.
SHARED_SAMPLES, OWN_SAMPLES = 9, 3
#: Metrics that are drawn seed by seed: the first ones, or of an image-text comparison these.
DRAWN = 4
PAIRS_DRAWN = ("recall_5", "shift_recall_5", "zeroshot", "arithmetic", "ece", "gap")
#: Metrics that fit side by side.
MOST_COLUMNS = 6
#: In place of the cost of a method that makes no training step.
NO_STEPS = "\u2013"


class Column(NamedTuple):
    """A metric as a column; `better`: which direction is."""

    label: str
    about: str
    lower: bool
    better: str


class Group(NamedTuple):
    """Neighbouring columns that make one table: metrics[start:stop]."""

    title: str
    start: int
    stop: int


class Cell(NamedTuple):
    """A cell of a table of results; the first method has no difference."""

    mean: str
    interval: str
    best: bool
    clear: bool
    difference: str = ""
    gap: str = ""
    p: str = ""
    state: str = ""


def comparison_context(comparison: Comparison) -> dict[str, Any]:
    """Everything that comparison.html.j2 asks for."""
    pairs = _of_pairs(comparison)
    if pairs:  # metrics of a table stand together
        order = list(PAIR_GROUPS)
        metrics = sorted(comparison.metrics, key=lambda key: order.index(pair_group(key)))
        first = comparison.metrics[0]
        comparison = replace(comparison, metrics=[first, *(key for key in metrics if key != first)])
    columns = [_column(comparison, key) for key in comparison.metrics]
    groups = _groups(comparison.metrics, _things(comparison), pairs)
    ranks = comparison.ranks
    methods = [
        _method(comparison, method) | {"rank": rank} for method, rank in zip(comparison.methods, ranks, strict=True)
    ]
    shared, galleries = _galleries(comparison)
    return {
        "title": comparison.title,
        "verdict": comparison_verdict(comparison),
        "facts": _facts(comparison),
        "notes": comparison.notes,
        "metrics": columns,
        "groups": groups,
        "twin_groups": groups if pairs else _narrow([Group("", 0, len(columns))]),
        "things": _things(comparison),
        "methods": methods,
        "ranked": any(rank is not None for rank in ranks),
        "twins": [_twin(comparison, twin) for twin in comparison.twins],
        "corrected": any(v.adjusted is not None for m in comparison.methods for v in m.versus.values()),
        "levels": _levels(comparison, pairs),
        "hard": _hard(comparison),
        "cost": _cost(comparison),
        "no_steps": NO_STEPS,
        "curves": _curves(comparison),
        "reliability": _reliability(comparison),
        "spheres": _spheres(comparison),
        "shared": shared,
        "galleries": galleries,
        "robustness": section(comparison.folder, [(row.name, row.seed) for row in comparison.rows]),
        "command": comparison.command,
        "details": _details(comparison),
        "reliability_caption": Markup(plots.RELIABILITY_CAPTION),
        "rows": [_row(comparison, row, m.place) for m in comparison.methods for row in m.rows],
    }


def _column(comparison: Comparison, key: str) -> Column:
    known = metric(key)
    return Column(known.label, known.about, key in comparison.lower, _better(comparison, key))


def _better(comparison: Comparison, key: str) -> str:
    if metric(key).neutral:
        return "neither direction is better"
    return "lower is better" if key in comparison.lower else "higher is better"


def _of_pairs(comparison: Comparison) -> bool:
    """Whether image-text runs are compared; their folders may be gone."""
    return "recall_5" in comparison.metrics or _things(comparison) == "pairs"


def _things(comparison: Comparison) -> str:
    """What the first run that is there was tested on: images or rows."""
    return things_of(next((row.folder.summary for row in comparison.rows if row.folder is not None), None))


def _groups(metrics: list[str], things: str, pairs: bool) -> list[Group]:
    """Clean and mixed test images apart; with many metrics on mixed ones, each policy of its own. Those of pairs by
    what they are measured on."""
    groups: list[Group] = []
    many = sum(map(is_mixed, metrics)) > 4
    for i, key in enumerate(metrics):
        policy = f" by {title_of(key.rpartition('_')[0])}" if many else ""
        title = f"Hard samples: test images mixed half and half{policy}" if is_mixed(key) else f"Test {things}"
        title = PAIR_GROUPS[pair_group(key)][0] if pairs else title
        if groups and groups[-1].title == title:
            groups[-1] = groups[-1]._replace(stop=i + 1)
        else:
            groups.append(Group(title, i, i + 1))
    return _narrow(groups)


def _narrow(groups: list[Group]) -> list[Group]:
    """Groups too wide for a page as several of about the same width; all but the first have no title."""
    parts = []
    for title, start, stop in groups:
        count = -(-(stop - start) // MOST_COLUMNS)
        ends = [start + (stop - start) * i // count for i in range(count + 1)]
        parts += [Group(title if a == start else "", a, b) for a, b in pairwise(ends)]
    return parts


def _method(comparison: Comparison, method: Method) -> dict[str, Any]:
    memory, step = method.memory_mb(), method.seconds("per_step")
    return {
        "name": method.name,
        "title": "" if method.title == method.name else method.title,
        "color": method.place % len(plots.COLORS),
        "cells": [_cell(comparison, method, key) for key in comparison.metrics],
        "per_step": NO_STEPS if step is None else step_time(step),
        "relative": _relative(comparison, method),
        "training": NO_STEPS if step is None else duration(method.seconds("train")),
        "memory": "n/a" if memory is None else f"{count(memory)}\u00a0MB",
    }


def _relative(comparison: Comparison, method: Method) -> str:
    """Time of a step in that of plain Mixup, or of the first method that trains where Mixup is not compared."""
    plain_mixup = [m for m in comparison.methods if m.title == method_title("mixup", "soft-cross-entropy")]
    stepped = [m for m in plain_mixup or comparison.methods if m.seconds("per_step")]
    base = stepped[0].seconds("per_step") if stepped else None
    own = method.seconds("per_step")
    return f"{own / base:.2f}" if own and base else NO_STEPS


def _cell(comparison: Comparison, method: Method, key: str) -> Cell:
    cell, best = method.cells[key], comparison.best[key]
    # all that share the best mean; of equal means none is clear
    is_best = best is not None and cell.mean == comparison.methods[best.place].mean(key)
    interval = show_range(key, cell.low, cell.high)
    told = Cell(show(key, cell.mean), interval, is_best, is_best and best is not None and best.clear)
    return _with_difference(comparison, told, method.versus[key], key) if method.versus else told


def _with_difference(comparison: Comparison, cell: Cell, versus: Versus, key: str) -> Cell:
    return cell._replace(
        difference=show_difference(key, versus.difference),
        gap=show_range(key, versus.low, versus.high, signed=True),
        p=p_value(versus.p if versus.adjusted is None else versus.adjusted),
        state=comparison.state(versus, key),
    )


def _twin(comparison: Comparison, twin: Twin) -> dict[str, Any]:
    colors = {method.name: method.place % len(plots.COLORS) for method in comparison.methods}
    empty = Cell("", "", False, False)
    cells = [_with_difference(comparison, empty, twin.versus[key], key) for key in comparison.metrics]
    return {"name": twin.name, "base": twin.base, "color": colors.get(twin.name, 0), "cells": cells}


def _row(comparison: Comparison, row: Row, place: int) -> dict[str, Any]:
    return {
        "name": row.name,
        "seed": row.seed,
        "color": place % len(plots.COLORS),
        "numbers": [show(key, row.test.get(key)) for key in comparison.metrics],
        "training": duration(row.seconds.get("train")),
        "place": row.place,
    }


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    summary = _first_summary(comparison)
    pairs = [
        ("methods", count(len(comparison.methods))),
        ("seeds", count(len(comparison.seeds))),
        ("data", dig(summary, "data", "name")),
        (f"training {things_of(summary)}", _counted(dig(summary, "data", "train"))),
        (f"test {things_of(summary)}", _counted(dig(summary, "data", "test"))),
        ("model", dig(summary, "model", "name")),
    ]
    return [(label, visible(value)) for label, value in pairs if value is not None]


def _details(comparison: Comparison) -> list[tuple[str, str]]:
    summary = _first_summary(comparison)
    pairs = [
        ("seeds", ", ".join(visible(seed) for seed in comparison.seeds)),
        ("data source", dig(summary, "data", "source")),
        ("data licence", dig(summary, "data", "license")),
        ("device", summary.get("device")),
    ]
    told = [(label, visible(value)) for label, value in pairs if value not in (None, "")]
    return told + versions(comparison.versions)


def _first_summary(comparison: Comparison) -> dict[str, Any]:
    """What all runs have in common is read from the first that can be read."""
    return next((row.folder.summary for row in comparison.rows if row.folder is not None), {})


def _counted(value: Any) -> str | None:
    return None if number(value) is None else count(value)


def _level(method: Method, key: str) -> Level:
    return Level(method.name, method.place, *method.cells[key])


def _told(levels: list[Level], key: str, signed: bool = False) -> str:
    """The numbers of a plot in words, for those who can't see it."""
    parts = []
    for level in levels:
        value = show_difference(key, level.mean) if signed else show(key, level.mean)
        interval = show_range(key, level.low, level.high, signed=signed)
        parts.append(f"{visible(level.name, 60)} {value}" + (f" ({interval})" if interval else ""))
    return "; ".join(parts) + "."


def _unit(key: str, points: bool = False) -> str:
    known = metric(key)
    label = visible(known.label, 40)
    return f"{label} ({'points' if points else '%'})" if known.percent else label


def _levels(comparison: Comparison, of_pairs: bool) -> list[tuple[Plot, str]]:
    """Dots and intervals of the metrics on clean images; the first metric also as differences from the first method."""
    drawn = []
    keys = [k for k in comparison.metrics if not is_mixed(k)]
    for key in [k for k in keys if k in (keys[0], *PAIRS_DRAWN)] if of_pairs else keys[:DRAWN]:
        percent = metric(key).percent
        rows = [_level(m, key) for m in comparison.methods]
        alt = f"{visible(metric(key).label)} of each method: {_told(rows, key)}"
        caption = f"{metric(key).label}, {_better(comparison, key)}."
        drawn.append((plots.levels(rows, alt, x_label=_unit(key), percent=percent), caption))
        if key != comparison.metrics[0] or len(comparison.methods) < 2:
            continue
        rows = []
        for method in comparison.methods[1:]:
            versus = method.versus[key]
            pairs = _pairs(comparison.methods[0], method, key)
            rows.append(Level(method.name, method.place, versus.difference, versus.low, versus.high, pairs))
        alt = f"Difference in {visible(metric(key).label)} from the first method: {_told(rows, key, signed=True)}"
        plot = plots.levels(
            rows, alt, x_label=f"difference in {_unit(key, points=True)}", percent=percent, zero_line=True
        )
        caption = f"{metric(key).label}: difference from the first method, seed by seed."
        drawn.append((plot, f"{caption} An interval that crosses 0 decides nothing."))
    return drawn


def _pairs(first: Method, method: Method, key: str) -> list[float]:
    """The differences of runs with the same seed."""
    base = {repr(row.seed): row.test.get(key) for row in first.rows}
    pairs = [(row.test.get(key), base.get(repr(row.seed))) for row in method.rows]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _hard(comparison: Comparison) -> list[tuple[Plot, str]]:
    drawn = []
    for key in [k for k in comparison.metrics if is_mixed(k) and k.endswith("_both")]:
        rows = [_level(m, key) for m in comparison.methods]
        alt = f"{visible(metric(key).label)}: {_told(rows, key)}"
        title = visible(title_of(key.rpartition("_")[0]))
        plot = plots.levels(rows, alt, x_label="both classes in the top two (%)", percent=True, bars=True)
        drawn.append((plot, f"{title}: two test images mixed half and half."))
    return drawn


def _cost(comparison: Comparison) -> Plot | None:
    if not comparison.metrics:
        return None
    key = comparison.metrics[0]
    timed = [(m, step) for m in comparison.methods if (step := m.seconds("per_step")) is not None]
    rows = [_level(m, key) for m, _ in timed]
    if not any(row.mean is not None for row in rows):
        return None
    steps = [step for _, step in timed]
    told = "; ".join(
        f"{visible(r.name, 60)} {show(key, r.mean)} at {step_time(s)}" for r, s in zip(rows, steps, strict=True)
    )
    alt = f"{visible(metric(key).label)} over time per training step: {told}."
    return plots.cost(rows, steps, alt, y_label=_unit(key), percent=metric(key).percent)


def _curves(comparison: Comparison) -> list[tuple[Plot, str]]:
    drawn = []
    for kind, key, label, percent, caption in (
        ("validation", "top1", "validation top-1", True, "Validation top-1."),
        ("validation", "recall_5", "validation R@5", True, "Validation R@5."),
        ("validation", "mae", "validation MAE", False, "Validation mean absolute error."),
        (
            "train",
            "accuracy",
            "mixed accuracy",
            True,
            "Share-weighted top-1 on training batches, harder the more they are mixed.",
        ),
        (
            "train",
            "loss",
            "training loss",
            False,
            "Training loss. Where objectives or policies differ, levels can't be compared.",
        ),
    ):
        lines: list[Line] = []
        ends = []
        for method in comparison.methods:
            logs = [getattr(row.folder, kind) for row in method.rows if row.folder is not None]
            line = plots.mean_band(logs, key, method.place)
            if line is not None:
                lines.append(line)
                end = show("top1", line.y[-1], 1) if percent else plain(line.y[-1], 3)
                ends.append(f"{visible(method.name, 60)} {end}")
        if lines:
            alt = f"{label} over epochs; at the end: {'; '.join(ends)}."
            drawn.append((plots.curves(lines, alt, y_label=label, percent=percent), caption))
    return drawn


def _reliability(comparison: Comparison) -> list[dict[str, Any]]:
    """One diagram a method, its bins pooled over the seeds, and over both directions of searches."""
    drawn = []
    for method in comparison.methods:
        diagrams = []
        for summary in (row.folder.summary for row in method.rows if row.folder is not None):
            searches = (dig(summary, "calibration", key, "bins") for key in ("image_to_text", "text_to_image"))
            diagrams += [dig(summary, "reliability"), *map(pair_plots.shares_of, searches)]
        ece = show("ece", method.mean("ece"), 1) if "ece" in method.cells else ""
        alt = f"Reliability diagram of {visible(method.name, 60)}" + (f", calibration error {ece}." if ece else ".")
        plot = plots.reliability(plots.pooled(diagrams), alt)
        if plot is not None:
            color = method.place % len(plots.COLORS)
            drawn.append({"plot": plot, "name": method.name, "color": color, "ece": ece})
    return drawn


def _spheres(comparison: Comparison) -> list[dict[str, Any]]:
    """The test pairs of each method's first run on the sphere."""
    drawn = []
    for method in comparison.methods:
        runs = [row.folder.summary for row in method.rows if row.folder is not None]
        gap = number(dig(runs[0], "test", "gap")) if runs else None
        alt = f"Pictures and texts on a unit sphere, of {visible(method.name, 60)}; modality gap {plain(gap, 3)}."
        plot = pair_plots.sphere(runs[0].get("sphere"), alt) if runs else None
        if plot is not None:
            color = method.place % len(plots.COLORS)
            drawn.append(
                {"plot": plot, "name": method.name, "color": color, "gap": "" if gap is None else plain(gap, 3)}
            )
    return drawn


def _galleries(comparison: Comparison) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(samples that all methods were asked about, samples of each method where these differ)."""
    known = []
    for method in comparison.methods:
        runs = [row.folder for row in method.rows if row.folder is not None and row.folder.gallery is not None]
        if runs:
            known.append((method, runs[0].gallery, class_names(runs[0].summary)))
    found = [(m, g, names) for m, g, names in known if g is not None]
    if not found:
        return [], []
    method, gallery, names = found[0]
    color = len(plots.COLORS)
    if len(found) > 1 and same_mixes([g for _, g, _ in found]):
        shared = []
        for i, sample in enumerate(samples(gallery, names, SHARED_SAMPLES)):
            views = [
                {"name": m.name, "color": m.place % color, "guesses": guesses(g, i, names)} for m, g, names in found
            ]
            shared.append({"images": sample.images, "parts": sample.parts, "views": views})
        return shared, []
    return [], [
        {"name": m.name, "color": m.place % color, "samples": samples(g, names, OWN_SAMPLES)} for m, g, names in found
    ]
