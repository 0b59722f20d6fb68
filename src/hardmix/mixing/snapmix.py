"""SnapMix: a part of the partner, resized into a part of the image, and labels that follow the class activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import wide
from hardmix.kernels.blend import box_mask
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import Pairing, move, uniform
from hardmix.mixing.gradients import check_layer, check_model, hidden_map, without_ddp
from hardmix.mixing.plan import MixPlan, full_box_share
from hardmix.mixing.static import cut_box, cut_side, whole_pixels
from hardmix.mixing.target import MixedTarget


class SnapMix(AskingPolicy):
    """SnapMix: what stands in one box of the partner is resized into another box of the image.

        boxes a and b as in CutMix, drawn apart, of at least one pixel;  x~_i = x_i, in box a the pixels of x_j in box b
        S_i = CAM_i / sum CAM_i,   CAM_i = up(w_{y_i} relu(f(x_i))) less its minimum,   j = partner_i
        rho_a = 1 - sum of S_i in box a,   rho_b = sum of S_j in box b
        l = rho_a CE(y_i) + rho_b CE(y_j)

    f is the last map of the model and w its linear head. **The weights (rho_a, rho_b) of the target don't sum to one**:
    they are near 2 where both show what matters, near 0 where neither does, and so is what the row counts in the loss.
    `lam` of the plan is the share of the pixels, 1 - area of a / (H W). One forward of the model for each batch,
    without a gradient (`undisturbed`: batch norms take the statistics of the batch).

    Args:
        model: what is trained; it is no part of the policy, which has no parameters.
        layer: name of the submodule whose map (N, D, h, w) the head reads once it is pooled. "" stands for the last one
            of D channels with more than one pixel; the first forward finds it and sets `layer` to its name.
        head: name of the linear layer; "" stands for the last one.
        alpha, per, pairing: see `Policy`; both boxes are drawn per batch, pair or sample.

    Shapes: (N, C, H, W) floats, square or not; the model gets them as they are. Labels are class ids (N,) or rows
    (N, classes), whose CAM is that of their weighted sum; dense masks are refused. N = 1 is its own partner. A CAM that
    is flat or not finite counts as uniform: the weights are then the areas. Partners of the same class: the label is
    listed twice, and the objectives add the two weights.

    Raises:
        ValueError: a layer or head that the model doesn't have, a head that no map fits, labels missing or out of range
            (looked at on the CPU only).

    Reference: Huang et al. 2021, AAAI (arXiv:2012.04846). The authors' code gives rows of the same class rho_a + rho_b
    for both of their labels, so that they count twice; we found nothing of it in what we could read of the paper, and
    add once. It mixes nothing where a box is empty, draws two boxes for a batch, aligns corners, and its forward
    updates the running statistics.
    """

    min_ndim = max_ndim = 4

    #: its labels' weights are not those of the pixels
    by_rows = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str = "",
        head: str = "",
        alpha: float = 5.0,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(model, alpha=alpha, per=per, pairing=pairing)
        who = "SnapMix"
        model = self._model()
        self.layer, self.head = layer, check_layer(who, "head", model, head) or _last_linear(model)
        self.attach(model)

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}, head={self.head!r}, {super().extra_repr()}"

    def attach(self, model: nn.Module) -> None:
        """Read `model` from now on, which has a layer and a head of these names."""
        model = without_ddp(check_model("SnapMix", model))
        check_layer("SnapMix", "layer", model, self.layer)
        check_layer("SnapMix", "head", model, self.head)
        if not isinstance(model.get_submodule(self.head), nn.Linear):
            kind = type(model.get_submodule(self.head)).__name__
            raise ValueError(
                f"SnapMix: head names {self.head!r}, of the class {kind}; name the nn.Linear of the classes."
            )
        super().attach(model)

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        size = tuple(x.shape[2:])
        boxes = []
        for _ in range(2):
            lam = self._lam(pairing, generator)
            centre = self._rows(pairing, uniform(0.0, 1.0, (x.shape[0], len(size)), generator))
            boxes.append(cut_box(cut_side(lam, len(size)), whole_pixels(centre, size), size, smallest=1))
        share = self._class_activation(x, y)  # (N, 1, H, W)
        box, seen = (move(b, x.device) for b in boxes)
        partner = move(pairing.partner, x.device)
        rho_a = (share * box_mask(box, size)).sum((1, 2, 3))
        rho_b = 1.0 - (share.index_select(0, partner) * box_mask(seen, size)).sum((1, 2, 3))
        weights = torch.stack([rho_a, rho_b], 1).clamp_(0.0, 1.0)  # sums of shares, which may round over
        return SnapPlan(
            partner,
            full_box_share(box, size),
            box=box,
            fit=_around(seen, box, size),
            size=size,
            shift=pairing.shift,
            source=x,
            weights=weights,
        )

    def _class_activation(self, x: Tensor, y: Tensor | None) -> Tensor:
        """S, (N, 1, H, W) float32."""
        who, model = "SnapMix", self._model()
        head = model.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        weight = _of_labels(who, head.weight.detach(), y, x)  # (N, D)
        self.layer, found = hidden_map(
            who, model, x, self.layer, batch_statistics=x.shape[0] > 1, channels=head.in_features
        )
        found = found.to(wide(found.dtype)).relu()
        cam = torch.einsum("nd,ndhw->nhw", weight.to(found.dtype), found)[:, None]
        cam = F.interpolate(cam, size=tuple(x.shape[2:]), mode="bilinear")
        cam = cam - cam.amin((2, 3), keepdim=True)
        total = cam.sum((2, 3), keepdim=True)
        usable = (total > 0) & total.isfinite()
        return torch.where(usable, cam / total, 1.0 / cam[0].numel()).to(torch.float32)


class SnapPlan(MixPlan):
    """A plan whose labels have weights of their own.

    Attributes:
        weights: (N, 2) of the own and the partner's label; they don't sum to one.
    """

    __slots__ = ("weights",)

    def __init__(
        self,
        partner: Tensor,
        lam: Tensor,
        *,
        box: Tensor | None,
        size: tuple[int, ...] | None,
        fit: Tensor | None,
        shift: int | None,
        source: Tensor | None,
        weights: Tensor,
    ) -> None:
        super().__init__(partner, lam, box=box, size=size, fit=fit, shift=shift, source=source)
        self.weights = weights

    def to(self, device: torch.device | str) -> MixPlan:
        plan = super().to(device)
        return SnapPlan(
            plan.partner,
            plan.lam,
            box=plan.box,
            size=plan.size,
            fit=plan.fit,
            shift=plan.shift,
            source=plan.source,
            weights=move(self.weights, device),
        )

    def target(self, y: Tensor, *, kind: str = "auto") -> MixedTarget:
        """Labels (N, 2) or (N, 2, C) with `weights`; see `MixPlan.target`."""
        if kind == "mask" or _check.tensor("SnapPlan.target", "y", y).ndim > 2:
            raise ValueError("SnapPlan.target: y is a dense mask, which has no class activation; pass one label a row.")
        return MixedTarget(super().target(y, kind="rows").labels, self.weights)


def _around(seen: Tensor, box: Tensor, size: tuple[int, ...]) -> Tensor:
    """Boxes (N, S, 2) that a whole image has to be resized into for its pixels in `seen` to fill `box`."""
    zoom = (box[..., 1] - box[..., 0]).to(torch.float32) / (seen[..., 1] - seen[..., 0])  # (N, S)
    start = box[..., 0] - seen[..., 0] * zoom
    lengths = torch.stack([torch.full((), float(length), dtype=torch.float32, device=box.device) for length in size])
    return torch.stack([start, start + lengths * zoom], 2)


def _last_linear(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError("SnapMix: the model has no nn.Linear; pass one whose classes are read by a linear head.")
    return names[-1]


def _of_labels(who: str, weight: Tensor, y: Tensor | None, x: Tensor) -> Tensor:
    """The head's weights (N, D) for the labels of the rows."""
    if y is None:
        raise ValueError(f"{who}: y is None; pass the labels, whose class activation is read.")
    y = _check.tensor(who, "y", y)
    _check.same_length(who, "y", y, "x", x.shape[0])
    _check.same_device(who, "y", y, "the model", weight.device)
    classes = weight.shape[0]
    if y.ndim == 1 and not y.is_floating_point():
        _check.classes_in_range(who, "y", y, classes)
        return weight.index_select(0, y.long())
    if y.ndim != 2 or y.shape[1] != classes:
        raise ValueError(
            f"{who}: y has shape {tuple(y.shape)} and dtype {y.dtype} but the head has {classes} classes; "
            f"pass class ids (N,) or rows (N, {classes})."
        )
    return y.to(weight.dtype) @ weight
