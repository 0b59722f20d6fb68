"""Train several recipes on the same seeds and say what differs, with intervals."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hardmix.metrics.statistics import holm, mean_interval, paired_test
from hardmix.train.errors import CheckpointError, Interrupted, RecipeError, RunError
from hardmix.train.few_data import record_now
from hardmix.train.files import new_folder, write_json
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import Recipe
from hardmix.train.run_folder import problem_with, read_summary
from hardmix.train.side_by_side import GO_ON, Job, Watch, side_by_side
from hardmix.train.start import prepare_start
from hardmix.train.tasks import TASKS
from hardmix.train.tasks.number_data import digest_now

#: keys of a recipe's data that change what is trained on, not what is tested
OF_TRAINING = frozenset(("augment", "workers", "on_error", "train_samples", "validation", "captions", "image_size"))


def plan_jobs(recipes: list[Recipe], seeds: list[int], out: Path) -> list[Job]:
    """Every recipe on every seed; seeds outermost, so that an interrupted comparison is still a fair one.

    Raises:
        RecipeError: two of one name, or recipes that are not measured by the same; no seed, or one twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"seeds are {seeds}; pass each once, since a run that counts twice makes differences surer.")
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"two recipes are called {', '.join(twice)}; give each a name of its own with name = ... .")
    if len({recipe.task for recipe in recipes}) > 1:
        raise RecipeError("recipes of several tasks have no measure in common; compare those of one task.")
    if len({frozenset(recipe.eval.parts) for recipe in recipes}) > 1:
        raise RecipeError("recipes measure other things (eval.parts); give all of them the same.")
    return [Job(r.with_seed(seed), out / r.name / f"seed-{seed}") for seed in seeds for r in recipes]


def _taken(out: Path) -> str | None:
    """Why a comparison can't be written into a folder: its files would take the place of others."""
    if out.exists() and not out.is_dir():
        return f"{out} is a file; choose another --out."
    if (out / "recipe.toml").is_file():
        return f"{out} holds a run, whose report the comparison's would overwrite; choose another --out."
    names = ("comparison.json", "comparison.csv", "report.html")
    there = [name for name in names if (out / name).exists()]
    if there and names[0] not in there:
        return f"{out} holds a {there[0]} that is not of a comparison; choose another --out."
    return None


def cautions(recipes: list[Recipe]) -> list[str]:
    """What recipes differ in that no method can make up for: the samples that test them, how much they train on."""
    data = [recipe.data.model_dump(exclude=set(OF_TRAINING)) for recipe in recipes]
    told = []
    other = [f"data.{key}" for key in data[0] if any(d[key] != data[0][key] for d in data)]
    if len({recipe.semi.labelled for recipe in recipes}) > 1:  # without a test folder they are tested on a part of it
        other.append("semi.labelled")
    if other:
        told.append(
            f"The recipes differ in {', '.join(other)}: they may be tested on other samples, and then neither their "
            "differences nor p say which is better."
        )
    amounts: dict[str, Sequence[object]] = {
        "train.epochs": [recipe.train.epochs for recipe in recipes if recipe.train.epochs],
        "data.train_samples": [recipe.data.train_samples for recipe in recipes],
        "data.validation": [recipe.data.validation for recipe in recipes],
        "semi.per_class": [recipe.semi.per_class for recipe in recipes],
        "semi.share": [recipe.semi.share for recipe in recipes],
        "semi.split": [recipe.semi.split for recipe in recipes],
        "semi.unlabelled": [recipe.semi.unlabelled for recipe in recipes],
    }
    lists = {key: ", ".join(str(value) or '""' for value in dict.fromkeys(v)) for key, v in amounts.items()}
    if more := [f"{key} ({lists[key]})" for key, v in amounts.items() if len(set(v)) > 1]:
        told.append(f"The recipes differ in {', '.join(more)}: some may be better for that alone.")
    return told


