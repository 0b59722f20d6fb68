"""The image-text task: from scratch, from the weights of another run, every objective, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image

from hardmix import tables
from hardmix.cli import main
from hardmix.train.compare import compare
from hardmix.train.errors import CheckpointError, Interrupted, RecipeError, RunError
from hardmix.train.evaluate import evaluate_run, load_run
from hardmix.train.loop import run_recipe
from hardmix.train.optimizer import _shares
from hardmix.train.pair_checks import OF_MIXTURES
from hardmix.train.pair_eval import pair_tables
from hardmix.train.recipe import Recipe, check_recipe, load_recipe
from hardmix.train.start import prepare_start, start_folder
from hardmix.train.tasks.image_text import ImageText

from .conftest import fingerprint
from .test_loop import interrupted, stop_after

MODEL = {
    "name": "two-tower",
    "options": {
        "features": 16,
        "image": {"name": "small-cnn", "width": 4},
        "text": {"name": "subwords", "buckets": 512, "width": 16, "dropout": 0.0},
    },
}
TRAIN = {"epochs": 2, "batch_size": 16, "optimizer": "adamw", "lr": 3e-3, "warmup_epochs": 0.5, "threads": 1}
PAIRS: dict[str, Any] = {
    "name": "pairs",
    "task": "image-text",
    "data": {"name": "captions", "validation": 0.2, "test": 0.3},
    "model": MODEL,
    "objective": {"name": "clip"},
    "train": TRAIN | {"device": "cpu", "log_every": 1},
}
EMOJI = {"data": {"name": "emoji", "domain": "noto", "path": None, "labels": None, "train_samples": 96}}
THINGS = [f"{colour} {shape}" for colour in ("red", "green", "blue", "grey") for shape in
          ("square", "circle", "bar", "cross", "frame", "dot", "ring", "wedge", "arrow", "star")]  # fmt: skip


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """40 small pictures, two captions each, in a folder with a table."""
    folder = tmp_path_factory.mktemp("drawings")
    draws = torch.Generator().manual_seed(0)
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        for number, thing in enumerate(THINGS):
            pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=draws)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
            rows.writerows([[f"{number}.png", thing], [f"{number}.png", f"a drawing of a {thing}"]])
    return folder


def with_splits(drawings: Path, folder: Path, rows: list[tuple[int, str, str]]) -> None:
    """The drawings in another folder, with a table of (number, caption, split)."""
    for path in drawings.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption", "split"])
        table.writerows([f"{number}.png", caption, split] for number, caption, split in rows)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HARDMIX_CACHE", str(tmp_path / "cache"))


def pairs(folder: Path | None = None, **sections: Any) -> Recipe:
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in PAIRS.items()}
    if folder is not None:
        table["data"] |= {"path": str(folder), "labels": "captions.csv"}
    for key, value in sections.items():
        whole = not isinstance(value, dict) or (key in ("objective", "model", "policy"))
        table[key] = value if whole else table.get(key, {}) | value
    table["data"] = {key: value for key, value in table["data"].items() if value is not None}
    return check_recipe({key: value for key, value in table.items() if value is not None}, "pairs")


@pytest.fixture(scope="module")
def scratch(drawings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scratch") / "run"
    run_recipe(pairs(drawings), folder)
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_run(folder).model.state_dict()


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model that differ."""
    return {key.split(".")[0] for key in one if not torch.equal(one[key], other[key])}


def test_a_run_on_own_pictures_measures_what_never_seen_texts_find(scratch) -> None:
    summary = read(scratch)
    assert (summary["data"]["train"], summary["data"]["validation"], summary["data"]["test"]) == (19, 9, 12)
    assert summary["data"]["kind"] == "pairs"
    assert "before" not in summary
    test = summary["test"]
    assert {"recall_1", "recall_5", "recall_10", "mrr", "median_rank", "ece", "alignment", "uniformity", "gap"} == set(
        test
    )
    (line,) = summary["retrieval"]
    assert (line["part"], line["shift"], line["pairs"]) == ("unseen", False, 12)
    both = [line[f"{side}_recall_5"] for side in ("image_to_text", "text_to_image")]
    assert test["recall_5"] == pytest.approx(sum(both) / 2)
    assert len(summary["sphere"]["image"]) == len(summary["sphere"]["text"]) == 12
    assert len(summary["examples"]["texts"]) == 6
    found = evaluate_run(scratch)["test"]
    assert found == pytest.approx(test)
    page = (scratch / "report.html").read_text()
    assert "blue" in page or "red" in page


def test_training_finds_the_pictures_of_texts_that_it_was_trained_on(drawings, tmp_path) -> None:
    run_recipe(pairs(drawings, train={"epochs": 60, "lr": 0.01}), tmp_path / "run")
    run = load_run(tmp_path / "run")
    measures = run.task.measures(run.model, run.device)
    from hardmix.metrics.retrieval import retrieval_metrics

    seen = measures.encode(run.task.data.rows["train"])
    found = retrieval_metrics(seen.images, seen.texts, image_ids=seen.image_ids, text_ids=seen.text_ids)
    assert found["text_to_image_recall_1"] > 0.8
    assert found["text_to_image_recall_1_chance"] < 0.06


