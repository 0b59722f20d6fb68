"""Whether kernels of our own can be compiled for a GPU."""

from __future__ import annotations

import warnings
from functools import cache

import torch


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton, which torch's builds for GPUs bring, can compile for `device`: it needs a C compiler.

    Without it the same numbers come from tensor operations, more slowly; a warning says so once.
    """
    try:
        from hardmix.kernels.mixed_cross_entropy_gpu import forward
    except ImportError:
        return False
    try:
        with torch.cuda.device(device):
            logits, labels = torch.zeros(1, 2, device=device), torch.zeros(1, 1, dtype=torch.long, device=device)
            forward(logits, labels, logits[:, :1].contiguous(), None, None, 0.0, 0.0, False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"hardmix: Triton can't compile kernels here ({reason}); losses take more time.", stacklevel=2)
        return False
    return True


def fits_kernels(logits: torch.Tensor) -> bool:
    """Whether rows of logits can go to kernels of our own: (N, C) on a GPU, in float32 or a half type."""
    return logits.is_cuda and logits.ndim == 2 and logits.dtype != torch.float64 and has_kernels(logits.device)


def rows_together(x: torch.Tensor) -> torch.Tensor:
    """`x` (N, C) with each row in one piece of memory, as kernels read it. A second derivative needs the copy in the
    graph, so it is made before an autograd function, not in it."""
    return x if x.stride(1) == 1 else x.contiguous()
