"""The evidence: its recipes are valid, its command does what it says, and its page is what the results give."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from hardmix.train.errors import Interrupted
from train.conftest import tiny

FOLDER = Path(__file__).parents[2] / "benchmarks" / "evidence" / "decoupled"
MODULES = ("groups", "page", "plots", "run")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts import each other by their bare names, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(scripts, monkeypatch, tmp_path):
    """run.py with one comparison of two methods that train in a second."""
    import run

    methods = [tiny(name="none", policy=None), tiny(name="cutmix")]
    monkeypatch.setattr(run, "groups", lambda budget, epochs: {"tiny": methods})
    monkeypatch.setattr(run, "HERE", tmp_path)
    return run


def command(run, monkeypatch, tmp_path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--jobs", "1", "--out", str(tmp_path / "runs"), *arguments])
    return run.main()


def rows(tmp_path: Path) -> list[tuple[str, str]]:
    with open(tmp_path / "results" / "tiny.csv", newline="", encoding="utf-8") as file:
        return [(row["method"], row["seed"]) for row in csv.DictReader(file)]


def test_one_row_a_run_and_how_it_came_about(run, monkeypatch, tmp_path, capsys) -> None:
    assert command(run, monkeypatch, tmp_path, "--seeds", "2") == 0
    assert rows(tmp_path) == [("none", "0"), ("none", "1"), ("cutmix", "0"), ("cutmix", "1")]
    about = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert about["seeds"] == [0, 1]
    assert about["data"]["train"] == 160
    assert "4 of 4 runs" in capsys.readouterr().err


def test_a_stopped_comparison_keeps_the_seeds_that_all_methods_finished(run, monkeypatch, tmp_path) -> None:
    compare = run.compare

    def stop_in_the_second_seed(recipes, seeds, out, **options):
        compare(recipes, seeds[:1], out, **options)
        compare(recipes[:1], seeds[1:], out, **options)
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(run, "compare", stop_in_the_second_seed)
    assert command(run, monkeypatch, tmp_path, "--seeds", "2") == 128 + signal.SIGTERM
    assert rows(tmp_path) == [("none", "0"), ("cutmix", "0")]
    monkeypatch.setattr(run, "compare", compare)
    assert command(run, monkeypatch, tmp_path, "--seeds", "2") == 0
    assert len(rows(tmp_path)) == 4


def test_an_unknown_comparison_is_refused(run, monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        command(run, monkeypatch, tmp_path, "--only", "tin")
    assert "--only names tin; budget small has tiny" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["small", "full"])
def test_methods_differ_in_policy_and_objective_alone(scripts, budget: str) -> None:
    from groups import groups

    for name, recipes in groups(budget).items():
        shared = [r.model_dump(exclude={"name", "policy", "objective"}) for r in recipes]
        assert all(other == shared[0] for other in shared), name
        assert recipes[0].policy is None, name
        assert len({r.name for r in recipes}) == len(recipes)


def test_the_page_is_what_the_results_give(scripts) -> None:
    import page

    assert page.main(["--check"]) == 0
    assert {part[2] for part in page.PART.finditer(page.PAGE.read_text("utf-8"))} == set(page.PARTS)


def test_plots_are_drawn(scripts, tmp_path) -> None:
    import plots
    from page import DOCS

    plots.draw(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(p.name for p in DOCS.glob("*.svg"))
