"""FixMatch: the pseudo-class of a weak view, where it is confident, is the label of a strong view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hardmix import _check
from hardmix.semi.algorithm import Forward, SemiAlgorithm, SemiBatch, SemiOutput, class_loss, logits_of, together
from hardmix.semi.pairs import MixedPairs, check_pairs
from hardmix.semi.probabilities import confidence, confidence_mask, probabilities, threshold_value


class FixMatch(SemiAlgorithm):
    """FixMatch, alone or with mixed pairs of labelled and unlabelled samples.

        L = CE(f(x), y) + w mean_u [max q_u >= tau] CE(f(strong u), argmax q_u),   q_u = softmax f(weak u)
            + the loss of `pairs`, where there are any

    Args:
        threshold: tau, in (0, 1].
        weight: w.
        pairs: mixes labelled samples with weak views (see `MixedPairs`); FixMatch + Mixup, FixMatch + DM.
        joint: one forward of all views, so that batch norm sees them as one batch (as the paper's release does). False
            runs the weak views without a gradient by themselves: a third of the work less, other batch statistics.

    The mean is over all unlabelled samples, those below the threshold included. A batch without a confident sample has
    a second term of 0. Reference: Sohn et al. 2020, eq. 3-4 (arXiv:2001.07685): tau 0.95, w 1, 7 unlabelled samples for
    each labelled one.

    >>> algorithm = FixMatch(threshold=0.95)
    >>> model = torch.nn.Linear(8, 4)
    >>> x, y, u = torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> output = algorithm(model, SemiBatch(x, y, (u, u + 0.1 * torch.rand(6, 8))))
    >>> output.pseudo.shape, output.weight.shape
    (torch.Size([6]), torch.Size([6]))
    """

    def __init__(
        self, *, threshold: float = 0.95, weight: float = 1.0, pairs: MixedPairs | None = None, joint: bool = True
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.threshold = threshold_value(who, "threshold", threshold)
        self.weight = _check.non_negative(who, "weight", weight)
        self.pairs = check_pairs(who, pairs)
        self.joint = _check.boolean(who, "joint", joint)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}, weight={self.weight:g}, joint={self.joint}"

    def set_progress(self, fraction: float) -> None:
        super().set_progress(fraction)
        if self.pairs is not None:
            self.pairs.set_progress(fraction)

    def trusted(self, probs: Tensor, batch: SemiBatch) -> Tensor:
        """(U,) how much each pseudo-class counts, from the weak views' probabilities (U, C)."""
        return confidence_mask(confidence(probs)[0], self.threshold)

    def forwards(self, model: Forward, batch: SemiBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the labelled samples (B, C), and of the weak and the strong views (U, C)."""
        weak, strong = batch.views
        if self.joint:
            logits, weak_logits, strong_logits = together(model, [batch.x, weak, strong])
        else:
            with torch.no_grad():
                weak_logits = logits_of(model, weak)
            logits, strong_logits = together(model, [batch.x, strong])
        return logits, weak_logits, strong_logits

    def labelled(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of the labelled samples, a scalar."""
        return class_loss(type(self).__name__, logits, y)

    def unlabelled(self, strong_logits: Tensor, probs: Tensor, pseudo: Tensor) -> Tensor:
        """(U,) losses of the strong views, before they are weighed."""
        return F.cross_entropy(strong_logits, pseudo, reduction="none")

    def unlabelled_weight(self) -> float:
        """w at this point of the training."""
        return self.weight

    def further(self, strong_logits: Tensor, trust: Tensor) -> dict[str, Tensor]:
        """What else is in the loss, as it is added, by the name that it is logged under."""
        return {}

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        logits, weak_logits, strong_logits = self.forwards(model, batch)
        probs = probabilities(weak_logits)
        pseudo = confidence(probs)[1]
        trust = self.trusted(probs, batch)
        labelled = self.labelled(logits, batch.y)
        unlabelled = (trust * self.unlabelled(strong_logits, probs, pseudo)).mean()
        others = self.further(strong_logits, trust)
        if self.pairs is not None:
            weak = batch.views[0]
            others["pair"] = self.pairs(model, batch.x, batch.y, weak, pseudo, trust, generator=generator)
        loss = labelled + self.unlabelled_weight() * unlabelled
        for other in others.values():
            loss = loss + other
        parts = {"labelled": labelled, "unlabelled": unlabelled, **others}
        return SemiOutput(loss, {name: part.detach() for name, part in parts.items()}, pseudo, trust, logits.detach())
