"""Cross entropy of mixed labels, MCE: what every mixing policy is trained with by default."""

from __future__ import annotations

from torch import Tensor, nn

from hardmix.losses._targets import check_options, class_objective
from hardmix.mixing.target import MixedTarget


def soft_cross_entropy_loss(
    logits: Tensor,
    target: MixedTarget | Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of mixed labels.

        l = -sum_k w_k log p_{y_k},   p = softmax(z)

    The same number as `torch.nn.functional.cross_entropy(logits, target.dense(C))`, without the dense target: about the
    time of hard labels and less memory.

    Args:
        logits: (N, C) or (N, C, *spatial), C >= 2. Half types are computed in float32, and the loss is float32.
        target: MixedTarget, integer labels, or dense soft labels, as in `decoupled_mixup_loss`.
        weight: (C,) factor of each class.
        ignore_index: class id that does not count. An ignored label drops out with its share, the other shares stay as
            they are; a row without a label that has a share is skipped: its loss is 0 and the mean is not over it.
        label_smoothing: epsilon of the target, (1 - epsilon) y + epsilon / C.
        reduction: "mean" over the rows (pixels) that are not skipped, "sum", or "none".

    Returns:
        Scalar, or (N, *spatial) for "none". A batch with every row skipped has loss 0. NaN and +inf logits give NaN; a
        logit of -inf on a class of the target gives inf, or NaN where its share is 0. Second derivatives are supported.

    The mean divides by the number of rows, as `cross_entropy` does for soft targets. For integer labels with `weight`,
    `cross_entropy` divides by the sum of the weights instead; here a batch has one loss, whatever form its target has.

    Raises:
        TypeError: float (regression) labels, integer logits, another kind of target.
        ValueError: sizes or devices disagree, an empty batch, one class only, a class out of range (on the CPU; a
            GPU isn't waited for: there the loss is NaN, or the device asserts), a setting out of its range.

    Reference: Zhang et al. 2018, eq. 1 with the cross entropy (arXiv:1710.09412).

    >>> import torch
    >>> from hardmix.mixing import MixedTarget
    >>> target = MixedTarget(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]]))
    >>> round(soft_cross_entropy_loss(torch.tensor([[2.0, 1.0, 0.5, -1.0]]), target).item(), 4)
    1.1952
    """
    return class_objective(
        "soft_cross_entropy_loss",
        logits,
        target,
        eta=0.0,
        asymmetric=False,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


class SoftCrossEntropyLoss(nn.Module):
    """`soft_cross_entropy_loss` with its settings remembered. `weight` is a buffer; nothing is learnt."""

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_options(
            type(self).__name__,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing:g}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, target: MixedTarget | Tensor) -> Tensor:
        """The loss of `logits` (N, C, *spatial) for `target`; see `soft_cross_entropy_loss`."""
        return soft_cross_entropy_loss(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
