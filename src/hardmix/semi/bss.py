"""Batch Spectral Shrinkage: fine-tuning that lets go of the weakest directions of the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import wide
from hardmix.semi.algorithm import Forward, SemiBatch, class_loss
from hardmix.semi.features import find_head, with_features
from hardmix.semi.supervised import Supervised


def spectral_shrinkage(features: Tensor, k: int = 1) -> Tensor:
    """Sum of the squares of the k smallest singular values of a batch's features, a scalar.

    Args:
        features: (B, D); computed in float32 or wider.
        k: with min(B, D) or more it is all of them, the squared Frobenius norm.

    A batch of a rank below min(B, D) - k + 1 has 0, with a gradient of 0. The gradient is finite for equal singular
    values too, since no singular vectors are in the sum.

    >>> spectral_shrinkage(torch.diag(torch.tensor([3.0, 1.0, 2.0])), k=2).item()
    5.0
    """
    who = "spectral_shrinkage"
    _check.batch(who, "features", features, 2, 2)
    _check.integer(who, "k", k, 1)
    _check.finite(who, "features", features)
    values = torch.linalg.svdvals(features.to(wide(features.dtype)))  # largest first
    return values[-k:].square().sum()


class BSS(Supervised):
    """Batch Spectral Shrinkage: fine-tuning with a penalty on the smallest singular values of a batch's features.

        L = CE(f(x), y) + eta sum_{i=1..k} sigma_{-i}^2,   sigma_{-i} the i-th smallest singular value of F (B, D)

    F holds what the classifier reads of the labelled samples. What a pre-trained model knows that is of no use in the
    new task lies in these directions, and fine-tuning with few samples does not unlearn it by itself.

    Args:
        model: has the classifier; it is looked at, not kept.
        weight: eta.
        k: how many singular values.
        head: name of the classifier in the model; "" takes its last linear layer.

    Parts are logged as they are added: "shrinkage" holds eta. A batch of one sample has one singular value, the length
    of its features. The singular values are the one thing in a step that waits for a GPU. On several processes each
    shrinks its own batch. Reference: Chen et al. 2019 (NeurIPS); eta 0.001 and k 1 are the release's.

    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    >>> output = BSS(model=model)(model, SemiBatch(torch.rand(2, 8), torch.tensor([0, 1])))
    >>> sorted(output.parts)
    ['labelled', 'shrinkage']
    """

    def __init__(self, *, model: nn.Module, weight: float = 1e-3, k: int = 1, head: str = "") -> None:
        super().__init__()
        who = type(self).__name__
        find_head(who, model, head)
        self.weight = _check.non_negative(who, "weight", weight)
        self.k = _check.integer(who, "k", k, 1)
        self.head = head

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, k={self.k}"

    def terms(self, model: Forward, batch: SemiBatch) -> tuple[Tensor, dict[str, Tensor]]:
        who = type(self).__name__
        logits, features = with_features(model, batch.x, find_head(who, model, self.head))
        labelled = class_loss(who, logits, batch.y)
        return logits, {"labelled": labelled, "shrinkage": self.weight * spectral_shrinkage(features, self.k)}
