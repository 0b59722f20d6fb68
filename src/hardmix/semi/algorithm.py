"""What semi-supervised algorithms share: the batch that they take, what they give, and forwards of several parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import readable, wide
from hardmix.mixing.draw import cpu_generator

#: views of an unlabelled sample that an algorithm may ask for
VIEWS = ("weak", "strong")
Forward = Callable[[Tensor], Tensor]


class SemiBatch(NamedTuple):
    """One step's samples.

    Attributes:
        x: (B, ...) labelled samples, weakly augmented, as the model takes them.
        y: (B,) their classes.
        views: one (U, ...) tensor for each of the algorithm's `views`; () where it takes no unlabelled samples.
        ids: (U,) the unlabelled samples' numbers in their set, for what is remembered of each.
        twin: (B, ...) another view of the labelled samples, for algorithms that compare two (`twins`); None: none.
    """

    x: Tensor
    y: Tensor
    views: tuple[Tensor, ...] = ()
    ids: Tensor | None = None
    twin: Tensor | None = None


class SemiOutput(NamedTuple):
    """What one step gives.

    Attributes:
        loss: scalar to go back from.
        parts: scalars that it was made of, without gradient: "labelled", "unlabelled", "pair" and others.
        pseudo: (U,) pseudo-classes of the unlabelled samples; empty where there are none.
        weight: (U,) how much each counted, from 0 to 1.
        logits: (B, C) of the labelled samples, without gradient.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    pseudo: Tensor
    weight: Tensor
    logits: Tensor


class SemiAlgorithm(nn.Module):
    """A way to learn from a few labelled and many unlabelled samples: `algorithm(model, batch) -> SemiOutput`.

    A plain loop:

        for x, y, weak, strong, ids in loader:
            algorithm.set_progress(step / steps)
            output = algorithm(model, SemiBatch(x, y, (weak, strong), ids))
            output.loss.backward()
            optimizer.step()
            algorithm.after_step(model)

    `optimizer` also holds `algorithm.parameters()`, if there are any. What is remembered between steps (thresholds,
    queues, averages) is in registered buffers, so `state_dict` holds it and `.to(device)` moves it.
    """

    #: which views of each unlabelled sample it takes, in this order
    views: tuple[str, ...] = VIEWS
    #: whether these are for `pairs` alone, so that an instance without them takes no unlabelled samples
    only_for_pairs = False
    #: whether it has a use for a second view of the labelled samples, `SemiBatch.twin`
    twins = False

    def __init__(self) -> None:
        super().__init__()
        self.progress = 0.0

    def set_progress(self, fraction: float) -> None:
        """Tell how much of the training is done, from 0 to 1, before a step."""
        self.progress = _check.between(type(self).__name__, "fraction", fraction, 0.0, 1.0)

    def after_step(self, model: nn.Module) -> None:
        """Called after each step of the optimizer; algorithms that keep an average of the weights follow here."""

    def forward(self, model: Forward, batch: SemiBatch, *, generator: Generator | None = None) -> SemiOutput:
        """Loss and what to log of one batch.

        Args:
            model: (N, ...) -> (N, C) logits.
            batch: labelled samples and the views of the unlabelled ones.
            generator: CPU generator of all that is drawn; None takes torch's global one.
        """
        who = type(self).__name__
        check_batch(who, batch, self.views)
        cpu_generator(who, generator)
        return self.step(model, batch._replace(y=batch.y.long()), generator)

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        """The algorithm itself, on a checked batch."""
        raise NotImplementedError


def check_batch(who: str, batch: object, views: Sequence[str]) -> None:
    """A SemiBatch whose parts fit together."""
    if not isinstance(batch, SemiBatch):
        raise TypeError(f"{who}: batch is a {type(batch).__name__}; pass a SemiBatch.")
    x = _check.tensor(who, "batch.x", batch.x)
    y = _check.tensor(who, "batch.y", batch.y)
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"{who}: batch.y has shape {tuple(y.shape)} and dtype {y.dtype}; pass (B,) class ids.")
    if x.ndim == 0:
        raise ValueError(f"{who}: batch.x is a number; pass (B, ...) labelled samples.")
    if x.numel() == 0:
        raise ValueError(f"{who}: batch.x has shape {tuple(x.shape)} and is empty; pass at least one labelled sample.")
    _check.same_length(who, "batch.y", y, "batch.x", x.shape[0])
    if batch.twin is not None and _check.tensor(who, "batch.twin", batch.twin).shape != x.shape:
        raise ValueError(
            f"{who}: batch.twin has shape {tuple(batch.twin.shape)}, the labelled samples {tuple(x.shape)}; "
            "pass another view of the same samples."
        )
    if not isinstance(batch.views, (tuple, list)):
        raise TypeError(f"{who}: batch.views is a {type(batch.views).__name__}; pass a tuple of tensors, or ().")
    if len(batch.views) != len(views):
        wanted = ", ".join(views) or "none"
        raise ValueError(f"{who}: batch.views holds {len(batch.views)} views; pass {len(views)}: {wanted}.")
    for name, view in zip(views, batch.views, strict=True):
        _check.tensor(who, f"batch.views ({name})", view)
        if view.ndim == 0 or view.shape[1:] != x.shape[1:] or view.shape[0] != batch.views[0].shape[0]:
            raise ValueError(
                f"{who}: the {name} view has shape {tuple(view.shape)}, the labelled samples {tuple(x.shape)} and the "
                f"first view {tuple(batch.views[0].shape)}; pass views of the same samples, shaped like the labelled."
            )
        if view.shape[0] == 0:
            raise ValueError(f"{who}: the {name} view is empty; pass at least one unlabelled sample.")


