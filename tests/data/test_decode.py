"""Odd and damaged image files, each checked against pixels worked out by hand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hardmix.data.decode import UnreadableImageError, in_threads, read_header, read_picture, shown

RED, GREEN, BLUE = (200, 30, 20), (10, 180, 40), (15, 25, 190)


def quarters(mode: str = "RGB", side: int = 16) -> Image.Image:
    """Red, green / blue, white quarters."""
    values = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    values[:half, :half], values[:half, half:] = RED, GREEN
    values[half:, :half], values[half:, half:] = BLUE, (255, 255, 255)
    return Image.fromarray(values).convert(mode)


def read(path: Path, size: int | None = None, channels: int = 3) -> torch.Tensor:
    return read_picture(path, shown(path), size=size, channels=channels)


def corner(pixels: torch.Tensor, at: tuple[int, int] = (2, 2)) -> tuple[int, ...]:
    return tuple(pixels[:, at[0], at[1]].tolist())


def png(width: int, height: int, depth: int, color: int, rows: bytes, see_through: bytes = b"") -> bytes:
    """A PNG file written by hand; `see_through` is a value that is transparent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + (chunk(b"tRNS", see_through) if see_through else b"")
    return head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif", "ppm"])
def test_lossless_files_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    quarters().save(path, lossless=True)  # only webp asks
    expected = torch.from_numpy(np.asarray(quarters()).transpose(2, 0, 1).copy())
    assert torch.equal(read(path), expected)
    assert read(path).is_contiguous()


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    quarters("CMYK").save(path, quality=100)
    assert np.allclose(corner(read(path)), RED, atol=25)
    assert np.allclose(corner(read(path), (2, 12)), GREEN, atol=25)


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    values = [0, 257 * 100, 65535, 128]  # 128 / 257 rounds to 0
    path.write_bytes(png(4, 1, 16, 0, b"\0" + struct.pack(">4H", *values)))
    assert read(path).tolist() == [[[0, 100, 255, 0]]] * 3
    assert read(path, channels=1).tolist() == [[[0, 100, 255, 0]]]


def test_a_see_through_value_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    rows = b"\0" + struct.pack(">3H", 1000, 257 * 100, 0)
    path.write_bytes(png(3, 1, 16, 0, rows, struct.pack(">H", 1000)))
    assert read(path, channels=1).tolist() == [[[255, 100, 0]]]


def test_sixteen_bits_of_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(path)
    assert read(path, channels=1).tolist() == [[[0, 255]]]


@pytest.mark.parametrize(
    ("dtype", "message"), [(np.int32, "32-bit values from -1 to 70000"), (np.float32, "no known range")]
)
def test_values_without_a_range_are_refused(tmp_path: Path, dtype: type, message: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[-1, 70_000]], dtype)).save(path)
    with pytest.raises(UnreadableImageError, match=f"a.tif' can't be decoded .*{message}"):
        read(path)


