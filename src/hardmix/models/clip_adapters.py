"""The two towers of a pre-trained CLIP or SigLIP from local files, each a module that is trained on its own."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import reason, shown
from hardmix.data.numbers import ChannelScale
from hardmix.models import layers
from hardmix.models.checkpoint import load_weights
from hardmix.models.language_model import find_language_model
from hardmix.models.subwords import plain_texts

#: towers that stay as they are
FREEZE = ("none", "image", "text", "both")
#: model types of transformers that are read, and where their pictures' mean and standard deviation are, if nowhere else
FAMILIES = {"clip": "OPENAI_CLIP", "siglip": "IMAGENET_STANDARD"}
#: what a tokenizer may be saved as; without any, transformers makes an empty one
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
#: how far from [0, 1] a picture's values may lie: resampling overshoots, normalised pictures go farther
SLACK = 0.5


class ClipParts(NamedTuple):
    """A pre-trained image-text model in parts; no parameter is in both towers.

    Attributes:
        image: (N, 3, S, S) floats in [0, 1] -> (N, D); normalises them itself.
        text: (N, L) ids from `tokenize` -> (N, D). Features of both have any length.
        tokenize: a list of N texts -> (N, L) long ids on the CPU, begin, end and padding included; what is too long
            loses its end.
        image_size: S.
        features: D.
        logit_scale: the scale that the cosines were trained with, exponentiated.
        logit_bias: of a sigmoid model; None for the others.
    """

    image: nn.Module
    text: nn.Module
    tokenize: Callable[[list[str]], Tensor]
    image_size: int
    features: int
    logit_scale: float
    logit_bias: float | None


class _Tower(nn.Module):
    """A model that is trained, or that computes as in evaluation and without a gradient even after `train()`."""

    def __init__(self, model: nn.Module, tune: bool) -> None:
        super().__init__()
        self.model = model.float().requires_grad_(tune)
        self.tune = tune
        self.train()

    def train(self, mode: bool = True) -> _Tower:
        super().train(mode)
        if not self.tune:
            self.model.eval()
        return self

    def _features(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.tune and torch.is_grad_enabled()):
            return self.model(x)


class ClipImages(_Tower):
    """Pictures (N, 3, S, S) in [0, 1], normalised by `mean` and `std` -> features (N, D) of `model`."""

    def __init__(self, model: nn.Module, *, size: int, mean: Sequence[float], std: Sequence[float], tune: bool) -> None:
        super().__init__(model, tune)
        self.size = size
        self.scale = ChannelScale(torch.tensor(mean), torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        x = layers.images("ClipImages", x, 3)
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"ClipImages: x has shape {tuple(x.shape)}; scale pictures to {self.size} x {self.size} pixels first."
            )
        if x.device.type == "cpu":  # a GPU would have to be waited for
            low, high = (float(value) for value in x.detach().aminmax())
            if not -SLACK <= low <= high <= 1 + SLACK:
                raise ValueError(f"ClipImages: x has values from {low:g} to {high:g}; pass pictures in [0, 1].")
        return self._features(self.scale(x))


class ClipTexts(_Tower):
    """Ids of pieces of words (N, L) -> features (N, D) of `model`.

    Args:
        vocabulary: ids that there are.
        length: L at most.
        fixed: L always, for a model without a mask that was trained on texts padded to it.
        end: the id whose place the features are taken from, which each text needs; None for the last place.
    """

    def __init__(
        self, model: nn.Module, *, vocabulary: int, length: int, fixed: bool, end: int | None, tune: bool
    ) -> None:
        super().__init__(model, tune)
        self.vocabulary, self.length, self.fixed, self.end = vocabulary, length, fixed, end

    def forward(self, ids: Tensor) -> Tensor:
        who = "ClipTexts"
        ids = _check.batch(who, "ids", ids, 2, 2)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{who}: ids has dtype {ids.dtype}; pass the ids of `tokenize`.")
        size = ids.shape[1]
        if size > self.length or (self.fixed and size < self.length):
            most = "" if self.fixed else "at most "
            raise ValueError(f"{who}: ids has {size} columns; pass {most}{self.length}, as `tokenize` does.")
        if ids.device.type == "cpu":
            low, high = (int(value) for value in ids.aminmax())
            if low < 0 or high >= self.vocabulary:
                raise ValueError(
                    f"{who}: ids holds {low if low < 0 else high}, but the model knows {self.vocabulary} ids; pass "
                    "the ids of `tokenize`."
                )
            ends = torch.ones(len(ids), dtype=torch.bool) if self.end is None else (ids == self.end).any(1)
            if not bool(ends.all()):
                row = int(ends.int().argmin())
                raise ValueError(f"{who}: row {row} of ids lacks the end {self.end}; pass the ids of `tokenize`.")
        return self._features(ids.long())


class _Pooled(nn.Module):
    """A tower of Hugging Face, and the projection of what it pools."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.projection = projection

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.tower(x).pooler_output)


