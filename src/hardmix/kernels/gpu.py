"""Whether kernels of our own can be compiled for a GPU, and what they ask of their input."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

#: Labels of a row that the kernels go through one by one, each number of them compiled for itself.
MOST_LABELS = 16

_compiles: dict[tuple[torch.device, torch.dtype], bool] = {}


def fits_kernels(logits: Tensor, labels: int = 1) -> bool:
    """Whether rows of logits with so many labels can go to kernels of our own: plain tensors (N, C) on a GPU, in
    float32 or a half type."""
    return (
        logits.is_cuda
        and logits.ndim == 2
        and labels <= MOST_LABELS
        and logits.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and type(logits) in (Tensor, torch.nn.Parameter)  # what wraps others has no memory to read
        and not torch.jit.is_tracing()
        and has_kernels(logits.device, logits.dtype)
    )


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton, which torch's builds for GPUs bring, compiles for `device`: it needs a C compiler, for example.

    Where it does not, tensor operations give the same numbers, more slowly; where it is there but fails, a warning says
    so once.
    """
    key = (device, dtype)
    if key not in _compiles:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be loaded now; asked again when the graph is done
        _compiles[key] = _try(device, dtype)
    return _compiles[key]


def _try(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        from hardmix.kernels.mixed_cross_entropy_gpu import forward
    except ImportError:
        return False
    try:
        with torch.cuda.device(device):
            logits = torch.zeros(1, 2, device=device, dtype=dtype)
            labels, share = (torch.zeros(1, 1, device=device, dtype=kind) for kind in (torch.long, torch.float32))
            forward(logits, labels, share, None, None, 0.0, 0.0, False)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if "CUDA error" in reason:  # of an operation before
            raise
        warnings.warn(f"hardmix: Triton can't compile kernels here ({reason}); losses take more time.", stacklevel=2)
        return False
    return True


def rows_together(x: Tensor) -> Tensor:
    """`x` (N, C) with each row in one piece of memory, as kernels read it. A second derivative needs the copy in the
    graph, so it is made before an autograd function, not in it."""
    return x if x.stride(1) == 1 else x.contiguous()
