"""What the page of a regression run shows of its predictions, whatever its summary holds."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from hardmix.metrics import error_by_label, principal_components, regression_metrics, shot_errors
from hardmix.report import number_plots, plots, write_run_report

from .fake_runs import write_run
from .test_hostile import PAYLOADS, check_page
from .test_pages import headings, words

BLUE, PALE = plots.COLORS[1], "#7fb8d8"


def fake_numbers(tests: int = 60, target: str = "progression") -> dict[str, Any]:
    """The entries of a regression run's summary: skewed labels, predictions that stay near the middle."""
    g = torch.Generator().manual_seed(0)
    labels = 25 + 300 * torch.rand(tests + 300, generator=g).double().square()
    train, own = labels[tests:], labels[:tests]
    predicted = own + 0.4 * (labels.mean() - own) + 15 * torch.randn(tests, generator=g)
    turn = (own - own.min()) / 150
    features = torch.stack([turn.cos(), turn.sin()], 1) @ torch.randn(2, 16, generator=g).double()
    scores, explained = principal_components(features + 0.2 * torch.randn(tests, 16, generator=g))
    return {
        "task": "regression",
        "test": regression_metrics(predicted, own) | shot_errors(predicted, own, train),
        "scatter": {"label": own.tolist(), "prediction": predicted.tolist(), "target": target},
        "errors": error_by_label(predicted, own, train),
        "embedding": {
            "x": scores[:, 0].tolist(),
            "y": scores[:, 1].tolist(),
            "label": own.tolist(),
            "explained": explained.tolist(),
        },
    }


def svg(plot: plots.Plot | None) -> str:
    assert plot is not None
    return base64.b64decode(plot.uri.split(",", 1)[1]).decode("utf-8").replace("\u00a0", " ").replace("\u2212", "-")


def plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2212", "-")


def written(plot: plots.Plot | None) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg(plot))


def test_the_page_shows_predictions_errors_and_features(tmp_path: Path) -> None:
    numbers = fake_numbers()
    numbers["test"]["mae_few"] = math.nan
    write_run(tmp_path, epochs=2, changes={**numbers, "reliability": None})
    page = write_run_report(tmp_path)
    check_page(page)
    assert headings(page)[:3] == ["Test results", "Predictions", "Learning curves"]
    text = words(page)
    for part in ("Prediction against truth", "pale for under 5 test samples", "Grey: training samples.", "(PCA)"):
        assert part in text
    assert "characters)" not in text  # no caption is cut
    for label in ("MAE many-shot", "MAE medium-shot", "MAE few-shot n/a"):
        assert label in text
    alts = re.findall(r'alt="([^"]*)"', plain(page.read_text("utf-8")))
    assert alts[0].startswith("60 test samples with true values from 25")
    assert alts[1].startswith("Mean absolute error by true value in 12 ranges from 25")
    assert alts[2].startswith("Features of 60 test samples with true values from 25")


def test_pages_of_other_runs_have_no_such_section(tmp_path: Path, quick_plots: None) -> None:
    write_run(tmp_path, epochs=2)
    assert "Predictions" not in headings(write_run_report(tmp_path))
    assert number_plots.predictions({}) == []


def test_truth_is_drawn_with_a_line() -> None:
    plot = number_plots.truth({"label": [1.0, 2.0, None, 5.0], "prediction": [1.5, "x", 3.0, 4.0]}, "years")
    assert plot is not None
    assert plot.alt == "2 test samples with true values from 1 to 5."
    assert svg(plot).count("<use") >= 2
    assert {"years", "prediction"} <= set(written(plot))


def test_errors_stand_above_the_training_counts() -> None:
    stored = {
        "edges": [0.0, 10.0, 20.0, 30.0],
        "mae": [4.0, None, 2.5],
        "bias": [4.0, None, -1.0],
        "test": [4, 0, 5],
        "train": [7, 1234, 0],
    }
    plot = number_plots.errors(stored, "years")
    assert plot is not None
    assert plain(plot.alt) == (
        "Mean absolute error by true value in 3 ranges from 0 to 30: lowest 2.5 between 20 and 30 (0 training "
        "samples), highest 4 between 0 and 10 (7 training samples)."
    )
    drawn = svg(plot)
    assert drawn.count(f"fill: {BLUE}") == 1  # five test samples
    assert drawn.count(f"fill: {PALE}") == 1  # four
    assert {"years", "error", "training", "1,234"} <= set(written(plot))
    negative = number_plots.errors({**stored, "mae": [-4.0, None, 2.5]}, "years")
    assert negative is not None
    assert "lowest 2.5" in negative.alt
    bare = number_plots.errors({"edges": [0, 1], "mae": [3]}, "years")
    assert bare is not None
    assert bare.alt.endswith("highest 3 between 0 and 1.")
    assert f"fill: {BLUE}" in svg(bare)
    assert "training" in written(bare)  # without a number: nothing is known
    assert not any("," in text for text in written(bare))


