"""The plots of a regression run: predictions against labels, errors along the label, and the features.

What a summary holds is drawn as far as it makes sense, and left out where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from hardmix.report.plots import COLORS, INK, MUTED, RC, Plot, _axes, _finish, _fit, _pale
from hardmix.report.text import count, dig, number, plain

#: Samples and bins that are looked at, and the sizes of a number that can be drawn; summaries of ours are within.
SAMPLES, BINS, SMALLEST, LARGEST = 500, 60, 1e-30, 1e30
#: An error over fewer test samples than this is shown pale.
FEW = 5
#: Viridis up to here: its yellow end would vanish on the white of a card.
DARK = 0.92
SHADES = 32
WIDTH, HEIGHT = 330, 290


def predictions(summary: dict[str, Any]) -> list[tuple[Plot, str]]:
    """(plot, caption) of all that a summary has on its test samples."""
    target = _fit(dig(summary, "scatter", "target") or dig(summary, "data", "target") or "label", 40)
    drawn = (
        (
            truth(dig(summary, "scatter"), target),
            "Prediction against truth on test samples; on the line they agree.",
        ),
        (
            errors(dig(summary, "errors"), target),
            f"Blue: mean absolute error by true value, pale for under {FEW} test samples. Dots: mean signed error, "
            "above 0 if too high. Grey: training samples.",
        ),
        (
            embedding(dig(summary, "embedding"), target),
            "Features of test samples, seen along the two directions in which they vary most (PCA), both to the same "
            "scale. Colour: true value.",
        ),
    )
    return [(plot, caption) for plot, caption in drawn if plot is not None]


def truth(scatter: Any, target: str) -> Plot | None:
    """Predictions against labels with the line on which they agree; None where there are none."""
    pairs = _samples(scatter, "label", "prediction")
    if not pairs:
        return None
    labels, predicted = zip(*pairs, strict=True)
    low, high = min(*labels, *predicted), max(*labels, *predicted)
    figure, axes = _axes(WIDTH, HEIGHT)
    axes.plot([low, high], [low, high], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
    axes.scatter(labels, predicted, s=9, color=COLORS[1], alpha=0.6, linewidths=0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(target)
    axes.set_ylabel("prediction")
    return _finish(figure, f"{_tests(labels)}.")


def errors(stored: Any, target: str) -> Plot | None:
    """Mean absolute and signed errors of `error_by_label`, with the number of training samples of each bin below.

    None without edges that ascend or without any error.
    """
    bins = _bins(stored)
    known = [row for row in bins if row.mae is not None]
    if not known:
        return None
    figure, (axes, below) = _axes(WIDTH, HEIGHT, ratios=(4, 1))
    for row in known:
        shade = _pale(COLORS[1]) if row.test is not None and row.test < FEW else COLORS[1]
        axes.bar(row.low, row.mae, row.high - row.low, align="edge", color=shade, edgecolor="white", linewidth=0.6)
        if row.bias is not None:
            middle = (row.low + row.high) / 2
            axes.plot(middle, row.bias, "o", color=INK, markersize=4.4, markeredgecolor="white", markeredgewidth=0.7)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.set_ylabel("error")
    axes.tick_params(labelbottom=False)
    trained = [(row, row.train) for row in bins if row.train is not None]
    for row, size in trained:
        below.bar(row.low, size, row.high - row.low, align="edge", color=MUTED, alpha=0.6, linewidth=0)
    most = [max(size for _, size in trained)] if trained else []
    below.set_yticks(most, [count(size) for size in most])
    below.set_xlim(bins[0].low, bins[-1].high)
    below.locator_params(axis="x", nbins=5)
    below.set_xlabel(target)
    below.set_ylabel("training")
    below.grid(visible=False)
    best, worst = min(known, key=_mae), max(known, key=_mae)
    return _finish(
        figure,
        f"Mean absolute error by true value in {len(bins)} ranges from {plain(bins[0].low, 3)} to "
        f"{plain(bins[-1].high, 3)}: lowest {_told(best)}, highest {_told(worst)}.",
    )


def embedding(stored: Any, target: str) -> Plot | None:
    """Features in two directions, coloured by the label; None where there are none."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    points = _samples(stored, "x", "y", "label")
    if not points:
        return None
    x, y, labels = zip(*points, strict=True)
    # The axes show no numbers, so both may start at 0: limits far from 0 and close together would be the same.
    x, y = (tuple(value - min(side) for value in side) for side in (x, y))
    shades = ListedColormap([matplotlib.colormaps["viridis"](DARK * i / (SHADES - 1)) for i in range(SHADES)])
    shares = [_share(value) for value in (*_items(stored, "explained", 2), None, None)[:2]]
    figure, axes = _axes(WIDTH, HEIGHT)
    drawn = axes.scatter(x, y, c=labels, cmap=shades, s=11, alpha=0.85, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(labelbottom=False, labelleft=False)
    axes.grid(visible=False)
    axes.set_xlabel("1st component" + (shares[0] and f" ({shares[0]} of the variance)"))
    axes.set_ylabel("2nd component" + (shares[1] and f" ({shares[1]} of the variance)"))
    with matplotlib.rc_context(RC):
        bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.03)
        bar.set_label(target)
        assert bar.solids is not None
        bar.solids.set(alpha=1.0, edgecolor="face")  # no hairlines between the shades
        bar.outline.set_visible(False)
    known = " and ".join(share for share in shares if share)
    held = f", which hold {known} of the variance" if known else ""
    return _finish(figure, f"Features of {_tests(labels)}, in their two main directions{held}.")


