"""torchvision's MixUp and CutMix with one line changed, and `Mix`, which gives any other policy their form.

torchvision is never imported here: whoever puts a tv_tensor into a batch has imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten  # what torchvision's transforms use as well

from hardmix import _check, mixing
from hardmix._math import CPU
from hardmix.mixing import MixPlan, Policy
from hardmix.mixing.choice import more_than_plans
from hardmix.mixing.draw import Pairing, cpu_generator

Getter = Callable[[Any], Any]


class Mix(nn.Module):
    """A mixing policy as a torchvision v2 transform of batches: the same structure comes back, images and labels mixed.

    Args:
        policy: any policy of `hardmix.mixing` that mixes the input.
        num_classes: C; needed for class ids (N,), which become dense soft labels (N, C) float32. Rows (N, C) are
            blended as they are: soft, multi-hot, or numbers (N, 1).
        labels_getter: where the labels are: a function of the batch, None for a batch without labels, or "default": the
            second item, or its entry (or the batch's) whose key is, else contains, "label(s)".
        generator: CPU generator to draw from; None takes torch's global one. In a `collate_fn` that runs in several
            workers leave it out: each worker would hold a copy and draw the same numbers.

    Images are all tv_tensors.Image (N, C, H, W) and Video (N, T, C, H, W), whose frames are cut alike, else the first
    plain tensor that is neither the labels nor under a key with "mask" in it. Masks are tv_tensors.Mask, tensors under
    such a key whose last of three or more axes are the image's H and W, and labels of three or more axes: integers
    (N, H, W) or (N, 1, H, W). They are cut with the images; where the policy blends, a mask of class ids has no right
    answer and is refused, as are boxes, keypoints, PIL images, and masks in NumPy arrays. Everything else passes as it
    is, such as a mask of tokens or of another size than the image. Nothing is written into.

    >>> mix = Mix(mixing.CutMix(per="sample"), num_classes=10)
    >>> images, labels = mix(torch.rand(4, 3, 32, 32), torch.arange(4))
    >>> labels.shape
    torch.Size([4, 10])
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_classes: int | None = None,
        labels_getter: Getter | str | None = "default",
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self._who = who = type(self).__name__
        if not isinstance(policy, Policy) or more_than_plans(policy) is not None:
            raise TypeError(
                f"{who}: policy is a {type(policy).__name__}; pass a hardmix policy that mixes the input and is "
                "done then."
            )
        if not (labels_getter is None or labels_getter == "default" or callable(labels_getter)):
            raise ValueError(f'{who}: labels_getter is {labels_getter!r}; pass "default", None or a function.')
        self.policy = policy
        self.num_classes = None if num_classes is None else _check.integer(who, "num_classes", num_classes, 1)
        self.labels_getter = default_labels if isinstance(labels_getter, str) else labels_getter
        self.generator = cpu_generator(who, generator)

    def plan(self, x: Tensor, labels: Tensor | None) -> MixPlan:
        """Draw one plan for the images `x` (N, C, H, W)."""
        return self.policy.plan(x, labels, generator=self.generator)

    def forward(self, *inputs: Any) -> Any:
        """(images, labels), or any nesting of tuples, lists and dicts that holds them, with images and labels mixed."""
        batch = inputs[0] if len(inputs) == 1 else inputs
        paths, spec = tree_flatten_with_path(batch)
        leaves = [leaf for _, leaf in paths]
        labels = None if self.labels_getter is None else self._check_labels(self.labels_getter(batch), leaves)
        roles = self._roles(paths, labels)
        if "image" not in roles:
            raise ValueError(f"{self._who}: the batch holds no image; pass a tensor (N, C, H, W) of images.")
        plan = self.plan(self._pixels(leaves[roles.index("image")]), None if labels is None else _plain(labels))
        mix = {"image": self._image, "mask": self._mask, "label": self._label, "other": lambda _, leaf: leaf}
        return tree_unflatten([mix[role](plan, leaf) for role, leaf in zip(roles, leaves, strict=True)], spec)

    def _check_labels(self, labels: Any, leaves: list[Any]) -> Tensor:
        who = self._who
        if not isinstance(labels, Tensor) or not any(leaf is labels for leaf in leaves):
            raise ValueError(
                f"{who}: labels_getter found a {type(labels).__name__}, no tensor of the batch; pass (images, labels), "
                'a dict with the key "labels", or a labels_getter that returns one of its tensors (None for no labels).'
            )
        floats = labels.is_floating_point()
        if labels.ndim == 0 or (labels.ndim == 1 and (floats or self.num_classes is None)):
            remedy = "pass numbers as rows (N, 1)" if floats else "pass class ids (N,) and num_classes"
            raise ValueError(f"{who}: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; {remedy}.")
        if labels.ndim == 2 and self.num_classes not in (None, labels.shape[1]):
            raise ValueError(
                f"{who}: labels has {labels.shape[1]} columns but num_classes is {self.num_classes}; leave it out."
            )
        return labels

    def _roles(self, paths: list[tuple[Any, Any]], labels: Tensor | None) -> list[str]:
        """What each leaf is: "image", "label", "mask" or "other"."""
        roles = []
        for path, leaf in paths:
            kind = _kind(leaf)
            if kind in ("BoundingBoxes", "KeyPoints", "PIL image"):
                raise ValueError(f"{self._who}: the batch holds a {kind}, which can't be mixed; take it out.")
            if leaf is labels:
                kind = "label"
            elif kind in ("tensor", "array") and any("mask" in _key(step) for step in path):
                kind = "called a mask"
            roles.append({"Image": "image", "Video": "image", "Mask": "mask"}.get(kind, kind))
        if "image" not in roles and "tensor" in roles:
            roles[roles.index("tensor")] = "image"
        size = paths[roles.index("image")][1].shape[-2:] if "image" in roles else None
        for place, (_, leaf) in enumerate(paths):
            if roles[place] == "called a mask" and leaf.ndim > 2 and leaf.shape[-2:] == size:
                _check.tensor(self._who, "mask", leaf)  # an array would stay as it is beside its mixed image
                roles[place] = "mask"  # of pixels; others are of tokens, of padding ...
        return [role if role in ("image", "label", "mask") else "other" for role in roles]

    def _pixels(self, leaf: Tensor) -> Tensor:
        """(N, C, H, W) of an image batch, (N, T * C, H, W) of a video batch."""
        axes = 5 if _kind(leaf) == "Video" else 4
        return _check.batch(self._who, "images", _plain(leaf), axes, axes).flatten(1, -3)

    def _image(self, plan: MixPlan, leaf: Tensor) -> Tensor:
        mixed = plan.blend(self._pixels(leaf))
        return _like(mixed if leaf.ndim == 4 else mixed.unflatten(1, leaf.shape[1:-2]), leaf)

    def _label(self, plan: MixPlan, leaf: Tensor) -> Tensor:
        if leaf.ndim > 2:
            return self._mask(plan, leaf)
        if leaf.ndim == 1:
            return plan.target(leaf.long()).dense(self.num_classes)
        rows = leaf if leaf.is_floating_point() else leaf.float()
        return plan.target(rows).dense().to(rows.dtype)

    def _mask(self, plan: MixPlan, leaf: Tensor) -> Tensor:
        mask = _plain(leaf)
        channel = mask.ndim == 4 and mask.shape[1] == 1
        labels, weights = plan.target(mask[:, 0] if channel else mask, kind="mask")
        if bool(((weights > 0) & (weights < 1)).any()):
            raise ValueError(
                f"{self._who}: the policy blends, but a mask of dtype {mask.dtype} holds class ids; use CutMix, or "
                "plan.target(mask) of a hardmix.mixing policy, which keeps both classes of a pixel and their shares."
            )
        mixed = torch.where(weights[:, 0] > 0, labels[:, 0], labels[:, 1]).to(mask.dtype)
        return _like(mixed[:, None] if channel else mixed, leaf)


class _TorchvisionMix(Mix):
    """One draw for the batch, and torchvision's pairing: row i is mixed with row i - 1."""

    make: type[Policy]

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        num_classes: int | None = None,
        labels_getter: Getter | str | None = "default",
        generator: Generator | None = None,
    ) -> None:
        policy = self.make(alpha=alpha, per="batch")
        super().__init__(policy, num_classes=num_classes, labels_getter=labels_getter, generator=generator)

    def plan(self, x: Tensor, labels: Tensor | None) -> MixPlan:
        n = x.shape[0]
        return self.policy.draw(x, labels, Pairing(torch.arange(-1, n - 1, device=CPU) % n, n - 1), self.generator)


