"""Cross entropy of mixed labels and the decoupled regulariser, in one reading of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardmix._math import graph_gradient, is_transformed, softplus, wide
from hardmix.kernels.gpu import fits_kernels, rows_together

#: Differences of logits that are in memory at a time on a CPU.
_PIECE = 1 << 18


def mixed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    share: Tensor,
    soft: Tensor | None = None,
    *,
    ignored: int | None = None,
    floor: float = 0.0,
    eta: float = 0.0,
    asymmetric: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Unreduced loss of every row (N, *spatial), in float32 or wider, and the rows that count; None: all.

        l = -sum_k share_k log p_{y_k} - sum_c (soft_c + floor) log p_c + eta sum_{i in S} softplus(r - z_i)
        S = distinct labels of the row (the last sum only where there are two or more),  r = logsumexp_{c not in S} z_c

    All that a row needs is r and the K logits of its labels, so the gradient outside S is one number per row times the
    softmax outside S, whatever eta is: backward reads one (N, C) tensor and writes one. Rows of logits (N, C) on a GPU
    take one kernel each way; a class that is not there gives NaN then.

    Args:
        logits: (N, C, *spatial), any float dtype.
        labels: (N, K, *spatial) class ids in range; duplicates are one class.
        share: (N, K, *spatial) mass of each label, in float32 or wider.
        soft: further mass of all classes, broadcastable to `logits`: a dense target, or smoothing by class weights.
        floor: instead of `soft`, the same mass of each class: label smoothing, which reads one mean of the logits.
        eta: factor of the regulariser.
        ignored: a label that stands for none, where `takes_ignored`; a row that holds no other has loss 0.
        asymmetric: only the class of `labels[:, 0]` is regularised.
    """
    if _fused(logits, share, soft):
        logits, soft = rows_together(logits), None if soft is None else rows_together(soft)
        labels, share = labels.contiguous(), share.contiguous()
        loss, counted = _FusedCrossEntropy.apply(logits, labels, share, soft, ignored, floor, eta, asymmetric)
        return loss, None if ignored is None else counted
    assert ignored is None, "ask takes_ignored first"
    # K first from here on: sums over K are then over whole rows of memory.
    labels, share = labels.movedim(1, 0).contiguous(), share.movedim(1, 0).contiguous()
    by_hand = _by_hand(share, soft)
    loss = _MixedCrossEntropy.apply if by_hand else _formula
    return loss(logits, labels, share, soft, floor, eta, asymmetric), None


def takes_ignored(logits: Tensor, share: Tensor) -> bool:
    """Whether `mixed_cross_entropy` takes labels that may be ignored: the kernel of a GPU finds them as it goes."""
    return _fused(logits, share, None)


def two_largest(logits: Tensor, dense: Tensor) -> Tensor | None:
    """Labels (N, 2) of soft labels (N, C) of `logits`, found by a kernel of the GPU; None where there is none."""
    if not (_by_hand(dense.detach(), None) and fits_kernels(logits)):
        return None
    from hardmix.kernels.mixed_cross_entropy_gpu import two_largest as find

    with torch.cuda.device_of(dense):
        return find(rows_together(dense.detach()))


