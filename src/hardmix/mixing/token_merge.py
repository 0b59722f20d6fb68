"""MergeMix, and the forward that it reads: a vision transformer whose like tokens are merged between its blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from hardmix import _check
from hardmix.mixing.attention import Grid
from hardmix.mixing.attention_policy import AttentionPolicy, pixel_share
from hardmix.mixing.attention_reader import SOFTMAX, Attention, of_fused
from hardmix.mixing.draw import Pairing, move
from hardmix.mixing.field import largest
from hardmix.mixing.gradients import logits_of, model_input, without_ddp
from hardmix.mixing.plan import MixPlan
from hardmix.mixing.static import Mixup
from hardmix.mixing.target import MixedTarget

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def match(keys: Tensor, count: int) -> Tensor:
    """Where each token goes when `count` of them are merged: (N, T) places in 0 .. T - count - 1.

    Tokens at even places look for the most similar one (cosine of the keys) at an odd place; the `count` best matches
    are merged into theirs, ties to the first. Places: even tokens that stay, in order, then the odd ones.

    Args:
        keys: (N, T, D).
        count: at most T // 2.
    """
    even, odd = F.normalize(keys[:, ::2], dim=-1), F.normalize(keys[:, 1::2], dim=-1)
    best, to = (even @ odd.transpose(1, 2)).max(-1)  # (N, even)
    order = best.argsort(dim=1, descending=True, stable=True)
    goes, stays = order[:, :count], order[:, count:].sort(1).values
    left = stays.shape[1]
    place = torch.empty_like(order)
    place.scatter_(1, stays, torch.arange(left, device=keys.device).expand_as(stays))
    place.scatter_(1, goes, to.gather(1, goes) + left)
    out = torch.empty(keys.shape[:2], dtype=torch.long, device=keys.device)
    out[:, ::2] = place
    out[:, 1::2] = torch.arange(left, left + odd.shape[1], device=keys.device)
    return out


def merge_counts(total: int, blocks: int) -> list[int]:
    """How many tokens are merged after each block but the last: `total` in all, falling evenly from 3 to 1 parts."""
    steps = blocks - 1
    parts = [1.5 - i / max(1, steps - 1) for i in range(steps)]
    done = [0.0]
    for part in parts:
        done.append(done[-1] + part)
    ends = [round(total * value / done[-1]) if done[-1] else 0 for value in done]
    return [after - before for before, after in pairwise(ends)]


class MergeMix(AttentionPolicy):
    """MergeMix: the patches that a vision transformer attends to most stay, the partner shows through the others.

        M: the int(lam' T) of T patches of x_i with the largest attention;   lam = mean M
        loss(): mixup * criterion(model(Mixup(x)), target of the Mixup)

    lam' ~ Beta(alpha, alpha). The attention is the last block's, of the class token, the mean over the heads, in one
    more forward of the clean batch (evaluation mode, no gradient) in which like patches are merged after each block:
    see `TokenMerger`. Each patch counts as much as the token that it was merged into, ties to the first, so patches of
    one kind stay or go together. `loss` runs the model once more, with gradient, on the same batch under plain Mixup.

    Args:
        model: the vision transformer that is trained; see `AttentionTap` for which, and for `patch`.
        merge: share of the patches that are merged in that forward; 0 takes the attention as it is.
        mixup: weight of `loss`; with 0 there is none.
        mixup_alpha: parameter of the Beta of that Mixup's lambda.
        patch: side of a patch in pixels; None finds it.
        alpha, per, pairing: see `Policy`; they hold for that Mixup too.

    Edges: same class: two shares of one label. N = 1: the sample with itself. Flat attention: the first patches stay.
    Half types: the attention is computed in float32; uint8 images are refused. NaN attention: some patches.
    Models whose blocks need every token in its place (rotary or relative positions) are refused with merge > 0.
    Cost: one forward without a gradient, on fewer and fewer tokens; and one with, if `mixup` is not 0.
    Reference: Jin et al. 2025 (arXiv:2510.23479), as OpenMixup defines it (37e1372): `merge` is 0.5 in its settings for
    CIFAR-100, 0.25 for ImageNet. Its code ranks patches by what they give the first *patch*, the authors' code for
    multi-modal models by what the class token gives them, as here; and it may draw lam anew from a Gaussian, which no
    longer is the share of the pixels and is left out. It merges inside the block, between attention and MLP.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1.0,
        merge: float = 0.5,
        mixup: float = 1.0,
        mixup_alpha: float = 0.8,
        patch: int | None = None,
        per: str = "sample",
        pairing: str | None = None,
    ) -> None:
        merge = _check.between("MergeMix", "merge", merge, 0.0, 1.0)
        super().__init__(model, alpha=alpha, every=merge > 0, patch=patch, per=per, pairing=pairing)
        self.merge = merge
        self.mixup = _check.non_negative("MergeMix", "mixup", mixup)
        self.mixup_alpha = _check.positive("MergeMix", "mixup_alpha", mixup_alpha)
        self._mixup = Mixup(mixup_alpha, per=per, pairing=pairing)
        self._base: tuple[Tensor, MixPlan, MixedTarget] | None = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, merge={self.merge:g}, mixup={self.mixup:g}"

    def draw(self, x: Tensor, y: Tensor | None, pairing: Pairing, generator: Generator | None) -> MixPlan:
        lam = self._lam(pairing, generator)
        found, grid = self._map(x)
        keep = move((lam * grid.patches).long(), x.device)
        own = largest(found.flatten(1), keep).view_as(found).to(torch.float32)
        mask = pixel_share(own, grid, (x.shape[2], x.shape[3]))
        return MixPlan(move(pairing.partner, x.device), None, mask, shift=pairing.shift)

    def forward(
        self, x: Tensor, y: Tensor, *, generator: Generator | None = None, kind: str = "auto"
    ) -> tuple[Tensor, MixedTarget]:
        plan, target = self._plan_and_target(x, y, generator, kind)
        self._base = None
        if self.mixup:
            base = self._mixup.plan(x, y, generator=generator)
            self._base = (x, base, base.target(y, kind=kind))
        return plan.blend(x), target

    def loss(self, criterion: Callable[[Tensor, MixedTarget | Tensor], Tensor]) -> Tensor | None:
        """The model's loss on the last batch under Mixup."""
        if self._base is None:
            return None
        (x, plan, target), self._base = self._base, None
        model = without_ddp(self.tap.model)
        logits = logits_of("MergeMix", model(model_input("MergeMix", model, plan.blend(x))))
        return self.mixup * criterion(logits, target)

    def disarm(self) -> None:
        super().disarm()
        self._base = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the model and without a batch that waits for its loss."""
        return {**self.__dict__, "_base": None}

    def _map(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(map (N, rows, columns), its grid) of a forward on merged tokens."""
        if not self.merge:
            _, found, grid = self._measure(x)
            return found, grid
        model, size = self.tap.model, (x.shape[2], x.shape[3])
        blocks = [block_of(model, name) for name in self.tap.names]
        merger = TokenMerger(self.merge, x.shape[0], len(blocks), lambda tokens: self.tap.grid(size, tokens))
        handles = [block.register_forward_hook(merger.close_block) for block in blocks[:-1]]
        try:
            with merger:
                self.tap.run(x, autocast=self._autocast)
        except RuntimeError as error:
            if merger.place is None or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ValueError(
                f"MergeMix: the {type(model).__name__} does not run on merged tokens ({error}); pass merge=0."
            ) from None
        finally:
            for handle in handles:
                handle.remove()
        if merger.attention is None or merger.grid is None:
            raise ValueError(
                f"MergeMix: the {type(model).__name__} ran without F.scaled_dot_product_attention and without a "
                "softmax of scores (N, heads, tokens, tokens); switch its own kernel off, or pass merge=0."
            )
        return merger.patch_map(self.tap.has_class_token(merger.grid)), merger.grid


