"""m2-Mix beside its neighbours, each tuned with the same budget from the same weights: one command, resumable.

    python benchmarks/evidence/m2mix/run.py --styles fluent=FOLDER    # an unpacked package of emoji, see docs/data.md
    python benchmarks/evidence/m2mix/run.py --only small
    python benchmarks/evidence/m2mix/missing.py                       # missing modalities, on its own
    python benchmarks/evidence/m2mix/page.py                          # the tables and the plot of the page

The start of each model is trained once and kept. The settings of every method are tried on seeds of their own, those
with the highest mean reciprocal rank on validation emoji are chosen, and then trained and tested on fresh seeds;
groups.py says what is tried. `dual` wants the weights of MobileNetV2 and MiniLM, see docs/data.md. The runs go to
--out, where finished ones are kept and broken ones resumed. What was measured is written beside this file into
results/: one row a tested run, and all that was tried.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groups import BASE, PLANS, SEEDS, TRIALS, TRIED, TUNING_SEEDS, ZERO_SHOT, Trials

from hardmix.train.compare import compare, default_workers
from hardmix.train.recipe import Recipe
from hardmix.train.start import start_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Runs, finished_runs, progress_line

HERE = Path(__file__).parent
DIRECTIONS = ("image_to_text", "text_to_image")
#: of summary.json's "test", as they are
METRICS = (
    *("recall_1", "recall_5", "recall_10", "mrr", "ece", "zeroshot", "zeroshot_ece", "fewshot_1", "fewshot_4"),
    *("fewshot_16", "shift_ece", "shift_zeroshot", "shift_fewshot_4", "arithmetic", "alignment", "uniformity", "gap"),
)
Watch = Callable[[int, dict[str, Any]], None]


class Study:
    """One model: settings tried, the best ones chosen, tested on fresh seeds."""

    def __init__(self, name: str, trials: Trials, methods: list[str], seeds: list[int], out: Path) -> None:
        self.name, self.trials, self.methods, self.seeds, self.out = name, trials, methods, seeds, out
        #: method -> name of what was tried -> mean reciprocal rank on validation emoji
        self.tried: dict[str, dict[str, float]] = {}
        self.recipes: list[Recipe] = []

    @property
    def runs(self) -> int:
        """How many there will be, but for the start."""
        return TRIALS * len(self.methods) * len(TUNING_SEEDS) + (len(self.methods) + 3) * len(self.seeds)

    def run(self, jobs: int, command: str, watch: Watch) -> None:
        def train(recipes: list[Recipe], seeds: list[int], folder: str) -> None:
            workers = jobs or default_workers(len(recipes) * len(seeds))
            compare(recipes, seeds, self.out / folder, workers=workers, command=command, title=self.name, watch=watch)

        tried = {BASE: self.trials.base()}
        best = {BASE: self._try(BASE, tried[BASE], train)}
        settings = best[BASE].train.model_dump(include={"lr", "weight_decay"})
        for method in self.methods[1:]:
            best[method] = self._try(method, self.trials.others(settings, method), train)
        first, *after = self.trials.untuned(settings)
        chosen = {ZERO_SHOT: first, **best, **{recipe.name: recipe for recipe in after}}
        self.recipes = [self.trials.tested(recipe, name) for name, recipe in chosen.items()]
        train(self.recipes, self.seeds, "tested")

    def _try(self, method: str, recipes: list[Recipe], train: Callable[..., None]) -> Recipe:
        seeds, folder = list(TUNING_SEEDS), f"tried/{method}"
        train(recipes, seeds, folder)
        _, runs = finished_runs(recipes, seeds, self.out / folder)
        ranks = {r.name: sum(runs[r.name, s]["validation"]["mrr"] for s in seeds) / len(seeds) for r in recipes}
        self.tried[method] = {name: round(rank, 6) for name, rank in ranks.items()}
        return max(recipes, key=lambda r: ranks[r.name])

    def write(self, command: str) -> None:
        """One row for each run of the seeds that every method has finished, and how they came about."""
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        seeds, runs = finished_runs(self.recipes, self.seeds, self.out / "tested")
        write_rows(folder / f"{self.name}.csv", runs)
        first = runs[self.recipes[0].name, seeds[0]]
        start = start_folder(self.recipes[0])
        assert start is not None
        about = {"command": command, "seeds": seeds, "versions": first["versions"], "device": first["device"]}
        parts = ("name", "train", "validation", "test", "styles", "trained_styles")
        about |= {"data": {key: first["data"][key] for key in parts}, "model": first["model"]}
        about |= {"tuning_seeds": list(TUNING_SEEDS), "tried": self.tried}
        about["chosen"] = {
            name: runs[name, seeds[0]].get("chosen")
            or recipe.model_dump(mode="json", include={"objective": True, "tune": {"temperature"}})
            for name, recipe in ((r.name, r) for r in self.recipes)
        }
        about["start"] = json.loads((start / "summary.json").read_text("utf-8"))["test"]
        about["train"] = next(r for r in self.recipes if r.name == BASE).train.model_dump(mode="json")
        (folder / f"{self.name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_rows(path: Path, runs: Runs) -> None:
    """Method, seed, the measures, and both directions' mean of each style: never seen emoji, and seen ones."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for (method, seed), run in runs.items():
            values = {key: run["test"][key] for key in METRICS}
            scaled = [run["calibration"][direction]["scaled"]["ece"] for direction in DIRECTIONS]
            values["ece_scaled"] = sum(scaled) / 2
            for line in run["retrieval"]:
                for key in ("recall_5", "mrr"):
                    mean = sum(line[f"{direction}_{key}"] for direction in DIRECTIONS) / 2
                    values[f"{line['part']}_{line['style']}_{key}"] = mean
            for kind, found in run["arithmetic"]["kinds"].items():
                values[f"arithmetic_{kind}"] = found["recall_1"]
            values["ms_per_step"] = 1000 * run["seconds"]["per_step"]
            if writer is None:
                writer = csv.DictWriter(file, ["method", "seed", *values])
                writer.writeheader()
            writer.writerow({"method": method, "seed": seed, **{key: f"{value:.6f}" for key, value in values.items()}})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help=f"models of {', '.join(PLANS)}; default all")
    parser.add_argument("--methods", nargs="*", help=f"of {', '.join(TRIED)}; default all, {BASE} is always there")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="tested")
    parser.add_argument("--styles", nargs="*", default=[], metavar="NAME=FOLDER", help="further styles to test on")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; 0: one per core, or one on a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence-m2mix"))
    options = parser.parse_args()
    for key, given, known in (("only", options.only, PLANS), ("methods", options.methods, TRIED)):
        if unknown := sorted(set(given or ()) - set(known)):
            parser.error(f"--{key} names {', '.join(unknown)}; there are {', '.join(known)}")
    styles = dict(entry.partition("=")[::2] for entry in options.styles)
    methods = [BASE, *(m for m in TRIED if m in (options.methods or TRIED))]
    shown = " ".join(f"{name}=FOLDER" for name in styles)
    command = "python benchmarks/evidence/m2mix/run.py" + (f" --styles {shown}" if shown else "")
    studies = [
        Study(name, Trials(PLANS[name], styles), methods, list(range(options.seeds)), options.out / name)
        for name in options.only or list(PLANS)
    ]
    watch = progress_line(sum(study.runs for study in studies))
    for study in studies:
        study.run(options.jobs, command, watch(study.name))
        study.write(command)
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
