"""Mixing policies: `x_mixed, target = policy(x, y)`."""

from hardmix.mixing.adautomix import AdAutoMix
from hardmix.mixing.alignmix import AlignMix
from hardmix.mixing.attentive import AttentiveMix
from hardmix.mixing.augmix import AugMix
from hardmix.mixing.choice import RandomChoice, Scheduled
from hardmix.mixing.comixup import CoMixup
from hardmix.mixing.geodesic import slerp
from hardmix.mixing.gradients import input_saliency
from hardmix.mixing.guidedmix import GuidedMix
from hardmix.mixing.hidden import ManifoldMixup
from hardmix.mixing.label_attention import MixPro, TLAlign, TransMix
from hardmix.mixing.learned import AutoMix, SAMix
from hardmix.mixing.masks import FMix, GridMix, SmoothMix
from hardmix.mixing.optimal import PuzzleMix
from hardmix.mixing.pairing import CMixup, LabelKernel
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy
from hardmix.mixing.resize import ResizeMix
from hardmix.mixing.saliency import SaliencyMix, spectral_residual
from hardmix.mixing.snapmix import SnapMix
from hardmix.mixing.static import CutMix, Mixup
from hardmix.mixing.sumix import SUMix
from hardmix.mixing.supermix import SuperMix
from hardmix.mixing.target import MixedTarget
from hardmix.mixing.token_merge import MergeMix
from hardmix.mixing.tokens import SMMix, TokenMix

__all__ = [
    "AdAutoMix",
    "AlignMix",
    "AttentiveMix",
    "AugMix",
    "AutoMix",
    "CMixup",
    "CoMixup",
    "CutMix",
    "FMix",
    "GridMix",
    "GuidedMix",
    "LabelKernel",
    "ManifoldMixup",
    "MergeMix",
    "MixPlan",
    "MixPro",
    "MixedTarget",
    "Mixup",
    "Policy",
    "PuzzleMix",
    "RandomChoice",
    "ResizeMix",
    "SAMix",
    "SMMix",
    "SUMix",
    "SaliencyMix",
    "Scheduled",
    "SmoothMix",
    "SnapMix",
    "SuperMix",
    "TLAlign",
    "TokenMix",
    "TransMix",
    "input_saliency",
    "slerp",
    "spectral_residual",
]
