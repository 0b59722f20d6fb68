"""The few-labels task: images of which few are labelled, learnt from with the help of the others, or of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix import tables
from hardmix.data.views import Augment
from hardmix.metrics.classification import classification_metrics
from hardmix.semi import MixedPairs, SemiAlgorithm, SemiBatch
from hardmix.semi.co_tuning import CoTuning
from hardmix.semi.features import find_head
from hardmix.semi.net import SemiNet
from hardmix.semi.probabilities import class_mean
from hardmix.train.components import build_algorithm
from hardmix.train.errors import RunError
from hardmix.train.few_data import all_samples, hidden_truth, load_few, record
from hardmix.train.few_section import own_options
from hardmix.train.few_start import (
    saved_classes,
    source_classes,
    source_model,
    source_probs,
    source_relationship,
    start_backbone,
)
from hardmix.train.files import write_text
from hardmix.train.recipe import Recipe
from hardmix.train.schedule import Stage
from hardmix.train.seeds import derive, generator
from hardmix.train.tasks.classification import Classification

#: unlabelled samples that `hardmix run` judges pseudo-classes by at the end
JUDGED = 5000


class FewLabels(Classification):
    """Data, model and algorithm of one recipe, and what one step and one evaluation do with them.

    A step takes `train.batch_size` labelled samples and `semi.mu` times as many unlabelled ones; both sets are gone
    through in an order of their own for each epoch, as often as its steps need them. What is averaged (`train.ema`)
    and measured is the backbone.
    """

    metrics = ("top1", "top5", "nll", "ece", "pseudo_top1")

    def __init__(self, recipe: Recipe, *, pretrained: bool = True) -> None:
        """`pretrained=False` leaves out the weights to start from, for those that are loaded afterwards."""
        self.few, self.split = load_few(recipe)
        self.train_set, held = self.few.train, self.few.validation
        self.validation_set = self.train_set.subset(torch.arange(0)) if held is None else held
        #: the unlabelled samples' classes where these are known and not trained on, to judge pseudo-classes by; else -1
        self.truth = hidden_truth(self.few, self.split)
        self.judges = bool((self.truth >= 0).any())
        self.setup(recipe, self.few, pretrained=pretrained)
        backbone = self.network
        if recipe.tune.start and pretrained:
            start_backbone(backbone, recipe)
            # Not the stream of the model: a start of the same seed was trained with that very classifier.
            torch.manual_seed(derive(recipe.seed, "head"))
            find_head("tune.start", backbone).reset_parameters()
        pairs = None
        if self.policy is not None:
            semi = recipe.semi
            pairs = MixedPairs(
                self.policy,
                self.objective,
                weight=semi.pair_weight,
                ramp=semi.pair_ramp,
                share=semi.pair_share,
                confident=semi.pair_confident,
            )
            self.policy = None  # the algorithm's from here on
        torch.manual_seed(derive(recipe.seed, "algorithm"))
        classes = len(self.train_set.class_names)
        self.algorithm: SemiAlgorithm = build_algorithm(
            own_options(recipe.semi.algorithm),
            model=backbone,
            num_classes=classes,
            num_unlabelled=len(self.few.unlabelled),
            class_share=class_mean(self.train_set.labels, classes),
            pairs=pairs,
            steps=recipe.train.epochs * self._steps_per_epoch(),
            **(self._source(pretrained) if recipe.semi.algorithm.name == "co-tuning" else {}),
        )
        self.model = SemiNet(backbone, self.algorithm)
        self.strong = Augment(recipe.semi.strong)
        self.orders: tuple[Tensor, Tensor] | None = None

    def _source(self, pretrained: bool) -> dict[str, Tensor]:
        """The classifier of the start, and what it predicts of each class here; for weights that are loaded afterwards
        room alone."""
        classes = len(self.train_set.class_names)
        own = find_head("co-tuning", self.network)
        if not pretrained:
            count = source_classes(self.network, self.recipe)
            weight, bias = torch.zeros(count, own.in_features), torch.zeros(count)
            return {
                "source_weight": weight,
                "source_bias": bias,
                "relationship": torch.full((classes, count), 1.0 / count),
            }
        source = source_model(self.network, self.recipe, self.train_set.shape).eval()
        probs = source_probs(source, self.recipe, self.train_set)
        head = find_head("co-tuning", source)
        return {
            "source_weight": head.weight.detach(),
            "source_bias": head.bias.detach(),
            "relationship": source_relationship(self.recipe, probs, self.train_set),
        }

    def _steps_per_epoch(self) -> int:
        recipe = self.recipe
        if recipe.semi.steps_per_epoch:
            return recipe.semi.steps_per_epoch
        count = self._unlabelled_a_step()
        if not count:
            return max(1, len(self.train_set) // recipe.train.batch_size)
        return max(1, len(self.few.unlabelled) // (recipe.train.batch_size * count))

    def _unlabelled_a_step(self) -> int:
        """How many unlabelled samples there are for each labelled one of a step."""
        algorithm = tables.ALGORITHMS[self.recipe.semi.algorithm.name]
        wanted = bool(algorithm.views) and not (algorithm.only_for_pairs and self.recipe.policy is None)
        return self.recipe.semi.mu if wanted else 0

    def write_files(self, folder: Path) -> None:
        """Which samples are labelled, tested and so on, as `split.json`."""
        self.check_files(folder)
        write_text(folder / "split.json", self._record())

    def check_files(self, folder: Path) -> None:
        """That a run's samples are still those that it began with."""
        path = folder / "split.json"
        if path.is_file() and path.read_text("utf-8") != self._record():
            own = self.few.source if self.split is None else self.few.name
            raise RunError(
                f"{path} is another split than what {own} gives now, so what was trained on might be tested; "
                "restore the data, or train into another --out."
            )

    def make_room(self, folder: Path) -> None:
        """For the classifier of Co-Tuning's start, where that is gone, which alone says how many classes it has."""
        if isinstance(self.algorithm, CoTuning):
            count = saved_classes(folder)
            if count and count != self.algorithm.source.out_features:
                self.algorithm.make_room(count)

    def _record(self) -> str:
        return record(self.few, self.split)

    def rates(self) -> dict[nn.Parameter, float]:
        """The classifier's. What an algorithm learns besides, such as a projection, goes at the rate of the rest."""
        rate = self.recipe.semi.head_rate
        if rate == 1.0:
            return {}
        head = find_head("semi.head_rate", self.network)
        return dict.fromkeys(head.parameters(), rate)

    def stages(self) -> list[Stage]:
        train = self.recipe.train
        return [Stage(train.epochs, train.batch_size * self._steps_per_epoch(), train.lr)]

    def start_epoch(self, stage: int, epoch: int = 0) -> None:
        """Orders of the labelled and the unlabelled samples for one epoch."""
        named = (("labelled", len(self.train_set)), ("unlabelled", len(self.few.unlabelled)))
        seed = self.recipe.seed
        first, second = (torch.randperm(size, generator=generator(seed, name, epoch)) for name, size in named)
        self.orders = first, second

    def load(self, index: Tensor) -> tuple[Tensor, ...]:
        """The raw samples of these places of the epoch, on the CPU: labelled, their classes, unlabelled, their true
        classes where these are known (else -1), and their numbers."""
        assert self.orders is not None
        labelled, unlabelled = self.orders
        rows = labelled[index % len(labelled)]
        count = self._unlabelled_a_step()
        places = (index[:, None] * count + torch.arange(count)).flatten()
        others = unlabelled[places % len(unlabelled)] if count else unlabelled[:0]
        few, own = self.few.unlabelled, self.train_set
        return own.batch(rows), own.labels[rows], few.batch(others), self.truth[others], others

    def names(self, index: Tensor) -> list[str]:
        """What error messages call the labelled samples of these places of the epoch."""
        assert self.orders is not None
        rows = self.orders[0][index % len(self.orders[0])]
        return [self.train_set.sample_id(int(i)) for i in rows]

    def start_step(self, progress: float, shared: torch.Generator | None = None) -> None:
        """Called before each step with the finished share of the training."""
        self.algorithm.set_progress(progress)

    def end_step(self) -> None:
        """Called after each step of the optimizer."""
        self.algorithm.after_step(self.network)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one step on the model's device, and what to log, still on the device."""
        images, labels, others, truth, ids = batch
        x = self._view(self.augment, images, draws)
        kinds = {"weak": self.augment, "strong": self.strong}
        views = tuple(self._view(kinds[name], others, draws) for name in self.algorithm.views)
        twin = self._view(self.augment, images, draws) if self.algorithm.twins else None
        output = model(SemiBatch(x, labels, views, ids, twin), draws)
        logged = {"loss": output.loss.detach(), **{f"loss_{name}": value for name, value in output.parts.items()}}
        with torch.no_grad():
            logged["accuracy"] = (output.logits.argmax(1) == labels).to(torch.float32).mean()
            if len(output.pseudo):
                logged["trusted"] = output.weight.mean()
                if self.judges:
                    known, right = (truth >= 0).to(torch.float32), (output.pseudo == truth).to(torch.float32)
                    for name, values in (("known", known), ("right", right)):
                        logged[f"pseudo_{name}"] = values.mean()
                        logged[f"trusted_{name}"] = (values * output.weight).mean()
        return output.loss, logged

    def _view(self, augment: Augment, images: Tensor, draws: torch.Generator) -> Tensor:
        return self._layout(self.normalize(self._pixels(augment(images, generator=draws))))

    def test(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """All that summary.json says about the test split, and about the pseudo-classes at the end."""
        result = super().test(model, device)
        known = (self.truth >= 0).nonzero().flatten()
        if len(known):
            rows = known[torch.randperm(len(known), generator=generator(0, "judged"))[:JUDGED]]
            probs = self.predict(model, self.few.unlabelled.subset(rows), device)
            result["test"]["pseudo_top1"] = classification_metrics(probs, self.truth[rows])["top1"]
        return result

    def describe(self) -> dict[str, Any]:
        """The part of summary.json that is known before training."""
        found = super().describe()
        found["data"] |= {
            "labelled": len(self.train_set),
            "unlabelled": len(self.few.unlabelled),
            "train": all_samples(self.few, self.split),
            "overlap": list(self.few.overlap),
        }
        found["model"]["parameters"] = sum(p.numel() for p in self.network.parameters())
        return found | {
            "objective": " + ".join(self._names()),
            "start": self.recipe.tune.start,
        }

    def _names(self) -> list[str]:
        recipe = self.recipe
        return [recipe.semi.algorithm.name, *([recipe.objective.name] if recipe.policy else [])]
