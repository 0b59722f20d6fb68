"""A tiny BERT with random weights, saved as a pretrained one would be."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hardmix.models import language_model
from hardmix.models.language_model import LanguageModel, find_language_model

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "##s", "sat", "."]
PAIRS = [("a cat", "a dog sat."), ("", "cats"), ("a cat sat. a dog sat.", "a")]
SINGLES = [(first,) for first, _ in PAIRS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    # From its own module: where that fails to import, the package's top level hands out another model's tokenizer.
    from transformers.models.bert.tokenization_bert import BertTokenizer

    BertTokenizer(str(folder / "vocab.txt"), model_max_length=150).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=160,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def mean_of(model: LanguageModel, text: str) -> Tensor:
    """(D,) mean of the hidden states of one text alone, without padding."""
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    return model.model.eval()(input_ids=ids).last_hidden_state[0].mean(0)


def test_pieces_of_words(saved: Path) -> None:
    model = LanguageModel(saved, pair=True)
    ids = model.tokenize(PAIRS)
    assert ids.dtype == torch.long
    assert ids.shape == (3, 2, 10)
    words = [[[VOCABULARY[k] for k in text if k] for text in sample] for sample in ids.tolist()]
    assert words[1] == [["[CLS]", "[SEP]"], ["[CLS]", "cat", "##s", "[SEP]"]]
    short = LanguageModel(saved, max_length=4).tokenize(SINGLES)
    assert short[2].tolist() == [[2, 5, 6, 3]]


@pytest.mark.parametrize("pair", [False, True])
def test_features_are_the_mean_over_what_is_no_padding(saved: Path, pair: bool) -> None:
    model = LanguageModel(saved, pair=pair)
    texts = PAIRS if pair else SINGLES
    got = model(model.tokenize(texts))
    assert got.shape == (3, model.features)
    assert model.features == (32 if pair else 8)
    for row, sample in zip(got, texts, strict=True):
        means = [mean_of(model, text) for text in sample]
        expected = means[0]
        if pair:
            expected = torch.cat([*means, (means[0] - means[1]).abs(), means[0] * means[1]])
        assert torch.allclose(row, expected, atol=1e-5)


def test_padding_never_influences_a_text(saved: Path) -> None:
    model = LanguageModel(saved, pair=True)
    ids = model.tokenize(PAIRS)
    got = model(ids)
    assert torch.allclose(model(torch.cat([ids, torch.zeros(3, 2, 5).long()], 2)), got, atol=1e-5)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.allclose(model(ids[:1]), got[:1], atol=1e-5)
    assert lengths == [6]
    assert model(torch.zeros(2, 2, 3).long()).isfinite().all()


def test_a_frozen_model_stays_in_evaluation_and_has_no_gradient(saved: Path) -> None:
    model = LanguageModel(saved, pair=True).train()
    ids = model.tokenize(PAIRS)
    assert model.training
    assert not any(module.training for module in model.model.modules())
    assert model(ids).equal(model(ids))
    assert not model(ids).requires_grad
    assert not any(p.requires_grad for p in model.parameters())


def test_a_tuned_model_has_dropout_and_every_weight_a_gradient(saved: Path) -> None:
    model = LanguageModel(saved, pair=True, tune=True)
    ids = model.tokenize(PAIRS)
    assert not model(ids).equal(model(ids))
    model(ids).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    model.eval()
    assert model(ids).equal(model(ids))
    assert model(ids).requires_grad


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_features_computed_once_equal_those_of_a_batch(saved: Path, batch: int) -> None:
    model = LanguageModel(saved, pair=True)
    got = model.frozen_features(PAIRS, batch=batch)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.allclose(got, model(model.tokenize(PAIRS)), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"the model is tuned, so its features change; train it on `tokenize\(texts\)`"
    ):
        LanguageModel(saved, pair=True, tune=True).frozen_features(PAIRS)
    with pytest.raises(ValueError, match="batch is 0"):
        model.frozen_features(PAIRS, batch=0)


def test_loading_is_quiet_and_leaves_the_progress_bars_as_they_were(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    torch.manual_seed(3)
    LanguageModel(saved)
    assert "Loading" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled() == before


def test_half_precision_weights_become_float32(copy: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertModel.from_pretrained(copy).half().save_pretrained(copy)
    model = LanguageModel(copy)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(model.tokenize(SINGLES)).dtype == torch.float32


def test_the_nearest_folder_with_safetensors_is_found(saved: Path, tmp_path: Path) -> None:
    assert find_language_model(tmp_path) is None
    folder = Path(shutil.copytree(saved, tmp_path / "package" / "model"))
    (tmp_path / "package" / "config.json").write_text("{}")
    assert find_language_model(tmp_path) == find_language_model(folder) == folder
    assert LanguageModel(tmp_path).features == 8


def edit(folder: Path, name: str, **changed: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changed))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_layer(folder: Path) -> None:
    edit(folder, "config.json", num_hidden_layers=3)


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def foreign_code(folder: Path) -> None:
    edit(folder, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    (folder / "mine.py").write_text("raise SystemExit('code of the folder ran')")


def no_padding(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", pad_token="[SEP]")


DAMAGE: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (only_a_pickle, FileNotFoundError, r"which holds no config\.json with \*\.safetensors beside it; pass the folder"),
    (without_a_layer, ValueError, r"lacks 16 weights of its model \(encoder\.layer\.2\..*\); fetch it again"),
    (cut_weights, ValueError, r"can't be loaded \(\w+: .*\); fetch it again"),
    (
        lambda folder: (folder / "config.json").write_text("{"),
        ValueError,
        r"can't be loaded \(\w+: .*\); fetch it again",
    ),
    (foreign_code, ValueError, r"can't be loaded \(\w+: .*\); fetch it again"),
    (lambda folder: edit(folder, "config.json", hidden_size=16), ValueError, r"can't be loaded \(\w+: .*\); fetch it"),
    (no_padding, ValueError, "has a tokenizer without padding of its own; pass an encoder such as BERT"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_what_is_wrong_with_a_folder_is_said(
    copy: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(copy)
    with pytest.raises(error, match=rf"^LanguageModel: .*{message}.*\.$"):
        LanguageModel(copy)


def test_an_encoder_with_a_decoder_is_refused(copy: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(copy)
    with pytest.raises(ValueError, match="is a T5Model; pass an encoder such as BERT"):
        LanguageModel(copy)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: LanguageModel(p, max_length=2), ValueError, "max_length is 2; pass an integer of at least 3"),
        (
            lambda p: LanguageModel(p, max_length=151),
            ValueError,
            "reads 150 pieces of a text, but max_length is 151",
        ),
        (
            lambda p: LanguageModel(p / "vocab.txt"),
            FileNotFoundError,
            "vocab.txt', which is no folder; pass the folder",
        ),
        (lambda p: LanguageModel(p).tokenize(PAIRS), ValueError, "texts has 2 texts in entry 0; pass tuples of 1, see"),
        (lambda p: LanguageModel(p).tokenize([]), ValueError, "texts has no entries; pass tuples of 1, see pair"),
        (lambda p: LanguageModel(p)(torch.ones(2, 2, 3).long()), ValueError, r"pass \(N, 1, L\), .* for single texts"),
        (lambda p: LanguageModel(p)(torch.full((1, 1, 3), 11)), ValueError, "ids holds 11, but the model knows 11 ids"),
        (lambda p: LanguageModel(p)(torch.ones(1, 1, 3)), TypeError, "ids has dtype torch.float32"),
    ],
)
def test_bad_arguments_are_named(
    saved: Path, call: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(saved)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers, which is missing; pip install transformers\."):
        LanguageModel(tmp_path)
    with pytest.raises(FileNotFoundError, match="'/none', which is no folder; pass the folder of a model"):
        LanguageModel("/none")


def test_alike_sentences_are_nearer_for_the_full_model() -> None:
    pytest.importorskip("transformers")
    root = os.environ.get("HARDMIX_DATA")
    folder = None if root is None else find_language_model(Path(root) / "all-minilm-l6-v2")
    if folder is None:
        pytest.skip("HARDMIX_DATA has no all-minilm-l6-v2")
    model = language_model.LanguageModel(folder)
    texts = ["A man is playing a guitar.", "Someone plays a guitar.", "The market fell by three percent."]
    z = torch.nn.functional.normalize(model.frozen_features([(text,) for text in texts]))
    assert (z @ z.T)[0].tolist() == pytest.approx([1.0, 0.76, 0.0], abs=0.1)
