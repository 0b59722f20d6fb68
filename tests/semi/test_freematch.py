"""FreeMatch against a slow reference over several steps; its fairness, and the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import MixedPairs
from hardmix.semi.freematch import FreeMatch, fairness_entropy
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, rng, run, softmax


def make(model: nn.Module | None = None, **options: object) -> FreeMatch:
    return FreeMatch(num_classes=CLASSES, **options)


def norm(values: list[float]) -> list[float]:
    return [v / sum(values) for v in values]


def slow_entropy(strong: np.ndarray, mask: list[float], predicted: list[float], classes: list[float]) -> float:
    """H of equation 11; classes without a prediction add nothing."""
    rows = [q for q, m in zip(softmax(strong), mask, strict=True) if m]
    if not rows:
        return 0.0
    top = [int(q.argmax()) for q in rows]
    ratio = [
        sum(q[c] for q in rows) / len(rows) / (top.count(c) / len(rows)) if c in top else 0.0
        for c in range(len(predicted))
    ]
    wanted, batch = norm([p / h for p, h in zip(predicted, classes, strict=True)]), norm(ratio)
    return -sum(a * math.log(b) for a, b in zip(wanted, batch, strict=True) if b > 0)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.3])
def test_equals_the_slow_loop(joint: bool, momentum: float) -> None:
    model, algorithm = net(1), make(momentum=momentum, fairness=0.3, weight=1.2, joint=joint)
    confident, predicted, classes = 1 / CLASSES, [1 / CLASSES] * CLASSES, [1 / CLASSES] * CLASSES
    masks = []
    for step in range(8):
        batch = draw(step)
        z, weak, strong = (logits(model, part) for part in (batch.x, *batch.views))
        probs = softmax(weak)
        top = probs.argmax(1).tolist()
        confident = momentum * confident + (1 - momentum) * np.mean([max(q) for q in probs])
        predicted = [momentum * p + (1 - momentum) * probs[:, c].mean() for c, p in enumerate(predicted)]
        classes = [momentum * h + (1 - momentum) * top.count(c) / len(top) for c, h in enumerate(classes)]
        thresholds = [confident * p / max(predicted) for p in predicted]
        mask = [float(q[c] >= thresholds[c]) for q, c in zip(probs, top, strict=True)]
        labelled = np.mean([cross_entropy(row, y) for row, y in zip(z, batch.y.tolist(), strict=True)])
        unlabelled = np.mean([m * cross_entropy(row, c) for m, row, c in zip(mask, strong, top, strict=True)])
        fair = -0.3 * slow_entropy(strong, mask, predicted, classes)
        output = run(model, algorithm, [batch])[0]
        assert output.weight.tolist() == mask
        assert output.parts["unlabelled"].item() == pytest.approx(unlabelled, rel=1e-10)
        # The averages are float32.
        assert output.parts["fairness"].item() == pytest.approx(fair, rel=1e-5)
        assert output.loss.item() == pytest.approx(labelled + 1.2 * unlabelled + fair, rel=1e-5)
        assert algorithm.confident.item() == pytest.approx(confident, rel=1e-5)
        assert algorithm.predicted.tolist() == pytest.approx(predicted, rel=1e-5)
        assert algorithm.classes.tolist() == pytest.approx(classes, rel=1e-5)
        assert algorithm.class_thresholds().tolist() == pytest.approx(thresholds, rel=1e-5)
        masks += mask
    assert 0 < np.mean(masks) < 1


def test_promises() -> None:
    check_promises(make)
    check_promises(lambda model: make(momentum=0.0, joint=False, pairs=MixedPairs(ramp=0.0)))
    check_promises(make, unlabelled=1)


@pytest.mark.parametrize("seed", range(10))
def test_entropy_against_the_slow_one(seed: int) -> None:
    g = rng(seed)
    strong = torch.randn(9, 5, generator=g, dtype=torch.float64) * 3
    mask = (torch.rand(9, generator=g) < 0.6).double()
    predicted, classes = (torch.rand(5, generator=g).double().softmax(0) for _ in range(2))
    want = slow_entropy(strong.numpy(), mask.tolist(), predicted.tolist(), classes.tolist())
    assert fairness_entropy(strong, mask, predicted, classes).item() == pytest.approx(want, rel=1e-10)
    strong.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fairness_entropy(z, mask, predicted, classes), strong)
    grad = torch.autograd.grad(fairness_entropy(strong, mask, predicted, classes), strong)[0]
    assert not grad[mask == 0].any()


def test_fairness_at_the_edges() -> None:
    z = torch.tensor([[90.0, 0.0, 0.0], [80.0, 0.0, 0.0]], requires_grad=True)
    third = torch.full((3,), 1 / 3)
    for mask in (torch.zeros(2), torch.ones(2)):
        # nothing is masked in; or all is of one class, of which the batch is then all there is
        value = fairness_entropy(z, mask, third, third)
        assert value == 0.0
        assert not torch.autograd.grad(value, z)[0].any()
    # a class that has not been predicted for very long
    for gone in (0.0, 1e-44):
        value = fairness_entropy(
            z * torch.tensor([[0.01], [-0.01]]), torch.ones(2), third, torch.tensor([gone, 0.5, 0.5])
        )
        assert bool(value.isfinite())


def test_fairness_makes_rare_predictions_larger() -> None:
    """Steps along its gradient even out a batch that leans to one class."""
    z = torch.tensor([[3.0, 0.0], [3.0, 0.0], [2.5, 0.0], [0.0, 0.2]], dtype=torch.float64, requires_grad=True)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    grad = torch.autograd.grad(-fairness_entropy(z, torch.ones(4, dtype=torch.float64), half, half), z)[0]
    assert bool(grad.isfinite().all())
    assert bool(grad.any())


def test_gradient_flows_through_the_masked_strong_views_alone() -> None:
    batch = draw(1)
    views = [view.requires_grad_() for view in batch.views]
    output = make(momentum=0.2)(net(), batch)
    weak, strong = gradients(output, views)
    assert not weak.any()
    assert torch.equal(strong.any(1), output.weight > 0)
    assert 0 < output.weight.sum() < 6


def test_at_the_start_all_samples_count() -> None:
    algorithm = make()
    assert algorithm.class_thresholds().tolist() == [0.25] * 4
    assert algorithm(net(), draw()).weight.tolist() == [1.0] * 6


def test_a_class_that_is_predicted_less_has_a_lower_threshold() -> None:
    algorithm = make()
    algorithm.confident.fill_(0.8)
    algorithm.predicted.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert algorithm.class_thresholds().tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_settings_and_refusals() -> None:
    assert "num_classes=4, momentum=0.999, fairness=0.05, weight=1, joint=True" in repr(make())
    assert make().state_dict().keys() == {"confident", "predicted", "classes"}
    assert make(fairness=0.0)(net(), draw()).parts["fairness"] == 0.0
    for options, text in [
        ({"num_classes": 0}, r"FreeMatch: num_classes is 0; pass an integer of at least 2\."),
        ({"momentum": -1}, r"FreeMatch: momentum is -1; pass a number from 0 to 1\."),
        ({"fairness": -0.1}, r"FreeMatch: fairness is -0\.1; pass a finite number of at least 0\."),
    ]:
        with pytest.raises(ValueError, match=text):
            FreeMatch(**{"num_classes": 4, **options})
    with pytest.raises(ValueError, match=r"FreeMatch: the model predicts 3 classes, but this was made for 4; give"):
        make()(net(classes=3), draw(classes=3))
