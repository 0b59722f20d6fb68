"""Where data sets are looked for."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from hardmix._files import from_home


def usual_places(name: str) -> list[Path]:
    """The folder NAME in the folder that the environment variable HARDMIX_DATA names, in `./data`, and in
    `~/.cache/hardmix`."""
    root = os.environ.get("HARDMIX_DATA")
    places = [from_home(root) / name] if root else []
    return [*places, Path("data") / name, from_home("~") / ".cache" / "hardmix" / name]


def installed(distribution: str) -> list[Path]:
    """The folders that an installed distribution has put next to other packages; none if it isn't installed."""
    if not distribution:
        return []
    try:
        listed = files(distribution) or []
    except PackageNotFoundError:
        return []
    tops = dict.fromkeys(file.parts[0] for file in listed if len(file.parts) > 1)
    roots = [Path(str(listed[0].locate())).parents[len(listed[0].parts) - 1]] if listed else []
    return [root / top for root in roots for top in tops if not top.endswith((".dist-info", "..")) and top != ".."]
