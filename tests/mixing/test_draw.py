"""The draws: lambda against Beta, pairings, and the private function that the draws lean on."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import compiling
from hardmix.mixing import AugMix, CutMix, Mixup
from hardmix.mixing.draw import draw_beta, draw_gamma, draw_lam, draw_partner
from mixing.cases import rng

LEAST_P = 1e-4


@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 0.2, 0.8, 1.0, 2.0, 50.0, 1e4])
def test_lam_is_beta(alpha: float) -> None:
    lam = draw_beta(alpha, alpha, 20_000, rng(int(alpha * 1e4))).double().numpy()
    assert np.isfinite(lam).all()
    assert lam.min() >= 0
    assert lam.max() <= 1
    # Below a half float32 has steps fine enough for a continuous test; near 1 it hasn't, so the upper half is counted.
    beta, low = stats.beta(alpha, alpha), lam[lam < 0.5]
    if alpha >= 1e-2:
        least = beta.cdf(1e-36)  # what is smaller is 0 in float32
        assert stats.kstest(low[low > 1e-36], lambda v: (beta.cdf(v) - least) / (0.5 - least)).pvalue > LEAST_P
    edges = np.array([0.0, 1e-6, 1e-3, 0.05, 0.2, 0.35, 0.45, 0.5])
    edges = np.concatenate([edges, 1 - edges[-2::-1]])
    want = np.diff(beta.cdf(edges)) * len(lam)
    seen, _ = np.histogram(lam, edges)
    enough = want > 5
    rest = [seen[~enough].sum()], [want[~enough].sum()]
    if rest[1][0] <= 5:
        rest = [], []
        want *= seen[enough].sum() / want[enough].sum()
    assert stats.chisquare([*seen[enough], *rest[0]], [*want[enough], *rest[1]]).pvalue > LEAST_P
    assert abs(lam.var() - 1 / (4 * (2 * alpha + 1))) < 0.02 / (2 * alpha + 1)


@pytest.mark.parametrize(("a", "b"), [(2.0, 8.0), (0.5, 3.0), (1e-3, 1e-2), (1.0, 5.0)])
def test_unequal_parameters(a: float, b: float) -> None:
    lam = draw_beta(a, b, 20_000, rng(3)).double().numpy()
    assert np.isfinite(lam).all()
    assert abs(lam.mean() - a / (a + b)) < 5 * np.sqrt(stats.beta(a, b).var() / len(lam))
    if a >= 0.5:
        assert stats.kstest(lam, stats.beta(a, b).cdf).pvalue > LEAST_P


@pytest.mark.parametrize("alpha", [5e-324, 1e-320, 1e-307, 1e-300, 1e300, 1.7e308])
def test_no_parameter_gives_nan(alpha: float) -> None:
    lam = draw_beta(alpha, alpha, 2000, rng())
    assert bool(((lam >= 0) & (lam <= 1)).all())
    if alpha > 1:
        assert bool((lam == 0.5).all())
    else:  # both ends, equally often
        assert bool(((lam == 0) | (lam == 1)).all())
        assert float(lam.mean()) == pytest.approx(0.5, abs=0.05)
    assert bool(Mixup(alpha=alpha).plan(torch.zeros(8, 2), generator=rng()).lam.isfinite().all())


def test_policies_use_it() -> None:
    for per, copies in (("sample", 1), ("pair", 2)):
        plan = Mixup(alpha=0.4, per=per).plan(torch.zeros(20_000, 1), generator=rng(1))
        lam = plan.lam if copies == 1 else plan.lam[torch.arange(20_000) < plan.partner]
        assert stats.kstest(lam.double().numpy(), stats.beta(0.4, 0.4).cdf).pvalue > LEAST_P
    lam = torch.stack(
        [Mixup(alpha=2.0, per="batch").plan(torch.zeros(3, 1), generator=rng(s)).lam[0] for s in range(2000)]
    )
    assert stats.kstest(lam.double().numpy(), stats.beta(2.0, 2.0).cdf).pvalue > LEAST_P


@pytest.mark.parametrize("pairing", ["shift", "permutation", "matching"])
def test_partners_are_uniform(pairing: str) -> None:
    n, draws = 7, 4000
    counts = torch.zeros(n, n)
    generator = rng(5)
    for _ in range(draws):
        partner = draw_partner(n, pairing, generator).partner
        assert torch.equal(partner.sort().values, torch.arange(n))
        counts[torch.arange(n), partner] += 1
    if pairing == "shift":
        assert counts.diagonal().sum() == 0
        seen = counts[0, 1:].numpy()  # one draw decides all rows
        assert stats.chisquare(seen).pvalue > LEAST_P
    else:
        # 1/7 each: for a matching of 7 rows the one left over is paired with itself
        for row in counts.numpy():
            assert stats.chisquare(row).pvalue > LEAST_P


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
def test_pairing_shapes(n: int) -> None:
    for pairing in ("shift", "permutation", "reversal", "matching"):
        drawn = draw_partner(n, pairing, rng(n))
        partner = drawn.partner
        assert torch.equal(partner.sort().values, torch.arange(n))
        if drawn.shift is not None:
            assert torch.equal(partner, (torch.arange(n) + drawn.shift) % n)
        if pairing in ("reversal", "matching"):
            assert torch.equal(partner[partner], torch.arange(n))
        if pairing == "matching":
            assert int((partner == torch.arange(n)).sum()) == n % 2
    assert draw_partner(n, "reversal", None).partner.tolist() == list(reversed(range(n)))
    assert draw_partner(n, "shift", rng()).shift == 0 if n == 1 else draw_partner(n, "shift", rng()).shift != 0


def test_generator_has_to_live_on_the_cpu() -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"Mixup: generator is on cuda; pass a CPU torch\.Generator"):
        Mixup().plan(torch.rand(2, 3), generator=Elsewhere())


def test_private_gamma_sampler_is_still_there() -> None:
    """torch has no public Gamma sampler that takes a generator; if this fails, draw_beta needs another one."""
    shape = torch.full((50_000,), 2.5, dtype=torch.float64)
    first = torch._standard_gamma(shape, generator=rng(1))
    assert torch.equal(first, torch._standard_gamma(shape, generator=rng(1)))
    assert first.dtype == torch.float64
    assert stats.kstest(first.numpy(), stats.gamma(2.5).cdf).pvalue > LEAST_P
    assert not inspect.isclass(torch._standard_gamma)


@compiling.supported
def test_gamma_draws_of_compiled_code_are_those_of_eager_code() -> None:
    shape = torch.tensor([[0.3], [2.5]], dtype=torch.float64).expand(2, 7)

    def twice() -> tuple[torch.Tensor, torch.Tensor]:
        return draw_gamma(shape, None), draw_gamma(shape, None)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled()
    torch.manual_seed(3)
    assert torch.equal(first, draw_gamma(shape, None))
    assert torch.equal(second, draw_gamma(shape, None))
    assert not torch.equal(first, second)  # two draws of one kind stay two
    torch._dynamo.reset()


def test_the_module_may_be_imported_anew() -> None:
    again = "import importlib, hardmix.mixing.draw as draw; importlib.reload(draw)"
    subprocess.run([sys.executable, "-c", again], check=True)


def test_augmix_weights_survive_small_alpha() -> None:
    for alpha in (1e-4, 1.0, 1e4):
        mixed, _ = AugMix(alpha=alpha)(torch.rand(16, 3, 8, 8, generator=rng()), torch.arange(16), generator=rng(2))
        assert bool(mixed.isfinite().all())


class TestBoxes:
    size = (12, 20)

    def boxes(self, n: int = 20_000) -> torch.Tensor:
        plan = CutMix(alpha=1.0).plan(torch.zeros(n, 1, *self.size), generator=rng(8))
        assert plan.box is not None
        return plan.box

    def test_touch_all_four_borders_and_stay_inside(self) -> None:
        box = self.boxes()
        lengths = torch.tensor(self.size)
        assert bool((box[:, :, 0] >= 0).all())
        assert bool((box[:, :, 1] <= lengths).all())
        assert bool((box[:, :, 0] <= box[:, :, 1]).all())
        # as often at the start as at the stop of each axis, and every border pixel can be cut
        area = (box[:, :, 1] - box[:, :, 0]).prod(1) > 0
        inner = area & ((box[:, :, 1] - box[:, :, 0]) < lengths).all(1)
        for axis in range(2):
            low = int((inner & (box[:, axis, 0] == 0)).sum())
            high = int((inner & (box[:, axis, 1] == lengths[axis])).sum())
            assert low > 1000
            assert high > 1000

    def test_single_pixels_are_uniform(self) -> None:
        """Boxes of one pixel show the centres themselves."""
        from hardmix.mixing.draw import uniform
        from hardmix.mixing.static import cut_box, whole_pixels

        centre = whole_pixels(uniform(0.0, 1.0, (24_000, 2), rng(1)), self.size)
        box = cut_box(torch.full((24_000,), 1e-9), centre, self.size, smallest=1)
        assert torch.equal(box[:, :, 1] - box[:, :, 0], torch.ones(24_000, 2, dtype=torch.long))
        cell = box[:, 0, 0] * self.size[1] + box[:, 1, 0]
        assert stats.chisquare(torch.bincount(cell, minlength=240).numpy()).pvalue > LEAST_P

    def test_share_before_clipping(self) -> None:
        """A box in the middle has the area that lambda asks for, to half a pixel a side; series and volumes too."""
        from hardmix.mixing.static import cut_box, cut_side

        for size in ((101,), (101, 81), (41, 31, 21)):
            lam = torch.linspace(0.05, 0.95, 10)
            middle = torch.tensor([[length // 2 for length in size]]).expand(10, -1)
            box = cut_box(cut_side(lam, len(size)), middle, size)
            sides = (box[:, :, 1] - box[:, :, 0]).double()
            want = (1 - lam.double())[:, None] ** (1 / len(size)) * torch.tensor(size)
            assert bool(((sides - want).abs() <= 0.5 + 1e-4).all())

    @pytest.mark.parametrize("size", [(12, 20), (17,), (7, 5, 9), (1, 6)], ids=str)
    def test_inside_the_area_is_the_drawn_one(self, size: tuple[int, ...]) -> None:
        x = torch.zeros(4000, 1, *size)
        for alpha in (0.2, 1.0):
            plan = CutMix(alpha=alpha, inside=True).plan(x, generator=rng(8))
            # What is drawn, and in which order, is what the clipped box draws.
            g = rng(8)
            lam = draw_lam(alpha, draw_partner(4000, "shift", g), "sample", g)
            assert plan.box is not None
            start, stop = plan.box.unbind(2)
            lengths = torch.tensor(size)
            sides = ((1.0 - lam.double())[:, None] ** (1 / len(size)) * lengths).numpy()
            assert bool(((start >= 0) & (stop <= lengths)).all())
            assert np.abs((stop - start).double().numpy() - sides).max() <= 0.5 + 1e-4
            area = (stop - start).double().prod(1) / lengths.prod()
            assert torch.equal(plan.lam, (1.0 - area).float())

    def test_inside_every_place_is_equally_likely(self) -> None:
        from hardmix.mixing.static import inner_box

        place = torch.rand(24_000, 2, generator=rng(1))
        for side, counts in ((0.0, (13, 21)), (0.5, (7, 11)), (1.0, (1, 1))):
            box = inner_box(torch.full((24_000,), side), place, self.size)
            cell = box[:, 0, 0] * counts[1] + box[:, 1, 0]
            found = torch.bincount(cell, minlength=counts[0] * counts[1])
            assert len(found) == counts[0] * counts[1]
            assert side == 1.0 or stats.chisquare(found.numpy()).pvalue > LEAST_P
        last = torch.full((1, 2), 1.0 - 2.0**-24)  # the largest draw below 1
        assert inner_box(torch.full((1,), 0.5), last, self.size).tolist() == [[[6, 12], [10, 20]]]

    def test_inside_a_small_share_stays_small(self) -> None:
        """Where clipped boxes turn most of them over."""
        x = torch.zeros(8000, 1, 32, 32)
        assert float((CutMix(alpha=0.2).plan(x, generator=rng()).lam < 0.5).float().mean()) < 0.45
        inside = CutMix(alpha=0.2, inside=True).plan(x, generator=rng()).lam
        assert float((inside < 0.5).float().mean()) == pytest.approx(0.5, abs=0.02)
        assert float(inside.mean()) == pytest.approx(0.5, abs=0.02)

    def test_inside_is_off_by_itself_and_named_when_on(self) -> None:
        assert "inside" not in repr(CutMix())
        assert "inside=True" in repr(CutMix(inside=True))
        with pytest.raises(TypeError, match=r"CutMix: inside is 'yes'; pass True or False\."):
            CutMix(inside="yes")
