"""FreeMatch: thresholds that follow the model's confidence, and a loss that keeps its predictions spread."""

from __future__ import annotations

import torch
from torch import Tensor

from hardmix import _check
from hardmix.distributed import gather_rows
from hardmix.semi.algorithm import SemiBatch, check_classes
from hardmix.semi.fixmatch import FixMatch
from hardmix.semi.pairs import MixedPairs
from hardmix.semi.probabilities import class_mean, confidence, confidence_mask, moving_average


class FreeMatch(FixMatch):
    """FixMatch with self-adaptive thresholds and self-adaptive fairness.

        q_u = softmax f(weak u),   tau, p, h = moving averages over the batches of
              mean_u max q_u  (scalar),   mean_u q_u  (C),   share of each class among argmax q_u  (C)
        T(c) = tau p(c) / max_k p(k),   and FixMatch's mask is  max q_u >= T(argmax q_u)
        L    = CE(f(x), y) + w mean_u mask_u CE(f(strong u), argmax q_u) - v H(norm(p / h), norm(p' / h'))
            + the loss of `pairs`, where there are any

    p' is the mean of the predictions softmax f(strong u) of the masked samples and h' the share of each class among
    them, norm scales to sum to one, and H(a, b) = -sum_c a_c log b_c.

    Args:
        num_classes: C.
        momentum: of the three averages.
        fairness: v.
        weight: w. pairs, joint: as in `FixMatch`.

    The averages begin at 1/C, so all samples count at first; a batch is taken in before its mask is made. Gradient
    flows through p' alone. A class that no masked strong view is predicted as (h' = 0) adds nothing to H; the release
    adds a constant. No masked sample: the last term is 0. With several processes the averages are over the batch of
    all, p' and h' over each one's own. Reference: Wang et al. 2023, eq. 5-12 (arXiv:2205.07246): momentum 0.999, w 1, v
    0.05, or 0.01 with the fewest labels; the mask includes equality, as in the release. The range that the paper keeps
    thresholds in on SVHN is left out.

    >>> algorithm = FreeMatch(num_classes=4)
    >>> model = torch.nn.Linear(8, 4)
    >>> x, y, u = torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> output = algorithm(model, SemiBatch(x, y, (u, u + 0.1 * torch.rand(6, 8))))
    >>> sorted(output.parts)
    ['fairness', 'labelled', 'unlabelled']
    """

    confident: Tensor
    predicted: Tensor
    classes: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        momentum: float = 0.999,
        fairness: float = 0.05,
        weight: float = 1.0,
        pairs: MixedPairs | None = None,
        joint: bool = True,
    ) -> None:
        super().__init__(weight=weight, pairs=pairs, joint=joint)
        who = type(self).__name__
        num_classes = _check.integer(who, "num_classes", num_classes, 2)
        self.momentum = _check.between(who, "momentum", momentum, 0.0, 1.0)
        self.fairness = _check.non_negative(who, "fairness", fairness)
        #: tau, p and h
        self.register_buffer("confident", torch.tensor(1.0 / num_classes))
        self.register_buffer("predicted", torch.full((num_classes,), 1.0 / num_classes))
        self.register_buffer("classes", torch.full((num_classes,), 1.0 / num_classes))

    def extra_repr(self) -> str:
        settings = f"momentum={self.momentum:g}, fairness={self.fairness:g}"
        return f"num_classes={len(self.predicted)}, {settings}, weight={self.weight:g}, joint={self.joint}"

    def class_thresholds(self) -> Tensor:
        """(C,) thresholds as they are now."""
        return self.confident * self.predicted / self.predicted.max()

    def trusted(self, probs: Tensor, batch: SemiBatch) -> Tensor:
        check_classes(type(self).__name__, probs, len(self.predicted))
        everywhere = gather_rows(probs)
        highest, pseudo = confidence(everywhere)
        for average, value in (
            (self.confident, highest.mean()),
            (self.predicted, everywhere.mean(0)),
            (self.classes, class_mean(pseudo, probs.shape[1])),
        ):
            average.copy_(moving_average(average, value, self.momentum))
        highest, pseudo = confidence(probs)
        return confidence_mask(highest, self.class_thresholds()[pseudo])

    def further(self, strong_logits: Tensor, trust: Tensor) -> dict[str, Tensor]:
        return {"fairness": self.fairness * -fairness_entropy(strong_logits, trust, self.predicted, self.classes)}


def fairness_entropy(logits: Tensor, mask: Tensor, predicted: Tensor, classes: Tensor) -> Tensor:
    """H(norm(p / h), norm(p' / h')), a scalar to be made large; see `FreeMatch`.

    Args:
        logits: (N, C) of the strong views; p' and h' are those of the rows where `mask` (N,) is 1.
        predicted, classes: (C,) p and h.
    """
    tiny = torch.finfo(logits.dtype).tiny
    probs = logits.softmax(1)
    counts = torch.zeros_like(probs).scatter_(1, probs.argmax(1, keepdim=True), mask[:, None]).sum(0)  # (C,)
    seen = counts > 0
    batch = torch.where(seen, (mask[:, None] * probs).sum(0) / counts.clamp(min=1.0), 0.0)
    batch = batch / batch.sum().clamp(min=tiny)
    wanted = predicted / classes.clamp(min=torch.finfo(classes.dtype).tiny)
    wanted = wanted / wanted.sum()
    return -(wanted * torch.where(seen, batch, 1.0).clamp(min=tiny).log()).sum()
