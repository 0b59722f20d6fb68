"""Arrow files: parquet, and folders as `datasets` saves them."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hardmix.data.hub import find_tables, read_table_set

SHAPE = (3, 4, 4)
NAMES = ("a", "b", "c")


def encoded(seed: int, size: int = 4, mode: str = "RGB") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, "PNG")
    return file.getvalue()


def rows(start: int, count: int) -> dict[str, list[Any]]:
    images = [{"bytes": encoded(start + i), "path": f"{i}.png"} for i in range(count)]
    return {"img": images, "label": [(start + i) % 3 for i in range(count)]}


def write(folder: Path, split: str, columns: list[dict[str, Any]], form: str, names: Any = NAMES) -> None:
    """One file for each of `columns`."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for number, values in enumerate(columns):
        table = pa.table(values)
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        stem = f"{number:05d}-of-{len(columns):05d}"
        if form == "parquet":
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, folder / f"{split}-{stem}.parquet")
        else:
            (folder / split).mkdir(parents=True, exist_ok=True)
            path = str(folder / split / f"data-{stem}.arrow")
            with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("sub", ["", "data", "plain_text"])
def test_a_set_is_found_and_read_in_order(tmp_path: Path, form: str, sub: str) -> None:
    write(tmp_path / sub, "train", [rows(0, 5), rows(5, 3)], form)
    write(tmp_path / sub, "test", [rows(50, 4)], form)
    folder = find_tables(tmp_path)
    assert folder == tmp_path / sub
    train, train_labels, test, test_labels = read_table_set(folder, SHAPE, NAMES)
    expected = [np.asarray(Image.open(io.BytesIO(encoded(i)))).transpose(2, 0, 1) for i in range(8)]
    assert np.array_equal(train.numpy(), np.stack(expected))
    assert train_labels.tolist() == [i % 3 for i in range(8)]
    assert test.shape == (4, *SHAPE)
    assert test_labels.tolist() == [(50 + i) % 3 for i in range(4)]
    assert train_labels.dtype == torch.long


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_missing_split_is_named(tmp_path: Path, form: str) -> None:
    for split in ("train", "validation"):
        write(tmp_path, split, [rows(0, 2)], form)
    folder = find_tables(tmp_path)
    assert folder == tmp_path
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path.name}' has no test/data-\*\.arrow, .*; add that split, or"
    ):
        read_table_set(folder, SHAPE, NAMES)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_set_without_the_splits_is_named(tmp_path: Path, name: str) -> None:
    """One split saved by itself, or splits under other names."""
    write(tmp_path, "all", [rows(0, 2)], "arrow")
    (tmp_path / name).write_text("{}")
    folder = find_tables(tmp_path)
    assert folder == tmp_path
    with pytest.raises(FileNotFoundError, match=r"has no train/.* save a DatasetDict with 'train' and 'test'\."):
        read_table_set(folder, SHAPE, NAMES)


def test_a_folder_of_anything_else_holds_no_set(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cache-1.arrow").write_bytes(b"x")
    assert find_tables(tmp_path) is None


def test_parquet_files_in_a_folder_for_each_split(tmp_path: Path) -> None:
    """As the hub converts sets: train/0000.parquet."""
    for split, start in (("train", 0), ("test", 50)):
        write(tmp_path / "plain_text" / split, "0000", [rows(start, 3)], "parquet")
        (tmp_path / "plain_text" / split / "._0000.parquet").write_bytes(b"x")
    folder = find_tables(tmp_path)
    assert folder == tmp_path / "plain_text"
    _, train, _, test = read_table_set(folder, SHAPE, NAMES)
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [2, 0, 1])


def test_files_of_an_earlier_save_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "train", [rows(0, 5), rows(5, 3)], "arrow")
    write(tmp_path, "train", [rows(0, 8)], "arrow")
    write(tmp_path, "test", [rows(50, 4)], "arrow")
    state = tmp_path / "train" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert len(read_table_set(tmp_path, SHAPE, NAMES)[0]) == 8
    (tmp_path / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train' has no data-00000-of-00001\.arrow, which its state\.json lists"
    ):
        read_table_set(tmp_path, SHAPE, NAMES)


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [1]}', '{"_data_files": []}', "[" * 100_000])
def test_without_a_list_all_files_are_read(tmp_path: Path, state: str) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 2), rows(2, 2)], "arrow")
        (tmp_path / split / "state.json").write_text(state)
    assert len(read_table_set(tmp_path, SHAPE, NAMES)[0]) == 4


def test_other_label_columns(tmp_path: Path) -> None:
    values = rows(0, 3)
    values["fine_label"] = values.pop("label")
    for split in ("train", "test"):
        write(tmp_path, split, [values], "parquet", names=None)
    assert read_table_set(tmp_path, SHAPE, NAMES)[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_labels_follow_the_names_of_the_file(tmp_path: Path, form: str) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 4)], form, names=NAMES[::-1])
    _, train, _, test = read_table_set(tmp_path, SHAPE, NAMES)
    assert train.tolist() == test.tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize(
    ("names", "labels"),
    [(("C", " b", "A!"), [2, 1, 0, 2]), (("0", "1", "2"), [0, 1, 2, 0]), (("b", "c", "a"), [1, 2, 0, 1])],
)
def test_names_that_are_written_differently(tmp_path: Path, names: tuple[str, ...], labels: list[int]) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 4)], "parquet", names=names)
    assert read_table_set(tmp_path, SHAPE, NAMES)[1].tolist() == labels


@pytest.mark.parametrize(("names", "odd"), [(("a", "b", "car"), "car"), (("b", "b", "a"), "b"), (("0", "2", "1"), "0")])
def test_other_classes_are_named(tmp_path: Path, names: tuple[str, ...], odd: str) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 4)], "parquet", names=names)
    with pytest.raises(ValueError, match=rf"parquet' has the classes .*{odd!r}.* instead of 'a', 'b', 'c'; "):
        read_table_set(tmp_path, SHAPE, NAMES)


