"""Objectives, each as a function and as a module: `criterion(model(x), target)`, `criterion(embeddings, labels)`."""

from hardmix.losses.adaptive_supcon import AdaSupConLoss, adaptive_supcon_loss
from hardmix.losses.balanced_mse import BalancedMSELoss, LabelMixture, bmc_loss, gai_loss, label_mixture
from hardmix.losses.caption import CaptionLoss, CoCaLoss, caption_loss
from hardmix.losses.carot import CaRotLoss, projection_penalty, self_distillation_loss
from hardmix.losses.clip import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from hardmix.losses.conr import ConRLoss, conr_loss
from hardmix.losses.cyclip import CyClipLoss, cyclip_loss
from hardmix.losses.decoupled import DecoupledMixupLoss, decoupled_mixup_loss
from hardmix.losses.decoupled_bce import (
    DecoupledMixupBCELoss,
    SoftBCELoss,
    decoupled_mixup_bce_loss,
    soft_bce_loss,
)
from hardmix.losses.focal_r import FocalRLoss, focal_r_loss
from hardmix.losses.hcl import HCLLoss, hcl_loss
from hardmix.losses.imix import IMixLoss, imix_loss
from hardmix.losses.kernel_contrast import KernelContrastLoss, kernel_contrast_loss
from hardmix.losses.label_density import FeatureSmoothing, lds_weights
from hardmix.losses.lipsum import LipsumLoss, lipsum_loss, random_tokens
from hardmix.losses.m2mix import M2MixLoss, M2MixSigLipLoss, m2mix_loss
from hardmix.losses.m3mix import M3MixLoss, unimodal_mix_loss
from hardmix.losses.multimodal import GMCLoss, gmc_loss, multimodal_mix_loss
from hardmix.losses.ordinal_entropy import OrdinalEntropyLoss, ordinal_entropy_loss
from hardmix.losses.rank_n_contrast import RankNContrastLoss, rank_n_contrast_loss
from hardmix.losses.ranksim import RankSimLoss, ranksim_loss
from hardmix.losses.regression import RegressionLoss, regression_loss
from hardmix.losses.soft_cross_entropy import SoftCrossEntropyLoss, soft_cross_entropy_loss
from hardmix.losses.supcon import SupConLoss, supcon_loss
from hardmix.losses.supremix import SupReMixLoss, supremix_loss
from hardmix.losses.unmix import UnMixLoss, unmix_loss

__all__ = [
    "AdaSupConLoss",
    "BalancedMSELoss",
    "CaRotLoss",
    "CaptionLoss",
    "ClipLoss",
    "CoCaLoss",
    "ConRLoss",
    "CyClipLoss",
    "DecoupledMixupBCELoss",
    "DecoupledMixupLoss",
    "FeatureSmoothing",
    "FocalRLoss",
    "GMCLoss",
    "HCLLoss",
    "IMixLoss",
    "KernelContrastLoss",
    "LabelMixture",
    "LipsumLoss",
    "M2MixLoss",
    "M2MixSigLipLoss",
    "M3MixLoss",
    "OrdinalEntropyLoss",
    "RankNContrastLoss",
    "RankSimLoss",
    "RegressionLoss",
    "SigLipLoss",
    "SoftBCELoss",
    "SoftCrossEntropyLoss",
    "SupConLoss",
    "SupReMixLoss",
    "UnMixLoss",
    "adaptive_supcon_loss",
    "bmc_loss",
    "caption_loss",
    "clip_loss",
    "conr_loss",
    "cyclip_loss",
    "decoupled_mixup_bce_loss",
    "decoupled_mixup_loss",
    "focal_r_loss",
    "gai_loss",
    "gmc_loss",
    "hcl_loss",
    "imix_loss",
    "kernel_contrast_loss",
    "label_mixture",
    "lds_weights",
    "lipsum_loss",
    "m2mix_loss",
    "multimodal_mix_loss",
    "ordinal_entropy_loss",
    "projection_penalty",
    "random_tokens",
    "rank_n_contrast_loss",
    "ranksim_loss",
    "regression_loss",
    "self_distillation_loss",
    "siglip_loss",
    "soft_bce_loss",
    "soft_cross_entropy_loss",
    "supcon_loss",
    "supremix_loss",
    "unimodal_mix_loss",
    "unmix_loss",
]
