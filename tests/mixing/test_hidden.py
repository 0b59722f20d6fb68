"""ManifoldMixup: a hook that mixes once, and every way in which it must not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import compiling
from hardmix.mixing import CutMix, ManifoldMixup, RandomChoice, Scheduled
from hardmix.models.on_pixels import OnPixels
from mixing.cases import Wrapper, rng
from mixing.vits import tiny_vit


class Net(nn.Module):
    """Two layers that keep what they put out."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.layer1 = nn.Linear(6, 5)
        self.layer2 = nn.Sequential(nn.ReLU(), nn.Linear(5, 4))
        self.recompute = recompute
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        def both(x: Tensor) -> Tensor:
            return self.layer2(self.layer1(x))

        return checkpoint(both, x, use_reentrant=False) if self.recompute else both(x)


def net(seed: int = 0, **kwargs: bool) -> Net:
    torch.manual_seed(seed)
    return Net(**kwargs)


X, Y = torch.rand(8, 6, generator=rng()), torch.arange(8)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer2.1"])
def test_mixes_the_output_of_the_layer(layer: str) -> None:
    model = net()
    mix = ManifoldMixup(model, [layer], alpha=1.0, include_input=False)
    x, target = mix(X, Y, generator=rng(1))
    assert x is X
    partner, lam = target.labels[:, 1], target.weights[:, :1]
    with torch.no_grad():
        first = X @ model.layer1.weight.T + model.layer1.bias  # written out: calling a layer uses the draw
        if layer == "layer1":
            first = lam * first + (1 - lam) * first[partner]
        last = model.layer2[1]
        out = first.relu() @ last.weight.T + last.bias
        if layer != "layer1":
            out = lam * out + (1 - lam) * out[partner]
        got = model(X)
    assert torch.allclose(got, out, atol=1e-6)
    # once: the next forward is clean
    assert torch.equal(model(X), net()(X))


def test_the_input_is_one_of_the_places() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1", "layer2"], alpha=1.0)
    places = {"input": 0, "layer1": 0, "layer2": 0}
    generator = rng(2)
    for _ in range(300):
        x, target = mix(X, Y, generator=generator)
        if x is not X:
            places["input"] += 1
            lam = target.weights[:, :1]
            assert torch.allclose(x, lam * X + (1 - lam) * X[target.labels[:, 1]], atol=1e-6)
            assert torch.equal(model(X), net()(X))  # nothing is armed
            continue
        outputs = []
        handle = model.layer1.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(out))
        model(X)
        handle.remove()
        places["layer2" if torch.equal(outputs[0], model.layer1(X)) else "layer1"] += 1
    assert min(places.values()) > 60


def test_evaluation_never_mixes() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1"], include_input=False)
    mix(X, Y, generator=rng())
    model.eval()
    for _ in range(2):
        assert torch.equal(model(X), net()(X))
    model.train()
    assert not torch.equal(model(X), net()(X))  # still armed for the training forward


def test_a_draw_that_nobody_used_is_an_error_at_the_next() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer2"], include_input=False)
    mix(X, Y)
    model.layer1(X)  # a training forward that never reaches the layer
    with pytest.raises(
        RuntimeError, match=r"the draw for layer 'layer2' was not used; run the model once in training mode"
    ):
        mix(X, Y)
    mix.disarm()
    mix(X, Y)
    model(X)
    mix(X, Y)


def test_plan_alone_arms_nothing() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1"], include_input=False)
    plan = mix.plan(X, generator=rng())
    assert plan.blend(X).shape == X.shape
    assert torch.equal(model(X), net()(X))


def test_gradients_are_those_of_the_mixed_forward() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1"], include_input=False)
    _, target = mix(X, Y, generator=rng(3))
    model(X).square().sum().backward()
    twin = net()
    lam, partner = target.weights[:, :1], target.labels[:, 1]
    hidden = twin.layer1(X)
    twin.layer2(lam * hidden + (1 - lam) * hidden[partner]).square().sum().backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-5)


