"""The tables and the plot of docs/evidence/semi.md, from the results beside this file.

    python benchmarks/evidence/semi/page.py            # writes them again
    python benchmarks/evidence/semi/page.py --check    # says whether they are what the results give

A table stands between `<!-- evidence: NAME -->` and `<!-- end -->`; the words around it are written by hand.
Differences are paired by seed, which is a draw of the labelled samples. The tests of one column are one family, with
Holm's correction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Cell, Measure, Study, columns_of_tests, read_studies, table, values_table, write_page

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[3] / "docs" / "evidence"
PAGE = DOCS / "semi.md"
MEASURES: dict[str, Measure] = {
    "top1": ("top-1", 100, 1),
    "pseudo_top1": ("pseudo-class top-1", 100, 1),
    "nll": ("NLL", 1, 2),
    "ece": ("ECE", 100, 1),
}
TITLES = {
    "supervised": "labels alone",
    "fixmatch": "FixMatch",
    "fixmatch-mixup": "FixMatch + Mixup",
    "fixmatch-dm": "FixMatch + DM",
    "flexmatch": "FlexMatch",
    "flexmatch-mixup": "FlexMatch + Mixup",
    "flexmatch-dm": "FlexMatch + DM",
    "mixmatch": "MixMatch",
    "mixmatch-dm": "MixMatch + DM",
    "fixmatch-mixup-any": "FixMatch + Mixup, any share",
    "fixmatch-mixup-large": "FixMatch + Mixup, large share",
    "fixmatch-dm-large": "FixMatch + DM, large share",
    "fixmatch-dm-both": "FixMatch + DM, both classes",
    "fine-tuning": "Fine-Tuning",
    "fine-tuning-mixup": "Fine-Tuning + Mixup",
    "fine-tuning-dm": "Fine-Tuning + DM",
    "self-tuning": "Self-Tuning",
    "self-tuning-mixup": "Self-Tuning + Mixup",
    "self-tuning-dm": "Self-Tuning + DM",
}
#: (heading, method, what it is compared with): what the paper's claims are about
CLAIMS = (
    ("FixMatch - labels alone", "fixmatch", "supervised"),
    ("FixMatch: + Mixup", "fixmatch-mixup", "fixmatch"),
    ("FixMatch: + DM", "fixmatch-dm", "fixmatch"),
    ("FixMatch: DM - Mixup", "fixmatch-dm", "fixmatch-mixup"),
    ("FlexMatch: + Mixup", "flexmatch-mixup", "flexmatch"),
    ("FlexMatch: + DM", "flexmatch-dm", "flexmatch"),
    ("FlexMatch: DM - Mixup", "flexmatch-dm", "flexmatch-mixup"),
    ("MixMatch: + DM", "mixmatch-dm", "mixmatch"),
    ("Mixup: small share - any", "fixmatch-mixup", "fixmatch-mixup-any"),
    ("Mixup: small share - large", "fixmatch-mixup", "fixmatch-mixup-large"),
    ("DM: small share - large", "fixmatch-dm", "fixmatch-dm-large"),
    ("DM: labelled class alone - both", "fixmatch-dm", "fixmatch-dm-both"),
    ("Fine-Tuning: + Mixup", "fine-tuning-mixup", "fine-tuning"),
    ("Fine-Tuning: + DM", "fine-tuning-dm", "fine-tuning"),
    ("Fine-Tuning: DM - Mixup", "fine-tuning-dm", "fine-tuning-mixup"),
    ("Self-Tuning - Fine-Tuning", "self-tuning", "fine-tuning"),
    ("Self-Tuning: + Mixup", "self-tuning-mixup", "self-tuning"),
    ("Self-Tuning: + DM", "self-tuning-dm", "self-tuning"),
    ("Self-Tuning: DM - Mixup", "self-tuning-dm", "self-tuning-mixup"),
)
#: what is shown, and which comparisons are columns of one table of differences
SHOWN = ("fashion-10", "cifar10-25", "transfer-15", "transfer-30", "transfer-50")
HEADINGS = {
    "fashion-10": "Fashion-MNIST, 10 labels a class",
    "cifar10-25": "CIFAR-10, 25 labels a class",
    "transfer-15": "15 % labelled",
    "transfer-30": "30 %",
    "transfer-50": "50 %",
}


STUDIES = read_studies(RESULTS, SHOWN)


def differences(names: tuple[str, ...], key: str = "top1") -> str:
    """What each claim comes to, a column for each comparison; without those that none of them has."""
    studies = [STUDIES[name] for name in names]
    claims = [claim for claim in CLAIMS if any({claim[1], claim[2]} <= study.runs.keys() for study in studies)]
    rows: list[list[Cell]] = [[_cell(study, method, base, key) for study in studies] for _, method, base in claims]
    cells = columns_of_tests(rows, MEASURES)
    return table(
        ["", *(HEADINGS[name] for name in names)],
        [[claim[0], *line] for claim, line in zip(claims, cells, strict=True)],
    )


def _cell(study: Study, method: str, base: str, key: str) -> Cell:
    if not {method, base} <= study.runs.keys():
        return None
    return study.test(method, base, key), key


def parts() -> dict[str, Callable[[], str]]:
    matching = tuple(name for name in SHOWN if name in STUDIES and not name.startswith("transfer"))
    transfer = tuple(name for name in SHOWN if name in STUDIES and name.startswith("transfer"))
    found: dict[str, Callable[[], str]] = {
        name: partial(values_table, study.runs, TITLES, MEASURES) for name, study in STUDIES.items()
    }
    found["matching differences"] = partial(differences, matching)
    found["matching pseudo differences"] = partial(differences, matching, "pseudo_top1")
    found["matching nll differences"] = partial(differences, matching, "nll")
    if transfer:
        found["transfer differences"] = partial(differences, transfer)
        found["transfer nll differences"] = partial(differences, transfer, "nll")
    return found


PARTS = parts()


def draw() -> None:
    import plots

    plots.draw(DOCS)


def main(arguments: list[str] | None = None) -> int:
    return write_page(PAGE, PARTS, draw, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
