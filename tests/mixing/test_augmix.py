"""AugMix: the operations one by one, and what a mixture of them may not do."""

from __future__ import annotations

import math

import pytest
import torch

from hardmix.mixing import AugMix
from hardmix.mixing.augmix import OPERATIONS, distort_
from mixing.cases import rng

NAMES = list(OPERATIONS)


def apply(name: str, x: torch.Tensor, level: float, sign: float = 1.0) -> torch.Tensor:
    n = x.shape[0]
    return distort_(x.clone(), torch.full((n,), NAMES.index(name)), torch.full((n,), level), torch.full((n,), sign))


def test_autocontrast_stretches_each_channel() -> None:
    x = 0.2 + 0.5 * torch.rand(2, 3, 8, 9, generator=rng())
    out = apply("autocontrast", x, 0.5)
    assert torch.allclose(out.amin((2, 3)), torch.zeros(2, 3), atol=1e-6)
    assert torch.allclose(out.amax((2, 3)), torch.ones(2, 3), atol=1e-6)
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert torch.equal(apply("autocontrast", flat, 0.5), flat)


@pytest.mark.parametrize(("level", "bits"), [(0.01, 4), (0.3, 3), (0.5, 2), (0.8, 1), (1.0, 1)])
def test_posterize_keeps_the_top_bits(level: float, bits: int) -> None:
    values = torch.arange(256)
    out = apply("posterize", (values / 255.0).double().view(1, 1, 16, 16), level).flatten() * 255
    assert torch.allclose(out, (values & ~(2 ** (8 - bits) - 1)).double(), atol=1e-6)


def test_solarize_inverts_the_bright() -> None:
    x = torch.tensor([0.1, 0.55, 0.65, 1.0]).view(1, 1, 2, 2)
    assert torch.allclose(apply("solarize", x, 0.4).flatten(), torch.tensor([0.1, 0.55, 0.35, 0.0]))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_translate_by_whole_pixels(sign: float) -> None:
    x = torch.rand(1, 2, 30, 60, generator=rng(), dtype=torch.float64)
    moved = apply("translate_x", x, 0.5, sign)  # a third of 60, half of that: 10 pixels
    assert torch.allclose(moved[..., 12:48], x.roll(-int(sign * 10), 3)[..., 12:48], atol=1e-6)
    lost = moved[..., -10:] if sign > 0 else moved[..., :10]
    assert float(lost.abs().max()) < 1e-5
    moved = apply("translate_y", x, 0.3, sign)  # 3 of 30
    assert torch.allclose(moved[..., 4:26, :], x.roll(-int(sign * 3), 2)[..., 4:26, :], atol=1e-6)


