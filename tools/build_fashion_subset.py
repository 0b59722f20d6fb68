"""Build the fashion-mini data set that hardmix ships: the first images of each class of Fashion-MNIST, as two PNG
sheets.

    python tools/build_fashion_subset.py FOLDER           # FOLDER holds the four Fashion-MNIST IDX files, gzipped or
    not python tools/build_fashion_subset.py FOLDER --check   # build in memory and compare with what is committed

The rule is fixed: the first 1,200 images of each class of the training files and the first 300 of the test files, in
    the
order of the files, interleaved so that row r shows class r mod 10. The hash that is recorded is that of the pixels,
since the bytes of a PNG file depend on the version of the compressor.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hardmix.data.idx import FILES, find_idx, read_idx_set
from hardmix.data.packaged import NUM_CLASSES, to_sheet

PER_CLASS = {"train": 1200, "test": 300}
TARGET = Path(__file__).resolve().parents[1] / "src" / "hardmix" / "data" / "embedded"
RULE = "the first {} images of each class in the order of the file, interleaved: row r shows class r mod 10"


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """(10 count,) rows: the first of each class, the second of each class, ..."""
    rows = [(labels == label).nonzero()[:count, 0] for label in range(NUM_CLASSES)]
    return torch.stack(rows, 1).flatten()


def content_hash(folder: Path, name: str) -> str:
    """sha256 of an IDX file as it is before gzip."""
    plain = folder / name
    content = plain.read_bytes() if plain.is_file() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the four IDX files")
    parser.add_argument("--check", action="store_true", help="compare with the committed record, write nothing")
    arguments = parser.parse_args()

    folder = find_idx(arguments.folder)
    if folder is None:
        sys.exit(f"{arguments.folder} has none of {', '.join(FILES)}")
    train, train_labels, test, test_labels = read_idx_set(folder)
    record: dict[str, object] = {
        "name": "fashion-mini",
        "license": "MIT, Copyright 2017 Zalando SE; see NOTICE",
        "source": {"files": {name: content_hash(folder, name) for name in FILES}, "hash": "sha256 before gzip"},
    }
    sheets = {}
    for split, pixels, labels in (("train", train, train_labels), ("test", test, test_labels)):
        chosen = pixels[first_of_each_class(labels, PER_CLASS[split])]
        sheets[f"fashion-mini-{split}.png"] = to_sheet(chosen)
        record[split] = {
            "file": f"fashion-mini-{split}.png",
            "images": len(chosen),
            "rule": RULE.format(PER_CLASS[split]),
            "sha256_of_pixels": hashlib.sha256(chosen.numpy().tobytes()).hexdigest(),
        }

    text = json.dumps(record, indent=2) + "\n"
    if arguments.check:
        same = (TARGET / "fashion-mini.json").read_text("utf-8") == text
        sys.stdout.write("the committed record agrees\n" if same else "the committed record DIFFERS\n")
        return 0 if same else 1
    for name, sheet in sheets.items():
        Image.fromarray(sheet.numpy()).save(TARGET / name, optimize=True)
        sys.stdout.write(f"{name}: {(TARGET / name).stat().st_size:,} bytes\n")
    (TARGET / "fashion-mini.json").write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
