"""The mixture of the training labels against a loop, and its edges and messages."""

from __future__ import annotations

import math

import pytest
import torch

from hardmix.losses import gai_loss, label_mixture


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_fit(y: list[float], k: int, steps: int) -> list[tuple[float, float, float]]:
    n, distinct = len(y), sorted(set(y))
    center = sum(y) / n
    spread = sum((v - center) ** 2 for v in y) / n
    w, v, mu = [1 / k] * k, [spread / k**2] * k, []
    for c in range(k):
        at = (c + 0.5) / k * (len(distinct) - 1)
        low = int(at)
        mu.append(distinct[low] + (at - low) * (distinct[min(low + 1, len(distinct) - 1)] - distinct[low]))
    for _ in range(steps):
        r = []
        for value in y:
            p = [w[c] * math.exp(-((value - mu[c]) ** 2) / (2 * v[c])) / math.sqrt(v[c]) for c in range(k)]
            r.append([q / sum(p) for q in p])
        for c in range(k):
            mass = sum(row[c] for row in r)
            w[c], mu[c] = mass / n, sum(row[c] * value for row, value in zip(r, y, strict=True)) / mass
            v[c] = sum(row[c] * (value - mu[c]) ** 2 for row, value in zip(r, y, strict=True)) / mass
            v[c] = max(v[c], 1e-6 * spread)
    return sorted(zip(w, mu, v, strict=True), key=lambda part: part[1])


def test_mixture_is_fitted_like_the_slow_loop() -> None:
    y = torch.cat([torch.randn(30, generator=rng()), torch.randn(15, generator=rng(1)) * 0.5 + 6]).double()
    crossing = torch.tensor([3, 4, 11, 3, 12, 4, 13, 2]).double()  # two means change places on the way
    for labels, k in ((y, 1), (y, 2), (y, 4), ((y * 2).round(), 3), (crossing, 3)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = label_mixture(labels, k, max_iterations=60, tolerance=0.0)
        want = torch.tensor(slow_fit(labels.tolist(), k, 60), dtype=torch.float64).T
        torch.testing.assert_close(torch.stack(list(got)), want, rtol=1e-9, atol=1e-12)
    fit = label_mixture(y.float(), 2)
    assert all(part.dtype == torch.float32 for part in fit)
    assert fit.weights.tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-3)
    same = label_mixture(torch.full((5,), 7), 2)
    assert [part.tolist() for part in same] == [[0.5, 0.5], [7.0, 7.0], [0.0, 0.0]]
    assert gai_loss(torch.tensor([7.0]), torch.tensor([7.0]), noise_sigma=1.0, mixture=same).item() == 0.0


BAD = [
    (lambda y: label_mixture(y, 7), ValueError, r"components is 7 but labels has 6 entries; pass at most"),
    (lambda y: label_mixture(y, 0), ValueError, r"components is 0; pass an integer of at least 1"),
    (lambda y: label_mixture(y, 1, tolerance=-1.0), ValueError, r"tolerance is -1\.0; pass a finite number of at"),
    (lambda y: label_mixture(y[None], 1), ValueError, r"label_mixture: labels has shape \(1, 6\); pass a batch"),
    (lambda y: label_mixture(y / 0, 1), ValueError, r"labels holds NaN or infinity in rows 0, 1"),
    (lambda y: label_mixture(y, True), TypeError, r"components is True; pass an integer of at least 1"),
    (lambda y: label_mixture(y.tolist(), 2), TypeError, r"labels is a list; pass a torch\.Tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.arange(1.0, 7.0))