def test_features_are_coloured_by_the_label() -> None:
    stored = {"x": [0.0, 1.0, 2.0], "y": [0.0, 0.5, 0.0], "label": [10, 20, 30], "explained": [0.623, 0.21]}
    plot = number_plots.embedding(stored, "years")
    assert plot is not None
    assert plain(plot.alt) == (
        "Features of 3 test samples with true values from 10 to 30, in their two main directions, which hold 62 % and "
        "21 % of the variance."
    )
    assert {"1st component (62 % of the variance)", "2nd component (21 % of the variance)", "years"} <= set(
        written(plot)
    )
    drawn = svg(plot)
    assert drawn.count("#440154") >= 2  # the lowest label: a point and the foot of the bar
    assert "<image" not in drawn
    for explained in (None, [2.0, -1], ["a"], {}, math.nan):
        assert "1st component" in written(number_plots.embedding({**stored, "explained": explained}, "years"))


@pytest.mark.parametrize("value", [0.0, 5.0, -1e29, 1e-29])
def test_equal_numbers_can_be_drawn(value: float) -> None:
    same = [value] * 3
    summary = {
        "scatter": {"label": same, "prediction": same},
        "errors": {"edges": [value, value + abs(value) + 1], "mae": [abs(value)], "bias": same, "train": [3]},
        "embedding": {"x": same, "y": same, "label": same},
    }
    assert len(number_plots.predictions(summary)) == 3


def test_any_proportions_can_be_drawn() -> None:
    for x, y in (([0.0, 1e-29], [1e29, 1e29]), ([1e15, 1e15 + 0.125], [0.0, 9e29]), ([-1e29, 1e29], [1e-29, 1e-29])):
        assert number_plots.embedding({"x": x, "y": y, "label": [1, 2]}, "years") is not None


def test_long_lists_are_cut_or_left_out() -> None:
    many = [float(i) for i in range(100_000)]
    plot = number_plots.truth({"label": many, "prediction": many}, "years")
    assert plot is not None
    assert plot.alt.startswith("500 test samples")
    assert number_plots.embedding({"x": many, "y": many, "label": many}, "years") is not None
    assert number_plots.errors({"edges": many, "mae": many}, "years") is None  # the first bins would tell half of it


WRONG: list[Any] = [
    *(None, True, 3, "x", [], {}, [None], [[1.0]], ["1"], [math.nan, math.inf], [1e308, -1e308], [10**400], [True]),
    {"a": 1},
    [5e-324, 1e-310],
]
OPTIONAL = ("target", "explained", "bias", "test", "train")


@pytest.mark.parametrize("key", ["scatter", "errors", "embedding"])
def test_wrong_entries_leave_a_plot_out(key: str) -> None:
    good = fake_numbers()[key]
    for wrong in WRONG:
        assert number_plots.predictions({key: wrong}) == []
        for inner in set(good) - set(OPTIONAL):
            assert number_plots.predictions({key: {**good, inner: wrong}}) == [], (inner, wrong)
    for wrong in (None, [math.nan, 1e308, 10**400, "x"], {"a": 1}):
        optional = {inner: wrong for inner in OPTIONAL if inner in good}
        assert len(number_plots.predictions({key: {**good, **optional}})) == 1


@pytest.mark.parametrize("edges", [[0, 0], [1, 0], [0, 1, 1], [0, None, 2], [0, 2, 1], [3]])
def test_edges_that_do_not_ascend_leave_the_errors_out(edges: list[Any]) -> None:
    assert number_plots.errors({"edges": edges, "mae": [1.0, 1.0]}, "years") is None


def test_a_damaged_summary_still_gives_a_page(tmp_path: Path, quick_plots: None) -> None:
    for i, wrong in enumerate(WRONG[::2]):
        test = {"mae": wrong, "mae_many": wrong, "mae_medium": 1.0, "mae_few": None}
        changes = {"task": "regression", "test": test, "scatter": wrong, "errors": wrong, "embedding": wrong}
        write_run(tmp_path / str(i), epochs=1, changes=changes)
        check_page(write_run_report(tmp_path / str(i)))


def test_a_hostile_target_stays_text(tmp_path: Path, quick_plots: None) -> None:
    outline = None
    for i, payload in enumerate(["plain", *(p for p in PAYLOADS if p.startswith(("<script", "$\\", "AAA", "lone")))]):
        numbers = fake_numbers(tests=3, target=payload)
        for plot, _ in number_plots.predictions(numbers):
            for element in xml.etree.ElementTree.fromstring(svg(plot)).iter():
                tag = element.tag.rpartition("}")[2]
                assert tag in {"svg", "g", "path", "text", "tspan", "use", "defs", "style", "clipPath", "rect"}
                assert not any(key.lower().startswith("on") for key in element.attrib)
            assert len(plot.uri) < 100_000
        write_run(tmp_path / str(i), epochs=1, changes=numbers)
        found = check_page(write_run_report(tmp_path / str(i))).outline()
        outline = outline or found
        assert found == outline, payload[:60]


def test_the_same_numbers_give_the_same_bytes() -> None:
    first, again = (number_plots.predictions(json.loads(json.dumps(fake_numbers()))) for _ in range(2))
    assert first == again
