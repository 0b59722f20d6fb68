"""Label-weighted contrast with mixtures of the rows, from the Gram matrix: no mixture is ever formed.

The cosine of row i with a mixture of rows p and q is a number made of three cosines of rows,

    s = (a G_ip + b G_iq) / nu,   nu^2 = a^2 + b^2 + 2 a b G_pq   (nu = 1 where mixtures keep their length)

so loss and gradient need G alone, and the embedding size occurs only in the products that make G and use its gradient.
Rows are sorted by label: what an anchor mixes with is then a slice below it and a slice above it. Anchors are taken in
blocks; a block holds (anchors, rows) and a box (anchors, some rows below, rows above) at a time, and computes both
again for the gradient instead of keeping them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardmix._math import CPU, first_only, refuse_transforms
from hardmix.kernels import tied_mixtures as tied

#: Up to so many rows the Gram matrix is formed whole; above, its parts are formed when they are needed.
DENSE_ROWS = 1024
#: Values of a box, and of the part of the Gram matrix that belongs to a block, of the order of a core's cache. Other
#: devices are busy with larger blocks only.
BOX_VALUES = 2**18
BLOCK_VALUES = 2**18
DEVICE_BLOCK_VALUES = 2**21
#: From this temperature on exp((s - 1) / t) does not underflow for any cosine in float32.
LOWEST_PLAIN_TEMPERATURE = 0.03
#: Mixtures are summed label by label where that visits this share of the pairs or less.
WORTH_TYING = 0.5
#: A block of several labels has pairs in its box that belong to none of them; so many times the useful ones are worth
#: it, and small boxes always are.
WASTE, SMALL_BOX = 3, 2**14


class Windows(NamedTuple):
    """Which rows each row mixes with, all (M,) on the host: [low, start) lie below it, [stop, high) above it, and
    [start, stop) have its label. Rows are sorted by label."""

    low: list[int]
    start: list[int]
    stop: list[int]
    high: list[int]


class Block(NamedTuple):
    """Anchors [first, last), the slice that holds all rows below them, the one above them, and whether all anchors have
    one label, so that every pair of the box is a mixture of every anchor, and the same one."""

    first: int
    last: int
    below: slice
    above: slice
    one_label: bool


class Contrast(NamedTuple):
    """What the loss is made of besides the rows.

    labels: (M,) float64, sorted; on the CPU where the device has no float64. weight: distance in labels -> factor in
    the denominator, None for 1. inclusive: (first, last) -> (last - first, M) shares of the anchor in its mixtures with
    every row, the same whenever it is asked; None leaves those mixtures out. exclusive: whether pairs around the anchor
    are mixed; most: how many of them an anchor gets, drawn from `seed`, all without.
    """

    labels: Tensor
    windows: Windows
    temperature: float
    weight: Callable[[Tensor], Tensor] | None
    inclusive: Callable[[int, int], Tensor] | None = None
    exclusive: bool = False
    normalize: bool = False
    detach: bool = False
    most: int | None = None
    seed: int = 0


class Part(NamedTuple):
    """Some of a block's pairs: rows below and above, and how many pairs each of them stands for."""

    below: slice | Tensor
    above: slice | Tensor
    scale: float = 1.0


def label_windows(labels: Tensor, window: float) -> Windows:
    """The windows of sorted labels (M,) float64 on the CPU: a row below is strictly lower, by strictly less than
    `window`, and likewise above."""
    rows = torch.arange(len(labels), device=CPU)
    start = torch.searchsorted(labels, labels)
    stop = torch.searchsorted(labels, labels, right=True)
    # The difference is compared, not the label with a rounded bound; the bound is off by an entry or two at most.
    low = torch.searchsorted(labels, labels - window, right=True).minimum(start)
    high = torch.searchsorted(labels, labels + window).maximum(stop)
    for step in (-1, 1):
        while True:
            at = low if step > 0 else low - 1
            inside = labels - labels[at.clamp(0, len(rows) - 1)] < window
            move = (at >= 0) & (at < start) & (inside if step < 0 else ~inside)
            if not bool(move.any()):
                break
            low = low + step * move
    for step in (1, -1):
        while True:
            at = high if step > 0 else high - 1
            inside = labels[at.clamp(0, len(rows) - 1)] - labels < window
            move = (at >= stop) & (at < len(rows)) & (inside if step > 0 else ~inside)
            if not bool(move.any()):
                break
            high = high + step * move
    return Windows(low.tolist(), start.tolist(), stop.tolist(), high.tolist())


