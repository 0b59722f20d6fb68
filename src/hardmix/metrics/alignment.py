"""How do image and text embeddings lie on the sphere: pair beside pair, spread out, or modality by modality?

Rows are divided by their length. But for `embedding_shift`, values are read (a device is waited for) and summed in
float64 on the CPU, since not every device has float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import unit, wide
from hardmix.losses._features import feature_rows
from hardmix.losses.clip import unit_pairs

#: rows whose distances from all others are formed at a time
CHUNK = 1024


def alignment(image_features: Tensor, text_features: Tensor, *, alpha: float = 2.0) -> float:
    """Mean distance within pairs; smaller is better aligned.

        mean_i ||a_i - b_i||^alpha

    Args:
        image_features, text_features: (N, D) floats of any length, row i of both is a pair.
        alpha: exponent, greater than 0.
    Returns:
        Python float from 0, where pairs coincide, to 2^alpha.
    Raises:
        TypeError, ValueError: not tensors, integers, sizes disagree, no rows, NaN or infinity.
    Reference: Wang and Isola 2020 (arXiv:2005.10242).

    >>> round(alignment(torch.eye(2), torch.ones(2, 2)), 4)   # 2 - 2 cos 45 degrees
    0.5858
    """
    who = "alignment"
    alpha = _check.positive(who, "alpha", alpha)
    a, b = _pairs(who, image_features, text_features)
    return torch.linalg.vector_norm(a - b, dim=1).pow(alpha).mean().item()


def relative_alignment(image_features: Tensor, text_features: Tensor) -> float:
    """By how much a text is nearer to its image than to the nearest other one; larger is better.

        mean_i [ min_{k != i} ||b_i - a_k||^2 - ||b_i - a_i||^2 ]  =  2 mean_i [ b_i . a_i - max_{k != i} b_i . a_k ]

    Args:
        image_features, text_features: (N, D) floats of any length, row i of both is a pair.
    Returns:
        Python float from -4 to 4; 0 where another image is as near as the text's own. NaN for N = 1, which has none.
    Raises:
        TypeError, ValueError: as for `alignment`.
    Reference: Oh et al. 2023 (arXiv:2203.03897): the measure of the released code with its sign changed, so that larger
    is better.

    >>> round(relative_alignment(torch.eye(2), torch.eye(2)), 4)
    2.0
    """
    return _relative(*_pairs("relative_alignment", image_features, text_features))


def uniformity(features: Tensor, *, t: float = 2.0) -> float:
    """Wang and Isola's uniformity loss: how evenly rows are spread on the sphere; smaller is more even.

        log mean_{i < j} exp(-t ||z_i - z_j||^2)

    Memory grows with N alone.

    Args:
        features: (N, D) floats of any length.
        t: greater than 0.
    Returns:
        Python float from -4 t to 0, where all rows are equal. Directions drawn evenly in many dimensions have -2 t and
        little more. NaN for N = 1, which has no pair.
    Raises:
        TypeError, ValueError: as for `alignment`.
    Reference: Wang and Isola 2020 (arXiv:2005.10242).

    >>> round(uniformity(torch.eye(3)), 4)   # all distances squared are 2
    -4.0
    """
    who = "uniformity"
    t = _check.positive(who, "t", t)
    return _uniformity(_rows(who, "features", features), t)


def modality_gap(image_features: Tensor, text_features: Tensor) -> float:
    """Distance between the centres of both modalities.

        || mean_i a_i - mean_j b_j ||

    Args:
        image_features: (N, D) floats of any length.
        text_features: (M, D), pairs or not.
    Returns:
        Python float from 0 to 2.
    Raises:
        TypeError, ValueError: as for `alignment`, except that numbers of rows may differ.
    Reference: Liang et al. 2022 (arXiv:2203.02053).

    >>> modality_gap(torch.tensor([[3.0, 4.0]]), torch.tensor([[-3.0, 4.0]]))
    1.2
    """
    who = "modality_gap"
    a = _rows(who, "image_features", image_features)
    b = _rows(who, "text_features", text_features, ("image_features", a))
    return torch.linalg.vector_norm(a.mean(0) - b.mean(0)).item()


def alignment_metrics(image_features: Tensor, text_features: Tensor) -> dict[str, float]:
    """What the experiments with m2-Mix report of embeddings, and the gap; larger is better but for the gap.

        alignment    `relative_alignment`
        uniformity   minus `uniformity` (t = 2) of images and texts together, 2 N rows
        gap          `modality_gap`

    Args:
        image_features, text_features: (N, D) floats of any length, row i of both is a pair.
    Returns:
        dict of the three, as Python floats; alignment is NaN for N = 1.
    Raises:
        TypeError, ValueError: as for `alignment`.
    Reference: Oh et al. 2023 (arXiv:2203.03897), whose released code counts the images twice instead of images and
    texts.

    >>> {k: round(v, 4) for k, v in alignment_metrics(torch.eye(3), torch.eye(3)).items()}
    {'alignment': 2.0, 'uniformity': 1.5387, 'gap': 0.0}
    """
    a, b = _pairs("alignment_metrics", image_features, text_features)
    gap = torch.linalg.vector_norm(a.mean(0) - b.mean(0)).item()
    return {"alignment": _relative(a, b), "uniformity": -_uniformity(torch.cat((a, b)), 2.0), "gap": gap}


def embedding_shift(
    image_features: Tensor, text_features: Tensor, amount: float, *, gap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Embedding shift: both modalities moved along the gap between them, and back on the sphere. Nothing is trained.

        a_i <- (a_i - s d) / ||a_i - s d||     b_j <- (b_j + s d) / ||b_j + s d||     d = mean_i a_i - mean_j b_j

    Args:
        image_features: (N, D) floats of any length.
        text_features: (M, D), pairs or not.
        amount: s; 1/2 moves either centre to the middle, up to what the last division does, a negative one widens the
            gap.
        gap: (D,) d from other data, of unit rows; None for that of these.
    Returns:
        Two tensors like the features, of rows of length 1, in float32 or wider and on their device. A row that is moved
        onto the origin stays there. Differentiable.
    Raises:
        TypeError, ValueError: not tensors, integers, widths or devices disagree, no rows; on the CPU also NaN or
            infinity.
    Reference: Liang et al. 2022 (arXiv:2203.02053). Their notebooks give the length of d apart: a shift by delta there
    is an amount of delta / (2 ||d||) here.

    >>> embedding_shift(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    (tensor([[0.7071, 0.7071]]), tensor([[0.7071, 0.7071]]))
    """
    who = "embedding_shift"
    amount = _check.number(who, "amount", amount)
    images = feature_rows(who, "image_features", image_features)
    texts = feature_rows(who, "text_features", text_features, ("image_features", images), rows=False)
    dtype = wide(torch.promote_types(images.dtype, texts.dtype))
    a, b = (unit(x.to(dtype)) for x in (images, texts))
    if gap is None:
        d = a.mean(0) - b.mean(0)
    else:
        d = _check.tensor(who, "gap", gap)
        if d.shape != a.shape[1:] or not d.is_floating_point():
            raise ValueError(
                f"{who}: gap has shape {tuple(d.shape)} and dtype {d.dtype}; pass ({a.shape[1]},) floating-point "
                "values."
            )
        d = d.to(a)
    return unit(a - amount * d), unit(b + amount * d)


