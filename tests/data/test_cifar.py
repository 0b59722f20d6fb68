"""CIFAR-10 readers on tiny files of every form, and on hostile ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hardmix.data.cifar import TEST, TRAIN, find_cifar, read_binary_batch, read_cifar10, read_python_batch

ROWS = 4


def content(batch: int) -> tuple[np.ndarray, list[int]]:
    """(ROWS, 3072) pixels and labels of one batch."""
    rng = np.random.default_rng(batch)
    return rng.integers(0, 256, (ROWS, 3072), dtype=np.uint8), [int(v) for v in rng.integers(0, 10, ROWS)]


def published_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes of a published batch: protocol 2 of Python 2, with byte strings and NumPy's names of that time."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        b"(" + number(1) + b"(" + number(data.shape[0]) + number(data.shape[1]) + b"t"
        b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
        b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        b"\x89" + b"T" + struct.pack("<i", data.size) + data.tobytes() + b"tb"
    )  # fmt: skip
    entries = text(b"batch_label") + text(b"training batch 1 of 5")
    entries += text(b"labels") + b"](" + b"".join(number(label) for label in labels) + b"e"
    entries += text(b"data") + array
    entries += text(b"filenames") + b"](" + text(b"camion_s_000148.png") * len(labels) + b"e"
    return b"\x80\x02}q\x01(" + entries + b"u."


def write_python(folder: Path) -> None:
    for number, name in enumerate((*TRAIN, *TEST)):
        (folder / name).write_bytes(published_batch(*content(number)))


def write_binary(folder: Path) -> None:
    for number, name in enumerate((*TRAIN, *TEST)):
        data, labels = content(number)
        records = [bytes([label]) + row.tobytes() for row, label in zip(data, labels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))


def write_sheets(folder: Path) -> None:
    for number, name in enumerate((*TRAIN, *TEST)):
        data, _ = content(number)
        pixels = data.reshape(ROWS, 3, 1024).transpose(0, 2, 1)  # a row of 1,024 RGB pixels for each image
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps([v for n in range(5) for v in content(n)[1]]))
    (folder / "test_lables.json").write_text(json.dumps(content(5)[1]))


WRITERS = {"python": write_python, "binary": write_binary, "sheets": write_sheets}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("sub", ["", "cifar-10-batches-py", "package"])
def test_every_form_gives_the_same_images(tmp_path: Path, form: str, sub: str) -> None:
    (tmp_path / sub).mkdir(exist_ok=True)
    WRITERS[form](tmp_path / sub)
    folder = find_cifar(tmp_path)
    assert folder == tmp_path / sub
    train, train_labels, test, test_labels = read_cifar10(folder)
    expected = np.concatenate([content(n)[0] for n in range(5)]).reshape(-1, 3, 32, 32)
    assert train.dtype == torch.uint8
    assert np.array_equal(train.numpy(), expected)
    assert train_labels.tolist() == [v for n in range(5) for v in content(n)[1]]
    assert np.array_equal(test.numpy(), content(5)[0].reshape(-1, 3, 32, 32))
    assert test_labels.tolist() == content(5)[1]


def test_the_hand_made_batch_is_what_numpy_reads() -> None:
    data, labels = content(0)
    batch = pickle.loads(published_batch(data, labels), encoding="bytes")
    assert np.array_equal(batch[b"data"], data)
    assert batch[b"labels"] == labels


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("keys", [bytes, str])
def test_batches_saved_again_by_python_3(tmp_path: Path, protocol: int, keys: type) -> None:
    data, labels = content(1)
    batch = {(name.encode() if keys is bytes else name): value for name, value in (("data", data), ("labels", labels))}
    (tmp_path / "batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    pixels, read = read_python_batch(tmp_path / "batch")
    assert np.array_equal(pixels.numpy(), data.reshape(-1, 3, 32, 32))
    assert read.tolist() == labels


class Call:
    """A pickle that calls something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile_batches(flag: Path) -> dict[str, bytes]:
    data, labels = content(0)
    good = {b"data": data, b"labels": labels}
    command = f"touch {flag}"
    return {
        "os.system": pickle.dumps(good | {b"more": Call(os.system, command)}, 4),
        "builtins.eval": pickle.dumps(good | {b"labels": Call(eval, f"open({str(flag)!r}, 'w')")}, 4),
        "builtins.getattr": pickle.dumps(Call(getattr, "", "join"), 4),
        "subprocess.Popen": pickle.dumps(Call(subprocess.Popen, ["touch", str(flag)]), 4),
        "a dotted name below an admitted module": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93.",
        "numpy.load": b"cnumpy\nload\n.",
        "nested pickle": pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, command))), 4),
        "persistent id": b"Psome/id\n.",
        "extension code": b"\x80\x02\x82\x01.",
    }


