"""MixedTarget: which labels a mixed sample has, and how much of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check


class MixedTarget(NamedTuple):
    """K mixed labels of each sample and their shares.

    Attributes:
        labels: (N, K) class ids, or (N, K) floats for regression, or (N, K, C) one-hot, multi-hot or soft rows, or
            (N, K, *spatial) class ids for dense masks. For a pair K = 2: own label first, partner's second.
        weights: (N, K) shares that sum to one over K. For dense masks (N, K, *spatial) or broadcastable to it.

    It is a NamedTuple, so collate functions, pinning, `.to` helpers and `torch.compile` see a plain pytree.
    """

    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedTarget:
        """The same target on another device."""
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
                raise ValueError(f"{who}: num_classes is {num_classes} but the labels have {mixed.shape[1]} columns.")
        elif self.labels.is_floating_point():
            raise ValueError(f"{who}: the labels are floats (regression); use .mean() for the blended number.")
        elif num_classes is None:
            raise ValueError(f"{who}: num_classes is missing; pass the number of classes C.")
        else:
            num_classes = _check.integer(who, "num_classes", num_classes, 1)
            _check.classes_in_range(who, "labels", self.labels, num_classes)
            shape = (self.labels.shape[0], num_classes, *self.labels.shape[2:])
            weights = self.weights.expand(self.labels.shape)
            mixed = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
            mixed = mixed.scatter_add(1, self.labels.long(), weights)
        return mixed if smoothing == 0.0 else mixed * (1.0 - smoothing) + smoothing / mixed.shape[1]

    def mean(self) -> Tensor:
        """The blended value sum_k w_k label_k of float labels: (N,), or (N, C) for rows."""
        weights = self.weights if self.labels.ndim == self.weights.ndim else self.weights[..., None]
        return (self.labels.to(weights.dtype) * weights).sum(1)

    def mixed_loss(self, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """Mix the losses instead of the labels, so that any criterion works: sum_k w_k criterion(labels[:, k]).

        Args:
            criterion: maps one label of each sample, labels[:, k], to unreduced losses (N,), for example
                `lambda y: F.cross_entropy(logits, y, reduction="none")`.

        Returns:
            (N,) losses, or (N, *spatial) for dense masks.

        Raises:
            ValueError: a criterion that reduces over the batch, whose weighted sum would be another quantity.
        """
        rows, losses = self.labels.shape[0], []
        for labels, weights in zip(self.labels.unbind(1), self.weights.unbind(1), strict=True):
            loss = criterion(labels)
            if loss.ndim < 1 or loss.shape[0] != rows:
                raise ValueError(
                    f"MixedTarget.mixed_loss: criterion returned shape {tuple(loss.shape)} for {rows} samples; "
                    "pass reduction='none'."
                )
            losses.append(loss * weights)
        return torch.stack(losses).sum(0)

    @classmethod
    def from_dense(cls, dense: Tensor, num_labels: int = 2) -> MixedTarget:
        """Recover the mixed classes from dense soft labels (N, C), label smoothing included.

        Smoothing lifts every class by the same floor, so the floor (the smallest entry of a row) is taken off before
        the `num_labels` largest entries are read; their shares are rescaled to sum to one. A row with one class comes
        back as that class repeated with weights (1, 0, ...). With C <= `num_labels` no class is left to show the
        floor: it is taken as 0. A row that mixes more than `num_labels` classes keeps its largest ones.
        """
        who = "MixedTarget.from_dense"
        dense = _check.batch(who, "dense", dense, 2, 2)
        if not dense.is_floating_point():
            dense = dense.to(torch.float32)
        num_classes = dense.shape[1]
        num_labels = _check.integer(who, "num_labels", num_labels, 1)
        floor = dense.amin(1, keepdim=True) if num_classes > num_labels else torch.zeros_like(dense[:, :1])
        top = min(num_labels, num_classes)
        weights, labels = dense.topk(top, dim=1)
        weights = weights - floor
        if top < num_labels:
            weights = torch.nn.functional.pad(weights, (0, num_labels - top))
            labels = torch.cat([labels, labels[:, :1].expand(-1, num_labels - top)], 1)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        # What is left of the floor after rounding is not a second class.
        present = weights > 4 * torch.finfo(dense.dtype).eps
        labels = torch.where(present, labels, labels[:, :1])
        return cls(labels, torch.where(present, weights, torch.zeros_like(weights)))
