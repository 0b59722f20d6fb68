"""Moving the blocks of an image to other places of it, where more of what is salient shows.

An image is cut into a grid (h, w) of blocks; pixel p of an axis of length n lies in block floor(p h / n), so the blocks
of a side that h does not divide differ by a pixel. Blocks are counted row by row, and a plan is (N, h w) long: the
block that each place shows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.kernels import blend


def block_of(length: int, blocks: int, device: torch.device | str = "cpu") -> Tensor:
    """(length,) long: the block that each pixel of an axis lies in."""
    return torch.arange(length, device=device) * blocks // length


def pool_blocks(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sums (N, h, w) of maps (N, H, W) over the blocks."""
    down, right = (
        torch.nn.functional.one_hot(block_of(length, blocks, x.device), blocks).to(x.dtype)
        for length, blocks in zip(x.shape[1:], grid, strict=True)
    )
    return down.T @ (x @ right)


def spread_blocks(z: Tensor, size: tuple[int, int]) -> Tensor:
    """Values (N, h, w) at the pixels (N, H, W) of their blocks."""
    for dim, length in enumerate(size, 1):
        times, rest = divmod(length, z.shape[dim])
        z = z.index_select(dim, block_of(length, z.shape[dim], z.device)) if rest else z.repeat_interleave(times, dim)
    return z


def transport_blocks(visible: Tensor, saliency: Tensor, *, xi: float = 0.8) -> Tensor:
    """Bring salient blocks to places that show: the masked transport of PuzzleMix.

        cost_ij = xi d_ij - s_i v_j,   d_ij = ((y_i - y_j) / (h - 1))^2 + ((x_i - x_j) / (w - 1))^2

    Each block i prefers the place j that costs least, each place the block that costs least there; who loses a place
    turns to its next best one. Since both sides rank a pair by the same cost, that ends where one arrives by giving the
    cheapest pair of a free block and a free place to each other, again and again. Equal costs: a place keeps its own
    block; else the lower block comes first, then the lower place. A place j that shows begins with its own block at
    -s_j and only changes to a cheaper one, so what matters are the pairs with s_i - xi d_ij > s_j: few, since s sums to
    one. Only these are formed.

    Args:
        visible: (N, h, w) bool, v.
        saliency: (N, h, w) saliency s >= 0 of each block, which sums to about one.
        xi: price of the squared distance, above 0.

    Returns:
        (N, h w) long, the block that each place shows; its own where it does not show. No block shows twice. A
        saliency that is not finite counts as 0.
    Raises:
        TypeError, ValueError: shapes that differ, a `visible` that is not bool, a `xi` that is not positive.
    Reference: Kim et al. 2020 (arXiv:2009.06962). The authors' code forms all pairs as one-hot matrices and stops after
    h rounds; this one ends when nothing changes. Whether anything does is read on the host.
    """
    who = "transport_blocks"
    saliency = _check.batch(who, "saliency", saliency, 3, 3)
    if _check.tensor(who, "visible", visible).dtype != torch.bool or visible.shape != saliency.shape:
        raise ValueError(
            f"{who}: visible has shape {tuple(visible.shape)} and dtype {visible.dtype}; "
            f"pass {tuple(saliency.shape)} bools, as many as saliency has."
        )
    xi = _check.positive(who, "xi", xi)
    height, width = saliency.shape[1:]
    shown, s = visible.flatten(), saliency.detach().to(wide(saliency.dtype)).flatten()
    s = s.where(s.isfinite(), 0.0)
    block, place, bid = _bids(shown, s, height, width, xi)
    free = ~shown  # blocks that are not at home
    while True:
        at = torch.arange(len(bid), device=s.device)
        # Each free block asks for its best place, the first of its pairs; pairs that cost more than the best asker go.
        asked = _first(block, at.where(free.index_select(0, block), len(bid)), len(s))
        asked = asked.index_select(0, (asked < len(bid)).nonzero()[:, 0])
        asked_place, asked_bid = place.index_select(0, asked), bid.index_select(0, asked)
        best = s.new_full((len(s),), -math.inf).scatter_reduce_(0, asked_place, asked_bid, "amax")
        among = (best.index_select(0, asked_place) == asked_bid).nonzero()[:, 0]
        winner = _first(asked_place.index_select(0, among), asked.index_select(0, among), len(s))
        limit = best.index_select(0, place)
        left = ((bid > limit) | ((bid == limit) & (at <= winner.index_select(0, place)))).nonzero()[:, 0]
        if len(left) == len(bid) and bool(free.index_select(0, asked_place).all()):
            break
        free = free.index_fill(0, asked_place, True)  # who lives there has been driven out
        block, place, bid = (value.index_select(0, left) for value in (block, place, bid))
    plan = torch.arange(len(s), device=s.device).index_copy_(0, asked_place, block.index_select(0, asked))
    return plan.view(len(saliency), -1) % (height * width)


