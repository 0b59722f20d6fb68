"""ReMixMatch: MixMatch with aligned guesses, strong views that are anchored to a weak one, and rotations to tell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU
from hardmix.distributed import gather_rows
from hardmix.mixing.draw import move
from hardmix.mixing.static import Mixup
from hardmix.semi.algorithm import (
    Forward,
    SemiAlgorithm,
    SemiBatch,
    SemiOutput,
    check_classes,
    check_multiple,
    class_rows,
    frozen_statistics,
    interleaved,
    logits_of,
)
from hardmix.semi.features import find_head, with_features
from hardmix.semi.mixmatch import mix_all
from hardmix.semi.probabilities import align_distribution, confidence, linear_ramp, probabilities, sharpen


class ReMixMatch(SemiAlgorithm):
    """ReMixMatch.

        q_u = sharpen(align(softmax f(weak u), E, class_share), T),   E = mean prediction of the last batches
        x', u' and their targets p', q' = mixup of the labelled samples, all strong views and the weak one, see MixMatch
        L   = mean CE(f(x'), p') + r(progress) (w mean CE(f(u'), q') + s mean CE(f(strong_1 u), q_u))
            + v mean CE(g(strong_1 u, turned k times by 90 degrees), k)

    align multiplies by class_share / E and scales to sum to one (`align_distribution`). g is a linear head of 4 classes
    on the features that the model's classifier reads; it is trained with the model, so the optimizer has to hold
    `algorithm.parameters()`.

    Args:
        model: the backbone; looked at for the size of its features, not kept.
        class_share: (C,) distribution of the classes, of the labelled samples. It is scaled to sum to one.
        strong_views: K, number of strong views of each unlabelled sample.
        temperature: T. alpha: of the mixup's Beta. weight, strong_weight, rotation: w, s, v; without rotation (0) there
            is no head, and samples may be anything. With it they are square images.
        ramp: share of the training over which w and s rise along a line; 0 none.
        memory: number of batches that E is the mean of.
        head: name of the model's classifier; empty for its last linear layer.

    Guesses have no gradient. E begins at 1/C and takes in a batch after its guesses are made; with several processes
    the batch is that of all. A class that has no labelled sample is guessed only where nothing else is left. Batch
    norm's running statistics follow the first of the interleaved forwards alone. The number of unlabelled samples is a
    multiple of that of the labelled. `SemiOutput.logits` are those of the mixed labelled samples.

    Reference: Berthelot et al. 2020, algorithm 1, section 3 (arXiv:1911.09785): K 8 (here 2, which is far cheaper), T
    0.5, alpha 0.75, w 1.5, s 0.5, v 0.5, memory 128. There labelled samples are augmented strongly as well; here they
    are as the batch has them. The rise over 1/64 of the training is the release's.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> algorithm = ReMixMatch(model, torch.full((4,), 0.25))
    >>> u = torch.rand(6, 1, 4, 4)
    >>> output = algorithm(model, SemiBatch(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), (u, u, u)))
    >>> sorted(output.parts)
    ['labelled', 'rotation', 'strong', 'unlabelled']
    """

    views: tuple[str, ...] = ("weak", "strong", "strong")
    wanted: Tensor
    recent: Tensor

    def __init__(
        self,
        model: nn.Module,
        class_share: Tensor,
        *,
        strong_views: int = 2,
        temperature: float = 0.5,
        alpha: float = 0.75,
        weight: float = 1.5,
        strong_weight: float = 0.5,
        rotation: float = 0.5,
        ramp: float = 1 / 64,
        memory: int = 128,
        head: str = "",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.views = ("weak",) + ("strong",) * _check.integer(who, "strong_views", strong_views, 1)
        self.temperature = _check.positive(who, "temperature", temperature)
        self.mixup = Mixup(_check.positive(who, "alpha", alpha), pairing="permutation")
        self.weight = _check.non_negative(who, "weight", weight)
        self.strong_weight = _check.non_negative(who, "strong_weight", strong_weight)
        self.rotation = _check.non_negative(who, "rotation", rotation)
        self.ramp = _check.between(who, "ramp", ramp, 0.0, 1.0)
        memory = _check.integer(who, "memory", memory, 1)
        self.register_buffer("wanted", _distribution(who, class_share))
        #: mean prediction of each of the last batches, the newest last
        self.register_buffer("recent", torch.full((memory, len(class_share)), 1.0 / len(class_share)))
        self.head = head
        self.turns = nn.Linear(find_head(who, model, head).in_features, 4) if self.rotation else None

    def extra_repr(self) -> str:
        weights = f"weight={self.weight:g}, strong_weight={self.strong_weight:g}, rotation={self.rotation:g}"
        return f"strong_views={len(self.views) - 1}, temperature={self.temperature:g}, {weights}, ramp={self.ramp:g}"

    def guess(self, model: Forward, weak: Tensor) -> Tensor:
        """(U, C) aligned and sharpened predictions, without gradient; E follows."""
        with torch.no_grad(), frozen_statistics(model):
            probs = probabilities(logits_of(model, weak))
        check_classes(type(self).__name__, probs, len(self.wanted))
        guess = sharpen(align_distribution(probs, self.recent.mean(0), self.wanted), self.temperature)
        newest = gather_rows(probs).mean(0, keepdim=True).to(self.recent.dtype)
        self.recent.copy_(torch.cat([self.recent[1:], newest]))
        return guess

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        check_multiple(type(self).__name__, batch)
        weak, *strong = batch.views
        guess = self.guess(model, weak)
        targets = [class_rows(type(self).__name__, batch.y, guess), *[guess] * len(batch.views)]
        mixed, mixed_targets = mix_all(self.mixup, [batch.x, *strong, weak], targets, generator)
        logits, *others = interleaved(model, mixed)
        losses = {
            "labelled": F.cross_entropy(logits, mixed_targets[0]),
            "unlabelled": F.cross_entropy(torch.cat(others), torch.cat(mixed_targets[1:])),
        }
        with frozen_statistics(model):
            losses["strong"] = F.cross_entropy(logits_of(model, strong[0]), guess)
            if self.turns is not None:
                losses["rotation"] = self._rotation_loss(self.turns, model, strong[0], generator)
        risen = linear_ramp(self.progress, self.ramp)
        weights = {"unlabelled": risen * self.weight, "strong": risen * self.strong_weight, "rotation": self.rotation}
        loss = losses["labelled"]
        for name, weight in weights.items():
            if name in losses:
                loss = loss + weight * losses[name]
        highest, pseudo = confidence(guess)
        parts = {name: value.detach() for name, value in losses.items()}
        return SemiOutput(loss, parts, pseudo, torch.ones_like(highest), logits.detach())

    def _rotation_loss(self, turns: nn.Linear, model: Forward, images: Tensor, generator: Generator | None) -> Tensor:
        who = type(self).__name__
        if images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"{who}: the strong views have shape {tuple(images.shape)}, which can't be turned by 90 degrees; pass "
                "square images (N, C, S, S), or rotation=0."
            )
        turned, count = rotate(images, generator)
        _, features = with_features(model, turned, find_head(who, model, self.head))
        if features.shape[1] != turns.in_features:
            raise ValueError(
                f"{who}: the model's classifier reads {features.shape[1]} features, that of the model it was made for "
                f"{turns.in_features}; pass a model of the same kind."
            )
        logits = turns(features.to(turns.weight.dtype))
        return F.cross_entropy(logits.to(torch.float32), count)


def rotate(images: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Each image (N, C, S, S) turned by 0 to 3 quarters, all equally likely, in an order of their own; and the (N,)
    number of quarters."""
    count = torch.randint(4, (len(images),), generator=generator, device=CPU)
    order = count.argsort(stable=True)
    sizes = torch.bincount(count, minlength=4).tolist()
    pieces = images[move(order, images.device)].split(sizes)
    turned = [piece.rot90(k, (2, 3)) for k, piece in enumerate(pieces)]
    return torch.cat(turned), move(count[order], images.device)


def _distribution(who: str, share: object) -> Tensor:
    """A (C,) distribution in float32 from non-negative numbers."""
    share = _check.tensor(who, "class_share", share).detach().to(torch.float32, copy=True)
    if share.ndim != 1 or len(share) < 2:
        raise ValueError(f"{who}: class_share has shape {tuple(share.shape)}; pass (C,) shares of at least 2 classes.")
    if not bool((share >= 0).all()) or not 0.0 < float(share.sum()) < float("inf"):
        raise ValueError(f"{who}: class_share holds {share.tolist()}; pass shares of at least 0 that don't sum to 0.")
    return share / share.sum()
