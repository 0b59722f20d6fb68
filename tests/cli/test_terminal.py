"""What the command line shows, by the width of the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hardmix import terminal

NAMES = ("fashion-mixup", "fashion-mixup-dm", "fashion-none")


@pytest.fixture
def screen(monkeypatch):
    """A terminal of a width in place of stdout, or a pipe; returns what is written to it."""

    def make(width: int, is_terminal: bool = True) -> io.StringIO:
        written = io.StringIO()
        options: dict[str, Any] = {"force_terminal": is_terminal, "width": width, "color_system": None}
        monkeypatch.setattr(terminal, "console", Console(file=written, highlight=False, **options))
        return written

    return make


def comparison(seeds: int = 3, costs: tuple[float | None, ...] = (None, 1.0, 1.25)) -> dict[str, Any]:
    cell = {"mean": 0.8, "low": 0.79, "high": 0.81}
    test = {"difference": 0.0133, "low": -0.0012, "high": 0.0278, "p": 0.07, "p_holm": 0.14}
    versus = dict.fromkeys(("top1", "cutmix_both"), test)
    table = [
        {"name": name, "metrics": {"top1": cell, "cutmix_both": cell}, "relative_cost": cost, "versus_first": versus}
        for name, cost in zip(NAMES, costs, strict=True)
    ]
    return {
        "metrics": ["top1", "cutmix_both"],
        "lower_is_better": [],
        "cautions": [],
        "table": table,
        "seeds": list(range(seeds)),
        "cost_against": next((name for name, cost in zip(NAMES, costs, strict=True) if cost), None),
        "twins": [{"name": NAMES[1], "base": NAMES[0], "tests": versus}],
    }


NUMBERS = ("+1.33 points", "[-0.12, +2.78]", "p = 0.070 (0.140)")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_numbers_of_a_test_stand_in_one_line(screen, width) -> None:
    written = screen(width)
    terminal.print_comparison(comparison())
    lines = [line for line in written.getvalue().splitlines() if "points" in line]
    assert len(lines) == 2 + 2 * 1  # two against the first, and the twin by two measures
    assert all(number in line for line in lines for number in NUMBERS)
    assert all(len(line) <= width for line in lines)
    assert "  fashion-mixup-dm against fashion-mixup" in written.getvalue()


def test_the_same_difference_in_every_seed_is_not_tested(screen) -> None:
    result = comparison()
    result["table"][1]["versus_first"] = {"top1": {"difference": 0.125, "low": None, "high": None, "p": None}}
    result["table"][2]["versus_first"] = {"top1": {"difference": None, "low": None, "high": None, "p": None}}
    written = screen(100)
    terminal.print_comparison(result)
    lines = [line.split(maxsplit=1)[1] for line in written.getvalue().splitlines() if line.startswith("  fashion")]
    assert lines[0].split() == ["+12.50", "points", "the", "same", "in", "every", "seed,", "not", "tested"]
    assert lines[1].strip() == "n/a"


def test_a_pipe_is_as_wide_as_its_lines(screen, capsys) -> None:
    screen(40, is_terminal=False)
    terminal.print_comparison(comparison())
    (line, _) = (line for line in capsys.readouterr().out.splitlines() if "against fashion-mixup " in line)
    assert all(number in line for number in NUMBERS)


def test_what_makes_a_comparison_doubtful_stands_below_it(screen) -> None:
    written = screen(60)
    terminal.print_comparison({**comparison(), "cautions": ["The recipes differ in [data.name]."]})
    assert "The recipes differ in [data.name]." in written.getvalue().splitlines()


def test_a_recipe_without_training_steps_has_no_cost(screen) -> None:
    written = screen(120)
    terminal.print_comparison(comparison(seeds=1))
    rows = {line.split()[0]: line.split()[-1] for line in written.getvalue().splitlines() if line.startswith("fashion")}
    assert rows == {NAMES[0]: "-", NAMES[1]: "1.00", NAMES[2]: "1.25"}
    assert "Cost: seconds a training step, fashion-mixup-dm = 1. -: makes no training step." in written.getvalue()
    written = screen(120)
    terminal.print_comparison(comparison(seeds=1, costs=(None, None, None)))
    assert "ost" not in written.getvalue()


@pytest.mark.parametrize(("width", "has_bar"), [(50, False), (80, False), (140, True)])
def test_progress_keeps_steps_and_the_time_left(screen, width, has_bar) -> None:
    written = screen(width)
    event = {"epoch": 1, "epochs": 15, "steps": 12345, "images_per_s": 4000.0, "loss": 0.123, "accuracy": 0.85}
    with terminal.one_bar("fashion-cutmix-dm") as tell:
        tell({**event, "step": 4321})
    last = written.getvalue().splitlines()[-2]  # the cursor comes back after it
    assert "4321/12345" in last
    assert "left -:--:--" in last
    assert ("\u2501" in last) == has_bar
    assert "epoch" in last


def test_a_run_without_a_step_leaves_no_bar(screen) -> None:
    for is_terminal in (True, False):
        written = screen(120, is_terminal)
        with pytest.raises(ValueError, match="no such folder"), terminal.one_bar("mine"):
            raise ValueError("no such folder")
        assert "mine" not in written.getvalue().rpartition("\x1b[2K")[2]


def test_a_summary_leaves_out_what_the_number_of_classes_decides(screen) -> None:
    written = screen(120)
    data = {"test": 40, "classes": ["cat", "dog"]}
    test = {"top1": 0.5, "top5": 1.0, "mixup_both": 1.0}
    terminal.print_summary({"name": "two", "seed": 0, "data": data, "test": test})
    assert written.getvalue().splitlines()[0] == "two, seed 0, 40 test images"
    assert "50.00" in written.getvalue()
    assert "100" not in written.getvalue()


def test_a_summary_of_few_measures_tells_what_they_were_before(screen) -> None:
    written = screen(120)
    summary = {"name": "two", "seed": 0, "data": {"test": 40, "kind": "pairs"}, "test": {"recall_5": 0.5, "gap": 1.5}}
    terminal.print_summary(summary | {"before": {"recall_5": 0.25, "gap": 1.25}})
    lines = [line.split() for line in written.getvalue().splitlines()[1:]]
    assert lines == [["before", "after"], ["R@5", "%", "25.00", "50.00"], ["gap", "1.250", "1.500"]]


def test_numbers_of_any_size_keep_their_digits(screen) -> None:
    result = comparison()
    for row, size in zip(result["table"], (1.2345e-3, 1.2345e-8, 12345.678), strict=True):
        row["metrics"] = {"mae": {"mean": size, "low": size * 0.9, "high": size * 1.1}}
        test = {"difference": -size / 10, "low": -size / 5, "high": size / 1e6, "p": 2e-5, "p_holm": 0.002}
        row["versus_first"] = {"mae": test}
    result |= {"metrics": ["mae"], "lower_is_better": ["mae"], "twins": []}
    written = screen(120)
    terminal.print_comparison(result)
    shown = " ".join(written.getvalue().split())
    assert all(cell in shown for cell in ("0.00123 ±0.00012", "1.23e-08 ±1.23e-09", "12345.678 ±1234.568"))
    assert "-1.23e-09 [-2.47e-09, +1.23e-14] p < 0.001 (0.002)" in shown
    assert "-1234.57 [-2469.14, +0.01]" in shown
    points = {"difference": 0.00188, "low": -0.0062, "high": 0.00996, "p": 0.4, "p_holm": 0.8}
    terminal._print_tests([("small", points)], "top1")
    assert "+0.19 points [-0.62, +1.00]" in " ".join(written.getvalue().split())
    result["table"][1]["versus_first"]["mae"] |= {"difference": -1e-9, "low": -0.02, "p_holm": 4e-5}
    written = screen(120)
    terminal.print_comparison(result)
    assert "+0.0000 [-0.0200, +0.0000] p < 0.001 (< 0.001)" in " ".join(written.getvalue().split())


@pytest.mark.parametrize(("metric", "title"), [("alignment", "Alignment"), ("ece", "ECE"), ("recall_5", "R@5")])
def test_any_measure_may_be_the_first(screen, metric, title) -> None:
    result = comparison()
    for row in result["table"]:
        row["metrics"] = {metric: row["metrics"]["top1"]}
        row["versus_first"] = {metric: row["versus_first"]["top1"]}
    result |= {"metrics": [metric], "twins": []}
    written = screen(120)
    terminal.print_comparison(result)
    assert f"{title} against fashion-mixup, paired by seed" in written.getvalue()
    assert written.getvalue().count("±") == 3
