"""The stages of a run: how many steps each has, where a step lies, and how fast it moves the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Stage:
    """`epochs` passes over `samples` samples; its learning rate warms up to `lr` and falls by itself."""

    epochs: int
    samples: int
    lr: float


class Place(NamedTuple):
    """Where a step lies: its stage, its epoch counted over all stages, and its number within the epoch."""

    stage: int
    epoch: int
    offset: int


class Schedule:
    """Stages one after another, in steps of one batch size; what does not fill a batch is left out of an epoch.

    Args:
        stages: at least one.
        batch_size: made smaller where a stage has fewer samples.
        warmup_epochs: of each stage.
        decay: of each stage's learning rate, see `lr_factor`.
    """

    def __init__(self, stages: list[Stage], batch_size: int, warmup_epochs: float, decay: str = "cosine") -> None:
        self.stages = stages
        self.batch_size = min(batch_size, *(stage.samples for stage in stages))
        self.warmup_epochs = warmup_epochs
        self.decay = decay
        self.steps_per_epoch = [stage.samples // self.batch_size for stage in stages]
        lengths = [stage.epochs * steps for stage, steps in zip(stages, self.steps_per_epoch, strict=True)]
        self.starts = [sum(lengths[:i]) for i in range(len(stages))]
        self.steps = sum(lengths)
        self.ends = {start + length for start, length in zip(self.starts, lengths, strict=True)}
        self.epochs = sum(stage.epochs for stage in stages)

    def place(self, step: int) -> Place:
        """Of a step from 0 to `steps` - 1."""
        stage = max(i for i, start in enumerate(self.starts) if step >= start)
        epoch, offset = divmod(step - self.starts[stage], self.steps_per_epoch[stage])
        return Place(stage, sum(s.epochs for s in self.stages[:stage]) + epoch, offset)

    def epochs_done(self, step: int) -> float:
        """After `step` steps; a whole number at the end of an epoch."""
        if step >= self.steps:
            return float(self.epochs)
        stage, epoch, offset = self.place(step)
        return epoch + offset / self.steps_per_epoch[stage]

    def lr(self, step: int) -> float:
        stage = self.place(step).stage
        steps = self.steps_per_epoch[stage]
        warmup = round(self.warmup_epochs * steps)
        length = self.stages[stage].epochs * steps
        return self.stages[stage].lr * lr_factor(step - self.starts[stage], length, warmup, self.decay)


def lr_factor(step: int, steps: int, warmup: int, decay: str = "cosine") -> float:
    """Linear warm-up over `warmup` steps, then down until `steps`.

    "cosine": (1 + cos(pi t)) / 2, to 0; "cosine-7/16": cos(7 pi t / 16), to 0.195 as FixMatch has it; t from 0 to 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if decay == "cosine-7/16":
        return math.cos(7.0 * math.pi * done / 16.0)
    return 0.5 * (1.0 + math.cos(math.pi * done))
