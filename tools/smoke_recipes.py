"""Run every shipped recipe whose data is at hand, shortened by --smoke, in a temporary folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from hardmix.data.catalog import survey
from hardmix.data.number_sets import NUMBER_SETS, find_numbers
from hardmix.train.recipe import load_recipe, shipped


def main() -> int:
    at_hand = {place.entry.name for place in survey() if place.path is not None}
    at_hand |= {name for name in NUMBER_SETS if find_numbers(name).path is not None}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in shipped():
            if load_recipe(name).data.name not in at_hand:
                sys.stdout.write(f"skip  {name} (its data set is not here)\n")
                continue
            out = Path(folder) / name
            command = [sys.executable, "-m", "hardmix", "run", name, "--smoke", "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            good = done.returncode == 0 and (out / "report.html").is_file()
            sys.stdout.write(f"{'ok  ' if good else 'FAIL'}  {name}\n")
            if not good:
                failed.append(name)
                sys.stdout.write(done.stdout + done.stderr)
    sys.stdout.write(f"{len(failed)} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
