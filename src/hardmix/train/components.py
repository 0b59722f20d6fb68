"""From a name and its options in a recipe to a policy, an objective or a contrast."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from hardmix import _check, losses, tables
from hardmix._check import did_you_mean
from hardmix.losses import label_mixture
from hardmix.mixing.pairing import LabelKernel

#: Gaussians that stand for the distribution of the training labels, unless a recipe says `components`
MIXTURE_COMPONENTS = 8
#: of Lipsum-FT where a recipe says nothing: how much it weighs beside the cross entropy, and its texts
LIPSUM = {"weight": 0.1, "texts": 80}
#: of CoCa where a recipe says nothing: the weight of m2-Mix in its contrast
COCA = {"mixing": 0.0}
#: objectives of pairs that a recipe tells more than their class takes
BESIDE: dict[type, Mapping[str, Any]] = {losses.LipsumLoss: LIPSUM, losses.CoCaLoss: COCA}
#: what a recipe does not say of them
NOT_SAID = ("gather", "accumulate", "open_clip", "reduction", "contrastive", "padding")
#: options of policies that name parts of the model
PARTS = ("layer", "layers", "head", "classifier")

T = TypeVar("T")
P = ParamSpec("P")


class Component(BaseModel):
    """A named entry of a table with its options."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class MistakesError(ValueError):
    """Several things that are wrong, a sentence each."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = list(messages)


def mistakes_of(component: Component, check: Callable[[Component], object]) -> list[str]:
    """All that `check` has against a component: what it says first, then what it says without the options named there.

    Messages name an option before their first semicolon: "Mixup: alpha is -1; pass a finite number greater than 0".
    """
    options = component.options
    found: list[str] = []
    while True:
        try:
            check(Component(name=component.name, **options))
        except (TypeError, ValueError) as error:
            # Neither the nearest right name nor 'policy "scheduled"', which has an option of that name, is the subject.
            subject = re.sub(r'\(did you mean.*?\)|\w+ "[^"]*"', "", str(error)).partition(";")[0]
            named = [key for key in component.options if re.search(rf"\b{re.escape(key)}\b", subject)]
            if any(key not in options for key in named):  # missed because it has been left out
                return found
            found.append(str(error))
            if not named:
                return found
            options = {key: value for key, value in options.items() if key not in named}
        else:
            return found


def tells_all(build: Callable[Concatenate[Component, P], T]) -> Callable[Concatenate[Component, P], T]:
    """Let a function of a component raise all that it has against it, as `MistakesError`."""

    @wraps(build)
    def telling(component: Component, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return build(component, *args, **kwargs)
        except (TypeError, ValueError):
            raise MistakesError(mistakes_of(component, lambda other: build(other, *args, **kwargs))) from None

    return telling


def check_policy(component: Component) -> None:
    """That there is a policy of this name, and that it and those inside it take these options.

    Parts of the model that it names are the run's matter: a stand-in takes the place of the model here.

    Raises:
        MistakesError: all of them.
    """
    with torch.random.fork_rng(devices=[]):  # to read a recipe draws nothing
        model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
        model[0].add_module("attention", nn.MultiheadAttention(1, 1))  # some look for one; it never runs
        if found := _policy_mistakes(component, model):
            raise MistakesError(found)


def _policy_mistakes(component: Component, model: nn.Module) -> list[str]:
    """Those of the policies inside it, which good ones then replace, and its own."""
    options = component.options
    found: list[str] = []

    def replaced(inside: object) -> object:
        if not isinstance(inside, Mapping) or not isinstance(inside.get("name"), str):
            return inside
        mistakes = _policy_mistakes(Component(**inside), model)
        found.extend(mistakes)
        return {"name": "mixup"} if mistakes else inside

    if "policy" in options:
        options["policy"] = replaced(options["policy"])
    if isinstance(options.get("policies"), list):
        options["policies"] = [replaced(inside) for inside in options["policies"]]
    if component.name in tables.NEEDS_MODEL:
        for key in PARTS:
            value = options.get(key)
            if isinstance(value, str) and key not in _required(tables.POLICIES[component.name]):
                del options[key]
            elif isinstance(value, list) and all(isinstance(name, str) for name in value):
                options[key] = ["0"] * len(value)
    return found + mistakes_of(Component(name=component.name, **options), lambda other: build_policy(other, model))


def build_policy(component: Component, model: Any, shape: tuple[int, ...] | None = None) -> Any:
    """The policy that a recipe names.

    Args:
        model: takes samples as the policy gets them; None for policies that look at none.
        shape: of one sample, for policies that look at the model's layers before the first batch.
    """
    cls = entry("policy", component.name, {**tables.POLICIES, **tables.REGRESSION_POLICIES})
    options = component.options
    known = [name for name in _parameters(cls) if name != "input_shape"]
    check_options("policy", component.name, known + ["bandwidth"] * (component.name == "manifold-mixup"), options)
    if component.name == "random-choice":
        children = options.pop("policies", None)
        if not isinstance(children, list) or not children:
            raise ValueError('policies is missing; list them: policies = [{ name = "mixup" }, { name = "cutmix" }]')
        return cls([None if c == "none" else build_policy(_component(c), model, shape) for c in children], **options)
    of: list[Any] = []
    if component.name in tables.NEEDS_MODEL:
        of.append(model)
    if component.name in tables.WRAPPERS:
        of.append(build_policy(_component(options.pop("policy", None)), model, shape))
    if lacking := [key for key in _required(cls) if key not in options]:
        raise ValueError(f'policy "{component.name}" needs {" and ".join(lacking)}; add it to its table')
    if "bandwidth" in options and component.name == "manifold-mixup":
        options["pairing"] = LabelKernel(options.pop("bandwidth"))
    if options.get("saliency") == tables.BY_GRADIENT:
        options["model"] = model
    if shape is not None and "input_shape" in inspect.signature(cls).parameters:
        options["input_shape"] = shape
    return cls(*of, **options)


def build_objective(component: Component, train_labels: Tensor | None = None) -> Any:
    """The objective that a recipe names.

    Args:
        train_labels: (N,) what an objective that has to know the training labels is made for, in the unit that it gets
            them in; without them it is checked but not built.
    """
    cls = entry("objective", component.name, {**tables.OBJECTIVES, **tables.REGRESSION_OBJECTIVES})
    _check_mean(component)
    options = component.options
    known = [name for name in _parameters(cls) if name != "mixture"]
    fitted = "mixture" in _parameters(cls) and options.get("kind") == "gai"
    check_options("objective", component.name, known + ["components"] * fitted, options)
    if fitted:
        components = options.pop("components", MIXTURE_COMPONENTS)
        if train_labels is None:
            return None
        options["mixture"] = label_mixture(train_labels, components)
    if isinstance(options.get("weight"), list):
        options["weight"] = torch.tensor(options["weight"], dtype=torch.float32)
    return cls(**options)


@tells_all
def check_objective(component: Component) -> None:
    """That there is an objective of this name, for whatever task, and that it takes these options."""
    names = [*tables.OBJECTIVES, *tables.REGRESSION_OBJECTIVES, *tables.PAIR_OBJECTIVES, *tables.MODALITY_OBJECTIVES]
    check_name("objective", component.name, names)
    if component.name in tables.PAIR_OBJECTIVES:
        build_pair_objective(component)
    elif component.name in tables.OBJECTIVES or component.name in tables.REGRESSION_OBJECTIVES:
        build_objective(component)
    else:
        build_modality_objective(component)


def build_pair_objective(component: Component) -> Any:
    """The objective of image-text pairs that a recipe names."""
    cls = entry("objective of pairs", component.name, tables.PAIR_OBJECTIVES)
    _check_mean(component)
    known = [name for name in _parameters(cls) if name not in NOT_SAID]
    options = component.options
    options.pop("reduction", None)
    check_options("objective", component.name, [*known, *BESIDE.get(cls, ())], options)
    own = {key: value for key, value in options.items() if key in known}
    if cls is losses.CoCaLoss:
        mixing = _check.non_negative("CoCaLoss", "mixing", options.get("mixing", COCA["mixing"]))
        own["contrastive"] = losses.M2MixLoss(weight=mixing) if mixing else None
    return cls(**own)


def build_modality_objective(component: Component) -> Any:
    """The objective of several modalities that a recipe names."""
    cls = entry("objective of modalities", component.name, tables.MODALITY_OBJECTIVES)
    _check_mean(component)
    options = component.options
    options.pop("reduction", None)
    check_options("objective", component.name, [name for name in _parameters(cls) if name not in NOT_SAID], options)
    return cls(**options)


def lipsum_options(component: Component) -> tuple[float, int]:
    """Weight of Lipsum-FT's second term, and number of its texts."""
    found = LIPSUM | {key: value for key, value in component.options.items() if key in LIPSUM}
    return (
        _check.positive("LipsumLoss", "weight", found["weight"]),
        _check.integer("LipsumLoss", "texts", found["texts"], 1),
    )