def test_one_bit_and_gray(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").tolist() == [[[255, 0]]] * 3
    Image.fromarray(np.array([[7, 250]], np.uint8)).save(tmp_path / "b.png")
    assert read(tmp_path / "b.png", channels=1).tolist() == [[[7, 250]]]


def test_luma_of_red_green_blue(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.png")
    gray = read(tmp_path / "a.png", channels=1)
    for at, color in (((2, 2), RED), ((2, 12), GREEN), ((12, 2), BLUE)):
        assert abs(corner(gray, at)[0] - (0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2])) <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    picture = quarters("RGBA")
    picture.putalpha(Image.fromarray(np.repeat(np.repeat([[0, 128], [255, 255]], 8, 0), 8, 1).astype(np.uint8)))
    picture.convert(mode).save(tmp_path / "a.png")
    pixels = read(tmp_path / "a.png")
    assert corner(pixels) == (255, 255, 255)
    green = GREEN if mode == "RGBA" else (0.299 * 10 + 0.587 * 180 + 0.114 * 40,) * 3
    assert np.allclose(corner(pixels, (2, 12)), [128 / 255 * value + 127 for value in green], atol=2)


def test_a_palette_with_transparent_entries(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *GREEN])
    picture.putdata([0, 1])
    picture.save(tmp_path / "a.png", transparency=b"\xff\x00")
    assert read(tmp_path / "a.png")[:, 0].T.tolist() == [list(RED), [255, 255, 255]]


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.allclose(corner(read(tmp_path / "a.gif")), RED, atol=3)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    # what the camera held at the top left, and what the viewer shall see at the top left
    [(1, RED), (2, GREEN), (3, (255, 255, 255)), (4, BLUE), (5, RED), (6, BLUE), (7, (255, 255, 255)), (8, GREEN)],
)
def test_exif_orientation(tmp_path: Path, orientation: int, expected: tuple[int, ...]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters(side=32).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    assert np.allclose(corner(read(tmp_path / "a.jpg")), expected, atol=4)
    assert np.allclose(corner(read(tmp_path / "a.jpg", size=16)), expected, atol=4)


def test_the_shorter_side_is_scaled_and_the_centre_cut_out(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    whole = Image.fromarray(values).resize((30, 10), Image.Resampling.BILINEAR).crop((10, 0, 20, 10))
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", size=10), np.asarray(whole).transpose(2, 0, 1))
    Image.fromarray(values.transpose(1, 0, 2).copy()).save(tmp_path / "b.png")
    upright, lying = (read(tmp_path / name, size=10).int() for name in ("b.png", "a.png"))
    assert int((upright - lying.transpose(1, 2)).abs().max()) <= 1  # rounded after the first axis in some versions


def test_shrinking_averages(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "a.png")
    assert ((read(tmp_path / "a.png", size=8, channels=1).float() - 127.5).abs() <= 2).all()


def test_a_large_jpeg_is_close_to_its_exact_reduction(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (600, 400), Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "a.jpg", quality=95)
    exact = np.asarray(smooth.crop((100, 0, 500, 400)).resize((32, 32), Image.Resampling.BOX)).transpose(2, 0, 1)
    assert np.abs(read(tmp_path / "a.jpg", size=32).numpy().astype(int) - exact).mean() < 2


@pytest.mark.parametrize("size", [1, 5])
def test_one_pixel_is_enough(tmp_path: Path, size: int) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    pixels = read(tmp_path / "a.png", size=size)
    assert pixels.shape == (3, size, size)
    assert corner(pixels, (0, 0)) == RED


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]


def flipped_png() -> bytes:
    file = io.BytesIO()
    quarters().save(file, "PNG")
    content = bytearray(file.getvalue())
    content[-20] ^= 255
    return bytes(content)


DAMAGED = {
    "truncated.jpg": (truncated_jpeg(), "can't be decoded"),
    "flipped.png": (flipped_png(), "can't be decoded"),
    "empty.jpg": (b"", r"is empty \(0 bytes\)"),
    "text.jpg": (b"<html>404</html>", "is not an image that Pillow can read"),
    "head.png": (b"\x89PNG\r\n\x1a\n", "(is not an image|can't be decoded)"),
    "huge.png": (png(20_000, 20_000, 8, 0, b""), "pixels"),
    "large.png": (png(10_000, 10_000, 8, 0, b""), "pixels"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_the_reason(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=message) as caught:
        read(path, size=8)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_header_alone_tells_the_size_and_the_worst_damage(tmp_path: Path) -> None:
    quarters().resize((30, 20)).save(tmp_path / "a.jpg")
    assert read_header(tmp_path / "a.jpg") == (30, 20)
    for name, (content, message) in DAMAGED.items():
        (tmp_path / name).write_bytes(content)
        if name not in ("truncated.jpg", "flipped.png"):
            with pytest.raises(UnreadableImageError, match=message):
                read_header(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=r"gone.png' does not exist"):
        read_header(tmp_path / "gone.png")


def test_the_limit_on_pixels_is_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarters().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)
    read(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16 - 1)
    with pytest.raises(UnreadableImageError, match=r"more than 255 pixels|16x16 pixels"):
        read(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    read(tmp_path / "a.png")


def test_names_are_shown_escaped() -> None:
    assert shown(Path("a\nb\x1b[31m.png")) == r"'a\nb\x1b[31m.png'"


def test_threads_keep_the_order_and_raise_the_first_failure() -> None:
    assert list(in_threads(lambda n: n * n, range(50))) == [n * n for n in range(50)]

    def fail(n: int) -> int:
        if n in (7, 30):
            raise ValueError(f"item {n}")
        return n

    with pytest.raises(ValueError, match="item 7"):
        list(in_threads(fail, range(50)))


def test_a_folder_called_like_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UnreadableImageError, match=r"a.png' can't be read \(Is a directory\)$"):
        read(tmp_path / "a.png")
