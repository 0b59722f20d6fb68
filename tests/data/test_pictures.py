"""Pictures with numbers, from small files written here: what is read, where it is looked for, and what is refused."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hardmix.data import picture_folder, pictures
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.picture_folder import read_picture_table, squared
from hardmix.data.pictures import (
    MOLECULE_DOMAINS,
    WEIGHTS,
    find_molecules,
    find_solar_cells,
    formula,
    read_molecules,
    read_solar_cells,
)

#: InChI, atoms other than hydrogen, molecular weight as chemical suppliers print it
MOLECULES = [
    ("InChI=1S/H2O/h1H2", 1, 18.015),
    ("InChI=1S/C9H8O4/c1-6(10)13-8-5-3-2-4-7(8)9(11)12/h2-5H,1H3,(H,11,12)", 13, 180.16),  # aspirin
    ("InChI=1S/C8H10N4O2/c1-10-4-9-6-5(10)7(13)12(3)8(14)11(6)2/h4H,1-3H3", 14, 194.19),  # caffeine
    ("InChI=1S/C6H8N2.2ClH/c7-5-1-2-6(8)4-3-5;;/h1-4H,7-8H2;2*1H", 10, 181.06),  # a diamine with two HCl
    ("InChI=1S/2C2H4O2.Sn/c2*1-2(3)4;/h2*1H3,(H,3,4);/q;;+2/p-2", 9, 236.80),  # tin acetate: two protons less
    ("InChI=1S/I2/c1-2", 2, 253.80),
    ("InChI=1/C3H6O/c1-3(2)4/h1-2H3", 4, 58.08),  # not a standard InChI
]


def drawing(number: int, size: tuple[int, int] = (60, 30)) -> Image.Image:
    """Black and white, with a box that is `number` + 1 pixels wide and as high as the picture."""
    pixels = np.full((size[1], size[0]), 255, np.uint8)
    pixels[:, 10 : 11 + number] = 0
    return Image.fromarray(pixels)


def molecules(root: Path, domains: tuple[str, ...] = MOLECULE_DOMAINS) -> Path:
    """The package's folder with seven drawings a source, the last one of each a molecule that came before."""
    place = root / "image2inchi" / "data" / "dataset"
    for shift, name in enumerate(name.upper() for name in domains):
        (place / name / "images").mkdir(parents=True)
        rows = []
        for number in range(7):
            drawing(number).convert("1" if shift else "RGB").save(place / name / "images" / f"{number}.png")
            rows.append(f'"{MOLECULES[min(number, 5)][0]}",{number}.png')
        (place / name / f"{name}_inchi.csv").write_text("\n".join(["InChI,img_name", *rows]) + "\n")
        drawing(50).save(place / name / "images" / "no-inchi.png")
    return place


def solar_cells(root: Path) -> Path:
    place = root / "elpv_dataset" / "data"
    (place / "images").mkdir(parents=True)
    lines = []
    for number in range(1, 9):
        Image.new("L", (300, 300), 20 * number).save(place / "images" / f"cell{number:04d}.png")
        third = ("0.0", "0.3333333333333333", "0.6667", "1")[number % 4]
        lines.append(f"images/cell{number:04d}.png  {third}     {'mono' if number < 4 else 'poly'}")
    (place / "labels.csv").write_text("\n".join(lines) + "\n\n")
    return place


def own(root: Path, *, count: int = 12, header: str = "file,price,split", row: str = "{k:02d}.png,{k}.5,train") -> Path:
    """A folder of pictures, red as their number, with a table beside them."""
    (root / "deep").mkdir(parents=True)
    for k in range(count):
        Image.new("RGB", (20, 10), (k, 100, 200)).save(root / f"{k:02d}.png")
        Image.new("L", (20, 10)).save(root / "deep" / f"{k:02d}.png")
    return table(root, "\n".join([header, *(row.format(k=k) for k in range(count))]))


