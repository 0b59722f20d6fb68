"""Vocabularies counted by hand, and word vectors from both kinds of files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data.vocabulary import SMALL, Vocabulary, WordVectors, find_vectors, load_vectors, words_of

TRAINING = [("the cat sat", "a cat"), ("The zyx", "The qqq.")]
OTHERS = [("a dog xxx", "the end")]
VECTORS = {"the": [1.0, -2.5], "cat": [3.0, 4e-3], ".": [5.0, 6.0], "dog": [7.0, 8.0], "moon": [9.0, 9.0]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        (" \t\n", ""),
        ("Don't can't won't, isn't", "do n't ca n't wo n't , is n't"),
        ("It's we'll 'quoted' John's dogs'", "it 's we 'll ' quoted ' john 's dogs '"),
        ("n't antn'ts", "n't antn ' ts"),
        ("$1,520.15 at 10:30", "$ 1 , 520 . 15 at 10 : 30"),
        ("well-known (U.S.) caf\u00c9!?", "well - known ( u . s . ) caf\u00e9 ! ?"),
        ("\u65e5\u672c \U0001f600 a_b", "\u65e5\u672c \U0001f600 a_b"),
    ],
)
def test_words_and_punctuation(text: str, words: str) -> None:
    assert words_of(text) == words.split()


@settings(deadline=None)
@given(st.text())
def test_no_character_but_space_is_lost(text: str) -> None:
    assert "".join(words_of(text)) == "".join(text.lower().split())


def test_words_by_count_then_alphabet() -> None:
    vocabulary = Vocabulary.build(TRAINING)
    assert vocabulary.words == ("the", "cat", ".", "a", "qqq", "sat", "zyx")
    assert len(vocabulary) == 9
    assert Vocabulary.build(TRAINING, min_count=2).words == ("the", "cat")
    assert Vocabulary(vocabulary.words).encode(TRAINING).equal(vocabulary.encode(TRAINING))


def test_words_with_a_vector_join_from_other_texts_and_stay_when_rare() -> None:
    vocabulary = Vocabulary.build(TRAINING, min_count=2, others=OTHERS, vectors=VECTORS.keys())
    assert vocabulary.words == ("the", "cat", ".", "dog")
    assert Vocabulary.build(TRAINING, others=OTHERS).words == Vocabulary.build(TRAINING).words


def test_ids_are_padded_cut_and_unknown() -> None:
    vocabulary = Vocabulary.build(TRAINING)
    ids = vocabulary.encode([("The dog", ""), ("a the cat sat", "dog")])
    assert ids.dtype == torch.long
    assert ids.tolist() == [[[2, 1, 0, 0], [0, 0, 0, 0]], [[5, 2, 3, 7], [1, 0, 0, 0]]]
    assert vocabulary.encode([("The dog", ""), ("a the cat sat", "dog")], max_length=2).equal(ids[..., :2])
    assert vocabulary.encode([("",), (" ",)]).tolist() == [[[0]], [[0]]]


def write_text(folder: Path, lines: list[str]) -> Path:
    path = folder / "glove.6B.2d.txt"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    return path


def text_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_text(folder, [f"{word} {' '.join(map(str, numbers))}" for word, numbers in VECTORS.items()])


def array_file(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str = "<f4", words: Any = tuple(VECTORS)) -> Path:
    np.save(folder / "glove_2d_emb.npy", np.array(list(VECTORS.values()), dtype))
    (folder / "glove_index.parquet").write_bytes(b"")
    column = SimpleNamespace(to_pylist=lambda: list(words))
    table = SimpleNamespace(column=lambda _: column)
    parquet = SimpleNamespace(ParquetFile=lambda _: SimpleNamespace(read=lambda: table))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=RuntimeError, parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    return folder / "glove_2d_emb.npy"


@pytest.mark.parametrize("make", [text_file, array_file])
def test_vectors_of_all_words_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Path]
) -> None:
    assert find_vectors(tmp_path) is None
    (tmp_path / "data").mkdir()
    path = make(tmp_path / "data", monkeypatch)
    assert find_vectors(tmp_path) == find_vectors(path) == path
    got = load_vectors(tmp_path, TRAINING, OTHERS)
    words = got.vocabulary.words
    assert words == ("the", "cat", ".", "a", "qqq", "sat", "zyx", "dog")
    assert got.vectors.shape == (10, 2)
    assert got.vectors.dtype == torch.float32
    assert got.source == str(path)
    for row, word in enumerate(words, 2):
        assert bool(got.found[row]) == (word in VECTORS)
        if word in VECTORS:
            assert got.vectors[row].equal(torch.tensor(VECTORS[word]))
    assert not got.found[:2].any()
    assert got.vectors[:2].abs().sum() == 0
    assert load_vectors(path, TRAINING, OTHERS).vectors.equal(got.vectors)
    # the, cat, the, the, cat and "." have one; a, sat, zyx and qqq lack it
    assert got.coverage(got.vocabulary.encode(TRAINING)) == pytest.approx(6 / 10)
    assert got.coverage(got.vocabulary.encode(OTHERS)) == pytest.approx(2 / 5)


def test_other_texts_change_nothing_about_the_words_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text_file(tmp_path, monkeypatch)
    alone, joined = load_vectors(path, TRAINING), load_vectors(path, TRAINING, OTHERS)
    size = len(alone.vocabulary)
    assert joined.vocabulary.words[: size - 2] == alone.vocabulary.words
    assert joined.vectors[:size].equal(alone.vectors)


def test_words_without_a_vector_are_small_and_differ(tmp_path: Path) -> None:
    rare = [(" ".join(f"w{k}" for k in range(500)) + " the",)]
    got = load_vectors(write_text(tmp_path, ["the " + "1.0 " * 20]), rare)
    made = got.vectors[2:][~got.found[2:]]
    assert made.shape == (500, 20)
    assert made.std().item() == pytest.approx(SMALL, rel=0.05)
    assert len(made.unique(dim=0)) == 500


def test_lines_with_spaces_in_the_word_or_strange_breaks_are_passed_over(tmp_path: Path) -> None:
    path = write_text(
        tmp_path, ["the 1 2", ". . . 9 9", "\x85 3 3", "cat\u2028 4 4", "x\rcat 5 5", ". 5 6", "the 8 8", "cat 3 4", ""]
    )
    got = load_vectors(path, TRAINING)
    rows = {word: got.vectors[row].tolist() for row, word in enumerate(got.vocabulary.words, 2)}
    assert (rows["the"], rows["."], rows["cat"]) == ([1, 2], [5, 6], [3, 4])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["dog 1 2"], "has no vector for any of the 7 words; pass vectors of their language"),
        ([""], "has no vector for any of the 7 words"),
        (["dog 1 2", "the 1"], "has not 2 numbers after the word in line 2; fetch it again"),
        (["dog 1 2", "the 1 x"], "has not 2 numbers after the word in line 2; fetch it again"),
        (["the"], "has not 0 numbers after the word in line 1"),
        (["the 1 nan"], "has NaN or infinity for 'the'; fetch it again"),
        (["cat 1 2", "the 1 1e39"], "has NaN or infinity for 'the'; fetch it again"),
        (["the 1 2", "\udcff 1 2"], "is not UTF-8 text; pass GloVe's file of words and numbers"),
    ],
)
def test_what_is_wrong_with_a_text_of_vectors_is_said(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^load_vectors: '.*glove\.6B\.2d\.txt' {message}.*\.$"):
        load_vectors(write_text(tmp_path, lines), TRAINING)


def test_what_is_wrong_with_an_array_of_vectors_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("<f2", ">f8", "g"):
        path = array_file(tmp_path, monkeypatch, dtype)
        assert load_vectors(path, [("the",)]).vectors[2].tolist() == VECTORS["the"]
    for dtype, words, message in (
        ("<f4", ["the"], r"is an array \(5, 2\) of float32 for 1 words; fetch it again"),
        ("<i8", list(VECTORS), r"is an array \(5, 2\) of int64 for 5 words"),
    ):
        array_file(tmp_path, monkeypatch, dtype, words)
        with pytest.raises(ValueError, match=message):
            load_vectors(path, TRAINING)
    path.write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(ValueError, match=r"_emb.npy' or its words are damaged \(\w+\); fetch them again\."):
        load_vectors(path, TRAINING)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"damaged \(ValueError\)"):
        load_vectors(path, TRAINING)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"index\.parquet', which only pyarrow can read; pip install pyarrow, or pass"
    ):
        load_vectors(path, TRAINING)
    (tmp_path / "other_index.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has 2 files \*_index.parquet beside it; put the one of its words there"):
        load_vectors(path, TRAINING)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Vocabulary(["a", "b", "a"]), ValueError, "words holds 'a' more than once; pass each word once"),
        (lambda: Vocabulary.build([]), ValueError, "0 texts hold no word that occurs 1 times; pass more texts"),
        (lambda: Vocabulary.build(TRAINING, min_count=4), ValueError, "2 texts hold no word that occurs 4 times"),
        (lambda: Vocabulary.build(TRAINING, min_count=0), ValueError, "min_count is 0; pass an integer of at least 1"),
        (lambda: Vocabulary(["a"]).encode([]), ValueError, "texts has 0 entries of no texts; pass tuples of one text"),
        (lambda: Vocabulary(["a"]).encode([("a",), ("a", "b")]), ValueError, "texts has 2 entries of 1 and 2 texts"),
        (lambda: Vocabulary(["a"]).encode([("a",) * 3]), ValueError, "texts has 1 entries of 3 texts"),
        (lambda: Vocabulary(["a"]).encode([("a",)], 0), ValueError, "max_length is 0"),
        (lambda: load_vectors("/no.txt", TRAINING), FileNotFoundError, "'/no.txt', which is not there; pass a file of"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_folder_without_vectors_or_with_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"which holds no glove\*\.txt or \*_emb\.npy; pass a file of GloVe's"):
        load_vectors(tmp_path, TRAINING)
    for name in ("glove.6B.50d.txt", "glove.6B.100d.txt"):
        (tmp_path / name).write_text("the 1 2")
    with pytest.raises(ValueError, match=r"holds 2 files of word vectors \('glove.6B.100d.txt', .*\); pass one\."):
        load_vectors(tmp_path, TRAINING)


def test_coverage_leaves_padding_out() -> None:
    found = torch.tensor([False, False, True])
    vectors = WordVectors(Vocabulary(["a"]), torch.zeros(3, 1), found, "")
    assert vectors.coverage(torch.tensor([[[2, 2, 0, 0]], [[1, 0, 0, 0]]])) == pytest.approx(2 / 3)
