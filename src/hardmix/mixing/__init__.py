"""Mixing policies: `x_mixed, target = policy(x, y)`."""

from hardmix.mixing.augmix import AugMix
from hardmix.mixing.choice import RandomChoice, Scheduled
from hardmix.mixing.geodesic import slerp
from hardmix.mixing.hidden import ManifoldMixup
from hardmix.mixing.masks import FMix, GridMix, SmoothMix
from hardmix.mixing.pairing import CMixup, LabelKernel
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy
from hardmix.mixing.resize import ResizeMix
from hardmix.mixing.saliency import SaliencyMix, spectral_residual
from hardmix.mixing.static import CutMix, Mixup
from hardmix.mixing.target import MixedTarget

__all__ = [
    "AugMix",
    "CMixup",
    "CutMix",
    "FMix",
    "GridMix",
    "LabelKernel",
    "ManifoldMixup",
    "MixPlan",
    "MixedTarget",
    "Mixup",
    "Policy",
    "RandomChoice",
    "ResizeMix",
    "SaliencyMix",
    "Scheduled",
    "SmoothMix",
    "slerp",
    "spectral_residual",
]
