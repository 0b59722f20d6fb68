"""What every policy that a recipe can name costs: to mix a batch, and in a whole training step.

    python benchmarks/policies.py                # 128 x 3 x 32 x 32 and 32 x 3 x 224 x 224, prints the tables
    python benchmarks/policies.py --full         # 128 images of 224 pixels
    python benchmarks/policies.py --save         # also writes benchmarks/results/policies.json
    python benchmarks/policies.py --only puzzlemix automix --shape 128x3x32x32

The policies are those of `hardmix.tables.POLICIES`, with one lambda for each sample and the settings of ARGUMENTS.
"x copy_" and "x Mixup" are the time of `policy(x, y)` as a multiple of one `copy_` of the batch into an existing
buffer, and of Mixup's. A policy that looks at the model pays its forwards there; one that mixes a hidden layer only
draws there. "step" is draw, forward, relabel, loss, backward, SGD and the policy's own step, as a multiple of Mixup's.
The model is a residual network of four stages, 16 to 128 channels wide with one block each, whose last map has 4 x 4
pixels for images of 32 and 7 x 7 for those of 224. Policies that read attention have a small vision transformer, and
Mixup's step on it to compare with.

Last columns: OpenMixup (37e1372) on a machine of this kind, one lambda a batch, in copies; and its published hours of
training on one GPU as a multiple of those without mixing, DeiT-S / ConvNeXt-T.

One thread, CPU time of the process, medians of rounds in which the cases take turns; 64 MB are written before each, as
after a training step. A case that has had `--budget` seconds sits out the rest. See mixing.py for the allocators.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _worker import ALLOCATORS, run_worker, save

RESULTS = Path(__file__).parent / "results" / "policies.json"
SHAPES = ("128x3x32x32", "32x3x224x224")
FULL = ("128x3x32x32", "128x3x224x224")
#: what a policy is made with besides its defaults; the names of policies stand for the policies
ARGUMENTS: dict[str, dict[str, Any]] = {
    "manifold-mixup": {"layers": ["stage1", "stage2"], "include_input": False},
    "alignmix": {"include_input": False},
    "random-choice": {"policies": ["mixup", "cutmix"]},
    "scheduled": {"policy": "mixup"},
    "sumix": {"policy": "cutmix"},
}
#: policies that read the attention of a vision transformer
TRANSFORMERS = ("transmix", "tokenmix", "mixpro", "smmix", "tl-align", "mergemix")
#: OpenMixup, in copies: 32 pixels, 224 pixels with the default allocator and with kept blocks
COPIES = {
    "mixup": (8.5, 28, 5.3),
    "cutmix": (8.8, 8.9, 3.3),
    "fmix": (14, 30, 7.7),
    "gridmix": (13, 31, 5.3),
    "resizemix": (14, 24, 6.8),
    "saliencymix": (10, 9.6, 3.9),
    "puzzlemix": (985, 1500, 580),  # without the gradient that it starts from
}
#: hours of training on CIFAR-100 on one A100, DeiT-S for 200 epochs and ConvNeXt-T; "" without mixing
HOURS = {"": (27, 10), "puzzlemix": (35, 53), "automix": (59, 56), "samix": (58, 57)}

Call = Callable[[], Any]


def build(name: str, model: Any, shape: list[int]) -> Any:
    """The policy `name` of the table. A model is handed over where one is required, and the shape of an image where it
    is asked for."""
    from hardmix import tables

    cls, options = tables.POLICIES[name], dict(ARGUMENTS.get(name, {}))
    parameters = inspect.signature(cls).parameters
    if "policies" in options:
        options["policies"] = [build(inner, model, shape) for inner in options["policies"]]
    if "policy" in options:
        options["policy"] = build(options["policy"], model, shape)
    if "input_shape" in parameters:
        options["input_shape"] = tuple(shape[1:])
    if "model" in parameters and parameters["model"].default is inspect.Parameter.empty:
        options["model"] = model
    return cls(**options)


def make_models(shape: list[int]) -> Callable[[str], Any]:
    """A function from the name of a policy to a new model for it, always with the same weights."""
    import torch

    from hardmix.models.build import build_model
    from hardmix.models.resnet import ResNet

    torch.manual_seed(0)
    size = shape[2]
    network = ResNet(
        num_classes=10,
        in_channels=shape[1],
        stem_stride=1 if size <= 64 else 4,
        width=16,
        blocks=1,
        stages=4,
        norm="batch",
    )
    options = {"num_classes": 10, "in_channels": shape[1], "image_size": size}
    transformer = build_model("tiny-vit", patch=4 if size <= 64 else 16, **options)
    return lambda name: copy.deepcopy(transformer if name in TRANSFORMERS else network)


def mixing_case(policy: Any, x: Any, y: Any) -> tuple[Call, Call]:
    """(the call that is timed, what clears up after it)"""
    import torch

    generator = torch.Generator().manual_seed(0)
    return lambda: policy(x, y, generator=generator), getattr(policy, "disarm", lambda: None)


def step_case(policy: Any, model: Any, x: Any, y: Any) -> tuple[Call, Call]:
    import torch

    from hardmix.losses import SoftCrossEntropyLoss

    generator, criterion = torch.Generator().manual_seed(0), SoftCrossEntropyLoss()
    learnt = [*model.parameters(), *([] if policy is None else policy.parameters())]
    optimizer = torch.optim.SGD([p for p in learnt if p.requires_grad], lr=1e-3, momentum=0.9)

    def step() -> None:
        images, target = (x, y) if policy is None else policy(x, y, generator=generator)
        logits = model(images)
        if policy is not None:
            target = policy.relabel(logits, target)
        loss = criterion(logits, target)
        own = None if policy is None else policy.loss(criterion)
        (loss if own is None else loss + own).backward()
        optimizer.step()
        optimizer.zero_grad()
        if policy is not None:
            policy.after_step()

    return step, lambda: None


def measure(cases: dict[str, tuple[Call, Call]], rounds: int, budget: float) -> tuple[dict[str, float], dict[str, str]]:
    """(name -> median CPU milliseconds, name -> what a case raised)"""
    import torch

    raised = {}
    for name, (call, clear) in cases.items():
        try:
            call()
            clear()
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
    times: dict[str, list[int]] = {name: [] for name in cases if name not in raised}
    spoil = torch.zeros(16 * 2**20)
    names = list(times)
    for turn in range(rounds):
        first = turn * 7 % len(names)
        for name in names[first:] + names[:first]:
            if sum(times[name]) > budget * 1e9:
                continue
            call, clear = cases[name]
            spoil.add_(1.0)
            start = time.process_time_ns()
            call()
            times[name].append(time.process_time_ns() - start)
            clear()
    return {name: statistics.median(taken) / 1e6 for name, taken in times.items()}, raised


def measure_shape(setting: dict) -> dict:
    """Both tables of one shape: policy -> milliseconds and multiples."""
    import torch

    import hardmix
    from hardmix import tables

    shape = [int(length) for length in setting["shape"].split("x")]
    x, y = torch.rand(shape), torch.arange(shape[0]) % 10
    buffer = torch.empty_like(x)
    new_model = make_models(shape)
    mixing: dict[str, tuple[Call, Call]] = {"copy_": (lambda: buffer.copy_(x), lambda: None)}
    steps = {"no mixing": step_case(None, new_model("mixup"), x, y)}
    raised: dict[str, str] = {}
    models = []  # policies don't keep theirs alive
    names = [name for name in tables.POLICIES if name in {"mixup", *(setting["only"] or tables.POLICIES)}]
    for name in names:
        try:
            # A policy for each: hooks of two on one model would mix twice.
            model, trained = new_model(name), new_model(name)
            models += [model, trained]
            mixing[name] = mixing_case(build(name, model, shape), x, y)
            steps[name] = step_case(build(name, trained, shape), trained, x, y)
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
    on_transformer = [name for name in names if name in TRANSFORMERS]
    if on_transformer:
        model = new_model(on_transformer[0])
        steps["mixup, transformer"] = step_case(build("mixup", model, shape), model, x, y)
    mix_ms, mix_raised = measure(mixing, setting["rounds"], setting["budget"])
    step_ms, step_raised = measure(steps, max(3, setting["rounds"] // 4), setting["budget"])
    rows = {}
    for name in ["no mixing", *names]:
        row: dict[str, Any] = {}
        if name in mix_ms:
            row |= {
                "ms": mix_ms[name],
                "copies": mix_ms[name] / mix_ms["copy_"],
                "mixups": mix_ms[name] / mix_ms["mixup"],
            }
        if name in step_ms:
            base = step_ms["mixup, transformer" if name in TRANSFORMERS else "mixup"]
            row |= {"step_ms": step_ms[name], "step": step_ms[name] / base}
        if name in COPIES:
            row["openmixup_copies"] = COPIES[name][0 if shape[2] < 64 else 1 + (setting["allocator"] == "kept")]
        if name in HOURS:
            row["published"] = [round(hours / free, 2) for hours, free in zip(HOURS[name], HOURS[""], strict=True)]
        rows[name] = row
    versions = {"hardmix": hardmix.__version__, "torch": torch.__version__}
    raised |= {**mix_raised, **step_raised}
    return {**setting, "copy_ms": mix_ms["copy_"], "rows": rows, "raises": raised, "versions": versions}


def show(table: dict) -> None:
    print("\n{shape}, {allocator} allocator, one thread, copy_ {copy_ms:.2f} ms".format(**table))
    heads = ("policy(x, y) ms", "x copy_", "x Mixup", "step ms", "step x Mixup", "OpenMixup x copy_", "published")
    print(f"{'':16s}" + "".join(f"{head:>18s}" for head in heads))
    for name, row in table["rows"].items():
        cells = [
            "-" if row.get(key) is None else f"{row[key]:,.{digits}f}"
            for key, digits in (
                ("ms", 3),
                ("copies", 1),
                ("mixups", 2),
                ("step_ms", 1),
                ("step", 2),
                ("openmixup_copies", 1),
            )
        ]
        cells.append(" / ".join(f"{ratio:.1f}" for ratio in row["published"]) if "published" in row else "-")
        print(f"{name:16s}" + "".join(f"{cell:>18s}" for cell in cells))
    for name, error in table["raises"].items():
        print(f"{name:16s}  raises {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    parser.add_argument("--full", action="store_true", help="128 images of 224 pixels instead of 32")
    parser.add_argument("--shape", nargs="+", help="other shapes, such as 64x3x96x96")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="these policies, beside Mixup")
    parser.add_argument("--allocator", nargs="+", choices=ALLOCATORS, default=["default"])
    parser.add_argument("--rounds", type=int, default=20, help="rounds of mixing; a quarter of them for the steps")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds after which a case sits out the rest")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure_shape(json.loads(args.worker))))
        return
    tables = []
    for shape in args.shape or (FULL if args.full else SHAPES):
        for allocator in args.allocator:
            setting = {"shape": shape, "allocator": allocator, "only": args.only}
            tables.append(run_worker(__file__, {**setting, "rounds": args.rounds, "budget": args.budget}))
            show(tables[-1])
    if args.save:
        save(RESULTS, tables)


if __name__ == "__main__":
    main()
