"""What the command ends with when nothing of ours hears a signal."""

from __future__ import annotations

import json
import sys
import threading
import time

import pytest
import torch

from hardmix import cli, launcher


@pytest.fixture
def end(monkeypatch, capsys, tmp_path):
    """A command in which something is raised; returns its exit code and what it tells."""

    def make(error: BaseException) -> tuple[object, str]:
        def broken(*args: object, **options: object) -> None:
            raise error

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("hardmix.train.recipe.load_recipe", broken)
        monkeypatch.setattr(sys, "argv", ["hardmix", "copy", "fashion-mixup"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().err

    return make


def test_ctrl_c_outside_the_steps_is_told_and_is_no_success(end) -> None:
    assert end(KeyboardInterrupt()) == (130, "hardmix: stopped.\n")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2560 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_sentence(error: Exception, end) -> None:
    code, told = end(error)
    assert code == 3
    assert told.startswith("hardmix: out of memory (")
    assert "make train.batch_size, eval.batch_size or data.image_size smaller" in told
    assert told.count("\n") == 1


def test_help_and_version_are_a_success(monkeypatch, capsys) -> None:
    for argument in ("--version", "--help"):
        monkeypatch.setattr(sys, "argv", ["hardmix", argument])
        cli.main()
    assert "hardmix" in capsys.readouterr().out


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "module", "told"),
    [(FULL, "tensorboard.writer", False), (KeyError("x"), "tensorboard.writer", True), (FULL, "other", True)],
)
def test_a_thread_that_could_not_write_leaves_the_telling_to_the_run(error, module, told, monkeypatch, capsys) -> None:
    def fail(*args: object, **options: object) -> None:
        def raises() -> None:
            raise error

        thread = type("Writer", (threading.Thread,), {"__module__": module})(target=raises)
        thread.start()
        thread.join()
        raise ValueError("ours.")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr("hardmix.train.recipe.load_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["hardmix", "copy", "fashion-mixup"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "hardmix: ours." in shown
    assert ("Traceback" in shown) == told
    assert threading.excepthook is threading.__excepthook__


def test_a_launcher_gets_the_sentence_unless_its_disk_is_full(tmp_path, monkeypatch) -> None:
    file = tmp_path / "error.json"
    for path in (file, tmp_path / "missing" / "error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        launcher.tell_launcher("it is broken.")
    known = json.loads(file.read_text())["message"]
    assert known["message"] == "it is broken."
    assert abs(int(known["extraInfo"]["timestamp"]) - time.time()) < 60


def test_each_of_several_processes_says_who_it_is(monkeypatch) -> None:
    assert launcher.speaker() == "hardmix"
    assert launcher.first_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launcher.speaker() == "hardmix, rank 1"
    assert not launcher.first_rank()
