"""A model behind its normalisation looks like the model itself."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from hardmix.data.views import Normalize
from hardmix.mixing import AutoMix, ManifoldMixup, SnapMix, TransMix
from hardmix.models.build import build_model
from hardmix.models.on_pixels import OnPixels


def pair(name: str = "small-cnn", **options: int) -> tuple[nn.Module, OnPixels]:
    torch.manual_seed(0)
    model = build_model(name, num_classes=4, in_channels=3, image_size=16, **options)
    return model, OnPixels(model, Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))


def test_names_and_parameters_are_those_of_the_model() -> None:
    model, seen = pair(width=4)
    assert dict(seen.named_modules()) == dict(model.named_modules())
    assert dict(seen.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert seen.get_submodule("stage1") is model.get_submodule("stage1")


def test_it_normalises() -> None:
    model, seen = pair(width=4)
    model.eval()
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(seen(x), model(seen.normalize(x)))


def test_the_mode_is_the_models() -> None:
    model, seen = pair(width=4)
    model.eval()
    assert not seen.training
    seen.train()
    assert model.training
    assert seen.training
    seen.eval()
    assert not model.training


def test_a_copy_has_a_model_of_its_own() -> None:
    model, seen = pair(width=4)
    other = copy.deepcopy(seen)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))
    assert not any(parameter is own for parameter in other.parameters() for own in model.parameters())


@pytest.mark.parametrize(
    "make", [lambda m: ManifoldMixup(m, ["stage1"], include_input=False), lambda m: SnapMix(m, layer="stage3")]
)
def test_policies_find_layers_by_their_own_names(make) -> None:
    model, seen = pair(width=4)
    policy = make(seen)
    x, target = policy(torch.rand(4, 3, 16, 16), torch.arange(4))
    model.train()(seen.normalize(x))
    assert target.labels.shape == (4, 2)


def test_hooks_on_the_model_itself_are_what_is_read() -> None:
    """The loop calls the model, not this wrapper of it."""
    model, seen = pair("tiny-vit", dim=16, depth=3, heads=2, patch=4)
    policy = TransMix(seen)
    x, target = policy(torch.rand(4, 3, 16, 16), torch.arange(4))
    gc.collect()
    logits = model.train()(seen.normalize(x))
    assert policy.relabel(logits, target).weights.shape == (4, 2)


def test_a_teacher_that_follows_takes_pixels_too() -> None:
    _, seen = pair(width=4)
    policy = AutoMix(seen, input_shape=(3, 16, 16), momentum=0.0)
    x, _ = policy(torch.rand(4, 3, 16, 16), torch.arange(4))
    assert x.isfinite().all()
    with torch.no_grad():
        for parameter in seen.parameters():
            parameter.add_(1.0)
    policy.after_step()
    teacher = dict(policy.named_parameters())
    assert all(any(torch.equal(p, t) for t in teacher.values()) for p in seen.parameters())
