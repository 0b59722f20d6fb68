"""Views of a batch against slow references that handle one sample and one pixel at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data import Augment, Normalize
from hardmix.data.views import MOVES, PAINTS

NAMES = [*MOVES, *PAINTS]
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(
    n: int = 16, channels: int = 3, height: int = 16, width: int = 24, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    x = torch.randint(0, 256, (n, channels, height, width), generator=generator(99))
    return x.to(dtype) if dtype == torch.uint8 else (x / 255).to(dtype)


def windows(image: np.ndarray, mode: str) -> dict[tuple[int, int], np.ndarray]:
    """Every window that padding by an eighth and cropping can give, by its offset."""
    _, height, width = image.shape
    pads = [max(1, height // 8), max(1, width // 8)]
    padded = np.pad(image, [(0, 0), (pads[0],) * 2, (pads[1],) * 2], mode=mode)  # type: ignore[call-overload]
    offsets = [(dy, dx) for dy in range(2 * pads[0] + 1) for dx in range(2 * pads[1] + 1)]
    return {(dy, dx): padded[:, dy : dy + height, dx : dx + width] for dy, dx in offsets}


def test_flip_mirrors_about_half_of_the_samples() -> None:
    x = batch(n=400, height=5, width=7)
    out = Augment(["flip"])(x, generator=generator())
    mirrored = [np.array_equal(b, a[:, :, ::-1]) for a, b in zip(x.numpy(), out.numpy(), strict=True)]
    same = [np.array_equal(b, a) for a, b in zip(x.numpy(), out.numpy(), strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 160 < sum(mirrored) < 240


@pytest.mark.parametrize(("name", "mode"), [("crop", "reflect"), ("crop-zero", "constant")])
def test_crop_gives_windows_of_the_padded_image(name: str, mode: str) -> None:
    x = batch(n=300)
    out = Augment([name])(x, generator=generator())
    seen = set()
    for before, after in zip(x.numpy(), out.numpy(), strict=True):
        hits = [at for at, window in windows(before, mode).items() if np.array_equal(window, after)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert {dy for dy, _ in seen} == set(range(5))
    assert {dx for _, dx in seen} == set(range(7))
    assert len(seen) == 35


@pytest.mark.parametrize("names", [["flip", "crop"], ["crop", "flip"], ["flip", "crop-zero"], ["crop-zero", "flip"]])
def test_moves_in_a_row_are_read_once_and_agree_with_one_after_the_other(names: list[str]) -> None:
    x = batch(n=64)
    together = Augment(names)(x, generator=generator(4))
    state = generator(4)
    one = Augment(names[:1])(x, generator=state)
    assert torch.equal(together, Augment(names[1:])(one, generator=state))


def test_crop_of_a_crop_reflects_and_blanks_again() -> None:
    x = batch(n=64)
    for names in (["crop", "crop"], ["crop-zero", "crop-zero"], ["crop-zero", "crop"], ["crop", "crop-zero"]):
        state = generator(5)
        one = Augment(names[:1])(x, generator=state)
        expected = Augment(names[1:])(one, generator=state)
        assert torch.equal(Augment(names)(x, generator=generator(5)), expected)


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """The value at pixel coordinates (y, x), clamped to the border."""
    _, height, width = image.shape
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    upper = (1 - u) * image[:, top, left] + u * image[:, top, right]
    return (1 - v) * upper + v * ((1 - u) * image[:, bottom, left] + u * image[:, bottom, right])


def test_resized_crop_scales_the_drawn_box_up() -> None:
    x = batch(n=5, height=10, width=14, dtype=torch.float64)
    out = Augment(["resized-crop"])(x, generator=generator(2))
    state = generator(2)
    area = torch.rand(5, generator=state) * 0.8 + 0.2
    ratio = torch.rand(5, generator=state) * (math.log(4 / 3) - math.log(3 / 4)) + math.log(3 / 4)
    place = torch.rand(5, 2, generator=state)
    for n in range(5):
        aspect = math.exp(ratio[n])  # width to height, in pixels
        width = min(14.0, math.sqrt(float(area[n]) * 140 * aspect))
        height = min(10.0, math.sqrt(float(area[n]) * 140 / aspect))
        left, top = float(place[n, 0]) * (14 - width), float(place[n, 1]) * (10 - height)
        expected = np.empty((3, 10, 14))
        for i in range(10):
            for j in range(14):
                at = top + (i + 0.5) * height / 10 - 0.5, left + (j + 0.5) * width / 14 - 0.5
                expected[:, i, j] = bilinear(x[n].numpy(), *at)
        assert np.allclose(out[n].numpy(), expected, atol=2e-5)


def test_resized_crop_boxes_have_the_documented_area_and_lie_inside() -> None:
    rows = torch.arange(64.0).view(1, 1, 64, 1).expand(500, 1, 64, 64) / 64
    ramp = torch.cat([rows, rows.transpose(2, 3)], 1).contiguous()
    out = Augment(["resized-crop"])(ramp, generator=generator())
    height = (out[:, 0, -2, 5] - out[:, 0, 1, 5]) * 64 / 61
    width = (out[:, 1, 5, -2] - out[:, 1, 5, 1]) * 64 / 61
    area = height * width
    assert float(area.min()) > 0.18
    assert float(area.max()) < 1.05
    assert abs(float(area.mean()) - 0.6) < 0.05
    assert 0.7 < float((width / height).min()) < 0.8 < 1.25 < float((width / height).max()) < 1.4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_color_is_brightness_then_contrast_then_saturation(dtype: torch.dtype, channels: int) -> None:
    x = batch(n=6, channels=channels, height=4, width=5, dtype=dtype)
    out = Augment(["color"])(x, generator=generator(8))
    factor = torch.rand((3, 6, 1, 1, 1), generator=generator(8)).flatten(1).double().numpy() * 0.4 + 0.8
    top = 255.0 if dtype == torch.uint8 else 1.0
    weight = np.array([0.299, 0.587, 0.114] if channels == 3 else [1.0])
    for n in range(6):
        image = np.clip(x[n].double().numpy() * factor[0, n], 0, top)
        mean = np.mean(np.einsum("chw,c->hw", image, weight))
        image = np.clip(mean + factor[1, n] * (image - mean), 0, top)
        if channels == 3:
            gray = np.einsum("chw,c->hw", image, weight)
            image = np.clip(gray + factor[2, n] * (image - gray), 0, top)
        assert np.abs(out[n].double().numpy() - image).max() <= (0.5001 if dtype == torch.uint8 else 1e-6)


def test_erase_paints_one_box_with_the_mean() -> None:
    x = batch(n=400, channels=1, height=20, width=30)
    out = Augment(["erase"])(x, generator=generator())
    areas = []
    for before, after in zip(x[:, 0].numpy(), out[:, 0].numpy(), strict=True):
        mean = round(float(before.mean(dtype=np.float64)))
        rows, cols = np.nonzero(before != after)
        if len(rows) == 0:
            areas.append(0)
            continue
        box = np.zeros_like(before, dtype=bool)
        box[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] = True
        assert (after[box] == mean).all()
        assert np.array_equal(after[~box], before[~box])
        areas.append(box.sum() / 600)
    hit = [area for area in areas if area]
    assert 0.4 < len(hit) / 400 < 0.6
    assert min(hit) > 0.01
    assert max(hit) < 0.36
    assert abs(np.mean(hit) - 0.175) < 0.03


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_shape_and_memory_format_are_kept_and_the_input_is_not_written(name: str, dtype: torch.dtype) -> None:
    x = batch(dtype=dtype)
    kept = x.clone()
    out = Augment([name])(x, generator=generator(1))
    assert torch.equal(x, kept)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert out.is_contiguous()
    assert not torch.equal(out, x)
    last = Augment([name])(x.contiguous(memory_format=torch.channels_last), generator=generator(1))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(last.double(), out.double(), atol=1e-6)
    if dtype.is_floating_point:
        assert 0.0 <= float(out.min()) <= float(out.max()) <= 1.0


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(st.sampled_from(NAMES), max_size=4),
    n=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 3, 4]),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_views_of_any_shape_are_repeatable_and_stay_in_range(
    names: list[str], n: int, channels: int, height: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    x = batch(n, channels, height, width, dtype)
    augment = Augment(names)
    out = augment(x, generator=generator(seed))
    assert torch.equal(out, augment(x, generator=generator(seed)))
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert 0 <= float(out.min()) <= float(out.max()) <= (255 if dtype == torch.uint8 else 1 + 1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_their_own_draws(name: str) -> None:
    x = batch(n=1).expand(32, -1, -1, -1).contiguous()
    out = Augment([name])(x, generator=generator())
    assert len({image.tobytes() for image in out.numpy()}) > 1


def test_nothing_but_the_generator_is_drawn_from() -> None:
    before = torch.get_rng_state()
    Augment(NAMES)(batch(), generator=generator())
    assert torch.equal(before, torch.get_rng_state())


def test_no_names_change_nothing() -> None:
    x = batch()
    assert torch.equal(Augment([])(x), x)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["flip", "corp"], r"Augment: names is 'corp'; pass one of 'flip', .* \(did you mean \"crop\"\?\)\."),
        (["rotate"], "Augment: names is 'rotate'; pass one of"),
        ("flip", "Augment: names is 'flip'; pass a list of names"),
        ([3], "Augment: names is 3; pass one of"),
    ],
)
def test_unknown_names_are_named(names: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Augment(names)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 8, 8), r"x has shape \(3, 8, 8\); pass a batch with 4 axes"),
        (torch.zeros(0, 3, 8, 8), "is empty"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.long), "x has dtype torch.int64; pass uint8 values or floats"),
        (np.zeros((2, 3, 8, 8)), "x is a ndarray; pass a torch.Tensor"),
    ],
)
def test_bad_batches_are_named(x: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Augment(["flip"])(x)
    with pytest.raises((ValueError, TypeError), match=message):
        Normalize([0.5] * 3, [0.5] * 3)(x)


def test_a_generator_has_to_be_one() -> None:
    bad: Any = 7
    with pytest.raises(TypeError, match="Augment: generator is a int"):
        Augment(["flip"])(batch(), generator=bad)


def test_normalize_has_the_values_of_the_formula() -> None:
    x = batch()
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected = (x.numpy().astype(np.float64) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    kept = x.clone()
    out = Normalize(mean, std)(x)
    assert out.dtype == torch.float32
    assert np.allclose(out.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)
    as_float = Normalize(mean, std)(x.double() / 255)
    assert as_float.dtype == torch.float64
    assert np.allclose(as_float.numpy(), expected, atol=1e-6)


def test_a_normalised_data_set_has_mean_zero_and_deviation_one() -> None:
    from hardmix.data import load_images

    data = load_images("fashion-mini")
    out = Normalize(data.mean, data.std)(data.train.batch(torch.arange(len(data.train))))
    assert abs(float(out.mean())) < 1e-5
    assert abs(float(out.std()) - 1) < 1e-5


def test_normalize_moves_with_the_model_but_is_not_saved() -> None:
    normalize = Normalize([0.5], [0.5])
    assert not normalize.state_dict()
    assert normalize.to("meta")._mean.device.type == "meta"


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.5, 0.5], "mean has 1 entries and std 2; pass one per channel"),
        ([], [], "mean has 0 entries and std 0"),
        ([0.5], [0.0], r"std is 0\.0; pass a finite number greater than 0"),
        ([float("nan")], [1.0], "mean is nan"),
    ],
)
def test_bad_statistics_are_named(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Normalize: {message}"):
        Normalize(mean, std)


def test_another_number_of_channels_is_named() -> None:
    with pytest.raises(ValueError, match="Normalize: x has 3 channels but mean has 1; pass one per channel"):
        Normalize([0.5], [0.5])(batch())
