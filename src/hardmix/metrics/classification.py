"""How good, how sure and how fair to both halves: accuracy, calibration and hard mixed samples.

Evaluation functions take probabilities, never logits, and read values (they wait for a device): call them once an
evaluation. `mixed_accuracy` is the one for the training step and reads nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hardmix import _check
from hardmix.mixing.target import MixedTarget

#: Half types round each of C probabilities, so their rows need not sum to one more closely than this.
ROW_SUM_TOLERANCE = 1e-2


def classification_metrics(probs: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, float]:
    """Top-1 and top-5 accuracy, negative log-likelihood and expected calibration error.

        top_k = mean_i [label_i among the k largest of p_i]       nll = -mean_i log p_i[label_i]
        ece = sum_b (count_b / N) |accuracy_b - confidence_b|     over equal-width bins of max_c p_i[c]

    Args:
        probs: (N, C) probabilities of C >= 2 classes, rows that sum to one; logits are refused.
        labels: (N,) class ids.
        bins: number of bins of the calibration error.
    Returns:
        dict with top1, top5 (the 5 is C where there are fewer classes), nll in nats and ece, as Python floats. A right
        class with probability 0 counts as the smallest normal number of the dtype, so that nll stays finite.
    Raises:
        ValueError: sizes disagree, rows are not probabilities, a class is out of range.
    Reference: Guo et al. 2017, eq. 3 (arXiv:1706.04599). torchmetrics puts a confidence of exactly 1 into a bin of its
    own; here the last bin is closed, so that ece is the number that the reliability diagram shows.

    >>> probs = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    >>> {k: round(v, 4) for k, v in classification_metrics(probs, torch.tensor([0, 0])).items()}
    {'top1': 0.5, 'top5': 1.0, 'nll': 0.5697, 'ece': 0.4}
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    who = "classification_metrics"
    _check.integer(who, "bins", bins, 1)
    probs, labels = _probs_and_labels(who, probs, labels, 1)
    count, classes = probs.shape
    top = {}
    for name, k in (("top1", 1), ("top5", min(5, classes))):
        share = multiclass_accuracy(
            probs, labels, num_classes=classes, average="micro", top_k=k, validate_args=False
        ).item()
        # torchmetrics divides in float32; a share of N samples is a whole number over N.
        top[name] = round(share * count) / count
    right = probs.gather(1, labels[:, None])[:, 0].clamp(min=torch.finfo(probs.dtype).tiny)
    diagram = reliability(probs, labels, bins=bins)
    return {**top, "nll": -right.cpu().double().log().mean().item(), "ece": _calibration_error(diagram)}


def reliability(probs: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, list[Any]]:
    """The reliability diagram: how often predictions of a given confidence are right.

        bin b holds the samples with b / B <= max_c p_i[c] < (b + 1) / B; the last bin includes 1

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class ids.
        bins: B, the number of equal-width bins.
    Returns:
        dict of three lists of B entries: mean `confidence` and `accuracy` of each bin (None where empty), and `count`.
    """
    who = "reliability"
    bins = _check.integer(who, "bins", bins, 1)
    probs, labels = _probs_and_labels(who, probs, labels, 1)
    confidence, predicted = probs.max(1)
    # Sums in float64 on the CPU: not every device has float64.
    confidence, hit = confidence.cpu().double(), (predicted == labels).cpu().double()
    return _diagram((confidence * bins).long().clamp(max=bins - 1), confidence, hit, bins)


def _diagram(at: Tensor, confidence: Tensor, hit: Tensor, bins: int) -> dict[str, list[Any]]:
    """What `reliability` returns, from each sample's bin, confidence and 1 or 0 for right or wrong."""
    count = torch.bincount(at, minlength=bins)
    sums = [torch.bincount(at, weights=values, minlength=bins) for values in (confidence, hit)]
    means = [[s / n if n else None for s, n in zip(v.tolist(), count.tolist(), strict=True)] for v in sums]
    return {"confidence": means[0], "accuracy": means[1], "count": count.tolist()}


def _calibration_error(diagram: dict[str, list[Any]]) -> float:
    """sum_b (count_b / N) |accuracy_b - confidence_b|"""
    gaps = zip(diagram["count"], diagram["accuracy"], diagram["confidence"], strict=True)
    return sum(n * abs(a - c) for n, a, c in gaps if n) / sum(diagram["count"])


