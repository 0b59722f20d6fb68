"""Cached gradients against the graph of all chunks at once: values, every gradient, masks, statistics, messages."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardmix.losses import ClipLoss, M2MixLoss, M2MixSigLipLoss, M3MixLoss
from hardmix.train.cached_gradients import cached_step


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Towers(nn.Module):
    """Two towers with dropout, in the form of an open_clip model: features of length 1 and the exponential scale."""

    def __init__(self, drop: float = 0.3, norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            middle = nn.BatchNorm1d(16) if norm else nn.Identity()
            self.image = nn.Sequential(nn.Linear(6, 16), middle, nn.GELU(), nn.Dropout(drop), nn.Linear(16, 8))
            self.text = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(drop), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))

    def encode(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.normalize(self.image(image)), nn.functional.normalize(self.text(text))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        a, b = self.encode(image, text)
        scale = self.logit_scale.exp()
        return {"image_features": a, "text_features": b, "logit_scale": scale, "logit_bias": self.logit_bias}


def batch(n: int = 11) -> tuple[Tensor, Tensor]:
    shared = torch.randn(n, 1, generator=rng(1))
    return shared + torch.randn(n, 6, generator=rng(2)), shared + torch.randn(n, 5, generator=rng(3))


def whole_step(model: Towers, inputs: tuple[Tensor, Tensor], loss: Any, chunk: int) -> Tensor:
    """All graphs at once, from the same calls of the model in the same order."""
    outputs = [model(*part) for part in zip(*(x.split(chunk) for x in inputs), strict=True)]
    a, b = (torch.cat([out[name] for out in outputs]) for name in ("image_features", "text_features"))
    value = loss(a, b, outputs[-1]["logit_scale"], outputs[-1]["logit_bias"])
    value.backward()
    return value.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


LOSSES = {
    "clip": ClipLoss(),
    "m2": M2MixLoss(weight=0.5),
    "m2, a lam per pair": M2MixLoss(weight=0.5, per="pair"),
    "m2, sigmoid": M2MixSigLipLoss(weight=0.5),
    "m3": M3MixLoss(image_weight=0.5),
}


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 50])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_whole_batch(name, chunk) -> None:
    inputs, loss = batch(), LOSSES[name]
    whole, parts = Towers(), Towers()
    for x, y in zip(whole.parameters(), parts.parameters(), strict=True):
        x.grad, y.grad = torch.ones_like(x), torch.ones_like(y)  # is added to
    torch.manual_seed(3)
    want = whole_step(whole, inputs, loss, chunk)
    ends = torch.rand(1)
    torch.manual_seed(3)
    got = cached_step(parts, inputs, lambda **z: loss(**z), chunk=chunk)
    assert torch.equal(torch.rand(1), ends)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert_equal(gradients(parts), gradients(whole))
    assert (parts.logit_scale.grad - 1).abs() > 1e-3
    assert max(float((p.grad - 1).abs().max()) for p in parts.image.parameters()) > 1e-3


def test_without_dropout_it_is_the_plain_backward_pass() -> None:
    inputs = batch()
    whole, parts = Towers(drop=0.0), Towers(drop=0.0)
    loss = M2MixLoss(weight=0.5)
    value = loss(**whole(*inputs), lam=0.3)
    value.backward()
    got = cached_step(parts, inputs, lambda **z: loss(**z, lam=0.3), chunk=4)
    torch.testing.assert_close(got, value.detach(), rtol=0, atol=1e-6)
    assert_equal(gradients(parts), gradients(whole))


def test_forms_of_inputs_and_outputs_and_parameters_of_the_loss() -> None:
    """By position and by name; the scale reached past `encode`; one tensor alone; a weight that both use."""
    image, text = batch()
    want = Towers()
    torch.manual_seed(1)
    whole_step(want, (image, text), lambda a, b, s, _: ClipLoss()(a, b, s), 4)
    for keys in (False, True):
        model = Towers()
        inputs = {"text": text, "image": image} if keys else [image, text]
        torch.manual_seed(1)
        cached_step(model.encode, inputs, lambda a, b, m=model: ClipLoss()(a, b, m.logit_scale.exp()), chunk=4)
        assert_equal(gradients(model), gradients(want))
    tower, plain = (nn.Linear(6, 3) for _ in range(2))
    plain.load_state_dict(tower.state_dict())

    def spread(net: nn.Linear, z: Tensor) -> Tensor:
        return torch.pdist(z).square().mean() + net.weight.square().sum()

    cached_step(tower, image, lambda z: spread(tower, z), chunk=2)
    spread(plain, plain(image)).backward()
    assert_equal(gradients(tower), gradients(plain))


def test_a_frozen_tower_and_an_unused_output() -> None:
    inputs = batch()
    model, want = Towers(drop=0.0), Towers(drop=0.0)
    for towers in (model, want):
        towers.text.requires_grad_(False)
    cached_step(model, inputs, lambda image_features, text_features, logit_scale, logit_bias: ClipLoss()(
        image_features, text_features, 5.0), chunk=4)  # fmt: skip
    ClipLoss()(*want.encode(*inputs), 5.0).backward()
    assert_equal(gradients(model), gradients(want))
    assert model.text[0].weight.grad is None
    assert model.logit_scale.grad is None


def test_labels_come_along() -> None:
    """Outputs that are no floating-point numbers, and a scale of shape (1,) where the last chunk has one row."""
    x, y = torch.randn(9, 6, generator=rng()), torch.arange(9) % 3
    head, plain, scale = nn.Linear(6, 3), nn.Linear(6, 3), nn.Parameter(torch.ones(1))
    plain.load_state_dict(head.state_dict())

    def encode(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return head(x), y, scale * 2

    def loss(z: Tensor, y: Tensor, s: Tensor) -> Tensor:
        assert s.shape == (1,)
        return nn.functional.cross_entropy(z * s, y)

    cached_step(encode, (x, y), loss, chunk=4)
    nn.functional.cross_entropy(plain(x) * 2, y).backward()
    assert_equal(gradients(head), gradients(plain))
    assert scale.grad is not None


@pytest.mark.parametrize("inside", [False, True], ids=["around the step", "in the model"])
def test_autocast(inside) -> None:
    inputs, loss = batch(), M2MixLoss(weight=0.5)
    whole, parts = Towers(), Towers()
    if inside:
        for model in (whole, parts):
            model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        want = whole_step(whole, inputs, loss, 4)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        got = cached_step(parts, inputs, lambda **z: loss(**z), chunk=4)
    torch.testing.assert_close(got, want)
    assert gradients(parts).keys() == gradients(whole).keys() == dict(parts.named_parameters()).keys()
    for name, grad in gradients(whole).items():  # one cast for all chunks there, so sums of bfloat16 differ
        torch.testing.assert_close(gradients(parts)[name], grad, rtol=0.02, atol=0.01 * float(grad.abs().max()))


def test_weights_are_cast_again_for_the_pass_with_a_graph(monkeypatch) -> None:
    """As autocast did before torch 2.10: a cast without a graph is handed out again in the second pass."""
    kept: dict[str, Tensor] = {}
    monkeypatch.setattr(torch, "clear_autocast_cache", kept.clear)
    net = nn.Linear(6, 4)

    def encode(x: Tensor) -> Tensor:
        weight = kept.setdefault("weight", net.weight.double())
        return x.double() @ weight.T

    cached_step(encode, X, total, chunk=2)
    assert net.weight.grad is not None


def test_a_scaled_loss_has_scaled_gradients() -> None:
    inputs = batch()
    one, scaled = Towers(drop=0.0), Towers(drop=0.0)
    cached_step(one, inputs, lambda **z: ClipLoss()(**z), chunk=4)
    cached_step(scaled, inputs, lambda **z: 1024 * ClipLoss()(**z), chunk=4)
    assert_equal({name: grad / 1024 for name, grad in gradients(scaled).items()}, gradients(one))


@pytest.mark.parametrize("how", ["module", "method", "named"])
def test_batch_norm_counts_each_chunk_once(how) -> None:
    inputs = batch()
    whole, parts = Towers(norm=True), Towers(norm=True)
    loss = ClipLoss()
    torch.manual_seed(0)
    want = whole_step(whole, inputs, loss, 4)
    torch.manual_seed(0)
    if how == "module":
        got = cached_step(parts, inputs, lambda **z: loss(**z), chunk=4)
    else:
        encode = parts.encode if how == "method" else lambda x, y: parts.encode(x, y)
        named = None if how == "method" else [parts]
        got = cached_step(encode, inputs, lambda a, b: loss(a, b, parts.logit_scale.exp()), chunk=4, model=named)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    found = gradients(parts)
    assert_equal(found, {name: grad for name, grad in gradients(whole).items() if name in found})
    assert parts.image[1].num_batches_tracked == 3
    assert parts.image[1].track_running_stats
    for name, value in whole.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), value)


def test_one_chunk_has_a_graph_at_a_time() -> None:
    """Where the model is called, no activations of another chunk are left."""
    alive: list[Any] = []
    counts = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            counts.append((torch.is_grad_enabled(), len(x), sum(ref() is not None for ref in alive)))
            middle = self.first(x).square()
            alive.append(weakref.ref(middle))
            return self.second(middle.sin())

    cached_step(Watched(), torch.randn(12, 6), lambda z: torch.pdist(z).mean(), chunk=4)
    assert counts == [(False, 4, 0)] * 3 + [(True, 4, 0)] * 3


def test_gradients_are_had_where_they_are_switched_off_around() -> None:
    model, inputs = Towers(), batch()
    with torch.no_grad():
        cached_step(model, inputs, lambda **z: ClipLoss()(**z), chunk=4)
    assert len(gradients(model)) > 8
    assert torch.is_grad_enabled()


class Restless(nn.Module):
    """Draws its masks from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(6, 4), rng()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (torch.rand(len(x), 4, generator=self.generator) > 0.5)