class _OpenClip(nn.Module):
    """A tower of open_clip, or what `CLIP.encode_text` needs; CoCa's towers also give tokens, which are left out."""

    def __init__(self, tower: Any, call: str = "forward") -> None:
        super().__init__()
        self.tower = tower
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        made = getattr(self.tower, self.call)(x)
        return made[0] if isinstance(made, tuple) else made


def load_hf_clip(path: str | os.PathLike[str], *, freeze: str = "none") -> ClipParts:
    """The towers of a CLIP or SigLIP that was saved by Hugging Face transformers.

    Nothing is downloaded, no code of the folder is run, and weights are read from safetensors, never from a pickle.
    Texts of a CLIP are padded to the longest, those of a SigLIP to the length that it was trained with. Pictures are
    normalised as the folder's preprocessor says, or as its kind of model does where the folder has none.

    Args:
        path: a folder with config.json, *.safetensors and the tokenizer's files, or one that holds such a folder.
        freeze: towers that stay as they are and compute as in evaluation: "none", "image", "text" or "both".

    Raises:
        FileNotFoundError: no such folder, or none with a model in safetensors.
        ValueError: another kind of model, a damaged folder, weights that do not fit config.json: the first is named.
        ImportError: transformers, or what the tokenizer needs, is not installed.
    """
    who = "load_hf_clip"
    _check.choice(who, "freeze", freeze, FREEZE)
    given = from_home(path)
    folder = find_language_model(given)
    if folder is None:
        kind = "holds no config.json with *.safetensors beside it" if given.is_dir() else "is no folder"
        raise FileNotFoundError(f"{who}: path is {shown(given)}, which {kind}; pass the folder of a model.")
    where = f"{who}: {shown(folder)}"
    family = _json(where, folder / "config.json").get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{where} is a model of the type {family!r}; pass a folder of the type clip or siglip.")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{where} holds no tokenizer ({', '.join(TOKENIZERS)}); fetch it again.")
    mean, std = _normalisation(where, folder, FAMILIES[family])
    tokenizer, model = _from_folder(where, folder)
    image, text, clip = model.config.vision_config, model.config.text_config, family == "clip"
    ids, length, end = int(text.vocab_size), int(text.max_position_embeddings), int(tokenizer.eos_token_id)
    if len(tokenizer) > ids:
        raise ValueError(f"{where} has a tokenizer of {len(tokenizer)} ids and a model of {ids}; fetch it again.")
    # The id 2 of early folders is wrong; transformers takes the highest id of a text for its end then.
    if clip and text.eos_token_id not in (2, end):
        raise ValueError(
            f"{where} has a tokenizer that ends texts with {end}, but a model that looks for {text.eos_token_id}; "
            "fetch it again."
        )

    def tokenize(texts: list[str]) -> Tensor:
        padding = "longest" if clip else "max_length"
        texts = list(plain_texts("tokenize", texts))
        return tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")["input_ids"]

    return ClipParts(
        ClipImages(
            _Pooled(model.vision_model, model.visual_projection if clip else nn.Identity()),
            size=int(image.image_size),
            mean=mean,
            std=std,
            tune=freeze not in ("image", "both"),
        ),
        ClipTexts(
            _Pooled(model.text_model, model.text_projection if clip else nn.Identity()),
            vocabulary=ids,
            length=length,
            fixed=not clip,
            end=end if clip else None,
            tune=freeze not in ("text", "both"),
        ),
        tokenize,
        int(image.image_size),
        int(model.config.projection_dim if clip else image.hidden_size),
        float(model.logit_scale.detach().exp()),
        None if clip else float(model.logit_bias.detach()),
    )


