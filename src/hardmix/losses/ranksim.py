"""RankSim: an anchor's neighbours ranked by their features as they rank by their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import TIE, first_only, refuse_transforms, unit
from hardmix.losses._rows import labelled_rows, reduce_anchors

REDUCTIONS = ("none", "mean", "sum")


def ranksim_loss(features: Tensor, labels: Tensor, *, step: float = 2.0, reduction: str = "mean") -> Tensor:
    """RankSim: whoever is nearer to the anchor by label should be nearer by feature.

        l_i = 1 / n sum_j ( rk_j(s_i) / n - rk_j(-|y_i - y_.|) / n )^2,     s_ij = cos(x_i, x_j)
        rk_j(a) = 1 + #{k: a_k > a_j},     i, j, k over n rows of n distinct labels, the anchor among them

    where a cosine that is larger by no more than 1e-6, in float64 1e-14, is not larger: rounding makes that of equal
    ones.

    Of the rows with one label the first is taken, so that frequent labels count no more than rare ones. A rank is
    constant almost everywhere. What stands in for its derivative compares two ranks: with g the gradient that arrives
    at rk(s) / n, the one that s receives is -(rk(s) - rk(s + step g)) / (n step).

    That is not linear in g. Twice the loss is not twice the gradient, and a larger g reorders more: the weight of this
    term, the reduction and the loss scale of mixed precision all decide what is reordered.

    Args:
        features: (N, D), any float dtype and length; cosines and ranks are formed in float32 or wider.
        labels: (N,) numbers, integers or floats. They are read on the host, where a GPU is waited for.
        step: how far the second ranking moves along g, more than 0. Small ones see the nearest swaps alone, large ones
            blur the gradient.
        reduction: "mean" over the n rows, "sum" of them, as in the paper, whose weight of 100 belongs to the sum; or
            "none".

    Returns:
        Scalar; for "none" (N,), 0 where an earlier row has the same label. Equal values share the best of their ranks:
        labels a and b at one distance from the anchor (in float64) are wanted at one place, which no two cosines take
        unless they are equal, so evenly spaced labels leave a little loss. One distinct label, or N = 1: 0, with a
        gradient of zeros. A row of zeros has cosine 0 with all, itself too. NaN gives NaN. First derivatives only.

    Raises:
        TypeError: integer features, a setting of another kind.
        ValueError: shapes or devices disagree, an empty batch, labels that are not finite, a setting out of its range.

    Reference: Gong et al. 2022, "RankSim" (arXiv:2205.15236). The authors' code draws the row of a label at random, and
    orders equal values as the sort happens to leave them.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])   # the first two rank the others the wrong way round
    >>> round(ranksim_loss(x, torch.tensor([0.0, 1.0, 3.0]), reduction="sum").item(), 4)   # 4 / 3^3
    0.1481
    """
    who = "ranksim_loss"
    _check_options(who, step, reduction)
    # Only the first row of a label is used, so views of a sample would be left out in silence: there are none.
    x = labelled_rows(who, features, labels, name="features", views=False)
    refuse_transforms("ranksim_loss: ranks")
    order = x.labels.argsort(stable=True)
    y = x.labels[order]
    first = torch.ones_like(y, dtype=torch.bool)
    first[1:] = y[1:] != y[:-1]
    device = x.z.device
    chosen, y = order[first].to(device), y[first].to(device)
    with torch.autocast(device.type, enabled=False):
        z = unit(x.z[chosen])
        wanted = _ranks(-(y[:, None] - y).abs(), 0.0).to(z.dtype)
        loss = (_Ranks.apply(z @ z.T, step) - wanted).square().mean(1)
    valid = torch.zeros(len(order), dtype=torch.bool, device=device).index_fill(0, chosen, True)
    return reduce_anchors(loss.new_zeros(len(order)).index_copy(0, chosen, loss), valid, x.shape, reduction)


class RankSimLoss(nn.Module):
    """`ranksim_loss` with its settings remembered. Nothing is learnt.

    >>> import torch
    >>> RankSimLoss()(torch.randn(16, 8), torch.arange(16.0)).shape
    torch.Size([])
    """

    def __init__(self, *, step: float = 2.0, reduction: str = "mean") -> None:
        super().__init__()
        _check_options(type(self).__name__, step, reduction)
        self.step = step
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"step={self.step:g}, reduction={self.reduction!r}"

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of features (N, D) with labels (N,); see `ranksim_loss`."""
        return ranksim_loss(features, labels, step=self.step, reduction=self.reduction)


def _check_options(who: str, step: float, reduction: str) -> None:
    _check.positive(who, "step", step)
    _check.choice(who, "reduction", reduction, REDUCTIONS)


def _ranks(values: Tensor, tie: float) -> Tensor:
    """Rank of each value (n, n) in its row, over n: 1 / n for the largest, and NaN throughout a row that holds one.
    Values that are greater by no more than `tie` are not."""
    n = values.shape[1]
    not_greater = torch.searchsorted(values.sort(1).values, (values + tie).contiguous(), right=True)
    ranks = (1 + n - not_greater).to(values.dtype) / n
    return ranks.masked_fill(values.isnan().any(1, keepdim=True), torch.nan)


class _Ranks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, step: float) -> Tensor:
        ranks = _ranks(values, TIE[values.dtype])
        ctx.save_for_backward(values, ranks)
        ctx.step = step
        return ranks

    @staticmethod
    @first_only("ranksim_loss: ranks have first derivatives only; leave out a penalty on gradients.")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, ranks = ctx.saved_tensors
        return (_ranks(values + ctx.step * grad, TIE[values.dtype]) - ranks) / ctx.step, None
