"""MixedTarget: to the dense soft labels of other libraries and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.mixing import CutMix, MixedTarget, Mixup
from mixing.cases import rng


def by_hand(labels: list[list[int]], weights: list[list[float]], num_classes: int, smoothing: float) -> torch.Tensor:
    out = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    for i, (row, shares) in enumerate(zip(labels, weights, strict=True)):
        for label, share in zip(row, shares, strict=True):
            out[i, label] += share
    return out * (1 - smoothing) + smoothing / num_classes


def test_dense_adds_up_equal_classes_and_smooths() -> None:
    target = MixedTarget(torch.tensor([[0, 2], [1, 1]]), torch.tensor([[0.3, 0.7], [0.4, 0.6]]))
    assert torch.allclose(target.dense(3), torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]]))
    for smoothing in (0.0, 0.1, 1.0):
        want = by_hand([[0, 2], [1, 1]], [[0.3, 0.7], [0.4, 0.6]], 3, smoothing)
        assert torch.allclose(target.dense(3, smoothing=smoothing).double(), want, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    """dense -> from_dense -> dense loses nothing but the smoothing."""
    n, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(3, 12))
    labels = data.draw(st.lists(st.lists(st.integers(0, classes - 1), min_size=2, max_size=2), min_size=n, max_size=n))
    lam = data.draw(st.lists(st.floats(0, 1).map(lambda v: round(v, 3)), min_size=n, max_size=n))
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    target = MixedTarget(torch.tensor(labels), torch.tensor([[v, 1 - v] for v in lam]))
    back = MixedTarget.from_dense(target.dense(classes, smoothing=smoothing))
    assert back.labels.shape == back.weights.shape == (n, 2)
    assert torch.allclose(back.weights.sum(1), torch.ones(n), atol=1e-6)
    assert torch.allclose(back.dense(classes), target.dense(classes), atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_from_dense_finds_the_largest_entries(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardmix.mixing.target._PIECE", 30)  # three rows, of which 20 leave some
    dense = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(20)]) + 1.0
    want = dense.topk(count, dim=1)
    for rows in (dense, dense.T.contiguous().T, dense.double()):
        got = MixedTarget.from_dense(rows, count)
        assert torch.equal(got.labels, want.indices)
        shares = (want.values - 1.0) / (want.values - 1.0).sum(1, keepdim=True)
        torch.testing.assert_close(got.weights.float(), shares)
    assert torch.equal(dense.sort(1).values[:, 0], torch.ones(20))  # what was given is as it was
    learnt = dense.clone().requires_grad_()
    (slope,) = torch.autograd.grad(MixedTarget.from_dense(learnt, count).weights[:, 0].sum(), learnt)
    assert bool(slope.gather(1, want.indices[:, :1]).isfinite().all())


def test_from_dense_edges() -> None:
    one = MixedTarget.from_dense(torch.tensor([[0.0, 1.0, 0.0]]))
    assert one.labels.tolist() == [[1, 1]]
    assert one.weights.tolist() == [[1.0, 0.0]]
    hard = MixedTarget.from_dense(F.one_hot(torch.tensor([2, 0]), 4))
    assert hard.labels[:, 0].tolist() == [2, 0]
    two_classes = MixedTarget.from_dense(torch.tensor([[0.25, 0.75]]))
    assert two_classes.labels.tolist() == [[1, 0]]
    assert two_classes.weights.tolist() == [[0.75, 0.25]]
    single = MixedTarget.from_dense(torch.tensor([[1.0]]))
    assert single.labels.tolist() == [[0, 0]]
    three = MixedTarget.from_dense(torch.tensor([[0.5, 0.2, 0.3, 0.0]]), num_labels=3)
    assert three.labels.tolist() == [[0, 2, 1]]
    half = MixedTarget.from_dense(torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float16))
    assert half.labels.tolist() == [[1, 0]]
    for dtype, atol in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float64, 1e-12)):
        small = MixedTarget.from_dense(torch.tensor([[0.02, 0.98, 0.0], [0.3, 0.7, 0.0]]).to(dtype))
        assert small.labels.tolist() == [[1, 0], [1, 0]]
        assert torch.allclose(small.weights.double(), torch.tensor([[0.98, 0.02], [0.7, 0.3]]).double(), atol=atol)
        assert torch.allclose(small.weights.sum(1), torch.ones(2, dtype=small.weights.dtype), atol=1e-6)
    # Smoothing, in the dtype itself: the floor is no second class.
    smooth = MixedTarget.from_dense((torch.eye(7) * 0.9 + 0.1 / 7).to(torch.bfloat16))
    assert smooth.labels.tolist() == [[i, i] for i in range(7)]
    assert smooth.weights.tolist() == [[1.0, 0.0]] * 7
    for empty in (torch.zeros(2, 4), torch.full((2, 4), 0.25), torch.zeros(2, 1)):
        nothing = MixedTarget.from_dense(empty)
        assert nothing.weights.tolist() == [[1.0, 0.0]] * 2
        assert torch.equal(nothing.labels[:, 0], nothing.labels[:, 1])
    assert bool(MixedTarget.from_dense(torch.tensor([[0.5, torch.nan, 0.5]])).weights.isnan().any())
    with pytest.raises(ValueError, match=r"MixedTarget\.from_dense: dense has shape \(3,\); pass a batch with 2 axes"):
        MixedTarget.from_dense(torch.rand(3))
    with pytest.raises(ValueError, match=r"num_labels is 0; pass an integer of at least 1"):
        MixedTarget.from_dense(torch.rand(3, 4), num_labels=0)


def test_dense_rows_and_masks() -> None:
    rows = torch.rand(4, 2, 6, generator=rng())
    weights = torch.tensor([[0.25, 0.75]]).expand(4, 2)
    dense = MixedTarget(rows, weights).dense()
    assert torch.allclose(dense, 0.25 * rows[:, 0] + 0.75 * rows[:, 1])
    with pytest.raises(ValueError, match=r"num_classes is 5 but the labels have 6 columns; pass 6 or leave it out\.$"):
        MixedTarget(rows, weights).dense(5)
    masks = torch.randint(0, 3, (4, 2, 5, 7), generator=rng())
    dense = MixedTarget(masks, torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)).dense(3)
    one_hot = F.one_hot(masks, 3).movedim(-1, 2).float()
    assert torch.allclose(dense, 0.25 * one_hot[:, 0] + 0.75 * one_hot[:, 1])
    weights = torch.rand(4, 2, generator=rng())  # one share for all pixels of a sample
    for labels in (masks, masks[:, :, None].expand(-1, -1, 3, -1, -1)):
        short, full = (
            MixedTarget(labels, w) for w in (weights, weights.view(4, 2, *[1] * (labels.ndim - 2)).expand(labels.shape))
        )
        assert torch.equal(short.dense(3), full.dense(3))
        assert torch.equal(short.mean(), full.mean())
        assert short.mean().shape == (4, *labels.shape[2:])


def test_refusals() -> None:
    ints = MixedTarget(torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"MixedTarget\.dense: num_classes is missing; pass the number of classes C\."):
        ints.dense()
    with pytest.raises(
        ValueError, match="labels holds the class 3, but there are 3 classes; pass class ids from 0 to 2"
    ):
        ints.dense(3)
    with pytest.raises(ValueError, match=r"smoothing is 1\.5; pass a number from 0 to 1"):
        ints.dense(4, smoothing=1.5)
    floats = MixedTarget(torch.tensor([[0.5, 3.0]]), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"the labels are floats \(regression\); use \.mean\(\)"):
        floats.dense(4)


def test_mean_and_mixed_loss() -> None:
    x, y = torch.rand(6, 3, generator=rng()), torch.rand(6, generator=rng(1)) * 90
    _, target = Mixup()(x, y, generator=rng(2))
    want = (target.weights * target.labels).sum(1)
    assert torch.allclose(target.mean(), want)
    logits, labels = torch.randn(6, 4, generator=rng(3)), torch.randint(0, 4, (6,), generator=rng(4))
    _, target = Mixup()(x, labels, generator=rng(2))
    losses = target.mixed_loss(lambda y: F.cross_entropy(logits, y, reduction="none"))
    soft = -(target.dense(4) * logits.log_softmax(1)).sum(1)
    assert losses.shape == (6,)
    assert torch.allclose(losses, soft, atol=1e-6)
    rows = MixedTarget(torch.rand(3, 2, 5, generator=rng()), torch.tensor([[0.5, 0.5]]).expand(3, 2))
    assert rows.mean().shape == (3, 5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_reduced_criterion_is_refused(reduction: str) -> None:
    logits, target = torch.randn(6, 4), MixedTarget(torch.zeros(6, 2, dtype=torch.long), torch.full((6, 2), 0.5))
    message = r"MixedTarget\.mixed_loss: criterion returned shape \(\) for 6 samples; pass reduction='none'\."
    with pytest.raises(ValueError, match=message):
        target.mixed_loss(lambda y: F.cross_entropy(logits, y, reduction=reduction))
    with pytest.raises(ValueError, match=r"returned shape \(4,\) for 6 samples"):
        target.mixed_loss(lambda y: F.cross_entropy(logits, y, reduction="none")[:4])
    # Another axis would meet the weights of the samples.
    for wrong in (logits[:, :1], torch.rand(6, 6), torch.rand(6, 1, 6)):
        with pytest.raises(ValueError, match=r"criterion returned shape \(6, .* for 6 samples; return \(6,\)\.$"):
            target.mixed_loss(lambda y, wrong=wrong: wrong)
    with pytest.raises(TypeError, match=r"mixed_loss: criterion returned a float; return a tensor of shape \(6,\)\.$"):
        target.mixed_loss(lambda y: 1.0)
    rows = MixedTarget(torch.rand(6, 2, 4), target.weights)
    with pytest.raises(ValueError, match=r"returned shape \(6, 4\) for 6 samples; return \(6,\)\.$"):
        rows.mixed_loss(lambda y: F.mse_loss(logits, y, reduction="none"))
    assert rows.mixed_loss(lambda y: F.mse_loss(logits, y, reduction="none").mean(1)).shape == (6,)


@pytest.mark.parametrize("policy", [Mixup(), CutMix()], ids=repr)
def test_mixed_losses_of_dense_masks(policy: torch.nn.Module) -> None:
    x, y = torch.rand(4, 3, 5, 4, generator=rng()), torch.randint(0, 3, (4, 5, 4), generator=rng(1))
    logits = torch.randn(4, 3, 5, 4, generator=rng(2))
    _, target = policy(x, y, generator=rng(3))

    def pixels(y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y, reduction="none")

    want = -(target.dense(3) * logits.log_softmax(1)).sum(1)
    assert torch.allclose(target.mixed_loss(pixels), want, atol=1e-5)
    if isinstance(policy, CutMix):
        with pytest.raises(ValueError, match=r"returned shape \(4,\) for 4 samples; return \(4, 5, 4\)\.$"):
            target.mixed_loss(lambda y: pixels(y).mean((1, 2)))
    else:  # one weight for all pixels, in any form
        for weights in (target.weights, target.weights.view(4, 2)):
            same = MixedTarget(target.labels, weights)
            assert torch.allclose(same.mixed_loss(pixels), want, atol=1e-5)
            assert torch.allclose(same.mixed_loss(lambda y: pixels(y).mean((1, 2))), want.mean((1, 2)), atol=1e-5)
        with pytest.raises(ValueError, match=r"returned shape \(4, 5\) for 4 samples; return \(4,\) or \(4, 5, 4\)\.$"):
            target.mixed_loss(lambda y: pixels(y).mean(2))


def test_a_criterion_is_a_function() -> None:
    with pytest.raises(TypeError, match=r"mixed_loss: criterion is a NoneType; pass a function of labels\."):
        MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]])).mixed_loss(None)


def test_dense_labels_of_one_sample_at_a_time() -> None:
    """What is mapped over has no values to look at, so its range is not checked."""
    labels, weights = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0.3, 0.7], [0.5, 0.5]])
    mapped = torch.func.vmap(lambda y, w: MixedTarget(y[None], w[None]).dense(3)[0])(labels, weights)
    assert torch.equal(mapped, MixedTarget(labels, weights).dense(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_dense_of_narrow_integers(dtype: torch.dtype) -> None:
    target = MixedTarget(torch.tensor([[0, 3], [2, 2]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    assert torch.equal(MixedTarget(target.labels.to(dtype), target.weights).dense(4), target.dense(4))


def test_moves_without_waiting() -> None:
    target = MixedTarget(torch.tensor([[0, 3]]), torch.tensor([[0.25, 0.75]]))
    for moved in (target.to("cpu", non_blocking=True), target.to("cpu", True)):
        assert isinstance(moved, MixedTarget)
        assert torch.equal(moved.labels, target.labels)
    assert target.to("meta", non_blocking=True).weights.device.type == "meta"


@pytest.mark.parametrize("other", [torch.float16, torch.rand(2)])
def test_moves_to_devices_alone(other: object) -> None:
    """A tensor's `to` takes more: class ids in a half type would be rounded."""
    target = MixedTarget(torch.tensor([[0, 3001]]), torch.tensor([[0.25, 0.75]]))
    with pytest.raises(
        TypeError, match=r"MixedTarget\.to: device is a d?[tT]\w+; pass a device, since labels and weigh"
    ):
        target.to(other)
    with pytest.raises(TypeError, match=r"MixedTarget\.to: non_blocking is torch\.float64; pass True or False\.$"):
        target.to("cpu", torch.float64)


def test_is_a_plain_pytree() -> None:
    target = MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    leaves, spec = torch.utils._pytree.tree_flatten(target)
    assert len(leaves) == 2
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), MixedTarget)
    assert target.to("meta").labels.device.type == "meta"