def load_open_clip(
    name: str,
    checkpoint: str | os.PathLike[str],
    *,
    freeze: str = "none",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ClipParts:
    """The towers of a model of open_clip with weights from a local file.

    Nothing is downloaded, so a model whose text tower or tokenizer comes from a hub is refused: save it as a folder of
    Hugging Face for `load_hf_clip`, or, for the tokenizer alone, pass a folder by "local-dir:". The file is read as
    plain tensors, nothing in it is run.

    Args:
        name: one of open_clip.list_models(), such as "ViT-B-32", or, from open_clip 3 on, "local-dir:FOLDER" with an
            open_clip_config.json.
        checkpoint: .safetensors, .pt, .pth or .bin: a state dict, or what open_clip's training saves.
        freeze: as for `load_hf_clip`.
        mean, std: (3,) of the pictures; None for those that open_clip has for the model, CLIP's where it says nothing
            else. Tags of open_clip have their own: `open_clip.get_pretrained_cfg(name, tag)`.

    Raises:
        ValueError: an unknown name, a model that needs a download, a file that cannot be read, weights that do not fit:
            the first are named.
        ImportError: open_clip is not installed.
    """
    who = "load_open_clip"
    _check.choice(who, "freeze", freeze, FREEZE)
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that was built for another torch
        raise ImportError(
            f"{who} needs open_clip ({reason(error)}); pip install open_clip_torch, and a torchvision for this torch."
        ) from None
    mean = None if mean is None else _three(f"{who}: mean", mean)
    std = None if std is None else _three(f"{who}: std", std)
    config = _open_clip_config(who, open_clip, name)
    local = name.startswith("local-dir:")
    options = {"load_weights": False} if local else {}
    with _quiet():
        try:
            model = open_clip.create_model(name, **options)
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # configurations are free-form
            raise ValueError(
                f"{who}: {name!r} can't be built ({type(error).__name__}: {reason(error)}); pass another model."
            ) from None
    load_weights(who, model, Path(checkpoint), ())
    visual, whole = model.visual, not hasattr(model, "text")
    size = int(visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0])
    scale, bias = float(model.logit_scale.detach().exp()), getattr(model, "logit_bias", None)
    if bias is not None:
        bias = float(bias.detach())
    if whole:  # a CLIP is its own text tower: what is left of it without the other parameters
        del model.visual, model.logit_scale
        model.logit_bias = None

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer(list(plain_texts("tokenize", texts))).long()

    return ClipParts(
        ClipImages(
            _OpenClip(visual),
            size=size,
            mean=mean or _three(f"{who}: mean of {name!r}", visual.image_mean),
            std=std or _three(f"{who}: std of {name!r}", visual.image_std),
            tune=freeze not in ("image", "both"),
        ),
        ClipTexts(
            _OpenClip(model, "encode_text") if whole else _OpenClip(model.text),
            vocabulary=int(model.vocab_size if whole else model.text.vocab_size),
            length=int(tokenizer.context_length),
            fixed=True,
            end=None,
            tune=freeze not in ("text", "both"),
        ),
        tokenize,
        size,
        int(config["embed_dim"]),
        scale,
        bias,
    )


