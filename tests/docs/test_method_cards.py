"""The cards agree with the code: settings and defaults, recipes that load, code that uses the class, current tables."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.test_documents import blocks
from hardmix import tables
from hardmix.models.build import MODELS, build_model
from hardmix.train.recipe import build_objective, build_policy, check_recipe, tomllib

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "docs" / "methods"
ENTRIES = {**tables.POLICIES, **tables.OBJECTIVES}
HEADINGS = ["Equation", "Use", "Settings", "Cost", "When not to use it", "Edges", "Reference"]


def sections(page: Path) -> dict[str, str]:
    """Heading of the second level -> what stands below it; what comes before the first has the name ""."""
    _, *parts = re.split(r"^## (.*)$", "## \n" + page.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def card(name: str) -> dict[str, str]:
    return sections(METHODS / f"{name}.md")


def settings_table(text: str) -> dict[str, str]:
    """First cell of each row -> second cell, without backticks and with single quotes."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
    return {key: value.strip("`").replace('"', "'") for key, value in rows}


def test_there_is_a_card_for_every_entry_and_no_other() -> None:
    assert {page.stem for page in METHODS.glob("*.md")} == {*ENTRIES, "README"}


@pytest.mark.parametrize("name", ENTRIES)
def test_headings_and_length(name: str) -> None:
    found = card(name)
    assert list(found) == ["", *HEADINGS]
    assert all(text.strip() for text in found.values())
    lines = (METHODS / f"{name}.md").read_text("utf-8").splitlines()
    assert 60 <= len(lines) <= 120
    assert max(len(line) for line in lines if not line.startswith("|")) <= 150


@pytest.mark.parametrize("name", ENTRIES)
def test_settings_are_the_arguments_with_their_defaults(name: str) -> None:
    expected = {
        key: "required" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
        for key, parameter in inspect.signature(ENTRIES[name]).parameters.items()
    }
    assert settings_table(card(name)["Settings"]) == expected


@pytest.mark.parametrize("name", ENTRIES)
def test_edges_speak_of_what_every_card_has_to_settle(name: str) -> None:
    text = " ".join(card(name)["Edges"].split())
    for subject in ("N = 1", "[Oo]dd batch", "square|shape", "[Hh]alf types", "[Ss]ame class"):
        assert re.search(subject, text), subject


@pytest.mark.parametrize("name", ENTRIES)
def test_the_reference_is_that_of_the_docstrings(name: str) -> None:
    cls = ENTRIES[name]
    documents = [cls.__doc__ or ""]
    remembers = re.match(r"`(\w+)` with its settings", inspect.cleandoc(documents[0]))
    if remembers:
        documents.append(getattr(sys.modules[cls.__module__], remembers[1]).__doc__ or "")
    text = card(name)["Reference"]
    for number in {number for document in documents for number in re.findall(r"arXiv:(\d{4}\.\d{5})", document)}:
        assert number in text, number
    assert re.search(r"\b(19|20)\d\d\b", text), "a reference has a year"


