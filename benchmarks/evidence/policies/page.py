"""The tables and the plot of docs/evidence/policies.md, from the results beside this file.

    python benchmarks/evidence/policies/page.py            # writes them again
    python benchmarks/evidence/policies/page.py --check    # says whether they are what the results give

A table stands between `<!-- evidence: NAME -->` and `<!-- end -->`; the words around it are written by hand.
Differences are paired by seed. The tests of one column are one family, with Holm's correction. What a step costs is
that of benchmarks/results/policies.json, measured on an idle machine.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from groups import DYNAMIC, STATIC, TOKENS

from hardmix.metrics.statistics import PairedTest, paired_test

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Cell, Measure, columns_of_tests, read_rows, table, with_half_width, write_page

RESULTS = Path(__file__).parent / "results"
COSTS = Path(__file__).parents[2] / "results" / "policies.json"
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
TITLES = {
    "none": "no mixing",
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "smoothmix": "SmoothMix",
    "fmix": "FMix",
    "gridmix": "GridMix",
    "resizemix": "ResizeMix",
    "saliencymix": "SaliencyMix",
    "guidedmix": "GuidedMix",
    "manifold-mixup": "Manifold Mixup",
    "attentivemix": "AttentiveMix",
    "snapmix": "SnapMix",
    "puzzlemix": "PuzzleMix",
    "co-mixup": "Co-Mixup",
    "automix": "AutoMix",
    "samix": "SAMix",
    "adautomix": "AdAutoMix",
    "alignmix": "AlignMix",
    "sumix": "SUMix of CutMix",
    "supermix": "SuperMix, 5 steps",
    "transmix": "TransMix",
    "tokenmix": "TokenMix",
    "mixpro": "MixPro",
    "smmix": "SMMix",
    "tl-align": "TL-Align",
    "mergemix": "MergeMix",
}
CE, DM = "ce", "dm"
#: comparison -> heading
SHOWN = {
    "fashion-2400": "Fashion-MNIST 2,400, small-resnet",
    "fashion-2400-vit": "Fashion-MNIST 2,400, tiny-vit",
    "cifar10-5000": "CIFAR-10 5,000, small-resnet",
    "cifar10-50000-resnet18": "CIFAR-10, ResNet-18",
}
#: how the shape of the cost table is called that stands for these images
COST_SHAPE = "128x3x32x32"


class Study(NamedTuple):
    """One comparison: how its numbers came about, and its runs by method, in the order of the seeds."""

    name: str
    about: dict[str, Any]
    runs: dict[str, dict[str, list[float]]]

    @property
    def policies(self) -> list[str]:
        return [method.removesuffix(f"-{CE}") for method in self.runs if method.endswith(f"-{CE}")]

    @property
    def measures(self) -> dict[str, Measure]:
        """Those of MEASURES that its runs were asked for."""
        return {key: measure for key, measure in MEASURES.items() if key in self.runs["none"]}

    def test(self, method: str, base: str, key: str = "top1") -> PairedTest:
        return paired_test(self.runs[method][key], self.runs[base][key])


def read_studies() -> dict[str, Study]:
    """What was run, in the order in which the page shows it."""
    paths = {name: RESULTS / f"{name}.csv" for name in SHOWN}
    return {
        name: Study(name, json.loads(path.with_suffix(".json").read_text("utf-8")), read_rows(path))
        for name, path in paths.items()
        if path.is_file()
    }


def step_costs() -> dict[str, float]:
    """Policy -> a training step with it, in those with Mixup on the same model."""
    tables = json.loads(COSTS.read_text("utf-8"))["tables"]
    rows = next(t["rows"] for t in tables if t["shape"] == COST_SHAPE and t["allocator"] == "default")
    return {name.replace("no mixing", "none"): row["step"] for name, row in rows.items()}


STUDIES = read_studies()
STEP = step_costs()


def cost(policy: str) -> str:
    return f"{STEP[policy]:.2f}"


def accuracy(study: Study) -> str:
    """Cost, accuracy with both losses, what the policy changes against Mixup and what the loss changes."""
    rows: list[list[Cell]] = []
    for name in study.policies:
        against = None if name == "mixup" else (study.test(f"{name}-{CE}", f"mixup-{CE}"), "top1")
        rows.append([against, (study.test(f"{name}-{DM}", f"{name}-{CE}"), "top1")])
    cells = columns_of_tests(rows, MEASURES)
    lines = [["no mixing", cost("none"), with_half_width(study.runs["none"]["top1"], MEASURES["top1"]), "-", "-", "-"]]
    for name, (against, change) in zip(study.policies, cells, strict=True):
        ce, dm = (with_half_width(study.runs[f"{name}-{key}"]["top1"], MEASURES["top1"]) for key in (CE, DM))
        lines.append([TITLES[name], cost(name), ce, against, dm, change])
    return table(["", "step", "top-1", "- Mixup", "top-1 with DM", "DM - CE"], lines)


def measures(study: Study) -> str:
    """What is left of the accuracy where images are spoilt, and calibration, with cross entropy / with DM."""
    keys = [key for key in study.measures if key != "top1"]
    lines = [["no mixing", *(with_half_width(study.runs["none"][key], MEASURES[key]) for key in keys)]]
    for name in study.policies:
        pairs = [[_mean(study.runs[f"{name}-{loss}"][key], MEASURES[key]) for loss in (CE, DM)] for key in keys]
        lines.append([TITLES[name], *(" / ".join(pair) for pair in pairs)])
    return table(["", *(MEASURES[key][0] for key in keys)], lines)


def _mean(values: list[float], measure: Measure) -> str:
    return f"{measure[1] * statistics.fmean(values):.{measure[2]}f}"


def kinds(study: Study) -> str:
    """Means over the policies of a kind, seed by seed, and what they differ in: nothing is picked."""
    kind = {"static": list(STATIC), "dynamic": [*DYNAMIC, *TOKENS]}
    means = {
        f"{title} {loss}": {key: _over(study, names, loss, key) for key in study.measures}
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
        [(paired_test(means[a][key], means[b][key]), key) for key in study.measures] for _, a, b in pairs
    ]
    cells = columns_of_tests(rows, MEASURES)
    heads = ["", *(heading for heading, _, _ in study.measures.values())]
    return table(heads, [[title, *line] for (title, _, _), line in zip(pairs, cells, strict=True)])


def _over(study: Study, names: list[str], loss: str, key: str) -> list[float]:
    runs = [study.runs[f"{name}-{loss}"][key] for name in names if name in study.policies]
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
