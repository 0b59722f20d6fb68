"""AttentionTap: what it reads, that the model does not notice, and how patches are laid out."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import compiling
from hardmix.mixing.attention import AttentionTap, Grid
from hardmix.mixing.attention_policy import patch_share, pixel_share
from mixing.cases import rng
from mixing.vits import GivenViT, given_attention, tiny_vit

X = torch.randn(3, 3, 32, 32, generator=rng())


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed))


class Layer(nn.Module):
    """One self-attention on tokens (N, T, 8) with two heads; `attend(q, k, v)` is what a test is about."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], key_heads: int = 2) -> None:
        super().__init__()
        self.attend, self.key_heads = attend, key_heads
        self.q, self.k, self.v = (nn.Linear(8, 4 * heads) for heads in (2, key_heads, key_heads))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.heads(x)).transpose(1, 2).flatten(2)


def slow_weights(
    q: Tensor, k: Tensor, scale: float, allowed: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q k + bias) in float64, one query at a time."""
    q, k = q.double(), k.double()
    out = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = torch.stack(
                    [scale * (q[n, h, i] @ k[n, h * k.shape[1] // q.shape[1], j]) for j in range(k.shape[2])]
                )
                if bias is not None:
                    scores = scores + bias[i].double()
                if allowed is not None:
                    scores = torch.where(allowed[i], scores, -torch.inf)
                out[n, h, i] = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
    return out


@pytest.mark.parametrize("every", [False, True])
def test_reads_the_tiny_vit(every: bool) -> None:
    model = tiny_vit()
    tap = AttentionTap(model, every=every)
    tap.arm(images=3)
    model(X)
    got = tap.take()
    _, want = model.forward_with_attention(X)
    assert len(got) == (4 if every else 1)
    for a, b in zip(got, want if every else want[-1:], strict=True):
        assert a.shape == (3, 4, 65, 65)
        assert torch.allclose(a, b, atol=1e-6)
    assert want[-1].std() > 0.02  # a test on a flat map would show nothing
    assert not torch.allclose(want[0], want[-1], atol=1e-3)


def test_a_layer_by_name() -> None:
    model = tiny_vit()
    tap = AttentionTap(model, layer="stage2.blocks.0")
    _, (got,) = tap.measure(X)
    assert torch.allclose(got, model.forward_with_attention(X)[1][2], atol=1e-6)
    assert tap.names == ["stage2.blocks.0"]


MASK = numbers((5, 5), 3) > -0.5
MASK[:, 0] = True
BIAS = numbers((5, 5), 4)
FUSED: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "plain": ({}, {}, 0.5),
    "scale": ({"scale": 0.1}, {}, 0.1),
    "bool mask": ({"attn_mask": MASK}, {"allowed": MASK}, 0.5),
    "added mask": ({"attn_mask": BIAS}, {"bias": BIAS}, 0.5),
    "mask of keys": ({"attn_mask": BIAS[:1]}, {"bias": BIAS[:1].expand(5, 5)}, 0.5),
    "causal": ({"is_causal": True}, {"allowed": torch.ones(5, 5).tril() > 0}, 0.5),
    "grouped": ({"enable_gqa": True}, {}, 0.5),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("queries", [None, 1])
def test_arguments_of_the_fused_kernel(name: str, queries: int | None) -> None:
    given, slow, scale = FUSED[name]
    layer = Layer(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given), 1 if name == "grouped" else 2)
    x = numbers((2, 5, 8))
    _, (got,) = AttentionTap(layer).measure(x, keep=lambda attention: attention.weights(queries))
    with torch.no_grad():
        q, k, _ = layer.heads(x)
    want = slow_weights(q, k, scale, **slow)[:, :, :queries]
    assert torch.allclose(got.double(), want, atol=1e-6)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v,
        lambda q, k, v: torch.softmax(q * 0.5 @ k.transpose(2, 3), dim=-1) @ v,
        lambda q, k, v: F.softmax(torch.matmul(q, k.mT) * 0.5, dim=-1, dtype=torch.float32) @ v,
        lambda q, k, v: F.dropout(nn.Softmax(-1)(torch.einsum("nhid,nhjd->nhij", q, k) * 0.5), 0.5, True) @ v,
    ],
)
def test_without_a_fused_kernel(attend: Callable[..., Tensor]) -> None:
    layer = Layer(attend)
    x = numbers((2, 5, 8))
    _, (got,) = AttentionTap(layer).measure(x)
    with torch.no_grad():
        q, k, _ = layer.heads(x)
    assert torch.allclose(got.double(), slow_weights(q, k, 0.5), atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_s_own_attention(batch_first: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            return self.attention(x, x, x, need_weights=False)[0]

    net, x = Net(), numbers((3, 5, 8))
    tap = AttentionTap(net)
    tap.arm(images=3)
    net(x)
    (got,) = tap.take()
    y = x if batch_first else x.transpose(0, 1)
    want = net.attention.eval()(y, y, y, need_weights=True, average_attn_weights=False)[1]
    assert torch.allclose(got, want, atol=1e-6)


class Noisy(nn.Module):
    """An attention that draws and counts before it attends: dropout first, then a batch norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop(x).flatten(0, 1)).view_as(x)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)
        return F.dropout(self.out(x.transpose(1, 2).flatten(2)).mean(1), 0.5, self.training)


