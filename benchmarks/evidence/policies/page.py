"""The tables and the plot of docs/evidence/policies.md, from the results beside this file.

    python benchmarks/evidence/policies/page.py            # writes them again
    python benchmarks/evidence/policies/page.py --check    # says whether they are what the results give

A table stands between `<!-- evidence: NAME -->` and `<!-- end -->`; the words around it are written by hand.
Differences are paired by seed. The tests of one column are one family, with Holm's correction.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from groups import DYNAMIC, STATIC, TOKENS

from hardmix.metrics.statistics import paired_test
from hardmix.report.text import TITLES as POLICY_TITLES

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Cell, Measure, Study, columns_of_tests, read_studies, table, with_half_width, write_page

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[3] / "docs" / "evidence"
PAGE = DOCS / "policies.md"
MEASURES: dict[str, Measure] = {
    "top1": ("top-1", 100, 1),
    "nll": ("NLL", 1, 2),
    "ece": ("ECE", 100, 1),
    "occluded": ("occluded", 100, 1),
    "fgsm": ("FGSM", 100, 1),
    "corrupted": ("corrupted", 100, 1),
}
TITLES = {**POLICY_TITLES, "sumix": "SUMix of CutMix", "supermix": "SuperMix, 5 steps"}
CE, DM = "ce", "dm"
#: comparison -> heading
SHOWN = {
    "fashion-2400": "Fashion-MNIST 2,400, small-resnet",
    "fashion-2400-vit": "Fashion-MNIST 2,400, tiny-vit",
    "cifar10-5000": "CIFAR-10 5,000, small-resnet",
    "cifar10-50000-resnet18": "CIFAR-10, ResNet-18",
}


def policies_of(study: Study) -> list[str]:
    return [method.removesuffix(f"-{CE}") for method in study.runs if method.endswith(f"-{CE}")]


def measures_of(study: Study) -> dict[str, Measure]:
    """Those of MEASURES that its runs were asked for."""
    return {key: measure for key, measure in MEASURES.items() if key in study.runs["none"]}


STUDIES = read_studies(RESULTS, SHOWN)


def step(study: Study, policy: str) -> float:
    """What a training step took in these runs, in those of Mixup: medians, so that a run that was held up is none."""
    own, mixup = (
        statistics.median(
            [ms for method, run in study.runs.items() if _policy(method) == name for ms in run["ms_per_step"]]
        )
        for name in (policy, "mixup")
    )
    return own / mixup


def _policy(method: str) -> str:
    return method.removesuffix(f"-{CE}").removesuffix(f"-{DM}")


def accuracy(study: Study) -> str:
    """Cost, accuracy with both losses, what the policy changes against Mixup and what the loss changes."""
    rows: list[list[Cell]] = []
    for name in policies_of(study):
        against = None if name == "mixup" else (study.test(f"{name}-{CE}", f"mixup-{CE}", "top1"), "top1")
        rows.append([against, (study.test(f"{name}-{DM}", f"{name}-{CE}", "top1"), "top1")])
    cells = columns_of_tests(rows, MEASURES)
    lines = [
        [
            "no mixing",
            f"{step(study, 'none'):.2f}",
            with_half_width(study.runs["none"]["top1"], MEASURES["top1"]),
            "-",
            "-",
            "-",
        ]
    ]
    for name, (against, change) in zip(policies_of(study), cells, strict=True):
        ce, dm = (with_half_width(study.runs[f"{name}-{key}"]["top1"], MEASURES["top1"]) for key in (CE, DM))
        lines.append([TITLES[name], f"{step(study, name):.2f}", ce, against, dm, change])
    return table(["", "step", "top-1", "- Mixup", "top-1 with DM", "DM - CE"], lines)


def measures(study: Study) -> str:
    """What is left of the accuracy where images are spoilt, and calibration, with cross entropy / with DM."""
    keys = [key for key in measures_of(study) if key != "top1"]
    lines = [["no mixing", *(with_half_width(study.runs["none"][key], MEASURES[key]) for key in keys)]]
    for name in policies_of(study):
        pairs = [[_mean(study.runs[f"{name}-{loss}"][key], MEASURES[key]) for loss in (CE, DM)] for key in keys]
        lines.append([TITLES[name], *(" / ".join(pair) for pair in pairs)])
    return table(["", *(MEASURES[key][0] for key in keys)], lines)


def _mean(values: list[float], measure: Measure) -> str:
    return f"{measure[1] * statistics.fmean(values):.{measure[2]}f}"


def kinds(study: Study) -> str:
    """Means over the policies of a kind, seed by seed, and what they differ in: nothing is picked."""
    kind = {"static": list(STATIC), "dynamic": [*DYNAMIC, *TOKENS]}
    means = {
        f"{title} {loss}": {key: _over(study, names, loss, key) for key in measures_of(study)}
        for title, names in kind.items()
        for loss in (CE, DM)
    }
    pairs = (
        ("static: DM - CE", "static dm", "static ce"),
        ("dynamic: DM - CE", "dynamic dm", "dynamic ce"),
        ("dynamic - static, both CE", "dynamic ce", "static ce"),
        ("static with DM - dynamic with CE", "static dm", "dynamic ce"),
    )
    rows: list[list[Cell]] = [
        [(paired_test(means[a][key], means[b][key]), key) for key in measures_of(study)] for _, a, b in pairs
    ]
    cells = columns_of_tests(rows, MEASURES)
    heads = ["", *(heading for heading, _, _ in measures_of(study).values())]
    return table(heads, [[title, *line] for (title, _, _), line in zip(pairs, cells, strict=True)])


def _over(study: Study, names: list[str], loss: str, key: str) -> list[float]:
    runs = [study.runs[f"{name}-{loss}"][key] for name in names if name in policies_of(study)]
    return [statistics.fmean(values) for values in zip(*runs, strict=True)]


def parts() -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {}
    for name, study in STUDIES.items():
        found[name] = partial(accuracy, study)
        found[f"{name} measures"] = partial(measures, study)
        found[f"{name} kinds"] = partial(kinds, study)
    return found


PARTS = parts()


def draw() -> None:
    import plots

    plots.draw(DOCS)


def main(arguments: list[str] | None = None) -> int:
    return write_page(PAGE, PARTS, draw, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
