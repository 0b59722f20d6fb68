"""CLIP and SigLIP: each image to its own text among those of the batch, and each text to its image.

The functions compare the pairs they are given. The modules compare those of all processes: see `ClipLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import readable, reduce, softplus, unit, wide
from hardmix.distributed import gather_with_sum, mean_of_parts, rank_and_size, rows_from_first
from hardmix.kernels.pair_contrast import Term, pair_contrast

REDUCTIONS = ("none", "mean", "sum")
#: What open_clip's classes are told about processes, beside `rank` and `world_size`, and need not be told here.
OPEN_CLIP = ("local_loss", "gather_with_grad", "cache_labels", "use_horovod", "dist_impl", "chunk_size")
#: Rounding leaves rows that are divided by their length in a dtype within so many eps of it from 1: at most 2.2 were
#: seen, in float32 with 4,096 columns.
UNIT_EPS = 4.0


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """CLIP: cross entropy of each pair among the batch's, averaged over both directions.

        l_i = 1/2 [log sum_j exp(s a_i . b_j) - s a_i . b_i]  +  1/2 [log sum_j exp(s b_i . a_j) - s b_i . a_i]

    Above 1,024 pairs the N x N logits are formed in tiles, twice, and memory grows with N. Pairs are compared with all
    pairs of the batch; processes do not exchange theirs, as those of `ClipLoss` do.

    Args:
        image_features, text_features: (N, D), row i of both is a pair. Any float dtype and length; rows are normalised,
            and products and sums are done in float32 or wider.
        logit_scale: s, greater than 0: a number or a tensor of one element that may learn, already exponentiated.
        normalize: False where rows have length 1 already, and others are a mistake: those are refused on the CPU. Up to
            4 eps of their dtype (float16 .004, bfloat16 .03, float32 and float64 5e-7) count as the rounding of rows
            that were normalised in it; it is divided out in float32 or wider, so that the value is that of True.
        reduction: "mean" over the pairs, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1 has no other pair: 0, with a gradient of zeros. All pairs
        equal: log N. A row of zeros has cosine 0 with all. First derivatives only: to differentiate a gradient raises
        NotImplementedError.

    Raises:
        TypeError: not tensors, integer features, a scale of another kind.
        ValueError: numbers of rows or columns, or devices, disagree; an empty batch; on the CPU also NaN or infinity in
            the features, named by row, a scale that is not positive, and with normalize=False a row of another length
            than 1, such as one of zeros. A GPU is not waited for, nor does compiled code look: NaN gives NaN there, and
            rows of any length are divided by it.

    Reference: Radford et al. 2021 (arXiv:2103.00020). open_clip's `ClipLoss` takes rows as they come; CLIP models
    normalise theirs, and for those both have the same value.

    >>> import torch
    >>> round(clip_loss(torch.eye(3), torch.eye(3), 1.0).item(), 4)   # log(e + 2) - 1
    0.5514
    """
    who = "clip_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    return _clip(who, gathered(who, image_features, text_features, False, normalize), logit_scale, reduction)


def _clip(who: str, pairs: Gathered, logit_scale: Tensor | float, reduction: str) -> Tensor:
    a, b, own = pairs.a, pairs.b, pairs.own
    scale = one_number(who, "logit_scale", logit_scale, a)
    others = pair_contrast(a, b, [Term(scale=scale)], first=own.start, last=own.stop)[0]
    return pairs.reduce(cross_entropy(others, scale * (a[own] * b[own]).sum(1)), reduction)


class _PairLoss(nn.Module):
    """The settings that `ClipLoss` describes."""

    def __init__(
        self, *, normalize: bool = True, reduction: str = "mean", gather: bool = True, **open_clip: Any
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.normalize = _check.boolean(who, "normalize", normalize)
        self.reduction = _check.choice(who, "reduction", reduction, REDUCTIONS)
        self.gather = check_processes(who, gather, open_clip)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class ClipLoss(_PairLoss):
    """`clip_loss` in the place of open_clip's class: same call, same value. Nothing is learnt.

    `logit_bias` cancels in a softmax; it only gets its gradient of 0. `output_dict=True` gives {"contrastive_loss": .}.

    Processes. With a process group, each one's pairs are compared with those of all of them. Rows are exchanged, and
    their gradients on the way back; a process forms the logits of its own rows alone, n x M instead of M x M. On every
    process "mean" and "sum" are the value over all M pairs, and after DDP's averaging every gradient is that of one
    process with all pairs, the scale's included. "none" is this process's own (n,), of which the caller has to take
    care. Numbers of pairs may differ, down to none on some. All processes have to call the loss, and run its backward
    pass, equally often.

    Args:
        normalize, reduction: see `clip_loss`.
        gather: False for the pairs of this process alone, as where only one of them computes the loss.
        open_clip: keywords of open_clip's own class, so that calls of that work. `rank` and `world_size` have to be
            those of the process group. The others have no effect: the gradient is what open_clip has with
            `gather_with_grad=True`, the memory what it has with `local_loss=True`, and the value its global one.

    Raises:
        TypeError, ValueError: a keyword that open_clip does not have, another process group than the one there is, or
            horovod, which there is no exchange for.

    >>> import torch
    >>> ClipLoss()(torch.randn(8, 16), torch.randn(8, 16), 100.0).shape
    torch.Size([])
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see `clip_loss`."""
        pairs = gathered("clip_loss", image_features, text_features, self.gather, self.normalize)
        loss = without_effect(_clip("clip_loss", pairs, logit_scale, self.reduction), logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = True,
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
    pairs = gathered(who, image_features, text_features, False, normalize)
    return _siglip(who, pairs, logit_scale, logit_bias, reduction)


def _siglip(
    who: str, pairs: Gathered, logit_scale: Tensor | float, logit_bias: Tensor | float | None, reduction: str
) -> Tensor:
    a, b, own = pairs.a, pairs.b, pairs.own
    scale = one_number(who, "logit_scale", logit_scale, a)
    bias = one_number(who, "logit_bias", 0.0 if logit_bias is None else logit_bias, a, positive=False)
    others = pair_contrast(a, b, [Term(scale=scale)], bias=bias, first=own.start, last=own.stop)[0]
    return pairs.reduce(softplus(-bias - scale * (a[own] * b[own]).sum(1)) + others.mean(0), reduction)


class SigLipLoss(_PairLoss):
    """`siglip_loss` in the place of open_clip's class: same call, same value. Nothing is learnt.

    Settings and what happens with several processes are as for `ClipLoss`.

    >>> import torch
    >>> SigLipLoss()(torch.randn(8, 16), torch.randn(8, 16), 10.0, -10.0).shape
    torch.Size([])
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see `siglip_loss`."""
        pairs = gathered("siglip_loss", image_features, text_features, self.gather, self.normalize)
        loss = _siglip("siglip_loss", pairs, logit_scale, logit_bias, self.reduction)
        return {"contrastive_loss": loss} if output_dict else loss


class Gathered(NamedTuple):
    """Unit rows (M, D) of the pairs of `ranks` processes, and where this one's own are. Of one process, M = N."""

    a: Tensor
    b: Tensor
    own: slice
    ranks: int

    def reduce(self, per_pair: Tensor, reduction: str = "mean") -> Tensor:
        """Over all processes' pairs, from the values of those that this one answers for."""
        if self.ranks == 1 or reduction == "none":
            return reduce(per_pair, reduction)
        weight = self.ranks / (len(self.a) if reduction == "mean" else 1)
        return mean_of_parts(per_pair.sum() * weight)

    def agreed(self, values: Tensor) -> Tensor:
        """What was drawn, alike on all processes."""
        return values if self.ranks == 1 else rows_from_first(values)


