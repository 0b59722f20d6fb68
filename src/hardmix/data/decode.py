"""Image files to pixels: every decoding, and every way it can fail, in one place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

T = TypeVar("T")
R = TypeVar("R")

#: Pillow lets go of the interpreter while it decodes, so a few threads pay; more only fight over memory.
WORKERS = min(8, os.cpu_count() or 1)


#: what a message says where files may be left out: in Python, and on the command line
OR_SKIP = 'pass on_error="skip" (on the command line --set data.on_error=skip)'


class UnreadableImageError(ValueError):
    """A file that can't be turned into pixels. The message names the file and says why."""


def shown(path: Path | str) -> str:
    """A path as messages print it: quoted, with control characters escaped, since file names come from strangers."""
    return repr(str(path))


def reason(error: Exception) -> str:
    """What another library said, as part of a one-sentence message: on one line, and not for ever."""
    return " ".join(str(error).split())[:200]


def read_header(path: Path) -> tuple[int, int]:
    """(width, height) of an image file without decoding its pixels.

    Raises:
        UnreadableImageError: missing, empty, not an image, or more pixels than Pillow's limit.
    """
    return _opened(path, shown(path), lambda image: image.size)


def read_picture(source: Path | IO[bytes], name: str, *, size: int | None, channels: int) -> Tensor:
    """Decode one image to (channels, size, size) uint8, or (channels, H, W) with `size=None`.

    The picture is turned as its EXIF orientation says, the shorter side is scaled to `size` (antialiased bilinear) and
    the centre is cut out. Transparency is laid over white, 16-bit values are scaled to 8 bits, of an animation the
    first frame is taken, CMYK and palettes become RGB; `channels=1` takes the luma.

    Args:
        source: a path or an open binary file.
        name: what messages call the file.

    Raises:
        UnreadableImageError: truncated, not an image, too many pixels, or values without a known range.
    """

    def pixels(image: Picture) -> Tensor:
        if size is not None:  # a JPEG can be decoded at 1/2, 1/4, 1/8 for less; twice the size keeps the antialiasing
            image.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))
        image = _eight_bit(_upright(image), channels)
        if size is not None:
            image = _centre(image, size)
        values = np.array(image).reshape(image.height, image.width, channels)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    return _opened(source, name, pixels)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """`map` over a few threads, in order; the first failure in order is raised."""
    if WORKERS == 1 or len(items) < 2:
        return map(function, items)
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, items))


def _opened(source: Path | IO[bytes], name: str, use: Callable[[Picture], R]) -> R:
    """`use` of the opened image; whatever goes wrong names the file."""
    from PIL import Image

    if isinstance(source, Path) and source.is_file() and source.stat().st_size == 0:
        raise UnreadableImageError(f"{name} is empty (0 bytes)")
    try:
        with Image.open(source) as image:
            # Pillow itself only warns between the limit and twice the limit.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise UnreadableImageError(f"{name} has {image.width}x{image.height} pixels, more than {limit:,}")
            return use(image)
    except UnreadableImageError:
        raise
    except FileNotFoundError:
        raise UnreadableImageError(f"{name} does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImageError(f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImageError(f"{name} is not an image that Pillow can read") from None
    except OSError as error:
        told = os.strerror(error.errno) if error.errno else f"OSError: {reason(error)}"  # Pillow's own has no number
        raise UnreadableImageError(f"{name} can't be {'read' if error.errno else 'decoded'} ({told})") from None
    except Exception as error:  # a decoder fed with a damaged file may raise anything
        raise UnreadableImageError(f"{name} can't be decoded ({type(error).__name__}: {reason(error)})") from None


def _upright(image: Picture) -> Picture:
    """The first frame, turned as the EXIF orientation says."""
    from PIL import ImageOps

    image.load()
    return ImageOps.exif_transpose(image)


def _eight_bit(image: Picture, channels: int) -> Picture:
    """Any Pillow mode as 8-bit "RGB" or "L"."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"32-bit values from {low} to {high}; only 8 and 16 bits have a known range")
        eight = ((values * 255 + 32767) // 65535).astype(np.uint8)
        see_through = image.info.get("transparency")
        if isinstance(see_through, int):  # a PNG may name one value that is
            eight[values == see_through] = 255
        image = Image.fromarray(eight)
    elif image.mode == "F":
        raise ValueError("floating-point values have no known range")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _centre(image: Picture, size: int) -> Picture:
    """Shorter side to `size` and the centre square, in one resampling."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
