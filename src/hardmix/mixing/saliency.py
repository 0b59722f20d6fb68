"""SaliencyMix, and the spectral residual that it finds salient pixels with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import wide
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import Pairing
from hardmix.mixing.gradients import check_model, input_saliency
from hardmix.mixing.plan import MixPlan, full_box_share
from hardmix.mixing.static import cut_box, cut_side, whole_pixels

#: The maps that have a name, beside any function of the batch.
SALIENCIES = ("spectral-residual", "input-gradient")
#: The spectral residual looks at an image at about this many pixels a side; details finer than that are not salient.
_SIDE = 64


class SaliencyMix(AskingPolicy):
    """SaliencyMix: paste a box around the partner's most salient pixel.

        box as in CutMix, its centre at the maximum of the partner's saliency map;  lam = 1 - area / (H W)

    Args:
        saliency: "spectral-residual", which None takes, too; "input-gradient", `input_saliency` of `model`, one forward
            and backward more for each batch; or a function (N, C, *spatial) -> (N, *spatial) map, possibly coarser.
            Equal maxima: the first; of maps with NaN the first NaN. With per="batch" or "pair" rows share lambda,
            never the place.
        model: what is trained, for the input gradient; it is no part of the policy. Other maps don't look at it.
        alpha, per, pairing: see `Policy`.
    Shapes: (N, C, L), (N, C, H, W) or (N, C, D, H, W). No gradient flows through the saliency. The input gradient needs
    floats, and the labels: `plan(x, y)`.
    Reference: Uddin et al. 2021, eq. 1-4 (arXiv:2006.01791). The authors use OpenCV's fine-grained saliency of one
    image of the batch for everybody's box; here every partner has its own map.
    """

    needs_model = False

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        saliency: Callable[[Tensor], Tensor] | str | None = None,
        model: nn.Module | None = None,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, per=per, pairing=pairing)
        self.saliency = check_saliency("SaliencyMix", saliency, model)

    def extra_repr(self) -> str:
        name = self.saliency if isinstance(self.saliency, str) else None
        return super().extra_repr() + (f", saliency={name!r}" if name else "")

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = tuple(x.shape[2:])
        lam = self._lam(pairing, generator)
        plan = MixPlan(pairing.partner, lam, size=size, shift=pairing.shift).to(x.device)
        saliency = saliency_map("SaliencyMix", self.saliency, self.asked, x, y)
        at = saliency.flatten(1).argmax(1)  # (N,)
        places = []
        for length in reversed(saliency.shape[1:]):
            places.append((at % length + 0.5) / length)
            at = at // length
        centre = torch.stack(places[::-1], 1)[plan.partner]  # (N, S) in (0, 1)
        plan.box = cut_box(cut_side(plan.lam, len(size)), whole_pixels(centre, size), size)
        plan.lam = full_box_share(plan.box, size)
        return plan


def check_saliency(
    who: str, saliency: Callable[[Tensor], Tensor] | str | None, model: object
) -> Callable[[Tensor], Tensor] | str | None:
    """A way to find salient pixels: a name, a function or None, and the model where the name needs one."""
    if isinstance(saliency, str):
        _check.choice(who, "saliency", saliency, SALIENCIES)
    elif saliency is not None and not callable(saliency):
        raise TypeError(
            f"{who}: saliency is a {type(saliency).__name__}; pass a function of the batch, or one of "
            f"{', '.join(map(repr, SALIENCIES))}."
        )
    if model is None and saliency == "input-gradient":
        raise ValueError(f"{who}: saliency is 'input-gradient' but model is None; pass the model that is trained.")
    if model is not None:
        check_model(who, model)
    return saliency


def saliency_map(
    who: str,
    saliency: Callable[[Tensor], Tensor] | str | None,
    model: nn.Module | None,
    x: Tensor,
    y: Tensor | None,
) -> Tensor:
    """The map (N, *spatial) of a batch, without a gradient and possibly coarser; None is the spectral residual."""
    if saliency == "input-gradient":
        assert model is not None
        return input_saliency(model, x, y, who=who)
    with torch.no_grad():
        found = saliency(x) if callable(saliency) else spectral_residual(x)
    fits = isinstance(found, Tensor) and found.ndim == x.ndim - 1 and found.shape[0] == x.shape[0]
    if not fits or found.numel() == 0:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{who}: saliency returned {got} for a batch of shape {tuple(x.shape)}; "
            "return one map (N, *spatial) per sample."
        )
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{who}: saliency returned dtype {found.dtype}; return integers or floating-point values.")
    _check.same_device(who, "the map that saliency returned", found, "x", x.device)
    found = found.detach()
    # What is made of torchvision's images may be one, which a map is not. Plain tensors stay: the compiler can't cast.
    return found if type(found) is Tensor else found.as_subclass(Tensor)


def spectral_residual(x: Tensor) -> Tensor:
    """Saliency (N, *spatial) of series, images or volumes: what the log spectrum holds beyond its local average.

        L = log |F|,   S = blur | F^-1 exp(L - box_3(L) + i arg F) |^2,   F the Fourier transform of the mean channel

    The image is averaged onto at most 64 cells a side first, and the map has that size. float32, or float64 for
    float64. An image of one value has no salient place: its map is flat up to rounding. Reference: Hou and Zhang 2007,
    CVPR.
    """
    x = _check.batch("spectral_residual", "x", x, 3, 5)
    grey = x.mean(1, keepdim=True, dtype=wide(x.dtype))
    size = tuple(min(_SIDE, length) for length in x.shape[2:])
    if size != tuple(x.shape[2:]):
        grey = F.interpolate(grey, size=size, mode="area")
    dims = tuple(range(2, x.ndim))
    spectrum = torch.fft.fftn(grey, dim=dims)
    height = spectrum.abs()
    # The floor keeps frequencies that are only rounding noise from being lifted to the level of the rest.
    floor = 1e-5 * height.amax(dims, keepdim=True) + torch.finfo(height.dtype).tiny
    log_height = (height + floor).log()
    average = log_height
    for dim in dims:
        average = (average.roll(1, dim) + average + average.roll(-1, dim)) / 3.0
    residual = spectrum / (height + floor) * (log_height - average).exp()
    energy = torch.fft.ifftn(residual, dim=dims).abs().square()
    for dim in dims:
        energy = blur_axis(energy, dim)
    return energy[:, 0]


def blur_axis(x: Tensor, dim: int, sigma: float = 2.5, radius: int | None = None) -> Tensor:
    """Gaussian along one axis, cut off at `radius`; at the border the weights of what is left sum to one."""
    at = torch.arange(x.shape[dim], device=x.device, dtype=x.dtype)
    distance = at - at[:, None]
    weight = torch.exp(-0.5 * (distance / sigma) ** 2)
    if radius is not None:
        weight = weight * (distance.abs() <= radius)
    weight = weight / weight.sum(0)
    return torch.tensordot(x, weight, dims=([dim], [0])).movedim(-1, dim)