def _open_clip_config(who: str, open_clip: Any, name: object) -> Mapping[str, Any]:
    """The configuration of a model that can be built without a download."""
    if not isinstance(name, str):
        raise TypeError(f"{who}: name is {name!r}; pass the name of a model.")
    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not file.is_file():
            raise ValueError(f"{who}: name is {name!r}, but {shown(file)} is no file; pass a folder that has one.")
        content = _json(f"{who}: {shown(file)}", file)
        config = content.get("model_cfg", content)
    else:
        config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if not isinstance(config, dict) or not isinstance(config.get("text_cfg"), dict) or "embed_dim" not in config:
        hint = _check.did_you_mean(name, open_clip.list_models())
        raise ValueError(f"{who}: name is {name!r}; pass one of open_clip.list_models(){hint}.")
    text = config["text_cfg"]
    local = name.startswith("local-dir:")
    if text.get("hf_model_name") or (not local and (text.get("hf_tokenizer_name") or "siglip" in name.lower())):
        part = "text tower" if text.get("hf_model_name") else "tokenizer"
        raise ValueError(
            f"{who}: the {part} of {name!r} comes from a hub; save the model for transformers and pass its folder to "
            "load_hf_clip."
        )
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model starts at random, for which it would set up the root logger."""
    root, handler, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)


def _from_folder(where: str, folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model in float32, from files of the folder alone."""
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as verbosity
    except ImportError:
        raise ImportError(f"{where} needs transformers, which is missing; pip install transformers.") from None
    options = {"local_files_only": True, "trust_remote_code": False}
    bars, level = verbosity.is_progress_bar_enabled(), verbosity.get_verbosity()
    verbosity.disable_progress_bar()
    verbosity.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, loaded = AutoModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except ImportError as error:
        what = reason(error).partition(". ")[0]
        raise ImportError(
            f"{where} needs a library that is missing ({what}); install it, for a SigLIP by pip install sentencepiece "
            "protobuf."
        ) from None
    except Exception as error:  # damaged files of many formats may raise anything
        raise ValueError(
            f"{where} can't be loaded ({type(error).__name__}: {reason(error)}); fetch it again."
        ) from None
    finally:
        verbosity.set_verbosity(level)
        if bars:
            verbosity.enable_progress_bar()
    # (name, shape in the file, shape of the model), and the name alone from some versions of transformers
    others = [entry if isinstance(entry, str) else entry[0] for entry in loaded["mismatched_keys"]]
    for name, value in model.state_dict().items():
        if name in others:
            want = tuple(value.shape)
            raise ValueError(
                f"{where}: {name} has another shape in the weights than {want} by config.json; fetch it again."
            )
        if name in loaded["missing_keys"]:
            raise ValueError(f"{where}: {name} is not among the weights; fetch it again.")
    # indices, which old versions of transformers saved as well
    extra = sorted(name for name in loaded["unexpected_keys"] if not name.endswith("position_ids"))
    if extra:
        raise ValueError(f"{where}: {extra[0]} is among the weights but not in the model; fetch it again.")
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{where} has a tokenizer without padding or end of its own; fetch it again.")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, model.float()


def _normalisation(where: str, folder: Path, kind: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pictures, from the folder's files or from what its kind of model has."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        content = _json(where, folder / name)
        content = content.get("image_processor", content)
        if content.get("do_normalize") is False:
            return [0.0] * 3, [1.0] * 3
        values = {key: content.get(key) for key in ("image_mean", "image_std")}
        if any(value is not None for value in values.values()):
            mean, std = (_three(f"{where}: {key} of {name}", value) for key, value in values.items())
            return mean, std
    try:
        from transformers.utils import constants
    except ImportError:
        raise ImportError(f"{where} needs transformers, which is missing; pip install transformers.") from None
    return getattr(constants, f"{kind}_MEAN"), getattr(constants, f"{kind}_STD")


def _three(what: str, values: object) -> list[float]:
    """One finite number for each channel."""
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    if len(numbers) != 3 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{what} is {str(values)[:100]}; it has to be three numbers.")
    return [float(x) for x in numbers]


def _json(where: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {file.name} can't be read ({reason(error)}); fetch it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {file.name} holds a {type(content).__name__}, no object; fetch it again.")
    return content