def test_the_model_does_not_notice() -> None:
    """Outputs, gradients, statistics and what is drawn next are bit for bit those of a model without a tap."""
    x = numbers((4, 6, 8))
    results = []
    for tapped in (False, True):
        net = Noisy()
        if tapped:
            tap = AttentionTap(net)
            tap.arm()
        torch.manual_seed(7)
        out = net(x)
        after = torch.rand(3)
        out.square().sum().backward()
        results.append([out, after, *[p.grad for p in net.parameters()], *net.buffers()])
        assert net.norm.training
        assert net.norm.track_running_stats
        assert net.drop.training
    for plain, read in zip(*results, strict=True):
        assert torch.equal(plain, read)
    assert len(tap.take()) == 1


def test_a_batch_norm_normalises_by_the_batch_when_read() -> None:
    net = Noisy()
    net.drop.p = 0.0
    x = numbers((4, 6, 8))
    tap = AttentionTap(net)
    tap.arm()
    net(x)
    (got,) = tap.take()
    with torch.no_grad():
        mean, var = x.flatten(0, 1).mean(0), x.flatten(0, 1).var(0, unbiased=False)
        q, k, _ = net.qkv((x - mean) / (var + 1e-5).sqrt()).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    assert torch.allclose(got.double(), slow_weights(q, k, 0.5), atol=1e-5)


