"""V-, L-, VL- and m3-Mix from Gram matrices against mixtures that are really formed, their edges and messages."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.kernels import pair_contrast as kernel
from hardmix.losses.clip import clip_loss
from hardmix.losses.m2mix import m2mix_loss
from hardmix.losses.m3mix import M3MixLoss, unimodal_mix_loss
from hardmix.mixing.draw import draw_beta
from hardmix.mixing.geodesic import slerp

from .slow_pairs import VECTORS, clip_rows, cloud, m2_rows, mean, unimodal_rows

DOUBLE = torch.float64
MIXES = ("image", "text", "joint", "given")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, scale: float = 6.0) -> list[Tensor]:
    return [x.requires_grad_() for x in (*cloud(n, d, seed), torch.tensor(scale, dtype=DOUBLE))]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


def shares(n: int, seed: int = 5) -> Tensor:
    """One for rows i and n - 1 - i."""
    lam = torch.rand(n, dtype=DOUBLE, generator=rng(seed))
    return torch.minimum(lam, lam.flip(0))


@pytest.fixture(params=["whole", "tiled"])
def tiles(request, monkeypatch):
    """One tile, and tiles of four rows, of which nine leave one alone."""
    if request.param == "tiled":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 11])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("target", ["mixed", "identity", "code"])
@pytest.mark.parametrize("negatives", ["mixed", "original"])
def test_value_and_gradient_are_those_of_formed_mixtures(n, mix, target, negatives, tiles) -> None:
    a, b, s = leaves(n, seed=n)
    lam = shares(n)
    options = {"mix": mix, "target": target, "negatives": negatives}
    got = unimodal_mix_loss(a, b, s, lam=lam, reduction="none", **options)
    want = torch.stack(unimodal_rows(a, b, s, lam.tolist(), **options))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.rand(n, dtype=DOUBLE, generator=rng(n))
    for x, y in zip(gradients((got * weight).sum(), a, b, s), gradients((want * weight).sum(), a, b, s), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_the_reference_vectors(case, tiles) -> None:
    a, b = (torch.tensor(case[side], dtype=DOUBLE) for side in "ab")
    for name, options in (
        ("L_V", {"mix": "image"}),
        ("L_L", {"mix": "text"}),
        ("L_VL_target_I", {"mix": "joint"}),
        ("L_VL_target_I_plus_J", {"mix": "joint", "target": "code"}),
    ):
        loss = unimodal_mix_loss(a, b, 1 / case["tau1"], lam=case["lam"], **options)
        assert loss.item() == pytest.approx(case["expected"][name], rel=1e-12)


@pytest.mark.parametrize("mix", MIXES)
def test_gradcheck(mix, tiles) -> None:
    a, b, s = leaves(5, 3)
    with torch.no_grad():
        a[4], b[3] = 2 * a[0], b[1]  # partners that coincide
    lam = torch.stack((shares(5), shares(5, 6)))
    for target in ("mixed", "identity"):
        assert torch.autograd.gradcheck(
            lambda *x, t=target: unimodal_mix_loss(*x, mix=mix, lam=lam, target=t, reduction="none"),
            (a, b, s),
            eps=1e-6,
            atol=1e-5,
            rtol=1e-3,
        )


def test_mixing_nothing_is_clip(tiles) -> None:
    for n in (8, 9):
        a, b, s = leaves(n)
        for mix in MIXES:
            torch.testing.assert_close(unimodal_mix_loss(a, b, s, mix=mix, lam=1.0), clip_loss(a, b, s))
        # The partner takes the place of each row: so does its text in the target.
        torch.testing.assert_close(unimodal_mix_loss(a, b, s, lam=0.0), clip_loss(a.flip(0), b.flip(0), s))


def test_features_that_the_caller_mixed(tiles) -> None:
    a, b, s = leaves(9)
    lam = 0.3
    v, t = (slerp(x, x.flip(0), lam) for x in (a, b))
    for mix, one, other, target in (("image", v, b, None), ("text", a, t, None), ("joint", v, t, "identity")):
        want = unimodal_mix_loss(a, b, s, mix=mix, lam=lam)
        torch.testing.assert_close(unimodal_mix_loss(one, other, s, mix="given", lam=lam, target=target), want)
    linear = lam * F.normalize(a) + (1 - lam) * F.normalize(a).flip(0)
    want = mean(unimodal_rows(linear, b, s, [lam] * 9, "given", "mixed"))
    torch.testing.assert_close(unimodal_mix_loss(linear, b, s, mix="given", lam=lam), want)


def test_invariances() -> None:
    a, b, s = leaves(9)
    lam = shares(9)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=rng(1)))[0]
    size = torch.rand(9, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for mix, swapped in (("image", "text"), ("text", "image"), ("joint", "joint")):
        want = unimodal_mix_loss(a, b, s, mix=mix, lam=lam)
        for x, y, kind in (
            (a.flip(0), b.flip(0), mix),
            (a @ turn, b @ turn, mix),
            (a * size, b / size, mix),
            (b, a, swapped),
        ):
            torch.testing.assert_close(unimodal_mix_loss(x, y, s, mix=kind, lam=lam), want, rtol=1e-12, atol=1e-12)
        none = unimodal_mix_loss(a, b, s, mix=mix, lam=lam, reduction="none")
        torch.testing.assert_close(none.sum(), unimodal_mix_loss(a, b, s, mix=mix, lam=lam, reduction="sum"))
        torch.testing.assert_close(none.mean(), want)


def test_draws_are_averaged_and_repeat() -> None:
    a, b, s = leaves(9)
    each = [unimodal_mix_loss(a, b, s, lam=lam) for lam in (0.1, 0.5, 0.8)]
    draws = torch.tensor([[0.1], [0.5], [0.8]], dtype=DOUBLE)
    torch.testing.assert_close(unimodal_mix_loss(a, b, s, lam=draws), sum(each) / 3, rtol=1e-12, atol=0)
    assert unimodal_mix_loss(a, b, s, generator=rng(7)) == unimodal_mix_loss(
        a, b, s, lam=float(draw_beta(0.5, 0.5, 1, rng(7)))
    )
    lam = draw_beta(0.5, 0.5, 9, rng(7))
    lam = lam[torch.minimum(torch.arange(9), torch.arange(9).flip(0))]
    assert unimodal_mix_loss(a, b, s, per="pair", generator=rng(7)) == unimodal_mix_loss(a, b, s, lam=lam)


def test_a_single_pair_has_no_other() -> None:
    a, b, s = leaves(1)
    for loss in (M3MixLoss()(a, b, s), *(unimodal_mix_loss(a, b, s, mix=mix, lam=0.3) for mix in MIXES)):
        assert loss.item() == 0.0
        assert all(not grad.any() for grad in gradients(loss, a, b, s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e3])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_extremes_are_finite(dtype, scale, lam, tiles) -> None:
    top = torch.finfo(dtype).max
    a, b = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in (0, 1))
    a[0], a[1], a[7], b[2] = 0.0, top, -top, -top  # 1 and 7 are opposite partners
    b[6], a[5], b[0] = -b[2], a[3], b[8]
    b[3] = -b[5] * (1 + 4 * torch.finfo(dtype).eps * torch.randn(6, generator=rng(2)).to(dtype))
    a.requires_grad_()
    b.requires_grad_()
    loss = M3MixLoss(temperature=None)(a, b, scale, lam=lam)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, a, b))


def test_float32_is_float64_of_the_same_input(tiles) -> None:
    a, b = (x.float().requires_grad_() for x in cloud(41, 24, 6, pull=0.5))
    loss = M3MixLoss()(a, b, 30.0, lam=0.3)
    x, y = (value.detach().double().requires_grad_() for value in (a, b))
    want = M3MixLoss()(x, y, 30.0, lam=0.3)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for got, exact in zip(gradients(loss, a, b), gradients(want, x, y), strict=True):
        assert (got - exact).norm() <= 5e-6 * exact.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(M3MixLoss()(a, b, 30.0, lam=0.3), loss)


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("joint_target", ["identity", "code"])
@pytest.mark.parametrize("negatives", ["mixed", "original"])
def test_m3_is_the_sum_of_its_terms(n, joint_target, negatives, tiles) -> None:
    a, b, s = leaves(n, seed=n)
    lam = shares(n).tolist()
    weights = {"image_weight": 0.3, "text_weight": 0.2, "joint_weight": 0.7, "m2_weight": 0.4}
    module = M3MixLoss(**weights, temperature=0.1, joint_target=joint_target, negatives=negatives)
    want = 0.4 * mean(m2_rows(a, b, 10.0, lam))
    for mix, target in (("image", "mixed"), ("text", "mixed"), ("joint", joint_target)):
        want = want + weights[f"{mix}_weight"] * mean(unimodal_rows(a, b, s, lam, mix, target, negatives))
    found = module(a, b, s, lam=torch.tensor(lam, dtype=DOUBLE), output_dict=True)
    assert list(found) == ["contrastive_loss", "m3mix_loss"]
    torch.testing.assert_close(found["contrastive_loss"], mean(clip_rows(a, b, s)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["m3mix_loss"], want, rtol=1e-12, atol=1e-12)
    for got, grad in zip(gradients(found["m3mix_loss"], a, b, s), gradients(want, a, b, s), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-11)
    assert module(a, b, s, lam=torch.tensor(lam, dtype=DOUBLE)) == found["contrastive_loss"] + found["m3mix_loss"]


def test_m3_draws_one_lambda_per_term_whatever_the_weights() -> None:
    a, b, s = leaves(9)
    g = rng(2)
    lam = [float(draw_beta(alpha, alpha, 1, g)) for alpha in (0.5, 0.5, 0.5, 0.2)]
    terms = [unimodal_mix_loss(a, b, s, mix=mix, lam=lam[k]) for k, mix in enumerate(("image", "text", "joint"))]
    terms.append(m2mix_loss(a, b, lam=lam[3]))
    want = 0.05 * terms[0] + 0.05 * terms[1] + 0.1 * terms[2] + 0.01 * terms[3]
    found = M3MixLoss()(a, b, s, generator=rng(2), output_dict=True)["m3mix_loss"]
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    names = ("image", "text", "joint", "m2")
    for k, name in enumerate(names):
        alone = M3MixLoss(**{f"{other}_weight": float(other == name) for other in names})
        found = alone(a, b, s, generator=rng(2), output_dict=True)["m3mix_loss"]
        torch.testing.assert_close(found, terms[k], rtol=1e-6, atol=0)
    several = M3MixLoss(draws=3, per="pair")
    assert several(a, b, s, generator=rng(1)) == several(a, b, s, generator=rng(1))
    torch.testing.assert_close(several(a, b, s, lam=0.3), M3MixLoss()(a, b, s, lam=0.3))


def test_m3_in_the_released_convention_and_the_schedule() -> None:
    a, b, s = leaves(6)
    call = {"lam": 0.3, "output_dict": True}
    plain = M3MixLoss()(a, b, s, **call)["m3mix_loss"]
    code = M3MixLoss(weight_convention="code")(a, b, s, **call)["m3mix_loss"]
    torch.testing.assert_close(code - plain, 0.01 * m2mix_loss(a, b, lam=0.3), rtol=1e-9, atol=0)
    falling = M3MixLoss(schedule="inverse")
    falling.set_epoch(1)
    torch.testing.assert_close(falling(a, b, s, **call)["m3mix_loss"], plain / 2, rtol=1e-15, atol=0)
    bias = torch.tensor(2.0, requires_grad=True)
    assert gradients(falling(a, b, s, bias, lam=0.3), bias)[0] == 0.0
    assert repr(M3MixLoss()).startswith(
        "M3MixLoss(image_weight=0.05, text_weight=0.05, joint_weight=0.1, m2_weight=0.01, "
    )


A = torch.ones(3, 2)
UNEVEN = torch.tensor([0.1, 0.2, 0.3])
PARTNERS = "lam differs between rows i and N - 1 - i; pass one share for each two of them."


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"mix": "images"}, ValueError, "mix is 'images'; pass one of 'image', 'text', 'joint', 'given' (did you mean"),
        ({"target": "code "}, ValueError, "target is 'code '; pass one of 'mixed', 'identity', 'code' (did you mean"),
        ({"negatives": None}, TypeError, "negatives is None; pass one of 'mixed', 'original'"),
        ({"reduction": "means"}, ValueError, "reduction is 'means'; pass one of 'none', 'mean', 'sum' (did you mean"),
        ({"alpha": math.nan}, ValueError, "alpha is nan; pass a number from 0.0001 to 10000."),
        ({"per": "sample"}, ValueError, "per is 'sample'; pass one of 'batch', 'pair'."),
        ({"mix": "given"}, ValueError, "lam is None; pass the share that the features were mixed with."),
        ({"lam": UNEVEN}, ValueError, PARTNERS),
        ({"lam": -0.1}, ValueError, "lam is -0.1; pass a number from 0 to 1."),
    ],
)
def test_messages_of_the_function(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^unimodal_mix_loss: {re.escape(message)}"):
        unimodal_mix_loss(A, A, 1.0, **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_weight": -1.0}, "image_weight is -1.0; pass a finite number of at least 0."),
        (
            {f"{name}_weight": 0.0 for name in ("image", "text", "joint", "m2")},
            "all weights are 0; pass one that is greater, or use ClipLoss.",
        ),
        ({"m2_alpha": 0.0}, "m2_alpha is 0.0; pass a number from 0.0001 to 10000."),
        ({"draws": 0}, "draws is 0; pass an integer of at least 1."),
        ({"joint_target": "mixed"}, "joint_target is 'mixed'; pass one of 'identity', 'code'."),
        ({"temperature": -0.1}, "temperature is -0.1; pass a finite number greater than 0."),
        ({"schedule": 1}, "schedule is 1; pass 'inverse', or None for a constant weight."),
    ],
)
def test_messages_of_the_module(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^M3MixLoss: {re.escape(message)}$"):
        M3MixLoss(**setting)


def test_messages_of_a_call() -> None:
    for arguments, message in (
        ((A, A, -1.0), "logit_scale is -1.0; pass a finite number greater than 0."),
        ((A, A[:2], 1.0), "text_features has 2 entries but image_features has 3 rows; pass one entry per row."),
        ((A[:0], A[:0], 1.0), "image_features has shape (0, 2) and is empty; pass at least one sample."),
        (
            (A * torch.nan, A, 1.0),
            "image_features holds NaN or infinity in rows 0, 1, 2; repair or leave out these samples.",
        ),
    ):
        for call, who in ((M3MixLoss(), "M3MixLoss"), (unimodal_mix_loss, "unimodal_mix_loss")):
            with pytest.raises(ValueError, match=f"^{who}: {re.escape(message)}$"):
                call(*arguments)
    with pytest.raises(ValueError, match=f"^M3MixLoss: {re.escape(PARTNERS)}$"):
        M3MixLoss()(A, A, 1.0, lam=UNEVEN)
    with pytest.raises(TypeError, match=r"^M3MixLoss: image_features is a list; pass a torch\.Tensor\.$"):
        M3MixLoss()([1.0], A, 1.0)
