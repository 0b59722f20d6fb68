"""Does confidence mean what it says, and does one number mend it? Equal-mass calibration error, temperature scaling.

torchmetrics has the calibration error over equal-width bins only, and nothing that fits a temperature; the libraries
that have both (netcal, torch-uncertainty) bring pyro or torchvision along for these few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hardmix import _check
from hardmix.metrics.classification import _probs_and_labels, classification_metrics, reliability

#: Temperatures that are looked at; a fit that wants to leave this range is cut off at its end.
COLDEST, HOTTEST = 0.01, 100.0


def adaptive_calibration_error(probs: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Calibration error over bins that hold the same number of samples.

        error = sum_b (count_b / N) |accuracy_b - confidence_b|,   sample i in bin floor(B rank_i / N)

    rank_i is the number of samples that are less confident than i. Equal-width bins put most samples of a good
    classifier into the last one; here each bin has its share of the samples.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class ids.
        bins: B; with fewer samples than bins each sample is a bin of its own.
    Returns:
        Python float. Equal confidences share a bin, so the order of the samples doesn't matter, and a model of constant
        confidence has |accuracy - confidence|.
    Raises:
        ValueError: sizes disagree, rows are not probabilities, a class is out of range.
    Reference: Nguyen and O'Connor 2015 (arXiv:1508.05154), who take the root of the mean square instead.

    >>> adaptive_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
    0.25
    """
    who = "adaptive_calibration_error"
    bins = _check.integer(who, "bins", bins, 1)
    probs, labels = _probs_and_labels(who, probs, labels, 1)
    count = probs.shape[0]
    confidence, predicted = probs.max(1)
    confidence, hit = confidence.cpu().double(), (predicted == labels).cpu().double()
    rank = torch.searchsorted(confidence.sort().values, confidence)  # the first of equal ones
    gap = torch.bincount(rank * bins // count, weights=hit - confidence, minlength=bins)
    return gap.abs().sum().item() / count


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes softmax(logits / T) most likely.

        T = argmin_T -mean_i log softmax(z_i / T)[y_i]

    The loss is convex in b = 1 / T with the slope mean_i (sum_c p_ic z_ic - z_i[y_i]), so its root is found by Newton's
    method in float64, kept inside a bracket that is halved where a step would leave it: no learning rate, no tolerance
    to choose, and the same answer every time.

    Args:
        logits: (N, C) of samples that the model was **not** trained on: the validation split, not the test split.
        labels: (N,) class ids.
    Returns:
        T, between 0.01 and 100. Above 1 the model was too sure of itself. Where every sample is right, ever colder is
        ever better and 0.01 is returned; where the logits say nothing (equal in every row), 1.
    Raises:
        ValueError: sizes disagree, logits are not finite, a class is out of range.
    Reference: Guo et al. 2017, section 4.2 (arXiv:1706.04599).
    """
    z, y = _logits_and_labels("fit_temperature", logits, labels)
    z = z - z.gather(1, y[:, None])  # shifts of a row change no probability, and z_i[y_i] is 0 now

    def slope(inverse: float) -> tuple[float, float]:
        p = (z * inverse).softmax(1)
        mean = (p * z).sum(1)
        return mean.mean().item(), ((p * z.square()).sum(1) - mean.square()).mean().item()

    return best_temperature(slope)


def best_temperature(slope: Callable[[float], tuple[float, float]], *, tolerance: float = 1e-14) -> float:
    """The temperature T at which a loss that is convex in b = 1 / T is least; see `fit_temperature`.

    Args:
        slope: the first and second derivative of the loss at b.
        tolerance: a step that changes b by no more than this share of it is the last.
    Returns:
        T, between 0.01 and 100: the end that the loss falls towards, or 1 where it is flat.
    """
    low, high = 1.0 / HOTTEST, 1.0 / COLDEST
    if slope(low)[0] >= 0.0:
        if slope(high)[0] > 0.0:
            return HOTTEST
        # Flat in between: the logits are equal, or so far apart that only at b = 0 they are not all sure and right.
        return COLDEST if slope(0.0)[0] < 0.0 else 1.0
    if slope(high)[0] <= 0.0:
        return COLDEST
    inverse = 1.0
    for _ in range(200):
        value, curvature = slope(inverse)
        low, high = (low, inverse) if value > 0.0 else (inverse, high)
        step = inverse - value / curvature if curvature > 0.0 else math.nan
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - inverse) <= tolerance * inverse:
            break
        inverse = following
    return 1.0 / inverse


def calibration_metrics(logits: Tensor, labels: Tensor, temperature: float = 1.0, *, bins: int = 15) -> dict[str, Any]:
    """How sure and how right softmax(logits / temperature) is.

    Args:
        logits: (N, C).
        labels: (N,) class ids.
        temperature: from `fit_temperature`; 1 leaves the model as it is. Accuracy doesn't depend on it.
    Returns:
        dict with nll, ece, adaptive_ece, and the `reliability` diagram over equal-width bins.
    """
    who = "calibration_metrics"
    temperature = _check.positive(who, "temperature", temperature)
    _check.integer(who, "bins", bins, 1)
    z, y = _logits_and_labels(who, logits, labels)
    probs = (z / temperature).softmax(1)
    measured = classification_metrics(probs, y, bins=bins)
    return {
        "nll": measured["nll"],
        "ece": measured["ece"],
        "adaptive_ece": adaptive_calibration_error(probs, y, bins=bins),
        "reliability": reliability(probs, y, bins=bins),
    }


def _logits_and_labels(who: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both checked, values included, on the CPU: logits in float64, labels long."""
    logits = _check.batch(who, "logits", logits, 2, 2)
    labels = _check.tensor(who, "labels", labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{who}: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass (N,) integer class ids."
        )
    _check.same_length(who, "labels", labels, "logits", logits.shape[0])
    z, y = logits.detach().cpu().double(), labels.cpu().long()
    if z.shape[1] < 2:
        raise ValueError(f"{who}: logits has 1 column; pass (N, C) logits of at least two classes.")
    if not bool(torch.isfinite(z).all()):
        raise ValueError(f"{who}: logits holds NaN or infinity; pass finite logits.")
    _check.classes_in_range(who, "labels", y, z.shape[1])
    return z, y
