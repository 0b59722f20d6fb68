"""Every algorithm for few labels by its name in a recipe: it trains, its state is in the checkpoint, and it resumes."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hardmix import tables
from hardmix.train.errors import Interrupted, RecipeError
from hardmix.train.evaluate import evaluate_run
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import check_recipe
from hardmix.train.state import load_checkpoint
from hardmix.train.tasks.few_labels import FewLabels

from .test_few_labels import recipe

TRANSFER = ("fine-tuning", "bss", "co-tuning", "self-tuning")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A classifier of five digits' worth of steps to start from."""
    table = {
        "name": "before",
        "data": {"name": "digits", "train_samples": 200, "augment": []},
        "model": {"name": "small-cnn", "options": {"width": 4}},
        "train": {"epochs": 1, "batch_size": 50, "warmup_epochs": 0, "threads": 1},
    }
    folder = tmp_path_factory.mktemp("start") / "run"
    run_recipe(check_recipe(table, "before"), folder)
    return folder


def plan(name, start, *, pairs=False):
    sections = {"semi": {"algorithm": {"name": name}, "mu": 2, "steps_per_epoch": 3, "per_class": 2}}
    if name in TRANSFER:
        sections["tune"] = {"start": str(start)}
    if name == "self-tuning":
        sections["semi"]["algorithm"] |= {"dim": 8, "queue": 4}
    if pairs:
        sections["policy"] = {"name": "mixup"}
        sections["objective"] = {"name": "decoupled-mixup", "eta": 1.0, "asymmetric": True}
        sections["semi"] |= {"pair_ramp": 0.0, "pair_confident": False}
    return recipe(**sections)


@pytest.mark.parametrize("name", tables.ALGORITHMS)
def test_it_trains_and_a_stopped_run_goes_on_bit_exactly(name, start, tmp_path, monkeypatch):
    chosen = plan(name, start)
    summary = run_recipe(chosen, tmp_path / "whole")
    assert summary["objective"] == name
    after, done = FewLabels.end_step, []

    def stop(task):
        after(task)
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(FewLabels, "end_step", stop)
        with pytest.raises(Interrupted):
            run_recipe(chosen, tmp_path / "parts")
    assert run_recipe(chosen, tmp_path / "parts", resume=True)["test"] == summary["test"]
    one, two = (load_checkpoint(tmp_path / place / "checkpoints", "last").tensors for place in ("whole", "parts"))
    for group in one:
        assert all(torch.equal(value, two[group][key]) for key, value in one[group].items()), group
    assert evaluate_run(tmp_path / "parts")["test"] == summary["test"]


@pytest.mark.parametrize("name", [name for name in tables.ALGORITHMS if tables.takes_pairs(name)])
def test_pairs_change_what_it_learns(name, start, tmp_path):
    run_recipe(plan(name, start), tmp_path / "plain")
    summary = run_recipe(plan(name, start, pairs=True), tmp_path / "pairs")
    assert summary["objective"] == f"{name} + decoupled-mixup"
    one, two = (
        load_checkpoint(tmp_path / place / "checkpoints", "last").tensors["model"] for place in ("plain", "pairs")
    )
    assert any(not torch.equal(value, two[key]) for key, value in one.items())
    assert '"loss_pair"' in (tmp_path / "pairs" / "metrics.jsonl").read_text()


def test_those_of_the_paper_take_pairs():
    with_pairs = {name for name in tables.ALGORITHMS if tables.takes_pairs(name)}
    assert {"fixmatch", "flexmatch", "mixmatch", "fine-tuning", "co-tuning", "self-tuning"} <= with_pairs


def test_co_tuning_starts_from_the_classifier_of_the_start(start):
    task = FewLabels(plan("co-tuning", start))
    before = load_checkpoint(start / "checkpoints", "last").tensors["model"]
    assert torch.equal(task.algorithm.source.weight, before["head.linear.weight"])
    torch.testing.assert_close(task.algorithm.relationship.sum(1), torch.ones(10))
    assert not torch.equal(task.network.get_submodule("head.linear").weight, before["head.linear.weight"])


def test_what_an_algorithm_lacks_is_told(start):
    with pytest.raises(RecipeError, match="co-tuning"):
        recipe(semi={"algorithm": {"name": "co-tuning"}})
    with pytest.raises(RecipeError, match='algorithm "mean-teacher" mixes no pairs'):
        recipe(semi={"algorithm": {"name": "mean-teacher"}}, policy={"name": "mixup"})
    with pytest.raises(RecipeError, match="unknown option"):
        recipe(semi={"algorithm": {"name": "self-tuning", "model": "resnet18"}})
