"""IDX files made here byte by byte, good and damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from hardmix.data.idx import FILES, find_idx, read_idx, read_idx_set


def idx(values: torch.Tensor) -> bytes:
    return (
        bytes([0, 0, 8, values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + bytes(values.flatten().tolist())
    )


def images(n: int) -> torch.Tensor:
    return (torch.arange(n * 6 * 5) % 256).view(n, 6, 5)


def write_set(folder: Path, *, train: int = 7, test: int = 4, suffix: str = "", dotted: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(
        FILES, (images(train), torch.arange(train) % 10, images(test), torch.arange(test) % 10), strict=True
    ):
        content = idx(values)
        name = name.replace("-idx", ".idx") if dotted else name
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("sub", ["", "raw", "FashionMNIST/raw"])
def test_a_set_is_found_and_read(tmp_path: Path, suffix: str, dotted: bool, sub: str) -> None:
    write_set(tmp_path / sub, suffix=suffix, dotted=dotted)
    folder = find_idx(tmp_path)
    assert folder == tmp_path / sub
    train, train_labels, test, test_labels = read_idx_set(folder)
    assert train.dtype == torch.uint8
    assert train_labels.dtype == torch.long
    assert torch.equal(train, images(7)[:, None].to(torch.uint8))
    assert torch.equal(test, images(4)[:, None].to(torch.uint8))
    assert train_labels.tolist() == list(range(7))
    assert test_labels.tolist() == list(range(4))


def test_an_empty_folder_holds_no_set(tmp_path: Path) -> None:
    assert find_idx(tmp_path) is None


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / FILES[1]).unlink()
    (tmp_path / FILES[2]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.* has no {FILES[1]}, {FILES[2]} "):
        read_idx_set(tmp_path)


def test_a_label_count_that_differs_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / FILES[3]).write_bytes(idx(torch.arange(5)))
    with pytest.raises(ValueError, match=f"{FILES[3]}' has 5 labels for 4 images"):
        read_idx_set(tmp_path)


GOOD = idx(images(3))
LIE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1)
DAMAGE = {
    "empty": (b"", "starts with nothing instead of 00 00 08 03"),
    "a label file": (idx(torch.arange(3)), "starts with 00 00 08 01 instead of 00 00 08 03"),
    "floats": (b"\0\0\x0d\x03" + GOOD[4:], "starts with 00 00 0d 03"),
    "text": (b"<html>not found</html>", "starts with 3c 68 74 6d"),
    "short header": (GOOD[:9], "starts with 00 00 08 03"),
    "one byte missing": (GOOD[:-1], "says that it holds|holds fewer than the 90 values"),
    "one byte more": (GOOD + b"\0", "holds more than the 90 values"),
    "no images": (idx(torch.zeros(0, 6, 5)), "says that it holds 0x6x5 values"),
    "huge": (LIE, "says that it holds 4294967295x4294967295x4294967295 values"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_files_are_named(tmp_path: Path, kind: str, packed: bool) -> None:
    content, message = DAMAGE[kind]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)
    assert str(caught.value).startswith("read_idx: ")


@pytest.mark.parametrize("keep", [3, 12, 40, -5])
def test_a_truncated_gzip_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "images.gz"
    noise = torch.randint(0, 256, (30, 6, 5), generator=torch.Generator().manual_seed(0))
    path.write_bytes(gzip.compress(idx(noise))[:keep])
    with pytest.raises(ValueError, match=r"images.gz' is a damaged gzip file"):
        read_idx(path, ndim=3)


def test_a_flipped_bit_in_a_gzip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    content = bytearray(gzip.compress(GOOD))
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"images.gz' "):
        read_idx(path, ndim=3)


def test_a_gzip_that_promises_more_than_it_can_hold_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 60_000, 1_000, 1_000)
    path.write_bytes(gzip.compress(head))
    with pytest.raises(ValueError, match="says that it holds 60000x1000x1000 values"):
        read_idx(path, ndim=3)