def table(root: Path, text: str) -> Path:
    (root / "t.csv").write_text(text + "\n", encoding="utf-8")
    return root


def read_own(root: Path, **arguments: Any) -> Numbers:
    return read_picture_table(root, root / "t.csv", **{"target": "price", **arguments})


@pytest.mark.parametrize(("inchi", "heavy", "weight"), MOLECULES)
def test_heavy_atoms_and_weight(inchi: str, heavy: int, weight: float) -> None:
    atoms = formula("test", inchi)
    assert sum(count for element, count in atoms.items() if element != "H") == heavy
    assert sum(count * WEIGHTS[element] for element, count in atoms.items()) == pytest.approx(weight, abs=0.012)


COMPOUND = st.dictionaries(st.sampled_from(sorted(WEIGHTS)), st.integers(1, 200), min_size=1)


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.tuples(st.integers(1, 12), COMPOUND), min_size=1, max_size=4), protons=st.integers(-9, 9))
def test_formulas_are_counted_atom_by_atom(parts: list[tuple[int, dict[str, int]]], protons: int) -> None:
    expected: list[str] = []
    text = []
    for times, compound in parts:
        expected += times * [element for element, count in compound.items() for _ in range(count)]
        compact = "".join(f"{element}{count if count > 1 else ''}" for element, count in compound.items())
        text.append(f"{times if times > 1 else ''}{compact}")
    counted = Counter(expected)
    counted["H"] += protons
    layers = ["InChI=1S", ".".join(text), "h1-2H", *([f"p{protons:+d}"] if protons else [])]
    assert formula("test", "/".join(layers)) == counted


@pytest.mark.parametrize(
    "inchi", ["", "C6H6", "InChI=1S/", "InChI=1S//c1", "InChI=1S/p+1", "InChI=1S/C6H6.", "InChI=1S/c6"]
)
def test_an_inchi_without_a_formula_is_refused(inchi: str) -> None:
    with pytest.raises(ValueError, match=rf"^here has the InChI '{re.escape(inchi)}', which has no formula; repair"):
        formula("here", inchi)


def test_molecules_are_read_with_their_numbers(tmp_path: Path) -> None:
    data = read_molecules(molecules(tmp_path))
    assert data.inputs.shape == (35, 1, 64, 64)
    assert (data.inputs.dtype, data.labels.dtype) == (torch.uint8, torch.float64)
    assert data.labels.view(5, 7).tolist() == [[1, 13, 14, 10, 9, 2, 2]] * 5
    assert (data.kind, data.target, data.name, data.split) == ("images", "heavy-atoms", "molecules", None)
    assert data.sample_id(0) == "bms1000/0.png"
    assert data.sample_id(34) == "uspto/6.png"
    weights = read_molecules(find_molecules(tmp_path) or Path(), target="weight", domain="jpo")
    assert weights.labels.tolist() == pytest.approx([m[2] for m in MOLECULES[:6]] + [253.80], abs=0.012)


def test_the_margin_of_a_drawing_goes_and_the_rest_stays(tmp_path: Path) -> None:
    place = molecules(tmp_path, ("uob",))
    pixels = np.full((90, 200), 255, np.uint8)
    pixels[20, 30:190] = 0  # 160 wide, 40 high: the scaled one is 16 by 4
    pixels[59, 30:190] = 0
    pixels[20:60, [30, 189]] = 0
    Image.fromarray(pixels).save(place / "UOB" / "images" / "0.png")
    Image.new("L", (50, 50), 255).save(place / "UOB" / "images" / "1.png")
    data = read_molecules(place, domain="uob", size=16)
    frame = data.inputs[0, 0]
    assert bool((frame[:6] == 255).all())
    assert bool((frame[10:] == 255).all())
    assert bool((frame[[6, 9]] < 255).all())
    assert bool((frame[6:10, [0, 15]] < 255).all())
    assert bool((data.inputs[1] == 255).all())


