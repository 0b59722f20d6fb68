"""What the pages of image-text runs and of their comparisons show, whatever their summaries hold."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from markupsafe import Markup
from safetensors.torch import save_file

from hardmix.report import pair_page, pair_plots, plots, write_comparison_report, write_csv, write_run_report
from hardmix.report.folder import read_run
from hardmix.report.text import method_title, metric, pair_group, show
from hardmix.report.verdict import _some

from .fake_pairs import METRICS, TEXTS, fake_pairs, fake_sphere, write_pair_comparison, write_pair_run
from .fake_runs import draw_images
from .test_hostile import PAYLOADS, check_page
from .test_number_plots import WRONG, plain, svg, written
from .test_pages import headings, words

BLUE, ORANGE = plots.COLORS[1], plots.COLORS[2]


@pytest.fixture
def quick_pairs(quick_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots that are prepared, and not drawn."""

    def finish(figure: Any, alt: str) -> plots.Plot:
        return plots.Plot(Markup("data:image/svg+xml;base64,AAAA"), alt, 10, 10)

    monkeypatch.setattr(pair_plots, "_axes", lambda *size: (MagicMock(), MagicMock()))
    monkeypatch.setattr(pair_plots, "_finish", finish)
    monkeypatch.setattr(plots, "reliability", lambda diagram, alt: finish(None, alt) if plots._bins(diagram) else None)


def alts(page: Path) -> list[str]:
    return re.findall(r'alt="([^"]*)"', plain(page.read_text("utf-8")))


def test_a_finished_run(tmp_path: Path) -> None:
    summary = write_pair_run(tmp_path)
    page = write_run_report(tmp_path)
    check_page(page)
    assert page.stat().st_size < 700_000
    sections = ["Test results", "Retrieval", "Calibration", "Few labels and arithmetic", "The sphere"]
    assert headings(page) == [*sections, "Learning curves", "What was run"]
    text = words(page)
    assert "What this page could not show" not in text
    test, before = summary["test"], summary["before"]
    recall, shift = (
        f"{100 * test[k]:.1f} % of the time ({100 * before[k]:.1f} % before fine-tuning, 1.5 % by chance)"
        for k in ("recall_5", "shift_recall_5")
    )
    assert (
        "Searching among 342 test pairs of emoji that it was not trained on, m\u00b2-Mix has the right one among its "
        f"first five {recall}, and in other styles {shift}." in text
    )
    assert "Its confidence in the first one that it finds is" in text
    for key in test:  # each metric before and after
        assert f"{show(key, before[key])} {show(key, test[key])}".replace("\u00a0", " ").replace("\u2212", "-") in text
    for part in ("training pairs 1,222", "trained styles noto", "test pairs in other styles 342", "concepts 1,742"):
        assert part in text
    assert "noto: picture to text 342 pairs" in text
    assert "twemoji: text to picture 1,222 pairs, not a style of this training" in text
    assert "Bars: moved by 0.8 times the difference of two texts, a picture" in text
    assert "started from emoji-pretrain" in text
    assert f"Before fine-tuning: modality gap {before['gap']:.3g}, alignment" in text
    assert "Validation R@5: how often" in text
    assert "characters)" not in text  # no caption is cut
    for example in TEXTS:
        assert example in text
    assert text.count("lower is better") == 8


def test_a_run_from_scratch_has_nothing_before(tmp_path: Path, quick_pairs: None) -> None:
    write_pair_run(tmp_path, numbers=fake_pairs(start=False))
    page = write_run_report(tmp_path)
    check_page(page)
    text = words(page)
    assert "before" not in text.lower()
    assert "fine-tuning" not in text
    assert "(1.5 % by chance)" in text
    assert "After training: modality gap" in text
    assert "what chance reaches. R@1 R@5 R@10 median rank" in text


def test_pages_of_other_runs_have_no_such_section(tmp_path: Path, quick_pairs: None) -> None:
    numbers = fake_pairs() | {"task": "classification"}
    write_pair_run(tmp_path, numbers=numbers)
    found = headings(write_run_report(tmp_path))
    assert not {"Retrieval", "The sphere", "Few labels and arithmetic"} & set(found)


