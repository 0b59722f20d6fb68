"""From a recipe to an optimizer: which parameters decay, and which move faster or slower than the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hardmix.models.pair_model import layer_depths
from hardmix.train.recipe import Recipe


def build_optimizer(
    model: nn.Module, recipe: Recipe, beside: nn.Module | None = None, rates: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """Weight decay on matrices and filters only: norms and biases are not decayed.

    A group's "share" is that of its learning rate in the recipe's: with `tune.layer_decay`, d for each layer that lies
    between it and the end of its tower.

    Args:
        beside: what else is trained: a policy that learns.
        rates: factors on the learning rate of single parameters.
    """
    train = recipe.train
    shares = _shares(model, recipe.tune.layer_decay, rates or {})
    if beside is not None:
        shares[1.0] += [parameter for parameter in beside.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for share, parameters in shares.items():
        decayed = [p for p in parameters if p.ndim > 1]
        plain = [p for p in parameters if p.ndim <= 1]
        for chosen, decay in ((decayed, train.weight_decay), (plain, 0.0)):
            if chosen or share == 1.0:
                groups.append({"params": chosen, "weight_decay": decay, "share": share})
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.momentum > 0)


def _shares(model: nn.Module, decay: float, rates: Mapping[nn.Parameter, float]) -> dict[float, list[nn.Parameter]]:
    """Parameters that are trained, by the share of the learning rate that they get; 1 comes first."""
    shares: dict[float, list[nn.Parameter]] = {1.0: []}
    depth = layer_depths(model) if decay < 1.0 else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = decay ** depth.get(name, 0) * rates.get(parameter, 1.0)
            shares.setdefault(share, []).append(parameter)
    return shares