def _check_kept(jobs: list[Job]) -> None:
    """Runs that are there are kept, unless their recipe or samples have changed since: others would be compared.

    Raises:
        RunError: they have.
    """
    now: dict[str, str | None] = {}
    for job in jobs:
        if problem := problem_with(job.recipe, job.folder, True):  # before any run, and before samples are blamed
            raise RunError(problem)
        if not (job.folder / "summary.json").is_file():
            continue
        if job.recipe.task == "few-labels":
            _check_split(job, now)
        if job.recipe.task != "regression":
            continue
        data = read_summary(job.folder).get("data", {})
        contrast = job.recipe.contrast
        parts = [(job.recipe.data, data)]
        if contrast is not None and contrast.data is not None:
            parts.append((contrast.data, data.get("pretraining", {})))
        for section, kept in parts:
            key = section.model_dump_json(exclude={"augment"})
            if key not in now:
                now[key] = digest_now(section)
            if now[key] and kept.get("digest", now[key]) != now[key]:
                raise _other_samples(job, section.path or section.name)


def _check_split(job: Job, now: dict[str, str | None]) -> None:
    """That a kept run's files, or the split that it was given, are those that it was trained on."""
    recipe, own = job.recipe, job.folder / "split.json"
    if not own.is_file() or not (recipe.data.name == "folder" or recipe.semi.split):
        return
    drawn_by = recipe.seed if recipe.data.name == "folder" else 0
    files = recipe.semi.model_dump_json(include={"labelled", "unlabelled", "include_labelled", "split"})
    key = f"{recipe.data.model_dump_json(exclude={'augment'})} {files} {drawn_by}"
    if key not in now:
        now[key] = record_now(recipe)
    if now[key] and now[key] != own.read_text("utf-8"):
        raise _other_samples(job, recipe.semi.split or recipe.data.path)


def _other_samples(job: Job, source: str) -> RunError:
    return RunError(
        f"{job.folder} was trained on samples or labels that {source} no longer has; choose another --out, or delete "
        "the runs that are to be trained again."
    )


def default_workers(jobs: int) -> int:
    """Side-by-side runs with one thread each use small machines best; a GPU gets one run at a time."""
    return 1 if torch.cuda.is_available() else max(1, min(jobs, _cores()))


