"""Losses of image-text pairs on real processes (gloo) against one process: value and every gradient, through DDP.

Run as a script this file is one of the processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hardmix.distributed import leave
from hardmix.kernels import pair_contrast as kernel
from hardmix.losses import ClipLoss, M2MixLoss, M2MixSigLipLoss, M3MixLoss, SigLipLoss
from hardmix.train.cached_gradients import cached_step

SECONDS = 120


class Towers(nn.Module):
    """In the form of an open_clip model, with the learnt scale and bias."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.image = nn.Sequential(nn.Linear(6, 12), middle, nn.GELU(), nn.Linear(12, 8))
        self.text = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        scale = self.logit_scale.exp()
        bias = self.logit_bias + 0
        return {
            "image_features": self.image(image),
            "text_features": self.text(text),
            "logit_scale": scale,
            "logit_bias": bias,
        }


class Case(NamedTuple):
    """A loss, how many pairs each of the ranks has, and the step."""

    loss: Any
    counts: dict[int, tuple[int, ...]]
    chunk: int = 0
    tiled: bool = False
    dtype: torch.dtype = torch.float32
    norm: bool = False


EVEN = {2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}
ODD = {2: (7, 4), 3: (5, 1, 5), 4: (2, 5, 1, 3)}
NONE = {2: (9, 0), 3: (0, 6, 3), 4: (0, 5, 0, 4)}
MIXED = {"weight": 0.5, "draws": 2}
M3 = {"image_weight": 0.5, "text_weight": 0.4, "joint_weight": 0.3, "m2_weight": 0.2}
CASES = {
    "clip": Case(ClipLoss(), EVEN),
    "clip, sum": Case(ClipLoss(reduction="sum"), ODD, dtype=torch.float64),
    "clip, none here": Case(ClipLoss(), NONE),
    "clip, two pairs": Case(ClipLoss(), {2: (1, 1), 3: (1, 0, 1), 4: (0, 1, 1, 0)}),
    "siglip": Case(SigLipLoss(), ODD),
    "m2": Case(M2MixLoss(**MIXED), EVEN),
    "m2, uneven, a lam per pair": Case(M2MixLoss(**MIXED, per="pair", replace="both"), ODD, tiled=True),
    "m2, none here": Case(M2MixLoss(**MIXED, temperature=None), NONE),
    "m2, double": Case(M2MixLoss(**MIXED), ODD, dtype=torch.float64, tiled=True),
    "m2, positives": Case(M2MixLoss(**MIXED, replace="positives"), ODD),
    "m2 siglip": Case(M2MixSigLipLoss(**MIXED), ODD, tiled=True),
    "m3": Case(M3MixLoss(**M3), EVEN),
    "m3, odd, a lam per pair": Case(M3MixLoss(**M3, per="pair", joint_target="code"), ODD, tiled=True),
    "m3, odd, original negatives": Case(M3MixLoss(**M3, negatives="original"), ODD, dtype=torch.float64),
    "m3, few pairs": Case(M3MixLoss(**M3), {2: (2, 1), 3: (1, 1, 1), 4: (1, 0, 1, 1)}, dtype=torch.float64),
    "m3, none here": Case(M3MixLoss(**M3), NONE),
    "m2, chunks": Case(M2MixLoss(**MIXED), EVEN, chunk=4),
    "m3, uneven chunks": Case(M3MixLoss(**M3), ODD, chunk=3),
    "m2, chunks, scale past the model": Case(M2MixLoss(**MIXED), ODD, chunk=-3),
}


def tile(tiled: bool) -> None:
    kernel.DENSE_ROWS, kernel.TILE_ROWS = (0, {"cpu": 4}) if tiled else (1024, {"cpu": 512})


