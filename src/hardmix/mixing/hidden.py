"""ManifoldMixup, and what policies share that put hooks on a model: mix the output of a hidden layer, or look at it."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from hardmix import _check
from hardmix._math import CPU
from hardmix.mixing.draw import LabelPairing, Pairing, cpu_generator
from hardmix.mixing.gradients import check_model
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
            wrapped later (DistributedDataParallel, torch.compile, which breaks the graph at the layers; in
            nn.DataParallel with several devices no layer is mixed, an error at the next draw). It is not kept: the
            policy has no parameters and its state_dict is empty. A layer that is replaced later, as by adapters, is an
            error at the next draw: call `attach` with the model that has layers of these names, of a PeftModel with its
            `get_base_model()`.
        layers: names of submodules, as in `model.named_modules()`. Their output is a tensor (N, ...), or a tuple or
            list whose first entry is.
        include_input: whether the input is one of the places to mix at.
        alpha, per, pairing: see `Policy`.

    Copies: a copied or unpickled policy has no hooks; call `attach(model)`. A copied or unpickled model (an average of
    the weights, say) carries hooks that do nothing. Activation checkpointing: the layer is mixed again, with the same
    plan, when its forward is run again during the backward pass, also where several draws are trained with at once.
    torch.compile takes all layers of one class for alike, with a hook or without, unless
    `torch._dynamo.config.skip_nnmodule_hook_guards` is False: set it before the model is compiled.
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
        who = type(self).__name__
        listed = isinstance(layers, Sequence) and not isinstance(layers, str)
        if not listed or not all(isinstance(name, str) for name in layers):
            raise TypeError(f"{who}: layers is {layers!r}; pass a list of submodule names.")
        self.layers = tuple(layers)
        self.include_input = _check.boolean(who, "include_input", include_input)
        if not self.layers and not self.include_input:
            raise ValueError(f"{who}: layers is empty and include_input is False; name a layer to mix at.")
        self._state = _State(type(self))
        self.attach(model)

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, include_input={self.include_input}, {super().extra_repr()}"

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model` (and take them off the one before)."""
        self._put_hooks(model, self.layers)

    def _put_hooks(self, model: nn.Module, names: tuple[str, ...]) -> None:
        who = type(self).__name__
        check_model(who, model)
        modules = [find_module(who, "layers", model, name) for name in names]
        self.detach()
        self._state.attached, self._state.names = True, names
        self._state.model, self._state.modules = weakref.ref(model), [weakref.ref(module) for module in modules]
        for index, module in enumerate(modules):
            hook = outside_graphs(_LayerHook)(weakref.ref(self._state), module, model, index)
            self._state.hooks.append(taken_off_with(self._state, module.register_forward_hook(hook)))

    def detach(self) -> None:
        """Take the hooks off the model."""
        take_off(self._state.hooks)
        self._state.attached = False
        self._state.forwards.clear()
        self.disarm()

    def disarm(self) -> None:
        """Take back a draw that no forward has used, for a step that is skipped on purpose."""
        self._state.plan = self._state.layer = None

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        lam = self._lam(pairing, generator)
        return MixPlan(pairing.partner, lam, shift=pairing.shift).to(x.device)

    @staticmethod
    def mix_layer(plan: Any, output: Tensor) -> Tensor:
        """The output of the armed layer, mixed as `plan` (what `draw` returns) says."""
        mixed: Tensor = plan.blend(output)
        return mixed

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x, target): `x` mixed, or as it is and a layer armed to mix."""
        state, who = self._state, type(self).__name__
        if not state.attached:
            raise RuntimeError(f"{who}: this policy is a copy without hooks; call attach(model) first.")
        self._check_layers(state)
        if state.plan is not None:
            raise RuntimeError(
                f"{who}: the draw for layer {state.names[state.layer or 0]!r} was not used; run the model once "
                "in training mode after each draw, through that layer (torch.compile may pass over its hook unless "
                "torch._dynamo.config.skip_nnmodule_hook_guards is set to False before, and the replicas of "
                "DataParallel mix nothing), or call disarm()."
            )
        cpu_generator(who, generator)
        if not is_rerun():
            state.forget()
        first = 0 if self.include_input else 1
        layer = int(torch.randint(first, len(state.names) + 1, (1,), device=CPU, generator=generator)) - 1
        if layer < 0:
            return super().forward(x, y, generator=generator, kind=kind)
        plan, target = self._plan_and_target(x, y, generator, kind)
        state.plan, state.layer = plan, layer
        state.start, state.inside = torch.autograd._get_sequence_nr(), is_rerun()
        return x, target

    def _check_layers(self, state: _State) -> None:
        """A layer that was put in another's place has no hook: what was there may still run, as a part of it."""
        model = None if state.model is None else state.model()
        for name, module in zip(state.names, state.modules, strict=True):
            if model is not None and not _leads_to(model, name, module()):
                raise RuntimeError(
                    f"{type(self).__name__}: layer {name!r} was replaced in the model; call attach(model) with the "
                    "model that has layers of these names."
                )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the hooks and the armed plan, which belong to this policy's model."""
        return {**self.__dict__, "_state": _State(type(self))}


def find_module(who: str, argument: str, model: nn.Module, name: str) -> nn.Module:
    """The submodule of this name; the message offers the nearest one."""
    modules = dict(model.named_modules())
    if name not in modules or not name:
        near = _check.did_you_mean(name, (known for known in modules if known))
        raise ValueError(
            f"{who}: {argument} names {name!r}, which the model does not have{near}; "
            "pass names from model.named_modules()."
        )
    return modules[name]


