"""What is tuned: the models, what is tried for each method, and what is not tried for any.

Every run of a model starts from the same weights, trained on Twemoji and their names, and is tuned on the Noto pictures
of the training emoji. Plain CLIP tries learning rates and weight decays; what it does best with, by the mean reciprocal
rank on validation emoji, all others take over. Each of them then tries as many settings of its own.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from hardmix.train.recipe import Recipe, check_recipe, load_recipe

#: order, views and choice of texts while settings are tried: no seed that is tested
TUNING_SEEDS = (1001, 1002)
SEEDS = 5
BASE = "clip"
LEARNING_RATES, WEIGHT_DECAYS = (3e-4, 1e-3, 3e-3), (0.05, 0.5)

#: method -> label of a setting -> what a recipe says for it
TRIED: dict[str, dict[str, dict[str, Any]]] = {
    "clip-fixed": {
        f"t{t:g}": {"tune": {"temperature": t, "learn_temperature": False}} for t in (0.01, 0.02, 0.04, 0.07, 0.15, 0.3)
    },
    "hcl": {
        f"b{b:g}-p{p:g}": {"objective": {"name": "hcl", "beta": b, "tau_plus": p}}
        for b, p in product((0.1, 0.3, 1.0), (0.0, 0.1))
    },
    "cyclip": {
        f"i{i:g}-c{c:g}": {"objective": {"name": "cyclip", "in_modal": i, "cross_modal": c}}
        for i, c in ((0.05, 0.05), (0.25, 0.25), (1.0, 1.0), (0.25, 0.0), (0.0, 0.25), (1.0, 0.0))
    },
    "m2-mix": {
        f"w{w:g}-t{t:g}": {"objective": {"name": "m2-mix", "weight": w, "temperature": t}}
        for w, t in product((0.01, 0.1, 1.0), (0.07, 0.2))
    },
    "m3-mix": {
        f"s{s:g}-w{w:g}": {
            "objective": {
                "name": "m3-mix",
                "image_weight": 0.05 * s,
                "text_weight": 0.05 * s,
                "joint_weight": 0.1 * s,
                "m2_weight": w,
            }
        }
        for s, w in product((0.3, 1.0, 3.0), (0.01, 0.1))
    },
}
TRIALS = len(LEARNING_RATES) * len(WEIGHT_DECAYS)
#: what needs no settings of its own beside those of plain CLIP: a share that the validation emoji choose
AFTER = {"wise-ft": {"after": "wise-ft"}, "embedding-shift": {"after": "embedding-shift"}}
#: the weights that every run starts from
ZERO_SHOT = "zero-shot"


class Plan(NamedTuple):
    """One model: the recipe of its start, and how it is tuned."""

    start: str
    epochs: int
    augment: tuple[str, ...]


PLANS = {
    "dual": Plan("emoji-dual-pretrain", 20, ()),
    "small": Plan("emoji-pretrain", 10, ("crop", "color")),
}


class Trials(NamedTuple):
    """The recipes of one model, from its plan; `styles` are folders of further styles to test on."""

    plan: Plan
    styles: dict[str, str]

    def base(self) -> list[Recipe]:
        settings = product(LEARNING_RATES, WEIGHT_DECAYS)
        return [self.recipe(f"{BASE}-lr{lr:g}-wd{wd:g}", {"lr": lr, "weight_decay": wd}) for lr, wd in settings]

    def others(self, train: dict[str, Any], method: str) -> list[Recipe]:
        """What is tried for a method, with the `lr` and `weight_decay` that plain CLIP does best with."""
        return [self.recipe(f"{method}-{label}", train, **parts) for label, parts in TRIED[method].items()]

    def untuned(self, train: dict[str, Any]) -> list[Recipe]:
        """The start, and plain CLIP with something done to it afterwards."""
        after = [self.recipe(name, train, tune=tune) for name, tune in AFTER.items()]
        return [self.recipe(ZERO_SHOT, {**train, "epochs": 0, "warmup_epochs": 0.0}), *after]

    def recipe(self, name: str, train: dict[str, Any], tune: dict[str, Any] | None = None, **parts: Any) -> Recipe:
        plan = self.plan
        shared = {"epochs": plan.epochs, "batch_size": 128, "optimizer": "adamw", "warmup_epochs": 1.0, "threads": 1}
        return check_recipe(
            {
                "name": name,
                "task": "image-text",
                "data": {"name": "emoji", "domain": "noto", "augment": list(plan.augment)},
                "model": load_recipe(plan.start).model.model_dump(),
                "tune": {"start": plan.start, **(tune or {})},
                "objective": {"name": "clip"},
                "train": {**shared, "checkpoint_every": plan.epochs, **train},
                "eval": {"every": plan.epochs, "parts": ["retrieval"]},
                **parts,
            },
            name,
        )

    def tested(self, recipe: Recipe, name: str) -> Recipe:
        """A recipe under the name of its method, with everything measured, in all styles."""
        data = recipe.data.model_copy(update={"styles": self.styles})
        evaluation = recipe.eval.model_copy(update={"parts": []})
        return recipe.model_copy(update={"name": name, "data": data, "eval": evaluation})
