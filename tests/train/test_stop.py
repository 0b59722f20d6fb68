"""Signals where no step can be finished first, workers of the loader, and folders that are not a run's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hardmix.train import loop
from hardmix.train.errors import CheckpointError, Interrupted, RunError
from hardmix.train.files import only_writer
from hardmix.train.loop import run_recipe
from hardmix.train.stop import ends_at_signal
from hardmix.train.tasks.classification import Classification

from .conftest import fingerprint, tiny


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_test_split_is_measured_says_how_to_go_on(signum, tmp_path, monkeypatch) -> None:
    straight = run_recipe(tiny(), tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "test", lambda self, model, device: os.kill(os.getpid(), signum))
        with pytest.raises(
            Interrupted, match=r"stopped after the training; go on with: hardmix run --resume"
        ) as caught:
            run_recipe(tiny(), tmp_path / "run")
    assert caught.value.signum == signum
    assert not (tmp_path / "run/summary.json").exists()
    assert run_recipe(tiny(), tmp_path / "run", resume=True)["test"] == straight["test"]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ends_at_signal("stopped"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_with_workers_saves(tmp_path) -> None:
    """As a service manager sends it."""
    (tmp_path / "long.toml").write_text(tiny(data={"workers": 2}, train={"epochs": 2000, "log_every": 1}).to_toml())
    command = [sys.executable, "-m", "hardmix", "run", "long.toml", "--out", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size > 500):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "hardmix run --resume run" in err
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_worker_does_not_hold_the_folder(tmp_path) -> None:
    lives, tells = os.pipe()
    with only_writer(tmp_path) as held:
        assert held
        worker = os.fork()
        if worker == 0:
            os.write(tells, b"!")
            time.sleep(60)
            os._exit(0)
        assert os.read(lives, 1) == b"!"
    try:
        with only_writer(tmp_path) as held:
            assert held
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(lives)
        os.close(tells)


def test_errors_of_a_worker_are_those_of_the_run_itself(tmp_path, monkeypatch) -> None:
    def load(self, index):
        raise ValueError(f"image {int(index[0])} can't be read; replace it.")

    monkeypatch.setattr(Classification, "load", load)
    told = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"^image \d+ can't be read; replace it\.$") as caught:
            run_recipe(tiny(data={"workers": workers}), tmp_path / str(workers))
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_nothing_of_a_folder_that_is_no_run_is_touched(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".notes.part").write_text("mine")
    (tmp_path / ".precious.part").mkdir()
    (tmp_path / ".precious.part/data").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        run_recipe(tiny(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes.part", ".precious.part", "notes.txt"]
    assert (tmp_path / ".precious.part/data").read_text() == "mine"
    (tmp_path / "half").mkdir()
    (tmp_path / "half/.recipe.toml.part").write_text("na")  # of a start that was killed
    assert run_recipe(tiny(train={"epochs": 1}), tmp_path / "half")["finished"]
    assert not list((tmp_path / "half").glob(".*"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_recipe(tiny(), folder / "own")
    run_recipe(tiny(seed=3), folder / "other")
    for run in ("own", "other"):
        (folder / run / "summary.json").unlink()
    return folder


def test_a_checkpoint_of_another_run_is_refused(runs, tmp_path) -> None:
    shutil.copytree(runs / "own", tmp_path / "run")
    steps = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    shutil.rmtree(steps[-1])
    shutil.copytree(runs / "other/checkpoints" / steps[-1].name, steps[-1])
    with pytest.raises(CheckpointError, match=r"is of a run with other settings \(seed\); delete that folder"):
        run_recipe(tiny(), tmp_path / "run", resume=True)
    shutil.rmtree(steps[-1])
    run_recipe(tiny(), tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(runs / "own")


def test_a_renamed_checkpoint_is_refused(runs, tmp_path) -> None:
    shutil.copytree(runs / "own", tmp_path / "run")
    last = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    last.rename(last.with_name("step-00000099"))
    with pytest.raises(CheckpointError, match=r"is of step \d+, so it was renamed; delete that folder"):
        run_recipe(tiny(), tmp_path / "run", resume=True)


def test_another_number_of_processes_is_told(runs, tmp_path, monkeypatch) -> None:
    shutil.copytree(runs / "own", tmp_path / "run")
    last = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    saved = json.loads((last / "state.json").read_text())
    assert saved["processes"] == 1
    read = loop.load_checkpoint

    def of_two(root, which="last"):
        checkpoint = read(root, which)
        checkpoint.state["processes"] = 2
        return checkpoint

    monkeypatch.setattr(loop, "load_checkpoint", of_two)
    with pytest.warns(UserWarning, match="was written by 2 processes and 1 go on"):
        run_recipe(tiny(), tmp_path / "run", resume=True)
