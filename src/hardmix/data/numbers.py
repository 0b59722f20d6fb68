"""Samples with a number each, whatever they are: what the regression task trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check

#: rows of a table, series (N, C, L), images (N, C, H, W), volumes (N, C, D, H, W), texts or pairs of texts
KINDS = ("rows", "series", "images", "volumes", "texts")
#: what `Numbers.split` says of a sample
TRAIN, VALIDATION, TEST = 0, 1, 2

Texts = Sequence[tuple[str, ...]]


class Numbers(NamedTuple):
    """N samples, in memory, and the number that belongs to each.

    Attributes:
        inputs: sample first. rows: (N, P) float64 in the units of the file; series: (N, C, L) float32; images:
            (N, C, H, W) uint8; volumes: (N, C, D, H, W) uint8 or float32; texts: N tuples of one text, or of the two of
            a pair.
        labels: (N,) float64, finite, not all the same.
        kind: one of `KINDS`.
        target: what the labels are called.
        name: the data set.
        license: of the samples.
        source: the path of the file or folder, or the package that holds it.
        ids: what messages call the samples; empty for "row 17".
        split: (N,) uint8 with TRAIN, VALIDATION or TEST, where the data set says so itself; None to draw the splits.
        feature_names: of rows; empty for the other kinds.
        groups: N names of what samples belong to, such as a patient, which no two splits share; empty where not said.
    """

    inputs: Tensor | Texts
    labels: Tensor
    kind: str
    target: str
    name: str
    license: str
    source: str
    ids: Sequence[str] = ()
    split: Tensor | None = None
    feature_names: tuple[str, ...] = ()
    groups: Sequence[str] = ()

    def sample_id(self, i: int) -> str:
        """What messages and reports call sample `i`."""
        return self.ids[i] if self.ids else f"row {i}"


def as_floats(x: Tensor) -> Tensor:
    """uint8 values as floats in 0..1; tokens and floats as they are."""
    return x.to(torch.float32).div_(255.0) if x.dtype == torch.uint8 else x


class ChannelScale(nn.Module):
    """Each channel with mean 0 and standard deviation 1 over the samples and positions that it was fitted on.

        z_c = (x_c - mean_c) / std_c

    Args:
        mean, std: (C,), in the unit of `x`; a std of 0 counts as 1.
    Shapes: floats (N, C, *positions), any number of positions -> float32 of the same shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float(), persistent=False)
        self.register_buffer("std", torch.where(std > 0, std, 1.0).float(), persistent=False)

    @classmethod
    def fit(cls, x: Tensor, rows: Tensor) -> ChannelScale:
        """Mean and standard deviation of these rows of `as_floats(x)` (N, C, *positions), summed in float64."""
        x = _check.batch("ChannelScale.fit", "x", x, 3, 6)
        channels = x.shape[1]
        total, square, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
        low, high = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
        for piece in rows.split(256):
            values = as_floats(x[piece]).double().transpose(0, 1).flatten(1)
            total += values.sum(1)
            square += values.square().sum(1)
            count += values.shape[1]
            low, high = torch.minimum(low, values.amin(1)), torch.maximum(high, values.amax(1))
        mean = total / count
        std = (square / count - mean.square()).clamp(min=0.0).sqrt()
        # Asked of the values: rounded sums leave a constant channel a tiny std, and another value would become huge.
        return cls(mean, torch.where(low == high, 0.0, std))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x.float() - self.mean.view(shape)) / self.std.view(shape)
