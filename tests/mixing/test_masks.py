"""SmoothMix, GridMix and FMix against slow readings of their definitions."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.mixing import FMix, GridMix, MixPlan, Policy, SmoothMix, masks
from hardmix.mixing import field as fields
from hardmix.mixing import plan as plans
from hardmix.mixing.draw import move
from hardmix.mixing.field import largest, low_frequency_field, low_frequency_mask
from mixing.cases import rng


class TestSmoothMix:
    def test_mask_is_one_minus_a_gaussian(self) -> None:
        plan = SmoothMix(sigma=(0.3, 0.3)).plan(torch.zeros(20, 1, 40, 60), generator=rng())
        assert plan.mask is not None
        for mask in plan.mask[:, 0].double().numpy():
            bell = np.log(np.maximum(1 - mask, 1e-300))
            rows, columns = (np.arange(40) + 0.5) / 40, (np.arange(60) + 0.5) / 60
            # log G is a parabola along each axis: its curvature is -1 / s^2 in units of the side
            keep = (1 - mask).max(1) > 1e-3
            fit_y = np.polyfit(rows[keep], bell[keep, np.argmax(bell.max(0))], 2)
            fit_x = np.polyfit(columns, bell[np.argmax(bell.max(1))], 2)
            assert fit_y[0] == pytest.approx(-0.5 / 0.3**2, rel=1e-3)
            assert fit_x[0] == pytest.approx(-0.5 / 0.3**2, rel=1e-3)
            for fit in (fit_y, fit_x):
                assert -0.01 <= -fit[1] / (2 * fit[0]) <= 1.01

    def test_the_partner_shows_at_the_centre(self) -> None:
        """The public code has the labels the other way round; the label has to grow with the pixels."""
        x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 32, 32).contiguous()
        for seed in range(20):
            plan = SmoothMix().plan(x, generator=rng(seed))
            seen = plan.blend(x)[1].mean()  # row 1 is white, its partner black
            assert seen == pytest.approx(float(plan.lam[1]), abs=1e-5)
        wide = SmoothMix(sigma=(0.5, 0.5), per="sample").plan(torch.zeros(4000, 1, 16, 16), generator=rng()).lam.mean()
        thin = SmoothMix(sigma=(0.1, 0.1), per="sample").plan(torch.zeros(4000, 1, 16, 16), generator=rng()).lam.mean()
        assert thin > wide  # a small disc leaves more of the own sample

    def test_documented_range_of_lam(self) -> None:
        lam = SmoothMix().plan(torch.zeros(50_000, 1, 16, 16), generator=rng()).lam
        assert 0.26 < float(lam.min()) < 0.34
        assert 0.88 < float(lam.max()) < 0.93

    def test_settings(self) -> None:
        for sigma in ((0.5, 0.25), (0.0, 1.0), (float("nan"), 1.0), 0.5, "ab", {0.1, 0.2}, (True, 2.0)):
            with pytest.raises(ValueError, match=r"SmoothMix: sigma is .*; pass two numbers a <= b between 0\.001 and"):
                SmoothMix(sigma=sigma)


class TestGridMix:
    def test_holes_are_where_the_definition_puts_them(self) -> None:
        """The mask is a window's grid of equal square holes, all inside the window, whose area gives lam."""
        size = (48, 64)
        plan = GridMix(alpha=1.0).plan(torch.zeros(300, 1, *size), generator=rng())
        assert plan.mask is not None
        seen = 0
        for mask, lam in zip(plan.mask[:, 0].numpy(), plan.lam.tolist(), strict=True):
            holes = mask == 0
            assert np.isin(mask, (0.0, 1.0)).all()
            assert lam == pytest.approx(1 - holes.mean(), abs=1e-6)
            if not holes.any():
                continue
            rows, columns = holes.any(1), holes.any(0)
            assert np.array_equal(holes, rows[:, None] & columns[None])  # a product of two combs
            for comb in (rows, columns):
                edges = np.flatnonzero(np.diff(np.concatenate([[0], comb.astype(int), [0]])))
                starts, stops = edges[::2], edges[1::2]
                if len(starts) > 2:
                    assert len(set(np.diff(starts))) == 1  # one period
                    assert len(set((stops - starts)[:-1])) == 1  # one side; only the last may be cut
                    seen += 1
        assert seen > 100

    def test_share_inside_the_window(self) -> None:
        """With the whole image as the window and cells that divide it, own share = 1 - (hole / cell)^2."""
        policy = GridMix(alpha=1.0, cells=(4, 4), area=(1.0, 1.0), aspect=(1.0, 1.0))
        plan = policy.plan(torch.zeros(50, 1, 32, 32), generator=rng(1))
        for lam in plan.lam.tolist():
            side = math.sqrt(1 - lam) * 8
            assert side == pytest.approx(round(side), abs=1e-5)
        values = (1 - plan.lam.double()).sqrt() * 8
        assert len(values.round().unique()) > 5

    def test_number_of_cells(self) -> None:
        for cells in (2, 3, 6):
            policy = GridMix(alpha=50.0, cells=(cells, cells), area=(1.0, 1.0), aspect=(1.0, 1.0))
            plan = policy.plan(torch.zeros(8, 1, 60, 60), generator=rng(cells))
            assert plan.mask is not None
            for mask in plan.mask[:, 0].numpy():
                for axis in (0, 1):
                    comb = (mask == 0).any(1 - axis).astype(int)
                    assert (np.diff(np.concatenate([[0], comb])) == 1).sum() == cells

    def test_window_area_and_place(self) -> None:
        policy = GridMix(alpha=1e-4, cells=(1, 1), area=(0.5, 0.5), aspect=(2.0, 2.0))
        plan = policy.plan(torch.zeros(400, 1, 40, 40), generator=rng(2))
        assert plan.mask is not None
        full = [m for m in plan.mask[:, 0].numpy() == 0 if m.any()]  # lam' near 0: the hole is the first cell
        heights = {int(m.any(1).sum()) for m in full}
        widths = {int(m.any(0).sum()) for m in full}
        assert widths == {20}  # sqrt(0.5 / 2) of 40
        assert heights == {40}  # sqrt(0.5 * 2): two square cells below each other
        left = np.array([np.flatnonzero(m.any(0))[0] for m in full])
        assert left.min() == 0
        assert left.max() == 20

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match=r"GridMix: cells is \(0, 3\); pass two numbers a <= b between 1 and"):
            GridMix(cells=(0, 3))
        with pytest.raises(ValueError, match=r"GridMix: cells is 2\.5; pass an integer of at least 1"):
            GridMix(cells=(2.5, 3))
        with pytest.raises(
            ValueError, match=r"GridMix: area is \(0\.5, 1\.5\); pass two numbers a <= b between 0\.001 and 1"
        ):
            GridMix(area=(0.5, 1.5))
        with pytest.raises(ValueError, match="GridMix: aspect is None"):
            GridMix(aspect=None)


