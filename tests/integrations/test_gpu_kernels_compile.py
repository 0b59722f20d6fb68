"""What the interpreter takes but the compiler does not is found without a GPU too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integrations.conftest import peer


@pytest.mark.slow
def test_every_variant_compiles(tmp_path: Path) -> None:
    peer("triton")
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # else a kernel that compiled once is not compiled again
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.rglob("*.ptx"))) > 30
