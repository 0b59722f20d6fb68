"""What the documents show works: Python blocks run, commands exist, links resolve, numbers of the tables are there."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

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


def commands(page: Path) -> list[list[str]]:
    """The hardmix commands of a page, in console blocks and between backticks, as words."""
    lines = re.findall(r"^\$ hardmix (.*)$|`hardmix ([^`]+)`", page.read_text("utf-8"), re.MULTILINE)
    return [shlex.split(block or inline, comments=True) for block, inline in lines]


def values(words: list[str], flag: str) -> list[str]:
    return [value for word, value in itertools.pairwise(words) if word == flag]


@pytest.mark.parametrize("page", [page for page in PAGES if "--set" in page.read_text("utf-8")], ids=name)
def test_what_commands_set_goes_together(page):
    from hardmix.cli import _shortened
    from hardmix.train.components import Component, check_policy
    from hardmix.train.recipe import load_recipe, parse_options, shipped
    from hardmix.train.show import USUAL

    for verb, *words in commands(page):
        sets = values(words, "--set")
        for recipe in (word for word in words if word in shipped() and verb in ("run", "compare")):
            shortened = _shortened(load_recipe(recipe, sets), sets) if "--smoke" in words else ()
            load_recipe(recipe, [*sets, *shortened])
        if verb == "show" and sets:
            check_policy(Component(**{"name": words[0], **USUAL.get(words[0], {}), **parse_options(sets)}))


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=name)
def test_run_folders_of_commands_are_made_by_those_above(page):
    from hardmix.train.recipe import shipped

    made: set[str] = set()
    for verb, *words in commands(page):
        named = [word for word in words if word.startswith("runs/")]
        (out,) = values(words, "--out") or [""]
        if verb in ("eval", "report") or "--resume" in words or "--run" in words:
            assert set(named) <= made, (verb, *words)
        elif verb == "demo":
            made |= {"runs/demo", *(f"runs/demo/{recipe}/seed-0" for recipe in shipped() if recipe.startswith("demo-"))}
        elif verb == "run" and words:
            made.add(out or f"runs/{words[0]}{'-smoke' * ('--smoke' in words)}/seed-0")
        elif verb == "compare" and (recipes := [word for word in words if word in shipped()]):
            out = out or f"runs/compare-{'-'.join(recipes)}"[:105]
            made |= {out, *(f"{out}/{recipe}/seed-0" for recipe in recipes)}


def own_files() -> list[str]:
    """The commands that learn from files of the reader's, as they would be typed."""
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("regression", "image-text", "few-labels"))]
    lines = [line for page in pages for text in blocks(page, "console") for line in text.splitlines()]
    return list(dict.fromkeys(line[2:] for line in lines if re.match(r"\$ hardmix (run|compare) .*data\.path=", line)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with small files under the names that the pages use."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("files")
    draws = np.random.default_rng(0)
    count = 40
    ages = draws.integers(20, 80, count)
    houses = [f"{area},{'north' if area % 2 else 'south'},{3 * area}" for area in draws.integers(30, 200, 300)]
    (folder / "houses.csv").write_text("\n".join(["area,district,price", *houses]) + "\n")
    for name, suffix in (("photos", "png"), ("archive", "png"), ("scans", "npy")):
        (folder / name).mkdir()
        for i, age in enumerate(ages):
            path = folder / name / f"{i}.{suffix}"
            if suffix == "npy":
                np.save(path, np.full((6, 7, 8), age, np.float32))
            else:
                pixels = np.full((12, 16), age, np.uint8)
                pixels[0, 0] = i  # no two are the same, byte by byte
                Image.fromarray(pixels).save(path)
        rows = [f"{i}.{suffix},{age}" for i, age in enumerate(ages)]
        (folder / name / "ages.csv").write_text("\n".join(["file,age", *rows]) + "\n")
    np.savez(folder / "pulses.npz", x=draws.normal(size=(count, 2, 24)), y=ages)
    for name, keys in {"reviews.jsonl": ("text", "stars"), "pairs.jsonl": ("first", "second", "alike")}.items():
        samples = [{**dict.fromkeys(keys, f"seen {age} times"), keys[-1]: int(age)} for age in ages]
        (folder / name).write_text("\n".join(map(json.dumps, samples)) + "\n")
    captions = [{"file": f"{i}.png", "caption": [f"number {i}", f"a picture of number {i}"]} for i in range(count)]
    (folder / "photos" / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)) + "\n")
    rows = [f"{caption['file']},{text}" for caption in captions for text in caption["caption"]]
    (folder / "photos" / "captions.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(count // 2)]
    (folder / "photos" / "labels.csv").write_text("\n".join(["file,class", *rows]) + "\n")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0.tar", "w") as shard:
        for i in range(count):
            (folder / "text.txt").write_text(f"number {i}")
            shard.add(folder / "photos" / f"{i}.png", f"{i}.png")
            shard.add(folder / "text.txt", f"{i}.txt")
    return folder


@pytest.mark.parametrize("command", own_files())
def test_commands_for_ones_own_files_read_them_and_can_learn(command, files, monkeypatch):
    from hardmix.train.recipe import load_recipe, shipped
    from hardmix.train.tasks import TASKS

    monkeypatch.chdir(files)
    _, _, *words = shlex.split(command, comments=True)
    sets = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    for name in (word for word in words if word in shipped()):
        recipe = load_recipe(name, sets)
        task = TASKS[recipe.task](recipe)
        batch = torch.arange(task.recipe.train.batch_size)
        if recipe.task == "few-labels":
            assert len(task.few.unlabelled) == len(task.train_set) + 20
            task.start_epoch(0)
        else:
            assert all(len(rows) > 1 for rows in task.data.rows.values())
            batch = batch % len(task.data.rows["train"])
        loss = task.loss(task.model, task.load(batch), torch.Generator().manual_seed(0))[0]
        assert loss.isfinite()
