"""Build the emoji that hardmix ships: a PNG sheet for each style, and one JSON file with names, keywords and splits.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0   # and unpack each
    python tools/build_emoji_subset.py GOOGLE TWITTER EMOJIBASE           # the three unpacked package folders
    python tools/build_emoji_subset.py GOOGLE TWITTER EMOJIBASE --check   # compare with what is committed

The rule is fixed: every emoji that both packages draw, in Unicode's order, but for skin tones and other components, and
for those that one of the styles draws exactly like another emoji (see LEFT_OUT; the builder refuses to go on if there
are more). Pictures are laid over white and scaled from 64 to 40 pixels. The hash that is recorded is that of the pixels
in that order, since the bytes of a PNG file depend on the version of the compressor.

A family is what is left of a name without the words that tell variants apart: gender, age and hair of people, colours,
sizes, directions; hours of the clock, phases of the moon and keys are one family each. For each group of emoji, its
families are shuffled (seed 0) and taken into the test split as long as they fit into 24 % of the group's emoji, then
into the validation split as long as they fit into 11 %; the rest is for training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hardmix.data.decode import read_picture, shown
from hardmix.data.emoji import SIDE, STYLES, Emoji, find_pictures, plain, to_sheet

TARGET = Path(__file__).resolve().parents[1] / "src" / "hardmix" / "data" / "embedded"
PACKAGES = {"noto": "emoji-datasource-google", "twemoji": "emoji-datasource-twitter", "texts": "emojibase-data"}
PICTURES = {"noto": "img/google/64", "twemoji": "img/twitter/64"}
SHARES = {"test": 0.24, "validation": 0.11}
COMPONENT = "component"

#: Drawn exactly like another emoji, which stays: both styles show families as the same few silhouettes, most of these
#: places fly another country's flag, and the Noto package has Saudi Arabia's flag in the place of Sark's.
LEFT_OUT = re.compile(
    r"family|family: (?:man|woman)\b.*|flag: (?:Bouvet Island|Ceuta & Melilla|Clipperton Island|Diego Garcia|"
    r"Heard & McDonald Islands|Sark|St\. Martin|Svalbard & Jan Mayen|U\.S\. Outlying Islands)"
)

PEOPLE = r"man|woman|person|men|women|people|boy|girl|child|old|older|Mrs\.|Mx|Santa"
COLOURS = r"red|orange|yellow|green|light blue|blue|purple|pink|brown|black|grey|white"
SIZES = r"large|small|medium-small|medium|low|high"
WAYS = r"(?:up|down|left|right)(?:-(?:up|down|left|right|facing))?|(?:up|down|left|right)wards|(?:counter)?clockwise"
VARIANT = re.compile(rf"(?<![\w-])(?:{PEOPLE}|{COLOURS}|{SIZES}|{WAYS})(?![\w\u2019-])")
FACES = ("animal-mammal", "animal-reptile")
#: names that don't share a word with their variants
SAME = {
    "merman": "merperson",
    "mermaid": "merperson",
    "prince": "royalty",
    "princess": "royalty",
    "person with crown": "royalty",
    "breast-feeding": "feeding baby",
    "woman and man holding hands": "holding hands",
}


def family(label: str, subgroup: str) -> str:
    """A name for an emoji and its variants."""
    if label in SAME:
        return SAME[label]
    if subgroup == "country-flag":
        return label
    if re.search(r" o\u2019clock$|-thirty$", label):
        return "clock"
    if subgroup == "sky-weather" and re.search(r"\bmoon\b", label):
        return "moon"
    name = label if label.startswith("flag:") else label.partition(":")[0]
    if subgroup in FACES:
        name = name.removesuffix(" face")
    return " ".join(VARIANT.sub(" ", name).split()) or "person"


def splits(entries: list[Emoji]) -> list[str]:
    """One split for each emoji, by family within each group."""
    generator = torch.Generator().manual_seed(0)
    of_family: dict[str, str] = {}
    for group in dict.fromkeys(entry.group for entry in entries):
        members: dict[str, int] = {}
        for entry in entries:
            if entry.group == group:
                members[entry.family] = members.get(entry.family, 0) + 1
        rest = {part: round(share * sum(members.values())) for part, share in SHARES.items()}
        names = list(members)
        for k in torch.randperm(len(names), generator=generator).tolist():
            part = next((part for part, room in rest.items() if members[names[k]] <= room), "train")
            if part in rest:
                rest[part] -= members[names[k]]
            if of_family.setdefault(names[k], part) != part:
                sys.exit(f"the family {names[k]!r} is in two groups")
    return [of_family[entry.family] for entry in entries]


def read_texts(folder: Path) -> list[Emoji]:
    """Every emoji of emojibase but the components, in Unicode's order, still without a split."""
    groups = json.loads((folder / "meta" / "groups.json").read_text("utf-8"))
    data = json.loads((folder / "en" / "data.json").read_text("utf-8"))
    entries = []
    for item in sorted((item for item in data if "group" in item), key=lambda item: item["order"]):
        group, subgroup = groups["groups"][str(item["group"])], groups["subgroups"][str(item["subgroup"])]
        label = item["label"]
        if group != COMPONENT and not LEFT_OUT.fullmatch(label):
            kin = family(label, subgroup)
            code = plain(item["hexcode"])
            entries.append(Emoji(code, label, tuple(item["tags"]), group, subgroup, item["version"], kin, ""))
    return entries


