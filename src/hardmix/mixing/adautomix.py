"""AdAutoMix: masks for three or more samples, from a generator that every second step works against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU
from hardmix.mixing.draw import Pairing, cpu_generator, draw_beta, move, row_numbers
from hardmix.mixing.gradients import logits_of, model_input, trackable
from hardmix.mixing.learned import LearnedPolicy, mean_share
from hardmix.mixing.mask_block import JointMask
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget


class Mixture(NamedTuple):
    """One draw of who is mixed with whom, how much, and where: a `MixPlan` for K samples.

        out_i = sum_k masks_ik * x_{partner_ik}

    Attributes:
        partner: (N, K) long; the first column is the row itself.
        share: (N, K) float32, what the labels get; sums to one over K.
        masks: (N, K, H, W) shares of each pixel; they sum to one over K.
    """

    partner: Tensor
    share: Tensor
    masks: Tensor

    def blend(self, x: Tensor) -> Tensor:
        """Mix a batch (N, C, H, W); half types are summed in float32 and rounded once. `x` is never written."""
        wide = torch.promote_types(x.dtype, self.masks.dtype)
        out = x.to(wide) * self.masks[:, :1].to(wide)
        for k in range(1, self.masks.shape[1]):
            out = torch.addcmul(out, x.index_select(0, self.partner[:, k]).to(wide), self.masks[:, k : k + 1].to(wide))
        return out.to(x.dtype)

    def target(self, y: Tensor, *, kind: str = "auto") -> MixedTarget:
        """K labels and shares of each mixed sample; `y` and `kind` as in `MixPlan.target`, except that integer masks
        are (N, H, W)."""
        who = "Mixture.target"
        _check.choice(who, "kind", kind, ("auto", "rows", "mask"))
        y = y if y.is_floating_point() else y.long()
        is_mask = kind == "mask" or (kind == "auto" and y.ndim > 2 and not y.is_floating_point())
        rows = y.shape[1:] == self.masks.shape[2:] and not y.is_floating_point() if is_mask else y.ndim <= 2
        if not rows:
            raise ValueError(
                f"{who}: y has shape {tuple(y.shape)} and dtype {y.dtype}; pass (N,) or (N, C) labels, or integer "
                f"masks {(self.masks.shape[0], *self.masks.shape[2:])}."
            )
        return MixedTarget(y[self.partner], self.masks if is_mask else self.share)


class _Pending(NamedTuple):
    """What `loss` needs of the batch that was mixed last."""

    x: Tensor
    y: Tensor
    kind: str
    maps: Tensor
    logits: Tensor
    partner: Tensor
    lam: Tensor
    drawn: tuple[Tensor, Tensor]  # partners and shares of the batch that the model gets


class AdAutoMix(LearnedPolicy):
    """AdAutoMix: three or more images in one, and a generator that makes them easy and hard in turn.

        x~_i = sum_k M_ik x_{p_ik},   M = mask_block(maps of the K samples, lam)
        lam_k = b_k / sum_j b_j,   b_k ~ Beta(alpha, alpha)

        policy.loss = L                                   L = criterion(teacher(x~'), sum_k lam'_k y_k)
        every `interval`-th step
        policy.loss = -adversarial L + cosine S           S = mean_i sum_k lam'_k cos(teacher(x~'), teacher(x_k))

        and in all steps, for the model
        policy.loss += clean criterion(model(x), y) + linear criterion(model(sum_k lam_k x_{p_k}), sum_k lam_k y_{p_k})

    The row itself comes first, and its partners are distinct rows where the batch has enough of them. As in `AutoMix`
    a batch is mixed twice, for the model and for the generator, with draws of their own; the mask block is `JointMask`.
    The target has K = `samples` labels. Steps are counted by `after_step` in the buffer `step`, so all parts of an
    accumulated batch are alike and a checkpoint goes on where it was; the last of each `interval` is the adversarial
    one.

    Args:
        model, layer, input_shape, momentum, embed_lam, label: see `AutoMix`.
        samples: K, at least 2.
        alpha: parameter of the Beta that each unscaled share is drawn from.
        margin: rows with a share <= margin are mixed as a whole, by their shares.
        adversarial: weight of the sign-changed loss in an adversarial step.
        cosine: weight of the cosine in an adversarial step. Positive, as in the released code, it lowers the
            similarity to what is mixed; the paper's text speaks of keeping the images' meaning, which asks for a
            negative one.
        interval: an adversarial step each so many steps; 1: all of them.
        clean: weight of the model's own loss on the clean batch, one more forward and backward; 0: none.
        linear: weight of its loss on the same samples mixed as a whole, by the shares; one more of each, too. 0: none.
        upsample: "bilinear" or "nearest".
        per: how often shares are drawn, "batch" or "sample".

    Shapes: images (N, C, H, W), square or not, in a floating-point dtype. N = 1 mixes the sample with itself; with
    N < K partners repeat, and the shares of one row or class add up in the objective. All shares drawn as 0, which only
    a tiny alpha can do, count as equal. A constant (1 x 1) map gives masks of one value per image.
    `plan` is refused: a plan has one partner. `mixture` draws without arming anything.
    Cost: as `AutoMix`, and the linear mixture's forward and backward. Batch normalisation, copies: as `AutoMix`.
    Raises:
        ValueError, TypeError: as `AutoMix`; `plan` a NotImplementedError.
    Reference: Qin et al. 2024, section 3 (arXiv:2312.11954); the numbers and the steps are those of the released code
    (OpenMixup), `clean` and `linear` included. It has a classifier of its own for the clean batch, where here the model
    has one, and no linear mixture of two samples. It shares one lambda with a batch and between both draws; leaves the
    row itself to chance; leaves lambda out of the maps; starts with the adversarial step; and compares the wrong way,
    so that its model sees linear mixtures only.
    """

    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str = "",
        input_shape: Sequence[int] = (3, 32, 32),
        samples: int = 3,
        alpha: float = 1.0,
        momentum: float = 0.999,
        margin: float = 0.03,
        adversarial: float = 0.3,
        cosine: float = 0.7,
        interval: int = 2,
        clean: float = 0.5,
        linear: float = 0.5,
        embed_lam: bool = True,
        upsample: str = "bilinear",
        label: str = "mask",
        per: str = "sample",
    ) -> None:
        who = "AdAutoMix"
        super().__init__(
            model,
            layer=layer,
            input_shape=input_shape,
            alpha=alpha,
            momentum=momentum,
            margin=margin,
            label=label,
            per=_check.choice(who, "per", per, ("batch", "sample")),
            pairing="shift",
        )
        self.samples = _check.integer(who, "samples", samples, 2)
        self.adversarial = _check.non_negative(who, "adversarial", adversarial)
        self.cosine = _check.number(who, "cosine", cosine)
        self.interval = _check.integer(who, "interval", interval, 1)
        self.clean = _check.non_negative(who, "clean", clean)
        self.linear = _check.non_negative(who, "linear", linear)
        self.block = JointMask(self.teacher.channels, embed_lam=embed_lam, upsample=upsample)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.to(self.teacher.like.device)

    def extra_repr(self) -> str:
        return (
            f"samples={self.samples}, adversarial={self.adversarial:g}, cosine={self.cosine:g}, "
            f"interval={self.interval}, {super().extra_repr()}"
        )

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> MixPlan:
        """Refused: see `mixture`."""
        raise NotImplementedError(
            f"AdAutoMix: a plan has one partner but {self.samples} samples are mixed; call mixture() or the policy."
        )

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        """Refused: see `mixture`."""
        return self.plan(x)

    def mixture(self, x: Tensor, *, generator: Generator | None = None) -> Mixture:
        """Draw shares, partners and masks for the batch `x` (N, C, H, W)."""
        return self._mixture(x, generator)[0]

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x_mixed, target) with K labels per row."""
        who = "AdAutoMix"
        x = _check.batch(who, "x", x, 4, 4)
        y = _check.tensor(who, "y", y)
        _check.same_length(who, "y", y, "x", x.shape[0])
        _check.same_device(who, "y", y, "x", x.device)
        _check.finite(who, "x", x)
        mixture, maps, logits, drawn = self._mixture(x, generator)
        target = mixture.target(y, kind=kind)
        partner, lam = self._draw_rows(x, generator)
        self._pending = _Pending(x, y, kind, maps, logits, partner, lam, drawn)
        return mixture.blend(x), target

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """The generator's loss on the batch that was mixed last, once: the next call returns None.

        Args:
            criterion: the objective, (logits, target) -> scalar.
        """
        if self._pending is None:
            return None
        (x, y, kind, maps, clean, partner, lam, drawn), self._pending = self._pending, None
        with torch.autocast(x.device.type, enabled=False):
            masks = self.block(maps[partner], lam, (x.shape[2], x.shape[3]))
            wide = trackable(x.detach().to(torch.promote_types(x.dtype, masks.dtype)))
            mixed = Mixture(partner, lam, masks).blend(wide)
        logits = self.teacher(mixed)
        mce = criterion(logits, Mixture(partner, lam, masks.detach()).target(y, kind=kind))
        # In float32: half types overflow in a norm.
        similar = F.cosine_similarity(logits.float().flatten(1)[:, None], clean.float().flatten(1)[partner], dim=2)
        similarity = (lam * similar).sum(1).mean()
        # Both are computed and one is chosen on the device: asking for the step would wait for it.
        hard = self.step % self.interval == self.interval - 1
        loss = torch.where(hard, self.cosine * similarity - self.adversarial * mce, mce)
        if self.clean:
            loss = loss + self.clean * self._clean_loss(criterion, x, y, kind)
        if self.linear:
            model, (rows, share) = self._model(), drawn
            linear = Mixture(rows, share, share[..., None, None].expand(-1, -1, *x.shape[2:]))
            logits = logits_of("AdAutoMix", model(model_input("AdAutoMix", model, linear.blend(x))))
            loss = loss + self.linear * criterion(logits, linear.target(y, kind=kind))
        return loss

    def after_step(self) -> None:
        super().after_step()
        self.step += 1

    def _mixture(self, x: Tensor, generator: Generator | None) -> tuple[Mixture, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(mixture, maps, logits of the clean batch, partners and drawn shares)"""
        x = _check.batch("AdAutoMix", "x", x, 4, 4)
        cpu_generator("AdAutoMix", generator)
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            partner, lam = self._draw_rows(x, generator)
            maps, logits = self._read(x)
            masks = self.block(maps[partner], lam, (x.shape[2], x.shape[3])).to(torch.float32)
            whole = lam.amin(1) <= self.margin
            masks = torch.where(whole.view(-1, 1, 1, 1), lam[..., None, None], masks)
        share = lam if self.label == "drawn" else mean_share(masks)
        return Mixture(partner, share, masks), maps, logits, (partner, lam)

    def _draw_rows(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """((N, K) rows, (N, K) shares): the row itself and K - 1 others, each a cyclic shift away, none twice if there
        are enough."""
        rows, others = x.shape[0], self.samples - 1
        shifts = torch.randperm(max(rows - 1, 1), device=CPU, generator=generator) + 1
        shifts = F.pad(shifts[row_numbers(others) % len(shifts)], (1, 0))
        partner = (row_numbers(rows)[:, None] + shifts) % rows
        count = self._count(rows)
        draws = draw_beta(self.alpha, self.alpha, count * self.samples, generator).view(count, self.samples)
        draws = draws + torch.finfo(draws.dtype).tiny
        lam = (draws / draws.sum(1, keepdim=True)).expand(rows, -1).contiguous()
        return move(partner, x.device), move(lam, x.device)
