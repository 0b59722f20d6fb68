"""Co-Mixup: its objective against loops and all labellings, its rounds, and what comes out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from hardmix.losses import DecoupledMixupLoss, SoftCrossEntropyLoss
from hardmix.mixing import MixedTarget, RandomChoice
from hardmix.mixing.comixup import CoMixup, JointProblem, parts_of, shown_shares, similarity
from hardmix.mixing.gradients import input_saliency
from hardmix.mixing.optimal import block_shares
from mixing.cases import ConvNet, constant_rows, rng


class Blind(nn.Module):
    """Sees nothing: every saliency is zero."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * x.square().sum((1, 2, 3))[:, None].expand(-1, self.classes)


def net(channels: int = 3) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(channels)


def blobs(n: int, channels: int, h: int, w: int, seed: int = 0) -> Tensor:
    g = rng(seed)
    x = nn.functional.interpolate(torch.rand(n, channels, 4, 4, generator=g), size=(h, w), mode="bilinear")
    return x + 0.2 * torch.rand(n, channels, h, w, generator=g)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 5


# the objective


def problem(
    parts: int, m: int, grid: tuple[int, int], *, omega: float = 0.2, seed: int = 0, **prices: float
) -> JointProblem:
    g = rng(seed)
    n = grid[0] * grid[1]
    s = torch.rand(parts, m, n, generator=g, dtype=torch.float64).pow(3)
    s = s / s.sum(2, keepdim=True)
    prior = torch.rand(parts, m, 1, generator=g, dtype=torch.float64).log()
    far = torch.rand(parts, m, m, generator=g, dtype=torch.float64)
    far = (far + far.transpose(1, 2)).masked_fill(torch.eye(m, dtype=torch.bool), 0.0)
    valid = torch.ones(parts, m, dtype=torch.bool)
    given = {"beta": 0.32, "gamma": 1.0, "tau": 0.83, **prices}
    return JointProblem(-s - 0.05 / n * prior, similarity(far, valid, omega), valid, grid, **given)


