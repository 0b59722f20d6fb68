"""What the policies that read a vision transformer's attention share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix._math import is_autocast
from hardmix.mixing.attention import AttentionTap, Grid, Keep
from hardmix.mixing.attention_reader import Attention
from hardmix.mixing.draw import LabelPairing, Pairing
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.policy import Policy
from hardmix.mixing.target import MixedTarget


class AttentionPolicy(Policy):
    """A policy that holds a tap on a vision transformer. Images (N, C, H, W) only.

    The model is no submodule of the policy: it adds nothing to its parameters and its state_dict. A copied or unpickled
    policy has no model; call `attach(model)`.
    """

    min_ndim = max_ndim = 4

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        layer: str | None = None,
        every: bool = False,
        patch: int | None = None,
        per: str = "sample",
        pairing: str | LabelPairing | None = None,
    ) -> None:
        super().__init__(alpha=alpha, per=per, pairing=pairing)
        self.tap = AttentionTap(model, layer=layer, every=every, patch=patch, who=type(self).__name__)
        self._autocast: torch.dtype | None = None
        self._grid: Grid | None = None

    def attach(self, model: nn.Module) -> None:
        """Read `model` from now on."""
        self.disarm()
        self.tap.attach(model)

    def detach(self) -> None:
        """Take the hooks off the model and forget it."""
        self.disarm()
        self.tap.detach()

    def disarm(self) -> None:
        """Take back a draw that was not trained with, for a step that is skipped on purpose."""
        self.tap.disarm()

    def _draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        # Autocast is off inside `draw`, but a forward of the model belongs under the one that it is trained under.
        kind = x.device.type
        if not is_autocast(kind):
            return super()._draw(x, y, pairing, generator)
        self._autocast = torch.get_autocast_dtype(kind)
        try:
            return super()._draw(x, y, pairing, generator)
        finally:
            self._autocast = None

    def _measure(self, x: Tensor, *, by_patches: bool = False) -> tuple[Any, Tensor, Grid]:
        """(output, map (N, rows, columns), its grid) of a forward of the clean batch, without a gradient."""
        output, (found,) = self.tap.measure(x, keep=self._keep_map(x, by_patches), autocast=self._autocast)
        assert self._grid is not None
        return output, found, self._grid

    def _keep_map(self, x: Tensor, by_patches: bool = False) -> Keep:
        """Keeps the map of the patches of images like `x`, and their grid in `_grid`."""
        size = (x.shape[2], x.shape[3])

        def keep(attention: Attention) -> Tensor:
            self._grid = self.tap.grid(size, attention.tokens)
            return self.tap.patch_map(attention, self._grid, by_patches=by_patches)

        return keep


class LabelPolicy(AttentionPolicy):
    """A policy whose labels are weighed once the model has seen the mixed batch.

    `forward` mixes, labels by area and arms the tap; the next forward of the model in training mode is read; `relabel`
    weighs the labels with what was read. Each draw is followed by one training forward and by `relabel`: a draw that
    was not is an error at the next, where `disarm` takes it back. Forwards in evaluation mode are never read.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._plan: MixPlan | None = None

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x_mixed, target) with labels by area, and the model armed to be read."""
        who = type(self).__name__
        if self._plan is not None:
            raise RuntimeError(
                f"{who}: the draw before was not trained with; run the model once in training mode after each draw and "
                "hand its target to relabel, or call disarm()."
            )
        plan, target = self._plan_and_target(x, y, generator, kind)
        if target.weights.ndim != 2:
            raise ValueError(
                f"{who}: y has shape {tuple(y.shape)}, a dense mask, but attention weighs whole images; pass one label "
                "per sample."
            )
        self._arm(plan, x)
        self._plan = plan
        return plan.blend(x), target

    def relabel(self, logits: Tensor, target: MixedTarget) -> MixedTarget:
        """`target` with shares by what the model attended to."""
        who = type(self).__name__
        if self._plan is None:
            raise RuntimeError(f"{who}: relabel has no draw to relabel; call the policy on a batch first.")
        plan, kept = self._plan, self.tap.take()
        if not kept:
            raise RuntimeError(
                f"{who}: relabel has no attention; run the model once, in training mode, between the draw and relabel, "
                "and set torch._dynamo.config.skip_nnmodule_hook_guards = False before a model is compiled."
            )
        if target.weights.shape != (len(plan), 2):
            raise ValueError(
                f"{who}: target.weights has shape {tuple(target.weights.shape)} but the draw has {len(plan)} rows; "
                "pass the target that came with it."
            )
        self._plan = None
        with torch.no_grad():
            own = self._share(plan, kept, logits, target)
        return target._replace(weights=torch.stack([own, 1.0 - own], 1).to(target.weights.dtype))

    def disarm(self) -> None:
        super().disarm()
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the model and without a draw that waits for its forward."""
        return {**self.__dict__, "_plan": None}

    def _arm(self, plan: MixPlan, x: Tensor) -> None:
        """Arm the tap for the mixed batch; by default to keep the map of the patches."""
        self.tap.arm(images=len(plan), keep=self._keep_map(x))

    def _share(self, plan: MixPlan, kept: list[Tensor], logits: Tensor, target: MixedTarget) -> Tensor:
        """(N,) the own share, from what the tap kept."""
        raise NotImplementedError


def patch_share(mask: Tensor, grid: Grid) -> Tensor:
    """(N, rows, columns): the own share of each patch, from that of each pixel (N, 1, H, W)."""
    covered = mask[:, :, : grid.rows * grid.height, : grid.columns * grid.width]
    return F.avg_pool2d(covered, (grid.height, grid.width))[:, 0]


def pixel_share(own: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """(N, 1, H, W) from the own share of each patch (N, rows, columns); pixels that no patch covers are the own."""
    pixels = own.repeat_interleave(grid.height, 1).repeat_interleave(grid.width, 2)
    below, right = size[0] - pixels.shape[1], size[1] - pixels.shape[2]
    return F.pad(pixels, (0, right, 0, below), value=1.0)[:, None]
