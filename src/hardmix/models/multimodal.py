"""An encoder for each modality and one for all of them together, of which some may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import unit


class Multimodal(NamedTuple):
    """What is made of a batch.

    Attributes:
        logits: (N, C).
        latents: name -> (N, D) unit rows, of the modalities that are there.
        joint: (N, D) unit rows; None where a modality is missing.
    """

    logits: Tensor
    latents: dict[str, Tensor]
    joint: Tensor | None


class MultimodalNet(nn.Module):
    """GMC's model: modalities and their joint as points on one sphere, and a classifier that reads any of them.

        x^m = unit(P A_m f_m(input m))                    the latent of modality m
        z   = unit(P g(f_1(input 1), ..., f_K(input K)))  the joint, if no modality is missing
        logits = C(z)  or  C(mean of the x^m that are there),    C(v) = linear(v + MLP(v))

    f_m are the encoders, A_m linear layers to a common width D, g an MLP of the concatenated features, and P, which all
    share, a linear layer. Train C on complete samples, with a loss such as `GMCLoss` of latents and joint, which makes
    each latent a stand-in for the joint.

    Args:
        encoders: name -> encoder: inputs (N, ...) -> features (N, F_m). Two or more.
        features: name -> F_m.
        num_classes: C.
        dim: D; 60 is that of the authors.
        width: of the hidden layer of g.
        dropout: share of the features that is left out in training, before A_m and g.

    Reference: Poklukar et al. 2022 (arXiv:2202.03390). Their joint encoder reads the inputs anew; here it reads the
    features of the others, which are computed once.

    >>> net = MultimodalNet({"a": nn.Identity(), "b": nn.Identity()}, {"a": 4, "b": 3}, num_classes=2)
    >>> net({"a": torch.zeros(5, 4), "b": None}).logits.shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        features: Mapping[str, int],
        *,
        num_classes: int,
        dim: int = 60,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        who = "MultimodalNet"
        if len(encoders) < 2:
            raise ValueError(f"{who}: encoders has {len(encoders)} entries; pass two or more, one per modality.")
        for name in encoders:
            if not str(name).isidentifier() or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"{who}: encoders has the name {name!r}; pass words of letters, digits and underscores."
                )
        if sorted(features) != sorted(encoders):
            raise ValueError(
                f"{who}: features is for {sorted(features)} but encoders for {sorted(encoders)}; pass one number each."
            )
        for name, value in (("num_classes", num_classes), ("dim", dim), ("width", width)):
            _check.integer(who, name, value, 1)
        sizes = [_check.integer(who, f"features of {name}", features[name], 1) for name in encoders]
        self.names = tuple(encoders)
        self.encoders = nn.ModuleDict(encoders)
        self.dropout = nn.Dropout(_check.between(who, "dropout", dropout, 0.0, 1.0))
        self.common = nn.ModuleDict({name: nn.Linear(size, dim) for name, size in zip(encoders, sizes, strict=True)})
        self.joint = nn.Sequential(nn.Linear(sum(sizes), width), nn.ReLU(), nn.Linear(width, dim))
        self.projection = nn.Linear(dim, dim)
        self.hidden = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, inputs: Mapping[str, Tensor | None]) -> Multimodal:
        """Latents, joint and logits of the modalities that are there; one that is None or not named is missing.

        Raises:
            ValueError: a name that there is no encoder for, no modality at all, or different numbers of samples.
        """
        features = self._features(inputs)
        latents = {name: self._on_sphere(self.common[name](x)) for name, x in features.items()}
        joint = None
        if len(features) == len(self.names):
            joint = self._on_sphere(self.joint(torch.cat([features[name] for name in self.names], 1)))
        latent = torch.stack(list(latents.values())).mean(0) if joint is None else joint
        return Multimodal(self.head(latent + self.hidden(latent)), latents, joint)

    def _features(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        who = "MultimodalNet"
        for name in inputs:
            _check.choice(who, "a modality of inputs", name, self.names)
        found: dict[str, Tensor] = {}
        for name in self.names:
            if (x := inputs.get(name)) is not None:
                found[name] = self.dropout(self.encoders[name](_check.tensor(who, name, x)))
        if not found:
            raise ValueError(f"{who}: inputs has no modality; pass at least one of {', '.join(map(repr, self.names))}.")
        first = next(iter(found))
        for name, x in found.items():
            _check.same_length(who, name, x, first, len(found[first]))
        return found

    def _on_sphere(self, x: Tensor) -> Tensor:
        return unit(self.projection(x))