def _first(group: Tensor, value: Tensor, groups: int) -> Tensor:
    """The smallest value of each group; of an empty one a number beyond all."""
    return value.new_full((groups,), torch.iinfo(value.dtype).max).scatter_reduce_(0, group, value, "amin")


def _bids(shown: Tensor, s: Tensor, height: int, width: int, xi: float) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that can change anything, in the order of blocks and then places: block, place and s - xi d.

    Blocks and places are counted through the batch.
    """
    cells = height * width
    others, distance, key = (t.to(s.device) for t in _others(height, width))
    block = (s > xi / max(height - 1, width - 1, 1) ** 2).nonzero()[:, 0]
    first = (cells - 1) * (block % cells)
    worth = (s.index_select(0, block).double() / xi).clamp(max=2.5) + 3 * (block % cells)
    reach = torch.searchsorted(key, worth) - first  # places that cost less than the block is worth
    of = torch.arange(len(block), device=s.device).repeat_interleave(reach)
    at = torch.arange(len(of), device=s.device) + (first + reach - reach.cumsum(0)).index_select(0, of)
    block = block.index_select(0, of)
    place = block - block % cells + others.index_select(0, at)
    bid = s.index_select(0, block) - xi * distance.index_select(0, at).to(s.dtype)
    better = shown.index_select(0, place) & (bid > s.index_select(0, place))
    # A block that shows at home stays there until another one wants to.
    wanted = torch.zeros_like(shown).index_fill_(0, place[better], True) | ~shown
    left = (better & wanted.index_select(0, block)).nonzero()[:, 0]
    return block.index_select(0, left), place.index_select(0, left), bid.index_select(0, left)


@lru_cache(maxsize=64)
def _others(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each block in turn all others, nearest first: which, how far, and 3 block + distance, which ascends."""
    with torch.inference_mode(False):  # kept for every later call
        y, x = torch.arange(height, device=CPU).repeat_interleave(width), torch.arange(width, device=CPU).repeat(height)
        far_y, far_x = max(height - 1, 1) ** 2, max(width - 1, 1) ** 2
        # Whole numbers, so that equal distances are equal.
        far = (y - y[:, None]).square() * far_x + (x - x[:, None]).square() * far_y
        distance, others = far.sort(dim=1, stable=True)
        distance, others = distance[:, 1:].double() / (far_y * far_x), others[:, 1:]
        key = distance + 3 * torch.arange(len(y), device=CPU)[:, None]
        return others.flatten(), distance.flatten(), key.flatten()


