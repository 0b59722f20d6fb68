"""Every way of blending against a slow float64 loop, over shapes, dtypes, pairings and memory layouts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from hardmix.kernels import blend
from hardmix.mixing import MixPlan

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32]
#: Rows of more than 64 KiB take other paths than small ones; these are larger than that even in uint8.
SMALL, LARGE = (3, 5, 7), (3, 152, 150)
PAIRINGS = ["shift", "permutation", "matching", "repeats", "self"]
LAYOUTS = ["contiguous", "channels_last", "sliced"]


def make_batch(shape, dtype, seed=0, layout="contiguous"):
    g = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        x = torch.randn(shape, generator=g).to(dtype)
    else:
        x = torch.randint(0, 256, shape, generator=g).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second row and every second column of a larger tensor
        wide = torch.zeros((2 * shape[0], *shape[1:-1], 2 * shape[-1]), dtype=dtype)
        wide[::2, ..., ::2] = x
        return wide[::2, ..., ::2]
    return x


def make_partner(n, pairing, seed=0):
    """(partner, shift)"""
    g = torch.Generator().manual_seed(seed)
    if pairing == "shift":
        k = int(torch.randint(0, n, (), generator=g))
        return (torch.arange(n) + k) % n, k
    if pairing == "permutation":
        return torch.randperm(n, generator=g), None
    if pairing == "matching":
        return torch.arange(n - 1, -1, -1), None
    if pairing == "repeats":
        return torch.randint(0, n, (n,), generator=g), None
    return torch.arange(n), 0


def slow_blend(x, partner, weight):
    """One pixel row at a time in float64, rounded to the dtype at the end."""
    y = torch.empty(x.shape, dtype=torch.float64)
    w = weight.double().expand(x.shape)
    for i, j in enumerate(partner.tolist()):
        y[i] = w[i] * x[i].double() + (1 - w[i]) * x[j].double()
    return y


def slow_paste(x, partner, box):
    y = x.clone()
    for i, j in enumerate(partner.tolist()):
        inside = tuple(slice(a, b) for a, b in box[i].tolist())
        y[i][(slice(None), *inside)] = x[j][(slice(None), *inside)]
    return y


def make_box(n, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    ends = [torch.randint(0, length + 1, (n, 2), generator=g).sort(1).values for length in size]
    return torch.stack(ends, 1)


def assert_blended(got, want, dtype):
    """Within the rounding that the docstrings promise: float32 arithmetic, rounded once to the dtype."""
    assert got.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    elif dtype.is_floating_point:
        # Half a unit in the last place of the dtype, and the float32 arithmetic before it.
        bound = want.abs() * torch.finfo(dtype).eps * 0.51 + 2e-6 * (1 + want.abs())
        assert ((got.double() - want).abs() <= bound).all()
    else:
        assert ((got.double() - want).abs() <= 0.5 + 1e-4).all()


def assert_kept(x, before, got):
    assert torch.equal(x, before)
    assert got.shape == x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        assert got.is_contiguous(memory_format=torch.channels_last)


def make_weight(n, shape, masked, seed=0):
    g = torch.Generator().manual_seed(seed + 100)
    weight = torch.rand((n, 1, *shape[1:]) if masked else (n, *[1] * len(shape)), generator=g)
    weight.view(-1)[:2] = torch.tensor([0.0, 1.0])[: weight.numel()]
    return weight


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blend_partner_in_every_form(dtype, size, pairing, layout, masked):
    n = 5
    x = make_batch((n, *size), dtype, layout=layout)
    before = x.clone()
    partner, shift = make_partner(n, pairing)
    weight = make_weight(n, size, masked)
    want = slow_blend(x, partner, weight)

    fresh = blend.blend_partner(x, partner, weight, shift=shift)
    assert_blended(fresh, want, dtype)
    assert_kept(x, before, fresh)
    out = torch.full_like(x, 7)
    assert blend.blend_partner(x, partner, weight, shift=shift, out=out) is out
    assert torch.equal(out, fresh)
    assert torch.equal(x, before)
    y = x.clone()
    assert blend.blend_partner(y, partner, weight, shift=shift, out=y) is y
    assert torch.equal(y, fresh)
    assert blend.blend_partner(x, partner, weight, shift=shift, out=x) is x
    assert torch.equal(x, fresh)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    channels=st.sampled_from([1, 3, 70]),
    dtype=st.sampled_from(DTYPES),
    pairing=st.sampled_from(PAIRINGS),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blend_partner_any_shape(n, spatial, channels, dtype, pairing, masked, seed):
    shape = (channels, *spatial)
    x = make_batch((n, *shape), dtype, seed)
    before = x.clone()
    partner, shift = make_partner(n, pairing, seed)
    weight = make_weight(n, shape, masked and bool(spatial), seed)
    fresh = blend.blend_partner(x, partner, weight, shift=shift)
    assert_blended(fresh, slow_blend(x, partner, weight), dtype)
    assert_kept(x, before, fresh)
    blend.blend_partner(x, partner, weight, shift=shift, out=x)
    assert torch.equal(x, fresh)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_paths_agree_bit_for_bit_with_the_plain_formula(dtype, pairing, monkeypatch):
    partner, shift = make_partner(6, pairing, 3)
    for size in (SMALL, LARGE):
        x, weight = make_batch((6, *size), dtype), make_weight(6, size, masked=False)
        fast = blend.blend_partner(x, partner, weight, shift=shift)
        with monkeypatch.context() as patch:
            patch.setattr(blend, "is_traced", lambda *tensors: True)
            plain = blend.blend_partner(x, partner, weight, shift=shift)
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blend_rows(dtype, size, layout):
    own, other = (make_batch((4, *size), dtype, seed, layout) for seed in (0, 1))
    weight = make_weight(4, size, masked=True)
    want = slow_blend(torch.cat([own, other]), torch.arange(8).roll(4), torch.cat([weight, weight]))[:4]
    fresh = blend.blend_rows(own, other, weight)
    assert_blended(fresh, want, dtype)
    assert_kept(own, own.clone(), fresh)
    assert torch.equal(blend.blend_rows(own, other, weight, out=torch.empty_like(own)), fresh)
    assert torch.equal(blend.blend_rows(own, other, weight, out=own), fresh)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])  # 0: a row is larger than a piece
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_narrow_types_are_blended_in_pieces(dtype, rows, monkeypatch):
    x, weight = make_batch((5, *SMALL), dtype), make_weight(5, SMALL, masked=True)
    partner = torch.tensor([2, 3, 4, 0, 1])
    monkeypatch.setattr(blend, "_PIECE", rows * math.prod(SMALL))
    mixed = blend.blend_partner(x, partner, weight)
    assert_blended(mixed, slow_blend(x, partner, weight), dtype)
    assert torch.equal(blend.blend_rows(x, x[partner], weight, out=x), mixed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("size", [(6, 9), LARGE[1:]])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_paste_boxes_in_every_form(dtype, size, pairing, layout, monkeypatch):
    if dtype == torch.float8_e4m3fn and pairing == "repeats" and torch.__version__ < "2.7":
        pytest.skip("needs torch 2.7 to select numbers of 8 bits")
    n = 5
    x = make_batch((n, 3, *size), torch.float32, layout=layout).to(dtype)
    bits = x.contiguous().view(torch.uint8).clone()
    partner, _ = make_partner(n, pairing)
    box = make_box(n, size)
    box[0] = torch.tensor([[0, size[0]], [0, size[1]]])  # everything
    box[1] = torch.tensor([[3, 3], [0, size[1]]])  # nothing
    want = slow_paste(x, partner, box).contiguous().view(torch.uint8)

    def is_wanted(got):
        return torch.equal(got.contiguous().view(torch.uint8), want)

    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert is_wanted(blend.paste_boxes(x, partner, box))
    out = torch.empty_like(x)
    assert blend.paste_boxes(x, partner, box, out=out) is out
    assert is_wanted(out)
    assert torch.equal(x.contiguous().view(torch.uint8), bits)
    assert blend.paste_boxes(x, partner, box, out=x) is x
    assert is_wanted(x)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 9),
    size=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    pairing=st.sampled_from(PAIRINGS),
    seed=st.integers(0, 99),
)
def test_paste_boxes_any_shape(n, size, dtype, pairing, seed):
    x = make_batch((n, 2, *size), dtype, seed)
    partner, _ = make_partner(n, pairing, seed)
    box = make_box(n, size, seed)
    want = slow_paste(x, partner, box)
    assert torch.equal(blend.paste_boxes(x, partner, box), want)
    assert torch.equal(blend._paste_mask(x, partner, box, None), want)
    assert torch.equal(blend.paste_boxes(x, partner, box, out=x), want)


def test_nothing_leaks_from_under_a_box():
    x = torch.zeros(2, 1, 4, 4)
    x[0, 0, 1, 1] = math.nan
    x[0, 0, 2, 2] = math.inf
    box = torch.tensor([[[0, 4], [0, 4]], [[0, 0], [0, 0]]])
    for got in (blend.paste_boxes(x, torch.tensor([1, 0]), box), blend._paste_mask(x, torch.tensor([1, 0]), box, None)):
        assert torch.equal(got, torch.zeros(2, 1, 4, 4))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 5), size=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_box_mask(n, size, seed):
    box = make_box(n, size, seed)
    mask = blend.box_mask(box, tuple(size))
    assert mask.shape == (n, 1, *size)
    assert mask.dtype == torch.float32
    for i in range(n):
        want = torch.ones(size)
        want[tuple(slice(a, b) for a, b in box[i].tolist())] = 0
        assert torch.equal(mask[i, 0], want)


@given(st.permutations(list(range(8))))
def test_cycles_of_a_permutation(partner):
    cycles = blend.cycles_of(partner)
    assert sorted(i for cycle in cycles for i in cycle) == list(range(8))
    for cycle in cycles:
        assert [partner[i] for i in cycle] == [*cycle[1:], cycle[0]]


@pytest.mark.parametrize("partner", [[0, 0], [1, 1], [1, 2, 1], [2, 2, 0, 0]])
def test_rows_that_repeat_have_no_cycles(partner):
    assert blend.cycles_of(partner) is None


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_gradients_reach_both_samples(size):
    x = make_batch((4, *size), torch.float64).requires_grad_()
    partner, shift = torch.tensor([1, 2, 3, 0]), 1
    weight = make_weight(4, size, masked=False).double()
    blend.blend_partner(x, partner, weight, shift=shift).sum().backward()
    want = weight + (1 - weight)[[3, 0, 1, 2]]  # row i is its own sample, and the partner of row i - 1
    torch.testing.assert_close(x.grad, want.expand_as(x))

    x.grad = None
    box = make_box(4, size[1:])
    blend.paste_boxes(x, partner, box).sum().backward()
    mask = blend.box_mask(box, size[1:]).double()
    torch.testing.assert_close(x.grad, (mask + (1 - mask)[[3, 0, 1, 2]]).expand_as(x))


@pytest.mark.parametrize("kind", ["lam", "box"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_memory_format_is_kept_with_and_without_gradients(size, kind):
    x = make_batch((4, *size), torch.float32, layout="channels_last")
    plan = make_plan(kind, size=size[1:])
    for batch in (x, x.requires_grad_()):
        assert plan.blend(batch).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_gradients_through_blending_in_place(size):
    leaf = make_batch((4, *size), torch.float32).requires_grad_()
    partner = torch.tensor([1, 2, 3, 0])
    weight = make_weight(4, size, masked=False)
    x = leaf * 1.0
    blend.blend_partner(x, partner, weight, shift=1, out=x)
    x.sum().backward()
    torch.testing.assert_close(leaf.grad, (weight + (1 - weight)[[3, 0, 1, 2]]).expand_as(leaf))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_in_place_writes_are_known_to_autograd(size):
    """A tensor that backward still needs must not be changed in silence, whoever wrote to it."""
    partner, box = torch.tensor([1, 0]), make_box(2, size[1:])
    for write in (
        lambda x: blend.paste_boxes(x, partner, box, out=x),
        lambda x: blend.blend_partner(x, partner, torch.rand(2, 1, 1, 1), out=x),
    ):
        x, scale = make_batch((2, *size), torch.float32), torch.ones((), requires_grad=True)
        loss = (x * scale).sum()
        write(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_in_place_under_inference_mode():
    with torch.inference_mode():
        x = make_batch((4, 3, 6, 6), torch.float32)
        partner, box = torch.tensor([1, 2, 3, 0]), make_box(4, (6, 6))
        want = slow_paste(x, partner, box)
        assert torch.equal(blend.paste_boxes(x, partner, box, out=x), want)


@pytest.mark.slow
def test_compiled_region_is_one_graph():
    x, weight = make_batch((4, 3, 8, 8), torch.float32), torch.rand(4, 1, 1, 1)
    partner, box = torch.tensor([1, 2, 3, 0]), make_box(4, (8, 8))

    def both(x, partner, weight, box):
        return blend.blend_partner(x, partner, weight, shift=1), blend.paste_boxes(x, partner, box)

    mixed, pasted = torch.compile(both, fullgraph=True, backend="aot_eager")(x, partner, weight, box)
    assert torch.equal(mixed, blend.blend_partner(x, partner, weight))
    assert torch.equal(pasted, blend.paste_boxes(x, partner, box))


def make_plan(kind, n=4, size=(6, 6)):
    partner = (torch.arange(n) + 1) % n
    if kind == "lam":
        return MixPlan(partner, torch.rand(n), shift=1)
    if kind == "mask":
        mask = torch.rand(n, 1, *size)
        return MixPlan(partner, mask.mean((1, 2, 3)), mask, shift=1)
    return MixPlan(partner, torch.rand(n), box=make_box(n, size), size=size, shift=1)


@pytest.mark.parametrize("kind", ["lam", "mask", "box"])
def test_plan_blends_alike_in_all_forms(kind):
    plan, x = make_plan(kind), make_batch((4, 3, 6, 6), torch.float32)
    fresh = plan.blend(x)
    assert torch.equal(plan.blend(x, out=torch.empty_like(x)), fresh)
    assert plan.blend_(x) is x
    assert torch.equal(x, fresh)


@pytest.mark.parametrize("kind", ["lam", "mask", "box"])
def test_out_may_share_a_storage_but_not_memory(kind):
    plan = make_plan(kind)
    ring = torch.rand(8, 3, 6, 6)
    want = plan.blend(ring[:4].clone())
    assert torch.equal(plan.blend(ring[:4], out=ring[4:]), want)
    for x, out in ((ring[:4], ring[:4]), (ring[:4], ring[1:5]), (ring[2:6], ring[:4])):
        with pytest.raises(ValueError, match=r"out shares memory with x; pass another tensor, or call blend_"):
            plan.blend(x, out=out)


def test_out_must_be_like_x():
    plan, x = make_plan("lam"), torch.rand(4, 3, 6, 6)
    for out in (torch.empty(4, 3, 6, 5), torch.empty(4, 3, 6, 6, dtype=torch.float64), x.to("meta")):
        with pytest.raises(ValueError, match=r"MixPlan.blend: out has shape .* pass torch.empty_like\(x\)\."):
            plan.blend(x, out=out)
    with pytest.raises(TypeError, match=r"MixPlan.blend: out is a list; pass a torch.Tensor\."):
        plan.blend(x, out=[x])


def test_repeated_memory_is_not_written_to():
    plan = make_plan("box")
    with pytest.raises(ValueError, match=r"MixPlan.blend_: x has strides .* pass x.contiguous\(\)\."):
        plan.blend_(torch.rand(1, 3, 6, 6).expand(4, 3, 6, 6))
    with pytest.raises(ValueError, match=r"MixPlan.blend: out has strides .* repeats its memory"):
        plan.blend(torch.rand(4, 3, 6, 6), out=torch.rand(4, 1, 6, 6).expand(4, 3, 6, 6))


@pytest.mark.parametrize("size", [(9, 7), (152, 150)], ids=str)
@pytest.mark.parametrize("kind", ["lam", "mask", "box"])
@pytest.mark.filterwarnings("ignore:.torch.jit")  # from inside torch, of a kind that changes
def test_function_transforms_see_a_linear_map(size, kind):
    """The tangent of a blend is the blend of the tangent, and a batch of batches is blended batch by batch."""
    plan = make_plan(kind, 4, size)
    x, v = (make_batch((4, 3, *size), torch.float64, seed) for seed in (0, 1))
    value, tangent = torch.func.jvp(plan.blend, (x,), (v,))
    assert torch.equal(value, plan.blend(x))
    assert torch.allclose(tangent, plan.blend(v), atol=1e-6)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(plan.blend(forward_ad.make_dual(x, v)))
    assert dual.tangent is not None
    assert torch.allclose(dual.tangent, plan.blend(v), atol=1e-6)
    both = torch.func.vmap(plan.blend)(torch.stack([x, v]))
    assert torch.allclose(both, torch.stack([plan.blend(x), plan.blend(v)]), atol=1e-6)
    (grad,) = torch.func.grad(lambda x: (plan.blend(x) * v).sum(), argnums=(0,))(x)
    assert torch.allclose((grad * v).sum(), (plan.blend(v) * v).sum(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_that_float32_can_not_hold(dtype):
    ends = torch.iinfo(dtype)
    x = torch.tensor([[ends.max, ends.min, 16777217 % ends.max, -3]] * 2, dtype=dtype)
    exact = x.double().clamp(max=2.0**63 - 1024).to(dtype)  # int64 has more digits than float64
    for weight in (0.0, 0.5, 1.0):
        mixed = blend.blend_partner(x, torch.tensor([1, 0]), torch.full((2, 1), weight))
        assert mixed.dtype == dtype
        assert torch.equal(mixed, exact)