@pytest.mark.parametrize("policy", [GridMix(), SmoothMix()], ids=repr)
def test_lines_travel_to_the_device_and_not_masks(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []
    for module in (masks, plans):
        monkeypatch.setattr(module, "move", lambda value, device: (moved.append(value), move(value, device))[1])
    plan = policy.plan(torch.empty(8, 3, 40, 50, device="meta"), generator=rng())
    assert plan.mask is not None
    assert plan.mask.is_meta
    assert plan.mask.shape == (8, 1, 40, 50)
    assert sum(value.nbytes for value in moved) <= 8 * (4 * (50 + 50) + 3 * 8)  # and a number or two for each row


@pytest.mark.parametrize("size", [(20000,), (150, 152), (30, 27, 40)], ids=str)
@pytest.mark.parametrize("policy", [GridMix(pairing="permutation"), SmoothMix(), SmoothMix(per="batch")], ids=repr)
@pytest.mark.parametrize("piece", [1, 50_000, 10**6])
def test_large_batches_are_blended_without_the_whole_mask(
    piece: int, policy: Policy, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces or row by row, to the bit what the mask gives; wherever the plan has been."""
    monkeypatch.setattr("hardmix.kernels.blend._PIECE", piece)
    x = torch.rand(4, 3, *size, generator=rng())
    for partner in (None, torch.tensor([1, 1, 0, 2])):
        plan = policy.plan(x, generator=rng(2), partner=partner)
        assert plan.mask is not None
        want = MixPlan(plan.partner, plan.lam, plan.mask).blend(x)
        if policy.per == "sample" and len(size) > 1:
            assert len(pickle.dumps(plan)) < plan.mask.nbytes / 4
        for same in (plan, pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
            assert torch.equal(same.mask, plan.mask)
            assert torch.equal(same.blend(x), want)
            assert torch.equal(same.blend(x, out=torch.empty_like(x)), want)
            assert torch.equal(same.blend_(x.clone()), want)
        learnt = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(plan.blend(learnt).sum(), learnt)
        assert bool(slope.isfinite().all())
    small = F.interpolate(x, scale_factor=0.5) if len(size) > 1 else x[..., ::2]
    assert plan.blend(small).shape == small.shape  # a hidden map, onto which the mask is averaged


class TestFMix:
    @pytest.mark.parametrize("size", [(1,), (37,), (16, 16), (31, 40), (64, 48), (9, 10, 11)], ids=str)
    def test_exactly_the_asked_number_of_pixels(self, size: tuple[int, ...]) -> None:
        pixels = math.prod(size)
        for per in ("sample", "batch"):
            plan = FMix(per=per).plan(torch.zeros(9, 2, *size), generator=rng(1))
            drawn = FMix(per=per)._lam(_pairing(9), _after_shift(9, 1)) * pixels
            assert plan.mask is not None
            counts = plan.mask.flatten(1).sum(1)
            assert torch.equal(counts, drawn.double().round().float())

    def test_spectrum_is_isotropic(self) -> None:
        """Power depends on the length of the frequency alone, with the exponent asked for; on any aspect ratio."""
        for size in ((64, 64), (48, 80)):
            field = low_frequency_field(600, size, 2.0, "isotropic", rng(3)).double().numpy()
            power = (np.abs(np.fft.fft2(field)) ** 2).mean(0)
            fy = np.fft.fftfreq(size[0])[:, None]
            fx = np.fft.fftfreq(size[1])[None]
            radius = np.hypot(fy, fx) * max(size)
            scaled = power * np.maximum(radius, 1.0) ** 4  # decay 2: energy falls with the 4th power
            inner = scaled[(radius > 1.5) & (radius < 12)]
            assert inner.std() / inner.mean() < 0.12  # 600 draws of an exponential: 1 / sqrt(300) = 0.06 each
            angle = np.arctan2(np.abs(fy), np.abs(fx) + 0 * fy)
            ring = (radius > 2) & (radius < 12)
            sectors = [
                scaled[ring & (angle >= k * math.pi / 8) & (angle <= (k + 1) * math.pi / 8)].mean() for k in range(4)
            ]
            assert max(sectors) / min(sectors) < 1.1
        # gradient energy along both axes
        field = low_frequency_field(600, (64, 64), 3.0, "isotropic", rng(4))
        dy = (field.roll(1, 1) - field).square().mean()
        dx = (field.roll(1, 2) - field).square().mean()
        assert float(dy / dx) == pytest.approx(1.0, abs=0.08)

    def test_little_is_lost_to_the_low_pass(self) -> None:
        """Masks from all frequencies differ from the ones in use by a few pixels in a thousand."""
        size, rows = (96, 96), 40
        limit = 48
        noise = torch.randn((rows, 2 * limit + 1, 2 * limit + 1), generator=rng(5), dtype=torch.float64)
        cycles = torch.cat([torch.arange(limit + 1), torch.arange(1, limit + 1)]).double()
        radius = (cycles[:, None] ** 2 + cycles**2).sqrt().clamp(min=1)
        at = torch.arange(96).double() / 96
        waves = torch.cat(
            [
                torch.cos(2 * math.pi * cycles[: limit + 1, None] * at),
                torch.sin(2 * math.pi * cycles[limit + 1 :, None] * at),
            ]
        )
        scale = torch.where(cycles > 0, math.sqrt(2), 1.0)
        weights = noise * radius**-3 * scale[:, None] * scale

        def mask(highest: int) -> torch.Tensor:
            kept = weights * (cycles[:, None] <= highest) * (cycles <= highest)
            field = (waves.T @ kept @ waves).flatten(1)
            return field > field.median(1, keepdim=True).values

        assert (mask(12) != mask(48)).double().mean() < 0.003
        assert low_frequency_field(1, size, 3.0, "isotropic", rng()).shape == (1, 96, 96)

    def test_released_field_is_two_rows_of_the_spectrum(self) -> None:
        """Nearly all energy at horizontal frequencies 0 and 1, as in the inverse FFT of the authors' code."""
        field = low_frequency_field(200, (64, 48), 3.0, "released", rng(6)).double().numpy()
        power = (np.abs(np.fft.fft2(field)) ** 2).mean(0)
        assert power[:, [0, 1, -1]].sum() / power.sum() > 0.99999

    def test_released_field_is_the_inverse_fft_of_the_authors(self) -> None:
        """With the same noise: spectrum rows 0 and 1 taken for real and imaginary part, then an inverse real FFT."""
        size, rows, limit = (16, 24), 3, 8  # cycles above 8 of a height of 16 would fold back; both leave them out
        field = low_frequency_field(rows, size, 3.0, "released", rng(7)).double().numpy()
        noise = torch.randn((2, rows, limit + 1, 2), generator=rng(7)).double().numpy()
        fy, fx = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None]
        scale = (np.maximum(np.hypot(fy, fx), 1 / 24) * 24) ** -3.0  # (16, 13)
        for row in range(rows):
            spectrum = np.zeros((16, 2), dtype=complex)  # read as cycles along the height x cycles along the width
            spectrum[: limit + 1] = (
                scale[0, : limit + 1, None] * noise[0, row] + 1j * scale[1, : limit + 1, None] * noise[1, row]
            )
            want = np.fft.irfftn(spectrum, size, axes=(0, 1)) * 16 * 24
            np.testing.assert_allclose(field[row], want, atol=1e-5)

    @pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 6.0, 40.0])
    def test_any_decay(self, decay: float) -> None:
        for size in ((33,), (20, 31), (7, 8, 9)):
            field = low_frequency_field(3, size, decay, "isotropic", rng())
            assert field.shape == (3, *size)
            assert bool(field.isfinite().all())
            assert bool((field.flatten(1).std(1) > 0).all())

    def test_one_field_per_batch_is_one_mask(self) -> None:
        plan = FMix(per="batch").plan(torch.zeros(6, 3, 20, 30), generator=rng())
        assert plan.mask is not None
        assert bool((plan.mask == plan.mask[:1]).all())

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match=r"FMix: decay is 0; pass a finite number greater than 0\."):
            FMix(decay=0)
        with pytest.raises(ValueError, match=r"FMix: spectrum is 'official'; pass one of 'isotropic', 'released'"):
            FMix(spectrum="official")
        with pytest.raises(ValueError, match=r'x has shape \(2, 3, 9\) but spectrum="released" is defined for images'):
            FMix(spectrum="released").plan(torch.zeros(2, 3, 9))


