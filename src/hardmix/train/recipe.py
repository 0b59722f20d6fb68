"""Recipes: TOML read into frozen models, every mistake reported at once.

A recipe names entries of `hardmix.tables` only: it can't import or run anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from hardmix import tables
from hardmix._check import did_you_mean
from hardmix.data.catalog import CATALOG
from hardmix.data.kind_views import DEFAULT_VIEWS
from hardmix.data.number_sets import NUMBER_SETS
from hardmix.data.pair_sets import PAIR_SETS
from hardmix.models.pair_build import ADAPTED
from hardmix.train.components import Component, MistakesError, check_objective, check_policy, policy_names
from hardmix.train.errors import RecipeError
from hardmix.train.few_section import SemiSection, check_few
from hardmix.train.pair_checks import OF_TUNE, check_modalities, check_pairs
from hardmix.train.sections import (
    ContrastSection,
    DataSection,
    DensitySection,
    EvalSection,
    ModelSection,
    Section,
    TrainSection,
    TuneSection,
    kind_of,
)

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

#: Recipes are written by hand; anything larger is another file passed by mistake.
MAX_BYTES = 1_000_000
MAX_DEPTH = 20
#: noise on the rows of a table that are contrasted, unless a recipe says another
ROW_NOISE = 0.1
#: the starts that are being read, each named by the one before it
_STARTS: list[str] = []
#: the sets of each task
SETS: dict[str, Mapping[str, Any]] = {
    "classification": CATALOG,
    "regression": NUMBER_SETS,
    "image-text": PAIR_SETS,
    "few-labels": CATALOG,
    "modalities": PAIR_SETS,
}
#: keys of the data section that a task does not read; what a set of numbers or pairs does not take, it refuses itself
_OF_OTHERS = (
    *("domain", "styles", "samples", "test", "imbalance", "imbalance_law", "target", "labels", "inputs", "max_length"),
    *("captions", "pair", "missing", "group"),
)
UNREAD = {
    "classification": _OF_OTHERS,
    "few-labels": _OF_OTHERS,
    "regression": ("styles", "max_length", "captions"),
    "image-text": ("group",),
    "modalities": ("group",),
}
#: tasks that may start from another run, and from one of which
STARTS = {"image-text": ("image-text",), "few-labels": ("classification", "few-labels")}


class Recipe(Section):
    """One training run, resolved: every default is written out."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="up to 80 letters, digits, dots, dashes, underscores"
    )
    about: str = Field("", description="one line for `hardmix list`")
    task: Literal["classification", "regression", "image-text", "few-labels", "modalities"] = Field(
        "classification", description="kind of target"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="what all random numbers of the run follow from")
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    policy: Component | None = Field(None, description="mixing policy and its settings; without it nothing is mixed")
    objective: Component = Field(
        default_factory=lambda: Component(name="soft-cross-entropy"), description="objective and its settings"
    )
    contrast: ContrastSection | None = Field(None, description="contrast before or beside the head, for regression")
    density: DensitySection = Field(DensitySection(), description="smoothed label densities, for regression")
    tune: TuneSection = Field(
        TuneSection(), description="start, temperature and what is trained, for image-text; for few-labels the start"
    )
    semi: SemiSection = Field(SemiSection(), description="labelled and unlabelled samples, for few-labels")
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, table: Any) -> Any:
        """What is left unsaid and depends on what the samples are; wrong types are told by the sections."""
        if not isinstance(table, Mapping):
            return table
        data = table.get("data", {})
        if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
            return table
        if data["name"] in PAIR_SETS:
            return _pair_defaults({**table, "data": {"augment": [], **data}})
        if data["name"] not in NUMBER_SETS:
            return table
        kind = kind_of(data["name"])
        data = {"augment": list(DEFAULT_VIEWS[kind]), **data}
        contrast = table.get("contrast")
        if not isinstance(contrast, Mapping):
            return {**table, "data": data}
        contrast = {"augment": data["augment"], "noise": ROW_NOISE if kind == "rows" else 0.0, **contrast}
        contrast.setdefault("views", 2 if contrast["augment"] or contrast["noise"] else 1)
        if contrast.get("probe") == "finetune":
            train = table.get("train", {})
            fallback = TrainSection.model_fields["lr"].default
            contrast.setdefault("head_lr", train.get("lr", fallback) if isinstance(train, Mapping) else fallback)
        if isinstance(contrast.get("data"), Mapping):
            # Where the target has few or rare numbers, what is pre-trained on is meant to have many.
            inherited = {key: value for key, value in data.items() if key not in ("train_samples", "imbalance")}
            contrast["data"] = {**inherited, **contrast["data"]}
        return {**table, "data": data, "contrast": contrast}

    @field_validator("policy", mode="after")
    @classmethod
    def _good_policy(cls, value: Component | None) -> Component | None:
        if value is not None:
            check_policy(value)
        return value

    @field_validator("objective", mode="after")
    @classmethod
    def _good_objective(cls, value: Component) -> Component:
        check_objective(value)
        return value

    @field_validator("policy", mode="before")
    @classmethod
    def _no_policy(cls, value: object) -> object:
        """`--set policy=none` takes the policy off."""
        return None if value == "none" else value

    @model_validator(mode="after")
    def _fit_together(self) -> Recipe:
        found = list(self._misfits())
        if self.data.name in SETS[self.task] and self.model.kind == self.data.kind:
            try:
                self._check_task()
            except ValueError as error:
                # The first thing that is wrong with it, unless that has been said of the same key.
                if str(error).split()[0] not in {message.split()[0] for message in found}:
                    found.append(str(error))
        if found:
            raise MistakesError(found)
        return self

    def _check_task(self) -> None:
        """What has to fit together in a recipe of a task with rules of its own."""
        if self.task == "image-text":
            check_pairs(self)
        elif self.task == "modalities":
            check_modalities(self)
        elif self.task == "few-labels":
            check_few(self)  # not that the start is there: a run that has begun does without

    def _misfits(self) -> Iterator[str]:
        """Whatever does not go together, a sentence each."""
        if self.train.epochs == 0 and not self.tune.start and self.model.name not in ADAPTED:
            yield (
                "train.epochs is 0, which measures the weights of tune.start; name one, or train (those of "
                f"{' and '.join(ADAPTED)} are measured as they are)"
            )
        if self.train.epochs and self.train.warmup_epochs >= self.train.epochs:
            yield (
                f"train.warmup_epochs is {self.train.warmup_epochs:g} but train.epochs is {self.train.epochs}; "
                "the learning rate would never come down: set a smaller warm-up, 0 is fine"
            )
        if self.data.name not in SETS[self.task]:
            sets = ", ".join(SETS[self.task])
            yield f'task is "{self.task}" but data.name is "{self.data.name}"; its sets are {sets}'
            return  # what else is wrong depends on which of the two is
        for key in UNREAD[self.task]:
            if getattr(self.data, key) != DataSection.model_fields[key].get_default(call_default_factory=True):
                yield f'data.{key} is not read by task "{self.task}"; leave it out'
        if self.data.group and self.data.imbalance > 1.0:
            yield "data.imbalance draws samples one by one, which data.group keeps together; leave one of them out"
        if self.model.kind != self.data.kind:
            yield (
                f'model.name is "{self.model.name}", which takes {self.model.kind}, but data.name is '
                f'"{self.data.name}", which holds {self.data.kind}'
            )
        if self.eval.probe and self.task != "classification":
            yield "eval.probe is for classification recipes; leave it out"
        if self.train.compile:
            yield from self._misfits_of_compiling()
        if self.data.name not in PAIR_SETS:
            yield from self._misfits_of_images_and_numbers()

    def _policies(self) -> list[str]:
        """The policy, and those that it is made of."""
        return [] if self.policy is None else policy_names(self.policy.model_dump())

    def _misfits_of_compiling(self) -> Iterator[str]:
        if self.task != "classification":
            yield "train.compile is for classification recipes; leave it out"
            return
        for name in self._policies():
            if name in tables.NEEDS_MODEL:
                yield f'train.compile does not go with policy "{name}", which looks into the model; leave one out'
        if self.train.accumulate > 1:
            # A part's gradients would lie in the memory that the next part's graph writes.
            yield f"train.compile takes whole batches, but train.accumulate is {self.train.accumulate}; set it to 1"

    def _misfits_of_images_and_numbers(self) -> Iterator[str]:
        numbers, few = self.data.name in NUMBER_SETS, self.task == "few-labels"
        if self.objective.name not in (tables.REGRESSION_OBJECTIVES if numbers else tables.OBJECTIVES):
            yield f'objective "{self.objective.name}" is not one of task "{self.task}"'
        if self.eval.parts:
            yield "eval.parts is for image-text recipes; leave it out"
        if self.tune != (TuneSection(start=self.tune.start) if few else TuneSection()):
            yield f"{OF_TUNE}; leave out all but tune.start" if few else f"{OF_TUNE}; leave it out"
        if not few and self.semi != SemiSection():
            yield "semi is a section of few-labels recipes; leave it out"
        for name in self._policies():
            yield from self._misfits_of_policy(name)
        if self.density.lds and self.objective.name == "balanced-mse":
            yield "density.lds weights samples, which balanced-mse does not; leave one of them out"
        if not numbers and self.density != DensitySection():
            yield "density is a section of regression recipes; leave it out"
        if not numbers and self.contrast is not None:
            yield "contrast is a section of regression recipes; leave it out"
        if numbers and self.contrast is not None:
            yield from self._misfits_of_stages(self.contrast)
        by_batch = self.objective.name == "balanced-mse" and self.objective.options.get("kind", "bmc") == "bmc"
        if numbers and self.train.accumulate > 1 and (by_batch or self.contrast is not None):
            yield "train.accumulate splits the samples that are compared with each other; set it to 1"

    def _misfits_of_policy(self, name: str) -> Iterator[str]:
        kind, numbers = self.data.kind, self.data.name in NUMBER_SETS
        by_gradient = self.policy is not None and tables.BY_GRADIENT in str(self.policy.model_dump())
        if numbers and name != "manifold-mixup" and (name in tables.NEEDS_MODEL or by_gradient):
            yield f'policy "{name}" looks at a model of classes; it is not for numbers'
        elif name in tables.REGRESSION_POLICIES and not numbers:
            yield f'policy "{name}" pairs by numbers; it is for regression'
        elif kind == "rows" and name not in (*tables.WHOLE_POLICIES, *tables.REGRESSION_POLICIES):
            known = ", ".join((*tables.WHOLE_POLICIES, *tables.REGRESSION_POLICIES))
            yield f'policy "{name}" mixes parts of images; a table takes {known}'
        elif kind == "texts" and name != "manifold-mixup":
            yield f'policy "{name}" mixes inputs, and texts can only be mixed inside: take manifold-mixup'

    def _misfits_of_stages(self, contrast: ContrastSection) -> Iterator[str]:
        if (contrast.epochs == 0) != (contrast.weight > 0.0):
            yield (
                f"contrast.epochs is {contrast.epochs} and contrast.weight {contrast.weight:g}; set epochs to train "
                "the encoder first, or a weight and 0 epochs to train it together with the head"
            )
        if contrast.epochs == 0:
            if contrast.data is not None:
                yield "contrast.data is for two stages, but contrast.epochs is 0; leave it out"
            if contrast.views > 1 and self.policy is not None:
                yield (
                    f"contrast.views is {contrast.views} and a policy mixes the samples; beside a head the contrast "
                    "sees the head's own batch then: set contrast.views=1"
                )
            return
        if contrast.data is not None and contrast.data.kind != self.data.kind:
            yield (
                f'contrast.data.name is "{contrast.data.name}", which holds {contrast.data.kind}, but data.name is '
                f'"{self.data.name}", which holds {self.data.kind}'
            )
        if contrast.epochs >= self.train.epochs:
            yield (
                f"contrast.epochs is {contrast.epochs} but train.epochs is {self.train.epochs}; leave some for the head"
            )
            return
        shorter = min(contrast.epochs, self.train.epochs - contrast.epochs)
        if shorter <= self.train.warmup_epochs < self.train.epochs:  # more than all of them has been told above
            yield (
                f"train.warmup_epochs is {self.train.warmup_epochs:g} but the shorter stage has {shorter} epochs; "
                "its learning rate would never come down: set a smaller warm-up, 0 is fine"
            )

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def with_seed(self, seed: int) -> Recipe:
        """The same recipe with another seed.

        Raises:
            RecipeError: a seed that no recipe may have; a run with it could be neither resumed nor evaluated.
        """
        # A recipe of defaults stands in: this one, validated anew, would take all its keys for what a person has set.
        return self.model_copy(update={"seed": check_recipe({"name": self.name, "seed": seed}, self.name).seed})


