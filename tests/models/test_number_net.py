"""An encoder with a head and a projector: its parts, freezing, and smoothing between encoder and head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hardmix.losses import FeatureSmoothing
from hardmix.models.mlp import MLP
from hardmix.models.number_net import NumberNet


def net(**options) -> NumberNet:
    torch.manual_seed(0)
    return NumberNet(MLP(inputs=3, width=8, depth=1), 8, **options)


@pytest.mark.parametrize(("projector", "size"), [("linear", 4), ("mlp", 4), ("none", 8), (None, 8)])
def test_parts_are_those_of_one_forward(projector, size) -> None:
    model, x = net(projector=projector, projection=4), torch.randn(5, 3)
    numbers, features, embeddings = model(x, "all")
    assert numbers.shape == (5,)
    assert embeddings.shape == (5, size)
    assert torch.equal(model(x), numbers)
    assert torch.equal(model(x, "features"), features)
    assert torch.equal(model(x, "embed"), embeddings)
    assert torch.equal(numbers, model.head(features)[:, 0])


def test_encoder_and_head_start_alike_with_and_without_a_projector() -> None:
    plain, projected = net().state_dict(), net(projector="mlp").state_dict()
    assert all(torch.equal(value, projected[name]) for name, value in plain.items())


def test_frozen_encoders_have_no_gradient_and_keep_their_statistics() -> None:
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    model = NumberNet(encoder, 8)
    model.freeze(True)
    model.train()
    before = encoder[1].running_mean.clone()
    model(torch.randn(16, 3)).square().sum().backward()
    assert torch.equal(encoder[1].running_mean, before)
    assert encoder[0].weight.grad is None
    assert model.head.weight.grad is not None
    model.freeze(False)
    model(torch.randn(16, 3)).square().sum().backward()
    assert encoder[0].weight.grad is not None
    assert not torch.equal(encoder[1].running_mean, before)


def test_features_are_smoothed_before_the_head_in_training_only() -> None:
    smoothing = FeatureSmoothing(8, label_range=(0.0, 1.0), bins=2, kernel_size=3)
    model, x, y = net(smoothing=smoothing), torch.randn(20, 3), torch.rand(20)
    plain = model(x, labels=y)
    smoothing.update(model(x, "features").detach(), y)
    assert not torch.allclose(model(x, labels=y), plain)
    assert torch.equal(model.eval()(x), plain)
    assert "smoothing.running_mean" in model.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"projector": "cubic"}, "projector is 'cubic'"), ({"projector": "linear", "projection": 0}, "projection is 0")],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        net(**options)
