"""MixMatch against a slow reading of its algorithm; its mixup, its guesses and batch norm."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.mixing import CutMix, Mixup
from hardmix.semi import MixedPairs, SemiBatch
from hardmix.semi.mixmatch import MixMatch, mix_all
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, rng, softmax


def slow_sharpen(p: np.ndarray, temperature: float) -> np.ndarray:
    q = p ** (1 / temperature)
    return q / q.sum(-1, keepdims=True)


def slow_step(model: nn.Module, batch: SemiBatch, seed: int, temperature: float, alpha: float) -> tuple[float, float]:
    """(labelled, unlabelled) of algorithm 1 and equations 2 to 5, sample by sample, for a model without batch norm."""
    guess = np.mean([softmax(logits(model, view)) for view in batch.views], 0)
    q = slow_sharpen(guess, temperature)
    x = torch.cat([batch.x, *batch.views])
    p = np.concatenate([np.eye(CLASSES)[batch.y.numpy()], *[q] * len(batch.views)])
    drawn = Mixup(alpha, pairing="permutation").plan(x, generator=rng(seed))
    labelled, unlabelled = [], []
    for i, (j, lam) in enumerate(zip(drawn.partner.tolist(), drawn.lam.tolist(), strict=True)):
        share = max(lam, 1 - lam)
        z = logits(model, (share * x[i] + (1 - share) * x[j])[None])[0]
        target = share * p[i] + (1 - share) * p[j]
        if i < len(batch.x):
            labelled.append(cross_entropy(z, target))
        else:
            unlabelled.append(sum((a - b) ** 2 for a, b in zip(softmax(z), target, strict=True)) / CLASSES)
    return float(np.mean(labelled)), float(np.mean(unlabelled))


@pytest.mark.parametrize(("views", "temperature", "alpha"), [(2, 0.5, 0.75), (1, 1.0, 0.2), (3, 0.25, 4.0)])
def test_equals_the_slow_loop(views: int, temperature: float, alpha: float) -> None:
    model = net()
    algorithm = MixMatch(guesses=views, temperature=temperature, alpha=alpha, weight=30.0, ramp=0.5)
    assert algorithm.views == ("weak",) * views
    for step in range(6):
        batch = draw(step, views=views)
        algorithm.set_progress(step / 6)
        labelled, unlabelled = slow_step(model, batch, 50 + step, temperature, alpha)
        output = algorithm(model, batch, generator=rng(50 + step))
        # Shares are drawn in float32.
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-6)
        assert output.parts["unlabelled"].item() == pytest.approx(unlabelled, rel=1e-5)
        ramp = min(1.0, step / 3)
        assert output.loss.item() == pytest.approx(labelled + 30.0 * ramp * unlabelled, rel=1e-5)
        guess = np.mean([softmax(logits(model, view)) for view in batch.views], 0)
        assert output.pseudo.tolist() == guess.argmax(1).tolist()
        assert output.weight.tolist() == [1.0] * 6


def test_promises() -> None:
    check_promises(lambda model: MixMatch())
    check_promises(lambda model: MixMatch(guesses=3, ramp=0.0, pairs=MixedPairs()), unlabelled=9, labelled=3)
    check_promises(lambda model: MixMatch(guesses=1), unlabelled=5, labelled=5)


def test_the_ramp_starts_at_nothing_and_ends_at_all() -> None:
    batch, model = draw(), net()
    losses = {}
    for progress in (0.0, 0.005, 1 / 64, 1.0):
        algorithm = MixMatch()
        algorithm.set_progress(progress)
        output = algorithm(model, batch, generator=rng())
        losses[progress] = (output.loss - output.parts["labelled"]).item() / output.parts["unlabelled"].item()
    assert losses[0.0] == 0.0
    assert losses[0.005] == pytest.approx(75 * 0.005 * 64)
    assert losses[1 / 64] == losses[1.0] == pytest.approx(75.0)
    assert MixMatch(ramp=0.0).progress == 0.0
    output = MixMatch(ramp=0.0)(model, batch, generator=rng())
    assert (output.loss - output.parts["labelled"]).item() == pytest.approx(75 * output.parts["unlabelled"].item())


def test_every_row_keeps_the_larger_share_and_may_meet_any_other() -> None:
    x = torch.eye(12)
    met = torch.zeros(12, 12)
    for seed in range(200):
        mixed, targets = mix_all(Mixup(0.75, pairing="permutation"), [x[:4], x[4:]], [x[:4], x[4:]], rng(seed))
        assert [len(part) for part in mixed] == [4, 8]
        rows = torch.cat(mixed)
        assert torch.equal(rows, torch.cat(targets))
        assert bool((rows.diagonal() >= 0.5).all())
        assert torch.allclose(rows.sum(1), torch.ones(12))
        met += rows > 0
    assert bool((met > 0).all())
    shares = torch.cat([mix_all(Mixup(0.75, pairing="permutation"), [x], [x], rng(s))[0][0].diagonal() for s in (1, 2)])
    assert len(shares.unique()) > 12  # drawn for each sample


def test_no_gradient_through_the_guess() -> None:
    """With a share of 1 for each own sample the loss is squared error to constants."""
    model, batch = net(), draw()
    view = batch.views[0].requires_grad_()
    algorithm = MixMatch(alpha=1e-4, ramp=0.0, weight=1.0, guesses=1)  # shares of 0 or 1
    output = algorithm(model, batch._replace(views=(view,)), generator=rng(3))
    q = torch.from_numpy(slow_sharpen(softmax(logits(model, view.detach())), 0.5))
    want = (model(view).softmax(1) - q).square().mean()
    assert output.parts["unlabelled"].item() == pytest.approx(want.item(), rel=1e-4)
    torch.testing.assert_close(gradients(output, [view])[0], torch.autograd.grad(want, view)[0], rtol=1e-3, atol=1e-9)


def test_guesses_leave_running_statistics_alone_and_one_forward_moves_them() -> None:
    model, batch = net(norm=True), draw(unlabelled=9)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    algorithm = MixMatch(pairs=MixedPairs(ramp=0.0))
    guess = algorithm.guess(model, batch.views)
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    # batch statistics, of each view by itself
    want = []
    for view in batch.views:
        h = model[0](view)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + norm.eps).sqrt()
        want.append(model[3](h.tanh()).softmax(1))
    torch.testing.assert_close(guess, torch.stack(want).mean(0).detach())
    inputs: list[torch.Tensor] = []
    handle = model[0].register_forward_hook(lambda module, args, out: inputs.append(out.detach()))
    algorithm(model, batch, generator=rng())
    handle.remove()
    assert norm.num_batches_tracked == 1
    # 2 guesses, 1 labelled and 6 unlabelled pieces of three rows, then the pairs
    assert [len(h) for h in inputs] == [9, 9, *[3] * 8]
    torch.testing.assert_close(norm.running_mean, 0.1 * inputs[2].mean(0))
    assert norm.track_running_stats


def test_pairs_are_a_further_loss_of_guesses_that_are_sure() -> None:
    batch = draw()
    for spread, low, high in ((40.0, 1e-3, 1e3), (0.01, 0.0, 0.0)):
        plain, paired = MixMatch(), MixMatch(pairs=MixedPairs(CutMix(inside=True), ramp=0.5, weight=2.0))
        for algorithm in (plain, paired):
            algorithm.set_progress(0.25)
        model, wide = net(spread=spread), nn.Flatten(1)
        images = batch._replace(x=batch.x.view(3, 1, 2, 3), views=tuple(v.view(6, 1, 2, 3) for v in batch.views))
        whole = nn.Sequential(wide, model)
        alone = plain(whole, images, generator=rng(5))
        both = paired(whole, images, generator=rng(5))
        assert low <= both.parts["pair"] <= high
        torch.testing.assert_close(both.loss, alone.loss + both.parts["pair"])
        assert torch.equal(both.parts["unlabelled"], alone.parts["unlabelled"])
    assert paired.pairs is not None
    assert paired.pairs.progress == 0.25


def test_refusals() -> None:
    batch = draw(unlabelled=7)
    with pytest.raises(
        ValueError, match=r"MixMatch: the batch has 7 unlabelled samples for 3 labelled ones; pass a mul"
    ):
        MixMatch()(net(), batch)
    with pytest.raises(ValueError, match=r"MixMatch: batch\.y holds the class 9, but there are 4 classes"):
        MixMatch()(net(), draw()._replace(y=torch.tensor([0, 9, 1])))
    with pytest.raises(ValueError, match=r"MixMatch: batch\.views holds 2 views; pass 3: weak, weak, weak\."):
        MixMatch(guesses=3)(net(), draw())
    for options, error, text in [
        ({"guesses": 0}, ValueError, r"MixMatch: guesses is 0; pass an integer of at least 1\."),
        ({"temperature": 0.0}, ValueError, r"temperature is 0\.0; pass a finite number greater than 0\."),
        ({"alpha": -1}, ValueError, r"MixMatch: alpha is -1; pass a finite number greater than 0\."),
        ({"weight": -1.0}, ValueError, r"weight is -1\.0; pass a finite number of at least 0\."),
        ({"ramp": 2}, ValueError, r"ramp is 2; pass a number from 0 to 1\."),
        ({"threshold": 0}, ValueError, r"threshold is 0; pass a number above 0"),
        ({"pairs": 1}, TypeError, r"pairs is a int; pass MixedPairs"),
    ]:
        with pytest.raises(error, match=text):
            MixMatch(**options)


def test_the_settings_are_shown_and_a_copy_goes_on() -> None:
    algorithm = MixMatch(guesses=3)
    assert "guesses=3, temperature=0.5, weight=75" in repr(algorithm)
    assert copy.deepcopy(algorithm).views == algorithm.views
    assert algorithm.state_dict() == {}
