"""PuzzleMix: its objective against loops and all masks, and what every policy promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hardmix.kernels.graph_cut import grid_energy
from hardmix.mixing import MixedTarget, MixPlan, Mixup, RandomChoice
from hardmix.mixing.gradients import input_saliency
from hardmix.mixing.optimal import PuzzleMix, PuzzlePlan, block_shares
from mixing.cases import ConvNet, constant_rows, own_share, rng


class Blind(nn.Module):
    """Sees nothing: every saliency is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * x.square().sum((1, 2, 3))[:, None].expand(-1, 5)


def net(channels: int = 3) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(channels)


def blobs(n: int, channels: int, h: int, w: int, seed: int = 0) -> Tensor:
    """Images with something in them: a few smooth bumps on noise."""
    g = rng(seed)
    x = torch.rand(n, channels, 4, 4, generator=g)
    x = nn.functional.interpolate(x, size=(h, w), mode="bilinear")
    return x + 0.2 * torch.rand(n, channels, h, w, generator=g)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 5


# the objective


def contrast_by_hand(
    x: Tensor, a: int, b: int, p: tuple[int, int], q: tuple[int, int], blocks: int, cell: int
) -> float:
    """How much image a just before the border of blocks p and q differs from image b just after it."""
    h, w = x.shape[2] // blocks, x.shape[3] // blocks
    down = q[0] > p[0]
    total, count = 0.0, 0
    for channel in range(x.shape[1]):
        means = [
            x[:, channel, i : i + cell, j : j + cell].mean((1, 2))
            for i in range(0, x.shape[2], cell)
            for j in range(0, x.shape[3], cell)
        ]
        span = float(torch.stack(means).max() - torch.stack(means).min())
        for k in range(0, w if down else h, cell):
            y1, x1 = ((p[0] + 1) * h - cell, p[1] * w + k) if down else (p[0] * h + k, (p[1] + 1) * w - cell)
            y2, x2 = ((p[0] + 1) * h, p[1] * w + k) if down else (p[0] * h + k, (p[1] + 1) * w)
            before = x[a, channel, y1 : y1 + cell, x1 : x1 + cell].mean()
            after = x[b, channel, y2 : y2 + cell, x2 : x2 + cell].mean()
            total += float((before - after).abs()) / span
            count += 1
    return total / count


def energy_by_hand(
    x: Tensor,
    saliency: Tensor,
    row: int,
    partner: int,
    z: Tensor,
    lam: float,
    *,
    beta: float,
    gamma: float,
    eta: float,
    cell: int,
    levels: int,
) -> float:
    """The objective of one row as the docstring has it. Between 0 and 1 the contrast is linear in each share, and the
    square of their difference takes the rest."""
    blocks = z.shape[0]
    h, w = x.shape[2] // blocks, x.shape[3] // blocks
    pooled = {
        i: np.array(
            [
                [float(saliency[i, u * h : (u + 1) * h, v * w : (v + 1) * w].sum()) for v in range(blocks)]
                for u in range(blocks)
            ]
        )
        for i in (row, partner)
    }
    own, other = pooled[row] / pooled[row].sum(), pooled[partner] / pooled[partner].sum()
    total = 0.0
    for u, v in itertools.product(range(blocks), range(blocks)):
        share = float(z[u, v])
        total += (1 - share) * own[u, v] + share * other[u, v]
        k, times = round(share * (levels - 1)), levels - 1
        total -= eta / blocks**2 * math.log(math.comb(times, k) * lam**k * (1 - lam) ** (times - k))
        for q in ((u + 1, v), (u, v + 1)):
            if max(q) == blocks:
                continue
            a, b = share, float(z[q])
            d = {
                (i, j): contrast_by_hand(x, (partner, row)[i], (partner, row)[j], (u, v), q, blocks, cell)
                for i in (0, 1)
                for j in (0, 1)
            }
            # d is linear in a, b and a b; a b = (a^2 + b^2 - (a - b)^2) / 2 with a^2 and b^2 read as a and b
            ab = (a + b - (a - b) ** 2) / 2
            d_ab = (
                d[0, 0]
                + a * (d[1, 0] - d[0, 0])
                + b * (d[0, 1] - d[0, 0])
                + ab * (d[1, 1] - d[1, 0] - d[0, 1] + d[0, 0])
            )
            total += beta / (16 * blocks) * ((a - b) ** 2 + gamma * d_ab)
    return total


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize(("side", "blocks", "cell"), [(16, 2, 4), (24, 3, 4), (10, 2, 5)])
def test_objective_against_loops_and_all_masks(levels: int, side: int, blocks: int, cell: int) -> None:
    model, x = net().double(), blobs(3, 3, side, side).double()
    y, partner, lam = labels(3), torch.tensor([2, 0, 1]), torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)
    settings = {"beta": 3.0, "gamma": 0.7, "eta": 0.4}
    policy = PuzzleMix(model, blocks=[blocks], labels=levels, **settings)
    saliency = input_saliency(model, x, y)
    costs = policy.costs(x, block_shares(saliency, (blocks, blocks)), partner, lam)
    g = rng(5)
    for _ in range(4):
        z = torch.randint(levels, (3, blocks, blocks), generator=g)
        got = grid_energy(z, *costs)
        for row in range(3):
            want = energy_by_hand(
                x,
                saliency,
                row,
                int(partner[row]),
                z[row] / (levels - 1),
                float(lam[row]),
                cell=cell,
                levels=levels,
                **settings,
            )
            assert float(got[row]) == pytest.approx(want, rel=1e-9)
    every = torch.tensor(list(itertools.product(range(levels), repeat=blocks**2))).view(-1, blocks, blocks)
    plan = policy.plan(x, y, generator=rng(1), partner=partner)
    assert isinstance(plan, PuzzlePlan)
    # lambda' is not part of the plan: draw it again, behind the number of blocks
    again = rng(1)
    torch.randint(1, (1,), generator=again)
    drawn = torch.rand(3, generator=again)
    costs = policy.costs(x, block_shares(saliency, (blocks, blocks)), partner, drawn.double())
    for row in range(3):
        least = grid_energy(every, *(value[row].expand(len(every), *value.shape[1:]) for value in costs)).min()
        assert float(plan.energy[row]) == pytest.approx(float(least), rel=2e-3)
        own = [value[row : row + 1] for value in costs]
        assert float(plan.energy[row]) == pytest.approx(
            float(grid_energy((plan.z[row : row + 1] * (levels - 1)).long(), *own)), rel=1e-6
        )


