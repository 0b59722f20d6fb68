"""Co-Tuning: the classifier of the pre-trained model goes on learning too, from target labels put in its terms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import wide
from hardmix.semi.algorithm import Forward, SemiBatch, class_loss
from hardmix.semi.features import find_head, with_features
from hardmix.semi.fine_tuning import FineTuning
from hardmix.semi.pairs import MixedPairs

#: how little the weights of `learned_relationship` are held back: of these it takes the one that does best
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4)
#: the scales of logits that `calibration_scale` looks among
SCALES = (1e-2, 1e2)


def category_relationship(source_probs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C_t, C_s) relationship p(source class | target class): the mean source prediction of each target class.

        p(s | t) = mean of p(s | x_i) over the i with y_i = t

    Args:
        source_probs: (N, C_s) what the pre-trained model predicts of the labelled target samples, calibrated if it can
            be (`calibration_scale`).
        labels: (N,) their target classes.
        num_classes: C_t.
    A class without a sample gets the mean over all samples. Reference: You et al. 2020 (NeurIPS), the direct approach;
    `direct_relationship_learning` of the release.

    >>> category_relationship(torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.0, 1.0]]), torch.tensor([0, 0, 1]), 2)
    tensor([[0.8000, 0.2000],
            [0.0000, 1.0000]])
    """
    probs = _source_rows("category_relationship", "source_probs", source_probs, "labels", labels, num_classes)
    one_hot = F.one_hot(labels.long(), num_classes).to(probs.dtype)  # (N, C_t)
    counts = one_hot.sum(0)[:, None]
    with torch.autocast(probs.device.type, enabled=False):  # sums in half types would lose samples
        sums = one_hot.T @ probs
    return torch.where(counts > 0, sums / counts.clamp(min=1), probs.mean(0))


def learned_relationship(
    source_probs: Tensor, labels: Tensor, validation_probs: Tensor, validation_labels: Tensor, num_classes: int
) -> Tensor:
    """(C_t, C_s) relationship p(source class | target class), from a classifier of source predictions and Bayes' rule.

        W(c)     = argmin |W|^2 / 2 + c sum_i CE(W p_i, y_i),   no bias;   c of STRENGTHS, the one that gets most of the
                   validation samples right, of equal ones the largest
        p(t | s) = softmax_t(a W_ts),   a = calibration_scale of W p on the validation samples
        p(s | t) = p(t | s) p(s) / sum_s p(t | s) p(s),   p(s) = mean of p over all samples

    Args:
        source_probs, labels: (N, C_s) source predictions of the labelled target samples and their (N,) classes.
        validation_probs, validation_labels: the same of other samples.
        num_classes: C_t.
    Computed in float64. A class without a sample has a row too, of what is left for it. Reference: You et al. 2020
    (NeurIPS); `relationship_learning` of the release, which its training uses. There the fit of W stops after 100
    iterations, so for large c it is another one.
    """
    who = "learned_relationship"
    probs = _source_rows(who, "source_probs", source_probs, "labels", labels, num_classes).double()
    held = _source_rows(
        who, "validation_probs", validation_probs, "validation_labels", validation_labels, num_classes
    ).double()
    if held.shape[1] != probs.shape[1]:
        raise ValueError(
            f"{who}: validation_probs has {held.shape[1]} columns but source_probs has {probs.shape[1]}; "
            "pass predictions of the same source classes."
        )
    y, held_y = labels.long(), validation_labels.long()
    weight = probs.new_zeros(num_classes, probs.shape[1])
    best, most = weight, -1
    for strength in STRENGTHS:  # each starts from the one before, which is held back more
        weight = _fit(probs, y, strength, weight)
        right = int(((held @ weight.T).argmax(1) == held_y).sum())
        if right >= most:
            best, most = weight, right
    scale = calibration_scale(held @ best.T, held_y)
    marginal = torch.cat([probs, held]).mean(0)  # (C_s,)
    # In logarithms, so that a target class that no source class speaks for has a row as well.
    joint = (scale * best).log_softmax(0) + marginal.clamp(min=torch.finfo(marginal.dtype).tiny).log()
    return joint.softmax(1).to(wide(source_probs.dtype))


