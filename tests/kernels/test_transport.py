"""Moving blocks: the plan against a slow reading of the algorithm, the pixels against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hardmix.kernels.transport import (
    blend_blocks,
    block_of,
    move_blocks,
    pool_blocks,
    show_blocks,
    spread_blocks,
    transport_blocks,
)
from mixing.cases import rng


def price(i: int, j: int, h: int, w: int) -> float:
    """Squared distance of two blocks, opposite sides being 1 apart."""
    dy, dx = i // w - j // w, i % w - j % w
    return (dy * dy * max(w - 1, 1) ** 2 + dx * dx * max(h - 1, 1) ** 2) / (max(h - 1, 1) ** 2 * max(w - 1, 1) ** 2)


def plan_by_hand(visible: Tensor, saliency: Tensor, xi: float) -> list[int]:
    """Every block asks for its cheapest place, every place keeps the cheapest block, the others ask again."""
    h, w = visible.shape
    n, shown, s = h * w, visible.flatten().tolist(), saliency.flatten().tolist()
    cost = [[xi * price(i, j, h, w) - s[i] * shown[j] for j in range(n)] for i in range(n)]
    wish = [sorted(range(n), key=lambda j: (cost[i][j], j)) for i in range(n)]
    held: dict[int, int] = {}
    asking = list(range(n))

    def rank(i: int, j: int) -> tuple[float, bool, int]:
        return cost[i][j], i != j, i

    while asking:
        i = asking.pop()
        j = wish[i].pop(0)
        rival = held.get(j)
        if rival is None:
            held[j] = i
        elif rank(i, j) < rank(rival, j):
            held[j] = i
            asking.append(rival)
        else:
            asking.append(i)
    return [held[j] if shown[j] else j for j in range(n)]


def plan_by_matrices(visible: Tensor, saliency: Tensor, xi: float, rounds: int) -> Tensor:
    """The same with dense one-hot plans (N, n, n), round by round; places that don't show keep their own."""
    rows, h, w = saliency.shape
    n = h * w
    far = torch.tensor([[price(i, j, h, w) for j in range(n)] for i in range(n)], dtype=saliency.dtype)
    cost = xi * far - saliency.view(rows, n, 1) * visible.view(rows, 1, n)
    for _ in range(rounds):
        asked = torch.zeros_like(cost).scatter_(2, cost.argmin(2)[..., None], 1.0)
        best = torch.where(asked > 0, cost, 1e9).argmin(1)
        won = torch.zeros_like(cost).scatter_(1, best[:, None], 1.0) * asked
        cost = cost + (asked - won) * 10.0
    source = won.argmax(1).where(won.sum(1) > 0, torch.arange(n))
    return source.where(visible.flatten(1), torch.arange(n))


