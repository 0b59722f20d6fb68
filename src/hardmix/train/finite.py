"""Who is to blame for a loss that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn


def not_finite_weight(model: nn.Module) -> str | None:
    """The first parameter that holds NaN or infinity. Buffers may: attention masks do, and a forward spoils those of
    batch norms itself."""
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            return name
    return None


def not_finite_output(model: nn.Module, again: Callable[[], object]) -> str | None:
    """The first module whose output is not finite in `again`, the same forward once more, where it can be repeated."""
    found: list[str] = []

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    with suppress(Exception):  # a policy may refuse a second draw before the step; then the loss is all that is known
        again()
    for handle in handles:
        handle.remove()
    return found[0] if found else None
