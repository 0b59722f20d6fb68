"""The captions of an image-text run on its page, whatever its summary holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hardmix.report import pair_page, write_run_report
from hardmix.report.folder import read_run
from hardmix.report.text import metric, pair_group, show

from .fake_pairs import fake_pairs, write_pair_run
from .test_hostile import PAYLOADS, check_page
from .test_number_plots import WRONG
from .test_pages import headings, words
from .test_pair_plots import quick_pairs

assert quick_pairs  # the fixture
BEAM = {"exact": 0.25, "edit_distance": 0.5, "bleu_4": 0.125, "cider": 1.5}
GREEDY = {"exact": 0.125, "edit_distance": 0.625, "bleu_4": 0.0625, "cider": 1.25}


def line(part: str, style: str, **changes: Any) -> dict[str, Any]:
    return {
        "part": part,
        "style": style,
        "shift": style == "twemoji",
        "pictures": 200,
        "greedy": GREEDY,
        "beam": BEAM,
    } | changes


def stored(**changes: Any) -> dict[str, Any]:
    return {
        "beams": 4,
        "unit": "word",
        "lines": [line("unseen", "noto"), line("unseen", "twemoji"), line("seen", "noto")],
        "examples": [
            {"row": 2, "found": "red heart", "right": "red heart"},
            {"row": 5, "found": "hammer", "right": "pick"},
        ],
    } | changes


def page_of(folder: Path, captions: Any, **changes: Any) -> Path:
    write_pair_run(folder, numbers=fake_pairs(start=False) | {"objective": "coca", "captions": captions} | changes)
    return write_run_report(folder)


def test_captions_with_their_pictures(tmp_path: Path, quick_pairs: None) -> None:
    numbers = fake_pairs(start=False)
    measured = {f"{start}caption_{key}": value for start in ("", "shift_") for key, value in BEAM.items()}
    page = page_of(tmp_path, stored(), test=numbers["test"] | measured)
    check_page(page)
    assert headings(page)[1:3] == ["Retrieval", "Captions"]
    text = words(page)
    assert "What this page could not show" not in text
    assert "CoCa has the right one among its first five" in text
    assert "Agreement is counted in words." in text
    assert "noto: greedy 200 pictures 12.50 % 0.6250 6.25 % 1.250" in text
    assert "twemoji: 4 beams 200 pictures, not a style of this training 25.00 % 0.5000 12.50 % 1.500" in text
    assert text.count("noto: 4 beams") == 2
    assert "red heart which is its text" in text
    assert "hammer its text: pick" in text
    assert page.read_text("utf-8").count('alt="a test picture"') == 2
    assert "exact captions in other styles 25.00 %" in text
    assert text.index("What is written for pictures of unseen concepts") < text.index("Geometry of the embeddings")


def test_runs_without_captions_have_no_such_section(tmp_path: Path, quick_pairs: None) -> None:
    write_pair_run(tmp_path)
    assert "Captions" not in headings(write_run_report(tmp_path))


def test_metrics_of_captions_are_named_and_directed() -> None:
    keys = [f"{start}caption_{key}" for start in ("", "shift_") for key in BEAM]
    assert {pair_group(key) for key in keys} == {"captions"}
    assert [key for key in keys if metric(key).lower_is_better] == [
        "caption_edit_distance",
        "shift_caption_edit_distance",
    ]
    assert metric("shift_caption_cider").label == "CIDEr-D in other styles"
    assert show("caption_exact", 0.125) == "12.50\u00a0%"


def test_what_is_missing_or_wrong_is_left_out(tmp_path: Path, quick_pairs: None) -> None:
    write_pair_run(tmp_path)
    run = read_run(tmp_path)

    def shown(captions: Any) -> pair_page.Captions | None:
        run.summary["captions"] = captions
        return pair_page.captions(run, [])

    whole = shown(stored())
    assert whole is not None
    assert [len(table.rows) for table in whole.tables] == [4, 2]
    for wrong in WRONG:
        assert shown(wrong) is None
        assert shown(stored(lines=wrong, examples=wrong)) is None
        assert shown(stored(lines=[wrong], examples=[wrong])) is None
        odd = shown(stored(beams=wrong, unit=wrong))
        assert odd is not None
        assert odd.tables[0].rows[1].name.startswith("noto: ")
        odd = shown(stored(lines=[line("unseen", wrong, shift=wrong, pictures=wrong, beam=wrong)]))
        assert odd is not None
        assert len(odd.tables[0].rows) == 1, "the other search is left"
        assert shown(stored(lines=[line("unseen", "noto", greedy=wrong, beam=wrong)], examples=[])) is None
        for key in ("found", "right"):
            odd = shown(stored(examples=[{"row": 2, "found": "a", "right": "b", key: wrong}]))
            assert odd is not None
            assert len(odd.examples) == isinstance(wrong, str)
        odd = shown(stored(examples=[{"row": wrong, "found": "a", "right": "b"}]))
        assert odd is not None
        assert odd.examples == [pair_page.Caption(odd.examples[0].picture, "a", "b")]
    assert shown(stored(lines=[]))
    assert shown(stored(examples=[{"row": 10**9, "found": "a", "right": "b"}])).examples[0].picture is None  # type: ignore[union-attr]
    many = stored(lines=[line("unseen", "noto")] * 10_000, examples=[{"row": 0, "found": "a", "right": "b"}] * 10_000)
    found = shown(many)
    assert found is not None
    assert (len(found.tables[0].rows), len(found.examples)) == (2 * pair_page.ENTRIES, pair_page.CAPTIONS)


def test_a_missing_gallery_is_told_once(tmp_path: Path, quick_pairs: None) -> None:
    page_of(tmp_path, stored())
    (tmp_path / "gallery.safetensors").unlink()
    page = write_run_report(tmp_path)
    check_page(page)
    text = words(page)
    assert text.count("gallery.safetensors is missing: no examples are shown.") == 1
    assert "hammer its text: pick" in text, "captions are texts, and are shown without their pictures"


@pytest.mark.parametrize("start", range(0, len(PAYLOADS), 8))
def test_hostile_captions_keep_the_structure(start: int, tmp_path: Path, quick_pairs: None) -> None:
    def page(folder: Path, payload: str) -> Path:
        lines = [line(payload, payload, **{payload: 1}), line("seen", payload)]
        examples = [{"row": 2, "found": payload, "right": "its own"}, {"row": 5, "found": "found", "right": payload}]
        return page_of(folder, stored(unit=payload, lines=lines, examples=examples))

    plain = check_page(page(tmp_path / "plain", "plain")).outline()
    for payload in PAYLOADS[start : start + 8]:
        found = check_page(page(tmp_path / "hostile", payload))
        if payload:  # a style without a name is left out
            assert found.outline() == plain, payload[:60]
