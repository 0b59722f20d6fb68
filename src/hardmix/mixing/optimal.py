"""PuzzleMix: which blocks of two images to show, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.kernels.graph_cut import grid_cut
from hardmix.kernels.transport import blend_blocks, move_blocks, pool_blocks, spread_blocks, transport_blocks
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import LabelPairing, Pairing, move
from hardmix.mixing.gradients import input_saliency
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget

#: Images are compared across the border of two blocks in cells of at least this many pixels a side.
_CELL = 4


class PuzzleMix(AskingPolicy):
    """PuzzleMix: a mask over blocks that keeps what is salient in either image, and blocks moved to where they show.

        s = sqrt(mean_c (dCE / dx)^2), summed over the blocks of a B x B grid and divided by its sum
        z minimises  sum_p [(1 - z_p) s_own,p + z_p s_other,p] + b sum_{p ~ q} [(z_p - z_q)^2 + gamma D_pq(z_p, z_q)]
                     - eta / B^2 sum_p log P(z_p),         b = beta / (16 B),  z_p in {0, 1/2, 1}
        P(1), P(1/2), P(0) = lam'^2, 2 lam' (1 - lam'), (1 - lam')^2,  lam' ~ Beta(alpha, alpha)
        x~ = z T(own) + (1 - z) T'(other),   lam = mean of z over the pixels

    D_pq(1, 0) is how much the own image just before the border of p and q differs from the other one just after it:
    the mean absolute difference of cells of 4 x 4 pixels (or the next larger ones that divide a block), over cells and
    channels, in units of the range that the cells of a channel have in the batch. A half is taken halfway between the
    two, plus the square's share, as in the authors' code. T moves blocks of the own image to where z > 0, T' of the
    other one to where z < 1; see `transport_blocks`.

    Args:
        model: what is trained, asked for the input's gradient: one forward and backward more for each batch. It gets
            `x` as the policy does and is no part of the policy.
        alpha: of the Beta of the prior.
        blocks: numbers B of blocks a side; one is drawn for each batch. On a side of fewer pixels each is a block.
        beta: price of a border between shares.
        gamma: of a border that images show, from 0 to 1. Above 1 two images might ask for borders.
        eta: of the prior.
        transport: whether blocks are moved.
        xi: price of moving a block, times the squared distance over that of opposite sides.
        labels: 3 for z in {0, 1/2, 1}; 2 for {0, 1}, with P(1) = lam'.
        per, pairing: see `Policy`. With per="batch" or "pair" rows share lambda', never the mask.

    Shapes: (N, C, H, W) floats, square or not, and the labels: `plan(x, y)`. Sides that B does not divide have blocks
    that differ by a pixel; a moved one is cut, or its last row or column repeated. A map that is flat, zero everywhere
    or not finite counts as uniform: where both are, the mask is one value, the likeliest. lambda' of 0 or 1 counts as
    1e-8 from it. N = 1 and any row that is its own partner come back as they are. No gradient flows through the plan,
    a `PuzzlePlan`, which also holds the energy of the mask. Dense masks follow the blocks.

    Reference: Kim et al. 2020 (arXiv:2009.06962), as the authors' code has it, with its settings. There a graph cut by
    swap moves runs for one image after the other; here one primal-dual iteration for the batch comes nearer to the
    minimum. Their images are in [0, 1] for D, which needs the mean and deviation of the data; ours are scaled by their
    range. Their blocks have to divide a square image. lambda' is drawn for the batch there (`per="batch"`). The
    adversarial noise and the loss of clean images, which their best runs add, are not part of the policy.
    """

    min_ndim = max_ndim = 4

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        blocks: Sequence[int] = (2, 4, 8, 16),
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        transport: bool = True,
        xi: float = 0.8,
        labels: int = 3,
        per: str = "sample",
        pairing: str | LabelPairing | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, per=per, pairing=pairing)
        who = "PuzzleMix"
        self.blocks = check_blocks(who, blocks)
        self.beta = _check.non_negative(who, "beta", beta)
        self.gamma = _check.between(who, "gamma", gamma, 0.0, 1.0)
        self.eta = _check.non_negative(who, "eta", eta)
        self.transport = _check.boolean(who, "transport", transport)
        self.xi = _check.positive(who, "xi", xi)
        if isinstance(labels, bool) or labels not in (2, 3):
            raise ValueError(f"{who}: labels is {labels!r}; pass 2 or 3.")
        self.labels = labels

    def extra_repr(self) -> str:
        settings = f"beta={self.beta:g}, gamma={self.gamma:g}, eta={self.eta:g}, labels={self.labels}"
        return f"blocks={list(self.blocks)}, {settings}, transport={self.transport}, {super().extra_repr()}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        blocks = self.blocks[int(torch.randint(len(self.blocks), (1,), device=CPU, generator=generator))]
        lam, partner = move(self._lam(pairing, generator), x.device), move(pairing.partner, x.device)
        saliency = input_saliency(self._model(), x, y, who="PuzzleMix")
        with torch.no_grad():
            grid = (min(blocks, x.shape[2]), min(blocks, x.shape[3]))
            share = block_shares(saliency, grid)
            costs = self.costs(x.detach(), share, partner, lam)
            cut = grid_cut(*costs, steps=40 + 4 * max(grid))
            z = cut.labels.to(torch.float32) / (self.labels - 1)
            moves = None
            if self.transport:
                mixed = (partner != torch.arange(len(partner), device=x.device))[:, None, None]
                show = torch.cat([(z > 0) & mixed, (z < 1) & mixed])
                maps = torch.cat([share, share.index_select(0, partner)])
                moves = transport_blocks(show, maps, xi=self.xi).unflatten(0, (2, -1))
            size, source = tuple(x.shape[2:]), x if self.transport else None
            return PuzzlePlan(partner, z, moves, cut.energy, size=size, shift=pairing.shift, source=source)

    def costs(self, x: Tensor, share: Tensor, partner: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `grid_cut` minimises: costs (N, labels, h, w) of the shares z, and weights of neighbours below each
        other (N, h - 1, w) and beside each other (N, h, w - 1).

        Args:
            x: (N, C, H, W) images.
            share: (N, h, w) saliency of the blocks, which sums to one.
            partner, lam: (N,) rows and lambda'.
        """
        grid = (share.shape[1], share.shape[2])
        own, other = share.index_select(0, partner), share.clone()  # cost of z = 1, of z = 0
        price = self.beta / (16.0 * math.sqrt(grid[0] * grid[1]))
        weights = [
            share.new_full((len(x), grid[0] - 1, grid[1]), price),
            share.new_full((len(x), *grid), price)[..., 1:],
        ]
        if price and self.gamma:
            cells = _cells(x, grid)
            pair = (cells.index_select(0, partner), cells)  # what z = 0 shows, what z = 1 shows
            for dim in (1, 2):
                d = [[price * self.gamma * _contrast(a, b, grid, dim) for b in pair] for a in pair]
                half, skew = (d[1][0] + d[0][1] - d[1][1] - d[0][0]) / 2, (d[1][0] - d[0][1]) / 4
                before, after = (slice(None, -1), slice(1, None))
                for at, sign in ((before, 1.0), (after, -1.0)):
                    place = (slice(None),) * dim + (at,)
                    own[place] += d[1][1] / 2 + sign * skew
                    other[place] += d[0][0] / 2 - sign * skew
                # Not below 0 but for rounding: no D is above 1 or gamma is.
                weights[dim - 1] = (weights[dim - 1] + half).clamp(min=0.0)
        z = torch.arange(self.labels, device=x.device, dtype=share.dtype).view(1, -1, 1, 1) / (self.labels - 1)
        log_own, log_other = (value.to(share.dtype).clamp(min=1e-8).log() for value in (lam, 1.0 - lam))
        times = self.labels - 1
        log_prior = torch.stack(
            [k * log_own + (times - k) * log_other + math.log(math.comb(times, k)) for k in range(self.labels)], 1
        )
        prior = self.eta / (grid[0] * grid[1]) * log_prior[:, :, None, None]
        return torch.lerp(other[:, None], own[:, None], z) - prior, weights[0], weights[1]


