"""Co-Tuning: its relationship of classes, against slow readings and scikit-learn, and its steps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from hardmix.semi import MixedPairs
from hardmix.semi.co_tuning import (
    STRENGTHS,
    CoTuning,
    calibration_scale,
    category_relationship,
    learned_relationship,
)
from hardmix.semi.fine_tuning import FineTuning
from tests.semi.cases import CLASSES, check_promises, cross_entropy, draw, gradients, logits, net, rng, run, softmax

SOURCE = 5


def head(seed: int = 3) -> dict[str, torch.Tensor]:
    """A float64 source classifier of the features of `net`, and a relationship."""
    g = rng(seed)
    return {
        "source_weight": torch.randn(SOURCE, 8, generator=g, dtype=torch.float64),
        "source_bias": torch.randn(SOURCE, generator=g, dtype=torch.float64),
        "relationship": torch.randn(CLASSES, SOURCE, generator=g, dtype=torch.float64).softmax(1),
    }


def make(model: nn.Module, **options: object) -> CoTuning:
    return CoTuning(**{"model": model, **head(), **options})


def samples(n: int, seed: int, *, classes: int = 3, source: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Source predictions that tell a good part of the target classes, and these."""
    g = rng(seed)
    y = torch.randint(classes, (n,), generator=g)
    z = torch.randn(n, source, generator=g, dtype=torch.float64)
    z[torch.arange(n), y] += 1.5
    return z.softmax(1), y


# The step


def test_equals_the_slow_loop() -> None:
    model = net(2)
    algorithm = make(model, weight=1.7)
    w, b, rows = (head()[name].numpy().copy() for name in ("source_weight", "source_bias", "relationship"))
    for step in range(6):
        batch = draw(step, views=0)
        z, features = logits(model, batch.x), logits(model[:2], batch.x)
        labelled = np.mean([cross_entropy(row, y) for row, y in zip(z, batch.y.tolist(), strict=True)])
        terms = [
            cross_entropy(w @ f + b, rows[y] / rows[y].sum()) for f, y in zip(features, batch.y.tolist(), strict=True)
        ]
        # the source classifier moves by its own gradient, (softmax - row) features^T
        delta = 1.7 * (softmax(features @ w.T + b) - rows[batch.y.numpy()]) / len(features)
        output = run(model, algorithm, [batch])[0]
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-12)
        assert output.parts["source"].item() == pytest.approx(1.7 * np.mean(terms), rel=1e-12)
        assert output.loss.item() == pytest.approx(labelled + 1.7 * np.mean(terms), rel=1e-12)
        w, b = w - 0.1 * delta.T @ features, b - 0.1 * delta.sum(0)
        np.testing.assert_allclose(algorithm.source.weight.detach().numpy(), w, rtol=1e-12)
        np.testing.assert_allclose(algorithm.source.bias.detach().numpy(), b, rtol=1e-12)
    assert torch.equal(algorithm.relationship, head()["relationship"])


def test_promises() -> None:
    check_promises(make)
    check_promises(lambda model: make(model, source_bias=None, threshold=0.6, pairs=MixedPairs()))
    check_promises(lambda model: make(model, **{k: v.float() for k, v in head().items()}))


def test_without_its_weight_it_is_fine_tuning() -> None:
    for views, pairs in ((0, None), (1, MixedPairs(ramp=0.0))):
        batch, model = draw(views=views), net()
        ours = make(model, weight=0.0, threshold=0.6, pairs=pairs)(model, batch, generator=rng())
        want = FineTuning(threshold=0.6, pairs=pairs)(model, batch, generator=rng())
        assert torch.equal(ours.loss, want.loss)
        assert torch.equal(ours.weight, want.weight)
    assert CoTuning.only_for_pairs
    assert make(net()).views == ()
    assert make(net(), pairs=MixedPairs()).views == ("weak",)


def test_where_the_gradients_go() -> None:
    """The source term reaches the layers under both classifiers and its own, not the target's classifier."""
    batch, model = draw(views=0), net()
    algorithm = make(model)
    output = algorithm(model, batch)
    plain = FineTuning()(model, batch)
    ours, want = (gradients(o, list(model.parameters())) for o in (output, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], want[2:], strict=True))
    assert not torch.allclose(ours[0], want[0])
    assert all(bool(grad.any()) for grad in gradients(algorithm(model, batch), list(algorithm.parameters())))
    assert [name for name, _ in algorithm.named_parameters()] == ["source.weight", "source.bias"]
    assert set(algorithm.state_dict()) == {"source.weight", "source.bias", "relationship"}


def test_what_is_handed_over_is_copied() -> None:
    given, model = head(), net()
    algorithm = CoTuning(model=model, **given)
    run(model, algorithm, [draw(views=0)])
    assert all(torch.equal(given[name], value) for name, value in head().items())
    for value in given.values():
        value.zero_()
    assert algorithm.relationship.any()
    assert algorithm.source.weight.any()