def move_blocks(x: Tensor, plan: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images (N, ..., H, W) whose places show the blocks of `plan` (N, h w).

    Where sides are not divisible, a block that is a pixel longer than its place is cut, one that is shorter repeats its
    last row or column.
    """
    height, width = x.shape[-2:]
    down, right = block_of(height, grid[0], x.device)[:, None], block_of(width, grid[1], x.device)
    shown = plan[:, down * grid[1] + right]  # (N, H, W)
    rows = _pixel(shown // grid[1], down, torch.arange(height, device=x.device)[:, None], height, grid[0])
    columns = _pixel(shown % grid[1], right, torch.arange(width, device=x.device), width, grid[1])
    pixel = (rows * width + columns).flatten(1)  # (N, H W)
    pixel = pixel.view(len(x), *[1] * (x.ndim - 3), -1).expand(*x.shape[:-2], -1)
    return x.flatten(-2).gather(-1, pixel).view(x.shape)


def _pixel(block: Tensor, place: Tensor, at: Tensor, length: int, blocks: int) -> Tensor:
    """The pixel of an axis that is read for pixel `at`, which lies in `place`, where that shows `block`."""
    last = _start(block + 1, length, blocks) - 1
    return torch.minimum(_start(block, length, blocks) + at - _start(place, length, blocks), last)


def _start(block: Tensor, length: int, blocks: int) -> Tensor:
    return (block * length + blocks - 1) // blocks


def blend_blocks(
    x: Tensor,
    partner: Tensor,
    z: Tensor,
    plans: Tensor,
    *,
    mask: Tensor | None = None,
    shift: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """z T(x) + (1 - z) T'(x[partner]) for images (N, C, H, W), shares z (N, h, w) and plans (2, N, h w) of T and T'.

    Rounded as in `blend_rows`; `out` may be `x` itself. `mask` is z at the pixels (N, 1, H, W), where it is known
    already; `shift` says that partner[i] = (i + shift) mod N. In eager mode on a CPU the images are blended as they are
    first, and only the places that show something else are done again.
    """
    grid = (z.shape[1], z.shape[2])
    mask = spread_blocks(z, (x.shape[2], x.shape[3]))[:, None] if mask is None else mask
    own_plan, other_plan = plans
    if not x.is_cpu or blend.is_traced(x, z):
        other = move_blocks(x.index_select(0, partner), other_plan, grid)
        return _like(x, blend.blend_rows(move_blocks(x, own_plan, grid), other, mask, out=out))
    stay = torch.arange(grid[0] * grid[1], device=CPU)
    share = z.flatten(1)
    row, place = (((own_plan != stay) & (share > 0)) | ((other_plan != stay) & (share < 1))).nonzero(as_tuple=True)
    if not len(row):
        return blend.blend_partner(x, partner, mask, shift=shift, out=out)
    # Read before anything is written, which may be to `x`.
    own = _values(x, _addresses(x, row, place, own_plan[row, place], grid))
    other = _values(x, _addresses(x, partner[row], place, other_plan[row, place], grid))
    patch = blend.blend_rows(own, other, share[row, place].view(-1, 1, 1, 1))
    mixed = blend.blend_partner(x, partner, mask, shift=shift, out=out)
    _flat(mixed).index_copy_(0, _addresses(mixed, row, place, place, grid).flatten(), patch.flatten())
    return mixed


def show_blocks(x: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Images put together from blocks of many: share x[first] + (1 - share) x[second], block by block.

    Args:
        x: (N, C, H, W).
        first, second: (N, h, w) long rows of `x` that each block of each output is taken from.
        share: (N, h, w) of the first.

    Returns:
        Like `x`, rounded as in `blend_rows`. In eager mode on a CPU large images are copied place by place, and only
        blocks with a share below 1 are blended.
    """
    size = (x.shape[2], x.shape[3])
    if not blend._has_large_rows(x) or blend.is_traced(x, share):
        own, other = (x.gather(0, spread_blocks(row, size)[:, None].expand_as(x)) for row in (first, second))
        return _like(x, blend.blend_rows(own, other, spread_blocks(share, size)[:, None]))
    mixed = torch.empty_like(x)
    down, right = (_ranges(length, blocks) for length, blocks in zip(size, share.shape[1:], strict=True))
    for (i, rows), (j, columns) in product(enumerate(down), enumerate(right)):
        place = x[:, :, rows, columns]
        shown = place.index_select(0, first[:, i, j])
        half = (share[:, i, j] < 1).nonzero()[:, 0]
        if len(half):
            other = place.index_select(0, second[:, i, j].index_select(0, half))
            weight = share[:, i, j].index_select(0, half).view(-1, 1, 1, 1)
            shown.index_copy_(0, half, blend.blend_rows(shown.index_select(0, half), other, weight))
        mixed[:, :, rows, columns] = shown
    return mixed


def _like(x: Tensor, mixed: Tensor) -> Tensor:
    """`mixed` in the memory format of `x`."""
    return mixed if mixed.stride() == x.stride() else torch.empty_like(x).copy_(mixed)


def _ranges(length: int, blocks: int) -> list[slice]:
    ends = _start(torch.arange(blocks + 1, device=CPU), length, blocks).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _flat(x: Tensor) -> Tensor:
    """The memory that `x` lies in, from its first value to its last. Picking values from one axis is several times
    faster than from four, and so every layout will do."""
    span = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,))


def _values(x: Tensor, address: Tensor) -> Tensor:
    return _flat(x).index_select(0, address.flatten()).view(address.shape)


def _addresses(x: Tensor, image: Tensor, place: Tensor, block: Tensor, grid: tuple[int, int]) -> Tensor:
    """Where in `_flat(x)` the pixels lie that places of some images read when they show blocks: (M, C, height, width)
    with the sides of the largest block. A smaller place has its last row or column several times."""
    _, channels, height, width = x.stride()
    where = (image * x.stride(0))[:, None] + torch.arange(x.shape[1], device=CPU) * channels
    axes = []
    for length, blocks, at, shown in (
        (x.shape[2], grid[0], place // grid[1], block // grid[1]),
        (x.shape[3], grid[1], place % grid[1], block % grid[1]),
    ):
        at, shown = at[:, None], shown[:, None]
        pixel = torch.arange(-(-length // blocks), device=CPU) + _start(at, length, blocks)
        pixel = torch.minimum(pixel, _start(at + 1, length, blocks) - 1)
        axes.append(_pixel(shown, at, pixel, length, blocks))
    down, right = (axes[0] * height)[:, None, :, None], (axes[1] * width)[:, None, None, :]
    return where[:, :, None, None] + down + right
