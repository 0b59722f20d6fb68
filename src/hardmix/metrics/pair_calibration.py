"""Is an image-text model as sure of what it finds as it is right?

Values are read (a device is waited for). Logits are computed on the device of the features, in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hardmix import _check
from hardmix.losses.clip import one_number
from hardmix.metrics.calibration import best_temperature
from hardmix.metrics.classification import _calibration_error, _diagram
from hardmix.metrics.retrieval import BLOCK, _sides, _something_to_find, cosines


def retrieval_calibration(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    bins: int = 10,
) -> dict[str, dict[str, Any]]:
    """Calibration of image-text retrieval in both directions, see `query_calibration`.

    Args:
        image_features: (N, D), any length but zero.
        text_features: (M, D), on the same device.
        logit_scale: s, greater than 0, already exponentiated.
        image_ids, text_ids: (N,) and (M,) integers; text and image belong together where these are equal. None: N = M,
            and row i belongs to row i.
        bins: number of bins of equal width.

    Returns:
        {"image_to_text": .., "text_to_image": ..}, each what `query_calibration` returns.

    Raises:
        ValueError: sizes disagree, NaN, infinity or a row of zeros, a scale that is not positive, or a row without a
            right one on the other side.

    >>> found = retrieval_calibration(torch.eye(4), torch.eye(4), 2.0)   # always right, but e^2 / (e^2 + 3) sure
    >>> round(found["image_to_text"]["ece"], 4), found["image_to_text"]["bins"]["count"][7]
    (0.2888, 4)
    """
    who = "retrieval_calibration"
    images, texts, image_ids, text_ids = _sides(
        who, ("image_features", image_features, image_ids), ("text_features", text_features, text_ids)
    )
    scale = _scale(who, logit_scale, images)
    bins = _check.integer(who, "bins", bins, 1)
    return {
        "image_to_text": _calibration(who, "image_to_text", (images, texts, image_ids, text_ids), scale, bins),
        "text_to_image": _calibration(who, "text_to_image", (texts, images, text_ids, image_ids), scale, bins),
    }


def query_calibration(
    queries: Tensor,
    candidates: Tensor,
    logit_scale: Tensor | float,
    *,
    query_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    bins: int = 10,
) -> dict[str, Any]:
    """How often the candidate that a query finds first is right, against how sure the model is of it.

        p_q = softmax_c(s cos(q, c)) over all candidates,   confidence_q = max_c p_qc,   right if that c belongs to q
        ece = sum_b (n_b / N) |accuracy_b - confidence_b|,  bin b holds b / B < confidence <= (b + 1) / B
        nll = -mean_q mean_{right c} log p_qc

    A confidence depends on the number of candidates: compare models on the same ones. Several right candidates share
    the probability, so that a perfect model has a confidence of 1 over their number and looks too modest: leave one of
    each for a diagram that can be read. Zero-shot classification is the case of one candidate for each class, with the
    labels for `query_ids`. The N M logits are never in memory at once.

    Args:
        queries: (N, D). candidates: (M, D), on the same device. Of any length but zero.
        logit_scale: s, greater than 0, already exponentiated; s / T measures what a temperature T would change.
        query_ids, candidate_ids: (N,) and (M,) integers; a candidate is right where they are equal. None: N = M, and
            row i is right for row i.
        bins: B, the number of bins of equal width.

    Returns:
        dict with ece, from 0 to 1, nll in nats, and bins, in the form of `reliability`: lists of B entries "confidence"
        and "accuracy" (None where empty) and "count". Among equally near candidates one is found, whichever rounding
        leaves ahead; features that are all the same are 1 / M sure and right by chance.

    Raises:
        ValueError: sizes disagree, NaN, infinity or a row of zeros, a scale that is not positive, or a query without a
            right candidate.

    Reference: Guo et al. 2017, eq. 3 (arXiv:1706.04599), over the candidates of a retrieval as in Oh et al. 2023
    (arXiv:2203.03897), whose bins are these; `reliability` closes its bins below instead.

    >>> round(query_calibration(torch.eye(2), torch.eye(2)[[1, 0]], 1e-6)["ece"], 4)   # always wrong, and half sure
    0.5
    """
    who = "query_calibration"
    sides = _sides(who, ("queries", queries, query_ids), ("candidates", candidates, candidate_ids))
    scale = _scale(who, logit_scale, sides[0])
    return _calibration(who, "queries", sides, scale, _check.integer(who, "bins", bins, 1))


def fit_query_temperature(
    queries: Tensor,
    candidates: Tensor,
    logit_scale: Tensor | float,
    *,
    query_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
) -> float:
    """The temperature by which the logits should be divided: that with the smallest nll of `query_calibration`.

        T = argmin_T -mean_q mean_{right c} log softmax_c(s cos(q, c) / T)

    Args:
        queries, candidates, logit_scale, query_ids, candidate_ids: as for `query_calibration`, of pairs that the model
            was **not** trained on and that are not measured afterwards: the validation split. As the best T depends on
            the number of candidates, that should be like the one that is measured.

    Returns:
        T, between 0.01 and 100, the same every time; `query_calibration` of logit_scale / T is the scaled model. Above
        1 the model was too sure of itself. Where every query finds its own, ever colder is better and 0.01 is
        returned; where all cosines are equal, 1.

    Raises:
        ValueError: as for `query_calibration`.

    Reference: Guo et al. 2017, section 4.2 (arXiv:1706.04599); solved as `fit_temperature` is.

    >>> x, y = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    >>> t = fit_query_temperature(x, y, 10.0)   # sure of all four, but half are right
    >>> round(t, 2), round(query_calibration(x, y, 10.0)["ece"], 2), round(query_calibration(x, y, 10.0 / t)["ece"], 2)
    (9.1, 0.5, 0.0)
    """
    who = "fit_query_temperature"
    sides = _sides(who, ("queries", queries, query_ids), ("candidates", candidates, candidate_ids))
    scale = _scale(who, logit_scale, sides[0])
    _something_to_find(who, "queries", torch.isin(sides[2], sides[3]).cpu())

    def slope(inverse: float) -> tuple[float, float]:
        first = second = 0.0
        for _, z, _ in _logits(*sides, scale):
            p = (z * inverse).softmax(1)
            weighted = p.mul_(z)
            mean = weighted.sum(1)
            first += mean.sum().item()
            second += (weighted.mul_(z).sum(1) - mean.square()).sum().item()
        return first / len(queries), second / len(queries)

    # in float32 the slope is known to a few parts in a million only
    return best_temperature(slope, tolerance=1e-12 if sides[0].dtype == torch.float64 else 1e-5)


_Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def _calibration(who: str, name: str, sides: _Sides, scale: float, bins: int) -> dict[str, Any]:
    queries, _, own, other = sides
    _something_to_find(who, name, torch.isin(own, other).cpu())
    confidence, nll, hit = queries.new_empty(len(own)), queries.new_empty(len(own)), torch.empty_like(own)
    for rows, z, belong in _logits(*sides, scale):
        total = z.logsumexp(1)
        largest, found = z.max(1)
        confidence[rows] = (largest - total).exp()
        hit[rows] = belong.gather(1, found[:, None])[:, 0].long()
        nll[rows] = total
    # sums in float64 on the CPU: not every device has float64
    sure = confidence.cpu().double()
    at = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    diagram = _diagram(at, sure, hit.cpu().double(), bins)
    return {"ece": _calibration_error(diagram), "nll": nll.cpu().double().mean().item(), "bins": diagram}


def _logits(
    queries: Tensor, candidates: Tensor, own: Tensor, other: Tensor, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few rows at a time: which, their (B, M) logits less the mean of the right ones, and which are right.

    That shift changes no probability; with it the row's negative log-likelihood is its log-sum-exp, and a small one
    keeps its digits.
    """
    step = max(1, BLOCK // len(candidates))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        z = cosines(queries[rows], candidates).mul_(scale)
        belong = own[rows, None] == other
        right = torch.where(belong, z, 0.0).sum(1) / belong.sum(1)
        yield rows, z.sub_(right[:, None]), belong


def _scale(who: str, value: Tensor | float, features: Tensor) -> float:
    return _check.positive(who, "logit_scale", one_number(who, "logit_scale", value, features).item())
