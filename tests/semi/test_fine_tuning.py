"""Fine-tuning, alone and with mixed pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.losses import DecoupledMixupLoss, SoftCrossEntropyLoss
from hardmix.mixing import CutMix, Mixup
from hardmix.semi import MixedPairs, SemiBatch
from hardmix.semi.fine_tuning import FineTuning
from hardmix.semi.pairs import partners
from hardmix.semi.supervised import Supervised
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, rng, run, softmax


def slow_pairs(model: nn.Module, batch: SemiBatch, seed: int, tau: float, eta: float) -> tuple[float, list[float]]:
    """The pairs' loss, and which pseudo-classes are trusted, pair by pair, for mixup and a model without batch norm."""
    q = softmax(logits(model, batch.views[0]))
    trust = [float(row.max() >= tau) for row in q]
    g = rng(seed)
    rows = partners(len(batch.x), len(q), g).tolist()
    n = len(batch.x)
    drawn = Mixup(alpha=1.0).plan(torch.cat([batch.x, batch.x]), generator=g, partner=torch.arange(2 * n).roll(n)).lam
    losses = []
    for i, (row, lam) in enumerate(zip(rows, drawn.tolist(), strict=False)):
        share = min(lam, 1 - lam)
        a, b = int(batch.y[i]), int(q[row].argmax())
        z = logits(model, (share * batch.x[i] + (1 - share) * batch.views[0][row])[None])[0]
        loss = share * cross_entropy(z, a) + (1 - share) * cross_entropy(z, b)
        if a != b:
            p = softmax(z)
            loss -= eta * np.log(p[a] / (1 - p[b]))
        losses.append(trust[row] * loss)
    return float(np.mean(losses)), trust


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_equals_the_slow_loop(eta: float) -> None:
    model, tau = net(2), 0.7
    pairs = MixedPairs(Mixup(alpha=1.0), DecoupledMixupLoss(eta=eta, asymmetric=True), weight=1.5, ramp=0.0)
    algorithm = FineTuning(threshold=tau, pairs=pairs)
    masks = []
    for step in range(6):
        batch = draw(step, views=1, labelled=4)
        labelled = np.mean([cross_entropy(z, y) for z, y in zip(logits(model, batch.x), batch.y.tolist(), strict=True)])
        pseudo = logits(model, batch.views[0]).argmax(1).tolist()
        want, trust = slow_pairs(model, batch, 100, tau, eta)
        output = run(model, algorithm, [batch])[0]  # draws from rng(100)
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-12)
        assert output.parts["pair"].item() == pytest.approx(1.5 * want, rel=1e-6)  # shares are float32
        assert output.loss.item() == pytest.approx(labelled + 1.5 * want, rel=1e-6)
        assert output.pseudo.tolist() == pseudo
        assert output.weight.tolist() == trust
        masks += trust
    assert 0 < np.mean(masks) < 1


def test_promises() -> None:
    check_promises(lambda model: FineTuning())
    check_promises(lambda model: FineTuning(threshold=0.6, pairs=MixedPairs()))
    check_promises(lambda model: FineTuning(pairs=MixedPairs(objective=SoftCrossEntropyLoss())), labelled=8)


def test_which_samples_it_takes() -> None:
    assert FineTuning.views == ("weak",)
    assert FineTuning.only_for_pairs
    assert FineTuning().views == ()
    assert FineTuning(pairs=MixedPairs()).views == ("weak",)
    assert not Supervised.only_for_pairs


def test_without_pairs_it_is_the_baseline() -> None:
    batch = draw(views=0)
    output, want = FineTuning()(net(), batch), Supervised()(net(), batch)
    assert torch.equal(output.loss, want.loss)
    assert output.parts == want.parts
    assert output.pseudo.shape == output.weight.shape == (0,)


def test_without_a_trusted_pair_it_is_the_baseline() -> None:
    batch = draw(views=1)
    output = FineTuning(threshold=1.0, pairs=MixedPairs(ramp=0.0))(net(), batch, generator=rng())
    assert output.parts["pair"] == 0.0
    assert torch.equal(output.loss, Supervised()(net(), batch._replace(views=())).loss)
    assert output.weight.tolist() == [0.0] * 6
    counted = FineTuning(threshold=1.0, pairs=MixedPairs(ramp=0.0, confident=False))
    assert counted(net(), batch, generator=rng()).parts["pair"] > 0.0


def test_no_gradient_through_the_pseudo_classes() -> None:
    """Unlabelled samples get one as parts of trusted pairs alone, which with a share of 1 would be a pair's all."""
    batch = draw(3, views=1)
    view = batch.views[0].requires_grad_()
    algorithm = FineTuning(threshold=0.7, pairs=MixedPairs(ramp=0.0))
    output = algorithm(net(), batch._replace(views=(view,)), generator=rng())
    got = gradients(output, [view])[0].any(1)
    rows = torch.zeros(6, dtype=torch.bool)
    rows[partners(3, 6, rng())] = True
    assert torch.equal(got, rows & (output.weight > 0))
    assert 0 < got.sum() < 3


def test_the_pairs_rise_with_the_training() -> None:
    batch, algorithm = draw(views=1), FineTuning(threshold=0.1, pairs=MixedPairs(weight=2.0, ramp=0.5))
    got = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        algorithm.set_progress(progress)
        got.append(algorithm(net(), batch, generator=rng()).parts["pair"].item())
    assert got == pytest.approx([0.0, got[3] / 2, got[3], got[3]])
    assert got[3] > 0


def test_images_and_boxes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES)).double()
    batch = draw(views=1, shape=(3, 8, 8))
    pairs = MixedPairs(CutMix(alpha=1.0, inside=True), ramp=0.0)
    output = FineTuning(threshold=0.2, pairs=pairs)(model, batch, generator=rng())
    assert output.parts["pair"] > 0


def test_refusals() -> None:
    batch = draw(views=1)
    with pytest.raises(ValueError, match=r"FineTuning: batch\.views holds 1 views; pass 0: none\."):
        FineTuning()(net(), batch)
    with pytest.raises(ValueError, match=r"FineTuning: batch\.views holds 0 views; pass 1: weak\."):
        FineTuning(pairs=MixedPairs())(net(), batch._replace(views=()))
    with pytest.raises(TypeError, match=r"FineTuning: pairs is a str; pass MixedPairs\(\.\.\.\) or None\."):
        FineTuning(pairs="mixup")
    with pytest.raises(ValueError, match=r"FineTuning: threshold is 0\.0; pass a number above 0 and at most 1"):
        FineTuning(threshold=0.0)