def _ramps(h: int, w: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image whose two channels are a pixel's row and column, counted from the centre."""
    rows = (torch.arange(h).double() - (h - 1) / 2).view(h, 1).expand(h, w)
    columns = (torch.arange(w).double() - (w - 1) / 2).view(1, w).expand(h, w)
    return torch.stack([rows, columns])[None] / 100, rows, columns


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_rotation_is_rigid_on_any_aspect(sign: float) -> None:
    """Reading coordinates off a ramp: distances from the centre are kept, the angle is 30 degrees times the level."""
    x, rows, columns = _ramps(40, 60)
    out = apply("rotate", x, 0.5, sign)[0] * 100
    inner = (rows.abs() < 8) & (columns.abs() < 8)
    assert torch.allclose(torch.hypot(out[0], out[1])[inner], torch.hypot(rows, columns)[inner], atol=1e-5)
    angle = math.pi / 12 * sign
    assert torch.allclose(out[1][inner], (math.cos(angle) * columns - math.sin(angle) * rows)[inner], atol=1e-5)


def test_shears_are_in_pixels() -> None:
    x, rows, columns = _ramps(40, 60)
    inner = (rows.abs() < 8) & (columns.abs() < 8)
    out = apply("shear_x", x, 1.0)[0] * 100
    assert torch.allclose(out[0][inner], rows[inner], atol=1e-5)
    assert torch.allclose(out[1][inner], (columns + 0.3 * rows)[inner], atol=1e-5)
    out = apply("shear_y", x, 1.0)[0] * 100
    assert torch.allclose(out[0][inner], (rows + 0.3 * columns)[inner], atol=1e-5)
    assert torch.allclose(out[1][inner], columns[inner], atol=1e-5)


def test_each_row_gets_its_own_operation() -> None:
    x = torch.rand(9, 3, 12, 10, generator=rng())
    operation = torch.tensor([*range(8), -1])
    level, sign = torch.linspace(0.1, 0.9, 9), torch.ones(9)
    out = distort_(x.clone(), operation, level, sign)
    for i in range(8):
        assert torch.allclose(out[i], apply(NAMES[i], x[i : i + 1], float(level[i]))[0], atol=1e-6)
    assert torch.equal(out[8], x[8])


def test_mixture_stays_in_range_and_near_at_low_severity() -> None:
    x = torch.rand(16, 3, 20, 24, generator=rng())
    mixed, _ = AugMix(severity=10.0)(x, torch.arange(16), generator=rng(1))
    assert float(mixed.min()) >= 0
    assert float(mixed.max()) <= 1 + 1e-6
    assert float((mixed - x).abs().mean()) > 0.01
    bytes_, _ = AugMix()((x * 255).to(torch.uint8), torch.arange(16), generator=rng(1))
    floats, _ = AugMix()((x * 255).to(torch.uint8).float() / 255, torch.arange(16), generator=rng(1))
    assert (bytes_.float() - floats * 255).abs().max() <= 0.501


def test_width_and_depth() -> None:
    """One chain of one link: the result lies between the image and that one operation."""
    x = torch.rand(40, 3, 10, 10, generator=rng())
    mixed, _ = AugMix(width=1, depth=1, severity=5.0)(x, torch.arange(40), generator=rng(2))
    changed = (mixed - x).flatten(1).abs().amax(1) > 0
    assert int(changed.sum()) > 30
    same = (
        AugMix(per="batch", width=2, depth=(1, 2)).plan(x[:1].expand(6, -1, -1, -1).contiguous(), generator=rng(3)).own
    )
    assert same is not None
    assert bool((same == same[:1]).all())


def test_depth_is_uniform_over_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    links = torch.zeros(3000, dtype=torch.long)

    def count(x: torch.Tensor, operation: torch.Tensor, level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        links.add_((operation >= 0).long())
        assert bool(((level >= 0.01) & (level <= 0.5)).all())
        assert sorted(set(sign.tolist())) == [-1.0, 1.0]
        return x

    monkeypatch.setattr("hardmix.mixing.augmix.distort_", count)
    AugMix(width=1, depth=(2, 4), severity=5.0).plan(torch.rand(3000, 1, 2, 2), generator=rng())
    counts = torch.bincount(links, minlength=6)
    assert counts[:2].sum() == counts[5] == 0
    assert bool((counts[2:5] > 900).all())


def test_settings_and_range() -> None:
    for kwargs, text in [
        ({"severity": 11}, "AugMix: severity is 11; pass a number from 0.1 to 10"),
        ({"width": 0}, "AugMix: width is 0; pass an integer of at least 1"),
        ({"depth": 0}, r"AugMix: depth is \(0, 0\); pass two numbers a <= b between 1 and 100"),
        ({"depth": (3, 1)}, r"AugMix: depth is \(3, 1\); pass two numbers"),
        ({"depth": (1.5, 2)}, r"AugMix: depth is 1\.5; pass an integer of at least 1"),
        ({"per": "pair"}, "AugMix: per is 'pair'; pass one of 'batch', 'sample'"),
    ]:
        with pytest.raises(ValueError, match=text):
            AugMix(**kwargs)
    x = torch.randn(4, 3, 8, 8, generator=rng())
    with pytest.raises(
        ValueError, match=r"AugMix: x holds values from -.* to .*; pass uint8 images or floats in \[0, 1\]"
    ):
        AugMix().plan(x)
    with pytest.raises(ValueError, match="AugMix: x holds values from nan to nan; pass uint8"):
        AugMix().plan(torch.full((1, 1, 2, 2), 0.5).index_fill(3, torch.tensor([1]), float("nan")))
    for dtype in (torch.int8, torch.int16, torch.int64):
        with pytest.raises(TypeError, match=rf"AugMix: x has dtype {dtype}; pass uint8 images or floats in \[0, 1\]"):
            AugMix().plan(torch.ones(4, 3, 8, 8, dtype=dtype))
    with pytest.raises(ValueError, match="y is a dense mask but the plan changes pixels"):
        AugMix()(torch.rand(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long))
