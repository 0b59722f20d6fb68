"""UDA against a slow reference: sharpened targets, the mask, and the annealing of the labelled samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import MixedPairs
from hardmix.semi.uda import UDA
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, softmax

ANNEALING = {
    "none": lambda t: 1.0,
    "linear": lambda t: t * (1 - 1 / CLASSES) + 1 / CLASSES,
    "log": lambda t: (1 - math.exp(-5 * t)) * (1 - 1 / CLASSES) + 1 / CLASSES,
    "exp": lambda t: math.exp(5 * (t - 1)) * (1 - 1 / CLASSES) + 1 / CLASSES,
}


@pytest.mark.parametrize("annealing", ANNEALING)
@pytest.mark.parametrize("joint", [True, False])
def test_equals_the_slow_loop(annealing: str, joint: bool) -> None:
    model = net(1)
    algorithm = UDA(threshold=0.6, temperature=0.4, weight=1.5, annealing=annealing, joint=joint)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    masks, kept = [], []
    for step in range(8):
        batch = draw(step, labelled=5)
        z, weak, strong = (logits(model, part) for part in (batch.x, *batch.views))
        eta = ANNEALING[annealing](step / 8)
        rows = [cross_entropy(row, y) for row, p, y in zip(z, softmax(z), batch.y.tolist(), strict=True) if p[y] <= eta]
        labelled = sum(rows) / max(1, len(rows))
        losses, mask = [], []
        for q, row in zip(softmax(weak), strong, strict=True):
            mask.append(float(max(q) >= 0.6))
            sharp = q ** (1 / 0.4)
            losses.append(mask[-1] * cross_entropy(row, sharp / sharp.sum()))
        algorithm.set_progress(step / 8)
        output = algorithm(model, batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-10)
        assert output.parts["unlabelled"].item() == pytest.approx(np.mean(losses), rel=1e-10)
        assert output.loss.item() == pytest.approx(labelled + 1.5 * np.mean(losses), rel=1e-10)
        assert output.weight.tolist() == mask
        masks += mask
        kept.append(len(rows))
    assert 0 < np.mean(masks) < 1
    assert (min(kept) < 5) == (annealing != "none")


def test_promises() -> None:
    check_promises(lambda model: UDA(threshold=0.5))
    check_promises(lambda model: UDA(annealing="exp", joint=False, pairs=MixedPairs(ramp=0.0)))


def test_gradients() -> None:
    """None through the targets; the same as from the divergence of the release."""
    batch, model = draw(1), net()
    views = [view.requires_grad_() for view in batch.views]
    output = UDA(threshold=0.5)(model, batch)
    weak, strong = gradients(output, views)
    assert not weak.any()
    assert torch.equal(strong.any(1), output.weight > 0)
    target = (model(views[0]).detach() / 0.4).softmax(1)
    divergence = nn.functional.kl_div(model(views[1]).log_softmax(1), target, reduction="none").sum(1)
    want = torch.autograd.grad((divergence * output.weight).mean(), views[1])[0]
    torch.testing.assert_close(strong, want)
    assert 0 < output.weight.sum() < 6


def test_labelled_samples_that_are_learnt_drop_out() -> None:
    """All of them: the first term is 0 and has no gradient."""
    batch, model = draw(), net(spread=40.0)
    own = batch._replace(y=model(batch.x).argmax(1))
    for annealing, zero in (("exp", True), ("none", False)):
        output = UDA(annealing=annealing, threshold=1.0)(model, own)
        assert (output.parts["labelled"] == 0.0) == zero
        assert bool(gradients(output, [model[-1].weight])[0].any()) != zero
    algorithm = UDA(annealing="exp")
    algorithm.set_progress(1.0)
    assert algorithm(model, own).parts["labelled"] > 0.0


def test_settings_and_refusals() -> None:
    assert "threshold=0.8, weight=1, joint=True, temperature=0.4, annealing='none'" in repr(UDA())
    for options, text in [
        ({"temperature": 0}, r"UDA: temperature is 0; pass a finite number greater than 0\."),
        ({"annealing": "sine"}, r"UDA: annealing is 'sine'; pass one of 'none', 'linear', 'log', 'exp'"),
        ({"threshold": 2}, r"UDA: threshold is 2; pass a number from 0 to 1\."),
    ]:
        with pytest.raises(ValueError, match=text):
            UDA(**options)
    with pytest.raises(ValueError, match=r"UDA: batch\.y holds the class 7, but there are 4 classes; pass class ids"):
        UDA()(net(), draw()._replace(y=torch.tensor([1, 7, 0])))
