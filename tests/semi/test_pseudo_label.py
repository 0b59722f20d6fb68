"""Pseudo-Label against a slow reference; its ramp, and batch norm joint or not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import MixedPairs
from hardmix.semi.pseudo_label import PseudoLabel
from tests.semi.cases import check_promises, cross_entropy, draw, gradients, logits, net, rng, softmax


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("tau", [0.4, 0.7])
def test_equals_the_slow_loop(joint: bool, tau: float) -> None:
    model, algorithm = net(1), PseudoLabel(threshold=tau, weight=3.0, ramp=0.5, joint=joint)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = []
    for step in range(6):
        batch = draw(step, views=1)
        z, u = logits(model, batch.x), logits(model, batch.views[0])
        labelled = np.mean([cross_entropy(row, y) for row, y in zip(z, batch.y.tolist(), strict=True)])
        mask = [float(max(q) >= tau) for q in softmax(u)]
        unlabelled = np.mean([m * cross_entropy(row, int(row.argmax())) for m, row in zip(mask, u, strict=True)])
        algorithm.set_progress(step / 6)
        output = algorithm(model, batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-12)
        assert output.parts["unlabelled"].item() == pytest.approx(unlabelled, rel=1e-12)
        assert output.loss.item() == pytest.approx(labelled + 3.0 * min(1.0, step / 3) * unlabelled, rel=1e-12)
        assert output.weight.tolist() == mask
        masks += mask
    assert 0 < np.mean(masks) < 1


def test_promises() -> None:
    check_promises(lambda model: PseudoLabel(threshold=0.5))
    check_promises(lambda model: PseudoLabel(ramp=0.0, joint=False, pairs=MixedPairs(ramp=0.0)))


def test_the_gradient_is_that_of_the_prediction_with_a_constant_label() -> None:
    batch, model = draw(views=1), net()
    u = batch.views[0].requires_grad_()
    output = PseudoLabel(threshold=0.6, ramp=0.0)(model, batch._replace(views=(u,)))
    z = model(u)
    losses = nn.functional.cross_entropy(z, z.argmax(1), reduction="none")
    want = torch.autograd.grad((losses * output.weight).mean(), u)[0]
    torch.testing.assert_close(gradients(output, [u])[0], want)
    assert torch.equal(want.any(1), output.weight > 0)
    assert 0 < output.weight.sum() < 6


def test_ramp() -> None:
    batch, model = draw(views=1), net(spread=20.0)

    def share(progress: float, **options: float) -> float:
        algorithm = PseudoLabel(**options)
        algorithm.set_progress(progress)
        output = algorithm(model, batch)
        return ((output.loss - output.parts["labelled"]) / output.parts["unlabelled"]).item()

    assert share(0.0) == 0.0
    assert share(0.2) == pytest.approx(0.5)
    assert share(0.4) == pytest.approx(1.0)
    assert share(1.0, weight=2.0) == pytest.approx(2.0)
    assert share(0.0, ramp=0.0) == pytest.approx(1.0)


def test_running_statistics() -> None:
    """Joint: one batch of all samples moves them; else the labelled ones alone, while each part has its own batch."""
    batch = draw(views=1)
    model = net(norm=True)
    hidden: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda module, args, out: hidden.append(out.detach()))
    for joint, count in ((True, 9), (False, 3)):
        fresh = copy.deepcopy(model)
        hidden.clear()
        output = PseudoLabel(joint=joint)(fresh, batch, generator=rng())
        norm = fresh[1]
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.num_batches_tracked == 1
        assert len(hidden[0]) == count
        torch.testing.assert_close(norm.running_mean, 0.1 * hidden[0].mean(0))
        seen = hidden[0] if joint else hidden[1]
        normed = (seen - seen.mean(0)) / (seen.var(0, unbiased=False) + norm.eps).sqrt()
        assert torch.equal(output.pseudo, fresh[3](normed.tanh()).argmax(1)[-6:])


def test_settings_and_refusals() -> None:
    assert PseudoLabel.views == ("weak",)
    assert "threshold=0.95, weight=1, joint=True, ramp=0.4" in repr(PseudoLabel())
    with pytest.raises(ValueError, match=r"PseudoLabel: batch\.views holds 2 views; pass 1: weak\."):
        PseudoLabel()(net(), draw())
    for options, text in [
        ({"ramp": -0.1}, r"PseudoLabel: ramp is -0\.1; pass a number from 0 to 1\."),
        ({"threshold": 0}, r"PseudoLabel: threshold is 0; pass a number above 0"),
        ({"weight": float("inf")}, r"PseudoLabel: weight is inf; pass a finite number of at least 0\."),
    ]:
        with pytest.raises(ValueError, match=text):
            PseudoLabel(**options)
