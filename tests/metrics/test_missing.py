"""Accuracy with missing modalities: every subset, batches, modes of the model, and messages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardmix.metrics.missing import evaluate_missing


class Sum(nn.Module):
    """Logits are the sum of the inputs that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[bool, int, tuple[str, ...]]] = []

    def forward(self, inputs: dict[str, Tensor | None]) -> Any:
        there = {name: x for name, x in inputs.items() if x is not None}
        assert list(inputs) == ["a", "b", "c"]
        self.seen.append((self.training, len(next(iter(there.values()))), tuple(there)))

        class Output:
            logits = sum(there.values()) * self.scale

        assert not Output.logits.requires_grad
        return Output


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(11, 3, generator=generator) for name in "abc"}


LABELS = torch.arange(11) % 3


def test_every_subset_against_plain_sums() -> None:
    model, x = Sum(), inputs()
    found = evaluate_missing(model, x, LABELS)
    assert list(found) == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]
    for names, accuracy in found.items():
        logits = sum(x[name] for name in names.split("+"))
        assert accuracy == sum(int(row.argmax()) == int(label) for row, label in zip(logits, LABELS, strict=True)) / 11
    assert len(set(found.values())) > 2


@pytest.mark.parametrize("training", [True, False])
def test_batches_and_modes(training: bool) -> None:
    model = Sum().train(training)
    small = evaluate_missing(model, inputs(), LABELS, batch_size=4)
    assert small == evaluate_missing(Sum(), inputs(), LABELS)
    assert [size for _, size, _ in model.seen] == [4, 4, 3] * 7
    assert not any(mode for mode, _, _ in model.seen)
    assert model.training is training

    def fail(_: Any) -> Tensor:
        raise RuntimeError("broken")

    model.forward = fail
    with pytest.raises(RuntimeError, match="broken"):
        evaluate_missing(model, inputs(), LABELS)
    assert model.training is training


def test_what_is_frozen_stays_in_evaluation_mode() -> None:
    model = Sum().train()
    model.frozen = nn.BatchNorm1d(3).eval()
    evaluate_missing(model, inputs(), LABELS)
    assert model.training
    assert not model.frozen.training


def test_a_function_is_a_model_too() -> None:
    found = evaluate_missing(lambda x: x["a"], {"a": torch.eye(3)}, torch.tensor([0, 1, 0]))
    assert found == {"a": pytest.approx(2 / 3)}
    assert evaluate_missing(lambda x: x["a"], {"a": torch.eye(3)}, torch.arange(3).to(torch.uint16)) == {"a": 1.0}


A = torch.eye(3)
L = torch.arange(3)
CALLS = [
    ((A.argmax, {"a": A}, L.float()), TypeError, "labels has shape (3,) and dtype torch.float32; pass (N,) integers."),
    ((None, {"a": A}, L), TypeError, "model is a NoneType; pass a torch.nn.Module or a function."),
    ((A.argmax, [A], L), TypeError, "inputs is a list; pass a dict of tensors by name."),
    ((A.argmax, {}, L), ValueError, "inputs has 0 entries; pass 1 to 10."),
    ((A.argmax, {str(k): A for k in range(11)}, L), ValueError, "inputs has 11 entries; pass 1 to 10."),
    ((A.argmax, {"a": A[:2]}, L), ValueError, "labels has 3 entries but a has 2 rows; pass one entry per row."),
    ((A.argmax, {"a": [1]}, L), TypeError, "a is a list; pass a torch.Tensor."),
    ((A.argmax, {"a": A[:0]}, L[:0]), ValueError, "labels is empty; pass at least one sample."),
    ((lambda x: 3, {"a": A}, L), ValueError, "the model gives int for 3 samples; return logits (N, C)."),
    ((lambda x: A[0], {"a": A}, L), ValueError, "the model gives (3,) for 3 samples; return logits (N, C)."),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), CALLS)
def test_messages(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^evaluate_missing: {re.escape(message)}$"):
        evaluate_missing(*arguments)
    with pytest.raises(ValueError, match=r"^evaluate_missing: batch_size is 0; pass an integer of at least 1\.$"):
        evaluate_missing(*arguments, batch_size=0)
