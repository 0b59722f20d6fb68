"""Does a text find its picture, and a picture its text, among all others?

Values are read (a device is waited for). Cosines are computed on the device of the features, in float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix._math import TIE

#: cosines that are in memory at a time
BLOCK = 2**20


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k and median rank of image-text retrieval, in both directions, and what chance reaches.

        recall_k = mean_q [rank_q <= k]      rank_q: see `retrieval_ranks`
        chance_k = mean_q [1 - C(M - r_q, k) / C(M, k)],    q has r_q right ones among M candidates

    A query counts once, however many right candidates it has: with five captions a picture, the picture has found its
    text when the first of the five is found, and each caption is a query of its own. Median ranks are the smallest rank
    that half of the queries reach; chance's is the smallest k with chance_k >= 1/2.

    Args:
        image_features: (N, D), any length but zero.
        text_features: (M, D), on the same device.
        image_ids, text_ids: (N,) and (M,) integers; text and image belong together where these are equal, such as
            `Pairs.concept`. None: N = M, and row i belongs to row i.
        ks: cut-offs, at least 1; one beyond the number of candidates counts as that number.

    Returns:
        dict with, for both directions "image_to_text" and "text_to_image", the keys DIRECTION_recall_K and
        DIRECTION_median_rank, the same with "_chance" appended, and DIRECTION_mrr, the mean of 1 / rank_q, as Python
        floats. One pair: recalls, ranks and mrr 1.

    Raises:
        ValueError: sizes disagree, NaN, infinity or a row of zeros, or a row without a right one on the other side.

    >>> found = retrieval_metrics(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], ks=(1, 2))
    >>> found["image_to_text_recall_1"], found["image_to_text_recall_1_chance"], found["image_to_text_median_rank"]
    (0.5, 0.25, 1.0)
    """
    who = "retrieval_metrics"
    cut = [_check.integer(who, "ks", k, 1) for k in _check.sequence(who, "ks", ks, "integers")]
    images, texts, image_ids, text_ids = _sides(
        who, ("image_features", image_features, image_ids), ("text_features", text_features, text_ids)
    )
    found: dict[str, float] = {}
    for name, queries, candidates, own, other in (
        ("image_to_text", images, texts, image_ids, text_ids),
        ("text_to_image", texts, images, text_ids, image_ids),
    ):
        ranks, right = _ranks(who, name, queries, candidates, own, other)
        for k in cut:
            found[f"{name}_recall_{k}"] = (ranks <= k).double().mean().item()
            found[f"{name}_recall_{k}_chance"] = _chance(right, len(candidates), k)
        found[f"{name}_mrr"] = ranks.double().reciprocal().mean().item()
        found[f"{name}_median_rank"] = float(ranks.median())
        found[f"{name}_median_rank_chance"] = float(_chance_median(right, len(candidates)))
    return found


def retrieval_ranks(
    queries: Tensor, candidates: Tensor, *, query_ids: Tensor | None = None, candidate_ids: Tensor | None = None
) -> Tensor:
    """How many candidates one has to look at before the first right one, sorted by cosine.

        rank_q = 1 + #{wrong c: cos(q, c) >= max_{right c'} cos(q, c')}

    Ties count against the query: a wrong candidate that is as near as the nearest right one comes first, so features
    that are all the same find nothing. Rounding tells equal cosines apart, hence those within 1e-6 (of float64 features
    1e-14) are a tie. The N M cosines are never in memory at once.

    Args:
        queries: (N, D). candidates: (M, D).
        query_ids, candidate_ids: (N,) and (M,) integers; a candidate is right where they are equal. None: N = M, and
            row i is right for row i.

    Returns:
        (N,) long on the CPU, from 1 to M. With several right candidates at most M less the others of them.

    Raises:
        ValueError: sizes disagree, NaN, infinity or a row of zeros, or a query without a right candidate.

    >>> retrieval_ranks(torch.eye(3), torch.eye(3)[[0, 0, 2]])
    tensor([2, 3, 1])
    """
    who = "retrieval_ranks"
    q, c, own, other = _sides(who, ("queries", queries, query_ids), ("candidates", candidates, candidate_ids))
    return _ranks(who, "queries", q, c, own, other)[0]


_Side = tuple[str, Tensor, "Tensor | None"]