def package(folder: Path, name: str) -> str:
    """ "NAME VERSION" of an unpacked package, which has to be the right one."""
    found = json.loads((folder / "package.json").read_text("utf-8"))
    if found["name"] != name:
        sys.exit(f"{shown(folder)} holds {found['name']}, not {name}")
    return f"{name} {found['version']}"


def digest(paths: list[Path]) -> str:
    """sha256 of the contents of some files, one after the other."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for style, name in PACKAGES.items():
        parser.add_argument(
            style,
            type=Path,
            metavar=name.removeprefix("emoji-datasource-").removesuffix("-data").upper(),
            help=f"unpacked {name}",
        )
    parser.add_argument("--check", action="store_true", help="compare with the committed record, write nothing")
    arguments = parser.parse_args()

    entries = read_texts(arguments.texts)
    codes = [entry.hexcode for entry in entries]
    files = {style: find_pictures("build", getattr(arguments, style) / PICTURES[style], codes) for style in STYLES}
    entries = [entry for entry in entries if all(entry.hexcode in found for found in files.values())]
    entries = [entry._replace(split=part) for entry, part in zip(entries, splits(entries), strict=True)]

    styles: dict[str, Any] = {}
    sheets = {}
    for style, found in files.items():
        paths = [found[entry.hexcode] for entry in entries]
        pixels = torch.stack([read_picture(path, shown(path), size=SIDE, channels=3) for path in paths])
        first: dict[bytes, str] = {}
        for entry, picture in zip(entries, pixels, strict=True):
            other = first.setdefault(picture.numpy().tobytes(), entry.label)
            if other != entry.label:
                sys.exit(f"{style} draws {entry.label!r} and {other!r} alike; leave one of them out")
        sheets[style] = to_sheet(pixels)
        styles[style] = {
            "license": STYLES[style],
            "source": package(getattr(arguments, style), PACKAGES[style]),
            "sha256_of_files": digest(paths),
            "sha256_of_pixels": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        }
    texts = {
        "license": "MIT, Unicode-3.0",
        "source": package(arguments.texts, PACKAGES["texts"]),
        "sha256_of_files": digest([arguments.texts / "en" / "data.json", arguments.texts / "meta" / "groups.json"]),
    }
    head = json.dumps({"name": "emoji", "styles": styles, "texts": texts, "fields": Emoji._fields}, indent=2)
    lines = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
    text = f'{head.removesuffix("}").rstrip()},\n  "emoji": [\n{lines}\n  ]\n}}\n'

    if arguments.check:
        same = (TARGET / "emoji.json").read_text("utf-8") == text
        sys.stdout.write("the committed record agrees\n" if same else "the committed record DIFFERS\n")
        return 0 if same else 1
    for style, sheet in sheets.items():
        path = TARGET / f"emoji-{style}.png"
        Image.fromarray(sheet.numpy()).save(path, optimize=True)
        sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes\n")
    (TARGET / "emoji.json").write_text(text, "utf-8", newline="\n")
    counts = {part: sum(entry.split == part for entry in entries) for part in ("train", "validation", "test")}
    sys.stdout.write(f"emoji.json: {(TARGET / 'emoji.json').stat().st_size:,} bytes, {len(entries)} emoji, {counts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
