"""The section on robustness: what it says, that it is left out without measurements, and that damage stops no page."""

from __future__ import annotations

import base64
import colorsys
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hardmix.metrics.robustness import KINDS
from hardmix.report import plots, write_comparison_report, write_run_report
from hardmix.report.robustness_plots import COLOR_NAMES, FILE, section
from hardmix.train import robustness
from hardmix.train.robustness import MEASURES

from .fake_runs import write_comparison, write_run
from .test_hostile import PAYLOADS, check_page
from .test_pages import words

LAMS = [0.1, 0.3, 0.5, 0.7, 0.9]


def run_result() -> dict[str, Any]:
    diagram = {"confidence": [None, 0.45, 0.8], "accuracy": [None, 0.6, 0.7], "count": [0, 40, 60]}
    calibration = {"nll": 0.9, "ece": 0.124, "adaptive_ece": 0.12, "reliability": diagram}
    scaled = {"nll": 0.71, "ece": 0.021, "adaptive_ece": 0.033}
    return {
        "format": 1,
        "occlusion": {"patch": 4, "grid": [7, 7], "rates": [0.0, 0.5, 0.9], "accuracy": [0.912, 0.655, 0.2]},
        "fgsm": {"epsilons": [1 / 255, 8 / 255], "accuracy": [0.8, 0.123]},
        "corruptions": {"severities": [1, 2, 3, 4, 5], "accuracy": {"jpeg": [0.9, 0.8, 0.7, 0.6, 0.5]}},
        "mixed": {kind: {"lam": LAMS, "both": [0.1, 0.3, 0.5, 0.3, 0.1]} for kind in ("mixup", "cutmix")},
        "calibration": {"temperature": 1.62, "before": calibration, "after": {**calibration, **scaled}},
        "training": {"clean": 0.95, "mixed": 0.62, "ceiling": 0.774, "logged": 0.6, "validation": 0.905},
    }


def comparison_result(names: list[str]) -> dict[str, Any]:
    def row(place: int, name: str) -> dict[str, Any]:
        value = {"mean": 0.5 + 0.01 * place, "low": 0.48, "high": 0.56, "values": [0.5]}
        test = {"difference": 0.01 * place, "low": -0.01, "high": 0.04, "p": 0.02, "p_holm": 0.04}
        curve = {"x": LAMS, "mean": [0.2] * 5, "low": [0.1] * 5, "high": [0.3] * 5}
        return {
            "name": name,
            "measures": dict.fromkeys(MEASURES, value),
            "versus_first": dict.fromkeys(MEASURES, test) if place else None,
            "curves": dict.fromkeys(("occlusion", "mixup", "cutmix"), curve),
        }

    return {"format": 1, "measures": list(MEASURES), "table": [row(i, name) for i, name in enumerate(names)]}


def put(folder: Path, value: Any) -> None:
    (folder / FILE).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_without_measurements_there_is_no_section(tmp_path):
    write_run(tmp_path / "run")
    assert section(tmp_path / "run") is None
    assert "How well it holds up" not in words(write_run_report(tmp_path / "run"))


def test_a_run_in_words_and_tables(tmp_path):
    write_run(tmp_path / "run")
    put(tmp_path / "run", run_result())
    page = write_run_report(tmp_path / "run")
    check_page(page)
    text = words(page)
    assert "half of the image painted over, 65.5 % of the test images are still named rightly, of 91.2 %" in text
    assert "validation split is 1.62: the model is too sure of itself" in text
    assert "the calibration error goes from 12.4 % to 2.1 %" in text
    assert "it can't pass 77.4 %; the final weights reach 62.0 %" in text
    assert "as they are they reach 95.0 %, on validation images 90.5 %." in text
    assert "jpeg 90.0 % 80.0 % 70.0 % 60.0 % 50.0 % 70.0 %" in text  # and the mean
    assert "1/255 8/255 accuracy 80.0 % 12.3 %" in text
    shown = section(tmp_path / "run")
    assert shown is not None
    assert (len(shown["plots"]), len(shown["diagrams"]), len(shown["tables"])) == (2, 2, 4)
    assert "NLL ECE adaptive ECE as trained 0.9 12.4 % 12.0 % after temperature scaling 0.71 2.1 % 3.3 %" in text
    assert "accuracy from 91.2 % at 0 to 20.0 % at 90" in shown["plots"][0][0].alt.replace("\u00a0", " ")
    assert shown["notes"] == []


