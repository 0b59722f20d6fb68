"""A multilayer perceptron for tables."""

from __future__ import annotations

import itertools

from torch import nn

from hardmix import _check


class MLP(nn.Sequential):
    """`depth` linear layers with ReLU.

    Args:
        inputs: P, numbers a row.
        width: D, size of every layer.
        depth: number of layers.
    Shapes: rows (N, P) -> features (N, D).
    """

    def __init__(self, *, inputs: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        for name, value in (("inputs", inputs), ("width", width), ("depth", depth)):
            _check.integer("mlp", name, value, 1)
        for before, after in itertools.pairwise([inputs] + [width] * depth):
            self.append(nn.Linear(before, after))
            self.append(nn.ReLU())
        self.features = width
