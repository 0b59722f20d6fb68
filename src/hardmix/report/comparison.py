"""Reading comparison.json: methods, their values per seed, and what may be concluded from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hardmix.metrics import PairedTest, holm, mean_interval, paired_test
from hardmix.report.folder import RunFolder, read_json, read_run
from hardmix.report.text import dig, method_title, metric, number, step_seconds, telling, visible

#: methods from which on they are ranked
MIN_RANKED = 3


class Cell(NamedTuple):
    """One metric of one method: mean over seeds, 95 % interval where there is one, and the values."""

    mean: float | None
    low: float | None
    high: float | None
    values: list[float]


class Versus(NamedTuple):
    """A method against the first one; `adjusted` is p after Holm's correction where several methods are compared."""

    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    adjusted: float | None

    @property
    def includes_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high

    def verdict(self, lower_is_better: bool) -> str:
        """'better' or 'worse', 'undecided' (the interval includes 0, or Holm's p is not below 0.05), 'untested' (no
        interval), 'unknown' (no value)."""
        if self.difference is None:
            return "unknown"
        if self.low is None or self.high is None:
            return "untested"
        if self.includes_zero or (self.adjusted is not None and self.adjusted >= 0.05):
            return "undecided"
        return "better" if (self.difference < 0) == lower_is_better else "worse"


@dataclass(frozen=True)
class Row:
    """One run of the comparison, as comparison.json tells it, with its folder where that can be read."""

    name: str
    seed: Any
    place: str
    test: dict[str, float | None]
    seconds: dict[str, float | None]
    memory_mb: float | None
    folder: RunFolder | None


@dataclass(frozen=True)
class Method:
    """One line of the table. `place` counts from 0; the first method is what the others are compared with."""

    place: int
    name: str
    title: str
    policy: Any
    objective: Any
    cells: dict[str, Cell]
    versus: dict[str, Versus]
    rows: list[Row]

    def mean(self, key: str) -> float | None:
        return self.cells[key].mean

    def seconds(self, key: str) -> float | None:
        """Mean over the runs of a time such as 'per_step'."""
        return _mean([row.seconds.get(key) for row in self.rows])

    def memory_mb(self) -> float | None:
        return _mean([row.memory_mb for row in self.rows])


@dataclass(frozen=True)
class Best:
    """The method with the best mean of a metric, and whether it is clearly better than each of the others."""

    place: int
    clear: bool


@dataclass(frozen=True)
class Twin:
    """Two methods that differ in their objective alone, and `name` against `base`, metric by metric."""

    name: str
    base: str
    versus: dict[str, Versus]


@dataclass(frozen=True)
class Comparison:
    """A comparison folder, read."""

    folder: Path
    title: str
    command: str
    metrics: list[str]
    seeds: list[Any]
    methods: list[Method]
    lower: frozenset[str]
    versions: dict[str, Any]
    best: dict[str, Best | None]
    twins: list[Twin]
    notes: list[str] = field(default_factory=list)
    #: what the recipes differ in that makes a comparison doubtful
    cautions: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for method in self.methods for row in method.rows]

    @property
    def ranks(self) -> list[int | None]:
        """The place of each method by its mean of the first metric; none where they aren't ranked."""
        if not self.metrics or metric(key := self.metrics[0]).neutral:
            return [None] * len(self.methods)
        return ranked([method.mean(key) for method in self.methods], key in self.lower)

    def state(self, versus: Versus, key: str) -> str:
        """The verdict on one metric; 'different' where neither more nor less of it is better."""
        verdict = versus.verdict(key in self.lower)
        return "different" if metric(key).neutral and verdict in ("better", "worse") else verdict


def read_comparison(folder: Path) -> Comparison:
    """Read `folder`/comparison.json and the run folders it names.

    Only folders inside `folder` are opened. What is missing or damaged becomes a note.

    Raises:
        ValueError: there is no readable comparison.json.
    """
    notes: list[str] = []
    stored = read_json(folder / "comparison.json", notes)
    if notes:
        raise ValueError(
            f"report: {visible(folder)} holds no readable comparison.json ({notes[0].rstrip('.')}); "
            "pass the folder that `hardmix compare --out` wrote."
        )
    rows = [_row(entry, folder, notes) for entry in _objects(stored.get("runs"))]
    metrics = [str(key) for key in _items(stored.get("metrics"))] or _metrics_of(rows)
    read = [row.folder.summary for row in rows if row.folder is not None]
    metrics = [key for key in dict.fromkeys(metrics) if all(telling(key, summary) for summary in read)]
    told = stored.get("lower_is_better")
    lower = {str(key) for key in _items(told)}
    if told is None:
        lower = {key for key in metrics if metric(key).lower_is_better}
    expected = _items(stored.get("seeds"))
    methods = _methods(_objects(stored.get("table")), rows, metrics, one_seed=len(expected) == 1)
    for method in methods:
        if len(method.rows) < len(expected):
            notes.append(f"{visible(method.name)} has {len(method.rows)} of {len(expected)} runs.")
    return Comparison(
        folder=folder,
        title=str(stored.get("title") or "Comparison"),
        command=str(stored.get("command") or ""),
        metrics=metrics,
        seeds=expected,
        methods=methods,
        lower=frozenset(lower),
        versions=stored["versions"] if isinstance(stored.get("versions"), dict) else {},
        best={key: None if metric(key).neutral else _best(methods, key, key in lower) for key in metrics},
        twins=_twins(_objects(stored.get("twins")), metrics),
        notes=notes,
        cautions=[str(caution) for caution in _items(stored.get("cautions"))],
    )


