"""MixPlan: one draw of who is mixed with whom, how much, and where."""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix.kernels import blend as kernel
from hardmix.kernels import warp
from hardmix.mixing.draw import move
from hardmix.mixing.target import MixedTarget


class MixPlan:
    """One draw: row i of the mixed batch is `lam[i]` of row i and `1 - lam[i]` of row `partner[i]`.

        out_i = m_i * own_i + (1 - m_i) * x_{partner_i},   m_i = mask_i where there is a mask, else lam_i

    A plan is a value: it draws nothing, so the same plan mixes images, dense masks, second views and hidden states
    alike.

    Attributes:
        partner: (N,) long, the row that each row is mixed with.
        lam: (N,) float32, the share of the **own** sample. With a mask or boxes it is the mask's mean, so labels and
            pixels agree, unless another one was given: labels and features then follow `lam`, pixels the mask.
        mask: (N, 1, *spatial) float32 share of the own pixel, or None. A plan made of boxes, or of a line for each axis
            (GridMix, SmoothMix), holds these and forms the mask when it is asked for.
        box: (N, S, 2) long half-open [start, stop) along each of the S spatial axes: the pixels that show the partner.
        fit: (N, S, 2) long boxes that the partner is shown whole in, resized (ResizeMix), or None. It is resized when a
            batch is blended, so second views, dense masks and hidden maps follow.
        own, other: changed images of the rows and of their partners (already in row order), where a policy changes
            pixels before it blends; None where the batch itself is blended. They belong to the batch that the plan was
            drawn for (AugMix). With `fit`, `other` holds that batch's resized partners.
    """

    __slots__ = ("_mask", "_other", "box", "fit", "lam", "lines", "own", "partner", "shift", "size", "source")

    def __init__(
        self,
        partner: Tensor,
        lam: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        box: Tensor | None = None,
        size: tuple[int, ...] | None = None,
        own: Tensor | None = None,
        other: Tensor | None = None,
        shift: int | None = None,
        fit: Tensor | None = None,
        source: Tensor | None = None,
        lines: kernel.LineMask | None = None,
    ) -> None:
        """`size` is the spatial size that `box` and `fit` refer to, `source` the batch that the plan was drawn for.
        `shift` says that partner[i] = (i + shift) mod N, which lets a CPU blend two contiguous blocks instead of
        gathering rows; it must agree with `partner`. Without `lam` it is the mean of the mask. `lines` stands for a
        mask that is formed of a line for each axis; it needs `lam`.

        Raises:
            TypeError: something that is not a tensor, or a tensor of the wrong kind of numbers; a bool mask is taken as
                0 and 1, and narrower integers as long.
            ValueError: rows of `lam`, `mask` or `box` that are not those of `partner`, `box` without `size`, or neither
                a share nor a place. Values are not looked at: a row of `partner` below 0 or beyond the batch may raise
                an error of torch, or mix with another row.
        """
        for name, value in (("box", box), ("fit", fit)):
            if value is not None and size is None:
                raise ValueError(f"MixPlan: {name} is given without size; pass the spatial size that it refers to.")
        if shift is not None:
            _check.integer("MixPlan", "shift", shift, 0)
        if size is not None and not isinstance(size, tuple):
            raise TypeError(f"MixPlan: size is {size!r}; pass a tuple of the spatial lengths.")
        partner = _integers("partner", partner)
        box = None if box is None else _integers("box", box)
        if mask is not None and _check.tensor("MixPlan", "mask", mask).dtype == torch.bool:
            mask = mask.to(torch.float32)
        for name, value in (("mask", mask), ("lam", lam)):
            if value is not None and not _check.tensor("MixPlan", name, value).is_floating_point():
                raise TypeError(f"MixPlan: {name} has dtype {value.dtype}; pass floating-point shares from 0 to 1.")
        for name, value in (("own", own), ("other", other), ("fit", fit), ("source", source)):
            if value is not None:
                _check.tensor("MixPlan", name, value)
        if lam is None:
            lam = _mean_share(mask, box, size)
        rows = partner.shape[0] if partner.ndim == 1 else None
        if lam.shape != partner.shape or rows is None:
            raise ValueError(
                f"MixPlan: lam has shape {tuple(lam.shape)} and partner {tuple(partner.shape)}; pass (N,) and (N,)."
            )
        if mask is not None and (mask.ndim < 3 or mask.shape[0] != rows or mask.shape[1] != 1):
            raise ValueError(
                f"MixPlan: mask has shape {tuple(mask.shape)} for {rows} rows; pass ({rows}, 1, *spatial)."
            )
        if box is not None and size is not None and box.shape != (rows, len(size), 2):
            raise ValueError(
                f"MixPlan: box has shape {tuple(box.shape)} for {rows} rows of size {tuple(size)}; "
                f"pass ({rows}, {len(size)}, 2)."
            )
        self.partner = partner
        self.lam = lam
        self.lines = lines
        self._mask = mask
        self.box = box
        self.size = size
        self.own = own
        self._other = other
        self.shift = shift
        self.fit = fit
        self.source = source

    @classmethod
    def identity(cls, rows: int, device: torch.device | str = "cpu") -> MixPlan:
        """The plan that mixes nothing: each row is its own partner and lam = 1."""
        rows = _check.integer("MixPlan.identity", "rows", rows, 0)
        return cls(torch.arange(rows, device=device), torch.ones(rows, dtype=torch.float32, device=device), shift=0)

    @property
    def other(self) -> Tensor | None:
        if self._other is None and self.fit is not None and self.source is not None:
            return warp.resize_into_boxes(self.source, self.partner, self.fit)
        return self._other

    @property
    def mask(self) -> Tensor | None:
        if self._mask is None and self.box is not None:
            assert self.size is not None
            return kernel.box_mask(self.box, self.size)
        return self._mask if self.lines is None else self.lines.whole()

    def __len__(self) -> int:
        return self.partner.shape[0]

    def __repr__(self) -> str:
        parts = [f"{len(self)} rows"]
        if len(self) > 0 and self.lam.device.type != "meta":
            parts.append(f"lam from {float(self.lam.min()):.3f} to {float(self.lam.max()):.3f}")
        mask = self.mask
        if mask is not None:
            parts.append(f"mask {tuple(mask.shape)}")
        return f"MixPlan({', '.join(parts)})"

    def to(self, device: torch.device | str) -> MixPlan:
        """The same plan on another device. Plans are drawn on the CPU and moved once."""
        if self.lam.device == torch.device(device):
            return self

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else move(value, device)

        box = moved(self.box)
        return MixPlan(
            move(self.partner, device),
            move(self.lam, device),
            moved(self._mask),
            lines=None if self.lines is None else self.lines.map(lambda line: move(line, device)),
            box=box,
            size=self.size,
            own=moved(self.own),
            other=moved(self._other),
            shift=self.shift,
            fit=box if self.fit is self.box else moved(self.fit),
            source=moved(self.source),
        )

    def blend(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Mix a batch: images, volumes, series, features, second views or hidden states. `x` is never written.

        Inputs keep their dtype: half types are blended in float32 and rounded once, integers rounded to the nearest one
        (int64 by way of float64, so to 53 bits). The memory format is kept. Where `x` has another spatial size than the
        mask (a hidden map), the mask is averaged onto it. Where `x` has no spatial axes (features), rows are blended by
        `lam`. Boxes copy their pixels; any other mask is a weight, and a NaN or an infinity shows through a weight of 0
        as NaN.

        Args:
            x: (N, ...) batch.
            out: optional tensor like `x` to write into; a fresh batch costs several times the arithmetic on a CPU.
                It must not overlap `x` (use `blend_` for that) nor require a gradient.

        Raises:
            ValueError: another number of rows than the plan, another device, a rank that the mask can't be put on,
                another shape or dtype than the changed images that the plan carries, or an `out` that is not like `x`,
                shares its memory or requires a gradient.
        """
        self._check_rows("MixPlan.blend", x)
        if out is not None:
            _check_out("MixPlan.blend", x, out)
        return self._blend(x, out)

    def blend_(self, x: Tensor) -> Tensor:
        """`blend`, written into `x` itself for a caller who no longer needs the clean batch. Returns `x`.

        A leaf that requires a gradient is refused. The resized partners of a plan of ResizeMix (`other`) are made from
        the batch when they are asked for, so ask before.
        """
        self._check_rows("MixPlan.blend_", x)
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                "MixPlan.blend_: x is a leaf that requires a gradient and can't be overwritten; use blend, or blend_ "
                "under torch.no_grad()."
            )
        _check_memory("MixPlan.blend_", "x", x)
        return self._blend(x, x)

    def _blend(self, x: Tensor, out: Tensor | None) -> Tensor:
        own, other = self.own, self._other
        if self.fit is not None and self.fit is self.box and own is None and tuple(x.shape[2:]) == self.size:
            return warp.paste_resized(x, self.partner, self.fit, out=out)
        weight, box = self._where(x)
        if self.fit is not None and x.ndim > 2:
            other = warp.resize_into_boxes(x, self.partner, self._scaled(self.fit, x))
        # A compiled region would be compiled anew for each shift; there the gather is fused with the blend anyway.
        shift = None if torch.compiler.is_compiling() else self.shift
        if own is None and other is None:
            if shift == 0:
                return x.clone() if out is None else out.copy_(x)
            if box is not None:
                return kernel.paste_boxes(x, self.partner, box, out=out)
            return kernel.blend_partner(x, self.partner, weight, shift=shift, out=out)
        assert isinstance(weight, Tensor)
        for name, changed in (("own", own), ("other", other)):
            if changed is not None and (changed.shape, changed.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"MixPlan.blend: x has shape {tuple(x.shape)} and dtype {x.dtype} but the plan's {name} images "
                    f"have {tuple(changed.shape)} and {changed.dtype}; draw a plan for this batch."
                )
        if other is None:
            other = x if shift == 0 else x.index_select(0, self.partner)
        return kernel.blend_rows(x if own is None else own, other, weight, out=out)

    def target(self, y: Tensor, *, kind: str = "auto") -> MixedTarget:
        """The labels of the mixed batch.

        Args:
            y: (N,) class ids or floats; (N, C) one-hot, multi-hot, soft or multi-output rows; (N, *spatial) integer
                masks.
            kind: "auto", or "rows" / "mask" where an (N, L) tensor could be read both ways (integer labels of series).
                "auto" reads integer tensors with three or more axes as masks. A 2-D one is a mask where the plan has a
                mask of that length L, else rows: pass "mask" to a policy whose plans may have none.

        Returns:
            MixedTarget with K = 2: own label first with weight `lam`, the partner's second. A dense mask is mixed with
            the plan's own mask, pixel by pixel, at the mask's resolution.
        """
        who = "MixPlan.target"
        y = _check.tensor(who, "y", y)
        _check.same_length(who, "y", y, "the plan", len(self))
        _check.same_device(who, "y", y, "the plan", self.lam.device)
        _check.choice(who, "kind", kind, ("auto", "rows", "mask"))
        if y.is_complex():
            raise TypeError(f"{who}: y has dtype {y.dtype}; pass integers or floating-point labels.")
        if not y.is_floating_point():
            y = y.long()  # narrower integers can't index
        is_mask = kind == "mask"
        if kind == "auto" and not y.is_floating_point():
            is_mask = y.ndim >= 3 or (y.ndim == 2 and tuple(y.shape[1:]) == self._mask_size())
        if y.ndim > 2 and not is_mask:
            raise ValueError(
                f"{who}: y has shape {tuple(y.shape)} and dtype {y.dtype}; "
                "pass (N,) or (N, C) labels, or integer masks."
            )
        if not is_mask:
            other = y.index_select(0, self.partner)
            return MixedTarget(torch.stack([y, other], 1), torch.stack([self.lam, 1.0 - self.lam], 1))
        if y.is_floating_point():
            raise TypeError(f"{who}: y is a mask of dtype {y.dtype}; pass integer class ids per pixel.")
        if self.own is not None or self._other is not None:
            raise ValueError(
                f"{who}: y is a dense mask but the plan changes pixels before it mixes, and masks can't follow; "
                "pass one label per sample, or take another policy."
            )
        share = self.mask
        if share is None:
            share = self.lam.view(-1, *[1] * (y.ndim - 1))
        else:
            share = share[:, 0]
            if share.shape[1:] != y.shape[1:]:
                raise ValueError(
                    f"{who}: y has spatial size {tuple(y.shape[1:])} but the plan's mask has {tuple(share.shape[1:])}; "
                    "pass masks at the resolution of the images."
                )
        share = share.expand(len(self), *share.shape[1:])
        other = y[self.partner] if self.fit is None else warp.nearest_into_boxes(y, self.partner, self.fit)
        return MixedTarget(torch.stack([y, other], 1), torch.stack([share, 1.0 - share], 1))

    def _check_rows(self, who: str, x: Tensor) -> None:
        x = _check.batch(who, "x", x, 1, 6)
        _check.same_length(who, "x", x, "the plan", len(self))
        _check.same_device(who, "x", x, "the plan", self.lam.device)

    def _scaled(self, box: Tensor, x: Tensor) -> Tensor:
        """Boxes in the pixels of `x`, which is a hidden map where its size is not the plan's."""
        assert self.size is not None
        if tuple(x.shape[2:]) == self.size:
            return box
        return torch.stack([box[:, axis] * (x.shape[2 + axis] / side) for axis, side in enumerate(self.size)], 1)

    def _mask_size(self) -> tuple[int, ...] | None:
        if self.box is not None:
            return self.size
        if self.lines is not None:
            return self.lines.size
        return None if self._mask is None else tuple(self._mask.shape[2:])

    def _where(self, x: Tensor) -> tuple[Tensor | kernel.LineMask, Tensor | None]:
        """The weight to blend `x` with, broadcastable to it, and the boxes where they can be pasted as they are."""
        flat = self.lam.view(-1, *[1] * (x.ndim - 1))
        size = self._mask_size()
        if size is None or x.ndim <= 2:
            return flat, None
        if x.ndim - 2 != len(size):
            raise ValueError(
                f"MixPlan.blend: x has shape {tuple(x.shape)} but the plan's mask has {len(size)} spatial axes; "
                f"pass (N, C, {', '.join('L' if len(size) == 1 else 'DHW'[-len(size) :])}), or (N, D) features."
            )
        if tuple(x.shape[2:]) == size:
            if self.fit is None and self.own is None and self._other is None:
                if self.box is not None:
                    return flat, self.box
                if self.lines is not None:
                    return self.lines, None
            mask = self.mask
            assert mask is not None
            return mask, None
        mask = self.mask
        assert mask is not None
        return F.interpolate(mask, size=tuple(x.shape[2:]), mode="area"), None


def _check_out(who: str, x: Tensor, out: object) -> None:
    out = _check.tensor(who, "out", out)
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{who}: out has shape {tuple(out.shape)}, dtype {out.dtype} and device {out.device}, but x has "
            f"{tuple(x.shape)}, {x.dtype} and {x.device}; pass torch.empty_like(x)."
        )
    _check_memory(who, "out", out)
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{who}: out requires a gradient and can't be overwritten; pass out.detach().")
    if torch.compiler.is_compiling() or x.is_meta:  # which have no addresses
        return
    # Not the storages: NumPy arrays that share memory come with one each.
    first, second = (x, out) if x.data_ptr() <= out.data_ptr() else (out, x)
    length = first.numel()
    if not first.is_contiguous():
        length = 1 + sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True))
    if second.data_ptr() < first.data_ptr() + first.element_size() * length:
        raise ValueError(f"{who}: out shares memory with x; pass another tensor, or call blend_ to write into x.")


