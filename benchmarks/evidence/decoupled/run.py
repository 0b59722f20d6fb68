"""What Decoupled Mixup does when labels are few: one command, resumable, results small enough to commit.

    python benchmarks/evidence/decoupled/run.py --budget small    # embedded Fashion-MNIST, an hour on two cores
    python benchmarks/evidence/decoupled/run.py --budget full     # adds CIFAR-10 and ResNet-18; wants a GPU
    python benchmarks/evidence/decoupled/page.py                  # tables and plots of docs/evidence from the results

Every method of a comparison is trained on the same seeds, images, initial weights and order; groups.py says which
methods and why. The runs go to --out, where finished ones are kept and broken ones resumed. The numbers of each run are
written beside this file into results/, one row a run. A comparison that is stopped (Ctrl-C, SIGTERM) writes the seeds
that all of its methods have finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from groups import groups

from hardmix.train.compare import compare, default_workers, plan_jobs
from hardmix.train.errors import Interrupted
from hardmix.train.recipe import Recipe
from hardmix.train.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import finished_runs, progress_line, write_rows

HERE = Path(__file__).parent


def write_results(name: str, recipes: list[Recipe], seeds: list[int], out: Path, command: str) -> None:
    """One row for each run of the seeds that every method has finished, and how they came about."""
    finished, runs = finished_runs(recipes, seeds, out)
    if not finished:
        return
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    write_rows(folder / f"{name}.csv", runs, TASKS["classification"].metrics)
    first = runs[recipes[0].name, finished[0]]
    about = {"command": command, "seeds": finished, "versions": first["versions"], "device": first["device"]}
    about |= {"data": {key: first["data"][key] for key in ("name", "train", "test")}, "model": first["model"]}
    recipe = recipes[0].model_dump(mode="json", exclude_none=True, exclude={"name", "policy", "objective", "seed"})
    recipe["data"].pop("path")
    (folder / f"{name}.json").write_text(json.dumps({**about, "recipe": recipe}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=["small", "full"], default="small")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; 0: one per core, or one on a GPU")
    parser.add_argument("--only", nargs="*", help="comparisons of the budget; default all")
    parser.add_argument("--epochs", type=int, help="instead of those in groups.py; the results then say so")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence-decoupled"))
    options = parser.parse_args()
    known = groups(options.budget, options.epochs)
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only names {', '.join(unknown)}; budget {options.budget} has {', '.join(known)}")
    chosen = {name: known[name] for name in options.only or known}
    seeds = list(range(options.seeds))
    jobs = [job for name, recipes in chosen.items() for job in plan_jobs(recipes, seeds, options.out / name)]
    watch = progress_line(len(jobs))
    stopped: Interrupted | None = None
    for name, recipes in chosen.items():
        command = f"python benchmarks/evidence/decoupled/run.py --budget {options.budget} --only {name}"
        command += f" --jobs {options.jobs}" * bool(options.jobs) + f" --epochs {options.epochs}" * bool(options.epochs)
        workers = options.jobs or default_workers(len(recipes) * len(seeds))
        try:
            out = options.out / name
            compare(recipes, seeds, out, workers=workers, command=command, title=name, watch=watch(name))
        except Interrupted as error:
            stopped = error
        write_results(name, recipes, seeds, options.out / name, command)
        if stopped is not None:
            print(f"\n{stopped}", file=sys.stderr)
            return 128 + stopped.signum
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
