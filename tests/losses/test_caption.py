"""The captioning loss against a loop over tokens in float64; CoCa's two losses; real processes against one.

Run as a script this file is one of the processes.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hardmix.distributed import leave
from hardmix.losses import CaptionLoss, CoCaLoss, M2MixLoss, SigLipLoss, caption_loss, clip_loss

DOUBLE = torch.float64
SECONDS = 120


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 4, length: int = 5, vocabulary: int = 7, seed: int = 0, pad: float = 0.3) -> tuple[Tensor, Tensor]:
    """Logits that want a gradient, and ids with padding here and there, also where no tokenizer would put it."""
    logits = torch.randn(n, length - 1, vocabulary, dtype=DOUBLE, generator=rng(seed)) * 3
    ids = torch.randint(1, vocabulary, (n, length), generator=rng(seed + 1))
    return logits.requires_grad_(), ids.masked_fill(torch.rand(n, length, generator=rng(seed + 2)) < pad, 0)


def slow(logits: Tensor, ids: Tensor, padding: int = 0, smoothing: float = 0.0) -> list[list[Tensor]]:
    """Each caption's losses of tokens that count, one number after another."""
    rows = []
    for z, y in zip(logits.double(), ids.tolist(), strict=True):
        row = []
        for step, right in zip(z, y[1:], strict=True):
            if right == padding:
                continue
            top = max(float(value.detach()) for value in step)
            total = sum((value - top).exp() for value in step).log() + top
            spread = sum(total - value for value in step) / len(step)
            row.append((1 - smoothing) * (total - step[right]) + smoothing * spread)
        rows.append(row)
    return rows


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5), st.integers(2, 6), st.integers(2, 6), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 3),
    st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_any_batch(n, length, vocabulary, smoothing, padding, pad, seed) -> None:
    logits, ids = batch(n, length, vocabulary, seed, pad)
    told = {"padding": padding, "label_smoothing": smoothing}
    tokens = [token for row in slow(logits, ids, padding, smoothing) for token in row]
    want = torch.stack(tokens).sum() if tokens else 0.0 * logits.sum()
    for reduction, value in (("sum", want), ("mean", want / max(1, len(tokens)))):
        got = caption_loss(logits, ids, reduction=reduction, **told)
        assert got.item() == pytest.approx(value.item(), rel=1e-12, abs=1e-12)
        pair = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, value)]
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-12)
    none = caption_loss(logits, ids, reduction="none", **told)
    assert none.shape == (n, length - 1)
    assert (none[ids[:, 1:] == padding] == 0).all()
    assert none.sum().item() == pytest.approx(want.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(reduction, smoothing) -> None:
    logits, ids = batch(3, 4, 5)
    options = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3}

    def call(z: Tensor) -> Tensor:
        return caption_loss(z, ids, label_smoothing=smoothing, reduction=reduction)

    assert torch.autograd.gradcheck(call, logits, **options)
    assert torch.autograd.gradgradcheck(call, logits, **options)


def test_values_by_hand() -> None:
    ids = torch.tensor([[1, 5, 2], [1, 2, 0]])
    assert caption_loss(torch.zeros(2, 2, 8), ids).item() == pytest.approx(math.log(8))
    sure = 50.0 * nn.functional.one_hot(ids[:, 1:], 8).double()
    assert caption_loss(sure, ids).item() == pytest.approx(0.0, abs=1e-12)
    # one caption has three tokens and one has one: each token counts the same, not each caption
    logits, ids = torch.zeros(2, 3, 4), torch.tensor([[1, 2, 3, 2], [1, 2, 0, 0]])
    logits[1, 0, 2] = 30.0
    assert caption_loss(logits, ids).item() == pytest.approx(3 / 4 * math.log(4))


