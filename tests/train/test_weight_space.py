"""WiSE-FT and TPGM: ends of the line and of the ball, what is not a weight, radii that validation data chooses."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix.train.weight_space import fit_radii, project, wise_ft

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Before and after a few steps in which the statistics move as well."""
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        loss = net(torch.randn(8, 1, 4, 4, generator=rng(step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, dict(net.state_dict())


# WiSE-FT


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_line_is_that_of_the_formula(alpha) -> None:
    before, after = states()
    got = wise_ft(before, after, alpha)
    assert list(got) == list(after)
    for name, value in after.items():
        if value.is_floating_point():
            want = [(1 - alpha) * x + alpha * y for x, y in zip(before[name].flatten(), value.flatten(), strict=True)]
            torch.testing.assert_close(got[name].flatten(), torch.stack(want), rtol=1e-6, atol=1e-7)
    model(5).load_state_dict(got)


def test_the_ends_are_bit_equal_and_inputs_are_kept() -> None:
    before, after = states()
    copies = [{name: value.clone() for name, value in state.items()} for state in (before, after)]
    for alpha, want in ((0.0, before), (1.0, after)):
        got = wise_ft(before, after, alpha)
        for name, value in want.items():
            if value.is_floating_point():
                assert torch.equal(got[name], value)
            got[name].fill_(7)
    for state, copy in zip((before, after), copies, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE, torch.complex64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_end_does_not_feel_what_the_other_one_holds(dtype, value) -> None:
    """Also in another dtype, and for what both have: the -inf of a mask."""
    whole = torch.randn(4, generator=rng(), dtype=DOUBLE).to(dtype)
    broken = torch.full((4,), value, dtype=dtype)
    other = torch.complex128 if dtype.is_complex else DOUBLE
    for alpha, (before, after) in ((0.0, (whole, broken)), (1.0, (broken, whole))):
        for one, two in ((before, after), (before.to(other), after), (before, after.to(other))):
            got = wise_ft({"w": one}, {"w": two}, alpha)["w"]
            assert torch.equal(got, whole.to(two.dtype))
            assert got.data_ptr() not in (one.data_ptr(), two.data_ptr())
        assert not wise_ft({"w": before}, {"w": after}, 0.5)["w"].isfinite().any()
        assert torch.equal(
            wise_ft({"w": before}, {"w": after}, 1.0 - alpha)["w"].view(torch.uint8), broken.view(torch.uint8)
        )
    if value == value:
        for alpha in (0.0, 0.3, 1.0):
            assert torch.equal(wise_ft({"w": broken}, {"w": broken.clone()}, alpha)["w"], broken)


def test_counters_are_those_of_the_tuned_model() -> None:
    before, after = states()
    assert before["1.num_batches_tracked"] == 0
    for alpha in (0.0, 0.4, 1.0):
        got = wise_ft(before, after, alpha)["1.num_batches_tracked"]
        assert got == 3
        assert got.dtype == torch.long
    flags = wise_ft({"m": torch.tensor([True, False])}, {"m": torch.tensor([False, False])}, 0.5)
    assert torch.equal(flags["m"], torch.tensor([False, False]))


def test_what_was_not_tuned_stays_bit_equal() -> None:
    value = torch.randn(1000, generator=rng())
    for alpha in (0.1, 0.3, 0.7):
        assert torch.equal(wise_ft({"w": value}, {"w": value.clone()}, alpha)["w"], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE, torch.complex64], ids=str)
def test_dtypes(dtype) -> None:
    x, y = (torch.randn(50, generator=rng(k), dtype=DOUBLE).to(dtype) for k in range(2))
    got = wise_ft({"w": x}, {"w": y}, 0.3)["w"]
    assert got.dtype == dtype
    wide = torch.complex128 if dtype.is_complex else DOUBLE
    want = (0.7 * x.to(wide) + 0.3 * y.to(wide)).to(dtype)
    torch.testing.assert_close(got, want, rtol=3 * torch.finfo(dtype).eps, atol=3 * torch.finfo(dtype).eps)
    top = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
    if dtype in (torch.float16, torch.float32):
        assert wise_ft({"w": top}, {"w": top}, 0.5)["w"].isfinite().all()
    # Weights of half the width beside full ones: the tuned model's dtype counts.
    assert (
        wise_ft({"w": x.to(torch.complex64 if dtype.is_complex else torch.float16)}, {"w": y}, 0.3)["w"].dtype == dtype
    )


def test_the_line_back() -> None:
    before, after = states()
    forth, back = wise_ft(before, after, 0.3), wise_ft(after, before, 0.7)
    for name in after:
        if after[name].is_floating_point():
            torch.testing.assert_close(forth[name], back[name])


W = {"a": torch.ones(2), "b": torch.ones(3)}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((W, W, 1.5), ValueError, "alpha is 1.5; pass a number from 0 to 1."),
        ((W, W, None), TypeError, "alpha is None; pass a number from 0 to 1."),
        (([1.0], W, 0.5), TypeError, "zero_shot is a list; pass a state dict, names to tensors."),
        ((W, {"a": 3}, 0.5), TypeError, "fine_tuned['a'] is a int; pass a state dict, names to tensors."),
        (
            (W, {"a": W["a"]}, 0.5),
            ValueError,
            "fine_tuned lacks 'b' of zero_shot; pass weights of one architecture.",
        ),
        (
            ({}, dict.fromkeys("vwxyz", torch.ones(1)), 0.5),
            ValueError,
            "zero_shot lacks 'v', 'w', 'x' and 2 more of fine_tuned; pass weights of one architecture.",
        ),
        (
            (W, {"a": torch.ones(4), "b": torch.ones(3)}, 0.5),
            ValueError,
            "'a' has shape (2,) in zero_shot but (4,) in fine_tuned; pass weights of one architecture.",
        ),
    ],
)
def test_messages_of_the_line(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^wise_ft: {re.escape(message)}$"):
        wise_ft(*arguments)


# The projection of TPGM


def slow_projection(after: Tensor, before: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "l2" or after.ndim < 2:
        moved = (after - before).flatten().tolist()
        length = sum(v * v for v in moved) ** 0.5 if norm == "l2" else sum(abs(v) for v in moved)
        return before + min(1.0, radius / length) * (after - before)
    rows = []
    for x, y in zip(after, before, strict=True):
        length = sum(abs(v) for v in (x - y).flatten().tolist())
        rows.append(y + min(1.0, radius / length) * (x - y))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["l2", "rows"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("radius", [0.01, 1.0, 3.0, 100.0])
def test_the_projection_is_that_of_the_formula(norm, shape, radius) -> None:
    before, after = (torch.randn(shape, dtype=DOUBLE, generator=rng(k)) for k in range(2))
    got = project({"w": after}, {"w": before}, {"w": radius}, norm=norm)["w"]
    torch.testing.assert_close(got, slow_projection(after, before, radius, norm), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "rows"])
def test_both_ends_are_bit_equal(norm) -> None:
    before, after = (torch.randn(6, 5, generator=rng(k)) for k in range(2))
    after[2] = before[2]  # a row that was not tuned
    for radius, want in ((0.0, before), (1e9, after)):
        assert torch.equal(project({"w": after}, {"w": before}, {"w": radius}, norm=norm)["w"], want)
    assert torch.equal(project({"w": after}, {"w": before}, {"w": 0.1}, norm=norm)["w"][2], before[2])
    radius = torch.tensor(0.1, requires_grad=True)
    same = project({"w": before}, {"w": before}, {"w": radius}, norm=norm)["w"]
    assert torch.equal(same, before)
    assert torch.autograd.grad(same.sum(), radius)[0] == 0.0


@pytest.mark.parametrize("norm", ["l2", "rows"])
def test_it_stays_in_the_ball_and_is_idempotent(norm) -> None:
    before, after = states()
    radii = {name: 0.05 for name in before if before[name].is_floating_point()}
    once = project(after, before, radii, norm=norm)
    for name in radii:
        moved = (once[name] - before[name]).double()
        rows = moved.flatten(1) if moved.ndim > 1 else moved[None]
        length = moved.norm() if norm == "l2" else rows.abs().sum(1).max()
        assert length <= 0.05 * (1 + 1e-5)
    twice = project(once, before, radii, norm=norm)
    for name in once:
        torch.testing.assert_close(twice[name], once[name])


def test_only_what_is_named_moves() -> None:
    before, after = states()
    got = project(after, {"3.weight": before["3.weight"]}, {"3.weight": 0.0})
    assert list(got) == list(after)
    for name, value in got.items():
        assert torch.equal(value, before[name] if name == "3.weight" else after[name])
    model(5).load_state_dict(got)


@pytest.mark.parametrize("norm", ["l2", "rows"])
def test_the_projection_has_a_slope_in_the_radius(norm) -> None:
    before, after = (torch.randn(4, 3, dtype=DOUBLE, generator=rng(k)) for k in range(2))
    after[1] = before[1]
    for value in (0.7, 2.1):
        radius = torch.tensor(value, dtype=DOUBLE, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda r: project({"w": after}, {"w": before}, {"w": r}, norm=norm)["w"], radius
        )
    far = torch.tensor(1e3, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(project({"w": after}, {"w": before}, {"w": far}, norm=norm)["w"].sum(), far)
    assert slope == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights(dtype) -> None:
    before, after = (torch.randn(40, 30, generator=rng(k)).to(dtype) for k in range(2))
    got = project({"w": after}, {"w": before}, {"w": 5.0})["w"]
    assert got.dtype == dtype
    want = slow_projection(after.double(), before.double(), 5.0, "l2").to(dtype)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"radii": 0.5}, TypeError, "radii is a float; pass a dict of names and radii."),
        ({"radii": {"aa": 0.5}}, ValueError, "radii names 'aa', which fine_tuned lacks (did you mean \"a\"?); pass "),
        ({"reference": {}}, ValueError, "radii names 'a', which reference lacks; pass names of both."),
        ({"radii": {"a": -1.0}}, ValueError, "radii['a'] is -1.0; pass a finite number of at least 0."),
        ({"radii": {"a": torch.tensor(-1.0)}}, ValueError, "radii['a'] is -1.0; pass a finite number of at least 0."),
        ({"radii": {"a": None}}, TypeError, "radii['a'] is None; pass a finite number of at least 0."),
        (
            {"radii": {"a": torch.ones(2)}},
            ValueError,
            "radii['a'] has shape (2,) and dtype torch.float32; pass a number",
        ),
        ({"fine_tuned": {"a": torch.tensor([1])}}, ValueError, "radii names 'a' of dtype torch.int64; pass names of "),
        ({"fine_tuned": {"a": torch.ones(7)}}, ValueError, "'a' has shape (2,) in reference but (7,) in fine_tuned; "),
        ({"fine_tuned": nn.Linear(1, 1)}, TypeError, "fine_tuned is a Linear; pass a state dict, names to tensors."),
        ({"norm": "l1"}, ValueError, "norm is 'l1'; pass one of 'l2', 'rows'"),
    ],
)
def test_messages_of_the_projection(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^project: {re.escape(message)}"):
        project(**{"fine_tuned": W, "reference": W, "radii": {"a": 0.5}, **setting})


# Radii


def cross_entropy(forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(forward(batch[0]), batch[1])


def linear(weight: Tensor) -> nn.Module:
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    net.weight.data.copy_(weight)
    return net


def test_the_best_radius_is_found() -> None:
    """Squares of the distance to a point on the way: the radius that reaches it."""
    before, after = (torch.randn(3, 4, dtype=DOUBLE, generator=rng(k)) for k in range(2))
    length = (after - before).norm().item()
    for share in (0.2, 0.8):
        goal = before + share * (after - before)
        net = linear(after)
        radii = fit_radii(
            net,
            {"weight": before},
            lambda forward, batch, goal=goal: (forward(batch) - goal.T).square().sum(),
            [torch.eye(4, dtype=DOUBLE)],
            lr=0.05,
            steps=400,
        )
        assert radii["weight"].item() == pytest.approx(share * length, abs=1e-3)
        assert not radii["weight"].requires_grad
        torch.testing.assert_close(
            project(net.state_dict(), {"weight": before}, radii)["weight"], goal, atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("norm", ["l2", "rows"])
def test_radii_stay_between_both_ends(norm) -> None:
    before, after = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 2.0], [0.3, 0.0, 0.4]])
    longest = 3.0 if norm == "l2" else 5.0
    for sign, want in ((1.0, 0.0), (-1.0, (9 + 0.25) ** 0.5 if norm == "l2" else longest)):
        radii = fit_radii(
            linear(after),
            {"weight": before},
            lambda forward, batch, sign=sign: sign * forward(batch).square().sum(),
            [torch.eye(3)],
            norm=norm,
            lr=0.3,
            steps=60,
        )
        assert radii["weight"].item() == pytest.approx(want, abs=1e-5)


