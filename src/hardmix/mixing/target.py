"""MixedTarget: which labels a mixed sample has, and how much of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check, _math

#: Labels up to this number are looked for one after another, in as many entries at a time as a cache holds.
_FEW, _PIECE = 4, 1 << 19


class MixedTarget(NamedTuple):
    """K mixed labels of each sample and their shares.

    Attributes:
        labels: (N, K) class ids, or (N, K) floats for regression, or (N, K, C) one-hot, multi-hot or soft rows, or
            (N, K, *spatial) class ids for dense masks. For a pair K = 2: own label first, partner's second.
        weights: (N, K) shares that sum to one over K. For dense masks (N, K, *spatial), broadcastable to it, or (N, K)
            (series as (N, K, 1): labels (N, K, L) with (N, K) weights are rows).

    It is a NamedTuple, so collate functions, pinning, `.to` helpers and `torch.compile` see a plain pytree. What
    rebuilds tuples from a generator of their parts, as the Trainer of transformers does, needs `_asdict()` or `dense()`
    instead. Indices and `len` are those of the tuple; a part of the rows, as for accumulated gradients, is

    >>> target = MixedTarget(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    >>> MixedTarget(*(part[:1] for part in target))
    MixedTarget(labels=tensor([[0, 1]]), weights=tensor([[0.7500, 0.2500]]))
    """

    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedTarget:
        """The same target on another device."""
        # Tensors take a dtype, or a tensor that has one, in this place: class ids would become floats.
        if isinstance(device, (torch.dtype, Tensor)):
            raise TypeError(
                f"MixedTarget.to: device is a {type(device).__name__}; pass a device, since labels and weights keep "
                "their dtypes."
            )
        _check.boolean("MixedTarget.to", "non_blocking", non_blocking)
        labels, weights = (value.to(device, non_blocking=non_blocking) for value in self)
        return MixedTarget(labels, weights)

    def dense(self, num_classes: int | None = None, smoothing: float = 0.0) -> Tensor:
        """The (N, C) soft labels that timm, torchvision and Keras use; (N, C, *spatial) for dense masks.

            y = (1 - smoothing) sum_k w_k onehot(label_k) + smoothing / C

        Args:
            num_classes: C; needed for class ids, taken from the labels where they are (N, K, C) rows.
            smoothing: label smoothing in [0, 1].

        Raises:
            ValueError: float (regression) labels, which have no dense form; a missing `num_classes`; a class out of
            range.
        """
        who = "MixedTarget.dense"
        smoothing = _check.between(who, "smoothing", smoothing, 0.0, 1.0)
        if self.labels.ndim == 3 and self.weights.ndim == 2:
            mixed = (self.labels.to(self.weights.dtype) * self.weights[..., None]).sum(1)
            if num_classes is not None and num_classes != mixed.shape[1]:
                raise ValueError(
                    f"{who}: num_classes is {num_classes} but the labels have {mixed.shape[1]} columns; "
                    f"pass {mixed.shape[1]} or leave it out."
                )
        elif self.labels.is_floating_point():
            raise ValueError(f"{who}: the labels are floats (regression); use .mean() for the blended number.")
        elif num_classes is None:
            raise ValueError(f"{who}: num_classes is missing; pass the number of classes C.")
        else:
            num_classes = _check.integer(who, "num_classes", num_classes, 1)
            _check.classes_in_range(who, "labels", self.labels, num_classes)
            shape = (self.labels.shape[0], num_classes, *self.labels.shape[2:])
            weights = spread(self.weights, self.labels.ndim).expand(self.labels.shape)
            mixed = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
            mixed = mixed.scatter_add(1, self.labels.long(), weights)
        return mixed if smoothing == 0.0 else mixed * (1.0 - smoothing) + smoothing / mixed.shape[1]

    def mean(self) -> Tensor:
        """The blended value sum_k w_k label_k of float labels: (N,), (N, C) for rows, or (N, *spatial)."""
        weights = spread(self.weights, self.labels.ndim)
        return (self.labels.to(weights.dtype) * weights).sum(1)

    def mixed_loss(self, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """Mix the losses instead of the labels, so that any criterion works: sum_k w_k criterion(labels[:, k]).

        Args:
            criterion: maps one label of each sample, labels[:, k], to unreduced losses (N,), for example
                `lambda y: F.cross_entropy(logits, y, reduction="none")`; for dense masks to (N, *spatial), or to (N,)
                where all pixels of a sample have one weight.

        Returns:
            (N,) losses, or (N, *spatial) for dense masks.

        Raises:
            TypeError: a criterion that can't be called or returns no tensor.
            ValueError: a criterion that reduces over the batch, whose weighted sum would be another quantity, or that
            returns losses of another shape.
        """
        if not callable(criterion):
            raise TypeError(
                f"MixedTarget.mixed_loss: criterion is a {type(criterion).__name__}; pass a function of labels."
            )
        rows, losses = self.labels.shape[0], []
        is_rows = self.labels.ndim == 3 and self.weights.ndim == 2 and self.labels.is_floating_point()
        shapes: list[tuple[int, ...]] = [] if any(n > 1 for n in self.weights.shape[2:]) else [(rows,)]
        if self.labels.ndim > 2 and not is_rows:
            shapes.append((rows, *self.labels.shape[2:]))
        for labels, weights in zip(self.labels.unbind(1), self.weights.unbind(1), strict=True):
            loss = criterion(labels)
            if not isinstance(loss, Tensor) or tuple(loss.shape) not in shapes:
                raise _not_a_loss(loss, rows, shapes)
            losses.append(loss * (weights.flatten() if loss.ndim == 1 else spread(weights, loss.ndim)))
        return torch.stack(losses).sum(0)

    @classmethod
    def from_dense(cls, dense: Tensor, num_labels: int = 2) -> MixedTarget:
        """Recover the mixed classes from dense soft labels (N, C), label smoothing included.

        Smoothing lifts every class by the same floor, so the floor (the smallest entry of a row) is taken off before
        the `num_labels` largest entries are read; their shares are rescaled to sum to one. A row with one class comes
        back as that class repeated with weights (1, 0, ...); so does a row that is flat or all zero. With C <=
        `num_labels` no class is left to show the floor: it is taken as 0. A row that mixes more than `num_labels`
        classes keeps its largest ones. Weights are float32 or wider.
        """
        who = "MixedTarget.from_dense"
        dense = _check.batch(who, "dense", dense, 2, 2)
        eps = torch.finfo(dense.dtype if dense.is_floating_point() else torch.float32).eps
        dense = dense.to(_math.wide(dense.dtype))
        num_classes = dense.shape[1]
        num_labels = _check.integer(who, "num_labels", num_labels, 1)
        floor = dense.amin(1, keepdim=True) if num_classes > num_labels else torch.zeros_like(dense[:, :1])
        top = min(num_labels, num_classes)
        labels = _largest(dense.detach(), top)
        weights = dense.gather(1, labels) - floor
        if top < num_labels:
            weights = torch.nn.functional.pad(weights, (0, num_labels - top))
            labels = torch.cat([labels, labels[:, :1].expand(-1, num_labels - top)], 1)
        # What is left of the floor after rounding is not a second class. A NaN stays one.
        rounding = 4 * (eps * floor.abs() + torch.finfo(weights.dtype).eps * weights.sum(1, keepdim=True))
        absent = weights <= rounding
        labels = torch.where(absent, labels[:, :1], labels)
        weights = weights.masked_fill(absent, 0.0)
        weights[:, 0].masked_fill_(absent.all(1), 1.0)
        return cls(labels, weights / weights.sum(1, keepdim=True))


def spread(weights: Tensor, ndim: int) -> Tensor:
    """Shares (N, K) or (N, K, ...) with axes of length 1 at the end, up to `ndim` of them."""
    return weights.view(*weights.shape, *[1] * (ndim - weights.ndim))


def _largest(rows: Tensor, count: int) -> Tensor:
    """(N, count) columns of the largest entries of each row (N, C), the largest first. NaN is larger than anything."""
    if count > _FEW or type(rows) is not Tensor or not _math.readable(rows):
        return rows.topk(count, 1).indices
    # On a CPU torch compares entry by entry; NumPy takes as long as it takes to read them.
    columns = rows.new_empty(len(rows), count, dtype=torch.long)
    step = max(1, _PIECE // rows.shape[1])
    left = torch.empty_like(rows[:step], memory_format=torch.contiguous_format)
    for piece, found in zip(rows.split(step), columns.split(step), strict=True):
        here = left[: len(piece)].copy_(piece)
        for place in found.split(1, dim=1):
            place[:, 0] = torch.from_numpy(here.numpy().argmax(1))
            here.scatter_(1, place, -torch.inf)
    return columns


def _not_a_loss(loss: object, rows: int, shapes: list[tuple[int, ...]]) -> Exception:
    who, wanted = "MixedTarget.mixed_loss", " or ".join(map(str, shapes))
    if not isinstance(loss, Tensor):
        return TypeError(f"{who}: criterion returned a {type(loss).__name__}; return a tensor of shape {wanted}.")
    do = f"return {wanted}" if loss.ndim and loss.shape[0] == rows else "pass reduction='none'"
    return ValueError(f"{who}: criterion returned shape {tuple(loss.shape)} for {rows} samples; {do}.")
