"""Reading and writing image files: every format ends as upright (H, W, 3) uint8 RGB, or as an error with a reason."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from cl4wsis.errors import DataError
from cl4wsis.images import _to_8_bits, decode_image, encode_jpeg, encode_png, read_image, write_png

RED, BLUE = (200, 30, 40), (20, 60, 250)


def two_halves() -> np.ndarray:
    """Return a (20, 30, 3) image, red above and blue below."""
    image = np.empty((20, 30, 3), np.uint8)
    image[:10], image[10:] = RED, BLUE
    return image


def pillow_bytes(mode: str, file_format: str, orientation: int | None = None) -> bytes:
    pillow = pytest.importorskip("PIL.Image")
    settings = {}
    if orientation is not None:
        settings["exif"] = pillow.Exif()
        settings["exif"][0x112] = orientation
    buffer = io.BytesIO()
    pillow.fromarray(two_halves()).convert(mode).save(buffer, file_format, **settings)
    return buffer.getvalue()


def is_near(pixel: np.ndarray, color: tuple[int, int, int], tolerance: int = 14) -> bool:
    return bool(np.abs(pixel.astype(int) - color).max() <= tolerance)


def test_png_keeps_rgb_order_and_values(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", two_halves())
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), two_halves())


def test_jpeg_keeps_colors_about() -> None:
    decoded = decode_image(encode_jpeg(two_halves()))
    assert is_near(decoded[3, 3], RED)
    assert is_near(decoded[16, 3], BLUE)


@pytest.mark.parametrize(
    ("mode", "file_format", "tolerance"),
    [
        ("RGBA", "PNG", 0),
        ("RGBA", "TIFF", 0),
        ("CMYK", "JPEG", 14),
        ("CMYK", "TIFF", 1),
        ("RGB", "WEBP", 14),
        ("RGB", "BMP", 0),
    ],
)
def test_formats_and_modes_give_the_same_colors(mode: str, file_format: str, tolerance: int) -> None:
    decoded = decode_image(pillow_bytes(mode, file_format))
    assert decoded.shape == (20, 30, 3)
    assert is_near(decoded[3, 3], RED, tolerance)
    assert is_near(decoded[16, 3], BLUE, tolerance)


def test_palette_is_resolved() -> None:
    decoded = decode_image(pillow_bytes("P", "PNG"))
    assert is_near(decoded[3, 3], RED, 30)
    assert is_near(decoded[16, 3], BLUE, 40)


@pytest.mark.parametrize(("mode", "file_format"), [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("1", "PNG")])
def test_gray_is_repeated_over_three_channels(mode: str, file_format: str) -> None:
    decoded = decode_image(pillow_bytes(mode, file_format))
    assert decoded.shape == (20, 30, 3)
    assert (decoded[..., 0] == decoded[..., 1]).all()
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_transparent_pixels_show_their_stored_color() -> None:
    bgra = np.zeros((4, 4, 4), np.uint8)
    bgra[..., :3] = RED[::-1]
    decoded = decode_image(cv2.imencode(".png", bgra)[1].tobytes())
    assert (decoded == RED).all()


def test_sixteen_bits_are_scaled_to_eight() -> None:
    values = np.array([[0, 128, 129, 257 * 7, 65535 - 128, 65535]], np.uint16)
    decoded = decode_image(encode_png(values))
    np.testing.assert_array_equal(decoded[..., 0], [[0, 0, 1, 7, 255, 255]])


@pytest.mark.parametrize("width", [1, 7, 256])
def test_every_value_of_sixteen_bits_is_rounded(width: int) -> None:
    values = np.arange(65536, dtype=np.uint16)
    padded = np.resize(values, (-(-len(values) // width), width))
    decoded = decode_image(encode_png(padded))[..., 0].reshape(-1)[: len(values)]
    np.testing.assert_array_equal(decoded, (values.astype(int) + 128) // 257)


def test_sixteen_bits_take_no_more_memory_than_their_result() -> None:
    image = np.zeros((500, 400, 3), np.uint16)
    tracemalloc.start()
    try:
        _to_8_bits(image, "image")
        assert tracemalloc.get_traced_memory()[1] < 1.1 * image.size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "shape", "red_at", "blue_at"),
    [
        (1, (20, 30, 3), (3, 15), (16, 15)),
        (3, (20, 30, 3), (16, 15), (3, 15)),
        (6, (30, 20, 3), (15, 16), (15, 3)),
        (8, (30, 20, 3), (15, 3), (15, 16)),
    ],
)
def test_exif_orientation_is_applied(
    file_format: str, orientation: int, shape: tuple[int, ...], red_at: tuple[int, int], blue_at: tuple[int, int]
) -> None:
    decoded = decode_image(pillow_bytes("RGB", file_format, orientation))
    assert decoded.shape == shape
    assert is_near(decoded[red_at], RED)
    assert is_near(decoded[blue_at], BLUE)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"hello", "is not an image"),
        (encode_png(noise())[:2000], "ends before"),
        (encode_jpeg(noise())[:2000], "ends before"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG"],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_bytes_after_the_end_of_a_jpeg_are_ignored() -> None:
    assert decode_image(encode_jpeg(noise()) + b"appended by a camera").shape == (64, 64, 3)


def test_floating_point_images_are_refused() -> None:
    pfm = b"PF\n2 2\n-1.0\n" + np.ones((2, 2, 3), "<f4").tobytes()
    with pytest.raises(DataError):
        decode_image(pfm)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: cannot be read: No such file"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_id_maps_survive_png(tmp_path: Path, dtype: type) -> None:
    ids = (np.arange(12).reshape(3, 4) * (20 if dtype is np.uint8 else 5000)).astype(dtype)
    write_png(tmp_path / "ids.png", ids)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "ids.png"), cv2.IMREAD_UNCHANGED), ids)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.int32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_arrays_that_are_no_png_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a PNG is made of"):
        encode_png(array)


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", two_halves())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_unwritable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: cannot be written"):
        write_png(tmp_path / "no such folder" / "a.png", two_halves())


def test_more_pixels_than_may_be_decoded_are_named() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    picture = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"has more pixels than may be decoded.*--max-pixels"):
        decode_image(picture)