def compare(
    recipes: list[Recipe],
    seeds: list[int],
    out: Path,
    *,
    workers: int = 0,
    command: str = "",
    title: str = "",
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train each recipe on each seed, write comparison.json, comparison.csv and report.html into `out`.

    Runs that `out` holds already are kept, half-finished ones resumed, so the same call goes on after an interruption.

    Args:
        recipes: at least one; the first is what the others are tested against.
        seeds: the same for every recipe: data subset, split, initial weights, order and augmentation agree per seed.
        workers: runs side by side; 0 picks one per core on a CPU.
    """
    from hardmix.report.page import write_comparison_report
    from hardmix.report.spreadsheet import write_csv

    if problem := _taken(out):
        raise RunError(problem)
    jobs = plan_jobs(recipes, seeds, out)
    _check_kept(jobs)
    workers = workers or default_workers(len(jobs))
    watch = watch or _nobody
    try:
        with new_folder(out):
            for job in jobs:  # what several runs start from is trained once, before they look for it side by side
                if not (job.folder / "summary.json").is_file():
                    prepare_start(job.recipe)
            if workers == 1:
                _one_by_one(jobs, watch)
            else:
                side_by_side(jobs, workers, max(1, _cores() // workers), watch)
    except Interrupted as stopped:
        raise Interrupted(GO_ON, stopped.signum) from None
    except KeyboardInterrupt:
        raise Interrupted(GO_ON, signal.SIGINT) from None
    result = summarise(recipes, seeds, jobs, out, command=command, title=title)
    write_json(out / "comparison.json", result)
    write_csv(out)
    write_comparison_report(out)
    return result


def summarise(
    recipes: list[Recipe], seeds: list[int], jobs: list[Job], out: Path, *, command: str, title: str
) -> dict[str, Any]:
    """comparison.json: runs, and per recipe mean, 95 % interval and the paired test against the first recipe."""
    from hardmix.report.text import step_seconds, telling

    summaries = {(job.recipe.name, job.recipe.seed): read_summary(job.folder) for job in jobs}

    def values(recipe: Recipe, metric: str) -> list[float]:
        found = (summaries[recipe.name, seed]["test"][metric] for seed in seeds)
        return [math.nan if value is None else value for value in found]  # JSON has no NaN

    first = recipes[0]
    metrics = [
        m for m in TASKS[first.task].metrics if all(m in s["test"] and telling(m, s) for s in summaries.values())
    ]
    table = []
    for recipe in recipes:
        summary = summaries[recipe.name, seeds[0]]
        row: dict[str, Any] = {key: summary[key] for key in ("policy", "objective")} | {"name": recipe.name}
        row["metrics"] = {
            m: mean_interval(values(recipe, m))._asdict() | {"values": values(recipe, m)} for m in metrics
        }
        steps = [step for seed in seeds if (step := step_seconds(summaries[recipe.name, seed])) is not None]
        row["seconds_per_step"] = mean_interval(steps)._asdict() if steps else dict.fromkeys(("mean", "low", "high"))
        row["versus_first"] = None
        if recipe is not first and len(seeds) > 1:
            row["versus_first"] = {m: paired_test(values(recipe, m), values(first, m))._asdict() for m in metrics}
        table.append(row)
    cheap = cost_base(table)
    for row in table:
        own = row["seconds_per_step"]["mean"]
        row["relative_cost"] = None if own is None or cheap is None else own / cheap["seconds_per_step"]["mean"]
    _correct([row["versus_first"] for row in table if row["versus_first"]])
    twins: list[dict[str, Any]] = [
        {
            "name": other.name,
            "base": base.name,
            "tests": {m: paired_test(values(other, m), values(base, m))._asdict() for m in metrics},
        }
        for base, other in objective_twins(recipes)
        if len(seeds) > 1 and base is not first
    ]
    _correct([twin["tests"] for twin in twins])
    runs = [
        {
            "name": job.recipe.name,
            "seed": job.recipe.seed,
            "folder": job.folder.relative_to(out).as_posix(),
            **{key: summaries[job.recipe.name, job.recipe.seed][key] for key in ("test", "seconds", "memory_mb")},
        }
        for job in jobs
    ]
    return {
        "title": title or " / ".join(recipe.name for recipe in recipes),
        "command": command,
        "metrics": list(metrics),
        "lower_is_better": list(TASKS[first.task].lower_is_better),
        "cautions": cautions(recipes),
        "seeds": seeds,
        "runs": runs,
        "table": table,
        "cost_against": None if cheap is None else cheap["name"],
        "twins": twins,
        "versions": summaries[first.name, seeds[0]]["versions"],
        "device": summaries[first.name, seeds[0]]["device"],
    }


def cost_base(table: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row whose seconds a step are 1: plain Mixup where it is compared, else the first that trains, if any."""
    plain = ("mixup", "soft-cross-entropy")
    stepped = [row for row in table if row["seconds_per_step"]["mean"] is not None]
    first = stepped[0] if stepped else None
    return next((row for row in stepped if (row["policy"], row["objective"]) == plain), first)


def objective_twins(recipes: list[Recipe]) -> list[tuple[Recipe, Recipe]]:
    """(base, other) for every recipe that differs from an earlier one in its objective alone: what the loss does."""
    apart = {"name", "about", "seed", "objective"}
    found = []
    for place, other in enumerate(recipes):
        same = other.model_dump(exclude=apart)
        base = next((r for r in recipes[:place] if r.model_dump(exclude=apart) == same), None)
        if base is not None:
            found.append((base, other))
    return found


def _correct(tests: list[dict[str, Any]]) -> None:
    """Several tests of one kind: Holm's correction keeps the chance of any false alarm at 5 %."""
    for metric in tests[0] if tests else ():
        for test, p in zip(tests, holm([test[metric]["p"] for test in tests]), strict=True):
            test[metric]["p_holm"] = p


def _nobody(number: int, event: dict[str, Any]) -> None:
    """Nobody watches."""


def _one_by_one(jobs: list[Job], watch: Watch) -> None:
    """All runs in this process."""
    for number, job in enumerate(jobs):
        try:
            run_recipe(job.recipe, job.folder, resume=True, progress=partial(watch, number))
        except (RunError, CheckpointError) as error:
            raise job.blamed(error) from None
        watch(number, {"done": True})


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