def _check_memory(who: str, name: str, value: Tensor) -> None:
    """An expanded tensor has one place for many elements: what is written to it is lost."""
    if any(step == 0 and length > 1 for length, step in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(
            f"{who}: {name} has strides {value.stride()} and repeats its memory; pass {name}.contiguous()."
        )


def _integers(name: str, value: Tensor) -> Tensor:
    """Row numbers or pixels as long. uint8 would index as a mask does."""
    if _check.tensor("MixPlan", name, value).dtype == torch.long:
        return value
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"MixPlan: {name} has dtype {value.dtype}; pass integers.")
    return value.long()


def _mean_share(mask: Tensor | None, box: Tensor | None, size: tuple[int, ...] | None) -> Tensor:
    if mask is not None:
        return mask.mean(tuple(range(1, mask.ndim)))
    if box is None or size is None:
        raise ValueError("MixPlan: lam is missing and there is no mask or box to take it from; pass one of them.")
    return full_box_share(box, size)


def full_box_share(box: Tensor, size: tuple[int, ...]) -> Tensor:
    """Own share of a plan made of boxes: 1 - area / pixels, as the float32 quotient that the mask's mean gives. (N,)"""
    start, stop = box.unbind(2)
    area = reduce(torch.mul, (stop - start).unbind(1))
    pixels = math.prod(size)
    return (pixels - area).to(torch.float32) / pixels
