"""GMC and its mixtures against loops over all rows of two modalities, their edges, messages and processes."""

from __future__ import annotations

import math
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

import compiling
from hardmix.distributed import leave
from hardmix.kernels import pair_contrast as kernel
from hardmix.losses.m2mix import m2mix_loss
from hardmix.losses.multimodal import GMCLoss, gmc_loss, multimodal_mix_loss
from hardmix.mixing.draw import draw_beta

from .slow_pairs import entropy, m2_rows, mean, unit_rows

DOUBLE = torch.float64
REPLACE = ("negatives", "positives", "both")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, count: int = 3) -> tuple[list[Tensor], Tensor]:
    """Modalities that resemble each other, and a joint that resembles their mean."""
    g = rng(seed)
    own = torch.randn(n, d, dtype=DOUBLE, generator=g)
    rows = [own + torch.randn(n, d, dtype=DOUBLE, generator=g) + k for k in range(count)]
    joint = sum(rows) / count + 0.3 * torch.randn(n, d, dtype=DOUBLE, generator=g)
    return [x.requires_grad_() for x in rows], joint.requires_grad_()


def gmc_rows(modalities: list[Tensor], joint: Tensor, scale: Tensor | float) -> list[Tensor]:
    """As the authors' code has it: every row of modality and joint against all but itself, positives from the pair."""
    n = len(joint)
    losses = [torch.zeros((), dtype=DOUBLE) for _ in range(n)]
    for modality in modalities:
        both = unit_rows(joint) + unit_rows(modality)
        for p in range(2 * n):
            logits = [scale * (both[p] @ both[r]) for r in range(2 * n) if r != p]
            positive = (p + n) % (2 * n)
            losses[p % n] = losses[p % n] + 0.5 * entropy(logits, {positive - (positive > p): 1.0})
    return losses


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


@pytest.fixture(params=["whole", "tiled"])
def tiles(request, monkeypatch):
    """One tile, and tiles of four rows, of which nine leave one alone."""
    if request.param == "tiled":
        monkeypatch.setattr(kernel, "DENSE_ROWS", 0)
        monkeypatch.setattr(kernel, "TILE_ROWS", {"cpu": 4})


@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("count", [2, 3])
def test_gmc_is_that_of_the_loops(n: int, count: int, tiles) -> None:
    rows, joint = leaves(n, seed=n, count=count)
    t = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    got = gmc_loss(rows, joint, temperature=t, reduction="none")
    want = torch.stack(gmc_rows(rows, joint, 1 / t))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.rand(n, dtype=DOUBLE, generator=rng(n))
    every = [*rows, joint, t]
    for x, y in zip(gradients((got * weight).sum(), *every), gradients((want * weight).sum(), *every), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gmc_loss(rows, joint, temperature=t), got.mean())
    torch.testing.assert_close(gmc_loss(rows, joint, temperature=t, reduction="sum"), got.sum())


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("replace", REPLACE)
def test_the_mixed_part_is_that_of_the_loops(n: int, replace: str, tiles) -> None:
    rows, joint = leaves(n, seed=n)
    lam = torch.rand(n, dtype=DOUBLE, generator=rng(5))
    options: dict[str, Any] = {"temperature": 0.2, "replace": replace, "lam": lam, "reduction": "none"}
    got = multimodal_mix_loss(rows, joint, m2=0.7, pair=(2, 0), **options)
    mixed = torch.stack(m2_rows(rows[2], rows[0], 5.0, lam.tolist(), replace))
    want = torch.stack(gmc_rows(rows, joint, 5.0)) + 0.7 * mixed
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    every = [*rows, joint]
    for x, y in zip(gradients(got.sum(), *every), gradients(want.sum(), *every), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)
    alone = multimodal_mix_loss(rows, m2=0.7, pair=(2, 0), **options)
    torch.testing.assert_close(alone, 0.7 * mixed, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    n, d, count = (data.draw(st.integers(low, high)) for low, high in ((1, 6), (1, 5), (2, 4)))
    t = data.draw(st.sampled_from([0.02, 0.3, 50.0]))
    lam = data.draw(st.floats(0, 1))
    rows, joint = leaves(n, d, data.draw(st.integers(0, 10**6)), count)
    pair = tuple(data.draw(st.permutations(range(count)))[:2])
    replace = data.draw(st.sampled_from(REPLACE))
    if d == 1:  # opposite rows have no arc
        rows = [x.detach().abs().requires_grad_() for x in rows]
    got = multimodal_mix_loss(rows, joint, temperature=t, m2=2.0, lam=lam, pair=pair, replace=replace)
    want = mean(gmc_rows(rows, joint, 1 / t)) + 2 * mean(
        m2_rows(rows[pair[0]], rows[pair[1]], 1 / t, [lam] * n, replace)
    )
    assert got.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("replace", REPLACE)
def test_gradcheck(replace: str, tiles) -> None:
    rows, joint = leaves(5, 3)
    with torch.no_grad():
        rows[1][2], joint[3] = 2 * rows[0][2], rows[1][3]
    t = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)

    def loss(*inputs: Tensor) -> Tensor:
        *modalities, last, temperature = inputs
        return multimodal_mix_loss(
            modalities, last, temperature=temperature, lam=0.3, pair=(0, 1), replace=replace, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, (*rows, joint, t), eps=1e-6, atol=1e-5, rtol=1e-3)


