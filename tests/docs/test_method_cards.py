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
from hardmix import losses, metrics, mixing, tables
from hardmix.models.build import MODELS, build_model
from hardmix.train.components import build_contrast, build_modality_objective, build_objective, build_policy
from hardmix.train.recipe import Recipe, check_recipe, tomllib
from hardmix.train.weight_space import fit_radii, project, wise_ft

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "docs" / "methods"
CLASSIFICATION = {**tables.POLICIES, **tables.OBJECTIVES}
REGRESSION = {**tables.CONTRASTS, **tables.REGRESSION_OBJECTIVES, **tables.REGRESSION_POLICIES}
#: a card -> the function and the class that share it, none of them a name in a recipe
SHARED = {"label-density": (losses.lds_weights, losses.FeatureSmoothing)}
#: a card -> functions on the weights or the features of tuned models
FUNCTIONS = {
    "wise-ft": (wise_ft,),
    "tpgm": (project, fit_radii),
    "embedding-shift": (metrics.embedding_shift,),
    "slerp": (mixing.slerp,),
}
#: a card -> an objective of several modalities
MODALITIES = {"gmc": (losses.GMCLoss,)}
ENTRIES: dict[str, tuple[Any, ...]] = {
    **MODALITIES,
    **{name: (cls,) for name, cls in (CLASSIFICATION | REGRESSION | tables.PAIR_OBJECTIVES).items()},
    **SHARED,
    **FUNCTIONS,
}
#: those that know no batches
OF_WEIGHTS = ("wise-ft", "tpgm")
HEADINGS = ["Equation", "Use", "Settings", "Cost", "When not to use it", "Edges", "Reference"]
#: what the recipe of a card for numbers leaves unsaid
NUMBERS: dict[str, Any] = {
    "name": "card",
    "task": "regression",
    "data": {"name": "diabetes"},
    "model": {"name": "mlp"},
    "objective": {"name": "regression"},
    "train": {"epochs": 100},
}
#: the same of a card for image-text pairs
PAIRS: dict[str, Any] = {
    "name": "card",
    "task": "image-text",
    "data": {"name": "emoji"},
    "model": {"name": "two-tower"},
    "objective": {"name": "clip"},
    "train": {"epochs": 100},
}


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
    """A card of several things has a table for each, under its name."""
    text = card(name)["Settings"]
    for thing in ENTRIES[name]:
        expected = {
            key: "required" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
            for key, parameter in inspect.signature(thing).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD  # another library's, which have no effect
        }
        part = text if len(ENTRIES[name]) == 1 else text.partition(f"### `{thing.__name__}`\n")[2].partition("\n###")[0]
        assert settings_table(part) == expected


@pytest.mark.parametrize("name", ENTRIES)
def test_edges_speak_of_what_every_card_has_to_settle(name: str) -> None:
    text = " ".join(card(name)["Edges"].split())
    if name in CLASSIFICATION:
        same = "[Ss]ame class"
    elif name in tables.PAIR_OBJECTIVES or name in FUNCTIONS or name in MODALITIES:
        same = "[Ee]qual (pairs|rows)|[Pp]airs equal|both have equal|not tuned"
    else:
        same = "[Ee]qual labels|labels equal"
    batch = () if name in OF_WEIGHTS else ("N = 1", "[Oo]dd batch")
    for subject in (*batch, "square|[Ss]hape", "[Hh]alf types", same):
        assert re.search(subject, text), subject
    if name not in CLASSIFICATION and name not in tables.REGRESSION_OBJECTIVES:
        assert "NaN" in text


@pytest.mark.parametrize("name", ENTRIES)
def test_the_reference_is_that_of_the_docstrings(name: str) -> None:
    documents = []
    for thing in ENTRIES[name]:
        documents.append(inspect.cleandoc(thing.__doc__ or ""))
        for function in re.findall(r"`(\w+_loss)`", documents[-1].splitlines()[0]):
            documents.append(getattr(sys.modules[thing.__module__], function).__doc__ or "")
    text = card(name)["Reference"]
    numbers = {number for document in documents for number in re.findall(r"arXiv:(\d{4}\.\d{5})", document)}
    assert numbers or name in CLASSIFICATION or "Our extension" in documents[0]
    for number in numbers:
        assert number in text, number
    assert re.search(r"\b(19|20)\d\d\b", text), "a reference has a year"


