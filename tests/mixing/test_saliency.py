"""SaliencyMix: the box sits on what stands out in the partner."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hardmix.mixing import SaliencyMix, spectral_residual
from hardmix.mixing.gradients import input_saliency
from mixing.cases import own_share, rng


def with_blob(places: list[tuple[int, ...]], size: tuple[int, ...], channels: int = 3) -> torch.Tensor:
    """Faint noise, and one bright blob in each image."""
    x = 0.3 + 0.02 * torch.rand(len(places), channels, *size, generator=rng())
    grids = torch.meshgrid(*[torch.arange(length) for length in size], indexing="ij")
    for i, place in enumerate(places):
        square = sum(((g - p).float() / 3.0) ** 2 for g, p in zip(grids, place, strict=True))
        x[i] += 0.6 * torch.exp(-0.5 * square)
    return x


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (200, 150)], ids=str)
def test_box_is_centred_on_the_partners_blob(size: tuple[int, int]) -> None:
    h, w = size
    places = [(h // 4, w // 4), (h // 4, 3 * w // 4), (3 * h // 4, w // 2), (h // 2, w // 5), (2 * h // 3, 4 * w // 5)]
    x = with_blob(places, size)
    for x_in in (x, (x * 255).to(torch.uint8), x.double(), x.half()):
        plan = SaliencyMix(alpha=50.0).plan(x_in, generator=rng(1))
        assert plan.box is not None
        for i, partner in enumerate(plan.partner.tolist()):
            for axis in range(2):
                start, stop = plan.box[i, axis].tolist()
                if start > 0 and stop < size[axis]:  # not clipped
                    assert abs((start + stop) / 2 - places[partner][axis]) <= 4 + size[axis] // 64


def test_each_partner_has_its_own_map() -> None:
    places = [(16, 16), (48, 48), (16, 48)]
    maps = spectral_residual(with_blob(places, (64, 64)))
    assert maps.shape == (3, 64, 64)
    for found, place in zip(maps.flatten(1).argmax(1).tolist(), places, strict=True):
        assert abs(found // 64 - place[0]) <= 4
        assert abs(found % 64 - place[1]) <= 4


def test_spectral_residual_against_the_definition() -> None:
    """A plain double-precision reading: amplitude, box average with wrapped neighbours, back, square, blur."""
    x = with_blob([(20, 30), (40, 10)], (48, 56)).double()
    got = spectral_residual(x)
    for image, found in zip(x.mean(1), got, strict=True):
        spectrum = torch.fft.fft2(image)
        amplitude = spectrum.abs()
        floor = 1e-5 * amplitude.max()
        log = (amplitude + floor).log()
        average = sum(log.roll((a, b), (0, 1)) for a in (-1, 0, 1) for b in (-1, 0, 1)) / 9
        energy = torch.fft.ifft2(spectrum / (amplitude + floor) * (log - average).exp()).abs() ** 2
        want = torch.zeros_like(energy)
        for i, j in ((20, 30), (0, 0), (47, 55), (13, 5)):
            wy = torch.exp(-0.5 * ((torch.arange(48) - i) / 2.5) ** 2).double()
            wx = torch.exp(-0.5 * ((torch.arange(56) - j) / 2.5) ** 2).double()
            # weights of a target pixel's column in the blur matrix are normalised over the sources
            want[i, j] = (wy / wy.sum()) @ energy @ (wx / wx.sum())
            assert found[i, j] == pytest.approx(float(want[i, j]), rel=1e-6)


def test_a_callable_decides() -> None:
    x = torch.rand(4, 3, 20, 30, generator=rng())
    seen = []

    def corner(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.shape)
        out = torch.zeros(4, 10, 10)  # coarser than the image
        out[:, 9, 0] = 1.0
        return out

    plan = SaliencyMix(alpha=50.0, saliency=corner).plan(x, generator=rng(1))
    assert seen == [(4, 3, 20, 30)]
    assert plan.box is not None
    assert bool((plan.box[:, 0, 1] == 20).all())  # bottom
    assert bool((plan.box[:, 1, 0] == 0).all())  # left


class Picture(torch.Tensor):
    """A subclass that its operations keep, as torchvision's images may be told to."""


@pytest.mark.parametrize("saliency", [None, lambda x: x.mean(1)], ids=["spectral", "own"])
def test_a_plan_for_pictures_is_plain_tensors(saliency) -> None:
    x = torch.rand(4, 3, 12, 12, generator=rng())
    plan = SaliencyMix(saliency=saliency).plan(x.as_subclass(Picture), generator=rng(1))
    want = SaliencyMix(saliency=saliency).plan(x, generator=rng(1))
    assert type(plan.lam) is type(plan.box) is torch.Tensor
    assert torch.equal(plan.lam, want.lam)
    assert torch.equal(plan.box, want.box)


