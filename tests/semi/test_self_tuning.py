"""Self-Tuning against a slow reading of it: queues as lists, keys by hand; what several processes share; the edges."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import MixedPairs, SemiBatch, self_tuning
from hardmix.semi.self_tuning import SelfTuning, enqueue, pseudo_group_contrast
from hardmix.semi.supervised import Supervised
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, rng, run, softmax

DIM, SIZE = 7, 3


def make(model: nn.Module, seed: int = 1, **options: object) -> SelfTuning:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SelfTuning(**{"model": model, "dim": DIM, "queue": SIZE, **options})


def twins(batch: SemiBatch, seed: int = 50) -> SemiBatch:
    return batch._replace(twin=batch.x + 0.3 * torch.randn(batch.x.shape, generator=rng(seed), dtype=batch.x.dtype))


def slow_contrast(q: np.ndarray, key: np.ndarray, queues: list[list[np.ndarray]], c: int, temperature: float) -> float:
    positive = [key, *queues[c]]
    others = [k for other, keys in enumerate(queues) if other != c for k in keys]
    total = sum(np.exp(q @ k / temperature) for k in (*positive, *others))
    return float(-np.mean([np.log(np.exp(q @ k / temperature) / total) for k in positive]))


class Slow:
    """Keys, queues and losses of SelfTuning for `net`, whose weights it is told."""

    def __init__(self, model: nn.Module, algorithm: SelfTuning, temperature: float, momentum: float) -> None:
        self.temperature, self.momentum = temperature, momentum
        self.queues = [[key.numpy().copy() for key in keys] for keys in algorithm.queue]
        self.place = [0] * CLASSES
        self.key = self.weights(model, algorithm)

    @staticmethod
    def weights(model: nn.Module, algorithm: SelfTuning) -> list[np.ndarray]:
        found = [*model[0].parameters(), *algorithm.projector.parameters()]
        return [p.detach().numpy().copy() for p in found]

    @staticmethod
    def encode(weights: list[np.ndarray], x: torch.Tensor) -> np.ndarray:
        w, b, pw, pb = weights
        projected = np.tanh(x.detach().numpy() @ w.T + b) @ pw.T + pb
        return projected / np.linalg.norm(projected, axis=1, keepdims=True)

    def contrast(self, weights: list[np.ndarray], x: torch.Tensor, other: torch.Tensor, classes: list[int]) -> float:
        queries, keys = self.encode(weights, x), self.encode(self.key, other)
        rows = list(zip(queries, keys, classes, strict=True))
        loss = np.mean([slow_contrast(q, k, self.queues, c, self.temperature) for q, k, c in rows])
        for _, k, c in rows:
            self.queues[c][self.place[c]] = k
            self.place[c] = (self.place[c] + 1) % len(self.queues[c])
        return float(loss)

    def follow(self, weights: list[np.ndarray]) -> None:
        m = self.momentum
        self.key = [m * key + (1 - m) * weight for key, weight in zip(self.key, weights, strict=True)]


@pytest.mark.parametrize(("temperature", "momentum"), [(0.07, 0.9), (0.5, 0.0)])
def test_equals_the_slow_loop(temperature: float, momentum: float) -> None:
    model = net(2)
    algorithm = make(model, temperature=temperature, momentum=momentum, weight=0.6)
    slow = Slow(model, algorithm, temperature, momentum)
    for step in range(8):
        batch = twins(draw(step), step)
        weights = slow.weights(model, algorithm)
        z, zu = logits(model, batch.x), logits(model, batch.views[0])
        labelled = np.mean([cross_entropy(row, y) for row, y in zip(z, batch.y.tolist(), strict=True)])
        first = slow.contrast(weights, batch.x, batch.twin, batch.y.tolist())
        second = slow.contrast(weights, *batch.views, zu.argmax(1).tolist())
        output = run(model, algorithm, [batch])[0]
        slow.follow(slow.weights(model, algorithm))
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-12)
        assert output.parts["labelled_contrast"].item() == pytest.approx(first, rel=1e-11)
        assert output.parts["unlabelled"].item() == pytest.approx(second, rel=1e-11)
        assert output.loss.item() == pytest.approx(labelled + 0.6 * (first + second), rel=1e-11)
        assert output.pseudo.tolist() == zu.argmax(1).tolist()
        assert output.weight.tolist() == [1.0] * 6
        np.testing.assert_allclose(algorithm.queue.numpy(), np.array(slow.queues), rtol=1e-11, atol=1e-13)
        assert algorithm.place.tolist() == slow.place
        got = [*algorithm.key_model[0].parameters(), *algorithm.key_projector.parameters()]
        for key, want in zip(got, slow.key, strict=True):
            np.testing.assert_allclose(key.numpy(), want, rtol=1e-12)
    assert len({*slow.place}) > 1


def test_promises() -> None:
    check_promises(make)
    check_promises(lambda model: make(model, view="strong", threshold=0.6, pairs=MixedPairs()))
    check_promises(make, unlabelled=11, labelled=9)  # more keys of a class in a batch than its queue holds


def test_a_fresh_one_goes_on_from_the_state_dict() -> None:
    """Made with other random weights and queues, of another model."""
    model = net()
    algorithm = make(model)
    run(model, algorithm, [twins(draw(seed)) for seed in range(3)])
    fresh = make(net(9), seed=5)
    assert not torch.equal(fresh.queue, algorithm.queue)
    fresh.load_state_dict(algorithm.state_dict())
    batch = twins(draw(3))
    assert torch.equal(fresh(model, batch).loss, algorithm(model, batch).loss)
    assert torch.equal(fresh.queue, algorithm.queue)
    assert torch.equal(fresh.place, algorithm.place)


def test_where_the_gradients_go() -> None:
    batch = twins(draw(3))
    x, twin = batch.x.requires_grad_(), batch.twin.requires_grad_()
    view, other = (v.requires_grad_() for v in batch.views)
    model = net()
    algorithm = make(model)
    output = algorithm(model, batch)
    ours = [*model[2].parameters(), *algorithm.projector.parameters()]
    of_x, of_twin, of_view, of_other, *rest = gradients(output, [x, twin, view, other, *ours])
    assert bool(of_x.any(1).all())
    assert bool(of_view.any(1).all())
    assert not of_twin.any()
    assert not of_other.any()
    # the classifier learns from the cross entropy alone
    plain = gradients(Supervised()(model, batch._replace(views=(), twin=None)), list(model[2].parameters()))
    for got, want in zip(rest[:2], plain, strict=True):
        torch.testing.assert_close(got, want)
    assert all(bool(grad.any()) for grad in rest[2:])
    trained = [name for name, p in algorithm.named_parameters() if p.requires_grad]
    assert trained == ["projector.weight", "projector.bias"]
    algorithm(model, batch).loss.backward()  # the queue was written to, which the backward pass must not mind
    assert all(p.grad is None for p in algorithm.key_model.parameters())


def test_the_contrast_is_differentiated_right() -> None:
    g = rng(1)
    queries, keys = (nn.functional.normalize(torch.randn(4, 5, generator=g, dtype=torch.float64)) for _ in range(2))
    queue = nn.functional.normalize(torch.randn(3, 2, 5, generator=g, dtype=torch.float64), dim=2)
    classes = torch.tensor([0, 2, 2, 1])
    queries.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: pseudo_group_contrast(q, keys, queue, classes, temperature=0.3), (queries,)
    )
    got = pseudo_group_contrast(queries, keys, queue, classes, temperature=0.3)
    queues = [list(k.numpy()) for k in queue]
    for i, c in enumerate(classes.tolist()):
        want = slow_contrast(queries[i].detach().numpy(), keys[i].numpy(), queues, c, 0.3)
        assert got[i].item() == pytest.approx(want, rel=1e-12)


def test_the_lowest_contrast() -> None:
    """All keys of the class at the query, all others far: log(K + 1); all keys alike: log of their number."""
    query = torch.eye(3)[:1]
    queue = torch.stack([query.expand(4, 3), -query.expand(4, 3)])
    zero = torch.zeros(1, dtype=torch.long)
    got = pseudo_group_contrast(query, query, queue, zero, temperature=0.01)
    assert got.item() == pytest.approx(np.log(5))
    alike = pseudo_group_contrast(query, query, queue.abs(), zero)
    assert alike.item() == pytest.approx(np.log(9))
    for dtype in (torch.float16, torch.bfloat16):
        half = pseudo_group_contrast(query.to(dtype), query.to(dtype), queue.to(dtype), zero, temperature=0.01)
        assert half.dtype == torch.float32
        assert torch.equal(half, got)


def test_autocast_leaves_the_contrast_alone() -> None:
    query, queue = nn.functional.normalize(torch.randn(2, 9, generator=rng())), torch.randn(3, 4, 9, generator=rng())
    classes = torch.tensor([0, 2])
    want = pseudo_group_contrast(query, query, queue, classes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pseudo_group_contrast(query, query, queue, classes), want)
        model, batch = net().float(), draw()
        batch = SemiBatch(batch.x.float(), batch.y, tuple(view.float() for view in batch.views))
        output = make(model)(model, batch)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("classes", [[], [0], [0, 0, 0, 0, 0, 0, 0, 0], [2, 0, 2, 2, 1, 2, 2, 0], [1, 1, 1]])
def test_the_queue_is_a_ring_for_each_class(classes: list[int]) -> None:
    queue = -torch.arange(1.0, 10.0).view(3, 3, 1)
    place = torch.tensor([2, 0, 1])
    want, at = queue.clone(), place.tolist()
    keys = torch.arange(1.0, len(classes) + 1)[:, None]
    for key, c in zip(keys, classes, strict=True):
        want[c, at[c]] = key
        at[c] = (at[c] + 1) % 3
    before = queue.clone()
    if not classes:
        return
    got, places = enqueue(queue, place, keys, torch.tensor(classes))
    assert torch.equal(got, want)
    assert places.tolist() == at
    assert torch.equal(queue, before)
    assert place.tolist() == [2, 0, 1]


def test_several_processes_put_in_the_keys_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played by one: what is gathered is this one's rows and the other's, keys and classes in turn."""
    model, batches = net(), [twins(draw(seed)) for seed in (0, 1)]
    algorithm = make(model)
    sent: list[list[torch.Tensor]] = []
    for batch in batches:
        rows: list[torch.Tensor] = []
        monkeypatch.setattr(self_tuning, "gather_rows", lambda r, rows=rows: rows.append(r) or r)
        copy.deepcopy(algorithm)(model, batch)
        sent.append(rows)
    queues = []
    for rank in (0, 1):
        calls = iter(range(4))

        def gather(rows: torch.Tensor, rank: int = rank, calls: object = calls) -> torch.Tensor:
            i = next(calls)
            assert torch.equal(rows, sent[rank][i])
            return torch.cat([sent[0][i], sent[1][i]])

        monkeypatch.setattr(self_tuning, "gather_rows", gather)
        mine = copy.deepcopy(algorithm)
        mine(model, batches[rank])
        queues.append(mine.queue)
    monkeypatch.undo()
    joined = SemiBatch(*(torch.cat(pair) for pair in zip(*(b[:2] for b in batches), strict=True)))
    views = tuple(torch.cat(pair) for pair in zip(*(b.views for b in batches), strict=True))
    twin = torch.cat([b.twin for b in batches])
    algorithm(model, joined._replace(views=views, twin=twin))
    assert torch.equal(queues[0], queues[1])
    torch.testing.assert_close(queues[0], algorithm.queue, rtol=1e-12, atol=1e-12)


