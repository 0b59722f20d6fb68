"""What the studies of this folder share: progress, rows of results, tables of a page that is made from them."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hardmix.metrics.statistics import PairedTest, holm, mean_interval, paired_test
from hardmix.train.compare import compare, default_workers, plan_jobs
from hardmix.train.errors import Interrupted
from hardmix.train.recipe import Recipe
from hardmix.train.robustness import FILE as ROBUSTNESS
from hardmix.train.robustness import robustness_of_run
from hardmix.train.run_folder import read_summary
from hardmix.train.tasks import TASKS

#: a table of a page, between `<!-- evidence: NAME -->` and `<!-- end -->`
PART = re.compile(r"(<!-- evidence: ([\w -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
#: a run's summary, by the name of its recipe and its seed
Runs = dict[tuple[str, int], dict[str, Any]]
#: of a comparison where nothing is said
SEEDS = 5
#: how a measure is shown: heading, factor, digits
Measure = tuple[str, float, int]
#: a difference and its measure, or nothing where it was not run
Cell = tuple[PairedTest, str] | None


def progress_line(total: int) -> Callable[[str], Callable[[int, dict[str, Any]], None]]:
    """One line that says how far all the comparisons are, and for how long they will go on at this pace."""
    started, done = time.monotonic(), 0

    def named(name: str) -> Callable[[int, dict[str, Any]], None]:
        def watch(number: int, event: dict[str, Any]) -> None:
            nonlocal done
            if event.get("done"):
                done += 1
                left = (time.monotonic() - started) / done * (total - done) / 60
                print(
                    f"\r{done} of {total} runs, {left:.0f} min left  ({name})    ", end="", file=sys.stderr, flush=True
                )

        return watch

    return named


def finished_runs(
    recipes: list[Recipe], seeds: list[int], out: Path, headline: Sequence[str] = ()
) -> tuple[list[int], Runs]:
    """The seeds that every recipe has finished, and the summaries of those runs, what `headline` names among the
    measures of the test split. With a headline a run counts when its robustness was measured too."""
    jobs = {(job.recipe.name, job.recipe.seed): job.folder for job in plan_jobs(recipes, seeds, out)}
    last = ROBUSTNESS if headline else "summary.json"
    finished = [s for s in seeds if all((jobs[r.name, s] / last).is_file() for r in recipes)]
    runs = {(r.name, s): read_summary(jobs[r.name, s]) for r in recipes for s in finished}
    if headline:
        for key, run in runs.items():
            measured = json.loads((jobs[key] / ROBUSTNESS).read_text("utf-8"))["headline"]
            run["test"] |= {measure: measured[measure] for measure in headline}
    return finished, runs


def measure_robustness(folders: Sequence[Path], workers: int) -> None:
    """robustness.json of every run that has none, `workers` runs at a time."""
    try:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for number, _ in enumerate(pool.imap_unordered(_measure, folders), 1):
                print(f"\rrobustness: {number} of {len(folders)} runs    ", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        raise Interrupted("stopped; what was measured is kept, the same command goes on.", signal.SIGINT) from None


def _measure(folder: Path) -> None:
    torch.set_num_threads(1)
    robustness_of_run(folder, keep=True)


def run_groups(
    chosen: Mapping[str, list[Recipe]],
    here: Path,
    out: Path,
    seeds: list[int],
    jobs: int,
    command: str,
    headline: Sequence[str] = (),
) -> int:
    """Train the comparisons one after another and write what they gave, also of one that is stopped.

    Args:
        chosen: comparison -> recipes.
        here: folder of the study, whose `results` get a table and a JSON file for each comparison.
        out: where the runs go; finished ones are kept, broken ones resumed.
        jobs: runs side by side; 0: one per core, or one on a GPU.
        command: what is typed, to which the comparison is added.
        headline: measures of robustness.json that each run is asked for afterwards.
    Returns:
        What the process ends with.
    """
    watch = progress_line(sum(len(plan_jobs(recipes, seeds, out / name)) for name, recipes in chosen.items()))
    stopped: Interrupted | None = None
    for name, recipes in chosen.items():
        typed = f"{command} --only {name}" + f" --jobs {jobs}" * bool(jobs)
        workers = jobs or default_workers(len(recipes) * len(seeds))
        try:
            compare(recipes, seeds, out / name, workers=workers, command=typed, title=name, watch=watch(name))
            if headline:
                measure_robustness([job.folder for job in plan_jobs(recipes, seeds, out / name)], workers)
        except Interrupted as error:
            stopped = error
        write_results(here / "results", name, recipes, seeds, out, typed, headline)
        if stopped is not None:
            print(f"\n{stopped}", file=sys.stderr)
            return 128 + stopped.signum
    print(file=sys.stderr)
    return 0


def run_study(
    about: str,
    here: Path,
    groups: Callable[..., dict[str, list[Recipe]]],
    headline: Sequence[str] = (),
    epochs: bool = False,
) -> int:
    """The command of a study: what it says of itself, its folder, budget -> comparisons; rest as in `run_groups`.

    With `epochs` the command takes --epochs, and `groups` their number or None after the budget.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=["small", "full"], default="small")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; 0: one per core, or one on a GPU")
    parser.add_argument("--only", nargs="*", help="comparisons of the budget; default all")
    parser.add_argument("--out", type=Path, default=Path(f"runs/evidence-{here.name}"))
    if epochs:
        parser.add_argument("--epochs", type=int, help="instead of those in groups.py; the results then say so")
    options = parser.parse_args()
    known = groups(options.budget, options.epochs) if epochs else groups(options.budget)
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only names {', '.join(unknown)}; budget {options.budget} has {', '.join(known)}")
    chosen = {name: known[name] for name in options.only or known}
    command = f"python benchmarks/evidence/{here.name}/run.py --budget {options.budget}"
    command += f" --seeds {options.seeds}" * (options.seeds != SEEDS)
    if epochs and options.epochs:
        command += f" --epochs {options.epochs}"
    return run_groups(chosen, here, options.out, list(range(options.seeds)), options.jobs, command, headline)


