"""What the command ends with when nothing of ours hears a signal."""

from __future__ import annotations

import sys

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
