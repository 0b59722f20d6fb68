"""UDA: the sharpened prediction of a weak view, where it is confident, is the target of a strong view."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix.semi.algorithm import class_loss
from hardmix.semi.fixmatch import FixMatch
from hardmix.semi.pairs import MixedPairs
from hardmix.semi.probabilities import SCHEDULES, probabilities, sharpen, signal_annealing


class UDA(FixMatch):
    """Unsupervised data augmentation, alone or with mixed pairs of labelled and unlabelled samples.

        L = sum_i [p_i <= eta] CE(f(x_i), y_i) / max(1, sum_i [p_i <= eta]),   p_i = softmax f(x_i)_{y_i}
            + w mean_u [max q_u >= beta] CE(f(strong u), sharpen(q_u, T)),     q_u = softmax f(weak u)
            + the loss of `pairs`, where there are any

    Args:
        threshold: beta, in (0, 1].
        temperature: T.
        weight: w.
        annealing: how eta rises from 1/C to 1 with the training: "none" (it is 1, all labelled samples count),
            "linear", "log" or "exp"; see `signal_annealing`. "exp" is for few labels that are soon learnt by heart.
        pairs, joint: as in `FixMatch`.

    Neither targets nor masks have a gradient. The means are over all unlabelled samples, and over the labelled ones
    that count. No confident sample: the second term is 0. All labelled samples above eta: the first one is. Reference:
    Xie et al. 2020, sections 2 and 3 (arXiv:1904.12848): T 0.4, beta 0.8 on CIFAR-10 and SVHN, 0.5 on ImageNet, w 1.
    The release has the divergence KL(target || prediction) in place of the cross entropy: the same gradient, another
    value; and its mask leaves out equality.

    >>> import torch
    >>> from hardmix.semi import SemiBatch
    >>> algorithm = UDA(annealing="exp")
    >>> model = torch.nn.Linear(8, 4)
    >>> x, y, u = torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> algorithm(model, SemiBatch(x, y, (u, u + 0.1 * torch.rand(6, 8)))).weight.shape
    torch.Size([6])
    """

    def __init__(
        self,
        *,
        threshold: float = 0.8,
        temperature: float = 0.4,
        weight: float = 1.0,
        annealing: str = "none",
        pairs: MixedPairs | None = None,
        joint: bool = True,
    ) -> None:
        super().__init__(threshold=threshold, weight=weight, pairs=pairs, joint=joint)
        who = type(self).__name__
        self.temperature = _check.positive(who, "temperature", temperature)
        self.annealing = _check.choice(who, "annealing", annealing, SCHEDULES)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:g}, annealing={self.annealing!r}"

    def labelled(self, logits: Tensor, y: Tensor) -> Tensor:
        losses = class_loss(type(self).__name__, logits, y, reduction="none")
        own = probabilities(logits).gather(1, y[:, None])[:, 0]
        counts = (own <= signal_annealing(self.progress, logits.shape[1], self.annealing)).to(losses.dtype)
        return (losses * counts).sum() / counts.sum().clamp(min=1.0)

    def unlabelled(self, strong_logits: Tensor, probs: Tensor, pseudo: Tensor) -> Tensor:
        return F.cross_entropy(strong_logits, sharpen(probs, self.temperature), reduction="none")
