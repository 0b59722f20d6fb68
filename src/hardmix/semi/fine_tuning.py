"""Fine-tuning with few labels, alone or with mixed pairs of labelled and unlabelled samples."""

from __future__ import annotations

import torch
from torch import Generator

from hardmix.semi.algorithm import Forward, SemiBatch, SemiOutput, logits_of
from hardmix.semi.pairs import MixedPairs, check_pairs
from hardmix.semi.probabilities import confidence, confidence_mask, probabilities, threshold_value
from hardmix.semi.supervised import Supervised


class FineTuning(Supervised):
    """Cross entropy of the labelled samples, and of pairs mixed with unlabelled ones where there are any.

        L = CE(f(x), y) + the loss of `pairs`, where there are any
        q_u = softmax f(u),   pseudo-class argmax q_u,   trusted where max q_u >= tau

    Args:
        threshold: tau, in (0, 1]; for `pairs` alone. `MixedPairs(confident=False)` counts every pseudo-class.
        pairs: mixes labelled samples with weak views of unlabelled ones (see `MixedPairs`); Fine-Tuning + DM.

    Without `pairs` no unlabelled samples are taken: `views` is () then. With them the pseudo-classes come from a
    forward of the weak views by itself, without gradient. Where no pair is trusted L is the cross entropy. That the
    model is a pre-trained one is the caller's matter, as is a higher rate of its classifier.

    Reference: Liu et al. 2023, table 6 (arXiv:2203.10761), for pairs beside fine-tuning; it gives no threshold. Their
    release mixes pairs beside Self-Tuning alone and counts every pseudo-class; the default here is FixMatch's.

    >>> model, x, y, u = torch.nn.Linear(8, 4), torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> sorted(FineTuning()(model, SemiBatch(x, y)).parts)
    ['labelled']
    >>> sorted(FineTuning(pairs=MixedPairs())(model, SemiBatch(x, y, (u,))).parts)
    ['labelled', 'pair']
    """

    views: tuple[str, ...] = ("weak",)
    only_for_pairs = True

    def __init__(self, *, threshold: float = 0.95, pairs: MixedPairs | None = None) -> None:
        super().__init__()
        who = type(self).__name__
        self.threshold = threshold_value(who, "threshold", threshold)
        self.pairs = check_pairs(who, pairs)
        if self.pairs is None:
            self.views = ()

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"

    def set_progress(self, fraction: float) -> None:
        super().set_progress(fraction)
        if self.pairs is not None:
            self.pairs.set_progress(fraction)

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        output = super().step(model, batch, generator)
        if self.pairs is None:
            return output
        weak = batch.views[0]
        with torch.no_grad():
            highest, pseudo = confidence(probabilities(logits_of(model, weak)))
        trust = confidence_mask(highest, self.threshold)
        pair = self.pairs(model, batch.x, batch.y, weak, pseudo, trust, generator=generator)
        parts = output.parts | {"pair": pair.detach()}
        return SemiOutput(output.loss + pair, parts, pseudo, trust, output.logits)
