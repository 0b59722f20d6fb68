"""Image data sets in Arrow form: parquet files, or a folder that Hugging Face `datasets` saved with `save_to_disk`."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hardmix.data.decode import UnreadableImageError, in_threads, read_picture, shown

SUBFOLDERS = ("", "data", "plain_text")
SPLITS = ("train", "test")

#: names of the label column, best first
LABEL_COLUMNS = ("label", "labels", "fine_label")

Part = tuple[Tensor, Tensor]  # (N, C, H, W) uint8, (N,) long


def find_tables(folder: Path) -> Path | None:
    """The folder (or its usual sub-folder) that holds parquet files of a split or a saved set, maybe not all of it."""
    for sub in SUBFOLDERS:
        place = folder / sub
        saved = any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))
        if saved or any(_files(place, split) for split in SPLITS):
            return place
    return None


def read_table_set(
    folder: Path, shape: tuple[int, int, int], class_names: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels (N, C, H, W) uint8, training labels (N,) long, test pixels, test labels.

    The image column is the one that holds encoded bytes; the label column is called as in `LABEL_COLUMNS`.

    Args:
        shape: what every image has to have; gray files are read for one channel.
        class_names: the set's own. Names in the files must be the same but for case, spaces and signs; where they are
            in another order, labels are counted as here.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: no file of a split, or one is missing that the saved split lists.
        ValueError: a damaged file, no such column, an image of another size, a label out of range, other classes.
    """
    found = {split: _files(folder, split) for split in SPLITS}
    for split, files in found.items():
        if not files:
            raise FileNotFoundError(
                f"read_table_set: {shown(folder)} has no {split}/data-*.arrow, {split}-*.parquet or {split}/*.parquet; "
                "add that split, or save a DatasetDict with 'train' and 'test'."
            )
    parts = [
        torch.cat(tensors)
        for files in found.values()
        for tensors in zip(*(_read(path, shape, class_names) for path in _listed(files)), strict=True)
    ]
    return parts[0], parts[1], parts[2], parts[3]


def _files(folder: Path, split: str) -> list[Path]:
    """The files of one split by their names, in order."""
    for pattern in (f"{split}/data-*.arrow", f"{split}-*.parquet", f"{split}.parquet", f"{split}/[!.]*.parquet"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _listed(files: list[Path]) -> list[Path]:
    """Those that a saved split lists: the files of an earlier save into the same folder may lie beside them."""
    folder = files[0].parent
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        listed = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return files
    missing = [path.name for path in listed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"read_table_set: {shown(folder)} has no {', '.join(missing)}, which its state.json lists; add what is "
            "missing, or save the data set again."
        )
    return listed or files


def _read(path: Path, shape: tuple[int, int, int], class_names: tuple[str, ...]) -> Part:
    where = f"read_table_set: {shown(path)}"
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{where} can only be read with pyarrow, which is missing; pip install pyarrow.") from None
    try:
        if path.suffix == ".arrow":
            with pa.OSFile(str(path)) as source:
                table = pa.ipc.open_stream(source).read_all()
        else:
            table = pq.ParquetFile(path).read()
        fields = [(field.name, field.type) for field in table.schema]  # a damaged name is no UTF-8
        table.validate(full=True)  # the bytes of a stream are taken as they are, wrong offsets too
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{where} can't be read ({os.strerror(error.errno)}); pass another path.") from None
        raise ValueError(f"{where} is damaged ({type(error).__name__}); fetch it again.") from None

    def holds_bytes(kind: Any) -> bool:
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            return False
        inner = kind.field("bytes").type  # null where all images are paths, which is told below
        return bool(pa.types.is_binary(inner) or pa.types.is_large_binary(inner) or pa.types.is_null(inner))

    image = next((column for column, (_, kind) in enumerate(fields) if holds_bytes(kind)), None)
    label = next((name for name in LABEL_COLUMNS if table.schema.get_field_index(name) >= 0), None)
    if image is None or label is None:
        raise ValueError(
            f"{where} has the columns {', '.join(repr(name) for name, _ in fields)}; "
            f"it needs one with encoded images and one called {' or '.join(map(repr, LABEL_COLUMNS))}."
        )
    contents = [row and row["bytes"] for row in table.column(image).to_pylist()]
    empty = next((row for row, content in enumerate(contents) if not content), None)
    if empty is not None:
        raise ValueError(f"{where} has no image bytes at row {empty}; save the data set with its images inside.")
    number = _numbers(where, _names(table.schema.metadata, label), class_names)
    labels = table.column(label).to_pylist()
    for row, value in enumerate(labels):
        if type(value) is not int or not 0 <= value < len(class_names):
            raise ValueError(
                f"{where} has the label {value!r:.40} at row {row}; "
                f"pass a set with labels from 0 to {len(class_names) - 1}."
            )

    def decode(row: int) -> Tensor:
        try:
            pixels = read_picture(
                io.BytesIO(contents[row]), f"row {row} of {shown(path)}", size=None, channels=shape[0]
            )
        except UnreadableImageError as error:
            raise ValueError(f"read_table_set: {error}; fetch the file again.") from None
        if tuple(pixels.shape) != shape:
            raise ValueError(f"{where} has an image of {tuple(pixels.shape)} at row {row}; this set's are {shape}.")
        return pixels

    images = list(in_threads(decode, range(len(contents))))
    pixels = torch.stack(images) if images else torch.empty((0, *shape), dtype=torch.uint8)  # a shard may be empty
    return pixels, torch.tensor([number[value] for value in labels], dtype=torch.long)


def _names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Class names from the metadata that `datasets` writes, or None."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(names) if all(isinstance(name, str) for name in names) else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _numbers(where: str, names: tuple[str, ...] | None, class_names: tuple[str, ...]) -> list[int]:
    """What the set calls each class that a file with these names counts."""
    same = list(range(len(class_names)))
    if names is None or names == tuple(map(str, same)):  # `datasets` calls classes by their numbers if it isn't told
        return same
    if len(names) != len(class_names):
        raise ValueError(f"{where} has {len(names)} classes instead of {len(class_names)}; pass another path.")
    wanted = [_plain(name) for name in class_names]
    given = [_plain(name) for name in names]
    if sorted(given) != sorted(wanted):
        listed = ", ".join(f"{name!r:.40}" for name in names)
        raise ValueError(
            f"{where} has the classes {listed} instead of {', '.join(map(repr, class_names))}; "
            "rename them, or pass another path."
        )
    return [wanted.index(plain) for plain in given]


def _plain(name: str) -> str:
    """A class name without what published copies write differently: "T - shirt / top" and "T-shirt/top"."""
    return "".join(sign for sign in name.casefold() if sign.isalnum())
