"""Cached features: found again by what they depend on, computed again where the file is not as it was written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hardmix.data.cache import cache_folder, cached_features

STATE = {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(3)}
PICTURES = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARDMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


class Counted:
    """Features, and how often they were computed."""

    def __init__(self, features: Tensor | None = None) -> None:
        self.features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) if features is None else features
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.features


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_time_they_are_read(folder: Path) -> None:
    compute = Counted()
    first = cached_features("tower", STATE, PICTURES, compute=compute)
    again = cached_features("tower", STATE, PICTURES, compute=compute)
    assert compute.calls == 1
    assert torch.equal(first, compute.features)
    assert torch.equal(again, first)
    again += 1.0  # what was read is the caller's own
    assert torch.equal(cached_features("tower", STATE, PICTURES, compute=compute), first)
    assert len(files(folder)) == 1


def test_the_name_of_a_file_stays_the_same(folder: Path) -> None:
    cached_features("tower", b"1", STATE, PICTURES, compute=Counted())
    assert files(folder) == ["b55cfc4e9945c7d25320e109ed269347eabd283095ba9d82fcbb3d0f4e112a30.safetensors"]
    assert load_file(folder / files(folder)[0]).keys() == {"features"}


@pytest.mark.parametrize(
    "key",
    [
        ("tower ", STATE, PICTURES),
        (b"tower", STATE, PICTURES),
        ("tower", PICTURES, STATE),
        ("tower", STATE, PICTURES, PICTURES),
        ("tower", STATE),
        ("tower", {**STATE, "more": torch.zeros(0)}, PICTURES),
        ("tower", {"weight": STATE["weight"], "step": STATE["steps"]}, PICTURES),
        ("tower", {**STATE, "weight": STATE["weight"].view(3, 2)}, PICTURES),
        ("tower", {**STATE, "weight": STATE["weight"].view(torch.int32)}, PICTURES),
        ("tower", {**STATE, "weight": STATE["weight"] + torch.eye(2, 3) * 1e-6}, PICTURES),
        ("tower", STATE, PICTURES.view(3, 1, 4, 4)),
        ("tower", STATE, PICTURES.flip(0, 1)),
    ],
)
def test_every_part_of_the_key_counts(key: tuple[object, ...]) -> None:
    compute = Counted()
    cached_features("tower", STATE, PICTURES, compute=compute)
    cached_features(*key, compute=compute)
    assert compute.calls == 2


def test_what_does_not_count() -> None:
    """The order of a state dict, and how a tensor lies in memory."""
    compute = Counted()
    cached_features("tower", STATE, PICTURES, compute=compute)
    other = {"steps": STATE["steps"], "weight": STATE["weight"].T.contiguous().T.requires_grad_()}
    cached_features("tower", other, PICTURES.contiguous(memory_format=torch.channels_last), compute=compute)
    assert compute.calls == 1


def test_texts_that_run_into_each_other_are_different() -> None:
    compute = Counted()
    cached_features("ab", "c", compute=compute)
    cached_features("a", "bc", compute=compute)
    cached_features("abc", compute=compute)
    assert compute.calls == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_other_types_and_layouts(dtype: torch.dtype) -> None:
    compute = Counted(torch.arange(12).view(3, 4).to(dtype).T)
    for _ in range(2):
        features = cached_features(str(dtype), torch.tensor(1, dtype=dtype), compute=compute)
        assert features.dtype == dtype
        assert features.is_contiguous()
        assert torch.equal(features, compute.features)
    assert compute.calls == 1


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_flip(path: Path) -> None:
    """One bit of a number: the file still reads."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def damage_foreign(path: Path) -> None:
    save_file({"features": torch.zeros(5, 3)}, path)


def damage_name(path: Path) -> None:
    save_file({"other": torch.zeros(5, 3)}, path)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_foreign, damage_name, damage_empty])
def test_a_damaged_file_is_computed_again_and_replaced(folder: Path, damage: object) -> None:
    compute = Counted()
    cached_features("tower", compute=compute)
    damage(folder / files(folder)[0])
    for _ in range(2):
        assert torch.equal(cached_features("tower", compute=compute), compute.features)
    assert compute.calls == 2


def test_a_folder_that_cannot_be_written_only_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HARDMIX_CACHE", str(tmp_path / "file"))
    compute = Counted()
    for _ in range(2):
        assert torch.equal(cached_features("tower", compute=compute), compute.features)
    assert compute.calls == 2
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    compute = Counted()
    assert torch.equal(cached_features("tower", compute=compute), compute.features)
    assert files(folder) == []


def test_without_safetensors_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    compute = Counted()
    assert torch.equal(cached_features("tower", compute=compute), compute.features)
    assert not folder.exists()


def test_what_fails_is_not_kept(folder: Path) -> None:
    def broken() -> Tensor:
        raise ValueError("no features today")

    with pytest.raises(ValueError, match=r"^no features today$"):
        cached_features("tower", compute=broken)
    assert not folder.exists()


@pytest.mark.parametrize("part", [3, None, {"a": 1}, ["text"]])
def test_keys_of_other_types(part: object) -> None:
    message = rf"^cached_features: the key holds a {type(part).__name__}; pass texts, bytes, tensors or state dicts\.$"
    with pytest.raises(TypeError, match=message):
        cached_features("tower", part, compute=Counted())


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"^cached_features: compute returned a list; return a torch\.Tensor\.$"):
        cached_features("tower", compute=lambda: [1.0])


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARDMIX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hardmix" / "features"
    monkeypatch.setenv("HARDMIX_CACHE", "~/kept")
    assert cache_folder() == tmp_path / "kept" / "features"
