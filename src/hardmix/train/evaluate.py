"""Measure a trained run again from one of its checkpoints."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hardmix._files import from_home
from hardmix.train.few_data import on_own_split
from hardmix.train.recipe import load_recipe
from hardmix.train.state import load_checkpoint, match_shapes, measured_weights
from hardmix.train.tasks import TASKS
from hardmix.train.tasks.classification import Classification


class LoadedRun(NamedTuple):
    """A trained run: its task with a checkpoint's weights, the model in evaluation mode on its device, the step."""

    task: Any  # one of TASKS
    model: nn.Module
    device: torch.device
    step: int

    def precision(self) -> AbstractContextManager[None]:
        """The arithmetic of the training, in which it was measured at its end."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.task.recipe.train.precision)
        return torch.autocast(self.device.type, low, enabled=low is not None)


def load_run(folder: Path, which: str = "last", data_path: str = "") -> LoadedRun:
    """A run folder's checkpoint, with the averaged weights where the recipe keeps them.

    Args:
        folder: run folder with recipe.toml and checkpoints/.
        which: "last", "best" or a step number.
        data_path: where the data set is, if it has moved since the training.

    Raises:
        FileNotFoundError: the data are not where they were.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if which not in ("last", "best") and not which.isdigit():
        raise ValueError(f'eval: --checkpoint is {which!r}; pass "last", "best" or a step number.')
    overrides = [f"data.path={data_path}"] if data_path else []
    recipe = load_recipe(str(folder / "recipe.toml"), overrides)
    if recipe.data.path and not data_path and not os.path.exists(from_home(recipe.data.path)):
        raise FileNotFoundError(
            f"eval: {folder} was trained on data.path = {recipe.data.path!r}, which is not there; pass where it is now "
            "as --data-path, or call from where that path leads to it."
        )
    saved = load_checkpoint(folder / "checkpoints", which)
    task = TASKS[recipe.task](on_own_split(recipe, folder), pretrained=False)
    if isinstance(task, Classification):
        task.check_files(folder)
        task.make_room(folder)
    weights = measured_weights(saved.tensors)
    for name, module in task.modules().items():  # first, since a tokenizer knows best why weights don't fit
        if name in saved.tensors:
            module.load_state_dict(saved.tensors[name])
    measured = task.network if isinstance(task, Classification) and "ema" in saved.tensors else task.model
    match_shapes("eval", measured, weights)
    measured.load_state_dict(weights)
    if recipe.train.channels_last and task.layout is not None:  # as in training: sums are rounded in the same order
        task.model.to(memory_format=task.layout)  # type: ignore[call-overload]
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.train.device == "auto" else "cpu")
    return LoadedRun(task, task.to(device).model.eval(), device, saved.state["step"])


def chosen_checkpoint(folder: Path) -> str:
    """Which checkpoint the recipe of a run is measured at: "last" or "best"."""
    return load_recipe(str(folder / "recipe.toml")).eval.checkpoint


def evaluate_run(folder: Path, which: str = "last", data_path: str = "") -> dict[str, Any]:
    """Test metrics of a run folder's checkpoint. Arguments as for `load_run`.

    Returns:
        {"name", "step", "data": what summary.json says of it, "test": {...}, "reliability": {...}}
    """
    run = load_run(folder, which, data_path)
    about = {"name": run.task.recipe.name, "step": run.step, "data": run.task.describe()["data"]}
    with run.precision():
        return {**about, **run.task.test(run.model, run.device)}
