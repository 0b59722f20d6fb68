"""Every input check and its message.

A message is one sentence with four parts: who complains, which argument, what came, what to do. Checks read metadata
only (type, rank, length, dtype, device, the range of a Python number), so none of them waits for a device; the
exceptions, `classes_in_range` and `finite`, look at values only where the tensor is already on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from hardmix._math import is_transformed

#: of integers: no tensor holds them, and seeds may be as large as this
TOO_LARGE = 2**64


def shown(value: object) -> str:
    """A value in a message, in one line: its kind where what Python writes has more of them."""
    if isinstance(value, int) and abs(value) >= TOO_LARGE:
        return "an integer beyond 64 bits"
    text = repr(value)
    return text if "\n" not in text else f"a {type(value).__name__}"


def number(who: str, name: str, value: object) -> float:
    """A finite Python number (bool excluded), returned as float."""
    x = _as_float(value)
    if not math.isfinite(x):
        raise _type_or_value(value, f"{who}: {name} is {shown(value)}; pass a finite number.")
    return x


def positive(who: str, name: str, value: object) -> float:
    """A finite number greater than 0."""
    x = _as_float(value)
    if not (math.isfinite(x) and x > 0):
        raise _type_or_value(value, f"{who}: {name} is {shown(value)}; pass a finite number greater than 0.")
    return x


def non_negative(who: str, name: str, value: object) -> float:
    """A finite number of at least 0."""
    x = _as_float(value)
    if not (math.isfinite(x) and x >= 0):
        raise _type_or_value(value, f"{who}: {name} is {shown(value)}; pass a finite number of at least 0.")
    return x


def between(who: str, name: str, value: object, low: float, high: float) -> float:
    """A number in the closed interval [low, high]."""
    x = _as_float(value)
    if not low <= x <= high:
        raise _type_or_value(value, f"{who}: {name} is {shown(value)}; pass a number from {low:g} to {high:g}.")
    return x


def integer(who: str, name: str, value: object, low: int) -> int:
    """An integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < TOO_LARGE:
        raise _type_or_value(value, f"{who}: {name} is {shown(value)}; pass an integer of at least {low}.")
    return value


def boolean(who: str, name: str, value: object) -> bool:
    """True or False, not something that counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: {name} is {shown(value)}; pass True or False.")
    return value


def interval(who: str, name: str, value: object, low: float, high: float) -> tuple[float, float]:
    """A pair (a, b) of numbers with low <= a <= b <= high."""
    ends = list(value) if isinstance(value, Sequence) else []
    numbers = [_as_float(end) for end in ends]
    if not (len(numbers) == 2 and low <= numbers[0] <= numbers[1] <= high):
        raise ValueError(f"{who}: {name} is {shown(value)}; pass two numbers a <= b between {low:g} and {high:g}.")
    return numbers[0], numbers[1]


def choice(who: str, name: str, value: object, options: Iterable[str]) -> str:
    """One of a few names; the nearest one is offered."""
    names = list(options)
    if not isinstance(value, str) or value not in names:
        near = did_you_mean(str(value), names)
        raise _type_or_value(
            value if value is None or isinstance(value, str) else None,
            f"{who}: {name} is {shown(value)}; pass one of {', '.join(map(repr, names))}{near}.",
        )
    return value


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the nearest name, or an empty string."""
    near = get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f' (did you mean "{near[0]}"?)' if near else ""


def sequence(who: str, name: str, value: object, of: str) -> list[Any]:
    """What can be gone through, as a list; a text is one value and not its letters."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        with suppress(TypeError):  # a tensor without axes only looks as if it could be
            return list(value)
    raise TypeError(f"{who}: {name} is {shown(value)}; pass a sequence of {of}.")


def mapping(who: str, name: str, value: object, of: str) -> Mapping[str, Any]:
    """A dict or the like."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{who}: {name} is a {type(value).__name__}; pass a dict of {of}.")
    return value


def tensor(who: str, name: str, value: object) -> Tensor:
    """A tensor, not an array or a list."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {name} is a {type(value).__name__}; pass a torch.Tensor.")
    return value


def batch(who: str, name: str, value: object, min_ndim: int = 2, max_ndim: int = 5) -> Tensor:
    """A non-empty batch (N, ...) of integers or floats with `min_ndim` to `max_ndim` axes."""
    x = tensor(who, name, value)
    if not min_ndim <= x.ndim <= max_ndim:
        axes = f"{min_ndim}" if min_ndim == max_ndim else f"{min_ndim} to {max_ndim}"
        raise ValueError(f"{who}: {name} has shape {tuple(x.shape)}; pass a batch with {axes} axes, samples first.")
    if x.numel() == 0:
        raise ValueError(f"{who}: {name} has shape {tuple(x.shape)} and is empty; pass at least one sample.")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{who}: {name} has dtype {x.dtype}; pass integers or floating-point values.")
    return x


def same_length(who: str, name: str, value: Tensor, other_name: str, rows: int) -> None:
    """The first axis of `value` has `rows` entries."""
    if value.ndim == 0 or value.shape[0] != rows:
        got = value.shape[0] if value.ndim else "no"
        raise ValueError(f"{who}: {name} has {got} entries but {other_name} has {rows} rows; pass one entry per row.")


def same_device(who: str, name: str, value: Tensor, other_name: str, device: torch.device) -> None:
    """Both tensors live on one device."""
    if value.device != device:
        raise ValueError(
            f"{who}: {name} is on {value.device} but {other_name} is on {device}; move both to one device with .to()."
        )


def classes_in_range(who: str, name: str, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> bool:
    """Class ids lie in [0, num_classes). Reads values, so it only looks at CPU tensors: a GPU is never waited for.

    True if it has looked and found nothing but class ids, False if it could not look or some are the ignored one.
    """
    if labels.device.type != "cpu" or labels.numel() == 0 or torch.compiler.is_compiling():
        return False
    try:
        low, high = (int(v) for v in torch.aminmax(labels))
    except RuntimeError:
        if is_transformed():  # labels that torch.func.vmap maps over have no values to look at
            return False
        raise
    if low >= 0 and high < num_classes:
        return True
    wrong = (labels < 0) | (labels >= num_classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if bool(wrong.any()):
        first = int(labels[wrong][0])
        raise ValueError(
            f"{who}: {name} holds the class {first}, but there are {num_classes} classes; "
            f"pass class ids from 0 to {num_classes - 1}."
        )
    return False


def finite(who: str, name: str, x: Tensor) -> None:
    """No NaN or infinity. Reads values, so it only looks at CPU tensors in eager mode: a GPU is never waited for.

    The sum costs one read of the tensor; only where it is not finite (it may also have overflowed) is each value asked.
    """
    if x.device.type != "cpu" or not x.is_floating_point() or torch.compiler.is_compiling() or is_transformed():
        return
    if math.isfinite(x.detach().sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).item()):
        return
    bad = ~torch.isfinite(x.detach()).flatten(1).all(1)
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"{who}: {name} holds NaN or infinity in rows {', '.join(map(str, rows[:5]))}{more}; "
            "repair or leave out these samples."
        )


def _as_float(value: object) -> float:
    """A Python number as a float; NaN for anything else, and for integers that torch has no type for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if isinstance(value, float) or abs(value) < TOO_LARGE else math.nan


def _type_or_value(value: object, message: str) -> Exception:
    """TypeError when the kind of thing is wrong, ValueError when only its value is."""
    wrong_kind = isinstance(value, bool) or not isinstance(value, (int, float, str))
    return TypeError(message) if wrong_kind else ValueError(message)