def total(z: Tensor) -> Tensor:
    return z.square().sum()


X = torch.randn(5, 6, generator=rng())
NET = nn.Linear(6, 4)
FROZEN = nn.Linear(6, 4).requires_grad_(False)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ((NET, X, total, 0), ValueError, "chunk is 0; pass an integer of at least 1."),
        ((NET, X, total, None), TypeError, "chunk is None; pass an integer of at least 1."),
        ((NET, [X, X[:2]], total, 2), ValueError, "inputs has shape (5, 6), (2, 6); pass the same number of rows in"),
        ((NET, X[:0], total, 2), ValueError, "inputs has shape (0, 6); pass the same number of rows in each, and at "),
        ((NET, torch.ones(()), total, 2), ValueError, "inputs has shape (); pass the same number of rows in each, and"),
        ((NET, [], total, 2), ValueError, "inputs is empty; give at least one tensor."),
        ((NET, "abc", total, 2), TypeError, "inputs is a str; give tensors, alone, in a tuple or by name."),
        ((NET, [X, [1, 2]], total, 2), TypeError, "inputs holds a list; give tensors, alone, in a tuple or by name."),
        (
            (lambda x: None, X, total, 2),
            TypeError,
            "what encode returns is a NoneType; give tensors, alone, in a tuple",
        ),
        (
            (lambda x: NET(x).T, X, total, 2),
            ValueError,
            "encode returns shape (4, 2) for 2 samples; return one row per",
        ),
        ((lambda x: (NET(x),) * len(x), X, total, 2), ValueError, "encode returns other outputs for other chunks; "),
        ((NET, X, lambda z: z, 2), ValueError, "loss returns shape (5, 4); return a tensor of one element."),
        ((NET, X, lambda z: 1.0, 2), ValueError, "loss returns a float; return a tensor of one element."),
        ((NET, X, lambda z: total(z.detach()), 2), ValueError, "loss returns a value without a gradient; compute it "),
        ((FROZEN, X, total, 2), ValueError, "nothing that encode or loss runs learns; switch gradients on for some "),
        ((Restless(), X, total, 2), ValueError, "encode gives other rows when it is called again, by up to "),
    ],
)
def test_messages(call: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    encode, inputs, loss, chunk = call
    with pytest.raises(kind, match=f"^cached_step: {re.escape(message)}"):
        cached_step(encode, inputs, loss, chunk=chunk)


def test_message_of_the_model() -> None:
    with pytest.raises(TypeError, match=r"^cached_step: model is a str; pass the modules that encode runs, or None\.$"):
        cached_step(NET, X, total, chunk=2, model="towers")  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_repeats_on_a_gpu_that_encode_moves_its_chunks_to() -> None:
    image, text = batch()
    whole, parts = Towers().cuda(), Towers().cuda()
    torch.manual_seed(3)
    want = whole_step(whole, (image.cuda(), text.cuda()), LOSSES["m2"], 4)
    ends = torch.rand(1, device="cuda")
    torch.manual_seed(3)
    got = cached_step(
        lambda x, y: parts(x.cuda(), y.cuda()), (image, text), lambda **z: LOSSES["m2"](**z), chunk=4, model=parts
    )
    assert torch.equal(torch.rand(1, device="cuda"), ends)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert_equal(gradients(parts), gradients(whole), atol=1e-5)
