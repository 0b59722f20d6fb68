"""Objectives, each as a function and as a module: `criterion(model(x), target)`, `criterion(embeddings, labels)`."""

from hardmix.losses.decoupled import DecoupledMixupLoss, decoupled_mixup_loss
from hardmix.losses.decoupled_bce import (
    DecoupledMixupBCELoss,
    SoftBCELoss,
    decoupled_mixup_bce_loss,
    soft_bce_loss,
)
from hardmix.losses.soft_cross_entropy import SoftCrossEntropyLoss, soft_cross_entropy_loss
from hardmix.losses.supcon import SupConLoss, supcon_loss
from hardmix.losses.supremix import SupReMixLoss, supremix_loss

__all__ = [
    "DecoupledMixupBCELoss",
    "DecoupledMixupLoss",
    "SoftBCELoss",
    "SoftCrossEntropyLoss",
    "SupConLoss",
    "SupReMixLoss",
    "decoupled_mixup_bce_loss",
    "decoupled_mixup_loss",
    "soft_bce_loss",
    "soft_cross_entropy_loss",
    "supcon_loss",
    "supremix_loss",
]