def no_unlabelled(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`pseudo` and `weight` of a step without unlabelled samples."""
    return logits.new_zeros(0, dtype=torch.long), logits.new_zeros(0, dtype=torch.float32)


def check_ids(who: str, batch: SemiBatch, count: int) -> Tensor:
    """The unlabelled samples' numbers, each below `count`. Values are looked at on the CPU only."""
    if batch.ids is None:
        raise ValueError(f"{who}: batch.ids is missing; pass the (U,) numbers of the unlabelled samples in their set.")
    ids = _check.tensor(who, "batch.ids", batch.ids)
    if ids.shape != batch.views[0].shape[:1] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{who}: batch.ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; "
            f"pass ({len(batch.views[0])},) integers, one for each unlabelled sample."
        )
    if readable(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(
            f"{who}: batch.ids runs from {int(ids.min())} to {int(ids.max())}, but num_unlabelled is {count}; "
            "pass numbers from 0 to num_unlabelled - 1."
        )
    return ids.long()


def check_classes(who: str, probs: Tensor, num_classes: int) -> None:
    """(N, C) predictions with the number of classes that an algorithm was made for."""
    if probs.shape[1] != num_classes:
        raise ValueError(
            f"{who}: the model predicts {probs.shape[1]} classes, but this was made for {num_classes}; "
            "give both the same number of classes."
        )


def class_loss(who: str, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of the labelled samples; the classes are looked at on the CPU only."""
    _check.classes_in_range(who, "batch.y", y, logits.shape[1])
    return F.cross_entropy(logits, y, reduction=reduction)


def class_rows(who: str, y: Tensor, like: Tensor) -> Tensor:
    """(B, C) one-hot rows of the classes, with the columns and the dtype of `like`; looked at on the CPU only."""
    _check.classes_in_range(who, "batch.y", y, like.shape[1])
    return F.one_hot(y, like.shape[1]).to(like.dtype)


def check_multiple(who: str, batch: SemiBatch) -> None:
    """What interleaved batches need, asked before anything is computed or followed."""
    labelled, unlabelled = len(batch.x), len(batch.views[0])
    if unlabelled % labelled:
        raise ValueError(
            f"{who}: the batch has {unlabelled} unlabelled samples for {labelled} labelled ones; pass a multiple, for "
            "which loaders leave out what does not fill a batch (drop_last=True)."
        )


def logits_of(model: Forward, x: Tensor) -> Tensor:
    """(N, C) logits in float32 or wider, so that all that is computed from them is."""
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits_of: model gave {got} for {len(x)} samples; pass a model that gives (N, C) logits.")
    if len(logits) != len(x):
        raise ValueError(
            f"logits_of: model gave {len(logits)} rows for {len(x)} samples; pass a model that gives a row for each."
        )
    return logits.to(wide(logits.dtype))


def together(model: Forward, parts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of several batches from one forward: batch norm sees them as one batch, as FixMatch's release does."""
    return list(logits_of(model, torch.cat(list(parts))).split([len(part) for part in parts]))


def interleaved(model: nn.Module | Forward, parts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of several batches of one size, from forwards that each hold a bit of every batch.

    Batch norm then sees mixtures of all parts; its running statistics follow the first forward alone, as in MixMatch's
    release. With parts of other sizes than the first, all are cut into pieces of its size first.
    """
    size = len(parts[0])
    pieces = [piece for part in parts for piece in part.split(size)]
    if any(len(piece) != size for piece in pieces):
        raise ValueError(
            f"interleaved: parts have {[len(part) for part in parts]} rows; pass multiples of the first one's."
        )
    count = len(pieces)
    # Row r of group g goes to piece (g + r) mod count and back again: a swap that is its own inverse on the diagonal.
    stacked = torch.stack(pieces)  # (P, B, ...)
    row = torch.arange(size, device=stacked.device)
    piece = torch.arange(count, device=stacked.device)[:, None]
    source = (row - piece) % count  # an involution: source(source(p)) = p
    mixed = stacked[source, row]
    outputs = [logits_of(model, mixed[0])]
    with frozen_statistics(model):
        outputs += [logits_of(model, batch) for batch in mixed[1:]]
    logits = torch.stack(outputs)[source, row]
    counts = [len(part) // size for part in parts]
    return [group.flatten(0, 1) for group in logits.split(counts)]


class frozen_statistics:  # noqa: N801, used like a function
    """Batch norms keep their running statistics while they normalise by those of the batch."""

    def __init__(self, model: object) -> None:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.track_running_stats = False

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.track_running_stats = True
