"""What semi-supervised methods do with predictions: pure functions on probabilities (N, C) and confidences (N,).

None of them keeps anything; what a method remembers between steps is in its own registered buffers. All compute in
float32 (float64 for float64), whatever the dtype of the input, and none waits for a device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix._math import wide

#: how UDA's threshold on labelled samples may rise
SCHEDULES = ("none", "linear", "log", "exp")


def threshold_value(who: str, name: str, value: object) -> float:
    """A threshold on a confidence, in (0, 1]."""
    number = _check.between(who, name, value, 0.0, 1.0)
    if number == 0.0:
        raise ValueError(
            f"{who}: {name} is {value!r}; pass a number above 0 and at most 1, 1 / classes or more to act."
        )
    return number


def probabilities(logits: Tensor) -> Tensor:
    """softmax(z), (N, C), without gradient."""
    return logits.detach().to(wide(logits.dtype)).softmax(1)


def confidence(probs: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) largest probability and (N,) its class; of equal ones the first."""
    largest = probs.max(1)
    return largest.values, largest.indices


def confidence_mask(confidence: Tensor, threshold: float | Tensor) -> Tensor:
    """1 where a confidence is at least the threshold (a number, or (N,) one for each row), else 0. (N,)

    NaN stays NaN: a prediction that went wrong is not one that is unsure.
    """
    return torch.where(confidence.isnan(), confidence, (confidence >= threshold).to(confidence.dtype))


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    """p_c^(1/T) / sum_k p_k^(1/T): T = 1 leaves p as it is, T to 0 makes it one-hot. Rows of p sum to one.

    Computed from logarithms: small temperatures underflow nowhere but where the result is 0.
    """
    _check.positive("sharpen", "temperature", temperature)
    p = probs.to(wide(probs.dtype))
    return (p.log() / temperature).softmax(1)


def align_distribution(probs: Tensor, predicted: Tensor, wanted: Tensor) -> Tensor:
    """Distribution alignment: p_c wanted_c / predicted_c, each row scaled to sum to one.

    Args:
        probs: (N, C).
        predicted: (C,) mean prediction of the model so far.
        wanted: (C,) distribution of the classes, of the labelled samples or uniform.
    A class that was never predicted counts as one of the smallest positive float. A row of which nothing is left, since
    it lies on classes that are not wanted, stays as it was. Reference: Berthelot et al. 2020, section 3.1
    (arXiv:1911.09785).
    """
    p = probs.to(wide(probs.dtype))
    ratio = wanted / predicted.clamp(min=torch.finfo(predicted.dtype).tiny)
    aligned = p * ratio.clamp(max=torch.finfo(ratio.dtype).max / p.shape[1])
    total = aligned.sum(1, keepdim=True)
    return torch.where(total > 0, aligned / total, p)


def moving_average(average: Tensor, value: Tensor, momentum: float) -> Tensor:
    """m average + (1 - m) value."""
    return torch.lerp(value.to(average.dtype), average, momentum)


def class_mean(classes: Tensor, num_classes: int) -> Tensor:
    """(C,) share of each class among (N,) class ids."""
    one_hot = F.one_hot(classes, num_classes)
    return one_hot.to(torch.float32).mean(0)


def truncated_gaussian(confidence: Tensor, mean: Tensor, variance: Tensor, width: float = 2.0) -> Tensor:
    """Soft weight of a confidence: 1 from the mean on, below it exp(-(c - mean)^2 width^2 / (2 variance)). (N,)

    A variance below 1e-12 counts as that. Reference: Chen et al. 2023, eq. 7 (arXiv:2301.10921); their release divides
    the variance by width^2 = 4.
    """
    below = (confidence - mean).clamp(max=0.0)
    # Equal confidences may miss their mean by a rounding of float32, 1e-7, which is no reason to drop them all.
    return torch.exp(-0.5 * below.square() * width**2 / variance.clamp(min=1e-12))


def convex_map(x: Tensor) -> Tensor:
    """x / (2 - x), from 0 to 1 on [0, 1]: FlexMatch's mapping of how well a class is learnt."""
    return x / (2.0 - x)


def signal_annealing(progress: float, num_classes: int, schedule: str) -> float:
    """UDA's threshold on labelled samples, from 1/C at progress 0 to 1 at the end; "none" gives 1.

        a (1 - 1/C) + 1/C,   a = progress | 1 - exp(-5 progress) | exp(5 (progress - 1))   (linear, log, exp)

    Reference: Xie et al. 2020, section 3.3 (arXiv:1904.12848).
    """
    _check.choice("signal_annealing", "schedule", schedule, SCHEDULES)
    if schedule == "none":
        return 1.0
    share = {
        "linear": progress,
        "log": 1.0 - math.exp(-5.0 * progress),
        "exp": math.exp(5.0 * (progress - 1.0)),
    }[schedule]
    return share * (1.0 - 1.0 / num_classes) + 1.0 / num_classes


def cosine_ramp(progress: float, length: float) -> float:
    """From 0 to 1 along half a cosine in the first `length` of the training, 1 after it; with length 0 always 1."""
    if progress >= length:
        return 1.0
    return 0.5 * (1.0 - math.cos(math.pi * progress / length))


def linear_ramp(progress: float, length: float) -> float:
    """From 0 to 1 along a line in the first `length` of the training, 1 after it; with length 0 always 1."""
    return 1.0 if progress >= length else progress / length


def sigmoid_ramp(progress: float, length: float) -> float:
    """exp(-5 (1 - progress / length)^2), from 0.007 to 1 in the first `length` of the training, 1 after it; with length
    0 always 1. Reference: Tarvainen and Valpola 2017, appendix B (arXiv:1703.01780).
    """
    return 1.0 if progress >= length else math.exp(-5.0 * (1.0 - progress / length) ** 2)
