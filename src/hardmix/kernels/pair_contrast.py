"""Contrasts of image-text pairs, and of their geodesic mixtures, from Gram matrices: no mixture is ever formed.

A point on the arc between two rows is a combination of the two, so its cosine with any row is made of two entries of
the Gram matrices of images with images (II), images with texts (IT) and texts with texts (TT). Those are formed in
tiles. Every family of logits asked for reads the same tile, and one tile serves the anchors of its rows, of its columns
and of both modalities, so that a batch needs 4 N^2 D operations, and 12 N^2 D more for the gradient, whatever the
number of mixtures; without mixtures of the two modalities, 2 and 6. Up to `DENSE_ROWS` rows there is one tile, which is
kept for the gradient (6 and 8; 2 and 4). Above, each anchor keeps a running maximum and sum, tiles are formed again for
the gradient, and memory grows with N alone.

What comes out is the log-sum-exp over the *other* rows, without the pair itself: log(1 + exp(that - logit of the pair))
has all digits of a small loss, where the difference of a complete log-sum-exp and a logit has none.

Processes: `a` and `b` are the rows of all of them, [first, last) the anchors that this one answers for, which need not
be its own rows. A caller gathers rows with a differentiable gather, asks for its part and averages; nothing here
communicates. Tiles are cut where the parts meet, and all processes have to cut alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardmix._math import CPU, first_only, refuse_transforms, softplus

#: Up to so many rows there is one tile.
DENSE_ROWS = 1024
#: Rows of a tile, even: a core's cache holds a few matrices of this side; a GPU wants work for all of it.
TILE_ROWS = {"cpu": 512}
TILE_ROWS_ELSEWHERE = 4096
#: Stands for the logarithm of an empty sum, where an infinity would make NaN of a difference.
LOWEST = -1e37
#: Anchors of either side, as places in the result.
IMAGE, TEXT = 0, 1


class Term(NamedTuple):
    """One family of logits between anchors and keys of the other modality. Its scale is part of the coefficients.

    scale: () plain cosines: scale a_i . b_j.
    image, text: (2, M) shares of a row and of its partner: the rows of that modality are first mixed with each other.
        One of them may be None; with either, `scale` is.
    keys: (2, M) shares of the image and the text of a pair: a_i and b_i as anchors, each against the mixtures
        keys[0, j] a_j + keys[1, j] b_j of all pairs. Excludes the three above.
    partners: the anchor's partner is left out of its sum like the anchor's own pair.
    """

    scale: Tensor | None = None
    image: Tensor | None = None
    text: Tensor | None = None
    keys: Tensor | None = None
    partners: bool = False


def tile_rows(rows: int, device: torch.device, cuts: Sequence[int] = ()) -> list[slice]:
    """Consecutive tiles of all rows, none of which has a cut inside."""
    size = rows if rows <= DENSE_ROWS else TILE_ROWS.get(device.type, TILE_ROWS_ELSEWHERE)
    bounds = sorted({0, *cuts, rows})
    return [slice(at, min(at + size, stop)) for start, stop in pairwise(bounds) for at in range(start, stop, size)]


def partner_order(tiles: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """An order of the rows in which partners (i and M - 1 - i) share a tile, as `Term` takes it for granted.

    The first half of a tile are the partners of its second half, in turn; in a tile with an odd number of rows the last
    one is its own. Both results are (M,): which row is at a place, and the place of its partner.
    """
    rows, done = tiles[-1].stop, 0
    order, partner = torch.arange(rows, device=CPU), torch.arange(rows, device=CPU)
    for tile in tiles:
        half = (tile.stop - tile.start) // 2
        one, other = slice(tile.start, tile.start + half), slice(tile.start + half, tile.start + 2 * half)
        place = torch.arange(rows, device=CPU)
        order[one] = place[done : done + half]
        order[other] = rows - 1 - order[one]
        partner[one], partner[other] = place[other], place[one]
        done += half
        order[other.stop : tile.stop] = rows // 2
    return order, partner


def pair_contrast(
    a: Tensor,
    b: Tensor,
    terms: Sequence[Term],
    *,
    bias: Tensor | None = None,
    tiles: Sequence[slice] | None = None,
    first: int = 0,
    last: int | None = None,
) -> Tensor:
    """Sums over the other rows, for each term, side and anchor.

        log sum_{j != i} exp(z_ij),     or with a bias   sum_{j != i} log(1 + exp(z_ij + bias))

    Args:
        a, b: (M, D) rows of images and texts, float32 or float64, of length 1 where cosines are meant.
        terms: what the logits z are. Coefficients have the dtype of the rows.
        bias: () for sums of pairwise sigmoid losses.
        tiles: of `tile_rows`, by default for the anchors asked for. Where a term mixes rows with partners or leaves
            those out, rows come in the `partner_order` of these tiles.
        first, last: the anchors, whole tiles; all rows by default.

    Returns:
        (T, 2, last - first): term, image or text as the anchor, anchor. -inf where there is no other row. First
        derivatives only, with respect to rows, coefficients and bias; NotImplementedError tells who asks for a second.
    """
    refuse_transforms("pair_contrast: losses of image-text pairs")
    last = len(a) if last is None else last
    tiles = tile_rows(len(a), a.device, (first, last)) if tiles is None else tiles
    assert {first, last} <= {0, *(tile.stop for tile in tiles)}, "anchors are whole tiles"
    task = _Task(tuple(term.partners for term in terms), tuple(tiles), first, last)
    # By name: before torch 2.9 a slice of a NamedTuple can't be compiled.
    flat = [value for term in terms for value in (term.scale, term.image, term.text, term.keys)]
    with _full_precision(a):
        return _PairContrast.apply(a, b, bias, task, *flat)


def _full_precision(x: Tensor) -> torch.autocast:
    """Logits are cosines times a hundred: the half types of an autocast region have no digits for them."""
    return torch.autocast(x.device.type, enabled=False)


class _Task(NamedTuple):
    partners: tuple[bool, ...]
    tiles: tuple[slice, ...]
    first: int
    last: int


class _End(NamedTuple):
    """An axis along which a sheet's logits are one anchor's; the side the anchors are on, and their rows."""

    axis: int
    side: int
    rows: slice


class _Sheet(NamedTuple):
    """The logits of a term in a tile, what they are made of, and whom they concern.

    source: names of products. mixing: for one product (shares along its rows, along its columns), each (2, .) or None;
        for two, the shares of each. targets: where the gradient of those belongs, as (coefficient, rows).
    """

    term: int
    logits: Tensor
    ends: list[_End]
    source: tuple[str, ...]
    mixing: tuple[Tensor | None, Tensor | None]
    targets: tuple[tuple[str, slice], ...]


class _PairContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, task: _Task, *coefficients: Tensor | None
    ) -> Tensor:
        tiles = _Tiles(a, b, bias, task, coefficients)
        top = a.new_full((len(tiles.terms), 2, task.last - task.first), LOWEST)
        total = torch.zeros_like(top)
        kept: dict[str, Tensor] = {}
        for r, c in tiles.blocks():
            products = tiles.products(r, c)
            if tiles.dense and any(ctx.needs_input_grad):
                kept = products
            for sheet in tiles.sheets(products, r, c):
                for end in sheet.ends:
                    at = (sheet.term, end.side, tiles.anchors(end))
                    if bias is not None:
                        total[at] += softplus(sheet.logits + bias).sum(end.axis)
                        continue
                    high = torch.maximum(top[at], sheet.logits.amax(end.axis))
                    mass = (sheet.logits - high.unsqueeze(end.axis)).exp_().sum(end.axis)
                    total[at] = (top[at] - high).exp_().mul_(total[at]).add_(mass)
                    top[at] = high
        # Not add_: compiled by torch 2.11, what is written in place and returned gets a wrong gradient.
        result = total if bias is not None else total.log_() + top
        ctx.task, ctx.names = task, tuple(kept)
        ctx.save_for_backward(a, b, bias, result, *coefficients, *kept.values())
        return result

    @staticmethod
    @first_only(
        "pair_contrast: losses of image-text pairs have first derivatives only; leave out the penalty on a gradient or "
        "what else differentiates it."
    )
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, bias, result, *rest = ctx.saved_tensors
        coefficients, kept = rest[: 4 * len(result)], dict(zip(ctx.names, rest[4 * len(result) :], strict=True))
        with _full_precision(a):
            tiles = _Tiles(a, b, bias, ctx.task, coefficients)
            tiles.start_gradient(ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            level = result.clamp(min=LOWEST)
            for r, c in tiles.blocks():
                products = kept or tiles.products(r, c)
                slopes: dict[str, Tensor] = {}
                for sheet in tiles.sheets(products, r, c):
                    slope = tiles.slope(sheet, level, grad)
                    tiles.pull(sheet, slope, products, slopes)
                tiles.spread(slopes, r, c)
        return (tiles.grads["i"], tiles.grads["t"], tiles.grad_bias, None, *tiles.grad_coefficients)


class _Tiles:
    """The rows of one batch, tile by tile, and what is gathered of their gradient.

    Products are named by the modalities of their rows and columns: "it" holds a_i . b_j.
    """

    def __init__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, task: _Task, coefficients: Sequence[Tensor | None]
    ) -> None:
        self.sides = {"i": a, "t": b}
        self.bias, self.task, self.coefficients = bias, task, coefficients
        fields = (coefficients[start::4] for start in range(4))
        self.terms = [Term(*values) for values in zip(*fields, task.partners, strict=True)]
        self.dense = len(task.tiles) == 1
        self.names = ("ii", "it", "ti", "tt") if any(term.keys is not None for term in self.terms) else ("it", "ti")

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Each pair of tiles once if both hold anchors; its products serve both."""
        for r in filter(self._holds_anchors, self.task.tiles):
            yield from ((r, c) for c in self.task.tiles if c.start >= r.start or not self._holds_anchors(c))

    def _holds_anchors(self, tile: slice) -> bool:
        return self.task.first <= tile.start and tile.stop <= self.task.last

    def anchors(self, end: _End) -> slice:
        return slice(end.rows.start - self.task.first, end.rows.stop - self.task.first)

    def products(self, r: slice, c: slice) -> dict[str, Tensor]:
        names = [name for name in self.names if name != "ti" or r != c]  # it is the transposed "it" there
        return {name: self.sides[name[0]][r] @ self.sides[name[1]][c].T for name in names}

    def sheets(self, products: dict[str, Tensor], r: slice, c: slice) -> Iterator[_Sheet]:
        """All logits of a tile. Along the rows they are those of anchors in r, along the columns of anchors in c."""
        columns, diagonal = self._holds_anchors(c), r == c
        for k, term in enumerate(self.terms):
            if term.keys is not None:
                keys = term.keys
                parts = [("ii", "it", _End(1, IMAGE, r), c)]
                parts += [] if diagonal else [("ti", "tt", _End(1, TEXT, r), c)]
                parts += [("ii", "ti", _End(0, IMAGE, c), r)] if columns and not diagonal else []
                parts += [("it", "tt", _End(0, TEXT, c), r)] if columns else []
                for p, q, end, rows in parts:
                    own, other = keys[:, rows, None] if end.axis == 0 else keys[:, None, rows]
                    logits = torch.addcmul(products[p] * own, products[q], other)
                    self._leave_out(logits, term, diagonal)
                    yield _Sheet(k, logits, [end], (p, q), (own, other), (("keys", rows),))
                continue
            for name in ("it",) if diagonal else ("it", "ti"):
                left, right = (IMAGE, TEXT) if name == "it" else (TEXT, IMAGE)
                ends = [_End(1, left, r), _End(0, right, c)] if columns else [_End(1, left, r)]
                fields = ("image", "text") if name == "it" else ("text", "image")
                over_rows, over_columns = (
                    None if shares is None else shares[:, rows]
                    for shares, rows in ((getattr(term, fields[0]), r), (getattr(term, fields[1]), c))
                )
                logits = products[name]
                logits = logits * term.scale if term.scale is not None else logits
                logits = logits if over_rows is None else _mix(logits, over_rows, 0)
                logits = logits if over_columns is None else _mix(logits, over_columns, 1)
                self._leave_out(logits, term, diagonal)
                targets = ((fields[0], r), (fields[1], c))
                yield _Sheet(k, logits, ends, (name,), (over_rows, over_columns), targets)

    def _leave_out(self, logits: Tensor, term: Term, diagonal: bool) -> None:
        if not diagonal:
            return
        logits.diagonal().fill_(-torch.inf)
        if term.partners:
            half = len(logits) // 2
            logits.diagonal(half)[:half].fill_(-torch.inf)
            logits.diagonal(-half)[:half].fill_(-torch.inf)

    def start_gradient(self, images: bool, texts: bool) -> None:
        wanted = {"i": images, "t": texts}
        self.grads = {side: torch.zeros_like(rows) if wanted[side] else None for side, rows in self.sides.items()}
        self.grad_bias = None if self.bias is None else torch.zeros_like(self.bias)
        self.grad_coefficients = [None if value is None else torch.zeros_like(value) for value in self.coefficients]

    def slope(self, sheet: _Sheet, level: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to a sheet's logits, from `level`, the result, and the gradient of that."""
        slopes = []
        for end in sheet.ends:
            at = (sheet.term, end.side, self.anchors(end))
            if self.bias is None:
                share = (sheet.logits - level[at].unsqueeze(end.axis)).exp_()
            else:
                share = (sheet.logits + self.bias).sigmoid_()
            slopes.append(share.mul_(grad[at].unsqueeze(end.axis)))
        slope = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
        if self.grad_bias is not None:
            self.grad_bias += slope.sum()
        return slope

    def pull(self, sheet: _Sheet, slope: Tensor, products: dict[str, Tensor], slopes: dict[str, Tensor]) -> None:
        """Send the gradient of a sheet's logits on to its coefficients and to the products of the tile."""
        if len(sheet.source) == 2:
            axis, ((_, rows),) = sheet.ends[0].axis, sheet.targets  # keys lie along the axis, anchors across it
            target = self.grad_coefficients[4 * sheet.term + 3]
            assert target is not None
            for part, (name, shares) in enumerate(zip(sheet.source, sheet.mixing, strict=True)):
                target[part, rows] += (slope * products[name]).sum(1 - axis)
                assert shares is not None
                if name in slopes:
                    slopes[name].addcmul_(slope, shares)
                else:
                    slopes[name] = slope * shares
            return
        (name,), term = sheet.source, self.terms[sheet.term]
        product = products[name]
        if term.scale is not None:
            target = self.grad_coefficients[4 * sheet.term]
            assert target is not None
            target += (slope * product).sum()
            slope = slope.mul_(term.scale)
        # Columns were mixed last.
        for axis in (1, 0):
            shares = sheet.mixing[axis]
            if shares is None:
                continue
            field, rows = sheet.targets[axis]
            before = product if axis == 0 or sheet.mixing[0] is None else _mix(product, sheet.mixing[0], 0)
            target = self.grad_coefficients[4 * sheet.term + Term._fields.index(field)]
            assert target is not None
            target[0, rows] += (slope * before).sum(1 - axis)
            target[1, rows] += (slope * _swap(before, axis)).sum(1 - axis)
            own, other = shares.unsqueeze(2 - axis)
            slope = torch.addcmul(_swap(slope * other, axis), slope, own)
        slopes[name] = slopes[name].add_(slope) if name in slopes else slope

    def spread(self, slopes: dict[str, Tensor], r: slice, c: slice) -> None:
        """Send the gradient of a tile's products on to the rows."""
        for name, slope in slopes.items():
            left, right = name[0], name[1]
            if r == c and left == right:
                slope = slope + slope.T
            elif (grad := self.grads[right]) is not None:
                grad[c].addmm_(slope.T, self.sides[left][r])
            if (grad := self.grads[left]) is not None:
                grad[r].addmm_(slope, self.sides[right][c])


def _mix(x: Tensor, shares: Tensor, axis: int) -> Tensor:
    """Rows (axis 0) or columns of a tile plus those of their partners, with shares (2, n)."""
    own, other = shares.unsqueeze(2 - axis)
    return torch.addcmul(x * own, _swap(x, axis), other)


def _swap(x: Tensor, axis: int) -> Tensor:
    """Every row or column in the place of its partner: halves change places, the odd one at the end stays."""
    half = x.shape[axis] // 2
    one, other, odd = x.split((half, half, x.shape[axis] - 2 * half), axis)
    return torch.cat((other, one, odd), axis)
