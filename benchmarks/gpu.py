"""What mixing and the classification objectives cost on a GPU, in units of a copy and of hard-label cross entropy.

    python benchmarks/gpu.py            # prints two tables
    python benchmarks/gpu.py --save     # also writes benchmarks/results/gpu.json

"call" is the wall time of back-to-back calls, drawing included, the GPU waited for once at the end: what a loop that
does nothing else would see. "GPU" is the time of the device's own work, from events around a replayed CUDA graph, with
the plan drawn before. Inputs rotate through more memory than the cache holds. Medians of several rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from decoupled_loss import BASE, CASES, batch
from hardmix import mixing

RESULTS = Path(__file__).parent / "results" / "gpu.json"
POLICIES = ("Mixup", "CutMix", "FMix", "GridMix", "ResizeMix", "SmoothMix")
PAIR = "hardmix DM, pair"
ROUNDS = 7
ROTATED_BYTES = 256 * 2**20  # several times the L2 cache of any card


def call_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Wall milliseconds of a call, the device waited for once per round."""
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - started) / len(calls))
    return 1e3 * statistics.median(rounds)


def gpu_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Milliseconds that the device works for a call: its kernels back to back, without the host's launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm-up outside the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    rounds = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        rounds.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(rounds)


def mixing_rows(shape: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    batches = [torch.rand(shape, device="cuda").to(dtype) for _ in range(max(2, ROTATED_BYTES // size))]
    out, y = torch.empty_like(batches[0]), torch.arange(shape[0], device="cuda") % 10
    generator = torch.Generator().manual_seed(0)
    copies = [lambda x=x: out.copy_(x) for x in batches]
    rows = [{"case": "copy_", "call_ms": call_ms(copies), "gpu_ms": gpu_ms(copies)}]
    for name in POLICIES:
        policy = getattr(mixing, name)()
        plans = [policy.plan(x, y, generator=generator) for x in batches]
        whole = call_ms([lambda x=x, mix=policy: mix(x, y, generator=generator) for x in batches])
        work = gpu_ms([lambda x=x, plan=plan: plan.blend(x, out=out) for x, plan in zip(batches, plans, strict=True)])
        rows.append({"case": name, "call_ms": whole, "gpu_ms": work})
    for row in rows:
        row |= {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
        row["gpu_ratio"] = row["gpu_ms"] / rows[0]["gpu_ms"]
    return rows


def loss_rows(shape: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    z, target, dense = batch(shape)
    z = z.detach().to("cuda", dtype).requires_grad_()
    target = type(target)(*(part.cuda() for part in target))
    dense = dense.to("cuda", dtype)
    rows = []
    compiled = torch.compile(lambda z, t, d: CASES[PAIR](z, t, d), fullgraph=True, dynamic=False)
    for name, case in {**CASES, f"{PAIR}, compiled": compiled}.items():

        def step(case: Any = case) -> None:
            z.grad = None
            case(z, target, dense).backward()

        step()
        torch.cuda.synchronize()
        z.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / z.nbytes
        kept = call_ms([step] * 20)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(20):
                step()
            torch.cuda.synchronize()
        work = sum(event.self_device_time_total for event in profile.key_averages()) / 20 / 1e3
        rows.append({"case": name, "shape": shape, "dtype": str(dtype)[6:], "call_ms": kept, "gpu_ms": work})
        rows[-1]["peak_in_logits"] = peak
    base = next(row for row in rows if row["case"] == BASE)
    for row in rows:
        row["gpu_ratio"] = row["gpu_ms"] / base["gpu_ms"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['shape']} {rows[0]['dtype']}")
    print(f"{'':46s}{'call ms':>10s}{'GPU ms':>10s}{'ratio':>8s}")
    for row in rows:
        peak = f"   peak {row['peak_in_logits']:.1f} logits" if "peak_in_logits" in row else ""
        print("{case:46s}{call_ms:10.3f}{gpu_ms:10.4f}{gpu_ratio:8.2f}".format(**row) + peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    options = parser.parse_args()
    tables = []
    for shape in ((128, 3, 224, 224), (128, 3, 32, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            tables.append({"what": "mixing", "rows": mixing_rows(shape, dtype)})
            show(tables[-1]["rows"])
    for shape in ("1024x1000", "1024x21843"):
        for dtype in (torch.float32, torch.bfloat16):
            tables.append({"what": "loss", "rows": loss_rows(shape, dtype)})
            show(tables[-1]["rows"])
    if options.save:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        about["python"] = platform.python_version()
        RESULTS.write_text(json.dumps({**about, "tables": tables}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
