"""Strong views: each operation against PIL's on the same 8 bits, and what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from hardmix.data import Augment, load_images, strong_views
from hardmix.data.strong_views import GREY_LEVEL, OPERATIONS

LEVELS = [0.0, 0.1, 0.37, 0.5, 0.63, 0.9, 1 - 2**-24]
SIZES = [(32, 32), (17, 23), (40, 9), (1, 1), (2, 2), (1, 13), (3, 3)]
NEAREST = Image.Resampling.NEAREST


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int, height: int, width: int) -> torch.Tensor:
    """Noise, a ramp, a narrow range, few values, one value, black and white."""
    shape = (channels, height, width)
    noise = torch.randint(0, 256, shape, generator=generator(1))
    ramp = torch.arange(channels * height * width).view(shape) * 255 // (channels * height * width)
    narrow = torch.randint(90, 131, shape, generator=generator(2))
    few = torch.randint(0, 4, shape, generator=generator(3)) * 61 + 20
    two = torch.randint(0, 2, shape, generator=generator(4)) * 255
    return torch.stack([noise, ramp, narrow, few, torch.full(shape, 77), two]).to(torch.uint8)


def factor(level: float) -> float:
    return 0.05 + 0.9 * level


def signed(level: float, most: float) -> float:
    return (2 * level - 1) * most


def moved(image: Image.Image, *matrix: float) -> Image.Image:
    grey = (GREY_LEVEL,) * len(image.getbands())
    return image.transform(image.size, Image.Transform.AFFINE, matrix, NEAREST, fillcolor=grey)


def rotated(image: Image.Image, level: float) -> Image.Image:
    grey = (GREY_LEVEL,) * len(image.getbands())
    return image.rotate(signed(level, 30.0), NEAREST, fillcolor=grey)


#: operation -> what PIL does at the level, and by how many of 256 levels it may differ
PIL: dict[str, tuple[Callable[[Image.Image, float], Image.Image], int]] = {
    "autocontrast": (lambda image, level: ImageOps.autocontrast(image), 1),
    "brightness": (lambda image, level: ImageEnhance.Brightness(image).enhance(factor(level)), 1),
    "color": (lambda image, level: ImageEnhance.Color(image).enhance(factor(level)), 1),
    "contrast": (lambda image, level: ImageEnhance.Contrast(image).enhance(factor(level)), 1),
    "equalize": (lambda image, level: ImageOps.equalize(image), 0),
    "identity": (lambda image, level: image, 0),
    "posterize": (lambda image, level: ImageOps.posterize(image, 4 + int(5 * level)), 0),
    "sharpness": (lambda image, level: ImageEnhance.Sharpness(image).enhance(factor(level)), 1),
    "solarize": (lambda image, level: ImageOps.solarize(image, 256 * level), 0),  # type: ignore[arg-type]
}
#: operation -> what PIL does at the level; its coordinates have 16 bits after the point, so a few pixels fall elsewhere
PIL_MOVES: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "rotate": rotated,
    "shear_x": lambda image, level: moved(image, 1, signed(level, 0.3), 0, 0, 1, 0),
    "shear_y": lambda image, level: moved(image, 1, 0, 0, signed(level, 0.3), 1, 0),
    "translate_x": lambda image, level: moved(image, 1, 0, signed(level, 0.3) * image.width, 0, 1, 0),
    "translate_y": lambda image, level: moved(image, 1, 0, 0, 0, 1, signed(level, 0.3) * image.height),
}


def by_pil(operation: Callable[[Image.Image, float], Image.Image], x: torch.Tensor, level: float) -> np.ndarray:
    images = [Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in x.numpy()]
    done = np.stack([np.asarray(operation(image, level)) for image in images])
    return (done[:, None] if x.shape[1] == 1 else done.transpose(0, 3, 1, 2)).astype(int)


def ours(name: str, x: torch.Tensor, level: float) -> np.ndarray:
    kept = x.clone()
    out = OPERATIONS[name](x, torch.full((len(x), 1, 1, 1), level))
    assert torch.equal(x, kept)
    assert out.dtype == torch.uint8
    assert out.shape == x.shape
    return out.numpy().astype(int)


def test_the_operations_are_the_14_of_fixmatch() -> None:
    assert set(OPERATIONS) == {*PIL, *PIL_MOVES}
    assert len(OPERATIONS) == 14


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PIL)
def test_values_are_those_of_pil(name: str, channels: int) -> None:
    operation, tolerance = PIL[name]
    for size in SIZES:
        x = pictures(channels, *size)
        off = np.stack([np.abs(ours(name, x, level) - by_pil(operation, x, level)) for level in LEVELS])
        assert off.max() <= tolerance
        assert off.mean() < 0.02 or min(size) < 9  # where PIL's own floats fall just below a whole number


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PIL_MOVES)
def test_places_are_those_of_pil(name: str, channels: int) -> None:
    for height, width in SIZES[:3]:
        x = pictures(channels, height, width)[:2]  # where neighbours differ
        for level in LEVELS:
            same = ours(name, x, level) == by_pil(PIL_MOVES[name], x, level)
            assert same.mean() > 0.99, level


@pytest.mark.parametrize("name", PIL_MOVES)
def test_moves_leave_mid_grey_and_no_new_values(name: str) -> None:
    x = torch.full((2, 3, 20, 30), 200, dtype=torch.uint8)
    out = ours(name, x, 1 - 2**-24)
    assert set(np.unique(out)) == {200, GREY_LEVEL}
    assert 0.05 < (out == GREY_LEVEL).mean() < 0.35


def test_moves_of_tiny_pictures_stay_in_them() -> None:
    for name in PIL_MOVES:
        for size in SIZES[3:]:
            for level in LEVELS:
                assert set(np.unique(ours(name, pictures(1, *size)[4:5], level))) <= {77, GREY_LEVEL}


def test_one_channel_has_no_colors_and_other_numbers_neither() -> None:
    for channels in (1, 2, 4):
        x = pictures(channels, 8, 9)
        assert np.array_equal(ours("color", x, 0.1), x.numpy())
        mean = x.double().mean((1, 2, 3)).numpy().reshape(-1, 1, 1, 1)
        expected = mean + 0.14 * (x.numpy() - mean)
        assert np.abs(ours("contrast", x, 0.1) - expected).max() <= 1.5


def test_flat_channels_stay() -> None:
    x = torch.tensor([0, 9, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    for name in ("autocontrast", "equalize"):
        assert np.array_equal(ours(name, x, 0.5), x.numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_randaugment_does_to_each_sample_what_was_drawn_for_it(dtype: torch.dtype) -> None:
    n = 80
    x = torch.randint(0, 256, (n, 3, 9, 14), dtype=torch.uint8, generator=generator(7))
    out = Augment(["randaugment"])(x if dtype == torch.uint8 else x / 255, generator=generator(3))
    state = generator(3)
    drawn = torch.randint(14, (2, n), generator=state)
    level = torch.rand(2, n, generator=state)
    operations = list(OPERATIONS.values())
    for i in range(n):
        expected = x[i : i + 1]
        for which, strength in zip(drawn[:, i].tolist(), level[:, i].view(2, 1, 1, 1, 1), strict=True):
            expected = operations[which](expected, strength)
        assert torch.equal(out[i : i + 1], expected if dtype == torch.uint8 else expected / 255)


def test_pairs_of_operations_and_strengths_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[list[torch.Tensor]] = [[] for _ in range(14)]

    def mark(index: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def operation(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            levels[index].append(level.flatten())
            return x * 14 + index

        return operation

    monkeypatch.setattr(strong_views, "OPERATIONS", {str(index): mark(index) for index in range(14)})
    n = 196 * 100
    pair = Augment(["randaugment"])(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), generator=generator(5))
    found = torch.bincount(pair.flatten().long(), minlength=196)  # first and second may be the same
    assert len(found) == 196
    assert stats.chisquare(found.numpy()).pvalue > 1e-4
    for seen in levels:
        assert stats.kstest(torch.cat(seen).numpy(), "uniform").pvalue > 1e-4


def test_strengths_reach_the_whole_of_each_range() -> None:
    level = torch.rand(4000, 1, 1, 1, generator=generator())
    x = torch.full((4000, 1, 1, 1), 255, dtype=torch.uint8)
    dimmed = OPERATIONS["brightness"](x, level).double() / 255
    assert float(dimmed.min()) == pytest.approx(0.05, abs=0.01)
    assert float(dimmed.max()) == pytest.approx(0.95, abs=0.01)
    bits = torch.log2(256.0 - OPERATIONS["posterize"](x, level)).flatten()
    assert torch.bincount(bits.long()).tolist() == pytest.approx([800] * 5, rel=0.15)  # 8 bits down to 4
    threshold = OPERATIONS["solarize"](torch.full_like(x, 128), level) == 127
    assert float(threshold.double().mean()) == pytest.approx(0.5, abs=0.03)
    level = level[:1000]
    ramp = torch.arange(100, dtype=torch.uint8).expand(1000, 1, 100, 100)
    for name, at in (("translate_x", (50, 50)), ("shear_x", (99, 50))):
        moved_by = OPERATIONS[name](ramp, level)[:, 0, at[0], at[1]].long() - 50
        assert int(moved_by.min()) == -30
        assert int(moved_by.max()) in (29, 30)
    middle = OPERATIONS["rotate"](ramp, level)[:, 0, 99, 50].long() - 50  # at a radius of half of the side
    assert int(middle.abs().max()) == pytest.approx(50 * math.sin(math.pi / 6), abs=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_the_same_as_bytes(dtype: torch.dtype) -> None:
    x = torch.randint(0, 256, (64, 3, 11, 8), dtype=torch.uint8, generator=generator(2))
    names = ["randaugment"]
    expected = Augment(names)(x, generator=generator(1)).double() / 255
    out = Augment(names)((x.double() / 255).to(dtype), generator=generator(1))
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_floats_between_the_levels_are_rounded_to_them() -> None:
    x = torch.rand(200, 1, 4, 5, generator=generator(4))
    out = Augment(["randaugment"])(x, generator=generator(1))
    levels = out * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_a_nan_does_not_get_lost() -> None:
    x = torch.rand(6, 3, 8, 8, generator=generator())
    x[2, 1, 3, 3] = math.nan
    x[4, 0, 0, 0] = math.inf
    lost = Augment(["randaugment"])(x, generator=generator()).isnan().flatten(1)
    assert lost.any(1).tolist() == lost.all(1).tolist() == [False, False, True, False, True, False]


def test_a_sample_alone_and_two_of_them() -> None:
    for n in (1, 2):
        for seed in range(30):
            x = pictures(3, 5, 7)[:n]
            out = Augment(["flip", "crop", "randaugment", "cutout"])(x, generator=generator(seed))
            assert out.shape == x.shape


@pytest.mark.parametrize("names", [["randaugment"], ["cutout"], ["flip", "crop", "randaugment", "cutout"]])
def test_views_follow_from_the_generator(names: list[str]) -> None:
    x = pictures(3, 16, 12).repeat(4, 1, 1, 1)
    out = [Augment(names)(x, generator=generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])
    # and from the place in the batch: the same picture comes out differently
    assert not torch.equal(out[0][:6], out[0][6:12])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_values_on_another_device_are_not_waited_for(dtype: torch.dtype) -> None:
    x = torch.empty(64, 3, 8, 9, dtype=dtype, device="meta")  # which has none to look at
    out = Augment(["randaugment", "cutout"])(x, generator=generator())
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("size", [(32, 32), (20, 31), (9, 6)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cutout_paints_a_grey_square_at_a_uniform_place(size: tuple[int, int], dtype: torch.dtype) -> None:
    n = 3000
    x = torch.zeros(n, 2, *size, dtype=dtype)
    out = Augment(["cutout"])(x, generator=generator(6))
    assert not x.any()
    assert out.dtype == dtype
    assert set(out.unique().tolist()) == {0, 0.5 if dtype == torch.float32 else GREY_LEVEL}
    state = generator(6)
    side = (torch.rand(n, generator=state) * 0.5 * min(size)).round()
    assert set(side.tolist()) == set(range(min(size) // 2 + 1))
    centre = torch.rand(n, 2, generator=state) * torch.tensor(size)
    edges = (centre - side[:, None] / 2).round()
    inside = [
        (torch.arange(length) >= edges[:, axis, None]) & (torch.arange(length) < (edges[:, axis] + side)[:, None])
        for axis, length in enumerate(size)
    ]
    painted = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    assert torch.equal(out > 0, painted.expand_as(out))


def test_area_of_cutout_is_that_of_squares_cut_at_the_edge() -> None:
    area = (Augment(["cutout"])(torch.zeros(4000, 1, 64, 64), generator=generator(2)) > 0).double().mean((1, 2, 3))
    assert float(area.max()) == pytest.approx(0.25, abs=0.01)
    assert float(area.min()) == 0.0
    # at a uniform centre s - s^2 / 4 of a side s is left; the mean of its square over s from 0 to 1/2
    assert float(area.mean()) == pytest.approx(0.0685, abs=0.004)


def test_cutout_leaves_the_rest_and_a_single_pixel() -> None:
    x = torch.rand(500, 3, 12, 10, generator=generator())
    out = Augment(["cutout"])(x, generator=generator())
    assert bool(((out == x) | (out == 0.5)).all())
    assert torch.equal(Augment(["cutout"])(x[:, :, :1, :1]), x[:, :, :1, :1])


def test_real_pictures_keep_about_their_brightness_and_change() -> None:
    x = load_images("fashion-mini").train.batch(torch.arange(256))
    out = Augment(["flip", "crop", "randaugment", "cutout"])(x, generator=generator())
    assert float((out != x).flatten(1).any(1).double().mean()) > 0.99
    assert abs(float(out.double().mean()) - float(x.double().mean())) < 50


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rand-augment"], r"Augment: names is 'rand-augment'; pass one of .* \(did you mean \"randaugment\"\?\)\."),
        (["cut-out"], r"Augment: names is 'cut-out'; pass one of .* \(did you mean \"cutout\"\?\)\."),
    ],
)
def test_names_that_are_almost_right_are_corrected(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(names)


@pytest.mark.parametrize("name", ["randaugment", "cutout"])
def test_batches_of_other_kinds_are_named(name: str) -> None:
    for x, message in (
        (torch.zeros(2, 3, 8, 8, dtype=torch.int16), "x has dtype torch.int16; pass uint8 values or floats in 0..1"),
        (torch.zeros(0, 3, 8, 8), "is empty; pass at least one sample"),
        (torch.zeros(3, 8, 8), "pass a batch with 4 axes"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"Augment: .*{message}"):
            Augment([name])(x)
