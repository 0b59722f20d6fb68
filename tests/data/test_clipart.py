"""Open Clip Art, from small folders written here: what a title is, what is left out, files that can't be trusted."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import hardmix.data.clipart as module
from hardmix.data.clipart import (
    Words,
    description_of,
    find_clipart,
    keywords_of,
    load_clipart,
    read_words,
    title_of,
)
from hardmix.data.pairs import Pairs, draw_split

HEAD = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
{doctype}<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<title>of the drawing</title><metadata><rdf:RDF><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:publisher><cc:Agent rdf:about=""><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
</cc:Work></rdf:RDF></metadata>"""
REST = '<path d="M 0,0 L 1,1"/></svg>\n'


def svg(title: str, keywords: tuple[str, ...] = (), description: str = "", doctype: str = "") -> str:
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return HEAD.format(title=title, keywords=items, description=description, doctype=doctype) + REST


def add(
    root: Path,
    name: str,
    title: str,
    keywords: tuple[str, ...] = (),
    description: str = "",
    size: tuple[int, int] = (12, 12),
    red: int = 9,
) -> None:
    """An SVG file, and the PNG that belongs to it: a red square, its last column transparent."""
    for kind in ("svg", "png"):
        (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "svg" / f"{name}.svg").write_text(svg(title, keywords, description), encoding="utf-8")
    image = Image.new("RGBA", size, (red, 100, 200, 255))
    image.paste((0, 0, 0, 0), (size[0] - 1, 0, size[0], size[1]))
    image.save(root / "png" / f"{name}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add(tmp_path, "animals/dog", "Big_dog", ("animal", "dog", "", "hash", "11"), "A big, brown  dog.", red=1)
    add(tmp_path, "animals/birds/owl", " Owl ", ("bird", "owl", "Bird", "tree_top"), "owl", red=2)
    add(tmp_path, "food/dog_02", "big dog 02", ("animal", "bone"), red=3)
    add(tmp_path, "food/soup", "Clipart by Nicu Buculei - soup", red=4)
    return tmp_path


def reds(pairs: Pairs) -> list[int]:
    return pairs.images[:, 0, 4, 4].tolist()


def test_pictures_with_their_texts(root: Path) -> None:
    got = load_clipart(root, size=8)
    assert got.ids == ["animals/birds/owl", "animals/dog", "food/dog_02", "food/soup"]
    assert reds(got) == [2, 1, 3, 4]
    assert list(got.captions) == [
        ("Owl", "Owl: bird, tree top"),
        ("Big dog", "Big dog: animal"),  # what both have in common
        ("Big dog", "Big dog: animal"),
        ("soup",),
    ]
    assert got.concept.tolist() == [0, 1, 1, 2]
    assert got.images.shape == (4, 3, 8, 8)
    assert got.images.dtype == torch.uint8
    assert got.images[0, :, 4, 7].min() > 150  # white shows through
    assert got.group is not None
    assert [got.group_names[k] for k in got.group] == ["animals", "animals", "food", "food"]
    assert (got.split, got.style, got.subgroup) == (None, None, None)
    assert (got.name, got.license, got.source) == ("openclipart", "public domain", str(root))
    assert load_clipart(root).images.shape == (4, 3, 64, 64)


def test_a_split_keeps_a_title_together(root: Path) -> None:
    for k in range(12):
        add(root, f"more/{k}", f"thing number {'abcdefghijkl'[k]}")
    got = load_clipart(root, size=8)
    for seed in range(5):
        split = draw_split(got.captions, test=0.4, seed=seed)
        assert split[1] == split[2]
    assert len(split.unique()) == 3


def test_a_description_of_one_picture_is_its_third_text(root: Path) -> None:
    (root / "svg" / "food" / "dog_02.svg").unlink()
    got = load_clipart(root, size=8)
    assert got.captions[1] == ("Big dog", "Big dog: animal, dog", "A big, brown dog.")
    assert len(got.captions) == 3  # a PNG without an SVG is nothing


def test_wide_pictures_are_kept_whole_on_white(root: Path) -> None:
    add(root, "animals/snake", "snake", size=(40, 10))
    picture = load_clipart(root, size=20).images[2]
    assert (picture[:, :7] == 255).all()
    assert picture[:, 10, 2].tolist() == [9, 100, 200]


@pytest.mark.parametrize(
    ("name", "title", "keywords"),
    [
        ("flags/norway", "Norway", ()),
        ("signs/norway", "Norway", ("Flag",)),
        ("a/b", "", ()),
        ("a/b", "EX", ()),
        ("a/b", "1 2 3 4", ()),
        ("a/b", "long " * 20, ()),
        ("a/b", "Lemon SVG theme", ()),
        ("a/b", "Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)", ()),
        ("a/b", "Etiquette Icons", ()),
        ("a/b", "R16 sibmission", ()),
        ("a/b", "HASH(0x868b0e8)", ()),
        ("a/b", "somebody@example.org", ()),
        ("a/b", "Untitled", ()),
        ("a/b", "Mikol\u009a Ale", ()),
    ],
)
def test_what_is_left_out(root: Path, name: str, title: str, keywords: tuple[str, ...]) -> None:
    add(root, name, title, keywords)
    assert len(load_clipart(root, size=8).ids) == 4


def test_titles_of_many_pictures_are_left_out(root: Path) -> None:
    for k in range(10):
        add(root, f"toys/{k}", "Ball" if k % 2 else "ball")
    got = load_clipart(root, size=8)
    assert len(got.ids) == 14
    assert len({got.captions[row] for row in range(4, 14)}) == 1
    assert got.concept[4:].unique().numel() == 1
    add(root, "toys/10", "ball")
    assert len(load_clipart(root, size=8).ids) == 4
    add(root, "food/stew", "clip art by Nicu Buculei - soup")  # the name of one of his pictures stands over all of them
    assert len(load_clipart(root, size=8).ids) == 3


def test_links_are_the_picture_that_they_lead_to(root: Path) -> None:
    os.symlink("dog.svg", root / "svg" / "animals" / "hound.svg")
    os.symlink("dog.png", root / "png" / "animals" / "hound.png")
    add(root, "other/wolf", "wolf")
    (root / "png" / "other" / "wolf.png").unlink()
    os.symlink("../animals/dog.png", root / "png" / "other" / "wolf.png")
    assert load_clipart(root, size=8).ids == ["animals/birds/owl", "animals/dog", "food/dog_02", "food/soup"]


def test_specks_and_bombs_are_left_out(root: Path, monkeypatch) -> None:
    add(root, "a/speck", "speck", size=(7, 7))
    add(root, "a/bomb", "bomb", size=(40, 41))
    add(root, "a/fits", "this fits", size=(40, 40))
    monkeypatch.setattr(module, "MAX_PIXELS", 1600)
    assert [name for name in load_clipart(root, size=8).ids if name.startswith("a/")] == ["a/fits"]


def test_some_pictures_are_always_the_same_ones(root: Path) -> None:
    for k in range(16):
        add(root, f"more/{k:02}", f"thing number {'abcdefghijklmnop'[k]}")
    every = load_clipart(root, size=8)
    few, more = (load_clipart(root, size=8, samples=k) for k in (5, 11))
    assert (len(few.ids), len(more.ids)) == (5, 11)
    assert set(few.ids) < set(more.ids)
    for name, concept, captions in zip(few.ids, few.concept.tolist(), few.captions, strict=True):
        row = every.ids.index(name)
        assert (every.concept[row], every.captions[row]) == (concept, captions)
    with pytest.raises(ValueError, match=r"^load_clipart: samples is 21, but there are 20; pass at most that"):
        load_clipart(root, samples=21)


def test_where_it_is_looked_for(root: Path, tmp_path_factory, monkeypatch) -> None:
    usual = tmp_path_factory.mktemp("usual")
    monkeypatch.setattr(module, "INSTALLED", usual / "nowhere")
    monkeypatch.setenv("HARDMIX_DATA", str(usual))
    monkeypatch.setenv("HOME", str(usual))
    monkeypatch.chdir(usual)
    with pytest.raises(FileNotFoundError, match=r"^load_clipart: openclipart is not in .*; get it \(apt-get download "):
        load_clipart()
    os.symlink(root, usual / "openclipart")
    assert load_clipart(size=8).source == str(usual / "openclipart")
    unpacked = usual / "unpacked" / "usr" / "share"
    unpacked.mkdir(parents=True)
    os.symlink(root, unpacked / "openclipart")
    for place in (usual / "unpacked", unpacked, unpacked / "openclipart"):
        assert find_clipart(place) == unpacked / "openclipart"
    (usual / "openclipart").unlink()
    monkeypatch.setattr(module, "INSTALLED", root)
    assert load_clipart(size=8).source == str(root)


def test_messages(root: Path, tmp_path_factory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"^load_clipart: path is '.*', which has no folders svg and png; pass"):
        load_clipart(empty)
    with pytest.raises(FileNotFoundError, match=r"^load_clipart: path is '.*', which is no folder; pass the folder"):
        load_clipart(empty / "x")
    with pytest.raises(ValueError, match=r"^load_clipart: size is 0; pass an integer of at least 1\.$"):
        load_clipart(root, size=0)
    with pytest.raises(ValueError, match=r"^load_clipart: on_error is 'ignore'; pass one of 'raise', 'skip'\.$"):
        load_clipart(root, on_error="ignore")
    add(empty, "a/b", "only one")
    with pytest.raises(ValueError, match=r"^load_clipart: '.*' gives 1 pictures with a title; pass at least 2\.$"):
        load_clipart(empty)


def test_files_that_cannot_be_read_are_listed_or_skipped(root: Path) -> None:
    (root / "svg" / "food" / "soup.svg").write_text("<svg><broken")
    with pytest.raises(
        ValueError, match=r"^load_clipart: 1 of 4 SVG files can't be read \('.*soup.svg' is not XML \(.*; replace or"
    ):
        load_clipart(root, size=8)
    with pytest.warns(UserWarning, match=r"^load_clipart: left out 1 of 4 SVG files") as warned:
        got = load_clipart(root, size=8, on_error="skip")
    assert warned[0].filename == __file__
    assert reds(got) == [2, 1, 3]
    (root / "svg" / "food" / "soup.svg").unlink()
    (root / "png" / "animals" / "dog.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^load_clipart: 1 of 3 files can't be read \('.*dog.png' is empty"):
        load_clipart(root, size=8)
    with pytest.warns(UserWarning, match=r"^load_clipart: left out 1 of 3 files") as warned:
        got = load_clipart(root, size=8, on_error="skip")
    assert warned[0].filename == __file__
    assert reds(got) == [2, 3]
    (root / "png" / "food" / "dog_02.png").unlink()
    with pytest.raises(ValueError, match=r"dog_02.png' does not exist"):
        load_clipart(root, size=8)
    with (
        pytest.warns(UserWarning, match="left out 2 of 3"),
        pytest.raises(ValueError, match=r"gives 1 readable pictures; pass at least 2\."),
    ):
        load_clipart(root, size=8, on_error="skip")


def written(path: Path, text: str | bytes) -> Words:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_words(path)


def test_words_are_those_of_the_work_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.svg"
    want = Words("Tom &#39;n Jerry \u00e9", "two\nlines", ("cat", "", "a & b"))
    text = svg("Tom &amp;#39;n Jerry \u00e9", ("cat", "", "a &amp; b"), "two\nlines")
    assert written(file, text) == want
    assert title_of(want) == "Tom 'n Jerry \u00e9"
    assert written(file, text.replace("UTF-8", "UTF-16").encode("utf-16")) == want
    assert written(file, text.replace("UTF-8", "iso-8859-1").encode("latin-1")) == want
    second = text.replace("</rdf:RDF>", "<cc:Work><dc:title>another</dc:title></cc:Work></rdf:RDF>")
    assert written(file, second) == want
    assert written(file, text[: text.index("<path")] + "<broken &") == want  # nobody looks beyond the texts
    assert written(file, '<svg xmlns="http://www.w3.org/2000/svg"><title>x</title></svg>') == Words("", "", ())
    many = svg("far down", ("x",)).replace("<metadata>", '<path d="M0"/>' * 20_000 + "<metadata>")
    assert written(file, many).title == "far down"


LAUGHS = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10}">' for k in range(1, 12))


