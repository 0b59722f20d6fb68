"""ConR against its two sets, one anchor at a time, its edges and its messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.losses import ConRLoss, conr_loss

TIED = [3.0, 1.0, 2.0, 2.0, 5.0, 3.0, 9.0, 2.0, 4.0]
GUESS = [2.5, 2.0, 6.0, 2.0, 2.5, 3.0, 8.0, 4.5, 4.0]


def batch(n: int = 9, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow(
    z: list[list[float]], y: list[float], p: list[float], t: float, window: float, eta: float
) -> list[float | None]:
    """Loss of every row as an anchor; None where there is no positive or no negative."""
    losses: list[float | None] = []
    for i in range(len(z)):
        pulled, denominator, pushed = [], 0.0, 0
        for j in range(len(z)):
            if j == i:
                continue
            lengths = math.hypot(*z[i]) * math.hypot(*z[j])
            s = sum(a * b for a, b in zip(z[i], z[j], strict=True)) / lengths if lengths else 0.0
            if abs(y[i] - y[j]) <= window:
                pulled.append(s / t)
                denominator += math.exp(s / t)
            elif abs(p[i] - p[j]) <= window:
                pushed += 1
                denominator += math.exp(eta * abs(y[i] - y[j])) * math.exp(s / t)
        defined = pulled and pushed
        losses.append(-sum(math.log(math.exp(s) / denominator) for s in pulled) / len(pulled) if defined else None)
    return losses


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d, views = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5)), data.draw(st.integers(1, 2))
    ticks = st.integers(-4, 4).map(float) if data.draw(st.booleans()) else st.floats(-5, 5, width=16)
    labels = data.draw(st.lists(ticks, min_size=n, max_size=n))
    guesses = data.draw(st.lists(ticks, min_size=n * views, max_size=n * views))
    z = batch(n * views, d, data.draw(st.integers(0, 10**6)))
    if data.draw(st.booleans()):
        z[0] = 0.0
    t, eta = data.draw(st.sampled_from([0.07, 0.5])), data.draw(st.sampled_from([0.0, 0.01, 0.5]))
    window = data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    want = slow(z.tolist(), labels * views, guesses, t, window, eta)
    p = numbers(guesses)
    if views == 2:
        z, p = z.view(views, n, d).movedim(0, 1), p.view(views, n).T
    options = {"temperature": t, "window": window, "eta": eta}
    per = conr_loss(z, numbers(labels), p, reduction="none", **options)
    assert per.shape == p.shape
    assert (per.T.flatten() if views == 2 else per).tolist() == pytest.approx(
        [v or 0.0 for v in want], rel=1e-11, abs=1e-12
    )
    defined = [v for v in want if v is not None]
    mean = sum(defined) / len(defined) if defined else 0.0
    assert conr_loss(z, numbers(labels), p, **options).item() == pytest.approx(mean, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("window", "reduction"), [(0.0, "none"), (1.0, "mean"), (2.0, "none"), (2.0, "sum")])
def test_gradcheck(window, reduction) -> None:
    z, y, p = batch(9, 3), numbers(TIED), numbers(GUESS)
    z[3] = z[2] * 0.7
    assert torch.autograd.gradcheck(
        lambda z: conr_loss(z, y, p, window=window, temperature=0.2, reduction=reduction), z.requires_grad_()
    )


@pytest.mark.parametrize(
    ("labels", "guesses"),
    [([3.0], [1.0]), ([1.0, 1.5, 2.0], [0.0] * 3), ([1.0, 1.0, 9.0], [1.0, 1.0, 9.0]), ([1.0, 5.0, 9.0], [0.0] * 3)],
    ids=["alone", "one window", "told apart", "no positive"],
)
def test_without_a_positive_and_a_negative_it_is_zero_and_joined_to_the_graph(labels, guesses) -> None:
    z = batch(len(labels)).requires_grad_()
    loss = conr_loss(z, numbers(labels), numbers(guesses))
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


def test_predictions_get_no_gradient_and_may_have_a_last_axis() -> None:
    z, y, p = batch(), numbers(TIED), numbers(GUESS).requires_grad_()
    assert not conr_loss(z, y, p).requires_grad
    assert conr_loss(z, y, p[:, None]) == conr_loss(z, y, p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1e3])
def test_extremes_are_finite_and_autocast_changes_nothing(dtype, temperature) -> None:
    z, p = batch(12, 6).to(dtype), torch.zeros(12, dtype=dtype)
    z[0], z[1], z[2], z[5], z[6] = 0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, z[4], -z[4]
    for labels in (torch.arange(12.0), torch.zeros(12), torch.arange(12) // 3 * 1e-6, torch.arange(12) % 2 * 1e6):
        z = z.detach().requires_grad_()
        loss = conr_loss(z, labels, p, temperature=temperature)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(conr_loss(z, labels, p, temperature=temperature), loss)


def test_nan_stays_nan() -> None:
    z, y, p = batch(), numbers(TIED), numbers(GUESS)
    assert conr_loss(z * math.nan, y, p).isnan()
    assert conr_loss(z, y, p * math.nan).isnan()
    for value in (math.nan, math.inf, -math.inf):
        assert conr_loss(z, y, torch.where(torch.arange(len(p)) == 1, value, p)).isnan()


def test_module_remembers_and_equals_the_function() -> None:
    options = {"temperature": 0.3, "window": 2.0, "eta": 0.2, "reduction": "sum"}
    inputs = batch(), numbers(TIED), numbers(GUESS)
    assert ConRLoss(**options)(*inputs) == conr_loss(*inputs, **options)
    assert repr(ConRLoss()) == "ConRLoss(temperature=0.07, window=1, eta=0.01)"


loss = conr_loss
BAD = [
    (lambda z, y: loss(z, y[:4], y), ValueError, r"labels has 4 entries but embeddings has 9 rows; pass one entry"),
    (lambda z, y: loss(z, y, y[:4]), ValueError, r"predictions has 4 entries but embeddings has 9 rows; pass one"),
    (lambda z, y: loss(z, y, y.to("meta")), ValueError, r"predictions is on meta but embeddings is on cpu; move both"),
    (lambda z, y: loss(z[:, None].expand(-1, 2, -1), y, y), ValueError, r"predictions has shape \(9,\).*\(9, 2\)\."),
    (lambda z, y: loss(z, y, y > 2), ValueError, r"predictions has .* dtype torch\.bool; pass one number per row"),
    (lambda z, y: loss(z, y, y, temperature=0.0), ValueError, r"temperature is 0\.0; pass a finite number greater"),
    (lambda z, y: loss(z, y, y, window=-1.0), ValueError, r"window is -1\.0; pass a finite number of at least 0"),
    (lambda z, y: ConRLoss(eta=math.nan), ValueError, r"ConRLoss: eta is nan; pass a finite number of at least 0"),
    (lambda z, y: ConRLoss(reduction="avg"), ValueError, r"reduction is 'avg'; pass one of 'none', 'mean', 'sum'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(batch(), numbers(TIED))
