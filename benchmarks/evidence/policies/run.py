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

import sys
from pathlib import Path

from groups import groups

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run_study

HERE = Path(__file__).parent
#: what is taken of each run's robustness.json
HEADLINE = ("occluded", "fgsm", "corrupted")


def main() -> int:
    return run_study(__doc__, HERE, groups, HEADLINE)


if __name__ == "__main__":
    sys.exit(main())
