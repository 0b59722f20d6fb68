"""Emoji: what is shipped, how it is split, further styles from folders written here, and analogies by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import hardmix.data.emoji as module
from hardmix.data.emoji import captions, find_pictures, from_sheet, load_emoji, plain, read_emoji, relations, to_sheet
from hardmix.data.numbers import TEST, TRAIN, VALIDATION
from hardmix.data.pairs import Pairs

EMBEDDED = Path(str(files("hardmix.data"))) / "embedded"
BUILDER = Path(__file__).parents[2] / "tools" / "build_emoji_subset.py"
EMOJI = read_emoji()
NUMBER = {entry.label: row for row, entry in enumerate(EMOJI)}


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return load_emoji()


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_emoji_subset", BUILDER)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def draw(path: Path, colour: tuple[int, int, int], size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path, lossless=True)


def test_two_styles_of_every_emoji(pairs: Pairs) -> None:
    n = len(EMOJI)
    assert n == 1871
    assert pairs.images.shape == (2 * n, 3, 40, 40)
    assert pairs.images.dtype == torch.uint8
    assert pairs.concept.tolist() == [*range(n), *range(n)]
    assert pairs.style is not None
    assert pairs.style.tolist() == [0] * n + [1] * n
    assert pairs.style_names == ("noto", "twemoji")
    assert pairs.ids[:2] == ["noto/1F600", "noto/1F603"]
    assert pairs.ids[n] == "twemoji/1F600"
    assert (pairs.name, pairs.source) == ("emoji", "hardmix")
    assert pairs.license == "noto: Apache-2.0; twemoji: CC BY 4.0; texts: Unicode-3.0"
    assert pairs.captions[0] == ("grinning face", "grinning face: " + ", ".join(EMOJI[0].tags))
    assert list(pairs.captions[:n]) == list(pairs.captions[n:])
    assert len({entry.label for entry in EMOJI}) == len({entry.hexcode for entry in EMOJI}) == n
    assert all(entry.tags and entry.version > 0 for entry in EMOJI)


def test_groups_and_subgroups_nest(pairs: Pairs) -> None:
    assert len(pairs.group_names) == 9
    assert len(pairs.subgroup_names) == 98
    for row in (0, 700, 1870, 2000):
        entry = EMOJI[int(pairs.concept[row])]
        assert pairs.group_names[pairs.group[row]] == entry.group
        assert pairs.subgroup_names[pairs.subgroup[row]] == entry.subgroup
    assert len({(entry.group, entry.subgroup) for entry in EMOJI}) == 98


def test_pictures_show_what_their_names_say(pairs: Pairs) -> None:
    """Colours in both styles; and an emoji in one style is nearer to itself in the other one than most others are."""
    for label, (red, green, blue) in (
        ("red heart", (1, 0, 0)), ("green heart", (0, 1, 0)), ("blue heart", (0, 0, 1)), ("blue square", (0, 0, 1)),
        ("red circle", (1, 0, 0)), ("green circle", (0, 1, 0)), ("tomato", (1, 0, 0)),
    ):  # fmt: skip
        for row in (NUMBER[label], NUMBER[label] + len(EMOJI)):
            colour = pairs.images[row, :, 16:28, 16:28].float().mean((1, 2))
            assert int(colour.argmax()) == (red, green, blue).index(1), label
    small = torch.nn.functional.avg_pool2d(pairs.images.float(), 5).flatten(1)
    distance = torch.cdist(small[: len(EMOJI)], small[len(EMOJI) :])
    rank = (distance < distance.diagonal()[:, None]).sum(1)
    assert float((rank < 20).double().mean()) > 0.5  # chance: 0.011


def test_no_two_emoji_of_a_style_look_the_same(pairs: Pairs) -> None:
    for half in pairs.images.split(len(EMOJI)):
        assert len({picture.tobytes() for picture in half.numpy()}) == len(EMOJI)
        assert float(half.float().flatten(1).std(1).min()) > 1  # the faintest: a white square on white


def test_families_are_on_one_side_and_splits_have_their_size(pairs: Pairs) -> None:
    sides = defaultdict(set)
    for entry in EMOJI:
        sides[entry.family].add(entry.split)
    assert all(len(side) == 1 for side in sides.values())
    assert Counter(entry.split for entry in EMOJI) == {"train": 1217, "validation": 206, "test": 448}
    names = {TRAIN: "train", VALIDATION: "validation", TEST: "test"}
    assert pairs.split is not None
    assert [names[part] for part in pairs.split.tolist()] == 2 * [entry.split for entry in EMOJI]
    for group in pairs.group_names:
        share = Counter(entry.split for entry in EMOJI if entry.group == group)
        assert 0.2 < share["test"] / share.total() <= 0.25, group
        assert 0.09 < share["validation"] / share.total() <= 0.12, group


def test_variants_by_their_code_points_are_on_one_side() -> None:
    """Independent of the names: a sequence with a gender, hair or an arrow belongs to the one without."""
    split = {entry.hexcode: entry.split for entry in EMOJI}
    checked = 0
    for entry in EMOJI:
        base = re.sub("-200D-(2640|2642|27A1)", "", entry.hexcode)
        base = re.sub("^(1F468|1F469)(?=-200D-)(?!-200D-(2764|1F91D))", "1F9D1", base)
        base = re.sub("-200D-1F9B[0-3]$", "", base)
        if base != entry.hexcode and base in split:
            checked += 1
            assert split[base] == entry.split, entry
    assert checked > 150


@pytest.mark.parametrize(
    "labels",
    [
        ("firefighter", "man firefighter", "woman firefighter"),
        ("man: red hair", "woman: bald", "person", "boy", "old woman", "person: beard"),
        ("red heart", "light blue heart", "white heart"),
        ("red square", "white medium-small square", "black large square"),
        ("one o\u2019clock", "ten-thirty"),
        ("new moon", "full moon face", "crescent moon"),
        ("man walking: facing right", "person walking"),
        ("dog face", "dog"),
        ("keycap: 0", "keycap: #"),
        ("men holding hands", "woman and man holding hands"),
        ("prince", "princess", "person with crown"),
        ("up-right arrow", "left arrow"),
    ],
)
def test_variants_have_one_family(labels: tuple[str, ...]) -> None:
    assert len({EMOJI[NUMBER[label]].family for label in labels}) == 1


@pytest.mark.parametrize(
    "labels",
    [
        ("firefighter", "police officer"),
        ("flag: France", "flag: Norway", "black flag"),
        ("red heart", "red circle"),
        ("grinning face", "smiling face"),
        ("cat face", "grinning cat"),
        ("person biking", "person mountain biking"),
    ],
)
def test_other_concepts_have_other_families(labels: tuple[str, ...]) -> None:
    assert len({EMOJI[NUMBER[label]].family for label in labels}) == len(labels)


def test_the_builder_still_gives_the_same_families_and_splits(builder: ModuleType) -> None:
    assert [builder.family(entry.label, entry.subgroup) for entry in EMOJI] == [entry.family for entry in EMOJI]
    assert builder.splits(EMOJI) == [entry.split for entry in EMOJI]
    for label in ("family", "family: man, woman, boy", "flag: Sark", "flag: U.S. Outlying Islands"):
        assert builder.LEFT_OUT.fullmatch(label)
        assert label not in NUMBER
    assert not any(builder.LEFT_OUT.fullmatch(entry.label) for entry in EMOJI)


def unpacked(root: Path, *, code: str = "1F600") -> list[Path]:
    """The three packages with three emoji, a component and one that only one style has."""
    folders = [root / name for name in ("google", "twitter", "emojibase")]
    names = ("emoji-datasource-google", "emoji-datasource-twitter", "emojibase-data")
    for folder, name in zip(folders, names, strict=True):
        folder.mkdir()
        (folder / "package.json").write_text(json.dumps({"name": name, "version": "1"}))
    for k, name in enumerate(("google", "twitter")):
        for shade, file in enumerate(("1f600", "2764-fe0f", "1f9d1-200d-1f692", "1f3fb")):
            draw(folders[k] / "img" / name / "64" / f"{file}.png", (50 * k, 60 * shade, 200), 64)
    draw(folders[0] / "img" / "google" / "64" / "1f601.png", (1, 2, 3), 64)
    data = [
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "subgroup": 32, "order": 9, "tags": ["x"]},
        {"label": "firefighter", "hexcode": "1F9D1-200D-1F692", "group": 1, "subgroup": 25, "order": 3},
        {"label": "red heart", "hexcode": "2764", "group": 0, "subgroup": 14, "order": 2},
        {"label": "only Noto", "hexcode": "1F601", "group": 0, "subgroup": 0, "order": 4},
        {"label": "grinning face", "hexcode": code, "group": 0, "subgroup": 0, "order": 1},
    ]
    for item in data:
        item.update(tags=["t", "\u00e9"], version=1)
    groups = {
        "groups": {"0": "smileys", "1": "people", "2": "component"},
        "subgroups": {"0": "face", "14": "heart", "25": "person-role", "32": "skin-tone"},
    }
    (folders[2] / "en").mkdir()
    (folders[2] / "meta").mkdir()
    (folders[2] / "en" / "data.json").write_text(json.dumps(data))
    (folders[2] / "meta" / "groups.json").write_text(json.dumps(groups))
    return folders


def test_the_builder_makes_the_same_files_twice(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = unpacked(tmp_path)
    made = []
    for k in range(2):
        target = tmp_path / str(k)
        target.mkdir()
        monkeypatch.setattr(builder, "TARGET", target)
        monkeypatch.setattr("sys.argv", ["build", *map(str, folders)])
        assert builder.main() == 0
        monkeypatch.setattr("sys.argv", ["build", *map(str, folders), "--check"])
        assert builder.main() == 0
        made.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert made[0] == made[1]
    assert sorted(made[0]) == ["emoji-noto.png", "emoji-twemoji.png", "emoji.json"]
    record = json.loads(made[0]["emoji.json"])
    assert [entry[:3] for entry in record["emoji"]] == [
        ["1F600", "grinning face", ["t", "\u00e9"]],
        ["2764", "red heart", ["t", "\u00e9"]],
        ["1F9D1-200D-1F692", "firefighter", ["t", "\u00e9"]],
    ]
    assert record["styles"]["noto"]["source"] == "emoji-datasource-google 1"
    sheet = np.array(Image.open(tmp_path / "0" / "emoji-twemoji.png"))
    assert sheet.shape == (40, 1600, 3)
    assert [sheet[20, 40 * k + 20].tolist() for k in range(4)] == [
        [50, 0, 200], [50, 60, 200], [50, 120, 200], [255, 255, 255],
    ]  # fmt: skip
    (tmp_path / "1" / "emoji.json").write_text("{}")
    assert builder.main() == 1
    assert "DIFFERS" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["build", str(folders[1]), str(folders[0]), str(folders[2])])
    with pytest.raises((SystemExit, FileNotFoundError)):
        builder.main()
    draw(folders[0] / "img" / "google" / "64" / "1f600.png", (0, 60, 200), 64)
    monkeypatch.setattr("sys.argv", ["build", *map(str, folders)])
    with pytest.raises(SystemExit, match=r"noto draws 'red heart' and 'grinning face' alike"):
        builder.main()


def test_what_is_shipped_is_small_and_licensed() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.glob("emoji*")) < 7e6
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 15e6
    notice = (EMBEDDED / "NOTICE").read_text("utf-8")
    for words in (
        "Apache License, Version 2.0", "https://creativecommons.org/licenses/by/4.0/", "Twitter, Inc and other contrib",
        "Copyright Google Inc.", "Copyright (c) 2017-2019 Miles Johnson", "UNICODE LICENSE V3", "Unicode, Inc.",
        "Copyright (c) 2013 Cal Henderson", "Changed: laid over white",
    ):  # fmt: skip
        assert words in notice


def test_a_sheet_is_its_pictures_side_by_side() -> None:
    pixels = torch.randint(0, 256, (43, 3, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sheet = to_sheet(pixels)
    assert sheet.shape == (80, 1600, 3)
    assert torch.equal(sheet[40:, 40:80].permute(2, 0, 1), pixels[41])
    assert bool((sheet[40:, 120:] == 255).all())
    assert torch.equal(from_sheet(sheet.permute(2, 0, 1), 43), pixels)


@pytest.mark.parametrize("size", [16, 64])
def test_another_size_shows_the_same(pairs: Pairs, size: int) -> None:
    scaled = load_emoji("twemoji", size=size)
    assert scaled.images.shape == (len(EMOJI), 3, size, size)
    means = scaled.images.float().mean((2, 3))
    assert torch.allclose(means, pairs.images[len(EMOJI) :].float().mean((2, 3)), atol=2.0)


def test_flags_can_be_left_out(pairs: Pairs) -> None:
    fewer = load_emoji(flags=False)
    rows = torch.tensor([EMOJI[k].group != "flags" for k in pairs.concept.tolist()]).nonzero()[:, 0]
    assert torch.equal(fewer.images, pairs.images[rows])
    assert torch.equal(fewer.concept, pairs.concept[rows])  # concepts keep their numbers
    assert fewer.group_names == pairs.group_names
    assert len(rows) == 2 * 1610


def test_further_styles_come_from_folders(tmp_path: Path) -> None:
    draw(tmp_path / "deep" / "1f600.webp", (255, 0, 0))
    draw(tmp_path / "deep" / "emoji_u2764_fe0f.png", (0, 255, 0), 30)
    draw(tmp_path / "1F9D1-200D-1F692.png", (0, 0, 255))
    draw(tmp_path / "1f9d1-1f3fb-200d-1f692.png", (9, 9, 9))  # a skin tone: no emoji of the set
    draw(tmp_path / "64.png", (9, 9, 9))
    (tmp_path / "2764.svg").write_text("<svg/>")
    both = load_emoji(("mine", "noto"), folders={"mine": str(tmp_path)}, size=12)
    found = [NUMBER["grinning face"], NUMBER["firefighter"], NUMBER["red heart"]]
    assert sorted(both.concept[:3].tolist()) == sorted(found)
    assert both.images.shape == (3 + len(EMOJI), 3, 12, 12)
    colours = {EMOJI[both.concept[k]].label: both.images[k, :, 6, 6].tolist() for k in range(3)}
    assert colours == {"grinning face": [255, 0, 0], "red heart": [0, 255, 0], "firefighter": [0, 0, 255]}
    assert both.style_names == ("mine", "noto")
    assert both.license == "mine: see its package; noto: Apache-2.0; texts: Unicode-3.0"
    assert both.source == f"hardmix, {tmp_path}"
    assert both.ids[0].startswith("mine/")
    assert both.captions[0] == captions(EMOJI[both.concept[0]])
    part = both.part("train", ["mine"])
    assert part.style_names == ("mine", "noto")
    assert all(name.startswith("mine/") for name in part.ids)
    own = load_emoji(("noto",), folders={"noto": tmp_path})  # a larger drawing of a style that is shipped
    assert own.images.shape == (3, 3, 40, 40)


def test_of_two_spellings_side_by_side_the_full_one_counts(tmp_path: Path) -> None:
    draw(tmp_path / "26a7.png", (255, 0, 0))
    draw(tmp_path / "26a7-fe0f.png", (0, 255, 0))
    assert find_pictures("test", tmp_path, ["26A7"]) == {"26A7": tmp_path / "26a7-fe0f.png"}
    draw(tmp_path / "large" / "26a7.png", (0, 0, 255))
    with pytest.raises(ValueError, match=r"^test: .* has two pictures of 26A7, '.*' and '.*'; pass the folder that"):
        find_pictures("test", tmp_path, ["26A7"])


@pytest.mark.parametrize("code", ["1F3F3-FE0F-200D-1F308", "1f3f3-200d-1f308", "emoji_u1f3f3_fe0f_200d_1f308"])
def test_code_points_have_one_spelling(code: str) -> None:
    assert plain(code) == "1F3F3-200D-1F308"


def test_unreadable_pictures_are_listed_or_skipped(tmp_path: Path) -> None:
    draw(tmp_path / "1f600.png", (255, 0, 0))
    (tmp_path / "2764.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"^load_emoji: 1 of 2 files can't be read \('.*2764.png' is not an image"):
        load_emoji("mine", folders={"mine": tmp_path})
    with pytest.warns(UserWarning, match="load_emoji: left out 1 of 2 files") as warned:
        kept = load_emoji("mine", folders={"mine": tmp_path}, on_error="skip")
    assert warned[0].filename == __file__
    assert kept.concept.tolist() == [NUMBER["grinning face"]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: load_emoji(("notto",)), ValueError, r"styles is 'notto'; pass one of 'noto', 'twemoji' \(did you"),
        (lambda p: load_emoji(("noto", "noto")), ValueError, r"pass one or more different names\."),
        (lambda p: load_emoji(()), ValueError, r"styles is \(\); pass one or more"),
        (lambda p: load_emoji(size=0), ValueError, "size is 0"),
        (lambda p: load_emoji(on_error="no"), ValueError, "on_error is 'no'"),
        (lambda p: load_emoji("x", folders={"x": p}), ValueError, "holds no PNG or WebP file with the code points"),
        (lambda p: load_emoji("x", folders={"x": p / "no"}), FileNotFoundError, "is not there; pass the folder"),
        (lambda p: load_emoji("x", folders={"x": p / "f"}), FileNotFoundError, "is a file; pass the folder"),
        (lambda p: relations(split="tests"), ValueError, r"split is 'tests'; .* \(did you mean \"test\"\?\)"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, call: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(error, match=rf"^(load_emoji|relations): .*{message}"):
        call(tmp_path)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped files that may be damaged."""
    (tmp_path / "embedded").mkdir()
    for path in EMBEDDED.glob("emoji*"):
        shutil.copy(path, tmp_path / "embedded")
    monkeypatch.setattr(module, "files", lambda _: tmp_path)
    return tmp_path / "embedded"


