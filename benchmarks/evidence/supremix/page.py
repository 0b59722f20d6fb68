"""The tables and plots of docs/evidence/supremix.md, from the results beside this file.

    python benchmarks/evidence/supremix/page.py            # writes them again
    python benchmarks/evidence/supremix/page.py --check    # says whether they are what the results give

A table stands between `<!-- evidence: NAME -->` and `<!-- end -->`; the words around it are written by hand.
Differences are paired by seed. Errors are in percent of the error of what they are compared with, since every set has a
unit of its own. The tests of a data set in one table are one family, with Holm's correction.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from groups import ABLATIONS, BASE, FROZEN, PLANS, TUNED

from hardmix.metrics.statistics import PairedTest, mean_interval, paired_test

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Cell, Measure, columns_of_tests, read_rows, table, with_half_width, write_page

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[3] / "docs" / "evidence"
PAGE = DOCS / "supremix.md"
METHODS = (BASE, *TUNED)
TITLES = {
    "l1": "L1",
    "c-mixup": "C-Mixup",
    "supcon": "SupCon",
    "rank-n-contrast": "Rank-N-Contrast",
    "supremix": "SupReMix",
    "supremix-joint": "SupReMix beside the head",
    "mix-neg-only": "Mix-neg alone",
    "mix-pos-only": "Mix-pos alone",
    "no-mixtures": "no mixtures",
    "no-dm": "no Distance Magnifying",
    "strong-dm": "Distance Magnifying, ten times as strong",
    "not-normalised": "mixtures not normalised",
    "detached": "mixtures detached",
}
DATA = {
    "diabetes": "Diabetes",
    "concrete": "Concrete",
    "airfoil": "Airfoil",
    "meats": "Meats",
    "sts-b-dir": "STS-B-DIR",
    "household-power": "Power",
    "molecules": "Molecules",
}
#: metric -> (heading, factor, digits)
METRICS: dict[str, Measure] = {
    "mae": ("MAE", 1, 3),
    "rmse": ("RMSE", 1, 3),
    "r2": ("R2", 1, 3),
    "spearman": ("Spearman", 1, 3),
    "ordinality": ("ordinality", 1, 3),
    "local_linearity": ("off the line", 1, 3),
}
#: how differences are shown: of an error as a share of the other's
CHANGES: dict[str, Measure] = {key: (key, 1, 1 if key == "mae" else 3) for key in METRICS}


Runs = dict[str, dict[str, list[float]]]


class Study(NamedTuple):
    """One data set: how its numbers came about, and its runs by method, in the order of the seeds."""

    name: str
    about: dict[str, Any]
    runs: Runs

    def test(self, method: str, base: str, metric: str) -> PairedTest:
        """The difference that a method makes; of an error in percent of the other's mean."""
        a, b = self.runs[method][metric], self.runs[base][metric]
        unit = sum(b) / len(b) / 100 if metric == "mae" else 1.0
        return paired_test([v / unit for v in a], [v / unit for v in b])

    def mean(self, method: str, metric: str) -> float:
        values = self.runs[method][metric]
        return sum(values) / len(values)


def read_studies(frozen: bool = False) -> list[Study]:
    """What was run, in the order in which the page shows it; `frozen`: with the encoder as pre-training leaves it.

    L1 has no pre-training; it stands beside the frozen ones with the same seeds.
    """
    studies = []
    for name in DATA:
        if not (path := RESULTS / f"{name}.csv").is_file():
            continue
        study = Study(name, json.loads(path.with_suffix(".json").read_text("utf-8")), read_rows(path))
        other = RESULTS / f"{name}-frozen.csv"
        if frozen and other.is_file():
            about = json.loads(other.with_suffix(".json").read_text("utf-8"))
            l1 = {metric: values[: len(about["seeds"])] for metric, values in study.runs[BASE].items()}
            studies.append(Study(name, about, {BASE: l1, **read_rows(other)}))
        elif not frozen:
            studies.append(study)
    return studies