def without_ignored(labels: Tensor, share: Tensor, ignored: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels and share (N, K, *spatial) with `ignored` taken out; rows that count and rows whose first label does.

    A label that is not there becomes a duplicate of one that is, so that it is neither regularised nor left out of r.
    """
    kept = labels != ignored
    share = share * kept
    present = share != 0
    counted = present.any(1) | kept.all(1)
    if labels.ndim == 2:
        # A sample keeps its pair whatever lambda is; 1 - lambda rounds to 0 in one draw of fifty from Beta(0.2, 0.2).
        present = kept
    instead = labels.gather(1, present.byte().argmax(1, keepdim=True))
    labels = torch.where(present, labels, instead).masked_fill(~counted[:, None], 0)
    return labels, share, counted, present[:, 0]


def _by_hand(share: Tensor, soft: Tensor | None) -> bool:
    """Whether the gradient is written out. The compiler fuses the formula by itself; a target with a gradient is rare,
    so autograd does it."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return not (torch.is_grad_enabled() and (share.requires_grad or (soft is not None and soft.requires_grad)))


def _fused(logits: Tensor, share: Tensor, soft: Tensor | None) -> bool:
    return _by_hand(share, soft) and fits_kernels(logits, share.shape[1])


class _Slopes(NamedTuple):
    """What the gradient needs of a row."""

    missing: Tensor  # (K, N, *spatial) 1 - p of the labels
    pull: Tensor | None  # (K, N, *spatial) sigmoid(r - z), 0 for the labels that are not regularised; None: none is
    outside: Tensor  # (N, *spatial) probability of the classes outside S
    differs: Tensor  # (K, K, N, *spatial) 1 where two labels are two classes, else 0; of a pair (N, *spatial)
    first: Tensor | None  # (K, N, *spatial) the label has not occurred before in its row; None: a pair needs no look


class _Row(NamedTuple):
    """What the loss needs of a row."""

    cost: Tensor  # (K, N, *spatial) -log p of the labels
    pull: Tensor | None  # (K, N, *spatial) softplus(r - z), 0 for the labels that are not regularised; None: none is
    slopes: _Slopes


def _compare(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`differs` and `first` of the labels (K, N, *spatial)."""
    if len(labels) == 2:
        return (labels[0] != labels[1]).to(dtype), None
    differs = labels[:, None] != labels
    later = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu()  # or the label itself
    return differs.to(dtype), (differs | later.view(*later.shape, *[1] * (labels.ndim - 1))).all(1)


def _elsewhere(mass: Tensor, differs: Tensor) -> Tensor:
    """Of the mass of each label, what lies at other classes than the label's. (K, N, *spatial)"""
    return mass.flip(0) * differs if len(mass) == 2 else (differs * mass).sum(1)


def _others(rest: Tensor, own: Tensor, differs: Tensor) -> Tensor:
    """Mass of every class but the label's, (K, N, *spatial)."""
    # Summing what is not the own class, rather than subtracting it from the whole, keeps every digit when p is near 1.
    return _elsewhere(own, differs) + rest


def _regularised(labels: Tensor, differs: Tensor, asymmetric: bool) -> Tensor:
    """1 for labels that the regulariser is of, broadcastable to (K, N, *spatial): those of rows with another class."""
    if len(labels) == 2:
        return torch.stack([differs, torch.zeros_like(differs)]) if asymmetric else differs
    paired = differs[0].amax(0)
    return paired * (1.0 - differs[0]) if asymmetric else paired


def _row(rest: Tensor, own: Tensor, labels: Tensor, eta: float, asymmetric: bool) -> _Row:
    """From r (N, *spatial) and the labels' logits (K, N, *spatial), both less one and the same number per row."""
    differs, first = _compare(labels, own.dtype)
    every = torch.cat([rest[None], own if first is None else own.masked_fill(~first, torch.finfo(own.dtype).min)])
    top = every.detach().amax(0)
    mass = (every - top).exp()
    # The smallest number stands for an underflow to 0, whose logarithm has no gradient.
    others = _others(mass[0], mass[1:], differs).clamp(min=torch.finfo(mass.dtype).tiny)
    odds = others.log() + top - own
    pull = slope = None
    if eta and len(labels) > 1:
        # Masked here: of a term that is infinite, a product with 0 would make NaN.
        margin = (rest - own).masked_fill(_regularised(labels, differs, asymmetric) == 0, -torch.inf)
        pull, slope = softplus(margin), margin.sigmoid()
    outside = mass[0] / (others[0] + mass[1])
    return _Row(softplus(odds), pull, _Slopes(odds.sigmoid(), slope, outside, differs, first))


def _row_of_probs(rest: Tensor, own: Tensor, labels: Tensor, eta: float, asymmetric: bool) -> _Row:
    """The same from probabilities, where none of them underflows."""
    differs, first = _compare(labels, own.dtype)
    missing = _others(rest, own if first is None else own * first, differs)
    pull = slope = None
    if eta and len(labels) > 1:
        margin = rest / own * _regularised(labels, differs, asymmetric)  # exp(r - z)
        pull, slope = margin.log1p(), margin / (1.0 + margin)
    return _Row((missing / own).log1p(), pull, _Slopes(missing, slope, rest, differs, first))


def _distinct(pull: Tensor, first: Tensor | None) -> Tensor:
    return pull if first is None else pull * first


def _loss(row: _Row, share: Tensor, eta: float) -> Tensor:
    loss = (share * row.cost).sum(0)
    return loss if row.pull is None else loss.add(_distinct(row.pull, row.slopes.first).sum(0), alpha=eta)


def _soft_cost(logits: Tensor, soft: Tensor, dtype: torch.dtype) -> Tensor:
    """-sum_c soft_c log p_c of every row, (N, *spatial)."""
    return -(logits.log_softmax(1, dtype=dtype) * soft).sum(1)


def _soft_cost_of_probs(logits: Tensor, soft: Tensor, mass: Tensor, largest: Tensor) -> Tensor:
    """The same on a CPU from the `mass` of the soft labels and the largest probability of each row, (N, *spatial).

        -sum_c soft_c log p_c = sum_c soft_c (max z - z_c) - mass log(max p)

    Without a second pass of exponentials; all terms have one sign, so none loses digits of another.
    """
    top = logits.amax(1, keepdim=True).to(largest.dtype)
    soft = soft.expand(logits.shape)
    pieces = zip(*(value.split(_rows(logits)) for value in (top, logits, soft)), strict=True)
    return torch.cat([(most - z).mul_(y).sum(1) for most, z, y in pieces]) - mass * largest.log()


def _rows(logits: Tensor) -> int:
    """Rows of which differences are formed at a time: on a CPU few enough for its cache."""
    return max(1, _PIECE * len(logits) // logits.numel()) if logits.device.type == "cpu" else len(logits)


def _all_classes(row: _Row, logits: Tensor, label: Tensor) -> Tensor:
    """-sum_c log p_c of every row, (N, *spatial), read off the mean of its logits and -log p of its first label."""
    own = logits.gather(1, label[:, None]).to(row.cost.dtype)
    own = own.masked_fill(own == -torch.inf, 0.0)  # -log p is infinite then, whatever is added
    # Differences first: the mean of logits far from 0 has lost its digits.
    pieces = zip(own.split(_rows(logits)), logits.split(_rows(logits)), strict=True)
    below = torch.cat([(first - piece).mean(1) for first, piece in pieces])
    # -log p is capped, so beyond 1e30 the sum could turn negative.
    return (below + row.cost[0]).clamp(min=0.0) * logits.shape[1]


def _formula(
    logits: Tensor, labels: Tensor, share: Tensor, soft: Tensor | None, floor: float, eta: float, asymmetric: bool
) -> Tensor:
    """The same loss from differentiable operations, for the compiler, learnt targets and second derivatives."""
    z = logits.to(wide(logits.dtype))
    z = z - z.detach().amax(1, keepdim=True)
    index = labels.movedim(0, 1)
    rest = z.scatter(1, index, torch.finfo(z.dtype).min).logsumexp(1)
    row = _row(rest, z.gather(1, index).movedim(1, 0), labels, eta, asymmetric)
    loss = _loss(row, share, eta)
    if soft is not None:
        loss = loss + _soft_cost(z, soft, loss.dtype)
    return loss.sub(z.log_softmax(1).sum(1), alpha=floor) if floor else loss


def _formula_with_ignored(
    logits: Tensor,
    labels: Tensor,
    share: Tensor,
    soft: Tensor | None,
    ignored: int | None,
    floor: float,
    eta: float,
    asymmetric: bool,
) -> Tensor:
    """The same of labels (N, K) that may be ignored."""
    if ignored is None:
        return _formula(logits, labels.T, share.T, soft, floor, eta, asymmetric)
    labels, share, counted, own = without_ignored(labels, share, ignored)
    loss = _formula(logits, labels.T, share.T, soft, floor, eta, asymmetric)
    if asymmetric:
        loss = torch.where(own, loss, _formula(logits, labels.T, share.T, soft, floor, 0.0, asymmetric))
    return torch.where(counted, loss, 0.0)


class _Split(NamedTuple):
    probs: Tensor  # (N, C, *spatial) exp(z) outside S and 0 inside, in a unit of its own per row
    amount: Tensor  # (N, *spatial) their sum
    row: _Row
    largest: Tensor | None = None  # (N, *spatial) the largest probability, where it was asked for and at hand


def _split(logits: Tensor, labels: Tensor, eta: float, asymmetric: bool, largest: bool) -> _Split:
    dtype = wide(logits.dtype)
    if logits.device.type == "cpu":
        # One softmax over everything does, unless something that is needed underflows; a CPU can look.
        probs = logits.softmax(1, dtype=dtype)
        most = probs.amax(1) if largest else None
        classes = probs.movedim(1, 0)
        own = classes.gather(0, labels)
        classes.scatter_(0, labels, 0.0)
        rest = probs.sum(1)
        if float(own.min()) > 1e-30 and float(rest.min()) > 1e-30:
            return _Split(probs, rest, _row_of_probs(rest, own, labels, eta, asymmetric), most)
        del probs, classes
    outside = logits.to(dtype, copy=True)
    # The lowest number stands for "not there": unlike -inf it leaves no NaN where nothing else is there.
    outside.movedim(1, 0).scatter_(0, labels, torch.finfo(dtype).min)
    top = outside.amax(1)
    probs = outside.softmax(1)
    own = logits.movedim(1, 0).gather(0, labels).to(dtype)
    highest = torch.maximum(top, own.amax(0))
    # The largest probability is exp(top - r), so one fused softmax gives the log-sum-exp as well.
    rest = (top - highest) - probs.amax(1).log()
    # From one end of a dtype to the other is infinitely far; capped, no sum over a batch overflows. -inf stays itself.
    own = torch.where(own == -torch.inf, own, (own - highest).clamp(min=-1e30))
    return _Split(probs, torch.ones_like(rest), _row(rest, own, labels, eta, asymmetric))


class _MixedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        share: Tensor,
        soft: Tensor | None,
        floor: float,
        eta: float,
        asymmetric: bool,
    ) -> Tensor:
        probs, amount, row, largest = _split(logits, labels, eta, asymmetric, soft is not None)
        loss = _loss(row, share, eta)
        mass = None if soft is None else soft.sum(1)
        if soft is not None and mass is not None:
            if largest is None:
                loss = loss + _soft_cost(logits, soft, loss.dtype)
            else:
                loss = loss + _soft_cost_of_probs(logits, soft, mass, largest)
        ctx.save_for_backward(logits, labels, share, soft, mass, probs, amount, *row.slopes)
        ctx.floor, ctx.eta, ctx.asymmetric = floor, eta, asymmetric
        return loss.add(_all_classes(row, logits, labels[0]), alpha=floor) if floor else loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, share, soft, mass, probs, amount, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative is wanted
            settings = ctx.floor, ctx.eta, ctx.asymmetric
            return graph_gradient(_formula, grad_loss, logits, labels, share, soft, *settings), *[None] * 6
        everywhere = ctx.floor * logits.shape[1] if mass is None else mass
        at_labels, outside = _gradient(_Slopes(*parts), share, everywhere, ctx.eta)
        at_labels = at_labels * grad_loss
        outside = (outside * grad_loss / amount)[:, None]
        if soft is not None or ctx.floor or logits.dtype == probs.dtype:
            grad = probs * outside
        else:
            # Rounded while it is written: half types need no wide copy of the gradient.
            grad = torch.mul(probs, outside, out=torch.empty_like(logits))
        grad.movedim(1, 0).scatter_(0, labels, at_labels.to(grad.dtype))
        if soft is not None:
            grad.addcmul_(grad_loss[:, None], soft, value=-1.0)
        if ctx.floor:
            grad.sub_((grad_loss * ctx.floor)[:, None])
        return grad.to(logits.dtype), *[None] * 6


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        share: Tensor,
        soft: Tensor | None,
        ignored: int | None,
        floor: float,
        eta: float,
        asymmetric: bool,
    ) -> tuple[Tensor, Tensor]:
        from hardmix.kernels.mixed_cross_entropy_gpu import forward

        with torch.cuda.device_of(logits):
            loss, kept = forward(logits, labels, share, soft, ignored, floor, eta, asymmetric)
        ctx.save_for_backward(logits, labels, share, soft, *kept)
        ctx.settings = ignored, floor, eta, asymmetric
        ctx.mark_non_differentiable(kept.counted)
        ctx.set_materialize_grads(False)  # or each backward pass would fill one for `counted`
        return loss, kept.counted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 8
        from hardmix.kernels.mixed_cross_entropy_gpu import Kept, backward

        logits, labels, share, soft, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative is wanted
            target = labels, share, soft, *ctx.settings
            return graph_gradient(_formula_with_ignored, grad_loss, logits, *target), *[None] * 7
        with torch.cuda.device_of(logits):
            grad = backward(grad_loss, logits, labels, soft, Kept(*kept), *ctx.settings[:2])
        return grad, *[None] * 7


def _gradient(slopes: _Slopes, share: Tensor, everywhere: Tensor | float, eta: float) -> tuple[Tensor, Tensor]:
    """d loss / d z of the labels (K, N, *spatial), and the factor (N, *spatial) of the softmax outside S.

    Duplicates all hold the gradient of their class, so it does not matter which of them is written last. What is not
    the labels' own, the soft target or a floor, is left to the caller; here its mass counts, `everywhere`.
    """
    total = share.sum(0)
    elsewhere = _elsewhere(share, slopes.differs)
    if isinstance(everywhere, Tensor) or everywhere:
        total, elsewhere = total + everywhere, elsewhere + everywhere
    at_labels = elsewhere - total * slopes.missing  # total p - mass of the class, with every digit of 1 - p
    outside = total * slopes.outside
    if slopes.pull is not None:
        at_labels = at_labels.sub(slopes.pull, alpha=eta)
        outside = outside.add(_distinct(slopes.pull, slopes.first).sum(0), alpha=eta)
    return at_labels, outside
