"""Feature smoothing against a loop, what it lets pass, its state, gradient and messages."""

from __future__ import annotations

import math

import pytest
import torch

from hardmix.losses import FeatureSmoothing


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class SlowSmoothing:
    def __init__(self, bins: int, size: int, sigma: float, momentum: float) -> None:
        self.bins, self.half, self.sigma, self.momentum, self.stats = bins, size // 2, sigma, momentum, {}

    def update(self, column: list[float], index: list[int]) -> None:
        for b in set(index):
            z = [value for value, own in zip(column, index, strict=True) if own == b]
            mean = sum(z) / len(z)
            new = (mean, sum((value - mean) ** 2 for value in z) / max(len(z) - 1, 1))
            m = self.momentum if b in self.stats else 0.0
            old = self.stats.get(b, new)
            self.stats[b] = (m * old[0] + (1 - m) * new[0], m * old[1] + (1 - m) * new[1])

    def __call__(self, z: float, b: int) -> float:
        if b not in self.stats or self.stats[b][1] == 0:
            return z
        weight, mean, var = 0.0, 0.0, 0.0
        for d in range(-self.half, self.half + 1):
            at = b + d if self.bins > 1 else 0
            while not 0 <= at < self.bins:
                at = -at if at < 0 else 2 * (self.bins - 1) - at
            if at in self.stats:
                k = math.exp(-d * d / (2 * self.sigma**2))
                weight, mean, var = weight + k, mean + k * self.stats[at][0], var + k * self.stats[at][1]
        ratio = min(max(var / weight / self.stats[b][1], 0.1), 10)
        return (z - self.stats[b][0]) * math.sqrt(ratio) + mean / weight


@pytest.mark.parametrize("seed", range(6))
def test_smoothing_equals_the_slow_loop(seed: int) -> None:
    bins, size, momentum = (1, 2, 3, 8, 8, 12)[seed], (5, 3, 9, 1, 5, 7)[seed], (0.9, 0.0, 0.5)[seed % 3]
    module = FeatureSmoothing(3, label_range=(-2, 4), bins=bins, kernel_size=size, momentum=momentum).double()
    slow = [SlowSmoothing(bins, size, 2.0, momentum) for _ in range(3)]
    for epoch in range(4):
        z = torch.randn(9, 3, dtype=torch.float64, generator=rng(seed + 10 * epoch))
        y = torch.rand(9, generator=rng(seed + 20 * epoch)) * 7 - 2.5  # a few lie outside
        index = [min(max(int((v + 2) * bins / 6), 0), bins - 1) for v in y.tolist()]
        want = [[slow[c](z[i, c].item(), index[i]) for c in range(3)] for i in range(9)]
        torch.testing.assert_close(module(z, y), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-7)
        for c in range(3):
            slow[c].update(z[:, c].tolist(), index)
        module.update(z, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_every_label_is_in_the_bin_that_its_value_says(dtype: torch.dtype) -> None:
    whole = FeatureSmoothing(1, label_range=(0, 121), bins=121)
    shifted = FeatureSmoothing(1, label_range=(-0.5, 399.5), bins=400)
    y = (torch.arange(1600) / 4).to(dtype)
    for module, low in ((whole, 0.0), (shifted, -0.5)):
        want = [min(math.floor(v - low), module.bins - 1) for v in y.double().tolist()]
        assert module._index("test", y, y[:, None]).tolist() == want
    tenths = FeatureSmoothing(1, label_range=(0, 10), bins=100)
    if dtype in (torch.float32, torch.float64):  # others are too coarse to say
        y = (torch.arange(100, dtype=torch.float64) / 10).to(dtype)
        assert tenths._index("test", y, y[:, None]).tolist() == list(range(100))


def test_smoothing_passes_what_it_knows_nothing_of() -> None:
    module, y = FeatureSmoothing(2, label_range=(0, 10), bins=10), torch.arange(6.0)
    z = torch.randn(6, 2, generator=rng())
    assert torch.equal(module(z, y), z)  # before the first update
    module.update(torch.cat([z[:4], z[:2] + 1]), torch.tensor([0, 0, 1, 1, 2, 9]))
    assert torch.equal(module(z, y)[2:], z[2:])  # one sample in bin 2, none in 3 and 4
    assert not torch.equal(module(z, y)[:2], z[:2])
    assert torch.equal(module.eval()(z), z)
    other = FeatureSmoothing(2, label_range=(0, 10), bins=10)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(z, y), module.train()(z, y))
    assert module.to("meta")(z.to("meta"), y.to("meta")).is_meta  # no value is read
    assert "label_range=(0.0, 10.0), bins=10, momentum=0.9" in repr(other)