def test_activation_checkpointing_mixes_again() -> None:
    """The forward that is run again in the backward pass has to see the same mixed layer, or gradients are wrong."""
    plain, recomputed = net(), net(recompute=True)
    for model in (plain, recomputed):
        mix = ManifoldMixup(model, ["layer1"], include_input=False)
        mix(X, Y, generator=rng(3))
        model(X).square().sum().backward()
        assert torch.equal(model.eval()(X), net().eval()(X))
    for got, want in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-6)
    assert isinstance(torch._C._current_graph_task_id(), int)  # the private name that this leans on


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("between", ["input", "other policy", "disarm"])
def test_activation_checkpointing_of_a_clean_step_stays_clean(reentrant: bool, between: str) -> None:
    """A step that mixes elsewhere comes after one that mixed the layer: its forward must be run again unmixed."""
    x = X.clone().requires_grad_()  # a checkpoint that reenters autograd needs an input with a gradient

    def train(recompute: bool) -> Net:
        model = net()
        mix = ManifoldMixup(model, ["layer1"])

        def step(batch: Tensor) -> None:
            out = checkpoint(model, batch, use_reentrant=reentrant) if recompute else model(batch)
            out.square().sum().backward()

        generator, drawn = rng(), []
        while "input" not in drawn[1:] or drawn[-2] != "layer1":
            mixed, _ = mix(x, Y, generator=generator)
            drawn.append("layer1" if mixed is x else "input")
            step(mixed)
        if between != "input":
            while mix(x, Y, generator=generator)[0] is not x:
                pass
            if between == "disarm":
                mix.disarm()
            else:
                step(x)
            step(x)
        return model

    for got, want in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", ["one backward", "first to last", "last to first", "before the next draw is used"])
def test_activation_checkpointing_of_several_draws(reentrant: bool, order: str) -> None:
    """Each forward is run again with its own plan, a clean one among them without."""
    x = X.clone().requires_grad_()

    def train(recompute: bool) -> Net:
        model, losses = net(), []
        mix = ManifoldMixup(model, ["layer1"], include_input=False)

        def run() -> None:
            out = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
            losses.append(out.square().sum())

        for step in range(3):
            for _ in range(3):
                mix(x, Y, generator=rng(len(losses)))
                if order == "before the next draw is used" and losses:
                    losses.pop(0).backward()
                run()
            if step < 2:
                run()
            if order == "one backward":
                torch.stack(losses).sum().backward()
            for loss in losses if order == "first to last" else losses[::-1] if order == "last to first" else []:
                loss.backward()
            if order != "before the next draw is used":
                losses.clear()
        for loss in losses:
            loss.backward()
        return model

    for got, want in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-4)


def test_a_draw_inside_a_checkpoint_is_drawn_again() -> None:
    def train(recompute: bool) -> Net:
        torch.manual_seed(3)
        model = net()
        mix = ManifoldMixup(model, ["layer1"], include_input=False)

        def loss() -> Tensor:
            return model(mix(X, Y)[0]).square().sum()

        for _ in range(2):
            (checkpoint(loss, use_reentrant=False) if recompute else loss()).backward()
        return model

    for got, want in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-4)


def test_one_seed_mixes_each_forward_of_a_step_alike() -> None:
    """As a closure of LBFGS or two passes at one batch need it, where a second forward of one draw is clean."""
    model = net()
    mix = ManifoldMixup(model, ["layer1", "layer2"])
    for step in range(6):
        first, second = (model(mix(X, Y, generator=rng(step))[0]) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, net()(X))


def test_the_model_is_not_kept() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1"])
    assert mix.state_dict() == {}
    assert list(mix.children()) == []
    assert list(mix.parameters()) == []
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    kept = net()
    mix = ManifoldMixup(kept, ["layer1"], include_input=False)
    del mix
    gc.collect()
    assert torch.equal(kept(X), net()(X))


def test_copies_of_the_policy_have_no_hooks() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1"], include_input=False)
    for twin in (copy.deepcopy(mix), pickle.loads(pickle.dumps(mix))):
        with pytest.raises(RuntimeError, match=r"this policy is a copy without hooks; call attach\(model\) first\."):
            twin(X, Y)
        other = net()
        twin.attach(other)
        twin(X, Y, generator=rng(1))
        assert not torch.equal(other(X), net()(X))
        assert twin.layers == ("layer1",)
    mix(X, Y)
    assert not torch.equal(model(X), net()(X))  # the original still works


