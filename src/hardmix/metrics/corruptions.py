"""Everyday damage to an image, in five strengths: noise, blur, brightness, contrast, JPEG, pixelation.

The kinds follow Hendrycks and Dietterich 2019 (arXiv:1903.12261); the strengths are our own, chosen for images of 28
to 64 pixels (the originals are for 224), so figures can't be compared with published ones. Own code, because the
packages at hand don't fit: imagenet-c takes 224-pixel RGB only and medmnistc pins MedMNIST, both need ImageMagick and
OpenCV, and kornia has no fixed strengths and only an approximation of JPEG. The arithmetic is a few lines of torch, and
JPEG is Pillow's.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.mixing.draw import cpu_generator

SEVERITIES = (1, 2, 3, 4, 5)
#: standard deviation of the noise that is added to values in 0..1
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)
#: standard deviation of the blur, in pixels of an image 32 pixels wide; it grows with the image
BLUR = (0.5, 0.75, 1.0, 1.4, 2.0)
#: added to values in 0..1
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
#: share of the distance from the channel's mean that is left
CONTRAST = (0.75, 0.55, 0.4, 0.25, 0.15)
#: Pillow's quality
JPEG = (50, 30, 18, 10, 5)
#: share of the side that is left before the image is enlarged again
PIXELATE = (0.8, 0.65, 0.45, 0.35, 0.25)


def corrupt(images: Tensor, name: str, severity: int, *, generator: Generator | None = None) -> Tensor:
    """Damage a batch.

    gaussian-noise  x + s n,  n ~ N(0, 1) for each value
    gaussian-blur   Gaussian filter of width s side / 32, border pixels repeated
    brightness      x + s
    contrast        m + s (x - m),  m the mean of the image's channel
    jpeg            encoded and decoded by Pillow at quality s (its default chroma subsampling)
    pixelate        shrunk to s of each side by averaging, enlarged by repeating (averaging where a pixel straddles two)

    Args:
        images: (N, C, H, W) uint8, or floats in 0..1. Never written.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5, the row of the table above this function.
        generator: CPU generator; only the noise draws.
    Returns:
        A batch like `images`, in the same range: floats are clamped to 0..1, uint8 is rounded. JPEG rounds floats to
        256 levels first. With channels other than 1 or 3 each channel is a grey JPEG of its own.
    Raises:
        ValueError: an unknown name, a severity outside 1..5, another rank. TypeError: another dtype.
    """
    who = "corrupt"
    images = _check.batch(who, "images", images, 4, 4)
    _check.choice(who, "name", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise ValueError(f"{who}: severity is {_check.shown(severity)}; pass 1, 2, 3, 4 or 5.")
    cpu_generator(who, generator)
    change, strengths = CORRUPTIONS[name]
    if images.dtype == torch.uint8:
        damaged = change(images.to(torch.float32) / 255.0, strengths[severity - 1], generator)
        return (damaged.clamp(0.0, 1.0) * 255.0).round_().to(torch.uint8)
    if not images.is_floating_point():
        raise TypeError(f"{who}: images has dtype {images.dtype}; pass uint8 values or floats in 0..1.")
    damaged = change(images.detach().to(wide(images.dtype)), strengths[severity - 1], generator)
    return damaged.clamp(0.0, 1.0).to(images.dtype)


def _noise(x: Tensor, strength: float, generator: Generator | None) -> Tensor:
    # Drawn on the CPU in float32 whatever x is, so that every device and dtype sees the same noise.
    return x + strength * torch.randn(x.shape, generator=generator, dtype=torch.float32, device=CPU).to(x)


def _blur(x: Tensor, strength: float, generator: Generator | None) -> Tensor:
    sigma = strength * max(x.shape[2:]) / 32.0
    radius = max(1, round(3.0 * sigma))
    bell = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=CPU) / sigma) ** 2)
    # As two matrix products: on a CPU a convolution of single planes takes ten times as long.
    rows, columns = (_band(length, bell / bell.sum(), radius).to(x.device) for length in x.shape[2:])
    return rows @ x @ columns.mT


def _band(length: int, bell: Tensor, radius: int) -> Tensor:
    """(length, length) matrix that filters a line whose end pixels are repeated outwards."""
    padded = F.pad(torch.eye(length, dtype=bell.dtype, device=CPU)[:, None], (radius, radius), mode="replicate")
    return F.conv1d(padded, bell.view(1, 1, -1))[:, 0].mT


def _brightness(x: Tensor, strength: float, generator: Generator | None) -> Tensor:
    return x + strength


def _contrast(x: Tensor, strength: float, generator: Generator | None) -> Tensor:
    return torch.lerp(x.mean((2, 3), keepdim=True), x, strength)


def _jpeg(x: Tensor, strength: float, generator: Generator | None) -> Tensor:
    import numpy as np
    from PIL import Image

    planes = x if x.shape[1] == 3 else x.reshape(-1, 1, *x.shape[2:])
    pixels = (planes.clamp(0.0, 1.0) * 255.0).round().to("cpu", torch.uint8).movedim(1, -1).contiguous().numpy()
    decoded = []
    for picture in pixels:
        stream = io.BytesIO()
        Image.fromarray(picture if picture.shape[2] == 3 else picture[..., 0]).save(
            stream, "JPEG", quality=int(strength)
        )
        decoded.append(np.asarray(Image.open(stream)))
    back = torch.from_numpy(np.stack(decoded).reshape(pixels.shape)).movedim(-1, 1)
    return (back.to(x) / 255.0).reshape(x.shape)


def _pixelate(x: Tensor, strength: float, generator: Generator | None) -> Tensor:
    height, width = x.shape[2:]
    small = (max(1, round(strength * height)), max(1, round(strength * width)))
    return F.interpolate(F.interpolate(x, size=small, mode="area"), size=(height, width), mode="area")


#: name -> (function, its five strengths)
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, Generator | None], Tensor], tuple[float, ...]]] = {
    "gaussian-noise": (_noise, NOISE),
    "gaussian-blur": (_blur, BLUR),
    "brightness": (_brightness, BRIGHTNESS),
    "contrast": (_contrast, CONTRAST),
    "jpeg": (_jpeg, JPEG),
    "pixelate": (_pixelate, PIXELATE),
}
