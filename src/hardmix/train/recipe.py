"""Recipes: TOML read into frozen models, every mistake reported at once.

A recipe names entries of `hardmix.tables` only: it can't import or run anything.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hardmix import tables
from hardmix._check import did_you_mean
from hardmix.data.catalog import CATALOG
from hardmix.data.tables import TABLES
from hardmix.data.views import MOVES, PAINTS
from hardmix.models.build import MODELS, model_options
from hardmix.models.mlp import TableNet
from hardmix.train.errors import RecipeError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

#: Backbones of tables; those of images are in `hardmix.models.build`.
TABLE_MODELS: dict[str, type] = {"mlp": TableNet}
#: Recipes are written by hand; anything larger is another file passed by mistake.
MAX_BYTES = 1_000_000
MAX_DEPTH = 20


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def _float_of_int(value: object) -> object:
    """TOML tells 1 from 1.0; people don't."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Float = Annotated[float, BeforeValidator(_float_of_int)]


class Component(BaseModel):
    """A named entry of a table with its options."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSection(_Section):
    name: str = Field("fashion-mini", description="data set, one of the catalogue")
    path: str = Field("", description="folder of the data set; empty: look in the known places")
    train_samples: int = Field(0, ge=0, description="stratified subset of the training split; 0: all")
    validation: Float = Field(
        0.1, ge=0.0, lt=1.0, description="share of the training images to validate on, unless the set has its own"
    )
    image_size: int = Field(0, ge=0, description="side in pixels that images are scaled to; 0: the data set's own")
    augment: list[str] = Field(
        default_factory=lambda: ["flip", "crop"], description="random views of the training images, in this order"
    )
    workers: int = Field(0, ge=0, le=64, description="processes that read and decode images")
    on_error: Literal["raise", "skip"] = Field("raise", description="what to do with images that can't be read")
    target: str = Field("", description="column of a table that is predicted")
    test: Float = Field(0.2, gt=0.0, lt=1.0, description="share of a table's rows to test on, drawn by the seed")
    missing: Literal["error", "mean", "drop"] = Field("error", description="what to do with empty cells of a table")

    @field_validator("name")
    @classmethod
    def _in_catalogue(cls, value: str) -> str:
        _entry("data set", value, {**CATALOG, **dict.fromkeys(TABLES)})
        return value

    @field_validator("augment")
    @classmethod
    def _views_exist(cls, value: list[str]) -> list[str]:
        for name in value:
            _entry("view", name, {**MOVES, **PAINTS})
        return value


class ModelSection(_Section):
    name: str = Field("small-resnet", description="backbone, one of this package's or timm/NAME")
    options: dict[str, Any] = Field(
        default_factory=dict, description="what the backbone takes; checkpoint = a file of weights to start from"
    )

    @field_validator("name")
    @classmethod
    def _is_a_model(cls, value: str) -> str:
        if not value.startswith("timm/"):
            _entry("model", value, {**MODELS, **TABLE_MODELS})
        return value

    @field_validator("options")
    @classmethod
    def _fit_the_model(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name", "")
        if name in TABLE_MODELS:
            _check_options("model", name, [key for key in _parameters(TABLE_MODELS[name]) if key != "inputs"], value)
        if name in MODELS:
            _check_options("model", name, [*model_options(name), "checkpoint"], value)
        return value


class TrainSection(_Section):
    epochs: int = Field(20, ge=1, description="passes over the training images; what does not fill a batch is left out")
    batch_size: int = Field(128, ge=1, description="images of a step, all processes together")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with Nesterov momentum, or AdamW")
    lr: Float = Field(0.1, gt=0.0, description="learning rate after the warm-up; falls to 0 along half a cosine")
    weight_decay: Float = Field(5e-4, ge=0.0, description="of matrices and filters; norms and biases have none")
    momentum: Float = Field(0.9, ge=0.0, lt=1.0, description="of SGD")
    warmup_epochs: Float = Field(1.0, ge=0.0, description="epochs in which the learning rate rises linearly")
    clip_norm: Float = Field(0.0, ge=0.0, description="largest gradient norm; 0: no clipping")
    accumulate: int = Field(1, ge=1, description="parts that a batch is split into, one backward each")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the arithmetic; weights stay fp32")
    ema: Float = Field(0.0, ge=0.0, lt=1.0, description="decay of the averaged weights that are evaluated; 0: off")
    channels_last: bool = Field(True, description="memory format of images and filters")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: a GPU if there is one")
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's own choice")
    log_every: int = Field(20, ge=1, description="steps between two lines of metrics.jsonl")
    checkpoint_every: int = Field(1, ge=1, description="epochs between two checkpoints")


class ContrastSection(_Section):
    objective: Component = Field(description="contrastive objective and its settings")
    epochs: int = Field(ge=1, description="of the epochs, how many pre-train the encoder; the rest train the head")
    labels: Literal["standardized", "raw"] = Field(
        "standardized",
        description="what the settings count in: standard deviations, or the own unit",
    )
    noise: Float = Field(0.1, ge=0.0, description="standard deviation of the noise that makes the two views of a row")
    probe: Literal["linear", "finetune"] = Field("linear", description="train the head alone afterwards, or all")
    head_lr: Float = Field(0.01, gt=0.0, description="learning rate of the second stage")

    @field_validator("objective", mode="after")
    @classmethod
    def _known(cls, value: Component) -> Component:
        try:
            build_contrast(value)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return value


class EvalSection(_Section):
    every: int = Field(1, ge=1, description="epochs between two evaluations")
    batch_size: int = Field(500, ge=1, description="images that are evaluated at once")
    checkpoint: Literal["last", "best"] = Field("last", description="weights that the test split is measured with")


class Recipe(_Section):
    """One training run, resolved: every default is written out."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="up to 80 letters, digits, dots, dashes, underscores"
    )
    about: str = Field("", description="one line for `hardmix list`")
    task: Literal["classification", "regression"] = Field("classification", description="kind of target")
    seed: int = Field(0, ge=0, lt=2**31, description="what all random numbers of the run follow from")
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    policy: Component | None = Field(None, description="mixing policy and its settings; without it nothing is mixed")
    objective: Component = Field(
        default_factory=lambda: Component(name="soft-cross-entropy"), description="objective and its settings"
    )
    contrast: ContrastSection | None = Field(None, description="pre-training by contrast, for regression")
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()

    @field_validator("policy", "objective", mode="after")
    @classmethod
    def _known(cls, value: Component | None, info: ValidationInfo) -> Component | None:
        try:
            if value is not None and info.field_name == "policy":
                build_policy(value, model=None)
            elif value is not None:
                build_objective(value)
        except TypeError as error:  # which pydantic would not list with the other mistakes
            raise ValueError(str(error)) from None
        return value

    @field_validator("policy", mode="before")
    @classmethod
    def _no_policy(cls, value: object) -> object:
        """`--set policy=none` takes the policy off."""
        return None if value == "none" else value

    @model_validator(mode="after")
    def _fit_together(self) -> Recipe:
        if self.train.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"train.warmup_epochs is {self.train.warmup_epochs:g} but train.epochs is {self.train.epochs}; "
                "the learning rate would never come down: set a smaller warm-up, 0 is fine"
            )
        table = self.data.name in TABLES
        if (self.task == "regression") != table:
            raise ValueError(f'task is "{self.task}" but data.name is "{self.data.name}"; tables are for regression')
        if (self.model.name in TABLE_MODELS) != table:
            raise ValueError(f'model.name is "{self.model.name}" but data.name is "{self.data.name}"; it does not fit')
        if self.objective.name not in (tables.REGRESSION_OBJECTIVES if table else tables.OBJECTIVES):
            raise ValueError(f'objective "{self.objective.name}" is not one of task "{self.task}"')
        for name in [] if self.policy is None else _policy_names(self.policy.model_dump()):
            if name in tables.REGRESSION_POLICIES and not table:
                raise ValueError(f'policy "{name}" pairs by numbers; it is for regression')
            if table and name not in (*tables.ROW_POLICIES, *tables.REGRESSION_POLICIES):
                known = ", ".join((*tables.ROW_POLICIES, *tables.REGRESSION_POLICIES))
                raise ValueError(f'policy "{name}" mixes parts of images; a table takes {known}')
        if self.contrast is not None:
            if not table:
                raise ValueError("contrast is a section of regression recipes; leave it out")
            if self.contrast.epochs >= self.train.epochs:
                raise ValueError(
                    f"contrast.epochs is {self.contrast.epochs} but train.epochs is {self.train.epochs}; "
                    "leave some for the head"
                )
            shorter = min(self.contrast.epochs, self.train.epochs - self.contrast.epochs)
            if self.train.warmup_epochs >= shorter:
                raise ValueError(
                    f"train.warmup_epochs is {self.train.warmup_epochs:g} but the shorter stage has {shorter} epochs; "
                    "its learning rate would never come down: set a smaller warm-up, 0 is fine"
                )
        return self

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def with_seed(self, seed: int) -> Recipe:
        return self.model_copy(update={"seed": seed})


