"""Two or more modalities, of which some may be missing later: GMC, and geodesic mixtures of two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, softplus, unit, wide
from hardmix.distributed import gather_with_sum, rank_and_size
from hardmix.kernels.pair_contrast import LOWEST, Term, pair_contrast
from hardmix.losses.clip import REDUCTIONS, Gathered, one_number
from hardmix.losses.m2mix import REPLACE, check_draws, draw_shares, mixed_rows
from hardmix.mixing.draw import cpu_generator


def gmc_loss(
    modalities: Sequence[Tensor], joint: Tensor, *, temperature: float | Tensor = 0.3, reduction: str = "mean"
) -> Tensor:
    """GMC: a sample's joint representation z and that of each of its modalities x^m, told to belong together.

        l_i       = sum_m 1/2 [h_m(z_i, x^m_i) + h_m(x^m_i, z_i)]
        h_m(p, q) = -log( exp(p . q / t) / sum_{r in R_m, r != p} exp(p . r / t) ),   R_m = {z_1 .. z_N, x^m_1 .. x^m_N}

    So each of the 2 N rows of a modality and the joint is compared with the other 2 N - 1. Modalities meet through the
    joint alone. Above 1,024 samples the logits are formed in tiles, twice, and memory grows with N. Samples are
    compared with those of the batch; processes do not exchange theirs, as those of `GMCLoss` do.

    Args:
        modalities: two or more of (N, D), row i of all is one sample. Any float dtype and length; rows are normalised,
            and products and sums are done in float32 or wider.
        joint: (N, D), made of all modalities of the sample.
        temperature: t, a number or a tensor of one element that may learn.
        reduction: "mean" over the samples, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider; a sum over the modalities, as in the authors' code. N = 1 has
        nothing to tell apart: 0, with a gradient of zeros. All rows equal: log(2 N - 1) a modality. A row of zeros has
        cosine 0 with all. First derivatives only.

    Raises:
        TypeError: no sequence of tensors, integer features, a setting of another kind.
        ValueError: fewer than two modalities; numbers of rows or columns, or devices, disagree; an empty batch; a
            setting out of its range; on the CPU also NaN or infinity, named by row. A GPU is not waited for: NaN gives
            NaN there.

    Reference: Poklukar et al. 2022, "Geometric Multimodal Contrastive Representation Learning", arXiv:2202.03390.

    >>> rows = torch.eye(2)
    >>> round(gmc_loss([rows, rows], rows, temperature=1.0).item(), 4)   # 2 log(1 + 2 / e)
    1.1029
    """
    who = "gmc_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    rows = _gathered(who, modalities, _check.tensor(who, "joint", joint), False)
    scale = one_number(who, "temperature", temperature, rows.modalities[0]).reciprocal()
    return rows.reduce(_contrast(rows, scale), reduction)


def multimodal_mix_loss(
    modalities: Sequence[Tensor],
    joint: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.3,
    m2: float = 0.2,
    replace: str = "both",
    lam: Tensor | float | None = None,
    alpha: float = 2.0,
    pair: tuple[int, int] | None = None,
    reduction: str = "mean",
    generator: Generator | None = None,
) -> Tensor:
    """GMC plus m2-Mix of two modalities that are drawn anew each time.

        l_i    = gmc_i + m2 1/2 [g(x^p_i) + g(x^q_i)],   p < q drawn
        g(u_i) = -log( exp(u_i . v_i / t) / [exp(u_i . v_i / t) + sum_{j != i} exp(u_i . w_j / t)] )
        mu_j   = slerp(x^p_j, x^q_j, lam),               lam ~ Beta(alpha, alpha)

        replace       v_i                               w_j
        "negatives"   the other modality's row i        mu_j      CLIP's rule
        "positives"   mu_i                              the other modality's row j
        "both"        mu_i                              mu_j

    gmc_i is that of `gmc_loss`, whose arguments, edges and errors hold here too, and the second part is `m2mix_loss` of
    rows x^p and x^q at the same temperature: where the joint teaches each modality apart, the mixtures make any two of
    them interchangeable, which is what is asked for when others are missing.

    Args:
        joint: None for the mixed part alone.
        m2: its weight, greater than 0.
        replace: what the mixtures stand for.
        lam: share of modality p, instead of drawing: a number; (N,), one per sample; (S, 1) or (S, N) for S draws.
        alpha: from 1e-4 to 1e4; lam is drawn once for all samples.
        pair: which two modalities, instead of drawing; each two are equally likely.
        generator: CPU generator of the draws, the pair first; None takes torch's global one.

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1: 0, with a gradient of zeros.

    Reference: Oh et al. 2023 (arXiv:2203.03897), whose experiments with three modalities add this term to GMC, probably
    with the settings that are the defaults here and temperature .25. That code was not released.

    >>> rows = torch.eye(2)
    >>> round(multimodal_mix_loss([rows, rows], m2=1.0, temperature=1.0).item(), 4)   # log(1 + 1 / e)
    0.3133
    """
    who = "multimodal_mix_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    _check.choice(who, "replace", replace, REPLACE)
    check_draws(who, alpha, 1, "batch")
    weight = _check.positive(who, "m2", m2)
    rows = _gathered(who, modalities, joint, False)
    scale = one_number(who, "temperature", temperature, rows.modalities[0]).reciprocal()
    mixed = weight * _mixture(who, rows, scale, replace, lam, alpha, pair, generator)
    return rows.reduce(mixed if rows.joint is None else _contrast(rows, scale) + mixed, reduction)


class GMCLoss(nn.Module):
    """`gmc_loss`, and with `m2` `multimodal_mix_loss`, as a module. Nothing is learnt.

    Processes compare the samples of all of them, with the value and, after DDP's averaging, the gradients of one
    process that has all samples; see `ClipLoss`. They share the pair and lam of process 0. A given lam is for the M
    samples of all processes, in the order of these.

    Args:
        temperature: of both parts.
        m2: weight of the mixed part; None for GMC alone.
        replace, alpha: of the mixtures, see `multimodal_mix_loss`.
        reduction: see `gmc_loss`; "none" is this process's own.
        gather: False for the samples of this process alone.

    >>> GMCLoss(m2=0.2)([torch.randn(8, 16) for _ in range(3)], torch.randn(8, 16)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        temperature: float = 0.3,
        m2: float | None = None,
        replace: str = "both",
        alpha: float = 2.0,
        reduction: str = "mean",
        gather: bool = True,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.temperature = _check.positive(who, "temperature", temperature)
        self.m2 = m2 if m2 is None else _check.positive(who, "m2", m2)
        self.replace = _check.choice(who, "replace", replace, REPLACE)
        check_draws(who, alpha, 1, "batch")
        self.alpha = float(alpha)
        self.reduction = _check.choice(who, "reduction", reduction, REDUCTIONS)
        self.gather = _check.boolean(who, "gather", gather)

    def extra_repr(self) -> str:
        mixed = "" if self.m2 is None else f", replace={self.replace!r}, alpha={self.alpha:g}"
        return f"temperature={self.temperature:g}, m2={self.m2}{mixed}"

    def forward(
        self,
        modalities: Sequence[Tensor],
        joint: Tensor,
        *,
        lam: Tensor | float | None = None,
        pair: tuple[int, int] | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """The loss of representations (N, D); without `m2` the keywords are not looked at."""
        who = type(self).__name__
        rows = _gathered(who, modalities, _check.tensor(who, "joint", joint), self.gather)
        scale = one_number(who, "temperature", 1.0 / self.temperature, rows.modalities[0])
        loss = _contrast(rows, scale)
        if self.m2 is not None:
            loss = loss + self.m2 * _mixture(who, rows, scale, self.replace, lam, self.alpha, pair, generator)
        return rows.reduce(loss, self.reduction)


class _Rows(NamedTuple):
    """Unit rows (M, D) of the samples of `ranks` processes, and where this one's own are. Of one process, M = N."""

    modalities: list[Tensor]
    joint: Tensor | None
    own: slice
    ranks: int

    def beside(self, a: Tensor, b: Tensor) -> Gathered:
        return Gathered(a, b, self.own, self.ranks)

    def reduce(self, per_sample: Tensor, reduction: str) -> Tensor:
        return self.beside(self.modalities[0], self.modalities[1]).reduce(per_sample, reduction)


def _contrast(rows: _Rows, scale: Tensor) -> Tensor:
    """(n,) GMC of the samples of this process."""
    joint, own = rows.joint, rows.own
    assert joint is not None
    shares = scale.expand(len(joint))
    # Two families of keys, the joint's rows and the modality's: to any anchor, both without the one of its own sample.
    terms = [Term(keys=torch.stack(keys)) for keys in ((shares, 0.0 * shares), (0.0 * shares, shares))]
    loss = joint.new_zeros(own.stop - own.start)
    for x in rows.modalities:
        others = pair_contrast(joint, x, terms, first=own.start, last=own.stop).clamp(min=LOWEST)  # (2, 2, n)
        loss = loss + softplus(torch.logaddexp(*others) - scale * (joint[own] * x[own]).sum(1)).mean(0)
    return loss


def _mixture(
    who: str,
    rows: _Rows,
    scale: Tensor,
    replace: str,
    lam: Tensor | float | None,
    alpha: float,
    pair: tuple[int, int] | None,
    generator: Generator | None,
) -> Tensor:
    """(n,) m2-Mix of two modalities, of the samples of this process."""
    first = rows.modalities[0]
    chosen = _pair(who, len(rows.modalities), pair, generator)
    p, q = rows.beside(first, first).agreed(chosen).tolist()
    pairs = rows.beside(rows.modalities[p], rows.modalities[q])
    cos = (pairs.a * pairs.b).sum(1)
    drawn = pairs.agreed(draw_shares(who, cos, lam, alpha, 1, "batch", generator))
    mixed = mixed_rows(cos, drawn, scale, replace)
    others = pair_contrast(pairs.a, pairs.b, mixed.terms, first=pairs.own.start, last=pairs.own.stop)
    return mixed._replace(own=mixed.own[..., pairs.own]).loss(others)


def _pair(who: str, count: int, pair: tuple[int, int] | None, generator: Generator | None) -> Tensor:
    """(2,) positions of two modalities, ascending where they are drawn."""
    cpu_generator(who, generator)
    if pair is None:
        return torch.randperm(count, generator=generator, device=CPU)[:2].sort().values
    known = isinstance(pair, tuple | list) and all(isinstance(k, int) and 0 <= k < count for k in pair)
    if not known or len(pair) != 2 or pair[0] == pair[1]:
        raise ValueError(f"{who}: pair is {_check.shown(pair)}; pass two different numbers from 0 to {count - 1}.")
    return torch.tensor(pair, device=CPU)


def _gathered(who: str, modalities: Sequence[Tensor], joint: Tensor | None, gather: bool) -> _Rows:
    """Checked rows of length 1 of all processes, or of this one alone. With several, those without samples may come
    along."""
    ranks = rank_and_size()[1] if gather else 1
    if isinstance(modalities, Tensor) or not isinstance(modalities, Sequence):
        raise TypeError(f"{who}: modalities is a {type(modalities).__name__}; pass a list of tensors (N, D).")
    if len(modalities) < 2:
        raise ValueError(f"{who}: modalities has {len(modalities)} entries; pass two or more, one per modality.")
    given: list[tuple[str, object]] = [(f"modalities[{k}]", value) for k, value in enumerate(modalities)]
    given += [] if joint is None else [("joint", joint)]
    tensors = [_features(who, name, value, ranks > 1) for name, value in given]
    first = tensors[0]
    for (name, _), x in zip(given, tensors, strict=True):
        _check.same_length(who, name, x, "modalities[0]", first.shape[0])
        if x.shape != first.shape:
            raise ValueError(
                f"{who}: {name} has {x.shape[1]} columns but modalities[0] has {first.shape[1]}; pass projections into "
                "one space."
            )
        _check.same_device(who, name, x, "modalities[0]", first.device)
        _check.finite(who, name, x)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else wide(first.dtype)
    rows = [unit(x.to(dtype)) for x in tensors]
    own = slice(0, len(first))
    if ranks > 1:
        together, own = gather_with_sum(torch.stack(rows, 1))  # (M, modalities, D)
        if not len(together):
            raise ValueError(f"{who}: modalities[0] is empty on all {ranks} processes; pass at least one sample.")
        rows = [x.contiguous() for x in together.unbind(1)]
    return _Rows(rows[: len(modalities)], None if joint is None else rows[-1], own, ranks)


def _features(who: str, name: str, value: object, empty: bool) -> Tensor:
    x = _check.tensor(who, name, value)
    if not (empty and x.ndim == 2 and len(x) == 0):
        x = _check.batch(who, name, x, 2, 2)
    if not x.is_floating_point():
        raise TypeError(f"{who}: {name} has dtype {x.dtype}; pass floating-point values.")
    return x