STUDIES, FROZEN_STUDIES = read_studies(), read_studies(frozen=True)


def differences(metric: str, pairs: Sequence[tuple[str, str, str]], studies: Sequence[Study] | None = None) -> str:
    """A row for each (title, method, what it is compared with), a column for each set, each one family of tests.

    Where all sets are shown, the last column is their mean.
    """
    shown = STUDIES if studies is None else studies
    rows: list[list[Cell]] = [[(study.test(a, b, metric), metric) for study in shown] for _, a, b in pairs]
    lines = [[title, *cells] for (title, _, _), cells in zip(pairs, columns_of_tests(rows, CHANGES), strict=True)]
    head = ["", *(DATA[study.name] for study in shown)]
    if studies is None:
        head.append("mean of the sets")
        for line, row in zip(lines, rows, strict=True):
            line.append(_overall([cell[0].difference for cell in row if cell], metric))
    return table(head, lines)


def _overall(values: list[float], metric: str) -> str:
    """Every set counts once, and the interval is over the sets; shares of an error are averaged as factors."""
    relative = metric == "mae"
    interval = mean_interval([math.log1p(v / 100) for v in values] if relative else values)
    numbers = [v for v in interval if v is not None]
    digits = CHANGES[metric][2]
    mean, *around = (f"{100 * math.expm1(v) if relative else v:+.{digits}f}" for v in numbers)
    return f"{mean} [{', '.join(around)}]" if around else mean


def against_l1() -> list[tuple[str, str, str]]:
    return [(TITLES[method], method, BASE) for method in TUNED]


def against_neighbours() -> list[tuple[str, str, str]]:
    """SupReMix minus each of the others."""
    return [(f"minus {TITLES[method]}", "supremix", method) for method in METHODS if method != "supremix"]


def taken_out() -> list[tuple[str, str, str]]:
    """SupReMix with one thing changed, minus SupReMix."""
    return [(TITLES[name], f"supremix-{name}", "supremix") for name in ABLATIONS]


def frozen_against_l1() -> list[tuple[str, str, str]]:
    return [(TITLES[method], method, BASE) for method in FROZEN]


def sizes() -> str:
    rows = []
    for study in STUDIES:
        about, train = study.about, study.about["recipe"]["train"]
        data, model = about["data"], about["model"]
        first = PLANS[study.name].first_stage * train["epochs"] // PLANS[study.name].epochs
        rows.append(
            (
                DATA[study.name],
                data["target"],
                f"{data['train']:,} / {data['validation']:,} / {data['test']:,}",
                f"{model['name']}, {model['parameters']:,}",
                f"{train['epochs']} ({first} + {train['epochs'] - first})",
                f"{len(about['seeds'])}",
            )
        )
    return table(
        ("data", "target", "train / validation / test", "model, parameters of L1", "epochs (two stages)", "seeds"), rows
    )


def errors() -> str:
    """Mean errors, and the rank of each method in each set, averaged."""
    rows = []
    ranks = mean_ranks("mae")
    for method in METHODS:
        cells = [with_half_width(s.runs[method]["mae"], METRICS["mae"]) for s in STUDIES]
        rows.append((TITLES[method], *cells, f"{ranks[method]:.2f}"))
    return table(("MAE", *(DATA[study.name] for study in STUDIES), "mean rank"), rows)


def mean_ranks(metric: str) -> dict[str, float]:
    """Rank of a method's mean among the methods, averaged over the sets; 1 is the least."""
    total = dict.fromkeys(METHODS, 0.0)
    for study in STUDIES:
        order = sorted(METHODS, key=lambda m: study.mean(m, metric))
        for rank, method in enumerate(order, 1):
            total[method] += rank / len(STUDIES)
    return total


def embeddings() -> str:
    """Means of both measures of the test embeddings."""
    rows = []
    for key in ("ordinality", "local_linearity"):
        for method in METHODS:
            cells = [f"{study.mean(method, key):.3f}" for study in STUDIES]
            rows.append((METRICS[key][0], TITLES[method], *cells))
    return table(("", "", *(DATA[study.name] for study in STUDIES)), rows)


