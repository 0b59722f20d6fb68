"""What the command line shows: progress, tables of metrics and of comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import cleandoc
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperCommand, TyperGroup

from hardmix.launcher import first_rank

console = Console(highlight=False)
#: wider than any table; one is only as wide as its cells
ANY_WIDTH = 100_000
#: from which on there is room for a bar and for the time that has gone by
BAR_WIDTH = 110


class _PlainHelp:
    """Help without a type for flags, which take no value, and with paragraphs that fill the lines of the terminal."""

    help: str | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        paragraphs = cleandoc(self.help or "").split("\n\n")
        self.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Verb(_PlainHelp, TyperCommand):
    """A verb of the command line."""


class Verbs(_PlainHelp, TyperGroup):
    """All of them."""


def say_where(what: str, path: Path) -> None:
    console.print(f"{what}: [bold]{escape(str(path))}[/bold]", soft_wrap=True)


def print_lines(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for line in lines:
        table.add_row(*map(escape, line))
    # Values stand below what they are measured at: a narrow terminal may wrap the line, but not the cells.
    Console(highlight=False, width=ANY_WIDTH).print(table)


def _columns() -> list[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    wide = console.width >= BAR_WIDTH
    return [
        _cut("{task.description}"),
        *([BarColumn()] if wide else []),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _cut("{task.fields[note]}"),
        *([TimeElapsedColumn(table_column=Column(no_wrap=True))] if wide else []),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    ]


def _cut(text: str) -> Any:
    """A column that gives way on a narrow line, so that the steps and the time left can be read."""
    from rich.progress import TextColumn

    class Cut(TextColumn):
        def render(self, task: Any) -> Any:
            shown = super().render(task)
            shown.no_wrap, shown.overflow = True, "ellipsis"
            return shown

    # Only columns that may wrap are narrowed; their text is cut instead.
    return Cut(text, table_column=Column())


def _note(event: dict[str, Any]) -> str:
    """'loss 0.123 acc 0.850 4,000 samples/s', of what the task logs."""
    losses = [f"{name} {event[name]:.3f}" for name in ("loss", "contrast") if name in event]
    accuracy = [f"acc {event['accuracy']:.3f}"] if "accuracy" in event else []
    return " ".join([*losses, *accuracy, f"{event['images_per_s']:,.0f} samples/s"])


@contextmanager
def one_bar(name: str) -> Iterator[Any]:
    from rich.progress import Progress

    with Progress(*_columns(), console=console, disable=not first_rank()) as bar:
        task = bar.add_task(escape(name), total=None, note="")

        def tell(event: dict[str, Any]) -> None:
            note = f"epoch {event['epoch']}/{event['epochs']} {_note(event)}"
            bar.update(task, total=event["steps"], completed=event["step"], note=note)

        try:
            yield tell
        finally:
            if bar.tasks[task].total is None:  # no step was made, of which an error speaks, or a run without training
                bar.update(task, visible=False)


@contextmanager
def many_bars(labels: list[str]) -> Iterator[Any]:
    """One bar for all runs, one for each run that is going on."""
    from rich.progress import Progress

    with Progress(*_columns(), console=console) as bar:
        # In hundredths of a run, so that the time left is known long before the first run ends.
        share = dict.fromkeys(range(len(labels)), 0.0)
        whole = bar.add_task("[bold]all runs[/bold]", total=100 * len(labels), note="")
        open_bars: dict[int, Any] = {}

        def watch(number: int, event: dict[str, Any]) -> None:
            if event.get("done"):
                share[number] = 100.0
                if number in open_bars:
                    bar.remove_task(open_bars.pop(number))
            else:
                if number not in open_bars:
                    open_bars[number] = bar.add_task(escape(labels[number]), total=event["steps"], note="")
                bar.update(open_bars[number], completed=event["step"], note=_note(event))
                share[number] = 100.0 * event["step"] / event["steps"]
            done = sum(value == 100.0 for value in share.values())
            bar.update(whole, completed=int(sum(share.values())), note=f"{done} of {len(labels)} done")

        yield watch


def print_summary(summary: dict[str, Any]) -> None:
    print_metrics(
        telling_of(summary),
        f"{summary['name']}, seed {summary['seed']}, {summary['data']['test']:,} test "
        + summary["data"].get("kind", "images"),
        summary.get("before"),
    )


def telling_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The test metrics, without those that the number of classes decides."""
    from hardmix.report.text import telling

    return {key: value for key, value in summary["test"].items() if telling(key, summary)}


