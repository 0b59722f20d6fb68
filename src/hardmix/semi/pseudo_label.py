"""Pseudo-Label: a confident prediction is the label of the sample that it was made of."""

from __future__ import annotations

from torch import Tensor

from hardmix import _check
from hardmix.semi.algorithm import Forward, SemiBatch, frozen_statistics, logits_of, together
from hardmix.semi.fixmatch import FixMatch
from hardmix.semi.pairs import MixedPairs
from hardmix.semi.probabilities import linear_ramp


class PseudoLabel(FixMatch):
    """Pseudo-Label, alone or with mixed pairs of labelled and unlabelled samples.

        L = CE(f(x), y) + r(progress) w mean_u [max q_u >= tau] CE(f(u), argmax q_u),   q_u = softmax f(u)
            + the loss of `pairs`, where there are any

    Args:
        threshold: tau, in (0, 1].
        weight: w.
        ramp: share of the training over which the weight rises from 0 along a line; 0 none.
        pairs: as in `FixMatch`.
        joint: one forward of labelled and unlabelled samples, so that batch norm sees them as one batch. False runs
            them one after the other, and batch norm's running statistics follow the labelled ones alone, as in the
            benchmarks of semi-supervised learning.

    One weak view: the pseudo-class, without a gradient, is the label of the very prediction that it comes from. The
    mean is over all unlabelled samples, those below the threshold included. Reference: Lee 2013, "Pseudo-Label", eq.
    15-16 (ICML Workshop on Challenges in Representation Learning), which has no threshold, w 3, and a weight that rises
    from update 100 to 600. Threshold 0.95, w 1 and a rise over 0.4 of the training are the benchmark's of Oliver et al.
    2018 (arXiv:1804.09170), as MixMatch's release re-implements it.

    >>> import torch
    >>> algorithm = PseudoLabel()
    >>> model = torch.nn.Linear(8, 4)
    >>> output = algorithm(model, SemiBatch(torch.rand(2, 8), torch.tensor([0, 1]), (torch.rand(6, 8),)))
    >>> output.pseudo.shape
    torch.Size([6])
    """

    views = ("weak",)

    def __init__(
        self,
        *,
        threshold: float = 0.95,
        weight: float = 1.0,
        ramp: float = 0.4,
        pairs: MixedPairs | None = None,
        joint: bool = True,
    ) -> None:
        super().__init__(threshold=threshold, weight=weight, pairs=pairs, joint=joint)
        self.ramp = _check.between(type(self).__name__, "ramp", ramp, 0.0, 1.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ramp={self.ramp:g}"

    def unlabelled_weight(self) -> float:
        return self.weight * linear_ramp(self.progress, self.ramp)

    def forwards(self, model: Forward, batch: SemiBatch) -> tuple[Tensor, Tensor, Tensor]:
        (weak,) = batch.views
        if self.joint:
            logits, weak_logits = together(model, [batch.x, weak])
        else:
            logits = logits_of(model, batch.x)
            with frozen_statistics(model):
                weak_logits = logits_of(model, weak)
        return logits, weak_logits, weak_logits
