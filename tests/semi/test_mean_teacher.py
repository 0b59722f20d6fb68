"""Mean Teacher against a slow reference that moves a teacher of its own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi.mean_teacher import MeanTeacher
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, run, softmax


@pytest.mark.parametrize(("decay", "early"), [(0.9, 0.5), (1.0, 0.0)])
def test_equals_the_slow_loop(decay: float, early: float) -> None:
    model = net(1)
    algorithm = MeanTeacher(model, weight=5.0, ramp=0.4, decay=decay, early_decay=early)
    slow = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(8):
        batch = draw(step)
        z, u, target = logits(model, batch.x), logits(model, batch.views[0]), softmax(logits(slow, batch.views[1]))
        labelled = np.mean([cross_entropy(row, y) for row, y in zip(z, batch.y.tolist(), strict=True)])
        unlabelled = np.mean(
            [
                sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / CLASSES
                for p, t in zip(softmax(u), target, strict=True)
            ]
        )
        x = step / 8 / 0.4
        rise = 1.0 if x >= 1 else math.exp(-5 * (1 - x) ** 2)
        algorithm.set_progress(step / 8)
        output = algorithm(model, batch)
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-10)
        assert output.parts["unlabelled"].item() == pytest.approx(unlabelled, rel=1e-10, abs=1e-30)
        assert output.loss.item() == pytest.approx(labelled + 5.0 * rise * unlabelled, rel=1e-10)
        assert output.pseudo.tolist() == target.argmax(1).tolist()
        assert output.weight.tolist() == [1.0] * 6
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        algorithm.after_step(model)
        keep = early if x < 1 else decay
        state = {name: keep * v + (1 - keep) * model.state_dict()[name] for name, v in slow.state_dict().items()}
        slow.load_state_dict(state)
        for name, value in algorithm.teacher.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-12, atol=1e-14)
    assert not torch.equal(algorithm.teacher[0].weight, model[0].weight) or decay == 0.0


def test_promises() -> None:
    check_promises(MeanTeacher)
    check_promises(lambda model: MeanTeacher(model, ramp=0.0, weight=1.0, decay=0.5), unlabelled=2, labelled=4)


def test_the_teacher_is_a_copy_that_is_not_trained() -> None:
    model, batch = net(), draw()
    algorithm = MeanTeacher(model, ramp=0.0)
    assert all(not p.requires_grad for p in algorithm.parameters())
    assert len(list(algorithm.parameters())) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    before = copy.deepcopy(algorithm.state_dict())
    output = algorithm(model, batch)
    output.loss.backward()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in algorithm.parameters())


def test_gradient_flows_through_the_first_view_alone() -> None:
    batch, model = draw(), net()
    algorithm = MeanTeacher(model, ramp=0.0)
    views = [view.requires_grad_() for view in batch.views]
    first, second = gradients(algorithm(model, batch), views)
    assert bool(first.any(1).all())
    assert not second.any()


def test_batch_norm() -> None:
    """The teacher normalises by its batch of all samples; the running statistics are the model's."""
    model, batch = net(norm=True), draw()
    algorithm = MeanTeacher(model)
    teacher = algorithm.teacher
    hidden: list[torch.Tensor] = []
    teacher[0].register_forward_hook(lambda module, args, out: hidden.append(out))
    output = algorithm(model, batch)
    norm, own = teacher[1], model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(own, nn.BatchNorm1d)
    assert len(hidden[0]) == 9
    assert (norm.num_batches_tracked, own.num_batches_tracked) == (0, 1)
    normed = (hidden[0] - hidden[0].mean(0)) / (hidden[0].var(0, unbiased=False) + norm.eps).sqrt()
    assert torch.equal(output.pseudo, teacher[3](normed.tanh()).argmax(1)[3:])
    algorithm.after_step(model)
    assert torch.equal(norm.running_mean, own.running_mean)
    assert norm.num_batches_tracked == 1


def test_the_teacher_of_a_model_in_evaluation_mode_trains() -> None:
    model = net(norm=True).eval()
    algorithm = MeanTeacher(model)
    model.train()
    batch = draw()
    assert algorithm(model, batch._replace(views=batch.views[:1] * 2)).parts["unlabelled"] == 0.0


def test_training_draws_teacher_and_model_together() -> None:
    model = net()
    batches = [draw(0, labelled=6)] * 30
    outputs = run(model, MeanTeacher(model, weight=10.0, ramp=0.0, decay=0.9), batches, steps=30)
    assert outputs[-1].parts["labelled"] < outputs[0].parts["labelled"]


def test_settings_and_refusals() -> None:
    assert "weight=100, ramp=0.25, decay=0.999, early_decay=0.99" in repr(MeanTeacher(net()))
    with pytest.raises(
        TypeError, match=r"MeanTeacher: model is a function; pass the torch\.nn\.Module that is trained\."
    ):
        MeanTeacher(lambda x: x)  # type: ignore[arg-type]
    for options, text in [
        ({"decay": 1.5}, r"MeanTeacher: decay is 1\.5; pass a number from 0 to 1\."),
        ({"early_decay": -1}, r"MeanTeacher: early_decay is -1; pass a number from 0 to 1\."),
        ({"weight": -1}, r"MeanTeacher: weight is -1; pass a finite number of at least 0\."),
        ({"ramp": 3}, r"MeanTeacher: ramp is 3; pass a number from 0 to 1\."),
    ]:
        with pytest.raises(ValueError, match=text):
            MeanTeacher(net(), **options)
