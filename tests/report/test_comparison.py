"""What may be concluded: verdicts, best values, pairing by seed, Holm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hardmix.metrics import mean_interval, paired_test
from hardmix.report.comparison import Comparison, Versus, paired, ranked, read_comparison
from hardmix.report.page import write_comparison_report
from hardmix.report.verdict import comparison_verdict


def build(folder: Path, values: dict[str, list[float]], *, key: str = "top1", lower: bool = False) -> Comparison:
    """A comparison of one metric; the first method is what the others are compared with."""
    first = next(iter(values))
    runs = [{"name": n, "seed": s, "test": {key: v}} for n, vs in values.items() for s, v in enumerate(vs)]
    table: list[dict[str, Any]] = []
    for name, own in values.items():
        versus = None if name == first else {key: paired_test(own, values[first])._asdict()}
        cell = {**mean_interval(own)._asdict(), "values": own}
        table.append({"name": name, "metrics": {key: cell}, "versus_first": versus})
    stored = {
        "metrics": [key],
        "lower_is_better": [key] if lower else [],
        "seeds": list(range(len(values[first]))),
        "runs": runs,
        "table": table,
    }
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(stored))
    return read_comparison(folder)


def told(comparison: Comparison) -> list[str]:
    return [s.striptags().replace("\u00a0", " ").replace("\u2212", "-") for s in comparison_verdict(comparison)]


BASE = [0.800, 0.804, 0.802, 0.806, 0.803]


def shifted(by: float, wobble: float = 0.001) -> list[float]:
    return [v + by + wobble * (-1) ** i for i, v in enumerate(BASE)]


def test_a_clear_win(tmp_path: Path) -> None:
    comparison = build(tmp_path, {"A": BASE, "B": shifted(0.02)})
    (lead,) = told(comparison)
    assert lead.startswith(
        "B won: 82.32 % top-1, 2.02 points more than A (95 % interval +1.88 to +2.16; 5 seeds; paired p < 0.001)."
    )
    assert comparison.best["top1"] is not None
    assert (comparison.best["top1"].place, comparison.best["top1"].clear) == (1, True)


def test_an_interval_that_includes_zero_is_undecided(tmp_path: Path) -> None:
    comparison = build(tmp_path, {"A": BASE, "B": shifted(0.001, 0.004)})
    (lead,) = told(comparison)
    assert lead.startswith("Undecided: B has the highest mean top-1, ")
    assert "The interval includes 0, so this may be chance." in lead
    assert comparison.best["top1"] is not None
    assert not comparison.best["top1"].clear


def test_the_first_method_can_win(tmp_path: Path) -> None:
    comparison = build(tmp_path, {"A": BASE, "B": shifted(-0.02), "C": shifted(-0.01)})
    lead, *rest = told(comparison)
    assert lead == "A, the first method, won: 80.30 % top-1, clearly better than every other."
    assert [r.split(",")[0] for r in rest] == ["B: worse than A", "C: worse than A"]


def test_the_same_difference_in_every_seed_is_no_proof(tmp_path: Path) -> None:
    even = [0.875, 0.75, 0.5]
    (lead,) = told(build(tmp_path / "ahead", {"A": even, "B": [v + 0.125 for v in even]}))
    assert lead.startswith("Undecided: B has the highest mean top-1, 83.33 %, which is 12.50 points more than A (95 ")
    assert "3 seeds; no test). There is no interval, so this may be chance." in lead
    assert "p &lt;" not in lead
    assert "p <" not in lead
    lead, other = told(build(tmp_path / "behind", {"A": even, "B": [v - 0.125 for v in even]}))
    assert lead.startswith("Undecided: A, the first method, has the highest mean top-1")
    assert "not tested, since the difference is the same in every seed, against A" in other


def test_the_first_method_can_stay_unbeaten_without_winning(tmp_path: Path) -> None:
    lead, *rest = told(build(tmp_path, {"A": BASE, "B": shifted(-0.02), "C": shifted(-0.002, 0.004)}))
    assert lead.startswith("No method beat A, the first: it has the highest mean top-1")
    assert "though its lead is not clear everywhere" in lead
    assert rest[1].startswith("C: undecided against A")
    assert "includes 0" in rest[1]


def test_a_lead_of_the_first_method_that_is_clear_nowhere_may_be_chance(tmp_path: Path) -> None:
    (lead, _) = told(build(tmp_path / "two", {"A": BASE, "B": shifted(-0.001, 0.004)}))
    assert lead.startswith("Undecided: A, the first method, has the highest mean top-1, 80.30 %, ")
    assert lead.endswith("but the difference may be chance.")
    lead, *_ = told(build(tmp_path / "three", {"A": BASE, "B": shifted(-0.001, 0.004), "C": shifted(-0.002, 0.004)}))
    assert lead.endswith("but each of its leads may be chance.")


def test_beating_the_first_is_not_beating_the_runner_up(tmp_path: Path) -> None:
    comparison = build(tmp_path, {"A": BASE, "B": shifted(0.0203, 0.002), "C": shifted(0.02, -0.002)})
    lead, other = told(comparison)
    assert lead.startswith("B won: ")
    assert "Against the runner-up C the difference is" in lead
    assert "which includes 0: undecided" in lead
    assert other.startswith("C: better than A, ")
    assert comparison.best["top1"] is not None
    assert not comparison.best["top1"].clear


def test_lower_can_be_better(tmp_path: Path) -> None:
    comparison = build(tmp_path, {"A": BASE, "B": shifted(-0.02)}, key="nll", lower=True)
    (lead,) = told(comparison)
    assert lead.startswith("B won: 0.7832 NLL, 0.0198 less than A (95 % interval -0.0212 to -0.0184;")
    assert comparison.best["nll"] is not None
    assert comparison.best["nll"].place == 1


def test_holm_turns_a_narrow_win_among_many_into_undecided(tmp_path: Path) -> None:
    narrow = [v + d for v, d in zip(BASE, [0.001, 0.004, 0.002, 0.005, 0.0005], strict=True)]
    assert told(build(tmp_path / "two", {"A": BASE, "B": narrow}))[0].startswith("B won")
    noise = {f"N{i}": shifted(-0.0005, 0.004 + i / 1000) for i in range(4)}
    comparison = build(tmp_path / "many", {"A": BASE, "B": narrow, **noise})
    versus = comparison.methods[1].versus["top1"]
    assert versus.p is not None
    assert versus.adjusted == pytest.approx(5 * versus.p)
    lead = told(comparison)[0]
    assert lead.startswith("Undecided: B has the highest mean")
    assert "With so many comparisons p is not below 0.05" in lead
    assert "after Holm's correction" in lead


def test_a_best_that_is_undecided_by_holm_is_not_shown_as_clear(tmp_path: Path) -> None:
    above = [v + d for v, d in zip(BASE, [0.001, 0.004, 0.002, 0.005, 0.0005], strict=True)]
    below = [v - d for v, d in zip(BASE, [0.005, -0.0002, 0.004, 0.001, 0.002], strict=True)]
    comparison = build(tmp_path, {"A": BASE, "B": above, "C": below})
    assert told(comparison)[0].startswith("Undecided: B has the highest mean")
    assert comparison.best["top1"] is not None
    assert (comparison.best["top1"].place, comparison.best["top1"].clear) == (1, False)


def test_what_makes_a_comparison_doubtful_is_told_at_its_opening(tmp_path: Path) -> None:
    build(tmp_path, {"A": BASE, "B": shifted(0.02)})
    stored = json.loads((tmp_path / "comparison.json").read_text())
    (tmp_path / "comparison.json").write_text(json.dumps(stored | {"cautions": ["Other <data>."]}))
    assert told(read_comparison(tmp_path))[-1] == "Other <data>."


@pytest.mark.parametrize(
    ("versus", "lower", "verdict"),
    [
        (Versus(0.1, 0.05, 0.15, 0.01, None), False, "better"),
        (Versus(0.1, 0.05, 0.15, 0.01, None), True, "worse"),
        (Versus(-0.1, -0.15, -0.05, 0.01, 0.02), True, "better"),
        (Versus(0.1, -0.05, 0.25, 0.2, None), False, "undecided"),
        (Versus(0.1, 0.0, 0.2, 0.05, None), False, "undecided"),
        (Versus(0.1, 0.05, 0.15, 0.04, 0.08), False, "undecided"),
        (Versus(0.1, None, None, None, None), False, "untested"),
        (Versus(None, None, None, None, None), False, "unknown"),
    ],
)
def test_verdicts(versus: Versus, lower: bool, verdict: str) -> None:
    assert versus.verdict(lower) == verdict


def test_equal_means_are_equally_the_best(tmp_path: Path, quick_plots: None) -> None:
    page = write_comparison_report(build(tmp_path, {"A": BASE, "B": BASE, "C": shifted(-0.1)}).folder)
    rows = re.findall(r"<tr><th scope=.row.>.*?</tr>", page.read_text("utf-8"), re.DOTALL)[:3]
    assert ['<span class="tag">best</span>' in row for row in rows] == [True, True, False]
    assert not any("<strong>" in row for row in rows)


def test_pairs_are_made_by_seed_not_by_order(tmp_path: Path) -> None:
    comparison = build(tmp_path, {"A": BASE, "B": shifted(0.02)})
    stored = json.loads((tmp_path / "comparison.json").read_text())
    # B's runs come in another order, and its seed 4 is missing.
    stored["runs"] = stored["runs"][:5] + stored["runs"][5:9][::-1]
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    again = read_comparison(tmp_path)
    test = paired(again.methods[1], again.methods[0], "top1")
    assert test is not None
    assert test == pytest.approx(paired_test(shifted(0.02)[:4], BASE[:4]))
    assert "B has 4 of 5 runs." in again.notes
    assert paired(comparison.methods[1], comparison.methods[0], "nothing") is None


def test_two_methods_of_which_one_has_no_values(tmp_path: Path) -> None:
    comparison = build(tmp_path, {"A": BASE, "B": shifted(0.02)})
    stored = json.loads((tmp_path / "comparison.json").read_text())
    stored["table"][1]["metrics"] = {"top1": {"mean": None, "low": None, "high": None, "values": [None]}}
    stored["table"][1]["versus_first"] = None
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    comparison = read_comparison(tmp_path)
    assert comparison.best["top1"] is None
    assert told(comparison) == ["No method can be said to have won: there is no top-1 for two of them."]


def test_costs_are_told_in_those_of_plain_mixup() -> None:
    from hardmix.train.compare import cost_base

    rows = [("none", "soft-cross-entropy"), ("mixup", "decoupled-mixup"), ("mixup", "soft-cross-entropy")]
    table = [
        {"name": f"{policy} {objective}", "policy": policy, "objective": objective, "seconds_per_step": {"mean": 0.1}}
        for policy, objective in rows
    ]
    assert cost_base(table)["name"] == "mixup soft-cross-entropy"
    assert cost_base(table[:2])["name"] == "none soft-cross-entropy"
    untrained = {**table[0], "name": "untrained", "seconds_per_step": {"mean": None}}
    assert cost_base([untrained, table[1]])["name"] == "mixup decoupled-mixup"
    assert cost_base([untrained]) is None


@pytest.mark.parametrize(
    ("means", "lower", "ranks"),
    [
        ([0.7, 0.9, 0.8], False, [3, 1, 2]),
        ([0.7, 0.9, 0.8], True, [1, 3, 2]),
        ([0.7, 0.7, 0.8, 0.6], False, [2, 2, 1, 4]),
        ([0.7, None, float("nan"), 0.8], False, [2, None, None, 1]),
        ([0.7, 0.9], False, [None, None]),
    ],
)
def test_ranks(means: list[float | None], lower: bool, ranks: list[int | None]) -> None:
    assert ranked(means, lower) == ranks


def test_many_metrics_make_several_tables(tmp_path: Path, quick_plots: None) -> None:
    stored = json.loads((build(tmp_path, {"A": BASE, "B": shifted(0.02)}).folder / "comparison.json").read_text())
    stored["metrics"] = [f"measure {i}" for i in range(11)]
    for run in stored["runs"]:
        run["test"] = dict.fromkeys(stored["metrics"], 0.5)
    for row in stored["table"]:
        row["metrics"], row["versus_first"] = {}, None
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    page = write_comparison_report(tmp_path).read_text("utf-8")
    tables = re.findall(r'<table class="results".*?</thead>', page, flags=re.DOTALL)
    told = [re.findall(r"measure \d+", table) for table in tables]
    assert [len(names) for names in told] == [5, 6]
    assert [name for names in told for name in names] == stored["metrics"]
    assert page.count("<h3>Test images</h3>") == 1


@pytest.mark.parametrize("lower", [False, True])
def test_three_methods_are_ranked_in_the_order_given(tmp_path: Path, quick_plots: None, lower: bool) -> None:
    key = "nll" if lower else "top1"
    build(tmp_path, {"A": BASE, "B": shifted(0.02), "C": shifted(-0.02)}, key=key, lower=lower)
    page = write_comparison_report(tmp_path).read_text("utf-8")
    table = page.partition("<h2>Results</h2>")[2].partition("</table>")[0]
    told = re.findall(r"<bdi>(.)</bdi>.*?</th>\s*<td class=\"num\">(\d)</td>", table)
    assert told == [("A", "2"), ("B", "3" if lower else "1"), ("C", "1" if lower else "3")]


def test_two_methods_or_a_measure_without_a_better_end_are_not_ranked(tmp_path: Path, quick_plots: None) -> None:
    build(tmp_path / "two", {"A": BASE, "B": shifted(0.02)})
    build(tmp_path / "gap", {"A": BASE, "B": shifted(0.02), "C": shifted(-0.02)}, key="gap")
    for folder in ("two", "gap"):
        assert ">rank<" not in write_comparison_report(tmp_path / folder).read_text("utf-8")
