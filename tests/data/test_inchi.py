"""Drawings of molecules with their InChI, from small files written here."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hardmix.data.inchi import read_inchi
from hardmix.data.numbers import TEST, TRAIN, VALIDATION
from hardmix.data.pictures import MOLECULE_DOMAINS, find_molecules, read_molecules

#: pairs of the last two differ in space alone
MOLECULES = [
    "InChI=1S/H2O/h1H2",
    "InChI=1S/C9H8O4/c1-6(10)13-8-5-3-2-4-7(8)9(11)12/h2-5H,1H3,(H,11,12)",
    "InChI=1S/C8H10N4O2/c1-10-4-9-6-5(10)7(13)12(3)8(14)11(6)2/h4H,1-3H3",
    "InChI=1S/C6H8N2.2ClH/c7-5-1-2-6(8)4-3-5;;/h1-4H,7-8H2;2*1H",
    "InChI=1S/C3H7NO2/c1-2(4)3(5)6/h2H,4H2,1H3,(H,5,6)/t2-/m0/s1",
    "InChI=1S/C3H7NO2/c1-2(4)3(5)6/h2H,4H2,1H3,(H,5,6)/t2-/m1/s1",
]


def molecules(root: Path, domains: tuple[str, ...] = MOLECULE_DOMAINS, *, texts: list[str] = MOLECULES) -> Path:
    """The package's folder; picture k of source d is a bar that is 3 k + d + 1 pixels wide; the first comes twice."""
    place = root / "image2inchi" / "data" / "dataset"
    for shift, name in enumerate(name.upper() for name in domains):
        (place / name / "images").mkdir(parents=True)
        rows = []
        for number, text in enumerate([*texts, texts[0]]):
            pixels = np.full((40, 60), 255, np.uint8)
            pixels[:, 10 : 11 + 3 * number + shift] = 0
            Image.fromarray(pixels).save(place / name / "images" / f"{number}.png")
            rows.append(f'"{text}",{number}.png')
        (place / name / f"{name}_inchi.csv").write_text("\n".join(["InChI,img_name", *rows]) + "\n")
    return place


def test_pictures_texts_molecules_and_sources(tmp_path: Path) -> None:
    place = molecules(tmp_path)
    assert find_molecules(tmp_path) == place
    pairs = read_inchi(place)
    assert pairs.images.shape == (35, 3, 64, 64)
    assert pairs.images.dtype == torch.uint8
    assert pairs.captions == [(text,) for _ in range(5) for text in [*MOLECULES, MOLECULES[0]]]
    assert pairs.concept.view(5, 7).tolist() == [[0, 1, 2, 3, 4, 5, 0]] * 5
    assert pairs.style_names == MOLECULE_DOMAINS
    assert pairs.style is not None
    assert pairs.style.view(5, 7).float().var(1).sum() == 0
    assert (pairs.ids[0], pairs.ids[34], pairs.name) == ("bms1000/0.png", "uspto/6.png", "molecules")
    numbers = read_molecules(place)
    assert isinstance(numbers.inputs, torch.Tensor)
    assert torch.equal(pairs.images[:, :1], numbers.inputs)
    assert torch.equal(pairs.images[:, 1], pairs.images[:, 2])
    few = read_inchi(place, domain="USPTO+uob", size=16, channels=1)
    assert few.images.shape == (14, 1, 16, 16)
    assert few.style_names == ("uob", "uspto")
    assert few.style is not None
    assert few.style.tolist() == [0] * 7 + [1] * 7


def made_up(count: int) -> list[str]:
    return [f"InChI=1S/C{number}H4/c1-2" for number in range(2, 2 + count)]


def test_a_molecule_is_in_one_split_wherever_it_is_drawn(tmp_path: Path) -> None:
    place = molecules(tmp_path, ("uob", "uspto"), texts=[*made_up(60), *MOLECULES])
    pairs = read_inchi(place, domain="uob+uspto", size=8)
    assert pairs.split is not None
    of_text: dict[str, set[int]] = {}
    for (text,), split in zip(pairs.captions, pairs.split.tolist(), strict=True):
        of_text.setdefault(text, set()).add(split)
    assert all(len(splits) == 1 for splits in of_text.values())
    assert of_text[MOLECULES[4]] == of_text[MOLECULES[5]]
    held = list(of_text.values())
    assert held.count({TRAIN}) > held.count({TEST}) > held.count({VALIDATION}) > 0
    for other in (
        read_inchi(place, domain="uspto", size=8),
        read_inchi(place, domain="uspto+uob", size=12, samples=40),
        read_inchi(place, domain="uob", size=8, max_length=30),
    ):
        assert other.split is not None
        for (text,), split in zip(other.captions, other.split.tolist(), strict=True):
            assert of_text[text] == {split}
    training, testing = pairs.part("train"), pairs.part("test", ["uspto"])
    assert not set(training.captions) & set(testing.captions)
    assert all(name.startswith("uspto/") for name in testing.ids)


