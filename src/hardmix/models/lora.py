"""LoRA: small matrices that are trained beside the layers of a tower, whose own weights stay as they are."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.data.decode import reason

#: parts of the names that peft gives to tensors: of the layer itself, and of what it adds
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
Net = TypeVar("Net", bound=nn.Module)


def add_lora(model: nn.Module, towers: Sequence[str], rank: int) -> None:
    """Put adapters into these towers of a model, in place; A is drawn from torch's global generator.

        W x  ->  W x + B A x,     A (rank, in) small and random, B (out, rank) zero at first

    Nothing changes until B does. Adapted are linear layers and filters without groups; not those inside torch's
    MultiheadAttention, which reads its weights past them. All else in a tower stays as it is; batch norms go on
    tracking what they see. `hold_towers` says what is trained.

    Raises:
        ImportError: peft is missing, or doesn't import.
        ValueError: a rank below 1, or no layer to adapt in any of the towers.
    """
    who = "tune.lora"
    _check.integer(who, "rank", rank, 1)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f'{who} needs peft ({reason(error)}); pip install "hardmix[lora]".') from None
    names = {tower: _adaptable(getattr(model, tower)) for tower in towers}
    if not any(names.values()):
        raise ValueError(
            f"{who}: {' and '.join(towers)} have no linear layers or filters to adapt; take another tower."
        )
    for tower, found in names.items():
        if found:
            # A scale of 1 whatever the rank, so that weights are merged without being told it.
            pattern = "|".join(map(re.escape, found))
            config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=pattern)
            inject_adapter_in_model(config, getattr(model, tower))


def _adaptable(tower: nn.Module) -> list[str]:
    """Names of the layers; a subclass may be there to be read, not called."""
    return [
        name
        for name, layer in tower.named_modules()
        if name and (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1))
    ]


def hold_towers(model: nn.Module, towers: Sequence[str]) -> None:
    """Leave a gradient to the adapters alone in the towers that have some."""
    for tower in towers:
        parameters = dict(getattr(model, tower).named_parameters())
        if any(name.endswith(DOWN) for name in parameters):
            for name, parameter in parameters.items():
                if not name.endswith((DOWN, UP)):
                    parameter.requires_grad_(False)


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model with adapters as that of one without, W + B A; of one without any, the same tensors."""
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith((DOWN, UP)):
            continue
        layer, _, kind = name.partition(BASE)
        if kind == "weight":
            down, up = tensors[layer + DOWN], tensors[layer + UP]
            value = value + torch.einsum("or,r...->o...", up.flatten(1), down)
        plain[f"{layer}.{kind}" if kind else name] = value
    return plain


def without_lora(model: Net) -> Net:
    """A copy with the adapters merged into the weights; a model that has none is returned as it is."""
    adapted = [name.removesuffix(DOWN) for name in model.state_dict() if name.endswith(DOWN)]
    if not adapted:
        return model
    plain = copy.deepcopy(model)
    for name in adapted:
        parent, _, child = name.rpartition(".")
        layer = plain.get_submodule(name).base_layer
        assert isinstance(layer, nn.Module)
        layer.weight.requires_grad_(True)  # type: ignore[operator, union-attr]  # it has changed with the adapters
        setattr(plain.get_submodule(parent), child, layer)
    plain.load_state_dict(merged(model.state_dict()))
    return plain
