"""The sections of a recipe: frozen models with a description of every key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from hardmix.data.catalog import CATALOG
from hardmix.data.kind_views import VIEWS
from hardmix.data.number_sets import NUMBER_SETS
from hardmix.data.pair_sets import PAIR_SETS
from hardmix.models.build import MODELS, model_options
from hardmix.models.encoders import ENCODERS, encoder_options
from hardmix.models.pair_build import PAIR_MODELS, pair_model_options
from hardmix.models.pair_model import PARTS
from hardmix.tables import JOINT_CONTRASTS
from hardmix.train.components import Component, build_contrast, check_name, check_options

#: what an image-text run is measured by
MEASURES = ("retrieval", "calibration", "zeroshot", "arithmetic", "geometry", "caption")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def _float_of_int(value: object) -> object:
    """TOML tells 1 from 1.0; people don't."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _moderate(value: float) -> float:
    """What float32 can hold, with room for a product."""
    if abs(value) > 1e30:
        raise ValueError(f"is {value:g}; pass a number from -1e30 to 1e30")
    return value


Float = Annotated[float, BeforeValidator(_float_of_int), AfterValidator(_moderate)]


class DataSection(Section):
    name: str = Field("fashion-mini", description="data set, one of `hardmix data`")
    path: str = Field("", description="file or folder of the data set; empty: look in the known places")
    domain: str = Field(
        "",
        description="parts of a set of numbers that differ in their origin, or styles of pictures with texts to train "
        "on, joined by +; empty: all",
    )
    styles: dict[str, str] = Field(
        default_factory=dict, description="further styles of the emoji, or larger pictures of one: a folder for each"
    )
    samples: int = Field(
        0, ge=0, description="how many samples of a large set of numbers or pairs are read; 0: its own default"
    )
    train_samples: int = Field(
        0, ge=0, description="subset of the training split, stratified by classes where those are learnt; 0: all"
    )
    validation: Float = Field(
        0.1, ge=0.0, lt=1.0, description="share of the samples to validate on, unless the set has its own"
    )
    test: Float = Field(
        0.2,
        gt=0.0,
        lt=1.0,
        description="share to test on of a set of numbers, drawn by the seed, or of pictures with texts, by these; "
        "unless the set has its own",
    )
    imbalance: Float = Field(
        1.0,
        ge=1.0,
        description="how many times rarer than the most frequent the rarest training numbers are made, with balanced "
        "validation and test; 1: as they are",
    )
    imbalance_law: Literal["exponential", "step", "normal"] = Field(
        "exponential", description="how the training numbers thin out"
    )
    image_size: int = Field(
        0, ge=0, description="side in pixels or voxels that images and volumes are scaled to; 0: the data set's own"
    )
    augment: list[str] = Field(
        default_factory=lambda: ["flip", "crop"],
        description="random views of the training samples, in this order; of images flip and crop unless said "
        "otherwise, of all else none",
    )
    workers: int = Field(0, ge=0, le=64, description="processes that read and decode images")
    on_error: Literal["raise", "skip"] = Field("raise", description="what to do with images that can't be read")
    target: str = Field(
        "",
        description="what is predicted: a column, an array, the key of captions; empty: the data set's own, or found",
    )
    labels: str = Field("", description="table with the numbers or captions of a folder's files")
    inputs: str = Field("", description="column of file names or texts, array of series or volumes; empty: found")
    max_length: int = Field(0, ge=0, description="leave out samples of inchi whose text has more characters; 0: none")
    captions: Literal["all", "first"] = Field(
        "all", description="of a picture with several texts, train on one by chance, or on the first"
    )
    pair: str = Field("", description="column of the second text of a pair; empty: single texts")
    group: str = Field(
        "",
        description="column, key or array that says which samples belong together, such as a patient; no two splits "
        "share one",
    )
    missing: Literal["error", "mean", "drop"] = Field("error", description="what to do with empty cells of a table")

    @field_validator("name")
    @classmethod
    def _in_catalogue(cls, value: str) -> str:
        check_name("data set", value, [*CATALOG, *NUMBER_SETS, *PAIR_SETS])
        return value

    @field_validator("augment")
    @classmethod
    def _views_exist(cls, value: list[str], info: ValidationInfo) -> list[str]:
        return _views(value, info.data.get("name", ""))

    @property
    def kind(self) -> str:
        """What a sample is; "images" for a set of classes, "pairs" for pictures with texts."""
        return kind_of(self.name)


