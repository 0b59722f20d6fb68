"""ResizeMix: the whole partner inside the box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hardmix.mixing import ResizeMix
from mixing.cases import rng

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("size", [(40,), (24, 37), (130, 150), (9, 12, 7), (30, 26, 28)], ids=str)
def test_box_shows_the_resized_partner(size: tuple[int, ...]) -> None:
    """Small rows are resampled as a batch, large ones one by one: both equal F.interpolate of the partner."""
    double = torch.rand(5, 3, *size, generator=rng(), dtype=torch.float64)
    for per, x, error in (("sample", double, 1e-9), ("batch", double, 1e-9), ("pair", double.float(), 1e-4)):
        plan = ResizeMix(per=per).plan(x, generator=rng(1))
        mixed = plan.blend(x)
        assert plan.box is not None
        assert plan.other is not None
        for i, partner in enumerate(plan.partner.tolist()):
            window = tuple(slice(a, b) for a, b in plan.box[i].tolist())
            sides = [b - a for a, b in plan.box[i].tolist()]
            want = F.interpolate(x[partner : partner + 1], size=sides, mode=MODES[len(size)], align_corners=False)[0]
            assert torch.allclose(mixed[i][(slice(None), *window)], want, atol=error)
            assert torch.allclose(plan.other[i][(slice(None), *window)], want, atol=error)
            rest = torch.ones(size, dtype=torch.bool)
            rest[window] = False
            assert torch.equal(mixed[i][:, rest], x[i][:, rest])


def test_own_image_and_box_are_the_plan() -> None:
    x = torch.rand(6, 3, 17, 29, generator=rng())
    plan = ResizeMix().plan(x, generator=rng(2))
    mask, other = plan.mask, plan.other
    assert mask is not None
    assert other is not None
    assert torch.allclose(plan.blend(x), mask * x + (1 - mask) * other, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("side", [20, 140])
def test_dtypes(dtype: torch.dtype, side: int) -> None:
    x = torch.rand(4, 1, side, side + 3, generator=rng()) * 200
    x = x.to(dtype)
    plan = ResizeMix().plan(x, generator=rng(1))
    want = plan.blend(x.double())
    got = plan.blend(x)
    assert got.dtype == dtype
    error = (got.double() - want).abs().max()
    assert error <= {torch.uint8: 0.501, torch.float16: 0.07, torch.bfloat16: 0.6, torch.float64: 0.0}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("side", [20, 140])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_place_is_out_of_place(dtype: torch.dtype, side: int, layout: torch.memory_format) -> None:
    """Whatever the pairing: one cycle, several, rows that are their own partner, rows that are many others' partner."""
    x = (torch.rand(6, 3, side, side, generator=rng()) * 200).to(dtype).contiguous(memory_format=layout)
    for partner in ([1, 2, 3, 4, 5, 0], [1, 0, 2, 4, 5, 3], [5, 5, 0, 0, 4, 1]):
        plan = ResizeMix().plan(x, generator=rng(1), partner=torch.tensor(partner))
        want = plan.blend(x)
        assert torch.equal(plan.blend(x, out=torch.empty_like(x)), want)
        changed = x.clone()
        version = changed._version
        assert plan.blend_(changed) is changed
        assert torch.equal(changed, want)
        assert changed._version > version  # a graph that kept the clean batch has to notice


@pytest.mark.parametrize("side", [20, 140])
def test_gradients_reach_both_samples(side: int) -> None:
    x = torch.rand(3, 1, side, side, generator=rng(), dtype=torch.float64).requires_grad_()
    plan = ResizeMix().plan(x, generator=rng(1))
    (gradient,) = torch.autograd.grad(plan.blend(x).sum(), x)
    # Each pixel of a mixed image is an average of pixels, so its weights sum to one.
    assert float(gradient.sum()) == pytest.approx(x.numel())
    with torch.no_grad():  # which then goes row by row
        assert torch.allclose(plan.blend(x), plan.blend(x.detach()))


def test_lam_depends_on_area_not_on_side() -> None:
    """tau in (.1, .8): without clipping the own share is 1 - tau^2, so between .36 and .99."""
    lam = ResizeMix().plan(torch.zeros(20_000, 1, 64, 64), generator=rng()).lam
    assert float(lam.min()) >= 0.35
    assert float(lam.max()) <= 1.0
    box = ResizeMix(scale=(0.5, 0.5)).plan(torch.zeros(500, 1, 40, 60), generator=rng()).box
    assert box is not None
    sides = box[:, :, 1] - box[:, :, 0]
    assert sides.amax(0).tolist() == [20, 30]
    assert int(sides.min()) >= 10  # half of it at the least is inside
    for axis, length in enumerate((40, 60)):
        assert int(box[:, axis, 0].min()) == 0
        assert int(box[:, axis, 1].max()) == length


def test_tiny_images_keep_one_pixel() -> None:
    x = torch.rand(50, 1, 2, 3, generator=rng())
    plan = ResizeMix(scale=(0.001, 0.01)).plan(x, generator=rng())
    assert plan.box is not None
    assert torch.equal(plan.box[:, :, 1] - plan.box[:, :, 0], torch.ones(50, 2, dtype=torch.long))
    mean = plan.other
    assert mean is not None
    assert bool(mean.isfinite().all())


def test_whole_image() -> None:
    x = torch.rand(3, 2, 8, 8, generator=rng())
    plan = ResizeMix(scale=(1.0, 1.0)).plan(x, generator=rng())
    assert plan.other is not None
    assert float(plan.lam.max()) < 0.76  # clipped to a quarter at the least


def test_dense_masks_by_nearest_neighbour() -> None:
    y = torch.randint(0, 9, (4, 12, 20), generator=rng())
    plan = ResizeMix().plan(torch.zeros(4, 1, 12, 20), generator=rng(1))
    labels, weights = plan.target(y)
    assert plan.box is not None
    for i, partner in enumerate(plan.partner.tolist()):
        (a, b), (c, d) = plan.box[i].tolist()
        want = F.interpolate(y[partner][None, None].float(), size=(b - a, d - c), mode="nearest-exact")[0, 0].long()
        assert torch.equal(labels[i, 1, a:b, c:d], want)
        assert bool((weights[i, 1, a:b, c:d] == 1).all())
        assert torch.equal(labels[i, 0], y[i])


def test_second_view_and_hidden_map_show_their_own_partner() -> None:
    x = torch.rand(4, 3, 32, 24, generator=rng())
    plan = ResizeMix().plan(x, generator=rng(3))
    other = torch.rand(4, 3, 32, 24, generator=rng(4))
    assert torch.equal(plan.blend(other), ResizeMix().plan(other, generator=rng(3)).blend(other))
    hidden = F.avg_pool2d(torch.rand(4, 5, 32, 24, generator=rng(5)), 4)
    mixed = plan.blend(hidden)
    assert mixed.shape == hidden.shape
    constant = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 5, 8, 6)
    got = plan.blend(constant.contiguous()).mean((1, 2, 3))
    want = plan.lam * torch.arange(4.0) + (1 - plan.lam) * plan.partner.float()
    assert torch.allclose(got, want, atol=1e-5)


def test_settings() -> None:
    for scale in ((0.0, 0.5), (0.5, 1.2), (0.8, 0.1), 0.5, None, (float("nan"), 1)):
        with pytest.raises(ValueError, match=r"ResizeMix: scale is .*; pass two numbers a <= b between 0\.001 and 1\."):
            ResizeMix(scale=scale)
    assert np.isclose(ResizeMix().scale, (0.1, 0.8)).all()
