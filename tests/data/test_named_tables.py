"""Files written here in each of the forms in which the sets are handed around, whole and damaged."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hardmix.data import named_tables
from hardmix.data.named_tables import NAMED_TABLES, find_named_table, read_named_table, table_numbers
from hardmix.data.tables import load_table

HEADERS = {
    "concrete": (
        "Cement (component 1)(kg in a m^3 mixture)",
        "Blast Furnace Slag (component 2)(kg in a m^3 mixture)",
        "Fly Ash (component 3)(kg in a m^3 mixture)",
        "Water  (component 4)(kg in a m^3 mixture)",
        "Superplasticizer (component 5)(kg in a m^3 mixture)",
        "Coarse Aggregate  (component 6)(kg in a m^3 mixture)",
        "Fine Aggregate (component 7)(kg in a m^3 mixture)",
        "Age (day)",
        "Concrete compressive strength(MPa, megapascals) ",
    ),
    "casp": ("RMSD", "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9"),
    "ccpp": ("AT", "V", "AP", "RH", "PE"),
    "real-estate": (
        "No",
        "X1 transaction date",
        "X2 house age",
        "X3 distance to the nearest MRT station",
        "X4 number of convenience stores",
        "X5 latitude",
        "X6 longitude",
        "Y house price of unit area",
    ),
}
HEADERS |= {
    name: tuple(column.replace("_", " ") for column in named_tables.WINE) for name in ("wine-red", "wine-white")
}
SEPARATORS = {"airfoil": "\t", "yacht": "  ", "casp": ",", "wine-red": ";", "wine-white": ";", "concrete": ","}
#: label mean and standard deviation of the real files, and the features of their first row
REAL = {
    "airfoil": (124.8359, 6.8964, [800, 0, 0.3048, 71.3, 0.00266337]),
    "concrete": (35.8178, 16.6976, [540, 0, 0, 162, 2.5, 1040, 676, 28]),
    "casp": (7.7485, 6.1182, [13558.3, 4305.35, 0.31754, 162.173, 1872790.507, 215.359, 4287.87, 102, 27.0302]),
    "ccpp": (454.3650, 17.0661, [14.96, 41.76, 1024.07, 73.17]),
    "wine-red": (5.6360, 0.8073, [7.4, 0.7, 0, 1.9, 0.076, 11, 34, 0.9978, 3.51, 0.56, 9.4]),
    "wine-white": (5.8779, 0.8855, [7, 0.27, 0.36, 20.7, 0.045, 45, 170, 1.001, 3, 0.45, 8.8]),
    "yacht": (10.4954, 15.1359, [-2.3, 0.568, 4.78, 3.99, 3.17, 0.125]),
    "real-estate": (37.9802, 13.59, [2012.9166667, 32, 84.87882, 10, 24.98298, 121.54024]),
}


def numbers(name: str) -> list[list[float]]:
    table = NAMED_TABLES[name]
    values = torch.randn(table.rows, len(table.columns), generator=torch.Generator().manual_seed(1)).double()
    return values.tolist()


def text(name: str, rows: list[list[float]]) -> str:
    lines = [SEPARATORS[name].join(map(repr, row)) for row in rows]
    if name in HEADERS:
        lines.insert(0, SEPARATORS[name].join(f'"{word}"' for word in HEADERS[name]))
    return "\n".join(lines) + "\n"


def sheet(rows: list[list[float]], header: tuple[str, ...], *, shared: bool = True) -> dict[str, str]:
    """The parts of an .xlsx file, as Excel writes them (shared words) or as others do (words in place)."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    words = [
        f'<c t="s"><v>{k}</v></c>' if shared else f'<c t="inlineStr"><is><t>{word}</t></is></c>'
        for k, word in enumerate(header)
    ]
    cells = [words, *([f'<c s="1"><v>{value!r}</v></c>' for value in row] for row in rows)]
    # blank cells and rows with a style are common, and say nothing
    lines = [f'<row r="{k}">{"".join(row)}<c s="4"/></row>' for k, row in enumerate(cells, 1)]
    parts = {
        "xl/worksheets/sheet1.xml": f"<worksheet {space}><sheetData>{''.join(lines)}<row/></sheetData></worksheet>"
    }
    if shared:
        entries = "".join(f"<si><t>{word}</t></si>" for word in header)
        parts["xl/sharedStrings.xml"] = f"<sst {space}>{entries}</sst>"
    return parts


