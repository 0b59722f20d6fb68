"""Supervised contrast of embeddings with labels, optionally weighted by label distance."""

from __future__ import annotations

from torch import Tensor, nn

from hardmix.kernels.label_contrast import Contrast, label_windows
from hardmix.losses._rows import labelled_rows
from hardmix.losses.supremix import check_options, contrast_of_sorted, label_weight, sorted_labels


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    weighting: str = "none",
    label_scale: float = 1.0,
    label_tolerance: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrast: rows with the anchor's label are pulled, all others pushed.

        l_i = -1 / |P_i| sum_{a in P_i} log( exp(s_ia / t) / sum_{b != i} w(|y_i - y_b|) exp(s_ib / t) ),   s = cosine

    P_i holds the other rows with y_a = y_i. w is 1, or one of the shapes of `supremix_loss`, of which this is the form
    without mixtures. Arguments, edges, errors and cost as there; the default temperature is the paper's.

    Reference: Khosla et al. 2020, eq. 2, "out" form (arXiv:2004.11362). An anchor without a positive is skipped, where
    public code divides 0 by 0.

    >>> import torch
    >>> round(supcon_loss(torch.eye(4), torch.tensor([0, 0, 1, 1])).item(), 4)   # three equal cosines: log 3
    1.0986
    """
    who = "supcon_loss"
    check_options(who, None, temperature, (1.0, 1.0), weighting, label_scale, label_tolerance, False, reduction)
    x = labelled_rows(who, embeddings, labels)
    y, order = sorted_labels(x, label_tolerance)
    contrast = Contrast(
        labels=y,
        windows=label_windows(y, 0.0),
        temperature=temperature,
        weight=label_weight(weighting, label_scale),
    )
    return contrast_of_sorted(x, order, contrast, reduction)


class SupConLoss(nn.Module):
    """`supcon_loss` with its settings remembered. Nothing is learnt."""

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        weighting: str = "none",
        label_scale: float = 1.0,
        label_tolerance: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        check_options(who, None, temperature, (1.0, 1.0), weighting, label_scale, label_tolerance, False, reduction)
        self.temperature = temperature
        self.weighting = weighting
        self.label_scale = label_scale
        self.label_tolerance = label_tolerance
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, weighting={self.weighting!r}"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) or (N, V, D) with labels (N,); see `supcon_loss`."""
        return supcon_loss(
            embeddings,
            labels,
            temperature=self.temperature,
            weighting=self.weighting,
            label_scale=self.label_scale,
            label_tolerance=self.label_tolerance,
            reduction=self.reduction,
        )
