"""The regression task on tables: rows of numbers to a number, directly or after contrastive pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix.data.tables import Standardize, load_table, split_rows
from hardmix.distributed import gather_rows, my_part
from hardmix.losses import SupReMixLoss
from hardmix.metrics.regression import local_linearity, ordinality, regression_metrics
from hardmix.models.mlp import TableNet
from hardmix.train.recipe import Recipe, build_contrast, build_objective, build_policy
from hardmix.train.seeds import derive, generator

#: Test rows in the report's plot of predictions against truth.
SHOWN = 500


class LabelScale(nn.Module):
    """Labels of the training split to mean 0 and standard deviation 1 and back; saved with the weights.

    It stays on the CPU, in float64: labels may be large and close, and not every device has that type.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", labels.double().mean())
        self.register_buffer("std", labels.double().std(correction=0))

    def forward(self, labels: Tensor) -> Tensor:
        return ((labels - self.mean) / self.std).float()

    def back(self, values: Tensor) -> Tensor:
        return values * self.std + self.mean


class Regression:
    """Data, model, policy and objectives of one recipe, and what one step and one evaluation do with them.

    With a `contrast` section the first epochs train encoder and projector with its objective on two noisy views of each
    row; the others train the head, on frozen features ("linear") or with the encoder ("finetune").
    """

    metrics = ("mae", "rmse", "gm", "r2", "pearson", "spearman", "ordinality", "local_linearity")
    lower_is_better = ("mae", "rmse", "gm", "local_linearity")
    #: picks the best checkpoint; smaller is better
    score = "mae"
    sign = -1.0

    def __init__(self, recipe: Recipe, *, pretrained: bool = True) -> None:
        data = recipe.data
        self.table = load_table(data.name, data.path or None, target=data.target, missing=data.missing)
        train, validation, test = split_rows(len(self.table.labels), data.test, data.validation, recipe.seed)
        if data.train_samples:
            chosen = torch.randperm(len(train), generator=generator(recipe.seed, "subset"))[: data.train_samples]
            train = train[chosen.sort().values]
        if recipe.eval.checkpoint == "best" and len(validation) == 0:
            raise ValueError(
                'eval.checkpoint is "best" but nothing is kept for validation; set data.validation above 0.'
            )
        self.rows = {"train": train, "validation": validation, "test": test}
        self.recipe = recipe
        self.features = Standardize.fit(self.table.features[train])(self.table.features).float()
        labels = self.table.labels[train]
        if float(labels.min()) == float(labels.max()):
            raise ValueError(f"data: every training row has the {self.table.target} {float(labels[0]):g}; take more.")
        self.scale = LabelScale(labels)
        torch.manual_seed(derive(recipe.seed, "model"))
        # A projector that nothing trains would stop several processes, which wait for its gradient.
        unused = {} if recipe.contrast is not None else {"projection": 0}
        self.model = TableNet(inputs=self.features.shape[1], **recipe.model.options | unused)
        self.policy = None if recipe.policy is None else build_policy(recipe.policy, self.model)
        self.objective = build_objective(recipe.objective)
        self.contrast = None if recipe.contrast is None else build_contrast(recipe.contrast.objective)
        if isinstance(self.contrast, SupReMixLoss) and self.contrast.label_scale.isnan():
            self.contrast.fit_labels(self._contrasted(self.scale(labels)))
        self.contrasting = self.contrast is not None

    @property
    def num_train(self) -> int:
        return len(self.rows["train"])

    def to(self, device: torch.device) -> Regression:
        """Move all that a step or an evaluation computes with, and return itself."""
        for module in (self.model, self.objective, self.policy):
            if module is not None:
                module.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """What is tracked besides the model, by the name it has in a checkpoint."""
        return {"labels": self.scale} | ({} if self.policy is None else {"policy": self.policy})

    def load(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The features and standardised labels of these training rows, on the CPU."""
        rows = self.rows["train"][index]
        return self.features[rows], self.scale(self.table.labels[rows])

    def names(self, index: Tensor) -> list[str]:
        """What error messages call these training rows."""
        return [f"row {int(row)}" for row in self.rows["train"][index]]

    def start_step(self, progress: float) -> None:
        """Called before each step with the finished share of the training."""
        section = self.recipe.contrast
        self.contrasting = section is not None and progress < section.epochs / self.recipe.train.epochs
        if self.policy is not None:
            self.policy.set_progress(progress)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], draws: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch on the model's device, and what to log, still on the device."""
        x, y = batch
        if self.contrasting:
            loss = self._contrast(model, x, y, draws)
            return loss, {"loss": loss.detach()}
        target: Any = y
        if self.policy is not None:
            x, target = self.policy(x, y, generator=draws)
        frozen = self.recipe.contrast is not None and self.recipe.contrast.probe == "linear"
        predictions = model(x, "probe" if frozen else "predict")
        loss = self.objective(predictions, target)
        return loss, {"loss": loss.detach()}

    def _contrast(self, model: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
        section = self.recipe.contrast
        assert section is not None
        assert self.contrast is not None
        noise = torch.randn((len(x), 2, x.shape[1]), generator=draws).to(x.device)
        embeddings = model((x[:, None] + section.noise * noise).flatten(0, 1), "embed").view(len(x), 2, -1)
        labels = self._contrasted(y)
        if isinstance(self.contrast, SupReMixLoss):
            return self.contrast(embeddings, labels, generator=draws)
        return self.contrast(embeddings, labels)

    def _contrasted(self, y: Tensor) -> Tensor:
        """Standardised labels in the unit that the contrast's settings are in; only differences count there."""
        section = self.recipe.contrast
        return y * float(self.scale.std) if section is not None and section.labels == "raw" else y

    def predict(self, model: nn.Module, split: str, device: torch.device) -> Tensor:
        """(N,) predictions of a split in the labels' unit, on the CPU; each rank computes its part."""
        return self.scale.back(self._outputs(model, split, device, "predict"))

    @torch.no_grad()
    def _outputs(self, model: nn.Module, split: str, device: torch.device, part: str) -> Tensor:
        rows = my_part(self.rows[split])
        parts = [model(self.features[piece].to(device), part).float().cpu() for piece in rows.split(4096)]
        return gather_rows(torch.cat(parts))

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics on the validation split; empty without one, and while there is no head to measure."""
        rows = self.rows["validation"]
        if self.contrasting or len(rows) == 0:
            return {}
        return regression_metrics(self.predict(model, "validation", device), self.table.labels[rows])

    def test(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """All that summary.json says about the test split."""
        labels = self.table.labels[self.rows["test"]]
        predictions = self.predict(model, "test", device)
        # Their directions: the contrasts compare cosines, and a length says nothing of the order.
        features = nn.functional.normalize(self._outputs(model, "test", device, "features"))
        result = regression_metrics(predictions, labels)
        result["ordinality"] = ordinality(features, labels, generator=generator(0, "pairs"))
        result["local_linearity"] = local_linearity(features, labels)
        scatter = {"label": labels[:SHOWN].tolist(), "prediction": predictions[:SHOWN].tolist()}
        return {"test": result, "scatter": {**scatter, "target": self.table.target}}

    def describe(self) -> dict[str, Any]:
        """The part of summary.json that is known before training."""
        recipe = self.recipe
        first = [] if recipe.contrast is None else [recipe.contrast.objective.name]
        return {
            "data": {
                "name": self.table.name,
                **{split: len(rows) for split, rows in self.rows.items()},
                "features": len(self.table.feature_names),
                "target": self.table.target,
                "source": self.table.source,
                "license": self.table.license,
            },
            "model": {"name": recipe.model.name, "parameters": sum(p.numel() for p in self.model.parameters())},
            "policy": recipe.policy.name if recipe.policy else "none",
            "objective": " + ".join([*first, recipe.objective.options.get("kind", recipe.objective.name)]),
        }

    def write_gallery(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """Rows of a table make no pictures."""
