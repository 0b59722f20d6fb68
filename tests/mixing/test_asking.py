"""Policies that ask a model: what their copies and their pickles ask."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hardmix.distributed import leave
from hardmix.losses import SoftCrossEntropyLoss
from hardmix.mixing import (
    AdAutoMix,
    AlignMix,
    AttentiveMix,
    AutoMix,
    CoMixup,
    CutMix,
    GuidedMix,
    ManifoldMixup,
    MergeMix,
    Policy,
    PuzzleMix,
    RandomChoice,
    SaliencyMix,
    SAMix,
    Scheduled,
    SMMix,
    SnapMix,
    SUMix,
    SuperMix,
    TLAlign,
    TokenMix,
    TransMix,
)
from hardmix.mixing.asking import AskingPolicy
from hardmix.mixing.gradients import without_ddp
from mixing.cases import rng
from mixing.vits import tiny_vit

ASKING: dict[str, Callable[[nn.Module], AskingPolicy]] = {
    "attentivemix": lambda model: AttentiveMix(model, grid=2, cells=1),
    "snapmix": SnapMix,
    "guidedmix": lambda model: GuidedMix(model, saliency="input-gradient"),
    "saliencymix": lambda model: SaliencyMix(saliency="input-gradient", model=model),
    "puzzlemix": lambda model: PuzzleMix(model, blocks=[2]),
    "co-mixup": lambda model: CoMixup(model, blocks=[2]),
    "supermix": lambda model: SuperMix(model, steps=1),
}
FOLLOWING: dict[str, Callable[[nn.Module], AskingPolicy]] = {
    "automix": lambda model: AutoMix(model, input_shape=(3, 8, 8)),
    "samix": lambda model: SAMix(model, input_shape=(3, 8, 8)),
    "adautomix": lambda model: AdAutoMix(model, input_shape=(3, 8, 8)),
}
ALL = ASKING | FOLLOWING
X, Y = torch.rand(4, 3, 8, 8, generator=rng()), torch.arange(4)


class Net(nn.Sequential):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def asks(policy: Policy, model: Net) -> bool:
    """Whether a step of the policy runs `model`."""
    before = model.calls
    policy(X, Y, generator=rng(1))
    policy.loss(lambda logits, target: logits.mean())
    return model.calls > before


@pytest.mark.parametrize("name", ALL)
def test_a_copy_asks_the_same_model_or_the_one_that_is_copied_with_it(name: str) -> None:
    model = Net()
    policy = ALL[name](model)
    assert asks(policy, model)
    assert asks(copy.deepcopy(policy), model)
    assert asks(copy.copy(policy), model)
    other, twin = copy.deepcopy([nn.ModuleList([model]), policy])
    assert other[0] is not model
    assert asks(twin, other[0])
    assert not asks(twin, model)
    assert asks(policy, model)
    inside = copy.deepcopy(RandomChoice([Scheduled(policy)]))
    assert asks(inside, model)
    behind = ALL[name](nn.Sequential(model))  # a part of what is asked is copied too
    other, twin = copy.deepcopy([model, behind])
    assert asks(twin, other)
    assert not asks(twin, model)


@pytest.mark.parametrize("name", ["snapmix", "puzzlemix", "co-mixup", "supermix", "attentivemix", *FOLLOWING])
def test_a_model_is_needed(name: str) -> None:
    with pytest.raises(TypeError, match="model is a NoneType; pass a torch"):
        ALL[name](None)


@pytest.mark.parametrize("name", ALL)
def test_pickles(name: str) -> None:
    """A pickle holds the model, but not where it has to be the one that is trained."""
    policy = ALL[name](Net())
    alone = pickle.loads(pickle.dumps(policy))
    assert (alone.asked is None) == (name in FOLLOWING)
    if name in ASKING:
        assert asks(alone, alone.asked)
        model, twin = pickle.loads(pickle.dumps([policy.asked, policy]))
        assert asks(twin, model)


@pytest.mark.parametrize("name", ALL)
def test_attach_names_another_model(name: str) -> None:
    model, other = Net(), Net()
    policy = ALL[name](model)
    policy(X, Y)
    policy.attach(other)
    assert asks(policy, other)
    assert not asks(policy, model)
    assert not any(part is other for part in policy.modules())
    with pytest.raises(TypeError, match=rf"{type(policy).__name__}: model is a str; pass a torch\.nn\.Module"):
        policy.attach("net")


def test_names_have_to_be_those_of_the_new_model() -> None:
    snap, attentive = SnapMix(Net(), layer="0", head="3"), AttentiveMix(Net(), layer="0")
    with pytest.raises(ValueError, match="SnapMix: layer names '0', which the model does not have"):
        snap.attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="SnapMix: head names '3', of the class ReLU"):
        snap.attach(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()))
    with pytest.raises(ValueError, match="AttentiveMix: layer names '0', which the model does not have"):
        attentive.attach(nn.Linear(2, 2))
    assert asks(snap, snap.asked)  # as it was


def test_combinations_attach_and_disarm_what_they_hold() -> None:
    model, other = tiny_vit(), tiny_vit(1)
    x = torch.rand(4, 3, 32, 32, generator=rng())
    inner = [TransMix(model), SMMix(model), AutoMix(model)]
    for policy, one in [(RandomChoice([p]), p) for p in inner] + [(Scheduled(p), p) for p in inner]:
        policy(x, Y)
        policy.disarm()
        assert policy.loss(lambda logits, target: logits.mean()) is None
        policy(x, Y)  # no draw is left that waits
        policy.disarm()
        twin = copy.deepcopy(policy)
        twin.attach(other)
        twin(x, Y)
        held = next(part for part in twin.modules() if type(part) is type(one))
        assert (held.asked if isinstance(held, AutoMix) else held.tap.model) is other
    net, new = Net(), Net()
    inner = SnapMix(net)
    assert not Scheduled(inner).by_rows
    assert not RandomChoice([None, Scheduled(inner)]).by_rows
    assert Scheduled(SaliencyMix()).by_rows
    asked = SaliencyMix(saliency="input-gradient", model=net)
    mix = SUMix(net, asked)
    other = SUMix(new, asked)  # leaves it the model that it has
    assert asked.asked is net
    other.attach(new)
    assert asked.asked is new
    mix(X, Y)
    mix.disarm()
    with pytest.raises(RuntimeError, match="SUMix: relabel has no batch"):
        mix.relabel(torch.zeros(4, 4), None)


class Answer:
    """As transformers' models return it."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Answering(Net):
    def forward(self, x: Tensor) -> Answer:
        return Answer(super().forward(x))