def write_results(
    folder: Path,
    name: str,
    recipes: list[Recipe],
    seeds: list[int],
    out: Path,
    command: str,
    headline: Sequence[str] = (),
) -> None:
    """One row for each run of the seeds that every method has finished, and how they came about."""
    finished, runs = finished_runs(recipes, seeds, out / name, headline)
    if not finished:
        return
    folder.mkdir(exist_ok=True)
    first = runs[recipes[0].name, finished[0]]
    known = [m for m in TASKS[recipes[0].task].metrics if all(m in run["test"] for run in runs.values())]
    write_rows(folder / f"{name}.csv", runs, [*known, *headline])
    about = {"command": command, "seeds": finished, "versions": first["versions"], "device": first["device"]}
    counts = [key for key in ("name", "train", "labelled", "unlabelled", "test") if key in first["data"]]
    about |= {"data": {key: first["data"][key] for key in counts}, "model": first["model"]}
    recipe = recipes[0].model_dump(mode="json", exclude_none=True, exclude={"name", "policy", "objective", "seed"})
    recipe["data"].pop("path")
    (folder / f"{name}.json").write_text(json.dumps({**about, "recipe": recipe}, indent=1) + "\n", encoding="utf-8")


def write_rows(path: Path, runs: Runs, metrics: Sequence[str]) -> None:
    """One row a run: method, seed, what was measured on the test split, milliseconds a step."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *metrics, "ms_per_step"])
        for (method, seed), run in runs.items():
            values = [f"{run['test'][metric]:.6f}" for metric in metrics]
            writer.writerow([method, seed, *values, f"{1000 * run['seconds']['per_step']:.3f}"])


def read_rows(path: Path) -> dict[str, dict[str, list[float]]]:
    """Method -> measure -> values, in the order of the seeds."""
    runs: dict[str, dict[str, list[float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            method, _ = row.pop("method"), row.pop("seed")
            for key, value in row.items():
                runs.setdefault(method, {}).setdefault(key, []).append(float(value))
    return runs


class Study(NamedTuple):
    """One comparison: how its numbers came about, and its runs by method, in the order of the seeds."""

    name: str
    about: dict[str, Any]
    runs: dict[str, dict[str, list[float]]]

    def test(self, method: str, base: str, key: str) -> PairedTest:
        return paired_test(self.runs[method][key], self.runs[base][key])


def read_studies(results: Path, shown: Iterable[str]) -> dict[str, Study]:
    """What was run of the comparisons that a page shows, in its order."""
    paths = {name: results / f"{name}.csv" for name in shown}
    return {
        name: Study(name, json.loads(path.with_suffix(".json").read_text("utf-8")), read_rows(path))
        for name, path in paths.items()
        if path.is_file()
    }


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (list(head), *map(list, rows))]
    return "\n".join([lines[0], re.sub(r"[^|]+", "---", lines[0]), *lines[1:]]) + "\n"


def values_table(
    runs: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str], measures: Mapping[str, Measure]
) -> str:
    """A row for each method, mean and half the interval over its seeds, for the measures that were taken."""
    first = next(iter(runs.values()))
    known = {key: measure for key, measure in measures.items() if key in first}
    rows = [
        [titles[m], *(with_half_width(of[key], measure) for key, measure in known.items())] for m, of in runs.items()
    ]
    return table(["", *(heading for heading, _, _ in known.values())], rows)


def difference(test: PairedTest, measure: Measure, p: float | None) -> str:
    """The mean difference with its interval; bold where chance is unlikely even among so many tests."""
    _, factor, digits = measure
    text = f"{factor * test.difference:+.{digits}f}"
    if test.low is None or test.high is None:
        text += " (one seed)"
    else:
        text += f" [{factor * test.low:+.{digits}f}, {factor * test.high:+.{digits}f}]"
    return f"**{text}**" if p is not None and p < 0.05 else text


def columns_of_tests(rows: list[list[Cell]], measures: Mapping[str, Measure]) -> list[list[str]]:
    """Cells of a table of tests, each column corrected by itself."""
    columns = []
    for column in zip(*rows, strict=True):
        corrected = iter(holm([cell[0].p for cell in column if cell is not None]))
        columns.append(
            ["-" if cell is None else difference(cell[0], measures[cell[1]], next(corrected)) for cell in column]
        )
    return [list(row) for row in zip(*columns, strict=True)]


def with_half_width(values: Sequence[float], measure: Measure) -> str:
    """The mean, and half the width of its interval."""
    _, factor, digits = measure
    interval = mean_interval([factor * v for v in values])
    half = "" if interval.low is None or interval.high is None else f" ±{(interval.high - interval.low) / 2:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def write_page(
    page: Path, parts: dict[str, Callable[[], str]], draw: Callable[[], None], about: str, arguments: list[str] | None
) -> int:
    """The command of a page: makes its tables and plots again, or says whether the tables are what the results give."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not current")
    options = parser.parse_args(arguments)
    before = page.read_text("utf-8")
    after = PART.sub(lambda m: f"{m[1]}\n{parts[m[2]]()}\n{m[4]}", before)
    if options.check:
        return int(before != after)
    page.write_text(after, encoding="utf-8")
    draw()
    return 0
