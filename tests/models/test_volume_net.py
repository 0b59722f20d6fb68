"""The encoder of volumes: shapes, sizes, layouts, gradients, what it learns, and bad inputs."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn

from hardmix.models.volume import VolumeNet


def net(channels: int = 2, **options: int) -> VolumeNet:
    torch.manual_seed(0)
    return VolumeNet(channels=channels, **options)


@pytest.mark.parametrize("shape", [(8, 8, 8), (16, 16, 16), (9, 20, 33), (64, 64, 64), (1, 1, 1)])
def test_any_volume_becomes_features(shape: tuple[int, int, int]) -> None:
    model = net(width=4).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 2, *shape))
    assert out.shape == (2, 16)
    assert model.features == 16
    assert out.isfinite().all()


@pytest.mark.parametrize(("depth", "features"), [(1, 4), (2, 8), (4, 32)])
def test_depth_doubles_the_channels_and_halves_the_map(depth: int, features: int) -> None:
    model = net(width=4, depth=depth)
    assert model.features == features
    x = torch.relu(model.stem(torch.randn(2, 2, 32, 32, 32)))
    assert x.shape == (2, 4, 16, 16, 16)
    for k, block in enumerate(model.blocks):
        x = block(x)
        assert x.shape == (2, 4 * 2**k, *[16 // 2**k] * 3)


def test_parameters_are_pinned() -> None:
    assert sum(p.numel() for p in VolumeNet(channels=5).parameters()) == 226_576
    assert VolumeNet(channels=5).features == 64


def test_features_are_the_mean_over_the_positions() -> None:
    model = net().eval()
    x = torch.randn(3, 2, 16, 16, 16)
    assert torch.allclose(model(x), model.blocks(torch.relu(model.stem(x))).flatten(2).mean(2), atol=1e-6)


def test_same_seed_same_network_and_a_copy_agrees() -> None:
    model, x = net().eval(), torch.randn(3, 2, 8, 8, 8)
    assert torch.equal(model(x), net().eval()(x))
    other = VolumeNet(channels=2).eval()
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_channels_last_gives_the_same_and_stays() -> None:
    model = net()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = torch.randn(4, 2, 16, 16, 16)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    seen = []
    handle = other.blocks.register_forward_hook(lambda module, given, out: seen.append(out))
    model(x).square().sum().backward()
    other(last).square().sum().backward()
    handle.remove()
    assert seen[0].is_contiguous(memory_format=torch.channels_last_3d)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-3, rtol=1e-3)
    assert torch.allclose(model.eval()(x), other.eval()(last), atol=1e-5)


def test_every_parameter_has_a_gradient_and_the_input_is_not_written() -> None:
    model = net()
    x = torch.randn(4, 2, 8, 8, 8)
    before = x.clone()
    model(x).square().sum().backward()
    assert torch.equal(x, before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_one_sample_trains_while_the_last_map_has_voxels() -> None:
    assert net()(torch.randn(1, 2, 16, 16, 16)).shape == (1, 64)


def test_it_learns_how_bright_volumes_are() -> None:
    """Of volumes alike but for a factor, which statistics of a sample or a group would take out."""
    g = torch.Generator().manual_seed(0)
    y = torch.rand(64, generator=g) + 0.5
    x = torch.randn(64, 1, 8, 8, 8, generator=g) * y[:, None, None, None, None]
    model = net(1, width=8)
    head = nn.Linear(model.features, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    for _ in range(25):
        for rows in torch.randperm(64, generator=g).split(16):
            loss = (head(model(x[rows]))[:, 0] - y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        error = head(model.eval()(x))[:, 0] - y
    assert error.square().mean() < 0.2 * y.var()


def test_a_step_is_quick() -> None:
    """22 ms for a batch of 32 molecules on one thread; ten times that leaves room for a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, x = net(5), torch.randn(32, 5, 16, 16, 16)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            model(x).sum().backward()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert best < 0.22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels is 0; pass an integer of at least 1"),
        ({"channels": 1, "width": 0}, "width is 0"),
        ({"channels": 1, "depth": -1}, "depth is -1"),
    ],
)
def test_bad_sizes(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"volume-cnn: {message}"):
        VolumeNet(**options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 2, 8, 8), ValueError, r"x has shape \(2, 2, 8, 8\); pass a batch with 5 axes"),
        (torch.zeros(2, 3, 8, 8, 8), ValueError, "x has 3 channels; pass the 2 that the model was built for"),
        (
            torch.zeros(2, 2, 8, 8, 8).byte(),
            TypeError,
            "x has dtype torch.uint8; pass normalised floating-point volumes",
        ),
        ([1.0], TypeError, "x is a list; pass a torch.Tensor"),
    ],
)
def test_bad_batches(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"volume-cnn: {message}"):
        net()(x)
