"""How good is a model of several modalities when some of them are missing?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import CPU
from hardmix.metrics.robustness import _evaluating

#: more would be more than a thousand subsets
MOST_MODALITIES = 10


@torch.no_grad()
def evaluate_missing(
    model: Callable[[dict[str, Tensor | None]], Any],
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    batch_size: int = 256,
) -> dict[str, float]:
    """Accuracy for each non-empty subset of the modalities, the others missing.

    Args:
        model: called with a dict of all names, None for those that are missing; gives logits (N, C), or something with
            such `logits`. A module is in evaluation mode meanwhile, and its batches are on the device of its
            parameters.
        inputs: name -> (N, ...), all modalities; one to ten.
        labels: (N,) integers.
        batch_size: how many samples the model sees at a time.

    Returns:
        dict in the order of size, then of `inputs`: "audio", "text", "audio+text" -> share of right samples; of equal
        logits the first class counts.

    Raises:
        TypeError: labels that are no integers.
        ValueError: no inputs or more than ten, different numbers of samples, none, or logits of another shape.

    >>> inputs = {"a": torch.eye(2), "b": -torch.eye(2)}
    >>> evaluate_missing(lambda x: x["a"] if x["b"] is None else x["b"], inputs, torch.tensor([0, 1]))
    {'a': 1.0, 'b': 0.0, 'a+b': 0.0}
    """
    who = "evaluate_missing"
    _check.integer(who, "batch_size", batch_size, 1)
    labels = _check.tensor(who, "labels", labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{who}: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass (N,) integers.")
    if not callable(model):
        raise TypeError(f"{who}: model is a {type(model).__name__}; pass a torch.nn.Module or a function.")
    _check.mapping(who, "inputs", inputs, "tensors by name")
    if not 1 <= len(inputs) <= MOST_MODALITIES:
        raise ValueError(f"{who}: inputs has {len(inputs)} entries; pass 1 to {MOST_MODALITIES}.")
    for name, x in inputs.items():
        _check.same_length(who, "labels", labels, name, len(_check.tensor(who, name, x)))
    if not len(labels):
        raise ValueError(f"{who}: labels is empty; pass at least one sample.")
    names = [names for size in range(1, len(inputs) + 1) for names in combinations(inputs, size)]
    labels = labels.long()
    with _evaluating(model):
        return {"+".join(there): _accuracy(model, inputs, labels, there, batch_size) for there in names}


def _accuracy(
    model: Callable[[dict[str, Tensor | None]], Any],
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    there: tuple[str, ...],
    batch_size: int,
) -> float:
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    right = 0
    for rows in torch.arange(len(labels), device=CPU).split(batch_size):
        batch: dict[str, Tensor | None] = dict.fromkeys(inputs)
        for name in there:
            x = inputs[name][rows]
            batch[name] = x if weight is None else x.to(weight.device)
        output = model(batch)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(rows):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"evaluate_missing: the model gives {got} for {len(rows)} samples; return logits (N, C).")
        right += int((logits.argmax(1).cpu() == labels[rows].cpu()).sum())
    return right / len(labels)
