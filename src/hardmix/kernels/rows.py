"""Loops over the rows of a large batch on a CPU: in place along the cycles of the pairing, and in several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Row = TypeVar("Row")
#: A batch from this size on is worth threads, which take 0.1 ms to start.
_LARGE_BYTES = 8 * 2**20
#: Between two operations each thread needs the interpreter, of which there is one.
_MOST_THREADS = 4


def parts_of(x: Tensor) -> int:
    """Into how many parts to divide the rows of a batch: one for each thread that torch may use."""
    return 1 if x.nbytes < _LARGE_BYTES else min(torch.get_num_threads(), _MOST_THREADS, len(x))


def run_parts(work: Callable[[Part], object], parts: Sequence[Part]) -> None:
    """work(part) for all parts side by side, the first one in this thread.

    For operations of torch that are too short to wake its own threads for each. Copies alone don't gain: one thread of
    them keeps the memory busy.
    """

    def without_gradient(part: Part) -> None:
        with torch.no_grad():  # a new thread records them, whatever this one does
            work(part)

    if len(parts) == 1:  # the common case needs no pool
        work(parts[0])
        return
    # Not kept for the next call: a forked worker of a loader would wait for threads that it does not have.
    with ThreadPoolExecutor(len(parts) - 1) as pool:
        others = [pool.submit(without_gradient, part) for part in parts[1:]]
        work(parts[0])
    for other in others:
        other.result()


def spans(rows: int, parts: int) -> list[slice]:
    """`rows` rows divided as evenly as they go."""
    return [slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]


def cycles_of(partner: list[int]) -> list[list[int]] | None:
    """The cycles of a permutation: each row's partner follows it, the last one's is the first. None if rows repeat."""
    cycles = []
    seen = [False] * len(partner)
    for first in range(len(partner)):
        cycle, i = [], first
        while not seen[i]:
            seen[i] = True
            cycle.append(i)
            i = partner[i]
        if cycle and i != first:
            return None
        if cycle:
            cycles.append(cycle)
    return cycles


def along_cycles(
    rows: Sequence[Row], cycles: list[list[int]], copy: Callable[[Row], Row], parts: int = 1
) -> list[Iterator[tuple[int, Row]]]:
    """For each of `parts` threads: (i, the row that i is mixed with), in an order in which each row is read before it
    is written.

    Args:
        cycles: as `cycles_of` gives them.
        copy: of a row that would be written before it is read: one for each cycle, and for each part of a divided one.
    """
    shares = _shares(cycles, parts)
    # What follows a part of a cycle is another thread's to write.
    kept = {chain[-1]: copy(rows[chain[-1]]) for chains in shares for chain in chains if chain[0] != chain[-1]}

    def walk(chains: list[list[int]]) -> Iterator[tuple[int, Row]]:
        for chain in chains:
            end = chain[-1]
            last = kept[end] if end in kept else copy(rows[end])
            for i, j in pairwise(chain[:-1]):
                yield i, rows[j]
            yield chain[-2], last

    return [walk(chains) for chains in shares]


def _shares(cycles: list[list[int]], parts: int) -> list[list[list[int]]]:
    """For each part its chains: rows that follow each other in a cycle, and then the row that follows the last one."""
    room = quota = -(-sum(map(len, cycles)) // parts)
    shares: list[list[list[int]]] = [[]]
    for cycle in cycles:
        closed, start = [*cycle, cycle[0]], 0
        while start < len(cycle):
            if room == 0:
                shares.append([])
                room = quota
            stop = min(start + room, len(cycle))
            shares[-1].append(closed[start : stop + 1])
            room -= stop - start
            start = stop
    return shares