def test_room_for_weights_of_another_start() -> None:
    """The parameters stay the ones that an optimizer holds, and saved weights of that size fit."""
    model = net()
    wanted, small = (
        make(model),
        make(
            model,
            source_weight=torch.zeros(2, 8),
            source_bias=torch.zeros(2),
            relationship=torch.full((CLASSES, 2), 0.5),
        ),
    )
    held = list(small.parameters())
    small.make_room(SOURCE)
    assert all(a is b for a, b in zip(held, small.parameters(), strict=True))
    assert repr(small.source) == repr(wanted.source)
    small.double().load_state_dict(wanted.state_dict())
    assert torch.equal(small(model, draw(views=0)).loss, wanted(model, draw(views=0)).loss)
    with pytest.raises(ValueError, match="source_classes is 1"):
        small.make_room(1)


def test_it_keeps_what_the_source_classifier_knows() -> None:
    """Trained, g predicts the row of each class; with no relation between the classes it predicts what there is."""
    model, batch = net(), draw(views=0, labelled=12)
    algorithm = make(model, weight=1.0, relationship=torch.eye(CLASSES, SOURCE, dtype=torch.float64))
    first = algorithm(model, batch).parts["source"].item()
    last = run(model, algorithm, [batch] * 150, steps=150)[-1].parts["source"].item()
    assert last < 0.2 * first


# The relationship


