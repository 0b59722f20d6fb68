"""Local weights for a fresh model: plain tensors only, every name accounted for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
#: where training scripts keep the model's own state among other things
NESTED = ("model", "state_dict", "model_state_dict")


def load_weights(who: str, model: nn.Module, path: str | Path, classifier: tuple[str, ...]) -> None:
    """Copy the tensors of a checkpoint into `model`; the file is read as plain tensors, nothing in it is run.

    Names and shapes have to agree one to one. The exception is the classifier: where the file has none, or one for
    another number of classes, the model's own stays as initialised and a warning says so. A model built without one
    leaves out the file's.

    Args:
        who: the caller, for messages.
        path: .safetensors, or .pth / .pt / .bin as written by torch.save: a state dict, or a dict that holds one under
            "model", "state_dict" or "model_state_dict". The "module." that DDP puts before every name is taken off.
        classifier: the beginnings of the classifier's parameter names; empty if the model has none.

    Raises:
        ValueError: no such file, another suffix, not plain tensors, or names or shapes that disagree.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise ValueError(f"{who}: checkpoint is '{path}'; pass the path of an existing {', '.join(SUFFIXES)} file.")
    found = _read(who, path)
    own = model.state_dict()
    fresh = [name for name in own if name.startswith(classifier) and _shape(found, name) != own[name].shape]
    wrong = [
        *(f"'{name}' is missing" for name in own if name not in found and name not in fresh),
        *(f"'{name}' is unknown" for name in found if name not in own and not name.startswith(classifier)),
        *(
            f"'{name}' has shape {tuple(found[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in found and name not in fresh and found[name].shape != own[name].shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{who}: checkpoint '{path}' does not fit the model ({'; '.join(wrong[:3])}{more}); "
            "pass a checkpoint of the same model and options."
        )
    if fresh:
        warnings.warn(
            f"{who}: checkpoint '{path}' has no classifier of this shape; {', '.join(fresh)} start from scratch.",
            stacklevel=3,
        )
    kept = {name: own[name] if name in fresh else found[name] for name in own}
    model.load_state_dict(kept)


def _shape(found: dict[str, Tensor], name: str) -> torch.Size | None:
    return found[name].shape if name in found else None


def _read(who: str, path: Path) -> dict[str, Tensor]:
    """The state dict in the file, without DDP's prefix."""
    content: Any
    try:
        content = _safetensors(who, path) if path.suffix == ".safetensors" else _pickled_tensors(path)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"{who}: checkpoint '{path}' cannot be read as plain tensors ({type(error).__name__}); "
            "save the model's state_dict() on its own, best as .safetensors."
        ) from None
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    tensors = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{who}: checkpoint '{path}' holds no state dict; save the model's state_dict() on its own.")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _safetensors(who: str, path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"{who}: checkpoint '{path}' needs safetensors; run `pip install hardmix[train]`.") from None
    return load_file(path)


def _pickled_tensors(path: Path) -> object:
    """weights_only: torch's own reader of tensors and plain containers, which calls nothing that the file names."""
    return torch.load(path, map_location="cpu", weights_only=True)
