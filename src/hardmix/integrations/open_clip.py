"""open_clip's losses with m2-Mix in them, and `create_loss` in the place of its own. open_clip itself is not imported.

open_clip's training loops call `loss(**model_out, output_dict=True)` and add up what comes back: those of 3.x every
value, that of the main branch those whose name ends in `_loss`. Both get terms of the loss alone.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hardmix import _check
from hardmix.losses import M2MixLoss, M2MixSigLipLoss
from hardmix.losses.caption import CaptionLoss


class M2MixClipLoss(M2MixLoss):
    """`M2MixLoss` with the arguments of open_clip's `ClipLoss`, in their order: same call, {"contrastive_loss": .,
    "m2mix_loss": .}.

    Args:
        local_loss, gather_with_grad, cache_labels: without effect, see `ClipLoss` of `hardmix.losses`.
        rank, world_size: those of the process group; None takes them from there.
        use_horovod: False.
        m2mix: settings of `M2MixLoss`: weight, alpha, temperature, accumulate ...

    >>> import torch
    >>> loss = M2MixClipLoss(gather_with_grad=True, weight=0.01)
    >>> sorted(loss(torch.randn(8, 16), torch.randn(8, 16), 100.0, output_dict=True))
    ['contrastive_loss', 'm2mix_loss']
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool = False,
        **m2mix: Any,
    ) -> None:
        places: dict[str, Any] = {"rank": rank, "world_size": world_size}
        given = {name: value for name, value in places.items() if value is not None}
        super().__init__(use_horovod=use_horovod, **given, **m2mix)


class M2MixCoCaLoss(M2MixClipLoss):
    """`M2MixClipLoss` with captions, in the place of open_clip's `CoCaLoss`: the same arguments and call.

        L = clip_loss_weight (L_CLIP + w f(e) L_m2) + caption_loss_weight L_caption

    Where labels are all `pad_id` the captions' part is 0, not NaN. With several processes it is the mean over the
    tokens of all of them, where open_clip has the mean of the processes' means.

    Args:
        caption_loss_weight, clip_loss_weight: of the parts; the latter greater than 0, since m2-Mix is in there.
        pad_id: the label that does not count.
        open_clip: what `M2MixClipLoss` takes.

    Returns:
        (contrast, captions), or {"contrastive_loss": ., "m2mix_loss": ., "caption_loss": .} for `output_dict=True`.
    """

    def __init__(
        self, caption_loss_weight: float, clip_loss_weight: float, pad_id: int = 0, *args: Any, **open_clip: Any
    ) -> None:
        super().__init__(*args, **open_clip)
        who = type(self).__name__
        self.caption_loss_weight = _check.non_negative(who, "caption_loss_weight", caption_loss_weight)
        self.clip_loss_weight = _check.positive(who, "clip_loss_weight", clip_loss_weight)
        self.caption = CaptionLoss(padding=_check.integer(who, "pad_id", pad_id, 0), gather=self.gather)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
        **draws: Any,
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """The loss of features (N, D), logits (N, L, V) and the tokens (N, L) that they are for; see the class."""
        contrast = super().forward(image_features, text_features, logit_scale, output_dict=True, **draws)
        terms = {name: self.clip_loss_weight * value for name, value in dict(contrast).items()}
        # `CaptionLoss` is told whole captions, and never asks for their first token.
        ids = F.pad(_check.tensor(type(self).__name__, "labels", labels), (1, 0))
        caption = self.caption_loss_weight * self.caption(logits, ids)
        if output_dict:
            return {**terms, "caption_loss": caption}
        return terms["contrastive_loss"] + terms["m2mix_loss"], caption


def create_loss(args: Any, **m2mix: Any) -> M2MixLoss:
    """open_clip's `create_loss(args)`, with m2-Mix: `M2MixClipLoss`, or that for CoCa or SigLIP where `args` says so.

    `--accum-freq` calls of one step share a lambda. `m2mix` are settings of the loss.

    Raises:
        ValueError: `args.distill`, which has no m2-Mix.

    >>> from argparse import Namespace
    >>> create_loss(Namespace(model="ViT-B-32", rank=0, world_size=1, accum_freq=4), weight=0.02)
    M2MixClipLoss(weight=0.02, alpha=0.5, temperature=0.07, schedule=None)
    """
    if getattr(args, "distill", False):
        raise ValueError("create_loss: args.distill is set; leave it out, distillation has no m2-Mix.")
    places = {name: getattr(args, name, None) for name in ("rank", "world_size")}
    settings = {
        "accumulate": getattr(args, "accum_freq", 1),
        "use_horovod": getattr(args, "horovod", False),
        **{name: value for name, value in places.items() if value is not None},
        **m2mix,
    }
    if "coca" in args.model.lower():
        return M2MixCoCaLoss(args.coca_caption_loss_weight, args.coca_contrastive_loss_weight, **settings)
    return (M2MixSigLipLoss if getattr(args, "siglip", False) else M2MixClipLoss)(**settings)
