"""TransMix, MixPro, TLAlign: labels by attention, against loops on an attention that is given."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hardmix.losses import DecoupledMixupLoss
from hardmix.mixing.attention_policy import LabelPolicy
from hardmix.mixing.draw import draw_lam, draw_partner
from hardmix.mixing.label_attention import MixPro, TLAlign, TransMix
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.static import CutMix
from hardmix.mixing.target import MixedTarget
from mixing.cases import Wrapper, blend_by_hand, constant_rows, own_share, rng
from mixing.vits import GivenViT, given_attention, tiny_vit

POLICIES: dict[str, Callable[..., LabelPolicy]] = {"transmix": TransMix, "mixpro": MixPro, "tl-align": TLAlign}
#: rows, columns and patch of the grids that are tried
GRIDS = [(8, 8, 4), (3, 5, 4), (1, 4, 2)]
Y = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def given_vit(images: int, rows: int, columns: int, patch: int, blocks: int = 3, first: int = 1) -> GivenViT:
    return GivenViT([given_attention(images, 2, first + rows * columns, seed) for seed in range(blocks)], patch)


def batch(images: int, rows: int, columns: int, patch: int, border: int = 0) -> Tensor:
    return torch.randn(images, 3, rows * patch + border, columns * patch + border, generator=rng(5))


def train(policy: LabelPolicy, model: nn.Module, x: Tensor, seed: int = 0) -> tuple[MixPlan, MixedTarget, Tensor]:
    """(plan, relabelled target, logits) of one step."""
    y = Y[: len(x)]
    mixed, target = policy(x, y, generator=rng(seed))
    logits = model(mixed)
    plan = policy.plan(x, y, generator=rng(seed))
    assert torch.equal(mixed, plan.blend(x))
    assert torch.equal(target.weights[:, 0], plan.lam)
    after = policy.relabel(logits, target)
    assert torch.equal(after.labels, target.labels)
    return plan, after, logits


def slow_own(plan: MixPlan, n: int, rows: int, columns: int, patch: int) -> list[float]:
    """The own share of each patch, pixel by pixel."""
    mask = plan.mask
    assert mask is not None
    out = []
    for r in range(rows):
        for c in range(columns):
            pixels = [float(mask[n, 0, r * patch + i, c * patch + j]) for i in range(patch) for j in range(patch)]
            out.append(sum(pixels) / len(pixels))
    return out


def slow_mass(attention: Tensor, plan: MixPlan, n: int, rows: int, columns: int, patch: int, first: int = 1) -> float:
    """The part of the class token's attention that falls on the own sample."""
    own = slow_own(plan, n, rows, columns, patch)
    given = [sum(float(head[0, first + j]) for head in attention[n]) for j in range(rows * columns)]
    return sum(a * m for a, m in zip(given, own, strict=True)) / sum(given)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("border", [0, 1])
@pytest.mark.parametrize("attention", [0.5, 1.0, 0.0])
def test_transmix_against_loops(grid: tuple[int, int, int], border: int, attention: float) -> None:
    model = given_vit(7, *grid)
    policy = TransMix(model, attention=attention)
    for seed in range(3):
        plan, target, _ = train(policy, model, batch(7, *grid, border), seed)
        for n in range(7):
            mass = slow_mass(model.blocks[-1].scores.exp().double(), plan, n, *grid)
            want = (1 - attention) * float(plan.lam[n]) + attention * mass
            assert float(target.weights[n, 0]) == pytest.approx(want, abs=1e-5)
            assert float(target.weights[n].sum()) == pytest.approx(1.0, abs=1e-6)


def test_transmix_mixes_as_cutmix() -> None:
    model = tiny_vit()
    x = batch(7, 8, 8, 4)
    for per in ("batch", "pair", "sample"):
        got = TransMix(model, alpha=0.7, per=per).plan(x, generator=rng(2))
        want = CutMix(alpha=0.7, per=per).plan(x, generator=rng(2))
        assert torch.equal(got.box, want.box)
        assert torch.equal(got.lam, want.lam)
        assert torch.equal(got.partner, want.partner)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_mixpro_against_loops(grid: tuple[int, int, int], smoothing: float) -> None:
    model = given_vit(7, *grid)
    policy = MixPro(model, smoothing=smoothing)
    plan, target, logits = train(policy, model, batch(7, *grid))
    for n in range(7):
        area, mass = float(plan.lam[n]), slow_mass(model.blocks[-1].scores.exp().double(), plan, n, *grid)
        z = logits[n].tolist()
        probs = [math.exp(value) / sum(map(math.exp, z)) for value in z]
        wanted = [smoothing / 5] * 5
        wanted[int(Y[n])] += (1 - smoothing) * area
        wanted[int(Y[plan.partner[n]])] += (1 - smoothing) * (1 - area)
        dot = sum(a * b for a, b in zip(wanted, probs, strict=True))
        cosine = dot / math.hypot(*wanted) / math.hypot(*probs)
        assert float(target.weights[n, 0]) == pytest.approx(cosine * mass + (1 - cosine) * area, abs=1e-5)