def test_every_file_counts_by_its_own_names(tmp_path: Path) -> None:
    for number, names in enumerate((NAMES[::-1], NAMES)):
        write(tmp_path / "one", "train", [rows(3 * number, 3)], "parquet", names=names)
        (tmp_path / "one" / "train-00000-of-00001.parquet").rename(tmp_path / f"train-0000{number}-of-00002.parquet")
    write(tmp_path, "test", [rows(0, 3)], "parquet")
    assert read_table_set(tmp_path, SHAPE, NAMES)[1].tolist() == [2, 1, 0, 0, 1, 2]


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 3), rows(3, 3)], "parquet")
    import pyarrow.parquet as pq

    path = tmp_path / "train-00000-of-00002.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    train, labels, _, _ = read_table_set(tmp_path, SHAPE, NAMES)
    assert (train.shape, labels.tolist()) == ((3, *SHAPE), [0, 1, 2])


def without_bytes() -> dict[str, Any]:
    values = rows(0, 3)
    values["img"][1] = {"bytes": None, "path": "/etc/passwd"}
    return values


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"img": rows(0, 3)["img"], "x": [1, 2, 3]}, "has the columns 'img', 'x'; it needs"),
    "no images": ({"x": ["a", "b"], "label": [0, 1]}, "has the columns 'x', 'label'; it needs"),
    "text for an image": (
        {"img": [{"bytes": "iVBORw0KGgo="}] * 3, "label": [0, 1, 2]},
        "has the columns 'img', 'label'; it needs one with encoded images",
    ),
    "paths for images": (
        {"img": [{"bytes": None, "path": "a.png"}] * 3, "label": [0, 1, 2]},
        "has no image bytes at row 0; save the data set with its images",
    ),
    "a path for an image": (without_bytes(), "has no image bytes at row 1; save the data set with its images"),
    "a null image": ({**rows(0, 3), "img": [*rows(0, 2)["img"], None]}, "has no image bytes at row 2"),
    "label 3": ({**rows(0, 3), "label": [0, 3, 1]}, "has the label 3 at row 1; pass a set with labels from 0 to 2"),
    "label null": ({**rows(0, 3), "label": [0, None, 1]}, "has the label None at row 1"),
    "label text": ({**rows(0, 3), "label": ["a", "b", "c"]}, "has the label 'a' at row 0"),
    "label float": ({**rows(0, 3), "label": [0.0, 1.0, 2.0]}, "has the label 0.0 at row 0"),
    "another size": ({"img": [{"bytes": encoded(1, 5)}], "label": [0]}, r"has an image of \(3, 5, 5\) at row 0"),
    "not an image": ({"img": [{"bytes": b"junk"}], "label": [0]}, "row 0 of '.*train-.*parquet' is not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables_are_named(tmp_path: Path, kind: str) -> None:
    values, message = BAD[kind]
    write(tmp_path, "train", [values], "parquet")
    write(tmp_path, "test", [rows(0, 3)], "parquet")
    with pytest.raises(ValueError, match=rf"^read_table_set: .*{message}"):
        read_table_set(tmp_path, SHAPE, NAMES)


def test_another_number_of_classes_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 3)], "arrow", names=("a", "b"))
    with pytest.raises(ValueError, match=r"train/data-00000-of-00001\.arrow' has 2 classes instead of 3"):
        read_table_set(tmp_path, SHAPE, NAMES)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1 junk PAR1", b"\xff" * 100])
def test_damaged_files_are_named(tmp_path: Path, form: str, content: bytes) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 3)], form)
    path = next(path for path in sorted(tmp_path.rglob("*train*/*" if form == "arrow" else "train*.parquet")))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"read_table_set: '.*{path.name}' is damaged .*; fetch it again"):
        read_table_set(tmp_path, SHAPE, NAMES)


def test_an_arrow_file_whose_offsets_lie_is_damaged(tmp_path: Path) -> None:
    """Arrow itself takes them as they are, and reads memory of something else."""
    values = rows(0, 3)
    for split in ("train", "test"):
        write(tmp_path, split, [values], "arrow")
    path = tmp_path / "train" / "data-00000-of-00001.arrow"
    first, second = (len(image["bytes"]) for image in values["img"][:2])
    good, lie = struct.pack("<3i", 0, first, first + second), struct.pack("<3i", 0, 2**31 - 1, -1)
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, lie))
    with pytest.raises(
        ValueError, match=rf"^read_table_set: .*{path.name}' is damaged \(ArrowInvalid\); fetch it again"
    ):
        read_table_set(tmp_path, SHAPE, NAMES)


def test_a_column_name_that_is_no_text_is_damaged(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 3)], "arrow", names=None)
    path = tmp_path / "train" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes().replace(b"img", b"\xffmg"))
    with pytest.raises(ValueError, match=rf"^read_table_set: .*{path.name}' is damaged"):
        read_table_set(tmp_path, SHAPE, NAMES)


def test_a_file_that_may_not_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, [rows(0, 3)], "arrow")

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("pyarrow.OSFile", refuse)
    with pytest.raises(
        ValueError, match=r"^read_table_set: .*arrow' can't be read \(Permission denied\); pass another"
    ):
        read_table_set(tmp_path, SHAPE, NAMES)


def test_without_pyarrow_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}-00000-of-00001.parquet").write_bytes(b"x")
    folder = find_tables(tmp_path)
    assert folder is not None
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"train-.*parquet' can only be read with pyarrow, .*; pip install pyarrow\."):
        read_table_set(folder, SHAPE, NAMES)
