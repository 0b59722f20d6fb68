"""The pieces that the convolutional backbones share."""

from __future__ import annotations

import math

from torch import Tensor, nn

from hardmix import _check

NORMS = ("batch", "group")


def sizes(who: str, *, num_classes: int, in_channels: int, image_size: int) -> None:
    """The three numbers that every backbone is built for."""
    _check.integer(who, "num_classes", num_classes, 0)
    _check.integer(who, "in_channels", in_channels, 1)
    _check.integer(who, "image_size", image_size, 1)


def images(who: str, x: Tensor, in_channels: int) -> Tensor:
    """A float batch (N, C, H, W) with the channels that the model was built for."""
    x = _check.batch(who, "x", x, 4, 4)
    if not x.is_floating_point():
        raise TypeError(f"{who}: x has dtype {x.dtype}; pass normalised floating-point images.")
    if x.shape[1] != in_channels:
        raise ValueError(f"{who}: x has {x.shape[1]} channels; pass the {in_channels} that the model was built for.")
    return x


def stem_stride(who: str, value: int | None, image_size: int) -> int:
    """The stride of the first convolution; None takes 2 from 24 pixels on.

    At 28 pixels stride 2 quarters the work of every later layer; an 8-pixel image has nothing to give away.
    """
    if value is None:
        return 2 if image_size >= 24 else 1
    return _check.integer(who, "stem_stride", value, 1)


def norm_layer(kind: str, channels: int) -> nn.Module:
    """BatchNorm, or GroupNorm with up to 8 groups for batches too small for statistics."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(channels, 8), channels)


def conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, norm: str = "batch") -> nn.Sequential:
    """Convolution without bias, He-normal over the fan-out, then its normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm_layer(norm, outputs))


def conv_norm_relu(inputs: int, outputs: int, *, stride: int = 1, norm: str = "batch") -> nn.Sequential:
    """3 x 3 convolution, normalisation, ReLU."""
    return conv_norm(inputs, outputs, stride=stride, norm=norm).append(nn.ReLU(inplace=True))


def classifier(features: int, num_classes: int) -> nn.Module:
    """The last linear layer; with `num_classes` 0 the features themselves, for embeddings."""
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


class PoolHead(nn.Module):
    """Mean over the pixels, then the classifier: (N, D, H, W) -> (N, C), or (N, D) with `num_classes` 0."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = classifier(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))