@pytest.mark.parametrize("spectrum", ["isotropic", "released"])
def test_masks_made_in_pieces_are_those_of_the_whole_batch(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, keep = (24, 40), torch.arange(0, 961, 120)
    whole = largest(low_frequency_field(9, size, 3.0, spectrum, rng(8)).flatten(1), keep)
    monkeypatch.setattr(fields, "_THREADS", (1, 1))
    for pixels in (1, 2000, 10**6):
        monkeypatch.setattr(fields, "_PIECE", pixels)
        mask = low_frequency_mask(keep, size, 3.0, spectrum, rng(8))
        # Products of other shapes may round otherwise, which moves a pixel at the threshold.
        assert (mask.flatten(1) != whole).float().mean() < 1e-3
        assert torch.equal(mask.flatten(1).sum(1), keep)


class TestLargest:
    @pytest.mark.parametrize("pixels", [1, 7, 512, 513, 2000, 20_000])
    @pytest.mark.parametrize(
        "kind", ["noise", "smooth", "few values", "one value", "spike", "sorted", "hidden low", "hidden high"]
    )
    def test_against_sorting(self, kind: str, pixels: int) -> None:
        generator = rng(pixels)
        noise = torch.randn(6, pixels, generator=generator)
        values = {
            "noise": noise,
            "smooth": noise.cumsum(1),
            "few values": (noise * 2).round(),
            "one value": torch.zeros(6, pixels),
            # the sample of every k-th pixel sees only zeros
            "spike": torch.zeros(6, pixels).index_fill(1, torch.tensor([min(1, pixels - 1)]), 5.0),
            # the sample sees values that are nowhere else
            "hidden low": noise.index_fill(1, torch.arange(0, pixels, math.isqrt(pixels) // 4 | 1), -9.0),
            "hidden high": noise.index_fill(1, torch.arange(0, pixels, math.isqrt(pixels) // 4 | 1), 9.0),
            "sorted": torch.arange(pixels).float().expand(6, -1) * torch.tensor([1.0, -1, 2, -2, 0.5, 3]).view(6, 1),
        }[kind]
        keep = torch.tensor([0, pixels, pixels // 2, 1, max(pixels - 1, 0), pixels // 3])
        got = largest(values, keep)
        for row in range(6):
            order = [i for _, i in sorted((-value, i) for i, value in enumerate(values[row].tolist()))]
            want = torch.zeros(pixels, dtype=torch.bool)
            want[order[: int(keep[row])]] = True
            assert torch.equal(got[row], want), row

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        values = torch.randn(4, 3000, generator=rng()).to(dtype)  # of half types many are equal
        keep = torch.tensor([0, 3000, 1234, 7])
        want = torch.zeros(4, 3000, dtype=torch.bool)
        for row, order in enumerate(values.argsort(dim=1, descending=True, stable=True)):
            want[row, order[: int(keep[row])]] = True
        assert torch.equal(largest(values, keep), want)

    def test_infinite_and_missing_values_of_a_long_row(self) -> None:
        values = torch.randn(3, 2000, generator=rng())
        values[:, ::3] = -math.inf
        values[1, 1::3] = math.inf
        values[2, ::2] = math.nan
        chosen = largest(values, torch.tensor([1500, 100, 1200]))
        assert chosen.sum(1).tolist() == [1500, 100, 1000]
        assert bool((values[1][chosen[1]] == math.inf).all())
        assert not bool(chosen[2, ::2].any())

    def test_as_one_operation_of_a_graph(self) -> None:
        values = torch.randn(3, 600, generator=rng())
        torch.library.opcheck(torch.ops.hardmix.largest.default, (values, torch.tensor([0, 600, 77])))


def _pairing(n: int) -> object:
    from hardmix.mixing.draw import draw_partner

    return draw_partner(n, "shift", rng(1))


def _after_shift(n: int, seed: int) -> torch.Generator:
    """A generator in the state that it has after the partner was drawn."""
    from hardmix.mixing.draw import draw_partner

    generator = rng(seed)
    draw_partner(n, "shift", generator)
    return generator
