"""What samples belong to, from every kind of files that can say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hardmix.data.number_sets import Options, load_numbers

WHO = [f"p{k // 3}" for k in range(12)]


def made(kind: str, folder: Path, who: list[str] = WHO, split: list[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """Twelve samples of a kind, where they are, and the options that read them."""
    parts = [""] * 12 if split is None else [f",{word}" for word in split]
    head = "" if split is None else ",split"
    if kind in ("series", "npz"):
        x = np.zeros((12, 5) if kind == "series" else (12, 2, 2, 2)) + np.arange(12).reshape(
            12, *[1] * (1 if kind == "series" else 3)
        )
        more = {} if split is None else {"split": [("train", "validation", "test").index(word) for word in split]}
        np.savez(folder / "s.npz", x=x, y=np.arange(12), who=who, **more)
        return folder / "s.npz", {}
    if kind == "json":
        lines = [
            {"text": "a b", "y": k, "who": who[k]} | ({} if split is None else {"split": split[k]}) for k in range(12)
        ]
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return folder / "t.jsonl", {"target": "y"}
    for k in range(12):
        Image.new("RGB", (4, 4), (k, 0, 0)).save(folder / f"{k}.png")
        np.save(folder / f"{k}.npy", np.full((2, 2, 2), k))
    cells = {"table": "{}", "texts": "word {}", "pictures": "{}.png", "volumes": "{}.npy"}[kind]
    column = {"table": "x", "texts": "text", "pictures": "file", "volumes": "file"}[kind]
    rows = [f"{cells.format(k)},{who[k]},{k}{parts[k]}" for k in range(12)]
    (folder / "t.csv").write_text("\n".join([f"{column},who,y{head}", *rows]))
    if kind in ("table", "texts"):
        return folder / "t.csv", {"target": "y"}
    return folder, {"target": "y", "labels": str(folder / "t.csv")}


def name_of(kind: str) -> str:
    return {"npz": "volumes", "json": "texts"}.get(kind, kind)


KINDS = ["table", "pictures", "volumes", "npz", "series", "texts", "json"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_its_groups(kind: str, tmp_path: Path) -> None:
    path, options = made(kind, tmp_path)
    got = load_numbers(name_of(kind), path, Options(group="who", **options))
    assert list(got.groups) == WHO
    assert not load_numbers(name_of(kind), path, Options(**options)).groups
    if kind == "table":
        assert got.feature_names == ("x",)
    path, options = made(kind, tmp_path, split=["train"] * 9 + ["test"] * 3)
    assert list(load_numbers(name_of(kind), path, Options(group="who", **options)).groups) == WHO


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_with_groups_is_said(kind: str, tmp_path: Path) -> None:
    path, options = made(kind, tmp_path)
    with pytest.raises(ValueError, match=r"has no (column of groups|array|key) 'whom'.*['\"]who['\"]"):
        load_numbers(name_of(kind), path, Options(group="whom", **options))
    path, options = made(kind, tmp_path, split=["train"] * 7 + ["test"] * 5)
    with pytest.raises(
        ValueError, match=r"has the group 'p2' in two splits; put its samples into one, or leave out data"
    ):
        load_numbers(name_of(kind), path, Options(group="who", **options))
    path, options = made(kind, tmp_path, who=[*WHO[:4], "", *WHO[5:]])
    place = {"series": "row 4", "npz": "row 4", "json": "line 5"}.get(kind, "row 6")
    with pytest.raises(ValueError, match=rf"has no group in 'who', {place}; say what that sample belongs to"):
        load_numbers(name_of(kind), path, Options(group="who", **options))


def test_groups_of_other_types_and_places(tmp_path: Path) -> None:
    x, y = np.zeros((12, 5)) + np.arange(12)[:, None], np.arange(12)
    np.savez(tmp_path / "s.npz", x=x, y=y, who=y // 4, half=y / 2)
    got = load_numbers("series", tmp_path / "s.npz", Options(group="who", samples=10))
    assert [int(group) for group in got.groups] == (got.labels // 4).tolist()
    with pytest.raises(
        ValueError, match=r"has 'half' of shape \(12,\) and type float64 as groups of 12 samples; save one"
    ):
        load_numbers("series", tmp_path / "s.npz", Options(group="half"))
    with pytest.raises(ValueError, match="group is 'who', which diabetes does not take; leave it out"):
        load_numbers("diabetes", None, Options(group="who"))