DAMAGED = r"^load_emoji: '.*{}' is missing or damaged; reinstall hardmix\.$"


def test_damaged_sheets_are_named(copied: Path) -> None:
    path = copied / "emoji-noto.png"
    values = np.array(Image.open(path))
    values[400, 1000, 1] ^= 1
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=DAMAGED.format("emoji-noto.png")):
        load_emoji()
    Image.fromarray(values[:-40]).save(path)
    with pytest.raises(ValueError, match=DAMAGED.format("emoji-noto.png")):
        load_emoji()
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=DAMAGED.format("emoji-noto.png")):
        load_emoji()
    path.unlink()
    with pytest.raises(ValueError, match=DAMAGED.format("emoji-noto.png")):
        load_emoji()
    assert len(load_emoji("twemoji").ids) == len(EMOJI)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"emoji": []}', '{"emoji": [["1", "a"]]}', '{"emoji": ["12345678"]}', '{"emoji": 3}']
)
def test_a_damaged_record_is_named(copied: Path, content: str) -> None:
    (copied / "emoji.json").write_text(content)
    for read in (load_emoji, read_emoji, relations):
        with pytest.raises(ValueError, match=DAMAGED.format("emoji.json")):
            read()


def test_a_record_without_a_style_is_named(copied: Path) -> None:
    record = json.loads((copied / "emoji.json").read_text("utf-8"))
    del record["styles"]
    (copied / "emoji.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=DAMAGED.format("emoji.json")):
        load_emoji()


def test_the_recorded_hashes_are_those_of_the_pixels(pairs: Pairs) -> None:
    styles = json.loads((EMBEDDED / "emoji.json").read_text("utf-8"))["styles"]
    for style, half in zip(("noto", "twemoji"), pairs.images.split(len(EMOJI)), strict=True):
        assert hashlib.sha256(half.numpy().tobytes()).hexdigest() == styles[style]["sha256_of_pixels"]


def words(relation: module.Relation) -> tuple[str, ...]:
    return tuple(EMOJI[row].label for row in relation[1:])


def test_analogies_by_kind() -> None:
    found = relations()
    assert Counter(relation.kind for relation in found) == {
        "gender": 2 * 90 * 89 + 4 * 87 * 86,
        "hair": 20 * 3 * 2,
        "colour": 496,
        "clock": 2 * 12 * 11,
        "moon": 2 * 4 * 3,
        "animal": 2 * 10 * 9,
        "direction": 2 * 18 * 17,
        "cat": 2 * 7 * 6,
    }
    assert len(set(found)) == len(found)
    assert all(len(set(relation[1:])) == 4 for relation in found)
    assert not any(EMOJI[row].group == "flags" for relation in found for row in relation[1:])
    by_kind = defaultdict(set)
    for relation in found:
        by_kind[relation.kind].add(words(relation))
    for kind, four in (
        ("gender", ("man firefighter", "woman firefighter", "man astronaut", "woman astronaut")),
        ("gender", ("woman cook", "cook", "princess", "person with crown")),
        ("gender", ("people wrestling", "men wrestling", "person", "man")),
        ("hair", ("man: red hair", "man: bald", "person: red hair", "person: bald")),
        ("colour", ("red heart", "blue heart", "red circle", "blue circle")),
        ("colour", ("red apple", "green apple", "red square", "green square")),
        ("colour", ("large orange diamond", "large blue diamond", "orange book", "blue book")),
        ("clock", ("one o\u2019clock", "one-thirty", "ten o\u2019clock", "ten-thirty")),
        ("moon", ("full moon face", "full moon", "new moon face", "new moon")),
        ("animal", ("dog face", "dog", "cat face", "cat")),
        ("direction", ("man running", "man running: facing right", "person kneeling", "person kneeling: facing right")),
        ("cat", ("crying face", "crying cat", "weary face", "weary cat")),
    ):
        assert four in by_kind[kind], four
        assert (*four[2:], *four[:2]) in by_kind[kind]
    assert not any(label.startswith("kiss: woman, man") for four in by_kind["gender"] for label in four)


def test_colours_are_replaced_word_by_word() -> None:
    colours = "red|orange|yellow|green|light blue|blue|purple|pink|brown|black|grey|white"
    for relation in relations():
        if relation.kind == "colour":
            a, b, c, d = words(relation)
            for x, y in ((a, b), (c, d)):
                assert re.sub(colours, "", x) == re.sub(colours, "", y)
            (first,), (second,), (third,), (fourth,) = (re.findall(colours, word) for word in (a, b, c, d))
            assert (first, second) == (third, fourth)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_analogies_of_a_split_ask_for_its_emoji(split: str) -> None:
    expected = [q for q in relations() if EMOJI[q.c].split == EMOJI[q.d].split == split]
    assert relations(split=split) == expected
    assert len(expected) > 5000
