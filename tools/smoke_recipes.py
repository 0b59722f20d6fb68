"""Run every shipped recipe whose data is at hand, shortened by --smoke, in a temporary folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hardmix.data.catalog import survey
from hardmix.data.number_sets import NUMBER_SETS, find_numbers
from hardmix.data.pair_sets import PAIR_SETS
from hardmix.data.places import installed, usual_places
from hardmix.models.imagenet import find_weights
from hardmix.models.towers import MINILM
from hardmix.train.recipe import Recipe, load_recipe, shipped, start_recipe
from hardmix.train.start import prepare_start


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


def main() -> int:
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
    failed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        for name, problem in zip(wanted, workers.map(partial(smoke, Path(folder)), wanted), strict=True):
            sys.stdout.write(f"{'FAIL' if problem else 'ok  '}  {name}\n")
            if problem:
                failed.append(name)
                sys.stdout.write(problem)
    sys.stdout.write(f"{len(failed)} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
