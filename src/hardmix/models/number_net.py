"""An encoder of anything with a head for one number, and a projector for contrast."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hardmix import _check
from hardmix.losses import FeatureSmoothing

PROJECTORS = ("linear", "mlp", "none")


class NumberNet(nn.Module):
    """Encoder, a linear head for one number, and a projector into the space of the contrast.

    Args:
        encoder: inputs -> features (N, D).
        features: D.
        projector: "linear"; "mlp", a hidden layer of D with ReLU before it; or "none": the features are contrasted
            themselves. None leaves it out, since nothing would train it.
        projection: size of what the projector makes.
        smoothing: feature-distribution smoothing between encoder and head.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        *,
        projector: str | None = None,
        projection: int = 32,
        smoothing: FeatureSmoothing | None = None,
    ) -> None:
        super().__init__()
        self.features = _check.integer("NumberNet", "features", features, 1)
        self.encoder = encoder
        self.head = nn.Linear(features, 1)
        # Last, so that encoder and head start alike with and without it.
        self.projector: nn.Module | None = None
        if projector is not None and _check.choice("NumberNet", "projector", projector, PROJECTORS) != "none":
            _check.integer("NumberNet", "projection", projection, 1)
            last = nn.Linear(features, projection)
            self.projector = last
            if projector == "mlp":
                self.projector = nn.Sequential(nn.Linear(features, features), nn.ReLU(), last)
        self.smoothing = smoothing
        self.frozen = False

    def freeze(self, frozen: bool) -> None:
        """While frozen, the encoder computes as in evaluation and gets no gradient."""
        self.frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> NumberNet:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, x: Any, part: str = "predict", labels: Tensor | None = None) -> Any:
        """ "predict": (N,) numbers; "features": (N, D); "embed": (N, projection), what is contrasted; "all": the three
        of them, numbers first. `labels` (N,) are those that features are smoothed by."""
        features = self.encoder(x)
        if self.frozen:
            features = features.detach()
        if part == "features":
            return features
        if part == "embed":
            return self._embed(features)
        smooth = features if self.smoothing is None else self.smoothing(features, labels)
        numbers = self.head(smooth)[:, 0]
        return numbers if part == "predict" else (numbers, features, self._embed(features))

    def _embed(self, features: Tensor) -> Tensor:
        return features if self.projector is None else self.projector(features)
