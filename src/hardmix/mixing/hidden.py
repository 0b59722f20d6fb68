"""ManifoldMixup: mix the output of a hidden layer."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix.mixing.draw import LabelPairing, Pairing, cpu_generator
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy
from hardmix.mixing.target import MixedTarget


class ManifoldMixup(Policy):
    """Manifold mixup: mix whole samples at the input or at the output of a hidden layer, drawn anew for each batch.

        h~_i = lam_i h_i + (1 - lam_i) h_{partner_i}   at one layer h of `layers`,   lam ~ Beta(alpha, alpha)

    `x, target = mix(x, y)` draws the layer. If it is the input, `x` comes back mixed; otherwise `x` comes back as it
    is and the next forward of `model` in training mode mixes that layer's output, once. Forwards in evaluation mode
    never mix. A draw that no forward has used is an error at the next draw (the layer was skipped, or the model was in
    evaluation mode); `disarm` takes a draw back.

    Args:
        model: the model, or any part of it that holds the layers. Forward hooks are put on the layers, so it may be
            wrapped later (DistributedDataParallel, torch.compile, which breaks the graph at the layers). It is not
            kept: the policy has no parameters and its state_dict is empty.
        layers: names of submodules, as in `model.named_modules()`. Their output is a tensor (N, ...), or a tuple or
            list whose first entry is.
        include_input: whether the input is one of the places to mix at.
        alpha, per, pairing: see `Policy`.

    Copies: a copied or unpickled policy has no hooks; call `attach(model)`. A copied or unpickled model (an average of
    the weights, say) carries hooks that do nothing. Activation checkpointing: the layer is mixed again, with the same
    plan, when its forward is run again during the backward pass; run the model once between a draw and its backward.
    Shapes: any batch (N, ...) of 2 to 5 axes. `plan` alone draws a plan and arms nothing.
    Reference: Verma et al. 2019, section 2 (arXiv:1806.05236).
    """

    min_ndim = 2

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        alpha: float = 2.0,
        include_input: bool = True,
        per: str = "sample",
        pairing: str | LabelPairing | None = None,
    ) -> None:
        super().__init__(alpha=alpha, per=per, pairing=pairing)
        if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
            raise TypeError(f"ManifoldMixup: layers is {layers!r}; pass a list of submodule names.")
        self.layers = tuple(layers)
        self.include_input = bool(include_input)
        if not self.layers and not self.include_input:
            raise ValueError("ManifoldMixup: layers is empty and include_input is False; name a layer to mix at.")
        self._state = _State()
        self.attach(model)

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, include_input={self.include_input}, {super().extra_repr()}"

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model` (and take them off the one before)."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"ManifoldMixup: model is a {type(model).__name__}; pass a torch.nn.Module.")
        modules = dict(model.named_modules())
        for name in self.layers:
            if name not in modules or not name:
                near = _check.did_you_mean(name, (known for known in modules if known))
                raise ValueError(
                    f"ManifoldMixup: layers names {name!r}, which the model does not have{near}; "
                    "pass names from model.named_modules()."
                )
        self.detach()
        self._state.attached = True
        for index, name in enumerate(self.layers):
            hook = _hook_class()(weakref.ref(self._state), weakref.ref(modules[name]), weakref.ref(model), index)
            self._state.handles.append(modules[name].register_forward_hook(hook))

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._state.handles:
            handle.remove()
        self._state.handles.clear()
        self._state.attached = False
        self.disarm()

    def disarm(self) -> None:
        """Take back a draw that no forward has used, for a step that is skipped on purpose."""
        self._state.plan = self._state.layer = self._state.used = None

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        lam = self._lam(pairing, generator)
        return MixPlan(pairing.partner, lam, shift=pairing.shift).to(x.device)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x, target): `x` mixed, or as it is and a layer armed to mix."""
        state = self._state
        if not state.attached:
            raise RuntimeError("ManifoldMixup: this policy is a copy without hooks; call attach(model) first.")
        if state.plan is not None:
            raise RuntimeError(
                f"ManifoldMixup: the draw for layer {self.layers[state.layer or 0]!r} was not used; run the model once "
                "in training mode after each draw, through that layer, or call disarm()."
            )
        cpu_generator("ManifoldMixup", generator)
        state.used = None
        first = 0 if self.include_input else 1
        layer = int(torch.randint(first, len(self.layers) + 1, (1,), generator=generator)) - 1
        if layer < 0:
            return super().forward(x, y, generator=generator, kind=kind)
        plan, target = self._plan_and_target(x, y, generator, kind)
        state.plan, state.layer = plan, layer
        return x, target

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the hooks and the armed plan, which belong to this policy's model."""
        return {**self.__dict__, "_state": _State()}


class _State:
    """What the hooks of one policy share with it: the armed plan, and the one that was used last."""

    def __init__(self) -> None:
        self.attached = False
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.plan: MixPlan | None = None
        self.layer: int | None = None
        self.used: tuple[int, MixPlan] | None = None


class _LayerHook:
    """The forward hook of one layer. All references are weak: a hook keeps neither the policy nor the model alive."""

    def __init__(self, state: Any, module: Any, root: Any, index: int) -> None:
        self.state, self.module, self.root, self.index = state, module, root, index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        state, root = self.state(), self.root()
        # A copy of the model carries a copy of this hook, whose own module is another one.
        if state is None or root is None or module is not self.module() or not root.training:
            return None
        if state.plan is not None and state.layer == self.index:
            plan, state.plan = state.plan, None
            state.used = (self.index, plan)
        elif state.used is None or state.used[0] != self.index:
            return None
        elif torch._C._current_graph_task_id() != -1:
            plan = state.used[1]  # inside the backward pass: activation checkpointing runs the forward again
        else:
            state.used = None  # a clean forward, which activation checkpointing must run again clean
            return None
        if isinstance(output, Tensor):
            return plan.blend(output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            first = plan.blend(output[0])
            rest = [first, *output[1:]]
            return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
        raise TypeError(
            f"ManifoldMixup: a layer returned a {type(output).__name__}; name a layer that returns a tensor, "
            "or a tuple whose first entry is one."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle_hook, ()


@functools.cache
def _hook_class() -> type[_LayerHook]:
    """The hook, run outside compiled graphs. Made when first needed: `torch.compiler.disable` loads the whole compiler,
    which an import of this package must not."""

    class Hook(_LayerHook):
        __call__ = torch.compiler.disable(_LayerHook.__call__)

    return Hook


def _no_reference() -> None:
    return None


def _idle_hook() -> _LayerHook:
    """What a copied or unpickled model carries instead: a hook that does nothing."""
    return _LayerHook(_no_reference, _no_reference, _no_reference, 0)