@pytest.mark.parametrize("name", ENTRIES)
def test_the_code_uses_what_the_card_is_about(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block makes an instance and calls it, or calls the function."""
    called = set()

    def spy(thing: Any, function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            called.add(thing)
            return function(*args, **options)

        return run

    for thing in ENTRIES[name]:
        if inspect.isclass(thing):
            monkeypatch.setattr(thing, "forward", spy(thing, thing.forward))
        else:
            module = sys.modules[thing.__module__]
            package = sys.modules[thing.__module__.rpartition(".")[0]]
            monkeypatch.setattr(
                package if hasattr(package, thing.__name__) else module, thing.__name__, spy(thing, thing)
            )
    space: dict = {"__name__": "__card__"}
    for text in blocks(METHODS / f"{name}.md", "python"):
        exec(compile(text, f"{name}.md", "exec"), space)
    assert called == set(ENTRIES[name])


def snippets(name: str) -> list[dict[str, Any]]:
    found = [tomllib.loads(text) for text in blocks(METHODS / f"{name}.md", "toml")]
    assert found
    return found


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_recipes_of_a_card_load_and_name_it(name: str) -> None:
    for table in snippets(name):
        recipe = check_recipe({"name": "card", **table}, name)
        assert name in names_in(table)
        model = build_model(recipe.model.name, num_classes=10, in_channels=3, image_size=32, **recipe.model.options)
        criterion = build_objective(recipe.objective)
        if recipe.policy is None:
            continue
        x, target = build_policy(recipe.policy, model)(torch.rand(4, 3, 32, 32), torch.arange(4))
        assert criterion(model(x), target).isfinite()


@pytest.mark.parametrize("name", REGRESSION)
def test_recipes_of_a_card_for_numbers_load_and_name_it(name: str) -> None:
    labels = torch.linspace(-2.0, 2.0, 16).repeat(2)
    for table in snippets(name):
        recipe = check_recipe({**NUMBERS, **table}, name)
        assert name in names_in(table)
        x, target = torch.randn(32, 5), labels
        if recipe.policy is not None:
            x, target = build_policy(recipe.policy, None)(x, labels)
        assert build_objective(recipe.objective, labels)(x.mean(1), target).isfinite()
        if recipe.contrast is not None:
            contrast = build_contrast(recipe.contrast.objective, labels)
            alike = [torch.zeros(32)] * ("predictions" in inspect.signature(contrast.forward).parameters)
            assert contrast(torch.randn(32, 5), labels, *alike) != 0


@pytest.mark.parametrize("name", MODALITIES)
def test_recipes_of_a_card_for_modalities_load_and_name_it(name: str) -> None:
    for table in snippets(name):
        recipe = check_recipe({"name": "card", "data": {"name": "emoji"}, "train": {"epochs": 100}, **table}, name)
        assert recipe.objective.name == name
        rows = list(torch.randn(4, 6, 8))
        assert build_modality_objective(recipe.objective)(rows[:3], rows[3]).isfinite()


@pytest.mark.parametrize("name", SHARED)
def test_recipes_of_a_shared_card_load(name: str) -> None:
    for table in snippets(name):
        recipe = check_recipe({**NUMBERS, **table}, name)
        assert recipe.density.lds
        assert recipe.density.fds


@pytest.mark.parametrize("name", tables.PAIR_OBJECTIVES)
def test_recipes_of_a_card_for_pairs_load_and_name_it(name: str) -> None:
    from hardmix.train.components import build_pair_objective

    for table in snippets(name):
        recipe = check_recipe({**PAIRS, **table}, name)
        assert name in names_in(table)
        a, b, x = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 3, 8, 8)
        given: dict[str, Any] = {"image_features": a, "text_features": b, "logit_scale": 10.0, "logit_bias": -10.0}
        given |= {"logits": torch.randn(6, 3, 9), "ids": torch.randint(1, 9, (6, 4))}
        given |= {"reference_features": b, "teacher": (a, b, 10.0), "projections": (torch.eye(4), torch.eye(4))}
        if recipe.policy is not None:
            plan = build_policy(recipe.policy, None).plan(x)
            given |= {"mixed_features": a.flip(0), "partner": plan.partner, "lam": plan.lam}
        criterion = build_pair_objective(recipe.objective)
        taken = inspect.signature(criterion.forward).parameters
        assert criterion(**{key: value for key, value in given.items() if key in taken}).isfinite()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "slerp"])
def test_recipes_of_a_card_for_tuned_models_load_and_name_it(name: str) -> None:
    for table in snippets(name):
        assert check_recipe({**PAIRS, **table}, name).tune.after == name


def names_in(value: object) -> set[str]:
    """The values of every key "name", however deep."""
    if isinstance(value, Mapping):
        own = {value["name"]} if isinstance(value.get("name"), str) else set()
        return own.union(*map(names_in, value.values()))
    return set().union(*map(names_in, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize(
    "page", ["README.md", "docs/methods/README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_recipes_of_the_pages_load(page: str) -> None:
    for text in blocks(ROOT / page, "toml"):
        check_recipe({"name": "page", **tomllib.loads(text)}, page)


def test_the_pages_name_what_there_is() -> None:
    from hardmix.data.catalog import CATALOG
    from hardmix.data.kind_views import VIEWS
    from hardmix.data.number_sets import NUMBER_SETS
    from hardmix.models.encoders import ENCODERS
    from hardmix.train.sections import ContrastSection

    data, recipes = ((ROOT / "docs" / name).read_text("utf-8") for name in ("data.md", "recipes.md"))
    for name in [*CATALOG, *NUMBER_SETS, *(view for views in VIEWS.values() for view in views)]:
        assert f"`{name}`" in data, name
    for place in [place for entry in CATALOG.values() for place in entry.places]:
        assert place in data, place
    for name in [*MODELS, *ENCODERS]:
        assert f"`{name}`" in recipes, name
    parts: dict[str, Any] = {
        name: Recipe.model_fields[name].annotation for name in ("data", "density", "train", "eval")
    }
    for section, fields in {**parts, "contrast": ContrastSection}.items():
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


def test_measured_costs_of_contrasts_come_from_the_result_file(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert "no result is committed yet" in tool.PARTS["cost of supremix"]()
    row = {"loss": "SupReMix", "size": 128, "ms": 8.44, "peak_mb": 3122.3}
    forms = [
        ("hardmix, complete", 128),
        ("hardmix, released choices", 128),
        ("formed", 128),
        ("hardmix, complete", 512),
    ]
    found = [{**row, "form": form, "rows": rows} for form, rows in forms]
    other = [{**row, "form": "hardmix, complete", "rows": 2048, "size": 512}]
    (tmp_path / "contrastive_regression.json").write_text(json.dumps({"table": found + other}))
    text = tool.PARTS["cost of supremix"]()
    assert "| N = 128 | N = 512 |" in text
    assert "| `SupReMixLoss` | 8.4 / 3,122 | 8.4 / 3,122 |" in text
    assert "| the same with every mixture formed | 8.4 / 3,122 | - |" in text
    assert "2048" not in text


def test_measured_costs_for_numbers_come_from_the_result_file(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert "no result is committed yet" in tool.PARTS["cost of focal-r"]()
    numbers = [("l1_loss", 1.0, 0.02), ("focal-r", 12.34, 0.25)]
    found = [
        {"group": "predictions", "case": case, "rows": rows, "ms": ms, "ratio": ratio, "peak_mb": 1.5}
        for case, ratio, ms in numbers
        for rows in (128, 512)
    ]
    (tmp_path / "regression_losses.json").write_text(json.dumps({"size": 64, "table": found}))
    text = tool.PARTS["cost of focal-r"]()
    assert "| N = 128 | N = 512 | ms, N = 512 | MB, N = 512 |" in text
    assert "| `F.l1_loss` | 1.0 | 1.0 | 0.02 | 1.5 |" in text
    assert "| `FocalRLoss()` | 12.3 | 12.3 | 0.25 | 1.5 |" in text
    assert "no result is committed yet" in tool.PARTS["cost of conr"]()


def test_measured_costs_for_pairs_come_from_the_result_file(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert "no result is committed yet" in tool.PARTS["cost of m2-mix"]()
    found: list[dict[str, Any]] = [
        {"loss": loss, "form": form, "rows": rows, "size": 512, "ms": 1234.56, "peak_mb": 8.4}
        for loss, form, rows in [("m2-Mix", "hardmix", 128), ("m2-Mix", "hardmix", 32768), ("m2-Mix", "plain", 128)]
    ]
    found.append({"loss": "m2-Mix", "form": "plain", "rows": 32768, "size": 512, "needs_gib": 32.0})
    found.append({"loss": "CLIP", "form": "hardmix", "rows": 128, "size": 512, "ms": 0.12, "peak_mb": 0.0})
    (tmp_path / "image_text.json").write_text(json.dumps({"table": found}))
    text = tool.PARTS["cost of m2-mix"]()
    assert "512 numbers a row" in text
    assert "| N = 128 | N = 32768 |" in text
    assert "| `M2MixLoss` | 1,234.6 / 8 | 1,234.6 / 8 |" in text
    assert "| the same with mixtures formed | 1,234.6 / 8 | needs 32 GiB |" in text
    assert "| `ClipLoss` alone | 0.1 / 0 | - |" in text
    assert "open_clip" not in text


def test_the_committed_results_have_every_case_of_the_tables(tool: Any) -> None:
    for name in [*tool.CONTRAST_FORMS, *tool.REGRESSION_CASES, *tool.PAIR_FORMS]:
        assert "no result is committed yet" not in tool.PARTS[f"cost of {name}"](), name
