"""Second derivatives of what ranks exchange: right, or refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from hardmix.distributed import _GatherWithSum, _MeanOfParts, leave


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone, whose exchanges are real."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    leave()


@pytest.mark.usefixtures("group")
def test_rows_of_all_ranks_have_first_derivatives_only() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(_GatherWithSum.apply(x, [3], 0).square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 2 * x)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.usefixtures("group")
def test_the_mean_of_parts_has_all_derivatives() -> None:
    x = torch.randn((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: _MeanOfParts.apply(x.sin(), 1).exp(), x)