@pytest.mark.parametrize("fill", [None, 255])
def test_squares_keep_the_aspect_and_fill_the_rest(fill: int | None) -> None:
    picture = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).repeat(1, 40, 20)
    out = squared(picture, 16, fill=fill)
    assert out.shape == (3, 16, 16)
    assert bool((out[:, :, 4:12] == picture[:, :1, :1]).all())
    rest = out[:, :, [0, 3, 12, 15]]
    assert bool((rest == (picture[:, :1, :1] if fill is None else 255)).all())
    assert squared(picture[:, :, :1].repeat(1, 500, 1), 8).shape == (3, 8, 8)  # 1 x 20,000 pixels
    assert bool((squared(torch.full((1, 1, 1), 7, dtype=torch.uint8), 4) == 7).all())


def test_fine_lines_become_gray_instead_of_vanishing() -> None:
    stripes = (torch.arange(300) % 2 * 255).to(torch.uint8).expand(1, 300, 300)
    inner = squared(stripes, 64)[0, 1:-1, 1:-1].float()
    assert inner.mean().item() == pytest.approx(127.5, abs=1)
    assert inner.std().item() < 8


def test_solar_cells_are_read_with_their_probabilities(tmp_path: Path) -> None:
    data = read_solar_cells(solar_cells(tmp_path))
    assert data.inputs.shape == (8, 1, 64, 64)
    assert data.inputs[:, 0, 0, 0].tolist() == [20 * number for number in range(1, 9)]
    assert data.labels.tolist() == [1 / 3, 2 / 3, 1, 0] * 2
    assert (data.kind, data.target, data.license) == ("images", "defect-probability", "CC BY-NC-SA 4.0")
    assert list(data.ids[2:4]) == ["mono/cell0003.png", "poly/cell0004.png"]
    assert read_solar_cells(tmp_path / "elpv_dataset" / "data", domain="mono", size=10).inputs.shape == (3, 1, 10, 10)


@pytest.mark.parametrize(
    ("make", "find", "package"),
    [(molecules, find_molecules, "image2inchi"), (solar_cells, find_solar_cells, "elpv_dataset")],
)
def test_where_the_sets_are_found(
    tmp_path: Path, make: Callable[[Path], Path], find: Callable[[Path], Path | None], package: str
) -> None:
    assert find(tmp_path) is None
    assert find(tmp_path / "gone") is None
    place = make(tmp_path / "site")
    assert find(tmp_path / "site") == find(tmp_path / "site" / package) == find(place) == find(place.parent) == place
    sdist = make(
        tmp_path / "sdist" / "package-1.0" / "src" if package == "elpv_dataset" else tmp_path / "sdist" / "p-1"
    )
    assert find(tmp_path / "sdist") == sdist


def test_domains_are_joined_and_keep_their_order(tmp_path: Path) -> None:
    place = molecules(tmp_path, ("jpo", "uob", "uspto"))
    both = read_molecules(place, domain="USPTO+uob")
    assert [name.split("/")[0] for name in both.ids] == ["uob"] * 7 + ["uspto"] * 7
    with pytest.raises(FileNotFoundError, match=r"BMS1000_inchi.csv' is not there; .* pass the domains that are there"):
        read_molecules(place)


def test_a_subset_is_the_same_each_time_and_grows(tmp_path: Path) -> None:
    place = molecules(tmp_path)
    whole = read_molecules(place)
    few, again, more = (read_molecules(place, samples=samples) for samples in (10, 10, 20))
    assert few.inputs.equal(again.inputs)
    assert few.ids == again.ids == [name for name in whole.ids if name in few.ids]
    assert set(few.ids) < set(more.ids)
    assert len({name.split("/")[0] for name in more.ids}) == 5
    for k, name in enumerate(few.ids):
        row = list(whole.ids).index(name)
        assert few.labels[k] == whole.labels[row]
        assert few.inputs[k].equal(whole.inputs[row])


