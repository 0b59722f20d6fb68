"""Policies made of policies: RandomChoice draws one of several, Scheduled mixes during a part of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU
from hardmix.mixing.draw import Pairing, cpu_generator, move
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy
from hardmix.mixing.target import MixedTarget


class RandomChoice(Policy):
    """Draw one of several policies, for each batch or for each sample.

    Args:
        policies: the policies; None, or the string "none", stands for a batch (or a sample) that is left as it is.
        p: their probabilities, scaled to sum to one; None: all alike.
        per: "batch", one policy for the batch, which then pairs the rows its own way; or "sample", one for each row,
            on one pairing that all share. Per sample, each policy draws a plan for the whole batch, so it costs the
            sum of them, and a policy that mixes hidden layers can't take part.
        pairing: who is mixed with whom with per="sample". None means "matching" where a policy has per="pair", else
        "shift".

    Inside torch.compile a drawn number can't decide which code runs, so there each policy draws and `per="batch"`
    takes all rows from one of them.

    >>> from hardmix.mixing import CutMix, Mixup
    >>> mix = RandomChoice([CutMix(alpha=1.0), Mixup(alpha=0.8), None], p=[0.5, 0.3, 0.2])
    """

    def __init__(
        self,
        policies: Sequence[Policy | str | None],
        p: Sequence[float] | None = None,
        *,
        per: str = "batch",
        pairing: str | None = None,
    ) -> None:
        who = "RandomChoice"
        _check.choice(who, "per", per, ("batch", "sample"))
        if not isinstance(policies, (Sequence, nn.ModuleList)) or isinstance(policies, str):
            raise TypeError(f"{who}: policies is a {type(policies).__name__}; pass a list of mixing policies.")
        members = [_member(policy) for policy in policies]
        if not members:
            raise ValueError(f"{who}: policies is empty; pass at least one policy.")
        in_pairs = any(member.per == "pair" for member in members)
        super().__init__(per=per, pairing="matching" if pairing is None and in_pairs else pairing)
        if per == "sample":
            for member in members:
                if (inside := more_than_plans(member)) is not None:
                    raise ValueError(
                        f"{who}: policies holds {type(inside).__name__}, which does more than a plan says; use "
                        'per="batch".'
                    )
            if in_pairs and self.pairing not in ("reversal", "matching"):
                raise ValueError(
                    f'{who}: a policy has per="pair" but pairing is {self.pairing!r}; pass "matching" or "reversal".'
                )
            self.min_ndim = max(member.min_ndim for member in members)
            self.max_ndim = min(member.max_ndim for member in members)
        else:
            self.min_ndim = min(member.min_ndim for member in members)
        self.policies = nn.ModuleList(members)
        self.by_rows = all(member.by_rows for member in members)
        self.p = _probabilities(p, len(members))
        self._last: tuple[Policy, ...] = ()

    def extra_repr(self) -> str:
        return f"p={[round(value, 4) for value in self.p]}, per={self.per!r}"

    def attach(self, model: nn.Module) -> None:
        """Let all of the policies look at `model`."""
        for policy in self._members():
            policy.attach(model)

    def disarm(self) -> None:
        """Take back the last draw, whichever policy's it was."""
        self._last = ()
        for policy in self._members():
            policy.disarm()

    def set_progress(self, fraction: float) -> None:
        for policy in self._members():
            policy.set_progress(fraction)

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> MixPlan:
        """Draw a policy and its plan; see `Policy.plan`."""
        if self.per == "sample" or torch.compiler.is_compiling():
            return super().plan(x, y, generator=generator, partner=partner)
        return self._one(generator).plan(x, y, generator=generator, partner=partner)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        if torch.compiler.is_compiling() and more_than_plans(self) is not None:
            raise RuntimeError(
                "RandomChoice: policies holds one that does more than a plan says, which a compiled choice can't pass "
                "on; call the policy outside of torch.compile."
            )
        if self.per == "sample" or torch.compiler.is_compiling():
            return super().forward(x, y, generator=generator, kind=kind)
        chosen = self._one(generator)
        self._last = (chosen,)
        return chosen(x, y, generator=generator, kind=kind)

    def relabel(self, logits: Tensor, target: MixedTarget) -> MixedTarget:
        """As the policy has it that mixed the last batch."""
        for policy in self._last:
            target = policy.relabel(logits, target)
        return target

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """That of the policy that mixed the last batch."""
        return self._last[0].loss(criterion) if self._last else None

    def after_step(self) -> None:
        for policy in self._members():
            policy.after_step()

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        rows = x.shape[0]
        choice = self._draw_choice(self._count(rows), generator).expand(rows)
        plans = [policy.draw(x, y, pairing, generator) for policy in self._members()]
        return combine(plans, move(choice, x.device), x)

    def _members(self) -> list[Policy]:
        return [policy for policy in self.policies if isinstance(policy, Policy)]

    def _one(self, generator: Generator | None) -> Policy:
        cpu_generator("RandomChoice", generator)
        return self._members()[int(self._draw_choice(1, generator))]

    def _draw_choice(self, count: int, generator: Generator | None) -> Tensor:
        p = torch.tensor(self.p, dtype=torch.float32, device=CPU)
        return torch.multinomial(p, count, replacement=True, generator=generator)


