"""SupReMix beside its neighbours, each tuned with the same budget: one command, resumable, small results.

    python benchmarks/evidence/supremix/run.py --vectors FOLDER   # word vectors for sts-b-dir; data as in docs/data.md
    python benchmarks/evidence/supremix/run.py --only diabetes meats
    python benchmarks/evidence/supremix/page.py                   # tables and plots of docs/evidence from the results

For each data set the settings of every method are tried on seeds of their own, those with the least mean absolute
error on validation rows are chosen, and then trained and tested on fresh seeds; groups.py says what is tried. The runs
go to --out, where finished ones are kept and broken ones resumed. What was measured is written beside this file into
results/: one row a tested run, and all that was tried. A study that is stopped (Ctrl-C, SIGTERM) while it tests writes
the seeds that all of its methods have finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groups import ABLATIONS, BASE, FROZEN, FROZEN_SEEDS, PLANS, TRIALS, TUNED, TUNING_SEEDS, Plan, Trials, ablations

from hardmix.train.compare import compare, default_workers
from hardmix.train.errors import Interrupted
from hardmix.train.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import finished_runs, progress_line, write_rows

HERE = Path(__file__).parent
METRICS = ("mae", "rmse", "r2", "pearson", "spearman", "ordinality", "local_linearity")
Watch = Callable[[int, dict[str, Any]], None]


class Study:
    """One data set: settings tried, the best ones chosen, tested on fresh seeds."""

    def __init__(self, name: str, trials: Trials, methods: list[str], seeds: list[int], out: Path) -> None:
        self.name, self.trials, self.methods, self.seeds, self.out = name, trials, methods, seeds, out
        #: method -> name of what was tried -> mean validation error
        self.tried: dict[str, dict[str, float]] = {}
        #: what is tested: as chosen ("tested"), and with the encoder as pre-training leaves it ("frozen")
        self.tested: dict[str, list[Recipe]] = {}

    @property
    def frozen(self) -> list[str]:
        return [method for method in self.methods if method in FROZEN]

    def seeds_of(self, part: str) -> list[int]:
        return self.seeds[:FROZEN_SEEDS] if part == "frozen" else self.seeds

    @property
    def runs(self) -> int:
        """How many there will be."""
        changed = len(ABLATIONS) * ("supremix" in self.methods)
        tested = (len(self.methods) + changed) * len(self.seeds)
        frozen = (len(self.frozen) + changed) * len(self.seeds[:FROZEN_SEEDS])
        return TRIALS * len(self.methods) * len(TUNING_SEEDS) + tested + frozen

    def run(self, jobs: int, command: str, watch: Watch) -> None:
        def train(recipes: list[Recipe], seeds: list[int], folder: str) -> None:
            workers = jobs or default_workers(len(recipes) * len(seeds))
            out = self.out / folder
            compare(recipes, seeds, out, workers=workers, command=command, title=self.name, watch=watch)

        tried = {BASE: self.trials.base()}
        best = self._try(BASE, tried[BASE], train)
        for method in self.methods[1:]:
            tried[method] = self.trials.others(best.train.model_dump(include={"lr", "weight_decay"}), method)
            self._try(method, tried[method], train)
        chosen = [self._best(method, recipes) for method, recipes in tried.items()]
        frozen = [self._best(method, [r for r in tried[method] if is_frozen(r)]) for method in self.frozen]
        for part, recipes in (("tested", chosen), ("frozen", frozen)):
            self.tested[part] = recipes + [r for s in recipes if s.name == "supremix" for r in ablations(s)]
        for part, recipes in self.tested.items():
            if recipes:
                train(recipes, self.seeds_of(part), part)

    def _try(self, method: str, recipes: list[Recipe], train: Callable[..., None]) -> Recipe:
        seeds, folder = list(TUNING_SEEDS), f"tried/{method}"
        train(recipes, seeds, folder)
        _, runs = finished_runs(recipes, seeds, self.out / folder)
        errors = {r.name: sum(runs[r.name, s]["validation"]["mae"] for s in seeds) / len(seeds) for r in recipes}
        self.tried[method] = {name: round(error, 6) for name, error in errors.items()}
        return self._best(method, recipes)

    def _best(self, method: str, recipes: list[Recipe]) -> Recipe:
        """The recipe with the least validation error, under the name of the method."""
        return min(recipes, key=lambda r: self.tried[method][r.name]).model_copy(update={"name": method})

    def write(self, command: str) -> None:
        """One row for each run of the seeds that every method has finished, and how they came about."""
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        for part, recipes in self.tested.items():
            seeds, runs = finished_runs(recipes, self.seeds_of(part), self.out / part)
            if not runs:
                continue
            file = self.name if part == "tested" else f"{self.name}-{part}"
            write_rows(folder / f"{file}.csv", runs, METRICS)
            first = runs[recipes[0].name, seeds[0]]
            about = {"command": command, "seeds": seeds, "versions": first["versions"], "device": first["device"]}
            parts = ("name", "kind", "target", "train", "validation", "test")
            about |= {"data": {key: first["data"][key] for key in parts}, "model": first["model"]}
            if part == "tested":
                about |= {"tuning_seeds": list(TUNING_SEEDS), "tried": self.tried}
            about["methods"] = {r.name: _table(r, include={"policy", "contrast"}) for r in recipes}
            about["recipe"] = _table(recipes[0], exclude={"name", "about", "policy", "contrast", "seed"})
            about["recipe"]["data"].pop("path")
            about["recipe"]["model"]["options"].pop("vectors", None)  # where somebody keeps them
            (folder / f"{file}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _table(recipe: Recipe, **which: Any) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True, **which)


def is_frozen(recipe: Recipe) -> bool:
    """Is the encoder left as pre-training makes it?"""
    return recipe.contrast is not None and recipe.contrast.epochs > 0 and recipe.contrast.probe == "linear"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help=f"data sets of {', '.join(PLANS)}; default all")
    parser.add_argument("--methods", nargs="*", help=f"of {', '.join(TUNED)}; default all, {BASE} is always there")
    parser.add_argument("--seeds", type=int, default=0, help="tested; 0: as many as groups.py says")
    parser.add_argument("--epochs", type=int, help="instead of those in groups.py, 2 at least; the results then say so")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; 0: one per core, or one on a GPU")
    parser.add_argument("--vectors", default="", help="folder of the word vectors that sts-b-dir starts from")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence-supremix"))
    options = parser.parse_args()
    for key, given, known in (("only", options.only, PLANS), ("methods", options.methods, TUNED)):
        if unknown := sorted(set(given or ()) - set(known)):
            parser.error(f"--{key} names {', '.join(unknown)}; there are {', '.join(known)}")
    names = options.only or list(PLANS)
    if "sts-b-dir" in names and not options.vectors:
        parser.error("sts-b-dir starts from word vectors; say where they are with --vectors, or leave it out of --only")
    methods = [BASE, *(m for m in TUNED if m in (options.methods or TUNED))]
    studies = []
    for name in names:
        plan = _with_epochs(PLANS[name], options.epochs)
        vectors = options.vectors if name == "sts-b-dir" else ""
        seeds = list(range(options.seeds or plan.seeds))
        studies.append(Study(name, Trials(plan, vectors), methods, seeds, options.out / name))
    watch = progress_line(sum(study.runs for study in studies))
    for study in studies:
        stopped: Interrupted | None = None
        command = f"python benchmarks/evidence/supremix/run.py --only {study.name}"
        command += " --vectors FOLDER" * (study.name == "sts-b-dir") + f" --epochs {options.epochs}" * bool(
            options.epochs
        )
        try:
            study.run(options.jobs, command, watch(study.name))
        except Interrupted as error:
            stopped = error
        study.write(command)
        if stopped is not None:
            print(f"\n{stopped}", file=sys.stderr)
            return 128 + stopped.signum
    print(file=sys.stderr)
    return 0


def _with_epochs(plan: Plan, epochs: int | None) -> Plan:
    """The plan with as many epochs in all, the same share of them before the head."""
    if epochs is None:
        return plan
    return plan._replace(epochs=epochs, first_stage=max(1, round(epochs * plan.first_stage / plan.epochs)))


if __name__ == "__main__":
    sys.exit(main())