def test_sections_stand_only_where_their_piece_is(tmp_path: Path, quick_pairs: None) -> None:
    whole = fake_pairs()
    test = {key: value for key, value in whole["test"].items() if "fewshot" not in key}
    pieces = {
        "retrieval": ["Retrieval"],
        "calibration": ["Calibration"],
        "arithmetic": ["Few labels and arithmetic"],
        "sphere": ["The sphere"],
        "examples": ["Retrieval"],
    }
    for key, found in pieces.items():
        numbers = {k: v for k, v in whole.items() if k not in (*pieces, "before", "sphere_before")} | {"test": test}
        write_pair_run(tmp_path / key, numbers=numbers | {key: whole[key]})
        page = write_run_report(tmp_path / key)
        assert headings(page) == ["Test results", *found, "Learning curves", "What was run"], key
        assert "What this page could not show" not in words(page)


def test_metrics_are_named_and_directed() -> None:
    labels = {
        "recall_1": "R@1",
        "recall_50": "R@50",
        "shift_recall_5": "R@5 in other styles",
        "seen_shift_median_rank": "median rank of seen concepts in other styles",
        "fewshot_4": "4-shot top-1",
        "shift_zeroshot_ece": "zero-shot ECE in other styles",
        "gap": "modality gap",
        "recall_": "recall_",
        "recall_1e9": "recall_1e9",
        "shift_": "shift_",
        "shift_unknown": "shift_unknown",
    }
    assert {key: metric(key).label for key in labels} == labels
    lower = ["median_rank", "ece", "zeroshot_ece", "shift_ece", "shift_median_rank", "seen_shift_median_rank"]
    assert all(metric(key).lower_is_better for key in lower)
    assert not any(metric(key).lower_is_better for key in ("recall_5", "zeroshot", "alignment", "uniformity", "gap"))
    assert [key for key in fake_pairs()["test"] if metric(key).neutral] == ["gap"]
    assert show("shift_recall_5", 0.305) == "30.50\u00a0%"
    assert show("median_rank", 12.5) == "12.50"
    groups = {"recall_5": "unseen", "shift_ece": "shift", "seen_shift_recall_1": "seen", "fewshot_4": "classes"}
    groups |= {"shift_zeroshot": "classes", "gap": "geometry", "accuracy": "other", "shift_top1": "other"}
    assert {key: pair_group(key) for key in groups} == groups
    assert method_title("none", "m2-mix") == "m\u00b2-Mix"
    assert method_title("mixup", "i-mix") == "Mixup with i-Mix"
    assert method_title("none", "none") == "No training"
    assert method_title("none", "soft-cross-entropy") == "No mixing with cross-entropy"


def test_metrics_stand_in_groups() -> None:
    test = {"gap": 0.5, "shift_recall_5": 0.25, "recall_5": 0.5, "novel": 3.0, "shift_zeroshot": None}
    tables = pair_page.metrics(test, {"recall_5": 0.25})
    assert [table.title for table in tables] == [
        "Unseen concepts, trained styles",
        "Unseen concepts, other styles",
        "Classification",
        "Geometry of the embeddings",
        "Other metrics",
    ]
    assert [head.name for head in tables[0].heads] == ["before", "after"]
    assert [cell.value for cell in tables[0].rows[0].cells] == ["25.00\u00a0%", "50.00\u00a0%"]
    assert [cell.value for cell in tables[1].rows[0].cells] == ["n/a", "25.00\u00a0%"]
    assert (tables[1].rows[0].name, tables[1].rows[0].about) == ("R@5", "")
    assert (tables[2].rows[0].name, tables[2].rows[0].cells[1].value) == ("zero-shot top-1 in other styles", "n/a")
    for before in (None, {}, [], {"else": 1}, "x"):
        assert [head.name for head in pair_page.metrics(test, before)[0].heads] == ["value"]


