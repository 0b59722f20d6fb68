"""Batch Spectral Shrinkage against numpy's singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hardmix.semi import SemiBatch
from hardmix.semi.bss import BSS, spectral_shrinkage
from hardmix.semi.supervised import Supervised
from tests.semi.cases import FEATURES, check_promises, cross_entropy, draw, gradients, logits, net, rng, run


def slow_shrinkage(features: np.ndarray, k: int) -> float:
    """From the eigenvalues of the Gram matrix of the shorter side, not from an SVD."""
    gram = features @ features.T if features.shape[0] < features.shape[1] else features.T @ features
    return float(np.sort(np.linalg.eigvalsh(gram))[:k].sum())


@pytest.mark.parametrize("k", [1, 2])
def test_equals_the_slow_loop(k: int) -> None:
    model = net(2)
    algorithm = BSS(model=model, weight=0.3, k=k)
    for step in range(5):
        batch = draw(step, views=0, labelled=5)
        labelled = np.mean([cross_entropy(z, y) for z, y in zip(logits(model, batch.x), batch.y.tolist(), strict=True)])
        want = 0.3 * slow_shrinkage(logits(model[:2], batch.x), k)
        output = run(model, algorithm, [batch])[0]
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-12)
        assert output.parts["shrinkage"].item() == pytest.approx(want, rel=1e-9)
        assert output.loss.item() == pytest.approx(labelled + want, rel=1e-9)
        assert want > 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (7, 3)])
@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_any_shape(shape: tuple[int, int], k: int) -> None:
    features = torch.randn(*shape, generator=rng(), dtype=torch.float64, requires_grad=True)
    got = spectral_shrinkage(features, k)
    assert got.item() == pytest.approx(slow_shrinkage(features.detach().numpy(), k), rel=1e-9)
    assert torch.autograd.gradcheck(lambda f: spectral_shrinkage(f, k), (features,))
    if k >= min(shape):
        assert got.item() == pytest.approx(features.detach().square().sum().item())


def test_the_edges_have_a_finite_gradient() -> None:
    same = torch.eye(4)  # all singular values are equal
    low = torch.ones(4, 6)  # rank 1
    for features, want in ((same, 2.0), (low, 0.0), (torch.zeros(3, 3), 0.0), (torch.full((2, 3), 1e15), 0.0)):
        x = features.clone().requires_grad_()
        got = spectral_shrinkage(x, 2 if want else 1)
        got.backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert got.item() == pytest.approx(want, abs=1e-6 * float(features.square().sum()))
    half = torch.randn(3, 5, generator=rng()).half()
    assert spectral_shrinkage(half).dtype == torch.float32
    torch.testing.assert_close(spectral_shrinkage(half), spectral_shrinkage(half.float()))


def test_promises() -> None:
    check_promises(lambda model: BSS(model=model))
    check_promises(lambda model: BSS(model=model, weight=1.0, k=3), labelled=9)


def test_nothing_is_kept_of_the_model() -> None:
    model = net()
    algorithm = BSS(model=model)
    assert not list(algorithm.parameters())
    assert not list(algorithm.children())
    assert not algorithm.state_dict()
    assert algorithm(net(7), draw(views=0)).loss.isfinite()  # another model of the kind


def test_the_penalty_stops_in_front_of_the_classifier() -> None:
    model, batch = net(), draw(views=0)
    with_it, without = (a(model, batch) for a in (BSS(model=model, weight=1.0), Supervised()))
    ours, plain = (gradients(output, list(model.parameters())) for output in (with_it, without))
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], plain[2:], strict=True))
    assert not torch.allclose(ours[0], plain[0])
    assert torch.equal(BSS(model=model, weight=0.0)(model, batch).loss, without.loss)


def test_it_shrinks_what_it_should() -> None:
    batch = draw(views=0, labelled=5)
    values = []
    for weight in (0.0, 0.3):
        model = net()
        run(model, BSS(model=model, weight=weight), [batch] * 80, steps=80)
        with torch.no_grad():
            values.append(torch.linalg.svdvals(model[:2](batch.x))[-1].item())
    assert values[1] < 0.3 * values[0]


def test_a_named_head() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, 4)).double()
    batch = draw(views=0)
    output = BSS(model=model, head="0", weight=1.0, k=1)(model, batch)
    assert output.parts["shrinkage"].item() == pytest.approx(slow_shrinkage(batch.x.numpy(), 1), rel=1e-9)


def test_refusals() -> None:
    model = net()
    for options, error, text in [
        ({"model": nn.Tanh()}, ValueError, r"BSS: the model has no linear layer to read features in front of; pass"),
        ({"model": torch.tanh}, TypeError, r"BSS: model is a builtin_function_or_method; pass a torch\.nn\.Module\."),
        ({"head": "9"}, ValueError, r"BSS: head names '9', which is no linear layer of the model"),
        ({"weight": -1.0}, ValueError, r"BSS: weight is -1\.0; pass a finite number of at least 0\."),
        ({"k": 0}, ValueError, r"BSS: k is 0; pass an integer of at least 1\."),
    ]:
        with pytest.raises(error, match=text):
            BSS(**{"model": model, **options})
    with pytest.raises(TypeError, match=r"BSS: model is a function; pass a torch\.nn\.Module\."):
        BSS(model=model)(lambda x: x, SemiBatch(torch.zeros(2, 4), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"spectral_shrinkage: features has shape \(3,\); pass a batch with 2 axes"):
        spectral_shrinkage(torch.zeros(3))
    with pytest.raises(ValueError, match=r"spectral_shrinkage: features holds NaN or infinity in rows 0, 1; repair"):
        spectral_shrinkage(torch.full((2, 2), float("nan")))
