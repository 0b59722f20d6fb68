"""The tables and the plot of docs/evidence/m2mix.md, from the results beside this file.

    python benchmarks/evidence/m2mix/page.py            # writes them again
    python benchmarks/evidence/m2mix/page.py --check    # says whether they are what the results give

A table stands between `<!-- evidence: NAME -->` and `<!-- end -->`; the words around it are written by hand.
Differences are paired by seed. The tests of one column are one family, with Holm's correction.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from groups import AFTER, BASE, TRIED, ZERO_SHOT

from hardmix.metrics.statistics import PairedTest, paired_test

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Cell, Measure, columns_of_tests, read_rows, table, values_table, with_half_width, write_page

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[3] / "docs" / "evidence"
PAGE = DOCS / "m2mix.md"
METHODS = (*TRIED, *AFTER)
TITLES = {
    ZERO_SHOT: "not tuned",
    BASE: "CLIP",
    "clip-fixed": "CLIP, fixed temperature",
    "hcl": "HCL",
    "cyclip": "CyCLIP",
    "m2-mix": "m2-Mix",
    "m3-mix": "m3-Mix",
    "wise-ft": "CLIP, WiSE-FT",
    "embedding-shift": "CLIP, shifted",
}
MODELS = {"dual": "MobileNetV2 + MiniLM, frozen, linear layers tuned", "small": "small towers, all tuned"}
#: metric -> (heading, factor, digits); shares in per cent
RETRIEVAL: dict[str, Measure] = {
    "recall_1": ("R@1", 100, 1),
    "recall_5": ("R@5", 100, 1),
    "mrr": ("MRR", 100, 1),
    "unseen_twemoji_mrr": ("MRR, Twemoji", 100, 1),
    "unseen_fluent_mrr": ("MRR, Fluent", 100, 1),
    "seen_twemoji_mrr": ("MRR, Twemoji, seen", 100, 1),
    "seen_fluent_mrr": ("MRR, Fluent, seen", 100, 1),
}
OTHERS: dict[str, Measure] = {
    "ece": ("ECE", 100, 1),
    "ece_scaled": ("ECE, scaled", 100, 1),
    "shift_ece": ("ECE, other styles", 100, 1),
    "zeroshot": ("zero-shot", 100, 1),
    "fewshot_4": ("4-shot", 100, 1),
    "shift_fewshot_4": ("4-shot, other styles", 100, 1),
    "arithmetic": ("arithmetic", 100, 1),
    "alignment": ("alignment", 1, 3),
    "uniformity": ("uniformity", 1, 3),
    "gap": ("gap", 1, 3),
}
ALL = RETRIEVAL | OTHERS


class Study(NamedTuple):
    """One model: how its numbers came about, and its runs by method, in the order of the seeds."""

    name: str
    about: dict[str, Any]
    runs: dict[str, dict[str, list[float]]]

    def test(self, method: str, metric: str) -> PairedTest:
        return paired_test(self.runs[method][metric], self.runs[BASE][metric])


def read_studies() -> list[Study]:
    """What was run, in the order in which the page shows it."""
    return [
        Study(name, json.loads(path.with_suffix(".json").read_text("utf-8")), read_rows(path))
        for name in MODELS
        if (path := RESULTS / f"{name}.csv").is_file()
    ]


STUDIES = read_studies()


def differences(study: Study, measures: dict[str, Measure]) -> str:
    """What each method changes against plain CLIP, a column for each measure, each one family of tests."""
    known = [key for key in measures if key in study.runs[BASE]]
    methods = [method for method in METHODS if method in study.runs]
    rows: list[list[Cell]] = [[(study.test(method, key), key) for key in known] for method in methods]
    cells = columns_of_tests(rows, measures)
    lines = [[TITLES[method], *line] for method, line in zip(methods, cells, strict=True)]
    return table(["", *(measures[key][0] for key in known)], lines)


def settings() -> str:
    """What was chosen for each method on validation emoji, and the rank that it had there and the best and worst."""
    lines = []
    for study in STUDIES:
        for method, tried in study.about["tried"].items():
            best = max(tried, key=lambda name: tried[name])
            ranks = [f"{100 * value:.2f}" for value in (tried[best], min(tried.values()))]
            lines.append([MODELS[study.name], TITLES[method], best.removeprefix(f"{method}-"), *ranks])
    return table(["model", "method", "chosen", "its MRR on validation", "that of the worst setting"], lines)


def missing() -> str:
    """Missing modalities: accuracy by how many there are, and what mixtures change against GMC alone."""
    about = json.loads((RESULTS / "missing.json").read_text("utf-8"))
    tested, kinds = about["tested"], {key: key.split("-")[-1] for key in about["against_gmc"]}
    together = "+".join(about["data"]["features"])
    keys = {"one": "one of the three", "two": "two", together: "all three", "all subsets": "mean of all seven subsets"}
    accuracy: Measure = ("accuracy", 100, 1)
    columns = [
        columns_of_tests(
            [[(PairedTest(*about["against_gmc"][kind][key]), "accuracy")] for key in keys], {"accuracy": accuracy}
        )
        for kind in kinds
    ]
    lines = [
        [
            title,
            *(with_half_width(tested[method][key], accuracy) for method in ("none", "gmc")),
            *(column[place][0] for column in columns),
        ]
        for place, (key, title) in enumerate(keys.items())
    ]
    return table(["there", "cross entropy alone", "GMC", *(f"m2-Mix of {kind}" for kind in kinds)], lines)


def parts() -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {"settings": settings, "missing": missing}
    for study in STUDIES:
        for name, measures in (("retrieval", RETRIEVAL), ("others", OTHERS)):
            found[f"{study.name} {name}"] = partial(values_table, study.runs, TITLES, measures)
            found[f"{study.name} {name} differences"] = partial(differences, study, measures)
    return found


PARTS = parts()


def draw() -> None:
    import plots

    plots.draw(DOCS)


def main(arguments: list[str] | None = None) -> int:
    return write_page(PAGE, PARTS, draw, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