@pytest.mark.parametrize(
    "declared",
    [
        '<!ENTITY lol "ha">',
        f'<!ENTITY l0 "ha">{LAUGHS}',
        '<!ENTITY lol SYSTEM "file:///etc/passwd">',
        '<!ENTITY % lol SYSTEM "file:///etc/passwd"> %lol;',
    ],
)
def test_entities_are_never_replaced(root: Path, declared: str) -> None:
    name = "l11" if "l11" in declared else "lol"
    text = svg(f"&{name};" if "%" not in declared else "title", doctype=f"<!DOCTYPE svg [{declared}]>")
    (root / "svg" / "food" / "soup.svg").write_text(text)
    assert read_words(root / "svg" / "food" / "soup.svg") == Words("", "", ())
    assert len(load_clipart(root, size=8).ids) == 3


def test_files_that_are_refused(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "a\n.svg"
    for text in ("", "no XML", "<svg>", "<svg>\0</svg>", '<?xml version="1.0" encoding="klingon"?><svg/>', "<a:b/>"):
        with pytest.raises(ValueError, match=r"^'.*a\\n\.svg' is not XML \("):
            written(file, text)
    with pytest.raises(ValueError, match=r"^'.*' can't be read \("):
        read_words(tmp_path / "none.svg")
    monkeypatch.setattr(module, "MAX_SVG_BYTES", 100)
    with pytest.raises(ValueError, match=r"^'.*' has \d+ bytes, and at most 100 are read$"):
        written(file, svg("a title"))
    deep = "<g>" * 20_000 + "</g>" * 20_000
    monkeypatch.setattr(module, "MAX_SVG_BYTES", 1 << 20)
    assert written(file, deep) == Words("", "", ())


@pytest.mark.parametrize(
    ("title", "want"),
    [
        ("Clipart by Nicu Buculei - black_cat 02", "black cat"),
        ("clip art by A. B. Smith - tree", "tree"),
        ("  two\n words ", "two words"),
        ("Dog (3)", "Dog"),
        ("bee3", "bee"),
        ("MP3 player", "MP3 player"),
        ("PDA 2", "PDA 2"),
        ("Commodore 64", "Commodore 64"),
        ("45 rpm record", "45 rpm record"),
        ("Chodovian&#39;s Dog", "Chodovian's Dog"),
        ("sun", "sun"),
        ("car - ", "car"),
        ("\u65e5\u672c\u8a9e", "\u65e5\u672c\u8a9e"),
    ],
)
def test_titles(title: str, want: str) -> None:
    assert title_of(Words(title, "", ())) == want


def test_keywords() -> None:
    words = (
        "",
        "Cat",
        "cat",
        "HASH",
        "a",
        "11",
        "signs_and_symbols",
        "black cat",
        "x" * 31,
        "me@example.org",
        "www.a.b",
    )
    assert keywords_of(Words("", "", words), "Black Cat") == ["Cat", "signs and symbols"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("A cat on\n a mat", "A cat on a mat"),
        ("black-cat!", ""),
        ("cat", ""),
        ("", ""),
        ("Part of Hotel Icons Collection", ""),
        ("HASH(0x868b0e8)", ""),
        ("see http://example.org for more", ""),
        ("released into the Public Domain", ""),
        ("word " * 50, ""),
    ],
)
def test_descriptions(text: str, want: str) -> None:
    assert description_of(Words("", text, ()), "Black cat") == want


def test_the_full_set() -> None:
    if "HARDMIX_DATA" not in os.environ:
        pytest.skip("HARDMIX_DATA is not set")
    try:
        got = load_clipart(size=8, samples=500)
    except FileNotFoundError:
        pytest.skip("openclipart is not there")
    assert len(got.ids) == 500
    assert len(got.group_names) == 22
    titles = {captions[0] for captions in got.captions}
    assert 450 < len(titles) == len(got.concept.unique())
    assert sum(len(captions) > 1 for captions in got.captions) > 440
    assert not any(re.search("theme|collection", title, re.IGNORECASE) for title in titles)
