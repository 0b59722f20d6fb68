"""Density weights against a loop, their edges and messages."""

from __future__ import annotations

import math

import pytest
import torch

from hardmix.losses import lds_weights

KERNELS = {
    "gaussian": lambda d, half, sigma: math.exp(-d * d / (2 * sigma * sigma)),
    "laplace": lambda d, half, sigma: math.exp(-d / sigma),
    "triangular": lambda d, half, sigma: 1 - d / (half + 1),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_weights(index: list[int], bins: int, kernel: str, size: int, sigma: float, scheme: str) -> list[float]:
    half, density = size // 2, []
    for b in index:
        total = 0.0
        for other in range(max(b - half, 0), min(b + half, bins - 1) + 1):
            count = index.count(other)
            height = min(max(count, 5), 1000) if scheme == "inverse" else math.sqrt(count)
            total += KERNELS[kernel](abs(b - other), half, sigma) * height
        density.append(total)
    scale = len(index) / sum(1 / d for d in density)
    return [scale / d for d in density]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scheme", ["inverse", "sqrt_inverse"])
def test_weights_equal_the_slow_loop(kernel: str, scheme: str) -> None:
    y = torch.cat([torch.randn(1200, generator=rng()) * 0.2, torch.randn(80, generator=rng(1)) * 20]).round() / 2
    for size, sigma in ((1, 2.0), (5, 2.0), (9, 0.8)):
        options = {"kernel": kernel, "kernel_size": size, "sigma": sigma, "scheme": scheme}
        low, span = y.min(), (y.max() - y.min()).item()
        want = slow_weights((2 * (y - low)).int().tolist(), int(2 * span) + 1, kernel, size, sigma, scheme)
        got = lds_weights(y, bin_width=0.5, **options)
        assert got.mean().item() == pytest.approx(1.0)
        assert got.tolist() == pytest.approx(want, rel=1e-6)
        index = [min(int(v / span * 7), 6) for v in (y - low).tolist()]
        got = lds_weights(y.double(), bins=7, **options)
        assert got.tolist() == pytest.approx(slow_weights(index, 7, kernel, size, sigma, scheme), rel=1e-12)


def test_weights_on_the_edge() -> None:
    for y in (torch.tensor([3]), torch.full((4,), 2.5, dtype=torch.float16)):
        for width in (None, 1.0):
            assert torch.equal(lds_weights(y, bin_width=width), torch.ones(len(y)))
    tenths = torch.arange(1, 101) / 10  # every label its own bin, however it is rounded
    for y in (tenths, torch.arange(1, 101).double() / 10, -tenths):
        weights = lds_weights(torch.cat([y, y[:1]]), bin_width=0.1, kernel_size=1, scheme="sqrt_inverse")
        assert weights[1:-1].unique().numel() == 1
        assert (weights[1] / weights[0]).item() == pytest.approx(2**0.5)


def test_labels_below_an_edge_stay_there() -> None:
    large = torch.tensor([4e6, 4e6, 4e6, 4e6 + 0.75, 4e6 + 1])  # four in one bin, one in the next
    weights = lds_weights(large, bin_width=1.0, kernel_size=1, scheme="sqrt_inverse")
    assert (weights[4] / weights[3]).item() == pytest.approx(2.0)


BAD = [
    (lambda y: lds_weights(y.tolist()), TypeError, r"lds_weights: labels is a list; pass a torch\.Tensor"),
    (lambda y: lds_weights(y[:, None]), ValueError, r"labels has shape \(8, 1\); pass a batch with 1 axes"),
    (lambda y: lds_weights(y[:0]), ValueError, r"labels has shape \(0,\) and is empty"),
    (lambda y: lds_weights(y.log()), ValueError, r"labels holds NaN or infinity in rows 0; repair or leave out"),
    (lambda y: lds_weights(y, bins=0), ValueError, r"bins is 0; pass an integer of at least 1"),
    (lambda y: lds_weights(y, bin_width=-1.0), ValueError, r"bin_width is -1\.0; pass a finite number greater than 0"),
    (lambda y: lds_weights(y, bin_width=1e-9), ValueError, r"bin_width is 1e-09 but labels go from 0 to 7, .* wider"),
    (lambda y: lds_weights(y, kernel="gauss"), ValueError, r'kernel is \'gauss\'; .*did you mean "gaussian"'),
    (lambda y: lds_weights(y, kernel_size=4), ValueError, r"kernel_size is 4; pass an odd number"),
    (lambda y: lds_weights(y, sigma=0.0), ValueError, r"sigma is 0\.0; pass a finite number greater than 0"),
    (lambda y: lds_weights(y, scheme="sqrt"), ValueError, r"scheme is 'sqrt'; pass one of 'inverse', 'sqrt_inverse'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.arange(8.0))
