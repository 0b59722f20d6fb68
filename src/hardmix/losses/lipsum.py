"""Lipsum-FT: a tuned image encoder answers to texts of no meaning as it did before."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, reduce, unit, wide
from hardmix.losses._features import feature_rows
from hardmix.losses.clip import REDUCTIONS, one_number
from hardmix.mixing.draw import cpu_generator


def lipsum_loss(
    image_features: Tensor,
    reference_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
) -> Tensor:
    """The energy gap between a tuned image encoder and its zero-shot original, over random texts.

        l_i = 1/(2 K) sum_k (s a_i . t_k - s a0_i . t_k)^2

    It stands beside the loss of the task, with a weight of 1 in the authors' code. The reference and the texts are
    constants: frozen encoders make them.

    Args:
        image_features: (N, D) of the encoder that is tuned. Any float dtype and length; rows are normalised.
        reference_features: (N, D) of the same images, from the encoder as it was before.
        text_features: (K, D) of random texts, new at every step; see `random_tokens`.
        logit_scale: s, the original's, greater than 0: a number or a tensor of one element.
        reduction: "mean" over the images, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider; 0 where the features are those of the original. Differences are
        taken before the products, so that a small gap keeps its digits. A row of zeros has the energies 0.

    Raises:
        TypeError: not tensors, integer features, a scale of another kind.
        ValueError: numbers of rows or columns, or devices, disagree; an empty batch; on the CPU also NaN or infinity in
            the features, named by row, and a scale that is not positive.

    Reference: Nam et al. 2024 (arXiv:2404.00860).

    >>> import torch
    >>> one = torch.eye(2)
    >>> lipsum_loss(one, one.flip(0), one, 4.0)   # each energy is off by 4
    tensor(8.)
    """
    who = "lipsum_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    image = feature_rows(who, "image_features", image_features)
    like = ("image_features", image)
    reference = feature_rows(who, "reference_features", reference_features, like)
    text = feature_rows(who, "text_features", text_features, like, rows=False)
    a, a0, t = (unit(x.to(wide(image.dtype))) for x in (image, reference.detach(), text.detach()))
    scale = one_number(who, "logit_scale", logit_scale, a)
    with torch.autocast(a.device.type, enabled=False):
        gap = scale * ((a - a0) @ t.T)  # (N, K)
    return reduce(0.5 * gap.square().mean(1), reduction)


class LipsumLoss(nn.Module):
    """`lipsum_loss` with its setting remembered. Nothing is learnt.

    >>> import torch
    >>> LipsumLoss()(torch.randn(8, 16), torch.randn(8, 16), torch.randn(80, 16), 100.0).shape
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
        reference_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
    ) -> Tensor:
        """The loss of features (N, D), (N, D) and (K, D); see `lipsum_loss`."""
        return lipsum_loss(image_features, reference_features, text_features, logit_scale, reduction=self.reduction)


def random_tokens(
    count: int = 80,
    length: int = 8,
    *,
    start: int = 49406,
    end: int = 49407,
    generator: Generator | None = None,
) -> Tensor:
    """Texts of no meaning, as token ids: (count, length + 2) long, between a start and an end token.

    Ids are drawn evenly from 0 to start - 1, which in CLIP's vocabulary are all but the two special ones. Pad them to
    the length that the text encoder wants.

    Args:
        count: how many texts, K.
        length: tokens of each.
        start, end: ids of the special tokens; CLIP's.
        generator: CPU generator of the draw; None takes torch's global one.

    Raises:
        TypeError, ValueError: not integers, none at all, a generator of another kind.

    Reference: Nam et al. 2024 (arXiv:2404.00860), whose code has these numbers.

    >>> random_tokens().shape
    torch.Size([80, 10])
    """
    who = "random_tokens"
    size = (_check.integer(who, "count", count, 1), _check.integer(who, "length", length, 1))
    _check.integer(who, "start", start, 1)
    _check.integer(who, "end", end, 0)
    drawn = torch.randint(start, size, generator=cpu_generator(who, generator), device=CPU)
    return torch.cat((drawn.new_full((count, 1), start), drawn, drawn.new_full((count, 1), end)), 1)
