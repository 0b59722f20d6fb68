"""Can a picture be changed by words? "Man cook" less "man" plus "woman" should be the picture of "woman cook".

Values are read (a device is waited for). Cosines are computed on the device of the features, in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import CPU, unit
from hardmix.metrics.retrieval import BLOCK, _sides, as_near, cosines

SCALES = (0.5, 1.0, 1.5, 2.0, 2.5)


def arithmetic_queries(image_features: Tensor, text_features: Tensor, relations: Tensor, scale: float) -> Tensor:
    """Pictures, moved by the difference of two texts.

        q = unit(image_c + scale (text_b - text_a)),   image and text of length 1,   for each "a is to b as c is to d"

    Args:
        image_features, text_features: (K, D), row i of both is a pair, of any length but zero, on the same device.
        relations: (Q, 4) integers: the rows a, b, c and d. d is not used.
        scale: at least 0, where the query is the picture itself.

    Returns:
        (Q, D) rows of length 1, float32 or wider, without a gradient; a sum that is exactly 0 stays 0.

    Raises:
        TypeError, ValueError: sizes disagree, NaN, infinity or a row of zeros, a row that isn't there, a relation that
            asks for the picture it starts from, or a negative scale.

    Reference: Couairon et al. 2022 (arXiv:2112.03162).

    >>> image = text = torch.eye(4)
    >>> arithmetic_queries(image, text, torch.tensor([[0, 1, 2, 3]]), 1.0)
    tensor([[-0.5774,  0.5774,  0.5774,  0.0000]])
    """
    who = "arithmetic_queries"
    images, texts, rows = _checked(who, image_features, text_features, relations)
    return _queries(images, texts, rows, _check.non_negative(who, "scale", scale))


def arithmetic_metrics(
    image_features: Tensor,
    text_features: Tensor,
    relations: Tensor,
    *,
    scale: float = 1.0,
    ks: Sequence[int] = (1, 5),
    kinds: Sequence[str] | None = None,
    candidates: Tensor | None = None,
) -> dict[str, Any]:
    """How often the picture d is found by what c is and how a and b differ: the queries of `arithmetic_queries`.

        rank_q = 1 + #{candidates j other than c, d: cos(q, image_j) >= cos(q, image_d)}
        recall_k = mean_q [rank_q <= k],     chance_k = mean_q min(k, M_q) / M_q

    with M_q candidates, c itself left out. The pictures a and b stay among them: to answer b, the very picture whose
    text was added, is a mistake that counts. Ties count against the query, as in `retrieval_ranks`. Compare with
    scale=0, the nearest picture without any text: where d looks much like c, as a man and a woman of one profession do,
    that alone finds many.

    Args:
        image_features, text_features: (K, D), row i of both is a pair, of any length but zero, on the same device.
        relations: (Q, 4) integers: the rows a, b, c and d.
        scale: of the difference of the texts, at least 0. Choose it on other relations, see `choose_scale`.
        ks: cut-offs, at least 1.
        kinds: Q words, such as "gender" and "colour", to measure each kind by itself as well.
        candidates: (M,) integers, the rows whose pictures may be found; None for all. Each d has to be among them.

    Returns:
        dict with queries, recall_K and recall_K_chance, and kinds: kind -> the same, in the order in which they first
        occur; {} without `kinds`. A kind with many relations weighs more in the recalls at the top.

    Raises:
        TypeError, ValueError: as for `arithmetic_queries`, other numbers of kinds than relations, candidates that
            repeat, and a d that is not among them.

    Reference: Couairon et al. 2022 (arXiv:2112.03162), where a classifier decides whether what is found is right, and
    relations are weighted by how frequent they are; here there is one right picture, and each relation counts once.

    >>> x = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
    >>> arithmetic_metrics(x, x, torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), ks=(1,))
    {'queries': 2, 'recall_1': 1.0, 'recall_1_chance': 0.25, 'kinds': {}}
    """
    who = "arithmetic_metrics"
    scale = _check.non_negative(who, "scale", scale)
    cuts = [_check.integer(who, "ks", k, 1) for k in _check.sequence(who, "ks", ks, "integers")]
    images, texts, rows = _checked(who, image_features, text_features, relations)
    names = [] if kinds is None else _check.sequence(who, "kinds", kinds, "words, one per relation")
    if kinds is not None and len(names) != len(rows):
        raise ValueError(f"{who}: kinds has {len(names)} entries but relations has {len(rows)} rows; pass one per row.")
    pool = _candidates(who, candidates, rows, len(images))
    ranks = _ranks(_queries(images, texts, rows, scale), images, rows, pool)
    others = len(pool) - torch.isin(rows[:, 2], pool).long().cpu()  # (Q,)

    def measured(chosen: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"queries": len(chosen)}
        for k in cuts:
            found[f"recall_{k}"] = (ranks[chosen] <= k).double().mean().item()
            found[f"recall_{k}_chance"] = (others[chosen].clamp(max=k) / others[chosen].double()).mean().item()
        return found

    of_kind: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        of_kind.setdefault(name, []).append(row)
    by_kind = {name: measured(torch.tensor(chosen, device=CPU)) for name, chosen in of_kind.items()}
    return {**measured(torch.arange(len(rows), device=CPU)), "kinds": by_kind}


def choose_scale(
    image_features: Tensor,
    text_features: Tensor,
    relations: Tensor,
    *,
    scales: Sequence[float] = SCALES,
    candidates: Tensor | None = None,
) -> float:
    """The scale of `arithmetic_metrics` that finds most: the highest recall_1, then recall_5, then the smallest scale.

    Choose on the relations of the validation split and measure on those of the test split: the best of several scales
    on the test relations themselves is better than the model is.

    Args:
        image_features, text_features, relations, candidates: as for `arithmetic_metrics`.
        scales: one or more, each at least 0.

    Returns:
        One of `scales`.

    Raises:
        TypeError, ValueError: as for `arithmetic_metrics`, or no scales.

    >>> x = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
    >>> choose_scale(x, x, torch.tensor([[0, 1, 2, 3]]), scales=(0.1, 2.0, 1.0))   # at 0.1 the texts have no say
    1.0
    """
    who = "choose_scale"
    tried = [_check.non_negative(who, "scales", scale) for scale in _check.sequence(who, "scales", scales, "numbers")]
    if not tried:
        raise ValueError(f"{who}: scales is empty; pass at least one.")
    images, texts, rows = _checked(who, image_features, text_features, relations)
    pool = _candidates(who, candidates, rows, len(images))

    def merit(scale: float) -> tuple[int, int, float]:
        ranks = _ranks(_queries(images, texts, rows, scale), images, rows, pool)
        return int((ranks == 1).sum()), int((ranks <= 5).sum()), -scale

    return max(tried, key=merit)


def _checked(who: str, image_features: Tensor, text_features: Tensor, relations: Tensor) -> tuple[Tensor, ...]:
    """Unit rows of pictures and texts (K, D), and relations (Q, 4), on one device."""
    images = _check.batch(who, "image_features", image_features, 2, 2)
    texts = _check.tensor(who, "text_features", text_features)
    _check.same_length(who, "text_features", texts, "image_features", len(images))
    images, texts, _, _ = _sides(who, ("image_features", images, None), ("text_features", texts, None))
    rows = _rows(who, "relations", relations, len(images))
    if rows.ndim != 2 or rows.shape[1] != 4 or not len(rows):
        raise ValueError(
            f"{who}: relations has shape {tuple(rows.shape)}; pass (Q, 4), the rows a, b, c and d of one or more."
        )
    same = (rows[:, 2] == rows[:, 3]).nonzero().flatten().tolist()
    if same:
        raise ValueError(
            f"{who}: relations[{same[0]}] asks for row {int(rows[same[0], 3])}, the picture that it starts from; pass "
            "c and d that differ."
        )
    return images, texts, rows.to(images.device)


def _rows(who: str, name: str, rows: Tensor, count: int) -> Tensor:
    """Row numbers of `count` rows, long, on the CPU."""
    rows = _check.tensor(who, name, rows)
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"{who}: {name} has dtype {rows.dtype}; pass integers, the numbers of rows.")
    rows = rows.detach().cpu().long()
    wrong = rows[(rows < 0) | (rows >= count)]
    if len(wrong):
        raise ValueError(f"{who}: {name} holds row {int(wrong[0])}; pass rows from 0 to {count - 1}.")
    return rows


def _candidates(who: str, candidates: Tensor | None, relations: Tensor, count: int) -> Tensor:
    """(M,) different rows that hold every d, beside the relations."""
    if candidates is None:
        return torch.arange(count, device=relations.device)
    pool = _rows(who, "candidates", candidates, count)
    if pool.ndim != 1 or len(pool.unique()) < len(pool):
        raise ValueError(
            f"{who}: candidates has shape {tuple(pool.shape)} and {len(pool.unique())} different rows; pass (M,), each "
            "row once."
        )
    pool = pool.to(relations.device)
    missing = relations[~torch.isin(relations[:, 3], pool), 3]
    if len(missing):
        raise ValueError(
            f"{who}: candidates has no row {int(missing[0])}, which a relation asks for; add it, or leave out the "
            "relation."
        )
    return pool


def _queries(images: Tensor, texts: Tensor, relations: Tensor, scale: float) -> Tensor:
    a, b, c, _ = relations.T
    return unit(images[c] + scale * (texts[b] - texts[a]))


def _ranks(queries: Tensor, images: Tensor, relations: Tensor, candidates: Tensor) -> Tensor:
    """(Q,) long on the CPU: among the candidates other than c, the place of d."""
    place = torch.empty(len(images), dtype=torch.long, device=images.device)
    place[candidates] = torch.arange(len(candidates), device=images.device)
    pool, start_from, answer = images[candidates], relations[:, 2], place[relations[:, 3]]
    ranks = torch.empty_like(answer)
    step = max(1, BLOCK // len(candidates))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        cos = cosines(queries[rows], pool)  # (B, M)
        near = as_near(cos, cos.gather(1, answer[rows, None]))  # d is as near as itself, hence counted
        ranks[rows] = (near & (start_from[rows, None] != candidates)).sum(1)
    return ranks.cpu()