def test_copies_of_the_model_never_mix() -> None:
    """An averaged copy of the weights is made with deepcopy: it must not eat the draw."""
    model = net()
    mix = ManifoldMixup(model, ["layer1"], include_input=False)
    mix(X, Y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.train()(X), net()(X))
    replica = copy.copy(model.layer1)  # shares the hooks, as the replicas of DataParallel do
    assert torch.equal(replica(X), X @ model.layer1.weight.T + model.layer1.bias)
    with pytest.raises(RuntimeError, match=r"was not used; .* and the replicas of DataParallel mix nothing"):
        mix(X, Y)
    assert not torch.equal(model(X), net()(X))


def test_wrapped_models() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1"], include_input=False)
    wrapped = Wrapper(model)
    mix(X, Y)
    assert not torch.equal(wrapped(X), net()(X))
    mix(X, Y)
    wrapped.eval()
    assert torch.equal(wrapped(X), net()(X))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where the graph breaks
def test_compiled_models() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer1"], alpha=1.0, include_input=False)
    compiled = torch.compile(model, backend="eager")
    clean = net()(X)
    for seed in range(3):
        _, target = mix(X, Y, generator=rng(seed))
        lam, partner = target.weights[:, :1], target.labels[:, 1]
        hidden = X @ model.layer1.weight.T + model.layer1.bias
        want = model.layer2[1]((lam * hidden + (1 - lam) * hidden[partner]).relu())
        assert torch.allclose(compiled(X), want, atol=1e-6)
        assert torch.allclose(compiled(X), clean, atol=1e-6)


@compiling.supported
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where the graph breaks
def test_deep_layers_of_compiled_models() -> None:
    """The compiler takes blocks of one class for alike, hook or not, unless its setting says otherwise."""
    import torch._dynamo

    model, x = tiny_vit(), torch.rand(2, 3, 32, 32, generator=rng())
    mix = ManifoldMixup(model, ["stage3.blocks.0"], include_input=False)
    for skip in (False, True):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=skip):
            compiled = torch.compile(model, backend="eager")
            mix(x, Y[:2], generator=rng(1))
            got = compiled(x)
        if skip:
            with pytest.raises(
                RuntimeError, match=r"torch\._dynamo\.config\.skip_nnmodule_hook_guards is set to False"
            ):
                mix(x, Y[:2])
        else:
            mix(x, Y[:2], generator=rng(1))
            assert torch.allclose(got, model(x), atol=1e-5)
    torch._dynamo.reset()