@tells_all
def build_contrast(component: Component, train_labels: Tensor | None = None) -> Any:
    """The contrastive objective that a recipe names; `train_labels` as for `build_objective`."""
    cls = entry("contrastive objective", component.name, tables.CONTRASTS)
    _check_mean(component)
    known = [name for name in _parameters(cls) if name != "population"]
    options = component.options
    check_options("contrastive objective", component.name, known, options)
    if isinstance(options.get("beta"), list):
        options["beta"] = tuple(options["beta"])
    if "population" in _parameters(cls) and train_labels is not None:
        options["population"] = train_labels.sort().values
    built = cls(**options)
    if train_labels is not None and hasattr(built, "fit_labels") and built.label_scale.isnan():
        built.fit_labels(train_labels)
    return built


#: what an algorithm for few labels is told by the task, not by a recipe
GIVEN = (
    *("model", "num_classes", "num_unlabelled", "class_share", "pairs", "steps"),
    *("source_weight", "source_bias", "relationship"),
)


@tells_all
def check_algorithm(component: Component) -> None:
    """That there is an algorithm for few labels of this name, and that it takes these options."""
    cls = entry("algorithm", component.name, tables.ALGORITHMS)
    check_options(
        "algorithm", component.name, [name for name in _parameters(cls) if name not in GIVEN], component.options
    )
    if not any(name in GIVEN and name != "pairs" for name in inspect.signature(cls).parameters):
        cls(**component.options)


