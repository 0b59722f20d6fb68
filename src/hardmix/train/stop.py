"""Stopping a run from outside: Ctrl-C and SIGTERM become a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Ctrl-C or SIGTERM: the run stopped between two steps, with a checkpoint."""

    def __init__(self, folder: Path, step: int, signum: int) -> None:
        super().__init__(folder, step, signum)  # so that it survives the way back from another process
        self.folder, self.step, self.signum = folder, step, signum

    def __str__(self) -> str:
        return f"stopped at step {self.step}; go on with: hardmix run --resume {self.folder}"


class Stop:
    """The signal that arrived, or 0."""

    signum = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a flag; the second one ends the process at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(signum: int, frame: object) -> None:
        if stop.signum:
            raise KeyboardInterrupt
        stop.signum = signum

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
