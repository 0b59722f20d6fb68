"""A pretrained language model from a local folder as an encoder of texts and of pairs of texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._files import from_home
from hardmix.data.decode import reason, shown
from hardmix.data.numbers import Texts
from hardmix.models.text import pair_features, text_ids


def find_language_model(folder: Path) -> Path | None:
    """The folder, at or below `folder`, with a model of Hugging Face and its weights as safetensors; the nearest."""
    found = [path.parent for path in folder.rglob("config.json") if any(path.parent.glob("*.safetensors"))]
    return min(found, key=lambda path: (len(path.parts), str(path)), default=None)


class LanguageModel(nn.Module):
    """An encoder of Hugging Face `transformers`, and the mean of its last hidden states over the words of a text.

        z = sum_t m_t h_t / sum_t m_t,   m_t = 1 for what is no padding

    That is the pooling of all-MiniLM-L6-v2 and its kind; unlike theirs, z is not scaled to length 1. Both texts of a
    pair go through the model in one pass, see `pair_features`. The model's own pooling layer, which nothing would
    train, is left out.

    Nothing is downloaded, no code of the folder is run, and weights are read from safetensors, never from a pickle.

    Args:
        path: a folder with config.json, *.safetensors and the files of the tokenizer, or one that holds such a folder.
        tune: train the model too. Otherwise it computes as in evaluation even after `train()`, without a gradient.
        pair: samples are pairs of texts, not single ones.
        max_length: pieces of words that are read of a text, the special ones included; what is longer loses its end.

    Shapes: ids (N, S, L) long from `tokenize` -> features (N, D) with D = the model's width, or four times that for
        pairs; `features` is D.
    Raises:
        FileNotFoundError: no such folder, or none with a model in safetensors.
        ValueError: a damaged folder, a model without encoder or padding, or a `max_length` beyond what it can read.
        ImportError: transformers is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, tune: bool = False, pair: bool = False, max_length: int = 128
    ) -> None:
        super().__init__()
        who = "LanguageModel"
        # the two special ones and one piece of a word
        self.max_length = _check.integer(who, "max_length", max_length, 3)
        given = from_home(path)
        folder = find_language_model(given)
        if folder is None:
            kind = "holds no config.json with *.safetensors beside it" if given.is_dir() else "is no folder"
            raise FileNotFoundError(f"{who}: path is {shown(given)}, which {kind}; pass the folder of a model.")
        where = f"{who}: {shown(folder)}"
        self.tokenizer, self.model = _load(where, folder)
        self.padding = int(self.tokenizer.pad_token_id)
        limits = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", max_length))
        if max_length > min(limits):
            raise ValueError(
                f"{where} reads {min(limits)} pieces of a text, but max_length is {max_length}; pass at most that."
            )
        self.tune = tune
        self.pair = pair
        self.width = int(self.model.config.hidden_size)
        self.features = self.width * (4 if pair else 1)
        self.model.requires_grad_(tune)
        self.train()

    def train(self, mode: bool = True) -> LanguageModel:
        super().train(mode)
        if not self.tune:
            self.model.eval()
        return self

    def tokenize(self, texts: Texts) -> Tensor:
        """(N, S, L) long ids of N tuples of S texts, padded on the right to the longest text."""
        size = 1 + self.pair
        wrong = next((row for row, sample in enumerate(texts) if len(sample) != size), None)
        if wrong is not None or len(texts) == 0:
            got = "no entries" if wrong is None else f"{len(texts[wrong])} texts in entry {wrong}"
            raise ValueError(f"LanguageModel: texts has {got}; pass tuples of {size}, see pair.")
        flat = [text for sample in texts for text in sample]
        ids = self.tokenizer(flat, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt")[
            "input_ids"
        ]
        return ids.view(len(texts), size, -1)

    def forward(self, ids: Tensor) -> Tensor:
        ids = text_ids("LanguageModel", ids, self.pair, self.model.get_input_embeddings().num_embeddings)
        rows = ids.flatten(0, 1)
        if rows.device.type == "cpu":  # a GPU would have to be waited for
            rows = self._cut(rows)
        return pair_features(self._means(rows).view(*ids.shape[:2], -1))

    def frozen_features(self, texts: Texts, *, batch: int = 64) -> Tensor:
        """(N, D) float32 features of all texts on the CPU, what `forward` gives of `tokenize(texts)`.

        A model that isn't tuned gives the same features in every epoch, so they are computed once here, texts of like
        length together, and a head or an `MLP` is trained on them as on the rows of a table.

        Args:
            batch: texts that go through the model at once.

        Raises:
            ValueError: the model is tuned, or there are no texts.
        """
        who = "LanguageModel.frozen_features"
        _check.integer(who, "batch", batch, 1)
        if self.tune:
            raise ValueError(f"{who}: the model is tuned, so its features change; train it on `tokenize(texts)`.")
        ids = self.tokenize(texts).flatten(0, 1)
        device = next(self.model.parameters()).device
        means = torch.empty(len(ids), self.width)
        for rows in (ids != self.padding).sum(1).argsort(stable=True).split(batch):
            means[rows] = self._means(self._cut(ids[rows]).to(device)).float().cpu()
        return pair_features(means.view(len(texts), -1, self.width))

    def _cut(self, rows: Tensor) -> Tensor:
        """Without the columns that are padding in every row, but for the first."""
        used = (rows != self.padding).any(0).nonzero()
        return rows[:, : int(used.max()) + 1 if len(used) else 1]

    def _means(self, rows: Tensor) -> Tensor:
        """(R, L) ids -> (R, width)."""
        mask = rows != self.padding
        # Attention to nothing is NaN in some models, so a text of padding alone is read as one piece of padding.
        mask[:, 0] |= ~mask.any(1)
        with torch.set_grad_enabled(self.tune and torch.is_grad_enabled()):
            hidden = self.model(input_ids=rows, attention_mask=mask.long()).last_hidden_state
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1)


def _load(where: str, folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model in float32, from files of the folder alone."""
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise ImportError(f"{where} needs transformers, which is missing; pip install transformers.") from None
    options = {"local_files_only": True, "trust_remote_code": False}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, loaded = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # damaged files of many formats may raise anything
        raise ValueError(
            f"{where} can't be loaded ({type(error).__name__}: {reason(error)}); fetch it again."
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    if hasattr(model, "pooler"):
        model.pooler = None
    lacking = sorted(name for name in loaded["missing_keys"] if "pooler." not in name)
    if lacking:
        raise ValueError(f"{where} lacks {len(lacking)} weights of its model ({lacking[0]}); fetch it again.")
    if model.config.is_encoder_decoder or not hasattr(model.config, "hidden_size"):
        raise ValueError(f"{where} is a {type(model).__name__}; pass an encoder such as BERT.")
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        raise ValueError(f"{where} has a tokenizer without padding of its own; pass an encoder such as BERT.")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, model.float()
