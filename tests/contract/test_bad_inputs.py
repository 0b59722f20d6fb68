"""Ten thousand bad arguments, drawn from what the signatures declare: each is refused in a sentence that names it.

A setting's default tells its kind: what is a number by default takes no NaN, no text and no list, what is True takes no
1. Tensors are damaged in rank, length, dtype, device and values.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hardmix
from hardmix import losses, mixing
from mixing.cases import MODELLED, POLICIES, model_for

PACKAGE = str(Path(hardmix.__file__).parent)
CASES, SEED = 10_000, 0
#: names of layers and the like, which any text may be
NAMES = {"layer", "head", "classifier"}
#: settings for which a number of any sign has a meaning
SIGNED = {"ignore_index", "cosine"}
#: values that are not finite may end in a loss that is not: what a model makes, and the numbers that it is to tell
HANDED_ON = {"logits", "embeddings", "features", "predictions", "labels"}


class Call(NamedTuple):
    """A function with arguments that it takes: settings are damaged by kind, tensors by the name that they have."""

    function: Callable[..., Any]
    good: dict[str, Any]


def vectors(n: int = 5, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


CLASS_IDS = torch.tensor([0, 1, 2, 1, 0])
NUMBERS = torch.tensor([0.0, 1.0, 1.0, 2.5, 4.0])
LOGITS = {"logits": vectors(5, 3), "target": CLASS_IDS}
ROWS = {"embeddings": vectors(), "labels": NUMBERS}
PREDICTIONS = {"predictions": vectors()[:, 0], "labels": NUMBERS}
PAIRS = {"image_features": vectors(), "text_features": vectors(seed=1)}

FUNCTIONS: dict[str, dict[str, Any]] = {
    "decoupled_mixup_loss": LOGITS,
    "decoupled_mixup_bce_loss": LOGITS,
    "soft_cross_entropy_loss": LOGITS,
    "soft_bce_loss": LOGITS,
    "supremix_loss": {**ROWS, "window": 2.0},
    "supcon_loss": ROWS,
    "adaptive_supcon_loss": ROWS,
    "rank_n_contrast_loss": ROWS,
    "kernel_contrast_loss": ROWS,
    "ordinal_entropy_loss": {"features": vectors(), "labels": NUMBERS},
    "ranksim_loss": {"features": vectors(), "labels": torch.tensor([0.0, 1.0, 1.5, 2.5, 4.0])},
    "conr_loss": {**ROWS, "predictions": torch.ones(5)},
    "regression_loss": PREDICTIONS,
    "focal_r_loss": PREDICTIONS,
    "clip_loss": {**PAIRS, "logit_scale": 5.0},
    "siglip_loss": {**PAIRS, "logit_scale": 5.0},
    "cyclip_loss": {**PAIRS, "logit_scale": 5.0},
    "hcl_loss": {**PAIRS, "logit_scale": 5.0},
    "m2mix_loss": PAIRS,
    "unimodal_mix_loss": {**PAIRS, "logit_scale": 5.0},
}
MODULES = [
    name
    for name in losses.__all__
    if inspect.isclass(getattr(losses, name)) and name not in ("LabelMixture", "FeatureSmoothing")
]


def calls() -> dict[str, Call]:
    """Constructors of policies and objectives, policies on a batch, and functions of tensors."""
    found = {name: Call(getattr(losses, name), good) for name, good in FUNCTIONS.items()}
    windows = {"SupReMixLoss": {"window": 2.0}}
    found |= {name: Call(getattr(losses, name), windows.get(name, {})) for name in MODULES}
    for name in POLICIES:
        cls = type(POLICIES[name]("sample"))
        if name not in ("choice-batch", "choice-sample", "scheduled"):
            found[cls.__name__] = Call(cls, {})
        batch = {"x": torch.rand(4, 3, 8, 8), "y": torch.arange(4)}
        found[f"{name} on a batch"] = Call(POLICIES[name]("sample"), batch)
    for name in MODELLED:
        model = model_for(name)
        cls = type(MODELLED[name].make(model, "sample"))
        given = {"model": model} | ({"layers": ["0"]} if cls in (mixing.ManifoldMixup, mixing.AlignMix) else {})
        if cls not in (mixing.SaliencyMix, mixing.SUMix, mixing.GuidedMix):
            found[cls.__name__] = Call(cls, given)
    return found


def bad_setting(name: str, default: Any, draw: random.Random) -> Any:
    """A value that a setting with this default can't take."""
    text = "".join(draw.choices("abcxyz", k=draw.randint(1, 9))) + "?"
    if isinstance(default, bool):
        return draw.choice([0, 1, 1.0, text, [], draw.uniform(-9, 9)])
    if isinstance(default, str):
        return draw.choice([text, draw.randint(-9, 9), [text], draw.uniform(0, 1), True])
    values: list[Any] = [math.nan, math.inf, -math.inf, text, [draw.random()], True, {}, 1j]
    if name not in SIGNED:
        values += [-draw.uniform(1e-6, 1e6), -draw.randint(1, 10**6)]
    if isinstance(default, int):
        values += [draw.uniform(0, 9) + 1e-3]
    return draw.choice(values)


