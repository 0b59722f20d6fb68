"""Binary cross entropy of mixed labels, summed over the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hardmix._math import graph_gradient, is_transformed, softplus, wide
from hardmix.kernels.gpu import fits_kernels, rows_together


def mixed_bce(logits: Tensor, target: Tensor, labels: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Unreduced loss of every row (N, *spatial), in float32 or wider.

        l = sum_c weight_c [t_c softplus(-z_c) + (1 - t_c) softplus(z_c)]

    Rows of logits (N, C) on a GPU take one kernel each way; a class that is not there gives NaN then.

    Args:
        logits: (N, C, *spatial), any float dtype.
        target: t in [0, 1], in float32 or wider: (N, K, *spatial) for the classes in `labels`, the others being 0; or
            (N, C, *spatial).
        labels: (N, K, *spatial) class ids in range, or None. Duplicates must have one and the same target.
        weight: (C,) factor of each class.
    """
    learnt = target.requires_grad or (weight is not None and weight.requires_grad)
    by_hand = not (torch.compiler.is_compiling() or is_transformed() or (learnt and torch.is_grad_enabled()))
    weight = None if weight is None else weight.to(target.dtype)
    if by_hand and fits_kernels(logits, 1 if labels is None else labels.shape[1]):
        labels, weight = (None if x is None else x.contiguous() for x in (labels, weight))
        return _FusedBCE.apply(rows_together(logits), target.contiguous(), labels, weight)
    if weight is not None:
        weight = weight.view(1, -1, *[1] * (logits.ndim - 2))
    return (_MixedBCE.apply if by_hand else _formula)(logits, target, labels, weight)


def _formula(logits: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
    """The same loss from differentiable operations, for the compiler, learnt targets and second derivatives."""
    z = logits.to(wide(logits.dtype))
    if labels is None:
        terms = softplus(z) - target * z
        return (terms if weight is None else terms * weight).sum(1)
    # A class that is listed twice counts once, in the value and in every gradient.
    later = torch.ones(labels.shape[1], labels.shape[1], dtype=torch.bool, device=labels.device).tril(-1)
    later = later.view(*later.shape, *[1] * (labels.ndim - 2))
    again = ((labels[:, :, None] == labels[:, None]) & later).any(2)
    own = _at_labels(z.gather(1, labels), target).masked_fill(again, 0.0)
    others = softplus(z).scatter(1, labels, 0.0)
    if weight is not None:
        own, others = own * weight.expand_as(z).gather(1, labels), others * weight
    return others.sum(1) + own.sum(1)


def _at_labels(own: Tensor, target: Tensor) -> Tensor:
    """The terms of the labels' classes from their logits (N, K, *spatial)."""
    # Not softplus(z) - t z, which loses its digits where a wanted class is predicted with confidence.
    return target * softplus(-own) + (1.0 - target) * softplus(own)


class _MixedBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        z = logits.to(wide(logits.dtype))
        ctx.save_for_backward(logits, target, labels, weight)
        terms = softplus(z)
        if labels is None:
            terms.addcmul_(target, z, value=-1.0)
        else:
            terms.scatter_(1, labels, _at_labels(z.gather(1, labels), target))
        return (terms if weight is None else terms.mul_(weight)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, labels, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative is wanted
            return graph_gradient(_formula, grad_loss, logits, target, labels, weight), None, None, None
        grad = logits.to(target.dtype).sigmoid()
        if labels is None:
            grad.sub_(target)
        else:
            own = logits.gather(1, labels).to(grad.dtype)
            grad.scatter_(1, labels, (1.0 - target) * own.sigmoid() - target * (-own).sigmoid())
        grad.mul_(grad_loss[:, None])
        if weight is not None:
            grad.mul_(weight)
        return grad.to(logits.dtype), None, None, None


class _FusedBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        from hardmix.kernels.mixed_bce_gpu import forward

        ctx.save_for_backward(logits, target, labels, weight)
        with torch.cuda.device_of(logits):
            return forward(logits, target, labels, weight)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        from hardmix.kernels.mixed_bce_gpu import backward

        logits, target, labels, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative is wanted
            return graph_gradient(_formula, grad_loss, logits, target, labels, weight), None, None, None
        with torch.cuda.device_of(logits):
            return backward(grad_loss, logits, target, labels, weight), None, None, None
