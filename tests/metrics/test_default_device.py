"""`torch.set_default_device` is about what the user makes: "meta" stands for any device that the inputs are not on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hardmix.metrics import (
    arithmetic_metrics,
    error_by_label,
    few_shot_metrics,
    local_linearity,
    ordinality,
    retrieval_metrics,
    zero_shot_metrics,
)
from hardmix.metrics.corruptions import CORRUPTIONS, corrupt
from hardmix.metrics.missing import evaluate_missing
from hardmix.metrics.robustness import KINDS, mixed_accuracy_curve, patch_order


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.randn(12, 5, generator=rng())
Y = torch.arange(12) % 3
IMAGES = torch.rand(12, 3, 8, 8, generator=rng())
RELATIONS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])

CALLS: dict[str, Callable[[torch.Generator], Any]] = {
    "ordinality": lambda g: ordinality(X, Y, generator=g),
    "ordinality of drawn pairs": lambda g: ordinality(X, Y, pairs=9, generator=g),
    "local_linearity": lambda g: local_linearity(X, Y),
    "error_by_label": lambda g: error_by_label(Y, Y + 1, Y),
    "retrieval": lambda g: retrieval_metrics(X, X.flip(0)),
    "arithmetic": lambda g: arithmetic_metrics(X, X.flip(1), RELATIONS, kinds=["a", "b"]),
    "zero_shot": lambda g: zero_shot_metrics(X, X[:3], Y, 10.0),
    "few_shot": lambda g: few_shot_metrics(X, Y, {"same": (X, Y)}, ks=(1, 2), draws=2, generator=g),
    "missing": lambda g: evaluate_missing(lambda x: x["a"], {"a": X}, Y, batch_size=5),
    "patch_order": lambda g: patch_order(3, (8, 8), 4, generator=g)[0].tolist(),
    **{
        f"curve of {kind}": lambda g, kind=kind: mixed_accuracy_curve(
            lambda x: x.mean((2, 3)), IMAGES, Y, kind=kind, lams=(0.3,), generator=g
        )
        for kind in KINDS
    },
    **{name: lambda g, name=name: corrupt(IMAGES, name, 3, generator=g).tolist() for name in CORRUPTIONS},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_changes_nothing(name: str) -> None:
    want, generator = CALLS[name](rng(1)), rng(1)
    with torch.device("meta"):
        got = CALLS[name](generator)
    assert got == want