def test_one_drawing_of_each_molecule(tmp_path: Path) -> None:
    data = read_molecules(molecules(tmp_path), domain="uob+uspto", unique=True)
    assert list(data.ids) == [f"uob/{number}.png" for number in range(6)]
    assert len(set(data.labels.tolist())) == 6


def test_damaged_files_stop_or_are_left_out(tmp_path: Path) -> None:
    place = molecules(tmp_path)
    (place / "UOB" / "images" / "2.png").write_bytes(b"")
    (place / "JPO" / "images" / "3.png").write_bytes((place / "JPO" / "images" / "3.png").read_bytes()[:60])
    (place / "CLEF" / "images" / "4.png").unlink()
    message = r"3 of 35 files can't be read \('.*4.png' does not exist, '.*3.png' .*, '.*2.png' is empty \(0 bytes\)\)"
    with pytest.raises(ValueError, match=rf"^read_molecules: {message}; replace or remove them, or pass on_error="):
        read_molecules(place)
    with pytest.warns(UserWarning, match=r"^read_molecules: left out 3 of 35 files that can't be read \('.*4.png'"):
        data = read_molecules(place, on_error="skip")
    assert data.inputs.shape[0] == len(data.labels) == len(data.ids) == 32
    assert not {"uob/2.png", "jpo/3.png", "clef/4.png"} & set(data.ids)
    assert data.labels[data.ids.index("uob/3.png")] == 10
    for file in place.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"35 of 35 files can't be read \(.* and 15 more\); replace or remove them\.$"):
        read_molecules(place, on_error="skip")


LISTS = [  # text of a list of molecules, message
    ("InChI,file\na,b\n", "has no columns 'InChI' and 'img_name'; fetch the set again"),
    ('InChI,img_name\n"InChI=1S/CH4",../../x.png\n', r"leads out of its folder in row 2 \('../../x.png'\); repair"),
    ("InChI,img_name\nInChI=1S/CH4,/x.png\n", r"leads out of its folder in row 2 \('/x.png'\); repair"),
    ("InChI,img_name\nmethane,0.png\n", "uob/0.png has the InChI 'methane', which has no formula"),
    ("InChI,img_name\nInChI=1S/CH4,0.png\nInChI=1S/XeH4,1.png\n", "uob/1.png has the element 'Xe', whose weight"),
    (
        "InChI,img_name\nInChI=1S/CH4,0.png\nInChI=1S/CH4,1.png\n",
        r"same value \(16.043\) in every sample as its target",
    ),
    ("InChI,img_name\n", "dataset' gives 0 samples; pass at least 2"),
    ("InChI,img_name\nInChI=1S/CH4\n", "has 1 cells in row 2 but 2 in its header; repair that row"),
]


