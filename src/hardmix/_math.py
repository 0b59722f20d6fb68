"""Small numerical helpers that more than one objective needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Backward = Callable[..., Any]
#: Named wherever a plan is drawn: `torch.set_default_device` and `set_default_dtype` are about what the user makes.
CPU = torch.device("cpu")
#: cosines no farther apart are a tie: in which order a sum is formed can make that of equal ones, up to 4,096 features
TIE = {torch.float32: 1e-6, torch.float64: 1e-14}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are done in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) with all digits: the default threshold of 20 drops 2e-9, which float64 can tell; 40 nothing."""
    return F.softplus(x, threshold=40)


def is_transformed() -> bool:
    """Whether a function transform (`torch.func`) or forward-mode differentiation is under way. Its tensors look like
    plain ones, but what NumPy, `out=` or a hand-written backward does to them is lost to it."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms(what: str) -> None:
    """For what has no form but one with a hand-written backward pass; torch's own refusal speaks of that pass.

    Raises:
        NotImplementedError: under a function transform or forward-mode differentiation.
    """
    if not torch.compiler.is_compiling() and is_transformed():
        raise NotImplementedError(
            f"{what} have a backward pass written by hand, which torch.func and forward-mode differentiation can't "
            "use; call backward() or torch.autograd.grad."
        )


def readable(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def is_autocast(device_type: str) -> bool:
    """Whether an autocast region of this kind of device is open; False where there is no autocast, as on "meta"."""
    # torch.amp.is_autocast_available would tell, but before torch 2.12 it can't be compiled.
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:
        return False


def settled(x: Tensor) -> Tensor:
    """The dense tensor `x`, and inside torch.compile a mark that it is to be computed once and kept in memory: else
    what little is computed for a row is computed again for each pixel of the row that reads it."""
    # The compiler can only take strides of memory, so it has to have some. Nothing else says so.
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def first_only(message: str) -> Callable[[Backward], Backward]:
    """Marks the backward pass of an autograd function that has no derivative of its own: asking for one raises.

    torch's `once_differentiable` lets some by: it looks at the gradients that come in, which are constant where the
    result is only summed, and its refusal hangs on nothing, so that `torch.autograd.grad`, which goes where its inputs
    are, never meets it. Either leaves a second derivative without this part. Here it hangs on all that was saved.
    """

    def mark(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> Any:
            with torch.no_grad():
                values = backward(ctx, *grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # compiled code refuses by itself
                return values
            return _Refuse.apply(message, values, *grads, *ctx.saved_tensors)

        return run

    return mark


class _Refuse(torch.autograd.Function):
    """Values that were computed from others, whose gradient is refused."""

    @staticmethod
    def forward(ctx: Any, message: str, values: tuple[Tensor | None, ...], *others: Tensor | None) -> Any:
        ctx.message = message
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(ctx.message)


def graph_gradient(formula: Callable[..., Tensor], grad: Tensor, x: Tensor, *others: Any) -> Tensor:
    """Gradient of `formula(x, *others)` with respect to x, itself in the graph: what a written-out backward pass gives
    where a second derivative is wanted."""
    return torch.autograd.grad(formula(x, *others), x, grad, create_graph=True)[0]


def unit(x: Tensor) -> Tensor:
    """Rows (..., D) divided by their length; a row of zeros stays one. Lengths from 1e-30 to 1e30 don't overflow."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0)


def reduce(values: Tensor, reduction: str, valid: Tensor | None = None) -> Tensor:
    """Mean, sum or none over the rows that count.

    `valid` marks the rows that count; the others are 0 already. The mean divides by their number, never by looking at
    the values, so a NaN stays a NaN. No valid row gives 0 that is still joined to the graph.
    """
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.mean() if valid is None else values.sum() / valid.sum().clamp(min=1)
