"""AttentiveMix: keep the cells that a network looks at, show the partner everywhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import Pairing, move
from hardmix.mixing.gradients import check_layer, check_model, hidden_map, without_ddp
from hardmix.mixing.plan import MixPlan


class AttentiveMix(AskingPolicy):
    """Attentive CutMix: the cells of x_i that a network answers to most are pasted onto the partner.

        a = mean over the channels of the network's map of x_i, averaged onto at most grid x grid cells
        x~_i = x_i in the k cells with the largest a, x_{partner_i} elsewhere;   lam = share of the pixels that is kept
        k = cells,   or with `plus`  k = max(1, floor(lam' G)),   G the number of cells, lam' ~ Beta(alpha, alpha)

    lam is small: 6 of 49 cells are 0.12. One forward of the network for each batch, in evaluation mode and without a
    gradient, and one copy of the batch.

    Args:
        model: the network that is asked: a pretrained one that stays as it is, or the one that is trained. It is no
            part of the policy, which has no parameters.
        layer: name of the submodule whose map (N, D, h, w) is read. "" stands for the last one with more than one
            pixel; the first forward finds it and sets `layer` to its name.
        cells: k, less than the map has cells.
        grid: cells a side, at most. A map with fewer pixels has a cell for each, along each axis.
        plus: draw k for each sample.
        alpha, per, pairing: see `Policy`; alpha and per matter with `plus` only.

    Shapes: (N, C, H, W) floats, square or not; the network gets them as they are. Pixel r of H belongs to row
    floor(r g / H) of the g rows of cells. N = 1 is its own partner. Equal cells: the first in reading order, so a flat
    map keeps the top; NaN counts as the largest.

    Raises:
        ValueError: a layer that the model doesn't have or that puts out no map, `cells` that leave no room for the
            partner.

    Reference: Walawalkar et al. 2020 (arXiv:2003.13048), who keep 6 cells of the 7 x 7 map of a pretrained ResNet-50.
    How they bring the channels to one number we could not establish; the mean, and `plus`, are OpenMixup's. Its lam is
    that of row 0, and it enlarges images to 224 pixels for the network; here images stay as they are.
    """

    min_ndim = max_ndim = 4

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str = "",
        cells: int = 6,
        grid: int = 7,
        plus: bool = False,
        alpha: float = 1.0,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, per=per, pairing=pairing)
        who = "AttentiveMix"
        self.layer = layer
        self.attach(model)
        self.cells = _check.integer(who, "cells", cells, 1)
        self.grid = _check.integer(who, "grid", grid, 1)
        self.plus = _check.boolean(who, "plus", plus)

    def extra_repr(self) -> str:
        count = "plus=True" if self.plus else f"cells={self.cells}"
        return f"layer={self.layer!r}, {count}, grid={self.grid}, {super().extra_repr()}"

    def attach(self, model: nn.Module) -> None:
        """Ask `model` from now on, which has a layer of this name."""
        model = without_ddp(check_model("AttentiveMix", model))
        check_layer("AttentiveMix", "layer", model, self.layer)
        super().attach(model)

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        self.layer, found = hidden_map("AttentiveMix", self._model(), x, self.layer)
        size = tuple(x.shape[2:])
        down, across = (min(self.grid, *lengths) for lengths in zip(found.shape[2:], size, strict=True))
        found = found.mean(1, keepdim=True, dtype=wide(found.dtype))
        strength = F.adaptive_avg_pool2d(found, (down, across)).flatten(1)
        count = strength.shape[1]
        if self.plus:
            kept = (self._lam(pairing, generator) * count).floor_().clamp_(min=1.0)
        elif self.cells < count:
            kept = torch.full((1,), float(self.cells), dtype=torch.float32, device=CPU)
        else:
            raise ValueError(
                f"AttentiveMix: cells is {self.cells} but the map of layer {self.layer!r} has {down} x {across} "
                "cells; keep fewer, or name an earlier layer."
            )
        order = strength.argsort(dim=1, descending=True, stable=True)
        wins = (torch.arange(count, device=x.device) < move(kept, x.device)[:, None]).to(torch.float32)
        mask = torch.empty_like(strength, dtype=torch.float32).scatter_(1, order, wins.expand_as(order))
        mask = mask.view(-1, 1, down, across)
        for axis, (length, parts) in enumerate(zip(size, (down, across), strict=True), 2):
            mask = mask.index_select(axis, torch.arange(length, device=x.device) * parts // length)
        return MixPlan(move(pairing.partner, x.device), None, mask, shift=pairing.shift)