def test_without_a_twin_the_keys_are_of_the_same_view() -> None:
    model, batch = net(), draw()
    alone, told = make(model)(model, batch), make(model)(model, batch._replace(twin=batch.x))
    assert torch.equal(alone.loss, told.loss)
    assert not torch.equal(make(model)(model, twins(batch)).loss, alone.loss)
    assert SelfTuning.twins
    assert not Supervised.twins


def test_the_key_model_follows() -> None:
    model = net(norm=True)
    algorithm = make(model.eval(), momentum=0.75)
    assert algorithm.key_model.training
    start = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    algorithm.after_step(model)
    for key, first in zip(algorithm.key_model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(key, first + 0.25)
    for key, weight in zip(algorithm.key_projector.parameters(), algorithm.projector.parameters(), strict=True):
        torch.testing.assert_close(key, weight)
    still = make(net(), momentum=1.0)
    before = copy.deepcopy(still.key_model.state_dict())
    run(net(), still, [twins(draw())])
    assert all(torch.equal(value, before[name]) for name, value in still.key_model.state_dict().items())


def test_batch_norm_sees_labelled_and_unlabelled_samples_apart() -> None:
    model, batch = net(norm=True), twins(draw())
    algorithm = make(model)
    want = copy.deepcopy(model)
    keys = copy.deepcopy(model)
    algorithm(model, batch)
    for reference, parts, got in (
        (want, (batch.x, batch.views[0]), model),
        (keys, (batch.twin, batch.views[1]), algorithm.key_model),
    ):
        for part in parts:
            reference(part)
        assert torch.equal(got[1].running_mean, reference[1].running_mean)
        assert got[1].num_batches_tracked == 2


def test_pairs_are_of_the_first_view_and_trusted_by_the_threshold() -> None:
    model, batch, tau = net(), twins(draw()), 0.7
    pairs = MixedPairs(ramp=0.0)
    output = make(model, threshold=tau, pairs=pairs)(model, batch, generator=rng())
    plain = make(model)(model, batch)
    q = softmax(logits(model, batch.views[0])).max(1)
    assert output.weight.tolist() == [float(p >= tau) for p in q]
    assert 0 < output.weight.sum() < 6
    want = pairs(model, batch.x, batch.y, batch.views[0], output.pseudo, output.weight, generator=rng())
    assert torch.equal(output.parts["pair"], want.detach())
    torch.testing.assert_close(output.loss, plain.loss + want)
    algorithm = make(model, pairs=MixedPairs())
    algorithm.set_progress(0.5)
    assert algorithm.pairs is not None
    assert algorithm.pairs.progress == 0.5


def test_a_class_that_is_never_predicted_keeps_its_random_keys() -> None:
    model = net()
    algorithm = make(model)
    with torch.no_grad():
        model[2].bias[3] = -1e4
    before = algorithm.queue[3].clone()
    batch = draw()
    algorithm(model, batch._replace(y=batch.y.clamp(max=2)))
    assert torch.equal(algorithm.queue[3], before)
    assert algorithm.place[3] == 0
    assert algorithm.place.sum() > 0
    torch.testing.assert_close(algorithm.queue.norm(dim=2), torch.ones(CLASSES, SIZE, dtype=torch.float64))


def test_views() -> None:
    assert make(net()).views == SelfTuning.views == ("weak", "weak")
    assert make(net(), view="strong").views == ("strong", "strong")


def test_defaults_are_the_papers() -> None:
    algorithm = SelfTuning(model=net().float())
    assert algorithm.queue.shape == (CLASSES, 32, 1024)
    assert algorithm.queue.dtype == algorithm.projector.weight.dtype == torch.float32
    assert (algorithm.temperature, algorithm.momentum, algorithm.weight) == (0.07, 0.999, 1.0)


def test_it_pulls_the_classes_apart() -> None:
    """Queries end up closer to keys of their class than to those of the others."""
    model, batch = net(), twins(draw(labelled=12))
    algorithm = make(model, momentum=0.5)
    first, *_, last = (o.parts["labelled_contrast"].item() for o in run(model, algorithm, [batch] * 60, steps=60))
    assert last < 0.5 * first


def test_refusals() -> None:
    model, batch = net(), draw()
    for options, error, text in [
        ({"model": nn.Tanh()}, ValueError, r"the model has no linear layer to read features in front of; pass one"),
        ({"head": "nix"}, ValueError, r"head names 'nix', which is no linear layer of the model"),
        ({"dim": 0}, ValueError, r"dim is 0; pass an integer of at least 1\."),
        ({"queue": 2.5}, ValueError, r"queue is 2\.5; pass an integer of at least 1\."),
        ({"temperature": 0.0}, ValueError, r"temperature is 0\.0; pass a finite number greater than 0\."),
        ({"momentum": 1.5}, ValueError, r"momentum is 1\.5; pass a number from 0 to 1\."),
        ({"weight": -1.0}, ValueError, r"weight is -1\.0; pass a finite number of at least 0\."),
        ({"view": "week"}, ValueError, r"view is 'week'; pass one of 'weak', 'strong' \(did you mean \"weak\"\?\)\."),
        ({"threshold": 0.0}, ValueError, r"threshold is 0\.0; pass a number above 0 and at most 1"),
        ({"pairs": 3}, TypeError, r"pairs is a int; pass MixedPairs\(\.\.\.\) or None\."),
    ]:
        with pytest.raises(error, match=f"SelfTuning: {text}"):
            make(**{"model": model, **options})
    algorithm = make(model)
    with pytest.raises(ValueError, match=r"SelfTuning: batch\.views holds 1 views; pass 2: weak, weak\."):
        algorithm(model, batch._replace(views=batch.views[:1]))
    with pytest.raises(
        ValueError, match=r"SelfTuning: batch\.twin has shape \(2, 6\), the labelled samples \(3, 6\); pass"
    ):
        algorithm(model, batch._replace(twin=batch.x[:2]))
    with pytest.raises(TypeError, match=r"SelfTuning: batch\.twin is a list; pass a torch\.Tensor\."):
        algorithm(model, batch._replace(twin=[1]))
    with pytest.raises(
        ValueError, match=r"SelfTuning: batch\.y holds the class 4, but there are 4 classes; pass class"
    ):
        algorithm(model, batch._replace(y=torch.tensor([0, 4, 1])))
