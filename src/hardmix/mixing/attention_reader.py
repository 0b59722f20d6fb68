"""What a block of a transformer attends with, read from its own forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hardmix._math import wide
from hardmix.mixing.gradients import undisturbed

#: A module is an attention if it holds its projections under one of these names, or is torch's own.
_PROJECTIONS = (
    ("qkv",),
    ("to_qkv",),
    ("Wqkv",),
    ("q", "k"),
    ("query", "key"),
    ("q_proj", "k_proj"),
    ("to_q", "to_k"),
    ("wq", "wk"),
)
#: The functions that turn scores into attention where no fused kernel does.
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Attention:
    """What one block attends with; the weights are computed when they are asked for.

    Either `weights` as the model computed them, or queries and keys (N, heads, tokens, D) with what is added to their
    scores, where a fused kernel keeps the weights to itself.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        scale: float | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> None:
        """With `k` None, `q` holds the weights."""
        self._q, self._k, self._scale, self._mask, self._causal = q, k, scale, mask, causal

    @property
    def images(self) -> int:
        return self._q.shape[0]

    @property
    def device(self) -> torch.device:
        return self._q.device

    @property
    def tokens(self) -> int:
        return self._q.shape[-1] if self._k is None else self._k.shape[-2]

    def weights(self, queries: int | None = None) -> Tensor:
        """(N, heads, queries, tokens) shares that sum to 1 over the tokens, of the first `queries` or of all.

        float32, or float64 for a model in float64: half types are multiplied in float32.
        """
        if self._k is None:
            return self._q[:, :, :queries].to(wide(self._q.dtype))
        q = self._q[:, :, :queries].to(wide(self._q.dtype))
        k = self._k.to(q.dtype)
        if k.shape[1] != q.shape[1]:  # heads share their keys
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scale = q.shape[-1] ** -0.5 if self._scale is None else self._scale
        scores = q * scale @ k.transpose(-2, -1)  # the queries are fewer numbers than the scores
        mask = self._mask
        if self._causal:
            mask = torch.ones(self._q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            mask = mask[..., :queries, :] if mask.shape[-2] > 1 else mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)


class _Found(BaseException):
    """Carries the attention out of a forward; no `except Exception` of a model keeps it."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention


class _Reader(TorchFunctionMode):
    """Ends a forward where it comes to its attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            raise _Found(of_fused(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            asked = {"need_weights": True, "average_attn_weights": False, "training": False}
            attended: Any = func(*args, **{**kwargs, **asked})
            raise _Found(Attention(attended[1]))
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4:
            raise _Found(Attention(out))
        return out


def read_attention(who: str, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attention:
    """The attention of a module on its input, by running it up to there."""
    try:
        # In evaluation mode nothing is drawn again; batch norms still normalise by the batch, but don't count it twice.
        with undisturbed(module), _Reader():
            module.forward(*args, **kwargs)
    except _Found as found:
        return found.attention
    raise ValueError(
        f"{who}: {name!r}, a {type(module).__name__}, ran without F.scaled_dot_product_attention and without a softmax "
        "of scores (N, heads, tokens, tokens); switch its own kernel off, or name another module as layer."
    )


def of_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    """From the arguments of `F.scaled_dot_product_attention`."""
    return Attention(query, key, scale=scale, mask=attn_mask, causal=is_causal)


def is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    held = {name for name, child in module.named_children()}
    return any(held.issuperset(names) for names in _PROJECTIONS)
