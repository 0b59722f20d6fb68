"""SupReMix from the Gram matrix against mixtures that are really formed, its properties, its edges and its messages."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hardmix.kernels import label_contrast as kernel
from hardmix.losses import (
    SupConLoss,
    SupReMixLoss,
    rank_n_contrast_loss,
    ranksim_loss,
    supcon_loss,
    supremix_loss,
)

from .slow_contrast import WEIGHTS, supremix_mean, supremix_rows

TIED = [3.0, 1.0, 2.0, 2.0, 5.0, 3.0, 9.0, 2.0, 4.0]
APART = [0.31, 2.9, 1.17, -4.0, 1.9, 2.2, 0.5, 7.7, 1.2]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 9, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=rng(seed))


def shares(n: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(n, n, dtype=torch.float64, generator=rng(seed)) * 0.9 + 0.05


def value_and_gradient(loss, z: torch.Tensor) -> tuple[float, torch.Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z)
    (grad,) = torch.autograd.grad(value, z)
    return value.item(), grad


@pytest.fixture(params=["whole", "tiled", "tied"])
def tiles(request, monkeypatch):
    """The Gram matrix whole, and in blocks so small that every loop goes round several times; sums label by label
    wherever they are possible."""
    monkeypatch.setattr(kernel, "WORTH_TYING", 100.0 if request.param == "tied" else 0.0)
    if request.param != "whole":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "BOX_VALUES", 8)
        monkeypatch.setattr(kernel, "SMALL_BOX", 4)
        monkeypatch.setattr(kernel, "BLOCK_VALUES", 40)


@pytest.mark.parametrize("labels", [TIED, APART], ids=["tied", "apart"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("mix_neg", "mix_pos"), [(True, True), (True, False), (False, True), (False, False)])
def test_value_and_gradient_are_those_of_formed_mixtures(labels, normalize, detach, mix_neg, mix_pos, tiles) -> None:
    z, lam = batch(), shares(9)
    common = {"temperature": 0.4, "window": 2.5, "mix_neg": mix_neg, "mix_pos": mix_pos}
    want, slope = value_and_gradient(
        lambda z: supremix_mean(z, labels, lam, normalize=normalize, detach=detach, **common), z
    )
    options = {"normalize_mixtures": normalize, "detach_mixtures": detach, "lam": lam, **common}
    got, grad = value_and_gradient(lambda z: supremix_loss(z, torch.tensor(labels, dtype=torch.float64), **options), z)
    assert got == pytest.approx(want, rel=1e-12)
    assert (grad - slope).abs().max() <= 1e-11


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5))
    ticks = st.integers(-4, 4).map(float) if data.draw(st.booleans()) else st.floats(-5, 5, width=16)
    labels = data.draw(st.lists(ticks, min_size=n, max_size=n))
    seed, window = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.3, math.inf]))
    common = {
        "temperature": data.draw(st.sampled_from([0.05, 0.5, 2.0])),
        "window": window,
        "weighting": data.draw(st.sampled_from(sorted(WEIGHTS))),
        "label_scale": data.draw(st.sampled_from([1.0, 0.3, 20.0])),
    }
    z, lam = batch(n, d, seed), shares(n, seed)
    want, slope = value_and_gradient(lambda z: supremix_mean(z, labels, lam, **common), z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = torch.tensor(labels, dtype=torch.float64)
        got, grad = value_and_gradient(lambda z: supremix_loss(z, target, lam=lam, **common), z)
    assert got == pytest.approx(want, rel=1e-11, abs=1e-11)
    assert (grad - slope).abs().max() <= 1e-8 * max(1.0, float(slope.abs().max()))


@pytest.mark.parametrize("labels", [TIED, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]], ids=["tied", "lonely ends"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(labels, normalize, reduction) -> None:
    z = batch().requires_grad_()
    z.data[3] = z.data[2] * 0.7  # the same direction twice

    def loss(z):
        options = {"window": 2.5, "normalize_mixtures": normalize, "reduction": reduction}
        return supremix_loss(z, torch.tensor(labels), lam=shares(9), **options)

    assert torch.autograd.gradcheck(loss, z, eps=1e-6, atol=1e-5, rtol=1e-3)


def test_views_are_rows_of_their_own() -> None:
    z, labels = batch(8).view(2, 4, 4), torch.tensor([2.0, 1.0, 3.0, 2.0])
    lam = shares(8)
    got = supremix_loss(z.movedim(0, 1), labels, window=1.5, lam=lam, reduction="none")  # (N, V)
    want = supremix_loss(z.flatten(0, 1), labels.repeat(2), window=1.5, lam=lam, reduction="none")
    assert got.shape == (4, 2)
    assert torch.equal(got, want.view(2, 4).T)
    assert supremix_loss(z.movedim(0, 1), labels, window=1.5, lam=lam) == pytest.approx(float(want.mean()))


def test_anchors_without_positives_are_skipped_but_stay_negatives() -> None:
    labels = [1.0, 2.0, 3.0, 10.0]
    z, lam = batch(4), shares(4)
    rows = supremix_rows(z, labels, lam, temperature=0.5, window=1.5)
    assert [row is None for row in rows] == [True, False, True, True]
    per = supremix_loss(z, torch.tensor(labels), window=1.5, lam=lam, reduction="none")
    assert per.tolist() == [0.0, pytest.approx(float(rows[1])), 0.0, 0.0]
    assert supremix_loss(z, torch.tensor(labels), window=1.5, lam=lam) == pytest.approx(float(rows[1]))


def test_no_positive_anywhere_is_zero_and_joined_to_the_graph() -> None:
    for z, labels in ((batch(1), [3.0]), (batch(2), [3.0, 4.0])):
        z.requires_grad_()
        loss = supremix_loss(z, torch.tensor(labels), window=9.0)
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0.0
        assert torch.equal(grad, torch.zeros_like(z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.5, 1e3])
def test_extremes_are_finite(dtype, temperature) -> None:
    top = torch.finfo(dtype).max
    z = torch.randn(12, 6, generator=rng()).to(dtype)
    z[0], z[1], z[2] = 0.0, top, -top
    z[5] = z[4]
    z[6] = -z[4]
    for labels in (torch.arange(12.0), torch.zeros(12), torch.arange(12) // 3 * 1e-6, torch.arange(12) % 2 * 1e6):
        z = z.detach().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = supremix_loss(z, labels, window=5.0, temperature=temperature, generator=rng())
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_low_precision_is_float64_of_the_same_input(dtype, tolerance, temperature) -> None:
    z, labels = torch.randn(40, 16, generator=rng()).to(dtype), torch.randint(12, (40,), generator=rng()).float()
    options = {"window": 3.0, "temperature": temperature, "lam": shares(40)}
    got = supremix_loss(z, labels, **options)
    assert got.item() == pytest.approx(supremix_loss(z.double(), labels, **options).item(), rel=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(supremix_loss(z, labels, **options), got)


def test_opposite_rows_half_way_have_no_direction() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = supremix_loss(z, torch.tensor([1.0, 2.0, 3.0]), window=1.5, mix_neg=False)  # lambda = 1/2 of z_0 and z_2
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_nan_stays_nan() -> None:
    z = batch()
    z[3, 1] = math.nan
    assert supremix_loss(z, torch.tensor(TIED), window=2.0).isnan()


def test_invariances() -> None:
    z, y, lam = batch(), torch.tensor(TIED, dtype=torch.float64), shares(9)
    value = supremix_loss(z, y, window=2.5, lam=lam)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=rng(1)))
    order = torch.randperm(9, generator=rng(2))
    for other in (
        supremix_loss(z @ turn, y, window=2.5, lam=lam),
        supremix_loss(z * torch.rand(9, 1, dtype=torch.float64, generator=rng(3)), y, window=2.5, lam=lam),
        supremix_loss(z[order], y[order], window=2.5, lam=lam[order][:, order]),
        supremix_loss(z, -y, window=2.5, lam=lam),
        supremix_loss(z, y * 8, window=20.0, label_scale=8.0, lam=lam),
        supremix_loss(z, y + 2**30, window=2.5, lam=lam),
    ):
        assert float(other) == pytest.approx(float(value), rel=1e-12)


def test_labels_that_are_close_far_from_the_others_keep_their_shares() -> None:
    """All five rows share a block; their labels don't fit into float32 side by side."""
    y = torch.tensor([0, 1000, 1000.00001, 1000.00002, 1000.00003], dtype=torch.float64)
    z = batch(5, 3)
    options = {"window": math.inf, "mix_neg": False, "temperature": 0.1, "weighting": "none", "reduction": "none"}
    want = supremix_loss(z, y, **options)
    assert torch.allclose(supremix_loss(z.float(), y, **options).double(), want, rtol=1e-5)


