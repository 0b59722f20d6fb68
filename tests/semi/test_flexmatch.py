"""FlexMatch against a slow reading of its algorithm, and its thresholds at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import MixedPairs, SemiBatch
from hardmix.semi.flexmatch import FlexMatch
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, rng, run, softmax

COUNT = 20


def make(model: nn.Module | None = None, **options: object) -> FlexMatch:
    return FlexMatch(num_classes=CLASSES, num_unlabelled=COUNT, **options)


def slow_thresholds(seen: list[int], tau: float, warm_up: bool) -> list[float]:
    counts = [seen.count(c) for c in range(CLASSES)]
    most = max(*counts, seen.count(-1)) if warm_up else max(counts)
    beta = [count / most if most else 0.0 for count in counts]
    return [tau * b / (2 - b) for b in beta]


@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_equals_the_slow_loop(warm_up: bool, tau: float) -> None:
    model, algorithm = net(2, spread=8.0), make(threshold=tau, warm_up=warm_up, weight=1.5)
    seen = [-1] * COUNT
    masks = []
    for step in range(20):
        batch = draw(step)
        assert batch.ids is not None
        z, weak, strong = (logits(model, part) for part in (batch.x, *batch.views))
        thresholds = slow_thresholds(seen, tau, warm_up)
        labelled = np.mean([cross_entropy(row, y) for row, y in zip(z, batch.y.tolist(), strict=True)])
        losses, mask = [], []
        for row, target, i in zip(strong, softmax(weak), batch.ids.tolist(), strict=True):
            c = int(target.argmax())
            mask.append(float(target[c] >= thresholds[c]))
            losses.append(mask[-1] * cross_entropy(row, c))
            if target[c] >= tau:
                seen[i] = c
        masks += mask
        output = run(model, algorithm, [batch])[0]
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-12)
        assert output.parts["unlabelled"].item() == pytest.approx(np.mean(losses), rel=1e-12)
        assert output.loss.item() == pytest.approx(labelled + 1.5 * np.mean(losses), rel=1e-12)
        assert output.weight.tolist() == mask
        assert algorithm.last.tolist() == seen
        assert algorithm.class_thresholds().tolist() == pytest.approx(slow_thresholds(seen, tau, warm_up), rel=1e-6)
    assert 0 < np.mean(masks) < 1
    assert len(set(seen)) >= 3


def test_promises() -> None:
    check_promises(make)
    check_promises(lambda model: make(joint=False, warm_up=False, pairs=MixedPairs()))


def test_gradient_flows_through_the_trusted_strong_views_alone() -> None:
    batch = draw(3)
    views = tuple(view.requires_grad_() for view in batch.views)
    algorithm = make(threshold=0.9)
    algorithm.last.copy_(torch.arange(COUNT) % 3)  # class 3 has a threshold of 0, the others of 0.9
    output = algorithm(net(), batch._replace(views=views))
    weak, strong = gradients(output, list(views))
    assert not weak.any()
    assert torch.equal(strong.any(1), output.weight > 0)
    assert 0 < output.weight.sum() < 6


def set_state(counts: dict[int, int], **options: object) -> FlexMatch:
    algorithm = make(threshold=0.9, **options)
    algorithm.last.copy_(torch.tensor([c for c, n in counts.items() for _ in range(n)]))
    return algorithm


def test_at_the_start_everything_counts() -> None:
    for warm_up in (True, False):
        algorithm = make(warm_up=warm_up)
        assert algorithm.class_thresholds().tolist() == [0.0] * CLASSES
        assert algorithm(net(), draw()).weight.tolist() == [1.0] * 6


def test_thresholds_rise_with_what_is_learnt() -> None:
    # half of the samples never: without warm-up the best class is at tau already
    counts = {0: 5, 1: 3, 2: 2, -1: 10}
    got = set_state(counts).class_thresholds().tolist()
    assert got == pytest.approx([0.9 * b / (2 - b) for b in (0.5, 0.3, 0.2, 0.0)], rel=1e-6)
    got = set_state(counts, warm_up=False).class_thresholds().tolist()
    assert got == pytest.approx([0.9 * b / (2 - b) for b in (1.0, 0.6, 0.4, 0.0)], rel=1e-6)
    # the warm-up is over once a class outnumbers what was never used
    got = set_state({0: 9, 1: 3, -1: 8}).class_thresholds().tolist()
    assert got == pytest.approx([0.9, 0.9 * (1 / 3) / (2 - 1 / 3), 0.0, 0.0], rel=1e-6)


def test_all_of_one_class() -> None:
    assert set_state({2: COUNT}).class_thresholds().tolist() == pytest.approx([0.0, 0.0, 0.9, 0.0])


class Sure(nn.Module):
    """Logits are ten times the sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10.0 * x