def some_maps(rows: int, h: int, w: int, *, power: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masks that show half of the places, and saliency with a few strong blocks."""
    g = rng(seed)
    s = torch.rand(rows, h, w, generator=g, dtype=torch.float64) ** power
    return torch.rand(rows, h, w, generator=g) < 0.5, s / s.sum((1, 2), keepdim=True)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (5, 3), (8, 8), (1, 6), (7, 1), (1, 1), (6, 11)], ids=str)
@pytest.mark.parametrize("xi", [0.8, 0.05])
@pytest.mark.parametrize("power", [1.0, 6.0])
def test_plan_against_the_slow_one(size: tuple[int, int], xi: float, power: float) -> None:
    visible, saliency = some_maps(6, *size, power=power)
    plan = transport_blocks(visible, saliency, xi=xi)
    for row in range(6):
        assert plan[row].tolist() == plan_by_hand(visible[row], saliency[row], xi)


def test_ties_against_the_slow_one() -> None:
    """Few different values, and distances that are equal by symmetry."""
    for seed in range(12):
        visible, _ = some_maps(1, 5, 5, seed=seed)
        saliency = torch.randint(0, 4, (1, 5, 5), generator=rng(seed)).double() / 16
        assert transport_blocks(visible, saliency, xi=0.5)[0].tolist() == plan_by_hand(visible[0], saliency[0], 0.5)


def test_plan_against_dense_matrices() -> None:
    visible, saliency = some_maps(24, 8, 8, seed=3)
    plan = transport_blocks(visible, saliency)
    assert torch.equal(plan, plan_by_matrices(visible, saliency, 0.8, rounds=64))
    assert float((plan != torch.arange(64)).double().mean()) > 0.02


def test_what_a_plan_promises() -> None:
    visible, saliency = some_maps(32, 8, 8, power=5.0, seed=1)
    plan = transport_blocks(visible, saliency, xi=0.3)
    own = torch.arange(64).expand(32, 64)
    shown = visible.flatten(1)
    assert torch.equal(plan[~shown], own[~shown])
    for row in range(32):
        blocks = plan[row][shown[row]]
        assert len(blocks.unique()) == len(blocks)
    s = saliency.flatten(1)
    gained = ((s.gather(1, plan) - s) * shown).sum(1)
    assert bool((gained >= 0).all())
    assert float(gained.mean()) > 0.01
    far = torch.tensor([[price(i, j, 8, 8) for j in range(64)] for i in range(64)], dtype=torch.float64)
    paid = torch.stack([far[plan[row], own[row]].sum() for row in range(32)])
    assert bool((gained >= 0.3 * paid - 1e-12).all())  # no move costs more than it brings
    assert torch.equal(transport_blocks(torch.zeros_like(visible), saliency), own)
    everywhere = torch.full_like(saliency, 1 / 64)
    assert torch.equal(transport_blocks(visible, everywhere), own)  # a flat map moves nothing


def test_what_is_not_finite_counts_as_nothing() -> None:
    visible = torch.tensor([[[False, True, True, True]]])
    plan = transport_blocks(visible, torch.tensor([[[0.9, float("nan"), 0.03, float("inf")]]]))
    assert plan.tolist() == [[0, 0, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_plan_of_other_dtypes(dtype: torch.dtype) -> None:
    visible, saliency = some_maps(4, 4, 4)
    saliency = saliency.to(dtype)
    assert torch.equal(transport_blocks(visible, saliency), transport_blocks(visible, saliency.float()))


def test_transport_refusals() -> None:
    visible, saliency = some_maps(2, 3, 4)
    for bad in (visible[:1], visible.float(), visible.flatten(1)):
        with pytest.raises(ValueError, match=r"transport_blocks: visible has shape .* pass \(2, 3, 4\) bools, as many"):
            transport_blocks(bad, saliency)
    with pytest.raises(ValueError, match=r"transport_blocks: saliency has shape \(3, 4\); pass a batch with 3 axes"):
        transport_blocks(visible[0], saliency[0])
    with pytest.raises(TypeError, match=r"transport_blocks: visible is a list; pass a torch\.Tensor\."):
        transport_blocks([True], saliency)
    with pytest.raises(ValueError, match=r"transport_blocks: xi is 0\.0; pass a finite number greater than 0\."):
        transport_blocks(visible, saliency, xi=0.0)


@pytest.mark.parametrize(("length", "blocks"), [(8, 4), (7, 3), (17, 16), (5, 5), (9, 1)])
def test_blocks_of_an_axis(length: int, blocks: int) -> None:
    found = block_of(length, blocks).tolist()
    assert found == sorted(found)
    assert set(found) == set(range(blocks))
    sizes = [found.count(k) for k in range(blocks)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 4)), ((7, 11), (3, 4)), ((5, 6), (5, 1))])
def test_pooling_and_spreading(size: tuple[int, int], grid: tuple[int, int]) -> None:
    x = torch.rand(3, *size, generator=rng(), dtype=torch.float64)
    down, right = block_of(size[0], grid[0]).tolist(), block_of(size[1], grid[1]).tolist()
    want = torch.zeros(3, *grid, dtype=torch.float64)
    for i, k in enumerate(down):
        for j, m in enumerate(right):
            want[:, k, m] += x[:, i, j]
    assert torch.allclose(pool_blocks(x, grid), want)
    spread = spread_blocks(want, size)
    assert spread.shape == x.shape
    for i, k in enumerate(down):
        for j, m in enumerate(right):
            assert torch.equal(spread[:, i, j], want[:, k, m])


SIZES = [((12, 12), (4, 4)), ((17, 23), (4, 4)), ((5, 40), (5, 8)), ((30, 31), (7, 9)), ((3, 3), (1, 1))]


def read(image: Tensor, plan: Tensor, grid: tuple[int, int], i: int, j: int) -> Tensor:
    """Pixel (i, j) of one image (C, H, W) whose places show other blocks."""
    where = []
    at = (i, j)
    place = [int(block_of(image.shape[1 + axis], grid[axis])[at[axis]]) for axis in range(2)]
    block = divmod(int(plan[place[0] * grid[1] + place[1]]), grid[1])
    for axis in range(2):
        inside = block_of(image.shape[1 + axis], grid[axis]).tolist()
        offset = at[axis] - inside.index(place[axis])
        where.append(inside.index(block[axis]) + min(offset, inside.count(block[axis]) - 1))
    return image[:, where[0], where[1]]


@pytest.mark.parametrize(("size", "grid"), SIZES, ids=str)
def test_blended_blocks_against_loops(size: tuple[int, int], grid: tuple[int, int]) -> None:
    g = rng(1)
    n, cells = 3, grid[0] * grid[1]
    x = torch.rand(n, 2, *size, generator=g, dtype=torch.float64)
    z = torch.randint(0, 3, (n, *grid), generator=g).double() / 2
    plans = torch.stack([torch.randperm(cells, generator=g) for _ in range(2 * n)]).view(2, n, cells)
    partner = torch.tensor([2, 0, 1])
    want = torch.empty_like(x)
    share = spread_blocks(z, size)
    for row in range(n):
        for i in range(size[0]):
            for j in range(size[1]):
                own, other = read(x[row], plans[0, row], grid, i, j), read(x[partner[row]], plans[1, row], grid, i, j)
                want[row, :, i, j] = share[row, i, j] * own + (1 - share[row, i, j]) * other
    before = x.clone()
    got = blend_blocks(x, partner, z, plans)
    assert torch.allclose(got, want, atol=1e-15)
    assert torch.equal(x, before)
    assert torch.allclose(
        move_blocks(x, plans[0], grid)[0, :, -1, -1], read(x[0], plans[0, 0], grid, *(v - 1 for v in size))
    )
    # the form that autograd sees, other layouts, a given mask, in place
    traced = x.clone().requires_grad_()
    through = blend_blocks(traced, partner, z, plans)
    assert torch.allclose(through, want, atol=1e-15)
    through.sum().backward()
    assert traced.grad is not None
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(blend_blocks(last, partner, z, plans), got)
    wide = torch.rand(n, 4, size[0] + 2, size[1] + 3, generator=g, dtype=torch.float64)
    wide[:, 1:3, 1:-1, 2:-1] = x
    assert torch.equal(blend_blocks(wide[:, 1:3, 1:-1, 2:-1], partner, z, plans, mask=share[:, None]), got)
    there = x.clone()
    assert blend_blocks(there, partner, z, plans, out=there) is there
    assert torch.equal(there, got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_blended_blocks_in_narrow_types(dtype: torch.dtype) -> None:
    g = rng(2)
    x = (torch.rand(4, 3, 16, 16, generator=g) * 200).to(dtype)
    z = torch.randint(0, 3, (4, 4, 4), generator=g).float() / 2
    plans = torch.stack([torch.randperm(16, generator=g) for _ in range(8)]).view(2, 4, 16)
    partner = torch.tensor([1, 2, 3, 0])
    got = blend_blocks(x, partner, z, plans, shift=1)
    want = blend_blocks(x.double(), partner, z.double(), plans, shift=1)
    assert got.dtype == dtype
    assert torch.equal(got, want.round().to(dtype) if dtype == torch.uint8 else want.to(dtype))


def test_a_class_mask_moves_with_its_image() -> None:
    y = torch.arange(24).view(1, 4, 6)
    plan = torch.tensor([[3, 1, 2, 0]])
    moved = move_blocks(y, plan, (2, 2))
    assert torch.equal(moved[0, :2, :3], y[0, 2:, 3:])
    assert torch.equal(moved[0, 2:, 3:], y[0, :2, :3])
    assert torch.equal(moved[0, :2, 3:], y[0, :2, 3:])
    assert moved.dtype == torch.long


@pytest.mark.parametrize(("size", "grid"), [*SIZES, ((96, 80), (4, 4)), ((97, 79), (3, 5))], ids=str)
def test_images_put_together_from_many(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Small images, and large ones, which are copied place by place."""
    g = rng(3)
    n = 4
    x = torch.rand(n, 3, *size, generator=g, dtype=torch.float64)
    first, second = (torch.randint(n, (n, *grid), generator=g) for _ in range(2))
    share = torch.where(torch.rand(n, *grid, generator=g) < 0.4, 0.5, 1.0)
    want = torch.empty_like(x)
    for i, k in enumerate(block_of(size[0], grid[0]).tolist()):
        for j, m in enumerate(block_of(size[1], grid[1]).tolist()):
            for row in range(n):
                weight = float(share[row, k, m])
                a, b = x[first[row, k, m], :, i, j], x[second[row, k, m], :, i, j]
                want[row, :, i, j] = weight * a + (1 - weight) * b
    before = x.clone()
    got = show_blocks(x, first, second, share)
    assert torch.equal(got, want)
    assert torch.equal(x, before)
    last = show_blocks(x.contiguous(memory_format=torch.channels_last), first, second, share)
    assert torch.equal(last, want)
    assert last.is_contiguous(memory_format=torch.channels_last)
    traced = x.clone().requires_grad_()
    through = show_blocks(traced, first, second, share)
    assert torch.equal(through, want)
    through.sum().backward()
    assert traced.grad is not None
    assert float(traced.grad.sum()) == pytest.approx(x.numel())
    half = show_blocks(x.half(), first, second, share)
    assert torch.equal(half, show_blocks(x.half().double(), first, second, share).half())
