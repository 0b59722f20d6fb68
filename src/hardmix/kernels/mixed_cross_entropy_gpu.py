"""The mixed cross entropy of rows of logits on a GPU, in two kernels: one for the loss, one for the gradient.

What is computed is told in `mixed_cross_entropy`; here it is done for a row at once, labels and all, where tensor
operations take some eighty launches. Needs Triton, which torch's builds for GPUs bring, so only they import this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Below all that is there: differences from it are no NaN, as those from -inf may be.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


#: A mark that no label has.
_NONE = torch.iinfo(torch.int64).min


def blocks(classes: int, most: int) -> dict[str, int]:
    """How a kernel goes through the classes of a row: columns at a time, and the warps that share them."""
    block = min(triton.next_power_of_2(classes), most)
    return {"block": block, "num_warps": max(1, min(8, block // 256))}


class Kept(NamedTuple):
    """What the gradient needs of a row besides its logits and its target."""

    top: Tensor  # (N,) the largest logit outside the labels' classes
    scale: Tensor  # (N,) gradient of a logit outside, divided by exp(z - top)
    at_labels: Tensor  # (N, K) gradient of the labels' logits
    counted: Tensor  # (N,) bool, false where every label is ignored


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) of x <= 0."""
    # log1p from log: what 1 + u loses of u is put back by the quotient.
    u = tl.exp(x)
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + log1p_exp(-tl.abs(x))


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _difference(a, b):
    # From one end of a dtype to the other is infinitely far; capped, no sum over a batch overflows. -inf stays itself.
    capped = -_max(-_max(a - b, -1e30), -1e30)
    return tl.where(tl.minimum(a, b) == -float("inf"), a - b, capped)


