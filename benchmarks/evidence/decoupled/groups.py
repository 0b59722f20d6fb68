"""What is trained: the recipes of each comparison, and which comparisons a budget pays for.

The paper changes alpha and the loss together. Here each policy is run with soft cross entropy at its usual alpha and at
the paper's, and with Decoupled Mixup at the paper's alpha, so that the last two differ in the loss alone. The paper
weighs the regulariser with 0.1 on its large sets (CIFAR-100, ImageNet) and with 1 on its small ones (Tiny-ImageNet,
CUB, Aircraft; ResNet-18); both are run. Nothing here was tuned.
"""

from __future__ import annotations

from typing import Any

from hardmix.train.recipe import Recipe, check_recipe

USUAL_ALPHA, PAPER_ALPHA = 1.0, 0.2
PAPER_ETAS = (0.1, 1.0)
#: weights of the regulariser that the sensitivity study adds; 0 is soft cross entropy at the same alpha
MORE_ETAS = (0.5, 2.0)
#: the paper's (xi, t) for the binary form: cutting policies, others
BCE_SETTINGS = {"mixup": (1.0, 0.5), "cutmix": (0.8, 1.0)}

PAIR = ("mixup", "cutmix")
REST = ("fmix", "resizemix", "manifold-mixup")

#: few images, so the longer warm-up; one thread a run, since runs stand side by side
CNN = {"epochs": 30, "batch_size": 64, "lr": 0.1, "weight_decay": 5e-4, "warmup_epochs": 3, "threads": 1}
VIT = {**CNN, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0}
GPU = {**CNN, "epochs": 100, "batch_size": 100, "warmup_epochs": 5, "precision": "bf16", "checkpoint_every": 50}
#: as long as the paper's shortest runs
LONG = {**GPU, "epochs": 200}
#: all images: large batches, since with small ones the card waits for the host
WHOLE = {**LONG, "batch_size": 500, "lr": 0.4, "compile": True, "log_every": 100}

Methods = dict[str, dict[str, Any]]

CROSS_ENTROPY = {"name": "soft-cross-entropy"}
NONE: Methods = {"none": {"objective": CROSS_ENTROPY}}


