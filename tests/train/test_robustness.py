"""Measuring how runs hold up: what is written, that it is repeatable, and that a run is only read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hardmix.data.splits import stratified_subset
from hardmix.metrics import classification_metrics
from hardmix.mixing import MixedTarget
from hardmix.terminal import print_lines
from hardmix.train import robustness
from hardmix.train.evaluate import evaluate_run, load_run
from hardmix.train.files import write_json
from hardmix.train.loop import run_recipe
from hardmix.train.robustness import (
    MEASURES,
    _largest_share,
    _OnPixels,
    _seen_by_policies,
    comparison_rows,
    robustness_of_comparison,
    robustness_of_run,
    rows,
)
from hardmix.train.seeds import generator

from .conftest import tiny

NAMES = {"plain": None, "mix": {"name": "mixup", "alpha": 1.0}}
#: long enough to have learnt something: 60 steps
TRAIN = {"epochs": 12, "warmup_epochs": 0.0, "log_every": 1, "checkpoint_every": 12}
CROSS_ENTROPY = {"name": "soft-cross-entropy"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """Two recipes on two seeds, as `hardmix compare` leaves them."""
    out = tmp_path_factory.mktemp("comparison")
    runs = []
    for name, policy in NAMES.items():
        for seed in (0, 1):
            folder = out / name / f"seed-{seed}"
            options = {"data": {"augment": []}, "train": TRAIN, "eval": {"every": 12}, "objective": CROSS_ENTROPY}
            recipe = tiny(name=name, policy=policy, seed=seed, **options)
            run_recipe(recipe, folder)
            runs.append({"name": name, "seed": seed, "folder": f"{name}/seed-{seed}"})
    write_json(out / "comparison.json", {"title": "two", "runs": runs})
    return out


@pytest.fixture(scope="module")
def mixed(comparison) -> Path:
    return comparison / "mix" / "seed-0"


@pytest.fixture(scope="module")
def result(mixed) -> dict:
    return robustness_of_run(mixed, samples=150)


def test_what_is_written_is_what_is_returned(mixed, result):
    assert json.loads((mixed / "robustness.json").read_text()) == json.loads(json.dumps(result))
    assert (result["name"], result["seed"], result["policy"], result["step"]) == ("mix", 0, "mixup", 60)
    assert result["data"] == {"name": "digits", "test": 150, "test_all": 355, "validation": 40, "train": 150}
    assert result["clean"] == result["occlusion"]["accuracy"][0]
    assert set(result["headline"]) == set(MEASURES)
    assert all(value is not None and math.isfinite(value) for value in result["headline"].values())
    assert list(result["corruptions"]["accuracy"]) == [
        "gaussian-noise", "gaussian-blur", "brightness", "contrast", "jpeg", "pixelate",
    ]  # fmt: skip
    assert all(len(values) == 5 for values in result["corruptions"]["accuracy"].values())


def test_calibration_is_of_the_whole_test_split(mixed, result):
    test = evaluate_run(mixed)["test"]
    before = result["calibration"]["before"]
    assert before["nll"] == pytest.approx(test["nll"], rel=1e-5)
    assert before["ece"] == pytest.approx(test["ece"], abs=1e-5)
    assert sum(before["reliability"]["count"]) == 355


def test_temperature_is_fitted_on_the_validation_split(mixed, result):
    run = load_run(mixed)
    held_out = run.task.validation_set
    with torch.no_grad():
        logits = run.model(run.task.normalize(held_out.batch(torch.arange(len(held_out))))).double()
    fitted = result["calibration"]["temperature"]
    nll = [
        classification_metrics((logits / (fitted * f)).softmax(1), held_out.labels)["nll"] for f in (0.97, 1.0, 1.03)
    ]
    assert nll[1] == min(nll)


def test_training_probe_says_what_the_mixed_accuracy_hides(mixed, result):
    training = result["training"]
    assert training["clean"] > training["mixed"]
    # Beta(1, 1): the larger of two shares is 3/4 on average, more where both labels are the same.
    assert 0.70 < training["ceiling"] < 0.85
    records = [json.loads(line) for line in (mixed / "metrics.jsonl").read_text().splitlines()]
    last = [r["accuracy"] for r in records if r["kind"] == "train" and r["step"] > 55]
    assert len(last) == 5
    assert training["logged"] == pytest.approx(sum(last) / len(last))
    assert training["validation"] == pytest.approx(records[-1]["top1"])


def test_largest_share_adds_up_a_label_that_is_there_twice():
    labels = torch.tensor([[0, 1, 0], [2, 1, 0], [4, 4, 4]])
    weights = torch.tensor([[0.25, 0.45, 0.3], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])
    assert _largest_share(MixedTarget(labels, weights)).tolist() == pytest.approx([0.55, 0.5, 1.0])


def test_the_same_run_twice_gives_the_same_bytes(mixed, result):
    before = (mixed / "robustness.json").read_bytes()
    others = {p: p.read_bytes() for p in mixed.rglob("*") if p.is_file() and p.name != "robustness.json"}
    torch.manual_seed(99)
    torch.rand(3)
    robustness_of_run(mixed, samples=150)
    assert (mixed / "robustness.json").read_bytes() == before
    assert all(path.read_bytes() == data for path, data in others.items())
    assert {p for p in mixed.rglob("*") if p.is_file()} == {*others, mixed / "robustness.json"}


def test_a_result_is_kept_only_if_it_is_of_the_same_checkpoint_and_samples(mixed, result, monkeypatch):
    def refuse(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr("hardmix.train.robustness.load_run", refuse)
    assert robustness_of_run(mixed, samples=150, keep=True) == json.loads((mixed / "robustness.json").read_text())
    for call in (
        lambda: robustness_of_run(mixed, samples=150),
        lambda: robustness_of_run(mixed, samples=149, keep=True),
        lambda: robustness_of_run(mixed, "59", samples=150, keep=True),
        lambda: robustness_of_run(mixed, "best", samples=150, keep=True),
    ):
        with pytest.raises(AssertionError, match="measured again"):
            call()


def test_rows_fit_a_table(result):
    table = rows(result)
    assert all(len(row) == 3 and all(isinstance(cell, str) for cell in row) for row in table)
    names = [row[0] for row in table]
    assert names[:3] == ["clean", "occlusion", "FGSM"]
    assert {"jpeg", "mixup: both in top 2", "calibration", "calibrated", "accuracy"} <= set(names)
    assert f"{100 * result['clean']:.1f}" in table[0][2]


def test_comparison_has_means_intervals_and_paired_tests(comparison, result):
    told = []
    got = robustness_of_comparison(comparison, samples=150, watch=lambda *event: told.append(event))
    assert got == json.loads((comparison / "robustness.json").read_text())
    assert told[0] == (0, 4, "plain seed 0")
    assert len(told) == 4
    assert got["seeds"] == [0, 1]
    assert got["measures"] == list(MEASURES)
    assert [row["name"] for row in got["table"]] == ["plain", "mix"]
    plain, mix = got["table"]
    single = [json.loads((comparison / "mix" / f"seed-{s}" / "robustness.json").read_text()) for s in (0, 1)]
    values = [run["headline"]["occluded"] for run in single]
    assert mix["measures"]["occluded"]["values"] == values
    assert mix["measures"]["occluded"]["mean"] == pytest.approx(sum(values) / 2)
    assert plain["versus_first"] is None
    test = mix["versus_first"]["occluded"]
    first = plain["measures"]["occluded"]["values"]
    assert test["difference"] == pytest.approx((values[0] - first[0] + values[1] - first[1]) / 2)
    assert test["p_holm"] == test["p"]  # one comparison
    heads, lines = comparison_rows(got)
    assert heads == ["measure", "plain", "mix"]
    assert [line[0] for line in lines] == [measure.label for measure in MEASURES.values()]
    assert lines[1][2].startswith(f"{50 * sum(values):.1f} +-")
    curve = mix["curves"]["occlusion"]
    assert curve["x"] == single[0]["occlusion"]["rates"]
    assert curve["mean"][3] == pytest.approx(sum(run["occlusion"]["accuracy"][3] for run in single) / 2)
    assert curve["low"][3] <= curve["mean"][3] <= curve["high"][3]


def test_no_validation_split_means_no_temperature(tmp_path):
    recipe = tiny(data={"validation": 0.0}, policy=None, objective=CROSS_ENTROPY, train={"epochs": 1})
    run_recipe(recipe, tmp_path / "run")
    got = robustness_of_run(tmp_path / "run", samples=60)
    assert got["calibration"]["temperature"] is got["calibration"]["after"] is got["training"]["validation"] is None
    assert got["headline"]["ece_scaled"] is None
    assert got["training"]["ceiling"] == 1.0  # nothing is mixed
    assert "calibrated" not in [row[0] for row in rows(got)]


def test_a_policy_that_mixes_hidden_layers_is_not_asked_in_evaluation_mode(tmp_path):
    policy = {"name": "manifold-mixup", "layers": ["stage1"]}
    recipe = tiny(policy=policy, objective=CROSS_ENTROPY, train={"epochs": 1})
    run_recipe(recipe, tmp_path / "run")
    got = robustness_of_run(tmp_path / "run", samples=60)
    assert got["training"]["mixed"] is got["headline"]["train_mixed"] is None
    assert 0.5 < got["training"]["ceiling"] < 1.0


@pytest.mark.parametrize(
    "policy",
    [
        {"name": "transmix", "attention": 1.0},
        {"name": "tokenmix"},
        {"name": "sumix", "policy": {"name": "cutmix"}, "scale": 100.0},
        {"name": "random-choice", "policies": [{"name": "tokenmix"}, {"name": "cutmix"}]},
    ],
    ids=lambda policy: policy["name"],
)
def test_the_ceiling_is_that_of_the_labels_that_are_trained_with(tmp_path, monkeypatch, policy):
    """Against the same draws, made and weighed as a step of the training does it."""
    model = {"name": "tiny-vit", "options": {"patch": 2, "dim": 16, "depth": 3, "heads": 2}}
    recipe = tiny(policy=policy, model=model, data={"augment": []}, objective=CROSS_ENTROPY, train={"epochs": 1})
    run_recipe(recipe, tmp_path / "run")
    run = load_run(tmp_path / "run")
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.mul_(4.0)  # so that it attends to something
    monkeypatch.setattr(robustness, "load_run", lambda *args: run)
    got = robustness_of_run(tmp_path / "run", samples=96)["training"]
    task = run.task
    index = stratified_subset(task.train_set.labels, 96, seed=0)
    images, labels = task.train_set.batch(index), task.train_set.labels[index]
    run.model.train()
    drawn, weighed, right = [], [], []
    for part, at in enumerate(torch.randperm(96, generator=generator(0, "probe")).split(32)):
        x, target = task.policy(images[at].float() / 255, labels[at], generator=generator(0, "probe-mix", part))
        drawn.append(_largest_share(target))
        with torch.no_grad():
            logits = task.on_pixels(x)
        target = task.policy.relabel(logits, target)
        task.policy.disarm()
        weighed.append(_largest_share(target))
        right.append(((target.labels == logits.argmax(1)[:, None]) * target.weights).sum(1))
    assert got["ceiling"] == pytest.approx(torch.cat(weighed).mean().item(), abs=1e-5)
    assert got["mixed"] == pytest.approx(torch.cat(right).mean().item(), abs=1e-5)
    assert abs(got["ceiling"] - torch.cat(drawn).mean().item()) > 3e-3


def test_the_probe_reads_the_model_without_a_trace():
    """In the mode in which policies read it, but with its parts in evaluation mode; and as it was afterwards."""
    body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    modes = []
    body.register_forward_hook(lambda module, args, output: modes.append(module.training))
    task = SimpleNamespace(normalize=nn.Identity(), recipe=SimpleNamespace(train=SimpleNamespace(channels_last=False)))
    model = _OnPixels(SimpleNamespace(model=body, task=task)).eval()
    x = torch.rand(3, 1, 2, 2)
    expected = model(x)
    before = [value.clone() for value in body.state_dict().values()]
    assert torch.equal(_seen_by_policies(model, x), expected)
    assert modes == [False, True]
    assert not any(module.training for module in model.modules())
    assert all(map(torch.equal, body.state_dict().values(), before))


def test_values_stand_below_what_they_are_measured_at(result, monkeypatch, capsys):
    """In a pipe, which has no width of its own to wrap at."""
    monkeypatch.setenv("COLUMNS", "80")
    table = rows(result)
    print_lines(("measure", "over", "values"), table)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(table) + 1
    at = printed[0].index("values")
    for line, (name, over, values) in zip(printed[1:], table, strict=True):
        assert line.startswith(name)
        assert over in line
        assert line[at:].rstrip() == values.rstrip()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda f: robustness_of_run(f, samples=0), ValueError, "samples is 0"),
        (lambda f: robustness_of_run(f, samples=9), ValueError, "robustness: samples is 9, fewer than the 10 classes"),
        (lambda f: robustness_of_run(f, "newest"), ValueError, 'pass "last", "best" or a step number'),
        (lambda f: robustness_of_comparison(f), OSError, "comparison.json"),
    ],
)
def test_bad_inputs_are_named(mixed, call, error, text):
    with pytest.raises(error, match=text):
        call(mixed)


def test_a_comparison_measures_what_its_recipes_choose(comparison, tmp_path, monkeypatch):
    shutil.copytree(comparison, tmp_path / "two", ignore=shutil.ignore_patterns(robustness.FILE))
    for seed in (0, 1):
        file = tmp_path / "two" / "mix" / f"seed-{seed}" / "recipe.toml"
        text = file.read_text()
        assert text.count('checkpoint = "last"') == 1
        file.write_text(text.replace('checkpoint = "last"', 'checkpoint = "best"'))
    asked, measure = [], robustness_of_run

    def record(folder, checkpoint, *rest, **options):
        asked.append((folder.parent.name, checkpoint))
        return measure(folder, checkpoint, *rest, **options)

    monkeypatch.setattr(robustness, "robustness_of_run", record)
    robustness_of_comparison(tmp_path / "two", samples=20)
    assert set(asked) == {("plain", "last"), ("mix", "best")}


def test_a_comparison_reads_only_its_own_folders(comparison, tmp_path):
    for runs, text in (
        ([{"name": "a", "seed": 0, "folder": str(comparison / "mix" / "seed-0")}], "which is outside"),
        ([{"name": "a", "seed": 0, "folder": "../elsewhere"}], "which is outside"),
        ([], "lists no runs"),
    ):
        write_json(tmp_path / "comparison.json", {"runs": runs})
        with pytest.raises(ValueError, match=text):
            robustness_of_comparison(tmp_path)


def test_what_two_classes_decide_is_not_measured(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "certain", lambda metric, classes: metric.endswith("_both"))
    shutil.copytree(comparison, tmp_path / "two", ignore=shutil.ignore_patterns(robustness.FILE))
    result = robustness_of_comparison(tmp_path / "two", samples=20)
    assert result["measures"]
    assert not any(key.endswith("_both") for key in result["measures"])
    assert all(list(row["curves"]) == ["occlusion"] for row in result["table"])
    one = json.loads((tmp_path / "two/mix/seed-0" / robustness.FILE).read_text())
    assert not any("both" in name for name, _, _ in rows(one))
