"""Cuts of grids against every labelling there is, and against maximum flow."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from hardmix.kernels.graph_cut import Cut, grid_cut, grid_cut_exact, grid_energy

Costs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def costs(n: int, labels: int, h: int, w: int, *, amplitude: float = 1.0, seed: int = 0) -> Costs:
    """Random costs and weights in float64; `amplitude` of the costs, weights up to 1."""
    g = torch.Generator().manual_seed(seed)
    return (
        amplitude * torch.rand(n, labels, h, w, generator=g, dtype=torch.float64),
        torch.rand(n, h - 1, w, generator=g, dtype=torch.float64),
        torch.rand(n, h, w - 1, generator=g, dtype=torch.float64),
    )


def puzzle(n: int, labels: int, side: int, *, seed: int = 0) -> Costs:
    """Costs as PuzzleMix has them: two smooth saliency maps, a prior and a price of borders."""
    g = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, n, 4, 4, generator=g, dtype=torch.float64).square()
    maps = torch.nn.functional.interpolate(maps, size=(side, side), mode="bilinear")
    maps = maps * (0.5 + torch.rand(2, n, side, side, generator=g, dtype=torch.float64))
    maps = maps / maps.sum((2, 3), keepdim=True)
    z = torch.linspace(0.0, 1.0, labels, dtype=torch.float64).view(1, -1, 1, 1)
    lam = torch.rand(n, 1, generator=g, dtype=torch.float64).clamp(0.01, 0.99)
    k = torch.arange(labels)
    prior = k * lam.log() + (labels - 1 - k) * (1 - lam).log()
    unary = torch.lerp(maps[0][:, None], maps[1][:, None], z) - 0.2 / side**2 * prior[:, :, None, None]
    price = 1.2 / 16 / side
    return (
        unary,
        price * (0.75 + 0.5 * torch.rand(n, side - 1, side, generator=g, dtype=torch.float64)),
        price * (0.75 + 0.5 * torch.rand(n, side, side - 1, generator=g, dtype=torch.float64)),
    )


def energy_by_hand(labels: torch.Tensor, unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> float:
    """One grid, cell by cell and pair by pair."""
    h, w = labels.shape
    z = labels.double() / (unary.shape[0] - 1)
    total = 0.0
    for i, j in itertools.product(range(h), range(w)):
        total += float(unary[labels[i, j], i, j])
        if i + 1 < h:
            total += float(down[i, j] * (z[i, j] - z[i + 1, j]) ** 2)
        if j + 1 < w:
            total += float(right[i, j] * (z[i, j] - z[i, j + 1]) ** 2)
    return total


def smallest(unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> float:
    """The least energy of one grid over all labellings."""
    count, h, w = unary.shape
    every = torch.tensor(list(itertools.product(range(count), repeat=h * w))).view(-1, h, w)
    many = (value.expand(len(every), *value.shape) for value in (unary, down, right))
    return float(grid_energy(every, *many).min())


@pytest.mark.parametrize("labels", [2, 3])
def test_energy_is_that_of_the_labels(labels: int) -> None:
    given = costs(4, labels, 3, 5)
    some = torch.randint(labels, (4, 3, 5), generator=torch.Generator().manual_seed(1))
    cut = grid_cut(*given)
    for i in range(4):
        row = [value[i] for value in given]
        assert float(grid_energy(some, *given)[i]) == pytest.approx(energy_by_hand(some[i], *row), rel=1e-12)
        assert float(cut.energy[i]) == pytest.approx(energy_by_hand(cut.labels[i], *row), rel=1e-12)


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("amplitude", [0.3, 1.0, 3.0])
def test_minimum_over_all_labellings(labels: int, side: int, amplitude: float) -> None:
    given = costs(6, labels, side, side, amplitude=amplitude, seed=3)
    exact, fast = grid_cut_exact(*given), grid_cut(*given)
    least = torch.tensor([smallest(*(value[i] for value in given)) for i in range(6)], dtype=torch.float64)
    assert torch.allclose(exact.energy, least, rtol=1e-9)
    assert bool((fast.energy >= least - 1e-12).all())
    assert float(((fast.energy - least) / least).mean()) < 0.005


@pytest.mark.parametrize(("labels", "allowed"), [(2, 0.003), (3, 0.006)])
@pytest.mark.parametrize(("side", "rows"), [(8, 32), (16, 16)])
def test_gap_to_maximum_flow(labels: int, allowed: float, side: int, rows: int) -> None:
    """The promise is 1 % for two labels and 3 % for three, in float32."""
    given = puzzle(rows, labels, side)
    exact = grid_cut_exact(*given)
    labelled = grid_cut(*(value.float() for value in given))
    energy = grid_energy(labelled.labels, *given)
    gap = (energy - exact.energy) / exact.energy
    assert bool((gap > -1e-6).all())
    assert float(gap.mean()) < allowed
    assert 0.05 < float((exact.labels > 0).double().mean()) < 0.95  # not trivial
    one_label = torch.stack([grid_energy(torch.full_like(exact.labels, k), *given) for k in range(labels)]).amin(0)
    assert float(((one_label - exact.energy) / exact.energy).mean()) > 10 * allowed
    assert torch.allclose(labelled.energy.double(), energy, rtol=1e-5)


@pytest.mark.parametrize("labels", [2, 3])
def test_weights_of_nothing_and_of_everything(labels: int) -> None:
    unary, down, right = costs(5, labels, 6, 4, seed=7)
    free = grid_cut(unary, 0 * down, 0 * right)
    assert torch.equal(free.labels, unary.argmin(1))
    tied = grid_cut(unary, 1e4 * (down + 1), 1e4 * (right + 1))
    assert torch.equal(tied.labels, unary.sum((2, 3)).argmin(1)[:, None, None].expand(5, 6, 4))
    assert torch.allclose(tied.energy, unary.sum((2, 3)).amin(1))


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 8)])
def test_thin_grids(labels: int, size: tuple[int, int]) -> None:
    given = costs(3, labels, *size, amplitude=2.0, seed=2)
    cut, exact = grid_cut(*given), grid_cut_exact(*given)
    assert cut.labels.shape == (3, *size)
    assert torch.allclose(cut.energy, exact.energy, rtol=2e-2)


def test_every_grid_is_solved_for_itself() -> None:
    given = costs(6, 3, 5, 5, seed=4)
    together = grid_cut(*given)
    for i in range(6):
        alone = grid_cut(*(value[i : i + 1] for value in given))
        assert torch.equal(alone.labels[0], together.labels[i])
    factor = torch.tensor([1e-6, 1.0, 1e6, 1e-3, 1.0, 1.0], dtype=torch.float64)
    scaled = grid_cut(*((value.movedim(0, -1) * factor).movedim(-1, 0) for value in given))
    assert torch.equal(scaled.labels, together.labels)


def test_ties_take_the_smaller_label_and_nan_stays_in_its_grid() -> None:
    unary = torch.zeros(2, 3, 4, 4)
    flat = grid_cut(unary, torch.ones(2, 3, 4), torch.ones(2, 4, 3))
    assert torch.equal(flat.labels, torch.zeros(2, 4, 4, dtype=torch.long))
    assert torch.equal(flat.energy, torch.zeros(2))
    given = [value.float() for value in costs(3, 3, 4, 4)]
    clean = grid_cut(*given)
    given[0][1, 0, 2, 2] = float("nan")
    cut = grid_cut(*given)
    assert torch.equal(cut.labels[[0, 2]], clean.labels[[0, 2]])
    assert bool(cut.energy[1].isnan())
    assert bool(cut.energy[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_inputs_kept(dtype: torch.dtype) -> None:
    given = [value.to(dtype) for value in costs(2, 2, 4, 4)]
    before = [value.clone() for value in given]
    cut = grid_cut(*given)
    assert isinstance(cut, Cut)
    assert cut.labels.dtype == torch.long
    assert cut.energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    needs_grad = [value.clone().requires_grad_() for value in given]
    assert not grid_cut(*needs_grad).energy.requires_grad


def test_more_steps_come_nearer() -> None:
    given = puzzle(16, 3, 12, seed=5)
    exact = grid_cut_exact(*given).energy
    gaps = [float(((grid_cut(*given, steps=steps).energy - exact) / exact).mean()) for steps in (5, 40, 300)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


def test_refusals() -> None:
    unary, down, right = costs(2, 2, 3, 4)
    for bad, text in (
        (
            (unary[:, :1], down, right),
            r"grid_cut: unary has shape \(2, 1, 3, 4\); pass \(N, 2, H, W\) or \(N, 3, H, W\)",
        ),
        ((unary[0], down, right), r"grid_cut: unary has shape \(2, 3, 4\); pass a batch with 4 axes"),
        ((unary, right, right), r"grid_cut: down has shape \(2, 3, 3\); pass \(2, 2, 4\) weights for these costs\."),
        ((unary, down, down), r"grid_cut: right has shape \(2, 2, 4\); pass \(2, 3, 3\) weights for these costs\."),
        ((unary, -down, right), r"grid_cut: down holds a negative weight; pass weights of at least 0\."),
        ((unary, down.to("meta"), right), r"grid_cut: down is on meta but unary is on cpu"),
    ):
        with pytest.raises(ValueError, match=text):
            grid_cut(*bad)
    with pytest.raises(TypeError, match=r"grid_cut: right has dtype torch\.int64; pass floating-point values\."):
        grid_cut(unary, down, right.long())
    with pytest.raises(TypeError, match=r"grid_cut: down is a list; pass a torch\.Tensor\."):
        grid_cut(unary, [1.0], right)
    with pytest.raises(ValueError, match=r"grid_cut: steps is 0; pass an integer of at least 1\."):
        grid_cut(unary, down, right, steps=0)
    with pytest.raises(ValueError, match=r"grid_cut_exact: down holds a negative weight"):
        grid_cut_exact(unary, -down, right)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"grid_cut_exact: SciPy is not installed; pip install scipy\."):
        grid_cut_exact(*costs(1, 2, 2, 2))
