"""What runs write: files that are whole or not there (`hardmix._files`), JSON, and folders with one writer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hardmix._files import sync_folder as sync_folder
from hardmix._files import write_bytes as write_bytes
from hardmix._files import write_text as write_text
from hardmix.train.errors import RecipeError

#: folders that this process holds
_held: set[int] = set()


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


# A loader's worker that outlives its killed parent for some seconds would hold the folder as long.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process as long as the context lasts; False if another process holds it.

    The lock is on the folder itself and vanishes with the process. Systems without such locks always get True.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        if handle in _held:  # not in a forked child
            _held.remove(handle)
            os.close(handle)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Create a folder. After an error what holds nothing is gone: folders inside it, itself, and new ones above it."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        inside = [Path(place) for place, _, _ in os.walk(folder, topdown=False)] if created else []
        for path in (*inside, *created[1:]):
            with suppress(OSError):  # one that holds something
                path.rmdir()
        raise


@contextmanager
def new_file(path: Path) -> Iterator[None]:
    """Create the folder of a file that is asked for. What the system has against it is told with the file's name.

    Raises:
        RecipeError: it can't be written.
    """
    try:
        with new_folder(path.parent):
            yield
    except OSError as error:
        raise RecipeError(f"{path} can't be written ({error.strerror or error}); name another file.") from None


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted structure kept as given, NaN written as null so that any reader takes it."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold: names as text, tuples as lists, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return None
    return value
