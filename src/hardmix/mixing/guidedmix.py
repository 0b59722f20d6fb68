"""GuidedMix: each pixel in proportion to the saliency of the two images, and partners that are salient elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import PAIRINGS, LabelPairing, Pairing, move
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.saliency import blur_axis, check_saliency, saliency_map

_RESIZE = {1: "linear", 2: "bilinear", 3: "trilinear"}


class GuidedMix(AskingPolicy):
    """GuidedMixup: two images share each pixel as their saliencies do, and are paired so that these collide little.

        s_i = saliency of x_i, resized to the image, blurred, divided by its sum
        M_i = s_i / (s_i + s_j),  j = partner_i;   x~_i = M_i x_i + (1 - M_i) x_j;   lam_i = mean of M_i
        partners: one cycle through the batch, which starts with the pair that is farthest apart (L2 of s) and goes on
        from each row to the one farthest from it that it has not passed yet

    Nothing is drawn with the default pairing: a batch decides on its plan. Partners are settled before their saliency
    is read.

    Args:
        model: what is trained, for saliency="input-gradient"; it is no part of the policy. Other maps don't look at it.
        saliency: "spectral-residual", "input-gradient" (`input_saliency`: one forward and backward more for each batch)
            or a function (N, C, *spatial) -> (N, *spatial) map of numbers from 0 on, possibly coarser.
        blur: standard deviation of the Gaussian in pixels, which is also cut off there; 3 gives 7 taps, 0 no blur.
        pairing: "greedy" for the cycle, or a drawn one, see `Policy`.

    Shapes: (N, C, L), (N, C, H, W) or (N, C, D, H, W), square or not; the input gradient needs floats, and the labels:
    `plan(x, y)`. No gradient flows through the masks. Where neither image is salient M is 1/2. A map that is flat, zero
    everywhere or not finite counts as uniform. Equal distances: the first row. N = 1 is its own partner with M = 1/2.
    The cycle takes N steps of O(N) on an (N, N) matrix on the batch's device, without a look from the host; each step
    hangs on the one before it.

    Reference: Kang and Kim 2023, AAAI (arXiv:2306.16612); blur and order of the cycle as in the authors' code. Their
    spectral residual takes the modulus, ours its square as Hou and Zhang do, and their blur reflects at the border.
    OpenMixup reads the partners' saliency and labels by a random pairing, computes the cycle and then drops it.
    """

    needs_model = False

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        saliency: Callable[[Tensor], Tensor] | str = "spectral-residual",
        blur: int = 3,
        pairing: str = "greedy",
    ) -> None:
        who = "GuidedMix"
        _check.choice(who, "pairing", pairing, ("greedy", *PAIRINGS))
        super().__init__(model, pairing=_Greedy() if pairing == "greedy" else pairing)
        if saliency is None:
            raise TypeError(f"{who}: saliency is None; pass a function of the batch, or the name of a map.")
        self.saliency = check_saliency(who, saliency, model)
        self.blur = _check.integer(who, "blur", blur, 0)

    def extra_repr(self) -> str:
        name = repr(self.saliency) if isinstance(self.saliency, str) else "a function"
        return f"saliency={name}, blur={self.blur}, pairing={str(self.pairing)!r}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        share = self._shares(saliency_map("GuidedMix", self.saliency, self.asked, x, y), tuple(x.shape[2:]))
        drawn = pairing.partner.shape[0] > 0
        partner = move(pairing.partner, x.device) if drawn else greedy_cycle(share.flatten(1))
        total = share + share.index_select(0, partner)
        mask = share.div_(total).masked_fill_(total == 0, 0.5)
        return MixPlan(partner, None, mask.to(torch.float32)[:, None], shift=pairing.shift)

    def _shares(self, saliency: Tensor, size: tuple[int, ...]) -> Tensor:
        """Maps (N, *size) that sum to one."""
        saliency = saliency.to(wide(saliency.dtype)).clamp(min=0.0)
        if tuple(saliency.shape[1:]) != size:
            saliency = F.interpolate(saliency[:, None], size=size, mode=_RESIZE[len(size)])[:, 0]
        if self.blur:
            for dim in range(1, saliency.ndim):
                saliency = blur_axis(saliency, dim, float(self.blur), self.blur)
        dims = tuple(range(1, saliency.ndim))
        # Values from 0 to 1 first: neither the squares of tiny ones nor the sum of huge ones is lost.
        saliency = saliency / saliency.amax(dims, keepdim=True)
        total = saliency.sum(dims, keepdim=True)
        usable = (total > 0) & total.isfinite()
        return torch.where(usable, saliency / total, 1.0 / saliency[0].numel())


class _Greedy(LabelPairing):
    """The cycle, which can't be told before the maps are known."""

    def draw(self, who: str, y: Tensor | None, rows: int, generator: Generator | None) -> Pairing:
        """No partners yet."""
        return Pairing(torch.empty(0, dtype=torch.long, device=CPU), None)

    def __str__(self) -> str:
        return "greedy"


def greedy_cycle(maps: Tensor) -> Tensor:
    """Partners (N,) that make one cycle: each row's is the farthest row that the cycle has not passed yet.

    maps (N, D) are compared by their L2 distance. The cycle starts where the largest distance of all does; of equal
    distances the first row is taken. One row is its own partner.
    """
    rows = maps.shape[0]
    # Distances don't change when the mean map is taken off, but their digits don't cancel then.
    centred = maps - maps.mean(0)
    product = centred @ centred.T
    norms = product.diagonal()
    distance = (norms[:, None] + norms) - (product + product.T)  # squared, and symmetric to the last bit
    distance.fill_diagonal_(-torch.inf)
    at = (distance.argmax() // rows).view(1)
    order = [at]
    for _ in range(rows - 1):
        distance.index_fill_(1, at, -torch.inf)  # nobody comes back here
        at = distance.index_select(0, at).argmax(1)
        order.append(at)
    cycle = torch.cat(order)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1))
