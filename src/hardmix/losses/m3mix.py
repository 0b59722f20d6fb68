"""Geodesic mixing within a modality (V-, L-, VL-Mix), and m3-Mix, which adds it to CLIP and m2-Mix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import reduce, softplus
from hardmix.distributed import rank_and_size
from hardmix.kernels.pair_contrast import LOWEST, Term, pair_contrast, partner_order, tile_rows
from hardmix.losses.clip import REDUCTIONS, Gathered, cross_entropy, gathered, one_number, without_effect
from hardmix.losses.m2mix import CONVENTIONS, Mixed, Scheduled, check_draws, draw_shares, mixed_rows
from hardmix.mixing.draw import move
from hardmix.mixing.geodesic import slerp_coefficients

MIX = ("image", "text", "joint", "given")
TARGETS = ("mixed", "identity", "code")
NEGATIVES = ("mixed", "original")


def unimodal_mix_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    mix: str = "image",
    lam: Tensor | float | None = None,
    alpha: float = 0.5,
    per: str = "batch",
    target: str | None = None,
    negatives: str = "mixed",
    normalize: bool = True,
    reduction: str = "mean",
    generator: Generator | None = None,
) -> Tensor:
    """V-, L- or VL-Mix: contrast of pairs of which one side, or both, is mixed with the batch in reverse.

        image   (V)    z_ij = s v_i . b_j     v_i = slerp(a_i, a_r, lam),  l_j = slerp(b_j, b_r, lam),  r = N - 1 - i
        text    (L)    z_ij = s a_i . l_j
        joint   (VL)   z_ij = s v_i . l_j     with one lam for both
        given          z_ij = s a_i . b_j     the caller has mixed: inputs, hidden states, features before a projection

        l_i = 1/2 sum_j T_ij [log sum_k exp(z_ik) - z_ij]  +  1/2 sum_j T_ji [log sum_k exp(z_ki) - z_ji]
        T   = lam I + (1 - lam) J,   J_ij = 1 for j = r     or, for "joint", T = I

    No mixture is formed: cosines with them follow from those of the rows. Above 1,024 pairs those are formed in tiles,
    twice, and memory grows with N. Pairs are compared with all pairs of the batch; processes do not exchange theirs,
    as those of `M3MixLoss` do.

    Args:
        image_features, text_features, logit_scale: as for `clip_loss`; the scale is that of the unmixed loss.
        mix: which side is mixed.
        lam: share of the row itself, instead of drawing: a number, or (N,) with the same for rows i and N - 1 - i;
            (S, 1) or (S, N) for S draws, over which the loss is averaged. For "given" it is needed with a mixed target.
        alpha: lam ~ Beta(alpha, alpha), from 1e-4 to 1e4.
        per: "batch" for one lam for all rows, "pair" for one for each two that are mixed.
        target: None for the T above; or "mixed", "identity", or "code", I + J, the released code's for VL.
        negatives: "mixed" as above; "original" keeps plain logits but for the pair's and its partner's.
        normalize: False to refuse rows whose length is not 1, up to rounding; see `clip_loss`.
        reduction: "mean" over the pairs, "sum", or "none".
        generator: CPU generator of the draws; None takes torch's global one.

    Returns:
        Scalar, or (N,) for "none", float32 or wider. With an odd N the middle row is its own partner and stays as it
        is. N = 1: 0, with a gradient of zeros. Equal rows mix to themselves; opposite ones have no arc, see `slerp`,
        and everything stays finite. lam = 1 gives `clip_loss`. First derivatives only.

    Raises:
        TypeError: not tensors, integer features, a setting of another kind.
        ValueError: numbers of rows or columns, or devices, disagree; an empty batch; a setting out of its range; on the
            CPU also NaN or infinity in the features, named by row, a scale that is not positive, shares that differ
            between partners, or with normalize=False a row of another length than 1. A GPU is not waited for: NaN gives
            NaN there.

    Reference: Oh et al. 2023, arXiv:2203.03897. For VL the released code has the target I + J, which counts each row
    twice, and an earlier version I; the default is I. There, the middle row of an odd batch is NaN.

    >>> import torch
    >>> pair = torch.eye(2)
    >>> round(unimodal_mix_loss(pair, pair, 1.0, lam=0.5).item(), 4)   # all logits alike: log 2
    0.6931
    """
    who = "unimodal_mix_loss"
    _check.choice(who, "mix", mix, MIX)
    check_draws(who, alpha, 1, per)
    target = _default_target(mix) if target is None else _check.choice(who, "target", target, TARGETS)
    _check.choice(who, "negatives", negatives, NEGATIVES)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    if mix == "given" and target == "mixed" and lam is None:
        raise ValueError(f"{who}: lam is None; pass the share that the features were mixed with.")
    batch = _reversed_batch(who, image_features, text_features, False, normalize)
    scale = one_number(who, "logit_scale", logit_scale, batch.a)
    drawn = batch.shares(who, lam, alpha, 1, per, generator)
    part = _part(batch, mix, drawn, scale, target, negatives)
    return reduce(part.loss(batch, batch.contrast(part.terms))[batch.order.argsort()], reduction)


class M3MixLoss(Scheduled):
    """m3-Mix: CLIP, V-, L-, VL- and m2-Mix, in the place of open_clip's `ClipLoss`.

        L = L_CLIP + f(e) [v L_V + l L_L + vl L_VL + w L_m2]

    L_CLIP is `clip_loss`, the next three are `unimodal_mix_loss`, all at the model's `logit_scale`, and L_m2 is
    `m2mix_loss` at a temperature of its own. All come from the same products of rows. Shapes, edges and errors are
    those of these functions. Call, `lam` (for all terms alike), `generator` and `output_dict` are as for `M2MixLoss`,
    with the sum of all mixed terms under "m3mix_loss".

    Processes compare and mix the pairs of all of them, M in number, and share each lam, as for `M2MixLoss`: row i meets
    row M - 1 - i, mostly another process's. A process answers for the logits of M / ranks rows, which may be others'.

    Args:
        image_weight, text_weight, joint_weight, m2_weight: v, l, vl, w, at least 0; a term without weight costs
            nothing. The authors' m3 scripts have .05, .05, one of .05, .1, .2, and .01.
        alpha, m2_alpha: of the Beta distributions of lam, that of V, L and VL, and that of m2. Each term has its draw.
        temperature: of the rows of m2; None for the model's.
        schedule: None for f = 1; "inverse" for f(e) = 1 / (e + 1); see `M2MixLoss`.
        draws: how many times each lam is drawn.
        per: "batch" for one lam for all rows, "pair" for one each; see the functions.
        joint_target: "identity", or "code" for the released target of VL, I + J.
        negatives: "mixed", or "original"; see `unimodal_mix_loss`.
        weight_convention: "paper" as above; "code" counts w twice, as the released code does.
        normalize, accumulate, gather, open_clip: see `M2MixLoss`.

    Reference: Oh et al. 2023, arXiv:2203.03897.

    >>> import torch
    >>> M3MixLoss()(torch.randn(8, 16), torch.randn(8, 16), 100.0).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        image_weight: float = 0.05,
        text_weight: float = 0.05,
        joint_weight: float = 0.1,
        m2_weight: float = 0.01,
        alpha: float = 0.5,
        m2_alpha: float = 0.2,
        temperature: float | None = 0.07,
        schedule: str | None = None,
        draws: int = 1,
        per: str = "batch",
        joint_target: str = "identity",
        negatives: str = "mixed",
        weight_convention: str = "paper",
        normalize: bool = True,
        accumulate: int = 1,
        gather: bool = True,
        **open_clip: Any,
    ) -> None:
        super().__init__(schedule, normalize, accumulate, gather, open_clip)
        who = type(self).__name__
        given = {"image": image_weight, "text": text_weight, "joint": joint_weight, "m2": m2_weight}
        self.weights = {name: _check.non_negative(who, f"{name}_weight", value) for name, value in given.items()}
        if not any(self.weights.values()):
            raise ValueError(f"{who}: all weights are 0; pass one that is greater, or use ClipLoss.")
        check_draws(who, alpha, draws, per)
        self.alpha, self.draws, self.per = float(alpha), draws, per
        self.m2_alpha = _check.between(who, "m2_alpha", m2_alpha, 1e-4, 1e4)
        self.temperature = temperature if temperature is None else _check.positive(who, "temperature", temperature)
        self.joint_target = _check.choice(who, "joint_target", joint_target, ("identity", "code"))
        self.negatives = _check.choice(who, "negatives", negatives, NEGATIVES)
        self.weight_convention = _check.choice(who, "weight_convention", weight_convention, CONVENTIONS)

    def extra_repr(self) -> str:
        parts = ", ".join(f"{name}_weight={value:g}" for name, value in self.weights.items())
        return f"{parts}, temperature={self.temperature}, schedule={self.schedule!r}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        lam: Tensor | float | None = None,
        generator: Generator | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see the class."""
        who = type(self).__name__
        batch = _reversed_batch(who, image_features, text_features, self.gather, self.normalize)
        own, scale = batch.own, one_number(who, "logit_scale", logit_scale, batch.a)
        generator = self.drawing(generator) if lam is None else generator
        parts = []
        for mix in ("image", "text", "joint"):
            # Drawn whatever the weight, so that leaving a term out does not change the others' draws.
            drawn = batch.shares(who, lam, self.alpha, self.draws, self.per, generator)
            if self.weights[mix]:
                target = self.joint_target if mix == "joint" else "mixed"
                parts.append((self.weights[mix], _part(batch, mix, drawn, scale, target, self.negatives)))
        drawn = batch.shares(who, lam, self.m2_alpha, self.draws, self.per, generator, partners=False)
        mixed = mixed_rows(
            batch.cos,
            drawn,
            scale if self.temperature is None else one_number(who, "temperature", 1.0 / self.temperature, batch.a),
        )
        mixed = Mixed(mixed.terms, mixed.own[own])
        terms = [Term(scale=scale), *(term for _, part in parts for term in part.terms)]
        others = batch.contrast(terms + (mixed.terms if self.weights["m2"] else []))
        contrastive = batch.pairs.reduce(cross_entropy(others[0], scale * batch.cos[own]))
        at, total = 1, torch.zeros_like(others[0, 0])  # (n,)
        for weight, part in parts:
            total = total + weight * part.loss(batch, others[at : at + len(part.terms)])
            at += len(part.terms)
        if self.weights["m2"]:
            weight = self.weights["m2"] * (1.0 if self.weight_convention == "paper" else 2.0)
            total = total + weight * mixed.loss(others[at:])
        contrastive, total = without_effect(contrastive, logit_bias), self.scheduled(batch.pairs.reduce(total))
        return {"contrastive_loss": contrastive, "m3mix_loss": total} if output_dict else contrastive + total


class _Batch(NamedTuple):
    """Unit rows in an order in which partners, i and M - 1 - i, share a tile, and the places this process answers for.

    order: (M,) the row at a place. partner: (M,) the place of a place's partner. cos, across: (M,) cosines of an image
    with its text and with its partner's.
    """

    pairs: Gathered
    tiles: list[slice]
    order: Tensor
    partner: Tensor
    cos: Tensor
    across: Tensor

    @property
    def a(self) -> Tensor:
        return self.pairs.a

    @property
    def b(self) -> Tensor:
        return self.pairs.b

    @property
    def own(self) -> slice:
        return self.pairs.own

    def contrast(self, terms: list[Term]) -> Tensor:
        """(T, 2, n) for the places of this process."""
        return pair_contrast(self.a, self.b, terms, tiles=self.tiles, first=self.own.start, last=self.own.stop)

    def shares(
        self,
        who: str,
        lam: Tensor | float | None,
        alpha: float,
        draws: int,
        per: str,
        generator: Generator | None,
        partners: bool = True,
    ) -> Tensor:
        """Shares (S, 1) or (S, N) in the order of the rows; partners share theirs unless told otherwise."""
        drawn = self.pairs.agreed(draw_shares(who, self.a, lam, alpha, draws, per, generator))
        if drawn.shape[1] == 1:
            return drawn
        if partners and lam is None:
            row = torch.arange(drawn.shape[1], device=drawn.device)
            drawn = drawn[:, torch.minimum(row, row.flip(0))]
        elif partners and drawn.device.type == "cpu" and not torch.equal(drawn, drawn.flip(1)):
            raise ValueError(f"{who}: lam differs between rows i and N - 1 - i; pass one share for each two of them.")
        return drawn[:, self.order]


class _Part(NamedTuple):
    """A kind of mixing: its terms, one per draw or one for all, and the logits that its targets weigh, (S, N)."""

    terms: list[Term]
    own: Tensor
    across: Tensor
    lam: Tensor
    target: str

    def loss(self, batch: _Batch, others: Tensor) -> Tensor:
        """(n,) from the log-sum-exp of the logits that have no part in a target, (T, 2, n)."""
        at, partner = batch.own, batch.partner[batch.own]
        own, across = self.own[:, None, at], torch.stack((self.across[:, at], self.across[:, partner]), 1)  # (S, 2, n)
        alone = partner == torch.arange(at.start, at.stop, device=partner.device)
        first = softplus(torch.logaddexp(others, across.masked_fill(alone, LOWEST)) - own)
        if self.target == "identity":
            return first.mean((0, 1))
        second = torch.where(alone, first, softplus(torch.logaddexp(others, own) - across))
        if self.target == "code":
            return (first + second).mean((0, 1))
        lam = self.lam[:, None] if self.lam.shape[1] == 1 else self.lam[:, None, at]
        return (lam * first + (1.0 - lam) * second).mean((0, 1))


def _default_target(mix: str) -> str:
    return "identity" if mix == "joint" else "mixed"


def _reversed_batch(who: str, image_features: Tensor, text_features: Tensor, gather: bool, normalize: bool) -> _Batch:
    a, b, _, ranks = gathered(who, image_features, text_features, gather, normalize)
    rank = rank_and_size()[0] if ranks > 1 else 0
    # Parts of whole pairs of partners, which have no tile in common.
    cuts = [2 * (len(a) // 2 * k // ranks) for k in range(ranks)] + [len(a)]
    tiles = tile_rows(len(a), a.device, cuts)
    order, partner = (move(place, a.device) for place in partner_order(tiles))
    a, b = a[order], b[order]
    pairs = Gathered(a, b, slice(cuts[rank], cuts[rank + 1]), ranks)
    return _Batch(pairs, tiles, order, partner, (a * b).sum(1), (a * b[partner]).sum(1))


def _part(batch: _Batch, mix: str, lam: Tensor, scale: Tensor, target: str, negatives: str) -> _Part:
    """What one kind of mixing asks of a batch."""
    own, across = scale * batch.cos[None], scale * batch.across[None]  # (S, N)
    image = text = None
    p = batch.partner
    if mix in ("image", "joint"):
        image = alpha, beta = slerp_coefficients((batch.a * batch.a[p]).sum(1), lam)
        own, across = alpha * own + beta * across[:, p], alpha * across + beta * own[:, p]
    if mix in ("text", "joint"):
        text = alpha, beta = slerp_coefficients((batch.b * batch.b[p]).sum(1), lam)
        own, across = alpha * own + beta * across, alpha[:, p] * across + beta[:, p] * own
    if mix == "given" or negatives == "original":
        return _Part([Term(scale=scale, partners=True)], own, across, lam, target)
    count = len(own)
    # The scale goes with one of the two sides.
    images = [None] * count if image is None else (scale * torch.stack(image, 1)).unbind()
    texts = [None] * count if text is None else ((1.0 if image else scale) * torch.stack(text, 1)).unbind()
    terms = [Term(image=i, text=t, partners=True) for i, t in zip(images, texts, strict=True)]
    return _Part(terms, own, across, lam, target)
