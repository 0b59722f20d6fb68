"""Features that are computed once for the same weights and inputs, and read from the disk from then on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hardmix._files import from_home

Part = str | bytes | Tensor | Mapping[str, Tensor]


def cache_folder(kind: str = "features") -> Path:
    """Where what is made once is kept, features or runs to start from: in the folder that the environment variable
    HARDMIX_CACHE names, else in `~/.cache/hardmix`. It may be deleted at any time."""
    root = os.environ.get("HARDMIX_CACHE")
    return (from_home(root) if root else from_home("~") / ".cache" / "hardmix") / kind


def cached_features(*key: Part, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns, from the disk if it was computed before with the same key.

    The file is `NAME.safetensors` in `cache_folder()`, NAME being the sha256 of all parts of the key: their types,
    names, shapes and bytes. It is written aside, flushed and renamed, so that a killed process or two at a time leave a
    whole file or none. A damaged one is computed again and replaced. Where the folder can't be read or written, or
    safetensors is missing, features are computed each time.

    Args:
        key: everything that the features depend on: weights as a state dict, inputs, settings as text, and the version
            of the code.
        compute: makes the features, (N, ...) of any dtype.

    Raises:
        TypeError: a part of the key, or what was computed, is of another type.
    """
    name = _digest(key)
    try:
        path = cache_folder() / f"{name}.safetensors"
    except RuntimeError:  # no home
        return _computed(compute)
    kept = _read(path)
    if kept is not None:
        return kept
    features = _computed(compute)
    _write(path, features)
    return features


def _computed(compute: Callable[[], Tensor]) -> Tensor:
    features = compute()
    if not isinstance(features, Tensor):
        raise TypeError(f"cached_features: compute returned a {type(features).__name__}; return a torch.Tensor.")
    return features.detach().cpu().contiguous()


def _digest(key: tuple[Part, ...]) -> str:
    """sha256 of the parts, each with its type and length in front, so that no two keys read alike."""
    total = hashlib.sha256()

    def add(kind: str, data: bytes | memoryview) -> None:
        total.update(f"{kind} {len(data)}\n".encode())
        total.update(data)

    for part in key:
        if isinstance(part, str):
            add("text", part.encode("utf-8", "surrogatepass"))
        elif isinstance(part, bytes):
            add("bytes", part)
        elif isinstance(part, Tensor):
            add(f"tensor {part.dtype} {tuple(part.shape)}", _bytes(part))
        elif isinstance(part, Mapping) and all(isinstance(value, Tensor) for value in part.values()):
            add("state", str(len(part)).encode())
            for name in sorted(part):
                add("name", name.encode())
                add(f"tensor {part[name].dtype} {tuple(part[name].shape)}", _bytes(part[name]))
        else:
            raise TypeError(
                f"cached_features: the key holds a {type(part).__name__}; pass texts, bytes, tensors or state dicts."
            )
    return total.hexdigest()


def _bytes(x: Tensor) -> memoryview:
    """Its memory, rows one after the other."""
    flat = x.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _read(path: Path) -> Tensor | None:
    """The features in the file; None if there is none, or if it isn't as it was written."""
    try:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            features: Tensor = file.get_tensor("features").clone()
            whole = (file.metadata() or {}).get("sha256") == _digest((features,))
    except Exception:  # no file, no safetensors, or damage of any kind
        return None
    return features if whole else None


def _write(path: Path, features: Tensor) -> None:
    """Write beside, flush, rename; nothing if that can't be done."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        from safetensors.torch import save

        data = save({"features": features}, metadata={"sha256": _digest((features,))})
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except (ImportError, OSError):
        return
