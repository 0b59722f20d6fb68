"""SnapMix: a window of the partner in a window of the image, labels weighed by the class activation in both."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix.losses import DecoupledMixupLoss, SoftCrossEntropyLoss
from hardmix.mixing import RandomChoice, Scheduled
from hardmix.mixing.snapmix import SnapMix, SnapPlan
from mixing.cases import constant_rows, rng


class Net(nn.Module):
    """Features that are negative in places, a functional relu, and a second linear layer before the head."""

    def __init__(self, classes: int = 4, stride: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.body = nn.Conv2d(4, 5, 3, stride=stride, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Linear(2, 4)
        self.classes = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        hidden = self.drop(self.norm(self.stem(x))) * gate
        return self.classes(self.pool(F.relu(self.body(hidden))).flatten(1))


class Painted(nn.Module):
    """The map of class k is channel k of the image."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(classes, classes, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def enlarged(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, one pixel at a time; the outer edges of the border pixels coincide."""
    out = np.zeros(size)
    for r, c in np.ndindex(*size):
        out[r, c] = read(cam, (r + 0.5) * cam.shape[0] / size[0], (c + 0.5) * cam.shape[1] / size[1])
    return out


def read(image: np.ndarray, down: float, across: float) -> float:
    """The value at a place measured from the image's corner in pixels, between the centres of four pixels."""
    (r, below), (c, right) = [(int(np.floor(at)), at - np.floor(at)) for at in (down - 0.5, across - 0.5)]
    total = 0.0
    for i, rows in ((r, 1 - below), (r + 1, below)):
        for j, columns in ((c, 1 - right), (c + 1, right)):
            inside = np.clip((i, j), 0, np.array(image.shape) - 1)  # borders are repeated
            total += rows * columns * image[tuple(inside)]
    return total


def seen_window(plan: SnapPlan) -> np.ndarray:
    """The window of the partner, from where its whole image would have to lie for the window to fill the box."""
    assert plan.box is not None
    assert plan.fit is not None
    assert plan.size is not None
    box, fit = plan.box.double(), plan.fit.double()
    zoom = (fit[..., 1] - fit[..., 0]) / torch.tensor(plan.size)
    return ((box - fit[..., :1]) / zoom[..., None]).numpy()


@pytest.mark.parametrize("size", [(12, 12), (13, 21), (30, 9)], ids=str)
def test_against_the_definition(size: tuple[int, int]) -> None:
    model = Net().eval().double()
    x, y = torch.rand(5, 2, *size, generator=rng(), dtype=torch.float64), torch.tensor([0, 3, 3, 1, 2])
    plan = SnapMix(model, alpha=1.0).plan(x, y, generator=rng(4))
    assert isinstance(plan, SnapPlan)
    with torch.no_grad():
        gate = model.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        maps = model.body(model.norm(model.stem(x)) * gate).numpy()
    assert (maps < 0).any()
    head, images = model.classes.weight.detach().numpy(), x.numpy()
    windows = seen_window(plan)
    assert np.abs(windows - windows.round()).max() < 1e-2  # whole pixels
    windows = windows.round().astype(int)
    assert (windows[..., 0] >= 0).all()
    assert (windows[..., 1] <= np.array(size)).all()
    assert (windows[..., 1] > windows[..., 0]).all()

    shares = []
    for i in range(5):
        cam = sum(head[y[i], d] * np.maximum(maps[i, d], 0.0) for d in range(5))
        cam = enlarged(cam, size)
        cam = cam - cam.min()
        shares.append(cam / cam.sum())
    got = plan.blend(x).numpy()
    for i, j in enumerate(plan.partner.tolist()):
        (top, bottom), (left, right) = plan.box[i].tolist()
        (up, down), (west, east) = windows[i].tolist()
        assert plan.weights[i, 0] == pytest.approx(1 - shares[i][top:bottom, left:right].sum(), abs=1e-6)
        assert plan.weights[i, 1] == pytest.approx(shares[j][up:down, west:east].sum(), abs=1e-6)
        assert plan.lam[i] == pytest.approx(1 - (bottom - top) * (right - left) / (size[0] * size[1]))
        want = images[i].copy()
        for r in range(top, bottom):
            for c in range(left, right):
                at = up + (r - top + 0.5) * (down - up) / (bottom - top)
                across = west + (c - left + 0.5) * (east - west) / (right - left)
                want[:, r, c] = [read(channel, at, across) for channel in images[j]]
        assert np.abs(got[i] - want).max() < 1e-4
    sums = plan.weights.sum(1)
    assert (sums - 1).abs().max() > 0.1


