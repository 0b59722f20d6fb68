"""What is trained: the data sets, what is tried for each method, and what is taken out of SupReMix.

The methods of a set share model, epochs, batches, seeds and rows. L1 tries learning rates and weight decays; what it
does best with, on validation rows, all others take over. Each of them then tries as many settings of its own.
Contrastive methods spend 60 % of the epochs on the encoder and the rest on the head, C-Mixup and the joint form all of
them on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

from hardmix.train.recipe import Recipe, check_recipe

#: rows, initial weights and order while settings are tried: no seed that is tested
TUNING_SEEDS = (1001, 1002)
BASE = "l1"
#: methods that are tuned after L1, each with `TRIALS` settings
TUNED = ("c-mixup", "supcon", "rank-n-contrast", "supremix", "supremix-joint")
TRIALS = 6

LEARNING_RATES, WEIGHT_DECAYS = (1e-3, 3e-3, 1e-2), (0.01, 0.1)
#: after pre-training: the head alone, with its own learning rate, or all weights, with that of L1
PROBES = ("linear", "finetune")
#: methods whose encoder is also tested as pre-training leaves it, under the head alone, on so many seeds
FROZEN, FROZEN_SEEDS = ("supcon", "rank-n-contrast", "supremix"), 5
#: in standard deviations of the target, as all that counts in labels
WINDOWS, WEIGHTS = (0.2, 0.5, 1.0), (0.1, 1.0)
BANDWIDTHS, ALPHAS = (0.1, 0.5, 1.0), (0.5, 2.0)
TOLERANCES = (0.1, 0.3, 1.0)
RNC_TEMPERATURES = (0.5, 1.0, 2.0)

#: what is changed in SupReMix at the settings that were chosen for it; nothing is tuned again
ABLATIONS: dict[str, dict[str, Any]] = {
    "mix-neg-only": {"mix_pos": False},
    "mix-pos-only": {"mix_neg": False},
    "no-mixtures": {"mix_pos": False, "mix_neg": False},
    "no-dm": {"weighting": "none"},
    "strong-dm": {"label_scale": 0.1},
    "not-normalised": {"normalize_mixtures": False},
    "detached": {"detach_mixtures": True},
}


class Plan(NamedTuple):
    """One data set: what a recipe says of it, and how often it is tested."""

    data: dict[str, Any]
    model: dict[str, Any]
    epochs: int
    first_stage: int
    seeds: int
    #: of what is contrasted: views, noise and temperature
    contrast: dict[str, Any]
    temperature: float = 0.5
    head_lr: float = 0.03
    #: C-Mixup, of what
    mixing: dict[str, Any] = {"name": "c-mixup"}


#: two views of a row differ in their noise; noise much larger than this hides what tells two spectra apart
ROWS, SPECTRA, SERIES = ({"views": 2, "noise": noise} for noise in (0.1, 0.01, 0.05))
#: a text is its own only view; many pairs have the same score
TEXTS = {"views": 1}
#: texts can be mixed inside the model alone
INSIDE = {"name": "manifold-mixup", "layers": ["encoder.layer"]}

IMAGES = {"views": 2, "augment": ["flip", "crop"]}
MOLECULES = {
    "name": "molecules",
    "domain": "uob",
    "samples": 1000,
    "image_size": 32,
    "validation": 0.2,
    "augment": ["flip"],
}

#: the order in which they are run
PLANS = {
    "diabetes": Plan({"name": "diabetes", "validation": 0.2}, {"name": "mlp"}, 100, 60, 10, ROWS),
    "sts-b-dir": Plan({"name": "sts-b-dir"}, {"name": "word-mean"}, 10, 6, 5, TEXTS, temperature=0.1, mixing=INSIDE),
    "meats": Plan({"name": "meats"}, {"name": "series-cnn"}, 100, 60, 10, SPECTRA),
    "concrete": Plan({"name": "concrete", "validation": 0.2}, {"name": "mlp"}, 60, 36, 10, ROWS),
    "airfoil": Plan({"name": "airfoil", "validation": 0.2}, {"name": "mlp"}, 60, 36, 10, ROWS),
    "household-power": Plan({"name": "household-power", "samples": 2000}, {"name": "series-cnn"}, 15, 9, 5, SERIES),
    "molecules": Plan(MOLECULES, {"name": "small-resnet"}, 15, 9, 5, IMAGES),
}


class Trials(NamedTuple):
    """The recipes of one data set, from its plan, with these epochs and word vectors."""

    plan: Plan
    vectors: str = ""

    def base(self) -> list[Recipe]:
        settings = product(LEARNING_RATES, WEIGHT_DECAYS)
        return [self._recipe(f"{BASE}-lr{lr:g}-wd{wd:g}", {"lr": lr, "weight_decay": wd}) for lr, wd in settings]

    def others(self, train: Mapping[str, Any], method: str) -> list[Recipe]:
        """What is tried for a method, with the `lr` and `weight_decay` that L1 does best with."""
        plan = self.plan
        made: dict[str, dict[str, Any]] = {}
        if method == "c-mixup":
            for h, alpha in product(BANDWIDTHS, ALPHAS):
                policy = {**plan.mixing, "bandwidth": h, "alpha": alpha}
                made[f"h{h:g}-a{alpha:g}"] = {"policy": policy}
        elif method == "supremix-joint":
            for window, weight in product(WINDOWS, WEIGHTS):
                # The head's own batch: no noise and no second view, so that the loss alone differs from L1.
                beside = {"epochs": 0, "weight": weight, "views": 1, "noise": 0.0, "augment": []}
                objective = {"name": "supremix", "window": window, "temperature": plan.temperature}
                made[f"w{window:g}-x{weight:g}"] = {"contrast": {**beside, "objective": objective}}
        else:
            for probe, (label, options) in product(PROBES, self._objectives(method).items()):
                head = {"probe": probe, "head_lr": plan.head_lr if probe == "linear" else train["lr"]}
                stage = {**plan.contrast, **head, "epochs": plan.first_stage}
                # Rank-N-Contrast compares features, the others what a projector makes of them.
                stage["projector"] = "none" if method == "rank-n-contrast" else "linear"
                made[f"{label}-{probe}"] = {"contrast": {**stage, "objective": {"name": method, **options}}}
        return [self._recipe(f"{method}-{label}", train, **parts) for label, parts in made.items()]

    def _objectives(self, method: str) -> dict[str, dict[str, Any]]:
        if method == "supremix":
            return {f"w{w:g}": {"window": w, "temperature": self.plan.temperature} for w in WINDOWS}
        if method == "supcon":
            return {f"tol{t:g}": {"label_tolerance": t} for t in TOLERANCES}
        return {f"t{t:g}": {"temperature": t} for t in RNC_TEMPERATURES}

    def _recipe(self, name: str, train: Mapping[str, Any], **parts: Any) -> Recipe:
        plan = self.plan
        shared = {
            "epochs": plan.epochs,
            "batch_size": 64,
            "optimizer": "adamw",
            "warmup_epochs": min(2.0, plan.first_stage / 6, (plan.epochs - plan.first_stage) / 4),
            "threads": 1,
            "checkpoint_every": plan.epochs,
        }
        options = {"vectors": self.vectors} if self.vectors else {}
        return check_recipe(
            {
                "name": name,
                "task": "regression",
                "data": plan.data,
                "model": {**plan.model, "options": options},
                "objective": {"name": "regression", "kind": "l1"},
                "train": {**shared, "lr": train["lr"], "weight_decay": train["weight_decay"]},
                "eval": {"every": plan.epochs},
                **parts,
            },
            name,
        )


def ablations(supremix: Recipe) -> list[Recipe]:
    """`supremix` with one thing changed."""
    table = supremix.model_dump(exclude_none=True)
    made = []
    for name, options in ABLATIONS.items():
        changed = {**table["contrast"], "objective": {**table["contrast"]["objective"], **options}}
        made.append(check_recipe({**table, "name": f"supremix-{name}", "contrast": changed}, name))
    return made
