"""Asking a model about its input: the right numbers, and no trace in the model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardmix.mixing import ManifoldMixup
from hardmix.mixing.gradients import hidden_map, input_saliency, logits_of, undisturbed
from mixing.cases import rng


def net(channels: int = 2, classes: int = 3, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Everything that a training step would change: a batch norm, dropout, parameters with and without gradients."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        norm(4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, classes),
    )


def batch(n: int = 4, size: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 2, *size, generator=rng(1)), torch.arange(n) % 3


def saliency_by_differences(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One pixel at a time, moved up and down."""
    out = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.float64)
    for i in range(x.shape[0]):
        for r in range(x.shape[2]):
            for c in range(x.shape[3]):
                squares = 0.0
                for channel in range(x.shape[1]):
                    losses = []
                    for step in (1e-6, -1e-6):
                        moved = x.clone()
                        moved[i, channel, r, c] += step
                        logits = model(moved)
                        losses.append(sum(-logits[k].log_softmax(0)[y[k]] for k in range(len(y))).item())
                    squares += ((losses[0] - losses[1]) / 2e-6) ** 2
                out[i, r, c] = (squares / x.shape[1]) ** 0.5
    return out


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_against_differences(training: bool) -> None:
    model = net().double()
    for p in model.parameters():  # differences of small numbers lose their digits
        p.mul_(3.0)
    x, y = batch(3, (3, 4))
    x = x.double()
    got = input_saliency(model.train(training), x, y)
    assert got.dtype == torch.float64
    assert got.shape == (3, 3, 4)
    assert not got.requires_grad
    plain = model.eval()
    if training:  # batch statistics, and nothing dropped
        plain = copy.deepcopy(model).train()
        plain[3].eval()
    want = saliency_by_differences(plain, x, y)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-8)
    assert want.max() > 1e-3


def everything(model: nn.Module) -> dict[str, object]:
    state: dict[str, object] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        state[f"grad of {name}"] = None if p.grad is None else p.grad.clone()
        state[f"flag of {name}"] = p.requires_grad
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        state[f"hooks of {name}"] = len(module._forward_hooks)
        if isinstance(module, nn.BatchNorm2d):
            state[f"tracking of {name}"] = module.track_running_stats
    return state


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a)  # type: ignore[arg-type]


def half_trained() -> nn.Sequential:
    model = net()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    model[4].weight.requires_grad_(False)
    model[1].eval()
    model.insert(2, nn.BatchNorm2d(4))
    return model


def test_leaves_no_trace() -> None:
    model, (x, y) = half_trained(), batch()
    before, pixels, chance = everything(model), x.clone(), torch.get_rng_state()
    input_saliency(model, x, y)
    hidden_map("here", model, x, "4", batch_statistics=True)
    hidden_map("here", model, x)
    assert same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), chance)
    assert torch.equal(x, pixels)
    assert not x.requires_grad


def test_leaves_no_trace_where_the_forward_fails() -> None:
    model, (x, y) = half_trained(), batch()
    model.append(nn.Linear(99, 3))
    before = everything(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        input_saliency(model, x, y)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        hidden_map("here", model, x)
    assert same(everything(model), before)


def test_works_without_gradients_around_it_and_beside_a_graph() -> None:
    model, (x, y) = net(), batch()
    want = input_saliency(model, x, y)
    with torch.no_grad():
        assert torch.equal(input_saliency(model, x, y), want)
    leaf = x.clone().requires_grad_()
    assert torch.equal(input_saliency(model, leaf * 1.0, y), want)
    assert leaf.grad is None


def test_batch_norm_takes_the_batch_where_it_trains() -> None:
    model, (x, _) = net(), batch()
    with undisturbed(model):
        got = model(x)
    hidden = F.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, training=True)
    assert torch.allclose(got, model[4:](hidden.tanh()), atol=1e-6)
    with undisturbed(model, batch_statistics=False):
        frozen = model(x)
    model.eval()
    assert torch.equal(frozen, model(x))
    with undisturbed(model):  # evaluates, as the caller has said
        assert torch.equal(frozen, model(x))


