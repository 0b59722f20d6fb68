"""SoftMatch: pseudo-classes count the more, the closer their confidence is to the average one."""

from __future__ import annotations

import torch
from torch import Tensor

from hardmix import _check
from hardmix.distributed import gather_rows
from hardmix.semi.algorithm import SemiBatch, check_classes
from hardmix.semi.fixmatch import FixMatch
from hardmix.semi.pairs import MixedPairs
from hardmix.semi.probabilities import align_distribution, confidence, moving_average, truncated_gaussian


class SoftMatch(FixMatch):
    """FixMatch with a soft weight in place of the threshold.

        q_u = softmax f(weak u),   a_u = q_u (1/C) / E, scaled to sum to one,   E = moving average of mean_u q_u
        mu, s^2 = moving averages of the mean and the variance of max a_u over the batch
        weight of u = exp(-min(0, max a_u - mu)^2 width^2 / (2 s^2)): 1 from the average confidence on
        L = CE(f(x), y) + w mean_u (weight of u) CE(f(strong u), argmax q_u) + the loss of `pairs`, where there are any

    Args:
        num_classes: C.
        momentum: of the three averages.
        width: how many of its standard deviations the Gaussian is narrowed by.
        align: weigh by the aligned predictions a_u; False by q_u.
        weight: w, the largest weight. pairs, joint: as in `FixMatch`.

    The averages begin at 1/C, 1/C and 1 and take in a batch before its weights are computed; the variance is the
    unbiased one, and of a single sample it is 0. Pseudo-classes are those of q_u: alignment changes weights alone. With
    several processes the batch is that of all. Reference: Chen et al. 2023, eq. 6-10 (arXiv:2301.10921): momentum
    0.999, w 1; equation 7 has no width (1), the experiments and the release divide the variance by 4 (2). The release
    begins E with the first batch.

    >>> algorithm = SoftMatch(num_classes=4)
    >>> model = torch.nn.Linear(8, 4)
    >>> x, y, u = torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> output = algorithm(model, SemiBatch(x, y, (u, u + 0.1 * torch.rand(6, 8))))
    >>> bool((output.weight > 0.5).all())
    True
    """

    predicted: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        momentum: float = 0.999,
        width: float = 2.0,
        align: bool = True,
        weight: float = 1.0,
        pairs: MixedPairs | None = None,
        joint: bool = True,
    ) -> None:
        super().__init__(weight=weight, pairs=pairs, joint=joint)
        who = type(self).__name__
        num_classes = _check.integer(who, "num_classes", num_classes, 2)
        self.momentum = _check.between(who, "momentum", momentum, 0.0, 1.0)
        self.width = _check.positive(who, "width", width)
        self.align = _check.boolean(who, "align", align)
        #: E, mu and s^2
        self.register_buffer("predicted", torch.full((num_classes,), 1.0 / num_classes))
        self.register_buffer("mean", torch.tensor(1.0 / num_classes))
        self.register_buffer("variance", torch.tensor(1.0))

    def extra_repr(self) -> str:
        settings = f"momentum={self.momentum:g}, width={self.width:g}, align={self.align}"
        return f"num_classes={len(self.predicted)}, {settings}, weight={self.weight:g}, joint={self.joint}"

    def trusted(self, probs: Tensor, batch: SemiBatch) -> Tensor:
        check_classes(type(self).__name__, probs, len(self.predicted))
        everywhere = gather_rows(probs)
        self.predicted.copy_(moving_average(self.predicted, everywhere.mean(0), self.momentum))
        highest = self._aligned_confidence(everywhere)
        mean = highest.mean()
        variance = (highest - mean).square().sum() / max(1, len(highest) - 1)
        self.mean.copy_(moving_average(self.mean, mean, self.momentum))
        self.variance.copy_(moving_average(self.variance, variance, self.momentum))
        return truncated_gaussian(self._aligned_confidence(probs), self.mean, self.variance, self.width)

    def _aligned_confidence(self, probs: Tensor) -> Tensor:
        """(N,)"""
        if self.align:
            probs = align_distribution(probs, self.predicted, torch.full_like(self.predicted, 1.0 / probs.shape[1]))
        return confidence(probs)[0]
