"""Decoupled Mixup one row and one class at a time, in float64, written from the paper."""

from __future__ import annotations

import math

import numpy as np


def log_sum_exp(values: list[float]) -> float:
    if not values:
        return -math.inf
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def mixed_row(
    logits: np.ndarray,
    labels: list[int],
    weights: list[float],
    *,
    eta: float = 0.0,
    asymmetric: bool = False,
    class_weight: np.ndarray | None = None,
    smoothing: float = 0.0,
) -> float:
    """Cross entropy of the mixed label and eta times the regulariser of one sample."""
    num_classes = len(logits)
    wanted = [0.0] * num_classes
    for label, weight in zip(labels, weights, strict=True):
        wanted[label] += weight
    wanted = [(1.0 - smoothing) * y + smoothing / num_classes for y in wanted]
    return dense_row(logits, wanted, class_weight) + eta * regulariser(logits, labels, asymmetric)


def dense_row(logits: np.ndarray, wanted: list[float], class_weight: np.ndarray | None = None) -> float:
    z = [float(v) for v in logits]
    loss = []
    for c, y in enumerate(wanted):
        if y != 0.0:
            # -log p_c with the own class taken out of the sum, so that a tiny value keeps its digits
            rest = log_sum_exp([v for k, v in enumerate(z) if k != c])
            term = y * softplus(rest - z[c])
            loss.append(term if class_weight is None else term * float(class_weight[c]))
    return math.fsum(loss)


def regulariser(logits: np.ndarray, labels: list[int], asymmetric: bool = False) -> float:
    """sum over the mixed classes i of -log of softmax_i when the other mixed classes are taken away."""
    mixed = set(labels)
    if len(mixed) < 2:
        return 0.0
    z = [float(v) for v in logits]
    terms = []
    for i in {labels[0]} if asymmetric else mixed:
        rest = [v for c, v in enumerate(z) if c not in mixed]
        terms.append(softplus(log_sum_exp(rest) - z[i]))
    return math.fsum(terms)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def rescale(share: float, xi: float, t: float) -> float:
    if share == 0.0:
        return 0.0
    return 1.0 if share >= xi else (share / xi) ** t


def bce_row(logits: np.ndarray, wanted: list[float], class_weight: np.ndarray | None = None) -> float:
    """-sum_c y log sigmoid(z) + (1 - y) log sigmoid(-z)"""
    terms = []
    for c, y in enumerate(wanted):
        z = float(logits[c])
        term = y * softplus(-z) + (1.0 - y) * softplus(z)
        terms.append(term if class_weight is None else term * float(class_weight[c]))
    return math.fsum(terms)