def test_weights_stay_above_zero_at_full_contrast() -> None:
    """Two images that ask for a border as much as any can: gamma = 1 leaves a weight of 0, not less."""
    board = torch.zeros(2, 1, 8, 8)
    board[0, :, :4], board[1, :, 4:] = 1.0, 1.0
    policy = PuzzleMix(net(1), gamma=1.0, blocks=(2,))
    _, down, _ = policy.costs(board, torch.full((2, 2, 2), 0.25), torch.tensor([1, 0]), torch.tensor([0.5, 0.5]))
    assert bool((down >= 0).all())
    assert float(down.max()) < 1e-6


def test_each_keeps_what_is_salient_in_it() -> None:
    """Left half of one image and right half of the other: the mask finds them."""

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., :16].square().mean((1, 2, 3)), x[..., 16:].square().mean((1, 2, 3))], 1)

    x = torch.zeros(2, 1, 32, 32)
    x[0, ..., :16], x[1, ..., 16:] = 1.0, 1.0
    plan = PuzzleMix(Halves(), blocks=(8,), labels=2, transport=False).plan(x, torch.tensor([0, 1]), generator=rng())
    assert plan.partner.tolist() == [1, 0]
    assert plan.z[0, :, :4].mean() == 1.0
    assert plan.z[0, :, 4:].mean() == 0.0
    assert plan.lam[0] == 0.5


# what every policy promises


@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 17, 23), (1, 5, 40), (2, 3, 1), (3, 1, 1)], ids=str)
def test_own_share_of_constant_images_is_lam(per: str, shape: tuple[int, ...]) -> None:
    policy = PuzzleMix(net(shape[0]), per=per)
    for n in (1, 2, 7):
        values = 2.0 ** -torch.arange(n, dtype=torch.float64)
        x = constant_rows(values, shape)
        for seed in range(3):
            plan = policy.plan(x, labels(n), generator=rng(seed))
            got = plan.blend(x).flatten(1).mean(1)
            lam = plan.lam.double()
            assert torch.allclose(got, lam * values + (1.0 - lam) * values[plan.partner], atol=2e-7, rtol=0)