def calibration_scale(logits: Tensor, labels: Tensor) -> float:
    """a with the lowest mean CE(a z, y), to be used as softmax(a z): 1 / temperature.

    Args:
        logits: (N, C) of samples that the model was not trained on.
        labels: (N,) their classes.
    Found by bisection, since the loss is convex in a, between SCALES, 0.01 and 100: the larger where every sample is
    right, which no finite scale is enough for. Reference: Guo et al. 2017 (arXiv:1706.04599). Co-Tuning's release
    takes 0.884 for its ResNet-50 and ImageNet.

    >>> round(calibration_scale(torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])), 4)  # log(3) / 2
    0.5493
    """
    who = "calibration_scale"
    _check.batch(who, "logits", logits, 2, 2)
    _check.finite(who, "logits", logits)
    _check_labels(who, "labels", labels, "logits", logits, logits.shape[1])
    z = logits.detach().double()
    own = z.gather(1, labels.long()[:, None])[:, 0]
    low, high = SCALES
    for _ in range(60):
        middle = (low * high) ** 0.5
        # d/da mean CE(a z, y) = mean(sum_c p_c z_c - z_y), rising in a
        slope = ((middle * z).softmax(1) * z).sum(1) - own
        low, high = (low, middle) if float(slope.mean()) > 0 else (middle, high)
    return high


def _fit(probs: Tensor, labels: Tensor, strength: float, start: Tensor) -> Tensor:
    """(C_t, C_s) weights of the multinomial logistic regression without a bias, from a first guess."""
    with torch.inference_mode(False):  # what is made in there can't be learnt from
        probs, labels, weight = probs.clone(), labels.clone(), start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=300, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(probs @ weight.T, labels) + weight.square().sum() / (2.0 * strength * len(probs))
            value.backward()
            return value

        optimizer.step(loss)
    return weight.detach()


def _source_rows(who: str, name: str, probs: Tensor, label_name: str, labels: Tensor, num_classes: int) -> Tensor:
    """Checked (N, C_s) predictions in float32 or wider, and checked labels of the same samples."""
    _check.batch(who, name, probs, 2, 2)
    _check_distributions(who, name, probs)
    _check.integer(who, "num_classes", num_classes, 2)
    _check_labels(who, label_name, labels, name, probs, num_classes)
    return probs.detach().to(wide(probs.dtype))


def _check_labels(who: str, name: str, labels: Tensor, of: str, rows: Tensor, num_classes: int) -> None:
    y = _check.tensor(who, name, labels)
    if y.ndim != 1 or y.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{who}: {name} has shape {tuple(y.shape)} and dtype {y.dtype}; pass (N,) class ids.")
    _check.same_length(who, name, y, of, rows.shape[0])
    _check.same_device(who, name, y, of, rows.device)
    _check.classes_in_range(who, name, y, num_classes)


def _check_distributions(who: str, name: str, rows: Tensor) -> None:
    """Rows that are not negative and sum to one. Waits for a device: it is for what is done once."""
    values = rows.detach().to(wide(rows.dtype))
    sums = values.sum(1)
    if not bool((values >= 0).all() & ((sums - 1.0).abs() < 1e-2).all()):
        raise ValueError(
            f"{who}: {name} has values from {float(values.min()):.4g} to {float(values.max()):.4g} in rows that sum to "
            f"{float(sums.min()):.4g} to {float(sums.max()):.4g}; pass rows of probabilities, softmax(logits)."
        )