def test_padding_alone() -> None:
    logits, ids = batch(3, 5)
    none = caption_loss(logits, torch.zeros_like(ids))
    assert none.item() == 0.0
    assert not torch.autograd.grad(none, logits)[0].any()
    ids[1] = 0
    torch.testing.assert_close(caption_loss(logits, ids), caption_loss(logits[[0, 2]], ids[[0, 2]]))
    one = caption_loss(logits[:1], ids[:1])
    torch.testing.assert_close(one, torch.stack(slow(logits, ids)[0]).mean())


def test_what_stands_where_nothing_is_asked_has_no_effect() -> None:
    logits, ids = batch(4, 6)
    want = caption_loss(logits, ids)
    hidden = ids[:, 1:] == 0
    assert hidden.any()
    other = logits.detach().masked_fill(hidden[..., None], torch.nan).requires_grad_()
    loss = caption_loss(other, ids)
    assert torch.equal(loss, want)
    grad = torch.autograd.grad(loss, other)[0]
    assert not grad[hidden].any()
    torch.testing.assert_close(grad, torch.autograd.grad(want, logits)[0])
    first = ids.clone()
    first[:, 0] = 6
    assert torch.equal(caption_loss(logits, first), want)
    assert caption_loss(logits.masked_fill(~hidden[..., None], torch.nan), ids).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype) -> None:
    logits, ids = batch(5, 7, 30)
    z = logits.detach().to(dtype).requires_grad_()
    for smoothing in (0.0, 0.1):
        got = caption_loss(z, ids, label_smoothing=smoothing)
        assert got.dtype == torch.float32
        want = caption_loss(z.double(), ids, label_smoothing=smoothing).item()
        assert got.item() == pytest.approx(want, rel=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(caption_loss(z, ids, label_smoothing=smoothing), got)
        assert torch.autograd.grad(got, z)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes_are_finite(dtype) -> None:
    top = torch.finfo(dtype).max
    logits = torch.zeros(4, 3, 6, dtype=dtype)
    logits[0, 0, 1], logits[1], logits[2, :, 2] = top / 4, top / 4, -top / 4
    logits.requires_grad_()
    loss = caption_loss(logits, torch.tensor([[1, 2, 3, 2]] * 4))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_ids_of_32_bits_and_inputs_are_left_alone() -> None:
    logits, ids = batch()
    before = logits.detach().clone(), ids.clone()
    assert torch.equal(caption_loss(logits, ids.int()), caption_loss(logits, ids))
    assert torch.equal(before[0], logits)
    assert torch.equal(before[1], ids)


def test_the_module_is_the_function() -> None:
    logits, ids = batch()
    module = inspect.signature(CaptionLoss).parameters
    function = inspect.signature(caption_loss).parameters
    assert list(function) == ["logits", "ids", *[name for name in module if name != "gather"]]
    assert all(module[name].default == function[name].default for name in module if name != "gather")
    assert torch.equal(CaptionLoss()(logits, ids), caption_loss(logits, ids))
    told = {"padding": 3, "label_smoothing": 0.2, "reduction": "none"}
    assert torch.equal(CaptionLoss(**told)(logits, ids), caption_loss(logits, ids, **told))
    assert repr(CaptionLoss(reduction="sum")) == "CaptionLoss(label_smoothing=0, reduction='sum')"
    assert not CaptionLoss().state_dict()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_compiled_is_eager() -> None:
    logits, ids = batch()
    compiled = torch.compile(CaptionLoss(label_smoothing=0.1), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, ids), caption_loss(logits, ids, label_smoothing=0.1))


# CoCa


def pairs(n: int = 5) -> list[Tensor]:
    return [torch.randn(n, 6, dtype=DOUBLE, generator=rng(seed)).requires_grad_() for seed in (11, 12)]


