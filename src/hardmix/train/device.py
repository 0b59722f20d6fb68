"""Where and how a run computes: what Accelerate and the compiler are asked for, and what is told of the device."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hardmix.train.errors import RecipeError, RunError
from hardmix.train.recipe import Recipe

#: of torch.compile. Small batches wait for the host, whose launches one CUDA graph replaces; a CPU has none.
MODE = "reduce-overhead"
#: the first compiles, the next two make the graph
COMPILING_STEPS = 3


def make_accelerator(recipe: Recipe) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    # The state is shared by a process, and a process may train several recipes one after another.
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.train.precision]
    # A stage of a contrast leaves the head or the encoder without gradient, a map that of an encoder's last norm, which
    # the processes would wait for.
    some = recipe.contrast is not None or recipe.tune.probe_epochs > 0 or recipe.model.name == "coca"
    unused = DistributedDataParallelKwargs(find_unused_parameters=some)
    # Without a GPU, Accelerate takes several processes of a launcher for strangers unless it is told.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    on_cpu = recipe.train.device == "cpu" or several
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu or None, kwargs_handlers=[unused])
    # Where `accelerate launch` is asked for several on a CPU it names their meeting place and starts one.
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
    if alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        warnings.warn(
            "accelerate launch starts one process on a CPU, whatever its --num_processes; for several start with "
            "torchrun --nproc-per-node N -m hardmix run ...",
            stacklevel=1,  # one place, however many accelerators a run makes
        )
    if precision == "fp16" and accelerator.device.type == "cpu":  # where Accelerate would go on in fp32
        raise RecipeError("train.precision is fp16, which a CPU does not compute in; take bf16, or a GPU.")
    return accelerator


def compiled(model: nn.Module, objective: nn.Module) -> nn.Module:
    """The model to train through, compiled when it is first called; its weights are those of `model`, itself unchanged.

    The objective is compiled in its place.
    """
    # What other runs of this process compiled would count towards the number of graphs that a function may have.
    torch.compiler.reset()
    try:
        objective.compile(mode=MODE)
        return torch.compile(model, mode=MODE)  # type: ignore[return-value]
    except RuntimeError as error:  # of a Python that this torch can't compile under
        raise RunError(f"torch.compile is not to be had here ({error}); leave train.compile out.") from error


@contextmanager
def compiling(recipe: Recipe) -> Iterator[None]:
    """Around steps that may compile, forward and backward: what goes wrong with it is told in a sentence."""
    if not recipe.train.compile:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    try:
        yield
    except BackendCompilerFailed as error:
        raise RunError(
            f"torch.compile failed ({_reason(error)}); it needs a C++ compiler and Python's headers, and Triton on a "
            "GPU: install what is missing, or leave train.compile out."
        ) from error
    except TorchDynamoException as error:
        raise RunError(
            f"a step can't be compiled ({_reason(error)}); leave train.compile out, which may show what is wrong."
        ) from error


def _reason(error: Exception) -> str:
    """Who raised and what, of a compiler's output the first error, and of an operation that failed only its own."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [*lines[:2], *[line for line in lines[2:] if "error:" in line][:1]]
    return " ".join(filter(None, told)).rpartition(": got ")[2][:300].rstrip(".: ")


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
