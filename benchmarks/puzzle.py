"""What PuzzleMix does besides asking the model: its own work, its cuts against exact ones, its transport.

    python benchmarks/puzzle.py            # 128 x 3 x 224 x 224, prints a row for each number of blocks a side
    python benchmarks/puzzle.py --save     # also writes benchmarks/results/puzzle.json
    python benchmarks/puzzle.py --shape 128x3x32x32 --blocks 2 4 8 16 --allocator default

"own work" is `policy(x, y)` with the saliency given, as a multiple of one `copy_` of the batch into an existing buffer.
"cut" and "moves" are parts of it, in milliseconds. "gap" is by how much the energy of the cut is above that of maximum
flow, mean over --rows grids, for two and three labels. "dense" is what the moves cost where all pairs of blocks are
formed as one-hot matrices, as many rounds as blocks a side, as a multiple of `transport_blocks` on the same batch.

Images and saliency are smooth noise, drawn once. One thread, CPU time of the process, medians of rounds in which the
cases take turns; 64 MB are written before each, as after a training step. See mixing.py for the allocators.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from _worker import ALLOCATORS, run_worker, save

RESULTS = Path(__file__).parent / "results" / "puzzle.json"
BLOCKS = (2, 4, 8, 16)
Call = Callable[[], object]


def measure(setting: dict) -> dict:
    """A row for each number of blocks."""
    import torch

    from hardmix.mixing import PuzzleMix

    shape = [int(length) for length in setting["shape"].split("x")]
    draws = torch.Generator().manual_seed(0)
    x, y = _smooth(shape, draws), torch.arange(shape[0]) % 10
    saliency = _smooth([shape[0], 1, *shape[2:]], draws)[:, 0].square()
    buffer, spoil = torch.empty_like(x), torch.zeros(16 * 2**20)
    cases: dict[str, Call] = {"copy_": lambda: buffer.copy_(x)}
    for blocks in setting["blocks"]:
        cases[f"own {blocks}"] = _mixing(PuzzleMix(torch.nn.Identity(), blocks=[blocks]), x, y)
        cases |= {f"{name} {blocks}": call for name, call in _parts(x, saliency, blocks, shape[0]).items()}
    with mock.patch("hardmix.mixing.optimal.input_saliency", return_value=saliency):
        times = _medians(cases, setting["rounds"], spoil)
    rows = {}
    for blocks in setting["blocks"]:
        moves = {"moves": cases[f"moves {blocks}"], "dense": _dense(x, saliency, blocks)}
        alone = _medians(moves, setting["rounds"], spoil)
        rows[str(blocks)] = {
            "copies": times[f"own {blocks}"] / times["copy_"],
            "cut_ms": times[f"cut {blocks}"],
            "moves_ms": times[f"moves {blocks}"],
            "dense": alone["dense"] / alone["moves"],
            "gap_2": _gap(x, saliency, blocks, 2, setting["rows"]),
            "gap_3": _gap(x, saliency, blocks, 3, setting["rows"]),
        }
    return {**setting, "copy_ms": times["copy_"], "table": rows, "torch": torch.__version__}


def _smooth(shape: list[int], draws):
    """Noise of some eight waves a side, from 0 to 1."""
    import torch

    noise = torch.rand(*shape[:2], 8, 8, generator=draws)
    fine = torch.rand(shape, generator=draws)
    return 0.8 * torch.nn.functional.interpolate(noise, size=shape[2:], mode="bilinear") + 0.2 * fine


def _mixing(policy, x, y) -> Call:
    import torch

    draws = torch.Generator().manual_seed(0)
    return lambda: policy(x, y, generator=draws)


def _costs(x, saliency, blocks: int, labels: int, rows: int):
    """(saliency of the blocks, what is minimised) for the first rows."""
    import torch

    from hardmix.mixing import PuzzleMix
    from hardmix.mixing.optimal import block_shares

    grid = (min(blocks, x.shape[2]), min(blocks, x.shape[3]))
    policy = PuzzleMix(torch.nn.Identity(), blocks=[blocks], labels=labels)
    share = block_shares(saliency[:rows], grid)
    partner = torch.arange(rows).roll(1)
    lam = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    return share, policy.costs(x[:rows], share, partner, lam)


def _parts(x, saliency, blocks: int, rows: int) -> dict[str, Call]:
    from hardmix.kernels.graph_cut import grid_cut
    from hardmix.kernels.transport import transport_blocks

    share, costs = _costs(x, saliency, blocks, 3, rows)
    show = grid_cut(*costs).labels > 0
    steps = 40 + 4 * max(share.shape[1:])
    return {"cut": lambda: grid_cut(*costs, steps=steps), "moves": lambda: transport_blocks(show, share)}


def _dense(x, saliency, blocks: int) -> Call:
    """The same moves with all pairs as matrices (N, h w, h w)."""
    import torch

    from hardmix.kernels.graph_cut import grid_cut

    rows = x.shape[0]
    share, costs = _costs(x, saliency, blocks, 3, rows)
    h, w = share.shape[1:]
    show = (grid_cut(*costs).labels > 0).view(rows, 1, h * w)
    down, right = torch.arange(h) / max(h - 1, 1), torch.arange(w) / max(w - 1, 1)
    places = torch.cartesian_prod(down, right)
    price = 0.8 * torch.cdist(places, places).square()

    def call() -> torch.Tensor:
        cost = price - share.view(rows, h * w, 1) * show
        won = torch.zeros_like(cost)
        for _ in range(h):
            asked = torch.zeros_like(cost).scatter_(2, cost.argmin(2, keepdim=True), 1.0)
            best = torch.where(asked > 0, cost, 1e9).argmin(1, keepdim=True)
            won = torch.zeros_like(cost).scatter_(1, best, 1.0) * asked
            cost = cost + (asked - won) * 10.0
        return won.argmax(1)

    return call


def _gap(x, saliency, blocks: int, labels: int, rows: int) -> float:
    from hardmix.kernels.graph_cut import grid_cut, grid_cut_exact

    share, costs = _costs(x, saliency, blocks, labels, rows)
    exact = grid_cut_exact(*costs).energy
    found = grid_cut(*costs, steps=40 + 4 * max(share.shape[1:])).energy
    return float((found.double().sum() - exact.double().sum()) / exact.double().sum().abs())


def _medians(cases: dict[str, Call], rounds: int, spoil) -> dict[str, float]:
    """Name -> median CPU milliseconds; a case that takes long sits out later rounds."""
    taken: dict[str, list[int]] = {name: [] for name in cases}
    for call in cases.values():
        call()
    for turn in range(rounds):
        for name in list(cases)[turn % len(cases) :] + list(cases)[: turn % len(cases)]:
            if sum(taken[name]) > 4e9 and len(taken[name]) >= 3:
                continue
            spoil.add_(1.0)
            start = time.process_time_ns()
            cases[name]()
            taken[name].append(time.process_time_ns() - start)
    return {name: statistics.median(values) / 1e6 for name, values in taken.items()}


def show(result: dict) -> None:
    print("\n{shape}, {allocator} allocator, one thread, copy_ {copy_ms:.2f} ms".format(**result))
    heads = ("own work x copy_", "cut ms", "moves ms", "dense x moves", "gap, 2 labels", "gap, 3 labels")
    print(f"{'blocks':>8s}" + "".join(f"{head:>18s}" for head in heads))
    for blocks, row in result["table"].items():
        numbers = [f"{row[key]:,.1f}" for key in ("copies", "cut_ms", "moves_ms", "dense")]
        gaps = [f"{100 * row[key]:.2f} %" for key in ("gap_2", "gap_3")]
        print(f"{blocks:>8s}" + "".join(f"{cell:>18s}" for cell in numbers + gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    parser.add_argument("--shape", default="128x3x224x224")
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS)
    parser.add_argument("--allocator", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=16, help="grids that are cut exactly")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    results = []
    for allocator in args.allocator:
        setting = {"shape": args.shape, "blocks": list(args.blocks), "allocator": allocator}
        results.append(run_worker(__file__, {**setting, "rounds": args.rounds, "rows": args.rows}))
        show(results[-1])
    if args.save:
        save(RESULTS, results)


if __name__ == "__main__":
    main()
