"""Learning from the labelled samples alone, as a baseline."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hardmix.semi.algorithm import (
    Forward,
    SemiAlgorithm,
    SemiBatch,
    SemiOutput,
    class_loss,
    logits_of,
    no_unlabelled,
)


class Supervised(SemiAlgorithm):
    """Cross entropy of the labelled samples; there are no others: what few labels alone give.

        L = CE(f(x), y)

    `SemiOutput.pseudo` and `weight` are empty.

    >>> algorithm = Supervised()
    >>> output = algorithm(torch.nn.Linear(8, 4), SemiBatch(torch.rand(2, 8), torch.tensor([0, 1])))
    >>> list(output.parts)
    ['labelled']
    """

    views: tuple[str, ...] = ()

    def terms(self, model: Forward, batch: SemiBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, C) logits of the labelled samples, and what the loss is the sum of, by the names it is logged under."""
        logits = logits_of(model, batch.x)
        return logits, {"labelled": class_loss(type(self).__name__, logits, batch.y)}

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        logits, terms = self.terms(model, batch)
        loss = torch.stack(list(terms.values())).sum()
        parts = {name: term.detach() for name, term in terms.items()}
        return SemiOutput(loss, parts, *no_unlabelled(logits), logits.detach())