def test_bounds() -> None:
    """Jensen: l_i >= log |P_i|; a further negative never lowers a loss."""
    z, y, lam = batch(30, 3), torch.randint(10, (30,), generator=rng()).float(), shares(30)
    bare = supremix_loss(z, y, window=3.0, lam=lam, mix_neg=False, reduction="none")
    full = supremix_loss(z, y, window=3.0, lam=lam, reduction="none")
    positives = [
        sum(float(b == a) for b in y) - 1 + sum(0 < a - b < 3 for b in y) * sum(0 < b - a < 3 for b in y) for a in y
    ]
    floor = torch.tensor([math.log(p) if p else 0.0 for p in positives])
    assert (bare >= floor - 1e-9).all()
    assert (full >= bare).all()


def test_a_row_whose_neighbours_straddle_it_on_an_arc_is_at_rest() -> None:
    """Symmetric neighbours: the normalised Mix-pos is the anchor itself, so it does not pull."""
    angles = torch.tensor([-0.4, 0.0, 0.4], dtype=torch.float64)
    z = torch.stack([angles.cos(), angles.sin()], 1)
    options = {"window": 2.0, "mix_neg": False, "reduction": "none", "weighting": "none"}
    loss = supremix_loss(z, angles / 0.4, **options)
    others = 2 * math.exp((math.cos(0.4) - 1) / 0.5)
    assert float(loss[1]) == pytest.approx(math.log(1 + others))


