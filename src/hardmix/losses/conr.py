"""ConR: contrast between samples that a model takes for neighbours although their labels are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import unit
from hardmix.losses._rows import labelled_rows, reduce_anchors

REDUCTIONS = ("none", "mean", "sum")


def conr_loss(
    embeddings: Tensor,
    labels: Tensor,
    predictions: Tensor,
    *,
    temperature: float = 0.07,
    window: float = 1.0,
    eta: float = 0.01,
    reduction: str = "mean",
) -> Tensor:
    """ConR: pull rows with near labels, push those with far labels that are predicted to be near.

        l_i = -1 / |P_i| sum_{a in P_i} log( exp(s_ia / t) / D_i ),     s = cosine
        D_i = sum_{b in P_i} exp(s_ib / t) + sum_{b in Q_i} exp(eta |y_i - y_b|) exp(s_ib / t)
        P_i = other rows with |y_i - y_b| <= window
        Q_i = rows with |y_i - y_b| > window and |p_i - p_b| <= window,     p = the model's predictions

    A row whose label and prediction are both far is in neither set: nothing is to be said about it.

    Args:
        embeddings: (N, D), or (N, V, D) with V views of each sample, which count as rows of their own. Any float dtype
            and length; rows are normalised, and sums are done in float32 or wider.
        labels: (N,) numbers, integers or floats. They are read on the host, where a GPU is waited for.
        predictions: what the model predicts from each row, in the labels' unit: (N,), or (N, V) where there are views.
            A last axis of 1 is dropped. They choose the negatives and receive no gradient.
        temperature: t.
        window: the distance, at least 0, up to which two labels, or two predictions, count as the same.
        eta: how much more a negative counts per unit of label distance, at least 0.
        reduction: "mean" over the anchors with a positive and a negative, "sum", or "none".

    Returns:
        Scalar; for "none" (N,), or (N, V). An anchor without a negative has nothing to be told from, one without a
        positive nothing to be drawn to: loss 0, not part of the mean, though others still meet it. No anchor with both
        (N = 1, all labels within the window, predictions that keep all far labels apart): 0, with a gradient of zeros.
        Rows of zeros have cosine 0 with all. NaN gives NaN, in predictions too where labels are far, and so
        does infinity.

    Raises:
        TypeError: integer embeddings, a setting of another kind.
        ValueError: shapes or devices disagree, an empty batch, labels that are not finite, a setting out of its range.

    Reference: Keramati et al. 2024, "ConR" (arXiv:2309.06651), whose age experiments add 4 times this to the regression
    loss. In the authors' code every row that is no positive adds exp(0) to D_i, an anchor with negatives and no
    positive gives NaN, and the mean is over all anchors, those without a negative included. The weight of a sample, 1
    there unless rare labels are weighted up, is left out.

    >>> import torch
    >>> y, p = torch.tensor([1.0, 1.5, 9.5]), torch.tensor([1.0, 8.0, 8.5])   # the second is mistaken for the third
    >>> round(conr_loss(torch.eye(3), y, p).item(), 4)                        # log(1 + exp(0.01 x 8))
    0.7339
    """
    who = "conr_loss"
    _check_options(who, temperature, window, eta, reduction)
    x = labelled_rows(who, embeddings, labels)
    p = _prediction_rows(who, predictions, x.shape, x.z.device)
    y = x.labels.to(x.z.device)
    with torch.autocast(x.z.device.type, enabled=False):
        z = unit(x.z)
        logits = z @ z.T / temperature
        distance = (y[:, None] - y).abs()  # in float64, since labels may be large and close
        doubt = (p[:, None] - p).abs()
        positive = (distance <= window).fill_diagonal_(False)
        negative = (distance > window) & ~(doubt > window)  # a NaN is taken in, and handed on
        count = positive.sum(1)
        valid = (count > 0) & negative.any(1)
        push = (eta * distance).masked_fill(doubt.isnan(), torch.nan).to(z.dtype)
        terms = torch.where(negative, logits + push, logits.masked_fill(~positive, -torch.inf))
        # logsumexp of nothing has no derivative: an anchor that is left out gets numbers instead.
        total = terms.masked_fill(~valid[:, None], 0.0).logsumexp(1)
        loss = total - (logits * positive).sum(1) / count.clamp(min=1)
    return reduce_anchors(loss.masked_fill(~valid, 0.0), valid, x.shape, reduction)


class ConRLoss(nn.Module):
    """`conr_loss` with its settings remembered. Nothing is learnt.

    >>> import torch
    >>> ConRLoss(window=2.0)(torch.randn(16, 2, 8), torch.arange(16.0), torch.randn(16, 2)).shape
    torch.Size([])
    """

    def __init__(
        self, *, temperature: float = 0.07, window: float = 1.0, eta: float = 0.01, reduction: str = "mean"
    ) -> None:
        super().__init__()
        _check_options(type(self).__name__, temperature, window, eta, reduction)
        self.temperature = temperature
        self.window = window
        self.eta = eta
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, window={self.window:g}, eta={self.eta:g}"

    def forward(self, embeddings: Tensor, labels: Tensor, predictions: Tensor) -> Tensor:
        """The loss of embeddings (N, D) or (N, V, D) with labels (N,) and predictions (N,) or (N, V)."""
        return conr_loss(
            embeddings,
            labels,
            predictions,
            temperature=self.temperature,
            window=self.window,
            eta=self.eta,
            reduction=self.reduction,
        )


def _check_options(who: str, temperature: float, window: float, eta: float, reduction: str) -> None:
    _check.positive(who, "temperature", temperature)
    _check.non_negative(who, "window", window)
    _check.non_negative(who, "eta", eta)
    _check.choice(who, "reduction", reduction, REDUCTIONS)


def _prediction_rows(who: str, predictions: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """One float64 number per row (M,), view after view like the rows."""
    p = _check.tensor(who, "predictions", predictions)
    _check.same_length(who, "predictions", p, "embeddings", shape[0])
    _check.same_device(who, "predictions", p, "embeddings", device)
    given = tuple(p.shape)
    if given == (*shape, 1):
        p = p[..., 0]
    if p.shape != shape or p.is_complex() or p.dtype == torch.bool:
        raise ValueError(
            f"{who}: predictions has shape {given} and dtype {p.dtype}; pass one number per row of embeddings, "
            f"shape {shape}."
        )
    p = p.detach().to(torch.float64).T.flatten() if p.ndim == 2 else p.detach().to(torch.float64)
    return p.where(p.isfinite(), torch.nan)  # infinitely far from all, it would leave without a word