def test_what_is_drawn() -> None:
    rows, joint = leaves(7, count=4)
    seen = set()
    for seed in range(60):
        got = multimodal_mix_loss(rows, joint, generator=rng(seed))
        generator = rng(seed)
        p, q = sorted(torch.randperm(4, generator=generator)[:2].tolist())
        lam = draw_beta(2.0, 2.0, 1, generator).view(1, 1)
        assert got == multimodal_mix_loss(rows, joint, pair=(p, q), lam=lam)
        seen.add((p, q))
    assert len(seen) == 6
    torch.manual_seed(3)
    first = multimodal_mix_loss(rows, joint)
    torch.manual_seed(3)
    assert multimodal_mix_loss(rows, joint) == first
    before = torch.get_rng_state()
    gmc_loss(rows, joint)
    GMCLoss()(rows, joint)
    assert torch.equal(torch.get_rng_state(), before)


def test_invariances() -> None:
    rows, joint = leaves(9)
    want = multimodal_mix_loss(rows, joint, lam=0.3, pair=(0, 1))
    order = torch.randperm(9, generator=rng(2))
    size = torch.rand(9, 1, dtype=DOUBLE, generator=rng(3)) + 0.1
    for x, z, options in (
        ([rows[1], rows[0], rows[2]], joint, {"lam": 0.3, "pair": (1, 0)}),
        (rows, joint, {"lam": 0.7, "pair": (1, 0)}),
        ([x[order] for x in rows], joint[order], {"lam": 0.3, "pair": (0, 1)}),
        ([x * size for x in rows], joint / size, {"lam": 0.3, "pair": (0, 1)}),
    ):
        torch.testing.assert_close(multimodal_mix_loss(x, z, **options), want, rtol=1e-12, atol=1e-12)
    assert multimodal_mix_loss(tuple(rows), joint, lam=0.3, pair=(0, 1)) == want


def test_edges() -> None:
    rows, joint = leaves(1)
    for loss in (gmc_loss(rows, joint), multimodal_mix_loss(rows, joint, pair=(0, 1)), GMCLoss(m2=1.0)(rows, joint)):
        assert loss.item() == 0.0
        assert all(
            not grad.any() for grad in torch.autograd.grad(loss, [*rows, joint], allow_unused=True) if grad is not None
        )
    equal = torch.ones(6, 4, requires_grad=True)
    loss = gmc_loss([equal, equal], equal, temperature=0.1)
    assert loss.item() == pytest.approx(2 * math.log(11), rel=1e-6)
    loss = multimodal_mix_loss([equal, equal], temperature=0.1, m2=1.0)
    assert loss.item() == pytest.approx(math.log(6), rel=1e-6)
    assert gradients(loss, equal)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("t", [1e-3, 0.3, 1e3])
@pytest.mark.parametrize("replace", REPLACE)
def test_extremes_are_finite(dtype: torch.dtype, t: float, replace: str, tiles) -> None:
    top = torch.finfo(dtype).max
    a, b, z = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in range(3))
    a[0], b[1], z[0], a[2], b[2], z[3] = 0.0, 0.0, 0.0, top, -top, top
    b[3], b[4], z[5] = a[3], -a[4], a[5]
    for x in (a, b, z):
        x.requires_grad_()
    for lam in (0.0, 0.5, 1.0):
        loss = multimodal_mix_loss([a, b], z, temperature=t, m2=1.0, lam=lam, replace=replace)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(loss, a, b, z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype: torch.dtype, tiles) -> None:
    rows, joint = leaves(24, 16, 5)
    rows, joint = [x.detach().to(dtype) for x in rows], joint.detach().to(dtype)
    module = GMCLoss(m2=0.5, temperature=0.1)
    got = module(rows, joint, lam=0.3, pair=(0, 2))
    assert got.dtype == torch.float32
    want = module([x.double() for x in rows], joint.double(), lam=0.3, pair=(0, 2))
    assert got.item() == pytest.approx(want.item(), rel=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(rows, joint, lam=0.3, pair=(0, 2)), got)
    assert module([rows[0].double(), *rows[1:]], joint, pair=(0, 1)).dtype == DOUBLE


