"""Who is mixed with whom by their labels: numbers that are close are mixed more often than numbers that are not."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix.mixing.draw import LabelPairing, Pairing, cpu_generator
from hardmix.mixing.static import Mixup

#: Probabilities that are looked at at once; more rows are drawn piece by piece.
_PIECE = 2**22


class LabelKernel(LabelPairing):
    """Partners drawn by a Gaussian kernel on the labels; for the `pairing` of any policy.

        P(partner of i is j)  ~  exp(-|y_i - y_j|^2 / (2 h^2)),   i itself included

    Args:
        bandwidth: h, in the labels' own unit. Small: everybody is mixed with rows of the same label, and with itself
            where there are none. Large: with anybody, as a permutation would.
    Labels are (N,) numbers, or (N, P) of which the Euclidean distance counts; they are read on the host.
    Reference: Yao et al. 2022, eq. 6 (arXiv:2210.05775).

    >>> LabelKernel(bandwidth=0.1).partners(torch.tensor([1.0, 5.0]), torch.tensor([5.0, 1.0, 9.0]))
    tensor([1, 0])
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = _check.positive("LabelKernel", "bandwidth", bandwidth)

    def __repr__(self) -> str:
        return f"LabelKernel(bandwidth={self.bandwidth:g})"

    def draw(self, who: str, y: Tensor | None, rows: int, generator: Generator | None) -> Pairing:
        if y is None:
            raise ValueError(f"{who}: y is missing; its partners are drawn by their labels, so pass them to plan too.")
        _check.same_length(who, "y", _check.tensor(who, "y", y), "x", rows)
        return Pairing(self._draw(who, y, y, generator), None)

    def partners(self, labels: Tensor, pool: Tensor, *, generator: Generator | None = None) -> Tensor:
        """For each of the labels (N,) or (N, P) a row number of `pool` (M,) or (M, P), such as the whole training set.

        To mix with rows outside the batch, put them behind it and pair across:

            index = kernel.partners(y, y_all)                        # (N,)
            both = torch.cat([x, x_all[index]]), torch.cat([y, y_all[index]])
            across = torch.arange(2 * n).roll(n)
            plan = policy.plan(both[0], both[1], partner=across)     # the first n rows are the mixed batch
        """
        cpu_generator("LabelKernel", generator)
        return self._draw("LabelKernel", labels, pool, generator)

    def _draw(self, who: str, y: Tensor, pool: Tensor, generator: Generator | None) -> Tensor:
        own, others = _numbers(who, "y", y), _numbers(who, "pool", pool)
        if own.shape[1] != others.shape[1]:
            raise ValueError(
                f"{who}: y has {own.shape[1]} numbers a row but the pool {others.shape[1]}; pass labels of one kind."
            )
        drawn = []
        for piece in own.split(max(1, _PIECE // len(others))):
            # Not by way of a matrix product, which loses the small differences of large labels.
            exact = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(piece, others, compute_mode=exact) / self.bandwidth
            # The nearest gets 1: what is left is the same distribution, and far from everything it does not underflow.
            closeness = distance.square().sub_(distance.amin(1, keepdim=True).square()).mul_(-0.5).exp_()
            drawn.append(torch.multinomial(closeness, 1, generator=generator)[:, 0])
        return torch.cat(drawn)


class CMixup(Mixup):
    """C-Mixup: mixup for regression, whose partners have labels close to one's own.

        x~_i = lam x_i + (1 - lam) x_j,   y~_i = lam y_i + (1 - lam) y_j,   P(j | i) ~ exp(-|y_i - y_j|^2 / (2 h^2))

    Plain mixup assumes that a blend of two samples has the blended label, which is the less true the farther the labels
    are apart. lam ~ Beta(alpha, alpha), one a batch by default as in the paper. A row may be its own partner, and rows
    may be the partner of several. In the paper partners come from the whole training set; here they come from the
    batch, or from anywhere with `LabelKernel.partners`. For a hidden layer give `LabelKernel` to `ManifoldMixup` as
    its `pairing`.

    Args:
        bandwidth: h, in the labels' own unit. The paper searches it for each data set: 1.75 on Airfoil, 1.2 on NO2,
            0.05 on Exchange-Rate.
        alpha: 2 in the paper, 1.5 on Exchange-Rate.
        per: "batch" or "sample".
    Labels: (N,) floats or integers, or (N, P). `target.mean()` is the blended label.
    Reference: Yao et al. 2022 (arXiv:2210.05775). The authors' code makes an N x N table of float64 probabilities of
    the training set, and drops the last row of an odd batch.

    >>> x, target = CMixup(bandwidth=0.5)(torch.rand(8, 5), torch.arange(8.0))
    >>> target.mean().shape
    torch.Size([8])
    """

    def __init__(self, *, bandwidth: float, alpha: float = 2.0, per: str = "batch") -> None:
        if per == "pair":
            raise ValueError('CMixup: per is "pair" but partners are drawn one by one; pass "batch" or "sample".')
        super().__init__(alpha, per=per, pairing=LabelKernel(bandwidth))


def _numbers(who: str, name: str, y: Tensor) -> Tensor:
    """Labels as (N, P) float64 rows on the host."""
    y = _check.tensor(who, name, y)
    if y.ndim not in (1, 2) or y.numel() == 0 or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"{who}: {name} has shape {tuple(y.shape)} and dtype {y.dtype}; pass one number a row, (N,), or (N, P)."
        )
    y = y.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"{who}: {name} holds NaN or infinity; leave out these samples.")
    return y[:, None] if y.ndim == 1 else y
