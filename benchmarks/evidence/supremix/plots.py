"""The plots of docs/evidence/supremix.md. Drawn by page.py."""

from __future__ import annotations

from pathlib import Path

from groups import ABLATIONS, BASE, TUNED
from matplotlib import rc_context
from matplotlib.figure import Figure
from page import DATA, METHODS, STUDIES, TITLES

from hardmix.metrics.statistics import mean_interval
from hardmix.report.plots import COLORS, INK, MARKERS, MUTED, RC

TICKS = (0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)


def draw(folder: Path) -> None:
    with rc_context(RC):
        for name, figure in (("effects", effects()), ("order", order())):
            figure.savefig(folder / f"supremix-{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def effects() -> Figure:
    """What every method changes in the error of L1, with its interval."""
    figure = Figure(figsize=(9.0, 0.75 * len(STUDIES) + 0.9))
    axes = figure.subplots()
    axes.axvline(1.0, color=MUTED, linewidth=0.8)
    for number, method in enumerate(TUNED):
        tests = [study.test(method, BASE, "mae") for study in STUDIES]
        ratios = [[1.0 + (v or 0.0) / 100 for v in (t.difference, t.low, t.high)] for t in tests]
        reach = [[middle - low for middle, low, _ in ratios], [high - middle for middle, _, high in ratios]]
        heights = [len(STUDIES) - place + 0.3 - 0.15 * number for place in range(len(STUDIES))]
        style = {"fmt": MARKERS[number + 1], "color": COLORS[number + 1], "markersize": 4, "elinewidth": 1.1}
        axes.errorbar([middle for middle, _, _ in ratios], heights, xerr=reach, label=TITLES[method], **style)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.set_yticks(range(len(STUDIES), 0, -1), [DATA[study.name] for study in STUDIES])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("MAE as a multiple of that of L1")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(TUNED), frameon=False)
    return figure


def order() -> Figure:
    """Error against how well the distances of embeddings follow those of the labels, one panel a set."""
    figure = Figure(figsize=(9.0, 2.6 * -(-len(STUDIES) // 3)))
    panels = figure.subplots(-(-len(STUDIES) // 3), 3, squeeze=False).flatten()
    figure.subplots_adjust(hspace=0.5, wspace=0.3)
    for axes, study in zip(panels, STUDIES, strict=False):
        for name in ABLATIONS:
            x, y = (study.mean(f"supremix-{name}", key) for key in ("ordinality", "mae"))
            axes.plot(x, y, ".", color=MUTED, markersize=5, label="SupReMix, one thing changed")
        for number, method in enumerate(METHODS):
            x, y = (mean_interval(study.runs[method][key]) for key in ("ordinality", "mae"))
            reach = [0.0 if i.low is None else i.mean - i.low for i in (x, y)]
            style = {"fmt": MARKERS[number], "color": COLORS[number], "markersize": 4, "elinewidth": 0.8}
            axes.errorbar(x.mean, y.mean, xerr=reach[0], yerr=reach[1], label=TITLES[method], **style)
        axes.set_title(DATA[study.name], fontsize=8.0)
        axes.set_xlabel("ordinality")
        axes.set_ylabel("MAE")
    for axes in panels[len(STUDIES) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.04))
    return figure
