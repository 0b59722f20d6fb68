"""CaRot's two terms against loops, their edges and messages, and the sum that is the loss."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardmix.losses.carot import CaRotLoss, projection_penalty, self_distillation_loss
from hardmix.losses.clip import ClipLoss, clip_loss

from .slow_pairs import cloud, log_sum, unit_rows

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(n: int, d: int = 5, seed: int = 0, scale: float = 6.0) -> list[Tensor]:
    return [x.requires_grad_() for x in (*cloud(n, d, seed), torch.tensor(scale, dtype=DOUBLE))]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=DOUBLE, generator=rng(seed)).requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.double() for value in torch.autograd.grad(loss, inputs)]


def slow_penalty(v: Tensor, t: Tensor, orthogonality: float, cross: float) -> Tensor:
    own, other = [], []
    for j in range(v.shape[1]):
        for k in range(v.shape[1]):
            own.append((sum(v[i, j] * v[i, k] for i in range(len(v))) - float(j == k)) ** 2)
    for i in range(len(v)):
        for k in range(len(t)):
            other.append(sum(v[i, j] * t[k, j] for j in range(v.shape[1])) ** 2)
    return orthogonality * sum(own).sqrt() + cross * sum(other).sqrt()


def slow_distillation(a: Tensor, b: Tensor, s: Tensor, a0: Tensor, b0: Tensor, s0: float) -> list[Tensor]:
    x, y, x0, y0 = (unit_rows(rows) for rows in (a, b, a0, b0))
    losses = []
    for i in range(len(x)):
        loss = torch.zeros((), dtype=DOUBLE)
        for one, two, one0, two0 in ((x, y, x0, y0), (y, x, y0, x0)):
            student, teacher = [s * (one[i] @ key) for key in two], [s0 * (one0[i] @ key) for key in two0]
            for j in range(len(x)):
                p = (teacher[j] - log_sum(teacher)).exp().detach()
                loss = loss - p * (student[j] - log_sum(student))
        losses.append(loss)
    return losses


@pytest.mark.parametrize(("width", "other", "d"), [(1, 1, 1), (6, 4, 3), (2, 5, 4)])
def test_the_penalty_is_that_of_the_loops(width, other, d) -> None:
    v, t = matrix(width, d), matrix(other, d, 1)
    got, want = projection_penalty(v, t, orthogonality=0.7, cross=0.3), slow_penalty(v, t, 0.7, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(got, v, t), gradients(want, v, t), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(projection_penalty(v, orthogonality=0.7), slow_penalty(v, t, 0.7, 0.0))
    assert torch.autograd.gradcheck(projection_penalty, (v, t), eps=1e-6, atol=1e-5, rtol=1e-3)


def test_orthonormal_columns_cost_nothing_and_have_a_gradient() -> None:
    """The norm of zero: its slope is 0, where the root of a sum of squares has NaN."""
    v = torch.eye(5, 3, dtype=DOUBLE).requires_grad_()
    t = torch.zeros(4, 3, dtype=DOUBLE).requires_grad_()
    loss = projection_penalty(v, t)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(loss, v, t))
    turn = torch.linalg.qr(matrix(5, 5).detach())[0]
    torch.testing.assert_close(projection_penalty(turn @ v), torch.zeros((), dtype=DOUBLE), atol=1e-14, rtol=0)
    # Three columns in two dimensions are not orthonormal: one direction at least is lost.
    assert projection_penalty(torch.eye(2, 3), orthogonality=1.0).item() == 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 6.0, 100.0])
def test_the_distillation_is_that_of_the_loops(n, scale) -> None:
    a, b, s = leaves(n, seed=n, scale=scale)
    a0, b0 = cloud(n, 4, n + 50)
    got = self_distillation_loss(a, b, s, a0, b0, 5.0, reduction="none")
    want = torch.stack(slow_distillation(a, b, s, a0, b0, 5.0))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(got.sum(), a, b, s), gradients(want.sum(), a, b, s), rtol=1e-10, atol=1e-11)
    for reduction, value in (("sum", want.sum()), ("mean", want.mean())):
        torch.testing.assert_close(self_distillation_loss(a, b, s, a0, b0, 5.0, reduction=reduction), value)


def test_gradcheck() -> None:
    a, b, s = leaves(5, 3)
    a0, b0 = cloud(5, 3, 9)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda *x, r=reduction: self_distillation_loss(*x, a0, b0, 5.0, reduction=r),
            (a, b, s),
            eps=1e-6,
            atol=1e-5,
            rtol=1e-3,
        )


def test_teachers() -> None:
    a, b, s = leaves(8)
    a0, b0, s0 = leaves(8, seed=3)
    loss = self_distillation_loss(a, b, s, a0, b0, s0)
    assert torch.autograd.grad(loss, (a0, b0, s0), allow_unused=True) == (None, None, None)
    # The student itself is the best answer to itself.
    same = self_distillation_loss(a, b, s, a, b, s)
    assert all((grad.abs() < 1e-14).all() for grad in gradients(same, a, b, s))
    entropy = sum(torch.distributions.Categorical(logits=z).entropy().mean() for z in _both(a, b, s))
    torch.testing.assert_close(same, entropy)
    assert loss >= sum(torch.distributions.Categorical(logits=z).entropy().mean() for z in _both(a0, b0, s0))
    certain = torch.eye(8, dtype=DOUBLE)
    torch.testing.assert_close(self_distillation_loss(a, b, s, certain, certain, 2000.0), 2 * clip_loss(a, b, s))


def _both(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    z = s * F.normalize(a) @ F.normalize(b).T
    return z, z.T


def test_edges() -> None:
    a, b, s = leaves(1)
    loss = self_distillation_loss(a, b, s, a, b, s)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(loss, a, b, s))
    same = torch.ones(5, 3)
    assert self_distillation_loss(same, same, 9.0, same, same, 9.0).item() == pytest.approx(2 * math.log(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_extremes_are_finite(dtype, scale) -> None:
    top = torch.finfo(dtype).max
    a, b, a0, b0 = (torch.randn(9, 6, generator=rng(k)).to(dtype) for k in range(4))
    a[0], b[1], a[2], b[2], b[3], a[4] = 0.0, 0.0, top, -top, a[3], 1.0 if dtype == torch.float16 else 1e-30
    a0[0], b0[1], a0[2], b0[2], b0[3] = 0.0, 0.0, top, -top, a0[3]
    a.requires_grad_()
    b.requires_grad_()
    loss = self_distillation_loss(a, b, scale, a0, b0, 1e4)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_float64_of_the_same_input(dtype) -> None:
    a, b = (x.to(dtype) for x in cloud(24, 16, 5))
    a0, b0 = (x.to(dtype) for x in cloud(24, 16, 6))
    v = torch.randn(20, 16, generator=rng()).to(dtype)
    t = torch.randn(12, 16, generator=rng(1)).to(dtype)
    wide = [x.double() for x in (a, b, a0, b0)]
    got = self_distillation_loss(a, b, 20.0, a0, b0, 20.0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(self_distillation_loss(*wide[:2], 20.0, *wide[2:], 20.0).item(), rel=1e-6)
    penalty = projection_penalty(v, t)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(projection_penalty(v.double(), t.double()).item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(self_distillation_loss(a, b, 20.0, a0, b0, 20.0), got)
        assert torch.equal(projection_penalty(v, t), penalty)


def test_large_half_weights_do_not_overflow() -> None:
    v = torch.full((8, 4), 6e4, dtype=torch.float16, requires_grad=True)
    loss = projection_penalty(v, v)
    assert loss.isfinite()
    assert loss > 1e9


def test_the_module_is_the_sum() -> None:
    a, b, s = leaves(7)
    a0, b0 = cloud(7, 5, 9)
    v, t = matrix(6, 5), matrix(4, 5, 1)
    names = list(inspect.signature(ClipLoss.forward).parameters)
    assert list(inspect.signature(CaRotLoss.forward).parameters)[: len(names)] == names
    assert repr(CaRotLoss()) == "CaRotLoss(orthogonality=0.2, cross=0.05, distillation=1.5)"
    given: dict[str, Any] = {"projections": (v, t), "teacher": (a0, b0, 5.0)}
    bias = torch.tensor(-3.0, requires_grad=True)
    found = CaRotLoss()(a, b, s, bias, output_dict=True, **given)
    assert list(found) == ["contrastive_loss", "projection_loss", "distillation_loss"]
    torch.testing.assert_close(found["contrastive_loss"], clip_loss(a, b, s))
    torch.testing.assert_close(found["projection_loss"], projection_penalty(v, t))
    torch.testing.assert_close(found["distillation_loss"], 1.5 * self_distillation_loss(a, b, s, a0, b0, 5.0))
    whole = CaRotLoss()(a, b, s, bias, **given)
    torch.testing.assert_close(whole, sum(found.values()))
    assert gradients(whole, bias)[0] == 0.0
    only = CaRotLoss(orthogonality=0, cross=0)(a, b, s, output_dict=True, teacher=(a0, b0, 5.0))
    assert list(only) == ["contrastive_loss", "distillation_loss"]
    torch.testing.assert_close(
        CaRotLoss(distillation=0)(a, b, s, projections=(v, t)), clip_loss(a, b, s) + projection_penalty(v, t)
    )


def test_torchs_moving_average_is_the_teacher() -> None:
    """As the class says: the average's answers are what the student is held to."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    teacher.update_parameters(model)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    teacher.update_parameters(model)
    torch.testing.assert_close(teacher.module.weight, start + 0.5)
    x, y = torch.randn(2, 6, 4, generator=rng())
    loss = CaRotLoss(orthogonality=0, cross=0)(model(x), model(y), 5.0, teacher=(teacher(x), teacher(y), 5.0))
    loss.backward()
    assert model.weight.grad is not None
    assert teacher.module.weight.grad is None


