"""MobileNetV2, with the names of torchvision, so that its published weights fit."""

from __future__ import annotations

from torch import Tensor, nn

from hardmix import _check
from hardmix.models import layers

#: table 2 of the paper: expansion t, channels c, blocks n, stride s of the first one
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
FIRST, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """project(relu6(depthwise(relu6(expand(x))))), plus x where the shape stays; the projection has no activation.

    `expand` is a 1 x 1 convolution to t times the channels (left out for t = 1), `project` one to the new channels.
    """

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv_norm_relu(inputs, hidden, kernel=1)] if expansion != 1 else []
        depthwise = _conv_norm_relu(hidden, hidden, stride=stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, *layers.conv_norm(hidden, outputs, kernel=1))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2, for small budgets: seventeen inverted residual blocks with depthwise convolutions, 1280 features.

    Every map has 1/32 of the image's side in the end, so 96-pixel pictures are the smallest that suit published
    weights; `stem_stride` 1 doubles that. Parameters are named as torchvision's `mobilenet_v2` names them.

    Args:
        num_classes: C; 0 leaves the classifier out and returns the pooled features (N, 1280).
        in_channels: channels of the images.
        image_size: side of the images; the network takes any.
        width: multiplies the channels of every layer, rounded to multiples of 8 and never below nine tenths; the
            features stay 1280 for a width up to 1.
        stem_stride: stride of the first convolution.
        dropout: share of the features that training sets to 0 before the classifier.

    Shapes: (N, in_channels, H, W) -> (N, C), any H, W >= 1. N = 1 works in eval mode, and in training while the last
        map has more than one pixel.
    Reference: Sandler et al. 2018, sections 3 and 4 (arXiv:1801.04381).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: float = 1.0,
        stem_stride: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        who = "mobilenet-v2"
        layers.sizes(who, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        _check.positive(who, "width", width)
        _check.integer(who, "stem_stride", stem_stride, 1)
        _check.between(who, "dropout", dropout, 0.0, 1.0)
        self.in_channels = in_channels
        self.num_features = _channels(LAST * max(1.0, width))
        inputs = _channels(FIRST * width)
        self.features = nn.Sequential(_conv_norm_relu(in_channels, inputs, stride=stem_stride))
        for expansion, channels, blocks, stride in STAGES:
            outputs = _channels(channels * width)
            for index in range(blocks):
                step = stride if index == 0 else 1
                self.features.append(InvertedResidual(inputs, outputs, expansion=expansion, stride=step))
                inputs = outputs
        self.features.append(_conv_norm_relu(inputs, self.num_features, kernel=1))
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            linear = nn.Linear(self.num_features, num_classes)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            self.classifier = nn.Sequential(nn.Dropout(dropout), linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, num_features, h, w)."""
        return self.features(layers.images("mobilenet-v2", x, self.in_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x).mean((2, 3)))


def _channels(wanted: float) -> int:
    """The nearest multiple of 8, one more where that takes away over a tenth."""
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * wanted else nearest


def _conv_norm_relu(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))
