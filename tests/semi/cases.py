"""Small models and batches, slow arithmetic that shares no code with the algorithms, and what each of them promises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardmix.semi import SemiAlgorithm, SemiBatch, SemiOutput

FEATURES, CLASSES = 6, 4
Make = Callable[[nn.Module], SemiAlgorithm]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(
    seed: int = 0, *, norm: bool = False, classes: int = CLASSES, spread: float = 4.0, features: int = FEATURES
) -> nn.Sequential:
    """A small float64 classifier of features, sure of some samples; its head is its last layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
        model = nn.Sequential(nn.Linear(features, 8), *middle, nn.Tanh(), nn.Linear(8, classes)).double()
        with torch.no_grad():
            model[-1].weight.mul_(spread)
    return model


def draw(
    seed: int = 0,
    *,
    views: int = 2,
    labelled: int = 3,
    unlabelled: int = 6,
    classes: int = CLASSES,
    shape: tuple[int, ...] = (FEATURES,),
    num_unlabelled: int = 20,
) -> SemiBatch:
    """A float64 batch whose views are the same samples with some noise."""
    g = rng(seed)
    x = torch.randn(labelled, *shape, generator=g, dtype=torch.float64)
    u = torch.randn(unlabelled, *shape, generator=g, dtype=torch.float64)
    noisy = [u + 0.3 * torch.randn(u.shape, generator=g, dtype=torch.float64) for _ in range(views)]
    y = torch.randint(classes, (labelled,), generator=g)
    ids = torch.randperm(num_unlabelled, generator=g)[:unlabelled]
    return SemiBatch(x, y, tuple(noisy), ids)


def softmax(z: np.ndarray) -> np.ndarray:
    """Rows of probabilities."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z: np.ndarray, target: Any) -> float:
    """-sum_c t_c log p_c of one row of logits; a class id stands for its one-hot row."""
    rows = np.eye(len(z))[target] if np.ndim(target) == 0 else np.asarray(target)
    log_probs = z - z.max() - np.log(np.exp(z - z.max()).sum())
    return float(-sum(t * lp for t, lp in zip(rows, log_probs, strict=True) if t > 0))


def logits(model: nn.Module, x: Tensor) -> np.ndarray:
    """float64 logits of a model without batch norm; the samples do not see each other there."""
    with torch.no_grad():
        return model(x).numpy()


def gradients(output: SemiOutput, tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of the loss, 0 where nothing flows."""
    found = torch.autograd.grad(output.loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def run(model: nn.Module, algorithm: SemiAlgorithm, batches: list[SemiBatch], steps: int = 10) -> list[SemiOutput]:
    """A plain loop of `steps`, of which the batches are the first ones."""
    optimizer = torch.optim.SGD([*model.parameters(), *(p for p in algorithm.parameters() if p.requires_grad)], lr=0.1)
    outputs = []
    for step, batch in enumerate(batches):
        algorithm.set_progress(step / steps)
        output = algorithm(model, batch, generator=rng(100 + step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        algorithm.after_step(model)
        outputs.append(output)
    return outputs


def same(a: SemiOutput, b: SemiOutput) -> bool:
    """Bit for bit."""
    pairs = [(a.loss, b.loss), (a.pseudo, b.pseudo), (a.weight, b.weight), (a.logits, b.logits)]
    pairs += [(a.parts[name], b.parts[name]) for name in a.parts]
    return a.parts.keys() == b.parts.keys() and all(torch.equal(left, right) for left, right in pairs)


def image_net(seed: int = 0, **options: Any) -> nn.Sequential:
    """The same of images (N, 1, 3, 3)."""
    return nn.Sequential(nn.Flatten(), *net(seed, features=9, **options))


def check_promises(
    make: Make, *, unlabelled: int = 6, labelled: int = 3, net: Callable[..., nn.Sequential] = net, **options: Any
) -> None:
    """What holds for every algorithm.

    Args:
        make: the algorithm for a model.
        net: what makes the models.
        options: of `draw`.
    """
    probe = make(net())
    options = {"views": len(probe.views), "unlabelled": unlabelled, "labelled": labelled, **options}
    batches = [draw(seed, **options) for seed in range(6)]

    # the output is as described, finite, and without a gradient where it says so
    model = net()
    output = run(model, make(model), batches[:1])[0]
    assert output.loss.ndim == 0
    assert output.loss.requires_grad
    assert output.pseudo.shape == output.weight.shape == ((unlabelled,) if probe.views else (0,))
    assert output.pseudo.dtype == torch.long
    assert output.logits.shape == (labelled, CLASSES)
    for value in (*output.parts.values(), output.weight, output.logits):
        assert not value.requires_grad
        assert bool(value.isfinite().all())
    assert bool(((output.weight >= 0) & (output.weight <= 1)).all())
    assert "labelled" in output.parts
    assert "unlabelled" in output.parts or not probe.views or probe.only_for_pairs

    # the batch is not written into
    before = copy.deepcopy(batches[0])
    model = net()
    algorithm = make(model)
    algorithm(model, batches[0], generator=rng())
    assert all(torch.equal(a, b) for a, b in zip(before.views, batches[0].views, strict=True))
    assert torch.equal(before.x, batches[0].x)

    # every step is the same with the same generator
    outputs = []
    for _ in range(2):
        model = net()
        outputs.append(run(model, make(model), batches))
    assert all(same(a, b) for a, b in zip(*outputs, strict=True))

    # state_dict, and a deep copy, hold all that a step depends on
    model = net()
    algorithm = make(model)
    run(model, algorithm, batches[:3])
    saved, weights = copy.deepcopy(algorithm.state_dict()), copy.deepcopy(model.state_dict())
    copied = copy.deepcopy(algorithm)
    want = algorithm(model, batches[3], generator=rng(7))
    fresh_model = net(5)
    fresh = make(fresh_model)
    fresh.load_state_dict(saved)
    fresh_model.load_state_dict(weights)
    fresh.set_progress(algorithm.progress)
    assert same(fresh(fresh_model, batches[3], generator=rng(7)), want)
    assert same(copied(model, batches[3], generator=rng(7)), want)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, algorithm.state_dict()[name]), name

    # half types are computed in float32
    for dtype in (torch.bfloat16, torch.float16):
        model = net().to(dtype)
        algorithm = make(model)
        halves = [b._replace(x=b.x.to(dtype), views=tuple(v.to(dtype) for v in b.views)) for b in batches[:2]]
        for batch in halves:
            output = algorithm(model, batch, generator=rng())
            assert output.loss.dtype == torch.float32
            output.loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())

    # sure of everything, and of nothing
    for spread in (1e4, 0.0):
        model = net(spread=spread)
        for batch in batches[:2]:
            output = make(model)(model, batch, generator=rng())
            for grad in gradients(output, list(model.parameters())):
                assert bool(grad.isfinite().all())
            assert bool(output.loss.isfinite())
