"""AutoMix and SAMix: the mask comes from a small network that is trained beside the model.

`LearnedPolicy` is what the learned policies share: a slow copy of the model that the features come from and that judges
what the mask block makes, the plumbing to the loop, and copies and checkpoints of all that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hardmix import _check
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.draw import Pairing, draw_partner, move
from hardmix.mixing.gradients import check_model, logits_of, model_input, trackable
from hardmix.mixing.mask_block import CrossMask, ScaledCrossMask
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.target import MixedTarget

#: How far a mask's mean may be from lambda before the area loss counts it (the papers' epsilon).
AREA_SLACK = 0.1
LABELS = ("mask", "drawn")


class Teacher(nn.Module):
    """A frozen copy of a model whose weights follow the model's, and the layer of it that feature maps are read from.

    Its parameters need no gradient, so an optimizer that is handed those that do passes them over; they and the buffers
    are in the state_dict. Batch normalisation takes the statistics of the batch at hand (of the running average for a
    batch of one) and never counts it in; dropout and the like are off. `train()` and `eval()` change nothing.
    """

    def __init__(self, who: str, model: nn.Module, layer: str, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.who = who
        try:
            self.model = copy.deepcopy(model)
        except Exception as error:
            raise ValueError(
                f"{who}: model can't be copied ({type(error).__name__}: {error}); pass one that copy.deepcopy takes."
            ) from None
        self.model.requires_grad_(False).eval()
        self._norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        for norm in self._norms:
            norm.track_running_stats = False  # in training mode the buffers are then neither used nor changed
        self.layer, self.channels = self._find_layer(layer, _image_shape(who, input_shape))

    def train(self, mode: bool = True) -> Teacher:
        return self

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device that the copy computes in."""
        return next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch, in the copy's own dtype."""
        for norm in self._norms:
            norm.training = x.shape[0] > 1
        return logits_of(self.who, self.model(x.to(self.like.dtype)))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(maps, logits) of a batch of images: maps (N, D, h, w) of the layer, both without a graph."""
        outputs: list[Any] = []
        module = self.model.get_submodule(self.layer)
        handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            with torch.no_grad():
                logits = self(x)
        finally:
            handle.remove()
        maps = as_map(outputs[-1], x.shape) if outputs else None
        if maps is None or maps.shape[:2] != (x.shape[0], self.channels):
            got = shape_of(outputs[-1]) if outputs else "nothing"
            raise ValueError(
                f"{self.who}: layer {self.layer!r} returned {got} for a batch of shape {tuple(x.shape)}; pass batches "
                f"for which it is a map of {self.channels} channels, as it was for input_shape."
            )
        return maps, logits

    @torch.no_grad()
    def follow(self, model: nn.Module, rate: float) -> None:
        """theta <- theta + rate (theta_model - theta) for parameters and float buffers; other buffers are copied."""
        averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        for mine, theirs in zip(_tensors(self.model), _tensors(model), strict=True):
            if mine.is_floating_point():
                averaged[0].append(mine)
                averaged[1].append(theirs.to(mine))
            else:
                mine.copy_(theirs)
        if averaged[0]:
            torch._foreach_lerp_(averaged[0], averaged[1], rate)

    @torch.no_grad()
    def _find_layer(self, layer: str, shape: tuple[int, ...]) -> tuple[str, int]:
        """The name of the layer to read and its channels, from one forward of a black image."""
        modules = {name: module for name, module in self.model.named_modules() if name}
        if layer and layer not in modules:
            raise ValueError(
                f"{self.who}: layer is {layer!r}, which the model does not have{_check.did_you_mean(layer, modules)}; "
                "pass a name from model.named_modules()."
            )
        seen: dict[str, Any] = {}

        def remember(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen.pop(name, None)  # the order is that of the last call
                seen[name] = output

            return hook

        watched = {layer: modules[layer]} if layer else modules
        handles = [module.register_forward_hook(remember(name)) for name, module in watched.items()]
        x = torch.zeros((1, *shape), dtype=self.like.dtype, device=self.like.device)
        try:
            self.model(x)
        except Exception as error:
            raise ValueError(
                f"{self.who}: the model does not take a batch of shape {tuple(x.shape)} "
                f"({type(error).__name__}: {error}); pass input_shape=(channels, height, width) of your images."
            ) from None
        finally:
            for handle in handles:
                handle.remove()
        maps = {name: as_map(output, x.shape) for name, output in seen.items()}
        # Pooled features of one pixel say nothing of places; only who names such a layer gets it.
        found = [(name, m.shape[1]) for name, m in maps.items() if m is not None and (layer or m[0, 0].numel() > 1)]
        if not found:
            if layer:
                got = shape_of(seen[layer]) if layer in seen else "nothing"
                raise ValueError(
                    f"{self.who}: layer {layer!r} returned {got}; name one that returns a map (N, D, h, w), or tokens "
                    "(N, T, D) that cover the image row by row, with or without a class token in front."
                )
            raise ValueError(
                f"{self.who}: no layer of the model returns a map (N, D, h, w) or tokens (N, T, D) that cover the "
                "image; take a convolutional network or a vision transformer, or another policy."
            )
        return found[-1]


class LearnedPolicy(AskingPolicy):
    """What learned policies share: the teacher, and its tie to the model that is trained.

    Args:
        model: the model that is trained. It is not kept in the policy's parameters or state_dict.
        layer, input_shape: where the teacher's feature maps are read, see `AutoMix`.
        momentum: see `AutoMix`.
        margin: see `AutoMix`.
        label: see `AutoMix`.
    """

    min_ndim = max_ndim = 4
    pickles_model = False
    #: the mask generator
    block: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str,
        input_shape: Sequence[int],
        alpha: float,
        momentum: float,
        margin: float,
        label: str,
        per: str,
        pairing: str | None,
    ) -> None:
        super().__init__(model, alpha=alpha, per=per, pairing=pairing)
        who = type(self).__name__
        self.momentum = _check.between(who, "momentum", momentum, 0.0, 1.0)
        self.margin = _check.between(who, "margin", margin, 0.0, 1.0)
        self.label = _check.choice(who, "label", label, LABELS)
        if not isinstance(layer, str):
            raise TypeError(f"{who}: layer is {layer!r}; pass the name of a submodule, or an empty string.")
        self._progress = 0.0
        self._pending: Any = None
        self.teacher = Teacher(who, self._model(), layer, input_shape)

    def extra_repr(self) -> str:
        return (
            f"layer={self.teacher.layer!r}, momentum={self.momentum:g}, margin={self.margin:g}, label={self.label!r}, "
            f"{super().extra_repr()}"
        )

    def attach(self, model: nn.Module) -> None:
        """Follow `model` from now on: the one to train beside a copied or unpickled policy."""
        check_model(type(self).__name__, model)
        if [t.shape for t in _tensors(self.teacher.model)] != [t.shape for t in _tensors(model)]:
            raise ValueError(
                f"{type(self).__name__}: model has other tensors than the one that the policy was made for; pass that "
                "one, or make a policy for this one."
            )
        super().attach(model)

    def disarm(self) -> None:
        self._pending = None

    def set_progress(self, fraction: float) -> None:
        """The share of the training that is done, which the teacher's momentum depends on."""
        self._progress = _check.between(type(self).__name__, "fraction", fraction, 0.0, 1.0)

    def after_step(self) -> None:
        """Let the teacher follow: theta <- m theta + (1 - m) theta_model, 1 - m = (1 - momentum) (1 + cos pi t) / 2."""
        model = self._model()
        rate = (1.0 - self.momentum) * (1.0 + math.cos(math.pi * self._progress)) / 2.0
        self.teacher.follow(model, rate)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the last batch."""
        return {**self.__dict__, "_pending": None}

    def _clean_loss(
        self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor], x: Tensor, y: Tensor, kind: str
    ) -> Tensor:
        """The model's loss on the clean batch, in a forward of its own."""
        model = self._model()
        who = type(self).__name__
        logits = logits_of(who, model(model_input(who, model, x)))
        return criterion(logits, MixPlan.identity(x.shape[0], x.device).target(y, kind=kind))

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(maps, logits) of the clean batch, the maps in the dtype of the mask block."""
        who = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(
                f"{who}: x has dtype {x.dtype}, through which the mask block can't be trained; pass floating-point "
                "images."
            )
        like = next(self.block.parameters())
        _check.same_device(who, "x", x, "the policy", like.device)
        maps, logits = self.teacher.read(x)
        return maps.to(like.dtype), logits


class _Pending(NamedTuple):
    """What `loss` needs of the batch that was mixed last."""

    x: Tensor
    y: Tensor
    kind: str
    maps: Tensor
    partner: Tensor
    lam: Tensor


class AutoMix(LearnedPolicy):
    """AutoMix: a mask block looks at the feature maps of both images and is trained to make mixtures that a slow copy
    of the model recognises.

        x~ = m_a x_a + (1 - m_a) x_b,   m_a = mask_block(f(x_a), f(x_b), lam),   f a layer of the teacher

        policy.loss = criterion(teacher(x~'), lam' y_a + (1 - lam') y_b)
                      + mask_weight mean_i max(|mean m_a - lam'| - 0.1, 0) + clean criterion(model(x), y)
        teacher <- m teacher + (1 - m) model after each step,   m from `momentum` to 1 along half a cosine

    Each batch is mixed twice, with two draws of lambda and partner: once for the model, on a mask without a graph, and
    once (x~', lam') for the mask block, through the frozen teacher. So the mask block gets no gradient from the loss of
    the mixed batch, and the model none from `policy.loss` but that of the clean batch. The mask block: `CrossMask`.

        mix = AutoMix(model)
        optimizer = SGD([*model.parameters(), *(p for p in mix.parameters() if p.requires_grad)], lr=0.1)
        x, target = mix(images, labels)
        loss = criterion(model(x), target) + mix.loss(criterion)
        loss.backward(); optimizer.step(); mix.after_step()

    Args:
        model: the model that is trained: images as the policy gets them -> logits. The teacher is a copy of it. It is
            not kept in the policy's parameters or state_dict.
        layer: name of the submodule whose output the mask block reads: a map (N, D, h, w), or tokens (N, T, D) that
            cover the image row by row, with or without a class token; or a tuple that starts with one. "" takes the
            last one with more than one cell. The paper takes the third stage of a ResNet.
        input_shape: (channels, height, width) of the images, to find the layer and its channels with. Later batches may
            have other sizes if the model takes them.
        alpha: parameter of Beta(alpha, alpha) for lambda.
        momentum: m at the start; 1 keeps the teacher as it is.
        mask_weight: weight of the area loss.
        margin: rows with lam <= margin or 1 - lam <= margin are mixed as a whole, as in Mixup, for the model.
        clean: weight of the model's own loss on the clean batch, one more forward and backward; 0: none.
        embed_lam, upsample: see `CrossMask`.
        label: the share that labels get: "mask", the mean of the mask that the pixels were mixed with; or "drawn", the
            lambda that the mask was asked for, as in the paper. The mask block is trained with the drawn one.
        per, pairing: see `Policy`.

    Shapes: images (N, C, H, W), square or not, in a floating-point dtype. N = 1 mixes the sample with itself. Rows of
    one class get a mask like all others. NaN in the maps, from a model that has diverged, gives NaN masks.
    The policy keeps a reference to `x` until `loss` has been called: don't write into it before. `loss` is None where
    nothing was mixed since. Batch normalisation in the teacher: see `Teacher`.
    Cost: two forward passes of the teacher, one of them without a graph, and one backward to its input, and the model's
    own forward and backward of the clean batch, so a step takes some three times as long. The memory of a second model,
    and of two forwards.
    Raises:
        ValueError: an unknown layer, one that is no map, a model that does not take `input_shape` or can't be copied, a
            setting out of range.
        TypeError: integer images.
    Reference: Liu et al. 2022, section 3 (arXiv:2103.13027). The weight of the clean batch is that of the released
    code, which has a classifier of its own for it, where here the model has one. It draws one lambda for a batch,
    compares its mean area with it, counts the teacher's batches into its running statistics, starts to raise the
    momentum after a tenth of the training and ends at 0.999999, leaves lambda out of the maps on small images, and
    starts the mask block with smaller weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str = "",
        input_shape: Sequence[int] = (3, 32, 32),
        alpha: float = 2.0,
        momentum: float = 0.999,
        mask_weight: float = 0.1,
        margin: float = 0.08,
        clean: float = 1.0,
        embed_lam: bool = True,
        upsample: str = "nearest",
        label: str = "mask",
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(
            model,
            layer=layer,
            input_shape=input_shape,
            alpha=alpha,
            momentum=momentum,
            margin=margin,
            label=label,
            per=per,
            pairing=pairing,
        )
        self.clean = _check.non_negative(type(self).__name__, "clean", clean)
        self.mask_weight = _check.non_negative(type(self).__name__, "mask_weight", mask_weight)
        self.block = CrossMask(self.teacher.channels, embed_lam=embed_lam, upsample=upsample)
        self.block.to(self.teacher.like.device)
        self._maps: Tensor | None = None

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        lam = move(self._lam(pairing, generator), x.device)
        partner = move(pairing.partner, x.device)
        self._maps, _ = self._read(x)
        with torch.no_grad():
            mask = self._mask(self._maps, partner, lam, x).to(torch.float32)
            whole = torch.minimum(lam, 1.0 - lam) <= self.margin
            mask = torch.where(whole.view(-1, 1, 1, 1), lam.view(-1, 1, 1, 1), mask)
        share = lam if self.label == "drawn" else mean_share(mask)
        return MixPlan(partner, share, mask, shift=pairing.shift)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        plan, target = self._plan_and_target(x, y, generator, kind)
        pairing = draw_partner(x.shape[0], str(self.pairing), generator)
        lam = self._lam(pairing, generator)
        assert self._maps is not None
        self._pending = _Pending(x, y, kind, self._maps, move(pairing.partner, x.device), move(lam, x.device))
        self._maps = None
        return plan.blend(x), target

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """The mask block's loss on the batch that was mixed last, and the model's on the clean one, once: the next call
        returns None.

        Args:
            criterion: the objective, (logits, target) -> scalar.
        """
        if self._pending is None:
            return None
        (x, y, kind, maps, partner, lam), self._pending = self._pending, None
        with torch.autocast(x.device.type, enabled=False):
            mask = self._mask(maps, partner, lam, x)
            # In float32 where the images have fewer digits: they are what the gradient comes through.
            wide = trackable(x.detach().to(torch.promote_types(x.dtype, mask.dtype)))
            mixed = MixPlan(partner, lam, mask).blend(wide)
        target = MixPlan(partner, lam, mask.detach()).target(y, kind=kind)
        area = self.mask_loss(mask, lam)
        loss = criterion(self.teacher(mixed), target) + self.mask_weight * area
        return loss + self.clean * self._clean_loss(criterion, x, y, kind) if self.clean else loss

    def mask_loss(self, mask: Tensor, lam: Tensor) -> Tensor:
        """mean_i max(|mean m_i - lam_i| - 0.1, 0) of masks (N, 1, H, W) and shares (N,)."""
        return ((mask.mean((1, 2, 3)) - lam).abs() - AREA_SLACK).clamp(min=0.0).mean()

    def _mask(self, maps: Tensor, partner: Tensor, lam: Tensor, x: Tensor) -> Tensor:
        return self.block(maps, maps.index_select(0, partner), lam, (x.shape[2], x.shape[3]))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_maps": None}


class SAMix(AutoMix):
    """SAMix: AutoMix with maps that are weighed by lambda, masks that are smooth, and a bonus for contrast.

        policy.loss = criterion(teacher(x~'), lam' y_a + (1 - lam') y_b)
                      + mask_weight mean_i( max(|mean m_i - lam'_i| - .1, 0) - 2 Var m_i )
                      + clean criterion(model(x), y)

    Var m_i is the mean squared deviation of a mask's pixels from their mean. The mask block: `ScaledCrossMask`.

    Args:
        model, layer, input_shape, alpha, momentum, mask_weight, margin, clean, label, per, pairing: see
            `AutoMix`.
        upsample: "bilinear" or "nearest".

    Shapes, edges, cost and errors: as `AutoMix`.
    Reference: Li et al. 2021, section 3 (arXiv:2111.15454); the curve of lambda, the mask loss and the layers of the
    mask block are those of the released code (OpenMixup). There the value network has batch normalisation, which ours
    does not, and Var is over a whole batch with one lambda. The paper's eta-balanced loss and its variants for
    self-supervised learning are not part of this.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str = "",
        input_shape: Sequence[int] = (3, 32, 32),
        alpha: float = 2.0,
        momentum: float = 0.999,
        mask_weight: float = 0.1,
        margin: float = 0.08,
        clean: float = 1.0,
        upsample: str = "bilinear",
        label: str = "mask",
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        super().__init__(
            model,
            layer=layer,
            input_shape=input_shape,
            alpha=alpha,
            momentum=momentum,
            mask_weight=mask_weight,
            margin=margin,
            clean=clean,
            label=label,
            per=per,
            pairing=pairing,
        )
        self.block = ScaledCrossMask(self.teacher.channels, upsample=upsample).to(self.teacher.like.device)

    def mask_loss(self, mask: Tensor, lam: Tensor) -> Tensor:
        """mean_i( max(|mean m_i - lam_i| - 0.1, 0) - 2 Var m_i ) of masks (N, 1, H, W) and shares (N,)."""
        return super().mask_loss(mask, lam) - 2.0 * mask.var((1, 2, 3), correction=0).mean()


def mean_share(mask: Tensor) -> Tensor:
    """Mean over the pixels of masks (N, K, H, W): (N,) for K = 1, else (N, K). Of a mask with one value, that value."""
    low, high = torch.aminmax(mask.flatten(2), dim=2)
    # The float32 mean of equal values may miss them in the last bit.
    share = torch.where(low == high, high, mask.mean((2, 3)))
    return share[:, 0] if mask.shape[1] == 1 else share


def as_map(output: Any, image: Sequence[int]) -> Tensor | None:
    """A layer's output as (N, D, h, w), or None.

    Maps are taken as they are. Tokens (N, T, D) are laid out row by row on a grid with the proportions of the image
    (N, C, H, W), that is h W = w H; if only T - 1 of them fit, the first is a class token and dropped.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim == 4:
        return output
    if output.ndim != 3:
        return None
    height, width = image[2], image[3]
    for skip in (0, 1):
        tokens = output.shape[1] - skip
        h = round(math.sqrt(tokens * height / width))
        if h > 0 and tokens % h == 0 and h * width == (tokens // h) * height:
            return output[:, skip:].transpose(1, 2).unflatten(2, (h, tokens // h))
    return None


def shape_of(output: Any) -> str:
    """What a layer returned, for a message."""
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _image_shape(who: str, shape: object) -> tuple[int, ...]:
    sides = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sides) != 3 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"{who}: input_shape is {shape!r}; pass three whole numbers (channels, height, width).")
    return sides


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers in one order, the same for a module and its copy."""
    return [*(p.detach() for p in module.parameters()), *module.buffers()]
