"""Pictures with captions, from small files written here: tables, shards, and every way in which they can be wrong."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hardmix.data.captioned as module
from hardmix.data.captioned import read_captions, read_shards
from hardmix.data.numbers import TEST, TRAIN, VALIDATION
from hardmix.data.pairs import Pairs

Files = list[tuple[str, bytes]]


def picture(number: int, size: tuple[int, int] = (12, 8), kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number, 100, 200)).save(out, kind, **({"lossless": True} if kind == "webp" else {}))
    return out.getvalue()


def own(root: Path, text: str, name: str = "t.csv", count: int = 4) -> Path:
    """A folder of pictures, red as their number, and a table in it."""
    (root / "deep").mkdir(exist_ok=True)
    for k in range(count):
        (root / f"{k}.png").write_bytes(picture(k))
    (root / "deep" / "9.png").write_bytes(picture(9))
    (root / name).write_bytes(text.encode(errors="surrogateescape"))
    return root


def lines(*items: object) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def reds(pairs: Pairs) -> list[int]:
    return pairs.images[:, 0, 0, 0].tolist()


CSV = """file,caption,likes
0.png,a dog,7
1.png,"a cat, asleep",8
0.png,one dog,9
 deep/9.png , a bird ,1
0.png,a dog,2
"""


def test_several_rows_of_a_picture_are_several_captions(tmp_path: Path) -> None:
    got = read_captions(own(tmp_path, CSV), tmp_path / "t.csv")
    assert list(got.captions) == [("a dog", "one dog"), ("a cat, asleep",), ("a bird",)]
    assert got.ids == ["0.png", "1.png", "deep/9.png"]
    assert reds(got) == [0, 1, 9]
    assert got.images.shape == (3, 3, 8, 8)
    assert got.images.dtype == torch.uint8
    assert got.concept.tolist() == [0, 1, 2]
    assert (got.split, got.style, got.group, got.style_names) == (None, None, None, ())
    assert (got.name, got.license, got.source) == ("captions", "yours", str(tmp_path / "t.csv"))


def test_lines_of_json_may_list_captions(tmp_path: Path) -> None:
    text = lines(
        {"file_name": "0.png", "text": ["a dog", " one dog "], "id": 3},
        {"text": "a cat", "file_name": "1.png"},
        {"file_name": "./0.png", "text": "Hund \u00e9"},
        {"file_name": "2.png", "text": "a cat"},
    )
    got = read_captions(own(tmp_path, text.replace("\n", "\r\n\n"), "m.jsonl"), "m.jsonl")
    assert list(got.captions) == [("a dog", "one dog", "Hund \u00e9"), ("a cat",), ("a cat",)]
    assert got.concept.tolist() == [0, 1, 1]  # the same captions, the same concept
    assert reds(got) == [0, 1, 2]


def test_captions_that_differ_in_case_are_of_one_concept(tmp_path: Path) -> None:
    got = read_captions(own(tmp_path, "file,caption\n0.png,A dog\n1.png,a  dog\n2.png,a cat\n"), "t.csv")
    assert list(got.captions) == [("A dog",), ("a  dog",), ("a cat",)]  # as they were written
    assert got.concept.tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", ["t.csv", "m.jsonl"])
def test_splits_are_read_where_they_are(tmp_path: Path, name: str) -> None:
    parts = ["train", "val", "TEST", "train"]
    rows = [(f"{k}.png", f"c{k}", part) for k, part in enumerate(parts)] + [("1.png", "more", "valid")]
    if name == "t.csv":
        text = "split;image;text\n" + "".join(f"{part};{file};{caption}\n" for file, caption, part in rows)
    else:
        text = lines(*({"image": file, "text": caption, "split": part} for file, caption, part in rows))
    got = read_captions(own(tmp_path, text, name), name)
    assert got.split is not None
    assert got.split.tolist() == [TRAIN, VALIDATION, TEST, TRAIN]
    assert got.split.dtype == torch.uint8
    assert got.part("validation").captions == [("c1", "more")]
    fewer = read_captions(own(tmp_path, text, name), name, samples=2)
    assert fewer.split is not None
    assert fewer.split.tolist() == [got.split[reds(got).index(red)] for red in reds(fewer)]


def test_columns_can_be_named(tmp_path: Path) -> None:
    text = "caption,text,a,b\nx,one,0.png,1.png\ny,two,2.png,3.png\n"
    got = read_captions(own(tmp_path, text), "t.csv", image_column="b", caption_column="text")
    assert (reds(got), list(got.captions)) == ([1, 3], [("one",), ("two",)])
    got = read_captions(own(tmp_path, text), "t.csv", image_column="a", caption_column="b")
    assert list(got.captions) == [("1.png",), ("3.png",)]


def test_the_square_is_filled_or_padded(tmp_path: Path) -> None:
    root = own(tmp_path, CSV)
    out = Image.new("RGB", (12, 4), (255, 0, 0))
    out.paste((0, 0, 255), (4, 0, 8, 4))
    out.save(root / "0.png")
    crop = read_captions(root, "t.csv", size=4).images[0]
    assert crop[:, 1, 1].tolist() == crop[:, 2, 2].tolist() == [0, 0, 255]
    pad = read_captions(root, "t.csv", fit="pad")
    assert pad.images.shape == (3, 3, 12, 12)
    assert pad.images[0, :, 5, 1].tolist() == [255, 0, 0]
    assert read_captions(root, "t.csv", size=5).images.shape == (3, 3, 5, 5)


def test_some_pictures_are_always_the_same_ones(tmp_path: Path) -> None:
    text = "file,caption\n" + "".join(f"{k}.png,c{k}\n" for k in range(20))
    root = own(tmp_path, text, count=20)
    few, more = (read_captions(root, "t.csv", samples=k).ids for k in (5, 11))
    assert (len(few), len(more)) == (5, 11)
    assert set(few) < set(more)
    assert read_captions(root, "t.csv", samples=5).ids == few


def test_files_that_cannot_be_read_are_listed_or_skipped(tmp_path: Path) -> None:
    root = own(tmp_path, "file,caption\n0.png,a\n1.png,b\n2.png,c\n7.png,d\n")
    with pytest.raises(ValueError, match=r"names 1 of 4 files that aren't in .* first of them '7\.png'; add them, or"):
        read_captions(root, "t.csv")
    (root / "7.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^read_captions: 1 of 4 files can't be read \('.*7.png' is empty"):
        read_captions(root, "t.csv")
    (root / "7.png").unlink()
    with pytest.warns(UserWarning, match="read_captions: left out 1 of 4 files") as warned:
        got = read_captions(root, "t.csv", on_error="skip")
    assert warned[0].filename == __file__
    assert got.ids == ["0.png", "1.png", "2.png"]
    (root / "0.png").unlink()
    (root / "1.png").unlink()
    with (
        pytest.warns(UserWarning, match="left out 3"),
        pytest.raises(ValueError, match=r"gives 1 pictures with captions; pass at least 2\."),
    ):
        read_captions(root, "t.csv", on_error="skip")


H = "file,caption\n"
WRONG = [  # name, text, arguments, message
    ("t.csv", "\n", {}, "is empty; pass a table with a header row"),
    ("t.csv", "file,caption\n\udcff,x\n", {}, "is not UTF-8 text"),
    ("t.parquet", "PAR1", {}, "is a Parquet file, of which captions are not read; save it as CSV or JSON Lines"),
    ("t.json", "[]", {}, r"is one piece of JSON; write one object a line, \{.*\}, and call the file \.jsonl"),
    ("t.csv", "file\n0.png\n", {}, r"has one column \('file'\) and needs file names and captions; separate them"),
    ("t.csv", "file,caption,caption\n0.png,a,b\n", {}, "has two columns called 'caption'"),
    ("t.csv", "file,,caption\n0.png,a,b\n", {}, "has no name for column 2"),
    ("t.csv", H + "0.png,a\n1.png,\n2.png,  \n", {}, r"has no caption in 2 of 3 rows \(3, 4\); fill or delete them"),
    ("t.csv", H + "0.png,a\n,b\n", {}, r"has no file name in row 3 \(''\)"),
    ("t.csv", H + "0.png,a\n../x.png,b\n", {}, r"leads out of the folder in row 3 \('../x.png'\); write paths rel"),
    ("t.csv", H + "0.png,a\n/etc/x.png,b\n", {}, "leads out of the folder in row 3"),
    ("t.csv", H + "0.png,a,b\n", {}, "has 3 cells in row 2 but 2 in its header"),
    (
        "t.csv",
        "file,words\n0.png,a\n",
        {},
        r"but 'file', 'words'; pass .* caption_column \(on the command line --set data.target=NAME\)\.",
    ),
    (
        "t.csv",
        "file,text,caption\n0.png,a,b\n",
        {},
        "has both 'caption' and 'text'; pass the one that holds the captions",
    ),
    (
        "t.csv",
        H + "0.png,a\n",
        {"caption_column": "captoin"},
        r"has no column 'captoin'; pass one of .* \(did you mean",
    ),
    ("t.csv", H + "0.png,a\n", {"image_column": "fil"}, r"has no column 'fil'; pass one of 'file' \(did you mean"),
    ("t.csv", H + "0.png,a\n", {"image_column": "caption"}, "has no column 'caption'; pass one of 'file'"),
    ("t.csv", H + "x.png,a\n", {}, r"names no picture in '.*'; write paths relative to the folder"),
    (
        "t.csv",
        "a,b,caption\n0.png,1.png,x\n",
        {},
        r"in 'a', 'b'; pass one of them as image_column \(on the command line --set data.inputs=NAME\)\.",
    ),
    ("t.csv", "file,caption,split\n0.png,a,deb\n", {}, "has 'deb' in row 2 of its column 'split'"),
    ("t.csv", "file,caption,split\n0.png,a,train\n0.png,b,test\n", {}, "'0.png' in one split in row 2 and in another"),
    ("t.csv", H + "0.png,a\n", {}, "gives 1 pictures with captions; pass at least 2"),
    ("t.csv", H, {}, "names no picture in"),
    ("t.csv", H + "0.png,a\n1.png,b\n", {"samples": 3}, "samples is 3, but there are 2"),
    ("t.csv", H + "0.png,a\n1.png,b\n", {"samples": -1}, "samples is -1"),
    ("t.csv", H, {"size": -1}, "size is -1"),
    ("t.csv", H, {"fit": "cut"}, "fit is 'cut'; pass one of 'crop', 'pad'"),
    ("t.csv", H, {"on_error": "stop"}, "on_error is 'stop'"),
    ("t.csv", H + "0.png,a\n1.png,b\n", {"size": 60_000}, "take 20 GiB, more than 8; pass a smaller size"),
    ("m.jsonl", "", {}, "is empty; write one JSON object a line"),
    ("m.jsonl", "\udcff", {}, "is not UTF-8 text in line 1"),
    ("m.jsonl", '{"file": "0.png", "text": "a"}\n{"file"\n', {}, "is not JSON in line 2; repair or delete it"),
    ("m.jsonl", "[" * 100_000 + "\n", {}, "is not JSON in line 1"),
    ("m.jsonl", "[1]\n", {}, r'has no JSON object in line 1; write \{"caption": ..., ...\}'),
    (
        "m.jsonl",
        lines({"f": "0.png", "text": "a"}, {"f": "1.png", "txt": "b"}),
        {},
        r"no key 'text' in line 2 \(did you",
    ),
    ("m.jsonl", lines({"f": "0.png", "text": 3}), {}, "has 3 as its 'text' in line 1; write a text in quotes"),
    ("m.jsonl", lines({"f": "0.png", "text": [" "]}), {}, "has ' ' as its 'text' in line 1"),
    ("m.jsonl", lines({"f": "0.png", "text": []}), {}, "has an empty list as its 'text' in line 1"),
    ("m.jsonl", lines({"f": "0.png", "text": "\ud83d"}), {}, "has half a surrogate pair in its 'text' in line 1"),
    (
        "m.jsonl",
        lines({"f": "0.png", "text": "a"}, {"f": 1, "text": "b"}),
        {},
        r"has no file name in line 2 \(''\); write paths",
    ),
    (
        "m.jsonl",
        lines({"f": "0.png", "text": "a", "split": "train"}, {"f": "1.png", "text": "b"}),
        {},
        "has '' in row 2",
    ),
    (
        "m.jsonl",
        lines({"f": "0.png", "text": "a"}, {"f": "1\u0000.png", "text": "b"}),
        {},
        "names 1 of 2 files that aren",
    ),
    ("m.jsonl", lines({"f": "0.png", "text": "a"}, {"f": "x" * 9000, "text": "b"}), {}, "names 1 of 2 files that aren"),
]


@pytest.mark.parametrize(("name", "text", "arguments", "message"), WRONG)
def test_what_is_wrong_with_a_table_is_said(
    tmp_path: Path, name: str, text: str, arguments: dict[str, Any], message: str
) -> None:
    root = own(tmp_path, text, name)
    with pytest.raises(ValueError, match=message) as raised:
        read_captions(root, root / name, **arguments)
    assert re.fullmatch(r"(read_captions|drawn): .*\.", str(raised.value))  # one line


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder is '.*no', which is not there"):
        read_captions(tmp_path / "no", "t.csv")
    with pytest.raises(
        FileNotFoundError, match=r"table is 't\.csv', which is neither there nor in '.*'; pass a CSV, TSV or JSONL file"
    ):
        read_captions(tmp_path, "t.csv")
    for place, kind in ((tmp_path / "x.tar", "not there"), (tmp_path, "a folder without .tar files")):
        with pytest.raises(FileNotFoundError, match=f"read_shards: path is '.*', which is {kind}; pass a .tar file"):
            read_shards(place)


def shard(path: Path, files: Files, kind: str = "w") -> Path:
    with tarfile.open(path, kind) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(k: int, caption: str = "", kind: str = "png") -> Files:
    return [(f"{k:04d}.{kind}", picture(k, kind=kind)), (f"{k:04d}.txt", (caption or f"c{k}").encode())]


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    shard(tmp_path / "b.tar", [*sample(3), *sample(4, kind="webp")])
    shard(
        tmp_path / "a.tar", [("__meta__.json", b"{"), ("x.cls", b"1"), (".hidden.txt", b"\xff"), *sample(1), *sample(2)]
    )
    with pytest.raises(ValueError, match=r"read_shards: .*"):
        read_shards(tmp_path / "b.tar", samples=3)
    got = read_shards(tmp_path)
    assert reds(got) == [1, 2, 3, 4]
    assert list(got.captions) == [("c1",), ("c2",), ("c3",), ("c4",)]
    assert got.ids == ["a.tar/0001.png", "a.tar/0002.png", "b.tar/0003.png", "b.tar/0004.webp"]
    assert got.images.shape == (4, 3, 8, 8)
    assert (got.name, got.license, got.source, got.split) == ("shards", "yours", str(tmp_path), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
    one = read_shards(tmp_path / "b.tar", size=6, fit="pad")
    assert one.ids == ["b.tar/0003.png", "b.tar/0004.webp"]
    assert one.images.shape == (2, 3, 6, 6)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_every_format(tmp_path: Path, kind: int) -> None:
    folder = "/".join(["a" * 60] * 2 if kind == tarfile.USTAR_FORMAT else ["\u00e9" * 90] * 3)
    with tarfile.open(tmp_path / "s.tar", "w", format=kind) as tar:
        for k in range(2):
            for name, content in sample(k):
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    got = read_shards(tmp_path / "s.tar")
    assert reds(got) == [0, 1]
    assert got.ids[1] == f"s.tar/{folder}/0001.png"


def test_captions_in_json(tmp_path: Path) -> None:
    files = [
        ("d/one.seg.png", b"not a picture of ours"),
        ("d/one.JPG", picture(1, kind="jpeg")),
        ("d/one.json", json.dumps({"caption": ["a", "b "], "alt": "z", "text": "t"}).encode()),
        ("two.png", picture(2)),
        ("two.txt", "\ufeff c \n".encode()),
        ("two.json", json.dumps({"alt": "y"}).encode()),
    ]
    path = shard(tmp_path / "s.tar", files)
    assert list(read_shards(path).captions) == [("a", "b"), ("c",)]
    assert list(read_shards(path, caption_key="alt").captions) == [("z",), ("y",)]
    with pytest.raises(ValueError, match=r"has 1 of 2 samples \(s.tar/two without a caption\); add what they lack"):
        read_shards(path, caption_key="text")


def test_incomplete_samples_stop_or_are_skipped(tmp_path: Path) -> None:
    files = [*sample(1), *sample(2), ("3.png", picture(3)), ("4.txt", b"c4"), ("5.png", picture(5)), ("5.txt", b" \n")]
    path = shard(tmp_path / "s.tar", [*files, ("6.png", b"x"), ("6.txt", b"c6")])
    lacking = r"3 of 6 samples \(s.tar/3 without a caption, s.tar/4 without a picture, s.tar/5 without a caption\)"
    with pytest.raises(
        ValueError, match=f"^read_shards: '.*s.tar' has {lacking}; add what they lack, or pass on_error"
    ):
        read_shards(path)
    with pytest.warns(UserWarning, match="left out") as warned:
        got = read_shards(path, on_error="skip")
    assert [str(each.message).split(" (")[0] for each in warned] == [
        "read_shards: left out 3 of 6 samples",
        "read_shards: left out 1 of 3 files that can't be read",
    ]
    assert {each.filename for each in warned} == {__file__}
    assert reds(got) == [1, 2]
    shard(path, [*sample(1), *sample(2), ("6.png", b"x"), ("6.txt", b"c6")])
    with pytest.raises(ValueError, match=r"1 of 3 files can't be read \('.*s.tar/6.png' is not an image"):
        read_shards(path)


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_without_a_picture_or_a_caption_are_told(tmp_path: Path) -> None:
    dotted = [(f"img.v{k}.{kind}", b"") for k in range(3) for kind in ("png", "txt")]
    for files in ([], [("1.cls", b"3")], dotted):
        with pytest.raises(
            ValueError, match=r"holds no pictures with captions; call them 1\.jpg and 1\.txt, or 1\.json: w"
        ):
            read_shards(shard(tmp_path / "x.tar", files))


@pytest.mark.parametrize(
    ("name", "kind"), [("x.png", tarfile.SYMTYPE), ("x.txt", tarfile.LNKTYPE), ("x.png", tarfile.CHRTYPE)]
)
def test_links_and_devices_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(member(name, kind, "/etc/passwd"))
    with pytest.raises(
        ValueError, match=rf"^read_shards: '.*' holds '{name}', which is no plain file; leave it out\.$"
    ):
        read_shards(tmp_path / "s.tar")


def test_names_that_lead_out_are_only_names(tmp_path: Path) -> None:
    files = [(f"{place}{name}", content) for place in ("/", "../../") for name, content in sample(len(place))]
    got = read_shards(shard(tmp_path / "in.tar", files))
    assert reds(got) == [1, 6]
    assert got.ids == ["in.tar/0001.png", "in.tar/../../0006.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["in.tar"]


@pytest.mark.parametrize(("name", "limit"), [("9.png", "MAX_PICTURE_BYTES"), ("9.json", "MAX_TEXT_BYTES")])
def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: str) -> None:
    path = shard(tmp_path / "s.tar", [*sample(1), *sample(2), (name, bytes(2000)), ("big.cls", bytes(9000))])
    monkeypatch.setattr(module, limit, 1999)
    with pytest.raises(ValueError, match=rf"says that '{name}' has 2,000 bytes, and at most 1,999 are read; leave it"):
        read_shards(path)


def test_a_size_that_lies_is_refused(tmp_path: Path) -> None:
    """A header alone that promises a terabyte, as a sparse file and as a plain one."""
    for kind, message in (
        (tarfile.REGTYPE, "at most 67,108,864 are read"),
        (tarfile.GNUTYPE_SPARSE, "no plain .tar|no "),
    ):
        info = tarfile.TarInfo("x.png")
        info.size, info.type = 1 << 40, kind
        (tmp_path / "s.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(ValueError, match=message):
            read_shards(tmp_path / "s.tar")


@pytest.mark.parametrize(
    "files",
    [[*sample(1), ("0001.jpg", picture(1, kind="jpeg"))], [*sample(1), *sample(1)], [*sample(1), ("/0001.txt", b"x")]],
)
def test_two_files_for_one_thing_are_refused(tmp_path: Path, files: Files) -> None:
    with pytest.raises(ValueError, match=r"has two files for '.*0001\..*'; leave one of them out"):
        read_shards(shard(tmp_path / "s.tar", files))


def test_cut_and_damaged_shards_are_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [file for k in range(1, 6) for file in sample(k)])
    whole = path.read_bytes()
    data = whole.rstrip(b"\0")
    damaged = r"^read_shards: '.*s.tar' is damaged, cut off or no plain .tar; fetch it again, or unpack it if it is com"
    header = [start for start in range(0, len(data), 512) if whole[start + 257 : start + 262] == b"ustar"]
    assert len(header) == 10
    for broken in (
        b"", b"no tar", bytes(100), whole[:1000], whole[: header[7] + 100], whole[: header[7]], whole[: len(data)],
        whole[: header[5]] + b"\xff" + whole[header[5] + 1 :],
        whole[: header[5] + 124] + b"z" + whole[header[5] + 125 :],
    ):  # fmt: skip
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=damaged):
            read_shards(path)
    for kind in ("w:gz", "w:bz2", "w:xz"):
        shard(path, sample(1), kind)
        with pytest.raises(ValueError, match=damaged):
            read_shards(path)
    path.write_bytes(bytes(1024))  # the end alone: an empty .tar
    with pytest.raises(ValueError, match="holds no pictures with captions; call them 1"):
        read_shards(path)
    path.write_bytes(whole)
    assert reds(read_shards(path)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("7.txt", b"\xff", r"holds '7\.txt', which is not UTF-8 text; save it in UTF-8"),
        ("7.json", b"{", r"is not JSON in '7\.json'; repair or delete it"),
        ("7.json", b"[]", r"has no JSON object in '7\.json'"),
        ("7.json", b'{"text": 4}', r"has 4 as its 'text' in '7\.json'; write a text in quotes"),
    ],
)
def test_texts_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = shard(tmp_path / "s.tar", [*sample(1), *sample(2), ("7.png", picture(7)), (name, content)])
    with pytest.raises(ValueError, match=message) as raised:
        read_shards(path)
    assert re.fullmatch(r"read_shards: '.*s\.tar' .*\.", str(raised.value))


def test_bad_arguments_of_shards_are_named(tmp_path: Path) -> None:
    for arguments, message in (
        ({"size": -1}, "size is -1"),
        ({"fit": "x"}, "fit is 'x'"),
        ({"on_error": ""}, "on_error"),
    ):
        with pytest.raises(ValueError, match=f"^read_shards: {message}"):
            read_shards(tmp_path, **arguments)