@pytest.mark.parametrize("kind", hostile_batches(Path("flag")))
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    flag = tmp_path / "flag"
    path = tmp_path / "data_batch_1"
    path.write_bytes(hostile_batches(flag)[kind])
    with pytest.raises(ValueError, match=r"^read_cifar10: .*data_batch_1' is .*; fetch it again\.$") as caught:
        read_python_batch(path)
    if "." in kind and " " not in kind:
        assert "is not a plain CIFAR batch (it asks for" in str(caught.value)
    assert not flag.exists()


def test_no_name_is_looked_up_while_a_batch_is_read(tmp_path: Path) -> None:
    """The interpreter reports each name that a pickle finds in a module; ours finds none, stand-ins are handed out."""
    found: list[object] = []
    listening = [True]

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        if event == "pickle.find_class" and listening[0]:
            found.append(arguments)

    write_python(tmp_path)
    sys.addaudithook(listen)
    read_python_batch(tmp_path / "data_batch_1")
    listening[0] = False
    assert found == []


def batch_with(**changes: Any) -> bytes:
    data, labels = content(0)
    return pickle.dumps({"data": data, "labels": labels} | changes, 4)


PICKLES = {
    "nothing": (b"", "is a damaged pickle"),
    "truncated": (published_batch(*content(0))[:-2000], "is "),
    "text": (b"<html>", "is "),
    "a list": (pickle.dumps([1, 2], 4), "no dict inside"),
    "no data": (pickle.dumps({"labels": [1]}, 4), 'no "data" array and "labels" list'),
    "labels missing": (pickle.dumps({"data": content(0)[0]}, 4), 'no "data" array and "labels" list'),
    "floats": (batch_with(data=content(0)[0].astype(np.float32)), "not an array of unsigned bytes with 3,072 columns"),
    "signed": (batch_with(data=content(0)[0].astype(np.int8)), "not an array of unsigned bytes"),
    "narrow": (batch_with(data=content(0)[0][:, :3071].copy()), "not an array of unsigned bytes"),
    "flat": (batch_with(data=content(0)[0].ravel()), "not an array of unsigned bytes"),
    "transposed": (batch_with(data=np.asfortranarray(content(0)[0])), "not an array of unsigned bytes"),
    "objects": (batch_with(data=np.array([[None] * 3072] * 4)), "not an array of unsigned bytes"),
    "labels short": (batch_with(labels=[1, 2, 3]), "has 3 labels for 4 images"),
    "label 10": (batch_with(labels=[1, 2, 3, 10]), "has the label 10 at row 3, which is not a number from 0 to 9"),
    "label -1": (batch_with(labels=[-1, 2, 3, 1]), "has the label -1 at row 0"),
    "label text": (batch_with(labels=["cat", 2, 3, 1]), "has the label 'cat' at row 0"),
    "label True": (batch_with(labels=[True, 2, 3, 1]), "has the label True at row 0"),
    "label float": (batch_with(labels=[1.0, 2, 3, 1]), "has the label 1.0 at row 0"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_damaged_python_batch_is_named(tmp_path: Path, kind: str) -> None:
    written, message = PICKLES[kind]
    path = tmp_path / "data_batch_1"
    path.write_bytes(written)
    with pytest.raises(ValueError, match=message) as caught:
        read_python_batch(path)
    assert str(path) in str(caught.value)


def test_a_shape_that_lies_about_its_bytes_is_refused(tmp_path: Path) -> None:
    data, labels = content(0)
    lie = published_batch(data, labels).replace(struct.pack("<i", ROWS) + b"J" + struct.pack("<i", 3072),
                                                struct.pack("<i", 2**30) + b"J" + struct.pack("<i", 3072))  # fmt: skip
    assert lie != published_batch(data, labels)
    (tmp_path / "batch").write_bytes(lie)
    with pytest.raises(ValueError, match="not an array of unsigned bytes"):
        read_python_batch(tmp_path / "batch")


@settings(deadline=None, max_examples=150)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_never_gets_past_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, at: float, value: int
) -> None:
    """Half of the changes fall among the first 2,000 bytes, where the structure is."""
    good = bytearray(published_batch(*content(0)))
    place = int(at * 2 * 2000) if at < 0.5 else int(at * len(good))
    good[min(place, len(good) - 1)] = value
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(bytes(good))
    message = ""
    try:
        pixels, labels = read_python_batch(path)
    except ValueError as error:
        message = str(error)
    if message:
        assert message.startswith("read_cifar10: ")
        assert str(path) in message
    else:
        assert pixels.shape == (ROWS, 3, 32, 32)
        assert 0 <= int(labels.min()) <= int(labels.max()) <= 9


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"", "has 0 bytes, which are not whole records of 3,073"),
        (bytes(3073 * 2 - 1), "has 6,145 bytes"),
        (bytes([10]) + bytes(3072), "has the label 10 at row 0"),
    ],
)
def test_a_damaged_binary_batch_is_named(tmp_path: Path, written: bytes, message: str) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(written)
    with pytest.raises(ValueError, match=message) as caught:
        read_binary_batch(path)
    assert str(path) in str(caught.value)


