"""Reading a target: the forms that the classification objectives accept, checked and brought to one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check, _math
from hardmix.kernels.mixed_cross_entropy import mixed_cross_entropy, takes_ignored, two_largest, without_ignored
from hardmix.mixing.target import MixedTarget, spread

REDUCTIONS = ("mean", "sum", "none")
FORMS = "a MixedTarget, integer labels, or dense soft labels"


class ClassTarget(NamedTuple):
    """A target of class ids.

    Attributes:
        labels: (N, K, *spatial) ids in range; labels that do not count are replaced by one that does.
        weights: (N, K, *spatial) shares in the loss's dtype; 0 where the label does not count.
        dense: (N, C, *spatial) shares of all classes, which then stand for `weights`; or None.
        counted: (N, *spatial) rows that the mean is over; None: all.
        own: (N, *spatial) rows whose first label counts; None: all, or the others are one label anyway.
        ignored: the label that does not count and is still among `labels`; None: it is not.
    """

    labels: Tensor
    weights: Tensor
    dense: Tensor | None = None
    counted: Tensor | None = None
    own: Tensor | None = None
    ignored: int | None = None


def check_options(
    who: str,
    *,
    eta: float = 0.0,
    asymmetric: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> None:
    """The settings of an objective, wherever they are given: to the module or to the function."""
    _check.non_negative(who, "eta", eta)
    _check.boolean(who, "asymmetric", asymmetric)
    if weight is not None:
        _check.tensor(who, "weight", weight)
        if weight.ndim != 1 or not weight.is_floating_point():
            raise ValueError(
                f"{who}: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; pass (C,) floats."
            )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{who}: ignore_index is {_check.shown(ignore_index)}; pass an integer.")
    _check.between(who, "label_smoothing", label_smoothing, 0.0, 1.0)
    _check.choice(who, "reduction", reduction, REDUCTIONS)


def check_logits(who: str, logits: object, weight: Tensor | None, min_classes: int) -> Tensor:
    """(N, C, *spatial) float logits, and class weights that fit them."""
    z = _check.batch(who, "logits", logits)
    if not z.is_floating_point():
        raise TypeError(f"{who}: logits has dtype {z.dtype}; pass floating-point logits.")
    if z.shape[1] < min_classes:
        raise ValueError(f"{who}: logits has {z.shape[1]} class; pass logits of at least {min_classes} classes.")
    if weight is not None:
        _check.same_device(who, "weight", weight, "logits", z.device)
        if weight.shape[0] != z.shape[1]:
            raise ValueError(
                f"{who}: weight has {weight.shape[0]} entries but logits has {z.shape[1]} classes; pass one per class."
            )
    return z


def class_target(
    who: str, logits: Tensor, target: object, ignore_index: int, num_mixed: int = 2, leave: bool = False
) -> ClassTarget:
    """Any accepted target as class ids. Of dense soft labels the `num_mixed` largest classes are the mixed ones.

    `leave`: ignored labels may stay where the objective finds them itself.
    """
    dtype = _math.wide(logits.dtype)
    if not isinstance(target, MixedTarget):
        y = _target_tensor(who, logits, target)
        if not y.is_floating_point():
            return _ids(who, logits, y[:, None], torch.ones_like(y[:, None], dtype=dtype), ignore_index, leave)
        dense = y.to(dtype)
        if num_mixed == 0:
            none = torch.zeros_like(dense[:, :1])
            return ClassTarget(none.long(), none, dense)
        found = two_largest(logits, dense) if num_mixed == 2 else None
        if found is not None:
            return ClassTarget(found, torch.zeros_like(found, dtype=dtype), dense)
        rows = dense.movedim(1, -1).reshape(-1, logits.shape[1])
        labels = MixedTarget.from_dense(rows.detach(), num_mixed).labels  # (N * pixels, K)
        labels = labels.view(logits.shape[0], *logits.shape[2:], num_mixed).movedim(-1, 1)
        return ClassTarget(labels, torch.zeros_like(labels, dtype=dtype), dense)
    labels, weights = mixed_parts(who, logits, target)
    if labels.ndim == logits.ndim + 1:
        dense = (labels * weights[..., None]).sum(1)
        most, labels = labels.max(2)
        # A row of zeros shows no class; it repeats one that is there.
        instead = labels.gather(1, (most > 0).byte().argmax(1, keepdim=True))
        labels = torch.where(most > 0, labels, instead)
        return ClassTarget(labels, torch.zeros_like(labels, dtype=dtype), dense)
    return _ids(who, logits, labels, weights, ignore_index, leave)


def mixed_parts(who: str, logits: Tensor, target: MixedTarget) -> tuple[Tensor, Tensor]:
    """Labels and weights of a MixedTarget, shapes checked and weights broadcast, both ready for arithmetic:

    ids (N, K, *spatial) long, or rows (N, K, C) in the loss's dtype; weights of the same shape without C.
    """
    labels = _check.tensor(who, "target.labels", target.labels)
    weights = _check.tensor(who, "target.weights", target.weights)
    dtype = _math.wide(logits.dtype)
    for name, value in (("target.labels", labels), ("target.weights", weights)):
        _check.same_length(who, name, value, "logits", logits.shape[0])
        _check.same_device(who, name, value, "logits", logits.device)
    rows = logits.ndim == 2 and labels.ndim == 3 and not labels.is_complex()
    if rows and labels.shape[2] != logits.shape[1]:
        raise ValueError(
            f"{who}: target.labels has shape {tuple(labels.shape)}, rows of {labels.shape[2]} columns, but logits has "
            f"{logits.shape[1]} classes; pass rows (N, K, {logits.shape[1]}), or class ids (N, K)."
        )
    if not rows:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{who}: target.labels has dtype {labels.dtype}; pass integer class ids (N, K).")
        if labels.ndim != logits.ndim or labels.shape[2:] != logits.shape[2:]:
            space = f", {', '.join(map(str, logits.shape[2:]))}" if logits.ndim > 2 else ""
            raise ValueError(
                f"{who}: target.labels has shape {tuple(labels.shape)} but logits has {tuple(logits.shape)}; "
                f"pass class ids ({logits.shape[0]}, K{space})."
            )
    if labels.shape[1] == 0:
        raise ValueError(f"{who}: target.labels has shape {tuple(labels.shape)}; pass at least one label per row.")
    shape = labels.shape[:2] if rows else labels.shape
    shares = spread(weights, len(shape)) if weights.ndim == 2 < len(shape) else weights
    fits = shares.ndim == len(shape) and shares.shape[:2] == shape[:2]
    if not fits or any(a not in (1, b) for a, b in zip(shares.shape, shape, strict=True)):
        raise ValueError(
            f"{who}: target.weights has shape {tuple(weights.shape)} but target.labels has {tuple(labels.shape)}; "
            "pass one weight per label."
        )
    if not weights.is_floating_point():
        raise TypeError(f"{who}: target.weights has dtype {weights.dtype}; pass floating-point shares.")
    shares = shares.to(dtype)
    return (labels.to(dtype) if rows else labels.long()), shares if shares.shape == shape else shares.expand(shape)


def plain_target(who: str, logits: Tensor, target: object) -> Tensor:
    """Integer labels (N, *spatial) as long, or dense soft labels like `logits` in the loss's dtype."""
    y = _target_tensor(who, logits, target)
    return y.to(_math.wide(logits.dtype)) if y.is_floating_point() else y


