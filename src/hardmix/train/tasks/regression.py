"""The regression task: samples of any kind to a number, directly, with a contrast beside it, or after one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix.data.kind_views import build_views
from hardmix.data.numbers import ChannelScale, Numbers, as_floats
from hardmix.data.tables import Standardize
from hardmix.distributed import gather_rows, gather_with_gradient, my_part
from hardmix.losses import ConRLoss, FeatureSmoothing, SupReMixLoss, lds_weights
from hardmix.metrics.label_errors import error_by_label, principal_components, shot_errors
from hardmix.metrics.regression import local_linearity, ordinality, regression_metrics
from hardmix.mixing import MixedTarget
from hardmix.models.encoders import build_encoder
from hardmix.models.number_net import NumberNet
from hardmix.tables import JOINT_CONTRASTS
from hardmix.train.components import build_contrast, build_objective, build_policy
from hardmix.train.recipe import Recipe
from hardmix.train.schedule import Stage
from hardmix.train.seeds import derive, generator
from hardmix.train.tasks.number_data import NumberData

#: Test samples in the report's plots of predictions and embeddings.
SHOWN = 500


class Regression:
    """Data, model, policy and objectives of one recipe, and what one step and one evaluation do with them.

    With a `contrast` section of E epochs, these train encoder and projector with its objective on views of each sample,
    of its own data set if it names one; the others train the head, on frozen features ("linear") or with the encoder
    ("finetune"). With 0 epochs the contrast stands beside the head's loss all along.
    """

    metrics = (
        *("mae", "rmse", "gm", "r2", "pearson", "spearman"),
        *("mae_many", "mae_medium", "mae_few", "ordinality", "local_linearity"),
    )
    lower_is_better = ("mae", "rmse", "gm", "mae_many", "mae_medium", "mae_few", "local_linearity")
    #: picks the best checkpoint; smaller is better
    score = "mae"
    sign = -1.0

    def __init__(self, recipe: Recipe, *, pretrained: bool = True) -> None:
        """`pretrained=False` leaves out the model's `checkpoint` option, for weights that are loaded afterwards."""
        self.recipe = recipe
        self.data = NumberData(recipe.data, recipe.seed)
        section = recipe.contrast
        other = None if section is None else section.data
        #: what the first stage trains on
        self.source = self.data if other is None else NumberData(other, recipe.seed)
        if self.source is not self.data:
            self.source.leave_out(self.data)
        if recipe.eval.checkpoint == "best" and len(self.data.rows["validation"]) == 0:
            raise ValueError(
                'eval.checkpoint is "best" but nothing is kept for validation; set data.validation above 0.'
            )
        torch.manual_seed(derive(recipe.seed, "model"))
        built = build_encoder(
            recipe.model.name,
            recipe.model.options,
            self.source.numbers,
            self.source.rows["train"],
            others=[] if other is None else [self.data.numbers],
            pretrained=pretrained,
        )
        self.inputs, self.source_inputs, self.prepare = self._prepared(built.inputs)
        smoothing = None
        train_labels = self.data.scale(self.data.labels("train"))
        if recipe.density.fds:
            low, high = (float(value) for value in train_labels.aminmax())
            smoothing = FeatureSmoothing(
                built.features,
                label_range=(low, high),
                bins=recipe.density.bins,
                kernel_size=recipe.density.kernel_size,
                sigma=recipe.density.sigma,
            )
        # A projector that nothing trains would stop several processes, which wait for its gradient.
        unused = section is None or section.objective.name in JOINT_CONTRASTS
        self.model = NumberNet(
            built.encoder,
            built.features,
            projector=None if unused or section is None else section.projector,
            projection=0 if section is None else section.projection,
            smoothing=smoothing,
        )
        self.policy = None if recipe.policy is None else build_policy(recipe.policy, self.model)
        self.objective = build_objective(recipe.objective, train_labels)
        # A noise that the objective learns is trained and saved with the model.
        if any(True for _ in self.objective.parameters()):
            self.model.objective = self.objective
        self.contrast = None
        self.levels = self.source.labels("train").unique()
        if section is not None:
            own = self.source.scale(self.source.labels("train"))
            self.contrast = build_contrast(section.objective, self._contrasted(own))
        self.weights = _weights_by_label(train_labels, recipe) if recipe.density.lds else None
        self.views = build_views(recipe.data.kind, recipe.data.augment)
        self.contrast_views = build_views(recipe.data.kind, [] if section is None else section.augment)
        self.shared: torch.Generator | None = None
        self.start_epoch(0)

    def _prepared(self, inputs: Any) -> tuple[Tensor, Tensor, nn.Module]:
        """The inputs of both stages, and what brings a batch of them to the encoder: fitted where the encoder is."""
        own = inputs(self.data.numbers)
        source = own if self.source is self.data else inputs(self.source.numbers)
        rows = self.source.rows["train"]
        _check_columns(self.data.numbers, self.source.numbers)
        if own.shape[1:] != source.shape[1:] and not own.dtype == torch.long:
            raise ValueError(
                f"data: a sample of {self.data.numbers.name} has shape {tuple(own.shape[1:])}, but one of "
                f"{self.source.numbers.name} {tuple(source.shape[1:])}; pre-train on samples of the same shape."
            )
        if own.dtype == torch.long:  # tokens
            return own, source, nn.Identity()
        if own.ndim == 2:  # once, in the precision of the file
            scale = Standardize.fit(source[rows])
            return scale(own).float(), scale(source).float(), nn.Identity()
        return own, source, ChannelScale.fit(source, rows)

    @property
    def layout(self) -> torch.memory_format | None:
        """The memory format of its filters, if it has any."""
        return {4: torch.channels_last, 5: torch.channels_last_3d}.get(self.inputs.ndim)

    def stages(self) -> list[Stage]:
        train, section = self.recipe.train, self.recipe.contrast
        count = len(self.data.rows["train"])
        if section is None or section.epochs == 0:
            return [Stage(train.epochs, count, train.lr)]
        first = Stage(section.epochs, len(self.source.rows["train"]), train.lr)
        return [first, Stage(train.epochs - section.epochs, count, section.head_lr)]

    def start_epoch(self, stage: int, epoch: int = 0) -> None:
        """Called before each epoch."""
        section = self.recipe.contrast
        self.contrasting = section is not None and section.epochs > 0 and stage == 0
        self.model.freeze(
            section is not None and section.epochs > 0 and not self.contrasting and section.probe == "linear"
        )

    def end_epoch(self, model: nn.Module, device: torch.device) -> None:
        """Called after each epoch: features are smoothed by what the encoder makes of the training set."""
        if self.model.smoothing is not None and not self.contrasting:
            features = self._outputs(model.eval(), "train", device, "features")
            labels = self.data.scale(self.data.labels("train"))
            self.model.smoothing.update(features.to(device), labels.to(device))

    def to(self, device: torch.device) -> Regression:
        """Move all that a step or an evaluation computes with, and return itself."""
        for module in (self.model, self.objective, self.policy, self.prepare):
            if module is not None:
                module.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """What is tracked besides the model, by the name it has in a checkpoint."""
        kept: dict[str, nn.Module] = {"labels": self.data.scale, "samples": self.data.samples}
        if self.source is not self.data:
            kept["pretraining"] = self.source.samples
        return kept if self.policy is None else kept | {"policy": self.policy}

    def load(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and standardised labels of these training rows of the present stage, on the CPU."""
        data, inputs = (self.source, self.source_inputs) if self.contrasting else (self.data, self.inputs)
        rows = data.rows["train"][index]
        return inputs[rows], data.scale(data.numbers.labels[rows])

    def names(self, index: Tensor) -> list[str]:
        """What error messages call these training rows."""
        data = self.source if self.contrasting else self.data
        return data.names(data.rows["train"][index])

    def start_step(self, progress: float, shared: torch.Generator | None = None) -> None:
        """Called before each step with the finished share of the training, and draws that all ranks have alike."""
        self.shared = shared
        if self.policy is not None:
            self.policy.set_progress(progress)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], draws: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch on the model's device, and what to log, still on the device."""
        x, y = batch
        section = self.recipe.contrast
        if self.contrasting:
            embeddings = model(self._contrast_inputs(x, draws), "embed")
            loss = self._contrast(embeddings, self._contrasted(y), None)
            return loss * self._share(y), {"contrast": loss.detach()}
        target: Any = y
        beside = section is not None and section.epochs == 0
        if section is not None and beside and section.views > 1:
            x, target = self._contrast_inputs(x, draws), y.repeat_interleave(section.views)
        else:
            x, target = self._mixed(self.views(x, generator=draws), y, draws)
            x = self._ready(x)
        if section is None or not beside:
            loss = self._head(model(x, labels=_blended(target)), target)
            return loss, {"loss": loss.detach()}
        predictions, features, embeddings = model(x, "all", _blended(target))
        loss = self._head(predictions, target)
        contrasted = features if section.objective.name in JOINT_CONTRASTS else embeddings
        labels = _blended(target).view(len(y), -1)[:, 0]
        contrast = self._contrast(contrasted, self._contrasted(labels), predictions)
        return loss + section.weight * contrast * self._share(y), {"loss": loss.detach(), "contrast": contrast.detach()}

    def _head(self, predictions: Tensor, target: Any) -> Tensor:
        if self.weights is None:
            return self.objective(predictions, target)
        return self.objective(predictions, target, weight=self.weights(target))

    def _mixed(self, x: Tensor, y: Tensor, draws: torch.Generator) -> tuple[Tensor, Any]:
        x = as_floats(x)
        return (x, y) if self.policy is None else self.policy(x, y, generator=draws)

    def _ready(self, x: Tensor) -> Tensor:
        """What the encoder takes. Mixing happens before: the scale of a channel makes no difference to it."""
        x = self.prepare(as_floats(x))
        if self.layout is not None and self.recipe.train.channels_last:
            return x.contiguous(memory_format=self.layout)
        return x

    def _contrast_inputs(self, x: Tensor, draws: torch.Generator) -> Tensor:
        """(N V, ...) views, those of a sample one after another."""
        section = self.recipe.contrast
        assert section is not None
        x = self.prepare(as_floats(self.contrast_views(x.repeat_interleave(section.views, 0), generator=draws)))
        if section.noise:
            x = x + section.noise * torch.randn(x.shape, generator=draws).to(x.device)
        if self.layout is not None and self.recipe.train.channels_last:
            return x.contiguous(memory_format=self.layout)
        return x

    def _share(self, y: Tensor) -> float:
        """One over this rank's share of the batch: the loop weighs losses by it, and the contrast is one of all."""
        return float(gather_rows(torch.tensor([len(y)])).sum()) / len(y)

    def _contrast(self, rows: Tensor, labels: Tensor, predictions: Tensor | None) -> Tensor:
        """`rows` (N V, D) as (N, V, D), or (N, D) for one view; labels (N,) in the unit of the settings.

        Every rank contrasts the samples of all, with the gradients of its own.
        """
        assert self.contrast is not None
        views = len(rows) // len(labels)
        rows, labels = gather_with_gradient(rows), gather_rows(labels)
        predictions = None if predictions is None else gather_with_gradient(predictions)
        embeddings = rows if views == 1 else rows.view(len(labels), views, -1)
        if isinstance(self.contrast, SupReMixLoss):
            return self.contrast(embeddings, labels, generator=self.shared)
        if isinstance(self.contrast, ConRLoss):
            assert predictions is not None
            # only differences count
            scaled = predictions * float(self.source.scale.std) if self._raw else predictions
            return self.contrast(embeddings, labels, scaled if views == 1 else scaled.view(len(labels), views))
        if self.recipe.contrast is not None and self.recipe.contrast.objective.name in JOINT_CONTRASTS:
            return self.contrast(rows, labels.repeat_interleave(views))
        return self.contrast(embeddings, labels)

    def _contrasted(self, y: Tensor) -> Tensor:
        """Standardised labels in the unit that the contrast's settings are in.

        Labels of training samples come back to the last digit: those that are 5 years apart are not within a window of
        5, and rounding would take every third such pair for one.
        """
        if not self._raw:
            return y
        raw, levels = self.source.scale.back(y.detach().cpu()), self.levels
        place = torch.searchsorted(levels, raw).clamp(1, len(levels) - 1)
        near = torch.where(raw - levels[place - 1] < levels[place] - raw, levels[place - 1], levels[place])
        raw = torch.where((near - raw).abs() <= 1e-5 * self.source.scale.std, near, raw)
        return raw.to(y.device, torch.float32 if y.device.type == "mps" else torch.float64)  # Apple's has no float64

    @property
    def _raw(self) -> bool:
        return self.recipe.contrast is not None and self.recipe.contrast.labels == "raw"

    def predict(self, model: nn.Module, split: str, device: torch.device) -> Tensor:
        """(N,) predictions of a split in the labels' unit, on the CPU; each rank computes its part."""
        return self.data.scale.back(self._outputs(model, split, device, "predict"))

    @torch.no_grad()
    def _outputs(self, model: nn.Module, split: str, device: torch.device, part: str) -> Tensor:
        rows = my_part(self.data.rows[split])
        pieces = rows.split(self.recipe.eval.batch_size)
        parts = [model(self._ready(self.inputs[piece].to(device)), part).float().cpu() for piece in pieces]
        return gather_rows(torch.cat(parts))

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics on the validation split; empty without one, and while there is no head to measure."""
        if self.contrasting or len(self.data.rows["validation"]) == 0:
            return {}
        return regression_metrics(self.predict(model, "validation", device), self.data.labels("validation"))

    def test(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """All that summary.json says about the test split."""
        labels, train_labels = self.data.labels("test"), self.data.labels("train")
        predictions = self.predict(model, "test", device)
        # Their directions: the contrasts compare cosines, and a length says nothing of the order.
        features = nn.functional.normalize(self._outputs(model, "test", device, "features"))
        result = regression_metrics(predictions, labels) | shot_errors(predictions, labels, train_labels)
        result["ordinality"] = ordinality(features, labels, generator=generator(0, "pairs"))
        result["local_linearity"] = local_linearity(features, labels)
        scores, explained = principal_components(features[:SHOWN])
        shown = labels[:SHOWN].tolist()
        return {
            "test": result,
            "scatter": {
                "label": shown,
                "prediction": predictions[:SHOWN].tolist(),
                "target": self.data.numbers.target,
            },
            "errors": error_by_label(predictions, labels, train_labels),
            "embedding": {
                "x": scores[:, 0].tolist(),
                "y": scores[:, 1].tolist(),
                "label": shown,
                "explained": explained.tolist(),
            },
        }

    def describe(self) -> dict[str, Any]:
        """The part of summary.json that is known before training."""
        recipe, numbers, section = self.recipe, self.data.numbers, self.recipe.contrast
        first = [] if section is None else [section.objective.name]
        head = recipe.objective.name
        if head == "regression":
            head = recipe.objective.options.get("kind", "l1")
        data: dict[str, Any] = {
            "name": numbers.name,
            "kind": numbers.kind,
            **{split: len(rows) for split, rows in self.data.rows.items()},
        }
        if numbers.feature_names:
            data["features"] = len(numbers.feature_names)
        data |= {"target": numbers.target, "source": numbers.source, "license": numbers.license}
        data["digest"] = self.data.samples.digest
        if self.source is not self.data:
            of_source = {"name": self.source.numbers.name, "train": len(self.source.rows["train"])}
            data["pretraining"] = {**of_source, "digest": self.source.samples.digest}
        return {
            "data": data,
            "model": {"name": recipe.model.name, "parameters": sum(p.numel() for p in self.model.parameters())},
            "policy": recipe.policy.name if recipe.policy else "none",
            "objective": " + ".join([*first, head]),
        }

    def write_gallery(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """Numbers make no gallery of mixed samples."""


def _check_columns(own: Numbers, source: Numbers) -> None:
    """An encoder knows columns by their place alone: those of one table have to be those of the other."""
    pairs = enumerate(zip(own.feature_names, source.feature_names, strict=False))
    other = next((place for place, (a, b) in pairs if a != b), None)
    if other is not None:
        raise ValueError(
            f"data: feature {other + 1} is {own.feature_names[other]!r:.60} in {own.source} but "
            f"{source.feature_names[other]!r:.60} in {source.source}; pre-train on a table with the same columns in "
            "the same order, and the same words in them."
        )


class _WeightsByLabel:
    """The weight of each training label; of a mixed one the mean of its parts'."""

    def __init__(self, labels: Tensor, weights: Tensor) -> None:
        self.labels, first = labels.sort()
        self.weights = weights[first]

    def __call__(self, target: Any) -> Tensor:
        labels = target.labels if isinstance(target, MixedTarget) else target
        place = torch.searchsorted(self.labels.to(labels.device), labels.contiguous())
        weights = self.weights.to(labels.device)[place]
        return (weights * target.weights).sum(1) if isinstance(target, MixedTarget) else weights


def _weights_by_label(labels: Tensor, recipe: Recipe) -> _WeightsByLabel:
    density = recipe.density
    weights = lds_weights(
        labels, bins=density.bins, kernel_size=density.kernel_size, sigma=density.sigma, scheme=density.scheme
    )
    return _WeightsByLabel(labels, weights)


def _blended(target: Any) -> Tensor:
    return target.mean() if isinstance(target, MixedTarget) else target
