"""Write the generated parts of the documents: the tables of methods, the measured costs, data sets, views, recipe keys.

    python tools/method_table.py            # rewrite what is out of date
    python tools/method_table.py --check    # name what is out of date and exit with 1

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of a page is written by hand.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel
from torch import nn

from hardmix import losses, tables
from hardmix.data.catalog import CATALOG, Entry
from hardmix.data.number_sets import NUMBER_SETS
from hardmix.data.series_views import SERIES_VIEWS, SeriesAugment
from hardmix.data.views import MOVES, PAINTS
from hardmix.data.volume_views import VOLUME_VIEWS, VolumeAugment
from hardmix.mixing import ManifoldMixup, Mixup, Policy, RandomChoice, Scheduled, SUMix
from hardmix.mixing.draw import PER
from hardmix.models.build import MODELS, build_model, model_options
from hardmix.models.encoders import ENCODERS, encoder_options
from hardmix.train.components import BESIDE, NOT_SAID
from hardmix.train.recipe import Component, Recipe

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"(<!-- generated: ([\w -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
#: kinds of batches by their number of axes
KINDS = {2: "features", 3: "series", 4: "images", 5: "volumes"}
#: targets of a set of numbers that are named
MOST_TARGETS = 4
#: policies that benchmarks/mixing.py times
TIMED = ("mixup", "cutmix", "smoothmix", "fmix", "gridmix", "resizemix")
#: objective -> what a row of its table is called -> the case in the result file of the benchmark
LOSS_CASES = {
    "soft-cross-entropy": {
        "MixedTarget": "hardmix soft_cross_entropy, pair",
        "`F.cross_entropy`, soft labels built": "cross_entropy, soft labels built",
    },
    "decoupled-mixup": {
        "MixedTarget": "hardmix DM, pair",
        "MixedTarget, label smoothing": "hardmix DM, pair, smoothing 0.1",
        "integer labels": "hardmix DM, hard labels",
        "dense soft labels": "hardmix DM, soft labels given",
        "written as two masked log-sum-exps": "DM, two masked logsumexp",
    },
    "decoupled-mixup-bce": {
        "MixedTarget": "hardmix DM(BCE), pair",
        "dense soft labels": "hardmix DM(BCE), soft labels given",
        "`F.binary_cross_entropy_with_logits`": "binary_cross_entropy_with_logits, given",
    },
}
#: contrast -> its name in contrastive_regression.json, and what a row is called -> the form there
CONTRAST_FORMS = {
    "supremix": (
        "SupReMix",
        {
            "`SupReMixLoss`": "hardmix, complete",
            "mixtures not normalised and detached": "hardmix, released choices",
            "the same with every mixture formed": "formed",
        },
    ),
    "supcon": ("SupCon", {"`SupConLoss`": "hardmix", "the same from one N x N matrix": "matrix"}),
    "rank-n-contrast": (
        "Rank-N-Contrast",
        {"`RankNContrastLoss`": "hardmix", "the same with a mask a column": "masks"},
    ),
}
#: batch sizes of these tables, where the result file has more, and numbers a row
CONTRAST_ROWS, CONTRAST_SIZE = (128, 512, 2048, 4096), 128
#: group in regression_losses.json -> what its cases are a multiple of: the case there, its name; and what is timed
PLAIN = {
    "embeddings": (
        "supcon, one matrix",
        "supervised contrast from one N x N matrix",
        "forward and backward, N rows of {size} numbers",
    ),
    "predictions": ("l1_loss", "`F.l1_loss`", "forward and backward, N predictions"),
    "policies": ("random partners", "`Mixup` with random partners", "plan and blend, N rows of {size} numbers"),
    "features": ("batch_norm", "`F.batch_norm`", "forward and backward, N rows of {size} numbers"),
    "labels": ("sort", "a sort of the labels", "N labels"),
}
#: card -> what a row of its tables is called -> group and case in regression_losses.json
REGRESSION_CASES = {
    "adasupcon": {
        "`AdaSupConLoss()`": ("embeddings", "adasupcon"),
        "with a population of 20,000": ("embeddings", "adasupcon, population"),
    },
    "kernel-contrast": {
        f'`kind="{kind}"`': ("embeddings", f"kernel-contrast, {kind}") for kind in ("y-aware", "exp", "threshold")
    },
    "conr": {"`ConRLoss()`": ("embeddings", "conr")},
    "ranksim": {
        "50 labels": ("embeddings", "ranksim"),
        "N distinct labels": ("embeddings", "ranksim, distinct"),
    },
    "ordinal-entropy": {
        "50 labels": ("embeddings", "ordinal-entropy"),
        "N distinct labels": ("embeddings", "ordinal-entropy, distinct"),
    },
    "balanced-mse": {
        '`kind="bmc"`': ("predictions", "balanced-mse, bmc"),
        '`kind="gai"`, 8 components': ("predictions", "balanced-mse, gai"),
    },
    "regression": {
        '`kind="l1"`': ("predictions", "regression, l1"),
        '`kind="huber"`': ("predictions", "regression, huber"),
    },
    "focal-r": {"`FocalRLoss()`": ("predictions", "focal-r")},
    "c-mixup": {
        "`CMixup`": ("policies", "c-mixup"),
        "partners from 20,000 labels alone": ("policies", "c-mixup, from a pool"),
    },
    "label-density": {
        "`FeatureSmoothing`": ("features", "fds"),
        "`FeatureSmoothing.update`": ("features", "fds, update"),
        "`lds_weights`": ("labels", "lds"),
    },
}
#: policies that are timed in whole training steps: those that run the model, and those that mixing.py leaves out
STEPPED = (*sorted(tables.NEEDS_MODEL), "augmix", "guidedmix", "random-choice", "saliencymix", "scheduled")
#: card -> what a row of its table is called -> loss and form in image_text.json; forms not measured have no row
PAIR_FORMS = {
    "clip": {
        "`ClipLoss`": ("CLIP", "hardmix"),
        "two products and `F.cross_entropy`": ("CLIP", "plain"),
        "open_clip's `ClipLoss`": ("CLIP", "open_clip"),
    },
    "m2-mix": {
        "`M2MixLoss`": ("m2-Mix", "hardmix"),
        "the same with mixtures formed": ("m2-Mix", "plain"),
        "`M2MixLoss(draws=4)`": ("m2-Mix, 4 draws", "hardmix"),
        "the same with mixtures formed, four times": ("m2-Mix, 4 draws", "plain"),
        "`ClipLoss` alone": ("CLIP", "hardmix"),
        "open_clip's `ClipLoss` alone": ("CLIP", "open_clip"),
    },
    "m3-mix": {
        "`M3MixLoss`": ("m3-Mix", "hardmix"),
        "the same with mixtures formed": ("m3-Mix", "plain"),
        "`ClipLoss` alone": ("CLIP", "hardmix"),
    },
}
#: batch sizes of these tables, where the result file has more
PAIR_ROWS = (128, 1024, 4096, 16384, 32768)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = False
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text("utf-8")
        fresh = regenerate(text)
        if fresh == text:
            continue
        stale = True
        sys.stdout.write(f"{page.relative_to(ROOT)} {'is out of date' if check else 'rewritten'}\n")
        if not check:
            page.write_text(fresh, "utf-8")
    if check and stale:
        sys.stdout.write("run: python tools/method_table.py\n")
    return int(check and stale)


def regenerate(text: str) -> str:
    """The page with every generated part written anew."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}\n{part[4]}", text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "-|" * len(head), *lines[1:]])


