"""One measure of a trained image-text run in full, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hardmix import _check
from hardmix.models.pair_captioner import PairCaptioner
from hardmix.train.evaluate import LoadedRun, load_run
from hardmix.train.pair_captions import MEASURES, SEARCHES
from hardmix.train.pair_measures import CUTS, DIRECTIONS, PARTS, SHOTS
from hardmix.train.tasks.image_text import ImageText, _pair_model
from hardmix.train.tasks.modalities import Modalities

ANALOGIES = ("recall_1", "recall_5", "recall_1_without_text")
#: the measure of runs of several modalities
MISSING = "missing"
Lines = tuple[list[str], list[list[str]]]


def pair_tables(folder: Path, which: str = "last", data_path: str = "", task: str = "retrieval") -> list[Lines]:
    """Heads and lines of one table, for captions of a second one with examples.

    Args:
        folder, which, data_path: as for `load_run`.
        task: one of `hardmix.train.pair_measures.PARTS`, or "missing" for a run of several modalities.

    Raises:
        ValueError: an unknown task, a run of another kind, a set that has nothing for it (classes, analogies), or a
            model that writes no captions.
    """
    _check.choice("eval", "--task", task, [*PARTS, MISSING])
    run = load_run(folder, which, data_path)
    if task == MISSING:
        return [_missing(run, folder)]
    if not isinstance(run.task, ImageText):
        raise ValueError(f"eval: --task {task} is for image-text runs, but {folder} is of task {run.task.recipe.task}.")
    with run.precision():
        return _tables(run, task)


def _tables(run: LoadedRun, task: str) -> list[Lines]:
    after = run.task.after(_pair_model(run.model), run.device)
    if task == "caption" and not isinstance(after.model, PairCaptioner):
        raise ValueError(
            f"eval: model {run.task.recipe.model.name} writes no captions; take a run of model coca for --task caption."
        )
    found = run.task.measures(after.model, run.device, after.shift).test([task])
    if not found["test"]:
        raise ValueError(f"eval: {run.task.data.pairs.name} has nothing for --task {task}; take another one.")
    tables = [_TABLES[task](found)]
    if task == "caption":
        of_picture = run.task.data.pairs.ids
        lines = [[of_picture[line["row"]], line["found"], line["right"]] for line in found["captions"]["examples"]]
        tables.append((["picture", f"caption found by {found['captions']['beams']} beams", "right"], lines))
    return tables


def _missing(run: LoadedRun, folder: Path) -> Lines:
    """Accuracy for each subset of the modalities."""
    if not isinstance(run.task, Modalities):
        raise ValueError(
            f"eval: --task {MISSING} is for runs of task modalities, but {folder} is of task {run.task.recipe.task}."
        )
    with run.precision():
        found = run.task.test(run.model, run.device)["missing"]
    lines = [
        [*("yes" if name in key.split("+") else "" for name in run.task.modalities), f"{100 * value:.1f}"]
        for key, value in found["subsets"].items()
    ]
    nothing = [*("" for _ in run.task.modalities), f"{100 * found['majority']:.1f} (largest class)"]
    return [*run.task.modalities, "top-1 %"], [*lines, nothing]


def _retrieval(found: dict[str, Any]) -> Lines:
    heads = ["concepts", "style", "from", *(f"R@{k} %" for k in CUTS), "median rank", "chance R@5 %", "pairs"]
    lines = []
    for line in found["retrieval"]:
        for direction in DIRECTIONS:
            recalls = [f"{100 * line[f'{direction}_recall_{k}']:.1f}" for k in CUTS]
            lines.append(
                [
                    line["part"],
                    line["style"] + (" (shift)" if line["shift"] else ""),
                    direction.replace("_", " "),
                    *recalls,
                    f"{line[f'{direction}_median_rank']:.0f}",
                    f"{100 * line[f'{direction}_recall_5_chance']:.1f}",
                    str(line["pairs"]),
                ]
            )
    return heads, lines


def _calibration(found: dict[str, Any]) -> Lines:
    lines = []
    for name, value in found["calibration"].items():
        scaled = value.get("scaled")
        after = [f"{scaled['temperature']:.3f}", f"{100 * scaled['ece']:.2f}"] if scaled else ["", ""]
        lines.append([name.replace("_", " "), f"{100 * value['ece']:.2f}", *after])
    if "shift_ece" in found["test"]:
        lines.append(["retrieval, other styles", f"{100 * found['test']['shift_ece']:.2f}", "", ""])
    return ["of", "ECE %", "best temperature (validation)", "ECE % with it"], lines


def _classes(found: dict[str, Any]) -> Lines:
    test, lines = found["test"], []
    for prefix, name in (("", "training style"), ("shift_", "other styles")):
        if f"{prefix}zeroshot" in test:
            shots = [f"{100 * test[key]:.1f}" if (key := f"{prefix}fewshot_{k}") in test else "" for k in SHOTS]
            zero = [f"{100 * test[f'{prefix}{key}']:.1f}" for key in ("zeroshot", "zeroshot_ece")]
            lines.append([name, *zero, *shots])
    return ["concepts never seen", "zero-shot %", "ECE %", *(f"{k}-shot %" for k in SHOTS)], lines


def _arithmetic(found: dict[str, Any]) -> Lines:
    of = found["arithmetic"]
    lines = [
        [name, str(line["queries"]), *(f"{100 * line[key]:.1f}" for key in ANALOGIES)]
        for name, line in [*of["kinds"].items(), ("all queries", of)]
    ]
    return [f"kind (text difference x {of['scale']:g})", "queries", "R@1 %", "R@5 %", "R@1 % without text"], lines


def _geometry(found: dict[str, Any]) -> Lines:
    return ["measure", "value"], [[key, f"{value:.4f}"] for key, value in found["test"].items()]


def _captions(found: dict[str, Any]) -> Lines:
    of = found["captions"]
    heads = ["pictures", "style", "search", "exact %", "edit distance", "BLEU-4 %", "CIDEr", "captions"]
    lines = []
    for line in of["lines"]:
        for name, beams in SEARCHES.items():
            exact, distance, bleu, cider = (line[name][key] for key in MEASURES)
            lines.append(
                [
                    "of the training" if line["part"] == "seen" else "unseen",
                    line["style"] + (" (shift)" if line["shift"] else ""),
                    name if beams == 1 else f"{beams} beams",
                    f"{100 * exact:.1f}",
                    f"{distance:.3f}",
                    f"{100 * bleu:.1f}",
                    f"{cider:.2f}",
                    str(line["pictures"]),
                ]
            )
    return heads, lines


_TABLES = {
    "retrieval": _retrieval,
    "calibration": _calibration,
    "zeroshot": _classes,
    "arithmetic": _arithmetic,
    "geometry": _geometry,
    "caption": _captions,
}