def test_retrieval_by_style_and_direction() -> None:
    entry = {
        "part": "unseen",
        "style": "noto",
        "shift": False,
        "pairs": 342,
        "image_to_text_recall_1": 0.25,
        "image_to_text_recall_1_chance": 0.0029,
        "image_to_text_recall_100": 0.9,
        "image_to_text_median_rank": 12.0,
        "image_to_text_median_rank_chance": 171.0,
    }
    seen = {**entry, "part": "seen", "style": "", "shift": True, "pairs": None}
    one, other = pair_page.retrieval([entry, seen])
    assert (one.title, other.title) == ("Unseen concepts", "Seen concepts")
    assert [head.name for head in one.heads] == ["R@1", "R@100", "median rank"]
    (row,) = one.rows  # nothing is known of the other direction
    assert (row.name, row.about) == ("noto: picture to text", "342 pairs")
    assert [tuple(cell) for cell in row.cells] == [
        ("25.0\u00a0%", "chance 0.3\u00a0%"),
        ("90.0\u00a0%", ""),
        ("12", "chance 171"),
    ]
    assert (other.rows[0].name, other.rows[0].about) == ("picture to text", "not a style of this training")
    for wrong in WRONG:
        assert pair_page.retrieval(wrong) == []
        assert pair_page.retrieval([wrong]) == []
        assert pair_page.retrieval([{**entry, "image_to_text_recall_100": wrong, "style": wrong, "pairs": wrong}])


def test_few_labels() -> None:
    test = {"fewshot_16": 0.75, "fewshot_1": 0.5, "fewshot_4": 1.5, "fewshot_x": 0.2, "shift_fewshot_4": 0.25}
    drawn = pair_plots.few_labels(test, {"fewshot_1": 0.25})
    assert drawn is not None
    plot, caption = drawn
    assert plain(plot.alt) == (
        "Top-1 by the number of labelled pictures of each class: trained styles 50.0 % with 1, 75.0 % with 16; trained "
        "styles before fine-tuning 25.0 % with 1; other styles 25.0 % with 4."
    )
    assert caption == "Blue: trained styles. Orange: other styles. Dashed: before fine-tuning."
    assert {"1", "4", "16", "labelled pictures of each class", "top-1 (%)"} <= set(written(plot))
    assert pair_plots.few_labels({"fewshot_4": 0.5}, None)[1] == "Blue: trained styles."  # type: ignore[index]
    for wrong in WRONG:
        assert pair_plots.few_labels(wrong, wrong) is None
        assert pair_plots.few_labels({"fewshot_4": wrong, "fewshot_999999999": 0.5, "fewshot_0": 0.5}, {}) is None


def test_arithmetic_by_kind() -> None:
    kinds = {
        "gender": {"queries": 1320, "recall_1": 0.25, "recall_5": 0.5, "recall_1_without_text": 0.0625},
        "hair": {"recall_1": 0.125},
        "clock": {"queries": 0, "recall_1": None},
    }
    drawn = pair_plots.arithmetic({"scale": 0.75, "kinds": kinds})
    assert drawn is not None
    plot, caption = drawn
    assert plain(plot.alt) == (
        "Recall of embedding arithmetic by kind: gender: 25.0 % (1,320 queries), 50.0 % among the first five, "
        "6.2 % without text; hair: 12.5 %."
    )
    assert caption == (
        "Bars: moved by 0.75 times the difference of two texts, a picture is nearest to the right one. Dots: it is one "
        "of the nearest five. Black: without moving."
    )
    assert plain(str(written(plot))).count("gender: 25.0 % (1,320 queries)") == 1
    for wrong in WRONG:
        assert pair_plots.arithmetic(wrong) is None
        assert pair_plots.arithmetic({"kinds": wrong}) is None
        assert pair_plots.arithmetic({"kinds": {"gender": wrong}}) is None
        assert pair_plots.arithmetic({"kinds": {"gender": {"recall_1": wrong}}}) is None
        odd = pair_plots.arithmetic({"scale": wrong, "kinds": {"a": {"recall_1": 0.5, "queries": wrong}}})
        assert odd is not None
    many = {str(i): {"recall_1": 0.5} for i in range(10_000)}
    assert plain(pair_plots.arithmetic({"kinds": many})[0].alt).count("50.0 %") == 24  # type: ignore[index]


