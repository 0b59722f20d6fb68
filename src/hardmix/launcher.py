"""What the command line does when a launcher, `torchrun` or `accelerate launch`, started it several times."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

#: seconds in which the process that failed ends before those that lost it
BEHIND = 2.0


def speaker() -> str:
    """Who speaks: "hardmix", of several processes with the rank."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"hardmix, rank {os.environ.get('RANK', '0')}" if several else "hardmix"


def first_rank() -> bool:
    """Whether this is the process that shows how far a run is; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def tell_launcher(message: str) -> None:
    """Hand torchrun what it shows at the end of its own words, where it otherwise says that it knows nothing."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        known = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # on the same full disk, perhaps; it was printed already
            Path(file).write_text(json.dumps({"message": known}), encoding="utf-8")


def step_back() -> None:
    """Let the process that failed end first: torchrun takes the one that it sees first for the cause."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        time.sleep(BEHIND)
