"""Mixed pairs of a labelled and an unlabelled sample: Decoupled Mixup's asymmetric form, and plain mixing beside it."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU
from hardmix.losses.decoupled import DecoupledMixupLoss
from hardmix.losses.soft_cross_entropy import SoftCrossEntropyLoss
from hardmix.mixing.draw import cpu_generator, move
from hardmix.mixing.masks import FMix, GridMix, SmoothMix
from hardmix.mixing.policy import Policy
from hardmix.mixing.resize import ResizeMix
from hardmix.mixing.static import CutMix, Mixup
from hardmix.mixing.target import MixedTarget
from hardmix.semi.algorithm import Forward
from hardmix.semi.probabilities import cosine_ramp

SHARES = ("small", "large", "any")
#: they don't look at pixels, so the two samples of a pair may change places after the mask is made
POLICIES = (Mixup, CutMix, SmoothMix, FMix, GridMix, ResizeMix)


class MixedPairs(nn.Module):
    """The loss of labelled samples mixed with unlabelled ones.

        x^ = m x_a + (1 - m) u_b,   target: lam y_a + (1 - lam) v_b,   lam = mean m, the labelled sample's share
        L  = r(progress) weight mean_i c_i l(f(x^_i), target_i),   c_i = how much v_b is trusted, 1 without `confident`

    v_b is the pseudo-class of u_b. With `DecoupledMixupLoss(eta, asymmetric=True)` l = MCE + eta R_a: only the labelled
    class is decoupled, the pseudo-class is the competitor that is taken out. lam is what the mask shows: the two
    samples of a pair change places where `share` asks for it, **after** the mask is made.

    Args:
        policy: how they are mixed; of Mixup, CutMix, SmoothMix, FMix, GridMix, ResizeMix. Give CutMix `inside=True`:
            boxes that are cut at the border are smaller than drawn.
        objective: `DecoupledMixupLoss` (paper: eta 1 in the release's configurations, asymmetric), or
            `SoftCrossEntropyLoss`; its reduction is set to "none". None takes DecoupledMixupLoss(eta=1, asymmetric).
        weight: of the pairs in the whole loss.
        ramp: share of the training over which the weight rises from 0 along half a cosine; 1, the release's, is all of
            it, 0 none.
        share: whether the labelled sample has the "small" share (lam <= 1/2, the paper's), the "large" one, or "any".
        confident: count only pairs whose pseudo-class is trusted, as much as it is.

    Each labelled sample is mixed once, with an unlabelled sample of the batch drawn without repetition where there are
    enough. Views are the weak ones. Same class: R_a = 0 and plain cross entropy. No trusted pair: 0. The paper leaves
    weight, ramp and view open; these are the release's (OpenMixup, whose labelled sample has the large share instead).
    Reference: Liu et al. 2023, section 4.2 (arXiv:2203.10761).
    """

    def __init__(
        self,
        policy: Policy | None = None,
        objective: nn.Module | None = None,
        *,
        weight: float = 1.0,
        ramp: float = 1.0,
        share: str = "small",
        confident: bool = True,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        policy = Mixup(alpha=1.0) if policy is None else policy
        if not isinstance(policy, POLICIES):
            known = ", ".join(kind.__name__ for kind in POLICIES)
            raise ValueError(
                f"{who}: policy is {type(policy).__name__}, which looks at pixels or layers before it mixes, and the "
                f"two samples of a pair may change places after that; pass one of {known}."
            )
        objective = DecoupledMixupLoss(eta=1.0, asymmetric=True) if objective is None else objective
        if not isinstance(objective, (DecoupledMixupLoss, SoftCrossEntropyLoss)):
            raise TypeError(
                f"{who}: objective is a {type(objective).__name__}; pass DecoupledMixupLoss or SoftCrossEntropyLoss."
            )
        objective.reduction = "none"
        self.policy, self.objective = policy, objective
        self.weight = _check.non_negative(who, "weight", weight)
        self.ramp = _check.between(who, "ramp", ramp, 0.0, 1.0)
        self.share = _check.choice(who, "share", share, SHARES)
        self.confident = _check.boolean(who, "confident", confident)
        self.progress = 0.0

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, ramp={self.ramp:g}, share={self.share!r}, confident={self.confident}"

    def set_progress(self, fraction: float) -> None:
        """Tell how much of the training is done, from 0 to 1."""
        self.progress = _check.between(type(self).__name__, "fraction", fraction, 0.0, 1.0)

    def mix(
        self, x: Tensor, y: Tensor, u: Tensor, pseudo: Tensor, *, generator: Generator | None = None
    ) -> tuple[Tensor, MixedTarget]:
        """(mixed samples, target) of pairs x[i], u[i]: target labels (y, pseudo), weights (lam, 1 - lam). (B, ...)"""
        n = len(x)
        pool = torch.cat([x, u])
        back = torch.arange(2 * n, device=CPU).roll(n)
        plan = self.policy.plan(pool, generator=generator, partner=back)
        # Each row's own mask is kept; whether it shows the labelled sample or the other one is decided by its share.
        own_is_labelled = torch.ones(n, dtype=torch.bool, device=x.device)
        if self.share != "any":
            own_is_labelled = (plan.lam[:n] <= 0.5) == (self.share == "small")
        where = own_is_labelled.view(-1, *[1] * (x.ndim - 1))
        arranged = torch.cat([torch.where(where, x, u), torch.where(where, u, x)])
        mixed = plan.blend(arranged)[:n]
        lam = torch.where(own_is_labelled, plan.lam[:n], 1.0 - plan.lam[:n])
        return mixed, MixedTarget(torch.stack([y, pseudo], 1), torch.stack([lam, 1.0 - lam], 1))

    def forward(
        self,
        model: Forward,
        x: Tensor,
        y: Tensor,
        u: Tensor,
        pseudo: Tensor,
        trust: Tensor,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """The pairs' loss, a scalar.

        Args:
            x, y: (B, ...) labelled samples and their (B,) classes.
            u: (U, ...) unlabelled samples; pseudo, trust: (U,) their pseudo-classes and how much these count.
        """
        cpu_generator(type(self).__name__, generator)
        rows = move(partners(len(x), len(u), generator), u.device)
        mixed, target = self.mix(x, y, u[rows], pseudo[rows], generator=generator)
        losses = self.objective(model(mixed), target)
        if self.confident:
            losses = losses * trust[rows]
        return losses.mean() * (self.weight * cosine_ramp(self.progress, self.ramp))


def partners(count: int, rows: int, generator: Generator | None) -> Tensor:
    """(count,) row numbers below `rows` in random order; none twice before all were once."""
    passes = -(-count // rows)
    return torch.cat([torch.randperm(rows, generator=generator, device=CPU) for _ in range(passes)])[:count]


def check_pairs(who: str, pairs: object) -> MixedPairs | None:
    """MixedPairs or None."""
    if pairs is not None and not isinstance(pairs, MixedPairs):
        raise TypeError(f"{who}: pairs is a {type(pairs).__name__}; pass MixedPairs(...) or None.")
    return pairs