def test_a_caption_names_the_colour_of_every_curve(tmp_path):
    """Each name is held against the hue of the colour that its curve is drawn in."""
    hues = {"Blue": 202, "Orange": 26, "Green": 164, "Purple": 321, "Ochre": 45, "Light blue": 199, "Brown": 28}
    assert len(COLOR_NAMES) == len(plots.COLORS)
    assert COLOR_NAMES[0] == "Grey"
    for name, shade in zip(COLOR_NAMES[1:], plots.COLORS[1:], strict=True):
        red, green, blue = (int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert 360 * colorsys.rgb_to_hsv(red, green, blue)[0] == pytest.approx(hues[name], abs=2), name
    result = run_result()
    result["mixed"] = {kind: {"lam": LAMS, "both": [0.1 * k] * 5} for k, kind in enumerate(KINDS, 1)}
    put(tmp_path, result)
    shown = section(tmp_path)
    assert shown is not None
    plot, caption = shown["plots"][1]
    assert caption.endswith(" Blue: Mixup, Orange: CutMix, Green: FMix, Purple: ResizeMix.")
    svg = base64.b64decode(plot.uri.split(",")[1]).decode()
    places = [svg.index(f"stroke: {shade}") for shade in plots.COLORS[1:5]]
    assert places == sorted(places)


def test_what_a_run_lacks_is_left_out(tmp_path):
    write_run(tmp_path / "run")
    result = run_result()
    result["calibration"] |= {"temperature": None, "after": None}
    result["training"] |= {"mixed": None, "validation": None, "ceiling": 1.0}
    del result["fgsm"]
    put(tmp_path / "run", result)
    text = words(write_run_report(tmp_path / "run"))
    assert "temperature" not in text
    assert "Attacked" not in text
    assert "can't pass" not in text  # nothing was mixed
    assert "training images, unmixed 95.0 %" in text


def test_a_comparison_sets_methods_side_by_side(tmp_path):
    write_comparison(tmp_path / "c")
    names = [row["name"] for row in json.loads((tmp_path / "c" / "comparison.json").read_text())["table"]]
    put(tmp_path / "c", comparison_result(names))
    page = write_comparison_report(tmp_path / "c")
    check_page(page)
    text = words(page)
    part = text[text.index("How well it holds up") : text.index("What was run")]
    assert all(name in part for name in names)
    assert all(measure.label in part for measure in MEASURES.values())
    assert "50.0 % ± 4.0" in part
    assert "+1.0 (p = 0.040)" in part
    shown = section(tmp_path / "c")
    assert shown is not None
    assert len(shown["plots"]) == 3
    assert [key["color"] for key in shown["key"]] == list(range(len(names)))
    # The first method has nothing to be compared with.
    assert [cell.below == "" for cell in shown["tables"][0].rows[0].cells] == [True] + [False] * (len(names) - 1)


def test_measurements_of_other_runs_are_told_from_those_of_the_comparison(tmp_path):
    stored = write_comparison(tmp_path)
    runs = [{key: run[key] for key in ("name", "seed")} for run in stored["runs"]]
    result = comparison_result([row["name"] for row in stored["table"]])
    put(tmp_path, result | {"runs": runs})
    assert "hardmix eval FOLDER" not in words(write_comparison_report(tmp_path))
    put(tmp_path, result | {"runs": [run for run in runs if run["seed"] < 3]})
    told = words(write_comparison_report(tmp_path))
    assert "measurements of 9 runs, not of the 15 of the tables above; `hardmix eval FOLDER --robustness`" in told


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    '{"table": []}',
    '{"table": [1, null, {}]}',
    '{"table": [{"name": {"a": 1}, "curves": 3, "measures": []}], "measures": ["clean", {}, "x"]}',
    '{"table": 3, "occlusion": []}',
    '{"occlusion": {"rates": [0, "x", null], "accuracy": [1e999, 0.5]}}',
    '{"occlusion": {"rates": [0.5], "accuracy": [0.5]}, "mixed": {"mixup": {"lam": [0.5], "both": [NaN]}}}',
    '{"calibration": {"temperature": "hot", "before": {"reliability": {"confidence": [1], "count": 4}}}}',
    '{"calibration": {"before": {"reliability": {"confidence": [0.5], "accuracy": ["a"], "count": [true]}}}}',
    '{"corruptions": {"severities": [1, 2], "accuracy": {"a": [1], "b": 3, "c": [0.5, "x"]}}}',
    '{"corruptions": {"severities": 5, "accuracy": []}, "training": [], "fgsm": {"epsilons": [1], "accuracy": null}}',
    '{"training": {"clean": true, "ceiling": 0.5, "mixed": [1]}}',
    json.dumps({"occlusion": {"rates": [0.1] * 100_000, "accuracy": [0.1] * 100_000}}),
    "[" * 100_000,
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_damage_stops_no_page(tmp_path, quick_plots, text):
    write_run(tmp_path / "run")
    put(tmp_path / "run", text)
    check_page(write_run_report(tmp_path / "run"))
    shown = section(tmp_path / "run")
    assert shown is not None
    assert shown["notes"] or shown["plots"] or shown["tables"] or shown["diagrams"]


@pytest.mark.parametrize("start", range(0, len(PAYLOADS), 10))
def test_names_are_never_markup(tmp_path, quick_plots, start):
    payloads = PAYLOADS[start : start + 10]
    write_comparison(tmp_path / "c")
    put(tmp_path / "c", comparison_result(payloads))
    check_page(write_comparison_report(tmp_path / "c"))
    write_run(tmp_path / "run")
    result = run_result()
    result["corruptions"]["accuracy"] = dict.fromkeys(payloads, [0.5] * 5)
    put(tmp_path / "run", result)
    check_page(write_run_report(tmp_path / "run"))


def test_every_measure_is_explained():
    for key, measure in MEASURES.items():
        assert measure.about, key
        assert not re.search(r"[<>&]", measure.label + measure.about)
    assert robustness.FILE == FILE