def test_a_small_loss_has_all_digits_in_float32() -> None:
    joint = torch.eye(8)
    rows = [joint + 1e-3 * torch.randn(8, 8, generator=rng(k)) for k in range(2)]
    got = gmc_loss(rows, joint, temperature=0.05)
    want = gmc_loss([x.double() for x in rows], joint.double(), temperature=0.05)
    assert 1e-9 < want < 1e-6
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


def test_the_module_is_the_function() -> None:
    rows, joint = leaves(9)
    assert GMCLoss(temperature=0.2)(rows, joint, lam=0.3, pair=(0, 1)) == gmc_loss(rows, joint, temperature=0.2)
    options: dict[str, Any] = {"temperature": 0.2, "m2": 0.5, "replace": "negatives", "alpha": 0.4, "reduction": "none"}
    got = GMCLoss(**options)(rows, joint, generator=rng(1))
    torch.testing.assert_close(got, multimodal_mix_loss(rows, joint, **options, generator=rng(1)), rtol=0, atol=0)
    assert repr(GMCLoss()) == "GMCLoss(temperature=0.3, m2=None)"
    assert repr(GMCLoss(m2=0.2)) == "GMCLoss(temperature=0.3, m2=0.2, replace='both', alpha=2)"
    assert not list(GMCLoss(m2=0.2).parameters())
    torch.testing.assert_close(
        multimodal_mix_loss(rows, m2=1.0, pair=(0, 1), lam=0.3),
        m2mix_loss(rows[0], rows[1], temperature=0.3, lam=0.3, replace="both"),
    )


@pytest.mark.slow
@compiling.supported
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_compiled_is_eager() -> None:
    rows, joint = leaves(9)

    def loss(rows: list[Tensor], joint: Tensor) -> Tensor:
        return gmc_loss(rows, joint)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows, joint), loss(rows, joint))
    torch.testing.assert_close(
        gradients(compiled(rows, joint), *rows, joint), gradients(loss(rows, joint), *rows, joint)
    )


A = torch.ones(3, 2)
INPUTS = [
    (([A], A), ValueError, "modalities has 1 entries; pass two or more, one per modality."),
    (([], A), ValueError, "modalities has 0 entries; pass two or more"),
    ((A, A), TypeError, "modalities is a Tensor; pass a list of tensors (N, D)."),
    (({"a": A, "b": A}, A), TypeError, "modalities is a dict; pass a list of tensors (N, D)."),
    (([A, None], A), TypeError, "modalities[1] is a NoneType; pass a torch.Tensor."),
    (([A, A[0]], A), ValueError, "modalities[1] has shape (2,); pass a batch with 2 axes, samples first."),
    (([A, A.long()], A), TypeError, "modalities[1] has dtype torch.int64; pass floating-point values."),
    (([A, A[:2]], A), ValueError, "modalities[1] has 2 entries but modalities[0] has 3 rows; pass one entry per row."),
    (([A, A], A[:, :1]), ValueError, "joint has 1 columns but modalities[0] has 2; pass projections into one space."),
    (([A, A], A / 0), ValueError, "joint holds NaN or infinity in rows 0, 1, 2;"),
    (([A[:0], A[:0]], A[:0]), ValueError, "modalities[0] has shape (0, 2) and is empty; pass at least one sample."),
    (([A, A.to("meta")], A), ValueError, "modalities[1] is on meta but modalities[0] is on cpu;"),
]
CALLS = [
    ({"pair": (0, 0)}, ValueError, "pair is (0, 0); pass two different numbers from 0 to 1."),
    ({"pair": (0, 2)}, ValueError, "pair is (0, 2); pass two different numbers from 0 to 1."),
    ({"pair": 1}, ValueError, "pair is 1; pass two different numbers from 0 to 1."),
    ({"pair": (0, 1, 1)}, ValueError, "pair is (0, 1, 1); pass two different numbers from 0 to 1."),
    ({"lam": 1.5}, ValueError, "lam is 1.5; pass a number from 0 to 1."),
    ({"lam": torch.zeros(2)}, ValueError, "lam has shape (2,) for 3 pairs;"),
    ({"generator": 3}, TypeError, "generator is a int; pass a torch.Generator or None."),
]
SETTINGS = [
    ({"m2": 0.0}, ValueError, "m2 is 0.0; pass a finite number greater than 0."),
    ({"alpha": 0.0}, ValueError, "alpha is 0.0; pass a number from 0.0001 to 10000."),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; pass a finite number greater than 0."),
    ({"replace": "negative"}, ValueError, "replace is 'negative'; pass one of 'negatives', 'positives', 'both' (did"),
    ({"reduction": "max"}, ValueError, "reduction is 'max'; pass one of 'none', 'mean', 'sum'"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), INPUTS)
