"""CIFAR-10 in the four forms in which it is handed around: Python batches, binary batches, PNG sheets, tables."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hardmix.data.decode import UnreadableImageError, in_threads, read_picture, reason, shown

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
SUBFOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "package")

#: label files of the PNG sheets, spelled as they are published
SHEET_LABELS = ("train_lables.json", "test_lables.json")

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32

Part = tuple[Tensor, Tensor]  # (N, 3, 32, 32) uint8, (N,) long


def find_cifar(folder: Path) -> Path | None:
    """The folder (or its usual sub-folder) that holds at least one batch in any of the three forms."""
    for sub in SUBFOLDERS:
        if _suffix(folder / sub) is not None:
            return folder / sub
    return None


def read_cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels (N, 3, 32, 32) uint8, training labels (N,) long, test pixels, test labels.

    Raises:
        FileNotFoundError: a batch or a label file is missing; all missing ones are named.
        ValueError: a damaged file, another number of labels than images, a label outside 0..9, two batches of the same
            images.
    """
    suffix = _suffix(folder)
    assert suffix is not None, "find_cifar said there is a batch"
    needed = [name + suffix for name in (*TRAIN, *TEST)] + list(SHEET_LABELS if suffix == ".png" else ())
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"read_cifar10: {shown(folder)} has no {', '.join(missing)}; add what is missing.")
    paths = [folder / (name + suffix) for name in (*TRAIN, *TEST)]
    if suffix == ".png":
        pixels = list(in_threads(_sheet, paths))
        train_labels = _sheet_labels(folder / SHEET_LABELS[0], sum(map(len, pixels[:-1])))
        test_labels = _sheet_labels(folder / SHEET_LABELS[1], len(pixels[-1]))
    else:
        read: Callable[[Path], Part] = read_python_batch if suffix == "" else read_binary_batch
        parts = [read(path) for path in paths]
        pixels = [images for images, _ in parts]
        train_labels, test_labels = torch.cat([labels for _, labels in parts[:-1]]), parts[-1][1]
    for (path, images), (other, others) in combinations(zip(paths, pixels, strict=True), 2):
        if torch.equal(images, others):  # or training images would be for testing, too
            raise _damaged(other, f"holds the same images as {path.name!r}")
    return torch.cat(pixels[:-1]), train_labels, pixels[-1], test_labels


def read_binary_batch(path: Path) -> Part:
    """One binary batch: records of a label byte and 3,072 pixel bytes, channel by channel."""
    content = path.read_bytes()
    if not content or len(content) % (PIXELS + 1):
        raise _damaged(path, f"has {len(content):,} bytes, which are not whole records of {PIXELS + 1:,}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, PIXELS + 1)
    return records[:, 1:].reshape(-1, *SHAPE), _labels(path, records[:, 0].tolist(), len(records))


def read_python_batch(path: Path) -> Part:
    """One Python batch: a pickled dict with "data" (N, 3072) uint8 and "labels", a list of N numbers.

    The pickle is read without running any of NumPy's or anybody else's code: arrays become a record of their bytes, and
    every other global name is refused.
    """
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise _damaged(path, f"is not a plain CIFAR batch ({reason(error)})") from None
    except (
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise _damaged(path, f"is a damaged pickle ({type(error).__name__})") from None
    if not isinstance(batch, dict):
        raise _damaged(path, "is not a CIFAR batch (no dict inside)")
    data, labels = (batch.get(name.encode(), batch.get(name)) for name in ("data", "labels"))
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise _damaged(path, 'is not a CIFAR batch (no "data" array and "labels" list)')
    pixels = data.bytes_of_rows(PIXELS)
    if pixels is None:
        raise _damaged(path, f'has "data" that is not an array of unsigned bytes with {PIXELS:,} columns')
    return pixels.view(-1, *SHAPE), _labels(path, labels, len(pixels))


class _Type:
    """Stands in for numpy.dtype: remembers the code, "u1" for unsigned bytes."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands in for numpy.ndarray, and for the _reconstruct that makes it: remembers shape, type and bytes."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def bytes_of_rows(self, columns: int) -> Tensor | None:
        """(N, columns) uint8, or None where the state describes anything else."""
        match self.state:
            case (_, (int(rows), int(width)), _Type(code=b"u1" | "u1"), fortran, bytes(content)):
                if rows > 0 and width == columns and len(content) == rows * columns and not fortran:
                    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(rows, columns)
        return None


def _from_buffer(content: object, kind: object, shape: object, order: object) -> _Array:
    """Stands in for NumPy's function of that name, which protocol 5 calls."""
    array = _Array()
    array.state = (1, shape, kind, order == "F", bytes(content) if isinstance(content, bytearray) else content)
    return array


def _encoded(text: str, encoding: str) -> bytes:
    """Stands in for codecs.encode, by which Python 3 writes bytes in protocols up to 2."""
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Admits the names that a pickled array of bytes needs, and gives stand-ins for them."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _encoded,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
    }

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module + '.' + name!r}") from None


def _sheet(path: Path) -> Tensor:
    """A PNG sheet, 1,024 pixels wide, one 32x32 image a row."""
    try:
        sheet = read_picture(path, shown(path), size=None, channels=3)
    except UnreadableImageError as error:
        raise ValueError(f"read_cifar10: {error}; fetch it again.") from None
    if sheet.shape[2] != 1024:
        raise _damaged(path, f"is {sheet.shape[2]} pixels wide instead of 1024")
    return sheet.transpose(0, 1).reshape(-1, *SHAPE)


def _sheet_labels(path: Path, rows: int) -> Tensor:
    """The labels of all sheets of a split, in one JSON list."""
    try:
        labels = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise _damaged(path, "is not JSON") from None
    if not isinstance(labels, list):
        raise _damaged(path, "is not a list of labels")
    return _labels(path, labels, rows)


def _labels(path: Path, labels: list[Any], rows: int) -> Tensor:
    """(N,) long, after the count and every value have been looked at."""
    if len(labels) != rows:
        raise _damaged(path, f"has {len(labels):,} labels for {rows:,} images")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(CLASSES):
            raise _damaged(path, f"has the label {label!r:.40} at row {row}, which is not a number from 0 to 9")
    return torch.tensor(labels, dtype=torch.long)


def _suffix(folder: Path) -> str | None:
    """Which form a folder holds: "" (Python), ".bin" or ".png"; None if none."""
    for suffix in ("", ".bin", ".png"):
        if any((folder / (name + suffix)).is_file() for name in (*TRAIN, *TEST)):
            return suffix
    return None


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"read_cifar10: {shown(path)} {reason}; fetch it again.")
