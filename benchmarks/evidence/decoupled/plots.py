"""The plots of docs/evidence/decoupled-mixup.md. Drawn by page.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from groups import PAIR, PAPER_ALPHA, PAPER_ETAS
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import GROUPS, METRICS, TITLES, Group, eta_rows, families, name_of, own_kind

from hardmix.metrics.statistics import PairedTest, mean_interval
from hardmix.report.plots import COLORS, INK, MARKERS, MUTED, RC


def draw(folder: Path) -> None:
    with rc_context(RC):
        for name, figure in (("effects", effects()), ("eta", eta_curves()), ("amounts", amounts())):
            figure.savefig(folder / f"decoupled-mixup-{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def effects() -> Figure:
    """Every difference that the loss alone makes, with its interval, for top-1 and for hard samples."""
    cases = families(PAPER_ALPHA)
    figure = Figure(figsize=(9.0, 0.3 * len(cases) + 1.1))
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(top=0.95)
    places = range(len(cases), 0, -1)
    for axes, metric, title in (
        (left, lambda policy: "top1", "top-1, points"),
        (right, own_kind, "both classes, points"),
    ):
        axes.axvline(0.0, color=MUTED, linewidth=0.8)
        for number, eta in enumerate(PAPER_ETAS):
            cells = [g.cell(name_of(p, f"dm{eta:g}", PAPER_ALPHA), base, metric(p)) for g, p, base in cases]
            shown = [(cell[0], place) for cell, place in zip(cells, places, strict=True) if cell is not None]
            points = [_with_ends(test) for test, _ in shown]
            heights = [place + 0.14 - 0.28 * number for _, place in shown]
            _bars(axes, points, heights, number + 1, f"eta {eta:g}")
        axes.set_xlabel(f"DM minus cross entropy: {title}")
        axes.grid(axis="y", visible=False)
    left.set_yticks(list(places), [f"{g.title}: {TITLES[p]}" for g, p, _ in cases])
    left.tick_params(axis="y", labelcolor=INK)
    figure.legend(*left.get_legend_handles_labels(), loc="upper center", ncols=len(PAPER_ETAS), frameon=False)
    return figure


def _with_ends(test: PairedTest) -> tuple[float, ...]:
    """A difference and its interval in points; a single seed has a point for one."""
    ends = (test.low, test.high)
    return tuple(100 * (test.difference if value is None else value) for value in (test.difference, *ends))


def _bars(axes: Axes, points: Sequence[tuple[float, ...]], heights: Sequence[float], place: int, label: str) -> None:
    middles, lows, highs = zip(*points, strict=True)
    reach = [
        [m - low for m, low in zip(middles, lows, strict=True)],
        [h - m for m, h in zip(middles, highs, strict=True)],
    ]
    style = {"fmt": MARKERS[place], "markersize": 4, "elinewidth": 1.1, "color": COLORS[place], "label": label}
    axes.errorbar(middles, heights, xerr=reach, **style)


def eta_curves() -> Figure:
    """What the weight of the regulariser does to accuracy, likelihood and hard samples."""
    rows = eta_rows()
    figure = Figure(figsize=(9.0, 2.6))
    panels = figure.subplots(1, 3)
    for axes, heading in zip(panels, ("top-1 %", "NLL", "both classes of hard samples %"), strict=True):
        for place, (group, policy, methods) in enumerate(rows, 1):
            metric = {"top-1 %": "top1", "NLL": "nll"}.get(heading, own_kind(policy))
            _curve(axes, group, list(methods.items()), metric, place, TITLES[policy])
        axes.set_xscale("symlog", linthresh=0.1, linscale=0.5)
        axes.set_xticks(list(rows[0][2]), [f"{eta:g}" for eta in rows[0][2]])
        axes.minorticks_off()
        axes.set_xlabel("eta (0: cross entropy)")
        axes.set_title(heading, fontsize=8.0)
    panels[-1].legend(frameon=False)
    return figure


def amounts() -> Figure:
    """Accuracy against the number of training images, one panel a policy."""
    groups = [
        group
        for group in GROUPS.values()
        if (group.about["data"]["name"], group.about["model"]["name"]) == ("fashion-mini", "small-resnet")
        and name_of("mixup", "ce", PAPER_ALPHA) in group.runs
    ]
    figure = Figure(figsize=(9.0, 2.8))
    panels = figure.subplots(1, len(PAIR), sharey=True)
    for axes, policy in zip(panels, PAIR, strict=True):
        lines = {"no mixing": "none", f"{TITLES[policy]}": name_of(policy, "ce", PAPER_ALPHA)}
        lines |= {f"with DM, eta {eta:g}": name_of(policy, f"dm{eta:g}", PAPER_ALPHA) for eta in PAPER_ETAS}
        for place, (label, method) in enumerate(lines.items()):
            shift = 1.0 + 0.015 * (place - 1.5)  # side by side, so that intervals can be seen
            points = [(shift * g.about["data"]["train"], g) for g in groups]
            intervals = [mean_interval([100 * v for v in g.runs[method]["top1"]]) for _, g in points]
            half = [(i.high - i.low) / 2 if i.low is not None and i.high is not None else 0.0 for i in intervals]
            style = {"color": COLORS[place], "marker": MARKERS[place], "markersize": 4, "linewidth": 1.2}
            axes.errorbar([x for x, _ in points], [i.mean for i in intervals], yerr=half, label=label, **style)
        sizes = [g.about["data"]["train"] for g in groups]
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("training images (Fashion-MNIST, small-resnet)")
        axes.legend(frameon=False)
    panels[0].set_ylabel("top-1 %")
    return figure


def _curve(axes: Axes, group: Group, methods: Sequence[tuple[float, str]], metric: str, place: int, label: str) -> None:
    factor = METRICS[metric][1]
    intervals = [mean_interval([factor * v for v in group.runs[method][metric]]) for _, method in methods]
    half = [(i.high - i.low) / 2 if i.low is not None and i.high is not None else 0.0 for i in intervals]
    style = {"color": COLORS[place], "marker": MARKERS[place], "markersize": 4, "linewidth": 1.2}
    axes.errorbar([x for x, _ in methods], [i.mean for i in intervals], yerr=half, label=label, **style)
