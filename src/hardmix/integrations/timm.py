"""timm's Mixup with one line changed: `from hardmix.integrations.timm import Mixup`. timm itself is not imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import CPU
from hardmix.kernels.blend import box_mask
from hardmix.mixing import MixPlan, Policy
from hardmix.mixing.draw import Pairing, cpu_generator, draw_lam, uniform
from hardmix.mixing.plan import full_box_share
from hardmix.mixing.static import cut_box, cut_side, whole_pixels

#: timm's word for how often lambda, the box and the choice of policy are drawn -> ours
_PER = {"batch": "batch", "pair": "pair", "elem": "sample"}


def _share(who: str, name: str, value: object) -> float:
    return _check.between(who, name, value, 0.0, 1.0)


def _sides(who: str, name: str, value: object) -> tuple[float, float] | None:
    return None if value is None else _check.interval(who, name, value, 0.0, 1.0)


#: what every value of an attribute has to pass, at the start and later
_CHECKS: dict[str, Callable[[str, str, object], Any]] = {
    "mixup_alpha": _check.non_negative,
    "cutmix_alpha": _check.non_negative,
    "cutmix_minmax": _sides,
    "mix_prob": _share,
    "switch_prob": _share,
    "mode": lambda who, name, value: _check.choice(who, name, value, _PER),
    "label_smoothing": _share,
    "num_classes": lambda who, name, value: _check.integer(who, name, value, 1),
}


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
        mix_prob: `prob`, as timm calls it. It and the other arguments are attributes that the next batch obeys.
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
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha if cutmix_minmax is None else 1.0
        self.cutmix_minmax = cutmix_minmax
        self.mix_prob = _share(who, "prob", prob)
        self.switch_prob = switch_prob
        self.mode = mode
        self.correct_lam = correct_lam
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.generator = cpu_generator(who, generator)
        self.mixup_enabled = True
        self.policy = MixupOrCutMix(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Loops may change a setting between batches, as timm's can be changed; it is checked then as at the start."""
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check("Mixup", name, value))

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(x_mixed, dense) of images (B, C, H, W) and class ids (B,) or (B, 1), or multi-hot rows (B, C); dense is
        float32 (B, C).

        Series (B, C, L), volumes (B, C, D, H, W) and, without CutMix, features (B, D) are mixed as well.
        """
        x = _check.batch("Mixup", "x", x, 3 if self.cutmix_alpha else 2)
        target = self._checked(target)
        _check.same_length("Mixup", "target", target, "x", x.shape[0])
        plan = MixPlan.identity(x.shape[0], x.device)
        if self.mixup_enabled:
            plan = self.policy.plan(x, generator=self.generator)
        if not self.multi_label:
            return plan.blend(x), plan.target(target.long()).dense(self.num_classes, self.label_smoothing)
        dense = plan.target(target.float()).dense()
        return plan.blend(x), dense * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing

    def _checked(self, target: object) -> Tensor:
        """Class ids (B,) or multi-hot rows (B, C)."""
        y = _check.tensor("Mixup", "target", target)
        rows = y.ndim == 2 and y.shape[1] == self.num_classes
        if self.multi_label:
            good, remedy = rows, f"pass multi-hot rows (B, {self.num_classes})"
        else:
            ids = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
            column = y.ndim == 2 and y.shape[1] == 1
            good, remedy = ids and (y.ndim == 1 or column), "pass class ids (B,)"
            if rows:
                remedy += ", or multi_label=True for multi-hot rows"
            elif y.ndim < 3:
                remedy += ", or mix numbers and soft labels with hardmix.mixing.Mixup"
            else:
                remedy += ", or mix masks with a plan of hardmix.mixing: plan.blend(x), plan.target(masks)"
        if not good:
            raise ValueError(f"Mixup: target has shape {tuple(y.shape)} and dtype {y.dtype}; {remedy}.")
        return y if self.multi_label else y.flatten()


class MixupOrCutMix(Policy):
    """Mixup, CutMix or neither, drawn for each batch, pair or sample by what `mix` is set to at the time; rows i and
    B-1-i are partners."""

    def __init__(self, mix: Mixup) -> None:
        super().__init__(per=_PER[mix.mode], pairing="reversal")
        self.mix = mix
        self._probabilities()  # settings that mix nothing are an error at once

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> MixPlan:
        """Draw one plan for the batch `x`; see `Policy.plan`."""
        self.per, self.min_ndim = _PER[self.mix.mode], 3 if self.mix.cutmix_alpha else 2
        return super().plan(x, y, generator=generator, partner=partner)

    def _probabilities(self) -> tuple[float, float, float]:
        """Of Mixup, CutMix and neither."""
        mix = self.mix
        if mix.mixup_alpha == 0 and mix.cutmix_alpha == 0:
            raise ValueError("Mixup: mixup_alpha and cutmix_alpha are both 0; pass a positive one.")
        switch = mix.switch_prob if mix.mixup_alpha and mix.cutmix_alpha else float(mix.cutmix_alpha > 0)
        return mix.mix_prob * (1.0 - switch), mix.mix_prob * switch, 1.0 - mix.mix_prob

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        rows, size = x.shape[0], tuple(x.shape[2:])
        chances = torch.tensor(self._probabilities(), dtype=torch.float32, device=CPU)
        drawn = torch.multinomial(chances, rows, replacement=True, generator=generator)
        kind = self._rows(pairing, drawn)
        blended, cut = kind == 0, kind == 1
        lam = torch.ones(rows, dtype=torch.float32, device=CPU)  # neither: all own, empty box
        box = torch.zeros(rows, len(size), 2, dtype=torch.long, device=CPU)
        if blended.any():
            lam = torch.where(blended, draw_lam(self.mix.mixup_alpha, pairing, self.per, generator), lam)
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
        if self.mix.cutmix_minmax is not None:
            at = self._rows(pairing, uniform(0.0, 1.0, (rows, axes, 2), generator))
            box = minmax_box(at[..., 0], at[..., 1], size, self.mix.cutmix_minmax)
            return full_box_share(box, size), box
        lam = draw_lam(self.mix.cutmix_alpha, pairing, self.per, generator)
        centre = self._rows(pairing, uniform(0.0, 1.0, (rows, axes), generator))
        box = cut_box(cut_side(lam, axes), whole_pixels(centre, size), size)
        return (full_box_share(box, size) if self.mix.correct_lam else lam), box


def minmax_box(side: Tensor, at: Tensor, size: tuple[int, ...], minmax: Sequence[float]) -> Tensor:
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
