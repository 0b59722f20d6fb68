"""Self-Tuning: queries are pulled to all keys of their class, or pseudo-class, and away from those of the others."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import unit, wide
from hardmix.distributed import gather_rows
from hardmix.semi.algorithm import VIEWS, Forward, SemiAlgorithm, SemiBatch, SemiOutput, class_loss
from hardmix.semi.features import find_head, with_features
from hardmix.semi.pairs import MixedPairs, check_pairs
from hardmix.semi.probabilities import confidence, confidence_mask, probabilities, threshold_value


def pseudo_group_contrast(
    queries: Tensor, keys: Tensor, queue: Tensor, classes: Tensor, *, temperature: float = 0.07
) -> Tensor:
    """(N,) Pseudo Group Contrast of each query: all keys of its class are positive, to equal parts.

        l_i = -1 / (K + 1) sum_{k in P_i} log( exp(q_i k / T) / sum_{k' in P_i and all other keys} exp(q_i k' / T) )
        P_i = {its own key} and the K keys of its class in the queue

    Args:
        queries, keys: (N, L) rows of length 1; key i is of another view of the sample of query i.
        queue: (C, K, L) the last K keys of each class.
        classes: (N,) of labelled samples the class, of others the pseudo-class.
    Computed in float32 or wider, without autocast. Not negative and at least log(K + 1), which it reaches where the
    positive keys are equally close and the others infinitely far.
    """
    with torch.autocast(queries.device.type, enabled=False):
        dtype = wide(queries.dtype)
        queries, keys, queue = queries.to(dtype), keys.to(dtype), queue.to(dtype)
        own = (queries * keys).sum(1, keepdim=True)  # (N, 1)
        others = queries @ queue.flatten(0, 1).T  # (N, C K)
        log_probs = (torch.cat([own, others], 1) / temperature).log_softmax(1)
        groups = log_probs[:, 1:].unflatten(1, queue.shape[:2]).sum(2)  # (N, C)
        positive = log_probs[:, 0] + groups.gather(1, classes[:, None])[:, 0]
    return -positive / (queue.shape[1] + 1)


def enqueue(queue: Tensor, place: Tensor, keys: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The queue and the next places after keys were put in one after another, each over the oldest of its class.

    Args:
        queue: (C, K, L). place: (C,) where each class's next key goes.
        keys: (M, L) and their classes (M,), any number of each.
    """
    size = queue.shape[1]
    one_hot = F.one_hot(classes, len(queue))  # (M, C)
    before = (one_hot.cumsum(0) - one_hot).gather(1, classes[:, None])[:, 0]  # earlier keys of the same class
    counts = one_hot.sum(0)
    slot = classes * size + (place[classes] + before) % size
    # Keys that later ones of the batch push out again go behind the end, so that no slot is written to twice.
    stays = before >= counts[classes] - size
    longer = torch.cat([queue.flatten(0, 1), keys[:1].to(queue.dtype)])
    longer[torch.where(stays, slot, len(longer) - 1)] = keys.to(queue.dtype)
    return longer[:-1].view_as(queue), (place + counts) % size


