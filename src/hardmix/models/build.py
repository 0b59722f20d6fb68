"""From a name in a recipe to a backbone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hardmix import _check
from hardmix.models.checkpoint import load_weights
from hardmix.models.cnn import SmallCNN
from hardmix.models.imagenet import ImageNetResNet18
from hardmix.models.mobilenet import MobileNetV2
from hardmix.models.resnet import resnet18, small_resnet
from hardmix.models.vit import TinyViT
from hardmix.models.wide_resnet import WideResNet

#: The backbones that a recipe may name; "timm/NAME" names any of timm's models besides.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": SmallCNN,
    "small-resnet": small_resnet,
    "resnet18": resnet18,
    "wide-resnet": WideResNet,
    "tiny-vit": TinyViT,
    "mobilenet-v2": MobileNetV2,
    "imagenet-resnet18": ImageNetResNet18,
}
#: The classifier's name where it isn't "head.linear": these two have the names of torchvision.
CLASSIFIERS = {"mobilenet-v2": "classifier.1", "imagenet-resnet18": "fc"}
SIZES = ("num_classes", "in_channels", "image_size")


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """The backbone `name`, initialised from torch's global generator: (N, in_channels, H, W) -> (N, num_classes).

    Args:
        name: a key of MODELS, or "timm/NAME" for one of timm's models (`pip install hardmix[timm]`).
        num_classes: C; 0 leaves the classifier out and the model returns its features (N, D).
        in_channels: channels of the images.
        image_size: side of the images in pixels.
        checkpoint: a local .safetensors, .pth, .pt or .bin file to start from; nothing is ever downloaded.
        options: what the model takes beyond its sizes (see `model_options`); for timm whatever its model takes.

    The models of this package name their parts "stem", "stage1", ..., "head", so that hidden states can be mixed by
    name ("mobilenet-v2" and "imagenet-resnet18" have torchvision's names instead, so that its weights fit), keep the
    width of their features in `num_features`, and have `forward_features` for the last map or tokens.

    Raises:
        ValueError: an unknown name or option, with the nearest one offered; a size or option out of range.
        ImportError: a timm model, but timm is not installed or does not import.

    >>> import torch
    >>> model = build_model("small-resnet", num_classes=10, in_channels=1, image_size=28, width=8)
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    who = "build_model"
    if isinstance(name, str) and name.startswith("timm/"):
        model = _timm_model(name.removeprefix("timm/"), num_classes, in_channels, image_size, options)
        prefix = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    else:
        _check.choice(who, "name", name, [*MODELS, "timm/NAME"])
        for key in options:
            _check.choice(who, f"option of {name}", key, model_options(name))
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        model = MODELS[name](**sizes, **options)
        prefix = CLASSIFIERS.get(name, "head.linear")
    if checkpoint is not None:
        heads = (prefix,) if isinstance(prefix, str) else tuple(prefix)
        load_weights(who, model, checkpoint, tuple(f"{head}." for head in heads))
    return model


def model_options(name: str) -> tuple[str, ...]:
    """The options that the model `name` of MODELS takes beyond num_classes, in_channels and image_size."""
    _check.choice("model_options", "name", name, MODELS)
    return tuple(key for key in inspect.signature(MODELS[name]).parameters if key not in SIZES)


def _timm_model(name: str, num_classes: int, in_channels: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    """A timm model without pretrained weights, told the image size if it takes one."""
    who = "build_model"
    _check.integer(who, "num_classes", num_classes, 0)
    _check.integer(who, "in_channels", in_channels, 1)
    _check.integer(who, "image_size", image_size, 1)
    for key in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"):
        if key in options:
            raise ValueError(f"{who}: {key} is no option here, nothing is downloaded; pass checkpoint=PATH.")
    try:
        import timm
    except Exception as error:
        # A torchvision that does not match torch makes timm's import fail with a RuntimeError.
        raise ImportError(
            f"{who}: name is 'timm/{name}' but timm does not import ({type(error).__name__}: {error}); "
            "run `pip install hardmix[timm]` with the torchvision that matches torch."
        ) from None
    # is_model does not know the "hf-hub:" and "local-dir:" names, which would fetch or read a configuration.
    if not timm.is_model(name):
        near = _check.did_you_mean(name, timm.list_models())
        raise ValueError(
            f"{who}: name is 'timm/{name}', which timm does not have; pick one of timm.list_models(){near}."
        )
    settings = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels, **options}
    try:
        try:
            return timm.create_model(name, img_size=image_size, **settings)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, **settings)
    except TypeError as error:
        raise ValueError(
            f"{who}: timm/{name} does not take these options ({error}); pass only what it takes."
        ) from None
