"""FlexMatch: FixMatch whose threshold is lower for classes that are learnt less."""

from __future__ import annotations

import torch
from torch import Tensor

from hardmix import _check
from hardmix.distributed import gather_rows
from hardmix.semi.algorithm import SemiBatch, check_classes, check_ids
from hardmix.semi.fixmatch import FixMatch
from hardmix.semi.pairs import MixedPairs
from hardmix.semi.probabilities import confidence, confidence_mask, convex_map


class FlexMatch(FixMatch):
    """FixMatch with curriculum pseudo labelling: a threshold for each class.

        sigma(c) = number of unlabelled samples whose last confident pseudo-class is c
        beta(c)  = sigma(c) / max(max_k sigma(k), number of samples that were never confident)
        T(c)     = M(beta(c)) tau,   M(b) = b / (2 - b),   and FixMatch's mask is  max q_u >= T(argmax q_u)

    A sample is confident where max q_u >= tau, whatever T is. Its pseudo-class is remembered until another one is
    confident. The thresholds of a step are those that the steps before it left.

    Args:
        num_classes: C.
        num_unlabelled: size of the unlabelled set; `SemiBatch.ids` are numbers below it.
        threshold: tau, in (0, 1]. weight, pairs, joint: as in `FixMatch`.
        warm_up: count the samples that were never confident in beta's denominator. False leaves them out.

    At the start, and for a class that no sample was confident in, T is 0 and every sample of that pseudo-class counts,
    with the warm-up as well: thresholds rise from 0 to tau. Of a sample that is twice in a batch one confident
    pseudo-class is kept, the last on a CPU. Several processes gather what they remember, so all have the same
    thresholds. Reference: Zhang et al. 2021, eq. 5-8, 11, 12 and algorithm 1 (arXiv:2110.08263): tau 0.95, M as above;
    the mask includes equality, as in the release. The release does not move the thresholds while all samples are of one
    class; here they follow the equations.

    >>> algorithm = FlexMatch(num_classes=4, num_unlabelled=100)
    >>> model = torch.nn.Linear(8, 4)
    >>> x, y, u = torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> output = algorithm(model, SemiBatch(x, y, (u, u + 0.1 * torch.rand(6, 8)), ids=torch.arange(6)))
    >>> algorithm.class_thresholds().shape
    torch.Size([4])
    """

    last: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        num_unlabelled: int,
        threshold: float = 0.95,
        weight: float = 1.0,
        warm_up: bool = True,
        pairs: MixedPairs | None = None,
        joint: bool = True,
    ) -> None:
        super().__init__(threshold=threshold, weight=weight, pairs=pairs, joint=joint)
        who = type(self).__name__
        self.num_classes = _check.integer(who, "num_classes", num_classes, 2)
        num_unlabelled = _check.integer(who, "num_unlabelled", num_unlabelled, 1)
        self.warm_up = _check.boolean(who, "warm_up", warm_up)
        #: the last confident pseudo-class of each unlabelled sample; -1: none so far
        self.register_buffer("last", torch.full((num_unlabelled,), -1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}, warm_up={self.warm_up}"

    def class_thresholds(self) -> Tensor:
        """(C,) thresholds of the next step."""
        counts = self.last.new_zeros(self.num_classes + 1)
        counts.scatter_add_(0, self.last + 1, torch.ones_like(self.last))
        never, learnt = counts[0], counts[1:]
        most = torch.maximum(learnt.max(), never) if self.warm_up else learnt.max()
        return convex_map(learnt / most.clamp(min=1)) * self.threshold

    def trusted(self, probs: Tensor, batch: SemiBatch) -> Tensor:
        check_classes(type(self).__name__, probs, self.num_classes)
        ids = check_ids(type(self).__name__, batch, len(self.last)).to(probs.device)
        highest, pseudo = confidence(probs)
        trust = confidence_mask(highest, self.class_thresholds()[pseudo])
        self._remember(torch.stack([ids, pseudo, (highest >= self.threshold).long()], 1))
        return trust

    def _remember(self, rows: Tensor) -> None:
        """Rows of (id, pseudo-class, 1 where it is confident), of all processes."""
        ids, pseudo, confident = gather_rows(rows).unbind(1)
        # Those that are not confident are written behind the end, so that nothing has to be picked out by its value.
        longer = torch.cat([self.last, self.last[:1]])
        longer[torch.where(confident == 1, ids, len(self.last))] = pseudo
        self.last.copy_(longer[:-1])
