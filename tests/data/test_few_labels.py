"""Few labels among many: draws against their counts, split files and every way they can be wrong, folders and lists."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hardmix.data import FileImages, TensorImages, load_folder, load_images, train_validation_split
from hardmix.data.few_labels import (
    FewLabelData,
    LabelSplit,
    draw_label_split,
    draw_labelled,
    fingerprint,
    read_split,
    split_text,
    with_few_labels,
    without_labels,
    write_split,
)
from hardmix.data.few_labels_folder import load_few_labels

CLASSES = ("cat", "dog", "emu")
LABELS = torch.arange(60) % 3


def in_memory(shift: int = 0, image_size: int | None = None) -> TensorImages:
    pixels = (torch.arange(60 * 3 * 4 * 4) + shift).remainder(251).to(torch.uint8).view(60, 3, 4, 4)
    return TensorImages(pixels, LABELS, CLASSES, image_size=image_size)


def counts(labels: torch.Tensor, rows: torch.Tensor) -> list[int]:
    return torch.bincount(labels[rows], minlength=int(labels.max()) + 1).tolist()


# Which samples are labelled


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(5, 30), min_size=1, max_size=5),
    few=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    share=st.floats(0.01, 1.0),
)
def test_each_class_has_its_count(sizes: list[int], few: int, seed: int, share: float) -> None:
    labels = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    rows = draw_labelled(labels, per_class=few, seed=seed)
    assert counts(labels, rows) == [few] * len(sizes)
    assert rows.dtype == torch.long
    assert rows.tolist() == sorted(set(rows.tolist()))
    rows = draw_labelled(labels, share=share, seed=seed)
    assert counts(labels, rows) == [max(1, round(share * size)) for size in sizes]


def test_fewer_are_among_more_of_either_kind() -> None:
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        draws = [set(draw_labelled(labels, per_class=n, seed=seed).tolist()) for n in (1, 2, 4, 10, 25)]
        draws += [set(draw_labelled(labels, share=s, seed=seed).tolist()) for s in (0.7, 0.9, 1.0)]
        assert all(small < large for small, large in pairwise(draws))
        assert len(draws[-1]) == 200


def test_the_seed_and_nothing_else_decides() -> None:
    torch.manual_seed(1)
    first = draw_labelled(LABELS, per_class=4, seed=5)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, draw_labelled(LABELS.to(torch.int32), per_class=4, seed=5))
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, draw_labelled(LABELS, per_class=4, seed=6))
    assert len({int(draw_labelled(LABELS, per_class=1, seed=s)[0]) for s in range(40)}) > 5


GAPS = torch.tensor([0, 0, 2, 2, 2, 4])


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (LABELS, {}, "per_class is 0 and share is 0; pass exactly one of them, above 0"),
        (LABELS, {"per_class": 2, "share": 0.5}, "per_class is 2 and share is 0.5; pass exactly one"),
        (LABELS, {"per_class": -1}, "per_class is -1; pass an integer of at least 0"),
        (LABELS, {"per_class": 2.0}, "per_class is 2.0"),
        (LABELS, {"share": 1.5}, "share is 1.5; pass a number from 0 to 1"),
        (LABELS, {"share": float("nan")}, "share is nan"),
        (LABELS, {"per_class": 1, "seed": -1}, "seed is -1"),
        (LABELS.float(), {"per_class": 1}, r"labels has shape \(60,\) and dtype torch.float32"),
        (LABELS > 1, {"per_class": 1}, "dtype torch.bool"),
        (LABELS[:0], {"per_class": 1}, r"labels has shape \(0,\)"),
        (LABELS - 1, {"per_class": 1}, "labels holds -1; pass class ids from 0"),
        (
            LABELS,
            {"per_class": 21},
            "class 0 has 20, class 1 has 20, class 2 has 20 of the 21 samples that each of 3 classes needs; ask for",
        ),
        (
            GAPS,
            {"per_class": 3},
            "class 0 has 2, class 1 has 0, class 3 has 0, class 4 has 1 of the 3 samples that each of 5 classes needs",
        ),
        (GAPS, {"share": 0.5}, "class 1 has 0, class 3 has 0 of the 1 samples that each of 5 classes needs"),
        (torch.arange(9), {"per_class": 2}, "class 4 has 1 and 4 more have too few of the 2 samples"),
        (torch.tensor([0, 2**40]), {"per_class": 1}, "class 1 has 0 of the 1 samples that each of 1099511627777"),
    ],
)
def test_bad_draws_are_refused(labels: torch.Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^draw_labelled: .*{message}.*\\.$"):
        draw_labelled(labels, **({"seed": 0} | arguments))


# The three parts of a split


def test_a_split_holds_all_that_is_not_for_validation() -> None:
    split = draw_label_split(in_memory(), name="toy", per_class=2, seed=3, validation=0.2)
    rest, validation = train_validation_split(LABELS, 0.2, seed=3)
    assert torch.equal(split.validation, validation)
    assert torch.equal(split.unlabelled, rest)
    assert counts(LABELS, split.labelled) == [2, 2, 2]
    assert set(split.labelled.tolist()) <= set(rest.tolist())
    assert (split.seed, split.name, split.samples) == (3, "toy", 60)
    assert split.fingerprint == fingerprint(in_memory())
    apart = draw_label_split(in_memory(), name="toy", per_class=2, seed=3, validation=0.2, include_labelled=False)
    assert torch.equal(apart.labelled, split.labelled)
    assert sorted(apart.labelled.tolist() + apart.unlabelled.tolist()) == rest.tolist()
    more = draw_label_split(in_memory(), name="toy", share=0.5, seed=3, validation=0.2)
    assert torch.equal(more.validation, validation)
    assert set(split.labelled.tolist()) < set(more.labelled.tolist())
    none = draw_label_split(in_memory(), name="toy", per_class=2, seed=3)
    assert (len(none.validation), len(none.unlabelled)) == (0, 60)


def test_splits_that_can_not_be_are_refused() -> None:
    def draw(images: Any, **arguments: Any) -> object:
        return draw_label_split(images, name="toy", **({"per_class": 2, "seed": 0} | arguments))

    with pytest.raises(ValueError, match=r"^draw_label_split: all 60 samples are labelled, so none is left unlabelled"):
        draw(LABELS, per_class=20, include_labelled=False)
    with pytest.raises(ValueError, match=r"^draw_label_split: class 3 has 0 of the 2 samples that each of 4 classes"):
        draw(TensorImages(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), LABELS, (*CLASSES, "fox")))
    with pytest.raises(ValueError, match=r"^draw_label_split: class 0 has 2, .* of the 3 samples"):
        draw(LABELS, per_class=3, validation=0.9)  # 6 of 60 are left
    with pytest.raises(ValueError, match=r"^draw_label_split: validation is 2; pass a number from 0 to 1"):
        draw(LABELS, validation=2)
    with pytest.raises(ValueError, match=r"^draw_label_split: labels holds -1"):
        draw(without_labels(in_memory()))
    with pytest.raises(TypeError, match=r"^draw_label_split: images_or_labels is a list; pass an ImageSet, or a torch"):
        draw([0, 1])


# What makes a data set this one


def files(root: Path, names: str = "abc") -> FileImages:
    paths = [root / CLASSES[k % 3] / f"{name}.png" for k, name in enumerate(names)]
    return FileImages(paths, torch.arange(len(names)) % 3, CLASSES, image_size=4)


def test_the_fingerprint_tells_data_sets_apart() -> None:
    base = in_memory()
    other_labels = TensorImages(base.batch(torch.arange(60)), LABELS.flip(0), CLASSES)
    other_names = TensorImages(base.batch(torch.arange(60)), LABELS, ("cat", "dog", "fox"))
    other_split = TensorImages(base.batch(torch.arange(60)), LABELS, CLASSES, split="test")
    every = torch.arange(60)
    sets = [
        base, in_memory(1), other_labels, other_names, other_split, LABELS, LABELS[:59],
        base.subset(every[:59]), base.subset(torch.cat([every[3:], every[:3]])),
        files(Path("x")), files(Path("x"), "abd"), files(Path("x"), "acb"),
    ]  # fmt: skip
    prints = [fingerprint(each) for each in sets]
    assert len(set(prints)) == len(sets)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in prints)


def test_the_fingerprint_stays_when_only_the_surroundings_change() -> None:
    order = LABELS.argsort(stable=True)
    back = in_memory().subset(order).subset(order.argsort())
    assert fingerprint(in_memory()) == fingerprint(in_memory(image_size=9)) == fingerprint(back)
    pixels = in_memory().batch(torch.arange(60))
    pixels[0] += 1  # a sample that is not in the subset
    rows = torch.arange(20, 60)
    assert fingerprint(TensorImages(pixels, LABELS, CLASSES).subset(rows)) == fingerprint(in_memory().subset(rows))
    assert fingerprint(files(Path("x"))) == fingerprint(files(Path("/far/away")))
    assert fingerprint(LABELS) == fingerprint(LABELS.to(torch.int32))
    odd = FileImages([Path("a/\udcff.png"), Path("b/\n.png")], torch.tensor([0, 1]), ("a", "b"), image_size=4)
    assert len(fingerprint(odd)) == 64


# The file of a split


def toy(**arguments: Any) -> LabelSplit:
    return draw_label_split(in_memory(), name="toy", per_class=2, seed=3, validation=0.2, **arguments)


def assert_equal(one: LabelSplit, other: LabelSplit) -> None:
    for first, second in zip(one, other, strict=True):
        if isinstance(first, torch.Tensor):
            assert isinstance(second, torch.Tensor)
            assert torch.equal(first, second)
            assert first.dtype == second.dtype
        else:
            assert (first, type(first)) == (second, type(second))


@pytest.mark.parametrize("arguments", [{}, {"include_labelled": False}, {"validation": 0.0}])
def test_a_split_comes_back_as_it_was(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path = tmp_path / "split.json"
    split = draw_label_split(in_memory(), name="tö\n<y", seed=3, per_class=2, **({"validation": 0.2} | arguments))
    write_split(split, path)
    assert_equal(read_split(str(path), in_memory()), split)
    assert_equal(read_split(path, in_memory(image_size=8)), split)
    assert [file.name for file in tmp_path.iterdir()] == ["split.json"]


def test_labels_alone_are_enough(tmp_path: Path) -> None:
    split = draw_label_split(LABELS, name="toy", per_class=1, seed=0)
    write_split(split, tmp_path / "s")
    assert_equal(read_split(tmp_path / "s", LABELS), split)
    with pytest.raises(ValueError, match="other labels, class names, ids or pixels"):
        read_split(tmp_path / "s", in_memory())


def test_the_same_split_gives_the_same_bytes(tmp_path: Path) -> None:
    write_split(toy(), tmp_path / "one")
    write_split(toy(), tmp_path / "two")
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes() == split_text(toy()).encode()
    write_split(read_split(tmp_path / "one", in_memory()), tmp_path / "two")
    assert content == (tmp_path / "two").read_bytes()
    lines = content.decode("ascii").splitlines()
    assert len(lines) == 12
    assert lines[7].startswith(' "labelled": [')
    again = "import torch; from hardmix.data.few_labels import *; "
    again += "print(split_text(draw_label_split(torch.arange(60) % 3, name='toy', per_class=2, seed=3)), end='')"
    text = subprocess.run([sys.executable, "-c", again], check=True, capture_output=True, text=True).stdout
    assert text == split_text(draw_label_split(LABELS, name="toy", per_class=2, seed=3))


def test_a_split_of_another_data_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    write_split(toy(), path)
    with pytest.raises(
        ValueError,
        match=r"^read_split: '.*split.json' is for another data set \('toy' with 60 samples; this one has 59\); pass "
        r"what it was drawn from, or draw a new split\.$",
    ):
        read_split(path, in_memory().subset(torch.arange(59)))
    with pytest.raises(ValueError, match="this one has as many but other labels, class names, ids or pixels"):
        read_split(path, in_memory(1))


def test_every_change_of_a_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    content = split_text(toy()).encode()
    draw = random.Random(0)
    for _ in range(150):
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= bit
        path.write_bytes(changed)
        if chr(content[place]).isspace() and chr(changed[place]).isspace():
            continue
        with pytest.raises(ValueError, match=r"^read_split: '.*' (is no split|was edited|has version|is damaged).*\.$"):
            read_split(path, in_memory())
    for length in (0, 1, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is no split file, or a damaged one; draw the split again"):
            read_split(path, in_memory())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["labelled"].append(d["labelled"][-1] + 1), r"was edited or damaged \(its sha256 differs\)"),
        (lambda d: d.update(seed=4), "was edited or damaged"),
        (lambda d: d.pop("sha256"), "was edited or damaged"),
        (lambda d: d.pop("seed"), "was edited or damaged"),
        (lambda d: d.update(more=1), "was edited or damaged"),
        (lambda d: d.update(version=2), "has version 2, and 1 is read; draw the split again"),
        (lambda d: d.update(format="x"), "is no split file, or a damaged one"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    found = json.loads(split_text(toy()))
    change(found)
    (tmp_path / "s").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"^read_split: '.*' {message}.*\\.$"):
        read_split(tmp_path / "s", in_memory())


def test_another_layout_of_the_same_json_is_fine(tmp_path: Path) -> None:
    (tmp_path / "s").write_text(json.dumps(json.loads(split_text(toy())), indent=4).replace("\n", "\r\n"))
    assert_equal(read_split(tmp_path / "s", in_memory()), toy())


@pytest.mark.parametrize("text", ["[]", "3", "{}", "[" * 100_000, "9" * 5000, '{"format":', "\udcff"])
def test_what_is_no_split_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=r"^read_split: '.*s' is no split file, or a damaged one; draw the split again"
    ):
        read_split(tmp_path / "s", in_memory())


FORGED = [
    ("labelled", [0, 60], "has 60 among the labelled samples, but there are 60, from 0 to 59"),
    ("unlabelled", [-1, 4], "has -1 among the unlabelled samples"),
    ("validation", [61], "has 61 among the validation samples"),
    ("labelled", [2**63], "has something else than it should as its 'labelled'"),
    ("labelled", [1.5], "has something else than it should as its 'labelled'"),
    ("labelled", [True], "has something else than it should as its 'labelled'"),
    ("unlabelled", "all", "has something else than it should as its 'unlabelled'"),
    ("seed", "3", "has something else than it should as its 'seed'"),
    ("samples", 60.0, "has something else than it should as its 'samples'"),
    ("name", None, "has something else than it should as its 'name'"),
    ("seed", -3, "seed is -3"),
    ("labelled", [], "has no labelled sample; draw it with at least one"),
    ("unlabelled", [], "has no unlabelled sample"),
    ("labelled", [4, 4], "has labelled samples twice or out of order; sort them"),
    ("unlabelled", [4, 3], "has unlabelled samples twice or out of order"),
]


def forge(path: Path, values: dict[str, object]) -> None:
    """A file with the right hash of whatever it holds."""
    values.pop("sha256")
    body = ",\n".join(f" {json.dumps(name)}: {json.dumps(item)}" for name, item in values.items())
    path.write_text(f'{{{body}, "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}')


@pytest.mark.parametrize(("key", "value", "message"), FORGED)
def test_a_file_with_a_right_hash_and_wrong_values_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    found = json.loads(split_text(toy()))
    found[key] = value
    forge(tmp_path / "s", found)
    with pytest.raises(ValueError, match=f"^read_split: '.*s'.* {message}.*\\.$"):
        read_split(tmp_path / "s", in_memory())


def test_a_file_with_a_right_hash_and_a_key_too_few_is_refused(tmp_path: Path) -> None:
    found = json.loads(split_text(toy()))
    found.pop("seed")
    forge(tmp_path / "s", found)
    with pytest.raises(ValueError, match=r"^read_split: '.*s' was edited or damaged"):
        read_split(tmp_path / "s", in_memory())


def test_a_labelled_sample_in_validation_is_refused_everywhere(tmp_path: Path) -> None:
    split = toy()
    held = split.labelled[1:2]
    wrong = split._replace(validation=torch.cat([split.validation, held]).sort().values)
    for part, drop in (("labelled", 0), ("unlabelled", 1)):
        bad = wrong if not drop else wrong._replace(labelled=split.labelled[:1])
        message = f"split has 1 of 13 validation samples among the {part} ones, the first of them {int(held[0])}; draw"
        with pytest.raises(ValueError, match=f"^write_split: {message}"):
            write_split(bad, tmp_path / "s")
        with pytest.raises(ValueError, match=f"^with_few_labels: {message}"):
            with_few_labels(load_images("digits"), bad)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"^write_split: split: labelled is a list; pass a torch\.Tensor"):
        write_split(split._replace(labelled=[1]), tmp_path / "s")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labelled of shape \(1, 6\) and dtype torch.int64; pass long row numbers"):
        write_split(split._replace(labelled=split.labelled[None]), tmp_path / "s")
    with pytest.raises(TypeError, match="split: name is a int; pass a text"):
        write_split(split._replace(name=3), tmp_path / "s")  # type: ignore[arg-type]


def test_files_that_can_not_be_written_or_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for place in ("no/s.json", "folder", "x\0y"):
        with pytest.raises(OSError, match=r"^write_split: '.*' can't be written \(.*\); pass another path\.$"):
            write_split(toy(), tmp_path / place)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    for place, kind in (("no", "not there"), ("folder", "a folder")):
        with pytest.raises(FileNotFoundError, match=f"^read_split: path is '.*', which is {kind}; pass a file by"):
            read_split(tmp_path / place, in_memory())


# Named data sets


def test_a_named_set_with_few_labels(tmp_path: Path) -> None:
    data = load_images("digits")
    split = draw_label_split(data.train, name=data.name, per_class=4, seed=1, validation=0.1)
    write_split(split, tmp_path / "split.json")
    few = with_few_labels(load_images("digits"), read_split(tmp_path / "split.json", data.train))
    assert isinstance(few, FewLabelData)
    assert torch.bincount(few.train.labels).tolist() == [4] * 10
    assert few.validation is not None
    assert (len(few.validation), len(few.unlabelled), len(few.test)) == (144, 1298, 355)
    assert set(few.unlabelled.labels.tolist()) == {-1}
    assert torch.equal(few.truth, data.train.labels[split.unlabelled])
    for images, rows in ((few.train, split.labelled), (few.unlabelled, split.unlabelled)):
        assert torch.equal(images.batch(torch.arange(len(images))), data.train.batch(rows))
        assert images.sample_id(3) == data.train.sample_id(int(rows[3]))
    assert (few.mean, few.std, few.name, few.license) == (data.mean, data.std, "digits", data.license)
    assert int(data.train.labels.min()) == 0
    part = few.unlabelled.subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [-1, -1]
    plain = with_few_labels(data, draw_label_split(data.train, name=data.name, share=0.01, seed=1))
    assert plain.validation is None


def test_a_split_of_another_set_is_not_taken() -> None:
    with pytest.raises(
        ValueError, match=r"^with_few_labels: split is for another data set \('toy' with 60 samples; thi"
    ):
        with_few_labels(load_images("digits"), toy())


def test_a_folder_with_a_validation_split_of_its_own(tmp_path: Path) -> None:
    for split in ("train", "test", "val"):
        many(tmp_path / split, {"cat": 4, "dog": 4}, start=50 * len(split))
    data = load_folder(tmp_path)
    few = with_few_labels(data, draw_label_split(data.train, name="folder", per_class=1, seed=0))
    assert few.validation is data.validation
    cut = draw_label_split(data.train, name="folder", per_class=1, seed=0, validation=0.25)
    with pytest.raises(
        ValueError, match="keeps 2 samples for validation, but folder has a validation split of its own"
    ):
        with_few_labels(data, cut)
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert with_few_labels(load_folder(moved), cut._replace(validation=cut.validation[:0]))


# Folders


def save(path: Path, value: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(path)


def many(root: Path, each: dict[str, int], start: int = 0) -> None:
    """Files of different contents, one color each."""
    for name, count in each.items():
        for i in range(count):
            save(root / name / f"{i:02d}.png", start)
            start += 1


def four_folders(root: Path) -> Path:
    many(root / "labelled", dict.fromkeys(CLASSES, 5))
    many(root / "unlabelled", {"a/b": 6, "c": 3}, start=100)
    many(root / "test", {"dog": 2, "emu": 2}, start=200)
    many(root / "val", {"cat": 1}, start=300)
    return root


def ids(images: Any) -> list[str]:
    return [images.sample_id(i) for i in range(len(images))]


def reds(images: Any) -> list[int]:
    return images.batch(torch.arange(len(images)))[:, 0, 0, 0].tolist()


def test_folders_of_labelled_and_unlabelled_files(tmp_path: Path) -> None:
    data = load_few_labels(four_folders(tmp_path))
    assert isinstance(data.train, FileImages)
    assert isinstance(data.unlabelled, FileImages)
    assert data.train.class_names == data.test.class_names == CLASSES
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert reds(data.train) == list(range(15))
    assert reds(data.unlabelled) == list(range(100, 109))
    assert data.unlabelled.labels.tolist() == data.truth.tolist() == [-1] * 9
    assert data.test.labels.tolist() == [1, 1, 2, 2]
    assert reds(data.test) == [200, 201, 202, 203]
    assert data.validation is not None
    assert data.validation.labels.tolist() == [0]
    assert data.train.shape == data.unlabelled.shape == (3, 10, 10)
    assert (data.name, data.source, data.skipped, data.overlap) == ("folder", str(tmp_path), (), ())
    values = torch.tensor([*range(15), *range(100, 109)]).double() / 255
    assert data.mean[0] == pytest.approx(float(values.mean()))
    assert data.std[0] == pytest.approx(float(values.std(correction=0)))
    gray = load_few_labels(tmp_path, image_size=6, channels=1)
    assert gray.train.shape == gray.unlabelled.shape == gray.test.shape == (1, 6, 6)


def test_labelled_files_may_count_as_unlabelled_too(tmp_path: Path) -> None:
    data = load_few_labels(four_folders(tmp_path), include_labelled=True)
    assert reds(data.unlabelled) == [*range(15), *range(100, 109)]
    assert data.unlabelled.labels.tolist() == [-1] * 24
    assert data.truth.tolist() == [*data.train.labels.tolist(), *[-1] * 9]
    assert data.mean == load_few_labels(tmp_path).mean


def test_what_is_passed_over(tmp_path: Path) -> None:
    four_folders(tmp_path)
    (tmp_path / "unlabelled" / "notes.txt").write_text("x")
    save(tmp_path / "unlabelled" / ".hidden.png")
    save(tmp_path / "unlabelled" / ".thumbs" / "x.png")
    save(tmp_path / "unlabelled" / "UPPER.PNG", 999)
    assert len(load_few_labels(tmp_path).unlabelled) == 10


def test_folders_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four_folders(tmp_path / "here")
    (tmp_path / "here" / "unlabelled").rename(tmp_path / "pool")
    (tmp_path / "here" / "labelled").rename(tmp_path / "here" / "known")
    monkeypatch.chdir(tmp_path)
    data = load_few_labels("here", labelled="known", unlabelled="pool")
    assert (len(data.train), len(data.unlabelled)) == (15, 9)
    assert len(load_few_labels("here", labelled=tmp_path / "here" / "known", unlabelled=tmp_path / "pool").train) == 15
    many(tmp_path / "known", {"wrong": 3})  # the one in the folder comes first
    assert load_few_labels("here", labelled="known", unlabelled="pool").train.class_names == CLASSES


def test_a_validation_folder_alone_is_for_testing(tmp_path: Path) -> None:
    four_folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "gone")
    data = load_few_labels(tmp_path)
    assert (reds(data.test), data.validation) == ([300 % 256], None)


@pytest.mark.parametrize(("each", "tested"), [(2, 3), (4, 3), (5, 3), (8, 5), (10, 6)])
def test_without_a_test_folder_a_fifth_is_cut_out(tmp_path: Path, each: int, tested: int) -> None:
    many(tmp_path / "labelled", dict.fromkeys(CLASSES, each))
    many(tmp_path / "unlabelled", {"a": 5}, start=100)
    data = load_few_labels(tmp_path)
    assert len(data.test) == tested
    in_test, in_train = (torch.bincount(images.labels) for images in (data.test, data.train))
    assert int(in_test.min()) == tested // 3
    assert (in_test + in_train).tolist() == [each] * 3
    assert not set(ids(data.train)) & set(ids(data.test))
    assert ids(load_few_labels(tmp_path).test) == ids(data.test)
    assert len(data.unlabelled) == 5
    seen = reds(data.train) + reds(data.unlabelled)
    assert data.mean[0] == pytest.approx(sum(seen) / len(seen) / 255)


# Lists of files


def listed(root: Path, text: str, name: str = "labels.csv") -> Path:
    many(root / "images", {"": 12})
    many(root / "test", {"cat": 1, "dog": 1}, start=300)
    (root / name).write_text(text, encoding="utf-8")
    return root


HEADER = "file,class\n"
BODY = "images/03.png,dog\nimages/00.png,cat\nimages/07.png,cat\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", HEADER + BODY),
        ("labels.csv", BODY),
        ("labels.csv", "\ufeff" + BODY.replace("\n", "\r\n\r\n")),
        ("labels.csv", "class,file\n" + "".join(",".join(row.split(",")[::-1]) + "\n" for row in BODY.split())),
        ("labels.tsv", BODY.replace(",", "\t")),
        ("labels.csv", BODY.replace(",", " ; ")),
        ("labels.txt", BODY.replace(",", " ")),
        ("labels.txt", "name kind\n" + BODY.replace(",", "   ")),
        ("labels.csv", "note,file,Label\n" + BODY.replace("images", "x,images")),
        ("labels.csv", HEADER + BODY + "./images/00.png,cat\n"),
        ("labels.csv", HEADER + '"images/03.png",dog\nimages/07.png,"cat"\nimages/00.png,cat'),
    ],
)
def test_lists_of_every_form(tmp_path: Path, name: str, text: str) -> None:
    data = load_few_labels(listed(tmp_path, text, name), labelled=name)
    assert data.train.class_names == ("cat", "dog")
    assert reds(data.train) == [0, 3, 7]
    assert data.train.labels.tolist() == [0, 1, 0]
    assert reds(data.unlabelled) == [1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert data.test.labels.tolist() == [0, 1]


def test_words_of_a_text_are_a_file_and_its_class(tmp_path: Path) -> None:
    listed(tmp_path, "images/my cat.png cat\nimages/00.png dog\n", "labels.txt")
    save(tmp_path / "images" / "my cat.png", 77)
    data = load_few_labels(tmp_path, labelled="labels.txt")
    assert (reds(data.train), data.train.labels.tolist()) == ([0, 77], [1, 0])


def test_a_list_and_a_folder_of_unlabelled_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(tmp_path, BODY)
    many(tmp_path / "more", {"x": 2}, start=400)
    assert len(load_few_labels(tmp_path, labelled="labels.csv").unlabelled) == 11
    assert len(load_few_labels(tmp_path, labelled="labels.csv", unlabelled="more").unlabelled) == 2
    monkeypatch.chdir(tmp_path)
    for place in ("images", tmp_path / "images"):  # spelled in another way than the listed ones
        assert len(load_few_labels(tmp_path, labelled=tmp_path / "labels.csv", unlabelled=place).unlabelled) == 9
        assert len(load_few_labels(".", labelled="labels.csv", unlabelled=place).unlabelled) == 9


def test_links_to_folders_lead_to_images_but_not_into_the_test_split(tmp_path: Path) -> None:
    root = listed(tmp_path / "photos", BODY)
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    (root / "more").symlink_to(root / "test")
    data = load_few_labels(root, labelled="labels.csv")
    assert reds(data.unlabelled) == [1, 2, 4, 5, 6, 8, 9, 10, 11]


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    rows = [f"images/{i:02d}.png,{'cat' if i % 3 else 'dog'}\n" for i in range(9)]
    listed(tmp_path, "".join(rows))
    (tmp_path / "test").rename(tmp_path.with_name("elsewhere"))
    first = load_few_labels(tmp_path, labelled="labels.csv")
    (tmp_path / "labels.csv").write_text("".join(rows[::-1]))
    again = load_few_labels(tmp_path, labelled="labels.csv")
    assert (ids(first.train), ids(first.test)) == (ids(again.train), ids(again.test))
    assert torch.equal(first.train.labels, again.train.labels)


BAD_LISTS = [
    ("", "is empty; pass a table with a header row"),
    ("\n \n", "is empty"),
    (HEADER, "lists no file; write a file and its class in each row"),
    (
        BODY + "images/06.pmg,cat\nimages/99.png,cat\n",
        r"names 2 of 5 files that aren't in '.*', the first of them 'images/06.pmg' in row 4 \(did you mean "
        r'"images/06.png"\?\); correct or add them, or pass on_error="skip"',
    ),
    # The csv module of Python 3.10 takes no NUL.
    (BODY + "x\0y.png,cat\n", r"(names 1 of 4 files that aren't in|.* is damaged in row 4 \(line contains NUL\))"),
    (BODY + "x" * 5000 + ".png,cat\n", "names 1 of 4 files that aren't in"),
    (BODY + "images,cat\n", "names 1 of 4 files that aren't in"),
    (BODY + "images/00.png,dog\n", "has 'images/00.png' as 'cat' in row 2 and as 'dog' in row 4; keep one of them"),
    (HEADER + BODY + "./images//00.png,dog\n", "has './images//00.png' as 'cat' in row 3 and as 'dog' in row 5"),
    (BODY + "../images/00.png,cat\n", r"leads out of the folder in row 4 \('../images/00.png'\); write paths relative"),
    (BODY + "/etc/x.png,cat\n", "leads out of the folder in row 4"),
    (BODY + "images/01.png,\n", "has no class in row 4; fill or delete it"),
    (BODY + ",cat\n", "has no file name in row 4"),
    (BODY + "images/01.png\n", "has 1 cells in row 4 but 2 in its header"),
    (BODY + '"images/01.png,cat\n', "is damaged in row"),
    ("images/00.png\nimages/01.png\n", "has one word in row 1 and needs a file and its class; separate them with a c"),
    ("images/00.png,cat\nimages/01.png,cat\n", "there is one class, 'cat'; label files of at least two"),
    ("file,class,split\nimages/00.png,cat,train\n", "has a column 'split', which isn't read; put the files of other"),
    ("file,a,b\nimages/00.png,cat,x\n", r"has 3 columns \('file', 'a', 'b'\), and 0 of them are called class, label"),
    ("file,class,label\nimages/00.png,cat,x\n", "has 3 columns .*, and 2 of them are called"),
    ("images/00.png,cat,x\n", "has 3 columns and no header, and 0 of them"),
    (
        "images/00.png,cat\nimages/01.png,cats\n",
        r"1 of 2 files in '.*test' are of the class 'dog', which has no labelled",
    ),
    ("images/00.png,cat\nimages/01.png,dogs\n", r"'dog', which has no labelled file \(did you mean \"dogs\"\?\)"),
    ("".join(f"images/{i:02d}.png,{'cat' if i else 'dog'}\n" for i in range(12)), "holds no unlabelled image; add"),
]


@pytest.mark.parametrize(("text", "message"), BAD_LISTS)
def test_what_is_wrong_with_a_list_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_few_labels(listed(tmp_path, text), labelled="labels.csv")
    assert re.fullmatch(r"load_few_labels: .*\.", str(raised.value))


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    save(listed(tmp_path, "") / "labels.csv.png")
    with pytest.raises(ValueError, match=r"^load_few_labels: '.*png' is not UTF-8 text"):
        load_few_labels(tmp_path, labelled="labels.csv.png")


# Files that are in two places


def test_the_same_content_in_two_places_is_refused(tmp_path: Path) -> None:
    four_folders(tmp_path)
    for k, source in enumerate(("labelled/cat/00", "labelled/dog/03", "test/emu/01", "val/cat/00")):
        copy = tmp_path / "unlabelled" / f"copy{k}.png"
        copy.write_bytes((tmp_path / f"{source}.png").read_bytes())
    expected = [
        r"2 of 13 unlabelled files are also labelled \(the first is '.*copy0.png'\)",
        r"1 of 13 unlabelled files are also in the test split \(the first is '.*copy2.png'\)",
        r"1 of 13 unlabelled files are also in the validation split \(the first is '.*copy3.png'\)",
    ]
    with pytest.raises(
        ValueError,
        match=f"^load_few_labels: {' and '.join(expected)}, byte by byte; leave them in one place, or pass allow_over",
    ):
        load_few_labels(tmp_path)
    data = load_few_labels(tmp_path, allow_overlap=True)
    assert len(data.unlabelled) == 13
    assert all(re.fullmatch(want, got) for want, got in zip(expected, data.overlap, strict=True))


def test_labelled_files_that_are_tested_are_refused(tmp_path: Path) -> None:
    four_folders(tmp_path)
    (tmp_path / "test" / "dog" / "x.png").write_bytes((tmp_path / "labelled" / "cat" / "01.png").read_bytes())
    with pytest.raises(
        ValueError, match=r"1 of 15 labelled files are also in the test split \(the first is '.*01.png'"
    ):
        load_few_labels(tmp_path)
    listed(tmp_path / "other", BODY + "test/cat/00.png,cat\n")
    with pytest.raises(ValueError, match="1 of 4 labelled files are also in the test split"):
        load_few_labels(tmp_path / "other", labelled="labels.csv")


def test_labelled_files_that_are_tested_are_refused_whatever_is_cut_out(tmp_path: Path) -> None:
    four_folders(tmp_path)
    shutil.rmtree(tmp_path / "val")
    shutil.copy(tmp_path / "labelled" / "cat" / "01.png", tmp_path / "test" / "dog" / "x.png")
    said = set()
    for seed in range(8):
        with pytest.raises(ValueError, match=r"files are also in the test split \(the first is '.*01.png'") as refused:
            load_few_labels(tmp_path, validation=0.4, seed=seed)
        said.add("validation files" in str(refused.value))
    assert said == {False, True}


def test_copies_with_two_classes_are_refused(tmp_path: Path) -> None:
    four_folders(tmp_path)
    shutil.copy(tmp_path / "labelled" / "cat" / "01.png", tmp_path / "labelled" / "cat" / "y.png")
    assert len(load_few_labels(tmp_path).train) == 16
    shutil.copy(tmp_path / "labelled" / "cat" / "01.png", tmp_path / "labelled" / "dog" / "x.png")
    with pytest.raises(
        ValueError, match=r"01.png', labelled 'cat', and .*x.png', labelled 'dog', are the same, byte by"
    ):
        load_few_labels(tmp_path, allow_overlap=True)


def test_a_validation_split_is_cut_out_before_files_are_compared(tmp_path: Path) -> None:
    four_folders(tmp_path)
    shutil.rmtree(tmp_path / "val")
    whole = load_few_labels(tmp_path, include_labelled=True)
    data = load_few_labels(tmp_path, include_labelled=True, validation=0.2, seed=1)
    assert data.validation is not None
    kept, held = train_validation_split(whole.train.labels, 0.2, seed=1)
    assert ids(data.train) == [ids(whole.train)[i] for i in kept]
    assert ids(data.validation) == [ids(whole.train)[i] for i in held]
    assert ids(data.unlabelled) == ids(data.train) + ids(whole.unlabelled)[15:]
    assert data.truth.tolist() == data.train.labels.tolist() + [-1] * 9
    assert (data.mean, data.std) == (whole.mean, whole.std)
    shutil.copy(ids(data.validation)[0], tmp_path / "unlabelled" / "copy.png")
    emu = next(file for file in ids(data.train) if "emu" in file)
    shutil.copy(emu, Path(emu).with_name("copy.png"))
    with pytest.raises(ValueError, match=r"1 of 10 unlabelled files are also in the validation split"):
        load_few_labels(tmp_path, validation=0.2, seed=1)
    (tmp_path / "unlabelled" / "copy.png").unlink()
    for seed in range(8):  # a labelled file and its copy are never on two sides
        cut = load_few_labels(tmp_path, validation=0.4, seed=seed)
        contents = [{Path(file).read_bytes() for file in ids(part)} for part in (cut.train, cut.validation)]
        assert contents[0].isdisjoint(contents[1])
        assert len(cut.train) + len(cut.validation) == 16
    assert load_few_labels(four_folders(tmp_path / "own"), validation=0.2).validation.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("validation", "message"),
    [(0.01, "validation=0.01 can't be cut from 15 labelled files, of which a class has 5"), (1.5, "validation is 1.5")],
)
def test_a_validation_split_that_can_not_be_is_refused(tmp_path: Path, validation: float, message: str) -> None:
    four_folders(tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(ValueError, match=message):
        load_few_labels(tmp_path, validation=validation)


def test_one_folder_for_everything_is_refused(tmp_path: Path) -> None:
    four_folders(tmp_path)
    with pytest.raises(ValueError, match=r"15 of 29 unlabelled files are also labelled .* 4 of 29 .* and 1 of 29"):
        load_few_labels(tmp_path, unlabelled=".")
    with pytest.raises(ValueError, match="15 of 15 unlabelled files are also labelled"):
        load_few_labels(tmp_path, unlabelled=tmp_path / "labelled")


def test_equal_length_is_not_equal_content(tmp_path: Path) -> None:
    four_folders(tmp_path)
    one, other = tmp_path / "labelled" / "cat" / "a.bmp", tmp_path / "unlabelled" / "a.bmp"
    save(one, 800)
    save(other, 801)
    assert one.stat().st_size == other.stat().st_size
    assert load_few_labels(tmp_path).overlap == ()
    save(other, 800)
    with pytest.raises(ValueError, match="1 of 10 unlabelled files are also labelled"):
        load_few_labels(tmp_path)


# Files that can't be read


def cut(path: Path) -> None:
    """A file with a good header and half of its pixels."""
    torch.manual_seed(0)
    Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def test_unreadable_files_are_named_or_skipped(tmp_path: Path) -> None:
    four_folders(tmp_path)
    (tmp_path / "labelled" / "cat" / "00.png").write_bytes(b"")
    (tmp_path / "unlabelled" / "c" / "text.png").write_text("no image")
    cut(tmp_path / "unlabelled" / "cut.jpg")
    with pytest.raises(
        ValueError, match=r"^load_few_labels: 2 of 31 files can't be read \(.*empty.*\); replace or"
    ) as e:
        load_few_labels(tmp_path)
    assert re.search(r"cat/00.png' is empty .*; '.*text.png' is not", str(e.value))
    data = load_few_labels(tmp_path, on_error="skip")
    assert (len(data.train), len(data.unlabelled), len(data.skipped)) == (14, 9, 3)
    assert sorted(line.split("' ")[0].rsplit("/", 1)[1] for line in data.skipped) == ["00.png", "cut.jpg", "text.png"]


def decode_all(path: Path) -> None:
    reds(load_few_labels(path).unlabelled)


def test_a_truncated_file_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    cut(four_folders(tmp_path) / "unlabelled" / "cut.jpg")
    with pytest.raises(ValueError, match=r"^FileImages: '.*cut.jpg' can't be decoded .*; replace or remove it"):
        decode_all(tmp_path)


def test_listed_files_that_are_missing_are_skipped(tmp_path: Path) -> None:
    odd = "x\0y" if sys.version_info >= (3, 11) else "x"  # the csv module of Python 3.10 takes no NUL
    listed(tmp_path, BODY + f"images/99.png,cat\n{odd}.png,dog\n" + "x" * 5000 + ".png,cat\n")
    data = load_few_labels(tmp_path, labelled="labels.csv", on_error="skip")
    assert (reds(data.train), len(data.unlabelled)) == ([0, 3, 7], 9)
    assert len(data.skipped) == 3
    assert all(line.endswith("does not exist") for line in data.skipped)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("labelled/dog", "the class 'dog' has no labelled file that can be read; label another one"),
        ("test", "'.*test' has no image that can be read; add some"),
        ("unlabelled", "no unlabelled image of '.*' can be read; add some"),
        ("", "the class 'cat' has no labelled file that can be read"),
    ],
)
def test_what_is_left_after_skipping_must_do(tmp_path: Path, which: str, message: str) -> None:
    for path in (four_folders(tmp_path) / which).rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^load_few_labels: {message}"):
        load_few_labels(tmp_path, on_error="skip")


# Folders that are no data set


def strange(root: Path) -> None:
    many(root / "test", {"fox": 3}, start=700)


def single(root: Path) -> None:
    many(root / "labelled", {"fox": 1}, start=700)
    for name in ("test", "val"):
        (root / name).rename(root / f"no-{name}")


def emptied(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).rename(root / "away")
        (root / name).mkdir()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (strange, "3 of 7 files in '.*test' are of the class 'fox', which has no labelled file; label some, or rename"),
        (
            single,
            "the class 'fox' has 1 labelled file, but without '.*test' one of each class is kept for testing; lab",
        ),
        (lambda root: (root / "labelled" / "fox").mkdir(), "'.*fox' holds no images; add some or remove the folder"),
        (lambda root: (root / "test" / "fox").mkdir(), "'.*fox' holds no images"),
        (emptied("labelled"), "'.*labelled' has no class folders"),
        (emptied("unlabelled"), "'.*unlabelled' holds no unlabelled image; add some, or pass another folder"),
    ],
)
def test_a_folder_that_is_no_data_set_is_explained(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(four_folders(tmp_path))
    with pytest.raises(ValueError, match=f"^load_few_labels: {message}"):
        load_few_labels(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0; pass an integer of at least 1"),
        ({"channels": 2}, "channels is 2; pass 3 for RGB or 1 for gray"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; pass one of 'raise', 'skip'"),
        ({"labelled": ""}, "labelled is ''; pass a folder with one sub-folder per class, or a list of files"),
        ({"labelled": 3}, "labelled is 3; pass a folder"),
        ({"unlabelled": ""}, "unlabelled is ''; pass a folder of images"),
        (
            {"labelled": "labeled"},
            r"labelled is 'labeled', which is neither in .* \(did you mean \"labelled\"\?\); pass",
        ),
        (
            {"unlabelled": "unlabeled"},
            r"unlabelled is 'unlabeled', which is neither in .* nor elsewhere \(did you mean",
        ),
        ({"unlabelled": "labels.csv"}, "unlabelled is '.*labels.csv', which is no folder; pass a folder of images"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    (four_folders(tmp_path) / "labels.csv").write_text(BODY)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"^load_few_labels: {message}"):
        load_few_labels(tmp_path, **arguments)


def test_places_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, kind in (("gone", "not there"), ("file", "a file")):
        with pytest.raises(FileNotFoundError, match=f"^load_few_labels: path is '.*{name}', which is {kind}; pass the"):
            load_few_labels(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"^load_few_labels: labelled is 'labelled', which is neither in"):
        load_few_labels(tmp_path)


def test_held_out_folders_are_known_in_any_case_and_there_is_one_of_each(tmp_path: Path) -> None:
    root = four_folders(tmp_path)
    (root / "test").rename(root / "TEST")
    found = load_few_labels(root)
    held = {found.test.sample_id(i) for i in range(len(found.test))}
    assert all("TEST" in name for name in held)
    assert not held & {found.unlabelled.sample_id(i) for i in range(len(found.unlabelled))}
    for name in ("Val", "validation"):
        shutil.copytree(root / "TEST", root / name, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"has '\w+' and '\w+', which are both for validation; keep one of them"):
        load_few_labels(root)
