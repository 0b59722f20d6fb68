"""Run every shipped recipe whose data is at hand, shortened by --smoke, in a temporary folder.

    python tools/smoke_recipes.py             # also compares the losses of the steps with golden_losses.json
    python tools/smoke_recipes.py --record    # writes that file anew: after a change that is meant to change them

On the kind of machine that the file was made on, the same recipe gives the same losses to 1e-6; on another one the
file says nothing. Recipes that begin with another run, which may be older than the code, are left out of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from hardmix.data.catalog import survey
from hardmix.data.number_sets import NUMBER_SETS, find_numbers
from hardmix.data.pair_sets import PAIR_SETS
from hardmix.data.places import installed, usual_places
from hardmix.models.imagenet import find_weights
from hardmix.models.towers import MINILM
from hardmix.train.recipe import Recipe, load_recipe, shipped, start_recipe
from hardmix.train.start import prepare_start

GOLDEN = Path(__file__).with_name("golden_losses.json")
TOLERANCE = 1e-6


def lacks_weights(recipe: Recipe) -> bool:
    """Whether a model is made of published weights that are not here."""
    image, text = (recipe.model.options.get(side, {}) for side in ("image", "text"))
    if image.get("weights") and find_weights(image["name"]) is None:
        return True
    places = [*usual_places(MINILM[0]), *installed(MINILM[1])]
    return text.get("name") == "language-model" and "path" not in text and not any(p.is_dir() for p in places)


def lacks(recipe: Recipe, at_hand: set[str]) -> str:
    """What of a recipe is not here; empty where all is."""
    wanted = {recipe.data.name}
    if recipe.tune.start:
        wanted.add(start_recipe(recipe.tune.start, recipe.task).data.name)
    if not wanted <= at_hand:
        return "data set is"
    return "weights are" if lacks_weights(recipe) else ""


def smoke(folder: Path, name: str) -> str:
    """What a recipe says when it fails; empty where it does not."""
    command = [sys.executable, "-m", "hardmix", "run", name, "--smoke", "--out", str(folder / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one run a core
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    good = done.returncode == 0 and (folder / name / "report.html").is_file()
    return "" if good else done.stdout + done.stderr or "it wrote no report\n"


def machine() -> dict[str, str]:
    """What rounding depends on."""
    about = {"torch": torch.__version__, "machine": platform.machine(), "simd": torch.backends.cpu.get_cpu_capability()}
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8") if info.is_file() else platform.processor()
    for key in ("model name", "cpu family", "model", "stepping", "cache size"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        about[key] = found[1] if found else ""
    return about


def losses(folder: Path) -> dict[str, list[float]]:
    """Loss and contrast of each step of a run."""
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            for key in ("loss", "contrast"):
                if key in record:
                    found.setdefault(key, []).append(record[key])
    return found


def differences(known: dict[str, list[float]], now: dict[str, list[float]]) -> list[str]:
    """Where the losses of a recipe are others than those on file."""
    if {key: len(values) for key, values in known.items()} != {key: len(values) for key, values in now.items()}:
        return ["other steps or other losses"]
    return [
        f"{key} of step {step} is {new:.9g} and was {old:.9g}"
        for key in known
        for step, (old, new) in enumerate(zip(known[key], now[key], strict=True), 1)
        if None in (old, new) or not math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE)  # null: not finite
    ]


def compare_losses(found: dict[str, dict[str, list[float]]], record: bool) -> int:
    """How many recipes have other losses than those on file; with `record` the file is written instead.

    Of the same machine the file keeps recipes that were not run now, such as those whose data is elsewhere.
    """
    here = machine()
    if record:
        if GOLDEN.is_file() and (before := json.loads(GOLDEN.read_text("utf-8")))["machine"] == here:
            found = {name: values for name, values in before["losses"].items() if name in shipped()} | found
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(found.items()))
        text = f'{{"machine": {json.dumps(here)},\n"losses": {{\n{lines}\n}}}}\n'
        GOLDEN.write_text(text, encoding="utf-8")
        return 0
    golden = json.loads(GOLDEN.read_text("utf-8"))
    if golden["machine"] != here:
        sys.stdout.write("losses not compared: golden_losses.json is of another machine or torch\n")
        return 0
    known, changed = [name for name in found if name in golden["losses"]], 0
    for name in known:
        told = differences(golden["losses"][name], found[name])
        changed += bool(told)
        for line in told:
            sys.stdout.write(f"LOSS  {name}: {line}\n")
    sys.stdout.write(f"{changed} of {len(known)} recipes have other losses than golden_losses.json\n")
    if changed:
        sys.stdout.write("if that is meant: python tools/smoke_recipes.py --record\n")
    if new := sorted(found.keys() - golden["losses"].keys()):
        sys.stdout.write(f"not on file: {', '.join(new)}\n")
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {GOLDEN.name} instead of comparing with it")
    options = parser.parse_args()
    at_hand = {place.entry.name for place in survey() if place.path is not None}
    at_hand |= {name for name in NUMBER_SETS if find_numbers(name).path is not None}
    for name, pairs in PAIR_SETS.items():
        if not pairs.yours and (pairs.find is None or pairs.find(None).path is not None):
            at_hand.add(name)
    wanted: list[str] = []
    for name in shipped():
        if lacking := lacks(load_recipe(name), at_hand):
            sys.stdout.write(f"skip  {name} (its {lacking} not here)\n")
        else:
            wanted.append(name)
    for name in wanted:
        prepare_start(load_recipe(name))  # once, before several of them look for it side by side
    failed, found = [], {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        for name, problem in zip(wanted, workers.map(partial(smoke, Path(folder)), wanted), strict=True):
            sys.stdout.write(f"{'FAIL' if problem else 'ok  '}  {name}\n")
            if problem:
                failed.append(name)
                sys.stdout.write(problem)
            elif not load_recipe(name).tune.start:
                found[name] = losses(Path(folder) / name)
    sys.stdout.write(f"{len(failed)} failed\n")
    if failed and options.record:
        sys.stdout.write("nothing recorded\n")
        return 1
    return int(bool(compare_losses(found, options.record) or failed))


if __name__ == "__main__":
    raise SystemExit(main())