def test_shares_of_many_molecules(tmp_path: Path) -> None:
    place = molecules(tmp_path, ("uob",), texts=made_up(600))
    split = read_inchi(place, domain="uob", size=1).split
    assert split is not None
    assert (split == TEST).float().mean().item() == pytest.approx(0.2, abs=0.05)
    assert (split == VALIDATION).float().mean().item() == pytest.approx(0.1, abs=0.04)


def test_long_texts_are_left_out(tmp_path: Path) -> None:
    pairs = read_inchi(molecules(tmp_path), domain="uob", max_length=len(MOLECULES[3]))
    assert pairs.captions == [(MOLECULES[0],), (MOLECULES[3],), (MOLECULES[0],)]
    assert pairs.concept.tolist() == [0, 1, 0]


def test_samples_grow(tmp_path: Path) -> None:
    place = molecules(tmp_path)
    few, more = read_inchi(place, samples=10), read_inchi(place, samples=20)
    assert len(few.ids) == 10
    assert set(few.ids) < set(more.ids)
    with pytest.raises(ValueError, match=r"^read_inchi: samples is 36, but there are 35; pass at most that"):
        read_inchi(place, samples=36)


def test_damaged_files_stop_or_are_left_out(tmp_path: Path) -> None:
    place = molecules(tmp_path)
    (place / "UOB" / "images" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^read_inchi: 1 of 35 files can't be read \('.*2.png' is empty"):
        read_inchi(place)
    with pytest.warns(UserWarning, match=r"^read_inchi: left out 1 of 35 files that can't be read"):
        pairs = read_inchi(place, on_error="skip")
    assert len(pairs.captions) == len(pairs.images) == len(pairs.ids) == 34
    assert "uob/2.png" not in pairs.ids
    row = pairs.ids.index("uob/3.png")
    assert pairs.captions[row] == (MOLECULES[3],)
    assert pairs.style is not None
    assert pairs.style_names[pairs.style[row]] == "uob"


def test_messages(tmp_path: Path) -> None:
    place = molecules(tmp_path, ("uob",))
    for arguments, message in (
        ({"domain": "uop"}, "domain is 'uop'; pass one of"),
        ({"channels": 2}, "channels is 2; pass 3 for RGB or 1 for gray."),
        ({"size": -1}, "size is -1; pass an integer of at least 0."),
        ({"max_length": -1}, "max_length is -1; pass an integer of at least 0."),
        ({"max_length": 9}, f"'{place}' gives 0 drawings; pass at least 2."),
        ({"on_error": "stop"}, "on_error is 'stop'; pass one of 'raise', 'skip'"),
    ):
        with pytest.raises(ValueError, match=f"^read_inchi: {re.escape(message)}"):
            read_inchi(place, **{"domain": "uob", **arguments})
    with pytest.raises(FileNotFoundError, match=r"^read_inchi: .*BMS1000_inchi.csv' is not there"):
        read_inchi(place)
    (place / "UOB" / "UOB_inchi.csv").write_text("InChI,img_name\nInChI=1S/CH4,0.png\nmethane,1.png\n")
    with pytest.raises(ValueError, match=r"^read_inchi: uob/1.png has the InChI 'methane', which has no formula; rep"):
        read_inchi(place, domain="uob")


@pytest.mark.slow
def test_the_full_set() -> None:
    root = os.environ.get("HARDMIX_DATA", "")
    place = find_molecules(Path(root) / "molecules") if root else None
    if place is None:
        pytest.skip("molecules are not there")
    pairs = read_inchi(place, size=8)
    assert len(pairs.captions) == 13_784
    assert len(set(pairs.concept.tolist())) == 12_178
    assert pairs.split is not None
    assert torch.bincount(pairs.split).tolist() == [9_693, 1_345, 2_746]
    assert len({character for (text,) in pairs.captions for character in text}) == 48
