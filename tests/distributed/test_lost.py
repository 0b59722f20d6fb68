"""Which errors of an exchange say that another process has gone."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from hardmix import distributed
from hardmix.train.errors import RunError


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2711"), True),
        (RuntimeError("writev [127.0.0.1]:3: Broken pipe"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("[/src/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 1800000ms for recv"), False),
        (RuntimeError("[enforce fail at gloo/pair.cc:446] op.preamble.length <= op.nbytes. 64 vs 4"), False),
        (RuntimeError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"), False),
        (RunError("/data/Broken pipe/run is a file; choose another --out."), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_lost_a_rank(error: Exception, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not distributed.lost_a_rank(error), "one process has nobody to lose"
    monkeypatch.setattr(distributed, "rank_and_size", lambda: (0, 2))
    assert distributed.lost_a_rank(error) == lost
