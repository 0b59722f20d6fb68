"""Every policy by its name in a recipe: it trains with each objective, and what it learns is in the checkpoint."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hardmix import tables
from hardmix.train.errors import Interrupted, RecipeError
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe, check_recipe
from hardmix.train.robustness import robustness_of_run
from hardmix.train.state import load_checkpoint
from hardmix.train.tasks.classification import Classification

VIT = {"name": "tiny-vit", "options": {"dim": 16, "depth": 3, "heads": 2, "patch": 4}}
CNN = {"name": "small-cnn", "options": {"width": 4}}
#: what a recipe has to say, or says so that small images do
SAYS: dict[str, dict[str, Any]] = {
    "manifold-mixup": {"layers": ["stage1"]},
    "attentivemix": {"layer": "stage1", "grid": 4},
    "random-choice": {"policies": [{"name": "mixup"}, {"name": "automix"}]},
    "scheduled": {"policy": {"name": "puzzlemix", "blocks": [2]}, "stop": 0.5},
    "sumix": {"policy": {"name": "cutmix"}},
    "puzzlemix": {"blocks": [2, 4]},
    "supermix": {"steps": 3},
}
LEARNT = ("automix", "samix", "adautomix", "sumix")


def recipe(policy: str, objective: str = "soft-cross-entropy", **train: Any) -> Recipe:
    table = {
        "name": "policy",
        "data": {"name": "digits", "train_samples": 80, "image_size": 16, "validation": 0.0, "augment": []},
        "model": VIT if policy in tables.NEEDS_ATTENTION else CNN,
        "policy": {"name": policy, **SAYS.get(policy, {})},
        "objective": {"name": objective},
        "train": {"epochs": 2, "batch_size": 20, "warmup_epochs": 0, "threads": 1, "log_every": 1, **train},
        "eval": {"every": 2},
    }
    return check_recipe(table, "policy")


@pytest.mark.parametrize("objective", tables.OBJECTIVES)
@pytest.mark.parametrize("policy", tables.POLICIES)
def test_a_step_with_each_objective(policy: str, objective: str) -> None:
    torch.manual_seed(0)
    task = Classification(recipe(policy, objective))
    assert task.policy is not None
    task.model.train()
    for step in range(2):
        task.start_step(step / 2)
        loss, logged = task.loss(task.model, task.load(torch.arange(20)), torch.Generator().manual_seed(step))
        assert loss.isfinite()
        assert 0.0 <= float(logged["accuracy"]) <= 2.0
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())
        assert any(p.grad is not None and p.grad.any() for p in task.model.parameters())
        for parameter in task.policy.parameters():
            if parameter.requires_grad and policy in LEARNT:
                assert parameter.grad is not None
        task.model.zero_grad()
        task.policy.zero_grad()
        task.end_step()


@pytest.mark.parametrize(
    "policy", ["automix", "adautomix", "sumix", "tokenmix", "puzzlemix", "co-mixup", "random-choice"]
)
def test_a_stopped_run_goes_on_bit_exactly(policy: str, tmp_path, monkeypatch) -> None:
    chosen = recipe(policy, "decoupled-mixup")
    run_recipe(chosen, tmp_path / "whole")
    after, done = Classification.end_step, []

    def stop(task: Classification) -> None:
        after(task)
        done.append(1)
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "end_step", stop)
        with pytest.raises(Interrupted, match="stopped at step 5"):
            run_recipe(chosen, tmp_path / "parts")
    run_recipe(chosen, tmp_path / "parts", resume=True)
    one, two = (load_checkpoint(tmp_path / name / "checkpoints", "last").tensors for name in ("whole", "parts"))
    assert set(one) == set(two)
    assert ("policy" in one) == (policy in (*LEARNT, "random-choice"))
    for group, tensors in one.items():
        assert all(torch.equal(value, two[group][name]) for name, value in tensors.items()), group


@pytest.mark.parametrize("policy", LEARNT)
def test_what_a_policy_learns_moves(policy: str, tmp_path) -> None:
    chosen = recipe(policy)
    begun = Classification(chosen)
    assert begun.policy is not None
    before = {name: value.clone() for name, value in begun.policy.named_parameters() if value.requires_grad}
    assert before
    run_recipe(chosen, tmp_path / "run")
    after = load_checkpoint(tmp_path / "run" / "checkpoints", "last").tensors["policy"]
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_parts_of_a_batch_leave_accumulated_gradients_alone() -> None:
    """A saliency pass between two backwards must not touch what the first one left."""
    task = Classification(recipe("puzzlemix", accumulate=2))
    task.model.train()
    batch = task.load(torch.arange(20))
    loss, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    loss.backward()
    kept = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    statistics = {name: value.clone() for name, value in task.model.named_buffers()}
    assert task.policy is not None
    task.policy(task._pixels(batch[0]), batch[1], generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(p.grad, kept[name]) for name, p in task.model.named_parameters())
    assert all(torch.equal(value, statistics[name]) for name, value in task.model.named_buffers())


@pytest.mark.parametrize("policy", [*sorted(tables.NEEDS_MODEL - {"manifold-mixup"}), "gradient"])
def test_numbers_have_no_policy_that_looks_at_classes(policy: str) -> None:
    says = {"name": policy, **SAYS.get(policy, {})}
    if policy == "gradient":
        says = {"name": "saliencymix", "saliency": "input-gradient"}
    table = {
        "name": "numbers",
        "task": "regression",
        "data": {"name": "pictures", "path": "x"},
        "model": {"name": "small-cnn"},
        "objective": {"name": "regression"},
        "policy": says,
    }
    with pytest.raises(RecipeError, match="looks at a model of classes; it is not for numbers"):
        check_recipe(table, "numbers")


def test_the_time_of_a_step_is_not_that_of_evaluations(tmp_path, monkeypatch) -> None:
    """A slow evaluation changes what a run takes, not what a step takes."""
    validate = Classification.validate

    def slow(task: Classification, *args: Any) -> dict[str, float]:
        time.sleep(0.5)
        return validate(task, *args)

    monkeypatch.setattr(Classification, "validate", slow)
    seconds = run_recipe(recipe("mixup"), tmp_path / "run")["seconds"]
    assert seconds["train"] >= 0.5
    assert seconds["per_step"] * 8 < seconds["train"] - 0.4


@pytest.mark.parametrize("policy", ["automix", "sumix"])
def test_what_a_policy_learns_is_clipped_by_itself(policy: str, tmp_path, monkeypatch) -> None:
    """The same bound for the policy as for the model, and neither's norm in the other's."""
    move, tasks, norms = Classification.to, [], []

    def keep(task: Classification, device: torch.device) -> Classification:
        tasks.append(task)
        return move(task, device)

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for part in (tasks[-1].model, tasks[-1].policy):
            grads = [p.grad.flatten() for p in part.parameters() if p.grad is not None]
            norms.append(torch.cat(grads).norm().item())

    monkeypatch.setattr(Classification, "to", keep)
    handle = register_optimizer_step_pre_hook(look)
    try:
        for bound in (0.0, 1e-4):
            run_recipe(recipe(policy, clip_norm=bound), tmp_path / str(bound))
    finally:
        handle.remove()
    free, clipped = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert min(free) > 1.1e-4
    assert clipped == pytest.approx([1e-4] * len(clipped), rel=1e-2)


@pytest.mark.parametrize("policy", ["transmix", "random-choice", "sumix"])
def test_a_run_is_asked_about_its_training_without_a_step(policy: str, tmp_path) -> None:
    """Draws that no training forward follows are taken back."""
    says = {
        "transmix": {},
        "sumix": {"policy": {"name": "cutmix"}},
        "random-choice": {"policies": [{"name": "tl-align"}]},
    }
    table = recipe("transmix", epochs=1).model_dump(mode="json", exclude_none=True)
    chosen = check_recipe({**table, "policy": {"name": policy, **says[policy]}}, "policy")
    run_recipe(chosen, tmp_path / "run")
    found = robustness_of_run(tmp_path / "run", samples=60)
    assert 0.0 <= found["training"]["mixed"] <= found["training"]["ceiling"]