def ranked(means: Sequence[float | None], lower: bool) -> list[int | None]:
    """1 for the best mean, ties alike and the place after them left out; one that is unknown (None, NaN) has no rank.

    Of fewer than three none has one: which of two is better is what the difference between them says.
    """
    if len(means) < MIN_RANKED:
        return [None] * len(means)
    goods = [None if mean is None or mean != mean else -mean if lower else mean for mean in means]
    return [None if own is None else 1 + sum(good is not None and good > own for good in goods) for own in goods]


def paired(first: Method, second: Method, key: str) -> PairedTest | None:
    """first - second over the seeds that both have, or None where they share none."""
    a, b = ({repr(row.seed): row.test.get(key) for row in method.rows} for method in (first, second))
    both = [(x, b[seed]) for seed, x in a.items() if x is not None and b.get(seed) is not None]
    return paired_test([x for x, _ in both], [y for _, y in both if y is not None]) if both else None


def _best(methods: list[Method], key: str, lower: bool) -> Best | None:
    known = [(mean, m.place) for m in methods if (mean := m.mean(key)) is not None]
    if len(known) < 2:
        return None
    best = min(known) if lower else max(known, key=lambda pair: (pair[0], -pair[1]))
    clear = len(known) == len(methods)
    for method in methods:
        if method.place != best[1]:
            test = paired(methods[best[1]], method, key)
            clear &= test is not None and test.low is not None and test.high is not None
            clear = clear and test is not None and not (test.low or 0.0) <= 0.0 <= (test.high or 0.0)
    # What is said of the first method goes by Holm's p; a best that is clear must not be called undecided beside it.
    told = [methods[best[1]]] if best[1] else methods[1:]
    clear &= all(m.versus[key].verdict(lower) == ("better" if best[1] else "worse") for m in told)
    return Best(best[1], clear)


def _methods(table: list[dict[str, Any]], rows: list[Row], metrics: list[str], *, one_seed: bool) -> list[Method]:
    names = [str(entry.get("name")) for entry in table]
    # Runs that the table leaves out are shown all the same: a run that lost or broke must not vanish.
    table = table + [{"name": name} for name in dict.fromkeys(row.name for row in rows) if name not in names]
    methods = []
    for place, entry in enumerate(table):
        name = str(entry.get("name"))
        own = [row for row in rows if row.name == name]
        cells = {key: _cell(dig(entry, "metrics", key), own, key) for key in metrics}
        versus = {key: _versus(dig(entry, "versus_first", key)) for key in metrics} if place else {}
        policy, objective = entry.get("policy"), entry.get("objective")
        title = method_title(policy, objective) if "policy" in entry or "objective" in entry else ""
        method = Method(place, name, title, policy, objective, cells, versus, own)
        methods.append(method)
        if place and one_seed:  # nothing is tested then, but there is a difference
            versus |= {key: _untested(method, methods[0], key) for key in metrics}
    _correct([method.versus for method in methods if method.versus], metrics)
    return methods


def _twins(stored: list[dict[str, Any]], metrics: list[str]) -> list[Twin]:
    twins = []
    for entry in stored:
        versus = {key: _versus(dig(entry, "tests", key)) for key in metrics}
        twins.append(Twin(str(entry.get("name")), str(entry.get("base")), versus))
    _correct([twin.versus for twin in twins], metrics)
    return twins


def _correct(tests: list[dict[str, Versus]], metrics: list[str]) -> None:
    """Write Holm's p into several tests of one kind."""
    if len(tests) > 1:
        for key in metrics:
            for test, adjusted in zip(tests, holm([test[key].p for test in tests]), strict=True):
                test[key] = test[key]._replace(adjusted=adjusted)


def _cell(stored: Any, rows: list[Row], key: str) -> Cell:
    if isinstance(stored, dict):
        values = [v for v in map(number, _items(stored.get("values"))) if v is not None]
        return Cell(number(stored.get("mean")), number(stored.get("low")), number(stored.get("high")), values)
    values = [v for row in rows if (v := row.test.get(key)) is not None]
    return Cell(*mean_interval(values), values) if values else Cell(None, None, None, [])


def _versus(stored: Any) -> Versus:
    p = number(dig(stored, "p"))
    p = p if p is not None and 0.0 <= p <= 1.0 else None
    return Versus(number(dig(stored, "difference")), number(dig(stored, "low")), number(dig(stored, "high")), p, None)


def _untested(method: Method, first: Method, key: str) -> Versus:
    """The difference of the means, where nothing was tested."""
    own, base = method.mean(key), first.mean(key)
    return Versus(None if own is None or base is None else own - base, None, None, None, None)


def _row(entry: dict[str, Any], folder: Path, notes: list[str]) -> Row:
    place = str(entry.get("folder") or "")
    found = None
    if place:
        try:
            inside = (folder / place).resolve().is_relative_to(folder.resolve())
            found = read_run(folder / place) if inside and (folder / place).is_dir() else None
        except (OSError, ValueError):  # a name that no file system takes
            found = None
    if found is None:
        notes.append(f"The run folder {visible(place or 'of ' + str(entry.get('name')))} can't be read.")
    seconds = {str(k): number(v) for k, v in _table(entry.get("seconds")).items()}
    if found is not None and "seconds" in found.summary:
        seconds["per_step"] = step_seconds(found.summary)  # what older versions wrote for a run without a step is none
    return Row(
        name=str(entry.get("name")),
        seed=entry.get("seed"),
        place=place,
        test={str(k): number(v) for k, v in _table(entry.get("test")).items()},
        seconds=seconds,
        memory_mb=number(entry.get("memory_mb")),
        folder=found,
    )


def _metrics_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.test))


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _table(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in _items(value) if isinstance(entry, dict)]
