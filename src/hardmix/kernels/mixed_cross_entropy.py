"""Cross entropy of mixed labels and the decoupled regulariser, in one reading of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix._math import wide


def mixed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    share: Tensor,
    soft: Tensor | None = None,
    *,
    eta: float = 0.0,
    asymmetric: bool = False,
) -> Tensor:
    """Unreduced loss of every row (N, *spatial), in float32 or wider.

        l = -sum_k share_k log p_{y_k} - sum_c soft_c log p_c + eta sum_{i in S} softplus(r - z_i)
        S = distinct labels of the row (the last sum only where there are two or more),  r = logsumexp_{c not in S} z_c

    All that a row needs is r and the K logits of its labels, so the gradient outside S is one number per row times the
    softmax outside S, whatever eta is: backward reads one (N, C) tensor and writes one.

    Args:
        logits: (N, C, *spatial), any float dtype.
        labels: (N, K, *spatial) class ids in range; duplicates are one class.
        share: (N, K, *spatial) mass of each label, in float32 or wider.
        soft: further mass of all classes, broadcastable to `logits`: label smoothing, or a dense target.
        eta: factor of the regulariser.
        asymmetric: only the class of `labels[:, 0]` is regularised.
    """
    # K first from here on: sums over K are then over whole rows of memory.
    labels, share = labels.movedim(1, 0).contiguous(), share.movedim(1, 0).contiguous()
    learnt = share.requires_grad or (soft is not None and soft.requires_grad)
    if torch.compiler.is_compiling() or (learnt and torch.is_grad_enabled()):
        # The compiler fuses the formula by itself; a target with a gradient is rare, so autograd does it.
        return _formula(logits, labels, share, soft, eta, asymmetric)
    return _MixedCrossEntropy.apply(logits, labels, share, soft, eta, asymmetric)


class _Row(NamedTuple):
    """What the loss and its gradient need of a row."""

    odds: Tensor  # (K, N, *spatial) log((1 - p) / p) of the labels
    outside: Tensor  # (N, *spatial) probability of the classes outside S
    margin: Tensor | None  # (K, N, *spatial) r - z of the regularised labels, -inf for the others; None: nothing is
    first: Tensor | None  # (K, N, *spatial) the label has not occurred before in its row; None: a pair needs no look


def _row(rest: Tensor, own: Tensor, labels: Tensor, pulls: bool, asymmetric: bool) -> _Row:
    """From r (N, *spatial) and the labels' logits (K, N, *spatial), both less one and the same number per row."""
    differs = labels[:, None] != labels
    num_labels = labels.shape[0]
    inside, first = own, None
    if num_labels > 2:
        first = torch.stack([differs[k, :k].all(0) for k in range(num_labels)])
        inside = torch.where(first, own, torch.finfo(own.dtype).min)
    every = torch.cat([rest[None], inside])
    top = every.detach().amax(0)
    mass = (every - top).exp()
    # Summing what is not the own class, rather than subtracting from the whole, keeps every digit when p is close to 1.
    # The smallest number stands for an underflow to 0, whose logarithm has no gradient.
    others = (mass[0] + (differs * mass[1:]).sum(1)).clamp(min=torch.finfo(mass.dtype).tiny)
    odds = others.log() + top - own
    margin = None
    if pulls and num_labels > 1:
        alone = ~differs[0].any(0)
        # Filled, not multiplied: an infinite term that does not count must not become NaN.
        margin = (rest - own).masked_fill(alone | differs[0] if asymmetric else alone, -torch.inf)
    return _Row(odds, mass[0] / (others[0] + mass[1]), margin, first)


def _loss(row: _Row, logits: Tensor, share: Tensor, soft: Tensor | None, eta: float) -> Tensor:
    loss = (share * _softplus(row.odds)).sum(0)
    if row.margin is not None:
        pull = _softplus(row.margin)
        loss = loss + eta * (pull if row.first is None else pull * row.first).sum(0)
    if soft is not None:
        loss = loss - (logits.log_softmax(1, dtype=loss.dtype) * soft).sum(1)
    return loss


def _softplus(x: Tensor) -> Tensor:
    # The default threshold of 20 drops 2e-9, which float64 can tell; 40 drops nothing.
    return F.softplus(x, threshold=40)