class PuzzlePlan(MixPlan):
    """A `MixPlan` over blocks that may be shown in other places.

    Attributes:
        z: (N, h, w) float32 share of the own image in each block.
        moves: (2, N, h w) long, which block each place shows of the own image and of the partner; None: its own.
        energy: (N,) what the mask costs.
    """

    __slots__ = ("_own", "energy", "moves", "z")

    def __init__(
        self,
        partner: Tensor,
        z: Tensor,
        moves: Tensor | None,
        energy: Tensor,
        *,
        size: tuple[int, ...],
        shift: int | None = None,
        source: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.z, self.moves, self.energy = z, moves, energy
        if mask is None:
            mask = spread_blocks(z, (size[0], size[1]))[:, None]
        super().__init__(partner, None, mask, size=size, shift=shift, source=source)

    @property
    def own(self) -> Tensor | None:  # type: ignore[override]
        """The images of the batch with their blocks moved, as `RandomChoice` asks for them."""
        if self.moves is None or self.source is None:
            return self._own
        return move_blocks(self.source, self.moves[0], self._grid())

    @own.setter
    def own(self, value: Tensor | None) -> None:
        self._own = value

    @property
    def other(self) -> Tensor | None:
        if self.moves is None or self.source is None:
            return None
        return move_blocks(self.source.index_select(0, self.partner), self.moves[1], self._grid())

    def to(self, device: torch.device | str) -> PuzzlePlan:
        if self.lam.device == torch.device(device):
            return self
        moved = [
            None if value is None else move(value, device)
            for value in (self.partner, self.z, self.moves, self.energy, self.source, self.mask)
        ]
        partner, z, moves, energy, source, mask = moved
        assert partner is not None
        assert z is not None
        assert energy is not None
        assert self.size is not None
        return PuzzlePlan(partner, z, moves, energy, size=self.size, shift=self.shift, source=source, mask=mask)

    def target(self, y: Tensor, *, kind: str = "auto") -> MixedTarget:
        target = MixPlan(self.partner, self.lam, self.mask).target(y, kind=kind)
        if self.moves is None or target.labels.ndim != 4:
            return target
        own, other = target.labels.unbind(1)  # a dense mask follows its image
        moved = [move_blocks(own, self.moves[0], self._grid()), move_blocks(other, self.moves[1], self._grid())]
        return MixedTarget(torch.stack(moved, 1), target.weights)

    def _grid(self) -> tuple[int, int]:
        return self.z.shape[1], self.z.shape[2]

    def _blend(self, x: Tensor, out: Tensor | None) -> Tensor:
        if self.moves is None or x.ndim <= 2:
            return MixPlan(self.partner, self.lam, self.mask, shift=self.shift)._blend(x, out)
        self._where(x)  # refuses other ranks
        if x.shape[2] < self.z.shape[1] or x.shape[3] < self.z.shape[2]:
            raise ValueError(
                f"MixPlan.blend: x has shape {tuple(x.shape)} but the plan moves {self.z.shape[1]} x {self.z.shape[2]} "
                "blocks; pass maps of at least as many pixels, or a policy without transport."
            )
        shift = None if torch.compiler.is_compiling() else self.shift
        mask = self.mask if tuple(x.shape[2:]) == self.size else None
        return blend_blocks(x, self.partner, self.z, self.moves, mask=mask, shift=shift, out=out)


def check_blocks(who: str, blocks: object) -> tuple[int, ...]:
    """Numbers of blocks a side."""
    values = (blocks,) if isinstance(blocks, int) else blocks
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(f"{who}: blocks is {blocks!r}; pass a list of numbers of blocks a side.")
    return tuple(_check.integer(who, "blocks", value, 1) for value in values)


def block_shares(saliency: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, h, w) saliency of the blocks of maps (N, H, W) >= 0, as shares that sum to one.

    A map that is flat, zero everywhere or not finite counts as uniform.
    """
    blocks = pool_blocks(saliency.to(wide(saliency.dtype)), grid)
    largest = blocks.amax((1, 2), keepdim=True)  # NaN where any is
    blocks = blocks / largest  # from 0 to 1 first: the sum of huge ones would overflow
    flat = pool_blocks(torch.ones_like(blocks[:1, :1, :1]).expand(1, *saliency.shape[1:]), grid)
    blocks = blocks.where(largest.isfinite() & (largest > 0), flat)
    return blocks / blocks.sum((1, 2), keepdim=True)


def _cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means of `x` over cells, a whole number of them in each block: (N, C, h k, w l), divided by the range that they
    have in each channel."""
    counts = []
    for length, blocks in zip(x.shape[2:], grid, strict=True):
        side, rest = divmod(length, blocks)
        fitting = [k for k in range(1, side // _CELL + 1) if side % k == 0] if not rest else [max(1, side // _CELL)]
        counts.append(blocks * max(fitting, default=1))
    dtype = wide(x.dtype)
    if x.shape[2] % counts[0] or x.shape[3] % counts[1]:
        cells = F.adaptive_avg_pool2d(x.to(dtype), (counts[0], counts[1]))
    else:
        # Sums of slices stream through memory, which pooling does not: a third of the time.
        rows = x.unflatten(2, (counts[0], -1)).unbind(3)
        total = rows[0].to(dtype, copy=True)
        for row in rows[1:]:
            total += row
        columns = total.unflatten(3, (counts[1], -1))
        cells = columns @ total.new_full((columns.shape[4],), 1.0 / (len(rows) * columns.shape[4]))
    low, high = cells.amin((0, 2, 3), keepdim=True), cells.amax((0, 2, 3), keepdim=True)
    return cells / (high - low).clamp(min=torch.finfo(dtype).tiny)


def _contrast(before: Tensor, after: Tensor, grid: tuple[int, int], dim: int) -> Tensor:
    """How much the last cells of each block of one image differ from the first ones of the next block of another:
    (N, h - 1, w) for dim = 1, (N, h, w - 1) for dim = 2."""
    blocks = grid[dim - 1]
    last = before.unflatten(dim + 1, (blocks, -1)).select(dim + 2, -1).narrow(dim + 1, 0, blocks - 1)
    first = after.unflatten(dim + 1, (blocks, -1)).select(dim + 2, 0).narrow(dim + 1, 1, blocks - 1)
    difference = (last - first).abs().mean(1)
    along = 3 - dim
    return difference.unflatten(along, (grid[along - 1], -1)).mean(along + 1)
