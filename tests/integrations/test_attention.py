"""The attention that is read from the vision transformers of timm, transformers and torchvision, beside their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardmix.losses import SoftCrossEntropyLoss
from hardmix.mixing.attention import AttentionTap, Grid
from hardmix.mixing.label_attention import MixPro, TLAlign, TransMix
from hardmix.mixing.token_merge import MergeMix
from hardmix.mixing.tokens import SMMix, TokenMix

POLICIES: list[Callable[..., Any]] = [TransMix, MixPro, TLAlign, TokenMix, SMMix, MergeMix]
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(3)


def peer(name: str) -> ModuleType:
    return pytest.importorskip(
        name, reason=f"{name} does not import; `make test-integrations` installs it", exc_type=ImportError
    )


def uneven(model: nn.Module) -> nn.Module:
    """Weights that make the attention uneven."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model


def timm_vit(**options: Any) -> nn.Module:
    return uneven(peer("timm.models.vision_transformer").VisionTransformer(**{**SMALL, **options}))


def timm_attentions(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What goes into the dropout of each attention, fused kernels off."""
    twin, seen = copy.deepcopy(model).eval(), []
    for part in twin.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
            part.attn_drop.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    twin(x)
    return seen


TIMM = {
    "plain": {},
    "norms of q and k": {"qk_norm": True},
    "registers": {"reg_tokens": 4},
    "no class token": {"class_token": False, "reg_tokens": 4, "global_pool": "avg"},
    "dropout": {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "drop_path_rate": 0.1,
    },
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("fused", [True, False])
def test_timm(name: str, fused: bool) -> None:
    model = timm_vit(**TIMM[name])
    for block in model.blocks:
        block.attn.fused_attn = fused
    outs = []
    for tapped in (False, True):
        twin = copy.deepcopy(model)
        tap = AttentionTap(twin, every=True)
        if tapped:
            tap.arm(images=3)
        torch.manual_seed(2)
        out = twin(X)
        out.sum().backward()
        outs.append([out, torch.rand(2), *[p.grad for p in twin.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert len(tap.take()) == 3
    _, got = tap.measure(X)
    for read, want in zip(got, timm_attentions(model, X), strict=True):
        assert torch.allclose(read, want, atol=1e-6)
        assert want.std() > 0.002
    prefix = TIMM[name].get("reg_tokens", 0) + TIMM[name].get("class_token", True)
    grid = tap.grid((32, 32), got[0].shape[-1])
    assert grid == Grid(8, 8, 4, 4, prefix)
    assert tap.has_class_token(grid) == TIMM[name].get("class_token", True)


def test_timm_rotary_positions_and_images_that_are_not_square() -> None:
    eva = peer("timm.models.eva").Eva
    model = uneven(eva(**{**SMALL, "img_size": (16, 32)}, use_rot_pos_emb=True))
    x = X[:, :, :16]
    tap = AttentionTap(model, every=True)
    _, got = tap.measure(x)
    for read, want in zip(got, timm_attentions(model, x), strict=True):
        assert torch.allclose(read, want, atol=1e-6)
    assert tap.grid((16, 32), 33) == Grid(4, 8, 4, 4, 1)
    with pytest.raises(ValueError, match=r"MergeMix: the Eva does not run on merged tokens \(.*\); pass merge=0\."):
        MergeMix(model).plan(x)


def test_timm_added_positions() -> None:
    """BEiT adds to the scores what depends on where two patches are."""
    beit = peer("timm.models.beit").Beit
    model = uneven(beit(**SMALL, use_rel_pos_bias=True, use_abs_pos_emb=False))
    _, got = AttentionTap(model, every=True).measure(X)
    for read, want in zip(got, timm_attentions(model, X), strict=True):
        assert torch.allclose(read, want, atol=1e-6)


def test_timm_class_attention() -> None:
    """CaiT's class token only joins for the last blocks, where it alone attends."""
    model = uneven(peer("timm.models.cait").Cait(**SMALL))
    tap = AttentionTap(model)
    assert tap.names == ["blocks_token_only.1.attn"]
    assert tap.measure(X)[1][0].shape == (3, 4, 1, 65)
    mix = TransMix(model)
    mixed, target = mix(X, Y)
    assert bool(mix.relabel(model(mixed), target).weights.isfinite().all())
    with pytest.raises(ValueError, match="attends from 1 tokens to 65, but what the patches attend to is wanted"):
        SMMix(model).plan(X)
    labels = TLAlign(model)
    mixed, _ = labels(X, Y)
    with pytest.raises(ValueError, match="TLAlign: a block attends from 1 tokens to 65 where there were 64 before"):
        model(mixed)


def test_timm_windows() -> None:
    swin = peer("timm.models.swin_transformer").SwinTransformer
    model = swin(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=5)
    with pytest.raises(ValueError, match=r"has 12 rows for 3 images \(attention within windows sees no whole image"):
        TokenMix(model).plan(X)
    with pytest.raises(ValueError, match=r"has 12 rows for 3 images \(attention within windows sees no whole image"):
        MergeMix(model).plan(X)
    resnet = peer("timm").create_model("resnet18", num_classes=5)
    with pytest.raises(ValueError, match="TransMix: the ResNet has no attention that could be found"):
        TransMix(resnet)


def hugging_face(kind: str, implementation: str) -> nn.Module:
    transformers = peer("transformers")
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
        "num_labels": 5,
    }
    config = getattr(transformers, f"{kind}Config")(**small)
    cls = getattr(transformers, f"{kind}ForImageClassification")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return uneven(cls._from_config(config, attn_implementation=implementation))


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2WithRegisters"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hugging_face(kind: str, implementation: str) -> None:
    model = hugging_face(kind, implementation)
    twin = hugging_face(kind, "eager").eval()
    want = twin(X, output_attentions=True).attentions
    tap = AttentionTap(model, every=True)
    _, got = tap.measure(X)
    assert len(got) == len(want) == 3
    for read, theirs in zip(got, want, strict=True):
        assert torch.allclose(read, theirs, atol=1e-6)
        assert theirs.std() > 0.002
    before = {"ViT": 1, "DeiT": 2, "Dinov2WithRegisters": 5}[kind]
    assert tap.grid((32, 32), got[0].shape[-1]) == Grid(8, 8, 4, 4, before)
    model.train()
    plain = copy.deepcopy(model)
    torch.manual_seed(2)
    a = plain(X).logits
    tap.arm(images=3)
    torch.manual_seed(2)
    b = model(X).logits
    assert torch.equal(a, b)
    assert len(tap.take()) == 3


