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

import sys
from pathlib import Path

from groups import groups

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run_study

HERE = Path(__file__).parent


def main() -> int:
    return run_study(__doc__, HERE, groups, epochs=True)


if __name__ == "__main__":
    sys.exit(main())