A = torch.ones(3, 2)
ROW = {"image_features": A, "text_features": A, "logit_scale": 1.0}
TEACHER = {"teacher_image_features": A, "teacher_text_features": A, "teacher_logit_scale": 1.0}


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"teacher_image_features": None}, TypeError, "teacher_image_features is a NoneType; pass a torch.Tensor."),
        (
            {"teacher_image_features": A[:2]},
            ValueError,
            "teacher_image_features has 2 entries but image_features has 3 rows; pass one entry per row.",
        ),
        (
            {"teacher_text_features": torch.ones(3, 4)},
            ValueError,
            "teacher_text_features has 4 columns but teacher_image_features has 2; pass features of one space.",
        ),
        ({"teacher_text_features": A / 0}, ValueError, "teacher_text_features holds NaN or infinity in rows 0, 1, 2; "),
        ({"teacher_logit_scale": 0.0}, ValueError, "teacher_logit_scale is 0.0; pass a finite number greater than 0."),
        ({"logit_scale": -1.0}, ValueError, "logit_scale is -1.0; pass a finite number greater than 0."),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; pass one of 'none', 'mean', 'sum'."),
    ],
)
def test_messages_of_the_distillation(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^self_distillation_loss: {re.escape(message)}"):
        self_distillation_loss(**{**ROW, **TEACHER, **setting})


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ({"image_projection": A[0]}, ValueError, "image_projection has shape (2,); pass a batch with 2 axes, samples"),
        ({"image_projection": A.long()}, TypeError, "image_projection has dtype torch.int64; pass floating-point"),
        (
            {"text_projection": torch.ones(3, 4)},
            ValueError,
            "text_projection has 4 columns but image_projection has 2; pass features of one space.",
        ),
        ({"text_projection": A / 0}, ValueError, "text_projection holds NaN or infinity in rows 0, 1, 2; repair"),
        ({"orthogonality": -1.0}, ValueError, "orthogonality is -1.0; pass a finite number of at least 0."),
        ({"cross": "x"}, ValueError, "cross is 'x'; pass a finite number of at least 0."),
    ],
)
def test_messages_of_the_penalty(setting: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^projection_penalty: {re.escape(message)}"):
        projection_penalty(**{"image_projection": A, "text_projection": A, **setting})


def test_messages_of_the_module() -> None:
    for name in ("orthogonality", "cross", "distillation"):
        with pytest.raises(ValueError, match=rf"^CaRotLoss: {name} is -1.0; pass a finite number of at least 0\.$"):
            CaRotLoss(**{name: -1.0})
    with pytest.raises(ValueError, match=r"^CaRotLoss: all weights are 0; pass one that is greater, or use ClipLoss"):
        CaRotLoss(orthogonality=0, cross=0, distillation=0)
    with pytest.raises(ValueError, match=r"^CaRotLoss: projections is None; pass \(image projection, text projection"):
        CaRotLoss()(A, A, 1.0, teacher=(A, A, 1.0))
    with pytest.raises(ValueError, match=r"^CaRotLoss: teacher is a Tensor; pass \(image features, text features, "):
        CaRotLoss()(A, A, 1.0, projections=(A, A), teacher=A)