def test_both_losses_add_up() -> None:
    a, b = pairs()
    logits, ids = batch(5)
    scale = torch.tensor(7.0, dtype=DOUBLE, requires_grad=True)
    got = CoCaLoss()(a, b, logits, scale, ids)
    want = clip_loss(a, b, scale) + 2.0 * caption_loss(logits, ids)
    torch.testing.assert_close(got, want)
    leaves = (a, b, logits, scale)
    for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(x, y)
    criterion = CoCaLoss(caption_weight=0.5, padding=3, label_smoothing=0.1)
    terms = criterion(a, b, logits, scale, ids, output_dict=True)
    assert list(terms) == ["contrastive_loss", "caption_loss"]
    assert torch.equal(terms["contrastive_loss"], clip_loss(a, b, scale))
    torch.testing.assert_close(terms["caption_loss"], 0.5 * caption_loss(logits, ids, padding=3, label_smoothing=0.1))
    assert repr(criterion).startswith("CoCaLoss(\n  caption_weight=0.5\n")


def test_any_contrast_beside_the_captions() -> None:
    a, b = pairs()
    logits, ids = batch(5)
    caption = 2.0 * caption_loss(logits, ids)
    mixed = M2MixLoss(weight=0.3)
    terms = CoCaLoss(mixed)(a, b, logits, 7.0, ids, output_dict=True, generator=rng(3))
    assert list(terms) == ["contrastive_loss", "m2mix_loss", "caption_loss"]
    want = mixed(a, b, 7.0, generator=rng(3)) + caption
    torch.testing.assert_close(sum(terms.values()), want)
    torch.testing.assert_close(CoCaLoss(mixed)(a, b, logits, 7.0, ids, generator=rng(3)), want)
    biased = CoCaLoss(SigLipLoss())(a, b, logits, 7.0, ids, logit_bias=-4.0)
    torch.testing.assert_close(biased, SigLipLoss()(a, b, 7.0, -4.0) + caption)
    assert list(CoCaLoss(mixed).state_dict()) == ["contrastive.epoch"]


def test_half_types_together() -> None:
    a, b = (x.detach().bfloat16() for x in pairs())
    logits, ids = batch(5)
    loss = CoCaLoss()(a, b, logits.detach().bfloat16(), 7.0, ids)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


