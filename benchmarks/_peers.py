"""The packages that the benchmarks compare with. hardmix and its own rows need none of them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], object]

_keep_alive = []


def import_torchvision() -> ModuleType:
    """torchvision beside a CPU torch.

    Its default wheel is built for CUDA: its operators fail to load, and registering fake kernels for two of them then
    raises. After that failure, and only then, those two schemas may be declared and the import made again; the
    transforms need no operator.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)
    return importlib.import_module("torchvision")


def mixing_steps(num_classes: int) -> tuple[dict[str, Step], dict[str, str]]:
    """(name -> a call that mixes a batch and its labels as a training loop would, package -> version).

    timm writes into the batch, torchvision and kornia return a new one. Lambda is drawn once a batch unless the name
    says otherwise.
    """
    steps: dict[str, Step] = {}
    versions: dict[str, str] = {}
    try:
        versions["torchvision"] = import_torchvision().__version__
        from torchvision.transforms import v2

        for name, cls in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)):
            mix = cls(num_classes=num_classes)
            steps[f"torchvision {name}, new"] = mix
    except ImportError:
        pass
    try:
        import timm
        from timm.data.mixup import Mixup

        versions["timm"] = timm.__version__
        for mode in ("batch", "elem"):
            for name, options in (("mixup", {}), ("cutmix", {"mixup_alpha": 0.0, "cutmix_alpha": 1.0})):
                mix = Mixup(mode=mode, num_classes=num_classes, **options)
                label = name if mode == "batch" else f"{name} per sample"
                steps[f"timm {label}, in place"] = mix
    except ImportError:
        pass
    try:
        import kornia
        import kornia.augmentation as augmentation

        versions["kornia"] = kornia.__version__
        keys = ["input", "class"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kornia_mix = augmentation.RandomMixUpV2(data_keys=keys)
            kornia_cut = augmentation.RandomCutMixV2(data_keys=keys, use_correct_lambda=True)
        steps["kornia mixup per sample, new"] = kornia_mix
        steps["kornia cutmix per sample, new"] = kornia_cut
    except ImportError:
        pass
    return steps, versions
