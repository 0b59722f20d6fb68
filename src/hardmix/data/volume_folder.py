"""Your own volumes with a number each: NIfTI and NumPy files with a table of labels, or one .npz file with both.

A NIfTI volume is turned upright first: its axes are foot to head (D), back to front (H) and left to right (W),
whatever order the scanner wrote. NumPy arrays stay as they are.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import in_threads, reason, shown
from hardmix.data.numbers import Numbers
from hardmix.data.own_splits import check_groups, check_split, find_split, groups_of_array, is_split, split_of_array
from hardmix.data.picture_folder import checked, folder_and_table
from hardmix.data.tables import MIN_ROWS, _check_names, _labels, _listed, _parquet, _text, group_column, split_column

NIFTI = (".nii", ".nii.gz")
SUFFIXES = (*NIFTI, ".npz", ".npy")
#: names of the column with the files, best first
FILE_COLUMNS = ("file", "filename", "file_name", "path", "volume")
#: voxels of one file, and of a whole set in memory: 1 GiB and 4 GiB as float32. A header can promise anything.
MOST_IN_FILE, MOST = 2**28, 2**30
#: files that are read at a time, between two looks at the sum
TOGETHER = 32
#: numpy parses headers with `ast`, which fails now and then when two threads of Python 3.11 do that at once
HEADERS = Lock()

SHRINK = "`--set data.image_size=N`"


class Scan(NamedTuple):
    """A NIfTI volume, upright.

    Attributes:
        voxels: (C, D, H, W) uint8 or float32; D foot to head, H back to front, W left to right.
        affine: (4, 4) float64, from the voxel (w, h, d) to millimetres (x, y, z), which grow to the right, the front
            and the head.
    """

    voxels: Tensor
    affine: Tensor


def read_volume_table(
    folder: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    target: str,
    file_column: str = "",
    group: str = "",
    size: int = 0,
) -> Numbers:
    """The volumes that a table names, with the number that it gives for each.

    The table has a header, a column with the path of each volume below `folder`, a column with the numbers and, if it
    likes, a column "split" with train, val (valid, validation) or test in every row; other columns are passed over.
    Volumes are .nii, .nii.gz (needs nibabel), .npy, or .npz with an array "volume" or with one array only, and have
    three axes (D, H, W), or four: channels first, in NIfTI last.

    Args:
        folder: what the paths start from.
        table: CSV, TSV or Parquet, see `load_table`; the path, or where there is none, the name in `folder`.
        target: the column to predict.
        file_column: the column with the paths; "" takes one called file, filename, file_name, path or volume, or the
            only one that is left.
        group: the column that says which volumes belong together, such as a patient; "" for none.
        size: N > 0 resamples every volume to N x N x N voxels, see `resample`; 0 keeps them, all of one shape then.
    Returns:
        Inputs (N, C, D, H, W): uint8 if all files are and float32 otherwise; ids are the paths of the table.

    Raises:
        FileNotFoundError: no such folder or table, or files that are missing.
        ValueError: a damaged table or volume, NaN, fewer than three axes, a path that leaves the folder, a file in two
            rows, volumes of different shapes, labels that are no finite numbers or all the same, fewer than 10 rows, or
            fewer than two for training or testing in the column "split".
        ImportError: nibabel or pyarrow is needed and missing.
    """
    who = "read_volume_table"
    _check.integer(who, "size", size, 0)
    root, file = folder_and_table(who, from_home(folder), from_home(table))
    where = f"{who}: {shown(file)}"
    sheet = _parquet(where, file) if file.suffix.lower() in (".parquet", ".pq") else _text(where, file)
    _check_names(where, sheet.names, target)
    groups = group_column(where, sheet, group, target)
    others = [name for name in sheet.names if name != group]
    column = sheet.names.index(_file_column(where, others, target, file_column))
    if len(sheet.rows) < MIN_ROWS:
        raise ValueError(f"{where} has {len(sheet.rows)} rows; pass a table with at least {MIN_ROWS}.")
    labels, split = _labels(where, sheet, target), split_column(where, sheet)
    check_split(where, split)
    check_groups(where, groups, split)
    names = [row[column] for row in sheet.rows]
    inputs = _read_all(who, _paths(where, root, names, sheet.numbers), size)
    numbers = Numbers(inputs, labels, "volumes", target, "volumes", "yours", str(file), names, split)
    return checked(who, numbers._replace(groups=groups))


def read_volume_npz(path: str | os.PathLike[str], *, target: str = "y", group: str = "", size: int = 0) -> Numbers:
    """One .npz file with the array x, (N, D, H, W) or (N, C, D, H, W), and the numbers (N,) in the array `target`.

    An array "split" (N,), in any case, of 0, 1 and 2 says which volumes are for training, validation and testing.

    Args:
        path: the file, as `numpy.savez` or `numpy.savez_compressed` writes it.
        target: the name of the array with the numbers.
        group: the name of an array (N,) that says which volumes belong together; "" for none.
        size: N > 0 resamples every volume to N x N x N voxels, see `resample`; 0 keeps them.
    Returns:
        Inputs (N, C, D, H, W): uint8 stays, anything else becomes float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, arrays that are missing, pickled or of other shapes, NaN or infinity, labels that
            are all the same, or fewer than 10 volumes.
    """
    who = "read_volume_npz"
    _check.integer(who, "size", size, 0)
    file = from_home(path)
    if not file.is_file():
        raise FileNotFoundError(f"{who}: path is {shown(file)}, which is no file; pass an .npz file.")
    where = f"{who}: {shown(file)}"
    needed = ("x", target, *([group] if group else []))
    arrays = _open_npz(where, file, needed, most=MOST)
    missing = [name for name in needed if name not in arrays]
    if missing:
        held = _listed(map(repr, arrays), 20) or "nothing"
        raise ValueError(
            f"{where} has no array {missing[0]!r} but {held}; save x (N, D, H, W) and {target} (N,) in it."
        )
    x, y = _numbers(f"{where} (array 'x')", arrays["x"]), arrays[target]
    if y.dtype.kind not in "biuf" or y.ndim != 1 or x.ndim not in (4, 5) or len(x) != len(y) or not x.numel():
        raise ValueError(
            f"{where} has x {tuple(x.shape)} and {target} {y.shape} of {y.dtype}; "
            f"save volumes (N, D, H, W) or (N, C, D, H, W) as x and one number each as {target}."
        )
    if len(x) < MIN_ROWS:
        raise ValueError(f"{where} has {len(x)} volumes; pass at least {MIN_ROWS}.")
    given = find_split(where, (name for name in arrays if name not in (target, group)))
    split = None if given is None else split_of_array(where, arrays[given], len(x), "volumes")
    groups = groups_of_array(where, arrays[group], len(x), group) if group else []
    check_groups(where, groups, split)
    labels = torch.from_numpy(y.astype(np.float64))
    for name, values in (("x", x), (target, labels)):
        if values.is_floating_point():
            rows = (~values.isfinite()).view(len(x), -1).any(1).nonzero().flatten().tolist()
            if rows:
                raise ValueError(
                    f"{where} holds NaN or infinity in {name} of volume {_listed(map(str, rows), 5)}; "
                    "repair or leave out these volumes."
                )
    x = x if x.ndim == 5 else x[:, None]
    if size:
        x = torch.stack([resample(volume, size) for volume in x])
    numbers = Numbers(x, labels, "volumes", target, "volumes", "yours", str(file), split=split, groups=groups)
    return checked(who, numbers)


def read_nifti(path: Path, who: str = "read_nifti") -> Scan:
    """A .nii or .nii.gz file, its axes permuted and mirrored (never resampled) to the nearest upright order.

    Its scale (`scl_slope`, `scl_inter`) is applied. A fourth axis counts as channels.

    Args:
        who: whom messages speak for.
    Raises:
        ImportError: nibabel is missing. ValueError: a damaged file, more or fewer axes, values that are no real
            numbers, or more than 2^28 of them.
    """
    where = f"{who}: {shown(path)}"
    try:
        import nibabel
    except ImportError:
        raise ImportError(
            f"{where} can only be read with nibabel, which is missing; pip install nibabel, or save it as .npy."
        ) from None
    try:
        image: Any = nibabel.load(path)
        shape = tuple(image.shape)
        if math.prod(shape) <= MOST_IN_FILE:
            image = nibabel.as_closest_canonical(image)
            values = np.asanyarray(image.dataobj)
            affine = torch.tensor(np.asarray(image.affine), dtype=torch.float64)
    except Exception as error:  # a decoder fed with a damaged file may raise anything
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {reason(error)}); fetch it again.") from None
    if math.prod(shape) > MOST_IN_FILE:
        raise _too_large(where, shape)
    while values.ndim > 4 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim != 4:
        raise ValueError(f"{where} has the shape {shape}; pass a volume with 3 axes, or 4 with the channels last.")
    return Scan(_numbers(where, values.transpose(3, 2, 1, 0)), affine)


def resample(volume: Tensor, size: int) -> Tensor:
    """(C, D, H, W) resampled to (C, size, size, size): trilinear, and averaged where it shrinks, so nothing aliases.

    Each axis is stretched on its own. uint8 is rounded; floats come back as float32.
    """
    values = volume.float()
    channels, depth = values.shape[:2]
    # torch averages in two dimensions only; the third is one of two in a second step, whose other one keeps its length
    for shape, sides in (
        (values.shape, (size, size)),
        ((channels, 1, depth, size * size), (size, size * size)),
    ):
        values = F.interpolate(values.reshape(shape), sides, mode="bilinear", antialias=True)
    values = values.view(channels, size, size, size)
    return values.round_().clamp_(0, 255).to(torch.uint8) if volume.dtype == torch.uint8 else values


def _file_column(where: str, names: Sequence[str], target: str, given: str) -> str:
    others = [name for name in names if name != target and not is_split(name)]
    if given:
        if given not in others:
            near = _check.did_you_mean(given, others)
            raise ValueError(
                f"{where} has no column of files {given!r}; pass one of {_listed(map(repr, others), 20)}{near}."
            )
        return given
    found = [name for wanted in FILE_COLUMNS for name in others if name.lower() == wanted]
    if not found and len(others) == 1:
        found = others
    if not found:
        raise ValueError(
            f"{where} has no column called {', '.join(FILE_COLUMNS[:-1])} or {FILE_COLUMNS[-1]} but "
            f"{_listed(map(repr, names), 20)}; pass the one with the files as file_column."
        )
    return found[0]


def _paths(where: str, root: Path, names: list[str], numbers: list[int]) -> list[Path]:
    """The files of the table, none of them outside of `root`; links are followed before that is asked."""
    paths: list[Path] = []
    missing: list[str] = []
    seen: dict[Path, int] = {}
    top = root.resolve()
    for name, number in zip(names, numbers, strict=True):
        try:
            path = (root / name).resolve()
            there = path.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, NUL, links in a circle
            raise ValueError(f"{where} has no path but {name!r:.80} in row {number}; repair it.") from None
        if not path.is_relative_to(top):
            raise ValueError(
                f"{where} names {name!r:.200} in row {number}, which is outside of {shown(root)}; "
                "put the volume into that folder."
            )
        if not name.lower().endswith(SUFFIXES):
            raise ValueError(
                f"{where} names {name!r:.200} in row {number}; pass volumes as {', '.join(SUFFIXES[:-1])} "
                f"or {SUFFIXES[-1]}."
            )
        first = seen.setdefault(path, number)
        if first != number:
            raise ValueError(
                f"{where} has the file {name!r:.200} in row {first} and in row {number}; keep one of them."
            )
        if not there:
            missing.append(f"{name!r:.200} (row {number})")
        paths.append(path)
    if missing:
        raise FileNotFoundError(
            f"{where} names {len(missing)} files that are not in {shown(root)}: {_listed(missing, 5)}; "
            "add them, or delete their rows."
        )
    return paths


def _read_all(who: str, paths: list[Path], size: int) -> Tensor:
    """(N, C, D, H, W) of all files."""

    def read(path: Path) -> Tensor:
        volume = _read(who, path)
        return resample(volume, size) if size else volume

    volumes: list[Tensor] = []
    for start in range(0, len(paths), TOGETHER):
        volumes += in_threads(read, paths[start : start + TOGETHER])
        if sum(volume.numel() for volume in volumes) > MOST:
            raise ValueError(
                f"{who}: the first {len(volumes)} of {len(paths)} volumes have more than {MOST:,} voxels together, "
                f"too many for the memory; shrink them with {SHRINK}."
            )
    shapes = Counter(tuple(volume.shape) for volume in volumes)
    if len(shapes) > 1:
        listed = _listed((f"{'x'.join(map(str, shape))} ({n})" for shape, n in shapes.most_common()), 10)
        advice = (
            f"resample them with {SHRINK}"
            if len({shape[0] for shape in shapes}) == 1
            else "pass volumes with equally many channels"
        )
        raise ValueError(f"{who}: the {len(paths)} volumes have {len(shapes)} shapes, CxDxHxW: {listed}; {advice}.")
    if any(volume.dtype != torch.uint8 for volume in volumes):
        volumes = [volume.float() for volume in volumes]
    return torch.stack(volumes)


def _read(who: str, path: Path) -> Tensor:
    """(C, D, H, W) uint8 or float32, finite."""
    where = f"{who}: {shown(path)}"
    if path.name.lower().endswith(NIFTI):
        volume = read_nifti(path, who).voxels
    else:
        volume = _numbers(where, _array(where, path))
        if volume.ndim not in (3, 4):
            raise ValueError(
                f"{where} has the shape {tuple(volume.shape)}; pass a volume with 3 axes, or 4 with the channels first."
            )
        volume = volume if volume.ndim == 4 else volume[None]
    if not volume.numel():
        raise ValueError(f"{where} has the shape {tuple(volume.shape)} and is empty; delete its row.")
    if volume.is_floating_point():
        wrong = int((~volume.isfinite()).sum())
        if wrong:
            raise ValueError(
                f"{where} holds NaN, infinity or a number beyond float32 in {wrong:,} of {volume.numel():,} voxels; "
                "repair it, or delete its row."
            )
    return volume


def _array(where: str, path: Path) -> np.ndarray:
    """The array of a .npy file, or the one of an .npz file that is the volume."""
    if path.suffix.lower() == ".npy":
        try:
            # mapped, since a header may promise more than the file holds, which is noticed before memory is asked for
            with HEADERS:
                values = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a decoder fed with a damaged file may raise anything
            raise ValueError(f"{where} can't be read ({reason(error)}); save it with numpy.save.") from None
        if values.size > MOST_IN_FILE:
            raise _too_large(where, values.shape)
        return values
    arrays = _open_npz(where, path, ("volume",), most=MOST_IN_FILE)
    if "volume" in arrays:
        return arrays["volume"]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    held = _listed(map(repr, arrays), 20) or "nothing"
    raise ValueError(f"{where} holds {held}; save the volume as its only array, or as 'volume'.")


def _open_npz(where: str, path: Path, wanted: Sequence[str], *, most: int) -> dict[str, np.ndarray]:
    """Arrays by name, nothing unpickled. Those that nobody wants are left unread (empty) unless there is only one."""
    try:
        # opened here, since numpy leaves a file open that it can't read
        with HEADERS, path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            names = list(file.files)
            read = [name for name in names if name in wanted or is_split(name) or len(names) == 1]
            # A zip says how long each array is once unpacked, and no more than that is unpacked; 8 bytes for a float64.
            large = any(
                entry.file_size > 8 * most and entry.filename.removesuffix(".npy") in read
                for entry in file.zip.infolist()
            )
            arrays = {} if large else {name: file[name] if name in read else np.empty(0) for name in names}
    except Exception as error:  # a decoder fed with a damaged file may raise anything
        raise ValueError(f"{where} can't be read ({reason(error)}); save it with numpy.savez.") from None
    if large:
        raise ValueError(f"{where} has more than {most:,} voxels; shrink it.")
    return arrays


def _numbers(where: str, values: np.ndarray) -> Tensor:
    """An array in memory as uint8 if it is that already, and as float32 otherwise."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where} holds values of type {str(values.dtype)!r:.60}; save real numbers.")
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which is asked for later
        kept = values if values.dtype == np.uint8 else values.astype(np.float32)
    return torch.from_numpy(np.require(kept, requirements=["C", "W", "O"]))


def _too_large(where: str, shape: Sequence[int]) -> ValueError:
    return ValueError(f"{where} has {'x'.join(map(str, shape))} voxels, more than {MOST_IN_FILE:,}; shrink it.")
