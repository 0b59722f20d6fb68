"""Imports point one way, and importing the library is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hardmix

ROOT = Path(hardmix.__file__).parent
LEVELS = [
    {"_check", "_files", "_math"},
    {"distributed", "kernels"},
    {"mixing", "losses", "metrics", "semi"},
    {"tables", "data", "models"},
    {"train"},
    {"report"},
    {"launcher"},
    {"terminal"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
#: A finished run writes its own page, and `show` draws with the gallery: imported inside the functions that do so.
ALLOWED = {("train", "report")}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hardmix"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hardmix.")}
    return names - {"__version__"}


FILES = sorted(path for path in ROOT.rglob("*.py") if part_of(path) not in ("__init__", "integrations", "recipes"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_arrow_points_back(path):
    own = part_of(path)
    for other in imported(path):
        assert other != "integrations", "nobody imports an integration"
        if other in LEVEL and (own, other) not in ALLOWED:
            assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}"


@pytest.mark.parametrize("module", ["hardmix", "hardmix.mixing", "hardmix.losses", "hardmix.semi"])
def test_the_library_needs_torch_and_numpy_alone(module):
    extras = "accelerate pydantic typer rich matplotlib PIL sklearn scipy torchmetrics safetensors jinja2 timm"
    code = (
        "import sys, os, torch\n"
        "before, environment = set(sys.modules), dict(os.environ)\n"
        f"import {module}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"assert not new & set('{extras}'.split()), new\n"
        "assert dict(os.environ) == environment\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
