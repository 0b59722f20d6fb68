"""Stopping a run from outside: Ctrl-C and SIGTERM become a flag that the loop reads between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hardmix.train.errors import Interrupted


class Stop:
    """The signal that arrived, or 0."""

    signum = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a flag; the same signal once more ends the process at once.

    A signal that the process ignores stays ignored: the workers of a comparison leave Ctrl-C to their parent.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(signum: int, frame: object) -> None:
        if stop.signum == signum:
            raise KeyboardInterrupt
        stop.signum = signum

    with _handled(on_signal):
        yield stop


@contextmanager
def ends_at_signal(message: str) -> Iterator[None]:
    """Where there is nothing to save, Ctrl-C and SIGTERM end the work at once, with a sentence."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: object) -> None:
        raise Interrupted(message, signum)

    with _handled(on_signal):
        yield


@contextmanager
def _handled(on_signal: Callable[[int, object], None]) -> Iterator[None]:
    heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, on_signal) for s in heard}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def leave_signals_to_parent(worker: int = 0) -> None:
    """For a loader's worker: a signal to the whole group would end it while the parent still waits for its batch."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def follow_parent() -> None:
    """Make a worker stop with its parent: it ignores Ctrl-C, which the parent hears, and ends if the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
