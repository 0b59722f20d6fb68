"""Rank-N-Contrast: contrastive regression in which every row is a positive, against the rows farther off in label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.kernels.rank_contrast import rank_contrast
from hardmix.losses._rows import labelled_rows, reduce_anchors

REDUCTIONS = ("none", "mean", "sum")


def rank_n_contrast_loss(
    embeddings: Tensor, labels: Tensor, *, temperature: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """Rank-N-Contrast: bring the embeddings into the order of their labels.

        l_i  = -1 / (M - 1) sum_{j != i} log( exp(s_ij / t) / sum_{k != i, d_ik >= d_ij} exp(s_ik / t) )
        s_ij = -||z_i - z_j||_2                      d_ij = sum_p |y_ip - y_jp|

    Each other row in turn should be nearer to the anchor than all rows whose labels are as far off or farther. The
    embeddings are compared as they are: they are not normalised. Cost is 4 M^2 D for the products (8 above 1,024 rows)
    and a sort of the label distances per anchor, O(M^2 log M); memory is that of one M x M matrix up to 1,024 rows and
    grows with M above. Rows are compared with all rows of the batch; processes do not exchange theirs.

    Args:
        embeddings: (N, D), or (N, V, D) with V views of each sample, which count as rows of their own, M = N V rows in
            all. Any float dtype; sums are done in float32 or wider.
        labels: (N,) numbers, or (N, P). They are read on the host, where a GPU is waited for, and compared in float64.
        temperature: t, in the unit of the distances.
        reduction: "mean" over the anchors, "sum", or "none".

    Returns:
        Scalar; for "none" (N,), or (N, V). Rows at one label distance share a denominator; another view of the sample
        is at distance 0 and compared with all. Two rows: one candidate per anchor, loss 0. A row far from all others
        gives a finite loss, as long as squares of distances are finite. Rows that coincide have distance 0 and give it
        a gradient of 0. NaN gives NaN. First derivatives only.

    Raises:
        TypeError: integer embeddings, a setting of another kind.
        ValueError: shapes or devices disagree, fewer than two rows, labels that are not finite, a setting out of its
            range.

    Reference: Zha et al. 2023, "Rank-N-Contrast", eq. 2 (arXiv:2210.01189). The released code takes two views and has
    these values, but holds all differences of rows and M masks of M x M, and its exponents are relative to the distance
    of a row to itself: a row a hundred temperatures from all others makes it infinite in float32.

    >>> import torch
    >>> z = torch.eye(3)
    >>> round(rank_n_contrast_loss(z, torch.tensor([0.0, 1.0, 3.0])).item(), 4)   # equal distances: half of log 2
    0.3466
    """
    who = "rank_n_contrast_loss"
    _check_options(who, temperature, reduction)
    z, y, shape = _rows(who, embeddings, labels)
    loss = rank_contrast(z, y, float(temperature))
    return reduce_anchors(loss, torch.ones_like(loss, dtype=torch.bool), shape, reduction)


class RankNContrastLoss(nn.Module):
    """`rank_n_contrast_loss` with its settings remembered. Nothing is learnt.

    >>> import torch
    >>> RankNContrastLoss()(torch.randn(16, 2, 8), torch.arange(16.0)).shape
    torch.Size([])
    """

    def __init__(self, *, temperature: float = 2.0, reduction: str = "mean") -> None:
        super().__init__()
        _check_options(type(self).__name__, temperature, reduction)
        self.temperature = temperature
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) or (N, V, D) with labels (N,) or (N, P); see `rank_n_contrast_loss`."""
        return rank_n_contrast_loss(embeddings, labels, temperature=self.temperature, reduction=self.reduction)


def _check_options(who: str, temperature: float, reduction: str) -> None:
    _check.positive(who, "temperature", temperature)
    _check.choice(who, "reduction", reduction, REDUCTIONS)


def _rows(who: str, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Rows (M, D), view after view, their labels (M, P) in float64 on the CPU, and the shape of a value per anchor."""
    y = _check.tensor(who, "labels", labels)
    if y.ndim not in (1, 2) or 0 in y.shape[1:] or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"{who}: labels has shape {tuple(y.shape)} and dtype {y.dtype}; pass numbers, shape (N,) or (N, P)."
        )
    y = y.detach().double()
    columns = y[:, None] if y.ndim == 1 else y
    # One number per sample that is finite where all of its labels are: the helper checks it and all the rest.
    x = labelled_rows(who, embeddings, torch.where(columns.isfinite().all(1), 0.0, torch.nan))
    if len(x.z) < 2:
        raise ValueError(
            f"{who}: embeddings has shape {tuple(embeddings.shape)}, a single row; pass two rows or more, an anchor is "
            "compared with the others."
        )
    return x.z, columns.cpu().repeat(len(x.z) // len(columns), 1), x.shape