def bad_tensor(name: str, good: Tensor, draw: random.Random) -> Any:
    """A value that an argument can't take where `good` is one."""
    whole = not good.is_floating_point()
    values: list[Any] = [None, good.tolist(), "a", draw.randint(0, 9), good.numpy(), torch.zeros_like(good).bool()]
    values += [good.to(torch.complex64), good[: draw.randint(0, len(good) - 1)], good.to("meta")]
    values += [good.new_zeros((2,) * draw.randint(5, 7)), good[:0]]
    if whole:
        spoiled = good.clone()
        spoiled[draw.randrange(len(good))] = draw.choice([-1 - draw.randint(0, 98), 3 + draw.randint(0, 10**6)])
        values += [spoiled, good.float() + 0.5]
    else:
        spoiled = good.clone()
        # The sigmoid of an infinite logit is a number, and so may be its loss.
        infinite = [] if name == "logits" else [math.inf, -math.inf]
        spoiled.view(-1)[draw.randrange(good.numel())] = draw.choice([math.nan, *infinite])
        values.append(spoiled)
    return draw.choice(values)


def refused(call: Call, arguments: dict[str, Any], name: str) -> str:
    """What is wrong with how bad arguments were met; empty if nothing is."""
    try:
        value = call.function(**arguments)
    except (ValueError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not frames[-1].filename.startswith(PACKAGE):
            return f"raised outside of hardmix, in {frames[-1].filename}: {error}"
        message = str(error)
        if not re.search(rf"\b{re.escape(name)}\b", message):
            return f"does not name it: {message}"
        return "" if message.rstrip().endswith((".", ")", "?")) and ": " in message else f"no sentence: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(value, Tensor) and value.ndim == 0:
        return "" if name in HANDED_ON and not math.isfinite(value) else f"took it: {value.item()}"
    return f"took it: {type(value).__name__}"


def test_each_is_refused_by_name() -> None:
    draw = random.Random(SEED)
    known = calls()
    places: list[tuple[str, str]] = []
    for name, call in known.items():
        parameters = inspect.signature(call.function).parameters
        for key, parameter in parameters.items():
            damaged = isinstance(call.good.get(key), Tensor)
            plain = isinstance(parameter.default, (bool, int, float, str)) and key not in NAMES
            if damaged or plain:
                places.append((name, key))
    assert len(places) > 150
    wrong: dict[str, int] = {}
    for number in range(CASES):
        name, key = places[number % len(places)]
        call = known[name]
        good = call.good.get(key)
        if isinstance(good, Tensor):
            bad = bad_tensor(key, good, draw)
        else:
            bad = bad_setting(key, inspect.signature(call.function).parameters[key].default, draw)
        if problem := refused(call, {**call.good, key: bad}, key):
            shown = repr(bad) if not isinstance(bad, Tensor) else f"{bad.dtype} {tuple(bad.shape)} on {bad.device}"
            text = f"{name}({key}={shown[:60]}): {problem[:200]}"
            wrong[text] = wrong.get(text, 0) + 1
    assert not wrong, f"{sum(wrong.values())} of {CASES}:\n" + "\n".join(sorted(wrong)[:400])


def test_what_is_damaged_was_good() -> None:
    for call in calls().values():
        call.function(**call.good)
