"""SoftMatch against a slow reference over several steps, and its averages at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import MixedPairs
from hardmix.semi.softmatch import SoftMatch
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, run, softmax


def make(model: nn.Module | None = None, **options: object) -> SoftMatch:
    return SoftMatch(num_classes=CLASSES, **options)


class Slow:
    """Equations 6 to 10 one sample at a time, in float64."""

    def __init__(self, momentum: float, width: float, align: bool) -> None:
        self.momentum, self.width, self.align = momentum, width, align
        self.predicted, self.mean, self.variance = [1 / CLASSES] * CLASSES, 1 / CLASSES, 1.0

    def follow(self, old: float, new: float) -> float:
        return self.momentum * old + (1 - self.momentum) * new

    def weights(self, probs: np.ndarray) -> list[float]:
        n = len(probs)
        self.predicted = [self.follow(old, sum(probs[:, c]) / n) for c, old in enumerate(self.predicted)]
        highest = []
        for q in probs:
            if self.align:
                a = [v / CLASSES / p for v, p in zip(q, self.predicted, strict=True)]
                q = [v / sum(a) for v in a]
            highest.append(max(q))
        mean = sum(highest) / n
        self.mean = self.follow(self.mean, mean)
        self.variance = self.follow(self.variance, sum((c - mean) ** 2 for c in highest) / max(1, n - 1))
        return [math.exp(-(min(0.0, c - self.mean) ** 2) / (2 * self.variance / self.width**2)) for c in highest]


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(("momentum", "width"), [(0.9, 2.0), (0.5, 1.0), (0.0, 3.0)])
def test_equals_the_slow_loop(align: bool, momentum: float, width: float) -> None:
    model, algorithm = net(1), make(momentum=momentum, width=width, align=align, weight=0.7)
    slow = Slow(momentum, width, align)
    for step in range(8):
        batch = draw(step)
        z, weak, strong = (logits(model, part) for part in (batch.x, *batch.views))
        weights = slow.weights(softmax(weak))
        labelled = np.mean([cross_entropy(row, y) for row, y in zip(z, batch.y.tolist(), strict=True)])
        classes = weak.argmax(1)  # of the predictions as they are, aligned or not
        rows = [w * cross_entropy(row, int(c)) for w, row, c in zip(weights, strong, classes, strict=True)]
        output = run(model, algorithm, [batch])[0]
        # The averages are float32.
        assert output.weight.tolist() == pytest.approx(weights, rel=1e-4, abs=1e-9)
        assert output.parts["unlabelled"].item() == pytest.approx(np.mean(rows), rel=1e-4)
        assert output.loss.item() == pytest.approx(labelled + 0.7 * np.mean(rows), rel=1e-4)
        assert output.pseudo.tolist() == classes.tolist()
        assert algorithm.mean.item() == pytest.approx(slow.mean, rel=1e-5)
        assert algorithm.variance.item() == pytest.approx(slow.variance, rel=1e-5)
        assert algorithm.predicted.tolist() == pytest.approx(slow.predicted, rel=1e-5)


def test_promises() -> None:
    check_promises(make)
    check_promises(lambda model: make(momentum=0.0, align=False, joint=False, pairs=MixedPairs(ramp=0.0)))
    check_promises(make, unlabelled=1)


def test_gradient_flows_through_the_strong_views_alone() -> None:
    batch = draw()
    views = [view.requires_grad_() for view in batch.views]
    output = make(momentum=0.5)(net(), batch)
    weak, strong = gradients(output, views)
    assert not weak.any()
    assert bool(strong.any(1).all())
    assert len(output.weight.unique()) > 1
    assert float(output.weight.max()) == 1.0


def test_at_the_start_and_with_one_confidence_every_sample_counts() -> None:
    batch = draw()
    assert bool((make()(net(), batch).weight > 0.7).all())
    # all equally sure: at the mean, whatever the variance is
    output = make(momentum=0.0, align=False)(net(spread=0.0), batch)
    assert bool((output.weight > 0.99).all())


def test_alignment_helps_classes_that_are_predicted_less() -> None:
    algorithm = make(momentum=1.0)
    algorithm.predicted.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    algorithm.mean.fill_(0.6)
    algorithm.variance.fill_(0.01)

    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    rows = torch.tensor([[0.55, 0.15, 0.15, 0.15], [0.15, 0.55, 0.15, 0.15]])
    batch = draw()._replace(x=rows, y=torch.tensor([0, 1]), views=(rows, rows))
    weight = algorithm(Rows(), batch).weight
    assert weight[1] == 1.0
    assert weight[0] < 0.1
    algorithm.align = False
    weight = algorithm(Rows(), batch).weight
    assert weight[0] == weight[1]


def test_a_class_that_is_never_predicted() -> None:
    algorithm = make(momentum=0.0)
    model = net()
    with torch.no_grad():
        model[-1].bias[2] = -1e4
    output = algorithm(model, draw())
    assert algorithm.predicted[2] == 0.0
    assert bool(output.weight.isfinite().all())


def test_settings_and_refusals() -> None:
    assert "num_classes=4, momentum=0.999, width=2, align=True, weight=1, joint=True" in repr(make())
    assert make().state_dict().keys() == {"predicted", "mean", "variance"}
    for options, error, text in [
        ({"num_classes": 1}, ValueError, r"SoftMatch: num_classes is 1; pass an integer of at least 2\."),
        ({"momentum": 1.1}, ValueError, r"SoftMatch: momentum is 1\.1; pass a number from 0 to 1\."),
        ({"width": 0}, ValueError, r"SoftMatch: width is 0; pass a finite number greater than 0\."),
        ({"align": "yes"}, TypeError, r"SoftMatch: align is 'yes'; pass True or False\."),
    ]:
        with pytest.raises(error, match=text):
            SoftMatch(**{"num_classes": 4, **options})
    with pytest.raises(ValueError, match=r"SoftMatch: the model predicts 3 classes, but this was made for 4; give"):
        make()(net(classes=3), draw(classes=3))