def step(case: Case, model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """Backward pass of the loss, in one piece, in chunks, or in chunks of a model whose scale the loss reaches for."""
    if case.chunk == 0:
        loss = case.loss(**model(image, text))
        loss.backward()
        return loss.detach()
    if case.chunk > 0:
        return cached_step(model, (image, text), lambda **z: case.loss(**z), chunk=case.chunk)
    towers = getattr(model, "module", model)

    def encode(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        z = model(image, text)
        return z["image_features"], z["text_features"]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return case.loss(a, b, towers.logit_scale.exp(), towers.logit_bias)

    return cached_step(encode, (image, text), loss, chunk=-case.chunk, model=model)


def measure(case: Case, pairs: int, part: slice, wrap: Any = lambda model: model) -> dict[str, Tensor]:
    """Two steps: the loss and all gradients of the second, with the weights that the first led to."""
    tile(case.tiled)
    model = Towers(case.norm).to(case.dtype)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(pairs, 1, generator=generator)
        image, text = (shared + torch.randn(pairs, width, generator=generator) for width in (6, 5))
        optimizer.zero_grad()
        torch.manual_seed(seed + 1 + (part.start or 0))  # lam is drawn from the global generator, that of rank 0
        loss = step(case, wrapped, image[part].to(case.dtype), text[part].to(case.dtype))
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return {"loss": loss, **found}


def place(counts: tuple[int, ...], rank: int) -> slice:
    ends = list(accumulate(counts, initial=0))
    return slice(ends[rank], ends[rank + 1])


def as_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS))
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[name] = measure(case, sum(case.counts[ranks]), place(case.counts[ranks], rank), DistributedDataParallel)
    plain = Case(ClipLoss(gather=False), EVEN)
    found["alone"] = measure(plain, 12, place(EVEN[ranks], rank), DistributedDataParallel)
    normed = Case(ClipLoss(), {2: (8, 3), 3: (3, 8, 3), 4: (8, 3, 3, 2)}, chunk=4, norm=True)
    found["batch norm"] = measure(
        normed, sum(normed.counts[ranks]), place(normed.counts[ranks], rank), DistributedDataParallel
    )
    found["none"] = ClipLoss(reduction="none")(*features(ODD[ranks], rank), 5.0)
    found["global"] = M2MixLoss(weight=1.0)(*features(ODD[ranks], rank), 5.0, lam=torch.linspace(0, 1, 11))
    given = torch.Generator().manual_seed(rank)
    found["other generators"] = M2MixLoss(weight=1.0)(*features(ODD[ranks], rank), 5.0, generator=given)
    found["other lam"] = M3MixLoss(**M3)(*features(ODD[ranks], rank), 5.0, lam=(rank + 1) / 5)
    found["area"] = area(*features(ODD[ranks], rank))
    found["messages"] = messages()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    leave()


def features(counts: tuple[int, ...], rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(sum(counts), 8, generator=generator)[place(counts, rank)] for _ in range(2)]


def area(a: Tensor, b: Tensor) -> list[int]:
    """How many cosines of an image with a text this process forms, for CLIP and for m3."""
    tile(True)
    sizes: list[int] = []
    products = kernel._Tiles.products

    def counted(self: Any, r: slice, c: slice) -> dict[str, Tensor]:
        made = products(self, r, c)
        sizes[-1] += sum(made[name].numel() for name in ("it", "ti") if name in made)
        return made

    kernel._Tiles.products = counted
    for loss in (ClipLoss(), M3MixLoss(**M3)):
        sizes.append(0)
        loss(a, b, 5.0)
    kernel._Tiles.products = products
    return sizes


