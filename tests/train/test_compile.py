"""train.compile: the steps of a compiled run are those of an eager one, and so are its checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hardmix.train import device
from hardmix.train.errors import RecipeError, RunError
from hardmix.train.loop import run_recipe
from hardmix.train.state import load_checkpoint

from .conftest import fingerprint, tiny
from .test_loop import interrupted

# the compiler's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "run"
    run_recipe(tiny(train={"compile": True}), folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "checkpoints", "last").tensors["model"]


@needs_compiler
def test_a_compiled_run_is_an_eager_one(compiled, tmp_path):
    run_recipe(tiny(), tmp_path / "run")
    want, found = weights(tmp_path / "run"), weights(compiled)
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (compiled, tmp_path / "run")]
    for one, other in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert one.keys() == other.keys()
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=1e-4)


@needs_compiler
def test_a_compiled_run_resumes_bit_exactly(compiled, tmp_path, monkeypatch):
    recipe = tiny(train={"compile": True})
    assert interrupted(recipe, tmp_path / "run", 3, monkeypatch, signal.SIGTERM) < 10
    run_recipe(recipe, tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(compiled)


@needs_compiler
def test_the_time_of_a_step_leaves_the_compiling_out(compiled):
    seconds = json.loads((compiled / "summary.json").read_text())["seconds"]
    assert 0.0 < seconds["per_step"] * 10 < seconds["train"] / 2  # nearly all of it is the compiler's


def test_a_compiler_that_fails_is_told_in_a_sentence(tmp_path, monkeypatch):
    def no_compiler(graph, inputs, **options):
        raise FileNotFoundError("no C++ compiler")

    compile_with = torch.compile
    monkeypatch.setattr(device.torch, "compile", lambda model, mode: compile_with(model, backend=no_compiler))
    with pytest.raises(RunError, match=r"^torch.compile failed \(.*no C\+\+ compiler.*or leave train.compile out.$"):
        run_recipe(tiny(train={"compile": True}), tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"policy": {"name": "manifold-mixup", "layers": ["stage1"]}}, 'policy "manifold-mixup", which looks into the'),
        ({"train": {"accumulate": 2}}, "takes whole batches, but train.accumulate is 2; set it to 1"),
        (
            {"task": "few-labels", "policy": None, "objective": None, "semi": {"per_class": 4}},
            "train.compile is for classification recipes; leave it out",
        ),
    ],
    ids=["hooks", "parts", "task"],
)
def test_what_cannot_be_compiled_is_refused(sections, message):
    train = {**sections.pop("train", {}), "compile": True}
    with pytest.raises(RecipeError, match=message):
        tiny(train=train, **sections)
