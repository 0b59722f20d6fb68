"""Vision transformers for the tests: ours, with weights that make its attention uneven, one whose attention is given,
one that takes images of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix.models.vit import TinyViT


def tiny_vit(seed: int = 0, **kwargs: int) -> TinyViT:
    """8 x 8 patches of 4 pixels, 4 blocks, 4 heads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyViT(**{"num_classes": 5, "in_channels": 3, "image_size": 32, "dim": 16, **kwargs})
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


class GivenViT(nn.Module):
    """Blocks that attend as told, whatever they see: `attentions`, one (1 or N, heads, T, T) per block.

    T may hold other tokens before the patches; `classify` gives the logits of the tokens (N, T, 4).
    """

    def __init__(self, attentions: list[Tensor], patch: int | tuple[int, int], num_classes: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.patches = nn.Conv2d(3, 4, patch, patch)
            self.head = nn.Linear(4, num_classes)
        self.tokens = attentions[0].shape[-1]
        self.blocks = nn.ModuleList(GivenAttention(attention) for attention in attentions)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        first = tokens.new_zeros(tokens.shape[0], self.tokens - tokens.shape[1], 4)
        tokens = torch.cat([first, tokens], 1)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens[:, 0])


class GivenAttention(nn.Module):
    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.qkv = nn.Identity()
        self.register_buffer("scores", attention.log())

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scores.to(x.dtype).expand(x.shape[0], -1, -1, -1).softmax(-1)
        return (weights @ self.qkv(x)[:, None]).mean(1)


def given_attention(images: int, heads: int, tokens: int, seed: int = 0) -> Tensor:
    """(N, heads, T, T) rows that sum to one, very uneven."""
    scores = torch.randn(images, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return (3.0 * scores).softmax(-1)


class AnyViT(nn.Module):
    """Patches of 4 pixels, a class token, no positions: an image of any size from 4 x 4 on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(AnyBlock() for _ in range(3))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 0])


class AnyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = AnyAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class AnyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # 2 heads
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
