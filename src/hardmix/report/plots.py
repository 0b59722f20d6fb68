"""The plots of a report: small SVG images as data: URIs, drawn without pyplot or any other global figure.

Every plot is about as wide as a phone, so that its text stays readable where a page puts several side by side.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from hardmix.report.folder import Curve
from hardmix.report.point_labels import Name, label_points
from hardmix.report.text import number, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1d1f22", "#5f6670", "#dcd9d1"
#: The first method is grey, the others take colours that colour-blind readers can tell apart (Okabe and Ito).
COLORS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#a8558a", "#b58900", "#2f9fd0", "#7a4b21")
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vPX*"
#: Parts of the bars of a reliability diagram.
KEPT, TOO_SURE, TOO_MODEST = "#4c93c0", "#f2c6a4", "#a3d6c3"
RELIABILITY_CAPTION = (
    "Blue and green: how often predictions of that confidence are right. Orange: too sure by so much; green: not sure "
    "enough by so much. On the dashed line confidence and accuracy agree."
)
PIXELS_PER_INCH = 96
MAX_POINTS = 120

#: Text stays text, so the page stays small and the words stay sharp; no date and no random ids, so the same run gives
#: the same bytes.
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hardmix",
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#b9b5ab",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


class Plot(NamedTuple):
    """An image of a page: its data: URI, what it shows in words, and its size in CSS pixels."""

    uri: Markup
    alt: str
    width: int
    height: int


class Line(NamedTuple):
    """One curve; `low` and `high` bound a band around it. Quiet lines are thin and pale."""

    x: Sequence[float]
    y: Sequence[float]
    place: int = 1
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    quiet: bool = False
    points: bool = False


class Level(NamedTuple):
    """One row of a dot-and-interval plot."""

    name: str
    place: int
    mean: float | None
    low: float | None
    high: float | None
    values: Sequence[float] = ()


def color(place: int) -> str:
    """The colour of the method at `place`, the same in every plot and table."""
    return COLORS[place % len(COLORS)]


def curves(
    lines: Sequence[Line],
    alt: str,
    *,
    x_label: str = "epoch",
    y_label: str = "",
    percent: bool = False,
    zero: bool = False,
    width: int = 330,
) -> Plot:
    """Curves over epochs, or over something else."""
    scale = 100.0 if percent else 1.0
    figure, axes = _axes(width, 230)
    for line in lines:
        y = [v * scale for v in line.y]
        stroke, alpha = (0.9, 0.55) if line.quiet else (1.6, 1.0)
        style = STYLES[line.place // len(COLORS) % len(STYLES)]
        # A line through one point shows nothing.
        marked = line.points or len(y) == 1
        marker = {"marker": MARKERS[line.place % len(MARKERS)], "markersize": 3.2} if marked else {}
        axes.plot(line.x, y, color=color(line.place), linewidth=stroke, alpha=alpha, linestyle=style, **marker)  # type: ignore[arg-type]
        if line.low is not None and line.high is not None:
            low, high = ([v * scale for v in side] for side in (line.low, line.high))
            axes.fill_between(line.x, low, high, color=color(line.place), alpha=0.16, linewidth=0)
    if all(float(value).is_integer() for line in lines for value in line.x):  # whole epochs have nothing between them
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label + (" (%)" if percent else ""))
    if zero:
        axes.set_ylim(bottom=0)
    return _finish(figure, alt)


def levels(
    rows: Sequence[Level],
    alt: str,
    *,
    x_label: str,
    percent: bool,
    zero_line: bool = False,
    bars: bool = False,
    marks: Sequence[float | None] = (),
) -> Plot:
    """One line a method: dots for the seeds, a diamond for the mean, a line for its interval.

    With `bars`, the mean is a bar from 0. `marks` are short black lines across, one a row or none. Names stand above
    their line, so that long ones fit on a phone.
    """
    scale = 100.0 if percent else 1.0
    figure, axes = _axes(380, 46 + 42 * max(1, len(rows)))
    for i, row in enumerate(rows):
        shade = color(row.place)
        if zero_line:
            # Not one long line, which would cross the names.
            axes.plot([0.0, 0.0], [i - 0.08, i + 0.36], color=INK, linewidth=0.9)
        axes.text(
            0.0,
            i - 0.28,
            _fit(row.name, 48),
            transform=axes.get_yaxis_transform(),
            va="center",
            ha="left",
            fontsize=7.6,
            parse_math=False,
        )
        if bars and row.mean is not None:
            axes.barh(i + 0.14, row.mean * scale, height=0.34, color=_pale(shade), linewidth=0)
        if row.low is not None and row.high is not None:
            axes.plot([row.low * scale, row.high * scale], [i + 0.14] * 2, color=shade, linewidth=2.0)
        mark = marks[i] if marks else None
        if mark is not None:
            axes.plot([mark * scale] * 2, [i - 0.08, i + 0.36], color=INK, linewidth=1.6)
        dots = [v * scale for v in row.values]
        axes.plot(
            dots, [i + 0.14] * len(dots), "o", color="white", markersize=4.6, markeredgecolor=shade, markeredgewidth=0.9
        )
        if row.mean is not None and not bars:
            axes.plot(row.mean * scale, i + 0.14, "D", color=shade, markersize=5.4, markeredgecolor="white")
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(x_label, parse_math=False)
    if bars:
        axes.set_xlim(left=0.0)
    axes.margins(x=0.06)
    return _finish(figure, alt)


def reliability(diagram: dict[str, Any], alt: str) -> Plot | None:
    """Accuracy over confidence, with the number of samples of each bin below; None where the diagram holds nothing.

    `RELIABILITY_CAPTION` says how to read it.
    """
    bins = _bins(diagram)
    if not bins:
        return None
    figure, (axes, below) = _axes(240, 270, ratios=(5, 1))
    edges, width = [b[0] for b in bins], 100.0 / bins[0][4]
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for edge, confidence, accuracy, _, _ in bins:
        # What is both promised and kept; on top of it what is only promised, or only kept.
        shared, gap = 100 * min(confidence, accuracy), 100 * abs(confidence - accuracy)
        shade = TOO_SURE if confidence > accuracy else TOO_MODEST
        axes.bar(edge, shared, width=width, align="edge", color=KEPT, linewidth=0)
        axes.bar(edge, gap, bottom=shared, width=width, align="edge", color=shade, linewidth=0)
    axes.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    axes.tick_params(labelbottom=False)
    below.bar(edges, [b[3] for b in bins], width=width, align="edge", color=MUTED, alpha=0.6, linewidth=0)
    below.set(xlim=(0, 100), xlabel="confidence (%)", yticks=[])
    below.set_ylabel("count", labelpad=14)
    below.grid(visible=False)
    return _finish(figure, alt)


def cost(rows: Sequence[Level], seconds: Sequence[float], alt: str, *, y_label: str, percent: bool) -> Plot:
    """A metric over the time of a training step: up and to the left is better, or down where lower is better."""
    scale = 100.0 if percent else 1.0
    figure, axes = _axes(380, 250)
    names = []
    for row, step in zip(rows, seconds, strict=True):
        if row.mean is None:
            continue
        x, y = 1000.0 * step, row.mean * scale
        if row.low is not None and row.high is not None:
            axes.plot([x, x], [row.low * scale, row.high * scale], color=color(row.place), linewidth=1.6, alpha=0.6)
        axes.plot(
            x, y, MARKERS[row.place % len(MARKERS)], color=color(row.place), markersize=7.5, markeredgecolor="white"
        )
        names.append(Name(x, y, _fit(row.name, 26), color(row.place)))
    axes.margins(0.12)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("milliseconds per training step")
    axes.set_ylabel(y_label, parse_math=False)
    with _drawing():
        label_points(axes, names)
    return _finish(figure, alt)


def thin(curve: Curve, key: str, most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Points of a log with a number for `key`, averaged over neighbours where there are more than `most`."""
    pairs = [(x, y) for x, y in zip(curve.get("epoch", []), curve.get(key, []), strict=False) if not math.isnan(y)]
    size = -(-len(pairs) // most) or 1
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [_mean([p[0] for p in g]) for g in groups], [_mean([p[1] for p in g]) for g in groups]


def mean_band(logs: Sequence[Curve], key: str, place: int, *, points: bool = False) -> Line | None:
    """The mean of several runs, and the band from the lowest to the highest; None where no run has `key`.

    Runs are read at the points of the first; at an epoch that a run has not reached the others go on without it.
    """
    import numpy as np

    drawn = [pair for pair in (thin(log, key) for log in logs) if pair[0]]
    if not drawn:
        return None
    x = max((pair[0] for pair in drawn), key=len)
    values = np.stack([np.interp(x, a, b, left=np.nan, right=np.nan) for a, b in drawn])
    kept = ~np.isnan(values).all(0)
    values, x = values[:, kept], np.asarray(x)[kept].tolist()
    low, high = np.nanmin(values, 0).tolist(), np.nanmax(values, 0).tolist()
    return Line(x, np.nanmean(values, 0).tolist(), place, low, high, points=points)


def pooled(diagrams: Sequence[Any]) -> dict[str, Any]:
    """The reliability diagrams of several runs as one: bin means weighted by their counts."""
    sums: dict[int, list[float]] = {}
    most = 0
    for diagram in diagrams:
        for edge, confidence, accuracy, size, bins in _bins(diagram if isinstance(diagram, dict) else {}):
            row = sums.setdefault(round(edge * bins / 100.0), [0.0, 0.0, 0.0])
            for k, value in enumerate((confidence * size, accuracy * size, size)):
                row[k] += value
            most = max(most, bins)
    rows = [sums.get(i, [0.0, 0.0, 0.0]) for i in range(most)]
    return {
        "confidence": [c / n if n else None for c, _, n in rows],
        "accuracy": [a / n if n else None for _, a, n in rows],
        "count": [n for _, _, n in rows],
    }


def _bins(diagram: dict[str, Any]) -> list[tuple[float, float, float, float, int]]:
    """(left edge in %, confidence, accuracy, count, number of bins) of the bins that hold samples."""
    columns = [diagram.get(key) for key in ("confidence", "accuracy", "count")]
    if not all(isinstance(column, list) for column in columns):
        return []
    rows = list(zip(*columns, strict=False))  # type: ignore[arg-type]
    found = []
    for i, row in enumerate(rows):
        confidence, accuracy, size = map(number, row)
        if confidence is not None and accuracy is not None and size:
            found.append((100.0 * i / len(rows), confidence, accuracy, size, len(rows)))
    return found


def _pale(shade: str) -> str:
    """A colour mixed with as much white: unlike a transparent one it hides the grid."""
    parts = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _fit(name: str, most: int) -> str:
    """A name for a plot: one line, cut to `most` characters."""
    name = visible(name, 10 * most)
    return name if len(name) <= most else name[: most - 3] + "..."


def _axes(width: int, height: int, ratios: tuple[int, ...] = ()) -> tuple[Figure, Any]:
    """A figure of a size in CSS pixels with one pair of axes, or one below the other in these proportions."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), layout="constrained")
        FigureCanvasAgg(figure)
        if ratios:
            return figure, figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        return figure, figure.subplots()


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # Letters that DejaVu lacks are measured as boxes; the reader's own fonts draw them.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def _finish(figure: Figure, alt: str) -> Plot:
    stream = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with _drawing():
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, Arial, 'DejaVu Sans'")
    svg = re.sub(r"\n *", "\n", svg)
    encoded = base64.b64encode(svg.encode("utf-8")).decode("ascii")
    width, height = (round(inches * PIXELS_PER_INCH) for inches in figure.get_size_inches())
    # Base64 has nothing that HTML could read as markup.
    return Plot(Markup(f"data:image/svg+xml;base64,{encoded}"), alt, width, height)