def test_series_and_volumes() -> None:
    series = with_blob([(50,), (150,)], (200,), 2)
    plan = SaliencyMix(alpha=50.0).plan(series, generator=rng())
    assert plan.box is not None
    middle = plan.box.float().mean((1, 2))
    assert abs(float(middle[0]) - 150) < 30
    assert abs(float(middle[1]) - 50) < 30
    volume = with_blob([(10, 20, 5), (4, 6, 15)], (16, 28, 20), 1)
    maps = spectral_residual(volume)
    assert maps.shape == (2, 16, 28, 20)
    at = int(maps[0].argmax())
    assert abs(at // 560 - 10) <= 3
    assert abs(at // 20 % 28 - 20) <= 3


def test_flat_images_are_harmless() -> None:
    for value in (0.0, 1.0, 255.0):
        maps = spectral_residual(torch.full((2, 3, 16, 16), value))
        assert bool(maps.isfinite().all())
        mixed, _ = SaliencyMix()(torch.full((2, 3, 16, 16), value), torch.arange(2), generator=rng())
        assert bool((mixed == value).all())


def test_no_gradient_through_the_map() -> None:
    x = torch.rand(3, 3, 16, 16, generator=rng(), requires_grad=True)
    plan = SaliencyMix().plan(x, generator=rng())
    assert not plan.lam.requires_grad
    plan.blend(x).sum().backward()
    assert x.grad is not None


def looking_at(places: list[tuple[int, int]], size: tuple[int, int]) -> nn.Module:
    """A model whose class k hangs on the pixel places[k] alone, behind a batch norm and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * size[0] * size[1], len(places)), nn.Dropout())
    with torch.no_grad():
        model[2].weight.zero_()
        for k, (r, c) in enumerate(places):
            model[2].weight.view(len(places), 3, *size)[k, :, r, c] = 0.3
    return model


def test_the_input_gradient_puts_the_box_where_the_model_looks() -> None:
    size = (40, 60)
    places = [(12, 15), (30, 40), (20, 50)]
    model = looking_at(places, size)
    y = torch.tensor([0, 1, 2, 1, 0])
    x = torch.rand(5, 3, *size, generator=rng())
    state, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    policy = SaliencyMix(alpha=50.0, saliency="input-gradient", model=model)
    plan = policy.plan(x, y, generator=rng(1))
    maps = input_saliency(model, x, y)
    for k, at in zip(y.tolist(), maps.flatten(1).argmax(1).tolist(), strict=True):
        assert divmod(at, 60) == places[k]
    by_hand = SaliencyMix(alpha=50.0, saliency=lambda batch: maps).plan(x, generator=rng(1))
    assert torch.equal(plan.box, by_hand.box)
    assert not torch.equal(plan.box, SaliencyMix(alpha=50.0).plan(x, generator=rng(1)).box)
    assert torch.equal(plan.lam, own_share(plan.mask))
    mixed, target = policy(x, y, generator=rng(1))
    assert torch.equal(mixed, plan.blend(x))
    assert torch.equal(target.weights[:, 0], plan.lam)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(module.training for module in model.modules())
    assert policy.state_dict() == {}
    assert list(policy.parameters()) == list(policy.children()) == []
    assert torch.equal(pickle.loads(pickle.dumps(policy))(x, y, generator=rng(1))[0], mixed)
    half, _ = policy(x.half(), y, generator=rng(1))
    assert half.dtype == torch.float16
    alone, _ = policy(x[:1], y[:1], generator=rng(1))
    assert torch.equal(alone, x[:1])


def test_the_names_of_the_maps() -> None:
    x = torch.rand(5, 3, 24, 30, generator=rng())
    want = SaliencyMix().plan(x, generator=rng(1)).box
    for same in (
        SaliencyMix(1.0, saliency="spectral-residual"),
        SaliencyMix(saliency="spectral-residual", model=nn.Flatten()),
    ):
        assert torch.equal(same.plan(x, generator=rng(1)).box, want)
    assert "saliency='spectral-residual'" in repr(SaliencyMix(saliency="spectral-residual"))
    assert "saliency" not in repr(SaliencyMix())


def test_refusals() -> None:
    x = torch.rand(4, 3, 8, 8)
    with pytest.raises(
        ValueError, match="SaliencyMix: saliency is 'opencv'; pass one of 'spectral-residual', 'input-g"
    ):
        SaliencyMix(saliency="opencv")
    with pytest.raises(TypeError, match="SaliencyMix: saliency is a int; pass a function of the batch, or one of"):
        SaliencyMix(saliency=3)
    with pytest.raises(ValueError, match="saliency is 'input-gradient' but model is None; pass the model that is"):
        SaliencyMix(saliency="input-gradient")
    with pytest.raises(TypeError, match=r"SaliencyMix: model is a str; pass a torch\.nn\.Module"):
        SaliencyMix(model="net")
    asked = SaliencyMix(saliency="input-gradient", model=nn.Flatten())
    with pytest.raises(ValueError, match="SaliencyMix: y is None; pass the labels"):
        asked.plan(x)
    with pytest.raises(TypeError, match=r"SaliencyMix: x has dtype torch\.uint8"):
        asked.plan((x * 255).byte(), torch.arange(4))
    for wrong, got in (
        (lambda b: b, r"\(4, 3, 8, 8\)"),
        (lambda b: b[:2, 0], r"\(2, 8, 8\)"),
        (lambda b: None, "NoneType"),
        (lambda b: b[:, 0, :0], r"\(4, 0, 8\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"saliency returned {got} for a batch of shape \(4, 3, 8, 8\); return one map"
        ):
            SaliencyMix(saliency=wrong).plan(x)
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"SaliencyMix: saliency returned dtype {dtype}; return integers or float"):
            SaliencyMix(saliency=lambda b, dtype=dtype: b[:, 0].to(dtype)).plan(x)
    with pytest.raises(
        ValueError, match="SaliencyMix: the map that saliency returned is on meta but x is on cpu; move"
    ):
        SaliencyMix(saliency=lambda b: b[:, 0].to("meta")).plan(x)
    with pytest.raises(ValueError, match=r"spectral_residual: x has shape \(4, 3\); pass a batch with 3 to 5 axes"):
        spectral_residual(torch.rand(4, 3))
