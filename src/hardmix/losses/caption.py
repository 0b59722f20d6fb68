"""Captions: the cross entropy of each next token, alone and beside a contrast of images with texts, as in CoCa."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import reduce, wide
from hardmix.distributed import gather_rows, mean_of_parts, rank_and_size
from hardmix.losses.clip import REDUCTIONS, ClipLoss, check_processes


def caption_loss(
    logits: Tensor, ids: Tensor, *, padding: int = 0, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of each token of a caption, told what stands before it.

        l_it = -log softmax(z_it)[y_i,t+1],     y_i,t+1 not padding

    Args:
        logits: (N, L - 1, V), z_it from the tokens up to t; half types are computed in float32.
        ids: (N, L) integers y, begin first; the first column is never asked for.
        padding: the id that does not count, wherever it stands.
        label_smoothing: epsilon of the target, (1 - epsilon) y + epsilon / V.
        reduction: "mean" over the tokens that count, whichever caption they are of, "sum", or "none".

    Returns:
        Scalar, or (N, L - 1) for "none" with 0 where the target is padding. A caption of padding alone counts nothing;
        where all are, the loss is 0 with a gradient of zeros. N = 1 is like any other. NaN logits give NaN, unless
        their target is padding. Second derivatives are supported.

    Raises:
        TypeError: integer logits, other ids than integers.
        ValueError: sizes or devices disagree, an empty batch, a setting out of its range; on the CPU also an id that is
            not below V.

    Reference: Yu et al. 2022, eq. 3 (arXiv:2205.01917), with the mean over tokens as open_clip has it.

    >>> import torch
    >>> ids = torch.tensor([[1, 5, 2], [1, 2, 0]])
    >>> round(caption_loss(torch.zeros(2, 2, 8), ids).item(), 4)   # log 8
    2.0794
    """
    who = "caption_loss"
    _check_settings(who, padding, label_smoothing, reduction)
    per_token, counts = _per_token(who, logits, ids, padding, label_smoothing)
    return reduce(per_token, reduction, counts)