def objective_by_hand(
    z: Tensor, cost: Tensor, a: Tensor, grid: tuple[int, int], *, beta: float, gamma: float, tau: float
) -> float:
    """One part: z (outputs, inputs, blocks)."""
    outputs, inputs, n = z.shape
    total = 0.0
    for j in range(outputs):
        for p in range(n):
            total += sum(float(z[j, i, p] * cost[i, p]) for i in range(inputs))
            for q in range(p + 1, n):
                if abs(p // grid[1] - q // grid[1]) + abs(p % grid[1] - q % grid[1]) == 1:
                    total += beta / (2 * n) * float((z[j, :, p] - z[j, :, q]).square().sum())
        for i in range(inputs):
            others = 0.0
            for other in range(outputs):
                if other != j:
                    others += sum(float(a[i, k] * z[other, k].sum()) for k in range(inputs))
            total += gamma / n * float(z[j, i].sum()) * max(others - tau * n, 0.0)
    return total


def random_labelling(parts: int, m: int, n: int, seed: int) -> Tensor:
    """One input in each block, or two halves."""
    g = rng(seed)
    pairs = torch.randint(m, (2, parts, m, n), generator=g)
    hot = nn.functional.one_hot(pairs, m).double().mean(0)
    return hot.transpose(2, 3)


@pytest.mark.parametrize(("m", "grid"), [(1, (2, 2)), (2, (2, 2)), (3, (2, 3)), (5, (4, 1)), (4, (3, 3))])
def test_objective_against_loops(m: int, grid: tuple[int, int]) -> None:
    prices = {"beta": 0.7, "gamma": 1.3, "tau": 0.4}
    given = problem(3, m, grid, **prices)
    for seed in range(4):
        z = random_labelling(3, m, grid[0] * grid[1], seed)
        got = given.objective(z)
        for part in range(3):
            want = objective_by_hand(z[part], given.cost[part], given.similarity[part], grid, **prices)
            assert float(got[part]) == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_tiny_problems_against_all_labellings() -> None:
    """Two inputs, two outputs, four blocks with one input, the other or both: 6561 labellings."""
    given = problem(12, 2, (2, 2), omega=0.001)
    kinds = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    every = kinds[torch.tensor(list(itertools.product(range(3), repeat=8)))].view(-1, 2, 4, 2).transpose(2, 3)
    least, flat = [], []
    own = torch.eye(2, dtype=torch.float64)[:, :, None].expand(2, 2, 4)
    for part in range(12):
        one = JointProblem(
            given.cost[part : part + 1],
            given.similarity[part : part + 1],
            given.valid[:1],
            (2, 2),
            beta=0.32,
            gamma=1.0,
            tau=0.83,
        )
        least.append(one.objective(every).min())
        flat.append(one.objective(own[None])[0])
    for seed in range(4):
        starts = torch.randint(2, (3, 12, 2, 4), generator=rng(seed))
        z, trace = given.solve_from(starts, rounds=2)
        assert torch.allclose(given.objective(z), trace[-1], rtol=1e-9)
        assert bool((trace[-1] >= torch.stack(least) - 1e-9).all())
        gap = (trace[-1] - torch.stack(least)) / torch.stack(least).abs()
        assert float(gap.mean()) < 0.03
        assert float(trace[-1].mean()) < float(torch.stack(flat).mean())  # better than not to mix


def test_the_cheapest_start_of_each_part_is_taken() -> None:
    given = problem(5, 6, (4, 4))
    starts = torch.randint(6, (4, 5, 6, 16), generator=rng(2))
    z, trace = given.solve_from(starts, rounds=2)
    one_by_one = [given.solve(start, rounds=2) for start in starts]
    ends = torch.stack([end[-1] for _, end in one_by_one])  # (4, 5)
    assert len(set(ends.argmin(0).tolist())) > 1
    for part, start in enumerate(ends.argmin(0).tolist()):
        assert torch.equal(z[part], one_by_one[start][0][part])
        assert torch.allclose(trace[:, part], one_by_one[start][1][:, part], rtol=1e-9)


@pytest.mark.parametrize(("m", "grid"), [(2, (2, 2)), (8, (4, 4)), (13, (4, 4)), (6, (8, 8))])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 30.0])
def test_no_round_raises_the_objective(m: int, grid: tuple[int, int], gamma: float) -> None:
    n = grid[0] * grid[1]
    given = problem(4, m, grid, gamma=gamma)
    chosen = torch.randint(m, (4, m, n), generator=rng(1))
    z, trace = given.solve(chosen, rounds=4)
    assert trace.shape == (5, 4)
    assert bool((trace.diff(dim=0) <= 0).all())
    assert torch.allclose(given.objective(z), trace[-1], rtol=1e-9)
    assert torch.equal(z.sum(2), torch.ones(4, m, n, dtype=torch.float64))
    assert set(z.unique().tolist()) <= {0.0, 0.5, 1.0}
    start = nn.functional.one_hot(chosen, m).double().transpose(2, 3)
    assert bool((trace[-1] < given.objective(start)).all())


def test_what_the_prices_do() -> None:
    chosen = torch.randint(6, (3, 6, 16), generator=rng(1))
    free = problem(3, 6, (4, 4), beta=0.0, gamma=0.0)
    z, _ = free.solve(chosen, rounds=1)
    cheapest = free.cost.argmin(1)[:, None].expand(3, 6, 16)
    assert torch.equal(z.argmax(2), cheapest)  # every output is the same collage
    apart, _ = problem(3, 6, (4, 4), gamma=30.0).solve(chosen, rounds=2)
    load = apart.sum(3)
    others = load.sum(1, keepdim=True) - load
    assert float(others[load > 0].max()) <= 0.83 * 16 + 2  # hardly above what is free
    smooth, _ = problem(3, 6, (4, 4), beta=10.0).solve(chosen, rounds=2)
    assert bool((smooth.amax(3) - smooth.amin(3) == 0).all())  # no border


