"""m2-Mix from Gram matrices against mixtures that are really formed, its properties, its edges and its messages."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import compiling
from hardmix.kernels import pair_contrast as kernel
from hardmix.losses.clip import ClipLoss, clip_loss, cross_entropy, siglip_loss
from hardmix.losses.m2mix import M2MixLoss, M2MixSigLipLoss, m2mix_loss, mixed_rows
from hardmix.mixing import geodesic
from hardmix.mixing.draw import draw_beta

from .slow_pairs import VECTORS, cloud, m2_rows, mean, sigmoid_rows

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, t: float = 0.2) -> list[Tensor]:
    return [x.requires_grad_() for x in (*cloud(n, d, seed), torch.tensor(t, dtype=DOUBLE))]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


def shares(n: int, seed: int = 5) -> Tensor:
    return torch.rand(n, dtype=DOUBLE, generator=rng(seed))


@pytest.fixture(params=["whole", "tiled"])
def tiles(request, monkeypatch):
    """One tile, and tiles of four rows, of which nine leave one alone."""
    if request.param == "tiled":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("replace", ["negatives", "positives", "both"])
def test_value_and_gradient_are_those_of_formed_mixtures(n, replace, tiles) -> None:
    a, b, t = leaves(n, seed=n)
    lam = shares(n)
    got = m2mix_loss(a, b, temperature=t, lam=lam, replace=replace, reduction="none")
    want = torch.stack(m2_rows(a, b, 1 / t, lam.tolist(), replace))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.rand(n, dtype=DOUBLE, generator=rng(n))
    for x, y in zip(gradients((got * weight).sum(), a, b, t), gradients((want * weight).sum(), a, b, t), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d, seed = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 5)), data.draw(st.integers(0, 10**6))
    t = data.draw(st.sampled_from([0.02, 0.07, 1.0, 50.0]))
    lam = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    a, b, _ = leaves(n, d, seed)
    got, want = m2mix_loss(a, b, temperature=t, lam=torch.tensor(lam, dtype=DOUBLE)), mean(m2_rows(a, b, 1 / t, lam))
    # The mixture of two opposite rows is ill-conditioned: 1 + cos has lost the digits by which it is smaller than 1.
    lost = 1 / (1 + F.cosine_similarity(a, b)).min().clamp(min=geodesic.OPPOSITE).item()
    assert got.item() == pytest.approx(want.item(), rel=1e-11 + 1e-15 * lost, abs=1e-12)
    for x, y in zip(gradients(got, a, b), gradients(want, a, b), strict=True):
        close = 1e-8 + 1e-12 * lost
        torch.testing.assert_close(x, y, rtol=close, atol=close * max(1.0, y.abs().max().item()))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_the_reference_vectors(case, tiles) -> None:
    a, b = (torch.tensor(case[side], dtype=DOUBLE, requires_grad=True) for side in "ab")
    lam, want = case["lam"], case["expected"]
    assert clip_loss(a, b, 1 / case["tau1"]).item() == pytest.approx(want["L_CLIP"], rel=1e-12)
    loss = m2mix_loss(a, b, temperature=case["tau2"], lam=lam)
    assert loss.item() == pytest.approx(want["L_m2"], rel=1e-12)
    module = M2MixLoss(weight=case["w"], temperature=case["tau2"])
    assert module(a, b, 1 / case["tau1"], lam=lam).item() == pytest.approx(want["L_total"], rel=1e-12)
    code = M2MixLoss(weight=case["w"] / 2, temperature=case["tau2"], weight_convention="code")
    assert code(a, b, 1 / case["tau1"], lam=lam).item() == pytest.approx(want["L_total"], rel=1e-12)
    # As free arrays, which the loss does not see: it normalises. On the sphere both have the same gradient.
    cos = (a * b).sum(1)
    mixed = mixed_rows(cos, torch.full((1, 1), lam, dtype=DOUBLE), torch.tensor(1 / case["tau2"], dtype=DOUBLE))
    free = gradients(mixed.loss(kernel.pair_contrast(a, b, mixed.terms)).mean(), a, b)
    for x, grad, flat, name in zip((a, b), free, gradients(loss, a, b), ("grad_a_L_m2", "grad_b_L_m2"), strict=True):
        expected = torch.tensor(want[name], dtype=DOUBLE)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-10)
        tangent = expected - (expected * x).sum(1, keepdim=True) * x
        torch.testing.assert_close(flat, tangent, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("replace", ["negatives", "positives", "both"])
def test_gradcheck(replace, tiles) -> None:
    a, b, t = leaves(5, 3)
    with torch.no_grad():
        b[2] = 2 * a[2]  # the pair coincides
    lam = torch.stack((shares(5), shares(5, 6)))

    def loss(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return m2mix_loss(a, b, temperature=t, lam=lam, replace=replace, reduction="none")

    assert torch.autograd.gradcheck(loss, (a, b, t), eps=1e-6, atol=1e-5, rtol=1e-3)
    bias = torch.tensor(-1.0, dtype=DOUBLE, requires_grad=True)
    sigmoid = M2MixSigLipLoss(weight=1.0)
    assert torch.autograd.gradcheck(
        lambda *x: sigmoid(*x, lam=lam), (a, b, t * 20, bias), eps=1e-6, atol=1e-5, rtol=1e-3
    )


def test_the_ends_of_the_arc(tiles) -> None:
    """lam = 1: images against images and texts against images; lam = 0: against texts."""
    a, b, _ = leaves(9)
    x, y = F.normalize(a), F.normalize(b)
    own = torch.eye(9, dtype=torch.bool)
    for lam, keys in ((1.0, x), (0.0, y)):
        logits = [torch.where(own, x @ y.T, rows @ keys.T) / 0.3 for rows in (x, y)]
        want = sum(F.cross_entropy(z, torch.arange(9)) for z in logits) / 2
        torch.testing.assert_close(m2mix_loss(a, b, temperature=0.3, lam=lam), want, rtol=1e-12, atol=1e-12)


def test_draws_are_averaged_and_repeat(tiles) -> None:
    a, b, _ = leaves(9)
    each = [m2mix_loss(a, b, lam=lam) for lam in (0.1, 0.5, 0.8)]
    draws = torch.tensor([[0.1], [0.5], [0.8]], dtype=DOUBLE)
    torch.testing.assert_close(m2mix_loss(a, b, lam=draws), sum(each) / 3, rtol=1e-12, atol=0)
    for options, count in (({}, 1), ({"draws": 3}, 3), ({"per": "pair"}, 9), ({"per": "pair", "draws": 2}, 18)):
        lam = draw_beta(0.5, 0.5, count, rng(7)).view(options.get("draws", 1), -1)
        assert torch.equal(m2mix_loss(a, b, generator=rng(7), **options), m2mix_loss(a, b, lam=lam))
    assert m2mix_loss(a, b, alpha=0.2, generator=rng(1)) == m2mix_loss(
        a, b, lam=draw_beta(0.2, 0.2, 1, rng(1)).view(1, 1)
    )
    torch.manual_seed(3)
    first = m2mix_loss(a, b)
    torch.manual_seed(3)
    assert m2mix_loss(a, b) == first


def test_invariances() -> None:
    a, b, _ = leaves(9)
    lam = shares(9)
    want = m2mix_loss(a, b, lam=lam)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=rng(1)))[0]
    order, size = torch.randperm(9, generator=rng(2)), torch.rand(9, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for x, y, share in (
        (b, a, 1 - lam),
        (a[order], b[order], lam[order]),
        (a @ turn, b @ turn, lam),
        (a * size, b / size, lam),
    ):
        torch.testing.assert_close(m2mix_loss(x, y, lam=share), want, rtol=1e-12, atol=1e-12)
    none = m2mix_loss(a, b, lam=lam, reduction="none")
    torch.testing.assert_close(none.sum(), m2mix_loss(a, b, lam=lam, reduction="sum"))
    torch.testing.assert_close(none.mean(), want)


def test_a_single_pair_has_no_other() -> None:
    a, b, t = leaves(1)
    for loss in (m2mix_loss(a, b, temperature=t, lam=0.3), M2MixLoss()(a, b, 1 / t)):
        assert loss.item() == 0.0
        assert all(not grad.any() for grad in gradients(loss, a, b, t))
    assert M2MixSigLipLoss(weight=1.0)(a, a, 3.0).item() == pytest.approx(2 * math.log1p(math.exp(-3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("t", [1e-3, 0.07, 1e3])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_extremes_are_finite(dtype, t, lam, tiles) -> None:
    top = torch.finfo(dtype).max
    a, b = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in (0, 1))
    a[0], b[1], a[2], b[2] = 0.0, 0.0, top, -top  # the last are opposite
    b[3], b[4], a[5] = a[3], -a[4], a[6]
    b[6] = -a[6] * (1 + 4 * torch.finfo(dtype).eps * torch.randn(6, generator=rng(2)).to(dtype))
    a.requires_grad_()
    b.requires_grad_()
    for loss in (
        m2mix_loss(a, b, temperature=t, lam=lam),
        M2MixSigLipLoss(weight=1.0)(a, b, min(1 / t, 100), -10.0, lam=lam),
    ):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(loss, a, b))


def test_equal_pairs_mix_to_themselves(tiles) -> None:
    a, _, t = leaves(9)
    loss, want = m2mix_loss(a, a, temperature=t, lam=0.3), clip_loss(a, a, 1 / t)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, a, t), gradients(want, a, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype, tiles) -> None:
    a, b = (x.to(dtype) for x in cloud(24, 16, 5))
    for loss in (lambda x, y: m2mix_loss(x, y, lam=0.3), lambda x, y: M2MixLoss()(x, y, 50.0, lam=0.3)):
        got = loss(a, b)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(loss(a.double(), b.double()).item(), rel=2e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(a, b), got)


def test_a_small_loss_has_all_digits_in_float32(tiles) -> None:
    a, b = (x.float() for x in cloud(16, 64, 4, pull=3.0))
    results = []
    for dtype in (torch.float32, DOUBLE):
        x, y = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
        t = torch.tensor(0.035, dtype=dtype, requires_grad=True)
        loss = m2mix_loss(x, y, temperature=t, lam=0.4)
        results.append([loss.detach().double(), *gradients(loss, x, y, t)])
    assert 1e-8 < results[1][0] < 1e-6
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 3e-5 * want.norm()


def test_ordinary_gradients_in_float32(tiles) -> None:
    a, b = (x.float().requires_grad_() for x in cloud(100, 32, 6, pull=0.5))
    got = gradients(m2mix_loss(a, b, lam=0.3), a, b)
    x, y = (value.detach().double().requires_grad_() for value in (a, b))
    for grad, want in zip(got, gradients(m2mix_loss(x, y, lam=0.3), x, y), strict=True):
        assert (grad - want).norm() <= 2e-6 * want.norm()


def test_sigmoid_form_is_that_of_the_loops(tiles) -> None:
    for n in (1, 2, 9):
        a, b, _ = leaves(n, seed=n)
        lam = shares(n)
        want = mean(sigmoid_rows(a, b, 5.0, -2.0, None)) + 0.3 * mean(sigmoid_rows(a, b, 5.0, -2.0, lam.tolist()))
        got = M2MixSigLipLoss(weight=0.3)(a, b, 5.0, -2.0, lam=lam)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(got, a, b), gradients(want, a, b), rtol=1e-10, atol=1e-11)
        own = M2MixSigLipLoss(weight=0.3, temperature=0.1)(a, b, 5.0, -2.0, lam=lam, output_dict=True)
        torch.testing.assert_close(own["contrastive_loss"], siglip_loss(a, b, 5.0, -2.0))
        want = 0.3 * mean(sigmoid_rows(a, b, 10.0, -2.0, lam.tolist()))
        torch.testing.assert_close(own["m2mix_loss"], want, rtol=1e-12, atol=1e-12)


def test_the_module_is_clip_plus_its_term(tiles) -> None:
    a, b, t = leaves(9)
    module = M2MixLoss(weight=0.2, temperature=0.1, alpha=0.3, draws=2, per="pair", replace="both")
    found = module(image_features=a, text_features=b, logit_scale=1 / t, output_dict=True, generator=rng(1))
    options = {"temperature": 0.1, "alpha": 0.3, "draws": 2, "per": "pair", "replace": "both", "generator": rng(1)}
    assert list(found) == ["contrastive_loss", "m2mix_loss"]
    torch.testing.assert_close(found["contrastive_loss"], clip_loss(a, b, 1 / t))
    torch.testing.assert_close(found["m2mix_loss"], 0.2 * m2mix_loss(a, b, **options))
    whole = module(a, b, 1 / t, generator=rng(1))
    torch.testing.assert_close(whole, found["contrastive_loss"] + found["m2mix_loss"], rtol=0, atol=0)
    shared = M2MixLoss(temperature=None, weight=1.0)
    torch.testing.assert_close(
        shared(a, b, 1 / t, lam=0.3), clip_loss(a, b, 1 / t) + m2mix_loss(a, b, temperature=t, lam=0.3)
    )
    bias = torch.tensor(-3.0, requires_grad=True)
    loss = shared(a, b, 1 / t, bias, lam=0.3)
    assert loss == shared(a, b, 1 / t, lam=0.3)
    assert gradients(loss, bias)[0] == 0.0
    names = list(inspect.signature(ClipLoss.forward).parameters)
    assert list(inspect.signature(M2MixLoss.forward).parameters)[: len(names)] == names
    assert repr(M2MixLoss()) == "M2MixLoss(weight=0.01, alpha=0.5, temperature=0.07, schedule=None)"


def test_the_schedule_and_its_state() -> None:
    a, b, _ = leaves(5)
    constant, falling = M2MixLoss(), M2MixLoss(schedule="inverse")
    term = constant(a, b, 5.0, lam=0.3, output_dict=True)["m2mix_loss"]
    for module in (constant, falling):
        module.set_epoch(3)
    assert constant(a, b, 5.0, lam=0.3, output_dict=True)["m2mix_loss"] == term
    torch.testing.assert_close(
        falling(a, b, 5.0, lam=0.3, output_dict=True)["m2mix_loss"], term / 4, rtol=1e-15, atol=0
    )
    resumed = M2MixLoss(schedule="inverse")
    torch.testing.assert_close(resumed(a, b, 5.0, lam=0.3, output_dict=True)["m2mix_loss"], term, rtol=0, atol=0)
    resumed.load_state_dict(falling.state_dict())
    assert resumed(a, b, 5.0, lam=0.3) == falling(a, b, 5.0, lam=0.3)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_activation_checkpointing_repeats_the_draws(accumulate) -> None:
    """What is run again in the backward pass has the draws of its call, and counts as none."""

    def train(run) -> list[Tensor]:
        torch.manual_seed(3)
        module = M2MixLoss(accumulate=accumulate)
        slopes = []
        for step in range(5):
            a, b, _ = leaves(6, seed=step)
            slopes += gradients(run(module, a, b), a, b)
        return slopes

    plain = train(lambda module, a, b: module(a, b, 10.0))
    again = train(lambda module, a, b: checkpoint(module, a, b, 10.0, use_reentrant=False))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@compiling.supported
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_compiled_is_eager() -> None:
    a, b, scale = leaves(9, t=5.0)
    compiled = torch.compile(M2MixLoss(weight=1.0), backend="aot_eager", fullgraph=True)
    loss, want = compiled(a, b, scale, lam=0.3), M2MixLoss(weight=1.0)(a, b, scale, lam=0.3)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, a, b, scale), gradients(want, a, b, scale))


def test_cross_entropy_takes_one_positive_or_one_per_side() -> None:
    others = torch.randn(2, 4, generator=rng())
    own = torch.randn(4, generator=rng(1))
    assert torch.equal(cross_entropy(others, own), cross_entropy(others, own.expand(2, 4)))


A = torch.ones(3, 2)
LAM = "pass a number, one per pair, or (S, 1) or (S, N) for S draws."
CALLS = [
    ({"lam": 1.5}, ValueError, "lam is 1.5; pass a number from 0 to 1."),
    ({"lam": torch.tensor([0.1, 2.0, 0.3])}, ValueError, "lam holds values from 0.1 to 2; pass numbers from 0 to 1."),
    ({"lam": torch.zeros(2)}, ValueError, f"lam has shape (2,) for 3 pairs; {LAM}"),
    ({"lam": torch.zeros(1)}, ValueError, f"lam has shape (1,) for 3 pairs; {LAM}"),
    ({"lam": torch.zeros(2, 2)}, ValueError, f"lam has shape (2, 2) for 3 pairs; {LAM}"),
    ({"lam": torch.zeros(0, 3)}, ValueError, f"lam has shape (0, 3) for 3 pairs; {LAM}"),
    ({"lam": torch.zeros(1, 1, 3)}, ValueError, f"lam has shape (1, 1, 3) for 3 pairs; {LAM}"),
    ({"generator": 3}, TypeError, "generator is a int; pass a torch.Generator or None."),
]
SETTINGS = [
    ({"alpha": 0.0}, ValueError, "alpha is 0.0; pass a number from 0.0001 to 10000."),
    ({"draws": 0}, ValueError, "draws is 0; pass an integer of at least 1."),
    ({"per": "sample"}, ValueError, "per is 'sample'; pass one of 'batch', 'pair'."),
    (
        {"replace": "negative"},
        ValueError,
        "replace is 'negative'; pass one of 'negatives', 'positives', 'both' (did you",
    ),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; pass a finite number greater than 0."),
]
OWN = [
    ({"weight": 0.0}, ValueError, "weight is 0.0; pass a finite number greater than 0."),
    ({"schedule": "linear"}, ValueError, "schedule is 'linear'; pass 'inverse', or None for a constant weight."),
    ({"weight_convention": "half"}, ValueError, "weight_convention is 'half'; pass one of 'paper', 'code'."),
]


@pytest.mark.parametrize(("setting", "kind", "message"), CALLS + SETTINGS)
def test_messages_of_the_function(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^m2mix_loss: {re.escape(message)}"):
        m2mix_loss(A, A, **setting)


@pytest.mark.parametrize(("setting", "kind", "message"), SETTINGS + OWN)
def test_messages_of_the_module(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^M2MixLoss: {re.escape(message)}"):
        M2MixLoss(**setting)


@pytest.mark.parametrize("module", [M2MixLoss(), M2MixSigLipLoss()], ids=lambda m: type(m).__name__)
def test_messages_of_a_call(module) -> None:
    who = type(module).__name__
    for setting, kind, message in CALLS:
        with pytest.raises(kind, match=f"^{who}: {re.escape(message)}"):
            module(A, A, 1.0, **setting)
    with pytest.raises(ValueError, match=rf"^{who}: logit_scale is -1; pass a number greater than 0, "):
        module(A, A, torch.tensor(-1.0))
    with pytest.raises(ValueError, match=rf"^{who}: text_features has 4 columns but image_features has 2; pass "):
        module(A, torch.ones(3, 4), 1.0)
    with pytest.raises(ValueError, match=rf"^{who}: text_features holds NaN or infinity in rows 0, 1, 2; "):
        module(A, A / 0, 1.0)
    with pytest.raises(ValueError, match=rf"^{who}\.set_epoch: epoch is -1; pass an integer of at least 0\.$"):
        module.set_epoch(-1)