def write_parts(path: Path, parts: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def write(path: Path, name: str, rows: list[list[float]] | None = None) -> Path:
    rows = numbers(name) if rows is None else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".xlsx":
        return write_parts(path, sheet(rows, HEADERS[name]))
    path.write_text(text(name, rows))
    return path


@pytest.mark.parametrize("name", NAMED_TABLES)
def test_a_set_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    table = replace(NAMED_TABLES[name], rows=min(NAMED_TABLES[name].rows, 2000))  # the larger ones only take longer
    monkeypatch.setitem(NAMED_TABLES, name, table)
    path = write(tmp_path / table.files[0], name)
    values = torch.tensor(numbers(name), dtype=torch.float64)
    got = read_named_table(name, path)
    position = table.columns.index(table.target)
    kept = [p for p, column in enumerate(table.columns) if column and p != position]
    assert got.inputs.equal(values[:, kept])
    assert got.labels.equal(values[:, position])
    assert got.feature_names == tuple(table.columns[p] for p in kept)
    assert (got.kind, got.target, got.name, got.source) == ("rows", table.target, name, str(path))
    assert (got.ids, got.split, got.sample_id(17), got.license) == ((), None, "row 17", "CC BY 4.0")
    assert got.inputs.dtype == got.labels.dtype == torch.float64


def test_the_published_sizes() -> None:
    sizes = {name: (table.rows, len(table.targets) - 1) for name, table in NAMED_TABLES.items()}
    assert sizes == {
        "airfoil": (1503, 5),
        "concrete": (1030, 8),
        "casp": (45730, 9),
        "ccpp": (9568, 4),
        "wine-red": (1599, 11),
        "wine-white": (4898, 11),
        "yacht": (308, 6),
        "real-estate": (414, 6),
    }


def test_any_column_is_a_target(tmp_path: Path) -> None:
    path = write(tmp_path / "airfoil_self_noise.dat", "airfoil")
    values = torch.tensor(numbers("airfoil"), dtype=torch.float64)
    got = read_named_table("airfoil", path, target="chord")
    assert (got.target, got.feature_names) == ("chord", ("frequency", "angle", "velocity", "thickness", "sound"))
    assert got.inputs.equal(values[:, [0, 1, 3, 4, 5]])
    assert got.labels.equal(values[:, 2])
    assert NAMED_TABLES["airfoil"].targets[:2] == ("sound", "frequency")
    assert "" not in NAMED_TABLES["real-estate"].targets


@pytest.mark.parametrize("shared", [True, False])
def test_sheets_of_other_writers(tmp_path: Path, shared: bool) -> None:
    path = write_parts(tmp_path / "t.xlsx", sheet(numbers("concrete"), HEADERS["concrete"], shared=shared))
    assert read_named_table("concrete", path).labels.tolist() == [row[-1] for row in numbers("concrete")]


def test_a_comma_in_a_header_and_a_file_without_header(tmp_path: Path) -> None:
    path = write(tmp_path / "Concrete_Data.csv", "concrete")
    whole = path.read_text()
    assert "(MPa, megapascals)" in whole.splitlines()[0]
    for content in (whole, "\ufeff" + whole.replace("\n", "\r\n\r\n"), whole.split("\n", 1)[1]):
        path.write_text(content)
        assert read_named_table("concrete", path).inputs.tolist() == [row[:-1] for row in numbers("concrete")]


@pytest.mark.parametrize("name", NAMED_TABLES)
def test_a_file_is_found_at_or_below_a_folder(tmp_path: Path, name: str) -> None:
    table = NAMED_TABLES[name]
    for place in (*named_tables.FOLDERS, None):
        for file in table.files:
            root = tmp_path / f"{place}/{file}".replace("/", "-")
            path = root / (file if place is None else f"{place}/{table.folder}/{file}".lstrip("/"))
            path.parent.mkdir(parents=True)
            path.touch()
            assert find_named_table(name, root) == path
            assert find_named_table(name, path) == path
    (tmp_path / "other.csv").touch()
    assert find_named_table(name, tmp_path / "other.csv") is None
    assert find_named_table(name, tmp_path / "missing") is None


def test_the_unpacked_download_and_the_preferred_form(tmp_path: Path) -> None:
    path = tmp_path / "combined+cycle" / "CCPP" / "Folds5x2_pp.xlsx"
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_named_table("ccpp", tmp_path / "combined+cycle") == path
    assert find_named_table("ccpp", tmp_path) is None  # two levels down: not of this set
    for file in ("Concrete_Data.xls", "Concrete_Data.csv", "Concrete_Data.xlsx"):
        (tmp_path / file).touch()
        assert find_named_table("concrete", tmp_path) == tmp_path / file


def test_samples_are_always_the_same_and_know_their_row(tmp_path: Path) -> None:
    path = write(tmp_path / "airfoil_self_noise.dat", "airfoil")
    whole, some, fewer = (read_named_table("airfoil", path, samples=n) for n in (1_503, 200, 50))
    assert whole.inputs.equal(read_named_table("airfoil", path).inputs)
    rows = [int(name.removeprefix("row ")) for name in some.ids]
    assert rows == sorted(set(rows))
    assert rows != list(range(200))
    assert some.inputs.equal(whole.inputs[rows])
    assert some.labels.equal(whole.labels[rows])
    assert set(fewer.ids) < set(some.ids)
    assert some.sample_id(3) == f"row {rows[3]}"
    assert read_named_table("airfoil", path, samples=200).inputs.equal(some.inputs)


AIRFOIL = text("airfoil", numbers("airfoil")).splitlines()
EXPECTED = r"but airfoil is 1,503 rows of 6 numbers; fetch it again\."
DAMAGED: list[tuple[Callable[[list[str]], list[str]], str]] = [
    (lambda lines: lines[:900], rf"has 900 rows, {EXPECTED}"),
    (lambda lines: [*lines, lines[0]], rf"has 1,504 rows, {EXPECTED}"),
    (lambda lines: [*lines[:-1], "\t".join(lines[-1].split("\t")[:3])], rf"has 3 cells in row 1503, {EXPECTED}"),
    (lambda lines: [], rf"has 0 rows, {EXPECTED}"),
    (lambda lines: [line + "\t1.0" for line in lines], rf"has 7 cells in row 1, {EXPECTED}"),
    (
        lambda lines: [*lines[:6], lines[6].replace("\t", "\tx", 1), *lines[7:]],
        r"has 'x.*' in row 7, which is no finite",
    ),
    (lambda lines: [*lines[:-1], "1\tnan\t1\t1\t1\t1"], r"has 'nan' in row 1503, which is no finite number"),
    (lambda lines: ["1\t1e999\t1\t1\t1\t1", *lines[1:]], r"has '1e999' in row 1, which is no finite number"),
    (
        lambda lines: [re.sub(r"\S+$", "7", line) for line in lines],
        r"has the same sound \(7\) in each of the 1503 rows",
    ),
    (lambda lines: ["sound\tfrequency\tangle\tchord\tvelocity\tthickness", *lines], r"'sound' where airfoil has freq"),
    (lambda lines: ["\udcff", *lines], r"is not UTF-8 text"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_file_that_is_not_exactly_the_set(
    tmp_path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    path = tmp_path / "airfoil_self_noise.dat"
    path.write_bytes("\n".join(change(AIRFOIL)).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as raised:
        read_named_table("airfoil", path)
    assert re.fullmatch(rf"read_named_table: '{re.escape(str(path))}' .*\.", str(raised.value))  # one line


def test_a_quote_that_is_never_closed(tmp_path: Path) -> None:
    path = write(tmp_path / "winequality-red.csv", "wine-red")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], '"' + lines[3], *lines[4:]]))
    with pytest.raises(ValueError, match="has 1 cells in row 4, but wine-red is 1,599 rows of 12 numbers"):
        read_named_table("wine-red", path)
    path.write_text("\n".join([*lines[:3], '"' + "1" * 200_000, *lines[4:]]))
    with pytest.raises(ValueError, match=r"is damaged \(field larger than field limit"):
        read_named_table("wine-red", path)


def test_damaged_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "Concrete_Data.xlsx"
    good = sheet(numbers("concrete"), HEADERS["concrete"])
    body, words = good.values()

    def message() -> str:
        with pytest.raises(ValueError, match=r"read_named_table: .*\.$") as raised:
            read_named_table("concrete", path)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    for wrong in (
        {"a": "b"},  # no sheet
        {"xl/worksheets/sheet1.xml": body},  # no words
        {"xl/worksheets/sheet1.xml": body[:-20], "xl/sharedStrings.xml": words},
        {"xl/worksheets/sheet1.xml": body.replace("<v>8<", "<v>9<"), "xl/sharedStrings.xml": words},
        {"xl/worksheets/sheet1.xml": body.replace('r="5"', 'r="five"'), "xl/sharedStrings.xml": words},
    ):
        write_parts(path, wrong)
        assert "is no .xlsx file, or a damaged one (" in message()
    write_parts(path, good)
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "is no .xlsx file, or a damaged one (" in message()
    broken = bytearray(whole)
    broken[200:300] = bytes(100)
    path.write_bytes(broken)
    assert "is no .xlsx file, or a damaged one (" in message()
    write_parts(path, sheet(numbers("concrete")[:500], HEADERS["concrete"]))
    assert "has 500 rows, but concrete is 1,030 rows of 9 numbers; fetch it again" in message()
    gap = re.sub(r'<c s="1">.*?</c>', "", body, count=1)
    write_parts(path, {**good, "xl/worksheets/sheet1.xml": gap})
    assert "has 8 cells in row 2, but concrete is" in message()
    write_parts(path, good)
    monkeypatch.setattr(named_tables, "MAX_SHEET_BYTES", 1_000)
    assert "unpacks to " in message()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: find_named_table("airfoyl", p), ValueError, r"find_named_table: name .* \(did you mean \"airfoil\""),
        (lambda p: read_named_table("air", p), ValueError, r"read_named_table: name is 'air'; pass one of"),
        (lambda p: read_named_table("casp", p, target="F10"), ValueError, r"target is 'F10'; .* \(did you mean \"F1\""),
        (
            lambda p: read_named_table("real-estate", p, target="No"),
            ValueError,
            r"target is 'No'; pass one of 'price',",
        ),
        (lambda p: read_named_table("yacht", p, samples=309), ValueError, r"samples is 309, but yacht has 308 rows; "),
        (lambda p: read_named_table("yacht", p, samples=9), ValueError, r"pass a number from 10 to 308, or 0 for all"),
        (lambda p: read_named_table("yacht", p, samples=-1), ValueError, r"samples is -1"),
        (lambda p: read_named_table("yacht", p), FileNotFoundError, r"which is a folder; pass the file of yacht"),
        (
            lambda p: read_named_table("yacht", p / "no"),
            FileNotFoundError,
            r"which is not there; pass the file of yacht",
        ),
        (
            lambda p: read_named_table("concrete", p / "c.xls"),
            ValueError,
            r"is in the old Excel format; save it as .xlsx",
        ),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, call: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    (tmp_path / "c.xls").touch()
    with pytest.raises(error, match=message):
        call(tmp_path)