def kind_of(data: str) -> str:
    if data in PAIR_SETS:
        return "pairs"
    return NUMBER_SETS[data].kind if data in NUMBER_SETS else "images"


def _views(names: list[str], data: str) -> list[str]:
    kind = kind_of(data).replace("pairs", "images")
    for name in names:
        if not VIEWS[kind]:
            raise ValueError(f'"{name}" is a view, but {data} holds {kind}, which have none; leave it out')
        check_name("view", name, VIEWS[kind])
    return names


class ModelSection(Section):
    name: str = Field("small-resnet", description="backbone or encoder, one of this package's or timm/NAME")
    options: dict[str, Any] = Field(
        default_factory=dict, description="what the model takes; checkpoint = a file of weights to start from"
    )

    @field_validator("name")
    @classmethod
    def _is_a_model(cls, value: str) -> str:
        if not value.startswith("timm/"):
            check_name("model", value, [*MODELS, *ENCODERS, *PAIR_MODELS])
        return value

    @field_validator("options")
    @classmethod
    def _fit_the_model(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name", "")
        if name in ENCODERS:
            check_options("model", name, encoder_options(name), value)
        if name in MODELS:
            check_options("model", name, [*model_options(name), "checkpoint"], value)
        if name in PAIR_MODELS:
            check_options("model", name, pair_model_options(name), value)
        return value

    @property
    def kind(self) -> str:
        """What it takes."""
        if self.name in PAIR_MODELS:
            return "pairs"
        return ENCODERS[self.name].kind if self.name in ENCODERS else "images"


class TrainSection(Section):
    epochs: int = Field(
        20,
        ge=0,
        description="passes over the training samples; what does not fill a batch is left out. 0 only with tune.start, "
        "or for hf-clip and open-clip",
    )
    batch_size: int = Field(128, ge=1, le=2**24, description="samples of a step, all processes together")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with Nesterov momentum, or AdamW")
    lr: Float = Field(0.1, gt=0.0, description="learning rate after the warm-up")
    decay: Literal["cosine", "cosine-7/16"] = Field(
        "cosine", description="how it falls: to 0 along half a cosine, or cosine-7/16, as FixMatch has it, to a fifth"
    )
    weight_decay: Float = Field(5e-4, ge=0.0, description="of matrices and filters; norms and biases have none")
    momentum: Float = Field(0.9, ge=0.0, lt=1.0, description="of SGD")
    warmup_epochs: Float = Field(1.0, ge=0.0, description="epochs in which the learning rate rises linearly")
    clip_norm: Float = Field(
        0.0,
        ge=0.0,
        description="largest gradient norm, of the model and of a policy that learns each by itself; 0: no clipping",
    )
    accumulate: int = Field(1, ge=1, description="parts that a batch is split into, one backward each")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the arithmetic; weights stay fp32")
    ema: Float = Field(0.0, ge=0.0, lt=1.0, description="decay of the averaged weights that are evaluated; 0: off")
    channels_last: bool = Field(True, description="memory format of images, volumes and filters")
    compile: bool = Field(
        False,
        description="torch.compile model and objective for the steps: slower to start, dropout draws other numbers, "
        "and small images on a GPU can be faster; classification only",
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: a GPU if there is one")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0: torch's own choice")
    log_every: int = Field(20, ge=1, description="steps between two lines of metrics.jsonl")
    checkpoint_every: int = Field(1, ge=1, description="epochs between two checkpoints")


class ContrastSection(Section):
    objective: Component = Field(description="contrastive objective and its settings")
    epochs: int = Field(
        ge=0,
        description="of the epochs, how many pre-train the encoder; the rest train the head. 0: together with the head",
    )
    weight: Float = Field(0.0, ge=0.0, description="of the contrast beside the head's loss, where epochs is 0")
    labels: Literal["standardized", "raw"] = Field(
        "standardized",
        description="what the settings count in: standard deviations, or the own unit",
    )
    augment: list[str] = Field(
        default_factory=list, description="views of the samples that are contrasted; data.augment unless said otherwise"
    )
    noise: Float = Field(
        0.0,
        ge=0.0,
        description="noise on the contrasted samples, in standard deviations; 0.1 for tables unless said otherwise",
    )
    views: int = Field(
        2,
        ge=1,
        le=8,
        description="of each sample; 2 unless said otherwise, 1 where neither views nor noise tell them apart",
    )
    projector: Literal["linear", "mlp", "none"] = Field(
        "linear", description="what makes embeddings of features; none: the features are contrasted themselves"
    )
    projection: int = Field(32, ge=1, description="size of the embeddings")
    probe: Literal["linear", "finetune"] = Field("linear", description="train the head alone afterwards, or all")
    head_lr: Float = Field(
        0.01,
        gt=0.0,
        description="learning rate of the second stage; where that trains all, by default train.lr",
    )
    data: DataSection | None = Field(
        None, description="another set to pre-train on; what it does not say is as in the data section"
    )

    @field_validator("objective", mode="after")
    @classmethod
    def _known(cls, value: Component) -> Component:
        try:
            build_contrast(value)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("epochs")
    @classmethod
    def _joint(cls, value: int, info: ValidationInfo) -> int:
        objective = info.data.get("objective")
        if value and objective is not None and objective.name in JOINT_CONTRASTS:
            raise ValueError(
                f"is {value}, but {objective.name} is made to stand beside a head's loss; set contrast.epochs=0 and "
                "contrast.weight above 0"
            )
        return value


class DensitySection(Section):
    lds: bool = Field(False, description="weight samples by one over how frequent labels like theirs are")
    fds: bool = Field(False, description="give features the mean and variance that those of near labels have")
    bins: int = Field(50, ge=1, description="equal bins over the range of the training labels")
    kernel_size: int = Field(5, ge=1, description="bins that the smoothing reaches over, odd")
    sigma: Float = Field(2.0, gt=0.0, description="width of the Gaussian smoothing in bins")
    scheme: Literal["inverse", "sqrt_inverse"] = Field("inverse", description="weights by the density or by its root")

    @field_validator("kernel_size")
    @classmethod
    def _has_a_middle(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"is {value}; pass an odd number, so that it has a middle")
        return value


class TuneSection(Section):
    start: str = Field(
        "", description="whose weights to start from: a recipe, which is trained once and kept, or the folder of a run"
    )
    temperature: Float = Field(
        0.0, ge=0.0, description="of the cosines, one over their scale; 0: that of the start, or the model's own"
    )
    learn_temperature: bool = Field(True, description="train the temperature too; it stays at 0.01 or above")
    freeze: list[str] = Field(default_factory=list, description=f"parts to hold as they are, of {', '.join(PARTS)}")
    layer_decay: Float = Field(
        1.0, gt=0.0, le=1.0, description="factor on the learning rate for each layer further from the end of a tower"
    )
    lora: int = Field(
        0,
        ge=0,
        description="rank of adapters (LoRA) that are trained in the layers of towers instead of their weights, unless "
        "freeze holds the tower; needs peft. 0: the weights themselves",
    )
    texts: Literal["captions", "classes"] = Field(
        "captions", description="what pictures are matched with: their texts, or prompts with their class, as in FLYP"
    )
    classes: Literal["group", "subgroup"] = Field("group", description="classes of prompts, head, and zero-shot")
    head: bool = Field(
        False, description="train a linear head on the pictures' features instead of matching them with texts"
    )
    probe_epochs: int = Field(
        0, ge=0, description="epochs that train the head alone, first: all of them for a linear probe, some for LP-FT"
    )
    after: Literal["nothing", "wise-ft", "tpgm", "embedding-shift"] = Field(
        "nothing", description="what is done with the tuned weights, or with the embeddings, before they are measured"
    )
    amount: Float = Field(
        -1.0,
        le=1.0,
        description="WiSE-FT's share of the tuned weights, or how far the modalities are shifted; below 0: the best of "
        "0, 0.1 .. 1 on the validation split",
    )

    @field_validator("freeze")
    @classmethod
    def _parts_exist(cls, value: list[str]) -> list[str]:
        for name in value:
            check_name("part of the model", name, PARTS)
        return value


class EvalSection(Section):
    every: int = Field(1, ge=1, description="epochs between two evaluations")
    batch_size: int = Field(500, ge=1, le=2**24, description="samples that are evaluated at once")
    checkpoint: Literal["last", "best"] = Field("last", description="weights that the test split is measured with")
    probe: int = Field(
        0, ge=0, description="training images that an evaluation of a classification run measures as they are too"
    )
    parts: list[str] = Field(
        default_factory=list,
        description=f"of an image-text run, what is measured at the end, of {', '.join(MEASURES)}; empty: all there is",
    )

    @field_validator("parts")
    @classmethod
    def _measures_exist(cls, value: list[str]) -> list[str]:
        for name in value:
            check_name("measure", name, MEASURES)
        return value
