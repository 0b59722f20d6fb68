"""Numbers as words, and what goes into a plot."""

from __future__ import annotations

import base64
import math
import re
from typing import Any

import pytest

from hardmix.report import plots
from hardmix.report.plots import Level, Line
from hardmix.report.text import (
    count,
    dig,
    duration,
    method_title,
    metric,
    number,
    p_value,
    show,
    show_difference,
    show_range,
)


@pytest.mark.parametrize(
    ("shown", "want"),
    [
        (show("top1", 0.89312), "89.31 %"),
        (show("top1", 0.89312, 1), "89.3 %"),
        (show("nll", 0.412345), "0.4123"),
        (show("nll", -0.412345), "-0.4123"),
        (show("nll", 0.87), "0.8700"),
        (show("nll", 1234.0), "1234"),
        (show("anything", 1234567.0), "1.235e+06"),
        (show("mae", 113829.36), "113829"),
        (show_difference("mae", -113774.62), "-113775"),
        (show_difference("mae", 12.3456), "+12.3"),
        (show("top1", None), "n/a"),
        (show_difference("top1", 0.0123), "+1.23 points"),
        (show_difference("top1", -0.0123), "-1.23 points"),
        (show_difference("nll", -0.0123), "-0.0123"),
        (show_range("top1", 0.88, 0.9), "88.00 to 90.00"),
        (show_range("top1", -0.001, 0.002, signed=True), "-0.10 to +0.20"),
        (show_range("nll", 0.00451, 0.018, signed=True), "+0.0045 to +0.0180"),
        (show_range("nll", 0.39691, 0.42134), "0.3969 to 0.4213"),
        (show_range("nll", 0.0, 0.0), "0 to 0"),
        (show_range("nll", None, 1.0), ""),
        (p_value(None), ""),
        (p_value(0.00012), "p < 0.001"),
        (p_value(0.0123), "p = 0.012"),
        (p_value(0.456), "p = 0.46"),
        (duration(None), "n/a"),
        (duration(0.51), "0.51 s"),
        (duration(48.2), "48 s"),
        (duration(125), "2 min 5 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(3780), "1 h 3 min"),
        (count(3000), "3,000"),
        (count("x"), "n/a"),
    ],
)
def test_numbers_as_words(shown: str, want: str) -> None:
    assert shown.replace("\u00a0", " ").replace("\u2212", "-") == want


def test_no_minus_before_a_zero() -> None:
    assert show_difference("top1", -0.000001) == "+0.00\u00a0points" or "\u2212" not in show_difference("top1", -1e-6)
    assert show("nll", -0.0) == "0.000"


def test_only_finite_numbers_count() -> None:
    assert number(1) == 1.0
    for value in (None, True, "1", [1], math.nan, math.inf, 10**400):
        assert number(value) is None
    assert dig({"a": {"b": 3}}, "a", "b") == 3
    assert dig({"a": 1}, "a", "b") is None
    assert dig(None, "a") is None


def test_metrics_and_methods_have_names() -> None:
    assert metric("cutmix_both").label == "CutMix: both classes"
    assert metric("resizemix_either").percent
    assert metric("nll").lower_is_better
    assert metric("_both").label == "_both"
    assert metric("something").label == "something"
    assert method_title("mixup", "decoupled-mixup") == "Mixup with Decoupled Mixup"
    assert method_title("none", "soft-cross-entropy") == "No mixing with cross-entropy"
    assert method_title("none", "supremix + l1") == "SupReMix and L1"
    assert method_title("c-mixup", "supremix + l1") == "C-Mixup with SupReMix and L1"
    assert method_title(None, None) == "No mixing"
    assert method_title("mine", 3) == "Mine with 3"
    assert method_title("none", "m2-mix + wise-ft") == "m\u00b2-Mix + WiSE-FT"
    assert method_title("none", "none + embedding-shift") == "No training + shifted embeddings"


def test_thin_averages_neighbours_and_drops_gaps() -> None:
    curve = {"epoch": [1.0, 2.0, 3.0, 4.0, 5.0], "loss": [1.0, math.nan, 3.0, 5.0, 7.0]}
    assert plots.thin(curve, "loss") == ([1.0, 3.0, 4.0, 5.0], [1.0, 3.0, 5.0, 7.0])
    assert plots.thin(curve, "loss", most=2) == ([2.0, 4.5], [2.0, 6.0])
    assert plots.thin(curve, "missing") == ([], [])
    x, y = plots.thin({"epoch": [float(i) for i in range(10_001)], "loss": [2.0] * 10_001}, "loss")
    assert len(x) <= plots.MAX_POINTS
    assert set(y) == {2.0}


def test_mean_band_goes_on_where_a_run_stops() -> None:
    logs = [{"epoch": [1.0, 2.0, 3.0], "top1": [0.2, 0.4, 0.6]}, {"epoch": [1.0, 2.0], "top1": [0.4, 0.6]}]
    line = plots.mean_band(logs, "top1", 2)
    assert line is not None
    assert line.x == [1.0, 2.0, 3.0]
    assert line.y == pytest.approx([0.3, 0.5, 0.6])
    assert line.low == pytest.approx([0.2, 0.4, 0.6])
    assert line.high == pytest.approx([0.4, 0.6, 0.6])
    assert plots.mean_band(logs, "nothing", 0) is None


def test_pooled_diagrams_weigh_by_count() -> None:
    first = {"confidence": [None, 0.8], "accuracy": [None, 0.5], "count": [0, 10]}
    second = {"confidence": [0.4, 0.6], "accuracy": [1.0, 0.9], "count": [5, 30]}
    found = plots.pooled([first, second, None, {}])
    assert found["count"] == [5, 40]
    assert found["confidence"] == pytest.approx([0.4, 0.65])
    assert found["accuracy"] == pytest.approx([1.0, 0.8])
    assert plots.reliability(plots.pooled([]), "nothing") is None


def svg(plot: plots.Plot) -> str:
    assert plot.uri.startswith("data:image/svg+xml;base64,")
    return base64.b64decode(plot.uri.split(",", 1)[1]).decode("utf-8")


def test_plots_draw_their_parts() -> None:
    rows = [Level("first", 0, 0.8, 0.7, 0.9, [0.7, 0.9]), Level("broken", 1, None, None, None, [])]
    drawn = svg(plots.levels(rows, "alt", x_label="top-1 (%)", percent=True))
    assert ">first<" in drawn
    assert ">broken<" in drawn
    assert plots.color(0) in drawn
    assert svg(plots.levels([], "alt", x_label="x", percent=False)).startswith("<svg")
    drawn = svg(
        plots.curves([Line([0.0, 1.0], [0.5, 0.7], 9, [0.4, 0.6], [0.6, 0.8], points=True)], "alt", percent=True)
    )
    assert plots.color(9) in drawn
    assert svg(plots.cost(rows, [0.1, 0.2], "alt", y_label="y", percent=True)).count(">first<") == 1
    diagram: dict[str, Any] = {"confidence": [0.4, 0.8], "accuracy": [0.5, 0.5], "count": [3, 9]}
    plot = plots.reliability(diagram, "alt")
    assert plot is not None
    assert "confidence (%)" in svg(plot)


def test_a_curve_of_one_point_is_marked() -> None:
    def marks(line: Line) -> int:
        return svg(plots.curves([line], "alt")).count(f'style="fill: {plots.color(line.place)}; stroke')

    assert (marks(Line([1.0], [0.5])), marks(Line([1.0, 2.0], [0.5, 0.6]))) == (1, 0)


@pytest.mark.parametrize(("epochs", "ticks"), [([2.0], ["2"]), ([1.0, 2.0], ["1", "2"]), ([0.5, 1.0], None)])
def test_whole_epochs_have_whole_ticks(epochs: list[float], ticks: list[str] | None) -> None:
    drawn = svg(plots.curves([Line(epochs, [0.5] * len(epochs))], "alt"))
    found = re.findall(r">([0-9.]+)</text>", drawn[: drawn.index(">epoch</text>")])
    assert found == ticks if ticks else "0.6" in found


def test_names_of_points_cover_neither_marks_nor_each_other() -> None:
    import matplotlib
    from matplotlib.text import Text

    from hardmix.report.point_labels import Name, _around, label_points

    # Close to one another, with intervals, as methods of about the same cost are.
    steps, means, ends = (21.4, 26.1, 29.4, 33.4, 30.9), (84.5, 85.5, 85.8, 85.8, 85.6), (1.8, 1.1, 0.5, 0.8, 1.4)
    with matplotlib.rc_context(plots.RC):
        figure, axes = plots._axes(380, 250)
        for x, y, end in zip(steps, means, ends, strict=True):
            axes.plot([x, x], [y - end, y + end])
            axes.plot(x, y, "o", markersize=7.5)
        axes.set_xlim(0.0, 36.0)
        names = [Name(x, y, f"a-method-of-{i}", "black") for i, (x, y) in enumerate(zip(steps, means, strict=True))]
        label_points(axes, names)
        figure.draw_without_rendering()
        texts = [Text.get_window_extent(text) for text in axes.texts]  # without their lines
    things = [_around(line) for line in axes.lines]
    assert len(texts) == len(names)
    for i, text in enumerate(texts):
        inner = text.padded(-2.0)
        assert not any(inner.overlaps(other.padded(-2.0)) for other in texts[i + 1 :])
        for thing in things:
            assert inner.x1 < thing.left or inner.x0 > thing.right or inner.y1 < thing.low or inner.y0 > thing.high
        assert axes.bbox.x0 <= text.x0
        assert text.x1 <= axes.bbox.x1 + 1.0


def test_nothing_global_is_left_behind() -> None:
    import matplotlib
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    plots.curves([Line([0.0, 1.0], [0.5, 0.7])], "alt")
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs
