"""Reading the attention of a vision transformer while it runs, and the patches that its tokens stand for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.mixing.attention_reader import Attention, is_attention, read_attention
from hardmix.mixing.gradients import check_model, model_input, undisturbed, without_ddp
from hardmix.mixing.hidden import WeakHook, find_module, outside_graphs, take_off, taken_off_with

#: Tokens that may stand before the patches, the likeliest first: a class token, none, one of distillation, registers.
_PREFIXES = (1, 0, 2, 5, 9, 3, 4, 6, 7, 8, 16, 17)


class Grid(NamedTuple):
    """The patches of an image: `rows` x `columns` of `height` x `width` pixels, after `prefix` other tokens."""

    rows: int
    columns: int
    height: int
    width: int
    prefix: int = 0

    @property
    def patches(self) -> int:
        return self.rows * self.columns


#: What is kept of a block's attention.
Keep = Callable[[Attention], Tensor]


class AttentionTap:
    """Reads the attention of one forward of a vision transformer: of the last block, or of every block.

        tap = AttentionTap(model)
        tap.arm(images=len(x));  logits = model(x);  (attention,) = tap.take()      # (N, heads, T, T)
        logits, (attention,) = tap.measure(x)                                       # without a gradient

    A forward hook stands on each attention module. Once armed, it runs the module's forward a second time on the same
    input, without a gradient, and stops it where it comes to `F.scaled_dot_product_attention`, a softmax of scores, or
    torch's multi-head attention: there the queries and keys are, whatever the model did to them before (norms, rotary
    positions, added biases). So fused kernels stay on, and the model's output, its gradients, the random state and the
    statistics of batch norms are those of a model without a tap. What is kept has no graph.

    It reads once: the first forward in training mode after `arm` (of `measure`, its own). Forwards in evaluation mode
    and the ones that activation checkpointing repeats are not read.

    Which modules: `layer`, or those that are torch's `MultiheadAttention` or hold layers named `qkv`, `to_qkv`, `Wqkv`,
    `q` and `k`, `query` and `key`, `q_proj` and `k_proj`, `to_q` and `to_k`, or `wq` and `wk`: that fits the vision
    transformers of timm, transformers and torchvision, and `hardmix.models.vit`. The last is the one registered last.
    Rows of the attention are images: attention within windows (Swin) is refused when it is read.

    Args:
        model: the model, or the part of it that holds the blocks. It may be wrapped later (DistributedDataParallel,
            torch.compile), or be compiled already; of a DistributedDataParallel `measure` runs the module inside. It is
            no submodule of anything.
        layer: name of the one attention module to read, as in `model.named_modules()`.
        every: whether to read every block; what `take` gives is then in the order in which they run.
        patch: side of a patch in pixels. None takes it from the first `Conv2d` whose stride is its kernel, or else from
            the number of tokens and the image's aspect ratio.
        who: name that messages start with.

    Copies of a tap have no model: call `attach`. Copies of the model carry hooks that do nothing. torch.compile breaks
    the graph after the attention, and takes all blocks for alike, with a hook or without, unless
    `torch._dynamo.config.skip_nnmodule_hook_guards` is False: set it before the model is compiled.
    Cost: the last block's projections once more, without a gradient, and softmax of what `arm` asks to keep.
    Raises:
        TypeError: a model that is no module, a layer that is no name.
        ValueError: a model without attention, a layer that it does not have, `every` together with `layer`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | None = None,
        every: bool = False,
        patch: int | None = None,
        who: str = "AttentionTap",
    ) -> None:
        if layer is not None and not isinstance(layer, str):
            raise TypeError(f"{who}: layer is {layer!r}; pass the name of a submodule, or None.")
        if layer is not None and every:
            raise ValueError(f"{who}: layer is {layer!r} but every block is to be read; pass one of the two.")
        self.layer, self.every, self.who = layer, bool(every), who
        self.patch = None if patch is None else _check.integer(who, "patch", patch, 1)
        self._clear()
        self.attach(model)

    def _clear(self) -> None:
        self._model: tuple[nn.Module, ...] = ()
        self._names: list[str] = []
        self._hooks: list[weakref.finalize[..., Any]] = []
        self._keep: Keep | None = None
        self._images: int | None = None
        self._kept: list[Tensor] = []
        self.measuring = False

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model`, and take them off the one before."""
        check_model(self.who, model)
        model = getattr(model, "_orig_mod", model)  # of a compiled model the part that hooks and names belong to
        modules = dict(model.named_modules())
        if self.layer is not None:
            find_module(self.who, "layer", model, self.layer)
            names = [self.layer]
        else:
            names = [name for name, module in modules.items() if is_attention(module)]
        if not names:
            raise ValueError(
                f"{self.who}: the {type(modules['']).__name__} has no attention that could be found (torch's "
                "MultiheadAttention, or a module that holds layers named qkv, q and k, query and key, or q_proj and "
                "k_proj); pass a vision transformer, or the name of the module as layer."
            )
        self.detach()
        self._model = (model,)
        self._names = names if self.every else names[-1:]
        for index, name in enumerate(self._names):
            hook = outside_graphs(_Hook)(weakref.ref(self), modules[name], model, index)
            self._hooks.append(taken_off_with(self, modules[name].register_forward_hook(hook, with_kwargs=True)))

    def detach(self) -> None:
        """Take the hooks off the model and forget it."""
        take_off(self._hooks)
        self._clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the model and its hooks."""
        return {name: getattr(self, name) for name in ("layer", "every", "patch", "who")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    @property
    def model(self) -> nn.Module:
        """The model that is read; an error if this is a copy."""
        if not self._model:
            raise RuntimeError(f"{self.who}: this is a copy without its model; call attach(model) first.")
        return self._model[0]

    @property
    def names(self) -> list[str]:
        """The attention modules that are read, in the order in which they are registered."""
        return list(self._names)

    @property
    def armed(self) -> bool:
        """Whether the next forward in training mode will be read."""
        return self._keep is not None

    def arm(self, *, images: int | None = None, keep: Keep | None = None) -> None:
        """Read the next forward in training mode.

        Args:
            images: number of rows that the batch has, which the attention is then checked to have.
            keep: what is kept of each block's attention; None: its weights (N, heads, T, T).
        """
        self._model = (self.model,)  # an error if this is a copy
        self._keep, self._images, self._kept = Attention.weights if keep is None else keep, images, []

    def disarm(self) -> None:
        """Take `arm` back, and forget what was read."""
        self._keep, self._kept = None, []

    def take(self) -> list[Tensor]:
        """What was kept of the forward since `arm`, block by block; empty if there was none. It is given out once."""
        kept, self._kept = self._kept, []
        self._keep = None
        return kept

    def measure(
        self, x: Tensor, *, keep: Keep | None = None, autocast: torch.dtype | None = None
    ) -> tuple[Any, list[Tensor]]:
        """(output, what is kept): one forward of `x` for its attention alone, as `run` does it."""
        self.arm(images=x.shape[0], keep=keep)
        self.measuring = True
        try:
            output = self.run(x, autocast=autocast)
            kept = self._kept
        finally:
            self.measuring = False
            self.disarm()
        if not kept and _compiled(self.model):
            raise RuntimeError(
                f"{self.who}: the {type(self.model).__name__} holds compiled code that does not run hooks; compile the "
                "whole model with torch.compile(model), or use torch 2.6 or later."
            )
        if not kept:
            raise RuntimeError(
                f"{self.who}: the forward of the {type(self.model).__name__} did not run {self._names[-1]!r}; "
                "name the attention module to read as layer."
            )
        return output, kept

    def run(self, x: Tensor, *, autocast: torch.dtype | None = None) -> Any:
        """What the model makes of `x` in evaluation mode, without a gradient and without its compiled code.

        Dropout, batch statistics, gradients and the random state are as before, and modes are put back. `x` is given in
        the dtype of the model's parameters, or under `autocast`.
        """
        model = without_ddp(self.model)
        x = model_input(self.who, model, x)
        low = torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False)
        with undisturbed(model, batch_statistics=False), torch.no_grad(), low, _uncompiled(model):
            output = model(x)
        # An autocast of the model's own may keep weights that it cast without a graph (older torch).
        torch.clear_autocast_cache()
        return output

    def grid(self, size: tuple[int, ...], tokens: int | None = None) -> Grid:
        """The patches of images of `size` (H, W).

        Their size is `patch`, or the kernel of the first `Conv2d` whose stride is its kernel; pixels beyond the last
        whole patch belong to none. What `tokens` leaves besides the patches are the class token and others before them.
        Where that does not add up (a model with a convolutional stem, or several resolutions), tokens less one, none,
        or a few more are laid out in the aspect ratio of the image.
        """
        height, width = size
        sides = (self.patch, self.patch) if self.patch else _patch_sides(self.model)
        if sides is not None:
            grid = Grid(height // sides[0], width // sides[1], *sides)
            if tokens is None and grid.patches:
                return grid
            if tokens is not None and 0 < grid.patches <= tokens:
                return grid._replace(prefix=tokens - grid.patches)
        if tokens is not None and self.patch is None:
            for prefix in _PREFIXES:
                rows = round(max(0, tokens - prefix) ** 0.5 * (height / width) ** 0.5)
                columns = (tokens - prefix) // rows if rows else 0
                if columns and rows * columns == tokens - prefix and rows * width == columns * height:
                    return Grid(rows, columns, max(1, height // rows), max(1, width // columns), prefix)
        what = "" if tokens is None else f" with {tokens} tokens"
        raise ValueError(
            f"{self.who}: the patches of a {height} x {width} image{what} can't be told"
            + (f" for patch={self.patch}" if self.patch else "")
            + "; pass patch, the side of a patch in pixels."
        )

    def has_class_token(self, grid: Grid) -> bool:
        """Whether a class token stands first: another token does, and no module says that its `cls_token` is None."""
        said = (getattr(module, "cls_token", module) for module in self.model.modules())
        return grid.prefix > 0 and all(token is not None for token in said)

    def patch_map(self, attention: Attention, grid: Grid, *, by_patches: bool = False) -> Tensor:
        """(N, rows, columns): what each patch is given, in the mean over the heads.

        By the class token; or, with `by_patches` or where there is none, by the patches on average.
        """
        if by_patches or not self.has_class_token(grid):
            given = attention.weights().mean(1)
            if given.shape[1] != given.shape[2]:
                raise ValueError(
                    f"{self.who}: {self._names[-1]!r} attends from {given.shape[1]} tokens to {given.shape[2]}, but "
                    "what the patches attend to is wanted; name a self-attention as layer."
                )
            given = given[:, grid.prefix :].mean(1)  # (N, T)
        else:
            given = attention.weights(1).mean(1)[:, 0]
        return given[:, grid.prefix :].unflatten(1, (grid.rows, grid.columns))

    def _read(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook's work: `module` has just run on `args`."""
        assert self._keep is not None
        name = self._names[index]
        try:
            with torch.no_grad():
                attention = read_attention(self.who, name, module, args, kwargs)
                if self._images is not None and attention.images != self._images:
                    raise ValueError(
                        f"{self.who}: the attention of {name!r} has {attention.images} rows for {self._images} images "
                        "(attention within windows sees no whole image); name another module as layer, or take another "
                        "policy."
                    )
                with torch.autocast(attention.device.type, enabled=False):
                    self._kept.append(self._keep(attention))
        except BaseException:
            self.disarm()  # or every later forward would fail, too
            raise
        if index == len(self._names) - 1:
            self._keep = None


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Runs compiled parts of the model as they were written: compiled code may not know of hooks that came later."""
    # Where nothing is compiled, the compiler isn't loaded. set_stance came with torch 2.6.
    if not _compiled(model) or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def _patch_sides(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) of a patch: the first convolution whose windows do not overlap."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and max(module.kernel_size) > 1:
            height, width = module.kernel_size
            return height, width
    return None


class _Hook(WeakHook):
    """Reads the attention that has just run."""

    def __call__(  # type: ignore[override]  # a hook with keywords
        self, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        tap = self.state()
        if self.live(module) and tap.armed and (self.training() or tap.measuring):
            tap._read(self.index, module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (type(None), None, None)  # a reference to nothing: the copy does nothing