@pytest.mark.parametrize("name", ENTRIES)
def test_the_code_uses_the_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block makes an instance and calls it."""
    cls: Any = ENTRIES[name]
    forward, called = cls.forward, []

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        called.append(self)
        return forward(self, *args, **options)

    monkeypatch.setattr(cls, "forward", spy)
    space: dict = {"__name__": "__card__"}
    for text in blocks(METHODS / f"{name}.md", "python"):
        exec(compile(text, f"{name}.md", "exec"), space)
    assert called


@pytest.mark.parametrize("name", ENTRIES)
def test_recipes_of_a_card_load_and_name_it(name: str) -> None:
    snippets = [tomllib.loads(text) for text in blocks(METHODS / f"{name}.md", "toml")]
    assert snippets
    for table in snippets:
        recipe = check_recipe({"name": "card", **table}, name)
        assert name in names_in(table)
        model = build_model(recipe.model.name, num_classes=10, in_channels=3, image_size=32, **recipe.model.options)
        criterion = build_objective(recipe.objective)
        if recipe.policy is None:
            continue
        x, target = build_policy(recipe.policy, model)(torch.rand(4, 3, 32, 32), torch.arange(4))
        assert criterion(model(x), target).isfinite()


def names_in(value: object) -> set[str]:
    """The values of every key "name", however deep."""
    if isinstance(value, Mapping):
        own = {value["name"]} if isinstance(value.get("name"), str) else set()
        return own.union(*map(names_in, value.values()))
    return set().union(*map(names_in, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_recipes_of_the_pages_load(page: str) -> None:
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    for text in blocks(path, "toml"):
        check_recipe({"name": "page", **tomllib.loads(text)}, page)


def test_the_pages_name_what_there_is() -> None:
    from hardmix.data.catalog import CATALOG
    from hardmix.data.views import MOVES, PAINTS
    from hardmix.train.recipe import Recipe

    data, recipes = ((ROOT / "docs" / name).read_text("utf-8") for name in ("data.md", "recipes.md"))
    for name in [*CATALOG, *MOVES, *PAINTS]:
        assert f"`{name}`" in data, name
    for place in [place for entry in CATALOG.values() for place in entry.places]:
        assert place in data, place
    for name in MODELS:
        assert f"`{name}`" in recipes, name
    for section in ("data", "train", "eval"):
        fields: Any = Recipe.model_fields[section].annotation
        for key in fields.model_fields:
            assert f"`{section}.{key}`" in recipes, key


def test_files_of_a_run_folder_are_those_of_the_page(tmp_path: Path) -> None:
    """A run of a second writes exactly what docs/recipes.md lists."""
    from hardmix.train.loop import run_recipe

    recipe = check_recipe(
        {
            "name": "tiny",
            "data": {"name": "digits", "train_samples": 100, "augment": []},
            "model": {"name": "small-cnn", "options": {"width": 4}},
            "train": {"epochs": 1, "batch_size": 32, "warmup_epochs": 0, "threads": 1, "device": "cpu"},
        },
        "tiny",
    )
    run_recipe(recipe, tmp_path / "run")
    written = {path.name + "/" * path.is_dir() for path in (tmp_path / "run").iterdir()}
    listed = set(
        re.findall(r"^\| `([\w./]+)` \|", sections(ROOT / "docs" / "recipes.md")["The run folder"], re.MULTILINE)
    )
    assert written == listed


@pytest.fixture(scope="module")
def tool() -> Any:
    """tools/method_table.py as a module."""
    spec = importlib.util.spec_from_file_location("method_table", ROOT / "tools" / "method_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_current(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


def test_the_check_notices_a_stale_page_and_the_tool_mends_it(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    stale = "before\n<!-- generated: views -->\n| old |\n<!-- end -->\nafter\n"
    page.write_text(stale, "utf-8")
    assert tool.main(["--check"]) == 1
    assert "page.md is out of date" in capsys.readouterr().out
    assert page.read_text("utf-8") == stale
    assert tool.main([]) == 0
    text = page.read_text("utf-8")
    assert "`flip`" in text
    assert "| old |" not in text
    assert (text.splitlines()[0], text.splitlines()[-1]) == ("before", "after")
    assert tool.main(["--check"]) == 0


def test_every_part_that_the_tool_can_write_is_on_some_page(tool: Any) -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs").rglob("*.md"))
    assert set(re.findall(r"<!-- generated: ([\w -]+) -->", pages)) == set(tool.PARTS)


def test_measured_costs_of_mixing_come_from_the_result_file(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert "no result is committed yet" in tool.PARTS["cost of mixup"]()
    shape = {"shape": "128x3x32x32", "dtype": "float32", "allocator": "default", "caches": "cold"}
    found = [
        {**shape, "threads": n, "rows": {"Mixup, new": {"cpu_ratio": ratio}}} for n, ratio in ((1, 12.345), (2, 77))
    ]
    (tmp_path / "mixing.json").write_text(json.dumps({"tables": found}))
    text = tool.PARTS["cost of mixup"]()
    assert "| 128 x 3 x 32 x 32 float32 | default | cold | 12.3 |" in text
    assert "77" not in text


def test_measured_costs_of_objectives_come_from_the_result_file(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert "no result is committed yet" in tool.PARTS["cost of decoupled-mixup"]()
    cases = tool.LOSS_CASES["decoupled-mixup"].values()
    row = {"threads": 1, "shape": "128x1000"}
    times = [
        {**row, "case": c, "allocator": a, "cpu_ratio": r} for c in cases for a, r in (("kept", 1.5), ("default", 2.25))
    ]
    memory = [{"case": case, "shape": "128x1000", "peak_in_logits": 2.04} for case in cases]
    (tmp_path / "decoupled_loss.json").write_text(json.dumps({"time": times, "memory": memory}))
    text = tool.PARTS["cost of decoupled-mixup"]()
    assert "| target | 128 x 1000 | peak memory |" in text
    assert "| MixedTarget | 1.5 (2.2) | 2.0 |" in text
