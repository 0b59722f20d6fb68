"""The loop: same recipe same bytes, resuming is exact, a loss that is not finite stops it."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from hardmix.train import state
from hardmix.train.errors import Interrupted, RunError
from hardmix.train.files import only_writer
from hardmix.train.log import RunLog
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe
from hardmix.train.tasks.classification import Classification

from .conftest import fingerprint, tiny


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_recipe(tiny(), folder)
    return folder


def stop_after(step: int, signum: int = signal.SIGTERM):
    """A progress callback that sends this process a signal once `step` is reached."""

    def progress(event):
        if event["step"] >= step:
            os.kill(os.getpid(), signum)

    return progress


def interrupted(recipe: Recipe, folder: Path, step: int, monkeypatch, signum: int = signal.SIGTERM) -> int:
    """Run until a signal arrives at `step`; the loop must tell about every step for that."""
    ticks = iter(range(10**9))
    monkeypatch.setattr("hardmix.train.loop.time.perf_counter", lambda: float(next(ticks)))
    with pytest.raises(Interrupted, match="--resume") as caught:
        run_recipe(recipe, folder, progress=stop_after(step, signum))
    monkeypatch.undo()
    assert caught.value.signum == signum
    return json.loads(sorted((folder / "checkpoints").glob("step-*"))[-1].joinpath("state.json").read_text())["step"]


def test_nothing_of_a_step_stays_behind_on_the_cpu():
    """On a device of its own (meta stands for any) the task moves all that it computes with."""
    task = Classification(tiny()).to(torch.device("meta"))
    batch = tuple(part.to("meta") for part in task.load(torch.arange(8)))
    loss, values = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    assert {tensor.device.type for tensor in (loss, *values.values())} == {"meta"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_says_so(number, straight, tmp_path, monkeypatch):
    """At every file of the second checkpoint in turn, after half of it has been written."""
    put, files = state._put, 4  # model, optimizer, state, manifest
    for place in range(files):
        folder, calls = tmp_path / str(place), iter(range(10**6))

        def fail(path, data, manifest, place=place, calls=calls):
            if next(calls) == files + place:
                path.write_bytes(data[: len(data) // 2])
                raise OSError(number, os.strerror(number), str(path))
            put(path, data, manifest)

        monkeypatch.setattr(state, "_put", fail)
        message = (
            rf"the checkpoint of step 10 could not be written \({os.strerror(number)}\); the checkpoint of step 5 is "
        )
        with pytest.raises(RunError, match=message + r"intact: .* hardmix run --resume"):
            run_recipe(tiny(), folder)
        monkeypatch.undo()
        assert [path.name for path in (folder / "checkpoints").glob("*step*")] == ["step-00000005"]
        run_recipe(tiny(), folder, resume=True)
        assert fingerprint(folder) == fingerprint(straight)


def test_a_log_that_cannot_be_written_ends_the_run_in_a_sentence(straight, tmp_path, monkeypatch):
    write, calls = RunLog._write, iter(range(10**6))

    def fail(self, name, record):
        if next(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, record)

    monkeypatch.setattr(RunLog, "_write", fail)
    with pytest.raises(RunError, match=r"the log of step \d+ could not be written \(No space left on device\)"):
        run_recipe(tiny(), tmp_path / "run")
    monkeypatch.undo()
    run_recipe(tiny(), tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(straight)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_what_a_full_disk_did_not_take_does_not_hide_the_sentence(tmp_path, monkeypatch):
    """The log keeps what could not be flushed, and closing it tries again."""
    started = RunLog.__init__

    def onto_a_full_disk(self, *args, **options):
        started(self, *args, **options)
        self._files["metrics"].close()
        self._files["metrics"] = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115

    monkeypatch.setattr(RunLog, "__init__", onto_a_full_disk)
    with pytest.raises(RunError, match=r"the log of step 2 could not be written \(No space left on device\)"):
        run_recipe(tiny(), tmp_path / "run")


def test_values_that_are_not_finite_are_null_in_the_log(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics({"kind": "validation", "step": 1, "pearson": float("nan")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["pearson"] is None


def test_a_run_leaves_what_it_promises(straight):
    for name in ("recipe.toml", "metrics.jsonl", "timing.jsonl", "summary.json", "gallery.safetensors", "report.html"):
        assert (straight / name).stat().st_size > 0, name
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["finished"]
    assert summary["data"]["train"] == 160
    assert summary["data"]["validation"] == 40
    assert summary["policy"] == "cutmix"
    assert 0.0 <= summary["test"]["cutmix_both"] <= 1.0
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4, 6, 8, 10]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [5, 10]


def test_the_same_recipe_twice_gives_the_same_bytes(straight, tmp_path):
    run_recipe(tiny(), tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(straight)


def test_another_seed_gives_other_bytes(straight, tmp_path):
    run_recipe(tiny(seed=1), tmp_path / "other")
    assert fingerprint(tmp_path / "other") != fingerprint(straight)


def test_loader_workers_change_nothing(straight, tmp_path):
    run_recipe(tiny(data={"workers": 2}), tmp_path / "workers")
    assert fingerprint(tmp_path / "workers") == fingerprint(straight)


@pytest.mark.parametrize("step", [2, 5, 7])
def test_resuming_in_mid_epoch_is_bit_exact(straight, tmp_path, monkeypatch, step):
    folder = tmp_path / "run"
    assert interrupted(tiny(), folder, step, monkeypatch) == step
    run_recipe(tiny(), folder, resume=True)
    assert fingerprint(folder) == fingerprint(straight)


def test_resuming_carries_averaged_weights_and_accumulation(tmp_path, monkeypatch):
    recipe = tiny(train={"ema": 0.9, "accumulate": 2, "optimizer": "adamw", "lr": 0.003, "clip_norm": 1.0})
    run_recipe(recipe, tmp_path / "straight")
    interrupted(recipe, tmp_path / "run", 7, monkeypatch, signal.SIGINT)
    run_recipe(recipe, tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "straight")
    assert any("ema" in name for name in fingerprint(tmp_path / "run"))


def test_a_finished_run_is_not_trained_again(straight):
    before = (straight / "metrics.jsonl").stat().st_mtime_ns
    assert run_recipe(tiny(), straight, resume=True)["finished"]
    assert (straight / "metrics.jsonl").stat().st_mtime_ns == before


def test_folders_that_hold_something_else_are_refused(straight, tmp_path):
    with pytest.raises(RunError, match="already holds a run; pass --resume"):
        run_recipe(tiny(), straight)
    with pytest.raises(RunError, match=r"run of another recipe \(seed differ\)"):
        run_recipe(tiny(seed=5), straight, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        run_recipe(tiny(), tmp_path)
    with pytest.raises(RunError, match="is a file"):
        run_recipe(tiny(), tmp_path / "notes.txt")


def test_a_folder_that_another_process_trains_into_is_refused(straight):
    with only_writer(straight) as held:
        assert held
        with pytest.raises(RunError, match="another process trains into"):
            run_recipe(tiny(), straight, resume=True)


def test_a_key_that_a_newer_version_adds_does_not_stop_a_resume(tmp_path, monkeypatch):
    interrupted(tiny(), tmp_path / "run", 3, monkeypatch)
    toml = tmp_path / "run/recipe.toml"
    kept = [line for line in toml.read_text().splitlines() if not line.startswith("checkpoint_every")]
    toml.write_text("\n".join(kept))
    assert run_recipe(tiny(), tmp_path / "run", resume=True)["finished"]


def test_the_best_checkpoint_is_what_the_summary_speaks_of(tmp_path):
    summary = run_recipe(tiny(eval={"checkpoint": "best"}, train={"epochs": 4}), tmp_path / "run")
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert summary["checkpoint"] == {"which": "best", "step": best["step"]}
    assert summary["validation"]["top1"] == best["score"]
    with pytest.raises(ValueError, match=r"set data\.validation above 0"):
        run_recipe(tiny(eval={"checkpoint": "best"}, data={"validation": 0}), tmp_path / "none")


def test_class_weights_come_from_a_recipe(tmp_path):
    objective = {"name": "decoupled-mixup", "weight": [1.0] * 9 + [2.0]}
    assert run_recipe(tiny(objective=objective), tmp_path / "run")["finished"]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(tmp_path):
    recipe = tiny(train={"lr": 1e18, "weight_decay": 0.0, "momentum": 0.0})
    with pytest.raises(RunError) as caught:
        run_recipe(recipe, tmp_path / "run")
    message = str(caught.value)
    assert "the loss is" in message
    assert "at step" in message
    assert "train/" in message


@pytest.mark.parametrize(
    "sections",
    [
        {"policy": None, "objective": {"name": "soft-cross-entropy", "label_smoothing": 0.1}},
        {"policy": {"name": "mixup", "alpha": 0.2}, "objective": {"name": "decoupled-mixup-bce", "xi": 0.8}},
        {"policy": {"name": "manifold-mixup", "layers": ["stage1"], "alpha": 1.0}},
        {"policy": {"name": "random-choice", "policies": [{"name": "mixup"}, {"name": "cutmix"}, "none"]}},
        {"policy": {"name": "scheduled", "stop": 0.5, "policy": {"name": "fmix"}}},
        {"policy": {"name": "augmix"}, "objective": {"name": "soft-cross-entropy"}},
        {"model": {"name": "tiny-vit", "options": {"dim": 16, "depth": 3, "heads": 2, "patch": 4}}},
        {"train": {"precision": "bf16"}},
        {"data": {"validation": 0}},
        {"eval": {"checkpoint": "best"}},
    ],
    ids=lambda s: next(iter(s)) + "-" + str(next(iter(s.values())))[:30],
)
def test_every_kind_of_section_trains(tmp_path, sections):
    summary = run_recipe(tiny(**sections), tmp_path / "run")
    assert summary["finished"]
    assert 0.0 <= summary["test"]["top1"] <= 1.0
    assert torch.tensor(summary["test"]["nll"]).isfinite()
