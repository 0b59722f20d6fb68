"""Checkpoints: safetensors and JSON in a folder that is written aside, flushed, hashed and renamed.

    checkpoints/step-00000120/   model.safetensors optimizer.safetensors [ema.safetensors policy.safetensors]
                                 state.json   manifest.json (sha256 and size of each file)
    checkpoints/best.json        which step scored best

A folder appears under its name only when all of it is on the disk, so whatever is named `step-*` is complete. No pickle
is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hardmix.train.errors import CheckpointError
from hardmix.train.files import sync_folder, write_json

FORMAT = 1


class Checkpoint(NamedTuple):
    """What was read back: tensors by group ("model", "optimizer", ...), the rest, and where it came from."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    folder: Path


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: Iterable[int] = ()
) -> Path:
    """Write `root/step-XXXXXXXX` and drop older ones, except the previous one and the steps in `keep`."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    if final.exists():
        return final
    aside = root / f".{final.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        manifest: dict[str, Any] = {"format": FORMAT, "files": {}}
        for group, values in tensors.items():
            data = save_tensors({name: value.detach().cpu().contiguous() for name, value in values.items()})
            _put(aside / f"{group}.safetensors", data, manifest)
        _put(aside / "state.json", json.dumps({"step": step, **state}, indent=1).encode(), manifest)
        _put(aside / "manifest.json", json.dumps(manifest, indent=1).encode(), None)
        sync_folder(aside)
        os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(root)
    kept = {step, *keep}
    for old in list_steps(root)[:-2]:
        if old not in kept:
            _drop(root / f"step-{old:08d}")
    return final


def _drop(folder: Path) -> None:
    """Delete a checkpoint, whose name goes first: half of one is none."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(folder, aside)
    except OSError:
        return  # it stays, whole
    shutil.rmtree(aside, ignore_errors=True)


def mark_best(root: Path, step: int, score: float) -> None:
    write_json(root / "best.json", {"step": step, "score": score})


def best_step(root: Path) -> int | None:
    """The step that scored best, or None before the first evaluation."""
    path = root / "best.json"
    try:
        return int(json.loads(path.read_text("utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged; take the last checkpoint.") from None


def list_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(int(folder.name[5:]) for folder in root.glob("step-*") if folder.name[5:].isdigit())


def load_checkpoint(root: Path, which: str | int = "last") -> Checkpoint:
    """Read `"last"`, `"best"` or a step, every file checked against its hash before anything is used.

    Raises:
        CheckpointError: none there, or a file that is missing, damaged or from a newer format; an older complete
            checkpoint is named where there is one.
    """
    steps = list_steps(root)
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {root}; train the recipe first.")
    wanted = best_step(root) if which == "best" else steps[-1] if which == "last" else int(which)
    if wanted is None:
        raise CheckpointError(f"{root} has no best checkpoint, because nothing was evaluated; take the last one.")
    if wanted not in steps:
        told = f"the best checkpoint, that of step {wanted}" if which == "best" else f"no checkpoint of step {wanted}"
        raise CheckpointError(
            f"{root} {'lacks' if which == 'best' else 'holds'} {told}; there are {', '.join(map(str, steps))}, which "
            "hardmix eval --checkpoint measures."
        )
    folder = root / f"step-{wanted:08d}"
    try:
        return _read(folder)
    except CheckpointError as error:
        older = [step for step in steps if step < wanted]
        advice = f"; delete that folder to go on from step {older[-1]}" if older else "; train again"
        raise CheckpointError(f"{error}{advice}.") from None


def clean_leftovers(folder: Path) -> None:
    """Remove what a killed save left aside in a folder."""
    for aside in folder.glob(".*.part"):
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as named tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            elif value is not None:
                plain.setdefault(str(index), {})[key] = value
    groups = [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in state["param_groups"]]
    return tensors, {"plain": plain, "param_groups": groups}


def unflatten_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that `flatten_optimizer` took apart."""
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in rest["plain"].items()}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def _put(path: Path, data: bytes, manifest: dict[str, Any] | None) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if manifest is not None:
        manifest["files"][path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _read(folder: Path) -> Checkpoint:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        version = manifest["format"]
        files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        files["state.json"]  # without it the rest is of no use
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"the manifest of checkpoint {folder} is missing or damaged") from None
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {version}, this version reads {FORMAT}")
    contents: dict[str, bytes] = {}
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing")
        contents[name] = path.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise CheckpointError(f"checkpoint file {path} is damaged (its sha256 differs from the manifest)")
    tensors = {
        name.removesuffix(".safetensors"): load_tensors(data)
        for name, data in contents.items()
        if name.endswith(".safetensors")
    }
    state = json.loads(contents["state.json"])
    if folder.name != f"step-{state['step']:08d}":
        raise CheckpointError(f"checkpoint {folder} is of step {state['step']}, so it was renamed")
    return Checkpoint(tensors, state, folder)


def measured_weights(tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The model's tensors that a run is measured with: averaged, where the recipe keeps an average."""
    if "ema" not in tensors:
        return tensors["model"]
    prefix = "module."
    return {name.removeprefix(prefix): value for name, value in tensors["ema"].items() if name.startswith(prefix)}


def match_shapes(who: str, model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Name the first key by which a checkpoint does not fit a model, before anything is loaded."""
    own = model.state_dict()
    for key, value in own.items():
        if key not in tensors:
            raise CheckpointError(f"{who}: the checkpoint lacks {key}; it belongs to another model.")
        if tensors[key].shape != value.shape:
            got, want = tuple(tensors[key].shape), tuple(value.shape)
            raise CheckpointError(f"{who}: {key} has shape {got} in the checkpoint but {want} in the model.")
    extra = next((key for key in tensors if key not in own), None)
    if extra is not None:
        raise CheckpointError(
            f"{who}: the checkpoint holds {extra}, which the model lacks; it belongs to another model."
        )