def _per_token(
    who: str, logits: Tensor, ids: Tensor, padding: int, label_smoothing: float, *, empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Each token's loss (N, L - 1), 0 where it does not count, and where it counts; N = 0 only where that may be."""
    z, y = _check.tensor(who, "logits", logits), _check.tensor(who, "ids", ids)
    if z.ndim != 3 or not (z.numel() or (empty and len(z) == 0)):
        raise ValueError(f"{who}: logits has shape {tuple(z.shape)}; pass (N, L - 1, V), none of them 0.")
    if not z.is_floating_point():
        raise TypeError(f"{who}: logits has dtype {z.dtype}; pass floating-point values.")
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{who}: ids has dtype {y.dtype}; pass the int64 ids of a tokenizer.")
    n, length, vocabulary = z.shape
    if y.shape != (n, length + 1):
        raise ValueError(
            f"{who}: ids has shape {tuple(y.shape)} but logits has {tuple(z.shape)}; pass ids (N, L) for logits "
            "(N, L - 1, V)."
        )
    _check.same_device(who, "ids", y, "logits", z.device)
    target = y[:, 1:].long()
    counts = target != padding
    _check.classes_in_range(who, "ids", target, vocabulary, ignore_index=padding)
    # a gradient of 0 through the softmax of a NaN would be NaN
    z = z.to(wide(z.dtype)).masked_fill(~counts[..., None], 0.0)
    loss = F.cross_entropy(
        z.flatten(0, 1),
        target.flatten(),
        ignore_index=padding,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return loss.view(n, length), counts


class CaptionLoss(nn.Module):
    """`caption_loss` with its settings remembered. Nothing is learnt.

    Processes. With a process group, "mean" is over the tokens of all processes and "sum" their sum, the same number on
    each; after DDP's averaging every gradient is that of one process with all captions, however many tokens each has,
    down to none on some. "none" is this process's own. All have to call the loss, and run its backward pass, equally
    often; second derivatives are for one process.

    Args:
        padding, label_smoothing, reduction: see `caption_loss`.
        gather: False for the captions of this process alone.

    >>> import torch
    >>> CaptionLoss()(torch.randn(4, 7, 30), torch.randint(30, (4, 8))).shape
    torch.Size([])
    """

    def __init__(
        self, *, padding: int = 0, label_smoothing: float = 0.0, reduction: str = "mean", gather: bool = True
    ) -> None:
        super().__init__()
        who = type(self).__name__
        _check_settings(who, padding, label_smoothing, reduction)
        self.padding, self.label_smoothing, self.reduction = padding, float(label_smoothing), reduction
        self.gather = check_processes(who, gather, {})

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing:g}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The loss of logits (N, L - 1, V) for ids (N, L); see `caption_loss`."""
        ranks = rank_and_size()[1] if self.gather else 1
        per_token, counts = _per_token("caption_loss", logits, ids, self.padding, self.label_smoothing, empty=ranks > 1)
        if ranks == 1 or self.reduction == "none":
            return reduce(per_token, self.reduction, counts)
        weight = torch.full((), float(ranks), device=per_token.device, dtype=per_token.dtype)
        if self.reduction == "mean":
            weight = weight / gather_rows(counts.sum()[None]).sum().clamp(min=1)
        return mean_of_parts(per_token.sum() * weight)


class CoCaLoss(nn.Module):
    """The two losses of CoCa: `criterion(*model(images, ids), ids)`.

        L = L_contrast + w L_caption

    `output_dict=True` gives the terms by name, "contrastive_loss" (and "m2mix_loss" or what else the contrast consists
    of) and "caption_loss" = w L_caption; their sum is the loss.

    Args:
        contrastive: called with image features, text features and scale, as open_clip's losses are; None for
            `ClipLoss`. `M2MixLoss` and its like add mixtures to the contrast.
        caption_weight: w, greater than 0; 2 in the paper, where the contrast has 1.
        padding, label_smoothing: see `caption_loss`.
        gather: whether the processes count their tokens together, see `CaptionLoss`; the contrast has its own setting.

    Raises:
        TypeError: a contrast that is no module.

    Reference: Yu et al. 2022, eq. 4 (arXiv:2205.01917).

    >>> import torch
    >>> ids = torch.randint(30, (4, 8))
    >>> CoCaLoss()(torch.randn(4, 16), torch.randn(4, 16), torch.randn(4, 7, 30), 14.0, ids).shape
    torch.Size([])
    """

    def __init__(
        self,
        contrastive: nn.Module | None = None,
        *,
        caption_weight: float = 2.0,
        padding: int = 0,
        label_smoothing: float = 0.0,
        gather: bool = True,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if contrastive is not None and not isinstance(contrastive, nn.Module):
            raise TypeError(f"{who}: contrastive is {_check.shown(contrastive)}; pass a loss such as ClipLoss().")
        self.caption_weight = _check.positive(who, "caption_weight", caption_weight)
        _check_settings(who, padding, label_smoothing, "mean")
        self.contrastive = ClipLoss(gather=gather) if contrastive is None else contrastive
        self.caption = CaptionLoss(padding=padding, label_smoothing=label_smoothing, gather=gather)

    def extra_repr(self) -> str:
        return f"caption_weight={self.caption_weight:g}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        logit_scale: Tensor | float,
        ids: Tensor,
        output_dict: bool = False,
        **options: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and logits (N, L - 1, V); `options` (generator, lam ...) are the contrast's."""
        terms = dict(self.contrastive(image_features, text_features, logit_scale, output_dict=True, **options))
        terms["caption_loss"] = self.caption_weight * self.caption(logits, ids)
        return terms if output_dict else torch.stack(list(terms.values())).sum()


def _check_settings(who: str, padding: object, label_smoothing: object, reduction: object) -> None:
    _check.integer(who, "padding", padding, 0)
    _check.between(who, "label_smoothing", label_smoothing, 0.0, 1.0)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
