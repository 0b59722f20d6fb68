"""Import torchvision where its compiled operators can't be loaded; not needed where torchvision matches torch.

The default torchvision wheel is a CUDA build. Beside a CPU build of torch its operators do not load, and the import
fails with "operator torchvision::nms does not exist". The remedy is torchvision's CPU build; this file is a stopgap for
examples and tests: transforms and models work, only nms and the decoding of images do not.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_KEPT: list[torch.library.Library] = []  # a schema lasts as long as its library object


def import_torchvision() -> ModuleType:
    """torchvision. Raises ImportError where it is not installed."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or "does not exist" not in str(error):
            raise
    else:
        return torchvision
    # Only after that failure: declared beside an extension that works, the schemas would clash and end the process.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    import torchvision

    return torchvision