def _pair_defaults(table: dict[str, Any]) -> dict[str, Any]:
    """A model that is not named is that of the start, or two small towers; its options may be given all the same."""
    tune = table.get("tune", {})
    start = tune.get("start", "") if isinstance(tune, Mapping) else ""
    given = table.get("model", {})
    if not isinstance(given, Mapping) or "name" in given:
        return table
    usual: dict[str, Any] = {"name": "two-tower"}
    if table.get("task") == "modalities":
        usual = {"name": "multimodal"}
    elif start and isinstance(start, str):
        usual = start_recipe(start).model.model_dump()
    options = given.get("options", {})
    if isinstance(options, Mapping):
        options = {**usual.get("options", {}), **options}
    return {**table, "model": {**usual, **given, "options": options}}


def start_recipe(start: str, task: str = "image-text") -> Recipe:
    """The recipe that `tune.start` of a recipe of `task` names, or that of the run folder that it names.

    Raises:
        ValueError: a recipe of another task, one whose measured weights are not those that it trains, or a circle.
    """
    if start in _STARTS:
        raise ValueError(f"tune.start leads from {' to '.join([*_STARTS, start])}, in a circle; name another one")
    _STARTS.append(start)
    try:
        folder = Path(start) / "recipe.toml"
        recipe = load_recipe(str(folder) if folder.is_file() else start)
    except (RecipeError, ValueError) as error:
        raise ValueError(f"tune.start is {start!r}, neither the folder of a run nor a good recipe: {error}") from None
    finally:
        _STARTS.pop()
    if recipe.task not in STARTS[task]:
        known = " or ".join(STARTS[task])
        raise ValueError(f'tune.start is {start!r}, of task "{recipe.task}"; name a recipe or a run of {known}')
    if recipe.tune.after != "nothing":
        raise ValueError(
            f"tune.start is {start!r}, which measures its weights after {recipe.tune.after} and does not keep those; "
            "name a recipe or a run without tune.after"
        )
    return recipe


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
        table = tomllib.loads(path.read_text("utf-8-sig"))  # editors of Windows put a byte order mark first
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
        lines = [f"  {_place(e['loc'])}: {sentence}" for e in error.errors() for sentence in _sentences(e)]
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise RecipeError("\n".join([f'recipe "{name}" has {count}:', *lines])) from None


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "recipe"


