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
import sys
from pathlib import Path

from groups import groups

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run_groups

HERE = Path(__file__).parent


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
    command = f"python benchmarks/evidence/decoupled/run.py --budget {options.budget}"
    command += f" --epochs {options.epochs}" * bool(options.epochs)
    return run_groups(chosen, HERE, options.out, list(range(options.seeds)), options.jobs, command)


if __name__ == "__main__":
    sys.exit(main())
