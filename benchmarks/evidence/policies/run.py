"""Every mixing policy with and without Decoupled Mixup: one command, resumable, results small enough to commit.

    python benchmarks/evidence/policies/run.py --budget small    # embedded Fashion-MNIST, two hours on two cores
    python benchmarks/evidence/policies/run.py --budget full     # adds CIFAR-10 and ResNet-18; the last wants a GPU
    python benchmarks/evidence/policies/page.py                  # tables and plots of docs/evidence from the results

Every method of a comparison is trained on the same seeds, images, initial weights and order; groups.py says which
methods and why. When all runs of a comparison are done, each is asked about occluded, attacked and corrupted test
images, and the numbers are written beside this file into results/, one row a run. The runs go to --out, where finished
ones are kept and broken ones resumed, so what was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from groups import groups

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run_groups

HERE = Path(__file__).parent
#: what is taken of each run's robustness.json
HEADLINE = ("occluded", "fgsm", "corrupted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=["small", "full"], default="small")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; 0: one per core, or one on a GPU")
    parser.add_argument("--only", nargs="*", help="comparisons of the budget; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence-policies"))
    options = parser.parse_args()
    known = groups(options.budget)
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only names {', '.join(unknown)}; budget {options.budget} has {', '.join(known)}")
    chosen = {name: known[name] for name in options.only or known}
    command = f"python benchmarks/evidence/policies/run.py --budget {options.budget}"
    return run_groups(chosen, HERE, options.out, list(range(options.seeds)), options.jobs, command, headline=HEADLINE)


if __name__ == "__main__":
    sys.exit(main())