def together() -> str:
    """Do methods with more ordinal embeddings err less? Rank correlations, over methods and within each method."""
    rows = []
    for key in ("ordinality", "local_linearity"):
        between, within = [], []
        for study in STUDIES:
            means = [[study.mean(method, measure) for method in study.runs] for measure in (key, "mae")]
            between.append(f"{spearman(*means):+.2f}")
            apart = [
                spearman(study.runs[m][key], study.runs[m]["mae"]) for m in study.runs if len(study.runs[m]["mae"]) > 2
            ]
            within.append(f"{sum(apart) / len(apart):+.2f}")
        rows += [(METRICS[key][0], "between methods", *between), (METRICS[key][0], "between seeds", *within)]
    return table(("", "", *(DATA[study.name] for study in STUDIES)), rows)


def spearman(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def chosen() -> str:
    """What did best on validation rows, and how far the trials were apart."""
    rows = []
    for method in METHODS:
        cells = []
        for study in STUDIES:
            tried = study.about["tried"][method]
            best = min(tried, key=tried.__getitem__)
            cells.append(f"`{best.removeprefix(f'{method}-')}` {tried[best]:.3g} ({max(tried.values()):.3g})")
        rows.append((TITLES[method], *cells))
    return table(("", *(DATA[study.name] for study in STUDIES)), rows)


def all_numbers() -> str:
    text = []
    for study in STUDIES:
        about = study.about
        train, device = about["recipe"]["train"], "CPU" if about["device"] == "cpu" else about["device"]
        source = f"../../benchmarks/evidence/supremix/results/{study.name}"
        settings = (
            f"{train['epochs']} epochs, batches of {train['batch_size']}, {train['optimizer']}, lr {train['lr']:g}, "
            f"weight decay {train['weight_decay']:g}; {len(about['seeds'])} seeds; {device}, "
            f"torch {about['versions']['torch']}."
        )
        rows = [(f"`{m}`", *(with_half_width(study.runs[m][key], METRICS[key]) for key in METRICS)) for m in study.runs]
        head = ("method", *(heading for heading, _, _ in METRICS.values()))
        text.append(f"### {DATA[study.name]}\n\n{settings}")
        text.append(
            f"[{study.name}.csv]({source}.csv), what was tried and chosen in [{study.name}.json]({source}.json), by "
            f"`{about['command']}`.\n\n{table(head, rows)}"
        )
    return "\n".join(text)


PARTS: dict[str, Callable[[], str]] = {
    "sizes": sizes,
    "errors": errors,
    "against l1": lambda: differences("mae", against_l1()),
    "against neighbours": lambda: differences("mae", against_neighbours()),
    "taken out": lambda: differences("mae", taken_out()),
    "ordinality taken out": lambda: differences("ordinality", taken_out()),
    "ordinality": lambda: differences("ordinality", against_l1()),
    "local linearity": lambda: differences("local_linearity", against_l1()),
    "frozen against l1": lambda: differences("mae", frozen_against_l1(), FROZEN_STUDIES),
    "frozen ordinality": lambda: differences("ordinality", frozen_against_l1(), FROZEN_STUDIES),
    "frozen local linearity": lambda: differences("local_linearity", frozen_against_l1(), FROZEN_STUDIES),
    "frozen taken out": lambda: differences("mae", taken_out(), FROZEN_STUDIES),
    "frozen ordinality taken out": lambda: differences("ordinality", taken_out(), FROZEN_STUDIES),
    "frozen local linearity taken out": lambda: differences("local_linearity", taken_out(), FROZEN_STUDIES),
    "together": together,
    "chosen": chosen,
    "all numbers": all_numbers,
}


def draw() -> None:
    import plots

    plots.draw(DOCS)


def main(arguments: list[str] | None = None) -> int:
    return write_page(PAGE, PARTS, draw, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
