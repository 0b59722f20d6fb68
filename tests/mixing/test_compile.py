"""Policies inside torch.compile: one graph, no new one for each batch size, and the draw of the eager policy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import compiling
from hardmix.losses import SoftCrossEntropyLoss
from hardmix.mixing import AugMix, FMix, MixPlan, Mixup, RandomChoice
from mixing.cases import MODELLED, POLICIES, constant_rows, modelled, rng

pytestmark = compiling.supported


class Counter:
    """A backend that runs the captured graph as it is, and counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("augmix", "fmix-released")])
def test_one_graph_and_the_eager_draw(name: str) -> None:
    """Two graphs for four sizes: one for the first, one for all that follow; same seed, same plan as in eager mode.
    Before torch 2.8 a choice for each sample is compiled for each size."""
    counter = Counter()
    policy = POLICIES[name]("sample")
    compiled = torch.compile(policy, fullgraph=True, backend=counter)
    for n in (4, 6, 5, 3):
        values = 2.0 ** -torch.arange(n, dtype=torch.float32)
        x, y = constant_rows(values, (1, 6, 7)), torch.arange(n)
        torch.manual_seed(n)
        mixed, (labels, weights) = compiled(x, y)
        want = (weights * values[labels]).sum(1)
        assert torch.allclose(mixed.flatten(1).mean(1), want, atol=1e-5)
        torch.manual_seed(n)
        again, target = policy(x, y)
        if (
            name != "choice-batch"
        ):  # there a compiled step draws every policy's plan, an eager one only the chosen one's
            assert torch.equal(labels, target.labels)
            assert torch.equal(weights, target.weights)
            assert torch.equal(mixed, again)
    assert counter.graphs <= (4 if name == "choice-sample" and torch.__version__ < "2.8" else 2)


@pytest.mark.slow
def test_augmix_is_one_graph() -> None:
    counter = Counter()
    policy = AugMix()
    compiled = torch.compile(policy, fullgraph=True, backend=counter)
    for n in (4, 3, 5):
        x = torch.rand(n, 1, 8, 8)
        torch.manual_seed(n)
        mixed, target = compiled(x, torch.arange(n))
        torch.manual_seed(n)
        assert torch.allclose(mixed, policy(x, torch.arange(n))[0], atol=1e-5)
        assert bool((target.weights[:, 0] == 1).all())
    assert counter.graphs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixup", "cutmix", "fmix", "resizemix", "augmix"])
def test_blend_of_a_drawn_plan(name: str) -> None:
    """Each plan comes with another shift, box or mask; none of them is a constant of the graph."""
    policy = POLICIES[name]("sample")
    counter = Counter()

    def blend(plan: MixPlan, x: torch.Tensor) -> torch.Tensor:
        return plan.blend(x)

    compiled = torch.compile(blend, fullgraph=True, backend=counter)
    for n in (4, 6, 5, 3):
        x = torch.rand(n, 1, 6, 7)
        for _ in range(3):
            plan = policy.plan(x)
            assert torch.allclose(compiled(plan, x), plan.blend(x), atol=1e-6)
    assert counter.graphs <= 2