def test_calibration_before_and_after_scaling(quick_pairs: None) -> None:
    stored = fake_pairs()["calibration"]
    stored["text_to_image"] |= {"ece": 0.0421, "scaled": {"temperature": 1.314, "ece": 0.0187}}
    stored["zeroshot"] |= {"ece": 0.1, "scaled": None}
    captions = [plain(caption) for _, caption in pair_plots.calibration(stored)]
    assert captions[0].startswith("Picture to text: ECE ")
    assert captions[1] == "Text to picture: ECE 4.21 %, and 1.87 % with logits divided by 1.31."
    assert captions[2] == "Zero-shot classes: ECE 10.00 %."
    assert plain(pair_plots.calibration(stored)[1][0].alt).endswith("Text to picture; calibration error 4.21 %.")
    good = stored["text_to_image"]
    for wrong in WRONG:
        assert pair_plots.calibration(wrong) == []
        assert pair_plots.calibration({"zeroshot": wrong}) == []
        for column in ("confidence", "accuracy"):
            damaged = {**good, "bins": {**good["bins"], column: wrong}}
            assert pair_plots.calibration({"zeroshot": damaged}) == [], (column, wrong)
        assert len(pair_plots.calibration({"zeroshot": {**good, "ece": wrong, "scaled": wrong}})) == 1
    count = [1e300, -1, *good["bins"]["count"][2:]]
    assert len(pair_plots.calibration({"zeroshot": {"bins": {**good["bins"], "count": count}}})) == 1


def shown_points(plot: plots.Plot | None, shade: str, opacity: str) -> list[tuple[float, float]]:
    """Places of the points of one colour, x to the right and y down."""
    found = re.findall(
        rf'<use [^>]*x="([-\d.]+)" y="([-\d.]+)" style="fill: {shade}; fill-opacity: {opacity}', svg(plot)
    )
    return [(float(x), float(y)) for x, y in found]


def test_the_sphere_faces_the_reader() -> None:
    # Two clouds round directions that the page's axes know nothing of; the last pair is on the other side.
    g = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(3, 3, generator=g).double())[0]
    image, text = axes[0] - 0.5 * axes[1], axes[0] + 0.5 * axes[1]
    clouds = [side + 0.05 * torch.randn(40, 3, generator=g).double() for side in (image, text)]
    stored = {"image": [*clouds[0].tolist(), (-image).tolist()], "text": [*clouds[1].tolist(), (-text).tolist()]}
    plot = pair_plots.sphere(stored, "The sphere.")
    assert plot is not None
    assert plot.alt == "The sphere."
    pictures, texts = (shown_points(plot, shade, "0.9") for shade in (BLUE, ORANGE))
    assert (len(pictures), len(texts)) == (40, 40)
    assert max(x for x, _ in pictures) < min(x for x, _ in texts)  # pictures left, texts right
    heights = [y for _, y in pictures + texts]
    assert abs(np.mean([y for _, y in pictures]) - np.mean([y for _, y in texts])) < 0.1 * plot.height
    assert 0.3 * plot.height < min(heights) < max(heights) < 0.7 * plot.height  # the middle faces the reader
    assert [len(shown_points(plot, shade, "0.28")) for shade in (BLUE, ORANGE)] == [1, 1]  # behind, pale
    assert "<image" not in svg(plot)


@pytest.mark.parametrize("seed", range(4))
def test_a_view_is_a_rotation(seed: int) -> None:
    pairs = np.random.default_rng(seed).normal(size=(9, 2, 3))
    far = pairs + np.array([3.0, 0.0, 0.0])
    same = np.broadcast_to([0.0, 1.0, 0.0], (9, 2, 3))
    for shifted in (pairs, far, same, pairs * [1, 1, 0], pairs[:1] * [[1], [-1]]):
        view = pair_plots._view(shifted)
        assert np.allclose(view @ view.T, np.eye(3))
        assert np.linalg.det(view) == pytest.approx(1.0)
    images, texts = far.mean(0) @ pair_plots._view(far).T
    assert (images + texts)[:2] == pytest.approx([0, 0], abs=1e-9)
    assert (texts - images)[0] > 0