@pytest.mark.parametrize(
    ("grid", "cells", "side"),
    [
        ((8, 8, 4), 4, 2),
        ((14, 14, 16), 4, 4),
        ((16, 16, 14), 4, 4),
        ((6, 9, 2), 2, 3),
        ((3, 5, 4), 4, 1),
        ((8, 8, 4), 1, 8),
    ],
)
def test_mixpro_keeps_whole_cells(grid: tuple[int, int, int], cells: int, side: int) -> None:
    rows, columns, patch = grid
    policy = MixPro(GivenViT([given_attention(1, 1, 1 + rows * columns)], patch), cells=cells)
    x = torch.rand(5, 3, rows * patch, columns * patch, generator=rng())
    number = -(-rows // side) * -(-columns // side)
    kept = set()
    for seed in range(20):
        plan = policy.plan(x, generator=rng(seed))
        mask = plan.mask
        generator = rng(seed)
        lam = draw_lam(1.0, draw_partner(5, "shift", generator), "sample", generator)  # the first two draws
        for n in range(5):
            of_cells = []
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    cell = mask[n, 0, top * patch : (top + side) * patch, left * patch : (left + side) * patch]
                    assert float(cell.min()) == float(cell.max())
                    of_cells.append(float(cell.min()))
            assert sum(of_cells) == math.ceil(float(lam[n]) * number)
            kept.update(i for i, value in enumerate(of_cells) if value)
        assert torch.allclose(plan.lam, own_share(mask))
    assert kept == set(range(number))  # every cell is kept at times


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("first", [1, 0, 2])
def test_tl_align_against_loops(grid: tuple[int, int, int], first: int) -> None:
    rows, columns, _ = grid
    model = given_vit(7, *grid, first=first)
    plan, target, _ = train(TLAlign(model), model, batch(7, *grid))
    tokens = first + rows * columns
    for n in range(7):
        labels = [float(plan.lam[n])] * first + slow_own(plan, n, *grid)
        assert set(labels[first:]) <= {0.0, 1.0}  # boxes of whole patches
        for block in model.blocks:
            weights = block.scores[n].exp().double().mean(0)
            labels = [
                0.5 * (sum(float(weights[i, j]) * labels[j] for j in range(tokens)) + labels[i]) for i in range(tokens)
            ]
        want = labels[0] if first else sum(labels) / tokens
        assert float(target.weights[n, 0]) == pytest.approx(want, abs=1e-5)


def test_tl_align_reaches_every_patch() -> None:
    model = given_vit(6, 3, 5, 4)
    x, seen = batch(6, 3, 5, 4), torch.zeros(3, 5)
    for seed in range(40):
        box = TLAlign(model).plan(x, generator=rng(seed)).box
        assert bool((box % 4 == 0).all())
        for row, column in box // 4:
            seen[row[0] : row[1], column[0] : column[1]] += 1
    assert bool((seen > 0).all())


@pytest.mark.parametrize("name", POLICIES)
def test_on_the_tiny_vit_by_its_own_attention(name: str) -> None:
    """The same numbers as from `forward_with_attention` of the mixed batch."""
    model = tiny_vit()
    plan, target, logits = train(POLICIES[name](model), model, batch(7, 8, 8, 4), 3)
    mixed = plan.blend(batch(7, 8, 8, 4))
    again, attentions = model.forward_with_attention(mixed)
    assert torch.allclose(again, logits, atol=1e-5)
    given = GivenViT([attention.detach() for attention in attentions], 4)
    given.head = nn.Identity()
    policy = POLICIES[name](given)
    x, y = batch(7, 8, 8, 4), Y
    mixed, before = policy(x, y, generator=rng(3))
    given(mixed)
    assert torch.allclose(policy.relabel(logits, before).weights, target.weights, atol=1e-5)
    assert (target.weights - before.weights).abs().max() > 1e-3


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
def test_pixels_and_area_agree(name: str, per: str) -> None:
    policy = POLICIES[name](tiny_vit(), per=per)
    for shape in ((3, 32, 32), (3, 12, 20), (3, 35, 33)):
        for n in (1, 2, 7):
            values = 2.0 ** -torch.arange(n, dtype=torch.float64)
            x = constant_rows(values, shape)
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
                    assert torch.equal(plan.mask, plan.mask[plan.partner])
            assert torch.equal(x, before)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """The policy mixes; what the model is run on is the loop's affair."""
    model = tiny_vit()
    x = (torch.rand(5, 3, 32, 32, generator=rng()) * 255).to(dtype)
    policy = POLICIES[name](model)
    mixed, target = policy(x, Y[:5], generator=rng(1))
    assert mixed.dtype == dtype
    logits = model(mixed.float() / 255)
    after = policy.relabel(logits, target)
    assert after.weights.dtype == torch.float32
    assert bool(((after.weights >= 0) & (after.weights <= 1)).all())
    assert (mixed.double() - torch.from_numpy(blend_by_hand(x, policy.plan(x, generator=rng(1))))).abs().max() < 0.51


@pytest.mark.parametrize("name", POLICIES)
def test_a_flat_attention_is_the_area(name: str) -> None:
    model = GivenViT([torch.full((1, 2, 65, 65), 1 / 65.0)] * 2, 4)
    _, target, _ = train(POLICIES[name](model), model, batch(7, 8, 8, 4))
    policy = POLICIES[name](model)
    assert torch.allclose(target.weights[:, 0], policy.plan(batch(7, 8, 8, 4), generator=rng(0)).lam, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_nan_attention_shows(name: str) -> None:
    model = given_vit(3, 8, 8, 4)
    model.blocks[-1].scores[1] = torch.nan
    _, target, _ = train(POLICIES[name](model), model, batch(3, 8, 8, 4))
    assert torch.equal(target.weights.isnan().all(1), torch.tensor([False, True, False]))


@pytest.mark.parametrize("name", POLICIES)
def test_n_is_one_and_one_class(name: str) -> None:
    model = tiny_vit()
    plan, target, _ = train(POLICIES[name](model), model, batch(1, 8, 8, 4))
    assert plan.partner.tolist() == [0]
    assert target.labels.tolist() == [[0, 0]]
    policy = POLICIES[name](model)
    mixed, target = policy(batch(4, 8, 8, 4), torch.ones(4, dtype=torch.long), generator=rng())
    dense = policy.relabel(model(mixed), target).dense(5)
    assert torch.allclose(dense, torch.eye(5)[1].expand(4, 5))


@pytest.mark.parametrize("name", POLICIES)
def test_a_training_loop(name: str) -> None:
    """Gradients are those of the relabelled loss, and nothing flows through the shares."""
    model, twin = tiny_vit(), tiny_vit()
    policy = POLICIES[name](model)
    x, criterion = batch(7, 8, 8, 4), DecoupledMixupLoss(eta=0.1)
    for seed in range(2):
        mixed, target = policy(x, Y, generator=rng(seed))
        logits = model(mixed)
        target = policy.relabel(logits, target)
        assert not target.weights.requires_grad
        assert policy.loss(criterion) is None
        criterion(logits, target).backward()
        criterion(twin(mixed), target).backward()
        policy.after_step()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("name", POLICIES)
def test_determinism_and_autocast(name: str) -> None:
    results = []
    for low in (False, False, True):
        model = tiny_vit()
        policy = POLICIES[name](model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            mixed, target = policy(batch(7, 8, 8, 4), Y, generator=rng(9))
            results.append((mixed, policy.relabel(model(mixed), target).weights))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[2][0])
    assert results[2][1].dtype == torch.float32
    assert (results[0][1] - results[2][1]).abs().max() < 0.05


@pytest.mark.parametrize("name", POLICIES)
def test_each_draw_is_trained_with_once(name: str) -> None:
    who = {"transmix": "TransMix", "mixpro": "MixPro", "tl-align": "TLAlign"}[name]
    model = tiny_vit()
    policy = POLICIES[name](model)
    x, y = batch(4, 8, 8, 4), Y[:4]
    target = MixedTarget(torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), 0.5))
    logits = torch.zeros(4, 5)
    with pytest.raises(RuntimeError, match=f"{who}: relabel has no draw to relabel; call the policy on a batch first"):
        policy.relabel(logits, target)
    mixed, target = policy(x, y)
    model.eval()(mixed)
    with pytest.raises(
        RuntimeError, match=f"{who}: relabel has no attention; run the model once, in training mode, be"
    ):
        policy.relabel(logits, target)
    with pytest.raises(RuntimeError, match=rf"{who}: the draw before was not trained with; .* or call disarm\(\)"):
        policy(x, y)
    policy.disarm()
    model.train()
    mixed, target = policy(x, y)
    model(mixed)
    with pytest.raises(
        ValueError, match=rf"{who}: target.weights has shape \(3, 2\) but the draw has 4 rows; pass the"
    ):
        policy.relabel(logits, MixedTarget(target.labels[:3], target.weights[:3]))
    policy.disarm()
    assert not policy.tap.armed
    policy.plan(x)  # a plan alone arms nothing
    assert not policy.tap.armed
    mixed, target = policy(x, y)
    model(mixed)
    policy.relabel(logits, target)
    policy(x, y)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_refused(name: str) -> None:
    who = {"transmix": "TransMix", "mixpro": "MixPro", "tl-align": "TLAlign"}[name]
    make = POLICIES[name]
    with pytest.raises(ValueError, match=f"{who}: the Linear has no attention that could be found"):
        make(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=rf"{who}: model is a int; pass a torch\.nn\.Module"):
        make(3)
    with pytest.raises(ValueError, match=f"{who}: alpha is 0; pass a finite number greater than 0"):
        make(tiny_vit(), alpha=0)
    with pytest.raises(ValueError, match=f"{who}: patch is -1; pass an integer of at least 1"):
        make(tiny_vit(), patch=-1)
    policy = make(tiny_vit())
    for shape in ((4, 3, 32), (4, 3, 8, 8, 8), (4, 7)):
        with pytest.raises(ValueError, match=rf"{who}: x has shape .*; pass a batch with 4 axes"):
            policy(torch.rand(shape), Y[:4])
    with pytest.raises(
        ValueError, match=rf"{who}: y has shape \(2, 32, 32\), a dense mask, but attention weighs whole"
    ):
        policy(torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long))
    assert not policy.tap.armed
    x = torch.rand(2, 3, 32, 32)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{who}: x holds NaN or infinity in rows 1"):
        policy(x, Y[:2])