class Bin(NamedTuple):
    """A range of labels with its errors and counts, each None where it is not known."""

    low: float
    high: float
    mae: float | None
    bias: float | None
    test: float | None
    train: float | None


def _bins(stored: Any) -> list[Bin]:
    edges = [_drawable(value) for value in _items(stored, "edges", BINS + 2)]
    known = [value for value in edges if value is not None]
    if len(known) < len(edges) or len(edges) > BINS + 1 or any(a >= b for a, b in pairwise(known)):
        return []
    columns = []
    for key in ("mae", "bias", "test", "train"):
        values = [_drawable(value) for value in _items(stored, key, BINS)]
        values = [value if key == "bias" or value is None or value >= 0 else None for value in values]
        columns.append(values + [None] * (BINS - len(values)))
    return [Bin(low, high, *values) for (low, high), *values in zip(pairwise(known), *columns, strict=False)]


def _mae(row: Bin) -> float:
    return row.mae or 0.0


def _told(row: Bin) -> str:
    trained = "" if row.train is None else f" ({count(row.train)} training samples)"
    return f"{plain(row.mae, 3)} between {plain(row.low, 3)} and {plain(row.high, 3)}{trained}"


def _samples(stored: Any, *keys: str) -> list[tuple[float, ...]]:
    """The first samples, without those that lack one of the numbers."""
    rows = zip(*(_items(stored, key, SAMPLES) for key in keys), strict=False)
    found = (tuple(value for value in map(_drawable, row) if value is not None) for row in rows)
    return [row for row in found if len(row) == len(keys)]


def _tests(labels: Sequence[float]) -> str:
    size = f"{len(labels)} test sample{'' if len(labels) == 1 else 's'}"
    return f"{size} with true values from {plain(min(labels), 3)} to {plain(max(labels), 3)}"


def _share(value: Any) -> str:
    share = number(value)
    return "" if share is None or not 0.0 <= share <= 1.0 else f"{100 * share:.0f}\u00a0%"


def _drawable(value: Any) -> float | None:
    """A number that axes can hold; beyond, their limits would overflow or all be the same."""
    known = number(value)
    return known if known is None or known == 0.0 or SMALLEST < abs(known) < LARGEST else None


def _items(stored: Any, key: str, most: int) -> list[Any]:
    value = dig(stored, key)
    return value[:most] if isinstance(value, list) else []