class CoTuning(FineTuning):
    """Co-Tuning: fine-tuning in which the classifier of the pre-training learns along, alone or with mixed pairs.

        L = CE(f(x), y) + w CE(g(x), r_y) + the loss of `pairs`,   CE(z, r) = -sum_s r_s log softmax(z)_s

    g is the pre-trained classifier of C_s source classes on the same features as f's, a copy that is trained, r_y the
    row of the (C_t, C_s) relationship p(source class | target class): a label of y in the terms of the pre-training. It
    keeps what the pre-trained classifier knows, which fine-tuning throws away.

    Args:
        model: has the target classifier and, under it, the pre-trained layers; it is looked at, not kept.
        source_weight: (C_s, D) weights of the pre-trained classifier, D the features that the target's reads.
        source_bias: (C_s,) its biases, or None.
        relationship: (C_t, C_s), rows that sum to one: `category_relationship` or `learned_relationship` of what the
            pre-trained model predicts of the labelled samples before training, without augmentation and in eval mode.
        weight: w.
        head: name of the target classifier in the model; "" takes its last linear layer.
        threshold, pairs: as in `FineTuning`; pairs are mixed for f alone.

    Parts are logged as they are added: "source" holds w. A relationship of rows that are all equal leaves g a target
    that says nothing of the class. The release trains g at the rate of the pre-trained layers, f at ten times it.
    Reference: You et al. 2020 (NeurIPS); w 2.3 is the release's.

    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> related = category_relationship(torch.rand(9, 3).softmax(1), torch.arange(9) % 2, num_classes=2)
    >>> algorithm = CoTuning(model=model, source_weight=torch.rand(3, 6), relationship=related)
    >>> sorted(algorithm(model, SemiBatch(torch.rand(2, 8), torch.tensor([0, 1]))).parts)
    ['labelled', 'source']
    """

    relationship: Tensor

    def __init__(
        self,
        *,
        model: nn.Module,
        source_weight: Tensor,
        relationship: Tensor,
        source_bias: Tensor | None = None,
        weight: float = 2.3,
        head: str = "",
        threshold: float = 0.95,
        pairs: MixedPairs | None = None,
    ) -> None:
        super().__init__(threshold=threshold, pairs=pairs)
        who = type(self).__name__
        target = find_head(who, model, head)
        self.weight = _check.non_negative(who, "weight", weight)
        self.head = head
        self.source = _linear(who, source_weight, source_bias, target)
        rows = _check.tensor(who, "relationship", relationship)
        wanted = (target.out_features, self.source.out_features)
        if rows.shape != wanted or not rows.is_floating_point():
            raise ValueError(
                f"{who}: relationship has shape {tuple(rows.shape)} and dtype {rows.dtype}; pass {wanted} "
                "probabilities, a row of source classes for each class that the model predicts."
            )
        _check_distributions(who, "relationship", rows)
        #: (C_t, C_s) p(source class | target class)
        self.register_buffer("relationship", rows.detach().to(target.weight.device, wide(rows.dtype), copy=True))

    def make_room(self, source_classes: int) -> None:
        """Zeros of another C_s, for weights that are loaded afterwards; the parameters stay the same objects, so that
        an optimizer made before goes on with them."""
        count = _check.integer(type(self).__name__, "source_classes", source_classes, 2)
        for parameter in self.source.parameters():
            parameter.data = parameter.new_zeros(count, *parameter.shape[1:])
        self.source.out_features = count
        self.relationship = self.relationship.new_full((len(self.relationship), count), 1.0 / count)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, {super().extra_repr()}"

    def terms(self, model: Forward, batch: SemiBatch) -> tuple[Tensor, dict[str, Tensor]]:
        who = type(self).__name__
        logits, features = with_features(model, batch.x, find_head(who, model, self.head))
        labelled = class_loss(who, logits, batch.y)
        source = self.source(features.to(self.source.weight.dtype)).to(logits.dtype)
        related = F.cross_entropy(source, self.relationship[batch.y].to(logits.dtype))
        return logits, {"labelled": labelled, "source": self.weight * related}


def _linear(who: str, weight: Tensor, bias: Tensor | None, target: nn.Linear) -> nn.Linear:
    """A layer with a copy of these weights, that reads what the target classifier reads."""
    _check.tensor(who, "source_weight", weight)
    if weight.ndim != 2 or weight.shape[1] != target.in_features or len(weight) < 2 or not weight.is_floating_point():
        raise ValueError(
            f"{who}: source_weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; pass the (C_s, "
            f"{target.in_features}) weights of the pre-trained classifier, which reads the same features."
        )
    if bias is not None and _check.tensor(who, "source_bias", bias).shape != weight.shape[:1]:
        raise ValueError(
            f"{who}: source_bias has shape {tuple(bias.shape)}, but source_weight has {len(weight)} rows; "
            "pass one bias for each, or None."
        )
    layer = nn.utils.skip_init(
        nn.Linear,
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        device=target.weight.device,
        dtype=wide(weight.dtype),
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
