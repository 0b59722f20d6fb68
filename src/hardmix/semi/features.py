"""The features that a model's classifier reads, for methods that look at them, whatever the model is."""

from __future__ import annotations

from torch import Tensor, nn

from hardmix import _check
from hardmix._math import wide
from hardmix.semi.algorithm import Forward, logits_of


def find_head(who: str, model: object, head: str = "") -> nn.Linear:
    """The linear layer that makes a model's logits: the one named, or the last one that the model holds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is a {type(model).__name__}; pass a torch.nn.Module.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not isinstance(head, str):
        raise TypeError(f"{who}: head is {_check.shown(head)}; pass the name of a linear layer of the model.")
    if head and head not in layers:
        near = _check.did_you_mean(head, layers)
        raise ValueError(f"{who}: head names {head!r}, which is no linear layer of the model{near}.")
    if not layers:
        raise ValueError(f"{who}: the model has no linear layer to read features in front of; pass one that has.")
    return layers[head] if head else list(layers.values())[-1]


def with_features(model: Forward, x: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """(N, C) logits of `x` and the (N, D) features that `head` made them of, from one forward, in float32 or wider.

    Of several passes through the head the last one's are given.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        logits = logits_of(model, x)
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError(
            "with_features: the forward did not pass through the head; name the layer that it uses (torch.compile "
            "passes over hooks unless torch._dynamo.config.skip_nnmodule_hook_guards is set to False before)."
        )
    features = seen[-1]
    if features.ndim != 2 or len(features) != len(x):
        raise ValueError(
            f"with_features: the head reads features of shape {tuple(features.shape)} for {len(x)} samples; "
            "name the layer that makes the logits of (N, D) features."
        )
    return logits, features.to(wide(features.dtype))
