"""A small residual network for volumes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check


class VolumeBlock(nn.Module):
    """relu(conv-norm-relu-conv-norm(x) + shortcut(x)); the shortcut is a 1 x 1 x 1 convolution where the shape
    changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, stride=stride)
        self.second = _conv_norm(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first(x), inplace=True)
        return F.relu(self.second(inner) + self.shortcut(x), inplace=True)


class VolumeNet(nn.Module):
    """Stem of stride 2, `depth` residual blocks of 3 x 3 x 3 convolutions, mean over the positions.

    Block k has 2^(k-1) `width` channels; every block but the first halves the map while it has more than one voxel. The
    stem halves it too: at 16 voxels a side the voxels outnumber those of the second map eight times, and so does the
    work. Batch statistics, unlike those of a group, keep how bright a volume is as a whole, which labels may depend on.

    Args:
        channels: C of the volumes.
        width: channels of the stem and of the first block.
        depth: number of blocks; 3 suit 8 to 32 voxels a side, 4 suit 64.
    Attributes:
        features: D = 2^(depth-1) `width`.
    Shapes: floats (N, C, D, H, W) of any D, H, W >= 1 -> features (N, D). N = 1 works in eval mode, and in training
        while the last map has more than one voxel. A batch in `torch.channels_last_3d` stays in it.
    """

    def __init__(self, *, channels: int, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        who = "volume-cnn"
        for name, value in (("channels", channels), ("width", width), ("depth", depth)):
            _check.integer(who, name, value, 1)
        self.channels = channels
        self.stem = _conv_norm(channels, width, stride=2)
        self.blocks = nn.Sequential()
        inputs = width
        for k in range(depth):
            outputs = width * 2**k
            self.blocks.append(VolumeBlock(inputs, outputs, stride=1 if k == 0 else 2))
            inputs = outputs
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = _check.batch("volume-cnn", "x", x, 5, 5)
        if not x.is_floating_point():
            raise TypeError(f"volume-cnn: x has dtype {x.dtype}; pass normalised floating-point volumes.")
        if x.shape[1] != self.channels:
            raise ValueError(
                f"volume-cnn: x has {x.shape[1]} channels; pass the {self.channels} that the model was built for."
            )
        return self.blocks(F.relu(self.stem(x), inplace=True)).mean((2, 3, 4))


def _conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, He-normal over the fan-out, then its normalisation."""
    conv = nn.Conv3d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm3d(outputs))
