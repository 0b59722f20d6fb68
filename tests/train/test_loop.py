"""The loop: same recipe same bytes, resuming is exact, a loss that is not finite stops it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from hardmix.data.splits import stratified_subset
from hardmix.train import log as log_module
from hardmix.train import loop, state
from hardmix.train.compare import compare
from hardmix.train.errors import Interrupted, RunError
from hardmix.train.evaluate import load_run
from hardmix.train.files import only_writer
from hardmix.train.log import RunLog
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe, load_recipe
from hardmix.train.state import load_checkpoint
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


@pytest.mark.parametrize("full", ["recipe", "log", "tensorboard"])
def test_a_disk_that_is_full_from_the_start_is_told_with_the_folder(full, straight, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {"recipe": (loop, "write_text"), "log": (RunLog, "__init__"), "tensorboard": (log_module, "board")}[full]
    monkeypatch.setattr(*place, fail)
    folder = tmp_path / "new" / "run"
    with pytest.raises(RunError, match=r"run could not be written into \(No space left on device\); make room") as told:
        run_recipe(tiny(), folder)
    begun = full != "recipe"
    assert (tmp_path / "new").exists() == begun
    assert str(told.value).endswith(f"hardmix run --resume {folder}" if begun else "start it again.")
    monkeypatch.undo()
    run_recipe(tiny(), folder, resume=begun)
    assert fingerprint(folder) == fingerprint(straight)


@pytest.mark.parametrize("place", ["mark_best", "clean_leftovers"])
def test_a_disk_that_is_still_full_is_told_with_the_folder(place, straight, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (folder / "summary.json").unlink()
    monkeypatch.setattr(loop, place, fail)
    with pytest.raises(RunError, match=r"run could not be written into \(No space left on device\)"):
        run_recipe(tiny(), folder, resume=True)
    monkeypatch.undo()
    run_recipe(tiny(), folder, resume=True)
    assert fingerprint(folder) == fingerprint(straight)


def test_a_damaged_summary_is_named_and_written_again(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    path = folder / "summary.json"
    before = json.loads(path.read_text())
    for damaged in (path.read_text()[:100], "{}", "[]"):
        path.write_text(damaged)
        with pytest.raises(RunError, match=rf"{re.escape(str(path))} is damaged; delete it, and hardmix run --resume"):
            run_recipe(tiny(), folder, resume=True)
    path.unlink()
    assert run_recipe(tiny(), folder, resume=True)["test"] == before["test"]


@pytest.mark.parametrize(("policy", "smallest"), [("cutmix", 64), ("augmix", 32)])
def test_a_part_of_a_batch_is_not_too_small_to_mix(policy, smallest, tmp_path):
    objective = {"name": "soft-cross-entropy"}
    options = {"policy": {"name": policy}, "objective": objective, "data": {"augment": []}}
    parts = {"batch_size": smallest - 1, "accumulate": 32, "epochs": 1, "warmup_epochs": 0}
    of_two = " of two samples to mix" * (policy == "cutmix")
    with pytest.raises(
        RunError, match=rf"is {smallest - 1}, but 1 process x 32 parts{of_two} need at least {smallest}; "
    ):
        run_recipe(tiny(train=parts, **options), tmp_path / "run")


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


def test_a_run_leaves_the_number_of_threads_as_it_was(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_recipe(tiny(train={"epochs": 1}), tmp_path / "run")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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
    with pytest.raises(RunError, match=rf"already holds a run that is finished; pass .*{straight.name}-2\.$"):
        run_recipe(tiny(), straight)
    with pytest.raises(RunError, match=r"is finished, of another recipe \(seed differ\); pass another --out"):
        run_recipe(tiny(seed=5), straight)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "recipe.toml").write_text(tiny().to_toml())
    (tmp_path / "begun-2").mkdir()
    with pytest.raises(RunError, match=rf"not finished; go on with hardmix run --resume {begun}, .*begun-3\.$"):
        run_recipe(tiny(), begun)
    (begun / "recipe.toml").write_text("damaged")
    with pytest.raises(RunError, match="already holds a run that is not finished; go on with"):
        run_recipe(tiny(), begun)
    shutil.rmtree(begun)
    (tmp_path / "begun-2").rmdir()
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


FAILING = {
    "no such data": ({"data": {"name": "cifar10", "path": "nowhere"}}, "nowhere"),
    "too few samples": ({"data": {"train_samples": 1}}, "train_samples is 1,"),
    "no such layer": ({"policy": {"name": "manifold-mixup", "layers": ["stag1"]}}, 'did you mean "stage1"'),
    "fp16 on a CPU": ({"train": {"precision": "fp16"}}, r"train\.precision is fp16, .* take bf16"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_start_that_fails_leaves_nothing(tmp_path, case):
    sections, message = FAILING[case]
    for start in (
        lambda out: run_recipe(tiny(**sections), out / "tiny" / "seed-0"),
        lambda out: compare([tiny(**sections)], [0], out, workers=1),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            start(tmp_path / "out")
        assert not list(tmp_path.iterdir())
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        run_recipe(tiny(**sections), mine)
    assert not list(mine.iterdir())


def test_a_missing_package_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm"):
        run_recipe(tiny(model={"name": "timm/resnet18"}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bf16_changes_the_arithmetic_of_a_cpu_but_not_what_is_learnt(straight, tmp_path):
    summary = run_recipe(tiny(train={"precision": "bf16"}), tmp_path / "run")
    assert fingerprint(tmp_path / "run") != fingerprint(straight)
    (own,), (whole,) = (losses(folder)[:1] for folder in (tmp_path / "run", straight))
    assert own != whole
    assert own == pytest.approx(whole, rel=0.02)
    assert torch.tensor(summary["test"]["nll"]).isfinite()


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def weights(folder: Path, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints", str(step)).tensors[kind]


def test_a_batch_in_parts_moves_the_weights_as_the_whole_does(tmp_path):
    """Without batch norms, views and draws, which go by the part."""
    model = {"name": "tiny-vit", "options": {"dim": 16, "depth": 3, "heads": 2, "patch": 4}}
    for parts in (1, 2, 3):
        train = {"epochs": 1, "accumulate": parts, "warmup_epochs": 0}
        run_recipe(tiny(policy=None, model=model, data={"augment": []}, train=train), tmp_path / str(parts))
    whole = weights(tmp_path / "1", 5)
    for parts in ("2", "3"):  # 3 parts of 32 samples are not of one size
        torch.testing.assert_close(weights(tmp_path / parts, 5), whole, rtol=1e-4, atol=1e-5)
        assert losses(tmp_path / parts) == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_averaged_weights_are_the_average_of_those_after_each_step(tmp_path):
    """Two steps of an epoch each: the first average is a copy."""
    data = {"train_samples": 32, "validation": 0}
    run_recipe(tiny(data=data, train={"ema": 0.75, "warmup_epochs": 0}), tmp_path / "run")
    first, second = (weights(tmp_path / "run", step) for step in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for step, expected in (
        (1, first),
        (2, {name: 0.75 * value + 0.25 * second[name] for name, value in first.items()}),
    ):
        average = weights(tmp_path / "run", step, "ema")
        for name, value in expected.items():
            if first[name].is_floating_point():
                torch.testing.assert_close(average[f"module.{name}"], value)


def test_the_log_is_kept_for_tensorboard_too(straight):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(straight))
    assert [event.step for event in events.Scalars("validation/top1")] == [5, 10]


def test_numbers_of_samples_that_cannot_be_had_are_told_with_the_data():
    with pytest.raises(ValueError, match=r"data\.train_samples is 9, but digits has 1,442 .* of 10 classes; .* 10 to "):
        Classification(tiny(data={"train_samples": 9}))
    with pytest.raises(ValueError, match=r"data: digits has 10 training images of 10 classes, .* data\.validation=0,"):
        Classification(tiny(data={"train_samples": 10, "validation": 0.2}))
    assert len(Classification(tiny(data={"train_samples": 10, "validation": 0})).train_set) == 10


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


def test_training_images_as_they_are_are_measured_beside_the_validation(tmp_path):
    recipe = tiny(eval={"probe": 60}, train={"epochs": 2})
    run_recipe(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [line["train_top1"] for line in lines if line["kind"] == "validation"]
    assert len(told) == 2
    assert all(round(60 * value) == pytest.approx(60 * value) for value in told)
    loaded = load_run(tmp_path / "run")
    images = loaded.task.train_set
    probe = images.subset(stratified_subset(images.labels, 60, seed=0))
    right = loaded.task.predict(loaded.task.network, probe, loaded.device).argmax(1) == probe.labels
    assert told[-1] == pytest.approx(float(right.float().mean()))
    # what is asked changes nothing of what is trained
    run_recipe(tiny(train={"epochs": 2}), tmp_path / "plain")
    names = sorted(name for name in fingerprint(tmp_path / "run") if name.endswith("model.safetensors"))
    assert all(fingerprint(tmp_path / "run")[name] == fingerprint(tmp_path / "plain")[name] for name in names)


def test_the_probe_needs_no_validation_split(tmp_path):
    summary = run_recipe(tiny(eval={"probe": 10**6}, data={"validation": 0.0}), tmp_path / "run")
    assert set(summary["validation"]) == {"train_top1"}
    with pytest.raises(ValueError, match=r"eval\.probe is for classification recipes; leave it out"):
        load_recipe("emoji-clip", ["eval.probe=5"])
