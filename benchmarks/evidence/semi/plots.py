"""The plot of docs/evidence/semi.md. Drawn by page.py."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from page import CLAIMS, HEADINGS, STUDIES

from hardmix.metrics.statistics import paired_test
from hardmix.report.plots import COLORS, INK, MUTED, RC


def draw(folder: Path) -> None:
    with rc_context(RC):
        effects().savefig(folder / "semi-effects.svg", metadata={"Date": None}, bbox_inches="tight")


def effects() -> Figure:
    """What each claim comes to in top-1, with its interval, one colour for each comparison."""
    claims = [claim for claim in CLAIMS if any({claim[1], claim[2]} <= s.runs.keys() for s in STUDIES.values())]
    figure = Figure(figsize=(7.6, 0.34 * len(claims) + 0.8))
    axes = figure.subplots()
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    for number, (name, study) in enumerate(STUDIES.items()):
        middle, low, high, heights = [], [], [], []
        for place, (_, method, base) in enumerate(claims):
            if {method, base} <= study.runs.keys():
                test = paired_test(study.runs[method]["top1"], study.runs[base]["top1"])
                middle.append(100 * test.difference)
                low.append(100 * (test.difference - (test.low or test.difference)))
                high.append(100 * ((test.high or test.difference) - test.difference))
                heights.append(len(claims) - place + 0.24 - 0.12 * number)
        axes.errorbar(
            middle, heights, xerr=[low, high], fmt="o", color=COLORS[number % len(COLORS)], markersize=3.5,
            elinewidth=1.0, label=HEADINGS[name],
        )  # fmt: skip
    axes.set_yticks(range(len(claims), 0, -1), [claim[0] for claim in claims])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("points of top-1")
    axes.legend(loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.4, 1.14))
    return figure
