"""How a classifier holds up: occluded, attacked, corrupted and mixed images.

`model` is anything that maps pixels in 0..1 (N, C, H, W) to logits (N, C), so the normalisation belongs inside. A
module is measured in evaluation mode and left as it was. Images are uint8 or floats in 0..1 and may be many: they are
changed and measured in chunks whose size doesn't depend on the model, so that every model is asked about the very same
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU
from hardmix.kernels.warp import resize_into_boxes
from hardmix.metrics.classification import mixed_metrics
from hardmix.metrics.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from hardmix.mixing.draw import cpu_generator
from hardmix.mixing.field import low_frequency_mask
from hardmix.mixing.plan import MixPlan, full_box_share

Model = Callable[[Tensor], Tensor]
#: (pixels of a chunk, their row numbers) -> changed pixels
Change = Callable[[Tensor, slice], Tensor]

#: images that are changed and measured together
CHUNK = 250
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EPSILONS = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
LAMS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: of the field of "fmix", the policy's default
FMIX_DECAY = 3.0
KINDS = ("mixup", "cutmix", "fmix", "resizemix")


def predict(
    model: Model, images: Tensor, *, change: Change | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """(N, C) float32 logits on the CPU, without a gradient.

    Args:
        images: (N, C, H, W) uint8, or floats in 0..1.
        change: applied to the pixels of each chunk, on the CPU, before the model sees them.
        device: where the model is.
    Raises:
        ValueError: the model returns something else than finite (N, C) logits.
    """
    images = _images("predict", images)
    parts = []
    with _evaluating(model), torch.no_grad():
        for rows in _chunks(len(images)):
            pixels = _pixels(images[rows])
            pixels = pixels if change is None else change(pixels, rows)
            parts.append(_logits("predict", model, pixels.to(device)).float().cpu())
    return torch.cat(parts)


def accuracy(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    change: Change | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Share of images whose largest logit is that of their label. Arguments as for `predict`; labels (N,) class ids."""
    images = _images("accuracy", images)
    labels = _labels("accuracy", labels, len(images))
    logits = predict(model, images, change=change, device=device)
    _check.classes_in_range("accuracy", "labels", labels, logits.shape[1])
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def patch_order(
    count: int, size: tuple[int, int], patch: int, *, generator: Generator | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """In which order the patches of each image are dropped: one draw for all rates.

    Args:
        count: number of images.
        size: (H, W) pixels.
        patch: side of a patch; the last ones are cut where it doesn't divide the side.
        generator: CPU generator.
    Returns:
        (count, P) long, a random permutation of 0..P-1 in each row, and the (rows, columns) of the P patches.
    """
    patch = _check.integer("patch_order", "patch", patch, 1)
    cpu_generator("patch_order", generator)
    grid = (-(-size[0] // patch), -(-size[1] // patch))
    return torch.rand((count, math.prod(grid)), generator=generator, dtype=torch.float32, device=CPU).argsort(1), grid


def occlude(
    images: Tensor, order: Tensor, rate: float, *, patch: int, fill: float | Sequence[float] | Tensor = 0.0
) -> Tensor:
    """Paint over a share of the patches of each image.

        patch p of image i is painted  <=>  order[i, p] < round(rate P)

    So a higher rate paints what a lower one painted, and more.

    Args:
        images: (N, C, H, W) floats in 0..1. Never written.
        order: from `patch_order` with the same patch.
        rate: share of the patches, 0 to 1; halves are rounded up.
        fill: one value, or one per channel.
    """
    who = "occlude"
    images = _images(who, images)
    if not images.is_floating_point():
        raise TypeError(f"{who}: images has dtype {images.dtype}; pass floats in 0..1.")
    rate = _check.between(who, "rate", rate, 0.0, 1.0)
    patch = _check.integer(who, "patch", patch, 1)
    height, width = images.shape[2:]
    rows, columns = -(-height // patch), -(-width // patch)
    want = (images.shape[0], rows * columns)
    if tuple(order.shape) != want:
        raise ValueError(f"{who}: order has shape {tuple(order.shape)}; pass {want} from patch_order.")
    painted = order < math.floor(rate * order.shape[1] + 0.5)
    mask = painted.view(-1, 1, rows, columns).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    paint = torch.as_tensor(fill).to(images).reshape(-1, 1, 1)
    return torch.where(mask[:, :, :height, :width].to(images.device), paint, images)


def default_patch(size: tuple[int, int]) -> int:
    """Side of a patch in pixels: 4 up to 64 pixels (7 x 7 patches of 28), a fourteenth of larger images (16 of 224)."""
    return max(4, min(size) // 14)


def occlusion_accuracy(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    rates: Sequence[float] = RATES,
    patch: int | None = None,
    fill: float | Sequence[float] = 0.0,
    device: torch.device | str = "cpu",
    generator: Generator | None = None,
) -> dict[str, Any]:
    """Accuracy where random patches are missing.

    Args:
        images: (N, C, H, W) uint8, or floats in 0..1; labels: (N,) class ids.
        rates: shares of the patches that are painted over.
        patch: side in pixels; None takes `default_patch`.
        fill: what they are painted with, one value or one per channel (the data set's mean is the neutral choice).
        generator: CPU generator; the same seed drops the same patches for every model.
    Returns:
        dict with patch, grid, rates and accuracy (one per rate).
    Reference: the random patch drop of Naseer et al. 2021 (arXiv:2105.10497).
    """
    who = "occlusion_accuracy"
    images = _images(who, images)
    size = (images.shape[2], images.shape[3])
    patch = default_patch(size) if patch is None else _check.integer(who, "patch", patch, 1)
    order, grid = patch_order(len(images), size, patch, generator=generator)

    def at(rate: float) -> float:
        def change(pixels: Tensor, rows: slice) -> Tensor:
            return occlude(pixels, order[rows], rate, patch=patch, fill=fill)

        return accuracy(model, images, labels, change=change, device=device)

    return {"patch": patch, "grid": list(grid), "rates": list(rates), "accuracy": [at(rate) for rate in rates]}


def fgsm_sign(model: Model, pixels: Tensor, labels: Tensor) -> Tensor:
    """Sign of the gradient of the cross entropy in each pixel, -1, 0 or 1; (N, C, H, W) like `pixels`.

        d CE / dz = (1 - p_y) d m / dz,   m = logsumexp_{c != y} z_c - z_y,   so   sign(d CE / dx) = sign(d m / dx)

    m is what is differentiated: a network that is sure enough has 1 - p_y = 0 in float32, and its gradient of 0 would
    pass for robustness. No parameter's gradient and no running statistic is touched.

    Args:
        pixels: (N, C, H, W) floats in 0..1, on the model's device. labels: (N,) class ids, there too.
    """
    who = "fgsm_sign"
    x = pixels.detach().clone().requires_grad_()
    with _evaluating(model), torch.enable_grad():
        z = _logits(who, model, x)
        _check.classes_in_range(who, "labels", labels, z.shape[1])
        if not z.requires_grad:
            raise ValueError(f"{who}: model gave logits without a gradient; pass a model that can be differentiated.")
        own = torch.zeros_like(z, dtype=torch.bool).scatter_(1, labels[:, None], True)
        margin = z.masked_fill(own, -math.inf).logsumexp(1) - z[own]
        # Images don't meet in evaluation mode, so the gradient of the sum holds each image's own.
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    return gradient.sign()


def fgsm_accuracy(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilons: Sequence[float] = EPSILONS,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Accuracy under the fast gradient sign attack, which knows the model and the label.

        x' = clip(x + epsilon sign(d CE / dx), 0, 1)

    Args:
        images: (N, C, H, W) uint8, or floats in 0..1; labels: (N,) class ids.
        epsilons: largest change of a pixel, in units of the 0..1 range.
    Returns:
        dict with epsilons and accuracy (one per epsilon). One step is a weak attack: the accuracy is an upper bound on
        what a patient attacker leaves, good for comparing models, no proof of safety.
    Reference: Goodfellow et al. 2015 (arXiv:1412.6572). The gradient is taken once for all epsilons.
    """
    who = "fgsm_accuracy"
    images = _images(who, images)
    labels = _labels(who, labels, len(images))
    epsilons = [_check.non_negative(who, "epsilons", epsilon) for epsilon in epsilons]
    hits = [0] * len(epsilons)
    for rows in _chunks(len(images)):
        pixels, own = _pixels(images[rows]).to(device), labels[rows].to(device)
        sign = fgsm_sign(model, pixels, own)
        for i, epsilon in enumerate(epsilons):
            attacked = (pixels + epsilon * sign).clamp_(0.0, 1.0)
            hits[i] += int((predict(model, attacked, device=device).argmax(1) == labels[rows]).sum())
    return {"epsilons": epsilons, "accuracy": [hit / len(images) for hit in hits]}


def corruption_accuracy(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on damaged images, see `hardmix.metrics.corruptions.corrupt`.

    Args:
        images: (N, C, H, W) uint8, or floats in 0..1; labels: (N,) class ids.
        names: which kinds.
        seed: of the noise; each severity has its own draws, the same for every model.
    Returns:
        dict with severities and accuracy {name: one per severity}.
    """
    seed = _check.integer("corruption_accuracy", "seed", seed, 0)

    def at(name: str, severity: int) -> float:
        draws = torch.Generator().manual_seed(len(SEVERITIES) * seed + severity)
        return accuracy(
            model,
            images,
            labels,
            change=lambda pixels, rows: corrupt(pixels, name, severity, generator=draws),
            device=device,
        )

    return {
        "severities": list(SEVERITIES),
        "accuracy": {name: [at(name, severity) for severity in SEVERITIES] for name in names},
    }


def mixed_accuracy_curve(
    model: Model,
    images: Tensor,
    labels: Tensor,
    kind: str,
    *,
    lams: Sequence[float] = LAMS,
    device: torch.device | str = "cpu",
    generator: Generator | None = None,
) -> dict[str, list[float]]:
    """What the model sees in two images of different classes, over the share of the first.

    Args:
        images: (N, C, H, W) uint8, or floats in 0..1; labels: (N,) class ids of at least two classes.
        kind: "mixup" blends the images; "cutmix" pastes a box of the second that lies inside the first, of the nearest
            area to 1 - lambda that whole pixels allow; "resizemix" the whole second image, made as small as that box;
            "fmix" shows the second where a smooth random field is low. See `plan_at`.
        lams: shares of the first image.
        generator: CPU generator; the same seed gives the same pairs and places for every model and lambda.
    Returns:
        Lists with an entry per lambda: lam (the exact share), `both`, `top2`, `either` of
        `hardmix.metrics.classification.mixed_metrics`, and the mean probability of the `own` and the `partner` class.
    """
    who = "mixed_accuracy_curve"
    images = _images(who, images)
    labels = _labels(who, labels, len(images))
    _check.choice(who, "kind", kind, KINDS)
    cpu_generator(who, generator)
    partner = other_class_partner(labels, generator=generator)
    place = torch.rand((len(images), 2), generator=generator, dtype=torch.float32, device=CPU)
    pairs = torch.stack([labels, labels[partner]], 1)
    curve: dict[str, list[float]] = {key: [] for key in ("lam", "both", "top2", "either", "own", "partner")}
    for lam in lams:
        share = plan_at(kind, lam, place[:1], images.shape[2:]).lam.item()

        def change(pixels: Tensor, rows: slice, lam: float = lam) -> Tensor:
            plan = plan_at(kind, lam, place[rows], pixels.shape[2:], other=_pixels(images[partner[rows]]))
            return plan.blend(pixels)

        probs = predict(model, images, change=change, device=device).softmax(1)
        shown = probs.gather(1, pairs).double().mean(0).tolist()
        values = {"lam": share, **mixed_metrics(probs, pairs), "own": shown[0], "partner": shown[1]}
        for key, value in values.items():
            curve[key].append(value)
    return curve


def other_class_partner(labels: Tensor, *, generator: Generator | None = None) -> Tensor:
    """(N,) for each row a row of another class, each of them equally likely.

    Raises:
        ValueError: there is only one class.
    """
    count = labels.shape[0]
    order = labels.argsort(stable=True)
    ranked = labels[order]
    first, last = torch.searchsorted(ranked, labels), torch.searchsorted(ranked, labels, right=True)
    others = count - (last - first)
    if not bool((others > 0).all()):
        raise ValueError("other_class_partner: labels holds one class only; pass images of at least two classes.")
    # In float64: the product has to stay below `others` for the largest draw.
    at = (torch.rand(count, dtype=torch.float64, generator=generator, device=CPU) * others).long()
    return order[at + (at >= first) * (last - first)]  # step over the rows of the own class


def plan_at(kind: str, lam: float, place: Tensor, size: Sequence[int], *, other: Tensor | None = None) -> MixPlan:
    """A plan whose own share is `lam`, for rows that are mixed with the images `other`.

    Args:
        kind: "mixup"; "cutmix", a box of the partner; "resizemix", the whole partner made as small as that box; "fmix",
            where a random field is low. The last two need `other`.
        place: (N, 2) in [0, 1): where the box is between the borders. For "fmix" the field follows from its first row.
        size: (H, W).
    Returns:
        Plan of N rows; `plan.lam` is the share of the pixels, which for boxes is the nearest one whole pixels allow at
        the image's aspect ratio.
    """
    _check.choice("plan_at", "kind", kind, KINDS)
    lam = _check.between("plan_at", "lam", lam, 0.0, 1.0)
    rows = place.shape[0]
    partner = torch.arange(rows, device=CPU)
    if kind == "mixup":
        return MixPlan(partner, torch.full((rows,), lam, device=CPU), other=other)
    height, width = size
    if kind == "fmix":
        draws = torch.Generator().manual_seed(int(place[0, 0].double() * 2**62))
        keep = torch.full((rows,), round(lam * height * width), device=CPU)
        mask = low_frequency_mask(keep, (height, width), FMIX_DECAY, "isotropic", draws)[:, None]
        return MixPlan(partner, keep / (height * width), mask.to(torch.float32), other=other)
    area = (1.0 - lam) * height * width
    tall = min(height, max(1, round(height * math.sqrt(1.0 - lam))))
    wide = min(width, round(area / tall))
    side = torch.tensor([tall, wide], device=CPU)
    start = (place * (torch.tensor([height, width], device=CPU) - side + 1)).long()
    box = torch.stack([start, start + side], 2)  # (N, 2, 2)
    if kind == "resizemix" and other is not None and box[0].diff(dim=1).all():
        other = resize_into_boxes(other, partner, box)
    return MixPlan(partner, full_box_share(box, (height, width)), box=box, size=(height, width), other=other)


def _images(who: str, images: Tensor) -> Tensor:
    images = _check.batch(who, "images", images, 4, 4)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{who}: images has dtype {images.dtype}; pass uint8 values or floats in 0..1.")
    return images


def _labels(who: str, labels: Tensor, rows: int) -> Tensor:
    labels = _check.tensor(who, "labels", labels)
    _check.same_length(who, "labels", labels, "images", rows)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{who}: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; pass (N,) integer class ids."
        )
    return labels.cpu().long()


def _pixels(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255.0 if images.dtype == torch.uint8 else images.detach()


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _logits(who: str, model: Model, pixels: Tensor) -> Tensor:
    z = model(pixels)
    if not isinstance(z, Tensor) or z.ndim != 2 or z.shape[0] != pixels.shape[0] or z.shape[1] < 2:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"{who}: model gave {got} for {pixels.shape[0]} images; pass one that gives (N, C) logits, C > 1."
        )
    # Asked here, because argmax of NaN is a class like any other.
    if not bool(torch.isfinite(z).all()):
        raise ValueError(f"{who}: model gave logits that are NaN or infinite; the weights or the images are broken.")
    return z


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """Evaluation mode for the time being; every submodule is in its own mode again afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
