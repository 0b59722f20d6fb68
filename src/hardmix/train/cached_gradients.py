"""The gradient of a large batch with the memory of a small one, for losses that compare the samples of a batch.

A contrast of N pairs is not the mean of contrasts of parts, so accumulating gradients over parts is another loss. What
is large, though, are the activations of the towers, not the embeddings. Hence two passes: encode without a graph, chunk
by chunk; the loss of all embeddings, and its gradient with respect to them; encode again with a graph, chunk by chunk,
and send the stored gradients back. One forward pass more, and the activations of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hardmix import _check

#: By how much of its largest value a row may change when it is encoded again: rounding of half types, not a new mask.
AGAIN = 0.05


def cached_step(
    encode: Callable[..., Any],
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    loss: Callable[..., Tensor],
    *,
    chunk: int,
    model: nn.Module | Sequence[nn.Module] | None = None,
) -> Tensor:
    """Backward pass of `loss(encode(inputs))` as one batch, of which one chunk's graph exists at a time.

        z = encode(x)            all chunks, no graph
        g = d loss(z) / d z      and the gradients of what the loss itself learns
        encode(x_k) <- g_k       chunk after chunk, with a graph

    Adds to `.grad` what `loss(encode(inputs)).backward()` would; `zero_grad` and the optimiser's step are the caller's.
    Random numbers of torch's global generators (CPU and CUDA) repeat in the second pass, so that dropout has the masks
    of the first, and afterwards those generators stand where one pass over the chunks and the loss leave them.

    Args:
        encode: called with a chunk of each input. Gives a tensor, or a tuple, list or mapping of them: rows (n, ...),
            one per sample, or single values such as a model's `logit_scale.exp()`, which belong to all samples.
        inputs: one tensor, several for the positions of `encode`, or a mapping for its keywords, of N rows each. They
            may wait on another device: what `encode` moves there is a chunk.
        loss: called with the embeddings of all N rows, in the form that `encode` gives them in. Returns the loss, ().
            Its own parameters learn too. For loss scaling, return the scaled loss.
        chunk: number of rows encoded at a time; the last chunk may be smaller.
        model: the module or modules that `encode` runs, where it isn't one or a method of one. They are asked for
            `no_sync` (DDP), so that processes average once, in the last chunk; and for their batch norms.

    Returns:
        The loss, (), detached.

    Processes: each calls it with its own rows, also with other numbers of chunks, and a loss that compares those of all
    processes, such as `ClipLoss`. `encode` has to run the DDP module itself. Parameters that only `loss` uses are
    averaged if they are parameters of that module.

    Autocast: around the call or inside of `encode`, both work.

    Batch norm in training mode normalises by the statistics of a chunk, as accumulation does, not by those of the
    batch; running statistics are updated by the second pass alone, where `model` is known. SyncBatchNorm needs as many
    chunks on every process. Whatever else a forward pass changes for the next one (spectral norm, queues) or draws from
    generators of its own differs between the passes: the gradient would be that of other rows. On the CPU a difference
    of more than 5% of the largest value is refused.

    Raises:
        TypeError: inputs or embeddings that are no tensors; a setting of another kind.
        ValueError: numbers of rows disagree; no rows; a chunk below 1; a loss that is no single number or has no
            gradient; nothing that learns; rows that change when they are encoded again.

    Reference: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
    (arXiv:2101.06983).

    >>> from hardmix.losses import ClipLoss
    >>> tower = nn.Linear(6, 4)
    >>> images, texts = torch.randn(2, 32, 6)
    >>> value = cached_step(lambda x, y: (tower(x), tower(y)), (images, texts), lambda a, b: ClipLoss()(a, b, 10.0),
    ...     chunk=8)
    >>> tower.weight.grad.shape, value.requires_grad
    (torch.Size([4, 6]), False)
    """
    who = "cached_step"
    chunks = _chunks(who, inputs, _check.integer(who, "chunk", chunk, 1))
    modules = _modules(who, encode, model)
    starts, outputs = [], []
    with torch.no_grad(), _still_statistics(modules):
        for part in chunks:
            starts.append(_RandomState.now())
            outputs.append(_Output.of(who, part.call(encode), part.rows))
    torch.clear_autocast_cache()  # autocast hands out weights it has cast; older torch also those without a graph
    names, by_row = _common_form(who, outputs)
    columns = zip(by_row, zip(*(output.values for output in outputs), strict=True), strict=True)
    leaves = [_leaf(torch.cat(values) if rows else values[0]) for rows, values in columns]
    with torch.enable_grad():
        value = _single(who, _call(loss, names, leaves))
    wanted, own = _gradients(value, leaves)

    at, learns = 0, False
    for part, start, before in zip(chunks, starts, outputs, strict=True):
        last = part is chunks[-1]
        with ExitStack() as stack:
            if not last:
                stack.enter_context(_no_sync(modules))
            stack.enter_context(start.again())
            stack.enter_context(torch.enable_grad())
            again = _Output.of(who, part.call(encode), part.rows)
            roots = []
            for rows, old, new, grad in zip(by_row, before.values, again.values, wanted, strict=True):
                _check_again(who, old, new)
                if grad is not None and new.requires_grad and (rows or last):
                    roots.append((new, grad[at : at + part.rows] if rows else grad))
            # What the loss itself learns goes with the last chunk, in whose backward pass DDP waits for everything.
            if roots := roots + (own if last else []):
                torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
                learns = True
        at += part.rows
    if not learns:
        raise ValueError(f"{who}: nothing that encode or loss runs learns; switch gradients on for some parameters.")
    return value.detach()


def _call(function: Callable[..., Any], names: tuple[str, ...] | None, values: Sequence[Tensor]) -> Any:
    """By name or by position."""
    return function(*values) if names is None else function(**dict(zip(names, values, strict=True)))


def _taken_apart(who: str, what: str, value: Any) -> tuple[tuple[str, ...] | None, list[Tensor]]:
    """The tensors of a tensor, tuple, list or mapping, and the names of the last."""
    names, values = None, [value]
    if isinstance(value, Mapping):
        names, values = tuple(value), list(value.values())
    elif isinstance(value, (tuple, list)):
        values = list(value)
    for item in values:
        if not isinstance(item, Tensor):
            holds = "is" if item is value else "holds"
            raise TypeError(
                f"{who}: {what} {holds} a {type(item).__name__}; give tensors, alone, in a tuple or by name."
            )
    if not values:
        raise ValueError(f"{who}: {what} is empty; give at least one tensor.")
    return names, values


class _Part(NamedTuple):
    """A chunk of the inputs."""

    names: tuple[str, ...] | None
    values: Sequence[Tensor]
    rows: int

    def call(self, encode: Callable[..., Any]) -> Any:
        return _call(encode, self.names, self.values)


def _chunks(who: str, inputs: Any, chunk: int) -> list[_Part]:
    names, values = _taken_apart(who, "inputs", inputs)
    counts = {len(value) if value.ndim else 0 for value in values}
    if len(counts) > 1 or counts == {0}:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise ValueError(f"{who}: inputs has shape {shapes}; pass the same number of rows in each, and at least one.")
    return [_Part(names, piece, len(piece[0])) for piece in zip(*(v.split(chunk) for v in values), strict=True)]


class _Output(NamedTuple):
    """What `encode` made of a chunk, and which of it are rows; the rest belongs to all samples."""

    names: tuple[str, ...] | None
    values: list[Tensor]
    rows: list[bool]

    @classmethod
    def of(cls, who: str, value: Any, rows: int) -> _Output:
        names, values = _taken_apart(who, "what encode returns", value)
        for x in values:
            if not (x.ndim and len(x) == rows) and x.numel() != 1:
                raise ValueError(
                    f"{who}: encode returns shape {tuple(x.shape)} for {rows} samples; return one row per sample, or a "
                    "single value for all."
                )
        return cls(names, values, [bool(x.ndim) and len(x) == rows for x in values])


def _common_form(who: str, outputs: list[_Output]) -> tuple[tuple[str, ...] | None, list[bool]]:
    """The names of the outputs of all chunks, and which are rows."""
    first = outputs[0]
    if any(other.names != first.names or len(other.values) != len(first.values) for other in outputs):
        raise ValueError(f"{who}: encode returns other outputs for other chunks; return the same for each.")
    # A value of shape (1,) looks like a row where a chunk has one sample; a larger chunk can tell.
    return first.names, [all(rows) for rows in zip(*(output.rows for output in outputs), strict=True)]


def _leaf(z: Tensor) -> Tensor:
    return z.detach().requires_grad_(z.is_floating_point())


def _single(who: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{who}: loss returns {got}; return a tensor of one element.")
    if not value.requires_grad:
        raise ValueError(f"{who}: loss returns a value without a gradient; compute it from the embeddings it is given.")
    return value.reshape(())


def _gradients(value: Tensor, leaves: list[Tensor]) -> tuple[list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """The gradient of each embedding, where it has one, and the loss's own parameters with theirs."""
    parameters = [leaf for leaf in _graph_leaves(value) if not any(leaf is z for z in leaves)]
    learning = [z for z in leaves if z.requires_grad]
    found = iter(torch.autograd.grad(value, learning + parameters, allow_unused=True))
    wanted = [next(found) if z.requires_grad else None for z in leaves]
    return wanted, [(leaf, grad) for leaf, grad in zip(parameters, found, strict=True) if grad is not None]


