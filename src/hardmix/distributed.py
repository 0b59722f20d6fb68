"""The one place that knows about ranks. Without a process group everything here is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes) of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave() -> None:
    """Leave the default process group, if there is one, at the end of a process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def my_part(index: Tensor) -> Tensor:
    """This rank's consecutive part of `index` (N,): each entry belongs to one rank, sizes differ by at most 1."""
    rank, size = rank_and_size()
    return index.tensor_split(size)[rank]


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows one after another, in the order of the ranks, on every rank; without gradient.

    Ranks may hold different numbers of rows, none included: they are padded for the exchange and cut back after it.

    Args:
        rows: (n_rank, ...) values on any device; the result is on the same one.
    """
    _, size = rank_and_size()
    if size == 1:
        return rows
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    local = rows.detach().to(device)
    counts = torch.zeros(size, dtype=torch.long, device=device)
    counts[dist.get_rank()] = len(local)
    dist.all_reduce(counts)
    padded = local.new_zeros((int(counts.max()), *local.shape[1:]))
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)]).to(rows.device)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """`gather_rows`, of which this rank's own rows keep their gradient.

    A loss of all rows that every rank computes thus has on each rank the gradients of its own rows alone; their sum
    over the ranks is the whole gradient.
    """
    rank, size = rank_and_size()
    if size == 1:
        return rows
    counts = gather_rows(torch.tensor([len(rows)])).tolist()
    first = sum(counts[:rank])
    together = gather_rows(rows)
    return torch.cat([together[:first], rows, together[first + len(rows) :]])


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over the ranks, under the same names; without gradient."""
    _, size = rank_and_size()
    if size == 1 or not values:
        return values
    together = torch.stack([value.detach().to(torch.float32) for value in values.values()])
    dist.all_reduce(together)
    return dict(zip(values, together / size, strict=True))


def largest(value: int) -> int:
    """The largest `value` of all ranks: how they agree to stop."""
    _, size = rank_and_size()
    if size == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def from_first(value: Any) -> Any:
    """Rank 0's plain value (text, number, None) on every rank."""
    _, size = rank_and_size()
    if size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
