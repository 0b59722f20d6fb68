"""The smallest backbone worth training: four convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from hardmix import _check
from hardmix.models import layers


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions: stem and stage1 of `width` channels, stage2 of twice, stage3 of four times as many.

    stage2 and stage3 halve the map; so does the stem with `stem_stride` 2.

    Args:
        num_classes: C; 0 leaves the classifier out and returns the pooled features (N, 4 width).
        in_channels: channels of the images.
        image_size: side of the images; it only decides the default `stem_stride`, other sizes can be passed later.
        width: channels of the stem.
        stem_stride: stride of the first convolution; None takes 2 from 24 pixels on, else 1.
        norm: "batch", or "group" where batches are too small for batch statistics.

    Shapes: (N, in_channels, H, W) -> (N, C), any H, W >= 1. N = 1 works in eval mode, and in training while the last
    map has more than one pixel.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: int = 24,
        stem_stride: int | None = None,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        who = "SmallCNN"
        layers.sizes(who, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        _check.integer(who, "width", width, 1)
        _check.choice(who, "norm", norm, layers.NORMS)
        self.in_channels = in_channels
        self.num_features = 4 * width
        stride = layers.stem_stride(who, stem_stride, image_size)
        self.stem = layers.conv_norm_relu(in_channels, width, stride=stride, norm=norm)
        self.stage1 = layers.conv_norm_relu(width, width, norm=norm)
        self.stage2 = layers.conv_norm_relu(width, 2 * width, stride=2, norm=norm)
        self.stage3 = layers.conv_norm_relu(2 * width, 4 * width, stride=2, norm=norm)
        self.head = layers.PoolHead(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, 4 width, h, w)."""
        x = self.stem(layers.images("SmallCNN", x, self.in_channels))
        return self.stage3(self.stage2(self.stage1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))
