"""Finding a model's classifier, and the features that it reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hardmix.models.build import CLASSIFIERS, build_model
from hardmix.semi.features import find_head, with_features
from tests import compiling
from tests.semi.cases import FEATURES, net, rng


def test_features_are_what_the_classifier_reads() -> None:
    model, x = net(), torch.randn(5, FEATURES, generator=rng(), dtype=torch.float64)
    logits, features = with_features(model, x, find_head("X", model))
    assert torch.equal(features, model[:2](x))
    assert torch.equal(logits, model(x))
    assert torch.equal(logits, model[2](features))
    assert logits.requires_grad
    assert features.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(features.square().sum(), list(model[0].parameters())),
        torch.autograd.grad(model[:2](x).square().sum(), list(model[0].parameters())),
    )


def test_the_hook_is_gone_afterwards() -> None:
    model, x = net(), torch.zeros(2, FEATURES, dtype=torch.float64)
    head = find_head("X", model)
    with_features(model, x, head)
    with pytest.raises(RuntimeError):
        with_features(model, x[:, :2], head)  # the forward fails
    assert not head._forward_pre_hooks


@compiling.supported
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where the graph breaks
@pytest.mark.parametrize("skip", [False, True])
def test_a_compiled_model_has_features_or_says_why_not(skip: bool) -> None:
    import torch._dynamo

    model, x = net(), torch.randn(5, FEATURES, generator=rng(), dtype=torch.float64)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=skip):
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        if skip:
            with pytest.raises(
                RuntimeError, match=r"torch\._dynamo\.config\.skip_nnmodule_hook_guards is set to False"
            ):
                with_features(compiled, x, find_head("X", compiled))
        else:
            for _ in range(3):
                assert torch.equal(with_features(compiled, x, find_head("X", compiled))[1], model[:2](x))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_come_in_float32(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    logits, features = with_features(model, torch.zeros(2, FEATURES, dtype=dtype), find_head("X", model))
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert logits.dtype == features.dtype == want


def test_the_last_linear_layer_is_the_head_unless_one_is_named() -> None:
    model = net()
    assert find_head("X", model) is model[2]
    assert find_head("X", model, "0") is model[0]
    with pytest.raises(ValueError, match=r"X: head names '3', which is no linear layer of the model"):
        find_head("X", model, "3")
    with pytest.raises(ValueError, match=r"X: the model has no linear layer to read features in front of; pass one"):
        find_head("X", nn.Tanh())
    with pytest.raises(TypeError, match=r"X: model is a function; pass a torch\.nn\.Module\."):
        find_head("X", lambda x: x)


@pytest.mark.parametrize("name", ["wide-resnet", "small-resnet", "tiny-vit", "mobilenet-v2", "imagenet-resnet18"])
def test_our_own_models(name: str) -> None:
    model = build_model(name, num_classes=3, in_channels=3, image_size=32).eval()
    head = find_head("X", model)
    assert head is find_head("X", model, CLASSIFIERS.get(name, "head.linear"))
    logits, features = with_features(model, torch.rand(2, 3, 32, 32, generator=rng()), head)
    assert logits.shape == (2, 3)
    assert features.shape == (2, head.in_features)


def test_refusals() -> None:
    model, x = net(), torch.zeros(2, FEATURES, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"with_features: the forward did not pass through the head; name the layer"):
        with_features(model[0], x, model[2])
    with pytest.raises(ValueError, match=r"logits_of: model gave shape \(2, 1, 4\) for 2 samples; pass a model"):
        with_features(nn.Sequential(model, nn.Unflatten(1, (1, 4))), x, model[2])
    tokens = nn.Sequential(nn.Linear(FEATURES, 4), nn.Flatten(1)).double()
    with pytest.raises(ValueError, match=r"with_features: the head reads features of shape \(2, 3, 6\) for 2 samples"):
        with_features(tokens, torch.zeros(2, 3, FEATURES, dtype=torch.float64), tokens[0])
