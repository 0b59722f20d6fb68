"""The tables and plots of docs/evidence/decoupled-mixup.md, from the results beside this file.

    python benchmarks/evidence/decoupled/page.py            # writes them again
    python benchmarks/evidence/decoupled/page.py --check    # says whether they are what the results give

A table stands between `<!-- evidence: NAME -->` and `<!-- end -->`; the words around it are written by hand.
Differences are paired by seed; each column of a table of differences is one family of tests, with Holm's correction.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from groups import MORE_ETAS, PAIR, PAPER_ALPHA, PAPER_ETAS, REST, USUAL_ALPHA

from hardmix.metrics.statistics import PairedTest, mean_interval, paired_test

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Cell, Measure, columns_of_tests, read_rows, table, with_half_width, write_page

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[3] / "docs" / "evidence"
PAGE = DOCS / "decoupled-mixup.md"
POLICIES = (*PAIR, *REST)
TITLES = {
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "fmix": "FMix",
    "resizemix": "ResizeMix",
    "manifold-mixup": "Manifold Mixup",
}
DATA = {"fashion-mini": "Fashion-MNIST", "cifar10": "CIFAR-10"}
#: metric -> (heading, factor, digits)
METRICS: dict[str, Measure] = {
    "top1": ("top-1 %", 100, 2),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE %", 100, 2),
    "mixup_both": ("both in Mixup %", 100, 1),
    "cutmix_both": ("both in CutMix %", 100, 1),
}


class Group(NamedTuple):
    """One comparison: where its numbers come from, and its runs by method, in the order of the seeds."""

    name: str
    about: dict[str, Any]
    runs: dict[str, dict[str, list[float]]]

    @property
    def place(self) -> tuple[bool, int, int, str]:
        """Fashion-MNIST first, then by the number of images; of those the shorter names first."""
        data = self.about["data"]
        return data["name"] == "cifar10", data["train"], len(self.name), self.name

    @property
    def long(self) -> bool:
        return self.name.endswith("-long")

    @property
    def title(self) -> str:
        data, model = self.about["data"], self.about["model"]
        length = f", {self.about['recipe']['train']['epochs']} epochs" if self.long else ""
        return f"{DATA[data['name']]} {data['train']:,}, {model['name']}{length}"

    def test(self, method: str, base: str, metric: str) -> PairedTest:
        return paired_test(self.runs[method][metric], self.runs[base][metric])

    def cell(self, method: str, base: str, metric: str) -> Cell:
        """A difference and its measure, or None where one of the two was not run."""
        return (self.test(method, base, metric), metric) if {method, base} <= self.runs.keys() else None


def read_groups() -> dict[str, Group]:
    groups = {}
    for path in RESULTS.glob("*.csv"):
        groups[path.stem] = Group(path.stem, json.loads(path.with_suffix(".json").read_text("utf-8")), read_rows(path))
    return dict(sorted(groups.items(), key=lambda item: item[1].place))


GROUPS = read_groups()


def name_of(policy: str, loss: str, alpha: float) -> str:
    return f"{policy}-{loss}" if policy == "resizemix" else f"{policy}-{loss}-a{alpha:g}"


def families(base_alpha: float) -> list[tuple[Group, str, str]]:
    """(group, policy, its cross entropy baseline at that alpha) wherever that was run, small sets first."""
    found = []
    for group in GROUPS.values():
        for policy in POLICIES:
            base = name_of(policy, "ce", base_alpha)
            if base in group.runs:
                found.append((group, policy, base))
    return found


def loss_effect(metric: Callable[[str], str]) -> str:
    """DM minus cross entropy, the policy and its alpha alike, for the paper's two weights."""
    cases = families(PAPER_ALPHA)
    rows: list[list[Cell]] = []
    for group, policy, base in cases:
        key = metric(policy)
        names = [name_of(policy, f"dm{eta:g}", PAPER_ALPHA) for eta in PAPER_ETAS]
        rows.append([group.cell(name, base, key) for name in names])
    cells = columns_of_tests(rows, METRICS)
    head = ("data, model", "policy", *(f"eta {eta:g}" for eta in PAPER_ETAS))
    return table(head, [(g.title, TITLES[p], *row) for (g, p, _), row in zip(cases, cells, strict=True)])


def own_kind(policy: str) -> str:
    """The hard samples that are like those of the policy: blended, or cut."""
    return "mixup_both" if policy in ("mixup", "manifold-mixup") else "cutmix_both"


def alpha_effect() -> str:
    """What the paper compares, and what of it is alpha."""
    cases = [case for case in families(USUAL_ALPHA) if case[1] != "resizemix"]
    rows: list[list[Cell]] = []
    for group, policy, base in cases:
        names = [name_of(policy, f"dm{eta:g}", PAPER_ALPHA) for eta in PAPER_ETAS]
        names.append(name_of(policy, "ce", PAPER_ALPHA))
        rows.append([group.cell(name, base, "top1") for name in names])
    cells = columns_of_tests(rows, METRICS)
    head = ("data, model", "policy", *(f"DM {eta:g} at 0.2 - CE at 1" for eta in PAPER_ETAS), "CE at 0.2 - CE at 1")
    return table(head, [(g.title, TITLES[p], *row) for (g, p, _), row in zip(cases, cells, strict=True)])


