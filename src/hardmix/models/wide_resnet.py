"""Wide residual networks, the backbone of the semi-supervised papers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix.models import layers


class PreActivationBlock(nn.Module):
    """conv(act(norm(conv(act(norm(x)))))) + shortcut; a shortcut that changes the shape reads act(norm(x))."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, slope: float, norm: str) -> None:
        super().__init__()
        self.slope = slope
        self.norm1 = layers.norm_layer(norm, inputs)
        self.conv1 = _conv(inputs, outputs, stride)
        self.norm2 = layers.norm_layer(norm, outputs)
        self.conv2 = _conv(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else _conv(inputs, outputs, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.norm1(x), self.slope)
        skipped = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.leaky_relu(self.norm2(self.conv1(active)), self.slope)) + skipped


class ActivePoolHead(layers.PoolHead):
    """The norm and the activation that the last block lacks, then pooling and the classifier."""

    def __init__(self, features: int, num_classes: int, *, slope: float, norm: str) -> None:
        super().__init__(features, num_classes)
        self.slope = slope
        self.norm = layers.norm_layer(norm, features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.leaky_relu(self.norm(x), self.slope))


class WideResNet(nn.Module):
    """WRN-`depth`-`width`: three stages of pre-activation blocks with 16, 32 and 64 times `width` channels.

    Args:
        num_classes: C; 0 leaves the classifier out and the model returns the pooled features (N, 64 width).
        in_channels: channels of the images.
        image_size: side of the images; it only decides the default `stem_stride`.
        depth: 6 k + 4 layers, k blocks a stage: 10, 16, 22, 28.
        width: factor on the channels.
        slope: of leaky ReLU below 0: 0.1 in the semi-supervised papers, 0 is the original ReLU.
        stem_stride: stride of the first convolution; None takes 2 from 24 pixels on, which quarters the work; the
            papers have 1.
        norm: "batch" or "group".

    Shapes: (N, in_channels, H, W) -> (N, C). Reference: Zagoruyko and Komodakis 2016 (arXiv:1605.07146); with leaky
    ReLU, Oliver et al. 2018 (arXiv:1804.09170).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        depth: int = 28,
        width: int = 2,
        slope: float = 0.1,
        stem_stride: int | None = None,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        who = "wide-resnet"
        layers.sizes(who, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        _check.integer(who, "width", width, 1)
        if _check.integer(who, "depth", depth, 10) % 6 != 4:
            raise ValueError(f"{who}: depth is {depth}; pass 6 k + 4: 10, 16, 22, 28.")
        _check.choice(who, "norm", norm, layers.NORMS)
        self.slope = _check.between(who, "slope", slope, 0.0, 1.0)
        self.in_channels = in_channels
        self.stem = _conv(in_channels, 16, layers.stem_stride(who, stem_stride, image_size))
        inputs, self.stages = 16, ("stage1", "stage2", "stage3")
        for k, name in enumerate(self.stages):
            stage = nn.Sequential()
            for index in range((depth - 4) // 6):
                stride = 2 if k > 0 and index == 0 else 1
                outputs = 16 * width * 2**k
                stage.append(PreActivationBlock(inputs, outputs, stride=stride, slope=self.slope, norm=norm))
                inputs = outputs
            self.add_module(name, stage)
        self.num_features = inputs
        self.head = ActivePoolHead(inputs, num_classes, slope=self.slope, norm=norm)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, num_features, h, w), before the head's norm."""
        x = self.stem(layers.images("wide-resnet", x, self.in_channels))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def _conv(inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="leaky_relu")
    return conv
