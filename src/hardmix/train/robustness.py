"""How well a trained run holds up, measured from its checkpoint and kept as `robustness.json` in its folder.

    {"format": 1, "name", "seed", "policy", "objective", "checkpoint": "last", "step", "samples": 1500, "versions",
     "data": {"name", "test": images that were changed, "test_all", "validation", "train": images of the probe},
     "clean": accuracy of the unchanged images,
     "occlusion": {"patch", "grid": [rows, columns], "rates": [...], "accuracy": [...]},
     "fgsm": {"epsilons": [...], "accuracy": [...]},
     "corruptions": {"severities": [1..5], "accuracy": {"gaussian-noise": [...], ...}},
     "mixed": {"mixup" | "cutmix" | "fmix" | "resizemix":
               {"lam": [...], "both": [...], "top2", "either", "own", "partner"}},
     "calibration": {"temperature": T or null, "before": {"nll", "ece", "adaptive_ece", "reliability"},
                     "after": the same with the temperature, or null without a validation split},
     "training": {"clean", "mixed", "ceiling", "logged", "validation"},
     "headline": {one number for each of `MEASURES`, null where there is none}}

and for a comparison, in its own folder

    {"format": 1, "title", "seeds", "samples", "measures": [...],
     "runs": [{"name", "seed", "folder"}, ...],
     "table": [{"name", "policy", "objective",
                "measures": {key: {"mean", "low", "high", "values"}},
                "versus_first": {key: {"difference", "low", "high", "p", "p_holm"}} or null,
                "curves": {"occlusion" | "mixup" | "cutmix" | ...: {"x", "mean", "low", "high"}}}, ...]}

Everything that is drawn (patches, noise, pairs, boxes, the subset) has a seed of its own and not the run's, so all runs
on a data set are asked the same questions. `training` answers why training accuracy is below validation accuracy, see
docs/evaluation.md: `clean` and `mixed` are of the final weights on unmixed and on freshly mixed training images,
`ceiling` is the highest mixed accuracy that any model can reach, `logged` is what the log says of the last epoch.
Policies that weigh labels by what the model sees do so with the final weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hardmix import __version__, _check
from hardmix.data.images import ImageSet
from hardmix.data.splits import stratified_subset
from hardmix.metrics.calibration import calibration_metrics, fit_temperature
from hardmix.metrics.classification import certain, mixed_accuracy
from hardmix.metrics.robustness import (
    KINDS,
    accuracy,
    corruption_accuracy,
    fgsm_accuracy,
    mixed_accuracy_curve,
    occlusion_accuracy,
    predict,
)
from hardmix.metrics.statistics import holm, mean_interval, paired_test
from hardmix.mixing.hidden import ManifoldMixup
from hardmix.mixing.target import MixedTarget
from hardmix.train.evaluate import LoadedRun, chosen_checkpoint, load_run
from hardmix.train.files import write_json
from hardmix.train.schedule import Schedule
from hardmix.train.seeds import derive, generator
from hardmix.train.state import best_step, list_steps
from hardmix.train.tasks import Classification

FORMAT = 1
FILE = "robustness.json"
#: Test images that are changed, and training images of the probe. The standard error of an accuracy is at most 1.3 %.
SAMPLES = 1500
#: told about a comparison: (runs that are done, runs in all, what comes next)
Watch = Callable[[int, int, str], None]


class Measure(NamedTuple):
    """How a number of the headline is named and read."""

    label: str
    about: str
    percent: bool = True
    lower_is_better: bool = False


MEASURES: dict[str, Measure] = {
    "clean": Measure("clean", "accuracy on the unchanged test images"),
    "occluded": Measure("occluded", "mean accuracy with 10 % to 90 % of the patches painted over"),
    "fgsm": Measure("FGSM", "mean accuracy under a gradient sign step of 1, 2, 4 and 8 of 255 levels"),
    "corrupted": Measure("corrupted", "mean accuracy over six kinds of damage in five strengths"),
    "mixup_both": Measure("Mixup: both", "both classes in the top two, mean over lambda from 0.1 to 0.9"),
    "cutmix_both": Measure("CutMix: both", "both classes in the top two, mean over lambda from 0.1 to 0.9"),
    "fmix_both": Measure("FMix: both", "both classes in the top two, mean over lambda from 0.1 to 0.9"),
    "resizemix_both": Measure("ResizeMix: both", "both classes in the top two, mean over lambda from 0.1 to 0.9"),
    "nll": Measure("NLL", "negative log-likelihood on the test split", percent=False, lower_is_better=True),
    "nll_scaled": Measure("NLL scaled", "the same after temperature scaling", percent=False, lower_is_better=True),
    "ece": Measure("ECE", "calibration error over equal-width bins", lower_is_better=True),
    "ece_scaled": Measure("ECE scaled", "the same after temperature scaling", lower_is_better=True),
    "adaptive_ece": Measure("adaptive ECE", "calibration error over bins of equal counts", lower_is_better=True),
    "adaptive_ece_scaled": Measure("adaptive ECE scaled", "the same after temperature scaling", lower_is_better=True),
    "train_clean": Measure("training, clean", "accuracy on unmixed training images"),
    "train_mixed": Measure("training, mixed", "share-weighted accuracy on freshly mixed training images"),
    "train_ceiling": Measure("training, ceiling", "highest share-weighted accuracy that the mixed labels allow"),
}


def robustness_of_run(
    folder: Path, checkpoint: str = "last", data_path: str = "", *, samples: int = SAMPLES, keep: bool = False
) -> dict[str, Any]:
    """Measure a run and write `robustness.json` into its folder.

    Args:
        folder: run folder.
        checkpoint: "last", "best" or a step number.
        data_path: where the data set is, if it has moved since the training.
        samples: at most so many test images are changed, and so many training images looked at (stratified subsets).
            Calibration always takes the whole test split.
        keep: return what the folder holds already if it is of the same checkpoint and number of samples.
    Returns:
        What was written; the module's docstring describes it.
    """
    folder = Path(folder)
    samples = _check.integer("robustness", "samples", samples, 1)
    if keep and (known := _known(folder, checkpoint, samples)) is not None:
        return known
    run = load_run(folder, checkpoint, data_path)
    if not isinstance(run.task, Classification):
        raise ValueError(
            f"robustness: {folder} holds a run of task {run.task.recipe.task}; it is measured for image classes."
        )
    recipe, data = run.task.recipe, run.task.data
    model = _OnPixels(run).eval()
    images, labels = _subset(run.task.test_set, samples)
    on: dict[str, Any] = {"device": run.device}
    held_out = _logits(model, run.task.validation_set, run.device) if len(run.task.validation_set) else None
    calibration = _calibration(run, model, held_out)
    training = _training(run, model, folder, samples, held_out)
    result: dict[str, Any] = {
        "format": FORMAT,
        "name": recipe.name,
        "seed": recipe.seed,
        "policy": recipe.policy.name if recipe.policy else "none",
        "objective": recipe.objective.name,
        "checkpoint": checkpoint,
        "step": run.step,
        "samples": samples,
        "versions": _versions(),
        "data": {
            "name": data.name,
            "test": len(images),
            "test_all": len(run.task.test_set),
            "validation": len(run.task.validation_set),
            "train": training.pop("images"),
        },
        "clean": accuracy(model, images, labels, **on),
        "occlusion": occlusion_accuracy(
            model, images, labels, fill=data.mean, generator=generator(0, "occlusion"), **on
        ),
        "fgsm": fgsm_accuracy(model, images, labels, **on),
        "corruptions": corruption_accuracy(model, images, labels, seed=derive(0, "corruptions") % 2**32, **on),
        "mixed": {
            kind: mixed_accuracy_curve(model, images, labels, kind, generator=generator(0, "mixed"), **on)
            for kind in KINDS
            if not certain(f"{kind}_both", len(data.train.class_names))
        },
        "calibration": calibration,
        "training": training,
    }
    result["headline"] = headline(result)
    write_json(folder / FILE, result)
    return result


def robustness_of_comparison(
    folder: Path, data_path: str = "", *, samples: int = SAMPLES, watch: Watch | None = None
) -> dict[str, Any]:
    """Measure every run of a comparison, and write means with intervals into its folder.

    A run is measured at the checkpoint that its recipe chooses, as the comparison's own table is.

    Runs that were measured already (same checkpoint, same samples) are kept, so the same call goes on after an
    interruption.

    Returns:
        What was written; the module's docstring describes it. A measure that some run lacks is left out.
    """
    folder = Path(folder)
    comparison = json.loads((folder / "comparison.json").read_text("utf-8"))
    entries = comparison["runs"]
    if not entries:
        raise ValueError(f"robustness: comparison.json of {folder} lists no runs; finish the comparison first.")
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for number, entry in enumerate(entries):
        place = (folder / entry["folder"]).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise ValueError(
                f"robustness: comparison.json names the folder {entry['folder']!r}, which is outside {folder}."
            )
        if watch is not None:
            watch(number, len(entries), f"{entry['name']} seed {entry['seed']}")
        measured = robustness_of_run(place, chosen_checkpoint(place), data_path, samples=samples, keep=True)
        results.setdefault(entry["name"], {})[entry["seed"]] = measured
    seeds = sorted(set.intersection(*(set(runs) for runs in results.values())))
    if not seeds:
        raise ValueError(f"robustness: the recipes of {folder} share no seed; finish the comparison first.")
    ordered = {name: [runs[seed] for seed in seeds] for name, runs in results.items()}
    everything = [run["headline"] for runs in ordered.values() for run in runs]
    measures = [key for key in MEASURES if all(numbers.get(key) is not None for numbers in everything)]
    result = {
        "format": FORMAT,
        "title": comparison.get("title", ""),
        "seeds": seeds,
        "samples": samples,
        "measures": measures,
        "runs": [{key: entry[key] for key in ("name", "seed", "folder")} for entry in entries],
        "table": _table(ordered, measures),
    }
    write_json(folder / FILE, result)
    return result


def headline(result: dict[str, Any]) -> dict[str, float | None]:
    """A number for each of `MEASURES` that a run's result has; None where it could not be measured."""
    calibration, training = result["calibration"], result["training"]
    damaged = [value for values in result["corruptions"]["accuracy"].values() for value in values]
    occlusion = result["occlusion"]
    hidden = [a for rate, a in zip(occlusion["rates"], occlusion["accuracy"], strict=True) if rate > 0]
    after = calibration["after"] or {}
    return {
        "clean": result["clean"],
        "occluded": _mean(hidden),
        "fgsm": _mean(result["fgsm"]["accuracy"]),
        "corrupted": _mean(damaged),
        **{f"{kind}_both": _mean(curve["both"]) for kind, curve in result["mixed"].items()},
        **{key: calibration["before"][key] for key in ("nll", "ece", "adaptive_ece")},
        **{f"{key}_scaled": after.get(key) for key in ("nll", "ece", "adaptive_ece")},
        **{f"train_{key}": training[key] for key in ("clean", "mixed", "ceiling")},
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A run's result as (measure, over what, values) for a compact table."""

    def series(values: Sequence[float]) -> str:
        return "  ".join(f"{100 * value:5.1f}" for value in values)

    def errors(measured: dict[str, Any]) -> str:
        return f"{measured['nll']:.4f}  {100 * measured['ece']:.2f} %  {100 * measured['adaptive_ece']:.2f} %"

    occlusion, calibration = result["occlusion"], result["calibration"]
    table = [("clean", f"{result['data']['test']:,} test images", series([result["clean"]]))]
    told = "  ".join(f"{100 * rate:4.0f}%" for rate in occlusion["rates"])
    table.append(("occlusion", f"of the patches: {told}", series(occlusion["accuracy"])))
    told = "  ".join(f"{255 * epsilon:.3g}" for epsilon in result["fgsm"]["epsilons"])
    table.append(("FGSM", f"epsilon x 255: {told}", series(result["fgsm"]["accuracy"])))
    for name, values in result["corruptions"]["accuracy"].items():
        table.append((name, "severity 1 to 5", series(values)))
    for kind, curve in result["mixed"].items():
        told = "  ".join(f"{lam:.1f}" for lam in curve["lam"])
        table.append((f"{kind}: both in top 2", f"lambda: {told}", series(curve["both"])))
    table.append(("calibration", "NLL, ECE, adaptive ECE", errors(calibration["before"])))
    if calibration["after"]:
        table.append(("calibrated", f"temperature {calibration['temperature']:.3f}", errors(calibration["after"])))
    known = {key: value for key, value in result["training"].items() if value is not None}
    table.append(
        ("accuracy", ", ".join(f"training {k}" if k != "validation" else k for k in known), series([*known.values()]))
    )
    return table


def comparison_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A comparison's result for a table: the heads, and a line for each measure with "mean +- half the interval"."""

    def cell(value: dict[str, Any], measure: Measure) -> str:
        scale, digits = (100.0, 1) if measure.percent else (1.0, 4)
        half = "" if value["low"] is None else f" +-{scale * (value['high'] - value['low']) / 2:.{digits}f}"
        return f"{scale * value['mean']:.{digits}f}{half}"

    table = [
        [MEASURES[key].label, *(cell(row["measures"][key], MEASURES[key]) for row in result["table"])]
        for key in result["measures"]
    ]
    return ["measure", *(row["name"] for row in result["table"])], table


class _OnPixels(nn.Module):
    """The run's model from pixels in 0..1 to logits."""

    def __init__(self, run: LoadedRun) -> None:
        super().__init__()
        self.model = run.model
        self.normalize = run.task.normalize
        self.channels_last = run.task.recipe.train.channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        return self.model(x.contiguous(memory_format=torch.channels_last) if self.channels_last else x)


def _subset(images: ImageSet, samples: int) -> tuple[Tensor, Tensor]:
    """At most `samples` images with the classes in their shares, the same for every run on this data."""
    index, classes = torch.arange(len(images)), len(images.labels.unique())
    if samples < min(classes, len(images)):
        raise ValueError(
            f"robustness: samples is {samples}, fewer than the {classes} classes; pass at least {classes}."
        )
    if samples < len(images):
        index = stratified_subset(images.labels, samples, seed=0)
    return images.batch(index), images.labels[index]


def _logits(model: nn.Module, images: ImageSet, device: torch.device) -> Tensor:
    """(N, C) logits of a whole split, which may be too large to hold its pixels."""
    return torch.cat([predict(model, images.batch(i), device=device) for i in torch.arange(len(images)).split(1000)])


def _calibration(run: LoadedRun, model: nn.Module, held_out: Tensor | None) -> dict[str, Any]:
    """Test split before and after the temperature that the validation split, with the logits `held_out`, asks for."""
    test, labels = _logits(model, run.task.test_set, run.device), run.task.test_set.labels
    result: dict[str, Any] = {"temperature": None, "before": calibration_metrics(test, labels), "after": None}
    if held_out is not None:
        result["temperature"] = fit_temperature(held_out, run.task.validation_set.labels)
        result["after"] = calibration_metrics(test, labels, result["temperature"])
    return result


def _training(run: LoadedRun, model: _OnPixels, folder: Path, samples: int, held_out: Tensor | None) -> dict[str, Any]:
    """Accuracy of the final weights on training images, unmixed and mixed as in the last step, and what is possible."""
    task, train = run.task, run.task.recipe.train
    images, labels = _subset(task.train_set, samples)
    schedule = Schedule(task.stages(), train.batch_size, train.warmup_epochs)
    task.start_step((run.step - 1) / schedule.steps)
    # A hidden layer is mixed in training mode only: the final weights can't be asked in evaluation mode.
    hidden = [m for m in task.policy.modules() if isinstance(m, ManifoldMixup)] if task.policy is not None else []
    right, possible = 0.0, 0.0
    order = torch.randperm(len(images), generator=generator(0, "probe"))
    for part, index in enumerate(order.split(schedule.batch_size)):
        draws = generator(0, "probe-mix", part)
        x = task.augment(images[index], generator=draws).to(torch.float32).to(run.device) / 255.0
        y = labels[index].to(run.device)
        target = MixedTarget(y[:, None], torch.ones_like(y[:, None], dtype=torch.float32))
        if task.policy is not None:
            x, target = task.policy(x, y, generator=draws)
        logits = _seen_by_policies(model, x)
        if task.policy is not None:
            target = task.policy.relabel(logits, target)
            task.policy.disarm()
        right += mixed_accuracy(logits, target).item() * len(index)
        possible += _largest_share(target).sum().item()
    validation = None
    if held_out is not None:
        validation = int((held_out.argmax(1) == task.validation_set.labels).sum()) / len(held_out)
    return {
        "images": len(images),
        "clean": accuracy(model, images, labels, device=run.device),
        "mixed": None if hidden else right / len(images),
        "ceiling": possible / len(images),
        "logged": _logged(folder, run.step - schedule.steps_per_epoch[-1], run.step),
        "validation": validation,
    }


def _seen_by_policies(model: _OnPixels, x: Tensor) -> Tensor:
    """(N, C) logits in evaluation mode, from a forward that policies read as one of the training.

    They go by the mode of the model as a whole. Its parts stay as they are: nothing is dropped, no statistic moves.
    """
    model.model.training = True
    try:
        with torch.no_grad():
            return model(x).float()
    finally:
        model.model.training = False


def _largest_share(target: MixedTarget) -> Tensor:
    """(N,) the most that naming one class can earn: its weights together, where a label is there twice."""
    same = target.labels[:, :, None] == target.labels[:, None, :]  # (N, K, K)
    return (same * target.weights[:, None, :]).sum(2).amax(1).clamp(max=1.0)


def _logged(folder: Path, after: int, until: int) -> float | None:
    """Mean mixed accuracy of the log's lines in a range of steps."""
    values = []
    try:
        for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "train" and after < record["step"] <= until:
                values.append(float(record["accuracy"]))
    except (OSError, ValueError, KeyError, TypeError):  # the log is for people; a damaged one stops no measurement
        return None
    return _mean(values) if values else None


def _known(folder: Path, checkpoint: str, samples: int) -> dict[str, Any] | None:
    """The folder's result, if it is of this checkpoint and these samples."""
    try:
        stored = json.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    steps = {"last": max(list_steps(folder / "checkpoints"), default=None), "best": best_step(folder / "checkpoints")}
    step = int(checkpoint) if checkpoint.isdigit() else steps.get(checkpoint)
    wanted = {"format": FORMAT, "checkpoint": checkpoint, "step": step, "samples": samples, "versions": _versions()}
    return stored if isinstance(stored, dict) and all(stored.get(k) == v for k, v in wanted.items()) else None


def _versions() -> dict[str, str]:
    return {"hardmix": __version__, "torch": torch.__version__}


def _table(ordered: dict[str, list[dict[str, Any]]], measures: Sequence[str]) -> list[dict[str, Any]]:
    """Means over the seeds, and the paired difference of each recipe from the first, Holm-corrected over recipes."""

    def values(runs: list[dict[str, Any]], key: str) -> list[float]:
        return [run["headline"][key] for run in runs]

    first = next(iter(ordered.values()))
    table = []
    for name, runs in ordered.items():
        row: dict[str, Any] = {"name": name, **{key: runs[0][key] for key in ("policy", "objective")}}
        row["measures"] = {
            key: mean_interval(values(runs, key))._asdict() | {"values": values(runs, key)} for key in measures
        }
        row["versus_first"] = None
        if runs is not first and len(runs) > 1:
            row["versus_first"] = {
                key: paired_test(values(runs, key), values(first, key))._asdict() for key in measures
            }
        row["curves"] = {
            "occlusion": _curve([(run["occlusion"]["rates"], run["occlusion"]["accuracy"]) for run in runs]),
            **{
                kind: _curve([(run["mixed"][kind]["lam"], run["mixed"][kind]["both"]) for run in runs])
                for kind in runs[0]["mixed"]
            },
        }
        table.append(row)
    tested = [row["versus_first"] for row in table if row["versus_first"]]
    for key in measures:
        for test, p in zip(tested, holm([test[key]["p"] for test in tested]), strict=True):
            test[key]["p_holm"] = p
    return table


def _curve(pairs: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Mean and 95 % interval at each point; the runs of a comparison share their points."""
    intervals = [mean_interval(column) for column in zip(*(y for _, y in pairs), strict=True)]
    return {"x": pairs[0][0], **{key: [getattr(i, key) for i in intervals] for key in ("mean", "low", "high")}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