def test_parts() -> None:
    for n in range(1, 50):
        for size in (1, 7, 20):
            rows, valid = parts_of(n, size)
            assert rows[valid].tolist() == list(range(n))
            assert rows.shape[1] <= size
            assert bool((valid.sum(1) >= rows.shape[1] - 1).all())
            assert int(rows.max()) < n
    rows, valid = parts_of(41, 20)
    assert valid.sum(1).tolist() == [13, 14, 14]


def test_parts_that_are_one_shorter_don_t_use_what_is_not_there() -> None:
    """A part with an empty last slot is the same problem as one without the slot."""
    full = problem(1, 4, (3, 3))
    cost = torch.cat([full.cost, torch.full((1, 1, 9), 1e6, dtype=torch.float64)], 1)
    a = nn.functional.pad(full.similarity, (0, 1, 0, 1))
    valid = torch.tensor([[True] * 4 + [False]])
    padded = JointProblem(cost, a, valid, (3, 3), beta=0.32, gamma=1.0, tau=0.83)
    chosen = torch.randint(4, (1, 4, 9), generator=rng(2))
    z, trace = full.solve(chosen, rounds=2)
    longer = torch.cat([chosen, torch.zeros(1, 1, 9, dtype=torch.long)], 1)
    z_padded, trace_padded = padded.solve(longer, rounds=2)
    assert torch.equal(z_padded[:, :4, :4], z)
    assert torch.equal(z_padded[:, 4], torch.zeros(1, 5, 9, dtype=torch.float64))
    assert torch.allclose(trace_padded, trace)


# the policy


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (5, 40), (3, 1)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 23])
def test_constant_images_show_the_weights(size: tuple[int, int], n: int) -> None:
    """What each output shows of each input, measured in the pixels: one hot image for each input."""
    x = torch.eye(n, dtype=torch.float64)[:, :, None, None].expand(n, n, *size).contiguous()
    policy = CoMixup(Blind(n), part=9)
    for seed in range(2):
        mixed, target = policy(x, torch.arange(n), generator=rng(seed))
        assert target.labels.shape == target.weights.shape
        assert target.weights.shape[0] == n
        assert target.weights.shape[1] >= 2
        assert torch.allclose(target.dense(n).double(), mixed.mean((2, 3)), atol=1e-6)
        assert (target.weights.sum(1) - 1).abs().max() <= 1e-6
        assert bool((target.weights.diff(dim=1) <= 0).all())
        padding = target.weights == 0
        assert torch.equal(target.labels[padding], target.labels[:, :1].expand_as(target.labels)[padding])
        parts = parts_of(n, 9)[1].sum(1).tolist()
        for start, count in zip(itertools.accumulate([0, *parts[:-1]]), parts, strict=True):
            shown = target.labels[start : start + count]
            assert bool(((shown >= start) & (shown < start + count)).all())  # nothing from another part


