"""What mixing a batch costs, as a multiple of one `copy_` of that batch into an existing buffer.

    python benchmarks/mixing.py                  # prints the tables
    python benchmarks/mixing.py --save           # also writes benchmarks/results/mixing.json
    python benchmarks/mixing.py --threads 1 --allocator kept --shape 128x3x32x32 --dtype float32 --rounds 50

Rows of hardmix draw their plan inside the timed call, one lambda for each sample. "out=" is
`policy.plan(x).blend(x, out=buffer)`, "in place" is `policy.plan(x).blend_(x)`, "new" is `policy(x, y)` with its
labels; "compiled" is the same through `torch.compile`, where a C++ compiler is installed. Rows of other packages (those
that are installed) mix the labels too.

The cases of a table take turns in one process, each round starting with another case; a case is the median of its
rounds. Caches are "warm" when the call has just been made once before; "fresh" when it has been made with another
batch, and the timed one is the next of so many that none of them is in the caches, as when batches come from somewhere
else; and "cold" when 64 MB are written before each call, so that the code has to come from memory too, as after a
training step. For large batches there is no difference. By default the C library gives large blocks back to the system
and takes them page by page again, which costs a new batch several times the arithmetic; with "kept" blocks it does not,
which is close to what a GPU's caching allocator does. The script runs itself once for each allocator and number of
threads. CPU is the time of the process, wall that of the clock; threads that wait do so as torch's do anywhere, which
counts as CPU time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

from _worker import ALLOCATORS, run_worker, save

if TYPE_CHECKING:
    from torch import Generator, Tensor

Case = Callable[["Tensor", "Tensor"], object]
RESULTS = Path(__file__).parent / "results" / "mixing.json"
SHAPES = ("128x3x224x224", "128x3x32x32")
DTYPES = ("float32", "uint8")
LARGE = 2**22  # values; from this size on the batch alone fills the caches
#: Bytes of batches and buffers between two uses of the same one, where batches are fresh.
RING = 160 * 2**20
POLICIES = ("Mixup", "CutMix", "FMix", "GridMix", "ResizeMix", "SmoothMix")


def build_cases(rows: int, generator: Generator) -> tuple[dict[str, Case], dict[str, str]]:
    """(name -> call with a batch and a buffer like it, package -> version)"""
    import torch

    import _peers
    import hardmix
    from hardmix import mixing

    y = torch.arange(rows) % 10

    def compile_alone(call: Callable[..., object], name: str) -> Case:
        """`call` compiled as code of its own: of functions that share code, each looks past those compiled before."""
        assert isinstance(call, FunctionType)
        code = call.__code__.replace(co_name=name)
        own = FunctionType(code, call.__globals__, name, call.__defaults__, call.__closure__)
        return torch.compile(own, fullgraph=True)

    def make_cases(policy: mixing.policy.Policy) -> dict[str, Case]:
        name = type(policy).__name__
        return {
            "out=": lambda x, buffer: policy.plan(x, y, generator=generator).blend(x, out=buffer),
            "in place": lambda x, buffer: policy.plan(x, y, generator=generator).blend_(x),
            "new": lambda x, buffer: policy(x, y, generator=generator),
            # With torch's own generator, the one that compiled code can take.
            "compiled out=": compile_alone(lambda x, buffer: policy.plan(x, y).blend(x, out=buffer), f"{name}_out"),
            "compiled new": compile_alone(lambda x, buffer: policy(x, y), f"{name}_new"),
        }

    cases: dict[str, Case] = {"copy_": lambda x, buffer: buffer.copy_(x)}
    for name in POLICIES:
        cases.update({f"{name}, {form}": case for form, case in make_cases(getattr(mixing, name)()).items()})
    steps, versions = _peers.mixing_steps(num_classes=10)
    cases.update({name: lambda x, buffer, step=step: step(x, y) for name, step in steps.items()})
    return cases, {"hardmix": hardmix.__version__, "torch": torch.__version__} | versions


def measure(shape: list[int], dtype_name: str, caches: str, rounds: int) -> dict:
    """One table: name -> median CPU and wall milliseconds and their ratios to copy_."""
    import torch

    dtype, generator = getattr(torch, dtype_name), torch.Generator().manual_seed(0)
    clean = torch.rand(shape) if dtype.is_floating_point else torch.randint(0, 256, shape, dtype=dtype)
    count = math.ceil(RING / (2 * clean.nbytes)) if caches == "fresh" else 1
    batches = [(clean.clone(), torch.empty_like(clean)) for _ in range(count)]
    cases, versions = build_cases(len(clean), generator)
    raising = {}
    for name, call in cases.items():
        try:
            call(*batches[0])
        except Exception as error:
            raising[name] = type(error).__name__
    names = [name for name in cases if name not in raising]
    spoil = torch.zeros(16 * 2**20)
    times: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    coming = itertools.cycle(batches)
    for turn in range(rounds):
        first = turn * 7 % len(names)
        for name in names[first:] + names[:first]:
            call = cases[name]
            if caches == "cold":
                spoil.add_(1.0)
            else:
                call(*next(coming))
            x, buffer = next(coming)
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            call(x, buffer)
            times[name].append((time.process_time_ns() - cpu, time.perf_counter_ns() - wall))
    medians = {name: [statistics.median(column) / 1e6 for column in zip(*times[name], strict=True)] for name in names}
    base = medians["copy_"]
    rows = {
        name: {"cpu_ms": cpu, "wall_ms": wall, "cpu_ratio": cpu / base[0], "wall_ratio": wall / base[1]}
        for name, (cpu, wall) in medians.items()
    }
    return {"rows": rows, "raises": raising, "versions": versions}


def show(table: dict) -> None:
    print("\n{shape} {dtype}, {threads} thread(s), {allocator} allocator, {caches} caches".format(**table))
    print(f"{'':34s}{'CPU ms':>10s}{'x copy_':>9s}{'wall ms':>10s}{'x copy_':>9s}")
    for name, row in table["rows"].items():
        print("{:34s}{cpu_ms:10.3f}{cpu_ratio:9.2f}{wall_ms:10.3f}{wall_ratio:9.2f}".format(name, **row))
    for name, error in table["raises"].items():
        print(f"{name:34s}    raises {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    parser.add_argument("--rounds", type=int, help="rounds of a table (default: by the size of the batch)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--allocator", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        setting = json.loads(args.worker)
        shape = [int(length) for length in setting["shape"].split("x")]
        print(json.dumps(measure(shape, setting["dtype"], setting["caches"], setting["rounds"])))
        return
    tables = []
    for shape in args.shape:
        large = math.prod(int(length) for length in shape.split("x")) >= LARGE
        for dtype in args.dtype:
            for allocator in args.allocator:
                for threads in args.threads:
                    for caches in ("cold",) if large else ("cold", "fresh", "warm"):
                        setting = {"shape": shape, "dtype": dtype, "allocator": allocator, "threads": threads}
                        rounds = args.rounds or (11 if large else 60)
                        setting |= {"caches": caches, "rounds": rounds}
                        tables.append({**setting, **run_worker(__file__, setting)})
                        show(tables[-1])
    if args.save:
        save(RESULTS, tables)


if __name__ == "__main__":
    main()
