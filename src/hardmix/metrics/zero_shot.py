"""Classes without training, by their names, and with a few pictures each: what image features are good for.

Values are read (a device is waited for).
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import CPU
from hardmix.metrics.pair_calibration import _scale, query_calibration
from hardmix.metrics.retrieval import _unit, retrieval_ranks
from hardmix.mixing.draw import cpu_generator

#: scikit-learn's C of the linear probe: the weight of the samples' losses against that of the penalty
PROBE_C = 10.0


def class_features(prompt_features: Tensor | Sequence[Tensor]) -> Tensor:
    """One text feature for each class, from those of several prompts ("a photo of a {name}.", "a drawing of ...").

        t_c = unit(mean_p unit(t_cp))

    Args:
        prompt_features: (C, P, D), or C tensors (P_c, D) where the numbers of prompts differ.

    Returns:
        (C, D) rows of length 1, float32 or wider, without a gradient. One prompt gives its own direction.

    Raises:
        TypeError: not tensors, or integers.
        ValueError: no classes or prompts, different D, NaN, infinity or a row of zeros, or prompts that cancel.

    Reference: Radford et al. 2021, section 3.1.4 (arXiv:2103.00020).

    >>> class_features(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]))
    tensor([[0.7071, 0.7071]])
    """
    who = "class_features"
    if isinstance(prompt_features, Tensor):
        _check.batch(who, "prompt_features", prompt_features, 3, 3)
    elif not isinstance(prompt_features, Sequence) or isinstance(prompt_features, str):
        raise TypeError(
            f"{who}: prompt_features is a {type(prompt_features).__name__}; pass a tensor (C, P, D), or a list of "
            "(P, D) tensors."
        )
    if not len(prompt_features):
        raise ValueError(f"{who}: prompt_features is empty; pass at least one class.")
    means: list[Tensor] = []
    for number, rows in enumerate(prompt_features):
        name = f"prompt_features[{number}]"
        rows = _unit(who, name, rows)
        if means and rows.shape[1] != means[0].shape[0]:
            raise ValueError(
                f"{who}: {name} has {rows.shape[1]} columns but prompt_features[0] has {means[0].shape[0]}; pass "
                "features of one space."
            )
        if means:
            _check.same_device(who, name, rows, "prompt_features[0]", means[0].device)
        means.append(rows.mean(0))
    wide = torch.float64 if any(mean.dtype == torch.float64 for mean in means) else torch.float32
    return _unit(who, "the mean of the prompts", torch.stack([mean.to(wide) for mean in means]))


def zero_shot_metrics(
    image_features: Tensor, class_features: Tensor, labels: Tensor, logit_scale: Tensor | float
) -> dict[str, float]:
    """Classification by the nearest class name.

        p_i = softmax_c(s cos(image_i, text_c)),    rank_i = #{c: cos(image_i, text_c) >= cos(image_i, text_label_i)}
        top_k = mean_i [rank_i <= k],               class_recall = mean over the classes that occur of their top1

    Args:
        image_features: (N, D), any length but zero.
        class_features: (C, D), on the same device, as from the function `class_features`.
        labels: (N,) class ids; not every class has to occur.
        logit_scale: s, greater than 0, already exponentiated.

    Returns:
        dict of Python floats: top1, top5 (1 where there are up to five classes), class_recall; nll in nats and ece, as
        `query_calibration` has them, with ten bins of equal width; majority, the top1 of whoever always says the most
        frequent class. A tie, see `retrieval_ranks`, counts against the image in top1, top5 and class_recall, so that
        features that are all the same recognise nothing.

    Raises:
        TypeError, ValueError: sizes or devices disagree, NaN, infinity or a row of zeros, a class out of range, a scale
            that is not positive.

    Reference: Radford et al. 2021 (arXiv:2103.00020).

    >>> found = zero_shot_metrics(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 1]), 100.0)
    >>> round(found["top1"], 4), found["class_recall"], round(found["ece"], 4), round(found["majority"], 4)
    (0.6667, 0.75, 0.3333, 0.6667)
    """
    who = "zero_shot_metrics"
    images, texts = _unit(who, "image_features", image_features), _unit(who, "class_features", class_features)
    _same_space(who, "class_features", texts, "image_features", images)
    _check.same_device(who, "class_features", texts, "image_features", images.device)
    labels = _labels(who, "labels", labels, "image_features", len(images))
    _check.classes_in_range(who, "labels", labels, len(texts))
    scale = _scale(who, logit_scale, images)
    classes = torch.arange(len(texts), device=CPU)
    calibration = query_calibration(images, texts, scale, query_ids=labels, candidate_ids=classes)
    ranks = retrieval_ranks(images, texts, query_ids=labels, candidate_ids=classes)
    first = (ranks == 1).double()
    counts = torch.bincount(labels)
    recalls = torch.bincount(labels, weights=first)[counts > 0] / counts[counts > 0]
    return {
        "top1": first.mean().item(),
        "top5": (ranks <= 5).double().mean().item(),
        "class_recall": recalls.mean().item(),
        "nll": calibration["nll"],
        "ece": calibration["ece"],
        "majority": int(counts.max()) / len(labels),
    }


def few_shot_metrics(
    support_features: Tensor,
    support_labels: Tensor,
    tests: Mapping[str, tuple[Tensor, Tensor]],
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    draws: int = 5,
    generator: Generator | None = None,
) -> dict[str, dict[int, dict[str, float]]]:
    """Accuracy of a linear probe that has seen k samples of each class.

        W = argmin_W  |W|^2 / 2 + C sum_i -log softmax(W x_i + b)[y_i],    C = 10, rows x_i of length 1

    For each draw and k one probe (scikit-learn's `LogisticRegression`, with a bias) is fitted, and asked about all
    tests. In each draw the k samples of a class are among its k + 1. On plain pixels of digits and emoji, C = 10 comes
    within 0.01 of the best of 0.1, 1, 10, 100 and 1000 for each k.

    Args:
        support_features: (S, D) that the shots are drawn from, any length but zero.
        support_labels: (S,) integers, of two or more classes.
        tests: name -> features (N, D) and labels (N,), such as one test set for each style.
        ks: shots, at least 1. A class with fewer samples than that gives all it has.
        draws: how often shots are drawn.
        generator: CPU generator; S numbers are drawn from it each time, whatever `ks` and `tests` are.

    Returns:
        name -> k -> dict with accuracy and std, its mean and standard deviation over the draws (divided by their
        number: one draw has 0), and short, the number of classes that have fewer than k samples.

    Raises:
        TypeError, ValueError: sizes disagree, NaN, infinity or a row of zeros, labels that are no integers, one class
            alone, or a test with a class that the support has not.
        ImportError: scikit-learn is missing.

    Reference: the linear probe of Radford et al. 2021, figure 6 (arXiv:2103.00020), who search for C on further data.

    >>> few_shot_metrics(torch.eye(2), torch.tensor([3, 7]), {"same": (torch.eye(2), torch.tensor([3, 7]))}, ks=(2,))
    {'same': {2: {'accuracy': 1.0, 'std': 0.0, 'short': 2}}}
    """
    who = "few_shot_metrics"
    shots = list(dict.fromkeys(_check.integer(who, "ks", k, 1) for k in _check.sequence(who, "ks", ks, "integers")))
    draws = _check.integer(who, "draws", draws, 1)
    cpu_generator(who, generator)
    x, y = _samples(who, "support_features", "support_labels", support_features, support_labels)
    classes, counts = y.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{who}: support_labels holds one class alone; pass samples of two or more.")
    asked = {}
    for name, test in _check.mapping(who, "tests", tests, "features and labels by name").items():
        if not isinstance(test, (tuple, list)) or len(test) != 2:
            raise TypeError(f"{who}: tests[{name!r}] is a {type(test).__name__}; pass features and labels.")
        features, labels = test
        features, labels = _samples(
            who, f"the features of tests[{name!r}]", f"the labels of tests[{name!r}]", features, labels
        )
        _same_space(who, f"tests[{name!r}]", features, "support_features", x)
        unknown = labels[~torch.isin(labels, classes)]
        if len(unknown):
            raise ValueError(
                f"{who}: tests[{name!r}] holds the class {int(unknown[0])}, but support_labels does not; leave it out, "
                "or add samples of it to the support."
            )
        asked[name] = (features, labels)
    found: dict[str, dict[int, list[float]]] = {name: {k: [] for k in shots} for name in asked}
    for _ in range(draws):
        place = _place_in_class(y, generator)
        for k in shots:
            chosen = place < k
            probe = _Probe(who, x[chosen], y[chosen])
            for name, (features, labels) in asked.items():
                found[name][k].append(probe.accuracy(features, labels))
    short = {k: int((counts < k).sum()) for k in shots}
    return {
        name: {
            k: {"accuracy": statistics.fmean(values), "std": statistics.pstdev(values), "short": short[k]}
            for k, values in by_k.items()
        }
        for name, by_k in found.items()
    }


class _Probe:
    """Logistic regression, fitted."""

    def __init__(self, who: str, features: Tensor, labels: Tensor) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise ImportError(f'{who}: scikit-learn is not installed; pip install "hardmix[train]".') from None
        with warnings.catch_warnings():
            # with one shot every sample is a class of its own, which scikit-learn takes for a slip
            warnings.filterwarnings("ignore", "The number of unique classes is greater", UserWarning)
            self.model = LogisticRegression(C=PROBE_C, max_iter=1000).fit(features.numpy(), labels.numpy())

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        return int((self.model.predict(features.numpy()) == labels.numpy()).sum()) / len(labels)


def _place_in_class(labels: Tensor, generator: Generator | None) -> Tensor:
    """(S,) the place of each sample in a random order of its class, from 0."""
    order = torch.rand(len(labels), generator=generator, dtype=torch.float64, device=CPU).argsort()
    order = order[labels[order].argsort(stable=True)]  # class after class, each in random order
    sizes = labels.unique(return_counts=True)[1]
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=CPU) - first
    return place


def _samples(who: str, name: str, labels_name: str, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows in float64 and labels, on the CPU."""
    x = _unit(who, name, features).cpu().double()
    return x, _labels(who, labels_name, labels, name, len(x))


def _labels(who: str, name: str, labels: Tensor, other: str, rows: int) -> Tensor:
    """(N,) long on the CPU."""
    labels = _check.tensor(who, name, labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"{who}: {name} has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass (N,) integer class ids."
        )
    _check.same_length(who, name, labels, other, rows)
    return labels.detach().cpu().long()


def _same_space(who: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{who}: {name} has {x.shape[1]} columns but {other} has {y.shape[1]}; pass features of one space."
        )