def blocks(windows: Windows, *, merge: bool = True, on_cpu: bool = True) -> Iterator[Block]:
    """All anchors of a label together, since they share their mixtures, and with `merge` those of neighbouring labels
    as long as their boxes overlap enough."""
    low, start, stop, high = windows
    rows, first = len(low), 0
    values = BLOCK_VALUES if on_cpu else DEVICE_BLOCK_VALUES
    while first < rows:
        wide = max(rows, (high[first] - stop[first]) * values // BOX_VALUES)
        most = first + max(1, values // wide)
        last, one_label = min(stop[first], most), True
        useful = (last - first) * (start[first] - low[first]) * (high[first] - stop[first])
        while merge and last < rows and start[last] == last and stop[last] <= most:
            useful += (stop[last] - last) * (start[last] - low[last]) * (high[last] - stop[last])
            box = (stop[last] - first) * (start[last] - low[first]) * (high[last] - stop[first])
            if box > BOX_VALUES or box > max(SMALL_BOX, WASTE * useful):
                break
            last, one_label = stop[last], False
        yield Block(first, last, slice(low[first], start[last - 1]), slice(stop[first], high[last - 1]), one_label)
        first = last


def label_contrast(z: Tensor, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Loss of every row as an anchor, and how many positives it has; 0 where it has none.

        l_i = log sum_{b in A_i} w_ib exp(s_ib / t) - 1 / |P_i| sum_{a in P_i} s_ia / t

    Args:
        z: (M, D) rows of length 1, sorted by label, float32 or float64.
    Returns:
        (M,) losses and (M,) counts. First derivatives only.
    """
    refuse_transforms("label_contrast: contrasts that compare labels")
    with _full_precision(z):
        loss, count = _LabelContrast.apply(z, contrast)
    return loss, count


def _full_precision(z: Tensor) -> torch.autocast:
    """Cosines near 1 have no digits to spare for the half types of an autocast region."""
    return torch.autocast(z.device.type, enabled=False)


class _Box(NamedTuple):
    """The mixtures of some rows below and above the anchors of a block, (B, J, K), or (1, J, K) where alike for all."""

    s: Tensor  # cosine with the anchor
    lower: Tensor  # d s / d G_ij
    upper: Tensor  # d s / d G_ik
    bend: Tensor | None  # -(d s / d G_jk) / s; None where nothing flows there
    inside: Tensor | None  # which of them an anchor has; None: all
    number: Tensor | int  # how many an anchor has


class _LabelContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, contrast: Contrast) -> tuple[Tensor, Tensor]:
        pairs = _Pairs(z, contrast)
        total = z.new_empty(len(z))
        pull, count = torch.zeros_like(total), torch.zeros_like(total)
        for block in pairs.blocks():
            own = slice(block.first, block.last)
            total[own], pull[own], count[own] = pairs.sums(block)
        ctx.save_for_backward(z, total, count)
        ctx.contrast = contrast
        ctx.mark_non_differentiable(count)
        alone = count == 0
        loss = total - pull / count.masked_fill(alone, 1.0)
        return loss.masked_fill(alone, 0.0), count

    @staticmethod
    @first_only(
        "label_contrast: contrasts that compare labels have first derivatives only; leave out a penalty on gradients."
    )
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None]:
        z, total, count = ctx.saved_tensors
        alone = count == 0
        total = total.masked_fill(alone, torch.inf)  # no part of the gradient, where there may be nothing at all
        grad = grad_loss.masked_fill(alone, 0.0) / ctx.contrast.temperature
        share = grad / count.masked_fill(alone, 1.0)
        with _full_precision(z):
            pairs = _Pairs(z, ctx.contrast)
            pairs.start_gradient()
            for block in pairs.blocks():
                own = slice(block.first, block.last)
                pairs.spread(block, total[own, None], grad[own, None], share[own, None])
            return pairs.gradient(), None


class _Pairs:
    """The rows of one batch: their Gram matrix, and what is gathered of its gradient."""

    def __init__(self, z: Tensor, contrast: Contrast) -> None:
        self.z, self.contrast = z, contrast
        self.dense = len(z) <= DENSE_ROWS
        self.gram = z @ z.T if self.dense else None
        self.floor = 1e-12 if z.dtype == torch.float64 else 1e-6
        self.rows = torch.arange(len(z), device=z.device)
        self.windows = torch.tensor(contrast.windows, device=z.device)  # (4, M)

    def blocks(self) -> Iterator[Block]:
        """Pairs are drawn for a label, so anchors of several don't share a box then."""
        on_cpu = self.z.device.type == "cpu"
        return blocks(self.contrast.windows, merge=self.contrast.most is None, on_cpu=on_cpu)

    def cosines(self, left: slice | Tensor, right: slice | Tensor) -> Tensor:
        return self.z[left] @ self.z[right].T if self.gram is None else self.gram[left][:, right]

    def sums(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """log of the denominator, sum of s / t over the positives, and their number, for each anchor of a block."""
        t = self.contrast.temperature
        cosine, positive, same = self._real(block)
        total = self._log_weighted(cosine / t, self._distance(block), same, keep=positive).logsumexp(1)
        pull, count = (cosine * positive).sum(1) / t, positive.sum(1).to(cosine.dtype)
        if self.contrast.inclusive is not None:
            s, lam, _ = self._inclusive(block, cosine)
            logits = self._log_weighted(s / t, (1.0 - lam) * self._distance(block), same)
            total = torch.logaddexp(total, logits.logsumexp(1))
        if ties := self._ties(block):
            log, s = tied.sums(cosine[:, block.below], cosine[:, block.above], ties, t)
            pull, count = pull + s / t, count + len(ties.below) * len(ties.above)
            return torch.logaddexp(total, log), pull, count
        for part in self._parts(block):
            mixed = self._exclusive(block, part, cosine)
            count = count + mixed.number * part.scale
            s = mixed.s if mixed.inside is None else mixed.s * mixed.inside
            pull = pull + s.sum((1, 2)) * (part.scale / t)
            total = torch.logaddexp(total, self._log_sum(mixed) + math.log(part.scale))
        return total, pull, count

    def _log_sum(self, mixed: _Box) -> Tensor:
        """log sum exp(s / t) over a box, (B,). The cosines are no longer needed."""
        t = self.contrast.temperature
        logits = mixed.s.sub_(1.0).div_(t)  # at most 0
        if mixed.inside is not None:
            logits.masked_fill_(~mixed.inside, -torch.inf)
        if t < LOWEST_PLAIN_TEMPERATURE:
            return logits.flatten(1).logsumexp(1) + 1.0 / t
        return logits.exp_().sum((1, 2)).log_() + 1.0 / t

    def start_gradient(self) -> None:
        """`sides` is the gradient with respect to the Gram matrix of the constituents, where there is one whole."""
        self.grad = torch.zeros_like(self.z)
        self.sides = None if self.gram is None else torch.zeros_like(self.gram)

    def spread(self, block: Block, total: Tensor, grad: Tensor, share: Tensor) -> None:
        """Add a block's part of the gradient. `grad` is dL / dl over t, `share` that over the number of positives; all
        are (anchors, 1)."""
        t = self.contrast.temperature
        cosine, positive, same = self._real(block)
        logits = self._log_weighted(cosine / t, self._distance(block), same, keep=positive)
        # Both ends of a real pair move. Where mixtures are detached, only their anchor does.
        both = (logits - total).exp_().mul_(grad).sub_(positive * share)
        anchor = torch.zeros_like(both) if self.contrast.detach else both
        if self.contrast.inclusive is not None:
            s, lam, nu = self._inclusive(block, cosine)
            logits = self._log_weighted(s / t, (1.0 - lam) * self._distance(block), same)
            c = (logits - total).exp_().mul_(grad)
            anchor += c * self._slope(1.0 - lam, s, lam, nu)
        if ties := self._ties(block):
            sides = cosine[:, block.below], cosine[:, block.above]
            lower, upper = tied.slopes(*sides, ties, t, total, grad, share)
            anchor[:, block.below] += lower
            anchor[:, block.above] += upper
        for part in self._parts(block) if ties is None else ():
            mixed = self._exclusive(block, part, cosine)
            weight, pull = grad[..., None] * part.scale, share[..., None] * part.scale
            c = (mixed.s / t).sub_(total[..., None])
            if mixed.inside is None:
                c = c.exp_().mul_(weight).sub_(pull)
            else:  # what is no mixture of the anchor may be out of bounds before exp, not only useless after it
                c = c.masked_fill_(~mixed.inside, -torch.inf).exp_().mul_(weight).sub_(pull * mixed.inside)
            anchor[:, part.below] += (c * mixed.lower).sum(2)
            anchor[:, part.above] += (c * mixed.upper).sum(1)
            if mixed.bend is not None:
                # d s / d G_jk; where all anchors mix alike it is summed over them first.
                c.mul_(mixed.s)
                bend = mixed.bend[0] * c.sum(0) if block.one_label else c.mul_(mixed.bend).sum(0)
                self._subtract_side(part, bend)
        own = slice(block.first, block.last)
        self.grad[own] += anchor @ self.z
        if self.contrast.detach:
            self.grad[own] += both @ self.z
        self.grad.addmm_(both.T, self.z[own])

    def gradient(self) -> Tensor:
        return self.grad if self.sides is None else self.grad.addmm_(self.sides + self.sides.T, self.z)

    def _subtract_side(self, part: Part, side: Tensor) -> None:
        below, above, _ = part
        if self.sides is None:
            self.grad[below] -= side @ self.z[above]
            self.grad[above] -= side.T @ self.z[below]
        elif isinstance(below, slice):
            self.sides[below, above] -= side
        else:
            self.sides[below[:, None], above] -= side

    def _slope(self, other: Tensor, s: Tensor, lam: Tensor, nu: Tensor | None) -> Tensor:
        """d s / d G_ik of an anchor-inclusive mixture; of its direction alone where mixtures are detached."""
        if nu is None:
            return other
        slope = other / nu
        if self.contrast.detach:
            return slope
        square = nu.square()
        return slope - s * lam * other / square * (square > self.floor)

    def _real(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines of the anchors with all rows (B, M), which of them are positives, and which have the same label."""
        own = slice(block.first, block.last)
        start, stop = self.windows[1, own, None], self.windows[2, own, None]
        same = (self.rows >= start) & (self.rows < stop)
        return self.cosines(own, slice(None)), same & (self.rows != self.rows[own, None]), same

    def _distance(self, block: Block) -> Tensor:
        """Absolute differences of the labels (B, M); formed in float64, since labels may be large and close."""
        labels = self.contrast.labels
        return (labels[block.first : block.last, None] - labels).abs_().to(self.z)

    def _log_weighted(self, logits: Tensor, distance: Tensor, same: Tensor, keep: Tensor | None = None) -> Tensor:
        """logits + log w, -inf where the label is the anchor's, but for the entries to keep."""
        if self.contrast.weight is not None:
            logits = logits + self.contrast.weight(distance).log_()
        return logits.masked_fill(same if keep is None else same & ~keep, -torch.inf)

    def _length(self, lam: Tensor, cosine: Tensor) -> Tensor | None:
        """nu of the mixtures of two rows, None where they keep it. Two opposite rows leave nothing half way."""
        if not self.contrast.normalize:
            return None
        return (1.0 - 2.0 * lam * (1.0 - lam) * (1.0 - cosine)).clamp_(min=self.floor).sqrt_()

    def _inclusive(self, block: Block, cosine: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines of the anchors with their mixtures (B, M), the anchor's share, and nu."""
        assert self.contrast.inclusive is not None
        lam = self.contrast.inclusive(block.first, block.last)
        nu = self._length(lam, cosine)
        s = lam + (1.0 - lam) * cosine
        return (s if nu is None else s.div_(nu)), lam, nu

    def _ties(self, block: Block) -> tied.Ties | None:
        """The block's mixtures label by label, where they keep their length and few labels make it worth it."""
        contrast = self.contrast
        pairs = (block.below.stop - block.below.start) * (block.above.stop - block.above.start)
        plain = contrast.temperature >= LOWEST_PLAIN_TEMPERATURE and not contrast.normalize and contrast.most is None
        if not (contrast.exclusive and plain and block.one_label and pairs > 0):
            return None
        own, below, above = (contrast.labels[rows] for rows in (block.first, block.below, block.above))
        ties = tied.find_ties(own, below, above, self.z)
        return ties if ties.visits <= WORTH_TYING * pairs else None

    def _parts(self, block: Block) -> Iterator[Part]:
        """The pairs of a block, as many rows below at a time as a box holds; or those that are drawn."""
        below, above, most = block.below, block.above, self.contrast.most
        lower, upper = below.stop - below.start, above.stop - above.start
        if not self.contrast.exclusive or lower <= 0 or upper <= 0:
            return
        if most is not None and lower * upper > most:
            # A few rows of either side and all their pairs: every pair is as likely as any other to be there.
            keep = min(lower, most, max(1, round(math.sqrt(most * lower / upper))))
            other = min(upper, max(1, most // keep))
            drawn = torch.Generator().manual_seed(self.contrast.seed + block.first)
            rows = (
                torch.randperm(lower, generator=drawn, device=CPU)[:keep],
                torch.randperm(upper, generator=drawn, device=CPU)[:other],
            )
            left, right = (index.sort().values.to(self.z.device) for index in rows)
            size = max(1, BOX_VALUES // ((block.last - block.first) * other))
            for some in (left + below.start).split(size):
                yield Part(some, right + above.start, lower * upper / (keep * other))
            return
        size = max(1, BOX_VALUES // ((block.last - block.first) * upper))
        for first in range(below.start, below.stop, size):
            yield Part(slice(first, min(first + size, below.stop)), above)

    def _exclusive(self, block: Block, part: Part, cosine: Tensor) -> _Box:
        """The mixtures of these pairs around the anchors of a block."""
        own, (below, above, _) = slice(block.first, block.last), part
        # Differences are formed in float64: labels may be large and close.
        labels = self.contrast.labels
        u = labels[block.first : block.first + 1] if block.one_label else labels[own]
        width, reach = (labels[above] - side[:, None] for side in (labels[below], u))
        width, reach = width.to(self.z), reach.to(self.z)
        if block.one_label:
            inside = None
            number: Tensor | int = width.numel()
        else:
            low, start, stop, high = self.windows[:, own, None]
            has_below = (self.rows[below] >= low) & (self.rows[below] < start)
            has_above = (self.rows[above] >= stop) & (self.rows[above] < high)
            inside = has_below[:, :, None] & has_above[:, None, :]
            number = has_below.sum(1) * has_above.sum(1)
            # Rows that are both below one anchor of the block and above another make no mixture.
            width = width.masked_fill_(width <= 0.0, 1.0)
        lam = (reach[:, None, :] / width).clamp_(0.0, 1.0)
        towards, away, bend = lam, 1.0 - lam, None
        if self.contrast.normalize:
            nu = self._length(lam, self.cosines(below, above))
            assert nu is not None
            if not self.contrast.detach:
                square = nu.square()
                bend = (lam * away).div_(square).mul_(square > self.floor)
            towards, away = towards / nu, away / nu
        s = torch.addcmul(cosine[:, below, None] * towards, cosine[:, None, above], away)
        return _Box(s, towards, away, bend, inside, number)