def read_block(
    image: Tensor, place: tuple[int, int], block: tuple[int, int], grid: tuple[int, int], i: int, j: int
) -> Tensor:
    where = []
    for axis, at in enumerate((i, j)):
        inside = [k * grid[axis] // image.shape[1 + axis] for k in range(image.shape[1 + axis])]
        offset = at - inside.index(place[axis])
        where.append(inside.index(block[axis]) + min(offset, inside.count(block[axis]) - 1))
    return image[:, where[0], where[1]]


@pytest.mark.parametrize(("size", "blocks"), [((16, 16), 4), ((19, 14), 4), ((6, 24), 8), ((5, 5), 16)])
@pytest.mark.parametrize("transport", [True, False])
def test_mixed_pixels_against_loops(size: tuple[int, int], blocks: int, transport: bool) -> None:
    n = 5
    x = blobs(n, 3, *size)
    policy = PuzzleMix(net(), blocks=(blocks,), transport=transport, xi=0.02)
    plan = policy.plan(x, labels(n), generator=rng(2))
    mixed = plan.blend(x)
    grid = tuple(plan.z.shape[1:])
    assert grid == tuple(min(blocks, side) for side in size)
    moves = torch.arange(grid[0] * grid[1]).expand(2, n, -1) if plan.moves is None else plan.moves
    assert bool((moves != torch.arange(grid[0] * grid[1])).any()) == transport
    want = torch.empty_like(x)
    for row, i, j in itertools.product(range(n), range(size[0]), range(size[1])):
        place = (i * grid[0] // size[0], j * grid[1] // size[1])
        z = plan.z[row, place[0], place[1]]
        assert plan.mask[row, 0, i, j] == z
        own, other = (divmod(int(moves[k, row, place[0] * grid[1] + place[1]]), grid[1]) for k in (0, 1))
        want[row, :, i, j] = z * read_block(x[row], place, own, grid, i, j)
        want[row, :, i, j] += (1 - z) * read_block(x[plan.partner[row]], place, other, grid, i, j)
    assert torch.allclose(mixed, want, atol=1e-6)
    assert torch.equal(plan.lam, own_share(plan.mask))


def test_forward_is_plan_blend_target() -> None:
    x, y = blobs(6, 3, 18, 12), labels(6)
    before = x.clone()
    policy = PuzzleMix(net(), xi=0.05)
    mixed, target = policy(x, y, generator=rng(7))
    plan = policy.plan(x, y, generator=rng(7))
    assert torch.equal(mixed, plan.blend(x))
    assert torch.equal(target.labels, torch.stack([y, y[plan.partner]], 1))
    assert torch.equal(target.weights, torch.stack([plan.lam, 1 - plan.lam], 1))
    assert isinstance(target, MixedTarget)
    assert torch.equal(x, before)
    assert mixed.data_ptr() != x.data_ptr()
    assert len(plan.lam.unique()) > 2  # one for each sample
    assert any(not torch.equal(policy(x, y, generator=rng(seed))[0], mixed) for seed in range(3))
    torch.manual_seed(3)
    first = policy(x, y)[0]
    torch.manual_seed(3)
    assert torch.equal(policy(x, y)[0], first)
    assert {tuple(policy.plan(x, y, generator=rng(seed)).z.shape[1:]) for seed in range(30)} == {
        (2, 2),
        (4, 4),
        (8, 8),
        (16, 12),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    x = blobs(4, 3, 16, 16).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = x.contiguous(memory_format=layout)
        mixed, target = PuzzleMix(net(), blocks=(4,), xi=0.05)(batch, labels(4), generator=rng(1))
        assert mixed.dtype == dtype
        assert mixed.is_contiguous(memory_format=layout)
        assert target.weights.dtype == torch.float32
    full, _ = PuzzleMix(net(), blocks=(4,), xi=0.05)(x.float(), labels(4), generator=rng(1))
    assert (mixed.float() - full).abs().max() <= 2 * torch.finfo(dtype).eps * full.abs().max() + 1e-6


def test_the_model_is_left_as_it_was() -> None:
    model, x, y = net().train(), blobs(6, 3, 16, 16), labels(6)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    policy = PuzzleMix(model)
    mixed, _ = policy(x, y, generator=rng())
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not mixed.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    assert list(policy.parameters()) == []
    assert policy.state_dict() == {}


def test_no_gradient_through_the_plan_but_through_the_pixels() -> None:
    x = blobs(3, 3, 16, 16).requires_grad_()
    plan = PuzzleMix(net(), xi=0.05).plan(x, labels(3), generator=rng())
    assert not plan.lam.requires_grad
    assert not plan.energy.requires_grad
    mixed = plan.blend(x)
    assert torch.equal(mixed, plan.blend(x.detach()))
    mixed.sum().backward()
    assert float(x.grad.sum()) == pytest.approx(x.numel(), rel=1e-5)


def test_a_model_that_sees_nothing_gives_one_value() -> None:
    """Flat saliency and no contrast: what is left is the prior, and its likeliest label."""
    x = torch.full((64, 3, 16, 16), 0.5)
    policy = PuzzleMix(Blind())
    plan = policy.plan(x, labels(64), generator=rng(3))
    assert bool((plan.z.flatten(1) == plan.z[:, :1, 0]).all())
    assert set(plan.lam.tolist()) == {0.0, 0.5, 1.0}
    assert torch.equal(plan.blend(x), x)
    nan = block_shares(torch.tensor([[[1.0, float("nan")], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]), (2, 2))
    assert torch.equal(nan, torch.full((2, 2, 2), 0.25))
    huge = block_shares(torch.tensor([[[3e38, 0.0], [0.0, 3e38]]]), (1, 2))
    assert torch.allclose(huge, torch.tensor([[[0.5, 0.5]]]))


@pytest.mark.parametrize("alpha", [1e-4, 1e4])
def test_alpha_at_its_ends(alpha: float) -> None:
    x = blobs(16, 3, 16, 16)
    plan = PuzzleMix(net(), alpha=alpha, eta=50.0).plan(x, labels(16), generator=rng(1))
    assert bool(plan.energy.isfinite().all())
    extreme = plan.lam if alpha > 1 else (plan.lam - 0.5).abs()
    assert torch.equal(extreme, torch.full((16,), 0.5))


def test_rows_that_are_their_own_partner_come_back() -> None:
    policy = PuzzleMix(net(), xi=1e-3, pairing="matching", per="pair")
    x = blobs(7, 3, 16, 16)
    plan = policy.plan(x, labels(7), generator=rng(4))
    alone = (plan.partner == torch.arange(7)).nonzero().item()
    assert torch.allclose(plan.blend(x)[alone], x[alone], atol=1e-6)
    single, target = policy(x[:1], labels(1), generator=rng())
    assert torch.allclose(single, x[:1], atol=1e-6)
    assert target.labels.tolist() == [[0, 0]]


def test_per_batch_and_pair_share_lambda_and_partners_may_be_given() -> None:
    x, y = blobs(6, 3, 16, 16), labels(6)
    blind = PuzzleMix(Blind(), per="batch", gamma=0.0)
    assert len(blind.plan(x, y, generator=rng(1)).lam.unique()) == 1
    pair = PuzzleMix(Blind(), per="pair", gamma=0.0).plan(x, y, generator=rng(1))
    assert torch.equal(pair.lam, pair.lam[pair.partner])
    partner = torch.tensor([3, 3, 0, 1, 5, 2])
    plan = PuzzleMix(net()).plan(x, y, generator=rng(1), partner=partner)
    assert torch.equal(plan.partner, partner)
    assert plan.shift is None
    assert torch.equal(plan.blend(x), plan.blend_(x.clone()))


def test_transport_brings_salient_blocks_to_light() -> None:
    model, x, y = net(), blobs(8, 3, 32, 32), labels(8)
    saliency = block_shares(input_saliency(model, x, y), (8, 8)).flatten(1)
    plan = PuzzleMix(model, blocks=(8,), xi=0.01).plan(x, y, generator=rng(2))
    z = plan.z.flatten(1)
    for own, moves, share in ((saliency, plan.moves[0], z), (saliency[plan.partner], plan.moves[1], 1 - z)):
        shown = share > 0
        assert bool(((own.gather(1, moves) - own)[shown] >= -1e-7).all())
        assert torch.equal(moves[~shown], torch.arange(64).expand_as(moves)[~shown])
    assert torch.equal(plan.z, PuzzleMix(model, blocks=(8,), transport=False).plan(x, y, generator=rng(2)).z)


def test_dense_masks_follow_the_blocks() -> None:
    n = 4
    y = torch.arange(n * 15 * 12).view(n, 15, 12)
    x = y[:, None].double().expand(n, 3, 15, 12).contiguous()
    plan = PuzzleMix(net(), blocks=(4,), xi=1e-3).plan(x, labels(n), generator=rng(3))
    assert bool((plan.moves != torch.arange(16)).any())
    target = plan.target(y)
    weights = target.weights.expand(n, 2, 15, 12)
    assert torch.allclose((target.labels * weights).sum(1).double(), plan.blend(x)[:, 0], atol=1e-4)
    rows = torch.rand(n, 5, generator=rng())
    assert torch.equal(plan.target(rows).labels[:, 0], rows)
    assert torch.equal(plan.target(labels(n)).weights[:, 0], plan.lam)


def test_other_sizes_second_views_and_features() -> None:
    x, y = blobs(4, 3, 16, 16), labels(4)
    plan = PuzzleMix(net(), blocks=(4,), xi=1e-3).plan(x, y, generator=rng(3))
    big = x.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert torch.allclose(plan.blend(big)[..., ::3, ::3], plan.blend(x), atol=1e-6)
    features = torch.rand(4, 7, generator=rng())
    lam = plan.lam[:, None]
    assert torch.allclose(plan.blend(features), lam * features + (1 - lam) * features[plan.partner], atol=1e-6)
    with pytest.raises(ValueError, match=r"MixPlan\.blend: x has shape \(4, 3, 2, 2\) but the plan moves 4 x 4 blocks"):
        plan.blend(torch.rand(4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"MixPlan\.blend: x has shape .* but the plan's mask has 2 spatial axes"):
        plan.blend(torch.rand(4, 3, 16))
    out = torch.empty_like(x)
    assert plan.blend(x, out=out) is out
    assert torch.equal(out, plan.blend(x))


def test_plans_can_be_combined_and_moved() -> None:
    x, y = blobs(8, 3, 16, 16), labels(8)
    policy = PuzzleMix(net(), blocks=(4,), xi=1e-3)
    mix = RandomChoice([policy, Mixup()], per="sample")
    plan = mix.plan(x, y, generator=rng(2))
    assert torch.equal(mix(x, y, generator=rng(2))[0], plan.blend(x))
    puzzle = policy.plan(x, y, generator=rng(2))
    plain = MixPlan(puzzle.partner, puzzle.lam, puzzle.mask, own=puzzle.own, other=puzzle.other)
    assert torch.allclose(plain.blend(x), puzzle.blend(x), atol=1e-6)
    assert puzzle.to("cpu") is puzzle
    moved = puzzle.to("meta")
    assert isinstance(moved, PuzzlePlan)
    assert {t.device.type for t in (moved.partner, moved.lam, moved.z, moved.moves, moved.energy, moved.mask)} == {
        "meta"
    }
    assert "8 rows" in repr(puzzle)


def test_autocast_changes_no_draw() -> None:
    x, y = blobs(6, 3, 16, 16), labels(6)
    policy = PuzzleMix(net())
    mixed, target = policy(x, y, generator=rng(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = policy(x, y, generator=rng(1))
    assert torch.equal(again, mixed)
    assert torch.equal(same.weights, target.weights)


def test_refusals() -> None:
    model, x, y = net(), blobs(4, 3, 8, 8), labels(4)
    policy = PuzzleMix(model)
    with pytest.raises(TypeError, match=r"PuzzleMix: model is a str; pass a torch\.nn\.Module\."):
        PuzzleMix("resnet18")
    with pytest.raises(TypeError, match=r"PuzzleMix: x has dtype torch\.uint8, which the model can't be asked with"):
        policy((x * 255).to(torch.uint8), y)
    with pytest.raises(ValueError, match=r"PuzzleMix: y is None; pass the labels"):
        policy.plan(x)
    with pytest.raises(ValueError, match=r"PuzzleMix: x has shape \(4, 3, 8\); pass a batch with 4 axes"):
        policy(torch.rand(4, 3, 8), y)
    x[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"PuzzleMix: x holds NaN or infinity in rows 2;"):
        policy(x, y)
    for settings, error, text in (
        ({"blocks": ()}, TypeError, r"blocks is \(\); pass a list of numbers of blocks a side\."),
        ({"blocks": "4"}, TypeError, r"blocks is '4'; pass a list"),
        ({"blocks": [4, 0]}, ValueError, r"blocks is 0; pass an integer of at least 1\."),
        ({"blocks": [2.0]}, ValueError, r"blocks is 2\.0; pass an integer of at least 1\."),
        ({"beta": -1.0}, ValueError, r"beta is -1\.0; pass a finite number of at least 0\."),
        ({"gamma": 1.5}, ValueError, r"gamma is 1\.5; pass a number from 0 to 1\."),
        ({"eta": float("nan")}, ValueError, "eta is nan"),
        ({"xi": 0.0}, ValueError, r"xi is 0\.0; pass a finite number greater than 0\."),
        ({"labels": 4}, ValueError, r"labels is 4; pass 2 or 3\."),
        ({"labels": True}, ValueError, r"labels is True; pass 2 or 3\."),
        ({"alpha": 0}, ValueError, "alpha is 0; pass a finite number greater than 0"),
    ):
        with pytest.raises(error, match=f"PuzzleMix: {text}"):
            PuzzleMix(model, **settings)
    assert "blocks=[8]" in repr(PuzzleMix(model, blocks=8))