def test_smoothing_changes_a_spread_by_no_more_than_a_root_of_ten() -> None:
    module, y = FeatureSmoothing(1, label_range=(0, 20), bins=20, kernel_size=39, sigma=99.0), torch.arange(40) // 2
    z = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    z[20:22] *= 1000  # one wide bin among narrow ones
    module.update(z, y)
    gap = module(z, y)[1::2] - module(z, y)[::2]
    want = torch.full((20, 1), 2 * 10**0.5)
    want[10] = 2000 / 10**0.5
    torch.testing.assert_close(gap, want)


def test_a_variance_of_zero_everywhere_has_a_gradient() -> None:
    module, z = FeatureSmoothing(2, label_range=(0, 3), bins=3), torch.rand(3, 2, requires_grad=True)
    module.update(z, torch.arange(3))
    (grad,) = torch.autograd.grad(module(z, torch.arange(3)).sum(), z)
    assert torch.equal(grad, torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_smoothing_of_extremes_and_its_gradient(dtype: torch.dtype) -> None:
    module, y = FeatureSmoothing(3, label_range=(0, 4), bins=4), torch.arange(8) // 2
    z = torch.randn(8, 3, generator=rng()).to(dtype)
    z[0, 0], z[1, 0], z[2:4, 1], z[4:6, 2] = 1e4, -1e4, 3.0, torch.tensor([0.0, 1e-6], dtype=dtype)
    module.update(z, y)
    z.requires_grad_()
    out = module(z, y)
    assert out.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(z, y), out)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), z))
    assert dtype != torch.float64 or torch.autograd.gradcheck(
        lambda x: module(x, y), torch.rand_like(z, requires_grad=True)
    )


def smoothing(**options) -> FeatureSmoothing:
    return FeatureSmoothing(2, **{"label_range": (0, 8), **options})


Z = torch.ones(8, 2)
BAD = [
    (lambda y: smoothing(label_range=(1, 1)), ValueError, r"label_range is \(1, 1\); pass two different numbers"),
    (lambda y: smoothing(label_range=(3, 1)), ValueError, r"label_range is \(3, 1\); pass two numbers a <= b"),
    (lambda y: smoothing(momentum=1.5), ValueError, r"momentum is 1\.5; pass a number from 0 to 1"),
    (lambda y: smoothing(bins=0), ValueError, r"FeatureSmoothing: bins is 0; pass an integer of at least 1"),
    (lambda y: smoothing()(Z, None), ValueError, r"labels is None in training mode; pass \(N,\) labels, or call eval"),
    (lambda y: smoothing()(Z[:, :1], y), ValueError, r"features has 1 columns; pass \(N, 2\), as it was made for"),
    (lambda y: smoothing()(Z.long(), y), TypeError, r"features has dtype torch\.int64; pass floating-point features"),
    (lambda y: smoothing()(Z, y[:3]), ValueError, r"labels has 3 entries but features has 8 rows"),
    (lambda y: smoothing().update(Z / 0, y), ValueError, r"Smoothing\.update: features holds NaN or infinity in rows"),
    (lambda y: smoothing().update(Z, y.log()), ValueError, r"update: labels holds NaN or infinity in rows 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.arange(8.0))
