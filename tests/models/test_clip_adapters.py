"""A tiny CLIP and a tiny SigLIP with random weights, saved as pre-trained ones would be."""

from __future__ import annotations

import copy as copying
import importlib.util
import inspect
import json
import math
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.losses import M2MixLoss
from hardmix.models.clip_adapters import FREEZE, ClipParts, load_hf_clip, load_open_clip

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 16}
TEXTS = ["a cat", "a dog sat, a cat sat.", "", "dog"]
KINDS = ["clip", "siglip"]
LETTERS = "acdgost.,"
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def clip_tokenizer(folder: Path) -> int:
    # From its own module: where that fails to import, the package's top level hands out another model's tokenizer.
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    pieces += ["ca", "cat</w>", "do", "dog</w>"]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    if "vocab" in inspect.signature(CLIPTokenizer.__init__).parameters:
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=9).save_pretrained(folder)
    else:  # before version 5 the fast one has another name and reads files
        from transformers import CLIPTokenizerFast

        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        CLIPTokenizerFast(*files, model_max_length=9).save_pretrained(folder)
    return len(vocab)


def siglip_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "sat", ".", ","]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(words)


def save(kind: str, folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    words = {"clip": clip_tokenizer, "siglip": siglip_tokenizer}[kind](folder)
    text = {**SIZES, "vocab_size": words, "max_position_embeddings": 9}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1 if kind == "clip" else 0}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
        model = transformers.CLIPModel(config)
    else:
        config = transformers.SiglipConfig(text_config=text, vision_config=IMAGE)
        model = transformers.SiglipModel(config)
        torch.nn.init.constant_(model.logit_scale, math.log(12.0))
        torch.nn.init.constant_(model.logit_bias, -9.0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["clip"], tmp_path / "copy"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pictures(count: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def original(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_whole_model(saved: dict[str, Path], kind: str) -> None:
    parts = load_hf_clip(saved[kind])
    assert isinstance(parts, ClipParts)
    assert (parts.image_size, parts.features) == (32, 16 if kind == "clip" else 32)
    model, x, ids = original(saved[kind]), pictures(4), parts.tokenize(TEXTS)
    assert ids.dtype == torch.long
    mean, std = OPENAI if kind == "clip" else ([0.5] * 3, [0.5] * 3)
    normal = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    mask = None if kind == "siglip" else (torch.cumsum(ids == 1, 1) <= 1).long()  # as its processor has it
    with torch.no_grad():
        want = model(input_ids=ids, pixel_values=normal, attention_mask=mask)
        image, text = parts.image.eval()(x), parts.text.eval()(ids)
    assert image.shape == text.shape == (4, parts.features)
    torch.testing.assert_close(F.normalize(image), want.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.normalize(text), want.text_embeds, atol=1e-5, rtol=1e-5)
    logits = parts.logit_scale * F.normalize(image) @ F.normalize(text).T + (parts.logit_bias or 0.0)
    torch.testing.assert_close(logits, want.logits_per_image, atol=1e-4, rtol=1e-4)
    assert (parts.logit_bias is None) == (kind == "clip")
    if kind == "siglip":
        assert (parts.logit_scale, parts.logit_bias) == (pytest.approx(12.0), -9.0)


def test_texts_of_a_clip_end_and_are_padded_to_the_longest(saved: dict[str, Path]) -> None:
    parts = load_hf_clip(saved["clip"])
    ids = parts.tokenize(["a cat", "a dog"])
    assert ids.shape == (2, 4)
    assert ids[:, 0].eq(0).all()
    assert ids[:, -1].eq(1).all()
    assert parts.tokenize([""]).tolist() == [[0, 1]]
    long = parts.tokenize(["a " * 30])
    assert long.shape == (1, 9)
    assert long[0, -1] == 1
    text = parts.text.eval()
    alone = torch.cat([text(parts.tokenize([line])) for line in TEXTS])
    torch.testing.assert_close(text(parts.tokenize(TEXTS)), alone, atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_texts_of_a_siglip_have_the_length_that_it_was_trained_with(saved: dict[str, Path]) -> None:
    parts = load_hf_clip(saved["siglip"])
    assert parts.tokenize(["a cat"]).tolist() == [[3, 4, 1, 0, 0, 0, 0, 0, 0]]
    assert parts.tokenize(["a cat sat. " * 5]).shape == (1, 9)
    with pytest.raises(ValueError, match="ClipTexts: ids has 4 columns; pass 9, as `tokenize` does"):
        parts.text(torch.ones(1, 4).long())


@pytest.mark.parametrize("kind", KINDS)
def test_the_towers_share_nothing_and_train_apart(saved: dict[str, Path], kind: str) -> None:
    parts = load_hf_clip(saved[kind])
    storages = [{value.data_ptr() for value in part.state_dict().values()} for part in (parts.image, parts.text)]
    assert not storages[0] & storages[1]
    sizes = [sum(value.numel() for value in part.state_dict().values()) for part in (parts.image, parts.text)]
    assert sum(sizes) == sum(p.numel() for p in original(saved[kind]).parameters()) - (1 if kind == "clip" else 2)
    parts.image(pictures()).square().sum().backward()
    assert all(p.grad is None for p in parts.text.parameters())
    for name, parameter in parts.image.named_parameters():
        assert parameter.grad is not None, name
    parts.text(parts.tokenize(TEXTS)).square().sum().backward()
    for name, parameter in parts.text.named_parameters():
        assert parameter.grad is not None, name
    again = load_hf_clip(saved[kind])
    torch.nn.init.zeros_(next(again.image.parameters()))
    again.image.load_state_dict(parts.image.state_dict())
    assert torch.equal(again.image.eval()(pictures()), parts.image.eval()(pictures()))
    assert torch.equal(copying.deepcopy(parts.text)(parts.tokenize(TEXTS)), parts.text(parts.tokenize(TEXTS)))


def test_both_towers_learn_from_m2_mix(saved: dict[str, Path]) -> None:
    parts = load_hf_clip(saved["clip"])
    x, ids = pictures(4), parts.tokenize(TEXTS)
    optimizer = torch.optim.AdamW([*parts.image.parameters(), *parts.text.parameters()], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = M2MixLoss(weight=0.1)(parts.image(x), parts.text(ids), parts.logit_scale, lam=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("freeze", FREEZE)
def test_what_is_frozen_computes_as_in_evaluation(saved: dict[str, Path], freeze: str) -> None:
    parts = load_hf_clip(saved["clip"], freeze=freeze)
    for name, part, x in (("image", parts.image, pictures()), ("text", parts.text, parts.tokenize(TEXTS))):
        frozen = freeze in (name, "both")
        part.train()
        assert part.model.training != frozen
        assert all(p.requires_grad != frozen for p in part.parameters())
        assert part(x).requires_grad != frozen


def test_loading_is_quiet_and_leaves_the_settings_of_transformers(
    saved: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    load_hf_clip(saved["siglip"])
    out, err = capfd.readouterr()
    assert out == err == ""
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_half_precision_weights_become_float32(copy: Path) -> None:
    original(copy).half().save_pretrained(copy)
    parts = load_hf_clip(copy)
    assert {p.dtype for p in [*parts.image.parameters(), *parts.text.parameters()]} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "content", "mean", "std"),
    [
        ("preprocessor", {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}, [0.1, 0.2, 0.3], [1, 2, 4]),
        ("processor", {"image_processor": {"image_mean": [0, 0, 1], "image_std": [1, 1, 2]}}, [0, 0, 1], [1, 1, 2]),
        ("preprocessor", {"do_normalize": False, "image_mean": [9, 9, 9]}, [0, 0, 0], [1, 1, 1]),
        ("preprocessor", {"size": 3}, *OPENAI),
    ],
)
def test_pictures_are_normalised_as_the_folder_says(
    copy: Path, name: str, content: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    (copy / f"{name}_config.json").write_text(json.dumps(content))
    scale = load_hf_clip(copy).image.scale
    torch.testing.assert_close(scale.mean, torch.tensor(mean).float())
    torch.testing.assert_close(scale.std, torch.tensor(std).float())


def test_the_nearest_folder_is_found_and_others_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["clip"], tmp_path / "package" / "model")
    assert load_hf_clip(tmp_path).features == 16
    with pytest.raises(FileNotFoundError, match="load_hf_clip: path is '/none', which is no folder; pass the folder"):
        load_hf_clip("/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"which holds no config\.json with \*\.safetensors beside it"):
        load_hf_clip(tmp_path / "empty")


def edit(folder: Path, name: str, *keys: str, **changed: Any) -> None:
    content = json.loads((folder / name).read_text())
    place = content
    for key in keys:
        place = place[key]
    place |= changed
    (folder / name).write_text(json.dumps(content))


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def foreign_code(folder: Path) -> None:
    edit(folder, "config.json", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    edit(folder, "config.json", model_type="mine")
    (folder / "mine.py").write_text("raise SystemExit('code of the folder ran')")


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def another_word(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["more"] = 24
    (folder / "tokenizer.json").write_text(json.dumps(content))


def no_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), folder / "vocab.json", folder / "merges.txt"):
        file.unlink(missing_ok=True)


DAMAGE: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (only_a_pickle, FileNotFoundError, r"which holds no config\.json with \*\.safetensors beside it; pass the folder"),
    (cut_weights, ValueError, r"can't be loaded \(\w+: .*\); fetch it again"),
    (foreign_code, ValueError, "is a model of the type 'mine'; pass a folder of the type clip or siglip"),
    (lambda f: edit(f, "config.json", model_type=["clip"]), ValueError, r"is a model of the type \['clip'\]; pass a"),
    (no_tokenizer, ValueError, r"holds no tokenizer \(tokenizer\.json, .*\); fetch it again"),
    (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ValueError,
        r"can't be loaded \(\w+: .*\); fetch it again",
    ),
    (
        another_word,
        ValueError,
        "has a tokenizer of 25 ids and a model of 24; fetch it again",
    ),
    (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json can't be read \(.*\); fetch it again"),
    (lambda f: (f / "config.json").write_text("[]"), ValueError, r"config\.json holds a list, no object; fetch it"),
    (
        lambda f: (f / "processor_config.json").write_text('{"image_mean": [1, 2], "image_std": [1, 1, 1]}'),
        ValueError,
        r"image_mean of processor_config\.json is \[1, 2\]; it has to be three numbers",
    ),
    (
        lambda f: edit(f, "config.json", projection_dim=8),
        ValueError,
        r"visual_projection\.weight has another shape in the weights than \(8, 32\) by config\.json; fetch it again",
    ),
    (
        lambda f: edit(f, "config.json", "text_config", hidden_size=16),
        ValueError,
        r"text_model\.embeddings\.token_embedding\.weight has another shape in the weights than \(24, 16\) by",
    ),
    (
        lambda f: edit(f, "config.json", "vision_config", num_hidden_layers=3),
        ValueError,
        r"vision_model\.encoder\.layers\.2\.\S* is not among the weights; fetch it again",
    ),
    (
        lambda f: edit(f, "config.json", "vision_config", num_hidden_layers=1),
        ValueError,
        r"vision_model\.encoder\.layers\.1\.\S* is among the weights but not in the model; fetch it again",
    ),
    (
        lambda f: edit(f, "config.json", "text_config", eos_token_id=7),
        ValueError,
        "has a tokenizer that ends texts with 1, but a model that looks for 7; fetch it again",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_what_is_wrong_with_a_folder_is_said(
    copy: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(copy)
    with pytest.raises(error, match=rf"^load_hf_clip: .*{message}.*\.$") as caught:
        load_hf_clip(copy)
    assert "\n" not in str(caught.value)


def test_another_model_is_refused_before_it_is_read(copy: Path) -> None:
    edit(copy, "config.json", model_type="bert")
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a model of the type 'bert'; pass a folder of the type clip or siglip"):
        load_hf_clip(copy)


CALLS: list[tuple[Callable[[ClipParts], object], type[Exception], str]] = [
    (lambda p: p.image(pictures()[:, :, :16]), ValueError, r"\(3, 3, 16, 32\); scale pictures to 32 x 32 pixels first"),
    (lambda p: p.image(pictures() * 255), ValueError, r"x has values from .* to 25\d.*; pass pictures in \[0, 1\]"),
    (lambda p: p.image(pictures() * float("nan")), ValueError, r"x has values from nan to nan; pass pictures in"),
    (lambda p: p.image((pictures() * 255).byte()), TypeError, "ClipImages: x has dtype torch.uint8"),
    (lambda p: p.image(pictures()[:, :1]), ValueError, "ClipImages: x has 1 channels; pass the 3"),
    (lambda p: p.text(p.tokenize(TEXTS)[0]), ValueError, r"ids has shape \(9,\); pass a batch with 2 axes"),
    (lambda p: p.text(torch.ones(2, 3)), TypeError, "ids has dtype torch.float32; pass the ids of `tokenize`"),
    (lambda p: p.text(torch.ones(2, 10).long()), ValueError, "ids has 10 columns; pass at most 9, as `tokenize` does"),
    (
        lambda p: p.text(torch.tensor([[0, 24, 1]])),
        ValueError,
        "ids holds 24, but the model knows 24 ids; pass the ids",
    ),
    (
        lambda p: p.text(torch.tensor([[0, -1, 1]])),
        ValueError,
        "ids holds -1, but the model knows 24 ids; pass the ids",
    ),
    (lambda p: p.text(torch.tensor([[0, 1], [0, 5]])), ValueError, "row 1 of ids lacks the end 1; pass the ids of"),
    (lambda p: p.tokenize([]), ValueError, "tokenize: texts has no entries; pass at least one"),
    (lambda p: p.tokenize("a cat"), TypeError, "tokenize: texts is a str; pass a list of texts"),  # type: ignore[arg-type]
    (lambda p: p.tokenize(["a", 3]), TypeError, "tokenize: texts has a int in entry 1"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_bad_arguments_are_named(
    saved: dict[str, Path], call: Callable[[ClipParts], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(load_hf_clip(saved["clip"]))


def test_bad_settings_are_named(saved: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"load_hf_clip: freeze is 'images'; pass one of .* \(did you mean \"image\"\?\)"
    ):
        load_hf_clip(saved["clip"], freeze="images")
    with pytest.raises(ValueError, match="load_open_clip: freeze is 'towers'; pass one of"):
        load_open_clip("ViT-B-32", "x.pt", freeze="towers")


def test_what_a_tokenizer_lacks_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("sentencepiece") is not None:
        pytest.skip("nothing is missing")
    folder = Path(shutil.copytree(saved["siglip"], tmp_path / "copy"))
    edit(folder, "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    with pytest.raises(ImportError, match=r"missing \(.*SentencePiece.*\); install it, .* sentencepiece protobuf\.$"):
        load_hf_clip(folder)


def test_a_missing_library_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers, which is missing; pip install transformers\."):
        load_hf_clip(copy)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"load_open_clip needs open_clip \(.*\); pip install open_clip_torch, and"):
        load_open_clip("ViT-B-32", "weights.pt")
