"""A backbone with the algorithm that trains it, as one module, so that a step is one forward for whatever wraps it."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from hardmix.semi.algorithm import SemiAlgorithm, SemiBatch, SemiOutput


class SemiNet(nn.Module):
    """Logits of samples, or the loss of a step.

    DistributedDataParallel and its like watch one forward a step; here the algorithm's own forwards of the backbone are
    inside it. What the algorithm learns or remembers is in the same state_dict.

    >>> from hardmix.semi import FixMatch
    >>> net = SemiNet(nn.Linear(8, 4), FixMatch())
    """

    def __init__(self, backbone: nn.Module, algorithm: SemiAlgorithm) -> None:
        super().__init__()
        self.backbone = backbone
        self.algorithm = algorithm

    def forward(self, inputs: Tensor | SemiBatch, generator: Generator | None = None) -> Tensor | SemiOutput:
        """(N, C) logits of a tensor (N, ...), or the algorithm's output for a SemiBatch."""
        if isinstance(inputs, SemiBatch):
            return self.algorithm(self.backbone, inputs, generator=generator)
        return self.backbone(inputs)
