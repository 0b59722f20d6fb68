"""Pictures of mixed samples: own, partner, mask and mix side by side, with labels and shares."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup
from torch import Tensor

from hardmix import _check
from hardmix.report.text import visible

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = ("own", "partner", "mask", "mix")
#: Larger images are shrunk to this side in a report and stored as JPEG; smaller ones are stored exactly, as PNG.
MAX_SIDE = 128
PNG_SIDE = 64


def mixed_sheet(
    own: Tensor,
    partner: Tensor | None,
    mask: Tensor | None,
    mixed: Tensor,
    captions: Sequence[str],
    *,
    side: int = 112,
) -> Image.Image:
    """One labelled picture of G mixed samples.

    Args:
        own, partner, mixed: (G, C, H, W) images, uint8 or floats in [0, 1]; a partner of None leaves its column out.
        mask: (G, 1, H, W) share of the own pixel (white: own), (G, 1, 1, 1) for a share of the whole image, or None,
            which leaves the column out.
        captions: G texts such as `caption` makes: "Sneaker 0.38 + Bag 0.62".
        side: pixels that the longer side of an image is drawn with; small images are enlarged without smoothing.
    Returns:
        PIL image in RGB, two samples to a row from four samples on. `.save("x.png")` writes it.
    Raises:
        ValueError: shapes or numbers of captions disagree.
    """
    from PIL import Image, ImageDraw

    who = "mixed_sheet"
    mixed = _check.batch(who, "mixed", mixed, 4, 4)
    side = _check.integer(who, "side", side, 16)
    for name, images in (("own", own), ("partner", partner)):
        if images is not None and tuple(_check.tensor(who, name, images).shape) != tuple(mixed.shape):
            raise ValueError(f"{who}: {name} has shape {tuple(images.shape)} but mixed has {tuple(mixed.shape)}.")
    count, _, height, width = mixed.shape
    if len(captions) != count:
        raise ValueError(f"{who}: captions has {len(captions)} entries but mixed has {count} rows; pass one per row.")
    if mask is not None:
        mask = _check.tensor(who, "mask", mask)
        if mask.ndim != 4 or mask.shape[:2] != (count, 1):
            raise ValueError(f"{who}: mask has shape {tuple(mask.shape)}; pass ({count}, 1, {height}, {width}).")
        mask = mask.expand(-1, -1, height, width)

    scale = side / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = [(n, t) for n, t in zip(COLUMNS, (own, partner, mask, mixed), strict=True) if t is not None]
    gap, margin, line = 8, 20, 26
    block = (len(columns) * (cell[0] + gap) - gap, cell[1] + line + gap)
    across = 2 if count >= 4 else 1
    rows = -(-count // across)
    size = (2 * margin + across * block[0] + (across - 1) * 2 * margin, margin + line + rows * block[1] + margin // 2)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = _font(14)
    for i in range(count):
        left = margin + (i % across) * (block[0] + 2 * margin)
        top = margin + line + (i // across) * block[1]
        for j, (name, images) in enumerate(columns):
            x = left + j * (cell[0] + gap)
            if i < across:
                draw.text((x + cell[0] / 2, margin + 4), name, fill="#5f6670", font=font, anchor="ma")
            sheet.paste(_enlarge(picture(images[i]), cell), (x, top))
            draw.rectangle((x - 1, top - 1, x + cell[0], top + cell[1]), outline="#d8d5cd")
        text = _shorten(visible(captions[i]), block[0], font)
        draw.text((left, top + cell[1] + 5), text, fill="#1d1f22", font=font)
    return sheet


def stacked_sheets(
    sheets: Mapping[str, tuple[Tensor, Tensor | None, Tensor | None, Tensor, Sequence[str]]], *, side: int = 80
) -> Image.Image:
    """The sheets of several policies, two side by side, each under its name; see `mixed_sheet` for the entries."""
    from PIL import Image, ImageDraw

    head, gap = 30, 12
    made = [(visible(name), mixed_sheet(*parts, side=side)) for name, parts in sheets.items()]
    width = max(sheet.width for _, sheet in made)
    height = head + max(sheet.height for _, sheet in made)
    rows = -(-len(made) // 2)
    whole = Image.new("RGB", (2 * width + gap, rows * (height + gap)), "white")
    draw = ImageDraw.Draw(whole)
    font = _font(18)
    for place, (name, sheet) in enumerate(made):
        left, top = (place % 2) * (width + gap), place // 2 * (height + gap)
        draw.text((left + 20, top + 6), name, fill="#1d1f22", font=font)
        whole.paste(sheet, (left, top + head))
    return whole


def shares(labels: Sequence[int], weights: Sequence[float], class_names: Sequence[Any]) -> list[tuple[str, float]]:
    """[(name, share)]: the parts of one mixed label, own part first; a class mixed with itself is named once."""
    parts: dict[int, float] = {}
    for label, weight in zip(labels, weights, strict=True):
        parts[label] = parts.get(label, 0.0) + weight
    return [(class_name(label, class_names), weight) for label, weight in parts.items()]


def class_name(label: int, class_names: Sequence[Any]) -> str:
    """The name of a class, or 'class 12' where it has none."""
    return visible(class_names[label], 60) if 0 <= label < len(class_names) else f"class {label}"


def caption(labels: Sequence[int], weights: Sequence[float], class_names: Sequence[Any]) -> str:
    """'Sneaker 0.38 + Bag 0.62'."""
    return " + ".join(f"{name} {share:.2f}" for name, share in shares(labels, weights, class_names))


def picture(image: Tensor) -> Image.Image:
    """(C, H, W) uint8, or floats in [0, 1], as a PIL image: one channel is grey, three RGB, others their mean."""
    from PIL import Image

    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().nan_to_num(0.0).clamp(0, 1) * 255).round()
    if image.shape[0] not in (1, 3):
        image = image.float().mean(0, keepdim=True)
    array = image.to(torch.uint8).movedim(0, -1).contiguous().numpy()
    return Image.fromarray(array[..., 0]) if array.shape[2] == 1 else Image.fromarray(array)


def data_uri(image: Image.Image) -> Markup:
    """The picture as a data: URI. Small pictures keep every pixel; large ones are shrunk and compressed."""
    stream = io.BytesIO()
    if max(image.size) <= PNG_SIDE:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(stream, "JPEG", quality=85)
        kind = "jpeg"
    # Base64 has nothing that HTML could read as markup.
    return Markup(f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}")


def _enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    smaller = max(image.size) < max(size)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS)


def _font(size: int) -> Any:
    """The font that comes with matplotlib: it knows more letters than Pillow's own."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _shorten(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
