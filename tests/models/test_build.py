"""build_model: what it refuses and how it says so; checkpoints; the timm adapter with a stand-in for timm."""

from __future__ import annotations

import builtins
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hardmix.models import build_model, model_options

SIZES = {"num_classes": 10, "in_channels": 1, "image_size": 16}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "small-resnt",
            "build_model: name is 'small-resnt'; pass one of 'small-cnn', 'small-resnet', 'resnet18', 'wide-resnet', "
            "'tiny-vit', 'mobilenet-v2', 'imagenet-resnet18', 'timm/NAME' (did you mean \"small-resnet\"?).",
        ),
        (
            "qqq",
            "build_model: name is 'qqq'; pass one of 'small-cnn', 'small-resnet', 'resnet18', 'wide-resnet', "
            "'tiny-vit', 'mobilenet-v2', 'imagenet-resnet18', 'timm/NAME'.",
        ),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_model(name, **SIZES)


@pytest.mark.parametrize("name", [None, 3, True, ["small-cnn"]])
def test_names_that_are_no_string(name: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^build_model: name is "):
        build_model(name, **SIZES)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        (
            "small-resnet",
            "widht",
            "build_model: option of small-resnet is 'widht'; pass one of 'width', 'blocks', 'stem_stride', 'norm' "
            '(did you mean "width"?).',
        ),
        (
            "tiny-vit",
            "pathc",
            "build_model: option of tiny-vit is 'pathc'; pass one of 'dim', 'depth', 'heads', 'patch' "
            '(did you mean "patch"?).',
        ),
        ("small-cnn", "zzz", "build_model: option of small-cnn is 'zzz'; pass one of 'width', 'stem_stride', 'norm'."),
    ],
)
def test_unknown_options(name: str, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_model(name, **SIZES, **{option: 3})


def test_options_of_an_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"^model_options: name is 'small-cn'.*did you mean \"small-cnn\""):
        model_options("small-cn")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small-cnn", {"width": 0}, "SmallCNN: width is 0; pass an integer of at least 1."),
        ("small-cnn", {"num_classes": -1}, "SmallCNN: num_classes is -1; pass an integer of at least 0."),
        ("small-cnn", {"stem_stride": 0}, "SmallCNN: stem_stride is 0; pass an integer of at least 1."),
        (
            "small-cnn",
            {"norm": "bach"},
            "SmallCNN: norm is 'bach'; pass one of 'batch', 'group' (did you mean \"batch\"?).",
        ),
        ("small-resnet", {"blocks": 0}, "small-resnet: blocks is 0; pass an integer of at least 1."),
        ("small-resnet", {"in_channels": 0}, "small-resnet: in_channels is 0; pass an integer of at least 1."),
        ("resnet18", {"image_size": 0}, "resnet18: image_size is 0; pass an integer of at least 1."),
        ("resnet18", {"width": 0}, "resnet18: width is 0; pass an integer of at least 1."),
        ("tiny-vit", {"depth": 2}, "TinyViT: depth is 2; pass an integer of at least 3."),
        (
            "tiny-vit",
            {"heads": 5},
            "TinyViT: heads is 5 but dim is 64; pass a number of heads that divides dim.",
        ),
        (
            "tiny-vit",
            {"patch": 5},
            "TinyViT: patch is 5 but image_size is 16; pass a patch that divides it.",
        ),
    ],
)
def test_values_out_of_range(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_model(name, **{**SIZES, **options})


@pytest.mark.parametrize("value", [1.5, True, None, "16", float("nan")])
@pytest.mark.parametrize(
    ("name", "option"), [("small-cnn", "width"), ("small-resnet", "blocks"), ("tiny-vit", "dim"), ("resnet18", "width")]
)
def test_options_that_are_no_integer(name: str, option: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f": {option} is .*; pass an integer of at least 1"):
        build_model(name, **SIZES, **{option: value})


@pytest.mark.parametrize("name", ["small-cnn", "small-resnet", "resnet18", "tiny-vit"])
def test_bad_batches(name: str) -> None:
    options = {"width": 8} if name != "tiny-vit" else {"dim": 16}
    model = build_model(name, **SIZES, **options)
    with pytest.raises(ValueError, match=r": x has 3 channels; pass the 1 that the model was built for\.$"):
        model(torch.zeros(2, 3, 16, 16))
    with pytest.raises(TypeError, match=r": x has dtype torch\.uint8; pass normalised floating-point images\.$"):
        model(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r": x has shape \(1, 16, 16\); pass a batch with 4 axes, samples first\.$"):
        model(torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match=r": x has shape \(0, 1, 16, 16\) and is empty"):
        model(torch.zeros(0, 1, 16, 16))
    with pytest.raises(TypeError, match=r": x is a list; pass a torch\.Tensor\.$"):
        model([1.0])


def test_the_vit_knows_its_image_size() -> None:
    model = build_model("tiny-vit", **SIZES, dim=16)
    message = "TinyViT: x has spatial size (16, 8); pass the 16 x 16 it was built for."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(torch.zeros(2, 1, 16, 8))


# Checkpoints


def cnn(seed: int, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("small-cnn", **{**SIZES, "width": 8, **changes})


def same(model: nn.Module, other: nn.Module, names: list[str] | None = None) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in names or mine)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_checkpoint_of_every_kind(tmp_path: Path, suffix: str) -> None:
    source, path = cnn(0), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    assert not same(cnn(1), source)
    assert same(cnn(1, checkpoint=path), source)
    assert same(cnn(1, checkpoint=str(path)), source)


@pytest.mark.parametrize("nest", ["model", "state_dict", "model_state_dict"])
def test_checkpoint_among_other_things_and_from_ddp(tmp_path: Path, nest: str) -> None:
    source, path = cnn(0), tmp_path / "weights.pth"
    wrapped = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"epoch": 3, nest: wrapped, "optimizer": {"lr": 0.1}}, path)
    assert same(cnn(1, checkpoint=path), source)