# Methods


def policies() -> str:
    rows = []
    for name, cls in tables.POLICIES.items():
        policy = example(cls)
        rows.append((card(name), f"`{cls.__name__}`", summary(cls), mixes(policy), drawn_per(cls), batches(policy)))
    return table(("in a recipe", "class", "what it does", "mixes", "lambda drawn per", "batches of"), rows)


def objectives() -> str:
    rows = []
    for name, cls in tables.OBJECTIVES.items():
        found = re.match(r"`(\w+)` with its settings", inspect.cleandoc(cls.__doc__ or ""))
        assert found, f"{cls.__name__}: the docstring does not start with the function that it remembers settings for"
        settings = ", ".join(f"`{key}`" for key in inspect.signature(cls).parameters)
        does = summary(getattr(losses, found[1]))
        rows.append((card(name), f"`{cls.__name__}`", f"`{found[1]}`", does, settings))
    return table(("in a recipe", "class", "function", "what it does", "settings"), rows)


def regression_methods() -> str:
    """What is made for numbers: contrasts, objectives of the head, a policy, label densities."""
    rows = []
    for name, cls in {**tables.CONTRASTS, **tables.REGRESSION_OBJECTIVES}.items():
        functions = re.findall(r"`(\w+_loss)`", inspect.cleandoc(cls.__doc__ or "").splitlines()[0])
        assert functions, (
            f"{cls.__name__}: the docstring does not start with the functions that it remembers settings for"
        )
        place = "`[objective]`"
        if name in tables.CONTRASTS:
            place = "`[contrast]`, beside" if name in tables.JOINT_CONTRASTS else "`[contrast]`, before or beside"
        rows.append(
            (card(name), place, f"`{cls.__name__}`", ", ".join(f"`{f}`" for f in functions), summary_of_file(cls))
        )
    for name, cls in tables.REGRESSION_POLICIES.items():
        rows.append((card(name), "`[policy]`", f"`{cls.__name__}`", "", summary(cls)))
    density = losses.FeatureSmoothing
    function = f"`{losses.lds_weights.__name__}`"
    rows.append((card("label-density"), "`[density]`", f"`{density.__name__}`", function, summary_of_file(density)))
    return table(("method", "in a recipe", "class", "function", "what it does"), rows)


