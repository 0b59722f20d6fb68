"""Decoupled Mixup with cross entropy, DM(CE)."""

from __future__ import annotations

from torch import Tensor, nn

from hardmix.losses._targets import check_options, class_objective
from hardmix.mixing.target import MixedTarget


def decoupled_mixup_loss(
    logits: Tensor,
    target: MixedTarget | Tensor,
    *,
    eta: float = 0.1,
    asymmetric: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Decoupled Mixup: mixed cross entropy, and each mixed class against all classes but its partner.

        l   = -sum_k w_k log p_{y_k} + eta (R_a + R_b),                p = softmax(z)
        R_a = -log(p_a / (1 - p_b)) = softplus(r - z_a),   R_b likewise,   r = logsumexp_{c not in {a, b}} z_c

    Cross entropy alone has its optimum at p_a = lambda, so a visible class with a small share is never predicted with
    confidence. R does not contain lambda. For K labels S is the set of distinct ones, r is over the classes outside S,
    R = sum_{i in S} softplus(r - z_i), and shares of the same class add up.

    Args:
        logits: (N, C) or (N, C, *spatial), C >= 2. Half types are computed in float32, and the loss is float32.
        target: one of

            - MixedTarget with labels (N, K), or (N, K, *spatial) for dense masks; weights of that shape, (N, K), or
              broadcastable to it;
            - MixedTarget with one-hot or soft rows (N, K, C) and logits (N, C): the cross entropy takes the rows as
              they are, the regulariser the largest class of each; a row of zeros has none;
            - integer labels (N,) or (N, *spatial): plain cross entropy, R = 0;
            - dense soft labels (N, C) or (N, C, *spatial), as timm and torchvision make them: the cross entropy takes
              them as they are, the regulariser the two classes that `MixedTarget.from_dense` finds under label
              smoothing. A row with one class has R = 0, also where lambda was rounded to 0 or 1.
        eta: factor of R. The paper searches 0.01 to 2 and takes 0.1 for static policies, 1 for dynamic ones.
        asymmetric: only R_a of the own class, the first label, with the partner as the competitor that is taken out:
            for a labelled sample mixed with a pseudo-labelled one, whose class may be wrong. Give the labelled sample
            the **small** share (lambda < 0.5), checked again after the mask is made: a clipped box can turn it over.
        weight: (C,) factor of each class in the cross entropy. R is not weighted.
        ignore_index: class id that does not count. An ignored label drops out with its share, the other shares stay as
            they are, and without a pair R = 0, with `asymmetric` also where the own label is ignored. A row without
            another label that has a share is skipped: its loss is 0 and the mean is not over it. Dense soft labels and
            rows have no ignored class.
        label_smoothing: epsilon of the cross entropy's target, (1 - epsilon) y + epsilon / C. R is not smoothed.
        reduction: "mean" over the rows (pixels) that are not skipped, "sum", or "none".

    Returns:
        Scalar, or (N, *spatial) for "none". A batch with every row skipped has loss 0.

        Same class twice: R = 0, plain cross entropy. C = 2: R is identically 0. A pair (N, K) is regularised whatever
        lambda is, 0 and 1 included; a pixel with a share of exactly 0 shows one image only and is not. NaN and +inf
        logits give NaN. A logit of -inf takes a class out of the softmax; on a class of the target the loss is inf, or
        NaN where the share is 0, as in `torch.nn.functional.cross_entropy`. A gap between logits beyond 1e30 counts as
        1e30. Second derivatives are supported.

    The mean divides by the number of rows, as `cross_entropy` does for soft targets. For integer labels with `weight`,
    `cross_entropy` divides by the sum of the weights instead; here a batch has one loss, whatever form its target has.

    Raises:
        TypeError: float (regression) labels, integer logits, another kind of target.
        ValueError: sizes or devices disagree, an empty batch, one class only, a class out of range (on the CPU;
            a GPU isn't waited for: there the loss is NaN, or the device asserts), a setting out of its range,
            `asymmetric` with dense soft labels.

    Reference: Liu et al. 2023, "Harnessing Hard Mixed Samples with Decoupled Regularizer" (arXiv:2203.10761). The
    released code leaves R out at lambda = 0.5 and within 1e-3 of 0 and 1, needs one lambda per batch, scales eta by a
    power of lambda and decouples one class only in most of its configurations, and adds two means where a batch holds
    same-class pairs. Here R is always there, for both classes, eta is constant, and there is one mean. K > 2 labels are
    in the released code, not in the paper.

    >>> import torch
    >>> from hardmix.mixing import MixedTarget
    >>> target = MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]]))
    >>> round(decoupled_mixup_loss(torch.tensor([[2.0, 1.0, 0.5, -1.0]]), target, eta=0.1).item(), 4)
    1.2748
    """
    return class_objective(
        "decoupled_mixup_loss",
        logits,
        target,
        eta=eta,
        asymmetric=asymmetric,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


class DecoupledMixupLoss(nn.Module):
    """`decoupled_mixup_loss` with its settings remembered. `weight` is a buffer; nothing is learnt.

    >>> import torch
    >>> DecoupledMixupLoss(eta=0.5)(torch.zeros(4, 10), torch.arange(4)).item() == torch.tensor(10.0).log().item()
    True
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        eta: float = 0.1,
        asymmetric: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_options(
            type(self).__name__,
            eta=eta,
            asymmetric=asymmetric,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        self.eta = eta
        self.asymmetric = asymmetric
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"eta={self.eta:g}, asymmetric={self.asymmetric}, label_smoothing={self.label_smoothing:g}"

    def forward(self, logits: Tensor, target: MixedTarget | Tensor) -> Tensor:
        """The loss of `logits` (N, C, *spatial) for `target`; see `decoupled_mixup_loss`."""
        return decoupled_mixup_loss(
            logits,
            target,
            eta=self.eta,
            asymmetric=self.asymmetric,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