def _graph_leaves(value: Tensor) -> list[Tensor]:
    """The tensors that learn among those a value was computed from."""
    leaves, seen, ahead = [], set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not node.next_functions and isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves.append(variable)
        ahead += [before for before, _ in node.next_functions]
    return leaves


def _check_again(who: str, old: Tensor, new: Tensor) -> None:
    """Rows that are encoded again stay the same. A GPU is not waited for."""
    if old.device.type != "cpu" or not old.is_floating_point() or not old.numel():
        return
    change, most = (float(x.detach().abs().max()) for x in (new - old, old))
    if change > AGAIN * most:
        raise ValueError(
            f"{who}: encode gives other rows when it is called again, by up to {change:.3g} of {most:.3g}; let it draw "
            "from torch's global generators alone, and change nothing in itself."
        )


class _RandomState(NamedTuple):
    """Where torch's global generators stand."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> _RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from here once more; afterwards the generators are where they were before."""
        with torch.random.fork_rng(range(len(self.cuda))):
            torch.set_rng_state(self.cpu)
            if self.cuda:
                torch.cuda.set_rng_state_all(self.cuda)
            yield


def _modules(who: str, encode: object, model: Any) -> list[nn.Module]:
    if model is None:
        owner = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
        return [owner] if isinstance(owner, nn.Module) else []
    modules = list(model) if isinstance(model, (tuple, list)) else [model]
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{who}: model is a {type(module).__name__}; pass the modules that encode runs, or None.")
    return modules


@contextmanager
def _no_sync(modules: list[nn.Module]) -> Iterator[None]:
    """No exchange of gradients between processes."""
    with ExitStack() as stack:
        for module in modules:
            no_sync: Callable[[], AbstractContextManager[None]] | None = getattr(module, "no_sync", None)
            if no_sync is not None:
                stack.enter_context(no_sync())
        yield


@contextmanager
def _still_statistics(modules: list[nn.Module]) -> Iterator[None]:
    """Batch norms in training mode leave their running statistics alone."""
    norms = [m for root in modules for m in root.modules() if isinstance(m, _BatchNorm) and m.training]
    norms = [norm for norm in dict.fromkeys(norms) if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