class MixUp(_TorchvisionMix):
    """torchvision's `v2.MixUp`: one lambda ~ Beta(alpha, alpha) blends row i with row i - 1. See `Mix`."""

    make = mixing.Mixup


class CutMix(_TorchvisionMix):
    """torchvision's `v2.CutMix`: one box, of area 1 - lambda before clipping, shows row i - 1 in row i. See `Mix`."""

    make = mixing.CutMix


def default_labels(batch: Any) -> Any:
    """The labels where torchvision looks for them: the second item, or the entry of a mapping named after them."""
    place = batch
    if isinstance(batch, (tuple, list)):
        place = batch[1] if len(batch) > 1 else None
        if not isinstance(place, Mapping):
            return place
    names = (
        [key for key in place if isinstance(key, str) and "label" in key.lower()] if isinstance(place, Mapping) else []
    )
    names.sort(key=lambda key: key.lower() != "labels")  # a stable sort: the exact name first
    return place[names[0]] if names else None


def _kind(leaf: Any) -> str:
    """The name of a tv_tensor's type, "tensor", "array", "PIL image" or "other"."""
    tv_tensors = sys.modules.get("torchvision.tv_tensors")
    if tv_tensors is not None and isinstance(leaf, tv_tensors.TVTensor):
        names = ("Image", "Video", "Mask", "BoundingBoxes", "KeyPoints")
        return next((name for name in names if isinstance(leaf, getattr(tv_tensors, name, ()))), "other")
    if isinstance(leaf, Tensor):
        return "tensor"
    if isinstance(leaf, np.ndarray):
        return "array"
    return "PIL image" if type(leaf).__module__.startswith("PIL.") else "other"


def _key(step: Any) -> str:
    """The key or field name of one step on the way to a leaf."""
    return str(getattr(step, "key", getattr(step, "name", ""))).lower()


def _plain(leaf: Tensor) -> Tensor:
    return leaf.as_subclass(Tensor)


def _like(mixed: Tensor, leaf: Tensor) -> Tensor:
    """`mixed`, as the kind of tv_tensor that `leaf` is."""
    if _kind(leaf) == "tensor":
        return mixed
    return sys.modules["torchvision.tv_tensors"].wrap(mixed, like=leaf)