def _relative(a: Tensor, b: Tensor) -> float:
    if len(a) == 1:
        return math.nan
    own = (a * b).sum(1)
    nearest = []
    for rows in _chunks(len(b)):
        cos = b[rows] @ a.T
        cos.diagonal(rows.start).fill_(-math.inf)
        nearest.append(cos.amax(1))
    return 2.0 * (own - torch.cat(nearest)).mean().item()


def _uniformity(z: Tensor, t: float) -> float:
    if len(z) == 1:
        return math.nan
    square = z.square().sum(1)  # 1, or 0 for a row of zeros
    parts = []
    for rows in _chunks(len(z)):
        distance = square[rows, None] + square[rows.start :] - 2.0 * (z[rows] @ z[rows.start :].T)
        done = torch.ones_like(distance, dtype=torch.bool).tril_()
        parts.append(distance.clamp_(min=0.0).mul_(-t).masked_fill_(done, -math.inf).flatten().logsumexp(0))
    return torch.stack(parts).logsumexp(0).item() - math.log(len(z) * (len(z) - 1) / 2)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _rows(who: str, name: str, value: Tensor, like: tuple[str, Tensor] | None = None) -> Tensor:
    """Checked unit rows in float64 on the CPU."""
    return unit(feature_rows(who, name, _moved(value), like, rows=False))


def _pairs(who: str, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    return unit_pairs(who, _moved(image_features), _moved(text_features))


def _moved(value: Tensor) -> Tensor:
    """Floating-point values in float64 on the CPU; anything else as it is, for the check that follows to name."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().to("cpu", torch.float64) if floats else value
