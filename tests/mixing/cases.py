"""The policies under test, and slow references that share no code with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hardmix.mixing import (
    AugMix,
    CutMix,
    FMix,
    GridMix,
    MixPlan,
    Mixup,
    Policy,
    RandomChoice,
    ResizeMix,
    SaliencyMix,
    Scheduled,
    SmoothMix,
)

#: name -> a function of per="batch" | "pair" | "sample" (the composed ones ignore it)
POLICIES: dict[str, Callable[[str], Policy]] = {
    "mixup": lambda per: Mixup(alpha=0.8, per=per),
    "cutmix": lambda per: CutMix(alpha=1.0, per=per),
    "cutmix-inside": lambda per: CutMix(alpha=1.0, per=per, inside=True),
    "smoothmix": lambda per: SmoothMix(per=per),
    "gridmix": lambda per: GridMix(alpha=1.0, per=per),
    "fmix": lambda per: FMix(alpha=1.0, per=per),
    "fmix-released": lambda per: FMix(alpha=1.0, spectrum="released", per=per),
    "resizemix": lambda per: ResizeMix(per=per),
    "saliencymix": lambda per: SaliencyMix(alpha=1.0, per=per),
    "augmix": lambda per: AugMix(per="sample" if per == "pair" else per),
    "choice-batch": lambda per: RandomChoice([Mixup(), CutMix(), None]),
    "choice-sample": lambda per: RandomChoice([Mixup(), CutMix(), SmoothMix(), ResizeMix(), None], per="sample"),
    "scheduled": lambda per: Scheduled(CutMix(per=per), stop=0.5),
}
#: policies whose rows are blends of two clean rows
BLENDING = [name for name in POLICIES if name != "augmix"]
IMAGES_ONLY = ("augmix", "fmix-released")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant_rows(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(N, *shape) with one value in each row."""
    return values.view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()


def own_share(mask: Tensor) -> Tensor:
    """What lam is, counted from a mask (N, 1, *spatial): its mean, which for a row of one value is that value."""
    rows = mask.flatten(1)
    # The float32 mean of equal values may miss them in the last bit.
    return torch.where((rows == rows[:, :1]).all(1), rows[:, 0], mask.mean(tuple(range(1, mask.ndim))))


def blend_by_hand(x: Tensor, plan: MixPlan) -> np.ndarray:
    """float64: own and partner pixels weighed one row at a time."""
    own = (x if plan.own is None else plan.own).double().numpy()
    source, partner, lam = x.double().numpy(), plan.partner.tolist(), plan.lam.double().numpy()
    other = None if plan.other is None else plan.other.double().numpy()
    mask = None if plan.mask is None else plan.mask.double().numpy()
    out = np.empty_like(own)
    for i in range(x.shape[0]):
        share = lam[i] if mask is None or x.ndim == 2 else mask[i]
        theirs = source[partner[i]] if other is None else other[i]
        out[i] = share * own[i] + (1.0 - share) * theirs
    return out
