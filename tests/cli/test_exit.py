"""What the command ends with when nothing of ours hears a signal."""

from __future__ import annotations

import sys
import threading

import pytest

from hardmix import cli


def test_ctrl_c_outside_the_steps_is_told_and_is_no_success(monkeypatch, capsys, tmp_path) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hardmix.train.recipe.load_recipe", interrupted)
    monkeypatch.setattr(sys, "argv", ["hardmix", "copy", "fashion-mixup"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err.strip() == "hardmix: stopped."


def test_help_and_version_are_a_success(monkeypatch, capsys) -> None:
    for argument in ("--version", "--help"):
        monkeypatch.setattr(sys, "argv", ["hardmix", argument])
        cli.main()
    assert "hardmix" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "told"), [(OSError(28, "No space left on device"), False), (KeyError("x"), True)])
def test_a_thread_that_could_not_write_leaves_the_telling_to_the_run(error, told, monkeypatch, capsys) -> None:
    def fail(*args: object, **options: object) -> None:
        def raises() -> None:
            raise error

        thread = threading.Thread(target=raises)
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
