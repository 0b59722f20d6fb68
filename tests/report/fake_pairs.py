"""Image-text runs as a finished training leaves them, made of plausible numbers."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hardmix.metrics import mean_interval, paired_test, reliability

from .fake_runs import draw_images, write_run

TEXTS = ["grinning face", "red heart", "woman cook", "clock face three o'clock", "ship", "cat with wry smile"]
KINDS = {"gender": 132, "hair": 40, "colour": 88, "clock": 30, "moon": 12, "animal": 56, "direction": 20, "cat": 0}
#: those of a comparison
METRICS = ["recall_5", "recall_1", "recall_10", "median_rank", "ece", "zeroshot", "zeroshot_ece", "fewshot_1"]
METRICS += ["fewshot_4", "fewshot_16", "arithmetic", "alignment", "uniformity", "gap"]
METRICS += ["shift_recall_5", "shift_recall_1", "shift_median_rank", "shift_zeroshot", "seen_shift_recall_5"]
LOWER = ["median_rank", "ece", "zeroshot_ece", "shift_median_rank"]
PAIRS = 342


def fake_test(seed: int, gain: float) -> dict[str, float]:
    """All metrics of one run; `gain` from 0, untuned, to 1."""
    noise = iter((0.012 * torch.randn(80, generator=torch.Generator().manual_seed(seed))).tolist())
    test = {}
    for start, level, kept in (("", 0.31, 1.0), ("shift_", 0.22, 0.5), ("seen_shift_", 0.35, 0.9)):
        for k, share in ((1, 0.45), (5, 1.0), (10, 1.32)):
            test[f"{start}recall_{k}"] = share * (level + 0.17 * gain * kept) + next(noise)
        test[f"{start}median_rank"] = 21.5 - 9.0 * gain * kept + round(40 * next(noise))
        test[f"{start}ece"] = 0.08 + 0.05 * gain + next(noise)
        if start != "seen_shift_":
            test[f"{start}zeroshot"] = 2 * level + 0.08 * gain * kept + next(noise)
            test[f"{start}zeroshot_ece"] = 0.07 + 0.03 * gain + next(noise)
            for k, share in ((1, 0.8), (4, 1.1), (16, 1.4)):
                test[f"{start}fewshot_{k}"] = share * (1.6 * level + 0.06 * gain * kept) + next(noise)
    test["arithmetic"] = 0.3 + 0.08 * gain + next(noise)
    test |= {"alignment": 0.11 * gain - 0.06, "uniformity": 2.41 + 0.3 * gain, "gap": 0.82 - 0.4 * gain + next(noise)}
    return test


def fake_retrieval(test: dict[str, float]) -> list[dict[str, Any]]:
    """Both directions of each style, a little apart from one another."""
    entries: list[dict[str, Any]] = []
    for part, style, start in (
        ("unseen", "noto", ""),
        ("unseen", "twemoji", "shift_"),
        ("seen", "twemoji", "seen_shift_"),
    ):
        size = PAIRS if part == "unseen" else 1222
        entry: dict[str, Any] = {"part": part, "style": style, "shift": bool(start), "pairs": size}
        for direction, more in (("image_to_text", 0.01), ("text_to_image", -0.01)):
            for k in (1, 5, 10):
                entry[f"{direction}_recall_{k}"] = test[f"{start}recall_{k}"] + more
                entry[f"{direction}_recall_{k}_chance"] = k / size
            entry[f"{direction}_median_rank"] = test[f"{start}median_rank"]
            entry[f"{direction}_median_rank_chance"] = float(size // 2)
        entries.append(entry)
    return entries


@cache
def fake_diagram(seed: int, sure: float) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    probs = (sure * torch.randn(PAIRS, 8, generator=g)).softmax(1)
    labels = torch.multinomial((0.7 * probs.log()).softmax(1), 1, generator=g)[:, 0]
    return reliability(probs, labels)


def fake_sphere(seed: int, gap: float, pairs: int = 120) -> dict[str, Any]:
    """Two clouds whose centres are about `gap` apart."""
    g = torch.Generator().manual_seed(seed)
    common = 0.55 * torch.randn(pairs, 3, generator=g)
    points = {}
    for name, side in (("image", -1.0), ("text", 1.0)):
        own = common + 0.15 * torch.randn(pairs, 3, generator=g) + torch.tensor([0.4, side * gap, 0.5])
        points[name] = torch.nn.functional.normalize(own, dim=1).tolist()
    return points


def fake_pairs(seed: int = 0, gain: float = 1.0, start: bool = True) -> dict[str, Any]:
    """The entries of an image-text run's summary; `start`: it went on from other weights."""
    g = torch.Generator().manual_seed(seed)
    test = fake_test(seed, gain)
    # Right after fine-tuning at first, then later, then not at all; twelve pictures, the first six the texts' own.
    after = [[(6 + i + k) % 12 if k != i else i for k in range(5)] for i in range(len(TEXTS))]
    before = [[int(row) for row in torch.randperm(12, generator=g)[:5]] for _ in TEXTS]
    calibrated = {
        key: {
            "bins": fake_diagram(seed + place, 1.2 + 0.4 * place),
            "ece": test["ece"] + 0.004 * place,
            "scaled": {"temperature": 1.31 + 0.1 * place, "ece": 0.02 + 0.001 * place},
        }
        for place, key in enumerate(("image_to_text", "text_to_image", "zeroshot"))
    }
    kinds = {
        kind: {
            "queries": size,
            "recall_1": 0.2 + 0.04 * place,
            "recall_5": 0.45 + 0.05 * place,
            "recall_1_without_text": 0.15 + 0.01 * place,
        }
        for place, (kind, size) in enumerate(KINDS.items())
        if size
    }
    numbers = {
        "task": "image-text",
        "policy": "none",
        "objective": "m2-mix",
        "start": "emoji-pretrain",
        "data": {
            "name": "emoji",
            "kind": "pairs",
            "train": 1222,
            "validation": 178,
            "test": PAIRS,
            "shift": PAIRS,
            "styles": ["noto", "twemoji"],
            "trained_styles": ["noto"],
            "concepts": 1742,
            "source": "hardmix/data/embedded/emoji.json",
            "license": "Apache-2.0 and CC BY 4.0",
        },
        "model": {"name": "pair-cnn-bilstm", "parameters": 2_310_401},
        "test": test,
        "validation": {"recall_5": 0.5},
        "reliability": None,
        "retrieval": fake_retrieval(test),
        "calibration": calibrated,
        "arithmetic": {"scale": 0.8, "kinds": kinds},
        "sphere": fake_sphere(seed, 0.7 - 0.45 * gain),
        "examples": {"texts": TEXTS, "right": list(range(len(TEXTS))), "after": after},
    }
    if start:
        numbers["before"] = fake_test(1000 + seed, 0.0)
        numbers["sphere_before"] = fake_sphere(seed, 0.7)
        numbers["examples"]["before"] = before
    return numbers


