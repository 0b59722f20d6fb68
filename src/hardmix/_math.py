"""Small numerical helpers that more than one objective needs."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are done in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce(values: Tensor, reduction: str, valid: Tensor | None = None) -> Tensor:
    """Mean, sum or none over the rows that count.

    `valid` marks the rows that count; the others are 0 already. The mean divides by their number, never by looking at
    the values, so a NaN stays a NaN. No valid row gives 0 that is still joined to the graph.
    """
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    count = values.numel() if valid is None else valid.sum().clamp(min=1)
    return total / count
