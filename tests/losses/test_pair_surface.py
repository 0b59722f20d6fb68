"""What the losses of image-text pairs share: one pair, odd batches, bad rows, rows of length 1, first derivatives."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compiling
from hardmix import losses
from hardmix.losses.clip import unit_pairs

from .slow_pairs import cloud

DOUBLE = torch.float64
MIXES = ("image", "text", "joint", "given")


def call(loss: Any, *arguments: Any, **options: Any) -> Callable[..., Tensor]:
    """Of features: a function with settings, or a class that is given those first."""
    if inspect.isclass(loss):
        return lambda a, b, **settings: loss(**settings)(a, b, *arguments, **options)
    return lambda a, b, **settings: loss(a, b, *arguments, **options, **settings)


#: those that can be told to refuse rows of another length than 1
GUARDED: dict[str, Callable[..., Tensor]] = {
    "clip_loss": call(losses.clip_loss, 5.0),
    "ClipLoss": call(losses.ClipLoss, 5.0),
    "siglip_loss": call(losses.siglip_loss, 5.0, -1.0),
    "SigLipLoss": call(losses.SigLipLoss, 5.0, -1.0),
    "m2mix_loss": call(losses.m2mix_loss, lam=0.3),
    "M2MixLoss": call(losses.M2MixLoss, 5.0, lam=0.3),
    "M2MixSigLipLoss": call(losses.M2MixSigLipLoss, 5.0, -1.0, lam=0.3),
    "M3MixLoss": call(losses.M3MixLoss, 5.0, lam=0.3),
    **{f"unimodal_mix_loss {mix}": call(losses.unimodal_mix_loss, 5.0, mix=mix, lam=0.3) for mix in MIXES},
}
#: those made of `pair_contrast`, which has no second derivative
CONTRASTS: dict[str, Callable[..., Tensor]] = {
    **GUARDED,
    "cyclip_loss": call(losses.cyclip_loss, 5.0),
    "CyClipLoss": call(losses.CyClipLoss, 5.0),
    "hcl_loss": call(losses.hcl_loss, 5.0),
    "HCLLoss": call(losses.HCLLoss, 5.0),
    "imix_loss": lambda a, b: losses.imix_loss(a, b, 5.0, partner=torch.arange(len(a)).flip(0), lam=0.3),
    "unmix_loss": lambda a, b: losses.unmix_loss(a, b, a, 5.0, lam=0.3),
    "CaRotLoss": lambda a, b: losses.CaRotLoss(orthogonality=0, cross=0)(a, b, 5.0, teacher=(a, b, 5.0)),
}
EVERY: dict[str, Callable[..., Tensor]] = {
    **CONTRASTS,
    "self_distillation_loss": lambda a, b: losses.self_distillation_loss(a, b, 5.0, b, a, 9.0),
    "lipsum_loss": lambda a, b: losses.lipsum_loss(a, b, torch.eye(a.shape[1]), 5.0),
}
#: whose messages bear another name, that of what it calls
SAYS = {"ClipLoss": "clip_loss", "SigLipLoss": "siglip_loss", "CaRotLoss": "clip_loss"}


def says(name: str) -> str:
    return SAYS.get(name, name.split()[0])


def pairs(n: int, d: int = 6, seed: int = 0) -> list[Tensor]:
    return [x.requires_grad_() for x in cloud(n, d, seed)]


# One pair, odd batches, bad rows


@pytest.mark.parametrize("name", EVERY)
def test_one_pair(name) -> None:
    """Nothing to be told from: 0, with a gradient of zeros. A sigmoid, and the gap of Lipsum-FT, need no other pair."""
    a, b = pairs(1)
    value = EVERY[name](a, b)
    grads = torch.autograd.grad(value, (a, b), allow_unused=True)
    if name in ("siglip_loss", "SigLipLoss", "M2MixSigLipLoss"):
        own = math.log1p(math.exp(1.0 - 5.0 * float(F.cosine_similarity(a, b).detach())))
        assert value.item() == pytest.approx(own * (1.01 if name == "M2MixSigLipLoss" else 1.0))
    elif name != "lipsum_loss":
        # CyCLIP squares |a|^2 - |b|^2, of which rounding leaves something.
        rounding = 1e-30 if "cyclip" in name.lower() else 0.0
        assert value.item() <= rounding
        assert not any((grad.abs() > rounding).any() for grad in grads)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("target", ["mixed", "identity", "code"])
def test_the_middle_row_of_an_odd_batch_is_not_mixed(mix, target) -> None:
    """It is its own partner, and its share changes nothing."""
    a, b = pairs(7)
    lam = torch.tensor([0.2, 0.9, 0.4, 0.0, 0.4, 0.9, 0.2], dtype=DOUBLE)
    found = []
    for share in (0.0, 0.5, 1.0):
        lam[3] = share
        loss = losses.unimodal_mix_loss(a, b, 5.0, mix=mix, target=target, lam=lam, reduction="none")
        found.append((loss, *torch.autograd.grad(loss.sum(), (a, b))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    drawn = losses.M3MixLoss(per="pair", draws=3)(a, b, 5.0, generator=torch.Generator().manual_seed(0))
    assert all(grad.isfinite().all() for grad in (drawn, *torch.autograd.grad(drawn, (a, b))))


@pytest.mark.parametrize("name", EVERY)
def test_bad_rows_are_named(name) -> None:
    good = torch.ones(7, 4)
    holes = good.clone()
    holes[2, 1], holes[5, 3] = torch.nan, torch.inf
    second = "reference_features" if name == "lipsum_loss" else "text_features"
    for features, which in (((holes, good), "image_features"), ((good, holes), second)):
        with pytest.raises(
            ValueError, match=rf"^{says(name)}: {which} holds NaN or infinity in rows 2, 5; repair or leave out these "
        ):
            EVERY[name](*features)
    with pytest.raises(
        ValueError, match=rf"^{says(name)}: {second} has 5 entries but image_features has 7 rows; pass one entry per "
    ):
        EVERY[name](good, good[:5])
    with pytest.raises(ValueError, match=rf"^{says(name)}: image_features has shape \(0, 4\) and is empty; pass at "):
        EVERY[name](good[:0], good[:0])


# Rows of length 1


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": F.normalize,
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "wide": lambda x: F.normalize(x.double()).to(x.dtype),
    "root": lambda x: x * x.float().square().sum(1, keepdim=True).rsqrt().to(x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("d", [8, 2048])
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_were_normalised_in_their_dtype_are_taken(dtype, d, way) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, d, generator=g, dtype=DOUBLE) * torch.randn(400, 1, generator=g, dtype=DOUBLE).exp()
    a = WAYS[way](x.to(dtype))
    loss = losses.clip_loss(a[:200], a[200:], 5.0, normalize=False)
    assert torch.equal(loss, losses.clip_loss(a[:200], a[200:], 5.0))
    assert loss.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_they_are_the_same_with_and_without(name, dtype) -> None:
    a, b = (F.normalize(x.detach().to(dtype)).requires_grad_() for x in pairs(9))
    found = []
    for normalize in (True, False):
        value = GUARDED[name](a, b, normalize=normalize)
        found.append((value, *torch.autograd.grad(value, (a, b))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", GUARDED)
def test_rows_of_another_length_are_refused(name) -> None:
    good = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))
    for factor, length in ((2.5, "2.5"), (0.0, "0"), (1e30, "1e+30"), (0.998, "0.998"), (-1.001, "1.001")):
        bad = good.clone()
        bad[2:5] *= factor
        for features, which in (((bad, good), "image_features"), ((good, bad), "text_features"), ((bad, bad), "image")):
            with pytest.raises(
                ValueError,
                match=rf"^{says(name)}: normalize is False but row 2 of {which}\w* has length {re.escape(length)}; "
                r"pass normalize=True, or divide rows by their length\.$",
            ):
                GUARDED[name](*features, normalize=False)
            assert GUARDED[name](*features).isfinite()
    with pytest.raises(ValueError, match=rf"^{says(name)}: image_features holds NaN or infinity in rows 0, 1, "):
        GUARDED[name](good * torch.nan, good, normalize=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_what_counts_as_rounding(dtype) -> None:
    """4 eps of the dtype, and no less than of float32: float64 rows may have been float32 ones."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for off, taken in ((3.9, True), (-3.9, True), (5.0, False), (-5.0, False)):
        x = torch.zeros(3, 4, dtype=dtype)
        x[:, 0] = 1.0 + off * eps
        if not taken:
            with pytest.raises(ValueError, match=r"^clip_loss: normalize is False but row 0 of image_features has len"):
                losses.clip_loss(x, x, 5.0, normalize=False)
            continue
        assert losses.clip_loss(x, x, 5.0, normalize=False).item() == pytest.approx(math.log(3))
    widened = F.normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0))).double()
    assert losses.clip_loss(widened, widened, 5.0, normalize=False).isfinite()


