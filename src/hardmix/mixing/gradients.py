"""What a model says of the pixels of its input, asked without leaving a trace in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hardmix import _check
from hardmix._math import wide


def input_saliency(model: nn.Module, x: Tensor, y: Tensor | None, *, who: str = "input_saliency") -> Tensor:
    """How much the loss of each sample hangs on each of its pixels.

        s_p = sqrt( mean over the channels c of (dCE / dx_cp)^2 ),   CE the cross entropy of model(x) with the labels y

    One forward and one backward, which goes to the input alone: no parameter's gradient is computed or added to. See
    `undisturbed` for the state that the model is asked in.

    Args:
        model: (N, C, *spatial) -> logits (N, classes), or what `logits_of` finds them in. It gets `x` as it is, in the
            dtype of its own weights.
        x: (N, C, *spatial) floats with 1 to 3 spatial axes.
        y: (N,) class ids, or (N, classes) one-hot, multi-hot or soft rows.
        who: what error messages call the caller.

    Returns:
        (N, *spatial) without a gradient, float32, or float64 from a float64 model. With batch statistics the rows hang
        together; the loss is then that of the whole batch. A model that looks at nothing gives zeros; one that puts out
        NaN gives NaN.

    Raises:
        TypeError: uint8 images, which have no gradient, or another kind of model, output or label.
        ValueError: `y` is None or doesn't fit the logits, a class out of range (looked at on the CPU only), a model
            that works without gradients.
        RuntimeError: under torch.inference_mode.

    Reference: Simonyan et al. 2013 (arXiv:1312.6034), in the form of Kim et al. 2020 (arXiv:2009.06962). Their code and
    OpenMixup run `loss.backward()` and then clear the gradients of all parameters, those of earlier batches included.
    """
    check_model(who, model)
    x = _check.batch(who, "x", x, 3, 5)
    check_mode(who)
    with undisturbed(model, batch_statistics=x.shape[0] > 1), torch.enable_grad():
        pixels = model_input(who, model, x).requires_grad_()
        loss = _cross_entropy(who, logits_of(who, model(pixels)), y)
        if not loss.requires_grad:
            raise ValueError(f"{who}: the model's output has no gradient; pass a model that works with gradients.")
        (gradient,) = torch.autograd.grad(loss, pixels, materialize_grads=True)
    return gradient.to(wide(gradient.dtype)).square().mean(1).sqrt_()


@contextmanager
def undisturbed(model: nn.Module, *, batch_statistics: bool = True) -> Iterator[None]:
    """Ask a model something in the middle of its training, and leave everything in it as it was.

    Inside, modules are in evaluation mode: nothing is dropped, so the answer doesn't hang on chance and no random state
    moves; hooks of a hidden mixing policy sleep; nothing is tracked. Batch norms that are in training mode go on with
    the statistics of the batch, as in the forward that the answer is for, but don't write them down: the running ones
    lag behind, most of all early in the training. Outside, running statistics, their counters, training flags,
    `requires_grad` and accumulated gradients are those of before, also where the forward fails.

    Args:
        batch_statistics: False puts batch norms into evaluation mode, too: for a frozen model, and for a single row,
            which may have one value per channel and so no variance.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [m for m, training in modes if training and batch_statistics and isinstance(m, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for norm, flag in zip(norms, tracked, strict=True):
            norm.track_running_stats = flag


def hidden_map(
    who: str,
    model: nn.Module,
    x: Tensor,
    layer: str = "",
    *,
    batch_statistics: bool = False,
    channels: int | None = None,
) -> tuple[str, Tensor]:
    """The output of a layer for the images `x`: its name and the map (N, D, h, w), without a gradient. One forward.

    Args:
        layer: a submodule's name. An empty one stands for the last module whose output has four axes and more than one
            pixel: the place before the pooling, whatever it is called.
        channels: D that the map has to have.
    """
    modules = {name: module for name, module in model.named_modules() if layer in ("", name)}
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[0] != x.shape[0]:
            return
        if layer or (output.shape[2] * output.shape[3] > 1 and channels in (None, output.shape[1])):
            kept.clear()  # only the last one stays in memory
            kept[name] = output

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]
    try:
        with undisturbed(model, batch_statistics=batch_statistics), torch.no_grad():
            model(model_input(who, model, x))
    finally:
        torch.clear_autocast_cache()  # weights cast without a graph must not serve the training forward
        for handle in handles:
            handle.remove()
    of_channels = "" if channels is None else f" of {channels} channels, which the head reads"
    if not kept:
        what = f"layer {layer!r} put out no map" if layer else "no layer of the model puts out a map"
        raise ValueError(f"{who}: {what} (N, D, h, w){of_channels}; name a convolutional layer.")
    ((name, found),) = kept.items()
    if channels is not None and found.shape[1] != channels:
        raise ValueError(
            f"{who}: layer {name!r} put out {found.shape[1]} channels but the head reads {channels}; name the last map."
        )
    return name, found


def check_model(who: str, model: object) -> nn.Module:
    """A module, not its name or its weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is a {type(model).__name__}; pass a torch.nn.Module.")
    return model


def without_ddp(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, compiled or not; of other models the model itself.

    A forward of the wrapper waits for the other ranks, which may ask less often or at another time.
    """
    inside = getattr(model, "_orig_mod", model)
    return inside.module if isinstance(inside, nn.parallel.DistributedDataParallel) else model


def check_layer(who: str, argument: str, model: nn.Module, name: object) -> str:
    """The name of a submodule, or "" for the one that is looked for."""
    if not isinstance(name, str):
        raise TypeError(f"{who}: {argument} is {name!r}; pass the name of a submodule.")
    names = [known for known, _ in model.named_modules()]
    if name not in names:
        near = _check.did_you_mean(name, filter(None, names))
        raise ValueError(
            f"{who}: {argument} names {name!r}, which the model does not have{near}; "
            "pass a name from model.named_modules()."
        )
    return name


def model_input(who: str, model: nn.Module, x: Tensor) -> Tensor:
    """`x` detached, in the dtype of the model's weights."""
    if not x.is_floating_point():
        raise TypeError(
            f"{who}: x has dtype {x.dtype}, which the model can't be asked with; pass floating-point images."
        )
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        return trackable(x.detach())
    _check.same_device(who, "x", x, "the model", weight.device)
    return trackable(x.detach().to(weight.dtype))


def trackable(x: Tensor) -> Tensor:
    """`x`, or a copy where it was made under torch.inference_mode, since autograd takes no such tensor."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def check_mode(who: str) -> None:
    """torch.inference_mode, which `torch.enable_grad` does not end, leaves nothing to differentiate."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{who}: torch.inference_mode is on, under which the model has no gradients; call it outside, or under "
            "torch.no_grad."
        )