@pytest.mark.slow
@compiling.quiet
@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("name", ["mixup", "cutmix", "gridmix", "smoothmix", "fmix"])
def test_generated_code_mixes_as_eager_code(name: str, per: str) -> None:
    """What is kept in memory once and read by each pixel is the same for every batch size and memory format."""
    compiling.need_generated_code()
    policy = POLICIES[name](per)
    with torch._inductor.config.patch(fallback_random=True):  # the draws of eager code
        compiled = torch.compile(policy, fullgraph=True)
        for n, memory_format in ((4, torch.contiguous_format), (6, torch.contiguous_format), (5, torch.channels_last)):
            values = 2.0 ** -torch.arange(n, dtype=torch.float32)
            constant, noise = constant_rows(values, (1, 24, 31)), torch.rand(n, 2, 24, 31, generator=rng(n))
            x = torch.cat([constant, noise], 1).contiguous(memory_format=memory_format)
            torch.manual_seed(n)
            mixed, target = compiled(x, torch.arange(n))
            want = (target.weights * values[target.labels]).sum(1)
            assert torch.allclose(mixed[:, 0].flatten(1).mean(1), want, atol=1e-5)
            assert mixed.stride() == x.stride()
            if torch.__version__ < compiling.DRAWS_IN_ORDER:
                continue
            torch.manual_seed(n)
            again, wanted = policy(x, torch.arange(n))
            assert torch.equal(target.labels, wanted.labels)
            assert torch.allclose(target.weights, wanted.weights, rtol=0, atol=1e-6)
            assert torch.allclose(mixed, again, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cutmix", "gridmix", "resizemix", "smoothmix"])
def test_image_sizes_are_no_constants_of_the_graph(name: str) -> None:
    counter = Counter()
    compiled = torch.compile(POLICIES[name]("sample"), fullgraph=True, backend=counter)
    for size in range(8, 20):
        compiled(torch.rand(4, 1, size, size), torch.arange(4))
    assert counter.graphs <= 2


@pytest.mark.parametrize("spectrum", ["isotropic", "released"])
def test_a_compiled_fmix_sorts_no_whole_rows(spectrum: str) -> None:
    """Nor are its masks others than those of the eager policy, which are cut down before they are sorted."""
    policy, seen = FMix(spectrum=spectrum), []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(policy, fullgraph=True, backend=backend)
    for n in (4, 3):
        x = torch.rand(n, 1, 24, 40)
        torch.manual_seed(n)
        mixed, target = compiled(x, torch.arange(n))
        torch.manual_seed(n)
        again, wanted = policy(x, torch.arange(n))
        assert torch.equal(mixed, again)
        assert torch.equal(target.weights, wanted.weights)
    assert any("largest" in name for name in seen)
    assert not any("sort" in name for name in seen)


@pytest.mark.parametrize("name", ["cutmix", "saliencymix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_a_compiled_box_keeps_the_memory_format(name: str, dtype: torch.dtype) -> None:
    policy = POLICIES[name]("sample")
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch._dynamo.reset()
        x = (torch.rand(4, 3, 6, 7, generator=rng()) * 255).to(dtype).contiguous(memory_format=memory_format)
        torch.manual_seed(0)
        mixed, _ = torch.compile(policy, fullgraph=True, backend="aot_eager")(x, torch.arange(4))
        assert mixed.stride() == x.stride()
        torch.manual_seed(0)
        assert torch.equal(mixed, policy(x, torch.arange(4))[0])


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", ["fmix", "saliencymix"])
def test_autocast_changes_no_draw_in_a_compiled_step(name: str, where: str) -> None:
    policy = POLICIES[name]("sample")
    x, y = torch.rand(16, 1, 40, 40), torch.arange(16)

    def step(x: torch.Tensor, y: torch.Tensor) -> object:
        if where == "around":
            return policy(x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return policy(x, y)

    compiled = torch.compile(step, fullgraph=True, backend=Counter())
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around"):
        mixed, target = compiled(x, y)
    torch.manual_seed(0)
    again, wanted = policy(x, y)
    assert torch.equal(target.weights, wanted.weights)
    assert torch.equal(mixed, again)


def test_a_schedule_is_compiled_twice_at_most() -> None:
    policy = POLICIES["scheduled"]("sample")
    counter = Counter()
    compiled = torch.compile(policy, fullgraph=True, backend=counter)
    x, y = torch.rand(6, 1, 6, 7), torch.arange(6)
    torch.manual_seed(0)
    for step in range(10):
        policy.set_progress(step / 10)
        mixed, target = compiled(x, y)
        assert torch.equal(target.labels[:, 0], target.labels[:, 1]) == (step >= 5)
        assert step < 5 or torch.equal(mixed, x)
    assert counter.graphs <= 2


def test_a_compiled_choice_does_not_lose_what_a_policy_does_after_the_draw() -> None:
    """A choice that can't be compiled is drawn outside of the graph."""

    class Relabels(Mixup):
        def relabel(self, logits, target):
            return target._replace(weights=target.weights.flip(1))

    policy = RandomChoice([Relabels()])
    compiled = torch.compile(lambda x, y: policy(x, y), backend="eager")
    _, target = compiled(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert torch.equal(policy.relabel(torch.zeros(4, 4), target).weights, target.weights.flip(1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, where the graph breaks
@pytest.mark.parametrize("name", MODELLED)
def test_a_compiled_model_beside_a_policy_that_looks_at_it(name: str) -> None:
    """Such a policy is called outside of the graph: it runs the model, or puts hooks on it. A step with the compiled
    model is that of the model."""
    x, y = torch.rand(5, 3, 12, 16, generator=rng()), torch.arange(5)
    criterion, seen = SoftCrossEntropyLoss(), []
    for compiled in (False, True):
        policy, model = modelled(name)
        # Hooks are asked for only where this is set before the model is compiled; see ManifoldMixup and AttentionTap.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            run = torch.compile(model, backend="eager") if compiled else model
            for seed in range(2):
                mixed, target = policy(x, y, generator=rng(seed))
                logits = run(mixed)
                target = policy.relabel(logits, target)
                loss = policy.loss(criterion)
                policy.after_step()
        zero = torch.zeros(())
        seen.append((mixed, logits, target.weights, zero if loss is None else loss))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*seen, strict=True))
