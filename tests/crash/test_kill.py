"""Kill a run at every file event of its checkpoints and in mid-epoch; it must resume to the same bytes.

A child is forked after torch is loaded, trains the tiny recipe and kills itself with SIGKILL at the n-th event: before
a file is opened, a folder made, renamed or removed, or half-way through a write.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from hardmix.train.files import write_text
from hardmix.train.loop import run_recipe
from tests.train.conftest import fingerprint, tiny

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
SMALL = {"data": {"name": "digits", "train_samples": 64, "validation": 0.25, "augment": []}}
RECIPE = tiny(**SMALL, train={"batch_size": 16, "epochs": 2, "log_every": 1})

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # Forking a process that has threads is deliberate here; the child only ever runs single-threaded code.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


def load_everything() -> None:
    """Import what a run imports late, so that each of the many children doesn't pay for it."""
    import accelerate
    import matplotlib.backends.backend_agg
    import sklearn.datasets
    import torch.utils.tensorboard
    import torchmetrics.functional.classification

    assert all((accelerate, matplotlib, sklearn, torch.utils.tensorboard, torchmetrics))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(folder: Path, work) -> int:
    """Run `work` in a fork; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work(folder)
            os._exit(0)
        except BaseException as error:  # the parent sees the status, the log says why
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_and_kill(folder: Path, at: int | None) -> list[str]:
    """Watch file events below `folder`; kill the process before event number `at`."""
    seen: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or not args or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if not os.fspath(args[0]).__str__().startswith(str(folder)):
            return
        if at is not None and len(seen) == at:
            die()
        seen.append(event)

    sys.addaudithook(hook)
    return seen


def kill_before_event(at: int):
    def work(folder: Path) -> None:
        count_and_kill(folder, at)
        run_recipe(RECIPE, folder, resume=True)

    return work


def kill_half_way_through_write(at: int):
    """Let the `at`-th checkpoint file be written to its first half, then die."""

    def work(folder: Path) -> None:
        from hardmix.train import state

        put, count = state._put, iter(range(10**6))

        def half(path: Path, data: bytes, manifest):
            if next(count) == at:
                with open(path, "wb") as file:
                    file.write(data[: len(data) // 2])
                    file.flush()
                die()
            put(path, data, manifest)

        state._put = half
        run_recipe(RECIPE, folder, resume=True)

    return work


def kill_in_step(step: int):
    def work(folder: Path) -> None:
        from hardmix.train import loop

        one_step = loop._Run._one_step

        def stepping(self, number, index, raw):
            if number == step:
                die()
            return one_step(self, number, index, raw)

        loop._Run._one_step = stepping
        run_recipe(RECIPE, folder, resume=True)

    return work


def count_events(tmp_path: Path) -> int:
    """How many file events a whole run has."""
    report = tmp_path / "count.txt"

    def work(folder: Path) -> None:
        seen = count_and_kill(folder, None)
        run_recipe(RECIPE, folder)
        report.write_text(str(len(seen)))

    assert child(tmp_path / "counted", work) == 0
    return int(report.read_text())


@pytest.mark.slow
def test_every_kill_point_resumes_bit_exactly(tmp_path, monkeypatch):
    def go_on(folder: Path) -> None:
        run_recipe(RECIPE, folder, resume=True)

    load_everything()
    # Drawing plots takes longer than training; what matters here is how the page reaches the disk.
    monkeypatch.setattr("hardmix.train.loop._write_report", lambda run: write_text(run / "report.html", "<p>done</p>"))
    assert child(tmp_path / "straight", go_on) == 0
    expected = fingerprint(tmp_path / "straight")
    events = count_events(tmp_path)
    assert events > 20
    points = [kill_before_event(at) for at in range(events)]
    points += [kill_half_way_through_write(at) for at in range(8)]
    points += [kill_in_step(step) for step in range(1, 6)]
    for number, point in enumerate(points):
        folder = tmp_path / f"run-{number}"
        assert child(folder, point) == -signal.SIGKILL, number
        assert child(folder, go_on) == 0, number
        assert fingerprint(folder) == expected, number
        left = [path.name for path in folder.rglob(".*")]
        assert not left, (number, left)
    sys.stdout.write(f"{len(points)} kill points tried, {len(points)} resumed bit-exactly\n")
