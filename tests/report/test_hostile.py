"""Names that want to be markup, script, formulas or invisible: a page's structure must not depend on them."""

from __future__ import annotations

import base64
import csv
import json
import re
import unicodedata
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hardmix.report import plots, write_comparison_report, write_csv, write_run_report
from hardmix.report.spreadsheet import text_cell
from hardmix.report.text import visible

from .fake_runs import METRICS, write_comparison, write_run

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    "</bdi></th></tr></table><iframe src=//x.example>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    '" style="background:url(https://x.example/a)',
    "` onload=`alert(1)",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "<meta http-equiv=refresh content='0;url=https://x.example'>",
    "<base href=https://x.example/>",
    "<link rel=stylesheet href=https://x.example/a.css>",
    "<object data=https://x.example></object>",
    "<embed src=https://x.example>",
    "<form action=https://x.example><input name=a>",
    "<body onload=alert(1)>",
    "<style>*{background:url(https://x.example)}</style>",
    "<!-- comment",
    "--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php echo 1 ?>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "&amp;&quot;&apos;",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "<\x0bimg src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}",
    "{{ config.__class__.__init__.__globals__ }}",
    "${7*7}",
    "%s%n%(name)s{0}{name}",
    r"$\frac{1}{0}$ \undefined $",
    "$$$",
    "a\u202egpj.exe",
    "\u2066\u2067hidden\u2069",
    "zero\u200bwidth\u200d\ufeff",
    "line\nbreak\r\nand\ttab",
    "para\u2028graph\u2029",
    "bell\x07 escape\x1b[31m nul\x00",
    "\ue000private \U000e0041tag",
    "lone surrogate \ud800",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(1+1)*cmd",
    "\t=1+1",
    "\uff1d1+1",
    "../../../etc/passwd",
    "C:\\windows\\system32",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u65e5\u672c\u8a9e \U0001f9ea",
    "",
    " ",
    "A" * 1_000_000,
    "<b>" * 300_000,
    "\u202e" * 100_000,
]
TAGS = """
    html head meta title style body main header section article footer h1 h2 h3 h4 p b i em strong small span bdi div
    dl dt dd ul ol li table thead tbody tr th td figure figcaption img details summary pre code
"""
ATTRIBUTES = """
    lang charset http-equiv content name class style scope src alt width height role aria-hidden aria-label tabindex
"""
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Structure(HTMLParser):
    """The elements of a page with their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.other: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        self.elements.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    handle_pi = unknown_decl = handle_comment

    def outline(self) -> list[tuple[str, tuple[str, ...], str | None]]:
        return [(tag, tuple(attrs), attrs.get("class")) for tag, attrs in self.elements]


def check_page(path: Path) -> Structure:
    """All that holds for every page, whatever it was written from."""
    raw = path.read_bytes()
    page = raw.decode("utf-8")
    found = Structure(page)
    assert not found.other, "a comment, a processing instruction or a declaration slipped in"
    for tag, attrs in found.elements:
        assert tag in TAGS.split(), tag
        for name, value in attrs.items():
            assert name in ATTRIBUTES.split(), name
            if name == "src":
                assert re.match(r"data:image/(png|jpeg|svg\+xml);base64,[A-Za-z0-9+/=]+$", value or ""), value
            if name == "style":
                assert re.match(r"((min-)?width:[\d.]+(%|px))$", value or ""), value
            if name == "class":
                assert re.match(r"[a-z0-9 ]*$", value or ""), value
    metas = [attrs for tag, attrs in found.elements if tag == "meta"]
    assert {"http-equiv": "Content-Security-Policy", "content": CSP} in metas
    assert [m.get("http-equiv") for m in metas].count("Content-Security-Policy") == 1
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(styles) == 1
    assert not re.search(r"url\(|@import|expression|https?:", styles[0])
    for c in set(page):
        assert unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or c in "\n\t", hex(ord(c))
    assert len(raw) < 1_500_000
    return found


def hostile_run(folder: Path, payload: str) -> Path:
    """The payload in every place that a run's folder has for words."""
    data = {"name": payload, "train": 10, "validation": payload, "test": payload, "classes": [payload] * 10}
    changes = {
        "name": payload,
        "task": payload,
        "seed": payload,
        "data": {**data, "source": payload, "license": payload},
        "model": {"name": payload, "parameters": payload},
        "versions": {payload: payload, "torch": payload},
        "device": payload,
        "policy": payload,
        "objective": payload,
        "test": {"top1": 0.9, f"{payload}": 0.5, f"{payload}_both": 0.4},
    }
    write_run(folder, epochs=2, changes=changes)
    (folder / "recipe.toml").write_text(f'name = "{payload}"\n', encoding="utf-8", errors="replace")
    return write_run_report(folder)


def test_run_pages_keep_their_structure(tmp_path: Path, quick_plots: None) -> None:
    plain = check_page(hostile_run(tmp_path / "plain", "plain")).outline()
    for i, payload in enumerate(PAYLOADS):
        found = check_page(hostile_run(tmp_path / str(i), payload))
        if payload not in ("", " "):  # empty facts are left out
            assert found.outline() == plain, payload[:60]


