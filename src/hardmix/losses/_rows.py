"""Embeddings with labels as the contrastive objectives take them: rows of length 1, one label a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import reduce, wide


class LabelledRows(NamedTuple):
    """z (M, D) rows in float32 or wider, view after view, M = views x N; labels (M,) float64 on the CPU; the shape that
    a value per anchor has, (N,) or (N, views)."""

    z: Tensor
    labels: Tensor
    shape: tuple[int, ...]


def labelled_rows(
    who: str, embeddings: Tensor, labels: Tensor, *, name: str = "embeddings", views: bool = True
) -> LabelledRows:
    """Check embeddings (N, D) or (N, views, D) and labels (N,), and lay them out as rows.

    The labels are read on the host: which rows belong together decides what is computed.
    """
    x = _check.batch(who, name, embeddings, 2, 3 if views else 2)
    if not x.is_floating_point():
        raise TypeError(f"{who}: {name} has dtype {x.dtype}; pass floating-point values.")
    y = _check.tensor(who, "labels", labels)
    _check.same_length(who, "labels", y, name, x.shape[0])
    _check.same_device(who, "labels", y, name, x.device)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"{who}: labels has shape {tuple(y.shape)} and dtype {y.dtype}; pass one number per sample, shape (N,)."
        )
    y = y.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(y).all()):
        bad = (~torch.isfinite(y)).nonzero().flatten().tolist()
        raise ValueError(
            f"{who}: labels holds NaN or infinity at {', '.join(map(str, bad[:5]))}; leave out these samples."
        )
    shape = tuple(x.shape[:-1])
    times = x.shape[1] if x.ndim == 3 else 1
    z = x.movedim(-2, 0).flatten(0, 1) if x.ndim == 3 else x
    return LabelledRows(z.to(wide(x.dtype)), y.repeat(times), shape)


def tied(labels: Tensor, tolerance: float) -> Tensor:
    """Labels rounded to multiples of a tolerance, so that continuous ones can be equal; 0 leaves them as they are.

    Being within a tolerance would be no relation to group by: a near b and b near c says nothing of a and c.
    """
    return (labels / tolerance).round() * tolerance if tolerance else labels


def reduce_anchors(per_row: Tensor, valid: Tensor, shape: tuple[int, ...], reduction: str) -> Tensor:
    """Rows' losses (M,), view after view, as a mean over the valid ones, a sum, or in the shape of the embeddings."""
    if reduction == "none":
        return per_row if len(shape) == 1 else per_row.view(shape[1], shape[0]).T
    return reduce(per_row, reduction, valid)
