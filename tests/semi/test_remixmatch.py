"""ReMixMatch against a slow reference over several steps; its rotations, its average and batch norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.mixing import Mixup
from hardmix.semi.remixmatch import ReMixMatch, rotate
from tests.semi.cases import (
    CLASSES,
    check_promises,
    cross_entropy,
    draw,
    gradients,
    image_net,
    logits,
    net,
    rng,
    run,
    softmax,
)

SHARE = torch.tensor([0.4, 0.3, 0.2, 0.1])
SHAPE = (1, 3, 3)


def make(model: nn.Module, **options: object) -> ReMixMatch:
    with torch.random.fork_rng():
        torch.manual_seed(3)  # of the head that tells rotations
        return ReMixMatch(model, SHARE, **options)


def images(seed: int = 0, strong: int = 2, **options: int) -> object:
    return draw(seed, views=1 + strong, shape=SHAPE, **options)


def turned_by_hand(image: np.ndarray, count: int) -> np.ndarray:
    """One (C, S, S) image, counter-clockwise, pixel by pixel."""
    side = image.shape[1]
    for _ in range(count):
        new = np.empty_like(image)
        for row in range(side):
            for column in range(side):
                new[:, side - 1 - column, row] = image[:, row, column]
        image = new
    return image


@pytest.mark.parametrize(("strong", "memory", "rotation"), [(2, 3, 0.5), (1, 1, 0.0), (3, 128, 2.0)])
def test_equals_the_slow_loop(strong: int, memory: int, rotation: float) -> None:
    model = image_net(1)
    algorithm = make(model, strong_views=strong, memory=memory, rotation=rotation, ramp=0.5, weight=1.1)
    assert algorithm.views == ("weak", *["strong"] * strong)
    recent = [np.full(CLASSES, 1 / CLASSES)] * memory
    for step in range(6):
        batch = images(step, strong)
        weak, *others = batch.views
        probs = softmax(logits(model, weak))
        predicted = np.mean(recent, 0)
        guesses = []
        for q in probs:
            a = [v * w / p for v, w, p in zip(q, SHARE.tolist(), predicted, strict=True)]
            a = [(v / sum(a)) ** 2 for v in a]
            guesses.append([v / sum(a) for v in a])
        recent = [*recent[1:], probs.mean(0)]
        x = torch.cat([batch.x, *others, weak])
        p = np.concatenate([np.eye(CLASSES)[batch.y.numpy()], *[guesses] * (strong + 1)])
        g = rng(100)
        plan = Mixup(0.75, pairing="permutation").plan(x, generator=g)
        rows = []
        for i, (j, lam) in enumerate(zip(plan.partner.tolist(), plan.lam.tolist(), strict=True)):
            share = max(lam, 1 - lam)
            z = logits(model, (share * x[i] + (1 - share) * x[j])[None])[0]
            rows.append(cross_entropy(z, share * p[i] + (1 - share) * p[j]))
        want = {"labelled": np.mean(rows[:3]), "unlabelled": np.mean(rows[3:])}
        anchored = zip(logits(model, others[0]), guesses, strict=True)
        want["strong"] = np.mean([cross_entropy(z, q) for z, q in anchored])
        if rotation:
            counts = torch.randint(4, (6,), generator=g).tolist()
            turned = [turned_by_hand(image.numpy(), k) for image, k in zip(others[0], counts, strict=True)]
            with torch.no_grad():
                features = model[:-1](torch.from_numpy(np.stack(turned)))
                z = algorithm.turns(features.float()).double().numpy()
            want["rotation"] = np.mean([cross_entropy(row, k) for row, k in zip(z, counts, strict=True)])
        rise = min(1.0, step / 10 / 0.5)
        total = want["labelled"] + rise * (1.1 * want["unlabelled"] + 0.5 * want["strong"])
        total += rotation * want.get("rotation", 0.0)
        algorithm.set_progress(step / 10)
        output = run_one(model, algorithm, batch, step)
        # Shares of the mixup, the average and the head are float32.
        assert {name: value.item() for name, value in output.parts.items()} == pytest.approx(want, rel=1e-5)
        assert output.loss.item() == pytest.approx(total, rel=1e-5)
        assert output.pseudo.tolist() == np.argmax(guesses, 1).tolist()
        np.testing.assert_allclose(algorithm.recent.numpy(), recent, rtol=1e-5)


def run_one(model: nn.Module, algorithm: ReMixMatch, batch: object, step: int) -> object:
    optimizer = torch.optim.SGD([*model.parameters(), *algorithm.parameters()], lr=0.1)
    output = algorithm(model, batch, generator=rng(100))
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    return output


def test_promises() -> None:
    check_promises(make, net=image_net, shape=SHAPE)
    check_promises(lambda model: make(model, strong_views=1, ramp=0.0, memory=2), net=image_net, shape=SHAPE)
    check_promises(lambda model: make(model, rotation=0.0))  # features will do


def test_rotations() -> None:
    x = torch.arange(40 * 2 * 9.0).view(40, 2, 3, 3)
    turned, count = rotate(x, rng())
    seen = []
    for image, k in zip(turned.numpy(), count.tolist(), strict=True):
        source = [i for i in range(40) if set(image.flatten()) == set(x[i].numpy().flatten())]
        assert len(source) == 1
        np.testing.assert_array_equal(image, turned_by_hand(x[source[0]].numpy(), k))
        seen += source
    assert sorted(seen) == list(range(40))
    assert count.unique().tolist() == [0, 1, 2, 3]
    counts = torch.bincount(torch.cat([rotate(x, rng(seed))[1] for seed in range(50)]), minlength=4)
    assert bool(((counts - 500).abs() < 100).all())
    for n in (1, 2):
        assert rotate(x[:n], rng())[0].shape == (n, 2, 3, 3)


def test_the_head_of_rotations_is_trained_and_nothing_flows_through_guesses() -> None:
    model, batch = image_net(), images(1)
    algorithm = make(model, ramp=0.0)
    assert {name for name, _ in algorithm.named_parameters()} == {"turns.weight", "turns.bias"}
    assert algorithm.turns.in_features == 8
    output = algorithm(model, batch, generator=rng())
    for grad in gradients(output, [*algorithm.parameters(), *model.parameters()]):
        assert bool(grad.any())
    assert list(make(model, rotation=0.0).parameters()) == []
    assert "rotation" not in make(model, rotation=0.0)(model, batch).parts
    # the weak views count through the mixup alone
    weak = batch.views[0].requires_grad_()
    output = make(model, ramp=0.5)(model, batch._replace(views=(weak, *batch.views[1:])), generator=rng())
    grad = gradients(output, [weak])[0]
    plan = Mixup(0.75, pairing="permutation").plan(torch.cat([batch.x, *batch.views]), generator=rng())
    met = plan.partner[:3]  # at the start of the ramp only what is mixed into the labelled samples counts
    rows = [int(i) - 15 for i in met if int(i) >= 15]
    assert torch.equal(grad.flatten(1).any(1), torch.tensor([i in rows for i in range(6)]))


def test_running_statistics_follow_one_forward() -> None:
    model, batch = image_net(norm=True), images()
    norm = model[2]
    assert isinstance(norm, nn.BatchNorm1d)
    inputs: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: inputs.append(out.detach()))
    make(model)(model, batch, generator=rng())
    # the guess, 1 + 3 * 2 pieces, the anchored views, the turned ones
    assert [len(h) for h in inputs] == [6, *[3] * 7, 6, 6]
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * inputs[1].mean(0))


def test_guesses_are_drawn_to_the_wanted_classes() -> None:
    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.55, 0.25, 0.1, 0.1]).log().expand(len(x), 4)

    algorithm = ReMixMatch(Same(), SHARE, rotation=0.0, memory=4, temperature=1.0)
    x = torch.rand(5, 6)
    first = algorithm.guess(Same(), x)
    torch.testing.assert_close(first[0], (SHARE * torch.tensor([0.55, 0.25, 0.1, 0.1])) / 0.325, rtol=1e-5, atol=0)
    for _ in range(4):
        last = algorithm.guess(Same(), x)
    torch.testing.assert_close(algorithm.guess(Same(), x)[0], SHARE)
    assert last.shape == (5, 4)
    # a class without labelled samples, where nothing else is left
    algorithm = ReMixMatch(Same(), torch.tensor([0.0, 1.0, 1.0, 2.0]), rotation=0.0)
    assert algorithm.wanted.tolist() == [0.0, 0.25, 0.25, 0.5]
    assert bool((algorithm.guess(Same(), x)[:, 0] == 0).all())
    sure = algorithm.guess(lambda x: torch.tensor([1e4, 0.0, 0.0, 0.0]).expand(len(x), 4), x)
    assert sure[0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_settings_and_refusals() -> None:
    model = image_net()
    text = "strong_views=2, temperature=0.5, weight=1.5, strong_weight=0.5, rotation=0.5, ramp=0.015625"
    assert text in repr(make(model))
    batch = images()
    wide = batch._replace(x=batch.x.view(3, 1, 1, 9), views=tuple(v.view(6, 1, 1, 9) for v in batch.views))
    with pytest.raises(
        ValueError, match=r"ReMixMatch: the strong views have shape \(6, 1, 1, 9\), which can't be turned"
    ):
        make(model)(model, wide)
    assert make(model, rotation=0)(model, wide).loss.isfinite()
    with pytest.raises(
        ValueError, match=r"the model's classifier reads 5 features, that of the model it was made for 8;"
    ):
        make(model)(nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Linear(5, 4)).double(), batch)
    with pytest.raises(TypeError, match=r"ReMixMatch: model is a function; pass a torch\.nn\.Module\."):
        make(model)(lambda x: model(x), batch)
    with pytest.raises(ValueError, match=r"ReMixMatch: batch\.views holds 3 views; pass 2: weak, strong\."):
        make(model, strong_views=1)(model, batch)
    with pytest.raises(ValueError, match=r"ReMixMatch: the model predicts 3 classes, but this was made for 4; give"):
        make(net(), rotation=0)(net(classes=3), draw(views=3, classes=3))
    for share, error, text in [
        ([0.5, 0.5], TypeError, r"class_share is a list; pass a torch\.Tensor\."),
        (torch.ones(1), ValueError, r"class_share has shape \(1,\); pass \(C,\) shares of at least 2 classes\."),
        (torch.ones(2, 2), ValueError, r"class_share has shape \(2, 2\); pass \(C,\)"),
        (torch.tensor([0.5, -0.5]), ValueError, r"class_share holds \[0\.5, -0\.5\]; pass shares of at least 0 that"),
        (torch.zeros(3), ValueError, r"class_share holds \[0\.0, 0\.0, 0\.0\]; pass shares"),
        (torch.tensor([1.0, float("nan")]), ValueError, r"class_share holds \[1\.0, nan\]; pass shares"),
    ]:
        with pytest.raises(error, match=text):
            ReMixMatch(model, share)
    for options, text in [
        ({"strong_views": 0}, r"ReMixMatch: strong_views is 0; pass an integer of at least 1\."),
        ({"memory": 0}, r"ReMixMatch: memory is 0; pass an integer of at least 1\."),
        ({"alpha": 0}, r"ReMixMatch: alpha is 0; pass a finite number greater than 0\."),
        ({"head": "fc"}, r"ReMixMatch: head names 'fc', which is no linear layer of the model"),
        ({"rotation": -1}, r"ReMixMatch: rotation is -1; pass a finite number of at least 0\."),
    ]:
        with pytest.raises(ValueError, match=text):
            make(model, **options)


def test_a_plain_loop() -> None:
    model = image_net()
    outputs = run(model, make(model), [images(s) for s in range(3)])
    assert all(bool(output.loss.isfinite()) for output in outputs)
