"""Names beside the points of a plot, where they cover neither marks nor other names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT_SIZE = 7.6
#: In pixels: from a point to its name, around a mark and around a line, and between the places that are tried.
GAP, AROUND_MARK, AROUND_LINE, STEP = 8.0, 6.0, 2.0, 7.0
#: Places that are tried to each side of a point, and above and below it.
SIDEWAYS, UPWARDS = 24, 14
#: Parts of the line between a point and a name further off.
DOTS = 12
#: Pixels further off that a name goes so as not to cover a thing, besides one for each pixel of it that is covered.
COVERED = 40.0


class Name(NamedTuple):
    """What the point at (x, y) is called, and the colour of it."""

    x: float
    y: float
    text: str
    color: str


class Box(NamedTuple):
    """A part of the figure, in pixels."""

    left: float
    low: float
    right: float
    high: float

    def shared(self, other: Box) -> float:
        """Pixels that lie in both."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.high, other.high) - max(self.low, other.low)
        return width * height if min(width, height) > 0.0 else 0.0

    def distance(self, x: float, y: float) -> float:
        return math.hypot(max(self.left - x, x - self.right, 0.0), max(self.low - y, y - self.high, 0.0))


def label_points(axes: Axes, names: Sequence[Name]) -> None:
    """Write each name where least is in its way; a thin line leads from one that stands further off to its point."""
    from matplotlib.font_manager import FontProperties

    figure: Any = axes.figure
    figure.draw_without_rendering()  # from here on it is known where data lie in pixels
    renderer, font = figure.canvas.get_renderer(), FontProperties(size=FONT_SIZE)
    frame = Box(*axes.bbox.extents)
    taken, written = [_around(line) for line in axes.lines], list[Box]()
    for name in sorted(names, key=lambda name: name.y):
        x, y = axes.transData.transform((name.x, name.y))
        width, height, _ = renderer.get_text_width_height_descent(name.text, font, ismath=False)
        places = list(_places(x, y, width, height, frame)) or [_beside(x, y, width, height)]
        box = min(places, key=lambda place: _cost(place, x, y, taken, written))
        written.append(box)
        taken += [box, *_line(box, x, y)]
        points = 72.0 / figure.dpi
        shown = axes.annotate(
            name.text,
            (name.x, name.y),
            xytext=((box.left - x) * points, ((box.low + box.high) / 2 - y) * points),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=FONT_SIZE,
            color=name.color,
            parse_math=False,
            arrowprops=_line_style(box, x, name.color) if _line(box, x, y) else None,
        )
        shown.set_in_layout(False)  # the axes stay where they were when the place was found


def _cost(place: Box, x: float, y: float, taken: Sequence[Box], written: Sequence[Box]) -> float:
    """How far a place is from its point, and what is covered there; its line must not cross a name."""
    covered = [shared for thing in taken if (shared := place.shared(thing))]
    crossed = sum(any(name.shared(dot) for dot in _line(place, x, y)) for name in written)
    return place.distance(x, y) + COVERED * (len(covered) + crossed) + sum(covered)


def _line(place: Box, x: float, y: float) -> list[Box]:
    """Dots along the line from a name to its point; none where it stands beside it."""
    if place.distance(x, y) <= GAP + STEP:
        return []
    start = place.left + _end(place, x) * (place.right - place.left)
    middle = (place.low + place.high) / 2
    dots = [(start + (x - start) * i / DOTS, middle + (y - middle) * i / DOTS) for i in range(1, DOTS)]
    return [Box(across - 0.5, up - 0.5, across + 0.5, up + 0.5) for across, up in dots]


def _end(place: Box, x: float) -> float:
    """From which end of a name a line leads to its point: 0 is left, 1 right."""
    return 0.0 if place.left > x else 1.0 if place.right < x else 0.5


def _around(line: Any) -> Box:
    """The place that a mark or a straight line takes."""
    points = line.get_transform().transform(line.get_xydata())
    (left, low), (right, high) = points.min(0), points.max(0)
    room = AROUND_MARK if len(points) == 1 else AROUND_LINE
    return Box(left - room, low - room, right + room, high + room)


def _beside(x: float, y: float, width: float, height: float) -> Box:
    return Box(x + GAP, y - height / 2, x + GAP + width, y + height / 2)


def _places(x: float, y: float, width: float, height: float, frame: Box) -> Iterator[Box]:
    """Places of a name around its point, within the frame."""
    right = _beside(x, y, width, height)
    sideways = [step * STEP for step in range(SIDEWAYS)]
    shifts = [*sideways, *(-2 * GAP - width - step for step in sideways), -GAP - width / 2]
    for up in range(-UPWARDS, UPWARDS + 1):
        for shift in shifts:
            low, high = right.low + up * STEP, right.high + up * STEP
            box = Box(right.left + shift, low, right.right + shift, high)
            inside = frame.left <= box.left and box.right <= frame.right and frame.low <= low and high <= frame.high
            if inside:
                yield box


def _line_style(place: Box, x: float, color: str) -> dict[str, Any]:
    end = (_end(place, x), 0.5)
    return {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1.0, "shrinkB": 5.0, "relpos": end}
