"""SuperMix: masks that are looked for until a teacher sees the classes of all the images in the mixture."""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hardmix import _check
from hardmix._math import CPU, wide
from hardmix.mixing.adautomix import Mixture
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import Pairing, cpu_generator, draw_beta, move, row_numbers
from hardmix.mixing.gradients import check_mode, check_model, logits_of, model_input, undisturbed
from hardmix.mixing.learned import mean_share
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget

#: What a step may be at least and at most, as a multiple of the smoothed gradient, and what its denominator is kept
#: from zero by: the numbers of the authors' code.
_SHORTEST, _LONGEST, _FLOOR = 1e-4, 2e3, 1e-10


class Search(NamedTuple):
    """What was found for a batch.

    Attributes:
        mixture: partners (N, K), shares of the labels (N, K) and masks (N, K, H, W).
        drawn: (N, K) float32 proportions that the teacher was to see.
        recognised: (N,) bool, whether it sees the classes of all K images.
        steps: (N,) long, how many steps the masks of a row have taken.
    """

    mixture: Mixture
    drawn: Tensor
    recognised: Tensor
    steps: Tensor


class SuperMix(AskingPolicy):
    """SuperMix: masks that are moved until the model sees the classes of all the images in the mixture.

        x~_i = sum_k M_ik x_{p_ik},   M_ik = sigmoid(up(m_ik)) / sum_j sigmoid(up(m_ij)),   m_ik (h, w), at first 0
        t_i = sum_k r_ik onehot(c_{p_ik}),   r_i ~ Dirichlet(alpha, ..., alpha),   k = 1 .. sources,   p_i1 = i
        L_i = KL(t_i || softmax(model(x~_i))) + sparsity mean_{k,pixels} M_ik (1 - M_ik)
        m_i <- m_i - |L_i| / <g_i, G g_i> G g_i,   g_i = dL_i / dm_i,   G a Gaussian over the cells of each mask

    A step goes to where the loss, taken as linear, is zero, along the smoothed gradient (Newton's method for one
    equation, as in DeepFool); its factor is kept between 1e-4 and 2000. A row is done as soon as its d classes are the
    model's d most likely ones, which is first looked at after one step; its mask then stays. The row itself comes
    first, and its partners are distinct rows where the batch has enough of them.

    Args:
        model: the teacher: what is trained, or one that is trained already. Asked in evaluation mode, batch norms
            included, so rows don't hang on each other. It gets `x` as the policy does and is no part of the policy.
        sources: K, images in one, at least 2.
        alpha: of the Dirichlet.
        steps: at most so many.
        resolution: cells a side of the masks before they are enlarged, bilinearly; not more than there are pixels.
        sigma: standard deviation of G in cells; 0 for none.
        sparsity: price of pixels that show several images.
        classes: c, whose classes the mixture has to show: "predicted", the model's for the clean images (one forward
            more), or "given", the labels: ids (N,) or rows (N, C), of which the largest entries count.
        unrecognised: what becomes of a row whose classes the model doesn't see after all steps: "clean", the own image
            and label, or "mixed", the mixture as it is.
        tolerance: share of the batch that may be left unrecognised: the steps end early when no more rows are.
        label: shares of the labels, "mask" for the means of the masks or "drawn" for r.

    Shapes: (N, C, H, W) floats, square or not, and logits (N, classes) of two classes or more. `forward` returns
    MixedTarget with K labels a row; integer masks (N, H, W) follow the pixels if `classes` is "predicted". `search`
    tells who was recognised and after how many steps. `plan` is refused: a plan has one partner.
    Edges: N = 1 comes back as it is, with the weights (1, 0, ...), and the model isn't asked; with N < K partners
    repeat. Sources of one class ask for one class, and the objectives add its shares. A model that looks at nothing
    leaves the masks at 1 / K. Sources of all the classes that there are, as two of two, count as recognised after one
    step, whatever the mixture shows, so the policy needs more classes than `sources`. A row of labels without a class
    asks for none. A gradient that is not finite moves nothing, and logits with NaN recognise nothing.
    No gradient flows through the masks.
    Cost: not one forward and backward but up to `steps` of each, and a forward. Rows that are done leave: the model is
    asked with half the rows as soon as these hold all that are left, and so on, so that it meets few sizes of batch.
    The host looks once a step at how many are left. A model that has learnt nothing needs nearly all steps with
    classes="given"; with "predicted" it tells few classes apart, and few steps do for most rows.

    Raises:
        TypeError, ValueError: as `input_saliency`; logits of fewer than two classes.

    Reference: Dabouei et al. 2021, CVPR (arXiv:2003.05034). All of the above is the authors' code (alldbi/SuperMix),
    settings included; the formulas of the paper were not at hand to be compared. What differs: there the images are
    made beforehand by a finished teacher, unrecognised ones are dropped, and a batch ends when at most 30 % or 70 %
    (of two versions) are left: `tolerance`. In their distillation proportions are no labels: the student learns the
    class that the teacher predicts for the mixture, for which the teacher is to be asked; how they label mixtures for
    plain classification we could not establish. Here the labels are those of the images, weighed by what is seen of
    them. Their Gaussian is cut off after int(5 sigma) cells and is half a cell off centre where that is even; ours is
    whole, so that <g, G g> is never negative. Their code takes two forwards a step where the second
    is the next step's first, and asks for K classes where two sources share one.
    """

    min_ndim = max_ndim = 4

    def __init__(
        self,
        model: nn.Module,
        *,
        sources: int = 2,
        alpha: float = 3.0,
        steps: int = 50,
        resolution: int = 8,
        sigma: float = 1.0,
        sparsity: float = 25.0,
        classes: str = "predicted",
        unrecognised: str = "clean",
        tolerance: float = 0.0,
        label: str = "mask",
    ) -> None:
        who = "SuperMix"
        super().__init__(check_model(who, model), alpha=alpha)
        self.sources = _check.integer(who, "sources", sources, 2)
        self.steps = _check.integer(who, "steps", steps, 1)
        self.resolution = _check.integer(who, "resolution", resolution, 1)
        self.sigma = _check.non_negative(who, "sigma", sigma)
        self.sparsity = _check.non_negative(who, "sparsity", sparsity)
        self.classes = _check.choice(who, "classes", classes, ("predicted", "given"))
        self.unrecognised = _check.choice(who, "unrecognised", unrecognised, ("clean", "mixed"))
        self.tolerance = _check.between(who, "tolerance", tolerance, 0.0, 1.0)
        self.label = _check.choice(who, "label", label, ("mask", "drawn"))

    def extra_repr(self) -> str:
        return (
            f"sources={self.sources}, alpha={self.alpha:g}, steps={self.steps}, resolution={self.resolution}, "
            f"sigma={self.sigma:g}, sparsity={self.sparsity:g}, classes={self.classes!r}, "
            f"unrecognised={self.unrecognised!r}, tolerance={self.tolerance:g}, label={self.label!r}"
        )

    def plan(
        self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None, partner: Tensor | None = None
    ) -> NoReturn:
        """Refused: see `search`."""
        raise NotImplementedError(
            f"SuperMix: a plan has one partner but the masks of {self.sources} images are looked for together; "
            "call the policy, or search(x, y)."
        )

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        """Refused: see `search`."""
        self.plan(x, y, generator=generator)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        """(x_mixed, target) with K labels per row."""
        who = "SuperMix"
        x = _check.batch(who, "x", x, self.min_ndim, self.max_ndim)
        y = _check.tensor(who, "y", y)
        _check.same_length(who, "y", y, "x", x.shape[0])
        _check.same_device(who, "y", y, "x", x.device)
        _check.finite(who, "x", x)
        mixture = self.search(x, y, generator=generator).mixture
        return mixture.blend(x), mixture.target(y, kind=kind)

    def search(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> Search:
        """The masks for the batch `x` (N, C, H, W). The labels `y` are looked at with classes="given"."""
        who = "SuperMix"
        x = _check.batch(who, "x", x, self.min_ndim, self.max_ndim)
        cpu_generator(who, generator)
        rows, device, size = x.shape[0], x.device, (x.shape[2], x.shape[3])
        partner, drawn = (move(value, device) for value in self._draw_rows(rows, generator))
        own = F.one_hot(torch.zeros((), dtype=torch.long, device=device), self.sources).to(drawn)  # (K,)
        if rows == 1:
            masks = own.view(1, -1, 1, 1).expand(1, -1, *size)
            steps = torch.zeros(1, dtype=torch.long, device=device)
            return Search(Mixture(partner, own[None], masks), drawn, steps == 0, steps)
        check_mode(who)
        model = self._model()
        with torch.autocast(device.type, enabled=False):
            try:
                with undisturbed(model, batch_statistics=False):
                    pixels = model_input(who, model, x)
                    wanted, present = self._wanted(pixels, y, partner, drawn)
                    cells, recognised, steps = self._descend(pixels, partner, wanted, present)
            finally:
                torch.clear_autocast_cache()  # weights cast without a graph must not serve the training forward
            masks = mask_shares(cells, size).to(torch.float32)
        share = mean_share(masks) if self.label == "mask" else drawn
        if self.unrecognised == "clean":
            masks = masks.where(recognised.view(-1, 1, 1, 1), own.view(1, -1, 1, 1))
            share = share.where(recognised[:, None], own)
            # With its own label in every place: an objective may look at labels whatever their share is.
            partner = partner.where(recognised[:, None], torch.arange(rows, device=device)[:, None])
        return Search(Mixture(partner, share, masks), drawn, recognised, steps)

    def _draw_rows(self, rows: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """((N, K) rows, (N, K) proportions). Partners are cyclic shifts away, none the same if there are enough."""
        others = max(rows - 1, 1)
        shifts = torch.randperm(others, device=CPU, generator=generator)[row_numbers(self.sources - 1) % others] + 1
        partner = (row_numbers(rows)[:, None] + F.pad(shifts, (1, 0))) % rows
        rest, shares = torch.ones(rows, dtype=torch.float32, device=CPU), []
        for later in range(self.sources - 1, 0, -1):  # a stick is broken: the first of its parts is a Beta
            part = rest * draw_beta(self.alpha, later * self.alpha, rows, generator)
            shares.append(part)
            rest = rest - part
        return partner, torch.stack([*shares, rest], 1)

    @torch.no_grad()
    def _wanted(self, pixels: Tensor, y: Tensor | None, partner: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """((N, C) what the model should put out, (N, C) bool which classes it has to see)."""
        who = "SuperMix"
        predicted = self.classes == "predicted"
        # Otherwise one row tells how many classes there are.
        logits = self._ask(pixels if predicted else pixels[:1])
        count = logits.shape[1]
        if predicted:
            hot = F.one_hot(logits.argmax(1), count)
        elif y is None:
            raise ValueError(f"{who}: y is None; pass the labels, whose classes the mixture has to show.")
        else:
            y = _check.tensor(who, "y", y)
            _check.same_length(who, "y", y, "x", pixels.shape[0])
            _check.same_device(who, "y", y, "x", pixels.device)
            if y.ndim == 1 and not y.is_floating_point():
                _check.classes_in_range(who, "y", y, count)
                hot = F.one_hot(y.long(), count)
            elif y.shape == (pixels.shape[0], count):
                hot = y
            else:
                raise ValueError(
                    f"{who}: y has shape {tuple(y.shape)} and dtype {y.dtype} but the model tells {count} classes "
                    f'apart; pass class ids (N,) or rows (N, {count}), or classes="predicted".'
                )
        hot = hot.to(wide(pixels.dtype))
        present = ((hot == hot.amax(1, keepdim=True)) & (hot > 0))[partner].any(1)
        hot = hot / hot.sum(1, keepdim=True).clamp(min=torch.finfo(hot.dtype).tiny)
        return (drawn.to(hot.dtype)[..., None] * hot[partner]).sum(1), present

    def _ask(self, images: Tensor) -> Tensor:
        logits = logits_of("SuperMix", self._model()(images))
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            raise TypeError(
                f"SuperMix: the model returned shape {tuple(logits.shape)} for {len(images)} images; pass a model that "
                "returns logits (N, classes) of two classes or more."
            )
        return logits.to(wide(logits.dtype))

    def _descend(
        self, pixels: Tensor, partner: Tensor, wanted: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """((N, K, h, w) masks before they are enlarged, (N,) bool whether all classes are seen, (N,) steps)."""
        rows, size = pixels.shape[0], (pixels.shape[2], pixels.shape[3])
        grid = [min(self.resolution, length) for length in size]
        found = pixels.new_zeros(rows, self.sources, *grid, dtype=wide(pixels.dtype))
        recognised = torch.zeros(rows, dtype=torch.bool, device=pixels.device)
        steps = torch.zeros(rows, dtype=torch.long, device=pixels.device)
        # The rows that the model is asked with: all that are left, and some that are done.
        at, cells, done = torch.arange(rows, device=pixels.device), found, recognised
        images = pixels[partner]  # (M, K, C, H, W)
        for step in range(self.steps + 1):
            last = step == self.steps
            with torch.set_grad_enabled(not last):
                cells = cells.detach().requires_grad_(not last)
                masks = mask_shares(cells, size)
                logits = self._ask((images * masks[:, :, None]).sum(1).to(pixels.dtype))
                if step:
                    done = done | _sees(logits.detach(), present)
                    recognised = recognised.index_copy(0, at, done)
                    left = int((~done).sum())
                    if last or left <= self.tolerance * rows:
                        break
                elif not logits.requires_grad:
                    raise ValueError(
                        "SuperMix: the model's output has no gradient; pass a model that works with gradients."
                    )
                loss = self.losses(logits, masks, wanted)
                (gradient,) = torch.autograd.grad(loss.sum(), cells)
            with torch.no_grad():
                cells = cells + newton_step(loss, gradient, self.sigma).where(~done.view(-1, 1, 1, 1), 0.0)
                found = found.index_copy(0, at, cells)
                steps = steps.index_add(0, at, (~done).long())
                count = len(at)
                while step and left <= (count + 1) // 2 < count:
                    count = (count + 1) // 2
                if count < len(at):
                    keep = done.long().argsort(stable=True)[:count]
                    at, cells, done, images, wanted, present = (
                        value[keep] for value in (at, cells, done, images, wanted, present)
                    )
        return found, recognised, steps

    def losses(self, logits: Tensor, masks: Tensor, wanted: Tensor) -> Tensor:
        """(N,) L of logits (N, C), masks (N, K, H, W) and the proportions wanted (N, C)."""
        divergence = F.kl_div(logits.log_softmax(1), wanted, reduction="none").sum(1)
        return divergence + self.sparsity * (masks * (1.0 - masks)).mean((1, 2, 3))


def mask_shares(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, K, H, W) shares that sum to one over K, from unbounded cells (N, K, h, w): enlarged, then sigmoid, then
    divided by their sum.

    The bilinear enlargement is a product with its matrices, whose backward adds in one order on every device.
    """
    enlarge = [
        F.interpolate(torch.eye(few, dtype=cells.dtype, device=cells.device)[None], many, mode="linear")[0]
        for few, many in zip(cells.shape[2:], size, strict=True)
    ]
    shares = torch.sigmoid(enlarge[0].T @ cells @ enlarge[1])
    return shares / shares.sum(1, keepdim=True)


def newton_step(loss: Tensor, gradient: Tensor, sigma: float) -> Tensor:
    """What to add to the cells (N, K, h, w) so that the losses (N,), taken as linear, fall to zero along the smoothed
    gradient. Nothing for a row whose step would not be finite."""
    smooth = gradient
    if sigma > 0:
        height, width = (_gaussian(length, sigma, gradient) for length in gradient.shape[2:])
        smooth = height @ gradient @ width
    along = (gradient * smooth).sum((1, 2, 3))
    factor = (loss.abs() / (along + _FLOOR)).clamp(_SHORTEST, _LONGEST).to(gradient.dtype)
    step = -factor.view(-1, 1, 1, 1) * smooth
    return step.where(step.isfinite().all(3).all(2).all(1).view(-1, 1, 1, 1), 0.0)


def _gaussian(length: int, sigma: float, like: Tensor) -> Tensor:
    """(length, length) weights of one cell for another; what would come from beyond the border is zero."""
    at = torch.arange(length, device=like.device, dtype=like.dtype)
    taps = torch.arange(-math.ceil(8 * sigma), math.ceil(8 * sigma) + 1, device=like.device, dtype=like.dtype)
    return torch.exp(-0.5 * ((at - at[:, None]) / sigma) ** 2) / torch.exp(-0.5 * (taps / sigma) ** 2).sum()


def _sees(logits: Tensor, present: Tensor) -> Tensor:
    """(N,) bool: every class that is `present` (N, C) is more likely than every other; False where there is NaN."""
    least = logits.masked_fill(~present, math.inf).amin(1)
    return least > logits.masked_fill(present, -math.inf).amax(1)
