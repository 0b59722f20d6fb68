"""The encoder of series: shapes, sizes, gradients, seeds, and that it learns what it is for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hardmix.models.series import SeriesNet


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 100, 1000])
@pytest.mark.parametrize(("width", "depth", "features"), [(8, 1, 8), (8, 2, 16), (8, 3, 32), (8, 5, 32)])
def test_shapes(length: int, width: int, depth: int, features: int) -> None:
    model = SeriesNet(channels=3, width=width, depth=depth)
    assert model.features == features
    assert model(torch.randn(4, 3, length)).shape == (4, features)
    assert model.eval()(torch.randn(1, 3, length)).shape == (1, features)


@pytest.mark.parametrize(("channels", "count"), [(1, 111_424), (7, 112_768)])
def test_parameter_counts(channels: int, count: int) -> None:
    assert sum(p.numel() for p in SeriesNet(channels=channels).parameters()) == count


def test_every_stage_halves_the_length() -> None:
    model, lengths = SeriesNet(channels=2, width=8, depth=4), []
    for stage in model.stages:
        stage.register_forward_hook(lambda _module, _given, out: lengths.append(tuple(out.shape[1:])))
    model(torch.randn(2, 2, 100))
    assert lengths == [(8, 50), (16, 25), (32, 13), (32, 7)]


def test_every_parameter_gets_a_gradient_and_the_input_is_left_alone() -> None:
    model, x = SeriesNet(channels=2, width=8), torch.randn(8, 2, 40)
    before = x.clone()
    model(x).square().sum().backward()
    assert torch.equal(x, before)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def test_same_seed_same_network_and_state_comes_back() -> None:
    first = SeriesNet(channels=2, width=8)
    torch.manual_seed(0)
    second = SeriesNet(channels=2, width=8)
    x = torch.randn(8, 2, 40)
    assert torch.equal(first(x), second(x))
    third = SeriesNet(channels=2, width=8)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.eval()(x), third.eval()(x))


def test_samples_do_not_touch_each_other_in_evaluation() -> None:
    model, x = SeriesNet(channels=2, width=8), torch.randn(8, 2, 40)
    model(x)
    model.eval()
    torch.testing.assert_close(model(x), torch.cat([model(row[None]) for row in x]))


def learnt(target: Callable[[torch.Tensor], torch.Tensor], length: int) -> float:
    """R2 on fresh series after 150 steps."""
    g = torch.Generator().manual_seed(1)
    encoder = SeriesNet(channels=2, width=8)
    model = nn.Sequential(encoder, nn.Linear(encoder.features, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        x = torch.randn(64, 2, length, generator=g)
        loss = (model(x)[:, 0] - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(500, 2, length, generator=g)
    with torch.no_grad():
        error = model.eval()(x)[:, 0] - target(x)
    return 1 - (error.square().mean() / target(x).var()).item()


@pytest.mark.parametrize(
    ("target", "length"),
    [
        pytest.param(lambda x: x[:, 0].mean(1) * 5, 32, id="level"),
        pytest.param(lambda x: x[:, 1].std(1) * 8, 32, id="amplitude"),
        # further from either end than any feature sees, so the zeros beyond the ends don't tell where it is
        pytest.param(lambda x: x[:, 0, 40:48].mean(1) * 3, 128, id="position"),
    ],
)
def test_it_learns_what_numbers_depend_on(target: Callable[[torch.Tensor], torch.Tensor], length: int) -> None:
    assert learnt(target, length) > 0.8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SeriesNet(channels=0), ValueError, "channels is 0; pass an integer of at least 1"),
        (lambda: SeriesNet(channels=1, width=-1), ValueError, "width is -1"),
        (lambda: SeriesNet(channels=1, depth=True), TypeError, "depth is True"),
        (lambda: SeriesNet(channels=2)(torch.randn(4, 3, 20)), ValueError, "x has 3 channels; pass the 2 that"),
        (lambda: SeriesNet(channels=2)(torch.randn(4, 20)), ValueError, r"x has shape \(4, 20\); pass a batch with 3"),
        (lambda: SeriesNet(channels=2)(torch.zeros(4, 2, 9).long()), TypeError, "x has dtype torch.int64; pass stand"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"SeriesNet: {message}"):
        call()