def test_the_same_recipe_twice_and_a_stopped_one_are_byte_equal(drawings, scratch, tmp_path, monkeypatch) -> None:
    again, stopped = tmp_path / "again", tmp_path / "stopped"
    run_recipe(pairs(drawings), again)
    assert fingerprint(again) == fingerprint(scratch)
    assert interrupted(pairs(drawings), stopped, 2, monkeypatch) == 2
    run_recipe(pairs(drawings), stopped, resume=True)
    assert fingerprint(stopped) == fingerprint(scratch)
    assert read(stopped)["test"] == read(scratch)["test"]


def test_a_start_is_trained_once_kept_and_measured_again(drawings, scratch, tmp_path) -> None:
    (tmp_path / "first.toml").write_text(pairs(drawings, name="first").to_toml())
    tuned = pairs(drawings, name="tuned", model=None, tune={"start": str(tmp_path / "first.toml")})
    assert tuned.model.options["features"] == 16, "the model is that of the start unless a recipe says another"
    run_recipe(tuned, tmp_path / "tuned")
    folder = start_folder(tuned)
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "cache")
    written = (folder / "summary.json").stat().st_mtime_ns
    none = pairs(drawings, name="none", tune={"start": str(tmp_path / "first.toml")},
                 train={"epochs": 0, "warmup_epochs": 0.0})  # fmt: skip
    run_recipe(none, tmp_path / "none")
    assert (folder / "summary.json").stat().st_mtime_ns == written
    before, start = read(tmp_path / "tuned")["before"], read(folder)["test"]
    assert before == start == read(tmp_path / "none")["test"]
    assert read(tmp_path / "none")["seconds"]["per_step"] is None, "the time to start is not that of a step"
    assert read(tmp_path / "tuned")["test"] != before
    assert not differ(weights(folder), weights(tmp_path / "none"))
    # The folder of a run is a start, too.
    run_recipe(pairs(drawings, tune={"start": str(scratch)}), tmp_path / "of a run")
    assert read(tmp_path / "of a run")["before"] == read(scratch)["test"]


def test_a_kept_start_and_its_day_are_told_before_training(drawings, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "first.toml").write_text(pairs(drawings, name="first").to_toml())
    tuned = pairs(drawings, name="tuned", tune={"start": str(tmp_path / "first.toml")})
    (tmp_path / "tuned.toml").write_text(tuned.to_toml())

    def told(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["hardmix", *words])
        main()
        return capsys.readouterr().out

    recipe = str(tmp_path / "tuned.toml")
    assert "Start, trained" not in told("run", recipe, "--out", str(tmp_path / "a")), "it is trained there"
    folder = start_folder(tuned)
    assert folder is not None
    day = datetime(2031, 2, 3, 12).timestamp()
    os.utime(folder / "summary.json", (day, day))
    line = f"Start, trained 03 February 2031: {folder}\n"
    assert told("run", recipe, "--out", str(tmp_path / "b")).startswith(line)
    assert told("compare", recipe, "--seeds", "1", "--out", str(tmp_path / "c")).startswith(line)


def test_several_runs_start_from_one_that_is_trained_before_them(drawings, tmp_path) -> None:
    (tmp_path / "first.toml").write_text(pairs(drawings, name="first").to_toml())
    tune = {"tune": {"start": str(tmp_path / "first.toml")}}
    recipes = [pairs(drawings, name="clip", **tune), pairs(drawings, name="m2", objective={"name": "m2-mix"}, **tune)]
    result = compare(recipes, [0, 1], tmp_path / "out", workers=2)
    assert result["metrics"][0] == "recall_5"
    assert "zeroshot" not in result["metrics"], "the set has no classes"
    # A set without splits of its own gets the same ones for all seeds, so a start has never seen what is tested.
    befores = [read(tmp_path / "out" / run["folder"])["before"] for run in result["runs"]]
    assert all(before == befores[0] for before in befores)


@pytest.mark.parametrize("name", [name for name in tables.PAIR_OBJECTIVES if name not in ("lipsum", "coca")])
def test_every_objective_trains_both_towers(name, drawings) -> None:
    mixes = tables.PAIR_OBJECTIVES[name] in OF_MIXTURES
    policy = {"name": "mixup", "alpha": 1.0}
    if name == "un-mix":
        policy |= {"per": "batch", "pairing": "reversal"}
    task = ImageText(pairs(drawings, objective={"name": name}, policy=policy if mixes else None))
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.5)
    task.model.train()
    for step in range(3):
        task.start_epoch(0, step)
        task.start_step(step / 3, torch.Generator().manual_seed(step))
        loss, values = task.loss(task.model, task.load(torch.arange(8)), torch.Generator().manual_seed(step))
        assert torch.isfinite(loss)
        assert set(values) == {"loss"}
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = differ(before, task.model.state_dict())
    assert {"image", "text", "image_projection", "text_projection"} <= changed


