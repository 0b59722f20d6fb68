"""The regression task: trained directly and in two stages, resumed anywhere, compared, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hardmix.train.compare import compare
from hardmix.train.errors import RecipeError, RunError
from hardmix.train.evaluate import evaluate_run, load_run
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe, check_recipe, load_recipe, shipped
from hardmix.train.tasks.number_data import NumberData
from hardmix.train.tasks.regression import Regression

from .conftest import fingerprint
from .test_loop import interrupted

SMALL: dict[str, Any] = {
    "name": "small",
    "task": "regression",
    "data": {"name": "diabetes", "train_samples": 96, "validation": 0.1},
    "model": {"name": "mlp", "options": {"width": 16}},
    "objective": {"name": "regression", "kind": "l1"},
    "train": {"epochs": 6, "batch_size": 32, "optimizer": "adamw", "lr": 3e-3, "warmup_epochs": 0.5, "threads": 1}
    | {"device": "cpu", "log_every": 2},
}
CONTRAST = {"epochs": 3, "objective": {"name": "supremix", "window": 0.5}}


def small(**sections: Any) -> Recipe:
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for key, value in sections.items():
        table[key] = table[key] | value if isinstance(table.get(key), dict) and isinstance(value, dict) else value
    table["objective"] = {key: value for key, value in table["objective"].items() if value is not None}
    return check_recipe({key: value for key, value in table.items() if value is not None}, "small")


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    run_recipe(small(contrast=CONTRAST), folder)
    return folder


def test_a_run_measures_the_target_in_its_own_unit(two_stages) -> None:
    summary = json.loads((two_stages / "summary.json").read_text())
    assert summary["objective"] == "supremix + l1"
    assert summary["data"] | {"source": "", "license": "", "digest": ""} == {
        "name": "diabetes", "kind": "rows", "train": 96, "validation": 44, "test": 88, "features": 10,
        "target": "progression", "source": "", "license": "", "digest": "",
    }  # fmt: skip
    scatter = summary["scatter"]
    errors = [abs(p - y) for p, y in zip(scatter["prediction"], scatter["label"], strict=True)]
    assert summary["test"]["mae"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert min(scatter["label"]) >= 25
    assert max(scatter["label"]) <= 346
    page = (two_stages / "report.html").read_text()
    assert "on 88 test rows" in page
    assert "Prediction against truth" in page
    assert "no reliability diagram" not in page


def test_stage_one_trains_the_encoder_and_stage_two_the_head(tmp_path) -> None:
    weights = {}
    for epochs in (3, 6):
        recipe = small(contrast=CONTRAST, train={"epochs": epochs + (epochs == 3)})
        run_recipe(recipe, tmp_path / str(epochs))
        weights[epochs] = load_run(tmp_path / str(epochs)).model.state_dict()
    task = Regression(small(contrast=CONTRAST))
    fresh, trained = task.model.state_dict(), weights[6]
    assert not torch.equal(fresh["encoder.0.weight"], trained["encoder.0.weight"])
    assert not torch.equal(fresh["head.weight"], trained["head.weight"])
    # One epoch of the head or three: the encoder is what stage 1 made of it.
    assert torch.equal(weights[3]["encoder.0.weight"], trained["encoder.0.weight"])
    assert not torch.equal(weights[3]["head.weight"], trained["head.weight"])


def test_finetuning_moves_the_encoder_too(tmp_path) -> None:
    for probe in ("linear", "finetune"):
        run_recipe(small(contrast={**CONTRAST, "probe": probe}), tmp_path / probe)
    first, second = (load_run(tmp_path / probe).model.state_dict() for probe in ("linear", "finetune"))
    assert not torch.equal(first["encoder.0.weight"], second["encoder.0.weight"])


@pytest.mark.parametrize("step", [4, 9, 14], ids=["in stage one", "between the stages", "in stage two"])
def test_resuming_is_bit_exact(step, two_stages, tmp_path, monkeypatch) -> None:
    recipe = small(contrast=CONTRAST)
    interrupted(recipe, tmp_path / "run", step, monkeypatch)
    run_recipe(recipe, tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(two_stages)


def test_label_statistics_come_from_the_checkpoint(two_stages) -> None:
    run = load_run(two_stages)
    labels = run.task.data.labels("train")
    assert float(run.task.data.scale.mean) == pytest.approx(labels.mean().item(), rel=1e-6)
    assert float(run.task.data.scale.std) == pytest.approx(labels.std(correction=0).item(), rel=1e-6)
    summary = json.loads((two_stages / "summary.json").read_text())
    assert evaluate_run(two_stages)["test"] == summary["test"]


def test_the_best_checkpoint_is_the_one_of_the_smallest_error(tmp_path) -> None:
    run_recipe(small(train={"epochs": 12, "lr": 0.1}, eval={"checkpoint": "best"}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    errors = {line["step"]: line["mae"] for line in lines if line["kind"] == "validation"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["checkpoint"]["step"] == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("objective", ["supcon", "rank-n-contrast", "supremix"])
def test_every_contrast_trains(objective, tmp_path) -> None:
    settings = {"window": 0.5} if objective == "supremix" else {}
    summary = run_recipe(small(contrast={"epochs": 2, "objective": {"name": objective, **settings}}), tmp_path / "run")
    assert summary["test"]["mae"] < 150


def test_mixed_rows_train_with_mixed_labels(tmp_path) -> None:
    for policy in ({"name": "c-mixup", "bandwidth": 0.5}, {"name": "mixup", "alpha": 2.0}):
        folder = tmp_path / policy["name"]
        summary = run_recipe(small(policy=policy), folder)
        assert summary["policy"] == policy["name"]
        assert summary["test"]["mae"] < 150


def test_a_comparison_shows_errors_where_lower_is_better(tmp_path) -> None:
    recipes = [small(name="plain"), small(name="contrast", contrast=CONTRAST)]
    result = compare(recipes, [0, 1], tmp_path, workers=1)
    assert result["metrics"][0] == "mae"
    assert "mae" in result["lower_is_better"]
    assert "r2" not in result["lower_is_better"]
    assert result["table"][1]["versus_first"]["mae"]["p"] is not None
    with open(tmp_path / "comparison.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    page = (tmp_path / "report.html").read_text()
    assert "validation MAE" in page
    assert "top-1" not in page


def test_a_measure_that_is_not_defined_is_shown_as_missing(tmp_path, monkeypatch, capsys) -> None:
    """Constant predictions have no correlation: NaN in memory, null on disk, n/a on the screen."""
    from hardmix.terminal import print_comparison

    constant = Regression.predict
    monkeypatch.setattr(Regression, "predict", lambda self, *args: torch.zeros_like(constant(self, *args)))
    monkeypatch.setattr(Regression, "metrics", ("pearson", *Regression.metrics))
    result = compare([small(name="one"), small(name="two", policy={"name": "mixup"})], [0, 1], tmp_path, workers=1)
    print_comparison(result)
    assert "n/a" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["table"][0]["metrics"]["pearson"]["mean"] is None


def test_a_table_of_ones_own(tmp_path) -> None:
    path = tmp_path / "houses.csv"
    rows = [f"{i % 7},{'north' if i % 2 else 'south'},{10.0 * (i % 7) + (i % 2)}" for i in range(120)]
    path.write_text("rooms,side,price\n" + "\n".join(rows) + "\n")
    recipe = load_recipe("table-l1", [f"data.path={path}", "data.target=price", "train.epochs=4"])
    summary = run_recipe(recipe, tmp_path / "run")
    assert summary["data"]["features"] == 3
    assert summary["data"]["target"] == "price"


def test_a_comparison_keeps_no_runs_of_data_that_changed(tmp_path) -> None:
    path = tmp_path / "houses.csv"
    lines = ["rooms,price", *(f"{i % 7},{10 * (i % 7) + i}" for i in range(60))]
    path.write_text("\n".join(lines))
    sets = [f"data.path={path}", "data.target=price", "train.epochs=1", "train.warmup_epochs=0"]
    recipes = [load_recipe("table-l1", sets)]
    first = compare(recipes, [0], tmp_path / "out", workers=1)
    path.write_text("\n".join([*lines[:-1], "3,333"]))
    message = "seed-0 was trained on samples or labels that .*houses.csv no longer has; choose another --out, or delete"
    with pytest.raises(RunError, match=message):
        compare(recipes, [0, 1], tmp_path / "out", workers=1)
    other = [load_recipe("table-l1", [*sets, "train.lr=0.1"])]
    with pytest.raises(RunError, match=r"seed-0 holds a run of another recipe \(train.lr differ\)"):
        compare(other, [0, 1], tmp_path / "out", workers=1)
    path.unlink()  # what was measured may be told again
    assert compare(recipes, [0], tmp_path / "out", workers=1)["table"] == first["table"]


def test_no_group_is_in_two_splits(tmp_path) -> None:
    path = tmp_path / "scans.csv"
    rows = [f"{i % 7},p{i // 3},{i + 10 * (i % 7)}" for i in range(90)]
    path.write_text("\n".join(["size,patient,age", *rows]))
    sets = [f"data.path={path}", "data.target=age", "data.group=patient", "train.epochs=3", "train.batch_size=16"]
    summary = run_recipe(load_recipe("table-l1", sets), tmp_path / "run")
    assert [summary["data"][part] for part in ("train", "validation", "test", "features")] == [63, 9, 18, 1]
    assert evaluate_run(tmp_path / "run")["test"]["mae"] == summary["test"]["mae"]
    path.write_text(
        "\n".join(["size,patient,age,split", *(f"{r},{'test' if i < 30 else 'train'}" for i, r in enumerate(rows))])
    )
    task = Regression(load_recipe("table-supremix", [*sets[:3], f"contrast.data.path={path}"]))
    for data in (Regression(load_recipe("table-l1", sets)).data, task.data):
        held = [{data.numbers.groups[row] for row in rows.tolist()} for rows in data.rows.values()]
        assert all(held)
        assert sum(map(len, held)) == 30
    with pytest.raises(RecipeError, match=r"data.imbalance draws samples one by one, which data.group keeps together"):
        load_recipe("table-l1", [*sets, "data.imbalance=5"])


def test_nothing_is_pretrained_on_of_a_group_that_is_tested(tmp_path) -> None:
    for name, first in (("first", 0), ("second", 100)):
        rows = [f"{first + i},p{i % 10},{i}" for i in range(40)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["size,patient,age", *rows]))
    data = {"name": "table", "path": str(tmp_path / "first.csv"), "target": "age", "group": "patient", "test": 0.3}
    contrast = {**CONTRAST, "data": {"path": str(tmp_path / "second.csv"), "test": 0.2}}
    with pytest.warns(UserWarning, match="left out 4 of 28 samples to pre-train on"):
        task = Regression(small(data={**data, "train_samples": 0}, contrast=contrast))
    own = {task.data.numbers.groups[int(row)] for part in ("validation", "test") for row in task.data.rows[part]}
    assert own.isdisjoint(task.source.numbers.groups[int(row)] for row in task.source.rows["train"])


def test_raw_labels_of_a_contrast_are_those_of_the_file(tmp_path) -> None:
    path = tmp_path / "ages.csv"
    path.write_text("x,age\n" + "".join(f"{i % 9},{20 + (i * 7) % 60}\n" for i in range(200)))
    sets = [f"data.path={path}", "data.target=age", "contrast.labels=raw", "contrast.objective.window=5"]
    task = Regression(load_recipe("table-supremix-joint", sets))
    ages = task.data.labels("train")
    seen = task._contrasted(task.data.scale(ages))
    assert seen.equal(ages)
    assert task.data.scale(ages).double().mul(task.data.scale.std).add(task.data.scale.mean).ne(ages).any()
    between = task.data.scale((ages[:20] + ages[1:21]) / 2 + 0.25)  # what a policy mixes
    assert torch.allclose(task._contrasted(between), (ages[:20] + ages[1:21]) / 2 + 0.25)
    assert (
        run_recipe(load_recipe("table-supremix-joint", [*sets, "train.epochs=3"]), tmp_path / "run")["test"]["mae"] > 0
    )


def test_missing_cells_are_filled_from_the_training_rows_alone(tmp_path) -> None:
    split = ["train"] * 8 + ["test"] * 4
    x = [1, 2, 3, "", 5, 6, 7, 8, 1000, 1000, 1000, ""]
    path = tmp_path / "gaps.csv"
    path.write_text("x,c,y,split\n" + "".join(f"{x[i]},{'' if i == 3 else 0.1},{i},{split[i]}\n" for i in range(12)))
    sets = [f"data.path={path}", "data.target=y", "data.missing=mean", "data.validation=0"]
    data = NumberData(load_recipe("table-l1", sets).data, 0)
    assert data.numbers.inputs[[3, 11], 0].tolist() == [32 / 7] * 2
    assert bool((data.numbers.inputs[:, 1] == 0.1).all())
    path.write_text(path.read_text().replace(",train", ",t").replace(",test", ",train").replace(",t\n", ",test\n"))
    path.write_text(re.sub(r"^1?\d*(?=,.*,train)", "", path.read_text(), flags=re.MULTILINE))
    with pytest.raises(ValueError, match=r"has no value in 'x' among the 4 training rows; delete the column, or take"):
        NumberData(load_recipe("table-l1", sets).data, 0)


def test_samples_that_changed_are_neither_evaluated_nor_trained_on(tmp_path, monkeypatch) -> None:
    path = tmp_path / "houses.csv"
    lines = ["rooms,size,price", *(f"{i % 7},{50 + i},{10 * (i % 7) + i}" for i in range(60))]
    path.write_text("\n".join(lines))
    short = ["train.epochs=2", "train.batch_size=8", "train.warmup_epochs=0"]
    recipe = load_recipe("table-l1", [f"data.path={path}", "data.target=price", *short])
    mae = run_recipe(recipe, tmp_path / "done")["test"]["mae"]
    interrupted(recipe, tmp_path / "half", 3, monkeypatch)
    assert evaluate_run(tmp_path / "done")["test"]["mae"] == mae
    for changed, told in (
        ([*lines, lines[1]], "samples and labels and splits"),
        ([lines[0], *reversed(lines[1:])], "samples and labels"),
        ([",".join(line.split(",")[i] for i in (1, 0, 2)) for line in lines], "features and samples"),
        ([*lines[:5], lines[5] + "1", *lines[6:]], "labels"),
    ):
        path.write_text("\n".join(changed))
        with pytest.raises(RunError, match=f"houses.csv gives other {told} than the run began with, and what was"):
            evaluate_run(tmp_path / "done")
        with pytest.raises(RunError, match=f"gives other {told} than"):
            run_recipe(recipe, tmp_path / "half", resume=True)
    path.write_text("\n".join(lines))
    assert run_recipe(recipe, tmp_path / "half", resume=True)["test"]["mae"] == mae


@pytest.mark.filterwarnings("ignore:.*left out 20 of 40 rows")
@pytest.mark.parametrize("kind", ["table", "pictures"])
def test_nothing_is_pretrained_on_that_is_tested_afterwards(kind, tmp_path) -> None:
    names = [f"{i:02}.png" for i in range(40)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (6 * i, 0, 0)).save(tmp_path / name)
    header = "file,age,score" if kind == "pictures" else "size,age,score"
    rows = [f"{name if kind == 'pictures' else i},{i},{'' if i % 2 else i}" for i, name in enumerate(names)]
    (tmp_path / "all.csv").write_text("\n".join([header, *rows]))
    (tmp_path / "some.csv").write_text("\n".join([header, *rows[::2]]))
    labels = "labels" if kind == "pictures" else "path"
    where = {"path": str(tmp_path), "labels": "some.csv"} if kind == "pictures" else {"path": str(tmp_path / "all.csv")}
    own = {"name": kind, "target": "score", **where} | (
        {} if kind == "pictures" else {"missing": "drop", "target": "age"}
    )
    source = {labels: str(tmp_path / "all.csv"), "target": "age"} | ({} if kind == "pictures" else {"missing": "mean"})
    model = {"name": "small-cnn" if kind == "pictures" else "mlp", "options": {"width": 4}}
    with pytest.warns(
        UserWarning, match=r"left out [3-6] of 28 samples to pre-train on, which are validated or tested"
    ):
        task = Regression(small(data=own | {"train_samples": 0}, model=model, contrast={**CONTRAST, "data": source}))
    pretrained = set(task.source.names(task.source.rows["train"]))
    for part in ("validation", "test"):
        assert not pretrained & set(task.data.names(task.data.rows[part]))
    assert pretrained & set(task.data.names(task.data.rows["train"]))
    assert float(task.source.scale.mean) == task.source.labels("train").mean()


def test_a_table_to_pretrain_on_has_the_same_columns_in_the_same_order(tmp_path) -> None:
    rows = [(i, i % 5, "ab"[i % 2], 2 * i) for i in range(40)]
    for name, places in (("own", (0, 1, 2, 3)), ("turned", (1, 0, 2, 3)), ("same", (3, 0, 1, 2))):
        lines = [",".join(str(row[place]) for place in places) for row in [("age", "rooms", "side", "price"), *rows]]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    (tmp_path / "words.csv").write_text((tmp_path / "own.csv").read_text().replace(",a,", ",c,"))

    def task(source: str) -> Regression:
        sets = [f"data.path={tmp_path}/own.csv", "data.target=price", f"contrast.data.path={tmp_path}/{source}.csv"]
        return Regression(load_recipe("table-supremix", sets))

    assert task("same").source_inputs.shape == (40, 4)
    with pytest.raises(ValueError, match=r"feature 1 is 'age' in .*own.csv but 'rooms' in .*turned.csv; pre-train on"):
        task("turned")
    with pytest.raises(ValueError, match=r"feature 3 is 'side=a' in .* but 'side=b' in .*words.csv"):
        task("words")


def test_predictions_of_large_labels_that_are_close_are_not_rounded(tmp_path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("x,time\n" + "".join(f"{i},{1_700_000_000 + 2 * i}\n" for i in range(60)))
    recipe = load_recipe("table-l1", [f"data.path={path}", "data.target=time", "train.epochs=3"])
    scatter = run_recipe(recipe, tmp_path / "run")["scatter"]
    # float32 has 1,700,000,000 and nothing up to 1,700,000,128
    assert len(set(scatter["prediction"])) == len(scatter["label"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"name": "digits"}},
            'task is "regression" but data.name is "digits"; its sets are diabetes, airfoil',
        ),
        (
            {"model": {"name": "small-cnn", "options": {}}},
            'model.name is "small-cnn", which takes images, but data.name is "diabetes", which holds rows',
        ),
        ({"model": {"options": {"widht": 3}}}, 'unknown option of model "mlp": widht (did you mean "width"?)'),
        ({"objective": {"name": "soft-bce", "kind": None}}, 'objective "soft-bce" is not one of task "regression"'),
        ({"contrast": {**CONTRAST, "epochs": 6}}, "contrast.epochs is 6 but train.epochs is 6; leave some"),
        ({"contrast": {"epochs": 2, "objective": {"name": "supremx"}}}, 'did you mean "supremix"?'),
        ({"contrast": {"epochs": 2, "objective": {"name": "supremix"}}}, "window is None; pass how far apart"),
        ({"contrast": {"epochs": 2, "objective": {"name": "supcon", "windw": 1}}}, "unknown option of contrastive"),
        ({"contrast": {"epochs": 2, "objective": {"name": "supcon", "reduction": "sum"}}}, 'training takes the "mean"'),
        ({"contrast": CONTRAST, "train": {"warmup_epochs": 3}}, "train.warmup_epochs is 3 but the shorter stage has 3"),
        ({"contrast": CONTRAST, "train": {"accumulate": 2}}, "train.accumulate splits the samples that are compared"),
        (
            {"objective": {"name": "balanced-mse", "kind": None}, "train": {"accumulate": 2}},
            "train.accumulate splits the samples that are compared",
        ),
        (
            {"policy": {"name": "cutmix"}},
            'policy "cutmix" mixes parts of images; a table takes mixup, manifold-mixup, c-',
        ),
    ],
)
def test_recipes_that_do_not_fit_together_say_so(sections, message) -> None:
    with pytest.raises(RecipeError) as caught:
        small(**sections)
    assert message in str(caught.value)


def test_other_refusals(tmp_path, two_stages) -> None:
    from hardmix.train.robustness import robustness_of_run

    from .conftest import tiny

    with pytest.raises(RecipeError, match="recipes of several tasks have no measure in common"):
        compare([small(), tiny()], [0], tmp_path)
    with pytest.raises(ValueError, match="holds a run of task regression; it is measured for image classes"):
        robustness_of_run(two_stages)
    with pytest.raises(RecipeError, match='policy "c-mixup" pairs by numbers; it is for regression'):
        tiny(policy={"name": "c-mixup", "bandwidth": 1.0})
    inside = {"name": "random-choice", "policies": [{"name": "c-mixup", "bandwidth": 1.0}, "none"]}
    with pytest.raises(RecipeError, match='policy "c-mixup" pairs by numbers; it is for regression'):
        tiny(policy=inside)
    assert small(policy=inside).policy is not None


FAMILIES = [name.removesuffix("-l1") for name in shipped() if name.endswith("-l1")]
#: recipes that pre-train on another part of the data -> what is trained on theirs from scratch, under a name of its own
TWINS = {"molecules-transfer": "molecules-jpo"}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (n, TWINS.get(n) or max(families, key=len))
        for n in shipped()
        if (families := [f for f in FAMILIES if n.startswith(f"{f}-")])
    ],
)
def test_shipped_recipes_differ_in_their_method_alone(name, family) -> None:
    recipe, base = load_recipe(name), load_recipe(f"{family}-l1")
    apart = {"name", "about", "policy", "contrast"}
    assert recipe.model_dump(exclude=apart) == base.model_dump(exclude=apart)


def test_no_line_of_the_log_is_about_two_stages(two_stages) -> None:
    lines = [json.loads(line) for line in (two_stages / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    assert [("contrast" in line, "loss" in line) for line in logged if line["epoch"] <= 3] == [(True, False)] * 5
    assert all("loss" in line and "contrast" not in line for line in logged if line["epoch"] > 3)
    page = (two_stages / "report.html").read_text()
    assert "Contrastive loss, of the embeddings." in page