def test_measuring_leaves_everything_as_it_is() -> None:
    net = Noisy()
    net.norm.eval()  # a part that is frozen stays frozen
    net(numbers((4, 6, 8))).sum().backward()
    before = [p.grad.clone() for p in net.parameters()] + [b.clone() for b in net.buffers()]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    flags = [part.training for part in net.modules()]
    x = numbers((4, 6, 8), 1).requires_grad_()
    out, (got,) = AttentionTap(net).measure(x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == [part.training for part in net.modules()]
    for old, new in zip(before, [p.grad for p in net.parameters()] + list(net.buffers()), strict=True):
        assert torch.equal(old, new)
    assert x.grad is None
    assert not out.requires_grad
    assert not got.requires_grad
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(out, net.eval()(x.detach()))


def test_modes_come_back_when_the_model_fails() -> None:
    model = tiny_vit()
    tap = AttentionTap(model)
    with pytest.raises(ValueError, match="TinyViT: x has spatial size"):
        tap.measure(X[:, :, :16])
    assert all(part.training for part in model.modules())
    assert not tap.armed


def test_reads_once_and_only_in_training() -> None:
    model = tiny_vit()
    tap = AttentionTap(model)
    model(X)
    assert tap.take() == []
    tap.arm(images=3)
    model.eval()(X)
    assert tap.armed
    model.train()(X)
    assert not tap.armed
    model(X)
    assert len(tap.take()) == 1
    assert tap.take() == []  # given out once
    tap.arm()
    tap.disarm()
    model(X)
    assert tap.take() == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_read_once(reentrant: bool) -> None:
    model = tiny_vit()
    tap = AttentionTap(model)
    tap.arm(images=3)
    out = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
    out.sum().backward()
    (got,) = tap.take()
    assert torch.allclose(got, tiny_vit().forward_with_attention(X)[1][-1], atol=1e-6)


def test_nothing_is_kept_alive() -> None:
    model = tiny_vit()
    tap = AttentionTap(model, every=True)
    tap.arm()
    x = X.clone().requires_grad_()
    out = model(x)
    assert all(not kept.requires_grad for kept in tap.take())
    gone = weakref.ref(x)
    del x, out
    gc.collect()
    assert gone() is None
    hooked = weakref.ref(tap)
    del tap
    gc.collect()
    assert hooked() is None
    assert torch.equal(model(X), tiny_vit()(X))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast(low: torch.dtype) -> None:
    want = tiny_vit().forward_with_attention(X)[1][-1]
    outs = []
    for tapped in (False, True):
        model = tiny_vit()
        tap = AttentionTap(model)
        with torch.autocast("cpu", dtype=low):
            if tapped:
                tap.measure(X, autocast=low)
                tap.arm(images=3)
            out = model(X)
            out.float().sum().backward()
        outs.append([out, *[p.grad for p in model.parameters()]])
    for plain, read in zip(*outs, strict=True):
        assert torch.equal(plain, read)
    (got,) = tap.take()
    assert got.dtype == torch.float32
    assert torch.allclose(got.sum(-1), torch.ones(3, 4, 65), atol=1e-5)  # not rounded to the half type
    assert (got - want).abs().mean() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_measures_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype)
    out, (got,) = AttentionTap(model).measure(X)
    assert out.dtype == dtype
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got - tiny_vit().forward_with_attention(X)[1][-1]).abs().mean() < (1e-7 if dtype == torch.float64 else 5e-3)


@compiling.supported
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where the graph breaks
def test_compiled_models() -> None:
    import torch._dynamo

    model = tiny_vit()
    tap = AttentionTap(model)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(model, backend="eager")
        for seed in range(2):
            x = numbers((3, 3, 32, 32), seed)
            tap.arm(images=3)
            out = compiled(x)
            (got,) = tap.take()
            assert torch.allclose(out, model(x), atol=1e-5)
            assert torch.allclose(got, model.forward_with_attention(x)[1][-1], atol=1e-6)
            compiled(x)
            assert tap.take() == []
    torch._dynamo.reset()


def test_copies_of_the_tap_have_no_model() -> None:
    model = tiny_vit()
    tap = AttentionTap(model, layer="stage1.blocks.0")
    tap.arm()
    for twin in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
        for call in (twin.arm, lambda twin=twin: twin.measure(X), lambda twin=twin: twin.grid((32, 32))):
            with pytest.raises(
                RuntimeError, match=r"AttentionTap: this is a copy without its model; call attach\(model\)"
            ):
                call()
        twin.attach(tiny_vit())
        assert (twin.layer, twin.names) == ("stage1.blocks.0", ["stage1.blocks.0"])
        assert len(twin.measure(X)[1]) == 1
    model(X)
    assert len(tap.take()) == 1  # the original was still armed


def test_copies_of_the_model_are_not_read() -> None:
    model = tiny_vit()
    tap = AttentionTap(model)
    tap.arm()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.train()(X), tiny_vit()(X))
    replica = copy.copy(model.stage3.blocks[0])  # shares the hooks, as the replicas of DataParallel do
    replica(numbers((3, 65, 16)))
    assert tap.armed
    tap.detach()
    assert all(not part._forward_hooks for part in model.modules())
    model(X)
    assert tap.take() == []


def test_attach_moves_the_hooks() -> None:
    model, other = tiny_vit(), tiny_vit(1)
    tap = AttentionTap(model)
    tap.attach(other)
    assert all(not part._forward_hooks for part in model.modules())
    assert torch.allclose(tap.measure(X)[1][0], other.forward_with_attention(X)[1][-1], atol=1e-6)