def hostile_comparison(folder: Path, payload: str) -> Path:
    """The payload in every place that a comparison has for words."""
    stored = json.loads((folder / "comparison.json").read_text())
    methods = {entry["name"]: f"{payload} {i}" for i, entry in enumerate(stored["table"])}
    metrics = ["top1", f"{payload} m", f"{payload}_both"]
    names = dict(zip(METRICS, metrics, strict=False))
    for run in stored["runs"]:
        run["name"] = methods[run["name"]]
        run["test"] = {names[k]: v for k, v in run["test"].items() if k in names}
    for entry in stored["table"]:
        entry["name"] = methods[entry["name"]]
        entry["policy"] = entry["objective"] = payload
        entry["metrics"] = {names[k]: v for k, v in entry["metrics"].items() if k in names}
        if entry["versus_first"]:
            entry["versus_first"] = {names[k]: v for k, v in entry["versus_first"].items() if k in names}
    stored |= {"title": payload or " ", "command": payload or " ", "metrics": metrics, "versions": {"v": payload}}
    stored["lower_is_better"] = [metrics[1]]
    target = folder.with_name(f"{folder.name}-hostile")
    target.mkdir(exist_ok=True)
    for child in folder.iterdir():
        if child.is_dir() and not (target / child.name).exists():
            (target / child.name).symlink_to(child)
    for run in stored["runs"]:
        run["folder"] = run["folder"].replace("/", "/./")
    (target / "comparison.json").write_text(json.dumps(stored))
    return target


def test_comparison_pages_and_csv_keep_their_structure(tmp_path: Path, quick_plots: None) -> None:
    write_comparison(tmp_path / "source", seeds=2)
    plain = check_page(write_comparison_report(hostile_comparison(tmp_path / "source", "plain"))).outline()
    for payload in PAYLOADS:
        folder = hostile_comparison(tmp_path / "source", payload)
        found = check_page(write_comparison_report(folder))
        if payload:  # "_both" alone is no metric on mixed samples, so its column stands elsewhere
            assert found.outline() == plain, payload[:60]
        with open(write_csv(folder), newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 7
        assert len({len(row) for row in rows}) == 1
        header = rows[0]
        numbers = slice(header.index("top1"), header.index("memory_mb") + 1)
        for k, row in enumerate(rows):
            for j, cell in enumerate(row):
                if k and numbers.start <= j < numbers.stop:
                    float(cell)
                else:
                    assert not cell.lstrip().startswith(("=", "+", "-", "@", "\t", "\r", "\uff1d")), cell[:60]
                    assert all(unicodedata.category(c) not in ("Cc", "Cf") for c in cell)


def test_folders_outside_are_not_opened(tmp_path: Path, quick_plots: None) -> None:
    write_run(tmp_path / "secret", name="secret run", epochs=2)
    for place in ("../secret", str(tmp_path / "secret"), "<img src=x onerror=alert(1)>", "a\x00b", "x" * 5000, "."):
        folder = tmp_path / "outer"
        write_comparison(folder, seeds=1)
        stored = json.loads((folder / "comparison.json").read_text())
        for run in stored["runs"]:
            run["folder"] = place
        (folder / "comparison.json").write_text(json.dumps(stored))
        page = write_comparison_report(folder)
        check_page(page)
        text = page.read_text("utf-8")
        assert "small-resnet" not in text
        if place != ".":
            assert "can&#39;t be read" in text


def test_a_run_folder_with_a_hostile_name(tmp_path: Path, quick_plots: None) -> None:
    for name in ("<script>alert(1)</script>".replace("/", "\u2215"), '" onload="x', "a\u202eb", "line\nbreak"):
        folder = tmp_path / name
        folder.mkdir()
        found = check_page(write_run_report(folder))
        assert "script" not in {tag for tag, _ in found.elements}


def test_plots_hold_text_and_nothing_else() -> None:
    names = [p for p in PAYLOADS if p.strip()]
    rows = [plots.Level(name, i, 0.5 + i / 1000, None, None, [0.5]) for i, name in enumerate(names)]
    drawn = [
        plots.levels(rows, "alt", x_label=PAYLOADS[0], percent=True),
        plots.cost(rows[:12], [0.1] * 12, "alt", y_label=r"$\frac$", percent=True),
    ]
    for plot in drawn:
        svg = base64.b64decode(plot.uri.split(",", 1)[1]).decode("utf-8")
        assert not re.search(r"<!DOCTYPE|<!ENTITY|<\?", svg)
        for element in xml.etree.ElementTree.fromstring(svg).iter():
            tag = element.tag.rpartition("}")[2]
            assert tag in {"svg", "g", "path", "text", "tspan", "use", "defs", "style", "clipPath", "rect", "metadata"}
            for key, value in element.attrib.items():
                assert not key.lower().startswith("on")
                if key.endswith("href"):
                    assert value.startswith("#")
    assert len(drawn[0].uri) < 200_000


def test_visible_spells_out_what_hides() -> None:
    assert visible("a\u202eb") == "a[U+202E]b"
    assert visible("a\nb") == "a[U+000A]b"
    assert visible("a\nb", keep="\n") == "a\nb"
    assert visible("\u65e5\u672c <b>") == "\u65e5\u672c <b>"
    long = visible("x" * 1_000_000)
    assert long == "x" * 160 + "... (1,000,000 characters)"
    assert visible(12) == "12"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1", "'=1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@a", "'@a"),
        (" =1", "' =1"),
        ("a=1", "a=1"),
        ("\t=1", "[U+0009]=1"),
    ],
)
def test_text_cells_are_no_formulas(text: str, cell: str) -> None:
    assert text_cell(text) == cell