class TokenMerger(TorchFunctionMode):
    """Merges tokens while a model runs under it, and holds the last block's attention.

        after each block but the last:  the most alike pairs of patches (cosine of the keys, mean over the heads)
                                        become one token, their mean weighted by the patches that they stand for
        attention:                      softmax(scores + log of that number)

    `share` of the patches are merged in all; the tokens before the patches never are. `close_block` is a forward hook
    for each block.

    Attributes:
        attention: the attention that ran last.
        grid: the patches, once the first attention has run.
        place: (N, patches) which of the patch tokens now stands for each patch; None before the first merge.
        sizes: (N, tokens) how many patches each token stands for; None before the first merge.
    Reference: Bolya et al. 2023 (arXiv:2210.09461). There a merge comes between the attention and the MLP of a block;
    here after the block, so that any block can be used as it is.
    """

    def __init__(self, share: float, images: int, blocks: int, layout: Callable[[int], Grid]) -> None:
        super().__init__()
        self.share, self.images, self.blocks, self.layout = share, images, blocks, layout
        self.attention: Attention | None = None
        self.grid: Grid | None = None
        self.place: Tensor | None = None
        self.sizes: Tensor | None = None
        self._keys: Tensor | None = None
        self._counts: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), args, strict=False)) | kwargs
            bias, mask = self._bias(given["query"].dtype), given.get("attn_mask")
            if bias is not None and mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, -torch.inf)
            if bias is not None:
                given["attn_mask"] = bias if mask is None else bias + mask
            self._see(of_fused(**given), given["key"])
            return func(**given)
        if func in _PRODUCTS and len(args) == 2 and args[0].ndim == args[1].ndim == 4:
            scores = func(*args, **kwargs)
            if self._keys is None and scores.shape[-2] == scores.shape[-1]:
                self._keys = args[1].transpose(-2, -1)
            return scores
        if func in SOFTMAX and args and args[0].ndim == 4:
            bias = self._bias(args[0].dtype)
            weights: Tensor = func(args[0] if bias is None else args[0] + bias, *args[1:], **kwargs)
            self._see(Attention(weights), self._keys)
            return weights
        return func(*args, **kwargs)

    def close_block(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The block's output with its most alike tokens merged."""
        keys, self._keys = self._keys, None
        if keys is None or self.grid is None:
            raise ValueError(
                f"MergeMix: one of the blocks, a {type(module).__name__}, ran without F.scaled_dot_product_attention "
                "and without a product of queries and keys, so its tokens can't be merged; pass merge=0."
            )
        x = output if isinstance(output, Tensor) else output[0]
        count = min(self._counts.pop(0) if self._counts else 0, (x.shape[1] - self.grid.prefix) // 2)
        if count <= 0:
            return None
        x = self._merge(x, keys.to(torch.float32).mean(1), count, self.grid.prefix)
        return x if isinstance(output, Tensor) else (x, *output[1:])

    def patch_map(self, by_class_token: bool) -> Tensor:
        """(N, rows, columns): what the token that stands for each patch is given by the class token, or by the patches
        on average, in the mean over the heads."""
        assert self.attention is not None
        assert self.grid is not None
        first = self.grid.prefix
        if by_class_token:
            given = self.attention.weights(1).mean(1)[:, 0, first:]
        else:
            weights = self.attention.weights().mean(1)[:, first:, first:]
            sizes = torch.ones_like(weights[:, 0]) if self.sizes is None else self.sizes[:, first:].to(weights.dtype)
            given = torch.bmm(sizes[:, None], weights)[:, 0] / sizes.sum(1, keepdim=True)
        given = given if self.place is None else given.gather(1, self.place)
        return given.unflatten(1, (self.grid.rows, self.grid.columns))

    def _see(self, attention: Attention, keys: Tensor | None) -> None:
        if attention.images != self.images:
            raise ValueError(
                f"MergeMix: an attention has {attention.images} rows for {self.images} images (attention within "
                "windows sees no whole image); take another policy."
            )
        self.attention, self._keys = attention, keys
        if self.grid is None:
            self.grid = self.layout(attention.tokens)
            self._counts = merge_counts(int(self.share * self.grid.patches), self.blocks)

    def _merge(self, x: Tensor, keys: Tensor, count: int, first: int) -> Tensor:
        to = match(keys[:, first:], count)  # (N, patch tokens now)
        tokens = torch.cat([torch.arange(first, device=x.device).expand(x.shape[0], -1), to + first], 1)  # (N, T)
        wide = x.to(torch.float32)
        sizes = wide.new_ones(wide.shape[:2]) if self.sizes is None else self.sizes
        merged = wide.new_zeros(x.shape[0], x.shape[1] - count, x.shape[2])
        merged.scatter_add_(1, tokens[:, :, None].expand_as(x), wide * sizes[:, :, None])
        self.sizes = sizes.new_zeros(merged.shape[:2]).scatter_add_(1, tokens, sizes)
        self.place = to if self.place is None else to.gather(1, self.place)
        return (merged / self.sizes[:, :, None]).to(x.dtype)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """log of the tokens' sizes, (N, 1, 1, T); None while all are 1."""
        return None if self.sizes is None else self.sizes.log().to(dtype)[:, None, None]


def block_of(model: nn.Module, name: str) -> nn.Module:
    """The block that an attention belongs to: the nearest module around it, or itself, that stands in a list."""
    modules = dict(model.named_modules())
    while name:
        around = name.rpartition(".")[0]
        if isinstance(modules[around], (nn.ModuleList, nn.Sequential)):
            return modules[name]
        name = around
    return model