def test_more_refusals() -> None:
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"TransMix: attention is 1\.5; pass a number from 0 to 1"):
        TransMix(model, attention=1.5)
    with pytest.raises(ValueError, match="MixPro: cells is 0; pass an integer of at least 1"):
        MixPro(model, cells=0)
    with pytest.raises(ValueError, match=r"MixPro: smoothing is -0\.1; pass a number from 0 to 1"):
        MixPro(model, smoothing=-0.1)
    stemless = GivenViT([given_attention(1, 1, 17)], 4)
    stemless.patches = nn.Identity()
    for make in (MixPro, TLAlign):
        with pytest.raises(
            ValueError, match=r"the patches of a 16 x 16 image can't be told; pass patch, the side of a"
        ):
            make(stemless).plan(torch.rand(2, 3, 16, 16))
        assert make(stemless, patch=4).plan(torch.rand(2, 3, 16, 16)).lam.shape == (2,)
    shrinking = GivenViT([given_attention(2, 1, 17), given_attention(2, 1, 17)], 4)
    policy = TLAlign(shrinking)
    last = shrinking.blocks[1]
    last.scores = given_attention(2, 1, 16).log()
    last.forward = lambda x: (last.scores.softmax(-1) @ x[:, None, 1:])[:, 0].mean(1, True)
    mixed, _ = policy(torch.rand(2, 3, 16, 16), Y[:2])
    with pytest.raises(ValueError, match="TLAlign: a block attends from 16 tokens to 16 where there were 17 before"):
        shrinking(mixed)


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_does_not_hold_the_model_as_a_part(name: str) -> None:
    model = tiny_vit()
    policy = POLICIES[name](model)
    assert policy.state_dict() == {}
    assert list(policy.parameters()) == []
    assert list(policy.children()) == []
    assert type(policy).__name__ in repr(policy)
    policy(batch(4, 8, 8, 4), Y[:4])
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        with pytest.raises(RuntimeError, match=r"this is a copy without its model; call attach\(model\) first"):
            twin(batch(4, 8, 8, 4), Y[:4])
        other = tiny_vit(1)
        twin.attach(other)
        train(twin, other, batch(4, 8, 8, 4))
    assert "cells=2" in repr(MixPro(model, cells=2))
    assert "attention=0.25" in repr(TransMix(model, attention=0.25))


def test_wrapped_models_are_read() -> None:
    model = tiny_vit()
    _, target, _ = train(TransMix(model), Wrapper(model), batch(4, 8, 8, 4))
    _, want, _ = train(TransMix(model), model, batch(4, 8, 8, 4))
    assert torch.equal(target.weights, want.weights)