def _leads_to(model: nn.Module, name: str, module: nn.Module | None) -> bool:
    """Whether the submodule of this name is `module` yet, or a wrapper of it (compiled, distributed, checkpointed)."""
    first, *rest = name.split(".")
    try:
        found: nn.Module | None = model.get_submodule(first)  # names may be those of a part of the model
    except AttributeError:
        return False
    for part in rest:
        while found is not None and part not in found._modules:
            found = _wrapped(found)
        found = None if found is None else found._modules[part]
    while found is not None and found is not module:
        found = _wrapped(found)
    return found is not None


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a module holds if it holds nothing else."""
    children = list(module.children())
    return children[0] if len(children) == 1 and not module._parameters else None


@dataclass
class _Forward:
    """A forward that activation checkpointing may run again, in which a layer was mixed, or (plan None) was not."""

    start: int  # the nodes of its graph have this or a larger sequence number
    layer: int
    plan: MixPlan | None
    again: bool = False  # it was run again


class _State:
    """What the hooks of one policy share with it: the armed plan, and those that were used."""

    def __init__(self, policy: type[ManifoldMixup]) -> None:
        self.policy = policy
        self.attached = False
        self.names: tuple[str, ...] = ()
        self.hooks: list[weakref.finalize[..., Any]] = []
        self.plan: MixPlan | None = None
        self.layer: int | None = None
        self.start = 0  # the sequence number at the draw
        self.inside = False  # the armed plan was drawn inside of what is run again
        self.forwards: deque[_Forward] = deque(maxlen=64)  # of models that are not checkpointed, none is ever asked for
        self.model: weakref.ref[nn.Module] | None = None
        self.modules: list[weakref.ref[nn.Module]] = []  # those of the names

    def again(self, layer: int) -> MixPlan | None:
        """The plan of the forward that is run again, if it mixed this layer."""
        if not self.forwards:
            return None
        # The node that the backward pass is at belongs to that forward's graph.
        node: Any = torch._C._current_autograd_node()
        at = -1 if node is None else node._sequence_nr()
        forward = next((forward for forward in reversed(self.forwards) if forward.start <= at), self.forwards[-1])
        forward.again = True
        return forward.plan if forward.layer == layer else None

    def forget(self) -> None:
        """Forget what was run again before: its backward pass is over."""
        self.forwards = deque((forward for forward in self.forwards if not forward.again), self.forwards.maxlen)


class WeakHook:
    """A forward hook of one module. All references are weak: it keeps neither the policy nor the model alive.

    Args:
        state: weak reference to what the hook shares with its policy.
        module: where the hook is put.
        root: the model whose mode counts.
        index: which of the policy's modules it is.
    """

    def __init__(self, state: Any, module: nn.Module | None, root: nn.Module | None, index: int = 0) -> None:
        self.state, self.index = state, index
        self.module = _no_reference if module is None else weakref.ref(module)
        self.root = _no_reference if root is None else weakref.ref(root)

    def live(self, module: nn.Module) -> bool:
        """Whether there still is a policy, and the module is its own: a copy of the model carries copies of its hooks,
        whose own module is another one."""
        return self.state() is not None and self.root() is not None and module is self.module()

    def training(self) -> bool:
        """Whether the model is in training mode."""
        root = self.root()
        return root is not None and root.training

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """As a copied or unpickled model carries it: a hook that does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakHook, (_no_reference, None, None)


class _LayerHook(WeakHook):
    """Mixes the output of one layer, once a draw."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.live(module) or not self.training():
            return None
        state: _State = self.state()
        plan: MixPlan | None
        if is_rerun() and not state.inside:
            plan = state.again(self.index)
        elif state.plan is not None and state.layer == self.index:
            plan, state.plan, state.inside = state.plan, None, False
            state.forwards.append(_Forward(state.start, self.index, plan))
        else:
            plan, last = None, state.forwards[-1] if state.forwards else None
            if last is not None and last.plan is not None and last.layer == self.index:
                # A clean forward; the node of a checkpoint around the layer may be the last one before it.
                state.forwards.append(_Forward(torch.autograd._get_sequence_nr() - 1, self.index, None))
        if plan is None:
            return None
        if isinstance(output, Tensor):
            return state.policy.mix_layer(plan, output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            first = state.policy.mix_layer(plan, output[0])
            rest = [first, *output[1:]]
            return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
        raise TypeError(
            f"{state.policy.__name__}: a layer returned a {type(output).__name__}; name a layer that returns a tensor, "
            "or a tuple whose first entry is one."
        )


def taken_off_with(owner: object, hook: RemovableHandle) -> weakref.finalize[..., Any]:
    """Takes the hook off its module when it is called, or else when its owner is gone. It keeps neither alive."""
    finalizer = weakref.finalize(owner, hook.remove)
    finalizer.atexit = False
    return finalizer


def take_off(hooks: list[weakref.finalize[..., Any]]) -> None:
    """Take these hooks off their modules."""
    for hook in hooks:
        hook()
    hooks.clear()


def is_rerun() -> bool:
    """Whether this is inside the backward pass, where activation checkpointing runs forwards again."""
    return torch._C._current_graph_task_id() != -1


@functools.cache
def outside_graphs(hook: type[WeakHook]) -> type[WeakHook]:
    """The hook, run outside compiled graphs. Made when first needed: `torch.compiler.disable` loads the whole compiler,
    which an import of this package must not."""

    class Hook(hook):  # type: ignore[valid-type, misc]
        __call__ = torch.compiler.disable(hook.__call__)

    return Hook


def _no_reference() -> None:
    return None