@pytest.mark.parametrize(("size", "blocks"), [((16, 16), 4), ((13, 18), 4), ((3, 9), 8)])
def test_mixed_pixels_against_loops(size: tuple[int, int], blocks: int) -> None:
    n = 6
    x, y = blobs(n, 3, *size), labels(n)
    policy = CoMixup(net(), blocks=(blocks,))
    joint = policy.joint_plan(x, y, generator=rng(3))
    before = x.clone()
    mixed, target = policy(x, y, generator=rng(3))
    assert torch.equal(x, before)
    grid = tuple(min(blocks, side) for side in size)
    assert joint.first.shape == joint.second.shape == joint.share.shape == (n, *grid)
    want = torch.empty_like(x)
    shares = torch.zeros(n, n)
    for row, i, j in itertools.product(range(n), range(size[0]), range(size[1])):
        at = (row, i * grid[0] // size[0], j * grid[1] // size[1])
        share = float(joint.share[at])
        assert share in (0.5, 1.0)
        want[row, :, i, j] = share * x[joint.first[at], :, i, j] + (1 - share) * x[joint.second[at], :, i, j]
        shares[row, joint.first[at]] += share / (size[0] * size[1])
        shares[row, joint.second[at]] += (1 - share) / (size[0] * size[1])
    assert torch.allclose(mixed, want, atol=1e-6)
    rows, weights = shown_shares(joint, size)
    assert torch.allclose(torch.zeros(n, n).scatter_add_(1, rows, weights), shares, atol=1e-6)
    assert torch.equal(target.labels, y[rows])
    assert torch.equal(target.weights, weights)


def test_objective_is_reported_and_falls() -> None:
    x, y = blobs(30, 3, 16, 16), labels(30)
    model = net()
    policy = CoMixup(model, rounds=3)
    joint = policy.joint_plan(x, y, generator=rng(1))
    assert joint.objective.shape == (4, 2)
    assert bool((joint.objective.diff(dim=0) <= 0).all())
    # the saliency that is covered, and more of it than in the images as they are
    share = block_shares(input_saliency(model, x, y), (4, 4))
    at = torch.arange(4)
    covered = (
        joint.share * share[joint.first, at[:, None], at] + (1 - joint.share) * share[joint.second, at[:, None], at]
    )
    assert float(covered.sum((1, 2)).mean()) > 1.1
    shown = (shown_shares(joint, (16, 16))[1] > 0).sum(1)
    assert 1.5 < float(shown.double().mean()) < 5.0


def test_same_generator_same_batch_and_targets_that_losses_take() -> None:
    x, y, policy = blobs(8, 3, 16, 16), labels(8), CoMixup(net())
    mixed, target = policy(x, y, generator=rng(1))
    again, same = policy(x, y, generator=rng(1))
    assert torch.equal(mixed, again)
    assert torch.equal(target.labels, same.labels)
    assert torch.equal(target.weights, same.weights)
    assert any(not torch.equal(policy(x, y, generator=rng(seed))[0], mixed) for seed in (2, 3))
    torch.manual_seed(3)
    first = policy(x, y)[0]
    torch.manual_seed(3)
    assert torch.equal(policy(x, y)[0], first)
    assert isinstance(target, MixedTarget)
    logits = torch.randn(8, 5, generator=rng(2), requires_grad=True)
    for criterion in (SoftCrossEntropyLoss(), DecoupledMixupLoss(eta=1.0)):
        assert criterion(logits, target).isfinite()
    want = -(target.dense(5) * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(SoftCrossEntropyLoss()(logits, target), want)
    soft = torch.rand(8, 5, generator=rng(4)).softmax(1)
    _, of_rows = policy(x, soft, generator=rng(1))
    assert of_rows.labels.shape == (*of_rows.weights.shape, 5)
    assert torch.allclose(of_rows.dense(5).sum(1), torch.ones(8))
    assert {len(CoMixup(net(), blocks=(2, 4)).joint_plan(x, y, generator=rng(s)).first[0]) for s in range(9)} == {2, 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    x = blobs(5, 3, 16, 16).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        mixed, target = CoMixup(net())(x.contiguous(memory_format=layout), labels(5), generator=rng(1))
        assert mixed.dtype == dtype
        assert mixed.is_contiguous(memory_format=layout)
        assert target.weights.dtype == torch.float32


def test_the_model_is_left_as_it_was() -> None:
    model, x, y = net().train(), blobs(6, 3, 16, 16), labels(6)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    policy = CoMixup(model)
    mixed, target = policy(x, y, generator=rng())
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not mixed.requires_grad
    assert not target.weights.requires_grad
    assert list(policy.parameters()) == []
    assert policy.state_dict() == {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy(x, y, generator=rng())[0], mixed)


def test_gradients_reach_the_pixels() -> None:
    x = blobs(4, 3, 16, 16).requires_grad_()
    mixed, _ = CoMixup(net())(x, labels(4), generator=rng())
    mixed.sum().backward()
    assert float(x.grad.sum()) == pytest.approx(x.numel(), rel=1e-5)


def test_edges() -> None:
    x, y = blobs(4, 3, 16, 16), labels(4)
    alone, target = CoMixup(net())(x[:1], y[:1], generator=rng())
    assert torch.equal(alone, x[:1])
    assert target.labels.tolist() == [[0, 0]]
    assert target.weights.tolist() == [[1.0, 0.0]]
    single, target = CoMixup(net(), part=1)(x, y, generator=rng())
    assert torch.equal(single, x)
    assert torch.equal(target.weights, torch.tensor([[1.0, 0.0]]).expand(4, 2))
    mixed, target = CoMixup(Blind())(constant_rows(torch.full((4,), 0.5), (3, 8, 8)), y, generator=rng())
    assert torch.equal(mixed, torch.full((4, 3, 8, 8), 0.5))
    for alpha in (1e-4, 1e4):
        joint = CoMixup(net(), alpha=alpha).joint_plan(x, y, generator=rng())
        assert bool(joint.objective.isfinite().all())
    _, target = CoMixup(net())(x, torch.full((4,), 3), generator=rng())
    assert set(target.labels.unique().tolist()) == {3}


def test_refusals() -> None:
    model, x, y = net(), blobs(4, 3, 8, 8), labels(4)
    policy = CoMixup(model)
    with pytest.raises(NotImplementedError, match=r"CoMixup: an output mixes several rows, which a plan of partners"):
        policy.plan(x, y)
    with pytest.raises(ValueError, match="policies holds CoMixup"):
        RandomChoice([policy, None], per="sample")
    mixed, _ = RandomChoice([policy])(x, y, generator=rng())
    assert mixed.shape == x.shape
    with pytest.raises(TypeError, match=r"CoMixup: model is a str; pass a torch\.nn\.Module\."):
        CoMixup("resnet18")
    with pytest.raises(ValueError, match=r"CoMixup: y has shape \(4, 8, 8\) and kind 'auto', but dense masks can't"):
        policy(x, torch.zeros(4, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"CoMixup: y has 3 entries but x has 4 rows; pass one entry per row\."):
        policy(x, y[:3])
    with pytest.raises(TypeError, match=r"CoMixup: y is a list; pass a torch\.Tensor\."):
        policy(x, [0, 1, 2, 3])
    with pytest.raises(TypeError, match=r"CoMixup: generator is a int; pass a torch\.Generator or None\."):
        policy(x, y, generator=3)
    with pytest.raises(ValueError, match=r"CoMixup: x has shape \(4, 3, 8\); pass a batch with 4 axes"):
        policy(torch.rand(4, 3, 8), y)
    with pytest.raises(TypeError, match=r"CoMixup: x has dtype torch\.uint8, which the model can't be asked with"):
        policy((x * 255).to(torch.uint8), y)
    x[1, 0, 3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"CoMixup: x holds NaN or infinity in rows 1;"):
        policy(x, y)
    for settings, text in (
        ({"beta": -1.0}, r"beta is -1\.0; pass a finite number of at least 0\."),
        ({"omega": 1.5}, r"omega is 1\.5; pass a number from 0 to 1\."),
        ({"tau": float("inf")}, "tau is inf"),
        ({"part": 0}, r"part is 0; pass an integer of at least 1\."),
        ({"rounds": -1}, r"rounds is -1; pass an integer of at least 0\."),
        ({"starts": 0}, r"starts is 0; pass an integer of at least 1\."),
        ({"blocks": [0]}, r"blocks is 0; pass an integer of at least 1\."),
        ({"alpha": 0}, "alpha is 0; pass a finite number greater than 0"),
    ):
        with pytest.raises(ValueError, match=f"CoMixup: {text}"):
            CoMixup(model, **settings)
    assert "tau=0.83" in repr(policy)