#: what the tables call a metric; rates are shown in per cent
TITLES = {
    "top1": "top-1 %", "top5": "top-5 %", "nll": "NLL", "ece": "ECE %", "pseudo_top1": "pseudo %",
    "mixup_both": "both in Mixup %", "cutmix_both": "both in CutMix %",
    "mean_top1": "all subsets %", "missing_0": "complete %", "missing_1": "one missing %",
    "missing_2": "two missing %", "missing_3": "three missing %",
    "mae": "MAE", "rmse": "RMSE", "gm": "GM", "r2": "R2", "pearson": "Pearson",
    "spearman": "Spearman", "ordinality": "ordinality", "local_linearity": "non-linearity",
    "recall_1": "R@1 %", "recall_5": "R@5 %", "recall_10": "R@10 %", "median_rank": "rank",
    "shift_recall_1": "shift R@1 %", "shift_recall_5": "shift R@5 %", "shift_ece": "shift ECE %",
    "seen_shift_recall_5": "seen, shift R@5 %", "zeroshot": "zero-shot %", "shift_zeroshot": "shift zero-shot %",
    "fewshot_4": "4-shot %", "shift_fewshot_4": "shift 4-shot %", "arithmetic": "arithmetic %", "gap": "gap",
    "caption_exact": "caption exact %", "caption_edit_distance": "caption edits", "caption_bleu_4": "BLEU-4 %",
    "caption_cider": "CIDEr", "shift_caption_exact": "shift caption exact %",
    "shift_caption_edit_distance": "shift caption edits", "shift_caption_bleu_4": "shift BLEU-4 %",
    "shift_caption_cider": "shift CIDEr", "alignment": "alignment", "uniformity": "uniformity",
}  # fmt: skip


#: what a terminal has no room for in a comparison
IN_THE_REPORT = (
    *("top5", "gm", "pearson", "local_linearity", "recall_10", "median_rank", "shift_recall_1"),
    *("seen_shift_recall_5", "shift_zeroshot", "shift_fewshot_4", "gap"),
    *("caption_bleu_4", "shift_caption_exact", "shift_caption_bleu_4", "shift_caption_cider"),
    *("shift_caption_edit_distance", "alignment", "uniformity"),
)


#: metrics that fit side by side on a narrow terminal
MOST_COLUMNS = 10


def print_metrics(test: dict[str, Any], title: str, before: dict[str, Any] | None = None) -> None:
    """Up to a handful of metrics side by side; more one below the other, with what they were before where known."""
    shown = [key for key in TITLES if key in test]
    console.print(escape(title))  # not as the table's title, which would be folded to its width
    if len(shown) <= MOST_COLUMNS and not before:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for key in shown:
            table.add_column(TITLES[key], justify="right")
        table.add_row(*(_number(test[key], key) for key in shown))
        console.print(table)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("before", "after") if before else ("test",):
        table.add_column(name, justify="right")
    for key in shown:
        values = ([_number(before.get(key), key)] if before else []) + [_number(test[key], key)]
        table.add_row(TITLES[key], *values)
    console.print(table)


