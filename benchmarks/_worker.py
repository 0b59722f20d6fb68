"""What the CPU benchmarks share: a measurement in a process of its own, and the file that holds the tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

#: Environment of the C library's allocator. "kept" takes blocks from the system once and never gives them back.
ALLOCATORS = {
    "default": {},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_TOP_PAD_": str(2 * 10**9)},
}


def run_worker(script: str, setting: dict) -> dict:
    """What `script --worker SETTING` prints last, from a fresh process: allocator and threads are settled at its start.

    Args:
        setting: "allocator", and "threads" where it is not one; the rest is the script's own.
    """
    environment = {
        **os.environ,
        **ALLOCATORS[setting["allocator"]],
        "OMP_NUM_THREADS": str(setting.get("threads", 1)),
    }
    command = [sys.executable, script, "--worker", json.dumps(setting)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def save(path: Path, tables: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    path.write_text(json.dumps({"machine": machine, "tables": tables}, indent=1) + "\n")
    print(f"\nwrote {path}")