def mixing_effect() -> str:
    """Does mixing itself help here? Soft cross entropy at either alpha against no mixing."""
    cases = [case for case in families(PAPER_ALPHA) if "none" in case[0].runs]
    rows: list[list[Cell]] = []
    for group, policy, base in cases:
        usual = group.cell(name_of(policy, "ce", USUAL_ALPHA), "none", "top1") if policy != "resizemix" else None
        rows.append([usual, group.cell(base, "none", "top1")])
    cells = columns_of_tests(rows, METRICS)
    head = ("data, model", "policy", "CE, alpha 1", "CE, alpha 0.2 (ResizeMix: its own)")
    return table(head, [(g.title, TITLES[p], *row) for (g, p, _), row in zip(cases, cells, strict=True)])


def eta_rows() -> list[tuple[Group, str, dict[float, str]]]:
    """(group, policy, eta -> method) where the whole sweep was run; eta 0 is cross entropy."""
    found = []
    for group, policy, base in families(PAPER_ALPHA):
        methods = {0.0: base} | {
            eta: name_of(policy, f"dm{eta:g}", PAPER_ALPHA) for eta in sorted({*PAPER_ETAS, *MORE_ETAS})
        }
        if all(method in group.runs for method in methods.values()):
            found.append((group, policy, methods))
    return found


def eta_sweep() -> str:
    rows = []
    for group, policy, methods in eta_rows():
        for key in ("top1", "nll", "ece", own_kind(policy)):
            heading = METRICS[key][0]
            rows.append((group.title, TITLES[policy], heading, *(mean(group, m, key) for m in methods.values())))
    etas = next(iter(eta_rows()))[2]
    return table(("data, model", "policy", "measure", *(f"eta {eta:g}" for eta in etas)), rows)


def binary() -> str:
    """DM(BCE) minus binary cross entropy on the same mixed samples."""
    rows: list[list[Cell]] = []
    names = []
    for group in GROUPS.values():
        for policy in PAIR:
            scaled, base = (f"{policy}-{loss}-a{PAPER_ALPHA:g}" for loss in ("dm-bce", "bce"))
            if scaled in group.runs:
                names.append((group.title, TITLES[policy]))
                rows.append([(group.test(scaled, base, key), key) for key in METRICS])
    cells = columns_of_tests(rows, METRICS)
    head = ("data, model", "policy", *(heading for heading, _, _ in METRICS.values()))
    return table(head, [(*name, *row) for name, row in zip(names, cells, strict=True)])


def cost() -> str:
    """Time of a training step, DM over cross entropy in the same comparison."""
    rows = []
    for group, policy, base in families(PAPER_ALPHA):
        name = name_of(policy, f"dm{PAPER_ETAS[0]:g}", PAPER_ALPHA)
        pairs = zip(group.runs[name]["ms_per_step"], group.runs[base]["ms_per_step"], strict=True)
        ratio = mean_interval([dm / ce for dm, ce in pairs])
        step = mean_interval(group.runs[base]["ms_per_step"]).mean
        accuracy = group.test(name, base, "top1").difference
        bounds = "(one seed)" if ratio.low is None else f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        cells = (f"{step:.1f}", f"{ratio.mean:.3f} {bounds}", f"{100 * accuracy:+.2f}")
        rows.append((group.title, TITLES[policy], *cells))
    return table(("data, model", "policy", "CE, ms a step", "DM / CE", "top-1, points"), rows)


def mean(group: Group, method: str, metric: str) -> str:
    return with_half_width(group.runs[method][metric], METRICS[metric])


def all_numbers() -> str:
    text = []
    for name, group in GROUPS.items():
        head = ("method", *(heading for heading, _, _ in METRICS.values()))
        rows = [(f"`{method}`", *(mean(group, method, key) for key in METRICS)) for method in group.runs]
        about = group.about
        device = "CPU" if about["device"] == "cpu" else about["device"]
        source = f"../../benchmarks/evidence/decoupled/results/{name}.csv"
        train = about["recipe"]["train"]
        seeds = len(about["seeds"])
        settings = (
            f"{train['epochs']} epochs, batches of {train['batch_size']}, {train['optimizer']}, lr {train['lr']:g}, "
            f"{train['precision']}; {seeds} seed{'s' * (seeds > 1)}; {device}, torch {about['versions']['torch']}."
        )
        text.append(f"### {group.title}{', binary losses' if name.endswith('bce') else ''}\n\n{settings}")
        text.append(f"[{name}.csv]({source}), by `{about['command']}`.\n\n{table(head, rows)}")
    return "\n".join(text)


PARTS: dict[str, Callable[[], str]] = {
    "top-1": partial(loss_effect, lambda policy: "top1"),
    "nll": partial(loss_effect, lambda policy: "nll"),
    "ece": partial(loss_effect, lambda policy: "ece"),
    "both": partial(loss_effect, own_kind),
    "alpha": alpha_effect,
    "mixing": mixing_effect,
    "eta": eta_sweep,
    "binary": binary,
    "cost": cost,
    "all numbers": all_numbers,
}


def draw() -> None:
    import plots

    plots.draw(DOCS)


def main(arguments: list[str] | None = None) -> int:
    return write_page(PAGE, PARTS, draw, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
