"""The examples run, beside the packages that they are about."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--train", "150", "--epochs", "1", "--batch-size", "50"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as the command line would, and hand back what it prints."""

    def example(script: str, *options: str) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [script, *options])
        with contextlib.suppress(SystemExit):  # how --help ends
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return example


@pytest.mark.parametrize(
    "options",
    [[], ["--mixup", "timm", "--loss", "soft", "--mode", "batch"], ["--mixup-off-epoch", "1", "--epochs", "2"]],
)
def test_timm_training(timm_mixup, run, options):
    assert "epoch 1  loss" in run("timm_training.py", *SMALL, *options)


@pytest.mark.parametrize("options", [[], ["--mix", "resizemix"], ["--mix", "torchvision", "--loss", "soft"]])
def test_torchvision_training(v2, run, options):
    assert "epoch 1  loss" in run("torchvision_training.py", *SMALL, *options)


@pytest.mark.parametrize("options", [["--accum-freq", "3"], ["--loss", "clip"]])
def test_open_clip_finetuning(open_clip_train, run, options):
    printed = run("open_clip_finetuning.py", *SMALL, *options)
    assert "epoch 1  contrastive_loss" in printed
    assert ("m2mix_loss" in printed) == ("clip" not in options)


@pytest.mark.parametrize("script", ["timm_training.py", "torchvision_training.py", "open_clip_finetuning.py"])
def test_they_explain_themselves(timm_mixup, open_clip_train, run, script):
    assert "--epochs" in run(script, "--help")