class Adapted(nn.Module):
    """As libraries of adapters have it: the layer, and what is added to its output."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.added = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.added(x)


@pytest.mark.parametrize("change", ["adapter", "another", "gone"])
def test_a_layer_that_was_replaced_is_an_error(change: str) -> None:
    """The hook sits on what was there before, which may still run as a part of the new layer."""
    model = net()
    mix = ManifoldMixup(model, ["layer2.1"], alpha=1.0, include_input=False)
    mix(X, Y)
    if change == "gone":
        model.layer2 = nn.Linear(5, 4)
    else:
        model.layer2[1] = Adapted(model.layer2[1]) if change == "adapter" else nn.Linear(5, 4)
    with pytest.raises(
        RuntimeError, match=r"ManifoldMixup: layer 'layer2\.1' was replaced in the model; call attach\(model\) with the"
    ):
        mix(X, Y)
    if change == "gone":
        with pytest.raises(ValueError, match=r"layers names 'layer2\.1', which the model does not have"):
            mix.attach(model)
        return
    mix.attach(model)
    _, target = mix(X, Y)
    got, want, lam = model(X), model(X), target.weights[:, :1]
    assert torch.allclose(got, lam * want + (1 - lam) * want[target.labels[:, 1]], atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where the graph breaks
def test_layers_that_are_wrapped_where_they_are_go_on() -> None:
    model = net()
    mix = ManifoldMixup(model, ["layer2.1"], include_input=False)
    model.layer2[1] = torch.compile(model.layer2[1], backend="eager")
    model.layer2 = Wrapper(Wrapper(model.layer2))
    mix(X, Y)
    assert not torch.equal(model(X), net()(X))


def test_a_model_with_the_names_of_its_part() -> None:
    model = net()
    outer = OnPixels(model, nn.Identity())
    mix = ManifoldMixup(outer, ["layer2.1"], include_input=False)
    mix(X, Y)
    assert not torch.equal(outer(X), net()(X))
    del model.layer2
    with pytest.raises(RuntimeError, match=r"layer 'layer2\.1' was replaced"):
        mix(X, Y)


class Pair(NamedTuple):
    hidden: Tensor
    extra: int


@pytest.mark.parametrize("kind", [tuple, list, Pair])
def test_tuples_mix_their_first_entry(kind: type) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> object:
            return Pair(x, 7) if kind is Pair else kind([x, 7])

    model = nn.Sequential(Layer())
    mix = ManifoldMixup(model, ["0"], alpha=1.0, include_input=False)
    _, target = mix(X, Y, generator=rng())
    out = model(X)
    assert type(out) is kind
    assert out[1] == 7
    lam = target.weights[:, :1]
    assert torch.allclose(out[0], lam * X + (1 - lam) * X[target.labels[:, 1]], atol=1e-6)


def test_other_outputs_are_refused() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> object:
            return {"hidden": x}

    model = nn.Sequential(Layer())
    mix = ManifoldMixup(model, ["0"], include_input=False)
    mix(X, Y)
    with pytest.raises(TypeError, match="ManifoldMixup: a layer returned a dict; name a layer that returns a tensor"):
        model(X)
    model = net()
    mix = ManifoldMixup(model, ["layer1"], include_input=False)
    mix(X, Y)
    with pytest.raises(ValueError, match=r"MixPlan\.blend: x has 4 entries but the plan has 8 rows"):
        model(X[:4])


def test_settings() -> None:
    model = net()
    with pytest.raises(
        ValueError, match=r"layers names 'layer3', which the model does not have \(did you mean \"layer.\"\?\)"
    ):
        ManifoldMixup(model, ["layer1", "layer3"])
    assert len(model.layer1._forward_hooks) == 0  # nothing was hooked before the name was found wrong
    with pytest.raises(ValueError, match="layers names ''"):
        ManifoldMixup(model, [""])
    with pytest.raises(TypeError, match="ManifoldMixup: layers is 'layer1'; pass a list of submodule names"):
        ManifoldMixup(model, "layer1")
    with pytest.raises(TypeError, match=r"ManifoldMixup: include_input is 'no'; pass True or False\."):
        ManifoldMixup(net(), ["layer1"], include_input="no")
    with pytest.raises(ValueError, match="layers is empty and include_input is False; name a layer"):
        ManifoldMixup(model, [], include_input=False)
    with pytest.raises(TypeError, match=r"ManifoldMixup: model is a dict; pass a torch\.nn\.Module\."):
        ManifoldMixup({}, ["layer1"])
    mix = ManifoldMixup(model, ["layer1", "layer2"])
    assert len(model.layer1._forward_hooks) == 1
    mix.attach(model)
    assert len(model.layer1._forward_hooks) == 1
    mix.detach()
    assert len(model.layer1._forward_hooks) == len(model.layer2._forward_hooks) == 0
    assert "layers=['layer1', 'layer2']" in repr(mix)


def test_in_a_choice_and_a_schedule() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    hidden = ManifoldMixup(model, ["0"], include_input=False)
    choice = RandomChoice([CutMix(), Scheduled(hidden, start=0.5)])
    choice.set_progress(0.7)
    x, generator, armed = torch.rand(4, 3, 8, 8, generator=rng()), rng(1), 0
    with torch.no_grad():
        clean = model(x)
        for _ in range(20):
            mixed, _ = choice(x, torch.arange(4), generator=generator)
            out = model(mixed)
            if mixed is x:
                armed += 1
                assert not torch.equal(out, clean)
    assert 0 < armed < 20
    with pytest.raises(
        ValueError, match='policies holds ManifoldMixup, which does more than a plan says; use per="batch"'
    ):
        RandomChoice([CutMix(), Scheduled(hidden)], per="sample")
