"""Train a timm model the way timm's own scripts do, with hardmix for the mixing and the loss.

    python examples/timm_training.py                        # clothes that come with hardmix; seconds on a CPU
    python examples/timm_training.py --mixup timm --loss soft    # the same loop as timm has it

Against a timm loop two lines change: the import of Mixup, and the loss that its soft labels go into.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision_on_cpu import import_torchvision

from hardmix.data.catalog import load_images
from hardmix.data.images import ImageSet
from hardmix.integrations.timm import Mixup
from hardmix.losses import DecoupledMixupLoss

import_torchvision()  # timm imports torchvision; where yours matches torch, you do not need this line

import timm  # noqa: E402
import timm.data  # noqa: E402
import timm.loss  # noqa: E402
import timm.optim  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mini", help="a data set that hardmix knows (hardmix data)")
    parser.add_argument("--model", default="test_resnet", help="any timm model that takes the size of the images")
    parser.add_argument("--mixup", choices=("hardmix", "timm"), default="hardmix", help="whose Mixup")
    parser.add_argument("--mode", choices=("batch", "pair", "elem"), default="elem", help="what one draw is for")
    parser.add_argument("--loss", choices=("decoupled", "soft"), default="decoupled", help="soft: timm's own")
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing, as in timm")
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--mixup-off-epoch", type=int, default=0, help="stop mixing at this epoch; 0 never")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    data = load_images(args.data)
    train = data.train.subset(torch.randperm(len(data.train))[: args.train])
    classes, channels = len(train.class_names), train.shape[0]
    mean, std = (torch.tensor(values, device=args.device).view(1, -1, 1, 1) for values in (data.mean, data.std))

    def pixels(x: Tensor) -> Tensor:
        """uint8 images, normalised, on the device."""
        return (x.to(args.device).float() / 255 - mean) / std

    model = timm.create_model(args.model, in_chans=channels, num_classes=classes).to(args.device)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.02)
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": args.smoothing, "num_classes": classes}
    mixup_fn = {"hardmix": Mixup, "timm": timm.data.Mixup}[args.mixup](mode=args.mode, **settings)
    decoupled = args.loss == "decoupled"
    criterion = DecoupledMixupLoss(eta=0.1) if decoupled else timm.loss.SoftTargetCrossEntropy()

    print(f"{args.model} on {args.train} images of {data.name}, Mixup of {args.mixup}, {args.loss} loss")
    for epoch in range(args.epochs):
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            mixup_fn.mixup_enabled = False
        started, total, steps = time.perf_counter(), 0.0, 0
        model.train()
        for rows in torch.randperm(len(train)).split(args.batch_size):
            if args.mixup == "timm" and len(rows) % 2:
                rows = rows[:-1]  # timm's Mixup needs an even batch
            x, target = mixup_fn(pixels(train.batch(rows)), train.labels[rows].to(args.device))
            loss = criterion(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.detach(), steps + 1
        seconds = time.perf_counter() - started
        top1 = accuracy(model, data.test, pixels)
        print(f"epoch {epoch + 1}  loss {total / steps:.3f}  top-1 {top1:.3f}  {seconds:.1f} s")


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, pixels: Callable[[Tensor], Tensor]) -> float:
    """Top-1 accuracy on clean images."""
    model.eval()
    hits = 0
    for rows in torch.arange(len(images)).split(500):
        hits += int((model(pixels(images.batch(rows))).argmax(1).cpu() == images.labels[rows]).sum())
    return hits / len(images)


if __name__ == "__main__":
    main()