@pytest.mark.parametrize(("text", "message"), LISTS)
def test_what_is_wrong_with_a_list_of_molecules_is_said(tmp_path: Path, text: str, message: str) -> None:
    place = molecules(tmp_path, ("uob",))
    (place / "UOB" / "UOB_inchi.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"^read_molecules: .*{message}"):
        read_molecules(place, domain="uob", target="weight")


@pytest.mark.parametrize(
    "line",
    ["images/cell0001.png 0.5 mono", "images/cell0001.png 1.0 thin", "images/cell0001.png 1.0", "../c.png 1.0 mono"]
    + [f"images/cell0001.png {wrong} mono" for wrong in ("nan", "inf", "-0.3333", "1.3333", "high")],
)
def test_what_is_wrong_with_a_list_of_cells_is_said(tmp_path: Path, line: str) -> None:
    place = solar_cells(tmp_path)
    with (place / "labels.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(
        ValueError, match=rf"^read_solar_cells: .*labels.csv' has '{re.escape(line)}' in line 10, which"
    ):
        read_solar_cells(place)


def test_a_list_of_cells_that_is_missing_or_no_text(tmp_path: Path) -> None:
    place = solar_cells(tmp_path)
    (place / "labels.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"labels.csv' can't be read \(.*\); fetch the set again\.$"):
        read_solar_cells(place)
    (place / "labels.csv").unlink()
    assert find_solar_cells(tmp_path) == place
    with pytest.raises(FileNotFoundError, match=r"labels.csv' is not there; fetch the set again\.$"):
        read_solar_cells(place)


def test_memory_is_not_asked_for_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"8 pictures of 1x100000x100000 take 75 GiB, more than 8; pass a smaller size"
    ):
        read_solar_cells(solar_cells(tmp_path), size=100_000)
    monkeypatch.setattr(picture_folder, "MAX_BYTES", 8 * 64 * 64)
    assert len(read_solar_cells(tmp_path / "elpv_dataset" / "data").labels) == 8


def test_own_pictures_with_a_table(tmp_path: Path) -> None:
    words = ["train", "Test", "TRAIN", "val", "train", "test", "train", "valid", "train", "test", "train", "Validation"]
    root = own(tmp_path / "pictures", header="price,words,split,file")
    rows = [f"{k}.5,a/b,{words[k]},{'' if k < 11 else './'}{k:02d}.png" for k in range(12)]
    table(root, "\n".join(["price,words,split,file", *rows]))
    data = read_own(root)
    assert data.inputs.shape == (12, 3, 20, 20)
    assert data.inputs[:, :, 10, 10].tolist() == [[k, 100, 200] for k in range(12)]
    assert data.labels.tolist() == [k + 0.5 for k in range(12)]
    assert data.split is not None
    assert data.split.dtype == torch.uint8
    assert data.split.tolist() == [TRAIN, TEST, TRAIN, VALIDATION] * 3
    assert (data.kind, data.target, data.license, data.source) == ("images", "price", "yours", str(root / "t.csv"))
    assert (data.ids[3], data.ids[11]) == ("03.png", "./11.png")
    few = read_picture_table(root, "t.csv", target="price", samples=11, size=6, channels=1, fit="crop")
    assert few.inputs.shape == (11, 1, 6, 6)
    assert few.split is not None
    for k, name in enumerate(few.ids):
        row = list(data.ids).index(name)
        assert (few.labels[k], few.split[k]) == (data.labels[row], data.split[row])


def test_a_picture_is_kept_whole_or_cropped(tmp_path: Path) -> None:
    root = own(tmp_path / "p", header="file,price", row="{k:02d}.png,{k}")
    pixels = np.full((40, 80, 3), 50, np.uint8)
    pixels[:, :8] = 250  # at the left end only
    Image.fromarray(pixels).save(root / "00.png")
    whole, cropped = (read_own(root, fit=fit, size=40).inputs[0, 0] for fit in ("pad", "crop"))
    assert whole.max() == 250
    assert whole[0, 0] == whole[39, 39] == 50
    assert cropped.max() == 50
    assert read_own(root, fit="crop").inputs.shape == (12, 3, 10, 10)
    assert read_own(root).inputs.shape == (12, 3, 20, 20)
    Image.new("L", (30, 300)).save(root / "big.png")
    table(root, "\n".join(["file,price", *(f"{k:02d}.png,{k}" for k in range(11)), "big.png,9"]))
    assert read_own(root).inputs.shape == (12, 3, 20, 20)


def test_the_default_size_has_a_bound(tmp_path: Path) -> None:
    root = own(tmp_path / "p", header="file,price", row="{k:02d}.png,{k}")
    for k in range(12):
        Image.new("L", (400, 300)).save(root / f"{k:02d}.png")
    assert read_own(root, channels=1).inputs.shape == (12, 1, 224, 224)


def test_the_file_column_is_found_or_asked_for(tmp_path: Path) -> None:
    root = own(tmp_path / "p", header="price,mask,file", row="{k},deep/{k:02d}.png,{k:02d}.png")
    with pytest.raises(ValueError, match="names pictures in the columns 'mask', 'file'; pass one of them as file_col"):
        read_own(root)
    assert read_own(root, file_column="mask").ids[4] == "deep/04.png"
    with pytest.raises(ValueError, match=r"no column 'masks' with file names; pass one of .* \(did you mean \"mask\""):
        read_own(root, file_column="masks")
    table(root, "\n".join(["name,price", *(f"{k:02d},{k}" for k in range(12))]))
    with pytest.raises(
        ValueError, match=r"no column that names pictures in '.*'; write paths .* or pass file_column\.$"
    ):
        read_own(root)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    root = own(tmp_path / "p", header="file,price", row="{k:02d}.png,{k}")
    (root / "03.png").unlink()
    (root / "07.png").unlink()
    message = r"names 2 of 12 files that aren't in '.*p', the first of them in row 5 \('03.png'\); add them, or pass on"
    with pytest.raises(ValueError, match=message):
        read_own(root)
    (root / "05.png").write_text("not a picture")
    with pytest.warns(UserWarning, match=r"left out 3 of 12 files that can't be read \('.*03.png' does not exist, "):
        data = read_own(root, on_error="skip")
    assert data.labels.tolist() == [0, 1, 2, 4, 6, 8, 9, 10, 11]
    assert data.inputs[:, 0, 9, 9].tolist() == data.labels.tolist()
    assert list(data.ids) == [f"{int(k):02d}.png" for k in data.labels.tolist()]


ROWS = [f"{k:02d}.png,{k}" for k in range(12)]
TABLES = [  # header, rows that are replaced (counted as in a spreadsheet), message
    (
        "file,price",
        {4: "../p/02.png,2"},
        r"leads out of the folder in row 4 \('../p/02.png'\); write paths relative to",
    ),
    ("file,price", {4: "/etc/x.png,2"}, r"leads out of the folder in row 4 \('/etc/x.png'\); write paths relative"),
    ("file,price", {4: "./00.png,2"}, r"has the file './00.png' in row 2 and in row 4; keep one of them"),
    ("file,price", {4: ",2"}, r"names 1 of 12 files that aren't in '.*', the first of them in row 4 \(''\); add them"),
    ("file,price", {4: "02.png,nan", 5: "03.png,x"}, r"as its target 'price' in rows 4 \('nan'\), 5 \('x'\); repair"),
    ("file,price", {k: f"{k - 2:02d}.png,7" for k in range(2, 14)}, r"same value \(7\) in every sample as its target"),
    ("file,prize", {}, r"no column for the target 'price'; pass one of 'file', 'prize' \(did you mean \"prize\"\?\)"),
    ("file,price", dict.fromkeys(range(2, 14), ""), "has 0 rows; pass a table with at least 10"),
]


@pytest.mark.parametrize(("header", "changed", "message"), TABLES)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, header: str, changed: dict[int, str], message: str) -> None:
    root = own(tmp_path / "p")
    table(root, "\n".join([header, *(dict(enumerate(ROWS, 2)) | changed).values()]))
    with pytest.raises(ValueError, match=message) as raised:
        read_own(root)
    assert re.fullmatch(
        r"read_picture_table: '.*t.csv' (has|leads|names|is) .*\.|.*in every sample .*", str(raised.value)
    )


