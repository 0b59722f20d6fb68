"""Policies that mix patches by the attention of one more forward of a vision transformer: TokenMix and SMMix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.mixing.attention import Grid
from hardmix.mixing.attention_policy import AttentionPolicy, pixel_share
from hardmix.mixing.draw import Pairing, move, row_numbers, uniform
from hardmix.mixing.field import largest
from hardmix.mixing.gradients import logits_of
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget

#: Of 196 patches, TokenMix shows 14 more of the partner than lambda asks for; other grids as many in proportion.
_MORE = 14 / 196
_LOG_RATIO = -math.log(0.3)
_MASKS = ("block", "random")


class TokenMix(AttentionPolicy):
    """TokenMix: blocks of patches from the partner, with labels by how much of each image's content they show.

        1 - M: blocks of int((1 - lam') T) + 14 of T = 196 patches (other T in proportion) show the partner
        w_own = sum_j M_j A_j(x_i),   w_partner = sum_j (1 - M_j) A_j(x_p(i)),   sum_j A_j = 1

    lam' ~ Beta(alpha, alpha). A block is a rectangle whose sides' ratio is log-uniform between 0.3 and 1 / 0.3; blocks
    are added until the number is reached, or ten in a row do not fit. A is the class token's attention on the patches
    of each *clean* image, from one more forward without a gradient. `x, target = mix(x, y)` labels by area; `relabel`
    gives the weights above. They do not sum to one, nor do they in the paper: it is less where both objects are covered
    and more where both are seen. `normalise` divides by the sum.

    Args:
        model: whose attention is read: the model that is trained or, as in the paper, a frozen teacher. See
            `AttentionTap` for which, and for `layer` and `patch`.
        mask: "block", or "random" for single patches.
        normalise: whether the two weights are scaled to sum to one.
        activation: a function (x, y) -> (N, rows, columns) of maps to weigh with in place of the attention, one number
            for each patch, for instance a class activation map of a teacher. Negative numbers count as 0.
        layer: name of the attention module to read; None takes the last block's.
        patch: side of a patch in pixels; None finds it.
        alpha, per, pairing: see `Policy`.

    Edges: same class: two weights of one label. N = 1: the sample with itself. A map of zeros counts as a flat one, by
    which the weights are the shares of patches. Half types: attention and weights in float32; uint8 images are refused,
    unless `activation` takes them. NaN attention gives NaN weights. Dense masks are refused.
    Cost: one forward of the model without a gradient, and some tens of small operations for the blocks.
    Reference: Liu et al. 2022 (arXiv:2207.08409). The authors' maps are those that a pretrained network has
    for the true class, stored with the data set; attention is OpenMixup's reading (37e1372), which weighs each image by
    the part that is covered; there is one mask per batch, and in the authors' code lam' is always 0.5. Here each image
    is weighed by the part that is seen, and each sample has its own mask.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        mask: str = "block",
        normalise: bool = False,
        activation: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        layer: str | None = None,
        patch: int | None = None,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, layer=layer, patch=patch, per=per, pairing=pairing)
        self.mask = _check.choice("TokenMix", "mask", mask, _MASKS)
        self.normalise = _check.boolean("TokenMix", "normalise", normalise)
        if activation is not None and not callable(activation):
            raise TypeError(
                f"TokenMix: activation is a {type(activation).__name__}; pass a function of images and labels, or None."
            )
        self.activation = activation
        self._drawn: Tensor | None = None
        self._weights: Tensor | None = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.mask!r}, normalise={self.normalise}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        lam = self._lam(pairing, generator)
        found, grid = self._maps(x, y)
        shown = ((1.0 - lam) * grid.patches).long() + round(_MORE * grid.patches)
        shown = shown.clamp_(max=grid.patches)
        if self.mask == "block":
            theirs = block_mask(shown[: self._count(x.shape[0])], (grid.rows, grid.columns), generator)
        else:
            order = uniform(0.0, 1.0, (self._count(x.shape[0]), grid.patches), generator)
            theirs = largest(order, shown[: order.shape[0]]).view(-1, grid.rows, grid.columns)
        own = move(~self._rows(pairing, theirs), x.device).to(torch.float32)
        partner = move(pairing.partner, x.device)
        total = found.sum((1, 2), keepdim=True)
        share = torch.where(total > 0, found / total, torch.where(total == 0, 1.0 / grid.patches, total))
        mine, other = (own * share).sum((1, 2)), ((1.0 - own) * share[partner]).sum((1, 2))
        weights = torch.stack([mine, other], 1)
        self._drawn = weights / weights.sum(1, keepdim=True) if self.normalise else weights
        return MixPlan(partner, None, pixel_share(own, grid, (x.shape[2], x.shape[3])), shift=pairing.shift)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x_mixed, target) with labels by area."""
        plan, target = self._plan_and_target(x, y, generator, kind)
        if target.weights.ndim != 2:
            raise ValueError(
                f"TokenMix: y has shape {tuple(y.shape)}, a dense mask, but content weighs whole images; pass one "
                "label per sample."
            )
        self._weights = self._drawn
        return plan.blend(x), target

    def relabel(self, logits: Tensor, target: MixedTarget) -> MixedTarget:
        """`target` with weights by content."""
        if self._weights is None or self._weights.shape != target.weights.shape:
            raise RuntimeError(
                f"TokenMix: relabel has a target with weights {tuple(target.weights.shape)} that no draw belongs to; "
                "pass the one that the policy gave last."
            )
        return target._replace(weights=self._weights.to(target.weights.dtype))

    def disarm(self) -> None:
        super().disarm()
        self._drawn = self._weights = None

    def _maps(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Grid]:
        if self.activation is None:
            _, found, grid = self._measure(x)
            return found, grid
        with torch.no_grad():
            found = self.activation(x, y)
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[0] != x.shape[0]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"TokenMix: activation returned {got} for a batch of shape {tuple(x.shape)}; return one number per "
                "patch, (N, rows, columns)."
            )
        rows, columns = found.shape[1:]
        grid = Grid(rows, columns, x.shape[2] // rows, x.shape[3] // columns)
        return found.detach().to(x.device, wide(found.dtype)).clamp(min=0.0), grid


class SMMix(AttentionPolicy):
    """SMMix: the partner's most attended window replaces the own least attended one.

        window of r x r patches:  a = argmin of the attention within it over x_i,  b = argmax over x_p(i)
        x~_i = x_i, but b's pixels of x_p(i) at a;   lam = 1 - r^2 / T
        loss(): KL(softmax(lam z_i + (1 - lam) z_p(i)) || softmax(logits)),   z the logits of the clean images

    r is a uniform whole number between int(0.25 side) and int(0.75 side) of a square grid; on another grid both sides
    of the window come from one draw. The attention of a patch is what all patches give it on average, over the heads of
    the last block, in one more forward of the clean batch, without a gradient and in evaluation mode; z are its logits.

    Args:
        model: the vision transformer that is trained; see `AttentionTap` for which, and for `layer` and `patch`.
        side: range of the window's side, as a share of the grid's.
        consistency: weight of `loss`; with 0 there is none.
        layer: name of the attention module to read; None takes the last block's.
        patch: side of a patch in pixels; None finds it.
        per, pairing: see `Policy`. Per batch and per pair rows share r, never the place.

    Edges: same class: two shares of one label. N = 1: its own strongest window covers its weakest, with its own label
    twice. Flat attention: both windows at the first place. Half types: attention and loss in float32; uint8 images are
    refused. NaN attention: some window. A plan has moved pixels, so dense masks are refused.
    Cost: one forward of the model without a gradient, and a gather of the batch.
    Reference: Chen et al. 2023 (arXiv:2212.12977), and the authors' code, which draws r once per batch and pairs by
    reversal. Its third part, a loss on the mean of the tokens of either image through a classifier of their own, needs
    that classifier and is left out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        side: tuple[float, float] = (0.25, 0.75),
        consistency: float = 1.0,
        layer: str | None = None,
        patch: int | None = None,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, layer=layer, patch=patch, per=per, pairing=pairing)
        self.side = _check.interval("SMMix", "side", side, 0.0, 1.0)
        self.consistency = _check.non_negative("SMMix", "consistency", consistency)
        self._output: Tensor | None = None
        self._clean: Tensor | None = None
        self._logits: Tensor | None = None

    def extra_repr(self) -> str:
        return f"side={self.side}, consistency={self.consistency:g}, per={self.per!r}, pairing={self.pairing!r}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        unit = self._rows(pairing, uniform(0.0, 1.0, (self._count(x.shape[0]),), generator))
        output, found, grid = self._measure(x, by_patches=True)
        self._output = logits_of("SMMix", output).detach() if self.consistency else None
        window = move(torch.stack([self._length(unit, side) for side in (grid.rows, grid.columns)], 1), x.device)
        partner = move(pairing.partner, x.device)
        at = best_window(found, window, largest=False)  # (N, 2)
        source = best_window(found[partner], window, largest=True)
        inside = [
            (place >= at[:, axis, None]) & (place < (at + window)[:, axis, None])
            for axis, place in enumerate(torch.arange(n, device=x.device) for n in (grid.rows, grid.columns))
        ]
        own = 1.0 - (inside[0][:, :, None] & inside[1][:, None, :]).to(torch.float32)
        mask = pixel_share(own, grid, (x.shape[2], x.shape[3]))
        other = shifted(x, partner, source - at, grid)
        return MixPlan(partner, None, mask, other=other, shift=pairing.shift)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        plan, target = self._plan_and_target(x, y, generator, kind)
        self._clean = self._logits = None
        if self._output is not None:
            z, self._output = self._output.to(wide(self._output.dtype)), None
            self._clean = torch.lerp(z[plan.partner], z, plan.lam.to(z.dtype)[:, None])
        return plan.blend(x), target

    def relabel(self, logits: Tensor, target: MixedTarget) -> MixedTarget:
        """The target as it is; the logits are kept for `loss`."""
        self._logits = logits if self._clean is not None else None
        return target

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """`consistency` times the divergence from the mixed logits of the clean images, the mean over the batch."""
        clean, logits = self._clean, self._logits
        self._clean = self._logits = None
        if clean is None:
            return None
        if logits is None:
            raise RuntimeError("SMMix: loss has no logits of the mixed batch; call relabel(logits, target) before it.")
        if logits.shape != clean.shape:
            raise ValueError(
                f"SMMix: loss has logits {tuple(logits.shape)} of the mixed batch but {tuple(clean.shape)} of the "
                "clean one; pass relabel what the model returned."
            )
        log_probs = logits.to(wide(logits.dtype)).log_softmax(1)
        return self.consistency * F.kl_div(log_probs, clean.log_softmax(1), reduction="batchmean", log_target=True)

    def disarm(self) -> None:
        super().disarm()
        self._output = self._clean = self._logits = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the model and without a batch that waits for its loss."""
        return {**self.__dict__, "_output": None, "_clean": None, "_logits": None}

    def _length(self, unit: Tensor, side: int) -> Tensor:
        """Whole sides of windows, uniform between the two shares of `side`."""
        low = max(1, int(self.side[0] * side))
        high = max(low, int(self.side[1] * side))
        return low + (unit * (high - low + 1)).long().clamp_(max=high - low)


def block_mask(targets: Tensor, size: tuple[int, int], generator: Generator | None) -> Tensor:
    """(R, rows, columns) bool with `targets` patches in rectangles: TokenMix's (and BEiT's) blocks.

    A rectangle's area is uniform between 1 and what is missing, its sides' ratio log-uniform between 0.3 and 1 / 0.3;
    it is taken if it lies in the grid, smaller than it on both axes, and adds something but not too much. A row is done
    when nothing is missing or ten rectangles in a row were not taken. All rows draw together, each its own.
    """
    rows, columns = size
    mask = torch.zeros(targets.shape[0], rows, columns, dtype=torch.bool, device=CPU)
    missing, failed = targets.clone(), torch.zeros_like(targets)
    down, across = row_numbers(rows), row_numbers(columns)
    while bool((open_ := (missing > 0) & (failed < 10)).any()):
        draws = uniform(0.0, 1.0, (targets.shape[0], 4), generator)
        area = 1.0 + draws[:, 0] * (missing - 1)
        ratio = torch.exp((2.0 * draws[:, 1] - 1.0) * _LOG_RATIO)
        height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (height < max(2, rows)) & (width < max(2, columns))
        top = (draws[:, 2] * (rows - height + 1)).long()
        left = (draws[:, 3] * (columns - width + 1)).long()
        new = ((down >= top[:, None]) & (down < (top + height)[:, None]))[:, :, None]
        new = new & ((across >= left[:, None]) & (across < (left + width)[:, None]))[:, None] & ~mask
        count = new.sum((1, 2))
        taken = open_ & fits & (count > 0) & (count <= missing)
        mask |= new & taken[:, None, None]
        missing = missing - count * taken
        failed = torch.where(taken, 0, failed + 1)
    return mask


def best_window(values: Tensor, window: Tensor, *, largest: bool) -> Tensor:
    """(N, 2) first corner of the window (N, 2) with the largest or the smallest sum over a map (N, rows, columns)."""
    rows, columns = values.shape[1:]
    # Sums of all upper left corners; in float64, whose differences keep float32's digits.
    corner = F.pad(values.to(torch.float64).cumsum(1).cumsum(2), (1, 0, 1, 0))
    at = torch.arange(rows * columns, device=values.device)
    top, left = at // columns, at % columns  # (P,)
    height, width = window[:, :1], window[:, 1:]
    fits = (top + height <= rows) & (left + width <= columns)  # (N, P)
    bottom, right = (top + height).clamp(max=rows), (left + width).clamp(max=columns)
    flat, stride = corner.flatten(1), columns + 1

    def upper_left(y: Tensor, x: Tensor) -> Tensor:
        return flat.gather(1, (y * stride + x).expand(values.shape[0], -1))

    sums = upper_left(bottom, right) - upper_left(top, right) - upper_left(bottom, left) + upper_left(top, left)
    best = (sums if largest else -sums).masked_fill(~fits, -torch.inf).argmax(1)
    return torch.stack([best // columns, best % columns], 1)


def shifted(x: Tensor, partner: Tensor, by: Tensor, grid: Grid) -> Tensor:
    """Each row's partner, moved so that patch p shows its patch p + by (N, 2), or the nearest that there is.

    Pixels that no patch covers are 0. In pieces of a patch's width, which are copied many times faster than pixels.
    """
    n, channels = x.shape[:2]
    height, columns = grid.rows * grid.height, grid.columns
    covered = x[:, :, :height, : columns * grid.width].reshape(-1, grid.width)
    down = (torch.arange(height, device=x.device) + by[:, :1] * grid.height).clamp(0, height - 1)  # (N, H)
    across = (torch.arange(columns, device=x.device) + by[:, 1:]).clamp(0, columns - 1)  # (N, columns)
    plane = partner[:, None] * channels + torch.arange(channels, device=x.device)  # (N, C)
    row = plane[:, :, None] * height + down[:, None]  # (N, C, H)
    at = row[:, :, :, None] * columns + across[:, None, None]
    moved = covered.index_select(0, at.flatten()).view(n, channels, height, columns * grid.width)
    if moved.shape != x.shape:
        moved = F.pad(moved, (0, x.shape[3] - moved.shape[3], 0, x.shape[2] - height))
    return moved if moved.stride() == x.stride() else torch.empty_like(x).copy_(moved)  # keeps the memory format