def test_it_starts_half_way() -> None:
    before, after = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 2.0], [0.3, 0.0, 0.4]])
    for norm, want in (("l2", 0.5 * (9 + 0.25) ** 0.5), ("rows", 0.5 * 0.7)):
        found = fit_radii(
            linear(after), {"weight": before}, lambda f, x: f(x).sum(), [torch.eye(3)], norm=norm, lr=1e-9, steps=1
        )
        assert found["weight"].item() == pytest.approx(want, rel=1e-6)


def test_the_authors_loop_in_small() -> None:
    """Their steps for "l2" beside ours: Adam, the clip before each pass, the projection of a copy."""
    before, after = states()
    net = model()
    net.load_state_dict(after)
    batches = [(torch.randn(6, 1, 4, 4, generator=rng(k)), torch.arange(6) % 4) for k in range(3)]
    still = ["0.bias"]  # normalised away, so it has not moved; their clip has no room then
    got = fit_radii(net, before, cross_entropy, batches, lr=0.01, steps=7, exclude=still)
    names = [name for name, _ in net.named_parameters() if name not in still]
    length = {name: (after[name] - before[name]).norm() for name in names}
    theirs = {name: (length[name] / 2).requires_grad_() for name in names}
    adam = torch.optim.Adam(theirs.values(), lr=0.01)
    net.eval()
    for step in range(7):
        with torch.no_grad():
            for name in names:
                theirs[name].copy_(F.hardtanh(theirs[name], 1e-8, length[name].item()))
        weights = {
            name: before[name] + theirs[name] / (length[name] + 1e-8) * (after[name] - before[name]) for name in names
        }
        images, labels = batches[step % 3]
        adam.zero_grad()
        F.cross_entropy(torch.func.functional_call(net, weights, images), labels).backward()
        adam.step()
    for name in names:
        assert got[name].item() == pytest.approx(min(theirs[name].item(), length[name].item()), rel=1e-3, abs=1e-6)