def test_a_sample_twice_in_a_batch_is_remembered_where_it_was_confident() -> None:
    rows = torch.eye(CLASSES)[[1, 2, 0]]
    rows[1] = 0.0  # not confident
    x, y = torch.eye(CLASSES)[:1], torch.tensor([0])
    for ids in ([7, 7, 3], [3, 7, 3]):
        algorithm = make()
        algorithm.last[7] = 3
        algorithm(Sure(), SemiBatch(x, y, (rows, rows), torch.tensor(ids)))
        assert algorithm.last[7] == (1 if ids[0] == 7 else 3)
        assert algorithm.last[3] == 0
        assert int((algorithm.last >= 0).sum()) == 2


def test_what_is_remembered_stays_until_another_class_is_confident() -> None:
    algorithm = make()
    x, y, ids = torch.eye(CLASSES)[:1], torch.tensor([0]), torch.tensor([4])
    for row, want in ((torch.eye(CLASSES)[1], 1), (torch.zeros(CLASSES), 1), (torch.eye(CLASSES)[3], 3)):
        algorithm(Sure(), SemiBatch(x, y, (row[None], row[None]), ids))
        assert algorithm.last[4] == want


def test_pairs_see_its_weights() -> None:
    """With thresholds of 0 every pair counts, with high ones none does."""
    batch = draw()
    loose, strict = make(pairs=MixedPairs(ramp=0.0)), make(threshold=1.0, pairs=MixedPairs(ramp=0.0))
    strict.last.copy_(torch.arange(COUNT) % CLASSES)
    assert loose(net(), batch, generator=rng()).parts["pair"] > 0
    assert strict(net(spread=0.1), batch, generator=rng()).parts["pair"] == 0


def test_refusals() -> None:
    batch = draw()
    for change, error, text in [
        ({"ids": None}, ValueError, r"FlexMatch: batch\.ids is missing; pass the \(U,\) numbers"),
        ({"ids": [1, 2]}, TypeError, r"FlexMatch: batch\.ids is a list; pass a torch\.Tensor\."),
        ({"ids": torch.arange(5)}, ValueError, r"batch\.ids has shape \(5,\) .*; pass \(6,\) integers, one for each"),
        ({"ids": torch.rand(6)}, ValueError, r"batch\.ids has shape \(6,\) and dtype torch.float32; pass \(6,\) int"),
        ({"ids": torch.arange(15, 21)}, ValueError, r"batch\.ids runs from 15 to 20, but num_unlabelled is 20; pass"),
        ({"ids": torch.arange(-1, 5)}, ValueError, r"batch\.ids runs from -1 to 4, but num_unlabelled is 20; pass"),
    ]:
        with pytest.raises(error, match=text):
            make()(net(), batch._replace(**change))
    with pytest.raises(ValueError, match=r"FlexMatch: the model predicts 3 classes, but this was made for 4; give"):
        make()(net(classes=3), batch._replace(y=batch.y % 3))
    for options, error, text in [
        ({"num_classes": 1}, ValueError, r"FlexMatch: num_classes is 1; pass an integer of at least 2\."),
        ({"num_unlabelled": 0}, ValueError, r"num_unlabelled is 0; pass an integer of at least 1\."),
        ({"threshold": 0.0}, ValueError, r"threshold is 0\.0; pass a number above 0 and at most 1"),
        ({"warm_up": 1}, TypeError, r"warm_up is 1; pass True or False\."),
        ({"pairs": "mixup"}, TypeError, r"pairs is a str; pass MixedPairs\(\.\.\.\) or None\."),
    ]:
        with pytest.raises(error, match=text):
            FlexMatch(**{"num_classes": 4, "num_unlabelled": 20, **options})
