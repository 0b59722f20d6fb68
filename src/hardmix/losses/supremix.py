"""SupReMix: contrastive regression with hard negatives and hard positives that are mixtures of the batch's own rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, unit
from hardmix.kernels.label_contrast import Contrast, Windows, label_contrast, label_windows
from hardmix.losses._rows import LabelledRows, labelled_rows, reduce_anchors, tied
from hardmix.mixing.draw import cpu_generator, draw_gamma
from hardmix.mixing.geodesic import shares

#: factor of a pair in the denominator, by its label distance in units of `label_scale`
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "linear": lambda d: 1.0 + d,
    "quadratic": lambda d: 1.0 + d.square(),
    "inverse_linear": lambda d: 1.0 / (1.0 + d),
    "inverse_quadratic": lambda d: 1.0 / (1.0 + d.square()),
    "none": None,
}
REDUCTIONS = ("none", "mean", "sum")


def supremix_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    window: float | None = None,
    temperature: float = 0.5,
    beta: tuple[float, float] = (2.0, 8.0),
    weighting: str = "linear",
    label_scale: float = 1.0,
    normalize_mixtures: bool = True,
    detach_mixtures: bool = False,
    mix_neg: bool = True,
    mix_pos: bool = True,
    label_tolerance: float = 0.0,
    max_mixtures: int | None = None,
    reduction: str = "mean",
    lam: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """SupReMix: supervised contrast on numbers, with mixtures as hard negatives and hard positives.

        l_i   = log sum_{b in A_i} w(|y_i - y_b|) exp(s_ib / t)  -  1 / |P_i| sum_{a in P_i} s_ia / t,     s = cosine
        P_i   = rows with y_a = y_i, and the mixtures m_ijk            A_i = all other rows, m_ik and m_ijk
        m_ik  = lam z_i + (1 - lam) z_k,  lam ~ Beta(2, 8),     every k with y_k != y_i: label lam y_i + (1 - lam) y_k
        m_ijk = lam z_j + (1 - lam) z_k,  lam = (y_k - y_i) / (y_k - y_j),     every y_j < y_i < y_k within the window

    m_ik contains the anchor (Mix-neg: it looks like the anchor and has another label), m_ijk does not (Mix-pos: its
    label is exactly the anchor's). w is Distance Magnifying: it counts negatives with far labels more.

    No mixture is formed: cosines with mixtures follow from the cosines of the rows. With T mixtures per batch the cost
    is 2 N^2 D for those and about 15 operations a mixture; memory grows with N, not with T. Rows are compared with all
    rows of the batch; processes do not exchange theirs.

    Args:
        embeddings: (N, D), or (N, V, D) with V views of each sample, which count as rows of their own. Any float dtype
            and length; rows are normalised, and sums are done in float32 or wider.
        labels: (N,) numbers, integers or floats. They are read on the host, where a GPU is waited for.
        window: how far, strictly, the labels of j and k may be from the anchor's; in the labels' own unit.
            `math.inf` is fine. Needed unless `mix_pos` is off.
        temperature: t.
        beta: parameters (a, b) of the anchor's share in m_ik, at least 1.
        weighting: w(d) with d the label distance over `label_scale`: "linear" 1 + d, "quadratic" 1 + d^2,
            "inverse_linear" 1 / (1 + d), "inverse_quadratic" 1 / (1 + d^2), "none" 1.
        label_scale: unit of d. Ages make w as large as 100, standardised labels make it all but constant: set it to
            the standard deviation of the labels for data of another kind. It does not touch the window.
        normalize_mixtures: project mixtures onto the sphere. The released code does not: m_ijk then is shorter than 1,
            and even perfect embeddings are pulled.
        detach_mixtures: gradients move the anchor alone, as in the released code, not what was mixed. Same value.
        mix_neg, mix_pos: leave either kind out. With neither this is `supcon_loss`.
        label_tolerance: labels are rounded to multiples of this before anything else, so that continuous ones can be
            equal; 0 compares them as they are.
        max_mixtures: about how many m_ijk an anchor gets at most; None gives it all, up to N^2 / 4. A few rows below
            and above are drawn and all their pairs stand for the rest: sums over mixtures, and with them the pull of
            the positives, are unbiased, their logarithm is a little low.
        reduction: "mean" over the anchors that have a positive, "sum", or "none".
        lam: (M, M) the shares that would be drawn, from 0 to 1, M = N V rows, view after view: entry (i, k) is the
            anchor i's share in m_ik. Values are looked at on the CPU only.
        generator: CPU generator of the draws; None takes torch's global one.

    Returns:
        Scalar; for "none" (N,), or (N, V). An anchor without a positive has loss 0 and is not part of the mean, but
        stays a negative of the others. No anchor with one (N = 1, or distinct labels and no pair around any): 0, with
        a gradient of zeros. All labels equal: no mixtures, every other row is a positive. Rows of zeros have cosine 0
        with all, and are mixed as directions of their own, at right angles to all. NaN gives NaN. First derivatives
        only.

    Raises:
        TypeError: integer embeddings, a setting of another kind.
        ValueError: shapes or devices disagree, an empty batch, labels that are not finite, a setting out of its range.
    Warns:
        UserWarning: three or more distinct labels and no pair around any anchor: the window is too small.

    Reference: Wu et al. 2023, "Mixup Your Own Pairs" (arXiv:2309.16633). The released code shifts real and mixed logits
    by different maxima before one softmax, gives most mixtures the weight of another one's label, detaches mixtures and
    does not normalise them; `normalize_mixtures=False, detach_mixtures=True` are its choices without its errors.

    >>> import torch
    >>> z = torch.eye(3)
    >>> round(supremix_loss(z, torch.tensor([1.0, 2.0, 3.0]), window=2.0, mix_neg=False).item(), 4)
    1.6094
    """
    who = "supremix_loss"
    _check_flags(who, normalize_mixtures, detach_mixtures, mix_neg, mix_pos)
    check_options(who, window, temperature, beta, weighting, label_scale, label_tolerance, mix_pos, reduction)
    if max_mixtures is not None:
        _check.integer(who, "max_mixtures", max_mixtures, 1)
    cpu_generator(who, generator)
    x = labelled_rows(who, embeddings, labels)
    y, order = sorted_labels(x, label_tolerance)
    windows = label_windows(y, float(window) if mix_pos and window is not None else 0.0)
    if mix_pos:
        _warn_of_a_small_window(who, y, windows)
    anchor_shares = _shares(who, lam, beta, order, x.z, generator) if mix_neg else None
    contrast = Contrast(
        labels=y,
        windows=windows,
        temperature=temperature,
        weight=label_weight(weighting, label_scale),
        inclusive=anchor_shares,
        exclusive=mix_pos,
        normalize=normalize_mixtures,
        detach=detach_mixtures,
        most=max_mixtures,
        seed=_seed(generator) if max_mixtures is not None and mix_pos else 0,
    )
    return contrast_of_sorted(x, order, contrast, reduction)


def sorted_labels(x: LabelledRows, tolerance: float) -> tuple[Tensor, Tensor]:
    """The labels (M,) in ascending order, and the rows that they belong to."""
    y = tied(x.labels, tolerance)
    order = y.argsort(stable=True)
    return y[order], order


def label_weight(weighting: str, label_scale: float) -> Callable[[Tensor], Tensor] | None:
    """Factor of a pair by its label distance; None for 1."""
    weight = WEIGHTINGS[weighting]
    return None if weight is None else lambda distance: weight(distance / label_scale)


def contrast_of_sorted(x: LabelledRows, order: Tensor, contrast: Contrast, reduction: str) -> Tensor:
    """The contrast of rows with labels in this order, reduced in their own."""
    device = x.z.device
    if device.type != "mps":  # Apple's has no float64
        contrast = contrast._replace(labels=contrast.labels.to(device))
    place = order.to(device)
    loss, count = label_contrast(unit(x.z)[place], contrast)
    back = place.argsort()
    return reduce_anchors(loss[back], count[back] > 0, x.shape, reduction)


class SupReMixLoss(nn.Module):
    """`supremix_loss` with its settings remembered. Nothing is learnt.

    `label_scale="std"` takes the standard deviation of the training labels, which `fit_labels` is told once; it is part
    of the state that is saved.

    >>> import torch
    >>> SupReMixLoss(window=5.0)(torch.randn(16, 2, 8), torch.arange(16.0)).shape
    torch.Size([])
    """

    label_scale: Tensor

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        window: float | None = None,
        beta: tuple[float, float] = (2.0, 8.0),
        weighting: str = "linear",
        label_scale: float | str = 1.0,
        normalize_mixtures: bool = True,
        detach_mixtures: bool = False,
        mix_neg: bool = True,
        mix_pos: bool = True,
        label_tolerance: float = 0.0,
        max_mixtures: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if isinstance(label_scale, str):
            _check.choice(who, "label_scale", label_scale, ("std",))
        scale = 1.0 if isinstance(label_scale, str) else label_scale
        _check_flags(who, normalize_mixtures, detach_mixtures, mix_neg, mix_pos)
        check_options(who, window, temperature, beta, weighting, scale, label_tolerance, mix_pos, reduction)
        self.temperature = temperature
        self.window = window
        self.beta = beta
        self.weighting = weighting
        self.normalize_mixtures = normalize_mixtures
        self.detach_mixtures = detach_mixtures
        self.mix_neg = mix_neg
        self.mix_pos = mix_pos
        self.label_tolerance = label_tolerance
        self.max_mixtures = (
            max_mixtures if max_mixtures is None else _check.integer(who, "max_mixtures", max_mixtures, 1)
        )
        self.reduction = reduction
        # On the host like the labels; NaN until it is fitted.
        unknown = float("nan") if label_scale == "std" else float(scale)
        self.register_buffer("label_scale", torch.tensor(unknown, dtype=torch.float64, device=CPU))

    def fit_labels(self, labels: Tensor) -> None:
        """Take the standard deviation of these labels (N,) as the unit of label distances."""
        who = f"{type(self).__name__}.fit_labels"
        y = _check.batch(who, "labels", labels, 1, 2).double()
        # Asked of the values: the rounded mean of equal ones may leave a tiny deviation.
        spread = y.std(correction=0) if bool(y.amin() != y.amax()) else y.new_zeros(())
        if not bool(torch.isfinite(spread)) or float(spread) == 0.0:
            raise ValueError(f"{who}: labels have a standard deviation of {float(spread):g}; pass two values or more.")
        self.label_scale.copy_(spread)

    def extra_repr(self) -> str:
        parts = f"temperature={self.temperature:g}, window={self.window}, weighting={self.weighting!r}"
        return f"{parts}, mix_neg={self.mix_neg}, mix_pos={self.mix_pos}"

    def forward(self, embeddings: Tensor, labels: Tensor, *, generator: Generator | None = None) -> Tensor:
        """The loss of embeddings (N, D) or (N, V, D) with labels (N,); see `supremix_loss`."""
        scale = float(self.label_scale)
        if scale != scale:
            raise ValueError(
                f'{type(self).__name__}: label_scale is "std" but no labels were given; call fit_labels with those of '
                "the training set."
            )
        return supremix_loss(
            embeddings,
            labels,
            window=self.window,
            temperature=self.temperature,
            beta=self.beta,
            weighting=self.weighting,
            label_scale=scale,
            normalize_mixtures=self.normalize_mixtures,
            detach_mixtures=self.detach_mixtures,
            mix_neg=self.mix_neg,
            mix_pos=self.mix_pos,
            label_tolerance=self.label_tolerance,
            max_mixtures=self.max_mixtures,
            reduction=self.reduction,
            generator=generator,
        )


def _check_flags(who: str, normalize_mixtures: bool, detach_mixtures: bool, mix_neg: bool, mix_pos: bool) -> None:
    _check.boolean(who, "normalize_mixtures", normalize_mixtures)
    _check.boolean(who, "detach_mixtures", detach_mixtures)
    _check.boolean(who, "mix_neg", mix_neg)
    _check.boolean(who, "mix_pos", mix_pos)


def check_options(
    who: str,
    window: float | None,
    temperature: float,
    beta: tuple[float, float],
    weighting: str,
    label_scale: float,
    label_tolerance: float,
    mix_pos: bool,
    reduction: str,
) -> None:
    _check.positive(who, "temperature", temperature)
    numbers = isinstance(beta, (tuple, list)) and all(isinstance(value, (int, float)) for value in beta)
    _check.interval(who, "beta", sorted(beta) if numbers else beta, 1.0, 1e6)
    _check.choice(who, "weighting", weighting, WEIGHTINGS)
    _check.positive(who, "label_scale", label_scale)
    _check.non_negative(who, "label_tolerance", label_tolerance)
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    if mix_pos and (isinstance(window, bool) or not isinstance(window, (int, float)) or not window > 0):
        raise ValueError(
            f"{who}: window is {_check.shown(window)}; pass how far apart labels may be mixed, in their own unit, or "
            "mix_pos=False."
        )


def _shares(
    who: str, lam: Tensor | None, beta: tuple[float, float], order: Tensor, z: Tensor, generator: Generator | None
) -> Callable[[int, int], Tensor]:
    """The anchor's share in its mixtures with every row, for sorted anchors [first, last)."""
    rows = len(order)
    if lam is not None:
        given = _check.tensor(who, "lam", lam)
        if given.shape != (rows, rows):
            raise ValueError(f"{who}: lam has shape {tuple(given.shape)}; pass ({rows}, {rows}), one share per pair.")
        ordered = shares(who, given.detach(), z.device, z.dtype)[order][:, order]
        return lambda first, last: ordered[first:last]
    seed = _seed(generator)
    shape = torch.tensor(beta, dtype=torch.float32, device=CPU)

    def draw(first: int, last: int) -> Tensor:
        block = torch.Generator().manual_seed(seed + first)
        a, b = (draw_gamma(value.expand(last - first, rows), block) for value in shape)
        return a.div_(a + b).to(z.device, z.dtype)

    return draw


def _seed(generator: Generator | None) -> int:
    """One number is drawn and the rest follows from it: loss and gradient ask for the same draws, and keep none."""
    return int(torch.randint(2**62, (), generator=generator, device=CPU))


def _warn_of_a_small_window(who: str, labels: Tensor, windows: Windows) -> None:
    """Labels are sorted. Silent where no window would do: fewer than three distinct labels."""
    pairs = zip(windows.low, windows.start, windows.stop, windows.high, strict=True)
    if any(low < start and stop < high for low, start, stop, high in pairs):
        return
    gaps = labels.unique_consecutive().diff()
    if len(gaps) < 2:
        return
    needed = torch.maximum(gaps[:-1], gaps[1:]).min()
    warnings.warn(
        f"{who}: no row has another within the window on either side, so there are no Mix-pos; the largest gap between "
        f"labels of this batch is {float(gaps.max()):g}, and a window above {float(needed):g} finds some.",
        UserWarning,
        stacklevel=3,
    )
