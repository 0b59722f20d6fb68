"""Labels of a grid that cost least: batched minimisers of a sum over cells and over pairs of neighbours.

    E(z) = sum_p u_p(z_p) + sum_{p ~ q} w_pq (z_p - z_q)^2,   z_p in {0, 1} or {0, 1/2, 1},   w >= 0

Both are minimum cuts. Three labels are two layers of two, a = [z >= 1/2] and b = [z = 1] with a >= b, between which

    4 (z_p - z_q)^2 = |a_p - a_q| + |b_p - b_q| + 2 max(b_q - a_p, 0) + 2 max(b_p - a_q, 0).

Each term is convex and takes its values on {0, 1} linearly, so the problem with a and b anywhere in [0, 1] has the same
minimum. That one is solved by a primal-dual iteration, for all grids of a batch at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hardmix import _check
from hardmix._math import CPU, readable, wide


class Cut(NamedTuple):
    """Labels (N, H, W) long, counted from 0, and their energy (N,)."""

    labels: Tensor
    energy: Tensor


#: Which layers a pair of neighbours p, q is compared in, and the range of the dual variable in units of the weight:
#: max over y in [low, high] of y (layer_q - layer_p).
_TERMS = {
    2: ((slice(0, 1), slice(0, 1), -1.0, 1.0),),
    3: (
        (slice(0, 2), slice(0, 2), -0.25, 0.25),
        (slice(0, 1), slice(1, 2), 0.0, 0.5),
        (slice(1, 2), slice(0, 1), -0.5, 0.0),
    ),
}


def grid_energy(labels: Tensor, unary: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """E of some labels (N, H, W): (N,), in the dtype of `unary`. For the rest see `grid_cut`."""
    z = labels.to(unary.dtype) / (unary.shape[1] - 1)
    cells = unary.gather(1, labels[:, None])[:, 0]
    pairs = [down * z.diff(dim=1).square(), right * z.diff(dim=2).square()]
    return sum((pair.sum((1, 2)) for pair in pairs), cells.sum((1, 2)))


def grid_cut(unary: Tensor, down: Tensor, right: Tensor, *, steps: int = 100) -> Cut:
    """Labels near the minimum of E, and their energy.

    Args:
        unary: (N, L, H, W) cost of each label, L = 2 or 3 for z = 0, 1 or 0, 1/2, 1. Half types: in float32.
        down: (N, H - 1, W) weights w >= 0 between a cell and the one below it.
        right: (N, H, W - 1) weights between a cell and the one to its right.
        steps: of the primal-dual iteration. Its rounded result and the best labelling with one label are compared, and
            the cheaper one is returned: where neighbours weigh so much that all are alike, the iteration is slow.

    Returns:
        `Cut`; the energy is that of the labels, not of the relaxed problem. Equal costs: the smaller label. A grid with
        a NaN has labels without meaning and the energy NaN.
    Raises:
        TypeError, ValueError: shapes that don't fit, integers, or (looked at on the CPU only) a negative weight.
    """
    unary, down, right = _checked("grid_cut", unary, down, right)
    steps = _check.integer("grid_cut", "steps", steps, 1)
    with torch.no_grad():
        labels = _rounded(unary, down, right, steps)
        energy = grid_energy(labels, unary, down, right)
        flat, best = unary.sum((2, 3)).min(1)  # (N,) each
        labels = torch.where((flat <= energy)[:, None, None], best[:, None, None], labels)
        return Cut(labels, torch.where(flat <= energy, flat, energy))


def _rounded(unary: Tensor, down: Tensor, right: Tensor, steps: int) -> Tensor:
    """Chambolle and Pock's iteration on the layers (L - 1, H, W, N): samples last, so that every slice is contiguous.

    The product of the two step sizes is bounded by the norm of the differences; their ratio is free, and scaling the
    costs of a grid sets it. Cells and neighbours should move the layers about equally fast.
    """
    terms = _TERMS[unary.shape[1]]
    slope = unary.diff(dim=1)  # (N, L - 1, H, W)
    weight = torch.cat([down.flatten(1), right.flatten(1)], 1)
    size = torch.stack([slope.flatten(1).abs().mean(1), weight.sum(1) / max(weight.shape[1], 1)])
    size = (size + 1e-6 * size.sum(0)).clamp(min=torch.finfo(size.dtype).tiny ** 0.5)  # also where one of them is 0
    scale = 4.0 / size.log().mean(0).exp()  # (N,)
    slope = (slope.movedim(0, -1) * scale).contiguous()
    layers = (slope < 0).to(slope.dtype)
    ahead, pull = layers.clone(), torch.empty_like(layers)
    duals, pulls = [], []
    for dim, w in ((1, down), (2, right)):
        w = (w.movedim(0, -1) * scale).contiguous()
        length = w.shape[dim - 1]
        for first, second, least, most in terms:
            dual = w.new_zeros(first.stop - first.start, *w.shape)
            p, q = ahead[first].narrow(dim, 0, length), ahead[second].narrow(dim, 1, length)
            duals.append((dual, p, q, least * w, most * w))
            pulls.append((dual, pull[first].narrow(dim, 0, length), pull[second].narrow(dim, 1, length)))
    step = 1.0 / (8 * len(slope))
    for _ in range(steps):
        for dual, p, q, low, high in duals:
            torch.clamp(dual.add_(q).sub_(p), low, high, out=dual)
        pull.copy_(slope)
        for dual, p, q in pulls:
            q.add_(dual)
            p.sub_(dual)
        torch.neg(layers, out=ahead)
        layers.sub_(pull, alpha=step)
        if len(layers) == 2:  # the nearest a >= b
            middle = layers.mean(0)
            torch.maximum(layers[0], middle, out=layers[0])
            torch.minimum(layers[1], middle, out=layers[1])
        ahead.add_(layers.clamp_(0.0, 1.0), alpha=2.0)
    return (layers > 0.5).sum(0).movedim(-1, 0)


def grid_cut_exact(unary: Tensor, down: Tensor, right: Tensor) -> Cut:
    """The minimum of E by SciPy's maximum flow, one grid at a time: what `grid_cut` is checked against.

    Costs are rounded to a millionth of the largest one of a grid, since the flow is counted in integers. Arguments and
    errors are those of `grid_cut`; ImportError without SciPy.
    """
    unary, down, right = _checked("grid_cut_exact", unary, down, right)
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow
    except ImportError:
        raise ImportError("grid_cut_exact: SciPy is not installed; pip install scipy.") from None
    layers, height, width = unary.shape[1] - 1, *unary.shape[2:]
    cells = height * width
    # on the source's side <=> the layer is 1 there
    node = torch.arange(layers * cells, device=CPU).view(layers, height, width)
    source = torch.full((layers * cells,), layers * cells, device=CPU)
    slope = unary.double().cpu().diff(dim=1).flatten(1)  # (N, layers * cells)
    tails, heads, costs = (
        [source, node.flatten()],
        [node.flatten(), source + 1],
        [(-slope).clamp(min=0), slope.clamp(min=0)],
    )
    for dim, weight in ((1, down), (2, right)):
        length = node.shape[dim] - 1
        for first, second, low, high in _TERMS[layers + 1]:
            p, q = node[first].narrow(dim, 0, length).flatten(), node[second].narrow(dim, 1, length).flatten()
            cost = weight.double().cpu().flatten(1).repeat(1, first.stop - first.start)
            tails += [q, p]  # q = 1 and p = 0 costs `high` w, the reverse `-low` w
            heads += [p, q]
            costs += [high * cost, -low * cost]
    cost = torch.cat(costs, 1)
    unit = cost.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) / 1e6
    capacity = (cost / unit).round()
    if layers == 2:  # b = 1 and a = 0 is no label
        tails.append(node[1].flatten())
        heads.append(node[0].flatten())
        capacity = torch.cat([capacity, capacity.new_full((len(capacity), cells), 2.0**30)], 1)
    # Before SciPy 1.13 a flow is found in graphs of 32-bit indices alone.
    tail, head = torch.cat(tails).int().numpy(), torch.cat(heads).int().numpy()
    labels = torch.zeros(len(unary), cells, dtype=torch.long, device=CPU)
    for row, arcs in zip(labels, capacity.to(torch.int32).numpy(), strict=True):
        graph = coo_array((arcs, (tail, head)), shape=(layers * cells + 2,) * 2).tocsr()
        rest = graph - maximum_flow(graph, layers * cells, layers * cells + 1).flow
        rest.eliminate_zeros()
        reached = torch.from_numpy(breadth_first_order(rest, layers * cells, return_predecessors=False)).long()
        reached = reached[reached < layers * cells]
        row.index_add_(0, reached % cells, torch.ones_like(reached))
    labels = labels.view(len(unary), height, width).to(unary.device)
    return Cut(labels, grid_energy(labels, unary, down, right))


def _checked(who: str, unary: Tensor, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    unary = _check.batch(who, "unary", unary, 4, 4)
    if unary.shape[1] not in _TERMS:
        raise ValueError(f"{who}: unary has shape {tuple(unary.shape)}; pass (N, 2, H, W) or (N, 3, H, W) costs.")
    rows, _, height, width = unary.shape
    given = {"unary": unary}
    for name, weight, shape in (
        ("down", down, (rows, height - 1, width)),
        ("right", right, (rows, height, width - 1)),
    ):
        given[name] = _check.tensor(who, name, weight)
        if weight.shape != shape:
            raise ValueError(f"{who}: {name} has shape {tuple(weight.shape)}; pass {shape} weights for these costs.")
        _check.same_device(who, name, weight, "unary", unary.device)
        if readable(weight) and bool((weight < 0).any()):
            raise ValueError(f"{who}: {name} holds a negative weight; pass weights of at least 0.")
    for name, value in given.items():
        if not value.is_floating_point():
            raise TypeError(f"{who}: {name} has dtype {value.dtype}; pass floating-point values.")
    dtype = wide(torch.promote_types(unary.dtype, torch.promote_types(down.dtype, right.dtype)))
    return unary.to(dtype), down.to(dtype), right.to(dtype)