def logits_of(who: str, output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, the first entry of a tuple, or what is called `logits`."""
    if isinstance(getattr(output, "logits", None), Tensor):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"{who}: the model returned a {type(output).__name__}; let it return logits (N, C).")
    return output


def _cross_entropy(who: str, logits: Tensor, y: Tensor | None) -> Tensor:
    """Summed over the rows, so that the gradient of a row doesn't hang on how many there are."""
    if logits.ndim != 2:
        raise TypeError(
            f"{who}: the model returned shape {tuple(logits.shape)}; pass a model that returns logits (N, classes)."
        )
    if y is None:
        raise ValueError(f"{who}: y is None; pass the labels, whose loss the model is asked about.")
    y = trackable(_check.tensor(who, "y", y))
    _check.same_length(who, "y", y, "x", logits.shape[0])
    _check.same_device(who, "y", y, "x", logits.device)
    logits = logits.to(wide(logits.dtype))
    if y.ndim == 1 and not y.is_floating_point():
        _check.classes_in_range(who, "y", y, logits.shape[1])
        return F.cross_entropy(logits, y.long(), reduction="sum")
    if y.shape != logits.shape:
        raise ValueError(
            f"{who}: y has shape {tuple(y.shape)} and dtype {y.dtype} but the logits have {tuple(logits.shape)}; "
            "pass class ids (N,) or rows (N, classes)."
        )
    return F.cross_entropy(logits, y.to(logits.dtype), reduction="sum")
