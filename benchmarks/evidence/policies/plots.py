"""The plot of docs/evidence/policies.md. Drawn by page.py."""

from __future__ import annotations

from pathlib import Path

from groups import STATIC
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import CE, DM, SHOWN, STUDIES, TITLES, Study, policies_of, step

from hardmix.metrics.statistics import mean_interval
from hardmix.report.plots import COLORS, INK, MUTED, RC


def draw(folder: Path) -> None:
    with rc_context(RC):
        cost().savefig(folder / "policies-cost.svg", metadata={"Date": None}, bbox_inches="tight")


def cost() -> Figure:
    """Accuracy of each policy, with both losses, in the order of what a step costs; one panel a comparison."""
    figure = Figure(figsize=(9.0, 0.21 * max(len(policies_of(s)) for s in STUDIES.values()) + 1.2))
    panels = figure.subplots(1, len(STUDIES), squeeze=False)[0]
    for axes, study in zip(panels, STUDIES.values(), strict=True):
        _panel(axes, study)
    figure.subplots_adjust(wspace=0.55)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False)
    return figure


def _panel(axes: Axes, study: Study) -> None:
    cost = {name: step(study, name) for name in policies_of(study)}
    names = sorted(cost, key=cost.__getitem__, reverse=True)
    axes.axvline(100 * mean_interval(study.runs["none"]["top1"]).mean, color=MUTED, linewidth=0.8, label="no mixing")
    for place, (loss, label) in enumerate(((CE, "cross entropy"), (DM, "Decoupled Mixup")), 1):
        intervals = [mean_interval([100 * v for v in study.runs[f"{name}-{loss}"]["top1"]]) for name in names]
        half = [(i.high - i.low) / 2 if i.low is not None and i.high is not None else 0.0 for i in intervals]
        heights = [number + 0.15 - 0.3 * (place - 1) for number in range(len(names))]
        axes.errorbar(
            [i.mean for i in intervals], heights, xerr=half, fmt="os"[place - 1], markersize=3.5, elinewidth=1.0,
            color=COLORS[place], label=label,
        )  # fmt: skip
    kind = {True: "", False: " *"}
    axes.set_yticks(range(len(names)), [f"{TITLES[n]}{kind[n in STATIC]}  {cost[n]:.2f}" for n in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("top-1 %")
    axes.set_title(SHOWN[study.name], fontsize=8.0)
