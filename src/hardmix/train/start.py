"""The weights that an image-text run starts from: those of another run, which is trained once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix import __version__
from hardmix.data.cache import cache_folder
from hardmix.distributed import from_first
from hardmix.models.lora import merged
from hardmix.train.errors import Interrupted, RunError
from hardmix.train.recipe import Recipe, start_recipe
from hardmix.train.state import load_checkpoint, measured_weights

#: folders of starts that are being trained, each for the one before it
_PREPARING: list[Path] = []


def start_folder(recipe: Recipe) -> Path | None:
    """The run folder of `tune.start`; of a recipe that is trained for it, one in the cache; None without a start."""
    start = recipe.tune.start
    if not start:
        return None
    if (Path(start) / "recipe.toml").is_file():
        return Path(start)
    before = start_recipe(start, recipe.task)
    # Defaults that a recipe does not write out belong to a version.
    content = json.dumps([__version__, _from_root(before.model_dump(mode="json"))], sort_keys=True)
    return cache_folder("runs") / f"{before.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _from_root(section: dict[str, Any]) -> dict[str, Any]:
    """A recipe's sections with whole paths: where another project has such a recipe, it means other files."""
    whole: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            whole[key] = _from_root(value)
        elif key in ("path", "checkpoint") and isinstance(value, str) and value:
            whole[key] = os.path.abspath(os.path.expanduser(value))
        else:
            whole[key] = value
    return whole


def kept_starts(recipes: Iterable[Recipe]) -> dict[Path, float]:
    """Folders in the cache that runs of these recipes will start from as they are, and when each was finished.

    They are known by their recipes: files that have changed since, under the same names, are not noticed.
    """
    named = {start_folder(recipe) for recipe in recipes if not (Path(recipe.tune.start) / "recipe.toml").is_file()}
    finished = sorted(folder / "summary.json" for folder in named if folder and (folder / "summary.json").is_file())
    return {summary.parent: summary.stat().st_mtime for summary in finished}


def prepare_start(recipe: Recipe, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Train the recipe that `tune.start` names, unless that has been done; all processes call it alike."""
    from hardmix.train.loop import run_recipe

    start = recipe.tune.start
    if not start:
        return
    before, folder = start_recipe(start, recipe.task), start_folder(recipe)
    assert folder is not None
    # One process looks: another run may finish the start just now.
    if from_first((folder / "summary.json").is_file()):
        return
    if folder == Path(start):
        raise RunError(
            f"tune.start is {start}, a run that has not finished; go on with it first: hardmix run --resume {start}"
        )
    if folder in _PREPARING:
        raise RunError(f"tune.start is {start}, which starts from itself; name another one.")
    if recipe.task == "few-labels":
        from hardmix.train.few_start import check_start  # it reads starts

        check_start(recipe)
    _PREPARING.append(folder)
    try:
        run_recipe(before, folder, resume=True, progress=progress)
    except Interrupted as stopped:
        message = f"stopped while training {start}, which tune.start names; the same command goes on."
        raise Interrupted(message, stopped.signum) from None
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"tune.start is {start}, whose own data are missing ({str(error).rstrip('.')}); where they lie elsewhere, "
            "set data.path in a copy of that recipe and let tune.start name the copy."
        ) from None
    except ValueError as error:
        raise ValueError(f"tune.start is {start}, which can't be trained as it is: {error}") from None
    finally:
        _PREPARING.pop()


class Kept(nn.Module):
    """Tensors that a checkpoint keeps as they are, by whatever names: of the run that this one started from.

    Weights that training began with, which "before", WiSE-FT, TPGM and Lipsum-FT need after the start may be gone or
    another one; and hashes of the texts that training has seen.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.tensors = dict(tensors or {})

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return dict(self.tensors)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self.tensors = dict(state_dict)


def hashed(texts: Iterable[str]) -> Tensor:
    """Ascending int64 hashes of texts."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor(sorted(int.from_bytes(digest, "little", signed=True) for digest in digests), dtype=torch.long)


def start_tensors(recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    """The model's tensors that the run which `tune.start` names was measured with, adapters merged, and hashes of the
    texts that it was trained on."""
    folder = start_folder(recipe)
    assert folder is not None
    which = start_recipe(recipe.tune.start, recipe.task).eval.checkpoint
    tensors = load_checkpoint(folder / "checkpoints", which).tensors
    seen = tensors.get("seen", {}).get("texts", torch.arange(0))
    return merged(measured_weights(tensors)), seen
