"""Runs in processes of their own. Each has a pipe to itself, so that one that breaks or is ended stops no other.

(The executors of the standard library share a queue: a process that is ended while it waits there holds its lock for
good, and one that saves a checkpoint when it is told to end is then waited for without end.)
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hardmix.train.errors import CheckpointError, Interrupted, RunError
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe
from hardmix.train.stop import ends_at_signal, follow_parent

#: told about runs: (run number, what the loop reports; {"done": True} at the end)
Watch = Callable[[int, dict[str, Any]], None]

GO_ON = "stopped; finished runs are kept, the same command goes on with the others."


class Job(NamedTuple):
    """One run of a comparison."""

    recipe: Recipe
    folder: Path

    def blamed(self, error: Exception) -> Exception:
        """The error of this run, which among many has to be named."""
        if isinstance(error, (RunError, CheckpointError)):
            return type(error)(f"{self.recipe.name}, seed {self.recipe.seed}: {error}")
        return error


class _Worker:
    """A process, this end of its pipe, and the number of the run that it is at."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads))
        self.process.start()
        other.close()  # the process has it; without this its end would not be noticed
        self.run: int | None = None

    def give(self, job: Job | None) -> None:
        """Its next run, or that there is none. Whether it is there at all is seen where it should answer."""
        with suppress(OSError):
            self.pipe.send(job)

    def leave(self) -> None:
        """Wait for its end, reading what it still tells: a full pipe would stop it before."""
        with suppress(EOFError, OSError):
            while True:
                self.pipe.recv()
        self.process.join()


def side_by_side(jobs: list[Job], workers: int, threads: int, watch: Watch) -> None:
    """Train all jobs, `workers` at a time with `threads` each.

    The first that breaks, or a signal, ends the others, which save a checkpoint.
    """
    waiting = list(range(len(jobs)))
    team: list[_Worker] = []
    with _sigterm_raises():
        try:
            for _ in range(min(workers, len(jobs))):
                team.append(_Worker(threads))  # one by one, so that those that are there are ended if another can't be
            while waiting or any(worker.run is not None for worker in team):
                for worker in team:
                    if worker.run is None and waiting:
                        worker.run = waiting.pop(0)
                        worker.give(jobs[worker.run])
                busy = {worker.pipe: worker for worker in team if worker.run is not None}
                for pipe in wait(list(busy)):
                    _hear(busy[pipe], jobs, watch)  # type: ignore[index]
            for worker in team:
                worker.give(None)
        except BaseException:
            for worker in team:
                worker.process.terminate()  # once: a second signal would end it before it has saved
                worker.give(None)  # where a signal was lost, in a run that just broke by itself, it waits for the next
            raise
        finally:
            for worker in team:
                worker.leave()


def _hear(worker: _Worker, jobs: list[Job], watch: Watch) -> None:
    """What a worker has to tell: an event of its run, or its end."""
    assert worker.run is not None
    try:
        kind, told = worker.pipe.recv()
    except (EOFError, OSError):
        killed = RunError("killed, perhaps for memory; try again with fewer --jobs.")
        raise jobs[worker.run].blamed(killed) from None
    if kind == "event":
        watch(worker.run, told)
    elif kind == "warning":
        warnings.warn_explicit(*told)
    else:
        run, worker.run = worker.run, None
        if told is not None:
            error, where = told
            raise jobs[run].blamed(error) from _Elsewhere(where)
        watch(run, {"done": True})


def _serve(pipe: Connection, threads: int) -> None:
    """Train what comes through the pipe, until it says that nothing does or is closed."""
    follow_parent()
    torch.set_num_threads(threads)

    def tell(kind: str, told: object) -> None:
        with suppress(OSError):  # without a parent there is still a checkpoint to save
            pipe.send((kind, told))

    def warn(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        tell("warning", (str(message), category, filename, lineno))

    # Every worker would tell the same, and only the first process knows how.
    warnings.showwarning = warn
    with suppress(EOFError, OSError):
        while (job := pipe.recv()) is not None:
            end: tuple[Exception, str] | None = None
            try:
                with ends_at_signal(GO_ON):  # until the run hears signals itself
                    run_recipe(job.recipe, job.folder, resume=True, progress=lambda event: tell("event", event))
            except KeyboardInterrupt:  # the second signal: at once
                return
            except Exception as caught:
                end = _portable(caught), traceback.format_exc()
            tell("end", end)
            if end is not None and isinstance(end[0], Interrupted):
                return


def _portable(error: Exception) -> Exception:
    """An error that survives the way through a pipe."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Elsewhere(Exception):  # noqa: N818 - only ever the cause of one
    """The traceback of an error in the process where it was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the comparison like Ctrl-C, instead of leaving its workers behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: object) -> None:
        raise Interrupted(GO_ON, signum)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