def torchvision_vit() -> nn.Module:
    return uneven(peer("torchvision.models").VisionTransformer(32, 4, 3, 4, 32, 64, num_classes=5))


def test_torchvision() -> None:
    model = torchvision_vit()
    seen = []

    def look(module: nn.MultiheadAttention, args: tuple[Tensor, ...], output: Any) -> None:
        seen.append(nn.MultiheadAttention.forward(module, *args[:3], average_attn_weights=False)[1])

    tap = AttentionTap(model, every=True)
    for part in model.modules():
        if isinstance(part, nn.MultiheadAttention):
            part.register_forward_hook(look)
    _, got = tap.measure(X)
    for read, want in zip(got, seen, strict=True):
        assert torch.allclose(read, want, atol=1e-6)
    with pytest.raises(ValueError, match="MergeMix: one of the blocks, a EncoderBlock, ran without"):
        MergeMix(model).plan(X)


class Logits(nn.Module):
    """A Hugging Face model as a loop has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm, no class token": lambda: timm_vit(**TIMM["no class token"]),
    "transformers": lambda: Logits(hugging_face("ViT", "sdpa")),
    "transformers, eager": lambda: Logits(hugging_face("DeiT", "eager")),
    "torchvision": torchvision_vit,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_every_policy_trains_every_model(policy: Callable[..., Any], name: str) -> None:
    model = MODELS[name]().train()
    options = {"merge": 0.0} if policy is MergeMix and name == "torchvision" else {}
    mix, criterion = policy(model, **options), SoftCrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for low in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            mixed, target = mix(X, Y, generator=torch.Generator().manual_seed(3))
            logits = model(mixed)
            target = mix.relabel(logits, target)
            loss = criterion(logits, target)
            extra = mix.loss(criterion)
            loss = loss if extra is None else loss + extra
        assert bool(loss.isfinite())
        assert bool(((target.weights >= 0) & (target.weights <= 1)).all())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mix.after_step()
