"""Residual networks: a small one for CPUs and ResNet-18 with the stem for 32-pixel images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix.models import layers


class BasicBlock(nn.Module):
    """relu(conv-norm-relu-conv-norm(x) + shortcut(x)); the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, norm: str) -> None:
        super().__init__()
        self.first = layers.conv_norm_relu(inputs, outputs, stride=stride, norm=norm)
        self.second = layers.conv_norm(outputs, outputs, norm=norm)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else layers.conv_norm(inputs, outputs, kernel=1, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Stem, `stages` stages of `blocks` basic blocks, mean pooling, classifier.

    Stage k has 2^(k-1) `width` channels; every stage but the first halves the map.
    Reference: He et al. 2016, sections 3.3 and 4.2 (arXiv:1512.03385), with 1 x 1 shortcuts (option B).

    Shapes: (N, in_channels, H, W) -> (N, C), or the pooled features (N, num_features) with `num_classes` 0; any
    H, W >= 1. N = 1 works in eval mode, and in training while the last map has more than one pixel.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        stem_stride: int,
        width: int,
        blocks: int,
        stages: int,
        norm: str,
        who: str = "ResNet",
    ) -> None:
        super().__init__()
        _check.integer(who, "width", width, 1)
        _check.integer(who, "blocks", blocks, 1)
        _check.choice(who, "norm", norm, layers.NORMS)
        self.who = who
        self.in_channels = in_channels
        self.stem = layers.conv_norm_relu(in_channels, width, stride=stem_stride, norm=norm)
        self.stages = tuple(f"stage{k + 1}" for k in range(stages))
        inputs = width
        for k, name in enumerate(self.stages):
            outputs = width * 2**k
            stage = nn.Sequential()
            for index in range(blocks):
                stride = 2 if k > 0 and index == 0 else 1
                stage.append(BasicBlock(inputs, outputs, stride=stride, norm=norm))
                inputs = outputs
            self.add_module(name, stage)
        self.num_features = inputs
        self.head = layers.PoolHead(inputs, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, num_features, h, w)."""
        x = self.stem(layers.images(self.who, x, self.in_channels))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def small_resnet(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: int = 16,
    blocks: int = 1,
    stem_stride: int | None = None,
    norm: str = "batch",
) -> ResNet:
    """Three stages of `width`, 2 `width` and 4 `width` channels, `blocks` basic blocks each: 6 `blocks` + 2 layers.

    Args:
        num_classes: C; 0 leaves the classifier out and returns the pooled features (N, 4 width).
        in_channels: channels of the images.
        image_size: side of the images; it only decides the default `stem_stride`, other sizes can be passed later.
        width: channels of the stem and of stage1.
        blocks: blocks of each stage; 3 with `stem_stride` 1 is ResNet-20 with 1 x 1 shortcuts.
        stem_stride: stride of the first convolution; None takes 2 from 24 pixels on, else 1.
        norm: "batch", or "group" where batches are too small for batch statistics.
    """
    who = "small-resnet"
    layers.sizes(who, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    return ResNet(
        num_classes=num_classes,
        in_channels=in_channels,
        stem_stride=layers.stem_stride(who, stem_stride, image_size),
        width=width,
        blocks=blocks,
        stages=3,
        norm=norm,
        who=who,
    )


def resnet18(
    *, num_classes: int, in_channels: int, image_size: int, width: int = 64, stem_stride: int = 1, norm: str = "batch"
) -> ResNet:
    """ResNet-18 with the stem for small images: one 3 x 3 convolution of stride 1, no max-pooling, then four stages.

    Args:
        num_classes: C; 0 leaves the classifier out and returns the pooled features (N, 8 width).
        in_channels: channels of the images.
        image_size: side of the images, 32 in the CIFAR experiments; the network takes any.
        width: channels of the stem and of stage1.
        stem_stride: stride of the first convolution; 2 for 64-pixel images and larger saves three quarters of the work.
        norm: "batch", or "group" where batches are too small for batch statistics.
    """
    who = "resnet18"
    layers.sizes(who, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    return ResNet(
        num_classes=num_classes,
        in_channels=in_channels,
        stem_stride=_check.integer(who, "stem_stride", stem_stride, 1),
        width=width,
        blocks=2,
        stages=4,
        norm=norm,
        who=who,
    )
