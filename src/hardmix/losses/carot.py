"""CaRot: CLIP with projections held near orthonormal and a slow copy of the model as a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix._math import reduce, unit, wide
from hardmix.losses._features import feature_rows
from hardmix.losses.clip import REDUCTIONS, clip_loss, one_number, unit_pairs, without_effect


def projection_penalty(
    image_projection: Tensor,
    text_projection: Tensor | None = None,
    *,
    orthogonality: float = 0.2,
    cross: float = 0.05,
) -> Tensor:
    """The constraint of CaRot on the last projections of the two towers.

        orthogonality ||W_v^T W_v - I||_F  +  cross ||W_v W_t^T||_F

    Args:
        image_projection: W_v (width, D), from the tower's width to the D features: open_clip's `visual.proj`, or the
            transposed weight of a `Linear`.
        text_projection: W_t (width, D), of any width; None leaves out the second norm.
        orthogonality, cross: the two weights, at least 0.

    Returns:
        Scalar, float32 or wider. Both norms have the gradient 0 where they are 0. A projection from a smaller width
        than D cannot have orthonormal columns.

    Raises:
        TypeError: not tensors, or not of a floating-point dtype.
        ValueError: not two axes, numbers of columns or devices disagree, a weight out of range; on the CPU also NaN or
            infinity.

    Reference: Oh et al. 2024 (arXiv:2311.01723). Norms, not their squares, and the weights are the authors' code's.

    >>> import torch
    >>> projection_penalty(2 * torch.eye(2), orthogonality=1.0)   # the norm of 3 I
    tensor(4.2426)
    """
    who = "projection_penalty"
    _check.non_negative(who, "orthogonality", orthogonality)
    _check.non_negative(who, "cross", cross)
    v = feature_rows(who, "image_projection", image_projection)
    v = v.to(wide(v.dtype))
    with torch.autocast(v.device.type, enabled=False):
        unity = torch.eye(v.shape[1], device=v.device, dtype=v.dtype)
        penalty = orthogonality * torch.linalg.vector_norm(v.T @ v - unity)
        if text_projection is None:
            return penalty
        t = feature_rows(who, "text_projection", text_projection, ("image_projection", v), rows=False)
        return penalty + cross * torch.linalg.vector_norm(v @ t.to(v.dtype).T)


def self_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Whom each image and each text of the batch belongs to, learnt from a teacher; the sum of both directions.

        l_i = -sum_j P_ij log Q_ij - sum_j P'_ij log Q'_ij,   Q = softmax_j(s a_i . b_j),  Q' = softmax_j(s b_i . a_j)

    P and P' are the same of the teacher, at its own scale, and constants. N x N logits are formed.

    Args:
        image_features, text_features, logit_scale: as for `clip_loss`.
        teacher_image_features, teacher_text_features: (N, D') of the same pairs; D' may differ.
        teacher_logit_scale: the teacher's.
        reduction: "mean" over the pairs, "sum", or "none".

    Returns:
        Scalar, or (N,) for "none", float32 or wider. N = 1: 0. A teacher that is the student leaves the entropy of its
        answers, with a gradient of zeros. A teacher that is certain gives twice `clip_loss`.

    Raises:
        TypeError, ValueError: as for `clip_loss`.

    Reference: Oh et al. 2024 (arXiv:2311.01723).

    >>> import torch
    >>> one = torch.eye(2)
    >>> round(self_distillation_loss(one, one, 1.0, one, one, 200.0).item(), 4)   # 2 log(1 + 1/e)
    0.6265
    """
    who = "self_distillation_loss"
    _check.choice(who, "reduction", reduction, REDUCTIONS)
    a, b = unit_pairs(who, image_features, text_features)
    scale = one_number(who, "logit_scale", logit_scale, a)
    like = ("image_features", a)
    images = feature_rows(who, "teacher_image_features", teacher_image_features, like, columns=False)
    like = ("teacher_image_features", images)
    texts = feature_rows(who, "teacher_text_features", teacher_text_features, like)
    a0, b0 = (unit(x.detach().to(a.dtype)) for x in (images, texts))
    teacher_scale = one_number(who, "teacher_logit_scale", teacher_logit_scale, a).detach()
    with torch.autocast(a.device.type, enabled=False):
        logits, target = scale * (a @ b.T), teacher_scale * (a0 @ b0.T)
        by_image, by_text = ((target.softmax(axis) * logits.log_softmax(axis)).sum(axis) for axis in (1, 0))
    return reduce(-by_image - by_text, reduction)