def test_the_direct_relationship_equals_the_slow_loop() -> None:
    probs, y = samples(40, 1)
    got = category_relationship(probs, y, 3)
    for c in range(3):
        rows = [row.numpy() for row, label in zip(probs, y, strict=True) if label == c]
        np.testing.assert_allclose(got[c].numpy(), np.mean(rows, 0), rtol=1e-12)
    assert got.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert category_relationship(probs.float(), y.int(), 3).dtype == torch.float32
    torch.testing.assert_close(category_relationship(probs.float(), y, 3), got.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(category_relationship(probs.float(), y, 3), got.float())


def test_a_class_without_a_sample_gets_the_mean_of_all() -> None:
    probs, y = samples(10, 2)
    got = category_relationship(probs, y, 5)
    assert torch.equal(got[:3], category_relationship(probs, y, 3))
    torch.testing.assert_close(got[3], probs.mean(0))
    torch.testing.assert_close(got[4], probs.mean(0))


def slow_learned(probs: np.ndarray, y: np.ndarray, held: np.ndarray, held_y: np.ndarray) -> tuple[np.ndarray, float]:
    """The relationship with scikit-learn's regressions, and the strength that was chosen."""
    fits = []
    for c in sorted(STRENGTHS, reverse=True):
        fit = LogisticRegression(C=c, fit_intercept=False, tol=1e-10, max_iter=20000).fit(probs, y)
        fits.append((float(np.mean(fit.predict(held) == held_y)), c, fit.coef_))
    _, strength, w = max(fits, key=lambda entry: entry[0])  # of equal ones the first
    scales = np.geomspace(0.01, 100, 20001)
    z = held @ w.T
    losses = [np.mean(np.log(np.exp(a * z).sum(1)) - a * z[np.arange(len(z)), held_y]) for a in scales]
    p_target = softmax(scales[int(np.argmin(losses))] * w.T)  # (C_s, C_t)
    joint = p_target * np.concatenate([probs, held]).mean(0)[:, None]
    return (joint / joint.sum(0)).T, strength


@pytest.mark.parametrize("seed", [0, 1])
def test_the_learned_relationship_equals_scikit_learn(seed: int) -> None:
    (probs, y), (held, held_y) = samples(45, 10 + seed), samples(30, 20 + seed)
    want, strength = slow_learned(probs.numpy(), y.numpy(), held.numpy(), held_y.numpy())
    assert 1e-4 < strength <= 1e4
    got = learned_relationship(probs, y, held, held_y, 3)
    np.testing.assert_allclose(got.numpy(), want, atol=2e-3)
    assert got.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert got.argmax(1).tolist() == [0, 1, 2]
    with torch.no_grad():
        assert torch.equal(learned_relationship(probs, y, held, held_y, 3), got)
    with torch.inference_mode():
        made_there = [value.clone() for value in (probs, y, held, held_y)]
        assert torch.equal(learned_relationship(*made_there, 3), got)


def test_the_learned_relationship_at_the_edges() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    y = torch.arange(3).repeat(5)
    got = learned_relationship(eye[y], y, eye[y], y, 5)  # every sample is right at every strength; classes 3, 4 empty
    assert bool(got.isfinite().all())
    assert got.sum(1).tolist() == pytest.approx([1.0] * 5)
    assert got[:3].argmax(1).tolist() == [0, 1, 2]
    assert got[:3].max(1).values.min() > 0.99
    assert learned_relationship(eye[y].float(), y, eye[y].float(), y, 3).dtype == torch.float32


def test_the_calibration_has_the_lowest_loss() -> None:
    g = rng(4)
    y = torch.randint(5, (200,), generator=g)
    z = torch.randn(200, 5, generator=g, dtype=torch.float64)
    z[torch.arange(200), y] += 1.0

    def loss(a: float, spread: float = 1.0) -> float:
        return float(nn.functional.cross_entropy(a * spread * z, y))

    scale = calibration_scale(z, y)
    assert loss(scale) < min(loss(0.999 * scale), loss(1.001 * scale))
    assert 0.3 < scale < 3.0
    assert calibration_scale(7.0 * z, y) == pytest.approx(scale / 7.0, rel=1e-9)
    assert calibration_scale(z, z.argmax(1)) == pytest.approx(100.0)  # all right: as sure as it may be
    assert calibration_scale(z, z.argmin(1)) == pytest.approx(0.01)  # all wrong: as unsure
    assert calibration_scale(torch.zeros(3, 2), torch.tensor([0, 1, 1])) == pytest.approx(100.0)


# Refusals


def test_refusals_of_the_relationship() -> None:
    probs, y = samples(6, 0)
    for arguments, error, text in [
        ((probs.log(), y, 3), ValueError, r"source_probs has values from -.* to -.*; pass rows of probabilities, soft"),
        ((2 * probs, y, 3), ValueError, r"rows that sum to 2 to 2; pass rows of probabilities, softmax\(logits\)\."),
        ((probs[0], y, 3), ValueError, r"source_probs has shape \(4,\); pass a batch with 2 axes"),
        ((probs, y[:5], 3), ValueError, r"labels has 5 entries but source_probs has 6 rows; pass one entry per row\."),
        ((probs, y.double(), 3), TypeError, r"labels has shape \(6,\) and dtype torch\.float64; pass \(N,\) class ids"),
        ((probs, y + 3, 3), ValueError, r"labels holds the class \d, but there are 3 classes; pass class ids from 0"),
        ((probs, y, 1), ValueError, r"num_classes is 1; pass an integer of at least 2\."),
        ((probs * float("nan"), y, 3), ValueError, r"source_probs has values from nan"),
    ]:
        with pytest.raises(error, match=f"category_relationship: .*{text}"):
            category_relationship(*arguments)
        with pytest.raises(error, match=f"learned_relationship: .*{text}"):
            learned_relationship(*arguments[:2], probs, y, arguments[2])
    with pytest.raises(
        ValueError, match=r"learned_relationship: validation_probs has 3 columns but source_probs has 4"
    ):
        learned_relationship(probs, y, *samples(6, 0, source=3), 3)
    with pytest.raises(ValueError, match=r"calibration_scale: logits holds NaN or infinity in rows 0, 1"):
        calibration_scale(probs * float("nan"), y)


def test_refusals_of_the_algorithm() -> None:
    rows, model = head()["relationship"], net()
    for options, error, text in [
        ({"source_weight": torch.rand(5, 7)}, ValueError, r"source_weight has shape \(5, 7\) .*; pass the \(C_s, 8\)"),
        ({"source_weight": torch.rand(1, 8)}, ValueError, r"source_weight has shape \(1, 8\)"),
        ({"source_weight": None}, TypeError, r"source_weight is a NoneType; pass a torch\.Tensor\."),
        (
            {"source_bias": torch.rand(4)},
            ValueError,
            r"source_bias has shape \(4,\), but source_weight has 5 rows; pas",
        ),
        ({"relationship": rows.T}, ValueError, r"relationship has shape \(5, 4\) .*; pass \(4, 5\) probabilities"),
        ({"relationship": 2 * rows}, ValueError, r"relationship has values from .* rows that sum to 2 to 2; pass rows"),
        ({"relationship": rows.long()}, ValueError, r"relationship has shape \(4, 5\) and dtype torch.int64; pass"),
        ({"weight": -1.0}, ValueError, r"weight is -1\.0; pass a finite number of at least 0\."),
        ({"head": "nix"}, ValueError, r"head names 'nix', which is no linear layer of the model"),
        ({"pairs": 3}, TypeError, r"pairs is a int; pass MixedPairs\(\.\.\.\) or None\."),
    ]:
        with pytest.raises(error, match=f"CoTuning: {text}"):
            make(model, **options)
    with pytest.raises(ValueError, match=r"CoTuning: batch\.views holds 1 views; pass 0: none\."):
        make(model)(model, draw(views=1))


def test_deep_copies_go_their_own_way() -> None:
    model, batch = net(), draw(views=0)
    algorithm = make(model)
    copied, before = copy.deepcopy(algorithm), algorithm.source.weight.clone()
    run(copy.deepcopy(model), copied, [batch])
    assert torch.equal(algorithm.source.weight, before)
    assert not torch.equal(copied.source.weight, before)
