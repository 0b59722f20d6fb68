"""Image data sets in Arrow form: parquet files, or a folder that Hugging Face `datasets` saved with `save_to_disk`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardmix.data.decode import UnreadableImageError, in_threads, read_picture, shown

SUBFOLDERS = ("", "data", "plain_text")

#: names of the label column, best first
LABEL_COLUMNS = ("label", "labels", "fine_label")


class Table(NamedTuple):
    """One split: the encoded images, their labels, and the class names if the files carry them."""

    images: list[bytes]
    labels: list[Any]
    class_names: tuple[str, ...] | None
    path: Path


def find_tables(folder: Path) -> Path | None:
    """The folder (or its usual sub-folder) that holds parquet files or a saved set, for training and for testing."""
    for sub in SUBFOLDERS:
        if all(_files(folder / sub, split) for split in ("train", "test")):
            return folder / sub
    return None


def read_table_set(
    folder: Path, shape: tuple[int, int, int], class_names: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels (N, C, H, W) uint8, training labels (N,) long, test pixels, test labels.

    The image column is the one that holds encoded bytes; the label column is called as in `LABEL_COLUMNS`.

    Args:
        shape: what every image has to have; gray files are read for one channel.
        class_names: the set's own; names in the files must be as many. Where they are the same in another order, labels
            are counted as here.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: a damaged file, no such column, an image of another size, a label out of range.
    """
    train, train_labels = _pixels(_read(folder, "train"), shape, class_names)
    test, test_labels = _pixels(_read(folder, "test"), shape, class_names)
    return train, train_labels, test, test_labels


def _files(folder: Path, split: str) -> list[Path]:
    """The files of one split, in order."""
    saved = sorted(folder.glob(f"{split}/data-*.arrow"))
    return saved or sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))


def _read(folder: Path, split: str) -> Table:
    files = _files(folder, split)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(
            f"read_table_set: {shown(files[0])} can only be read with pyarrow, which is missing; pip install pyarrow."
        ) from None
    images: list[bytes] = []
    labels: list[Any] = []
    names = None
    for path in files:
        try:
            if path.suffix == ".arrow":
                with pa.OSFile(str(path)) as source:
                    table = pa.ipc.open_stream(source).read_all()
            else:
                table = pq.ParquetFile(path).read()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(
                f"read_table_set: {shown(path)} is damaged ({type(error).__name__}); fetch it again."
            ) from None
        types = {field.name: field.type for field in table.schema}
        image = next((n for n, t in types.items() if pa.types.is_struct(t) and t.get_field_index("bytes") >= 0), None)
        label = next((n for n in LABEL_COLUMNS if n in types), None)
        if image is None or label is None:
            raise ValueError(
                f"read_table_set: {shown(path)} has the columns {', '.join(map(repr, types))}; "
                f"it needs one with encoded images and one called {' or '.join(map(repr, LABEL_COLUMNS))}."
            )
        rows = [row and row["bytes"] for row in table.column(image).to_pylist()]
        empty = next((number for number, content in enumerate(rows) if not content), None)
        if empty is not None:
            raise ValueError(
                f"read_table_set: {shown(path)} has no image bytes at row {empty}; "
                "save the data set with its images inside."
            )
        images += rows
        labels += table.column(label).to_pylist()
        names = _names(table.schema.metadata, label)
    return Table(images, labels, names, files[0].parent / split)


def _names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Class names from the metadata that `datasets` writes, or None."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(names) if all(isinstance(name, str) for name in names) else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _pixels(table: Table, shape: tuple[int, int, int], class_names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    where = f"read_table_set: {shown(table.path)}"
    if table.class_names is not None and len(table.class_names) != len(class_names):
        raise ValueError(
            f"{where} has {len(table.class_names)} classes instead of {len(class_names)}; pass another path."
        )
    number = list(range(len(class_names)))
    if table.class_names is not None and sorted(table.class_names) == sorted(class_names):
        number = [
            class_names.index(name) for name in table.class_names
        ]  # a file may count its classes in another order
    for row, label in enumerate(table.labels):
        if type(label) is not int or not 0 <= label < len(class_names):
            raise ValueError(
                f"{where} has the label {label!r:.40} at row {row}; "
                f"pass a set with labels from 0 to {len(class_names) - 1}."
            )

    def decode(row: int) -> Tensor:
        name = f"row {row} of {shown(table.path)}"
        try:
            pixels = read_picture(io.BytesIO(table.images[row]), name, size=None, channels=shape[0])
        except UnreadableImageError as error:
            raise ValueError(f"read_table_set: {error}; fetch the file again.") from None
        if tuple(pixels.shape) != shape:
            raise ValueError(f"{where} has an image of {tuple(pixels.shape)} at row {row}; this set's are {shape}.")
        return pixels

    pixels = torch.stack(list(in_threads(decode, range(len(table.images)))))
    return pixels, torch.tensor([number[label] for label in table.labels])