def _formula(
    logits: Tensor, labels: Tensor, share: Tensor, soft: Tensor | None, eta: float, asymmetric: bool
) -> Tensor:
    """The same loss from differentiable operations, for the compiler, learnt targets and second derivatives."""
    z = logits.to(wide(logits.dtype))
    z = z - z.detach().amax(1, keepdim=True)
    index = labels.movedim(0, 1)
    rest = z.scatter(1, index, torch.finfo(z.dtype).min).logsumexp(1)
    row = _row(rest, z.gather(1, index).movedim(1, 0), labels, eta != 0.0, asymmetric)
    return _loss(row, z, share, soft, eta)


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The row in four parts, each in a unit of its own per row.

    exp(z) outside S and 0 inside, (N, C, *spatial), and its sum (N, *spatial); r (N, *spatial) and the labels' logits
    (K, N, *spatial), both less one and the same number.
    """
    dtype, index = wide(logits.dtype), labels.movedim(0, 1)
    if logits.device.type == "cpu":
        # One softmax over everything does, unless something that is needed underflows; a CPU can look.
        probs = logits.softmax(1, dtype=dtype)
        own = probs.gather(1, index)
        amount = probs.scatter_(1, index, 0.0).sum(1)
        if float(own.min()) > 1e-30 and float(amount.min()) > 1e-30:
            return probs, amount, amount.log(), own.movedim(1, 0).contiguous().log_()
        del probs
    outside = logits.to(dtype, copy=True)
    # The lowest number stands for "not there": unlike -inf it leaves no NaN where nothing else is there.
    lowest = torch.finfo(dtype).min
    outside.scatter_(1, index, lowest)
    top = outside.amax(1)
    probs = outside.softmax(1)
    own = logits.gather(1, index).to(dtype).movedim(1, 0).contiguous()
    highest = torch.maximum(top, own.amax(0))
    # The largest probability is exp(top - r), so one fused softmax gives the log-sum-exp as well.
    rest = (top - highest) - probs.amax(1).log()
    # From one end of a dtype to the other is infinitely far; capped, no sum over a batch overflows. -inf stays itself.
    own = torch.where(own == -torch.inf, own, (own - highest).clamp(min=-1e30))
    return probs, torch.ones_like(rest), rest, own


class _MixedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        share: Tensor,
        soft: Tensor | None,
        eta: float,
        asymmetric: bool,
    ) -> Tensor:
        probs, amount, rest, own = _split(logits, labels)
        row = _row(rest, own, labels, eta != 0.0, asymmetric)
        ctx.save_for_backward(logits, labels, share, soft, probs, amount, *row)
        ctx.eta, ctx.asymmetric = eta, asymmetric
        return _loss(row, logits, share, soft, eta)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, share, soft, probs, amount, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative is wanted
            loss = _formula(logits, labels, share, soft, ctx.eta, ctx.asymmetric)
            (grad,) = torch.autograd.grad(loss, logits, grad_loss, create_graph=True)
            return grad, None, None, None, None, None
        at_labels, outside = _gradient(_Row(*parts), labels, share, soft, ctx.eta)
        at_labels = (at_labels * grad_loss).movedim(0, 1)
        outside = (outside * grad_loss / amount)[:, None]
        if soft is not None or logits.dtype == probs.dtype:
            grad = probs * outside
        else:
            # Rounded while it is written: half types need no wide copy of the gradient.
            grad = torch.mul(probs, outside, out=torch.empty_like(logits))
        grad.scatter_(1, labels.movedim(0, 1), at_labels.to(grad.dtype))
        if soft is not None:
            grad.addcmul_(grad_loss[:, None], soft, value=-1.0)
        return grad.to(logits.dtype), None, None, None, None, None


def _gradient(row: _Row, labels: Tensor, share: Tensor, soft: Tensor | None, eta: float) -> tuple[Tensor, Tensor]:
    """d loss / d z of the labels (K, N, *spatial), and the factor (N, *spatial) of the softmax outside S.

    Duplicates all hold the gradient of their class, so it does not matter which of them is written last. The soft
    target itself is left to the caller.
    """
    elsewhere = ((labels[:, None] != labels) * share).sum(1)  # mass of the other labels
    total = share.sum(0)
    here = total - elsewhere
    if soft is not None:
        further = soft.sum(1)
        total, elsewhere = total + further, elsewhere + further
    at_labels = elsewhere * (-row.odds).sigmoid() - here * row.odds.sigmoid()
    outside = total * row.outside
    if row.margin is not None:
        pull = eta * row.margin.sigmoid()
        at_labels = at_labels - pull
        outside = outside + (pull if row.first is None else pull * row.first).sum(0)
    return at_labels, outside
