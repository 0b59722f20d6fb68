"""Models of Hugging Face, tiny ones with random weights, tuned from a recipe."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from hardmix.train.evaluate import evaluate_run, load_run
from hardmix.train.loop import run_recipe
from hardmix.train.tasks.image_text import ImageText

from .test_image_text import drawings, pairs, read, steps  # noqa: F401

_SPEC = importlib.util.spec_from_file_location(
    "clip_adapters", Path(__file__).parents[1] / "models/test_clip_adapters.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
adapters: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(adapters)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: adapters.save(kind, tmp_path_factory.mktemp(kind)) for kind in adapters.KINDS}


@pytest.mark.parametrize(("kind", "objective"), [("clip", "m2-mix"), ("siglip", "m2-mix-siglip")])
def test_a_saved_model_is_tuned_and_measured(kind, objective, drawings, saved, tmp_path) -> None:  # noqa: F811
    model = {"name": "hf-clip", "options": {"path": str(saved[kind])}}
    recipe = pairs(drawings, model=model, objective={"name": objective})
    task, before, after = steps(recipe)
    assert float(task.model.scale.detach()) != pytest.approx(1 / 0.07), "the scale is that of the saved model"
    assert (task.model.logit_bias is not None) == (kind == "siglip")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.startswith("image.") for key in changed)
    assert any(key.startswith("text.") for key in changed)
    run_recipe(recipe, tmp_path / "run")
    assert evaluate_run(tmp_path / "run")["test"] == pytest.approx(read(tmp_path / "run")["test"])


def test_a_frozen_tower_keeps_its_weights_and_a_temperature_can_be_set(drawings, saved) -> None:  # noqa: F811
    model = {"name": "hf-clip", "options": {"path": str(saved["clip"])}}
    _, before, after = steps(pairs(drawings, model=model, tune={"freeze": ["text"], "temperature": 0.05}))
    assert {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])} == {"image", "logit_scale"}
    assert before["logit_scale"].exp().item() == pytest.approx(20.0)


def test_a_saved_model_is_measured_as_it_is_and_before_it_is_tuned(drawings, saved, tmp_path) -> None:  # noqa: F811
    model = {"name": "hf-clip", "options": {"path": str(saved["clip"])}}
    untrained = pairs(drawings, model=model, train={"epochs": 0, "warmup_epochs": 0.0})
    run_recipe(untrained, tmp_path / "zero")
    found = read(tmp_path / "zero")["test"]
    kept, trained = load_run(tmp_path / "zero").model.state_dict(), ImageText(untrained).model.state_dict()
    assert all(torch.equal(kept[key], trained[key]) for key in trained)
    # It was trained on none of these texts, so that it may be tested on any of them.
    tuned = pairs(drawings, model=None, tune={"start": str(tmp_path / "zero")}, data={"test": 0.3})
    run_recipe(tuned, tmp_path / "tuned")
    assert read(tmp_path / "tuned")["before"] == pytest.approx(found)
    ImageText(pairs(drawings, model=None, tune={"start": str(tmp_path / "zero")}, data={"test": 0.6}))


def test_models_are_named_by_their_files(drawings) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"hf-clip: path is None; name it, as in model.options.path="):
        pairs(drawings, model={"name": "hf-clip"})
    with pytest.raises(ValueError, match="open-clip: checkpoint is None"):
        pairs(drawings, model={"name": "open-clip", "options": {"architecture": "ViT-B-32"}})
    with pytest.raises(FileNotFoundError, match="is no folder"):
        ImageText(pairs(drawings, model={"name": "hf-clip", "options": {"path": "nowhere"}}))
