"""Checkpoints: complete or absent, checked by hash, no pickle."""

from __future__ import annotations

import pickle

import pytest
import torch

from hardmix.train.state import (
    CheckpointError,
    best_step,
    clean_leftovers,
    flatten_optimizer,
    list_steps,
    load_checkpoint,
    mark_best,
    match_shapes,
    save_checkpoint,
    unflatten_optimizer,
)


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3, 2), value), "n": torch.tensor(7)}, "ema": {"w": torch.full((2,), -value)}}


def test_round_trip_is_exact_and_best_and_last_are_found(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, tensors(step + 0.1), {"note": step}, keep=[10])
        if step == 10:
            mark_best(tmp_path, 10, 0.9)
    assert list_steps(tmp_path) == [10, 20, 30]
    assert best_step(tmp_path) == 10
    last, best = load_checkpoint(tmp_path), load_checkpoint(tmp_path, "best")
    assert (last.state["step"], best.state["note"]) == (30, 10)
    assert torch.equal(last.tensors["model"]["w"], torch.full((3, 2), 30.1))
    assert last.tensors["model"]["n"].dtype == torch.long


def test_older_checkpoints_are_dropped(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, tensors(1.0), {})
    assert list_steps(tmp_path) == [4, 5]


def test_half_of_a_dropped_checkpoint_is_no_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), {})

    def killed(folder, **options):
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hardmix.train.state.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 3, tensors(3), {})
    assert list_steps(tmp_path) == [2, 3]
    clean_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_refused_and_the_older_one_named(tmp_path, name, damage):
    save_checkpoint(tmp_path, 1, tensors(1.0), {})
    folder = save_checkpoint(tmp_path, 2, tensors(2.0), {})
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    if name == "manifest.json" and damage == "flip":
        # One flipped bit of the manifest damages a hash, a name or the syntax: refused whatever it hits.
        with pytest.raises(CheckpointError, match="step-00000002"):
            load_checkpoint(tmp_path)
        return
    with pytest.raises(CheckpointError, match="go on from step 1"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"format":1,"files":{}}', '{"format":1,"files":[]}', '{"format":1,"files":{"a":{}}}', "[]"]
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, text):
    folder = save_checkpoint(tmp_path, 1, tensors(1.0), {})
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_checkpoint(tmp_path)


def test_a_damaged_note_of_the_best_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1.0), {})
    (tmp_path / "best.json").write_text('{"st')
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        load_checkpoint(tmp_path, "best")


def test_a_checkpoint_that_is_gone_is_named_with_those_that_are_there(tmp_path):
    for step in (1, 3):
        save_checkpoint(tmp_path, step, tensors(1.0), {})
    mark_best(tmp_path, 2, 0.5)
    with pytest.raises(CheckpointError, match=r"lacks the best checkpoint, that of step 2; there are 1, 3, which hard"):
        load_checkpoint(tmp_path, "best")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of step 2; there are 1, 3"):
        load_checkpoint(tmp_path, "2")


def test_newer_format_and_missing_ones(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path)
    folder = save_checkpoint(tmp_path, 1, tensors(1.0), {})
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        load_checkpoint(tmp_path, 5)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="has format 99"):
        load_checkpoint(tmp_path)


def test_leftovers_are_cleaned(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1.0), {})
    (tmp_path / ".step-00000002.part").mkdir()
    (tmp_path / ".best.json.part").write_text("{")
    assert list_steps(tmp_path) == [1]
    clean_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(1.0), {})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, tensors(2.0), {})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path).state["step"] == 1


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p)])
def test_optimizer_state_survives(make):
    def trained(steps, state=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = make(model.parameters())
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for _ in range(steps):
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = trained(3)
    saved = unflatten_optimizer(*flatten_optimizer(optimizer.state_dict()))
    resumed, _ = trained(2, (model.state_dict(), saved))
    straight, _ = trained(5)
    assert torch.equal(resumed.weight, straight.weight)


def test_wrong_model_is_named_by_its_first_key():
    model = torch.nn.Linear(3, 2)
    good = model.state_dict()
    match_shapes("eval", model, good)
    for bad, text in [
        ({"weight": good["weight"]}, "lacks bias"),
        ({**good, "weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\)"),
        ({**good, "more": good["bias"]}, "holds more"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            match_shapes("eval", model, bad)


def test_no_pickle_is_read(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(1.0), {})

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled something")

    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    load_checkpoint(tmp_path)