def _sentences(error: Any) -> list[str]:
    """Pydantic's finding in our words: what came, what is expected, the nearest right name."""
    told = error.get("ctx", {}).get("error")
    return told.messages if isinstance(told, MistakesError) else [_sentence(error)]


def _sentence(error: Any) -> str:
    *parents, last = error["loc"] or ("",)
    if error["type"] == "extra_forbidden":
        names = list(_section(parents).model_fields)
        elsewhere = " or ".join(f'"{place}.{last}"' for place in _sections_with(str(last)))
        hint = f" (did you mean {elsewhere}?)" if elsewhere else did_you_mean(str(last), names)
        return f"unknown key{hint}; there are {', '.join(names)}"
    if error["type"] == "model_type" and error["loc"]:
        names = list(_section(error["loc"]).model_fields)
        if "name" in names:
            value = error["input"] if isinstance(error["input"], str) else "..."
            return f"is {error['input']!r}, which is no table; set {_place(error['loc'])}.name={value}"
        return f"is {error['input']!r}, which is no table; set its keys, of which there are {', '.join(names)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "missing"):
        return message
    return f"is {error['input']!r}; {message[0].lower()}{message[1:]}"


def _sections_with(key: str) -> list[str]:
    """The sections that have a key of this very name, that of the training first."""
    kinds = ((name, _kind(field.annotation)) for name, field in Recipe.model_fields.items())
    found = [name for name, kind in kinds if kind and issubclass(kind, Section) and key in kind.model_fields]
    return sorted(found, key=lambda name: name != "train")


def _section(loc: Iterable[int | str]) -> type[BaseModel]:
    """The model that reads the table at this place of a recipe."""
    section: type[BaseModel] | None = Recipe
    for part in loc:
        assert section is not None, "only a table has keys"
        section = _kind(section.model_fields[str(part)].annotation)
    assert section is not None, "only a table has keys"
    return section


def _kind(annotation: Any) -> type[BaseModel] | None:
    """The model of a table, of an optional one too."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type(BaseModel))), None)


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
        read = tomllib.loads(f"v = {text}")
        value = read["v"] if len(read) == 1 else text  # a second line would be lost
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    node = table
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f'--set "{override}": {part} is a value, not a section.')
    node[parts[-1]] = value
