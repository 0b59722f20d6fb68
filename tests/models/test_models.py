"""The reference backbones: shapes, sizes, gradients, seeds, round trips."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hardmix.models import MODELS, build_model, model_options

NAMES = list(MODELS)
#: those that name their stages; the other two have the names of torchvision
STAGED = [name for name in NAMES if name not in ("mobilenet-v2", "imagenet-resnet18")]
# (name, in_channels) -> parameters with 10 classes and 28-pixel images
PINNED = {
    ("small-cnn", 1): 58_594,
    ("small-cnn", 3): 59_026,
    ("small-resnet", 1): 77_754,
    ("small-resnet", 3): 78_042,
    ("resnet18", 1): 11_172_810,
    ("resnet18", 3): 11_173_962,
    ("wide-resnet", 1): 1_467_322,
    ("wide-resnet", 3): 1_467_610,
    ("tiny-vit", 1): 139_018,
    ("tiny-vit", 3): 141_066,
}


def small(
    name: str, *, num_classes: int = 10, in_channels: int = 1, image_size: int = 16, **options: object
) -> nn.Module:
    """The model at the smallest sensible width, so that the suite stays quick."""
    narrow = {
        "small-cnn": {"width": 8},
        "small-resnet": {"width": 8},
        "resnet18": {"width": 8},
        "wide-resnet": {"depth": 10, "width": 1},
        "tiny-vit": {"dim": 16},
        "mobilenet-v2": {"width": 0.25},
        "imagenet-resnet18": {"width": 8},
    }
    return build_model(
        name,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        **{**narrow[name], **options},
    )


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_shapes(name: str, in_channels: int, size: int) -> None:
    model = small(name, num_classes=7, in_channels=in_channels, image_size=size)
    assert model(torch.randn(2, in_channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("name", "in_channels"), PINNED)
def test_parameter_counts(name: str, in_channels: int) -> None:
    model = build_model(name, num_classes=10, in_channels=in_channels, image_size=28)
    assert parameters(model) == PINNED[name, in_channels]


def test_parameter_count_of_a_resnet20() -> None:
    # counted layer by layer; the 1 x 1 shortcuts are two convolutions with their norms
    model = build_model("small-resnet", num_classes=10, in_channels=3, image_size=32, blocks=3, stem_stride=1)
    convs = 3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters(model) == 9 * convs + norms + shortcuts + 64 * 10 + 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_parameter(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = small(name).train(training)
    nn.functional.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert float(parameter.grad.abs().sum()) > 0.0, key


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_the_weights(name: str) -> None:
    def states(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return small(name).state_dict()

    first, again, other = states(3), states(3), states(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_start_at_a_sensible_scale(name: str) -> None:
    """Fresh logits neither vanish nor saturate, and differ from image to image."""
    torch.manual_seed(0)
    logits = build_model(name, num_classes=10, in_channels=1, image_size=28)(torch.randn(32, 1, 28, 28))
    assert 1e-3 < float(logits.detach().std(0).mean()) < 3.0
    assert 2.0 < float(nn.functional.cross_entropy(logits.detach(), torch.arange(32) % 10)) < 4.0


@pytest.mark.parametrize("name", NAMES)
def test_one_image_in_eval_mode_equals_its_row_in_a_batch(name: str) -> None:
    torch.manual_seed(0)
    model = small(name).eval()
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name: str) -> None:
    torch.manual_seed(0)
    model = small(name)
    x = torch.randn(4, 1, 16, 16)
    model(x)  # moves the running statistics
    torch.manual_seed(1)
    other = small(name)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", STAGED)
def test_stages_are_named_submodules_in_order(name: str) -> None:
    model = small(name)
    children = [key for key, _ in model.named_children()]
    stages = ["stage1", "stage2", "stage3", *(["stage4"] if name == "resnet18" else [])]
    assert children == ["stem", *stages, "head"]
    seen: list[str] = []
    for key, child in model.named_children():
        child.register_forward_hook(lambda module, inputs, output, key=key: seen.append(key))
    model(torch.randn(2, 1, 16, 16))
    assert seen == children


@pytest.mark.parametrize("name", STAGED)
def test_a_hook_can_change_a_hidden_state(name: str) -> None:
    """What ManifoldMixup needs: the output of a stage is what the next one sees."""
    torch.manual_seed(0)
    model = small(name).eval()
    x = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        plain = model(x)
        handle = model.get_submodule("stage2").register_forward_hook(lambda module, inputs, output: output.flip(0))
        torch.testing.assert_close(model(x), plain.flip(0), rtol=1e-4, atol=1e-5)
        handle.remove()
        torch.testing.assert_close(model(x), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_classifier_the_features_come_out(name: str) -> None:
    model = small(name, num_classes=0)
    out = model(torch.randn(2, 1, 16, 16))
    assert out.shape == (2, model.num_features)
    features = model.forward_features(torch.randn(2, 1, 16, 16))
    assert features.shape[-1 if name == "tiny-vit" else 1] == model.num_features


@pytest.mark.parametrize("name", ["small-cnn", "small-resnet", "resnet18"])
def test_convolutional_models(name: str) -> None:
    torch.manual_seed(0)
    model = small(name, in_channels=3).eval()
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        plain = model(x)
        lasting = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert plain.shape == (2, 10)
    torch.testing.assert_close(lasting, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["small-cnn", "small-resnet"])
def test_the_stem_halves_large_images_only(name: str) -> None:
    def side(image_size: int, **options: object) -> int:
        return small(name, image_size=image_size, **options).stem(torch.zeros(1, 1, image_size, image_size)).shape[-1]

    assert [side(size) for size in (8, 23, 24, 28, 32)] == [8, 23, 12, 14, 16]
    assert side(28, stem_stride=1) == 28
    assert side(8, stem_stride=2) == 4


@pytest.mark.parametrize("name", ["small-cnn", "small-resnet", "resnet18"])
def test_group_norm_keeps_rows_apart(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 16, 16)
    model = small(name, norm="group").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=1e-4, atol=1e-5)
    batch = small(name).train()
    assert not torch.allclose(batch(x[:2])[:1], batch(x)[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_rows_sum_to_one(patch: int, heads: int) -> None:
    torch.manual_seed(0)
    model = small("tiny-vit", depth=5, heads=heads, patch=patch)
    x = torch.randn(2, 1, 16, 16)
    logits, attentions = model.forward_with_attention(x)
    tokens = (16 // patch) ** 2 + 1
    assert [tuple(a.shape) for a in attentions] == [(2, heads, tokens, tokens)] * 5
    for attention in attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, heads, tokens))
        assert float(attention.detach().min()) >= 0.0
    assert model.grid == 16 // patch
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)


def test_attention_is_the_one_that_the_block_uses() -> None:
    """A slow float64 re-derivation of the first block's attention, head by head and token by token."""
    torch.manual_seed(0)
    model = small("tiny-vit", heads=2, patch=8).double()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    _, attentions = model.forward_with_attention(x)
    block = model.stage1.blocks[0]
    tokens = block.norm1(model.stem(x))
    for n in range(2):
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            q = tokens[n] @ block.qkv.weight[:16][rows].T + block.qkv.bias[:16][rows]
            k = tokens[n] @ block.qkv.weight[16:32][rows].T + block.qkv.bias[16:32][rows]
            for i in range(5):
                scores = torch.stack([(q[i] * k[j]).sum() / 8**0.5 for j in range(5)]).exp()
                torch.testing.assert_close(attentions[0][n, head, i], scores / scores.sum(), rtol=1e-10, atol=1e-12)


