"""The net of several modalities: what is made of those that are there, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix.losses.multimodal import GMCLoss
from hardmix.metrics.missing import evaluate_missing
from hardmix.models.multimodal import MultimodalNet

FEATURES = {"a": 4, "b": 3, "c": 5}


def net(**options: Any) -> MultimodalNet:
    torch.manual_seed(0)
    return MultimodalNet(
        {name: nn.Linear(size, size) for name, size in FEATURES.items()}, FEATURES, num_classes=2, **options
    )


def batch(n: int = 6, seed: int = 1) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, size, generator=generator) for name, size in FEATURES.items()}


def test_a_complete_batch_is_read_from_its_joint() -> None:
    model = net()
    out = model(batch())
    assert out.joint is not None
    assert list(out.latents) == ["a", "b", "c"]
    for rows in (out.joint, *out.latents.values()):
        assert rows.shape == (6, 60)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(out.logits, model.head(out.joint + model.hidden(out.joint)))
    features = torch.cat([model.encoders[name](x) for name, x in batch().items()], 1)
    torch.testing.assert_close(out.joint, F.normalize(model.projection(model.joint(features))))
    assert net(dim=7)(batch()).joint.shape == (6, 7)
    shuffled = dict(reversed(batch().items()))
    assert torch.equal(model(shuffled).logits, out.logits)


@pytest.mark.parametrize("there", ["a", "b", "ac", "bc"])
def test_what_is_missing_does_not_matter(there: str) -> None:
    model, complete = net(), batch()
    out = model({name: x if name in there else None for name, x in complete.items()})
    assert out.joint is None
    assert list(out.latents) == list(there)
    for name in there:
        want = F.normalize(model.projection(model.common[name](model.encoders[name](complete[name]))))
        torch.testing.assert_close(out.latents[name], want)
    mean = sum(out.latents.values()) / len(there)
    torch.testing.assert_close(out.logits, model.head(mean + model.hidden(mean)))
    assert torch.equal(model({name: complete[name] for name in there}).logits, out.logits)


def test_all_weights_learn_from_the_loss_and_the_labels() -> None:
    model = net()
    out = model(batch())
    loss = GMCLoss(m2=0.5)(list(out.latents.values()), out.joint) + F.cross_entropy(out.logits, torch.arange(6) % 2)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_gmc_makes_a_latent_stand_for_the_joint() -> None:
    """Trained on complete samples alone, the classifier can be asked with one modality; without GMC it cannot."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 4
    means = torch.randn(4, 12, generator=generator)
    rows = means[labels] + 0.3 * torch.randn(128, 12, generator=generator)
    inputs: dict[str, Tensor] = dict(zip(FEATURES, rows.split(list(FEATURES.values()), 1), strict=True))
    scores = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = MultimodalNet({name: nn.Identity() for name in FEATURES}, FEATURES, num_classes=4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(40):
            out = model(inputs)
            loss = F.cross_entropy(out.logits, labels)
            loss = loss + weight * GMCLoss()(list(out.latents.values()), out.joint)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores.append(evaluate_missing(model, inputs, labels))
    assert scores[0]["a+b+c"] > 0.95
    assert scores[1]["a+b+c"] > 0.95
    for name in ("a", "b", "c", "a+b"):
        assert scores[1][name] > scores[0][name] + 0.2, name


def test_dropout_is_of_training_alone() -> None:
    model = net(dropout=0.5)
    assert not torch.equal(model(batch()).logits, model(batch()).logits)
    model.eval()
    assert torch.equal(model(batch()).logits, model(batch()).logits)


MODEL = net()
CALLS = [
    ({"a": torch.zeros(2, 4), "d": None}, ValueError, "a modality of inputs is 'd'; pass one of 'a', 'b', 'c'"),
    ({}, ValueError, "inputs has no modality; pass at least one of 'a', 'b', 'c'."),
    ({"a": None}, ValueError, "inputs has no modality; pass at least one of 'a', 'b', 'c'."),
    ({"a": [1.0]}, TypeError, "a is a list; pass a torch.Tensor."),
    (
        {"a": torch.zeros(2, 4), "b": torch.zeros(3, 3)},
        ValueError,
        "b has 3 entries but a has 2 rows; pass one entry per row.",
    ),
]


@pytest.mark.parametrize(("inputs", "kind", "message"), CALLS)
def test_messages_of_a_call(inputs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^MultimodalNet: {re.escape(message)}"):
        MODEL(inputs)


SETTINGS = [
    ({"dim": 0}, "dim is 0; pass an integer of at least 1."),
    ({"width": 0}, "width is 0; pass an integer of at least 1."),
    ({"num_classes": 0}, "num_classes is 0; pass an integer of at least 1."),
    ({"dropout": 2.0}, "dropout is 2.0; pass a number from 0 to 1."),
    ({"features": {"a": 0, "b": 2}}, "features of a is 0; pass an integer of at least 1."),
    ({"features": {"a": 1}}, "features is for ['a'] but encoders for ['a', 'b']; pass one number each."),
    (
        {"encoders": {"a.b": nn.Identity(), "c": nn.Identity()}},
        "encoders has the name 'a.b'; pass words of letters, digits and underscores.",
    ),
    (
        {"encoders": {"keys": nn.Identity(), "c": nn.Identity()}},
        "encoders has the name 'keys'; pass words of letters, digits and underscores.",
    ),
    ({"encoders": {"a": nn.Identity()}}, "encoders has 1 entries; pass two or more, one per modality."),
]


@pytest.mark.parametrize(("setting", "message"), SETTINGS)
def test_messages(setting: dict[str, Any], message: str) -> None:
    given = {"encoders": {"a": nn.Identity(), "b": nn.Identity()}, "features": {"a": 1, "b": 2}, "num_classes": 2}
    given |= setting
    with pytest.raises(ValueError, match=f"^MultimodalNet: {re.escape(message)}$"):
        MultimodalNet(given.pop("encoders"), given.pop("features"), **given)