Z, Y = torch.zeros(2, 3, 6), torch.ones(2, 4).long()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], Y), TypeError, "logits is a list; pass a torch.Tensor."),
        ((Z, None), TypeError, "ids is a NoneType; pass a torch.Tensor."),
        ((Z.long(), Y), TypeError, "logits has dtype torch.int64; pass floating-point values."),
        ((Z, Y.float()), TypeError, "ids has dtype torch.float32; pass the int64 ids of a tokenizer."),
        ((Z[0], Y), ValueError, "logits has shape (3, 6); pass (N, L - 1, V), none of them 0."),
        ((Z[:0], Y[:0]), ValueError, "logits has shape (0, 3, 6); pass (N, L - 1, V), none of them 0."),
        ((Z[:, :0], Y[:, :1]), ValueError, "logits has shape (2, 0, 6); pass (N, L - 1, V), none of them 0."),
        (
            (Z, Y[:, :3]),
            ValueError,
            "ids has shape (2, 3) but logits has (2, 3, 6); pass ids (N, L) for logits (N, L - 1, V).",
        ),
        (
            (Z, Y[:1]),
            ValueError,
            "ids has shape (1, 4) but logits has (2, 3, 6); pass ids (N, L) for logits (N, L - 1, V).",
        ),
        (
            (Z, Y.to("meta")),
            ValueError,
            "ids is on meta but logits is on cpu; move both to one device with .to().",
        ),
        (
            (Z, Y * 6),
            ValueError,
            "ids holds the class 6, but there are 6 classes; pass class ids from 0 to 5.",
        ),
    ],
)
def test_messages(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    for loss in (caption_loss, CaptionLoss()):
        with pytest.raises(kind, match=f"^caption_loss: {re.escape(message)}$"):
            loss(*arguments)


@pytest.mark.parametrize("make", [lambda **told: caption_loss(Z, Y, **told), CaptionLoss, CoCaLoss])
def test_messages_of_settings(make: Any) -> None:
    for told, message in (
        ({"padding": -1}, "padding is -1; pass an integer of at least 0."),
        ({"label_smoothing": 1.1}, "label_smoothing is 1.1; pass a number from 0 to 1."),
        ({"reduction": "means"}, "reduction is 'means'; pass one of 'none', 'mean', 'sum'"),
        ({"caption_weight": 0}, "caption_weight is 0; pass a finite number greater than 0."),
        ({"gather": 1}, "gather is 1; pass True or False."),
        ({"contrastive": 3}, "contrastive is 3; pass a loss such as ClipLoss()."),
    ):
        signature = inspect.signature(make if isinstance(make, type) else caption_loss)
        if set(told) <= set(signature.parameters):
            with pytest.raises(
                (ValueError, TypeError), match=f"^(caption_loss|CaptionLoss|CoCaLoss|ClipLoss): {re.escape(message)}"
            ):
                make(**told)


# Processes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(3, 4), nn.Embedding(9, 4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a = self.image(images)
        logits = (self.text(ids[:, :-1]) + a[:, None]) @ self.text.weight.T
        return a, self.text(ids).mean(1), logits, self.log_scale.exp()


#: captions of each of two processes: of different lengths, and none on one of them
RANKS = 2
PARTS = {"uneven": (slice(0, 5), slice(5, 7)), "none on one": (slice(0, 7), slice(7, 7))}


def measured(loss: nn.Module, part: slice, wrap: Any = lambda model: model) -> dict[str, Tensor]:
    model = Model().double()
    ids = torch.randint(1, 9, (7, 6), generator=rng(1)) * (torch.arange(6) < torch.tensor([[2, 6, 3, 4, 2, 6, 6]]).T)
    images = torch.randn(7, 3, dtype=DOUBLE, generator=rng(2))
    wrapped = wrap(model)  # kept until after the backward pass, in which it averages
    outputs = wrapped(images[part], ids[part])
    value = (
        loss(*outputs, ids[part])
        if isinstance(loss, CoCaLoss)
        else loss(outputs[2], ids[part]) + 0 * sum(x.sum() for x in outputs)
    )
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in model.named_parameters()}}


CASES = {
    "mean": CaptionLoss(label_smoothing=0.1),
    "sum": CaptionLoss(reduction="sum"),
    "coca": CoCaLoss(),
    "coca, m2": CoCaLoss(M2MixLoss(weight=0.4, temperature=None)),
}


def as_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS))
    found: dict[str, Any] = {}
    for name, loss in CASES.items():
        for parts, places in PARTS.items():
            torch.manual_seed(rank)  # lam is drawn from the global generator, that of rank 0
            found[f"{name}, {parts}"] = measured(loss, places[rank], DistributedDataParallel)
    if rank == 0:  # no other process takes part
        found["alone"] = CaptionLoss(gather=False)(*alone())
    found["none"] = CaptionLoss(reduction="none")(*alone())
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    leave()


def alone() -> tuple[Tensor, Tensor]:
    logits, ids = batch()
    return logits.detach(), ids


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_one_process(name: str, parts: str, ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    want = measured(CASES[name], slice(None))
    for found in ranks:
        for key, value in want.items():
            torch.testing.assert_close(
                found[f"{name}, {parts}"][key],
                value,
                rtol=1e-12,
                atol=1e-12,
                msg=lambda text, key=key: f"{key}: {text}",
            )
    assert max(value.abs().max() for key, value in want.items() if key != "loss") > 1e-3


@pytest.mark.slow
def test_what_is_not_shared(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert torch.equal(found["none"], caption_loss(*alone(), reduction="none"))
        assert torch.equal(found.get("alone", caption_loss(*alone())), caption_loss(*alone()))


if __name__ == "__main__":
    as_rank(int(sys.argv[1]), Path(sys.argv[2]))
