"""The image-text task: pictures to their texts, from scratch or from the weights of another run."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardmix.data.characters import PADDING, CaptionTokenizer
from hardmix.data.numbers import as_floats
from hardmix.data.pair_sets import PAIR_SETS
from hardmix.data.prompts import prompts
from hardmix.data.views import Augment
from hardmix.distributed import gather_rows, my_part
from hardmix.losses import CoCaLoss, SoftCrossEntropyLoss, UnMixLoss
from hardmix.mixing import MixPlan
from hardmix.models.decoding import generate
from hardmix.models.lora import add_lora, hold_towers, without_lora
from hardmix.models.pair_build import build_pair_model
from hardmix.models.pair_captioner import PairCaptioner, PairNet
from hardmix.models.pair_model import PARTS as MODEL_PARTS
from hardmix.models.pair_model import PairModel, PairOutput
from hardmix.train.cached_gradients import cached_step
from hardmix.train.components import build_objective, build_pair_objective, build_policy, lipsum_options
from hardmix.train.files import write_bytes
from hardmix.train.pair_after import TPGM_BATCH, After, after_tuning
from hardmix.train.pair_captions import TokenizerRecord, Writer, run_tokenizer
from hardmix.train.pair_losses import SIGMOID, PairObjective
from hardmix.train.pair_measures import PairMeasures, class_rows
from hardmix.train.recipe import Recipe, start_recipe
from hardmix.train.schedule import Stage
from hardmix.train.sections import MEASURES
from hardmix.train.seeds import derive, generator
from hardmix.train.start import Kept, hashed, start_tensors
from hardmix.train.state import match_shapes
from hardmix.train.tasks.pair_data import PairData

#: bias of the logits of SigLIP at the start
SIGLIP_BIAS = -10.0
#: texts, the row of each one's own picture, and the rows that it finds
Found = tuple[list[str], Tensor, Tensor]
#: what `_measured_before` knows already
_BEFORE: dict[str, tuple[dict[str, Any], Found]] = {}
#: words of each of Lipsum-FT's texts
LIPSUM_WORDS = 8


class ImageText:
    """Data, model and objective of one recipe, and what one step and one evaluation do with them.

    With `tune.start` the model begins with the weights of that run, which are also measured ("before"). With
    `tune.head` it trains a classifier on the pictures' features, begun as the zero-shot one; the first
    `tune.probe_epochs` train nothing else.
    """

    metrics = (
        *("recall_5", "recall_1", "recall_10", "mrr", "median_rank", "ece"),
        *("shift_recall_5", "shift_recall_1", "shift_recall_10", "shift_mrr", "shift_median_rank", "shift_ece"),
        *("seen_shift_recall_1", "seen_shift_recall_5", "seen_shift_mrr"),
        *("zeroshot", "zeroshot_ece", "shift_zeroshot", "shift_zeroshot_ece"),
        *("fewshot_1", "fewshot_4", "fewshot_16", "shift_fewshot_1", "shift_fewshot_4", "shift_fewshot_16"),
        *("arithmetic", "alignment", "uniformity", "gap"),
        *("caption_exact", "caption_edit_distance", "caption_bleu_4", "caption_cider"),
        *("shift_caption_exact", "shift_caption_edit_distance", "shift_caption_bleu_4", "shift_caption_cider"),
    )
    lower_is_better = (
        *("median_rank", "ece", "shift_median_rank", "shift_ece", "zeroshot_ece", "shift_zeroshot_ece"),
        *("caption_edit_distance", "shift_caption_edit_distance"),
    )
    #: picks the best checkpoint; larger is better
    score = "mrr"
    sign = 1.0

    @property
    def compares(self) -> bool:
        """Whether the loss compares the samples of a batch, so that it is not the mean of the losses of its parts."""
        return not self.recipe.tune.head

    def __init__(self, recipe: Recipe, *, pretrained: bool = True) -> None:
        """`pretrained=False` leaves out the weights to start from, for those that are loaded afterwards."""
        self.recipe = recipe
        tune = recipe.tune
        self.data = PairData(recipe.data, recipe.seed, tune.classes)
        self._check_data()
        if pretrained and PAIR_SETS[recipe.data.name].yours and recipe.train.epochs:
            self._tell_equals()
        self.measured = self._measured()
        head = bool(tune.head)
        objective: nn.Module
        if head and recipe.objective.name != "lipsum":
            objective = build_objective(recipe.objective)
        else:
            objective = build_pair_objective(recipe.objective)
        settings: dict[str, Any] = {"learn_temperature": tune.learn_temperature}
        if tune.temperature:
            settings["temperature"] = tune.temperature
        options = dict(recipe.model.options)
        if isinstance(objective, SIGMOID) and recipe.model.name == "two-tower":
            options.setdefault("bias", SIGLIP_BIAS)
        #: the texts of each picture that training takes
        self.captions = self._captions()
        tokenizer: CaptionTokenizer | None = None
        if recipe.model.name == "coca":
            train = self.data.rows["train"].tolist()
            tokenizer = run_tokenizer(recipe, [text for row in train for text in self.captions[row]])
        self.tokenizer = tokenizer
        torch.manual_seed(derive(recipe.seed, "model"))
        built = build_pair_model(
            recipe.model.name,
            options,
            image_size=int(self.data.pairs.images.shape[-1]),
            pretrained=pretrained and not tune.start,
            classes=len(self.data.class_names) if head else 0,
            tokenizer=tokenizer,
            **settings,
        )
        self.model: PairNet = built.model
        if recipe.data.augment and not built.pictures:
            raise ValueError(
                "data.augment draws views of pictures, but the image tower is frozen and its features are computed "
                "once; set data.augment=[], or tune the tower."
            )
        #: the memory format of the filters
        self.layout = torch.channels_last if built.pictures else None
        #: a row of what the image tower takes for each picture of the set
        self.inputs = built.images(self.data.pairs.images)
        self.text_inputs = built.texts
        self.tokens, self.choices = self._training_texts()
        #: what training began with; of a run that goes on, or is measured, it comes with the checkpoint
        self.kept = Kept()
        seen = hashed(self.data.seen_texts(self.data.rows["train"]) if recipe.train.epochs else ())
        if tune.start and pretrained:
            seen = self._begin(seen)
        elif head and not tune.start:
            self._zero_shot_head()
        self.seen = Kept({"texts": seen})
        # What some stage trains is trained as far as optimizer and processes are concerned.
        last = len(self.stages()) - 1
        #: towers of which adapters are trained, not the weights
        self.adapted = [name for name in ("image", "text") if tune.lora and name not in self._held(last)]
        if self.adapted:
            torch.manual_seed(derive(recipe.seed, "lora"))
            add_lora(self.model, self.adapted, tune.lora)
        self._freeze(last)
        if self.model.logit_bias is not None and not isinstance(objective, SIGMOID):
            self.model.logit_bias.requires_grad_(False)  # processes would wait for its gradient
        self.policy = None if recipe.policy is None else build_policy(recipe.policy, None)
        self.objective = PairObjective(objective, self.model, self._lipsum())
        if recipe.train.epochs and not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("tune leaves nothing to train; take a part out of tune.freeze, or set train.epochs=0.")
        self.augment = Augment(recipe.data.augment)
        self.shared: Tensor | None = None
        #: rows of the set whose pictures the report shows
        self.shown = torch.arange(0)

    def _check_data(self) -> None:
        tune, recipe = self.recipe.tune, self.recipe
        if (tune.head or tune.texts == "classes") and not self.data.class_names:
            raise ValueError(
                f"tune wants classes, but {self.data.pairs.name} has none; leave tune.head and tune.texts as they are."
            )
        if len(self.data.rows["validation"]) < 2:
            wants = 'eval.checkpoint is "best"' if recipe.eval.checkpoint == "best" else ""
            if tune.after == "tpgm" or (tune.after != "nothing" and tune.amount < 0.0):
                wants = f"tune.after={tune.after} is fitted"
            if wants:
                raise ValueError(f"{wants} but nothing is kept for validation; set data.validation above 0.")

    def _tell_equals(self) -> None:
        """Warns where a picture has, on average, another one with the same captions in its batch: a wrong answer to a
        contrast, which is not to be seen from its loss."""
        counts = self.data.pairs.concept[self.data.rows["train"]].unique(return_counts=True)[1]
        size = int(counts.sum())
        others = min(self.recipe.train.batch_size, size) - 1
        equal = others * float((counts * (counts - 1)).sum()) / (size * (size - 1))
        if equal >= 1.0:
            warnings.warn(
                f"data: of the {others} other pictures of a batch {equal:.1f} on average have the same captions, and "
                "training takes them for wrong answers; tell them apart by their captions, or set a smaller "
                "train.batch_size.",
                stacklevel=3,
            )

    def _measured(self) -> tuple[str, ...]:
        """The measures that are asked for and that there are for this set and model."""
        there = {
            "zeroshot": bool(self.data.class_names),
            "arithmetic": self.data.pairs.name == "emoji",
            "caption": self.recipe.model.name == "coca",
        }
        found = tuple(name for name in self.recipe.eval.parts or MEASURES if there.get(name, True))
        if not found:
            raise ValueError(
                f"eval.parts is {self.recipe.eval.parts}, of which {self.data.pairs.name} and model "
                f"{self.recipe.model.name} have none; take retrieval, for one."
            )
        return found

    def _captions(self) -> list[list[str]]:
        if self.recipe.tune.texts == "classes":
            assert self.data.labels is not None
            of_classes = [prompts(name) for name in self.data.class_names]
            return [of_classes[label] for label in self.data.labels.tolist()]
        keep = 1 if self.recipe.data.captions == "first" else None
        return [list(texts[:keep]) for texts in self.data.pairs.captions]

    def _training_texts(self) -> tuple[Tensor, Tensor]:
        """What the text tower takes for all texts to train on, and per picture of the set which of them are its own:
        (N, K) rows, the first one again where a picture has fewer than K."""
        known: dict[str, int] = {}
        rows = [[known.setdefault(text, len(known)) for text in texts] for texts in self.captions]
        most = max(map(len, rows))
        choices = torch.tensor([own + own[:1] * (most - len(own)) for own in rows])
        self.counts = torch.tensor([len(own) for own in rows])
        return self.text_inputs(list(known)), choices

    @property
    def first_weights(self) -> dict[str, Tensor] | None:
        return self.kept.tensors or None

    def _begin(self, seen: Tensor) -> Tensor:
        """The weights of the start; a head and a bias that it lacks stay as they are made here.

        Returns:
            Hashes of the texts that it, and this run by then, have been trained on.
        """
        weights, before = start_tensors(self.recipe)
        if start_recipe(self.recipe.tune.start).data.name != self.recipe.data.name:
            before = before[:0]  # another set's pictures, whatever their texts
        self._check_unseen(before)
        own = self.model.state_dict()
        fresh = [name for name in own if name not in weights and name.startswith(("head.", "logit_bias"))]
        weights = {name: value for name, value in weights.items() if not name.startswith("head.") or name in own}
        if self.model.logit_bias is None:
            weights.pop("logit_bias", None)
        match_shapes("tune.start", self.model, weights | {name: own[name] for name in fresh})
        if self.recipe.tune.temperature:
            weights |= {"logit_scale": torch.tensor(-math.log(self.recipe.tune.temperature))}
        self.kept = Kept(weights)
        self.model.load_state_dict({**own, **weights})
        if self.recipe.tune.head and "head.weight" in fresh:
            self._zero_shot_head()
        return torch.cat([seen, before]).unique()

    def _check_unseen(self, before: Tensor) -> None:
        """That nothing is tested which the start was trained on."""
        test = self.data.seen_texts(self.data.rows["test"]) - self.data.seen_texts(self.data.rows["train"])
        known = int(torch.isin(hashed(test), before).sum())
        if known:
            raise ValueError(
                f"tune.start is {self.recipe.tune.start}, which was trained on {known:,} of the {len(test):,} texts "
                f"that {self.data.pairs.name} is tested on here; give both the same data.test and pictures, or train "
                "the start again."
            )

    @torch.no_grad()
    def _zero_shot_head(self) -> None:
        """The head starts as the prompts of the classes have it."""
        assert self.model.head is not None
        self.model.eval()
        rows = class_rows(lambda texts: self._text_features(self.model, texts, torch.device("cpu")), self._prompts())
        self.model.head.weight.copy_(rows)
        self.model.head.bias.zero_()

    def _prompts(self) -> list[list[str]]:
        return [prompts(name) for name in self.data.class_names]

    def _lipsum(self) -> tuple[nn.Module, float, Tensor] | None:
        """Cross entropy, weight, and inputs of the text tower without a meaning: words of the set in random order."""
        if self.recipe.objective.name != "lipsum":
            return None
        weight, count = lipsum_options(self.recipe.objective)
        words = sorted(
            {word for row in self.data.rows["train"].tolist() for word in self.data.pairs.captions[row][0].split()}
        )
        draws = generator(self.recipe.seed, "lipsum")
        drawn = torch.randint(len(words), (count, LIPSUM_WORDS), generator=draws)
        texts = [" ".join(words[number] for number in row) for row in drawn.tolist()]
        return SoftCrossEntropyLoss(), weight, self.text_inputs(texts)

    def _held(self, stage: int) -> tuple[str, ...]:
        """Parts that a stage holds as they are."""
        tune = self.recipe.tune
        if tune.head:
            probing = stage == 0 and tune.probe_epochs > 0
            held = MODEL_PARTS if probing else ("text", "text_projection")
            return tuple(dict.fromkeys((*held, *tune.freeze)))
        return tuple(tune.freeze)

    def _freeze(self, stage: int) -> None:
        self.model.freeze(self._held(stage))
        hold_towers(self.model, self.adapted)

    def stages(self) -> list[Stage]:
        train, first = self.recipe.train, self.recipe.tune.probe_epochs
        samples = len(self.data.rows["train"])
        epochs = [first, train.epochs - first] if first else [train.epochs]
        return [Stage(count, samples, train.lr) for count in epochs if count] or [Stage(0, samples, train.lr)]

    def start_epoch(self, stage: int, epoch: int = 0) -> None:
        """Called before each epoch."""
        self._freeze(stage)
        self.objective.set_epoch(epoch)
        if self.objective.lipsum is not None and self.objective.reference is None:
            reference = self._before(self.model)
            assert reference is not None
            self.objective.refer_to(reference.to(self.model.logit_scale.device))

    def end_epoch(self, model: nn.Module, device: torch.device) -> None:
        """Called after each epoch; nothing is tracked."""

    def to(self, device: torch.device) -> ImageText:
        """Move all that a step or an evaluation computes with, and return itself."""
        self.model.to(device)
        self.objective.to(device)
        self.tokens = self.tokens.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """What is trained or tracked besides the model, by the name it has in a checkpoint."""
        tracked: dict[str, nn.Module] = {"objective": self.objective, "start": self.kept, "seen": self.seen}
        if self.tokenizer is not None:
            tracked["tokenizer"] = TokenizerRecord(self.tokenizer)
        return tracked if self.policy is None else tracked | {"policy": self.policy}

    def load(self, index: Tensor) -> tuple[Tensor, ...]:
        """The raw batch of these training samples, on the CPU: inputs of the image tower, texts, and classes."""
        rows = self.data.rows["train"][index]
        labels = torch.zeros(len(rows), dtype=torch.long) if self.data.labels is None else self.data.labels[rows]
        return self.inputs[rows], self.choices[rows], self.counts[rows], labels

    def names(self, index: Tensor) -> list[str]:
        """What error messages call these training samples."""
        return self.data.names(self.data.rows["train"][index])

    def start_step(self, progress: float, shared: torch.Generator | None = None) -> None:
        """Called before each step with the finished share of the training, and draws that all ranks have alike."""
        if progress > 0.0:  # which also a resumed run knows
            self.objective.follow(self.model)
        self.shared = None if shared is None else shared.get_state()
        if self.policy is not None:
            self.policy.set_progress(progress)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch on the model's device, and what to log, still on the device."""
        if self.recipe.tune.head:
            x = self._views(batch[0], draws)
            found = model(x, classify=True)
            loss = self.objective.of_head(found, x, batch[3])
            accuracy = (found.logits.detach().argmax(1) == batch[3]).float().mean()
            return loss, {"loss": loss.detach(), "accuracy": accuracy}
        inputs, plan = self._inputs(batch, draws)
        loss, value = self._of_pairs(self._encoder(model)(*inputs), inputs, plan)
        return loss, {"loss": value}

    def loss_in_parts(
        self,
        model: nn.Module,
        batch: tuple[Tensor, ...],
        draws: torch.Generator,
        parts: int,
        scaled: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` of the whole batch and its backward pass, of `scaled` loss, with the memory of one of its parts."""
        inputs, plan = self._inputs(batch, draws)
        values: list[Tensor] = []

        def whole(*found: Tensor) -> Tensor:
            loss, value = self._of_pairs(found, inputs, plan)
            values.append(value)
            return scaled(loss)

        cached_step(self._encoder(model), inputs, whole, chunk=math.ceil(len(inputs[0]) / parts), model=model)
        return values[0], {"loss": values[0]}

    def _views(self, images: Tensor, draws: torch.Generator) -> Tensor:
        return self._ready(as_floats(self.augment(images, generator=draws) if self.augment.names else images))

    def _inputs(self, batch: tuple[Tensor, ...], draws: torch.Generator) -> tuple[tuple[Tensor, ...], MixPlan | None]:
        """Pictures, texts and, where a loss has both, mixed pictures; and how a policy has mixed them."""
        images, choices, counts, _ = batch
        x = self._views(images, draws)
        pick = (torch.rand(len(counts), generator=draws).to(counts.device) * counts).long()
        texts = self.tokens[choices.gather(1, pick[:, None])[:, 0]]
        if self.tokenizer is not None:  # what is padding in each of them costs time and changes nothing
            texts = texts[:, : int((texts != PADDING).sum(1).max())]
        if self.policy is None:
            return (x, texts), None
        plan = self.policy.plan(x, generator=draws)
        mixed = self._ready(plan.blend(x))
        return ((x, texts, mixed) if self._keeps_both else (mixed, texts)), plan

    @property
    def _keeps_both(self) -> bool:
        return isinstance(self.objective.objective, UnMixLoss)

    def _encoder(self, model: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
        """(pictures, texts, mixed pictures) -> their features, the scale, and logits of captions if there are; mixed
        ones in one pass with the others, since several processes allow for one pass a step."""

        def encode(x: Tensor, texts: Tensor, *mixed: Tensor) -> tuple[Tensor, ...]:
            found = model(torch.cat([x, *mixed]), texts)
            captions = () if found.logits is None else (found.logits,)
            return (*found.image.split(len(x)), found.text, found.scale, *captions)

        return encode

    def _of_pairs(
        self, found: tuple[Tensor, ...], inputs: tuple[Tensor, ...], plan: MixPlan | None
    ) -> tuple[Tensor, Tensor]:
        """What to go back from, with this process's part of the gradient; and the loss of the whole batch."""
        logits: Tensor | None = None
        if isinstance(self.objective.objective, CoCaLoss):
            *found, logits = found  # type: ignore[assignment]
        images, *mixed, texts, scale = found
        loss = self.objective.of_pairs(
            PairOutput(images, texts, scale, logits),
            self.model.logit_bias,
            shared=self._shared_draws(),
            inputs=(inputs[0], inputs[1]),
            plan=plan,
            mixed=mixed[0] if mixed else None,
            model=self.model,
        )
        return loss * self.objective.share(len(images)), loss.detach()

    def _shared_draws(self) -> torch.Generator | None:
        """The step's draws, from their start: all parts of a step have the same."""
        if self.shared is None:
            return None
        draws = torch.Generator()
        draws.set_state(self.shared)
        return draws

    def _ready(self, x: Tensor) -> Tensor:
        if self.layout is not None and self.recipe.train.channels_last:
            return x.contiguous(memory_format=self.layout)
        return x

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Recalls on the validation split; empty without one."""
        return self.measures(_pair_model(model), device).validate()

    def measures(self, model: PairNet, device: torch.device, shift: float = 0.0) -> PairMeasures:
        """Of a model with these weights."""
        model = without_lora(model)

        def texts(of: list[str]) -> Tensor:
            return self._text_features(model, of, device)

        rows: Tensor | None = None
        if self.data.class_names and model.head is not None:
            rows = model.head.weight.detach().float().cpu()
        elif self.data.class_names:
            rows = class_rows(texts, self._prompts())
        return PairMeasures(
            self.data,
            lambda chosen: self._image_features(model, chosen, device),
            texts,
            scale=float(model.scale.detach()),
            class_rows=rows,
            shift=shift,
            writer=self._writer(model),
        )

    def _writer(self, model: PairNet) -> Writer | None:
        if not isinstance(model, PairCaptioner):
            return None

        def write(rows: Tensor, beams: int) -> list[str]:
            pictures = self._ready(as_floats(self.inputs[rows]))
            return generate(model, pictures, model.tokenizer, beams=beams)

        def right(rows: Tensor) -> list[list[str]]:
            return [[model.tokenizer.plain(text) for text in self.captions[row]] for row in rows.tolist()]

        return Writer(write, right, model.tokenizer.unit)

    @torch.no_grad()
    def _image_features(self, model: PairNet, rows: Tensor, device: torch.device) -> Tensor:
        """(n, D) on the CPU; each rank computes its part."""
        parts = [torch.empty(0, model.features)]
        for piece in my_part(rows).split(self.recipe.eval.batch_size):
            found = model(self._ready(as_floats(self.inputs[piece].to(device))))
            parts.append(found.image.float().cpu())
        return gather_rows(torch.cat(parts))

    @torch.no_grad()
    def _text_features(self, model: PairNet, texts: list[str], device: torch.device) -> Tensor:
        """(n, D) on the CPU."""
        tokens = self.text_inputs(texts)
        pieces = tokens.split(self.recipe.eval.batch_size)
        return torch.cat([model(texts=piece.to(device)).text.float().cpu() for piece in pieces])

    def test(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """All that summary.json says about the test split: of the tuned model, and of the one it began as."""
        after = self.after(_pair_model(model), device)
        measures = self.measures(after.model, device, after.shift)
        result, shown = measures.test(self.measured), [measures.examples()]
        if after.chosen:
            result["chosen"] = after.chosen
        if (before := self._before(_pair_model(model))) is not None:
            found, examples = self._measured_before(before, device)
            result["before"] = found["test"]
            if "sphere" in found:
                result["sphere_before"] = found["sphere"]
            shown.append(examples)
        captions = result["captions"]["examples"] if "captions" in result else []
        result["examples"] = self._examples(shown, captions)
        return result

    def _measured_before(self, before: PairNet, device: torch.device) -> tuple[dict[str, Any], Found]:
        """Measures and examples of the weights that training began with, shared by the runs of a comparison."""
        recipe = self.recipe
        key = hashlib.sha256(b"".join(x.numpy().tobytes() for x in self.kept.tensors.values())).hexdigest()
        key += repr((recipe.data, recipe.model, recipe.tune.classes))
        key += repr((self.measured, str(device), recipe.seed if recipe.data.train_samples else 0))
        if key not in _BEFORE:
            measures = self.measures(before, device)
            _BEFORE[key] = measures.test(self.measured), measures.examples()
        return _BEFORE[key]

    def _examples(self, shown: list[Found], captions: list[dict[str, Any]]) -> dict[str, Any]:
        """Texts with their own picture and those that they find, as places among the pictures of the gallery, which
        captions get too in the place of their rows of the set."""
        rows = [torch.tensor([line["row"] for line in captions], dtype=torch.long), shown[0][1]]
        rows += [found.flatten() for _, _, found in shown]
        self.shown, place = torch.cat(rows).unique(return_inverse=True)
        of_captions, right, *found = place.split([len(part) for part in rows])
        for line, row in zip(captions, of_captions.tolist(), strict=True):
            line["row"] = row
        columns = shown[0][2].shape[1]
        named = zip(("after", "before"), found, strict=False)
        # Other pictures with the same text are as right as the first one.
        concept = self.data.concept[self.shown]
        alike = [(concept == concept[own]).nonzero()[:, 0].tolist() for own in right]
        return {"texts": shown[0][0], "right": right.tolist(), "alike": alike} | {
            name: part.view(-1, columns).tolist() for name, part in named
        }

    def after(self, model: PairNet, device: torch.device) -> After:
        """The model to measure, once `tune.after` has been applied."""
        held = self.data.rows["validation"]

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            order = torch.randperm(len(held), generator=generator(self.recipe.seed, "tpgm"))
            for rows in held[order].split(TPGM_BATCH):
                texts = self.tokens[self.choices[rows, 0].to(device)]
                yield self._ready(as_floats(self.inputs[rows].to(device))), texts

        def score(candidate: PairNet, shift: float) -> float:
            return self.measures(candidate, device, shift).validate()[self.score]

        return after_tuning(self.recipe, without_lora(model), self.first_weights, score, pairs)

    def _before(self, model: PairNet) -> PairNet | None:
        """The model as it began; None from scratch."""
        if self.first_weights is None:
            return None
        before = copy.deepcopy(without_lora(model))
        before.head = None
        before.load_state_dict({**before.state_dict(), **self.first_weights})
        return before.eval()

    def describe(self) -> dict[str, Any]:
        """The part of summary.json that is known before training."""
        recipe, pairs = self.recipe, self.data.pairs
        assert pairs.split is not None
        shifted = [len(self.data.style_rows("test", style)) for style in self.data.shifted]
        return {
            "data": {
                "name": pairs.name,
                "kind": "pairs",
                **{split: len(rows) for split, rows in self.data.rows.items()},
                "shift": sum(shifted),
                "styles": list(pairs.style_names),
                "trained_styles": list(self.data.trained),
                "concepts": len(self.data.concept.unique()),
                "source": pairs.source,
                "license": pairs.license,
            },
            "model": {"name": recipe.model.name, "parameters": sum(p.numel() for p in self.model.parameters())},
            "policy": recipe.policy.name if recipe.policy else "none",
            "objective": " + ".join(
                [
                    recipe.objective.name if recipe.train.epochs else "none",
                    *([recipe.tune.after] if recipe.tune.after != "nothing" else []),
                ]
            ),
            "start": recipe.tune.start,
        }

    def write_gallery(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """The pictures of the examples that `test` has told of."""
        from safetensors.torch import save

        write_bytes(path, save({"pictures": self.data.pairs.images[self.shown].contiguous()}))


def _pair_model(model: nn.Module) -> PairNet:
    """The model inside an average of its weights."""
    inside = getattr(model, "module", model)
    assert isinstance(inside, (PairModel, PairCaptioner))
    return inside