class CaRotLoss(nn.Module):
    """CaRot, in the place of open_clip's `ClipLoss`, with two keywords more.

        L = clip_loss + projection_penalty + distillation self_distillation_loss

    The teacher is an exponential moving average of the model, whose update is the caller's: `AveragedModel(model,
    multi_avg_fn=get_ema_multi_avg_fn(decay))` from `torch.optim.swa_utils`, updated after steps. `logit_bias` cancels
    and only gets its gradient of 0. `output_dict=True` gives {"contrastive_loss": CLIP, "projection_loss": .,
    "distillation_loss": .}, weighted, whose sum is the loss; a term without weight is not there.

    Args:
        orthogonality, cross, distillation: the weights, at least 0; those of the authors' code.

    The call takes `projections=(W_v, W_t)`, see `projection_penalty`, where one of the first two weights is greater
    than 0, and `teacher=(image_features, text_features, logit_scale)` where the third is. First derivatives only.

    Reference: Oh et al. 2024 (arXiv:2311.01723).

    >>> import torch
    >>> images, texts = torch.randn(2, 8, 16)
    >>> loss = CaRotLoss()
    >>> loss(images, texts, 50.0, projections=(torch.eye(16), torch.eye(16)), teacher=(images, texts, 50.0)).shape
    torch.Size([])
    """

    def __init__(self, *, orthogonality: float = 0.2, cross: float = 0.05, distillation: float = 1.5) -> None:
        super().__init__()
        who = type(self).__name__
        self.orthogonality = _check.non_negative(who, "orthogonality", orthogonality)
        self.cross = _check.non_negative(who, "cross", cross)
        self.distillation = _check.non_negative(who, "distillation", distillation)
        if not (self.orthogonality or self.cross or self.distillation):
            raise ValueError(f"{who}: all weights are 0; pass one that is greater, or use ClipLoss.")

    def extra_repr(self) -> str:
        return f"orthogonality={self.orthogonality:g}, cross={self.cross:g}, distillation={self.distillation:g}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        projections: tuple[Tensor, Tensor] | None = None,
        teacher: tuple[Tensor, Tensor, Tensor | float] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (N, D) and (N, D); see the class."""
        who = type(self).__name__
        constrained = bool(self.orthogonality or self.cross)
        if constrained and not (isinstance(projections, tuple) and len(projections) == 2):
            raise ValueError(f"{who}: projections is {_kind(projections)}; pass (image projection, text projection).")
        if self.distillation and not (isinstance(teacher, tuple) and len(teacher) == 3):
            raise ValueError(f"{who}: teacher is {_kind(teacher)}; pass (image features, text features, logit scale).")
        contrastive = clip_loss(image_features, text_features, logit_scale)
        parts = {"contrastive_loss": without_effect(contrastive, logit_bias)}
        if constrained and projections is not None:
            image, text = projections
            penalty = projection_penalty(image, text, orthogonality=self.orthogonality, cross=self.cross)
            parts["projection_loss"] = penalty.to(contrastive)
        if self.distillation and teacher is not None:
            distilled = self_distillation_loss(image_features, text_features, logit_scale, *teacher)
            parts["distillation_loss"] = self.distillation * distilled
        return parts if output_dict else torch.stack(list(parts.values())).sum()


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
