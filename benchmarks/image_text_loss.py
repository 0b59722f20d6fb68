"""Time and memory of the image-text objectives against the batch size, beside the plain form of each in torch.

    python benchmarks/image_text_loss.py            # prints the tables; seven minutes of an idle core
    python benchmarks/image_text_loss.py --save     # also writes benchmarks/results/image_text.json
    python benchmarks/image_text_loss.py --rows 128 1024 --large

Each case runs in a process of its own: forward and backward of float32 features with 512 numbers a row, one thread, CPU
time, the least of up to five; memory is the peak resident size beyond the features. "plain" normalises, forms the
mixtures and calls F.cross_entropy, both directions with a product of their own, as the released code and open_clip do;
"open_clip" is that package's own ClipLoss on normalised features, where it is installed. Where a process would need
more than --limit-gib, what it would need is written in place of a time. Values are compared where several forms run.
`--large` are further batch sizes, for CLIP and m2-Mix.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.losses.clip import clip_loss
from hardmix.losses.m2mix import M2MixLoss
from hardmix.losses.m3mix import M3MixLoss

RESULT = Path(__file__).parent / "results" / "image_text.json"
SIZE, SCALE, LAM, TEMPERATURE = 512, 50.0, 0.3, 0.07
DRAWS = torch.tensor([[0.1], [0.3], [0.6], [0.9]])
Case = Callable[[Tensor, Tensor, Tensor], Tensor]


def arc(p: Tensor, q: Tensor, lam: float) -> Tensor:
    angle = (p * q).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return (torch.sin(lam * angle) * p + torch.sin((1 - lam) * angle) * q) / angle.sin()


def both_ways(one: Tensor, other: Tensor, target: Tensor | None = None) -> Tensor:
    target = torch.arange(len(one)) if target is None else target
    return (F.cross_entropy(one, target) + F.cross_entropy(other, target)) / 2


def clip_plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    a, b = F.normalize(a), F.normalize(b)
    return both_ways(scale * a @ b.T, scale * b @ a.T)


def m2_part(a: Tensor, b: Tensor, lam: float) -> Tensor:
    m, own = arc(a, b, lam), torch.eye(len(a), dtype=torch.bool)
    pair = (a * b).sum(1, keepdim=True)
    return both_ways(torch.where(own, pair, a @ m.T) / TEMPERATURE, torch.where(own, pair, b @ m.T) / TEMPERATURE)


def m2_plain(a: Tensor, b: Tensor, scale: Tensor, draws: tuple[float, ...] = (LAM,)) -> Tensor:
    base = clip_plain(a, b, scale)
    a, b = F.normalize(a), F.normalize(b)
    return base + 0.01 * sum(m2_part(a, b, lam) for lam in draws) / len(draws)


def m3_plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    base = m2_plain(a, b, scale)
    a, b = F.normalize(a), F.normalize(b)
    v, t = arc(a, a.flip(0), LAM), arc(b, b.flip(0), LAM)
    own = torch.eye(len(a))
    mixed = LAM * own + (1 - LAM) * own.flip(0)
    image = both_ways(scale * v @ b.T, scale * b @ v.T, mixed)
    text = both_ways(scale * a @ t.T, scale * t @ a.T, mixed)
    return base + 0.05 * image + 0.05 * text + 0.1 * both_ways(scale * v @ t.T, scale * t @ v.T)


def clip_peer(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    import _peers

    _peers.import_torchvision()  # which open_clip imports
    from open_clip.loss import ClipLoss

    return ClipLoss()(F.normalize(a), F.normalize(b), scale)


def given(module: Callable[..., Any], lam: float | Tensor = LAM) -> Case:
    return lambda a, b, scale: module(a, b, scale, lam=lam)


#: loss -> {form: (case, N x N matrices of float32 that it holds at its peak, measured with N = 4096)}
CASES: dict[str, dict[str, tuple[Case, float]]] = {
    "CLIP": {"hardmix": (clip_loss, 0), "plain": (clip_plain, 5)},
    "m2-Mix": {"hardmix": (given(M2MixLoss()), 0), "plain": (m2_plain, 8)},
    "m2-Mix, 4 draws": {
        "hardmix": (given(M2MixLoss(), DRAWS), 0),
        "plain": (lambda a, b, s: m2_plain(a, b, s, tuple(DRAWS.flatten().tolist())), 17),
    },
    "m3-Mix": {"hardmix": (given(M3MixLoss()), 0), "plain": (m3_plain, 18)},
}
if importlib.util.find_spec("open_clip"):
    CASES["CLIP"]["open_clip"] = (clip_peer, 5)
#: what is measured with --large
LARGE = ("CLIP", "m2-Mix")


def measure(loss: str, form: str, rows: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    case, _ = CASES[loss][form]

    def batch(n: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        own = 0.3 * torch.randn(n, SIZE, generator=generator)
        sides = [(own + torch.randn(n, SIZE, generator=generator)).requires_grad_() for _ in range(2)]
        return [*sides, torch.tensor(SCALE, requires_grad=True)]

    case(*batch(8)).backward()  # code pages are there before the count starts
    inputs = batch(rows)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    times: list[float] = []
    while len(times) < 5 and sum(times) < 2:
        for value in inputs:
            value.grad = None
        started = time.process_time()
        loss_value = case(*inputs)
        loss_value.backward()
        times.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"ms": 1e3 * min(times), "peak_mb": max(peak, 0) / 2**20, "value": float(loss_value.detach())}


def show(table: list[dict[str, Any]], loss: str) -> None:
    print(f"\n{loss}: CPU ms / MB beyond the features")
    chosen = [row for row in table if row["loss"] == loss]
    counts = list(dict.fromkeys(row["rows"] for row in chosen))
    print(f"{'':12}" + "".join(f"{f'N = {n}':>18}" for n in counts))
    for form in CASES[loss]:
        cells = {row["rows"]: cell(row) for row in chosen if row["form"] == form}
        print(f"{form:12}" + "".join(f"{cells[n]:>18}" for n in counts), flush=True)


def cell(row: dict[str, Any]) -> str:
    return f"{row['ms']:.1f} / {row['peak_mb']:.0f}" if "ms" in row else f"needs {row['needs_gib']:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--large", type=int, nargs="*", default=[8192, 16384, 32768])
    parser.add_argument("--losses", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limit-gib", type=float, default=10.0)
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULT.name}")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        loss, form, rows = options.worker
        print(json.dumps(measure(loss, form, int(rows))))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    table: list[dict[str, Any]] = []
    for loss in options.losses:
        for rows in options.rows + (options.large if loss in LARGE else []):
            values = {}
            for form, (_, matrices) in CASES[loss].items():
                about = {"loss": loss, "form": form, "rows": rows, "size": SIZE}
                if (needs := 4.0 * matrices * rows**2 / 2**30) > options.limit_gib:
                    table.append({**about, "needs_gib": needs})
                    continue
                command = [sys.executable, __file__, "--worker", loss, form, str(rows)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(done.stdout.splitlines()[-1])
                values[form] = row["value"]
                table.append({**about, **row})
            assert all(math.isclose(values["hardmix"], v, rel_tol=1e-5) for v in values.values()), (loss, rows, values)
        show(table, loss)
    if options.save:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        if "open_clip" in CASES["CLIP"]:
            machine["open_clip"] = version("open_clip_torch")
        RESULT.write_text(json.dumps({**machine, "threads": 1, "table": table}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