def test_messages_about_rows(arguments: tuple[Any, Any], kind: type[Exception], message: str) -> None:
    for who, call in (
        ("gmc_loss", gmc_loss),
        ("multimodal_mix_loss", multimodal_mix_loss),
        ("GMCLoss", GMCLoss(m2=1.0)),
    ):
        with pytest.raises(kind, match=f"^{who}: {re.escape(message)}"):
            call(*arguments)


def test_gmc_needs_a_joint() -> None:
    for who, call in (("gmc_loss", gmc_loss), ("GMCLoss", GMCLoss())):
        with pytest.raises(TypeError, match=rf"^{who}: joint is a NoneType; pass a torch\.Tensor\.$"):
            call([A, A], None)


@pytest.mark.parametrize(("setting", "kind", "message"), CALLS + SETTINGS)
def test_messages_of_the_function(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^multimodal_mix_loss: {re.escape(message)}"):
        multimodal_mix_loss([A, A], A, **setting)


@pytest.mark.parametrize(("setting", "kind", "message"), CALLS)
def test_messages_of_a_call(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^GMCLoss: {re.escape(message)}"):
        GMCLoss(m2=1.0)([A, A], A, **setting)


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [*SETTINGS, ({"gather": 1}, TypeError, "gather is 1; pass True or False.")],
)
def test_messages_of_the_module(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^GMCLoss: {re.escape(message)}"):
        GMCLoss(**setting)


#: how many samples each of two processes has
COUNTS = ((6, 6), (7, 4), (9, 0))


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 8, dtype=DOUBLE) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.tanh(layer(part)) for layer, part in zip(self.layers, x.unbind(1), strict=True)]


def measured(model: nn.Module, rows: slice, total: int, seed: int) -> list[Tensor]:
    """Loss and gradients of rows of a batch; draws come from the global generator."""
    x = torch.randn(total, 4, 6, dtype=DOUBLE, generator=rng(1))
    torch.manual_seed(seed)
    *modalities, joint = model(x[rows])
    loss = GMCLoss(m2=0.5)(modalities, joint)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def as_rank(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: list[Any] = []
    for counts in COUNTS:
        rows = slice(0, counts[0]) if rank == 0 else slice(counts[0], sum(counts))
        found.append(measured(DistributedDataParallel(Encoders()), rows, sum(counts), seed=rank))
    with pytest.raises(ValueError, match=r"^GMCLoss: modalities\[0\] is empty on all 2 processes; pass at least one"):
        GMCLoss()([torch.zeros(0, 2)] * 2, torch.zeros(0, 2))
    x = torch.randn(4, 3, generator=rng(rank))
    found.append([GMCLoss(gather=False, m2=1.0)([x, -x], x, lam=0.3, pair=(0, 1))])
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    leave()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    code = (
        "import pathlib, sys\nfrom losses.test_multimodal import as_rank\n"
        "as_rank(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], cwd=tests) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for k, counts in enumerate(COUNTS):
        want = measured(Encoders(), slice(0, sum(counts)), sum(counts), seed=0)
        for rank in range(2):
            torch.testing.assert_close(found[rank][k], want, rtol=1e-10, atol=1e-12)
    for rank in range(2):
        x = torch.randn(4, 3, generator=rng(rank))
        want = multimodal_mix_loss([x, -x], x, m2=1.0, lam=0.3, pair=(0, 1))
        torch.testing.assert_close(found[rank][-1], [want])
