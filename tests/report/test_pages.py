"""Run and comparison pages: what they say, and that they say what is missing."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from pathlib import Path

import pytest

from hardmix.report import page, write_comparison_report, write_csv, write_run_report
from hardmix.report.text import show_difference

from .fake_runs import DEMO, METRICS, write_comparison, write_run
from .test_hostile import check_page


def words(path: Path) -> str:
    """The page as a reader sees it: no style, no tags, single spaces."""
    page = re.sub(r"<style>.*?</style>", "", path.read_text("utf-8"), flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", " ", page)).replace("\u00a0", " ").replace("\u2212", "-")
    return re.sub(r" ([.,:;)])", r"\1", re.sub(r"\s+", " ", text))


def headings(path: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", path.read_text("utf-8"))


def test_a_finished_run(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "run", name="fashion-mixup-dm")
    page = write_run_report(tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    check_page(page)
    text = words(page)
    top1 = f"{100 * summary['test']['top1']:.1f} %"
    assert f"Mixup with Decoupled Mixup reached {top1} top-1 on 3,000 test images of fashion-mini." in text
    assert "What this page could not show" not in text
    assert "not finished" not in text
    told = ["175,258", "small-resnet", "MIT (Zalando SE)", "512 MB", "27 s", "21 ms", "0.1.0", "2.13.0", "10,800"]
    for part in [*told, "T-shirt", "Ankle boot", "learning rate", 'name = "decoupled-mixup"', "lower is better"]:
        assert part.lower() in text.lower(), part
    assert headings(page)[:3] == ["Test results", "Learning curves", "Calibration and hard samples"]
    images = re.findall(r'<img [^>]*src="data:image/(\w+)[^>]*alt="([^"]*)"', page.read_text("utf-8"))
    assert [kind for kind, _ in images].count("svg") == 5
    assert [kind for kind, _ in images].count("png") == 8 * 4
    assert all(len(alt) >= 4 for _, alt in images)


@pytest.mark.parametrize(
    ("gap", "words_of_it"),
    [(0.2, "points too high on average"), (-0.2, "points too low on average"), (0.0, "is off by")],
)
def test_the_direction_of_the_calibration_error(
    tmp_path: Path, quick_plots: None, gap: float, words_of_it: str
) -> None:
    count, shift = [0] * 14 + [100], 0.05
    diagram = {"confidence": [None] * 14 + [0.95], "accuracy": [None] * 14 + [0.95 - gap], "count": count}
    test = {"top1": 0.9, "ece": abs(gap) or shift}
    write_run(tmp_path / "run", epochs=2, changes={"test": test, "reliability": diagram})
    assert words_of_it in words(write_run_report(tmp_path / "run"))


def test_what_two_classes_decide_is_left_out(tmp_path: Path, quick_plots: None) -> None:
    test = {"top1": 0.5, "top5": 1.0, "nll": 0.7, "mixup_both": 1.0, "mixup_top2": 1.0, "mixup_either": 1.0}
    data = {"name": "cats-and-dogs", "test": 40, "classes": ["cat", "dog"]}
    write_run(tmp_path / "run", epochs=2, changes={"test": test, "data": data})
    text = words(write_run_report(tmp_path / "run"))
    assert "reached 50.0 % top-1 on 40 test images of cats-and-dogs." in text
    assert "0.7000" in text
    for gone in ("100.0", "top-5", "names exactly the two classes", "Hard mixed samples"):
        assert gone not in text
    assert headings(tmp_path / "run" / "report.html")[2] == "Calibration"

    stored = write_comparison(tmp_path / "both", seeds=2, methods=DEMO[:2])
    for run in stored["runs"]:
        summary = tmp_path / "both" / run["folder"] / "summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"data": data}))
    text = words(write_comparison_report(tmp_path / "both"))
    assert "NLL" in text
    assert not any(gone in text for gone in ("top-5", "both classes", "Hard mixed samples"))


def test_a_method_without_training_steps_has_no_cost(tmp_path: Path) -> None:
    methods = ({"name": "as-it-is", "policy": "none", "objective": "none"}, *DEMO[1:])
    stored = write_comparison(tmp_path, seeds=2, methods=methods)
    for run in stored["runs"][:2]:  # as older versions left them: with the time that it takes to start
        summary = tmp_path / run["folder"] / "summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"checkpoint": {"which": "last", "step": 0}}))
    page = write_comparison_report(tmp_path)
    text = words(page)
    cost = text.partition("or of the first method that trains")[2].partition("Learning curves")[0]
    assert "\u2013: makes no training step." in cost
    assert "as-it-is No training \u2013 \u2013 \u2013 500 MB" in cost
    assert re.search(r"fashion-mixup-dm Mixup with Decoupled Mixup 21.2 ms 1.00 ", cost)
    assert "as-it-is" not in re.findall(r'alt="([^"]*over time per training step[^"]*)"', page.read_text("utf-8"))[0]
    text = words(write_run_report(tmp_path / stored["runs"][0]["folder"]))
    assert "time per step" not in text
    assert "training time" not in text


def test_an_unmixed_run_is_not_called_mixed(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=2, policy="none", objective="soft-cross-entropy")
    text = words(write_run_report(tmp_path / "run"))
    assert "No mixing with cross-entropy reached" in text
    assert "Grey: training top-1." in text
    assert "mixed batches" not in text


def test_the_probe_of_clean_training_images_is_drawn_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=2)
    log = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line | {"train_top1": 0.875} if line["kind"] == "validation" else line for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report(tmp_path / "run")
    check_page(page)
    assert "Orange: top-1 of training images as they are." in words(page)
    assert "top-1 of training images as they are ends at 87.5" in page.read_text()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=3)
    first = write_run_report(tmp_path / "run").read_bytes()
    assert write_run_report(tmp_path / "run").read_bytes() == first


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=4)
    for name in ("summary.json", "gallery.safetensors"):
        (tmp_path / "run" / name).unlink()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 3')  # killed while writing
    page = write_run_report(tmp_path / "run")
    check_page(page)
    text = words(page)
    assert "not finished" in text
    assert "has no test result: the run has not finished. Its log ends at step 320, epoch 4." in text
    assert "summary.json is missing" in text
    assert "gallery.safetensors is missing: no mixed samples are shown." in text
    assert "metrics.jsonl has 1 unreadable line, left out." in text
    assert headings(page) == ["Learning curves", "What was run"]


@pytest.mark.parametrize(
    ("task", "key", "told"), [("image-text", "recall_5", "50.0 % R@5"), ("regression", "mae", "0.5")]
)
def test_an_unfinished_run_is_called_what_its_recipe_calls_it(
    tmp_path: Path, quick_plots: None, task: str, key: str, told: str
) -> None:
    run = tmp_path / "seed-3"
    run.mkdir()
    recipe = f'name = "mine"\ntask = "{task}"\nseed = 3\n[data]\nname = "photos"\n[model]\nname = "towers"\n'
    (run / "recipe.toml").write_text(recipe)
    lines = [{"kind": "train", "step": 8, "epoch": 2, "loss": 1.0}, {"kind": "validation", "epoch": 2, key: 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report(run)
    check_page(page)
    text = words(page)
    assert "<h1><bdi>mine</bdi></h1>" in page.read_text("utf-8")
    assert f"The last validation gave {told}" in text
    assert "data photos model towers seed 3" in text
    assert "mixed samples" not in text
    for damaged in ('name = "mine', "name = 3\ntask = []\ndata = 1\n", "a = " + "[" * 100_000):
        (run / "recipe.toml").write_text(damaged)
        check_page(write_run_report(run))


def test_a_table_without_a_title_makes_no_empty_heading(tmp_path: Path, quick_plots: None) -> None:
    missing = {"subsets": {"noto": 0.2, "noto+text": 0.4}, "majority": 0.1}
    write_run(tmp_path, changes={"task": "modalities", "missing": missing})
    page = write_run_report(tmp_path)
    assert "Missing modalities" in headings(page)
    assert not re.search(r"<h\d>\s*</h\d>", page.read_text("utf-8"))


def test_pictures_without_styles_have_no_other_styles(tmp_path: Path, quick_plots: None) -> None:
    write_run(tmp_path, changes={"task": "image-text", "data": {"name": "mine", "test": 20, "shift": 0}})
    assert "in other styles" not in words(write_run_report(tmp_path))


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    page = write_run_report(tmp_path)
    check_page(page)
    assert "recipe.toml is missing" in words(page)
    with pytest.raises(ValueError, match=r"is not a folder; pass the folder of a run\."):
        write_run_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        {"summary.json": b"{not json"},
        {"summary.json": b"[1, 2]"},
        {"summary.json": b"\xff\xfe\x00"},
        {"summary.json": b"[" * 100_000},
        {"summary.json": b'{"test": [1], "data": 3, "seconds": "x", "versions": [], "reliability": {"count": 3}}'},
        {"summary.json": b'{"test": {"top1": "<b>", "ece": [1], "nll": true}, "reliability": {"count": [1]}}'},
        {"metrics.jsonl": b"\x00\xff\n[]\n1\n{}\n"},
        {"metrics.jsonl": b'{"kind": "train", "epoch": "x", "loss": 1}\n{"kind": "train", "epoch": 1, "loss": NaN}\n'},
        {"gallery.safetensors": b"short"},
        {"gallery.safetensors": b"\xff" * 64},
    ],
)
def test_damaged_pieces_become_notes(tmp_path: Path, quick_plots: None, damage: dict[str, bytes]) -> None:
    write_run(tmp_path / "run", epochs=2)
    for name, content in damage.items():
        (tmp_path / "run" / name).write_bytes(content)
    page = write_run_report(tmp_path / "run")
    check_page(page)
    text = words(page)
    assert "summary.json" not in damage or "What this page could not show" in text or "has no test result" in text


def test_galleries_that_do_not_fit_are_left_out(tmp_path: Path, quick_plots: None) -> None:
    from safetensors.torch import load_file, save_file

    write_run(tmp_path / "run", epochs=2)
    path = tmp_path / "run" / "gallery.safetensors"
    good = {key: value.clone() for key, value in load_file(path).items()}  # not a view of the file that is written
    for key, value in {
        "partner": good["partner"][:2],
        "mask": good["mask"][:, :, :3].contiguous(),
        "labels": good["labels"][:, 0].contiguous(),
        "prob": good["prob"][:, :1].contiguous(),
    }.items():
        save_file({**good, key: value}, path)
        assert "gallery.safetensors can't be read (ValueError)" in words(write_run_report(tmp_path / "run")), key
    save_file({key: value for key, value in good.items() if key != "own"}, path)
    assert "gallery.safetensors can't be read (KeyError)" in words(write_run_report(tmp_path / "run"))


def test_numbers_that_are_none_are_shown_as_such(tmp_path: Path) -> None:
    changes = {"test": {"top1": 0.9, "nll": math.nan, "ece": None, "top5": math.inf, "mixup_both": math.nan}}
    write_run(tmp_path / "run", epochs=2, changes=changes)
    text = words(write_run_report(tmp_path / "run"))
    assert text.count("n/a") == 4
    assert "nan" not in text.lower().split()


def test_colour_and_large_images(tmp_path: Path, quick_plots: None) -> None:
    from .fake_runs import draw_images

    for size, kind in ((32, "png"), (224, "jpeg")):
        write_run(tmp_path / kind, epochs=2, images=draw_images(16, channels=3, size=size))
        page = write_run_report(tmp_path / kind)
        check_page(page)
        assert page.read_text("utf-8").count(f"data:image/{kind};") == 32


def test_tables_that_scroll_can_be_scrolled_with_the_keyboard() -> None:
    templates = Path(page.__file__).parent / "templates"
    for template in templates.glob("*.j2"):
        for box in re.findall(r'<div class="scroll"[^>]*>', template.read_text("utf-8")):
            assert 'tabindex="0"' in box, template.name


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_comparison(folder)
    return folder


def test_a_comparison(demo: Path) -> None:
    page = write_comparison_report(demo)
    assert page == demo / "report.html"
    check_page(page)
    assert page.stat().st_size < 600_000
    text = words(page)
    stored = json.loads((demo / "comparison.json").read_text())
    first, second, third = stored["table"]
    gain = second["versus_first"]["top1"]
    assert f"fashion-mixup-dm won: {100 * second['metrics']['top1']['mean']:.2f} % top-1, " in text
    assert f"{100 * gain['difference']:.2f} points more than fashion-mixup (95 % interval " in text
    assert f"{100 * gain['low']:+.2f} to {100 * gain['high']:+.2f}; 5 seeds; paired p < 0.001" in text
    assert "Against the runner-up fashion-none" in text
    for entry in (first, second, third):
        assert text.count(entry["name"]) > 5  # the run that lost is shown as often as the one that won
        for key in METRICS:
            mean = entry["metrics"][key]["mean"]
            assert (f"{mean:.4g}" if key == "nll" else f"{100 * mean:.2f} %") in text, (entry["name"], key)
    assert headings(page) == [
        "Results",
        "Every seed",
        "Hard mixed samples",
        "Cost",
        "Learning curves",
        "Calibration",
        "Mixed samples",
        "What was run",
    ]
    assert "The same mixed test images, as each method (first seed) sees them." in text
    assert "hardmix compare fashion-mixup fashion-mixup-dm fashion-none --seeds 5" in text
    assert "All 15 runs" in text
    assert "What this page could not show" not in text


def test_different_mixes_are_not_put_side_by_side(tmp_path: Path, quick_plots: None) -> None:
    from .fake_runs import draw_images

    methods = tuple({**m, "images": draw_images(16, seed=i)} for i, m in enumerate(DEMO[:2]))
    write_comparison(tmp_path, methods=methods, seeds=2)
    assert "The methods were shown different mixes" in words(write_comparison_report(tmp_path))


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=1, methods=DEMO[:2])
    page = write_comparison_report(tmp_path)
    check_page(page)
    text = words(page)
    assert "fashion-mixup-dm has the highest top-1" in text
    assert "One seed can't tell a difference from chance: nothing is decided." in text
    assert "untested" in text
    assert " won" not in text
    assert "<strong>" not in page.read_text("utf-8")


def test_one_seed_has_differences_all_the_same(tmp_path: Path, quick_plots: None) -> None:
    write_comparison(tmp_path, seeds=1, methods=DEMO[:2])
    stored = json.loads((tmp_path / "comparison.json").read_text())
    first, second = stored["table"]
    second["versus_first"] = None  # as `hardmix compare --seeds 1` has it
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    text = words(write_comparison_report(tmp_path))
    assert "unknown" not in text
    assert "can't be compared with" not in text
    by = second["metrics"]["nll"]["mean"] - first["metrics"]["nll"]["mean"]
    assert f"{show_difference('nll', by)} untested".replace("\u2212", "-") in text


def test_a_comparison_without_its_run_folders(tmp_path: Path) -> None:
    write_comparison(tmp_path / "a", seeds=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "comparison.json").write_bytes((tmp_path / "a" / "comparison.json").read_bytes())
    page = write_comparison_report(tmp_path / "b")
    check_page(page)
    text = words(page)
    assert "The run folder method-0/seed-0 can't be read." in text
    assert headings(page) == ["Results", "Every seed", "Hard mixed samples", "Cost", "What was run"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"runs": [], "table": []}, "There is nothing to compare"),
        ({"metrics": []}, "top-1"),  # taken from the runs
        ({"table": []}, "fashion-none"),  # computed from the runs
        ({"table": "x", "runs": 3, "seeds": None, "versions": 1}, "There is nothing to compare"),
        ({"seeds": [0, 1, 2]}, "fashion-mixup has 2 of 3 runs."),
    ],
)
def test_unfinished_comparisons(tmp_path: Path, quick_plots: None, changes: dict, text: str) -> None:
    write_comparison(tmp_path, seeds=2, changes=changes)
    page = write_comparison_report(tmp_path)
    check_page(page)
    assert text in words(page)


def test_a_run_that_the_table_leaves_out_is_shown(tmp_path: Path, quick_plots: None) -> None:
    stored = write_comparison(tmp_path, seeds=2)
    stored["table"] = stored["table"][:2]
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    text = words(write_comparison_report(tmp_path))
    assert text.count("fashion-none") > 5


def test_comparison_json_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no readable comparison\.json .*pass the folder"):
        write_comparison_report(tmp_path)
    (tmp_path / "comparison.json").write_text("nonsense")
    with pytest.raises(ValueError, match="JSONDecodeError"):
        write_csv(tmp_path)


def test_csv_has_one_row_per_run_with_every_digit(demo: Path) -> None:
    stored = json.loads((demo / "comparison.json").read_text())
    path = write_csv(demo)
    assert path == demo / "comparison.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for row, run in zip(rows, stored["runs"], strict=True):
        assert (row["name"], row["seed"], row["folder"]) == (run["name"], str(run["seed"]), run["folder"])
        assert {key: float(row[key]) for key in METRICS} == run["test"]
        assert float(row["seconds_per_step"]) == run["seconds"]["per_step"]
        assert float(row["memory_mb"]) == run["memory_mb"]
    assert rows[0]["policy"] == "mixup"
    assert rows[5]["objective"] == "decoupled-mixup"


def test_csv_leaves_missing_numbers_empty(tmp_path: Path) -> None:
    stored = write_comparison(tmp_path, seeds=1, methods=DEMO[:1])
    stored["runs"][0]["test"] |= {"top1": math.nan, "nll": None, "ece": -0.25}
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    with open(write_csv(tmp_path), newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["top1"], row["nll"], row["ece"]) == ("", "", "-0.25")


def test_templates_are_part_of_the_package() -> None:
    from importlib import resources

    names = {file.name for file in (resources.files("hardmix.report") / "templates").iterdir()}
    assert {"base.html.j2", "parts.html.j2", "run.html.j2", "comparison.html.j2", "style.css"} <= names
