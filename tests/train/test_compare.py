"""Comparisons: what may be compared, and where they are written."""

from __future__ import annotations

import pytest

from hardmix.train.compare import cautions, compare
from hardmix.train.errors import RecipeError, RunError
from hardmix.train.recipe import load_recipe

from .conftest import tiny


def test_recipes_that_are_tested_or_trained_on_other_samples_are_told() -> None:
    same = [load_recipe("diabetes-l1"), load_recipe("diabetes-supremix", ["data.augment=[]", "train.lr=0.01"])]
    assert cautions(same) == []
    other = load_recipe("table-l1", ["data.path=a.csv", "data.target=y"])
    (told,) = cautions([*same, other])
    assert told.startswith("The recipes differ in data.name, data.path, data.target: they may be tested on other")
    longer = load_recipe("diabetes-l1", ["train.epochs=200", "data.train_samples=50", "data.validation=0.2"])
    assert cautions([*same, longer]) == [
        "The recipes differ in train.epochs (100, 200), data.train_samples (0, 50), data.validation (0.1, 0.2): some "
        "may be better for that alone."
    ]
    one, two = (load_recipe("few-folder", ["data.path=a", f"semi.labelled={name}.csv"]) for name in "xy")
    (told,) = cautions([one, two])
    assert told.startswith("The recipes differ in semi.labelled: they may be tested on other")
    few = ["few-fixmatch", ["semi.per_class=0", "data.validation=0", "semi.split=a.json"]]
    one, two = load_recipe(*few), load_recipe(few[0], [*few[1][:2], "semi.split=b.json"])
    assert cautions([one, two]) == [
        "The recipes differ in semi.split (a.json, b.json): some may be better for that alone."
    ]
    names = ("emoji-zero-shot", "emoji-clip", "emoji-m2mix")  # the first makes no step
    assert cautions([load_recipe(name) for name in names]) == []


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("recipe.toml", "holds a run, whose report"),
        ("report.html", "holds a report.html that is not of a comparison"),
        ("comparison.csv", "holds a comparison.csv that is not of a comparison"),
    ],
)
def test_a_comparison_takes_no_other_files_place(tmp_path, file, told) -> None:
    (tmp_path / file).write_text("mine")
    with pytest.raises(RunError, match=told):
        compare([load_recipe("demo-none")], [0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "mine"


@pytest.mark.parametrize("seeds", [[], [0, 1, 0]])
def test_each_seed_counts_once(seeds, tmp_path) -> None:
    with pytest.raises(RecipeError, match="pass each once"):
        compare([load_recipe("demo-none")], seeds, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_changed_is_told_before_another_is_trained(tmp_path) -> None:
    old = tiny(name="old", train={"epochs": 1, "warmup_epochs": 0})
    compare([old], [0], tmp_path, workers=1)
    with pytest.raises(RunError, match="holds a run of another recipe"):
        compare([tiny(name="new"), old.model_copy(update={"train": tiny().train})], [0], tmp_path, workers=1)
    assert not (tmp_path / "new").exists()
