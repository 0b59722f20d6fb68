"""IDX files, the form in which MNIST and Fashion-MNIST are handed around, gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from hardmix.data.decode import reason, shown

#: the four files of a set, without ".gz"; some copies write "idx3" with a dot in front
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SUBFOLDERS = ("", "raw", "FashionMNIST/raw", "MNIST/raw")

#: deflate can't shrink anything further, so a header that promises more is lying
MAX_RATIO = 1032


def find_idx(folder: Path) -> Path | None:
    """The folder (or its usual sub-folder) that holds at least one of the four files."""
    for sub in SUBFOLDERS:
        if any(_existing(folder / sub, name) for name in FILES):
            return folder / sub
    return None


def read_idx_set(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels (N, 1, H, W) uint8, training labels (N,) long, test pixels, test labels.

    Raises:
        FileNotFoundError: one of the four files is missing; all missing ones are named.
        ValueError: a damaged file, or another number of labels than images.
    """
    found = {name: _existing(folder, name) for name in FILES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"read_idx_set: {shown(folder)} has no {', '.join(missing)} (.gz or not); add what is missing."
        )
    parts = []
    for name, path in found.items():
        assert path is not None
        values = read_idx(path, ndim=3 if "images" in name else 1)
        parts.append(values[:, None] if "images" in name else values.long())
        if len(parts) % 2 == 0 and parts[-1].shape[0] != parts[-2].shape[0]:
            raise ValueError(
                f"read_idx_set: {shown(path)} has {parts[-1].shape[0]} labels for {parts[-2].shape[0]} images; "
                "fetch both files again."
            )
    return parts[0], parts[1], parts[2], parts[3]


def read_idx(path: Path, *, ndim: int) -> Tensor:
    """The array of one IDX file as uint8.

    The file is two zero bytes, a type code (8: unsigned bytes, the only one accepted), the number of axes, each length
    as a big-endian 32-bit number, then exactly that many bytes. Nothing is allocated before the lengths fit the file.

    Args:
        ndim: the number of axes expected: 3 for images, 1 for labels.

    Raises:
        ValueError: another magic number, an empty array, fewer or more bytes than the header says, or a damaged gzip.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    room = path.stat().st_size * (MAX_RATIO if packed else 1)
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            head = file.read(4 + 4 * ndim)
            if len(head) < 4 + 4 * ndim or head[:4] != bytes((0, 0, 8, ndim)):
                raise _damaged(path, f"starts with {head[:4].hex(' ') or 'nothing'} instead of 00 00 08 {ndim:02x}")
            lengths = [int.from_bytes(head[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(ndim)]
            size = math.prod(lengths)
            if not 0 < size <= room:
                raise _damaged(path, f"says that it holds {'x'.join(map(str, lengths))} values")
            values = file.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, f"is a damaged gzip file ({reason(error)})") from None
    if len(values) != size:
        raise _damaged(
            path, f"holds {'fewer' if len(values) < size else 'more'} than the {size:,} values of its header"
        )
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(lengths)


def _existing(folder: Path, name: str) -> Path | None:
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (folder / (spelling + suffix)).is_file():
                return folder / (spelling + suffix)
    return None


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"read_idx: {shown(path)} {reason}; fetch it again.")