def pair_objectives() -> str:
    """Objectives of image-text pairs, and what a call takes beside the features and their scale."""
    rows = []
    modules = [cls.__module__ for cls in tables.PAIR_OBJECTIVES.values()]
    for at, (name, cls) in enumerate(tables.PAIR_OBJECTIVES.items()):
        function = re.match(r"`(\w+_loss)`", inspect.cleandoc(cls.__doc__ or ""))
        if function and modules.count(cls.__module__) > 1:
            does = summary(getattr(losses, function[1]))
        else:  # what a file says of itself is said of the first class in it
            does = summary(cls) if cls.__module__ in modules[:at] else summary_of_file(cls)
        usual = inspect.signature(losses.M2MixLoss.forward).parameters
        call = [
            f"`{key}`"
            for key, parameter in inspect.signature(cls.forward).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD and (key not in usual or _needed(cls, key))
        ]
        taken = [key for key in inspect.signature(cls).parameters if key not in NOT_SAID]
        settings = [f"`{key}`" for key in (*taken, *BESIDE.get(cls, ()))]
        rows.append((card(name), f"`{cls.__name__}`", does, ", ".join(call), ", ".join(settings)))
    return table(("in a recipe", "class", "what it does", "a call also takes", "settings"), rows)


def _needed(cls: type[nn.Module], key: str) -> bool:
    """Whether a call can't do without a keyword."""
    parameter = inspect.signature(cls.forward).parameters[key]
    return parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty


def card(name: str) -> str:
    return f"[{name}]({name}.md)"