@compiling.supported
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_compiled_code_and_other_devices_do_not_look() -> None:
    a, b = (x.detach() for x in pairs(5))
    loss = losses.ClipLoss(normalize=False)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    scale = torch.tensor(5.0, dtype=DOUBLE)
    torch.testing.assert_close(compiled(a, b, scale), losses.clip_loss(a, b, scale))
    assert unit_pairs("losses", a.to("meta"), b.to("meta"), normalize=False)[0].shape == a.shape


@pytest.mark.parametrize("name", GUARDED)
def test_the_setting_is_true_or_false(name) -> None:
    good = F.normalize(torch.ones(3, 4))
    for value in (1, 0, None, "no"):
        who = name if name[0].isupper() else says(name)
        with pytest.raises(TypeError, match=rf"^{who}: normalize is {value!r}; pass True or False\.$"):
            GUARDED[name](good, good, normalize=value)
    parameter = inspect.signature(getattr(losses, name.split()[0])).parameters["normalize"]
    assert parameter.default is True
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


# Derivatives


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_second_derivative_is_refused(name) -> None:
    """However it is asked for, of whatever: a part of it would be missing."""
    a, b = pairs(6)
    message = r"^pair_contrast: losses of image-text pairs have first derivatives only; leave out the penalty on a "
    for inputs in ((a, b), (a,), (b,)):
        grads = torch.autograd.grad(CONTRASTS[name](a, b), inputs, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        for one in (a, b):
            with pytest.raises(NotImplementedError, match=message):
                torch.autograd.grad(penalty, one, retain_graph=True)
        with pytest.raises(NotImplementedError, match=message):
            penalty.backward()
    # The graph of a gradient costs nothing as long as nobody asks.
    plain = torch.autograd.grad(CONTRASTS[name](a, b), (a, b))
    graph = torch.autograd.grad(CONTRASTS[name](a, b), (a, b), create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, graph, strict=True))


def test_nor_is_there_one_of_a_scale_or_a_bias() -> None:
    a, b = (x.detach() for x in pairs(6))
    s, bias = (torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (5.0, -1.0))
    for value, inputs in (
        (losses.clip_loss(a, b, s), (s,)),
        (losses.siglip_loss(a, b, s, bias), (s, bias)),
        (losses.M2MixSigLipLoss()(a, b, s, bias, lam=0.3), (s, bias)),
    ):
        for one in inputs:
            (grad,) = torch.autograd.grad(value, one, create_graph=True)
            with pytest.raises(NotImplementedError, match=r"^pair_contrast: "):
                torch.autograd.grad(grad, one)


def test_second_derivatives_of_what_has_them() -> None:
    a, b = pairs(3, 4)
    a0, b0 = (x.detach() for x in pairs(3, 4, 1))
    assert torch.autograd.gradgradcheck(lambda x, y: losses.self_distillation_loss(x, y, 5.0, a0, b0, 9.0), (a, b))
    assert torch.autograd.gradgradcheck(lambda x: losses.lipsum_loss(x, a0, b0, 5.0), a)
    assert torch.autograd.gradgradcheck(losses.projection_penalty, (a, b))
