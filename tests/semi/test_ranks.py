"""Two real processes: what is remembered, and the gradient, are those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_ranks import launch
from tests.semi.cases import CLASSES, draw, net, rng

BODY = """
import sys
import torch
import torch.distributed as dist
from hardmix.distributed import leave
from tests.semi.test_ranks import algorithms, steps
dist.init_process_group("gloo")
found = {name: steps(make, dist.get_rank(), dist.get_world_size()) for name, make in algorithms().items()}
torch.save(found, f"FOLDER/{dist.get_rank()}.pt")
leave()
"""


def algorithms() -> dict:
    from hardmix.semi import FixMatch, FlexMatch, FreeMatch, ReMixMatch, SoftMatch

    return {
        "fixmatch": lambda model: FixMatch(threshold=0.5),
        "flexmatch": lambda model: FlexMatch(num_classes=CLASSES, num_unlabelled=20, threshold=0.5),
        "freematch": lambda model: FreeMatch(num_classes=CLASSES, momentum=0.5, fairness=0.0),
        "softmatch": lambda model: SoftMatch(num_classes=CLASSES, momentum=0.5),
        "remixmatch": lambda model: ReMixMatch(model, torch.full((CLASSES,), 0.25), rotation=0.0, memory=2, alpha=1e-4),
    }


def steps(make, rank: int, ranks: int) -> tuple[dict, list]:
    """Buffers after three steps of the rank's part of the batch, and each step's gradients, averaged over the ranks."""
    from hardmix.semi import ReMixMatch

    model = net(2)
    algorithm = make(model)
    gradients = []
    for step in range(3):
        batch = draw(step, views=len(algorithm.views), labelled=4, unlabelled=8)
        x, y, ids = (part.tensor_split(ranks)[rank] for part in (batch.x, batch.y, batch.ids))
        views = tuple(view.tensor_split(ranks)[rank] for view in batch.views)
        algorithm.set_progress(0.5)
        output = algorithm(model, batch._replace(x=x, y=y, views=views, ids=ids), generator=rng(step))
        grads = torch.autograd.grad(output.loss, list(model.parameters()))
        if ranks > 1:
            for grad in grads:
                torch.distributed.all_reduce(grad)
        if not isinstance(algorithm, ReMixMatch):  # its mixup is of each process's own samples
            gradients.append([grad / ranks for grad in grads])
    return dict(algorithm.state_dict()), gradients


@pytest.mark.slow
def test_two_ranks_remember_and_learn_what_one_does(tmp_path: Path) -> None:
    launch(tmp_path, BODY.replace("FOLDER", str(tmp_path)))
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, make in algorithms().items():
        buffers, gradients = steps(make, 0, 1)
        for found, grads in (part[name] for part in both):
            assert found.keys() == buffers.keys()
            for key, value in buffers.items():
                torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7, msg=f"{name} {key}")
            for got, want in zip(grads, gradients, strict=True):
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, msg=name)
        assert all(torch.equal(both[0][name][0][key], both[1][name][0][key]) for key in buffers)
