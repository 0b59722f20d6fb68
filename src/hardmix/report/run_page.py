"""What the page of one run shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from hardmix.report import number_plots, pair_page, plots
from hardmix.report.folder import MAX_SAMPLES, RunFolder
from hardmix.report.plots import Line, Plot
from hardmix.report.robustness_plots import Cell, Head, Row, Table, section
from hardmix.report.samples import samples
from hardmix.report.text import (
    MIXED,
    count,
    dig,
    duration,
    is_pairs,
    metric,
    number,
    plain,
    show,
    step_seconds,
    telling,
    things_of,
    title_of,
    visible,
)
from hardmix.report.verdict import run_verdict

#: Width of the learning curves in CSS pixels: two stand side by side.
WIDE = 380


class Reading(NamedTuple):
    """One line of the table of test metrics."""

    label: str
    value: str
    about: str
    lower: bool


class Share(NamedTuple):
    """One bar of the measure on hard mixed samples."""

    label: str
    about: str
    value: str
    width: str


def run_context(run: RunFolder) -> dict[str, Any]:
    """Everything that run.html.j2 asks for."""
    summary = run.summary
    test = dig(summary, "test")
    test = {str(key): number(value) for key, value in test.items()} if isinstance(test, dict) else {}
    test = {key: value for key, value in test.items() if telling(key, summary)}
    notes = list(run.notes)
    names = class_names(summary)
    diagram = dig(summary, "reliability")
    reliability = None
    if isinstance(diagram, dict):
        alt = f"Reliability diagram over 15 bins of confidence; calibration error {show('ece', test.get('ece'))}."
        reliability = plots.reliability(diagram, alt)
    if test and reliability is None and not is_pairs(summary) and not {"scatter", "missing"} & summary.keys():
        notes.append("The summary holds no reliability diagram.")
    return {
        "title": summary.get("name") or run.path.name or "run",
        "finished": run.finished,
        "verdict": run_verdict(run),
        "facts": _facts(summary),
        "notes": notes,
        "data_notes": _data_notes(summary),
        "metrics": [] if is_pairs(summary) else [_reading(*item) for item in test.items() if not is_mixed(item[0])],
        "pairs": pair_page.section(run, notes) if is_pairs(summary) else None,
        "missing": _missing(summary),
        "predictions": number_plots.predictions(summary),
        "curves": run_curves(run),
        "reliability": reliability,
        "reliability_caption": Markup(plots.RELIABILITY_CAPTION),
        "ece": Markup(" ECE&nbsp;{}.").format(show("ece", test.get("ece"))) if test.get("ece") is not None else "",
        "mixed": _mixed(test),
        "samples": samples(run.gallery, names, MAX_SAMPLES) if run.gallery is not None else [],
        "robustness": section(run.path),
        "recipe": run.recipe,
        "details": _details(summary),
    }


def _data_notes(summary: dict[str, Any]) -> list[str]:
    """What was wrong with the files, and was let pass because the recipe says so."""
    skipped, overlap = (dig(summary, "data", key) for key in ("skipped", "overlap"))
    notes = [f"{visible(both, 400)}, byte by byte." for both in (overlap if isinstance(overlap, list) else [])]
    if isinstance(skipped, list) and skipped:
        files = "1 file was" if len(skipped) == 1 else f"{count(len(skipped))} files were"
        notes.append(
            f"{files} left out, since what can't be read was to be skipped (the first: {visible(skipped[0], 200)})."
        )
    return notes


def is_mixed(key: str) -> bool:
    """Whether a metric is one of those on hard mixed samples."""
    policy, _, ending = key.rpartition("_")
    return bool(policy) and ending in MIXED


def class_names(summary: dict[str, Any]) -> Sequence[Any]:
    names = dig(summary, "data", "classes")
    return names if isinstance(names, list) else []


def _reading(key: str, value: float | None) -> Reading:
    known = metric(key)
    return Reading(known.label, show(key, value), known.about, known.lower_is_better)


def _mixed(test: dict[str, float | None]) -> list[dict[str, Any]]:
    """The hard-sample metrics grouped by the policy that mixed the test images."""
    groups: dict[str, list[Share]] = {}
    for key, value in test.items():
        if is_mixed(key):
            policy, _, ending = key.rpartition("_")
            label, about = MIXED[ending]
            width = f"{100 * min(1.0, max(0.0, value or 0.0)):.1f}"
            groups.setdefault(policy, []).append(Share(label, about, show(key, value, 1), width))
    return [{"title": title_of(policy), "rows": rows} for policy, rows in groups.items()]


def _missing(summary: dict[str, Any]) -> Table | None:
    """Accuracy for each subset of the modalities."""
    subsets = dig(summary, "missing", "subsets")
    found = {str(key): number(value) for key, value in subsets.items()} if isinstance(subsets, dict) else {}
    if not found:
        return None
    majority = number(dig(summary, "missing", "majority"))
    about = "Share of test samples whose class is told from these modalities, the others missing."
    if majority is not None:
        about += f" The largest class has {show('top1', majority, 1)}."
    rows = [Row(visible(key, 60).replace("+", " + "), "", [Cell(show("top1", found[key], 1))]) for key in found]
    return Table("", about, [Head("top-1")], rows)


def run_curves(run: RunFolder) -> list[tuple[Plot, str]]:
    """Loss, accuracy and learning rate over epochs, as far as the log has them."""
    drawn: list[tuple[Plot, str]] = []
    few = run.summary.get("task") == "few-labels"
    mixes = run.summary.get("policy") not in (None, "none") and not few
    x, contrast = plots.thin(run.train, "contrast")
    if x:
        span = f"from {plain(contrast[0], 3)} to {plain(contrast[-1], 3)} by epoch {plain(x[-1], 3)}"
        alt = f"Contrastive loss goes {span}."
        plot = plots.curves([Line(x, contrast, 1)], alt, y_label="contrastive loss", width=WIDE)
        drawn.append((plot, "Contrastive loss, of the embeddings."))
    x, loss = plots.thin(run.train, "loss")
    if x:
        alt = f"Training loss goes from {plain(loss[0], 3)} to {plain(loss[-1], 3)} over {plain(x[-1], 3)} epochs."
        caption = "Training loss on mixed batches." if mixes else "Training loss."
        drawn.append((plots.curves([Line(x, loss, 1)], alt, y_label="training loss", width=WIDE), caption))
    lines, told = [], []
    x, accuracy = plots.thin(run.train, "accuracy")
    if x:
        lines.append(Line(x, accuracy, 0, quiet=True))
        told.append(f"training accuracy ends at {show('top1', accuracy[-1], 1)}")
    x, probe = plots.thin(run.validation, "train_top1")
    if x:
        lines.append(Line(x, probe, 2, points=True))
        told.append(f"top-1 of training images as they are ends at {show('top1', probe[-1], 1)}")
    x, top1 = plots.thin(run.validation, "top1")
    if x:
        lines.append(Line(x, top1, 1, points=True))
        last, best = show("top1", top1[-1], 1), show("top1", max(top1), 1)
        told.append(f"validation top-1 ends at {last}, its highest is {best}")
    if lines:
        alt = f"Accuracy over epochs: {'; '.join(told)}."
        caption = "top-1 of the labelled samples" if few else "training top-1"
        caption = "share-weighted top-1 on mixed training batches; it can't reach 100 %" if mixes else caption
        plot = plots.curves(lines, alt, y_label="accuracy", percent=True, width=WIDE)
        blue = "Blue: validation top-1. " if top1 else ""
        orange = "Orange: top-1 of training images as they are. " if probe else ""
        drawn.append((plot, f"{blue}{orange}Grey: {caption}."))
    drawn += _pseudo_curves(run)
    x, recall = plots.thin(run.validation, "recall_5")
    if x:
        alt = f"Validation R@5 goes from {show('recall_5', recall[0], 1)} to {show('recall_5', recall[-1], 1)}."
        plot = plots.curves([Line(x, recall, 1, points=True)], alt, y_label="R@5", percent=True, width=WIDE)
        drawn.append((plot, "Validation R@5: how often the first five that are found include the right one."))
    for curve, key, label, caption in (
        (run.validation, "nll", "validation NLL", "Validation negative log-likelihood."),
        (run.validation, "mae", "validation MAE", "Validation mean absolute error."),
        (run.train, "lr", "learning rate", "Learning rate."),
    ):
        x, y = plots.thin(curve, key)
        if x:
            alt = f"{caption[:-1]}, from {plain(y[0], 3)} to {plain(y[-1], 3)}."
            drawn.append((plots.curves([Line(x, y, 1)], alt, y_label=label, zero=key == "lr", width=WIDE), caption))
    return drawn


def _pseudo_curves(run: RunFolder) -> list[tuple[Plot, str]]:
    """How many pseudo-classes were trusted, and how many were right, over epochs."""
    x, trusted = plots.thin(run.train, "trusted")
    if not x:
        return []
    known, right, trusted_known, of_trusted = (
        plots.thin(run.train, key)[1] for key in ("pseudo_known", "pseudo_right", "trusted_known", "trusted_right")
    )
    ends = f"{show('top1', trusted[-1], 1)} of the unlabelled samples are trusted at the end"
    plot = plots.curves([Line(x, trusted, 1)], f"{ends}.", y_label="trusted", percent=True, zero=True, width=WIDE)
    drawn = [(plot, "Share of the unlabelled samples whose pseudo-class counts, as much as it does.")]
    if not any(known):  # their true classes are not known
        return drawn
    right = [value / max(share, 1e-9) for value, share in zip(right, known, strict=True)]
    pairs = [(at, both / share) for at, both, share in zip(x, of_trusted, trusted_known, strict=True) if share > 0.0]
    lines = [Line(x, right, 0, quiet=True)]
    alt = f"Right pseudo-classes: {show('top1', right[-1], 1)} of all at the end."
    if pairs:
        lines.append(Line([at for at, _ in pairs], [share for _, share in pairs], 1))
        alt = f"{alt[:-1]}, {show('top1', pairs[-1][1], 1)} of the trusted ones."
    plot = plots.curves(lines, alt, y_label="right pseudo-classes", percent=True, width=WIDE)
    return [*drawn, (plot, "Right pseudo-classes. Blue: of the trusted ones; grey: of all.")]


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The line of facts below the title; what is not known is left out."""
    train = number(dig(summary, "data", "train"))
    pairs = [
        ("data", _text(dig(summary, "data", "name"))),
        (f"training {things_of(summary)}", _known(train, count)),
        ("of them labelled", _known(number(dig(summary, "data", "labelled")), count)),
        ("trained styles", listed(dig(summary, "data", "trained_styles"))),
        ("model", _text(dig(summary, "model", "name"))),
        ("parameters", _known(number(dig(summary, "model", "parameters")), count)),
        ("seed", _text(summary.get("seed"))),
        (
            "training time",
            _known(number(dig(summary, "seconds", "train")), duration) if step_seconds(summary) else None,
        ),
    ]
    return [(label, value) for label, value in pairs if value is not None]


