"""The sentences that open a report: what was reached, what won, and what is undecided."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from hardmix.report.comparison import Comparison, Method, paired
from hardmix.report.folder import RunFolder
from hardmix.report.plots import pooled
from hardmix.report.text import (
    MAX_TEXT,
    count,
    dig,
    is_pairs,
    method_title,
    metric,
    number,
    p_value,
    show,
    show_difference,
    show_range,
    telling,
    things_of,
    title_of,
    visible,
)

#: Metrics that a sentence lists by name.
NAMED = 10


def name_of(text: object) -> Markup:
    """A user's name as an element of its own, so that right-to-left letters don't reorder the sentence around it."""
    return Markup("<bdi>{}</bdi>").format(visible(text))


def run_verdict(run: RunFolder) -> list[Markup]:
    """What one run reached, in plain words: the main sentence first."""
    summary = run.summary
    title = method_title(summary["policy"], summary.get("objective")) if "policy" in summary else "This run"
    test = dig(summary, "test")
    found = test.items() if isinstance(test, dict) else ()
    keys = [k for k, v in found if number(v) is not None and telling(k, summary)]
    if not keys:
        return [_unfinished(run, title)]
    if is_pairs(summary) and "recall_5" in keys:
        return _pair_verdict(summary, title)
    key = "top1" if "top1" in keys else keys[0]
    things = things_of(summary)
    value, size = show(key, number(test[key]), 1), count(dig(summary, "data", "test"))
    sentence = Markup("<b>{}</b> reached {} {} on {} test {}").format(
        visible(title), value, visible(metric(key).label), size, things
    )
    data = dig(summary, "data", "name")
    sentence += Markup(" of {}.").format(name_of(data)) if data is not None else Markup(".")
    sentences = [sentence]
    ece = number(test.get("ece"))
    if ece is not None:
        off = _direction(dig(summary, "reliability"), ece)
        sentences.append(Markup("When it names a class, its confidence is {} on average.").format(off))
    mixed = next((k for k in keys if k.endswith("_both")), None)
    if mixed is not None:
        sentences.append(
            Markup(
                "Shown two images mixed half and half by {}, it names exactly the two classes as its best guesses {} "
                "of the time."
            ).format(visible(title_of(mixed.removesuffix("_both"))), show(mixed, number(test[mixed]), 0))
        )
    return sentences


def _pair_verdict(summary: dict[str, Any], title: str) -> list[Markup]:
    """What an image-text run finds, before and after, in the styles of training and in others."""
    data = dig(summary, "data", "name")
    of = Markup("") if data is None else Markup(" of {}").format(name_of(data))
    sentence = Markup(
        "Searching among {} test {}{} that it was not trained on, <b>{}</b> has the right one among its first five {}"
    ).format(count(dig(summary, "data", "test")), things_of(summary), of, visible(title), _found(summary, ""))
    if number(dig(summary, "test", "shift_recall_5")) is not None:
        sentence += Markup(", and in other styles {}").format(_found(summary, "shift_"))
    sentences = [sentence + Markup(".")]
    ece = number(dig(summary, "test", "ece"))
    if ece is not None:
        both = pooled([dig(summary, "calibration", key, "bins") for key in ("image_to_text", "text_to_image")])
        off = _direction(both, ece)
        sentences.append(Markup("Its confidence in the first one that it finds is {} on average.").format(off))
    return sentences


def _found(summary: dict[str, Any], start: str) -> str:
    """'48.2 % of the time (31.0 % before fine-tuning, 1.3 % by chance)', as far as it is known."""
    key = f"{start}recall_5"
    before, chance = number(dig(summary, "before", key)), _chance(summary, bool(start))
    beside = [] if before is None else [f"{show(key, before, 1)} before fine-tuning"]
    beside += [] if chance is None else [f"{show(key, chance, 1)} by chance"]
    found = f"{show(key, number(dig(summary, 'test', key)), 1)} of the time"
    return found + (f" ({', '.join(beside)})" if beside else "")


def _chance(summary: dict[str, Any], shift: bool) -> float | None:
    """R@5 by chance among concepts that were not trained on: the mean over styles and both directions."""
    stored = summary.get("retrieval")
    entries = [e for e in stored if dig(e, "part") == "unseen"] if isinstance(stored, list) else []
    values = [
        number(entry.get(f"{direction}_recall_5_chance"))
        for entry in entries
        for direction in ("image_to_text", "text_to_image")
        if (entry.get("shift") is True) == shift
    ]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _direction(diagram: Any, ece: float) -> str:
    """'4.6 points too high' where nearly all of the calibration error has one sign, 'off by 4.6 points' otherwise."""
    off = show_difference("ece", ece, 1).lstrip("+")
    gap = total = 0.0
    columns = [dig(diagram, key) for key in ("confidence", "accuracy", "count")]
    if all(isinstance(column, list) for column in columns):
        for row in zip(*columns, strict=False):
            confidence, accuracy, size = map(number, row)
            if confidence is not None and accuracy is not None and size:
                gap += size * (confidence - accuracy)
                total += size
    if total and abs(gap / total) > 0.8 * ece > 0.0:
        return f"{off} too {'high' if gap > 0 else 'low'}"
    return f"off by {off}"


def _unfinished(run: RunFolder, title: str) -> Markup:
    key = next((key for key in ("top1", "recall_5", "mae") if key in run.validation), "")
    last = run.validation.get(key, [])
    steps = run.train.get("step", [])
    sentence = Markup("<b>{}</b> has no test result: the run has not finished.").format(visible(title))
    if steps:
        sentence += Markup(" Its log ends at step {}, epoch {}.").format(
            count(steps[-1]), f"{run.train['epoch'][-1]:.3g}"
        )
    if last and (value := number(last[-1])) is not None:
        sentence += Markup(" The last validation gave {} {}.").format(show(key, value, 1), metric(key).label)
    return sentence


def comparison_verdict(comparison: Comparison) -> list[Markup]:
    """What won on the first metric, by how much, and what is undecided, the leading sentence first; what makes that
    doubtful last."""
    return _outcome(comparison) + [Markup("{}").format(visible(caution, MAX_TEXT)) for caution in comparison.cautions]


def _outcome(comparison: Comparison) -> list[Markup]:
    if not comparison.methods or not comparison.metrics:
        return [Markup("There is nothing to compare: comparison.json holds no runs.")]
    key = comparison.metrics[0]
    first, *others = comparison.methods
    if not others:
        return [
            Markup("Only one method, <b>{}</b>: {} {}. There is nothing to compare it with.").format(
                name_of(first.name), show(key, first.mean(key)), visible(metric(key).label)
            )
        ]
    best = comparison.best[key]
    if best is None:
        return [Markup("No method can be said to have won: there is no {} for two of them.").format(_label(key))]
    sentences = [_leader(comparison, comparison.methods[best.place], key)]
    for method in others:
        more = _elsewhere(comparison, method)
        if method.place != best.place:
            sentence = _against_first(comparison, method, key)
            sentences.append(sentence + Markup(" On the other metrics: {}.").format(more) if more else sentence)
        elif more:
            told = Markup("<b>{}</b> on the other metrics, against {}: {}.")
            sentences.append(told.format(name_of(method.name), name_of(first.name), more))
    return sentences


def _leader(comparison: Comparison, leader: Method, key: str) -> Markup:
    """The opening sentence: the best mean, and whether its lead is more than chance."""
    first = comparison.methods[0]
    label = _label(key)
    extreme = "lowest" if key in comparison.lower else "highest"
    seeds = max((len(m.cells[key].values) for m in comparison.methods), default=0)
    value = show(key, leader.mean(key))
    if seeds < 2:
        return Markup(
            "<b>{}</b> has the {} {}, {}. One seed can't tell a difference from chance: nothing is decided."
        ).format(name_of(leader.name), extreme, label, value)
    if leader.place == 0:
        clear = [_state(comparison, m, key) == "worse" for m in comparison.methods[1:]]
        if all(clear):
            return Markup("<b>{}</b>, the first method, won: {} {}, clearly better than every other.").format(
                name_of(first.name), value, label
            )
        if not any(clear):
            chance = "the difference" if len(clear) == 1 else "each of its leads"
            return Markup(
                "Undecided: <b>{}</b>, the first method, has the {} mean {}, {}, but {} may be chance."
            ).format(name_of(first.name), extreme, label, value, chance)
        return Markup(
            "No method beat <b>{}</b>, the first: it has the {} mean {}, {}, though its lead is not clear everywhere."
        ).format(name_of(first.name), extreme, label, value)
    versus = leader.versus[key]
    lead = Markup("{} {} than {} (95 % interval {}; {} seeds; {})").format(
        show_difference(key, versus.difference).lstrip("+\u2212"),
        "less" if key in comparison.lower else "more",
        name_of(first.name),
        show_range(key, versus.low, versus.high, signed=True) or "not available",
        seeds,
        _p(versus.p, versus.adjusted),
    )
    state = versus.verdict(key in comparison.lower)
    if state == "better":
        sentence = Markup("<b>{}</b> won: {} {}, {}.").format(name_of(leader.name), value, label, lead)
        return sentence + _runner_up(comparison, leader, key)
    why = "The interval includes 0" if versus.includes_zero else "There is no interval"
    if state == "undecided" and not versus.includes_zero:
        why = "With so many comparisons p is not below 0.05"
    return Markup("Undecided: <b>{}</b> has the {} mean {}, {}, which is {}. {}, so this may be chance.").format(
        name_of(leader.name), extreme, label, value, lead, why
    )


def _runner_up(comparison: Comparison, leader: Method, key: str) -> Markup:
    """Beating the first method is not beating the second best."""
    rest = [m for m in comparison.methods if m.place not in (0, leader.place) and m.mean(key) is not None]
    if not rest:
        return Markup("")
    sign = 1 if key in comparison.lower else -1
    second = min(rest, key=lambda m: sign * (m.mean(key) or 0.0))
    test = paired(leader, second, key)
    if test is None or test.low is None or test.high is None:
        return Markup("")
    clear = not test.low <= 0.0 <= test.high
    return Markup(" Against the runner-up {} the difference is {} (interval {}), {}.").format(
        name_of(second.name),
        show_difference(key, test.difference),
        show_range(key, test.low, test.high, signed=True),
        "which is clear too" if clear else "which includes 0: undecided",
    )


def _against_first(comparison: Comparison, method: Method, key: str) -> Markup:
    """One line of the list below the leading sentence."""
    versus = method.versus[key]
    words = {
        "better": "better than",
        "worse": "worse than",
        "undecided": "undecided against",
        "untested": "not tested, since the difference is the same in every seed, against"
        if len(comparison.seeds) > 1
        else "one seed only, not tested against",
        "unknown": "can't be compared with",
    }[_state(comparison, method, key)]
    sentence = Markup("<b>{}</b>: {} {}").format(name_of(method.name), words, name_of(comparison.methods[0].name))
    if versus.difference is None:
        return sentence + "."
    sentence += Markup(", {}").format(show_difference(key, versus.difference))
    interval = show_range(key, versus.low, versus.high, signed=True)
    if interval:
        includes = " includes 0" if versus.includes_zero else ""
        sentence += Markup(" (interval {}{}; {})").format(interval, includes, _p(versus.p, versus.adjusted))
    return sentence + "."


def _elsewhere(comparison: Comparison, method: Method) -> Markup:
    """How the other metrics came out for a method against the first one."""
    groups: dict[str, list[str]] = {}
    for key in comparison.metrics[1:]:
        groups.setdefault(_state(comparison, method, key), []).append(_label(key))
    parts = []
    for state in ("better", "worse", "undecided"):
        if state in groups:
            everything = len(groups[state]) == len(comparison.metrics) - 1 > 2
            names = f"all {len(groups[state])}" if everything else _some(groups[state])
            parts.append(f"{state} on {names}")
    return Markup("{}").format("; ".join(parts))


def _some(labels: list[str]) -> str:
    """The first of them, and how many more."""
    more = len(labels) - NAMED
    return ", ".join(labels) if more <= 1 else f"{', '.join(labels[:NAMED])} and {more} more"


def _state(comparison: Comparison, method: Method, key: str) -> str:
    return comparison.state(method.versus[key], key)


def _label(key: str) -> str:
    return visible(metric(key).label)


def _p(p: float | None, adjusted: float | None) -> str:
    """The paired p, after Holm's correction where there were several comparisons."""
    if p is None:
        return "no test"
    return f"paired {p_value(p)}" if adjusted is None else f"paired {p_value(adjusted)} after Holm's correction"
