"""A tuned model between its weights and those it started from: WiSE-FT's line, and TPGM's ball around the start.

Weights are state dicts, names to tensors, and results are new ones to be loaded: nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hardmix import _check
from hardmix._math import wide
from hardmix.metrics.robustness import _evaluating

NORMS = ("l2", "rows")


def wise_ft(zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """WiSE-FT: the weights between those before and those after tuning, on a straight line.

        w = (1 - alpha) w_zero_shot + alpha w_fine_tuned

    Args:
        zero_shot, fine_tuned: state dicts of one architecture, head and running statistics included.
        alpha: from 0, the zero-shot weights bit by bit, to 1, the fine-tuned ones, whatever the other end holds. The
            authors try 0, .1, .., 1.

    Returns:
        New tensors, in the order of the fine-tuned ones, in their dtypes and on their devices; sums are done in float32
        or wider. What both have equal stays as it is, the infinities of a mask included; otherwise NaN and infinity in
        either give no finite number between the ends. Integers and booleans (counters of batches, positions) have
        nothing between them and are the fine-tuned ones, also at alpha = 0. Running statistics are averaged like
        weights; of a model with batch normalisation they are better measured again.

    Raises:
        TypeError: not a mapping of names to tensors.
        ValueError: a name that one of the two lacks, other shapes, alpha out of range. A head that only the tuned model
            has must be given to the other one too, or left out of both.

    Reference: Wortsman et al. 2022 (arXiv:2109.01903).

    >>> wise_ft({"w": torch.zeros(2)}, {"w": torch.tensor([4.0, 8.0])}, 0.25)
    {'w': tensor([1., 2.])}
    """
    who = "wise_ft"
    alpha = _check.between(who, "alpha", alpha, 0.0, 1.0)
    before, after = _state(who, "zero_shot", zero_shot), _state(who, "fine_tuned", fine_tuned)
    for name, other, found in (("fine_tuned", "zero_shot", before), ("zero_shot", "fine_tuned", after)):
        missing = [key for key in found if key not in (after if found is before else before)]
        if missing:
            raise ValueError(f"{who}: {name} lacks {_some(missing)} of {other}; pass weights of one architecture.")
    for key, value in after.items():
        _same_shape(who, key, "zero_shot", before[key], "fine_tuned", value)
    share = torch.tensor(alpha, dtype=torch.float64)
    result = {}
    for key, value in after.items():
        if alpha == 1.0 or not _is_measure(value):
            result[key] = value.detach().clone()
        elif alpha == 0.0:  # not the other end times 0, which NaN and infinity would outlive
            result[key] = before[key].detach().to(value, copy=True)
        else:
            result[key] = _between(before[key], value, share)
    return result


def project(
    fine_tuned: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    radii: Mapping[str, Tensor | float],
    *,
    norm: str = "l2",
) -> dict[str, Tensor]:
    """TPGM's projection: each tensor pulled back into a ball around where it started.

        w = w_0 + min(1, radius / ||w_1 - w_0||) (w_1 - w_0)

    Args:
        fine_tuned: w_1, a state dict.
        reference: w_0, the state dict before tuning; it needs the tensors that have a radius, and may lack others.
        radii: name to radius, at least 0: a number or a tensor of one element. Names without one stay as tuned.
        norm: "l2" of the whole tensor; or "rows", the sum of absolute values of each row (first axis), each held to the
            tensor's radius; a tensor of fewer than two axes is one row.

    Returns:
        The fine-tuned state dict with new tensors for the names in `radii`, in their dtypes and on their devices; sums
        are done in float32 or wider. A radius of 0 gives w_0, one that reaches w_1 gives w_1, both bit by bit, and
        a tensor that was not tuned stays. That is for finite weights: NaN and infinity are at no distance from others,
        and end as NaN. Differentiable in the radii; where the radius is beyond w_1, the slope is 0.

    Raises:
        TypeError: not a mapping of names to tensors, a radius of another kind.
        ValueError: a radius for a name that one of the two lacks, for integers, or a negative one; other shapes.

    Reference: Tian et al. 2023 (arXiv:2303.10720). The authors' code lacks the minimum, which with "rows" stretches the
    rows that moved less than the radius.

    >>> project({"w": torch.tensor([3.0, 4.0])}, {"w": torch.zeros(2)}, {"w": 1.0})
    {'w': tensor([0.6000, 0.8000])}
    """
    who = "project"
    _check.choice(who, "norm", norm, NORMS)
    after, before = _state(who, "fine_tuned", fine_tuned), _state(who, "reference", reference)
    if not isinstance(radii, Mapping):
        raise TypeError(f"{who}: radii is a {type(radii).__name__}; pass a dict of names and radii.")
    result = dict(after)
    for key, radius in radii.items():
        for name, state in (("fine_tuned", after), ("reference", before)):
            if key not in state:
                raise ValueError(
                    f"{who}: radii names {key!r}, which {name} lacks{_check.did_you_mean(str(key), state)}; pass names "
                    "of both."
                )
        if not after[key].is_floating_point():
            raise ValueError(f"{who}: radii names {key!r} of dtype {after[key].dtype}; pass names of weights.")
        _same_shape(who, key, "reference", before[key], "fine_tuned", after[key])
        result[key] = _pulled(after[key], before[key], _radius(who, key, radius), norm)
    return result


def fit_radii(
    model: nn.Module,
    reference: Mapping[str, Tensor],
    objective: Callable[[Callable[..., Any], Any], Tensor],
    batches: Iterable[Any],
    *,
    norm: str = "l2",
    lr: float = 1e-2,
    steps: int = 200,
    exclude: Iterable[str] = (),
) -> dict[str, Tensor]:
    """TPGM: one radius per tensor, learnt on data that the model was not tuned with.

        radii = argmin objective(model with `project`ed weights), by Adam, each held between 0 and ||w_1 - w_0||

    A radius starts at half of that length ("rows": of the smallest of its rows). Once, after the tuning, is what the
    authors do with CLIP; `model.load_state_dict(project(model.state_dict(), reference, radii))` applies the result.

    Args:
        model: the tuned model. It runs in evaluation mode, and is as before afterwards.
        reference: its state dict before tuning.
        objective: `objective(forward, batch)` gives the loss, a tensor of one element; `forward` calls the model with
            projected weights: `lambda forward, batch: cross_entropy(forward(batch[0]), batch[1])`.
        batches: of validation data, on the model's device; a list or a loader, gone through again when it ends.
        norm: "l2" or "rows", see `project`.
        lr: Adam's learning rate, in the unit of the weights' distances.
        steps: number of batches that radii are moved for.
        exclude: names of parameters that stay as tuned, such as a new head.

    Returns:
        name to radius, a tensor () in float32 or wider, for each parameter that requires a gradient and is not
        excluded; names of tied parameters share theirs.

    Raises:
        TypeError: not a module, a setting of another kind.
        ValueError: no parameter is left, `reference` lacks one or has another shape, an unknown name in `exclude`, no
            batches, or a loss that is not one finite number made with `forward`.

    Reference: Tian et al. 2023 (arXiv:2303.10720); learning rate and steps are those of the authors' code for ImageNet.
    """
    who = "fit_radii"
    _check.choice(who, "norm", norm, NORMS)
    lr, steps = _check.positive(who, "lr", lr), _check.integer(who, "steps", steps, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is a {type(model).__name__}; pass a torch.nn.Module.")
    tuned, start = _chosen(who, model, _state(who, "reference", reference), exclude)
    lengths = {key: _length(tuned[key], start[key], norm) for key in tuned}
    radii = {key: (0.5 * length.min()).requires_grad_() for key, length in lengths.items()}
    adam = torch.optim.Adam(radii.values(), lr=lr)
    with _evaluating(model), torch.enable_grad():
        for step, batch in enumerate(islice(_again(who, batches), steps)):
            weights = {key: _pulled(tuned[key], start[key], radius, norm) for key, radius in radii.items()}
            loss = _loss(who, objective(_caller(model, weights), batch), step)
            slopes = torch.autograd.grad(loss, list(radii.values()), allow_unused=True)
            for radius, slope in zip(radii.values(), slopes, strict=True):
                radius.grad = slope
            adam.step()
            with torch.no_grad():
                for key, radius in radii.items():
                    radius.clamp_(min=0.0).clamp_(max=lengths[key].max())
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    return {
        key: radii[names[id(parameter)]].detach().clone()
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if names[id(parameter)] in radii
    }


def _chosen(
    who: str, model: nn.Module, reference: dict[str, Tensor], exclude: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that get a radius, as tuned and as they were, both without a gradient."""
    own = dict(model.named_parameters())
    left_out = {exclude} if isinstance(exclude, str) else set(exclude)
    for key in sorted(left_out):
        if key not in own:
            raise ValueError(
                f"{who}: exclude names {key!r}, which the model lacks{_check.did_you_mean(key, own)}; pass names of "
                "its parameters."
            )
    tuned = {key: value.detach() for key, value in own.items() if value.requires_grad and key not in left_out}
    if not tuned:
        raise ValueError(f"{who}: model has no parameter that requires a gradient and is not excluded; pass one.")
    missing = [key for key in tuned if key not in reference]
    if missing:
        raise ValueError(
            f"{who}: reference lacks {_some(missing)} of the model; pass the state before tuning, or exclude these."
        )
    for key, value in tuned.items():
        _same_shape(who, key, "reference", reference[key], "the model", value)
    return tuned, {key: reference[key].detach() for key in tuned}