def test_a_weight_of_the_mixtures_near_zero_is_plain_clip(drawings) -> None:
    values = []
    for objective in ({"name": "clip"}, {"name": "m2-mix", "weight": 1e-12}):
        task = ImageText(pairs(drawings, objective=objective))
        task.start_step(0.0, torch.Generator().manual_seed(0))
        values.append(task.loss(task.model, task.load(torch.arange(8)), torch.Generator().manual_seed(0))[0].item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("name", ["clip", "m2-mix", "m3-mix", "un-mix"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name, drawings) -> None:
    """Not the mean of the parts' losses: those have fewer negatives."""
    policy = {"name": "mixup", "per": "batch", "pairing": "reversal"} if name == "un-mix" else None
    model = MODEL | {"options": MODEL["options"] | {"image": {"name": "tiny-vit", "dim": 8, "depth": 3, "heads": 2}}}
    task = ImageText(pairs(drawings, model=model, objective={"name": name}, policy=policy))
    task.model.train()
    task.start_step(0.0, torch.Generator().manual_seed(0))
    batch = task.load(torch.arange(8))
    loss, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    loss.backward()
    whole = {key: p.grad.clone() for key, p in task.model.named_parameters()}
    task.model.zero_grad()
    value, _ = task.loss_in_parts(task.model, batch, torch.Generator().manual_seed(0), 3, lambda loss: loss)
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    for key, p in task.model.named_parameters():
        assert torch.allclose(p.grad, whole[key], rtol=1e-4, atol=1e-6), key


def test_accumulation_is_of_the_whole_batch(drawings, tmp_path) -> None:
    model = MODEL | {"options": MODEL["options"] | {"image": {"name": "tiny-vit", "dim": 8, "depth": 3, "heads": 2}}}
    recipe = {"model": model, "train": {"optimizer": "sgd", "lr": 0.05}}
    run_recipe(pairs(drawings, **recipe), tmp_path / "one")
    recipe["train"] |= {"accumulate": 4}
    run_recipe(pairs(drawings, **recipe), tmp_path / "four")
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for key in one:
        assert torch.allclose(one[key], four[key], atol=1e-5), key


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji") / "run"
    run_recipe(pairs(**EMOJI), folder)
    return folder


def test_emoji_are_measured_under_shift_by_class_and_by_arithmetic(emoji) -> None:
    summary = read(emoji)
    assert summary["data"] | {"source": "", "license": ""} == {
        "name": "emoji", "kind": "pairs", "train": 96, "validation": 177, "test": 385, "shift": 385,
        "styles": ["noto", "twemoji"], "trained_styles": ["noto"], "concepts": 1610, "source": "", "license": "",
    }  # fmt: skip
    written = {name for name in ImageText.metrics if "caption" in name}
    assert set(ImageText.metrics) - written <= set(summary["test"]), "all there is to compare"
    assert not written & set(summary["test"]), "two towers write no captions"
    parts = [(line["part"], line["style"], line["shift"]) for line in summary["retrieval"]]
    assert parts == [("unseen", "noto", False), ("unseen", "twemoji", True), ("seen", "twemoji", True)]
    assert summary["retrieval"][2]["pairs"] <= 96
    assert set(summary["calibration"]) == {"image_to_text", "text_to_image", "zeroshot"}
    scaled = summary["calibration"]["image_to_text"]
    assert scaled["scaled"]["ece"] < scaled["ece"]
    kinds = summary["arithmetic"]["kinds"]
    assert summary["test"]["arithmetic"] == pytest.approx(sum(k["recall_1"] for k in kinds.values()) / len(kinds))


@pytest.mark.parametrize("task", ["retrieval", "calibration", "zeroshot", "arithmetic", "geometry"])
def test_each_measure_can_be_had_alone(task, emoji) -> None:
    ((heads, lines),) = pair_tables(emoji, task=task)
    assert lines
    assert all(len(line) == len(heads) for line in lines)
    test = read(emoji)["test"]
    shown = " ".join(" ".join(line) for line in lines)
    sample = {"retrieval": None, "calibration": None, "zeroshot": "zeroshot", "arithmetic": None, "geometry": "gap"}[
        task
    ]
    if sample == "zeroshot":
        assert f"{100 * test['zeroshot']:.1f}" in shown
    elif sample == "gap":
        assert f"{test['gap']:.4f}" in shown


def test_what_a_set_lacks_is_said(scratch, emoji) -> None:
    with pytest.raises(ValueError, match="captions has nothing for --task arithmetic; take another one"):
        pair_tables(scratch, task="arithmetic")
    with pytest.raises(ValueError, match='did you mean "retrieval"'):
        pair_tables(scratch, task="retrievel")


HEAD = {"tune": {"head": True}, "objective": {"name": "soft-cross-entropy"}}


def steps(recipe: Recipe, epochs: tuple[int, ...] = (0,), pretrained: bool = True) -> tuple[ImageText, dict, dict]:
    """A task after one step in each of these stages, its weights before and after."""
    task = ImageText(recipe, pretrained=pretrained)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.5)
    for stage in epochs:
        task.start_epoch(stage, stage)
        task.model.train()
        task.start_step(0.0, torch.Generator().manual_seed(0))
        loss, _ = task.loss(task.model, task.load(torch.arange(16)), torch.Generator().manual_seed(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return task, before, task.model.state_dict()


def test_a_head_starts_as_zero_shot_and_a_probe_trains_nothing_else() -> None:
    probe = pairs(**EMOJI, **(HEAD | {"tune": {"head": True, "probe_epochs": 2}}))
    task, before, after = steps(probe)
    assert torch.allclose(before["head.weight"].norm(dim=1), torch.ones(8))
    assert not before["head.bias"].any()
    assert differ(before, after) == {"head", "logit_scale"}
    assert [stage.epochs for stage in task.stages()] == [2]
    both = pairs(**EMOJI, **(HEAD | {"tune": {"head": True, "probe_epochs": 1}}))
    task, before, after = steps(both, (0, 1))
    assert [stage.epochs for stage in task.stages()] == [1, 1]
    assert {"image", "image_projection", "head"} <= differ(before, after)
    assert not {"text", "text_projection"} & differ(before, after)


def test_prompts_of_the_classes_are_texts_to_train_on() -> None:
    task = ImageText(pairs(**EMOJI, tune={"texts": "classes"}))
    assert len(task.tokens) == 8 * 5
    labels = task.load(torch.arange(10))[3]
    chosen = task.load(torch.arange(10))[1]
    assert torch.equal(chosen // 5, labels[:, None].expand(-1, 5)), "five prompts for each class, in order"


def test_lipsum_holds_what_meaningless_texts_see_in_a_picture(emoji) -> None:
    tune = {"head": True, "start": str(emoji)}
    values = {}
    for weight in (1e-9, 10.0):
        recipe = pairs(**EMOJI, tune=tune, objective={"name": "lipsum", "weight": weight, "texts": 12})
        task, before, after = steps(recipe)
        assert not {"text", "text_projection"} & differ(before, after)
        task.model.eval()
        x = task.inputs[task.data.rows["train"][:16]].float() / 255
        texts = task.objective.lipsum[2]
        assert len(texts) == 12
        now, then = task.model(x, texts), task.objective.reference(x, texts)
        values[weight] = (now.image - then.image).norm().item()
    assert 0 < values[10.0] != values[1e-9]


def test_a_resumed_run_knows_what_lipsum_stays_near(emoji) -> None:
    recipe = pairs(**EMOJI, tune={"head": True, "start": str(emoji)}, objective={"name": "lipsum"})
    resumed = ImageText(recipe, pretrained=False)
    resumed.modules()["start"].load_state_dict(ImageText(recipe).modules()["start"].state_dict())
    resumed.start_epoch(0)
    reference = resumed.objective.reference
    assert not differ(reference.state_dict(), weights(emoji))
    assert "image" in differ(reference.state_dict(), resumed.model.state_dict()), "whose weights a checkpoint holds"


def test_options_of_a_model_that_is_not_named_are_those_of_the_task_or_the_start(scratch) -> None:
    image = {"model": {"options": {"image": {"name": "tiny-vit"}}}}
    table = {"name": "x", "task": "image-text", "data": {"name": "emoji"}, "objective": {"name": "clip"}}
    assert check_recipe(table | image, "x").model.name == "two-tower"
    started = check_recipe(table | image | {"tune": {"start": str(scratch)}}, "x").model
    first = load_recipe(str(scratch / "recipe.toml")).model
    assert started.name == first.name
    assert started.options == {**first.options, "image": {"name": "tiny-vit"}}


def test_weights_between_start_and_end(drawings, scratch, tmp_path) -> None:
    (tmp_path / "tuned").mkdir()
    start = {"start": str(scratch)}
    for name, tune in {
        "plain": {},
        "zero": {"after": "wise-ft", "amount": 0.0},
        "one": {"after": "wise-ft", "amount": 1.0},
        "chosen": {"after": "wise-ft"},
        "tpgm": {"after": "tpgm"},
        "unmoved": {"after": "embedding-shift", "amount": 0.0},
        "moved": {"after": "embedding-shift", "amount": 0.5},
    }.items():
        run_recipe(pairs(drawings, tune=start | tune), tmp_path / name)
    found = {path.name: read(path) for path in tmp_path.iterdir() if (path / "summary.json").is_file()}
    plain, before = found["plain"]["test"], found["plain"]["before"]
    assert plain != before
    assert found["one"]["test"] == found["unmoved"]["test"] == plain
    assert found["zero"]["test"] == pytest.approx(before)
    assert 0.0 <= found["chosen"]["chosen"]["alpha"] <= 1.0
    assert [found[name]["objective"] for name in ("plain", "chosen", "tpgm")] == [
        "clip",
        "clip + wise-ft",
        "clip + tpgm",
    ]
    page = (tmp_path / "moved" / "report.html").read_text()
    assert "CLIP + shifted embeddings" in page
    assert "shift 0.5" in page
    assert found["moved"]["test"]["gap"] < plain["gap"]
    assert found["tpgm"]["chosen"]["radii"] > 0.0
    assert evaluate_run(tmp_path / "tpgm")["test"] == pytest.approx(found["tpgm"]["test"])


def test_parts_are_held_and_lower_layers_learn_slower(drawings) -> None:
    _, before, after = steps(pairs(drawings, tune={"freeze": ["text", "text_projection"]}))
    assert differ(before, after) == {"image", "image_projection", "logit_scale"}
    _, before, after = steps(pairs(drawings, tune={"learn_temperature": False, "temperature": 0.01}))
    assert before["logit_scale"].exp().item() == pytest.approx(100.0)
    assert "logit_scale" not in differ(before, after)
    task = ImageText(pairs(drawings, tune={"layer_decay": 0.5}))
    shares = {id(p): share for share, group in _shares(task.model, 0.5, {}).items() for p in group}
    assert len(shares) == len(list(task.model.parameters()))
    assert shares[id(task.model.image_projection[1].weight)] == 1.0
    stages = [shares[id(p)] for name, p in task.model.image.named_parameters() if name.endswith("weight")]
    assert stages == sorted(stages)
    assert stages[0] < stages[-1] == 0.5


def test_features_of_frozen_towers_are_what_is_trained_on(drawings, tmp_path) -> None:
    from hardmix.models.build import build_model

    frozen = {"name": "small-cnn", "width": 4, "frozen": True, "checkpoint": str(tmp_path / "tower.pt")}
    tower = build_model("small-cnn", num_classes=0, in_channels=3, image_size=16, width=4)
    torch.save(tower.state_dict(), frozen["checkpoint"])
    model = MODEL | {"options": MODEL["options"] | {"image": frozen}}
    task = ImageText(pairs(drawings, model=model))
    assert task.inputs.shape == (40, task.model.image_projection[1].in_features)
    assert not list(task.model.image.parameters())
    run_recipe(pairs(drawings, model=model), tmp_path / "run")
    assert read(tmp_path / "run")["test"]["recall_10"] > 0
    with pytest.raises(ValueError, match="the image tower is frozen"):
        ImageText(pairs(drawings, model=model, data={"augment": ["crop"]}))


REFUSED = {
    "a set of another task": ({"data": {"name": "diabetes"}}, 'task is "image-text" but data.name is "diabetes"'),
    "a model of another": ({"model": {"name": "small-cnn"}}, "which takes images, but"),
    "an objective of another": ({"objective": {"name": "decoupled-mixup"}}, 'is not one of task "image-text"'),
    "an unknown one": ({"objective": {"name": "m2mix"}}, '"m2mix" is not an objective.*did you mean "m2-mix"'),
    "a tower": ({"model": {"name": "two-tower", "options": {"image": {"name": "resnet19"}}}}, "did you mean"),
    "an option": ({"model": {"name": "two-tower", "options": {"text": {"bucket": 3}}}}, 'did you mean "buckets"'),
    "mixtures without a policy": ({"objective": {"name": "i-mix"}}, "add a policy such as mixup"),
    "a policy without mixtures": ({"policy": {"name": "mixup"}}, "it goes with i-mix, un-mix"),
    "a head without a class": ({"tune": {"head": True}}, "tune.head trains a classifier"),
    "a probe without a head": ({"tune": {"probe_epochs": 1}}, "set tune.head=true"),
    "no start": ({"tune": {"after": "wise-ft"}}, "tune.start names none"),
    "no training": ({"train": {"epochs": 0, "warmup_epochs": 0.0}}, "tune.start; name one, or train"),
    "a part": ({"tune": {"freeze": ["images"]}}, 'did you mean "image"'),
    "an amount of nothing": ({"tune": {"amount": 0.5}}, "tune.after=nothing makes nothing of"),
    "a key of numbers": ({"data": {"missing": "drop"}}, "data.missing is for sets of numbers"),
    "a measure": ({"eval": {"parts": ["retrievel"]}}, 'did you mean "retrieval"'),
    "measures that there are none of": ({"eval": {"parts": ["arithmetic"]}}, "captions and model two-tower have none"),
    "nothing that is trained": (
        {"tune": {"freeze": ["image", "text", "image_projection", "text_projection"], "learn_temperature": False}},
        "tune leaves nothing to train",
    ),
    "a start of classes": ({"tune": {"start": "demo-none"}}, 'tune.start is .demo-none., of task "classification"'),
    "a start that hides its weights": ({"tune": {"start": "emoji-wise-ft"}}, "measures its weights after wise-ft"),
    "a contrast": ({"contrast": {"epochs": 1, "objective": {"name": "supcon"}}}, "sections of regression recipes"),
    "a setting of processes": ({"objective": {"name": "clip", "gather": False}}, 'unknown option of objective "clip"'),
}


@pytest.mark.parametrize(("sections", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_together_is_refused(sections, message, drawings) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        ImageText(pairs(drawings, **sections))


def test_tune_is_no_section_of_other_tasks() -> None:
    with pytest.raises(RecipeError, match="tune is a section of image-text recipes"):
        check_recipe({"name": "x", "tune": {"layer_decay": 0.5}}, "x")


def test_a_stop_while_the_start_is_trained_says_how_to_go_on(drawings, tmp_path, monkeypatch) -> None:
    (tmp_path / "first.toml").write_text(pairs(drawings, name="first").to_toml())
    recipe = pairs(drawings, name="tuned", tune={"start": str(tmp_path / "first.toml")})
    ticks = iter(range(10**9))
    monkeypatch.setattr("hardmix.train.loop.time.perf_counter", lambda: float(next(ticks)))
    with pytest.raises(Interrupted, match=r"stopped while training .*first.toml, .* the same command goes on"):
        run_recipe(recipe, tmp_path / "tuned", progress=stop_after(1))
    assert not (tmp_path / "tuned").exists()
    run_recipe(recipe, tmp_path / "tuned")
    assert "before" in read(tmp_path / "tuned")


def test_starts_that_are_none(drawings, scratch, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"tune.start is 'nowhere', neither the folder of a run nor a good recipe"):
        run_recipe(pairs(drawings, tune={"start": "nowhere"}), tmp_path / "a")
    other = MODEL | {"options": MODEL["options"] | {"features": 8}}
    with pytest.raises(CheckpointError, match=r"tune.start: image_projection.1.weight has shape \(16, .* but \(8, "):
        run_recipe(pairs(drawings, model=other, tune={"start": str(scratch)}), tmp_path / "b")
    half = tmp_path / "half"
    half.mkdir()
    (half / "recipe.toml").write_text(pairs(drawings).to_toml())
    with pytest.raises(RunError, match="a run that has not finished"):
        run_recipe(pairs(drawings, tune={"start": str(half)}), tmp_path / "c")


def test_own_sets_want_their_path_and_table(drawings) -> None:
    with pytest.raises(ValueError, match=r"name them \(--set data.path=FOLDER --set data.labels=TABLE\)"):
        ImageText(pairs())
    with pytest.raises(ValueError, match="labels is empty; name the table"):
        ImageText(pairs(data={"path": str(drawings)}))
    with pytest.raises(ValueError, match="tune wants classes, but captions has none"):
        ImageText(pairs(drawings, tune={"texts": "classes"}))
    with pytest.raises(ValueError, match="emoji comes with hardmix; leave path out"):
        ImageText(pairs(drawings, data={"name": "emoji", "labels": None}))
    with pytest.raises(ValueError, match='did you mean "noto"'):
        ImageText(pairs(data={"name": "emoji", "domain": "notto"}))


def test_a_recipe_reads_back_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(pairs(**EMOJI, tune={"freeze": ["text"]}).to_toml())
    assert load_recipe(str(path)) == pairs(**EMOJI, tune={"freeze": ["text"]})


def test_a_class_without_a_training_picture_leaves_out_the_few_shots(tmp_path) -> None:
    recipe = pairs(data=EMOJI["data"] | {"train_samples": 4}, train={"batch_size": 4}, eval={"parts": ["zeroshot"]})
    with pytest.warns(UserWarning, match="few shots are left out: no training picture shows"):
        run_recipe(recipe, tmp_path / "run")
    assert set(read(tmp_path / "run")["test"]) == {
        *("zeroshot", "zeroshot_ece", "shift_zeroshot", "shift_zeroshot_ece"),
    }


def test_the_teacher_of_carot_begins_as_the_model_does(drawings) -> None:
    task, before, after = steps(pairs(drawings, objective={"name": "carot"}))
    task.start_step(0.5, torch.Generator())
    teacher = task.objective.teacher.module.state_dict()
    name = "text_projection.1.weight"
    expected = 0.99 * before[name] + 0.01 * after[name]
    assert torch.allclose(teacher[name], expected, atol=1e-6)


def test_what_a_start_was_trained_on_is_not_tested(drawings, tmp_path) -> None:
    run_recipe(pairs(drawings), tmp_path / "first")
    more = pairs(drawings, data={"test": 0.6}, tune={"start": str(tmp_path / "first")})
    with pytest.raises(ValueError, match=r"which was trained on \d+ of the \d+ texts that captions is tested on here"):
        ImageText(more)
    # A run that starts from one that started from it knows as much.
    run_recipe(pairs(drawings, tune={"start": str(tmp_path / "first")}), tmp_path / "second")
    with pytest.raises(ValueError, match="which was trained on"):
        ImageText(pairs(drawings, data={"test": 0.6}, tune={"start": str(tmp_path / "second")}))
    ImageText(pairs(**EMOJI, tune={"start": str(tmp_path / "first")}))  # other pictures, whatever their texts


def test_a_split_of_ones_own_that_shares_texts_is_told(drawings, tmp_path) -> None:
    rows = [
        (number, "a thing" if number % 8 == 0 else thing, "test" if number % 3 == 0 else "train")
        for number, thing in enumerate(THINGS)
    ]
    with_splits(drawings, tmp_path, rows)
    with pytest.warns(UserWarning, match="1 of the texts of captions belong to pictures to train on"):
        task = ImageText(pairs(tmp_path))
    # The first text is what is looked for, so all pictures that have it are right.
    assert len(task.data.concept[::8].unique()) == 1


def test_texts_in_another_case_are_the_same_text(drawings, tmp_path) -> None:
    """A tower that reads lower case can't tell them apart: each would be a wrong answer to the other's search."""
    for path in drawings.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        rows.writerows([f"{number}.png", "a dog" if number % 2 else "A  Dog"] for number in range(4))
        rows.writerows([f"{number}.png", thing] for number, thing in enumerate(THINGS) if number >= 4)
    data = ImageText(pairs(tmp_path)).data
    assert len(data.concept[:4].unique()) == 1
    assert len(data.pairs.split[:4].unique()) == 1


def test_copies_of_a_picture_go_into_one_split_or_are_told(drawings, tmp_path) -> None:
    """As where each caption of a picture has a file of its own."""
    lines = []
    for number, thing in enumerate(THINGS):
        for copy in range(2):
            (tmp_path / f"{number}-{copy}.png").write_bytes((drawings / f"{number}.png").read_bytes())
            lines.append(f"{number}-{copy}.png,{thing} {copy}")
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *lines]) + "\n")
    split = ImageText(pairs(tmp_path)).data.pairs.split
    assert (split.view(-1, 2)[:, 0] == split.view(-1, 2)[:, 1]).all()
    assert len(split.unique()) == 3
    lines = [f"{line},{'test' if k in (1, 4, 5) else 'train'}" for k, line in enumerate(lines)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption,split", *lines]) + "\n")
    told = r"1 pictures of captions to test on are also trained on \('0-1.png', as '0-0.png'\); put a picture and its c"
    with pytest.warns(UserWarning, match=told):
        data = ImageText(pairs(tmp_path)).data
    held = data.rows["validation"].tolist()
    assert held
    assert {row ^ 1 for row in held} <= set(held)


def test_pictures_of_a_batch_with_the_same_captions_are_told(drawings, tmp_path) -> None:
    for path in drawings.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def write(kinds: int) -> None:
        lines = [f"{k}.png,kind {k % kinds},{'test' if k < 10 else 'train'}" for k in range(40)]
        (tmp_path / "captions.csv").write_text("\n".join(["file,caption,split", *lines]) + "\n")

    quiet = {"data": {"validation": 0.0}, "eval": {"checkpoint": "last"}}
    write(5)  # 6 of each to train on: 5 of the 29 others are equal, of 15 in a batch 15 * 5 / 29
    told = r"data: of the 15 other pictures of a batch 2\.6 on average have the same captions, and"
    with pytest.warns(UserWarning, match="belong to pictures to train on"), pytest.warns(UserWarning, match=told):
        ImageText(pairs(tmp_path, **quiet))
    write(20)  # 1 or 2 of each
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ImageText(pairs(tmp_path, **quiet))
    assert not any("of a batch" in str(w.message) for w in caught)


def test_examples_tell_all_pictures_that_have_the_text(drawings, tmp_path) -> None:
    rows = [(k, f"kind {k % 3}" if k < 9 else THINGS[k], ["test", "train"][k >= 9]) for k in range(20)]
    with_splits(drawings, tmp_path, rows)
    task = ImageText(pairs(tmp_path, data={"validation": 0.0}, eval={"checkpoint": "last"}))
    found = task.test(task.model, torch.device("cpu"))["examples"]
    assert len(found["texts"]) == 3
    for text, own, alike in zip(found["texts"], found["right"], found["alike"], strict=True):
        rows_of = {k for k in range(9) if f"kind {k % 3}" == text}
        assert own in alike
        assert {int(task.shown[place]) for place in alike} == rows_of & set(task.shown.tolist())


def test_validation_that_is_drawn_shares_no_text_with_training(drawings, tmp_path) -> None:
    parts = ["test" if number < 10 else "train" for number in range(len(THINGS))]
    rows = [
        (number, text, parts[number])
        for number, thing in enumerate(THINGS)
        for text in (thing, f"pair {parts[number]} {number // 2}")
    ]
    with_splits(drawings, tmp_path, rows)
    data = ImageText(pairs(tmp_path)).data
    train, held = (data.seen_texts(data.rows[split]) for split in ("train", "validation"))
    assert len(data.rows["validation"]) == 6
    assert not train & held


def test_a_run_needs_its_start_no_more_once_it_has_begun(drawings, tmp_path, monkeypatch) -> None:
    first = tmp_path / "first.toml"
    first.write_text(pairs(drawings, name="first").to_toml())
    tuned = pairs(drawings, tune={"start": str(first), "after": "wise-ft", "amount": 0.5})
    prepare_start(tuned)
    assert interrupted(tuned, tmp_path / "run", 2, monkeypatch) == 2
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    run_recipe(tuned, tmp_path / "run", resume=True)
    first.unlink()
    shutil.rmtree(tmp_path / "cache")
    assert evaluate_run(tmp_path / "run")["before"] == pytest.approx(read(tmp_path / "run")["before"])
    run_recipe(tuned, tmp_path / "again", resume=True)
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "run")
    assert read(tmp_path / "again")["before"] == read(tmp_path / "run")["before"]


def test_a_start_is_taken_as_it_was_measured(drawings, tmp_path) -> None:
    recipe = pairs(drawings, eval={"checkpoint": "best"}, train={"epochs": 6, "lr": 0.3, "warmup_epochs": 0.0})
    run_recipe(recipe, tmp_path / "first")
    run_recipe(pairs(drawings, tune={"start": str(tmp_path / "first")}), tmp_path / "second")
    assert read(tmp_path / "second")["before"] == read(tmp_path / "first")["test"]


@pytest.mark.parametrize("named", [True, False])
def test_starts_in_a_circle(named, drawings, tmp_path) -> None:
    model = MODEL if named else None
    for one, other in (("a", "b"), ("b", "a")):
        recipe = pairs(drawings, name=one).model_dump(mode="json", exclude_none=True)
        recipe["tune"]["start"] = str(tmp_path / f"{other}.toml")
        if not named:
            recipe.pop("model")
        (tmp_path / f"{one}.toml").write_text(tomli_w.dumps(recipe))
    with pytest.raises((RunError, RecipeError, ValueError), match=r"in a circle|starts from itself"):
        run_recipe(pairs(drawings, model=model, tune={"start": str(tmp_path / "a.toml")}), tmp_path / "run")


def test_recipes_that_measure_other_things_are_not_compared(drawings, tmp_path) -> None:
    recipes = [pairs(drawings, name=name, eval={"parts": [name]}) for name in ("retrieval", "geometry")]
    with pytest.raises(RecipeError, match="recipes measure other things"):
        compare(recipes, [0], tmp_path / "out", workers=1)


def test_each_measure_has_the_precision_of_the_run(drawings, tmp_path) -> None:
    run_recipe(pairs(drawings, train={"precision": "bf16"}), tmp_path / "run")
    ((_, lines),) = pair_tables(tmp_path / "run", task="geometry")
    assert dict(lines)["uniformity"] == f"{read(tmp_path / 'run')['test']['uniformity']:.4f}"


def test_lipsum_draws_its_words_from_captions_that_are_trained_on(emoji, monkeypatch) -> None:
    seen: list[str] = []
    task = ImageText(pairs(**EMOJI, tune={"head": True, "start": str(emoji)}, objective={"name": "lipsum"}))
    monkeypatch.setattr(task, "text_inputs", lambda texts: seen.extend(texts))
    task._lipsum()
    known = {word for row in task.data.rows["train"].tolist() for word in task.data.pairs.captions[row][0].split()}
    assert {word for text in seen for word in text.split()} <= known


def test_a_style_without_pictures_to_test_on_is_left_out(tmp_path) -> None:
    from hardmix.data.emoji import load_emoji

    known = load_emoji(("noto",), flags=False)
    assert known.split is not None
    for row in (known.split == 0).nonzero()[:3, 0].tolist():
        Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / f"{known.ids[row].rpartition('/')[2]}.png")
    data = {**EMOJI["data"], "styles": {"red": str(tmp_path)}}
    with pytest.warns(UserWarning, match="style red has too few pictures to test on, and is left out"):
        task = ImageText(pairs(data=data))
    assert "red" not in task.data.shifted
    assert "twemoji" in task.data.shifted


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"head": True, "probe_epochs": 2, "after": "tpgm"}, "from where a linear probe moves nothing"),
        ({"head": True, "texts": "classes"}, "so tune.texts makes no difference"),
    ],
)
def test_settings_of_a_head_that_would_do_nothing_are_refused(emoji, tune, words) -> None:
    with pytest.raises(RecipeError, match=words):
        pairs(**EMOJI, tune={"start": str(emoji), **tune}, objective={"name": "soft-cross-entropy"})
