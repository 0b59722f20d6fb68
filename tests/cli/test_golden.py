"""The losses on file: what counts as another one, and where the file says nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from hardmix.train.recipe import shipped


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool with a file of its own, made here, of one recipe."""
    path = Path(__file__).parents[2] / "tools" / "smoke_recipes.py"
    spec = importlib.util.spec_from_file_location("smoke_recipes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GOLDEN", tmp_path / "golden.json")
    assert module.compare_losses({"a": {"loss": [2.0, 1.0]}}, record=True) == 0
    return module


def test_the_last_digits_may_differ_and_nothing_else(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.compare_losses({"a": {"loss": [2.0, 1.0000005]}, "new": {"loss": [1.0]}}, record=False) == 0
    assert "0 of 1 recipes have other losses" in capsys.readouterr().out
    assert tool.compare_losses({"a": {"loss": [2.0, 1.00001]}}, record=False) == 1
    assert "LOSS  a: loss of step 2 is 1.00001 and was 1" in capsys.readouterr().out
    for other in ({"loss": [2.0]}, {"loss": [2.0, 1.0], "contrast": [1.0, 1.0]}, {}):
        assert tool.compare_losses({"a": other}, record=False) == 1


def test_another_machine_compares_nothing(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "machine", lambda: {"torch": "other"})
    assert tool.compare_losses({"a": {"loss": [9.0]}}, record=False) == 0
    assert "not compared" in capsys.readouterr().out


def test_the_file_is_of_shipped_recipes() -> None:
    file = Path(__file__).parents[2] / "tools" / "golden_losses.json"
    losses = json.loads(file.read_text("utf-8"))["losses"]
    assert set(losses) <= set(shipped())
    assert {"fashion-cutmix-dm", "demo-mixup-dm", "few-fixmatch", "diabetes-supremix", "emoji-pretrain"} <= set(losses)
    assert len(losses) > 60
