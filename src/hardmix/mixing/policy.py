"""What every mixing policy shares: its settings for pairing and lambda, and plan -> blend -> target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import is_autocast
from hardmix.mixing.draw import (
    PAIRINGS,
    PER,
    LabelPairing,
    Pairing,
    cpu_generator,
    draw_lam,
    draw_partner,
    given_partner,
    row_numbers,
)
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget


class Policy(nn.Module):
    """A mixing policy: `plan` draws, `forward` plans, blends the batch and makes the target.

    Args:
        alpha: parameter of Beta(alpha, alpha) for lambda, the share of the own sample.
        per: how often lambda (and the box, the mask) is drawn: "batch", "pair" (rows i and partner[i] share it; needs a
            pairing that is its own inverse) or "sample".
        pairing: "shift" (default), "permutation", "reversal" or "matching"; see `hardmix.mixing.draw.draw_partner`.
            None means "shift", or "matching" with per="pair". A `LabelKernel` draws partners by their labels.
    """

    #: smallest and largest number of axes of the batch, samples and channels included
    min_ndim, max_ndim = 3, 5
    #: whether a row of its plans may stand beside rows of other policies' plans
    by_rows = True

    def __init__(self, *, alpha: float = 1.0, per: str = "sample", pairing: str | LabelPairing | None = None) -> None:
        super().__init__()
        who = type(self).__name__
        self.alpha = _check.positive(who, "alpha", alpha)
        self.per = _check.choice(who, "per", per, PER)
        if pairing is None:
            pairing = "matching" if per == "pair" else "shift"
        if not isinstance(pairing, LabelPairing):
            pairing = _check.choice(who, "pairing", pairing, PAIRINGS)
        self.pairing = pairing
        if per == "pair" and pairing not in ("reversal", "matching"):
            raise ValueError(
                f'{who}: per="pair" with pairing={pairing!r} has no pairs; pass pairing="matching" or "reversal".'
            )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, per={self.per!r}, pairing={self.pairing!r}"

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> MixPlan:
        """Draw one plan for the batch `x`.

        Args:
            x: (N, ...) batch; only its shape and device are read unless the policy looks at pixels.
            y: labels, for policies that look at them.
            generator: CPU generator; None takes torch's global one. `torch.compile(fullgraph=True)` can't take a
                generator: leave it out there and seed the global one.
            partner: (N,) row numbers to mix with instead of a drawn pairing.
        """
        who = type(self).__name__
        x = _check.batch(who, "x", x, self.min_ndim, self.max_ndim)
        cpu_generator(who, generator)
        n = x.shape[0]
        if partner is None:
            if isinstance(self.pairing, LabelPairing):
                drawn = self.pairing.draw(who, y, n, generator)
            else:
                drawn = draw_partner(n, self.pairing, generator)
            return self._draw(x, y, drawn, generator)
        pairing = given_partner(who, partner, n)
        if self.per == "pair" and not torch.compiler.is_compiling():
            back = pairing.partner[pairing.partner]
            if not torch.equal(back, row_numbers(n)):
                raise ValueError(
                    f'{who}: partner has no pairs but per is "pair"; pass rows with partner[partner[i]] == i, '
                    'or use per="sample".'
                )
        return self._draw(x, y, pairing, generator)

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        """The policy itself: from a checked batch and its partners to a plan on the batch's device."""
        raise NotImplementedError

    def _draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        """`draw` without autocast, whose half types neither a mask nor a place in the image can be computed in."""
        for kind in ("cpu",) if x.is_cpu else ("cpu", x.device.type):
            if is_autocast(kind):
                with torch.autocast(kind, enabled=False):
                    return self._draw(x, y, pairing, generator)
        return self.draw(x, y, pairing, generator)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x_mixed, target) for the batch `x` (N, ...) and its labels `y`; `MixPlan.target` tells which `kind` they may
        be of."""
        plan, target = self._plan_and_target(x, y, generator, kind)
        return plan.blend(x), target

    def attach(self, model: nn.Module) -> None:
        """Look at `model` from now on. Policies that look at none do nothing."""

    def disarm(self) -> None:
        """Take back a draw that was not trained with, for a step that is skipped on purpose. Policies that keep nothing
        of a batch do nothing."""

    def set_progress(self, fraction: float) -> None:
        """Tell the policy how much of the training is done, from 0 to 1. Only a schedule listens (see `Scheduled`)."""

    def relabel(self, logits: Tensor, target: MixedTarget) -> MixedTarget:
        """The target that the mixed batch is trained with, once the model has seen it.

        Called after the forward of the model on the mixed batch and before the loss, with its `logits` and the target
        that `forward` gave. Policies that weigh labels by attention or by what is predicted change the shares here; all
        others return the target as it is.
        """
        return target

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """What a policy adds to the loss of the batch that it mixed last: learnt policies their own, others None.

        Called after `relabel`; `criterion` is the objective, `criterion(logits, target)`.
        """
        return None

    def after_step(self) -> None:
        """Called after each step of the optimizer; policies that follow the model's weights do so here."""

    def _plan_and_target(
        self, x: Tensor, y: Tensor, generator: Generator | None, kind: str
    ) -> tuple[MixPlan, MixedTarget]:
        who = type(self).__name__
        x = _check.batch(who, "x", x, self.min_ndim, self.max_ndim)
        y = _check.tensor(who, "y", y)
        _check.same_length(who, "y", y, "x", x.shape[0])
        _check.same_device(who, "y", y, "x", x.device)
        _check.finite(who, "x", x)
        plan = self.plan(x, y, generator=generator)
        return plan, plan.target(y, kind=kind)

    def _lam(self, pairing: Pairing, generator: Generator | None) -> Tensor:
        return draw_lam(self.alpha, pairing, self.per, generator)

    def _count(self, rows: int) -> int:
        """How many draws a batch needs: one per batch, else one per row (pairs then take their lower row's)."""
        return 1 if self.per == "batch" else rows

    def _rows(self, pairing: Pairing, values: Tensor) -> Tensor:
        """Share draws (N or 1, ...) as `per` says: all take row 0's, or each pair its lower row's. (N, ...)"""
        count = pairing.partner.shape[0]
        if self.per == "batch":
            return values[:1].expand(count, *values.shape[1:])
        if self.per == "pair":
            return values[torch.minimum(row_numbers(count), pairing.partner)]
        return values
