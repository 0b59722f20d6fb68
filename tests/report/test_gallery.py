"""Pictures of mixed samples, and the shares in their captions."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from hardmix.report import caption, mixed_sheet
from hardmix.report.gallery import data_uri, picture, shares

from .fake_runs import CLASSES, draw_images


def sheet(count: int, channels: int = 1, size: int = 12, mask: bool = True, **options: int) -> Image.Image:
    images = draw_images(2 * count, channels, size)
    own, partner = images[:count], images[count:]
    share = torch.zeros(count, 1, size, size)
    share[..., size // 2 :] = 1
    mixed = (share * own + (1 - share) * partner).to(torch.uint8)
    return mixed_sheet(own, partner, share if mask else None, mixed, [f"row {i}" for i in range(count)], **options)


@pytest.mark.parametrize("count", [1, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_sheets_of_all_kinds(count: int, channels: int) -> None:
    drawn = sheet(count, channels)
    assert drawn.mode == "RGB"
    across = 2 if count >= 4 else 1
    assert drawn.width == across * (4 * 112 + 3 * 8) + (across + 1) * 40 - 40
    assert drawn.height >= -(-count // across) * 112


def test_images_are_enlarged_without_smoothing() -> None:
    own = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    own[0, 0, 0, 1] = 200
    drawn = mixed_sheet(own, own, None, own, ["x"], side=64)
    top, left = 46, 20
    cell = drawn.crop((left, top, left + 64, top + 64)).convert("L")
    assert set(cell.get_flattened_data() if hasattr(cell, "get_flattened_data") else cell.getdata()) == {0, 200}
    assert cell.getpixel((40, 20)) == 200
    assert cell.getpixel((20, 40)) == 0


def test_oblong_images_keep_their_shape() -> None:
    images = torch.zeros(1, 3, 10, 40, dtype=torch.uint8)
    drawn = mixed_sheet(images, images, torch.ones(1, 1, 1, 1), images, ["x"], side=80)
    assert drawn.width == 4 * 80 + 3 * 8 + 40
    assert drawn.height < 120


def test_captions_too_long_or_hostile_are_cut() -> None:
    images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    for text in ("A" * 100_000, "a\nb\u202ec", "\u65e5\u672c\u8a9e", ""):
        assert mixed_sheet(images, images, None, images, [text]).width == 3 * 112 + 2 * 8 + 40


def test_floats_are_values_from_zero_to_one() -> None:
    image = torch.tensor([[[0.0, 0.5], [1.0, 7.0]]])
    assert list(picture(image).tobytes()) == [0, 128, 255, 255]
    assert list(picture(torch.full((1, 1, 1), float("nan"))).tobytes()) == [0]
    assert picture(torch.zeros(3, 4, 6, dtype=torch.uint8)).size == (6, 4)


def test_small_pictures_are_stored_exactly() -> None:
    import base64

    image = draw_images(1, 3, 20)[0]
    uri = data_uri(picture(image))
    assert uri.startswith("data:image/png;base64,")
    stored = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert stored.tobytes() == picture(image).tobytes()
    large = data_uri(picture(draw_images(1, 3, 300)[0]))
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 20_000


def test_captions() -> None:
    assert caption([7, 8], [0.38, 0.62], CLASSES) == "Sneaker 0.38 + Bag 0.62"
    assert caption([8, 8], [0.25, 0.75], CLASSES) == "Bag 1.00"
    assert caption([8, 12, -1], [0.5, 0.25, 0.25], CLASSES) == "Bag 0.50 + class 12 0.25 + class -1 0.25"
    assert shares([1, 2], [0.5, 0.5], []) == [("class 1", 0.5), ("class 2", 0.5)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"own": torch.zeros(2, 1, 4, 5)}, "mixed_sheet: own has shape"),
        ({"partner": torch.zeros(1, 1, 4, 4)}, "mixed_sheet: partner has shape"),
        ({"mask": torch.zeros(2, 4, 4)}, r"mask has shape \(2, 4, 4\); pass \(2, 1, 4, 4\)"),
        ({"captions": ["one"]}, "captions has 1 entries but mixed has 2 rows"),
        ({"mixed": torch.zeros(4, 4)}, "mixed has shape"),
        ({"side": 3}, "side is 3"),
    ],
)
def test_bad_inputs_are_named(change: dict, text: str) -> None:
    images = torch.zeros(2, 1, 4, 4)
    arguments = {"own": images, "partner": images, "mask": None, "mixed": images, "captions": ["a", "b"]} | change
    with pytest.raises(ValueError, match=text):
        mixed_sheet(**arguments)
