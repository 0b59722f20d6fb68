"""m2-Mix in the `Trainer` of Hugging Face transformers, which is imported when `M2MixTrainer` is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hardmix import _check
from hardmix.losses import M2MixLoss, M2MixSigLipLoss


def pair_losses(loss: nn.Module, model: nn.Module, outputs: Any, **draws: Any) -> dict[str, Tensor]:
    """The terms of `loss` for what `model` has made of a batch, as {"contrastive_loss": ., "m2mix_loss": .}.

    Args:
        loss: a loss of `hardmix.losses` with open_clip's call: `M2MixLoss`, or `M2MixSigLipLoss` for a SigLIP.
        model: with `logit_scale`, the logarithm of the scale, and perhaps `logit_bias`; DDP and compile may wrap it.
        outputs: with `image_embeds` and `text_embeds`, (N, D).
        draws: `lam` or `generator` of the call.

    Raises:
        TypeError: a model or outputs without these.
    """
    core = model
    while isinstance(inner := getattr(core, "module", getattr(core, "_orig_mod", None)), nn.Module):
        core = inner
    scale: Any = getattr(core, "logit_scale", None)
    image, text = getattr(outputs, "image_embeds", None), getattr(outputs, "text_embeds", None)
    if not all(isinstance(value, Tensor) for value in (scale, image, text)):
        raise TypeError(
            f"pair_losses: model is a {type(core).__name__}; pass a CLIP or SigLIP, with logit_scale and, in its "
            "outputs, image_embeds and text_embeds."
        )
    return loss(image, text, scale.exp(), getattr(core, "logit_bias", None), output_dict=True, **draws)


def loss_func(loss: nn.Module, model: nn.Module, *, accumulation_steps: int = 1) -> Callable[..., Tensor]:
    """A `compute_loss_func` for a `Trainer` that can't be subclassed; that says at each pass that it has no labels.

    `loss` and `model` are those of `pair_losses`; the outputs alone lack the scale. `accumulation_steps` is the
    Trainer's `gradient_accumulation_steps`, by which it does not divide such a loss.
    """
    _check.integer("loss_func", "accumulation_steps", accumulation_steps, 1)

    def compute(outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
        return torch.stack(list(pair_losses(loss, model, outputs).values())).sum() / accumulation_steps

    return compute


def with_return_loss(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator whose batches ask for the loss, without which a plain `Trainer` has no `eval_loss` for a CLIP."""
    return lambda samples: {**collate(samples), "return_loss": True}


class M2MixTrainerMixin:
    """Stands before a `Trainer` in the bases of a class that trains a CLIP or SigLIP with m2-Mix.

    In training the loss is that of `m2mix`, in evaluation its contrast alone, so that `eval_loss` has no draws in it.
    It is a mean over the pairs of a pass, and is averaged over `gradient_accumulation_steps`. Batches need no
    `return_loss`. A schedule is told the epoch.

    Args:
        m2mix: None for `M2MixLoss()`, or `M2MixSigLipLoss()` for a model with a `logit_bias`.
        args, kwargs: the Trainer's.

    Attributes:
        last_losses: the terms of the last pass, detached.

    Raises:
        TypeError: another loss.
        ValueError: `compute_loss_func` or label smoothing, which would have no effect.
    """

    def __init__(self, *args: Any, m2mix: M2MixLoss | None = None, **kwargs: Any) -> None:
        who = type(self).__name__
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{who}: compute_loss_func would have no effect; pass m2mix instead.")
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.label_smoother is not None:
            raise ValueError(f"{who}: label_smoothing_factor would have no effect; leave it at 0.")
        if m2mix is None:
            m2mix = M2MixLoss() if getattr(trainer.model, "logit_bias", None) is None else M2MixSigLipLoss()
        if not isinstance(m2mix, M2MixLoss):
            raise TypeError(f"{who}: m2mix is a {type(m2mix).__name__}; pass an M2MixLoss or M2MixSigLipLoss.")
        self.m2mix = m2mix
        self.last_losses: dict[str, Tensor] = {}
        self.can_return_loss = True
        self.model_accepts_loss_kwargs = False  # the loss is a mean over each pass, which the Trainer has to divide

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: value for name, value in inputs.items() if name != "return_loss"})
        if model.training:
            trainer: Any = self
            self.m2mix.set_epoch(int(trainer.state.epoch or 0))
            terms = pair_losses(self.m2mix, model, outputs)
            loss = terms["contrastive_loss"] + terms["m2mix_loss"]
        else:
            terms = pair_losses(self.m2mix, model, outputs, lam=0.5)  # a lam of its own draws nothing
            loss = terms["contrastive_loss"]
        self.last_losses = {name: value.detach() for name, value in terms.items()}
        return (loss, outputs) if return_outputs else loss


def __getattr__(name: str) -> Any:
    """`M2MixTrainer`: `M2MixTrainerMixin` before transformers' `Trainer`."""
    if name != "M2MixTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from transformers.trainer import Trainer
    except ImportError:
        raise ImportError("M2MixTrainer needs transformers; pip install transformers accelerate.") from None
    globals()[name] = made = type(name, (M2MixTrainerMixin, Trainer), {"__doc__": M2MixTrainerMixin.__doc__})
    return made