def test_attention_carries_gradient_and_hooks() -> None:
    torch.manual_seed(0)
    model = small("tiny-vit")
    calls: list[int] = []
    model.stage1.register_forward_hook(lambda module, inputs, output: calls.append(1))
    _, attentions = model.forward_with_attention(torch.randn(2, 1, 16, 16))
    attentions[-1][:, :, 0, 1:].pow(2).sum().backward()
    assert calls == [1]
    assert float(model.stem.patches.weight.grad.abs().sum()) > 0.0


@pytest.mark.parametrize("depth", [3, 4, 5, 7])
def test_vit_shares_its_blocks_out(depth: int) -> None:
    model = small("tiny-vit", depth=depth)
    shares = [len(stage.blocks) for stage in (model.stage1, model.stage2, model.stage3)]
    assert sum(shares) == depth
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_weights(name: str) -> None:
    torch.manual_seed(0)
    model = small(name).eval()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        cast = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    torch.testing.assert_close(mixed.float(), plain, rtol=0.1, atol=0.1)
    torch.testing.assert_close(cast.float(), plain, rtol=0.1, atol=0.1)


def test_options_are_the_signature() -> None:
    assert model_options("small-cnn") == ("width", "stem_stride", "norm")
    assert model_options("small-resnet") == ("width", "blocks", "stem_stride", "norm")
    assert model_options("resnet18") == ("width", "stem_stride", "norm")
    assert model_options("tiny-vit") == ("dim", "depth", "heads", "patch")
