"""The real open_clip, timm and torchvision, where they are installed; tests that need them skip elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Read when a kernel is defined: without a GPU Triton interprets it, slowly.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHIM = Path(__file__).parents[2] / "examples" / "torchvision_on_cpu.py"

# Before any test, once for the process: a torchvision whose operators do not load beside a CPU torch is mended.
with contextlib.suppress(ImportError):
    runpy.run_path(str(SHIM))["import_torchvision"]()


def peer(name: str) -> ModuleType:
    """A peer's module, or a skip that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} does not import ({error}); `make test-integrations` installs it")


@pytest.fixture
def timm_mixup() -> ModuleType:
    return peer("timm.data.mixup")


@pytest.fixture
def tv_tensors() -> ModuleType:
    return peer("torchvision.tv_tensors")


@pytest.fixture
def v2() -> ModuleType:
    return peer("torchvision.transforms.v2")


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    return peer("open_clip")


@pytest.fixture(scope="session")
def open_clip_train() -> ModuleType:
    return peer("open_clip_train.train")
