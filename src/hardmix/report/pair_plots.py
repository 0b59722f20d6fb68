"""The plots of an image-text run: calibration, few labels, embedding arithmetic, and the sphere.

What a summary holds is drawn as far as it makes sense, and left out where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hardmix.report import plots
from hardmix.report.number_plots import _items
from hardmix.report.plots import COLORS, MUTED, STYLES, Level, Plot, _axes, _finish, _fit
from hardmix.report.text import count, dig, number, plain, show, visible

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

#: Bins of a diagram, kinds of arithmetic and pairs on the sphere that are looked at; summaries of ours are within.
BINS, KINDS, PAIRS = 60, 24, 150
WIDTH, HEIGHT, SPHERE = 380, 250, 330
#: Degrees of a great circle between two points of its drawing.
STEP = 6.0
#: Centres of both modalities that are nearer to the middle of the sphere say nothing of where to look from.
MIDDLE = 0.2
DIRECTIONS = {"image_to_text": "Picture to text", "text_to_image": "Text to picture", "zeroshot": "Zero-shot classes"}
DASHED = STYLES[1]


def calibration(stored: Any) -> list[tuple[Plot, str]]:
    """(diagram, caption) of each direction and of zero-shot, with the error before and after temperature scaling."""
    drawn = []
    for key, title in DIRECTIONS.items():
        error, scaled = (_share(dig(stored, key, *path)) for path in (("ece",), ("scaled", "ece")))
        temperature = number(dig(stored, key, "scaled", "temperature"))
        plot = plots.reliability(
            shares_of(dig(stored, key, "bins")),
            f"Reliability diagram, {title}; calibration error {show('ece', error)}.",
        )
        if plot is not None:
            caption = f"{title}: ECE {show('ece', error)}"
            if scaled is not None and temperature is not None:
                caption += f", and {show('ece', scaled)} with logits divided by {plain(temperature, 3)}"
            drawn.append((plot, f"{caption}."))
    return drawn


def shares_of(diagram: Any) -> dict[str, list[Any]]:
    """A reliability diagram without what is no share, or no count."""
    kept: dict[str, list[Any]] = {
        key: list(map(_share, _items(diagram, key, BINS))) for key in ("confidence", "accuracy")
    }
    sizes = map(number, _items(diagram, "count", BINS))
    return kept | {"count": [size if size is not None and 0 <= size < 1e12 else None for size in sizes]}


def few_labels(test: Any, before: Any) -> tuple[Plot, str] | None:
    """Accuracy over the number of labelled pictures of each class, and a caption; None where there is none."""
    lines = []
    for start, name, place in (("", "trained styles", 1), ("shift_", "other styles", 2)):
        for measured, when, style in ((test, "", "-"), (before, " before fine-tuning", DASHED)):
            points = _shots(measured, f"{start}fewshot_")
            if points:
                lines.append((f"{name}{when}", place, style, points))
    if not lines:
        return None
    figure, axes = _axes(WIDTH, HEIGHT)
    shots = sorted({k for *_, points in lines for k, _ in points})
    for _, place, style, points in lines:
        fill = plots.color(place) if style == "-" else "white"
        axes.plot(
            [shots.index(k) for k, _ in points],
            [100 * value for _, value in points],
            marker="o",
            markersize=4.6,
            color=plots.color(place),
            markerfacecolor=fill,
            linestyle=style,
            zorder=3 if style == "-" else 2,
        )
    axes.set_xticks(range(len(shots)), [f"{k:,}" for k in shots])
    axes.set_xlim(-0.3, len(shots) - 0.7)
    axes.set_xlabel("labelled pictures of each class")
    axes.set_ylabel("top-1 (%)")
    told = "; ".join(
        f"{name} " + ", ".join(f"{show('zeroshot', value, 1)} with {k:,}" for k, value in points)
        for name, _, _, points in lines
    )
    colors = {1: "Blue: trained styles.", 2: "Orange: other styles."}
    caption = [text for place, text in colors.items() if any(line[1] == place for line in lines)]
    caption += ["Dashed: before fine-tuning."] if any(line[2] == DASHED for line in lines) else []
    return _finish(figure, f"Top-1 by the number of labelled pictures of each class: {told}."), " ".join(caption)


def arithmetic(stored: Any) -> tuple[Plot, str] | None:
    """How often a picture moved by the difference of two texts finds the right picture, by kind; None where unknown."""
    kinds = dig(stored, "kinds")
    rows, alone, told = [], [], []
    for name, kind in list(kinds.items())[:KINDS] if isinstance(kinds, dict) else []:
        first, five, without = (_share(dig(kind, f"recall_{key}")) for key in ("1", "5", "1_without_text"))
        queries = number(dig(kind, "queries"))
        if first is not None:
            size = "" if queries is None else f" ({count(queries)} queries)"
            title = f"{_fit(name, 24)}: {show('arithmetic', first, 1)}{size}"
            rows.append(Level(title, 1, first, None, None, [] if five is None else [five]))
            alone.append(without)
            told.append(title + "".join(f", {show('arithmetic', v, 1)} among the first five" for v in rows[-1].values))
            told[-1] += "" if without is None else f", {show('arithmetic', without, 1)} without text"
    if not rows:
        return None
    alt = f"Recall of embedding arithmetic by kind: {'; '.join(told)}."
    plot = plots.levels(rows, alt, x_label="recall (%)", percent=True, bars=True, marks=alone)
    scale = number(dig(stored, "scale"))
    times = "" if scale is None or scale == 1.0 else f"{plain(scale, 3)} times "
    caption = f"Bars: moved by {times}the difference of two texts, a picture is nearest to the right one."
    caption += " Dots: it is one of the nearest five." if any(row.values for row in rows) else ""
    return plot, caption + (" Black: without moving." if any(value is not None for value in alone) else "")


def sphere(stored: Any, alt: str) -> Plot | None:
    """Pictures and texts on a unit sphere, seen from far away, with the great circle between the two of a pair.

    The sphere is turned so that the centre of all points faces the reader and the way from pictures to texts goes to
    the right; what is behind the horizon is pale. None where there are no pairs.
    """
    pairs = _pairs(stored)
    if not len(pairs):
        return None
    turned = pairs @ _view(pairs).T  # (N, 2, 3): right, up, towards the reader
    figure, axes = _axes(SPHERE, SPHERE)
    _globe(axes)
    front, behind = _arcs(turned)
    for lines, alpha in ((behind, 0.14), (front, 0.42)):
        _lines(axes, lines, MUTED, 0.5, alpha)
    for seen, size, alpha, edge in ((False, 7, 0.28, 0.0), (True, 15, 0.9, 0.4)):
        for side, shade in ((0, COLORS[1]), (1, COLORS[2])):
            points = turned[(turned[:, side, 2] >= 0) == seen][:, side]
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=size,
                color=shade,
                marker="os"[side],
                alpha=alpha,
                linewidths=edge,
                edgecolors="white",
                zorder=3 if seen else 2,
            )
    axes.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal")
    axes.set_axis_off()
    return _finish(figure, visible(alt, 600))


def _globe(axes: Axes) -> None:
    """The outline, and the half of the parallels and meridians that is seen from a little above."""
    import numpy as np

    tilt, turn = np.radians(25.0), np.radians(np.linspace(-180, 180, 91))
    across, up = np.cos(turn), np.sin(turn)
    circles = [
        np.stack([across * np.cos(latitude), np.full_like(turn, np.sin(latitude)), up * np.cos(latitude)])
        for latitude in np.radians(range(-60, 90, 30))
    ]
    circles += [
        np.stack([across * np.cos(longitude), up, across * np.sin(longitude)])
        for longitude in np.radians(range(0, 180, 30))
    ]
    lean = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    axes.fill(across, up, color="#faf9f5", linewidth=0, zorder=0)
    _lines(axes, [piece for circle in circles for piece in _halves((lean @ circle).T)[0]], "#e9e6df", 0.6, 1.0)
    _lines(axes, [np.stack([across, up], 1)], "#b9b5ab", 0.9, 1.0)


def _lines(axes: Axes, lines: Sequence[np.ndarray], shade: str, width: float, alpha: float) -> None:
    """All as one path, broken between them: an element each would be most of a page."""
    import numpy as np

    if lines:
        x, y = np.concatenate([np.concatenate([line, [[np.nan, np.nan]]]) for line in lines]).T
        axes.plot(x, y, color=shade, linewidth=width, alpha=alpha, zorder=1)


def _arcs(turned: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The great circles between pairs (N, 2, 3), flat: their parts before the horizon, and those behind it."""
    import numpy as np

    front: list[np.ndarray] = []
    behind: list[np.ndarray] = []
    for image, text in turned:
        if np.linalg.norm(image + text) < 1e-3:  # opposite: every great circle joins them
            continue
        angle = max(np.arccos(np.clip(image @ text, -1.0, 1.0)), 1e-6)
        share = np.linspace(0.0, angle, 2 + int(np.degrees(angle) / STEP))[:, None]
        line = np.sin(angle - share) * image + np.sin(share) * text
        for kept, found in zip((front, behind), _halves(line / np.sin(angle)), strict=True):
            kept += found
    return front, behind


