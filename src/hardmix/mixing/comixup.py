"""Co-Mixup: all outputs of a batch put together at once from the salient blocks of all inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU
from hardmix.kernels.transport import block_of, show_blocks
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import Pairing, cpu_generator, draw_gamma, move, uniform
from hardmix.mixing.gradients import input_saliency
from hardmix.mixing.optimal import block_shares, check_blocks
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget

#: The cost of what is not allowed. No other one comes near it.
_NEVER = 1e6
#: The most salient place of an input is looked for on this many cells a side.
_SIDE = 32
#: Temperatures of the mean field, in units of what the costs of a block vary by.
_TEMPERATURES = (0.5, 0.2, 0.05, 0.01)
#: Rounds that take every update: the start is random, so there is nothing to lose.
_SETTLING = 2


class JointPlan(NamedTuple):
    """What the outputs of a batch show.

    Attributes:
        first, second: (N, h, w) long, the rows that each block of each output is taken from.
        share: (N, h, w) float32 share of the first, 1 or 1/2.
        objective: (rounds + 1, parts) what the outputs of each part of the batch cost, before and after each round.
    """

    first: Tensor
    second: Tensor
    share: Tensor
    objective: Tensor


class CoMixup(AskingPolicy):
    """Co-Mixup: as many mixed images as there are inputs, each put together from the salient blocks of several.

        x~_j = sum_i z_ji x_i,   z_ji(p) in {0, 1/2, 1} on a B x B grid of n blocks,  sum_i z_ji(p) = 1
        z minimises  sum_jip z_ji(p) (-s_i(p) - eta / n log w_i) + beta / (2 n) sum_j sum_{p ~ q} |z_j(p) - z_j(q)|^2
                     + gamma / n sum_ji o_ji max(v_ji - tau n, 0)
        o_ji = sum_p z_ji(p),  v_j = A sum_{j' != j} o_j',  A = (1 - omega) I + omega C,  w ~ Dirichlet(alpha)
        y~_j = sum_i (share of x_i in the pixels) y_i

    s_i is the saliency of PuzzleMix, whose blocks sum to one. The last term keeps outputs from each other: a block may
    only come from an input that the other outputs show less than tau of. C is the distance of the most salient places
    of two inputs, scaled so that it sums to the number of inputs: what is far apart should meet in one output.
    Outputs are improved one after the other: the others fixed, the penalty is taken as linear, the labelling of the
    grid is found by annealed mean field, and it is kept where the whole objective falls. Halves are mixtures of the two
    or three inputs that an output shows most.

    Args:
        model: what is trained, asked for the input's gradient: one forward and backward more for each batch. It gets
            `x` as the policy does and is no part of the policy.
        alpha: of the Dirichlet prior.
        blocks: numbers B of blocks a side; one is drawn for each batch. On a side of fewer pixels each is a block.
        beta: price of a border.
        gamma: price of showing what others show.
        eta: of the prior.
        tau: share of an input that is free to all.
        omega: weight of the distances.
        part: how many inputs, and outputs, are dealt with together; a batch is cut into parts of equal size, or one
            less, in the order of its rows.
        rounds: over the outputs of a part, after two that settle the random start.
        starts: random starts of each part, of which the cheapest end is taken. A descent over one output after the
            other ends where no single one can be improved, which is often not the best there is.

    Shapes: (N, C, H, W) floats, square or not; class ids (N,), floats (N,) or rows (N, classes). `forward` returns
    MixedTarget(labels (N, K), weights (N, K)): K is the largest number of inputs that an output shows, at least 2; the
    largest share comes first, and what an output does not need is its first label with weight 0. Output j is none of
    its input's own: `plan` is refused, and so are dense masks. N = 1 comes back as it is. A saliency map that is flat,
    zero everywhere or not finite counts as uniform. No gradient flows through the plan. The number K is read on the
    host. All draws are the generator's.
    Cost: per round one mean field for each of the at most `part` outputs of a part, for all parts and starts at once.

    Reference: Kim et al. 2021 (arXiv:2102.03065). Objective and settings are those of the authors' code; the formulas
    of the paper were not at hand to be compared. What differs from the code: its penalty is by default v where
    v > tau n ("hard"), with which no objective falls from round to round, so ours is its "soft" one. It solves a graph
    cut for each output by swap moves, takes every update, and makes halves cheaper by 5e-4; here halves have no such
    discount and their true distances from each other. Outputs that end with equal sets of inputs are not told apart by
    a further cost. The loss of the clean images, which their best runs add, is not part of the policy; without it they
    advise a smaller alpha.
    """

    min_ndim = max_ndim = 4

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 2.0,
        blocks: Sequence[int] = (4,),
        beta: float = 0.32,
        gamma: float = 1.0,
        eta: float = 0.05,
        tau: float = 0.83,
        omega: float = 0.001,
        part: int = 20,
        rounds: int = 2,
        starts: int = 3,
    ) -> None:
        super().__init__(model, alpha=alpha)
        who = "CoMixup"
        self.blocks = check_blocks(who, blocks)
        self.beta = _check.non_negative(who, "beta", beta)
        self.gamma = _check.non_negative(who, "gamma", gamma)
        self.eta = _check.non_negative(who, "eta", eta)
        self.tau = _check.non_negative(who, "tau", tau)
        self.omega = _check.between(who, "omega", omega, 0.0, 1.0)
        self.part = _check.integer(who, "part", part, 1)
        self.rounds = _check.integer(who, "rounds", rounds, 0)
        self.starts = _check.integer(who, "starts", starts, 1)

    def extra_repr(self) -> str:
        prices = f"beta={self.beta:g}, gamma={self.gamma:g}, eta={self.eta:g}, tau={self.tau:g}, omega={self.omega:g}"
        search = f"part={self.part}, rounds={self.rounds}, starts={self.starts}"
        return f"alpha={self.alpha:g}, blocks={list(self.blocks)}, {prices}, {search}"

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> NoReturn:
        """There is none: an output shows more inputs than a pair."""
        raise NotImplementedError(
            "CoMixup: an output mixes several rows, which a plan of partners can't hold; call the policy, "
            "or joint_plan(x, y)."
        )

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        self.plan(x, y, generator=generator)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        who = "CoMixup"
        y = _check.tensor(who, "y", y)
        _check.choice(who, "kind", kind, ("auto", "rows", "mask"))
        if kind == "mask" or y.ndim > 2:
            raise ValueError(
                f"{who}: y has shape {tuple(y.shape)} and kind {kind!r}, but dense masks can't follow several rows; "
                "pass (N,) or (N, classes) labels."
            )
        _check.finite(who, "x", _check.batch(who, "x", x, self.min_ndim, self.max_ndim))
        joint = self.joint_plan(x, y, generator=generator)
        mixed = show_blocks(x, joint.first, joint.second, joint.share)
        rows, weights = shown_shares(joint, (x.shape[2], x.shape[3]))
        y = y if y.is_floating_point() else y.long()
        return mixed, MixedTarget(y.index_select(0, rows.flatten()).unflatten(0, rows.shape), weights)

    def joint_plan(self, x: Tensor, y: Tensor, *, generator: Generator | None = None) -> JointPlan:
        """Which rows each block of each output shows, and the objective."""
        who = "CoMixup"
        x = _check.batch(who, "x", x, self.min_ndim, self.max_ndim)
        y = _check.tensor(who, "y", y)
        _check.same_length(who, "y", y, "x", x.shape[0])
        _check.same_device(who, "y", y, "x", x.device)
        cpu_generator(who, generator)
        with torch.autocast(x.device.type, enabled=False):
            return self._joint(x, y, generator)

    def _joint(self, x: Tensor, y: Tensor, generator: Generator | None) -> JointPlan:
        blocks = self.blocks[int(torch.randint(len(self.blocks), (1,), device=CPU, generator=generator))]
        grid = (min(blocks, x.shape[2]), min(blocks, x.shape[3]))
        rows, valid = parts_of(x.shape[0], self.part)  # (P, m)
        start = uniform(0.0, 1.0, (self.starts, *rows.shape, grid[0] * grid[1]), generator)
        log_weight = _log_dirichlet(self.alpha, valid, generator)
        saliency = input_saliency(self._model(), x, y, who="CoMixup")
        with torch.no_grad():
            chosen = (
                start.double() * valid.sum(1).view(-1, 1, 1)
            ).long()  # (S, P, m, n); no float below 1 is rounded to it
            rows, valid, chosen = (move(value, x.device) for value in (rows, valid, chosen))
            share = block_shares(saliency, grid).flatten(1)[rows]  # (P, m, n)
            prior = move(log_weight, x.device).to(share.dtype)[..., None]
            cost = (-share - self.eta / share.shape[2] * prior).masked_fill(~valid[..., None], _NEVER)
            far = _distances(saliency)[rows[:, :, None], rows[:, None]] * (valid[:, :, None] & valid[:, None])
            problem = JointProblem(
                cost, similarity(far, valid, self.omega), valid, grid, beta=self.beta, gamma=self.gamma, tau=self.tau
            )
            z, objective = problem.solve_from(chosen, self.rounds)
            value, shown = z.topk(min(2, z.shape[2]), dim=2)  # (P, m, 1 or 2, n)
            first, second = shown[:, :, 0], shown[:, :, -1].where(value[:, :, 0] < 1, shown[:, :, 0])
            first, second = (rows.gather(1, at.flatten(1)).view_as(at)[valid] for at in (first, second))
            shares = value[:, :, 0][valid].to(torch.float32)
            return JointPlan(first.unflatten(1, grid), second.unflatten(1, grid), shares.unflatten(1, grid), objective)


class JointProblem:
    """The objective of Co-Mixup for parts of a batch, and its descent.

    Args:
        cost: (P, m, n) what it costs to show each input in each of the n blocks, `_NEVER` where there is no input.
        similarity: (P, m, m) A, symmetric.
        valid: (P, m) which inputs, and outputs, there are.
        grid: (h, w) with h w = n.
        beta, gamma, tau: see `CoMixup`.
    """

    def __init__(
        self,
        cost: Tensor,
        similarity: Tensor,
        valid: Tensor,
        grid: tuple[int, int],
        *,
        beta: float,
        gamma: float,
        tau: float,
    ) -> None:
        self.cost, self.similarity, self.valid = cost, similarity, valid
        n = cost.shape[2]
        self.border, self.gamma, self.free = beta / n, gamma / n, tau * n
        at = torch.arange(n, device=cost.device)
        y, x = at // grid[1], at % grid[1]
        self.near = ((y - y[:, None]).abs() + (x - x[:, None]).abs() == 1).to(cost.dtype)  # (n, n)
        known = cost.masked_fill(~valid[..., None], 0.0).sum((1, 2), keepdim=True) / (valid.sum(1) * n)[:, None, None]
        spread = (cost - known).masked_fill(~valid[..., None], 0.0).abs().mean((1, 2), keepdim=True)
        self.unit = (self.border + spread).clamp(min=1e-6 / n)  # (P, 1, 1)

    def objective(self, z: Tensor) -> Tensor:
        """(P,) of labellings z (P, J, m, n) whose shares of the m inputs sum to one in each block, or are all 0 for an
        output that there is not."""
        return self._own(z).sum(1) + self._penalty(z.sum(3))

    def _own(self, z: Tensor) -> Tensor:
        """(P, J) what each output costs by itself."""
        cost = (z * self.cost[:, None]).sum((2, 3))
        squares = (z.square().sum(2) * self.near.sum(0)).sum(2) - (z * (z @ self.near)).sum((2, 3))
        return cost + self.border / 2 * squares

    def _penalty(self, shown: Tensor) -> Tensor:
        """(P,) what outputs that show (P, J, m) blocks of each input cost together."""
        others = (shown.sum(1, keepdim=True) - shown) @ self.similarity
        return self.gamma * (shown * (others - self.free).clamp(min=0.0)).sum((1, 2))

    def solve_from(self, starts: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        """`solve` from several starts (S, P, m, n) side by side, and of each part the cheapest end."""
        count = len(starts)
        many = copy.copy(self)
        many.cost, many.similarity, many.valid, many.unit = (
            value.repeat(count, *[1] * (value.ndim - 1))
            for value in (self.cost, self.similarity, self.valid, self.unit)
        )
        z, trace = many.solve(starts.flatten(0, 1), rounds)
        trace = trace.unflatten(1, starts.shape[:2])
        least, at = trace[-1].argmin(0), torch.arange(starts.shape[1], device=z.device)
        return z.unflatten(0, starts.shape[:2])[least, at], trace[:, least, at]

    def solve(self, chosen: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        """Labellings z (P, m, m, n) from the inputs (P, m, n) that the blocks show at the start, and the objective
        (rounds + 1, P), which does not rise."""
        m = self.cost.shape[1]
        z = F.one_hot(chosen, m).to(self.cost.dtype).transpose(2, 3).contiguous() * self.valid[:, :, None, None]
        own, shown = self._own(z), z.sum(3)
        total = own.sum(1) + self._penalty(shown)
        trace = []
        for step in range(_SETTLING + rounds):
            if step >= _SETTLING:
                trace.append(total)
            for j in range(m):
                found = self._best(shown, j, halves=step > 0)
                own_j = self._own(found[:, None])[:, 0]
                shown_j = shown.clone()
                shown_j[:, j] = found.sum(2)
                total_j = own.sum(1) - own[:, j] + own_j + self._penalty(shown_j)
                better = self.valid[:, j] & (total_j < total) if step >= _SETTLING else self.valid[:, j]
                z[:, j] = found.where(better[:, None, None], z[:, j])
                own[:, j] = own_j.where(better, own[:, j])
                shown = shown_j.where(better[:, None, None], shown)
                total = total_j.where(better, total)
        return z, torch.stack([*trace, total])

    def _best(self, shown: Tensor, j: int, *, halves: bool) -> Tensor:
        """(P, m, n) a cheap labelling of output j while the others stay, by annealed mean field."""
        others = (shown.sum(1) - shown[:, j])[:, None] @ self.similarity
        # Twice: what it costs this output, and the others for showing the same.
        cost = self.cost + 2 * self.gamma * (others - self.free).clamp(min=0.0).transpose(1, 2)
        m = cost.shape[1]
        labels = torch.eye(m, device=cost.device, dtype=cost.dtype).expand(len(cost), m, m)
        costs = cost
        if halves and m > 1:
            most, index = shown[:, j].topk(min(3, m), dim=1)
            a, b = torch.combinations(torch.arange(most.shape[1], device=cost.device)).unbind(1)
            half = (F.one_hot(index[:, a], m) + F.one_hot(index[:, b], m)).to(cost.dtype) / 2
            labels = torch.cat([labels, half], 1)  # (P, K, m)
            costs = torch.cat([cost, half @ cost + _NEVER * (most[:, b, None] <= 0).to(cost.dtype)], 1)  # (P, K, n)
        back = labels.transpose(1, 2)
        fixed = costs + self.border / 2 * labels.square().sum(2, keepdim=True) * self.near.sum(0)
        energy = costs
        for temperature in _TEMPERATURES:
            mean = back @ torch.softmax(energy / (-temperature * self.unit), 1)  # (P, m, n)
            energy = fixed - self.border * (labels @ (mean @ self.near))
        return labels.gather(1, energy.argmin(1)[..., None].expand(-1, -1, m)).transpose(1, 2)


def parts_of(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """The rows of each part (P, m), m <= size, in order; parts that are one shorter have a last entry that is not
    valid: (P, m) bool."""
    count = -(-rows // size)
    start = torch.arange(count + 1, device=CPU) * rows // count
    at = start[:-1, None] + torch.arange(-(-rows // count), device=CPU)
    return at.clamp(max=rows - 1), at < start[1:, None]


def similarity(far: Tensor, valid: Tensor, omega: float) -> Tensor:
    """(P, m, m) A = (1 - omega) I + omega C, C the distances (P, m, m) scaled to the sum m; 0 for no input."""
    total = far.sum((1, 2), keepdim=True)
    scaled = far * (valid.sum(1).view(-1, 1, 1) / total.where(total > 0, 1.0))
    return (1.0 - omega) * torch.diag_embed(valid.to(far.dtype)) + omega * scaled


def shown_shares(joint: JointPlan, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows (N, K) that each output shows and their shares (N, K) of its pixels, the largest first.

    K is the largest number of rows that an output shows, at least 2. Missing ones repeat the first row with share 0.
    """
    count, *grid = joint.first.shape
    device = joint.first.device
    sides = [
        torch.bincount(block_of(n, blocks, device), minlength=blocks) for n, blocks in zip(size, grid, strict=True)
    ]
    pixels = (sides[0][:, None] * sides[1]).to(torch.float32)
    shares = torch.zeros(count, count, dtype=torch.float32, device=device)
    for row, share in ((joint.first, joint.share), (joint.second, 1.0 - joint.share)):
        shares.scatter_add_(1, row.flatten(1), (share * pixels).flatten(1))
    most = min(count, max(2, int((shares > 0).sum(1).max())))
    weights, rows = shares.topk(most, dim=1)
    rows = rows.where(weights > 0, rows[:, :1])
    if most < 2:  # a batch of one
        weights, rows = F.pad(weights, (0, 1)), rows.expand(-1, 2)
    return rows, weights / (size[0] * size[1])


def _distances(saliency: Tensor) -> Tensor:
    """(N, N) distances along the axes between the most salient windows, a quarter of a side, of maps (N, H, W), which
    are averaged onto at most 32 cells a side first."""
    height, width = min(_SIDE, saliency.shape[1]), min(_SIDE, saliency.shape[2])
    cells = F.adaptive_avg_pool2d(saliency.nan_to_num()[:, None], (height, width))
    windows = F.avg_pool2d(cells, (max(1, height // 4), max(1, width // 4)), stride=1)[:, 0]
    at = windows.flatten(1).argmax(1)
    y, x = at // windows.shape[2], at % windows.shape[2]
    return ((y - y[:, None]).abs() + (x - x[:, None]).abs()).to(saliency.dtype)


def _log_dirichlet(alpha: float, valid: Tensor, generator: Generator | None) -> Tensor:
    """(P, m) float64 logarithms of Dirichlet(alpha, ..., alpha) draws over the valid entries, at least log 1e-8."""
    shape = torch.full(valid.shape, alpha, dtype=torch.float64, device=CPU)
    # As in `draw_beta`: a small alpha would give 0 / 0.
    gamma = draw_gamma(shape + 1.0, generator)
    uniform = torch.rand(valid.shape, dtype=torch.float64, device=CPU, generator=generator).clamp_(min=2.0**-60)
    log_gamma = (gamma.log() + uniform.log() / alpha).masked_fill(~valid, -torch.inf)
    return log_gamma.log_softmax(1).clamp(min=math.log(1e-8))
