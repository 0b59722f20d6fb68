"""A multilayer perceptron for tables, with a head for numbers and a projector for contrast."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from hardmix import _check


class TableNet(nn.Module):
    """Encoder of `depth` linear layers with ReLU, a linear head for one number, and a linear projector.

    Args:
        inputs: P, numbers a row.
        width: D, size of the features.
        depth: layers of the encoder.
        projection: size of the embeddings that are contrasted; 0 leaves the projector out, for nothing would train it.
    Shapes: rows (N, P) -> predictions (N,), features (N, D) or embeddings (N, projection), see `forward`.
    """

    def __init__(self, *, inputs: int, width: int = 64, depth: int = 2, projection: int = 32) -> None:
        super().__init__()
        who = "mlp"
        for name, value in (("inputs", inputs), ("width", width), ("depth", depth)):
            _check.integer(who, name, value, 1)
        _check.integer(who, "projection", projection, 0)
        sizes = [inputs] + [width] * depth
        self.encoder = nn.Sequential()
        for before, after in itertools.pairwise(sizes):
            self.encoder.append(nn.Linear(before, after))
            self.encoder.append(nn.ReLU())
        self.head = nn.Linear(width, 1)
        # Last, so that encoder and head start alike with and without it.
        self.projector = nn.Linear(width, projection) if projection else None

    def forward(self, x: Tensor, part: str = "predict") -> Tensor:
        """ "predict": (N,) numbers; "probe": the same with no gradient to the encoder; "embed": (N, projection);
        "features": (N, D)."""
        features = self.encoder(x)
        if part == "features":
            return features
        if part == "embed":
            assert self.projector is not None
            return self.projector(features)
        return self.head(features.detach() if part == "probe" else features)[:, 0]
