"""What the paper on m2-Mix rests on, property by property: points on arcs (P1-P3), mixtures as negatives (P4, P5), the
limit of a sharp loss (P6), and where pairs go that nothing but the loss moves (P7)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardmix.losses import clip_loss, m2mix_loss
from hardmix.metrics import alignment_metrics
from hardmix.mixing.geodesic import slerp, slerp_coefficients
from mixing.test_geodesic import between, pair

from .slow_pairs import cloud

DOUBLE = torch.float64
SHARES = st.floats(0.0, 1.0)
SEEDS = st.integers(0, 10**6)


def two_cones(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs like CLIP's from unit rows and two axes, (N + 2, D): mean cosines .5 within a modality, .17 across, .3 of
    pairs. With axes and rows that are all perpendicular, every single cosine is that."""
    (u, v), own, other = own[:2], own[2:], other[2:]
    text = 0.34 * u + math.sqrt(1 - 0.34**2) * v
    return math.sqrt(0.5) * (u + own), math.sqrt(0.5) * (text + 0.26 * own + math.sqrt(1 - 0.26**2) * other)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Those of the rows that are no pair, (N, N - 1)."""
    n = len(a)
    return (F.normalize(a) @ F.normalize(b).T)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-9, 3.1), SHARES, st.integers(2, 16), SEEDS)
def test_p1_the_mixture_divides_the_arc(angle, lam, d, seed) -> None:
    a, b = pair(angle, d, seed)
    m = slerp(a, b, lam)
    loose = 1e-14 / (math.sin(angle) if angle > 1 else 1.0)
    assert float(m.norm()) == pytest.approx(1.0, abs=loose)
    assert float(between(a, m)) == pytest.approx((1 - lam) * angle, abs=loose)
    assert float(between(b, m)) == pytest.approx(lam * angle, abs=loose)
    torch.testing.assert_close(slerp(b, a, 1 - lam), m, rtol=0, atol=loose)
    for share, end in ((1.0, a), (0.0, b)):
        torch.testing.assert_close(slerp(a, b, share), end, rtol=0, atol=loose)
    alpha, beta = slerp_coefficients((a * b).sum(1), lam)
    assert float(alpha + beta) == pytest.approx(math.cos((lam - 0.5) * angle) / math.cos(angle / 2), rel=1e-9)
    assert alpha + beta >= 1 - loose


@settings(max_examples=50, deadline=None)
@given(SHARES)
def test_p2_coefficients_and_slopes_of_small_angles(lam) -> None:
    """Those of the limit, up to the next order."""
    gap = torch.tensor([1e-3, 1e-4, 1e-8, 1e-13, 0.0], dtype=DOUBLE)
    cos = (1 - gap).requires_grad_()
    for got, share in zip(slerp_coefficients(cos, lam), (lam, 1 - lam), strict=True):
        (slope,) = torch.autograd.grad(got.sum(), cos, retain_graph=True)
        assert ((got - share).abs() <= gap + 1e-15).all()
        assert ((slope + share * (1 - share**2) / 3).abs() <= gap + 1e-11).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_p3_equal_rows_mix_to_themselves_with_finite_gradients(dtype, lam) -> None:
    a, b = (cloud(9, 6, 3)[0].to(dtype).requires_grad_() for _ in range(2))
    m = slerp(a, b, lam)
    torch.testing.assert_close(
        m.double(), F.normalize(a.detach().double()), rtol=0, atol=max(2 * torch.finfo(dtype).eps, 1e-15)
    )
    loss = m2mix_loss(a, b, lam=lam, temperature=0.1)
    torch.testing.assert_close(loss, clip_loss(a, b, 10.0))
    for result in (m.double().cos().sum(), loss):
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(result, (a, b)))


@settings(max_examples=50, deadline=None)
@given(SHARES, SEEDS)
def test_p4_mixtures_are_harder_negatives(lam, seed) -> None:
    """Where an anchor is nearer to its own modality than to the other, and away from neither, so it is to every point
    of the arc."""
    g = torch.Generator().manual_seed(seed)
    own, other = (F.normalize(torch.randn(26, 12, generator=g, dtype=DOUBLE)) for _ in range(2))
    own[1] = F.normalize(own[1] - (own[1] @ own[0]) * own[0], dim=0)
    a, b = (F.normalize(x) for x in two_cones(own, other))
    m = slerp(a, b, lam)
    for x, y in ((a, b), (b, a)):
        plain, within, mixed = cosines(x, y), cosines(x, x), cosines(x, m)
        hard = (within >= plain) & (plain >= 0)
        assert hard.float().mean() > 0.1
        assert (mixed >= plain - 1e-12)[hard].all()


def test_p4_how_much_harder_on_rows_like_those_of_clip() -> None:
    axes_and_rows = torch.linalg.qr(torch.randn(210, 210, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)).Q
    a, b = two_cones(axes_and_rows[:102], axes_and_rows[102:204])
    means = [float(cosines(a, keys).mean()) for keys in (b, *(slerp(a, b, lam) for lam in (0.1, 0.5, 0.9)))]
    assert means == pytest.approx([0.17, 0.228, 0.415, 0.498], abs=1e-3)
    plain = clip_loss(a, b, 10.0, reduction="none")
    for lam in (0.1, 0.5, 0.9):
        assert (m2mix_loss(a, b, lam=lam, temperature=0.1, reduction="none") > plain).all()


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 50.0), st.floats(0.0, 3.1), SHARES)
def test_p5_the_divergence_from_a_mixture_is_no_greater(kappa, angle, lam) -> None:
    """Of two von Mises densities on the circle with one concentration, by their integral and by the formula."""
    around = torch.arange(1000, dtype=DOUBLE) * (2 * math.pi / 1000)
    ends = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=DOUBLE)
    rows = torch.cat((ends, slerp(ends[:1], ends[1:], lam)))
    logs = (kappa * rows @ torch.stack((around.cos(), around.sin()))).log_softmax(1)
    far, near = ((logs[0].exp() * (logs[0] - other)).sum() for other in logs[1:])
    k = torch.tensor(kappa, dtype=DOUBLE)
    slope = k * torch.special.i1e(k) / torch.special.i0e(k)
    for found, apart in ((far, angle), (near, (1 - lam) * angle)):
        assert float(found) == pytest.approx(float(slope) * (1 - math.cos(apart)), rel=1e-9, abs=1e-12)
    assert near <= far + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(2, 8), st.floats(1e-3, 10.0), SHARES, SEEDS)
def test_p6_the_sharp_limit(n, d, t, lam, seed) -> None:
    """t times the loss of a row is the gap to its hardest negative, or 0, up to t log N."""
    a, b = (F.normalize(x) for x in cloud(n, d, seed))
    m, own = slerp(a, b, lam), (a * b).sum(1)
    for loss, keys in (
        (clip_loss(a, b, 1 / t, reduction="none"), (b, a)),
        (m2mix_loss(a, b, temperature=t, lam=lam, reduction="none"), (m, m)),
    ):
        gaps = [(cosines(x, y).amax(1) - own).clamp(min=0) for x, y in zip((a, b), keys, strict=True)]
        rest = t * loss - 0.5 * (gaps[0] + gaps[1])
        assert (rest >= -1e-12).all()
        assert (rest <= t * math.log(n) + 1e-12).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_p7_free_pairs_meet_and_spread_more_with_m2(seed) -> None:
    """128 pairs of two cones, each row a parameter: with m2 the pairs meet, all rows spread, and the gap closes."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(64, 2, generator=g, dtype=DOUBLE)).Q.T
    own, other = (torch.cat((axes, F.normalize(torch.randn(128, 64, generator=g, dtype=DOUBLE)))) for _ in range(2))
    start = [F.normalize(x) for x in two_cones(own, other)]
    found = [alignment_metrics(*start)]
    for weight in (0.0, 0.01, 1.0):
        rows = [x.clone().requires_grad_() for x in start]
        optimizer, draws = torch.optim.Adam(rows, lr=2e-3), torch.Generator().manual_seed(seed)
        for _ in range(200):
            optimizer.zero_grad()
            loss = clip_loss(*rows, 100.0)
            if weight:
                loss = loss + weight * m2mix_loss(*rows, generator=draws)
            loss.backward()
            optimizer.step()
        found.append(alignment_metrics(*(x.detach() for x in rows)))
    assert all(x["alignment"] < y["alignment"] for x, y in pairwise(found))
    assert all(x["uniformity"] < y["uniformity"] for x, y in pairwise(found))
    assert all(x["gap"] > y["gap"] for x, y in pairwise(found[1:]))
