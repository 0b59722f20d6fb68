"""Cost of the classification objectives, forward and backward, against `F.cross_entropy` with hard labels.

    python benchmarks/decoupled_loss.py                 # prints two tables
    python benchmarks/decoupled_loss.py --save          # also writes benchmarks/results/decoupled_loss.json
    python benchmarks/decoupled_loss.py --threads 2 --shapes 1024x1000

Time: all cases of a shape take turns in one process, each round in another order; medians. CPU time of the
process tells more than wall time on a shared machine; both are printed. By default glibc gives each large block back to
the system and takes it page by page again, which costs several times the arithmetic; one table is with blocks kept
(close to what a GPU's caching allocator does) and one with this default. With two threads compare wall time: CPU time
counts both, and their waiting.

Memory: one process per case; peak resident memory over what is there with logits and target, in units of the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.losses import decoupled_mixup_bce_loss, decoupled_mixup_loss, soft_cross_entropy_loss
from hardmix.mixing import MixedTarget

RESULT = Path(__file__).parent / "results" / "decoupled_loss.json"
ROUNDS = {"128x1000": 60, "1024x1000": 60, "1024x21843": 11}
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "500000000"}
BASE = "cross_entropy, hard labels"
Case = Callable[[Tensor, MixedTarget, Tensor], Tensor]


def masked(z: Tensor, target: MixedTarget, dense: Tensor) -> Tensor:
    """Decoupled Mixup as it reads in the paper: two log-sum-exps, each with the competitor masked out."""
    (a, b), (lam, rest) = target.labels.unbind(1), target.weights.unbind(1)
    pull = torch.zeros_like(lam)
    for own, other in ((a, b), (b, a)):
        without = z.masked_fill(F.one_hot(other, z.shape[1]).bool(), -torch.inf)
        pull = pull + without.logsumexp(1) - z.gather(1, own[:, None])[:, 0]
    ce = lam * F.cross_entropy(z, a, reduction="none") + rest * F.cross_entropy(z, b, reduction="none")
    return (ce + 0.1 * torch.where(a == b, 0.0, pull)).mean()


def timm_case() -> dict[str, Case]:
    try:
        from timm.loss import SoftTargetCrossEntropy
    except Exception:  # a torchvision wheel that does not fit raises more than ImportError
        return {}
    criterion = SoftTargetCrossEntropy()
    return {"timm SoftTargetCrossEntropy, target built": lambda z, t, d: criterion(z, t.dense(z.shape[1]))}


@cache  # given, as the pair is
def third(target: MixedTarget) -> MixedTarget:
    labels = torch.cat([target.labels, target.labels.roll(1, 0)[:, :1]], 1)
    return MixedTarget(labels, torch.full_like(labels, 1 / 3, dtype=torch.float32))


CASES: dict[str, Case] = {
    BASE: lambda z, t, d: F.cross_entropy(z, t.labels[:, 0]),
    "cross_entropy, hard labels, smoothing 0.1": lambda z, t, d: F.cross_entropy(
        z, t.labels[:, 0], label_smoothing=0.1
    ),
    "cross_entropy, soft labels given": lambda z, t, d: F.cross_entropy(z, d),
    "cross_entropy, soft labels built": lambda z, t, d: F.cross_entropy(z, t.dense(z.shape[1])),
    **timm_case(),
    "binary_cross_entropy_with_logits, given": lambda z, t, d: F.binary_cross_entropy_with_logits(z, d),
    "DM, two masked logsumexp": masked,
    "hardmix soft_cross_entropy, pair": lambda z, t, d: soft_cross_entropy_loss(z, t),
    "hardmix DM, pair": lambda z, t, d: decoupled_mixup_loss(z, t),
    "hardmix DM, hard labels": lambda z, t, d: decoupled_mixup_loss(z, t.labels[:, 0]),
    "hardmix DM, three labels": lambda z, t, d: decoupled_mixup_loss(z, third(t)),
    "hardmix DM, pair, smoothing 0.1": lambda z, t, d: decoupled_mixup_loss(z, t, label_smoothing=0.1),
    "hardmix DM, soft labels given": lambda z, t, d: decoupled_mixup_loss(z, d),
    "hardmix DM(BCE), pair": lambda z, t, d: decoupled_mixup_bce_loss(z, t, xi=0.8),
    "hardmix DM(BCE), soft labels given": lambda z, t, d: decoupled_mixup_bce_loss(z, d, xi=0.8),
}


def batch(shape: str) -> tuple[Tensor, MixedTarget, Tensor]:
    n, c = map(int, shape.split("x"))
    torch.manual_seed(0)
    lam = torch.rand(n)
    target = MixedTarget(torch.randint(c, (n, 2)), torch.stack([lam, 1 - lam], 1))
    return torch.randn(n, c, requires_grad=True), target, target.dense(c)


def time_cases(shapes: list[str], threads: int, rounds: int | None) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    rows, names = [], list(CASES)
    for shape in shapes:
        z, target, dense = batch(shape)
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
        for turn in range(2 + (rounds or ROUNDS.get(shape, 20))):
            for name in random.Random(turn).sample(names, len(names)):  # what ran before leaves its mark on the heap
                z.grad = None
                cpu, wall = time.process_time(), time.perf_counter()
                CASES[name](z, target, dense).backward()
                if turn > 1:
                    spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        middle = {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in spent.items()}
        for name, (cpu, wall) in middle.items():
            numbers = {"cpu_ms": cpu * 1e3, "wall_ms": wall * 1e3}
            numbers |= {"cpu_ratio": cpu / middle[BASE][0], "wall_ratio": wall / middle[BASE][1]}
            rows.append({"shape": shape, "case": name, **{key: round(value, 3) for key, value in numbers.items()}})
    return rows


def peak_memory(shape: str, name: str) -> float:
    """Peak resident memory of one forward and backward beyond logits and target, in units of the logits."""
    torch.set_num_threads(1)
    CASES[name](*batch("8x10")).backward()  # code pages and thread pools are there before the count starts
    z, target, dense = batch(shape)
    pages = Path("/proc/self/statm").read_text().split()[1]
    before = int(pages) * resource.getpagesize()
    CASES[name](z, target, dense).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / (z.numel() * z.element_size())


def child(*arguments: str, threads: int, kept: bool) -> Any:
    """The answer of this file run again: thread count and allocator have to be set before torch starts."""
    settings = {"OMP_NUM_THREADS": str(threads), **(KEPT if kept else {})}
    environment = {**os.environ, **settings}
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def print_time(title: str, rows: list[dict[str, Any]]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    base = {row["shape"]: row for row in rows if row["case"] == BASE}
    print(f"\n{title}: CPU time (wall time) as a multiple of {BASE}")
    heads = [f"{shape}, {base[shape]['cpu_ms']:.2f} ms" for shape in shapes]
    print(f"{'':46}" + "".join(f"{head:>24}" for head in heads))
    for name in dict.fromkeys(row["case"] for row in rows):
        cells = [row for row in rows if row["case"] == name]
        print(f"{name:46}" + "".join(f"{c['cpu_ratio']:>15.2f} ({c['wall_ratio']:6.2f})" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", nargs="+", default=list(ROUNDS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--memory-shape", default="1024x21843")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, *rest = arguments.child
        answer = peak_memory(*rest) if kind == "memory" else time_cases(rest[2:], int(rest[0]), int(rest[1]) or None)
        print(json.dumps(answer))
        return
    result: dict[str, Any] = {"time": [], "memory": []}
    for threads in arguments.threads:
        for kept in (True, False):
            call = ("time", str(threads), str(arguments.rounds or 0), *arguments.shapes)
            rows = child(*call, threads=threads, kept=kept)
            allocator = "kept" if kept else "default"
            print_time(f"{threads} thread{'s' * (threads > 1)}, blocks {allocator}", rows)
            result["time"] += [{"threads": threads, "allocator": allocator, **row} for row in rows]
    print(f"\nPeak memory beyond logits and target at {arguments.memory_shape}, in units of the logits")
    for name in CASES:
        peak = child("memory", arguments.memory_shape, name, threads=1, kept=False)
        print(f"{name:46}{peak:>15.2f}")
        result["memory"].append({"shape": arguments.memory_shape, "case": name, "peak_in_logits": round(peak, 3)})
    if arguments.save:
        versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"versions": versions, "cpus": os.cpu_count(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
