"""What the documents show works: Python blocks run, commands exist, links resolve, numbers of the tables are there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from hardmix.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text("utf-8")) if kind == language]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "__page__"}
    for text in blocks(page, "python"):
        exec(compile(text, name(page), "exec"), space)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=name)
def test_commands_in_console_blocks_exist(page, monkeypatch, capsys):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in blocks(page, "console"):
        for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert set(words[1:]) <= targets, line
            if words[0] == "hardmix":
                monkeypatch.setattr(sys, "argv", [*words[:2], "--help"])
                main()
                text = capsys.readouterr().out
                for flag in (word for word in words if word.startswith("--")):
                    assert flag.split("=")[0] in text, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_named_files_resolve(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:docs|benchmarks|examples|tools|tests|src)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_command_of_the_readme_names_a_recipe_that_is_not_shipped(page):
    from hardmix.train.recipe import shipped

    for line in re.findall(r"^\$ hardmix (?:run|compare|copy) (.*)$", page.read_text("utf-8"), re.MULTILINE):
        for word in shlex.split(line, comments=True):
            if word.startswith("-"):
                break
            assert word in shipped() or word.endswith(".toml"), line