def write_pair_run(
    folder: Path, *, pictures: torch.Tensor | None = None, numbers: dict[str, Any] | None = None, **named: Any
) -> dict[str, Any]:
    """A finished image-text run; `numbers` in place of `fake_pairs()`."""
    numbers = fake_pairs() if numbers is None else numbers
    summary = write_run(folder, **{"name": "emoji-m2mix", "epochs": 9, "changes": numbers, **named})
    lines = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        values = {key: line[key] for key in line if key not in ("accuracy", "top1", "top5", "nll", "ece")}
        if line["kind"] == "validation":
            values["recall_5"] = 0.5 - 0.19 * math.exp(-0.6 * line["epoch"])
        lines.append(json.dumps(values))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    pictures = draw_images(12, channels=3, size=40) if pictures is None else pictures
    save_file({"pictures": pictures}, folder / "gallery.safetensors")
    return summary


#: (name, objective, gain)
METHODS = (("emoji-clip", "clip", 0.5), ("emoji-m2mix", "m2-mix", 0.95), ("emoji-m3mix", "m3-mix", 0.6))


def write_pair_comparison(folder: Path, *, seeds: int = 3) -> dict[str, Any]:
    """A finished comparison of image-text runs with its run folders."""
    values: dict[str, dict[str, list[float]]] = {}
    runs, table = [], []
    for place, (name, objective, gain) in enumerate(METHODS):
        values[name] = {key: [] for key in METRICS}
        for seed in range(seeds):
            where = f"{name}/seed-{seed}"
            numbers = fake_pairs(seed, gain) | {"objective": objective}
            own = fake_test(100 * (place + 1) + seed, gain)  # seeds share a part of their luck
            numbers["test"] = {key: 0.6 * value + 0.4 * own[key] for key, value in numbers["test"].items()}
            per_step = 0.03 + 0.002 * place
            write_pair_run(folder / where, name=name, seed=seed, numbers=numbers, per_step=per_step)
            seconds = {"train": 40.0, "per_step": per_step}
            run = {"name": name, "seed": seed, "folder": where, "test": numbers["test"], "seconds": seconds}
            runs.append(run | {"memory_mb": 900.0})
            for key in METRICS:
                values[name][key].append(numbers["test"][key])
        cells = {key: {**mean_interval(own)._asdict(), "values": own} for key, own in values[name].items()}
        entry: dict[str, Any] = {"name": name, "policy": "none", "objective": objective, "metrics": cells}
        entry["versus_first"] = _tests(values, name, METHODS[0][0]) if place else None
        table.append(entry)
    comparison = {
        "title": "m2-Mix on emoji",
        "command": "hardmix compare emoji-clip emoji-m2mix emoji-m3mix --seeds 3",
        "metrics": METRICS,
        "lower_is_better": LOWER,
        "seeds": list(range(seeds)),
        "runs": runs,
        "table": table,
        "twins": [
            {"name": METHODS[2][0], "base": METHODS[1][0], "tests": _tests(values, METHODS[2][0], METHODS[1][0])}
        ],
        "versions": {"hardmix": "0.1.0"},
    }
    (folder / "comparison.json").write_text(json.dumps(comparison))
    return comparison


def _tests(values: dict[str, dict[str, list[float]]], name: str, base: str) -> dict[str, Any]:
    return {key: paired_test(values[name][key], values[base][key])._asdict() for key in METRICS}