def print_comparison(result: dict[str, Any]) -> None:
    """Means with 95 % intervals, ranks by the first metric, then its paired difference against the first recipe."""
    from hardmix.report.comparison import ranked

    key = result["metrics"][0]
    means = [row["metrics"][key]["mean"] for row in result["table"]]
    ranks = ranked(means, key in result["lower_is_better"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", overflow="fold")
    if any(ranks):
        table.add_column("rank", justify="right")
    known = [metric for metric in result["metrics"] if metric in TITLES]
    shown = [metric for metric in known if metric == key or metric not in IN_THE_REPORT]
    for metric in shown:
        table.add_column(TITLES[metric], justify="right")
    if result["cost_against"] is not None:
        table.add_column("cost", justify="right")
    for row, rank in zip(result["table"], ranks, strict=True):
        cells = [_with_interval(row["metrics"][metric], metric) for metric in shown]
        place = [str(rank or "n/a")] if any(ranks) else []
        cost = "-" if row["relative_cost"] is None else f"{row['relative_cost']:.2f}"
        table.add_row(escape(row["name"]), *place, *cells, *([] if result["cost_against"] is None else [cost]))
    _printer().print(table)  # a narrow terminal folds names
    if any(ranks):
        console.print(f"Rank: by the mean of {TITLES[key].removesuffix(' %')}, 1 is best.")
    if result["cost_against"] is not None:
        untrained = any(row["relative_cost"] is None for row in result["table"])
        none = " -: makes no training step." if untrained else ""
        console.print(f"Cost: seconds a training step, {escape(result['cost_against'])} = 1.{none}")
    for caution in result["cautions"]:
        console.print(escape(caution), soft_wrap=True)
    seeds = len(result["seeds"])
    if seeds == 1:
        console.print("One seed: no intervals and no test; pass --seeds 5 or more.")
        return
    console.print(f"Mean over {seeds} seeds with 95 % interval.")
    if len(result["table"]) == 1:
        return
    title = TITLES[key].removesuffix(" %")
    title = title[:1].upper() + title[1:]
    console.print(f"{title} against {escape(result['table'][0]['name'])}, paired by seed; p (with Holm's correction):")
    _print_tests([(row["name"], row["versus_first"][key]) for row in result["table"][1:]], key)
    told = {key: title, "cutmix_both": "Both classes of half-and-half CutMix images"}
    for metric, title in told.items() if result["twins"] else ():
        if metric in result["metrics"]:
            console.print(f"{title}, all but the objective alike:")
            tests = [(f"{t['name']} against {t['base']}", t["tests"][metric]) for t in result["twins"]]
            _print_tests(tests, metric)


def _print_tests(tests: list[tuple[str, dict[str, Any]]], metric: str) -> None:
    factor, unit = (100, " points") if TITLES[metric].endswith("%") else (1, "")
    lines = []
    for name, test in tests:
        # A measure may not be defined for one of them, such as a correlation of constants.
        known = test["difference"] is not None and math.isfinite(test["difference"])
        values = [factor * test[end] for end in ("difference", "low", "high") if known and test[end] is not None]
        difference, *ends = _alike(values, 2, "+", fixed=bool(unit)) if known else ["n/a"]
        difference += unit if known else ""
        if test["p"] is None:
            lines.append((escape(name), difference, "the same in every seed, not tested" if known else "", ""))
            continue
        p = f"p {_chance(test['p'])} ({_chance(test['p_holm']).removeprefix('= ')})"
        lines.append((escape(name), difference, escape(f"[{', '.join(ends)}]"), p))
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, *values in lines:
        table.add_row(f"  {name}", *values)
    wide = Console(highlight=False, width=ANY_WIDTH)
    if wide.measure(table).maximum <= _printer().width:
        _printer().print(table)
        return
    for name, *values in lines:  # the numbers of a row that folds can't be told apart
        console.print(f"  {name}\n    {' '.join(values).rstrip()}", soft_wrap=True)


def _printer() -> Console:
    """The terminal; a file or a pipe is as wide as its lines."""
    return console if console.is_terminal else Console(highlight=False, width=ANY_WIDTH)


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _number(value: float | None, metric: str) -> str:
    if value is None or value != value:
        return "n/a"
    return f"{100 * value:.2f}" if TITLES[metric].endswith("%") else _alike([value], 3)[0]


def _with_interval(value: dict[str, Any], metric: str) -> str:
    mean = value["mean"]
    if value["low"] is None:
        return _number(mean, metric)
    half = (value["high"] - value["low"]) / 2
    if TITLES[metric].endswith("%"):
        return f"{_number(mean, metric)} ±{_number(half, metric)}"
    return " ±".join(_alike([mean, half], 3))


def _alike(values: Sequence[float], places: int, sign: str = "", fixed: bool = False) -> list[str]:
    """Numbers that belong together, with `places` decimals, or unless these are `fixed` as many more as show three
    digits of the largest; errors of a target in thousandths would all be 0.000."""
    largest = max(map(abs, values))
    size = math.floor(math.log10(largest)) if largest and math.isfinite(largest) else 0
    size = 0 if fixed else size
    if not -5 < size < 9:
        return [f"{value:{sign}.2e}" for value in values]
    texts = [f"{value:{sign}.{max(places, 2 - size)}f}" for value in values]
    return [text if float(text) else text.replace("-", "+" if sign else "") for text in texts]
