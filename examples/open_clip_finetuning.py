"""Train an open_clip model in open_clip's own loop, with m2-Mix in the place of its loss.

    python examples/open_clip_finetuning.py                 # emoji that come with hardmix; half a minute on a CPU
    python examples/open_clip_finetuning.py --loss clip     # the same run as open_clip has it
    python examples/open_clip_finetuning.py --model ViT-B-32 --checkpoint laion2b.safetensors --lr 1e-5

Against a run of open_clip one line changes: where `create_loss` comes from. `train_one_epoch` is that of open_clip 3.x.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchvision_on_cpu import import_torchvision

from hardmix.data.emoji import load_emoji
from hardmix.data.pairs import Pairs
from hardmix.integrations.open_clip import create_loss
from hardmix.metrics import modality_gap, retrieval_metrics

import_torchvision()  # open_clip imports torchvision; where yours matches torch, you do not need this line

import open_clip  # noqa: E402
from open_clip_train.train import train_one_epoch  # noqa: E402

TINY = {
    "vision_cfg": {"image_size": 40, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}
#: what open_clip's command line would say
RUN = {"precision": "fp32", "distill": False, "siglip": False, "horovod": False, "wandb": False, "rank": 0}
RUN |= {"world_size": 1, "local_loss": False, "gather_with_grad": False, "skip_scheduler": True}
RUN |= {"grad_clip_norm": 1.0, "log_every_n_steps": 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a CLIP that open_clip knows by name")
    parser.add_argument("--checkpoint", help="a local file of weights for it")
    parser.add_argument("--loss", choices=("m2mix", "clip"), default="m2mix", help="clip: open_clip's own")
    parser.add_argument("--weight", type=float, default=0.1, help="of the mixed term")
    parser.add_argument("--train", type=int, default=1500, help="training pairs")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accum-freq", type=int, default=1, help="batches whose features are contrasted together")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


class Batches:
    """What open_clip's loop asks of its data: batches, how many there are, and of how many pairs."""

    def __init__(self, images: Tensor, texts: Tensor, size: int) -> None:
        self.images, self.texts, self.size = images, texts, size
        self.num_batches = len(images) // size
        self.num_samples = self.num_batches * size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.images))[: self.num_samples].split(self.size):
            yield self.images[rows], self.texts[rows]


def make_model(args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The model, and the side of its pictures."""
    tiny = args.model == "tiny"
    model = open_clip.CLIP(64, **TINY) if tiny else open_clip.create_model(args.model, pretrained=args.checkpoint)
    model.output_dict, size = True, model.visual.image_size
    return model.to(args.device), size if isinstance(size, int) else size[0]


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, texts: Tensor, concept: Tensor, device: str) -> tuple[float, float]:
    """Recall at 10 of concepts that were never trained on, both directions' mean, and the gap of the modalities."""
    model.eval()
    parts = [model(a.to(device), b.to(device)) for a, b in zip(images.split(200), texts.split(200), strict=True)]
    a, b = (torch.cat([part[key] for part in parts]).cpu() for key in ("image_features", "text_features"))
    found = retrieval_metrics(a, b, image_ids=concept, text_ids=concept)
    return (found["image_to_text_recall_10"] + found["text_to_image_recall_10"]) / 2, modality_gap(a, b)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    model, size = make_model(args)
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=model.context_length)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def inputs(pairs: Pairs) -> tuple[Tensor, Tensor]:
        return (pairs.images / 255 - mean) / std, tokenizer([captions[0] for captions in pairs.captions])

    emoji = load_emoji(["noto"], size=size)
    train, test = emoji.part("train"), emoji.part("test")
    images, texts = inputs(train.take(torch.randperm(len(train.captions))[: args.train]))
    data = {"train": SimpleNamespace(dataloader=Batches(images, texts, args.batch_size), set_epoch=lambda epoch: None)}

    settings = argparse.Namespace(**RUN | vars(args))
    loss = create_loss(settings, weight=args.weight) if args.loss == "m2mix" else open_clip.create_loss(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    logged: dict[str, float] = {}
    log = SimpleNamespace(add_scalar=lambda name, value, step: logged.update({name: value}))

    print(f"{args.model} on {len(images)} pairs of {emoji.name}, {loss}")
    for epoch in range(args.epochs):
        started = time.perf_counter()
        train_one_epoch(model, data, loss, epoch, optimizer, None, None, None, settings, tb_writer=log)
        seconds = time.perf_counter() - started
        recall, gap = measure(model, *inputs(test), test.concept, args.device)
        parts = "  ".join(f"{name.removeprefix('train/')} {logged[name]:.3f}" for name in logged if "loss" in name)
        print(f"epoch {epoch + 1}  {parts}  recall@10 {recall:.3f}  gap {gap:.3f}  {seconds:.1f} s")


if __name__ == "__main__":
    main()
