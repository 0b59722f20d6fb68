"""Corruptions against numpy loops, and what holds for all of them: range, dtype, growth, determinism."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from hardmix.metrics.corruptions import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    CORRUPTIONS,
    JPEG,
    NOISE,
    PIXELATE,
    SEVERITIES,
    corrupt,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int = 3, side: int = 32, count: int = 4) -> torch.Tensor:
    """Smooth shapes with edges: what pixelation and JPEG are made for. uint8."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows = []
    for i in range(count):
        disc = ((y - side / 2 - i) ** 2 + (x - side / 2) ** 2 < (side / 3) ** 2).float()
        wave = 0.5 + 0.3 * torch.sin(2 * math.pi * (x + (i + 1) * y) / side)
        rows.append(torch.stack([0.6 * wave + 0.3 * disc * (c + 1) / channels for c in range(channels)]))
    return (torch.stack(rows).clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_dtype_range_and_input_are_kept(name, dtype):
    for x in (pictures(1, 28), pictures(3, 32, 1), pictures(2, 16), pictures(3, 32)[:, :, :20]):
        x = x if dtype == torch.uint8 else (x / 255.0).to(dtype)
        before = x.clone()
        for severity in (1, 5):
            out = corrupt(x, name, severity, generator=gen())
            assert (out.shape, out.dtype) == (x.shape, x.dtype)
            assert torch.equal(x, before)
            assert bool(torch.isfinite(out.float()).all())
            assert 0.0 <= float(out.min()) <= float(out.max()) <= (255.0 if dtype == torch.uint8 else 1.0)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [28, 32, 64, 96])
def test_damage_grows_with_severity(name, side):
    x = pictures(3, side)
    distance = [
        (corrupt(x, name, severity, generator=gen()).float() - x.float()).square().mean().item()
        for severity in SEVERITIES
    ]
    assert distance == sorted(distance)
    assert distance[0] > 0
    assert distance[4] > 2 * distance[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_deterministic_and_channels_last_gives_the_same(name):
    x = pictures()
    first = corrupt(x, name, 3, generator=gen(7))
    assert torch.equal(first, corrupt(x, name, 3, generator=gen(7)))
    assert torch.equal(first, corrupt(x.contiguous(memory_format=torch.channels_last), name, 3, generator=gen(7)))
    if name != "gaussian-noise":  # the others draw nothing, so a part of the batch is a part of the result
        assert torch.equal(first[1:3], corrupt(x[1:3], name, 3))
    else:
        assert not torch.equal(first, corrupt(x, name, 3, generator=gen(8)))


def test_noise_has_its_strength():
    x = torch.full((8, 3, 64, 64), 0.5)
    for severity in SEVERITIES[:3]:  # stronger noise is clamped
        noise = corrupt(x, "gaussian-noise", severity, generator=gen()) - x
        assert noise.std().item() == pytest.approx(NOISE[severity - 1], rel=0.02)
        assert abs(noise.mean().item()) < 0.002


@pytest.mark.parametrize("shape", [(32, 32), (28, 28), (9, 20), (3, 3)])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_blur_equals_the_loop(shape, severity):
    x = torch.rand(1, 1, *shape, generator=gen(), dtype=torch.float64)
    height, width = shape
    sigma = BLUR[severity - 1] * max(shape) / 32
    reach = max(1, round(3 * sigma))
    weights = [math.exp(-((d / sigma) ** 2) / 2) for d in range(-reach, reach + 1)]
    want = np.zeros(shape)
    for i in range(height):
        for j in range(width):
            total = 0.0
            for a, u in enumerate(weights):
                for b, v in enumerate(weights):
                    row = min(max(i + a - reach, 0), height - 1)
                    column = min(max(j + b - reach, 0), width - 1)
                    total += u * v * float(x[0, 0, row, column])
            want[i, j] = total / sum(weights) ** 2
    np.testing.assert_allclose(corrupt(x, "gaussian-blur", severity)[0, 0].numpy(), want, rtol=1e-10)


def test_brightness_and_contrast_by_hand():
    x = torch.tensor([0.0, 0.2, 0.4, 1.0], dtype=torch.float64).view(1, 1, 2, 2)  # mean 0.4
    for severity in SEVERITIES:
        bright = corrupt(x, "brightness", severity).flatten().tolist()
        assert bright == pytest.approx([min(1.0, v + BRIGHTNESS[severity - 1]) for v in (0.0, 0.2, 0.4, 1.0)])
        pale = corrupt(x, "contrast", severity).flatten().tolist()
        assert pale == pytest.approx([0.4 + CONTRAST[severity - 1] * (v - 0.4) for v in (0.0, 0.2, 0.4, 1.0)])
    two = torch.stack([x[0, 0], x[0, 0] / 2])[None]  # each channel keeps its own mean
    assert corrupt(two, "contrast", 5).mean((2, 3)).flatten().tolist() == pytest.approx([0.4, 0.2])


def test_pixelate_by_hand():
    x = torch.arange(64, dtype=torch.float64).view(1, 1, 8, 8) / 64
    assert PIXELATE[4] == 0.25
    out = corrupt(x, "pixelate", 5)[0, 0]
    for i in (0, 4):
        for j in (0, 4):
            block = x[0, 0, i : i + 4, j : j + 4]
            assert torch.allclose(out[i : i + 4, j : j + 4], block.mean().expand(4, 4), atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_writes_and_reads(channels, monkeypatch):
    x = pictures(channels, 28)
    qualities = []
    original = Image.Image.save

    def spy(self, stream, kind=None, **options):
        qualities.append((kind, options["quality"]))
        return original(self, stream, kind, **options)

    monkeypatch.setattr(Image.Image, "save", spy)
    for severity in SEVERITIES:
        qualities.clear()
        out = corrupt(x, "jpeg", severity)
        assert qualities == [("JPEG", JPEG[severity - 1])] * len(x)
        for row in range(len(x)):
            stream = io.BytesIO()
            array = x[row].permute(1, 2, 0).numpy()
            original(
                Image.fromarray(array if channels == 3 else array[..., 0]), stream, "JPEG", quality=JPEG[severity - 1]
            )
            assert stream.getvalue()[:2] == b"\xff\xd8"
            want = np.asarray(Image.open(stream)).reshape(28, 28, channels)
            np.testing.assert_array_equal(out[row].permute(1, 2, 0).numpy(), want)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: corrupt(x, "fog", 1), ValueError, "name is 'fog'; pass one of 'gaussian-noise'"),
        (lambda x: corrupt(x, "gaussian-nose", 1), ValueError, 'did you mean "gaussian-noise"'),
        (lambda x: corrupt(x, "jpeg", 0), ValueError, "severity is 0; pass 1, 2, 3, 4 or 5"),
        (lambda x: corrupt(x, "jpeg", 6), ValueError, "severity is 6"),
        (lambda x: corrupt(x[0], "jpeg", 1), ValueError, r"images has shape \(3, 32, 32\)"),
        (lambda x: corrupt(x.long(), "jpeg", 1), TypeError, "images has dtype torch.int64"),
        (lambda x: corrupt(x.numpy(), "jpeg", 1), TypeError, "images is a ndarray"),
        (lambda x: corrupt(x, "jpeg", 1, generator=3), TypeError, "generator is a int"),
    ],
)
def test_bad_inputs_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call(pictures())
