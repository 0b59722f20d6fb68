"""Further features that a loss of image-text pairs is handed beside the pairs themselves."""

from __future__ import annotations

from torch import Tensor

from hardmix import _check


def feature_rows(
    who: str,
    name: str,
    value: Tensor,
    like: tuple[str, Tensor] | None = None,
    *,
    rows: bool = True,
    columns: bool = True,
) -> Tensor:
    """Checked floating-point features (N, D), as they are.

    `like` names other features that these go with: on their device and, unless told otherwise, as many and as wide.
    """
    x = _check.batch(who, name, value, 2, 2)
    if not x.is_floating_point():
        raise TypeError(f"{who}: {name} has dtype {x.dtype}; pass floating-point values.")
    if like is not None:
        other_name, other = like
        if rows:
            _check.same_length(who, name, x, other_name, other.shape[0])
        if columns and x.shape[1] != other.shape[1]:
            raise ValueError(
                f"{who}: {name} has {x.shape[1]} columns but {other_name} has {other.shape[1]}; pass features of one "
                "space."
            )
        _check.same_device(who, name, x, other_name, other.device)
    _check.finite(who, name, x)
    return x
