"""Time and memory of contrastive regression against batch and embedding size, beside the forms that are in use.

    python benchmarks/contrastive_regression.py            # prints the tables; minutes
    python benchmarks/contrastive_regression.py --save     # also writes benchmarks/results/contrastive_regression.json
    python benchmarks/contrastive_regression.py --rows 64 128 --sizes 128

Each case runs in a process of its own: forward and backward, one thread, CPU time, the least of up to three; memory is
the peak resident size beyond the embeddings. Labels are whole years from 20 to 69, two rows (views) a label, as with
ages. "formed" builds each mixture as a vector, all N^3 triples at once with a mask, which is how the released code does
it; "masks" is the released loop over one N x N mask a column. They stop where a process would need more than
--limit-gib. Values are compared where both run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.losses import rank_n_contrast_loss, supcon_loss, supremix_loss

RESULT = Path(__file__).parent / "results" / "contrastive_regression.json"
WINDOW, TEMPERATURE = 5.0, 0.5
#: rows up to which the shares of the mixtures are given, and from which the growth is fitted
GIVEN_SHARES, LARGE = 256, 512
Case = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def supremix_formed(z: Tensor, y: Tensor, lam: Tensor | None) -> Tensor:
    """Every mixture a vector, detached and not normalised: the released choices, without its wrong weights."""
    z = F.normalize(z)
    fixed, gap = z.detach(), y[:, None] - y
    inclusive = lam[..., None] * fixed[:, None] + (1 - lam[..., None]) * fixed
    below, above = ((gap > 0) & (gap < WINDOW)), ((gap < 0) & (gap > -WINDOW))
    inside = below[:, :, None] & above[:, None, :]  # (anchor, below, above)
    share = torch.where(inside, -gap[:, None, :] / (y - y[:, None]).clamp(min=1e-6), 0.0)
    exclusive = share[..., None] * fixed[:, None] + (1 - share[..., None]) * fixed
    real, hard = z @ z.T / TEMPERATURE, torch.einsum("id,ikd->ik", z, inclusive) / TEMPERATURE
    pull = torch.einsum("id,ijkd->ijk", z, exclusive).flatten(1) / TEMPERATURE
    itself = torch.eye(len(z), dtype=torch.bool)
    logits = torch.cat(
        [
            (real + gap.abs().log1p()).masked_fill(itself, -torch.inf),
            (hard + ((1 - lam) * gap.abs()).log1p()).masked_fill(gap == 0, -torch.inf),
            pull.masked_fill(~inside.flatten(1), -torch.inf),
        ],
        1,
    )
    same = (gap == 0) & ~itself
    count = same.sum(1) + inside.sum((1, 2))
    positives = (real * same).sum(1) + (pull * inside.flatten(1)).sum(1)
    valid = count > 0
    return ((logits.logsumexp(1) - positives / count.clamp(min=1)) * valid).sum() / valid.sum()


def supremix_ours(z: Tensor, y: Tensor, lam: Tensor | None) -> Tensor:
    return supremix_loss(z, y, window=WINDOW, normalize_mixtures=False, detach_mixtures=True, lam=lam)


def supcon_matrix(z: Tensor, y: Tensor, lam: Tensor | None) -> Tensor:
    z = F.normalize(z)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    same = (y[:, None] == y).fill_diagonal_(False)
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~same, 0.0)
    return -(log_p.sum(1) / same.sum(1)).mean()


def rank_n_contrast_masks(z: Tensor, y: Tensor, lam: Tensor | None) -> Tensor:
    n = len(z)
    keep = ~torch.eye(n, dtype=torch.bool)
    logits = -(z[:, None] - z)[keep].view(n, n - 1, -1).norm(dim=2) / 2.0
    gap = (y[:, None] - y).abs()[keep].view(n, n - 1)
    weight, total = logits.exp(), torch.zeros(())
    for k in range(n - 1):
        ranked = gap >= gap[:, k, None]
        total = total - (logits[:, k] - (weight * ranked).sum(1).log()).sum()
    return total / (n * (n - 1))


#: loss -> {form: (case, bytes that it needs for N rows of size D)}
CASES: dict[str, dict[str, tuple[Case, Callable[[int, int], float]]]] = {
    "SupReMix": {
        "hardmix, complete": (lambda z, y, lam: supremix_loss(z, y, window=WINDOW, lam=lam), lambda n, d: 0),
        "hardmix, released choices": (supremix_ours, lambda n, d: 0),
        "formed": (supremix_formed, lambda n, d: 9.0 * n**3 * d),
    },
    "SupCon": {
        "hardmix": (lambda z, y, lam: supcon_loss(z, y), lambda n, d: 0),
        "matrix": (supcon_matrix, lambda n, d: 40.0 * n**2),
    },
    "Rank-N-Contrast": {
        "hardmix": (lambda z, y, lam: rank_n_contrast_loss(z, y), lambda n, d: 0),
        "masks": (rank_n_contrast_masks, lambda n, d: 12.0 * n**2 * d + 10.0 * n**3),
    },
}
SAME_VALUE = {
    "formed": ("SupReMix", "hardmix, released choices"),
    "matrix": ("SupCon", "hardmix"),
    "masks": ("Rank-N-Contrast", "hardmix"),
}


def batch(rows: int, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(20, 70, (rows // 2,), generator=generator).float().repeat(2)
    z = torch.randn(rows, size, generator=generator)
    # Shares are given where a plain form is to mix alike; with more rows each block draws its own, as in training.
    lam = torch.rand(rows, rows, generator=generator) * 0.4 if rows <= GIVEN_SHARES else None
    return z.requires_grad_(), y, lam


def measure(loss: str, form: str, rows: int, size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    case, _ = CASES[loss][form]
    with warnings.catch_warnings():  # eight rows have no Mix-pos, which the loss would tell
        warnings.simplefilter("ignore")
        case(*batch(8, 4)).backward()  # code pages are there before the count starts
    z, y, lam = batch(rows, size)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: making the batch is not part of it
    times: list[float] = []
    while len(times) < 3 and sum(times) < 3:
        z.grad = None
        started = time.process_time()
        value = case(z, y, lam)
        value.backward()
        times.append(time.process_time() - started)
    peak = resident("VmHWM") - before
    return {"ms": 1e3 * min(times), "peak_mb": max(peak, 0) / 2**20, "value": float(value.detach())}


def resident(what: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{what}:")[1].split()[0])


def show(table: list[dict[str, Any]], loss: str, size: int) -> None:
    print(f"\n{loss}, {size} numbers a row: CPU ms / MB beyond the embeddings")
    chosen = [row for row in table if (row["loss"], row["size"]) == (loss, size)]
    counts = list(dict.fromkeys(row["rows"] for row in chosen))
    print(f"{'':28}" + "".join(f"{f'N = {n}':>20}" for n in counts))
    for form in CASES[loss]:
        cells = {row["rows"]: f"{row['ms']:.1f} / {row['peak_mb']:.1f}" for row in chosen if row["form"] == form}
        print(f"{form:28}" + "".join(f"{cells.get(n, '-'):>20}" for n in counts))


def growth(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of time and memory: slopes of straight lines through the logarithms, from `LARGE` rows on."""
    found = []
    for loss, forms in CASES.items():
        for form in forms:
            for size in dict.fromkeys(row["size"] for row in table):
                ours = [r for r in table if (r["loss"], r["form"], r["size"]) == (loss, form, size)]
                ours = [r for r in ours if r["rows"] >= LARGE]
                if len(ours) >= 3:
                    time_, memory = (slope(ours, key) for key in ("ms", "peak_mb"))
                    found.append({"loss": loss, "form": form, "size": size, "time": time_, "memory": memory})
    return found


