"""What Decoupled Mixup does when labels are few: one command, resumable, results small enough to commit.

    python benchmarks/evidence/decoupled/run.py --budget small    # embedded Fashion-MNIST, half an hour on two cores
    python benchmarks/evidence/decoupled/run.py --budget full     # adds larger subsets and CIFAR-10; wants a GPU

Every method of a group is trained on the same seeds, subsets, splits, initial weights and order. Each policy is run
with plain soft cross entropy at the alpha that is usual for it and at the alpha of the Decoupled Mixup paper, and with
Decoupled Mixup at the latter: the paper changes alpha and loss together, so only the second and third tell what the
loss does. The runs go to --out (default runs/evidence-decoupled), where finished ones are kept and broken ones resumed.
The numbers of each run are written beside this file into results/.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from hardmix.train.compare import METRICS, compare
from hardmix.train.recipe import Recipe, check_recipe

HERE = Path(__file__).parent
ETA = 0.5
USUAL_ALPHA, PAPER_ALPHA = 1.0, 0.2
HIDDEN = {"small-resnet": ["stage1", "stage2"], "resnet18": ["stage1", "stage2"], "tiny-vit": ["stage1", "stage2"]}
TRAIN = {"epochs": 30, "batch_size": 64, "lr": 0.1, "weight_decay": 5e-4, "warmup_epochs": 3, "threads": 1}
VIT_TRAIN = {**TRAIN, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0}
SPARSE = {"eval": {"every": 5}}


def policy(name: str, model: str, alpha: float | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
    if name == "manifold-mixup":
        options["layers"] = HIDDEN[model]
    return {"name": name, **options}


def methods(model: str, policies: list[str]) -> dict[str, dict[str, Any]]:
    """Policy and objective of each method, by name; no mixing comes first, it is what the others are tested against."""
    made: dict[str, dict[str, Any]] = {"none": {"objective": {"name": "soft-cross-entropy"}}}
    for name in policies:
        # ResizeMix draws its own scale and has no alpha.
        alphas = (None,) if name == "resizemix" else (USUAL_ALPHA, PAPER_ALPHA)
        for alpha in alphas:
            made[f"{name}-ce" + ("" if alpha is None else f"-a{alpha:g}")] = {
                "policy": policy(name, model, alpha),
                "objective": {"name": "soft-cross-entropy"},
            }
        alpha = alphas[-1]
        made[f"{name}-dm" + ("" if alpha is None else f"-a{alpha:g}")] = {
            "policy": policy(name, model, alpha),
            "objective": {"name": "decoupled-mixup", "eta": ETA},
        }
    return made


def eta_methods() -> dict[str, dict[str, Any]]:
    """The weight of the regulariser, everything else alike."""
    return {
        f"{name}-dm-eta{eta:g}": {
            "policy": policy(name, "small-resnet", PAPER_ALPHA),
            "objective": {"name": "decoupled-mixup", "eta": eta},
        }
        for name in ("mixup", "cutmix")
        for eta in (0.0, 0.1, 0.5, 1.0, 2.0)
    }


def bce_methods() -> dict[str, dict[str, Any]]:
    """The binary form: one-vs-all targets as they are, and rescaled with the paper's settings."""
    made = {}
    for name, xi, t in (("mixup", 1.0, 0.5), ("cutmix", 0.8, 1.0)):
        mixed = policy(name, "small-resnet", PAPER_ALPHA)
        made[f"{name}-bce"] = {"policy": mixed, "objective": {"name": "soft-bce"}}
        made[f"{name}-dm-bce"] = {"policy": mixed, "objective": {"name": "decoupled-mixup-bce", "xi": xi, "t": t}}
    return made


ALL = ["mixup", "cutmix", "fmix", "resizemix", "manifold-mixup"]
PAIR = ["mixup", "cutmix"]


def group(
    data: str, samples: int, model: str, chosen: dict[str, dict[str, Any]], train: dict[str, Any]
) -> list[Recipe]:
    """The recipes of one comparison. A sixth of the images is for validation, `samples` are trained on."""
    recipes = []
    for name, parts in chosen.items():
        table = {
            "name": name,
            "data": {"name": data, "train_samples": round(samples * 1.2), "validation": 1 / 6, "augment": ["flip"]},
            "model": {"name": model},
            "train": train,
            **SPARSE,
            **parts,
        }
        if data == "cifar10":
            table["data"]["augment"] = ["flip", "crop"]
        recipes.append(check_recipe(table, name))
    return recipes


def groups(budget: str) -> dict[str, list[Recipe]]:
    small, vit = "small-resnet", "tiny-vit"
    made = {
        "fashion-1000": group("fashion-mini", 1000, small, methods(small, ALL), TRAIN),
        "fashion-2000": group("fashion-mini", 2000, small, methods(small, PAIR), TRAIN),
        "fashion-1000-eta": group("fashion-mini", 1000, small, eta_methods(), TRAIN),
        "fashion-1000-bce": group("fashion-mini", 1000, small, bce_methods(), TRAIN),
        "fashion-1000-vit": group("fashion-mini", 1000, vit, methods(vit, PAIR), VIT_TRAIN),
    }
    if budget == "full":
        long = {**TRAIN, "epochs": 200, "warmup_epochs": 5, "threads": 0, "batch_size": 100}
        made["fashion-2000"] = group("fashion-mini", 2000, small, methods(small, ALL), TRAIN)
        made["fashion-5000"] = group("fashion-mini", 5000, small, methods(small, ALL), TRAIN)
        for samples in (5000, 10000, 25000):
            made[f"cifar10-{samples}"] = group("cifar10", samples, "resnet18", methods("resnet18", ALL), long)
    return made


def write_results(name: str, result: dict[str, Any], recipes: list[Recipe]) -> None:
    """One row a run, and the tests, without anything that depends on the machine but the seconds."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *METRICS, "seconds_per_step"])
        for run in result["runs"]:
            values = [f"{run['test'][metric]:.6f}" for metric in METRICS]
            writer.writerow([run["name"], run["seed"], *values, f"{run['seconds']['per_step']:.5f}"])
    about = {key: result[key] for key in ("command", "seeds", "versions", "device")}
    recipe = recipes[0].model_dump(mode="json", exclude_none=True, exclude={"name", "policy", "objective", "seed"})
    (folder / f"{name}.json").write_text(json.dumps({**about, "recipe": recipe}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=["small", "full"], default="small")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; 0: one per core, or one on a GPU")
    parser.add_argument("--only", nargs="*", help="names of groups; default all of the budget")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence-decoupled"))
    options = parser.parse_args()
    chosen = {name: recipes for name, recipes in groups(options.budget).items() if name in (options.only or [name])}
    total = sum(len(recipes) for recipes in chosen.values()) * options.seeds
    done = 0
    for name, recipes in chosen.items():

        def watch(number: int, event: dict[str, Any]) -> None:
            nonlocal done
            if event.get("done"):
                done += 1
                print(f"\r{done} of {total} runs  ({name})    ", end="", file=sys.stderr, flush=True)  # noqa: B023

        command = f"python benchmarks/evidence/decoupled/run.py --budget {options.budget} --only {name}"
        result = compare(
            recipes,
            list(range(options.seeds)),
            options.out / name,
            workers=options.jobs,
            command=command,
            title=name,
            watch=watch,
        )
        write_results(name, result, recipes)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
