"""Binary cross entropy of mixed labels for rows of logits on a GPU: one kernel for the loss, one for the gradient.

What is computed is told in `mixed_bce`. A soft target is formed where it is read, so nothing of the logits' size is
held. Needs Triton, which torch's builds for GPUs bring, so only they import this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hardmix.kernels.mixed_cross_entropy_gpu import blocks, log1p_exp


@triton.jit
def _wanted(target, labels, row, cols, there, classes, width: tl.constexpr, dense: tl.constexpr):
    """Targets of the columns `cols` of a row."""
    if dense:
        return tl.load(target + row * classes + cols, mask=there, other=0.0)
    t = tl.zeros(cols.shape, tl.float32)
    for k in tl.static_range(width):
        t = tl.where(cols == tl.load(labels + row * width + k), tl.load(target + row * width + k), t)
    return t


@triton.jit
def _missing(labels, row, classes, width: tl.constexpr, dense: tl.constexpr):
    """NaN where a label of the row is a class that is not there, since no launch can raise; 0 else."""
    value = 0.0
    if not dense:
        for k in tl.static_range(width):
            label = tl.load(labels + row * width + k)
            value = tl.where((label >= 0) & (label < classes), value, float("nan"))
    return value


@triton.jit
def _forward(
    logits,
    stride,
    target,
    labels,
    weight,
    loss,
    classes,
    width: tl.constexpr,
    block: tl.constexpr,
    dense: tl.constexpr,
    weighted: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    value = 0.0
    for start in range(0, classes, block):
        cols = start + tl.arange(0, block)
        there = cols < classes
        z = tl.load(logits + row * stride + cols, mask=there, other=0.0).to(tl.float32)
        t = _wanted(target, labels, row, cols, there, classes, width, dense)
        # max(z, 0) - t z first: where a wanted class is predicted with confidence they cancel without a rounding.
        above = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        terms = tl.where(t == 0.0, above, above - t * z) + log1p_exp(-tl.abs(z))
        if weighted:
            terms *= tl.load(weight + cols, mask=there, other=0.0)
        value += tl.sum(tl.where(there, terms, 0.0), 0)
    tl.store(loss + row, value + _missing(labels, row, classes, width, dense))


@triton.jit
def _backward(
    grad_loss,
    loss_stride,
    logits,
    stride,
    target,
    labels,
    weight,
    grad,
    classes,
    width: tl.constexpr,
    block: tl.constexpr,
    dense: tl.constexpr,
    weighted: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * block + tl.arange(0, block)
    there = cols < classes
    z = tl.load(logits + row * stride + cols, mask=there, other=0.0).to(tl.float32)
    t = _wanted(target, labels, row, cols, there, classes, width, dense)
    slope = (1.0 - t) * tl.sigmoid(z) - t * tl.sigmoid(-z)  # sigmoid(z) - t, with every digit of 1 - sigmoid(z)
    slope *= tl.load(grad_loss + row * loss_stride)
    if weighted:
        slope *= tl.load(weight + cols, mask=there, other=0.0)
    slope += _missing(labels, row, classes, width, dense)
    tl.store(grad + row * classes + cols, slope.to(grad.dtype.element_ty), mask=there)


def forward(logits: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
    """Loss of each row (N,) in float32.

    Args:
        logits: (N, C) in float32 or a half type, rows contiguous.
        target: (N, K) of the classes in `labels`, or (N, C); float32, contiguous.
        labels: (N, K) long, contiguous, or None.
        weight: (C,) float32, contiguous, or None.
    """
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _forward[(rows,)](
        logits,
        logits.stride(0),
        *_target(target, labels, weight),
        loss,
        classes,
        **_settings(target, labels, weight),
        **blocks(classes, 4096),
    )
    return loss


def backward(grad_loss: Tensor, logits: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
    """Gradient (N, C) of the logits, in their dtype, from that of each row's loss (N,)."""
    rows, classes = logits.shape
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    size = blocks(classes, 2048)
    _backward[(rows, triton.cdiv(classes, size["block"]))](
        grad_loss,
        grad_loss.stride(0),
        logits,
        logits.stride(0),
        *_target(target, labels, weight),
        grad,
        classes,
        **_settings(target, labels, weight),
        **size,
    )
    return grad


def _target(target: Tensor, labels: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel doesn't read has to be some memory all the same."""
    return target, target if labels is None else labels, target if weight is None else weight


def _settings(target: Tensor, labels: Tensor | None, weight: Tensor | None) -> dict[str, int | bool]:
    width = 1 if labels is None else target.shape[1]
    return {"width": width, "dense": labels is None, "weighted": weight is not None}
