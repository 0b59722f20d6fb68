"""Train with torchvision's transforms and a DataLoader, mixing in `collate_fn`.

    python examples/torchvision_training.py                 # clothes that come with hardmix; seconds on a CPU
    python examples/torchvision_training.py --mix torchvision --loss soft    # the same loop as torchvision has it

Against a torchvision loop two lines change: where MixUp and CutMix come from, and the loss that soft labels go into.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision_on_cpu import import_torchvision

from hardmix import mixing
from hardmix.data.catalog import load_images
from hardmix.data.images import ImageSet
from hardmix.integrations.torchvision import CutMix, Mix, MixUp
from hardmix.losses import DecoupledMixupLoss
from hardmix.models import build_model

import_torchvision()  # where your torchvision matches torch, you do not need this line

from torchvision.transforms import v2  # noqa: E402


class Samples(Dataset):
    """One image and one label at a time, transformed: what a torchvision data set gives."""

    def __init__(self, images: ImageSet, transform: nn.Module) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images.batch(torch.tensor([i]))[0]), int(self.images.labels[i])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mini", help="a data set that hardmix knows (hardmix data)")
    parser.add_argument("--mix", choices=("hardmix", "resizemix", "torchvision"), default="hardmix", help="who mixes")
    parser.add_argument("--loss", choices=("decoupled", "soft"), default="decoupled", help="soft: cross entropy")
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that load and mix")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_mix(name: str, classes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    if name == "resizemix":
        return Mix(mixing.ResizeMix(), num_classes=classes)  # any policy of hardmix; this one draws for each sample
    mixup, cutmix = (MixUp, CutMix) if name == "hardmix" else (v2.MixUp, v2.CutMix)
    return v2.RandomChoice([mixup(alpha=0.8, num_classes=classes), cutmix(alpha=1.0, num_classes=classes)])


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    data = load_images(args.data)
    classes, (channels, size, _) = len(data.train.class_names), data.train.shape
    clean = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])
    train = data.train.subset(torch.randperm(len(data.train))[: args.train])
    mix = make_mix(args.mix, classes)
    loader = DataLoader(
        Samples(train, v2.Compose([v2.RandomHorizontalFlip(), clean])),
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        collate_fn=lambda batch: mix(*default_collate(batch)),
    )
    model = build_model("small-cnn", num_classes=classes, in_channels=channels, image_size=size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    criterion = DecoupledMixupLoss(eta=0.1) if args.loss == "decoupled" else nn.CrossEntropyLoss()

    print(f"small-cnn on {args.train} images of {data.name}, mixed by {args.mix}, {args.loss}")
    for epoch in range(args.epochs):
        started, total = time.perf_counter(), 0.0
        model.train()
        for x, target in loader:
            loss = criterion(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        seconds = time.perf_counter() - started
        top1 = accuracy(model, data.test, clean)
        print(f"epoch {epoch + 1}  loss {total / len(loader):.3f}  top-1 {top1:.3f}  {seconds:.1f} s")


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, transform: nn.Module) -> float:
    """Top-1 accuracy on clean images."""
    model.eval()
    hits = 0
    for rows in torch.arange(len(images)).split(500):
        hits += int((model(transform(images.batch(rows))).argmax(1) == images.labels[rows]).sum())
    return hits / len(images)


if __name__ == "__main__":
    main()
