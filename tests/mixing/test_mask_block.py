"""The mask generators against loops over rows and places, written from their definitions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.mixing.mask_block import CrossMask, JointMask, ScaledCrossMask, curved_share
from mixing.cases import rng


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    """Like the output of a ReLU: half of it zeros."""
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64).clamp(min=0)


def build(kind: type, channels: int, **options: object) -> nn.Module:
    torch.manual_seed(1)
    return kind(channels, **options).double()


def conv(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    """A 1 x 1 convolution of (D, P) columns."""
    weight, bias = layer.weight.detach().numpy()[:, :, 0, 0], layer.bias.detach().numpy()
    return weight @ x + bias[:, None]


def attend_by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(d, P), (d, P), (P,) -> (P,): place i gets the values of the places j, weighed by exp(q_i . k_j / sqrt d)."""
    out = np.empty(q.shape[1])
    for i in range(q.shape[1]):
        weight = np.array([math.exp(q[:, i] @ k[:, j] / math.sqrt(q.shape[0])) for j in range(k.shape[1])])
        out[i] = (weight * v).sum() / weight.sum()
    return out


def enlarge_by_hand(z: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """(h, w) -> size, cells and pixels being squares whose middles are compared."""
    h, w = z.shape
    out = np.empty(size)
    for y in range(size[0]):
        for x in range(size[1]):
            at_y, at_x = (y + 0.5) * h / size[0], (x + 0.5) * w / size[1]
            if mode == "nearest":
                out[y, x] = z[int(at_y), int(at_x)]
                continue
            at_y, at_x = min(max(at_y - 0.5, 0), h - 1), min(max(at_x - 0.5, 0), w - 1)
            a, b = int(at_y), int(at_x)
            s, t = at_y - a, at_x - b
            below, right = min(a + 1, h - 1), min(b + 1, w - 1)
            out[y, x] = (1 - s) * ((1 - t) * z[a, b] + t * z[a, right]) + s * (
                (1 - t) * z[below, b] + t * z[below, right]
            )
    return out


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


SIZES = [(3, 3, 12, 12), (2, 4, 7, 13), (3, 2, 5, 9), (1, 1, 4, 4)]  # h, w, H, W


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("embed", [True, False])
def test_cross_mask(size: tuple[int, ...], mode: str, embed: bool) -> None:
    h, w, *image = size
    block = build(CrossMask, 6, embed_lam=embed, upsample=mode)
    own, other, lam = maps(3, 6, h, w), maps(3, 6, h, w, seed=1), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    got = block(own, other, lam, tuple(image))
    assert got.shape == (3, 1, *image)
    for i, share in enumerate(lam.tolist()):
        a, b = own[i].flatten(1).numpy(), other[i].flatten(1).numpy()
        if embed:
            a, b = np.vstack([a, np.full(h * w, share)]), np.vstack([b, np.full(h * w, 1 - share)])
        z = attend_by_hand(conv(block.query, a), conv(block.query, b), conv(block.value, b)[0])
        partner = 1 / (1 + np.exp(-enlarge_by_hand(z.reshape(h, w), tuple(image), mode)))
        assert np.abs(got[i, 0].detach().numpy() - (1 - partner)).max() < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_scaled_cross_mask(size: tuple[int, ...], mode: str) -> None:
    h, w, *image = size
    block = build(ScaledCrossMask, 4, upsample=mode)
    own, other, lam = maps(3, 4, h, w), maps(3, 4, h, w, seed=1), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    got = block(own, other, lam, tuple(image))
    assert got.shape == (3, 1, *image)
    for i, share in enumerate(lam.tolist()):
        s = (4 / 3 * share**3 - 2 * share**2 + 1.25 * share) / (1.25 - 2 / 3)
        a, b = own[i].flatten(1).numpy() * (1 + s), other[i].flatten(1).numpy() * (2 - s)
        both = np.vstack([a, b])
        values = conv(block.value[2], gelu(conv(block.value[0], b)))[0]
        z = attend_by_hand(conv(block.query, both), conv(block.key, both), values)
        partner = 1 / (1 + np.exp(-enlarge_by_hand(z.reshape(h, w), tuple(image), mode)))
        assert np.abs(got[i, 0].detach().numpy() - (1 - partner)).max() < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("embed", [True, False])
def test_joint_mask(size: tuple[int, ...], samples: int, embed: bool) -> None:
    h, w, *image = size
    block = build(JointMask, 4, embed_lam=embed)
    x = maps(2, samples, 4, h, w)
    lam = torch.rand(2, samples, generator=rng(2), dtype=torch.float64)
    got = block(x, lam, tuple(image)).detach()
    assert got.shape == (2, samples, *image)
    assert torch.allclose(got.sum(1), torch.ones(2, *image, dtype=torch.float64))
    for row in range(2):
        columns = []
        for i in range(samples):
            columns.append(x[row, i].flatten(1).numpy())
            if embed:
                columns[i] = np.vstack([columns[i], np.full(h * w, lam[row, i].item())])
        raised = []
        for i in range(samples):
            others = [conv(block.key, columns[j]) for j in range(samples) if j != i]
            key = sum(others) if others else np.zeros((2, h * w))
            z = attend_by_hand(conv(block.query, columns[i]), key, conv(block.value, columns[i])[0])
            raised.append(np.exp(enlarge_by_hand(z.reshape(h, w), tuple(image), "bilinear")))
        for i in range(samples):
            assert np.abs(got[row, i].numpy() - raised[i] / sum(raised)).max() < 1e-12


def test_curved_share() -> None:
    lam = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = curved_share(lam)
    assert torch.allclose(s[[0, 50, 100]], torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert torch.allclose(s + s.flip(0), torch.ones_like(s))  # both images are treated alike
    assert bool((s.diff() > 0).all())
    assert s[25] == pytest.approx((4 / 3 / 64 - 2 / 16 + 1.25 / 4) / (1.25 - 2 / 3))


@pytest.mark.parametrize("kind", [CrossMask, ScaledCrossMask, JointMask])
def test_gradients_and_first_masks(kind: type) -> None:
    block = build(kind, 4)
    names = [name for name, _ in block.named_parameters()]
    lam = torch.tensor([0.3, 0.6], dtype=torch.float64)

    def run(*values: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, values, strict=True))
        if kind is JointMask:
            args = (maps(2, 2, 4, 2, 3), torch.stack([lam, 1 - lam], 1), (4, 6))
        else:
            args = (maps(2, 4, 2, 3), maps(2, 4, 2, 3, seed=1), lam, (4, 6))
        return torch.func.functional_call(block, parameters, args)

    values = [p.detach().clone().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(run, values)
    # A block that has learnt nothing yet already tells places apart.
    mask = run(*values)
    assert mask.std((2, 3)).min() > 1e-3


@pytest.mark.parametrize("kind", [CrossMask, ScaledCrossMask])
def test_rows_do_not_see_each_other(kind: type) -> None:
    block = build(kind, 5)
    own, other, lam = maps(4, 5, 3, 3), maps(4, 5, 3, 3, seed=1), torch.linspace(0, 1, 4)
    whole = block(own, other, lam, (6, 6))
    for i in range(4):
        one = block(own[i : i + 1], other[i : i + 1], lam[i : i + 1], (6, 6))
        assert torch.allclose(one[0], whole[i], atol=1e-12)
    assert torch.equal(own, maps(4, 5, 3, 3))
    bad = own.clone()
    bad[2, 0, 1, 1] = math.nan
    found = block(bad, other, lam, (6, 6)).isnan().flatten(1).any(1)
    assert found.tolist() == [False, False, True, False]


def test_one_channel_and_one_cell() -> None:
    """The smallest maps: one hidden channel, and one value for a whole image."""
    for kind in (CrossMask, ScaledCrossMask):
        mask = build(kind, 1)(maps(2, 1, 1, 1), maps(2, 1, 1, 1), torch.tensor([0.2, 0.7]), (5, 3))
        assert mask.shape == (2, 1, 5, 3)
        assert bool((mask == mask[..., :1, :1]).all())


@pytest.mark.parametrize("kind", [CrossMask, ScaledCrossMask, JointMask])
def test_refusals(kind: type) -> None:
    for bad, error in ((0, ValueError), (2.5, ValueError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=rf"{kind.__name__}: channels is {bad}; pass an integer of at least 1\."):
            kind(bad)
    with pytest.raises(ValueError, match=rf'{kind.__name__}: upsample is \'nearst\'; pass one of .*mean "nearest"'):
        kind(4, upsample="nearst")