def _halves(line: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A line on the sphere (M, 3) cut at the horizon: flat pieces before it, and behind it."""
    import numpy as np

    seen = line[:, 2] >= 0
    cuts = [0, *(np.flatnonzero(seen[1:] != seen[:-1]) + 1).tolist(), len(line)]
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for start, stop in pairwise(cuts):
        piece = line[max(0, start - 1) : stop, :2]  # from the last point on the other side, so that no gap is left
        if len(piece) > 1:
            halves[0 if seen[start] else 1].append(piece)
    return halves


def _view(pairs: np.ndarray) -> np.ndarray:
    """(3, 3) rotation: rows are right, up, and towards the reader."""
    import numpy as np

    images, texts = pairs.mean(0)
    front, right = images + texts, texts - images
    if np.linalg.norm(front) < MIDDLE:  # opposite centres, or none: look from the side
        front = np.cross(right, np.eye(3)[np.abs(right).argmin()])
    axes: list[np.ndarray] = []
    for direction in (front, right, *np.eye(3)):
        rest = direction - sum(((direction @ axis) * axis for axis in axes), np.zeros(3))
        if np.linalg.norm(rest) > 1e-2:
            axes.append(rest / np.linalg.norm(rest))
    front, right = axes[:2]
    return np.stack([right, np.cross(front, right), front])


def _pairs(stored: Any) -> np.ndarray:
    """(N, 2, 3) unit vectors: the first pairs of which both points are there."""
    import numpy as np

    found = []
    for pair in zip(_items(stored, "image", PAIRS), _items(stored, "text", PAIRS), strict=False):
        points = [[number(value) for value in point] for point in pair if isinstance(point, list) and len(point) == 3]
        if len(points) == 2 and not any(value is None or abs(value) > 1e6 for point in points for value in point):
            found.append(points)
    pairs = np.array(found, dtype=float).reshape(-1, 2, 3)
    length = np.linalg.norm(pairs, axis=2)
    kept = (length > 1e-6).all(1)
    return pairs[kept] / length[kept][:, :, None]


def _shots(measured: Any, start: str) -> list[tuple[int, float]]:
    """(k, accuracy) for each entry such as fewshot_4, by k."""
    found = []
    for key, value in measured.items() if isinstance(measured, dict) else ():
        k = re.fullmatch(rf"{start}([1-9][0-9]{{0,5}})", str(key)[:40])
        share = _share(value)
        if k is not None and share is not None:
            found.append((int(k[1]), share))
    return sorted(found)


def _share(value: Any) -> float | None:
    known = number(value)
    return known if known is not None and 0.0 <= known <= 1.0 else None
