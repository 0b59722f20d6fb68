"""The one place where ranks exchange values. Without a process group everything here is the identity."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hardmix._math import first_only

if dist.is_available():
    # Its functions hold on to the process group that there is when they are defined. DDP defines them, and a group that
    # is held keeps its threads after `leave`, which now and then abort a process that ends.
    import torch.distributed.nn.functional

#: what gloo and NCCL say of a process that has gone
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes) of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave() -> None:
    """Leave the default process group, if there is one, at the end of a process."""
    if dist.is_available() and dist.is_initialized():
        # A thread of gloo may still have to let go of a tensor, for which it needs Python's lock: older torch holds
        # that while it waits for the thread.
        time.sleep(0.05)
        dist.destroy_process_group()


def lost_a_rank(error: BaseException) -> bool:
    """Whether an exchange failed because another process is no longer there, not for a mistake or a long wait."""
    if rank_and_size()[1] == 1 or not (type(error) is RuntimeError or isinstance(error, dist.DistError)):
        return False
    return any(words in str(error) for words in _LOST)


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
    return rows if size == 1 else _gather(rows, _row_counts(rows))


def _row_counts(rows: Tensor) -> list[int]:
    """How many rows each rank has."""
    rank, size = rank_and_size()
    counts = torch.zeros(size, dtype=torch.long, device=_meeting_place(torch.device("cpu")))
    counts[rank] = len(rows)
    dist.all_reduce(counts)
    return counts.tolist()


def _gather(rows: Tensor, counts: list[int]) -> Tensor:
    local = rows.detach().to(_meeting_place(rows.device))
    padded = local.new_zeros((max(counts), *local.shape[1:]))
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)


def _meeting_place(device: torch.device) -> torch.device:
    """Where tensors of a device are exchanged: there if the process group does that well, or where it can."""
    backends = dict(part.split(":") for part in dist.get_backend_config().split(","))
    if backends.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu") if "cpu" in backends else torch.device("cuda", torch.cuda.current_device())


def gather_with_gradient(rows: Tensor) -> Tensor:
    """`gather_rows`, of which this rank's own rows keep their gradient.

    A loss of all rows that every rank computes thus has on each rank the gradients of its own rows alone; their sum
    over the ranks is the whole gradient.
    """
    rank, size = rank_and_size()
    if size == 1:
        return rows
    counts = _row_counts(rows)
    first = sum(counts[:rank])
    together = _gather(rows, counts)
    return torch.cat([together[:first], rows, together[first + len(rows) :]])


def gather_with_sum(rows: Tensor) -> tuple[Tensor, slice]:
    """All ranks' rows, for a loss of which every rank computes a part, and where this rank's rows lie among them.

    A part may depend on any row. The gradient of this rank's rows is that of the sum of all ranks' parts, for which the
    ranks meet in the backward pass as well: each has to run it, with a part that depends on what it got here.

    Args:
        rows: (n_rank, ...) values on any device; ranks may hold different numbers of rows, none included.
    """
    rank, size = rank_and_size()
    if size == 1:
        return rows, slice(0, len(rows))
    counts = _row_counts(rows)
    first = sum(counts[:rank])
    return _GatherWithSum.apply(rows, counts, first), slice(first, first + len(rows))


class _GatherWithSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], first: int) -> Tensor:
        ctx.place = slice(first, first + len(rows))
        return _gather(rows, counts)

    @staticmethod
    @first_only("gather_with_sum: rows of several processes have first derivatives only; leave out a gradient penalty.")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Not reduce_scatter, which wants parts of one size.
        return _sum(grad)[ctx.place], None, None


def mean_of_parts(part: Tensor) -> Tensor:
    """The mean of all ranks' parts, on every rank, whose gradient is that of this rank's own part.

    For the value of a loss: DDP and its like average the gradients of the parameters over the ranks, which makes the
    gradient of the mean out of those of the parts.
    """
    _, size = rank_and_size()
    return part if size == 1 else _MeanOfParts.apply(part, size)


class _MeanOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, size: int) -> Tensor:
        return _sum(part) / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(values: Tensor) -> Tensor:
    """The sum over the ranks, on every rank and on the device of the values, which stay as they are."""
    total = values.detach().to(_meeting_place(values.device), copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total.to(values.device)


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over the ranks, under the same names; without gradient."""
    _, size = rank_and_size()
    if size == 1 or not values:
        return values
    together = torch.stack([value.detach().to(torch.float32) for value in values.values()])
    dist.all_reduce(together)
    return dict(zip(values, together / size, strict=True))


def of_every_rank(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Scalars of all ranks in their order, under the same names, on every rank."""
    _, size = rank_and_size()
    if size == 1 or not values:
        return {name: [value.item()] for name, value in values.items()}
    own = torch.stack([value.detach().to("cpu", torch.float64) for value in values.values()])
    return dict(zip(values, gather_rows(own[None]).T.tolist(), strict=True))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The gradients' mean over the ranks, in their place; of parameters that no wrapper such as DDP looks after."""
    _, size = rank_and_size()
    if size == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:  # a rank without a gradient meets the others all the same
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(_sum(parameter.grad) / size)


def largest(value: int) -> int:
    """The largest `value` of all ranks: how they agree to stop."""
    _, size = rank_and_size()
    if size == 1:
        return value
    shared = torch.tensor(value, device=_meeting_place(torch.device("cpu")))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def rows_from_first(rows: Tensor) -> Tensor:
    """Rank 0's tensor on every rank, without gradient; all pass one of the same shape, dtype and kind of device."""
    _, size = rank_and_size()
    if size == 1:
        return rows
    shared = rows.detach().to(_meeting_place(rows.device), copy=True, memory_format=torch.contiguous_format)
    dist.broadcast(shared, src=0)
    return shared.to(rows.device)


def from_first(value: Any) -> Any:
    """Rank 0's plain value (text, number, None) on every rank."""
    _, size = rank_and_size()
    if size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
