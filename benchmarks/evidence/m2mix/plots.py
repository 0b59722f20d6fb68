"""The plot of docs/evidence/m2mix.md. Drawn by page.py."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from page import METHODS, MODELS, RETRIEVAL, STUDIES, TITLES

from hardmix.report.plots import COLORS, INK, MUTED, RC

#: in the plot, from the top
SHOWN = [key for key in RETRIEVAL if key.endswith("mrr")]


def draw(folder: Path) -> None:
    with rc_context(RC):
        effects().savefig(folder / "m2mix-effects.svg", metadata={"Date": None}, bbox_inches="tight")


def effects() -> Figure:
    """What every method changes in the mean reciprocal rank of plain CLIP, with its interval, one panel a model."""
    figure = Figure(figsize=(9.0, 3.4))
    panels = figure.subplots(1, len(STUDIES), squeeze=False).flatten()
    figure.subplots_adjust(wspace=0.45)
    for axes, study in zip(panels, STUDIES, strict=True):
        shown = [key for key in SHOWN if key in study.runs["clip"]]
        axes.axvline(0.0, color=MUTED, linewidth=0.8)
        for number, method in enumerate(m for m in METHODS if m in study.runs):
            tests = [study.test(method, key) for key in shown]
            middle = [100 * test.difference for test in tests]
            reach = [
                [100 * (t.difference - (t.low or t.difference)) for t in tests],
                [100 * ((t.high or t.difference) - t.difference) for t in tests],
            ]
            heights = [len(shown) - place + 0.33 - 0.11 * number for place in range(len(shown))]
            color = COLORS[number % len(COLORS)]
            axes.errorbar(middle, heights, xerr=reach, fmt="o", color=color, markersize=3.5, elinewidth=1.0,
                          label=TITLES[method])  # fmt: skip
        axes.set_yticks(range(len(shown), 0, -1), [RETRIEVAL[key][0].replace("MRR, ", "") for key in shown])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.set_title(MODELS[study.name], fontsize=8.0)
        axes.set_xlabel("MRR in points against plain CLIP")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.12))
    return figure
