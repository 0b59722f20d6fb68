"""Views of series against slow references that handle one sample, channel and position at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data.series_views import SERIES_VIEWS, SeriesAugment
from hardmix.data.views import Augment

NAMES = list(SERIES_VIEWS)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 200, channels: int = 3, length: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Channels of very different units: their offset is 100 times their spread."""
    unit = torch.tensor([0.01, 1.0, 30.0, 5.0])[:channels, None]
    return ((torch.randn(n, channels, length, generator=generator(99)) + 100.0) * unit).to(dtype)


def test_crop_gives_windows_of_the_reflected_series() -> None:
    x = batch(length=24)
    out = SeriesAugment(["crop"])(x, generator=generator())
    seen = set()
    for before, after in zip(x.numpy(), out.numpy(), strict=True):
        padded = np.pad(before, [(0, 0), (3, 3)], mode="reflect")
        hits = [at for at in range(7) if np.array_equal(padded[:, at : at + 24], after)]
        assert len(hits) == 1
        seen.update(hits)
    assert seen == set(range(7))
    assert torch.equal(out, Augment(["crop"])(x[:, :, None], generator=generator())[:, :, 0])


def test_jitter_is_a_tenth_of_each_channels_own_spread() -> None:
    x = batch(n=50, length=400)
    x[:, 1] *= torch.linspace(0.5, 2, 50)[:, None]  # samples differ in their spread
    noise = SeriesAugment(["jitter"])(x, generator=generator()).double() - x
    for sample, drawn in zip(x.double().numpy(), noise.numpy(), strict=True):
        for before, after in zip(sample, drawn, strict=True):
            assert after.std() == pytest.approx(0.1 * before.std(), rel=0.2)
            assert abs(after.mean()) < 0.03 * before.std()
    flat = noise.flatten(1)
    assert flat.corrcoef().fill_diagonal_(0.0).abs().max() < 0.2  # every sample its own
    constant = torch.full((2, 1, 9), 7.3)
    assert torch.equal(SeriesAugment(["jitter"])(constant, generator=generator()), constant)


def test_scale_stretches_each_channel_about_its_mean() -> None:
    x = batch(dtype=torch.float64)
    out = SeriesAugment(["scale"])(x, generator=generator())
    factors = []
    for before, after in zip(x.numpy(), out.numpy(), strict=True):
        for channel, scaled in zip(before, after, strict=True):
            mean = channel.mean()
            at = np.abs(channel - mean).argmax()
            factor = (scaled[at] - mean) / (channel[at] - mean)
            np.testing.assert_allclose(scaled, mean + factor * (channel - mean), rtol=1e-6)
            factors.append(factor)
    assert len({round(factor, 6) for factor in factors}) > 590  # of 600 channels
    assert 0.799 < min(factors) < 0.81
    assert 1.19 < max(factors) < 1.201


@pytest.mark.parametrize(("length", "most"), [(40, 10), (7, 1), (3, 1), (1, 1)])
def test_mask_puts_the_mean_into_one_span_of_all_channels(length: int, most: int) -> None:
    x = batch(n=400, length=length, dtype=torch.float64)
    out = SeriesAugment(["mask"])(x, generator=generator())
    spans, starts = set(), set()
    for before, after in zip(x.numpy(), out.numpy(), strict=True):
        mean = before.mean(1, keepdims=True)
        hit = np.isclose(after, mean, rtol=1e-6)
        inside = np.flatnonzero(hit.all(0) & ((after != before).any(0) | (length == 1)))
        assert np.array_equal(inside, np.arange(inside[0], inside[0] + len(inside)))
        outside = np.setdiff1d(np.arange(length), inside)
        assert np.array_equal(after[:, outside], before[:, outside])
        spans.add(len(inside))
        starts.update(inside.tolist())
    assert spans == set(range(1, most + 1))
    assert starts == set(range(length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_new_finite_and_of_the_same_kind(name: str, dtype: torch.dtype) -> None:
    x = batch(n=16, dtype=dtype)
    before = x.clone()
    out = SeriesAugment([name])(x, generator=generator())
    assert torch.equal(x, before)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert bool(out.isfinite().all())
    assert not torch.equal(out, x)
    assert torch.equal(out, SeriesAugment([name])(x, generator=generator()))
    assert not torch.equal(out, SeriesAugment([name])(x, generator=generator(1)))


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 5),
    channels=st.integers(1, 4),
    length=st.integers(1, 30),
    names=st.lists(st.sampled_from(NAMES), max_size=5),
)
def test_any_size_and_order(n: int, channels: int, length: int, names: list[str]) -> None:
    x = batch(n, channels, length)
    before = x.clone()
    out = SeriesAugment(names)(x, generator=generator())
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert bool(out.isfinite().all())
    if not names:
        assert torch.equal(out, x)


def test_views_follow_each_other() -> None:
    x = batch()
    g = generator()
    expected = SERIES_VIEWS["mask"](SERIES_VIEWS["jitter"](x, g), g)
    assert torch.equal(SeriesAugment(["jitter", "mask"])(x, generator=generator()), expected)
    assert repr(SeriesAugment(["jitter", "mask"])) == "SeriesAugment(['jitter', 'mask'])"


@pytest.mark.parametrize(
    ("names", "x", "error", "message"),
    [
        ("crop", None, TypeError, "names is 'crop'; pass a list of names"),
        (["flip"], None, ValueError, "names is 'flip'; pass one of 'crop', 'jitter', 'scale', 'mask'"),
        (["jiter"], None, ValueError, r"\(did you mean \"jitter\"\?\)"),
        (["crop"], torch.zeros(2, 3), ValueError, r"x has shape \(2, 3\); pass a batch with 3 axes"),
        (["crop"], torch.zeros(2, 3, 4, 4), ValueError, "pass a batch with 3 axes"),
        (["crop"], torch.zeros(2, 3, 4).int(), TypeError, "x has dtype torch.int32; pass floating-point series"),
        (["crop"], torch.zeros(0, 3, 4), ValueError, "is empty; pass at least one sample"),
        (["crop"], [[[1.0]]], TypeError, "x is a list; pass a torch.Tensor"),
    ],
)
def test_bad_arguments_are_named(names: Any, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"SeriesAugment: .*{message}"):
        SeriesAugment(names)(x)


def test_the_generator_is_a_cpu_one() -> None:
    with pytest.raises(TypeError, match=r"SeriesAugment: generator is a int; pass a torch.Generator or None"):
        SeriesAugment(["crop"])(batch(), generator=3)  # type: ignore[arg-type]