def test_checkpoint_for_another_number_of_classes(tmp_path: Path) -> None:
    source, path = cnn(0, num_classes=5), tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    with pytest.warns(
        UserWarning, match=r"no classifier of this shape; head\.linear\.weight, head\.linear\.bias start"
    ):
        model = cnn(1, checkpoint=path)
    body = [name for name in source.state_dict() if not name.startswith("head.")]
    assert same(model, source, body)
    assert same(model, cnn(1), ["head.linear.weight", "head.linear.bias"])
    assert same(cnn(1, num_classes=0, checkpoint=path), source, body)


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(cnn(0, width=4).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"'stem\.0\.weight' has shape \(4, 1, 3, 3\) instead of \(8, 1, 3, 3\).* more\)"
    ):
        cnn(1, checkpoint=path)
    state = cnn(0).state_dict()
    state["extra"] = state.pop("stem.0.weight")
    torch.save(state, path)
    message = (
        f"build_model: checkpoint '{path}' does not fit the model ('stem.0.weight' is missing; 'extra' is unknown); "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        cnn(1, checkpoint=path)


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    gone = tmp_path / "gone.pth"
    with pytest.raises(ValueError, match=f"^build_model: checkpoint is '{re.escape(str(gone))}'; pass the path"):
        cnn(0, checkpoint=gone)
    other = tmp_path / "weights.npz"
    other.write_bytes(b"0")
    with pytest.raises(ValueError, match=r"pass the path of an existing \.safetensors, \.pth, \.pt, \.bin file\.$"):
        cnn(0, checkpoint=other)
    for suffix in (".pth", ".safetensors"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match=r"cannot be read as plain tensors .*; save the model's state_dict\(\)"):
            cnn(0, checkpoint=broken)
    for content in ([1, 2], {"a": 1}, {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=r"holds no state dict; save the model's state_dict\(\) on its own\.$"):
            cnn(0, checkpoint=tmp_path / "odd.pth")


class Trap:
    """An object whose unpickling would call a function."""

    ran = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Trap, "ran", True)


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trap.pth"
    torch.save({"stem.0.weight": Trap()}, path)
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        cnn(0, checkpoint=path)
    assert not Trap.ran


# timm


class Sized(nn.Module):
    """A stand-in for a timm model that takes the image size, like its transformers."""

    def __init__(self, *, num_classes: int, in_chans: int, img_size: int = 224, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.settings = {"img_size": img_size, "drop_rate": drop_rate}
        self.pretrained_cfg = {"classifier": "fc"}
        self.body = nn.Linear(in_chans, 4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x.mean((2, 3))))


class Free(Sized):
    """One that does not, like its convolutional networks."""

    def __init__(self, *, num_classes: int, in_chans: int, drop_rate: float = 0.0) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, img_size=0, drop_rate=drop_rate)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A stand-in for timm; the list collects what it was told about pretrained weights."""
    told: list[bool] = []
    models = {"sized": Sized, "free": Free}

    def create_model(name: str, *, pretrained: bool, **settings: object) -> nn.Module:
        told.append(pretrained)
        return models[name](**settings)

    fake = types.ModuleType("timm")
    fake.create_model, fake.is_model, fake.list_models = create_model, models.__contains__, lambda: list(models)
    monkeypatch.setitem(sys.modules, "timm", fake)
    return told


def test_timm_models(timm: list[bool]) -> None:
    sized = build_model("timm/sized", **SIZES, drop_rate=0.5)
    free = build_model("timm/free", **SIZES)
    assert sized(torch.zeros(2, 1, 16, 16)).shape == free(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert sized.settings == {"img_size": 16, "drop_rate": 0.5}
    assert free.settings == {"img_size": 0, "drop_rate": 0.0}
    assert timm
    assert not any(timm)


def test_timm_names_and_options(timm: list[bool]) -> None:
    for name in ("sizd", "hf-hub:someone/sized", "local-dir:/tmp"):
        message = f"build_model: name is 'timm/{name}', which timm does not have; pick one of timm.list_models()"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            build_model(f"timm/{name}", **SIZES)
    with pytest.raises(ValueError, match=r'\(did you mean "sized"\?\)\.$'):
        build_model("timm/sizd", **SIZES)
    for name in ("sized", "free"):
        with pytest.raises(
            ValueError, match=rf"^build_model: timm/{name} does not take these options \(.*'zzz'.*\); pass"
        ):
            build_model(f"timm/{name}", **SIZES, zzz=1)
    with pytest.raises(ValueError, match=r"^build_model: num_classes is -1; pass an integer of at least 0\.$"):
        build_model("timm/free", num_classes=-1, in_channels=1, image_size=16)


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg"])
def test_timm_downloads_nothing(timm: list[bool], key: str) -> None:
    message = f"build_model: {key} is no option here, nothing is downloaded; pass checkpoint=PATH."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_model("timm/sized", **SIZES, **{key: True})
    assert timm == []


def test_timm_checkpoint(timm: list[bool], tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_model("timm/sized", num_classes=5, in_channels=1, image_size=16)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"fc\.weight, fc\.bias start from scratch"):
        model = build_model("timm/sized", **SIZES, checkpoint=tmp_path / "weights.pth")
    assert same(model, source, ["body.weight", "body.bias"])


def test_timm_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"^build_model: name is 'timm/sized' but timm does not import .*hardmix\[timm\]"
    ):
        build_model("timm/sized", **SIZES)


def test_timm_beside_a_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """That import fails with a RuntimeError, not with an ImportError."""
    real = builtins.__import__

    def broken(name: str, *args: object, **kwargs: object) -> object:
        if name == "timm":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(
        ImportError, match=r"\(RuntimeError: operator torchvision::nms does not exist\); run .*hardmix\[timm\]"
    ):
        build_model("timm/sized", **SIZES)