def _details(summary: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = {key: number(dig(summary, "seconds", key)) for key in ("test", "total")}
    memory = number(summary.get("memory_mb"))
    things = things_of(summary)
    pairs = [
        ("policy", title_of(summary.get("policy")) if summary else None),
        ("objective", _objective(summary.get("objective"))),
        ("started from", _text(summary.get("start"))),
        ("amount of what was done after training", _chosen(summary.get("chosen"))),
        ("task", _text(summary.get("task"))),
        (f"validation {things}", _known(number(dig(summary, "data", "validation")), count)),
        (f"test {things}", _known(number(dig(summary, "data", "test")), count)),
        (f"test {things} in other styles", _known(number(dig(summary, "data", "shift")) or None, count)),
        ("concepts", _known(number(dig(summary, "data", "concepts")), count)),
        ("styles", listed(dig(summary, "data", "styles"))),
        ("classes", count(len(class_names(summary))) if class_names(summary) else None),
        ("data source", _text(dig(summary, "data", "source"))),
        ("data licence", _text(dig(summary, "data", "license"))),
        ("device", _text(summary.get("device"))),
        ("test time", _known(seconds["test"], duration)),
        ("time in all", _known(seconds["total"], duration)),
        ("time per step", _known(step_seconds(summary), step_time)),
        ("memory", None if memory is None else f"{count(memory)}\u00a0MB"),
        *versions(summary.get("versions")),
    ]
    return [(label, value) for label, value in pairs if value is not None]


def _objective(name: Any) -> str | None:
    """'SupReMix + L1'; None where nothing was trained."""
    if not isinstance(name, str):
        return None if name is None else title_of(name)
    return " + ".join(title_of(part) for part in name.split(" + ") if part != "none") or None


def _chosen(amounts: Any) -> str | None:
    """'alpha 0.4'."""
    known = amounts.items() if isinstance(amounts, dict) else ()
    return (
        ", ".join(f"{visible(key, 40)} {plain(v, 3)}" for key, value in known if (v := number(value)) is not None)
        or None
    )


def listed(names: Any) -> str | None:
    """'noto, twemoji'; None where there is no list."""
    return ", ".join(visible(name, 40) for name in names[:20]) or None if isinstance(names, list) else None


def versions(stored: Any) -> list[tuple[str, str]]:
    """(name, version) of each package that was used."""
    return [(visible(key, 40), visible(value)) for key, value in stored.items()] if isinstance(stored, dict) else []


def step_time(seconds: float | None) -> str:
    """'12.3 ms'."""
    return "n/a" if seconds is None or math.isnan(seconds) else f"{plain(1000 * seconds, 3)}\u00a0ms"


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else visible(value)


def _known(value: float | None, form: Any) -> str | None:
    return None if value is None else form(value)
