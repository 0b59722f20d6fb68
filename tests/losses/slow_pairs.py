"""Losses of image-text pairs as they read: every mixture a vector of its own, every sum a loop, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Inputs and results to 17 digits of CLIP, m2-, V-, L- and VL-Mix; computed twice in float64 and once with 60 digits.
VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "m2mix_vectors.json").read_text("utf-8"))


def unit_rows(x: Tensor) -> list[Tensor]:
    return [row / row.norm() for row in x.double()]


def arc(p: Tensor, q: Tensor, lam: float) -> Tensor:
    """The point that divides the arc from p (lam = 1) to q (lam = 0); equal directions have none to divide."""
    angle = torch.acos(p @ q)
    if not float(angle.detach()) > 0.0:
        return lam * p + (1 - lam) * q
    return (torch.sin(lam * angle) * p + torch.sin((1 - lam) * angle) * q) / torch.sin(angle)


def log_sum(values: list[Tensor]) -> Tensor:
    top = max(float(value.detach()) for value in values)
    return sum(((value - top).exp() for value in values), torch.zeros((), dtype=torch.float64)).log() + top


def entropy(logits: list[Tensor], target: dict[int, float]) -> Tensor:
    """Cross entropy of one row of logits with a target {place: share}; shares need not sum to 1."""
    total = log_sum(logits)
    return sum((share * (total - logits[j]) for j, share in target.items()), torch.zeros((), dtype=torch.float64))


def clip_rows(images: Tensor, texts: Tensor, scale: Tensor | float) -> list[Tensor]:
    a, b = unit_rows(images), unit_rows(texts)
    return [
        0.5 * entropy([scale * (a[i] @ y) for y in b], {i: 1.0})
        + 0.5 * entropy([scale * (b[i] @ x) for x in a], {i: 1.0})
        for i in range(len(a))
    ]


def m2_rows(
    images: Tensor, texts: Tensor, scale: Tensor | float, lam: list[float], replace: str = "negatives"
) -> list[Tensor]:
    a, b = unit_rows(images), unit_rows(texts)
    n = len(a)
    m = [arc(a[j], b[j], lam[j]) for j in range(n)]
    losses = []
    for i in range(n):
        sides = []
        for anchor, other in ((a, b), (b, a)):
            keys = [m[j] if replace != "positives" else other[j] for j in range(n)]
            keys[i] = other[i] if replace == "negatives" else m[i]
            sides.append(entropy([scale * (anchor[i] @ key) for key in keys], {i: 1.0}))
        losses.append(0.5 * (sides[0] + sides[1]))
    return losses


def unimodal_rows(
    images: Tensor,
    texts: Tensor,
    scale: Tensor | float,
    lam: list[float],
    mix: str,
    target: str,
    negatives: str = "mixed",
) -> list[Tensor]:
    a, b = unit_rows(images), unit_rows(texts)
    n = len(a)
    v = [arc(a[i], a[n - 1 - i], lam[i]) for i in range(n)] if mix in ("image", "joint") else a
    t = [arc(b[i], b[n - 1 - i], lam[i]) for i in range(n)] if mix in ("text", "joint") else b
    logits = [
        [scale * (v[i] @ t[j] if negatives == "mixed" or j in (i, n - 1 - i) else a[i] @ b[j]) for j in range(n)]
        for i in range(n)
    ]
    losses = []
    for i in range(n):
        r = n - 1 - i
        shares: dict[int, float] = {}
        if target == "identity":
            pairs = [(i, 1.0)]
        else:
            pairs = [(i, 1.0), (r, 1.0)] if target == "code" else [(i, lam[i]), (r, 1 - lam[i])]
        for j, share in pairs:
            shares[j] = shares.get(j, 0.0) + share
        losses.append(0.5 * entropy(logits[i], shares) + 0.5 * entropy([row[i] for row in logits], shares))
    return losses


def sigmoid_rows(images: Tensor, texts: Tensor, scale: float, bias: float, lam: list[float] | None) -> list[Tensor]:
    """Row i of SigLIP, or with `lam` of its m2 form: half of what an image and half of what a text has with others."""
    a, b = unit_rows(images), unit_rows(texts)
    n = len(a)

    def told(z: Tensor, sign: int) -> Tensor:
        return -torch.log(1 / (1 + torch.exp(-sign * z)))

    losses = []
    for i in range(n):
        loss = told(scale * (a[i] @ b[i]) + bias, 1)
        for j in range(n):
            if j != i:
                keys = (b[j], a[j]) if lam is None else (arc(a[j], b[j], lam[j]),) * 2
                for anchor, key in ((a[i], keys[0]), (b[i], keys[1])):
                    loss = loss + 0.5 * told(scale * (anchor @ key) + bias, -1)
        losses.append(loss)
    return losses


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


def cloud(n: int, d: int, seed: int, *, pull: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pairs that resemble each other as those of a trained model do."""
    g = torch.Generator().manual_seed(seed)
    own, image, text = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(3))
    return pull * own + image, pull * own + text + math.pi / 5