def test_one_row_takes_the_running_statistics() -> None:
    """A batch norm on one value per channel refuses to train."""
    model = nn.Sequential(nn.Conv2d(2, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(1, 2, 5, 5, generator=rng()), torch.tensor([1])
    got = input_saliency(model, x, y)
    assert torch.equal(got, input_saliency(model.eval(), x, y))


def test_rows_do_not_hang_on_their_number_without_batch_norm() -> None:
    model, (x, y) = net(norm=lambda channels: nn.GroupNorm(2, channels)), batch()
    got = input_saliency(model, x, y)
    for i in range(4):
        assert torch.allclose(got[i], input_saliency(model, x[i : i + 1], y[i : i + 1])[0], rtol=1e-4)


def test_labels_as_rows() -> None:
    model, (x, y) = net(), batch()
    want = input_saliency(model, x, y)
    rows = F.one_hot(y, 3)
    for given in (rows, rows.float(), rows.double(), y.int(), y.to(torch.uint8)):
        assert torch.allclose(input_saliency(model, x, given), want, rtol=1e-4, atol=1e-9)
    soft = rows.float() * 0.7 + 0.1
    assert not torch.allclose(input_saliency(model, x, soft), want, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model, (x, y) = net(), batch()
    want = input_saliency(model, x, y)
    assert torch.allclose(input_saliency(model, x.to(dtype), y), want, rtol=0.1, atol=2e-3)  # in the model's own dtype
    got = input_saliency(model.to(dtype), x.to(dtype), y)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(got.float(), want, rtol=0.2, atol=5e-3)


def test_series_and_volumes() -> None:
    for shape in ((3, 2, 9), (3, 2, 3, 4, 5)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.tensor(shape[1:]).prod()), 4))
        got = input_saliency(model, torch.rand(shape), torch.arange(3))
        assert got.shape == (3, *shape[2:])
        assert bool((got > 0).all())


def test_models_without_an_answer() -> None:
    class Deaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(x.shape[0], 3, requires_grad=True)

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x.mean((2, 3))

    x, y = batch()
    assert torch.equal(input_saliency(Deaf(), x, y), torch.zeros(4, 5, 7))
    with pytest.raises(ValueError, match="the model's output has no gradient; pass a model that works with gradients"):
        input_saliency(Silent(), x, y.clamp(max=1))
    broken = net()
    with torch.no_grad():
        broken[0].weight.fill_(torch.nan)
    assert bool(input_saliency(broken, x, y).isnan().all())


def test_logits_of_what_models_return() -> None:
    class Output:
        logits = x = batch()[0]

    for output in (Output.x, (Output.x, 1), [Output.x], Output()):
        assert logits_of("M", output) is Output.x
    with pytest.raises(TypeError, match=r"M: the model returned a dict; let it return logits \(N, C\)"):
        logits_of("M", {"logits": Output.x})


def test_hidden_mixing_sleeps() -> None:
    model, (x, y) = net(), batch()
    mix = ManifoldMixup(model, ["0"], include_input=False)
    want = input_saliency(model, x, y)
    mix(x, y)
    assert torch.equal(input_saliency(model, x, y), want)
    model(x)  # the draw is still there to be used
    mix(x, y)


def test_refusals() -> None:
    model, (x, y) = net(), batch()
    for bad_model, bad_x, bad_y, error, text in [
        ("resnet18", x, y, TypeError, r"model is a str; pass a torch\.nn\.Module"),
        (model, [1], y, TypeError, r"x is a list; pass a torch\.Tensor"),
        (model, x[:, 0, 0], y, ValueError, r"x has shape \(4, 7\); pass a batch with 3 to 5 axes"),
        (model, (x * 255).byte(), y, TypeError, "x has dtype torch.uint8, .*; pass floating-point images"),
        (model, x, None, ValueError, "y is None; pass the labels"),
        (model, x, [0], TypeError, r"y is a list; pass a torch\.Tensor"),
        (model, x, y[:2], ValueError, "y has 2 entries but x has 4 rows"),
        (model, x, y + 1, ValueError, "y holds the class 3, but there are 3 classes"),
        (model, x, y.float(), ValueError, r"y has shape \(4,\) and dtype torch.float32 but the logits have \(4, 3\)"),
        (model, x.to("meta"), y, ValueError, "x is on meta but the model is on cpu"),
        (model[:5], x, y, TypeError, r"the model returned shape \(4, 5, 3, 4\); pass a model that returns logits"),
    ]:
        with pytest.raises(error, match=f"here: {text}"):
            input_saliency(bad_model, bad_x, bad_y, who="here")


def test_the_last_map_is_found_before_the_pooling() -> None:
    model, (x, _) = net(), batch()
    name, found = hidden_map("here", model, x)
    assert name == "4"
    assert found.shape == (4, 5, 3, 4)
    assert not found.requires_grad
    model.eval()
    assert torch.equal(found, model[:5](x))
    name, again = hidden_map("here", model, x, "4")
    assert torch.equal(again, found)
    assert hidden_map("here", model, x, channels=4)[0] == "3"


def test_a_layer_may_return_a_tuple() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, 7

    x, _ = batch()
    _, found = hidden_map("here", nn.Sequential(nn.Identity(), Layer()), x, "1")
    assert torch.equal(found, x * 2)


def test_refusals_of_maps() -> None:
    model, (x, _) = net(), batch()
    with pytest.raises(ValueError, match=r"here: layer '7' put out no map \(N, D, h, w\); name a convolutional layer"):
        hidden_map("here", model, x, "7")
    with pytest.raises(
        ValueError, match=r"no layer of the model puts out a map .* of 6 channels, which the head reads"
    ):
        hidden_map("here", model, x, channels=6)
    with pytest.raises(ValueError, match="layer '0' put out 4 channels but the head reads 5; name the last map"):
        hidden_map("here", model, x, "0", channels=5)
    with pytest.raises(TypeError, match=r"x has dtype torch\.uint8"):
        hidden_map("here", model, (x * 255).byte())