def test_shares_are_drawn_from_beta_and_repeat() -> None:
    from hardmix.losses.supremix import _shares

    order = torch.arange(300)
    draw = _shares("x", None, (2.0, 8.0), order, torch.zeros(1), rng())
    values = draw(0, 300)
    assert stats.kstest(values.flatten().numpy(), stats.beta(2, 8).cdf).pvalue > 1e-4
    assert torch.equal(values, draw(0, 300))
    z, y = batch(), torch.tensor(TIED)
    first, second = (supremix_loss(z, y, window=2.0, generator=rng(1)) for _ in range(2))
    assert first == second
    assert first != supremix_loss(z, y, window=2.0, generator=rng(2))


def test_window_is_strict_and_compares_differences() -> None:
    y = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)  # 0.3 - 0.2 < 0.2 - 0.1, and 0.1 < 0.30000000000000004 - 0.2
    for window in (0.05, 0.09999999999999998, 0.1, 0.10000000000000003, 0.2, math.inf):
        got = kernel.label_windows(y, window)
        for i in range(3):
            assert got.start[i] - got.low[i] == sum(0 < float(y[i] - v) < window for v in y)
            assert got.high[i] - got.stop[i] == sum(0 < float(v - y[i]) < window for v in y)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30).map(lambda v: v * 0.1), min_size=1, max_size=40), st.integers(1, 30), st.booleans())
