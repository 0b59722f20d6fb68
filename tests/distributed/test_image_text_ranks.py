"""The image-text task on two real processes (gloo): each objective's weights, losses and measures are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe
from hardmix.train.start import start_folder

from ..train.test_image_text import MODEL, drawings, pairs
from .test_ranks import launch

assert drawings  # the fixture
pytestmark = pytest.mark.slow

#: no dropout, no batch norm, and no draws of a process's own: no views, and the first text of a picture
TOWER = {"name": "tiny-vit", "dim": 8, "depth": 3, "heads": 2, "patch": 4}
VIT = MODEL | {"options": MODEL["options"] | {"image": TOWER}}
BIAS = VIT | {"options": VIT["options"] | {"bias": -2.0}}
SMALL = {"features": 16, "width": 16, "heads": 2, "text_layers": 1, "layers": 1, "queries": 2, "dropout": 0.0}
COCA = {"name": "coca", "options": {**SMALL, "unit": "word", "image": TOWER}}
#: 20 pictures in batches of 7: one process has 4 pairs, the other 3
TRAIN = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.5, "epochs": 2, "warmup_epochs": 0.0, "batch_size": 7}
MIXUP = {"name": "mixup", "alpha": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"model": BIAS},
    "m2-mix": {"objective": {"name": "m2-mix", "weight": 0.5}},
    "m2-mix of each pair": {"objective": {"name": "m2-mix", "weight": 0.5, "per": "pair", "schedule": "inverse"}},
    "m2-mix-siglip": {"objective": {"name": "m2-mix-siglip", "weight": 0.5}, "model": BIAS},
    "m3-mix": {},
    "hcl": {},
    "cyclip": {},
    "coca": {"model": COCA},
    "carot": {"train": {"lr": 0.002}},
    "clip in parts": {"objective": {"name": "clip"}, "train": {"accumulate": 2}},
    "siglip in parts": {"objective": {"name": "siglip"}, "model": BIAS, "train": {"accumulate": 2}},
    "m2-mix in parts": {"objective": {"name": "m2-mix", "weight": 0.5}, "train": {"accumulate": 3}},
    "carot in parts": {"objective": {"name": "carot"}, "train": {"lr": 0.002, "accumulate": 2}},
    "a bias without use": {"objective": {"name": "hcl"}, "model": BIAS},
    "one tower": {"objective": {"name": "clip"}, "tune": {"freeze": ["text", "text_projection"]}},
    "i-mix": {"policy": MIXUP},
    "un-mix": {"policy": MIXUP | {"per": "batch", "pairing": "reversal"}},
}
#: what each process draws for itself, so that two draw otherwise than one
DRAWN = ("i-mix", "un-mix")
HEADS: dict[str, dict[str, Any]] = {
    "head": {"head": True},
    "probe, then all": {"head": True, "probe_epochs": 1},
    "probe": {"head": True, "probe_epochs": 2},
}
#: pictures with classes, which is what a head needs
EMOJI = {"name": "emoji", "domain": "noto", "path": None, "labels": None, "train_samples": 96, "captions": "first"}


def recipes(folder: Path) -> dict[str, Recipe]:
    made = {}
    for name, sections in CASES.items():
        own = {"objective": {"name": name}, "model": VIT} | sections | {"train": TRAIN | sections.get("train", {})}
        made[name] = pairs(folder, **own, data={"captions": "first"})
    for name, tune in HEADS.items():
        train = TRAIN | {"batch_size": 33, "accumulate": 2}
        own = {"model": BIAS, "tune": tune, "train": train, "eval": {"parts": ["zeroshot"]}}
        made[name] = pairs(data=EMOJI, objective={"name": "soft-cross-entropy"}, **own)
    return made


def measured(folder: Path) -> Recipe:
    """A run that measures nothing but its start, which is trained for it: well apart features, by a CNN."""
    start = pairs(data=EMOJI, name="first", train={"epochs": 4, "lr": 0.01})
    (folder / "first.toml").write_text(start.to_toml())
    none = {"epochs": 0, "warmup_epochs": 0.0}
    return pairs(data=EMOJI, name="measured", model=None, train=none, tune={"start": str(folder / "first.toml")})


@pytest.fixture(scope="module")
def runs(drawings, tmp_path_factory) -> Path:
    """`one` and `two`: the folder of each case, run by so many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARDMIX_CACHE", str(folder / "cache"))
        patch.setattr("hardmix.train.loop._write_report", lambda run: None)
        launch(
            folder,
            f"""
from pathlib import Path
from hardmix.train import loop
from tests.distributed.test_image_text_ranks import measured, recipes
loop._write_report = lambda run: None
folder = Path({str(folder)!r})
made = recipes(Path({str(drawings)!r})) | {{"measured": measured(folder)}}
for name, recipe in made.items():
    print(name, flush=True)
    loop.run_recipe(recipe, folder / "two" / name)
""",
        )
        for name, recipe in (recipes(drawings) | {"measured": measured(folder)}).items():
            run_recipe(recipe, folder / "one" / name)
    return folder


def last(folder: Path, step: int = -1) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint but the optimizer's."""
    files = sorted(folder.glob("checkpoints/step-*"))[step].glob("*.safetensors")
    found = {file.stem: load_file(file) for file in files if file.stem != "optimizer"}
    return {f"{stem}.{key}": value for stem, tensors in found.items() for key, value in tensors.items()}


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in made if line["kind"] == kind]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("name", [name for name in (*CASES, *HEADS) if name not in DRAWN])
def test_two_processes_train_like_one(name, runs) -> None:
    one, two = runs / "one" / name, runs / "two" / name
    first, end, other = last(one, 0), last(one), last(two)
    assert end.keys() == other.keys()
    assert ("objective.teacher.module.logit_scale" in end) == name.startswith("carot")
    moved = max(float((end[key] - first[key]).abs().max()) for key in end if end[key].is_floating_point())
    assert moved > 1e-3, "so that there is something to agree on"
    for key, value in end.items():
        assert torch.allclose(value, other[key], rtol=1e-6, atol=1e-6), key
    for a, b in zip(lines(one, "train"), lines(two, "train"), strict=True):
        assert {**a, "kind": 0} == pytest.approx({**b, "kind": 0}, rel=2e-6)


@pytest.mark.parametrize("name", DRAWN)
def test_what_processes_draw_for_themselves_differs_and_trains(name, runs) -> None:
    one, two = last(runs / "one" / name), last(runs / "two" / name)
    assert all(torch.isfinite(value).all() for value in two.values())
    assert any(not torch.equal(value, two[key]) for key, value in one.items())


def test_a_start_is_trained_once_by_both_and_each_sample_counts_once(runs, monkeypatch) -> None:
    """One process finds the start that two have trained, and measures what they have."""
    monkeypatch.setenv("HARDMIX_CACHE", str(runs / "cache"))
    folder = start_folder(measured(runs))
    assert folder is not None
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, 25))
    one, two = summary(runs / "one/measured"), summary(runs / "two/measured")
    assert (folder / "summary.json").stat().st_mtime < (runs / "two/measured/summary.json").stat().st_mtime
    assert [line["pairs"] for line in two["retrieval"]] == [line["pairs"] for line in one["retrieval"]]
    assert two["data"] == one["data"]
    for found in (two["test"], two["before"], summary(folder)["test"]):
        assert found == pytest.approx(one["test"], rel=1e-5)
