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

FOLDER = Path(__file__).parents[2] / "benchmarks" / "evidence"
STUDIES = ("decoupled", "supremix", "m2mix", "semi", "policies")
MODULES = ("common", "groups", "page", "plots", "run")


@pytest.fixture
def study(request) -> str:
    return getattr(request, "param", "decoupled")


@pytest.fixture
def scripts(monkeypatch, study: str):
    """The scripts import each other by their bare names, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(FOLDER / study))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def of(*studies: str):
    """The scripts of these studies, one after the other."""
    return pytest.mark.parametrize("study", studies, indirect=True)


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


def rows(tmp_path: Path, name: str = "tiny") -> list[tuple[str, str]]:
    with open(tmp_path / "results" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [(row["method"], row["seed"]) for row in csv.DictReader(file)]


def test_one_row_a_run_and_how_it_came_about(run, monkeypatch, tmp_path, capsys) -> None:
    assert command(run, monkeypatch, tmp_path, "--seeds", "2") == 0
    assert rows(tmp_path) == [("none", "0"), ("none", "1"), ("cutmix", "0"), ("cutmix", "1")]
    about = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert about["seeds"] == [0, 1]
    assert about["data"]["train"] == 160
    assert "4 of 4 runs" in capsys.readouterr().err


def test_a_stopped_comparison_keeps_the_seeds_that_all_methods_finished(run, monkeypatch, tmp_path) -> None:
    import common

    compare = common.compare

    def stop_in_the_second_seed(recipes, seeds, out, **options):
        compare(recipes, seeds[:1], out, **options)
        compare(recipes[:1], seeds[1:], out, **options)
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(common, "compare", stop_in_the_second_seed)
    assert command(run, monkeypatch, tmp_path, "--seeds", "2") == 128 + signal.SIGTERM
    assert rows(tmp_path) == [("none", "0"), ("cutmix", "0")]
    monkeypatch.setattr(common, "compare", compare)
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
        if name != "cifar10-50000-long":  # two runs, which differ in the loss
            assert recipes[0].policy is None, name
        assert len({r.name for r in recipes}) == len(recipes)


def test_one_seed_is_a_difference_without_an_interval(scripts, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from common import difference

    from hardmix.metrics.statistics import paired_test

    top1 = ("top-1 %", 100, 2)
    assert difference(paired_test([0.959], [0.957]), top1, None) == "+0.20 (one seed)"
    assert difference(paired_test([0.5, 0.6], [0.4, 0.4]), top1, 0.01) == "**+15.00 [-48.53, +78.53]**"


@of("policies")
def test_runs_are_asked_about_spoilt_images_too(scripts, monkeypatch, tmp_path) -> None:
    import run

    monkeypatch.setattr(run, "groups", lambda budget: {"tiny": [tiny(name="none", policy=None), tiny(name="cutmix")]})
    monkeypatch.setattr(run, "HERE", tmp_path)
    assert command(run, monkeypatch, tmp_path, "--seeds", "1") == 0
    with open(tmp_path / "results" / "tiny.csv", newline="", encoding="utf-8") as file:
        measured = {row["method"]: row for row in csv.DictReader(file)}
    for method, row in measured.items():
        folder = tmp_path / "runs" / "tiny" / method / "seed-0"
        known = json.loads((folder / "robustness.json").read_text("utf-8"))["headline"]
        assert {key: float(row[key]) for key in run.HEADLINE} == pytest.approx(
            {key: known[key] for key in run.HEADLINE}, abs=1e-6
        )


@of("policies")
@pytest.mark.parametrize("budget", ["small", "full"])
def test_both_losses_meet_every_policy_at_the_same_settings(scripts, budget: str) -> None:
    from groups import groups

    from hardmix.tables import POLICIES

    trained = set()
    for name, recipes in groups(budget).items():
        shared = [r.model_dump(exclude={"name", "policy", "objective"}) for r in recipes]
        assert all(other == shared[0] for other in shared), name
        by_name = {r.name: r for r in recipes}
        assert by_name.pop("none").policy is None
        for method, recipe in by_name.items():
            policy, loss = method.rsplit("-", 1)
            other = by_name[f"{policy}-{'dm' if loss == 'ce' else 'ce'}"]
            assert recipe.policy == other.policy
            assert recipe.objective != other.objective
            trained.add(recipe.policy.name)
    # augmix mixes no labels, the last two are made of others
    assert trained == set(POLICIES) - {"augmix", "random-choice", "scheduled"}


@of(*STUDIES)
def test_the_page_is_what_the_results_give(scripts) -> None:
    import page
    from common import PART

    assert page.main(["--check"]) == 0
    assert {part[2] for part in PART.finditer(page.PAGE.read_text("utf-8"))} == set(page.PARTS)


@of(*STUDIES)
def test_plots_are_drawn(scripts, tmp_path) -> None:
    import plots
    from page import DOCS, PAGE

    plots.draw(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(p.name for p in DOCS.glob(f"{PAGE.stem}-*.svg"))


@pytest.fixture
def numbers(scripts, monkeypatch, tmp_path):
    """run.py of the study of numbers, with two settings a method on one seed."""
    import groups
    import run

    for key, values in {"LEARNING_RATES": (1e-3, 1e-2), "WEIGHT_DECAYS": (0.01,), "RNC_TEMPERATURES": (2.0,)}.items():
        monkeypatch.setattr(groups, key, values)
    monkeypatch.setattr(run, "TUNING_SEEDS", (1001,))
    monkeypatch.setattr(run, "TRIALS", 2)
    monkeypatch.setattr(run, "HERE", tmp_path)
    return run


@of("supremix")
def test_settings_are_tried_chosen_and_tested(numbers, monkeypatch, tmp_path, capsys) -> None:
    small = ("--only", "diabetes", "--methods", "rank-n-contrast", "--seeds", "1", "--epochs", "2")
    assert command(numbers, monkeypatch, tmp_path, *small) == 0
    assert "7 of 7 runs" in capsys.readouterr().err
    assert rows(tmp_path, "diabetes") == [("l1", "0"), ("rank-n-contrast", "0")]
    assert rows(tmp_path, "diabetes-frozen") == [("rank-n-contrast", "0")]
    about = json.loads((tmp_path / "results" / "diabetes.json").read_text())
    tried = about["tried"]["rank-n-contrast"]
    best = min(tried, key=tried.__getitem__)
    assert about["methods"]["rank-n-contrast"]["contrast"]["probe"] == best.rsplit("-", 1)[1]
    assert f"lr{about['recipe']['train']['lr']:g}" in min(about["tried"]["l1"], key=about["tried"]["l1"].get)
    frozen = json.loads((tmp_path / "results" / "diabetes-frozen.json").read_text())
    assert frozen["methods"]["rank-n-contrast"]["contrast"]["probe"] == "linear"


@of("supremix")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--only", "diabets"), "--only names diabets; there are"),
        (("--methods", "l2"), "--methods names l2; there are"),
        (("--only", "sts-b-dir"), "say where they are with --vectors"),
    ],
)
def test_what_can_not_be_run_is_refused(numbers, monkeypatch, tmp_path, capsys, arguments, says: str) -> None:
    with pytest.raises(SystemExit):
        command(numbers, monkeypatch, tmp_path, *arguments)
    assert says in capsys.readouterr().err


@of("supremix")
def test_methods_try_as_many_settings_and_share_all_else(scripts) -> None:
    from groups import ABLATIONS, PLANS, TRIALS, TUNED, Trials, ablations

    apart = {"name", "policy", "contrast"}
    for name, plan in PLANS.items():
        trials = Trials(plan, "vectors" if name == "sts-b-dir" else "")
        base = trials.base()
        assert len(base) == TRIALS
        best = base[0]
        for method in TUNED:
            tried = trials.others({"lr": best.train.lr, "weight_decay": best.train.weight_decay}, method)
            assert len({recipe.name for recipe in tried}) == TRIALS, (name, method)
            assert all(r.model_dump(exclude=apart) == best.model_dump(exclude=apart) for r in tried), (name, method)
            if method == "supremix":
                changed = [r.contrast.objective.options for r in ablations(tried[0])]
                own = tried[0].contrast.objective.options
                assert changed == [{**own, **options} for options in ABLATIONS.values()]


@of("m2mix")
def test_methods_for_pairs_try_as_many_settings_from_the_same_weights(scripts) -> None:
    from groups import PLANS, TRIALS, TRIED, Trials

    apart = {"name", "objective", "tune", "seed"}
    for name, plan in PLANS.items():
        trials = Trials(plan, {"fluent": "folder"})
        base = trials.base()
        assert len(base) == TRIALS
        best = base[-1]
        settings = {"lr": best.train.lr, "weight_decay": best.train.weight_decay}
        for method in TRIED:
            tried = trials.others(settings, method)
            assert len({recipe.name for recipe in tried}) == TRIALS, (name, method)
            assert all(r.model_dump(exclude=apart) == best.model_dump(exclude=apart) for r in tried), (name, method)
            assert {r.tune.start for r in tried} == {plan.start}
        tested = trials.tested(tried[0], "m3-mix")
        assert (tested.name, tested.data.styles, tested.eval.parts) == ("m3-mix", {"fluent": "folder"}, [])
