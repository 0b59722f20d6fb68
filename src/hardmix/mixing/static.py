"""Mixup and CutMix: the two static policies that everything else is measured against."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix.mixing.draw import LabelPairing, Pairing, uniform
from hardmix.mixing.plan import MixPlan, full_box_share
from hardmix.mixing.policy import Policy


class Mixup(Policy):
    """Mixup: blend whole samples.

        x~_i = lam_i x_i + (1 - lam_i) x_{partner_i},   y~_i = lam_i y_i + (1 - lam_i) y_{partner_i},   lam ~ Beta(a, a)

    Shapes: any batch (N, ...) of 2 to 5 axes: features, series, images, volumes. N = 1 mixes the sample with itself.
    Cost: one read of the batch and its partners, one write. Reference: Zhang et al. 2018, eq. 1 (arXiv:1710.09412).

    >>> x, target = Mixup(alpha=0.2)(torch.rand(8, 3, 32, 32), torch.arange(8))
    >>> target.labels.shape, target.weights.shape
    (torch.Size([8, 2]), torch.Size([8, 2]))
    """

    min_ndim = 2

    def __init__(self, alpha: float = 1.0, *, per: str = "sample", pairing: str | LabelPairing | None = None) -> None:
        super().__init__(alpha=alpha, per=per, pairing=pairing)

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        lam = self._lam(pairing, generator)
        return MixPlan(pairing.partner, lam, shift=pairing.shift).to(x.device)


class CutMix(Policy):
    """CutMix: paste a box of the partner.

        box sides sqrt(1 - lam') (H, W), centre uniform over the pixels, clipped at the border;  lam = 1 - area / (H W)

    lam' ~ Beta(alpha, alpha); the returned lam is counted from the clipped box, so pixels and labels agree. For series
    and volumes the sides are (1 - lam')^(1/S) of each of the S axes.

    Args:
        inside: the box is kept within the image: its centre is drawn where the whole box fits, so its area is the
            drawn 1 - lam' up to rounding to whole pixels.
        alpha, per, pairing: see `Policy`.
    Shapes: (N, C, L), (N, C, H, W) or (N, C, D, H, W), square or not. The box may be empty (lam = 1) or cover
    everything (lam = 0). Reference: Yun et al. 2019, eq. 1-2 (arXiv:1905.04899).
    """

    def __init__(
        self, alpha: float = 1.0, *, per: str = "sample", pairing: str | None = None, inside: bool = False
    ) -> None:
        super().__init__(alpha=alpha, per=per, pairing=pairing)
        self.inside = _check.boolean("CutMix", "inside", inside)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", inside=True" if self.inside else "")

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = tuple(x.shape[2:])
        lam = self._lam(pairing, generator)
        centre = self._rows(pairing, uniform(0.0, 1.0, (x.shape[0], len(size)), generator))
        side = cut_side(lam, len(size))
        box = inner_box(side, centre, size) if self.inside else cut_box(side, whole_pixels(centre, size), size)
        plan = MixPlan(pairing.partner, full_box_share(box, size), box=box, size=size, shift=pairing.shift)
        return plan.to(x.device)


def cut_side(lam: Tensor, axes: int) -> Tensor:
    """The share of each axis that a box of area 1 - lam takes. (N,)"""
    return (1.0 - lam).pow_(1.0 / axes)


def whole_pixels(at: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, S) positions in [0, 1) as whole pixels of each axis. float32"""
    # A float32 below 1 times a whole number rounds to less than that number, so the last pixel needs no clamp.
    return (at.T * axis_lengths(size, at.device)).floor_().T


def cut_box(side: Tensor, middle: Tensor, size: tuple[int, ...], smallest: int = 0) -> Tensor:
    """Boxes around a pixel, clipped at the border.

    Args:
        side: (N,) share of each axis.
        middle: (N, S) whole numbers, the pixel in the middle.
        size: the S spatial lengths.
        smallest: number of pixels that a side has at least.
    Returns:
        (N, S, 2) long, half-open [start, stop) inside the image. All pixels of the border can be reached.
    """
    # float32 holds whole numbers up to 2^24, and two long rows are faster than N short ones.
    lengths = axis_lengths(size, side.device)
    pixels = (side * lengths).round_()  # (N,), or (S, N) where the axes differ
    if smallest:
        pixels = pixels.clamp_(min=smallest)
    start = middle.T - (pixels * 0.5).floor_()
    box = torch.stack([start, start + pixels]).clamp_(min=0.0)  # (2, S, N)
    return torch.minimum(box, lengths).long().permute(2, 1, 0)


def inner_box(side: Tensor, place: Tensor, size: tuple[int, ...]) -> Tensor:
    """Boxes inside the image, with (N,) `side` and `size` as in `cut_box`. (N, S, 2) long, half-open

    Args:
        place: (N, S) in [0, 1), from the first to the last place of the whole box on each axis, all equally likely.
    """
    lengths = axis_lengths(size, side.device)
    pixels = (side * lengths).round_()
    start = (place.T * (lengths - pixels + 1.0)).floor_()  # below the number of places, as in `whole_pixels`
    return torch.stack([start, start + pixels]).long().permute(2, 1, 0)


def axis_lengths(size: tuple[int, ...], device: torch.device) -> Tensor:
    """What (S, N) positions are multiplied with: (S, 1) float32, or () where all axes are equally long."""
    # Filled in on the device: a copy from the host would have to wait for it.
    if all(length == size[0] for length in size):  # a set would make constants of them in torch.compile
        return torch.full((), float(size[0]), dtype=torch.float32, device=device)
    return torch.stack([torch.full((1,), float(length), dtype=torch.float32, device=device) for length in size])