def _caller(model: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Any]:
    return lambda *args, **kwargs: functional_call(model, weights, args, kwargs)


def _again(who: str, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches without an end."""
    while True:
        some = False
        for batch in batches:
            some = True
            yield batch
        if not some:
            raise ValueError(
                f"{who}: batches is empty or was gone through; pass a list or a loader with batches in it."
            )


def _loss(who: str, loss: Tensor, step: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"{who}: objective gave {'a tensor' if isinstance(loss, Tensor) else f'a {type(loss).__name__}'} that is "
            "no loss of one element made with `forward`; pass one that calls `forward` and keeps the gradient."
        )
    if not math.isfinite(value := loss.item()):
        raise ValueError(f"{who}: objective is {value} at step {step}; repair its data or lower lr.")
    return loss.reshape(())


def _length(after: Tensor, before: Tensor, norm: str) -> Tensor:
    """How far a tensor moved: (), or with "rows" one number for each row, to be broadcast with it."""
    dtype = wide(after.dtype)
    moved = after.to(dtype) - before.to(after.device, dtype)
    if norm == "l2":
        return torch.linalg.vector_norm(moved)
    return moved.abs().sum() if moved.ndim < 2 else moved.abs().sum(tuple(range(1, moved.ndim)), keepdim=True)


def _pulled(after: Tensor, before: Tensor, radius: Tensor, norm: str) -> Tensor:
    length = _length(after, before, norm)
    share = radius.to(length) / length.masked_fill(length == 0.0, 1.0)
    return _between(before, after, share.clamp(max=1.0))


def _between(before: Tensor, after: Tensor, share: Tensor) -> Tensor:
    """The point at `share` of the way, which at 0 and 1 is either end without rounding, if both are finite."""
    dtype = after.dtype if after.is_complex() else wide(after.dtype)
    start, end = before.detach().to(after.device, dtype), after.detach().to(dtype)
    # Equal infinities have no difference.
    return torch.where(start == end, end, torch.lerp(start, end, share.to(end))).to(after.dtype)


def _radius(who: str, key: str, radius: Tensor | float) -> Tensor:
    if not isinstance(radius, Tensor):
        return torch.tensor(_check.non_negative(who, f"radii[{key!r}]", radius), dtype=torch.float64)
    if radius.numel() != 1 or not radius.is_floating_point():
        raise ValueError(
            f"{who}: radii[{key!r}] has shape {tuple(radius.shape)} and dtype {radius.dtype}; pass a number, or a "
            "floating-point tensor of one element."
        )
    if radius.device.type == "cpu":
        _check.non_negative(who, f"radii[{key!r}]", float(radius.detach()))
    return radius.reshape(())


def _state(who: str, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{who}: {name} is a {type(state).__name__}; pass a state dict, names to tensors.")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{who}: {name}[{key!r}] is a {type(value).__name__}; pass a state dict, names to tensors.")
    return dict(state)


def _same_shape(who: str, key: str, name: str, one: Tensor, other_name: str, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"{who}: {key!r} has shape {tuple(one.shape)} in {name} but {tuple(other.shape)} in {other_name}; pass "
            "weights of one architecture."
        )


def _is_measure(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more}"
