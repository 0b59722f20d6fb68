"""What is trained: the recipes of each comparison, and which comparisons a budget pays for.

Every policy that mixes labels, each with soft cross entropy and with Decoupled Mixup at the same settings
of the policy, so that the two differ in the loss alone. A policy has the settings of its paper, or those that a network
and an image of this size need; nothing was tuned here. DM's weight is the one of the paper's two that did better in
docs/evidence/decoupled-mixup.md.
"""

from __future__ import annotations

from typing import Any

from hardmix.train.recipe import Recipe, check_recipe

ETA = 0.1
#: what mixes without looking at a model
STATIC: dict[str, dict[str, Any]] = {
    "mixup": {"alpha": 1.0},
    "cutmix": {"alpha": 1.0},
    "smoothmix": {},
    "fmix": {"alpha": 1.0},
    "gridmix": {"alpha": 1.0},
    "resizemix": {},
    "saliencymix": {"alpha": 1.0},
    "guidedmix": {},
    "manifold-mixup": {"layers": ["stage1", "stage2"]},
}
#: what asks the model that is trained, or trains a network of its own
DYNAMIC: dict[str, dict[str, Any]] = {
    "attentivemix": {"grid": 4},  # the last map has 4 x 4 cells
    "snapmix": {"alpha": 1.0},  # its 5 is for birds in pictures of 448 pixels
    "puzzlemix": {"blocks": [2, 4, 7]},  # parts of 28 pixels
    "co-mixup": {},
    "automix": {"momentum": 0.99},  # the averaged network follows within a short training
    "samix": {"momentum": 0.99},
    "adautomix": {"momentum": 0.99},
    "alignmix": {},
    "sumix": {"policy": {"name": "cutmix"}},
    "supermix": {"steps": 5},  # its 50 are for images that are made once
}
#: what reads the attention of a vision transformer
TOKENS: dict[str, dict[str, Any]] = {
    "transmix": {}, "tokenmix": {}, "mixpro": {}, "smmix": {}, "tl-align": {}, "mergemix": {},
}  # fmt: skip
PAIR = {name: STATIC[name] for name in ("mixup", "cutmix")}

#: few images, so the longer warm-up; one thread a run, since runs stand side by side
CNN = {"epochs": 30, "batch_size": 64, "lr": 0.1, "weight_decay": 5e-4, "warmup_epochs": 3, "threads": 1}
VIT = {**CNN, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0}
GPU = {**CNN, "epochs": 100, "batch_size": 100, "warmup_epochs": 5, "precision": "bf16", "checkpoint_every": 50}

OBJECTIVES = {"ce": {"name": "soft-cross-entropy"}, "dm": {"name": "decoupled-mixup", "eta": ETA}}


def group(
    data: str, samples: int, model: str, policies: dict[str, dict[str, Any]], train: dict[str, Any]
) -> list[Recipe]:
    """No mixing, and each policy with both objectives: mixup-ce, mixup-dm, ..."""
    shared = {
        "data": {
            "name": data,
            "train_samples": samples,
            "validation": 0.0,
            "augment": ["flip", "crop"] if data == "cifar10" else ["flip"],
        },
        "model": {"name": model},
        "train": train,
        "eval": {"every": train["epochs"]},
    }
    methods: dict[str, dict[str, Any]] = {"none": {"objective": OBJECTIVES["ce"]}}
    for name, options in policies.items():
        for key, objective in OBJECTIVES.items():
            methods[f"{name}-{key}"] = {"policy": {"name": name, **options}, "objective": objective}
    return [check_recipe({"name": name, **shared, **parts}, name) for name, parts in methods.items()]


def groups(budget: str) -> dict[str, list[Recipe]]:
    """Comparison -> recipes; the first recipe of each is the one without mixing."""
    made = {
        "fashion-2400": group("fashion-mini", 2400, "small-resnet", STATIC | DYNAMIC, CNN),
        "fashion-2400-vit": group("fashion-mini", 2400, "tiny-vit", PAIR | TOKENS, VIT),
    }
    if budget == "full":
        blocks = {**DYNAMIC, "puzzlemix": {"blocks": [2, 4, 8]}}
        made["cifar10-5000"] = group("cifar10", 5000, "small-resnet", STATIC | blocks, CNN)
        made["cifar10-50000-resnet18"] = group("cifar10", 0, "resnet18", STATIC | blocks, GPU)
    return made