def test_a_link_is_the_picture_that_it_leads_to(tmp_path: Path) -> None:
    root = own(tmp_path / "pictures", header="file,price", row="{k:02d}.png,{k}")
    (root / "again.png").symlink_to("03.png")
    table(root, (root / "t.csv").read_text() + "again.png,7")
    with pytest.raises(ValueError, match=r"has the file 'again.png' in row 5 and in row 14; keep one of them"):
        read_own(root)


def test_a_parquet_table_goes_to_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = own(tmp_path / "p")
    (root / "t.csv").rename(root / "t.PARQUET")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^read_picture_table: '.*PARQUET' can only be read with pyarrow, which is"):
        read_picture_table(root, "t.PARQUET", target="price")


def test_what_is_wrong_with_a_split_is_said(tmp_path: Path) -> None:
    root = own(tmp_path / "p")
    with pytest.raises(ValueError, match="has 12 samples for training and 0 for testing in its 'split', but at lea"):
        read_own(root)
    table(root, "\n".join(["file,price,split", *(f"{row},tests" for row in ROWS)]))
    with pytest.raises(
        ValueError, match=r"has 'tests' in row 2 of its column 'split' \(did you mean \"test\"\?\); write"
    ):
        read_own(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "uob+usptoo"}, r"domain is 'usptoo'; pass one of .* \(did you mean \"uspto\"\?\)"),
        ({"domain": "uob+"}, "domain is ''; pass one of 'bms1000', 'clef'"),
        ({"domain": None}, "domain is None; pass one of 'bms1000', 'clef'"),
        ({"target": "wieght"}, r"target is 'wieght'; pass one of .* \(did you mean \"weight\"\?\)"),
        ({"size": -1}, "size is -1; pass an integer of at least 0"),
        ({"samples": -1}, "samples is -1; pass an integer of at least 0"),
        ({"samples": 36}, "samples is 36, but there are 35; pass at most that, or 0 for all"),
        ({"samples": 1}, "gives 1 samples; pass at least 2"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; pass one of 'raise', 'skip'"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^read_molecules: .*{message}"):
        read_molecules(molecules(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1.5}, "size is 1.5; pass an integer"),
        ({"channels": 2}, "channels is 2; pass 3 for RGB or 1 for gray"),
        ({"fit": "stretch"}, "fit is 'stretch'; pass one of 'pad', 'crop'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; pass one of 'raise', 'skip'"),
        ({"folder": "gone"}, "folder is 'gone', which is not there; pass the folder of the files"),
        ({"folder": __file__}, r"folder is '.*', which is a file; pass the folder of the files"),
        ({"table": "u.csv"}, r"table is 'u.csv', which is neither there nor in '.*'; pass a CSV, TSV or Parquet file"),
        ({"table": "/"}, "table is '/', which is a folder; pass a CSV, TSV or Parquet file"),
    ],
)
def test_bad_arguments_of_your_own_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    own(tmp_path / "p")
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"^read_picture_table: {message}"):
        read_picture_table(**{"folder": tmp_path / "p", "table": "t.csv", "target": "price", **arguments})