def policy(name: str, alpha: float | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
    if name == "manifold-mixup":
        options["layers"] = ["stage1", "stage2"]
    return {"name": name, **options}


def methods(
    names: tuple[str, ...], etas: tuple[float, ...] = PAPER_ETAS, alphas: tuple[float, ...] = (USUAL_ALPHA, PAPER_ALPHA)
) -> Methods:
    """Policy and objective by the method's name, which says it all: cutmix-dm1-a0.2 is CutMix, eta 1, alpha 0.2.

    `alphas` are those of cross entropy.
    """
    made: Methods = {}
    for name in names:
        # ResizeMix draws its own scale and has no alpha.
        drawn = name == "resizemix"
        for alpha in (None,) if drawn else alphas:
            made[f"{name}-ce{_suffix(alpha)}"] = {"policy": policy(name, alpha), "objective": CROSS_ENTROPY}
        made |= with_etas(name, etas, None if drawn else PAPER_ALPHA)
    return made


def with_etas(name: str, etas: tuple[float, ...], alpha: float | None = PAPER_ALPHA) -> Methods:
    return {
        f"{name}-dm{eta:g}{_suffix(alpha)}": {
            "policy": policy(name, alpha),
            "objective": {"name": "decoupled-mixup", "eta": eta},
        }
        for eta in etas
    }


def binary_methods() -> Methods:
    """One-vs-all targets as they are, and rescaled with the paper's settings."""
    made: Methods = {"none-bce": {"objective": {"name": "soft-bce"}}}
    for name, (xi, t) in BCE_SETTINGS.items():
        mixed = policy(name, PAPER_ALPHA)
        made[f"{name}-bce-a{PAPER_ALPHA:g}"] = {"policy": mixed, "objective": {"name": "soft-bce"}}
        scaled = {"name": "decoupled-mixup-bce", "xi": xi, "t": t}
        made[f"{name}-dm-bce-a{PAPER_ALPHA:g}"] = {"policy": mixed, "objective": scaled}
    return made


def group(data: str, samples: int, model: str, chosen: Methods, train: dict[str, Any]) -> list[Recipe]:
    """The recipes of one comparison: `samples` training images, nothing kept for validation, the last weights tested.

    The views are those that suit the data: clothes stand in the middle of their pictures, so they are only mirrored.
    """
    views = ["flip", "crop"] if data == "cifar10" else ["flip"]
    shared = {
        "data": {"name": data, "train_samples": samples, "validation": 0.0, "augment": views},
        "model": {"name": model},
        "train": train,
        "eval": {"every": train["epochs"]},
    }
    return [check_recipe({"name": name, **shared, **parts}, name) for name, parts in chosen.items()]


def groups(budget: str, epochs: int | None = None) -> dict[str, list[Recipe]]:
    """Comparison -> recipes, that without mixing first where it is run. `epochs` replaces those of all."""
    settings = (CNN, VIT, GPU, LONG, WHOLE)
    cnn, vit_train, gpu, long, whole = ({**train, "epochs": epochs or train["epochs"]} for train in settings)
    resnet, vit, large = "small-resnet", "tiny-vit", "resnet18"
    pair, everything = NONE | methods(PAIR), NONE | methods(PAIR + REST)
    sweep = with_etas("mixup", MORE_ETAS) | with_etas("cutmix", MORE_ETAS)
    # 10, 20 and 50 % of the embedded 12,000 training images
    made = {
        "fashion-1200": group("fashion-mini", 1200, resnet, everything | sweep, cnn),
        "fashion-1200-bce": group("fashion-mini", 1200, resnet, binary_methods(), cnn),
        "fashion-1200-vit": group("fashion-mini", 1200, vit, pair, vit_train),
        "fashion-2400": group("fashion-mini", 2400, resnet, everything, cnn),
        "fashion-6000": group("fashion-mini", 6000, resnet, pair, cnn),
    }
    if budget == "full":
        made["fashion-6000-rest"] = group("fashion-mini", 6000, resnet, NONE | methods(REST), cnn)
        for samples in (2400, 6000):
            made[f"fashion-{samples}-bce"] = group("fashion-mini", samples, resnet, binary_methods(), cnn)
        made["fashion-2400-vit"] = group("fashion-mini", 2400, vit, pair, vit_train)
        # 10, 20 and 50 % of CIFAR-10
        for samples in (5000, 10000, 25000):
            made[f"cifar10-{samples}"] = group("cifar10", samples, large, pair, gpu)
        for samples in (5000, 10000, 25000):
            rest = NONE | methods(REST)
            made[f"cifar10-{samples}-rest"] = group("cifar10", samples, large, rest, gpu)
            made[f"cifar10-{samples}-small"] = group("cifar10", samples, resnet, pair, cnn)
            made[f"cifar10-{samples}-small-rest"] = group("cifar10", samples, resnet, rest, cnn)
            made[f"cifar10-{samples}-bce"] = group("cifar10", samples, large, binary_methods(), gpu)
            made[f"cifar10-{samples}-small-bce"] = group("cifar10", samples, resnet, binary_methods(), cnn)
            made[f"cifar10-{samples}-vit"] = group("cifar10", samples, vit, pair, vit_train)
        # the difference that the loss makes, at the length of the paper and on all images
        with_and_without = methods(("mixup",), PAPER_ETAS[:1], (PAPER_ALPHA,))
        made["cifar10-5000-long"] = group("cifar10", 5000, large, NONE | with_and_without, long)
        made["cifar10-50000-long"] = group("cifar10", 50000, large, with_and_without, whole)
    return made


def _suffix(alpha: float | None) -> str:
    return "" if alpha is None else f"-a{alpha:g}"
