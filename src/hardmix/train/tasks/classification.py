"""The classification task: images to classes, with a mixing policy and an objective that takes mixed targets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix.data.catalog import load_images
from hardmix.data.images import ImageData, ImageSet, check_finite
from hardmix.data.splits import rows_to_split, stratified_subset, train_validation_split
from hardmix.data.views import Augment, Normalize
from hardmix.distributed import gather_rows, my_part
from hardmix.metrics.classification import classification_metrics, mixed_accuracy, mixed_metrics, reliability
from hardmix.metrics.robustness import other_class_partner, plan_at
from hardmix.mixing import MixedTarget, MixPlan, Policy
from hardmix.models.build import build_model
from hardmix.models.on_pixels import OnPixels
from hardmix.train.components import build_objective, build_policy
from hardmix.train.errors import RunError
from hardmix.train.recipe import Recipe
from hardmix.train.schedule import Stage
from hardmix.train.seeds import derive, generator
from hardmix.train.subset import stratified_rows

#: Test images in the report's gallery.
GALLERY = 8


class Classification:
    """Data, model, policy and objective of one recipe, and what one step and one evaluation do with them."""

    #: what a comparison shows first, and which way is better
    metrics: tuple[str, ...] = ("top1", "top5", "nll", "ece", "mixup_both", "cutmix_both")
    lower_is_better = ("nll", "ece")
    #: picks the best checkpoint; larger is better
    score = "top1"
    sign = 1.0

    def __init__(self, recipe: Recipe, *, pretrained: bool = True) -> None:
        """`pretrained=False` leaves out the model's `checkpoint` option, for weights that are loaded afterwards."""
        data = load_images(
            recipe.data.name,
            recipe.data.path or None,
            image_size=recipe.data.image_size or None,
            on_error=recipe.data.on_error,
        )
        index = torch.arange(len(data.train))
        if recipe.data.train_samples:
            index = stratified_rows(recipe, data.train)
        pool = data.train.subset(index)
        if data.validation is not None:
            self.train_set, self.validation_set = pool, data.validation
        else:
            train, validation = torch.arange(len(pool)), torch.arange(0)
            if recipe.data.validation:
                train, validation = _cut_validation(recipe, pool)
            self.train_set, self.validation_set = pool.subset(train), pool.subset(validation)
        self.setup(recipe, data, pretrained=pretrained)

    def setup(self, recipe: Recipe, data: ImageData, *, pretrained: bool) -> None:
        """All that follows from the data and its splits."""
        self.test_set = data.test
        if data.skipped:
            warnings.warn(
                f"data: {len(data.skipped)} files of {data.name} are left out, since they can't be read (the first: "
                f"{data.skipped[0]:.200}); a run's summary.json names them all.",
                stacklevel=2,
            )
        if recipe.eval.checkpoint == "best" and len(self.validation_set) == 0:
            raise ValueError(
                'eval.checkpoint is "best" but nothing is kept for validation; set data.validation above 0.'
            )
        if len(self.test_set.labels.unique()) < 2:
            raise ValueError(
                f"data: the test split of {data.name} shows one class only; add images, of a folder without a "
                "test split 5 or more of each class."
            )
        self._hard_partner = other_class_partner(self.test_set.labels, generator=generator(0, "hard"))
        self.recipe = recipe
        self.data = data
        channels, height, _ = self.train_set.shape
        self.normalize = Normalize(data.mean, data.std)
        torch.manual_seed(derive(recipe.seed, "model"))
        self.model = build_model(
            recipe.model.name,
            num_classes=len(data.train.class_names),
            in_channels=channels,
            image_size=height,
            **{key: value for key, value in recipe.model.options.items() if pretrained or key != "checkpoint"},
        )
        #: what is averaged and measured
        self.network = self.model
        #: what policies that look at the model have of it
        self.on_pixels = OnPixels(self.model, self.normalize)
        policy = None if recipe.policy is None else build_policy(recipe.policy, self.on_pixels, self.train_set.shape)
        self.policy: Policy | None = policy
        self.objective = build_objective(recipe.objective)
        self.augment = Augment(recipe.data.augment)

    #: the memory format of its filters
    layout = torch.channels_last

    def stages(self) -> list[Stage]:
        return [Stage(self.recipe.train.epochs, len(self.train_set), self.recipe.train.lr)]

    def start_epoch(self, stage: int, epoch: int = 0) -> None:
        """Called before each epoch; there is one stage."""

    def end_epoch(self, model: nn.Module, device: torch.device) -> None:
        """Called after each epoch; nothing is tracked."""

    def to(self, device: torch.device) -> Classification:
        """Move all that a step or an evaluation computes with, and return itself."""
        for module in (self.model, self.objective, self.normalize, *self.modules().values()):
            module.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """What is trained or tracked besides the model, by the name it has in a checkpoint."""
        return {} if self.policy is None else {"policy": self.policy}

    def rates(self) -> dict[nn.Parameter, float]:
        """Factors on the learning rate of single parameters."""
        return {}

    def write_files(self, folder: Path) -> None:
        """What the run folder holds besides; nothing."""

    def make_room(self, folder: Path) -> None:
        """Called before what a run has saved in `folder` is loaded, on all processes: sizes that only it knows."""

    def check_files(self, folder: Path) -> None:
        """That a run's samples are still those that it began with; they follow from its recipe."""

    def load(self, index: Tensor) -> tuple[Tensor, ...]:
        """The raw batch of these training samples, on the CPU."""
        images = self.train_set.batch(index)
        if images.is_floating_point():
            check_finite("data", images, self.names(index))
        return images, self.train_set.labels[index]

    def names(self, index: Tensor) -> list[str]:
        """What error messages call these training samples."""
        return [self.train_set.sample_id(int(i)) for i in index]

    def start_step(self, progress: float, shared: torch.Generator | None = None) -> None:
        """Called before each step with the finished share of the training, and draws that all ranks have alike."""
        if self.policy is not None:
            self.policy.set_progress(progress)

    def end_step(self) -> None:
        """Called after each step of the optimizer."""
        if self.policy is not None:
            self.policy.after_step()

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch on the model's device, and what to log, still on the device."""
        images, labels = batch
        x = self._pixels(self.augment(images, generator=draws))
        target: MixedTarget | Tensor = labels
        if self.policy is not None:
            x, target = self.policy(x, labels, generator=draws)
        logits = model(self._layout(self.normalize(x)))
        if self.policy is not None and isinstance(target, MixedTarget):
            target = self.policy.relabel(logits, target)
        loss = self.objective(logits, target)
        own = None if self.policy is None else self.policy.loss(self.objective)
        if own is not None:
            loss = loss + own
        with torch.no_grad():
            if not isinstance(target, MixedTarget):
                target = MixedTarget(labels[:, None], torch.ones_like(labels[:, None], dtype=torch.float32))
            accuracy = mixed_accuracy(logits.detach(), target)
        return loss, {"loss": loss.detach(), "accuracy": accuracy}

    def predict(self, model: nn.Module, images: ImageSet, device: torch.device) -> Tensor:
        """(N, C) probabilities of a split, on the CPU, without augmentation; each rank computes its part."""
        parts = [torch.empty(0, len(images.class_names))]
        for index in my_part(torch.arange(len(images))).split(self.recipe.eval.batch_size):
            parts.append(self._probs(model, self._pixels(images.batch(index).to(device))))
        probs = gather_rows(torch.cat(parts))
        if broken := int((~probs.isfinite().all(1)).sum()):
            raise RunError(
                f"the model's output is not finite for {broken} of {len(images)} images that are measured; try a lower "
                "train.lr or train.clip_norm."
            )
        return probs

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics on the validation split, without one none, and the accuracy on `eval.probe` training images."""
        found: dict[str, float] = {}
        if len(self.validation_set):
            probs = self.predict(model, self.validation_set, device)
            found = classification_metrics(probs, self.validation_set.labels)
        if count := min(self.recipe.eval.probe, len(self.train_set)):
            # Neither mixed nor augmented, so that it can be compared with the validation split.
            probe = self.train_set
            if count < len(probe):
                probe = probe.subset(stratified_subset(probe.labels, count, seed=0))
            right = self.predict(model, probe, device).argmax(1) == probe.labels
            found["train_top1"] = float(right.to(torch.float64).mean())
        return found

    def test(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """All that summary.json says about the test split."""
        probs, labels = self.predict(model, self.test_set, device), self.test_set.labels
        result = classification_metrics(probs, labels)
        for kind in ("mixup", "cutmix"):
            mixed, pairs = self._hard_samples(model, kind, device)
            result |= {f"{kind}_{key}": value for key, value in mixed_metrics(mixed, pairs).items()}
        return {"test": result, "reliability": reliability(probs, labels)}

    def describe(self) -> dict[str, Any]:
        """The part of summary.json that is known before training."""
        recipe = self.recipe
        return {
            "data": {
                "name": self.data.name,
                "train": len(self.train_set),
                "validation": len(self.validation_set),
                "test": len(self.test_set),
                "skipped": list(self.data.skipped),
                "classes": list(self.train_set.class_names),
                "source": self.data.source,
                "license": self.data.license,
            },
            "model": {"name": recipe.model.name, "parameters": sum(p.numel() for p in self.model.parameters())},
            "policy": recipe.policy.name if recipe.policy else "none",
            "objective": recipe.objective.name,
        }

    def write_gallery(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """Mixed test images, their labels and what the model says: the same images for every recipe on this data."""
        from safetensors.torch import save

        from hardmix.train.files import write_bytes

        index = torch.randperm(len(self.test_set), generator=generator(0, "gallery"))[:GALLERY]
        own, other, plan = self._hard_batch("cutmix", index)
        mixed = plan.blend(own)
        mask = plan.mask
        assert mask is not None
        top = self._probs(model, mixed.to(device)).topk(min(3, len(self.test_set.class_names)), dim=1)
        tensors = {
            "own": (own * 255).round().to(torch.uint8),
            "partner": (other * 255).round().to(torch.uint8),
            "mixed": (mixed * 255).round().to(torch.uint8),
            "mask": mask,
            "labels": self._hard_classes()[index],
            "weights": torch.stack([plan.lam, 1 - plan.lam], 1),
            "top": top.indices,
            "prob": top.values,
        }
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def _hard_samples(self, model: nn.Module, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Probabilities of test images mixed half and half with one of another class, and their (N, 2) classes."""
        probs = [torch.empty(0, len(self.test_set.class_names))]
        for index in my_part(torch.arange(len(self.test_set))).split(self.recipe.eval.batch_size):
            own, _, plan = self._hard_batch(kind, index)
            probs.append(self._probs(model, plan.blend(own).to(device)))
        return gather_rows(torch.cat(probs)), self._hard_classes()

    def _hard_batch(self, kind: str, index: Tensor) -> tuple[Tensor, Tensor, MixPlan]:
        """(own pixels, partner pixels, plan at lambda = 1/2) of some test images: the same ones for every recipe."""
        own, other = (self._pixels(self.test_set.batch(rows)) for rows in (index, self._hard_partner[index]))
        place = torch.rand((len(self.test_set), 2), generator=generator(0, "hard-box"))[index]
        return own, other, plan_at(kind, 0.5, place, own.shape[2:], other=other)

    def _hard_classes(self) -> Tensor:
        """(N, 2) classes of each test image and of its partner."""
        labels = self.test_set.labels
        return torch.stack([labels, labels[self._hard_partner]], 1)

    @torch.no_grad()
    def _probs(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model(self._layout(self.normalize(pixels))).float().softmax(1).cpu()

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 to [0, 1]. Mixing happens here, before the normalisation, where any policy can work."""
        return images.to(torch.float32).div_(255.0) if images.dtype == torch.uint8 else images

    def _layout(self, x: Tensor) -> Tensor:
        if self.recipe.train.channels_last and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x


def _cut_validation(recipe: Recipe, pool: ImageSet) -> tuple[Tensor, Tensor]:
    """(training rows, validation rows) of the images that are there to train on."""
    share = recipe.data.validation
    try:
        return train_validation_split(pool.labels, share, seed=recipe.seed)
    except ValueError:
        classes = len(pool.labels.unique())
        raise ValueError(
            f"data: {recipe.data.name} has {len(pool)} training images of {classes} classes, of which no share of "
            f"data.validation={share:g} can be kept for validation; set data.validation=0, or have "
            f"{rows_to_split(classes, share)} or more training images of each class."
        ) from None
