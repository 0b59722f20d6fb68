"""Run and comparison folders as a finished training leaves them, made of plausible numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hardmix.metrics import mean_interval, paired_test

CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
METRICS = ["top1", "top5", "nll", "ece", "mixup_both", "mixup_top2", "mixup_either", "cutmix_both", "cutmix_top2"]
METRICS += ["cutmix_either"]
RECIPE = """name = "fashion-mixup-dm"
task = "classification"
seed = 0

[data]
name = "fashion-mini"
augment = ["flip", "crop"]

[policy]
name = "mixup"
alpha = 1.0

[objective]
name = "decoupled-mixup"
eta = 0.1
"""


def draw_images(count: int, channels: int = 1, size: int = 28, seed: int = 0) -> torch.Tensor:
    """(count, channels, size, size) uint8: soft ellipses and bars of different places and widths."""
    g = torch.Generator().manual_seed(seed)
    at = torch.linspace(-1, 1, size)
    y, x = at[:, None], at[None, :]
    images = []
    for i in range(count):
        a, b, dx, dy = (torch.rand(4, generator=g) * torch.tensor([0.5, 0.5, 0.4, 0.4])).tolist()
        shape = 1 - ((x - dx) / (0.3 + a)) ** 2 - ((y - dy) / (0.3 + b)) ** 2
        if i % 2:
            shape = torch.minimum(0.2 + a - (x - dx).abs(), 0.5 + b - (y - dy).abs()) * 4
        images.append((shape.clamp(0, 1) * 255).expand(channels, size, size))
    return torch.stack(images).round().to(torch.uint8)


def write_gallery(
    path: Path,
    *,
    seed: int = 0,
    samples: int = 8,
    box: bool = True,
    images: torch.Tensor | None = None,
    sharp: float = 1,
) -> None:
    """Half of CutMix boxes, or Mixup shares without a mask. `images` (2 * samples, C, H, W) replaces the drawn ones."""
    g = torch.Generator().manual_seed(seed)
    both = draw_images(2 * samples) if images is None else images
    own, partner = both[:samples], both[samples : 2 * samples]
    size = own.shape[2]
    labels = torch.stack([torch.arange(samples) % 10, (torch.arange(samples) * 3 + 5) % 10], 1)
    mask = torch.ones(samples, 1, size, size)
    shares = torch.linspace(0.3, 0.7, samples)
    for i in range(samples):
        side = round(math.sqrt(1 - float(shares[i])) * size)
        start = (i * 3) % max(1, size - side)
        mask[i, :, start : start + side, size - side :] = 0
    if not box:
        mask = shares.view(-1, 1, 1, 1).expand_as(mask)
    lam = mask.mean((1, 2, 3))
    mixed = (mask * own + (1 - mask) * partner).round().to(torch.uint8)
    prob = (torch.rand(samples, 3, generator=g) * 2 * sharp).softmax(1).sort(1, descending=True).values * 0.95
    other = (labels[:, :1] + 2) % 10
    top = torch.cat([labels, other], 1)
    swap = torch.rand(samples, generator=g) < 0.3
    top[swap] = top[swap][:, [0, 2, 1]]
    tensors = {
        "own": own,
        "partner": partner,
        "mixed": mixed,
        "labels": labels,
        "weights": torch.stack([lam, 1 - lam], 1),
        "top": top,
        "prob": prob,
    }
    if box:
        tensors["mask"] = mask
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def fake_test(seed: int, gain: float = 0.0) -> dict[str, float]:
    noise = torch.randn(10, generator=torch.Generator().manual_seed(seed)).tolist()
    base = [0.881, 0.995, 0.41, 0.062, 0.41, 0.66, 0.93, 0.37, 0.62, 0.9]
    slope = [1, 0.05, -2.2, -1.5, 4, 2, 0.6, 3, 1.5, 0.5]
    spread = [0.003, 0.0005, 0.01, 0.004, 0.012, 0.008, 0.005, 0.012, 0.008, 0.006]
    rows = zip(METRICS, base, slope, noise, spread, strict=True)
    return {key: b + gain * s + n * w for key, b, s, n, w in rows}


def fake_reliability(gap: float) -> dict[str, list[Any]]:
    count = [0, 0, 0, 4, 25, 60, 95, 120, 130, 150, 170, 210, 290, 430, 1316]
    confidence = [None if n == 0 else (i + 0.5) / 15 for i, n in enumerate(count)]
    accuracy = [None if c is None else max(0.0, min(1.0, c - gap * math.sin(3 * c))) for c in confidence]
    return {"confidence": confidence, "accuracy": accuracy, "count": count}


def write_logs(folder: Path, *, seed: int, epochs: int, gain: float = 0.0, offset: float = 0.0) -> None:
    g = torch.Generator().manual_seed(seed + 77)
    lines, timing = [], []
    per_epoch = 4
    for step in range(1, epochs * per_epoch + 1):
        done = step / (epochs * per_epoch)
        wobble = float(torch.randn(1, generator=g)) * 0.02
        loss = 0.75 + 1.5 * math.exp(-4 * done) + wobble + offset
        accuracy = 0.25 + 0.42 * (1 - math.exp(-4 * done)) + wobble / 2
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * done))
        epoch = step / per_epoch
        common = {"step": step * 20, "epoch": epoch}
        lines.append({"kind": "train", **common, "loss": loss, "accuracy": accuracy, "lr": lr})
        timing.append({"step": step * 20, "images_per_s": 5100.0, "seconds": 2.4 * step})
        if step % per_epoch == 0:
            top1 = 0.6 + (0.285 + gain) * (1 - math.exp(-5 * done)) + wobble / 4
            values = {"top1": top1, "top5": 0.97 + 0.02 * done, "nll": 1.1 - 0.65 * done, "ece": 0.05}
            lines.append({"kind": "validation", **common, **values})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))


def write_run(
    folder: Path,
    *,
    name: str = "fashion-mixup-dm",
    seed: int = 0,
    policy: str = "mixup",
    objective: str = "decoupled-mixup",
    gain: float = 0.012,
    gap: float = 0.08,
    per_step: float = 0.021,
    epochs: int = 15,
    images: torch.Tensor | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A finished run; `changes` replace entries of its summary, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE.replace("fashion-mixup-dm", name.replace('"', "'")), encoding="utf-8")
    write_logs(folder, seed=seed, epochs=epochs, gain=gain, offset=0.15 if objective != "soft-cross-entropy" else 0.0)
    write_gallery(folder / "gallery.safetensors", seed=seed + len(name), images=images, sharp=1 + 20 * gain)
    summary = {
        "name": name,
        "task": "classification",
        "seed": seed,
        "finished": True,
        "data": {
            "name": "fashion-mini",
            "train": 10800,
            "validation": 1200,
            "test": 3000,
            "classes": CLASSES,
            "source": "hardmix/data/embedded/fashion-mini.npz",
            "license": "MIT (Zalando SE)",
        },
        "model": {"name": "small-resnet", "parameters": 175258},
        "test": fake_test(seed, gain),
        "validation": {"top1": 0.885 + gain, "nll": 0.43, "ece": 0.05},
        "reliability": fake_reliability(gap),
        "seconds": {"train": per_step * 1275, "total": per_step * 1275 + 12.5, "per_step": per_step},
        "memory_mb": 512.3,
        "versions": {"hardmix": "0.1.0", "torch": "2.13.0", "python": "3.12.3"},
        "device": "cpu",
        "policy": policy,
        "objective": objective,
    }
    summary |= changes or {}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return summary


DEMO = (
    {"name": "fashion-mixup", "policy": "mixup", "objective": "soft-cross-entropy", "gain": 0.0, "gap": 0.14},
    {"name": "fashion-mixup-dm", "policy": "mixup", "objective": "decoupled-mixup", "gain": 0.012, "gap": 0.05},
    {"name": "fashion-none", "policy": "none", "objective": "soft-cross-entropy", "gain": -0.006, "gap": 0.1},
)


def write_comparison(
    folder: Path,
    *,
    methods: tuple[dict[str, Any], ...] = DEMO,
    seeds: int = 5,
    images: torch.Tensor | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A finished comparison with its run folders; `changes` replace entries of comparison.json, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    runs, table = [], []
    values: list[dict[str, list[float]]] = []
    for place, method in enumerate(methods):
        found: dict[str, list[float]] = {key: [] for key in METRICS}
        for seed in range(seeds):
            name = method["name"]
            where = f"method-{place}/seed-{seed}"
            arguments = {"per_step": 0.02 + 0.0012 * place, "images": images, **method}
            summary = write_run(folder / where, seed=seed, **arguments)
            # Seeds share most of their luck: what is left is each method's own.
            own = fake_test(1000 * (place + 1) + seed, method.get("gain", 0.0))
            test = {key: 0.6 * summary["test"][key] + 0.4 * own[key] for key in METRICS}
            runs.append({"name": name, "seed": seed, "folder": where, "test": test, "seconds": summary["seconds"]})
            runs[-1]["memory_mb"] = 500.0 + 10 * place
            for key in METRICS:
                found[key].append(test[key])
        values.append(found)
        cells = {key: {**mean_interval(found[key])._asdict(), "values": found[key]} for key in METRICS}
        versus = None
        if place:
            versus = {key: paired_test(found[key], values[0][key])._asdict() for key in METRICS}
        entry = {"name": method["name"], "policy": method["policy"], "objective": method["objective"]}
        table.append({**entry, "metrics": cells, "versus_first": versus})
    comparison = {
        "title": "Mixup on Fashion-MNIST (12,000 images)",
        "command": "hardmix compare fashion-mixup fashion-mixup-dm fashion-none --seeds 5 --out runs/demo",
        "metrics": METRICS,
        "lower_is_better": ["nll", "ece"],
        "seeds": list(range(seeds)),
        "runs": runs,
        "table": table,
        "versions": {"hardmix": "0.1.0", "torch": "2.13.0", "python": "3.12.3"},
    }
    comparison |= changes or {}
    (folder / "comparison.json").write_text(json.dumps(comparison), encoding="utf-8")
    return comparison