def full(name: str, find: Callable[[Path], Path | None]) -> Path:
    """The folder of a full set, where the environment variable HARDMIX_DATA says that it is."""
    if "HARDMIX_DATA" not in os.environ:
        pytest.skip("HARDMIX_DATA is not set")
    place = find(Path(os.environ["HARDMIX_DATA"]) / name)
    if place is None:
        pytest.skip(f"{name} is not there")
    return place


def test_the_full_set_of_molecules() -> None:
    place = full("molecules", find_molecules)
    heavy = {"bms1000": (1000, 24.43), "clef": (891, 28.88), "jpo": (449, 25.79), "uob": (5740, 13.73)}
    for domain, (count, mean) in (heavy | {"uspto": (5704, 31.03)}).items():
        drawings = list(pictures._drawings("test", place, domain))
        atoms = [formula("test", inchi) for _, _, inchi in drawings]
        assert len(atoms) == count
        assert sum(a.total() - a["H"] for a in atoms) / count == pytest.approx(mean, abs=0.005)
        assert {element for a in atoms for element in a} <= WEIGHTS.keys()
    data = read_molecules(place, samples=200)
    assert data.inputs.shape == (200, 1, 64, 64)
    assert 0.95 < data.inputs.float().mean().item() / 255 < 0.99


def test_the_full_set_of_solar_cells() -> None:
    place = full("solar-cells", find_solar_cells)
    cells = list(pictures._cells("test", place))
    assert Counter(kind for _, _, kind in cells) == {"mono": 1074, "poly": 1550}
    assert Counter(label for _, label, _ in cells) == {0: 1508, 1 / 3: 295, 2 / 3: 106, 1: 715}
    assert read_solar_cells(place, samples=100).inputs.shape == (100, 1, 64, 64)