def test_great_circles_are_cut_at_the_horizon() -> None:
    over = np.array([[[math.sin(0.5), 0, math.cos(0.5)], [math.sin(2.5), 0, math.cos(2.5)]]])  # 29 to 143 degrees
    (front,), (behind,) = pair_plots._arcs(over)
    assert front[0].tolist() == pytest.approx([math.sin(0.5), 0])
    assert behind[-1].tolist() == pytest.approx([math.sin(2.5), 0])
    assert behind[0].tolist() == front[-1].tolist()  # no gap
    assert front[:, 0].tolist() == sorted(front[:, 0].tolist())
    assert behind[-2:, 0].tolist() == sorted(behind[-2:, 0].tolist(), reverse=True)
    opposite, same = np.array([[[1.0, 0, 0], [-1.0, 0, 0]]]), np.array([[[0, 0, 1.0], [0, 0, 1.0]]])
    assert pair_plots._arcs(opposite) == ([], [])
    (point,), nothing = pair_plots._arcs(same)
    assert nothing == []
    assert np.abs(point).max() < 1e-5


def test_any_points_can_be_drawn() -> None:
    up, down, flat = [0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]
    for image, text in (
        ([up], [up]),
        ([up], [down]),
        ([up, down], [down, up]),
        ([up, flat], [flat, up]),
        ([up], [flat]),
    ):
        assert pair_plots.sphere({"image": image, "text": text}, "alt") is not None
    long = pair_plots.sphere(fake_sphere(0, 0.5, pairs=1000), "alt")
    assert len(shown_points(long, BLUE, "0.9") + shown_points(long, BLUE, "0.28")) == 150
    assert long is not None
    assert len(long.uri) < 150_000


def test_pairs_with_a_wrong_point_are_left_out() -> None:
    good = fake_sphere(0, 0.5, pairs=3)
    for wrong in [*WRONG, [0.0, 0.0, 0.0], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, None, 0.0], [1.0, math.nan, 0.0]]:
        assert pair_plots.sphere(wrong, "alt") is None
        assert pair_plots.sphere({**good, "image": wrong}, "alt") is None
        plot = pair_plots.sphere({**good, "image": [wrong, *good["image"][1:]]}, "alt")
        assert len(shown_points(plot, ORANGE, "0.9") + shown_points(plot, ORANGE, "0.28")) == 2, wrong


def framed(page: Path) -> int:
    return page.read_text("utf-8").count('<img class="right"')


def test_the_right_picture_is_framed(tmp_path: Path, quick_pairs: None) -> None:
    numbers = fake_pairs()
    examples = {"texts": ["one", "two"], "right": [0, 1], "after": [[3, 0, 4, 5, 6], [7, 8, 9, 10, 11]]}
    examples["before"] = [[1, 2, 3, 4, 5], [1, 0, 2, 3, 4]]
    write_pair_run(tmp_path, numbers=numbers | {"examples": examples})
    page = write_run_report(tmp_path)
    check_page(page)
    assert framed(page) == 2
    known = [alt for alt in alts(page) if alt.endswith("picture")]
    assert known.count("its own picture") == 2
    assert [alt for alt in known if "right" in alt] == ["2nd: the right picture", "1st: the right picture"]
    assert known.count("5th: another picture") == 4


def test_all_pictures_with_the_text_are_framed(tmp_path: Path, quick_pairs: None) -> None:
    examples = {"texts": ["one", "two"], "right": [0, 1], "alike": [[0, 3, 5], [1]], "after": [[3, 0, 4], [7, 8, 3]]}
    write_pair_run(tmp_path, numbers=fake_pairs(start=False) | {"examples": examples})
    assert framed(write_run_report(tmp_path)) == 2
    run = read_run(tmp_path)
    for wrong in WRONG:
        run.summary["examples"] = {**examples, "alike": wrong}
        shown = pair_page.examples(run, [])
        assert [found.right for found in shown[0].views[0].found] == [False, True, False], wrong


