"""Mean Teacher: predict of one view what an average of the model's weights predicts of another."""

from __future__ import annotations

import copy

import torch
from torch import Generator, nn

from hardmix import _check
from hardmix.semi.algorithm import (
    Forward,
    SemiAlgorithm,
    SemiBatch,
    SemiOutput,
    class_loss,
    frozen_statistics,
    together,
)
from hardmix.semi.probabilities import confidence, probabilities, sigmoid_ramp


class MeanTeacher(SemiAlgorithm):
    """Mean Teacher: consistency with a teacher whose weights follow the model's.

        L = CE(f(x), y) + r(progress) w mean_c (softmax f(u)_c - softmax t(u')_c)^2   over two weak views u, u'
        after each step of the optimizer:   weights of t = d (weights of t) + (1 - d) (weights of f)

    Args:
        model: the backbone. The teacher starts as a copy of it and is part of this module; the model is not kept.
        weight: w; the mean is over samples and classes.
        ramp: share of the training over which the weight rises along exp(-5 (1 - x)^2); 0 none.
        decay: d once the weight has risen.
        early_decay: d before, so that the teacher forgets the untrained weights.

    The gradient flows through u alone. Model and teacher each see labelled and unlabelled samples in one forward, and
    the teacher's batch norm normalises by its batch, as the model's does; its running statistics are copied from the
    model. Pseudo-classes are the teacher's, and every sample counts fully. `after_step` has to be called, or the
    teacher stays as it was. Reference: Tarvainen and Valpola 2017, section 2 and appendix B (arXiv:1703.01780): decay
    0.99 and 0.999, a weight of at most 100 that rises over 40,000 of 150,000 steps. There the labelled samples have two
    views as well, and take part in the second term. MixMatch's release takes a weight of 50 that rises along a line
    over 0.4 of the training.

    >>> model = nn.Linear(8, 4)
    >>> algorithm = MeanTeacher(model)
    >>> u = torch.rand(6, 8)
    >>> output = algorithm(model, SemiBatch(torch.rand(2, 8), torch.tensor([0, 1]), (u, u + 0.1 * torch.rand(6, 8))))
    >>> algorithm.after_step(model)
    """

    views = ("weak", "weak")

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 100.0,
        ramp: float = 0.25,
        decay: float = 0.999,
        early_decay: float = 0.99,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{who}: model is a {type(model).__name__}; pass the torch.nn.Module that is trained.")
        self.weight = _check.non_negative(who, "weight", weight)
        self.ramp = _check.between(who, "ramp", ramp, 0.0, 1.0)
        self.decay = _check.between(who, "decay", decay, 0.0, 1.0)
        self.early_decay = _check.between(who, "early_decay", early_decay, 0.0, 1.0)
        self.teacher = copy.deepcopy(model).requires_grad_(False).train()

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, ramp={self.ramp:g}, decay={self.decay:g}, early_decay={self.early_decay:g}"

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        first, second = batch.views
        with torch.no_grad(), frozen_statistics(self.teacher):
            target = probabilities(together(self.teacher, [batch.x, second])[1])
        logits, unlabelled_logits = together(model, [batch.x, first])
        labelled = class_loss(type(self).__name__, logits, batch.y)
        unlabelled = (unlabelled_logits.softmax(1) - target).square().mean()
        loss = labelled + self.weight * sigmoid_ramp(self.progress, self.ramp) * unlabelled
        parts = {"labelled": labelled.detach(), "unlabelled": unlabelled.detach()}
        highest, pseudo = confidence(target)
        return SemiOutput(loss, parts, pseudo, torch.ones_like(highest), logits.detach())

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        decay = self.early_decay if self.progress < self.ramp else self.decay
        for mean, value in zip(self.teacher.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)
        for kept, now in zip(self.teacher.buffers(), model.buffers(), strict=True):
            kept.copy_(now)
