"""Geodesic multi-modal mixing (m2-Mix): CLIP whose negatives are mixtures of image and text, on the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, reduce, softplus
from hardmix.kernels.pair_contrast import Term, pair_contrast
from hardmix.losses.clip import (
    REDUCTIONS,
    Gathered,
    check_processes,
    cross_entropy,
    gathered,
    one_number,
    unit_pairs,
    without_effect,
)
from hardmix.mixing.draw import cpu_generator, draw_beta, move
from hardmix.mixing.geodesic import shares, slerp_coefficients
from hardmix.mixing.hidden import is_rerun

REPLACE = ("negatives", "positives", "both")
PER = ("batch", "pair")
CONVENTIONS = ("paper", "code")


def m2mix_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    lam: Tensor | float | None = None,
    alpha: float = 0.5,
    draws: int = 1,
    per: str = "batch",
    replace: str = "negatives",
    normalize: bool = True,
    reduction: str = "mean",
    generator: Generator | None = None,
) -> Tensor:
    """The mixed term of m2-Mix alone: contrast of each pair with geodesic mixtures of the others.

        m_j = slerp(a_j, b_j, lam),  on the arc from text j (lam = 0) to image j (lam = 1)
        l_i = 1/2 log(1 + sum_{j != i} exp((a_i . m_j - a_i . b_i) / t))
            + 1/2 log(1 + sum_{j != i} exp((b_i . m_j - a_i . b_i) / t))

    Anchors are not mixed, the positive is the original pair, and both directions meet the same mixtures. Gradients go
    through the mixtures, their angle included; lam is a constant. Mixtures are not formed: cosines with them follow
    from those of the rows, so further draws need no further products. Above 1,024 pairs these are formed in tiles,
    twice, and memory grows with N. Pairs are compared with all pairs of the batch; processes do not exchange theirs,
    as those of `M2MixLoss` do.

    Args:
        image_features, text_features: (N, D), row i of both is a pair. Any float dtype and length; rows are normalised,
            and angles, products and sums are done in float32 or wider.
        temperature: t, of mixed and unmixed logits alike; a number or a tensor of one element that may learn.
        lam: shares of the images, instead of drawing: a number; (N,), one per pair; (S, 1) or (S, N) for S draws, over
            which the loss is averaged.
        alpha: lam ~ Beta(alpha, alpha), from 1e-4 to 1e4.
        draws: how many times lam is drawn, S.
        per: "batch" for one lam for all pairs, "pair" for one each.
        replace: what the mixtures stand for: "negatives" as above; "positives", each pair's own mixture as a_i . m_i
            and b_i . m_i against unmixed negatives; or "both".
        normalize: False to refuse rows whose length is not 1, up to rounding; see `clip_loss`.
        reduction: "mean" over the pairs, "sum", or "none".
        generator: CPU generator of the draws; None takes torch's global one.

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1 has no other pair: 0, with a gradient of zeros. lam = 1
        makes the keys images, lam = 0 texts. A pair of equal rows mixes to that row. Opposite rows have no arc: their
        mixture is shorter, and everything stays finite; see `slerp`. First derivatives only.

    Raises:
        TypeError: not tensors, integer features, a setting of another kind.
        ValueError: numbers of rows or columns, or devices, disagree; an empty batch; a setting out of its range; on the
            CPU also NaN or infinity in the features, named by row, and with normalize=False a row of another length
            than 1. A GPU is not waited for: NaN gives NaN there.

    Reference: Oh et al. 2023, "Geodesic Multi-Modal Mixup for Robust Fine-Tuning", arXiv:2203.03897. The released code
    lacks the 1/2, divides by zero where the rows of a pair are equal, and rounds lam to float16; the module in its
    README gives mixed and unmixed logits different scales. Here all logits of a row have one. `replace` other than
    "negatives" comes from the authors' experiments with three modalities.

    >>> import torch
    >>> pair = torch.eye(2)
    >>> round(m2mix_loss(pair, pair, lam=0.3, temperature=1.0).item(), 4)   # log(1 + 1/e)
    0.3133
    """
    who = "m2mix_loss"
    check_draws(who, alpha, draws, per)
    _check.choice(who, "replace", replace, REPLACE)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    a, b = unit_pairs(who, image_features, text_features, normalize=normalize)
    scale = one_number(who, "temperature", temperature, a).reciprocal()
    c = (a * b).sum(1)
    mixed = mixed_rows(c, draw_shares(who, c, lam, alpha, draws, per, generator), scale, replace)
    return reduce(mixed.loss(pair_contrast(a, b, mixed.terms)), reduction)


class Scheduled(nn.Module):
    """What the losses with mixed terms have in common beside these: which pairs, of what length, how often to draw, and
    a factor of the weights, 1 or 1 / (epoch + 1)."""

    epoch: Tensor

    def __init__(
        self,
        schedule: str | None,
        normalize: bool,
        accumulate: int,
        gather: bool,
        open_clip: Mapping[str, object],
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if schedule not in (None, "inverse"):
            raise ValueError(
                f"{who}: schedule is {_check.shown(schedule)}; pass 'inverse', or None for a constant weight."
            )
        self.schedule = schedule
        self.normalize = _check.boolean(who, "normalize", normalize)
        self.accumulate = _check.integer(who, "accumulate", accumulate, 1)
        self.gather = check_processes(who, gather, open_clip)
        self._calls, self._seed = 0, 0
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))

    def set_epoch(self, epoch: int) -> None:
        """Tell the schedule which epoch it is, counted from 0."""
        self.epoch.fill_(_check.integer(f"{type(self).__name__}.set_epoch", "epoch", epoch, 0))

    def drawing(self, generator: Generator | None) -> Generator | None:
        """What a call draws from: the given generator or, where `accumulate` calls share their draws, one that starts
        alike in all of them."""
        if self.accumulate == 1 or not self.training:
            return generator
        generator = cpu_generator(type(self).__name__, generator)
        if not is_rerun():  # activation checkpointing repeats the last call, which is none of its own
            if self._calls % self.accumulate == 0:
                self._seed = int(torch.randint(2**63 - 1, (), generator=generator, device=CPU))
            self._calls += 1
        return torch.Generator().manual_seed(self._seed)

    def scheduled(self, term: Tensor) -> Tensor:
        """A mixed term times the factor of this epoch, which no device is asked for."""
        return term if self.schedule is None else term / (self.epoch + 1).to(term.dtype)


class M2MixLoss(Scheduled):
    """CLIP plus m2-Mix, in the place of open_clip's `ClipLoss`: `loss(image_features, text_features, logit_scale)`.

        L = L_CLIP + w f(e) L_m2

    L_CLIP is `clip_loss` at the model's `logit_scale`, L_m2 is `m2mix_loss` at a temperature of its own, and both come
    from the same products of rows. Shapes, edges and errors are those of these two; `lam` and `generator` are keywords
    of the call. `logit_bias` cancels and only gets its gradient of 0. `output_dict=True` gives {"contrastive_loss":
    L_CLIP, "m2mix_loss": w f(e) L_m2}, whose sum is the loss.

    Processes compare the pairs of all of them, as for `ClipLoss`. They share one lam: each draws, so that generators
    stay in step, and what process 0 has drawn, or was given, holds for all. A given lam is for the M pairs of all
    processes, in the order of these.

    Args:
        weight: w, greater than 0; the authors used .05, .01, .005 and .001.
        alpha, draws, per, replace: of the mixtures, see `m2mix_loss`.
        temperature: of the mixed rows; None for the model's.
        schedule: None for f = 1; "inverse" for f(e) = 1 / (e + 1), where e is what `set_epoch` was told last, 0 at
            first. The epoch is part of the state that is saved.
        weight_convention: "paper" as above; "code" counts w twice, as the released code does, whose two directions are
            added without the 1/2.
        normalize: False to refuse rows whose length is not 1, up to rounding; see `clip_loss`.
        accumulate: how many calls in a row, those of one step (open_clip's `--accum-freq`), share their draws. Calls in
            evaluation mode are not counted, nor are those with a lam of their own.
        gather, open_clip: which pairs are compared, and keywords of open_clip's class; see `ClipLoss`.

    Reference: Oh et al. 2023, arXiv:2203.03897.

    >>> import torch
    >>> M2MixLoss(weight=0.01)(torch.randn(8, 16), torch.randn(8, 16), 100.0).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 0.01,
        alpha: float = 0.5,
        temperature: float | None = 0.07,
        schedule: str | None = None,
        draws: int = 1,
        per: str = "batch",
        replace: str = "negatives",
        weight_convention: str = "paper",
        normalize: bool = True,
        accumulate: int = 1,
        gather: bool = True,
        **open_clip: Any,
    ) -> None:
        super().__init__(schedule, normalize, accumulate, gather, open_clip)
        who = type(self).__name__
        self.weight = _check.positive(who, "weight", weight)
        check_draws(who, alpha, draws, per)
        self.alpha, self.draws, self.per = float(alpha), draws, per
        self.replace = _check.choice(who, "replace", replace, REPLACE)
        self.temperature = temperature if temperature is None else _check.positive(who, "temperature", temperature)
        self.weight_convention = _check.choice(who, "weight_convention", weight_convention, CONVENTIONS)

    def extra_repr(self) -> str:
        parts = f"weight={self.weight:g}, alpha={self.alpha:g}, temperature={self.temperature}"
        return f"{parts}, schedule={self.schedule!r}"

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
        pairs = gathered(who, image_features, text_features, self.gather, self.normalize)
        a, b, own = pairs.a, pairs.b, pairs.own
        scale = one_number(who, "logit_scale", logit_scale, a)
        c = (a * b).sum(1)
        mixed = self._mixed(who, pairs, c, scale, lam, generator)
        others = pair_contrast(a, b, [Term(scale=scale), *mixed.terms], first=own.start, last=own.stop)
        contrastive = without_effect(pairs.reduce(cross_entropy(others[0], scale * c[own])), logit_bias)
        weight = self.weight if self.weight_convention == "paper" else 2.0 * self.weight
        term = weight * self.scheduled(pairs.reduce(mixed.loss(others[1:])))
        return {"contrastive_loss": contrastive, "m2mix_loss": term} if output_dict else contrastive + term

    def _mixed(
        self,
        who: str,
        pairs: Gathered,
        c: Tensor,
        scale: Tensor,
        lam: Tensor | float | None,
        generator: Generator | None,
    ) -> Mixed:
        generator = self.drawing(generator) if lam is None else generator
        drawn = pairs.agreed(draw_shares(who, c, lam, self.alpha, self.draws, self.per, generator))
        if self.temperature is not None:
            scale = one_number(who, "temperature", 1.0 / self.temperature, c)
        mixed = mixed_rows(c, drawn, scale, self.replace)
        return Mixed(mixed.terms, mixed.own[..., pairs.own])


