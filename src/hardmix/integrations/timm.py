"""timm's Mixup with one line changed: `from hardmix.integrations.timm import Mixup`. timm itself is not imported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix.kernels.blend import box_mask
from hardmix.mixing import MixPlan, Policy
from hardmix.mixing.draw import Pairing, cpu_generator, draw_lam, uniform
from hardmix.mixing.plan import full_box_share
from hardmix.mixing.static import cut_box, cut_side, whole_pixels

#: timm's word for how often lambda, the box and the choice of policy are drawn -> ours
_PER = {"batch": "batch", "pair": "pair", "elem": "sample"}


class Mixup:
    """Mixup and CutMix of a batch, with dense soft labels: timm's arguments, defaults and results.

        x~_i = m_i x_i + (1 - m_i) x_{B-1-i},   y~_i = (1 - s) (lam_i onehot_i + (1 - lam_i) onehot_{B-1-i}) + s / C

    m is lambda, or CutMix's box as a mask; s is the label smoothing, and with `multi_label` the last term is s / 2.

    Args:
        mixup_alpha, cutmix_alpha: parameters of Beta(alpha, alpha); 0 switches Mixup or CutMix off.
        cutmix_minmax: smallest and largest side of CutMix's box as shares of each axis, instead of `cutmix_alpha`.
        prob: probability that a batch, pair or element is mixed at all.
        switch_prob: probability of CutMix rather than Mixup where both are on.
        mode: "batch", "pair" or "elem": what one draw is for.
        correct_lam: count lambda from the clipped box. Always so with `cutmix_minmax`.
        label_smoothing, num_classes: s and C. As in timm, s is 0.1 unless it is given.
        multi_label: targets are multi-hot rows (B, C).
        generator: CPU generator to draw from; None takes torch's global one, never NumPy's. In a `collate_fn` that runs
            in several workers leave it out: each worker would hold a copy and draw the same numbers.

    Attributes:
        mixup_enabled: timm's loops clear it for the last epochs. Targets stay dense and smoothed.
        policy: draws the plans; `mix.policy.plan(x)` gives one that also mixes masks and second views.

    Differs from timm: `x` is never written; odd batches work, their middle row meets itself; uint8 images are blended
    and rounded; a box has as many axes as the image, so volumes are cut right; its sides are rounded, not truncated;
    float targets, masks, and rows without `multi_label` are refused instead of being read as class ids.

    >>> mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10, generator=torch.Generator().manual_seed(0))
    >>> x, target = mix(torch.rand(5, 3, 32, 32), torch.arange(5))
    >>> target.shape, bool(target.min() > 0)
    (torch.Size([5, 10]), True)
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        generator: Generator | None = None,
    ) -> None:
        who = "Mixup"
        _check.choice(who, "mode", mode, _PER)
        self.policy = MixupOrCutMix(
            mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob, per=_PER[mode], correct_lam=correct_lam
        )
        self.label_smoothing = _check.between(who, "label_smoothing", label_smoothing, 0.0, 1.0)
        self.num_classes = _check.integer(who, "num_classes", num_classes, 1)
        self.multi_label = multi_label
        self.generator = cpu_generator(who, generator)
        self.mixup_enabled = True

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(x_mixed, dense) of images (B, C, H, W) and class ids (B,) or multi-hot rows (B, C); dense is float32 (B, C).

        Series (B, C, L), volumes (B, C, D, H, W) and, without CutMix, features (B, D) are mixed as well.
        """
        x = _check.batch("Mixup", "x", x, self.policy.min_ndim)
        self._check_target(target)
        _check.same_length("Mixup", "target", target, "x", x.shape[0])
        plan = MixPlan.identity(x.shape[0], x.device)
        if self.mixup_enabled:
            plan = self.policy.plan(x, generator=self.generator)
        if not self.multi_label:
            return plan.blend(x), plan.target(target.long()).dense(self.num_classes, self.label_smoothing)
        dense = plan.target(target.float()).dense()
        return plan.blend(x), dense * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing

    def _check_target(self, target: object) -> None:
        y = _check.tensor("Mixup", "target", target)
        rows = y.ndim == 2 and y.shape[1] == self.num_classes
        if self.multi_label:
            good, remedy = rows, f"pass multi-hot rows (B, {self.num_classes})"
        else:
            ids = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
            good, remedy = y.ndim == 1 and ids, "pass class ids (B,)"
            if rows:
                remedy += ", or multi_label=True for multi-hot rows"
            elif y.ndim < 3:
                remedy += ", or mix numbers and soft labels with hardmix.mixing.Mixup"
            else:
                remedy += ", or mix masks with a plan of hardmix.mixing: plan.blend(x), plan.target(masks)"
        if not good:
            raise ValueError(f"Mixup: target has shape {tuple(y.shape)} and dtype {y.dtype}; {remedy}.")


class MixupOrCutMix(Policy):
    """Mixup, CutMix or neither, drawn for each batch, pair or sample; rows i and B-1-i are partners."""

    def __init__(
        self,
        mixup_alpha: float,
        cutmix_alpha: float,
        cutmix_minmax: Sequence[float] | None,
        prob: float,
        switch_prob: float,
        *,
        per: str,
        correct_lam: bool,
    ) -> None:
        super().__init__(per=per, pairing="reversal")
        who = "Mixup"
        self.mixup_alpha = _check.non_negative(who, "mixup_alpha", mixup_alpha)
        self.cutmix_alpha = _check.non_negative(who, "cutmix_alpha", cutmix_alpha)
        self.cutmix_minmax: tuple[float, float] | None = None
        if cutmix_minmax is not None:
            self.cutmix_alpha = 1.0
            self.cutmix_minmax = _check.interval(who, "cutmix_minmax", cutmix_minmax, 0.0, 1.0)
        if self.mixup_alpha == 0 and self.cutmix_alpha == 0:
            raise ValueError(f"{who}: mixup_alpha and cutmix_alpha are both 0; pass a positive one.")
        prob = _check.between(who, "prob", prob, 0.0, 1.0)
        switch = _check.between(who, "switch_prob", switch_prob, 0.0, 1.0)
        if self.mixup_alpha == 0 or self.cutmix_alpha == 0:
            switch = float(self.cutmix_alpha > 0)
        self.p = (prob * (1.0 - switch), prob * switch, 1.0 - prob)  # Mixup, CutMix, neither
        self.correct_lam = correct_lam
        self.min_ndim = 2 if self.cutmix_alpha == 0 else 3

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        rows, size = x.shape[0], tuple(x.shape[2:])
        drawn = torch.multinomial(torch.tensor(self.p), rows, replacement=True, generator=generator)
        kind = self._rows(pairing, drawn)
        blended, cut = kind == 0, kind == 1
        lam, box = torch.ones(rows), torch.zeros(rows, len(size), 2, dtype=torch.long)  # neither: all own, empty box
        if blended.any():
            lam = torch.where(blended, draw_lam(self.mixup_alpha, pairing, self.per, generator), lam)
        if not cut.any():
            return MixPlan(pairing.partner, lam).to(x.device)
        share, boxes = self._boxes(pairing, size, generator)
        lam, box = torch.where(cut, share, lam), torch.where(cut.view(-1, 1, 1), boxes, box)
        if not blended.any():
            return MixPlan(pairing.partner, lam, box=box, size=size).to(x.device)
        # Formed where the batch is: a mask is far larger than the boxes that it is made of.
        lam, box, blended = lam.to(x.device), box.to(x.device), blended.to(x.device)
        column = (-1, 1, *[1] * len(size))
        mask = torch.where(blended.view(column), lam.view(column), box_mask(box, size))
        return MixPlan(pairing.partner.to(x.device), lam, mask)

    def _boxes(self, pairing: Pairing, size: tuple[int, ...], generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Own shares (N,) and boxes (N, S, 2) of CutMix."""
        rows, axes = pairing.partner.shape[0], len(size)
        if self.cutmix_minmax is not None:
            at = self._rows(pairing, uniform(0.0, 1.0, (rows, axes, 2), generator))
            box = minmax_box(at[..., 0], at[..., 1], size, self.cutmix_minmax)
            return full_box_share(box, size), box
        lam = draw_lam(self.cutmix_alpha, pairing, self.per, generator)
        centre = self._rows(pairing, uniform(0.0, 1.0, (rows, axes), generator))
        box = cut_box(cut_side(lam, axes), whole_pixels(centre, size), size)
        return (full_box_share(box, size) if self.correct_lam else lam), box


def minmax_box(side: Tensor, at: Tensor, size: tuple[int, ...], minmax: tuple[float, float]) -> Tensor:
    """Boxes that lie inside the image: sides from floor(low L) to floor(high L) - 1 of each length L.

    Args:
        side, at: (N, S) in [0, 1), scaled to the range of sides and then to the places where that side fits.
    Returns:
        (N, S, 2) long, half-open [start, stop). Where the range is empty the side is floor(low L).
    """
    edges = []
    for axis, length in enumerate(size):
        low, high = (int(length * share) for share in minmax)
        pixels = low + (side[:, axis] * (high - low)).long()
        start = (at[:, axis] * (length + 1 - pixels)).long()
        edges.append(torch.stack([start, start + pixels], 1))
    return torch.stack(edges, 1)
