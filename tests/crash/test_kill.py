"""Kill a run at every file event of its checkpoints and in mid-epoch; it must resume to the same bytes.

So must an image-text run that first trains what it starts from, with a teacher that follows the model.

A child is forked after torch is loaded, trains the tiny recipe and kills itself with SIGKILL at the n-th event: before
a file is opened, a folder made, renamed or removed, or half-way through a write. Then at twenty moments drawn by lot.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hardmix.train.files import write_text
from hardmix.train.loop import run_recipe
from tests.train.conftest import fingerprint, tiny
from tests.train.test_image_text import drawings, pairs

assert drawings  # the fixture
Train = Callable[[Path], object]

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
    import torch._dynamo  # by the first optimizer
    import torch.utils.tensorboard
    import torchmetrics.functional.classification

    assert all((accelerate, matplotlib, sklearn, torch._dynamo, torch.utils.tensorboard, torchmetrics))


def no_plots(monkeypatch) -> None:
    """Drawing them takes longer than training; what matters here is how the page reaches the disk."""
    monkeypatch.setattr("hardmix.train.loop._write_report", lambda run: write_text(run / "report.html", "<p>done</p>"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_tiny(folder: Path) -> None:
    run_recipe(RECIPE, folder, resume=True)


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


def kill_before_event(at: int, train: Train = train_tiny):
    def work(folder: Path) -> None:
        count_and_kill(folder, at)
        train(folder)

    return work


def kill_half_way_through_write(at: int, train: Train = train_tiny):
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
        train(folder)

    return work


def kill_in_step(step: int, train: Train = train_tiny, name: str = RECIPE.name):
    def work(folder: Path) -> None:
        from hardmix.train import loop

        one_step = loop._Run._one_step

        def stepping(self, number, index, raw):
            if (self.recipe.name, number) == (name, step):
                die()
            return one_step(self, number, index, raw)

        loop._Run._one_step = stepping
        train(folder)

    return work


def kill_after(seconds: float, train: Train = train_tiny):
    """Wherever the run is then."""

    def work(folder: Path) -> None:
        signal.signal(signal.SIGALRM, lambda signum, frame: die())
        signal.setitimer(signal.ITIMER_REAL, seconds)
        train(folder)

    return work


def count_events(tmp_path: Path, train: Train = train_tiny) -> int:
    """How many file events a whole run has."""
    report = tmp_path / "count.txt"

    def work(folder: Path) -> None:
        seen = count_and_kill(folder, None)
        train(folder)
        report.write_text(str(len(seen)))

    assert child(tmp_path / "counted", work) == 0
    return int(report.read_text())


@pytest.mark.slow
def test_every_kill_point_resumes_bit_exactly(tmp_path, monkeypatch, capsys):
    load_everything()
    no_plots(monkeypatch)
    started = time.monotonic()
    assert child(tmp_path / "straight", train_tiny) == 0
    lasts = time.monotonic() - started
    expected = fingerprint(tmp_path / "straight")
    events = count_events(tmp_path)
    assert events > 20
    points = [kill_before_event(at) for at in range(events)]
    points += [kill_half_way_through_write(at) for at in range(8)]
    points += [kill_in_step(step) for step in range(1, 6)]
    named = len(points)
    moments = random.Random(0)
    points += [kill_after(moments.uniform(0.05, 0.95) * lasts) for _ in range(20)]
    for number, point in enumerate(points):
        folder = tmp_path / f"run-{number}"
        status = child(folder, point)
        assert status == -signal.SIGKILL or (number >= named and status == 0), number  # a moment may come too late
        assert child(folder, train_tiny) == 0, number
        assert fingerprint(folder) == expected, number
        left = [path.name for path in folder.rglob(".*")]
        assert not left, (number, left)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(points)} kill points tried, {len(points)} resumed bit-exactly\n")


@pytest.mark.slow
def test_kills_with_loader_workers_resume_bit_exactly_and_at_once(tmp_path, monkeypatch):
    """To the bytes of a run without workers, though those of the killed run may still be there."""
    load_everything()
    no_plots(monkeypatch)
    assert child(tmp_path / "straight", train_tiny) == 0
    expected = fingerprint(tmp_path / "straight")
    recipe = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"workers": 2})})

    def train(folder: Path) -> None:
        run_recipe(recipe, folder, resume=True)

    for number, point in enumerate([kill_in_step(2, train), kill_half_way_through_write(3, train)]):
        folder = tmp_path / f"run-{number}"
        assert child(folder, point) == -signal.SIGKILL, number
        assert child(folder, train) == 0, number
        assert fingerprint(folder) == expected, number


@pytest.mark.slow
def test_a_start_and_what_follows_from_it_resume_bit_exactly(drawings, tmp_path, monkeypatch):
    """m2-Mix, whose weight falls with the epochs, then CaRot, whose teacher is part of what a checkpoint holds."""
    train = {"epochs": 2, "batch_size": 7}
    first = pairs(drawings, name="first", objective={"name": "m2-mix", "schedule": "inverse"}, train=train)
    (tmp_path / "first.toml").write_text(first.to_toml())
    tuned = pairs(drawings, name="tuned", objective={"name": "carot"}, train=train,
                  tune={"start": str(tmp_path / "first.toml")})  # fmt: skip

    def both(folder: Path) -> None:
        os.environ["HARDMIX_CACHE"] = str(folder / "cache")
        run_recipe(tuned, folder / "tuned", resume=True)

    def found(folder: Path) -> list[dict[str, bytes]]:
        (start,) = (folder / "cache/runs").iterdir()
        return [fingerprint(start), fingerprint(folder / "tuned")]

    load_everything()
    no_plots(monkeypatch)
    assert child(tmp_path / "straight", both) == 0
    expected = found(tmp_path / "straight")
    assert all("objective.safetensors" in " ".join(files) for files in expected)
    events = count_events(tmp_path, both)
    points = [kill_before_event(at, both) for at in range(3, events, 4)]
    points += [kill_half_way_through_write(at, both) for at in (1, 13)]
    points += [kill_in_step(step, both, name) for name in ("first", "tuned") for step in (1, 3)]
    for number, point in enumerate(points):
        folder = tmp_path / f"run-{number}"
        assert child(folder, point) == -signal.SIGKILL, number
        assert child(folder, both) == 0, number
        assert found(folder) == expected, number
        assert not list(folder.rglob(".*")), number
    sys.stdout.write(f"{len(points)} kill points of {events} events tried, all resumed bit-exactly\n")