@pytest.mark.parametrize("name", [*ALL, "sumix"])
def test_models_may_answer_with_an_object_that_has_logits(name: str) -> None:
    outputs = []
    for kind in (Net, Answering):
        torch.manual_seed(0)
        policy = (ALL | HOOKED)[name](kind())
        mixed, target = policy(X, Y, generator=rng(1))
        own = None if name == "sumix" else policy.loss(SoftCrossEntropyLoss())
        outputs.append([mixed, *target, torch.zeros(()) if own is None else own])
    for plain, answered in zip(*outputs, strict=True):
        assert torch.equal(plain, answered)


@pytest.mark.parametrize("name", [*ALL, "sumix"])
def test_batches_made_under_inference_mode(name: str) -> None:
    with torch.inference_mode():
        batch = X.clone(), Y.clone()
    results = []
    for x, y in ((X, Y), batch):
        torch.manual_seed(0)
        policy = (ALL | HOOKED)[name](Net())
        mixed, target = policy(x, y, generator=rng(1))
        own = None if name == "sumix" else policy.loss(SoftCrossEntropyLoss())
        if own is not None:
            own.backward()
        results.append([mixed, *target, *(p.grad for p in policy.parameters() if p.grad is not None)])
    for plain, inferred in zip(*results, strict=True):
        assert torch.equal(plain, inferred)


@pytest.mark.parametrize("name", ["guidedmix", "saliencymix", "puzzlemix", "co-mixup", "supermix"])
def test_inference_mode_is_named_where_gradients_are_needed(name: str) -> None:
    policy = ALL[name](Net())
    with torch.no_grad():
        policy(X, Y)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"Mix(up)?: torch\.inference_mode is on, under which"),
    ):
        policy(X, Y)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    leave()


HOOKED: dict[str, Callable[[nn.Module], Policy]] = {
    "sumix": lambda model: SUMix(model, CutMix()),
    "alignmix": lambda model: AlignMix(model, include_input=False),
    "smmix": SMMix,
    "mergemix": MergeMix,
    "tokenmix": TokenMix,
    "transmix": TransMix,
    "tl-align": TLAlign,
    "manifold-mixup": lambda model: ManifoldMixup(model, ["0"]),
}


def hooked(name: str) -> nn.Module:
    """A model for a policy of `HOOKED`."""
    return Net() if name in ("sumix", "alignmix", "manifold-mixup") else tiny_vit()


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in model.modules())


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_go_with_their_policy(name: str) -> None:
    model = hooked(name)
    for end in ("forgotten", "detached"):
        policy = HOOKED[name](model)
        policy(torch.rand(4, 3, 32, 32, generator=rng()), Y)
        twin = copy.deepcopy(policy)
        before = hooks(model)
        assert before > 0
        twin.attach(model)
        assert hooks(model) >= 2 * before or name == "alignmix"  # which looks for its layer at the draw
        del twin
        gc.collect()
        assert hooks(model) == before  # the policy's own are still there
        if end == "detached":
            policy.detach()
        else:
            del policy
            gc.collect()
        assert hooks(model) == 0
        assert b"hardmix.mixing" not in pickle.dumps(model)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", [*ALL, "sumix", "alignmix", "smmix", "mergemix", "tokenmix"])
def test_of_a_distributed_model_the_module_inside_is_asked(name: str) -> None:
    """A forward of the wrapper would wait for ranks that have drawn another policy, or are done with their search."""
    net = Net() if name in ALL else hooked(name)
    wrapped = DistributedDataParallel(net)
    forwards: list[nn.Module] = []
    net.register_forward_pre_hook(lambda module, args: forwards.append(module))
    wrapped.register_forward_pre_hook(lambda module, args: pytest.fail("the wrapper was run"))
    policy = (ALL | HOOKED)[name](wrapped)
    x = X if isinstance(net, Net) else torch.rand(4, 3, 32, 32, generator=rng())
    policy(x, Y, generator=rng(1))
    if name not in ("sumix", "smmix"):  # whose losses follow a training forward
        policy.loss(lambda logits, target: logits.mean())
    assert forwards
    if name in ALL:
        assert policy.asked is net
    if name == "snapmix":
        assert policy.head == "3"
        policy.attach(wrapped)
        assert policy.asked is net


@pytest.mark.usefixtures("group")
def test_the_module_inside_is_found_behind_the_compiler() -> None:
    net = Net()
    assert without_ddp(net) is net
    assert without_ddp(torch.compile(DistributedDataParallel(net), backend="eager")) is net
    compiled = torch.compile(net, backend="eager")
    assert without_ddp(compiled) is compiled
    assert without_ddp(DistributedDataParallel(compiled)) is compiled