def test_blocks_cover_every_anchor_once_with_all_its_pairs(labels, window, small) -> None:
    y = torch.tensor(sorted(labels), dtype=torch.float64)
    windows = kernel.label_windows(y, window * 0.1)
    limits = (kernel.BOX_VALUES, kernel.SMALL_BOX, kernel.BLOCK_VALUES)
    try:
        if small:
            kernel.BOX_VALUES, kernel.SMALL_BOX, kernel.BLOCK_VALUES = 20, 10, 100
        found = list(kernel.blocks(windows))
    finally:
        kernel.BOX_VALUES, kernel.SMALL_BOX, kernel.BLOCK_VALUES = limits
    assert [i for block in found for i in range(block.first, block.last)] == list(range(len(y)))
    for block in found:
        for i in range(block.first, block.last):
            assert block.below.start <= windows.low[i]
            assert windows.start[i] <= block.below.stop or windows.start[i] == windows.low[i]
            assert block.above.start <= windows.stop[i] or windows.stop[i] == windows.high[i]
            assert windows.high[i] <= block.above.stop
        assert block.one_label == (len(y[block.first : block.last].unique()) == 1)


def test_drawn_pairs_stand_for_all_of_them() -> None:
    """Sums of exponentials and of cosines are unbiased; loss and gradient see the same draw."""
    z = torch.nn.functional.normalize(batch(24, 3))
    y = torch.arange(24.0, dtype=torch.float64).div(3, rounding_mode="floor")
    settings_ = (y, kernel.label_windows(y, math.inf), 0.5, None, None, True, True, False)
    block = next(block for block in kernel.blocks(kernel.label_windows(y, math.inf), merge=False) if block.first == 12)
    log, pull, count = kernel._Pairs(z, kernel.Contrast(*settings_)).sums(block)
    draws = [kernel._Pairs(z, kernel.Contrast(*settings_, 12, seed)).sums(block) for seed in range(3000)]
    assert all(torch.allclose(draw[2], count) for draw in draws)
    for got, want in (
        (torch.stack([d[0].exp() for d in draws]), log.exp()),
        (torch.stack([d[1] for d in draws]), pull),
    ):
        error = got.std(0) / math.sqrt(len(draws))
        assert ((got.mean(0) - want).abs() < 5 * error).all()
        assert (error > 0).all()

    def loss(z):
        return supremix_loss(z, y, window=math.inf, max_mixtures=10, generator=rng(3), reduction="none")

    assert torch.autograd.gradcheck(loss, z.requires_grad_())
    whole = supremix_loss(z, y, window=math.inf, generator=rng(3), mix_neg=False)
    assert supremix_loss(z, y, window=math.inf, max_mixtures=10**6, generator=rng(3), mix_neg=False) == whole


