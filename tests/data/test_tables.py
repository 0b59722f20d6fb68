"""Tables from files written here, cell by cell, and every way in which such a file can be wrong."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data.tables import Standardize, load_table, split_rows

ROWS = [f"{k},{'red' if k % 3 else 'blue'},{k * k}" for k in range(12)]
NUMBER = st.floats(width=32, allow_nan=False, allow_infinity=False)


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    return folder / name


def table(*changed: tuple[int, str], header: str = "size,colour,price") -> str:
    """The file above with some rows (numbered as in a spreadsheet) replaced."""
    rows = dict(enumerate(ROWS, 2)) | dict(changed)
    return "\n".join([header, *rows.values()]) + "\n"


@pytest.mark.parametrize(("delimiter", "name"), [(",", "t.csv"), ("\t", "t.tsv"), (";", "t.csv")])
@pytest.mark.parametrize("prefix", ["", "\ufeff", "\r\n"])
def test_numbers_stay_and_words_become_columns(tmp_path: Path, delimiter: str, name: str, prefix: str) -> None:
    text = prefix + table().replace(",", delimiter).replace("\n", "\r\n\r\n")
    got = load_table("table", write(tmp_path, text, name), target="price")
    assert got.feature_names == ("size", "colour=blue", "colour=red")
    assert got.features.tolist() == [[k, float(k % 3 == 0), float(k % 3 != 0)] for k in range(12)]
    assert got.labels.tolist() == [k * k for k in range(12)]
    assert got.features.dtype == got.labels.dtype == torch.float64
    assert (got.target, got.name, got.license, got.source) == ("price", "table", "yours", str(tmp_path / name))


def test_quoted_cells_and_any_target_column(tmp_path: Path) -> None:
    text = 'y, "a, b"\n' + "".join(f'{k}, "{k % 2}, x"\n' for k in range(10))
    got = load_table("table", write(tmp_path, text), target="y")
    assert got.feature_names == ("a, b=0, x", "a, b=1, x")
    assert got.features.sum(1).tolist() == [1.0] * 10


@settings(deadline=None, max_examples=25)
@given(values=st.lists(st.lists(NUMBER, min_size=2, max_size=2), min_size=10, max_size=15))
def test_numbers_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, values: list[list[float]]) -> None:
    text = "a,b,y\n" + "".join(f"{a!r},{b!r},{k}\n" for k, (a, b) in enumerate(values))
    path = write(tmp_path_factory.mktemp("t"), text)
    assert load_table("table", path, target="y").features.tolist() == values


def test_missing_cells_are_filled_or_left_out(tmp_path: Path) -> None:
    rows = [(2, "NA,?,0"), (3, ",red,1"), (4, "nan,null,4"), (5, "NaN,blue,9")]
    path = write(tmp_path, table(*rows))
    filled = load_table("table", path, target="price", missing="mean")
    assert filled.feature_names == ("size", "colour=blue", "colour=missing", "colour=red")
    assert filled.features[:, 0].tolist() == [sum(range(4, 12)) / 8] * 4 + list(range(4, 12))
    assert filled.features[:, 2].tolist() == [1, 0, 1] + [0] * 9
    more = write(tmp_path, table(*rows) + "".join(f"{k},red,{k * k}\n" for k in range(12, 15)))
    told = r"t.csv' has missing cells in 'size' \(4\), 'colour' \(2\); left out 4 of 15 rows\."
    with pytest.warns(UserWarning, match=told):
        dropped = load_table("table", more, target="price", missing="drop")
    assert dropped.features[:, 0].tolist() == list(range(4, 15))
    assert dropped.labels.tolist() == [k * k for k in range(4, 15)]
    assert dropped.feature_names == ("size", "colour=blue", "colour=red")


WRONG_TARGETS = table((3, "1,red,"), (7, "2,red,inf"), (8, "2,red,cheap"))
ADVICE = "fill them with `--set data.missing=mean`, or leave out their rows with `--set data.missing=drop`"
FILES = [  # text of the file, what to do about missing cells, message
    ("\n \n", "error", "is empty; pass a table with a header row"),
    ("a,price\n\udcff,1\n", "error", "is not UTF-8 text; save it as CSV in UTF-8"),
    (table((5, "1,red")), "error", "has 2 cells in row 5 but 3 in its header; repair that row"),
    (table((5, '1,"red,3')), "error", r"is damaged in row 5 \(unexpected end of data\); repair that row"),
    (table(header="size,,price"), "error", "has no name for column 2; name it in the header, or delete it"),
    (table(header="size,size ,price"), "error", "has two columns called 'size'; rename one of them"),
    (table(header="a,b,prize"), "error", r"for the target 'price'; pass one of 'a', .* \(did you mean \"prize\"\?\)"),
    ("price\n" + "1\n" * 12, "error", r"has one column \('price'\) and needs a feature and a target"),
    (WRONG_TARGETS, "drop", r"its target 'price' in rows 3 \(''\), 7 \('inf'\), 8 \('cheap'\); repair or delete them"),
    (table((4, "1,red,1e400")), "error", r"no finite number as its target 'price' in row 4 \('1e400'\); .* delete it"),
    (table((2, ",NA,0"), (6, "NaN,red,1")), "error", rf"missing cells in 'size' \(2\), 'colour' \(1\); {ADVICE}"),
    (table((4, "inf,red,1"), (9, "-1e39,red,1")), "error", "infinity or a number beyond float32 in 'size', rows 4, 9;"),
    ("a,price\n" + "".join(f",{k}\n" for k in range(12)), "mean", "no value at all in 'a'; delete the column"),
    ("a,price\n" + "1,7\n" * 12, "error", r"same value \(7\) in every row of the target 'price'; pass another target"),
    ("a,price\n" + "1,7\n" * 9, "error", "has 9 rows; pass a table with at least 10"),
    (table(*((k, f",red,{k}") for k in range(2, 6))), "drop", "has 8 of 12 rows without missing cells; pass a table"),
]


@pytest.mark.parametrize(("text", "missing", "message"), FILES)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, missing: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as raised:
        load_table("table", path, target="price", missing=missing)
    assert re.fullmatch(rf"load_table: '{re.escape(str(path))}' (has|is) .*\.", str(raised.value))  # one line


def test_fifty_words_are_features_and_more_are_an_id(tmp_path: Path) -> None:
    rows = [f"1_{k},{k}\n" for k in range(51)]  # a number to Python, a word in a table
    got = load_table("table", write(tmp_path, "id,y\n" + "".join(rows[:50])), target="y")
    assert got.feature_names == tuple(sorted(f"id=1_{k}" for k in range(50)))
    assert [got.feature_names[k] for k in got.features.argmax(1).tolist()] == [f"id=1_{k}" for k in range(50)]
    message = r"51 different values in 'id', which is .* numbers \(row 2 holds '1_0'\), .* \(an id is not a feature\)"
    with pytest.raises(ValueError, match=message):
        load_table("table", write(tmp_path, "id,y\n" + "".join(rows)), target="y")


def test_diabetes_has_raw_units(monkeypatch: pytest.MonkeyPatch) -> None:
    got = load_table("diabetes")
    assert got.features.shape == (442, 10)
    assert got.features[0].tolist() == pytest.approx([59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87])
    assert got.labels[:3].tolist() == [151, 75, 141]
    assert got.feature_names[:3] == ("age", "sex", "bmi")
    assert (got.license, got.source) == ("BSD-3-Clause", "scikit-learn")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'scikit-learn is not installed; pip install "hardmix\[train\]"\.'):
        load_table("diabetes")


class Column(list[object]):
    to_pylist = list.copy


def test_parquet_goes_through_the_same_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "", "t.parquet")
    columns = {"size": [0.1, None, *range(10)], "big": [k % 2 == 0 for k in range(12)], "y": list(range(12))}
    stored = SimpleNamespace(column_names=list(columns), columns=[Column(values) for values in columns.values()])
    parquet = SimpleNamespace(ParquetFile=lambda _: SimpleNamespace(read=lambda: stored))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=RuntimeError, parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    with pytest.warns(UserWarning, match=r"missing cells in 'size' \(1\); left out 1 of 12 rows"):
        got = load_table("table", path, target="y", missing="drop")
    assert got.feature_names == ("size", "big=False", "big=True")
    assert got.features[:2].tolist() == [[pytest.approx(0.1), 0, 1], [0, 0, 1]]
    columns["__index_level_0__"] = columns.pop("big")
    stored.column_names = list(columns)
    with pytest.raises(ValueError, match="has no name for column 3; name it in the header, or delete it"):
        load_table("table", path, target="y")
    monkeypatch.setattr(parquet, "ParquetFile", lambda _: (tmp_path / "gone").read_bytes())
    with pytest.raises(ValueError, match=r"t.parquet' is damaged \(FileNotFoundError\); fetch it again\."):
        load_table("table", path, target="y")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"can only be read with pyarrow, which is missing; pip install pyarrow"):
        load_table("table", path, target="y")


def test_a_parquet_text_that_is_damaged_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    table = pa.table({"size": ["wide", "long"], "y": [1, 2]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"wide", b"w\xffde"))
    with pytest.raises(
        ValueError, match=r"^load_table: .*t\.parquet' is damaged \(UnicodeDecodeError\); fetch it again"
    ):
        load_table("table", path, target="y")


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 60), test=st.floats(0, 1), validation=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_splits_are_disjoint_and_complete(rows: int, test: float, validation: float, seed: int) -> None:
    sizes = round(validation * rows), round(test * rows)
    if rows - sum(sizes) < 2 or sizes[1] < 2:
        with pytest.raises(ValueError, match=r"split_rows: test .* at least 2 of either are needed; pass other shares"):
            split_rows(rows, test, validation, seed)
        return
    parts = split_rows(rows, test, validation, seed)
    assert (len(parts[1]), len(parts[2])) == sizes
    assert sorted(i for part in parts for i in part.tolist()) == list(range(rows))
    assert all(part.dtype == torch.long and part.tolist() == sorted(part.tolist()) for part in parts)
    assert split_rows(rows, test, 0.0, seed)[2].equal(parts[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardized_columns(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype) * 7 + 1000
    x[:, 1] = 0.1
    fitted = Standardize.fit(x)
    for p, column in enumerate(x.double().T.tolist()):
        mean = math.fsum(column) / 50
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in column) / 50) if p != 1 else 1.0
        assert (fitted.mean[p].item(), fitted.std[p].item()) == pytest.approx((mean, std), rel=1e-6)
    assert fitted(x)[:, 1].equal(torch.zeros(50, dtype=dtype))
    assert Standardize.fit(x[:1])(x[:1]).tolist() == [[0.0] * 3]
    assert Standardize.fit(torch.tensor([[0.0], [1e-45]])).std.item() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_table("diabetis"), ValueError, r"name is 'diabetis'; pass one of .* \(did you mean \"diabetes\""),
        (lambda: load_table("diabetes", "x.csv"), ValueError, "path is 'x.csv', but diabetes comes with scikit-learn"),
        (lambda: load_table("diabetes", target="y"), ValueError, "target is 'y', but diabetes comes .*; leave it out"),
        (lambda: load_table("table"), ValueError, "path is None, but the table is a file of yours; pass its path"),
        (lambda: load_table("table", "/no.csv"), FileNotFoundError, "'/no.csv', which is not there; pass a CSV"),
        (lambda: load_table("table", missing="fill"), ValueError, "missing is 'fill'; pass one of 'error', 'mean'"),
        (lambda: load_table("table", "/"), FileNotFoundError, "path is '/', which is a folder"),
        (lambda: split_rows(10, 1.2, 0.1, 0), ValueError, "test is 1.2; pass a number from 0 to 1"),
        (lambda: split_rows(10, 0.2, 0.1, -1), ValueError, "seed is -1"),
        (lambda: split_rows(10, 0.5, 0.4, 0), ValueError, "of 10 rows leave 1 for training and 5 for testing"),
        (lambda: Standardize.fit(torch.tensor([[1.0], [math.inf]])), ValueError, "NaN or infinity in rows 1"),
        (lambda: Standardize.fit(torch.zeros(2, 3).long()), TypeError, "features has dtype torch.int64"),
        (lambda: Standardize.fit(torch.eye(3))(torch.eye(2)), ValueError, "has 2 columns but was fitted on 3"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_large_labels_and_features_that_are_close_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("when,until\n" + "".join(f"{1_600_000_000 + i},{1_600_000_000 + 10 * i}\n" for i in range(12)))
    got = load_table("table", path, target="until")
    assert got.labels.diff().tolist() == [10.0] * 11
    assert got.features[:, 0].diff().tolist() == [1.0] * 11
    assert torch.allclose(Standardize.fit(got.features)(got.features).std(0, correction=0), torch.ones(1).double())


@pytest.mark.parametrize("number", ["0,{}", "1,00{:02}", "1,234,{:03}.5", "-0,{}"])
def test_commas_in_numbers_are_told_from_words(number: str, tmp_path: Path) -> None:
    path = tmp_path / "commas.csv"
    cells = [number.format(i) for i in range(12)]
    advice = "write decimals after a point, and thousands without a comma"
    path.write_text("size;price\n" + "".join(f"{cell};{i}\n" for i, cell in enumerate(cells)))
    with pytest.raises(ValueError, match=rf"numbers with a comma in 'size', row 2 \('{cells[0]}'\); {advice}\."):
        load_table("table", path, target="price")
    with pytest.raises(ValueError, match=rf"its target 'size' in rows 2 \('{cells[0]}'\), .*; {advice}\."):
        load_table("table", path, target="size")


def test_a_split_column_says_where_rows_belong_and_is_no_feature(tmp_path: Path) -> None:
    words = ["train", "Train", "val", "test", "dev", "test"] * 3
    lines = [f"{i},{word},{i * 2}" for i, word in enumerate(words)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["x,split,y", *lines]) + "\n")
    table = load_table("table", path, target="y")
    assert table.feature_names == ("x",)
    assert table.split is not None
    assert table.split.tolist() == [0, 0, 1, 2, 1, 2] * 3
    lines[4] = "NA,train,8"
    path.write_text("\n".join(["x,split,y", *lines]) + "\n")
    with pytest.warns(UserWarning, match="left out 1 of 18 rows"):
        dropped = load_table("table", path, target="y", missing="drop").split
    assert dropped is not None
    assert dropped.tolist() == ([0, 0, 1, 2, 1, 2] * 3)[:4] + ([0, 0, 1, 2, 1, 2] * 3)[5:]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "trian",
            r"has 'trian' in row 2 of its column 'split' \(did you mean \"train\"\?\); write train, val",
        ),
        ("train", "has 20 samples for training and 0 for testing in its 'split', but at least 2"),
    ],
)
def test_a_split_column_of_something_else_is_said(cell: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["x,split,y", *(f"{i},{cell},{i}" for i in range(20))]) + "\n")
    with pytest.raises(ValueError, match=message):
        load_table("table", path, target="y")


def test_the_split_column_is_known_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = [f"{i},{('train', 'TEST')[i % 2]},{i}" for i in range(12)]
    path.write_text("\n".join(["x,Split,y", *lines]) + "\n")
    table = load_table("table", path, target="y")
    assert table.feature_names == ("x",)
    assert table.split is not None
    assert table.split.tolist() == [0, 2] * 6
    path.write_text("\n".join(["split,Split,y", *lines]) + "\n")
    with pytest.raises(ValueError, match="has 'split' and 'Split', which both say the split; rename one of them"):
        load_table("table", path, target="y")


@pytest.mark.parametrize("word", ["N/A", "#N/A", "n/a", "None", "Null", "na"])
def test_words_for_nothing_are_no_values(word: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["x,y", f"{word},0", *(f"{i},{i}" for i in range(1, 12))]) + "\n")
    table = load_table("table", path, target="y", missing="mean")
    assert table.feature_names == ("x",)
    assert table.features[0, 0] == 6


def test_a_word_among_numbers_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["x,y", "5%,0", *(f"{i},{i}" for i in range(1, 12))]) + "\n")
    with pytest.raises(ValueError, match=r"has '5%' in 'x', row 2, where nearly all cells are numbers; write a number"):
        load_table("table", path, target="y")
    path.write_text("\n".join(["x,y", *(f"{'-' if i % 3 else i},{i}" for i in range(12))]) + "\n")
    with pytest.raises(ValueError, match=r"has '-' in 'x', row 3, where other cells are numbers; write a number"):
        load_table("table", path, target="y")
    path.write_text("\n".join(["x,y", *(f"{'ab1'[i % 3]},{i}" for i in range(12))]) + "\n")
    assert load_table("table", path, target="y").feature_names == ("x=1", "x=a", "x=b")
