"""Mask generators of the learned policies: attention between the feature maps of the samples that are mixed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check

#: mode of a recipe -> mode of `interpolate`. Plain "nearest" is off by up to a pixel where the sizes aren't multiples.
UPSAMPLING = {"nearest": "nearest-exact", "bilinear": "bilinear"}


class CrossMask(nn.Module):
    """AutoMix's mask: each place of the own map collects the values of the partner's places that resemble it.

        P = softmax_j( q(f_a)_i . q(f_b)_j / sqrt d ),   m_b = sigmoid( up( P v(f_b) ) ),   m_a = 1 - m_b

    f_a carries a further channel with lam and f_b one with 1 - lam (`embed_lam`), q and v are 1 x 1 convolutions,
    d = max(D // 2, 1), and q is shared.

    Args:
        channels: D, channels of the maps.
        embed_lam: whether the maps carry lam. Without it the mask knows of lam only through what it is trained with.
        upsample: "nearest" or "bilinear".

    Shapes: own and other (N, D, h, w), lam (N,) -> (N, 1, H, W), the own share of each pixel of `size` (H, W), in the
    dtype of the weights. h = w = 1 gives one value per image. NaN in a row of maps gives NaN in that row's mask.
    Cost: N (h w)^2 d multiplications for the attention; a map of 7 to 14 cells a side is what it is meant for.
    """

    def __init__(self, channels: int, *, embed_lam: bool = True, upsample: str = "nearest") -> None:
        super().__init__()
        who = type(self).__name__
        channels = _check.integer(who, "channels", channels, 1)
        self.embed_lam = _check.boolean(who, "embed_lam", embed_lam)
        self.upsample = _check.choice(who, "upsample", upsample, UPSAMPLING)
        inputs = channels + self.embed_lam
        self.query = nn.Conv2d(inputs, max(channels // 2, 1), 1)
        self.value = nn.Conv2d(inputs, 1, 1)
        _initialise(self)

    def forward(self, own: Tensor, other: Tensor, lam: Tensor, size: tuple[int, int]) -> Tensor:
        if self.embed_lam:
            own, other = with_share(own, lam), with_share(other, 1.0 - lam)
        logits = attend(self.query(own), self.query(other), self.value(other))
        return torch.sigmoid(-enlarge(logits, size, self.upsample))


class ScaledCrossMask(nn.Module):
    """SAMix's mask: the maps are weighed by lam, and places are compared by what both images show there.

        g_a = f_a (1 + s),  g_b = f_b (2 - s),   s = (4/3 lam^3 - 2 lam^2 + k lam) / (k - 2/3),  k = 1.25
        P = softmax_j( q(g)_i . k(g)_j / sqrt d ),  g = (g_a, g_b),   m_b = sigmoid( up( P v(g_b) ) ),   m_a = 1 - m_b

    q and k are two 1 x 1 convolutions, v is convolution, GELU, convolution. Arguments, shapes and cost as `CrossMask`.
    """

    def __init__(self, channels: int, *, upsample: str = "bilinear") -> None:
        super().__init__()
        who = type(self).__name__
        channels = _check.integer(who, "channels", channels, 1)
        self.upsample = _check.choice(who, "upsample", upsample, UPSAMPLING)
        width = max(channels // 2, 1)
        self.query = nn.Conv2d(2 * channels, width, 1)
        self.key = nn.Conv2d(2 * channels, width, 1)
        self.value = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU(), nn.Conv2d(width, 1, 1))
        _initialise(self)

    def forward(self, own: Tensor, other: Tensor, lam: Tensor, size: tuple[int, int]) -> Tensor:
        share = curved_share(lam).to(own.dtype).view(-1, 1, 1, 1)
        own, other = own * (1.0 + share), other * (2.0 - share)
        both = torch.cat([own, other], 1)
        logits = attend(self.query(both), self.key(both), self.value(other))
        return torch.sigmoid(-enlarge(logits, size, self.upsample))


class JointMask(nn.Module):
    """AdAutoMix's masks of K samples: each sample's places look at all the others.

        z_i = softmax( q_i (sum_{j != i} k_j)^T / sqrt d ) v_i,   M = softmax_i( up(z_i) )

    q, k and v are 1 x 1 convolutions of the maps, which carry a further channel with their share (`embed_lam`).

    Shapes: maps (N, K, D, h, w), lam (N, K) -> (N, K, H, W) that sum to one over K, in the dtype of the weights.
    K = 1 gives ones. Arguments and cost as `CrossMask`, K times.
    """

    def __init__(self, channels: int, *, embed_lam: bool = True, upsample: str = "bilinear") -> None:
        super().__init__()
        who = type(self).__name__
        channels = _check.integer(who, "channels", channels, 1)
        self.embed_lam = _check.boolean(who, "embed_lam", embed_lam)
        self.upsample = _check.choice(who, "upsample", upsample, UPSAMPLING)
        inputs, width = channels + self.embed_lam, max(channels // 2, 1)
        self.query = nn.Conv2d(inputs, width, 1)
        self.key = nn.Conv2d(inputs, width, 1)
        self.value = nn.Conv2d(inputs, 1, 1)
        _initialise(self)

    def forward(self, maps: Tensor, lam: Tensor, size: tuple[int, int]) -> Tensor:
        rows, samples = maps.shape[:2]
        flat = maps.flatten(0, 1)  # (N K, D, h, w)
        if self.embed_lam:
            flat = with_share(flat, lam.flatten())
        key = self.key(flat).unflatten(0, (rows, samples))
        key = (key.sum(1, keepdim=True) - key).flatten(0, 1)
        logits = attend(self.query(flat), key, self.value(flat))  # (N K, 1, h, w)
        return enlarge(logits, size, self.upsample).view(rows, samples, *size).softmax(1)


def curved_share(lam: Tensor, k: float = 1.25) -> Tensor:
    """SAMix's curve (4/3 lam^3 - 2 lam^2 + k lam) / (k - 2/3): flat in the middle, 0, 1/2 and 1 stay where they are."""
    return ((4.0 / 3.0 * lam - 2.0) * lam + k) * lam / (k - 2.0 / 3.0)


def with_share(maps: Tensor, share: Tensor) -> Tensor:
    """(N, D, h, w) and (N,) -> (N, D + 1, h, w): the share as a last channel."""
    channel = share.to(maps.dtype).view(-1, 1, 1, 1).expand(-1, 1, *maps.shape[2:])
    return torch.cat([maps, channel], 1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v over the places of maps (N, d, h, w), (N, d, h, w) and (N, 1, h, w) -> (N, 1, h, w)."""
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (query, key, value))  # (N, h w, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(value)


def enlarge(logits: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(N, 1, h, w) -> (N, 1, *size), before the sigmoid or softmax, so that edges of a smooth mask stay inside."""
    return F.interpolate(logits, size=size, mode=UPSAMPLING[mode])


def _initialise(block: nn.Module) -> None:
    """He-normal weights, zero biases. Smaller ones make the attention, and so the mask, one value for a whole image
    until it has learnt to tell places apart, which takes longer than many a training."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
