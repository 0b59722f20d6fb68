"""Runs side by side: one that breaks, is killed or has ended leaves the others their checkpoints, and nobody waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hardmix.train.compare import compare
from hardmix.train.errors import RunError

from .conftest import tiny

LONG = {"epochs": 4000, "log_every": 1, "checkpoint_every": 4000}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`hardmix compare` of two recipes on two cores, in a group of its own that does not outlive the test."""
    begun: list[subprocess.Popen[str]] = []

    def run(*recipes, seeds: int = 1) -> subprocess.Popen[str]:
        names = [f"{recipe.name}.toml" for recipe in recipes]
        for name, recipe in zip(names, recipes, strict=True):
            (tmp_path / name).write_text(recipe.to_toml())
        command = [sys.executable, "-m", "hardmix", "compare", *names, "--seeds", str(seeds), "--jobs", "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(
            subprocess.Popen([*command, "--out", "out"], cwd=tmp_path, start_new_session=True, **pipes)  # type: ignore[call-overload]
        )
        return begun[-1]

    yield run
    for process in begun:
        if left(process):
            os.killpg(process.pid, signal.SIGKILL)


def left(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the group that still run."""
    found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]


def until(met: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not met():
        time.sleep(0.1)
    assert met()


def trains(folder: Path) -> bool:
    log = folder / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 500


def saved(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_breaks_is_named(workers, tmp_path) -> None:
    breaks = tiny(name="breaks", train={"lr": 1e25})
    with pytest.raises(RunError, match=r"^breaks, seed [01]: the loss is nan at step "):  # whichever is first
        compare([breaks], [0, 1], tmp_path, workers=workers)


def test_a_worker_that_does_not_hear_its_signal_ends_all_the_same(tmp_path) -> None:
    told: list[str] = []

    def train() -> None:
        try:
            compare([tiny(name="breaks", train={"lr": 1e25})], [0, 1], tmp_path, workers=2)
        except RunError as error:
            told.append(str(error))

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which workers inherit
    try:
        thread = threading.Thread(target=train, daemon=True)  # the main one would hear it
        thread.start()
        thread.join(90)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "the loss is nan" in told[0]


@pytest.mark.slow
def test_a_run_that_breaks_ends_the_others_with_a_checkpoint(start, tmp_path) -> None:
    short = tiny(name="short", train={"epochs": 1, "warmup_epochs": 0})
    process = start(tiny(name="long", train=LONG), short, tiny(name="breaks", train={"lr": 1e25}))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "hardmix: breaks, seed 0: the loss is nan" in err
    assert saved(tmp_path / "out/long/seed-0")


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_others_with_a_checkpoint(start, tmp_path) -> None:
    process = start(tiny(name="long", train=LONG), tiny(name="other", train=LONG))
    folders = [tmp_path / f"out/{name}/seed-0" for name in ("long", "other")]
    until(lambda: all(map(trains, folders)))
    victim = subprocess.run(
        ["pgrep", "-f", "-P", str(process.pid), "spawn_main"], capture_output=True, text=True, check=True
    )
    os.kill(int(victim.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "seed 0: killed, perhaps for memory; try again with fewer --jobs." in err
    assert sum(map(saved, folders)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_last_run_where_the_other_worker_is_done(start, signum, code, tmp_path) -> None:
    process = start(tiny(name="long", train=LONG), tiny(name="short", train={"epochs": 1, "warmup_epochs": 0}))
    until(lambda: (tmp_path / "out/short/seed-0/report.html").is_file() and trains(tmp_path / "out/long/seed-0"))
    time.sleep(1.0)
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "the same command goes on" in err
    assert saved(tmp_path / "out/long/seed-0")


@pytest.mark.slow
def test_workers_whose_parent_is_gone_save_and_end(start, tmp_path) -> None:
    process = start(tiny(name="long", train=LONG), tiny(name="short", train={"epochs": 1, "warmup_epochs": 0}))
    until(lambda: (tmp_path / "out/short/seed-0/report.html").is_file() and trains(tmp_path / "out/long/seed-0"))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)  # they have its output too
    until(lambda: not left(process))
    assert saved(tmp_path / "out/long/seed-0")