@pytest.mark.parametrize(
    "names",
    ["qkv", "to_qkv", "Wqkv", "q k", "query key value", "q_proj k_proj", "to_q to_k", "wq wk"],
)
def test_names_by_which_an_attention_is_known(names: str) -> None:
    inner = nn.Module()
    for name in names.split():
        inner.add_module(name, nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(inner), nn.Linear(2, 2))
    assert AttentionTap(model).names == ["1.0"]


def test_refusals() -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(
        ValueError,
        match=r"AttentionTap: the Sequential has no attention that could be found \(torch's MultiheadAttention, or a "
        r"module that holds layers named qkv, .*\); pass a vision transformer, or the name of the module as layer\.",
    ):
        AttentionTap(convolutions)
    with pytest.raises(ValueError, match=r"layer names 'stage3.block.0', which the model does not have \(did you mean"):
        AttentionTap(tiny_vit(), layer="stage3.block.0")
    with pytest.raises(TypeError, match="layer is 3; pass the name of a submodule, or None"):
        AttentionTap(tiny_vit(), layer=3)
    with pytest.raises(ValueError, match="layer is 'stage1' but every block is to be read; pass one of the two"):
        AttentionTap(tiny_vit(), layer="stage1", every=True)
    with pytest.raises(TypeError, match=r"model is a dict; pass a torch\.nn\.Module"):
        AttentionTap({})
    with pytest.raises(ValueError, match="patch is 0; pass an integer of at least 1"):
        AttentionTap(tiny_vit(), patch=0)
    model = tiny_vit()
    tap = AttentionTap(model, layer="stem")
    tap.arm()
    with pytest.raises(
        ValueError, match=r"'stem', a Stem, ran without F\.scaled_dot_product_attention and without a soft"
    ):
        model(X)
    assert torch.equal(model(X), tiny_vit()(X))  # one failure does not stay
    spare = nn.Sequential(tiny_vit())
    spare.add_module("spare", nn.Module())
    spare.spare.qkv = nn.Linear(2, 2)
    spare.forward = spare[0].forward
    with pytest.raises(
        RuntimeError, match="the forward of the Sequential did not run 'spare'; name the attention module"
    ):
        AttentionTap(spare).measure(X)


def test_windows_are_refused() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Layer(F.scaled_dot_product_attention)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x.unflatten(1, (2, -1)).flatten(0, 1))

    with pytest.raises(
        ValueError, match=r"the attention of 'attention' has 6 rows for 3 images \(attention within windows"
    ):
        AttentionTap(Windows()).measure(numbers((3, 4, 8)))


class Bare(nn.Module):
    """Something with an attention and no patch embedding."""

    def __init__(self, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem
        self.qkv = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("size", "tokens", "grid"),
    [
        ((224, 224), 197, Grid(14, 14, 16, 16, 1)),
        ((224, 224), 196, Grid(14, 14, 16, 16, 0)),
        ((224, 224), 198, Grid(14, 14, 16, 16, 2)),  # distilled
        ((224, 224), 261, Grid(16, 16, 14, 14, 5)),  # class token and four registers
        ((224, 224), 50, Grid(7, 7, 32, 32, 1)),
        ((64, 128), 129, Grid(8, 16, 8, 8, 1)),
        ((48, 32), 24, Grid(6, 4, 8, 8, 0)),
        ((32, 32), 2, Grid(1, 1, 32, 32, 1)),
    ],
)
def test_grid_from_the_number_of_tokens(size: tuple[int, int], tokens: int, grid: Grid) -> None:
    assert AttentionTap(Bare()).grid(size, tokens) == grid


@pytest.mark.parametrize(
    ("size", "tokens", "grid"),
    [
        ((224, 224), None, Grid(14, 14, 16, 16, 0)),
        ((224, 224), 196, Grid(14, 14, 16, 16, 0)),
        ((224, 224), 205, Grid(14, 14, 16, 16, 9)),
        ((230, 250), 14 * 15 + 1, Grid(14, 15, 16, 16, 1)),  # pixels beyond the last whole patch
        ((224, 224), 49, Grid(7, 7, 32, 32, 0)),  # a later stage
    ],
)
def test_grid_from_the_patch_embedding(size: tuple[int, int], tokens: int | None, grid: Grid) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1), nn.Conv2d(3, 4, 1, 1), nn.Conv2d(3, 4, 16, 16))
    assert AttentionTap(Bare(stem)).grid(size, tokens) == grid


