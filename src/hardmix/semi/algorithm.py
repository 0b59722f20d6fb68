"""What semi-supervised algorithms share: the batch that they take, what they give, and forwards of several parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from hardmix import _check

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
    """

    x: Tensor
    y: Tensor
    views: tuple[Tensor, ...] = ()
    ids: Tensor | None = None


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
        check_batch(type(self).__name__, batch, self.views)
        return self.step(model, batch, generator)

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        """The algorithm itself, on a checked batch."""
        raise NotImplementedError


def check_batch(who: str, batch: object, views: Sequence[str]) -> None:
    """A SemiBatch whose parts fit together."""
    if not isinstance(batch, SemiBatch):
        raise TypeError(f"{who}: batch is a {type(batch).__name__}; pass a SemiBatch.")
    x = _check.tensor(who, "batch.x", batch.x)
    y = _check.tensor(who, "batch.y", batch.y)
    if y.ndim != 1 or y.is_floating_point():
        raise TypeError(f"{who}: batch.y has shape {tuple(y.shape)} and dtype {y.dtype}; pass (B,) class ids.")
    _check.same_length(who, "batch.y", y, "batch.x", x.shape[0])
    if len(batch.views) != len(views):
        wanted = ", ".join(views) or "none"
        raise ValueError(f"{who}: batch.views holds {len(batch.views)} views; pass {len(views)}: {wanted}.")
    for name, view in zip(views, batch.views, strict=True):
        _check.tensor(who, f"batch.views ({name})", view)
        if view.shape[1:] != x.shape[1:] or view.shape[0] != batch.views[0].shape[0]:
            raise ValueError(
                f"{who}: the {name} view has shape {tuple(view.shape)}, the labelled samples {tuple(x.shape)} and the "
                f"first view {tuple(batch.views[0].shape)}; pass views of the same samples, shaped like the labelled."
            )


def no_unlabelled(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`pseudo` and `weight` of a step without unlabelled samples."""
    return logits.new_zeros(0, dtype=torch.long), logits.new_zeros(0, dtype=torch.float32)


def together(model: Forward, parts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of several batches from one forward: batch norm sees them as one batch, as FixMatch's release does."""
    return list(model(torch.cat(list(parts))).split([len(part) for part in parts]))


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
    outputs = [model(mixed[0])]
    with frozen_statistics(model):
        outputs += [model(batch) for batch in mixed[1:]]
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
