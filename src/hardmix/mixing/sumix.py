"""SUMix: the labels of a mixed batch weighed by what the model sees in it, and how sure it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import wide
from hardmix.mixing.choice import more_than_plans
from hardmix.mixing.draw import Pairing
from hardmix.mixing.gradients import check_model, logits_of, model_input, undisturbed, without_ddp
from hardmix.mixing.hidden import WeakHook, find_module, is_rerun, outside_graphs, take_off, taken_off_with
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy
from hardmix.mixing.target import MixedTarget


class SUMix(Policy):
    """SUMix: another policy mixes; the shares of its labels follow how far predictions moved from the clean ones.

        w_a ~ lam exp(-s d_a[y_a]),   w_b ~ (1 - lam) exp(-s d_b[y_b]),   w_a + w_b = 1
        d_a = unit(softmax(p_mix - p_a')),   d_b = unit(softmax(p_mix - p_b'))
        loss = weight (lam CE(v_a, y_a) + (1 - lam) CE(v_b, y_b)),   v_a = exp(-(u_a + u_mix + s d_a)) taken as logits

    p are softmax outputs without a gradient, p_a' that of the clean row with the partner's class y_b set to 0, p_b'
    that of the clean partner with y_a set to 0; unit(x) = x / |x|. u = unit(softmax(A z)) is the uncertainty, z what
    goes into the model's classifier and A a linear layer of its size, which is all that the policy learns: give its
    parameters to the optimizer.

    After `x, target = mix(x, y)` run the model on `x` once in training mode, then `target = mix.relabel(logits,
    target)`, then add `mix.loss(criterion)`.

    Args:
        model: what is trained, (N, ...) -> logits (N, C). It gets the clean batch in a forward of its own, without a
            gradient; see `hardmix.mixing.gradients.undisturbed`. It is not kept in the policy's state_dict. Of a
            DistributedDataParallel the module inside is asked.
        policy: what mixes. It may be any that only plans and blends, RandomChoice and Scheduled included.
        weight: of the uncertainty term. 0: no term and no parameters.
        scale: s. 0 leaves the shares as they are; below 0 they go the other way, see below.
        classifier: name of the nn.Linear that makes the logits; "" is the last one of the model.
    Labels: (N,) class ids. Same class: the shares change but not their sum. N = 1: as its policy does. lam of 0 or 1
    stays. NaN in a prediction makes the shares of the row NaN, and the loss with them.
    Cost: one forward of the clean batch.
    Reference: Qin et al. 2024 (arXiv:2407.07805), as its authors' code has it; we could not compare it with the text of
    the paper. That code multiplies d by the number of rows (`scale` can do the same), so that shares hang on the size
    of the batch and the uncertainty term moves next to nothing; runs the clean forward with a gradient and moves
    running statistics with it; multiplies the mean losses by the mean shares; and has 0.5 as the term's weight in its
    settings, 0.1 in its constructor. There as here a class that **vanishes** from the mixed image, p_mix[y] < p_a[y],
    has a small d and so a larger share, though the method is meant to do the opposite; a `scale` below 0 does that.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, *, weight: float = 0.1, scale: float = 1.0, classifier: str = ""
    ) -> None:
        who = "SUMix"
        if not isinstance(policy, Policy):
            raise TypeError(f"{who}: policy is a {type(policy).__name__}; pass a mixing policy.")
        if (inside := more_than_plans(policy)) is not None:
            raise ValueError(
                f"{who}: policy holds {type(inside).__name__}, which does more than to plan and blend; pass one like "
                "CutMix."
            )
        super().__init__(per=policy.per, pairing=policy.pairing)
        self.min_ndim, self.max_ndim = policy.min_ndim, policy.max_ndim
        self.policy = policy
        self.weight = _check.non_negative(who, "weight", weight)
        self.scale = _check.number(who, "scale", scale)
        if not isinstance(classifier, str):
            raise TypeError(f"{who}: classifier is {classifier!r}; pass the name of a submodule.")
        self.classifier = classifier
        self._batch: _Batch | None = None
        self._state = _State()
        self._put_hook(model)
        self.uncertainty: nn.Linear | None = None
        if self.weight:
            layer = self._classifier(model)
            self.uncertainty = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device)
            nn.init.normal_(self.uncertainty.weight, std=0.01)
            nn.init.zeros_(self.uncertainty.bias)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, scale={self.scale:g}, classifier={self.classifier!r}"

    def attach(self, model: nn.Module) -> None:
        """Look at `model` from now on, and no longer at the one before; so does the policy that mixes."""
        self._put_hook(model)
        self.policy.attach(model)

    def _put_hook(self, model: nn.Module) -> None:
        check_model("SUMix", model)
        layer = self._classifier(model) if self.weight else None
        model = without_ddp(model)
        self.detach()
        self._state.model = (model,)
        if layer is not None:
            hook = outside_graphs(_FeatureHook)(weakref.ref(self._state), layer, model)
            self._state.hooks.append(taken_off_with(self._state, layer.register_forward_hook(hook)))

    def detach(self) -> None:
        """Take the hook off the model."""
        take_off(self._state.hooks)
        self._state = _State()
        self._batch = None

    def disarm(self) -> None:
        self._batch = None
        self._state.armed, self._state.seen = False, None
        self.policy.disarm()

    def set_progress(self, fraction: float) -> None:
        self.policy.set_progress(fraction)

    def after_step(self) -> None:
        self.policy.after_step()

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> MixPlan:
        """The policy's plan; see `Policy.plan`."""
        return self.policy.plan(x, y, generator=generator, partner=partner)

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        return self.policy.draw(x, y, pairing, generator)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x_mixed, target) of the policy, once the model has been asked what it sees in the clean batch."""
        who = "SUMix"
        if not self._state.model:
            raise RuntimeError(f"{who}: this policy is a copy without its model; call attach(model) first.")
        plan, target = self._plan_and_target(x, y, generator, kind)
        if target.labels.ndim != 2 or target.labels.is_floating_point():
            raise ValueError(
                f"{who}: y has shape {tuple(y.shape)} and dtype {y.dtype}; pass one class id per sample, (N,)."
            )
        probs, features = self._look(who, self._state.model[0], x)
        _check.classes_in_range(who, "y", y, probs.shape[1])
        self._batch = _Batch(plan.partner, probs, features)
        self._state.armed, self._state.seen = bool(self.weight), None
        return plan.blend(x), target

    def relabel(self, logits: Tensor, target: MixedTarget) -> MixedTarget:
        """`target` with the shares that follow from the predictions `logits` (N, C) for the mixed batch."""
        who = "SUMix"
        batch = self._batch
        if batch is None:
            raise RuntimeError(f"{who}: relabel has no batch to relabel; call the policy on a batch first.")
        logits = _check.tensor(who, "logits", logits)
        if logits.shape != batch.probs.shape or target.weights.shape != (len(batch.partner), 2):
            raise ValueError(
                f"{who}: logits have shape {tuple(logits.shape)} and the target {tuple(target.weights.shape)}, but the "
                f"clean batch had logits of shape {tuple(batch.probs.shape)}; pass those of the batch that was mixed."
            )
        target = self.policy.relabel(logits, target)
        with torch.no_grad():
            probs = logits.detach().to(batch.probs.dtype).softmax(1)
            own, other = target.labels.unbind(1)
            away = self.scale * torch.stack(
                [_moved(probs, batch.probs, other), _moved(probs, batch.probs[batch.partner], own)], 1
            )  # (N, 2, C)
            shares = target.weights.to(away.dtype).log() - away.gather(2, target.labels[..., None])[..., 0]
        self._batch = batch._replace(away=away, target=target)
        return target._replace(weights=shares.softmax(1).to(target.weights.dtype))

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """The uncertainty term of the batch that was relabelled last, once; a plain cross entropy whatever `criterion`
        is. None with a weight of 0."""
        rest = self.policy.loss(criterion)
        if self.uncertainty is None:
            return rest
        batch, seen = self._batch, self._state.seen
        if batch is None or batch.away is None or batch.target is None or seen is None or batch.features is None:
            raise RuntimeError(
                "SUMix: loss has no batch; call the policy, then the model in training mode, relabel, and loss, once "
                "each."
            )
        if torch.is_grad_enabled() and not self._state.recorded:
            raise RuntimeError(
                "SUMix: the model ran on the mixed batch without gradients, which the term needs there; pass "
                "use_reentrant=False to activation checkpointing, or weight=0."
            )
        self._batch = self._state.seen = None
        with torch.autocast(seen.device.type, enabled=False):  # its half types have too few digits for the exponents
            clean, mixed = self._uncertainty(batch.features), self._uncertainty(seen)
            beside = torch.stack([clean, clean[batch.partner]], 1) + mixed[:, None]  # (N, 2, C)
            logits = torch.exp(-(beside + batch.away))
            each = F.cross_entropy(logits.flatten(0, 1), batch.target.labels.flatten(), reduction="none")
            term = self.weight * (each.view(-1, 2) * batch.target.weights).sum(1).mean()
        return term if rest is None else term + rest

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the model and the batch."""
        return {**self.__dict__, "_state": _State(), "_batch": None}

    def _look(self, who: str, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Softmax outputs (N, C) and the classifier's input (N, D) for the clean batch."""
        state, x = self._state, model_input(who, model, x)
        state.reading, state.seen = True, None
        try:
            with undisturbed(model, batch_statistics=x.shape[0] > 1), torch.no_grad():
                logits = logits_of(who, model(x))
        finally:
            state.reading = False
            # Older versions of torch train with the weights that autocast has cast here, without a gradient.
            torch.clear_autocast_cache()
        if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
            raise ValueError(
                f"{who}: the model returned {tuple(logits.shape)} for {x.shape[0]} samples; it has to return logits "
                "(N, C)."
            )
        features, state.seen = state.seen, None
        if self.uncertainty is not None and (
            features is None or features.ndim != 2 or logits.shape[1] != self.uncertainty.out_features
        ):
            went_in = None if features is None else tuple(features.shape)
            raise ValueError(
                f"{who}: the classifier got {went_in} and the logits have shape {tuple(logits.shape)}; pass as "
                "classifier the name of the layer that makes (N, C) logits of (N, D) features."
            )
        return logits.to(wide(logits.dtype)).softmax(1), features

    def _classifier(self, model: nn.Module) -> nn.Linear:
        who = "SUMix"
        names = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
        if not self.classifier and not names:
            raise ValueError(f"{who}: the model has no nn.Linear inside; pass a model whose classifier is one.")
        name = self.classifier or names[-1]
        layer = find_module(who, "classifier", model, name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{who}: classifier names {name!r}, a {type(layer).__name__}; pass that of an nn.Linear.")
        return layer

    def _uncertainty(self, features: Tensor) -> Tensor:
        """u (N, C) of unit length."""
        assert self.uncertainty is not None
        outputs = self.uncertainty(features.to(self.uncertainty.weight.dtype))
        return F.normalize(outputs.softmax(1), dim=1)


class _Batch(NamedTuple):
    """What is known of the batch that was mixed last."""

    partner: Tensor
    probs: Tensor  # (N, C) of the clean rows
    features: Tensor | None  # (N, D) of the clean rows
    away: Tensor | None = None  # (N, 2, C) scaled distances from the own and from the partner's prediction
    target: MixedTarget | None = None  # before its shares were changed


class _State:
    """What the hook shares with its policy."""

    def __init__(self) -> None:
        self.model: tuple[nn.Module, ...] = ()
        self.hooks: list[weakref.finalize[..., Any]] = []
        self.reading = False  # the clean forward is under way
        self.armed = False  # the next training forward is that of the mixed batch
        self.seen: Tensor | None = None  # what went into the classifier
        self.recorded = False  # in a forward with gradients


class _FeatureHook(WeakHook):
    """Keeps what goes into the classifier: in the clean forward, and once in the training forward after it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.live(module) or not args or is_rerun():
            return
        state: _State = self.state()
        if state.reading or (state.armed and self.training()):
            state.armed = state.armed and state.reading
            state.seen, state.recorded = args[0], torch.is_grad_enabled()


def _moved(probs: Tensor, clean: Tensor, other: Tensor) -> Tensor:
    """d (N, C): how far the prediction for a mixed row went from that for a clean one, without the class `other` (N,)
    that was mixed in."""
    return F.normalize((probs - clean.scatter(1, other[:, None], 0.0)).softmax(1), dim=1)
