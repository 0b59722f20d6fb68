"""The policies under test, and slow references that share no code with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hardmix.mixing import (
    AdAutoMix,
    AlignMix,
    AttentiveMix,
    AugMix,
    AutoMix,
    CoMixup,
    CutMix,
    FMix,
    GridMix,
    GuidedMix,
    ManifoldMixup,
    MergeMix,
    MixPlan,
    MixPro,
    Mixup,
    Policy,
    PuzzleMix,
    RandomChoice,
    ResizeMix,
    SaliencyMix,
    SAMix,
    Scheduled,
    SMMix,
    SmoothMix,
    SnapMix,
    SUMix,
    SuperMix,
    TLAlign,
    TokenMix,
    TransMix,
)
from mixing.vits import AnyViT

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


class Modelled(NamedTuple):
    """A policy that looks at a model, and what of the contract does not hold for it, by its definition."""

    make: Callable[[nn.Module, str], Policy]
    #: whether the model is a vision transformer
    reads_attention: bool = False
    #: whether an output is one row and one partner. Else there is no plan, and the target has more labels than two.
    pairs: bool = True
    #: whether the pixels are mixed, not the output of a layer
    pixels: bool = True
    #: whether labels get the share of the pixels when a batch is mixed (`relabel` may weigh them anew)
    by_area: bool = True
    #: whether partners or places are drawn
    draws: bool = True
    #: whether uint8 images are mixed, which a model can't be asked about
    uint8: bool = False
    #: whether it has parameters of its own
    learns: bool = False


#: name -> the policy, which takes the images of `model_for`
MODELLED: dict[str, Modelled] = {
    "manifold-mixup": Modelled(
        lambda model, per: ManifoldMixup(model, ["0"], include_input=False, per=per), pixels=False, uint8=True
    ),
    "alignmix": Modelled(
        lambda model, per: AlignMix(model, "2", include_input=False, per=per), pixels=False, uint8=True
    ),
    "attentivemix": Modelled(lambda model, per: AttentiveMix(model, cells=2, grid=3, per=per)),
    "snapmix": Modelled(lambda model, per: SnapMix(model, per=per), by_area=False),  # by class activation, not to one
    "guidedmix": Modelled(lambda model, per: GuidedMix(model, saliency="input-gradient"), draws=False),
    "saliencymix-gradient": Modelled(lambda model, per: SaliencyMix(saliency="input-gradient", model=model, per=per)),
    "puzzlemix": Modelled(lambda model, per: PuzzleMix(model, blocks=[2, 3], per=per)),
    "co-mixup": Modelled(lambda model, per: CoMixup(model, blocks=[3], rounds=1), pairs=False),
    "supermix": Modelled(lambda model, per: SuperMix(model, steps=3), pairs=False),
    "automix": Modelled(lambda model, per: AutoMix(model, input_shape=(3, 16, 16), per=per), learns=True),
    "samix": Modelled(lambda model, per: SAMix(model, input_shape=(3, 16, 16), per=per), learns=True),
    "adautomix": Modelled(
        lambda model, per: AdAutoMix(model, input_shape=(3, 16, 16), per="sample" if per == "pair" else per),
        pairs=False,
        learns=True,
    ),
    "sumix": Modelled(lambda model, per: SUMix(model, CutMix(per=per)), learns=True),
    "transmix": Modelled(lambda model, per: TransMix(model, per=per), reads_attention=True, uint8=True),
    "mixpro": Modelled(lambda model, per: MixPro(model, per=per), reads_attention=True, uint8=True),
    "tl-align": Modelled(lambda model, per: TLAlign(model, per=per), reads_attention=True, uint8=True),
    "tokenmix": Modelled(lambda model, per: TokenMix(model, per=per), reads_attention=True),
    "smmix": Modelled(lambda model, per: SMMix(model, per=per), reads_attention=True),
    "mergemix": Modelled(lambda model, per: MergeMix(model, per=per), reads_attention=True),
}
CLASSES = 8


def model_for(name: str, device: str = "cpu") -> nn.Module:
    """A tiny model of CLASSES classes for a policy of MODELLED, in training mode; images may have any size."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if MODELLED[name].reads_attention:
            return AnyViT(CLASSES).to(device)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        ).to(device)


def modelled(name: str, per: str = "sample", device: str = "cpu") -> tuple[Policy, nn.Module]:
    """A policy of MODELLED and its model, which has to be kept."""
    model = model_for(name, device)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return MODELLED[name].make(model, per), model


class ConvNet(nn.Module):
    """Convolution, batch norm and dropout: what a look at the gradient may not change."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().square().mean((2, 3))))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Wrapper(nn.Module):
    """A model that holds another one and nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


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