@tells_all
def build_algorithm(component: Component, **given: Any) -> Any:
    """The algorithm for few labels that a recipe names.

    Args:
        given: of GIVEN; it is told what its constructor asks for.
    """
    check_algorithm(component)
    cls = tables.ALGORITHMS[component.name]
    asked = {name: given[name] for name in inspect.signature(cls).parameters if name in given}
    return cls(**component.options, **asked)


def policy_names(policy: Mapping[str, Any]) -> list[str]:
    """The names of a policy and of those inside it; combinations, which do nothing themselves, are left out."""
    inside = [policy["policy"]] if "policy" in policy else policy.get("policies", [])
    names = [name for p in inside if p != "none" for name in policy_names(p)]
    return names + [policy["name"]] * (not inside or policy["name"] in tables.NEEDS_MODEL)


def entry(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """table[name]; a name that isn't there is told with the nearest one."""
    check_name(kind, name, table)
    return table[name]


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    if name not in (known := list(dict.fromkeys(names))):
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f'"{name}" is not {article} {kind}{did_you_mean(name, known)}; there are {", ".join(known)}')


def check_options(kind: str, name: str, known: list[str], options: Mapping[str, Any]) -> None:
    wrong = [f"{key}{did_you_mean(key, known)}" for key in options if key not in known]
    if wrong:
        raise ValueError(f'unknown option of {kind} "{name}": {", ".join(wrong)}; it takes {", ".join(known)}')
    for key, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}; pass a finite number")


def _check_mean(component: Component) -> None:
    if component.options.get("reduction", "mean") != "mean":
        raise ValueError(f'reduction is {component.options["reduction"]!r}; training takes the "mean".')


def _component(value: object) -> Component:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f'a nested policy is {value!r}; write {{ name = "mixup", alpha = 0.2 }}')
    return Component(**value)


def _parameters(cls: type) -> list[str]:
    """What a class takes from a recipe; the model is handed over by the task."""
    return [name for name in inspect.signature(cls).parameters if name != "model"]


def _required(cls: type) -> list[str]:
    """Those of them that have no default, policies inside it aside."""
    found = inspect.signature(cls).parameters.items()
    return [name for name, p in found if p.default is p.empty and name not in ("model", "policy", "policies")]