def slope(rows: list[dict[str, Any]], key: str) -> float:
    x = torch.tensor([math.log(row["rows"]) for row in rows])
    y = torch.tensor([math.log(max(row[key], 1e-3)) for row in rows])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--losses", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limit-gib", type=float, default=10.0)
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULT.name}")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        loss, form, rows, size = options.worker
        print(json.dumps(measure(loss, form, int(rows), int(size))))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    table: list[dict[str, Any]] = []
    for loss in options.losses:
        for size in options.sizes:
            for rows in options.rows:
                values = {}
                for form, (_, need) in CASES[loss].items():
                    if need(rows, size) > options.limit_gib * 2**30:
                        continue
                    command = [sys.executable, __file__, "--worker", loss, form, str(rows), str(size)]
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    row = json.loads(done.stdout.splitlines()[-1])
                    values[form] = row["value"]
                    table.append({"loss": loss, "form": form, "rows": rows, "size": size, **row})
                for form, value in values.items():
                    if form in SAME_VALUE:
                        ours = values[SAME_VALUE[form][1]]
                        assert math.isclose(ours, value, rel_tol=1e-5), (loss, form, rows, size, ours, value)
            show(table, loss, size)
    exponents = growth(table)
    print(f"\nexponents from {LARGE} rows on: time, memory")
    for row in exponents:
        print("{loss:18}{form:28}D = {size:<6}{time:6.2f}{memory:8.2f}".format(**row))
    if options.save:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        RESULT.write_text(json.dumps({**machine, "table": table, "growth": exponents}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
