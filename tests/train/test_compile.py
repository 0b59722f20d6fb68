"""train.compile: the steps of a compiled run are those of an eager one, but for dropout, and so are its files."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import compiling
from hardmix.train.device import COMPILING_STEPS
from hardmix.train.errors import RecipeError, RunError
from hardmix.train.loop import run_recipe
from hardmix.train.state import load_checkpoint

from .conftest import fingerprint, tiny
from .test_loop import interrupted

# the compiler's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    compiling.quiet,
]


def backend(name: str | Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let model and objective be compiled by this instead."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_with(model, backend=name))


@pytest.fixture(scope="module", params=["aot_eager", "inductor"])
def compiler(request) -> Iterator[None]:
    """One that needs nothing but torch, and the one that users get."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "inductor":
            compiling.need_generated_code()
        else:
            backend(request.param, patch)
        yield


@pytest.fixture(scope="module")
def compiled(compiler, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "run"
    run_recipe(tiny(train={"compile": True}), folder)
    return folder


def timed(folder: Path) -> int:
    """Of how many steps a run's last checkpoint knows the time."""
    return load_checkpoint(folder / "checkpoints", "last").state["timed"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "checkpoints", "last").tensors["model"]


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


def test_a_compiled_run_resumes_bit_exactly(compiled, tmp_path, monkeypatch):
    recipe = tiny(train={"compile": True})
    assert interrupted(recipe, tmp_path / "run", 3, monkeypatch, signal.SIGTERM) < 10
    run_recipe(recipe, tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(compiled)


def test_the_time_of_a_step_leaves_the_compiling_out(compiled, tmp_path, monkeypatch):
    """That is of the first three steps of every process."""
    assert timed(compiled) == 10 - COMPILING_STEPS == 7
    recipe = tiny(train={"compile": True})
    stopped = interrupted(recipe, tmp_path / "run", 5, monkeypatch)
    assert timed(tmp_path / "run") == stopped - 3
    run_recipe(recipe, tmp_path / "run", resume=True)
    assert timed(tmp_path / "run") == 10 - 3 - 3


def test_a_run_that_compiles_in_all_of_its_steps_has_a_time_too(compiler, tmp_path):
    short = {"compile": True, "epochs": 1, "batch_size": 80, "warmup_epochs": 0}
    seconds = run_recipe(tiny(train=short), tmp_path / "run")["seconds"]
    assert seconds["per_step"] == pytest.approx(seconds["train"] / 2, abs=1e-3)


def test_a_compiler_that_fails_is_told_in_a_sentence(tmp_path, monkeypatch):
    def no_headers(graph, inputs, **options):
        raise FileNotFoundError("C++ compile error\n\nCommand:\ng++\nx.cpp:1: fatal error: Python.h: No such file")

    backend(no_headers, monkeypatch)
    told = r"^torch.compile failed \(.*C\+\+ compile error.*Python.h: No such file\); .*, or leave train.compile out.$"
    with pytest.raises(RunError, match=told):
        run_recipe(tiny(train={"compile": True}), tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_backward_pass_that_fails_to_compile_is_told_alike(tmp_path, monkeypatch):
    from torch._dynamo.backends.common import aot_autograd

    class Failed(BackendCompilerFailed):
        def __init__(self) -> None:
            RuntimeError.__init__(self, "ptxas: No space left")

    def full(graph, inputs):
        raise Failed

    backend(aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=full), monkeypatch)
    with pytest.raises(RunError, match=r"^torch.compile failed \(.*ptxas: No space left\)"):
        run_recipe(tiny(train={"compile": True}), tmp_path / "run")


#: one sample has none to be mixed with
UNMIXED = {"policy": None, "objective": {"name": "soft-cross-entropy"}}


@compiling.supported
def test_a_model_that_cannot_be_traced_is_not_the_fault_of_the_compiler(tmp_path):
    model = {"name": "resnet18", "options": {"width": 2}}  # whose last norm sees one value of each channel
    told = (
        r"^a step can't be compiled \(ValueError\('Expected more than 1 value .*\); leave train.compile out, which may"
    )
    with pytest.raises(RunError, match=told):
        run_recipe(tiny(model=model, train={"compile": True, "batch_size": 1}, **UNMIXED), tmp_path / "run")


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
