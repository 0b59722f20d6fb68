"""What the four classification objectives share: modules, errors, devices, the compiler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix import losses
from hardmix.mixing import MixedTarget

PAIRS: list[tuple[Callable[..., Tensor], type[nn.Module]]] = [
    (losses.decoupled_mixup_loss, losses.DecoupledMixupLoss),
    (losses.decoupled_mixup_bce_loss, losses.DecoupledMixupBCELoss),
    (losses.soft_cross_entropy_loss, losses.SoftCrossEntropyLoss),
    (losses.soft_bce_loss, losses.SoftBCELoss),
]
FUNCTIONS = [function for function, _ in PAIRS]
CROSS_ENTROPIES = [losses.decoupled_mixup_loss, losses.soft_cross_entropy_loss]
BCES = [losses.decoupled_mixup_bce_loss, losses.soft_bce_loss]
OTHERS = {
    "eta": 0.7,
    "asymmetric": True,
    "xi": 0.8,
    "t": 0.5,
    "ignore_index": 3,
    "label_smoothing": 0.2,
    "reduction": "none",
}


def batch(n: int = 6, c: int = 5, seed: int = 0) -> tuple[Tensor, MixedTarget]:
    g = torch.Generator().manual_seed(seed)
    lam = torch.rand(n, generator=g)
    return torch.randn(n, c, generator=g), MixedTarget(
        torch.randint(c, (n, 2), generator=g), torch.stack([lam, 1 - lam], 1)
    )


# Modules


@pytest.mark.parametrize(("function", "module"), PAIRS)
def test_function_and_module_have_the_same_settings(function: Callable[..., Tensor], module: type[nn.Module]) -> None:
    of_function = inspect.signature(function).parameters
    of_module = inspect.signature(module).parameters
    assert list(of_function) == ["logits", "target", *of_module]
    for name, parameter in of_module.items():
        assert parameter.kind == of_function[name].kind == inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == of_function[name].default


@pytest.mark.parametrize(("function", "module"), PAIRS)
def test_each_setting_reaches_the_function(function: Callable[..., Tensor], module: type[nn.Module]) -> None:
    logits, target = batch()
    plain = function(logits, target)
    for name in inspect.signature(module).parameters:
        value = {name: torch.rand(5) if name == "weight" else OTHERS[name]}
        got = module(**value)(logits, target)
        assert torch.equal(got, function(logits, target, **value))
        assert got.shape != plain.shape or not torch.equal(got, plain), name


@pytest.mark.parametrize(("function", "module"), PAIRS)
def test_state_copy_and_conversion(function: Callable[..., Tensor], module: type[nn.Module]) -> None:
    logits, target = batch()
    weight = torch.rand(5)
    criterion = module(weight=weight)
    assert list(criterion.state_dict()) == ["weight"]
    assert not list(module().state_dict())
    assert not list(criterion.parameters())
    loaded = module(weight=torch.ones(5))
    loaded.load_state_dict(criterion.state_dict())
    for other in (loaded, copy.deepcopy(criterion)):
        assert torch.equal(other(logits, target), function(logits, target, weight=weight))
    assert criterion.double()(logits.double(), target).dtype == torch.float64
    assert criterion.half()(logits, target).dtype == torch.float32
    assert module.__name__ in repr(criterion)


def test_the_defaults_are_the_published_ones() -> None:
    of = {name: p.default for name, p in inspect.signature(losses.DecoupledMixupLoss).parameters.items()}
    assert of == {
        "eta": 0.1,
        "asymmetric": False,
        "weight": None,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "reduction": "mean",
    }
    of = {name: p.default for name, p in inspect.signature(losses.DecoupledMixupBCELoss).parameters.items()}
    assert of == {"xi": 1.0, "t": 1.0, "weight": None, "reduction": "mean"}


# Devices and the compiler


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("form", ["pair", "triple", "ids", "dense", "pixels"])
def test_no_value_is_read_outside_the_cpu(function: Callable[..., Tensor], form: str) -> None:
    """A meta tensor has no values: whatever waits for one on a device raises here."""
    space = (4, 3) if form == "pixels" else ()
    logits = torch.empty(6, 5, *space, device="meta", requires_grad=True)
    k = 3 if form == "triple" else 2
    target: Any = MixedTarget(
        torch.empty(6, k, *space, dtype=torch.long, device="meta"), torch.empty(6, k, device="meta")
    )
    if form == "ids":
        target = target.labels[:, 0]
    elif form == "dense":
        target = torch.empty(6, 5, device="meta")
    options: dict[str, Any] = {"weight": torch.empty(5, device="meta")}
    if "label_smoothing" in inspect.signature(function).parameters:
        options["label_smoothing"] = 0.1
    for reduction in ("mean", "none"):
        loss = function(logits, target, reduction=reduction, **options)
        assert loss.shape == ((6, *space) if reduction == "none" else ())
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert grad.shape == logits.shape
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        loss.sum().item()  # the meta device does raise


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (losses.decoupled_mixup_loss, "pair"),
        (losses.decoupled_mixup_loss, "triple"),
        (losses.decoupled_mixup_loss, "dense"),
        (losses.soft_cross_entropy_loss, "pixels"),
        (losses.soft_cross_entropy_loss, "ids"),
        (losses.decoupled_mixup_bce_loss, "pair"),
        (losses.decoupled_mixup_bce_loss, "dense"),
        (losses.soft_bce_loss, "pixels"),
    ],
)
def test_compiles_without_a_graph_break(function: Callable[..., Tensor], form: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    g = torch.Generator().manual_seed(1)
    space = (4, 3) if form == "pixels" else ()
    k = 3 if form == "triple" else 2
    options = {"xi": 0.8, "t": 0.5} if function is losses.decoupled_mixup_bce_loss else {}
    logits = torch.randn(6, 5, *space, generator=g)
    logits[0, 0] += 150.0  # a class so sure that everything else underflows
    labels = torch.randint(5, (6, k, *space), generator=g)
    target: Any = MixedTarget(labels, torch.rand(6, k, generator=g))
    if form == "ids":
        target = labels[:, 0]
    elif form == "dense":
        target = MixedTarget(labels, target.weights).dense(5)
    results = []
    for call in (function, compiled):
        z = logits.clone().requires_grad_()
        loss = call(z, target, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)


def test_one_graph_serves_all_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses.DecoupledMixupLoss(), fullgraph=True, backend=counter)
    for n in (4, 7, 9, 5):
        logits, target = batch(n)
        torch.testing.assert_close(compiled(logits, target), losses.decoupled_mixup_loss(logits, target))
    assert counter.frame_count <= 2


def test_autocast_does_not_lower_the_loss() -> None:
    logits, target = batch(8, 50)
    want = losses.decoupled_mixup_loss(logits, target, label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses.decoupled_mixup_loss(logits, target, label_smoothing=0.1)
    assert torch.equal(got, want)


def test_inference_needs_no_graph() -> None:
    logits, target = batch()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = losses.decoupled_mixup_loss(logits.clone().requires_grad_(), target)
        assert not loss.requires_grad


# Errors


def error_of(call: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert message.endswith(".")
    assert "; " in message
    return caught.type, message


LOGITS, TARGET = batch(4, 5)
LABELS, WEIGHTS = TARGET
META = torch.device("meta")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("logits", "target", "kind", "text"),
    [
        (LOGITS, torch.tensor([0, 1, 5, 2]), ValueError, "target holds the class 5, but there are 5 classes"),
        (LOGITS, torch.tensor([0, -7, 4, 2]), ValueError, "target holds the class -7"),
        (LOGITS, MixedTarget(LABELS + 5, WEIGHTS), ValueError, "pass class ids from 0 to 4"),
        (LOGITS, torch.tensor([0.5, 1.0, 2.0, 3.0]), TypeError, "target holds floats (regression labels)"),
        (LOGITS, MixedTarget(LABELS.float(), WEIGHTS), TypeError, "target.labels has dtype torch.float32"),
        (LOGITS, MixedTarget(LABELS > 2, WEIGHTS), TypeError, "target.labels has dtype torch.bool"),
        (LOGITS, torch.rand(4, 6), ValueError, "target has shape (4, 6) but logits has (4, 5)"),
        (LOGITS, torch.rand(4, 5, 2), ValueError, "pass soft labels of the same shape"),
        (LOGITS, F.one_hot(LABELS[:, 0], 5), ValueError, "pass class ids (4,), or soft labels as floats"),
        (LOGITS, torch.zeros(4, dtype=torch.bool), TypeError, "target has dtype torch.bool"),
        (LOGITS, torch.tensor([0, 1, 2]), ValueError, "target has 3 entries but logits has 4 rows"),
        (LOGITS, MixedTarget(LABELS[:3], WEIGHTS[:3]), ValueError, "target.labels has 3 entries but logits has 4 rows"),
        (LOGITS, MixedTarget(LABELS, WEIGHTS[:3]), ValueError, "target.weights has 3 entries"),
        (LOGITS, MixedTarget(LABELS, WEIGHTS[:, 0]), ValueError, "pass one weight per label"),
        (LOGITS, MixedTarget(LABELS, WEIGHTS.repeat(1, 2)), ValueError, "target.weights has shape (4, 4)"),
        (LOGITS, MixedTarget(LABELS, LABELS), TypeError, "target.weights has dtype torch.int64"),
        (LOGITS, MixedTarget(LABELS[:, 0], WEIGHTS), ValueError, "target.labels has shape (4,)"),
        (LOGITS, MixedTarget(LABELS[:, :0], WEIGHTS[:, :0]), ValueError, "pass at least one label per row"),
        (LOGITS, MixedTarget(torch.zeros(4, 2, 6).long(), WEIGHTS), ValueError, "target.labels has shape (4, 2, 6)"),
        (LOGITS, MixedTarget(torch.rand(4, 2, 6), WEIGHTS), ValueError, "rows of 6 columns, but logits has 5 classes"),
        (LOGITS, MixedTarget(torch.rand(4, 2, 6), WEIGHTS), ValueError, "pass rows (N, K, 5), or class ids (N, K)."),
        (LOGITS, MixedTarget(torch.rand(4, 2, 5) + 0j, WEIGHTS), TypeError, "target.labels has dtype torch.complex64"),
        (LOGITS, tuple(TARGET), TypeError, "target is a tuple; pass a MixedTarget, integer labels, or dense"),
        (LOGITS, [0, 1, 2, 3], TypeError, "target is a list"),
        (LOGITS, None, TypeError, "target is a NoneType"),
        (LOGITS, LABELS[:, 0].to(META), ValueError, "target is on meta but logits is on cpu"),
        (LOGITS, MixedTarget(LABELS.to(META), WEIGHTS), ValueError, "target.labels is on meta"),
        (LOGITS, MixedTarget(LABELS, WEIGHTS.to(META)), ValueError, "target.weights is on meta"),
        (LOGITS[:0], LABELS[:0, 0], ValueError, "logits has shape (0, 5) and is empty"),
        (LOGITS[0], LABELS[0], ValueError, "logits has shape (5,)"),
        (LOGITS.long(), LABELS[:, 0], TypeError, "logits has dtype torch.int64; pass floating-point logits"),
        (LOGITS.numpy(), LABELS[:, 0], TypeError, "logits is a ndarray"),
    ],
)
def test_bad_inputs(
    function: Callable[..., Tensor], logits: object, target: object, kind: type[Exception], text: str
) -> None:
    got, message = error_of(lambda: function(logits, target))
    assert got is kind
    assert message.startswith(f"{function.__name__}: ")
    assert text in message


@pytest.mark.parametrize(
    ("setting", "kind", "text"),
    [
        ({"eta": -0.1}, ValueError, "eta is -0.1; pass a finite number of at least 0."),
        ({"eta": float("nan")}, ValueError, "eta is nan"),
        ({"eta": float("inf")}, ValueError, "eta is inf"),
        ({"eta": "0.1"}, ValueError, "eta is '0.1'"),
        ({"eta": None}, TypeError, "eta is None"),
        ({"eta": torch.tensor(0.1)}, TypeError, "eta is tensor(0.1000)"),
        ({"asymmetric": 1}, TypeError, "asymmetric is 1; pass True or False."),
        ({"ignore_index": None}, TypeError, "ignore_index is None; pass an integer."),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; pass a number from 0 to 1."),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing is nan"),
        ({"xi": 0.0}, ValueError, "xi is 0.0; pass a finite number greater than 0."),
        ({"xi": 1.01}, ValueError, "xi is 1.01; pass a number from 0 to 1."),
        ({"xi": float("nan")}, ValueError, "xi is nan"),
        ({"t": -1.0}, ValueError, "t is -1.0; pass a finite number of at least 0."),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; pass one of 'mean', 'sum', 'none'"),
        ({"reduction": None}, TypeError, "reduction is None"),
        ({"weight": [1.0] * 5}, TypeError, "weight is a list; pass a torch.Tensor."),
        (
            {"weight": torch.ones(5).long()},
            ValueError,
            "weight has shape (5,) and dtype torch.int64; pass (C,) floats.",
        ),
        ({"weight": torch.ones(1, 5)}, ValueError, "weight has shape (1, 5)"),
    ],
)
def test_bad_settings(setting: dict[str, Any], kind: type[Exception], text: str) -> None:
    having = [pair for pair in PAIRS if set(setting) <= set(inspect.signature(pair[1]).parameters)]
    assert having
    for function, module in having:
        for name, call in (
            (function.__name__, partial(function, LOGITS, TARGET, **setting)),
            (module.__name__, partial(module, **setting)),
        ):
            got, message = error_of(call)
            assert got is kind
            assert message.startswith(f"{name}: ")
            assert text in message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_class_weights_fit_the_logits(function: Callable[..., Tensor]) -> None:
    _, message = error_of(lambda: function(LOGITS, TARGET, weight=torch.ones(4)))
    assert "weight has 4 entries but logits has 5 classes; pass one per class." in message
    _, message = error_of(lambda: function(LOGITS, TARGET, weight=torch.ones(5, device=META)))
    assert "weight is on meta but logits is on cpu" in message


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_of_any_float_type(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0])
    for target in (TARGET, TARGET.dense(5)):
        want = function(LOGITS, target, weight=weight)
        got = function(LOGITS, target, weight=weight.to(dtype))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want)
    wide = MixedTarget(LABELS, WEIGHTS.double())
    assert function(LOGITS, wide).dtype == torch.float32


@pytest.mark.parametrize("function", CROSS_ENTROPIES)
def test_one_class_is_refused(function: Callable[..., Tensor]) -> None:
    kind, message = error_of(lambda: function(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)))
    assert kind is ValueError
    assert "logits has 1 class; pass logits of at least 2 classes." in message


@pytest.mark.parametrize("function", BCES)
def test_bce_takes_one_class(function: Callable[..., Tensor]) -> None:
    got = function(torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [0.5]]))
    assert got.item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pixels_of_another_size(function: Callable[..., Tensor]) -> None:
    logits = torch.randn(2, 5, 4, 3)
    _, message = error_of(lambda: function(logits, torch.zeros(2, 3, 4, dtype=torch.long)))
    assert "pass class ids (2, 4, 3)" in message
    _, message = error_of(lambda: function(logits, MixedTarget(torch.zeros(2, 2, 3, 4).long(), torch.rand(2, 2))))
    assert "target.labels has shape (2, 2, 3, 4) but logits has (2, 5, 4, 3); pass class ids (2, K, 4, 3)." in message
    labels = torch.zeros(2, 2, 4, 3, dtype=torch.long)
    _, message = error_of(lambda: function(logits, MixedTarget(labels, torch.rand(2, 2, 4, 2))))
    assert "target.weights has shape (2, 2, 4, 2)" in message


def test_asymmetric_needs_to_know_the_labelled_class() -> None:
    kind, message = error_of(lambda: losses.decoupled_mixup_loss(LOGITS, TARGET.dense(5), asymmetric=True))
    assert kind is ValueError
    assert "dense soft labels do not say which class is the labelled one; pass a MixedTarget" in message
    losses.decoupled_mixup_loss(LOGITS, LABELS[:, 0], asymmetric=True)


def test_bce_has_no_ignored_class() -> None:
    _, message = error_of(lambda: losses.soft_bce_loss(LOGITS, torch.tensor([0, -100, 1, 2])))
    assert "target holds the class -100" in message


# Function transforms


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.torch.jit")  # from inside torch, of a kind that changes
def test_function_transforms(function: Callable[..., Tensor]) -> None:
    """Forward-mode tangents, gradients and batches of batches agree with the backward pass, which is hand-written."""
    logits, target = batch()
    logits, tangent = logits.double(), torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf, target), leaf)

    def loss(z: Tensor) -> Tensor:
        return function(z, target)

    value, change = torch.func.jvp(loss, (logits,), (tangent,))
    assert torch.allclose(value, loss(logits))
    assert torch.allclose(change, (want * tangent).sum())
    assert torch.allclose(torch.func.grad(loss)(logits), want)
    both = torch.func.vmap(loss)(torch.stack([logits, tangent]))
    assert torch.allclose(both, torch.stack([loss(logits), loss(tangent)]))
