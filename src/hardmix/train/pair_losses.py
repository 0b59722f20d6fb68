"""One step of an image-text model: what an objective needs beside the features of pictures and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hardmix.distributed import gather_rows, gather_with_gradient, rank_and_size
from hardmix.losses import (
    CaRotLoss,
    ClipLoss,
    CoCaLoss,
    IMixLoss,
    LipsumLoss,
    M2MixLoss,
    M2MixSigLipLoss,
    M3MixLoss,
    SigLipLoss,
    UnMixLoss,
)
from hardmix.mixing import MixPlan
from hardmix.models.pair_captioner import PairNet
from hardmix.models.pair_model import PairOutput

#: these compare the pairs of all processes themselves
GATHERING = (ClipLoss, SigLipLoss, M2MixLoss, M2MixSigLipLoss, M3MixLoss, CoCaLoss)
MIXED = (M2MixLoss, M2MixSigLipLoss, M3MixLoss)
SIGMOID = (SigLipLoss, M2MixSigLipLoss)
#: decay of CaRot's teacher at each step
TEACHER_DECAY = 0.99


class PairObjective(nn.Module):
    """An objective of recipes and what it needs beside features: a plan, the teacher of CaRot, a start for Lipsum-FT.

    Args:
        objective: of `tables.PAIR_OBJECTIVES`, or of `tables.OBJECTIVES` for a head.
        model: the model at its start.
        lipsum: for Lipsum-FT, the cross entropy of the head, its weight, and texts (inputs of the tower) that mean
            nothing.
    """

    def __init__(
        self,
        objective: nn.Module,
        model: PairNet,
        lipsum: tuple[nn.Module, float, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.teacher: AveragedModel | None = None
        if isinstance(objective, CaRotLoss):
            self.teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(TEACHER_DECAY), use_buffers=True)
            self.teacher.n_averaged.add_(1)  # it is the start already, which a first update would replace
        self.lipsum = lipsum
        self._reference: list[PairNet] = []

    @property
    def reference(self) -> PairNet | None:
        """For Lipsum-FT, the model as training began."""
        return self._reference[0] if self._reference else None

    def refer_to(self, model: PairNet) -> None:
        # In a list it is no part of this module: a checkpoint has its weights as those of the start.
        self._reference = [model]

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.objective, MIXED):
            self.objective.set_epoch(epoch)

    def follow(self, model: PairNet) -> None:
        """After each step: the teacher moves towards the model."""
        if self.teacher is not None:
            self.teacher.update_parameters(model)

    def of_head(self, found: PairOutput, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of a classifier on the pictures' features."""
        assert found.logits is not None
        assert found.image is not None
        if self.lipsum is None:
            return self.objective(found.logits, labels)
        entropy, weight, texts = self.lipsum
        reference = self.reference
        assert reference is not None
        with torch.no_grad():
            before = reference(images, texts.to(images.device))
        assert isinstance(self.objective, LipsumLoss)
        return entropy(found.logits, labels) + weight * self.objective(
            found.image, before.image, before.text, before.scale
        )

    def of_pairs(
        self,
        found: PairOutput,
        bias: Tensor | None,
        *,
        shared: Generator | None,
        inputs: tuple[Tensor, Tensor],
        plan: MixPlan | None,
        mixed: Tensor | None,
        model: PairNet,
    ) -> Tensor:
        """Loss of matching pictures and texts.

        Args:
            found: features of this process's pictures and texts, and the logits of captions.
            bias: of the logits, where the model has one.
            shared: draws that all processes have alike.
            inputs: what the features were made of.
            plan: who was mixed with whom, if a policy mixed the pictures.
            mixed: features of the mixed pictures, where those of unmixed ones are in `found`.
            model: for its projections.
        """
        a, b, scale = found.image, found.text, found.scale
        assert a is not None
        assert b is not None
        if isinstance(self.objective, CoCaLoss):
            draws = {"generator": shared} if isinstance(self.objective.contrastive, MIXED) else {}
            return self.objective(a, b, found.logits, scale, inputs[1], **draws)
        if isinstance(self.objective, MIXED):
            return self.objective(a, b, scale, bias, generator=shared)
        if isinstance(self.objective, GATHERING):
            return self.objective(a, b, scale, bias)
        if isinstance(self.objective, UnMixLoss):  # the batch in reverse is that of one process
            assert plan is not None
            assert mixed is not None
            return self.objective(a, b, mixed, scale, lam=plan.lam)
        # The others: every process computes the loss of all pairs, with the gradients of its own.
        rank, size = rank_and_size()
        first = 0 if size == 1 else sum(_counts(len(a))[:rank])
        a, b, scale = gather_with_gradient(a), gather_with_gradient(b), _part_of(scale, size)
        if isinstance(self.objective, IMixLoss):
            assert plan is not None
            partner, lam = gather_rows(plan.partner + first), gather_rows(plan.lam)
            return self.objective(a, b, scale, partner=partner, lam=lam)
        if isinstance(self.objective, CaRotLoss):
            assert self.teacher is not None
            with torch.no_grad():
                told = self.teacher(*inputs)
            teacher = (gather_rows(told.image), gather_rows(told.text), told.scale)
            return self.objective(a, b, scale, projections=_projections(model, size), teacher=teacher)
        return self.objective(a, b, scale)

    def share(self, rows: int) -> float:
        """What the loss of `rows` pairs is multiplied with, since the loop takes it for the mean over them alone and
        averages: 1 where it is that, or makes up for the rank's part of the batch, and for the average."""
        size = rank_and_size()[1]
        if size == 1 or isinstance(self.objective, UnMixLoss):
            return 1.0
        total = float(sum(_counts(rows)))
        return total / (rows * size) if isinstance(self.objective, GATHERING) else total / rows


def _counts(rows: int) -> list[int]:
    return gather_rows(torch.tensor([rows])).tolist()


def _part_of(scale: Tensor, size: int) -> Tensor:
    """The same value with a part of its gradient: every process has the whole one, and these are added up."""
    return scale if size == 1 else scale / size + (scale * (1.0 - 1.0 / size)).detach()


def _projections(model: PairNet, size: int) -> tuple[Tensor, Tensor]:
    """(width, D) of both towers, each with its part of the gradient."""
    weights: list[Any] = []
    for projection in (model.image_projection, model.text_projection):
        last = list(projection.modules())[-1]
        if not isinstance(last, nn.Linear):
            raise ValueError('objective "carot" holds projections near orthonormal; the model has none that is linear.')
        weights.append(_part_of(last.weight.T, size))
    return weights[0], weights[1]