def test_weights_follow_what_is_shown() -> None:
    """What matters stands in one pixel: a label counts in full where that pixel is shown, else not at all."""
    x = torch.zeros(40, 2, 16, 16)
    y = torch.arange(40) % 2
    x[torch.arange(40), y, 5, 9] = 1.0
    x[torch.arange(40), 1 - y, 0, 0] = 5.0  # the other class's evidence doesn't count
    plan = SnapMix(Painted(), alpha=1.0).plan(x, y, generator=rng(2))
    assert isinstance(plan, SnapPlan)
    windows = seen_window(plan).round()
    for i in range(40):
        (top, bottom), (left, right) = plan.box[i].tolist()
        (up, down), (west, east) = windows[i].tolist()
        hidden = top <= 5 < bottom and left <= 9 < right
        shown = up <= 5 < down and west <= 9 < east
        assert plan.weights[i].tolist() == pytest.approx([1.0 - hidden, float(shown)], abs=1e-6)
    assert {tuple(row) for row in plan.weights.round().tolist()} == {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}


def test_the_loss_is_that_of_the_paper_also_for_one_class() -> None:
    model = Net().eval()
    x, y = torch.rand(8, 2, 14, 14, generator=rng()), torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    partner = torch.tensor([1, 2, 3, 0, 5, 6, 7, 4])
    plan = SnapMix(model).plan(x, y, generator=rng(1), partner=partner)
    target = plan.target(y)
    assert isinstance(plan, SnapPlan)
    assert torch.equal(target.labels, torch.stack([y, y[partner]], 1))
    assert torch.equal(target.weights, plan.weights)
    logits = torch.randn(8, 4, generator=rng(2), dtype=torch.float64, requires_grad=True)
    logs = logits.log_softmax(1)
    want = -sum(plan.weights[i, 0] * logs[i, y[i]] + plan.weights[i, 1] * logs[i, y[partner[i]]] for i in range(8)) / 8
    loss = SoftCrossEntropyLoss()(logits, target)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    (got,) = torch.autograd.grad(loss, logits)
    (slope,) = torch.autograd.grad(want, logits)
    assert torch.allclose(got, slope, rtol=1e-6)
    assert DecoupledMixupLoss(eta=1.0)(logits, target) > loss
    rows = F.one_hot(y, 4).float()
    of_rows = SnapMix(model).plan(x, rows, generator=rng(1), partner=partner)
    assert SoftCrossEntropyLoss()(logits, of_rows.target(rows)).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (130, 140)], ids=str)
@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
def test_pixels_agree_with_lam_and_flat_maps_with_the_areas(n: int, size: tuple[int, int], per: str) -> None:
    values = 2.0 ** -torch.arange(n, dtype=torch.float64)
    x = constant_rows(values, (2, *size))
    policy = SnapMix(Painted(), alpha=1.0, per=per)
    plan = policy.plan(x, torch.zeros(n, dtype=torch.long), generator=rng(1))
    assert isinstance(plan, SnapPlan)
    want = plan.lam.double() * values + (1 - plan.lam.double()) * values[plan.partner]
    assert torch.allclose(plan.blend(x).flatten(1).mean(1), want, atol=3e-7, rtol=0)
    # maps of one value: the weights are the areas
    assert torch.allclose(plan.weights[:, 0], plan.lam, atol=1e-5)
    windows = torch.from_numpy(seen_window(plan)).round()
    area = (windows[..., 1] - windows[..., 0]).prod(1) / (size[0] * size[1])
    assert torch.allclose(plan.weights[:, 1].double(), area, atol=1e-4)
    if per == "batch":
        assert len(plan.lam.unique()) == 1
    elif per == "pair":
        assert torch.equal(plan.box, plan.box[plan.partner])
    elif n == 7:
        assert len(plan.lam.unique()) > 3
        assert len(plan.weights[:, 1].unique()) > 3


def test_a_model_that_says_nan_counts_as_flat() -> None:
    model = Net()
    with torch.no_grad():
        model.body.weight.fill_(torch.nan)
    plan = SnapMix(model).plan(torch.rand(3, 2, 12, 12), torch.arange(3), generator=rng())
    assert isinstance(plan, SnapPlan)
    assert torch.allclose(plan.weights[:, 0], plan.lam, atol=1e-5)


def test_the_model_keeps_nothing() -> None:
    model = Net()
    policy = SnapMix(model)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.gate.weight.requires_grad_(False)
    state, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, y = torch.rand(4, 2, 12, 12, generator=rng()), torch.arange(4)
    before = x.clone()
    _, target = policy(x, y, generator=rng(1))
    assert policy.layer == "body"
    assert policy.head == "classes"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert bool((model.stem.weight.grad == 1).all())
    assert not model.gate.weight.requires_grad
    assert model.stem.weight.requires_grad
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(x, before)
    assert not target.weights.requires_grad
    assert policy.state_dict() == {}
    assert list(policy.parameters()) == list(policy.children()) == []
    # batch norms in training mode take the statistics of the batch
    model.norm.running_mean.fill_(50.0)
    assert torch.equal(policy(x, y, generator=rng(1))[1].weights, target.weights)
    model.eval()
    assert not torch.equal(policy(x, y, generator=rng(1))[1].weights, target.weights)


