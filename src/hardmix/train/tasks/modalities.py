"""The modalities task: classes from pictures in several styles and a text, of which some are missing later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix.data.numbers import as_floats
from hardmix.data.views import Augment
from hardmix.distributed import mean_over_ranks, my_part
from hardmix.losses import GMCLoss, SoftCrossEntropyLoss
from hardmix.metrics.missing import evaluate_missing
from hardmix.models.multimodal import Multimodal
from hardmix.models.multimodal_build import TEXT, build_multimodal
from hardmix.train.components import build_modality_objective
from hardmix.train.recipe import Recipe
from hardmix.train.schedule import Stage
from hardmix.train.seeds import derive
from hardmix.train.tasks.pair_data import PairData

#: of the splits
SPLITS = ("train", "validation", "test")


class Modalities:
    """Data, model and objective of one recipe, and what one step and one evaluation do with them.

        loss = cross entropy of the joint's logits + the objective of latents and joint

    A sample is a concept, of which each trained style has a picture; its modalities are these pictures and its first
    text. Training sees complete samples. What is measured is the accuracy for each subset of the modalities.
    """

    metrics = ("mean_top1", "missing_0", "missing_1", "missing_2", "missing_3")
    lower_is_better: tuple[str, ...] = ()
    #: picks the best checkpoint; larger is better
    score = "mean_top1"
    sign = 1.0

    def __init__(self, recipe: Recipe, *, pretrained: bool = True) -> None:
        """`pretrained=False` leaves out weights to start from, for those that are loaded afterwards."""
        self.recipe = recipe
        self.data = PairData(recipe.data, recipe.seed, recipe.tune.classes)
        if not self.data.class_names or self.data.labels is None:
            raise ValueError(f"data: {self.data.pairs.name} has no classes to tell from its modalities; take emoji.")
        self.styles = self.data.trained or ("picture",)
        #: split -> (n, styles) rows of the set
        self.rows = {split: self._complete(split) for split in SPLITS}
        for split in ("train", "test"):
            if len(self.rows[split]) < 2:
                raise ValueError(
                    f"data: {self.data.pairs.name} is left with {len(self.rows[split])} concepts for {split} that have "
                    "a picture in each style; take fewer styles, or more concepts."
                )
        torch.manual_seed(derive(recipe.seed, "model"))
        built = build_multimodal(
            recipe.model.options,
            self.styles,
            num_classes=len(self.data.class_names),
            image_size=int(self.data.pairs.images.shape[-1]),
            pretrained=pretrained,
        )
        if recipe.data.augment and not built.pictures:
            raise ValueError(
                "data.augment draws views of pictures, but the image encoder is frozen and its features are computed "
                "once; set data.augment=[], or tune the encoder."
            )
        self.model = built.model
        self.layout = torch.channels_last if built.pictures else None
        #: split -> modality -> (n, ...) what its encoder takes
        self.inputs = {
            split: {name: built.prepare[name](self._raw(split, name)) for name in built.modalities} for split in SPLITS
        }
        self.labels = {split: self.data.labels[rows[:, 0]] for split, rows in self.rows.items()}
        self.modalities = built.modalities
        self.objective: nn.Module = build_modality_objective(recipe.objective)
        self.cross_entropy = SoftCrossEntropyLoss()
        self.augment = Augment(recipe.data.augment)

    def _complete(self, split: str) -> Tensor:
        """(n, styles) rows of the concepts of a split that have a picture in each style."""
        found = []
        for style in self.data.trained or ("",):
            rows = self.data.style_rows(split, style)
            found.append(dict(zip(reversed(self.data.concept[rows].tolist()), reversed(rows.tolist()), strict=True)))
        if split == "train" and self.recipe.data.train_samples:
            kept = set(self.data.concept[self.data.rows["train"]].tolist())
            found[0] = {number: row for number, row in found[0].items() if number in kept}
        both = [number for number in sorted(found[0]) if all(number in rows for rows in found)]
        return torch.tensor([[rows[number] for rows in found] for number in both], dtype=torch.long).view(
            -1, len(found)
        )

    def _raw(self, split: str, name: str) -> Any:
        """Pictures of one style, or texts."""
        rows = self.rows[split]
        if name == TEXT:
            return [self.data.pairs.captions[row][0] for row in rows[:, 0].tolist()]
        return self.data.pairs.images[rows[:, self.styles.index(name)]]

    def stages(self) -> list[Stage]:
        return [Stage(self.recipe.train.epochs, len(self.rows["train"]), self.recipe.train.lr)]

    def start_epoch(self, stage: int, epoch: int = 0) -> None:
        """Called before each epoch; there is one stage."""

    def end_epoch(self, model: nn.Module, device: torch.device) -> None:
        """Called after each epoch; nothing is tracked."""

    def to(self, device: torch.device) -> Modalities:
        """Move all that a step or an evaluation computes with, and return itself."""
        self.model.to(device)
        self.objective.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """What is trained or tracked besides the model: nothing."""
        return {}

    def load(self, index: Tensor) -> tuple[Tensor, ...]:
        """Classes of these training samples and their modalities, on the CPU."""
        return (self.labels["train"][index], *(self.inputs["train"][name][index] for name in self.modalities))

    def names(self, index: Tensor) -> list[str]:
        """What error messages call these training samples."""
        return self.data.names(self.rows["train"][index, 0])

    def start_step(self, progress: float, shared: torch.Generator | None = None) -> None:
        """Called before each step, with draws that all ranks have alike."""
        self.shared = shared

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch on the model's device, and what to log, still on the device."""
        labels, *inputs = batch
        named = dict(zip(self.modalities, inputs, strict=True))
        out: Multimodal = model({name: self._view(name, x, draws) for name, x in named.items()})
        loss = self.cross_entropy(out.logits, labels)
        logged = {"accuracy": (out.logits.argmax(1) == labels).to(torch.float32).mean()}
        if isinstance(self.objective, GMCLoss):
            assert out.joint is not None
            contrast = self.objective(list(out.latents.values()), out.joint, generator=self.shared)
            logged["contrast"] = contrast.detach()
            loss = loss + contrast
        return loss, {"loss": loss.detach(), **logged}

    def _view(self, name: str, x: Tensor, draws: torch.Generator) -> Tensor:
        if name != TEXT and self.augment.names:
            x = self.augment(x, generator=draws)
        return self._ready(name, x)

    def _ready(self, name: str, x: Tensor) -> Tensor:
        if name == TEXT:
            return x
        x = as_floats(x)
        if self.layout is not None and self.recipe.train.channels_last:
            return x.contiguous(memory_format=self.layout)
        return x

    def accuracy(self, model: nn.Module, split: str, device: torch.device) -> dict[str, float]:
        """Accuracy for each subset of the modalities; each process measures its part."""
        mine = my_part(torch.arange(len(self.labels[split])))
        inputs = {name: x[mine] for name, x in self.inputs[split].items()}

        def answer(batch: dict[str, Tensor | None]) -> Tensor:
            ready = {name: None if x is None else self._ready(name, x.to(device)) for name, x in batch.items()}
            return model(ready).logits

        found = evaluate_missing(answer, inputs, self.labels[split][mine], batch_size=self.recipe.eval.batch_size)
        share = len(mine) / len(self.labels[split])  # of unequal parts the mean is weighted
        means = mean_over_ranks({key: torch.tensor(value * share) for key, value in found.items()})
        ranks = mean_over_ranks({"part": torch.tensor(share)})["part"].item()
        return {key: value.item() / ranks for key, value in means.items()}

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics on the validation split; empty without one."""
        if not len(self.labels["validation"]):
            return {}
        return means(self.accuracy(model, "validation", device))

    def test(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """All that summary.json says about the test split."""
        found = self.accuracy(model, "test", device)
        counts = self.labels["test"].bincount()
        majority = counts.max().item() / len(self.labels["test"])
        return {"test": means(found), "missing": {"subsets": found, "majority": majority}}

    def describe(self) -> dict[str, Any]:
        """The part of summary.json that is known before training."""
        recipe, pairs = self.recipe, self.data.pairs
        return {
            "data": {
                "name": pairs.name,
                "kind": "pairs",
                **{split: len(rows) for split, rows in self.rows.items()},
                "modalities": list(self.modalities),
                "trained_styles": list(self.data.trained),
                "classes": list(self.data.class_names),
                "source": pairs.source,
                "license": pairs.license,
            },
            "model": {"name": recipe.model.name, "parameters": sum(p.numel() for p in self.model.parameters())},
            "policy": "none",
            "objective": recipe.objective.name,
        }

    def write_gallery(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """There are no pictures to show."""


def means(subsets: dict[str, float]) -> dict[str, float]:
    """The mean over all subsets, and those over the subsets in which so many modalities are missing."""
    most = max(name.count("+") for name in subsets)
    of_size = [[value for name, value in subsets.items() if name.count("+") == most - k] for k in range(most + 1)]
    every = sum(subsets.values()) / len(subsets)
    return {"mean_top1": every} | {f"missing_{k}": sum(found) / len(found) for k, found in enumerate(of_size)}