def mixed_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Does the model see both classes of a hard mixed sample?

        both   = mean_i [{two largest of p_i} = {a_i, b_i}]
        top2   = mean_i ([a_i in the two largest] + [b_i in the two largest]) / 2
        either = mean_i [argmax p_i is a_i or b_i]

    Args:
        probs: (N, C) probabilities for mixed images of equal shares.
        labels: (N, 2) the two classes of each, different from one another.
    Returns:
        dict with both, top2 and either. With C = 2 all three are 1. Equal probabilities are ordered as `topk` does.
    Raises:
        ValueError: sizes disagree, rows are not probabilities, a pair repeats its class.
    """
    who = "mixed_metrics"
    probs, labels = _probs_and_labels(who, probs, labels, 2)
    if bool((labels[:, 0] == labels[:, 1]).any()):
        raise ValueError(f"{who}: labels has rows with one class twice; pass pairs of two different classes.")
    top = probs.topk(2, dim=1).indices  # (N, 2), the largest first
    seen = (labels[:, :, None] == top[:, None, :]).any(2).cpu()  # (N, 2): is class k of the pair in the top two?
    return {
        "both": seen.all(1).double().mean().item(),
        "top2": seen.double().mean().item(),
        "either": (labels == top[:, :1]).any(1).cpu().double().mean().item(),
    }


def certain(metric: str, classes: int) -> bool:
    """Whether so many classes alone decide a metric, so that its value says nothing: a top5 of up to five classes, and
    what `mixed_metrics` says of two, under names such as "mixup_both".

    >>> certain("top5", 5), certain("cutmix_both", 2), certain("cutmix_both", 3)
    (True, True, False)
    """
    of_mixed = metric.endswith(("_both", "_top2", "_either"))
    return (metric == "top5" and classes <= 5) or (of_mixed and classes <= 2)


def mixed_accuracy(logits: Tensor, target: MixedTarget) -> Tensor:
    """Share-weighted top-1 accuracy of mixed samples: the share of each sample that its prediction names.

        mean_i sum_k w_ik [argmax_c logits_ic = label_ik]

    Args:
        logits: (N, C), or (N, C, *spatial) for dense masks; probabilities do as well.
        target: K class ids (N, K) or (N, K, *spatial), or soft rows (N, K, C), with their weights.
    Returns:
        Scalar tensor in float32 or wider, without a gradient; nothing waits for the device. An unmixed sample counts
        0 or 1; a pair with shares 0.7 and 0.3 counts 0.7, 0.3 or 0.
    Raises:
        ValueError: sizes disagree. TypeError: float labels (regression).
    """
    who = "mixed_accuracy"
    logits = _check.batch(who, "logits", logits, 2)
    _check.same_length(who, "target", target.labels, "logits", logits.shape[0])
    predicted = logits.detach().argmax(1)  # (N, *spatial)
    labels, weights = target
    if labels.ndim == 3 and logits.ndim == 2:
        if labels.shape[2] != logits.shape[1]:
            raise ValueError(
                f"{who}: target has {labels.shape[2]} columns but logits have {logits.shape[1]} classes; pass as many."
            )
        hit = labels.gather(2, predicted[:, None, None].expand(-1, labels.shape[1], 1))[..., 0]
    elif labels.is_floating_point():
        raise TypeError(f"{who}: target has labels of dtype {labels.dtype}; pass class ids or (N, K, C) rows.")
    elif labels.ndim < 2 or labels.shape[2:] != predicted.shape[1:]:
        raise ValueError(
            f"{who}: target has labels of shape {tuple(labels.shape)} but logits have {tuple(logits.shape)}; "
            "pass (N, K) labels for (N, C) logits, (N, K, *spatial) for (N, C, *spatial)."
        )
    else:
        hit = labels == predicted[:, None]
    shares = weights.detach() if weights.dtype == torch.float64 else weights.detach().float()
    return (hit.to(shares.dtype) * shares).sum(1).mean()


def _probs_and_labels(who: str, probs: Tensor, labels: Tensor, label_ndim: int) -> tuple[Tensor, Tensor]:
    """Both checked, values included: probabilities in float32 or wider, labels long."""
    probs = _check.batch(who, "probs", probs, 2, 2)
    labels = _check.tensor(who, "labels", labels)
    if not probs.is_floating_point():
        raise TypeError(f"{who}: probs has dtype {probs.dtype}; pass floating-point probabilities.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{who}: labels has dtype {labels.dtype}; pass integer class ids.")
    shape = (probs.shape[0], 2)[:label_ndim]
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"{who}: labels has shape {tuple(labels.shape)} but probs has {len(probs)} rows; pass shape {shape}."
        )
    _check.same_device(who, "labels", labels, "probs", probs.device)
    classes = probs.shape[1]
    if classes < 2:
        raise ValueError(f"{who}: probs has 1 column; pass (N, C) probabilities of at least two classes.")
    probs = probs.detach()
    probs = probs if probs.dtype == torch.float64 else probs.float()
    # Asked the way round that NaN fails it.
    good = (probs >= 0).all() & ((probs.sum(1) - 1).abs() <= ROW_SUM_TOLERANCE).all()
    if not bool(good):
        raise ValueError(
            f"{who}: probs holds rows that are not probabilities (negative, not finite, or with another sum than 1); "
            "pass softmax(logits)."
        )
    labels = labels.long()
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ValueError(
            f"{who}: labels holds the class {low if low < 0 else high}, but probs has {classes} columns; "
            f"pass class ids from 0 to {classes - 1}."
        )
    return probs, labels
