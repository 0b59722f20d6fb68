"""FixMatch against a slow reference, with batch norm joint or not; and what all algorithms stand on: batches, forwards
of several parts, the features in front of a classifier, a net with its algorithm."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hardmix.semi import FixMatch, MixedPairs, SemiAlgorithm, SemiBatch
from hardmix.semi.algorithm import frozen_statistics, interleaved, together
from hardmix.semi.features import find_head, with_features
from hardmix.semi.net import SemiNet
from tests.semi.cases import check_promises, cross_entropy, draw, gradients, logits, net, rng, run, softmax


def slow_norm_net(model: nn.Sequential, parts: list[Tensor]) -> list[np.ndarray]:
    """Logits of several parts that batch norm sees as one batch, unit by unit."""
    first, norm, head = (dict(layer.named_parameters()) for layer in (model[0], model[1], model[3]))
    rows = np.concatenate([part.detach().numpy() for part in parts])
    hidden = rows @ first["weight"].detach().numpy().T + first["bias"].detach().numpy()
    out = np.empty_like(hidden)
    for unit in range(hidden.shape[1]):
        column = hidden[:, unit]
        mean = sum(column) / len(column)
        variance = sum((v - mean) ** 2 for v in column) / len(column)
        scale, shift = norm["weight"][unit].item(), norm["bias"][unit].item()
        out[:, unit] = [math.tanh((v - mean) / math.sqrt(variance + 1e-5) * scale + shift) for v in column]
    z = out @ head["weight"].detach().numpy().T + head["bias"].detach().numpy()
    return np.split(z, np.cumsum([len(part) for part in parts])[:-1])


def slow_losses(
    z: np.ndarray, weak: np.ndarray, strong: np.ndarray, y: list[int], tau: float
) -> tuple[float, float, list[float]]:
    """Equations 3 and 4 and the mask."""
    labelled = [cross_entropy(row, c) for row, c in zip(z, y, strict=True)]
    unlabelled, mask = [], []
    for q, row in zip(softmax(weak), strong, strict=True):
        mask.append(1.0 if max(q) >= tau else 0.0)
        unlabelled.append(mask[-1] * cross_entropy(row, int(q.argmax())))
    return float(np.mean(labelled)), float(np.mean(unlabelled)), mask


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_equals_the_slow_loop(norm: bool, joint: bool, tau: float) -> None:
    model, algorithm = net(1, norm=norm), FixMatch(threshold=tau, weight=2.0, joint=joint)
    masks = []
    for step in range(6):
        batch = draw(step)
        weak, strong = batch.views
        if not norm:
            z = [logits(model, part) for part in (batch.x, weak, strong)]
        elif joint:
            z = slow_norm_net(model, [batch.x, weak, strong])
        else:
            first, last = slow_norm_net(model, [batch.x, strong])
            z = [first, slow_norm_net(model, [weak])[0], last]
        labelled, unlabelled, mask = slow_losses(*z, batch.y.tolist(), tau)
        output = run(model, algorithm, [batch])[0]
        assert output.parts["labelled"].item() == pytest.approx(labelled, rel=1e-10)
        assert output.parts["unlabelled"].item() == pytest.approx(unlabelled, rel=1e-10)
        assert output.loss.item() == pytest.approx(labelled + 2.0 * unlabelled, rel=1e-10)
        assert output.weight.tolist() == mask
        assert output.pseudo.tolist() == z[1].argmax(1).tolist()
        np.testing.assert_allclose(output.logits.numpy(), z[0], rtol=1e-10)
        masks += mask
    assert 0 < np.mean(masks) < 1


def test_promises() -> None:
    check_promises(lambda model: FixMatch())
    check_promises(lambda model: FixMatch(threshold=0.6, joint=False, pairs=MixedPairs()))
    check_promises(lambda model: FixMatch(), unlabelled=2, labelled=5)


@pytest.mark.parametrize("joint", [True, False])
def test_gradient_flows_through_the_trusted_strong_views_alone(joint: bool) -> None:
    batch = draw(4)
    x = batch.x.requires_grad_()
    views = [view.requires_grad_() for view in batch.views]
    output = FixMatch(threshold=0.6, joint=joint)(net(), batch)
    labelled, weak, strong = gradients(output, [x, *views])
    assert bool(labelled.any(1).all())
    assert not weak.any()
    assert torch.equal(strong.any(1), output.weight > 0)
    assert 0 < output.weight.sum() < 6


def test_without_a_confident_sample_the_second_term_is_zero() -> None:
    output = FixMatch(threshold=1.0)(net(), draw())
    assert output.parts["unlabelled"] == 0.0
    assert output.weight.tolist() == [0.0] * 6
    assert torch.equal(output.loss.detach(), output.parts["labelled"])


def test_a_prediction_that_is_not_a_number_makes_the_loss_none() -> None:
    batch = draw()
    batch.views[0][2] = math.nan
    assert FixMatch(threshold=1.0)(net(), batch).loss.isnan()


def test_weak_views_run_without_a_gradient_where_they_are_not_joint() -> None:
    modes = []
    model = net()
    model[0].register_forward_hook(lambda module, args, out: modes.append((len(out), out.requires_grad)))
    FixMatch(joint=False)(model, draw())
    assert modes == [(6, False), (9, True)]
    modes.clear()
    FixMatch()(model, draw())
    assert modes == [(15, True)]


def test_progress_reaches_the_pairs() -> None:
    algorithm = FixMatch(pairs=MixedPairs())
    algorithm.set_progress(0.3)
    assert algorithm.pairs is not None
    assert algorithm.progress == algorithm.pairs.progress == 0.3
    for bad in (1.1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"FixMatch: fraction is .*; pass a number from 0 to 1\."):
            algorithm.set_progress(bad)


def test_settings() -> None:
    assert "threshold=0.95, weight=1, joint=True" in repr(FixMatch())
    for options, error, text in [
        ({"threshold": 0}, ValueError, r"FixMatch: threshold is 0; pass a number above 0 and at most 1"),
        ({"threshold": 1.5}, ValueError, r"FixMatch: threshold is 1\.5; pass a number from 0 to 1\."),
        ({"weight": -1}, ValueError, r"FixMatch: weight is -1; pass a finite number of at least 0\."),
        ({"joint": "no"}, TypeError, r"FixMatch: joint is 'no'; pass True or False\."),
        ({"pairs": 0.5}, TypeError, r"FixMatch: pairs is a float; pass MixedPairs\(\.\.\.\) or None\."),
    ]:
        with pytest.raises(error, match=text):
            FixMatch(**options)


# Batches


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, r"FixMatch: batch\.x is a list; pass a torch\.Tensor\."),
        ({"y": [0, 1, 2]}, TypeError, r"FixMatch: batch\.y is a list; pass a torch\.Tensor\."),
        (
            {"y": torch.rand(3)},
            TypeError,
            r"batch\.y has shape \(3,\) and dtype torch\.float32; pass \(B,\) class ids\.",
        ),
        ({"y": torch.zeros(3, dtype=torch.bool)}, TypeError, r"batch\.y has .* dtype torch\.bool; pass \(B,\) class"),
        (
            {"y": torch.eye(3).long()},
            TypeError,
            r"batch\.y has shape \(3, 3\) and dtype torch\.int64; pass \(B,\) class",
        ),
        (
            {"y": torch.arange(2)},
            ValueError,
            r"batch\.y has 2 entries but batch\.x has 3 rows; pass one entry per row\.",
        ),
        (
            {"y": torch.tensor([0, 4, 1])},
            ValueError,
            r"batch\.y holds the class 4, but there are 4 classes; pass class",
        ),
        ({"y": torch.tensor([0, -1, 1])}, ValueError, r"batch\.y holds the class -1, but there are 4 classes"),
        ({"x": torch.tensor(1.0)}, ValueError, r"batch\.x is a number; pass \(B, \.\.\.\) labelled samples\."),
        ({"views": None}, TypeError, r"FixMatch: batch\.views is a NoneType; pass a tuple of tensors, or \(\)\."),
        (
            {"x": torch.rand(3), "views": (torch.tensor(1.0),) * 2},
            ValueError,
            r"the weak view has shape \(\), the labelled samples \(3,\)",
        ),
        ({"views": ()}, ValueError, r"FixMatch: batch\.views holds 0 views; pass 2: weak, strong\."),
        ({"views": (torch.rand(6, 6),) * 3}, ValueError, r"batch\.views holds 3 views; pass 2: weak, strong\."),
        ({"views": ([0], [1])}, TypeError, r"batch\.views \(weak\) is a list; pass a torch\.Tensor\."),
        (
            {"views": (torch.rand(6, 6), torch.rand(5, 6))},
            ValueError,
            r"the strong view has shape \(5, 6\), the labelled samples \(3, 6\) and the first view \(6, 6\); pass",
        ),
        (
            {"views": (torch.rand(6, 7), torch.rand(6, 7))},
            ValueError,
            r"the weak view has shape \(6, 7\), the labelled",
        ),
        (
            {"views": (torch.rand(0, 6),) * 2},
            ValueError,
            r"the weak view is empty; pass at least one unlabelled sample\.",
        ),
        (
            {"x": torch.rand(0, 6), "y": torch.zeros(0, dtype=torch.long)},
            ValueError,
            r"batch\.x has shape \(0, 6\) and is empty; pass at least one labelled sample\.",
        ),
    ],
)
def test_batches_that_do_not_fit(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FixMatch()(net(), draw()._replace(**change))


def test_what_is_no_batch_and_no_classifier() -> None:
    batch = draw()
    with pytest.raises(TypeError, match=r"FixMatch: batch is a tuple; pass a SemiBatch\."):
        FixMatch()(net(), tuple(batch))  # type: ignore[arg-type]
    for model, got in ((lambda x: x.sum(1), r"shape \(15,\)"), (lambda x: [x], "list"), (lambda x: x.long(), "shape")):
        with pytest.raises(
            ValueError, match=rf"model gave {got}.* for 15 samples; pass a model that gives \(N, C\) log"
        ):
            FixMatch()(model, batch)
    for algorithm in (FixMatch(), FixMatch(joint=False)):
        with pytest.raises(
            ValueError, match=r"model gave \d+ rows for \d+ samples; pass a model that gives a row for e"
        ):
            algorithm(lambda x: net()(x)[:-1], batch)
    for algorithm in (FixMatch(), FixMatch(pairs=MixedPairs())):
        with pytest.raises(TypeError, match=r"FixMatch: generator is a str; pass a torch\.Generator or None\."):
            algorithm(net(), batch, generator="x")


def test_narrow_integers_are_classes() -> None:
    batch, model = draw(), net()
    want = FixMatch()(model, batch).loss
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(FixMatch()(model, batch._replace(y=batch.y.to(dtype))).loss, want)


# Forwards of several parts


def test_together_is_one_forward() -> None:
    model = net(norm=True)
    parts = [torch.randn(n, 6, generator=rng(n), dtype=torch.float64) for n in (3, 5, 1)]
    got = together(copy.deepcopy(model), parts)
    want = model(torch.cat(parts)).split([3, 5, 1])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert together(lambda x: x.half(), parts)[0].dtype == torch.float32


@pytest.mark.parametrize("sizes", [(4,), (4, 4), (4, 4, 4), (4, 12, 12), (1, 1, 1), (2, 8), (5, 5, 5, 5, 5, 5, 5)])
def test_interleaved_gives_every_row_its_own_logits(sizes: tuple[int, ...]) -> None:
    model = net()
    parts = [torch.randn(n, 6, generator=rng(i), dtype=torch.float64) for i, n in enumerate(sizes)]
    got = interleaved(model, parts)
    assert [len(part) for part in got] == list(sizes)
    for logits_, part in zip(got, parts, strict=True):
        torch.testing.assert_close(logits_, model(part), rtol=1e-12, atol=1e-12)


def test_interleaved_forwards_mix_the_parts_and_the_first_moves_the_statistics() -> None:
    model = net(norm=True)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    parts = [torch.full((6, 6), float(i), dtype=torch.float64) for i in range(3)]
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, hidden: out.append(hidden.detach()))
    got = interleaved(model, parts)
    assert [sorted(batch[:, 0].tolist()) for batch in seen] == [[0, 0, 1, 1, 2, 2]] * 3
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * out[0].mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * out[0].var(0))
    # every forward is normalised by its own batch
    hidden = (out[1] - out[1].mean(0)) / (out[1].var(0, unbiased=False) + norm.eps).sqrt()
    want = model[3](hidden.tanh())
    rows = {float(row[0]): z for row, z in zip(seen[1], want, strict=True)}
    assert any(torch.allclose(z, rows[1.0]) for z in got[1])
    got[2].sum().backward()
    assert model[0].weight.grad is not None


def test_interleaved_needs_multiples() -> None:
    with pytest.raises(ValueError, match=r"interleaved: parts have \[4, 6\] rows; pass multiples of the first one's\."):
        interleaved(net(), [torch.rand(4, 6).double(), torch.rand(6, 6).double()])


def test_frozen_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    without = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(norm, without)
    x = torch.randn(8, 3, generator=rng())
    model(x)
    before = copy.deepcopy(model.state_dict())
    want = model(2 * x + 1)
    model.load_state_dict(before)
    with frozen_statistics(model):
        assert torch.equal(model(2 * x + 1), want)  # still by the batch
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert norm.track_running_stats
    assert not without.track_running_stats
    with pytest.raises(KeyError), frozen_statistics(model):
        raise KeyError
    assert norm.track_running_stats
    model.eval()
    inside = None
    with frozen_statistics(model):
        inside = norm(x)
    assert torch.equal(inside, norm(x))  # in evaluation it normalises by the running ones, frozen or not
    with frozen_statistics(lambda x: x):  # a plain function has none
        pass


# The features in front of the classifier


def test_features_are_what_the_head_reads() -> None:
    model = net()
    head = find_head("X", model)
    assert head is model[-1]
    x = draw().x
    z, features = with_features(model, x, head)
    assert torch.equal(z, model(x))
    assert torch.equal(head(features), z)
    assert features.requires_grad
    assert not head._forward_pre_hooks


def test_heads_that_are_not_there() -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 6))
    model.add_module("head", nn.Linear(6, 4))
    assert find_head("X", model, "body") is model[0]
    with pytest.raises(ValueError, match=r"X: head names 'heat', which is no linear layer of the model \(did you mean"):
        find_head("X", model, "heat")
    with pytest.raises(TypeError, match=r"X: head is 1; pass the name of a linear layer of the model\."):
        find_head("X", model, 1)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"X: the model has no linear layer to read features in front of; pass one that"
    ):
        find_head("X", nn.ReLU())
    with pytest.raises(TypeError, match=r"X: model is a function; pass a torch\.nn\.Module\."):
        find_head("X", lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"with_features: the forward did not pass through the head; name the layer"):
        with_features(model[0], torch.rand(2, 6), model[1])
    assert not model[1]._forward_pre_hooks


def test_a_net_with_its_algorithm() -> None:
    model, batch = net(), draw()
    whole = SemiNet(model, FixMatch())
    assert torch.equal(whole(batch.x), model(batch.x))
    assert torch.equal(whole(batch, rng()).loss, FixMatch()(model, batch).loss)
    assert {name.split(".")[0] for name in whole.state_dict()} == {"backbone"}


def test_an_algorithm_says_what_it_does() -> None:
    with pytest.raises(NotImplementedError):
        SemiAlgorithm()(net(), SemiBatch(*draw()[:2], draw().views))
    assert SemiAlgorithm.views == ("weak", "strong")
