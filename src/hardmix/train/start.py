"""The weights that an image-text run starts from: those of another run, which is trained once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hardmix import __version__
from hardmix.data.cache import cache_folder
from hardmix.distributed import from_first
from hardmix.models.lora import merged
from hardmix.train.errors import Interrupted, RunError
from hardmix.train.recipe import Recipe, load_recipe
from hardmix.train.state import load_checkpoint


def start_folder(recipe: Recipe) -> Path | None:
    """The run folder of `tune.start`; of a recipe that is trained for it, one in the cache; None without a start."""
    start = recipe.tune.start
    if not start:
        return None
    if (Path(start) / "recipe.toml").is_file():
        return Path(start)
    before = load_recipe(start)
    # Defaults that a recipe does not write out belong to a version.
    content = json.dumps([__version__, before.model_dump(mode="json")], sort_keys=True)
    return cache_folder("runs") / f"{before.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def prepare_start(recipe: Recipe, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Train the recipe that `tune.start` names, unless that has been done; all processes call it alike."""
    from hardmix.train.loop import run_recipe

    folder = start_folder(recipe)
    # One process looks: another run may finish the start just now.
    if folder is None or from_first((folder / "summary.json").is_file()):
        return
    if (Path(recipe.tune.start) / "recipe.toml").is_file():
        raise RunError(
            f"tune.start is {recipe.tune.start}, a run that has not finished; go on with it first: hardmix run "
            f"--resume {recipe.tune.start}"
        )
    try:
        run_recipe(load_recipe(recipe.tune.start), folder, resume=True, progress=progress)
    except Interrupted as stopped:
        message = f"stopped while training {recipe.tune.start}, which tune.start names; the same command goes on."
        raise Interrupted(message, stopped.signum) from None


def start_weights(recipe: Recipe) -> dict[str, Tensor]:
    """The model's tensors at the end of the run that `tune.start` names, adapters merged."""
    folder = start_folder(recipe)
    assert folder is not None
    tensors = load_checkpoint(folder / "checkpoints", "last").tensors
    if "ema" not in tensors:
        return merged(tensors["model"])
    prefix = "module."
    ema = {name.removeprefix(prefix): value for name, value in tensors["ema"].items() if name.startswith(prefix)}
    return merged(ema)
