"""The baseline: cross entropy of the labelled samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import SemiBatch
from hardmix.semi.supervised import Supervised
from tests.semi.cases import check_promises, cross_entropy, draw, gradients, logits, net, run


def test_equals_the_slow_loop() -> None:
    model, algorithm = net(2), Supervised()
    for step in range(5):
        batch = draw(step, views=0)
        want = np.mean([cross_entropy(z, y) for z, y in zip(logits(model, batch.x), batch.y.tolist(), strict=True)])
        z = logits(model, batch.x)
        output = run(model, algorithm, [batch])[0]
        assert output.loss.item() == pytest.approx(want, rel=1e-12)
        assert output.parts.keys() == {"labelled"}
        assert output.parts["labelled"] == output.loss
        np.testing.assert_allclose(output.logits.numpy(), z, rtol=1e-12)


def test_promises() -> None:
    check_promises(lambda model: Supervised())


def test_it_trains() -> None:
    model, batch = net(), draw(views=0, labelled=6)
    outputs = run(model, Supervised(), [batch] * 60, steps=60)
    assert outputs[-1].loss < 0.2 * outputs[0].loss


def test_there_is_nothing_besides_the_labelled_samples() -> None:
    output = Supervised()(net(), draw(views=0)._replace(ids=None))
    assert output.pseudo.shape == output.weight.shape == (0,)
    assert output.pseudo.dtype == torch.long
    assert not list(Supervised().parameters())
    assert not Supervised().state_dict()
    x = draw(views=0).x.requires_grad_()
    assert bool(gradients(Supervised()(net(), draw(views=0)._replace(x=x)), [x])[0].any(1).all())


def test_refusals() -> None:
    batch = draw(views=0)
    with pytest.raises(ValueError, match=r"Supervised: batch\.views holds 1 views; pass 0: none\."):
        Supervised()(net(), batch._replace(views=(batch.x,)))
    with pytest.raises(
        ValueError, match=r"Supervised: batch\.y holds the class 4, but there are 4 classes; pass class"
    ):
        Supervised()(net(), batch._replace(y=torch.tensor([0, 4, 1])))
    with pytest.raises(TypeError, match=r"Supervised: batch is a tuple; pass a SemiBatch\."):
        Supervised()(net(), (batch.x, batch.y))
    with pytest.raises(ValueError, match=r"logits_of: model gave shape \(3, 6, 1\) for 3 samples"):
        Supervised()(nn.Unflatten(1, (6, 1)), SemiBatch(batch.x, batch.y))
