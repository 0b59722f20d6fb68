"""MixPlan: blending anything with one draw, and the labels that belong to it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardmix.mixing import (
    AugMix,
    CutMix,
    FMix,
    GridMix,
    MixPlan,
    Mixup,
    RandomChoice,
    ResizeMix,
    SaliencyMix,
    Scheduled,
    SmoothMix,
)
from mixing.cases import blend_by_hand, rng

N = 5
PARTNER = torch.tensor([3, 0, 4, 1, 2])
LAM = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])


def random_mask(size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand((N, 1, *size), generator=rng(seed))


@pytest.mark.parametrize("shape", [(7,), (3, 9), (3, 6, 5), (2, 4, 5, 6), (1, 160, 160)], ids=str)
@pytest.mark.parametrize("kind", ["lam", "mask", "shift", "box"])
def test_blend_matches_the_definition(shape: tuple[int, ...], kind: str) -> None:
    x = torch.rand((N, *shape), generator=rng(), dtype=torch.float64)
    size = shape[1:]
    if kind == "lam" or (kind == "mask" and not size):
        plan = MixPlan(PARTNER, LAM)
    elif kind == "mask":
        mask = random_mask(size)
        plan = MixPlan(PARTNER, mask.mean(tuple(range(1, mask.ndim))), mask)
    elif kind == "shift":
        plan = MixPlan((torch.arange(N) + 2) % N, LAM, shift=2)
    else:
        box = (
            torch.stack(
                [torch.stack([torch.tensor([0, side]), *[torch.tensor([1, 1 + side // 2])] * 4]) for side in size], 1
            )
            if size
            else None
        )
        plan = MixPlan(PARTNER, LAM, box=box, size=tuple(size) if size else None)
    np.testing.assert_allclose(plan.blend(x).numpy(), blend_by_hand(x, plan), atol=1e-7)
    half = x.to(torch.float16)
    np.testing.assert_allclose(plan.blend(half).double().numpy(), blend_by_hand(half, plan), atol=5e-4)
    bytes_ = (x * 255).to(torch.uint8)
    assert np.abs(plan.blend(bytes_).double().numpy() - blend_by_hand(bytes_, plan)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_blended_in_single_precision_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(64, 3, 8, 8, generator=rng()).to(dtype)
    plan = Mixup(alpha=1.0).plan(x, generator=rng(1))
    want = torch.from_numpy(blend_by_hand(x, plan))
    assert torch.equal(plan.blend(x), want.to(torch.float32).to(dtype))


def test_boxes_copy_bits() -> None:
    """Where a mask is 0 or 1 the pixel is one of the two, bit for bit; also where the other one is not a number."""
    x = torch.randn(6, 3, 9, 7, generator=rng())
    x[0] = float("nan")
    plan = CutMix().plan(x, generator=rng(2))
    mask = plan.mask
    assert mask is not None
    want = torch.where(mask > 0, x, x[plan.partner])
    assert torch.equal(plan.blend(x).nan_to_num(7.0), want.nan_to_num(7.0))
    for policy in (FMix(), CutMix()):
        for dtype in (torch.float16, torch.float64, torch.uint8):
            y = (x.nan_to_num(0.5) * 50 + 100).to(dtype)
            plan = policy.plan(y, generator=rng(3))
            assert plan.mask is not None
            assert torch.equal(plan.blend(y), torch.where(plan.mask > 0, y, y[plan.partner]))


def test_other_sizes_and_ranks() -> None:
    images = torch.rand(N, 3, 16, 12, generator=rng())
    plan = CutMix().plan(images, generator=rng(4))
    mask = plan.mask
    assert mask is not None
    hidden = torch.rand(N, 20, 4, 3, generator=rng(1))
    share = mask.view(N, 1, 4, 4, 3, 4).mean((3, 5))  # each hidden cell sees 4 x 4 pixels
    want = share * hidden + (1 - share) * hidden[plan.partner]
    assert torch.allclose(plan.blend(hidden), want, atol=1e-6)
    features = torch.rand(N, 11, generator=rng(2))
    lam = plan.lam[:, None]
    assert torch.allclose(plan.blend(features), lam * features + (1 - lam) * features[plan.partner], atol=1e-6)
    with pytest.raises(
        ValueError, match=r"x has shape \(5, 8, 10\) but the plan's mask has 2 spatial axes; pass \(N, C, H, W\)"
    ):
        plan.blend(torch.rand(N, 8, 10))
    # tokens: lam alone needs no spatial axes
    assert Mixup().plan(images).blend(torch.rand(N, 8, 10)).shape == (N, 8, 10)


def test_second_view_gets_the_same_draw() -> None:
    first, second = torch.rand(N, 3, 8, 8, generator=rng()), torch.rand(N, 3, 8, 8, generator=rng(1))
    for policy in (Mixup(), CutMix(), FMix(), ResizeMix()):
        plan = policy.plan(first, generator=rng(2))
        again = policy.plan(second, generator=rng(2))
        assert torch.equal(plan.blend(second), again.blend(second))


@pytest.mark.parametrize(
    "policy",
    [
        Mixup(),
        Mixup(pairing="permutation"),
        CutMix(),
        SmoothMix(),
        GridMix(),
        FMix(),
        ResizeMix(),
        SaliencyMix(),
        AugMix(),
        RandomChoice([Mixup(), CutMix(), ResizeMix(), None], per="sample"),
        RandomChoice([AugMix(), SmoothMix(), ResizeMix()], per="sample", pairing="permutation"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [(9, 7), (170, 150)], ids=str)
def test_out_and_in_place(policy: torch.nn.Module, dtype: torch.dtype, size: tuple[int, int]) -> None:
    x = torch.rand(N, 3, *size, generator=rng())
    x = x if dtype.is_floating_point else (x * 255).to(dtype)
    before = x.clone()
    plan = policy.plan(x, generator=rng(3))
    want = plan.blend(x)
    out = torch.full_like(x, 7)
    assert plan.blend(x, out=out) is out
    assert torch.equal(out, want)
    assert torch.equal(x, before)
    assert plan.blend_(x) is x  # the very batch that the plan was drawn for
    assert torch.equal(x, want)


@pytest.mark.parametrize("size", [(6, 6), (170, 150)], ids=str)
@pytest.mark.parametrize("policy", [Mixup(), CutMix(), FMix(), ResizeMix()], ids=repr)
def test_nothing_is_written_into_a_leaf(policy: torch.nn.Module, size: tuple[int, int]) -> None:
    x = torch.rand(N, 3, *size, generator=rng())
    plan = policy.plan(x, generator=rng(3))
    want = plan.blend(x)
    leaf = torch.zeros_like(x).requires_grad_()
    for out in (leaf, leaf * 1.0):
        with pytest.raises(ValueError, match=r"MixPlan\.blend: out requires a gradient .*; pass out\.detach\(\)\.$"):
            plan.blend(x, out=out)
        assert not bool(out.any())
    with pytest.raises(ValueError, match=r"MixPlan\.blend_: x is a leaf that requires a gradient .*; use blend, or"):
        plan.blend_(leaf)
    with torch.no_grad():
        assert torch.equal(plan.blend(x, out=leaf), want)
        leaf.copy_(x)
        assert torch.equal(plan.blend_(leaf), want)


@pytest.mark.parametrize("policy", [Mixup(), Mixup(pairing="permutation"), CutMix(), FMix(), ResizeMix()], ids=repr)
def test_gradients_reach_both_rows(policy: torch.nn.Module) -> None:
    for side in (6, 130):
        x = torch.rand(4, 1, side, side, generator=rng(), dtype=torch.float64, requires_grad=True)
        plan = policy.plan(x, generator=rng(1))
        plan.blend(x).sum().backward()
        assert x.grad is not None
        got = x.grad.sum((1, 2, 3)) / side**2
        want = plan.lam.double().clone()
        want.index_add_(0, plan.partner, 1 - plan.lam.double())
        assert torch.allclose(got, want, atol=1e-6)
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=rng(), requires_grad=True)
    plan = policy.plan(x, generator=rng(1))
    assert torch.autograd.gradcheck(plan.blend, x, eps=1e-6, atol=1e-5)


def test_identity() -> None:
    x = torch.rand(4, 3, 8, 8, generator=rng())
    plan = MixPlan.identity(4)
    mixed = plan.blend(x)
    assert torch.equal(mixed, x)
    assert mixed.data_ptr() != x.data_ptr()
    labels, weights = plan.target(torch.tensor([5, 6, 7, 8]))
    assert labels[:, 0].tolist() == labels[:, 1].tolist() == [5, 6, 7, 8]
    assert weights.tolist() == [[1.0, 0.0]] * 4
    assert torch.equal(plan.blend(x, out=torch.zeros_like(x)), x)
    assert len(plan) == 4


def test_copies_pickle_and_repr() -> None:
    x = torch.rand(4, 3, 8, 8, generator=rng())
    for policy in (CutMix(), ResizeMix(), FMix()):
        plan = policy.plan(x, generator=rng(1))
        for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), plan.to("cpu")):
            assert torch.equal(twin.blend(x), plan.blend(x))
        assert repr(plan).startswith("MixPlan(4 rows, lam from 0.")
        assert "mask (4, 1, 8, 8)" in repr(plan)


def test_blend_refusals() -> None:
    plan = CutMix().plan(torch.rand(4, 3, 8, 8), generator=rng())
    with pytest.raises(
        ValueError, match=r"MixPlan\.blend: x has 3 entries but the plan has 4 rows; pass one entry per row\."
    ):
        plan.blend(torch.rand(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"MixPlan\.blend: x is on meta but the plan is on cpu; move both"):
        plan.blend(torch.rand(4, 3, 8, 8, device="meta"))
    with pytest.raises(TypeError, match=r"MixPlan\.blend: x is a list; pass a torch\.Tensor\."):
        plan.blend([1.0])
    with pytest.raises(TypeError, match=r"x has dtype torch\.bool"):
        plan.blend(torch.zeros(4, 3, 8, 8, dtype=torch.bool))
    changed = MixPlan(torch.arange(2), torch.ones(2), own=torch.rand(2, 3, 8, 8))
    told = r"x has shape \(2, 3, 4, 4\) and dtype .* but the plan's own images have \(2, 3, 8, 8\) and .*; draw a plan"
    with pytest.raises(ValueError, match=told):
        changed.blend(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"dtype torch\.float16 but the plan's own images have .* and torch\.float32"):
        changed.blend(torch.rand(2, 3, 8, 8).half())
    changed = MixPlan(torch.arange(2), torch.ones(2), other=torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"the plan's other images have \(2, 3, 8, 8\)"):
        changed.blend(torch.rand(2, 1, 8, 8))


def test_an_out_that_overlaps_in_another_storage_is_refused() -> None:
    numbers = np.random.default_rng(0).random((8, 3, 4, 4), dtype=np.float32)
    plan = MixPlan(torch.tensor([1, 2, 3, 0]), torch.rand(4))
    whole = torch.from_numpy(numbers)
    for first in (1, 3):
        x, out = torch.from_numpy(numbers[:4]), torch.from_numpy(numbers[first : first + 4])
        for a, b in ((x, out), (out, x), (x.mT, out.mT)):
            with pytest.raises(ValueError, match=r"out shares memory with x; pass another tensor, or call blend_"):
                plan.blend(a, out=b)
    x, out = torch.from_numpy(numbers[:4]), torch.from_numpy(numbers[4:])
    assert torch.equal(plan.blend(x, out=out), plan.blend(x))
    assert torch.equal(whole[4:], out)
    nowhere = MixPlan(plan.partner, plan.lam).to("meta")
    x = torch.empty(4, 3, 4, 4, device="meta")
    assert nowhere.blend(x, out=torch.empty_like(x)).is_meta  # which has no address


def test_what_a_plan_is_made_of() -> None:
    mask, box = random_mask((4, 6)), torch.zeros(N, 2, 2, dtype=torch.long)
    for wrong, text in (
        ({"partner": PARTNER.tolist()}, r"partner is a list; pass a torch\.Tensor\."),
        ({"partner": PARTNER.float()}, r"partner has dtype torch\.float32; pass integers\."),
        ({"partner": PARTNER > 2}, r"partner has dtype torch\.bool; pass integers\."),
        ({"lam": LAM.tolist()}, r"lam is a list; pass a torch\.Tensor\."),
        ({"lam": 0.5}, r"lam is a float; pass a torch\.Tensor\."),
        ({"lam": PARTNER}, r"lam has dtype torch\.int64; pass floating-point shares from 0 to 1\."),
        ({"mask": mask.numpy()}, r"mask is a ndarray; pass a torch\.Tensor\."),
        ({"mask": mask.byte()}, r"mask has dtype torch\.uint8; pass floating-point shares"),
        ({"box": box.tolist(), "size": (4, 6)}, r"box is a list; pass a torch\.Tensor\."),
        ({"box": box.float(), "size": (4, 6)}, r"box has dtype torch\.float32; pass integers\."),
        ({"box": box, "size": 4}, r"size is 4; pass a tuple of the spatial lengths\."),
        ({"own": [1]}, r"own is a list; pass a torch\.Tensor\."),
    ):
        with pytest.raises(TypeError, match=f"^MixPlan: {text}"):
            MixPlan(**{"partner": PARTNER, "lam": LAM, **wrong})
    whole = MixPlan(PARTNER.to(torch.uint8), mask=mask > 0.5, box=None)
    same = MixPlan(PARTNER, mask=(mask > 0.5).float())
    x = torch.rand(N, 3, 4, 6, generator=rng())
    assert whole.partner.dtype == torch.long
    assert torch.equal(whole.lam, same.lam)
    assert torch.equal(whole.blend(x), same.blend(x))
    assert torch.equal(whole.target(PARTNER).labels, same.target(PARTNER).labels)
    assert repr(MixPlan.identity(0)) == "MixPlan(0 rows)"
    assert repr(same.to("meta")) == "MixPlan(5 rows, mask (5, 1, 4, 6))"


def test_lam_is_taken_from_the_mask_or_the_boxes() -> None:
    mask = random_mask((4, 6))
    assert torch.equal(MixPlan(PARTNER, mask=mask).lam, mask.mean((1, 2, 3)))
    box = torch.tensor([[[0, 2], [1, 4]]]).expand(N, 2, 2)
    plan = MixPlan(PARTNER, box=box, size=(4, 6))
    assert torch.equal(plan.lam, torch.full((N,), 0.75))
    assert torch.equal(MixPlan(PARTNER, LAM, mask).lam, LAM)  # one that was given is kept


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    mask, box = random_mask((4, 6)), torch.zeros(N, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"MixPlan: lam is missing and there is no mask or box .*; pass one of them\."):
        MixPlan(PARTNER)
    with pytest.raises(ValueError, match=r"MixPlan: box is given without size; pass the spatial size"):
        MixPlan(PARTNER, LAM, box=box)
    with pytest.raises(ValueError, match=r"MixPlan: fit is given without size; pass the spatial size"):
        MixPlan(PARTNER, LAM, fit=box)
    with pytest.raises(ValueError, match=r"MixPlan: shift is 1\.5; pass an integer of at least 0\."):
        MixPlan(PARTNER, LAM, shift=1.5)
    with pytest.raises(ValueError, match=r"MixPlan\.identity: rows is -1; pass an integer of at least 0\."):
        MixPlan.identity(-1)
    with pytest.raises(ValueError, match=r"lam has shape \(4,\) and partner \(5,\); pass \(N,\) and \(N,\)\."):
        MixPlan(PARTNER, LAM[:4])
    with pytest.raises(ValueError, match=r"lam has shape \(5, 1\) and partner \(5, 1\)"):
        MixPlan(PARTNER[:, None], LAM[:, None])
    for wrong in (mask[:4], mask[:, 0], mask.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match=r"MixPlan: mask has shape .* for 5 rows; pass \(5, 1, \*spatial\)\."):
            MixPlan(PARTNER, LAM, wrong)
    for wrong in (box[:4], box[:, :1], box[..., :1]):
        with pytest.raises(ValueError, match=r"MixPlan: box has shape .* of size \(4, 6\); pass \(5, 2, 2\)\."):
            MixPlan(PARTNER, LAM, box=wrong, size=(4, 6))


class TestTarget:
    plan = MixPlan(PARTNER, LAM)

    @pytest.mark.parametrize(
        "y",
        [
            torch.tensor([4, 1, 0, 2, 2]),
            torch.tensor([4, 1, 0, 2, 2], dtype=torch.int32),
            torch.tensor([0.5, 31.0, -2.0, 0.0, 77.5]),
            torch.eye(5)[torch.tensor([4, 1, 0, 2, 2])],
            torch.tensor([[1, 0, 1]] * 2 + [[0, 0, 0]] * 3),
            torch.rand(N, 4, generator=rng(), dtype=torch.float64),
            torch.tensor([[True, False, True]] * N),
        ],
        ids=["ints", "int32", "floats", "one-hot", "multi-hot", "soft", "bools"],
    )
    def test_every_kind_is_own_then_partner(self, y: torch.Tensor) -> None:
        labels, weights = self.plan.target(y)
        assert labels.dtype == (y.dtype if y.is_floating_point() else torch.long)
        assert torch.equal(labels[:, 0], y)
        assert torch.equal(labels[:, 1], y[PARTNER])
        assert torch.equal(weights[:, 0], LAM)
        assert torch.equal(weights.sum(1), torch.ones(N))

    def test_regression_is_never_rounded(self) -> None:
        y = torch.tensor([0.7, 3.2, -1.5, 60.25, 8.0])
        want = LAM * y + (1 - LAM) * y[PARTNER]
        assert torch.allclose(self.plan.target(y).mean(), want)

    @pytest.mark.parametrize("policy", [CutMix(), FMix(), ResizeMix()], ids=repr)
    def test_masks_of_series_are_known_by_their_length(self, policy: torch.nn.Module) -> None:
        y = torch.randint(0, 3, (N, 9), generator=rng())
        plan = policy.plan(torch.rand(N, 2, 9), generator=rng(1))
        rows, masks = plan.target(y, kind="rows"), plan.target(y)
        assert rows.weights.shape == (N, 2)
        assert masks.weights.shape == (N, 2, 9)
        assert torch.equal(masks.weights[:, 0], plan.mask[:, 0])
        assert torch.equal(plan.target(y, kind="mask").weights, masks.weights)
        for other in (y[:, :8], y.double()):  # another length, or no class ids: rows
            assert plan.target(other).weights.shape == (N, 2)
        assert plan.target(y.bool().float()).weights.shape == (N, 2)

    @pytest.mark.parametrize("size", [(9,), (5, 6, 7)], ids=["series", "volumes"])
    @pytest.mark.parametrize(
        "policy",
        [Mixup(), CutMix(), CutMix(inside=True), SmoothMix(), GridMix(), FMix(), ResizeMix(), SaliencyMix()],
        ids=repr,
    )
    def test_masks_of_series_and_volumes_follow_the_pixels(
        self, policy: torch.nn.Module, size: tuple[int, ...]
    ) -> None:
        """A mask equal to the values has to come out where the mixed batch shows those values."""
        y = torch.arange(N).view(N, *[1] * len(size)).expand(N, *size).contiguous()
        x = y[:, None].double()
        for seed in range(3):
            plan = policy.plan(x, generator=rng(seed))
            target = plan.target(y, kind="mask")
            assert target.labels.shape == (N, 2, *size)
            assert torch.allclose(target.mean().expand(N, *size), plan.blend(x)[:, 0].float(), atol=1e-5)
            dense = target.dense(N)
            assert dense.shape == (N, N, *size)
            assert torch.allclose(dense.flatten(2).mean(2), plan.target(y.flatten(1)[:, 0]).dense(N), atol=1e-5)

    def test_without_a_place_two_axes_are_rows(self) -> None:
        y = torch.randint(0, 3, (N, 9), generator=rng())
        assert self.plan.target(y).weights.shape == (N, 2)
        assert torch.equal(self.plan.target(y, kind="mask").weights[:, 0], LAM[:, None])

    @pytest.mark.parametrize(
        "policy",
        [Mixup(), Scheduled(Mixup()), RandomChoice([Mixup(), CutMix()]), RandomChoice([Mixup()], per="sample")],
        ids=["mixup", "scheduled", "choice", "choice-sample"],
    )
    def test_policies_pass_the_kind_on(self, policy: torch.nn.Module) -> None:
        x, y = torch.rand(N, 2, 9, generator=rng()), torch.randint(0, 3, (N, 9), generator=rng())
        for _ in range(4):
            assert policy(x, y, kind="mask")[1].labels.shape == (N, 2, 9)
            assert policy(x, y, kind="mask")[1].weights.ndim == 3
            assert policy(x, y, kind="rows")[1].weights.shape == (N, 2)
        with pytest.raises(ValueError, match="kind is 'row'"):
            policy(x, y, kind="row")

    def test_masks_without_a_place_take_lam_everywhere(self) -> None:
        y = torch.randint(0, 3, (N, 4, 6), generator=rng())
        target = self.plan.target(y)
        dense = target.dense(3)
        one_hot = torch.nn.functional.one_hot(y, 3).movedim(-1, 1).float()
        lam = LAM.view(-1, 1, 1, 1)
        assert torch.allclose(dense, lam * one_hot + (1 - lam) * one_hot[PARTNER], atol=1e-6)

    def test_refusals(self) -> None:
        plan = CutMix().plan(torch.rand(N, 3, 8, 8), generator=rng())
        with pytest.raises(ValueError, match=r"y has 4 entries but the plan has 5 rows; pass one entry per row\."):
            plan.target(torch.arange(4))
        with pytest.raises(ValueError, match=r"y has no entries but the plan has 5 rows"):
            plan.target(torch.tensor(1))
        with pytest.raises(TypeError, match=r"MixPlan\.target: y is a list; pass a torch\.Tensor\."):
            plan.target([1, 2, 3, 4, 5])
        with pytest.raises(ValueError, match=r"y is on meta but the plan is on cpu"):
            plan.target(torch.arange(5, device="meta"))
        with pytest.raises(ValueError, match=r"y has shape \(5, 8, 8\) and dtype torch\.float32; pass \(N,\) or"):
            plan.target(torch.rand(5, 8, 8))
        with pytest.raises(TypeError, match=r"y is a mask of dtype torch\.float32; pass integer class ids per pixel\."):
            plan.target(torch.rand(5, 8, 8), kind="mask")
        with pytest.raises(
            ValueError, match=r"y has spatial size \(4, 4\) but the plan's mask has \(8, 8\); pass masks at"
        ):
            plan.target(torch.zeros(5, 4, 4, dtype=torch.long))
        with pytest.raises(ValueError, match=r"kind is 'masks'; pass one of .*did you mean \"mask\""):
            plan.target(torch.arange(5), kind="masks")
        for y in (torch.ones(5, dtype=torch.complex64), torch.ones(5, 3, dtype=torch.complex128)):
            with pytest.raises(TypeError, match=r"MixPlan\.target: y has dtype torch\.complex.*; pass integers or"):
                plan.target(y)
        changed = MixPlan(PARTNER, LAM, own=torch.rand(N, 3, 8, 8))
        with pytest.raises(ValueError, match="y is a dense mask but the plan changes pixels before it mixes"):
            changed.target(torch.zeros(N, 8, 8, dtype=torch.long))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_partner_any_lam(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    partner = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    lam = torch.tensor(data.draw(st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n)))
    side = data.draw(st.sampled_from([1, 3, 150]))  # 150: rows large enough for the row-by-row form
    x = torch.rand(n, 1, side, side, generator=rng(data.draw(st.integers(0, 99))))
    plan = MixPlan(partner, lam)
    np.testing.assert_allclose(plan.blend(x).double().numpy(), blend_by_hand(x, plan), atol=1e-6)
