"""SupReMix as it reads: every mixture a vector of its own, one anchor and one pair at a time, in float64."""

from __future__ import annotations

from torch import Tensor

WEIGHTS = {
    "linear": lambda d: 1 + d,
    "quadratic": lambda d: 1 + d * d,
    "inverse_linear": lambda d: 1 / (1 + d),
    "inverse_quadratic": lambda d: 1 / (1 + d * d),
    "none": lambda d: 1.0,
}


def supremix_rows(
    rows: Tensor,
    labels: list[float],
    lam: Tensor,
    *,
    temperature: float,
    window: float = 0.0,
    weighting: str = "linear",
    label_scale: float = 1.0,
    normalize: bool = True,
    detach: bool = False,
    mix_neg: bool = True,
    mix_pos: bool = True,
) -> list[Tensor | None]:
    """Loss of every row as an anchor; None for an anchor without a positive."""
    z = [row / row.norm() for row in rows.double()]
    weight = WEIGHTS[weighting]
    n = len(z)

    def mixture(a: float | Tensor, p: Tensor, q: Tensor) -> Tensor:
        mixed = a * p + (1 - a) * q
        if normalize:
            mixed = mixed / mixed.norm()
        return mixed.detach() if detach else mixed

    losses: list[Tensor | None] = []
    for i in range(n):
        positives, terms = [], []
        for a in range(n):
            if a == i:
                continue
            s = z[i] @ z[a] / temperature
            terms.append((weight(abs(labels[i] - labels[a]) / label_scale), s))
            if labels[a] == labels[i]:
                positives.append(s)
        if mix_neg:
            for k in range(n):
                if labels[k] != labels[i]:
                    share = float(lam[i, k])
                    label = share * labels[i] + (1 - share) * labels[k]
                    s = z[i] @ mixture(share, z[i], z[k]) / temperature
                    terms.append((weight(abs(labels[i] - label) / label_scale), s))
        if mix_pos:
            below = [j for j in range(n) if 0 < labels[i] - labels[j] < window]
            above = [k for k in range(n) if 0 < labels[k] - labels[i] < window]
            for j in below:
                for k in above:
                    share = (labels[k] - labels[i]) / (labels[k] - labels[j])
                    s = z[i] @ mixture(share, z[j], z[k]) / temperature
                    positives.append(s)
                    terms.append((1.0, s))
        if not positives:
            losses.append(None)
            continue
        top = max(float(s.detach()) for _, s in terms)
        total = sum(w * (s - top).exp() for w, s in terms)
        losses.append(total.log() + top - sum(positives) / len(positives))
    return losses


def supremix_mean(rows: Tensor, labels: list[float], lam: Tensor, **settings: object) -> Tensor:
    valid = [loss for loss in supremix_rows(rows, labels, lam, **settings) if loss is not None]  # type: ignore[arg-type]
    return sum(valid) / len(valid) if valid else rows.sum() * 0.0
