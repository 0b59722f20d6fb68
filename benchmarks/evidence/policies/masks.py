"""How much the masks vary within an image that AutoMix, SAMix and AdAutoMix had learnt at the end of their runs.

    python benchmarks/evidence/policies/masks.py RUNS     # the --out of run.py; writes results/learnt-masks.csv

Of 128 training images each: the standard deviation of the mask over the pixels, mean over images (and over the masks of
AdAutoMix). A mask of one value, as Mixup's, has 0.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch

from hardmix.mixing import AdAutoMix
from hardmix.train.evaluate import load_run

HERE = Path(__file__).parent
COMPARISON = "fashion-2400"
LEARNT = ("automix", "samix", "adautomix")


def spread(run: Path) -> float:
    """The mean deviation within an image of the masks that a run's policy makes."""
    task = load_run(run).task
    task.on_pixels.train()  # as the policy sees it
    x = task.train_set.batch(torch.arange(128)).to(torch.float32) / 255.0
    draws = torch.Generator().manual_seed(1)
    if isinstance(task.policy, AdAutoMix):
        masks = task.policy.mixture(x, generator=draws).masks
    else:
        masks = task.policy.plan(x, task.train_set.labels[:128], generator=draws).mask
    return masks.flatten(2).std(2).mean().item()


def main(out: Path) -> None:
    with open(HERE / "results" / "learnt-masks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "deviation"])
        for method in (f"{policy}-{loss}" for policy in LEARNT for loss in ("ce", "dm")):
            for run in sorted((out / COMPARISON / method).glob("seed-*")):
                writer.writerow([method, run.name.removeprefix("seed-"), f"{spread(run):.4f}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