def test_draws_copies_and_moves() -> None:
    policy = SnapMix(Net(), layer="body", head="classes")
    x, y = torch.rand(7, 2, 15, 11, generator=rng()), torch.arange(7) % 4
    mixed, target = policy(x, y, generator=rng(1))
    again, same = policy(x, y, generator=rng(1))
    assert torch.equal(mixed, again)
    assert torch.equal(target.weights, same.weights)
    assert not torch.equal(mixed, policy(x, y, generator=rng(2))[0])
    assert torch.equal(pickle.loads(pickle.dumps(policy))(x, y, generator=rng(1))[0], mixed)
    plan = policy.plan(x, y, generator=rng(1)).to("meta")
    assert isinstance(plan, SnapPlan)
    assert plan.weights.device.type == plan.lam.device.type == plan.partner.device.type == "meta"
    second = policy.plan(x, y, generator=rng(1)).blend(x.flip(1))  # another view, cut alike
    assert torch.allclose(second, mixed.flip(1), atol=1e-6)
    mix = Scheduled(policy, start=0.5)
    assert torch.equal(mix(x, y)[0], x)
    mix.set_progress(0.6)
    assert torch.equal(mix(x, y, generator=rng(1))[1].weights, target.weights)
    chosen = RandomChoice([policy])(x, y, generator=rng(1))[1]
    assert (chosen.weights.sum(1) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("side", [14, 100])
def test_dtypes(dtype: torch.dtype, side: int) -> None:
    x, y = torch.rand(4, 2, side, side, generator=rng()), torch.arange(4)
    policy = SnapMix(Net())
    want, wanted = policy(x, y, generator=rng(1))
    mixed, target = policy(x.to(dtype), y, generator=rng(1))
    assert mixed.dtype == dtype
    assert target.weights.dtype == torch.float32
    assert torch.allclose(mixed.float(), want, atol=2 * torch.finfo(dtype).eps + 1e-5)
    assert torch.allclose(target.weights, wanted.weights, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = policy(x.to(dtype), y, generator=rng(1))
    assert torch.equal(again, mixed)
    assert torch.equal(same.weights, target.weights)


def test_nothing_is_read_on_the_host() -> None:
    """The meta device has no values to give."""
    x = torch.rand(5, 2, 20, 24, device="meta")
    mixed, target = SnapMix(Net().to("meta"))(x, torch.zeros(5, device="meta").long())
    assert mixed.device.type == target.weights.device.type == "meta"


def test_refusals() -> None:
    model, x, y = Net(), torch.rand(3, 2, 12, 12), torch.arange(3)
    with pytest.raises(TypeError, match=r"SnapMix: model is a dict; pass a torch\.nn\.Module\."):
        SnapMix({})
    with pytest.raises(
        ValueError, match=r'layer names \'bod\', which the model does not have \(did you mean "body"\?\)'
    ):
        SnapMix(model, layer="bod")
    with pytest.raises(ValueError, match=r"head names 'pool', of the class AdaptiveAvgPool2d; name the nn\.Linear"):
        SnapMix(model, head="pool")
    with pytest.raises(ValueError, match=r"SnapMix: the model has no nn\.Linear; pass one"):
        SnapMix(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"alpha is -1; pass a finite number greater than 0"):
        SnapMix(model, alpha=-1)
    with pytest.raises(ValueError, match="layer 'stem' put out 4 channels but the head reads 5; name the last map"):
        SnapMix(model, layer="stem").plan(x, y)
    with pytest.raises(ValueError, match=r"no layer of the model puts out a map .* of 2 channels, which the head"):
        SnapMix(model, head="gate").plan(x, y)
    policy = SnapMix(model)
    for bad, error, text in [
        (None, ValueError, "y is None; pass the labels, whose class activation is read"),
        ([0, 1, 2], TypeError, r"y is a list; pass a torch\.Tensor"),
        (y[:2], ValueError, "y has 2 entries but x has 3 rows"),
        (y + 2, ValueError, "y holds the class 4, but there are 4 classes"),
        (y.float(), ValueError, r"y has shape \(3,\) and dtype torch.float32 but the head has 4 classes"),
        (torch.zeros(3, 12, 12).long(), ValueError, r"y has shape \(3, 12, 12\) .* but the head has 4 classes"),
    ]:
        with pytest.raises(error, match=f"SnapMix: {text}"):
            policy.plan(x, bad)
    with pytest.raises(TypeError, match=r"SnapMix: x has dtype torch\.uint8"):
        policy.plan((x * 255).byte(), y)
    with pytest.raises(ValueError, match="pass a batch with 4 axes"):
        policy.plan(x[:, :, 0], y)
    with pytest.raises(ValueError, match=r"SnapPlan\.target: y is a dense mask, which has no class activation"):
        policy.plan(x, y).target(torch.zeros(3, 12, 12).long())
    with pytest.raises(ValueError, match="x holds NaN or infinity in rows 0, 1, 2"):
        policy(x * torch.nan, y)
    assert "layer='', head='classes', alpha=5" in repr(SnapMix(model))
