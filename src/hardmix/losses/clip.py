"""CLIP and SigLIP: each image to its own text among those of the batch, and each text to its image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import is_transformed, reduce, softplus, unit, wide
from hardmix.kernels.pair_contrast import Term, pair_contrast

REDUCTIONS = ("none", "mean", "sum")


def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, *, reduction: str = "mean"
) -> Tensor:
    """CLIP: cross entropy of each pair among the batch's, averaged over both directions.

        l_i = 1/2 [log sum_j exp(s a_i . b_j) - s a_i . b_i]  +  1/2 [log sum_j exp(s b_i . a_j) - s b_i . a_i]

    Above 1,024 pairs the N x N logits are formed in tiles, twice, and memory grows with N. Pairs are compared with all
    pairs of the batch; processes do not exchange theirs.

    Args:
        image_features, text_features: (N, D), row i of both is a pair. Any float dtype and length; rows are normalised,
            and products and sums are done in float32 or wider.
        logit_scale: s, greater than 0: a number or a tensor of one element that may learn, already exponentiated.
        reduction: "mean" over the pairs, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1 has no other pair: 0, with a gradient of zeros. All pairs
        equal: log N. A row of zeros has cosine 0 with all. First derivatives only.

    Raises:
        TypeError: not tensors, integer features, a scale of another kind.
        ValueError: numbers of rows or columns, or devices, disagree; an empty batch; on the CPU also NaN or infinity in
            the features, named by row, and a scale that is not positive. A GPU is not waited for: NaN gives NaN there.

    Reference: Radford et al. 2021 (arXiv:2103.00020). open_clip's `ClipLoss` takes rows as they come; CLIP models
    normalise theirs, and for those both have the same value.

    >>> import torch
    >>> round(clip_loss(torch.eye(3), torch.eye(3), 1.0).item(), 4)   # log(e + 2) - 1
    0.5514
    """
    who = "clip_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    a, b = unit_pairs(who, image_features, text_features)
    scale = one_number(who, "logit_scale", logit_scale, a)
    others = pair_contrast(a, b, [Term(scale=scale)])[0]
    return reduce(cross_entropy(others, scale * (a * b).sum(1)), reduction)


class ClipLoss(nn.Module):
    """`clip_loss` in the place of open_clip's class: same call, same value. Nothing is learnt.

    `logit_bias` cancels in a softmax; it only gets its gradient of 0. `output_dict=True` gives {"contrastive_loss": .}.

    >>> import torch
    >>> ClipLoss()(torch.randn(8, 16), torch.randn(8, 16), 100.0).shape
    torch.Size([])
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = _check.choice(type(self).__name__, "reduction", reduction, REDUCTIONS)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see `clip_loss`."""
        loss = clip_loss(image_features, text_features, logit_scale, reduction=self.reduction)
        loss = without_effect(loss, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """SigLIP: every image and text of the batch, told to belong together or not, each on its own.

        l_i = log(1 + exp(-z_ii)) + sum_{j != i} log(1 + exp(z_ij)),     z_ij = s a_i . b_j + bias

    Arguments, edges and errors as for `clip_loss`, and

        logit_bias: a number or a tensor of one element; None for 0.

    For "none", pair i gets half of what its image and half of what its text has with the others. N = 1 leaves the first
    part.

    Reference: Zhai et al. 2023 (arXiv:2303.15343); same value as open_clip's `SigLipLoss` for rows of length 1.

    >>> import torch
    >>> round(siglip_loss(torch.eye(2), torch.eye(2), 1.0).item(), 4)   # log(1 + 1/e) + log 2
    1.0064
    """
    who = "siglip_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    a, b = unit_pairs(who, image_features, text_features)
    scale = one_number(who, "logit_scale", logit_scale, a)
    bias = one_number(who, "logit_bias", 0.0 if logit_bias is None else logit_bias, a, positive=False)
    others = pair_contrast(a, b, [Term(scale=scale)], bias=bias)[0]
    return reduce(softplus(-bias - scale * (a * b).sum(1)) + others.mean(0), reduction)


class SigLipLoss(nn.Module):
    """`siglip_loss` in the place of open_clip's class: same call, same value. Nothing is learnt.

    >>> import torch
    >>> SigLipLoss()(torch.randn(8, 16), torch.randn(8, 16), 10.0, -10.0).shape
    torch.Size([])
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = _check.choice(type(self).__name__, "reduction", reduction, REDUCTIONS)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see `siglip_loss`."""
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, reduction=self.reduction)
        return {"contrastive_loss": loss} if output_dict else loss


def unit_pairs(
    who: str, image_features: Tensor, text_features: Tensor, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Checked features (N, D) as rows of length 1 in float32 or wider, in the given order."""
    features = []
    for name, value in (("image_features", image_features), ("text_features", text_features)):
        x = _check.batch(who, name, value, 2, 2)
        if not x.is_floating_point():
            raise TypeError(f"{who}: {name} has dtype {x.dtype}; pass floating-point values.")
        features.append(x)
    a, b = features
    _check.same_length(who, "text_features", b, "image_features", a.shape[0])
    if a.shape != b.shape:
        raise ValueError(
            f"{who}: text_features has {b.shape[1]} columns but image_features has {a.shape[1]}; pass projections into "
            "one space."
        )
    _check.same_device(who, "text_features", b, "image_features", a.device)
    _check.finite(who, "image_features", a)
    _check.finite(who, "text_features", b)
    dtype = wide(torch.promote_types(a.dtype, b.dtype))
    if order is not None:
        order = order.to(a.device)
        a, b = a.index_select(0, order), b.index_select(0, order)
    return unit(a.to(dtype)), unit(b.to(dtype))


def one_number(who: str, name: str, value: Tensor | float, like: Tensor, positive: bool = True) -> Tensor:
    """A scale or a bias as a tensor () beside the rows; its value is checked where that waits for no device."""
    if not isinstance(value, Tensor):
        number = _check.positive(who, name, value) if positive else _check.number(who, name, value)
        return torch.full((), number, device=like.device, dtype=like.dtype)
    kind = "a number greater than 0" if positive else "a finite number"
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{who}: {name} has shape {tuple(value.shape)} and dtype {value.dtype}; pass {kind}, or a floating-point "
            "tensor of one element."
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        number = float(value.detach())
        if not math.isfinite(number) or (positive and number <= 0.0):
            hint = ", the exponential of what the model learns" if positive else ""
            raise ValueError(f"{who}: {name} is {number:g}; pass {kind}{hint}.")
    return value.reshape(()).to(like.device, like.dtype)


def cross_entropy(others: Tensor, own: Tensor) -> Tensor:
    """Both directions' cross entropy (N,), from the log-sum-exp of the other logits (2, N) and the pair's, (N,) or
    (2, N)."""
    return softplus(others - own).mean(0)


def without_effect(loss: Tensor, value: Tensor | float | None) -> Tensor:
    """The loss with a gradient of 0 for a parameter that cancels, which some wrappers of models insist on."""
    return loss + 0.0 * value.sum() if isinstance(value, Tensor) and value.requires_grad else loss