def build_policy(component: Component, model: Any) -> Any:
    """The policy that a recipe names. With `model=None` a policy that needs one is checked but not built."""
    cls = _entry("policy", component.name, {**tables.POLICIES, **tables.REGRESSION_POLICIES})
    options = component.options
    _check_options("policy", component.name, _parameters(cls), options)
    if component.name == "random-choice":
        children = options.pop("policies", None)
        if not isinstance(children, list) or not children:
            raise ValueError('policies is missing; list them: policies = [{ name = "mixup" }, { name = "cutmix" }]')
        built = [None if c == "none" else build_policy(_component(c), model) for c in children]
        return cls(built, **options)
    if component.name == "scheduled":
        return cls(build_policy(_component(options.pop("policy", None)), model), **options)
    if component.name in tables.NEEDS_MODEL:
        return None if model is None else cls(model, **options)
    return cls(**options)


def build_objective(component: Component) -> Any:
    """The objective that a recipe names."""
    cls = _entry("objective", component.name, {**tables.OBJECTIVES, **tables.REGRESSION_OBJECTIVES})
    _check_mean(component)
    _check_options("objective", component.name, _parameters(cls), component.options)
    options = component.options
    if isinstance(options.get("weight"), list):
        options["weight"] = torch.tensor(options["weight"], dtype=torch.float32)
    return cls(**options)


