"""The names that a recipe may use, and what each stands for. Literal tables: what is not listed here can't be named."""

from __future__ import annotations

import inspect

from hardmix import losses, mixing, semi

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
    "attentivemix": mixing.AttentiveMix,
    "snapmix": mixing.SnapMix,
    "guidedmix": mixing.GuidedMix,
    "puzzlemix": mixing.PuzzleMix,
    "co-mixup": mixing.CoMixup,
    "automix": mixing.AutoMix,
    "samix": mixing.SAMix,
    "adautomix": mixing.AdAutoMix,
    "alignmix": mixing.AlignMix,
    "transmix": mixing.TransMix,
    "tokenmix": mixing.TokenMix,
    "mixpro": mixing.MixPro,
    "smmix": mixing.SMMix,
    "tl-align": mixing.TLAlign,
    "mergemix": mixing.MergeMix,
    "sumix": mixing.SUMix,
    "supermix": mixing.SuperMix,
    "random-choice": mixing.RandomChoice,
    "scheduled": mixing.Scheduled,
}

#: Policies whose constructor takes the model that is trained.
NEEDS_MODEL = frozenset(
    {
        *("manifold-mixup", "attentivemix", "snapmix", "puzzlemix", "co-mixup", "alignmix", "sumix", "supermix"),
        *("automix", "samix", "adautomix"),
        *(NEEDS_ATTENTION := ("transmix", "tokenmix", "mixpro", "smmix", "tl-align", "mergemix")),
    }
)

#: Policies whose constructor takes another policy, `policy` in a recipe.
WRAPPERS = frozenset({"scheduled", "sumix"})

#: `saliency` of policies that take the model only for this one.
BY_GRADIENT = "input-gradient"

#: Objectives of the classification task.
OBJECTIVES: dict[str, type] = {
    "soft-cross-entropy": losses.SoftCrossEntropyLoss,
    "decoupled-mixup": losses.DecoupledMixupLoss,
    "soft-bce": losses.SoftBCELoss,
    "decoupled-mixup-bce": losses.DecoupledMixupBCELoss,
}

#: Objectives of several modalities and their joint; plain cross entropy of the joint besides.
MODALITY_OBJECTIVES: dict[str, type] = {"gmc": losses.GMCLoss, "soft-cross-entropy": losses.SoftCrossEntropyLoss}

#: Algorithms of the few-labels task.
ALGORITHMS: dict[str, type[semi.SemiAlgorithm]] = {
    "supervised": semi.Supervised,
    "pseudo-label": semi.PseudoLabel,
    "mean-teacher": semi.MeanTeacher,
    "mixmatch": semi.MixMatch,
    "remixmatch": semi.ReMixMatch,
    "uda": semi.UDA,
    "fixmatch": semi.FixMatch,
    "flexmatch": semi.FlexMatch,
    "freematch": semi.FreeMatch,
    "softmatch": semi.SoftMatch,
    "fine-tuning": semi.FineTuning,
    "bss": semi.BSS,
    "co-tuning": semi.CoTuning,
    "self-tuning": semi.SelfTuning,
}

#: Policies and objectives of its pairs of a labelled and an unlabelled sample.
PAIR_POLICIES = ("mixup", "cutmix", "smoothmix", "fmix", "gridmix", "resizemix")
MIXED_PAIR_OBJECTIVES = ("decoupled-mixup", "soft-cross-entropy")


def takes_pairs(algorithm: str) -> bool:
    """Whether an algorithm of ALGORITHMS mixes pairs besides what it does."""
    return "pairs" in inspect.signature(ALGORITHMS[algorithm]).parameters


#: Policies that mix whole samples, of whatever shape; the others mix parts of them.
WHOLE_POLICIES = ("mixup", "manifold-mixup")

#: Policies that pair by labels that are numbers.
REGRESSION_POLICIES: dict[str, type] = {"c-mixup": mixing.CMixup}

#: Objectives of a regression model's head.
REGRESSION_OBJECTIVES: dict[str, type] = {
    "regression": losses.RegressionLoss,
    "focal-r": losses.FocalRLoss,
    "balanced-mse": losses.BalancedMSELoss,
}

#: Objectives of a regression model's embeddings, before the head is trained or together with it.
CONTRASTS: dict[str, type] = {
    "supremix": losses.SupReMixLoss,
    "supcon": losses.SupConLoss,
    "rank-n-contrast": losses.RankNContrastLoss,
    "adasupcon": losses.AdaSupConLoss,
    "kernel-contrast": losses.KernelContrastLoss,
    "ranksim": losses.RankSimLoss,
    "ordinal-entropy": losses.OrdinalEntropyLoss,
    "conr": losses.ConRLoss,
}

#: Those that are made to stand beside a head's loss, and act on the features that the head reads.
JOINT_CONTRASTS = frozenset({"ranksim", "ordinal-entropy", "conr"})

#: Objectives of the features that two towers make of image-text pairs.
PAIR_OBJECTIVES: dict[str, type] = {
    "clip": losses.ClipLoss,
    "siglip": losses.SigLipLoss,
    "m2-mix": losses.M2MixLoss,
    "m2-mix-siglip": losses.M2MixSigLipLoss,
    "m3-mix": losses.M3MixLoss,
    "cyclip": losses.CyClipLoss,
    "hcl": losses.HCLLoss,
    "i-mix": losses.IMixLoss,
    "un-mix": losses.UnMixLoss,
    "carot": losses.CaRotLoss,
    "lipsum": losses.LipsumLoss,
    "coca": losses.CoCaLoss,
}
