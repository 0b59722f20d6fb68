"""Where a run computes: what Accelerate is asked for, and what is told of the device."""

from __future__ import annotations

import os
import platform
import warnings
from typing import Any

import torch

from hardmix.train.errors import RecipeError
from hardmix.train.recipe import Recipe


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
