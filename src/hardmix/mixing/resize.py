"""ResizeMix: paste the whole partner, made small."""

from __future__ import annotations

from torch import Generator, Tensor

from hardmix import _check
from hardmix.mixing.draw import Pairing, uniform
from hardmix.mixing.plan import MixPlan, full_box_share
from hardmix.mixing.policy import Policy
from hardmix.mixing.static import cut_box, whole_pixels


class ResizeMix(Policy):
    """ResizeMix: the whole partner, resized into a box, is pasted.

        box sides tau (H, W), centre uniform over the pixels, clipped at the border;  lam = 1 - area / (H W)

    tau is uniform in `scale`; there is no Beta. The partner is resized, linearly and without a low-pass filter, to the
    clipped box, so nothing of it is lost, and a box holds at least one pixel. The plan resizes when it blends: second
    views and hidden maps get their own resized partners, and dense label masks follow by nearest neighbour.

    Args:
        scale: range of tau, within (0, 1].
        per, pairing: see `Policy`.
    Shapes: (N, C, L), (N, C, H, W) or (N, C, D, H, W), square or not.
    Reference: Qin et al. 2020, section 3 (arXiv:2012.11101).
    """

    def __init__(
        self, *, scale: tuple[float, float] = (0.1, 0.8), per: str = "sample", pairing: str | None = None
    ) -> None:
        super().__init__(per=per, pairing=pairing)
        self.scale = _check.interval("ResizeMix", "scale", scale, 1e-3, 1.0)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, per={self.per!r}, pairing={self.pairing!r}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = tuple(x.shape[2:])
        draws = self._rows(pairing, uniform(0.0, 1.0, (x.shape[0], 1 + len(size)), generator))
        low, high = self.scale
        side = draws[:, 0] * (high - low) + low
        box = cut_box(side, whole_pixels(draws[:, 1:], size), size, smallest=1)
        plan = MixPlan(pairing.partner, full_box_share(box, size), box=box, fit=box, size=size, shift=pairing.shift)
        plan = plan.to(x.device)
        plan.source = x
        return plan
