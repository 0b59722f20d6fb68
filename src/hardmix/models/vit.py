"""A vision transformer small enough for a CPU, whose attention the token-based policies can read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix.models import layers


class TinyViT(nn.Module):
    """Pre-norm vision transformer: patches, a class token, learned positions, `depth` blocks, a classifier.

    The blocks are shared out over stage1, stage2 and stage3. Reference: Dosovitskiy et al. 2021 (arXiv:2010.11929).

    Args:
        num_classes: C; 0 leaves the classifier out and returns the normalised class token (N, dim).
        in_channels: channels of the images.
        image_size: side of the images; `patch` has to divide it.
        dim: width of a token.
        depth: number of blocks, at least 3.
        heads: attention heads; they have to divide `dim`.
        patch: side of a patch; the model sees T = (image_size / patch)^2 + 1 tokens, the class token first.

    Shapes: (N, in_channels, image_size, image_size) -> (N, C). N = 1 is like any other batch: no batch statistics.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int = 4,
    ) -> None:
        super().__init__()
        who = "TinyViT"
        layers.sizes(who, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        _check.integer(who, "dim", dim, 1)
        _check.integer(who, "depth", depth, 3)
        if dim % _check.integer(who, "heads", heads, 1):
            raise ValueError(f"{who}: heads is {heads} but dim is {dim}; pass a number of heads that divides dim.")
        if image_size % _check.integer(who, "patch", patch, 1):
            raise ValueError(f"{who}: patch is {patch} but image_size is {image_size}; pass a patch that divides it.")
        self.in_channels = in_channels
        self.image_size = image_size
        self.num_features = dim
        self.grid = image_size // patch
        self.stem = Stem(in_channels, dim, patch, self.grid**2)
        shares = [depth // 3 + (k < depth % 3) for k in range(3)]
        self.stage1, self.stage2, self.stage3 = (Stage(dim, heads, share) for share in shares)
        self.head = ClassTokenHead(dim, num_classes)
        self.apply(_initialise)

    def forward_features(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        """The tokens after the last block, (N, T, dim); each block's attention is appended to `attentions` if given."""
        x = layers.images("TinyViT", x, self.in_channels)
        side = self.image_size
        if x.shape[2:] != (side, side):
            raise ValueError(
                f"TinyViT: x has spatial size {tuple(x.shape[2:])}; pass the {side} x {side} it was built for."
            )
        x = self.stem(x)
        for stage in (self.stage1, self.stage2, self.stage3):
            x = stage(x, attentions)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits, attentions): the logits of `forward` and the attention of every block, first block first.

        Each attention is (N, heads, T, T) with rows that sum to 1; `attentions[-1][:, :, 0, 1:]` is what the class
        token of the last block takes from each patch, row by row of the `grid` x `grid` patches. Part of the graph.
        """
        attentions: list[Tensor] = []
        tokens = self.forward_features(x, attentions)
        return self.head(tokens), attentions


class Stem(nn.Module):
    """Patches to tokens, the class token in front, positions added: (N, C, H, W) -> (N, T, dim)."""

    def __init__(self, in_channels: int, dim: int, patch: int, patches: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + patches, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # (N, T - 1, dim)
        first = self.class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([first, tokens], 1) + self.positions


class Stage(nn.Module):
    """Some blocks in a row. A module of its own, so that a hook on it sees the tokens with and without attention."""

    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, attentions)
        return x


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with a hidden layer of 2 dim."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, dim / heads)
        if attentions is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            # The fused kernel does not hand out its weights.
            attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            attentions.append(attention)
            mixed = attention.to(v.dtype) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return x + self.mlp(self.norm2(x))


class ClassTokenHead(nn.Module):
    """Normalised class token, then the classifier: (N, T, dim) -> (N, C), or (N, dim) with `num_classes` 0."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = layers.classifier(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x[:, 0]))


def _initialise(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02 and zero biases, the published initialisation of the transformer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Stem):
        nn.init.trunc_normal_(module.class_token, std=0.02)
        nn.init.trunc_normal_(module.positions, std=0.02)