def messages() -> list[str]:
    found = []
    size = dist.get_world_size()
    for call in (
        lambda: ClipLoss()(torch.zeros(0, 3), torch.zeros(0, 3), 1.0),
        lambda: M3MixLoss()(torch.zeros(0, 3), torch.zeros(0, 3), 1.0),
        lambda: ClipLoss(rank=dist.get_rank(), world_size=1),
        lambda: ClipLoss(gather=False)(torch.zeros(0, 3), torch.zeros(0, 3), 1.0),
        lambda: M2MixLoss()(torch.ones(2, 3), torch.ones(2, 3), 1.0, lam=torch.zeros(2)),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        found.append(str(error.value).replace(f" {size} ", " W ").replace(f" {size};", " W;"))
    ClipLoss(rank=dist.get_rank(), world_size=size, local_loss=True, gather_with_grad=True)
    return found


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda ranks: f"{ranks} ranks")
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "error", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(request.param), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(request.param)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert [process.returncode for process in processes] == [0] * request.param, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def compare(found: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for key, value in want.items():
        size = max(1.0, float(value.abs().max()))
        error = float((found[key] - value).abs().max()) / size
        assert error <= tolerance, f"{key} is off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_one_process(name, ranks) -> None:
    case = CASES[name]
    pairs = sum(case.counts[len(ranks)])
    try:
        want = measure(case._replace(chunk=0), pairs, slice(None))
    finally:
        tile(False)
    for found in ranks:
        compare(found[name], want, 1e-12 if case.dtype == torch.float64 else 1e-6)
        assert torch.equal(found[name]["loss"], ranks[0][name]["loss"])
    gradient = torch.cat([value.flatten() for key, value in want.items() if key != "loss"])
    assert gradient.abs().max() > 1e-3


@pytest.mark.slow
def test_alone_it_is_another_loss(ranks) -> None:
    want, found = ranks[0]["clip"], ranks[0]["alone"]
    assert any((found[key] - value).abs().max() > 1e-2 for key, value in want.items())


@pytest.mark.slow
def test_other_numbers_of_chunks_with_batch_norm(ranks) -> None:
    """DDP sends the running statistics around before a forward pass: as often on all ranks, whatever their chunks."""
    for found in ranks:
        compare(found["batch norm"], ranks[0]["batch norm"], 0.0)


@pytest.mark.slow
def test_what_is_handed_in_on_the_first_rank_holds_for_all(ranks) -> None:
    counts = ODD[len(ranks)]
    a, b = (torch.cat(rows) for rows in zip(*(features(counts, rank) for rank in range(len(ranks))), strict=True))
    m2, m3 = M2MixLoss(weight=1.0), M3MixLoss(**M3)
    want = {
        "global": m2(a, b, 5.0, lam=torch.linspace(0, 1, 11)),
        "other generators": m2(a, b, 5.0, generator=torch.Generator().manual_seed(0)),
        "other lam": m3(a, b, 5.0, lam=0.2),
    }
    for found in ranks:
        compare(found, want, 1e-6)
    none = torch.cat([found["none"] for found in ranks])
    torch.testing.assert_close(none, ClipLoss(reduction="none")(a, b, 5.0), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_no_process_compares_all_with_all(ranks) -> None:
    counts = ODD[len(ranks)]
    for rank, found in enumerate(ranks):
        clip, mixed = found["area"]
        # Images with all texts and texts with all images; what is in both of these, a tile on the diagonal once.
        assert clip <= counts[rank] * (2 * 11 - counts[rank])
        assert mixed <= 2 * 11 * (11 // len(ranks) + 2)


@pytest.mark.slow
def test_messages_on_processes(ranks) -> None:
    for found in ranks:
        empty, mixed, size, alone, lam = found["messages"]
        assert empty == "clip_loss: image_features is empty on all W processes; pass at least one sample."
        assert mixed == "M3MixLoss: image_features is empty on all W processes; pass at least one sample."
        assert size.startswith("ClipLoss: world_size is 1 but that of the process group is W; call torch.distributed.")
        assert alone == "clip_loss: image_features has shape (0, 3) and is empty; pass at least one sample."
        assert lam.startswith("M2MixLoss: lam has shape (")


LOSSES = [ClipLoss, SigLipLoss, M2MixLoss, M2MixSigLipLoss, M3MixLoss]
STOCK = {"local_loss": True, "gather_with_grad": True, "cache_labels": True, "rank": 0, "world_size": 1}


@pytest.mark.parametrize("kind", LOSSES)
def test_open_clips_own_settings(kind) -> None:
    """They change nothing, or are refused."""
    who = kind.__name__
    a, b = features((6,), 0)
    for extra in ({"use_horovod": False}, {"dist_impl": "gather", "chunk_size": 0}):
        lam = {} if kind in (ClipLoss, SigLipLoss) else {"lam": 0.3}
        assert torch.equal(kind(**STOCK, **extra)(a, b, 5.0, **lam), kind()(a, b, 5.0, **lam))
    for settings, error, message in (
        ({"world_size": 4}, ValueError, "world_size is 4 but that of the process group is 1; call torch.distributed."),
        ({"rank": 1}, ValueError, "rank is 1 but that of the process group is 0; call torch.distributed.init_process"),
        ({"use_horovod": True}, ValueError, "use_horovod is True; pass False and use torch.distributed."),
        ({"local_los": True}, TypeError, "there is no setting 'local_los' (did you mean \"local_loss\"?); leave it "),
        ({"gather": 1}, TypeError, "gather is 1; pass True or False."),
    ):
        with pytest.raises(error, match=f"^{who}: {re.escape(message)}"):
            kind(**settings)
    kind(gather=False, rank=3, world_size=4)


@pytest.mark.parametrize("kind", [M2MixLoss, M2MixSigLipLoss, M3MixLoss])
@pytest.mark.parametrize("per", ["batch", "pair"])
def test_calls_of_one_step_share_their_draws(kind, per) -> None:
    a, b = features((6,), 0)
    loss, draws = kind(accumulate=3, per=per), torch.Generator().manual_seed(1)
    values = [loss(a, b, 5.0, generator=draws).item() for _ in range(4)]
    loss.eval()
    apart = loss(a, b, 5.0, generator=draws).item()
    loss.train()
    loss(a, b, 5.0, lam=0.5)
    values += [loss(a, b, 5.0, generator=draws).item() for _ in range(5)]
    assert [values.index(value) for value in values] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert apart not in values
    repeated = torch.Generator().manual_seed(1)
    assert kind(accumulate=3, per=per)(a, b, 5.0, generator=repeated).item() == values[0]
    single = kind(per=per)
    assert len({single(a, b, 5.0, generator=draws).item() for _ in range(3)}) == 3
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: accumulate is 0; pass an integer of at least 1\.$"):
        kind(accumulate=0)
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: generator is a int; pass a torch\.Generator or None\.$"):
        kind(accumulate=2)(a, b, 5.0, generator=3)


if __name__ == "__main__":
    as_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