def test_grid_of_a_given_patch() -> None:
    tap = AttentionTap(Bare(), patch=8)
    assert tap.grid((32, 40)) == Grid(4, 5, 8, 8, 0)
    assert tap.grid((32, 40), 23) == Grid(4, 5, 8, 8, 3)
    with pytest.raises(
        ValueError,
        match=r"the patches of a 32 x 40 image with 12 tokens can't be told for patch=8; pass patch, the side",
    ):
        tap.grid((32, 40), 12)
    for size, tokens in (((32, 40), 38), ((32, 32), None)):
        with pytest.raises(ValueError, match=r"can't be told; pass patch, the side of a patch in pixels\."):
            AttentionTap(Bare()).grid(size, tokens)


def test_maps_of_patches_against_loops() -> None:
    attention = given_attention(2, 3, 2 + 12)
    size = (24, 32)  # 3 x 4 patches of 8, after two other tokens
    tap = AttentionTap(GivenViT([attention], 8))
    grid = tap.grid(size, 14)
    assert grid == Grid(3, 4, 8, 8, 2)
    for by_patches in (False, True):
        _, (got,) = tap.measure(
            torch.rand(2, 3, *size), keep=lambda a, p=by_patches: tap.patch_map(a, grid, by_patches=p)
        )
        assert got.shape == (2, 3, 4)
        for n in range(2):
            for r in range(3):
                for c in range(4):
                    rows = range(2, 14) if by_patches else [0]
                    want = sum(float(attention[n, h, i, 2 + 4 * r + c]) for h in range(3) for i in rows) / 3 / len(rows)
                    assert float(got[n, r, c]) == pytest.approx(want, rel=1e-5)


def test_whether_there_is_a_class_token() -> None:
    model = GivenViT([given_attention(1, 1, 6)], 8)  # two tokens before four patches
    tap = AttentionTap(model)
    grid = tap.grid((16, 16), 6)
    assert tap.has_class_token(grid)
    assert not tap.has_class_token(grid._replace(prefix=0))
    model.cls_token = None  # as timm says of a model that only has registers
    assert not tap.has_class_token(grid)
    x = torch.rand(1, 3, 16, 16)
    _, (got,) = tap.measure(x, keep=lambda a: tap.patch_map(a, grid))
    _, (want,) = tap.measure(x, keep=lambda a: tap.patch_map(a, grid, by_patches=True))
    assert torch.equal(got, want)


def test_patches_of_a_class_attention_are_refused() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :1], k, v))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    tap = AttentionTap(Pool())
    x = numbers((2, 5, 8))
    grid = Grid(2, 2, 4, 4, 1)
    assert tap.measure(x, keep=lambda a: tap.patch_map(a, grid))[1][0].shape == (2, 2, 2)
    with pytest.raises(
        ValueError, match="'layer' attends from 1 tokens to 5, but what the patches attend to is wanted"
    ):
        tap.measure(x, keep=lambda a: tap.patch_map(a, grid, by_patches=True))


def test_shares_of_patches_and_pixels() -> None:
    grid = Grid(2, 3, 4, 5)
    own = torch.rand(2, 2, 3, generator=rng())
    pixels = pixel_share(own, grid, (9, 17))
    assert pixels.shape == (2, 1, 9, 17)
    assert bool((pixels[:, :, 8:] == 1).all())
    assert bool((pixels[:, :, :, 15:] == 1).all())
    assert torch.equal(pixels[:, 0, 4, 9], own[:, 1, 1])
    assert torch.allclose(patch_share(pixels, grid), own)
    mask = torch.zeros(1, 1, 8, 15)
    mask[:, :, :2, :5] = 1.0  # half of one patch
    assert torch.equal(patch_share(mask, grid)[0], torch.tensor([[0.5, 0, 0], [0, 0, 0]]))
