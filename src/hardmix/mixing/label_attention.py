"""Policies that weigh the labels by what a vision transformer attends to in the mixed image: TransMix, MixPro,
TL-Align."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.mixing.attention import Grid
from hardmix.mixing.attention_policy import LabelPolicy, patch_share, pixel_share
from hardmix.mixing.attention_reader import Attention
from hardmix.mixing.draw import Pairing, move, uniform
from hardmix.mixing.field import largest
from hardmix.mixing.plan import MixPlan, full_box_share
from hardmix.mixing.static import CutMix, cut_box, cut_side, whole_pixels
from hardmix.mixing.target import MixedTarget


class TransMix(LabelPolicy, CutMix):
    """TransMix: CutMix, with labels by what the class token attends to.

        x~ as in CutMix;   lam = (1 - w) lam_area + w lam_attn,   lam_attn = sum_j A_j M_j / sum_j A_j

    A is the last block's attention of the class token on the patches of the mixed image, the mean over the heads; M_j
    the own share of patch j. `x, target = mix(x, y)` labels by area; `relabel`, after the forward, by the line above.

    Args:
        model: the vision transformer that is trained; see `AttentionTap` for which, and for `layer` and `patch`.
        attention: w, the share of lam that the attention decides.
        layer: name of the attention module to read; None takes the last block's.
        patch: side of a patch in pixels; None finds it.
        alpha, per, pairing: see `Policy`.

    The order is draw, one forward of the model in training mode, `relabel`; see `LabelPolicy` for what happens else.
    Edges: same class: two shares of one label. N = 1: the sample with itself. Flat attention: lam_attn is the share of
    the patches, that is lam_area but for pixels that no patch covers. Half types: the attention is computed in float32.
    uint8 images are mixed; the model is never run by the policy. NaN attention, of a model that has diverged: NaN
    shares. A model without a class token: what the patches give each other on average. Dense masks are refused.
    Cost: CutMix's, and the last block's projections once more.
    Reference: Chen et al. 2022 (arXiv:2111.09833), where w is 1; the authors' code takes w = 0.5, as here. It
    samples M at one pixel of each patch and has one box per batch; here a cut patch counts for what shows of it, and
    each sample has its own box. The attention carries no gradient into the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        attention: float = 0.5,
        layer: str | None = None,
        patch: int | None = None,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, layer=layer, patch=patch, per=per, pairing=pairing)
        self.attention = _check.between("TransMix", "attention", attention, 0.0, 1.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, attention={self.attention:g}"

    def _share(self, plan: MixPlan, kept: list[Tensor], logits: Tensor, target: MixedTarget) -> Tensor:
        by_attention = attended_share(plan, kept[0], self._grid)
        return torch.lerp(plan.lam.to(by_attention.dtype), by_attention, self.attention)


class MixPro(LabelPolicy):
    """MixPro: whole cells of patches from either image, with labels that trust the attention as far as the model is
    right.

        M: ceil(lam' K) of the K cells, drawn at random, show x_i, the others its partner;   lam_area = mean M
        lam = s lam_attn + (1 - s) lam_area,   s = cos(smooth(lam_area y_i + (1 - lam_area) y_p(i)), softmax(logits))

    lam' ~ Beta(alpha, alpha); lam_attn as in `TransMix`. A cell is a whole number of patches wide, and the last cell of
    an axis may be cut off by the border.

    Args:
        model: the vision transformer that is trained; see `AttentionTap` for which, and for `layer` and `patch`.
        cells: number of cells across the shorter side; the nearest whole number of patches is taken for a cell's side.
        smoothing: label smoothing of the target in s.
        layer: name of the attention module to read; None takes the last block's.
        patch: side of a patch in pixels; None takes it from the patch embedding, a `Conv2d` whose stride is its kernel.
        alpha, per, pairing: see `Policy`.

    The order is draw, one forward of the model in training mode, `relabel`; see `LabelPolicy` for what happens else.
    Edges: as `TransMix`. s is in [0, 1]: two vectors without negative entries.
    Cost: a mask of one number per pixel, and the last block's projections once more.
    Reference: Zhao et al. 2023 (arXiv:2304.12043), read through the authors' code. It takes cells of 4 x 4
    patches (4 across for DeiT at 224 pixels in patches of 14, as here) and needs them to divide the image; one lam' per
    batch, here one per sample; and lets gradients into lam, here none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        cells: int = 4,
        smoothing: float = 0.1,
        layer: str | None = None,
        patch: int | None = None,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, layer=layer, patch=patch, per=per, pairing=pairing)
        self.cells = _check.integer("MixPro", "cells", cells, 1)
        self.smoothing = _check.between("MixPro", "smoothing", smoothing, 0.0, 1.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cells={self.cells}, smoothing={self.smoothing:g}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = (x.shape[2], x.shape[3])
        grid = self.tap.grid(size)
        side = max(1, round(min(grid.rows, grid.columns) / self.cells))  # patches
        down, across = -(-grid.rows // side), -(-grid.columns // side)
        keep = (self._lam(pairing, generator) * (down * across)).ceil_().long()
        order = self._rows(pairing, uniform(0.0, 1.0, (self._count(x.shape[0]), down * across), generator))
        cells = largest(order, keep).view(-1, down, across)
        own = cells.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, : grid.rows, : grid.columns]
        # Bits travel to the device; the pixels are made there.
        mask = pixel_share(move(own, x.device).to(torch.float32), grid, size)
        return MixPlan(move(pairing.partner, x.device), None, mask, shift=pairing.shift)

    def _share(self, plan: MixPlan, kept: list[Tensor], logits: Tensor, target: MixedTarget) -> Tensor:
        by_attention = attended_share(plan, kept[0], self._grid)
        probs = logits.to(wide(logits.dtype)).softmax(1)
        dense = target.dense(logits.shape[1], self.smoothing).to(probs.dtype)
        right = F.cosine_similarity(dense, probs, dim=1)
        return torch.lerp(plan.lam.to(by_attention.dtype), by_attention, right.to(by_attention.dtype))


class TLAlign(LabelPolicy):
    """TL-Align: CutMix in whole patches, with labels that go through the layers together with the tokens.

        t_0 = own share of each patch, lam_area for the class token;   t_l = (A_l t_{l-1} + t_{l-1}) / 2;   lam = t_L

    A_l is the attention of block l, the mean over the heads; the residual connection is the other half. lam is read at
    the class token after the last block. Only attention moves labels: norms and MLPs act on each token alone.

        box sides sqrt(1 - lam') (rows, columns) of patches, centre uniform over the patches, clipped;  lam' ~ Beta

    Args:
        model: the vision transformer that is trained; see `AttentionTap` for which, and for `patch`.
        patch: side of a patch in pixels; None takes it from the patch embedding, a `Conv2d` whose stride is its kernel.
        alpha, per, pairing: see `Policy`.

    The order is draw, one forward of the model in training mode, `relabel`; see `LabelPolicy` for what happens else.
    Edges: as `TransMix`. A model without a class token: the mean over the patches.
    Cost: CutMix's, each block's projections once more, and its attention (N, heads, T, T), one block at a time.
    Reference: Xiao et al. 2023, section 3 (arXiv:2210.06455), and the authors' code, which has one box per batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        patch: int | None = None,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, every=True, patch=patch, per=per, pairing=pairing)

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = (x.shape[2], x.shape[3])
        grid = self.tap.grid(size)
        lam = self._lam(pairing, generator)
        centre = self._rows(pairing, uniform(0.0, 1.0, (x.shape[0], 2), generator))
        patches = (grid.rows, grid.columns)
        box = cut_box(cut_side(lam, 2), whole_pixels(centre, patches), patches)
        box = box * torch.tensor([[grid.height], [grid.width]], device=CPU)
        plan = MixPlan(pairing.partner, full_box_share(box, size), box=box, size=size, shift=pairing.shift)
        return plan.to(x.device)

    def _arm(self, plan: MixPlan, x: Tensor) -> None:
        size = (x.shape[2], x.shape[3])
        mask = plan.mask
        assert mask is not None
        share: list[Tensor] = []  # (N, T), of the layer before

        def follow(attention: Attention) -> Tensor:
            weights = attention.weights()  # (N, heads, T, T)
            if not share:
                self._grid = self.tap.grid(size, attention.tokens)
                own = patch_share(mask, self._grid).flatten(1)
                share.append(torch.cat([plan.lam[:, None].expand(-1, self._grid.prefix), own], 1).to(weights.dtype))
            before = share[0]
            if weights.shape[2:] != (before.shape[1],) * 2:
                raise ValueError(
                    f"TLAlign: a block attends from {weights.shape[2]} tokens to {weights.shape[3]} where there were "
                    f"{before.shape[1]} before; labels only go through blocks that keep their tokens."
                )
            # The mean over the heads comes last: it is of T numbers then, not of T x T.
            share[0] = 0.5 * ((weights @ before[:, None, :, None]).mean(1)[:, :, 0] + before)
            return share[0]

        self.tap.arm(images=len(plan), keep=follow)

    def _share(self, plan: MixPlan, kept: list[Tensor], logits: Tensor, target: MixedTarget) -> Tensor:
        assert self._grid is not None
        last = kept[-1]
        return last[:, 0] if self.tap.has_class_token(self._grid) else last[:, self._grid.prefix :].mean(1)


def attended_share(plan: MixPlan, patches: Tensor, grid: Grid | None) -> Tensor:
    """(N,) the part of the attention (N, rows, columns) that falls on the own sample."""
    mask = plan.mask
    assert mask is not None
    assert grid is not None
    own = patch_share(mask, grid).to(patches.dtype)
    return (patches * own).sum((1, 2)) / patches.sum((1, 2))