class SelfTuning(SemiAlgorithm):
    """Self-Tuning, alone or with mixed pairs of labelled and unlabelled samples.

        L = CE(f(x), y) + w (mean_x PGC(x, y) + mean_u PGC(u, argmax f(u))) + the loss of `pairs`

    PGC is `pseudo_group_contrast`: a query, the projected features of one view, is pulled to the key of the other view
    and to the last K keys of its class, labelled or pseudo-labelled, and away from the other classes' keys. A wrong
    pseudo-class thus puts one false key among K + 1. Keys are made by a second model and projector, an average of the
    weights, without gradient.

    Args:
        model: the pre-trained model, its weights in place. A copy becomes the key model; the model itself is not kept.
        dim: L, numbers in a key. The projector is one linear layer.
        queue: K, keys kept of each class.
        temperature: T.
        momentum: m; after each step key weights = m key weights + (1 - m) weights.
        weight: w.
        view: "weak" or "strong", of both views of the unlabelled samples. Pairs are mixed from the first one.
        head: name of the classifier in the model; "" takes its last linear layer.
        threshold: tau, in (0, 1]; for `pairs` alone, whose pseudo-classes are trusted where max softmax f(u) >= tau.
        pairs: mixes labelled samples with the first views (see `MixedPairs`); Self-Tuning + DM.

    Every pseudo-class counts, so `SemiOutput.weight` is 1; with `pairs` it is their trust. `SemiBatch.twin` is the
    other view of the labelled samples; without it their keys are of the same view. The classifier learns from the cross
    entropy (and pairs) alone. Labelled and unlabelled queries are two forwards, each with its own batch statistics of
    batch norm; so are their keys. Labelled keys are in the queue when the unlabelled queries see it; keys of one batch
    do not see each other. Queues start with random directions, drawn from torch's global generator like the projector's
    weights; a class that is never predicted keeps them. Of more than K keys of a class in a batch the last K are kept.
    Several processes put in all processes' keys, so all have the same queues. Key weights in half types stand still
    where a step is too small for the type.

    Reference: Wang et al. 2021 (arXiv:2102.12903); K 32, L 1024, T 0.07, m 0.999 and w 1 are the release's. It has the
    same loss less the constant log(K + 1), but moves the key weights twice a step, before the labelled and before the
    unlabelled keys, runs the unlabelled queries twice, and takes strong views, of the labelled samples too. `view` is
    "weak" as in the release of Decoupled Mixup, which projects with two layers and has no threshold for its pairs; the
    threshold here is FixMatch's.

    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    >>> algorithm = SelfTuning(model=model, dim=16, queue=5)
    >>> x, y, u = torch.rand(2, 8), torch.tensor([0, 1]), torch.rand(6, 8)
    >>> output = algorithm(model, SemiBatch(x, y, (u, u + 0.1 * torch.rand(6, 8)), twin=x + 0.1 * torch.rand(2, 8)))
    >>> algorithm.queue.shape, algorithm.place.tolist()[:2] != [0, 0]
    (torch.Size([4, 5, 16]), True)
    """

    views: tuple[str, ...] = ("weak", "weak")
    twins = True
    queue: Tensor
    place: Tensor

    def __init__(
        self,
        *,
        model: nn.Module,
        dim: int = 1024,
        queue: int = 32,
        temperature: float = 0.07,
        momentum: float = 0.999,
        weight: float = 1.0,
        view: str = "weak",
        head: str = "",
        threshold: float = 0.95,
        pairs: MixedPairs | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        layer = find_head(who, model, head)
        _check.integer(who, "dim", dim, 1)
        _check.integer(who, "queue", queue, 1)
        self.views = (_check.choice(who, "view", view, VIEWS),) * 2
        self.temperature = _check.positive(who, "temperature", temperature)
        self.momentum = _check.between(who, "momentum", momentum, 0.0, 1.0)
        self.weight = _check.non_negative(who, "weight", weight)
        self.head = head
        self.threshold = threshold_value(who, "threshold", threshold)
        self.pairs = check_pairs(who, pairs)
        device, dtype = layer.weight.device, wide(layer.weight.dtype)
        # Drawn on the CPU, wherever the model is: the same seed starts the same run on every device.
        self.projector = nn.Linear(layer.in_features, dim, device="cpu", dtype=dtype).to(device)
        self.key_model = copy.deepcopy(model).requires_grad_(False).train()
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        #: (C, K, L) the last keys of each class, and (C,) where the next one goes
        self.register_buffer(
            "queue", unit(torch.randn(layer.out_features, queue, dim, device="cpu", dtype=dtype)).to(device)
        )
        self.register_buffer("place", torch.zeros(layer.out_features, dtype=torch.long, device=device))

    def extra_repr(self) -> str:
        classes, size, dim = self.queue.shape
        return (
            f"dim={dim}, queue={size}, classes={classes}, temperature={self.temperature:g}, "
            f"momentum={self.momentum:g}, weight={self.weight:g}"
        )

    def set_progress(self, fraction: float) -> None:
        super().set_progress(fraction)
        if self.pairs is not None:
            self.pairs.set_progress(fraction)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for average, module in ((self.key_model, model), (self.key_projector, self.projector)):
            for key, weight in zip(average.parameters(), module.parameters(), strict=True):
                key.lerp_(weight, 1.0 - self.momentum)

    def encode(self, model: Forward, projector: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) logits, and (N, L) projected features of length 1."""
        logits, features = with_features(model, x, find_head(type(self).__name__, model, self.head))
        projected = projector(features.to(projector.weight.dtype))
        return logits, unit(projected.to(wide(projected.dtype)))

    def contrast(self, queries: Tensor, other: Tensor, classes: Tensor) -> Tensor:
        """The group contrast of queries with the keys of another view of them, a scalar; the keys join the queue."""
        with torch.no_grad():
            keys = self.encode(self.key_model, self.key_projector, other)[1]
        # Backward goes by the queue as it is now.
        queue = self.queue.clone()
        loss = pseudo_group_contrast(queries, keys, queue, classes, temperature=self.temperature).mean()
        queue, place = enqueue(queue, self.place, gather_rows(keys), gather_rows(classes))
        self.queue.copy_(queue)
        self.place.copy_(place)
        return loss

    def step(self, model: Forward, batch: SemiBatch, generator: Generator | None) -> SemiOutput:
        view, other = batch.views
        logits, queries = self.encode(model, self.projector, batch.x)
        labelled = class_loss(type(self).__name__, logits, batch.y)
        twin = batch.x if batch.twin is None else batch.twin
        first = self.contrast(queries, twin, batch.y)
        view_logits, view_queries = self.encode(model, self.projector, view)
        highest, pseudo = confidence(probabilities(view_logits))
        unlabelled = self.contrast(view_queries, other, pseudo)
        loss = labelled + self.weight * (first + unlabelled)
        parts = {"labelled": labelled, "labelled_contrast": first, "unlabelled": unlabelled}
        trust = torch.ones_like(highest)
        if self.pairs is not None:
            trust = confidence_mask(highest, self.threshold)
            parts["pair"] = self.pairs(model, batch.x, batch.y, view, pseudo, trust, generator=generator)
            loss = loss + parts["pair"]
        return SemiOutput(loss, {name: part.detach() for name, part in parts.items()}, pseudo, trust, logits.detach())
