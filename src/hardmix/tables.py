"""The names that a recipe may use, and what each stands for. Literal tables: what is not listed here can't be named."""

from __future__ import annotations

from hardmix import losses, mixing

#: Policies that mix a batch.
POLICIES: dict[str, type] = {
    "mixup": mixing.Mixup,
    "cutmix": mixing.CutMix,
    "smoothmix": mixing.SmoothMix,
    "fmix": mixing.FMix,
    "gridmix": mixing.GridMix,
    "resizemix": mixing.ResizeMix,
    "saliencymix": mixing.SaliencyMix,
    "augmix": mixing.AugMix,
    "manifold-mixup": mixing.ManifoldMixup,
    "random-choice": mixing.RandomChoice,
    "scheduled": mixing.Scheduled,
}

#: Policies whose constructor takes the model that is trained.
NEEDS_MODEL = frozenset({"manifold-mixup"})

#: Objectives of the classification task.
OBJECTIVES: dict[str, type] = {
    "soft-cross-entropy": losses.SoftCrossEntropyLoss,
    "decoupled-mixup": losses.DecoupledMixupLoss,
    "soft-bce": losses.SoftBCELoss,
    "decoupled-mixup-bce": losses.DecoupledMixupBCELoss,
}

#: Those that mix whole samples, and so rows of a table.
ROW_POLICIES = ("mixup", "manifold-mixup")

#: Policies that pair by labels that are numbers.
REGRESSION_POLICIES: dict[str, type] = {"c-mixup": mixing.CMixup}

#: Objectives of a regression model's head.
REGRESSION_OBJECTIVES: dict[str, type] = {
    "regression": losses.RegressionLoss,
    "focal-r": losses.FocalRLoss,
}

#: Objectives that pre-train a regression model's encoder.
CONTRASTS: dict[str, type] = {
    "supremix": losses.SupReMixLoss,
    "supcon": losses.SupConLoss,
    "rank-n-contrast": losses.RankNContrastLoss,
}