def _sides(who: str, first: _Side, second: _Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit features of both sides and their ids, checked."""
    (name, x, own), (other_name, y, other) = first, second
    x, y = _unit(who, name, x), _unit(who, other_name, y)
    _check.same_device(who, other_name, y, name, x.device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{who}: {name} has {x.shape[1]} features a row but {other_name} has {y.shape[1]}; pass as many."
        )
    if own is None and other is None:
        if len(x) != len(y):
            raise ValueError(
                f"{who}: {name} has {len(x)} rows but {other_name} has {len(y)}; pass ids that say which belong "
                "together."
            )
        own = other = torch.arange(len(x), device=x.device)
    if own is None or other is None:
        raise ValueError(f"{who}: only one of {name} and {other_name} has ids; pass both or neither.")
    ids = []
    for side, value, rows in ((name, own, len(x)), (other_name, other, len(y))):
        value = _check.tensor(who, f"ids of {side}", value)
        if value.ndim != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(
                f"{who}: the ids of {side} have shape {tuple(value.shape)} and dtype {value.dtype}; pass integers, one "
                "per row."
            )
        _check.same_length(who, f"ids of {side}", value, side, rows)
        ids.append(value.to(x.device, torch.long))
    wide = torch.promote_types(x.dtype, y.dtype)
    return x.to(wide), y.to(wide), ids[0], ids[1]


def _unit(who: str, name: str, x: Tensor) -> Tensor:
    """Rows of length 1, in float32 or float64."""
    x = _check.batch(who, name, x, 2, 2).detach()
    if not x.is_floating_point():
        raise TypeError(f"{who}: {name} has dtype {x.dtype}; pass floating-point features.")
    x = x if x.dtype == torch.float64 else x.float()
    # by the largest value first: the square of a large or tiny one may not be a number
    largest = x.abs().amax(1, keepdim=True)
    bad = ((largest == 0) | ~largest.isfinite())[:, 0].nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{who}: {name} holds NaN, infinity or nothing but zeros in rows {', '.join(map(str, bad[:5]))}{more}; "
            "repair or leave out these samples."
        )
    return F.normalize(x / largest)


def _ranks(
    who: str, name: str, queries: Tensor, candidates: Tensor, own: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """(N,) ranks, and (N,) numbers of right candidates, on the CPU."""
    # written in place: small results kept between large ones that are freed would leave holes in the memory
    ranks, right = torch.empty_like(own), torch.empty_like(own)
    rows = max(1, BLOCK // len(candidates))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        cos = cosines(queries[block], candidates)  # (B, M)
        belong = own[block, None] == other
        nearest = cos.masked_fill(~belong, -math.inf).amax(1, keepdim=True)
        ranks[block] = (as_near(cos, nearest) & ~belong).sum(1) + 1
        right[block] = belong.sum(1)
    count = right.cpu()
    _something_to_find(who, name, count)
    return ranks.cpu(), count


def cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """Products (N, M) of unit rows; the half types of an autocast region have no digits for them."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ candidates.T


def as_near(cos: Tensor, right: Tensor) -> Tensor:
    """Which cosines are at least the right one's, up to what rounding may make of equal ones."""
    return cos >= right - TIE[cos.dtype]


def _something_to_find(who: str, name: str, right: Tensor) -> None:
    """Each row has a right candidate: `right` (N,), their number or whether there is one, has no zero."""
    alone = (right == 0).nonzero().flatten().tolist()
    if alone:
        raise ValueError(
            f"{who}: {len(alone)} of {len(right)} rows have nothing to find ({name}, row {alone[0]} first); "
            "leave them out, or repair the ids."
        )


def _chance(right: Tensor, candidates: int, k: int) -> float:
    """Mean probability that one of `right` (N,) candidates is among k of all that are drawn by chance."""
    k = min(k, candidates)
    counts, times = right.unique(return_counts=True)
    missed = []
    for r in counts.tolist():
        # C(M - r, k) / C(M, k) as a product of the shorter of both lengths: none of the r is drawn, one after another
        short, long = sorted((r, k))
        factors = ((candidates - long - i) / (candidates - i) for i in range(short))
        missed.append(math.prod(max(factor, 0.0) for factor in factors))
    hit = sum((1.0 - miss) * n for miss, n in zip(missed, times.tolist(), strict=True))
    return hit / len(right)


def _chance_median(right: Tensor, candidates: int) -> int:
    """The smallest k at which chance has found half."""
    low, high = 1, candidates
    while low < high:
        middle = (low + high) // 2
        # a rounding error must not move the answer from one rank to the next
        low, high = (low, middle) if _chance(right, candidates, middle) >= 0.5 - 1e-12 else (middle + 1, high)
    return low
