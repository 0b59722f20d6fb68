"""Reading a run folder, whatever state it is in: what is missing or damaged becomes a note, never a traceback."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hardmix.report.text import MAX_TEXT, dig, is_pairs, number, visible

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[no-redef]

#: Mixed samples that a page shows; the rest of a gallery is not decoded.
MAX_SAMPLES = 12

Curve = dict[str, list[float]]


@dataclass(frozen=True)
class Gallery:
    """The mixed samples of a run: images (G, C, H, W) uint8, mask (G, 1, H, W) or None, and what was predicted."""

    own: Tensor
    partner: Tensor
    mixed: Tensor
    mask: Tensor | None
    labels: list[list[int]]
    weights: list[list[float]]
    top: list[list[int]]
    prob: list[list[float]]

    def __len__(self) -> int:
        return self.mixed.shape[0]


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds. Curves map a key to one number per line of the log, NaN where a line has none."""

    path: Path
    summary: dict[str, Any]
    recipe: str | None
    train: Curve
    validation: Curve
    gallery: Gallery | None
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.summary.get("finished") is True


def read_run(path: Path) -> RunFolder:
    """Read `path`; its notes say what is missing.

    Raises:
        ValueError: `path` is not a folder.
    """
    if not path.is_dir():
        raise ValueError(f"report: {visible(path)} is not a folder; pass the folder of a run.")
    notes: list[str] = []
    summary = read_json(path / "summary.json", notes)
    lines = _read_lines(path / "metrics.jsonl", notes)
    recipe = None
    try:
        with open(path / "recipe.toml", encoding="utf-8", errors="replace") as file:
            recipe = file.read(MAX_TEXT + 1)
    except OSError:
        notes.append("recipe.toml is missing: what was run can't be told in full.")
    summary = summary or _promised(recipe)
    mixes = summary.get("task") not in ("regression", "modalities") and not is_pairs(summary)
    return RunFolder(
        path=path,
        summary=summary,
        recipe=recipe,
        train=_curve(lines, "train"),
        validation=_curve(lines, "validation"),
        gallery=_read_gallery(path / "gallery.safetensors", notes) if mixes else None,
        notes=notes,
    )


def _promised(recipe: str | None) -> dict[str, Any]:
    """What the summary of a run that has not finished will say, as far as its recipe tells."""
    try:
        table = tomllib.loads(recipe or "")
    except (ValueError, RecursionError):
        return {}
    names = {key: {"name": name} for key in ("data", "model") if isinstance(name := dig(table, key, "name"), str)}
    return {key: table[key] for key in ("name", "task", "seed") if isinstance(table.get(key), str | int)} | names


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a JSON file; an empty one, and a note, where it can't be had."""
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} can't be read: {type(error).__name__}.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no object.")
        return {}
    return value


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """One object a line. The last line of a killed run may be half a line; it is left out."""
    lines, broken = [], 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    lines.append(value)
                else:
                    broken += 1
    except OSError:
        notes.append(f"{path.name} is missing: there are no learning curves.")
    if broken:
        notes.append(f"{path.name} has {broken:,} unreadable line{'s' if broken > 1 else ''}, left out.")
    return lines


def _curve(lines: list[dict[str, Any]], kind: str) -> Curve:
    chosen = [line for line in lines if line.get("kind") == kind and number(line.get("epoch")) is not None]
    keys = {key for line in chosen for key, value in line.items() if number(value) is not None}
    return {key: [_or_nan(number(line.get(key))) for line in chosen] for key in sorted(keys)}


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _read_gallery(path: Path, notes: list[str]) -> Gallery | None:
    if not path.is_file():
        notes.append(f"{path.name} is missing: no mixed samples are shown.")
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            stored = {key: file.get_slice(key)[:MAX_SAMPLES] for key in file.keys()}  # noqa: SIM118 - not a dict
        return _gallery(stored)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        notes.append(f"{path.name} can't be read ({type(error).__name__}): no mixed samples are shown.")
        return None


def _gallery(stored: dict[str, Tensor]) -> Gallery:
    """Checked: a gallery whose tensors don't fit together is not shown."""
    own, partner, mixed, mask = stored["own"], stored["partner"], stored["mixed"], stored.get("mask")
    count = mixed.shape[0]
    fits = mixed.ndim == 4 and min(mixed.shape) > 0 and own.shape == partner.shape == mixed.shape
    fits &= mask is None or tuple(mask.shape) == (count, 1, *mixed.shape[2:])
    rows = [stored[key] for key in ("labels", "weights", "top", "prob")]
    fits &= all(row.ndim == 2 and row.shape[0] == count for row in rows)
    fits &= rows[0].shape == rows[1].shape and rows[2].shape == rows[3].shape
    if not fits:
        raise ValueError("shapes disagree")
    labels, weights, top, prob = (row.tolist() for row in rows)
    return Gallery(own, partner, mixed, mask, labels, weights, top, prob)