def class_objective(
    who: str,
    logits: Tensor,
    target: MixedTarget | Tensor,
    *,
    eta: float,
    asymmetric: bool,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Mixed cross entropy with or without (eta = 0) the decoupled regulariser: what both objectives are."""
    check_options(
        who,
        eta=eta,
        asymmetric=asymmetric,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    logits = check_logits(who, logits, weight, min_classes=2)
    if asymmetric and isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(
            f"{who}: asymmetric is True but dense soft labels do not say which class is the labelled one; "
            "pass a MixedTarget with it first."
        )
    # Shares are what tells that a label is there, so they have to come as they are.
    leave = weight is None and label_smoothing < 1.0
    num_mixed = 2 if eta > 0 else 0
    labels, share, soft, counted, own, ignored = class_target(who, logits, target, ignore_index, num_mixed, leave)
    column = (1, logits.shape[1], *[1] * (logits.ndim - 2))
    floor = label_smoothing / logits.shape[1]
    if label_smoothing > 0:
        share = share * (1.0 - label_smoothing)
        if soft is not None or weight is not None:
            soft = share.new_full(column, floor) if soft is None else soft * (1.0 - label_smoothing) + floor
            floor = 0.0
    if weight is not None:
        weight = weight.to(share.dtype)
        share = share * weight[labels]
        soft = None if soft is None else soft * weight.view(column)
    loss, found = mixed_cross_entropy(
        logits, labels, share, soft, ignored=ignored, floor=floor, eta=eta, asymmetric=asymmetric
    )
    if found is not None:
        return _math.reduce(loss, reduction, found)
    if asymmetric and eta > 0 and own is not None:
        # What stands in for an ignored label would be regularised in its place.
        loss = torch.where(own, loss, mixed_cross_entropy(logits, labels, share, soft, floor=floor)[0])
    if counted is not None:
        loss = torch.where(counted, loss, 0.0)
    return _math.reduce(loss, reduction, counted)


def _ids(who: str, logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int, leave: bool) -> ClassTarget:
    """Class ids with the ignored ones taken out, or left in."""
    if leave and takes_ignored(logits, weights):
        return ClassTarget(labels, weights, ignored=ignore_index)
    all_classes = _check.classes_in_range(who, "target", labels, logits.shape[1], ignore_index)
    if logits.ndim == 2 and all_classes and not 0 <= ignore_index < logits.shape[1]:
        return ClassTarget(labels, weights)  # nothing is ignored, and nothing more to do
    labels, weights, counted, own = without_ignored(labels, weights, ignore_index)
    return ClassTarget(labels, weights, None, counted, own if labels.shape[1] > 2 else None)


def _target_tensor(who: str, logits: Tensor, target: object) -> Tensor:
    """A tensor target of the right kind, shape and device; integers come back as long."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{who}: target is a {type(target).__name__}; pass {FORMS}.")
    _check.same_length(who, "target", target, "logits", logits.shape[0])
    _check.same_device(who, "target", target, "logits", logits.device)
    if target.is_floating_point():
        if target.ndim == logits.ndim - 1:
            raise TypeError(f"{who}: target holds floats (regression labels); pass class ids or (N, C) soft labels.")
        if target.shape != logits.shape:
            raise ValueError(
                f"{who}: target has shape {tuple(target.shape)} but logits has {tuple(logits.shape)}; "
                "pass soft labels of the same shape."
            )
        return target
    if target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{who}: target has dtype {target.dtype}; pass integer class ids or float soft labels.")
    if target.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"{who}: target has shape {tuple(target.shape)} and dtype {target.dtype}; "
            f"pass class ids {(logits.shape[0], *logits.shape[2:])}, or soft labels as floats."
        )
    return target.long()
