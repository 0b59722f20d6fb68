"""One small run of each kind of sample, from files of the user's own to predictions, with and without a contrast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hardmix.train.errors import RecipeError
from hardmix.train.evaluate import evaluate_run
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe, check_recipe

COUNT = 60
GENERATOR = np.random.default_rng(0)
LEVELS = GENERATOR.integers(0, 12, COUNT).astype(float)

TRAIN = {"epochs": 4, "batch_size": 16, "optimizer": "adamw", "lr": 3e-3, "warmup_epochs": 0.5, "threads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "table": {"name": "mlp", "options": {"width": 16}},
    "series": {"name": "series-cnn", "options": {"width": 8, "depth": 2}},
    "pictures": {"name": "small-cnn", "options": {"width": 4}},
    "volumes": {"name": "volume-cnn", "options": {"width": 4, "depth": 2}},
    "texts": {"name": "bilstm", "options": {"embedding": 8, "width": 8}},
}
VIEWS = {"series": ["crop", "jitter"], "pictures": ["flip", "crop"], "volumes": ["flip"]}


def section(kind: str, folder: Path) -> dict[str, Any]:
    """Files of this kind in which brightness, level or words tell the number."""
    if kind == "table":
        lines = [f"{level + 0.1 * i % 1},{'north' if i % 2 else 'south'},{level}" for i, level in enumerate(LEVELS)]
        (folder / "t.csv").write_text("\n".join(["size,side,price", *lines]) + "\n")
        return {"path": str(folder / "t.csv"), "target": "price"}
    if kind == "series":
        x = LEVELS[:, None] + GENERATOR.normal(size=(COUNT, 24))
        np.savez(folder / "s.npz", x=x, y=LEVELS)
        return {"path": str(folder / "s.npz")}
    if kind == "pictures":
        for i, level in enumerate(LEVELS):
            Image.fromarray(np.full((12, 12), int(level * 20), np.uint8)).save(folder / f"{i}.png")
        rows = [f"{i}.png,{level}" for i, level in enumerate(LEVELS)]
        (folder / "ages.csv").write_text("\n".join(["file,age", *rows]) + "\n")
        return {"path": str(folder), "labels": "ages.csv", "target": "age"}
    if kind == "volumes":
        for i, level in enumerate(LEVELS):
            np.save(folder / f"{i}.npy", np.full((8, 8, 8), level, np.float32))
        rows = [f"{i}.npy,{level}" for i, level in enumerate(LEVELS)]
        (folder / "ages.csv").write_text("\n".join(["file,age", *rows]) + "\n")
        return {"path": str(folder), "labels": "ages.csv", "target": "age"}
    words = [" ".join(["very"] * int(level) + ["good"]) for level in LEVELS]
    lines = [json.dumps({"text": text, "stars": level}) for text, level in zip(words, LEVELS, strict=True)]
    (folder / "t.jsonl").write_text("\n".join(lines) + "\n")
    return {"path": str(folder / "t.jsonl"), "target": "stars"}


def recipe(kind: str, folder: Path, **more: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": kind,
        "task": "regression",
        "data": {"name": kind, **section(kind, folder)},
        "model": MODELS[kind],
        "objective": {"name": "regression"},
        "train": {**TRAIN, "device": "cpu"},
    }
    if kind in VIEWS:
        table["data"]["augment"] = VIEWS[kind]
    return check_recipe(table | more, kind)


@pytest.mark.parametrize("kind", MODELS)
def test_each_kind_trains_in_two_stages_and_is_measured_again(kind, tmp_path) -> None:
    contrast = {"epochs": 2, "objective": {"name": "supremix", "window": 1.0}}
    made = recipe(kind, tmp_path, contrast=contrast)
    assert made.contrast is not None
    assert made.contrast.views == (1 if kind == "texts" else 2)
    summary = run_recipe(made, tmp_path / "run")
    assert summary["data"]["test"] == 12
    assert 0.0 < summary["test"]["mae"] < 12.0
    assert len(summary["embedding"]["x"]) == 12
    again = evaluate_run(tmp_path / "run")["test"]
    assert again["mae"] == summary["test"]["mae"]


def test_a_model_learns_from_brightness(tmp_path) -> None:
    """The real path learns: what a constant prediction would miss by is halved."""
    made = recipe("pictures", tmp_path, train={**TRAIN, "epochs": 30, "device": "cpu"})
    summary = run_recipe(made, tmp_path / "run")
    constant = np.abs(LEVELS - np.median(LEVELS)).mean()
    assert summary["test"]["mae"] < constant / 2


@pytest.mark.parametrize("objective", ["supremix", "supcon", "rank-n-contrast", "adasupcon", "kernel-contrast",
                                       "ranksim", "ordinal-entropy", "conr"])  # fmt: skip
@pytest.mark.parametrize("views", [1, 2])
def test_every_contrast_stands_beside_a_head(objective, views, tmp_path) -> None:
    settings = {"window": 1.0} if objective == "supremix" else {}
    contrast = {"epochs": 0, "weight": 0.1, "views": views, "objective": {"name": objective, **settings}}
    run_recipe(recipe("table", tmp_path, contrast=contrast), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    assert logged
    assert all(np.isfinite(line["contrast"]) and line["loss"] > 0 for line in logged)


def test_a_contrast_beside_the_head_changes_what_is_learnt(tmp_path) -> None:
    weights = {}
    for weight in (0.1, 0.2):
        contrast = {"epochs": 0, "weight": weight, "objective": {"name": "supremix", "window": 1.0}}
        summary = run_recipe(recipe("table", tmp_path, contrast=contrast), tmp_path / str(weight))
        weights[weight] = summary["test"]["mae"]
    assert weights[0.1] != weights[0.2]


def test_one_set_pre_trains_for_another(tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first = section("series", other)
    contrast = {"epochs": 2, "objective": {"name": "rank-n-contrast"}, "data": {**first, "train_samples": 20}}
    made = recipe("series", tmp_path, contrast=contrast)
    assert made.contrast is not None
    assert made.contrast.data is not None
    assert made.contrast.data.augment == ["crop", "jitter"]
    summary = run_recipe(made, tmp_path / "run")
    assert {**summary["data"]["pretraining"], "digest": ""} == {"name": "series", "train": 20, "digest": ""}
    assert summary["data"]["train"] == 42
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # 1 step an epoch on the 20, 2 on the 42
    assert max(line["step"] for line in lines) == 2 * 1 + 2 * 2
    assert evaluate_run(tmp_path / "run")["test"]["mae"] == summary["test"]["mae"]


def test_samples_of_another_shape_can_not_pre_train(tmp_path) -> None:
    np.savez(tmp_path / "short.npz", x=GENERATOR.normal(size=(COUNT, 2, 24)), y=LEVELS)
    data = {"path": str(tmp_path / "short.npz")}
    contrast = {"epochs": 2, "objective": {"name": "rank-n-contrast"}, "data": data}
    with pytest.raises(ValueError, match=r"a sample of series has shape \(1, 24\), but one of series \(2, 24\)"):
        run_recipe(recipe("series", tmp_path, contrast=contrast), tmp_path / "run")


def test_imbalanced_training_is_tested_on_balanced_numbers(tmp_path) -> None:
    lines = [f"{i},{(i % 400) ** 2 / 400}" for i in range(1200)]
    (tmp_path / "squares.csv").write_text("\n".join(["x,y", *lines]) + "\n")
    data = {"name": "table", "path": str(tmp_path / "squares.csv"), "target": "y", "imbalance": 20.0}
    from hardmix.train.tasks.regression import Regression

    plain, thinned = (Regression(recipe("table", tmp_path, data={**data, "imbalance": ratio})) for ratio in (1.0, 20.0))
    low = [float((task.data.labels("train") < 200).double().mean()) for task in (plain, thinned)]
    tested = [float((task.data.labels("test") < 200).double().mean()) for task in (plain, thinned)]
    assert low[1] > low[0]
    assert abs(tested[1] - 0.5) < abs(tested[0] - 0.5)


def test_densities_weight_samples_and_smooth_features(tmp_path) -> None:
    results = {}
    for name, density in {"off": {}, "lds": {"lds": True}, "fds": {"fds": True, "bins": 6}}.items():
        made = recipe("table", tmp_path, density=density)
        results[name] = run_recipe(made, tmp_path / name)["test"]["mae"]
        assert evaluate_run(tmp_path / name)["test"]["mae"] == results[name]
    assert len(set(results.values())) == 3


@pytest.mark.parametrize("kind", ["bmc", "gai"])
def test_balanced_mse_learns_its_noise(kind, tmp_path) -> None:
    from hardmix.train.evaluate import load_run

    options = {"name": "balanced-mse", "kind": kind} | ({"components": 3} if kind == "gai" else {})
    run_recipe(recipe("table", tmp_path, objective=options), tmp_path / "run")
    weights = load_run(tmp_path / "run").model.state_dict()
    assert float(weights["objective.log_sigma"]) != 0.0


def test_texts_are_mixed_inside(tmp_path) -> None:
    policy = {"name": "manifold-mixup", "layers": ["encoder"], "include_input": False, "bandwidth": 0.5}
    summary = run_recipe(recipe("texts", tmp_path, policy=policy), tmp_path / "run")
    assert summary["policy"] == "manifold-mixup"


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("texts", {"policy": {"name": "mixup"}}, 'policy "mixup" mixes inputs, and texts can only be mixed inside'),
        ("texts", {"model": {"name": "mlp"}}, 'model.name is "mlp", which takes rows, but data.name is "texts"'),
        ("series", {"density": {"kernel_size": 4}}, "is 4; pass an odd number"),
        (
            "table",
            {"contrast": {"epochs": 2, "objective": {"name": "ranksim"}}},
            "ranksim is made to stand beside a head's loss",
        ),
        (
            "table",
            {"contrast": {"epochs": 0, "objective": {"name": "supcon"}}},
            "contrast.epochs is 0 and contrast.weight 0; set epochs to train the encoder first, or a weight",
        ),
        (
            "table",
            {"contrast": {"epochs": 2, "weight": 0.5, "objective": {"name": "supcon"}}},
            "contrast.epochs is 2 and contrast.weight 0.5",
        ),
        (
            "table",
            {"contrast": {"epochs": 0, "weight": 1.0, "objective": {"name": "supcon"}}, "policy": {"name": "mixup"}},
            "contrast.views is 2 and a policy mixes the samples",
        ),
        (
            "table",
            {"objective": {"name": "balanced-mse"}, "density": {"lds": True}},
            "density.lds weights samples, which balanced-mse does not",
        ),
        ("table", {"objective": {"name": "balanced-mse", "mixture": 3}}, "unknown option of objective"),
    ],
)
def test_what_does_not_fit_together(kind, more, message, tmp_path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(kind, tmp_path, **more)
    assert message in str(caught.value)


def test_views_of_another_kind_are_refused(tmp_path) -> None:
    data = {"name": "table", **section("table", tmp_path), "augment": ["flip"]}
    with pytest.raises(RecipeError, match='"flip" is a view, but table holds rows, which have none'):
        recipe("table", tmp_path, data=data)
    data = {"name": "series", **section("series", tmp_path), "augment": ["flop"]}
    with pytest.raises(RecipeError, match='"flop" is not a view'):
        recipe("series", tmp_path, data=data)


def test_the_frozen_encoder_keeps_its_batch_statistics(tmp_path) -> None:
    """A linear probe on a network with batch normalisation: nothing of the encoder moves in the second stage."""
    from hardmix.train.evaluate import load_run

    contrast = {"epochs": 2, "objective": {"name": "supremix", "window": 1.0}}
    weights = []
    for epochs in (3, 4):
        made = recipe("pictures", tmp_path, contrast=contrast, train={**TRAIN, "epochs": epochs, "device": "cpu"})
        run_recipe(made, tmp_path / str(epochs))
        weights.append(load_run(tmp_path / str(epochs)).model.state_dict())
    encoder = [name for name in weights[0] if name.startswith("encoder.")]
    assert any("running_mean" in name for name in encoder)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in encoder)
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])


def test_a_table_is_split_as_its_column_says(tmp_path) -> None:
    from hardmix.train.tasks.regression import Regression

    words = ["train"] * 4 + ["test"]
    lines = [f"{level},{words[i % 5]},{level}" for i, level in enumerate(LEVELS)]
    (tmp_path / "parts.csv").write_text("\n".join(["size,split,price", *lines]) + "\n")
    data = {"name": "table", "path": str(tmp_path / "parts.csv"), "target": "price"}
    rows = Regression(recipe("table", tmp_path, data=data)).data.rows
    assert rows["test"].tolist() == list(range(4, COUNT, 5))
    assert len(rows["validation"]) == 5  # a tenth of the training rows, since the column has none


def test_the_second_stage_has_the_rate_of_what_it_trains(tmp_path) -> None:
    contrast = {"epochs": 2, "objective": {"name": "supcon"}}
    rates = {}
    for probe in ("linear", "finetune"):
        made = recipe("table", tmp_path, contrast={**contrast, "probe": probe})
        assert made.contrast is not None
        rates[probe] = made.contrast.head_lr
    assert rates == {"linear": 0.01, "finetune": TRAIN["lr"]}


def test_fewer_numbers_to_predict_leave_those_of_the_pre_training_alone(tmp_path) -> None:
    data = {"name": "table", **section("table", tmp_path), "train_samples": 20, "imbalance": 5.0}
    contrast = {"epochs": 2, "objective": {"name": "supcon"}, "data": {"missing": "drop"}}
    made = recipe("table", tmp_path, data=data, contrast=contrast)
    assert made.contrast is not None
    assert made.contrast.data is not None
    assert (made.contrast.data.train_samples, made.contrast.data.imbalance) == (0, 1.0)
    assert (made.contrast.data.path, made.contrast.data.target) == (made.data.path, "price")


@pytest.mark.parametrize("place", ["in the folder", "by its path"])
@pytest.mark.parametrize("kind", ["pictures", "volumes"])
def test_the_table_of_a_folder_is_named_in_it_or_by_its_path(kind, place, tmp_path, monkeypatch) -> None:
    from hardmix.data.number_sets import Options, load_numbers

    (tmp_path / "scans").mkdir()
    section(kind, tmp_path / "scans")
    monkeypatch.chdir(tmp_path)
    labels = "ages.csv" if place == "in the folder" else "scans/ages.csv"
    numbers = load_numbers(kind, "scans", Options(target="age", labels=labels))
    assert numbers.labels.tolist() == LEVELS.tolist()


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("pictures", None, r"path is None, but pictures are files of yours; name them \(--set data.path=FOLDER"),
        ("series", None, r"path is None, but series are files of yours; name them \(--set data.path=FILE\)"),
        ("table", "t.csv", "target is empty; name the column to predict with `--set data.target=COLUMN`"),
        ("volumes", ".", "target is empty; name the column to predict"),
    ],
)
def test_what_is_left_out_of_ones_own_files_is_named(kind, path, message) -> None:
    from hardmix.data.number_sets import load_numbers

    with pytest.raises(ValueError, match=message):
        load_numbers(kind, path)
