"""A model behind the normalisation of its images, for what looks at the model but has pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class OnPixels(nn.Module):
    """model(normalize(x)), which has the names, the mode and the parameters of `model`.

    Policies mix pixels in [0, 1] before they are normalised. Those that run the model, or read its layers, get this;
    its submodules are called as they are in the model itself.

    >>> model = OnPixels(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), nn.Identity())
    >>> [name for name, _ in model.named_modules()]
    ['', '0', '1']
    """

    def __init__(self, model: nn.Module, normalize: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The mode of the model."""
        model = self._modules.get("model") if "_modules" in self.__dict__ else None
        return True if model is None else model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """`train` and `eval` set the model's by themselves."""

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """Those of the model."""
        return self.model.named_modules(*args, **options)

    def get_submodule(self, target: str) -> nn.Module:
        """Of the model, by its name there."""
        return self.model.get_submodule(target)

    def forward(self, x: Tensor) -> Any:
        return self.model(self.normalize(x))