def damage_sheets(folder: Path, kind: str) -> str:
    """Break one file of a set of sheets; the file's name."""
    sheet, labels = folder / "data_batch_2.png", folder / "test_lables.json"
    if kind == "narrow":
        Image.new("RGB", (1023, ROWS)).save(sheet)
    elif kind == "short":
        Image.new("RGB", (1024, ROWS - 1)).save(sheet)
        return "train_lables.json"
    elif kind == "truncated":
        sheet.write_bytes(sheet.read_bytes()[:4000])
    elif kind == "empty":
        sheet.write_bytes(b"")
    elif kind == "text":
        sheet.write_text("not a picture")
    else:
        texts = {
            "no list": "{}",
            "no JSON": "[1, 2",
            "long": "[1,2,3,4,5]",
            "range": "[1,2,3,10]",
            "type": '["1",2,3,4]',
        }
        labels.write_text(texts.get(kind, "[" * 100_000))
        return labels.name
    return sheet.name


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "narrow": "is 1023 pixels wide instead of 1024",
        "short": "has 20 labels for 19 images",
        "truncated": "can't be decoded",
        "empty": "is empty",
        "text": "is not an image",
        "no list": "is not a list of labels",
        "no JSON": "is not JSON",
        "long": "has 5 labels for 4 images",
        "range": "has the label 10 at row 3",
        "type": "has the label '1' at row 0",
        "deep": "is not JSON",
    }.items(),
)
def test_a_damaged_sheet_or_label_file_is_named(tmp_path: Path, kind: str, message: str) -> None:
    write_sheets(tmp_path)
    name = damage_sheets(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"^read_cifar10: .*{name}' {message}.*; fetch it again\.$"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("form", "gone"), [("python", "data_batch_3"), ("binary", "test_batch.bin"), ("sheets", "train_lables.json")]
)
def test_missing_files_are_named(tmp_path: Path, form: str, gone: str) -> None:
    WRITERS[form](tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}' has no {gone}; add what is missing"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", ["data_batch_4", "test_batch"])
def test_a_batch_that_is_a_copy_of_another_one_is_named(tmp_path: Path, form: str, name: str) -> None:
    WRITERS[form](tmp_path)
    suffix = next(tmp_path.glob("data_batch_2*")).suffix
    shutil.copy(tmp_path / f"data_batch_2{suffix}", tmp_path / f"{name}{suffix}")
    with pytest.raises(ValueError, match=rf"{name}{suffix}' holds the same images as 'data_batch_2{suffix}'; fetch it"):
        read_cifar10(tmp_path)


def test_an_empty_folder_holds_no_batches(tmp_path: Path) -> None:
    assert find_cifar(tmp_path) is None