class M2MixSigLipLoss(M2MixLoss):
    """SigLIP plus m2 in its form, in the place of open_clip's `SigLipLoss`. Our extension: the paper has no such loss.

        L   = L_SigLIP + w g(e) mean_i l_i,   g the schedule
        l_i = f(-s a_i . b_i - bias) + 1/2 sum_{j != i} [f(s a_i . m_j + bias) + f(s b_i . m_j + bias)]
        f(x) = log(1 + exp(x)),   m_j as for `m2mix_loss`

    Each image and each text is told that the mixtures of the other pairs are not its own. Settings, call and edges are
    those of `M2MixLoss`, but for the temperature: None, so that s is the model's, since `logit_bias` is learnt for it.
    N = 1 leaves the first part. `logit_bias` may be None for 0.

    >>> import torch
    >>> M2MixSigLipLoss()(torch.randn(8, 16), torch.randn(8, 16), 10.0, -10.0).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        weight: float = 0.01,
        alpha: float = 0.5,
        temperature: float | None = None,
        schedule: str | None = None,
        draws: int = 1,
        per: str = "batch",
        normalize: bool = True,
        accumulate: int = 1,
        gather: bool = True,
        **open_clip: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            alpha=alpha,
            temperature=temperature,
            schedule=schedule,
            draws=draws,
            per=per,
            normalize=normalize,
            accumulate=accumulate,
            gather=gather,
            **open_clip,
        )

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
        pairs = gathered(who, image_features, text_features, self.gather, self.normalize)
        a, b, own = pairs.a, pairs.b, pairs.own
        scale = one_number(who, "logit_scale", logit_scale, a)
        bias = one_number(who, "logit_bias", 0.0 if logit_bias is None else logit_bias, a, positive=False)
        c = (a * b).sum(1)
        mixed = self._mixed(who, pairs, c, scale, lam, generator)
        others = pair_contrast(a, b, [Term(scale=scale), *mixed.terms], bias=bias, first=own.start, last=own.stop)
        contrastive = pairs.reduce(softplus(-bias - scale * c[own]) + others[0].mean(0))
        per_pair = softplus(-bias - mixed.own) + others[1:].mean((0, 1))
        term = self.weight * self.scheduled(pairs.reduce(per_pair))
        return {"contrastive_loss": contrastive, "m2mix_loss": term} if output_dict else contrastive + term


class Mixed(NamedTuple):
    """The terms of m2-Mix, and the logits of the positives, (N,), or (S, 2, N) where those are mixed."""

    terms: list[Term]
    own: Tensor

    def loss(self, others: Tensor) -> Tensor:
        """(N,) from the log-sum-exp of the other logits (T, 2, N)."""
        return softplus(others - self.own).mean((0, 1))


def mixed_rows(c: Tensor, lam: Tensor, scale: Tensor, replace: str = "negatives") -> Mixed:
    """What m2-Mix asks of pairs with cosines c (N,) for shares (S, N) or (S, 1)."""
    alpha, beta = slerp_coefficients(c, lam)  # (S, N)
    terms = [Term(keys=keys) for keys in (scale * torch.stack((alpha, beta), 1)).unbind()]
    if replace == "positives":
        terms = [Term(scale=scale)]
    if replace == "negatives":
        return Mixed(terms, scale * c)
    return Mixed(terms, scale * torch.stack((alpha + beta * c, alpha * c + beta), 1))


def draw_shares(
    who: str,
    rows: Tensor,
    lam: Tensor | float | None,
    alpha: float,
    draws: int,
    per: str,
    generator: Generator | None,
) -> Tensor:
    """Shares (S, 1) or (S, N) beside the `rows` (N, ...): those given, or draws of Beta(alpha, alpha)."""
    cpu_generator(who, generator)
    if lam is None:
        drawn = draw_beta(alpha, alpha, draws * (1 if per == "batch" else len(rows)), generator)
        return move(drawn, rows.device).to(rows.dtype).view(draws, -1)
    given = shares(who, lam, rows.device, rows.dtype).detach()
    matrix = given.reshape(1, -1) if given.ndim < 2 else given
    columns = (len(rows),) if given.ndim == 1 else (1, len(rows))
    if matrix.ndim != 2 or len(matrix) == 0 or matrix.shape[1] not in columns:
        raise ValueError(
            f"{who}: lam has shape {tuple(given.shape)} for {len(rows)} pairs; pass a number, one per pair, or "
            "(S, 1) or (S, N) for S draws."
        )
    return matrix


def check_draws(who: str, alpha: float, draws: int, per: str) -> None:
    """How shares are drawn."""
    _check.between(who, "alpha", alpha, 1e-4, 1e4)
    _check.integer(who, "draws", draws, 1)
    _check.choice(who, "per", per, PER)