def test_the_model_is_as_before() -> None:
    before, after = states()
    net = model()
    net.load_state_dict(after)
    net[1].eval()
    net[0].weight.grad = torch.ones(3, 1, 3, 3)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    batch = (torch.randn(6, 1, 4, 4, generator=rng()), torch.arange(6) % 4)
    first = fit_radii(net, before, cross_entropy, [batch], steps=5)
    assert [part.training for part in net] == [True, False, True, True]
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert net[3].weight.grad is None
    assert (net[0].weight.grad == 1.0).all()
    assert net[3].weight.requires_grad
    with torch.no_grad():
        again = fit_radii(net, before, cross_entropy, [batch], steps=5)
    assert first == again
    net[3].bias.requires_grad_(False)
    fewer = fit_radii(net, before, cross_entropy, [batch], steps=1, exclude=["3.weight"])
    assert set(first) - set(fewer) == {"3.weight", "3.bias"}
    assert set(fit_radii(net, before, cross_entropy, [batch], steps=1, exclude="0.bias")) == set(first) - {
        "0.bias",
        "3.bias",
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_tied_weights_share_a_radius() -> None:
    torch.manual_seed(0)
    net = Tied()
    before = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    batch = (torch.arange(5), torch.arange(5))
    radii = fit_radii(net, before, cross_entropy, [batch], steps=3)
    assert set(radii) == {"embed.weight", "head.weight"}
    assert radii["embed.weight"] == radii["head.weight"]
    net.load_state_dict(project(net.state_dict(), before, radii))
    assert net.head.weight.norm().item() == pytest.approx(radii["head.weight"].item(), rel=1e-5)


def test_a_part_that_the_loss_does_not_use_keeps_its_radius() -> None:
    net = nn.ModuleDict(OrderedDict(used=nn.Linear(2, 2), unused=nn.Linear(2, 2)))
    net.forward = lambda x: net["used"](x)
    before = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    radii = fit_radii(net, before, lambda forward, x: forward(x).square().sum(), [torch.ones(1, 2)], steps=3)
    assert radii["unused.weight"].item() == pytest.approx(net["unused"].weight.norm().item() / 2)
    assert radii["used.weight"].item() < net["used"].weight.norm().item() / 2


ONE = [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))]


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"model": W}, TypeError, "model is a dict; pass a torch.nn.Module."),
        ({"reference": 3}, TypeError, "reference is a int; pass a state dict, names to tensors."),
        ({"reference": {"bias": torch.ones(3)}}, ValueError, "reference lacks 'weight' of the model; pass the state "),
        (
            {"reference": {"weight": torch.ones(3, 4), "bias": torch.ones(3)}},
            ValueError,
            "'weight' has shape (3, 4) in reference but (3, 2) in the model; pass weights of one architecture.",
        ),
        ({"exclude": ["wight"]}, ValueError, "exclude names 'wight', which the model lacks (did you mean \"weight\"?)"),
        ({"exclude": ["weight", "bias"]}, ValueError, "model has no parameter that requires a gradient and is not "),
        (
            {"batches": []},
            ValueError,
            "batches is empty or was gone through; pass a list or a loader with batches in it",
        ),
        ({"batches": iter(ONE)}, ValueError, "batches is empty or was gone through; pass a list or a loader with "),
        (
            {"objective": lambda f, b: 1.0},
            ValueError,
            "objective gave a float that is no loss of one element made with",
        ),
        (
            {"objective": lambda f, b: torch.ones(())},
            ValueError,
            "objective gave a tensor that is no loss of one element",
        ),
        ({"objective": lambda f, b: f(b[0])}, ValueError, "objective gave a tensor that is no loss of one element"),
        ({"objective": lambda f, b: f(b[0]).sum() / 0}, ValueError, "objective is "),
        ({"norm": "mars"}, ValueError, "norm is 'mars'; pass one of 'l2', 'rows'"),
        ({"lr": 0.0}, ValueError, "lr is 0.0; pass a finite number greater than 0."),
        ({"steps": 0}, ValueError, "steps is 0; pass an integer of at least 1."),
    ],
)
def test_messages_of_the_radii(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 3)
    before = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    given = {"model": net, "reference": before, "objective": cross_entropy, "batches": ONE}
    with pytest.raises(kind, match=f"^fit_radii: {re.escape(message)}"):
        fit_radii(**{**given, **setting})
    assert net.training
