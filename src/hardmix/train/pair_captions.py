"""Captions in an image-text run: the tokenizer that its checkpoints keep, and how well the captions agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hardmix.data.characters import CaptionTokenizer
from hardmix.metrics.captions import caption_metrics
from hardmix.models.pair_captioner import caption_tokenizer
from hardmix.train.errors import CheckpointError
from hardmix.train.seeds import generator
from hardmix.train.start import start_folder
from hardmix.train.state import load_checkpoint

if TYPE_CHECKING:
    from hardmix.train.recipe import Recipe
    from hardmix.train.tasks.pair_data import PairData

#: pictures of each style that captions are written for, beams of the second search, and captions that are shown
PICTURES, BEAMS, SHOWN = 200, 4, 8
#: how captions are written: by the most probable next token, and by beams
SEARCHES = {"greedy": 1, "beam": BEAMS}
#: those of `caption_metrics` that a run is measured by
MEASURES = ("exact", "edit_distance", "bleu_4", "cider")


class TokenizerRecord(nn.Module):
    """A tokenizer as a tensor, which is saved and loaded with the weights of a run, that are of no use without."""

    record: Tensor

    def __init__(self, tokenizer: CaptionTokenizer) -> None:
        super().__init__()
        written = json.dumps(tokenizer.to_dict()).encode()
        self.register_buffer("record", torch.frombuffer(bytearray(written), dtype=torch.uint8))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Refuses another tokenizer: the model and the ids of all texts are made for this one."""
        if not torch.equal(state_dict["record"].cpu(), self.record.cpu()):
            raise CheckpointError(
                f"the checkpoint writes {len(read_record(state_dict))} tokens, and the captions of the data have "
                f"{len(read_record(self.state_dict()))} or others; give it the data that it was trained on."
            )
        return super().load_state_dict(state_dict, *args, **options)


def read_record(state_dict: Mapping[str, Tensor]) -> CaptionTokenizer:
    """The tokenizer of what a `TokenizerRecord` has saved."""
    return CaptionTokenizer.from_dict(json.loads(bytes(state_dict["record"].cpu().tolist())))


def run_tokenizer(recipe: Recipe, captions: list[str]) -> CaptionTokenizer:
    """That of the run that `tune.start` names, whose weights fit no other; else that of the training captions."""
    folder = start_folder(recipe)
    kept = {} if folder is None else load_checkpoint(folder / "checkpoints", "last").tensors
    return read_record(kept["tokenizer"]) if "tokenizer" in kept else caption_tokenizer(recipe.model.options, captions)


class Writer(NamedTuple):
    """A model that writes captions.

    Attributes:
        write: rows of the set and a number of beams, 1 for greedy search -> a caption for each row.
        right: each row's texts that the training takes: its captions, or the first one with data.captions = "first".
        unit: what captions are counted in, that of the tokenizer: "character" or "word".
    """

    write: Callable[[Tensor, int], list[str]]
    right: Callable[[Tensor], list[list[str]]]
    unit: str


def measure_captions(data: PairData, writer: Writer, test: dict[str, float]) -> dict[str, Any]:
    """Captions of pictures of the test and of the training split in each style, up to 200, always the same ones.

    Adds to `test` the means over the styles of training, by beam search: caption_exact, caption_edit_distance,
    caption_bleu_4 and caption_cider, see `caption_metrics`; with shift_ in front those over the other styles.

    Returns:
        dict with "beams"; "unit"; "lines", one for each part and style with the metrics of both searches; and
        "examples" in a style of training, each with the row of its picture, what was found, and what is right.
    """
    trained = data.concept[data.rows["train"]]
    lines: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for part, split in (("unseen", "test"), ("seen", "train")):
        for style in (*data.trained, *data.shifted) or ("",):
            rows = data.style_rows(split, style)
            if part == "seen":
                rows = rows[torch.isin(data.concept[rows], trained)]
            rows = rows[torch.randperm(len(rows), generator=generator(0, "captions"))[:PICTURES]]
            if not len(rows):
                continue
            right = writer.right(rows)
            found = {name: writer.write(rows, beams) for name, beams in SEARCHES.items()}
            line = {"part": part, "style": style, "shift": style in data.shifted, "pictures": len(rows)}
            lines.append(line | {name: _agreement(texts, right, writer.unit) for name, texts in found.items()})
            if not examples:
                shown = zip(rows.tolist(), found["beam"], right, strict=True)
                examples = [{"row": row, "found": text, "right": of[0]} for row, text, of in list(shown)[:SHOWN]]
    for prefix, shift in (("", False), ("shift_", True)):
        own = [line["beam"] for line in lines if line["part"] == "unseen" and line["shift"] == shift]
        if own:
            test |= {f"{prefix}caption_{key}": sum(found[key] for found in own) / len(own) for key in MEASURES}
    return {"beams": BEAMS, "unit": writer.unit, "lines": lines, "examples": examples}


def _agreement(found: list[str], right: list[list[str]], unit: str) -> dict[str, float]:
    measured = caption_metrics(found, right, unit=unit)
    return {key: measured["exact_match" if key == "exact" else key] for key in MEASURES}
