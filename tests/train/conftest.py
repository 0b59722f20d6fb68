"""A recipe that trains in a second: handwritten digits, a narrow CNN."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardmix.train.recipe import Recipe, check_recipe

TINY = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 200, "validation": 0.2, "augment": ["crop"]},
    "model": {"name": "small-cnn", "options": {"width": 4}},
    "policy": {"name": "cutmix", "alpha": 1.0},
    "objective": {"name": "decoupled-mixup", "eta": 0.1},
    "train": {
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.05,
        "warmup_epochs": 0.5,
        "log_every": 2,
        "threads": 1,
        "device": "cpu",
    },
}


def tiny(**sections: object) -> Recipe:
    """The tiny recipe with some sections updated."""
    table: dict = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in sections.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict) and "name" not in value:
            table[key] = {**table[key], **value}
        else:
            table[key] = value
    return check_recipe({key: value for key, value in table.items() if value is not None}, "tiny")


@pytest.fixture
def recipe() -> Recipe:
    return tiny()


def fingerprint(folder: Path) -> dict[str, bytes]:
    """What has to be byte-equal between two runs of one recipe."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = [folder / "metrics.jsonl", *sorted(last.glob("*.safetensors"))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