def test_few_drawn_pairs_are_few_and_come_in_pieces(monkeypatch) -> None:
    y = torch.tensor([0.0] * 40 + [1.0] * 3 + [2.0], dtype=torch.float64)
    windows = kernel.label_windows(y, math.inf)
    z = torch.nn.functional.normalize(batch(44, 3))
    block = next(block for block in kernel.blocks(windows, merge=False) if block.first == 40)
    for most in (1, 3, 10):
        pairs = kernel._Pairs(z, kernel.Contrast(y, windows, 0.5, None, None, True, True, False, most, 0))
        drawn = sum(len(part.below) * len(part.above) for part in pairs._parts(block))
        assert 1 <= drawn <= most
        whole = pairs.sums(block)
        monkeypatch.setattr(kernel, "BOX_VALUES", 6)
        assert len(list(pairs._parts(block))) == -(-drawn // 2)
        for piece, all_ in zip(pairs.sums(block), whole, strict=True):
            assert torch.allclose(piece, all_)
        monkeypatch.undo()


def test_label_tolerance_makes_continuous_labels_equal() -> None:
    y = torch.tensor([1.02, 0.98, 2.01, 3.04])
    got = supremix_loss(batch(4), y, window=1.5, lam=shares(4), label_tolerance=0.5, reduction="none")
    want = supremix_loss(batch(4), torch.tensor([1.0, 1.0, 2.0, 3.0]), window=1.5, lam=shares(4), reduction="none")
    assert torch.allclose(got, want)


def test_a_window_that_no_pair_fits_is_told_with_one_that_would() -> None:
    y = torch.tensor([0.0, 4.0, 6.0, 20.0])
    message = r"largest gap between labels of this batch is 14, and a window above 4 finds some\."
    with pytest.warns(UserWarning, match=message):
        supremix_loss(batch(4), y, window=4.0)
    assert float(supremix_loss(batch(4), y, window=4.1)) > 0  # no warning, which would be an error here


@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_of_zeros_is_mixed_as_a_direction_of_its_own(normalize) -> None:
    rows = torch.nn.functional.pad(batch(), (0, 1))
    zero, apart = rows.clone(), rows.clone()
    zero[2], apart[2] = 0.0, torch.eye(5, dtype=rows.dtype)[4]
    options = {"window": 9.0, "lam": shares(9), "normalize_mixtures": normalize}
    labels = torch.tensor(TIED)
    torch.testing.assert_close(supremix_loss(zero, labels, **options), supremix_loss(apart, labels, **options))


def test_module_remembers_and_equals_the_function() -> None:
    options = {"temperature": 0.3, "window": 2.0, "weighting": "quadratic", "label_scale": 2.0, "beta": (3.0, 4.0)}
    module = SupReMixLoss(**options)
    z, y = batch(), torch.tensor(TIED)
    assert module(z, y, generator=rng(1)) == supremix_loss(z, y, generator=rng(1), **options)
    assert "temperature=0.3, window=2.0" in repr(module)


def test_label_scale_of_the_training_labels_is_state() -> None:
    module = SupReMixLoss(window=2.0, label_scale="std")
    with pytest.raises(ValueError, match="call fit_labels with those of the training set"):
        module(batch(), torch.tensor(TIED))
    with pytest.raises(ValueError, match=r"labels have a standard deviation of 0; pass two values or more"):
        module.fit_labels(torch.full((7,), 0.1, dtype=torch.float64))  # whose rounded mean is another number
    module.fit_labels(torch.tensor([1.0, 5.0]))
    other = SupReMixLoss(window=2.0, label_scale="std")
    other.load_state_dict(module.state_dict())
    want = supremix_loss(batch(), torch.tensor(TIED), window=2.0, label_scale=2.0, generator=rng())
    assert other(batch(), torch.tensor(TIED), generator=rng()) == want
    with pytest.raises(ValueError, match=r"fit_labels: labels have a standard deviation of 0; pass two values or more"):
        module.fit_labels(torch.ones(4))


def test_supcon_is_the_form_without_mixtures() -> None:
    z, labels = batch(), [float(v) for v in TIED]
    want = supremix_mean(z, labels, shares(9), temperature=0.1, weighting="none", mix_neg=False, mix_pos=False)
    assert float(supcon_loss(z, torch.tensor(labels))) == pytest.approx(float(want), rel=1e-12)
    assert SupConLoss(temperature=0.3)(z, torch.tensor(TIED)) == supcon_loss(z, torch.tensor(TIED), temperature=0.3)
    assert torch.autograd.gradcheck(lambda z: supcon_loss(z, torch.tensor(TIED)), batch().requires_grad_())


BAD = [
    (
        lambda z, y: supremix_loss(z.long(), y, window=1.0),
        TypeError,
        r"embeddings has dtype torch\.int64; pass floating",
    ),
    (
        lambda z, y: supremix_loss(z[0], y, window=1.0),
        ValueError,
        r"embeddings has shape \(4,\); pass a batch with 2 to 3",
    ),
    (lambda z, y: supremix_loss(z[:0], y[:0], window=1.0), ValueError, r"is empty; pass at least one sample"),
    (lambda z, y: supremix_loss(z, y[:4], window=1.0), ValueError, r"labels has 4 entries but embeddings has 9 rows"),
    (lambda z, y: supremix_loss(z, y.tolist(), window=1.0), TypeError, r"labels is a list; pass a torch\.Tensor"),
    (lambda z, y: supremix_loss(z, y.repeat(2, 1).T, window=1.0), ValueError, r"labels has shape \(9, 2\).*one number"),
    (lambda z, y: supremix_loss(z, y.clone().fill_(math.nan), window=1.0), ValueError, r"NaN or infinity at 0, 1, 2"),
    (lambda z, y: supremix_loss(z, y), ValueError, r"window is None; pass how far apart labels may be mixed"),
    (lambda z, y: supremix_loss(z, y, window=-1.0), ValueError, r"window is -1\.0; pass how far"),
    (lambda z, y: supremix_loss(z, y, window=math.nan), ValueError, r"window is nan; pass how far"),
    (lambda z, y: supremix_loss(z, y, window=1.0, temperature=0.0), ValueError, r"temperature is 0\.0; pass a finite"),
    (lambda z, y: supremix_loss(z, y, window=1.0, beta=(0.5, 2.0)), ValueError, r"beta is .*pass two numbers"),
    (lambda z, y: supremix_loss(z, y, window=1.0, beta=(1, "a")), ValueError, r"beta is \(1, 'a'\); pass two numbers"),
    (lambda z, y: supremix_loss(z, y, window=1.0, temperature=z), TypeError, r"temperature is a Tensor; pass a finite"),
    (lambda z, y: supremix_loss(z, y, window=1.0, temperature=10**30), ValueError, r"is an integer beyond 64 bits; pa"),
    (lambda z, y: supremix_loss(z, y, window=z), ValueError, r"^supremix_loss: window is a Tensor; pass how far"),
    (lambda z, y: supcon_loss(z, y, temperature=-1), ValueError, r"^supcon_loss: temperature is -1; pass a finite"),
    (lambda z, y: supcon_loss(z, y[:4]), ValueError, r"^supcon_loss: labels has 4 entries but embeddings has 9 rows"),
    (lambda z, y: supremix_loss(z, y, window=1.0, weighting="liner"), ValueError, r'did you mean "linear"'),
    (lambda z, y: supremix_loss(z, y, window=1.0, label_scale=0.0), ValueError, r"label_scale is 0\.0; pass a finite"),
    (lambda z, y: supremix_loss(z, y, window=1.0, label_tolerance=-1.0), ValueError, r"label_tolerance is -1\.0; pass"),
    (lambda z, y: supremix_loss(z, y, window=1.0, max_mixtures=0), ValueError, r"max_mixtures is 0; pass an integer"),
    (lambda z, y: supremix_loss(z, y, window=1.0, reduction="avg"), ValueError, r"reduction is 'avg'; pass one of"),
    (lambda z, y: supremix_loss(z, y, window=2.0, lam=shares(4)), ValueError, r"lam has shape \(4, 4\); pass \(9, 9\)"),
    (lambda z, y: supremix_loss(z, y, window=2.0, lam=5 * shares(9)), ValueError, r"lam holds values from .*0 to 1"),
    (lambda z, y: supremix_loss(z, y, window=2.0, lam=math.nan * shares(9)), ValueError, r"lam holds values from nan"),
    (lambda z, y: SupReMixLoss(window=1.0, label_scale="sd"), ValueError, r"label_scale is 'sd'; pass one of 'std'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(batch(), torch.tensor(TIED))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("loss", [supremix_loss, supcon_loss, rank_n_contrast_loss, ranksim_loss])
def test_a_second_derivative_is_refused_however_it_is_asked_for(loss, summed) -> None:
    z = batch().requires_grad_()
    value = loss(z, torch.tensor(TIED), **({"window": 3.0} if loss is supremix_loss else {}))
    (grad,) = torch.autograd.grad(3.0 * value if summed else value.square(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), z)
