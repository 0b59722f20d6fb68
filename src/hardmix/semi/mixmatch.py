"""MixMatch: one sharpened guess for all views of a sample, and mixup of everything with everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hardmix import _check
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.static import Mixup
from hardmix.semi.algorithm import (
    Forward,
    SemiAlgorithm,
    SemiBatch,
    SemiOutput,
    check_multiple,
    class_rows,
    frozen_statistics,
    interleaved,
    logits_of,
)
from hardmix.semi.pairs import MixedPairs, check_pairs
from hardmix.semi.probabilities import confidence, confidence_mask, linear_ramp, probabilities, sharpen, threshold_value


class MixMatch(SemiAlgorithm):
    """MixMatch, alone or with mixed pairs of labelled and unlabelled samples.

        q_u = sharpen(mean_k softmax f(u_k), T),   the guess for all K weak views u_k of u
        W   = the labelled samples and all views, with their targets, in random order
        x'  = l x + (1 - l) w,   p' likewise,   l = max(l', 1 - l'),   l' ~ Beta(alpha, alpha)
        L   = mean CE(f(x'), p') over the labelled x + r(progress) w mean_c (softmax f(u')_c - q'_c)^2 over all views u
            + the loss of `pairs`, where there are any

    Args:
        guesses: K, the number of weak views of each unlabelled sample.
        temperature: T.
        alpha: parameter of the mixup's Beta.
        weight: w, lambda_U in the paper, which takes 75 for CIFAR-10 and 250 for SVHN.
        ramp: share of the training over which the weight rises along a line; 0 none.
        pairs: further mixes labelled samples with the first weak views (see `MixedPairs`); MixMatch + DM.
        threshold: how confident a guess is, before it is sharpened, for `pairs` to count it; in (0, 1]. MixMatch itself
            counts every guess.

    l is drawn for each sample, as in algorithm 1 and the release, so each x' is closer to x. Guesses have no gradient;
    their forwards use the batch's own statistics of batch norm and leave the running ones as they are. Those follow the
    first of the interleaved forwards alone. The number of unlabelled samples is a multiple of that of the labelled.
    `SemiOutput.logits` are those of the mixed labelled samples.

    Reference: Berthelot et al. 2019, algorithm 1, eq. 2-12 (arXiv:1905.02249): K 2, T 0.5, alpha 0.75, w 75, the weight
    rises over 16,000 steps, which is 1/64 of the release's 2^20. Pairs beside it are ours: the paper of Decoupled Mixup
    does not say how it goes together with MixMatch's own mixup.

    >>> algorithm = MixMatch()
    >>> model = torch.nn.Linear(8, 4)
    >>> x, y, u = torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> output = algorithm(model, SemiBatch(x, y, (u, u + 0.1 * torch.rand(6, 8))))
    >>> output.pseudo.shape
    torch.Size([6])
    """

    views: tuple[str, ...] = ("weak", "weak")

    def __init__(
        self,
        *,
        guesses: int = 2,
        temperature: float = 0.5,
        alpha: float = 0.75,
        weight: float = 75.0,
        ramp: float = 1 / 64,
        pairs: MixedPairs | None = None,
        threshold: float = 0.95,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.views = ("weak",) * _check.integer(who, "guesses", guesses, 1)
        self.temperature = _check.positive(who, "temperature", temperature)
        self.mixup = Mixup(_check.positive(who, "alpha", alpha), pairing="permutation")
        self.weight = _check.non_negative(who, "weight", weight)
        self.ramp = _check.between(who, "ramp", ramp, 0.0, 1.0)
        self.pairs = check_pairs(who, pairs)
        self.threshold = threshold_value(who, "threshold", threshold)

    def extra_repr(self) -> str:
        return (
            f"guesses={len(self.views)}, temperature={self.temperature:g}, weight={self.weight:g}, ramp={self.ramp:g}"
        )

    def set_progress(self, fraction: float) -> None:
        super().set_progress(fraction)
        if self.pairs is not None:
            self.pairs.set_progress(fraction)

    def guess(self, model: Forward, views: tuple[Tensor, ...]) -> Tensor:
        """(U, C) mean prediction of the views of each sample, without gradient."""
        with torch.no_grad(), frozen_statistics(model):
            return torch.stack([probabilities(logits_of(model, view)) for view in views]).mean(0)

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        check_multiple(type(self).__name__, batch)
        guess = self.guess(model, batch.views)
        sharp = sharpen(guess, self.temperature)
        targets = [class_rows(type(self).__name__, batch.y, guess), *[sharp] * len(batch.views)]
        mixed, mixed_targets = mix_all(self.mixup, [batch.x, *batch.views], targets, generator)
        logits, *others = interleaved(model, mixed)
        labelled = F.cross_entropy(logits, mixed_targets[0])
        unlabelled = (torch.cat(others).softmax(1) - torch.cat(mixed_targets[1:])).square().mean()
        loss = labelled + self.weight * linear_ramp(self.progress, self.ramp) * unlabelled
        parts = {"labelled": labelled.detach(), "unlabelled": unlabelled.detach()}
        highest, pseudo = confidence(guess)
        if self.pairs is not None:
            trust = confidence_mask(highest, self.threshold)
            with frozen_statistics(model):
                pair = self.pairs(model, batch.x, batch.y, batch.views[0], pseudo, trust, generator=generator)
            loss = loss + pair
            parts["pair"] = pair.detach()
        return SemiOutput(loss, parts, pseudo, torch.ones_like(highest), logits.detach())


def mix_all(
    mixup: Mixup, samples: list[Tensor], targets: list[Tensor], generator: Generator | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Mixup of several batches with all of them in random order, so that each row keeps the larger share.

    Args:
        samples: batches (N_k, ...).
        targets: (N_k, C) rows of each.
    Returns:
        The mixed samples and targets, in batches of the same sizes.
    """
    together = torch.cat(samples)
    plan = mixup.plan(together, generator=generator)
    plan = MixPlan(plan.partner, torch.maximum(plan.lam, 1.0 - plan.lam))
    sizes = [len(part) for part in samples]
    return list(plan.blend(together).split(sizes)), list(plan.blend(torch.cat(targets)).split(sizes))