def build_contrast(component: Component) -> Any:
    """The contrastive objective that a recipe names."""
    cls = _entry("contrastive objective", component.name, tables.CONTRASTS)
    _check_mean(component)
    _check_options("contrastive objective", component.name, _parameters(cls), component.options)
    options = component.options
    if isinstance(options.get("beta"), list):
        options["beta"] = tuple(options["beta"])
    return cls(**options)


def _policy_names(policy: Mapping[str, Any]) -> list[str]:
    """The names of a policy and of those inside it, combinations left out."""
    inside = [policy["policy"]] if "policy" in policy else policy.get("policies", [])
    if inside:
        return [name for p in inside if p != "none" for name in _policy_names(p)]
    return [policy["name"]]


def _check_mean(component: Component) -> None:
    if component.options.get("reduction", "mean") != "mean":
        raise ValueError(f'reduction is {component.options["reduction"]!r}; training takes the "mean".')


def _component(value: object) -> Component:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f'a nested policy is {value!r}; write {{ name = "mixup", alpha = 0.2 }}')
    return Component(**value)


def _entry(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f'"{name}" is not a {kind}{did_you_mean(name, table)}; there are {", ".join(table)}')
    return table[name]


def _check_options(kind: str, name: str, known: list[str], options: Mapping[str, Any]) -> None:
    wrong = [f"{key}{did_you_mean(key, known)}" for key in options if key not in known]
    if wrong:
        raise ValueError(f'unknown option of {kind} "{name}": {", ".join(wrong)}; it takes {", ".join(known)}')
    for key, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}; pass a finite number")


def _parameters(cls: type) -> list[str]:
    """What a class takes from a recipe; the model is handed over by the task."""
    return [name for name in inspect.signature(cls).parameters if name != "model"]


def shipped() -> dict[str, Any]:
    """The recipes that come with the package, name to resource."""
    files = resources.files("hardmix.recipes").iterdir()
    return {f.name.removesuffix(".toml"): f for f in sorted(files, key=lambda f: f.name) if f.name.endswith(".toml")}


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path, and apply `key.sub=value` overrides.

    Raises:
        RecipeError: with every mistake of the file and the overrides.
    """
    table = read_toml(name)
    for override in overrides or []:
        _apply(table, override)
    table.setdefault("name", Path(name).stem)
    return check_recipe(table, name)


def read_toml(name: str) -> dict[str, Any]:
    """The table of a shipped recipe or of a file."""
    ours = shipped()
    if name in ours:
        return tomllib.loads(ours[name].read_text("utf-8"))
    path = Path(name)
    if not path.is_file():
        hint = did_you_mean(name, ours)
        raise RecipeError(
            f'recipe "{name}" is neither shipped nor a file{hint}; `hardmix list` shows the shipped ones.'
        )
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"recipe {path} has {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}.")
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe {path} is not valid TOML: {error}.") from None
    if _depth(table) > MAX_DEPTH:
        raise RecipeError(f"recipe {path} nests tables more than {MAX_DEPTH} deep; no recipe needs that.")
    return table


def check_recipe(table: dict[str, Any], name: str) -> Recipe:
    """A resolved recipe from a table; all mistakes at once."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        lines = [f"  {_place(e['loc'])}: {_sentence(e)}" for e in error.errors()]
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise RecipeError("\n".join([f'recipe "{name}" has {count}:', *lines])) from None


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "recipe"


def _sentence(error: Any) -> str:
    """Pydantic's finding in our words: what came, what is expected, the nearest right name."""
    *parents, last = error["loc"] or ("",)
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in parents:
            section = section.model_fields[part].annotation
        names = list(section.model_fields)
        return f"unknown key{did_you_mean(str(last), names)}; there are {', '.join(names)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "missing"):
        return message
    return f"is {error['input']!r}; {message[0].lower()}{message[1:]}"


def _depth(value: object, limit: int = MAX_DEPTH) -> int:
    """Depth of nesting, looked at no further than just past `limit`."""
    level, depth = [value], 0
    while level and depth <= limit:
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
        depth += 1
    return depth


def parse_options(overrides: list[str]) -> dict[str, Any]:
    """Options from `key=value` texts."""
    table: dict[str, Any] = {}
    for override in overrides:
        _apply(table, override)
    return table


def _apply(table: dict[str, Any], override: str) -> None:
    """Write one `key.sub=value` into the table. The value is read as TOML; what is not TOML is a string."""
    key, sep, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not sep or not all(parts):
        raise RecipeError(f'--set "{override}" is not key=value; write for example --set train.epochs=5.')
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    node = table
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f'--set "{override}": {part} is a value, not a section.')
    node[parts[-1]] = value
