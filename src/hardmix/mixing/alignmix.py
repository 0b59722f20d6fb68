"""AlignMix: mix feature maps after one of them was aligned with the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import wide
from hardmix.kernels.sinkhorn import sinkhorn
from hardmix.mixing.draw import LabelPairing, Pairing, move, uniform
from hardmix.mixing.gradients import model_input, undisturbed, without_ddp
from hardmix.mixing.hidden import ManifoldMixup
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget


class AlignMix(ManifoldMixup):
    """AlignMix: mix feature maps after moving the features of one to where those of the other are most alike.

        P = argmin <P, M> - e H(P), P 1 = P^T 1 = 1 / HW,   M_jk = |a_j - b_k|^2,   Q = HW P without a gradient
        h~_i = lam_i A + (1 - lam_i) B Q^T   or   lam_i A Q + (1 - lam_i) B,   each with probability 1/2

    A and B (C, HW) are the maps of row i and of its partner, a_j and b_k their columns: either the places of the own
    sample are kept or those of the partner; the label is lam_i of the own one both times. A batch is mixed there or, as
    one of the places, at the input, without alignment. Hooks, modes, copies and checkpointing are `ManifoldMixup`'s.

    Args:
        model, include_input, alpha, per, pairing: see `ManifoldMixup`. Whose places are kept is drawn as `per` says.
        layers: names of submodules with an output (N, C, H, W), or one name. "" is the one that finishes last among
            those that run once and whose map has more than one pixel, or else among all. It is found at the first draw,
            by a forward of one sample in evaluation mode.
        entropy: e, in the unit of squared distances between features, which are taken as they are, not normalised.
        iterations: of Sinkhorn's algorithm, see `hardmix.kernels.sinkhorn`.
    Shapes: images (N, C, H, W), square or not. N = 1, or a partner equal to the sample: its map is smoothed by its
    likeness to itself. Constant maps: Q is uniform and the mixture is that of `ManifoldMixup`. NaN in a map: the whole
    mixed map is NaN. Half types are aligned and mixed in float32 (float64 for float64) and rounded once.
    Cost: 2 `iterations` passes over N (HW)^2 values, and some four times as many in memory: meant for small maps.
    Reference: Venkataramanan et al. 2022 (arXiv:2103.15375). Taken from the authors' code: the input and the last map
    before the pooling at even odds, features as they are, entropy 0.1, alpha 2. It has one lambda and one direction a
    batch (`per="batch"`), and stops when the potentials of the rows move by less than 0.1 in sum, at 100 iterations at
    the latest, where the weights of a place may miss a sum of one. Here they never do, and `marginal_error` tells how
    far the plan is from its other marginal.
    """

    min_ndim = max_ndim = 4

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "",
        *,
        alpha: float = 2.0,
        entropy: float = 0.1,
        iterations: int = 100,
        include_input: bool = True,
        per: str = "sample",
        pairing: str | LabelPairing | None = None,
    ) -> None:
        names = (layers,) if isinstance(layers, str) else layers
        super().__init__(model, names, alpha=alpha, include_input=include_input, per=per, pairing=pairing)
        self.entropy = _check.positive("AlignMix", "entropy", entropy)
        self.iterations = _check.integer("AlignMix", "iterations", iterations, 1)
        self._last: AlignedPlan | None = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, entropy={self.entropy:g}, iterations={self.iterations}"

    @property
    def marginal_error(self) -> Tensor | None:
        """(N,) how far the worst place of the moved map is from giving away 1 / HW, relative to it, in the batch that
        was drawn last; None if that was mixed at the input, or not yet."""
        return None if self._last is None else self._last.error

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model` (and take them off the one before); where the layer is still to be found, at the
        next draw."""
        if self.layers != ("",):
            super().attach(model)
            return
        model = without_ddp(model)
        self._put_hooks(model, ())

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        plan = super().draw(x, y, pairing, generator)
        keep = self._rows(pairing, uniform(0.0, 1.0, (self._count(x.shape[0]),), generator)) < 0.5
        return AlignedPlan(plan, move(keep, x.device), self.entropy, self.iterations)

    @staticmethod
    def mix_layer(plan: Any, output: Tensor) -> Tensor:
        mixed: Tensor = plan.align(output)
        return mixed

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x, target): `x` mixed, or as it is and a layer armed to mix."""
        state = self._state
        if state.attached and not state.names and self.layers == ("",):
            model = None if state.model is None else state.model()
            if model is None:
                raise RuntimeError("AlignMix: the model is gone; call attach(model) with the one that is trained.")
            self._put_hooks(model, (last_map(model, _check.batch("AlignMix", "x", x, 4, 4)),))
        out = super().forward(x, y, generator=generator, kind=kind)
        self._last = state.plan if isinstance(state.plan, AlignedPlan) else None
        return out


class AlignedPlan(MixPlan):
    """A plan whose `align` mixes feature maps; whatever else it blends, it blends as a plan without a mask.

    Attributes:
        keep: (N,) bool, whether the places of the own sample are kept, or those of the partner.
        error: (N,) marginal error of the maps that were aligned last, or None.
    """

    __slots__ = ("entropy", "error", "iterations", "keep")

    def __init__(self, plan: MixPlan, keep: Tensor, entropy: float, iterations: int) -> None:
        super().__init__(plan.partner, plan.lam, shift=plan.shift)
        self.keep = keep
        self.entropy = entropy
        self.iterations = iterations
        self.error: Tensor | None = None

    def to(self, device: torch.device | str) -> AlignedPlan:
        return AlignedPlan(super().to(device), move(self.keep, device), self.entropy, self.iterations)

    def align(self, x: Tensor) -> Tensor:
        """Mixed maps (N, C, H, W) of the maps `x`, in its dtype and memory format; gradients flow through both maps."""
        self._check_rows("AlignMix", x)
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"AlignMix: a layer returned a tensor of shape {tuple(x.shape)} and dtype {x.dtype}; "
                "name a layer that returns floating-point maps (N, C, H, W)."
            )
        # Autocast would form the distances in a half type, whose error is larger than the entropy.
        with torch.autocast(x.device.type, enabled=False):
            own = x.flatten(2).to(wide(x.dtype))  # (N, C, HW)
            other = own.index_select(0, self.partner)
            keep, lam = self.keep.view(-1, 1, 1), self.lam.view(-1, 1, 1).to(own.dtype)
            kept, moved = torch.where(keep, own, other), torch.where(keep, other, own)
            with torch.no_grad():
                plan, self.error = sinkhorn(_distances(kept, moved), entropy=self.entropy, iterations=self.iterations)
                weight = plan.mul_(plan.shape[2])  # (N, HW kept, HW moved)
            mixed = torch.lerp(moved @ weight.transpose(1, 2), kept, torch.where(keep, lam, 1.0 - lam))
        mixed = mixed.view(x.shape).to(x.dtype)
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            mixed = mixed.contiguous(memory_format=torch.channels_last)
        return mixed


def last_map(model: nn.Module, x: Tensor) -> str:
    """Name of the module that gives the last map (N, C, H, W) in a forward on the first sample of `x`; see
    `AlignMix`."""
    maps: dict[str, bool] = {}  # name of each that returned a map, in the order of finishing -> has several pixels
    calls: dict[str, int] = {}

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if isinstance(output, Tensor) and output.ndim == 4:
            maps[name] = output.shape[2] * output.shape[3] > 1

    sample = model_input("AlignMix", model, x[:1])
    handles = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        with undisturbed(model, batch_statistics=False), torch.no_grad():
            model(sample)
    except Exception as error:
        raise ValueError(
            f"AlignMix: layers is '' but the model can't be run on a sample of shape {tuple(sample.shape)} to find its "
            f"last map ({type(error).__name__}: {error}); name the layers."
        ) from None
    finally:
        torch.clear_autocast_cache()  # weights cast without a graph must not serve the training forward
        for handle in handles:
            handle.remove()
    # A module that runs twice would mix where it runs first.
    once = {name: several for name, several in maps.items() if calls[name] == 1}
    several = [name for name in once if once[name]] or list(once)
    if not several:
        raise ValueError(
            "AlignMix: layers is '' but no part of the model returns maps (N, C, H, W); name a layer that does, "
            "or take ManifoldMixup."
        )
    return several[-1]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances between the columns of (N, C, J) and (N, C, K). (N, J, K)"""
    # What is common to all columns changes no distance, and costs digits.
    middle = 0.5 * (a.mean(2, keepdim=True) + b.mean(2, keepdim=True))
    a, b = a - middle, b - middle
    lengths = a.square().sum(1)[:, :, None] + b.square().sum(1)[:, None, :]
    return torch.baddbmm(lengths, a.transpose(1, 2), b, alpha=-2.0).clamp_(min=0.0)