@triton.jit
def _forward(
    logits,
    stride,
    labels,
    share,
    soft,
    soft_stride,
    loss,
    tops,
    scales,
    at_labels,
    counts,
    classes,
    ignored,
    floor,
    eta,
    width: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    regularised: tl.constexpr,
    asymmetric: tl.constexpr,
    smoothed: tl.constexpr,
    has_soft: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    labels += row * width

    # A label that is ignored becomes a duplicate of the first that is not.
    lane = tl.arange(0, lanes)
    valid = lane < width
    label = tl.load(labels + lane, mask=valid, other=0)
    mass = tl.load(share + row * width + lane, mask=valid, other=0.0)
    kept = valid & (label != ignored)
    mass *= kept.to(tl.float32)
    counted = (tl.sum((mass != 0).to(tl.int32), 0) > 0) | (tl.sum(kept.to(tl.int32), 0) == width)
    chosen = tl.min(tl.where(kept, lane, lanes), 0)
    label = tl.where(kept, label, tl.sum(tl.where(lane == chosen, label, 0), 0))
    head = tl.sum(tl.where(lane == 0, label, 0), 0)
    known = (label >= 0) & (label < classes)
    own = tl.load(logits + label, mask=valid & known, other=-float("inf")).to(tl.float32)
    # No launch can raise, so a class that is not there shows in the loss.
    own = tl.where(valid & ~known & counted, float("nan"), own)
    base = tl.max(own, 0)
    base = tl.where(base == -float("inf"), 0.0, base)

    top = _LOWEST
    amount = 0.0
    below = 0.0
    dense = 0.0
    for start in range(0, classes, block):
        cols = start + tl.arange(0, block)
        there = cols < classes
        z = tl.load(logits + cols, mask=there, other=-float("inf")).to(tl.float32)
        # Differences first: a sum of logits far from 0 has lost its digits.
        if smoothed:
            below += tl.sum(tl.where(there, _difference(base, z), 0.0), 0)
        if has_soft:
            t = tl.load(soft + row * soft_stride + cols, mask=there, other=0.0)
            below += tl.sum(tl.where(there, t * _difference(base, z), 0.0), 0)
            dense += tl.sum(t, 0)
        for k in tl.static_range(width):
            one = tl.load(labels + k)
            z = tl.where((cols == one) & (one != ignored), -float("inf"), z)
        higher = tl.maximum(top, tl.max(z, 0))
        amount = amount * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher

    amount = _max(amount, 1.0)  # less only where nothing is outside
    highest = tl.maximum(top, tl.max(own, 0))
    rest = (top - highest) + tl.log(amount)
    margin = _difference(top, own) + tl.log(amount)
    own = _difference(own, highest)
    differs = label[:, None] != label[None, :]
    first = valid & (tl.sum(((lane[:, None] > lane[None, :]) & ~differs).to(tl.int32), 1) == 0)
    differs = differs & valid[:, None] & valid[None, :]

    crest = tl.maximum(rest, tl.max(tl.where(first, own, _LOWEST), 0))
    outside = tl.exp(rest - crest)
    inside = tl.where(first, tl.exp(own - crest), 0.0)
    # The smallest number stands for an underflow to 0, whose logarithm has no gradient.
    others = _max(tl.sum(tl.where(differs, inside[None, :], 0.0), 1) + outside, _TINY)
    odds = tl.log(others) + crest - own
    value = tl.sum(tl.where(valid, mass * _softplus(odds), 0.0), 0)
    total = tl.sum(mass, 0)
    elsewhere = tl.sum(tl.where(differs, mass[None, :], 0.0), 1)
    whole = outside + tl.sum(inside, 0)
    if smoothed or has_soft:
        further = dense if has_soft else classes * 1.0
        further_loss = below + further * (tl.log(whole) + crest + _difference(highest, base))
        factor = 1.0 if has_soft else floor
        if smoothed:
            # -log p is capped, so beyond 1e30 the sum could turn negative.
            further_loss = _max(further_loss, 0.0)
        value += factor * further_loss
        total += factor * further
        elsewhere += factor * further
    grad = elsewhere - total * tl.sigmoid(odds)
    scale = total * outside / whole
    if regularised:
        another = valid & (label != head)
        pulled = valid & (tl.sum(another.to(tl.int32), 0) > 0)
        if asymmetric:
            # What stands in for an ignored label is not regularised in its place.
            pulled = pulled & ~another & (chosen == 0)
        pull = tl.where(pulled, margin, -float("inf"))
        value += eta * tl.sum(tl.where(first, _softplus(pull), 0.0), 0)
        pull = tl.sigmoid(pull)
        grad -= eta * pull
        scale += eta * tl.sum(tl.where(first, pull, 0.0), 0)
    tl.store(loss + row, tl.where(counted, value, 0.0))
    tl.store(tops + row, top)
    tl.store(scales + row, scale / amount)
    tl.store(at_labels + row * width + lane, grad, mask=valid)
    tl.store(counts + row, counted)


@triton.jit
def _backward(
    grad_loss,
    loss_stride,
    logits,
    stride,
    labels,
    soft,
    soft_stride,
    tops,
    scales,
    at_labels,
    counts,
    grad,
    classes,
    ignored,
    floor,
    width: tl.constexpr,
    block: tl.constexpr,
    has_soft: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * block + tl.arange(0, block)
    there = cols < classes
    z = tl.load(logits + row * stride + cols, mask=there, other=-float("inf")).to(tl.float32)
    slope = tl.exp(z - tl.load(tops + row)) * tl.load(scales + row)
    for k in tl.static_range(width):
        one = tl.load(labels + row * width + k)
        slope = tl.where((cols == one) & (one != ignored), tl.load(at_labels + row * width + k), slope)
    if has_soft:
        slope -= tl.load(soft + row * soft_stride + cols, mask=there, other=0.0)
    slope = (slope - floor) * tl.load(grad_loss + row * loss_stride)
    slope = tl.where(tl.load(counts + row), slope, 0.0)
    tl.store(grad + row * classes + cols, slope.to(grad.dtype.element_ty), mask=there)


@triton.jit
def _two_largest(dense, stride, labels, classes, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first, second = -float("inf"), -float("inf")
    least = float("inf")
    i, j = 0, 0
    for start in range(0, classes, block):
        cols = start + tl.arange(0, block)
        there = cols < classes
        t = tl.load(dense + row * stride + cols, mask=there, other=-float("inf"))
        least = tl.minimum(least, tl.min(tl.where(there, t, float("inf")), 0))
        high = tl.max(t, 0)
        at = tl.min(tl.where(t == high, cols, classes), 0)
        t = tl.where(cols == at, -float("inf"), t)
        next_high = tl.max(t, 0)
        next_at = tl.min(tl.where(t == next_high, cols, classes), 0)
        # The two largest of what was there and of this block.
        leads = high > first
        rival = tl.where(leads, tl.where(first >= next_high, first, next_high), high)
        rival_at = tl.where(leads, tl.where(first >= next_high, i, next_at), at)
        replaced = leads | (rival > second)
        second, j = tl.where(replaced, rival, second), tl.where(replaced, rival_at, j)
        first, i = tl.where(leads, high, first), tl.where(leads, at, i)
    # As `MixedTarget.from_dense`: what is left of the floor after rounding is not a second class.
    floor = tl.where(classes > 2, least, 0.0)
    absent = second - floor <= 4.0 * eps * (tl.abs(floor) + (first - floor) + (second - floor))
    tl.store(labels + 2 * row, i)
    tl.store(labels + 2 * row + 1, tl.where(absent | (j >= classes), i, j))


def two_largest(dense: Tensor) -> Tensor:
    """The labels (N, 2) that `MixedTarget.from_dense` finds in soft labels (N, C) in float32, rows contiguous."""
    rows, classes = dense.shape
    labels = torch.empty(rows, 2, dtype=torch.long, device=dense.device)
    eps = torch.finfo(torch.float32).eps
    _two_largest[(rows,)](dense, dense.stride(0), labels, classes, eps, **blocks(classes, 4096))
    return labels


def forward(
    logits: Tensor,
    labels: Tensor,
    share: Tensor,
    soft: Tensor | None,
    ignored: int | None,
    floor: float,
    eta: float,
    asymmetric: bool,
) -> tuple[Tensor, Kept]:
    """Loss of each row (N,) in float32, and what its gradient needs.

    Args:
        logits: (N, C) in float32 or a half type, rows contiguous.
        labels, share: (N, K), contiguous, long and float32.
        soft: (N, C) or (1, C) in float32, rows contiguous, or None; not beside a floor.
        ignored: the label that does not count, or None: all do.
    """
    (rows, classes), k = logits.shape, labels.shape[1]
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    top, scale = torch.empty(2, rows, dtype=torch.float32, device=logits.device).unbind(0)
    kept = Kept(top, scale, torch.empty_like(share), torch.empty(rows, dtype=torch.bool, device=logits.device))
    regularised = bool(eta > 0 and k > 1)
    _forward[(rows,)](
        logits,
        logits.stride(0),
        labels,
        share,
        *_dense(soft, share),
        loss,
        *kept,
        classes,
        _NONE if ignored is None else ignored,
        float(floor),
        float(eta),
        width=k,
        lanes=triton.next_power_of_2(max(k, 2)),
        regularised=regularised,
        asymmetric=asymmetric and regularised,
        smoothed=bool(floor > 0),
        has_soft=soft is not None,
        **blocks(classes, 4096),
    )
    return loss, kept


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    soft: Tensor | None,
    kept: Kept,
    ignored: int | None,
    floor: float,
) -> Tensor:
    """Gradient (N, C) of the logits, in their dtype, from that of each row's loss (N,)."""
    rows, classes = logits.shape
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    size = blocks(classes, 2048)
    _backward[(rows, triton.cdiv(classes, size["block"]))](
        grad_loss,
        grad_loss.stride(0),
        logits,
        logits.stride(0),
        labels,
        *_dense(soft, kept.at_labels),
        *kept,
        grad,
        classes,
        _NONE if ignored is None else ignored,
        float(floor),
        width=labels.shape[1],
        has_soft=soft is not None,
        **size,
    )
    return grad


def _dense(soft: Tensor | None, instead: Tensor) -> tuple[Tensor, int]:
    """A soft target and how far its rows lie apart; a kernel that reads none gets some other memory."""
    if soft is None:
        return instead, 0
    return soft, soft.stride(0) if soft.shape[0] > 1 else 0
