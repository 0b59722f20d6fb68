"""Partners by label: the distribution, the whole set, hidden layers, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hardmix.mixing import CMixup, CutMix, LabelKernel, ManifoldMixup, Mixup
from mixing.cases import blend_by_hand, rng

LABELS = torch.tensor([1.0, 1.5, 3.0, 3.2, 9.0])


def slow_probabilities(own: list[float], pool: list[float], bandwidth: float) -> torch.Tensor:
    rows = []
    for y in own:
        row = [math.exp(-((y - other) ** 2) / (2 * bandwidth**2)) for other in pool]
        rows.append([value / math.fsum(row) for value in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bandwidth", [0.5, 2.0, 1e6])
def test_partners_follow_the_kernel(bandwidth: float) -> None:
    draws = 20_000
    kernel = LabelKernel(bandwidth)
    drawn = kernel.partners(LABELS.repeat_interleave(draws), LABELS, generator=rng()).view(5, draws)
    share = torch.stack([(drawn == j).double().mean(1) for j in range(5)], 1)
    want = slow_probabilities(LABELS.tolist(), LABELS.tolist(), bandwidth)
    assert (share - want).abs().max() < 5 * math.sqrt(0.25 / draws)


def test_far_from_everything_the_nearest_is_taken() -> None:
    drawn = LabelKernel(1e-3).partners(torch.tensor([100.0]), torch.tensor([0.0, 50.0, 20.0]))
    assert drawn.tolist() == [1]


def test_pieces_change_nothing_but_the_draws_order(monkeypatch) -> None:
    monkeypatch.setattr("hardmix.mixing.pairing._PIECE", 10)
    drawn = LabelKernel(0.01).partners(LABELS, LABELS.flip(0), generator=rng())
    assert drawn.tolist() == [4, 3, 2, 1, 0]


def test_small_differences_of_large_labels_count() -> None:
    labels = 1.6e9 + torch.arange(40, dtype=torch.float64)
    assert torch.equal(LabelKernel(0.1).partners(labels, labels), torch.arange(40))


def test_several_numbers_a_label_count_by_their_distance() -> None:
    pool = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert LabelKernel(0.1).partners(torch.tensor([[3.0, 3.9], [0.1, 0.0]]), pool).tolist() == [1, 0]


def test_c_mixup_blends_inputs_and_labels_alike() -> None:
    x = torch.rand(5, 3, generator=rng())
    policy = CMixup(bandwidth=1.0)
    plan = policy.plan(x, LABELS, generator=rng(3))
    assert len(plan.lam.unique()) == 1
    assert torch.allclose(plan.blend(x).double(), torch.from_numpy(blend_by_hand(x, plan)), atol=1e-6)
    target = plan.target(LABELS)
    want = plan.lam * LABELS + (1 - plan.lam) * LABELS[plan.partner]
    assert torch.allclose(target.mean(), want)
    assert len(CMixup(bandwidth=1.0, per="sample").plan(x, LABELS, generator=rng()).lam.unique()) == 5


def test_same_generator_same_plan_and_the_input_stays() -> None:
    x = torch.rand(5, 3, generator=rng())
    clean = x.clone()
    first, second = (CMixup(bandwidth=1.0)(x, LABELS, generator=rng(1)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].labels, second[1].labels)
    assert torch.equal(x, clean)


def test_one_row_is_mixed_with_itself() -> None:
    x = torch.rand(1, 3)
    mixed, target = CMixup(bandwidth=1.0)(x, torch.tensor([2.0]))
    assert torch.allclose(mixed, x)
    assert target.mean().tolist() == [2.0]


def test_rows_from_the_whole_set_are_paired_across() -> None:
    everything, y_all = torch.rand(50, 3, generator=rng()), torch.linspace(0, 9, 50)
    x, y, n = everything[:4], y_all[:4], 4
    policy = CMixup(bandwidth=0.3)
    index = policy.pairing.partners(y, y_all, generator=rng(1))
    both, labels = torch.cat([x, everything[index]]), torch.cat([y, y_all[index]])
    plan = policy.plan(both, labels, partner=torch.arange(2 * n).roll(n), generator=rng(2))
    lam = plan.lam[:n, None]
    assert torch.allclose(plan.blend(both)[:n], lam * x + (1 - lam) * everything[index])
    assert torch.allclose(plan.target(labels).mean()[:n], lam[:, 0] * y + (1 - lam[:, 0]) * y_all[index])


def test_any_policy_and_a_hidden_layer_take_the_kernel() -> None:
    images = torch.rand(5, 1, 8, 8, generator=rng())
    alone = torch.arange(5)
    assert torch.equal(CutMix(pairing=LabelKernel(1e-3)).plan(images, LABELS).partner, alone)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    mix = ManifoldMixup(model, ["0"], include_input=False, per="batch", pairing=LabelKernel(1e-3))
    x = torch.rand(5, 3, generator=rng())
    same, target = mix(x, LABELS)
    assert torch.equal(same, x)
    assert torch.allclose(target.mean(), LABELS)
    assert torch.allclose(model(x), model.eval()(x))  # every row with itself


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, y: CMixup(bandwidth=0.0),
            ValueError,
            r"LabelKernel: bandwidth is 0\.0; pass a finite number greater",
        ),
        (lambda x, y: CMixup(bandwidth=1.0, per="pair"), ValueError, r'pass "batch" or "sample"'),
        (lambda x, y: CMixup(bandwidth=1.0).plan(x), ValueError, r"CMixup: y is missing; its partners are drawn by"),
        (lambda x, y: CMixup(bandwidth=1.0).plan(x, y[:2]), ValueError, r"CMixup: y has 2 entries but x has 5 rows"),
        (
            lambda x, y: CMixup(bandwidth=1.0).plan(x, y[:, None, None]),
            ValueError,
            r"y has shape \(5, 1, 1\).*\(N, P\)",
        ),
        (lambda x, y: CMixup(bandwidth=1.0).plan(x, y * math.nan), ValueError, r"y holds NaN or infinity; leave out"),
        (
            lambda x, y: LabelKernel(1.0).partners(y, x),
            ValueError,
            r"y has 1 numbers a row but the pool 3; pass labels",
        ),
        (lambda x, y: Mixup(pairing=LabelKernel(1.0), per="pair"), ValueError, r'per="pair" with pairing=LabelKernel'),
        (lambda x, y: Mixup(pairing="kernel"), ValueError, r"pairing is 'kernel'; pass one of 'shift'"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.rand(5, 3), LABELS)