def test_examples_show_what_they_can(tmp_path: Path, quick_pairs: None) -> None:
    numbers = fake_pairs(start=False)
    examples = {
        "texts": ["one", "two", "three", "four", {"five": 5}],
        "right": [0, True, -1, 99],
        "after": [[0, 1, 12, None, 2.0, 5, 6], [1, False], "x", [99, 10**30], [3]],
    }
    write_pair_run(tmp_path, numbers=numbers | {"examples": examples})
    shown = pair_page.examples(read_run(tmp_path), [])
    assert [example.text for example in shown] == ["one", "two", "{'five': 5}"]
    assert [found.place for found in shown[0].views[0].found] == ["1st", "2nd"]
    assert [found.right for found in shown[0].views[0].found] == [True, False]
    assert [example.own is None for example in shown] == [False, True, True]
    check_page(write_run_report(tmp_path))
    run = read_run(tmp_path)
    for wrong in WRONG:
        for key in ("right", "after"):
            run.summary["examples"] = {**examples, key: wrong}
            assert len(pair_page.examples(run, [])) == (3 if key == "right" else 0), wrong
        run.summary["examples"] = {**examples, "texts": wrong}
        texts = wrong if isinstance(wrong, list) else []  # anything is shown as the text that it is
        assert len(pair_page.examples(run, [])) == min(2, len(texts))
        run.summary["examples"] = wrong
        assert pair_page.examples(run, []) == []


def test_no_more_than_eight_examples(tmp_path: Path, quick_pairs: None) -> None:
    rows = list(range(5))
    examples = {"texts": ["text"] * 5000, "right": [0] * 5000, "after": [rows] * 5000, "before": [rows] * 5000}
    write_pair_run(
        tmp_path, numbers=fake_pairs() | {"examples": examples}, pictures=draw_images(5, channels=3, size=224)
    )
    page = write_run_report(tmp_path)
    check_page(page)
    assert page.read_text("utf-8").count("data:image/jpeg;") == 8 * 11


def test_pictures_that_are_not_there_become_a_note(tmp_path: Path, quick_pairs: None) -> None:
    write_pair_run(tmp_path)
    path = tmp_path / "gallery.safetensors"
    for pictures in (torch.zeros(3, 40, 40, dtype=torch.uint8), torch.zeros(12, 3, 40, 40), torch.zeros(0, 3, 4, 4)):
        save_file({"pictures": pictures}, path)
        text = words(write_run_report(tmp_path))
        assert "gallery.safetensors can't be read (ValueError): no examples are shown." in text
        assert "What texts find" not in text
    save_file({"own": torch.zeros(3)}, path)
    assert "gallery.safetensors can't be read (SafetensorError)" in words(write_run_report(tmp_path))
    path.write_bytes(b"short")
    assert "gallery.safetensors can't be read (SafetensorError)" in words(write_run_report(tmp_path))
    path.unlink()
    page = write_run_report(tmp_path)
    check_page(page)
    assert "gallery.safetensors is missing: no examples are shown." in words(page)
    assert "Retrieval" in headings(page)


def verdict(folder: Path, changes: dict[str, Any]) -> str:
    numbers = copy.deepcopy(fake_pairs())
    write_pair_run(folder, numbers=numbers | changes)
    return words(write_run_report(folder))


def test_the_verdict_says_what_is_known(tmp_path: Path, quick_pairs: None) -> None:
    text = verdict(tmp_path, {"test": {"recall_5": 0.482}, "before": None, "retrieval": None})
    assert "m\u00b2-Mix has the right one among its first five 48.2 % of the time." in text
    assert "Its confidence" not in text
    text = verdict(
        tmp_path, {"test": {"recall_5": 0.482}, "before": {"recall_5": 0.3}, "retrieval": [{"part": "seen"}]}
    )
    assert "48.2 % of the time (30.0 % before fine-tuning)." in text
    other = {"retrieval": None, "data": {"kind": "pairs"}}
    text = verdict(tmp_path, {"test": {"recall_5": 0.5, "ece": 0.05}, "calibration": None, "before": {}} | other)
    assert "Searching among n/a test pairs that it was not trained on" in text
    assert "is off by 5.0 points on average." in text
    bins = {"confidence": [0.25], "accuracy": [0.75], "count": [10]}
    modest = {"image_to_text": {"bins": bins}, "text_to_image": {"bins": bins}}
    text = verdict(tmp_path, {"test": {"recall_5": 0.5, "ece": 0.5}, "calibration": modest})
    assert "Its confidence in the first one that it finds is 50.0 points too low on average." in text
    # A head on top of the pictures finds no texts.
    text = verdict(tmp_path, {"test": {"zeroshot": 0.75}, "objective": "lipsum"})
    assert "Lipsum-FT reached 75.0 % zero-shot top-1 on 342 test pairs of emoji." in text