class Scheduled(Policy):
    """Mix only during a part of the training.

        active  <=>  start <= progress < stop,   progress as last told by `set_progress` (0 before that)

    Outside that part a batch comes back as it is (a copy), each row its own partner with lam = 1. A common use is to
    switch mixing off for the last part of the training: `Scheduled(Mixup(), stop=0.9)`.

    Args:
        policy: what mixes.
        start, stop: shares of the training, 0 <= start < stop <= 1.
    """

    def __init__(self, policy: Policy, *, start: float = 0.0, stop: float = 1.0) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"Scheduled: policy is a {type(policy).__name__}; pass a mixing policy.")
        super().__init__(per=policy.per, pairing=policy.pairing)
        self.start = _check.between("Scheduled", "start", start, 0.0, 1.0)
        self.stop = _check.between("Scheduled", "stop", stop, 0.0, 1.0)
        if self.start >= self.stop:
            raise ValueError(f"Scheduled: start is {start!r} and stop is {stop!r}; pass start < stop.")
        self.min_ndim, self.max_ndim = policy.min_ndim, policy.max_ndim
        self.by_rows = policy.by_rows
        self.policy = policy
        self._mixed = False
        self.set_progress(0.0)

    def extra_repr(self) -> str:
        return f"start={self.start:g}, stop={self.stop:g}"

    def attach(self, model: nn.Module) -> None:
        self.policy.attach(model)

    def disarm(self) -> None:
        self._mixed = False
        self.policy.disarm()

    def set_progress(self, fraction: float) -> None:
        fraction = _check.between("Scheduled", "fraction", fraction, 0.0, 1.0)
        # A plain flag, so that a compiled step is compiled twice at most and not for each value of the progress.
        self.active = self.start <= fraction < self.stop
        self.policy.set_progress(fraction)

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> MixPlan:
        """The policy's plan, or the one that mixes nothing; see `Policy.plan`."""
        if self.active:
            return self.policy.plan(x, y, generator=generator, partner=partner)
        return super().plan(x, y, generator=generator, partner=partner)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        self._mixed = self.active
        if self.active:
            return self.policy.forward(x, y, generator=generator, kind=kind)
        return super().forward(x, y, generator=generator, kind=kind)

    def relabel(self, logits: Tensor, target: MixedTarget) -> MixedTarget:
        """As the policy has it, if it mixed the last batch."""
        return self.policy.relabel(logits, target) if self._mixed else target

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """That of the policy, if it mixed the last batch."""
        return self.policy.loss(criterion) if self._mixed else None

    def after_step(self) -> None:
        self.policy.after_step()

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        if self.active:
            return self.policy.draw(x, y, pairing, generator)
        return MixPlan.identity(x.shape[0], x.device)


class NoMixing(Policy):
    """Leaves the batch as it is."""

    min_ndim = 2

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        return MixPlan.identity(x.shape[0], x.device)


def more_than_plans(policy: Policy) -> Policy | None:
    """The policy, or one inside it, that does more than its plans say: has a forward, labels or a loss of its own."""
    known = (Policy, RandomChoice, Scheduled)
    own = ("forward", "relabel", "loss")
    for part in reversed([module for module in policy.modules() if isinstance(module, Policy)]):
        if not part.by_rows or any(
            all(getattr(type(part), name) is not getattr(cls, name) for cls in known) for name in own
        ):
            return part
    return None


def combine(plans: list[MixPlan], choice: Tensor, x: Tensor) -> MixPlan:
    """One plan whose row i is row i of plans[choice[i]].

    Args:
        plans: plans for the batch `x`, on its device.
        choice: (N,) long on that device.
    """

    def pick(values: list[Tensor]) -> Tensor:
        out = values[0]
        for k, value in enumerate(values[1:], 1):
            out = torch.where((choice == k).view(-1, *[1] * (value.ndim - 1)), value, out)
        return out

    rows, size = x.shape[0], tuple(x.shape[2:])
    ones = [1] * len(size)
    masks = [plan.mask for plan in plans]
    mask = fit = own = other = None
    if any(value is not None for value in masks):
        shares = zip(masks, plans, strict=True)
        mask = pick([p.lam.view(-1, 1, *ones).expand(rows, 1, *size) if m is None else m for m, p in shares])
    if any(plan.fit is not None for plan in plans):
        # A box as large as the image leaves the partner as it is.
        whole = torch.tensor([(0, length) for length in size], device=CPU).expand(rows, -1, -1)
        whole = move(whole, x.device)
        fit = pick([whole if plan.fit is None else plan.fit for plan in plans])
    if any(plan.own is not None for plan in plans):
        own = pick([x if plan.own is None else plan.own for plan in plans])
    partner = pick([plan.partner for plan in plans])
    if any(plan.fit is None and plan.other is not None for plan in plans):
        other = pick([x[plan.partner] if plan.other is None else plan.other for plan in plans])
        fit = None
    # Not the mean of the mask: devices sum it in different orders.
    lam = pick([plan.lam for plan in plans])
    shift = plans[0].shift if all(plan.shift == plans[0].shift for plan in plans) else None
    source = None if fit is None else x
    return MixPlan(partner, lam, mask, size=size, own=own, other=other, shift=shift, fit=fit, source=source)


def _member(policy: Policy | str | None) -> Policy:
    if policy is None or policy == "none":
        return NoMixing()
    if not isinstance(policy, Policy):
        raise TypeError(
            f"RandomChoice: policies holds a {type(policy).__name__}; pass mixing policies, or None for no mixing."
        )
    return policy


def _probabilities(p: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if p is None:
        return (1.0 / count,) * count
    if not isinstance(p, Sequence) or isinstance(p, str):
        raise TypeError(f"RandomChoice: p is a {type(p).__name__}; pass a list of numbers, one for each policy.")
    values = [_check.between("RandomChoice", "p", value, 0.0, math.inf) for value in p]
    total = sum(values)
    if len(values) != count or not 0.0 < total < math.inf:
        raise ValueError(f"RandomChoice: p is {list(p)!r} for {count} policies; pass one probability for each.")
    return tuple(value / total for value in values)
