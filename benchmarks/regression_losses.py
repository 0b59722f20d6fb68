"""Cost of what is made for numbers and not timed by contrastive_regression.py: forward and backward, one thread.

    python benchmarks/regression_losses.py            # prints the table; some minutes
    python benchmarks/regression_losses.py --save     # also writes benchmarks/results/regression_losses.json
    python benchmarks/regression_losses.py --rows 128 512

A case is compared with the plain thing of its kind, the first of its group: supervised contrast from one N x N matrix,
`F.l1_loss`, mixup with random partners, `F.batch_norm`, a sort. All cases of an N take turns in one process, each
round in another order; the least CPU time of the thread counts, which says most on a shared machine. Memory: one
process per case, the peak of what is resident beyond its inputs. Labels are whole years from 20 to 69, two rows a
label, unless a case says that they are distinct; embeddings and features have 128 numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_regression import supcon_matrix
from hardmix.losses import (
    FeatureSmoothing,
    adaptive_supcon_loss,
    bmc_loss,
    conr_loss,
    focal_r_loss,
    gai_loss,
    kernel_contrast_loss,
    label_mixture,
    lds_weights,
    ordinal_entropy_loss,
    ranksim_loss,
    regression_loss,
)
from hardmix.mixing import CMixup, LabelKernel, Mixup

RESULT = Path(__file__).parent / "results" / "regression_losses.json"
SIZE, POOL = 128, 20_000
ROUNDS = {128: 40, 512: 20, 2048: 14}
#: seconds that a turn of a case takes at least, so that the small ones, too, run on warm caches
STAY = 0.002


class Batch(NamedTuple):
    """z (N, D) and predictions (N,) with gradient; labels y (N,) twice each, `distinct` (N,) none twice; labels of a
    training set; what smooths features."""

    z: Tensor
    predictions: Tensor
    y: Tensor
    distinct: Tensor
    pool: Tensor
    smoothing: FeatureSmoothing


def updated(b: Batch) -> Tensor:
    b.smoothing.update(b.z, b.y)
    return torch.zeros((), requires_grad=True)


def mixed(policy: Mixup) -> Callable[[Batch], Tensor | None]:
    return lambda b: policy(b.z.detach(), b.y)[0]


MIXTURE = label_mixture(torch.arange(20.0, 70.0), 8)
KERNEL = LabelKernel(bandwidth=2.0)
Case = Callable[[Batch], Tensor | None]
#: group -> {case: what is run, and differentiated where it can be}; the first is what the others are compared with
CASES: dict[str, dict[str, Case]] = {
    "embeddings": {
        "supcon, one matrix": lambda b: supcon_matrix(b.z, b.y, b.y),
        "adasupcon": lambda b: adaptive_supcon_loss(b.z, b.y),
        "adasupcon, population": lambda b: adaptive_supcon_loss(b.z, b.y, population=b.pool),
        "kernel-contrast, y-aware": lambda b: kernel_contrast_loss(b.z, b.y, bandwidth=2.0),
        "kernel-contrast, exp": lambda b: kernel_contrast_loss(b.z, b.y, kind="exp", bandwidth=2.0),
        "kernel-contrast, threshold": lambda b: kernel_contrast_loss(b.z, b.y, kind="threshold", bandwidth=2.0),
        "conr": lambda b: conr_loss(b.z, b.y, b.predictions),
        "ranksim": lambda b: ranksim_loss(b.z, b.y),
        "ranksim, distinct": lambda b: ranksim_loss(b.z, b.distinct),
        "ordinal-entropy": lambda b: ordinal_entropy_loss(b.z, b.y),
        "ordinal-entropy, distinct": lambda b: ordinal_entropy_loss(b.z, b.distinct),
    },
    "predictions": {
        "l1_loss": lambda b: F.l1_loss(b.predictions, b.y),
        "regression, l1": lambda b: regression_loss(b.predictions, b.y),
        "regression, huber": lambda b: regression_loss(b.predictions, b.y, kind="huber"),
        "focal-r": lambda b: focal_r_loss(b.predictions, b.y),
        "balanced-mse, bmc": lambda b: bmc_loss(b.predictions, b.y, noise_sigma=8.0),
        "balanced-mse, gai": lambda b: gai_loss(b.predictions, b.y, noise_sigma=8.0, mixture=MIXTURE),
    },
    "policies": {
        "random partners": mixed(Mixup(per="batch", pairing="permutation")),
        "c-mixup": mixed(CMixup(bandwidth=2.0)),
        "c-mixup, from a pool": lambda b: KERNEL.partners(b.y, b.pool).float(),
    },
    "features": {
        "batch_norm": lambda b: F.batch_norm(b.z, None, None, training=True).square().mean(),
        "fds": lambda b: b.smoothing(b.z, b.y).square().mean(),
        "fds, update": updated,
    },
    "labels": {
        "sort": lambda b: b.y.sort().values,
        "lds": lambda b: lds_weights(b.y, bin_width=1),
    },
}


def batch(rows: int) -> Batch:
    torch.manual_seed(0)
    y = torch.randint(20, 70, (rows // 2,)).float().repeat(2)
    z, noise = torch.randn(rows, SIZE), 5 * torch.randn(rows)
    distinct = 20 + 50 * torch.rand(rows, dtype=torch.float64)
    smoothing = FeatureSmoothing(SIZE, label_range=(20, 70), bins=50)
    smoothing.update(torch.randn(1000, SIZE), torch.randint(20, 70, (1000,)))
    pool = torch.randint(20, 70, (POOL,)).float().sort().values
    return Batch(z.requires_grad_(), (y + noise).requires_grad_(), y, distinct, pool, smoothing)


def run(case: Case, b: Batch) -> None:
    b.z.grad = b.predictions.grad = None
    value = case(b)
    if value is not None and value.requires_grad:
        value.backward()


def time_cases(rows: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    b, flat = batch(rows), {(group, name): case for group, cases in CASES.items() for name, case in cases.items()}
    least = dict.fromkeys(flat, float("inf"))
    for turn in range(rounds + 1):
        for key in random.Random(turn).sample(list(flat), len(flat)):  # what ran before leaves its mark on the heap
            spent = 0.0
            while spent < STAY:
                started = time.thread_time()
                run(flat[key], b)
                took = time.thread_time() - started
                spent += took
                if turn:
                    least[key] = min(least[key], took)
    first = {group: least[group, next(iter(cases))] for group, cases in CASES.items()}
    return [
        {"group": group, "case": name, "rows": rows, "ms": round(1e3 * s, 4), "ratio": round(s / first[group], 3)}
        for (group, name), s in least.items()
    ]


def peak_memory(rows: int, group: str, name: str) -> float:
    """MB that are resident at most during one forward and backward, beyond the inputs."""
    torch.set_num_threads(1)
    case = CASES[group][name]
    run(case, batch(16))  # code pages are there before the count starts
    b = batch(rows)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run(case, b)
    return max(resident("VmHWM") - before, 0) / 2**10


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def child(*arguments: str) -> Any:
    """The answer of this file run again: the number of threads has to be set before torch starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="repeats of each case; less for large N unless given")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULT.name}")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, rows, *rest = options.child
        print(json.dumps(peak_memory(int(rows), *rest) if kind == "memory" else time_cases(int(rows), int(*rest))))
        return
    table: list[dict[str, Any]] = []
    for rows in options.rows:
        print(f"\nN = {rows}")
        for row in child("time", str(rows), str(options.rounds or ROUNDS.get(rows, 5))):
            row["peak_mb"] = round(child("memory", str(rows), row["group"], row["case"]), 2)
            print("{group:12}{case:28}{ms:10.3f} ms{ratio:9.1f} x{peak_mb:9.1f} MB".format(**row), flush=True)
            table.append(row)
    if options.save:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        RESULT.write_text(json.dumps({**machine, "size": SIZE, "table": table}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