@pytest.mark.filterwarnings("ignore:.*left out 7 of 20 rows")
def test_a_loaded_table_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("size,colour,price\n" + "".join(f"{k},{'red' if k % 3 else ''},{k * k}\n" for k in range(20)))
    for name, file, options in (("diabetes", None, {}), ("table", path, {"target": "price", "missing": "drop"})):
        got, table = table_numbers(name, file, **options), load_table(name, file, **options)
        assert got.inputs.equal(table.features)
        assert got.labels.equal(table.labels)
        assert got[2:7] == ("rows", table.target, table.name, table.license, table.source)
        assert got[8:10] == (None, table.feature_names)
        assert not got.groups
        # the rows of a file as it numbers them: the header is the first, and every third has no colour
        assert got.sample_id(5) == ("row 5" if file is None else "row 10")
    with pytest.raises(ValueError, match=r"load_table: .* has missing cells in 'colour'"):
        table_numbers("table", path, target="price")


@pytest.mark.parametrize("name", NAMED_TABLES)
def test_the_real_files(name: str) -> None:
    if "HARDMIX_DATA" not in os.environ:
        pytest.skip("HARDMIX_DATA is not set")
    path = find_named_table(name, Path(os.environ["HARDMIX_DATA"]) / name)
    if path is None:
        pytest.skip(f"{name} is not there")
    got = read_named_table(name, path)
    mean, std, first = REAL[name]
    assert (float(got.labels.mean()), float(got.labels.std(correction=0))) == pytest.approx((mean, std), abs=6e-5)
    assert got.inputs[0].tolist() == pytest.approx(first)
