"""LoRA in the image-text task: what is trained, what is measured, and how runs with adapters go on."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hardmix.models.lora import add_lora, merged, without_lora
from hardmix.train.errors import RecipeError
from hardmix.train.evaluate import evaluate_run
from hardmix.train.loop import run_recipe
from hardmix.train.optimizer import _shares
from hardmix.train.state import load_checkpoint
from hardmix.train.tasks.image_text import ImageText

from .conftest import fingerprint
from .test_image_text import EMOJI, HEAD, MODEL, drawings, emoji, pairs, read, scratch, steps
from .test_loop import interrupted

assert all((drawings, emoji, scratch))  # fixtures
VIT = MODEL | {"options": MODEL["options"] | {"image": {"name": "tiny-vit", "dim": 8, "depth": 3, "heads": 2}}}
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HARDMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hardmix.train.loop._write_report", lambda run: None)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of the last checkpoint, adapters among them."""
    return dict(load_checkpoint(folder / "checkpoints", "last").tensors["model"])


def learning(task: ImageText) -> set[str]:
    return {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}


@needs_peft
@pytest.mark.parametrize("model", [MODEL, VIT], ids=["small-cnn", "tiny-vit"])
def test_adapters_change_nothing_at_first_and_are_merged_exactly(model, drawings) -> None:
    task = ImageText(pairs(drawings, model=model))
    plain, x, texts = task.model, task.inputs[:6].float() / 255, task.tokens[:6]
    expected, names = plain.eval()(x, texts), list(plain.state_dict())
    torch.manual_seed(0)
    add_lora(plain, ["image", "text"], 3)
    found = plain(x, texts)
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.text, expected.text)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    moved, together = plain(x, texts), without_lora(plain)
    assert (moved.image - expected.image).abs().max() > 1e-3 < (moved.text - expected.text).abs().max()
    assert list(together.state_dict()) == names, "as if there had never been adapters"
    for one, other in zip(moved[:3], together(x, texts)[:3], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    # peft's own arithmetic
    for layer in plain.modules():
        if hasattr(layer, "base_layer"):
            layer.merge()
    own = {name.replace("base_layer.", ""): value for name, value in plain.state_dict().items() if "lora_" not in name}
    for name, value in together.state_dict().items():
        assert torch.allclose(value, own[name], atol=1e-6), name
    assert without_lora(together) is together
    assert merged(own).keys() == own.keys()


@needs_peft
def test_adapters_projections_and_temperature_are_trained(drawings, scratch) -> None:
    recipe = pairs(drawings, tune={"lora": 2, "start": str(scratch)})
    task, before, after = steps(recipe, (0, 0))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    changed = {name for name in changed if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed == learning(task)
    kinds = {name if "lora" not in name else name.split(".")[-3] for name in changed}
    assert kinds == {"lora_A", "lora_B", "logit_scale", "image_projection.1.weight", "text_projection.1.weight"}
    # Those of a held tower are not made; and lower layers may learn slower.
    task = ImageText(pairs(drawings, tune={"lora": 2, "freeze": ["text", "image_projection"], "layer_decay": 0.5}))
    assert not [name for name in learning(task) if name.startswith(("text.", "image_projection"))]
    shares = _shares(task.model, 0.5, {})
    assert len(shares) > 2
    assert sum(map(len, shares.values())) == len(learning(task))


@needs_peft
def test_a_probe_comes_before_the_adapters(emoji) -> None:
    tune = {"head": True, "probe_epochs": 1, "lora": 2, "start": str(emoji)}
    task, before, after = steps(pairs(**EMOJI, **(HEAD | {"tune": tune})), (0,))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias", "logit_scale"}
    task.start_epoch(1, 1)
    assert {name.split(".")[0] for name in learning(task)} == {"image", "image_projection", "head", "logit_scale"}
    assert all("lora" in name for name in learning(task) if name.startswith("image."))


@needs_peft
def test_a_run_goes_on_is_measured_and_is_a_start(drawings, scratch, tmp_path, monkeypatch) -> None:
    recipe = pairs(drawings, tune={"lora": 2, "start": str(scratch)}, train={"lr": 0.03, "ema": 0.5})
    run_recipe(recipe, tmp_path / "straight")
    assert interrupted(recipe, tmp_path / "stopped", 1, monkeypatch) == 1
    run_recipe(recipe, tmp_path / "stopped", resume=True)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "straight")
    summary, start = read(tmp_path / "straight"), saved(scratch)
    assert summary["before"] == read(scratch)["test"] != summary["test"]
    for name, value in saved(tmp_path / "straight").items():
        if "base_layer" in name:
            assert torch.equal(value, start[name.replace("base_layer.", "")]), name
    assert evaluate_run(tmp_path / "straight")["test"] == pytest.approx(summary["test"])
    # What follows sees plain weights, with or without adapters of its own; peft's shape the model no more.
    following = {"start": str(tmp_path / "straight")}
    for name, tune in {"plain": following, "again": following | {"lora": 1}}.items():
        run_recipe(pairs(drawings, model=None, tune=tune), tmp_path / name)
        assert read(tmp_path / name)["before"] == pytest.approx(summary["test"])
    assert any("lora" in name for name in saved(tmp_path / "again"))
    assert not any("lora" in name for name in saved(tmp_path / "plain"))


@needs_peft
def test_adapters_beside_a_teacher_in_parts_and_between_start_and_end(drawings, scratch, tmp_path) -> None:
    start = {"start": str(scratch), "lora": 2}
    objective: dict[str, Any] = {"objective": {"name": "carot"}, "train": {"accumulate": 2}}
    for name, tune in {
        "plain": {},
        "zero": {"after": "wise-ft", "amount": 0.0},
        "one": {"after": "wise-ft", "amount": 1.0},
        "tpgm": {"after": "tpgm"},
    }.items():
        run_recipe(pairs(drawings, tune=start | tune, **objective), tmp_path / name)
    found = {name: read(tmp_path / name) for name in ("plain", "zero", "one", "tpgm")}
    assert found["plain"]["test"] == found["one"]["test"] != found["plain"]["before"]
    assert found["zero"]["test"] == pytest.approx(found["plain"]["before"])
    assert found["tpgm"]["chosen"]["radii"] > 0.0


def test_what_adapters_do_not_fit_is_refused(drawings, monkeypatch) -> None:
    for sections, message in (
        ({"tune": {"lora": -1}}, "greater than or equal to 0"),
        ({"tune": {"lora": 2}, "model": {"name": "coca"}, "objective": {"name": "coca"}}, 'which model "coca" has not'),
        ({"tune": {"lora": 2, "freeze": ["image", "text"]}}, "both are held"),
        (HEAD | {"tune": {"head": True, "probe_epochs": 2, "lora": 2}}, "both are held"),
    ):
        with pytest.raises(RecipeError, match=message):
            pairs(drawings, **sections)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'^tune.lora needs peft \(.*\); pip install "hardmix\[lora\]"\.$'):
        ImageText(pairs(drawings, tune={"lora": 2}))


@needs_peft
def test_layers_whose_weights_are_read_past_them() -> None:
    """torch's attention reads its output's weight itself; its encoder layer does so with all, but when it measures."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = torch.nn.ModuleDict({"image": torch.nn.Sequential(layer, torch.nn.Conv1d(5, 5, 1, groups=5))})
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    add_lora(model, ["image"], 2)
    adapted = {name.split(".")[2] for name in model.state_dict() if "lora_B" in name}
    assert adapted == {"linear1", "linear2"}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trained = model["image"](x)
    trained.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora" in name)
    with torch.no_grad():
        measured = without_lora(model).eval()["image"](x)
    assert torch.allclose(measured, trained, atol=1e-5)


@needs_peft
def test_a_tower_without_layers_has_no_adapters() -> None:
    model = torch.nn.ModuleDict({"image": torch.nn.Identity(), "text": torch.nn.Embedding(3, 2)})
    with pytest.raises(ValueError, match="image and text have no linear layers or filters to adapt"):
        add_lora(model, ["image", "text"], 2)
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(model, ["image"], 0)
