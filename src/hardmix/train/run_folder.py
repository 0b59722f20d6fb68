"""The folder of a run: whether it may be trained into, its first files, its summary, whose its checkpoints are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from hardmix.train.errors import CheckpointError, RunError
from hardmix.train.recipe import Recipe, load_recipe
from hardmix.train.state import Checkpoint


@contextmanager
def first_files(folder: Path) -> Iterator[None]:
    """What the system has against the first files of a run is told with the folder's name."""
    try:
        yield
    except OSError as error:
        begun = (folder / "recipe.toml").is_file()
        again = f"go on with: hardmix run --resume {folder}" if begun else "start it again."
        raise RunError(
            f"{folder} could not be written into ({error.strerror or error}); make room or mend the permissions, then "
            f"{again}"
        ) from None


def read_summary(folder: Path) -> dict[str, Any]:
    """What a finished run was measured at.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text("utf-8"))
    except ValueError:
        summary = None
    if not isinstance(summary, dict) or not isinstance(summary.get("test"), dict):
        raise RunError(
            f"{path} is damaged; delete it, and hardmix run --resume {folder} writes it again from the checkpoint."
        )
    return summary


def problem_with(recipe: Recipe, folder: Path, resume: bool) -> str | None:
    """Why this folder can't be trained into: it has to be new, or to hold this very recipe and be resumed."""
    before = folder / "recipe.toml"
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file; choose another --out."
    if not before.is_file():
        # A start that was killed may have left a file aside; that is not somebody's work.
        if folder.is_dir() and any(path.name != ".recipe.toml.part" for path in folder.iterdir()):
            return f"{folder} is not empty and holds no run; choose another --out."
        return None
    if not resume:
        return _taken(recipe, folder)
    if changed := _changed(recipe, before):
        return (
            f"{folder} holds a run of another recipe ({', '.join(changed[:5])} differ); "
            "choose another --out, or resume it without changes."
        )
    return None


def _taken(recipe: Recipe, folder: Path) -> str:
    """What kind of run is there already, and where a new one could go."""
    try:
        changed = _changed(recipe, folder / "recipe.toml")
    except (OSError, ValueError):  # of another version, or damaged; that it is there is all that counts
        changed = []
    other = f", of another recipe ({', '.join(changed[:5])} differ)" if changed else ""
    place = folder.resolve() if folder.name in ("", "..") else folder
    free = next(path for n in count(2) if not (path := place.parent / f"{place.name}-{n}").exists())
    if (folder / "summary.json").is_file():
        return f"{folder} already holds a run that is finished{other}; pass another --out, such as {free}."
    return (
        f"{folder} already holds a run that is not finished{other}; go on with hardmix run --resume {folder}, or pass "
        f"another --out, such as {free}."
    )


def _changed(recipe: Recipe, before: Path) -> list[str]:
    """Keys that differ from a saved recipe's, as resolved ones: a key that a newer version adds with a default does
    not."""
    known, wanted = (flat(r.model_dump()) for r in (load_recipe(str(before)), recipe))
    return sorted(key for key in known.keys() | wanted.keys() if known.get(key) != wanted.get(key))


def check_origin(saved: Checkpoint, recipe: Recipe, accelerator: Any) -> None:
    """A checkpoint that was copied from another run fits its shapes at best."""
    # What only one of them says is a key that another version knows.
    before, now = (flat(r) for r in (saved.state["recipe"], recipe.model_dump(mode="json", exclude_none=True)))
    if changed := sorted(key for key in before.keys() & now.keys() if before[key] != now[key]):
        raise CheckpointError(
            f"checkpoint {saved.folder} is of a run with other settings ({', '.join(changed[:5])}); delete that "
            "folder, or put the run's own back."
        )
    processes = saved.state.get("processes", accelerator.num_processes)
    if processes != accelerator.num_processes and accelerator.is_main_process:
        warnings.warn(
            f"{saved.folder} was written by {processes} processes and {accelerator.num_processes} go on: the "
            "run ends with other weights than an uninterrupted one.",
            stacklevel=2,
        )


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} as {"train.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
