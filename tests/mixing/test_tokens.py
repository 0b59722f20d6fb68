"""TokenMix, SMMix, MergeMix: patches moved by the attention of one more forward, against loops."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiling
from hardmix.losses import SoftCrossEntropyLoss
from hardmix.mixing.attention import Grid
from hardmix.mixing.attention_policy import AttentionPolicy
from hardmix.mixing.static import Mixup
from hardmix.mixing.target import MixedTarget
from hardmix.mixing.token_merge import MergeMix, block_of, match, merge_counts
from hardmix.mixing.tokens import SMMix, TokenMix, best_window, block_mask, shifted
from mixing.cases import blend_by_hand, constant_rows, own_share, rng
from mixing.vits import GivenViT, given_attention, tiny_vit

POLICIES: dict[str, Callable[..., AttentionPolicy]] = {"TokenMix": TokenMix, "SMMix": SMMix, "MergeMix": MergeMix}
GRIDS = [(8, 8, 4), (3, 5, 4), (1, 4, 2)]
Y = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def given_vit(images: int, rows: int, columns: int, patch: int, first: int = 1) -> GivenViT:
    return GivenViT([given_attention(images, 2, first + rows * columns, seed) for seed in range(3)], patch)


def batch(images: int, rows: int, columns: int, patch: int, border: int = 0) -> Tensor:
    return torch.randn(images, 3, rows * patch + border, columns * patch + border, generator=rng(5))


def class_map(model: GivenViT, n: int, patches: int) -> list[float]:
    """What the class token gives each patch, summed over the heads of the last block."""
    weights = model.blocks[-1].scores[n].exp().double()
    return weights[:, 0, weights.shape[-1] - patches :].sum(0).tolist()


def own_patches(mask: Tensor, n: int, rows: int, columns: int, patch: int) -> list[float]:
    out = []
    for r in range(rows):
        for c in range(columns):
            cell = mask[n, 0, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            assert float(cell.min()) == float(cell.max())  # whole patches
            out.append(float(cell[0, 0]))
    return out


# TokenMix


def slow_blocks(targets: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Block by block for each row alone, from the same draws."""
    rows, columns = size
    draws: list[Tensor] = []
    generator = rng(seed)
    out = torch.zeros(len(targets), rows, columns, dtype=torch.bool)
    for n, target in enumerate(targets.tolist()):
        missing, failed, step = target, 0, 0
        while missing > 0 and failed < 10:
            if step == len(draws):
                draws.append(torch.rand(len(targets), 4, generator=generator).double())
            area, ratio, top, left = draws[step][n].tolist()
            step += 1
            area = 1 + area * (missing - 1)
            ratio = math.exp(math.log(0.3) + ratio * (math.log(1 / 0.3) - math.log(0.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            failed += 1
            if height >= max(2, rows) or width >= max(2, columns):
                continue
            y, x = int(top * (rows - height + 1)), int(left * (columns - width + 1))
            new = [(i, j) for i in range(y, y + height) for j in range(x, x + width) if not out[n, i, j]]
            if 0 < len(new) <= missing:
                for i, j in new:
                    out[n, i, j] = True
                missing, failed = missing - len(new), 0
    return out


@pytest.mark.parametrize("size", [(14, 14), (8, 8), (4, 9), (1, 6), (1, 1)])
def test_blocks_against_loops(size: tuple[int, int]) -> None:
    patches = size[0] * size[1]
    targets = torch.tensor([0, 1, patches // 3, patches // 2, patches - 1, patches])
    full = 0
    for seed in range(4):
        mask = block_mask(targets, size, rng(seed))
        assert torch.equal(mask, slow_blocks(targets, size, seed))
        counts = mask.sum((1, 2))
        assert bool((counts <= targets).all())
        full += int((counts == targets).sum())
    assert full >= 12  # ten misses in a row end most of the others close to their number


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mask", ["block", "random"])
@pytest.mark.parametrize("normalise", [False, True])
def test_tokenmix_against_loops(grid: tuple[int, int, int], mask: str, normalise: bool) -> None:
    patches = grid[0] * grid[1]
    model = given_vit(7, *grid)
    policy = TokenMix(model, mask=mask, normalise=normalise)
    x = batch(7, *grid, border=1)
    mixed, target = policy(x, Y, generator=rng(3))
    plan = policy.plan(x, Y, generator=rng(3))
    after = policy.relabel(torch.zeros(7, 5), target)
    assert torch.equal(after.labels, target.labels)
    assert torch.equal(mixed, plan.blend(x))
    for n in range(7):
        own = own_patches(plan.mask, n, *grid)
        partner = int(plan.partner[n])
        mine, theirs = class_map(model, n, patches), class_map(model, partner, patches)
        a = sum(m * v for m, v in zip(own, mine, strict=True)) / sum(mine)
        b = sum((1 - m) * v for m, v in zip(own, theirs, strict=True)) / sum(theirs)
        if normalise:
            a, b = a / (a + b), b / (a + b)
        assert after.weights[n].tolist() == pytest.approx([a, b], abs=1e-5)


def test_tokenmix_shows_fourteen_more_of_196() -> None:
    model = given_vit(1, 14, 14, 2)
    x = batch(40, 14, 14, 2)
    plan = TokenMix(model, mask="random").plan(x, generator=rng(1))
    shown = torch.round((1 - plan.lam) * 196)
    assert float(shown.min()) >= 14
    drawn = rng(1)
    torch.rand(1, dtype=torch.float64, generator=drawn)  # the shift of the pairing
    lam = torch.rand(40, generator=drawn)
    assert torch.equal(shown, (((1 - lam) * 196).long() + 14).clamp(max=196).float())


def test_tokenmix_by_a_map_of_one_s_own() -> None:
    model = tiny_vit()
    seen = []

    def activation(x: Tensor, y: Tensor | None) -> Tensor:
        seen.append((x.shape, y))
        maps = torch.full((7, 4, 4), -1.0)  # negative numbers count as 0
        maps[:, 0, 0] = 3.0
        maps[2] = 0.0  # nothing: as a flat map
        return maps

    policy = TokenMix(model, activation=activation)
    x = batch(7, 8, 8, 4)
    for seed in range(3):
        _, target = policy((x * 255).to(torch.uint8), Y, generator=rng(seed))
        after = policy.relabel(torch.zeros(7, 5), target).weights
        plan = policy.plan(x, Y, generator=rng(seed))
        corner = plan.mask[:, 0, 0, 0]
        for n in range(7):
            partner = int(plan.partner[n])
            own = float(plan.lam[n]) if n == 2 else float(corner[n])
            other = 1 - float(plan.lam[n]) if partner == 2 else 1 - float(corner[n])
            assert after[n].tolist() == pytest.approx([own, other], abs=1e-6)
    assert seen[0][0] == (7, 3, 32, 32)
    assert torch.equal(seen[0][1], Y)
    with pytest.raises(
        ValueError, match=r"TokenMix: activation returned \(7, 3, 32, 32\) for a batch of shape \(7, 3, 32,"
    ):
        TokenMix(model, activation=lambda x, y: x).plan(x)
    with pytest.raises(TypeError, match="TokenMix: activation is a str; pass a function of images and labels, or None"):
        TokenMix(model, activation="cam")


def test_tokenmix_relabels_its_own_draw() -> None:
    policy = TokenMix(tiny_vit())
    x = batch(4, 8, 8, 4)
    target = MixedTarget(torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), 0.5))
    with pytest.raises(
        RuntimeError, match=r"TokenMix: relabel has a target with weights \(4, 2\) that no draw belongs to"
    ):
        policy.relabel(torch.zeros(4, 5), target)
    policy.plan(x)
    with pytest.raises(RuntimeError, match="that no draw belongs to"):
        policy.relabel(torch.zeros(4, 5), target)
    _, target = policy(x, Y[:4])
    want = policy.relabel(torch.zeros(4, 5), target).weights
    policy.plan(x)  # another draw is not the batch's
    assert torch.equal(policy.relabel(torch.zeros(4, 5), target).weights, want)
    with pytest.raises(
        ValueError, match=r"TokenMix: y has shape \(2, 32, 32\), a dense mask, but content weighs whole"
    ):
        policy(x[:2], torch.zeros(2, 32, 32, dtype=torch.long))
    with pytest.raises(ValueError, match=r"TokenMix: mask is 'blocks'; pass one of .*did you mean"):
        TokenMix(tiny_vit(), mask="blocks")


# SMMix


def slow_window(values: Tensor, height: int, width: int, largest: bool) -> tuple[int, int]:
    rows, columns = values.shape
    sums = {
        (y, x): float(values[y : y + height, x : x + width].double().sum())
        for y in range(rows - height + 1)
        for x in range(columns - width + 1)
    }
    return (max if largest else min)(sums, key=sums.get)


@pytest.mark.parametrize("size", [(8, 8), (3, 7), (1, 5)])
def test_windows_against_loops(size: tuple[int, int]) -> None:
    values = torch.rand(12, *size, generator=rng())
    window = torch.stack([torch.randint(1, side + 1, (12,), generator=rng(1)) for side in size], 1)
    for largest in (False, True):
        got = best_window(values, window, largest=largest)
        for n in range(12):
            assert tuple(got[n].tolist()) == slow_window(values[n], *window[n].tolist(), largest)
    flat = torch.ones(2, *size)
    assert best_window(flat, torch.ones(2, 2, dtype=torch.long), largest=True).tolist() == [[0, 0], [0, 0]]


def test_shifted_images() -> None:
    x = torch.randn(3, 2, 14, 22, generator=rng())
    grid = Grid(3, 4, 4, 5)
    partner = torch.tensor([2, 0, 0])
    by = torch.tensor([[1, -2], [0, 3], [-2, 0]])
    for layout in (torch.contiguous_format, torch.channels_last):
        got = shifted(x.contiguous(memory_format=layout), partner, by, grid)
        assert got.is_contiguous(memory_format=layout)
        for n in range(3):
            for i in range(12):
                for j in range(20):
                    down = min(max(i + int(by[n, 0]) * 4, 0), 11)
                    column = min(max(j // 5 + int(by[n, 1]), 0), 3)
                    assert torch.equal(got[n, :, i, j], x[partner[n], :, down, column * 5 + j % 5])
        assert bool((got[:, :, 12:] == 0).all())
        assert bool((got[:, :, :, 20:] == 0).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("border", [0, 1])
def test_smmix_against_loops(grid: tuple[int, int, int], border: int) -> None:
    rows, columns, patch = grid
    model = given_vit(7, *grid)
    policy = SMMix(model)
    x = batch(7, *grid, border)
    weights = model.blocks[-1].scores.exp()
    maps = weights[:, :, 1:, 1:].mean((1, 2)).view(7, rows, columns)  # what all patches give on average
    sides = set()
    for seed in range(4):
        mixed, target = policy(x, Y, generator=rng(seed))
        plan = policy.plan(x, Y, generator=rng(seed))
        drawn = rng(seed)
        torch.rand(1, dtype=torch.float64, generator=drawn)
        unit = torch.rand(7, generator=drawn)
        for n in range(7):
            low = [max(1, int(0.25 * side)) for side in (rows, columns)]
            high = [max(1, int(0.75 * side)) for side in (rows, columns)]
            height, width = (a + int(float(unit[n]) * (b - a + 1)) for a, b in zip(low, high, strict=True))
            sides.add((height, width))
            partner = int(plan.partner[n])
            top, left = slow_window(maps[n], height, width, largest=False)
            source = slow_window(maps[partner], height, width, largest=True)
            want = x[n].clone()
            for i in range(height * patch):
                for j in range(width * patch):
                    want[:, top * patch + i, left * patch + j] = x[
                        partner, :, source[0] * patch + i, source[1] * patch + j
                    ]
            assert torch.equal(mixed[n], want)
            area = height * width * patch**2 / (x.shape[2] * x.shape[3])
            assert float(target.weights[n, 0]) == pytest.approx(1 - area, abs=1e-6)
    if grid == (8, 8, 4):
        assert sides == {(side, side) for side in range(2, 7)}


def test_smmix_s_loss() -> None:
    model = tiny_vit()
    x, criterion = batch(7, 8, 8, 4), SoftCrossEntropyLoss()
    policy = SMMix(model, consistency=0.7)
    with torch.no_grad():
        clean = model.eval()(x)
    model.train()
    mixed, target = policy(x, Y, generator=rng(1))
    logits = model(mixed)
    assert policy.relabel(logits, target) is target
    loss = policy.loss(criterion)
    want = 0.0
    for n in range(7):
        lam, partner = float(target.weights[n, 0]), int(policy.plan(x, generator=rng(1)).partner[n])
        z = lam * clean[n].double() + (1 - lam) * clean[partner].double()
        p, q = z.softmax(0), logits[n].detach().double().softmax(0)
        want += float((p * (p / q).log()).sum()) / 7
    assert float(loss.detach()) == pytest.approx(0.7 * want, rel=1e-4)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert float(grad.abs().max()) > 0
    assert policy.loss(criterion) is None  # once per batch
    policy(x, Y)
    with pytest.raises(RuntimeError, match="SMMix: loss has no logits of the mixed batch; call relabel"):
        policy.loss(criterion)
    _, target = policy(x, Y)
    policy.relabel(torch.zeros(7, 4), target)
    with pytest.raises(
        ValueError, match=r"SMMix: loss has logits \(7, 4\) of the mixed batch but \(7, 5\) of the clean"
    ):
        policy.loss(criterion)
    off = SMMix(model, consistency=0.0)
    _, target = off(x, Y)
    off.relabel(logits, target)
    assert off.loss(criterion) is None
    for options, text in (({"side": (0.5, 0.2)}, "side is"), ({"consistency": -1}, "consistency is -1")):
        with pytest.raises(ValueError, match=text):
            SMMix(model, **options)


def test_smmix_refuses_dense_masks() -> None:
    with pytest.raises(ValueError, match="the plan changes pixels before it mixes"):
        SMMix(tiny_vit())(batch(2, 8, 8, 4), torch.zeros(2, 32, 32, dtype=torch.long))


# MergeMix


def slow_match(keys: Tensor, count: int) -> list[int]:
    """Place of each token, for one image."""
    keys = F.normalize(keys.double(), dim=-1)
    even, odd = list(range(0, len(keys), 2)), list(range(1, len(keys), 2))
    best = {i: max(odd, key=lambda j, i=i: (float(keys[i] @ keys[j]), -j)) for i in even}
    order = sorted(even, key=lambda i: (-float(keys[i] @ keys[best[i]]), i))
    gone = set(order[:count])
    stay = [i for i in even if i not in gone] + odd
    place = {token: at for at, token in enumerate(stay)}
    return [place[best[i]] if i in gone else place[i] for i in range(len(keys))]


@pytest.mark.parametrize("tokens", [2, 7, 16])
def test_matches_against_loops(tokens: int) -> None:
    keys = torch.randn(5, tokens, 6, generator=rng())
    for count in range(1, tokens // 2 + 1):
        got = match(keys, count)
        for n in range(5):
            assert got[n].tolist() == slow_match(keys[n], count)
        assert bool((got.sort(1).values[:, -1] == tokens - count - 1).all())


def test_counts_of_merges() -> None:
    assert merge_counts(0, 4) == [0, 0, 0]
    assert merge_counts(10, 1) == []
    assert merge_counts(10, 2) == [10]
    for total in (1, 49, 98):
        for blocks in (3, 4, 12):
            counts = merge_counts(total, blocks)
            assert len(counts) == blocks - 1
            assert sum(counts) == total
            assert all(count >= 0 for count in counts)
    counts = merge_counts(980, 12)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] == pytest.approx(3, rel=0.05)


def slow_merged_map(model: nn.Module, x: Tensor, share: float) -> Tensor:
    """The tiny ViT written out, with tokens merged after each block but the last; (N, patches)."""
    blocks = [block for stage in (model.stage1, model.stage2, model.stage3) for block in stage.blocks]
    counts = merge_counts(int(share * 64), len(blocks))
    tokens = model.stem(x)
    out = torch.zeros(len(x), 64)
    for n in range(len(x)):
        row, sizes, groups = tokens[n], torch.ones(65), [[i] for i in range(65)]
        for b, block in enumerate(blocks):
            q, k, v = block.qkv(block.norm1(row)).view(len(row), 3, 4, -1).permute(1, 2, 0, 3)
            weights = (q @ k.mT * q.shape[-1] ** -0.5 + sizes.log()).softmax(-1)
            if b == len(blocks) - 1:
                for at, group in enumerate(groups[1:], 1):
                    for i in group:
                        out[n, i - 1] = weights[:, 0, at].mean()
                break
            row = row + block.out((weights @ v).transpose(0, 1).flatten(1))
            row = row + block.mlp(block.norm2(row))
            place = [0] + [1 + at for at in slow_match(k.mean(0)[1:], counts[b])]
            merged, grown = torch.zeros(len(row) - counts[b], row.shape[1]), torch.zeros(len(row) - counts[b])
            joined: list[list[int]] = [[] for _ in grown]
            for i, at in enumerate(place):
                merged[at] += row[i] * sizes[i]
                grown[at] += sizes[i]
                joined[at] += groups[i]
            row, sizes, groups = merged / grown[:, None], grown, joined
    return out


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_merged_attention_against_the_tiny_vit_written_out(share: float) -> None:
    model = tiny_vit()
    x = batch(3, 8, 8, 4)
    got, grid = MergeMix(model, merge=share)._map(x)
    with torch.no_grad():
        want = slow_merged_map(model, x, share)
    assert grid == Grid(8, 8, 4, 4, 1)
    assert torch.allclose(got.flatten(1), want, atol=1e-5)
    distinct = [len(set(row.tolist())) for row in got.flatten(1)]
    assert max(distinct) <= 64 - int(share * 64)  # patches of one token have one number
    assert all(len(part._forward_hooks) <= 1 for part in model.modules())  # the tap's own


def test_merging_nothing_is_the_attention() -> None:
    model = tiny_vit()
    x = batch(3, 8, 8, 4)
    got, _ = MergeMix(model, merge=0.0)._map(x)
    want = model.forward_with_attention(x)[1][-1].mean(1)[:, 0, 1:]
    assert torch.allclose(got.flatten(1), want, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mergemix_keeps_what_is_attended_to(grid: tuple[int, int, int]) -> None:
    rows, columns, patch = grid
    patches = rows * columns
    model = given_vit(7, *grid)
    policy = MergeMix(model, merge=0.0)
    x = batch(7, *grid, border=1)
    plan = policy.plan(x, generator=rng(2))
    drawn = rng(2)
    torch.rand(1, dtype=torch.float64, generator=drawn)
    lam = torch.rand(7, generator=drawn)
    for n in range(7):
        own = own_patches(plan.mask, n, *grid)
        keep = int(float(lam[n]) * patches)
        values = class_map(model, n, patches)
        kept = sorted(range(patches), key=lambda j, values=values: (-values[j], j))[:keep]
        assert [j for j, value in enumerate(own) if value] == sorted(kept)
        area = (patches - keep) * patch**2 / (x.shape[2] * x.shape[3])
        assert float(plan.lam[n]) == pytest.approx(1 - area, abs=1e-6)


def test_mergemix_s_loss() -> None:
    model, twin = tiny_vit(), tiny_vit()
    x, criterion = batch(7, 8, 8, 4), SoftCrossEntropyLoss()
    policy = MergeMix(model, mixup=0.5, mixup_alpha=0.8)
    generator = rng(4)
    mixed, target = policy(x, Y, generator=generator)
    loss = criterion(model(mixed), policy.relabel(torch.zeros(7, 5), target)) + policy.loss(criterion)
    loss.backward()
    again = rng(4)
    plan = policy.plan(x, Y, generator=again)
    assert torch.equal(plan.blend(x), mixed)
    base = Mixup(0.8).plan(x, Y, generator=again)  # drawn after the plan, from the same generator
    want = criterion(twin(mixed), target) + 0.5 * criterion(twin(base.blend(x)), base.target(Y))
    want.backward()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(got.grad, wanted.grad, atol=1e-6)
    assert policy.loss(criterion) is None  # once per batch
    off = MergeMix(model, mixup=0.0)
    off(x, Y)
    assert off.loss(criterion) is None
    policy(x, Y)
    policy.disarm()
    assert policy.loss(criterion) is None
    for options, text in (
        ({"merge": 1.5}, r"merge is 1\.5; pass a number from 0 to 1"),
        ({"mixup": -0.1}, r"mixup is -0\.1; pass a finite number of at least 0"),
        ({"mixup_alpha": 0}, "mixup_alpha is 0; pass a finite number greater than 0"),
    ):
        with pytest.raises(ValueError, match=text):
            MergeMix(model, **options)


def test_mergemix_by_scores_and_by_a_kernel() -> None:
    """A softmax in the open and the fused kernel give the same merged attention, masks included."""

    class Attention(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.fused = fused
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            allowed = torch.ones(x.shape[1], dtype=torch.bool)
            allowed[-1] = False
            if self.fused:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None]).transpose(1, 2).flatten(2)
            scores = q @ k.transpose(2, 3) * 0.5
            return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)

    class Net(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.Sequential(*[Attention(fused) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1)

    x = batch(3, 8, 8, 4)
    (a, grid), (b, _) = (MergeMix(Net(fused))._map(x) for fused in (True, False))
    assert grid == Grid(8, 8, 4, 4, 0)  # no class token: what the patches give on average
    assert torch.allclose(a, b, atol=1e-6)
    assert len(a[0].unique()) < 40
    plain, _ = MergeMix(Net(True), merge=0.0)._map(x)
    assert torch.allclose(plain.sum((1, 2)), torch.ones(3), atol=1e-5)


def test_what_mergemix_cannot_merge() -> None:
    x = batch(2, 8, 8, 4)

    class Fixed(nn.Module):
        """A position for each token in every block."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)
            self.positions = nn.Parameter(torch.zeros(64, 4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.qkv(x + self.positions)[:, None]).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)[:, 0]

    class Own(nn.Module):
        """Attention by hand, without a product of four axes."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    class Net(nn.Module):
        def __init__(self, kind: type) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 4, 4)
            self.blocks = nn.Sequential(kind(), kind())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1)

    with pytest.raises(ValueError, match=r"MergeMix: the Net does not run on merged tokens \(.*\); pass merge=0\."):
        MergeMix(Net(Fixed)).plan(x)
    assert MergeMix(Net(Fixed), merge=0.0).plan(x).lam.shape == (2,)
    with pytest.raises(ValueError, match=r"MergeMix: one of the blocks, a Own, ran without .*; pass merge=0\."):
        MergeMix(Net(Own)).plan(x)
    with pytest.raises(ValueError, match=r"MergeMix: 'blocks\.1', a Own, ran without F\.scaled_dot_product_attention"):
        MergeMix(Net(Own), merge=0.0).plan(x)
    alone = Net(Own)
    del alone.blocks[1]
    with pytest.raises(ValueError, match=r"MergeMix: the Net ran without F\.scaled_dot_product_attention and without"):
        MergeMix(alone).plan(x)
    model = tiny_vit()
    with pytest.raises(ValueError, match="TinyViT: x has spatial size"):
        MergeMix(model).plan(x[:, :, :16])
    assert all(len(part._forward_hooks) <= 1 for part in model.modules())  # the tap's own
    assert block_of(model, "stage2.blocks.0") is model.stage2.blocks[0]
    assert block_of(model, "head") is model


# all three


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
def test_pixels_and_area_agree(name: str, per: str) -> None:
    policy = POLICIES[name](tiny_vit(), per=per)
    for n in (1, 2, 7):
        values = 2.0 ** -torch.arange(n, dtype=torch.float64)
        x = constant_rows(values, (3, 32, 32))
        before = x.clone()
        for seed in range(3):
            plan = policy.plan(x, generator=rng(seed))
            lam = plan.lam.double()
            want = lam * values + (1 - lam) * values[plan.partner]
            assert torch.allclose(plan.blend(x).flatten(1).mean(1), want, atol=2e-7, rtol=0)
            assert torch.equal(plan.lam, own_share(plan.mask))
            if per == "batch":
                assert len(plan.lam.unique()) == 1
            if per == "pair":
                assert torch.equal(plan.lam, plan.lam[plan.partner])
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [(12, 20), (9, 9), (13, 22)])
def test_images_that_are_not_square_and_have_odd_sides(name: str, size: tuple[int, int]) -> None:
    grid = (size[0] // 4, size[1] // 4)
    model = GivenViT([given_attention(1, 2, 1 + grid[0] * grid[1])] * 2, 4)
    policy = POLICIES[name](model, **({"merge": 0.0} if name == "MergeMix" else {}))
    x = torch.rand(5, 3, *size, generator=rng())
    for seed in range(3):
        plan = policy.plan(x, generator=rng(seed))
        assert plan.mask.shape == (5, 1, *size)
        assert bool((plan.mask[:, :, grid[0] * 4 :] == 1).all())  # no patch covers them: they stay
        assert (plan.blend(x).double() - torch.from_numpy(blend_by_hand(x, plan))).abs().max() < 1e-6
        assert torch.allclose(plan.lam, plan.mask.mean((1, 2, 3)))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    policy = POLICIES[name](tiny_vit())
    x = batch(5, 8, 8, 4).to(dtype)
    if dtype == torch.uint8:
        with pytest.raises(TypeError, match=rf"{name}: x has dtype torch.uint8, which the model can't be asked with"):
            policy(x, Y[:5])
        return
    mixed, target = policy(x, Y[:5], generator=rng())
    assert mixed.dtype == dtype
    assert target.weights.dtype == torch.float32
    plan = policy.plan(x, generator=rng())
    assert plan.mask.dtype == torch.float32
    assert (mixed.double() - torch.from_numpy(blend_by_hand(x, plan))).abs().max() < 1e-6  # pixels are copied


@pytest.mark.parametrize("name", POLICIES)
def test_the_model_is_as_before(name: str) -> None:
    """Gradients that are being accumulated, the modes, the random state, and the requires_grad of every parameter."""
    model = tiny_vit()
    model.stage1.requires_grad_(False)
    model.stage2.eval()
    x = batch(5, 8, 8, 4)
    model(x).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [(p.requires_grad) for p in model.parameters()] + [part.training for part in model.modules()]
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    for _ in range(2):
        mixed, _ = POLICIES[name](model)(x.clone().requires_grad_(), Y[:5], generator=rng())
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == [(p.requires_grad) for p in model.parameters()] + [part.training for part in model.modules()]
    for old, new in zip(grads, [p.grad for p in model.parameters()], strict=True):
        assert new is None if old is None else torch.equal(old, new)
    assert mixed.requires_grad  # through the pixels, not through the model


@pytest.mark.parametrize("name", POLICIES)
def test_determinism_and_autocast(name: str) -> None:
    model = tiny_vit()
    x = batch(7, 8, 8, 4)
    results = []
    for low in (False, False, True):
        policy = POLICIES[name](model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            mixed, target = policy(x, Y, generator=rng(9))
            logits = model(mixed)
            assert logits.requires_grad
            policy.relabel(logits, target)
            loss = policy.loss(SoftCrossEntropyLoss())
            assert loss is None or bool(loss.isfinite())
        results.append((mixed, target.weights))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][1] - results[2][1]).abs().max() < 0.02  # the same draws


@pytest.mark.parametrize("name", POLICIES)
def test_the_forward_runs_in_the_precision_of_the_training(name: str) -> None:
    seen = []
    model = tiny_vit()
    model.stage1.blocks[0].qkv.register_forward_hook(
        lambda module, args, out: seen.append((out.dtype, module.training))
    )
    policy = POLICIES[name](model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        policy.plan(batch(3, 8, 8, 4))
    policy.plan(batch(3, 8, 8, 4))
    assert seen == [(torch.bfloat16, False), (torch.float32, False)]


@pytest.mark.parametrize("name", POLICIES)
def test_copies_and_state(name: str) -> None:
    model = tiny_vit()
    policy = POLICIES[name](model)
    assert policy.state_dict() == {}
    assert list(policy.parameters()) == []
    assert all(part is not model for part in policy.modules())
    assert type(policy).__name__ in repr(policy)
    x = batch(4, 8, 8, 4)
    want, _ = policy(x, Y[:4], generator=rng(2))
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin.loss(SoftCrossEntropyLoss()) is None
        with pytest.raises(
            RuntimeError, match=rf"{name}: this is a copy without its model; call attach\(model\) first"
        ):
            twin(x, Y[:4])
        twin.attach(tiny_vit())
        assert torch.equal(twin(x, Y[:4], generator=rng(2))[0], want)


@pytest.mark.parametrize("name", POLICIES)
def test_one_class_and_one_image(name: str) -> None:
    policy = POLICIES[name](tiny_vit())
    _, target = policy(batch(4, 8, 8, 4), torch.ones(4, dtype=torch.long), generator=rng())
    assert torch.allclose(target.dense(5), torch.eye(5)[1].expand(4, 5))
    x = batch(1, 8, 8, 4)
    mixed, target = policy(x, Y[:1], generator=rng())
    assert target.labels.tolist() == [[0, 0]]
    assert torch.equal(mixed, x) or name == "SMMix"  # which moves a part of the image within it


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_refused(name: str) -> None:
    make = POLICIES[name]
    with pytest.raises(ValueError, match=f"{name}: the Linear has no attention that could be found"):
        make(nn.Linear(2, 2))
    policy = make(tiny_vit())
    with pytest.raises(ValueError, match=rf"{name}: x has shape \(4, 3, 32\); pass a batch with 4 axes"):
        policy(torch.rand(4, 3, 32), Y[:4])
    with pytest.raises(ValueError, match=f"{name}: per is 'row'; pass one of"):
        make(tiny_vit(), per="row")

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.qkv = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2).unflatten(1, (2, -1)).flatten(0, 1)
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)[:, 0]

    with pytest.raises(ValueError, match=rf"{name}: .* 8 rows for 4 images \(attention within windows sees no whole"):
        make(nn.Sequential(Windows())).plan(batch(4, 8, 8, 4))


@compiling.supported
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where the graph breaks
@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks", "before the policy"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_compiled_model_is_read_as_it_was_written(name: str, how: str) -> None:
    """Compiled code need not know of hooks: the forward for the attention goes around it."""
    model, given = tiny_vit(), None
    x = batch(4, 8, 8, 4)
    torch._dynamo.reset()
    if how == "blocks":
        model.stage3.blocks[0].compile(backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        given = torch.compile(model, backend="eager")
    model = model if given is None else given
    if how == "before the policy":
        model(x)
    policy = POLICIES[name](model)
    for seed in (2, 3):
        mixed, target = policy(x, Y[:4], generator=rng(seed))
        with torch.no_grad():
            logits = model(mixed)
        want, wanted = POLICIES[name](tiny_vit())(x, Y[:4], generator=rng(seed))
        assert torch.equal(mixed, want)
        assert torch.equal(target.weights, wanted.weights)
        policy.relabel(logits, target)
        loss = policy.loss(SoftCrossEntropyLoss())
        assert loss is None or bool(loss.isfinite())
    torch._dynamo.reset()


@compiling.supported
def test_compiled_parts_that_do_not_run_hooks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)  # as before torch 2.6
    model = tiny_vit()
    model.compile(backend="eager")
    torch._dynamo.reset()
    with pytest.raises(
        RuntimeError, match="TokenMix: the TinyViT holds compiled code that does not run hooks; compile"
    ):
        TokenMix(model).plan(batch(4, 8, 8, 4))
    torch._dynamo.reset()
    compiled = torch.compile(tiny_vit(), backend="eager")
    assert len(TokenMix(compiled).plan(batch(4, 8, 8, 4))) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_mergemix_is_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model, x = tiny_vit(), batch(4, 8, 8, 4)
    policy = MergeMix(model)
    policy(x, Y[:4], generator=rng(1))
    want = policy.loss(SoftCrossEntropyLoss())
    policy = MergeMix(model.to(dtype))
    policy(x, Y[:4], generator=rng(1))
    got = policy.loss(SoftCrossEntropyLoss())
    assert got is not None
    assert torch.allclose(got.float(), want, rtol=0.05)
    got.backward()
    assert all(p.grad.dtype == dtype for p in model.parameters() if p.grad is not None)