def test_an_unfinished_run_tells_its_last_validation(tmp_path: Path, quick_pairs: None) -> None:
    write_pair_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    page = write_run_report(tmp_path)
    check_page(page)
    assert "Its log ends at step 720, epoch 9. The last validation gave 49.9 % R@5." in words(page)


@pytest.mark.parametrize("wrong", WRONG[::2], ids=str)
def test_a_damaged_summary_still_gives_a_page(tmp_path: Path, quick_pairs: None, wrong: Any) -> None:
    pieces = ["test", "before", "retrieval", "calibration", "arithmetic", "sphere", "sphere_before", "examples"]
    write_pair_run(tmp_path / "all", numbers=fake_pairs() | dict.fromkeys([*pieces, "data", "model"], wrong))
    check_page(write_run_report(tmp_path / "all"))
    values = fake_pairs()
    for piece in pieces:
        inner = values[piece]
        if isinstance(inner, dict):
            values[piece] = dict.fromkeys(inner, wrong)
        else:
            values[piece] = [dict.fromkeys(inner[0], wrong), wrong]
    write_pair_run(tmp_path / "inner", numbers=values)
    text = words(write_run_report(tmp_path / "inner"))
    assert "nan" not in text.lower().split()
    check_page(tmp_path / "inner" / "report.html")


def hostile_pairs(numbers: dict[str, Any], payload: str) -> dict[str, Any]:
    """The payload wherever a summary of an image-text run has words."""
    numbers = copy.deepcopy(numbers)
    for entry in numbers["retrieval"]:
        entry |= {"style": payload or " ", "part": f"{payload}{entry['part']}", f"{payload}_recall_1": 0.5}
    numbers["examples"]["texts"][0] = payload
    numbers["arithmetic"]["scale"] = payload
    numbers["arithmetic"]["kinds"][f"{payload} "] = {"queries": 3, "recall_1": 0.5}
    for key in ("test", "before"):
        numbers[key] |= {f"{payload} m": 0.5, f"shift_{payload} ": 0.5}
    numbers["calibration"] |= {payload: {"bins": payload}}
    styles = [payload or " ", "noto"]
    numbers["data"] |= {"name": payload or " ", "styles": styles, "trained_styles": styles, "license": payload or " "}
    return numbers | dict.fromkeys(("name", "objective", "policy", "seed"), payload or " ")


def test_hostile_words_stay_words(tmp_path: Path, quick_pairs: None) -> None:
    outline = None
    few = {"sphere": fake_sphere(0, 0.5, pairs=3), "sphere_before": fake_sphere(1, 0.5, pairs=3)}
    summary = write_pair_run(tmp_path, epochs=1, numbers=fake_pairs() | few)
    for payload in ["plain", *PAYLOADS]:
        (tmp_path / "summary.json").write_text(json.dumps(hostile_pairs(summary, payload)))
        found = check_page(write_run_report(tmp_path)).outline()
        outline = outline or found
        assert found == outline, payload[:60]


def test_hostile_words_in_plots(tmp_path: Path) -> None:
    for payload in (p for p in PAYLOADS if p.startswith(("<script", "$\\", "AAA", "lone", "]]>", "<b>"))):
        numbers = hostile_pairs(fake_pairs(), payload)
        drawn = pair_plots.arithmetic(numbers["arithmetic"])
        assert drawn is not None
        assert len(drawn[0].uri) < 100_000
        for element in xml.etree.ElementTree.fromstring(svg(drawn[0])).iter():
            tag = element.tag.rpartition("}")[2]
            assert tag in {"svg", "g", "path", "text", "tspan", "use", "defs", "style", "clipPath", "rect"}
            assert not any(key.lower().startswith("on") for key in element.attrib)


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    write_pair_run(tmp_path)
    first = write_run_report(tmp_path).read_bytes()
    assert write_run_report(tmp_path).read_bytes() == first


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    write_pair_comparison(folder)
    check_page(write_comparison_report(folder))
    return folder


