"""SuperMix: its steps against loops in float64, when they end, and what comes out."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hardmix.losses import DecoupledMixupLoss, SoftCrossEntropyLoss
from hardmix.mixing import MixedTarget, RandomChoice
from hardmix.mixing.supermix import SuperMix, mask_shares, newton_step
from mixing.cases import ConvNet, rng

CLASSES = 5


class Blind(nn.Module):
    """Sees nothing, and prefers the first class."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * x.square().sum((1, 2, 3))[:, None] - torch.arange(CLASSES, device=x.device, dtype=x.dtype)


class Stripes(nn.Module):
    """The mean brightness of C horizontal stripes, each the logit of a class."""

    def __init__(self, scale: float = 20.0, classes: int = CLASSES) -> None:
        super().__init__()
        self.scale, self.classes = scale, classes
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        return self.scale * nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), (self.classes, 1)).flatten(1)


def net(channels: int = 3) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(channels)


def images(n: int, size: tuple[int, int] = (16, 16), channels: int = 3, seed: int = 0) -> Tensor:
    """Noise with a bright stripe of its class."""
    x = 0.6 * torch.rand(n, channels, *size, generator=rng(seed))
    for i in range(n):
        at = i % CLASSES
        x[i, :, at * size[0] // CLASSES : (at + 1) * size[0] // CLASSES] += 0.7
    return x


def labels(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


# A step


def shares_by_hand(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One row: cells (K, h, w) -> (K, H, W)."""
    sources, height, width = cells.shape
    raw = np.empty((sources, *size))
    for k, i, j in itertools.product(range(sources), range(size[0]), range(size[1])):
        y = min(max((i + 0.5) * height / size[0] - 0.5, 0.0), height - 1.0)
        x = min(max((j + 0.5) * width / size[1] - 0.5, 0.0), width - 1.0)
        top, left = int(y), int(x)
        below, right = min(top + 1, height - 1), min(left + 1, width - 1)
        fy, fx = y - top, x - left
        upper = (1 - fx) * cells[k, top, left] + fx * cells[k, top, right]
        lower = (1 - fx) * cells[k, below, left] + fx * cells[k, below, right]
        raw[k, i, j] = 1.0 / (1.0 + math.exp(-((1 - fy) * upper + fy * lower)))
    return raw / raw.sum(0)


def loss_by_hand(model: nn.Module, sources: np.ndarray, masks: np.ndarray, wanted: np.ndarray, price: float) -> float:
    mixed = sum(masks[k] * sources[k] for k in range(len(masks)))  # (C, H, W)
    logits = model(torch.as_tensor(mixed)[None])[0].detach().numpy()
    log_sum = math.log(sum(math.exp(v) for v in logits))
    divergence = sum(t * (math.log(t) - (v - log_sum)) for t, v in zip(wanted, logits, strict=True) if t > 0)
    return divergence + price * sum(v * (1 - v) for v in masks.ravel()) / masks.size


def smoothed_by_hand(gradient: np.ndarray, sigma: float) -> np.ndarray:
    if sigma == 0:
        return gradient
    norm = sum(math.exp(-0.5 * (d / sigma) ** 2) for d in range(-60, 61)) ** 2
    out = np.zeros_like(gradient)
    for k, i, j in np.ndindex(*gradient.shape):
        for a, b in np.ndindex(*gradient.shape[1:]):
            out[k, i, j] += math.exp(-0.5 * ((i - a) ** 2 + (j - b) ** 2) / sigma**2) / norm * gradient[k, a, b]
    return out


def step_by_hand(loss: float, gradient: np.ndarray, sigma: float) -> np.ndarray:
    smooth = smoothed_by_hand(gradient, sigma)
    factor = abs(loss) / (float((gradient * smooth).sum()) + 1e-10)
    return -min(max(factor, 1e-4), 2000.0) * smooth


def search_by_hand(
    policy: SuperMix, model: nn.Module, x: Tensor, partner: Tensor, drawn: Tensor
) -> tuple[list[np.ndarray], list[bool], list[int]]:
    """Masks, who is recognised, steps: one row after the other, gradients by differences."""
    size = (x.shape[2], x.shape[3])
    grid = tuple(min(policy.resolution, side) for side in size)
    classes = [int(model(image[None]).argmax()) for image in x]
    out, recognised, steps = [], [], []
    for i in range(len(x)):
        sources = x[partner[i]].numpy()
        wanted = np.zeros(CLASSES)
        for k, row in enumerate(partner[i].tolist()):
            wanted[classes[row]] += float(drawn[i, k])
        present = {classes[row] for row in partner[i].tolist()}
        cells = np.zeros((policy.sources, *grid))

        def loss(cells: np.ndarray, sources: np.ndarray = sources, wanted: np.ndarray = wanted) -> float:
            return loss_by_hand(model, sources, shares_by_hand(cells, size), wanted, policy.sparsity)

        seen, taken = False, 0
        while not seen and taken < policy.steps:
            gradient = np.empty_like(cells)
            for at in np.ndindex(*cells.shape):
                up, down = cells.copy(), cells.copy()
                up[at] += 1e-5
                down[at] -= 1e-5
                gradient[at] = (loss(up) - loss(down)) / 2e-5
            cells = cells + step_by_hand(loss(cells), gradient, policy.sigma)
            taken += 1
            mixed = (shares_by_hand(cells, size)[:, None] * sources).sum(0)
            order = np.argsort(-model(torch.as_tensor(mixed)[None])[0].detach().numpy())
            seen = {int(c) for c in order[: len(present)]} == present
        out.append(shares_by_hand(cells, size))
        recognised.append(seen)
        steps.append(taken)
    return out, recognised, steps


@pytest.mark.parametrize(
    ("n", "size", "options"),
    [
        (4, (10, 10), {"resolution": 3, "steps": 3}),
        (7, (10, 6), {"resolution": 4, "steps": 4, "sigma": 0.0, "sparsity": 2.0}),
        (4, (11, 7), {"resolution": 3, "steps": 3, "sources": 3, "sigma": 0.7}),
        (3, (5, 2), {"resolution": 8, "steps": 2, "sigma": 2.0}),
    ],
    ids=str,
)
def test_search_against_loops(n: int, size: tuple[int, int], options: dict[str, float]) -> None:
    model = Stripes()
    x = images(n, size).double()
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    model.weight = weight  # a model of float64
    policy = SuperMix(model, unrecognised="mixed", **options)
    found = policy.search(x, generator=rng(1))
    masks, recognised, steps = search_by_hand(policy, model, x, found.mixture.partner, found.drawn)
    assert found.steps.tolist() == steps
    assert found.recognised.tolist() == recognised
    assert torch.allclose(found.mixture.masks.double(), torch.as_tensor(np.stack(masks)), atol=2e-5)


def test_the_cases_against_loops_tell_rows_apart() -> None:
    """They would mean little if all rows were done at once, or none."""
    found = SuperMix(Stripes(), steps=8).search(images(23), generator=rng(1))
    assert len(set(found.steps.tolist())) > 3
    assert 0.2 < float(found.recognised.double().mean()) <= 1.0


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)], ids=str)
def test_newton_step_against_loops(sigma: float, size: tuple[int, int]) -> None:
    gradient = torch.randn(4, 2, *size, generator=rng(), dtype=torch.float64)
    gradient[1] *= 1e-6  # the longest step
    gradient[2] *= 1e6  # the shortest
    gradient[3] = 0.0
    loss = torch.tensor([3.0, 2.0, -1.0, 2.0], dtype=torch.float64)
    got = newton_step(loss, gradient, sigma)
    for i in range(4):
        want = step_by_hand(float(loss[i]), gradient[i].numpy(), sigma)
        assert np.allclose(got[i].numpy(), want, rtol=1e-10, atol=1e-12)
    assert float((gradient * got).sum((1, 2, 3)).max()) <= 0.0  # downhill
    linear = loss[0] + (gradient[0] * got[0]).sum()
    assert abs(float(linear)) < 1e-8
    gradient[0, 0, 0, 0] = math.nan
    loss[1] = math.inf
    spoilt = newton_step(loss, gradient, sigma)
    assert torch.equal(spoilt[0], torch.zeros_like(spoilt[0]))
    assert bool(spoilt.isfinite().all())


@pytest.mark.parametrize("size", [(8, 8), (17, 5), (3, 9)], ids=str)
def test_mask_shares(size: tuple[int, int]) -> None:
    cells = 3.0 * torch.randn(2, 3, 3, 5, generator=rng(), dtype=torch.float64)
    got = mask_shares(cells, size)
    for i in range(2):
        assert np.allclose(got[i].numpy(), shares_by_hand(cells[i].numpy(), size), atol=1e-12)
    assert torch.allclose(got.sum(1), torch.ones(2, *size, dtype=torch.float64))
    assert torch.equal(mask_shares(torch.zeros(1, 2, 4, 4), size), torch.full((1, 2, *size), 0.5))


# When the steps end


def test_rows_that_are_done_are_asked_about_no_more() -> None:
    model = Stripes()
    n = 23
    found = SuperMix(model, steps=30).search(images(n), generator=rng(1))
    assert model.asked[0] == n  # the clean images
    sizes, left = model.asked[1:], n
    longest = int(found.steps.max())
    assert len(sizes) == longest + 1
    for step, size in enumerate(sizes):
        left = int((found.steps > step - 1).sum()) if step else n
        halves = [n]
        while (halves[-1] + 1) // 2 < halves[-1]:
            halves.append((halves[-1] + 1) // 2)
        assert size in halves
        assert size >= left
        assert step == 0 or size == min(half for half in halves if half >= left)


def test_every_row_is_what_it_would_be_alone() -> None:
    """Neither who else is asked with a row nor which rows have left changes its masks."""
    x, policy = images(11), SuperMix(net().eval(), steps=12, unrecognised="mixed")
    found = policy.search(x, generator=rng(3))
    first = policy.search(x, generator=rng(3)).mixture
    assert torch.equal(found.mixture.masks, first.masks)
    other = SuperMix(net().train(), steps=12, unrecognised="mixed").search(x, generator=rng(3)).mixture
    assert torch.equal(other.masks, first.masks)  # running statistics in training, too
    partner = found.mixture.partner
    for i in (0, 5):
        pair = x[partner[i]]
        fixed = SuperMix(net(), steps=12, unrecognised="mixed")
        fixed._draw_rows = lambda rows, generator, i=i: (  # type: ignore[method-assign]
            torch.tensor([[0, 1], [1, 0]]),
            torch.stack([found.drawn[i], found.drawn[i].flip(0)]),
        )
        alone = fixed.search(pair)
        assert int(alone.steps[0]) == int(found.steps[i])
        assert torch.allclose(alone.mixture.masks[0], found.mixture.masks[i], atol=1e-4)


def test_tolerance_and_steps_end_the_search() -> None:
    x = images(23)
    loose, strict = Stripes(), Stripes()
    some = SuperMix(loose, steps=30, tolerance=0.5).search(x, generator=rng(1))
    all_steps = SuperMix(strict, steps=30).search(x, generator=rng(1))
    assert len(loose.asked) < len(strict.asked)
    assert int((~some.recognised).sum()) <= 11
    assert int(some.recognised.sum()) < int(all_steps.recognised.sum())
    done = some.recognised
    assert torch.equal(some.mixture.masks[done], all_steps.mixture.masks[done])
    once = SuperMix(loose, tolerance=1.0).search(x, generator=rng(1))
    assert set(once.steps.tolist()) == {1}
    assert set(SuperMix(loose, steps=1).search(x, generator=rng(1)).steps.tolist()) == {1}


def test_the_model_sees_what_it_was_to_see() -> None:
    """All recognised mixtures, asked once more, show the classes of their sources first; and the loss has fallen."""
    model, x = Stripes(), images(23)
    for sources in (2, 3):
        policy = SuperMix(model, sources=sources)
        found = policy.search(x, generator=rng(2))
        mixture, done = found.mixture, found.recognised
        assert float(done.double().mean()) > 0.5
        classes = model(x).argmax(1)[mixture.partner]
        order = model(mixture.blend(x)).argsort(1, descending=True)
        for i in done.nonzero()[:, 0].tolist():
            wanted = set(classes[i].tolist())
            assert set(order[i, : len(wanted)].tolist()) == wanted
        flat = (mixture.masks * (1 - mixture.masks)).mean((1, 2, 3))
        assert float(flat[done].mean()) < (1 - 1 / sources) / sources  # where the masks start


def test_given_classes() -> None:
    x, y = images(12), labels(12)
    model = Stripes()
    predicted = SuperMix(model, steps=6).search(x, generator=rng(1))
    assert torch.equal(model(x).argmax(1), y)
    model.asked.clear()
    given = SuperMix(model, steps=6, classes="given").search(x, y, generator=rng(1))
    assert model.asked[0] == 1  # how many classes there are
    for y_like in (y.to(torch.uint8), nn.functional.one_hot(y, CLASSES).float(), 0.1 + nn.functional.one_hot(y, 5)):
        again = SuperMix(model, steps=6, classes="given").search(x, y_like, generator=rng(1))
        if float(y_like.min()) == 0:
            assert torch.equal(again.mixture.masks, given.mixture.masks)
    assert torch.equal(given.mixture.masks, predicted.mixture.masks)
    wrong = SuperMix(model, steps=6, classes="given").search(x, (y + 1) % CLASSES, generator=rng(1))
    assert int(wrong.recognised.sum()) < int(given.recognised.sum())
    several = SuperMix(model, steps=6, classes="given").search(x, torch.ones(12, CLASSES), generator=rng(1))
    assert bool(several.recognised.all())  # of all classes none is missing


def test_unrecognised_rows_stay_clean_or_mixed() -> None:
    x, y = images(23), labels(23)
    clean = SuperMix(Stripes(), steps=2)
    mixed = SuperMix(Stripes(), steps=2, unrecognised="mixed")
    found, other = clean.search(x, generator=rng(1)), mixed.search(x, generator=rng(1))
    lost = ~found.recognised
    assert 3 < int(lost.sum()) < 20
    assert torch.equal(found.recognised, other.recognised)
    out, target = clean(x, y, generator=rng(1))
    assert torch.equal(out[lost], x[lost])
    assert torch.equal(target.weights[lost], torch.tensor([[1.0, 0.0]]).expand(int(lost.sum()), 2))
    assert torch.equal(target.labels[lost], y[lost, None].expand(-1, 2))
    logits = torch.randn(23, CLASSES, generator=rng(3))
    loss = DecoupledMixupLoss(eta=1.0, reduction="none")
    assert torch.allclose(loss(logits, target)[lost], loss(logits, y)[lost])  # no class is pulled up that isn't there
    kept, of_kept = mixed(x, y, generator=rng(1))
    assert torch.equal(out[~lost], kept[~lost])
    assert float((kept[lost] - x[lost]).abs().amax((1, 2, 3)).max()) > 0.5
    assert float(of_kept.weights[lost].amax(1).min()) < 1.0
    drawn = SuperMix(Stripes(), steps=2, label="drawn").search(x, generator=rng(1))
    assert torch.equal(drawn.mixture.share[~lost], drawn.drawn[~lost])
    assert torch.equal(drawn.mixture.share[lost], target.weights[lost])
    assert torch.equal(drawn.mixture.masks, found.mixture.masks)


# The policy


@pytest.mark.parametrize("sources", [2, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (3, 1)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_constant_images_show_the_weights(n: int, size: tuple[int, int], sources: int) -> None:
    """What each row shows of each input, measured in the pixels: one hot image for each input."""
    x = torch.eye(n)[:, :, None, None].expand(n, n, *size).contiguous()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(n * math.prod(size), CLASSES))
    policy = SuperMix(model, sources=sources, steps=4, unrecognised="mixed", resolution=4)
    before = x.clone()
    mixed, target = policy(x, torch.arange(n), generator=rng(3))
    mixture = policy.search(x, generator=rng(3)).mixture
    assert torch.equal(x, before)
    assert target.labels.shape == target.weights.shape == (n, sources)
    assert torch.equal(target.labels, mixture.partner)
    assert torch.equal(target.weights, mixture.share)
    assert torch.allclose(target.dense(n), mixed.mean((2, 3)), atol=1e-6)
    assert torch.allclose(target.weights, mixture.masks.mean((2, 3)), atol=1e-6)
    assert (target.weights.sum(1) - 1).abs().max() <= 1e-6
    assert torch.equal(mixture.partner[:, 0], torch.arange(n))  # the own sample comes first
    for column in mixture.partner.T:
        assert torch.equal(column.sort().values, torch.arange(n))
    if n >= sources:
        assert all(len(set(row)) == sources for row in mixture.partner.tolist())
    for i in range(n):
        by_hand = sum(mixture.masks[i, k].double() * x[mixture.partner[i, k]].double() for k in range(sources))
        assert float((mixed[i].double() - by_hand).abs().max()) < 1e-6


def test_proportions_are_a_dirichlet() -> None:
    policy = SuperMix(Blind(), sources=3, alpha=0.7)
    drawn = policy._draw_rows(60_000, rng())[1]
    assert torch.allclose(drawn.sum(1), torch.ones(60_000), atol=1e-6)
    expected = np.random.default_rng(0).dirichlet([0.7] * 3, 60_000)
    for k in range(3):
        for q in (0.1, 0.5, 0.9):
            got = np.quantile(drawn[:, k].numpy(), q)
            assert got == pytest.approx(np.quantile(expected[:, k], q), abs=0.01)
    for alpha in (1e-4, 1e4):
        tiny = SuperMix(Blind(), sources=4, alpha=alpha)._draw_rows(500, rng())[1]
        assert bool((tiny.isfinite() & (tiny >= 0)).all())
        assert torch.allclose(tiny.sum(1), torch.ones(500), atol=1e-6)


def test_same_generator_same_batch_and_targets_that_losses_take() -> None:
    x, y, policy = images(8), labels(8), SuperMix(net(), steps=5, sources=3)
    mixed, target = policy(x, y, generator=rng(1))
    again, same = policy(x, y, generator=rng(1))
    assert torch.equal(mixed, again)
    assert torch.equal(target.weights, same.weights)
    assert any(not torch.equal(policy(x, y, generator=rng(seed))[0], mixed) for seed in (2, 3))
    torch.manual_seed(3)
    first = policy(x, y)[0]
    torch.manual_seed(3)
    assert torch.equal(policy(x, y)[0], first)
    assert isinstance(target, MixedTarget)
    logits = torch.randn(8, CLASSES, generator=rng(2), requires_grad=True)
    for criterion in (SoftCrossEntropyLoss(), DecoupledMixupLoss(eta=1.0)):
        assert criterion(logits, target).isfinite()
    soft = torch.rand(8, 7, generator=rng(4)).softmax(1)
    _, of_rows = policy(x, soft, generator=rng(1))  # of other classes than the model's
    assert of_rows.labels.shape == (8, 3, 7)
    assert torch.allclose(of_rows.dense(7).sum(1), torch.ones(8))
    dense = torch.randint(9, (8, 16, 16), generator=rng(5))
    _, of_pixels = policy(x, dense, generator=rng(1))
    assert of_pixels.labels.shape == of_pixels.weights.shape == (8, 3, 16, 16)
    assert torch.equal(of_pixels.weights, policy.search(x, generator=rng(1)).mixture.masks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    x = images(5).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        policy = SuperMix(net(), steps=3, unrecognised="mixed")
        mixed, target = policy(x.contiguous(memory_format=layout), labels(5), generator=rng(1))
        assert mixed.dtype == dtype
        assert mixed.is_contiguous(memory_format=layout)
        assert target.weights.dtype == torch.float32
        mixture = policy.search(x, generator=rng(1)).mixture
        by_hand = (mixture.masks[:, :, None].double() * x.double()[mixture.partner]).sum(1)
        assert float((mixed.double() - by_hand).abs().max()) <= {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(
            dtype, 1e-6
        )


def test_a_model_in_half_type() -> None:
    found = SuperMix(net().to(torch.bfloat16), steps=3).search(images(5), generator=rng(1))
    assert found.mixture.masks.dtype == torch.float32
    assert bool(found.mixture.masks.isfinite().all())


def test_the_model_is_left_as_it_was() -> None:
    model, x, y = net().train(), images(6), labels(6)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.head.bias.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    seed = torch.get_rng_state()
    policy = SuperMix(model, steps=4)
    mixed, target = policy(x, y, generator=rng())
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert not mixed.requires_grad
    assert not target.weights.requires_grad
    assert list(policy.parameters()) == []
    assert policy.state_dict() == {}
    with torch.no_grad():
        assert torch.equal(policy(x, y, generator=rng())[0], mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy(x, y, generator=rng())[0], mixed)
    model.requires_grad_(False)  # a frozen teacher
    assert torch.equal(policy(x, y, generator=rng())[0], mixed)


def test_the_training_forward_casts_its_weights_again(monkeypatch) -> None:
    """As autocast did before torch 2.10: a cast without a graph is handed out again until the cache is cleared."""
    kept: dict[str, Tensor] = {}
    monkeypatch.setattr(torch, "clear_autocast_cache", kept.clear)

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x.double().flatten(1) @ kept.setdefault("weight", self.linear.weight.double()).T

    model = Cached()
    mixed, _ = SuperMix(model, steps=2)(torch.rand(4, 3, 8, 8, generator=rng()), torch.arange(4), generator=rng())
    model(mixed).sum().backward()
    assert model.linear.weight.grad is not None


def test_labels_without_a_class_ask_for_none() -> None:
    model, x = net(), images(4)
    policy = SuperMix(model, steps=3, classes="given")
    with torch.no_grad():
        count = model(x).shape[1]
    rows = torch.zeros(4, count)
    rows[1:] = torch.eye(count)[:3]
    wanted = policy._wanted(x, rows, torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]), torch.full((4, 2), 0.5))[1]
    assert wanted.sum(1).tolist() == [1, 2, 2, 1]


def test_copies_and_pickles() -> None:
    model, x, y = net(), images(5), labels(5)
    policy = SuperMix(model, steps=4)
    want = policy(x, y, generator=rng(1))[0]
    assert copy.deepcopy(policy).asked is model
    twin = pickle.loads(pickle.dumps(policy))
    assert torch.equal(twin(x, y, generator=rng(1))[0], want)
    twin.attach(Blind())
    assert torch.equal(twin.search(x).mixture.masks, torch.full((5, 2, 16, 16), 0.5))


def test_gradients_reach_the_pixels() -> None:
    x = images(4).requires_grad_()
    mixed, _ = SuperMix(net(), steps=3)(x, labels(4), generator=rng())
    mixed.sum().backward()
    assert float(x.grad.sum()) == pytest.approx(x.numel(), rel=1e-5)


def test_edges() -> None:
    x, y = images(4), labels(4)
    model = Stripes()
    alone, target = SuperMix(model, sources=3)(x[:1], y[:1], generator=rng())
    assert torch.equal(alone, x[:1])
    assert target.labels.tolist() == [[0, 0, 0]]
    assert target.weights.tolist() == [[1.0, 0.0, 0.0]]
    assert model.asked == []
    # A model that looks at nothing sees one class everywhere, at once, and moves no mask.
    found = SuperMix(Blind()).search(x, generator=rng())
    assert bool(found.recognised.all())
    assert torch.equal(found.mixture.masks, torch.full((4, 2, 16, 16), 0.5))
    assert torch.equal(found.mixture.share, torch.full((4, 2), 0.5))
    never = SuperMix(Blind(), classes="given", steps=3).search(x, y + 1, generator=rng())
    assert not bool(never.recognised.any())
    assert torch.equal(never.mixture.masks[:, 0], torch.ones(4, 16, 16))
    # Sources of one class ask for this class only.
    same = SuperMix(model, steps=3).search(images(1).expand(4, -1, -1, -1), generator=rng())
    assert same.recognised.tolist() == [True] * 4
    assert same.steps.tolist() == [1] * 4


def test_nan_moves_nothing_and_recognises_nothing() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = x.mean((2, 3))
            return torch.where((x.flatten(1).amax(1) > 1.3)[:, None], torch.nan, logits)

    x = images(6)
    x[::2] += 1.0
    mixed, target = SuperMix(Broken(), steps=3)(x, labels(6), generator=rng(1))
    assert bool(mixed.isfinite().all())
    assert torch.allclose(target.weights.sum(1), torch.ones(6))
    found = SuperMix(Broken(), steps=3, unrecognised="mixed").search(2.0 + x, generator=rng(1))
    assert not bool(found.recognised.any())
    assert torch.equal(found.mixture.masks, torch.full((6, 2, 16, 16), 0.5))


def test_refusals() -> None:
    model, x, y = net(), images(4, (8, 8)), labels(4)
    policy = SuperMix(model, steps=2)
    with pytest.raises(NotImplementedError, match="SuperMix: a plan has one partner but the masks of 2 images are"):
        policy.plan(x, y)
    with pytest.raises(ValueError, match="policies holds SuperMix"):
        RandomChoice([policy, None], per="sample")
    mixed, _ = RandomChoice([policy])(x, y, generator=rng())
    assert mixed.shape == x.shape
    with pytest.raises(TypeError, match=r"SuperMix: model is a str; pass a torch\.nn\.Module\."):
        SuperMix("resnet18")
    with pytest.raises(TypeError, match=r"SuperMix: model is a NoneType; pass a torch\.nn\.Module\."):
        SuperMix(None)
    with pytest.raises(ValueError, match=r"SuperMix: y has 3 entries but x has 4 rows; pass one entry per row\."):
        policy(x, y[:3])
    with pytest.raises(TypeError, match=r"SuperMix: y is a list; pass a torch\.Tensor\."):
        policy(x, [0, 1, 2, 3])
    with pytest.raises(TypeError, match=r"SuperMix: generator is a int; pass a torch\.Generator or None\."):
        policy(x, y, generator=3)
    with pytest.raises(ValueError, match=r"SuperMix: x has shape \(4, 3, 8\); pass a batch with 4 axes"):
        policy(torch.rand(4, 3, 8), y)
    with pytest.raises(TypeError, match=r"SuperMix: x has dtype torch\.uint8, which the model can't be asked with"):
        policy((x * 255).to(torch.uint8), y)
    given = SuperMix(model, classes="given", steps=2)
    with pytest.raises(ValueError, match=r"SuperMix: y is None; pass the labels, whose classes the mixture has"):
        given.search(x)
    with pytest.raises(
        ValueError, match=r"SuperMix: y has shape \(4, 3\) and dtype torch\.float32 but the model tells"
    ):
        given(x, torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"SuperMix: y holds the class 5, but there are 5 classes"):
        given(x, y + 2)
    with pytest.raises(TypeError, match=r"SuperMix: the model returned shape \(4, 8, 8, 8\) for 4 images"):
        SuperMix(model.conv)(x, y)
    with pytest.raises(TypeError, match=r"SuperMix: the model returned shape \(4, 1\) for 4 images; .* two classes"):
        SuperMix(ConvNet(classes=1))(x, y)

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().mean((2, 3))

    with pytest.raises(ValueError, match="SuperMix: the model's output has no gradient"):
        SuperMix(Rounded())(x, y)
    bad = x.clone()
    bad[1, 0, 3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"SuperMix: x holds NaN or infinity in rows 1;"):
        policy(bad, y)
    for settings, text in (
        ({"sources": 1}, r"sources is 1; pass an integer of at least 2\."),
        ({"alpha": 0}, "alpha is 0; pass a finite number greater than 0"),
        ({"steps": 0}, r"steps is 0; pass an integer of at least 1\."),
        ({"resolution": 0}, r"resolution is 0; pass an integer of at least 1\."),
        ({"sigma": -1.0}, r"sigma is -1\.0; pass a finite number of at least 0\."),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"classes": "true"}, "classes is 'true'; pass one of 'predicted', 'given'"),
        ({"unrecognised": "drop"}, "unrecognised is 'drop'; pass one of 'clean', 'mixed'"),
        ({"tolerance": 2.0}, r"tolerance is 2\.0; pass a number from 0 to 1\."),
        ({"label": "masks"}, r'label is \'masks\'; pass one of .* \(did you mean "mask"\?\)'),
    ):
        with pytest.raises(ValueError, match=f"SuperMix: {text}"):
            SuperMix(model, **settings)
    assert "sparsity=25" in repr(policy)