def gathered(who: str, image_features: Tensor, text_features: Tensor, gather: bool, normalize: bool = True) -> Gathered:
    """Checked pairs of all processes, or of this one alone. With several, those without pairs may come along."""
    ranks = rank_and_size()[1] if gather else 1
    a, b = unit_pairs(who, image_features, text_features, normalize=normalize, empty=ranks > 1)
    if ranks == 1:
        return Gathered(a, b, slice(0, len(a)), 1)
    both, own = gather_with_sum(torch.stack((a, b)).transpose(0, 1))  # (M, 2, D)
    if not len(both):
        raise ValueError(f"{who}: image_features is empty on all {ranks} processes; pass at least one sample.")
    return Gathered(both[:, 0].contiguous(), both[:, 1].contiguous(), own, ranks)


def check_processes(who: str, gather: object, open_clip: Mapping[str, object]) -> bool:
    """`gather`, once open_clip's keywords are known to ask for nothing else."""
    gather = _check.boolean(who, "gather", gather)
    own = dict(zip(("rank", "world_size"), rank_and_size(), strict=True))
    for name, value in open_clip.items():
        if name not in own and name not in OPEN_CLIP:
            hint = _check.did_you_mean(name, (*own, *OPEN_CLIP))
            raise TypeError(f"{who}: there is no setting {name!r}{hint}; leave it out.")
        if gather and name in own and value != own[name]:
            raise ValueError(
                f"{who}: {name} is {_check.shown(value)} but that of the process group is {own[name]}; call "
                "torch.distributed.init_process_group first, or pass gather=False to compare no other process's pairs."
            )
        if name == "use_horovod" and value:
            raise ValueError(f"{who}: use_horovod is {value!r}; pass False and use torch.distributed.")
    return gather


def unit_pairs(
    who: str, image_features: Tensor, text_features: Tensor, *, normalize: bool = True, empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Checked features (N, D) as rows of length 1 in float32 or wider; N = 0 only where that may be."""
    _check.boolean(who, "normalize", normalize)
    features = []
    for name, value in (("image_features", image_features), ("text_features", text_features)):
        x = _check.tensor(who, name, value)
        if not (empty and x.ndim == 2 and len(x) == 0):
            x = _check.batch(who, name, x, 2, 2)
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
    if not normalize:
        _check_length(who, "image_features", a)
        _check_length(who, "text_features", b)
    dtype = wide(torch.promote_types(a.dtype, b.dtype))
    return unit(a.to(dtype)), unit(b.to(dtype))


def _check_length(who: str, name: str, x: Tensor) -> None:
    """Rows of length 1, up to the rounding of their dtype; values are looked at where that waits for no device."""
    if not readable(x):
        return
    # In float64: float32's own sum would take up much of what float32 rows are allowed.
    length = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.float64)
    # Float64 rows are often float32 ones that were widened.
    rounding = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    wrong = ((length - 1.0).abs() > UNIT_EPS * rounding).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{who}: normalize is False but row {row} of {name} has length {length[row].item():.8g}; pass "
            "normalize=True, or divide rows by their length."
        )


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
    if readable(value):
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