def test_a_comparison(compared: Path) -> None:
    page = compared / "report.html"
    assert page.stat().st_size < 700_000
    text = words(page)
    stored = json.loads((compared / "comparison.json").read_text())
    second = stored["table"][1]
    gain = second["versus_first"]["recall_5"]
    assert f"emoji-m2mix won: {100 * second['metrics']['recall_5']['mean']:.2f} % R@5, " in text
    assert f"{100 * gain['difference']:.2f} points more than emoji-clip" in text
    assert headings(page) == [
        *("Results", "Every seed", "Cost", "Learning curves", "Calibration", "The sphere", "What was run"),
    ]
    tables = re.findall(r"<h3>(.*?)</h3>", page.read_text("utf-8"))
    groups = ["Unseen concepts, trained styles", "Unseen concepts, other styles", "Seen concepts, other styles"]
    assert tables[:5] == [*groups, "Classification", "Geometry of the embeddings"]
    assert text.count("modality gap neither direction is better") == 2  # results, and twins
    assert "modality gap, neither direction is better." in text
    assert " different " in text
    assert "median rank lower is better" in text
    assert "test pairs 342" in text
    for key in METRICS:
        for entry in stored["table"]:
            assert plain(show(key, entry["metrics"][key]["mean"])) in text, (entry["name"], key)
    assert "m\u00b2-Mix" in text
    known = alts(page)
    assert sum(alt.startswith("Pictures and texts on a unit sphere, of emoji-") for alt in known) == 3
    assert sum(alt.startswith("validation R@5 over epochs") for alt in known) == 1
    for name in ("R@5", "R@5 in other styles", "zero-shot top-1", "arithmetic R@1", "ECE", "modality gap"):
        assert sum(alt.startswith(f"{name} of each method") for alt in known) == 1, name


def test_the_gap_decides_nothing(compared: Path) -> None:
    page = (compared / "report.html").read_text("utf-8")
    row = page.split("Geometry of the embeddings")[1].split("</table>")[0]
    gaps = [cells.split("<td>")[-1] for cells in row.split("<tr>")[2:]]
    assert len(gaps) == 3
    assert not any("best" in cell or "better" in cell or "worse" in cell for cell in gaps)
    assert "different" in gaps[1]
    assert "better on" in words(compared / "report.html")
    sentence = re.findall(r"<li><b>.*?</li>", page)
    assert sentence
    assert not any("modality gap" in item for item in sentence)


@pytest.mark.parametrize(("size", "end"), [(1, "m0"), (11, "m9, m10"), (12, "m9 and 2 more"), (40, "m9 and 30 more")])
def test_long_lists_of_metrics_are_cut(size: int, end: str) -> None:
    assert _some([f"m{i}" for i in range(size)]).endswith(end)


def test_metrics_of_a_table_stand_together(compared: Path, tmp_path: Path, quick_pairs: None) -> None:
    stored = json.loads((compared / "comparison.json").read_text())
    stored["metrics"] = ["recall_5", "gap", "shift_recall_5", "zeroshot", "recall_1", "new", "alignment"]
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    page = write_comparison_report(tmp_path)  # no run folder is there
    check_page(page)
    titles = re.findall(r"<h3>(.*?)</h3>", page.read_text("utf-8"))[:5]
    assert [title.split(",")[0] for title in titles[:3]] == ["Unseen concepts", "Unseen concepts", "Classification"]
    assert titles[3:] == ["Geometry of the embeddings", "Other metrics"]
    assert "The sphere" not in headings(page)
    with open(write_csv(tmp_path), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert [float(row["recall_5"]) for row in rows[:3]] == stored["table"][0]["metrics"]["recall_5"]["values"]


def test_damaged_runs_of_a_comparison_are_left_out(compared: Path, tmp_path: Path, quick_pairs: None) -> None:
    stored = json.loads((compared / "comparison.json").read_text())
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    for i, run in enumerate(stored["runs"]):
        wrong = WRONG[i % len(WRONG)]
        numbers = fake_pairs() | {"sphere": wrong, "calibration": {"image_to_text": {"bins": wrong}}, "test": wrong}
        write_pair_run(tmp_path / run["folder"], epochs=1, numbers=numbers)
    page = write_comparison_report(tmp_path)
    check_page(page)
    assert not {"The sphere"} & set(headings(page))
