"""Views of a batch of volumes against slow references that handle one sample at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.data.volume_views import MOVES, PAINTS, VOLUME_VIEWS, VolumeAugment

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(
    n: int = 16, channels: int = 2, shape: tuple[int, int, int] = (6, 6, 6), dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    x = torch.randint(0, 256, (n, channels, *shape), generator=generator(99))
    return x.to(dtype) if dtype == torch.uint8 else (x / 255).to(dtype)


def hits(x: torch.Tensor, out: torch.Tensor, candidates: Any) -> list[Any]:
    """For each sample the one candidate (key -> volume) that it has become."""
    found = []
    for before, after in zip(x.numpy(), out.numpy(), strict=True):
        same = [key for key, volume in candidates(before).items() if np.array_equal(volume, after)]
        assert len(same) == 1
        found.append(same[0])
    return found


def mirrored(volume: np.ndarray) -> dict[tuple[bool, ...], np.ndarray]:
    return {
        axes: np.flip(volume, [a + 1 for a in range(3) if axes[a]])
        for axes in itertools.product((False, True), repeat=3)
    }


def moved(volume: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
    """Every window of the volume padded by an eighth of each side, by its offset."""
    pads = [min(length - 1, max(1, length // 8)) for length in volume.shape[1:]]
    padded = np.pad(volume, [(0, 0), *((pad, pad) for pad in pads)], mode="reflect")
    windows = {}
    for at in itertools.product(*(range(2 * pad + 1) for pad in pads)):
        part = tuple(slice(start, start + length) for start, length in zip(at, volume.shape[1:], strict=True))
        windows[at] = padded[(slice(None), *part)]
    return windows


def turned(volume: np.ndarray) -> dict[bytes, np.ndarray]:
    """What quarter turns in two planes can make of a cube, by content."""
    found = {volume.tobytes(): volume}
    queue = [volume]
    while queue:
        now = queue.pop()
        for plane in ((1, 2), (2, 3)):
            new = np.ascontiguousarray(np.rot90(now, axes=plane))
            if new.tobytes() not in found:
                found[new.tobytes()] = new
                queue.append(new)
    return found


def test_flip_mirrors_each_axis_on_its_own() -> None:
    x = batch(n=800, shape=(3, 4, 5))
    seen = hits(x, VolumeAugment(["flip"])(x, generator=generator()), mirrored)
    assert len(set(seen)) == 8
    assert all(70 < seen.count(axes) < 130 for axes in set(seen))


def test_flip_x_mirrors_the_last_axis_of_half_of_the_samples() -> None:
    x = batch(n=400, shape=(3, 4, 5))
    seen = hits(x, VolumeAugment(["flip-x"])(x, generator=generator()), mirrored)
    assert set(seen) == {(False, False, False), (False, False, True)}
    assert 160 < seen.count((False, False, True)) < 240


def test_crop_moves_and_reflects() -> None:
    x = batch(n=600, shape=(3, 5, 16))
    seen = set(hits(x, VolumeAugment(["crop"])(x, generator=generator()), moved))
    assert seen == set(itertools.product(range(3), range(3), range(5)))


def test_rotate_takes_each_of_the_24_turns_and_no_mirror_image() -> None:
    x = batch(n=1, shape=(3, 3, 3)).expand(960, -1, -1, -1, -1)
    possible = turned(x[0].numpy())
    assert len(possible) == 24
    out = VolumeAugment(["rotate"])(x, generator=generator())
    seen = [np.ascontiguousarray(volume).tobytes() for volume in out.numpy()]
    assert set(seen) == set(possible)
    assert all(15 < seen.count(volume) < 70 for volume in possible)


@pytest.mark.parametrize("names", [*itertools.permutations(["flip", "crop", "rotate"], 2), ("rotate", "rotate")])
def test_moves_in_a_row_are_read_once_and_agree_with_one_after_the_other(names: tuple[str, str]) -> None:
    x = batch(n=64, shape=(9, 9, 9))
    together = VolumeAugment([*names, "crop"])(x, generator=generator(4))
    state, apart = generator(4), x
    for name in (*names, "crop"):
        apart = VolumeAugment([name])(apart, generator=state)
    assert torch.equal(together, apart)


def test_views_are_applied_in_the_order_of_their_names() -> None:
    x = batch(n=8, dtype=torch.float32)
    names = ["flip", "intensity", "rotate", "noise", "crop"]
    state, apart = generator(4), x
    for name in names:
        apart = VolumeAugment([name])(apart, generator=state)
    assert torch.equal(VolumeAugment(names)(x, generator=generator(4)), apart)


def test_noise_is_normal_and_measured_by_the_sample() -> None:
    scale = torch.tensor([1.0, 50.0]).repeat(200)[:, None, None, None, None]
    x = torch.randn(400, 2, 8, 8, 8, generator=generator(1)) * scale
    noise = (VolumeAugment(["noise"])(x, generator=generator()) - x).flatten(1)
    share = noise.std(1) / x.flatten(1).std(1)
    assert 0.0 <= share.min() < 0.003
    assert 0.097 < share.max() < 0.11
    for rows in (share[::2], share[1::2]):  # as much for bright as for faint ones
        assert rows.mean().item() == pytest.approx(0.05, abs=0.006)
    unit = noise / noise.std(1, keepdim=True)
    assert unit.mean().abs() < 0.01
    assert (unit.abs() < 1.0).float().mean().item() == pytest.approx(0.683, abs=0.005)


def test_intensity_is_a_gain_and_an_offset_for_each_sample() -> None:
    x = torch.randn(300, 2, 4, 4, 4, generator=generator(1)) * 7 + 3
    out = VolumeAugment(["intensity"])(x, generator=generator())
    gains, offsets = [], []
    for before, after in zip(x.double().flatten(1).numpy(), out.double().flatten(1).numpy(), strict=True):
        gain, offset = np.polyfit(before, after, 1)
        assert np.abs(before * gain + offset - after).max() < 1e-4
        gains.append(gain)
        offsets.append(offset / before.std())
    assert 0.8 <= min(gains) < 0.81
    assert 1.19 < max(gains) <= 1.2
    assert -0.2 <= min(offsets) < -0.19
    assert 0.19 < max(offsets) <= 0.2


def test_bytes_are_rounded_and_kept_in_their_range() -> None:
    x = batch(n=64)
    x[:32] //= 128
    x[32:] = 255 - x[32:] // 128
    for name in PAINTS:
        out = VolumeAugment([name])(x, generator=generator())
        assert (out[:32] < 8).all()  # nothing wraps around
        assert (out[32:] > 190).all()


@pytest.mark.parametrize("name", VOLUME_VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_dtype_layout_and_input_are_kept(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = batch(dtype=dtype).contiguous(memory_format=layout)
    before = x.clone()
    out = VolumeAugment([name])(x, generator=generator(1))
    assert torch.equal(x, before)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    assert not torch.equal(out, x)
    plain = VolumeAugment([name])(x.contiguous(), generator=generator(1))
    assert torch.equal(out, plain)
    assert torch.equal(out, VolumeAugment([name])(x, generator=generator(1)))
    assert not torch.equal(out, VolumeAugment([name])(x, generator=generator(2)))


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), *[st.integers(1, 9)] * 3),
    names=st.lists(st.sampled_from([name for name in VOLUME_VIEWS if name != "rotate"]), max_size=4),
)
def test_any_shape(shape: tuple[int, ...], names: list[str]) -> None:
    x = torch.randint(0, 256, shape, generator=generator()).to(torch.uint8)
    out = VolumeAugment(names)(x, generator=generator())
    assert out.shape == x.shape
    if not set(names) & {"crop", *PAINTS}:
        assert torch.equal(out.flatten(2).sort(2).values, x.flatten(2).sort(2).values)


def test_names_and_no_names() -> None:
    assert set(VOLUME_VIEWS) == {*MOVES, *PAINTS} == {"flip", "flip-x", "crop", "rotate", "noise", "intensity"}
    x = batch()
    assert VolumeAugment([])(x) is x
    assert repr(VolumeAugment(["flip", "noise"])) == "VolumeAugment(['flip', 'noise'])"


@pytest.mark.parametrize(
    ("names", "x", "error", "message"),
    [
        ("flip", None, TypeError, "names is 'flip'; pass a list of names"),
        (["flips"], None, ValueError, r"names is 'flips'; pass one of .* \(did you mean \"flip\"\?\)"),
        (["flip"], torch.zeros(2, 1, 4, 4), ValueError, r"x has shape \(2, 1, 4, 4\); pass a batch with 5 axes"),
        (["flip"], torch.zeros(2, 1, 4, 4, 0), ValueError, "is empty; pass at least one sample"),
        (
            ["flip"],
            torch.zeros(2, 1, 4, 4, 4).long(),
            TypeError,
            "x has dtype torch.int64; pass uint8 or floating-point",
        ),
        (
            ["rotate"],
            torch.zeros(2, 1, 4, 4, 5),
            ValueError,
            r"\(2, 1, 4, 4, 5\), but rotate needs cubes; leave it out",
        ),
    ],
)
def test_bad_arguments(names: Any, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"VolumeAugment: .*{message}"):
        VolumeAugment(names)(x)


def test_the_generator_lives_on_the_cpu() -> None:
    with pytest.raises(TypeError, match=r"VolumeAugment: generator is a int; pass a torch.Generator or None"):
        VolumeAugment(["flip"])(batch(), generator=3)  # type: ignore[arg-type]