def summary(thing: Any) -> str:
    """The first sentence of a docstring, without the name that it may start with."""
    text = " ".join(inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s", text)[0].rstrip(".")
    name, colon, rest = sentence.partition(": ")
    if colon and thing.__name__.replace("_", "").lower().startswith(re.sub(r"\W", "", name).lower()):
        sentence = rest
    return sentence[0].upper() + sentence[1:]


def summary_of_file(cls: type) -> str:
    """What the file of a class says it is, without the name before the colon where it is that of the file."""
    module = sys.modules[cls.__module__]
    text = " ".join((module.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
    name, colon, rest = text.partition(": ")
    letters = re.sub(r"\W", "", name).lower()
    if colon and letters == module.__name__.rpartition(".")[2].replace("_", ""):
        text = rest
    return text[0].upper() + text[1:]


def example(cls: type[Policy], **options: Any) -> Policy:
    """A policy to look at, with stand-ins for what its constructor can't do without."""
    stand_ins: dict[str, Any] = {
        "model": _stand_in(cls),
        "layers": ["stage1"],
        "policies": [Mixup()],
        "policy": Mixup(),
    }
    needed = [key for key, p in inspect.signature(cls).parameters.items() if p.default is inspect.Parameter.empty]
    return cls(**{key: stand_ins[key] for key in needed}, **options)


def _stand_in(cls: type[Policy]) -> nn.Module:
    """A small model that a policy can look at."""
    name = next((name for name, known in tables.POLICIES.items() if known is cls), "")
    kind = "tiny-vit" if name in tables.NEEDS_ATTENTION else "small-cnn"
    return build_model(kind, num_classes=4, in_channels=3, image_size=32)


def mixes(policy: Policy) -> str:
    """What a drawn plan says."""
    if isinstance(policy, (RandomChoice, Scheduled, SUMix)):
        return "what its policies mix"
    if isinstance(policy, ManifoldMixup):
        return "whole samples, or one hidden layer"
    draws = torch.Generator().manual_seed(0)
    try:
        plan = policy.plan(torch.rand(8, 3, 32, 32, generator=draws), torch.arange(8) % 4, generator=draws)
    except NotImplementedError:
        return "several images"
    if plan.own is not None and plan.other is None:
        return "an image with itself"
    if plan.fit is not None and plan.fit is not plan.box and not torch.equal(plan.fit, plan.box):
        return "a box with a part of the partner"
    if plan.fit is not None:
        return "a box with the whole partner"
    if plan.box is not None:
        return "the pixels in a box"
    if plan.mask is None:
        return "whole samples"
    return "pixels, one or the other" if bool(((plan.mask == 0) | (plan.mask == 1)).all()) else "pixels, softly"


def drawn_per(cls: type[Policy]) -> str:
    parameters = inspect.signature(cls).parameters
    if "per" not in parameters:
        return "as its policy" if "policy" in parameters else "sample"
    good = []
    for per in PER:
        try:
            example(cls, per=per)
        except ValueError:
            continue
        good.append(per)
    return ", ".join(good)


def batches(policy: Policy) -> str:
    if isinstance(policy, (RandomChoice, Scheduled, SUMix)):
        return "what its policies take"
    return ", ".join(kind for axes, kind in KINDS.items() if policy.min_ndim <= axes <= policy.max_ndim)


# Measured costs


def mixing_cost(name: str) -> str:
    """Ratios of a policy from the committed result file."""
    policy = tables.POLICIES[name].__name__
    command = "`python benchmarks/mixing.py`"
    ways = {"in place": "in place", "out=": "into a buffer", "new": "new batch"}
    ways |= {f"compiled {way}": f"{ways[way]}, compiled" for way in ("out=", "new")}
    found = [t for t in _result("mixing.json").get("tables", []) if t["threads"] == 1]
    present = [way for way in ways if any(f"{policy}, {way}" in t["rows"] for t in found)]
    if not present:
        return f"{command} times it; no result is committed yet."
    rows = []
    for t in found:
        timed = [t["rows"].get(f"{policy}, {way}") for way in present]
        ratios = [f"{row['cpu_ratio']:.1f}" if row else "" for row in timed]
        rows.append((f"{t['shape'].replace('x', ' x ')} {t['dtype']}", t["allocator"], t["caches"], *ratios))
    head = f"Measured by {command}: CPU time with one thread, plan included, in copies of the batch."
    return f"{head}\n\n{table(('batch', 'allocator', 'caches', *(ways[way] for way in present)), rows)}"


def loss_cost(name: str) -> str:
    """Ratios of an objective from the committed result file."""
    command, result = "`python benchmarks/decoupled_loss.py`", _result("decoupled_loss.json")
    times = [row for row in result.get("time", []) if row["threads"] == 1]
    if not times:
        return f"{command} times it; no result is committed yet."
    ratios = {(row["case"], row["shape"], row["allocator"]): row["cpu_ratio"] for row in times}
    peaks = {row["case"]: row["peak_in_logits"] for row in result["memory"]}
    shapes = list(dict.fromkeys(row["shape"] for row in times))
    rows = []
    for title, case in LOSS_CASES[name].items():
        both = [(ratios[case, shape, "kept"], ratios[case, shape, "default"]) for shape in shapes]
        rows.append((title, *(f"{kept:.1f} ({default:.1f})" for kept, default in both), f"{peaks[case]:.1f}"))
    head = (
        f"Measured by {command}: CPU time of forward and backward with one thread, as a multiple of\n"
        "`F.cross_entropy` with integer labels, where the allocator keeps its blocks (with glibc's own);\n"
        "peak memory in tensors of logits."
    )
    return f"{head}\n\n{table(('target', *(s.replace('x', ' x ') for s in shapes), 'peak memory'), rows)}"


def contrast_cost(name: str) -> str:
    """Milliseconds and megabytes of a contrast from the committed result file."""
    command = "`python benchmarks/contrastive_regression.py`"
    loss, forms = CONTRAST_FORMS[name]
    found = {
        (row["form"], row["rows"]): f"{row['ms']:,.1f} / {row['peak_mb']:,.0f}"
        for row in _result("contrastive_regression.json").get("table", [])
        if (row["loss"], row["size"]) == (loss, CONTRAST_SIZE)
    }
    if not found:
        return f"{command} times it; no result is committed yet."
    counts = [n for n in CONTRAST_ROWS if any(n == rows for _, rows in found)]
    rows = [(title, *(found.get((form, n), "-") for n in counts)) for title, form in forms.items()]
    head = (
        f"Measured by {command}: forward and backward with one thread,\n"
        f"milliseconds of CPU time / megabytes beyond the embeddings, {CONTRAST_SIZE} numbers a row, 50 labels."
    )
    return f"{head}\n\n{table(('', *(f'N = {n}' for n in counts)), rows)}"


def regression_cost(name: str) -> str:
    """Ratios of a method for numbers from the committed result file: a table for each thing it is compared with."""
    command, result = "`python benchmarks/regression_losses.py`", _result("regression_losses.json")
    found = {(row["group"], row["case"], row["rows"]): row for row in result.get("table", [])}
    cases = REGRESSION_CASES[name]
    groups = list(dict.fromkeys(group for group, _ in cases.values()))
    if not any(group == groups[0] for group, _, _ in found):
        return f"{command} times it; no result is committed yet."
    counts = sorted({rows for _, _, rows in found})
    how = "one thread, CPU time as a multiple of the first row's,\nand peak memory beyond the inputs."
    parts = [f"Measured by {command}: {how}"]
    for group in groups:
        plain, called, work = PLAIN[group]
        named = {called: plain, **{title: case for title, (its, case) in cases.items() if its == group}}
        rows = []
        for title, case in named.items():
            timed = [found[group, case, n] for n in counts]
            ratios = [f"{r:,.{2 if r < 0.5 else 1 if r < 100 else 0}f}" for r in (row["ratio"] for row in timed)]
            rows.append((title, *ratios, f"{timed[-1]['ms']:,.2f}", f"{timed[-1]['peak_mb']:,.1f}"))
        last = f"N = {counts[-1]}"
        head = (work.format(size=result["size"]), *(f"N = {n}" for n in counts), f"ms, {last}", f"MB, {last}")
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def step_cost(name: str) -> str:
    """What a training step with a policy takes, in those of plain Mixup, from the committed result file."""
    command, result = "`python benchmarks/policies.py`", _result("policies.json")
    steps = {
        found["shape"].replace("x", " x "): row["step"]
        for found in result.get("tables", [])
        if (row := found["rows"].get(name)) is not None
    }
    if not steps:
        return f"{command} times it; no result is committed yet."
    model = "vision transformer" if name in tables.NEEDS_ATTENTION else "residual network"
    told = " and ".join(f"{step:.2f} with {shape} images" for shape, step in steps.items())
    return (
        f"Measured by {command} on one thread of a CPU: a training step of a small\n{model}, in that of plain Mixup: "
        f"{told}.\n"
    )


def puzzle_work() -> str:
    """What PuzzleMix does besides asking the model, for each number of blocks, from the committed result file."""
    command, found = "`python benchmarks/puzzle.py`", _result("puzzle.json").get("tables", [])
    if not found:
        return f"{command} times it; no result is committed yet."
    by = {t["allocator"]: t["table"] for t in found}
    heads = [f"work in copies, {name} allocator" for name in by]
    rows = [
        [
            blocks,
            *(f"{rows[blocks]['copies']:.1f}" for rows in by.values()),
            f"{first['dense']:,.1f}",
            *(f"{100 * first[key]:.2f} %" for key in ("gap_2", "gap_3")),
        ]
        for blocks, first in next(iter(by.values())).items()
    ]
    shape = found[0]["shape"].replace("x", " x ")
    head = (
        f"Measured by {command} on one thread of a CPU, {shape} images, the saliency given: all that\n"
        "the policy does besides, in `copy_` of the batch; what moves would cost as dense matrices of all pairs, in\n"
        "those by index; by how much cuts are dearer than those of maximum flow."
    )
    titles = ("blocks", *heads, "dense moves", "gap, 2 labels", "gap, 3 labels")
    return f"{head}\n\n{table(titles, rows)}"


def pair_cost(name: str) -> str:
    """Milliseconds and megabytes of an objective for pairs from the committed result file."""
    command, result = "`python benchmarks/image_text_loss.py`", _result("image_text.json")
    found = {(row["loss"], row["form"], row["rows"]): row for row in result.get("table", [])}
    forms = {title: case for title, case in PAIR_FORMS[name].items() if any(key[:2] == case for key in found)}
    if not forms:
        return f"{command} times it; no result is committed yet."
    first = next(iter(forms.values()))
    counts = [n for n in PAIR_ROWS if (*first, n) in found]
    rows = [(title, *(_pair_cell(found.get((*case, n))) for n in counts)) for title, case in forms.items()]
    size = found[(*first, counts[0])]["size"]
    head = (
        f"Measured by {command}: forward and backward with one thread,\n"
        f"milliseconds of CPU time / megabytes beyond the features, {size} numbers a row."
    )
    return f"{head}\n\n{table(('', *(f'N = {n}' for n in counts)), rows)}"


def _pair_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['ms']:,.1f} / {row['peak_mb']:,.0f}" if "ms" in row else f"needs {row['needs_gib']:,.0f} GiB"


def _result(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


# Data


def data_sets() -> str:
    rows = [
        (
            f"`{entry.name}`",
            entry.title,
            f"{entry.train:,} + {entry.test:,}" if entry.train else "as many as there are",
            " x ".join(map(str, entry.shape)) if entry.shape else "decided by `image_size`",
            str(len(entry.class_names)) if entry.class_names else "one per folder",
            entry.license,
            _origin(entry),
        )
        for entry in CATALOG.values()
    ]
    return table(("name", "what", "train + test", "C x H x W", "classes", "licence", "how to get it"), rows)


def number_sets() -> str:
    rows = []
    for entry in NUMBER_SETS.values():
        many = f"{entry.samples:,}" if entry.samples else "as many as there are" if not entry.targets else "as drawn"
        targets = ", ".join(f"`{name}`" for name in entry.targets[:MOST_TARGETS])
        more = f" and {len(entry.targets) - MOST_TARGETS} more" if len(entry.targets) > MOST_TARGETS else ""
        how = f"`{entry.get}`" if entry.get.startswith(("pip ", "--set ")) else entry.get
        domains = ", ".join(f"`{name}`" for name in entry.domains)
        rows.append((f"`{entry.name}`", entry.kind, entry.title, many, targets + more, domains, entry.license, how))
    head = ("name", "samples are", "what", "how many", "targets", "domains", "licence", "how to get it")
    return table(head, rows)


def _origin(entry: Entry) -> str:
    return "command below" if entry.forms else f"`{entry.get}`" if entry.get.startswith("pip ") else entry.get


def data_commands() -> str:
    blocks = [f"`{e.name}`:\n\n```console\n$ {e.get}\n```" for e in CATALOG.values() if e.forms]
    return "\n\n".join(blocks)


def views() -> str:
    return table(("name", "what it does"), [(f"`{name}`", summary(view)) for name, view in {**MOVES, **PAINTS}.items()])


def views_by_class(cls: type, names: Iterable[str]) -> str:
    """What the lines `name    what it does` of a docstring say of these names."""
    said = dict(re.findall(r"^([\w-]+) {2,}(\S.*)$", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE))
    return table(("name", "what it does"), [(f"`{name}`", said[name]) for name in names])


# Recipes


def models() -> str:
    rows = []
    for name, build in MODELS.items():
        rows.append((f"`{name}`", summary(build), ", ".join(f"`{option}`" for option in model_options(name))))
    return table(("name", "what it is", "options"), rows)


def encoders() -> str:
    rows = []
    for name, encoder in ENCODERS.items():
        options = ", ".join(f"`{option}`" for option in encoder_options(name))
        rows.append((f"`{name}`", encoder.kind, summary(encoder.make), options))
    return table(("name", "takes", "what it is", "options"), rows)


def recipe_keys() -> str:
    """A table of keys for the recipe itself and for each of its sections."""
    parts = [("Top level", _keys("", Recipe))]
    for name, field in Recipe.model_fields.items():
        for section in (field.annotation, *get_args(field.annotation)):
            if _is_section(section):
                parts.append((f"`[{name}]`", _keys(f"{name}.", section)))
    return "\n\n".join(f"### {title}\n\n{rows}" for title, rows in parts)


def _keys(prefix: str, model: Any) -> str:
    rows = []
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            continue
        assert field.description, f"{model.__name__}.{name} has no description in hardmix.train.sections"
        default = "required" if field.is_required() else _toml(field.get_default(call_default_factory=True))
        if (prefix, name) == ("", "name"):
            default = "the file's name"
        rows.append((f"`{prefix}{name}`", _kind(field.annotation, field.metadata), default, field.description))
    return table(("key", "value", "default", "meaning"), rows)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type(BaseModel)) and annotation is not Component


def _kind(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f'`"{option}"`' for option in get_args(annotation))
    if annotation is Component or Component in get_args(annotation):
        return "table with `name`"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", list[str]: "list of names"}
    bounds = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most"}
    limits = [f"{word} {getattr(m, key):,}" for key, word in bounds.items() for m in metadata if hasattr(m, key)]
    return ", ".join([words.get(annotation, "table"), *(limit.removesuffix(".0") for limit in limits)])


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Component):
        return f"`{{ name = {json.dumps(value.name)} }}`"
    return f"`{json.dumps(value)}`"


PARTS: dict[str, Callable[[], str]] = {
    "policies": policies,
    "objectives": objectives,
    "regression methods": regression_methods,
    "pair objectives": pair_objectives,
    "data sets": data_sets,
    "number sets": number_sets,
    "data commands": data_commands,
    "views": views,
    "views of series": partial(views_by_class, SeriesAugment, SERIES_VIEWS),
    "views of volumes": partial(views_by_class, VolumeAugment, VOLUME_VIEWS),
    "models": models,
    "encoders": encoders,
    "recipe keys": recipe_keys,
    **{f"cost of {name}": partial(mixing_cost, name) for name in TIMED},
    **{f"cost of {name}": partial(loss_cost, name) for name in LOSS_CASES},
    **{f"cost of {name}": partial(contrast_cost, name) for name in CONTRAST_FORMS},
    **{f"cost of {name}": partial(regression_cost, name) for name in REGRESSION_CASES},
    **{f"cost of {name}": partial(pair_cost, name) for name in PAIR_FORMS},
    **{f"cost of {name}": partial(step_cost, name) for name in STEPPED},
    "work of puzzlemix": puzzle_work,
}

if __name__ == "__main__":
    sys.exit(main())
